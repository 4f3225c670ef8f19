"""``X-Request-Id``: which are taken, and where they come back."""

from __future__ import annotations

import logging
from collections.abc import Callable

import pytest

from penstock.gateway.requestid import REQUEST_ID_MAX, read_request_id, request_id_line
from tests.gateway.serving import Loop, Peer, Serving
from tests.gateway.test_application import Desk, ready

LONGEST = "x" * REQUEST_ID_MAX


@pytest.mark.parametrize("value", ["a", "7b1f-4c.2_9~", "Root=1-67891233-abcdef", "+49/30:80@x", LONGEST])
def test_what_can_be_an_id_is_written_back(value: str) -> None:
    headers = {"x-request-id": f" {value}\t".encode()}
    assert read_request_id(headers) == value
    assert request_id_line(headers) == f"X-Request-Id: {value}\r\n".encode()


@pytest.mark.parametrize(
    "value", ["", " ", "a b", "a, b", 'a"', "a\tb", "a\r\nb: c", "<a>", "\x1b[1m", "é", LONGEST + "x"]
)
def test_what_cannot_is_taken_for_none(value: str) -> None:
    headers = {"x-request-id": value.encode("latin-1")}
    assert (read_request_id(headers), request_id_line(headers)) == ("", b"")
    assert read_request_id({}) == ""


@pytest.fixture
def peer(loop: Loop, serve: Callable[..., Serving]) -> Peer:
    return serve(Desk(loop).join(ready()).application).connect()


def ask(method: str, url: str, *lines: str, version: str = "1.1") -> bytes:
    return "\r\n".join([f"{method} {url} HTTP/{version}", "Host: a", *lines, "", ""]).encode()


@pytest.mark.parametrize(
    ("method", "url", "status"),
    [
        ("GET", "/v2", 200),
        ("HEAD", "/v2", 200),
        ("OPTIONS", "/v2", 204),
        ("GET", "/v2/models/nope", 404),
        ("GET", "/v3", 404),
        ("POST", "/v2", 405),
        ("GET", "/%FF", 400),
        ("POST", "/v2/models/double/infer", 400),
    ],
)
def test_every_answer_has_the_id_of_its_request(peer: Peer, method: str, url: str, status: int) -> None:
    for number in ("1", "1", "2"):  # a head that is known the second time, and another
        peer.send(ask(method, url, f"X-Request-Id: {number}"))
        answer = peer.response(body=method != "HEAD")
        assert (answer.status, answer.headers["x-request-id"]) == (status, number)
    peer.send(ask(method, url, "X-Request-Id: not one"))
    assert "x-request-id" not in peer.response(body=method != "HEAD").headers


def test_answers_that_end_a_connection_and_that_go_on_have_it(loop: Loop, serve: Callable[..., Serving]) -> None:
    serving = serve(Desk(loop).join(ready()).application)
    peer = serving.connect()
    peer.send(ask("GET", "/v2/health/live", "X-Request-Id: 1", version="1.0"))
    assert peer.rest() == b"HTTP/1.1 200 OK\r\nConnection: close\r\nX-Request-Id: 1\r\nContent-Length: 0\r\n\r\n"
    peer = serving.connect()
    peer.send(ask("GET", "/events", "X-Request-Id: 2", version="1.0"))
    assert b"X-Request-Id: 2\r\n" in peer.raw(200)


def test_a_failed_request_is_logged_with_it(loop: Loop, caplog: pytest.LogCaptureFixture) -> None:
    desk = Desk(loop).join(ready())
    with caplog.at_level(logging.INFO, "penstock.gateway"):
        desk.ask("GET", "/v2/models/nope", X_Request_Id="a-1")
        desk.ask("GET", "/v2/models/nope", X_Request_Id="a 1")
    told, untold = [record.__dict__["fields"] for record in caplog.records]
    assert told["x_request_id"] == "a-1"
    assert "x_request_id" not in untold


ID = b"X-Request-Id: a-1\r\nOrigin: https://example.org\r\n"


@pytest.mark.parametrize(
    ("request_bytes", "status"),
    [
        (b"POST /v2 HTTP/1.1\r\nHost: a\r\n%bContent-Length: 100000000\r\n\r\n", 413),
        (b"POST /v2 HTTP/1.1\r\nHost: a\r\n%bTransfer-Encoding: chunked\r\n\r\n3e9\r\n" + bytes(1001), 413),
        (b"GET /v2 HTTP/1.1\r\nHost: a\r\n%b" + b"a: b\r\n" * 100 + b"\r\n", 431),
        (b"GET /v2 HTTP/1.1\r\nHost: a\r\n%bHost: b\r\n\r\n", 400),
        (b"POST /v2 HTTP/1.1\r\nHost: a\r\n%bTransfer-Encoding: gzip\r\n\r\n", 501),
        (b"GET /v2 HTTP/1.1\r\nHost: a\r\n%bExpect: much\r\n\r\n", 417),
        (b"GET /v2 HTTP/1.1\r\nHost: a\r\n%bA: ", 408),
        (b"POST /v2 HTTP/1.1\r\nHost: a\r\n%bContent-Length: 10\r\n\r\n", 408),
    ],
)
def test_what_the_connection_refuses_has_it_too(
    loop: Loop, serve: Callable[..., Serving], caplog: pytest.LogCaptureFixture, request_bytes: bytes, status: int
) -> None:
    desk = Desk(loop, cors_origins=("https://example.org",)).join(ready())
    limits = {"head_timeout_s": 0.02, "body_timeout_s": 0.02, "body_bytes_max": 1000}
    serving = serve(desk.application, **limits)
    serving.watch()
    peer = serving.connect()
    with caplog.at_level(logging.INFO, "penstock.gateway"):
        peer.send(request_bytes.replace(b"%b", ID))
        answer = peer.response()
    assert (answer.status, answer.headers["x-request-id"]) == (status, "a-1")
    assert answer.headers["access-control-allow-origin"] == "https://example.org"
    assert desk.meter("penstock_http_responses", str(status)) == 1
    [record] = caplog.records
    assert record.__dict__["fields"]["x_request_id"] == "a-1"
    serving.still()


def test_what_is_refused_has_no_other_requests_id(peer: Peer) -> None:
    peer.send(ask("GET", "/v2", "X-Request-Id: 1"))
    assert peer.response().headers["x-request-id"] == "1"
    peer.send(b"what is this\r\n\r\n")
    answer = peer.response()
    assert (answer.status, answer.headers.get("x-request-id")) == (400, None)
