"""When a batch is closed and what is in it."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.worker.batcher import Batch, Batcher, ModelKey, Rules
from penstock.worker.costs import Curve

if TYPE_CHECKING:
    from tests.worker.conftest import MakeLot

M: ModelKey = ("double", "1")
OTHER = b"caller-9"  # than the one that lots are made for
AT_ONCE = Rules(rows_max=4, delay_s=0.0, instances=1, window=8, batchable=True)
TWO_AT_ONCE = Rules(rows_max=4, delay_s=0.0, instances=2, window=12, batchable=True)
WAITS = Rules(rows_max=4, delay_s=0.010, instances=1, window=8, batchable=True)
ALONE = Rules(rows_max=1, delay_s=0.0, instances=1, window=2, batchable=False)


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


def test_what_overtakes_runs_first_in_the_order_in_which_it_came(make_lot: MakeLot) -> None:
    batcher = with_rules(AT_ONCE)
    batcher.add(make_lot([1, 2, 3, 4, 5, 6], 1.0))
    for number in 7, 8, 9:
        lot = make_lot([number, number + 10], 1.001)
        lot.overtakes, lot.caller = True, OTHER
        batcher.add(lot)
    batcher.remove(lot, True)  # 9 and 19, which were cancelled
    assert [lot.ids[0] for lot in batcher.waiting()] == [7, 8, 1]
    found = []
    while batch := take(batcher, 1.002):
        batcher.ended(batch, 0.001, 1.002)
        found.append(ids_of(batch))
    assert found == [[7, 17, 8, 18], [1, 2, 3, 4], [5, 6]]


def test_who_is_overtaken_has_waited_for_longest_all_the_same(make_lot: MakeLot) -> None:
    batcher = with_rules(WAITS)
    batcher.add(make_lot([1], 1.0))
    lot = make_lot([2], 1.005)
    lot.overtakes, lot.caller = True, OTHER
    batcher.add(lot)
    assert batcher.due() == pytest.approx(1.010)
    batch = take(batcher, 1.010)
    assert (ids_of(batch), reason_of(batch)) == ([2, 1], "delay")


def test_nobody_overtakes_what_is_its_own(make_lot: MakeLot) -> None:
    """It would wait for all that its tenant asks for afterwards, batch after batch."""
    batcher = with_rules(AT_ONCE)
    for number, caller in (1, OTHER), (2, b"caller-1"), (3, OTHER), (4, b"caller-1"):
        lot = make_lot([number], 1.0)
        lot.caller = caller
        batcher.add(lot)
    late = make_lot([5], 1.001)
    late.overtakes = True
    late.caller = b"caller-1"
    batcher.add(late)
    batcher.validate()
    assert [lot.ids[0] for lot in batcher.waiting()] == [2, 4, 5, 1, 3]


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


# --- what cannot end in time ---

TIMES = {1: 0.010, 2: 0.012, 4: 0.016}


def with_costs(rules: Rules, times: dict[int, float], now: float = 1.0) -> Batcher:
    """Whose batches take so long, by rows; measured just before ``now``."""
    batcher = Batcher()
    batcher.set_rules(M, rules, measured(rules, times, now))
    return batcher


def measured(rules: Rules, times: dict[int, float], now: float = 1.0) -> Curve:
    curve = Curve(list(times), bool(rules.sizes))
    curve.begin(times)
    rows = max(times)
    curve.learn(rows, times[rows], now)
    return curve


def late_ids(batcher: Batcher) -> list[int]:
    """Which requests were taken out as too late, whoever is told."""
    late, batcher.late = batcher.late, []
    return [number for lot in late for number in lot.ids]


def test_what_cannot_end_in_time_makes_room_for_others(make_lot: MakeLot) -> None:
    batcher = with_costs(AT_ONCE, TIMES)
    batcher.add(make_lot([1, 2], 1.0, timeouts_us=14_000))  # a batch of four takes 16 ms, and 14.4 are enough
    batcher.add(make_lot([3, 4, 5, 6, 7], 1.0, timeouts_us=15_000))
    assert ids_of(take(batcher, 1.0)) == [3, 4, 5, 6]
    assert late_ids(batcher) == [1, 2]
    assert [number for lot in batcher.waiting() for number in lot.ids] == [7]


def test_time_alone_is_up_where_nothing_was_measured(make_lot: MakeLot) -> None:
    batcher = with_rules(AT_ONCE)
    batcher.add(make_lot([1], 1.0, timeouts_us=1))
    batcher.add(make_lot([2], 1.0, timeouts_us=100_000))
    assert ids_of(take(batcher, 1.001)) == [2]
    assert late_ids(batcher) == [1]


def test_what_was_measured_long_ago_drops_nothing(make_lot: MakeLot) -> None:
    """It is run, and so measured anew."""
    batcher = with_costs(AT_ONCE, TIMES, now=1.0)
    batcher.add(make_lot([1], 9.0, timeouts_us=5_000))
    assert ids_of(take(batcher, 9.0)) == [1]
    assert late_ids(batcher) == []


def test_when_all_would_be_late_fewer_are_run(make_lot: MakeLot) -> None:
    batcher = with_costs(AT_ONCE, {1: 0.001, 2: 0.010, 4: 0.100})
    batcher.add(make_lot([1, 2, 3, 4], 1.0, timeouts_us=20_000))
    batch = take(batcher, 1.0)
    assert (ids_of(batch), reason_of(batch)) == ([1, 2], "deadline")
    assert late_ids(batcher) == []


def test_a_batch_is_not_halved_for_a_few(make_lot: MakeLot) -> None:
    batcher = with_costs(AT_ONCE, {1: 0.001, 2: 0.010, 4: 0.100})
    batcher.add(make_lot([1, 2], 1.0, timeouts_us=20_000))
    batcher.add(make_lot([3, 4], 1.0))
    batch = take(batcher, 1.0)
    assert (ids_of(batch), reason_of(batch)) == ([3, 4], "full")
    assert late_ids(batcher) == [1, 2]


def test_when_nothing_can_end_in_time_another_group_runs(make_lot: MakeLot) -> None:
    batcher = with_costs(AT_ONCE, TIMES)
    batcher.add(make_lot([1, 2], 1.0, timeouts_us=2_000))
    batcher.add(make_lot([3], 1.0, timeouts_us=2_000, attempt=2))
    batcher.add(make_lot([4], 1.001, width=2))
    assert ids_of(take(batcher, 1.001)) == [4]
    assert sorted(late_ids(batcher)) == [1, 2, 3]
    assert list(batcher.waiting()) == []
    assert take(batcher, 1.001) is None


def test_second_attempt_that_is_late_in_part_runs_the_rest(make_lot: MakeLot) -> None:
    batcher = with_costs(AT_ONCE, TIMES)
    lot = make_lot([1, 2, 3], 1.0, attempt=2, timeouts_us=[2_000, 60_000, 2_000])
    batcher.add(lot)
    assert ids_of(take(batcher, 1.0)) == [2]
    assert late_ids(batcher) == [1, 3]


def test_request_that_waits_for_others_is_closed_in_time_for_its_batch(make_lot: MakeLot) -> None:
    batcher = with_costs(WAITS, TIMES)
    batcher.add(make_lot([1], 1.0, timeouts_us=25_000))
    assert batcher.due() == pytest.approx(1.005)  # 25 ms, less 10 of its batch, less 10 that it may wait
    assert take(batcher, 1.004) is None
    assert reason_of(take(batcher, batcher.due())) == "deadline"
    assert late_ids(batcher) == []


@settings(deadline=None, max_examples=300)
@given(
    lots=st.lists(st.tuples(st.integers(1, 4), st.integers(1, 2), st.integers(0, 60_000)), min_size=1, max_size=12),
    times=st.lists(st.floats(0.0001, 0.030), min_size=4, max_size=4).map(sorted),
)
def test_what_runs_can_end_in_time_and_what_is_dropped_could_not(
    make_lot: MakeLot, lots: list[tuple[int, int, int]], times: list[float]
) -> None:
    rules = Rules(rows_max=8, delay_s=0.0, instances=1, window=16, batchable=True)
    took = dict(zip((1, 2, 4, 8), times, strict=True))
    batcher = with_costs(rules, took)
    curve, last = measured(rules, took), 0
    timeouts: dict[int, float] = {}
    for count, rows, timeout_us in lots:
        ids = list(range(last, last := last + count))
        timeouts |= dict.fromkeys(ids, timeout_us * 1e-6)
        batcher.add(make_lot(ids, 1.0, rows=rows, timeouts_us=timeout_us))
    while True:
        batch = take(batcher, 1.0)
        dropped = late_ids(batcher)
        least = 0.9 * (curve.seconds(batch.rows) if batch else curve.seconds(1))
        assert all(timeouts[number] <= 0.9 * curve.seconds(8) + 1e-9 for number in dropped)
        if batch is None:
            break
        assert all(timeouts[number] > least - 1e-9 for number in ids_of(batch))
        batcher.ended(batch, 0.0, 1.0)
    assert list(batcher.waiting()) == []


# --- padding ---

PADDED = Rules(rows_max=16, delay_s=0.0, instances=2, window=48, batchable=True, sizes=(4, 8, 16), enough=4)


@pytest.mark.parametrize(
    ("waiting", "batches"), [(1, [1]), (4, [4]), (5, [4, 1]), (7, [4, 3]), (8, [8]), (15, [8, 4, 3]), (21, [16, 4, 1])]
)
def test_batches_fill_a_size_while_nothing_is_known(make_lot: MakeLot, waiting: int, batches: list[int]) -> None:
    """Time is taken to grow with the size, so padding only loses."""
    batcher = with_rules(PADDED)
    batcher.add(make_lot(list(range(waiting)), 1.0))
    for rows in batches:
        batch = take(batcher, 1.0)
        assert batch is not None
        assert batch.rows == rows
        batcher.ended(batch, 0.0, 1.0)
    assert take(batcher, 1.0) is None


@pytest.mark.parametrize(
    ("times", "waiting", "rows"),
    [
        ({4: 0.010, 8: 0.011, 16: 0.012}, 5, 5),  # all sizes take as long: padding costs nothing
        ({4: 0.010, 8: 0.011, 16: 0.012}, 9, 9),
        ({4: 0.010, 8: 0.020, 16: 0.040}, 15, 8),  # twice the rows take twice the time: it only loses
        ({4: 0.010, 8: 0.018, 16: 0.030}, 15, 15),
        ({4: 0.010, 8: 0.018, 16: 0.030}, 13, 8),
    ],
)
def test_padding_is_worth_it_when_it_does_more_rows_in_the_time(
    make_lot: MakeLot, times: dict[int, float], waiting: int, rows: int
) -> None:
    batcher = with_costs(PADDED, times)
    batcher.add(make_lot(list(range(waiting)), 1.0))
    batch = take(batcher, 1.0)
    assert batch is not None
    assert batch.rows == rows


def test_with_a_delay_a_preferred_size_is_closed_at_once(make_lot: MakeLot) -> None:
    batcher = with_rules(replace(PADDED, delay_s=0.010))
    batcher.add(make_lot([1, 2, 3], 1.0))
    assert take(batcher, 1.0) is None
    batcher.add(make_lot([4], 1.001))
    assert reason_of(take(batcher, 1.001)) == "full"


# --- turns ---

S: ModelKey = ("slow", "1")
EACH = Rules(rows_max=4, delay_s=0.0, instances=1, window=8, batchable=True)


def turns(make_lot: MakeLot, weights: tuple[float, float], took: tuple[float, float], count: int) -> list[str]:
    """Which of two models that always have work run, one batch after another. Nothing is known beforehand."""
    batcher, now, order = Batcher(), 1.0, []
    for (name, _), weight, seconds in zip((M, S), weights, took, strict=True):
        rules = replace(EACH, weight=weight)
        batcher.set_rules((name, "1"), rules, measured(rules, {1: seconds, 4: seconds}))
        batcher.add(make_lot(list(range(4 * count)), now, model=name))
    for _ in range(count):
        batch = take(batcher, now)
        assert batch is not None
        order.append(batch.model[0])
        seconds = took[0] if batch.model == M else took[1]
        now += seconds
        batcher.ended(batch, seconds, now)
    return order


def test_models_share_the_worker_by_time_and_not_by_batches(make_lot: MakeLot) -> None:
    order = turns(make_lot, (1.0, 1.0), (0.001, 0.010), 110)
    assert order.count("slow") == pytest.approx(10, abs=1)


def test_weight_is_a_share_of_the_time(make_lot: MakeLot) -> None:
    order = turns(make_lot, (1.0, 3.0), (0.004, 0.004), 80)
    assert order.count("slow") == pytest.approx(60, abs=1)


def test_light_model_comes_after_one_batch_of_a_heavy_one_however_long_that_has_waited(make_lot: MakeLot) -> None:
    batcher = with_costs(EACH, {1: 0.001, 4: 0.001})
    batcher.set_rules(S, EACH, measured(EACH, {1: 1.0, 4: 1.0}))
    batcher.add(make_lot(list(range(400)), 0.0, model="slow"))
    now = 1.0
    for number in range(1000, 1010):
        heavy = take(batcher, now)
        assert heavy is not None
        assert heavy.model == S
        batcher.add(make_lot([number], now + 0.5))
        now += 1.0
        batcher.ended(heavy, 1.0, now)
        light = take(batcher, now)
        assert ids_of(light) == [number]
        assert light is not None
        now += 0.001
        batcher.ended(light, 0.001, now)


def test_model_that_was_idle_has_no_credit(make_lot: MakeLot) -> None:
    batcher = with_costs(EACH, {1: 0.010, 4: 0.010})
    batcher.set_rules(S, EACH, measured(EACH, {1: 0.010, 4: 0.010}))
    batcher.add(make_lot(list(range(1000)), 1.0))
    for _ in range(100):
        batch = take(batcher, 1.0)
        assert batch is not None
        batcher.ended(batch, 0.010, 1.0)
    batcher.add(make_lot(list(range(1000, 1400)), 1.0, model="slow"))
    order = []
    for _ in range(20):
        batch = take(batcher, 1.0)
        assert batch is not None
        order.append(batch.model)
        batcher.ended(batch, 0.010, 1.0)
    assert order.count(S) == pytest.approx(10, abs=1)


def test_turns_are_put_right_by_what_batches_took(make_lot: MakeLot) -> None:
    """Both were measured at 10 ms, one takes 40 now, and is not learned to."""
    batcher = with_costs(EACH, {1: 0.010, 4: 0.010})
    batcher.set_rules(S, EACH, measured(EACH, {1: 0.010, 4: 0.010}))
    for model in "double", "slow":
        batcher.add(make_lot(list(range(400)), 1.0, model=model))
    order = []
    for _ in range(50):
        batch = take(batcher, 1.0)
        assert batch is not None
        order.append(batch.model)
        batcher.ended(batch, 0.040 if batch.model == S else 0.010, 1.0)
    assert order.count(S) == pytest.approx(10, abs=1)


def test_shapes_do_not_wait_for_each_other(make_lot: MakeLot) -> None:
    """One that floods its model does not keep another from its turn: the group that waits longest is next, and a group
    that waits for its delay, or for an instance, holds up no other."""
    batcher = with_costs(EACH, {1: 0.010, 4: 0.010})
    batcher.add(make_lot(list(range(100)), 1.0, width=1))
    batcher.add(make_lot([100], 1.001, width=2))
    first = take(batcher, 1.001)
    assert first is not None
    for number in range(101, 110):  # the flood goes on
        batcher.add(make_lot([number], 1.002))
    batcher.ended(first, 0.010, 1.011)
    second = take(batcher, 1.011)
    assert second is not None
    batcher.ended(second, 0.010, 1.021)
    assert [number for number in ids_of(first) + ids_of(second) if number >= 100] == []
    served = []
    while batch := take(batcher, 1.1):
        served.append(ids_of(batch))
        batcher.ended(batch, 0.010, 1.1)
    assert served.index([100]) <= 100 // 4, "when all have gone that came before it, at the latest"

    waits = with_rules(replace(WAITS, instances=2, window=100))
    waits.add(make_lot([1], 1.0, width=1))
    waits.add(make_lot([2, 3, 4, 5], 1.001, width=2))
    assert ids_of(take(waits, 1.001)) == [2, 3, 4, 5]


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
        rows_max=st.just(6),
        delay_s=st.sampled_from([0.0, 0.010]),
        instances=st.integers(1, 2),
        window=st.integers(6, 20),
        batchable=st.just(True),
        target_s=st.sampled_from([0.0, 0.0, 0.030]),
        sizes=st.sampled_from([(), (), (3, 6)]),
        enough=st.sampled_from([0, 3]),
    ),
    known=st.booleans(),
)
def test_nothing_is_lost_or_doubled_and_order_is_kept(
    make_lot: MakeLot, steps: list[tuple[object, ...]], rules: Rules, known: bool
) -> None:
    batcher = with_costs(rules, {3: 0.004, 6: 0.008}) if known else with_rules(rules)
    now, last = 1.0, 0
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
                batcher.ended(running.pop(at % len(running)), 0.005, now)
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
