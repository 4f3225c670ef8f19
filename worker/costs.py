"""How long batches take here: learned when a model is warmed up, and from every batch that runs. Pure.

Two things are learned apart. The *curve*, seconds by rows, is the model's and changes little: a value for each of a few
sizes, and straight lines between. The *pace* is the moment's: how many times as long as the curve says a batch takes
now, since another process has half of the core, or the clocks are down. It is the same for all sizes. So what is known
of a size that does not run just now keeps up with those that do; else a size that was given up because it was slow once
would stay slow for ever, as nothing would measure it again.

Of one size alone nobody can tell which of the two has changed, so then it is the pace. The curve is bent only where
two batches of different sizes follow each other, at one pace: both sizes by as much, one up and the other down, as
chess players' ratings are after a game (Elo, The Rating of Chessplayers, 1978). So however many batches there are, the
curve as a whole goes nowhere, and sizes that have not run for a million batches are where they were beside the others.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from math import exp, log
from operator import le
from typing import Final

from penstock.wire.messages import MAX_TIMEOUT_US

# Of a ratio's difference, in each batch. With a median of three before it, a change is followed to nine tenths within
# eight batches, and one batch that others held up for a moment changes nothing.
_PACE_GAIN: Final = 0.3
_KNOWN: Final = 31.0  # batches; what a size takes beside others is their mean, then later ones count for more
_UNKNOWN: Final = 1e-9  # the weight of what is only thought of a size
_MORE_MAX: Final = log(1.5)  # what one batch may say at most of a size that is known
_WARM_UP_WEIGHT: Final = 8.0  # batches that one run at warm-up counts for: nothing else ran then
_TOLD: Final = 0.1  # a time that has changed by a larger share is told anew
_STALE_S: Final = 1.0  # what was learned longer ago, or longer than
_STALE_BATCHES: Final = 10  # so many times what the batch takes, is not relied on
_SECONDS_MIN: Final = 1e-9  # so that ratios exist
_US: Final = 1e6


def batch_sizes(rows_max: int) -> list[int]:
    """1, 2, 4, ... and ``rows_max``."""
    return [1 << power for power in range(rows_max.bit_length()) if 1 << power < rows_max] + [rows_max]


class Curve:
    """What batches of one model take, in seconds. It never says less of a larger batch than of a smaller one.

    ``sizes``: the numbers of rows that are learned, ascending to the largest batch there may be. ``padded``: batches
    run as the next of these sizes; otherwise the time of those between lies between.
    """

    __slots__ = ("_last", "_learned", "_padded", "_places", "_ratios", "_seconds", "_told", "_weights", "pace", "sizes")

    def __init__(self, sizes: Sequence[int], padded: bool = False) -> None:
        self.sizes = tuple(sizes)
        self.pace = 1.0
        self._padded = padded
        self._places = [self._place(rows) for rows in range(self.sizes[-1] + 1)]
        self._seconds: list[float] = []  # of each size at pace 1; none: nothing is known
        self._weights = [0.0] * len(self.sizes)  # batches that said so
        self._ratios = (1.0, 1.0)  # of what the last two batches took to what the curve says
        self._last = (0, 0.0)  # the rows and seconds of the last batch
        self._learned = float("-inf")  # when the last batch ended
        self._told: list[float] = []

    def begin(self, seconds: Mapping[int, float]) -> None:
        """What runs at warm-up took, by rows; those of other sizes than ``sizes`` tell nothing."""
        for rows in self.sizes:
            if rows in seconds:
                self._adopt(self.sizes.index(rows), max(seconds[rows], _SECONDS_MIN), _WARM_UP_WEIGHT)

    def learn(self, rows: int, seconds: float, now: float) -> None:
        """A batch of so many rows has run for so long, and ended ``now``."""
        self._learned = now
        seconds = max(seconds, _SECONDS_MIN)
        before, self._last = self._last, (rows, seconds)
        if not self._seconds:
            self._adopt(self._places[rows][0], seconds, 1.0)
            return
        ratio = seconds / self._expected(rows)
        if not self._is_known(rows):
            self._bend(rows, log(ratio / self.pace))
            self._straighten()
            return
        one, other = self._ratios
        self._ratios = other, ratio
        if one > other:
            one, other = other, one
        middle = one if ratio < one else other if ratio > other else ratio
        self.pace += (middle - self.pace) * _PACE_GAIN
        if before[0] not in (rows, 0):
            more = log(ratio / (before[1] / self._expected(before[0])))
            more = min(max(more, -_MORE_MAX), _MORE_MAX)
            self._bend(rows, more)
            self._bend(before[0], -more)
            self._straighten()

    def seconds(self, rows: int) -> float:
        """What a batch of so many rows is expected to take; 0.0 while nothing is known."""
        return self._expected(rows) * self.pace if self._seconds else 0.0

    def _expected(self, rows: int) -> float:
        """What the curve says."""
        times = self._seconds
        above, part = self._places[rows]
        return times[above] if part == 1.0 else times[above - 1] * (1.0 - part) + times[above] * part

    def _is_known(self, rows: int) -> bool:
        """Whether a batch of about so many rows has run."""
        weights = self._weights
        above, part = self._places[rows]
        return (weights[above] if part == 1.0 else weights[above - 1] * (1.0 - part) + weights[above] * part) >= 1.0

    def reliable(self, rows: int, now: float) -> float:
        """As ``seconds``, but 0.0 when that has not been measured lately. A request is given up on the strength of it,
        and were it wrong, nothing would run any more that could put it right: so now and then one is tried."""
        seconds = self.seconds(rows)
        age = now - self._learned
        return seconds if age <= _STALE_S or age <= _STALE_BATCHES * seconds else 0.0

    def rows_within(self, seconds: float) -> int:
        """The most rows whose batch takes no longer; the fewest that run, if even they do; 1 while nothing is known."""
        if not self._seconds:
            return self.sizes[0] if self._padded else 1
        limit, times, sizes = seconds / self.pace, self._seconds, self.sizes
        above = bisect_right(times, limit)
        if above == 0:
            return sizes[0] if self._padded else 1
        below = sizes[above - 1]
        if above == len(sizes) or self._padded:
            return below
        share = (limit - times[above - 1]) / (times[above] - times[above - 1])
        return below + int(share * (sizes[above] - below))

    def changed(self) -> bool:
        """Whether a time has changed by more than a tenth since ``tell``."""
        if len(self._seconds) != len(self._told):
            return True
        pace, pairs = self.pace, zip(self._seconds, self._told, strict=True)
        return any(abs(seconds * pace - told) > _TOLD * told for seconds, told in pairs)

    def tell(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Rows and microseconds, with straight lines between, as in a message's Cost."""
        self._told = [seconds * self.pace for seconds in self._seconds]
        times = tuple([min(MAX_TIMEOUT_US, max(1, round(seconds * _US))) for seconds in self._told])
        if not times or not self._padded:
            return (self.sizes if times else ()), times
        rows: list[int] = []
        steps: list[int] = []
        before = 0
        for size, time in zip(self.sizes, times, strict=True):
            if size > before + 1:
                rows.append(before + 1)
                steps.append(time)
            rows.append(size)
            steps.append(time)
            before = size
        return tuple(rows), tuple(steps)

    def validate(self) -> None:
        """For tests. Raises AssertionError saying what is wrong."""
        assert self._seconds == sorted(self._seconds), f"a larger batch takes less: {self._seconds}"
        assert all(each > 0 for each in (*self._seconds, self.pace)), f"{self._seconds} at a pace of {self.pace}"

    def _place(self, rows: int) -> tuple[int, float]:
        """Where so many rows lie: the index of the next larger size, and how far they are on the way to it from the
        one before, above 0 to 1."""
        sizes = self.sizes
        above = bisect_left(sizes, rows)
        if self._padded or above == 0 or sizes[above] == rows:
            return above, 1.0
        below = sizes[above - 1]
        return above, (rows - below) / (sizes[above] - below)

    def _bend(self, rows: int, more: float) -> None:
        """A batch of so many rows took exp(``more``) times what was expected beside another."""
        above, part = self._places[rows]
        for at, share in ((above, part), (above - 1, 1.0 - part)):
            if share:
                weight = self._weights[at]
                self._seconds[at] *= exp(share * more / (1.0 + weight))
                self._weights[at] = min(weight + share, _KNOWN)

    def _adopt(self, at: int, seconds: float, weight: float) -> None:
        """A size about which nothing is known. Of others of which nothing is known either this says as much as can be
        said: that smaller batches take no longer, and that larger ones take no longer for each row."""
        times, sizes = self._seconds, self.sizes
        if not times:
            times[:] = [seconds * max(1.0, size / sizes[at]) for size in sizes]
        times[at] = seconds
        self._weights[at] = weight
        for larger in range(at + 1, len(sizes)):
            if not self._weights[larger]:
                times[larger] = seconds * sizes[larger] / sizes[at]
        self._straighten()

    def _straighten(self) -> None:
        """Sizes that contradict each other take their mean, by what is known of each: the pool-adjacent-violators
        algorithm (Barlow et al., Statistical Inference under Order Restrictions, 1972). Whichever way they went, were
        the others to follow one of them, the curve would."""
        times = self._seconds
        if all(map(le, times, times[1:])):
            return
        pools: list[tuple[float, float, int]] = []  # seconds, weight, and so many sizes
        for seconds, weight in zip(times, self._weights, strict=True):
            weight, count = weight + _UNKNOWN, 1
            while pools and pools[-1][0] > seconds:
                other, known, more = pools.pop()
                seconds = exp((log(seconds) * weight + log(other) * known) / (weight + known))
                weight, count = weight + known, count + more
            pools.append((seconds, weight, count))
        times[:] = [seconds for seconds, _, count in pools for _ in range(count)]
