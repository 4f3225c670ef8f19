"""Workers that serve the same models: who is least busy, and whose turn it is there."""

from __future__ import annotations

from penstock.broker.assign import Assigner
from penstock.broker.peers import WorkerPeer
from penstock.broker.pools import Pool
from penstock.broker.queues import ModelQueue
from penstock.wire.messages import Cost
from tests.broker.conversation import model
from tests.broker.parts import KEY, make_queue, make_worker

N = ("n", "1")


def joined(pool: Pool, *workers: WorkerPeer) -> Pool:
    for worker in workers:
        worker.pool = pool
        pool.join(worker)
    return pool


def give(pool: Pool, worker: WorkerPeer, rows: int, key: tuple[str, str] = KEY) -> None:
    worker.add(key, rows, 1000 * rows, 0.0)
    pool.assigned_us += 1000 * rows
    pool.place(worker)
    pool.validate()


def order(pool: Pool) -> list[str]:
    """The models that wait, as their turns come."""
    turns = []
    while (turn := pool.next()) is not None:
        turns.append(turn)
    for turn in turns:
        pool.put_back(turn)
    return [turn[2].key[0] for turn in turns]


def test_the_least_busy_is_asked_first_and_of_equals_who_has_been_so_for_longest() -> None:
    queue = make_queue()
    a, b, c = workers = [make_worker(number, instances=2) for number in range(3)]
    pool = joined(Pool([queue]), *workers)
    assert list(pool.candidates(queue)) == [a, b, c]
    assert pool.idle == 3
    give(pool, a, 4)
    give(pool, b, 1)
    assert list(pool.candidates(queue)) == [c, a, b]
    assert pool.idle == 1
    give(pool, b, 7)
    assert list(pool.candidates(queue)) == [c, a, b]
    give(pool, a, 8)
    assert list(pool.candidates(queue)) == [c, b], "a is full"
    give(pool, b, 2)
    assert list(pool.candidates(queue)) == [c, b], "b has a batch that is not full"
    give(pool, b, 2)
    assert list(pool.candidates(queue)) == [c]


def test_only_models_whose_batch_is_open_find_a_worker_that_takes_no_other() -> None:
    m, n = make_queue(name="m"), make_queue(name="n")
    worker = make_worker(models=[model("m"), model("n")])
    pool = joined(Pool([m, n]), worker)
    give(pool, worker, 5)
    assert list(pool.candidates(m)) == [worker]
    assert list(pool.candidates(n)) == []


def test_who_leaves_is_not_found_any_more() -> None:
    queue = make_queue()
    one, other = make_worker(0), make_worker(1)
    pool = joined(Pool([queue]), one, other)
    give(pool, one, 5)
    pool.leave(one)
    one.pool = None
    pool.validate()
    assert list(pool.candidates(queue)) == [other]
    assert (pool.servers, pool.assigned_us) == (1, 0)


def test_the_model_that_is_furthest_behind_is_next() -> None:
    m, n = make_queue(name="m"), make_queue(name="n")
    pool = joined(Pool([m, n]), make_worker(models=[model("m"), model("n")]))
    pool.charge(m, 5000)
    pool.wait(m)
    pool.wait(n)
    assert order(pool) == ["n", "m"]
    turn = pool.next()
    assert turn is not None
    pool.charge(n, 9000)
    pool.wait(n)
    assert order(pool) == ["m", "n"]
    pool.settle(m)
    assert order(pool) == ["n"]


def test_a_model_that_is_put_back_keeps_its_turn() -> None:
    m, n = make_queue(name="m"), make_queue(name="n")
    pool = joined(Pool([m, n]), make_worker(models=[model("m"), model("n")]))
    pool.wait(m)
    pool.wait(n)
    for _ in range(3):
        turn = pool.next()
        assert turn is not None
        assert turn[2] is m
        pool.put_back(turn)


def test_a_weight_makes_time_count_for_less() -> None:
    m, n = make_queue(name="m"), make_queue(name="n")
    m.weight = 4.0
    pool = joined(Pool([m, n]), make_worker(models=[model("m"), model("n")]))
    given = {"m": 0, "n": 0}
    pool.wait(m)
    pool.wait(n)
    for _ in range(50):
        turn = pool.next()
        assert turn is not None
        given[turn[2].key[0]] += 1
        pool.charge(turn[2], 1000)
        pool.wait(turn[2])
    assert given == {"m": 40, "n": 10}


def test_turns_that_were_settled_do_not_pile_up() -> None:
    queue = make_queue()
    pool = joined(Pool([queue]), make_worker())
    for _ in range(1000):
        pool.wait(queue)
        pool.settle(queue)
    assert len(pool._turns) < 200


def test_workers_are_together_that_serve_the_same() -> None:
    assigner = Assigner()
    m, n = make_queue(name="m"), make_queue(name="n")
    models = {KEY: m, N: n}
    both = [make_worker(number, [model("m"), model("n")]) for number in range(2)]
    only = make_worker(2, [model("m")])
    for worker in [*both, only]:
        for queue in models.values():
            if worker.serves(queue.key):
                queue.enlist(worker)
        assigner.enlist(worker, models)
    assigner.assign()
    assert [pool.workers for pool in m.pools] == [set(both), {only}]
    assert [pool.workers for pool in n.pools] == [set(both)]
    only.set_models([])
    m.dismiss(only, 0.0)
    assigner.enlist(only, models)
    assert [pool.workers for pool in m.pools] == [set(both)]
    assert only.pool is None
    assigner.validate(models.values(), both)


def queue_of(worker: WorkerPeer, *costs: Cost) -> ModelQueue:
    queue = make_queue()
    worker.learn(costs)
    queue.enlist(worker)
    return queue


def test_a_models_own_instances_leave_a_worker_room_for_others() -> None:
    worker = make_worker(models=[model("m", batch=4), model("n", batch=4)], instances=4)
    queue_of(worker, Cost("m", "1", 1, 4, 1000, (4,), (1000,)))
    assert (worker.room(KEY), worker.room(N)) == (8, 20)
    worker.add(KEY, 8, 0, 0.0)
    assert (worker.room(KEY), worker.room(N)) == (0, 12)


def test_a_worker_that_picks_smaller_batches_is_given_smaller_ones() -> None:
    worker = make_worker(models=[model("m", batch=32)])
    assert worker.room(KEY) == 64
    queue_of(worker, Cost("m", "1", 1, 8, 1000, (8,), (1000,)))
    assert worker.room(KEY) == 16
