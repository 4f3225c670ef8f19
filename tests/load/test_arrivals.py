"""Arrivals are those of a Poisson process, and the timer wakes when it should."""

from __future__ import annotations

import select
import statistics
from itertools import islice
from time import monotonic_ns

import pytest

from penstock.load.arrivals import Timer, poisson


@pytest.mark.parametrize("rate", [0.5, 100.0, 250_000.0])
def test_gaps_are_exponential(rate: float) -> None:
    gaps = list(islice(poisson(rate, 1), 100_000))
    mean = 1e9 / rate
    # With 100,000 of them the mean is within 1.5 % (5 standard deviations); deviation and mean are the same.
    assert statistics.fmean(gaps) == pytest.approx(mean, rel=0.016)
    assert statistics.pstdev(gaps) == pytest.approx(mean, rel=0.03)
    # And what lies in one does not tell of the next.
    assert abs(statistics.correlation(gaps[:-1], gaps[1:])) < 0.02


def test_the_same_seed_makes_the_same_arrivals() -> None:
    assert list(islice(poisson(10, 7), 50)) == list(islice(poisson(10, 7), 50))
    assert list(islice(poisson(10, 7), 50)) != list(islice(poisson(10, 8), 50))


def test_the_timer_wakes_at_its_time_and_not_before() -> None:
    timer = Timer()
    try:
        timer.clear()  # nothing to clear
        assert not select.select([timer.fd], [], [], 0)[0]
        at = monotonic_ns() + 20_000_000
        timer.set(at)
        assert select.select([timer.fd], [], [], 5)[0]
        assert monotonic_ns() >= at
        timer.clear()
        assert not select.select([timer.fd], [], [], 0)[0]
        timer.set(monotonic_ns() - 1)  # past
        assert select.select([timer.fd], [], [], 5)[0]
    finally:
        timer.close()
