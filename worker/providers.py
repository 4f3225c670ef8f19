"""What a model runs on: ONNX Runtime's execution providers, with their options; and why one of them does not come.

ONNX Runtime goes on with the CPU when a provider cannot be made, and says so in its log alone. Here that is a failure:
a model that was to run on a GPU and runs forty times as slowly on a CPU looks like a server that works.
"""

from __future__ import annotations

import contextlib
import ctypes
import io
import logging
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, NamedTuple

import onnxruntime

from penstock.wire.process import fields
from penstock.worker.config import CPU, ModelConfig, Provider

log = logging.getLogger("penstock.worker")

_CLASSES: Final[dict[Provider, str]] = {
    "tensorrt": "TensorrtExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "cpu": "CPUExecutionProvider",
}
_LIBRARIES: Final[dict[Provider, str]] = {
    "tensorrt": "libonnxruntime_providers_tensorrt.so",
    "cuda": "libonnxruntime_providers_cuda.so",
}
_INSTALL: Final[dict[Provider, str]] = {
    "tensorrt": "pip install 'penstock[cuda]' tensorrt-cu{major}",
    "cuda": "pip install 'penstock[cuda]'",
}
# A worker sees one GPU, or slice of one, whatever its number is outside (CUDA_VISIBLE_DEVICES).
_DEVICE_ID: Final = "0"
_DRIVER: Final = "libcuda.so.1"
_MISSING: Final = re.compile(r"^(\S+\.so[\w.]*): cannot open shared object file")


class ProviderError(Exception):
    """A provider that was asked for cannot be had; the message is why, and the way out."""


class Session(NamedTuple):
    """What to open a session with: ``providers`` as ONNX Runtime takes them, the first of which must come."""

    wanted: tuple[Provider, ...]
    providers: list[tuple[str, dict[str, str]]]

    @property
    def on_gpu(self) -> bool:
        return self.wanted[0] != CPU


ON_CPU: Final = Session((CPU,), [(_CLASSES[CPU], {})])


def choose(config: ModelConfig, device: str, engines: Path | None = None) -> Session:
    """For a model on this worker's device. ``engines``: where TensorRT keeps what it has built for this model and this
    GPU, if anywhere. Raises ProviderError for a model that is not for this device."""
    asked = config.providers
    if device == CPU:
        if asked is not None and CPU not in asked:
            raise ProviderError(f"its model.toml wants {' or '.join(asked)}, and this worker runs on the CPU")
        return ON_CPU
    wanted = asked or ("cuda", CPU)
    return Session(wanted, [(_CLASSES[each], _OPTIONS[each](config, engines)) for each in wanted])


def _cuda_options(config: ModelConfig, engines: Path | None) -> dict[str, str]:
    """https://onnxruntime.ai/docs/execution-providers/CUDA-ExecutionProvider.html"""
    options = {
        "device_id": _DEVICE_ID,
        "arena_extend_strategy": "kSameAsRequested" if config.gpu_arena == "same_as_requested" else "kNextPowerOfTwo",
        "cudnn_conv_algo_search": config.cudnn_search.upper(),
        "use_tf32": _flag(config.tf32),
        "enable_cuda_graph": _flag(config.cuda_graphs),
    }
    if config.gpu_memory_limit is not None:
        options["gpu_mem_limit"] = str(config.gpu_memory_limit)
    return options


def _tensorrt_options(config: ModelConfig, engines: Path | None) -> dict[str, str]:
    """https://onnxruntime.ai/docs/execution-providers/TensorRT-ExecutionProvider.html"""
    options = {"device_id": _DEVICE_ID, "trt_fp16_enable": _flag(config.fp16)}
    if config.gpu_memory_limit is not None:
        options["trt_max_workspace_size"] = str(config.gpu_memory_limit)
    if engines is not None:
        options |= {
            "trt_engine_cache_enable": "1",
            "trt_engine_cache_path": str(engines),
            "trt_timing_cache_enable": "1",
            "trt_timing_cache_path": str(engines),
        }
    return options


_OPTIONS: Final[dict[Provider, Callable[[ModelConfig, Path | None], dict[str, str]]]] = {
    "tensorrt": _tensorrt_options,
    "cuda": _cuda_options,
    "cpu": lambda config, engines: {},
}


def _flag(value: bool) -> str:
    return "1" if value else "0"


def open_session(source: Path, options: Any, wanted: Session = ON_CPU) -> Any:
    """Raises ProviderError when the first of the providers has not come, and what ONNX Runtime raises."""
    first = wanted.wanted[0]
    if wanted.on_gpu:
        _preload()
    try:
        # By itself it would print, and go on with the others.
        session = onnxruntime.InferenceSession(str(source), options, providers=wanted.providers, enable_fallback=0)
    except Exception as error:
        # Without TensorRT's libraries it is an error already, which names none of them.
        if wanted.on_gpu and "install TensorRT" in str(error):
            raise ProviderError(f"TensorRT cannot be used: {why_not('tensorrt')}") from None
        raise
    if session.get_providers()[0] != _CLASSES[first]:
        raise ProviderError(f"{_TITLES[first]} cannot be used: {why_not(first)}")
    return session


_TITLES: Final[dict[Provider, str]] = {"tensorrt": "TensorRT", "cuda": "CUDA", "cpu": "the CPU"}
_preloaded = False


def _preload() -> None:
    """CUDA's libraries, as pip installs them: they are not where the loader looks."""
    global _preloaded
    if _preloaded or not hasattr(onnxruntime, "preload_dlls"):
        return
    _preloaded = True
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        onnxruntime.preload_dlls()
    if said.getvalue():
        log.debug("not all of CUDA's libraries were found", extra=fields(said=said.getvalue().strip()))


def tensorrt_version() -> int:
    """Such as 101300 for 10.13; 0 where there is none."""
    _preload()
    try:
        return int(ctypes.CDLL("libnvinfer.so.10").getInferLibVersion())
    except (OSError, AttributeError):
        return 0


def why_not(provider: Provider) -> str:
    """Why a provider has not come, as far as can be found out, and the way out."""
    if _CLASSES[provider] not in onnxruntime.get_available_providers():
        return (
            f"this ONNX Runtime ({onnxruntime.__version__}) is built without it; "
            "pip uninstall onnxruntime, and pip install onnxruntime-gpu"
        )
    built_for = getattr(onnxruntime, "cuda_version", None) or ""
    missing = missing_library(Path(onnxruntime.__file__).with_name("capi") / _LIBRARIES[provider])
    if missing and _DRIVER not in missing:
        return f"{missing}; {_INSTALL[provider].format(major=built_for.partition('.')[0])}"
    return why_no_gpu(built_for)


def missing_library(library: Path) -> str:
    """What stands in the way of loading it, or ""."""
    try:
        ctypes.CDLL(str(library))
    except OSError as error:
        match = _MISSING.match(str(error))
        return f"the library {match[1]} is not installed" if match else f"a library cannot be loaded ({error})"
    return ""


def why_no_gpu(built_for: str, open_driver: Callable[[str], Any] = ctypes.CDLL) -> str:
    """What the driver says to it. ``built_for``: the version of CUDA, such as "13.0", that it has to know."""
    try:
        driver = open_driver(_DRIVER)
    except OSError:
        return (
            "there is no NVIDIA driver; install one (Debian: apt install nvidia-driver) and see that nvidia-smi answers"
        )
    version = ctypes.c_int()
    code = driver.cuInit(0)
    driver.cuDriverGetVersion(ctypes.byref(version))
    knows = f"{version.value // 1000}.{version.value % 1000 // 10}"
    if version.value and built_for and _number(built_for) > _number(knows):
        return f"the NVIDIA driver is too old: it knows CUDA {knows}, and {built_for} is needed; install a newer one"
    count = ctypes.c_int()
    if code == 0:
        code = driver.cuDeviceGetCount(ctypes.byref(count))
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    among = "" if visible is None else f" (CUDA_VISIBLE_DEVICES is {visible!r})"
    if code or not count.value:
        return f"the NVIDIA driver shows no GPU to this process{among}: error {code}; see what nvidia-smi says"
    return (
        f"the NVIDIA driver shows {count.value} GPU{among}; run with --verbose, and ONNX Runtime's log has the reason"
    )


def _number(version: str) -> int:
    """Any driver of a major version runs what was built for it."""
    return int(version.partition(".")[0])
