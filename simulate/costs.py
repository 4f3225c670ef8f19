"""How long a batch takes on a worker that is only played."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass
from random import Random
from typing import Final, Literal

Shape = Literal["lognormal", "normal"]

NORMAL_MAX: Final = 0.3  # of the coefficient of variation: beyond, too many times would not be positive


@dataclass(frozen=True, slots=True)
class BatchCost:
    """Seconds by the number of rows. ``jitter``: standard deviation in relation to the mean, of a distribution of
    ``shape``; ``lasts_s``: after which a worker that was slow is as likely to be so as any other, to 1/e. Exactly one:
    ``fixed_s`` and ``per_row_s``, or ``table`` of sizes, between which it is interpolated."""

    fixed_s: float = 0.0
    per_row_s: float = 0.0
    table: tuple[tuple[int, float], ...] = ()
    jitter: float = 0.0
    shape: Shape = "lognormal"
    lasts_s: float = 0.0

    def mean(self, rows: int) -> float:
        if not self.table:
            return self.fixed_s + self.per_row_s * rows
        at = bisect_left(self.table, (rows, 0.0))
        if at == 0:
            return self.table[0][1]
        if at == len(self.table):
            return self.table[-1][1]
        (low, low_s), (high, high_s) = self.table[at - 1], self.table[at]
        return low_s + (high_s - low_s) * (rows - low) / (high - low)


class Mood:
    """How a worker fares with a model: a normal variable of mean 0 and deviation 1, which it forgets as time passes (a
    process of Ornstein and Uhlenbeck, looked at now and then)."""

    __slots__ = ("_at", "_lasts_s", "_now")

    def __init__(self, lasts_s: float) -> None:
        self._lasts_s = lasts_s
        self._now = 0.0
        self._at = float("-inf")

    def draw(self, source: Random, now: float) -> float:
        kept = math.exp((self._at - now) / self._lasts_s) if self._lasts_s else 0.0
        self._at = now
        self._now = kept * self._now + math.sqrt(1.0 - kept * kept) * source.normalvariate(0.0, 1.0)
        return self._now


class Drawn:
    """Times of one model's batches, as they come out. Means are looked up, since sizes repeat."""

    def __init__(self, cost: BatchCost) -> None:
        self._cost = cost
        self._means: dict[int, float] = {}
        # Of a lognormal whose mean is 1.
        self._sigma = math.sqrt(math.log1p(cost.jitter**2))

    def mood(self) -> Mood:
        """For a worker."""
        return Mood(self._cost.lasts_s)

    def draw(self, rows: int, mood: Mood, source: Random, now: float) -> float:
        mean = self._means.get(rows)
        if mean is None:
            mean = self._means[rows] = self._cost.mean(rows)
        jitter = self._cost.jitter
        if not jitter:
            return mean
        if self._cost.shape == "lognormal":
            return mean * math.exp(self._sigma * mood.draw(source, now) - self._sigma**2 / 2)
        factor = 1.0 + jitter * mood.draw(source, now)
        while factor <= 0.0:
            factor = 1.0 + jitter * source.normalvariate(0.0, 1.0)
        return mean * factor


def table_of(times: Mapping[int, float]) -> tuple[tuple[int, float], ...]:
    return tuple(sorted(times.items()))
