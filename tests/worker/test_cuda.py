"""What is asked of NVIDIA's driver, and what its codes become; on a machine with a GPU, the driver itself."""

from __future__ import annotations

import ctypes
import threading
from typing import Any

import numpy as np
import pytest

from penstock.worker.cuda import CudaError, CudaMemoryError, Gpu
from tests.worker.test_providers import has_gpu

CONTEXT = 77


class Driver:
    """NVIDIA's library: keeps what it is asked, and has memory of the host's. ``fail``: codes by function."""

    def __init__(self) -> None:
        self.fail: dict[str, int] = {}
        self.asked: list[tuple[Any, ...]] = []
        self.memory: dict[int, Any] = {}
        self.current: set[int] = set()

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any) -> int:
            self.asked.append((name, *[getattr(each, "value", each) for each in arguments]))
            if name not in {"cuInit", "cuDeviceGet", "cuDevicePrimaryCtxRetain", "cuCtxSetCurrent"}:
                assert threading.get_ident() in self.current, f"{name} is called in no context"
            code = self.fail.get(name, 0)
            return code or self.does(name, arguments)

        return call

    def does(self, name: str, arguments: tuple[Any, ...]) -> int:
        match name:
            case "cuDevicePrimaryCtxRetain":
                arguments[0]._obj.value = CONTEXT
            case "cuCtxSetCurrent":
                assert arguments[0].value == CONTEXT
                self.current.add(threading.get_ident())
            case "cuMemAlloc_v2":
                memory = (ctypes.c_char * arguments[1].value)()
                self.memory[ctypes.addressof(memory)] = memory
                arguments[0]._obj.value = ctypes.addressof(memory)
            case "cuMemFree_v2":
                del self.memory[arguments[0].value]
            case "cuMemcpyHtoDAsync_v2" | "cuMemcpyDtoHAsync_v2":
                ctypes.memmove(arguments[0].value, arguments[1].value, arguments[2].value)
            case "cuStreamCreate":
                arguments[0]._obj.value = 5
            case "cuDeviceGetAttribute":
                arguments[0]._obj.value = {75: 9, 76: 0}[arguments[1]]
            case "cuDriverGetVersion":
                arguments[0]._obj.value = 13010
        return 0

    def cuGetErrorString(self, code: int, into: Any) -> int:
        ctypes.cast(into, ctypes.POINTER(ctypes.c_char_p))[0] = b"out of memory" if code == 2 else b"a failure"
        return 0


@pytest.fixture
def driver() -> Driver:
    return Driver()


@pytest.fixture
def gpu(driver: Driver) -> Gpu:
    return Gpu(driver)


def round_trip(gpu: Gpu) -> None:
    """There and back again."""
    x = np.arange(1000, dtype=np.float32)
    y = np.zeros_like(x)
    gpu.pin(x.ctypes.data, x.nbytes)
    there = gpu.allocate(x.nbytes)
    stream = gpu.stream()
    stream.copy_in(there, x.ctypes.data, x.nbytes)
    stream.copy_out(y.ctypes.data, there, x.nbytes)
    stream.wait()
    gpu.free(there)
    gpu.unpin(x.ctypes.data)
    assert (x == y).all()


def test_what_is_copied_there_comes_back(gpu: Gpu, driver: Driver) -> None:
    round_trip(gpu)
    assert driver.memory == {}
    copied = [call for call in driver.asked if "Async" in call[0]]
    assert [call[4] for call in copied] == [5, 5], "on the stream"


def test_each_thread_works_in_the_gpus_context(gpu: Gpu, driver: Driver) -> None:
    round_trip(gpu)
    thread = threading.Thread(target=round_trip, args=(gpu,))
    thread.start()
    thread.join()
    assert len(driver.current) == 2


def test_the_gpu_says_what_it_is(gpu: Gpu) -> None:
    assert (gpu.capability, gpu.driver, gpu.name) == ("9.0", 13010, "cuda")


def test_a_want_of_memory_is_told_apart(gpu: Gpu, driver: Driver) -> None:
    driver.fail = {"cuMemAlloc_v2": 2, "cuStreamSynchronize": 700}
    with pytest.raises(CudaMemoryError, match=r"cuMemAlloc_v2 failed: out of memory \(2\)"):
        gpu.allocate(100)
    with pytest.raises(CudaError, match=r"cuStreamSynchronize failed: a failure \(700\)"):
        gpu.stream().wait()
    assert not issubclass(CudaError, RuntimeError), "it must not pass for a failure of a model"


def test_what_is_pinned_already_may_stay_so(gpu: Gpu, driver: Driver) -> None:
    driver.fail = {"cuMemHostRegister_v2": 712}
    gpu.pin(4096, 100)
    driver.fail = {"cuMemHostRegister_v2": 1}
    with pytest.raises(CudaError):
        gpu.pin(4096, 100)


@pytest.mark.parametrize("step", ["cuInit", "cuDeviceGet", "cuDevicePrimaryCtxRetain"])
def test_a_gpu_that_cannot_be_had_is_an_error(driver: Driver, step: str) -> None:
    driver.fail = {step: 100}
    with pytest.raises(CudaError, match=step):
        Gpu(driver)


@pytest.mark.skipif(has_gpu(), reason="for machines without a GPU")
def test_without_a_driver_there_is_no_gpu() -> None:
    with pytest.raises(CudaError):
        Gpu()


@pytest.mark.skipif(not has_gpu(), reason="needs a GPU")
def test_a_real_gpu_copies_there_and_back() -> None:
    gpu = Gpu()
    round_trip(gpu)
    assert float(gpu.capability) > 5
    with pytest.raises(CudaMemoryError):
        gpu.allocate(1 << 50)
