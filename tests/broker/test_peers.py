"""What a worker has room for, and what it has to hear of."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.broker.lots import Lot
from penstock.broker.peers import WorkerPeer
from penstock.wire.messages import MAX_REQUESTS, Cost
from penstock.wire.models import LOADING
from tests.broker.conversation import model
from tests.broker.parts import KEY, give, make_caller, make_lot, make_queue, make_worker

N = ("n", "1")


@pytest.mark.parametrize(("instances", "room"), [(1, 8), (3, 16)])
def test_a_worker_has_room_for_a_batch_more_than_it_has_instances(instances: int, room: int) -> None:
    assert make_worker(instances=instances).room(KEY) == room


def count(worker: WorkerPeer, key: tuple[str, str], rows: int) -> None:
    """Count rows in, or with a negative number out."""
    if rows >= 0:
        worker.add(key, rows, 1000 * rows, 0.0)
    else:
        worker.subtract(make_lot(make_caller(), make_queue(name=key[0]), range(-rows)), 0.0)


def test_room_is_counted_in_batches_over_all_models() -> None:
    worker = make_worker(models=[model("m", batch=4), model("n", batch=10)], instances=2)
    assert (worker.room(KEY), worker.room(N)) == (12, 30)
    count(worker, KEY, 5)  # two batches
    assert (worker.room(KEY), worker.room(N)) == (7, 10)
    count(worker, N, 1)
    assert (worker.room(KEY), worker.room(N)) == (3, 9)
    count(worker, KEY, -1)
    assert (worker.room(KEY), worker.room(N), worker.batches) == (4, 19, 2)
    count(worker, N, -1)
    count(worker, KEY, -4)
    assert (worker.room(KEY), worker.room(N), worker.batches) == (12, 30, 0)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.sampled_from([KEY, N]), st.integers(-9, 9)), max_size=20), st.integers(1, 9))
def test_room_is_what_is_left_of_the_window(steps: list[tuple[tuple[str, str], int]], batch: int) -> None:
    worker = make_worker(models=[model("m", batch=4), model("n", batch=batch)])
    rows = {KEY: 0, N: 0}
    sizes = {KEY: 4, N: batch}
    for key, change in steps:
        change = max(change, -rows[key])
        rows[key] += change
        count(worker, key, change)
        batches = {each: -(-count // sizes[each]) for each, count in rows.items()}
        assert worker.batches == sum(batches.values())
        for each, other in ((KEY, N), (N, KEY)):
            assert worker.room(each) == (2 - batches[other]) * sizes[each] - rows[each]


def test_a_worker_whose_models_change_counts_its_batches_anew() -> None:
    worker = make_worker(models=[model(batch=4)])
    count(worker, KEY, 6)
    worker.set_models([model(batch=2)])
    assert (worker.batches, worker.room(KEY)) == (3, -2)
    worker.set_models([])  # what it still runs counts on
    assert worker.batches == 3
    count(worker, KEY, -6)
    assert worker.batches == 0


def test_a_worker_that_declares_ever_other_models_is_not_remembered_for_all_of_them() -> None:
    worker = make_worker(models=[model(batch=4)])
    count(worker, KEY, 6)
    for number in range(100):
        name = f"m{number}"
        worker.set_models([model(name)])
        worker.learn([Cost(each, "1", 1, 4, 1000, (1,), (100,)) for each in (name, "undeclared")])
    here = {KEY, ("m99", "1")}  # the first still runs
    assert [set(known) for known in (worker.costs, worker._sizes, worker._windows)] == [{("m99", "1")}, here, here]
    count(worker, KEY, -6)


def test_a_worker_serves_what_is_ready_until_it_leaves() -> None:
    worker = make_worker(models=[model("m"), model("n", state=LOADING, batch=0)])
    assert (worker.serves(KEY), worker.serves(N), worker.serves(("x", "1"))) == (True, False, False)
    worker.leaving = True
    assert not worker.serves(KEY)


@pytest.mark.parametrize(
    ("endpoints", "local", "remote"),
    [
        ((), None, None),
        (("ipc:///a",), "ipc:///a", None),
        (("ipc:///a", "tcp://h:1"), "ipc:///a", "tcp://h:1"),
        (("tcp://h:1", "ipc:///a"), "tcp://h:1", "tcp://h:1"),
    ],
)
def test_a_caller_hears_a_worker_at_the_first_address_that_it_can_reach(
    endpoints: tuple[str, ...], local: str | None, remote: str | None
) -> None:
    worker = make_worker(endpoints=endpoints)
    assert worker.endpoint_for(make_caller(local=True)) == local
    assert worker.endpoint_for(make_caller(local=False)) == remote


def done(lot: Lot, nbytes: int) -> None:
    """What the ledger does at DONE."""
    assert lot.worker is not None
    lot.move("done")
    lot.kept_bytes = nbytes
    lot.worker.subtract(lot, 0.0)
    lot.worker.keep(lot.caller.id, nbytes * len(lot.ids))


def test_a_caller_is_full_while_too_much_is_kept_for_it() -> None:
    caller, other, worker, queue = make_caller(0), make_caller(1), make_worker(kept_bytes_max=1000), make_queue()
    lots = [make_lot(caller, queue, ids) for ids in ((1, 2), (3,), (4,))]
    for lot in [*lots, make_lot(other, queue, (1,))]:
        give(worker, lot)
    for lot, nbytes, full in zip(lots, (400, 199, 1), (False, False, True), strict=True):
        done(lot, nbytes)
        assert (caller.id in worker.full) == full
        worker.validate()
    assert other.id not in worker.full
    worker.release(lots[2])
    assert (worker.full, worker.kept_bytes) == (set(), {caller.id: 999})
    worker.release(lots[0])
    worker.release(lots[1])
    assert (worker.kept_bytes, caller.id in worker.held) == ({}, False)
    worker.validate()


def test_results_without_bytes_fill_nobody() -> None:
    caller, worker, queue = make_caller(), make_worker(kept_bytes_max=1), make_queue()
    lot = make_lot(caller, queue, (1,))
    give(worker, lot)
    done(lot, 0)
    assert (worker.kept_bytes, worker.full) == ({}, set())


def test_news_are_told_once_in_ranges_by_caller() -> None:
    first, second, worker, queue = make_caller(0), make_caller(1), make_worker(), make_queue()
    lots = [make_lot(first, queue, (9, 1, 2)), make_lot(first, queue, (3,)), make_lot(second, queue, (1,))]
    for lot in lots:
        give(worker, lot)
    worker.cancel(lots[1])
    assert (worker.has_news, worker.has_urgent_news) == (True, True)
    assert worker.take_cancelled() == [(first.id, (3, 3))]
    for lot in lots:
        worker.release(lot)
    assert (worker.has_news, worker.has_urgent_news) == (True, False)
    assert worker.take_freed() == [(first.id, (1, 3, 9, 9)), (second.id, (1, 1))]
    assert (worker.has_news, worker.take_freed(), worker.take_cancelled()) == (False, [], [])


def test_news_fit_their_messages() -> None:
    caller, worker, queue = make_caller(), make_worker(models=[model(batch=99_999)]), make_queue()
    lot = make_lot(caller, queue, range(0, 4 * MAX_REQUESTS, 2))
    give(worker, lot)
    worker.release(lot)
    assert [len(each.ranges) for each in worker.take_freed()] == [2 * MAX_REQUESTS] * 2


def test_nothing_is_told_of_a_caller_that_has_gone() -> None:
    caller, worker, queue = make_caller(), make_worker(), make_queue()
    lots = [make_lot(caller, queue, (1,)), make_lot(caller, queue, (2,))]
    for lot in lots:
        give(worker, lot)
    worker.callers.add(caller.id)
    worker.cancel(lots[0])
    worker.release(lots[1])
    worker.forget_caller(caller.id)
    assert (worker.has_news, worker.callers) == (False, set())
