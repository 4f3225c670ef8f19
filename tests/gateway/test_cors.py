"""Which pages of other sites may ask from a browser."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from penstock.gateway.cors import Cors, problem_of_origin
from tests.gateway.serving import Loop, Peer, Response, Serving
from tests.gateway.test_application import Desk, ready

SITE, OTHER = b"https://example.org", b"https://example.com"
ASKS = {"origin": SITE, "access-control-request-method": b"POST"}
ALLOWED = (
    b"Access-Control-Allow-Origin: %b\r\nAccess-Control-Expose-Headers: "
    b"Inference-Header-Content-Length, Retry-After, Server-Timing, X-Request-Id\r\n"
)


@pytest.mark.parametrize(
    ("origins", "origin", "lines"),
    [
        ([], SITE, b""),
        (["https://example.org"], None, b""),
        (["https://example.org"], SITE, b"Vary: Origin\r\n" + ALLOWED % SITE),
        (["https://a.b", "https://example.org"], SITE, b"Vary: Origin\r\n" + ALLOWED % SITE),
        (["https://example.org"], OTHER, b"Vary: Origin\r\n"),
        (["https://example.org"], b"null", b"Vary: Origin\r\n"),
        (["https://example.org"], SITE + b".evil", b"Vary: Origin\r\n"),
        (["*"], SITE, ALLOWED % b"*"),
        (["*"], None, b""),
    ],
)
def test_answers_say_who_may_read_them(origins: list[str], origin: bytes | None, lines: bytes) -> None:
    assert Cors(origins).lines({} if origin is None else {"origin": origin}) == lines


@pytest.mark.parametrize("origins", [["https://example.org"], ["*"]])
def test_a_browser_is_told_what_a_page_may_send(origins: list[str]) -> None:
    told = Cors(origins).preflight(ASKS, ("OPTIONS", "POST")).decode().split("\r\n")
    assert told[0] == "Access-Control-Allow-Methods: OPTIONS, POST"
    assert "Content-Type, Inference-Header-Content-Length, Penstock-Explain" in told[1]
    assert told[2:] == ["Access-Control-Max-Age: 600", ""]


def test_others_are_told_nothing() -> None:
    for origins in ([], ["https://example.com"]):
        assert Cors(origins).preflight(ASKS, ("GET",)) == b""
    for headers in ({}, {"origin": SITE}):
        assert Cors(["*"]).preflight(headers, ("GET",)) == b""


@pytest.mark.parametrize(
    "origin", ["*", "https://example.org", "http://localhost:3000", "http://[::1]:80", "chrome-extension://abc"]
)
def test_what_browsers_call_an_origin(origin: str) -> None:
    assert problem_of_origin(origin) == ""


@pytest.mark.parametrize(
    "origin",
    ["", "null", "example.org", "https://example.org/", "https://EXAMPLE.org", "https://*.org", "https://a\r\nb: c"],
)
def test_what_none_is(origin: str) -> None:
    assert problem_of_origin(origin).startswith(f"{origin!r} is no origin; write one as browsers do")


# --- on a connection ---


@pytest.fixture
def peer(loop: Loop, serve: Callable[..., Serving]) -> Peer:
    desk = Desk(loop, cors_origins=("https://example.org",)).join(ready())
    return serve(desk.application).connect()


def ask(peer: Peer, method: str, url: str, *lines: str) -> Response:
    peer.send("\r\n".join([f"{method} {url} HTTP/1.1", "Host: a", *lines, "", ""]).encode())
    return peer.response(body=method != "HEAD")


@pytest.mark.parametrize("url", ["/v2", "/v2/models/nope", "/v3"])
def test_every_answer_says_it_to_who_may_know(peer: Peer, url: str) -> None:
    for _ in range(2):  # a head that is known the second time
        headers = ask(peer, "GET", url, "Origin: https://example.org").headers
        assert (headers["access-control-allow-origin"], headers["vary"]) == ("https://example.org", "Origin")
        headers = ask(peer, "GET", url, "Origin: https://example.com").headers
        assert ("access-control-allow-origin" in headers, headers["vary"]) == (False, "Origin")
        assert not {"access-control-allow-origin", "vary"} & ask(peer, "GET", url).headers.keys()


def test_a_browser_asks_first(peer: Peer) -> None:
    lines = ["Origin: https://example.org", "Access-Control-Request-Method: POST", "Access-Control-Request-Headers: a"]
    answer = ask(peer, "OPTIONS", "/v2/models/double/infer", *lines)
    assert (answer.status, answer.body) == (204, b"")
    assert answer.headers["access-control-allow-origin"] == "https://example.org"
    assert answer.headers["access-control-allow-methods"] == answer.headers["allow"] == "OPTIONS, POST"
    assert "content-length" not in answer.headers


def test_nobody_may_by_default(loop: Loop, serve: Callable[..., Serving]) -> None:
    peer = serve(Desk(loop).application).connect()
    lines = ["Origin: https://example.org", "Access-Control-Request-Method: GET"]
    answer = ask(peer, "OPTIONS", "/v2", *lines)
    assert (answer.status, answer.headers) == (204, {"allow": "GET, HEAD, OPTIONS"})
