"""What models run on: what is asked of ONNX Runtime, and what is said when it does not come."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnxruntime
import pytest
from onnx import TensorProto, helper

from penstock.worker import providers
from penstock.worker.config import ConfigError, ModelConfig, load_config
from penstock.worker.cuda import CudaError, Gpu
from penstock.worker.model import LoadError, load
from penstock.worker.providers import ON_CPU, ProviderError, choose, missing_library, why_no_gpu, why_not

if TYPE_CHECKING:
    from tests.worker.conftest import Workshop


def has_gpu() -> bool:
    try:
        Gpu()
    except CudaError:
        return False
    return True


without_gpu = pytest.mark.skipif(has_gpu(), reason="for machines without a GPU")


def test_a_worker_on_the_cpu_asks_for_nothing_else() -> None:
    assert choose(ModelConfig(), "cpu") == ON_CPU
    assert choose(ModelConfig(providers=("tensorrt", "cuda", "cpu")), "cpu") == ON_CPU


def test_a_model_for_gpus_alone_is_refused_on_the_cpu() -> None:
    with pytest.raises(ProviderError, match="wants tensorrt or cuda, and this worker runs on the CPU"):
        choose(ModelConfig(providers=("tensorrt", "cuda")), "cpu")


def test_on_a_gpu_cuda_comes_first_and_has_defaults() -> None:
    wanted = choose(ModelConfig(), "cuda:1")
    assert (wanted.wanted, wanted.on_gpu) == (("cuda", "cpu"), True)
    assert wanted.providers == [
        (
            "CUDAExecutionProvider",
            {
                "device_id": "0",
                "arena_extend_strategy": "kSameAsRequested",
                "cudnn_conv_algo_search": "EXHAUSTIVE",
                "use_tf32": "1",
                "enable_cuda_graph": "0",
            },
        ),
        ("CPUExecutionProvider", {}),
    ]


def test_what_model_toml_says_is_passed_on() -> None:
    config = ModelConfig(
        providers=("tensorrt", "cuda", "cpu"),
        gpu_memory_limit=1 << 30,
        gpu_arena="next_power_of_two",
        cudnn_search="heuristic",
        tf32=False,
        fp16=True,
    )
    (_, tensorrt), (_, cuda), (_, cpu) = choose(config, "cuda:0", Path("/store/engines/x")).providers
    assert tensorrt == {
        "device_id": "0",
        "trt_fp16_enable": "1",
        "trt_max_workspace_size": "1073741824",
        "trt_engine_cache_enable": "1",
        "trt_engine_cache_path": "/store/engines/x",
        "trt_timing_cache_enable": "1",
        "trt_timing_cache_path": "/store/engines/x",
    }
    assert cuda == {
        "device_id": "0",
        "arena_extend_strategy": "kNextPowerOfTwo",
        "cudnn_conv_algo_search": "HEURISTIC",
        "use_tf32": "0",
        "enable_cuda_graph": "0",
        "gpu_mem_limit": "1073741824",
    }
    assert cpu == {}


def test_a_model_may_stay_on_the_cpu_of_a_worker_with_a_gpu(workshop: Workshop) -> None:
    path = workshop.unary("Neg", TensorProto.FLOAT, ["N", 4])
    wanted = choose(ModelConfig(providers=("cpu",)), "cuda:0")
    assert not wanted.on_gpu
    assert path.gpu is None


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ('providers = ["cuda", "cuda"]', r"name each once, and one at least, not \['cuda', 'cuda'\]"),
        ("providers = []", "name each once, and one at least"),
        ('providers = ["cpu", "cuda"]', "cpu runs everything"),
        ('providers = ["rocm"]', "Invalid enum value 'rocm'"),
        ("fp16 = true", "only TensorRT computes in FP16"),
        ("cuda_graphs = true\ninstances = 2", "one instance"),
        ('cuda_graphs = true\nproviders = ["tensorrt"]', "'cuda' as the first"),
        ("gpu_memory_limit = 0", ">= 1"),
        ('gpu_arena = "huge"', "Invalid enum value"),
    ],
)
def test_contradictions_are_told(tmp_path: Path, text: str, sentence: str) -> None:
    (tmp_path / "model.toml").write_text(text)
    with pytest.raises(ConfigError, match=sentence):
        load_config(tmp_path / "model.toml", "cuda:0")


@pytest.mark.parametrize(
    ("text", "device", "instances"),
    [
        ("", "cpu", 1),
        ("", "cuda:0", 2),
        ("instances = 1", "cuda:0", 1),
        ("cuda_graphs = true", "cuda:0", 1),
        (None, "cuda:0", 2),
        (None, "cpu", 1),
    ],
)
def test_on_a_gpu_one_batch_is_copied_while_another_computes(
    tmp_path: Path, text: str | None, device: str, instances: int
) -> None:
    if text is not None:
        (tmp_path / "model.toml").write_text(text)
    assert load_config(tmp_path / "model.toml", device).instances == instances


@without_gpu
@pytest.mark.parametrize("first", ["cuda", "tensorrt"])
def test_a_gpu_that_does_not_come_is_a_failure_with_the_way_out(
    workshop: Workshop, first: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    """And not a model that runs on the CPU."""
    content = workshop.build(
        [helper.make_node("Neg", ["x"], ["y"])],
        {"x": (TensorProto.FLOAT, ["N", 4])},
        {"y": (TensorProto.FLOAT, ["N", 4])},
    )
    with pytest.raises(LoadError) as told:
        load(workshop.save(content), "m", "1", ModelConfig(providers=(first, "cpu")), device="cuda:0")
    title = {"cuda": "CUDA", "tensorrt": "TensorRT"}[first]
    assert str(told.value).startswith(f"model 'm' cannot be loaded: {title} cannot be used: ")
    assert "install" in str(told.value)
    assert "Falling back" not in capfd.readouterr().out


def test_a_library_that_is_missing_is_named(tmp_path: Path) -> None:
    assert "not installed" in missing_library(tmp_path / "libnone.so")
    (tmp_path / "libbad.so").write_text("no library")
    assert "cannot be loaded" in missing_library(tmp_path / "libbad.so")
    assert missing_library(Path(onnxruntime.__file__).with_name("capi") / "libonnxruntime_providers_shared.so") == ""


def test_an_onnx_runtime_without_cuda_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    assert "is built without it; pip uninstall onnxruntime, and pip install onnxruntime-gpu" in why_not("cuda")


class Driver:
    """NVIDIA's library, as far as it is asked why there is no GPU."""

    def __init__(self, version: int = 13000, init: int = 0, count: int = 1) -> None:
        self._version, self._init, self._count = version, init, count

    def cuInit(self, flags: int) -> int:
        return self._init

    def cuDriverGetVersion(self, into: Any) -> int:
        ctypes.cast(into, ctypes.POINTER(ctypes.c_int))[0] = self._version
        return 0

    def cuDeviceGetCount(self, into: Any) -> int:
        ctypes.cast(into, ctypes.POINTER(ctypes.c_int))[0] = self._count
        return 0


def absent(name: str) -> Any:
    raise OSError(f"{name}: cannot open shared object file")


@pytest.mark.parametrize(
    ("driver", "sentence"),
    [
        (absent, "there is no NVIDIA driver; install one"),
        (lambda name: Driver(version=12040), "too old: it knows CUDA 12.4, and 13.0 is needed"),
        (lambda name: Driver(version=12040, init=803), "too old"),
        (lambda name: Driver(init=100), "shows no GPU to this process (CUDA_VISIBLE_DEVICES is 'GPU-1'): error 100"),
        (lambda name: Driver(count=0), "shows no GPU to this process"),
        (lambda name: Driver(version=14020), "shows 1 GPU"),
    ],
)
def test_the_driver_says_why(monkeypatch: pytest.MonkeyPatch, driver: Callable[[str], Any], sentence: str) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-1")
    assert sentence in why_no_gpu("13.0", driver)


def test_libraries_are_looked_for_once(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(providers, "_preloaded", False)
    providers._preload()
    assert providers._preloaded
    assert capfd.readouterr().out == "", "what ONNX Runtime prints is for the log"
