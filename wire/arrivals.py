"""Whose arenas have come: descriptors come over the control connection, and the message that speaks of them over
another, so either may be the first. Pure."""

from __future__ import annotations

from collections import Counter, deque
from typing import Final, Generic, TypeVar

A = TypeVar("A")


class Arrivals(Generic[A]):
    """Pairs each arena that comes with the one message that announces it, in their order. Of one owner it is the same
    arena every time, however often the broker passes it on; what is paired wrongly is only whether it is still wanted.
    """

    def __init__(self) -> None:
        self._came: Final[dict[bytes, deque[A]]] = {}
        self._due: Final[Counter[bytes]] = Counter()

    def came(self, owner: bytes, arena: A) -> A | None:
        """An arena has come. It is returned when it is the last that was announced so far."""
        due = self._due[owner]
        if due:
            self._due[owner] = due - 1
            if due == 1:
                del self._due[owner]
                return arena
        else:
            self._came.setdefault(owner, deque()).append(arena)
        return None

    def announced(self, owner: bytes) -> A | None:
        """A message speaks of an arena; returned when it is there already."""
        came = self._came.get(owner)
        if came is None:
            self._due[owner] += 1
            return None
        arena = came.popleft()
        if not came:
            del self._came[owner]
        return arena

    def clear(self) -> None:
        """The control connection has ended, and with it what was under way. (A welcome does not clear: what follows it
        may overtake it.)"""
        self._came.clear()
        self._due.clear()
