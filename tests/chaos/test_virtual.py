"""The schedules of bench/chaos.py against the cores alone, in virtual time: a day of faults in some seconds."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper

from bench import chaos
from penstock.worker.config import ModelConfig
from penstock.worker.model import Model, load
from tests.cores.world import LARGE, SMALL, CallerLife, Process, WorkerLife, World

# As many schedules as there is time for: PENSTOCK_CHAOS_SEEDS=5000 bin/test tests/chaos/test_virtual.py
SEEDS = int(os.environ.get("PENSTOCK_CHAOS_SEEDS", "12"))
SECONDS = 12.0
STEP_S = 0.02
WORKERS, CALLERS = 2, 2
BACK_S = {"broker": 0.4, "worker": 1.0, "gateway": 0.3}  # until a process that has died is there again
PATIENT_S, HURRIED_S = 60.0, 0.05


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """y = x + x, rows of any length."""
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", "M"]) for name in "xy")
    graph = helper.make_graph([helper.make_node("Add", ["x", "x"], ["y"])], "double", [x], [y])
    path: Path = tmp_path_factory.mktemp("model") / "model.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)
    return load(path, "double", "1", ModelConfig(max_batch_size=4))


class Play:
    """A server, its callers, and a schedule that happens to them. ``hurried``: requests of a flood, which may end as
    they like."""

    def __init__(self, model: Model, seed: int) -> None:
        self.chance = random.Random(seed)
        self.world = World(model)
        self.model = model
        self.asked = 0
        self.hurried: set[float] = set()
        self.later: list[tuple[float, str, Process | None]] = []  # when, what, to whom
        at = self.world.now + 1.0
        for fault in chaos.schedule(seed, SECONDS, 1.0, ("gateway", "worker", "broker")):
            at += fault.after_s
            self.later.append((at, f"{fault.deed} {fault.role} {fault.for_s} {fault.which}", None))
            at += fault.for_s
        self.end = at + 1.0
        self.world.start_broker()
        for _ in range(WORKERS):
            self.world.start_worker()
        for _ in range(CALLERS):
            self.world.start_caller()

    def run(self) -> None:
        while self.world.now < self.end:
            self.step()
        for process in self.world.processes:
            process.stopped = False
        while self.later:
            self.step()
        for _ in range(int(PATIENT_S)):
            if all(request.ends for caller in self.callers for request in caller.requests):
                break
            self.world.pass_time(1.0)
            self.world.settle()

    @property
    def callers(self) -> list[CallerLife]:
        return self.world.of(CallerLife)

    def step(self) -> None:
        world, chance = self.world, self.chance
        due = [each for each in self.later if each[0] <= world.now]
        self.later = [each for each in self.later if each[0] > world.now]
        for _, what, whom in due:
            self.do(what, whom)
        for caller in self.callers:
            if not caller.stopped and world.now < self.end and chance.random() < 0.3:
                self.ask(caller, PATIENT_S)
            if chance.random() < 0.3:
                caller.let_go(chance.randrange(8))
        for _ in range(12):
            process = chance.choice(world.processes) if world.processes else None
            heard = process is not None and process.deliver(chance.randrange(8))
            if heard and world.broker is not None and not world.broker.stopped:
                world.broker.tick()
        for worker in world.of(WorkerLife):
            if chance.random() < 0.7:
                worker.compute()
        world.pass_time(STEP_S)
        world.check()

    def ask(self, caller: CallerLife, timeout_s: float) -> None:
        self.asked += 1
        caller.ask(self.model, float(self.asked), LARGE if self.asked % 5 == 0 else SMALL, timeout_s)

    def do(self, what: str, whom: Process | None) -> None:
        world = self.world
        deed, role, *rest = what.split(" ")
        if deed == "continue":
            assert whom is not None
            whom.stopped = False
        elif deed == "start":
            start: dict[str, Callable[[], object]] = {
                "broker": world.start_broker,
                "worker": world.start_worker,
                "gateway": world.start_caller,
            }
            start[role]()
        elif deed == "flood":
            if self.callers:
                caller = self.chance.choice(self.callers)
                for _ in range(20):
                    self.ask(caller, HURRIED_S)
                    self.hurried.add(float(self.asked))
        else:
            kinds = {"worker": WorkerLife, "gateway": CallerLife}
            there: list[Process] = world.of(kinds[role]) if role in kinds else [world.broker] if world.broker else []
            if there:
                self.hit(deed, role, there[int(rest[1]) % len(there)], float(rest[0]))

    def hit(self, deed: str, role: str, process: Process, for_s: float) -> None:
        if deed == "stop":
            process.stopped = True
            self.later.append((self.world.now + for_s, "continue ", process))
            return
        if role == "broker":
            self.world.kill_broker(self.chance.random() < 0.5)
        else:
            assert isinstance(process, (CallerLife, WorkerLife))
            self.world.kill(process)
        self.later.append((self.world.now + BACK_S[role], f"start {role}", None))


@pytest.fixture
def play(request: pytest.FixtureRequest, model: Model) -> Iterator[Play]:
    play = Play(model, request.param)
    yield play
    play.world.close()


@pytest.mark.parametrize("play", range(SEEDS), indirect=True, ids=lambda seed: f"seed {seed}")
def test_every_request_has_its_answer_once(play: Play) -> None:
    play.run()
    asked = [request for caller in play.callers for request in caller.requests]
    ends = {request.value: request.ends for request in asked if request.value not in play.hurried}
    assert len(ends) > 20
    assert {value: how for value, how in ends.items() if how != ["result"]} == {}
    hurried = [request.ends for request in asked if request.value in play.hurried]
    assert all(how in (["result"], ["deadline"], ["overloaded"]) for how in hurried), hurried
    broker = play.world.broker
    assert broker is not None
    held = [lot for each in broker.core.callers.values() for lot in each.requests.values()]
    assert {lot.state for lot in held} <= {"DONE"}, "something is under way for ever"
