"""When a process is started again, and when it is taken for stuck. Pure: the launcher asks, and does."""

from __future__ import annotations

from collections import deque
from typing import Final

BACKOFF_FIRST_S: Final = 0.2  # before a process that has died is started again
BACKOFF_MAX_S: Final = 10.0
STEADY_S: Final = 5.0  # whoever has served so long begins with the first backoff again: it works, and was killed
ENDS_MAX: Final = 5  # so many ends of others ...
ENDS_SPAN_S: Final = 60.0  # ... in so long a time, and it is only tried now and then
TRY_AGAIN_S: Final = 60.0  # between two such tries
STUCK_S: Final = 10.0  # who says for so long not that it lives is killed
LOOK_S: Final = STUCK_S / 2  # between two looks
LATE_S: Final = 1.0  # a look that is later than that says nothing of others: the whole machine stood still


def next_backoff(before_s: float, served_s: float) -> float:
    """How long to wait before a process that served for so long is started again. ``before_s``: how long it was last
    time, 0 when this is the first."""
    return BACKOFF_FIRST_S if served_s >= STEADY_S or not before_s else min(before_s * 2, BACKOFF_MAX_S)


class Breaker:
    """The ends of one process. ``broken``: it ends again and again, and is tried once in a while alone."""

    def __init__(self) -> None:
        self.broken = False
        self._backoff_s = 0.0
        self._ends: deque[float] = deque(maxlen=ENDS_MAX)

    def ended(self, now: float, served_s: float, hopeless: bool = False) -> float:
        """How long to wait before it is started again. ``served_s``: since it was ready, 0 when it never was;
        ``hopeless``: it says that it cannot work as it is told to."""
        self._backoff_s = next_backoff(self._backoff_s, served_s)
        if served_s >= STEADY_S:
            self.broken = False
            self._ends.clear()
        else:
            self._ends.append(now)
        often = len(self._ends) == ENDS_MAX and now - self._ends[0] <= ENDS_SPAN_S
        self.broken = self.broken or often or hopeless
        return TRY_AGAIN_S if self.broken else self._backoff_s


class Pulse:
    """Whether one process lives, felt every LOOK_S."""

    def __init__(self, now: float) -> None:
        self._felt = now

    def feel(self, now: float, beat: bool, late_s: float) -> bool:
        """Whether it is stuck. ``beat``: it has said since the last look that it lives; ``late_s``: how late this look
        is."""
        if beat or late_s > LATE_S:
            self._felt = now
        return now - self._felt >= STUCK_S
