"""Traces: what a broker has recorded, read back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.broker.record import COLUMNS, Recorder
from penstock.simulate.scenario import ScenarioError
from penstock.simulate.trace import Asked, read_trace
from penstock.wire.messages import Form, Requests

HEAD: dict[str, Any] = {"penstock_trace": 1, "began": 100.0, "columns": COLUMNS}
GROUP: list[Any] = [1.0, "m", "1", 1, 2, 30, "t", 3, 5000]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "trace.jsonl"


def write(path: Path, *lines: Any) -> Path:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def test_what_is_recorded_is_read(path: Path) -> None:
    recorder = Recorder(path)
    recorder.start(50.0)
    form = Form("m", "", 3, "größe", 2, 30, b"", b"layout")
    recorder.add([Requests(form, (1, 2), (500, 500)), Requests(form._replace(rows=1), (3,), (9,))], 51.0)
    recorder.add([Requests(form, (4, 5), (500, 600), (0, 64))], 51.25)
    recorder.stop()
    trace = read_trace(path)
    assert trace.asked == (Asked("m", "", 2, 30, "größe", 3), Asked("m", "", 1, 30, "größe", 3))
    assert trace.groups == [(0.0, 0, (500, 500)), (0.0, 1, (9,)), (0.25, 0, (500, 600))]
    assert trace.requests == 5


def test_the_next_life_of_the_broker_goes_on_where_it_began(path: Path) -> None:
    later = HEAD | {"began": 110.0}
    trace = read_trace(write(path, HEAD, GROUP, later, GROUP))
    assert [at for at, _, _ in trace.groups] == [0.0, 10.0]


def test_a_line_that_was_torn_by_a_crash_is_left_out(path: Path) -> None:
    assert read_trace(write(path, HEAD, GROUP, '[1.0,"m"')).requests == 1
    assert read_trace(write(path, HEAD, GROUP, '[1.0,"m"', HEAD, GROUP)).requests == 2


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ([], "line 1: this is no trace"),
        (["x = 1"], "line 1: this is no trace"),
        ([GROUP], "line 1: this is no trace"),
        ([HEAD], "there is no request in it"),
        ([HEAD, "[", GROUP], "line 2: this is no JSON"),
        ([HEAD | {"penstock_trace": 2}, GROUP], "line 1: not a trace of version 1"),
        ([HEAD | {"began": "now"}, GROUP], "line 1: 'began' is a time of day"),
        ([HEAD, GROUP, GROUP[:-1]], "line 3: a group of requests has seconds, model"),
        ([HEAD, [-1.0, *GROUP[1:]]], "line 2: 'seconds' cannot be -1.0"),
        ([HEAD, [1.0, 7, *GROUP[2:]]], "line 2: 'model' cannot be 7"),
        ([HEAD, [*GROUP[:3], 0, *GROUP[4:]]], "line 2: 'count' cannot be 0"),
        ([HEAD, [*GROUP[:3], True, *GROUP[4:]]], "line 2: 'count' cannot be True"),
        ([HEAD, [*GROUP[:7], 9, 5000]], "line 2: 'priority' cannot be 9"),
        ([HEAD, [*GROUP[:8], [1, 2]]], "line 2: 'timeout_us' cannot be"),
        ([HEAD, [*GROUP[:8], -1]], "line 2: 'timeout_us' cannot be -1"),
    ],
)
def test_what_is_no_trace_is_named_by_its_line(path: Path, lines: list[Any], said: str) -> None:
    with pytest.raises(ScenarioError) as raised:
        read_trace(write(path, *lines))
    assert str(raised.value).startswith(f"{path}: {said}"), raised.value


def test_a_file_that_cannot_be_read(path: Path) -> None:
    with pytest.raises(ScenarioError, match="cannot be read"):
        read_trace(path)
    path.write_bytes(b"\xff\xff\n")
    with pytest.raises(ScenarioError, match="cannot be read"):
        read_trace(path)


_json = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=5), st.lists, max_leaves=12
)


@given(st.lists(st.one_of(_json, st.just(HEAD), st.just(GROUP)), max_size=5))
def test_any_lines_are_read_or_refused(tmp_path_factory: pytest.TempPathFactory, lines: list[Any]) -> None:
    path = tmp_path_factory.mktemp("trace") / "t"
    said = f"{path}: "
    try:
        read_trace(write(path, *lines))
    except ScenarioError as error:
        said = str(error)
    assert said.startswith(f"{path}: ")
