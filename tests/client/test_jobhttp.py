"""HTTP for jobs, with a server that the test plays."""

from __future__ import annotations

import json
import queue
import socket
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest

from penstock.client.jobhttp import Channel, Unreached, where_from
from penstock.client.jobwatch import Watch
from penstock.wire import errors
from penstock.wire.endpoints import RuntimeDir
from penstock.wire.errors import PenstockError

LIMIT_S = 20.0
Answer = Callable[[BaseHTTPRequestHandler], None]


def say(handler: BaseHTTPRequestHandler, status: int, body: Any, **headers: str) -> None:
    data = json.dumps(body).encode()
    handler.send_response(status)
    for name, value in headers.items():
        handler.send_header(name.replace("_", "-"), value)
    handler.send_header("Content-Length", str(len(data)))
    handler.end_headers()
    handler.wfile.write(data)


class Played:
    """``answer`` is called for each request; ``connections`` counts."""

    def __init__(self) -> None:
        self.answer: Answer = lambda handler: say(handler, 200, {"path": handler.path})
        self.connections = 0
        played = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def setup(self) -> None:
                played.connections += 1
                super().setup()

            def handle_one_request(self) -> None:
                try:
                    super().handle_one_request()
                except OSError:
                    self.close_connection = True

            def do_GET(self) -> None:
                played.answer(self)

            def do_POST(self) -> None:
                self.rfile.read(int(self.headers.get("Content-Length", "0")))
                played.answer(self)

            def log_message(self, format: str, *arguments: Any) -> None: ...

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join(LIMIT_S)
        self._server.server_close()


@pytest.fixture
def played() -> Iterator[Played]:
    server = Played()
    yield server
    server.close()


@pytest.fixture
def channel(played: Played) -> Iterator[Channel]:
    channel = Channel(where_from(played.url + "/below/", None))
    yield channel
    channel.close()


# --- where it is ---


@pytest.mark.parametrize("url", ["host:8000", "ftp://host", "http://", "http://host:x", "http://[::1", "//host"])
def test_what_is_no_url(url: str) -> None:
    with pytest.raises(PenstockError) as raised:
        where_from(url, None)
    assert raised.value.code == errors.BAD_INPUT


def test_a_server_on_this_host_is_found(tmp_path: Path) -> None:
    where = where_from("", RuntimeDir(tmp_path))
    with pytest.raises(Unreached, match="no gateway listens at") as raised:
        where()
    assert raised.value.retryable
    (tmp_path / "http").write_text("http://127.0.0.1:1\n")
    assert where() == "http://127.0.0.1:1"


def test_one_on_another_host_has_to_be_named() -> None:
    with pytest.raises(PenstockError, match=r'Client\(http="http://host:8000"\)'):
        where_from("", None)()


# --- asking ---


def test_connections_are_kept(played: Played, channel: Channel) -> None:
    for _ in range(3):
        response = channel.ask("GET", "/a", limit_s=LIMIT_S)
        assert (response.status, response.json()) == (200, {"path": "/below/a"})
    assert played.connections == 1


def test_one_that_was_closed_is_made_again(played: Played, channel: Channel) -> None:
    channel.ask("GET", "/a", limit_s=LIMIT_S)
    [kept] = channel._idle
    assert kept.connection.sock is not None
    kept.connection.sock.shutdown(socket.SHUT_RDWR)
    assert channel.ask("GET", "/a", limit_s=LIMIT_S).status == 200
    assert played.connections == 2


def test_what_might_be_done_twice_is_not_asked_again(played: Played, channel: Channel) -> None:
    asked: list[str] = []

    def drop(handler: BaseHTTPRequestHandler) -> None:
        asked.append(handler.path)
        handler.close_connection = True

    channel.ask("GET", "/a", limit_s=LIMIT_S)
    played.answer = drop
    with pytest.raises(Unreached) as raised:
        channel.ask("POST", "/a", b"x", limit_s=LIMIT_S)
    assert not raised.value.unheard
    assert asked == ["/below/a"]


def test_nobody_there() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        channel = Channel(lambda: f"http://127.0.0.1:{free.getsockname()[1]}")
        with pytest.raises(Unreached, match="Connection refused") as raised:
            channel.ask("GET", "/a", limit_s=LIMIT_S)
    assert raised.value.unheard


def test_nobody_answers(played: Played, channel: Channel) -> None:
    over = threading.Event()
    played.answer = lambda handler: (over.wait(LIMIT_S), None)[1]
    with pytest.raises(Unreached, match="timed out"):
        channel.ask("GET", "/a", limit_s=0.05)
    over.set()


def test_a_channel_that_is_closed(channel: Channel) -> None:
    channel.ask("GET", "/a", limit_s=LIMIT_S)
    channel.close()
    with pytest.raises(PenstockError, match="closed") as raised:
        channel.ask("GET", "/a", limit_s=LIMIT_S)
    assert raised.value.code == errors.CANCELLED


@pytest.mark.parametrize(
    ("status", "code"),
    [(400, errors.BAD_INPUT), (404, errors.NOT_FOUND), (410, errors.NOT_FOUND), (503, errors.OVERLOADED)],
)
def test_errors(played: Played, channel: Channel, status: int, code: str) -> None:
    played.answer = lambda handler: say(handler, status, {"error": "a sentence"}, Retry_After="7")
    error = channel.ask("GET", "/a", limit_s=LIMIT_S).error()
    assert (error.code, error.message, error.retry_after_s) == (code, "a sentence", 7.0)
    played.answer = lambda handler: say(handler, status, ["no sentence"])
    assert str(status) in channel.ask("GET", "/a", limit_s=LIMIT_S).error().message


# --- being told of ends ---


def test_all_are_asked_for_and_told(played: Played, channel: Channel) -> None:
    """Also those that come while a question is under way, and more than fit into one."""
    ended: set[str] = set()
    asked: queue.Queue[list[str]] = queue.Queue(1000)
    change = threading.Condition()

    def answer(handler: BaseHTTPRequestHandler) -> None:
        query = parse_qs(urlsplit(handler.path).query)
        asked.put(query["id"])
        with change:
            change.wait_for(lambda: ended.intersection(query["id"]), float(query["wait"][0]))
        say(handler, 200, {"jobs": [{"id": each} for each in query["id"] if each in ended]})

    def end(*ids: str) -> None:
        with change:
            ended.update(ids)
            change.notify_all()

    played.answer = answer
    told: queue.Queue[tuple[str, PenstockError | None]] = queue.Queue(1000)
    watch = Watch(channel)
    watch.add(["a"], lambda ident: lambda error: told.put((ident, error)))
    assert asked.get(timeout=LIMIT_S) == ["a"]
    watch.add(["b"], lambda ident: lambda error: told.put((ident, error)))
    assert asked.get(timeout=LIMIT_S) == ["a", "b"]
    end("b")
    assert told.get(timeout=LIMIT_S) == ("b", None)
    many = [str(number) for number in range(600)]
    watch.add(many, lambda ident: lambda error: told.put((ident, error)))
    end("599", "0")
    assert {told.get(timeout=LIMIT_S)[0] for _ in range(2)} == {"0", "599"}
    end("a", *many)
    assert {told.get(timeout=LIMIT_S)[0] for _ in range(599)} == {"a", *many} - {"0", "599"}
    watch.close(LIMIT_S)
    assert told.empty()


def test_a_question_that_is_refused_for_good_ends_it(played: Played, channel: Channel) -> None:
    played.answer = lambda handler: say(handler, 404, {"error": "no jobs here"})
    told: queue.Queue[PenstockError | None] = queue.Queue(10)
    watch = Watch(channel)
    watch.add(["a"], lambda ident: told.put)
    error = told.get(timeout=LIMIT_S)
    assert error is not None
    assert error.code == errors.NOT_FOUND
    watch.close(LIMIT_S)


def test_closing_tells_who_waits(played: Played, channel: Channel) -> None:
    began, over = threading.Event(), threading.Event()

    def answer(handler: BaseHTTPRequestHandler) -> None:
        began.set()
        over.wait(LIMIT_S)

    played.answer = answer
    told: queue.Queue[PenstockError | None] = queue.Queue(10)
    watch = Watch(channel)
    watch.add(["a"], lambda ident: told.put)
    assert began.wait(LIMIT_S)
    watch.close(LIMIT_S)
    error = told.get(timeout=LIMIT_S)
    assert error is not None
    assert error.code == errors.CANCELLED
    with pytest.raises(PenstockError, match="closed"):
        watch.add(["b"], lambda ident: told.put)
    over.set()
