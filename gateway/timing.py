"""What an answer says of where its time went: in a header always, and in its JSON for who asks."""

from __future__ import annotations

from typing import Final

import orjson

from penstock.client.events import Complete
from penstock.client.explain import explain
from penstock.gateway.inference import OK
from penstock.wire.messages import Batch

_TOTAL: Final = b"Server-Timing: total;dur=%.3f\r\n"
_TOTAL_IS: Final = b"total;dur="
_PARTS: Final = b"%bServer-Timing: queue;dur=%.3f, batch;dur=%.3f, model;dur=%.3f, total;dur="
# Of an answer that was kept: no batch at all.
CACHED: Final = Batch(0, 0, "cached", 0, 0)
_FOUND: Final = b"%bPenstock-Cache: hit\r\nServer-Timing: cache;desc=hit, total;dur=" % OK


class ServerTiming:
    """Writes the header ``Server-Timing`` (W3C Server Timing), in milliseconds.

    Answers of one batch come one after another and mostly have waited equally long: what they share is written once,
    which halves what the header costs.
    """

    __slots__ = ("_batch", "_parts", "_queue_us")

    def __init__(self) -> None:
        self._batch: Batch | None = None
        self._queue_us = 0
        self._parts = b""

    def begin(self, batch: Batch, queue_us: int, total_s: float) -> bytes:
        """The first two lines of a response: that all is well, and this header."""
        if batch is not self._batch or queue_us != self._queue_us:
            self._batch, self._queue_us = batch, queue_us
            if batch is CACHED:
                self._parts = _FOUND
            else:
                self._parts = _PARTS % (OK, queue_us * 1e-3, batch.compute_us * 1e-3, batch.model_us * 1e-3)
        return b"%b%.3f\r\n" % (self._parts, total_s * 1e3)


class Stencil:
    """An answer to a request that wants binary tensors, but for these and the milliseconds that it took. It does for
    all of the same ``batch``, ``body`` and ``queue_us``, to requests of the same ``query`` and ``target``."""

    __slots__ = ("after", "batch", "before", "body", "nbytes", "query", "queue_us", "target")

    def __init__(self, answer: Complete, query: object, target: object, response: bytes) -> None:
        """``response``: all that is before its tensors."""
        self.before, self.after = cut_total(response)
        self.body, self.batch, self.queue_us = answer.body, answer.batch, answer.queue_us
        self.query, self.target = query, target
        self.nbytes = len(answer.payload)


def cut_total(response: bytes) -> tuple[bytes, bytes]:
    """What is before the milliseconds that an answer took, and behind them. Raises ValueError where it says none."""
    at = response.index(_TOTAL_IS) + len(_TOTAL_IS)
    return response[:at], response[response.index(b"\r\n", at) :]


def total_line(total_s: float) -> bytes:
    """Of an answer that is an error: nothing more is known of it."""
    return _TOTAL % (total_s * 1e3)


def explanation(answer: Complete, worker: str, body_s: float, ahead_s: float, total_s: float) -> bytes:
    """The JSON object ``parameters`` of an answer to a request that wants to know. ``worker``: its name. ``body_s``:
    from the end of the request's head to that of its body; ``ahead_s``: from there until it was on its way to the
    broker; ``total_s``: from there until its answer was back.

    Flat, though an object of its own would be tidier: parameters of the v2 protocol are strings, numbers and bools, in
    gRPC by type, and some clients check that. And here, not in a header: binary answers have this JSON too, and client
    libraries such as tritonclient show it to their users, but not headers.
    """
    if answer.batch is CACHED:
        about = {"body_ms": _ms(body_s * 1e6), "total_ms": _ms(total_s * 1e6)}
        return orjson.dumps({"why": "the same had been asked before, and the answer was kept", "cache": "hit"} | about)
    batch = answer.batch
    waited_us = max(0, answer.queue_us - answer.held_us)
    rest_us = total_s * 1e6 - ahead_s * 1e6 - answer.queue_us - batch.compute_us
    return orjson.dumps(
        {
            "why": explain(answer.queue_us, answer.held_us, batch, worker),
            "worker": worker,
            "batch": batch.serial,
            "batch_rows": batch.rows,
            "batch_reason": batch.reason,
            "body_ms": _ms(body_s * 1e6),
            "ahead_ms": _ms(ahead_s * 1e6),
            "held_ms": _ms(answer.held_us),
            "waited_ms": _ms(waited_us),
            "batch_ms": _ms(batch.compute_us),
            "model_ms": _ms(batch.model_us),
            "rest_ms": _ms(max(0.0, rest_us)),
            "total_ms": _ms(total_s * 1e6),
        }
    )


def _ms(us: float) -> float:
    return round(us / 1000, 3)
