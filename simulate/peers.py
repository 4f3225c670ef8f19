"""The processes that are played: each is the shell around a core of the real server, on a clock that is not real.

What one says reaches the other as the object that it is: nothing is packed or unpacked, but for answers that a worker
makes up by itself. Gateways are simpler than the real ones: they end requests as these do, with the same timings.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from heapq import heapreplace
from random import Random
from typing import Any, Final, cast

from penstock.broker.core import Core as BrokerCore
from penstock.broker.events import Came, FromCaller, FromWorker, Gone, Share, ToCaller, ToWorker
from penstock.broker.events import Event as BrokerEvent
from penstock.broker.options import BrokerOptions
from penstock.simulate.arrivals import Kind
from penstock.simulate.clock import NEVER, Alarm, Clock
from penstock.simulate.costs import Drawn
from penstock.simulate.figures import ANSWERED, Collector, WorkerTime
from penstock.simulate.scenario import Delays
from penstock.simulate.standin import Memory, Ridden, StandIn, executed, is_placed
from penstock.wire.codec import ranges, unpack, unpack_failure
from penstock.wire.errors import CANCELLED, DEADLINE
from penstock.wire.events import ArenaCame, BrokerFound, FromBroker, Say, Tick
from penstock.wire.membership import Membership
from penstock.wire.messages import (
    FAILED,
    INLINE_MAX_BYTES,
    ON_PUBLICATION,
    PARTIAL,
    Answers,
    Beat,
    CallerHello,
    Carrier,
    Message,
    Refusals,
    Requests,
    Results,
    Submit,
    Welcome,
    Workers,
)
from penstock.worker.batcher import Batch
from penstock.worker.core import Core as WorkerCore
from penstock.worker.events import Event as WorkerEvent
from penstock.worker.events import Publish, Run, Subscribed
from penstock.worker.model import Model
from penstock.worker.serving import Identity

EPOCH: Final = 1
_LEAST_S: Final = 1e-6  # between two looks at a core that asks for another at once
# As in client/caller.py.
_ACKNOWLEDGE_S: Final = 0.003
_SWEEP_S: Final = 0.1
_LATE_S: Final = 0.2
_ARENA_BYTES: Final = 1 << 50  # of a gateway: memory is not what is simulated


def set_starts(message: Carrier) -> None:
    """As unpacking does."""
    at = 0
    starts = []
    for group in message.groups:
        starts.append(0 if group.places else at)
        if not group.places and group.nbytes <= INLINE_MAX_BYTES:
            at += group.nbytes * len(group.ids)
    message.starts = starts


class Broker:
    """The whole of the broker's core. It reads what has come, once it has done with what came before, and then ticks:
    ``request_s`` is what a request takes of its time, ``step_s`` the least time between two such turns."""

    def __init__(self, clock: Clock, options: BrokerOptions, delays: Delays, step_s: float, validate: bool) -> None:
        self.core = BrokerCore(options, EPOCH, clock.now)
        self.workers: dict[bytes, Worker] = {}
        self.gateways: dict[bytes, Gateway] = {}
        self.busy_s = 0.0
        self._clock = clock
        self._hop_s = delays.hop_s
        self._request_s = delays.broker_request_s
        self._step_s = step_s
        self._validate = validate
        self._inbox: list[BrokerEvent] = []
        self._free_at = 0.0
        self._coming = False  # a turn, because something has arrived
        self._alarm = Alarm(clock, self._turn)

    def hear(self, event: BrokerEvent) -> None:
        """Something has arrived."""
        self._inbox.append(event)
        if not self._coming:
            self._coming = True
            self._alarm.want(self._turn_from(self._clock.now))

    def _turn_from(self, wanted: float) -> float:
        """When a turn can begin that is wanted then."""
        at = max(wanted, self._free_at)
        if self._step_s and at < NEVER:
            at = math.ceil(at / self._step_s - 1e-6) * self._step_s
        return at

    def _turn(self) -> None:
        now, core = self._clock.now, self.core
        inbox, self._inbox = self._inbox, []
        self._coming = False
        commands: list[Any] = []
        requests = 0
        for event in inbox:
            if isinstance(event, FromCaller) and isinstance(event.message, Submit):
                requests += sum([len(group.ids) for group in event.message.groups])
            commands += core.handle(event, now)
            if self._validate:
                core.validate()
        commands += core.handle(Tick(), now)
        if self._validate:
            core.validate()
        took = requests * self._request_s
        self.busy_s += took
        self._free_at = now + took
        arrives = self._free_at + self._hop_s
        at = self._clock.at
        for command in commands:
            match command:
                case ToWorker(peer, message):
                    worker = self.workers.get(peer)
                    if worker is not None:
                        if isinstance(message, Carrier):
                            set_starts(message)
                        at(arrives, worker.hear, FromBroker(message))
                case ToCaller(peer, message):
                    at(arrives, self.gateways[peer].hear, message)
                case Share(owner, reader, serial):
                    worker = self.workers.get(reader)
                    if worker is not None:
                        at(arrives, worker.hear, ArenaCame(owner, serial, Memory()))
        self._alarm.want(self._turn_from(max(core.due(), now + _LEAST_S)))


class Worker:
    """One life of a worker: the whole of its core, and a device on which time passes."""

    def __init__(
        self,
        clock: Clock,
        broker: Broker,
        identity: Identity,
        models: Sequence[StandIn],
        costs: dict[tuple[str, str], Drawn],
        speed: float,
        parallel: int,
        source: Random,
        hop_s: float,
        collector: Collector,
        about: WorkerTime,
        validate: bool,
    ) -> None:
        self.id = identity.id
        self.alive = True
        self.core = WorkerCore(identity, [])
        self.begun = clock.now
        self._parallel = parallel
        self._clock = clock
        self._broker = broker
        self._costs = costs
        self._moods = {key: cost.mood() for key, cost in costs.items()}
        self._speed = speed
        self._source = source
        self._hop_s = hop_s
        self._collector = collector
        self._about = about
        self._validate = validate
        # When each part of the device is free, if there are fewer than instances.
        self._free_at = [0.0] * parallel if parallel < identity.instances else []
        self._running: dict[int, tuple[float, float]] = {}  # batches by serial: from when to when
        self._alarm = Alarm(clock, self._tick)
        self._models = models

    def start(self) -> None:
        self._broker.hear(Came(self.id, 0))  # its own arena is read by nobody
        for model in self._models:
            self.hear(model.loaded())
        self.hear(BrokerFound())

    def live_until(self, end: float) -> None:
        """Have its time counted, up to now or the end of all."""
        self._collector.lived(self._about, self.begun, end, self._parallel)

    def hear(self, event: WorkerEvent) -> None:
        if not self.alive:
            return
        now, at = self._clock.now, self._clock.at
        for command in self.core.handle(event, now):
            match command:
                case Run(batch, model):
                    self._run(batch, model)
                case Say(message):
                    at(now + self._hop_s, self._broker.hear, FromWorker(self.id, message))
                case Publish(caller, head, frames):
                    at(now + self._hop_s, self._broker.gateways[caller].results, (self, head, frames))
        if self._validate:
            self.core.validate()
        self._alarm.want(max(self.core.due(), now + _LEAST_S))

    def die(self, silent: bool) -> None:
        """With it goes what it has said last: results that have not arrived. ``silent``: nothing tells the broker."""
        now = self._clock.now
        self.live_until(now)
        self.alive = False
        self._alarm.want(NEVER)
        del self._broker.workers[self.id]
        for begin, end in self._running.values():
            self._collector.cut(self._about, begin, min(end, now))
        if not silent:
            gone = Gone(self.id, "its process ended", disconnected=True)
            self._clock.at(now + self._hop_s, self._broker.hear, gone)

    def _tick(self) -> None:
        self.hear(Tick())

    def _run(self, batch: Batch, model: Model) -> None:
        now = begin = self._clock.now
        rows = cast(StandIn, model).runs_as(batch.rows)
        took = self._costs[batch.model].draw(rows, self._moods[batch.model], self._source, now) / self._speed
        if self._free_at:
            begin = max(now, self._free_at[0])
            heapreplace(self._free_at, begin + took)
        self._running[batch.serial] = begin, begin + took
        self._clock.at(begin + took, self._ran, (batch, model, now))

    def _ran(self, what: tuple[Batch, Model, float]) -> None:
        if not self.alive:
            return
        batch, model, began = what
        begin, end = self._running.pop(batch.serial)
        shares: dict[str, int] = {}
        for lot in batch.lots:
            tenant = lot.plan.form.tenant
            shares[tenant] = shares.get(tenant, 0) + lot.rows
            self._about.requests += len(lot.ids)
        self._collector.ran(self._about, batch.model[0], batch.rows, batch.reason, begin, end, shares)
        self.hear(executed(model, batch, began, self._clock.now))


class Gateway:
    """A caller of the broker. ``heard``: told when a request has ended, with its kind, when its client sent it, when it
    knows, how long it may have taken, how it ended, and how long the server says to wait before asking again."""

    def __init__(
        self,
        clock: Clock,
        broker: Broker,
        number: bytes,
        kinds: Sequence[Kind],
        delays: Delays,
        heard: Callable[[int, float, float, float, str, float], None],
    ) -> None:
        self.id = number
        # Requests: kind, when sent by its client, how long after that it may end, and when this gateway ends it.
        self.open: dict[int, tuple[int, float, float, float]] = {}
        self.late_answers = 0  # for requests that had ended
        self._clock = clock
        self._broker = broker
        self._kinds = kinds
        self._delays = delays
        self._heard = heard
        self._membership = Membership(True)
        self._last_id = 0
        self._acks: list[int] = []
        self._cancels: list[int] = []
        self._workers: set[bytes] = set()
        self._flush = Alarm(clock, self._send_rest)
        self._beats = Alarm(clock, self._beat)
        self._sweep = Alarm(clock, self._end_late)
        if any(is_placed(kind.form) for kind in kinds):
            broker.hear(Came(number, _ARENA_BYTES))
        self._membership.found()
        self._beat()

    # --- out ---

    def ask(self, arrivals: Sequence[tuple[int, float, int]]) -> list[int]:
        """Requests that are here now: kind, when its client sent it, and what it may take, in microseconds. Returns
        their ids."""
        groups: dict[int, tuple[list[int], list[int]]] = {}
        now, number, requests = self._clock.now, self._last_id, self.open
        first = number + 1
        for kind, sent, timeout_us in arrivals:
            number += 1
            limit_s = timeout_us * 1e-6
            requests[number] = kind, sent, limit_s, now + limit_s + _LATE_S
            group = groups.get(kind)
            if group is None:
                groups[kind] = [number], [timeout_us]
            else:
                group[0].append(number)
                group[1].append(timeout_us)
        self._last_id = number
        made = [self._group(kind, ids, timeouts) for kind, (ids, timeouts) in groups.items()]
        self._submit(made)
        if self._sweep.wanted == NEVER:
            self._sweep.want(now + _SWEEP_S)
        return list(range(first, number + 1))

    def _group(self, kind: int, ids: list[int], timeouts: list[int]) -> Requests:
        form = self._kinds[kind].form
        return Requests(form, tuple(ids), tuple(timeouts), (0,) * len(ids) if is_placed(form) else ())

    def _submit(self, groups: list[Requests]) -> None:
        acks, self._acks = self._acks, []
        cancels, self._cancels = self._cancels, []
        self._flush.want(NEVER)
        blob = b"".join([bytes(group.nbytes * len(group.ids)) for group in groups if not group.places])
        message = Submit(EPOCH, groups, ranges(sorted(set(acks))), tuple(cancels), blob=blob)
        set_starts(message)
        self._say(message)

    def _say(self, message: Message) -> None:
        self._clock.at(self._clock.now + self._delays.hop_s, self._broker.hear, FromCaller(self.id, message))

    def _send_rest(self) -> None:
        if self._acks or self._cancels:
            self._submit([])

    def cancel(self, number: int) -> None:
        """Its client has left."""
        request = self.open.get(number)
        if request is not None:
            self._cancels.append(number)
            self._end(number, CANCELLED, 0.0)
            self._flush.want(self._clock.now)

    # --- in ---

    def hear(self, message: Message) -> None:
        match message:
            case Refusals(refusals=refusals):
                for number, code, _, after_ms in refusals:
                    self._end(number, code, after_ms / 1000)
            case Welcome(epoch=epoch):
                self._membership.welcomed(epoch, self._clock.now)
                self._beats.want(self._membership.due())
            case Workers(workers=workers):
                for address in workers:
                    worker = self._broker.workers.get(address.worker)
                    if worker is not None and address.worker not in self._workers:
                        self._workers.add(address.worker)
                        self._clock.at(self._clock.now + self._delays.hop_s, worker.hear, Subscribed(self.id))
        self._membership.heard(self._clock.now)

    def results(self, what: tuple[Worker, bytes, Sequence[Any]]) -> None:
        """A worker has published; if it has died since, that is lost."""
        worker, head, frames = what
        if not worker.alive:
            return
        groups: Sequence[Answers]
        if frames and type(frames[0]) is Ridden:
            groups = frames[0].groups
        else:
            message = unpack(head, frames, ON_PUBLICATION)
            assert isinstance(message, Results)
            groups = message.groups
        for group in groups:
            assert group.status != PARTIAL, "workers that are played answer at once"
            code = ANSWERED if group.status != FAILED else unpack_failure(group.body).code
            self._acks += group.ids
            for number in group.ids:
                self._end(number, code, 0.0)
        self._flush.want(min(self._flush.wanted, self._clock.now + _ACKNOWLEDGE_S))

    def _end(self, number: int, code: str, after_s: float) -> None:
        request = self.open.pop(number, None)
        if request is None:
            self.late_answers += 1
            return
        kind, sent, limit_s, _ = request
        self._heard(kind, sent, self._clock.now + self._delays.client_s, limit_s, code, after_s)

    def _end_late(self) -> None:
        """Those that nobody has answered, by the gateway's own clock."""
        now = self._clock.now
        for number in [number for number, (_, _, _, ends_at) in self.open.items() if ends_at < now]:
            self._cancels.append(number)
            self._end(number, DEADLINE, 0.0)
        if self._cancels:
            self._flush.want(self._clock.now)
        if self.open:
            self._sweep.want(self._clock.now + _SWEEP_S)

    def _beat(self) -> None:
        match self._membership.say(self._clock.now):
            case "hello":
                self._say(CallerHello(0, "", 1, True))
            case "beat":
                self._say(Beat(EPOCH))
            case "lost":
                raise AssertionError("the broker is silent, which it cannot be here")
        self._beats.want(max(self._membership.due(), self._clock.now + _LEAST_S))
