"""Versions that appear in a repository whole or not at all."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from penstock.client import publish as module
from penstock.client.publish import MODEL_FILE, PublishError, check_inside, check_model, publish


def tree(path: Path) -> list[str]:
    """Every file and directory, hidden ones too."""
    return sorted(str(each.relative_to(path)) for each in path.rglob("*"))


def push(repository: Path, model: str = "net", content: bytes = b"model", version: str = "") -> str:
    return publish(repository, model, {MODEL_FILE: [content]}, version)


def test_versions_count_up(tmp_path: Path) -> None:
    assert [push(tmp_path), push(tmp_path, version="7"), push(tmp_path)] == ["1", "7", "8"]
    assert tree(tmp_path) == ["net", *sorted(f"net/{n}{rest}" for n in (1, 7, 8) for rest in ("", "/model.onnx"))]


def test_what_is_no_version_does_not_count(tmp_path: Path) -> None:
    for name in ("latest", "007", "12a", "9" * 19):
        (tmp_path / "net" / name).mkdir(parents=True)
    assert push(tmp_path) == "1"


def test_files_are_copied_and_parts_written(tmp_path: Path) -> None:
    source = tmp_path / "weights"
    source.write_bytes(b"weights")
    (tmp_path / "models").mkdir()
    publish(tmp_path / "models", "net", {MODEL_FILE: [b"mo", memoryview(b"del")], "data/w.bin": source})
    assert (tmp_path / "models/net/1/model.onnx").read_bytes() == b"model"
    assert (tmp_path / "models/net/1/data/w.bin").read_bytes() == b"weights"


def test_a_version_that_is_there_stays(tmp_path: Path) -> None:
    push(tmp_path, content=b"old", version="3")
    before = tree(tmp_path)
    with pytest.raises(PublishError, match="version 3 of model 'net' is there already; publish another number"):
        push(tmp_path, content=b"new", version="3")
    assert tree(tmp_path) == before
    assert (tmp_path / "net/3/model.onnx").read_bytes() == b"old"


def test_a_version_that_came_meanwhile_stays_and_the_next_is_taken(tmp_path: Path) -> None:
    push(tmp_path)

    def parts() -> Iterator[bytes]:
        push(tmp_path, content=b"other")
        yield b"this"

    assert publish(tmp_path, "net", {MODEL_FILE: parts()}) == "3"
    with pytest.raises(PublishError, match="version 4 of model 'net' is there already"):
        publish(tmp_path, "net", {MODEL_FILE: (push(tmp_path).encode() for _ in "x")}, "4")
    assert [(tmp_path / f"net/{n}/model.onnx").read_bytes() for n in (2, 3, 4)] == [b"other", b"this", b"model"]


def test_a_new_model_that_came_meanwhile_gets_a_second_version(tmp_path: Path) -> None:
    def parts() -> Iterator[bytes]:
        push(tmp_path, content=b"other")
        yield b"this"

    assert publish(tmp_path, "net", {MODEL_FILE: parts()}) == "2"
    assert tree(tmp_path) == ["net", "net/1", "net/1/model.onnx", "net/2", "net/2/model.onnx"]


def test_a_new_model_appears_with_its_version(tmp_path: Path) -> None:
    def parts() -> Iterator[bytes]:
        assert [name for name in os.listdir(tmp_path) if not name.startswith(".")] == []
        yield b"this"

    publish(tmp_path, "net", {MODEL_FILE: parts()})


def test_many_at_once_get_a_number_each(tmp_path: Path) -> None:
    numbers: list[str] = []
    threads = [threading.Thread(target=lambda: numbers.append(push(tmp_path))) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(map(int, numbers)) == list(range(1, 17))
    assert sorted(os.listdir(tmp_path / "net"), key=int) == [str(n) for n in range(1, 17)]
    assert os.listdir(tmp_path) == ["net"]


@pytest.mark.parametrize("there", [True, False])
def test_what_fails_leaves_nothing_behind(tmp_path: Path, there: bool) -> None:
    if there:
        push(tmp_path)
    before = tree(tmp_path)

    def full() -> Iterator[bytes]:
        yield b"half"
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(PublishError, match=r"there is no room for it in .*: No space left on device; make some"):
        publish(tmp_path, "net", {MODEL_FILE: full()})

    def left() -> Iterator[bytes]:
        yield b"half"
        raise InterruptedError

    with pytest.raises(PublishError):
        publish(tmp_path, "net", {MODEL_FILE: left()})
    with pytest.raises(PublishError, match="No such file"):
        publish(tmp_path, "net", {MODEL_FILE: tmp_path / "nothing"})
    assert tree(tmp_path) == before


def test_a_file_is_no_repository(tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    path.write_bytes(b"")
    with pytest.raises(PublishError, match=r"net\.onnx is no model repository; .*NAME/VERSION"):
        push(path)


def test_a_file_in_the_place_of_a_model_is_said(tmp_path: Path) -> None:
    (tmp_path / "net").write_bytes(b"")
    with pytest.raises(PublishError, match=r"cannot be written to .*/net: .*Not a directory"):
        push(tmp_path)


def test_an_empty_directory_is_no_version(tmp_path: Path) -> None:
    (tmp_path / "net" / "5").mkdir(parents=True)
    assert push(tmp_path, version="5") == "5"


def test_there_is_a_last_version(tmp_path: Path) -> None:
    (tmp_path / "net" / str(10**18 - 1)).mkdir(parents=True)
    with pytest.raises(PublishError, match="no number behind it"):
        push(tmp_path)
    assert push(tmp_path, version="3") == "3"


@pytest.mark.parametrize("name", ["", ".", "..", ".hidden", "a/b", "/etc", "a\0b", "a\nb", "x" * 257])
def test_names_that_lead_elsewhere_are_refused(tmp_path: Path, name: str) -> None:
    assert check_model(name)
    with pytest.raises(PublishError, match="name"):
        push(tmp_path, name)
    assert tree(tmp_path) == []


@pytest.mark.parametrize("version", ["latest", "01", "-1", "1/2", "1" * 19])
def test_versions_are_numbers(tmp_path: Path, version: str) -> None:
    with pytest.raises(PublishError, match="a version is a whole number"):
        push(tmp_path, version=version)


def test_files_lie_beside_the_model(tmp_path: Path) -> None:
    assert not check_inside("data/weights.bin")
    for name in ("", "/etc/passwd", "../other/model.onnx", "data/../../x"):
        assert check_inside(name)
        with pytest.raises(PublishError):
            publish(tmp_path, "net", {MODEL_FILE: [b""], name: [b"x"]})


def test_leftovers_of_the_dead_are_removed_after_a_day(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    push(tmp_path)
    dead, alive, other = (tmp_path / "net" / name for name in (f".{'a' * 16}.tmp", f".{'b' * 16}.tmp", ".mine.tmp"))
    for each in (dead, alive, other):
        each.mkdir()
        (each / "x").write_bytes(b"x")
    old = alive.stat().st_mtime - module._LEFTOVER_S - 1
    for each in (dead, other):
        os.utime(each, (old, old))
    push(tmp_path)
    assert sorted(os.listdir(tmp_path / "net")) == sorted([alive.name, ".mine.tmp", "1", "2"])
