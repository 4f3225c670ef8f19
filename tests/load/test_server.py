"""What is asked of a server before it is loaded, of any that speaks v2 and of what does not."""

from __future__ import annotations

import socket

import numpy as np
import pytest

from penstock.load.inputs import InputsError
from penstock.load.server import HttpServer, Place, ServerError, parse_url, say
from penstock.wire.models import TensorSpec
from tests.load.servers import deaf_server, plain_server

X = TensorSpec("x", "FP32", (-1, 2))


@pytest.mark.parametrize(
    ("url", "place"),
    [
        ("http://h:8000", Place("h", 8000, "h:8000", "")),
        ("h:8000", Place("h", 8000, "h:8000", "")),
        ("http://h", Place("h", 80, "h", "")),
        ("http://[::1]:1/a b/", Place("::1", 1, "[::1]:1", "/a%20b")),
    ],
)
def test_urls_are_read(url: str, place: Place) -> None:
    assert parse_url(url) == place


@pytest.mark.parametrize("url", ["https://h", "grpc://h:1", "http://", "http://h/?q", "http://u@h/", "http://h:99999"])
def test_urls_that_cannot_be_loaded_are_refused(url: str) -> None:
    with pytest.raises(ValueError, match=r"is n|out of range"):
        parse_url(url)


def test_inputs_and_extensions_are_what_the_server_says() -> None:
    with plain_server(extensions=("binary_tensor_data",)) as server:
        asked = HttpServer(server.url, 5)
        assert asked.speaks_binary()
        assert asked.inputs_of("m", "") == [X]
        assert asked.address == "127.0.0.1"
        with pytest.raises(ServerError, match="answers 404 when asked for model 'other': nothing here"):
            asked.inputs_of("other", "")
    with plain_server() as server:
        assert not HttpServer(server.url, 5).speaks_binary()


def test_a_request_is_tried_once_and_then_kept_as_it_was() -> None:
    inputs = {"x": np.ones((1, 2), "f4")}
    with plain_server() as server:
        target = HttpServer(server.url, 5).prepare("m", "", inputs, [X], True)
        [(headers, body)] = server.requests
    assert target.request.endswith(b"\r\n\r\n" + body)
    assert body[int(headers["inference-header-content-length"]) :] == inputs["x"].tobytes()
    assert (target.host, target.port) == ("127.0.0.1", server.server_address[1])


def test_a_request_that_is_refused_is_a_sentence() -> None:
    with (
        plain_server(lambda number: (400, b'{"error": "no such shape"}')) as server,
        pytest.raises(ServerError, match="the server answers 400 to the request: no such shape"),
    ):
        HttpServer(server.url, 5).prepare("m", "", {"x": np.ones((1, 2), "f4")}, [X], False)


def test_who_is_no_server_is_a_sentence() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with pytest.raises(ServerError, match=rf"no server answers at http://127.0.0.1:{port}: Connection refused"):
        HttpServer(f"127.0.0.1:{port}", 5).speaks_binary()
    with deaf_server() as port, pytest.raises(ServerError, match=r"no answer from .* within 0.2 s"):
        HttpServer(f"127.0.0.1:{port}", 0.2).speaks_binary()
    with deaf_server((b"220 smtp\r\n",)) as port, pytest.raises(ServerError, match="speaks no HTTP"):
        HttpServer(f"127.0.0.1:{port}", 5).speaks_binary()
    page = b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\n<html>"
    with deaf_server((page,)) as port, pytest.raises(InputsError, match="no model metadata of the v2 protocol"):
        HttpServer(f"127.0.0.1:{port}", 5).inputs_of("m", "")
    with deaf_server((page,)) as port:
        assert not HttpServer(f"127.0.0.1:{port}", 5).speaks_binary()


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b'{"error": "e"}', "e"),
        (b"[]", "[]"),
        (b"", "nothing more"),
        (b"\xff", "�"),
        (b'{"detail": 1}', '{"detail": 1}'),
    ],
)
def test_errors_are_said_in_the_servers_words(body: bytes, said: str) -> None:
    assert say(body) == said
