"""Who hangs up is noticed, though nothing is read."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator

import pytest

from penstock.gateway.hangups import Hangups
from tests.gateway.serving import Loop


@pytest.fixture
def hangups(loop: Loop) -> Iterator[Hangups]:
    hangups = Hangups(loop.loop)
    yield hangups
    hangups.close()


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield ours, theirs


class Note:
    """How often somebody was told."""

    def __init__(self) -> None:
        self.count = 0

    def told(self) -> None:
        self.count += 1


@pytest.mark.parametrize("close", [False, True])
@pytest.mark.parametrize("unread", [b"", b"unread"])
def test_end_is_noticed_behind_what_is_not_read(
    loop: Loop, hangups: Hangups, pair: tuple[socket.socket, socket.socket], unread: bytes, close: bool
) -> None:
    ours, theirs = pair
    note = Note()
    hangups.watch(ours.fileno(), note.told)
    theirs.send(unread)
    loop.settle()
    assert note.count == 0
    if close:
        theirs.close()
    else:
        theirs.shutdown(socket.SHUT_WR)
    loop.until(lambda: note.count)
    loop.settle()
    assert note.count == 1
    assert ours.recv(100) == unread


def test_whoever_is_forgotten_is_not_noticed(
    loop: Loop, hangups: Hangups, pair: tuple[socket.socket, socket.socket]
) -> None:
    ours, theirs = pair
    note, again = Note(), Note()
    hangups.watch(ours.fileno(), note.told)
    hangups.forget(ours.fileno(), note.told)
    hangups.forget(ours.fileno(), note.told)
    theirs.close()
    loop.settle()
    hangups.watch(ours.fileno(), again.told)
    loop.until(lambda: again.count)
    assert note.count == 0


def test_two_that_hang_up_at_once_may_forget_each_other(loop: Loop, hangups: Hangups) -> None:
    pairs = [socket.socketpair() for _ in range(2)]
    told: list[int] = []
    watchers = [lambda: forget(1), lambda: forget(0)]

    def forget(other: int) -> None:
        told.append(other)
        hangups.forget(pairs[other][0].fileno(), watchers[other])

    for (ours, _), watcher in zip(pairs, watchers, strict=True):
        hangups.watch(ours.fileno(), watcher)
    for _, theirs in pairs:
        theirs.close()
    loop.until(lambda: told)
    loop.settle()
    assert len(told) == 1
    for ours, _ in pairs:
        ours.close()


@pytest.mark.parametrize("first", [False, True])
def test_descriptor_that_was_closed_is_forgotten_and_its_number_used_anew(
    loop: Loop, hangups: Hangups, pair: tuple[socket.socket, socket.socket], first: bool
) -> None:
    """``first``: it is forgotten before its number is watched again, and not after."""
    ours, theirs = pair
    old, new = Note(), Note()
    closed, other = socket.socketpair()
    number = closed.fileno()
    hangups.watch(number, old.told)
    closed.close()
    other.close()
    if first:
        hangups.forget(number, old.told)
    assert os.dup2(ours.fileno(), number) == number
    hangups.watch(number, new.told)
    hangups.forget(number, old.told)
    theirs.close()
    loop.until(lambda: new.count)
    assert (old.count, new.count) == (0, 1)
    os.close(number)


def test_nothing_is_opened_before_it_is_needed(loop: Loop) -> None:
    before = sorted(os.listdir("/proc/self/fd"))
    hangups = Hangups(loop.loop)
    assert sorted(os.listdir("/proc/self/fd")) == before
    hangups.close()
    hangups.forget(0, loop.close)
