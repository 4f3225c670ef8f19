"""The broker's decisions: what happens comes in as events, what to do goes out as commands.

No socket, clock or thread: ``handle(event, now)`` is all there is, so that every interleaving can be written down as a
test. Requests that arrive between two ticks are assigned together at the second, which keeps messages few.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from typing import Final

from penstock.broker.assign import Assigner
from penstock.broker.catalog import Catalog
from penstock.broker.events import (
    Came,
    Command,
    End,
    Event,
    FromCaller,
    FromWorker,
    Gone,
    Share,
    Sweep,
    ToCaller,
    ToWorker,
)
from penstock.broker.ledger import Ledger
from penstock.broker.lots import Lot
from penstock.broker.names import Names
from penstock.broker.options import BrokerOptions
from penstock.broker.peers import CallerPeer, WorkerPeer
from penstock.broker.registry import Registry
from penstock.wire.events import Drain, Garbage, Log, Tick
from penstock.wire.messages import (
    INLINE_MAX_BYTES,
    MAX_REQUESTS,
    Ask,
    Assign,
    Attached,
    Beat,
    Bye,
    CallerHello,
    Costs,
    Done,
    Expect,
    Expected,
    Forgotten,
    HelloWanted,
    Hung,
    Leaving,
    Message,
    Metrics,
    Order,
    Payload,
    Ping,
    Pong,
    Refusals,
    Snapshot,
    Submit,
    Tasks,
    Welcome,
    WorkerAddress,
    WorkerHello,
    WorkerModels,
    Workers,
)
from penstock.wire.metrics import Meters

_SWEEP_S: Final = 2.0  # between two looks at what need not be exact; each wakes an idle broker
_LOOK_S: Final = 0.02  # between two looks at workers that have work, at least
_AWAY_S: Final = 0.2  # a look that is later than that: this process was stopped, or starved
_SETTLE_S: Final = 0.25  # a dead process's files are all closed by then
_REFUSALS: Final = 256  # in a message: some ten KB, since what waits for a caller is counted by messages
_BROKER: Final = "broker"  # its name among the peers'


class Core:
    """One epoch of the broker. Times are seconds of the caller's monotonic clock."""

    def __init__(self, options: BrokerOptions, epoch: int, now: float) -> None:
        self.options = options
        self.epoch = epoch
        self.callers: dict[bytes, CallerPeer] = {}
        self.workers: dict[bytes, WorkerPeer] = {}
        self._names = Names(_BROKER)
        self.registry = Registry(options.models_max, options.tenant_weights, now + options.unserved_grace_s, epoch)
        self.meters = Meters()
        self._assigner = Assigner()
        self.ledger = Ledger(options, self.registry, self._assigner, self.meters, self.workers)
        self._arenas: dict[bytes, int] = {}  # bytes of each one's, by the peers that have a control connection
        self._serial = 0  # of the last introduction of one peer to another
        self._assign_from = now + options.rejoin_grace_s
        self._open = False  # that time has come
        self._workers_changed = False
        self._left_behind = False  # a worker has gone, perhaps without removing its socket
        self._free_at = float("inf")  # when acknowledgments travel even if no work does
        self._sweep_at = now
        self._look_at = float("inf")  # when workers that have work are looked at; never while none has
        self._commands: list[Command] = []
        self._catalog = Catalog(epoch, self.registry, self.callers, self.workers, self._do)

    def _do(self, command: Command) -> None:
        self._commands.append(command)

    def handle(self, event: Event, now: float) -> list[Command]:
        """What follows from an event. Raises nothing that a peer could cause."""
        match event:
            case FromCaller(peer, message):
                self._from_caller(peer, message, now)
            case FromWorker(peer, message):
                self._from_worker(peer, message, now)
            case Tick():
                self._tick(now)
            case Came(peer, arena_bytes):
                found = arena_bytes > 0 and self._arenas.get(peer) == 0
                self._arenas[peer] = arena_bytes
                if found:
                    self._arena_found(peer)
            case Gone(peer, reason, disconnected):
                if disconnected:
                    self._arenas.pop(peer, None)
                self._gone(peer, reason, now)
            case Garbage(process, reason, peer):
                self.meters.value("penstock_bad_messages", process).value += 1
                self._log("warning", "bad message dropped", process=process, peer=peer.hex(), reason=reason)
                if process == "control":  # its connection was closed, and its arena let go of
                    self._arenas.pop(peer, None)
                    self._gone(peer, reason, now)
            case Drain():
                self.ledger.draining = True
            case End():
                self._send_refusals()
                self._commands += [ToCaller(number, Bye(self.epoch)) for number in self.callers]
                self._commands += [ToWorker(number, Bye(self.epoch)) for number in self.workers]
            case _:
                raise AssertionError(f"unexpected event {event!r}")
        commands, self._commands = self._commands, []
        return commands

    def due(self) -> float:
        """When the next Tick is needed even if nothing happens before."""
        grace = float("inf") if self._open else self._assign_from
        looks = self._sweep_at, self._look_at, self._free_at, self._catalog.due()
        return min(grace, *looks, self.ledger.next_deadline)

    # --- callers ---

    def _from_caller(self, peer: bytes, message: Message, now: float) -> None:
        caller = self.callers.get(peer)
        if isinstance(message, CallerHello):
            self._caller_hello(peer, message, now)
            return
        if caller is None or message.epoch != self.epoch:
            self._commands.append(ToCaller(peer, HelloWanted(self.epoch)))
            return
        caller.heard = now
        match message:
            case Submit():
                self.ledger.submit(caller, message, now)
            case Beat():
                if caller.name:
                    caller.series.take(message.samples, message.whole)
                self._commands.append(ToCaller(peer, Beat(self.epoch)))
            case Ask(serial=serial):
                self._commands.append(ToCaller(peer, Metrics(self.epoch, serial, self._snapshots())))
            case Order():
                self._log("info", "models ordered", action=message.action, model=message.model, caller=caller.name)
                self._catalog.order(caller, message, now)
            case Bye():
                self._caller_gone(caller)
            case _:
                raise AssertionError(f"a caller does not send {message!r}")

    def _caller_hello(self, peer: bytes, hello: CallerHello, now: float) -> None:
        before = self.callers.get(peer)
        if before is not None:
            self._caller_gone(before)
        if len(self.callers) >= self.options.callers_max:
            self._log("error", "caller turned away: too many are connected", limit=self.options.callers_max)
            return
        name = self._names.take(hello.name) if hello.name else ""
        # What workers still hold of it, it may send again.
        held = [max(worker.held[peer]) for worker in self.workers.values() if peer in worker.held]
        sent = max([hello.sent or -1, *held])
        caller = self.callers[peer] = CallerPeer(peer, name, hello.local, self._arenas.get(peer, 0), now, sent)
        self._commands.append(ToCaller(peer, Welcome(self.epoch, name, caller.arena_bytes > 0, self._serial)))
        self._log("info" if name else "debug", "caller joined", name=name, caller=peer.hex(), pid=hello.pid)
        for worker in self.workers.values():
            self._expect(worker, [caller])
        self._tell_workers(caller)
        self._catalog.caller_came(caller)

    def _caller_gone(self, caller: CallerPeer) -> None:
        del self.callers[caller.id]
        if caller.name:
            self._names.free(caller.name)
        self.ledger.caller_gone(caller)
        self._catalog.caller_gone(caller)
        for worker in self.workers.values():
            worker.forget_caller(caller.id)
            gone = Forgotten(caller.id, self._serial)
            self._commands.append(ToWorker(worker.id, Expect(self.epoch, (), (gone,))))
        self._log("info" if caller.name else "debug", "caller left", name=caller.name, caller=caller.id.hex())

    def _expect(self, worker: WorkerPeer, callers: Iterable[CallerPeer]) -> None:
        """Tell a worker of callers, once it has been given their arenas."""
        introduced = []
        for caller in callers:
            self._serial += 1
            worker.expected[caller.id] = self._serial
            worker.callers.discard(caller.id)  # who was there, and has an arena only now, is attached anew
            shares, reads = caller.arena_bytes > 0 and worker.id in self._arenas, self._reads(caller.id, worker)
            if shares:
                self._commands.append(Share(caller.id, worker.id, self._serial))
            if reads:
                worker.readers.add(caller.id)
            introduced.append(Expected(caller.id, self._serial, shares, reads))
        self._commands.append(ToWorker(worker.id, Expect(self.epoch, introduced)))

    def _arena_found(self, peer: bytes) -> None:
        """Memory that was not there when a peer came. All who may read it are given it, as if it had just come; what it
        has asked, or was given, goes on."""
        caller, worker = self.callers.get(peer), self.workers.get(peer)
        if caller is not None:
            caller.arena_bytes = self._arenas[peer]
            for reader in self.workers.values():
                if reader.id in self._arenas:
                    self._expect(reader, [caller])
            self._commands.append(ToCaller(peer, Welcome(self.epoch, caller.name, True)))
        if worker is not None:
            readers = [each for each in self.callers.values() if each.id in self._arenas]
            self._expect(worker, readers)
            for each in readers:
                self._tell_workers(each)

    def _reads(self, caller: bytes, worker: WorkerPeer) -> bool:
        """Whether a caller can be given a worker's arena."""
        return caller in self._arenas and self._arenas.get(worker.id, 0) > 0

    def _tell_workers(self, caller: CallerPeer) -> None:
        """Where a caller hears workers, once it has been given their arenas."""
        addresses, given = [], caller.given
        caller.given = {}
        for worker in self.workers.values():
            endpoint = worker.endpoint_for(caller)
            if not endpoint:
                continue
            arena = 0
            if caller.id in worker.readers:
                arena = given.get(worker.id, 0)
                if not arena:
                    self._serial = arena = self._serial + 1
                    self._commands.append(Share(worker.id, caller.id, arena))
                caller.given[worker.id] = arena
            addresses.append(WorkerAddress(worker.id, endpoint, arena, worker.name))
        self._commands.append(ToCaller(caller.id, Workers(self.epoch, addresses)))

    # --- workers ---

    def _from_worker(self, peer: bytes, message: Message, now: float) -> None:
        worker = self.workers.get(peer)
        if isinstance(message, WorkerHello):
            self._worker_hello(peer, message, now)
            return
        if worker is None or message.epoch != self.epoch:
            self._commands.append(ToWorker(peer, HelloWanted(self.epoch)))
            return
        worker.heard = now
        worker.spoke = True
        match message:
            case Done(done=done):
                self.ledger.done(worker, done, now)
            case Costs(costs=costs):
                worker.learn(costs)
                for cost in costs:
                    queue = self.registry.queues.get((cost.model, cost.version))
                    if queue is not None:
                        queue.learn(worker)
                        queue.measured = now
                        self._assigner.worker_changed(queue)
                self._assigner.room_came(worker)
            case Pong():
                pass  # it was heard
            case Hung(stuck=stuck, reason=reason):
                self._worker_gone(worker, reason, now, self.ledger.stuck(worker, stuck))
            case Beat():
                worker.series.take(message.samples, message.whole)
                self._commands.append(ToWorker(peer, Beat(self.epoch)))
            case Attached(caller=number, serial=serial, attached=attached):
                if worker.expected.get(number) != serial:
                    pass  # of a caller that has gone, or has come again: not yet heard of there
                elif attached:
                    worker.callers.add(number)
                    self._assigner.room_came(worker)
                else:
                    worker.callers.discard(number)
            case WorkerModels():
                rests = [key for key in worker.falls_asleep(message) if key in self.registry.queues]
                self._declare(worker, now, worker.change_models(message))
                self._resize(worker, message.instances)
                self._catalog.heard(worker, message.heard)
                if rests:
                    self._catalog.rest(worker, rests)
                    self.ledger.look_for_asleep(rests)
            case Leaving():
                worker.leaving = True
                self._declare(worker, now)
                self._log("info", "worker is leaving", worker=worker.name)
            case Bye():
                self._worker_gone(worker, "", now, ())
            case _:
                raise AssertionError(f"a worker does not send {message!r}")

    def _worker_hello(self, peer: bytes, hello: WorkerHello, now: float) -> None:
        before = self.workers.get(peer)
        # Those that it said while it was cut off come in one go: it holds nothing yet, and nothing is lost.
        repeated = before is not None and not before.spoke
        if before is not None:
            self._worker_gone(before, "" if repeated else "it started over", now, ())
        self.ledger.pardon(peer)
        if len(self.workers) >= self.options.workers_max:
            self._log("error", "worker turned away: too many are connected", limit=self.options.workers_max)
            return
        name = self._names.take(hello.name or hello.device)
        worker = WorkerPeer(
            peer,
            name,
            hello.device,
            hello.endpoints,
            hello.instances,
            self.options.unacknowledged_bytes_max,
            now,
        )
        self.workers[peer] = worker
        worker.set_models(hello.models, hello.routes)
        worker.control, worker.repository = hello.control, hello.repository
        self._commands.append(ToWorker(peer, Welcome(self.epoch, name, self._arenas.get(peer, 0) > 0, self._serial)))
        self._expect(worker, self.callers.values())
        if not repeated:
            self._log("info", "worker joined", worker=name, device=hello.device, pid=hello.pid)
        self._workers_changed = True
        self._declare(worker, now)
        self._catalog.worker_came(worker, hello)

    def _worker_gone(self, worker: WorkerPeer, reason: str, now: float, ran: Collection[Lot] | None = None) -> None:
        """``ran``: requests that it may have died of; None: nobody knows which of those that it had not finished."""
        if ran is None:
            ran = self.ledger.unfinished(worker)
        del self.workers[worker.id]
        self._names.free(worker.name)
        self.registry.withdraw(worker, now)
        self._assigner.worker_went(worker)
        held = self.ledger.worker_gone(worker, ran, reason)
        self._catalog.worker_gone(worker)
        self._workers_changed = self._catalog.changed = True
        self._left_behind = True
        self._sweep_at = min(self._sweep_at, now + _SETTLE_S)
        if reason:
            self._log("warning", "worker lost", worker=worker.name, reason=reason, requests_held=held)
        elif worker.spoke:
            self._log("info", "worker left", worker=worker.name)

    def _declare(self, worker: WorkerPeer, now: float, names: Collection[str] | None = None) -> None:
        """``names``: of the models of which a worker says something new; None: of all."""
        gone = self.registry.declare(worker, now, names)
        self.ledger.look_through(worker.models)
        self._assigner.enlist(worker, self.registry.queues)
        if self.ledger.sequences:
            self.ledger.break_off(worker)
        for queue in gone:
            self.ledger.model_gone(queue)
            self.meters.forget(*queue.key)
        self._catalog.changed = True

    def _resize(self, worker: WorkerPeer, instances: int) -> None:
        """A worker runs more batches at once than it did."""
        if instances > worker.instances:
            self._assigner.grow(worker, instances)

    # --- time ---

    def _tick(self, now: float) -> None:
        if not self._open and now >= self._assign_from:
            self._open = True
            self._catalog.open()
        self.ledger.expire(now)
        if now >= self._sweep_at:
            if now - self._sweep_at > 1.0:
                self._was_away(now)
            self._sweep_at = now + _SWEEP_S
            self._drop_silent(now)
            if self._left_behind:
                # Not at once: the kernel closes a dead process's files one after another, its lock perhaps last.
                self._left_behind = False
                self._commands.append(Sweep())
            self.ledger.sweep(now)
        if now >= self._look_at:
            self._look_at_busy(now)
        if self._open:
            given = self._assigner.assign(now)
            self.ledger.hand_out(given, now)
            if given and self._look_at == float("inf"):
                self._look_at = now + self.options.ping_after_s
            if self._assigner.late:
                self.ledger.refuse_late(now)
            for worker, lots in given.items():
                for part in _messages(lots):
                    self._send_work(worker, part, now)
        self._send_news(now)
        if self.ledger.refusals:
            self._send_refusals()
        if self._workers_changed:
            self._workers_changed = False
            for caller in self.callers.values():
                self._tell_workers(caller)
        for queue in self.ledger.take_asleep():
            self._catalog.wake(queue, now, self.options.load_wait_max_s)
        self._catalog.tick(now)

    def _send_work(self, worker: WorkerPeer, lots: list[Lot], now: float) -> None:
        """One message: the work, and whatever else the worker has to hear."""
        groups: list[Tasks] = []
        inline: list[bytes] = []
        frames: list[Payload] = []
        overtaking = 0
        for lot in lots:
            overtaking += lot.overtakes
            waited_us = int((now - lot.accepted) * 1e6)
            timeouts_us = tuple([us - waited_us for us in lot.timeouts_us])
            if lot.due <= now:
                timeouts_us = tuple([max(0, us) for us in timeouts_us])
            places = lot.payload if lot.placed else ()
            groups.append(Tasks(lot.form, lot.caller.id, lot.attempt, waited_us, lot.ids, timeouts_us, places))
            if lot.placed:
                continue
            if lot.form.nbytes <= INLINE_MAX_BYTES:
                inline.append(lot.payload)
            else:
                frames += lot.payload
        freed, cancelled = worker.take_freed(), worker.take_cancelled()
        self.ledger.news.pop(worker, None)
        alone = bool(lots) and lots[0].suspect
        message = Assign(self.epoch, groups, freed, cancelled, overtaking, alone, blob=b"".join(inline), frames=frames)
        self._commands.append(ToWorker(worker.id, message))

    def _send_news(self, now: float) -> None:
        """What is urgent at once; freed results with the next work, or when they have waited long enough."""
        news = self.ledger.news
        if not news:
            self._free_at = float("inf")
            return
        waited = now >= self._free_at
        for worker in [worker for worker in news if waited or worker.has_urgent_news]:
            self._send_work(worker, [], now)
        if not news:
            self._free_at = float("inf")
        elif waited or self._free_at == float("inf"):
            self._free_at = now + self.options.free_delay_s

    def _send_refusals(self) -> None:
        refusals, self.ledger.refusals = self.ledger.refusals, {}
        for caller, refused in refusals.items():
            for at in range(0, len(refused), _REFUSALS):
                self._commands.append(ToCaller(caller.id, Refusals(self.epoch, refused[at : at + _REFUSALS])))
            for code, count in Counter([each.code for each in refused]).items():
                first = next(each for each in refused if each.code == code)
                self._log(
                    "warning",
                    "requests refused",
                    caller=caller.name or caller.id.hex(),
                    count=count,
                    request=f"{caller.id.hex()}:{first.id}",
                    code=code,
                    reason=first.message,
                )

    def _drop_silent(self, now: float) -> None:
        """Peers that have not been heard for too long. (On one host the end of a control connection tells sooner.)"""
        earliest = now - self.options.silence_max_s
        for peer in self._peers():
            if peer.heard < earliest:
                self._gone(peer.id, f"silent for {now - peer.heard:.1f} s", now)

    def _look_at_busy(self, now: float) -> None:
        """Workers that have work and say nothing. Such a one is asked whether it lives, and if it does not answer, what
        it has moves to others: a process that is stopped, or stuck in a model, leaves its control connection open. One
        that was thought lost in error joins anew; what it says of its work then comes too late."""
        options, at = self.options, float("inf")
        away = now - self._look_at > _AWAY_S
        for worker in list(self.workers.values()):
            if not worker.batches:
                continue
            if worker.pinged <= worker.heard and now >= worker.heard + options.ping_after_s:
                worker.pinged = now
                self._commands.append(ToWorker(worker.id, Ping(self.epoch)))
            if worker.pinged <= worker.heard:
                at = min(at, worker.heard + options.ping_after_s)
                continue
            if away:
                worker.pinged = now  # it may have answered, and not been read yet
            until = worker.pinged + options.busy_silence_max_s - options.ping_after_s
            if now < until:
                at = min(at, until, now + options.ping_after_s)  # when it may have answered, and be silent again
            else:
                self._worker_gone(worker, f"silent for {now - worker.heard:.1f} s while it had work", now)
        self._look_at = max(at, now + _LOOK_S)

    def _peers(self) -> list[CallerPeer | WorkerPeer]:
        return [*self.workers.values(), *self.callers.values()]

    def _was_away(self, now: float) -> None:
        """This process was itself stopped or starved: it cannot tell who was silent meanwhile."""
        for peer in self._peers():
            peer.heard = now

    def _gone(self, peer: bytes, reason: str, now: float) -> None:
        worker, caller = self.workers.get(peer), self.callers.get(peer)
        if worker is not None:
            self._worker_gone(worker, reason, now)
        if caller is not None:
            self._caller_gone(caller)

    # --- to be seen ---

    def _snapshots(self) -> Sequence[Snapshot]:
        value = self.meters.value
        value("penstock_workers").value = len(self.workers)
        value("penstock_callers").value = len(self.callers)
        value("penstock_held_bytes").value = self.ledger.bytes
        value("penstock_sequences").value = len(self.ledger.sequences)
        for key, queue in self.registry.queues.items():
            suspects = sum([len(lot.ids) for lot in queue.suspects])
            value("penstock_queue_requests", *key).value = queue.requests + suspects + len(queue.beside)
            value("penstock_load_waits", *key)  # from 0, so that the first one is seen
        running = self.ledger.running(self.callers.values())
        for key in self.registry.queues:
            value("penstock_running_requests", *key).value = running.get(key, 0)
        peers = [peer for peer in self._peers() if peer.name]
        return [
            Snapshot(_BROKER, self.meters.samples()),
            *(Snapshot(peer.name, peer.series.samples()) for peer in peers),
        ]

    def validate(self) -> None:
        """Derive every index and counter again, for tests. Raises AssertionError that says what is wrong."""
        assert not self._commands, "commands were left behind"
        self._names.validate([peer.name for peer in self._peers() if peer.name])
        workers = self.workers.values()
        for worker in workers:
            worker.validate()
            assert worker.callers <= self.callers.keys(), f"{worker.name} is heard by callers that have gone"
        self.ledger.validate(self.callers, self.workers)
        self.registry.validate(workers)
        self._assigner.validate(self.registry.queues.values(), workers)

    def _log(self, level: str, event: str, **fields: object) -> None:
        self._commands.append(Log(level, event, fields))


def _messages(lots: list[Lot]) -> list[list[Lot]]:
    """Work as it travels: at most MAX_REQUESTS requests in a message."""
    if sum([len(lot.ids) for lot in lots]) <= MAX_REQUESTS:
        return [lots]
    parts: list[list[Lot]] = []
    room = 0
    for lot in lots:
        room -= len(lot.ids)
        if room < 0:
            parts.append([])
            room = MAX_REQUESTS - len(lot.ids)
        parts[-1].append(lot)
    return parts
