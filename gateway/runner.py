"""Who runs jobs: claims them from the store in the order of their arrival, has the application answer each as if it had
just come, and stores the answer.

Each job is held by a lease, which is renewed while it runs: one whose runner has ended is run again by another. So a
job may be run more than once, and ends once.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Final, NamedTuple, TypeVar

from penstock.gateway.application import Application
from penstock.gateway.connection import Http
from penstock.gateway.headless import Answer, Headless
from penstock.gateway.waits import first_of
from penstock.jobs.document import sentence_of
from penstock.jobs.job import CANCELLED, FAILED, SUCCEEDED, Job, StoredResponse
from penstock.jobs.options import JobsOptions
from penstock.jobs.store import Store, StoreError
from penstock.wire.process import fields

log = logging.getLogger("penstock.jobs")

DEAF_POLL_S: Final = 1.0  # between two looks whether the store has changed, where nobody can say so
BUSY_POLL_S: Final = 0.2  # likewise, while jobs run that may be cancelled
LOOK_S: Final = 5.0  # between two looks for what only time brings: leases that are over, jobs that are to be forgotten
_AWAY_S: Final = 1.0  # before a store that did not answer is asked again
_BACKOFF_S: Final = 0.2  # before a job that could not be run now is tried again; twice as long each time ...
_BACKOFF_MAX_S: Final = 20.0  # ... up to this
# A broker that is new knows a model only once a worker has told it.
_NEW_S: Final = 20.0
_KEPT_HEADERS: Final = ("content-type", "inference-header-content-length", "content-encoding")
_FINISH_TRIES_S: Final = (0.0, 0.5, 2.0, 5.0)  # a result is not given up because its store was away for a moment
_PUT_BACK_S: Final = 5.0  # for what is left at the end; else its lease has to run out

T = TypeVar("T")


@dataclass(slots=True, eq=False)
class _Run:
    """A job that runs here. ``end``: why it is ended before its answer: "cancelled", "lost" or "drained"."""

    job: Job
    exchange: Headless | None = None
    answer: asyncio.Future[Answer | None] | None = None
    end: str = ""

    def stop(self, why: str) -> None:
        """Nobody waits for its answer any more."""
        self.end = self.end or why
        if self.exchange is not None:
            self.exchange.leave()
        if self.answer is not None and not self.answer.done():
            self.answer.set_result(None)


class _Seen(NamedTuple):
    """What a look at the store found: its change, jobs that are now ours, and those of ours that are not wanted."""

    change: int
    claimed: Sequence[Job]
    cancelled: Collection[str]


def not_before(job: Job, now: float) -> float:
    """When a job that could not be run is to be tried again."""
    return now + min(_BACKOFF_S * 2.0 ** min(job.attempts - 1, 20), _BACKOFF_MAX_S)


def may_come_right(status: int, broker_s: float) -> bool:
    """Whether an answer says that the server could not do it, and another time might. ``broker_s``: for how long the
    broker has been known."""
    return status == 503 or (status == 404 and broker_s < _NEW_S)


def stored(answer: Answer) -> StoredResponse:
    headers = {name: answer.headers[name] for name in _KEPT_HEADERS if name in answer.headers}
    return StoredResponse(answer.status, headers, answer.body)


class Runner:
    """``run`` until it is told to stop. ``wake`` when there may be something to do."""

    def __init__(
        self,
        application: Application,
        http: Http,
        store: Store,
        options: JobsOptions,
        owner: str,
        broker_s: Callable[[], float],
        ended: Callable[[Job], None],
    ) -> None:
        """``broker_s``: for how long the broker has been known, 0 while it is not. ``ended``: a job has. ``heard``, to
        be set: whether gateways can wake it."""
        self.running: dict[str, _Run] = {}
        self.heard = False
        self._application = application
        self._http = http
        self._store = store
        self._options = options
        self._owner = owner
        self._broker_s = broker_s
        self._ended = ended
        self._meters = application.caller.meters
        self._seconds = self._meters.histogram("penstock_job_seconds")
        self._threads = ThreadPoolExecutor(options.connections_max, "penstock-store")
        self._tasks: set[asyncio.Task[None]] = set()
        self._woken = asyncio.Event()
        self._room = asyncio.Event()  # a job has ended
        self._change: int | None = None  # of the store, when it was last looked at; None: look anyway
        self._look_at = self._renew_at = 0.0  # in the loop's time
        self._away = False  # the store does not answer, and that has been said
        self._counted: int | None = None  # the store's change when it was last counted what there is

    def wake(self) -> None:
        self._woken.set()

    async def run(self, stopped: asyncio.Event) -> None:
        loop = asyncio.get_running_loop()
        while not stopped.is_set():
            self._woken.clear()
            try:
                pause_s = await self._turn(loop.time())
                self._away = False
            except StoreError as error:
                self._say_away(error)
                pause_s = _AWAY_S
            await first_of(pause_s, self._woken, stopped)

    async def _turn(self, now: float) -> float:
        """Do what there is to do. For how many seconds there will be nothing, unless it is woken."""
        looks = now >= self._look_at
        room = self._options.running_max - len(self.running)
        seen = await self._ask(self._look, None if looks else self._change, room, frozenset(self.running), looks)
        if seen is not None:
            # Where there was no room for all, there may be by the next time.
            self._change = seen.change if len(seen.claimed) < room else None
            for job in seen.claimed:
                self._begin(job)
            for ident in seen.cancelled:
                if ident in self.running:
                    self.running[ident].stop("cancelled")
        if looks:
            self._look_at = now + LOOK_S
            await self._count()
        if self.running and now >= self._renew_at:
            await self._renew(now)
        if self.running:
            return BUSY_POLL_S
        return max(0.0, self._look_at - now) if self.heard else DEAF_POLL_S

    def _look(self, change: int | None, room: int, running: frozenset[str], sweeps: bool) -> _Seen | None:
        """All that is asked of the store, on one thread: to hand over costs more than to ask. None where nothing has
        changed since ``change``."""
        store, now = self._store, time.time()
        seen = store.change()
        if seen == change:
            return None
        claimed = store.claim(self._owner, room, now, self._options.lease_s, running) if room > 0 else ()
        cancelled = store.wanted_cancels(self._owner) if running else ()
        if sweeps:
            store.sweep(now)
        return _Seen(seen, claimed, cancelled)

    async def _count(self) -> None:
        if self._change is not None and self._counted == self._change:
            return
        self._counted = self._change
        counts = await self._ask(self._store.counts)
        for status, number in counts.by_status.items():
            self._meters.value("penstock_jobs", status).value = number
        self._meters.value("penstock_jobs_bytes").value = counts.bytes

    def _begin(self, job: Job) -> None:
        run = self.running[job.id] = _Run(job)
        task = asyncio.get_running_loop().create_task(self._run(run))
        self._tasks.add(task)
        task.add_done_callback(self._done)

    async def _renew(self, now: float) -> None:
        self._renew_at = now + self._options.lease_s / 3
        asked = list(self.running)
        held = await self._ask(self._store.renew, self._owner, asked, time.time(), self._options.lease_s)
        for ident in asked:
            if ident not in held and ident in self.running:
                log.warning("job is run by another by now; it is left to it", extra=fields(job=ident))
                self.running[ident].stop("lost")

    # --- one job ---

    async def _run(self, run: _Run) -> None:
        job = run.job
        begun = time.monotonic()
        try:
            answer = await self._answer(run)
            await self._end(run, answer)
            self._ended(job)
        except StoreError as error:  # whoever finds its lease to be over runs it again
            log.error("job cannot be ended; its store is away", extra=fields(job=job.id, reason=str(error)))
        finally:
            del self.running[job.id]
            self._room.set()
            self.wake()  # there is room for another
        self._seconds.observe(time.monotonic() - begun)

    async def _answer(self, run: _Run) -> Answer | None:
        """None when it was ended before there was one."""
        budget = self._http.budget
        while len(self.running) > 1 and budget.used + run.job.bytes > budget.limit and not run.end:
            self._room.clear()
            await first_of(BUSY_POLL_S, self._room)
        request = None if run.end else await self._ask(self._store.request_of, run.job.id)
        if request is None or run.end:
            run.end = run.end or "lost"
            return None
        answered: asyncio.Future[Answer | None] = asyncio.get_running_loop().create_future()
        run.answer = answered
        run.exchange = Headless(
            self._http,
            request.method,
            request.url,
            request.headers,
            request.body,
            lambda answer: None if answered.done() else answered.set_result(answer),
        )
        self._application.handle(run.exchange)
        del request
        answer = await answered
        run.exchange = None
        return answer

    async def _end(self, run: _Run, answer: Answer | None) -> None:
        job, now = run.job, time.time()
        if run.end == "lost":
            return
        if run.end == "drained":
            await self._insist(self._store.put_back, job.id, self._owner, now, now)
        elif answer is None:
            await self._insist(self._store.finish, job.id, self._owner, CANCELLED, None, "", now)
        elif may_come_right(answer.status, self._broker_s()) and now < job.submitted_at + self._options.run_max_s:
            again = not_before(job, now)
            response = stored(answer)
            log.info(
                "job cannot be run now; it is put back",
                extra=fields(job=job.id, after_s=round(again - now, 3), reason=sentence_of(response)),
            )
            await self._insist(self._store.put_back, job.id, self._owner, again, now)
            asyncio.get_running_loop().call_later(again - now, self._look_again)
        else:
            status = SUCCEEDED if answer.status < 400 else FAILED
            await self._insist(self._store.finish, job.id, self._owner, status, stored(answer), "", now)

    async def _insist(self, do: Callable[..., bool], *arguments: Any) -> None:
        """What has been computed is worth more than one try."""
        for at, pause_s in enumerate(_FINISH_TRIES_S):
            await asyncio.sleep(pause_s)
            try:
                if not await self._ask(do, *arguments):
                    log.warning("job had ended, or is run by another", extra=fields(job=arguments[0]))
                return
            except StoreError as error:
                if at == len(_FINISH_TRIES_S) - 1:
                    raise
                self._say_away(error)

    def _look_again(self) -> None:
        self._look_at = 0.0
        self.wake()

    # --- the end ---

    async def drain(self, limit_s: float) -> None:
        """Let what runs end, and put back what does not within the limit."""
        await self._settle(limit_s)
        for run in list(self.running.values()):
            run.stop("drained")
        left = len(self.running)
        await self._settle(_PUT_BACK_S)
        log.info("jobs drained", extra=fields(put_back=left - len(self.running), left=len(self.running)))
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def _settle(self, limit_s: float) -> None:
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=limit_s)

    # --- how ---

    async def _ask(self, do: Callable[..., T], *arguments: Any) -> T:
        """On a thread, since it blocks. Raises StoreError."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, lambda: do(*arguments))

    def _say_away(self, error: StoreError) -> None:
        if not self._away:
            self._away = True
            log.error("the store of jobs does not answer; it is tried again", extra=fields(reason=str(error)))

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        error = None if task.cancelled() else task.exception()
        if error is not None:
            log.critical("a job could not be handled", exc_info=error)
