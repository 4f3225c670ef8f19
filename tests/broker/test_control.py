"""The broker's end of the control connections, over real Unix sockets."""

from __future__ import annotations

import gc
import os
import resource
import select
import socket
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from penstock.broker import control as broker_control
from penstock.broker.control import ControlServer
from penstock.broker.events import Came, Gone
from penstock.wire import control
from penstock.wire.arena import Arena, Mapping
from penstock.wire.doors import Doors
from penstock.wire.errors import BadMessage
from penstock.wire.events import Garbage

PEER = b"a peer.."


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "control.sock"


@pytest.fixture
def arena() -> Iterator[Arena]:
    arena = Arena(1 << 16, "test")
    yield arena
    arena.close()


@pytest.fixture
def epoll() -> Iterator[select.epoll]:
    with select.epoll() as epoll:
        yield epoll


@pytest.fixture
def server(path: Path, epoll: select.epoll) -> Iterator[ControlServer]:
    server = ControlServer(path, epoll, Doors())
    yield server
    server.close()


@pytest.fixture
def join(path: Path, server: ControlServer) -> Iterator[Callable[[bytes], tuple[socket.socket, int]]]:
    """Connects a process that says this first; returns its end, and the descriptor of the server's."""
    ends: list[socket.socket] = []

    def connect(first: bytes = b"") -> tuple[socket.socket, int]:
        end = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ends.append(end)
        end.connect(str(path))
        if first:
            end.send(first)
        [fileno] = server.accept()
        return end, fileno

    yield connect
    for end in ends:
        end.close()


def hello(peer: bytes = PEER) -> bytes:
    return control._HELLO.pack(b"PNST", 1, peer, 0)


def wait(fileno: int) -> None:
    assert select.select([fileno], [], [], 10)[0], "nothing came"


def test_a_peer_that_ends_is_gone(server: ControlServer, path: Path) -> None:
    peer = control.connect(path, PEER)
    assert peer is not None
    [fileno] = server.accept()
    assert server.read(fileno) == Came(PEER, 0)
    peer.close()
    wait(fileno)
    assert server.read(fileno) == Gone(PEER, "its process ended", disconnected=True)
    assert fileno not in server


def test_nobody_waits_and_nothing_has_come(
    server: ControlServer, join: Callable[[bytes], tuple[socket.socket, int]]
) -> None:
    assert list(server.accept()) == []
    _, fileno = join(hello())
    assert server.read(fileno) == Came(PEER, 0)
    assert server.read(fileno) is None
    assert fileno in server


def test_a_connection_that_ends_before_it_said_who_it_is_is_nobodys(
    server: ControlServer, join: Callable[[bytes], tuple[socket.socket, int]]
) -> None:
    end, fileno = join(b"")
    end.close()
    wait(fileno)
    assert server.read(fileno) is None
    assert fileno not in server


@pytest.mark.parametrize("first", [b"x", hello()[:-1], hello() + b"x", b"x" * 100, b"HTTP" + hello()[4:]])
def test_a_connection_that_begins_with_anything_else_is_closed(
    server: ControlServer, join: Callable[[bytes], tuple[socket.socket, int]], first: bytes
) -> None:
    end, fileno = join(first)
    event = server.read(fileno)
    assert isinstance(event, Garbage)
    assert (event.process, event.peer) == ("control", b"")
    assert fileno not in server
    wait(end.fileno())
    assert end.recv(1) == b""


def test_a_peer_says_who_it_is_once(server: ControlServer, join: Callable[[bytes], tuple[socket.socket, int]]) -> None:
    end, fileno = join(hello())
    assert server.read(fileno) == Came(PEER, 0)
    end.send(hello())
    assert server.read(fileno) == Garbage("control", "a second packet on a control connection", PEER)
    assert fileno not in server


def test_a_peer_that_had_no_arena_may_show_one_once(server: ControlServer, path: Path) -> None:
    arena = Arena(1 << 16, "test")
    peer = control.connect(path, PEER)
    assert peer is not None
    [fileno] = server.accept()
    assert server.read(fileno) == Came(PEER, 0)
    assert control.announce(peer, PEER, arena.fd)
    assert server.read(fileno) == Came(PEER, arena.size)
    arena.view(5, 1)[:] = b"x"
    assert bytes(server.view(PEER, 5, 1)) == b"x"
    assert control.announce(peer, PEER, arena.fd)
    assert server.read(fileno) == Garbage("control", "a second packet on a control connection", PEER)
    assert fileno not in server
    assert control.announce(peer, PEER, arena.fd), "nobody is there to be told"
    peer.close()
    arena.close()


def test_an_arena_is_shown_for_oneself_alone(server: ControlServer, path: Path) -> None:
    arena = Arena(1 << 16, "test")
    peer = control.connect(path, PEER)
    assert peer is not None
    [fileno] = server.accept()
    assert server.read(fileno) == Came(PEER, 0)
    assert control.announce(peer, PEER[::-1], arena.fd)
    assert server.read(fileno) == Garbage("control", "a second packet on a control connection", PEER)
    peer.close()
    arena.close()


def test_connections_that_never_say_who_they_are_are_few(
    server: ControlServer, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(broker_control, "_UNNAMED_MAX", 2)
    named = control.connect(path, PEER)
    assert named is not None
    [fileno] = server.accept()
    server.read(fileno)
    ends = [socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in range(3)]
    for end in ends:
        end.connect(str(path))
    assert len(list(server.accept())) == 2
    wait(ends[2].fileno())
    assert ends[2].recv(1) == b""
    for each in (*ends, named):
        each.close()


def test_processes_of_other_users_are_turned_away(
    server: ControlServer, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(control, "same_user", lambda connection: False)
    end = control.connect(path, PEER)
    assert end is not None
    assert list(server.accept()) == []
    end.close()


def test_closing_ends_every_connection(path: Path) -> None:
    server = ControlServer(path, select.epoll(), Doors())
    end = control.connect(path, PEER)
    assert end is not None
    [fileno] = server.accept()
    assert server.read(fileno) == Came(PEER, 0)
    server.close()
    wait(end.fileno())
    with pytest.raises(control.BrokerLeft, match="has shut down"):
        list(control.receive_arenas(end))
    assert end.recv(1) == b""
    assert control.connect(path, PEER) is None
    end.close()


def test_an_arena_comes_with_its_size_and_can_be_read(server: ControlServer, path: Path, arena: Arena) -> None:
    arena.view(64, 5)[:] = b"hello"
    peer = control.connect(path, PEER, arena.fd)
    assert peer is not None
    [fileno] = server.accept()
    assert server.read(fileno) == Came(PEER, arena.size)
    assert bytes(server.view(PEER, 64, 5)) == b"hello"
    with pytest.raises(BadMessage, match="outside its arena"):
        server.view(PEER, arena.size - 1, 2)
    peer.close()


def test_arenas_are_passed_on(server: ControlServer, path: Path, arena: Arena) -> None:
    owner, reader = control.connect(path, PEER, arena.fd), control.connect(path, b"a reader")
    assert owner is not None
    assert reader is not None
    for fileno in list(server.accept()):
        server.read(fileno)
    server.share(PEER, b"a reader", 7)
    introduced = control.receive(reader)
    assert introduced is not None
    assert (introduced.peer, introduced.serial) == (PEER, 7)
    arena.view(0, 1)[:] = b"!"
    assert bytes(Mapping(introduced.arena).view(0, 1)) == b"!"
    server.share(PEER, b"nobody..", 8)
    server.share(b"gone now", b"a reader", 9)
    with pytest.raises(BlockingIOError):
        control.receive(reader)
    owner.close()
    reader.close()


def test_more_arenas_than_the_kernel_takes_wait(
    server: ControlServer, path: Path, arena: Arena, epoll: select.epoll
) -> None:
    """As when a worker joins a server with many clients: net.unix.max_dgram_qlen is 10 by default."""
    owner, reader = control.connect(path, PEER, arena.fd), control.connect(path, b"a reader")
    assert owner is not None
    assert reader is not None
    for fileno in server.accept():
        server.read(fileno)
    for serial in range(2000):
        server.share(PEER, b"a reader", serial)
    taken = 0
    while taken < 2000:
        for fileno, happened in epoll.poll(0):
            assert happened == select.EPOLLOUT
            server.write(fileno)
        introduced = control.receive(reader)
        assert introduced is not None
        assert (introduced.peer, introduced.serial) == (PEER, taken)
        os.close(introduced.arena)
        taken += 1
    assert epoll.poll(0) == [], "there is nothing to write any more"
    owner.close()
    reader.close()


def test_a_peer_that_does_not_read_is_gone(server: ControlServer, path: Path, arena: Arena) -> None:
    owner, deaf = control.connect(path, PEER, arena.fd), control.connect(path, b"deaf one")
    assert owner is not None
    assert deaf is not None
    filenos = list(server.accept())
    for fileno in filenos:
        server.read(fileno)
    for _ in range(40_000):
        server.share(PEER, b"deaf one", 1)
    assert server.read(filenos[1]) == Gone(b"deaf one", "its process ended", disconnected=True)
    assert not server.shares(b"deaf one")
    assert server.shares(PEER)
    owner.close()
    deaf.close()


def test_what_is_no_arena_ends_the_connection(server: ControlServer, path: Path) -> None:
    before = set(os.listdir("/proc/self/fd"))
    with tempfile.TemporaryFile() as file:
        file.write(b"x" * 4096)
        peer = control.connect(path, PEER, file.fileno())
    assert peer is not None
    [fileno] = server.accept()
    event = server.read(fileno)
    assert isinstance(event, Garbage)
    assert event.reason.startswith("what a peer sent as its arena is no memfd")
    assert fileno not in server
    peer.close()
    assert set(os.listdir("/proc/self/fd")) == before


def test_one_peer_has_one_connection(server: ControlServer, join: Callable[[bytes], tuple[socket.socket, int]]) -> None:
    _, first = join(hello())
    _, second = join(hello())
    assert server.read(first) == Came(PEER, 0)
    assert server.read(second) == Garbage("control", "a second control connection of one peer")
    assert first in server
    assert second not in server


def test_ended_connections_leave_no_descriptor(server: ControlServer, path: Path, arena: Arena) -> None:
    gc.collect()  # what other tests have left in cycles
    before = set(os.listdir("/proc/self/fd"))
    peer = control.connect(path, PEER, arena.fd)
    assert peer is not None
    [fileno] = server.accept()
    server.read(fileno)
    peer.close()
    wait(fileno)
    assert isinstance(server.read(fileno), Gone)
    gc.collect()
    assert set(os.listdir("/proc/self/fd")) == before


def test_while_there_are_no_descriptors_nobody_is_accepted_and_nobody_polled_for(
    server: ControlServer, path: Path, epoll: select.epoll
) -> None:
    peer = control.connect(path, PEER)
    assert peer is not None
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = os.dup(0)
    os.close(free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free, before[1]))
    try:
        assert [server.accept(), server.accept()] == [[], []]
        assert epoll.poll(0) == []
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    server.resume()
    assert epoll.poll(0) == [(server.listener, select.EPOLLIN)]
    assert len(server.accept()) == 1
    peer.close()


def test_it_can_be_closed_while_nobody_is_accepted(path: Path, epoll: select.epoll) -> None:
    server = ControlServer(path, epoll, Doors())
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    with control.connect(path, PEER) or pytest.fail("nobody listens"):
        free = os.dup(0)
        os.close(free)
        resource.setrlimit(resource.RLIMIT_NOFILE, (free, before[1]))
        try:
            assert server.accept() == []
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, before)
        server.close()
