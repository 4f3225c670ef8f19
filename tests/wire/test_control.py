"""The control connection: who is there, and that it has gone."""

from __future__ import annotations

import os
import resource
import select
import socket
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.wire import control
from penstock.wire.control import HELLO_BYTES, NO_ARENA, Introduction, connect, introduce, listen, receive, same_user
from penstock.wire.errors import BadMessage

PEER = b"a peer.."


def hear(packet: bytes, descriptors: Sequence[int] = ()) -> Introduction | None:
    """What is made of a packet that comes."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        socket.send_fds(theirs, [packet], list(descriptors))
        return receive(ours)


def flood(connection: socket.socket) -> None:
    for _ in range(100_000):
        introduce(connection, PEER)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "control.sock"


@pytest.fixture
def listener(path: Path) -> Iterator[socket.socket]:
    with listen(path) as listener:
        yield listener


@pytest.fixture
def ends(listener: socket.socket, path: Path) -> Iterator[tuple[socket.socket, socket.socket]]:
    """A peer's end of a connection, and the broker's."""
    peer = connect(path, PEER)
    assert peer is not None
    broker, _ = listener.accept()
    with peer, broker:
        broker.settimeout(10)
        yield peer, broker


def test_a_connection_says_first_who_it_is(ends: tuple[socket.socket, socket.socket]) -> None:
    _, broker = ends
    assert receive(broker) == (PEER, 0, NO_ARENA, False)


def test_a_descriptor_travels_beside_it(listener: socket.socket, path: Path) -> None:
    with open("/etc/hostname", "rb") as file:
        peer = connect(path, PEER, file.fileno())
        assert peer is not None
        broker, _ = listener.accept()
        with peer, broker:
            broker.settimeout(10)
            introduced = receive(broker)
            assert introduced is not None
            assert introduced.peer == PEER
            with open(introduced.arena, "rb") as same:
                assert os.path.samestat(os.fstat(same.fileno()), os.fstat(file.fileno()))
                assert not os.get_inheritable(same.fileno())


def test_the_broker_passes_on_those_of_others(ends: tuple[socket.socket, socket.socket]) -> None:
    peer, broker = ends
    with pytest.raises(BlockingIOError):
        receive(peer)
    introduce(broker, b"another.", serial=2**64 - 1)
    assert receive(peer) == (b"another.", 2**64 - 1, NO_ARENA, False)
    broker.close()
    assert receive(peer) is None


def test_who_does_not_read_is_found_out(ends: tuple[socket.socket, socket.socket]) -> None:
    _, broker = ends
    broker.setblocking(False)
    with pytest.raises(BlockingIOError):
        flood(broker)


def test_both_ends_notice_that_the_other_has_gone(ends: tuple[socket.socket, socket.socket]) -> None:
    peer, broker = ends
    broker.recv(100)
    peer.close()
    assert broker.recv(100) == b""


def test_a_peer_notices_the_end_of_its_broker(ends: tuple[socket.socket, socket.socket]) -> None:
    peer, broker = ends
    broker.recv(100)
    broker.close()
    assert select.select([peer], [], [], 10)[0]
    with pytest.raises(ConnectionError, match="process ended") as told:
        list(control.receive_arenas(peer))
    assert not isinstance(told.value, control.BrokerLeft)


def test_a_broker_that_leaves_says_so(ends: tuple[socket.socket, socket.socket]) -> None:
    peer, broker = ends
    broker.recv(100)
    control.leave(broker)
    broker.close()
    assert select.select([peer], [], [], 10)[0]
    with pytest.raises(control.BrokerLeft):
        list(control.receive_arenas(peer))


def test_processes_of_this_user_are_known_by_the_kernel(ends: tuple[socket.socket, socket.socket]) -> None:
    assert all(same_user(end) for end in ends)


def test_there_is_no_connection_while_nobody_listens(path: Path) -> None:
    assert connect(path, PEER) is None
    with listen(path):
        pass
    assert connect(path, PEER) is None  # what is left of one who listened


def test_nobody_listens_where_another_does(listener: socket.socket, path: Path) -> None:
    with pytest.raises(OSError, match="in use"):
        listen(path)


def test_sockets_neither_block_nor_outlive_an_exec(
    listener: socket.socket, ends: tuple[socket.socket, socket.socket]
) -> None:
    for each in (listener, ends[0]):
        assert not each.getblocking()
        assert not os.get_inheritable(each.fileno())


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=2 * HELLO_BYTES) | st.binary(min_size=HELLO_BYTES, max_size=HELLO_BYTES))
def test_only_a_hello_is_a_hello(packet: bytes) -> None:
    with pytest.raises(BadMessage):
        hear(packet or b"x")


@pytest.mark.parametrize(
    ("packet", "sentence"),
    [
        (b"PNST\x01\x00" + PEER + bytes(7), "a control hello has 22 bytes, and 21 came"),
        (b"PNST\x01\x00" + PEER + bytes(9), "a control hello has 22 bytes, and 23 came"),
        (b"PNST\x02\x00" + PEER + bytes(8), "the peer speaks version 2 of the protocol, and this broker version 1"),
        (b"HTTP\x01\x00" + PEER + bytes(8), "a control connection whose first packet is no hello of Penstock's"),
    ],
)
def test_what_is_no_hello_is_refused_with_the_reason(packet: bytes, sentence: str) -> None:
    with pytest.raises(BadMessage) as caught:
        hear(packet)
    assert str(caught.value) == sentence


def test_the_descriptor_beside_a_bad_hello_is_closed() -> None:
    before = os.listdir("/proc/self/fd")
    with open("/dev/null", "rb") as file, pytest.raises(BadMessage):
        hear(b"x", [file.fileno()])
    assert os.listdir("/proc/self/fd") == before


def test_an_arena_for_which_there_is_no_descriptor_is_said_to_be_missing(
    ends: tuple[socket.socket, socket.socket],
) -> None:
    """The kernel drops it; whoever it was for goes on without."""
    peer, broker = ends
    with open("/etc/hostname", "rb") as file:
        introduce(broker, b"another.", file.fileno(), 7)
        before = resource.getrlimit(resource.RLIMIT_NOFILE)
        free = os.dup(0)
        os.close(free)
        resource.setrlimit(resource.RLIMIT_NOFILE, (free, before[1]))
        try:
            came = next(control.receive_arenas(peer))
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert (came.peer, came.serial, came.arena) == (b"another.", 7, None)
    assert "no descriptor left" in came.reason


def test_a_broker_that_passes_on_an_arena_without_one_talks_nonsense(ends: tuple[socket.socket, socket.socket]) -> None:
    peer, broker = ends
    introduce(broker, b"another.", serial=7)
    with pytest.raises(ConnectionError, match="without its descriptor"):
        next(control.receive_arenas(peer))
