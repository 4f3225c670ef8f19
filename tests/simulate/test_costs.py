"""What batches take."""

from __future__ import annotations

from random import Random
from statistics import correlation, fmean, stdev

import pytest

from penstock.simulate.costs import BatchCost, Drawn, Mood, Shape, table_of


def test_a_line_and_a_table() -> None:
    assert BatchCost(0.002, 0.0005).mean(4) == pytest.approx(0.004)
    table = BatchCost(table=table_of({8: 0.008, 2: 0.005}))
    assert [table.mean(rows) for rows in (1, 2, 5, 8, 9)] == pytest.approx([0.005, 0.005, 0.0065, 0.008, 0.008])


@pytest.mark.parametrize("shape", ["lognormal", "normal"])
def test_jitter_keeps_the_mean_and_has_its_deviation(shape: Shape) -> None:
    drawn, source = Drawn(BatchCost(0.010, jitter=0.25, shape=shape)), Random(1)
    mood = drawn.mood()
    times = [drawn.draw(1, mood, source, float(now)) for now in range(20_000)]
    assert min(times) > 0
    assert fmean(times) == pytest.approx(0.010, rel=0.01)
    assert stdev(times) == pytest.approx(0.0025, rel=0.03)


def test_without_jitter_nothing_is_drawn() -> None:
    source = Random(1)
    before = source.getstate()
    assert Drawn(BatchCost(0.010)).draw(1, Mood(1.0), source, 0.0) == 0.010
    assert source.getstate() == before


@pytest.mark.parametrize(("every_s", "alike"), [(0.01, 0.905), (0.1, 0.368), (1.0, 0.0)])
def test_a_slow_moment_lasts(every_s: float, alike: float) -> None:
    drawn, source = Drawn(BatchCost(0.010, jitter=0.25, shape="normal", lasts_s=0.1)), Random(1)
    mood = drawn.mood()
    times = [drawn.draw(1, mood, source, number * every_s) for number in range(40_000)]
    assert fmean(times) == pytest.approx(0.010, rel=0.03)
    assert stdev(times) == pytest.approx(0.0025, rel=0.05)
    assert correlation(times, times[1:] + times[:1]) == pytest.approx(alike, abs=0.03)


def test_without_a_duration_each_moment_is_by_itself() -> None:
    mood, source = Mood(0.0), Random(1)
    drawn = [mood.draw(source, number * 1e-6) for number in range(20_000)]
    assert correlation(drawn, drawn[1:] + drawn[:1]) == pytest.approx(0.0, abs=0.03)
