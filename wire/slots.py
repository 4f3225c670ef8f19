"""Slots of a process's own arena: where its large tensors lie while others read them.

A slot belongs to whoever took it, until its request has ended for the caller. A worker that has the request even then
reads foreign bytes, and what it makes of them is dropped like every late answer.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Final

import numpy as np

from penstock.wire.arena import Arena
from penstock.wire.room import Room, Wait

# A payload of at least this many bytes is put into the arena; to copy a smaller one from process to process costs less
# than a slot. (4 KB each from 64 connections: 24 us of all processes' time instead of 28.)
PLACED_MIN_BYTES: Final = 2048
_ALIGNMENT: Final = 64  # bytes: of the first tensor, for the instructions that ONNX Runtime's kernels use


class Placed:
    """A payload that lies in this process's arena, ``place`` bytes from its beginning."""

    __slots__ = ("place", "view")

    def __init__(self, place: int, view: memoryview) -> None:
        self.place = place
        self.view = view

    def __len__(self) -> int:
        return len(self.view)


class Slot(Placed):
    """A piece of the arena, to be written through ``view``."""

    __slots__ = ("_more", "_offset", "_slots")

    def __init__(self, slots: Slots, offset: int, place: int, view: memoryview) -> None:
        self.place = place  # rather than by way of super(), which takes as long again
        self.view = view
        self._slots: Slots | None = slots
        self._offset = offset
        self._more = 0  # who else has to give it back

    def cut(self, nbytes: int) -> None:
        """From now on it is the last ``nbytes`` of what it was; all of it stays taken."""
        lead = len(self.view) - nbytes
        self.place += lead
        self.view = self.view[lead:]

    def share(self) -> Slot:
        """One more has to give it back before it is free. Returns the slot itself."""
        self._more += 1
        return self

    def give_back(self) -> None:
        """Whoever had it needs it no more. Once all have given it back, it is free, and more of it does nothing."""
        if self._more:
            self._more -= 1
            return
        slots, self._slots = self._slots, None
        if slots is not None:
            slots.give_back(self._offset)


class SlotWait(Wait):
    """Somebody who waits for a slot: ``Slots.end`` gives it, or ends the wait. ``wake`` is called once, from whatever
    thread, when there is a slot or never will be; it must not block."""

    __slots__ = ("padding", "wake")

    def __init__(self, nbytes: int, padding: int, wake: Callable[[], None]) -> None:
        super().__init__(nbytes + padding)
        self.padding = padding
        self.wake = wake


class Slots:
    """The slots of one arena, which belongs to it; first come, first served (see room.py). Safe to share between
    threads."""

    def __init__(self, arena: Arena) -> None:
        self.arena = arena
        self._memory = arena.view(0, arena.size)
        self.address: Final[int] = np.frombuffer(self._memory, np.uint8).ctypes.data  # of its first byte
        self._lock = threading.Lock()
        self._room: Room[SlotWait] = Room(arena.allocator)

    @property
    def waiting(self) -> int:
        """How many wait for a slot."""
        return len(self._room)

    def take(self, nbytes: int, lead: int = 0) -> Slot | None:
        """A slot of ``nbytes`` in which the byte after the first ``lead`` is aligned. None while there is no room, or
        others wait for it: then ``wait``."""
        padding = -lead % _ALIGNMENT
        self._lock.acquire()  # half of what ``with`` takes (Python 3.11)
        try:
            offset = self._room.take(nbytes + padding)
            if offset is None or self.arena.fd < 0:  # -1: closed
                return None
            place = offset + padding
            return Slot(self, offset, place, self._memory[place : place + nbytes])
        finally:
            self._lock.release()

    def wait(self, nbytes: int, lead: int, wake: Callable[[], None]) -> SlotWait:
        """Stand in line for a slot as ``take`` gives it. Raises ValueError for one that is larger than the arena."""
        wait = SlotWait(nbytes, -lead % _ALIGNMENT, wake)
        with self._lock:
            ended = self.arena.fd < 0 or self._room.wait(wait)
        if ended:
            wake()
        return wait

    def end(self, wait: SlotWait) -> Slot | None:
        """Wait no longer. The slot, if there is one by now; None the second time."""
        with self._lock:
            granted = self._room.leave(wait)
            slot, offset = None, wait.offset
            if offset >= 0 and self.arena.fd >= 0:
                place = offset + wait.padding
                slot = Slot(self, offset, place, self.arena.view(place, wait.nbytes - wait.padding))
            wait.offset = -1
        for each in granted:
            each.wake()
        return slot

    def give_back(self, offset: int) -> None:
        self._lock.acquire()
        try:
            granted = self._room.give(offset)
        finally:
            self._lock.release()
        for each in granted:
            each.wake()

    def close(self) -> None:
        """Let go of the memory. Nobody gets a slot any more; slots can still be given back."""
        with self._lock:
            self._memory = memoryview(b"")
            self.arena.close()
            left = self._room.clear()
        for each in left:
            each.wake()


def padded(nbytes: int, lead: int) -> int:
    """Bytes that a slot takes in which the byte after the first ``lead`` is aligned. An arena in which nothing is taken
    has room for it exactly when its size is not less."""
    return nbytes + (-lead % _ALIGNMENT)
