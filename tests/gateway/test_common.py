"""What gateways agree upon: read by all of them, changed by one at a time."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from typing import Any

import pytest

from penstock.gateway.common import FILE_NAME, LOCK_NAME, Common
from penstock.wire.errors import OVERLOADED, PenstockError


def put(key: str, value: Any) -> Any:
    return lambda section: section.update({key: value})


def test_what_one_changes_the_others_read(tmp_path: Path) -> None:
    one, other = Common(tmp_path), Common(tmp_path)
    assert one.read("a") == other.read("a") == {}
    one.change("a", put("x", 1))
    assert other.read("a") == {"x": 1}
    other.change("b", put("y", [2]))
    other.change("a", put("z", None))
    assert (one.read("a"), one.read("b")) == ({"x": 1, "z": None}, {"y": [2]})
    assert Common(tmp_path).read("b") == {"y": [2]}
    assert sorted(os.listdir(tmp_path)) == [FILE_NAME, LOCK_NAME]


def test_as_long_as_nothing_changes_it_is_the_same_object(tmp_path: Path) -> None:
    one, other = Common(tmp_path), Common(tmp_path)
    one.change("a", put("x", 1))
    before = one.read("a")
    assert one.read("a") is before
    other.change("a", put("x", 2))
    assert one.read("a") is not before
    assert before == {"x": 1}


@pytest.mark.parametrize("shared", [True, False])
def test_what_cannot_be_changed_stays(tmp_path: Path, shared: bool) -> None:
    common = Common(tmp_path if shared else None)
    common.change("a", put("x", 1))

    def refuse(section: dict[str, Any]) -> None:
        section["x"] = 2
        raise PenstockError("bad_input", "no")

    with pytest.raises(PenstockError, match="no"):
        common.change("a", refuse)
    assert common.read("a") == {"x": 1}


def test_without_a_directory_it_is_one_gateways_own() -> None:
    common = Common(None)
    assert common.change("a", put("x", 1)) == common.read("a") == {"x": 1}
    assert Common(None).read("a") == {}


def test_a_file_that_is_gone_or_broken_is_as_none(tmp_path: Path) -> None:
    common = Common(tmp_path)
    common.change("a", put("x", 1))
    (tmp_path / FILE_NAME).write_text("{")
    assert common.read("a") == {}
    (tmp_path / FILE_NAME).write_text("[1]")
    assert common.read("a") == {}
    common.change("a", put("x", 2))
    (tmp_path / FILE_NAME).unlink()
    assert common.read("a") == {}


def test_who_cannot_write_says_so(tmp_path: Path) -> None:
    common = Common(tmp_path / "nowhere")
    with pytest.raises(PenstockError) as raised:
        common.change("a", put("x", 1))
    assert raised.value.code == OVERLOADED
    fd = os.open(tmp_path / LOCK_NAME, os.O_CREAT | os.O_RDWR)
    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    with pytest.raises(PenstockError, match="another gateway changes settings at this moment"):
        Common(tmp_path).change("a", put("x", 1))
    os.close(fd)
    big = "x" * (5 << 20)
    with pytest.raises(PenstockError, match="has 4194304 bytes at most"):
        Common(tmp_path).change("a", put("x", big))
