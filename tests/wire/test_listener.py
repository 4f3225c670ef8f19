"""The bound end of ZeroMQ connections: with libzmq's peers, with our own, and with some that talk nonsense."""

from __future__ import annotations

import contextlib
import os
import select
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import zmq

from penstock.wire import listener as module
from penstock.wire.connection import Connection
from penstock.wire.doors import Doors
from penstock.wire.listener import HANDSHAKE_MAX_S, SUBSCRIPTION_MAX_BYTES, Listener, Peer
from penstock.wire.messages import Payload
from penstock.wire.zmtp import FRAMES_MAX, Zmtp, pack

WAIT_S = 20.0
TOPIC = bytes(range(8))


class Driven:
    """A listener and the loop around it."""

    def __init__(self, kind: str, directory: Path, out_max_bytes: int = 1 << 20, frame_bytes_max: int = 1 << 30):
        self.epoll = select.epoll()
        self.ended: list[tuple[bytes, str, set[bytes]]] = []
        self.listener = Listener(self.epoll, kind, out_max_bytes, Doors(), self._on_end, frame_bytes_max)
        self.path = directory / "listener.sock"
        self.listener.bind_path(self.path)
        self.come: list[tuple[Peer, list[bytes]]] = []

    def _on_end(self, peer: Peer, wrong: str) -> None:
        self.ended.append((peer.id, wrong, peer.topics))

    def endpoint(self, transport: str = "ipc") -> str:
        if transport == "ipc":
            return f"ipc://{self.path}"
        host = "127.0.0.1" if transport == "tcp" else "::1"
        port = self.listener.bind_tcp(host, 0)
        return f"tcp://{host}:{port}" if transport == "tcp" else f"tcp://[{host}]:{port}"

    def look(self, wait_s: float = 0.0) -> None:
        for fileno, happened in self.epoll.poll(wait_s):
            self.listener.happened(fileno, happened)

    def turn(self, limit: int = 64, wait_s: float = 0.05) -> None:
        self.look(0.0 if self.listener.pending else wait_s)
        self.come += [(peer, list(map(bytes, frames))) for peer, frames in self.listener.receive(limit)]

    def until(self, condition: Callable[[], Any]) -> None:
        limit = time.monotonic() + WAIT_S
        while not condition():
            assert time.monotonic() < limit, "waited in vain"
            self.turn()

    def receive(self, count: int = 1) -> list[tuple[bytes, list[bytes]]]:
        """The next messages, and from whom."""
        self.until(lambda: len(self.come) >= count)
        taken, self.come = self.come[:count], self.come[count:]
        return [(peer.id, frames) for peer, frames in taken]

    def close(self) -> None:
        self.listener.close()
        self.epoll.close()


@pytest.fixture
def drive(tmp_path: Path) -> Iterator[Callable[..., Driven]]:
    made: list[Driven] = []

    def make(kind: str = "ROUTER", **limits: int) -> Driven:
        made.append(Driven(kind, tmp_path, **limits))
        return made[-1]

    yield make
    for each in made:
        each.close()


@pytest.fixture
def libzmq() -> Iterator[Callable[..., zmq.Socket[bytes]]]:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    sockets: list[zmq.Socket[bytes]] = []

    def make(kind: int, endpoint: str, identity: bytes = b"") -> zmq.Socket[bytes]:
        made = context.socket(kind)
        sockets.append(made)
        for limit in zmq.RCVTIMEO, zmq.SNDTIMEO:
            made.set(limit, int(WAIT_S * 1000))
        made.set(zmq.IPV6, 1)
        if identity:
            made.set(zmq.IDENTITY, identity)
        made.connect(endpoint)
        return made

    yield make
    for each in sockets:
        each.close(0)
    context.term()


def raw(driven: Driven) -> socket.socket:
    made = socket.socket(socket.AF_UNIX)
    made.settimeout(WAIT_S)
    made.connect(str(driven.path))
    return made


def says(identity: bytes = b"peer", kind: str = "DEALER") -> bytes:
    return Zmtp(kind, identity).opening


def travels(*frames: bytes) -> bytes:
    return b"".join(map(bytes, pack(frames)))


transports = pytest.mark.parametrize(
    "transport",
    ["ipc", "tcp", pytest.param("tcp6", marks=pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="no IPv6"))],
)


@transports
def test_messages_of_any_size_come_and_go(drive: Any, libzmq: Any, transport: str) -> None:
    driven = drive(out_max_bytes=1 << 30)
    dealer = libzmq(zmq.DEALER, driven.endpoint(transport), b"peer")
    sizes = (0, 1, 255, 256, 16_383, 16_384, 65_536, 1_000_000)
    sent = [[b"head"], [b"one", b"", b"three"], *[[b"x" * size, b"y" * size] for size in sizes], [b""] * FRAMES_MAX]
    for message in sent:
        dealer.send_multipart(message)
    assert driven.receive(len(sent)) == [(b"peer", message) for message in sent]
    for message in sent:
        assert driven.listener.send(b"peer", message) == "sent"
    heard: list[list[bytes]] = []
    while len(heard) < len(sent):
        driven.turn()
        while dealer.poll(0):
            heard.append(dealer.recv_multipart())
    assert heard == sent


def test_our_own_connection_is_understood(drive: Any) -> None:
    driven = drive()
    connection = Connection(driven.epoll, driven.endpoint(), "DEALER", b"peer")
    connection.connect(time.monotonic())
    heard: list[list[Payload]] = []
    try:
        for _ in range(200):
            for fileno, happened in driven.epoll.poll(WAIT_S):
                if fileno == connection.fileno:
                    heard += connection.handle(happened)
                else:
                    driven.listener.happened(fileno, happened)
            if connection.ready and not driven.come:
                connection.send((b"there",))
            for peer, frames in driven.listener.receive(10):
                driven.come.append((peer, frames))
                assert driven.listener.send(b"peer", (b"and back", *frames)) == "sent"
            if heard:
                break
        assert heard[0] == [b"and back", b"there"]
    finally:
        connection.close()


def test_who_is_not_there_is_gone(drive: Any, libzmq: Any) -> None:
    driven = drive()
    assert driven.listener.send(b"nobody", (b"head",)) == "gone"
    dealer = libzmq(zmq.DEALER, driven.endpoint(), b"peer")
    dealer.send(b"here")
    driven.receive()
    dealer.close(0)
    driven.until(lambda: driven.ended)
    assert driven.ended == [(b"peer", "", set())]
    assert driven.listener.send(b"peer", (b"head",)) == "gone"


def test_who_comes_with_a_name_has_it(drive: Any, libzmq: Any) -> None:
    driven = drive()
    for number in range(2):
        dealer = libzmq(zmq.DEALER, driven.endpoint(), b"peer")
        dealer.send(b"%d" % number)
        assert driven.receive() == [(b"peer", [b"%d" % number])]
        if not number:
            dealer.set(zmq.RECONNECT_IVL, -1)  # else it would take its name back
    assert driven.ended[:1] == [(b"peer", "", set())]
    assert driven.listener.send(b"peer", (b"head",)) == "sent"
    assert dealer.recv() == b"head"


def test_who_does_not_read_is_full_and_gets_what_was_taken_whole(drive: Any) -> None:
    driven = drive(out_max_bytes=1 << 20)
    with raw(driven) as peer:
        peer.sendall(says())
        driven.until(lambda: b"peer" in driven.listener.peers)
        outcomes: list[str] = []
        while "full" not in outcomes and len(outcomes) < 1000:
            outcomes.append(driven.listener.send(b"peer", (bytes([len(outcomes) % 251]) * 10_000, bytes(20_000))))
        assert set(outcomes) == {"sent", "full"}
        sent = len(outcomes) - 1
        expected = b"".join(travels(bytes([at % 251]) * 10_000, bytes(20_000)) for at in range(sent))
        heard = b""
        while len(heard) < 64 + len(expected):
            heard += peer.recv(1 << 20)
            driven.turn(wait_s=0)
        assert heard.endswith(expected)
        assert driven.listener.send(b"peer", (b"more",)) == "sent"


def test_one_message_of_each_in_turn(drive: Any) -> None:
    driven = drive()
    with raw(driven) as flood, raw(driven) as other:
        for peer, identity in (flood, b"flood"), (other, b"other"):
            peer.sendall(says(identity))
        peers = driven.listener.peers
        driven.until(lambda: len(peers) == 2)
        flood.sendall(travels(b"x") * 1000)
        other.sendall(travels(b"y") * 3)
        while not (peers[b"flood"].inbox and peers[b"other"].inbox):
            driven.look(WAIT_S)
        taken = [peer.id for peer, _ in driven.listener.receive(6)]
        assert taken[0::2] + taken[1::2] in ([b"flood"] * 3 + [b"other"] * 3, [b"other"] * 3 + [b"flood"] * 3)
        assert driven.receive(997) == [(b"flood", [b"x"])] * 997


def test_no_more_is_taken_out_than_asked_for_and_no_more_taken_in_before(drive: Any) -> None:
    driven = drive()
    with raw(driven) as peer:
        peer.sendall(says())
        driven.until(lambda: b"peer" in driven.listener.peers)
        peer.sendall(travels(b"1") + travels(b"2") + travels(b"3"))
        while not driven.listener.pending:
            driven.look(WAIT_S)
        assert [frames for _, frames in driven.listener.receive(2)] == [[b"1"], [b"2"]]
        peer.sendall(travels(b"4"))
        for _ in range(3):
            driven.look()
        assert driven.listener.pending
        assert [frames for _, frames in driven.listener.receive(10)] == [[b"3"]]
        assert not driven.listener.pending
        assert driven.receive() == [(b"peer", [b"4"])]


NONSENSE = {
    "no greeting": b"GET / HTTP/1.1\r\n\r\n",
    "ZMTP 2": b"\xff" + bytes(8) + b"\x7f\x01\x05",
    "another kind": says(kind="SUB"),
    "a frame too large": says() + travels(bytes(1001)),
    "a message of too many frames": says() + travels(*[b""] * (FRAMES_MAX + 1)),
    "a command too large": says() + b"\x06" + (5000).to_bytes(8, "big") + bytes(5000),
    "flags that are none": says() + b"\x80\x00",
}


@pytest.mark.parametrize("wrong", NONSENSE)
def test_who_talks_nonsense_is_left_and_nobody_else(drive: Any, libzmq: Any, wrong: str) -> None:
    driven = drive(frame_bytes_max=1000)
    good = libzmq(zmq.DEALER, driven.endpoint(), b"good")
    good.send(bytes(1000))
    driven.receive()
    with raw(driven) as bad:
        bad.sendall(NONSENSE[wrong])
        driven.until(lambda: driven.ended)
        [(_, sentence, _)] = driven.ended
        assert sentence
        while bad.recv(1 << 16):  # what it was greeted with, and its end
            pass
    good.send(b"still")
    assert driven.receive() == [(b"good", [b"still"])]


def test_what_somebody_said_before_it_ended_is_heard(drive: Any) -> None:
    driven = drive()
    with raw(driven) as peer:
        peer.sendall(says() + travels(b"last", bytes(100_000)) + travels(b"words") + b"\x01\x05half")
    assert driven.receive(2) == [(b"peer", [b"last", bytes(100_000)]), (b"peer", [b"words"])]
    driven.until(lambda: driven.ended)
    assert driven.ended == [(b"peer", "", set())]


def test_who_hears_nothing_more_may_still_have_said_something(drive: Any) -> None:
    driven = drive(out_max_bytes=1 << 30)
    with raw(driven) as peer:
        peer.sendall(says())
        driven.until(lambda: b"peer" in driven.listener.peers)
        assert driven.listener.send(b"peer", (bytes(5_000_000),)) == "sent"
        peer.sendall(travels(b"bye"))
    assert driven.receive() == [(b"peer", [b"bye"])]
    driven.until(lambda: driven.ended)


def test_somebody_is_read_though_epoll_has_not_told(drive: Any) -> None:
    driven = drive()
    with raw(driven) as peer:
        peer.sendall(says())
        driven.until(lambda: b"peer" in driven.listener.peers)
        assert not driven.listener.read(b"peer")
        peer.sendall(travels(b"word"))
        assert driven.listener.read(b"peer")
        assert not driven.listener.read(b"nobody")
    assert driven.receive() == [(b"peer", [b"word"])]


def test_who_says_nothing_is_left_after_a_time(drive: Any) -> None:
    driven = drive()
    with raw(driven) as silent, raw(driven) as known:
        known.sendall(says())
        driven.until(lambda: b"peer" in driven.listener.peers and not driven.epoll.poll(0))
        now = time.monotonic()
        driven.listener.look(now)
        assert driven.ended == []
        driven.listener.look(now + HANDSHAKE_MAX_S)
        assert driven.ended == [(b"", "", set())]
        while silent.recv(1 << 16):
            pass
        known.sendall(travels(b"still"))
        assert driven.receive() == [(b"peer", [b"still"])]


def test_too_many_who_say_nothing_leave_room_for_who_does(drive: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "GREETING_MAX", 3)
    driven = drive()
    silent = [raw(driven) for _ in range(5)]
    try:
        driven.until(lambda: len(driven.ended) == 2)
        with raw(driven) as known:
            known.sendall(says())
            driven.until(lambda: b"peer" in driven.listener.peers)
        assert [silent[at].recv(1 << 16) and silent[at].recv(1) for at in (0, 1)] == [b"", b""]
    finally:
        for each in silent:
            each.close()


def test_who_pings_is_answered_and_who_reads_nothing_fills_no_memory(drive: Any) -> None:
    driven = drive()
    with raw(driven) as peer:
        peer.sendall(says() + b"\x04\x0a\x04PING\0\1abc")
        heard = b""
        while not heard.endswith(b"\x04\x08\x04PONGabc"):
            driven.turn(wait_s=0)
            if select.select([peer], [], [], 0)[0]:
                heard += peer.recv(1000)
        peer.settimeout(0.0)
        pings = b"\x04\x0a\x04PING\0\1abc" * 1000
        for _ in range(500):
            with contextlib.suppress(BlockingIOError):
                peer.send(pings)
            driven.turn(wait_s=0)
        [served] = driven.listener.peers.values()
        assert 0 < served.out_bytes < 200_000


# --- an XPUB ---


@pytest.mark.parametrize("kind", [zmq.SUB, zmq.XSUB])
def test_a_topic_is_heard_once_that_is_accepted(drive: Any, libzmq: Any, kind: int) -> None:
    driven = drive("XPUB", frame_bytes_max=SUBSCRIPTION_MAX_BYTES)
    hearer = libzmq(kind, driven.endpoint())
    hearer.subscribe(TOPIC) if kind == zmq.SUB else hearer.send(b"\1" + TOPIC)
    driven.until(lambda: driven.come)
    [(peer, frames)] = driven.come
    assert frames == [b"\1" + TOPIC]
    driven.listener.publish(TOPIC, (b"unheard",))
    assert [driven.listener.subscribe(peer, TOPIC) for _ in range(2)] == [True, False]
    driven.listener.publish(TOPIC, (b"heard", bytes(100_000)))
    while not hearer.poll(0):
        driven.turn()
    assert hearer.recv_multipart() == [TOPIC, b"heard", bytes(100_000)]
    driven.come.clear()
    hearer.unsubscribe(TOPIC) if kind == zmq.SUB else hearer.send(b"\0" + TOPIC)
    driven.until(lambda: driven.come)
    assert driven.come == [(peer, [b"\0" + TOPIC])]
    assert [driven.listener.unsubscribe(peer, TOPIC) for _ in range(2)] == [True, False]
    assert (peer.topics, driven.listener.topics) == (set(), {})


def test_all_who_hear_a_topic_are_told_and_one_who_leaves_is_forgotten(drive: Any) -> None:
    driven = drive("XPUB")
    with raw(driven) as second:
        with raw(driven) as first:
            for each in first, second:
                each.sendall(says(kind="SUB") + travels(b"\1" + TOPIC))
            driven.until(lambda: len(driven.come) == 2)
            for peer, _ in driven.come:
                driven.listener.subscribe(peer, TOPIC)
            driven.listener.publish(TOPIC, (b"word",))
            for each in first, second:
                heard = b""
                while not heard.endswith(travels(TOPIC, b"word")):
                    heard += each.recv(1000)
        driven.until(lambda: driven.ended)
        assert driven.ended == [(b"peer", "", {TOPIC})]
        assert len(driven.listener.topics[TOPIC]) == 1
        [gone] = [peer for peer, _ in driven.come if peer.fileno < 0]
        assert not driven.listener.unsubscribe(gone, TOPIC), "what it heard has been told"
        assert not driven.listener.subscribe(gone, TOPIC)
    driven.until(lambda: len(driven.ended) == 2)
    assert driven.listener.topics == {}


def test_a_hearer_that_does_not_read_keeps_nobody_from_hearing(drive: Any) -> None:
    driven = drive("XPUB", out_max_bytes=100_000)
    with raw(driven) as deaf:
        deaf.sendall(says(kind="SUB") + travels(b"\1" + TOPIC))
        driven.until(lambda: driven.come)
        [(peer, _)] = driven.come
        driven.listener.subscribe(peer, TOPIC)
        for _ in range(1000):
            driven.listener.publish(TOPIC, (bytes(10_000),))
        assert peer.out_bytes < 120_000


# --- its end ---


def test_what_was_sent_last_is_written_in_the_time_to_linger(drive: Any, libzmq: Any) -> None:
    driven = drive(out_max_bytes=1 << 30)
    dealer = libzmq(zmq.DEALER, driven.endpoint(), b"peer")
    dealer.send(b"here")
    driven.receive()
    driven.listener.send(b"peer", (b"last", bytes(3_000_000)))
    driven.listener.close(WAIT_S)
    assert dealer.recv_multipart() == [b"last", bytes(3_000_000)]


def test_who_does_not_read_holds_up_nobody_at_the_end(drive: Any) -> None:
    driven = drive(out_max_bytes=1 << 30)
    with raw(driven) as deaf:
        deaf.sendall(says())
        driven.until(lambda: b"peer" in driven.listener.peers)
        driven.listener.send(b"peer", (bytes(5_000_000),))
        began = time.monotonic()
        driven.listener.close(0.1)
        assert time.monotonic() - began < WAIT_S / 2


def test_nothing_is_left_open(tmp_path: Path) -> None:
    before = set(os.listdir("/proc/self/fd"))
    driven = Driven("ROUTER", tmp_path)
    port = driven.listener.bind_tcp("127.0.0.1", 0)
    assert driven.listener.ports == [port]
    with raw(driven) as first, raw(driven) as second:
        first.sendall(says(b"first"))
        second.sendall(b"nonsense")
        driven.until(lambda: b"first" in driven.listener.peers and driven.ended)
        driven.listener.unbind_tcp(port)
        assert driven.listener.ports == []
        driven.close()
    assert set(os.listdir("/proc/self/fd")) == before


def test_nobody_is_let_in_while_it_is_paused(drive: Any) -> None:
    driven = drive()
    driven.listener.pause()
    driven.listener.pause()
    with raw(driven) as patient:
        patient.sendall(says())
        assert driven.epoll.poll(0) == []
        driven.listener.resume()
        driven.listener.resume()
        driven.until(lambda: b"peer" in driven.listener.peers)
