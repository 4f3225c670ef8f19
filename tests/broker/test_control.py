"""The broker's end of the control connections, over real Unix sockets."""

from __future__ import annotations

import select
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from penstock.broker import control as broker_control
from penstock.broker.control import ControlServer
from penstock.broker.events import Gone
from penstock.wire import control
from penstock.wire.events import Garbage

PEER = b"a peer.."


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "control.sock"


@pytest.fixture
def server(path: Path) -> Iterator[ControlServer]:
    server = ControlServer(path)
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
    return control._HELLO.pack(b"PNST", 1, peer)


def wait(fileno: int) -> None:
    assert select.select([fileno], [], [], 10)[0], "nothing came"


def test_a_peer_that_ends_is_gone(server: ControlServer, path: Path) -> None:
    peer = control.connect(path, PEER)
    assert peer is not None
    [fileno] = server.accept()
    assert server.read(fileno) is None
    peer.close()
    wait(fileno)
    assert server.read(fileno) == Gone(PEER, "its process ended")
    assert fileno not in server


def test_nobody_waits_and_nothing_has_come(
    server: ControlServer, join: Callable[[bytes], tuple[socket.socket, int]]
) -> None:
    assert list(server.accept()) == []
    _, fileno = join(hello())
    assert server.read(fileno) is None
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
    assert server.read(fileno) is None
    end.send(hello())
    assert server.read(fileno) == Garbage("control", "a second packet on a control connection", PEER)
    assert fileno not in server


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
    server = ControlServer(path)
    end = control.connect(path, PEER)
    assert end is not None
    [fileno] = server.accept()
    assert server.read(fileno) is None
    server.close()
    wait(end.fileno())
    assert end.recv(1) == b""
    assert control.connect(path, PEER) is None
    end.close()
