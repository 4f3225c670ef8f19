"""Tells who asked to be called that a job has ended: on threads, signed, again and again until it has arrived.

What is to be sent, and when next, is in the store, so it outlives this process; who else shares the store does not send
the same meanwhile. It may arrive twice, when a process ends before it has noted that it was sent: ``webhook-id``, which
is the job's, is the same then. Headers and signature are those of Standard Webhooks (https://www.standardwebhooks.com).
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import logging
import random
import ssl
import threading
import time
from collections.abc import Callable
from typing import Final

from penstock.jobs.address import CallbackRefused, read_networks, read_target
from penstock.jobs.job import Job, StoredResponse, callback_wait_s
from penstock.jobs.options import JobsOptions
from penstock.jobs.post import LookUp, PostFailed, look_up, post
from penstock.jobs.store import Store, StoreError
from penstock.wire.process import fields

log = logging.getLogger(__name__)

DELIVERED: Final = "delivered"
RETRIED: Final = "retried"
FAILED: Final = "failed"  # given up
OUTCOMES: Final = (DELIVERED, RETRIED, FAILED)

_SECRET_PREFIX: Final = "whsec_"
_SECRET_BYTES_MIN: Final = 16
_POLL_S: Final = 5.0  # between two looks for what others have left
_AGAIN_MAX: Final = 1000  # times that are remembered; others are looked for
_LOOK_UP_S: Final = 60.0  # the system's resolver may take that; beside callback_timeout_s
_JITTER: Final = 0.2  # of a wait, more or less

BodyOf = Callable[[Job, "StoredResponse | None"], bytes]


def read_secret(text: str) -> bytes:
    """The key that ``whsec_`` and base64 stand for; anything else is the key itself. Raises ValueError, a sentence."""
    key = text.encode()
    if text.startswith(_SECRET_PREFIX):
        try:
            key = base64.b64decode(text.removeprefix(_SECRET_PREFIX), validate=True)
        except binascii.Error:
            raise ValueError(f"[jobs] callback_secret begins with {_SECRET_PREFIX}, and no base64 follows") from None
    if len(key) < _SECRET_BYTES_MIN:
        raise ValueError(f"[jobs] callback_secret has {len(key)} bytes, and needs {_SECRET_BYTES_MIN}")
    return key


def show_secret(key: bytes) -> str:
    """As libraries for Standard Webhooks take it."""
    return _SECRET_PREFIX + base64.b64encode(key).decode()


def signing_key(store: Store) -> bytes:
    """By which callbacks of this store are signed. Raises StoreError, and ValueError for one that cannot be."""
    given = store.options.callback_secret
    return read_secret(given) if given else store.secret()


def sign(key: bytes, id: str, timestamp: int, body: bytes) -> str:
    """``webhook-signature``."""
    signed = f"{id}.{timestamp}.".encode() + body
    return "v1," + base64.b64encode(hmac.digest(key, signed, hashlib.sha256)).decode()


class Callbacks:
    """``start`` begins threads, ``wake`` says that there may be something to send, ``stop`` ends what it can."""

    def __init__(
        self,
        store: Store,
        options: JobsOptions,
        owner: str,
        body_of: BodyOf,
        *,
        look: LookUp = look_up,
        tls: ssl.SSLContext | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """``body_of``: what is sent of a job, called on a thread. Raises ValueError, a sentence, for options that
        cannot be."""
        self._store = store
        self._options = options
        self._owner = owner
        self._body_of = body_of
        self._look = look
        self._tls = tls
        self._clock = clock
        self._allowed = read_networks(options.callback_allow)
        if options.callback_secret:
            read_secret(options.callback_secret)
        self._woken = threading.Event()
        self._stopped = threading.Event()
        self._lock = threading.Lock()
        self._sending: set[threading.Thread] = set()  # at most callback_threads_max
        self._main = threading.Thread(target=self._run, name="callbacks", daemon=True)
        self._again: list[float] = []  # when what did not arrive is to be tried again, by the clock
        self._away = ""  # what the store said when it was last asked
        # How many attempts came to what, for whoever measures.
        self.outcomes: Final = dict.fromkeys(OUTCOMES, 0)

    def start(self) -> None:
        self._main.start()

    def wake(self) -> None:
        self._woken.set()

    def stop(self, timeout_s: float) -> None:
        """What is being sent has so long to end. What has not ended by then ends with the process, and is sent again
        by another when its lease is over."""
        until = time.monotonic() + timeout_s
        self._stopped.set()
        self._woken.set()
        self._main.join(timeout_s)
        with self._lock:
            sending = [*self._sending]
        for thread in sending:
            thread.join(max(0.0, until - time.monotonic()))

    @property
    def sending(self) -> int:
        return len(self._sending)

    def _run(self) -> None:
        while not self._stopped.is_set():
            self._woken.clear()
            self._begin_due()
            self._woken.wait(self._pause_s())

    def _pause_s(self) -> float:
        """Until there may be something to send."""
        now = self._clock()
        with self._lock:
            self._again = [at for at in self._again if at > now]
            return max(0.0, min([_POLL_S, *[at - now for at in self._again]]))

    def _begin_due(self) -> None:
        room = self._options.callback_threads_max - len(self._sending)
        if room <= 0:
            return  # whoever ends wakes it
        lease_s = self._options.callback_timeout_s + _LOOK_UP_S
        try:
            due = self._store.due_callbacks(self._owner, room, self._clock(), lease_s)
            self._away = ""
        except StoreError as error:
            self._complain(error)
            return
        for job in due:
            thread = threading.Thread(target=self._send, args=(job,), name="callback", daemon=True)
            with self._lock:
                self._sending.add(thread)
            thread.start()

    def _complain(self, error: StoreError) -> None:
        """Once for each thing that is wrong."""
        if str(error) != self._away:
            self._away = str(error)
            log.warning("callbacks have to wait", extra=fields(reason=str(error)))

    def _send(self, job: Job) -> None:
        try:
            error, again = self._attempt(job)
            self._note(job, error, again)
        except StoreError as error:  # the lease ends, and it is sent again
            self._complain(error)
        finally:
            with self._lock:
                self._sending.discard(threading.current_thread())
            self._woken.set()

    def _attempt(self, job: Job) -> tuple[str, bool]:
        """Why it did not arrive, "" when it did, and whether to try again. Raises StoreError."""
        assert job.callback is not None
        body = self._body_of(job, self._store.response_of(job.id))
        try:
            target = read_target(job.callback.url, self._allowed)
            status = post(
                target,
                self._headers(job.id, body),
                body,
                allowed=self._allowed,
                timeout_s=self._options.callback_timeout_s,
                answer_bytes_max=self._options.callback_answer_bytes_max,
                tls=self._context() if target.secure else None,
                look=self._look,
            )
        except CallbackRefused as error:
            return str(error), False
        except PostFailed as error:
            return str(error), True
        return ("" if 200 <= status < 300 else f"it was answered with status {status}"), True

    def _headers(self, id: str, body: bytes) -> dict[str, str]:
        key = signing_key(self._store)  # each time: a store that has been made anew has another
        timestamp = int(self._clock())
        return {
            "Content-Type": "application/json",
            "User-Agent": "penstock",
            "webhook-id": id,
            "webhook-timestamp": str(timestamp),
            "webhook-signature": sign(key, id, timestamp, body),
        }

    def _context(self) -> ssl.SSLContext:
        if self._tls is None:
            self._tls = ssl.create_default_context()
        return self._tls

    def _note(self, job: Job, error: str, again: bool) -> None:
        assert job.callback is not None
        attempts = job.callback.attempts
        next_at = None
        if error and again and attempts < self._options.callback_attempts_max:
            wait_s = callback_wait_s(attempts) * random.uniform(1 - _JITTER, 1 + _JITTER)
            next_at = self._clock() + wait_s
        outcome = DELIVERED if not error else RETRIED if next_at is not None else FAILED
        with self._lock:
            self.outcomes[outcome] += 1
            if next_at is not None and len(self._again) < _AGAIN_MAX:
                self._again.append(next_at)
        if error:
            log.info("a callback did not arrive", extra=fields(job=job.id, outcome=outcome, reason=error))
        self._store.callback_done(job.id, self._owner, not error, error, next_at)
