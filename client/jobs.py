"""Jobs: requests that are answered later, and outlive the client that submits them.

>>> job = client.submit_job("digits", {"image": image})
>>> scores = job.result()["scores"]
>>> for job in as_completed(jobs): ...
"""

from __future__ import annotations

import queue
import time
from collections.abc import AsyncIterator, Callable, Generator, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import quote

from penstock.client.jobhttp import Channel, Response, Unreached
from penstock.client.jobtensors import pack_request, read_response
from penstock.client.jobwatch import ANSWER_S, WAIT_S, Told, Watch
from penstock.client.terms import check_sticky, check_terms, check_timeout
from penstock.wire.errors import CANCELLED, DEADLINE, MODEL_FAILED, NOT_FOUND, UNSUPPORTED, PenstockError

if TYPE_CHECKING:
    from penstock.client.client import Result

ENDED: Final = frozenset({"succeeded", "failed", "cancelled", "expired"})
_CLOSE_S: Final = 2.0  # for the thread that waits for jobs
_AGAIN_S: Final = 0.2  # before a gateway that did not answer is asked again
_CALLBACK: Final = "?callback_url="


class Job:
    """A request that the server keeps until it has answered it, and the answer for some time. Made by
    ``Client.submit_job`` and ``Client.job``; safe to share between threads."""

    def __init__(self, jobs: Jobs, ident: str) -> None:
        self.id = ident
        self._jobs = jobs

    def about(self) -> dict[str, Any]:
        """All that the server says of it: its status, when it was begun and ended, how often it was tried. Raises
        PenstockError, NOT_FOUND also for a job that has been forgotten."""
        found: dict[str, Any] = self._jobs.ask("GET", self._path()).json()
        return found

    def status(self) -> str:
        """ "queued", "running", "succeeded", "failed", "cancelled", or "expired" once it has been forgotten. Raises
        PenstockError."""
        ended = self._jobs.ask("GET", f"/v2/jobs?id={quote(self.id, safe='')}").json()["jobs"]
        about = ended[0] if ended else self.about()  # which may have a large result only once it has ended
        if about["status"] == "unknown":
            raise PenstockError(NOT_FOUND, about["error"])
        return str(about["status"])

    def done(self) -> bool:
        """Whether it has ended, in whatever way. Raises PenstockError."""
        return self.status() in ENDED

    def result(self, timeout: float | None = None) -> Result:
        """Wait for its outputs: as ``Client.infer`` returns them. ``timeout``: seconds, None for as long as it takes;
        the job goes on afterwards. While no server answers, as in a restart, it is asked again and again. Raises
        PenstockError: what the request has failed with, CANCELLED, NOT_FOUND, or DEADLINE when the time is up."""
        until = None if timeout is None else time.monotonic() + check_timeout(timeout)
        while True:
            left_s = WAIT_S if until is None else max(0.0, min(WAIT_S, until - time.monotonic()))
            try:
                path = self._path(f"/result?wait={left_s:.3f}")
                response = self._jobs.channel.ask("GET", path, limit_s=left_s + ANSWER_S)
                if response.status == 200:
                    return _result(response.headers, response.body)
                if response.status != 202:
                    raise response.error(MODEL_FAILED)
            except PenstockError as error:
                if not error.retryable or (until is not None and time.monotonic() >= until):
                    raise
                self._jobs.pause(max(_AGAIN_S, min(error.retry_after_s, 1.0)))
            if until is not None and time.monotonic() >= until:
                raise PenstockError(DEADLINE, f"job {self.id} has not ended within {timeout:g} s; it goes on")

    def __await__(self) -> Generator[Any, None, Result]:
        """``await job``: its result, while others have the event loop."""
        import asyncio

        return asyncio.to_thread(self.result).__await__()

    def cancel(self) -> bool:
        """Have it end. Whether it will, or has been cancelled already: False when it had ended otherwise. Raises
        PenstockError."""
        return self._jobs.ask("DELETE", self._path()).json()["status"] not in ("succeeded", "failed")

    def add_done_callback(self, fn: Callable[[Job], object]) -> None:
        """Call ``fn`` with this job once it has ended, on a thread that all jobs of a client share: it should not take
        long. It is not called when the client is closed before. Raises PenstockError for a client that is closed."""
        self._jobs.watch.add([self.id], lambda ident: partial(_call, fn, self))

    def _path(self, more: str = "") -> str:
        return f"/v2/jobs/{quote(self.id, safe='')}{more}"

    def __repr__(self) -> str:
        return f"<Job {self.id}>"


def _call(fn: Callable[[Job], object], job: Job, error: PenstockError | None) -> None:
    if error is None:
        fn(job)


def _put_named(put: Callable[[Job, PenstockError | None], None], named: Mapping[str, Job], ident: str) -> Told:
    return partial(put, named[ident])


class Jobs:
    """The jobs of one client."""

    def __init__(self, where: Callable[[], str], timeout_s: float) -> None:
        """``where``: tells where HTTP is, see ``jobhttp.py``."""
        self.timeout_s = timeout_s
        self.channel = Channel(where)
        self.watch = Watch(self.channel)

    def submit(
        self,
        model: str,
        inputs: Mapping[str, Any],
        version: str,
        outputs: Sequence[str],
        headers: Mapping[str, str],
        callback_url: str,
    ) -> Job:
        path = f"/v2/models/{quote(model, safe='')}" + (f"/versions/{quote(version, safe='')}" if version else "")
        datatypes = {each["name"]: each["datatype"] for each in self.ask("GET", path).json()["inputs"]}
        body, json_bytes = pack_request(inputs, outputs, datatypes.get)
        own = {
            "Prefer": "respond-async",
            "Content-Type": "application/octet-stream",
            "Inference-Header-Content-Length": str(json_bytes),
        }
        asked = f"{path}/infer" + (_CALLBACK + quote(callback_url, safe="") if callback_url else "")
        response = self._post(asked, body, {**own, **headers})
        if response.status == 200:
            raise PenstockError(UNSUPPORTED, "this server keeps no jobs ([jobs] store is off): use infer or submit")
        if response.status != 202:
            raise response.error()
        return Job(self, str(response.json()["id"]))

    def ask(self, method: str, path: str) -> Response:
        """What is answered with 200. Raises PenstockError."""
        response = self.channel.ask(method, path, limit_s=self.timeout_s)
        if response.status != 200:
            raise response.error()
        return response

    def _post(self, path: str, body: bytes, headers: Mapping[str, str]) -> Response:
        """Once more only where nobody can have heard it: a job that is submitted twice is run twice."""
        try:
            return self.channel.ask("POST", path, body, headers, limit_s=self.timeout_s)
        except Unreached as error:
            if not error.unheard:
                raise
        return self.channel.ask("POST", path, body, headers, limit_s=self.timeout_s)

    def pause(self, seconds: float) -> None:
        """Raises PenstockError when the client is closed meanwhile."""
        if self.watch.closed.wait(seconds):
            raise PenstockError(CANCELLED, "the client was closed")

    def close(self) -> None:
        self.watch.close(_CLOSE_S)
        self.channel.close()


def terms(priority: int, tenant: str, sticky: str, time_limit: float | None) -> dict[str, str]:
    """The headers of what a request asks of the scheduler. Raises PenstockError."""
    check_terms(priority, tenant)
    headers = {}
    if priority:
        headers["Penstock-Priority"] = str(priority)
    if tenant:
        headers["Penstock-Tenant"] = tenant
    if sticky:
        headers["Penstock-Sticky"] = check_sticky(sticky)
    if time_limit is not None:
        headers["Penstock-Timeout"] = f"{check_timeout(time_limit):.6f}"
    return headers


def _result(headers: Mapping[str, str], body: bytes) -> Result:
    from penstock.client.client import Result

    answer = read_response(headers, body)
    return Result(answer.model, answer.version, answer.outputs, answer.complete, answer.worker)


class as_completed:
    """The jobs in the order in which they end, whatever way: ``for job in as_completed(jobs)``, and with ``async for``
    while others have the event loop. Those that have ended already come first; each job comes once.

    ``timeout``: seconds for all of them, after which PenstockError (DEADLINE) is raised.
    """

    def __init__(self, jobs: Iterable[Job], timeout: float | None = None) -> None:
        self._jobs = list({job.id: job for job in jobs}.values())
        self._timeout_s = None if timeout is None else check_timeout(timeout)

    def _begin(self, put: Callable[[Job, PenstockError | None], None]) -> None:
        """Have each of them put once it has ended."""
        by_client: dict[int, list[Job]] = {}
        for job in self._jobs:
            by_client.setdefault(id(job._jobs), []).append(job)
        for jobs in by_client.values():
            named = {job.id: job for job in jobs}
            jobs[0]._jobs.watch.add(list(named), partial(_put_named, put, named))

    def _late(self, left: int) -> PenstockError:
        return PenstockError(DEADLINE, f"{left} of {len(self._jobs)} jobs have not ended within {self._timeout_s:g} s")

    def __iter__(self) -> Iterator[Job]:
        ended: queue.Queue[tuple[Job, PenstockError | None]] = queue.Queue(len(self._jobs))
        until = None if self._timeout_s is None else time.monotonic() + self._timeout_s
        self._begin(lambda job, error: ended.put_nowait((job, error)))
        for left in range(len(self._jobs), 0, -1):
            try:
                job, error = ended.get(timeout=None if until is None else max(0.0, until - time.monotonic()))
            except queue.Empty:
                raise self._late(left) from None
            if error is not None:
                raise error
            yield job

    async def __aiter__(self) -> AsyncIterator[Job]:
        import asyncio

        loop = asyncio.get_running_loop()
        ended: asyncio.Queue[tuple[Job, PenstockError | None]] = asyncio.Queue(len(self._jobs))
        until = None if self._timeout_s is None else loop.time() + self._timeout_s

        def put(job: Job, error: PenstockError | None) -> None:
            loop.call_soon_threadsafe(ended.put_nowait, (job, error))

        self._begin(put)
        for left in range(len(self._jobs), 0, -1):
            try:
                wait_s = None if until is None else max(0.0, until - loop.time())
                job, error = await asyncio.wait_for(ended.get(), wait_s)
            except TimeoutError:
                raise self._late(left) from None
            if error is not None:
                raise error
            yield job
