"""Which waiting request goes to which worker."""

from __future__ import annotations

from collections.abc import Sequence

from penstock.broker.assign import Assigner, Given
from penstock.broker.lots import Lot
from penstock.broker.peers import CallerPeer, WorkerPeer
from penstock.broker.queues import ModelQueue
from tests.broker.conversation import model
from tests.broker.parts import KEY, give, make_caller, make_lot, make_queue, make_worker


class Office:
    """An assigner, a caller, and workers that serve a model each of them hears the caller of."""

    def __init__(self, workers: int = 1, batch: int = 4, names: Sequence[str] = ("m",)) -> None:
        self.assigner = Assigner()
        self.caller = make_caller()
        models = [model(name, batch=batch) for name in names]
        self.workers = [make_worker(number, models, [self.caller]) for number in range(workers)]
        self.queues = {name: make_queue(name=name) for name in names}
        self.last_id = 0
        for worker in self.workers:
            self.enlist(worker)
        self.assign()

    def enlist(self, worker: WorkerPeer) -> None:
        """Have a worker serve its models, as the registry and the core do together."""
        for queue in self.queues.values():
            if worker.serves(queue.key):
                queue.enlist(worker)
        self.assigner.enlist(worker, {queue.key: queue for queue in self.queues.values()})

    @property
    def queue(self) -> ModelQueue:
        return self.queues["m"]

    def ask(self, count: int, rows: int = 1, name: str = "m", caller: CallerPeer | None = None) -> Lot:
        ids = range(self.last_id + 1, self.last_id + 1 + count)
        self.last_id += count
        lot = make_lot(caller or self.caller, self.queues[name], ids, rows)
        self.queues[name].push(lot)
        self.assigner.requests_came(self.queues[name])
        return lot

    def assign(self) -> Given:
        given = self.assigner.assign()
        self.assigner.validate(self.queues.values(), self.workers)
        return given

    def shares(self) -> list[int]:
        """How many requests each worker is given now."""
        given = self.assign()
        return [sum(len(lot.ids) for lot in given.get(worker, [])) for worker in self.workers]

    def finish(self, worker: WorkerPeer, rows: int, name: str = "m") -> None:
        ids = tuple(range(1_000_000 + self.last_id, 1_000_000 + self.last_id + rows))
        worker.subtract(make_lot(self.caller, self.queues[name], ids), 0.0)
        self.assigner.room_came(worker)


def test_nothing_to_do_is_nothing_done() -> None:
    assert Office().assign() == {}


def test_requests_go_to_the_worker_that_is_there() -> None:
    office = Office()
    lot = office.ask(3)
    assert office.assign() == {office.workers[0]: [lot]}
    assert office.workers[0].room(KEY) == 5
    assert office.assign() == {}


def test_idle_workers_get_equal_shares() -> None:
    office = Office(workers=4)
    office.ask(8)
    assert office.shares() == [2, 2, 2, 2]


def test_a_few_requests_are_spread_over_idle_workers() -> None:
    office = Office(workers=4)
    office.ask(3)
    assert sorted(office.shares()) == [0, 1, 1, 1]


def test_workers_take_turns() -> None:
    office = Office(workers=3)
    turns = []
    for _ in range(6):
        office.ask(1)
        turns.append(office.shares().index(1))
        office.finish(office.workers[turns[-1]], 1)
        office.assign()
    assert sorted(turns[:3]) == sorted(turns[3:]) == [0, 1, 2]


def test_when_nobody_is_idle_the_least_busy_is_filled() -> None:
    office = Office(workers=2)
    for worker, rows in zip(office.workers, (5, 2), strict=True):
        lot = office.ask(rows)
        office.queue.remove(lot)
        give(worker, lot)
        assert worker.pool is not None
        worker.pool.assigned_us += worker.assigned_us
        office.assigner.room_came(worker)
    office.ask(3)
    assert office.shares() == [0, 3]


def test_what_finds_no_room_waits_until_there_is_some() -> None:
    office = Office(workers=2)
    office.ask(20)
    assert office.shares() == [8, 8]
    assert office.shares() == [0, 0]
    office.finish(office.workers[1], 3)
    assert office.shares() == [0, 3]
    office.finish(office.workers[0], 8)
    assert office.shares() == [1, 0]


def test_new_requests_do_not_search_while_everybody_is_full() -> None:
    office = Office()
    office.ask(20)
    office.assign()
    office.ask(20)
    [pool] = office.queue.pools
    assert list(pool.candidates(office.queue)) == []
    office.finish(office.workers[0], 8)
    assert office.shares() == [8]


def test_a_worker_that_hears_nobody_is_passed_over() -> None:
    office = Office(workers=2)
    office.workers[0].callers.clear()
    office.ask(10)
    assert office.shares() == [0, 8]
    office.workers[0].callers.add(office.caller.id)
    office.assigner.room_came(office.workers[0])
    assert office.shares() == [2, 0]


def test_a_worker_that_hears_only_some_serves_these() -> None:
    office = Office(workers=2)
    other = make_caller(1)
    office.workers[1].callers.add(other.id)
    office.ask(2)
    office.ask(3, caller=other)
    given = office.assign()
    assert {lot.caller for lot in given.get(office.workers[0], [])} <= {office.caller}
    assert sum(len(lot.ids) for lots in given.values() for lot in lots if lot.caller is other) == 3


def test_a_worker_with_room_that_nobody_who_waits_can_use_is_there_for_others() -> None:
    office = Office()
    office.ask(20)
    office.assign()
    [worker], other = office.workers, make_caller(1)
    worker.callers = {other.id}
    office.finish(worker, 8)
    assert office.assign() == {}
    lot = office.ask(1, caller=other)
    assert office.assign() == {worker: [lot]}


def test_a_large_request_waits_for_room_and_is_not_overtaken() -> None:
    office = Office()
    office.ask(6)
    office.assign()
    large = office.ask(1, rows=4)
    office.ask(1)
    assert office.assign() == {}
    office.finish(office.workers[0], 1)
    assert office.assign() == {}
    office.finish(office.workers[0], 1)
    assert office.assign() == {office.workers[0]: [large]}


def test_a_model_whose_requests_have_all_left_is_no_trouble() -> None:
    office = Office()
    office.ask(8)
    office.assign()
    waiting = office.ask(2)
    office.assign()
    office.queue.remove(waiting)
    office.finish(office.workers[0], 8)
    assert office.assign() == {}
    office.ask(1)
    assert office.shares() == [1]


def test_models_that_wait_take_turns_at_a_worker() -> None:
    office = Office(names=("m", "n"))
    office.ask(30, name="m")
    office.ask(30, name="n")
    assert office.shares() == [8]
    [worker], given = office.workers, {"m": 8, "n": 0}
    running = dict(given)
    for _ in range(5):
        for name, rows in running.items():
            if rows:
                office.finish(worker, rows, name)
        lots = office.assign()[worker]
        running = {name: sum(lot.rows for lot in lots if lot.model.key[0] == name) for name in given}
        assert sum(running.values()) == 8, "a place is left"
        given = {name: rows + running[name] for name, rows in given.items()}
        assert abs(given["m"] - given["n"]) <= 4, "one is further ahead than by a batch"


def test_a_model_that_went_is_not_looked_at() -> None:
    office = Office()
    office.ask(20)
    office.assign()
    office.ask(1)
    [worker], queue = office.workers, office.queue
    queue.dismiss(worker, 0.0)
    worker.set_models([])
    office.assigner.enlist(worker, {})
    office.assigner.model_went(queue)
    office.finish(worker, 8)
    del office.queues["m"]
    assert office.assign() == {}


def test_a_worker_that_went_is_given_nothing() -> None:
    office = Office(workers=2)
    gone = office.workers.pop(0)
    office.queue.dismiss(gone, 0.0)
    office.assigner.room_came(gone)
    office.assigner.worker_went(gone)
    office.ask(20)
    assert set(office.assign()) == {office.workers[0]}


def test_a_worker_that_joins_gets_what_waits() -> None:
    office = Office()
    office.ask(20)
    office.assign()
    late = make_worker(9, hears=[office.caller])
    office.workers.append(late)
    office.enlist(late)
    assert office.shares() == [0, 8]
