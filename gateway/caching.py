"""The response cache of a gateway: answers that are kept are given at once; the others are computed, once for all that
ask the same meanwhile, and then kept. What is the same, and who waits for whom, is decided in ``cache.py``.

Nothing is kept or given across builds of a version (see ModelSpec): the key has the build that the broker has told, an
answer is kept only if that is still the one when it comes, and there is no cache while no broker says what it is.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Final, NamedTuple

from penstock.client.events import Complete
from penstock.gateway.application import Application
from penstock.gateway.cache import LEADS, NO_STORE, REFRESH, WAITS, Flight, Flights, form_key, ran, request_key
from penstock.gateway.cacheredis import RedisStore
from penstock.gateway.cachestores import Stores
from penstock.gateway.cachevalue import Kept
from penstock.gateway.connection import Exchange
from penstock.gateway.inference import Query
from penstock.gateway.repeats import Repeats
from penstock.gateway.target import Target
from penstock.gateway.timing import CACHED
from penstock.gateway.underway import Inference
from penstock.wire.errors import DEADLINE, OVERLOADED, BadMessage, PenstockError
from penstock.wire.messages import Form, Payload
from penstock.wire.metrics import Value
from penstock.wire.models import ModelSpec
from penstock.wire.process import fields
from penstock.wire.slots import PLACED_MIN_BYTES, Placed, Slot
from penstock.wire.tensors import Buffer

log = logging.getLogger("penstock.gateway")

_MISS: Final = b"Penstock-Cache: miss\r\n"
_WAIT: Final = b"Penstock-Cache: wait\r\n"
_FORMS_MAX: Final = 1024  # whose keys are remembered


class _Known(NamedTuple):
    """A form, and what requests of it have in common. ``key``: see ``form_key``."""

    form: Form
    spec: ModelSpec
    key: bytes
    hits: Value
    hit_s: Value
    misses: Value
    miss_s: Value
    waits: Value


class ResponseCache:
    """For ``Application.cache``."""

    def __init__(self, loop: asyncio.AbstractEventLoop, application: Application, runtime: Path | None) -> None:
        """``runtime``: the directory that all gateways of this host share, if there is one."""
        self.application = application
        self.loop = loop
        self.stores = Stores(loop, application.options, runtime)
        self.flights: Flights[_Asker, _Trip] = Flights(application.options.response_cache_waiting_max, _Trip)
        self._caller = application.caller
        self._request_bytes_max = application.options.response_cache_request_bytes_max
        self._known: dict[int, _Known] = {}
        self._repeats = Repeats()
        self._ttl_s = application.options.response_cache_ttl_s or float("inf")
        self._refreshed = 0  # requests that did not look for an answer

    def repeat(self, exchange: Exchange, target: Target, body: Buffer) -> bool:
        """Answer a request that has come before, if what it was answered is remembered."""
        repeat = self._repeats.find(target, body, self._caller.told)
        if repeat is None or not self._caller.is_told:
            return False
        seconds = time.monotonic() - exchange.arrived
        repeat.hits.value += 1
        repeat.hit_s.value += seconds
        response = b"%b%.3f%b" % (repeat.before, seconds * 1e3, repeat.after)
        self.application.repeat(exchange, response, seconds)
        return True

    def take(self, exchange: Exchange, target: Target, query: Query, payload: Buffer, body: Buffer) -> bool:
        """Answer a request for a model whose answers are kept; False: it is to be computed as if they were not."""
        store, control = self.stores.store, target.cache_control
        if store is None:
            self.stores.open()
            return False
        if control == NO_STORE or query.form.sequence or len(payload) > self._request_bytes_max:
            return False
        if not self._caller.is_told:
            return False
        known = self._find(query)
        key = request_key(known.key, payload)
        if control != REFRESH and not isinstance(store, RedisStore) and (kept := store.get(key)) is not None:
            self._found(self.application.inference(self.application, exchange, query), known, kept, exchange)
            self._remember(exchange, target, query, body, known, kept)
            return True
        asker = _Asker(self, exchange, query, known)
        if control == REFRESH:
            self._refreshed += 1
            name = b"refresh %d" % self._refreshed  # a flight of its own
            _, trip = self.flights.join(name, asker)
        else:
            role, trip = self.flights.join(key, asker)
            if role == WAITS:
                asker.wait(trip)
                return True
            if role != LEADS:
                return False
        asker.lead(trip, key, payload)
        if control != REFRESH and isinstance(store, RedisStore):
            trip.looks = True
            store.get(key, partial(self._looked, trip))
        else:
            self._compute(trip)
        return True

    def _find(self, query: Query) -> _Known:
        form, spec = query.form, query.spec
        known = self._known.get(id(form))
        if known is not None and known.form is form and known.spec is spec:
            return known
        names = ("hits", "hit_seconds", "misses", "miss_seconds", "waits")
        series = [self._caller.meters.value(f"penstock_cache_{each}", spec.name, spec.version) for each in names]
        if len(self._known) >= _FORMS_MAX:
            self._known.clear()
        known = self._known[id(form)] = _Known(form, spec, form_key(form, spec), *series)
        return known

    def _found(self, inference: Inference, known: _Known, kept: Kept, exchange: Exchange) -> None:
        """Answer with what was kept."""
        inference.unasked()
        known.hits.value += 1
        inference.complete(Complete(inference, kept.body, kept.payload, CACHED, 0, 0, b""))
        known.hit_s.value += time.monotonic() - exchange.arrived

    def _remember(
        self, exchange: Exchange, target: Target, query: Query, body: Buffer, known: _Known, kept: Kept
    ) -> None:
        """What has just been answered, for requests of the same bytes; unless each of them is said where its time went,
        or may mean another version or other data, or has an answer that is changed first."""
        if query.fleeting or query.change is not None:
            return
        if target.explain or query.explain or self.application.is_traced or query.spec.name in self._caller.splits:
            return
        told, until = self._caller.told, kept.at + self._ttl_s
        target.repeats |= self._repeats.remember(target, body, told, exchange, until, known.hits, known.hit_s)

    def _looked(self, trip: _Trip, kept: Kept | None) -> None:
        """What Redis has said."""
        trip.looks = False
        if trip.over:
            return
        if kept is None:
            self._compute(trip)
            return
        leader, waiting = trip.leader, self._land(trip)
        for asker in waiting if leader is None else [leader, *waiting]:
            asker.end()
            self._found(asker.inference, asker.known, kept, asker.exchange)

    def _compute(self, trip: _Trip) -> None:
        """Have the one that leads be computed, or the next where its client has left by now."""
        leader = trip.leader
        if leader is None:
            self.next(trip)
            return
        leader.known.misses.value += 1
        leader.known.miss_s.value += time.monotonic() - leader.exchange.arrived
        if not leader.start(trip):
            self.next(trip)

    def next(self, trip: _Trip) -> None:
        """Nothing has come of the one that led, which has been told."""
        while (leader := self.flights.fail(trip)) is not None:
            leader.end()
            if leader.start(trip):
                return
        self.forget(trip)

    def landed(self, trip: _Trip, answer: Complete) -> None:
        """The answer is there, perhaps that of one whose client has left."""
        leader, spec = trip.leader, trip.spec
        is_meant = _is_of(answer, spec)
        store = self.stores.store if is_meant and self._is_current(spec) else None
        copy = b""
        if store is not None or trip.waiting:
            copy = answer.payload if type(answer.payload) is bytes else bytes(_view(answer.payload))
        if store is not None:
            store.put(trip.kept_as, answer.body, copy)
        waiting = self._land(trip) if is_meant or not trip.waiting else []
        if leader is not None:
            leader.inference.complete(answer, _MISS)
        elif answer.held:
            self.application.release(answer.held)
        for asker in waiting:
            asker.end()
            asker.inference.complete(replace(answer, payload=copy, held=0), _WAIT)
        if not trip.over:
            self.next(trip)  # others may have asked for just this version, and the broker has given another one's

    def _is_current(self, spec: ModelSpec) -> bool:
        """Whether all that serve a version still have what the request was submitted for."""
        state = (self._caller.models or {}).get(spec.name, {}).get(spec.version)
        now = None if state is None else state.spec
        return now is not None and now.build == spec.build and self._caller.is_told

    def _land(self, trip: _Trip) -> list[_Asker]:
        waiting = self.flights.land(trip)
        self.forget(trip)
        return waiting

    def forget(self, trip: _Trip) -> None:
        """It is over."""
        if trip.slot is not None:
            trip.slot.give_back()
            trip.slot = None

    def close(self) -> None:
        self.stores.close()


def _is_of(answer: Complete, spec: ModelSpec) -> bool:
    """Whether an answer is of the version that was meant: where none was named, the broker may choose another."""
    try:
        return ran(answer.body) == (spec.name, spec.version)
    except BadMessage as error:
        log.warning("an answer cannot be read", extra=fields(model=spec.name, reason=str(error)))
        return False


def _view(payload: Payload) -> Buffer:
    return payload.view if isinstance(payload, Placed) else payload


class _Trip(Flight["_Asker"]):
    """A flight, and what goes with it. ``kept_as``: the key of its answer. ``payload``: that all its requests share; it
    lies in ``slot``, if in any. ``under_way``: whose request the broker has; None: nobody's. ``looks``: it is not known
    yet whether the answer was kept."""

    __slots__ = ("_cache", "kept_as", "looks", "payload", "slot", "spec", "under_way")

    def __init__(self, key: bytes, leader: _Asker) -> None:
        super().__init__(key, leader)
        self._cache = leader.cache
        self.kept_as = key
        self.spec = leader.query.spec
        self.payload: Payload = b""
        self.slot: Slot | None = None
        self.under_way: Inference | None = None
        self.looks = False

    def hold(self, slot: Slot | None) -> None:
        """Where its payload lies now."""
        if slot is not self.slot:
            before, self.slot = self.slot, None if slot is None else slot.share()
            if before is not None:
                before.give_back()

    # --- what becomes of the request that is under way ---

    def complete(self, answer: Complete) -> None:
        self._ended()
        self._cache.landed(self, answer)

    def fail(self, error: PenstockError) -> None:
        self._ended()
        if self.leader is not None:
            self.leader.inference.fail(error)
        self._cache.next(self)

    def _ended(self) -> None:
        inference, self.under_way = self.under_way, None
        if self.leader is None and inference is not None:
            inference()  # its client has left, which only now is said of it


class _Asker:
    """A request whose answer was not kept: it leads a flight, or waits for one."""

    __slots__ = ("_room", "_timer", "_trip", "cache", "exchange", "inference", "known", "query")

    def __init__(self, cache: ResponseCache, exchange: Exchange, query: Query, known: _Known) -> None:
        self.cache = cache
        self.exchange = exchange
        self.query = query
        self.known = known
        self.inference = cache.application.inference(cache.application, exchange, query)
        self.inference.unasked()
        self._trip: _Trip | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._room: Callable[[], None] | None = None  # ends waiting for room in shared memory

    # --- waiting ---

    def wait(self, trip: _Trip) -> None:
        """Its body is not needed: it is the same as that of the one that leads."""
        self._trip = trip
        self.known.waits.value += 1
        limit_s, since = self.inference.limit()
        left_s = max(0.0, since + limit_s - time.monotonic())
        self._timer = self.cache.loop.call_later(left_s, self._expire)
        self.exchange.gone = self
        self.exchange.let_go()

    def _expire(self) -> None:
        limit_s, _ = self.inference.limit()
        self._leave()
        self._refuse(PenstockError(DEADLINE, f"no result for model '{self.query.form.model}' within {limit_s:g} s"))

    def end(self) -> None:
        """It waits no longer."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def __call__(self) -> None:
        """Its client has left."""
        trip = self._trip
        assert trip is not None, "it has not joined"
        leads = trip.leader is self
        self._leave()
        if not (leads and trip.under_way is self.inference and not trip.over):  # else others want what comes of it
            self.inference()

    def _leave(self) -> None:
        trip = self._trip
        assert trip is not None, "it has not joined"
        self.end()
        if self._room is not None:
            self._room()
        if self.cache.flights.leave(trip, self):
            self.cache.forget(trip)
            if trip.under_way not in (None, self.inference):
                trip.under_way()  # that of one whose client had left before
        elif trip.leader is None and not (trip.over or trip.looks or trip.under_way):
            self.cache.next(trip)

    # --- leading ---

    def lead(self, trip: _Trip, kept_as: bytes, payload: Buffer) -> None:
        self._trip = trip
        trip.kept_as, trip.payload = kept_as, payload
        trip.hold(self.exchange.slot)
        self.exchange.gone = self

    def start(self, trip: _Trip) -> bool:
        """Have it computed. False: something keeps it from that, which it has been told."""
        try:
            if self.query.form.nbytes < PLACED_MIN_BYTES or isinstance(trip.payload, Placed):
                self._submit(trip)
                return True
            placed = self.exchange.place(trip.payload)
            if placed is not None:
                self._placed(trip, placed)
                return True
        except PenstockError as error:
            self._refuse(error)
            return False
        later = partial(self.cache.application.later, self.exchange)
        self.exchange.wait(len(trip.payload), partial(later, partial(self._roomy, trip)), partial(later, self._late))
        self._room, self.exchange.gone = self.exchange.gone, self
        return True

    def _roomy(self, trip: _Trip, slot: Slot) -> None:
        self._room = None
        assert not isinstance(trip.payload, Placed), "it has its place"
        try:
            self._placed(trip, self.exchange.put(trip.payload, slot))
        except PenstockError as error:
            self._refuse(error)
            self.cache.next(trip)

    def _late(self, sentence: str) -> None:
        self._room = None
        self._refuse(PenstockError(OVERLOADED, sentence, 1.0))
        assert self._trip is not None, "it has not joined"
        self.cache.next(self._trip)

    def _placed(self, trip: _Trip, payload: Payload) -> None:
        trip.payload = payload
        trip.hold(self.exchange.slot)
        self._submit(trip)

    def _submit(self, trip: _Trip) -> None:
        self.inference.start(trip.payload, trip)
        trip.under_way = self.inference
        self.exchange.gone = self
        self.cache.application.flush()

    def _refuse(self, error: PenstockError) -> None:
        """Answer with an error of this gateway's."""
        application = self.cache.application
        application.count_failure(self.exchange.head.target, error.code)
        application.fail(self.exchange, error, self.query.id)
