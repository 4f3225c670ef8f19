"""A device whose memory is the host's: all that batches do on a GPU, without one.

Copies take place at ``wait``, and not before: what relies on them earlier reads what was there before.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import partial
from typing import Any


class HostStream:
    def __init__(self) -> None:
        self._asked: list[Callable[[], Any]] = []

    def copy_in(self, device: int, host: int, nbytes: int) -> None:
        self._asked.append(partial(ctypes.memmove, device, host, nbytes))

    def copy_out(self, host: int, device: int, nbytes: int) -> None:
        self._asked.append(partial(ctypes.memmove, host, device, nbytes))

    def wait(self) -> None:
        asked, self._asked = self._asked, []
        for copy in asked:
            copy()


class HostDevice:
    """``room``: bytes that may be taken, of memory and of pinned memory together."""

    name = "cpu"

    def __init__(self, room: int = 1 << 30) -> None:
        self.room = room
        self.taken: dict[int, Any] = {}
        self.pinned: dict[int, int] = {}

    def allocate(self, nbytes: int) -> int:
        self._take(nbytes)
        memory = (ctypes.c_char * nbytes)()
        address = ctypes.addressof(memory)
        self.taken[address] = memory
        return address

    def free(self, address: int) -> None:
        self.room += len(self.taken.pop(address))

    def pin(self, address: int, nbytes: int) -> None:
        self._take(nbytes)
        self.pinned[address] = nbytes

    def unpin(self, address: int) -> None:
        self.room += self.pinned.pop(address)

    def stream(self) -> HostStream:
        return HostStream()

    def _take(self, nbytes: int) -> None:
        if nbytes > self.room:
            raise MemoryError("out of memory")
        self.room -= nbytes
