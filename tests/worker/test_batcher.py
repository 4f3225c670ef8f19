"""When a batch is closed and what is in it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.worker.batcher import Batch, Batcher, ModelKey, Rules
from penstock.worker.lots import Lot
from penstock.worker.model import Model
from penstock.worker.plan import Plan

if TYPE_CHECKING:
    from tests.worker.conftest import Requests

M: ModelKey = ("double", "1")
AT_ONCE = Rules(rows_max=4, delay_s=0.0, instances=1, window=8, batchable=True)
TWO_AT_ONCE = Rules(rows_max=4, delay_s=0.0, instances=2, window=12, batchable=True)
WAITS = Rules(rows_max=4, delay_s=0.010, instances=1, window=8, batchable=True)
ALONE = Rules(rows_max=1, delay_s=0.0, instances=1, window=2, batchable=False)
FOR_LONG = 60_000_000

MakeLot = Callable[..., Lot]


@pytest.fixture(scope="session")
def make_lot(requests: Requests, double: Model, slow: Model) -> MakeLot:
    """``make_lot(ids, now, rows=1, width=1, timeouts_us=FOR_LONG, attempt=1, model="double")``: a lot that arrived at
    ``now``. Requests of other widths cannot share a batch."""
    models = {"double": double, "slow": slow}
    plans: dict[tuple[str, int, int], Plan] = {}

    def make(
        ids: list[int],
        now: float,
        rows: int = 1,
        width: int = 1,
        timeouts_us: int = FOR_LONG,
        attempt: int = 1,
        model: str = "double",
    ) -> Lot:
        request = requests.ask(models[model], {"x": np.ones((rows, width), np.float32)})
        plan = plans.get((model, rows, width))
        if plan is None:
            plan = plans[model, rows, width] = Plan(models[model], request.form)
        timeouts = [timeouts_us] * len(ids)
        every = [request] * len(ids)
        lot = requests.lot(models[model], every, ids, timeouts_us=timeouts, arrived=now, attempt=attempt, plan=plan)
        lot.index.update(dict.fromkeys(ids, lot))
        return lot

    return make


def with_rules(rules: Rules) -> Batcher:
    batcher = Batcher()
    batcher.set_rules(M, rules)
    return batcher


def take(batcher: Batcher, now: float) -> Batch | None:
    """What should run now; its requests are marked as running."""
    batch = batcher.next(now)
    for lot in batch.lots if batch else ():
        lot.move("start")
    batcher.validate()
    return batch


def ids_of(batch: Batch | None) -> list[int]:
    return [number for lot in batch.lots for number in lot.ids] if batch else []


def reason_of(batch: Batch | None) -> str:
    return batch.reason if batch else ""


# --- why a batch is closed ---


def test_nothing_that_waits_is_no_batch() -> None:
    batcher = with_rules(AT_ONCE)
    assert take(batcher, 1.0) is None
    assert batcher.due() == float("inf")


def test_without_a_delay_a_batch_is_closed_at_once(make_lot: MakeLot) -> None:
    batcher = with_rules(AT_ONCE)
    batcher.add(make_lot([1], 1.0))
    batch = take(batcher, 1.0)
    assert (ids_of(batch), reason_of(batch)) == ([1], "idle")


def test_full_batch_is_closed_before_its_delay(make_lot: MakeLot) -> None:
    batcher = with_rules(WAITS)
    batcher.add(make_lot([1, 2, 3], 1.0))
    assert take(batcher, 1.0) is None
    batcher.add(make_lot([4], 1.001))
    batch = take(batcher, 1.001)
    assert (ids_of(batch), reason_of(batch)) == ([1, 2, 3, 4], "full")


def test_oldest_request_waits_no_longer_than_the_delay(make_lot: MakeLot) -> None:
    batcher = with_rules(WAITS)
    batcher.add(make_lot([1], 1.0))
    batcher.add(make_lot([2], 1.009))
    assert batcher.due() == pytest.approx(1.010)
    assert take(batcher, 1.0099) is None
    batch = take(batcher, batcher.due())
    assert (ids_of(batch), reason_of(batch)) == ([1, 2], "delay")


def test_batch_is_closed_while_its_most_urgent_request_has_time_left(make_lot: MakeLot) -> None:
    batcher = with_rules(WAITS)
    batcher.add(make_lot([1], 1.0))
    batcher.add(make_lot([2], 1.001, timeouts_us=15_000))
    assert batcher.due() == pytest.approx(1.006)  # as much before the deadline as the delay is long
    assert take(batcher, 1.005) is None
    batch = take(batcher, batcher.due())
    assert (ids_of(batch), reason_of(batch)) == ([1, 2], "deadline")


def test_request_with_less_time_than_the_delay_does_not_wait(make_lot: MakeLot) -> None:
    batcher = with_rules(WAITS)
    batcher.add(make_lot([1], 1.0, timeouts_us=9_000))
    assert reason_of(take(batcher, 1.0)) == "deadline"


def test_batch_that_cannot_be_filled_since_other_shapes_fill_the_window_is_closed(make_lot: MakeLot) -> None:
    batcher = with_rules(WAITS)
    batcher.add(make_lot([1, 2, 3], 1.0, width=1))
    batcher.add(make_lot([4, 5, 6], 1.0, width=2))
    assert take(batcher, 1.0) is None
    batcher.add(make_lot([7, 8], 1.0, width=3))
    batch = take(batcher, 1.0)
    assert (ids_of(batch), reason_of(batch)) == ([1, 2, 3], "shape")


def test_model_that_is_not_batchable_runs_each_request_alone(make_lot: MakeLot) -> None:
    batcher = with_rules(ALONE)
    batcher.add(make_lot([1, 2], 1.0))
    for number in 1, 2:
        batch = take(batcher, 1.0)
        assert batch is not None
        assert (ids_of(batch), batch.rows, batch.reason) == ([number], 1, "alone")
        batcher.ended(batch, 0.0, 0.0)


def test_second_attempt_runs_alone_one_request_at_a_time(make_lot: MakeLot) -> None:
    batcher = with_rules(AT_ONCE)
    batcher.add(make_lot([1, 2], 1.0, attempt=2))
    batcher.add(make_lot([3], 0.5))
    for number in 1, 2:  # before what waits longer: they have waited on the worker that was lost
        batch = take(batcher, 1.0)
        assert batch is not None
        assert (ids_of(batch), batch.reason) == ([number], "alone")
        batcher.ended(batch, 0.0, 0.0)
    assert reason_of(take(batcher, 1.0)) == "idle"


# --- what is in it ---


def test_lot_is_split_at_the_limit(make_lot: MakeLot) -> None:
    batcher = with_rules(AT_ONCE)
    batcher.add(make_lot([1, 2, 3, 4, 5, 6], 1.0))
    first = take(batcher, 1.0)
    assert first is not None
    assert (ids_of(first), first.rows, first.reason) == ([1, 2, 3, 4], 4, "full")
    batcher.ended(first, 0.0, 0.0)
    second = take(batcher, 1.0)
    assert second is not None
    assert (ids_of(second), second.rows, second.reason) == ([5, 6], 2, "idle")


def test_rows_count_and_not_requests(make_lot: MakeLot) -> None:
    batcher = with_rules(AT_ONCE)
    batcher.add(make_lot([1, 2, 3], 1.0, rows=3))
    batch = take(batcher, 1.0)
    assert batch is not None
    assert (ids_of(batch), batch.rows, batch.reason) == ([1], 3, "full")


def test_request_that_does_not_fit_any_more_is_not_overtaken(make_lot: MakeLot) -> None:
    batcher = with_rules(AT_ONCE)
    batcher.add(make_lot([1], 1.0, rows=3))
    batcher.add(make_lot([2], 1.1, rows=2))
    batcher.add(make_lot([3], 1.2, rows=1))
    batch = take(batcher, 1.2)
    assert ids_of(batch) == [1]
    assert batch is not None
    batcher.ended(batch, 0.0, 0.0)
    assert ids_of(take(batcher, 1.2)) == [2, 3]


def test_requests_of_other_shapes_make_batches_of_their_own(make_lot: MakeLot) -> None:
    batcher = with_rules(TWO_AT_ONCE)
    batcher.add(make_lot([1], 1.0, width=1))
    batcher.add(make_lot([2], 1.1, width=2))
    batcher.add(make_lot([3], 1.2, width=1))
    assert [ids_of(take(batcher, 1.2)), ids_of(take(batcher, 1.2))] == [[1, 3], [2]]


# --- which comes first ---


def test_group_that_waits_longest_comes_first(make_lot: MakeLot) -> None:
    batcher = with_rules(AT_ONCE)
    batcher.set_rules(("slow", "1"), WAITS)
    batcher.add(make_lot([1], 1.2))
    batcher.add(make_lot([2], 1.1, model="slow"))
    batcher.add(make_lot([3], 1.0, width=2))
    order = []
    while batch := take(batcher, 1.5):
        order += ids_of(batch)
        batcher.ended(batch, 0.0, 0.0)
    assert order == [3, 2, 1]


def test_group_that_may_wait_is_passed_over(make_lot: MakeLot) -> None:
    batcher = with_rules(AT_ONCE)
    batcher.set_rules(("slow", "1"), WAITS)
    batcher.add(make_lot([1], 1.0, model="slow"))
    batcher.add(make_lot([2], 1.005))
    assert ids_of(take(batcher, 1.005)) == [2]
    assert take(batcher, 1.005) is None


def test_model_runs_in_no_more_instances_than_it_is_configured_for(make_lot: MakeLot) -> None:
    batcher = with_rules(TWO_AT_ONCE)
    batcher.add(make_lot(list(range(9)), 1.0))
    first, second = take(batcher, 1.0), take(batcher, 1.0)
    assert (len(ids_of(first)), len(ids_of(second))) == (4, 4)
    assert take(batcher, 1.0) is None
    assert batcher.due() == float("inf")  # time alone changes nothing
    assert first is not None
    batcher.ended(first, 0.0, 0.0)
    assert ids_of(take(batcher, 1.0)) == [8]


def test_second_attempts_of_a_busy_model_do_not_hold_up_another(make_lot: MakeLot) -> None:
    batcher = with_rules(AT_ONCE)
    batcher.set_rules(("slow", "1"), AT_ONCE)
    batcher.add(make_lot([1, 2], 1.0, attempt=2))
    batcher.add(make_lot([3], 1.0, model="slow"))
    assert [ids_of(take(batcher, 1.0)) for _ in range(3)] == [[1], [3], []]


def test_batches_are_numbered(make_lot: MakeLot) -> None:
    batcher = with_rules(TWO_AT_ONCE)
    batcher.add(make_lot([1, 2, 3, 4, 5], 1.0))
    first, second = take(batcher, 1.0), take(batcher, 1.0)
    assert first is not None
    assert second is not None
    assert (first.serial, second.serial, first.model) == (1, 2, M)


# --- what leaves before ---


def test_removed_lot_is_in_no_batch(make_lot: MakeLot) -> None:
    batcher = with_rules(AT_ONCE)
    lots = [make_lot([number], 1.0) for number in range(3)]
    for lot in lots:
        batcher.add(lot)
    batcher.remove(lots[1], True)
    batcher.validate()
    assert ids_of(take(batcher, 1.0)) == [0, 2]


def test_part_of_a_lot_may_be_removed(make_lot: MakeLot) -> None:
    batcher = with_rules(AT_ONCE)
    lot = make_lot([1, 2, 3], 1.0)
    batcher.add(lot)
    batcher.remove(lot.split([2]), False)
    batcher.validate()
    assert ids_of(take(batcher, 1.0)) == [1, 3]


def test_last_request_that_is_removed_leaves_nothing(make_lot: MakeLot) -> None:
    batcher = with_rules(WAITS)
    for attempt in 1, 2:
        lot = make_lot([1], 1.0, attempt=attempt)
        batcher.add(lot)
        batcher.remove(lot, True)
        batcher.validate()
        assert list(batcher.waiting()) == []
        assert batcher.due() == float("inf")


def test_part_of_a_second_attempt_may_be_removed(make_lot: MakeLot) -> None:
    batcher = with_rules(AT_ONCE)
    lot = make_lot([1, 2, 3], 1.0, attempt=2)
    batcher.add(lot)
    batcher.remove(lot.split([1, 2]), False)
    batcher.validate()
    assert ids_of(take(batcher, 1.0)) == [3]


def test_deadline_that_has_left_with_its_batch_hurries_nobody(make_lot: MakeLot) -> None:
    batcher = with_rules(WAITS)
    batcher.add(make_lot([1, 2, 3, 4], 1.0, timeouts_us=12_000))
    batcher.add(make_lot([5], 1.0))
    assert reason_of(take(batcher, 1.0)) == "full"
    batcher.set_rules(M, Rules(4, 0.010, 2, 12, True))
    assert batcher.due() == pytest.approx(1.010)


# --- whatever comes ---

WIDTHS = st.integers(1, 2)
STEPS = st.one_of(
    st.tuples(st.just("add"), st.integers(1, 6), st.integers(1, 3), WIDTHS, st.sampled_from([1, 1, 1, 2])),
    st.tuples(st.just("take")),
    st.tuples(st.just("end"), st.integers(0, 3)),
    st.tuples(st.just("remove"), st.integers(0, 50), st.booleans()),
    st.tuples(st.just("wait"), st.sampled_from([0.001, 0.005, 0.010, 1.0])),
)


@settings(deadline=None, max_examples=1000)
@given(
    steps=st.lists(STEPS, max_size=40),
    rules=st.builds(
        Rules,
        rows_max=st.integers(3, 6),
        delay_s=st.sampled_from([0.0, 0.010]),
        instances=st.integers(1, 2),
        window=st.integers(6, 20),
        batchable=st.just(True),
    ),
)
def test_nothing_is_lost_or_doubled_and_order_is_kept(
    make_lot: MakeLot, steps: list[tuple[object, ...]], rules: Rules
) -> None:
    batcher, now, last = with_rules(rules), 1.0, 0
    came: dict[int, tuple[int, bool]] = {}  # width, and whether it runs alone
    waiting: set[int] = set()
    running: list[Batch] = []
    started: list[int] = []

    def start(at: float) -> None:
        batch = take(batcher, at)
        if batch is not None:
            assert sum(lot.rows for lot in batch.lots) == batch.rows <= rules.rows_max
            assert len({came[number] for number in ids_of(batch)}) == 1
            assert len(ids_of(batch)) == 1 or not came[ids_of(batch)[0]][1]
            waiting.difference_update(ids_of(batch))
            started.extend(ids_of(batch))
            running.append(batch)
            assert len(running) <= rules.instances

    for step in steps:
        match step:
            case ("add", int(count), int(rows), int(width), int(attempt)):
                ids = list(range(last, last := last + count))
                came |= dict.fromkeys(ids, (width, attempt > 1))
                waiting |= set(ids)
                batcher.add(make_lot(ids, now, rows, width, attempt=attempt))
            case ("take",):
                start(now)
            case ("end", int(at)) if running:
                batcher.ended(running.pop(at % len(running)), 0.0, now)
            case ("remove", int(at), whole):
                lots = list(batcher.waiting())
                if lots:
                    lot = lots[at % len(lots)]
                    gone = lot if whole or len(lot.ids) == 1 else lot.split([lot.ids[at % len(lot.ids)]])
                    waiting.difference_update(gone.ids)
                    batcher.remove(gone, gone is lot)
            case ("wait", float(seconds)):
                now += seconds
        batcher.validate()
        assert {number for lot in batcher.waiting() for number in lot.ids} == waiting

    while running or waiting:
        now = max(now, batcher.due()) if batcher.due() < float("inf") else now
        start(now)
        if running:
            batcher.ended(running.pop(), 0.0, now)
    batcher.validate()
    assert len(started) == len(set(started))
    for kind in set(came.values()):
        order = [number for number in started if came[number] == kind]
        assert order == sorted(order)
    assert batcher.running == 0
    assert list(batcher.waiting()) == []
    assert not any(line.held for line in batcher._lines.values())
