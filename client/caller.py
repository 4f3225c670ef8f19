"""A caller's decisions: events in, commands out; no socket, clock or thread. The gateway and the client library share
it.

Every call ends exactly once: with the first result or refusal that comes, or when its time is up. What comes later for
the same id is dropped, and acknowledged all the same, so that the worker need not keep it.

A broker that goes takes nothing with it. What it had is sent again to the next, under the same ids and with the time
that is left; a worker that had it knows it by these. What it had said of models and workers is remembered until the
next has had time to hear of them all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from penstock.client.calls import AGAIN, ENDED, SENT, WAITING, Call
from penstock.client.events import Command, Complete, Event, Fail, FromWorker, Hear, OrderDone, Report, Sink
from penstock.client.splits import Split, split_of
from penstock.wire.arrivals import Arrivals
from penstock.wire.codec import ranges, unpack_failure
from penstock.wire.errors import (
    DEADLINE,
    INTERNAL,
    NOT_FOUND,
    OVERLOADED,
    UNAVAILABLE,
    BadMessage,
    PenstockError,
)
from penstock.wire.events import Arena, ArenaCame, BrokerFound, BrokerLost, FromBroker, Garbage, Log, Say, Tick
from penstock.wire.membership import Membership
from penstock.wire.messages import (
    COMPLETE,
    FAILED,
    INLINE_MAX_BYTES,
    MAX_REQUESTS,
    PARTIAL,
    UNNAMED,
    Answers,
    Ask,
    Beat,
    Bye,
    CallerHello,
    Failure,
    Form,
    HelloWanted,
    Message,
    Metrics,
    Models,
    Order,
    Ordered,
    Payload,
    Refusals,
    Requests,
    Results,
    Submit,
    Welcome,
    WorkerAddress,
    Workers,
)
from penstock.wire.metrics import Meters
from penstock.wire.models import SERVED, ModelSpec, ModelState, Route, Unnamed, newest
from penstock.wire.models import UNAVAILABLE as UNAVAILABLE_STATE
from penstock.wire.slots import PLACED_MIN_BYTES, Placed

_COPIED_BYTES_MAX: Final = 16 * 1024  # to see to a view, and to give it back, costs as much
_SWEEP_S: Final = 0.1  # how often calls are looked through for those whose time is up
# The broker and the workers say why time was up: their word is waited for so long past the deadline.
_LATE_S: Final = 0.2
_ACKNOWLEDGE_S: Final = 0.003  # acknowledgments wait so long for requests to travel with
_ACKNOWLEDGE_LONE_S: Final = 0.1  # that of a small result of a request that was alone
_REMEMBER_S: Final = 10.0  # after a broker's welcome: what the one before it had said still counts
_NEVER: Final = float("inf")


@dataclass(frozen=True, slots=True)
class Identity:
    """Who a caller is. ``name``: "" for one that has no metrics. ``address``: the broker's, for what users are told.
    ``copied_bytes_max``: of a result that is copied out of its worker's memory when it comes."""

    id: bytes
    name: str
    pid: int
    local: bool
    address: str
    calls_max: int = 65_536
    copied_bytes_max: int = _COPIED_BYTES_MAX


class Caller:
    """One caller. Times are seconds of the shell's monotonic clock.

    ``models``: what the server serves, by name and version; None until the broker has said.
    """

    def __init__(self, identity: Identity) -> None:
        self.identity = identity
        self.membership = Membership(identity.local)
        self.meters = Meters()
        self.name = identity.name  # the one that the broker has given it
        self.shares = False  # workers of this host read this process's arena
        self.models: dict[str, dict[str, ModelState]] | None = None
        self.routes: dict[str, Route] = {}  # of these, as far as the broker has said
        self._view = dict[str, dict[str, ModelState]](), self.routes  # models and routes that belong together
        self.splits: dict[str, Split] = {}  # of those whose traffic goes to several versions
        self.repository = ""  # where models lie on the broker's host, if it has said
        self.told = 0  # how often the models have changed
        self._fresh = False  # the broker that has welcomed this caller has said them
        self._found: dict[tuple[str, str], ModelSpec] = {}  # what ``find`` has found, until the models change
        self.calls: dict[int, Call] = {}
        self._waiting: list[Call] = []
        self._acks: list[int] = []
        self._cancels: list[int] = []
        self._acknowledge_at = float("inf")
        self._sweep_at = 0.0
        self._last_id = 0
        self._sent_id = 0  # of the last that any broker has been sent
        self._last_serial = 0
        self._workers: dict[bytes, WorkerAddress] = {}  # those that the broker has named
        self._names: dict[bytes, str] = {}  # of those, and of those that it named before
        self._left: dict[bytes, WorkerAddress] = {}  # those that it names no more, and that are still heard
        self._orders: set[int] = set()  # that no answer has come to
        self._told: Sequence[ModelState] = ()  # by this broker, or by the one before while it has said nothing
        self._remembered: set[bytes] = set()  # workers of the broker before this one that were heard
        self._remember_until = _NEVER  # what it said counts
        self._endpoints: set[str] = set()  # of those that are heard
        self._arenas: dict[bytes, Arena] = {}  # by worker
        self._arrivals: Arrivals[Arena] = Arrivals()
        self._sharing: dict[bytes, int] = {}  # workers whose arena this broker gives, and as which introduction
        # Results that are still read in their worker's memory, and whose that is. The broker gives no more to a worker
        # that keeps unacknowledged_bytes_max for this caller.
        self._held: dict[int, bytes] = {}
        self._commands: list[Command] = []

    # --- what the shell asks for ---

    def submit(self, form: Form, payload: Payload, timeout_s: float, sink: Sink, now: float) -> int:
        """Take a request, which ``flush`` sends. Returns its id. Raises PenstockError when too many are under way."""
        if len(self.calls) >= self.identity.calls_max:
            raise PenstockError(OVERLOADED, f"{len(self.calls)} requests of this process are under way", 1.0)
        self._last_id = number = self._last_id + 1
        self.calls[number] = call = Call(number, form, payload, timeout_s, now + timeout_s, sink)
        self._waiting.append(call)
        return number

    def begin(
        self, form: Form, payload: Payload, timeout_s: float, sink: Sink, now: float
    ) -> tuple[int, tuple[int, ...]] | None:
        """As ``submit``, for a shell that sends the request itself, at once and alone. Its id, and the acknowledgments
        that are to go with it, as ranges. None when there is more to say, too much is under way, or no broker is there:
        then ``submit`` and ``flush`` do it."""
        calls, acks = self.calls, self._acks
        if (
            self._waiting
            or self._cancels
            or not self.membership.epoch
            or len(calls) >= self.identity.calls_max
            or len(acks) > MAX_REQUESTS
        ):
            return None
        self._last_id = self._sent_id = number = self._last_id + 1
        calls[number] = Call(number, form, payload, timeout_s, now + timeout_s, sink, SENT)
        if not acks:
            return number, ()
        self._acks, self._acknowledge_at = [], _NEVER
        return number, (acks[0], acks[0]) if len(acks) == 1 else ranges(sorted(set(acks)))

    def finish(self, number: int, now: float) -> Call | None:
        """A result of few bytes has come for a request: end it, if it waits for that. Its acknowledgment may travel
        with the next request, which comes soon where requests come one after another."""
        call = self.calls.get(number)
        if call is None or call.state == WAITING:
            return None
        del self.calls[number]
        call.state = ENDED
        if self.membership.epoch:
            self._acks.append(number)
            if self._acknowledge_at == _NEVER:
                self._acknowledge_at = now + _ACKNOWLEDGE_LONE_S
        return call

    def cancel(self, number: int) -> None:
        """Nobody wants the result of a request any more; its sink is not called."""
        call = self.calls.pop(number, None)
        if call is None:
            return
        if call.state == SENT:
            self._cancels.append(number)
        call.move("end")

    def release(self, held: int, now: float) -> None:
        """A result that lies in its worker's memory is not read any more: ``held`` of its Complete."""
        self._held.pop(held, None)
        if self.membership.joined:  # else the worker publishes it again, which is then acknowledged
            self._acks.append(held)
            if now + _ACKNOWLEDGE_S < self._acknowledge_at:
                self._acknowledge_at = now + _ACKNOWLEDGE_S

    def close(self) -> None:
        """Nothing more is heard. Results that are still read stay where they are until they are not."""
        self._arrivals.clear()
        self._arenas.clear()

    def ask_metrics(self) -> tuple[int, Say]:
        """What to say to get the whole server's metrics, and the serial that the answer will have."""
        self._last_serial += 1
        return self._last_serial, Say(Ask(self.membership.epoch, self._last_serial))

    def order(self, action: str, model: str, config: str = "") -> tuple[int, Say]:
        """What to say to have the server load a model, or serve it no more (LOAD, UNLOAD), and the serial that the
        OrderDone will have which comes of it."""
        self._last_serial += 1
        self._orders.add(self._last_serial)
        return self._last_serial, Say(Order(self.membership.epoch, self._last_serial, action, model, config))

    def find(self, name: str, version: str = "", sticky: str = "") -> ModelSpec:
        """What callers need to know of a model's version, which may be a label. "": where its traffic goes, to the same
        version for the same ``sticky`` as long as that is served; else the one that is current. Raises
        PenstockError."""
        found = self._found  # the client library asks from other threads, while ``_set_models`` begins a new one
        spec = found.get((name, version))
        if spec is None:
            picked = self.pick(name, version, sticky)
            spec = found.get((name, picked)) or self._search(name, picked)
            if picked or name not in self.splits:
                found[name, picked] = spec
        return spec

    def pick(self, name: str, version: str = "", sticky: str = "") -> str:
        """The version to ask for: ``version`` if there is one, else by the model's traffic, behind UNNAMED. To be asked
        once for each request: the parts are exact."""
        split = None if version else self.splits.get(name)
        if split is None:
            return version
        route = self.routes.get(name)
        picked = split.pick(sticky) or (route.versions[0] if route is not None and route.versions else "")
        return UNNAMED + picked if picked else ""

    def state(self, name: str, version: str = "") -> ModelState | None:
        """How a version fares, which may be a label, or "": the one that is current. None: there is none."""
        models, routes = self._view
        versions, route = models.get(name, {}), routes.get(name)
        if version:
            return versions.get(version) or versions.get(dict(route.labels).get(version, "") if route else "")
        if route is not None:
            return versions.get(route.versions[0]) if route.versions else None
        served = [each for each, state in versions.items() if state.state in SERVED]
        return versions[newest(served or list(versions))] if versions else None

    def _search(self, name: str, version: str) -> ModelSpec:
        if self.models is None:
            raise PenstockError(UNAVAILABLE, f"no broker answers at {self.identity.address} yet", 1.0)
        if not (self.models or self.repository):  # of which a worker tells
            raise PenstockError(UNAVAILABLE, "no worker has joined this server yet; try again shortly", 1.0)
        is_unnamed = not version or version.startswith(UNNAMED)
        state = self.state(name, version.removeprefix(UNNAMED))
        if state is None:
            which = f"'{name}' version {version}" if version and name in self.models else f"'{name}'"
            raise PenstockError(NOT_FOUND, f"Request for unknown model: {which} is not found")
        if state.spec is None:
            raise PenstockError(UNAVAILABLE, f"model '{name}' is not ready ({state.state}): {state.reason}", 1.0)
        return Unnamed(*state.spec) if is_unnamed else state.spec

    def worker_name(self, worker: bytes) -> str:
        """What a worker that has answered is called; its id where the broker has not said."""
        return self._names.get(worker) or worker.hex()

    def is_ready(self) -> bool:
        """Whether every model of the server can be asked, in one version at least. There may be none, where workers
        serve what they are ordered to."""
        return self.membership.joined and self._fresh and bool(self.models or self.repository) and not self.unserved()

    @property
    def is_told(self) -> bool:
        """Whether the broker that has welcomed this caller has said which models there are, so that it would say when
        they change."""
        return self._fresh

    def unserved(self) -> list[ModelState]:
        """The versions of models of which none can be asked."""
        return [
            state
            for versions in (self.models or {}).values()
            if not any(each.state in SERVED for each in versions.values())
            for state in versions.values()
        ]

    def flush(self, now: float) -> list[Submit]:
        """Messages for all that there is to say about requests; none while no broker has welcomed this caller."""
        if not self.membership.joined:
            return []
        self._acknowledge_at = float("inf")
        waiting, self._waiting = self._waiting, []
        acks, self._acks = self._acks, []
        cancels, self._cancels = self._cancels, []
        messages = []
        if len(waiting) <= MAX_REQUESTS and len(acks) <= MAX_REQUESTS and len(cancels) <= MAX_REQUESTS:
            messages.append(self._as_message(waiting, acks, cancels, now))
        else:
            for at in range(0, max(len(waiting), len(acks), len(cancels)), MAX_REQUESTS):
                part = slice(at, at + MAX_REQUESTS)
                messages.append(self._as_message(waiting[part], acks[part], cancels[part], now))
        return messages

    def due(self) -> float:
        """When the next Tick is needed even if nothing happens before."""
        sweep = self._sweep_at if self.calls or self._left else float("inf")
        return min(self.membership.due(), self._acknowledge_at, sweep, self._remember_until)

    @property
    def has_news(self) -> bool:
        """Whether ``flush`` has anything to say, however little that may hurry."""
        return bool(self._waiting or self._acks or self._cancels)

    def wants_flush(self, now: float) -> bool:
        wants = bool(self._waiting or self._cancels) or now >= self._acknowledge_at
        return wants and self.membership.joined

    def handle(self, event: Event, now: float) -> list[Command]:
        """What follows from an event. Raises nothing that a peer could cause."""
        match event:
            case FromWorker(message):
                self._results(message, now)
            case FromBroker(message):
                self._from_broker(message, now)
            case ArenaCame(worker, serial, arena, reason):
                if arena is None:
                    self._log("error", "a worker's memory cannot be read; it is not heard", reason=reason)
                else:
                    self._arena_came(worker, self._arrivals.came(worker, serial, arena))
            case BrokerFound():
                self.membership.found()
            case BrokerLost(reason, expected):
                self._arrivals.clear()
                self._lost(reason, "info" if expected else "warning")
            case Garbage(process, reason):
                self.meters.value("penstock_bad_messages", process).value += 1
                self._log("warning", "bad message dropped", process=process, reason=reason)
            case Tick():
                self._tick(now)
            case _:
                raise AssertionError(f"unexpected event {event!r}")
        commands, self._commands = self._commands, []
        return commands

    def validate(self) -> None:
        """Derive again what can be, for tests. Raises AssertionError."""
        joined, calls = self.membership.joined, self.calls
        assert not self._commands, "commands were left behind"
        for number, call in calls.items():
            assert number == call.id <= self._last_id, call
            assert call.state in (WAITING, SENT, AGAIN), call
            assert joined or call.state != SENT, f"{call}, and no broker has it"
            assert (call.state == WAITING) == (number > self._sent_id), f"{call}, and {self._sent_id} was sent"
            assert len(call.payload) == call.form.nbytes, f"{call} could not be sent again"
        waiting = [call.id for call in self._waiting if call.state in (WAITING, AGAIN)]
        assert waiting == [call.id for call in calls.values() if call.state != SENT] == sorted(waiting)
        assert calls.keys().isdisjoint(self._cancels), "a request that is cancelled is still waited for"
        assert joined or not (self._acks or self._cancels), "nobody is there to be told"
        assert calls.keys().isdisjoint(self._held), "a result is read, and still waited for"
        assert self._left.keys().isdisjoint(self._workers), "a worker has left, and is there"
        assert self._sharing.keys() <= self._workers.keys(), "a worker shares, and is not known"
        heard = {self._workers[worker].endpoint for worker in self._sharing.keys() & self._arenas.keys()}
        assert heard <= self._endpoints, "a worker is not heard whose results can be read"
        assert bool(self._acks) == (self._acknowledge_at < float("inf"))
        for (name, version), spec in self._found.items():
            searched = self._search(name, version)
            assert (type(spec), spec) == (type(searched), searched), f"'{name}' has changed"

    # --- what comes ---

    def _results(self, message: Results, now: float) -> None:
        calls, commands = self.calls, self._commands
        # A broker that does not know this caller has nothing to be told, and neither has the next one.
        acks = self._acks if self.membership.joined else []
        for group, start in zip(message.groups, message.starts, strict=True):
            status, size, body, queue_us, ids, places, held_us = group
            copies: Sequence[bytes] | None = None
            if places and status == COMPLETE:
                arena = self._arenas.get(message.worker) if size <= self.identity.copied_bytes_max else None
                copies = None if arena is None else arena.copies(places, size)
                if copies is None:
                    self._placed(message, group, acks)
                    continue
            if status != PARTIAL:  # to acknowledge that would end the request
                acks += ids
            if status == FAILED:
                self._failures(ids, body)
                continue
            for at, number in enumerate(ids):
                call = calls.get(number)
                if call is None or call.state == WAITING:
                    continue
                if status == PARTIAL:
                    call.move("partial")
                    continue
                del calls[number]
                call.move("end")
                payload: Payload
                if copies is not None:
                    payload = copies[at]
                elif size <= INLINE_MAX_BYTES:
                    begin = start + at * size
                    payload = message.blob[begin : begin + size]
                else:
                    payload = message.frames[start + at]
                commands.append(Complete(call.sink, body, payload, message.batch, queue_us, held_us, message.worker))
        if self._acks and self._acknowledge_at == float("inf"):
            self._acknowledge_at = now + _ACKNOWLEDGE_S

    def _placed(self, message: Results, group: Answers, acks: list[int]) -> None:
        """Results in their worker's memory: what is read there is acknowledged when it has been."""
        arena = self._arenas.get(message.worker)
        if arena is None:
            return  # its worker has gone, or comes anew: then it is heard, and publishes again, once its arena is here
        calls, held, commands = self.calls, self._held, self._commands
        _, nbytes, body, queue_us, ids, places, held_us = group
        batch, worker = message.batch, message.worker
        for number, place in zip(ids, places, strict=True):
            call = calls.get(number)
            if call is None or call.state == WAITING:
                if number not in held:
                    acks.append(number)
                continue
            try:
                payload = arena.view(place, nbytes)
            except BadMessage as error:
                acks.append(number)
                self._fail(number, PenstockError(INTERNAL, f"a worker's answer does not lie where it says: {error}"))
                continue
            del calls[number]
            call.move("end")
            held[number] = worker
            commands.append(Complete(call.sink, body, payload, batch, queue_us, held_us, worker, number))

    def _failures(self, ids: Sequence[int], body: bytes) -> None:
        try:
            code, sentence, after_ms = unpack_failure(body)
        except BadMessage as error:
            code, sentence, after_ms = INTERNAL, f"a worker failed, and its reason cannot be read: {error}", 0
        for number in ids:
            self._fail_sent(number, PenstockError(code, sentence, after_ms / 1000))

    def _from_broker(self, message: Message, now: float) -> None:
        membership = self.membership
        match message:
            case Welcome(epoch=epoch):
                if membership.epoch not in (0, epoch):
                    self._lost("the broker restarted")
                if not membership.joined and (self._told or self._remembered):
                    self._remember_until = now + _REMEMBER_S
                membership.welcomed(epoch, now)
                self.meters.tell_all()
                self._arrivals.forget_all(message.serial)
                self.name, self.shares = message.name, message.shares
                self._log("debug", "joined the broker", name=message.name)
                return
            case HelloWanted(epoch=epoch):
                if membership.joined:
                    same = epoch == membership.epoch
                    self._lost("the broker took this process for gone" if same else "the broker restarted")
                    membership.found()
                return
        if message.epoch != membership.epoch:
            return
        membership.heard(now)
        match message:
            case Refusals(refusals=refusals):
                for number, code, sentence, after_ms in refusals:
                    self._fail_sent(number, PenstockError(code, sentence, after_ms / 1000))
            case Models(models=models):
                self._fresh, self._told = True, models
                routes = {route.name: route for route in message.routes}
                before = self.routes if self._remember_until < _NEVER else {}
                self.repository = message.repository
                self._set_models(before | routes)
            case Ordered(serial=serial, failure=failure):
                if serial in self._orders:
                    self._order_done(serial, failure)
            case Workers(workers=workers):
                self._set_workers(workers)
            case Metrics():
                self._commands.append(Report(message))
            case Beat():
                pass
            case Bye():
                self._lost("the broker shut down", "info")
            case _:
                raise AssertionError(f"a broker does not send {message!r}")

    def _set_models(self, routes: dict[str, Route]) -> None:
        """Those that the broker has told, and for some time those that only the one before it had: requests for these
        wait there for a worker to come back."""
        known: dict[str, dict[str, ModelState]] = {}
        for state in self._told:
            known.setdefault(state.name, {})[state.version] = state
        if self._remember_until < _NEVER:
            for versions in (self.models or {}).values():
                for state in versions.values():
                    gone = state._replace(state=UNAVAILABLE_STATE, reason="the broker restarted; no worker has it yet")
                    known.setdefault(state.name, {}).setdefault(state.version, gone)
        routes = {name: route for name, route in routes.items() if name in known}
        splits = [split_of(route, known[name], self.splits.get(name)) for name, route in routes.items()]
        # Threads that ask for models meanwhile see all as it was, or all as it is.
        self._view = known, routes
        self.models, self.routes = self._view
        self.splits = {split.name: split for split in splits if split is not None}
        self._found = {}
        self.told += 1  # last: what another thread has made of what was before is made again

    def _order_done(self, serial: int, failure: Failure | None) -> None:
        self._orders.discard(serial)
        error = None if failure is None else PenstockError(*failure[:2], failure.retry_after_ms / 1000)
        self._commands.append(OrderDone(serial, error))

    def _remember_no_more(self) -> None:
        self._remember_until = _NEVER
        self._remembered.clear()
        if self._fresh:
            self._set_models(self.routes)
        self._hear_workers()

    def _set_workers(self, workers: Sequence[WorkerAddress]) -> None:
        """Whoever shares its arena is heard once that has come: so its results can always be read."""
        self._left |= self._workers
        # Also of those that have just left: their last answers may still be on the way.
        self._names = {address.worker: address.name for address in (*self._workers.values(), *workers)}
        self._workers = {address.worker: address for address in workers}
        before, self._sharing = self._sharing, {each.worker: each.arena for each in workers if each.arena}
        for worker, serial in before.items():
            if worker not in self._sharing:
                self._arrivals.forget(worker, serial)
        for worker, serial in self._sharing.items():
            if before.get(worker) != serial:
                arena = self._arrivals.announced(worker, serial)
                if arena is not None:
                    self._arenas[worker] = arena
        self._hear_workers()

    def _arena_came(self, worker: bytes, arena: Arena | None) -> None:
        if arena is not None and worker in self._sharing:
            self._arenas[worker] = arena
            self._hear_workers()

    def _hear_workers(self) -> None:
        """Also those that the broker names no more, or not yet: as long as a result is read in their memory, since by
        this connection they know that its reader lives; and as long as they may be about to join a new broker, since
        they run what the last one gave them."""
        read = set(self._held.values())
        kept = read | self._remembered
        left = kept - self._workers.keys()
        self._left = {worker: address for worker, address in self._left.items() if worker in left}
        for worker in self._arenas.keys() - self._sharing.keys() - kept:
            del self._arenas[worker]
        heard = [
            address
            for worker, address in self._workers.items()
            if worker in read or worker in self._arenas or not address.arena
        ]
        endpoints = {address.endpoint for address in (*heard, *self._left.values())}
        self._commands += [Hear(endpoint, True) for endpoint in sorted(endpoints - self._endpoints)]
        self._commands += [Hear(endpoint, False) for endpoint in sorted(self._endpoints - endpoints)]
        self._endpoints = endpoints

    def _lost(self, reason: str, level: str = "warning") -> None:
        """The broker that had the requests knows them no more: they wait for the next, before those that were not sent
        yet. Acknowledgments need not: what workers keep they publish again once the next broker knows this caller."""
        if self.membership.joined:
            self._log(level, "broker gone; looking for it", reason=reason)
        self.membership.lost()
        self._fresh = False
        for serial in sorted(self._orders):
            gone = Failure(
                UNAVAILABLE, "the broker went before the models were loaded; 'penstock models ls' has them", 0
            )
            self._order_done(serial, gone)
        for call in self.calls.values():
            if call.state == SENT:
                call.move("lose")
        self._waiting = list(self.calls.values())
        heard = self._workers.items()
        self._remembered |= {worker for worker, address in heard if address.endpoint in self._endpoints}
        self._remember_until = _NEVER  # it begins when the next broker is there
        self._sharing = {}
        self._acks.clear()
        self._cancels.clear()
        self._acknowledge_at = float("inf")

    def _tick(self, now: float) -> None:
        if now >= self._remember_until:
            self._remember_no_more()
        if now >= self._sweep_at:
            self._sweep_at = now + _SWEEP_S
            if self._left:
                self._hear_workers()
            latest = now - _LATE_S
            for call in [call for call in self.calls.values() if call.deadline < latest]:
                self._expire(call)
            # They wait while there is no broker, and while it takes nothing (see Link.flush).
            self._waiting = [call for call in self._waiting if call.state != ENDED]
        match self.membership.say(now):
            case "hello":
                identity = self.identity
                self._say(CallerHello(0, identity.name, identity.pid, identity.local, self._sent_id))
            case "beat":
                self._say(Beat(self.membership.epoch))
            case "lost":
                self._lost("the broker fell silent")

    def _expire(self, call: Call) -> None:
        # Less what the client library took to build the request, which need not be told.
        limit = f"{round(call.timeout_s, 2 if call.timeout_s > 0.1 else 3):g} s"
        if call.state == AGAIN:
            sentence = f"the broker at {self.identity.address} went, and no other answered within the request's {limit}"
            error = PenstockError(UNAVAILABLE, sentence, 1.0)
        elif call.state == WAITING and not self.membership.joined:
            sentence = (
                f"no Penstock broker answered at {self.identity.address} within {limit}; "
                "is 'penstock up' running there, and as the same user?"
            )
            error = PenstockError(UNAVAILABLE, sentence)
        else:
            error = PenstockError(DEADLINE, f"no result for model '{call.form.model}' within {limit}")
            if call.state == SENT:
                self._cancels.append(call.id)
        self._fail(call.id, error)

    def _fail_sent(self, number: int, error: PenstockError) -> None:
        """A peer says that a request has failed: it cannot speak of one that it has never seen."""
        call = self.calls.get(number)
        if call is not None and call.state != WAITING:
            self._fail(number, error)

    def _fail(self, number: int, error: PenstockError) -> None:
        call = self.calls.pop(number, None)
        if call is not None:
            call.move("end")
            self._commands.append(Fail(call.sink, error))

    # --- what goes ---

    def _as_message(self, calls: list[Call], acks: list[int], cancels: list[int], now: float) -> Submit:
        by_form: dict[int, list[Call]] = {}
        for call in calls:
            if call.state == ENDED:
                continue  # cancelled, answered by a worker, or out of time, before it went
            call.move("send")
            group = by_form.get(id(call.form))
            if group is None:
                by_form[id(call.form)] = [call]
            else:
                group.append(call)
        groups: list[Requests] = []
        inline: list[Payload] = []
        frames: list[Payload] = []
        for same in by_form.values():
            form = same[0].form
            if form.nbytes >= PLACED_MIN_BYTES:
                same = self._add_placed(same, groups, now)
                if not same:
                    continue
            groups.append(_group(same, now))
            if form.nbytes < PLACED_MIN_BYTES:
                inline += [call.payload for call in same]
            else:
                into = inline if form.nbytes <= INLINE_MAX_BYTES else frames
                into += [call.payload.view if isinstance(call.payload, Placed) else call.payload for call in same]
        if calls and calls[-1].id > self._sent_id:
            self._sent_id = calls[-1].id
        epoch = self.membership.epoch
        # A set: what a worker publishes again must not stand twice in what becomes ranges.
        return Submit(epoch, groups, ranges(sorted(set(acks))), cancels, blob=b"".join(inline), frames=frames)

    def _add_placed(self, calls: list[Call], groups: list[Requests], now: float) -> list[Call]:
        """Add the group of those whose payload stays where it lies, and return the others."""
        stay: list[Call] = []
        travel: list[Call] = []
        for call in calls:
            (stay if self.shares and isinstance(call.payload, Placed) else travel).append(call)
        if stay:
            groups.append(_group(stay, now, tuple([call.payload.place for call in stay])))
        return travel

    def _say(self, message: Message) -> None:
        self._commands.append(Say(message))

    def _log(self, level: str, event: str, **fields: Any) -> None:
        self._commands.append(Log(level, event, fields))


def _group(calls: Sequence[Call], now: float, places: tuple[int, ...] = ()) -> Requests:
    """Calls of one form as they travel."""
    ids = tuple([call.id for call in calls])
    # Late ones go too, with the least time there is: the broker's refusal says why.
    timeouts = tuple([max(1, int((call.deadline - now) * 1e6)) for call in calls])
    return Requests(calls[0].form, ids, timeouts, places)
