"""Who is told when jobs end: one thread for all of a client's, which is there only while somebody waits."""

from __future__ import annotations

import logging
import socket
import threading
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final, TypeAlias
from urllib.parse import quote

from penstock.client.jobhttp import Channel, Unreached
from penstock.wire.errors import CANCELLED, PenstockError

if TYPE_CHECKING:
    from http.client import HTTPConnection

log = logging.getLogger("penstock.client")

IDS_MAX: Final = 256  # of one question, as the gateway has it
WAIT_S: Final = 25.0  # of one long poll
_TURN_S: Final = 0.2  # of one, where there are more jobs than fit into one
_AGAIN_S: Final = 0.5  # before a gateway that did not answer, or refused, is asked again
ANSWER_S: Final = 30.0  # for an answer, beside what it may wait for an end

Told: TypeAlias = "Callable[[PenstockError | None], None]"


class Watch:
    """``add`` jobs; each of their callbacks is called once, on the thread, with None, or with the error that ended the
    watching: the client was closed, or the server does not take the question."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._lock = threading.Lock()
        self._waiting: dict[str, list[Told]] = {}
        self._thread: threading.Thread | None = None
        self._connection: HTTPConnection | None = None  # that is asked at present
        self._added = 0  # how often jobs have been added ...
        self._asked = 0  # ... when it was last looked which there are
        self.closed = threading.Event()

    def add(self, ids: Iterable[str], told: Callable[[str], Told]) -> None:
        """``told``: for each job, what is to be called. Raises PenstockError once the client is closed."""
        with self._lock:
            if self.closed.is_set():
                raise PenstockError(CANCELLED, "this Client is closed")
            self._added += 1
            for ident in ids:
                self._waiting.setdefault(ident, []).append(told(ident))
            if not self._waiting:
                return
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="penstock-jobs", daemon=True)
                self._thread.start()
            else:
                self._interrupt()

    def _interrupt(self) -> None:
        """With the lock. What is asked at present does not name all."""
        connection, self._connection = self._connection, None
        sock: socket.socket | None = None if connection is None else connection.sock
        if sock is not None:
            with suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def _run(self) -> None:
        while True:
            with self._lock:
                ids, self._asked = list(self._waiting), self._added
                if not ids or self.closed.is_set():
                    self._thread = None
                    break
            try:
                ended = self._ask(ids)
            except PenstockError as error:
                if not error.retryable:
                    self._tell(ids, error)
                elif not (isinstance(error, Unreached) and self._has_more()):  # which broke it off
                    self.closed.wait(max(_AGAIN_S, min(error.retry_after_s, ANSWER_S)))
                continue
            self._tell(ended, None)
        if self.closed.is_set():
            self._tell(list(self._waiting), PenstockError(CANCELLED, "the client was closed"))

    def _has_more(self) -> bool:
        with self._lock:
            return self._added != self._asked

    def _ask(self, ids: list[str]) -> list[str]:
        """Those that have ended, or that nobody knows."""
        ended: list[str] = []
        wait_s = WAIT_S if len(ids) <= IDS_MAX else _TURN_S
        for at in range(0, len(ids), IDS_MAX):
            query = "&".join(f"id={quote(each, safe='')}" for each in ids[at : at + IDS_MAX])
            response = self._channel.ask(
                "GET",
                f"/v2/jobs?wait={0 if ended else wait_s:g}&{query}",
                limit_s=wait_s + ANSWER_S,
                started=self._began,
            )
            if response.status != 200:
                raise response.error()
            found: list[dict[str, Any]] = response.json()["jobs"]
            ended += [each["id"] for each in found]
        return ended

    def _began(self, connection: HTTPConnection) -> None:
        with self._lock:
            if self._added != self._asked or self.closed.is_set():
                raise InterruptedError("jobs have been added meanwhile")  # it is no answer for them
            self._connection = connection

    def _tell(self, ids: list[str], error: PenstockError | None) -> None:
        with self._lock:
            self._connection = None
            told = [each for ident in ids for each in self._waiting.pop(ident, [])]
        for each in told:
            try:
                each(error)
            except Exception:  # of a user's callback, which must not keep others from theirs
                log.exception("a callback of a job failed")

    def close(self, limit_s: float) -> None:
        with self._lock:
            self.closed.set()
            thread = self._thread
            self._interrupt()
        if thread is not None and thread is not threading.current_thread():
            thread.join(limit_s)
