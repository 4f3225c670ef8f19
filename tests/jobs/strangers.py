"""Servers of others, in threads: what they are told is kept, and what they say is given."""

from __future__ import annotations

import contextlib
import queue
import socket
import ssl
import subprocess
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple

_WAIT_S = 30.0


class Call(NamedTuple):
    path: str
    headers: dict[str, str]  # by lower-case name
    body: bytes


class Stranger:
    """``says``: the status of each answer in turn, the last one again and again."""

    def __init__(self, tls: ssl.SSLContext | None = None) -> None:
        self.says = [200]
        self.location = ""
        self.calls: queue.Queue[Call] = queue.Queue(1000)
        stranger = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                headers = {name.lower(): value for name, value in self.headers.items()}
                status = stranger.says.pop(0) if len(stranger.says) > 1 else stranger.says[0]
                self.send_response(status)
                if stranger.location:
                    self.send_header("Location", stranger.location)
                self.send_header("Content-Length", "2")
                self.end_headers()
                self.wfile.write(b"ok")
                stranger.calls.put(Call(self.path, headers, body))

            do_GET = do_POST

            def log_message(self, *args: Any) -> None:
                """Not to the tests' output."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        if tls is not None:
            self._server.socket = tls.wrap_socket(self._server.socket, server_side=True)
            self._server.handle_error = lambda *_: None  # type: ignore[method-assign]
        self.port: int = self._server.server_address[1]
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))

    def next(self) -> Call:
        return self.calls.get(timeout=_WAIT_S)

    def __enter__(self) -> Stranger:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join(_WAIT_S)
        self._server.server_close()


@contextlib.contextmanager
def raw(answer: Callable[[socket.socket], None]) -> Iterator[int]:
    """A port at which every connection is given to this function, and closed afterwards."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                with connection, contextlib.suppress(OSError):
                    connection.settimeout(_WAIT_S)
                    answer(connection)

        thread = threading.Thread(target=serve)
        thread.start()
        yield listener.getsockname()[1]
        listener.shutdown(socket.SHUT_RDWR)
    thread.join(_WAIT_S)


def certificate(openssl: str, directory: Path, name: str) -> tuple[Path, Path]:
    """Of this host name, signed by itself, and its key."""
    paths = directory / f"{name}.pem", directory / f"{name}.key"
    command = [openssl, "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    command += ["-days", "2", "-subj", f"/CN={name}", "-addext", f"subjectAltName=DNS:{name}"]
    command += ["-out", str(paths[0]), "-keyout", str(paths[1])]
    subprocess.run(command, check=True, capture_output=True, timeout=60)
    return paths
