"""Virtual time: what is to happen, in the order of its time, and at one time in the order in which it was said."""

from __future__ import annotations

from collections.abc import Callable
from heapq import heappop, heappush
from typing import Any, Final

NEVER: Final = float("inf")


class Clock:
    """``now``: seconds. ``events``: that have happened."""

    def __init__(self) -> None:
        self.now = 0.0
        self.events = 0
        self._said = 0
        self._heap: list[tuple[float, int, Callable[[Any], None], Any]] = []

    def at(self, when: float, do: Callable[[Any], None], what: Any) -> None:
        """Have ``do(what)`` called then, or now if that has passed."""
        self._said += 1
        heappush(self._heap, (when if when > self.now else self.now, self._said, do, what))

    def run(self, going: Callable[[], bool]) -> None:
        """Until nothing is left, or ``going`` says no; it is asked after each event."""
        heap = self._heap
        while heap and going():
            self.now, _, do, what = heappop(heap)
            self.events += 1
            do(what)


class Alarm:
    """The one time at which something wants to be called next, ``wanted``, however often it changes its mind."""

    def __init__(self, clock: Clock, do: Callable[[], None]) -> None:
        self._clock = clock
        self._do = do
        self._set = NEVER  # the earliest that is on the clock
        self.wanted = NEVER

    def want(self, when: float) -> None:
        """From now on this is when, and no other time."""
        self.wanted = when
        if when < self._set:
            self._set = when
            self._clock.at(when, self._rings, when)

    def _rings(self, when: float) -> None:
        if when != self._set:
            return  # an earlier one was set after it, and rang
        self._set = NEVER
        if self.wanted > self._clock.now:
            self.want(self.wanted)
        else:
            self.wanted = NEVER
            self._do()
