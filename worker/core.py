"""A worker's decisions: events in, commands out; no socket, clock or thread.

It holds three things: requests that wait or run (the batcher's), results that their callers have not acknowledged
yet, and who hears them. A result is published once it is there, and again whenever its caller subscribes anew or has
not acknowledged it for long, so that a slow joiner, a reconnect and a lost message are one rule.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, Final

from penstock.wire.arrivals import Arrivals
from penstock.wire.codec import ids_in, pack
from penstock.wire.errors import BAD_INPUT, DEADLINE, UNAVAILABLE, BadMessage, PenstockError
from penstock.wire.events import Arena, ArenaCame, BrokerFound, BrokerLost, Drain, FromBroker, Garbage, Log, Say, Tick
from penstock.wire.lots import lots_of, pick, pick_payload
from penstock.wire.membership import Membership
from penstock.wire.messages import (
    INLINE_MAX_BYTES,
    MAX_PEERS,
    Assign,
    Attached,
    Beat,
    Bye,
    Done,
    Expect,
    Finished,
    Form,
    HelloWanted,
    Hung,
    Leaving,
    Loads,
    Message,
    Payload,
    Ping,
    Pong,
    Results,
    Stuck,
    Tasks,
    Unload,
    Wake,
    Welcome,
)
from penstock.wire.messages import Batch as BatchInfo
from penstock.wire.metrics import Meters
from penstock.wire.models import ModelState
from penstock.worker.batcher import Batch, Batcher, ModelKey
from penstock.worker.events import (
    Command,
    DeviceLost,
    Discard,
    Event,
    Followed,
    GiveUp,
    Grown,
    Loaded,
    Order,
    Publish,
    Renewing,
    Rested,
    Routed,
    Run,
    Subscribed,
    Tried,
    Unsubscribed,
    Unwanted,
)
from penstock.worker.execute import Executed, Publication, failure_answers
from penstock.worker.lots import RUNNING, WAITING, Lot
from penstock.worker.model import Model
from penstock.worker.options import MAX_COMPUTE_S
from penstock.worker.plan import Plan
from penstock.worker.serving import Identity, Serving

_PLANS_MAX: Final = 4096
_NO_BATCH: Final = BatchInfo(0, 0, "alone", 0, 0)
_AWAY_S: Final = 1.0  # a look at what computes that is later than that: this process was stopped
_NAMED_MAX: Final = 20  # requests of a batch that does not end, in the log


class Kept:
    """A published message of which its caller has not acknowledged every answer. It may be reading ``slots``.
    ``beats``: of this worker since."""

    __slots__ = ("beats", "frames", "head", "left", "nbytes", "slots")

    def __init__(self, head: bytes, publication: Publication) -> None:
        self.head = head
        self.frames = publication.frames
        self.slots = publication.slots
        self.left = 0  # answers that have not been acknowledged
        self.beats = 0
        placed = sum([group.nbytes * len(group.ids) for group in publication.groups if group.places])
        self.nbytes = len(head) + sum(map(len, self.frames)) + placed


class _Computing:
    """A batch that runs. ``runs``: how often it had begun at the last look; ``until``: when it is next."""

    __slots__ = ("batch", "began", "limit_s", "runs", "until")

    def __init__(self, batch: Batch, began: float, limit_s: float) -> None:
        self.batch = batch
        self.began = began
        self.limit_s = limit_s
        self.until = began + limit_s
        self.runs = 1


class Core:
    """One life of a worker. Times are seconds of the caller's monotonic clock."""

    def __init__(self, identity: Identity, models: Sequence[ModelState], max_compute_s: float = MAX_COMPUTE_S) -> None:
        """``max_compute_s``: of batches of models that say nothing of it; 0: for ever."""
        self.identity = identity
        self.membership = Membership(identity.local)
        self.meters = Meters()
        self.kept_bytes = 0
        self._batcher = Batcher()
        self.serving = Serving(identity, models, self._batcher, self.meters, max_compute_s)
        self._idle = identity.instances
        self._computing: dict[int, _Computing] = {}  # by serial
        self._lots: dict[bytes, dict[int, Lot]] = {}  # by caller: wait or run
        self._again: dict[bytes, dict[int, int]] = {}  # by caller: what runs and was assigned anew, as which attempt
        # By caller. The broker gives a caller no more of whom unacknowledged_bytes_max are kept, or who has
        # caller_requests_max.
        self._kept: dict[bytes, dict[int, Kept]] = {}
        self._callers: set[bytes] = set()  # those that the broker knows, and whose arena is here if they share one
        self._expected: dict[bytes, int] = {}  # those and others that the broker knows, and as which introduction
        self._readers: set[bytes] = set()  # those that read this worker's arena
        self._arenas: dict[bytes, Arena] = {}
        self._arrivals: Arrivals[Arena] = Arrivals()
        self._subscriptions: dict[bytes, int] = {}  # connections that hear a caller's topic
        self._plans: dict[Form, Plan] = {}
        self._done: list[Finished] = []
        self._commands: list[Command] = []

    @property
    def holds_nothing(self) -> bool:
        return not self._lots and not self._kept

    def may_subscribe(self, caller: bytes) -> bool:
        """Whether there is room for one more caller's topic."""
        return caller in self._subscriptions or len(self._subscriptions) < MAX_PEERS

    def handle(self, event: Event, now: float) -> list[Command]:
        """What follows from an event. Raises nothing that a peer or a model could cause."""
        match event:
            case FromBroker(message):
                self._from_broker(message, now)
            case Executed():
                self._executed(event, now)
            case Tick():
                self._look_at_computing(now)
            case ArenaCame(caller, serial, arena, reason):
                if arena is None:
                    self._log("error", "a caller's memory cannot be read; it is not served", reason=reason)
                else:
                    self._arena_came(caller, self._arrivals.came(caller, serial, arena))
            case Loaded(state, model):
                before = self.serving.find((state.name, state.version))
                if model is not None and before is not None:
                    self._forget_plans_of(before)
                self.serving.loaded(event, now)
            case Tried():
                self.serving.tried(event)
            case Renewing(name, version, on):
                self.serving.renewing((name, version), on)
            case Unwanted(name, version):
                self.serving.unwanted((name, version))
            case Rested(name, version):
                self.serving.rested((name, version))
            case Routed(route):
                self.serving.routed(route)
            case Followed():
                self.serving.followed(event, self.membership.epoch)
            case Grown(instances):
                self._idle += instances - self.serving.instances
                self.serving.grow(instances)
            case DeviceLost(reason):
                self.serving.lose_device(reason)
            case Subscribed(caller):
                self._subscribed(caller)
            case Unsubscribed(caller):
                self._unsubscribed(caller)
            case BrokerFound():
                self.membership.found()
            case BrokerLost(reason, expected):
                if self.membership.joined:
                    self._log("info" if expected else "warning", "broker gone; looking for it", reason=reason)
                self._arrivals.clear()
                self.membership.lost()
            case Garbage(process, reason):
                self.meters.value("penstock_bad_messages", process).value += 1
                self._log("warning", "bad message dropped", process=process, reason=reason)
            case Drain():
                self._say(Leaving(self.membership.epoch))
            case _:
                raise AssertionError(f"unexpected event {event!r}")
        self._start(now)
        released = self.serving.released()
        if released:
            for model in released:
                self._forget_plans_of(model)
            self._commands.append(Discard(released))
        self._speak(now)
        commands, self._commands = self._commands, []
        return commands

    @property
    def has_untold(self) -> bool:
        """Whether there is a broker, and it is yet to be told of models."""
        return self.membership.joined and self.serving.has_untold

    def due(self) -> float:
        """When the next Tick is needed even if nothing happens before."""
        due = self.membership.due()
        if self.membership.joined:
            due = min(due, self.serving.due())
        for each in self._computing.values():
            if each.until < due:
                due = each.until
        return min(due, self._batcher.due()) if self._idle else due

    def validate(self) -> None:
        """For tests: derive every index and counter anew. Raises AssertionError saying what is wrong."""
        self._batcher.validate()
        assert not self._commands, f"{self._commands} were not given out"
        assert not self._done, f"{self._done} were not said"
        idle, running = self._idle, self._batcher.running
        assert len(self._computing) == running, f"{running} batches run, and {len(self._computing)} are looked at"
        self.serving.validate()
        assert idle + running == self.serving.instances, f"{idle} instances are idle while {running} batches run"
        known: set[Lot] = set()
        for caller, index in self._lots.items():
            assert index, f"{caller!r} has an empty index of requests"
            for number, lot in index.items():
                assert number in lot.ids, f"{number} leads to {lot!r}"
                assert lot.caller == caller, f"{lot!r} is among those of {caller!r}"
                assert lot.index is index, f"{lot!r} is found in another index than its own"
                known.add(lot)
            ids = [number for lot in dict.fromkeys(index.values()) for number in lot.ids]
            assert sorted(ids) == sorted(index), f"requests {ids} of {caller!r} are indexed as {list(index)}"
            kept = index.keys() & self._kept.get(caller, {}).keys()
            assert not kept, f"results {kept} of {caller!r} are kept while the requests have not ended"
        waiting = {lot for lot in known if lot.state == WAITING}
        assert waiting == set(self._batcher.waiting()), "what waits is not what the batcher has"
        assert waiting == {lot for lot in known if lot.state != RUNNING}, f"of {known} some have ended"
        assert running or known == waiting, f"no batch runs, and of {known} some do"
        self._validate_kept()

    def _validate_kept(self) -> None:
        nbytes = 0
        for caller, held in self._kept.items():
            assert held, f"{caller!r} has an empty index of results"
            lives = caller in self._expected or caller in self._subscriptions
            assert lives, f"results are kept for {caller!r}, which has gone"
            for kept, left in Counter(held.values()).items():
                assert kept.left == left, f"{left} answers of a message are kept, and {kept.left} are counted"
                nbytes += kept.nbytes
        assert self._callers <= self._expected.keys(), "a caller is served that the broker does not know"
        assert self._arenas.keys() <= self._callers, "an arena is held of a caller that has gone"
        assert self.kept_bytes == nbytes, f"{nbytes} bytes are kept, and {self.kept_bytes} are counted"
        assert all(count > 0 for count in self._subscriptions.values()), f"subscriptions are {self._subscriptions}"

    # --- the broker ---

    def _from_broker(self, message: Message, now: float) -> None:
        membership = self.membership
        if isinstance(message, Welcome):
            self._welcomed(message, now)
            return
        if isinstance(message, HelloWanted):
            membership.unknown()
            return
        if message.epoch != membership.epoch:
            return
        membership.heard(now)
        match message:
            case Assign():
                self._assigned(message, now)
            case Expect():
                self._expect(message)
            case Beat():
                pass
            case Unload() | Wake():
                self._commands.append(Order(message))
            case Loads(loads=loads):
                self.serving.loads = loads
                self._commands.append(Order(message))
            case Ping():
                self._say(Pong(membership.epoch))
            case Bye():
                self._log("info", "broker is shutting down")
                membership.lost()
            case _:
                raise AssertionError(f"a broker does not send {message!r}")

    def _welcomed(self, message: Welcome, now: float) -> None:
        """A broker that does not know what this worker holds. What waits it will give to somebody anew. What runs goes
        on: its results, and those that are there already, are published when their caller is known to the broker too,
        are the answer if it gives the same here, and are freed once the caller has acknowledged them."""
        for caller, index in list(self._lots.items()):
            self._cancel(caller, list(index))
        self._done.clear()  # it knows of nothing that could be
        self._again.clear()
        known = list(self._expected)
        for each in (self._callers, self._expected, self._readers, self._arenas):
            each.clear()
        self._arrivals.forget_all(message.serial)
        for caller in known:
            self._forget_if_gone(caller)
        if not self.membership.joined:  # else it is the answer to a hello that was said again
            self._log("info", "joined the broker", worker=message.name)
        self.meters.tell_all()
        self.serving.welcomed(self.membership.epoch == message.epoch)
        self.membership.welcomed(message.epoch, now)
        if resting := self.serving.resting:  # as the hello has said: so nothing of it is assigned
            self._commands.append(Order(Unload(message.epoch, resting)))

    def _expect(self, message: Expect) -> None:
        for caller, serial, shares, reads in message.callers:
            self._expected[caller] = serial
            if reads:
                self._readers.add(caller)
            if shares:
                self._callers.discard(caller)  # until it is here, though the caller may have been there without one
                self._arenas.pop(caller, None)
                self._arena_came(caller, self._arrivals.announced(caller, serial))
            else:
                self._serve(caller)
        for caller, serial in message.gone:
            self._arrivals.forget(caller, serial)
            self._expected.pop(caller, None)
            self._callers.discard(caller)
            self._readers.discard(caller)
            self._arenas.pop(caller, None)
            self._cancel(caller, list(self._lots.get(caller, ())))
            self._forget_if_gone(caller)

    def _arena_came(self, caller: bytes, arena: Arena | None) -> None:
        """None: it is not here yet."""
        if arena is not None and caller in self._expected:
            self._arenas[caller] = arena
            self._serve(caller)

    def _serve(self, caller: bytes) -> None:
        """The broker knows a caller, and nothing is missing here to run what it asks."""
        self._callers.add(caller)
        if caller in self._subscriptions:
            self._attach(caller, True)
            self._publish_again(caller)

    def _attach(self, caller: bytes, attached: bool) -> None:
        if self.membership.joined:  # else the next broker names the caller anew
            self._say(Attached(self.membership.epoch, caller, self._expected[caller], attached))

    def _subscribed(self, caller: bytes) -> None:
        self._subscriptions[caller] = self._subscriptions.get(caller, 0) + 1
        if caller in self._callers:
            self._attach(caller, True)
        self._publish_again(caller)

    def _publish_again(self, caller: bytes) -> None:
        """Everything that a caller has not acknowledged: it, or its acknowledgment, may have been lost."""
        for kept in dict.fromkeys(self._kept.get(caller, {}).values()):
            self._commands.append(Publish(caller, kept.head, kept.frames))

    def _publish_what_is_late(self) -> None:
        """What has not been acknowledged after 2, 4, 8 ... beats: a message that a full queue has dropped takes no
        connection with it."""
        for caller, held in self._kept.items():
            for kept in dict.fromkeys(held.values()):
                kept.beats += 1
                if kept.beats > 1 and kept.beats.bit_count() == 1 and caller in self._subscriptions:
                    self._commands.append(Publish(caller, kept.head, kept.frames))

    def _unsubscribed(self, caller: bytes) -> None:
        left = self._subscriptions.get(caller, 0) - 1
        if left > 0:
            self._subscriptions[caller] = left
        elif self._subscriptions.pop(caller, None) is not None:
            if caller in self._callers:
                self._attach(caller, False)
            self._forget_if_gone(caller)

    def _forget_if_gone(self, caller: bytes) -> None:
        """Free a caller's results once nobody vouches for it: neither the broker nor its own connection. One without
        the other may be a process that was stopped, and reads on where it was when it is continued."""
        if caller not in self._expected and caller not in self._subscriptions:
            self._free(caller, list(self._kept.get(caller, ())))

    # --- requests ---

    def _assigned(self, message: Assign, now: float) -> None:
        for caller, ranges in message.freed:
            self._free(caller, ids_in(ranges, self._kept.get(caller, {})))
        for caller, ranges in message.cancelled:
            self._cancel(caller, ids_in(ranges, self._lots.get(caller, {})))
        for at, (group, start) in enumerate(zip(message.groups, message.starts, strict=True)):
            form, caller, attempt = group.form, group.caller, group.attempt
            payload: Payload
            left = self._new_of(group)
            if not left:
                continue
            try:
                plan = self._plan(form)
                if group.places:
                    payload, start = self._views(group), 0
                elif form.nbytes <= INLINE_MAX_BYTES:
                    payload = message.blob
                else:
                    payload, start = tuple(message.frames[start : start + len(group.ids)]), 0
            except PenstockError as error:
                self._refuse((form.model, form.version), caller, attempt, pick(group.ids, left), error, group.waited_us)
                continue
            ids, timeouts_us = group.ids, group.timeouts_us
            if len(left) < len(ids):
                whole = payload if type(payload) is tuple else memoryview(payload)[start:]
                payload, start = pick_payload(whole, form.nbytes, left), 0
                ids, timeouts_us = pick(ids, left), pick(timeouts_us, left)
            index = self._lots.get(caller)
            if index is None:
                index = self._lots[caller] = {}
            reads = caller in self._readers
            overtakes = at < message.overtaking
            waited_us = group.waited_us
            placed = payload, start, waited_us, now, reads, overtakes, message.alone
            lot = Lot(index, caller, attempt, plan, ids, timeouts_us, *placed)
            index.update(dict.fromkeys(ids, lot))
            self._batcher.add(lot)

    def _new_of(self, group: Tasks) -> Sequence[int]:
        """Where in a group the requests stand that are not here yet. Others are: the broker took this worker for lost,
        or is a new one. What runs will be answered; what the caller may be reading already stays, and is the answer."""
        ids, kept, runs = group.ids, self._kept.get(group.caller, {}), self._lots.get(group.caller, {})
        if len(ids) > 1 and len(set(ids)) < len(ids):
            self._log("error", "a request was assigned twice in one message; it is ignored", caller=group.caller.hex())
            return ()
        if kept.keys().isdisjoint(ids) and runs.keys().isdisjoint(ids):
            return range(len(ids))
        answered = [number for number in group.ids if number in kept]
        if answered:
            for each in dict.fromkeys([kept[number] for number in answered]):
                self._commands.append(Publish(group.caller, each.head, each.frames))
            self._done.append(Finished(group.caller, group.attempt, 0, tuple(answered)))
        attempt = group.attempt
        again = {number: attempt for number in group.ids if number in runs and runs[number].attempt != attempt}
        if again:
            self._again.setdefault(group.caller, {}).update(again)
        return [at for at, number in enumerate(group.ids) if number not in kept and number not in runs]

    def _views(self, group: Tasks) -> Sequence[Payload]:
        """Payloads where they lie in their caller's arena. Raises PenstockError when they do not."""
        arena = self._arenas.get(group.caller)
        if arena is None:
            raise PenstockError(BAD_INPUT, "the tensors are said to lie in shared memory, and this caller shares none")
        try:
            return tuple(arena.views(group.places, group.nbytes))
        except BadMessage as error:
            raise PenstockError(BAD_INPUT, f"the tensors do not lie where they are said to: {error}") from None

    def _plan(self, form: Form) -> Plan:
        """Raises PenstockError when the form does not fit its model."""
        plan = self._plans.get(form)
        if plan is None:
            model = self.serving.find((form.model, form.version))
            if model is None:
                raise PenstockError(UNAVAILABLE, f"model '{form.model}' has just left this worker; try again", 0.1)
            if len(self._plans) >= _PLANS_MAX:
                self._plans.clear()
            plan = self._plans[form] = Plan(model, form)
        return plan

    def _forget_plans_of(self, model: Model) -> None:
        """It has been replaced, or is no more. (Requests that wait keep their plans.)"""
        for form in [form for form, plan in self._plans.items() if plan.model is model]:
            del self._plans[form]

    def _start(self, now: float) -> None:
        """Batches for instances that are idle."""
        while self._idle:
            batch = self._batcher.next(now)
            if self._batcher.late:
                self._expire(now)
            if batch is None:
                return
            for lot in batch.lots:
                lot.move("start")
            self._idle -= 1
            self._computing[batch.serial] = _Computing(batch, now, self.serving.limit_s(batch))
            self._commands.append(Run(batch, batch.lots[0].plan.model))

    def _look_at_computing(self, now: float) -> None:
        """Batches that have computed for as long as they may: the broker is told what is in them, and the process ends,
        since it can have nothing else run in their place."""
        hung = []
        for each in self._computing.values():
            if now < each.until:
                continue
            if now - each.until > _AWAY_S or each.batch.runs > each.runs:
                # This process was stopped, or the batch failed and runs again in parts: it is given its time anew.
                each.runs, each.until = max(each.runs, each.batch.runs), now + each.limit_s
            else:
                hung.append(each)
        if not hung:
            return
        stuck: list[Stuck] = []
        for each in hung:
            batch = each.batch
            own = [Stuck(lot.caller, lot.attempt, lot.ids) for lot in batch.lots if lot.state == RUNNING]
            stuck += own
            named = [f"{part.caller.hex()}:{number}" for part in own for number in part.ids][:_NAMED_MAX]
            self._log(
                "critical",
                "batch does not end",
                model=batch.model[0],
                version=batch.model[1],
                rows=batch.rows,
                seconds=round(now - each.began, 1),
                limit_s=round(each.limit_s, 3),
                requests=sum([len(part.ids) for part in own]),
                named=named,
            )
        if self.membership.joined:
            reason = f"a batch of '{hung[0].batch.model[0]}' had not ended after {now - hung[0].began:.1f} s"
            self._say(Hung(self.membership.epoch, stuck, reason))
        self._commands.append(GiveUp())

    def _executed(self, event: Executed, now: float) -> None:
        self._idle += 1
        del self._computing[event.batch.serial]
        self.serving.count(event)
        if not self._count_failures(event):  # to find what fails takes much longer
            self.serving.learn(event, now)
        self._batcher.ended(event.batch, event.compute_s, now)
        row_us = event.compute_s * 1e6 / event.batch.rows
        for caller, publication in event.publications.items():
            index = self._lots[caller]
            for group in publication.groups:
                for lot in lots_of(index, group.ids):
                    lot.move("finish")
                    self._forget(lot)
                    self._done.append(Finished(caller, lot.attempt, group.nbytes, lot.ids, int(row_us * lot.rows)))
                if caller in self._again:
                    self._finish_again(caller, group.ids, group.nbytes, int(row_us))
            self._publish(caller, publication, event.info)

    def _count_failures(self, event: Executed) -> bool:
        """Whether there are any."""
        failed = False
        key = event.batch.model
        for caller, publication in event.publications.items():
            for code in publication.failed:
                failed = True
                self.meters.value("penstock_request_failures", *key, code).value += 1
                self._log("warning", "request failed", model=key[0], caller=caller.hex(), code=code)
        return failed

    def _finish_again(self, caller: bytes, ids: Sequence[int], nbytes: int, us: int) -> None:
        """What has run is what was assigned anew meanwhile: the broker knows it by that attempt."""
        again = self._again[caller]
        for number in ids:
            attempt = again.pop(number, 0)
            if attempt:
                self._done.append(Finished(caller, attempt, nbytes, (number,), us))
        if not again:
            del self._again[caller]

    def _publish(self, caller: bytes, publication: Publication, info: BatchInfo) -> None:
        if caller not in self._expected and caller not in self._subscriptions:
            publication.give_back()
            return
        message = Results(
            self.membership.epoch,
            publication.groups,
            self.identity.id,
            info,
            blob=b"".join(publication.inline),
            frames=publication.frames,
        )
        kept = Kept(pack(message), publication)
        held = self._kept.get(caller)
        if held is None:
            held = self._kept[caller] = {}
        for group in publication.groups:
            if not held.keys().isdisjoint(group.ids):  # refused, and assigned again all the same
                self._free(caller, [number for number in group.ids if number in held])
                self._kept[caller] = held
            kept.left += len(group.ids)
            held.update(dict.fromkeys(group.ids, kept))
        self.kept_bytes += kept.nbytes
        self._commands.append(Publish(caller, kept.head, kept.frames))

    def _refuse(
        self, model: ModelKey, caller: bytes, attempt: int, ids: tuple[int, ...], error: PenstockError, queue_us: int
    ) -> None:
        """Answer requests that cannot run."""
        self.meters.value("penstock_request_failures", *model, error.code).value += len(ids)
        answers = failure_answers(error, queue_us, ids)
        self._publish(caller, Publication([answers]), _NO_BATCH)
        self._done.append(Finished(caller, attempt, 0, ids))

    def _expire(self, now: float) -> None:
        """End what the batcher has taken out since it cannot end in time."""
        late, self._batcher.late = self._batcher.late, []
        for lot in late:
            lot.move("expire")
            self._forget(lot)
            model = lot.plan.key
            when = "began" if lot.first_deadline <= now else "could have ended"
            queue_us = lot.waited_us + int((now - lot.arrived) * 1e6)
            error = PenstockError(DEADLINE, f"time was up before the request's batch on '{model[0]}' {when}")
            self._refuse(model, lot.caller, lot.attempt, lot.ids, error, queue_us)

    def _cancel(self, caller: bytes, ids: Sequence[int]) -> None:
        """Take out what has not started; what runs goes on, and its answer is of no interest."""
        index = self._lots.get(caller, {})
        waiting = [number for number in ids if index[number].state == WAITING]
        before = {number: index[number] for number in waiting}
        for lot in lots_of(index, waiting):
            whole = before[lot.ids[0]] is lot
            lot.move("cancel")
            self._batcher.remove(lot, whole)
            self._forget(lot)
            self._done.append(Finished(caller, lot.attempt, 0, lot.ids))

    def _free(self, caller: bytes, ids: Sequence[int]) -> None:
        held = self._kept.get(caller)
        if held is None:
            return
        for number in ids:
            kept = held.pop(number)
            kept.left -= 1
            if not kept.left:
                self.kept_bytes -= kept.nbytes
                for slot in kept.slots:
                    slot.give_back()
        if not held:
            del self._kept[caller]

    def _forget(self, lot: Lot) -> None:
        index = lot.index
        for number in lot.ids:
            del index[number]
        if not index and self._lots.get(lot.caller) is index:
            del self._lots[lot.caller]

    # --- speech ---

    def _speak(self, now: float) -> None:
        if self._done:
            done, self._done = self._done, []
            if self.membership.joined:
                self._say(Done(self.membership.epoch, done))
                self._say_all(self.serving.tell_costs_soon(self.membership.epoch, now))
        if self.membership.joined:
            self._say_all(self.serving.tell(self.membership.epoch, now))
        match self.membership.say(now):
            case "hello":
                self._say(self.serving.hello())
            case "beat":
                self.meters.value("penstock_unacknowledged_bytes").value = self.kept_bytes
                self.serving.measure()
                self._publish_what_is_late()
                self._say_all(self.serving.tell_costs(self.membership.epoch, now))
                self._commands.append(Say(Beat(self.membership.epoch)))
            case "lost":
                self._log("warning", "broker silent; looking for it")

    def _say(self, message: Message) -> None:
        self._commands.append(Say(message))

    def _say_all(self, messages: Sequence[Message]) -> None:
        self._commands += map(Say, messages)

    def _log(self, level: str, event: str, **fields: Any) -> None:
        self._commands.append(Log(level, event, fields))
