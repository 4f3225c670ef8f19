"""CUDA's driver, as far as batches need it: memory on the GPU, pinned memory on the host, and copies between them.

ONNX Runtime computes; its own copies of inputs and outputs are one by one, wait for each other, and begin in memory
that the GPU cannot read by itself. The driver's library comes with the driver, whatever version of CUDA is installed,
and its calls let go of the GIL. https://docs.nvidia.com/cuda/cuda-driver-api/ has names, signatures and codes.
"""

from __future__ import annotations

import ctypes
import threading
from functools import cache
from typing import Any, Final

_LIBRARY: Final = "libcuda.so.1"
_OUT_OF_MEMORY: Final = 2
_ALREADY_PINNED: Final = 712
_STREAM_NON_BLOCKING: Final = 1
_PORTABLE: Final = 1  # pinned for all threads
_MAJOR, _MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_*


class CudaError(Exception):
    """A call has failed, for another reason than memory: what the process holds on the GPU cannot be relied on."""


class CudaMemoryError(MemoryError):
    """There is no room on the GPU, or for pinned memory."""


class Stream:
    """Copies that run one after another, beside those of other streams. For one thread at a time."""

    def __init__(self, gpu: Gpu, handle: int) -> None:
        self._gpu = gpu
        self._handle = ctypes.c_void_p(handle)

    def copy_in(self, device: int, host: int, nbytes: int) -> None:
        """To the GPU, some time before ``wait`` returns; the host's memory stays as it is until then."""
        self._gpu.call("cuMemcpyHtoDAsync_v2", _address(device), _pointer(host), _size(nbytes), self._handle)

    def copy_out(self, host: int, device: int, nbytes: int) -> None:
        """From the GPU."""
        self._gpu.call("cuMemcpyDtoHAsync_v2", _pointer(host), _address(device), _size(nbytes), self._handle)

    def wait(self) -> None:
        """Until all that was asked for has been copied."""
        self._gpu.call("cuStreamSynchronize", self._handle)


class Gpu:
    """The one GPU that this process sees. Addresses are numbers. All calls raise CudaError and CudaMemoryError."""

    name: Final = "cuda"  # what ONNX Runtime calls where its addresses lie

    def __init__(self, library: Any = None) -> None:
        self._library = library or _open()
        self._thread = threading.local()
        self._context = ctypes.c_void_p()
        self._check("cuInit", self._library.cuInit(0))
        self._device = ctypes.c_int()
        self._check("cuDeviceGet", self._library.cuDeviceGet(ctypes.byref(self._device), 0))
        # The one that ONNX Runtime, by way of CUDA's runtime, uses too.
        retained = self._library.cuDevicePrimaryCtxRetain(ctypes.byref(self._context), self._device)
        self._check("cuDevicePrimaryCtxRetain", retained)

    def call(self, name: str, *arguments: Any) -> None:
        """A function of the driver, in this GPU's context."""
        if not getattr(self._thread, "ready", False):
            self._check("cuCtxSetCurrent", self._library.cuCtxSetCurrent(self._context))
            self._thread.ready = True
        self._check(name, getattr(self._library, name)(*arguments))

    def _check(self, name: str, code: int) -> None:
        if not code:
            return
        said = ctypes.c_char_p()
        self._library.cuGetErrorString(code, ctypes.byref(said))
        sentence = f"{name} failed: {(said.value or b'unknown error').decode()} ({code})"
        raise CudaMemoryError(sentence) if code == _OUT_OF_MEMORY else CudaError(sentence)

    @property
    def capability(self) -> str:
        """The GPU's architecture, such as "9.0"."""
        found = []
        for which in (_MAJOR, _MINOR):
            value = ctypes.c_int()
            self.call("cuDeviceGetAttribute", ctypes.byref(value), which, self._device)
            found.append(str(value.value))
        return ".".join(found)

    @property
    def driver(self) -> int:
        """The version of CUDA that the driver knows, 13000 for 13.0."""
        version = ctypes.c_int()
        self.call("cuDriverGetVersion", ctypes.byref(version))
        return version.value

    def allocate(self, nbytes: int) -> int:
        """Memory on the GPU, aligned to 256 bytes at least."""
        address = ctypes.c_uint64()
        self.call("cuMemAlloc_v2", ctypes.byref(address), _size(nbytes))
        return address.value

    def free(self, address: int) -> None:
        self.call("cuMemFree_v2", _address(address))

    def pin(self, address: int, nbytes: int) -> None:
        """Have the GPU read and write memory of this process where it lies, at its full speed."""
        try:
            self.call("cuMemHostRegister_v2", _pointer(address), _size(nbytes), ctypes.c_uint(_PORTABLE))
        except CudaError as error:
            if f"({_ALREADY_PINNED})" not in str(error):
                raise

    def unpin(self, address: int) -> None:
        self.call("cuMemHostUnregister", _pointer(address))

    def stream(self) -> Stream:
        handle = ctypes.c_void_p()
        self.call("cuStreamCreate", ctypes.byref(handle), ctypes.c_uint(_STREAM_NON_BLOCKING))
        return Stream(self, handle.value or 0)


@cache
def find_gpu() -> Gpu:
    """One for the whole process."""
    return Gpu()


def _open() -> Any:
    try:
        return ctypes.CDLL(_LIBRARY)
    except OSError as error:
        raise CudaError(f"there is no NVIDIA driver ({error})") from None


def _pointer(address: int) -> ctypes.c_void_p:
    return ctypes.c_void_p(address)


def _address(address: int) -> ctypes.c_uint64:
    return ctypes.c_uint64(address)


def _size(nbytes: int) -> ctypes.c_size_t:
    return ctypes.c_size_t(nbytes)
