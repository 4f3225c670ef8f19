"""How the launcher hears what is to be restarted."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator

import pytest

from penstock.bin import restart
from penstock.bin.restart import Ask, Asker, RestartError


@pytest.fixture
def pair() -> Iterator[tuple[Asker, socket.socket]]:
    """The launcher's end, and that of who asks."""
    near, far = socket.socketpair()
    with far:
        asker = Asker(near)
        yield asker, far
        asker.close()


def test_what_is_asked_may_come_in_parts(pair: tuple[Asker, socket.socket]) -> None:
    asker, far = pair
    line = json.dumps({"roles": ["worker", "gateway"], "in_place": True}).encode() + b"\n"
    for byte in line:
        far.send(bytes([byte]))
    assert asker.hear() == Ask(("gateway", "worker"), True)
    asker.end("")
    assert json.loads(far.recv(100)) == {"end": ""}


@pytest.mark.parametrize("said", [b"", b"{}\n", b"[]\n", b"x" * 10_000, b'{"roles": 1, "in_place": 1}\n'])
def test_what_is_no_such_line_is_refused(pair: tuple[Asker, socket.socket], said: bytes) -> None:
    asker, far = pair
    far.send(said)
    far.shutdown(socket.SHUT_WR)
    with pytest.raises(RestartError, match="it was not said what to restart"):
        asker.hear()


def test_who_asks_slowly_does_not_hold_the_launcher_up(
    pair: tuple[Asker, socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    asker, far = pair
    monkeypatch.setattr(restart, "_HEAR_S", 0.2)
    asker = Asker(asker._connection)
    over, sent = threading.Event(), [0]

    def drip() -> None:
        while not over.wait(0.01):  # far within the time that there is for each part
            sent[0] += far.send(b" ")

    slow = threading.Thread(target=drip)
    slow.start()
    try:
        with pytest.raises(RestartError):
            asker.hear()
        assert sent[0] < 100
    finally:
        over.set()
        slow.join(20.0)
