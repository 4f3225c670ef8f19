"""Latencies, in bounded memory: buckets that are as fine in relation to what they hold, whatever that is.

As in HdrHistogram (http://hdrhistogram.org): each power of two is divided into 128 equal buckets, so none is wider
than 0.8 % of what lies in it, and a bucket's middle is within 0.4 % of all that it holds.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Final

_BITS: Final = 8  # that are kept of a value
_HALF_BITS: Final = _BITS - 1
LARGEST: Final = (1 << 42) - 1  # nanoseconds, 73 minutes; what takes longer counts as that


def bucket_of(value: int) -> int:
    """The number of the bucket that a value lies in; 0 for what is less."""
    if value > LARGEST:
        value = LARGEST
    if value < 1 << _BITS:
        return max(0, value)
    shift = value.bit_length() - _BITS
    return (shift << _HALF_BITS) + (value >> shift)


def bounds_of(bucket: int) -> tuple[int, int]:
    """The least value in a bucket, and the least in the next."""
    if bucket < 1 << _BITS:
        return bucket, bucket + 1
    shift = (bucket >> _HALF_BITS) - 1
    low = (bucket - (shift << _HALF_BITS)) << shift
    return low, low + (1 << shift)


class Histogram:
    """Nanoseconds, counted. The least and the largest are kept as they are."""

    __slots__ = ("counts", "largest", "least", "total")

    def __init__(self) -> None:
        self.counts: dict[int, int] = {}
        self.total = 0
        self.largest = 0
        self.least = LARGEST

    def record(self, value: int) -> None:
        bucket = bucket_of(value)
        counts = self.counts
        counts[bucket] = counts.get(bucket, 0) + 1
        self.total += 1
        if value > self.largest:
            self.largest = value
        if value < self.least:
            self.least = value

    def add(self, other: Histogram) -> None:
        for bucket, count in other.counts.items():
            self.counts[bucket] = self.counts.get(bucket, 0) + count
        self.total += other.total
        self.largest = max(self.largest, other.largest)
        self.least = min(self.least, other.least)

    def quantile(self, share: float) -> float:
        """The value that a share (0 to 1) of all is not above, within 0.4 %; 0 when there is none."""
        return next(self.quantiles([share]))

    def quantiles(self, shares: Iterable[float]) -> Iterator[float]:
        """As ``quantile``, for shares in ascending order, in one pass."""
        rest = iter(sorted(self.counts.items()))
        bucket, seen = 0, 0
        for share in shares:
            rank = min(self.total, max(1, _ceil(share * self.total)))
            while seen < rank:
                bucket, count = next(rest)
                seen += count
            if not self.total:
                yield 0.0
            elif rank == self.total:
                yield float(self.largest)
            else:
                low, high = bounds_of(bucket)
                yield min(max((low + high - 1) / 2, self.least), self.largest)

    def export(self) -> dict[str, object]:
        return {"counts": sorted(self.counts.items()), "largest": self.largest, "least": self.least}

    @classmethod
    def load(cls, exported: dict[str, object]) -> Histogram:
        made = cls()
        made.counts = dict(exported["counts"])  # type: ignore[call-overload]
        made.total = sum(made.counts.values())
        made.largest, made.least = int(str(exported["largest"])), int(str(exported["least"]))
        return made


def _ceil(value: float) -> int:
    """Rounded up, but for what is above a whole number by no more than the error of a product: 0.999 of 1000 is 999."""
    whole = round(value)
    return whole if abs(value - whole) < 1e-9 * max(1.0, value) else int(value) + 1
