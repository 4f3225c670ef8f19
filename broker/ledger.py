"""Every request that the broker has accepted and not forgotten: how it comes in, moves on and ends.

What ends a request for its caller here is a Refusal; results do not pass through the broker. A request's payload is
kept until the request is acknowledged, since DONE is not delivery: a result can die with its worker after DONE was
heard.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Final

from penstock.broker.assign import Assigner, Given
from penstock.broker.forecast import at_most_us, forecast_for
from penstock.broker.lots import ABANDONED, ASSIGNED, DONE, ENDED, QUEUED, Death, Lot
from penstock.broker.options import BrokerOptions
from penstock.broker.peers import CallerPeer, WorkerPeer
from penstock.broker.queues import ModelKey, ModelQueue
from penstock.broker.registry import Registry
from penstock.broker.sequences import Sequences, broken
from penstock.wire.codec import ids_in
from penstock.wire.errors import (
    BAD_INPUT,
    DEADLINE,
    LOST,
    OVERLOADED,
    POISONED,
    TOO_LARGE,
    UNAVAILABLE,
    PenstockError,
)
from penstock.wire.lots import lots_of, pick, pick_payload
from penstock.wire.messages import (
    DEFAULT_PRIORITY,
    INLINE_MAX_BYTES,
    MAX_RETRY_AFTER_MS,
    MAX_SENTENCE,
    UNNAMED,
    Finished,
    Form,
    Payload,
    Refusal,
    Requests,
    Stuck,
    Submit,
)
from penstock.wire.metrics import Meters
from penstock.wire.models import ModelSpec, is_alike

# Who holds more than an eighth (2 ** -3) of one of these bounds leaves the last eighth of it to others.
_OTHERS: Final = 3
_SHARED_BOUNDS: Final = (
    "queue_requests_max",
    "queue_rows_max",
    "queue_bytes_max",
    "held_requests_max",
    "held_rows_max",
    "held_bytes_max",
)
_ROW_US: Final = 1000  # what a row is taken for as long as nobody has said what it takes


class Ledger:
    """The requests of one epoch. Callers of its methods pass the time, in seconds of a monotonic clock."""

    def __init__(
        self,
        options: BrokerOptions,
        registry: Registry,
        assigner: Assigner,
        meters: Meters,
        workers: Mapping[bytes, WorkerPeer],
    ) -> None:
        """``workers``: those that have joined, kept by the owner."""
        self._workers = workers
        self._options = options
        # What a bound leaves to those who have little of what it bounds: the last eighth.
        self._common = replace(
            options, **{name: getattr(options, name) - (getattr(options, name) >> _OTHERS) for name in _SHARED_BOUNDS}
        )
        self._registry = registry
        self._assigner = assigner
        self._meters = meters
        self.sequences = Sequences(assigner, registry.queues, options.sequences_max, options.sequence_requests_max)
        self.requests = 0  # that have not ended
        self.rows = 0  # of these
        self.bytes = 0  # of their payloads
        self.draining = False
        self.news: dict[WorkerPeer, None] = {}  # have to hear of cancels or freed results
        self.refusals: dict[CallerPeer, list[Refusal]] = {}
        self._fresh: list[Lot] = []  # queued since the last tick
        self._asleep: dict[ModelQueue, None] = {}  # that nobody had loaded when requests came
        self._deadlines: list[tuple[float, int, Lot]] = []  # a heap of what waits
        self._entered = 0  # numbers the heap's entries, so that lots need no order

    # --- in ---

    def submit(self, caller: CallerPeer, message: Submit, now: float) -> None:
        """Take in what a caller says: acknowledgments first, since they make room. Requests that come while this broker
        drains are for the next: their caller sends them to that once this one has said good-bye."""
        if message.acks:
            self.acknowledge(caller, message.acks)
        for lot in lots_of(caller.requests, message.cancels):
            self._count_failure(lot.model.key, "cancelled", len(lot.ids))
            self._drop(lot)
        if self.draining:
            return
        last_id = caller.last_id
        for group, start in zip(message.groups, message.starts, strict=True):
            if min(group.ids) > last_id and caller.requests.keys().isdisjoint(group.ids):
                if group.form.sequence and len(group.ids) > 1:
                    self._admit_apart(caller, group, message, start, now)
                else:
                    self._admit(caller, group, message, start, now)
            else:
                # A worker may still hold the ones that had these ids: their answers could not be told apart.
                self._refuse_ids(caller, group.ids, _not_growing())
            caller.last_id = max(caller.last_id, *group.ids)

    def _admit_apart(self, caller: CallerPeer, group: Requests, message: Submit, start: int, now: float) -> None:
        """Requests of a sequence, which go one after another."""
        step = group.form.nbytes if group.form.nbytes <= INLINE_MAX_BYTES else 1
        for at, number in enumerate(group.ids):
            if number in caller.requests:
                self._refuse_ids(caller, (number,), _not_growing())
                continue
            one = Requests(group.form, (number,), group.timeouts_us[at : at + 1], group.places[at : at + 1])
            self._admit(caller, one, message, start + at * step, now)

    def _admit(self, caller: CallerPeer, group: Requests, message: Submit, start: int, now: float) -> None:
        form, ids, timeouts_us = group.form, group.ids, group.timeouts_us
        key = ("", "")  # labels are ours, not the caller's
        try:
            version = form.version
            unnamed = version.startswith(UNNAMED)
            chain = self.sequences.find(form, now) if form.sequence else None
            if chain is not None:
                model = chain.model
            else:
                model = self._find_any(form, now) if unnamed else self._registry.find(form.model, version, now)
            key = model.key
            self._check(model, form, caller, now)
            if group.places:
                _check_places(group, caller)
        except PenstockError as error:
            self._refuse_new(caller, key, ids, error)
            return
        if form.sequence or form.version != key[1]:
            # A worker is told which one it was, and need not know of sequences.
            form = form._replace(version=key[1], sequence="", phase=0)
        places, held = group.places, 0 if group.places else form.nbytes
        # What the broker before this one had taken in is not turned away for what has come since.
        again = self._registry.is_young(now) and min(ids) <= caller.sent_before
        room = self._room(self._common, model, caller, form, held, again)
        if room < len(ids):
            own = self._own(caller, form, held)
            room = max(0, room, min(own, self._room(self._options, model, caller, form, held, again)))
        if room < len(ids):
            self._refuse_new(caller, key, ids[room:], self._full(model, caller, form, held))
            ids, timeouts_us = ids[:room], timeouts_us[:room]
        left: Sequence[int] = range(len(ids))
        if model.row_us and ids and not again:
            left, late = self._in_time(model, form, caller, timeouts_us, now)
            if late is not None:
                kept = set(left)
                self._refuse_new(caller, key, [number for at, number in enumerate(ids) if at not in kept], late)
        if not left:
            return
        count, size = len(ids), form.nbytes
        payload = places[:count] if places else _brought(message, start, count, size)
        if len(left) < count:
            count = len(left)
            ids, timeouts_us, payload = pick(ids, left), pick(timeouts_us, left), pick_payload(payload, size, left)
        lot = Lot(
            caller, model, form, ids, timeouts_us, payload, bool(places), now, form.rows * (model.row_us or _ROW_US)
        )
        lot.unnamed = unnamed
        index = dict.fromkeys(ids, lot)
        if len(index) != count:
            self._refuse_ids(caller, index, _not_growing())
            return
        caller.requests.update(index)
        if group.form.sequence:
            self.sequences.enter(lot, chain, group.form, now)
        else:
            model.push(lot)
        self.requests += count
        model.held += count
        self.rows += count * form.rows
        self.bytes += count * held
        caller.rows += count * form.rows
        caller.nbytes += count * size
        self._fresh.append(lot)
        self._assigner.requests_came(model)
        if not model.workers:
            self._asleep[model] = None
            if model.sleepers:
                self._meters.value("penstock_load_waits", *model.key).value += count
        self._meters.value("penstock_requests", *model.key).value += count

    def _find_any(self, form: Form, now: float) -> ModelQueue:
        """The queue for requests that name no version: of the one that their caller took to be current, as long as that
        is served, else of the one that is. Raises PenstockError."""
        version = form.version.removeprefix(UNNAMED)
        current = self._registry.current(form.model)
        known = self._registry.queues.get((form.model, version))
        if current is not None and (known is None or known.retired or (current.workers and not known.workers)):
            return current
        return self._registry.find(form.model, version, now)

    def _check(self, model: ModelQueue, form: Form, caller: CallerPeer, now: float) -> None:
        """Whether requests of this form can be accepted at all. Raises PenstockError."""
        name, spec = form.model, model.spec
        if spec is None:
            if self._registry.is_young(now):
                return  # once a worker has told it, see ``look_through``
            state = self._registry.state(model.key)
            raise PenstockError(UNAVAILABLE, f"model '{name}' is not ready ({state.state}): {state.reason}", 1.0)
        if not model.workers:
            if self._is_unserved(model, now):
                raise PenstockError(UNAVAILABLE, f"no worker serves model '{name}' at present", 1.0)
        elif not caller.local and not any(worker.endpoint_for(caller) for worker in model.workers):
            raise PenstockError(
                UNAVAILABLE,
                f"no worker that serves model '{name}' publishes over TCP; start workers with --bind tcp://HOST:0",
            )
        if form.rows > spec.max_batch_size:
            raise PenstockError(BAD_INPUT, _too_many_rows(spec))

    def _is_unserved(self, model: ModelQueue, now: float) -> bool:
        """Whether nobody serves a model, and has not for so long that it is not waited for any more."""
        if model.workers or now <= model.wait_until:
            return False
        if model.sleepers:
            return model.wait_until > 0 and model.waits  # it was to be loaded, and is not
        return now - model.unserved_since > self._options.unserved_grace_s

    def look_for_asleep(self, keys: Iterable[ModelKey]) -> None:
        """Models that some worker has unloaded: requests may wait for them."""
        for key in keys:
            model = self._registry.queues[key]
            if model.waits and not model.workers:
                self._asleep[model] = None

    def take_asleep(self) -> list[ModelQueue]:
        """Models that nobody has loaded, and for which requests have come."""
        if not self._asleep:
            return []
        asleep, self._asleep = self._asleep, {}
        return [model for model in asleep if not model.workers and model.sleepers]

    @staticmethod
    def _in_time(
        model: ModelQueue, form: Form, caller: CallerPeer, timeouts_us: Sequence[int], now: float
    ) -> tuple[Sequence[int], PenstockError | None]:
        """Which of new requests are expected to be done in time, by their places, and why the others are not."""
        count, rows = len(timeouts_us), form.rows
        if model.pools and at_most_us(model, count * rows) <= min(timeouts_us):
            return range(count), None
        forecast = forecast_for(model, form.priority or DEFAULT_PRIORITY, form.tenant or caller.id)
        if forecast.done_us(count * rows) <= min(timeouts_us):
            return range(count), None
        left: list[int] = []
        late, late_us, done_us = -1, 0.0, forecast.done_us(rows)
        for at, us in enumerate(timeouts_us):
            if done_us <= us:
                left.append(at)
                done_us = forecast.done_us((len(left) + 1) * rows)
            elif late < 0:
                late, late_us = at, done_us
        if not left and not forecast.wait_us and model.is_stale(now):
            left.append(0)  # it is tried
        if len(left) == count:
            return left, None
        return left, PenstockError(
            OVERLOADED,
            f"the request would be done in about {late_us / 1000:.0f} ms, and has {timeouts_us[late] / 1000:.0f} ms: "
            f"{forecast.wait_us / 1000:.0f} ms of work on '{form.model}' are before it; try again when that is done",
            forecast.wait_us * 1e-6,
        )

    def _room(
        self, options: BrokerOptions, model: ModelQueue, caller: CallerPeer, form: Form, size: int, again: bool = False
    ) -> int:
        """How many more requests there is room for, if each makes the broker hold so many bytes. ``again``: what counts
        is what it holds in all, as they need not all have waited before."""
        room = min(
            options.held_requests_max - self.requests,
            (options.held_rows_max - self.rows) // form.rows,
            options.caller_requests_max - len(caller.requests),
        )
        if not again:
            room = min(
                room, options.queue_requests_max - model.requests, (options.queue_rows_max - model.rows) // form.rows
            )
            if form.nbytes:
                room = min(room, (options.queue_bytes_max - model.nbytes) // form.nbytes)
        return min(room, (options.held_bytes_max - self.bytes) // size) if size else room

    def _own(self, caller: CallerPeer, form: Form, size: int) -> int:
        """How many more requests a caller may have where little room is left: one that floods fills no queue to its
        end, so that who asks for little is served beside it. Who has nothing may ask for one, however large."""
        options = self._options
        requests, rows, nbytes = options.queue_requests_max, options.queue_rows_max, options.queue_bytes_max
        room = min(
            (min(requests, options.held_requests_max) >> _OTHERS) - len(caller.requests),
            ((min(rows, options.held_rows_max) >> _OTHERS) - caller.rows) // form.rows,
        )
        if form.nbytes:
            largest = min(nbytes, options.held_bytes_max) if size else nbytes
            room = min(room, ((largest >> _OTHERS) - caller.nbytes) // form.nbytes)
        return room if caller.requests else max(1, room)

    def _full(self, model: ModelQueue, caller: CallerPeer, form: Form, size: int) -> PenstockError:
        """Why there is no more room."""
        options, name = self._options, model.key[0]
        largest = min(options.queue_bytes_max, options.held_bytes_max if size else options.queue_bytes_max)
        if form.nbytes > largest:
            return PenstockError(
                TOO_LARGE, f"the request has {form.nbytes} bytes, and the server holds {largest} at most"
            )
        queued, held, own = options.queue_requests_max, options.held_requests_max, options.caller_requests_max
        rows, most = options.queue_rows_max, options.held_rows_max
        wait = f"wait for model '{name}'"
        bounds = [
            (queued - model.requests, f"Exceeds maximum queue size: at most {queued} requests {wait}"),
            (
                (rows - model.rows) // form.rows,
                f"Exceeds maximum queue size: {model.rows} of at most {rows} rows {wait}",
            ),
            (held - self.requests, f"the server holds at most {held} requests"),
            ((most - self.rows) // form.rows, f"the server holds {self.rows} rows, of at most {most}"),
            (own - len(caller.requests), f"{own} requests of this caller are under way, which is all that it may have"),
        ]
        if form.nbytes:
            limit = options.queue_bytes_max
            told = f"Exceeds maximum queue size: {model.nbytes} of at most {limit} bytes {wait}"
            bounds.append(((limit - model.nbytes) // form.nbytes, told))
        if size:
            bytes_room = (options.held_bytes_max - self.bytes) // size
            bounds.append((bytes_room, f"the server holds {self.bytes} of at most {options.held_bytes_max} bytes"))
        return PenstockError(OVERLOADED, f"{min(bounds)[1]}; try again shortly", 1.0)

    # --- on ---

    def hand_out(self, given: Given, now: float) -> None:
        """Mark requests as assigned."""
        for worker, lots in given.items():
            for lot in lots:
                lot.move("assign")
                lot.attempt += 1
                lot.worker = worker
                if lot.step is not None:
                    lot.step.chain.worker, lot.step.beside = worker, False
                if lot.came_before:
                    self._supersede(worker, lot, now)
                worker.hold(lot)
        for lot in self._fresh:
            if lot.state == QUEUED:
                self._watch(lot)
        self._fresh.clear()

    def _supersede(self, worker: WorkerPeer, lot: Lot, now: float) -> None:
        """What a worker still runs of an earlier life of a caller is what it is given again, and runs no twice."""
        for before in worker.take_from(lot, now):
            before.model.end(before, 0.0)
            if worker.pool is not None:
                worker.pool.end(before.model, before.model_turn, 0.0)
            before.move("done")
            self._forget(before)
            self._assigner.room_came(worker)

    def refuse_late(self, now: float) -> None:
        """End what the assigner has found to be too late."""
        late, self._assigner.late = self._assigner.late, []
        for lot in late:
            name = lot.model.key[0]
            waited_s = now - lot.accepted
            self._refuse(
                lot,
                DEADLINE,
                f"after {waited_s:.3f} s in the queue of '{name}' there was too little time left to compute it",
            )

    def done(self, worker: WorkerPeer, finished: Sequence[Finished], now: float) -> None:
        """A worker has published results, or skipped what was cancelled. What it says of others' requests is
        ignored."""
        for caller, attempt, nbytes, ids, compute_us in finished:
            for lot in lots_of(worker.held.get(caller, {}), ids):
                if lot.attempt != attempt or lot.state == DONE:
                    continue
                worker.subtract(lot, now)
                count = len(lot.ids)
                # What was cancelled before it ran took nothing.
                over_us = compute_us * count / len(ids) - lot.cost_us * count
                if compute_us:
                    lot.model.measured = now
                lot.model.end(lot, over_us)
                if worker.pool is not None:
                    worker.pool.end(lot.model, lot.model_turn, over_us)
                lot.suspect, lot.deaths = False, ()
                if lot.step is not None:
                    self.sequences.ended(lot, now)
                if lot.move("done") == DONE:
                    lot.kept_bytes = nbytes
                    worker.keep(caller, nbytes * len(lot.ids))
                else:
                    self._release(worker, lot)
        self._assigner.room_came(worker)

    @staticmethod
    def unfinished(worker: WorkerPeer) -> set[Lot]:
        """What a worker may be running."""
        return {lot for lots in worker.held.values() for lot in lots.values() if lot.unfinished}

    @staticmethod
    def stuck(worker: WorkerPeer, stuck: Sequence[Stuck]) -> set[Lot]:
        """What a worker says that it is running."""
        return {
            lot
            for caller, attempt, ids in stuck
            for lot in lots_of(worker.held.get(caller, {}), ids)
            if lot.attempt == attempt and lot.unfinished
        }

    def worker_gone(self, worker: WorkerPeer, ran: Collection[Lot], reason: str) -> int:
        """Requests that a lost worker held, or whose result it had not delivered, wait again, first in their line.
        ``ran``: of these, what it may have died of, for a ``reason``: they are suspects.

        Returns how many there were.
        """
        held = [lot for lots in worker.held.values() for lot in dict.fromkeys(lots.values())]
        worker.held.clear()
        self.break_off(worker, True)
        alone = sum([len(lot.ids) for lot in ran]) == 1
        for lot in [*(lot for lot in held if lot in ran), *(lot for lot in reversed(held) if lot not in ran)]:
            lot.worker = None
            lot.kept_bytes = 0
            if lot.state != DONE:
                lot.model.end(lot, 0.0)
            if lot.move("lose") == ENDED:
                self._forget(lot)
                continue
            if not self.sequences.may_try_again(lot):
                lot.model.push(lot, front=True)
                self._refuse(lot, LOST, broken(lot.model.key[0]))
                continue
            if lot in ran:
                if alone:
                    lot.deaths += (Death(worker.id, worker.name, reason),)
                lot.suspect = True
            lot.model.push(lot, front=True)
            if self._registry.queues.get(lot.model.key) is not lot.model and not self._move(lot):
                self._refuse(lot, UNAVAILABLE, _removed(lot.model))
                continue
            if len(lot.deaths) >= self._options.deaths_max:
                self._refuse(lot, POISONED, _poisoned(lot))
                continue
            if lot.attempt >= self._options.attempts_max:
                self._refuse(
                    lot, LOST, f"{lot.attempt} workers were lost while they held the request, one after another"
                )
                continue
            self._meters.value("penstock_retries", *lot.model.key).value += len(lot.ids)
            if lot.suspect:
                self._assigner.suspects.came(lot.model)
            else:
                self._assigner.requests_came(lot.model)
            self._watch(lot)
        self.news.pop(worker, None)
        return sum(len(lot.ids) for lot in held)

    def break_off(self, worker: WorkerPeer, gone: bool = False) -> None:
        """End what waits in sequences for a worker that has ``gone``, or serves other models now."""
        for lot in self.sequences.break_off(worker, gone):
            self._refuse(lot, LOST, broken(lot.model.key[0]))

    def pardon(self, worker: bytes) -> None:
        """A worker that was taken for dead lives: nobody has ended it."""
        waiting = [lot for model in self._registry.queues.values() for lot in model.suspects]
        running = [lot for each in self._workers.values() if each.apart for lot in self.unfinished(each)]
        for lot in waiting + running:
            lot.deaths = tuple([death for death in lot.deaths if death.worker != worker])

    # --- out ---

    def acknowledge(self, caller: CallerPeer, ranges: Sequence[int]) -> None:
        """A caller has its results: what is left to do for them is to have their workers forget them."""
        requests = caller.requests
        ids = ids_in(ranges, requests)
        elsewhere = len(ids) < sum(ranges[1::2]) - sum(ranges[::2]) + len(ranges) // 2
        for lot in lots_of(requests, ids):
            before = lot.attempt > 1 or lot.came_before
            elsewhere = elsewhere or before
            for number in lot.ids:
                del requests[number]
            worker = lot.worker
            if lot.move("acknowledge") != ENDED:
                # DONE is still to come, and frees the result; unless the answer came from a worker that was thought
                # lost.
                if worker is not None and before:
                    worker.cancel(lot)
                    self.news[worker] = None
            elif worker is None:
                lot.model.remove(lot)
                self._forget(lot)
            else:
                self._release(worker, lot)
        if elsewhere:
            self._pass_on(caller, ranges)

    def _pass_on(self, caller: CallerPeer, ranges: Sequence[int]) -> None:
        """Acknowledgments of what any worker may keep: one that had the requests from the broker before this one, or
        that was thought lost, or whose caller was."""
        for worker in self._workers.values():
            worker.free(caller.id, ranges)
            self.news[worker] = None

    def caller_gone(self, caller: CallerPeer) -> None:
        caller.gone = True
        for lot in dict.fromkeys(caller.requests.values()):
            if lot.state != DONE:  # it may have had the result
                self._count_failure(lot.model.key, "cancelled", len(lot.ids))
            self._drop(lot)
        self.refusals.pop(caller, None)

    def look_through(self, keys: Iterable[ModelKey]) -> None:
        """A worker has declared models: what came before any had said what they take may not fit."""
        for key in keys:
            model = self._registry.queues.get(key)
            if model is not None and model.spec is not None and model.unseen:
                model.unseen = False
                for lot in model.lots():
                    if lot.form.rows > model.spec.max_batch_size:
                        self._refuse(lot, BAD_INPUT, _too_many_rows(model.spec))

    def model_gone(self, model: ModelQueue) -> None:
        """No worker declares it any more: what waits for it ends."""
        for lot in model.lots():
            if not self._move(lot):
                self._refuse(lot, UNAVAILABLE, _removed(model))
        self._assigner.model_went(model)

    def _move(self, lot: Lot) -> bool:
        """Have requests that wait for a version which is not served any more wait for the one that is current, if they
        name none and fit it."""
        before, model = lot.model, self._registry.current(lot.model.key[0])
        if not lot.unnamed or lot.step is not None or model is None or model is before or model.spec is None:
            return False
        if lot.form.rows > model.spec.max_batch_size:
            return False
        if before.spec is not None and not is_alike(before.spec, model.spec):
            return False
        before.remove(lot)
        count = len(lot.ids)
        before.held -= count
        model.held += count
        lot.model, lot.form = model, lot.form._replace(version=model.key[1])
        lot.cost_us = lot.form.rows * (model.row_us or _ROW_US)
        lot.turn = lot.model_turn = 0.0
        model.push(lot)
        if lot.suspect:
            self._assigner.suspects.came(model)
        else:
            self._assigner.requests_came(model)
        if not model.workers:
            self._asleep[model] = None
        return True

    def expire(self, now: float) -> None:
        """End what has waited past its deadline."""
        heap = self._deadlines
        while heap and heap[0][0] <= now:
            lot = heapq.heappop(heap)[2]
            if lot.state != QUEUED:
                continue
            late = lot.late(now)
            if not late:  # those that were have left it
                self._watch(lot)
                continue
            if len(late) < len(lot.ids):
                rest, lot = lot, lot.split(late)
                self._watch(rest)
            name = lot.model.key[0]
            served = "" if lot.model.workers else ", which no worker serves at present"
            self._refuse(
                lot, DEADLINE, f"time was up after {now - lot.accepted:.3f} s in the queue of '{name}'{served}"
            )

    def sweep(self, now: float) -> None:
        """What time alone decides, and need not be exact: models that have no workers for too long. (A result waits for
        its acknowledgment as long as its caller lives, which may still be reading it.)"""
        for model in self._registry.queues.values():
            if not model.waits or model.workers:
                continue
            self._asleep[model] = None
            if self._is_unserved(model, now):
                model.wait_until = 0.0
                for lot in model.lots():
                    if not self._move(lot):
                        self._refuse(lot, UNAVAILABLE, f"no worker serves model '{model.key[0]}' at present")
        self.sequences.sweep(now)
        self._registry.forget_unheard(now)
        if len(self._deadlines) > 1000 + 2 * self.requests:
            self._deadlines = [entry for entry in self._deadlines if entry[2].state == QUEUED]
            heapq.heapify(self._deadlines)

    def running(self, callers: Iterable[CallerPeer]) -> Counter[ModelKey]:
        """Requests that workers have not finished, by model."""
        lots = (lot for caller in callers for lot in caller.requests.values())
        return Counter(lot.model.key for lot in lots if lot.state == ASSIGNED)

    def validate(self, callers: Mapping[bytes, CallerPeer], workers: Mapping[bytes, WorkerPeer]) -> None:
        """Derive again what is indexed and counted, for tests. Raises AssertionError."""
        lots = {lot for caller in callers.values() for lot in caller.requests.values()}
        lots |= {lot for worker in workers.values() for index in worker.held.values() for lot in index.values()}
        watched: dict[Lot, float] = {}
        for at, _, lot in self._deadlines:
            watched[lot] = min(at, watched.get(lot, at))
        watched |= {lot: lot.accepted for lot in self._fresh if lot.ids}
        for lot in lots:
            self._validate_lot(lot, callers, workers)
            seen = lot.state != QUEUED or watched.get(lot, float("inf")) <= lot.due
            assert seen, f"nobody watches the deadline of {lot}"
        count, nbytes = sum(len(lot.ids) for lot in lots), sum(len(lot.ids) * lot.held_bytes for lot in lots)
        assert self.requests == count, f"{self.requests} requests are {count}"
        assert self.rows == sum(lot.rows for lot in lots), f"{self.rows} rows are in {lots}"
        assert self.bytes == nbytes, f"{self.bytes} bytes are {nbytes}"
        assert count <= self._options.held_requests_max, f"{count} requests are held"
        for model in self._registry.queues.values():
            held = sum(len(lot.ids) for lot in lots if lot.model is model)
            assert model.held == held, f"{model.held} requests for {model.key} are {held}"
            model.validate_given([lot for lot in lots if lot.model is model and lot.state in (ASSIGNED, ABANDONED)])
        assert nbytes <= self._options.held_bytes_max, f"{nbytes} bytes are held"
        for caller in callers.values():
            owned = sum(len(lot.ids) for lot in set(caller.requests.values()))
            theirs = [lot for lot in lots if lot.caller is caller]
            assert caller.rows == sum(lot.rows for lot in theirs), f"{caller.id.hex()} has {caller.rows} rows"
            nbytes = sum(len(lot.ids) * lot.form.nbytes for lot in theirs)
            assert caller.nbytes == nbytes, f"{caller.id.hex()} has {caller.nbytes} bytes, not {nbytes}"
            assert owned == len(caller.requests), f"{caller.id.hex()} has parts of lots"
            assert max(caller.requests, default=-1) <= caller.last_id, f"{caller.id.hex()}: ids do not grow"
        self.sequences.validate(lots)
        told = {worker for worker in workers.values() if worker.has_news}
        assert told <= self.news.keys() <= set(workers.values()), "a worker does not hear its news, or has gone"
        assert self.refusals.keys() <= set(callers.values()), "a caller that has gone has refusals"

    def _validate_lot(self, lot: Lot, callers: Mapping[bytes, CallerPeer], workers: Mapping[bytes, WorkerPeer]) -> None:
        assert len(set(lot.ids)) == len(lot.ids) == len(lot.timeouts_us) > 0, f"{lot} has ids twice, or none"
        assert lot.state != ENDED, f"{lot} is still known"
        pieces = len(lot.ids) * (1 if type(lot.payload) is tuple else lot.form.nbytes)
        assert len(lot.payload) == pieces, f"{lot} has a payload of {len(lot.payload)}, not {pieces}"
        assert lot.state == DONE or not lot.kept_bytes, f"{lot} keeps a result"
        owner = callers.get(lot.caller.id)
        if lot.state == ABANDONED:
            theirs = owner is not None and owner is lot.caller and not owner.requests.keys().isdisjoint(lot.ids)
            assert not theirs, f"{lot} is still its caller's"
        else:
            assert owner is lot.caller, f"the caller of {lot} has gone"
            assert all(owner.requests.get(number) is lot for number in lot.ids), f"{lot} cannot be found"
        if lot.state == QUEUED:
            assert lot.worker is None, f"{lot} waits, and is on {lot.worker}"
            assert lot.in_line, f"{lot} stands in no line"
            assert self._registry.queues.get(lot.model.key) is lot.model, f"{lot} waits for a model that has gone"
            assert lot.attempt < self._options.attempts_max, f"{lot} is tried too often"
            assert len(lot.deaths) < self._options.deaths_max, f"{lot} is poison"
        else:
            assert lot.worker is not None, f"{lot} is on no worker"
            alone = lot.worker.apart and len(lot.ids) == 1
            assert alone or not (lot.suspect and lot.unfinished), f"{lot} does not run alone"
            assert workers.get(lot.worker.id) is lot.worker, f"the worker of {lot} has gone"
            held = lot.worker.held.get(lot.caller.id, {})
            assert all(held.get(number) is lot for number in lot.ids), f"{lot} cannot be found on its worker"

    @property
    def next_deadline(self) -> float:
        return self._deadlines[0][0] if self._deadlines else float("inf")

    def _watch(self, lot: Lot) -> None:
        self._entered += 1
        heapq.heappush(self._deadlines, (lot.due, self._entered, lot))

    def _drop(self, lot: Lot) -> None:
        """The caller wants nothing more of requests."""
        for number in lot.ids:
            del lot.caller.requests[number]
        worker = lot.worker
        if lot.move("drop") != ENDED:
            assert worker is not None
            worker.cancel(lot)
            self.news[worker] = None
        elif worker is None:
            lot.model.remove(lot)
            self._forget(lot)
        else:
            self._release(worker, lot)

    def _refuse(self, lot: Lot, code: str, sentence: str) -> None:
        """End requests that wait, and tell their caller why."""
        lot.move("refuse")
        lot.model.remove(lot)
        for number in lot.ids:
            del lot.caller.requests[number]
        self._count_failure(lot.model.key, code, len(lot.ids))
        self._forget(lot)
        self._refuse_ids(lot.caller, lot.ids, PenstockError(code, sentence))

    def _refuse_new(self, caller: CallerPeer, key: ModelKey, ids: Sequence[int], error: PenstockError) -> None:
        """Turn away requests that have just come."""
        self._refuse_ids(caller, ids, error)
        self._count_failure(key, error.code, len(ids))

    def _refuse_ids(self, caller: CallerPeer, ids: Iterable[int], error: PenstockError) -> None:
        after_ms = min(int(error.retry_after_s * 1000), MAX_RETRY_AFTER_MS)
        refusals = self.refusals.setdefault(caller, [])
        sentence = error.message[:MAX_SENTENCE]
        refusals.extend(Refusal(number, error.code, sentence, after_ms) for number in ids)

    def _release(self, worker: WorkerPeer, lot: Lot) -> None:
        """Ended for its caller and on its worker: both forget it."""
        was_full = lot.caller.id in worker.full
        worker.release(lot)
        if was_full:
            self._assigner.room_came(worker)
        self.news[worker] = None
        self._forget(lot)

    def _forget(self, lot: Lot) -> None:
        if lot.step is not None:
            self.sequences.ended(lot)
        self.requests -= len(lot.ids)
        lot.model.held -= len(lot.ids)
        self.rows -= lot.rows
        self.bytes -= len(lot.ids) * lot.held_bytes
        lot.caller.rows -= lot.rows
        lot.caller.nbytes -= len(lot.ids) * lot.form.nbytes
        lot.payload = None

    def _count_failure(self, key: ModelKey, reason: str, count: int) -> None:
        self._meters.value("penstock_request_failures", *key, reason).value += count


def _brought(message: Submit, start: int, count: int, size: int) -> Payload:
    """The tensors of so many requests, of ``size`` bytes each, as they came in a message."""
    if size > INLINE_MAX_BYTES:
        return tuple(message.frames[start : start + count])
    if len(message.blob) == count * size:
        return message.blob
    return message.blob[start : start + count * size]


def _check_places(group: Requests, caller: CallerPeer) -> None:
    """Whether all tensors lie inside the caller's arena. Raises PenstockError."""
    if not caller.arena_bytes:
        raise PenstockError(BAD_INPUT, "the tensors are said to lie in shared memory, and this caller shares none")
    if max(group.places) + group.nbytes > caller.arena_bytes:
        raise PenstockError(
            BAD_INPUT,
            f"tensors of {group.nbytes} bytes at {max(group.places)} do not lie in the caller's arena of "
            f"{caller.arena_bytes} bytes",
        )


def _not_growing() -> PenstockError:
    return PenstockError(BAD_INPUT, "request ids must grow, and these do not")


def _poisoned(lot: Lot) -> str:
    deaths = ", ".join(f"{death.name} ({death.reason})" for death in lot.deaths)
    return (
        f"{len(lot.deaths)} workers, one after another, were lost while they ran this request and nothing else: "
        f"{deaths}; model '{lot.model.key[0]}' cannot run this input, so it is not tried again"
    )


def _too_many_rows(spec: ModelSpec) -> str:
    return f"inference request batch-size must be <= {spec.max_batch_size} for '{spec.name}'"


def _removed(model: ModelQueue) -> str:
    return f"model '{model.key[0]}' was removed while the request waited"
