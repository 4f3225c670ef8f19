"""What can happen to requests and results in shared memory between processes that live, stop and die."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from random import Random
from typing import Any

import onnx
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test
from onnx import TensorProto, helper

from penstock.worker.config import ModelConfig
from penstock.worker.model import Model, load
from tests.cores.world import LARGE, MIDDLE, SMALL, CallerLife, Peer, WorkerLife, World

SILENCE_S = 7  # after which a process that says nothing is taken for gone


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """y = x + x, rows of any length."""
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", "M"]) for name in "xy")
    graph = helper.make_graph([helper.make_node("Add", ["x", "x"], ["y"])], "double", [x], [y])
    path: Path = tmp_path_factory.mktemp("model") / "model.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)
    return load(path, "double", "1", ModelConfig(max_batch_size=4))


@pytest.fixture
def world(model: Model) -> Iterator[World]:
    """A broker, a worker and a caller that know each other."""
    world = World(model)
    world.start_broker()
    world.start_worker()
    world.start_caller()
    world.pass_time(0.3)
    world.settle()
    yield world
    world.close()


def caller_of(world: World) -> CallerLife:
    [caller] = world.of(CallerLife)
    assert isinstance(caller, CallerLife)
    return caller


def worker_of(world: World) -> WorkerLife:
    [worker] = world.of(WorkerLife)
    assert isinstance(worker, WorkerLife)
    return worker


def deliver_to(process: Any) -> None:
    """Everything that is on its way there."""
    while process.deliver(0):
        process.world.broker.tick()


def used(*peers: CallerLife | WorkerLife) -> list[int]:
    return [peer.slots.arena.allocator.used for peer in peers]


def live(world: World, seconds: int) -> None:
    """Let time pass in which whoever is not stopped does what there is to do."""
    for _ in range(seconds):
        world.pass_time(1.0)
        world.settle()


def run_batch(world: World, value: float = 1.0) -> None:
    """The caller asks, and the worker has computed: what it says of it is on its way."""
    caller_of(world).ask(world.model, value, LARGE, 60.0)
    deliver_to(world.broker)
    deliver_to(worker_of(world))
    assert worker_of(world).compute()


def test_a_request_from_its_slot_to_its_end(world: World) -> None:
    caller, worker = caller_of(world), worker_of(world)
    run_batch(world)
    assert 0 not in used(caller, worker)
    world.settle()
    assert caller.requests[0].ends == ["result"]
    assert used(caller, worker) == [0, 2432]
    caller.let_go(0)
    world.settle()
    assert used(caller, worker) == [0, 0]
    assert world.broker is not None
    assert world.broker.core.ledger.requests == 0


def test_a_request_that_is_cancelled_while_it_runs(world: World) -> None:
    """Its slot is free at once, and written anew while the model may still read it; nobody hears what that gives."""
    caller, worker = caller_of(world), worker_of(world)
    caller.ask(world.model, 1.0, LARGE, 60.0)
    deliver_to(world.broker)
    deliver_to(worker)
    assert len(worker.batches) == 1
    caller.cancel(0)
    assert used(caller) == [0]
    caller.ask(world.model, 2.0, LARGE, 60.0)  # where the other lay
    worker.compute()
    world.settle()
    assert [request.ends for request in caller.requests] == [["cancelled"], ["result"]]
    caller.let_go(0)
    world.settle()
    assert used(caller, worker) == [0, 0]


@pytest.mark.parametrize("when", ["before", "queued", "assigned", "computed"])
def test_memory_that_is_found_later_is_used_and_nothing_is_lost(model: Model, when: str) -> None:
    """Whatever is under way meanwhile. ``when``: what has become of a request by then."""
    world = World(model)
    world.start_broker()
    worker, caller = world.start_worker(late=True), world.start_caller(late=True)
    world.pass_time(0.3)
    world.settle()
    assert not any(each.caller.shares for each in world.of(CallerLife))
    if when != "before":
        caller.ask(model, 1.0, LARGE, 60.0)
    if when in ("assigned", "computed"):
        deliver_to(world.broker)
        deliver_to(worker)
    if when == "computed":
        assert worker.compute()
    caller.find_arena()
    worker.find_arena()
    caller.ask(model, 2.0, LARGE, 60.0)
    world.settle()
    assert caller.caller.shares
    caller.ask(model, 3.0, LARGE, 60.0)
    assert used(caller) != [0]
    world.settle()
    assert [request.ends for request in caller.requests] == [["result"]] * len(caller.requests)
    assert used(worker) != [0], "it is read there"
    while caller.reading:
        caller.let_go(0)
    world.settle()
    assert used(caller, worker) == [0, 0]
    assert world.broker is not None
    assert (world.broker.core.ledger.requests, len(world.broker.core.workers)) == (0, 1)
    world.close()


@pytest.mark.parametrize("heard", ["", "done", "result", "both"])
def test_a_worker_that_dies_before_or_after_done(world: World, heard: str) -> None:
    """``heard``: what has been read of what it said before it died. What the caller has it keeps, and keeps reading."""
    caller, first = caller_of(world), worker_of(world)
    run_batch(world)
    if heard in ("done", "both"):
        deliver_to(world.broker)
    if heard in ("result", "both"):
        deliver_to(caller)
    else:
        caller.inbox.pop(first.name)
    world.kill(first)
    second = world.start_worker()
    world.settle()
    assert [request.ends for request in caller.requests] == [["result"]]
    caller.let_go(0)
    world.settle()
    assert used(caller, second) == [0, 0]


def test_a_worker_that_was_stopped_and_is_continued_after_its_request_was_finished_elsewhere(world: World) -> None:
    caller, stopped = caller_of(world), worker_of(world)
    caller.ask(world.model, 1.0, LARGE, 60.0)
    deliver_to(world.broker)
    deliver_to(stopped)
    stopped.stopped = True
    other = world.start_worker()
    live(world, SILENCE_S)
    assert [request.ends for request in caller.requests] == [["result"]]
    caller.let_go(0)
    world.settle()
    caller.ask(world.model, 5.0, LARGE, 60.0)  # where the other lay, which the stopped one is about to read
    stopped.stopped = False
    stopped.compute()
    live(world, 3)
    while caller.reading:
        caller.let_go(0)
    world.settle()
    assert [request.ends for request in caller.requests] == [["result"], ["result"]]
    assert used(caller, stopped, other) == [0, 0, 0]


def test_a_worker_that_was_stopped_with_a_result_that_is_being_read(world: World) -> None:
    """It is taken for lost, and its request runs elsewhere. When it is back it keeps what the caller reads."""
    caller, stopped = caller_of(world), worker_of(world)
    run_batch(world)
    deliver_to(world.broker)
    deliver_to(caller)
    stopped.stopped = True
    other = world.start_worker()
    live(world, SILENCE_S)
    stopped.stopped = False
    live(world, 3)
    for number in range(20):
        caller.ask(world.model, float(number), LARGE, 60.0)
        world.settle()
        caller.let_go(1)
    world.settle()
    caller.check()
    assert 0 not in used(stopped)
    caller.let_go(0)
    world.settle()
    assert used(caller, stopped, other) == [0, 0, 0]


def test_a_caller_that_never_acknowledges_fills_what_it_may_and_no_more(world: World) -> None:
    greedy, worker = caller_of(world), worker_of(world)
    modest = world.start_caller()
    world.settle()
    for number in range(40):
        greedy.ask(world.model, float(number), SMALL if number % 2 else LARGE, 600.0)
        world.settle()
    assert used(worker)[0] < 45_000
    assert any(not request.ends for request in greedy.requests), "it gets nothing more"
    for number in range(5):
        modest.ask(world.model, float(number), LARGE, 60.0)
        world.settle()
        modest.let_go(0)
    assert [request.ends for request in modest.requests] == [["result"]] * 5
    while greedy.reading or any(not request.ends for request in greedy.requests):
        greedy.let_go(0)
        world.settle()
    world.settle()
    assert used(greedy, modest, worker) == [0, 0, 0]


@pytest.mark.parametrize("heard", [False, True])
@pytest.mark.parametrize("released", ["before", "between", "after"])
def test_a_broker_that_restarts_between_done_and_acknowledgment(world: World, heard: bool, released: str) -> None:
    """``released``: before the old one died, which did not hear it; before the new one was there; or after that."""
    caller, worker = caller_of(world), worker_of(world)
    run_batch(world)
    if heard:
        deliver_to(caller)
    assert world.broker is not None
    deliver_to(world.broker)
    if released == "before":
        caller.let_go(0)
    world.kill_broker(read=False)
    deliver_to_all(world)
    if released == "between":
        caller.let_go(0)
    world.start_broker()
    world.pass_time(0.3)
    world.settle()
    caller.ask(world.model, 7.0, LARGE, 60.0)
    world.settle()
    world.check()
    while caller.reading:
        caller.let_go(0)
    world.settle()
    assert [request.ends for request in caller.requests] == [["result"], ["result"]]
    assert used(caller, worker) == [0, 0]


def step(world: World) -> bool:
    """One thing that one of the processes does, or time for them. False: there is nothing more to do."""
    for process in world.processes:
        if process.deliver(0):
            return True
    if any(worker.compute() for worker in world.of(WorkerLife)):
        return True
    world.pass_time(0.01)
    return any(not request.ends for request in caller_of(world).requests)


@pytest.mark.parametrize("read", [False, True])
@pytest.mark.parametrize("others_die", [False, True])
def test_a_broker_that_dies_at_any_moment_takes_nothing_with_it(model: Model, read: bool, others_die: bool) -> None:
    """``read``: what it had said last is read all the same. ``others_die``: one of two workers dies with it, so that
    what it had must run elsewhere."""
    for moment in count():
        world = World(model)
        world.start_broker()
        workers = [world.start_worker(), world.start_worker()]
        caller = world.start_caller()
        world.pass_time(0.3)
        world.settle()
        for number in range(12):
            caller.ask(model, float(number), SMALL if number % 3 else LARGE, 60.0)
        ended_before = not all(step(world) for _ in range(moment))
        world.kill_broker(read)
        if others_die:
            world.kill(workers.pop())
        for _ in range(moment % 7):
            step(world)
        world.start_broker()
        for _ in range(10):
            world.settle()
            while caller.reading:
                caller.let_go(0)
            world.pass_time(0.2)
        assert [request.ends for request in caller.requests] == [["result"]] * 12, f"killed after {moment} steps"
        assert set(used(caller, *workers)) == {0}
        assert world.broker is not None
        assert world.broker.core.ledger.requests == 0
        world.close()
        if ended_before:
            break
    assert moment > 20


def test_what_runs_when_the_broker_dies_is_not_run_again_by_the_same_worker(world: World) -> None:
    caller, worker = caller_of(world), worker_of(world)
    for number in range(3):
        caller.ask(world.model, float(number), LARGE, 60.0)
    deliver_to(world.broker)
    deliver_to(worker)
    assert [run.batch.rows for run in worker.batches] == [1]  # and two requests wait
    world.kill_broker(read=True)
    world.start_broker()
    for _ in range(3):
        world.pass_time(0.15)
        deliver_to_all(world)
    assert world.broker is not None
    assert world.broker.core.ledger.requests == 3, "they were sent again, and the worker has them"
    world.settle()
    assert [request.ends for request in caller.requests] == [["result"]] * 3
    assert worker.core.meters.value("penstock_batches", "double", "1", "idle").value == 2


def test_a_caller_that_was_stopped_is_served_by_the_broker_that_had_forgotten_it(world: World) -> None:
    """The ids that it sends again are those that a worker runs."""
    caller, worker = caller_of(world), worker_of(world)
    for number in range(6):
        caller.ask(world.model, float(number), LARGE, 60.0)
    deliver_to(world.broker)
    deliver_to(worker)
    caller.stopped = True
    for _ in range(SILENCE_S):
        world.pass_time(1.0)
        deliver_to_all(world)
    assert world.broker is not None
    assert caller.id not in world.broker.core.callers
    caller.stopped = False
    deliver_to_all(world)
    world.pass_time(0.2)
    live(world, 3)
    assert [request.ends for request in caller.requests] == [["result"]] * 6
    while caller.reading:
        caller.let_go(0)
    world.settle()
    assert used(caller, worker) == [0, 0]


def deliver_to_all(world: World) -> None:
    for process in world.processes:
        while process.deliver(0):
            pass


def test_a_subscription_that_reconnects(world: World) -> None:
    """What was published into the gap comes again; what is being read stays where it is."""
    caller, worker = caller_of(world), worker_of(world)
    run_batch(world, 1.0)
    world.settle()
    run_batch(world, 2.0)
    caller.inbox.pop(worker.name)  # lost with the connection
    [endpoint] = caller.heard
    caller._hear_worker(endpoint, False)
    caller._hear_worker(endpoint, True)
    world.settle()
    assert [request.ends for request in caller.requests] == [["result"], ["result"]]
    world.check()
    while caller.reading:
        caller.let_go(0)
    world.settle()
    assert used(caller, worker) == [0, 0]


def test_a_caller_that_dies_leaves_nothing(world: World) -> None:
    worker = worker_of(world)
    run_batch(world, 1.0)
    world.settle()
    run_batch(world, 2.0)
    world.kill(caller_of(world))
    world.settle()
    assert used(worker) == [0]
    assert world.broker is not None
    assert world.broker.core.ledger.requests == 0


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_poison_fails_and_its_neighbours_are_answered(world: World, workers: int) -> None:
    caller = caller_of(world)
    for _ in range(workers - 1):
        world.start_worker()
    world.settle()
    for number in range(24):
        caller.ask(world.model, float(number), LARGE if number % 3 == 0 else SMALL, 60.0)
    bad = caller.requests[5], caller.requests[18]
    caller.poison(*bad)
    world.settle(2000)
    caller.check()
    for request in caller.requests:
        assert request.ends == (["poisoned"] if request in bad else ["result"])
    while caller.reading:
        caller.let_go(0)
    world.settle()
    assert set(used(caller, *world.of(WorkerLife))) == {0}
    assert world.broker is not None
    assert world.broker.core.ledger.requests == 0


@pytest.mark.parametrize("workers", [1, 2])
def test_what_never_ends_fails_and_its_neighbours_are_answered(world: World, workers: int) -> None:
    caller = caller_of(world)
    for _ in range(workers - 1):
        world.start_worker()
    world.settle()
    for number in range(12):
        caller.ask(world.model, float(number), LARGE if number % 3 == 0 else SMALL, 600.0)
    bad = caller.requests[2]
    world.endless.add((caller.id, bad.number))
    live(world, 4 * 32)
    for request in caller.requests:
        assert request.ends == (["poisoned"] if request is bad else ["result"])
    while caller.reading:
        caller.let_go(0)
    world.settle()
    assert set(used(caller, *world.of(WorkerLife))) == {0}


@pytest.mark.parametrize("seed", range(3))
def test_a_hundred_kills_convict_nobody(world: World, seed: int) -> None:
    caller, random = caller_of(world), Random(seed)
    world.start_worker()
    for number in range(100):
        for _ in range(8):
            caller.ask(world.model, float(number), SMALL, 60.0)
        world.settle(random.randrange(40))
        world.kill(random.choice(world.of(WorkerLife)))
        world.start_worker()
    world.settle(2000)
    assert Counter(end for request in caller.requests for end in request.ends) == {"result": 800}


class Interleavings(RuleBasedStateMachine):
    """Anything, in any order."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.world = World(model)
        self.value = 0.0

    @initialize(settled=st.booleans(), late=st.tuples(*[st.booleans()] * 4))
    def begin(self, settled: bool, late: tuple[bool, ...]) -> None:
        self.world.start_broker()
        for at in range(2):
            self.world.start_worker(late[at])
            self.world.start_caller(late[2 + at])
        self.world.pass_time(0.3)
        if settled:
            self.world.settle()

    def pick(self, kind: type[Any], at: int) -> Any:
        found = self.world.of(kind)
        return found[at % len(found)] if found else None

    @rule(at=st.integers(0, 9))
    def find_arena(self, at: int) -> None:
        peer = self.pick(Peer, at)
        if peer is not None:
            peer.find_arena()

    @rule(at=st.integers(0, 3), width=st.sampled_from([LARGE, MIDDLE, SMALL]), count=st.integers(1, 4))
    def ask(self, at: int, width: int, count: int) -> None:
        caller = self.pick(CallerLife, at)
        for _ in range(count if caller else 0):
            self.value += 1
            caller.ask(self.world.model, self.value, width, 60.0)

    @rule(at=st.integers(0, 9), pick=st.integers(0, 9), count=st.integers(1, 8))
    def deliver(self, at: int, pick: int, count: int) -> None:
        processes = self.world.processes
        if processes:
            for _ in range(count):
                processes[at % len(processes)].deliver(pick)

    @rule(rounds=st.integers(1, 4))
    def settle(self, rounds: int) -> None:
        self.world.settle(rounds)

    @rule(at=st.integers(0, 3))
    def compute(self, at: int) -> None:
        worker = self.pick(WorkerLife, at)
        if worker is not None:
            worker.compute()

    @rule(at=st.integers(0, 3), pick=st.integers(0, 9), count=st.integers(1, 4))
    def let_go(self, at: int, pick: int, count: int) -> None:
        caller = self.pick(CallerLife, at)
        for _ in range(count if caller else 0):
            caller.let_go(pick)

    @rule(at=st.integers(0, 3), pick=st.integers(0, 9))
    def cancel(self, at: int, pick: int) -> None:
        caller = self.pick(CallerLife, at)
        if caller is not None:
            caller.cancel(pick)

    @rule(at=st.integers(0, 3), pick=st.integers(0, 9))
    def poison(self, at: int, pick: int) -> None:
        """A request that has not ended is one that kills."""
        caller = self.pick(CallerLife, at)
        left = [request for request in caller.requests if not request.ends] if caller is not None else []
        if left:
            caller.poison(left[pick % len(left)])

    @rule()
    def be_missed(self) -> None:
        """Long enough for those that are stopped and have work to be missed."""
        for _ in range(10):
            self.world.pass_time(0.1)
            self.world.settle(2)

    @rule(seconds=st.sampled_from([0.0, 0.005, 0.3, 1.0]))
    def pass_time(self, seconds: float) -> None:
        self.world.pass_time(seconds)

    @rule(at=st.integers(0, 9), stop=st.booleans())
    def stop_or_continue(self, at: int, stop: bool) -> None:
        processes = self.world.processes
        if processes:
            processes[at % len(processes)].stopped = stop

    @rule()
    def fall_silent(self) -> None:
        """Long enough for those that are stopped to be missed."""
        live(self.world, SILENCE_S)

    @rule(what=st.sampled_from(["caller", "worker", "worker", "broker"]), at=st.integers(0, 3), read=st.booleans())
    def kill(self, what: str, at: int, read: bool) -> None:
        if what == "broker":
            self.world.kill_broker(read)
            return
        peer = self.pick(CallerLife if what == "caller" else WorkerLife, at)
        if peer is not None:
            self.world.kill(peer)

    @rule(what=st.sampled_from(["caller", "worker", "broker"]))
    def start(self, what: str) -> None:
        if what == "broker" and self.world.broker is None:
            self.world.start_broker()
        elif what == "caller" and len(self.world.of(CallerLife)) < 3:
            self.world.start_caller()
        elif what == "worker" and len(self.world.of(WorkerLife)) < 3:
            self.world.start_worker()

    @invariant()
    def nobody_is_disturbed(self) -> None:
        self.world.check()

    def teardown(self) -> None:
        """All go on, and everything comes to its end."""
        world = self.world
        for process in world.processes:
            process.stopped = False
        if world.broker is None:
            world.start_broker()
        if not world.of(WorkerLife):
            world.start_worker()
        callers = world.of(CallerLife)
        for _ in range(100):
            world.settle(50)
            world.check()
            for caller in callers:
                while caller.reading:
                    caller.let_go(0)
            ended = all(request.ends for caller in callers for request in caller.requests)
            free = not any(used(*world.of(CallerLife), *world.of(WorkerLife)))
            if ended and free and world.broker is not None and not world.broker.core.ledger.requests:
                break
            world.pass_time(0.5)
        assert [request for caller in callers for request in caller.requests if not request.ends] == []
        assert set(used(*world.of(CallerLife), *world.of(WorkerLife))) <= {0}, "a slot is lost"
        assert world.broker is not None
        assert world.broker.core.ledger.requests == 0, "the broker holds something for ever"
        world.check()
        world.close()


def test_whatever_happens_every_request_ends_once_and_nobody_writes_where_another_reads(model: Model) -> None:
    machine: Any = lambda: Interleavings(model)  # noqa: E731
    settings_ = settings(
        max_examples=80, stateful_step_count=60, deadline=None, suppress_health_check=[HealthCheck.too_slow]
    )
    run_state_machine_as_test(machine, settings=settings_)
