"""ZMTP without a socket: what is parsed, whatever the chunks; and conversations with libzmq."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import zmq
from hypothesis import given
from hypothesis import strategies as st

from penstock.wire import zmtp
from penstock.wire.errors import BadMessage
from penstock.wire.zmtp import COMMAND_MAX_BYTES, FRAME_MAX_BYTES, FRAMES_MAX, Zmtp, pack, subscription

GREETING = b"\xff" + bytes(8) + b"\x7f\x03\x01" + b"NULL".ljust(20, b"\0") + bytes(32)


def command(name: bytes, rest: bytes = b"") -> bytes:
    body = bytes((len(name),)) + name + rest
    return bytes((4, len(body))) + body


def ready(kind: bytes = b"ROUTER", name: bytes = b"Socket-Type") -> bytes:
    return command(b"READY", bytes((len(name),)) + name + len(kind).to_bytes(4, "big") + kind)


HELLO = GREETING + ready()


def feed(peer: Zmtp, data: bytes, sizes: Sequence[int] = ()) -> list[list[bytes]]:
    """Give it the bytes in chunks of these sizes, then the rest in one go or as it has room. What came out."""
    messages, at, chunks = [], 0, iter(sizes)
    while at < len(data):
        room = peer.room()
        size = min(next(chunks, len(data)), len(room), len(data) - at)
        room[:size] = data[at : at + size]
        messages += peer.received(size)
        at += size
    return [[bytes(frame) for frame in message] for message in messages]


def refused(data: bytes) -> str:
    with pytest.raises(BadMessage) as error:
        feed(Zmtp("DEALER"), data)
    return str(error.value)


def joined(frames: Sequence[bytes]) -> bytes:
    return b"".join(map(bytes, pack(frames)))


# --- what is parsed ---

# Around the borders of a short frame's length, the buffer, and what is sent by reference.
sizes = st.sampled_from([0, 1, 255, 256, 257, 16_383, 16_384, 65_525, 65_526, 65_527, 65_528, 65_536, 200_000])
frames = st.builds(lambda size, fill: bytes([fill]) * size, sizes, st.integers(0, 255))
messages = st.lists(st.lists(frames, min_size=1, max_size=4), max_size=6)


@given(messages, st.lists(st.integers(1, 70_000), max_size=40), st.sampled_from([8192, 16_384, 65_536]))
def test_any_chunks_give_the_same_messages(sent: list[list[bytes]], chunks: list[int], buffer_bytes: int) -> None:
    peer = Zmtp("DEALER", buffer_bytes=buffer_bytes)
    data = HELLO + b"".join(map(joined, sent))
    assert feed(peer, data, chunks) == sent
    assert peer.ready
    assert not peer.replies


def test_every_byte_alone() -> None:
    sent = [[b"topic", b"x" * 300], [b""], [b"a", b"", b"b"]]
    data = HELLO + joined(sent[0]) + joined(sent[1]) + command(b"PING", b"\0\1context") + joined(sent[2])
    peer = Zmtp("DEALER")
    assert feed(peer, data, [1] * len(data)) == sent
    assert peer.replies == command(b"PONG", b"context")


@given(st.binary(max_size=200), st.booleans(), st.lists(st.integers(1, 50), max_size=20))
def test_garbage_is_bad_or_waited_on(garbage: bytes, greeted: bool, chunks: list[int]) -> None:
    peer = Zmtp("DEALER")
    try:
        feed(peer, HELLO * greeted + garbage, chunks)
    except BadMessage:
        return
    assert len(peer.room()) > 0
    assert peer.ready or not greeted


@given(messages, st.integers(0, 2000), st.integers(0, 255), st.lists(st.integers(1, 70_000), max_size=10))
def test_a_byte_that_is_wrong_harms_nothing_else(
    sent: list[list[bytes]], at: int, byte: int, chunks: list[int]
) -> None:
    data = bytearray(HELLO + b"".join(map(joined, sent)))
    data[at % len(data)] = byte
    try:
        feed(Zmtp("DEALER"), bytes(data), chunks)
    except BadMessage:
        return


def test_frames_that_are_large_lie_in_memory_of_their_own() -> None:
    peer = Zmtp("DEALER")
    feed(peer, HELLO + b"\x02" + (1 << 20).to_bytes(8, "big") + b"begin")
    room = peer.room()
    assert len(room) == (1 << 20) - 5, "the kernel copies into the frame itself"
    room[:] = bytes(len(room))
    [[frame]] = peer.received(len(room))
    assert bytes(frame[:6]) == b"begin\0"
    assert len(frame) == 1 << 20
    assert len(peer.room()) == 65_536


def test_message_in_pieces() -> None:
    large = bytes(100_000)
    assert pack((b"a", b"b")) == [b"\1\1a\0\1b"]
    assert pack((b"",)) == [b"\0\0"]
    pieces = pack((b"a", large, b"b"))
    assert pieces == [b"\1\1a\3" + (100_000).to_bytes(8, "big"), large, b"\0\1b"]
    assert pieces[1] is large
    assert subscription(b"topic") == [b"\0\6\1topic"]


def test_names_of_properties_are_the_same_in_any_letters() -> None:
    peer = Zmtp("DEALER")
    feed(peer, GREETING + ready(name=b"SOCKET-type"))
    assert peer.ready


def test_commands_that_mean_nothing_here_are_passed_over() -> None:
    peer = Zmtp("DEALER")
    assert feed(peer, HELLO + command(b"PONG", b"x") + command(b"SUBSCRIBE", b"x") + b"\0\1a") == [[b"a"]]
    assert not peer.replies


@pytest.mark.parametrize(
    ("ours", "theirs"), [("ROUTER", b"DEALER"), ("XPUB", b"SUB"), ("XPUB", b"XSUB"), ("SUB", b"PUB"), ("SUB", b"XPUB")]
)
def test_each_kind_talks_to_its_own(ours: str, theirs: bytes) -> None:
    peer = Zmtp(ours)
    assert feed(peer, GREETING + ready(theirs) + b"\0\1a") == [[b"a"]]
    assert peer.ready


@pytest.mark.parametrize("ours", ["ROUTER", "XPUB"])
@pytest.mark.parametrize("theirs", [b"REQ", b"ROUTER", b"PUB", b"PAIR", b""])
def test_no_kind_talks_to_another(ours: str, theirs: bytes) -> None:
    with pytest.raises(BadMessage, match=f"and {ours} talks to another"):
        feed(Zmtp(ours), GREETING + ready(theirs))


def test_a_peer_says_who_it_is() -> None:
    peer = Zmtp("ROUTER")
    feed(peer, Zmtp("DEALER", b"somebody").opening)
    assert peer.peer == b"somebody"


def test_a_subscription_may_be_a_command_between_the_frames_of_a_message() -> None:
    peer = Zmtp("XPUB")
    hello = GREETING + ready(b"SUB")
    said = b"\1\1a" + command(b"SUBSCRIBE", b"topic") + command(b"CANCEL") + command(b"OTHER", b"x") + b"\0\1b"
    assert feed(peer, hello + said, [1] * 500) == [[b"\1topic"], [b"\0"], [b"a", b"b"]]


# --- what is refused ---


def test_a_frame_has_its_limit_and_so_has_a_subscription() -> None:
    for limit in (10, 300):
        assert feed(Zmtp("ROUTER", frame_bytes_max=limit), GREETING + ready(b"DEALER") + joined([bytes(limit)]))
        with pytest.raises(BadMessage, match=f"a frame has at most {limit} bytes"):
            feed(Zmtp("ROUTER", frame_bytes_max=limit), GREETING + ready(b"DEALER") + joined([bytes(limit + 1)]))
    hello = GREETING + ready(b"SUB")
    assert feed(Zmtp("XPUB", frame_bytes_max=10), hello + command(b"SUBSCRIBE", bytes(9))) == [[b"\1" + bytes(9)]]
    with pytest.raises(BadMessage, match="a subscription of 10 bytes; 9 are allowed"):
        feed(Zmtp("XPUB", frame_bytes_max=10), hello + command(b"SUBSCRIBE", bytes(10)))


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"HTTP/1.1 400", "the peer does not speak ZeroMQ's protocol"),
        (b"\xff" + bytes(9), "the peer does not speak ZeroMQ's protocol"),
        (GREETING[:10] + b"\x01", "the peer speaks ZMTP 1, and this process ZMTP 3"),
        (GREETING.replace(b"NULL\0", b"CURVE"), "the peer wants the mechanism b'CURVE"),
        (GREETING + b"\0\1a", "a message before READY"),
        (GREETING + command(b"PING", b"\0\1"), "the command b'PING' before READY"),
        (HELLO + ready(), "a second READY"),
        (GREETING + ready(b"PUB"), "the peer's socket is of the kind 'PUB', and DEALER talks to another"),
        (GREETING + command(b"READY"), "the peer's socket is of the kind '', and DEALER talks to another"),
        (GREETING + ready()[:1] + b"\x0a\x05READY\x09Soc", "READY ends inside a property"),
        (GREETING + command(b"ERROR", b"\x02no"), "the peer refuses the connection: b'no'"),
        (HELLO + b"\x08\0", "a frame with the flags 0x8"),
        (HELLO + b"\x05\0", "a frame with the flags 0x5"),
        (HELLO + b"\x04\0", "a command without a name"),
        (HELLO + b"\x04\x02\x05a", "a command without a name"),
        (HELLO + b"\x06" + (COMMAND_MAX_BYTES + 1).to_bytes(8, "big"), "a command of 4097 bytes; 4096 are allowed"),
        (HELLO + b"\x02" + (FRAME_MAX_BYTES + 1).to_bytes(8, "big"), "a frame of 2147483649 bytes behind 0"),
        (HELLO + b"\x02" + b"\xff" * 8, "a frame of 18446744073709551615 bytes"),
        (HELLO + b"\1\0" * (FRAMES_MAX + 1), f"a message of more than {FRAMES_MAX} frames"),
    ],
)  # fmt: skip
def test_what_is_not_zmtp_says_why(data: bytes, said: str) -> None:
    assert refused(data).startswith(said)


def test_bytes_of_a_message_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zmtp, "MESSAGE_MAX_BYTES", 1000)
    assert refused(HELLO + (b"\x01\xc8" + bytes(200)) * 6).startswith("a frame of 200 bytes behind 1000;")


def test_as_many_frames_as_a_message_may_have() -> None:
    [message] = feed(Zmtp("DEALER"), HELLO + b"\1\0" * (FRAMES_MAX - 1) + b"\0\0")
    assert len(message) == FRAMES_MAX


# --- conversations with libzmq ---


class Spoken:
    """A Zmtp over a blocking socket."""

    def __init__(self, address: str, kind: str, identity: bytes = b"") -> None:
        if address.startswith("ipc://"):
            self.socket = socket.socket(socket.AF_UNIX)
            self.socket.settimeout(20)
            self.socket.connect(address.removeprefix("ipc://"))
        else:
            host, port = address.removeprefix("tcp://").split(":")
            self.socket = socket.create_connection((host, int(port)), 20)
        self.zmtp = Zmtp(kind, identity)
        self.messages: list[list[bytes]] = []
        self.socket.sendall(self.zmtp.opening)
        while not self.zmtp.ready:
            self.receive()

    def receive(self) -> None:
        size = self.socket.recv_into(self.zmtp.room())
        assert size, "the peer has closed the connection"
        self.messages += [[bytes(frame) for frame in message] for message in self.zmtp.received(size)]
        if self.zmtp.replies:
            self.socket.sendall(self.zmtp.replies)
            self.zmtp.replies = b""

    def send(self, *frames: bytes) -> None:
        for piece in pack(frames):
            self.socket.sendall(piece)

    def hear(self) -> list[bytes]:
        while not self.messages:
            self.receive()
        return self.messages.pop(0)


@pytest.fixture
def context() -> Iterator[zmq.Context[Any]]:
    with zmq.Context() as context:
        yield context


@pytest.fixture
def bound(context: zmq.Context[Any], tmp_path: Path) -> Iterator[Callable[..., tuple[Any, str]]]:
    """``bound(kind, transport, **options)``: a libzmq socket and its address."""
    sockets: list[Any] = []

    def make(kind: int, transport: str, **options: Any) -> tuple[Any, str]:
        made = context.socket(kind)
        sockets.append(made)
        made.setsockopt(zmq.RCVTIMEO, 20_000)
        made.setsockopt(zmq.SNDTIMEO, 20_000)
        for name, value in options.items():
            made.setsockopt(getattr(zmq, name), value)
        made.bind("tcp://127.0.0.1:*" if transport == "tcp" else f"ipc://{tmp_path}/socket")
        return made, made.getsockopt(zmq.LAST_ENDPOINT).rstrip(b"\0").decode()

    yield make
    for each in sockets:
        each.close(0)


@pytest.fixture
def speak() -> Iterator[Callable[..., Spoken]]:
    spoken: list[Spoken] = []

    def make(*arguments: Any) -> Spoken:
        spoken.append(Spoken(*arguments))
        return spoken[-1]

    yield make
    for each in spoken:
        each.socket.close()


@pytest.mark.parametrize("transport", ["ipc", "tcp"])
def test_router_hears_and_answers(bound: Any, speak: Any, transport: str) -> None:
    router, address = bound(zmq.ROUTER, transport)
    dealer = speak(address, "DEALER", b"\1\0identity")
    for frames in ([b""], [b"one"], [b"a" * 255], [b"a" * 256, b"", bytes(1 << 20), b"end"]):
        dealer.send(*frames)
        assert router.recv_multipart() == [b"\1\0identity", *frames]
        router.send_multipart([b"\1\0identity", *frames])
        assert dealer.hear() == frames


@pytest.mark.parametrize("transport", ["ipc", "tcp"])
def test_publisher_takes_the_subscription(bound: Any, speak: Any, transport: str) -> None:
    """As workers have it: in manual mode, where each subscription is told, also one that comes again."""
    publisher, address = bound(zmq.XPUB, transport, XPUB_MANUAL=1, XPUB_VERBOSE=1)
    for _ in range(2):
        subscriber = speak(address, "SUB")
        subscriber.socket.sendall(subscription(b"topic")[0])
        assert publisher.recv() == b"\1topic"
        publisher.setsockopt(zmq.SUBSCRIBE, b"topic")
        publisher.send_multipart([b"other", b"no"])
        publisher.send_multipart([b"topic", b"head", bytes(2 << 20)])
        assert subscriber.hear() == [b"topic", b"head", bytes(2 << 20)]
        subscriber.socket.close()
        assert publisher.recv() == b"\0topic"


def test_who_connects_again_takes_over(bound: Any, speak: Any) -> None:
    router, address = bound(zmq.ROUTER, "tcp", ROUTER_HANDOVER=1)
    dealers = [speak(address, "DEALER", b"identity") for _ in range(2)]
    dealers[1].send(b"here")
    assert router.recv_multipart() == [b"identity", b"here"]
    router.send_multipart([b"identity", b"there"])
    assert dealers[1].hear() == [b"there"]


def test_pings_are_answered(bound: Any, speak: Any) -> None:
    """libzmq closes a connection on which none comes back."""
    router, address = bound(zmq.ROUTER, "tcp", HEARTBEAT_IVL=10, HEARTBEAT_TIMEOUT=5000)
    dealer = speak(address, "DEALER", b"identity")
    dealer.send(b"here")
    assert router.recv_multipart() == [b"identity", b"here"]
    while not dealer.zmtp.replies:
        dealer.zmtp.received(dealer.socket.recv_into(dealer.zmtp.room()))
    assert dealer.zmtp.replies.startswith(command(b"PONG"))
    dealer.socket.sendall(dealer.zmtp.replies)
    dealer.zmtp.replies = b""
    dealer.send(b"still here")
    assert router.recv_multipart() == [b"identity", b"still here"]
