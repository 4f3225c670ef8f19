"""The cores of a broker, workers and callers together: what one says reaches the others when the test delivers it.

Each connection keeps its order, and no two connections have one together. Processes can be stopped and continued,
killed and started. Tensors lie in real arenas, and the models are real; only sockets, clocks and threads are played.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeAlias, TypeVar

import numpy as np

from penstock.broker.core import Core as BrokerCore
from penstock.broker.events import Came, FromCaller, Gone, Share, ToCaller, ToWorker
from penstock.broker.events import FromWorker as BrokerFromWorker
from penstock.broker.options import BrokerOptions
from penstock.client.arrays import decode_outcome, make_form
from penstock.client.caller import Caller, Identity
from penstock.client.events import Complete, Fail, FromWorker, Hear
from penstock.wire.arena import Arena, Mapping
from penstock.wire.codec import pack, unpack
from penstock.wire.errors import PenstockError
from penstock.wire.events import ArenaCame, BrokerFound, BrokerLost, FromBroker, Say, Tick
from penstock.wire.messages import (
    FROM_CALLER,
    FROM_WORKER,
    ON_PUBLICATION,
    TO_CALLER,
    TO_WORKER,
    Carrier,
    Message,
    Results,
    Submit,
)
from penstock.wire.models import READY, Layout, ModelState, Tensor
from penstock.wire.slots import Slot, Slots
from penstock.worker.core import Core as WorkerCore
from penstock.worker.events import GiveUp, Loaded, Publish, Run, Subscribed, Unsubscribed
from penstock.worker.execute import execute
from penstock.worker.model import Model
from penstock.worker.serving import Identity as WorkerIdentity

ARENA_BYTES = 1 << 16  # of a caller or a worker: for a dozen of the large tensors
# Numbers in a row: 2400 bytes lie in an arena, and so do 2200, but callers copy results of that; 8 travel.
LARGE, MIDDLE, SMALL = 600, 550, 2
Delivery: TypeAlias = Callable[[], None]
P = TypeVar("P", bound="Peer")


class Process:
    """One life of one process. ``inbox``: what has been sent to it, by connection."""

    def __init__(self, world: World, name: str) -> None:
        self.world = world
        self.name = name
        self.alive = True
        self.stopped = False
        self.inbox: dict[str, deque[Delivery]] = {}

    def send(self, connection: str, delivery: Delivery) -> None:
        """Something is on its way to this process."""
        if self.alive:
            self.inbox.setdefault(connection, deque()).append(delivery)

    def deliver(self, pick: int) -> bool:
        """The next thing of one of its connections. False: there is nothing, or it is stopped."""
        connections = sorted(name for name, waiting in self.inbox.items() if waiting)
        if not connections or self.stopped or not self.alive:
            return False
        self.inbox[connections[pick % len(connections)]].popleft()()
        return True

    def tick(self) -> None:
        """Its own clock has gone on."""


class BrokerLife(Process):
    def __init__(self, world: World, epoch: int) -> None:
        super().__init__(world, f"broker {epoch}")
        self.core = BrokerCore(BrokerOptions(unacknowledged_bytes_max=40_000), epoch, world.now)

    def hear(self, event: Any) -> None:
        for command in self.core.handle(event, self.world.now):
            match command:
                case ToCaller(peer, message):
                    self._tell(peer, message, TO_CALLER)
                case ToWorker(peer, message):
                    self._tell(peer, message, TO_WORKER)
                case Share(owner, reader, serial):
                    self._share(owner, reader, serial)
        self.core.validate()

    def _tell(self, peer: bytes, message: Message, kinds: Any) -> None:
        to = self.world.peers.get(peer)
        if to is not None:
            # As it is now: what a frame refers to may be changed later.
            head, frames = pack(message), list(map(bytes, message.frames)) if isinstance(message, Carrier) else []
            to.send("broker", lambda: to.hear(FromBroker(unpack(head, frames, kinds))))

    def _share(self, owner: bytes, reader: bytes, serial: int) -> None:
        to, of = self.world.peers.get(reader), self.world.peers.get(owner)
        if to is not None and of is not None:
            came = ArenaCame(owner, serial, Mapping(os.dup(of.slots.arena.fd)))
            to.send("control", lambda: to.hear(came))

    def tick(self) -> None:
        self.hear(Tick())


class Peer(Process, ABC):
    """A caller or a worker: it has an arena and a control connection."""

    def __init__(self, world: World, number: bytes) -> None:
        super().__init__(world, number.decode())
        self.id = number
        self.slots = Slots(Arena(ARENA_BYTES, "test"))
        self.late = False  # there was no memory for it at the beginning,
        self.has_arena = True  # nor is there yet

    def do_without(self) -> None:
        """It comes without an arena."""
        self.late, self.has_arena = True, False

    def find_arena(self) -> None:
        """Of one that had found no memory before."""
        broker = self.world.broker
        if not self.has_arena:
            self.has_arena = True
            if broker is not None:
                broker.send(self.name, lambda: broker.hear(Came(self.id, self.slots.arena.size)))

    @abstractmethod
    def hear(self, event: Any) -> None:
        """An event of its core."""

    def say(self, message: Message) -> None:
        """To the broker that is there now."""
        broker = self.world.broker
        if broker is None:
            return
        kinds, kind = (FROM_CALLER, FromCaller) if isinstance(self, CallerLife) else (FROM_WORKER, BrokerFromWorker)
        head, frames = pack(message), list(map(bytes, message.frames)) if isinstance(message, Carrier) else []
        broker.send(self.name, lambda: broker.hear(kind(self.id, unpack(head, frames, kinds))))

    def meet(self, broker: BrokerLife) -> None:
        """Make a control connection; the broker reads it before anything that this peer says."""
        nbytes = self.slots.arena.size if self.has_arena else 0
        broker.send(self.name, lambda: broker.hear(Came(self.id, nbytes)))
        self.send("control", lambda: self.hear(BrokerFound()))

    def end(self) -> None:
        self.alive = False
        self.inbox.clear()
        self.slots.arena.close()  # those who have mapped it read on
        broker = self.world.broker
        if broker is not None:
            broker.send(self.name, lambda: broker.hear(Gone(self.id, "its process ended", disconnected=True)))


class WorkerLife(Peer):
    def __init__(self, world: World, number: bytes, model: Model) -> None:
        super().__init__(world, number)
        self.endpoint = f"ipc://{self.name}"
        self.core = WorkerCore(WorkerIdentity(number, self.name, "cpu", 1, (self.endpoint,), 1, True), [])
        self.batches: list[Run] = []
        self.gives_up = False
        self.subscribers: Counter[bytes] = Counter()
        spec = model.spec
        self.hear(Loaded(ModelState(spec.name, spec.version, READY, "", spec), model))

    def hear(self, event: Any) -> None:
        if isinstance(event, Subscribed):
            self.subscribers[event.caller] += 1
        elif isinstance(event, Unsubscribed):
            self.subscribers[event.caller] -= 1
        for command in self.core.handle(event, self.world.now):
            match command:
                case Say(message):
                    self.say(message)
                case Publish(caller, head, frames):
                    self._publish(caller, head, list(map(bytes, frames)))
                case Run():
                    self.batches.append(command)
                case GiveUp():
                    self.gives_up = True
        self.core.validate()
        if self.gives_up and self.alive:
            self.world.kill(self)
            self.world.start_worker()

    def _publish(self, caller: bytes, head: bytes, frames: Sequence[bytes]) -> None:
        to = self.world.peers.get(caller)
        if isinstance(to, CallerLife) and self.subscribers[caller] > 0:
            message = unpack(head, frames, ON_PUBLICATION)
            assert isinstance(message, Results)
            to.send(self.name, lambda: to.hear(FromWorker(message)))

    def compute(self) -> bool:
        """Run the oldest batch, or die of it, and be started again. False: there is none."""
        if not self.batches or self.stopped or not self.alive:
            return False
        asked = {(lot.caller, number) for lot in self.batches[0].batch.lots for number in lot.ids}
        if asked & self.world.endless:
            return False
        run = self.batches.pop(0)
        if asked & self.world.poison:
            self.world.kill(self)
            self.world.start_worker()
            return True
        self.hear(execute(run.model, run.batch, self.slots if self.has_arena else None))
        return True

    def tick(self) -> None:
        if self.world.now >= self.core.due():
            self.hear(Tick())


@dataclass(eq=False)
class Request:
    """One that a caller has made: its sink. ``value`` stands everywhere in its input."""

    caller: CallerLife
    value: float
    width: int
    slot: Slot | None
    ends: list[str] = field(default_factory=list)
    held: Complete | None = None
    number: int = 0
    reason: str = ""

    def complete(self, answer: Complete) -> None:
        self.check(answer)
        if answer.held:
            self.held = answer
            self.caller.reading.append(self)
        self._end("result")

    def fail(self, error: PenstockError) -> None:
        self.reason = error.message
        self._end(error.code)

    def _end(self, how: str) -> None:
        self.ends.append(how)
        if self.slot is not None:
            self.slot.give_back()

    def check(self, answer: Complete) -> None:
        _, outputs = decode_outcome(answer.body, answer.payload)
        np.testing.assert_array_equal(outputs["y"], np.full((1, self.width), 2 * self.value, np.float32))


class CallerLife(Peer):
    def __init__(self, world: World, number: bytes) -> None:
        super().__init__(world, number)
        self.caller = Caller(Identity(number, "", 1, True, "here", copied_bytes_max=4 * MIDDLE))
        self.requests: list[Request] = []
        self.reading: list[Request] = []  # have a result in a worker's memory that they have not let go of
        self.heard: dict[str, WorkerLife] = {}

    def hear(self, event: Any) -> None:
        for command in self.caller.handle(event, self.world.now):
            match command:
                case Say(message):
                    self.say(message)
                case Complete():
                    command.sink.complete(command)
                case Fail(sink, error):
                    sink.fail(error)
                case Hear(endpoint, on):
                    self._hear_worker(endpoint, on)
        self.caller.validate()
        self.flush()

    def _hear_worker(self, endpoint: str, on: bool) -> None:
        if on:
            workers = [each for each in self.world.of(WorkerLife) if each.endpoint == endpoint]
            for worker in workers:
                self.heard[endpoint] = worker
                worker.send(self.name, partial(worker.hear, Subscribed(self.id)))
        else:
            worker = self.heard.pop(endpoint, None)
            if worker is not None:
                self.inbox.pop(worker.name, None)  # what it has not read of a connection that it ends
                worker.send(self.name, lambda: worker.hear(Unsubscribed(self.id)))

    def flush(self) -> None:
        if self.caller.wants_flush(self.world.now):
            for message in self.caller.flush(self.world.now):
                assert isinstance(message, Submit)
                self.say(message)

    def ask(self, model: Model, value: float, width: int, timeout_s: float) -> None:
        payload = np.full((1, width), value, np.float32).tobytes()
        form = make_form(model.spec, Layout((Tensor("x", "FP32", (1, width), 0, len(payload)),), ()), len(payload))
        shares = self.caller.shares or not self.late
        slot = self.slots.take(len(payload)) if width != SMALL and shares else None
        if slot is not None:
            slot.view[:] = payload
        request = Request(self, value, width, slot)
        self.requests.append(request)
        request.number = self.caller.submit(form, slot or payload, timeout_s, request, self.world.now)
        self.flush()

    def cancel(self, pick: int) -> None:
        """One that has not ended is not wanted any more."""
        open_ones = [request for request in self.requests if not request.ends]
        if open_ones:
            request = open_ones[pick % len(open_ones)]
            self.caller.cancel(request.number)
            request.fail(PenstockError("cancelled", ""))
            self.flush()

    def poison(self, *requests: Request) -> None:
        """Whoever runs these dies."""
        self.world.poison |= {(self.id, request.number) for request in requests}

    def let_go(self, pick: int) -> None:
        """A result has been read: it must still be what it was."""
        if self.reading:
            request = self.reading.pop(pick % len(self.reading))
            assert request.held is not None
            request.check(request.held)
            self.caller.release(request.held.held, self.world.now)
            self.flush()

    def check(self) -> None:
        """Nobody has written where this caller reads; everything has ended at most once."""
        for request in self.reading:
            assert request.held is not None
            request.check(request.held)
        for request in self.requests:
            assert len(request.ends) <= 1, f"a request ended as {request.ends}"
            guilty = (self.id, request.number) in self.world.poison | self.world.endless
            possible = {"result", "cancelled", "deadline", "unavailable", "lost", *(["poisoned"] if guilty else [])}
            assert set(request.ends) <= possible, request.reason
            assert "lost" not in request.ends or "workers were lost" in request.reason, request.reason

    def end(self) -> None:
        super().end()
        for worker in self.heard.values():
            worker.send(self.name, partial(worker.hear, Unsubscribed(self.id)))

    def tick(self) -> None:
        if self.world.now >= self.caller.due():
            self.hear(Tick())
        self.flush()


class World:
    """All processes of a server. ``now``: seconds; one clock for all."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.now = 1000.0
        self.broker: BrokerLife | None = None
        self.peers: dict[bytes, Peer] = {}
        self.poison: set[tuple[bytes, int]] = set()  # requests, by caller and id, that kill the worker that runs them
        self.endless: set[tuple[bytes, int]] = set()  # those that never end
        self._made = 0

    def of(self, kind: type[Any]) -> list[Any]:
        return [peer for peer in self.peers.values() if isinstance(peer, kind)]

    @property
    def processes(self) -> list[Process]:
        return [*([self.broker] if self.broker else []), *self.peers.values()]

    def start_broker(self) -> None:
        self._made += 1
        self.broker = BrokerLife(self, self._made)
        for peer in self.peers.values():
            peer.meet(self.broker)

    def kill_broker(self, read: bool) -> None:
        """``read``: what it had said reaches its peers all the same, but for what is on the control connection."""
        if self.broker is None:
            return
        self.broker.alive = False
        self.broker = None
        for peer in self.peers.values():
            if not read:
                peer.inbox.pop("broker", None)
            peer.send("control", partial(peer.hear, BrokerLost("its process ended")))

    def start_caller(self, late: bool = False) -> CallerLife:
        """``late``: without an arena."""
        return self._start(CallerLife(self, self._name("c")), late)

    def start_worker(self, late: bool = False) -> WorkerLife:
        return self._start(WorkerLife(self, self._name("w"), self.model), late)

    def _name(self, kind: str) -> bytes:
        self._made += 1
        return f"{kind}{self._made:07}".encode()

    def _start(self, peer: P, late: bool) -> P:
        if late:
            peer.do_without()
        self.peers[peer.id] = peer
        if self.broker is not None:
            peer.meet(self.broker)
        return peer

    def kill(self, peer: Peer) -> None:
        del self.peers[peer.id]
        peer.end()

    def pass_time(self, seconds: float) -> None:
        self.now += seconds
        for process in self.processes:
            if not process.stopped:
                process.tick()

    def settle(self, rounds: int = 200, step_s: float = 0.01) -> None:
        """Deliver and run everything, in an order of no meaning, until nothing more follows for some time."""
        idle = 0
        for _ in range(rounds):
            busy = False
            for process in self.processes:
                while process.deliver(0):
                    busy = True
                    if self.broker is not None and not self.broker.stopped:
                        self.broker.tick()
            for worker in self.of(WorkerLife):
                busy = worker.compute() or busy
            self.pass_time(step_s)
            idle = 0 if busy else idle + 1
            if idle > 5:
                return

    def check(self) -> None:
        for caller in self.of(CallerLife):
            caller.check()

    def close(self) -> None:
        for peer in self.peers.values():
            peer.slots.arena.close()
