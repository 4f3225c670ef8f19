"""Requests that are answered later: ``Prefer: respond-async`` makes a job of any inference request, which ``/v2/jobs``
tells of. Who runs them is a process of its own, see ``runner.py``.

The store blocks, so it is asked on threads; a gateway that is asked nothing of jobs does not open it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Final, TypeVar

import orjson

from penstock.gateway.about import JOB, JOBS, STRING, About, a_list, an_object, json
from penstock.gateway.application import Application
from penstock.gateway.aside import Aside
from penstock.gateway.connection import Exchange
from penstock.gateway.inference import ONLY_JOBS_CALL, CallbackAsked, Query
from penstock.gateway.jobquery import (
    IDS_MAX,
    LIMIT_MAX,
    WAIT_MAX_S,
    prefers_async,
    read_ids,
    read_listing,
    read_wait,
    split_callback,
)
from penstock.gateway.jobwaits import Waits
from penstock.gateway.jobwake import Bell
from penstock.gateway.parse import Parse
from penstock.gateway.reader import Head, Request
from penstock.gateway.routes import Route, RouteError
from penstock.gateway.target import Defer, Handler, Target
from penstock.jobs.address import CallbackRefused, read_networks, read_target
from penstock.jobs.document import document
from penstock.jobs.job import CANCELLED, EXPIRED, STATUSES, Job, StoredRequest, StoredResponse
from penstock.jobs.place import Place
from penstock.jobs.store import StoreError, StoreFull, open_store
from penstock.wire.endpoints import RuntimeDir
from penstock.wire.errors import BAD_INPUT, OVERLOADED, UNAVAILABLE, UNSUPPORTED, PenstockError
from penstock.wire.tensors import Buffer

_OFF: Final = "this server keeps no jobs ([jobs] store is off), so nothing can be called back"
# Headers that mean something for the request itself, and not for how its first answer is sent.
KEPT: Final = (
    *("content-type", "content-encoding", "inference-header-content-length", "x-request-id", "cache-control"),
    *("penstock-explain", "penstock-priority", "penstock-sticky", "penstock-tenant", "penstock-timeout"),
    *("traceparent", "tracestate"),
)
T = TypeVar("T")
_JOB: Final = json(JOB)
_WAIT: Final = {"wait": {"type": "number", "minimum": 0, "maximum": WAIT_MAX_S}}
_LISTING: Final = {
    "id": a_list(STRING, maxItems=IDS_MAX),
    "status": {"enum": sorted(STATUSES)},
    "limit": {"type": "integer", "minimum": 1, "maximum": LIMIT_MAX},
    "after": STRING,
}
_LIST: Final = About(
    "Jobs, or those of some that have ended",
    JOBS,
    json(an_object({"jobs": a_list(JOB)}, ("jobs",))),
    errors=(400, 503),
    query=_LISTING | _WAIT,
)
_SHOW: Final = About("A job, with its answer once it has ended", JOBS, _JOB, errors=(400, 404, 410, 503), query=_WAIT)
_CANCEL: Final = About("Cancel a job", JOBS, _JOB, errors=(400, 404, 410, 503))
_RESULT: Final = About(
    "A job's answer, as it would have been",
    JOBS,
    {"application/json": {}, "application/octet-stream": {}},
    errors=(400, 404, 410, 500, 503),
    query=_WAIT,
    later=_JOB,
)
_JSON: Final = b"application/json"
_AGAIN: Final = b"Retry-After: 1\r\n"
_LATE: Final = "the store of jobs did not come to it within {} (store_wait_s)"
_NOT_SHARED: Final = "a job may run when its client has gone, and its memory; leave out shared_memory_region"


class NoJobs:
    """A gateway that keeps no jobs: who prefers not to wait has to, as RFC 7240 allows, and nobody is called back."""

    def __init__(self, application: Application) -> None:
        application.deferral = lambda head: _deferral_of_callback(head.url, UNSUPPORTED, _OFF)


def _deferral_of_callback(url: bytes, code: str, sentence: str) -> Defer | None:
    """What refuses a request that is no job and asks to be called back; None for one that does not."""
    if b"?" not in url:
        return None
    try:
        if not split_callback(url)[1]:
            return None
        error = PenstockError(code, sentence)
    except PenstockError as malformed:
        error = malformed

    def refuse(exchange: Exchange, target: Target, parse: Parse) -> None:
        raise PenstockError(error.code, error.message)

    return refuse


def _kept(request: Request) -> Buffer:
    """The body, as it came, for longer than the request: shared memory is needed for others."""
    return request.body if request.slot is None else bytes(request.body)


class Jobs:
    """``routes``: for the application to answer. ``draining``, to be replaced: whether the gateway is about to end."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        application: Application,
        place: Place,
        runtime: RuntimeDir | None,
    ) -> None:
        """Raises StoreError for what is no store."""
        options = place.options
        self._application = application
        self._store = store = open_store(place.where, options)
        self._options = options
        self._allowed = read_networks(options.callback_allow)
        self._bell = Bell(None if runtime is None else runtime.jobs)
        self.draining: Callable[[], bool] = lambda: False
        self._aside = Aside(loop, options.connections_max, options.store_wait_s, _LATE)
        self._waits = Waits(loop, store, options.waiting_max, lambda: self.draining())
        application.deferral = self._deferral
        self.routes: list[Route[Handler]] = [
            Route("GET", "/v2/jobs", self._list, about=_LIST),
            Route("GET", "/v2/jobs/{id}", self._show, about=_SHOW),
            Route("DELETE", "/v2/jobs/{id}", self._cancel, about=_CANCEL),
            Route("GET", "/v2/jobs/{id}/result", self._result, about=_RESULT),
        ]

    def close(self) -> None:
        self._bell.close()
        self._store.close()

    # --- taking them in ---

    def _deferral(self, head: Head) -> Defer | None:
        if prefers_async(head.headers.get("prefer")):
            return self._take
        return _deferral_of_callback(head.url, BAD_INPUT, ONLY_JOBS_CALL)

    def _take(self, exchange: Exchange, target: Target, parse: Parse) -> None:
        """A request that could be answered now becomes a job; what is wrong with it is said at once."""
        kept = _kept(exchange)
        if target.encoding:
            self._application.expand(exchange, target, partial(self._check, parse, kept))
        else:
            self._check(parse, kept, exchange, target, exchange.body)

    def _check(self, parse: Parse, kept: Buffer, exchange: Exchange, target: Target, body: Buffer) -> None:
        self._application.large.check(exchange, target, parse, body, partial(self._checked, kept, exchange, target))

    def _checked(self, kept: Buffer, exchange: Exchange, target: Target, check: Callable[[], Query]) -> None:
        head = exchange.head
        url, callback_url = split_callback(head.url)
        try:
            if check().fleeting:
                raise PenstockError(BAD_INPUT, _NOT_SHARED)
        except CallbackAsked as asked:
            if callback_url:
                raise PenstockError(BAD_INPUT, "callback_url is given in the URL and in the parameters") from None
            callback_url = asked.url
        except PenstockError as error:
            self._application.count_failure(target, error.code)
            raise
        if callback_url:
            try:
                read_target(callback_url, self._allowed)
            except CallbackRefused as error:
                raise PenstockError(BAD_INPUT, str(error)) from None
        headers = {name: value for name in KEPT if (value := head.headers.get(name)) is not None}

        def submit() -> Job:
            request = StoredRequest(head.method, url, headers, bytes(kept), target.model, callback_url)
            return self._store.submit(request, time.time())

        self._ask(exchange, submit, partial(self._submitted, exchange))

    def _submitted(self, exchange: Exchange, job: Job) -> None:
        self._bell.ring()
        self._application.count(202)
        extra = b"Location: /v2/jobs/%b\r\nPreference-Applied: respond-async\r\n" % job.id.encode()
        exchange.answer(202, orjson.dumps({"id": job.id, "status": job.status}), _JSON, extra)

    def _ask(self, exchange: Exchange, do: Callable[[], Any], then: Callable[[Any], None]) -> None:
        """Ask the store on a thread, then go on, unless the client has left by then."""

        def asked(done: asyncio.Future[Any]) -> None:
            try:
                found = done.result()
            except StoreFull as error:
                raise PenstockError(OVERLOADED, str(error), error.retry_after_s) from None
            except StoreError as error:
                raise PenstockError(UNAVAILABLE, str(error), 1.0) from None
            then(found)

        exchange.gone = self._aside.run(lambda work: do(), partial(self._application.later, exchange, asked)).leave

    # --- telling of them ---

    def _show(self, exchange: Exchange, target: Target) -> None:
        self._when_ended(exchange, target, lambda job, response: orjson.dumps(document(job, response)), self._tell)

    def _tell(self, exchange: Exchange, job: Job, body: bytes) -> None:
        self._application.count(200)
        exchange.answer_large(200, body, _JSON, b"" if job.ended else _AGAIN)

    def _result(self, exchange: Exchange, target: Target) -> None:
        self._when_ended(exchange, target, lambda job, response: response, self._repeat)

    def _repeat(self, exchange: Exchange, job: Job, response: StoredResponse | None) -> None:
        """The response as it would have been."""
        if not job.ended:
            self._application.count(202)
            exchange.answer(202, orjson.dumps(document(job, None)), _JSON, _AGAIN)
        elif response is not None:
            self._application.count(response.status)
            own = [(name, value) for name, value in response.headers.items() if name != "content-type"]
            extra = b"".join([b"%b: %b\r\n" % (name.title().encode(), value) for name, value in own])
            kind = response.headers.get("content-type", _JSON)
            exchange.answer_large(response.status, response.body, kind, extra)
        elif job.status == CANCELLED:
            raise RouteError(499, f"job {job.id} was cancelled")
        else:
            raise RouteError(500, f"job {job.id} failed: {job.error}")

    def _when_ended(
        self,
        exchange: Exchange,
        target: Target,
        make: Callable[[Job, StoredResponse | None], T],
        tell: Callable[[Exchange, Job, T], None],
    ) -> None:
        """Look for a job, and once more when it has ended or the time to wait for that is up. ``make``: on the thread,
        what is to be told."""
        ident, wait_s = target.job, read_wait(exchange.head.url)

        def look() -> tuple[Job, T]:
            jobs = self._store.get([ident], time.time())
            found = _known(ident, jobs[0] if jobs else None)
            return found, make(found, self._store.response_of(ident) if found.ended else None)

        def looked(wait_s: float, found: tuple[Job, T]) -> None:
            job, made = found
            if wait_s and not job.ended:
                self._wait(exchange, [ident], wait_s, lambda: self._ask(exchange, look, partial(looked, 0.0)))
            else:
                tell(exchange, job, made)

        self._ask(exchange, look, partial(looked, wait_s))

    def _wait(self, exchange: Exchange, ids: list[str], seconds: float, again: Callable[[], None]) -> None:
        later = partial(self._application.later, exchange, lambda _: again(), None)
        exchange.gone = self._waits.wait(ids, seconds, later)

    def _list(self, exchange: Exchange, target: Target) -> None:
        url = exchange.head.url
        ids = read_ids(url)
        if ids:
            self._list_ended(exchange, ids, read_wait(url))
            return
        listing = read_listing(url)
        self._ask(exchange, lambda: self._store.list(time.time(), *listing), partial(self._tell_all, exchange))

    def _list_ended(self, exchange: Exchange, ids: list[str], wait_s: float) -> None:
        """Those of the jobs that have ended, as soon as one of them has. One that is not known has, too: nobody is to
        wait for it."""

        def looked(wait_s: float, jobs: Sequence[Job]) -> None:
            ended = [job for job in jobs if job.ended]
            unknown = set(ids).difference([job.id for job in jobs])
            if wait_s and not ended and not unknown:
                self._wait(exchange, ids, wait_s, lambda: self._ask(exchange, look, partial(looked, 0.0)))
            else:
                self._tell_all(exchange, ended, sorted(unknown))

        def look() -> Sequence[Job]:
            return self._store.get(ids, time.time())

        self._ask(exchange, look, partial(looked, wait_s))

    def _tell_all(self, exchange: Exchange, jobs: Sequence[Job], unknown: Sequence[str] = ()) -> None:
        self._application.count(200)
        found = [document(job, None) for job in jobs]
        found += [{"id": each, "status": "unknown", "error": f"there is no job '{each}'"} for each in unknown]
        exchange.answer_large(200, orjson.dumps({"jobs": found}), _JSON)

    def _cancel(self, exchange: Exchange, target: Target) -> None:
        def cancelled(job: Job | None) -> None:
            job = _known(target.job, job)
            self._bell.ring()
            self._tell(exchange, job, orjson.dumps(document(job)))

        self._ask(exchange, lambda: self._store.cancel(target.job, time.time()), cancelled)


def _known(ident: str, job: Job | None) -> Job:
    """Raises RouteError for one that never was, or that has been forgotten."""
    if job is None:
        raise RouteError(404, f"there is no job '{ident}'")
    if job.status == EXPIRED:
        raise RouteError(
            410, f"job '{ident}' ended more than its time to live ago, and has been forgotten ([jobs] ttl_s)"
        )
    return job
