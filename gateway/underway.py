"""Requests for inference that are under way: when their time is up, and where their answers go."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING

from penstock.client.events import Complete, Sink
from penstock.gateway.connection import Exchange
from penstock.gateway.inference import Query
from penstock.gateway.statuses import STATUSES
from penstock.gateway.tracing import Tracing
from penstock.wire import errors
from penstock.wire.errors import PenstockError
from penstock.wire.messages import UNNAMED, Payload
from penstock.wire.process import fields

if TYPE_CHECKING:
    from penstock.gateway.application import Application

log = logging.getLogger("penstock.gateway")


class Inference:
    """An inference request under way: where its answer goes."""

    __slots__ = ("_application", "_asked", "_exchange", "_number", "_query")

    def __init__(self, application: Application, exchange: Exchange, query: Query) -> None:
        self._application = application
        self._exchange = exchange
        self._query = query

    def limit(self) -> tuple[float, float]:
        """The seconds that it has, and since when.

        A time that the request names runs since its head has come, so a body that comes slowly uses it up, and so do
        expanding it and waiting for room. The time of those that name none begins when all of them is there.
        """
        exchange, timeout_s = self._exchange, self._query.timeout_s
        header_s: float = exchange.head.target.timeout_s
        if header_s and not 0 < timeout_s <= header_s:
            timeout_s = header_s
        if timeout_s:
            return timeout_s, exchange.began
        return self._application.options.request_timeout_s, exchange.arrived

    def unasked(self) -> None:
        """Its answer comes of something else than a request of its own."""
        self._asked, self._number = self._exchange.arrived, 0

    def start(self, payload: Payload, sink: Sink | None = None) -> None:
        """``sink``: that is told what comes of it in its place. Raises PenstockError when too much is under way, or its
        time is up already."""
        application, exchange = self._application, self._exchange
        timeout_s, since = self.limit()
        self._asked = now = time.monotonic()
        if now >= since + timeout_s:
            raise PenstockError(
                errors.DEADLINE,
                f"time was up before the request was queued: {now - since:.3f} s after it began to come, and it has "
                f"{timeout_s:g} s",
            )
        self._number = application.caller.submit(self._query.form, payload, timeout_s, sink or self, since)
        exchange.gone = self

    def complete(self, answer: Complete, lines: bytes = b"") -> None:
        """``lines``: more header lines of the answer."""
        application, exchange, query = self._application, self._exchange, self._query
        seconds = time.monotonic() - exchange.arrived
        if application.seconds.observe_one(seconds):
            application.seconds.exemplify(seconds, application.name(query.id, self._number))
        try:
            application.finish(exchange, query, answer, self._asked, seconds, lines)
        except Exception:  # of one answer, which is no reason to end: the core would not be told the rest of its batch
            log.exception("answer cannot be written", extra=fields(model=query.form.model))
            if answer.held and not exchange.status:  # else it goes with what has been sent
                application.release(answer.held)
            application.crashed(exchange)

    def fail(self, error: PenstockError) -> None:
        self._application.fail(self._exchange, error, self._query.id, self._number)

    def __call__(self) -> None:
        """The client has hung up: nobody else wants the result."""
        self._application.caller.cancel(self._number)
        self._application.flush()


class TracedInference(Inference):
    """One whose spans are told."""

    __slots__ = ("_tracing",)

    def __init__(self, tracing: Tracing, application: Application, exchange: Exchange, query: Query) -> None:
        super().__init__(application, exchange, query)
        self._tracing = tracing

    def complete(self, answer: Complete, lines: bytes = b"") -> None:
        super().complete(answer, lines)
        self._ended(200, answer)

    def fail(self, error: PenstockError) -> None:
        super().fail(error)
        self._ended(STATUSES[error.code], error=error)

    def __call__(self) -> None:
        super().__call__()
        self._ended(STATUSES[errors.CANCELLED], error=PenstockError(errors.CANCELLED, "the client has left"))

    def _ended(self, status: int, answer: Complete | None = None, error: PenstockError | None = None) -> None:
        query = self._query
        model = query.form.model, query.form.version.removeprefix(UNNAMED)
        seconds = time.monotonic() - self._exchange.arrived
        self._tracing.ended(self._exchange.head, model, seconds, status, query.id, answer, error)
