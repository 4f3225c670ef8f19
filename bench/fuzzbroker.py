"""What ``fuzz.py`` says to the broker's core."""

from __future__ import annotations

from random import Random
from typing import Any

from bench.fuzzexamples import ARENA_BYTES, CALLERS, EPOCH, WORKERS, Examples
from bench.fuzzmutate import malformed
from bench.fuzztarget import CoreTarget, census, hear
from penstock.broker.core import Core as BrokerCore
from penstock.broker.events import Came, FromCaller, Gone, ToCaller, ToWorker
from penstock.broker.events import FromWorker as BrokerFromWorker
from penstock.broker.options import BrokerOptions
from penstock.broker.peers import CallerPeer, WorkerPeer
from penstock.wire.codec import (
    pack,
    ranges,
    unpack,
)
from penstock.wire.errors import BadMessage
from penstock.wire.events import Garbage, Tick
from penstock.wire.messages import (
    FROM_CALLER,
    FROM_WORKER,
    TO_CALLER,
    TO_WORKER,
    Ask,
    Attached,
    Beat,
    Bye,
    CallerHello,
    Carrier,
    Done,
    Finished,
    Hung,
    Leaving,
    Message,
    Submit,
    WorkerHello,
)


class Broker(CoreTarget):
    """The broker's core, fed as its shell feeds it, by callers and workers that mostly talk nonsense."""

    name = "broker"
    share = 0.10

    def begin(self, random: Random) -> None:
        super().begin(random)
        self._examples = Examples(random)
        self._now = 1000.0
        options = BrokerOptions(queue_requests_max=200, held_bytes_max=1 << 24, callers_max=40, workers_max=40)
        self.core = BrokerCore(options, EPOCH, self._now)
        self._last_id = 0
        self._count = 0

    def make(self, random: Random) -> Any:
        for _ in range(random.choice((0, 1, 2))):
            self._traffic(random)
        kind = random.random()
        if kind < 0.02:
            return Came(random.choice(CALLERS + WORKERS), random.choice((0, ARENA_BYTES, 1 << 40)))
        if kind < 0.03:
            return Gone(random.choice(CALLERS + WORKERS), "it went", random.random() < 0.5)
        process, peer, message = self._valid(random)
        if random.random() < 0.05:  # somebody else says it
            peer = random.choice([*CALLERS, *WORKERS, random.randbytes(8)])
        return process, peer, *malformed(random, message, self._valid(random)[2], 0.85)

    def feed(self, each: Any) -> bool:
        understood = False
        if not isinstance(each, tuple):
            self._handle(each)
        else:
            process, peer, head, frames = each
            message = hear(head, frames, FROM_CALLER if process == "caller" else FROM_WORKER)
            if isinstance(message, BadMessage):
                self._handle(Garbage(process, str(message), peer))
            else:
                understood = True
                self._handle(FromCaller(peer, message) if process == "caller" else BrokerFromWorker(peer, message))
        self._count += 1
        if self._count % 3 == 0:
            self._now += (0.0, 0.0001, 0.01, 0.01, 0.4)[self._count % 5]
            self._handle(Tick())
        if self._count % 50 == 0:
            self.core.validate()
        return understood

    def _traffic(self, random: Random) -> None:
        process, peer, message = self._valid(random)
        kinds = FROM_CALLER if process == "caller" else FROM_WORKER
        heard = unpack(pack(message), message.frames if isinstance(message, Carrier) else (), kinds)
        self._handle(FromCaller(peer, heard) if process == "caller" else BrokerFromWorker(peer, heard))

    def _valid(self, random: Random) -> tuple[str, bytes, Message]:
        """What a peer may say, and who it is."""
        if random.random() < 0.5:
            peer = random.choice(CALLERS)
            return "caller", peer, self._of_caller(random, self.core.callers.get(peer))
        peer = random.choice(WORKERS)
        return "worker", peer, self._of_worker(random, self.core.workers.get(peer))

    def _of_caller(self, random: Random, caller: CallerPeer | None) -> Message:
        examples = self._examples
        if caller is None or random.random() < 0.01:
            return examples.any_of(CallerHello)
        if random.random() < 0.2:
            return examples.any_of(random.choice((*[Beat] * 10, *[Ask] * 9, Bye)))
        first = self._last_id + 1
        groups = [examples.requests(first, random.random() < 0.2), examples.requests(first + 5)]
        self._last_id += 10
        known = sorted(caller.requests)
        acks = ranges(sorted(random.sample(known, min(len(known), random.choice((0, 3, 50))))))
        cancels = tuple(random.sample(known, min(len(known), random.choice((0, 0, 2)))))
        message: Message = examples.carry(Submit, groups[: random.randrange(3)], acks, cancels)
        return message

    def _of_worker(self, random: Random, worker: WorkerPeer | None) -> Message:
        examples = self._examples
        if worker is None or random.random() < 0.01:
            return examples.any_of(WorkerHello)
        unheard = sorted(worker.expected.keys() - worker.callers)
        if unheard and random.random() < 0.5:
            return Attached(EPOCH, unheard[0], worker.expected[unheard[0]], True)
        if worker.held and random.random() < 0.6:
            lots = [lot for held in worker.held.values() for lot in dict.fromkeys(held.values())]
            lots = random.sample(lots, min(len(lots), 8))
            return Done(EPOCH, [Finished(lot.caller.id, lot.attempt, 8, lot.ids, 500) for lot in lots])
        kinds: tuple[type[Message], ...] = tuple(FROM_WORKER.values())
        kind = random.choice(kinds)
        return examples.any_of(kind if kind not in (Leaving, Bye, Hung, WorkerHello) or random.random() < 0.1 else Beat)

    def _handle(self, event: Any) -> None:
        for command in self.core.handle(event, self._now):
            if isinstance(command, ToCaller):
                self.said.append((command.message, TO_CALLER))
            elif isinstance(command, ToWorker):
                self.said.append((command.message, TO_WORKER))

    def settle(self) -> int:
        core = self.core
        for peer in {*core.callers, *core.workers, *CALLERS, *WORKERS}:
            self._handle(Gone(peer, "the end", True))
        self._now += 0.5
        self._handle(Tick())
        core.validate()
        ledger = core.ledger
        assert not core.callers, "callers are left"
        assert not core.workers, "workers are left"
        held = ledger.requests, ledger.rows, ledger.bytes
        assert held == (0, 0, 0), f"requests, rows and bytes are held of nobody: {held}"
        return census(core)
