"""What a job is, and what may become of it. Pure: a job and an event go in, the next job comes out.

Times are seconds since 1970, since a job outlives the boot of its host and may be run on another; so the clocks of
hosts that share a store have to agree to well within ``lease_s``.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Final

from penstock.jobs.options import JobsOptions

QUEUED: Final = "queued"
RUNNING: Final = "running"
SUCCEEDED: Final = "succeeded"
FAILED: Final = "failed"
CANCELLED: Final = "cancelled"
EXPIRED: Final = "expired"  # forgotten but for its id
ENDED: Final = frozenset({SUCCEEDED, FAILED, CANCELLED})
STATUSES: Final = (QUEUED, RUNNING, SUCCEEDED, FAILED, CANCELLED)  # those of jobs that are kept

# What a job becomes: by its status, by the event. What is not here cannot happen.
TRANSITIONS: Final[Mapping[str, Mapping[str, str]]] = {
    QUEUED: {"claim": RUNNING, "cancel": CANCELLED},
    RUNNING: {
        "claim": RUNNING,  # its runner has gone
        "put_back": QUEUED,
        "succeed": SUCCEEDED,
        "fail": FAILED,
        "cancel": CANCELLED,
    },
    SUCCEEDED: {"expire": EXPIRED},
    FAILED: {"expire": EXPIRED},
    CANCELLED: {"expire": EXPIRED},
    EXPIRED: {},
}
_EVENTS: Final = {SUCCEEDED: "succeed", FAILED: "fail", CANCELLED: "cancel"}

ERROR_CHARACTERS_MAX: Final = 4096  # of any sentence that is kept

# Between the attempts of a callback; the last one stands for all after it.
CALLBACK_WAITS_S: Final = (1.0, 5.0, 30.0, 120.0, 600.0)
# Nobody has a job wait for longer, or a callback beside the lease of who sends it: what is to wait until later was told
# so before the clock was set back.
LATER_MAX_S: Final = 60.0
CALLBACK_LATER_MAX_S: Final = 1200.0
PENDING: Final = "pending"  # a callback that is to be sent
DELIVERED: Final = "delivered"
CALLBACK_FAILED: Final = "failed"  # given up


class IllegalTransition(Exception):
    """An event that cannot happen to a job in its status: a defect of who says so."""

    def __init__(self, status: str, event: str) -> None:
        super().__init__(f"a job that is {status} cannot {event}")


@dataclass(frozen=True, slots=True)
class StoredRequest:
    """An HTTP request as it came, with the headers that mean something for it. ``model`` is for those who look."""

    method: bytes
    url: bytes
    headers: Mapping[str, bytes]
    body: bytes
    model: str = ""
    callback_url: str = ""

    @property
    def size(self) -> int:
        """Bytes that it counts for."""
        headers = sum(len(name) + len(value) for name, value in self.headers.items())
        return len(self.method) + len(self.url) + headers + len(self.body) + len(self.callback_url)


@dataclass(frozen=True, slots=True)
class StoredResponse:
    status: int
    headers: Mapping[str, bytes]
    body: bytes

    @property
    def size(self) -> int:
        """Bytes that it counts for."""
        return sum(len(name) + len(value) for name, value in self.headers.items()) + len(self.body)


@dataclass(frozen=True, slots=True)
class Callback:
    """Whether the end of a job has been told. ``due_at``: when it is to be tried next; while somebody does, when that
    is taken for lost."""

    url: str
    state: str = ""  # "" until the job has ended
    attempts: int = 0
    due_at: float = 0.0
    owner: str = ""
    last_error: str = ""


@dataclass(frozen=True, slots=True)
class Job:
    """All of a job but its request and response. Of one that has expired: id, model and times alone."""

    id: str
    status: str
    model: str
    submitted_at: float
    bytes: int = 0  # of its request, and of its response once it has ended
    started_at: float | None = None  # the first time
    ended_at: float | None = None
    expires_at: float | None = None
    attempts: int = 0  # how often it has been begun
    deaths: int = 0  # how often its runner ended meanwhile
    not_before: float = 0.0  # while it is queued
    owner: str = ""  # while it runs
    lease_until: float = 0.0
    cancel_wanted: bool = False
    http_status: int | None = None
    error: str = ""  # a sentence, where there is no response that says what was wrong
    callback: Callback | None = None

    @property
    def ended(self) -> bool:
        return self.status in ENDED or self.status == EXPIRED


def next_status(status: str, event: str) -> str:
    """Raises IllegalTransition."""
    try:
        return TRANSITIONS[status][event]
    except KeyError:
        raise IllegalTransition(status, event) from None


def submitted(request: StoredRequest, now: float) -> Job:
    """Its id cannot be guessed: who knows it may read the result."""
    callback = Callback(request.callback_url) if request.callback_url else None
    return Job(secrets.token_hex(16), QUEUED, request.model, now, request.size, callback=callback)


def is_due(job: Job, now: float, dead: frozenset[str] = frozenset()) -> bool:
    """Whether anybody may run it now. ``dead``: owners that are known to have ended."""
    if job.status == QUEUED:
        return not now < job.not_before <= now + LATER_MAX_S
    return job.status == RUNNING and (job.lease_until <= now or job.owner in dead)


def claimed(job: Job, owner: str, now: float, lease_s: float, options: JobsOptions) -> Job:
    """Running for this owner; or ended, when nobody wants it any more or too many runners have ended under it."""
    deaths = job.deaths + (job.status == RUNNING)
    job = replace(job, deaths=deaths)
    if job.cancel_wanted:
        return ended(job, CANCELLED, None, "", now, options)
    if deaths >= options.attempts_max:
        return ended(job, FAILED, None, f"its runner ended {deaths} times while it ran (attempts_max)", now, options)
    return replace(
        job,
        status=next_status(job.status, "claim"),
        owner=owner,
        lease_until=now + lease_s,
        attempts=job.attempts + 1,
        started_at=now if job.started_at is None else job.started_at,
        not_before=0.0,
    )


def holds(job: Job, owner: str) -> bool:
    """Whether it runs for this owner. A lease that is over and that nobody else has taken is still its own."""
    return job.status == RUNNING and job.owner == owner


def renewed(job: Job, now: float, lease_s: float) -> Job:
    return replace(job, lease_until=now + lease_s)


def given_back(job: Job, not_before: float, now: float, options: JobsOptions) -> Job:
    """Queued again, not to be run before then; or cancelled, when that was wanted meanwhile."""
    if job.cancel_wanted:
        return ended(job, CANCELLED, None, "", now, options)
    status = next_status(job.status, "put_back")
    return replace(job, status=status, not_before=not_before, owner="", lease_until=0.0)


def cancelled(job: Job, now: float, options: JobsOptions) -> Job:
    """At once, while nobody runs it; else its runner is to see to it. One that has ended stays as it is."""
    if job.status == QUEUED:
        return ended(job, CANCELLED, None, "", now, options)
    return replace(job, cancel_wanted=True) if job.status == RUNNING else job


def ended(job: Job, status: str, response: StoredResponse | None, error: str, now: float, options: JobsOptions) -> Job:
    """``status``: one of ``ENDED``. Its request is not needed any more, and counts for nothing."""
    next_status(job.status, _EVENTS[status])
    callback = job.callback
    kept_s = options.ttl_s
    if callback is not None:
        callback = replace(callback, state=PENDING, due_at=now)
        kept_s = max(kept_s, callback_span_s(options))
    return replace(
        job,
        status=status,
        ended_at=now,
        expires_at=now + kept_s,
        bytes=0 if response is None else response.size,
        http_status=None if response is None else response.status,
        error=tidied(error),
        owner="",
        lease_until=0.0,
        not_before=0.0,
        cancel_wanted=False,
        callback=callback,
    )


def has_expired(job: Job, now: float) -> bool:
    return job.expires_at is not None and job.expires_at <= now


def seen(job: Job, now: float, options: JobsOptions) -> Job | None:
    """As who asks for it sees it, whether or not anybody has swept since; None when even its tombstone has gone."""
    if not has_expired(job, now):
        return job
    return None if has_expired(job, now - options.tombstone_s) else tombstone(job)


def tombstone(job: Job) -> Job:
    """What is left of it."""
    return Job(
        job.id,
        next_status(job.status, "expire"),
        job.model,
        job.submitted_at,
        started_at=job.started_at,
        ended_at=job.ended_at,
        expires_at=job.expires_at,
    )


def callback_span_s(options: JobsOptions) -> float:
    """For how long a callback may be tried: a job whose callback is pending is kept for longer than that."""
    waits = sum(callback_wait_s(attempt) for attempt in range(1, options.callback_attempts_max))
    return 1.5 * waits + 2 * options.callback_attempts_max * options.callback_timeout_s


def callback_wait_s(attempts: int) -> float:
    """After so many attempts, until the next."""
    return CALLBACK_WAITS_S[min(attempts, len(CALLBACK_WAITS_S)) - 1]


def callback_is_due(callback: Callback, now: float, lease_s: float) -> bool:
    return callback.state == PENDING and not now < callback.due_at <= now + CALLBACK_LATER_MAX_S + lease_s


def callback_begun(callback: Callback, owner: str, now: float, lease_s: float, attempts_max: int) -> Callback:
    """Somebody sends it; or it is given up, when whoever did the last time has ended."""
    if callback.attempts >= attempts_max:
        error = callback.last_error or "the process that sent it ended"
        return replace(callback, state=CALLBACK_FAILED, owner="", last_error=error)
    return replace(callback, attempts=callback.attempts + 1, owner=owner, due_at=now + lease_s)


def calls(callback: Callback, owner: str) -> bool:
    """Whether this owner is sending it."""
    return callback.state == PENDING and callback.owner == owner


def callback_ended(callback: Callback, ok: bool, error: str, next_at: float | None) -> Callback:
    """``next_at``: when to try again; None for never."""
    if ok:
        return replace(callback, state=DELIVERED, owner="", last_error="")
    if next_at is None:
        return replace(callback, state=CALLBACK_FAILED, owner="", last_error=tidied(error))
    return replace(callback, owner="", due_at=next_at, last_error=tidied(error))


def tidied(sentence: str) -> str:
    """As it can be kept: of bounded length, and UTF-8."""
    return sentence[:ERROR_CHARACTERS_MAX].encode("utf-8", "replace").decode()
