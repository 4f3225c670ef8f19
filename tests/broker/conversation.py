"""Conversations with the broker's core: peers speak, time passes, and what the broker says is collected by peer.

Every message goes through pack and unpack in both directions, and the core is validated after every event.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from penstock.broker.core import Core
from penstock.broker.events import Came, Event, FromCaller, FromWorker, Gone, Share, Sweep, ToCaller, ToWorker
from penstock.broker.options import BrokerOptions
from penstock.wire.codec import pack, ranges, unpack
from penstock.wire.events import Garbage, Log, Tick
from penstock.wire.messages import (
    FROM_CALLER,
    FROM_WORKER,
    INLINE_MAX_BYTES,
    TO_CALLER,
    TO_WORKER,
    Assign,
    Attached,
    Beat,
    Bye,
    CallerHello,
    Carrier,
    Done,
    Finished,
    Form,
    Message,
    Ping,
    Pong,
    Refusal,
    Refusals,
    Requests,
    Submit,
    Tasks,
    Version,
    WorkerHello,
    WorkerModels,
)
from penstock.wire.models import READY, ModelSpec, ModelState, Route, TensorSpec

M = TypeVar("M", bound=Message)

EPOCH = 7


def model(name: str = "m", version: str = "1", state: str = READY, reason: str = "", batch: int = 4) -> ModelState:
    """A model as a worker declares it; ``batch``: rows at most, 0 for one that has never been loaded."""
    tensor = TensorSpec("x", "FP32", (-1,))
    spec = ModelSpec(name, version, "onnx", (tensor,), (tensor,), batchable=True, max_batch_size=batch or 1)
    return ModelState(name, version, state, reason, spec if batch else None)


def through_the_wire(message: Message, kinds: Mapping[int, type[Message]]) -> Message:
    frames = list(map(bytes, message.frames)) if isinstance(message, Carrier) else []
    return unpack(pack(message), frames, kinds)


class Conversation:
    """``options``: of BrokerOptions. The broker is old enough to judge, unless ``grace``: it has just begun."""

    def __init__(self, grace: bool = False, **options: Any) -> None:
        self.now = 1000.0
        self.core = Core(BrokerOptions(**options), EPOCH, self.now)
        self.inbox: defaultdict[bytes, list[Message]] = defaultdict(list)
        self.logs: list[Log] = []
        self.sweeps = 0
        self.pings: Counter[bytes] = Counter()  # how often workers were asked whether they live
        self.stopped: set[bytes] = set()  # workers that do not answer when they are asked whether they live
        self.shared: list[tuple[bytes, bytes]] = []  # whose arena was passed on to whom
        self.serials: dict[tuple[bytes, bytes], int] = {}  # as which introduction, the last time
        if not grace:
            self.tick(self.core.options.unserved_grace_s)

    def handle(self, event: Event) -> None:
        pinged: list[bytes] = []
        for command in self.core.handle(event, self.now):
            match command:
                case ToCaller(peer, message):
                    self.inbox[peer].append(through_the_wire(message, TO_CALLER))
                case ToWorker(peer, Ping()):
                    pinged.append(peer)
                case ToWorker(peer, message):
                    self.inbox[peer].append(through_the_wire(message, TO_WORKER))
                case Log():
                    self.logs.append(command)
                case Share(owner, reader, serial):
                    self.shared.append((owner, reader))
                    self.serials[owner, reader] = serial
                case Sweep():
                    self.sweeps += 1
        self.core.validate()
        for peer in pinged:
            self.pings[peer] += 1
            if peer not in self.stopped and peer in self.core.workers:
                self.handle(FromWorker(peer, Pong(EPOCH)))

    def tick(self, seconds: float = 0.0) -> None:
        """Let time pass, as if nothing had happened meanwhile."""
        self.now += seconds
        self.handle(Tick())

    def forget(self) -> None:
        """Have everybody read, and forget, what has come."""
        for inbox in self.inbox.values():
            inbox.clear()

    def garbage(self, process: str = "caller") -> None:
        self.handle(Garbage(process, "nonsense", b"somebody"))

    def caller(self, name: str = "", local: bool = True, arena_bytes: int = 0, connected: bool = False) -> CallerTalk:
        """A caller that has said hello, perhaps after it has made its control connection and shown its arena."""
        caller = CallerTalk(self, b"caller%02d" % len(self.inbox))
        if arena_bytes or connected:
            self.handle(Came(caller.id, arena_bytes))
        caller.say(CallerHello(0, name, 1, local))
        return caller

    def worker(
        self,
        *models: ModelState,
        hears: Sequence[CallerTalk] = (),
        instances: int = 1,
        name: str = "w",
        endpoints: Sequence[str] = ("ipc:///run/w.sock",),
        connected: bool = False,
        arena_bytes: int = 0,
    ) -> WorkerTalk:
        """A worker that has said hello, perhaps over a control connection too, and is heard by some callers."""
        worker = WorkerTalk(self, b"worker%02d" % len(self.inbox))
        if connected:
            self.handle(Came(worker.id, arena_bytes))
        worker.say(WorkerHello(0, name, "cpu", 1, endpoints, instances, models or (model(),)))
        for caller in hears:
            worker.hear(caller)
        return worker

    def live(self, seconds: float) -> None:
        """Let time pass in which every peer beats."""
        until = self.now + seconds
        while self.now < until:
            self.beat()
            self.tick(min(0.5, until - self.now))

    def beat(self) -> None:
        """Have every peer beat, and read the answer."""
        for number in list(self.core.callers):
            self.handle(FromCaller(number, Beat(EPOCH)))
        for number in list(self.core.workers):
            self.handle(FromWorker(number, Beat(EPOCH)))
        for inbox in self.inbox.values():
            inbox[:] = [message for message in inbox if not isinstance(message, Beat)]

    def count(self, family: str, *labels: str) -> float:
        """One of the broker's own metrics."""
        return self.core.meters.value(family, *labels).value

    @property
    def held(self) -> tuple[int, int]:
        """Requests and bytes that the broker holds."""
        return self.core.ledger.requests, self.core.ledger.bytes


class PeerTalk(ABC):
    """A peer's side of a conversation."""

    def __init__(self, talk: Conversation, number: bytes) -> None:
        self.talk = talk
        self.id = number
        self.inbox = talk.inbox[number]

    @abstractmethod
    def say(self, message: Message) -> None:
        """Say something to the broker."""

    def take(self, kind: type[M]) -> list[M]:
        """The messages of a kind that have come, which are then read."""
        found = [message for message in self.inbox if isinstance(message, kind)]
        self.inbox[:] = [message for message in self.inbox if not isinstance(message, kind)]
        return found

    def heard(self) -> list[str]:
        """The kinds of all messages that have come, which are then read."""
        kinds = [type(message).__name__ for message in self.inbox]
        self.inbox.clear()
        return kinds

    def vanish(self, reason: str = "its process ended") -> None:
        self.talk.handle(Gone(self.id, reason))


class CallerTalk(PeerTalk):
    def __init__(self, talk: Conversation, number: bytes) -> None:
        super().__init__(talk, number)
        self.last_id = 0

    def say(self, message: Message) -> None:
        self.talk.handle(FromCaller(self.id, through_the_wire(message, FROM_CALLER)))

    def submit(
        self,
        count: int = 1,
        name: str = "m",
        version: str = "1",
        rows: int = 1,
        size: int = 0,
        timeout_s: float | Sequence[float] = 60.0,
        tenant: str = "",
        priority: int = 0,
        epoch: int = EPOCH,
        places: Sequence[int] = (),
        sequence: str = "",
        phase: int = 0,
    ) -> tuple[int, ...]:
        """Ask for ``count`` requests of one form, each with ``size`` bytes, in ``places`` of its arena or in the
        message; returns their ids."""
        ids = tuple(range(self.last_id + 1, self.last_id + 1 + count))
        self.last_id += count
        timeouts = [timeout_s] * count if isinstance(timeout_s, (int, float)) else timeout_s
        form = Form(name, version, priority, tenant, rows, size, b"", b"layout", sequence, phase)
        self.ask([Requests(form, ids, tuple(int(each * 1e6) for each in timeouts), tuple(places))], epoch)
        return ids

    def ask(self, groups: Sequence[Requests], epoch: int = EPOCH) -> None:
        """Submit groups; the payload of request 5 is 5, 5, 5, ..."""
        travel = [group for group in groups if not group.places]
        payloads = [bytes([number % 256]) * group.form.nbytes for group in travel for number in group.ids]
        inline = b"".join(each for each in payloads if len(each) <= INLINE_MAX_BYTES)
        frames = [each for each in payloads if len(each) > INLINE_MAX_BYTES]
        self.say(Submit(epoch, groups, blob=inline, frames=frames))

    def ack(self, *ids: int) -> None:
        self.say(Submit(EPOCH, (), ranges(sorted(ids))))

    def cancel(self, *ids: int) -> None:
        self.say(Submit(EPOCH, (), (), ids))

    def bye(self) -> None:
        self.say(Bye(EPOCH))

    def refusals(self) -> list[Refusal]:
        """Refusals that have come since they were last asked for."""
        return [refusal for message in self.take(Refusals) for refusal in message.refusals]

    def refused(self) -> dict[int, str]:
        """The codes of refusals that have come, by id."""
        return {refusal.id: refusal.code for refusal in self.refusals()}


class WorkerTalk(PeerTalk):
    def say(self, message: Message) -> None:
        self.talk.handle(FromWorker(self.id, through_the_wire(message, FROM_WORKER)))

    def work(self) -> list[Tasks]:
        """The groups that have come since they were last asked for."""
        return [group for message in self.take(Assign) for group in message.groups]

    def got(self) -> list[int]:
        """The ids of requests that have come, in their order."""
        return [number for group in self.work() for number in group.ids]

    def news(self) -> tuple[list[int], list[int]]:
        """Ids that were freed, and ids that were cancelled, as far as they have been told."""
        freed, cancelled = [], []
        for message in self.take(Assign):
            freed += [number for each in message.freed for number in spread(each.ranges)]
            cancelled += [number for each in message.cancelled for number in spread(each.ranges)]
        return freed, cancelled

    def done(self, caller: CallerTalk, *ids: int, attempt: int = 1, size: int = 0, compute_us: int = 0) -> None:
        self.say(Done(EPOCH, [Finished(caller.id, attempt, size, ids, compute_us)]))

    def finish(self, groups: Sequence[Tasks], size: int = 0) -> None:
        """Be done with what has come."""
        self.say(Done(EPOCH, [Finished(each.caller, each.attempt, size, each.ids) for each in groups]))

    def hear(self, caller: CallerTalk, attached: bool = True) -> None:
        worker = self.talk.core.workers.get(self.id)
        serial = 0 if worker is None else worker.expected.get(caller.id, 0)
        self.say(Attached(EPOCH, caller.id, serial, attached))

    def declare(self, *models: ModelState, routes: Sequence[Route] = (), heard: int = 0) -> None:
        """From now on it has these models."""
        worker = self.talk.core.workers[self.id]
        kept = {(state.name, state.version) for state in models}
        gone = [Version(*key) for key in worker.models if key not in kept]
        self.say(WorkerModels(EPOCH, models, gone, routes, worker.instances, heard))

    def bye(self) -> None:
        """End in good order: nobody is to blame."""
        self.say(Bye(EPOCH))


def spread(ranges: Sequence[int]) -> list[int]:
    return [number for at in range(0, len(ranges), 2) for number in range(ranges[at], ranges[at + 1] + 1)]
