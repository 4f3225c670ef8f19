"""What is written is there whole, or what was there before is."""

from __future__ import annotations

import os
import resource
from pathlib import Path

import pytest

from penstock.bin.files import write_whole


def test_a_file_that_finds_no_room_leaves_the_old_one_whole(tmp_path: Path) -> None:
    """A limit on files stands for a disk: the same call fails, with another word."""
    path = tmp_path / "report.html"
    write_whole(path, "old")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            write_whole(path, b"x" * 1001)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["report.html"]


def test_what_is_no_file_is_written_to(tmp_path: Path) -> None:
    path = tmp_path / "pipe"
    os.mkfifo(path)
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        write_whole(path, "ü")
        assert os.read(reader, 10) == "ü".encode()
    finally:
        os.close(reader)
    with pytest.raises(OSError, match="No space left on device"):
        write_whole(Path("/dev/full"), "x")
