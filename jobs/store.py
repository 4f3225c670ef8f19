"""What keeps jobs: the interface of a store, what both kinds have in common, and which one is meant.

All methods block, so they are called on threads, from as many as like to. Each may raise StoreError, a sentence, when
the store is away, full to the last byte or broken; nothing has happened then, or it has and the answer was lost: asking
again is safe (a job that is submitted twice runs twice). Constructing opens nothing: a server starts without its store.
"""

from __future__ import annotations

import hashlib
import os
import secrets
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from penstock.jobs.job import FAILED, Job, StoredRequest, StoredResponse, ended
from penstock.jobs.options import JobsOptions

SCHEMA: Final = 1  # of both kinds of store; another one is not read
SECRET_BYTES: Final = 32
IDS_MAX: Final = 4096  # of one call
# The part of bytes_max that requests may take: what has been accepted must not fail for want of room for its response.
REQUESTS_PART: Final = 0.75
OFF: Final = "off"
_REDIS: Final = ("redis://", "rediss://", "unix://")


class StoreError(Exception):
    """A sentence for whoever asked."""


class StoreFull(StoreError):
    """A bound of the configuration is reached. ``retry_after_s``: when it may be worth trying again."""

    def __init__(self, sentence: str, retry_after_s: float = 10.0) -> None:
        super().__init__(sentence)
        self.retry_after_s = retry_after_s


@dataclass(frozen=True, slots=True)
class Counts:
    by_status: Mapping[str, int]  # every one of job.STATUSES
    bytes: int  # of requests and responses
    tombstones: int
    callbacks: int  # those that are pending


class Store(ABC):
    def __init__(self, options: JobsOptions) -> None:
        self.options = options

    @abstractmethod
    def submit(self, request: StoredRequest, now: float) -> Job:
        """Durable when it returns. Raises StoreFull."""

    @abstractmethod
    def get(self, ids: Collection[str], now: float) -> Sequence[Job]:
        """In the order of ``ids``; without those that never were, or whose tombstone has gone."""

    @abstractmethod
    def list(self, now: float, status: str = "", limit: int = 100, after: str = "") -> Sequence[Job]:
        """The newest first, and none that has expired. ``after``: those submitted before that one, nothing if it is
        unknown."""

    @abstractmethod
    def request_of(self, id: str) -> StoredRequest | None:
        """None once the job has ended."""

    @abstractmethod
    def response_of(self, id: str) -> StoredResponse | None:
        """None until the job has ended, when there was none, and when it has expired and been swept."""

    @abstractmethod
    def claim(self, owner: str, count: int, now: float, lease_s: float, running: Collection[str] = ()) -> Sequence[Job]:
        """So many at most that are this owner's from now on, in the order of their arrival. A local owner that has
        ended (see owner.py) holds nothing. ``running``: those that it runs, which it is not given again, however long
        the machine was suspended or how far its clock was set."""

    @abstractmethod
    def renew(self, owner: str, ids: Collection[str], now: float, lease_s: float) -> set[str]:
        """Those that it still holds."""

    @abstractmethod
    def wanted_cancels(self, owner: str) -> set[str]:
        """Those of its jobs that somebody has cancelled."""

    @abstractmethod
    def finish(self, id: str, owner: str, status: str, response: StoredResponse | None, error: str, now: float) -> bool:
        """False when it does not hold the job. ``status``: one of job.ENDED. A response that is too large, or that has
        no room, is not kept: the job has then failed, and says why."""

    @abstractmethod
    def put_back(self, id: str, owner: str, not_before: float, now: float) -> bool:
        """False when it does not hold the job."""

    @abstractmethod
    def cancel(self, id: str, now: float) -> Job | None:
        """The job as it is then: cancelled, running with ``cancel_wanted``, or as it had ended. None for who knows."""

    @abstractmethod
    def sweep(self, now: float) -> int:
        """Make tombstones of what has expired, and let those go that are old or too many. How many jobs it were; a call
        does a bounded part."""

    @abstractmethod
    def due_callbacks(self, owner: str, count: int, now: float, lease_s: float) -> Sequence[Job]:
        """So many at most for this owner to call now. When it says nothing for ``lease_s``, they are due again."""

    @abstractmethod
    def callback_done(self, id: str, owner: str, ok: bool, error: str = "", next_at: float | None = None) -> bool:
        """``next_at``: when to try again what failed; None for never. False when somebody else has it by now."""

    @abstractmethod
    def change(self) -> int:
        """Another number than before when anything may have changed since. Cheap."""

    @abstractmethod
    def secret(self) -> bytes:
        """Made once, and the same for all who share the store."""

    @abstractmethod
    def counts(self) -> Counts: ...

    def advice(self) -> str:
        """What is set so that it may lose jobs, in a sentence for the log; "" for nothing."""
        return ""

    @abstractmethod
    def close(self) -> None: ...


def open_store(where: str, options: JobsOptions) -> Store:
    """``where``: what ``locate`` gave, a Redis URL or a path. Raises StoreError for what is neither."""
    if where.startswith(_REDIS):
        from penstock.jobs.redis import RedisStore  # imported where it is used alone: 0.1 s

        return RedisStore(where, options)
    from penstock.jobs.sqlite import SqliteStore

    return SqliteStore(Path(where), options)


def locate(store: str, runtime_dir: Path) -> str:
    """``[jobs] store`` as ``open_store`` takes it, "" for none. A SQLite file without a path lies in systemd's
    $STATE_DIRECTORY, else in the user's directory for state, where two servers of one user are told apart by their
    runtime directories. Raises StoreError."""
    if store in ("", OFF):
        return ""
    if store.startswith(_REDIS):
        return store
    path = store.removeprefix("sqlite:")
    if path != "sqlite":
        if not os.path.isabs(path):
            raise StoreError(
                f'[jobs] store is "{store}"; it is sqlite, the absolute path of its file, redis://... or off'
            )
        return path
    state = os.environ.get("STATE_DIRECTORY", "").partition(":")[0]
    if os.path.isabs(state):
        return str(Path(state) / "jobs.sqlite")
    home = os.environ.get("XDG_STATE_HOME", "")
    try:
        base = Path(home) if os.path.isabs(home) else Path.home() / ".local" / "state"
    except RuntimeError:
        raise StoreError("this user has no home directory; name a file with [jobs] store") from None
    return str(base / "penstock" / f"jobs-{_short(runtime_dir)}.sqlite")


def without_password(where: str) -> str:
    """As it may be shown: of a URL neither user nor query, which may have a password, too."""
    if not where.startswith(_REDIS):
        return where
    scheme, _, rest = where.partition("://")
    return f"{scheme}://{rest.partition('?')[0].rpartition('@')[2]}"


def _short(runtime_dir: Path) -> str:
    return hashlib.sha256(os.fsencode(runtime_dir.absolute())).hexdigest()[:12]


def too_many(options: JobsOptions) -> StoreFull:
    return StoreFull(
        f"{options.count_max} jobs are kept, which is all ([jobs] count_max); ended ones go after "
        f"{options.ttl_s:g} s (ttl_s)"
    )


def no_room(size: int, options: JobsOptions) -> StoreFull:
    return StoreFull(
        f"there is no room for a job of {size} bytes: requests may take {REQUESTS_PART:.0%} of the {options.bytes_max} "
        "bytes that jobs and their results have ([jobs] bytes_max)"
    )


def checked_ids(ids: Collection[str]) -> list[str]:
    """Each once, in their order. Raises ValueError for more than ``IDS_MAX``."""
    wanted = [*dict.fromkeys(ids)]
    if len(wanted) > IDS_MAX:
        raise ValueError(f"{len(wanted)} jobs are asked for, and {IDS_MAX} can be at a time")
    return wanted


def finished(
    job: Job, status: str, response: StoredResponse | None, error: str, used: int, now: float, options: JobsOptions
) -> tuple[Job, StoredResponse | None]:
    """The job at its end, and the response if it is kept. ``used``: bytes of all other jobs."""
    why = "" if response is None else unkept(response.size, used, options)
    if why:
        status, response, error = FAILED, None, why
    return ended(job, status, response, error, now, options), response


def unkept(size: int, used: int, options: JobsOptions) -> str:
    """Why a response of so many bytes is not kept beside so many others, in a sentence; "" when it is."""
    if size > options.result_bytes_max:
        return f"its result of {size} bytes is larger than {options.result_bytes_max} ([jobs] result_bytes_max)"
    if used + size > options.bytes_max:
        return f"its result of {size} bytes found no room among {options.bytes_max} of all jobs ([jobs] bytes_max)"
    return ""


def new_secret() -> bytes:
    return secrets.token_bytes(SECRET_BYTES)
