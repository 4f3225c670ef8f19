"""One timer for all connections: each is looked at once a turn, and ended when its own deadline has passed.

A timer each would cost more than parsing a request does; here a deadline is one attribute, set as often as one likes.
The price is that it is kept only to within a turn.
"""

from __future__ import annotations

from typing import Generic, Protocol, TypeVar


class Timed(Protocol):
    deadline: float


T = TypeVar("T", bound=Timed)


class Wheel(Generic[T]):
    """``spokes``: how many parts a turn has, so that many connections are not all looked at in one go."""

    def __init__(self, spokes: int = 4) -> None:
        self.spokes = spokes
        self._spokes: list[set[T]] = [set() for _ in range(spokes)]
        self._next = 0

    def add(self, item: T) -> None:
        min(self._spokes, key=len).add(item)

    def discard(self, item: T) -> None:
        for spoke in self._spokes:
            spoke.discard(item)

    def advance(self, now: float) -> list[T]:
        """Look at the next part; those whose deadline has passed, which stay until they are discarded."""
        spoke = self._spokes[self._next]
        self._next = (self._next + 1) % len(self._spokes)
        return [item for item in spoke if item.deadline <= now]

    def items(self) -> list[T]:
        return [item for spoke in self._spokes for item in spoke]

    def __len__(self) -> int:
        return sum(map(len, self._spokes))
