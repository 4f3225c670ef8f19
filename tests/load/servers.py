"""Servers that are no Penstock: they speak as much of HTTP as a test needs, and answer as the test says."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

METADATA = {"name": "m", "inputs": [{"name": "x", "datatype": "FP32", "shape": [-1, 2]}]}


class PlainServer(ThreadingHTTPServer):
    """A v2 server for the model "m". ``infer``: (status, body) of the request with this number, from 0 on."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, infer: Callable[[int], tuple[int, bytes]], extensions: list[str], metrics: str) -> None:
        self.infer = infer
        self.extensions = extensions
        self.metrics = metrics
        self.requests: list[tuple[dict[str, str], bytes]] = []
        self._lock = threading.Lock()
        super().__init__(("127.0.0.1", 0), _Handler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def note(self, headers: dict[str, str], body: bytes) -> int:
        """The number of a request."""
        with self._lock:
            self.requests.append((headers, body))
            return len(self.requests) - 1

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that leave are none."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: PlainServer

    def do_GET(self) -> None:
        known: dict[str, Any] = {
            "/v2": {"name": "plain", "version": "1", "extensions": self.server.extensions},
            "/v2/models/m": METADATA,
        }
        if self.path == "/metrics" and self.server.metrics:
            self._answer(200, self.server.metrics.encode())
        elif self.path in known:
            self._answer(200, json.dumps(known[self.path]).encode())
        else:
            self._answer(404, b'{"error": "nothing here"}')

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        number = self.server.note({name.lower(): value for name, value in self.headers.items()}, body)
        self._answer(*self.server.infer(number))

    def _answer(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments: Any) -> None:
        """Nothing."""


@contextmanager
def plain_server(
    infer: Callable[[int], tuple[int, bytes]] = lambda number: (200, b"{}"),
    extensions: tuple[str, ...] = (),
    metrics: str = "",
) -> Iterator[PlainServer]:
    with PlainServer(infer, list(extensions), metrics) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, name="plain server")
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


@contextmanager
def deaf_server(answers: tuple[bytes, ...] = ()) -> Iterator[int]:
    """A port on which connections are accepted, and each gets these bytes, one after another, whatever it asks, and is
    closed after the last; without any it is never answered."""
    with socket.create_server(("127.0.0.1", 0), backlog=512) as listener:
        kept: list[socket.socket] = []

        def serve() -> None:
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                kept.append(connection)
                try:
                    for answer in answers:
                        if connection.recv(65536):
                            connection.sendall(answer)
                    if answers:
                        connection.shutdown(socket.SHUT_WR)
                except OSError:
                    continue

        thread = threading.Thread(target=serve, name="deaf server")
        thread.start()
        try:
            yield listener.getsockname()[1]
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join()
            for connection in kept:
                connection.close()
