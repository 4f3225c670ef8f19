"""The search for settings, over made-up models whose best setting is known; and the frontier of what was tried."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.bin.search import (
    Point,
    Score,
    Setting,
    best_point,
    frontier,
    ladders,
    next_connections,
    score,
    search,
)

START = Setting(32, 0, 1, 1)


def find(start: Setting, cores: int, limit_s: float, rate: Callable[[Setting], float]) -> tuple[Setting, list[Setting]]:
    """The best setting, and all that were tried, of a model that reaches this many requests a second."""
    tried = []
    steps = search(start, ladders(start, True, cores, limit_s), cores)
    setting = next(steps)
    while True:
        tried.append(setting)
        try:
            setting = steps.send(Score(rate(setting), 0.01))
        except StopIteration as end:
            return end.value, tried


@pytest.mark.parametrize("start", [START, Setting(1, 0, 1, 1), Setting(4096, 5000, 4, 1), Setting(24, 700, 3, 2)])
def test_the_top_of_one_hill_is_found_from_anywhere(start: Setting) -> None:
    top = Setting(8, 1000, 2, 2)

    def rate(setting: Setting) -> float:
        return 1000.0 / (1 + sum(abs(one - other) / (1 + other) for one, other in zip(setting, top, strict=True)))

    best, tried = find(start, 8, 0.1, rate)
    assert best == top
    assert len(tried) == len(set(tried)) < 60
    assert tried[0] == start


def test_threads_are_given_for_instances() -> None:
    """With all cores in use, neither key can be raised alone, and lowering one alone is worse."""
    best, _ = find(Setting(32, 0, 1, 4), 4, 0.1, lambda each: each.instances**2 * each.intra_op_threads)
    assert (best.instances, best.intra_op_threads) == (4, 1)
    best, _ = find(Setting(32, 0, 4, 1), 4, 0.1, lambda each: each.instances * each.intra_op_threads**2)
    assert (best.instances, best.intra_op_threads) == (1, 4)


def test_what_is_hardly_better_is_not_better() -> None:
    assert find(START, 4, 0.1, lambda each: 1000 + each.max_batch_size / 10)[0] == START


@given(
    st.builds(Setting, st.integers(1, 4096), st.integers(0, 60_000_000), st.integers(1, 64), st.integers(1, 64)),
    st.integers(1, 128),
    st.booleans(),
    st.randoms(use_true_random=False),
)
def test_it_ends_never_repeats_and_never_overloads_the_cores(
    start: Setting, cores: int, batchable: bool, random: object
) -> None:
    steps = search(start, ladders(start, batchable, cores, 0.05), cores)
    tried = {next(steps): Score(1.0, 0.01)}
    try:
        while True:
            setting = steps.send(next(reversed(tried.values())))
            assert setting not in tried
            tried[setting] = Score(random.uniform(0, 100), 0.01)  # type: ignore[attr-defined]
            assert setting.instances * setting.intra_op_threads <= max(cores, start.instances * start.intra_op_threads)
            if not batchable:
                assert setting[:2] == start[:2]
    except StopIteration as end:
        best = end.value
    assert not any(other.beats(tried[best]) for other in tried.values())


def test_a_setting_within_the_limit_beats_any_that_is_not() -> None:
    within, beyond = Score(1.0, 0.05), Score(0.0, 0.06)
    assert within.beats(beyond)
    assert not beyond.beats(within)
    assert Score(0.0, 0.05).beats(Score(0.0, 0.06))
    assert not Score(0.0, 0.06).beats(Score(0.0, 0.06))
    assert Score(0.0, 9.0).beats(score([], 1.0))


def test_a_score_is_that_of_the_most_that_keeps_the_limit() -> None:
    points = [Point(1, 100, 0.01), Point(4, 300, 0.04), Point(16, 500, 0.2), Point(8, 400, 0.03, failed=True)]
    assert best_point(points, 0.05) == points[1]
    assert score(points, 0.05) == (300, 0.04)
    assert score(points, 0.005) == (0.0, 0.01)


def climb(first: int, limit_s: float, reach: Callable[[int], tuple[float, float]]) -> list[int]:
    points: list[Point] = []
    while (connections := next_connections(points, limit_s, first)) is not None:
        points.append(Point(connections, *reach(connections)))
    return [point.connections for point in points]


@pytest.mark.parametrize(
    ("first", "limit_s", "tried"),
    [
        (1, 0.05, [1, 4, 16, 64, 32]),  # up to 50 keep the limit
        (16, 0.05, [16, 64, 32]),
        (256, 0.05, [256, 64, 16, 32]),
        (64, 0.0005, [64, 16, 4, 1]),  # none does
        (1, 10.0, [1, 4, 16, 64, 256, 1024]),  # all do, and from 100 on more bring nothing
    ],
)
def test_connections_are_raised_while_it_helps(first: int, limit_s: float, tried: list[int]) -> None:
    assert climb(first, limit_s, lambda count: (min(count, 100) * 10.0, count * 1e-3)) == tried


@given(st.integers(1, 1024), st.floats(1e-4, 10), st.floats(1, 2000), st.floats(1e-5, 1e-2))
def test_connections_come_to_an_end(first: int, limit_s: float, most: float, each_s: float) -> None:
    tried = climb(first, limit_s, lambda count: (min(count, most) * 10.0, count * each_s))
    assert len(tried) == len(set(tried)) <= 8


@given(st.lists(st.tuples(st.floats(1, 1000), st.floats(1e-3, 1.0)), max_size=20))
def test_nothing_beats_the_frontier(reached: list[tuple[float, float]]) -> None:
    tried = {START: [Point(1, *each) for each in reached]}
    found = [point for _, point in frontier(tried)]
    for rate, p99_s in reached:
        assert any(point.requests_per_s >= rate and point.p99_s <= p99_s for point in found)
    assert found == sorted(found, key=lambda point: point.requests_per_s)
    assert [point.p99_s for point in found] == sorted(point.p99_s for point in found)
