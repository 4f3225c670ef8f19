"""Where an answer's time went: in its header, and in its JSON."""

from __future__ import annotations

import json

from penstock.client.events import Complete
from penstock.gateway.timing import ServerTiming, explanation, total_line
from penstock.wire.messages import Batch

BATCH = Batch(17, 32, "full", 4_000, 3_900)


def test_the_header_has_milliseconds() -> None:
    timing = ServerTiming()
    line = b"HTTP/1.1 200 OK\r\nServer-Timing: queue;dur=%b, batch;dur=%b, model;dur=%b, total;dur=%b\r\n"
    assert timing.begin(BATCH, 15_123, 0.0212345) == line % (b"15.123", b"4.000", b"3.900", b"21.235")
    assert timing.begin(BATCH, 15_123, 0.03) == line % (b"15.123", b"4.000", b"3.900", b"30.000")
    assert timing.begin(BATCH, 7, 0.03) == line % (b"0.007", b"4.000", b"3.900", b"30.000")
    assert timing.begin(BATCH._replace(model_us=1), 7, 0.0) == line % (b"0.007", b"4.000", b"0.001", b"0.000")


def test_an_error_has_its_total() -> None:
    assert total_line(0.0105) == b"Server-Timing: total;dur=10.500\r\n"


class Nobody:
    def complete(self, answer: Complete, /) -> None: ...
    def fail(self, error: object, /) -> None: ...


def test_an_explanation_has_every_part_and_they_add_up() -> None:
    answer = Complete(Nobody(), b"", b"", BATCH, 15_100, 12_100, b"worker 0")
    told = json.loads(explanation(answer, "gpu0", 0.5, 0.001, 0.0212))
    assert told.pop("why").startswith("held 12.1 ms at the broker")
    assert told == {
        "worker": "gpu0",
        "batch": 17,
        "batch_rows": 32,
        "batch_reason": "full",
        "body_ms": 500.0,
        "ahead_ms": 1.0,
        "held_ms": 12.1,
        "waited_ms": 3.0,
        "batch_ms": 4.0,
        "model_ms": 3.9,
        "rest_ms": 1.1,
        "total_ms": 21.2,
    }
    # Parameters of the v2 protocol hold nothing else.
    assert all(isinstance(value, str | float | int) for value in told.values())


def test_clocks_that_differ_make_no_negative_times() -> None:
    answer = Complete(Nobody(), b"", b"", BATCH, 15_100, 16_000, b"worker 0")
    told = json.loads(explanation(answer, "gpu0", 0.0, 0.0, 0.001))
    assert (told["waited_ms"], told["rest_ms"]) == (0, 0)
