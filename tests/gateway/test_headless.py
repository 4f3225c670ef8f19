"""A request without a connection."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from penstock.gateway.connection import Exchange, Http
from penstock.gateway.headless import Answer, Headless, read_answer
from penstock.gateway.options import GatewayOptions
from penstock.wire.errors import PenstockError
from penstock.wire.slots import PLACED_MIN_BYTES, Slots
from tests.gateway.serving import Echo, Loop


def make(loop: Loop, answers: list[Answer], slots: Slots | None = None, body: bytes = b"body") -> Headless:
    http = Http(loop.loop, GatewayOptions(), Echo(), lambda: slots)
    return Headless(http, b"POST", b"/a", {"x-request-id": b"1"}, body, answers.append)


def test_an_answer_is_read_back() -> None:
    head = b"HTTP/1.1 200 OK\r\nContent-Type: a/b\r\nX-Y: c: d\r\n\r\n{}"
    assert read_answer(200, head, b"tail") == Answer(200, {"content-type": b"a/b", "x-y": b"c: d"}, b"{}tail")


def test_it_is_answered_once(loop: Loop) -> None:
    answers: list[Answer] = []
    sent: list[int] = []
    exchange = make(loop, answers)
    assert exchange.head.url == b"/a"
    exchange.send(200, b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n", b"ok", lambda: sent.append(1))
    exchange.answer_error(500, "twice")
    assert [(each.status, each.body) for each in answers] == [(200, b"ok")]
    assert sent == [1]
    assert exchange.abandoned
    exchange.leave()


@pytest.mark.parametrize(
    ("answer", "status", "body"),
    [
        (lambda exchange: exchange.answer(204), 204, b""),
        (lambda exchange: exchange.answer_error(400, "no"), 400, b'{"error":"no"}'),
        (lambda exchange: exchange.answer_large(200, b"many"), 200, b"many"),
    ],
)
def test_however_it_is_answered(loop: Loop, answer: Callable[[Exchange], None], status: int, body: bytes) -> None:
    answers: list[Answer] = []
    answer(make(loop, answers))
    assert [(each.status, each.body) for each in answers] == [(status, body)]


def test_who_leaves_is_not_answered(loop: Loop) -> None:
    answers: list[Answer] = []
    gone: list[int] = []
    sent: list[int] = []
    exchange = make(loop, answers)
    exchange.gone = lambda: gone.append(1)
    exchange.leave()
    exchange.leave()
    exchange.send(200, b"HTTP/1.1 200 OK\r\n\r\n", b"", lambda: sent.append(1))
    assert (gone, sent, answers) == ([1], [1], [])


def test_an_answer_that_goes_on_cannot_be_stored(loop: Loop) -> None:
    with pytest.raises(PenstockError, match="cannot be stored"):
        make(loop, []).begin(b"text/event-stream")


def test_large_tensors_lie_in_shared_memory_until_it_is_answered(loop: Loop, slots: Slots) -> None:
    for end in (Headless.leave, lambda exchange: exchange.answer(200)):
        exchange: Exchange = make(loop, [], slots, bytes(PLACED_MIN_BYTES))
        assert exchange.place(exchange.body) is not None
        assert slots.arena.allocator.used > 0
        end(exchange)  # type: ignore[arg-type]
        assert slots.arena.allocator.used == 0


def test_it_waits_for_room_as_others_do(loop: Loop, slots: Slots) -> None:
    whole = slots.take(slots.arena.size)
    assert whole is not None
    exchange = make(loop, [], slots)
    taken: list[object] = []
    exchange.wait(PLACED_MIN_BYTES, taken.append, taken.append)
    whole.give_back()
    loop.until(lambda: taken)
    taken[0].give_back()  # type: ignore[attr-defined]
