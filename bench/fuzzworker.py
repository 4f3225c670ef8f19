"""What ``fuzz.py`` says to the worker's core, which runs real models."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from random import Random
from typing import Any, ClassVar

from bench.fuzzexamples import ARENA_BYTES, CALLERS, EPOCH, Examples, model_contents
from bench.fuzzmutate import malformed
from bench.fuzztarget import CoreTarget, census, hear
from penstock.wire.arena import Arena
from penstock.wire.arena import Mapping as ArenaMapping
from penstock.wire.codec import (
    pack,
    unpack,
)
from penstock.wire.errors import BadMessage
from penstock.wire.events import ArenaCame, BrokerFound, BrokerLost, FromBroker, Garbage, Say, Tick
from penstock.wire.messages import (
    FROM_WORKER,
    ON_PUBLICATION,
    TO_WORKER,
    Assign,
    Beat,
    Bye,
    Carrier,
    Expect,
    Expected,
    Forgotten,
    Freed,
    HelloWanted,
    Message,
    Welcome,
)
from penstock.wire.models import READY, ModelState
from penstock.wire.slots import Slots
from penstock.worker.config import ModelConfig
from penstock.worker.core import Core as WorkerCore
from penstock.worker.events import Loaded, Publish, Run, Subscribed, Unsubscribed
from penstock.worker.execute import execute
from penstock.worker.model import Model, load
from penstock.worker.serving import Identity as WorkerIdentity


def _load_models() -> list[Model]:
    with tempfile.TemporaryDirectory() as name:
        models = []
        for model, content in model_contents().items():
            path = Path(name, f"{model}.onnx")
            path.write_bytes(content)
            delay = "1ms" if model == "double" else "0ms"
            models.append(load(path, model, "1", ModelConfig(max_batch_size=8, max_queue_delay=delay)))
        return models


class Worker(CoreTarget):
    """The worker's core with real models, fed by a broker that mostly talks nonsense, and by subscriptions."""

    name = "worker"
    share = 0.05
    _models: ClassVar[list[Model]] = []

    def begin(self, random: Random) -> None:
        super().begin(random)
        self._examples = Examples(random)
        if not self._models:
            self._models.extend(_load_models())
        self._now = 1.0
        self.slots = Slots(Arena(ARENA_BYTES, "fuzz"))
        self.core = WorkerCore(WorkerIdentity(b"a worker", "w", "cpu", 1, ("ipc:///run/w",), 2, True), [])
        self._batches: list[Run] = []
        self._published: list[Publish] = []
        self._subscribed: dict[bytes, int] = {}
        self._last_id = 0
        self._serial = 0
        self._count = 0
        for model in self._models:
            spec = model.spec
            self._handle(Loaded(ModelState(spec.name, spec.version, READY, "", spec), model))

    def make(self, random: Random) -> Any:
        for _ in range(random.choice((0, 1, 2))):
            self._handle(self._event(random))
        if random.random() < 0.1:
            return self._event(random, wrong=True)
        return malformed(random, self._valid(random), self._valid(random), 0.85)

    def feed(self, each: Any) -> bool:
        understood = False
        if isinstance(each, tuple):
            message = hear(each[0], each[1], TO_WORKER)
            understood = not isinstance(message, BadMessage)
            self._handle(Garbage("broker", "nonsense") if isinstance(message, BadMessage) else FromBroker(message))
        else:
            self._handle(each)
        self._count += 1
        self._now += (0.0, 0.0001, 0.01, 0.2)[self._count % 4]
        self._handle(Tick())
        if len(self._batches) > self._count % 2:
            self._finish()
        if self._count % 20 == 0:
            self.core.validate()
        return understood

    def _finish(self) -> None:
        run = self._batches.pop(0)
        executed = execute(run.model, run.batch, self.slots)
        executed.compute_s = 0.001  # what it took is another each time
        self._handle(executed)

    def _event(self, random: Random, wrong: bool = False) -> Any:
        """``wrong``: at a time when it does not happen."""
        caller = random.randbytes(8) if wrong else random.choice(CALLERS)
        kind = random.random()
        if kind < 0.15 and self.core.may_subscribe(caller):
            self._subscribed[caller] = self._subscribed.get(caller, 0) + 1
            return Subscribed(caller)
        if kind < 0.2 and (wrong or self._subscribed.get(caller)):
            self._subscribed[caller] = max(0, self._subscribed.get(caller, 0) - 1)
            return Unsubscribed(caller)
        if kind < 0.3:
            self._serial += 1
            return ArenaCame(caller, self._serial, ArenaMapping(os.dup(self.slots.arena.fd)))
        if kind < 0.32:
            return random.choice((BrokerFound(), BrokerLost("it went")))
        message = self._valid(random)
        frames = message.frames if isinstance(message, Carrier) else ()
        return FromBroker(unpack(pack(message), frames, TO_WORKER))

    def _valid(self, random: Random) -> Message:
        examples, caller, core = self._examples, random.choice(CALLERS), self.core
        kind = random.choice((Expect, Expect, Assign, Assign, Assign, Assign, Beat, Bye, HelloWanted))
        if not core.membership.joined or random.random() < 0.02:
            return Welcome(random.choice((EPOCH, EPOCH, EPOCH + 1)), "w", True, self._serial)
        message: Message
        if kind is Expect:
            self._serial += 1
            expected = Expected(caller, self._serial, random.random() < 0.5, random.random() < 0.5)
            gone = [Forgotten(random.choice(CALLERS), self._serial - 1)] if random.random() < 0.2 else []
            message = Expect(EPOCH, [expected], gone)
        elif kind is Assign:
            self._last_id += 10
            shares = caller in core._arenas and random.random() < 0.5
            groups = [examples.tasks(self._last_id - 10, caller, shares), examples.tasks(self._last_id - 5, caller)]
            freed = Freed(caller, (max(0, self._last_id - 60), self._last_id - 20)) if self._last_id > 20 else None
            cancelled = Freed(caller, (max(0, self._last_id - 40), self._last_id - 15)) if self._last_id > 20 else None
            message = examples.carry(
                Assign,
                groups[: random.randrange(3)],
                [freed] if freed and random.random() < 0.5 else [],
                [cancelled] if cancelled and random.random() < 0.2 else [],
            )
        else:
            message = examples.any_of(kind if kind is Beat or random.random() < 0.1 else Beat)
        message.epoch = core.membership.epoch
        return message

    def _handle(self, event: Any) -> None:
        for command in self.core.handle(event, self._now):
            if isinstance(command, Run):
                self._batches.append(command)
            elif isinstance(command, Say):
                self.said.append((command.message, FROM_WORKER))
            elif isinstance(command, Publish):
                self._published.append(command)

    def check(self) -> None:
        super().check()
        published, self._published = self._published, []
        for command in published:
            heard = hear(command.head, list(command.frames), ON_PUBLICATION)
            assert not isinstance(heard, BadMessage), f"published what nobody understands: {heard}"

    def settle(self) -> int:
        core = self.core
        while self._batches:
            self._finish()
        self._handle(FromBroker(Welcome(EPOCH, "w", True, self._serial)))
        while self._batches:
            self._finish()
        for caller, count in self._subscribed.items():
            for _ in range(count):
                self._handle(Unsubscribed(caller))
        self._subscribed.clear()
        core.validate()
        assert core.holds_nothing, "requests or results are held of nobody"
        assert core.kept_bytes == 0, f"{core.kept_bytes} bytes are kept"
        used = self.slots.arena.allocator.used
        assert used == 0, f"{used} bytes of the arena are lost"
        return census([value for name, value in vars(core).items() if name not in ("_models", "_plans", "_batcher")])

    def close(self) -> None:
        self.slots.close()
