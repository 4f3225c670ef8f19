"""One connection to a libzmq socket, or to a socket that does what none should."""

from __future__ import annotations

import os
import select
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import zmq

from penstock.wire import connection as module
from penstock.wire.connection import Broken, Connection
from penstock.wire.endpoints import EndpointError
from penstock.wire.errors import BadMessage
from penstock.wire.zmtp import subscription

DEADLINE_S = 20.0


class Driven:
    """A connection, its epoll, and what has come."""

    def __init__(self, endpoint: str, kind: str = "DEALER", identity: bytes = b"me", **options: Any) -> None:
        self.epoll = select.epoll()
        try:
            self.connection = Connection(self.epoll, endpoint, kind, identity, **options)
        except EndpointError:
            self.epoll.close()
            raise
        self.messages: list[list[bytes]] = []
        self.broken: list[str] = []

    def until(self, condition: Callable[[], object]) -> None:
        """Do as a loop does until the condition holds."""
        latest = time.monotonic() + DEADLINE_S
        while not condition():
            now = time.monotonic()
            assert now < latest, "it did not happen"
            if now >= self.connection.retry_at:
                self.connection.connect(now)
            for fileno, events in self.epoll.poll(min(0.01, max(0.0, self.connection.retry_at - now))):
                assert fileno == self.connection.fileno
                try:
                    came = self.connection.handle(events)
                except (Broken, BadMessage) as error:
                    self.broken.append(str(error))
                    continue
                assert isinstance(came, list)
                self.messages += [[bytes(frame) for frame in message] for message in came]

    def hear(self) -> list[bytes]:
        self.until(lambda: self.messages)
        return self.messages.pop(0)

    def close(self) -> None:
        self.connection.close(1.0)
        self.epoll.close()


@pytest.fixture
def drive() -> Iterator[Callable[..., Driven]]:
    """``drive(endpoint, kind, identity)``: a connection that is closed at the end."""
    made: list[Driven] = []

    def make(*arguments: Any, **options: Any) -> Driven:
        made.append(Driven(*arguments, **options))
        return made[-1]

    yield make
    for driven in made:
        driven.close()


@pytest.fixture
def router() -> Iterator[Any]:
    with zmq.Context() as context, context.socket(zmq.ROUTER) as router:
        router.setsockopt(zmq.LINGER, 0)
        router.setsockopt(zmq.ROUTER_HANDOVER, 1)
        router.setsockopt(zmq.RCVTIMEO, int(DEADLINE_S * 1000))
        yield router


def bind(router: Any, transport: str, directory: Path) -> str:
    address = {"ipc": f"ipc://{directory}/router", "tcp": "tcp://127.0.0.1:*", "tcp6": "tcp://[::1]:*"}[transport]
    router.setsockopt(zmq.IPV6, transport == "tcp6")
    router.bind(address)
    endpoint: bytes = router.getsockopt(zmq.LAST_ENDPOINT)
    return endpoint.rstrip(b"\0").decode()


@pytest.mark.parametrize("transport", ["ipc", "tcp", "tcp6"])
def test_messages_of_any_size_travel_both_ways(router: Any, drive: Any, tmp_path: Path, transport: str) -> None:
    driven = drive(bind(router, transport, tmp_path))
    driven.until(lambda: driven.connection.ready)
    large = os.urandom(5_000_000)
    for frames in ([b"small"], [b"head", large, b"", large[:100_000]], [large] * 3):
        assert driven.connection.send(frames)
        driven.until(lambda: router.poll(0))
        assert router.recv_multipart() == [b"me", *frames]
        router.send_multipart([b"me", *frames])
        assert driven.hear() == frames
    assert driven.broken == []


def test_a_name_is_looked_up(router: Any, drive: Any, tmp_path: Path) -> None:
    port = bind(router, "tcp", tmp_path).rpartition(":")[2]
    driven = drive(f"tcp://localhost:{port}")  # which may be ::1 first, where nobody listens
    driven.until(lambda: driven.connection.ready)


@pytest.mark.parametrize("endpoint", ["ipc:///nonexistent/socket", "tcp://127.0.0.1:1", "tcp://no..host:1"])
def test_where_nobody_listens_it_is_tried_again_ever_more_slowly(
    drive: Any, endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    connection = drive(endpoint).connection
    now, waits = 100.0, []
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: now))
    for _ in range(8):
        if connection.connect(now):  # TCP may say so later
            with pytest.raises(Broken, match="Connection refused"):
                connection.handle(select.EPOLLOUT | select.EPOLLERR | select.EPOLLHUP)
        assert not connection.send((b"unheard",))
        waits.append(round(connection.retry_at - now, 3))
        now = connection.retry_at
    assert waits == [0.02, 0.04, 0.08, 0.1, 0.1, 0.1, 0.1, 0.1]


@pytest.mark.parametrize(
    ("endpoint", "said"),
    [
        ("nonsense", "is neither ipc://PATH nor tcp://HOST:PORT"),
        ("ipc://", "is no path of a socket"),
        (f"ipc:///{'x' * 107}", "is no path of a socket, which has at most 107 bytes"),
        ("tcp://host", "is not of the form HOST:PORT"),
    ],
)
def test_endpoint_that_can_be_none_is_refused(drive: Any, endpoint: str, said: str) -> None:
    with pytest.raises(EndpointError, match=said):
        drive(endpoint)


def test_connection_that_breaks_is_made_again_and_says_its_first_words(drive: Any, tmp_path: Path) -> None:
    address = f"ipc://{tmp_path}/publisher"
    driven = None
    for _ in range(3):
        with zmq.Context() as context, context.socket(zmq.XPUB) as publisher:
            publisher.setsockopt(zmq.LINGER, 0)
            publisher.bind(address)
            driven = driven or drive(address, "SUB", b"", first=subscription(b"topic"))
            driven.until(lambda: publisher.poll(0))
            assert publisher.recv() == b"\1topic"
            publisher.send_multipart([b"topic", b"head"])
            assert driven.hear() == [b"topic", b"head"]
    assert driven is not None
    driven.until(lambda: len(driven.broken) == 3)
    assert set(driven.broken) <= {"the peer has closed it", "Connection reset by peer"}


class Deaf:
    """A listening socket whose end of a connection does what a test says."""

    def __init__(self, directory: Path) -> None:
        self.endpoint = f"ipc://{directory}/deaf"
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(f"{directory}/deaf")
        self._listener.listen()
        self.channel: socket.socket | None = None

    def accept(self, *says: bytes) -> None:
        self.channel, _ = self._listener.accept()
        self.channel.settimeout(DEADLINE_S)
        for words in says:
            self.channel.sendall(words)

    def close(self) -> None:
        self._listener.close()
        if self.channel is not None:
            self.channel.close()


GREETING = b"\xff" + bytes(8) + b"\x7f\x03\x01" + b"NULL".ljust(20, b"\0") + bytes(32)
READY = b"\x04\x1c\x05READY\x0bSocket-Type\0\0\0\x06ROUTER"


@pytest.fixture
def deaf(tmp_path: Path) -> Iterator[Deaf]:
    deaf = Deaf(tmp_path)
    yield deaf
    deaf.close()


def test_what_a_peer_does_not_read_waits_and_is_full_at_a_limit(
    drive: Any, deaf: Deaf, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "OUT_MAX_BYTES", 1 << 20)
    driven = drive(deaf.endpoint)
    driven.connection.connect(time.monotonic())
    deaf.accept(GREETING, READY)
    driven.until(lambda: driven.connection.ready)
    sent = 0
    while not driven.connection.full:
        assert driven.connection.send((bytes([sent % 251]) * 10_000,))
        sent += 1
    assert 100 <= sent < 300, "what the kernel takes, and the limit"
    heard = b""
    assert deaf.channel is not None
    while driven.connection.full:
        heard += deaf.channel.recv(100_000)
        driven.epoll.poll(0)
        driven.connection.handle(select.EPOLLOUT)
    driven.connection.send((b"end",))
    while not heard.endswith(b"\0\3end"):
        heard += deaf.channel.recv(100_000)
        driven.connection.handle(select.EPOLLOUT)
    opening = 64 + len(b"\x04\x26\x05READY\x0bSocket-Type\0\0\0\x06DEALER\x08Identity\0\0\0\x02me")
    assert len(heard) == opening + sent * 10_009 + 5
    assert [heard[opening + at * 10_009 + 9] for at in range(sent)] == [at % 251 for at in range(sent)]
    assert not [each for each in driven.epoll.poll(0) if each[1] & select.EPOLLOUT], "nothing waits any more"


def test_what_waits_at_the_end_is_still_written(drive: Any, deaf: Deaf) -> None:
    driven = drive(deaf.endpoint)
    driven.connection.connect(time.monotonic())
    deaf.accept(GREETING, READY)
    driven.until(lambda: driven.connection.ready)
    driven.connection.send((b"bye",))
    driven.connection.close(1.0)
    assert deaf.channel is not None
    assert deaf.channel.makefile("rb").read().endswith(b"\0\3bye")
    assert not driven.connection.send((b"unheard",))
    assert driven.connection.retry_at == float("inf")


@pytest.mark.parametrize("says", [[b"HTTP/1.1 400\r\n"], [GREETING, READY, b"\x08\0"]])
def test_peer_that_talks_nonsense_is_left_and_tried_again(drive: Any, deaf: Deaf, says: list[bytes]) -> None:
    driven = drive(deaf.endpoint)
    driven.connection.connect(time.monotonic())
    deaf.accept(*says)
    driven.until(lambda: driven.broken)
    assert driven.connection.fileno == -1
    assert driven.connection.retry_at < float("inf")
    driven.until(lambda: driven.connection.fileno >= 0)


def test_pings_are_answered(drive: Any, deaf: Deaf) -> None:
    driven = drive(deaf.endpoint)
    driven.connection.connect(time.monotonic())
    deaf.accept(GREETING, READY, b"\x04\x0a\x04PING\0\1abc")
    heard = bytearray()

    def heard_pong() -> bool:
        assert deaf.channel is not None
        if select.select([deaf.channel], [], [], 0)[0]:
            heard.extend(deaf.channel.recv(1000))
        return heard.endswith(b"\x04\x08\x04PONGabc")

    driven.until(heard_pong)


def test_who_pings_and_reads_nothing_fills_no_memory(drive: Any, deaf: Deaf, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "OUT_MAX_BYTES", 100_000)
    driven = drive(deaf.endpoint)
    driven.connection.connect(time.monotonic())
    deaf.accept(GREETING, READY)
    driven.until(lambda: driven.connection.ready)
    pings = b"\x04\x0a\x04PING\0\1abc" * 1000
    assert deaf.channel is not None
    for _ in range(50):
        deaf.channel.sendall(pings)
        driven.connection.handle(select.EPOLLIN)
    assert 90_000 < driven.connection.out_bytes < 200_000


def test_who_reads_slowly_at_the_end_has_the_time_that_there_is(
    drive: Any, deaf: Deaf, monkeypatch: pytest.MonkeyPatch
) -> None:
    driven = drive(deaf.endpoint)
    driven.connection.connect(time.monotonic())
    deaf.accept(GREETING, READY)
    driven.until(lambda: driven.connection.ready)
    driven.connection.send((bytes(50_000_000),))
    hours = count(step=3600)
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: next(hours)))
    assert deaf.channel is not None
    with ThreadPoolExecutor(1) as pool:
        heard = pool.submit(deaf.channel.makefile("rb").read)
        driven.connection.close(5.0)
        assert len(heard.result(DEADLINE_S)) < 50_000_000


def test_what_was_seen_of_another_descriptor_of_this_number_does_no_harm(drive: Any, deaf: Deaf) -> None:
    driven = drive(deaf.endpoint)
    driven.connection.connect(time.monotonic())
    assert driven.connection.handle(select.EPOLLIN) == []
    waiting = drive("tcp://127.0.0.1:1")
    waiting.connection._connecting = True
    if waiting.connection.connect(0.0):
        assert waiting.connection.handle(select.EPOLLIN) == []


def test_closed_connection_leaves_no_descriptor(deaf: Deaf) -> None:
    before = os.listdir("/proc/self/fd")
    for attempts in (0, 1, 2):
        driven = Driven(deaf.endpoint)
        for _ in range(attempts):
            driven.connection.connect(time.monotonic())
            deaf.accept(b"nonsense")
            driven.until(lambda: driven.broken)  # noqa: B023
            assert deaf.channel is not None
            deaf.channel.close()
        driven.close()
    assert os.listdir("/proc/self/fd") == before
