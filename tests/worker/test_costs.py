"""What a batch takes: learned quickly, not by a lone outlier, and never less for more rows."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.wire.codec import pack, unpack
from penstock.wire.messages import FROM_WORKER, MAX_TIMEOUT_US, Cost, Costs
from penstock.worker.costs import Curve, batch_sizes

MS = 1e-3
SIZES = batch_sizes(32)


def linear(rows: int) -> float:
    """1 ms, and 0.1 ms for each row."""
    return MS + 0.1 * MS * rows


def warm(took: Callable[[int], float] = linear, sizes: list[int] = SIZES, padded: bool = False) -> Curve:
    curve = Curve(sizes, padded)
    curve.begin({size: took(size) for size in sizes})
    curve.validate()
    return curve


def run(curve: Curve, rows: int, seconds: float, times: int = 1) -> None:
    for _ in range(times):
        curve.learn(rows, seconds, 1.0)
        curve.validate()


@given(st.integers(1, 4096))
def test_sizes_are_powers_of_two_and_the_largest(rows: int) -> None:
    sizes = batch_sizes(rows)
    assert sizes[-1] == rows
    assert sizes[:-1] == [1 << at for at in range(len(sizes) - 1)]
    assert all(small < large <= 2 * small for small, large in itertools.pairwise(sizes))


# --- what is known before ---


def test_nothing_is_known_of_a_model_that_has_not_run() -> None:
    curve = Curve(SIZES)
    assert [curve.seconds(rows) for rows in (1, 7, 32)] == [0.0, 0.0, 0.0]
    assert curve.tell() == ((), ())
    assert curve.rows_within(1.0) == 1
    assert not curve.changed()


def test_what_was_seen_at_warm_up_holds_with_lines_between() -> None:
    curve = warm()
    assert [curve.seconds(rows) for rows in range(1, 33)] == pytest.approx([linear(rows) for rows in range(1, 33)])


def test_warm_up_that_was_cut_short_says_what_it_can() -> None:
    """The largest come first. Smaller ones take no longer."""
    curve = Curve(SIZES)
    curve.begin({32: linear(32), 16: linear(16)})
    assert curve.seconds(24) == pytest.approx(linear(24))
    assert curve.seconds(1) == curve.seconds(16) == pytest.approx(linear(16))


def test_first_batch_of_a_model_that_was_not_warmed_up_speaks_for_others() -> None:
    """Smaller ones take no longer, larger ones no longer for each row."""
    curve = Curve(SIZES)
    run(curve, 8, 4 * MS)
    assert [curve.seconds(rows) for rows in (1, 8, 16, 24)] == pytest.approx([4 * MS, 4 * MS, 8 * MS, 12 * MS])
    run(curve, 32, 5 * MS)
    assert curve.seconds(32) == pytest.approx(5 * MS)
    assert curve.seconds(16) == pytest.approx(5 * MS), "no more than a larger one"
    assert curve.seconds(8) == pytest.approx(4 * MS)


def test_run_of_no_time_at_all_is_taken_for_very_short() -> None:
    curve = Curve([1])
    run(curve, 1, 0.0, 3)
    assert 0 < curve.seconds(1) < 1e-6


# --- learning ---


@pytest.mark.parametrize("factor", [2.0, 0.5, 5.0])
def test_change_of_pace_is_followed_within_eight_batches_at_all_sizes(factor: float) -> None:
    curve = warm()
    run(curve, 8, linear(8), 20)
    run(curve, 8, factor * linear(8), 8)
    for rows in 1, 8, 20, 32:
        assert curve.seconds(rows) == pytest.approx(factor * linear(rows), rel=0.12)


def test_lone_outlier_changes_next_to_nothing() -> None:
    curve = warm()
    run(curve, 8, linear(8), 20)
    run(curve, 8, 100 * linear(8))
    assert curve.seconds(8) == pytest.approx(linear(8), rel=0.07)
    assert curve.seconds(32) == pytest.approx(linear(32), rel=0.07)
    run(curve, 8, linear(8), 3)
    assert curve.seconds(8) == pytest.approx(linear(8), rel=0.07)


def test_size_that_is_not_run_recovers_with_those_that_are() -> None:
    """Else one that was given up for being slow would stay slow for ever."""
    curve = warm()
    run(curve, 32, 10 * linear(32), 20)
    run(curve, 4, 10 * linear(4), 20)
    run(curve, 4, linear(4), 40)
    assert curve.seconds(32) == pytest.approx(linear(32), rel=0.15)


@pytest.mark.parametrize("rows", [1, 5, 16, 27])
def test_curve_that_was_wrong_is_bent(rows: int) -> None:
    """At warm-up it was told to be flat."""
    curve = warm(lambda rows: 3 * MS)
    chance = random.Random(1)
    for _ in range(2000):
        at = chance.choice([1, 2, 5, 16, 27, 32])
        run(curve, at, linear(at))
    assert curve.seconds(rows) == pytest.approx(linear(rows), rel=0.1)


def test_of_one_size_alone_nothing_is_said_of_others() -> None:
    """Else noise bends the curve, and the pace follows: after ten thousand batches of 32 rows one row was thought to
    take a thousandth, and the first that ran had 32 rows thought to take a thousand times as long."""
    curve, chance = warm(), random.Random(1)
    curve.learn(1, linear(1), 1.0)
    for _ in range(10_000):
        curve.learn(32, linear(32) * chance.lognormvariate(0.0, 0.2), 1.0)
    assert curve.seconds(1) / curve.seconds(32) == pytest.approx(linear(1) / linear(32), rel=0.05)


NOISE: dict[str, Callable[[random.Random], float]] = {
    "as much up as down": lambda chance: chance.lognormvariate(0.0, 0.3),
    "some are held up": lambda chance: 20.0 if chance.random() < 0.05 else 1.0,
    "many are held up": lambda chance: 5.0 if chance.random() < 0.3 else 1.0,
}
MIXES: dict[str, Callable[[int, random.Random], int]] = {
    "small ones": lambda at, chance: chance.randint(1, 8),
    "small and full ones in turn": lambda at, chance: 1 if at // 50 % 2 else 32,
    "sizes between": lambda at, chance: 3 if at // 5 % 2 else 7,
    "a few full ones": lambda at, chance: 32 if at % 3 == 0 else 1,
}


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("noise", NOISE)
def test_curve_goes_nowhere_however_many_batches_run(mix: str, noise: str) -> None:
    curve, chance = warm(), random.Random(1)
    for at in range(20_000):
        rows = MIXES[mix](at, chance)
        curve.learn(rows, linear(rows) * NOISE[noise](chance), 1.0)
        if at % 500 == 0:
            beside = [curve.seconds(size) / linear(size) for size in SIZES]
            assert max(beside) < 1.6 * min(beside)
            assert 0.3 < curve.pace < 6.0
    curve.validate()


def test_sizes_that_contradict_each_other_take_their_mean() -> None:
    """Were one to follow the other, all would go where noise goes."""
    curve = warm(lambda rows: MS, [1, 2])
    run(curve, 2, MS)
    run(curve, 1, 1.4 * MS)
    assert curve.seconds(1) == curve.seconds(2) == pytest.approx(MS)
    run(curve, 2, 2 * MS)
    assert curve.seconds(1) < curve.seconds(2)


def test_noise_is_smoothed() -> None:
    curve, chance = warm(), random.Random(1)
    seen = []
    for _ in range(500):
        run(curve, 16, linear(16) * chance.uniform(0.8, 1.25))
        seen.append(curve.seconds(16))
    assert min(seen) > 0.85 * linear(16)
    assert max(seen) < 1.2 * linear(16)


@settings(deadline=None, max_examples=300)
@given(
    sizes=st.sets(st.integers(1, 64), min_size=1, max_size=6).map(sorted),
    padded=st.booleans(),
    warm_up=st.lists(st.floats(1e-6, 10.0), max_size=6),
    batches=st.lists(st.tuples(st.integers(1, 64), st.floats(0.0, 100.0)), max_size=40),
    limit=st.floats(1e-6, 10.0),
)
def test_more_rows_never_take_less_whatever_is_learned(
    sizes: list[int],
    padded: bool,
    warm_up: list[float],
    batches: list[tuple[int, float]],
    limit: float,
) -> None:
    curve = Curve(sizes, padded)
    curve.begin(dict(zip(sizes, warm_up, strict=False)))
    for rows, seconds in batches:
        curve.learn(min(rows, sizes[-1]), seconds, 0.0)
        curve.validate()
    times = [curve.seconds(rows) for rows in range(1, sizes[-1] + 1)]
    assert all(one <= other * (1 + 1e-12) for one, other in itertools.pairwise(times))
    rows = curve.rows_within(limit)
    if warm_up or batches:
        fewest = sizes[0] if padded else 1
        assert fewest <= rows <= sizes[-1]
        assert rows == fewest or curve.seconds(rows) <= limit * (1 + 1e-9)
        more = rows + 1 if not padded else next((size for size in sizes if size > rows), sizes[-1] + 1)
        assert more > sizes[-1] or curve.seconds(more) >= limit * (1 - 1e-9)
    cost = Cost("m", "1", 1, sizes[-1], 1000, *curve.tell())
    told = unpack(pack(Costs(1, [cost])), [], FROM_WORKER)
    assert isinstance(told, Costs)
    for rows, time_us in zip(told.costs[0].rows, told.costs[0].times_us, strict=True):
        assert time_us == pytest.approx(min(curve.seconds(rows) * 1e6, MAX_TIMEOUT_US), abs=1)


# --- padding ---


def test_padded_batches_take_what_the_next_size_takes() -> None:
    curve = warm(sizes=[8, 16], padded=True)
    assert [curve.seconds(rows) for rows in (1, 8, 9, 16)] == pytest.approx([linear(n) for n in (8, 8, 16, 16)])
    run(curve, 3, 2 * linear(8), 8)
    assert curve.seconds(8) == curve.seconds(1) == pytest.approx(2 * linear(8), rel=0.1)


def test_steps_are_told_so_that_lines_between_are_right() -> None:
    rows, times = warm(sizes=[1, 8, 16], padded=True).tell()
    assert rows == (1, 2, 8, 9, 16)
    assert times == (1100, 1800, 1800, 2600, 2600)


def test_as_many_preferred_sizes_as_there_may_be_can_be_told() -> None:
    sizes = list(range(2, 2 + 2 * 32, 2))
    cost = Cost("m", "1", 1, sizes[-1], 1000, *warm(sizes=sizes, padded=True).tell())
    assert len(cost.rows) == 64
    told = unpack(pack(Costs(1, [cost])), [], FROM_WORKER)
    assert isinstance(told, Costs)
    assert list(told.costs) == [cost]


# --- how many rows within a time ---


@pytest.mark.parametrize(("milliseconds", "rows"), [(0.5, 1), (1.1, 1), (1.85, 8), (2.65, 16), (3.05, 20), (99.0, 32)])
def test_most_rows_within_a_time(milliseconds: float, rows: int) -> None:
    assert warm().rows_within(milliseconds * MS) == rows


@pytest.mark.parametrize(("milliseconds", "rows"), [(0.5, 8), (1.85, 8), (2.5, 8), (2.65, 16), (99.0, 16)])
def test_most_rows_within_a_time_are_a_size_where_batches_are_padded(milliseconds: float, rows: int) -> None:
    assert warm(sizes=[8, 16], padded=True).rows_within(milliseconds * MS) == rows


# --- what is told, and what is relied on ---


def test_change_of_more_than_a_tenth_is_told() -> None:
    curve = warm()
    assert curve.changed()
    rows, times = curve.tell()
    assert rows == (1, 2, 4, 8, 16, 32)
    assert times == tuple(round(linear(each) * 1e6) for each in rows)
    run(curve, 8, 1.09 * linear(8), 50)
    assert not curve.changed()
    run(curve, 8, 1.2 * linear(8), 8)
    assert curve.changed()
    curve.tell()
    assert not curve.changed()


def test_what_was_not_measured_lately_is_not_relied_on() -> None:
    """It may be wrong by now, and while it keeps all from running nothing would put it right."""
    curve = warm()
    assert curve.reliable(8, 1.0) == 0.0, "only at warm-up, when nothing else ran"
    curve.learn(8, linear(8), 5.0)
    assert curve.reliable(8, 6.0) == curve.seconds(8) > 0
    assert curve.reliable(8, 6.1) == 0.0
    slow = warm(lambda rows: 1.0)
    slow.learn(8, 1.0, 5.0)
    assert slow.reliable(8, 14.9) == pytest.approx(1.0)
    assert slow.reliable(8, 15.1) == 0.0
