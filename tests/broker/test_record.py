"""What a broker records: whole lines, no more than it may, and never at the cost of what it serves."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from penstock.broker.record import COLUMNS, Recorder
from penstock.wire.messages import Form, Requests


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "trace.jsonl"


def group(first: int, *timeouts: int) -> Requests:
    ids = tuple(range(first, first + len(timeouts)))
    return Requests(Form("m", "", 2, "t", 3, 40, b"key", b"layout"), ids, timeouts)


def started(path: Path, max_bytes: int = 1 << 20) -> Recorder:
    recorder = Recorder(path, max_bytes)
    recorder.start(100.0)
    return recorder


def test_a_line_for_each_group(path: Path) -> None:
    recorder = started(path)
    recorder.add([group(1, 5), group(2, 7, 7)], 100.5)
    recorder.add([group(4, 8, 9)], 101.0)
    assert len(path.read_text().splitlines()) == 1  # nothing costs a write of its own
    recorder.flush()
    head, *lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert head["penstock_trace"] == 1
    assert tuple(head["columns"]) == COLUMNS
    assert lines == [
        [0.5, "m", "", 1, 3, 40, "t", 2, 5],
        [0.5, "m", "", 2, 3, 40, "t", 2, 7],
        [1.0, "m", "", 2, 3, 40, "t", 2, [8, 9]],
    ]
    recorder.stop()
    assert path.stat().st_mode & 0o777 == 0o600


def test_much_is_written_without_being_told(path: Path) -> None:
    recorder = started(path)
    for number in range(1000):
        recorder.add([group(number, 5)], 100.0)
    assert 500 < len(path.read_text().splitlines()) < 1001
    recorder.stop()
    assert len(path.read_text().splitlines()) == 1001


def test_at_its_limit_it_stops_with_one_warning(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    recorder = started(path, 1000)
    with caplog.at_level(logging.WARNING):
        for number in range(3000):
            recorder.add([group(number, 5)], 100.0)
        recorder.stop()
    assert len(caplog.records) == 1
    assert "nothing more is recorded" in caplog.messages[0]
    data = path.read_bytes()
    assert 900 < len(data) <= 1000
    assert data.endswith(b"\n")
    assert not recorder.recording
    assert started(path, 1000).recording is False  # nor does the next life begin


def test_a_limit_below_the_head_writes_nothing(path: Path) -> None:
    recorder = started(path, 10)
    assert not recorder.recording
    assert path.read_bytes() == b""


def test_the_next_life_of_a_broker_goes_on_behind_what_is_there(path: Path) -> None:
    first = started(path)
    first.add([group(1, 5)], 100.0)
    first.stop()
    with path.open("ab") as file:
        file.write(b"[1.0,")  # it was killed while it wrote
    second = started(path)
    second.add([group(1, 5)], 100.0)
    second.stop()
    kinds = [line[:1] for line in path.read_text().splitlines()]
    assert kinds == ["{", "[", "[", "{", "["]


def test_a_full_disk_ends_the_recording_and_nothing_else(caplog: pytest.LogCaptureFixture) -> None:
    recorder = started(Path("/dev/full"))
    assert not recorder.recording
    recorder.add([group(1, 5)], 100.0)
    recorder.flush()
    recorder.stop()
    assert len([each for each in caplog.messages if "nothing more is recorded" in each]) == 1


def test_a_file_that_cannot_be_opened_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    recorder = started(tmp_path / "none" / "trace")
    assert not recorder.recording
    assert "nothing more is recorded" in caplog.text
