"""A gateway's connections on a real loop and real sockets, in the test's own thread: the loop runs while a test waits
for something, and only then."""

from __future__ import annotations

import asyncio
import socket
import ssl
import struct
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, NamedTuple, TypeVar

import uvloop

from penstock.gateway.connection import Application, Exchange, Http
from penstock.gateway.options import GatewayOptions
from penstock.wire.slots import Slots

DEADLINE_S = 20.0
_SPIN_S = 0.01
_TICK_S = 0.001
T = TypeVar("T")


class Loop:
    """An event loop that a test drives. What goes wrong in a callback fails the test."""

    def __init__(self) -> None:
        self.loop = uvloop.new_event_loop()
        self.errors: list[dict[str, Any]] = []
        self.loop.set_exception_handler(lambda loop, context: self.errors.append(context))

    def run(self, awaitable: Awaitable[T]) -> T:
        async def limited() -> T:
            return await asyncio.wait_for(awaitable, DEADLINE_S)

        return self.loop.run_until_complete(limited())

    def until(self, condition: Callable[[], object]) -> None:
        """Let things happen until the condition holds."""
        begun = time.monotonic()
        while not condition():
            passed = time.monotonic() - begun
            assert passed < DEADLINE_S, "it did not happen"
            # What takes longer is done by a thread or a process, which needs the processor.
            self.loop.run_until_complete(asyncio.sleep(0 if passed < _SPIN_S else _TICK_S))

    def settle(self) -> None:
        """Handle everything that has arrived at any socket by now."""
        last, after = socket.socketpair()
        with last, after:
            last.setblocking(False)
            after.send(b".")
            self.run(self.loop.sock_recv(last, 1))

    def close(self) -> None:
        self.loop.run_until_complete(self.loop.shutdown_default_executor())
        self.loop.close()
        assert self.errors == []


class Chunks:
    """The parts of an answer that goes on, as they come."""

    def __init__(self, peer: Peer) -> None:
        self._peer = peer

    def head(self) -> dict[str, str]:
        """Its headers, by lower-case name; it has begun with 200."""
        first, *lines = self._peer._hear_to(b"\r\n\r\n").decode().split("\r\n")
        assert first == "HTTP/1.1 200 OK"
        return {name.lower(): value for name, value in (line.split(": ", 1) for line in lines)}

    def next(self) -> bytes:
        """One part; empty when it has ended."""
        count = int(self._peer._hear_to(b"\r\n"), 16)
        data = self._peer.raw(count)
        assert self._peer.raw(2) == b"\r\n"
        return data


class Response(NamedTuple):
    status: int
    headers: dict[str, str]
    body: bytes


class Peer:
    """A client: what it says is bytes, and so is what it hears, unless it asks for a ``response``."""

    def __init__(self, loop: Loop, channel: socket.socket) -> None:
        self._loop = loop
        self._channel = channel
        self._heard = b""

    def send(self, *parts: bytes) -> None:
        for part in parts:
            self._loop.run(self._loop.loop.sock_sendall(self._channel, part))

    def _read(self) -> bytes:
        data: bytes = self._loop.run(self._loop.loop.sock_recv(self._channel, 1 << 20))
        self._heard += data
        return data

    def _hear_to(self, end: bytes) -> bytes:
        while end not in self._heard:
            assert self._read(), f"the connection ended after {self._heard!r}"
        before, _, self._heard = self._heard.partition(end)
        return before

    def response(self, body: bool = True) -> Response:
        """The next response. ``body``: false for the answer to HEAD."""
        first, *lines = self._hear_to(b"\r\n\r\n").decode().split("\r\n")
        headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in lines)}
        length = int(headers.get("content-length", "0")) if body else 0
        while len(self._heard) < length:
            assert self._read(), f"the connection ended after {len(self._heard)} bytes of a body of {length}"
        content, self._heard = self._heard[:length], self._heard[length:]
        return Response(int(first.split()[1]), headers, content)

    def raw(self, count: int) -> bytes:
        """The next so many bytes."""
        while len(self._heard) < count:
            assert self._read(), f"the connection ended after {self._heard!r}"
        data, self._heard = self._heard[:count], self._heard[count:]
        return data

    def rest(self) -> bytes:
        """Everything up to the end of the connection."""
        try:
            while self._read():
                pass
        except ConnectionResetError:
            self._heard += b"(reset)"
        data, self._heard = self._heard, b""
        return data

    def end(self) -> None:
        """Say nothing more, and listen on."""
        self._channel.shutdown(socket.SHUT_WR)

    def leave(self) -> None:
        self._channel.close()

    def reset(self) -> None:
        self._channel.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._channel.close()


class Echo:
    """An application that tells each request back, at once, or when the test says so while ``held`` is a list."""

    def __init__(self) -> None:
        self.exchanges: list[Exchange] = []
        self.refusals: list[tuple[int, str]] = []
        self.gone: list[bytes] = []
        self.hold = False

    def handle(self, exchange: Exchange) -> None:
        self.exchanges.append(exchange)
        url = exchange.head.url
        exchange.gone = lambda: self.gone.append(url)
        if not self.hold:
            self.tell(exchange)

    def tell(self, exchange: Exchange) -> None:
        """Answer with what was asked; ``/large/N`` with N bytes behind the head."""
        head, body = exchange.head, exchange.body
        if head.url.startswith(b"/large/"):
            count = int(head.url.rpartition(b"/")[2])
            exchange.send(200, b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % count, pattern(count))
        else:
            exchange.answer(200, b"%b %b %b" % (head.method, head.url, bytes(body)), b"text/plain")

    def sent(self) -> None: ...

    def refused(self, status: int, sentence: str, headers: Mapping[str, bytes]) -> bytes:
        self.refusals.append((status, sentence))
        return b"X-Request-Id: %b\r\n" % headers["x-request-id"] if "x-request-id" in headers else b""


def pattern(count: int) -> bytes:
    return (bytes(range(251)) * (count // 251 + 1))[:count]


class Serving:
    """Connections of an application behind a listening socket, and their clients."""

    def __init__(
        self,
        loop: Loop,
        application: Application,
        options: GatewayOptions,
        tls: ssl.SSLContext | None = None,
        slots: Slots | None = None,
    ) -> None:
        self.loop = loop
        self.http = Http(loop.loop, options, application, lambda: slots)
        listener = socket.create_server(("127.0.0.1", 0))
        self.address: tuple[str, int] = listener.getsockname()
        self._server = loop.run(loop.loop.create_server(self.http.connection, sock=listener, ssl=tls))
        self._channels: list[socket.socket] = []

    def connect(self, receive_bytes: int = 0, wait: bool = True) -> Peer:
        """A new client. ``receive_bytes``: how much its kernel takes for it, 0 for the usual. ``wait``: until its
        connection has begun."""
        before = len(self.http.connections)
        channel = socket.socket()
        if receive_bytes:
            channel.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
        channel.setblocking(False)
        self._channels.append(channel)
        self.loop.run(self.loop.loop.sock_connect(channel, self.address))
        if wait:
            self.loop.until(lambda: len(self.http.connections) > before)
        return Peer(self.loop, channel)

    def watch(self) -> None:
        """End what is late, often."""
        self.http.watch(0.02)

    def still(self) -> None:
        """End nothing any more, however late."""
        assert self.http._watching is not None
        self.http._watching.cancel()

    def ended(self) -> None:
        """Wait until there is no connection any more."""
        self.loop.until(lambda: not self.http.connections)

    def close(self) -> None:
        self._server.close()
        self.http.stop()
        for channel in self._channels:
            channel.close()
        self.ended()
        assert self.http.budget.used == 0, "the budget has not been given back"
