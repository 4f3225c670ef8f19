"""Where HTTP is, as it is written down for the clients of this host."""

from __future__ import annotations

import socket
from contextlib import ExitStack
from pathlib import Path

import pytest

from penstock.gateway.listening import Sign, reachable_url


@pytest.mark.parametrize(
    ("family", "host", "url"),
    [
        (socket.AF_INET, "127.0.0.1", "http://127.0.0.1:{}"),
        (socket.AF_INET, "0.0.0.0", "http://127.0.0.1:{}"),
        (socket.AF_INET6, "::", "http://[::1]:{}"),
    ],
)
def test_a_url_that_can_be_asked(family: int, host: str, url: str) -> None:
    with socket.socket(family) as listener:
        listener.bind((host, 0))
        assert reachable_url(listener) == url.format(listener.getsockname()[1])


@pytest.fixture
def url() -> str:
    """Where nobody listens."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        return reachable_url(held)


def test_the_last_that_wrote_it_takes_it_away(tmp_path: Path, url: str) -> None:
    first, second = Sign(tmp_path / "http", url), Sign(tmp_path / "http", url)
    first.put_up()
    second.put_up()
    first.take_down()
    assert (tmp_path / "http").read_text() == url + "\n"
    second.take_down()
    second.take_down()
    assert list(tmp_path.iterdir()) == []


def test_it_stays_while_somebody_else_listens_there(tmp_path: Path) -> None:
    """Another gateway of the same server, or a launcher, which would start the next one."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        sign = Sign(tmp_path / "http", reachable_url(other))
        sign.put_up()
        sign.take_down()
        assert (tmp_path / "http").read_text() == reachable_url(other) + "\n"
    sign.take_down()
    assert list(tmp_path.iterdir()) == []


def test_it_stays_while_more_wait_there_than_may(tmp_path: Path) -> None:
    with ExitStack() as stack:
        busy = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0))
        for _ in range(3):
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(busy.getsockname())
        sign = Sign(tmp_path / "http", reachable_url(busy))
        sign.put_up()
        sign.take_down()
        assert (tmp_path / "http").exists()


def test_one_that_has_gone_is_put_up_again(tmp_path: Path, url: str) -> None:
    sign = Sign(tmp_path / "http", url)
    sign.put_up()
    sign.look()
    before = (tmp_path / "http").stat().st_ino
    sign.look()
    assert (tmp_path / "http").stat().st_ino == before
    (tmp_path / "http").unlink()
    sign.look()
    assert (tmp_path / "http").read_text() == url + "\n"
    sign.take_down()
    assert list(tmp_path.iterdir()) == []


def test_without_room_nothing_is_left(tmp_path: Path, url: str) -> None:
    sign = Sign(tmp_path / "nowhere" / "http", url)
    with pytest.raises(OSError, match="No such file"):
        sign.put_up()
    sign.look()
    sign.take_down()
