"""A queue whose members may leave from the middle."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Generic, TypeVar

T = TypeVar("T")


class Fifo(Generic[T]):
    """First in, first out; members are hashable, there once, and do not come back after ``remove``. Every method takes
    constant time, on average.

    A member that is removed stays in the deque as long as it does no harm, and is passed over: an OrderedDict, which
    would need no such trick, costs five times as much for each member that comes and goes in order, as nearly all do.
    """

    __slots__ = ("_items", "_removed")

    def __init__(self) -> None:
        self._items: deque[T] = deque()
        self._removed: set[T] = set()

    def __len__(self) -> int:
        return len(self._items) - len(self._removed)

    def __iter__(self) -> Iterator[T]:
        return (item for item in self._items if item not in self._removed)

    def push(self, item: T) -> None:
        self._items.append(item)

    def push_front(self, item: T) -> None:
        self._items.appendleft(item)

    def first(self) -> T:
        """The member whose turn it is. Raises IndexError when there is none."""
        if self._removed:
            self._skip()
        return self._items[0]

    def pop(self) -> T:
        """Take out the member whose turn it is. Raises IndexError when there is none."""
        if self._removed:
            self._skip()
        return self._items.popleft()

    def remove(self, item: T) -> None:
        """Take out a member, which must be there."""
        self._removed.add(item)
        if len(self._removed) * 2 > len(self._items):
            self._items = deque(self)
            self._removed.clear()

    def _skip(self) -> None:
        while self._items and self._items[0] in self._removed:
            self._removed.discard(self._items.popleft())
