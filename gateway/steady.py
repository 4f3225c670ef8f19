"""Whether a server that is ready stays so: one whose processes end again and again is not to be sent requests in
between. Pure.

It is seen from the gateway, so that it holds whoever starts the processes, and however many of them it takes to serve.
"""

from __future__ import annotations

from collections import deque
from typing import Final

LOSSES_MAX: Final = 5  # so many times ready and then not ...
LOSSES_SPAN_S: Final = 600.0  # ... in so long a time, and ready counts when ...
STEADY_S: Final = 20.0  # ... it has been so for so long


class Steady:
    """``saw`` whether it is ready each time that this may have changed. ``reason``: why ready does not count, or ""."""

    def __init__(self) -> None:
        self._since: float | None = None  # it is ready
        self._losses: deque[float] = deque(maxlen=LOSSES_MAX)

    def saw(self, ready: bool, now: float) -> None:
        if ready and self._since is None:
            self._since = now
        elif not ready and self._since is not None:
            self._since = None
            self._losses.append(now)

    def reason(self, now: float) -> str:
        often = len(self._losses) == LOSSES_MAX and now - self._losses[0] <= LOSSES_SPAN_S
        if not often or (self._since is not None and now - self._since >= STEADY_S):
            return ""
        return (
            f"it was ready {LOSSES_MAX} times within {LOSSES_SPAN_S / 60:.0f} minutes and then was not; it counts as "
            f"ready once it has been for {STEADY_S:g} s"
        )
