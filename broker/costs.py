"""What a batch takes."""

from __future__ import annotations

from bisect import bisect_left

from penstock.wire.messages import Cost


def batch_us(cost: Cost, rows: int) -> int:
    """What a batch of so many rows takes, between the sizes that were measured in proportion; 0 if none was."""
    sizes, times = cost.rows, cost.times_us
    if not sizes:
        return 0
    at = bisect_left(sizes, rows)
    if at == len(sizes):
        return times[-1]
    if at == 0:
        return times[0]
    before, after = sizes[at - 1], sizes[at]
    return times[at - 1] + (times[at] - times[at - 1]) * (rows - before) // (after - before)
