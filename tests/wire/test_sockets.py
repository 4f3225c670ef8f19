"""ZeroMQ sockets as every process uses them, over real transports."""

from __future__ import annotations

import select
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

import pytest
import zmq

from penstock.wire.messages import MAX_REQUESTS, Payload
from penstock.wire.sockets import MAX_SUBSCRIPTION_BYTES, Socket

WAIT_S = 10.0
MakeSocket: TypeAlias = Callable[..., Socket]
Received: TypeAlias = list[tuple[list[bytes], list[bytes]]]


@pytest.fixture
def make_socket() -> Iterator[MakeSocket]:
    context: zmq.Context[Any] = zmq.Context()
    made: list[Socket] = []

    def make(kind: int, high_water: int = 1000, identity: bytes = b"", frame_bytes_max: int = 1 << 30) -> Socket:
        made.append(Socket(context, kind, high_water, identity, frame_bytes_max))
        return made[-1]

    yield make
    for socket in made:
        socket.close()
    context.term()


@pytest.fixture(params=["inproc", "ipc", "tcp"])
def ends(request: pytest.FixtureRequest, make_socket: MakeSocket, tmp_path: Path) -> tuple[Socket, Socket]:
    """A broker's ROUTER, and a peer's DEALER that has said hello."""
    router, dealer = make_socket(zmq.ROUTER), make_socket(zmq.DEALER, identity=b"peer")
    address = {"inproc": "inproc://test", "ipc": f"ipc://{tmp_path}/s", "tcp": "tcp://127.0.0.1:*"}[request.param]
    router.raw.bind(address)
    dealer.raw.connect(router.raw.get(zmq.LAST_ENDPOINT).rstrip(b"\0").decode())
    join(router, dealer)
    return router, dealer


def join(router: Socket, dealer: Socket, name: bytes = b"peer") -> None:
    """Wait until the two are connected: an IMMEDIATE DEALER takes nothing before."""
    poller = zmq.Poller()
    poller.register(dealer.fileno(), select.POLLIN)
    while dealer.send([b"hello"]) == "full":
        assert poller.poll(int(WAIT_S * 1000)), "no connection"
    assert receive(router) == [([name, b"hello"], [])]


def wait(socket: Socket) -> None:
    """What a loop does while nothing is pending."""
    if not socket.pending:
        assert select.select([socket.fileno()], [], [], WAIT_S)[0], "nothing came"
        socket.pending = True


def receive_one(socket: Socket, heads: int = 2) -> tuple[list[bytes], list[Payload]]:
    """The next message, however many wake-ups it takes."""
    while True:
        wait(socket)
        for message in socket.receive(heads, 1):
            return message


def receive(socket: Socket, count: int = 1, heads: int = 2) -> Received:
    """The next messages, with their frames as bytes."""
    found = [receive_one(socket, heads) for _ in range(count)]
    return [(first, list(map(bytes, rest))) for first, rest in found]


def test_a_message_comes_with_its_first_frames_as_bytes_and_the_rest_by_reference(
    ends: tuple[Socket, Socket],
) -> None:
    router, dealer = ends
    assert dealer.send([b"head"], [b"one", b"", memoryview(b"three")]) == "sent"
    heads, rest = receive_one(router)
    assert heads == [b"peer", b"head"]
    assert all(isinstance(frame, zmq.Frame) for frame in rest)
    assert [bytes(frame) for frame in rest] == [b"one", b"", b"three"]


def test_frames_that_came_can_be_passed_on(ends: tuple[Socket, Socket]) -> None:
    router, dealer = ends
    for size in (0, 10, 100_000):
        assert dealer.send([b"head"], [b"x" * size] * 2) == "sent"
        _, rest = receive_one(router)
        assert router.send([b"peer", b"back"], rest) == "sent"
        assert receive(dealer, heads=1) == [([b"back"], [b"x" * size] * 2)]


def test_a_message_shorter_than_its_heads_comes_with_those_that_it_has(ends: tuple[Socket, Socket]) -> None:
    router, dealer = ends
    dealer.send([b"head"])
    assert receive(router, heads=5) == [([b"peer", b"head"], [])]


def test_no_more_is_received_than_asked_for_and_the_rest_is_pending(ends: tuple[Socket, Socket]) -> None:
    router, dealer = ends
    for number in range(5):
        dealer.send([b"%d" % number])
    assert receive(router) == [([b"peer", b"0"], [])]
    found: list[bytes] = []
    while len(found) < 4:
        wait(router)
        taken = list(router.receive(2, 3))
        assert len(taken) <= 3
        assert router.pending or len(taken) < 3
        found += [heads[1] for heads, _ in taken]
    assert found == [b"1", b"2", b"3", b"4"]


def test_a_socket_is_pending_until_it_was_found_empty(ends: tuple[Socket, Socket]) -> None:
    router, dealer = ends
    assert router.pending
    assert list(router.receive(2, 10)) == []
    empty = router.pending
    dealer.send([b"head"])
    receive_one(router)
    taken = router.pending
    assert list(router.receive(2, 10)) == []
    assert (empty, taken, router.pending) == (False, True, False)


def test_sending_makes_a_socket_pending(ends: tuple[Socket, Socket]) -> None:
    # A send may swallow the one wake-up that a message caused.
    router, _ = ends
    assert list(router.receive(2, 10)) == []
    router.send([b"peer", b"head"])
    assert router.pending


def test_nothing_is_lost_when_sends_and_receives_mix(ends: tuple[Socket, Socket]) -> None:
    router, dealer = ends
    for number in range(200):
        assert dealer.send([b"%d" % number]) == "sent"
        assert receive(router) == [([b"peer", b"%d" % number], [])]
        assert router.send([b"peer", b"%d" % number]) == "sent"
        assert receive(dealer) == [([b"%d" % number], [])]


def test_frames_beyond_what_any_message_has_are_dropped_but_for_one(ends: tuple[Socket, Socket]) -> None:
    router, dealer = ends
    dealer.send([b"many"], [b""] * (MAX_REQUESTS + 10))
    dealer.send([b"next"])
    first, second = receive(router, 2)
    assert len(first[1]) == MAX_REQUESTS + 1  # which unpacking refuses
    assert second == ([b"peer", b"next"], [])


def test_a_peer_that_is_not_there_is_gone(ends: tuple[Socket, Socket]) -> None:
    router, dealer = ends
    assert router.send([b"nobody", b"head"], [b"frame"]) == "gone"
    assert router.send([b"peer", b"head"]) == "sent"
    assert receive(dealer) == [([b"head"], [])]


def test_a_peer_that_takes_nothing_is_full(make_socket: MakeSocket, tmp_path: Path) -> None:
    router, dealer = make_socket(zmq.ROUTER, 5), make_socket(zmq.DEALER, 5, b"peer")
    router.raw.bind(f"ipc://{tmp_path}/s")
    dealer.raw.connect(f"ipc://{tmp_path}/s")
    join(router, dealer)
    outcomes: list[str] = []
    while len(outcomes) < 10_000 and "full" not in outcomes:
        outcomes.append(router.send([b"peer", b"head"], [bytes(100_000)] * 2))
    assert set(outcomes) == {"sent", "full"}
    # What was sent arrives whole, nothing of what was not.
    assert receive(dealer, len(outcomes) - 1) == [([b"head", bytes(100_000)], [bytes(100_000)])] * (len(outcomes) - 1)


def test_nothing_waits_for_a_broker_that_is_not_there(make_socket: MakeSocket, tmp_path: Path) -> None:
    dealer = make_socket(zmq.DEALER, identity=b"peer")
    dealer.raw.connect(f"ipc://{tmp_path}/nobody")
    assert dealer.send([b"head"]) == "full"


def test_a_peer_that_connects_anew_takes_over_its_name(make_socket: MakeSocket, tmp_path: Path) -> None:
    router = make_socket(zmq.ROUTER)
    router.raw.bind(f"ipc://{tmp_path}/s")
    for _ in range(2):
        dealer = make_socket(zmq.DEALER, identity=b"peer")
        dealer.raw.connect(f"ipc://{tmp_path}/s")
        join(router, dealer)
    assert router.send([b"peer", b"head"]) == "sent"
    assert receive(dealer) == [([b"head"], [])]


def test_what_was_sent_last_is_delivered_within_the_time_to_linger(make_socket: MakeSocket, tmp_path: Path) -> None:
    router, dealer = make_socket(zmq.ROUTER), make_socket(zmq.DEALER, identity=b"peer")
    router.raw.bind(f"ipc://{tmp_path}/s")
    dealer.raw.connect(f"ipc://{tmp_path}/s")
    join(router, dealer)
    dealer.send([b"last"], [bytes(1_000_000)])
    dealer.close(linger_ms=10_000)
    assert receive(router) == [([b"peer", b"last"], [bytes(1_000_000)])]


@pytest.mark.parametrize("transport", ["ipc", "tcp"])
def test_a_frame_beyond_the_limit_ends_its_connection_and_no_other(
    make_socket: MakeSocket, tmp_path: Path, transport: str
) -> None:
    router = make_socket(zmq.ROUTER, frame_bytes_max=1000)
    router.raw.bind({"ipc": f"ipc://{tmp_path}/s", "tcp": "tcp://127.0.0.1:*"}[transport])
    address = router.raw.get(zmq.LAST_ENDPOINT).rstrip(b"\0").decode()
    good, bad = make_socket(zmq.DEALER, identity=b"peer"), make_socket(zmq.DEALER, identity=b"peer too")
    good.raw.connect(address)
    join(router, good)
    bad.raw.set(zmq.RECONNECT_IVL, -1)
    bad.raw.connect(address)
    join(router, bad, b"peer too")
    assert bad.send([b"most"], [bytes(1000)]) == "sent"
    assert receive(router) == [([b"peer too", b"most"], [bytes(1000)])]
    assert bad.send([b"more"], [bytes(1001)]) == "sent"
    for _ in range(10_000):
        if router.send([b"peer too", b"head"]) == "gone":
            break
        assert good.send([b"meanwhile"]) == "sent"
        assert receive(router) == [([b"peer", b"meanwhile"], [])]
    assert router.send([b"peer too", b"head"]) == "gone"
    assert good.send([b"afterwards"]) == "sent"
    assert receive(router) == [([b"peer", b"afterwards"], [])], "nothing of the message came"


def test_a_subscription_is_within_its_limit(make_socket: MakeSocket, tmp_path: Path) -> None:
    """And so is all that ZeroMQ says to begin a connection."""
    publisher = make_socket(zmq.XPUB, frame_bytes_max=MAX_SUBSCRIPTION_BYTES)
    publisher.raw.bind(f"ipc://{tmp_path}/s")
    hearer = make_socket(zmq.SUB, identity=bytes(range(1, 256)))
    hearer.raw.set(zmq.SUBSCRIBE, bytes(8))
    hearer.raw.connect(f"ipc://{tmp_path}/s")
    assert receive(publisher, heads=1) == [([b"\x01" + bytes(8)], [])]
