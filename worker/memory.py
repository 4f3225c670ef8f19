"""What ONNX Runtime's runs take: one arena for all models of a process, bounded, given back, and measured.

Each session would have an arena of its own, which keeps for ever what its largest batch once took. Sessions made after
``share_arena`` share one instead, which holds no more than runs have needed at once since the last ``give_back``.
Weights lie outside of it.
"""

from __future__ import annotations

import ctypes
from typing import Any, Final

import numpy as np
import onnxruntime
from onnxruntime.capi import onnxruntime_pybind11_state as _state

from penstock.wire.arena import available_bytes

_DEFAULT_SHARE: Final = 2  # of the available memory, one part of so many
_DEFAULT_MIN_BYTES: Final = 256 << 20
_SAME_AS_REQUESTED: Final = 1  # how the arena grows; by powers of two it would hold up to twice what is needed
_FIRST_BYTES: Final = 64 * 1024
_DEFAULT: Final = -1
_IDLE_S: Final = 10.0
_BUSY_S: Final = 60.0

# An ONNX model, y = Identity(x) of one float: the arena gives back what lies unused at the end of a run that is told
# to, and this is a run of nobody's model.
_IDENTITY: Final = (
    b'\x08\x08:7\n\x10\n\x01x\x12\x01y"\x08Identity\x12\x01gZ\x0f\n\x01x\x12\n\n\x08\x08\x01\x12\x04\n\x02\x08\x01'
    b"b\x0f\n\x01y\x12\n\n\x08\x08\x01\x12\x04\n\x02\x08\x01B\x04\n\x00\x10\r"
)
_SHRINK: Final = ("memory.enable_memory_arena_shrinkage", "cpu:0")


class _HeapInfo(ctypes.Structure):
    """mallinfo2(3)."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
            *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
        )
    ]


_libc: Final = ctypes.CDLL(None)
_mallinfo2: Final = getattr(_libc, "mallinfo2", None)  # glibc 2.33 and newer
_malloc_trim: Final = getattr(_libc, "malloc_trim", None)  # glibc
if _mallinfo2 is not None:
    _mallinfo2.restype = _HeapInfo

# ONNX Runtime's environment is the process's, and so is this. None: each session has its own arena.
_shrinker: _Shrinker | None = None


def share_arena(limit: int) -> int:
    """Have sessions that are made from now on run in one arena of at most so many bytes; -1: half of the memory that is
    available, but 256 MiB at least. Returns the bytes. A process does this once; the first limit stays."""
    global _shrinker
    if limit == _DEFAULT:
        limit = max(_DEFAULT_MIN_BYTES, available_bytes() // _DEFAULT_SHARE)
    if _shrinker is None:
        where = _state.OrtMemoryInfo("Cpu", _state.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, _state.OrtMemType.DEFAULT)
        _state.create_and_register_allocator(where, _state.OrtArenaCfg(limit, _SAME_AS_REQUESTED, _FIRST_BYTES, -1))
        _shrinker = _Shrinker()
    return limit


def join_arena(options: onnxruntime.SessionOptions) -> None:
    """Have a session run in the shared arena, if there is one."""
    if _shrinker is not None:
        _join(options)


def give_back() -> None:
    """Have the shared arena give back what nobody uses. Takes some microseconds, and what the kernel needs to take
    memory back. Safe while models run."""
    if _shrinker is not None:
        _shrinker.run()
    if _malloc_trim is not None:
        _malloc_trim(0)


def heap_bytes() -> int:
    """What is allocated of the C heap: weights that are this process's own, and what ONNX Runtime holds to run with.
    0 where the C library does not tell."""
    if _mallinfo2 is None:
        return 0
    info = _mallinfo2()
    return int(info.uordblks + info.hblkhd)


class GiveBackRule:
    """When memory is to be given back: once nothing has run for 10 s, and every minute while something does."""

    def __init__(self) -> None:
        self._given = self._seen = 0  # batches that had run by then
        self._first_at = self._seen_at = 0.0  # the first since it was given back, and the latest

    def due(self, ran: int, now: float) -> bool:
        """``ran``: how many batches have run, ever. Seconds of any clock that does not go back."""
        if ran != self._seen:
            if self._seen == self._given:
                self._first_at = now
            self._seen, self._seen_at = ran, now
        if ran == self._given or (now - self._seen_at < _IDLE_S and now - self._first_at < _BUSY_S):
            return False
        self._given = ran
        return True


def _join(options: onnxruntime.SessionOptions) -> None:
    options.add_session_config_entry("session.use_env_allocators", "1")
    options.add_session_config_entry("session.use_device_allocator_for_initializers", "1")


class _Shrinker:
    """A run of ``_IDENTITY`` that has the arena give back what it can."""

    def __init__(self) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        _join(options)
        self._session: Any = onnxruntime.InferenceSession(_IDENTITY, options, providers=["CPUExecutionProvider"])
        self._options = onnxruntime.RunOptions()
        self._options.add_run_config_entry(*_SHRINK)
        self._places = (ctypes.c_float * 2)()
        address = ctypes.addressof(self._places)
        self._binding = self._session.io_binding()
        self._binding.bind_input("x", "cpu", 0, np.float32, (1,), address)
        self._binding.bind_output("y", "cpu", 0, np.float32, (1,), address + ctypes.sizeof(ctypes.c_float))

    def run(self) -> None:
        self._session.run_with_iobinding(self._binding, self._options)
