"""Batch size and delay for a target: what the derivation promises, in virtual time."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.worker import tuning
from penstock.worker.batcher import Batch, Batcher, ModelKey, Rules
from penstock.worker.costs import Curve, batch_sizes
from penstock.worker.tuning import Fading

if TYPE_CHECKING:
    from tests.worker.conftest import MakeLot

MS = 1e-3
M: ModelKey = ("double", "1")


# --- how long to wait ---


def test_while_the_device_has_little_to_do_nothing_waits() -> None:
    assert tuning.delay(0.050, 0.010, 8, 1000.0, tuning.BUSY) == 0.0
    assert tuning.delay(0.050, 0.010, 8, 1000.0, 0.51) > 0.0


@given(
    target_s=st.floats(1e-6, 60.0),
    batch_s=st.floats(0.0, 60.0),
    missing=st.integers(0, 4096),
    rows_per_s=st.floats(0.0, 1e6),
    busy=st.floats(0.0, 2.0),
)
def test_wait_is_what_the_target_leaves_and_what_filling_takes_at_most(
    target_s: float, batch_s: float, missing: int, rows_per_s: float, busy: float
) -> None:
    waited = tuning.delay(target_s, batch_s, missing, rows_per_s, busy)
    assert waited >= 0.0
    assert waited == 0.0 or waited + 2 * batch_s <= target_s
    assert waited == 0.0 or waited * rows_per_s <= missing * (1 + 1e-9)


# --- what happened lately ---


def test_sums_fade() -> None:
    rows = Fading()
    assert rows.rate(1.0) == 0.0
    for number in range(1000):
        rows.add(2, 1.0 + number * 0.010)
    assert rows.rate(10.99) == pytest.approx(200, rel=0.03)
    assert rows.rate(12.99) < 1.0


@pytest.mark.parametrize(("batch_s", "every_s"), [(0.001, 0.002), (0.010, 0.040), (0.3, 0.4), (2.0, 2.0)])
def test_share_of_the_time_that_something_went_on(batch_s: float, every_s: float) -> None:
    busy, now, seen = Fading(), 0.0, []
    for number in range(1, 2001):
        now = number * every_s
        busy.add_span(batch_s, now)
        seen.append(busy.rate(now))
        assert seen[-1] <= 1.0 + 1e-9, "never more than always"
    at_the_end_of_a_batch = seen[-1]
    later = busy.rate(now + (every_s - batch_s))
    assert later <= batch_s / every_s + 1e-9 <= at_the_end_of_a_batch + 2e-9


# --- with a batcher, in virtual time ---


class Served(NamedTuple):
    """A request: when it came and ended, when its batch began, and whether it might have been in one that began before
    but for that one's limit."""

    came: float
    began: float
    ended: float
    left_over: bool


def serve(
    make_lot: MakeLot, batcher: Batcher, arrivals: list[float], took: dict[int, float], seconds: float
) -> list[Served]:
    """One device, one row a request; batches take what ``took`` says. For so long."""
    came = dict(enumerate(arrivals))
    left, served = list(came.items()), []
    running: Batch | None = None
    now = began = ends = 0.0
    passed: set[int] = set()  # waited when a batch began, and were not in it
    while now < seconds:
        while left and left[0][1] <= now:
            number, at = left.pop(0)
            batcher.add(make_lot([number], at))
        if running is not None and ends <= now:
            batcher.ended(running, ends - began, now)
            ids = [number for lot in running.lots for number in lot.ids]
            served += [Served(came[number], began, now, number in passed) for number in ids]
            running = None
        if running is None:
            running = batcher.next(now)
            if running is not None:
                for lot in running.lots:
                    lot.move("start")
                began, ends = now, now + took[running.rows]
                passed |= {number for lot in batcher.waiting() for number in lot.ids}
        batcher.validate()
        soon = [left[0][1]] if left else []
        soon += [ends] if running is not None else [batcher.due()]
        now = max(now, min([*soon, seconds]))
    return served


def tuned(rows_max: int, target_s: float, took: dict[int, float]) -> Batcher:
    """That knows exactly what batches take."""
    curve = Curve(batch_sizes(rows_max))
    curve.begin(took)
    batcher = Batcher()
    batcher.set_rules(M, Rules(rows_max, 0.0, 1, 2 * rows_max, True, target_s=target_s), curve)
    return batcher


def poisson(rate: float, seconds: float, seed: int) -> list[float]:
    chance, now, found = random.Random(seed), 0.0, []
    while (now := now + chance.expovariate(rate)) < seconds:
        found.append(now)
    return found


@settings(deadline=None, max_examples=40)
@given(
    rows_max=st.sampled_from([1, 4, 8, 32]),
    fixed_s=st.floats(0.0005, 0.010),
    row_s=st.floats(0.0001, 0.002),
    room=st.floats(2.0, 40.0),
    load=st.floats(0.05, 0.9),
    seed=st.integers(0, 1000),
)
def test_no_request_that_is_in_the_next_batch_misses_the_target(
    make_lot: MakeLot, rows_max: int, fixed_s: float, row_s: float, room: float, load: float, seed: int
) -> None:
    took = {rows: fixed_s + row_s * rows for rows in range(1, rows_max + 1)}
    target_s = took[1] * room
    batcher = tuned(rows_max, target_s, took)
    limit = batcher.limit(M)
    assert took[limit] <= target_s / 2
    assert limit == rows_max or took[limit + 1] > target_s / 2
    rate = load * limit / took[limit]
    seconds = min(3.0, 150 / rate)
    served = serve(make_lot, batcher, poisson(rate, seconds, seed), took, seconds)
    assert batcher.limit(M) == pytest.approx(limit, abs=1)  # what is exact is not unlearned
    for each in served:
        assert each.left_over or each.ended - each.came <= target_s * (1 + 1e-6), each


@settings(deadline=None, max_examples=30)
@given(batch_s=st.floats(0.001, 0.020), share=st.floats(0.05, 0.35), seed=st.integers(0, 1000))
def test_an_idle_device_is_not_kept_waiting(make_lot: MakeLot, batch_s: float, share: float, seed: int) -> None:
    """Batches of one at regular times, busy for a third of the time: each begins when it comes."""
    took = dict.fromkeys(range(1, 9), batch_s)
    arrivals = [0.001 * (seed % 7 + 1) + number * batch_s / share for number in range(60)]
    served = serve(make_lot, tuned(8, 1.0, took), arrivals, took, arrivals[-1] + 1.0)
    assert len(served) == 60
    assert all(each.began == each.came for each in served)


def test_a_busy_device_waits_for_fuller_batches(make_lot: MakeLot) -> None:
    """Nine tenths of what batches of two could do: they wait, as long as the target allows, and are larger for it."""
    took = {rows: 0.010 + 0.0005 * rows for rows in range(1, 33)}
    arrivals = poisson(300.0, 3.0, 1)
    patient = serve(make_lot, tuned(32, 0.200, took), arrivals, took, 3.0)
    batcher = Batcher()
    batcher.set_rules(M, Rules(32, 0.0, 1, 64, True))
    hasty = serve(make_lot, batcher, arrivals, took, 3.0)
    sizes = [len(served) / len({each.began for each in served}) for served in (patient, hasty)]
    assert sizes[0] > 1.5 * sizes[1]
    assert max(each.ended - each.came for each in patient) <= 0.200
    assert len(patient) > 0.9 * len(arrivals)


def test_what_takes_longer_than_half_of_the_target_runs_one_by_one(make_lot: MakeLot) -> None:
    took = {1: 0.030, 2: 0.040}
    batcher = tuned(2, 0.050, took)
    assert batcher.limit(M) == 1
    served = serve(make_lot, batcher, [0.1, 0.1, 0.1], took, 1.0)
    assert len({each.began for each in served}) == 3


def test_size_follows_what_batches_take(make_lot: MakeLot) -> None:
    """Another process takes half of the core, and goes again."""
    took = {rows: 0.001 * rows for rows in range(1, 33)}
    curve = Curve(batch_sizes(32))
    curve.begin(took)
    batcher = Batcher()
    batcher.set_rules(M, Rules(32, 0.0, 1, 64, True, target_s=0.033), curve)
    assert batcher.limit(M) == 16
    now, last = 0.0, 0
    for factor, expected in ((2.0, 8), (1.0, 16)):
        for _ in range(20):
            now += 0.1
            batcher.add(make_lot(list(range(last, last := last + 8)), now))
            while batch := batcher.next(now):
                for lot in batch.lots:
                    lot.move("start")
                seconds = factor * took[batch.rows]
                now += seconds
                curve.learn(batch.rows, seconds, now)
                batcher.ended(batch, seconds, now)
        assert batcher.limit(M) == pytest.approx(expected, abs=1)
