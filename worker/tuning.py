"""Batch size and delay for a latency target, from what has been measured. Pure.

The derivation. ``T(n)``: what a batch of n rows takes. A request that comes just after a batch has begun waits for the
end of that one and for its own: at most ``2 T(n)``, if batches have n rows at most and it is in the next one. So n is
the largest with ``T(n) <= target / 2``. Whether it is in the next one is a matter of load, and not of this choice:
while the device keeps up, no more than n rows come during a batch.

More rows in a batch cost less each, so while the device has much to do it pays to wait for some; while it has little,
waiting buys nothing. A request that waits for ``d`` although an instance is idle may then find it taken by another
batch, and takes ``d + 2 T(n)`` in all. So d is at most ``target - 2 T(n)``, less a tenth of the target for the way here
and back; nor longer than until so many rows have come that the batch is full.
"""

from __future__ import annotations

import math
from typing import Final

BUSY: Final = 0.5  # share of the time beyond which batches wait for more
_KEPT: Final = 0.1  # of the target, for what lies outside of the worker
_FADE_S: Final = 0.25  # what happened so long ago counts for 1/e


def batch_time(target_s: float) -> float:
    """What a batch may take at most."""
    return target_s / 2


def delay(target_s: float, batch_s: float, missing: int, rows_per_s: float, busy: float) -> float:
    """How long a group that lacks so many rows may wait for them, from its first request on, in seconds. ``batch_s``:
    what a full batch takes; ``busy``: share of the time that the device lately was."""
    if busy <= BUSY or rows_per_s <= 0.0:
        return 0.0
    return max(0.0, min(target_s * (1.0 - _KEPT) - 2.0 * batch_s, missing / rows_per_s))


class Fading:
    """A sum of what happened lately: what is older counts for less. Times are seconds of one monotonic clock."""

    __slots__ = ("_at", "_sum")

    def __init__(self) -> None:
        self._at = float("-inf")
        self._sum = 0.0

    def add(self, amount: float, now: float) -> None:
        """It happened now."""
        self._sum = self._faded(now) + amount
        self._at = now

    def add_span(self, seconds: float, now: float) -> None:
        """Something went on for so long, until now: what of it is older counts for less as well."""
        self.add(_FADE_S * -math.expm1(-seconds / _FADE_S), now)

    def rate(self, now: float) -> float:
        """Of amounts a second, of spans the share of the time; 0 for what has just begun, until it has gone on."""
        return self._faded(now) / _FADE_S

    def _faded(self, now: float) -> float:
        return self._sum * math.exp((self._at - now) / _FADE_S) if self._sum else 0.0
