"""Where HTTP is, as it is written down for the clients of this host."""

from __future__ import annotations

import socket
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


def test_the_last_that_wrote_it_takes_it_away(tmp_path: Path) -> None:
    first, second = Sign(tmp_path / "http"), Sign(tmp_path / "http")
    first.put_up("http://a:1")
    second.put_up("http://a:2")
    first.take_down()
    assert (tmp_path / "http").read_text() == "http://a:2\n"
    second.take_down()
    second.take_down()
    assert list(tmp_path.iterdir()) == []


def test_without_room_nothing_is_left(tmp_path: Path) -> None:
    sign = Sign(tmp_path / "nowhere" / "http")
    with pytest.raises(OSError, match="No such file"):
        sign.put_up("http://a:1")
    sign.take_down()
