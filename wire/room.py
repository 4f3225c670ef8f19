"""Who gets room in an arena, and when: first come, first served.

While somebody waits, nobody who comes later is granted anything, however little: a large slot would otherwise wait for
ever, since small ones would always be found room for first. So small ones wait behind a large one although there is
room for them. They do not wait long: nothing is granted any more, so what is taken comes back, and sooner or later the
first has its room or has given up (whoever waits has a limit).

Knows numbers only: no memory, no thread, no time. The same rules for the threads of a client and for the loop of a
gateway, both by way of wire/slots.py.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Generic, TypeVar

from penstock.wire.allocator import Allocator


class Wait:
    """Somebody who waits for ``nbytes``. ``offset``: where the slot begins once it is granted, -1 before."""

    __slots__ = ("nbytes", "offset")

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        self.offset = -1


W = TypeVar("W", bound=Wait)


class Room(Generic[W]):
    """The room that an allocator has, and the line of those who wait for it.

    What holds, and tests/wire/test_room.py checks: there is no room for the first of the line, or it would not be there
    any more; so whatever gives room back or takes the first out of the line says who is granted room by that.
    """

    __slots__ = ("_allocator", "_line")

    def __init__(self, allocator: Allocator) -> None:
        self._allocator = allocator
        # Empty as long as there is room for all: then it costs a look whether it is.
        self._line: OrderedDict[W, None] = OrderedDict()

    def __len__(self) -> int:
        """How many wait."""
        return len(self._line)

    def take(self, nbytes: int) -> int | None:
        """The offset of a new slot, or None when there is no room or others wait for it."""
        return None if self._line else self._allocator.take(nbytes)

    def wait(self, wait: W) -> bool:
        """Grant a slot, or stand last in line. Whether it is granted at once. Raises ValueError for more than there is
        when nothing is taken: it would wait, and all others behind it, for nothing."""
        if not 0 < wait.nbytes <= self._allocator.size:
            raise ValueError(f"there will never be room for {wait.nbytes} bytes in {self._allocator.size}")
        self._line[wait] = None
        return bool(len(self._line) == 1 and self._grant())

    def leave(self, wait: W) -> Sequence[W]:
        """Whoever stands in line waits no longer; nothing happens to others. Who is granted room by that."""
        if wait not in self._line:
            return ()
        first = next(iter(self._line)) is wait
        del self._line[wait]
        return self._grant() if first else ()

    def give(self, offset: int) -> Sequence[W]:
        """Free the slot that begins there. Who is granted room by that. Raises ValueError when none does."""
        self._allocator.give(offset)
        return self._grant() if self._line else ()

    def clear(self) -> Sequence[W]:
        """Nobody waits any longer. Those who did."""
        left = list(self._line)
        self._line.clear()
        return left

    def _grant(self) -> list[W]:
        """Take out of the line, from its beginning, whoever has room by now."""
        granted: list[W] = []
        while self._line:
            first = next(iter(self._line))
            offset = self._allocator.take(first.nbytes)
            if offset is None:
                break
            first.offset = offset
            del self._line[first]
            granted.append(first)
        return granted
