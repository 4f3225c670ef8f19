"""Bytes over real sockets: what clients say, and what they hear."""

from __future__ import annotations

import asyncio
import socket
import ssl
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import cast

import pytest

from penstock.gateway import reader
from penstock.gateway.connection import PIECE_BYTES as PIECE
from penstock.gateway.connection import Exchange, Stream
from penstock.wire.arena import Arena
from penstock.wire.errors import PenstockError
from penstock.wire.slots import Slot, Slots
from tests.gateway.serving import Chunks, Echo, Loop, Peer, Serving, pattern

Serve = Callable[..., Serving]


def ask(url: str, *lines: str, method: str = "GET", version: str = "1.1", body: bytes = b"") -> bytes:
    length = [f"Content-Length: {len(body)}"] if body else []
    return "\r\n".join([f"{method} {url} HTTP/{version}", "Host: a", *lines, *length, "", ""]).encode() + body


def test_response_is_whole_and_says_nothing_more_than_it_must(echo: Echo, serve: Serve) -> None:
    peer = serve(echo).connect()
    peer.send(ask("/a"))
    expected = b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: 7\r\n\r\nGET /a "
    assert peer.raw(len(expected)) == expected


def test_connection_is_kept(echo: Echo, serve: Serve) -> None:
    serving = serve(echo)
    peer = serving.connect()
    for turn in range(3):
        peer.send(ask("/a", method="POST", body=b"%d" % turn))
        response = peer.response()
        assert (response.status, response.body) == (200, b"POST /a %d" % turn)
        assert "connection" not in response.headers
    assert len(serving.http.connections) == 1


def test_pipelined_requests_are_answered_in_order(echo: Echo, serve: Serve) -> None:
    peer = serve(echo).connect()
    peer.send(b"".join(ask(f"/{number}") for number in range(40)))
    assert [peer.response().body for _ in range(40)] == [b"GET /%d " % number for number in range(40)]


def test_answers_that_come_out_of_order_leave_in_order(echo: Echo, serve: Serve) -> None:
    echo.hold = True
    serving = serve(echo)
    peer = serving.connect()
    peer.send(ask("/0") + ask("/1") + ask("/2"))
    serving.loop.until(lambda: len(echo.exchanges) == 3)
    for place in (2, 0, 1):
        echo.tell(echo.exchanges[place])
    assert [peer.response().body for _ in range(3)] == [b"GET /0 ", b"GET /1 ", b"GET /2 "]


def test_no_more_is_read_while_too_many_wait(echo: Echo, serve: Serve) -> None:
    echo.hold = True
    serving = serve(echo, pipelined_max=2)
    peer = serving.connect()
    peer.send(ask("/0") + ask("/1"))
    serving.loop.until(lambda: len(echo.exchanges) == 2)
    peer.send(ask("/2"))
    serving.loop.settle()
    assert len(echo.exchanges) == 2
    echo.hold = False
    for exchange in list(echo.exchanges):
        echo.tell(exchange)
    assert [peer.response().body for _ in range(3)] == [b"GET /0 ", b"GET /1 ", b"GET /2 "]


def test_client_is_not_late_while_it_is_not_read(echo: Echo, serve: Serve) -> None:
    echo.hold = True
    serving = serve(echo, pipelined_max=1, head_timeout_s=0.05)
    peer = serving.connect()
    peer.send(ask("/0") + ask("/1")[:10])
    serving.loop.until(lambda: echo.exchanges)
    peer.send(ask("/1")[10:])
    wait_for_timeout(serving)
    serving.still()
    echo.hold = False
    echo.tell(echo.exchanges[0])
    assert [peer.response().body for _ in range(2)] == [b"GET /0 ", b"GET /1 "]


def test_client_is_late_once_it_is_read_again(echo: Echo, serve: Serve) -> None:
    echo.hold = True
    serving = serve(echo, pipelined_max=1, head_timeout_s=0.05)
    peer = serving.connect()
    peer.send(ask("/0") + ask("/1")[:10])
    serving.loop.until(lambda: echo.exchanges)
    wait_for_timeout(serving)
    echo.tell(echo.exchanges[0])
    assert [peer.response().status for _ in range(2)] == [200, 408]


def wait_for_timeout(serving: Serving) -> None:
    """Until a head that begins now is refused for being late."""
    late = serving.connect()
    late.send(b"GET")
    serving.watch()
    assert late.response().status == 408


def test_close_is_answered_and_done(echo: Echo, serve: Serve) -> None:
    peer = serve(echo).connect()
    peer.send(ask("/a", "Connection: close"))
    assert peer.response().headers["connection"] == "close"
    assert peer.rest() == b""


@pytest.mark.parametrize("hold", [False, True])
@pytest.mark.parametrize("more", [ask("/b"), b"nonsense\r\n\r\n"])
def test_what_follows_close_is_ignored(echo: Echo, serve: Serve, hold: bool, more: bytes) -> None:
    echo.hold = hold
    serving = serve(echo)
    peer = serving.connect()
    peer.send(ask("/a", "Connection: close") + more)
    serving.loop.until(lambda: echo.exchanges)
    if hold:
        peer.send(more)
        serving.loop.settle()
        echo.tell(echo.exchanges[0])
    assert peer.response().headers["connection"] == "close"
    peer.end()
    assert peer.rest() == b""
    assert (len(echo.exchanges), echo.refusals) == (1, [])


def test_http_1_0_closes_unless_asked(echo: Echo, serve: Serve) -> None:
    serving = serve(echo)
    peer = serving.connect()
    peer.send(ask("/a", version="1.0"))
    assert peer.response().headers["connection"] == "close"
    assert peer.rest() == b""
    peer = serving.connect()
    for _ in range(2):
        peer.send(ask("/a", "Connection: keep-alive", version="1.0"))
        assert peer.response().headers["connection"] == "keep-alive"


def test_head_has_the_head_of_the_answer_alone(echo: Echo, serve: Serve) -> None:
    peer = serve(echo).connect()
    peer.send(ask("/a", method="HEAD") + ask("/large/100000", method="HEAD") + ask("/b"))
    assert peer.response(body=False).headers["content-length"] == "8"
    assert peer.response(body=False).headers["content-length"] == "100000"
    assert peer.response().body == b"GET /b "


# --- 100 Continue ---

CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
EXPECTING = ask("/a", "Expect: 100-continue", "Content-Length: 5", method="POST")


def test_client_that_asks_is_told_to_continue_once(echo: Echo, serve: Serve) -> None:
    peer = serve(echo).connect()
    peer.send(EXPECTING)
    assert peer.raw(len(CONTINUE)) == CONTINUE
    peer.send(b"he", b"llo")
    assert peer.response().body == b"POST /a hello"


def test_client_that_does_not_wait_is_not_told(echo: Echo, serve: Serve) -> None:
    peer = serve(echo).connect()
    peer.send(EXPECTING + b"hello")
    assert peer.response().body == b"POST /a hello"


def test_client_is_told_to_continue_behind_the_answers_before(echo: Echo, serve: Serve) -> None:
    echo.hold = True
    serving = serve(echo)
    peer = serving.connect()
    peer.send(ask("/0") + EXPECTING)
    serving.loop.until(lambda: echo.exchanges)
    echo.tell(echo.exchanges[0])
    assert peer.response().body == b"GET /0 "
    assert peer.raw(len(CONTINUE)) == CONTINUE


def test_refusal_stands_for_continue(echo: Echo, serve: Serve) -> None:
    peer = serve(echo, body_bytes_max=4).connect()
    peer.send(EXPECTING)
    assert peer.response().status == 413


# --- clients that leave ---


def test_client_that_closes_its_side_is_taken_to_have_left(echo: Echo, serve: Serve) -> None:
    echo.hold = True
    serving = serve(echo)
    peer = serving.connect()
    peer.send(ask("/0") + ask("/1"))
    serving.loop.settle()
    peer.end()
    assert peer.rest() == b""
    serving.ended()
    assert len(echo.gone) == 2


@pytest.mark.parametrize("said", [b"", ask("/a"), ask("/a")[:10], ask("/a", "Content-Length: 5") + b"he"])
def test_client_that_has_nothing_to_wait_for_ends_its_connection(echo: Echo, serve: Serve, said: bytes) -> None:
    serving = serve(echo)
    peer = serving.connect()
    peer.send(said)
    peer.end()
    peer.rest()
    serving.ended()
    assert serving.http.budget.used == 0


@pytest.mark.parametrize("how", ["reset", "leave"])
def test_client_that_leaves_is_noticed_once(echo: Echo, serve: Serve, how: str) -> None:
    echo.hold = True
    serving = serve(echo)
    peer = serving.connect()
    peer.send(ask("/0", method="POST", body=b"x" * 100) + ask("/1", method="POST", body=b"x" * 10))
    serving.loop.until(lambda: len(echo.exchanges) == 2)
    assert serving.http.budget.used == 110
    echo.tell(echo.exchanges[1])  # it has its answer, which waits for the first's
    if how == "reset":
        peer.reset()
        serving.ended()
        assert echo.gone == [b"/0"]
        assert all(exchange.abandoned for exchange in echo.exchanges)
    else:
        peer.leave()  # which looks like one that says nothing more
    echo.tell(echo.exchanges[0])
    serving.ended()
    assert echo.gone == [b"/0"] * (how == "reset")
    assert serving.http.budget.used == 0


@pytest.mark.parametrize("how", ["reset", "leave", "end"])
def test_client_that_leaves_is_noticed_though_nothing_more_is_read_from_it(echo: Echo, serve: Serve, how: str) -> None:
    """It has asked for as much as a connection may, so that nothing shows that it has gone but its hanging up."""
    echo.hold = True
    serving = serve(echo, pipelined_max=2)
    peer = serving.connect()
    peer.send(ask("/0") + ask("/1"))
    serving.loop.until(lambda: len(echo.exchanges) == 2)
    getattr(peer, how)()
    serving.ended()
    assert echo.gone == [b"/0", b"/1"]


def test_client_that_is_read_again_is_not_watched_any_more(echo: Echo, serve: Serve) -> None:
    echo.hold = True
    serving = serve(echo, pipelined_max=1)
    peer = serving.connect()
    for turn in range(3):
        peer.send(ask(f"/{turn}"))
        serving.loop.until(lambda turn=turn: len(echo.exchanges) == turn + 1)  # type: ignore[misc]
        assert len(serving.http.hangups._watched) == 1
        echo.tell(echo.exchanges[turn])
        assert serving.http.hangups._watched == {}
        assert peer.response().status == 200


def test_a_request_knows_when_its_head_came_and_when_all_of_it(echo: Echo, serve: Serve) -> None:
    serving = serve(echo)
    peer = serving.connect()
    peer.send(ask("/whole", method="POST", body=b"x"))
    peer.response()
    [connection] = serving.http.connections
    for size in (10, 100_000):  # the second is received elsewhere
        start = time.monotonic()
        peer.send(ask("/a", f"Content-Length: {size}", method="POST")[:-5])  # not yet all of the head
        serving.loop.until(lambda: connection._phase == reader.HEAD)
        middle = time.monotonic()
        peer.send(ask("/a", f"Content-Length: {size}", method="POST")[-5:] + b"x")
        serving.loop.until(lambda: connection._phase == reader.BODY)
        behind = time.monotonic()
        peer.send(b"x" * (size - 1) + ask("/next"))
        assert [peer.response().status for _ in range(2)] == [200, 200]
        slow, following = echo.exchanges[-2:]
        assert start < middle < slow.began < behind < slow.arrived
        assert following.began == following.arrived
    assert echo.exchanges[0].began == echo.exchanges[0].arrived


def test_answer_for_nobody_is_dropped(echo: Echo, serve: Serve) -> None:
    echo.hold = True
    serving = serve(echo)
    peer = serving.connect()
    peer.send(ask("/0"))
    serving.loop.until(lambda: echo.exchanges)
    peer.reset()
    serving.ended()
    echo.tell(echo.exchanges[0])
    assert (echo.exchanges[0].status, echo.gone) == (0, [b"/0"])


def test_client_that_leaves_inside_a_body_gives_the_budget_back(echo: Echo, serve: Serve) -> None:
    serving = serve(echo)
    peer = serving.connect()
    peer.send(ask("/0", "Content-Length: 1000000", method="POST") + b"x" * 300_000)
    serving.loop.until(lambda: serving.http.budget.used == 1_000_000)
    peer.reset()
    serving.ended()
    assert serving.http.budget.used == 0


# --- clients that are late ---


def test_head_that_does_not_come_is_refused(echo: Echo, serve: Serve) -> None:
    serving = serve(echo, head_timeout_s=0.05)
    peer = serving.connect()
    peer.send(ask("/a")[:10])
    serving.watch()
    response = peer.response()
    assert (response.status, response.headers["connection"]) == (408, "close")
    assert response.body == b'{"error":"the head did not come within 0.05 s"}'
    assert peer.rest() == b""
    assert echo.refusals == [(408, "the head did not come within 0.05 s")]


@pytest.mark.parametrize("length", [5, 200_000])
def test_body_that_comes_too_slowly_is_refused(echo: Echo, serve: Serve, length: int) -> None:
    serving = serve(echo, body_timeout_s=0.05, body_bytes_per_s_min=1 << 30)
    peer = serving.connect()
    peer.send(ask("/a", f"Content-Length: {length}", method="POST") + b"abc")
    serving.watch()
    assert peer.response().status == 408
    assert peer.rest() == b""
    assert serving.http.budget.used == 0


def test_large_body_has_more_time(echo: Echo, serve: Serve) -> None:
    serving = serve(echo, body_timeout_s=10, body_bytes_per_s_min=1000)
    peer = serving.connect()
    peer.send(ask("/a", "Content-Length: 90000", method="POST"))
    serving.loop.until(lambda: serving.http.budget.used)
    [connection] = serving.http.connections
    assert connection.deadline == pytest.approx(serving.loop.loop.time() + 100, abs=5)


def test_connection_without_a_request_is_closed(echo: Echo, serve: Serve) -> None:
    serving = serve(echo, keep_alive_s=0.05)
    fresh, used = serving.connect(), serving.connect()
    used.send(ask("/a"))
    used.response()
    serving.watch()
    assert (fresh.rest(), used.rest()) == (b"", b"")
    assert echo.refusals == []


def test_connection_that_waits_for_its_answer_has_no_deadline(echo: Echo, serve: Serve) -> None:
    echo.hold = True
    serving = serve(echo, keep_alive_s=0.05)
    peer, idle = serving.connect(), serving.connect()
    peer.send(ask("/a"))
    serving.loop.until(lambda: echo.exchanges)
    serving.watch()
    assert idle.rest() == b""
    echo.tell(echo.exchanges[0])
    assert peer.response().status == 200


def test_late_body_is_refused_behind_the_answers_before(echo: Echo, serve: Serve) -> None:
    echo.hold = True
    serving = serve(echo, body_timeout_s=0.05)
    peer = serving.connect()
    peer.send(ask("/0") + ask("/1", "Content-Length: 5", method="POST") + b"ab")
    serving.loop.until(lambda: echo.exchanges)
    serving.watch()
    serving.loop.until(lambda: echo.refusals)
    serving.still()
    peer.send(b"cde" + ask("/2") + b"nonsense\r\n\r\n")
    serving.loop.settle()
    echo.tell(echo.exchanges[0])
    assert peer.response().body == b"GET /0 "
    assert peer.response().status == 408
    peer.end()
    assert peer.rest() == b""
    assert (len(echo.exchanges), len(echo.refusals)) == (1, 1)


@pytest.mark.parametrize("lines", [(), ("Connection: close",)])
@pytest.mark.parametrize("count", [60_000, 5_000_000])
def test_client_that_never_reads_is_cut_off(echo: Echo, serve: Serve, lines: tuple[str, ...], count: int) -> None:
    serving = serve(echo, write_timeout_s=0.05, keep_alive_s=0.05, body_bytes_per_s_min=1 << 30)
    peer = serving.connect(receive_bytes=4096)
    fill_send_buffer(serving)
    peer.send(ask(f"/large/{count}", *lines))
    serving.watch()
    serving.ended()
    assert serving.http.cut_off == 1


def test_client_that_reads_nothing_is_cut_off_though_it_has_asked_for_more(echo: Echo, serve: Serve) -> None:
    """What came with one read is not begun while the answers before are not read, nor gives it more time."""
    serving = serve(echo, write_timeout_s=0.05, keep_alive_s=60, body_bytes_per_s_min=1 << 30)
    peer = serving.connect(receive_bytes=4096)
    fill_send_buffer(serving)
    peer.send(ask("/large/60000") * 100)
    serving.watch()
    serving.ended()
    assert (len(echo.exchanges) < 100, serving.http.cut_off, serving.http.budget.used) == (True, 1, 0)


def test_what_was_held_back_is_answered_in_order_once_the_client_reads(echo: Echo, serve: Serve) -> None:
    serving = serve(echo)
    peer = serving.connect(receive_bytes=4096)
    peer.send(b"".join(ask(f"/large/{60_000 + number}") for number in range(100)) + b"nonsense\r\n\r\n")
    assert [len(peer.response().body) for _ in range(100)] == [60_000 + number for number in range(100)]
    assert peer.response().status == 400
    assert peer.rest() == b""


def test_client_that_reads_a_large_answer_slowly_has_more_time(echo: Echo, serve: Serve) -> None:
    serving = serve(echo, write_timeout_s=10, body_bytes_per_s_min=10_000)
    peer = serving.connect(receive_bytes=4096)
    fill_send_buffer(serving)
    peer.send(ask("/large/1000000", "Connection: close"))
    serving.loop.settle()
    [connection] = serving.http.connections
    assert connection.deadline == pytest.approx(serving.loop.loop.time() + 105, abs=15)
    assert peer.response().body == pattern(1_000_000)


def test_large_answer_is_read_to_its_end_though_more_was_sent(echo: Echo, serve: Serve) -> None:
    serving = serve(echo, linger_s=0.0, head_timeout_s=0.05)
    peer = serving.connect(receive_bytes=4096)
    fill_send_buffer(serving)
    serving.http.drain()
    peer.send(ask("/large/1000000") + b"GET")
    serving.loop.settle()
    wait_for_timeout(serving)
    assert peer.response().body == pattern(1_000_000)
    assert peer.rest() == b""


def fill_send_buffer(serving: Serving) -> None:
    """Make the kernel take little from the only connection there is."""
    [connection] = serving.http.connections
    assert connection._transport is not None
    channel = connection._transport.get_extra_info("socket")
    channel.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)


def test_client_that_does_not_read_is_not_read(echo: Echo, serve: Serve) -> None:
    serving = serve(echo)
    peer = serving.connect(receive_bytes=4096)
    peer.send(ask("/large/5000000"))
    serving.loop.until(lambda: echo.exchanges)
    peer.send(ask("/1"))
    serving.loop.settle()
    assert len(echo.exchanges) == 1
    assert peer.response().body == pattern(5_000_000)
    assert peer.response().body == b"GET /1 "


# --- refusals ---


def test_refusal_is_json_and_ends_the_connection(echo: Echo, serve: Serve) -> None:
    peer = serve(echo).connect()
    peer.send(b"GET / HTTP/1.1\r\n\r\n")
    expected = (
        b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\nContent-Type: application/json\r\n"
        b'Content-Length: 51\r\n\r\n{"error":"an HTTP/1.1 request needs a Host header"}'
    )
    assert peer.raw(len(expected)) == expected
    assert peer.rest() == b""
    assert echo.refusals == [(400, "an HTTP/1.1 request needs a Host header")]


def test_refusal_reaches_a_client_that_is_still_sending(echo: Echo, serve: Serve) -> None:
    serving = serve(echo, body_bytes_max=1000)
    peer = serving.connect()
    peer.send(ask("/a", "Content-Length: 3000000", method="POST"), *[b"x" * 100_000] * 30)
    assert peer.response().status == 413
    assert peer.rest() == b"", "not a reset, which would take the answer with it"
    peer.leave()
    serving.ended()


def test_client_that_never_stops_sending_is_cut_off(echo: Echo, serve: Serve) -> None:
    serving = serve(echo, linger_s=0.05)
    peer = serving.connect()
    peer.send(b"nonsense\r\n\r\n")
    assert peer.response().status == 400
    serving.watch()
    serving.ended()


@pytest.mark.parametrize("hold", [False, True])
def test_refusal_comes_once_and_behind_the_answers_before(echo: Echo, serve: Serve, hold: bool) -> None:
    echo.hold = hold
    serving = serve(echo)
    peer = serving.connect()
    peer.send(ask("/0") + b"nonsense\r\n\r\n")
    serving.loop.until(lambda: echo.refusals)
    peer.send(b"more nonsense\r\n\r\n", ask("/1"))
    serving.loop.settle()
    if hold:
        echo.tell(echo.exchanges[0])
    assert peer.response().body == b"GET /0 "
    assert peer.response().status == 400
    peer.end()
    assert peer.rest() == b""
    assert (len(echo.exchanges), len(echo.refusals)) == (1, 1)


def test_full_budget_is_a_refusal_that_says_when_to_come_again(echo: Echo, serve: Serve) -> None:
    peer = serve(echo, bodies_bytes_max=4).connect()
    peer.send(ask("/a", method="POST", body=b"hello"))
    response = peer.response()
    assert (response.status, response.headers["retry-after"]) == (503, "1")


def test_one_connection_too_many_is_refused(echo: Echo, serve: Serve) -> None:
    serving = serve(echo, connections_max=2)
    peers = [serving.connect() for _ in range(3)]
    response = peers[2].response()
    assert (response.status, response.headers["retry-after"], response.headers["connection"]) == (503, "1", "close")
    assert response.body == b'{"error":"2 connections are open; try again shortly"}'
    for peer in peers[:2]:
        peer.send(ask("/a"))
        assert peer.response().status == 200
    peers[2].leave()
    serving.loop.until(lambda: len(serving.http.connections) == 2)
    peers[0].leave()
    serving.loop.until(lambda: len(serving.http.connections) == 1)
    late = serving.connect()
    late.send(ask("/a"))
    assert late.response().status == 200


# --- large bodies ---


@pytest.mark.parametrize("count", [1, 65_536, 3_000_000])
def test_large_answer_behind_its_head_arrives_whole(echo: Echo, serve: Serve, count: int) -> None:
    peer = serve(echo).connect()
    peer.send(ask(f"/large/{count}") + ask("/b"))
    assert peer.response().body == pattern(count)
    assert peer.response().body == b"GET /b "


def test_large_request_arrives_whole(echo: Echo, serve: Serve) -> None:
    serving = serve(echo)
    peer = serving.connect()
    body = pattern(3_000_000)
    for _ in range(2):
        peer.send(ask("/a", method="POST", body=body))
        assert peer.response().body == b"POST /a " + body
    assert serving.http.budget.used == 0


def test_request_and_its_budget_are_let_go_with_the_answer(echo: Echo, serve: Serve) -> None:
    echo.hold = True
    serving = serve(echo)
    peer = serving.connect()
    peer.send(ask("/a", method="POST", body=b"hello"))
    serving.loop.until(lambda: echo.exchanges)
    [exchange] = echo.exchanges
    assert (serving.http.budget.used, exchange.body, exchange.abandoned) == (5, b"hello", False)
    echo.tell(exchange)
    assert (serving.http.budget.used, exchange.body, exchange.status) == (0, b"", 200)


# --- what the kernel has taken ---


class Lender(Echo):
    """Answers with memory of somebody else's, and notes when it may be used anew."""

    def __init__(self) -> None:
        super().__init__()
        self.returned: list[bytes] = []
        self.settled = 0

    def tell(self, exchange: Exchange) -> None:
        url = exchange.head.url
        count = int(url.rpartition(b"/")[2])
        head = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % count
        exchange.send(200, head, memoryview(pattern(count)), lambda: self.returned.append(url))

    def sent(self) -> None:
        self.settled += 1


@pytest.fixture
def lender() -> Lender:
    return Lender()


def test_what_the_kernel_takes_at_once_is_returned_at_once(lender: Lender, serve: Serve) -> None:
    peer = serve(lender).connect()
    peer.send(ask("/0/10") + ask("/1/5000"))
    assert [peer.response().body for _ in range(2)] == [pattern(10), pattern(5000)]
    assert lender.returned == [b"/0/10", b"/1/5000"]
    assert lender.settled == 0, "what follows from it is already under way"


def test_a_large_answer_is_returned_once_the_client_has_read_it(lender: Lender, serve: Serve) -> None:
    serving = serve(lender)
    peer = serving.connect(receive_bytes=4096)
    fill_send_buffer(serving)
    peer.send(ask("/0/5000000"))
    serving.loop.until(lambda: lender.exchanges)
    serving.loop.settle()
    assert lender.returned == []
    assert peer.response().body == pattern(5_000_000)
    serving.loop.until(lambda: lender.returned)
    assert lender.settled == 1
    peer.send(ask("/1/10"))
    assert peer.response().body == pattern(10)
    assert lender.returned == [b"/0/5000000", b"/1/10"]


def test_what_waits_for_an_answer_before_it_is_returned_after_that(lender: Lender, serve: Serve) -> None:
    lender.hold = True
    serving = serve(lender)
    peer = serving.connect()
    peer.send(ask("/0/10") + ask("/1/20"))
    serving.loop.until(lambda: len(lender.exchanges) == 2)
    lender.tell(lender.exchanges[1])
    assert lender.returned == []
    lender.tell(lender.exchanges[0])
    assert lender.returned == [b"/0/10", b"/1/20"]
    assert [peer.response().body for _ in range(2)] == [pattern(10), pattern(20)]


def test_a_client_that_leaves_returns_everything(lender: Lender, serve: Serve) -> None:
    """An answer that is half written, one that waits behind it, and one that comes too late."""
    serving = serve(lender)
    peer = serving.connect(receive_bytes=4096)
    fill_send_buffer(serving)
    lender.hold = True
    peer.send(ask("/0/5000000") + ask("/1/10") + ask("/2/10") + ask("/3/10"))
    serving.loop.until(lambda: len(lender.exchanges) == 4)
    first, _, third, late = lender.exchanges
    lender.tell(third)
    lender.tell(first)
    assert lender.returned == []
    peer.reset()
    serving.ended()
    assert sorted(lender.returned) == [b"/0/5000000", b"/2/10"]
    assert lender.settled == 1
    lender.tell(late)
    assert sorted(lender.returned) == [b"/0/5000000", b"/2/10", b"/3/10"]


def test_what_is_encrypted_is_returned_at_once(lender: Lender, serve: Serve, certificate: Path) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    peer = SecurePeer(serve(lender, tls=context).connect(wait=False))
    peer.send(ask("/0/5000000"))
    assert peer.response().body == pattern(5_000_000)
    assert lender.returned == [b"/0/5000000"]


# --- large answers, a piece at a time ---


class Recorded:
    """A transport that notes how many bytes it is given at once, and in which turn of the loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop, transport: asyncio.Transport) -> None:
        self._loop, self._transport = loop, transport
        self._turn = 0
        self.written: list[int] = []
        self.turns: list[int] = []
        self._next_turn()

    def _next_turn(self) -> None:
        self._turn += 1
        if not self._transport.is_closing():
            self._loop.call_soon(self._next_turn)

    def writelines(self, lines: Sequence[bytes]) -> None:
        self.written.append(sum(map(len, lines)))
        self.turns.append(self._turn)
        self._transport.writelines(lines)

    def __getattr__(self, name: str) -> object:
        return getattr(self._transport, name)


@pytest.mark.parametrize("count", [PIECE - 1, PIECE, PIECE + 1, 2 * PIECE, 20_000_000])
def test_a_large_answer_is_written_a_piece_at_a_time(lender: Lender, serve: Serve, count: int) -> None:
    """Between two pieces the others have their turn, even when the kernel takes as much as comes."""
    serving = serve(lender)
    peer = serving.connect()
    [connection] = serving.http.connections
    assert connection._transport is not None
    recorded = Recorded(serving.loop.loop, connection._transport)
    connection._transport = cast(asyncio.Transport, recorded)
    peer.send(ask(f"/0/{count}") + ask("/1/10"))
    assert peer.response().body == pattern(count)
    assert peer.response().body == pattern(10)
    pieces = -(-count // PIECE)
    assert len(recorded.written) == pieces + 1
    assert max(recorded.written) <= PIECE + 200
    assert len(set(recorded.turns[:pieces])) == pieces
    assert lender.returned == [f"/0/{count}".encode(), b"/1/10"]


def test_large_and_small_answers_keep_their_order(lender: Lender, serve: Serve) -> None:
    lender.hold = True
    serving = serve(lender)
    peer = serving.connect(receive_bytes=4096)
    fill_send_buffer(serving)
    counts = [2 * PIECE + 1, 10, 3 * PIECE, PIECE + 1, 5000, 7]
    peer.send(b"".join(ask(f"/{at}/{count}") for at, count in enumerate(counts)))
    serving.loop.until(lambda: len(lender.exchanges) == len(counts))
    for exchange in (lender.exchanges[2], *lender.exchanges[:2], *lender.exchanges[3:]):
        lender.tell(exchange)
    assert [peer.response().body for _ in counts] == [pattern(count) for count in counts]
    serving.loop.until(lambda: len(lender.returned) == len(counts))
    assert lender.returned == [f"/{at}/{count}".encode() for at, count in enumerate(counts)]
    assert serving.http.budget.used == 0


def test_requests_behind_a_large_answer_wait_until_it_is_read(lender: Lender, serve: Serve) -> None:
    serving = serve(lender)
    peer = serving.connect(receive_bytes=4096)
    fill_send_buffer(serving)
    peer.send(ask(f"/0/{2 * PIECE}"))
    serving.loop.until(lambda: lender.exchanges)
    peer.send(ask(f"/1/{2 * PIECE}") * 3)
    serving.loop.settle()
    assert len(lender.exchanges) == 1
    assert [peer.response().body for _ in range(4)] == [pattern(2 * PIECE)] * 4
    assert lender.settled == len(lender.returned) == 4


def test_the_method_head_gets_nothing_of_a_large_answer(lender: Lender, serve: Serve) -> None:
    peer = serve(lender).connect()
    peer.send(ask(f"/0/{2 * PIECE}", method="HEAD") + ask("/1/10"))
    assert peer.response(body=False).headers["content-length"] == str(2 * PIECE)
    assert peer.response().body == pattern(10)


@pytest.mark.parametrize("more", [b"", b"GET"])
def test_a_connection_closes_behind_its_last_answer_though_large(lender: Lender, serve: Serve, more: bytes) -> None:
    serving = serve(lender, linger_s=0.0)
    peer = serving.connect(receive_bytes=4096)
    fill_send_buffer(serving)
    peer.send(ask(f"/0/{3 * PIECE}", "Connection: close") + more)
    response = peer.response()
    assert (response.headers["connection"], response.body) == ("close", pattern(3 * PIECE))
    assert peer.rest() == b""
    serving.watch()
    serving.ended()


def test_a_gateway_that_drains_says_the_rest_of_a_large_answer(lender: Lender, serve: Serve) -> None:
    serving = serve(lender)
    peer = serving.connect(receive_bytes=4096)
    fill_send_buffer(serving)
    peer.send(ask(f"/0/{3 * PIECE}"))
    serving.loop.until(lambda: lender.exchanges)
    serving.http.drain()
    serving.http.close_idle()
    assert serving.http.unanswered == 1
    assert peer.response().body == pattern(3 * PIECE)
    assert peer.rest() == b""
    assert lender.returned == [f"/0/{3 * PIECE}".encode()]


def test_all_pieces_of_an_answer_have_one_deadline(lender: Lender, serve: Serve) -> None:
    serving = serve(lender, write_timeout_s=10, body_bytes_per_s_min=PIECE)
    peer = serving.connect(receive_bytes=4096)
    fill_send_buffer(serving)
    peer.send(ask(f"/0/{20 * PIECE}"))
    serving.loop.settle()
    [connection] = serving.http.connections
    deadline = connection.deadline
    assert deadline == pytest.approx(serving.loop.loop.time() + 30, abs=5)
    peer.raw(10 * PIECE)
    assert connection.deadline == deadline
    peer.raw(10 * PIECE)
    serving.loop.until(lambda: lender.returned)
    assert connection.deadline > deadline, "it may bring another request"


def test_client_that_stops_to_read_a_large_answer_is_cut_off(lender: Lender, serve: Serve) -> None:
    serving = serve(lender, write_timeout_s=0.05, body_bytes_per_s_min=1 << 40)
    peer = serving.connect(receive_bytes=4096)
    fill_send_buffer(serving)
    peer.send(ask(f"/0/{20 * PIECE}"))
    peer.raw(2 * PIECE)
    serving.watch()
    serving.ended()
    assert (serving.http.cut_off, lender.returned) == (1, [f"/0/{20 * PIECE}".encode()])


# --- answers that go on ---


class Source(Echo):
    """Begins an answer that goes on for each request below ``/go``; the test pushes."""

    def __init__(self) -> None:
        super().__init__()
        self.streams: list[Stream] = []

    def tell(self, exchange: Exchange) -> None:
        if not exchange.head.url.startswith(b"/go"):
            super().tell(exchange)
            return
        try:
            self.streams.append(exchange.begin(b"text/event-stream", b"Cache-Control: no-store\r\n"))
        except PenstockError as error:
            exchange.answer_error(503, error.message)


@pytest.fixture
def source() -> Source:
    return Source()


def test_answer_goes_on_in_chunks_until_it_is_finished(source: Source, serve: Serve) -> None:
    serving = serve(source)
    peer = serving.connect()
    peer.send(ask("/go"))
    chunks = Chunks(peer)
    assert chunks.head() == {
        "connection": "close",
        "content-type": "text/event-stream",
        "cache-control": "no-store",
        "transfer-encoding": "chunked",
    }
    [stream] = source.streams
    for data in (b"a", pattern(3000), b"\r\n"):
        assert stream.push(data)
        assert chunks.next() == data
    assert serving.http.streams == 1
    stream.finish()
    assert chunks.next() == b""
    assert peer.rest() == b""
    assert (serving.http.streams, source.exchanges[0].status, source.gone) == (0, 200, [])
    assert not stream.push(b"too late")
    stream.finish()


def test_http_1_0_is_told_by_the_end_of_the_connection(source: Source, serve: Serve) -> None:
    peer = serve(source).connect()
    peer.send(ask("/go", "Connection: keep-alive", version="1.0"))
    headers = Chunks(peer).head()
    assert (headers["connection"], "transfer-encoding" in headers) == ("close", False)
    for data in (b"one ", b"two"):
        assert source.streams[0].push(data)
    source.streams[0].finish()
    assert peer.rest() == b"one two"


def test_answer_that_goes_on_leaves_behind_those_before(source: Source, serve: Serve) -> None:
    source.hold = True
    serving = serve(source)
    peer = serving.connect()
    peer.send(ask("/0") + ask("/go"))
    serving.loop.until(lambda: len(source.exchanges) == 2)
    source.tell(source.exchanges[1])
    [stream] = source.streams
    assert not stream.push(b"before its turn")
    source.tell(source.exchanges[0])
    assert peer.response().body == b"GET /0 "
    assert stream.push(b"x")
    chunks = Chunks(peer)
    assert chunks.head()["connection"] == "close"
    assert chunks.next() == b"x"


def test_answer_that_is_finished_before_its_turn_is_empty(source: Source, serve: Serve) -> None:
    source.hold = True
    serving = serve(source)
    peer = serving.connect()
    peer.send(ask("/0") + ask("/go"))
    serving.loop.until(lambda: len(source.exchanges) == 2)
    source.tell(source.exchanges[1])
    source.streams[0].finish()
    source.tell(source.exchanges[0])
    assert peer.response().body == b"GET /0 "
    chunks = Chunks(peer)
    assert chunks.head()["connection"] == "close"
    assert chunks.next() == b""
    assert peer.rest() == b""
    assert serving.http.streams == 0


@pytest.mark.parametrize("hold", [False, True])
def test_what_was_asked_behind_an_answer_that_goes_on_is_let_go(source: Source, serve: Serve, hold: bool) -> None:
    source.hold = hold
    serving = serve(source)
    peer = serving.connect()
    peer.send(ask("/go") + ask("/1", method="POST", body=b"x" * 100) + ask("/2"))
    serving.loop.until(lambda: len(source.exchanges) == (3 if hold else 1))
    if hold:
        source.tell(source.exchanges[2])
        source.tell(source.exchanges[0])
    chunks = Chunks(peer)
    chunks.head()
    assert source.gone == [b"/1"] * hold
    peer.send(ask("/3", method="POST", body=b"x" * 100), b"nonsense\r\n\r\n")
    serving.loop.settle()
    assert serving.http.budget.used == 0
    assert source.streams[0].push(b"x")
    assert chunks.next() == b"x"
    assert source.refusals == []
    source.streams[0].finish()
    assert chunks.next() == b""


@pytest.mark.parametrize("how", ["leave", "reset", "end"])
def test_client_that_leaves_an_answer_that_goes_on_is_noticed(source: Source, serve: Serve, how: str) -> None:
    serving = serve(source)
    peer = serving.connect()
    peer.send(ask("/go"))
    Chunks(peer).head()
    getattr(peer, how)()
    serving.ended()
    assert (source.gone, serving.http.streams) == ([b"/go"], 0)
    assert source.exchanges[0].abandoned
    assert not source.streams[0].push(b"x")
    source.streams[0].finish()


def test_parts_are_skipped_for_a_client_that_does_not_read(source: Source, serve: Serve) -> None:
    serving = serve(source)
    peer = serving.connect(receive_bytes=4096)
    fill_send_buffer(serving)
    peer.send(ask("/go"))
    chunks = Chunks(peer)
    chunks.head()
    [stream], [connection] = source.streams, serving.http.connections
    assert stream.push(pattern(300_000))
    held = connection._transport.get_write_buffer_size() if connection._transport else 0
    assert held > 0
    for _ in range(100):
        assert not stream.push(pattern(300_000))
    assert connection._transport is not None
    assert connection._transport.get_write_buffer_size() <= held
    assert chunks.next() == pattern(300_000)
    serving.loop.until(lambda: stream.push(b"now"))
    assert chunks.next() == b"now"


def test_client_that_never_reads_an_answer_that_goes_on_is_cut_off(source: Source, serve: Serve) -> None:
    serving = serve(source, write_timeout_s=0.05, body_bytes_per_s_min=1 << 30)
    peer = serving.connect(receive_bytes=4096)
    fill_send_buffer(serving)
    peer.send(ask("/go"))
    Chunks(peer).head()
    assert source.streams[0].push(pattern(3_000_000))
    serving.watch()
    serving.ended()
    assert (source.gone, serving.http.streams) == ([b"/go"], 0)


def test_answer_that_goes_on_has_no_deadline_while_it_is_read(source: Source, serve: Serve) -> None:
    limits = {"keep_alive_s": 0.05, "head_timeout_s": 0.05, "write_timeout_s": 0.05}
    serving = serve(source, **limits)
    peer, idle = serving.connect(), serving.connect()
    peer.send(ask("/go") + ask("/b")[:10])
    chunks = Chunks(peer)
    chunks.head()
    serving.watch()
    assert idle.rest() == b""
    wait_for_timeout(serving)
    assert source.streams[0].push(b"x")
    assert chunks.next() == b"x"


def test_too_many_answers_that_go_on_are_refused(source: Source, serve: Serve) -> None:
    serving = serve(source, streams_max=2)
    peers = [serving.connect() for _ in range(4)]
    for peer in peers[:3]:
        peer.send(ask("/go"))
    for peer in peers[:2]:
        Chunks(peer).head()
    assert peers[2].response().status == 503
    peers[2].send(ask("/a"))
    assert peers[2].response().status == 200, "the connection goes on"
    source.streams[0].finish()
    peers[3].send(ask("/go"))
    Chunks(peers[3]).head()
    assert serving.http.streams == 2


def test_draining_gateway_ends_what_goes_on(source: Source, serve: Serve) -> None:
    serving = serve(source)
    peer, idle = serving.connect(), serving.connect()
    peer.send(ask("/go"))
    chunks = Chunks(peer)
    chunks.head()
    assert source.streams[0].push(b"x")
    serving.http.drain()
    assert (source.gone, serving.http.streams) == ([b"/go"], 0)
    assert (chunks.next(), chunks.next()) == (b"x", b"")
    assert peer.rest() == b""
    idle.send(ask("/go"))
    response = idle.response()
    assert (response.status, response.headers["connection"]) == (503, "close")
    idle.rest()
    serving.loop.run(serving.http.drained.wait())


def test_answer_goes_on_through_tls(source: Source, serve: Serve, certificate: Path) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    serving = serve(source, tls=context)
    peer = SecurePeer(serving.connect(wait=False))
    peer.send(ask("/go"))
    chunks = Chunks(peer)
    chunks.head()
    for turn in range(3):
        serving.loop.until(lambda turn=turn: source.streams[0].push(b"%d" % turn))  # type: ignore[misc]
        assert chunks.next() == b"%d" % turn
    source.streams[0].finish()
    assert chunks.next() == b""


# --- draining ---


def test_draining_gateway_answers_what_it_has_and_closes(echo: Echo, serve: Serve) -> None:
    echo.hold = True
    serving = serve(echo)
    peer = serving.connect()
    peer.send(ask("/0") + ask("/1"))
    serving.loop.until(lambda: len(echo.exchanges) == 2)
    serving.http.drain()
    assert not serving.http.drained.is_set()
    for exchange in echo.exchanges:
        echo.tell(exchange)
    first, second = peer.response(), peer.response()
    assert (first.body, second.body) == (b"GET /0 ", b"GET /1 ")
    assert second.headers["connection"] == "close"
    assert peer.rest() == b""
    serving.loop.run(serving.http.drained.wait())


def test_idle_connection_may_bring_one_more_while_draining(echo: Echo, serve: Serve) -> None:
    serving = serve(echo)
    peer = serving.connect()
    serving.http.drain()
    peer.send(ask("/a") + ask("/b"))
    response = peer.response()
    assert (response.body, response.headers["connection"]) == (b"GET /a ", "close")
    assert peer.rest() == b""
    assert len(echo.exchanges) == 1
    serving.loop.run(serving.http.drained.wait())


@pytest.mark.parametrize("hold", [False, True])
@pytest.mark.parametrize("part", [ask("/b")[:10], EXPECTING, EXPECTING + b"he", b"nonsense\r\n\r\n"])
def test_half_a_request_behind_the_last_is_ignored(echo: Echo, serve: Serve, part: bytes, hold: bool) -> None:
    echo.hold = hold
    serving = serve(echo, head_timeout_s=0.05, body_timeout_s=0.05, linger_s=0.05)
    peer = serving.connect()
    serving.http.drain()
    peer.send(ask("/a") + part)
    serving.loop.until(lambda: echo.exchanges)
    if hold:
        wait_for_timeout(serving)
        echo.refusals.clear()
        echo.tell(echo.exchanges[0])
    else:
        serving.watch()
    response = peer.response()
    assert (response.body, response.headers["connection"]) == (b"GET /a ", "close")
    assert peer.rest() == b""
    serving.ended()
    assert echo.refusals == []
    assert serving.http.drained.is_set()


def test_idle_connection_is_closed_when_it_has_had_its_time_and_others_are_not(echo: Echo, serve: Serve) -> None:
    echo.hold = True
    serving = serve(echo)
    idle, waiting, half = serving.connect(), serving.connect(), serving.connect()
    waiting.send(ask("/waits"))
    half.send(ask("/half")[:10])
    serving.loop.until(lambda: echo.exchanges)
    serving.loop.settle()
    serving.http.drain()
    serving.http.close_idle()
    assert idle.rest() == b""
    assert serving.http.unanswered == 1
    half.send(ask("/half")[10:])
    serving.loop.until(lambda: len(echo.exchanges) == 2)
    for exchange, peer in zip(echo.exchanges, (waiting, half), strict=True):
        echo.tell(exchange)
        assert peer.response().headers["connection"] == "close"
    serving.loop.run(serving.http.drained.wait())


def test_gateway_without_connections_is_drained_at_once(echo: Echo, serve: Serve) -> None:
    serving = serve(echo)
    serving.http.drain()
    assert serving.http.drained.is_set()


def test_stop_ends_every_connection(echo: Echo, serve: Serve) -> None:
    echo.hold = True
    serving = serve(echo)
    peer, idle = serving.connect(), serving.connect()
    peer.send(ask("/a"))
    serving.loop.until(lambda: echo.exchanges)
    serving.watch()
    serving.http.stop()
    serving.ended()
    assert echo.gone == [b"/a"]
    idle.rest()


# --- room in shared memory ---


@pytest.fixture
def whole(slots: Slots) -> Iterator[Slot]:
    """Somebody has taken all there is."""
    whole = slots.take(slots.arena.size)
    assert whole is not None
    yield whole
    whole.give_back()


BODY = pattern(300_000)


def large(url: str, *lines: str, body: bytes = BODY) -> bytes:
    return ask(url, "Inference-Header-Content-Length: 100", *lines, method="POST", body=body)


def begin(serving: Serving, slots: Slots, request: bytes) -> Peer:
    """A client whose request waits for room."""
    before = slots.waiting
    peer = serving.connect()
    peer.send(request)
    serving.loop.until(lambda: slots.waiting > before)
    return peer


def test_large_body_is_received_in_a_slot(echo: Echo, serve: Serve, slots: Slots) -> None:
    echo.hold = True
    serving = serve(echo, slots=slots)
    peer = serving.connect()
    peer.send(large("/a"))
    serving.loop.until(lambda: echo.exchanges)
    slot = echo.exchanges[0].slot
    assert slot is not None
    assert bytes(slot.view) == BODY
    echo.tell(echo.exchanges[0])
    assert peer.response().body == b"POST /a " + BODY


def test_large_body_waits_until_there_is_room(echo: Echo, serve: Serve, slots: Slots, whole: Slot) -> None:
    serving = serve(echo, slots=slots, arena_wait_s=60)
    peer = begin(serving, slots, large("/a") + ask("/b"))
    assert echo.exchanges == []
    whole.give_back()
    assert peer.response().body == b"POST /a " + BODY
    assert peer.response().body == b"GET /b "
    peer.send(large("/c"))
    assert peer.response().body == b"POST /c " + BODY


def test_body_that_waits_stays_with_its_client(echo: Echo, serve: Serve, loop: Loop) -> None:
    slots = Slots(Arena(64 << 20, "test"))
    whole = slots.take(slots.arena.size)
    assert whole is not None
    serving = serve(echo, slots=slots, arena_wait_s=60)
    peer = serving.connect()
    body = pattern(60 << 20)
    sending = loop.loop.create_task(loop.loop.sock_sendall(peer._channel, large("/a", body=body)))
    loop.until(lambda: slots.waiting)
    [connection] = serving.http.connections
    loop.settle()
    held = sum(map(len, connection._reader._body))
    assert held <= 256 * 1024, "what came with the head"
    assert not sending.done()
    whole.give_back()
    loop.run(sending)
    assert peer.response().body == b"POST /a " + body
    slots.close()


def test_body_that_has_waited_in_vain_is_refused(echo: Echo, serve: Serve, slots: Slots, whole: Slot) -> None:
    serving = serve(echo, slots=slots, arena_wait_s=0.02)
    peer = serving.connect()
    peer.send(large("/a"))
    response = peer.response()
    assert (response.status, response.headers["retry-after"], response.headers["connection"]) == (503, "1", "close")
    sentence = (
        "300028 bytes of this gateway's 1048576 bytes of shared memory did not come free within 0.02 s (arena_wait_s); "
        "try again shortly, or raise arena_bytes ([gateway] in the configuration)"
    )
    assert echo.refusals == [(503, sentence)]
    assert slots.waiting == 0
    assert (echo.exchanges, serving.http.budget.used) == ([], 0)


def test_bodies_have_their_turn_in_the_order_of_their_coming(
    echo: Echo, serve: Serve, slots: Slots, whole: Slot
) -> None:
    serving = serve(echo, slots=slots, arena_wait_s=60)
    bodies = [pattern(size) for size in (600_000, 300_000, 900_000, 70_000)]
    requests = [large(f"/{number}", body=body) for number, body in enumerate(bodies)]
    heads = [request[: -len(body)] for request, body in zip(requests, bodies, strict=True)]
    peers = [begin(serving, slots, head) for head in heads]

    def serve_body(number: int) -> None:
        peers[number].send(bodies[number])
        assert peers[number].response().body == b"POST /%d " % number + bodies[number]

    whole.give_back()
    assert slots.waiting == 2, "there is room for the last, which waits behind a larger one all the same"
    serve_body(1)
    assert slots.waiting == 2
    serve_body(0)
    assert slots.waiting == 0
    serve_body(3)
    serve_body(2)


def test_others_are_served_while_a_body_waits(echo: Echo, serve: Serve, slots: Slots, whole: Slot) -> None:
    serving = serve(echo, slots=slots, arena_wait_s=60)
    peer, other = begin(serving, slots, large("/a")), serving.connect()
    other.send(ask("/b", method="POST", body=b"x" * 70_000))
    assert other.response().body == b"POST /b " + b"x" * 70_000
    whole.give_back()
    assert peer.response().status == 200


@pytest.mark.parametrize("how", ["leave", "reset", "end"])
def test_client_that_leaves_does_not_wait_for_room(
    echo: Echo, serve: Serve, slots: Slots, whole: Slot, how: str
) -> None:
    """Though nothing is read from it: not even that it has nothing more to say."""
    serving = serve(echo, slots=slots, arena_wait_s=60)
    first = begin(serving, slots, large("/a")[:1000])
    second = begin(serving, slots, large("/b"))
    getattr(first, how)()
    serving.loop.until(lambda: slots.waiting == 1)
    serving.loop.until(lambda: len(serving.http.connections) == 1)
    assert serving.http.budget.used == len(BODY)
    whole.give_back()
    assert second.response().body == b"POST /b " + BODY
    assert echo.refusals == []


def test_client_is_not_late_while_its_body_waits(echo: Echo, serve: Serve, slots: Slots, whole: Slot) -> None:
    limits = {"head_timeout_s": 0.05, "body_timeout_s": 0.05, "keep_alive_s": 0.05}
    serving = serve(echo, slots=slots, arena_wait_s=60, **limits)
    peer = begin(serving, slots, large("/a"))
    wait_for_timeout(serving)
    serving.still()
    whole.give_back()
    assert peer.response().body == b"POST /a " + BODY


def test_client_is_late_once_its_body_need_not_wait(echo: Echo, serve: Serve, slots: Slots, whole: Slot) -> None:
    serving = serve(echo, slots=slots, arena_wait_s=60, body_timeout_s=0.05, body_bytes_per_s_min=1 << 30)
    peer = begin(serving, slots, large("/a")[:-1])
    serving.watch()
    whole.give_back()
    assert (peer.response().status, echo.refusals) == (408, [(408, "the body came too slowly")])


def test_client_is_told_to_continue_once_there_is_room(echo: Echo, serve: Serve, slots: Slots, whole: Slot) -> None:
    serving = serve(echo, slots=slots, arena_wait_s=60)
    head, _, body = large("/a", "Expect: 100-continue").partition(b"\r\n\r\n")
    peer = begin(serving, slots, head + b"\r\n\r\n")
    serving.loop.settle()
    with pytest.raises(BlockingIOError):
        peer._channel.recv(1)
    whole.give_back()
    assert peer.raw(len(CONTINUE)) == CONTINUE
    peer.send(body)
    assert peer.response().body == b"POST /a " + BODY


def test_refusal_for_want_of_room_stands_for_continue(echo: Echo, serve: Serve, slots: Slots, whole: Slot) -> None:
    serving = serve(echo, slots=slots, arena_wait_s=0.02)
    peer = serving.connect()
    peer.send(large("/a", "Expect: 100-continue").partition(b"\r\n\r\n")[0] + b"\r\n\r\n")
    assert peer.response().status == 503


def test_body_that_fits_no_arena_is_refused_before_it_comes(echo: Echo, serve: Serve, slots: Slots) -> None:
    peer = serve(echo, slots=slots).connect()
    peer.send(ask("/a", "Inference-Header-Content-Length: 64", "Content-Length: 1048577", method="POST"))
    response = peer.response()
    assert (response.status, response.headers["connection"]) == (413, "close")
    assert b"takes 1048577 bytes of shared memory, and this gateway has 1048576;" in response.body


def test_answers_before_a_body_that_waits_are_sent(echo: Echo, serve: Serve, slots: Slots, whole: Slot) -> None:
    echo.hold = True
    serving = serve(echo, slots=slots, arena_wait_s=60)
    peer = begin(serving, slots, ask("/0") + large("/1", "Expect: 100-continue"))
    echo.tell(echo.exchanges[0])
    assert peer.response().body == b"GET /0 "
    assert slots.waiting == 1
    echo.hold = False
    whole.give_back()
    assert peer.raw(len(CONTINUE)) == CONTINUE
    assert peer.response().body == b"POST /1 " + BODY


def test_body_behind_the_last_request_does_not_wait(echo: Echo, serve: Serve, slots: Slots, whole: Slot) -> None:
    echo.hold = True
    serving = serve(echo, slots=slots, arena_wait_s=60, linger_s=0.05)
    peer = serving.connect()
    peer.send(ask("/0", "Connection: close") + large("/1"))
    serving.loop.until(lambda: echo.exchanges)
    serving.loop.settle()
    assert slots.waiting == 0
    echo.tell(echo.exchanges[0])
    assert peer.response().body == b"GET /0 "
    serving.watch()
    assert peer.rest() in (b"", b"(reset)")
    serving.ended()
    assert echo.refusals == []


def test_body_that_waits_behind_the_last_request_of_a_draining_gateway(
    echo: Echo, serve: Serve, slots: Slots, whole: Slot
) -> None:
    echo.hold = True
    serving = serve(echo, slots=slots, arena_wait_s=60, linger_s=0.05)
    peer = begin(serving, slots, ask("/0") + large("/1"))
    serving.http.drain()
    echo.tell(echo.exchanges[0])
    assert peer.response().headers["connection"] == "close"
    assert slots.waiting == 0
    serving.watch()
    assert peer.rest() in (b"", b"(reset)")
    serving.loop.run(serving.http.drained.wait())


def test_room_for_a_client_that_does_not_read_gives_it_no_more_time(
    echo: Echo, serve: Serve, slots: Slots, whole: Slot
) -> None:
    serving = serve(echo, slots=slots, arena_wait_s=60)
    request = large("/1")
    peer = begin(serving, slots, ask("/large/30000000") + request[:1000])
    [connection] = serving.http.connections
    assert connection._writing_paused
    deadline = connection.deadline
    whole.give_back()
    serving.loop.until(lambda: slots.arena.allocator.used < len(whole))
    serving.loop.settle()
    assert connection.deadline == deadline
    assert peer.response().body == pattern(30_000_000)
    peer.send(request[1000:])
    assert peer.response().body == b"POST /1 " + BODY


def test_draining_gateway_serves_a_body_that_waits(echo: Echo, serve: Serve, slots: Slots, whole: Slot) -> None:
    serving = serve(echo, slots=slots, arena_wait_s=60)
    peer = begin(serving, slots, large("/a"))
    serving.http.drain()
    whole.give_back()
    response = peer.response()
    assert (response.body, response.headers["connection"]) == (b"POST /a " + BODY, "close")
    assert peer.rest() == b""
    serving.loop.run(serving.http.drained.wait())


def test_gateway_that_stops_leaves_nobody_waiting(echo: Echo, serve: Serve, slots: Slots, whole: Slot) -> None:
    serving = serve(echo, slots=slots, arena_wait_s=60)
    begin(serving, slots, large("/a"))
    begin(serving, slots, large("/b"))
    serving.watch()
    serving.http.stop()
    serving.ended()
    assert slots.waiting == 0


# --- TLS ---


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory, require_command: Callable[[str, str], str]) -> Path:
    """A self-signed certificate for 127.0.0.1, its key in the same file."""
    path = tmp_path_factory.mktemp("tls") / "both.pem"
    openssl = require_command("openssl", "openssl")
    arguments = "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=here"
    subprocess.run(
        [openssl, *arguments.split(), "-keyout", path, "-out", path.with_suffix(".crt")],
        check=True,
        capture_output=True,
        timeout=30,
    )
    path.write_bytes(path.read_bytes() + path.with_suffix(".crt").read_bytes())
    return path


class SecurePeer(Peer):
    """A client whose bytes go through TLS in memory."""

    def __init__(self, plain: Peer) -> None:
        super().__init__(plain._loop, plain._channel)
        context = ssl.create_default_context()
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        self._in, self._out = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._in, self._out)
        self._do(self._tls.do_handshake)

    def _do(self, step: Callable[[], bytes | int | None]) -> bytes | int | None:
        while True:
            try:
                done = step()
            except ssl.SSLWantReadError:
                done = NotImplemented
            except ssl.SSLZeroReturnError:
                return b""
            super().send(self._out.read())
            if done is not NotImplemented:
                return done
            data = self._loop.run(self._loop.loop.sock_recv(self._channel, 1 << 20))
            if data:
                self._in.write(data)
            else:
                self._in.write_eof()

    def send(self, *parts: bytes) -> None:
        for part in parts:
            self._do(lambda part=part: self._tls.write(part))  # type: ignore[misc]

    def _read(self) -> bytes:
        data = self._do(lambda: self._tls.read(1 << 20))
        assert isinstance(data, bytes)
        self._heard += data
        return data


def test_connections_work_the_same_through_tls(echo: Echo, serve: Serve, certificate: Path) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    serving = serve(echo, tls=context)
    peer = SecurePeer(serving.connect(wait=False))
    body = pattern(300_000)
    peer.send(ask("/a") + ask("/b", method="POST", body=body))
    assert peer.response().body == b"GET /a "
    assert peer.response().body == b"POST /b " + body
    peer.send(ask("/large/300000"))
    assert peer.response().body == pattern(300_000)
    peer.send(b"nonsense\r\n\r\n")
    assert peer.response().status == 400
    assert peer.rest() == b""


def test_body_waits_for_room_through_tls(
    echo: Echo, serve: Serve, certificate: Path, slots: Slots, whole: Slot
) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    serving = serve(echo, tls=context, slots=slots, arena_wait_s=60)
    peers = []
    for number in range(3):
        peers.append(SecurePeer(serving.connect(wait=False)))
        peers[-1].send(large(f"/{number}"))
        serving.loop.until(lambda number=number: slots.waiting == number + 1)  # type: ignore[misc]
    peers[0].reset()
    serving.loop.until(lambda: slots.waiting == 2)
    whole.give_back()
    for number in (1, 2):
        assert peers[number].response().body == b"POST /%d " % number + BODY
