"""Log lines: one for each event whatever it holds, and never more than so many of a kind."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.bin import logs
from penstock.wire.process import fields

log = logging.getLogger("penstock.test")

OWN = {"time", "level", "process", "pid", "event"}

simple = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary()
values = st.recursive(
    simple,
    lambda inner: st.lists(inner) | st.dictionaries(st.text() | st.integers() | st.tuples(st.integers()), inner),
    max_leaves=8,
)
keys = st.text(min_size=1).filter(lambda key: not key.startswith("about_") and key != "exception")


@pytest.fixture(autouse=True)
def logging_as_before() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


def record(event: str, about: dict[str, Any] | None = None, at: float = 0.0, level: int = 30) -> logging.LogRecord:
    made = logging.LogRecord("penstock.test", level, "", 0, event, None, None)
    made.created, made.msecs = at, at % 1 * 1000
    if about is not None:
        made.__dict__["fields"] = about
    return made


def line_of(form: str, made: logging.LogRecord, role: str = "broker") -> str:
    """What one handler with this format writes for a record, without the line's end."""
    logs.set_up(role, form, "debug")
    [handler] = logging.getLogger().handlers
    return handler.format(made)


def strict(line: str) -> dict[str, Any]:
    """The JSON object of a line; NaN and infinities are no JSON."""

    def refuse(token: str) -> None:
        raise AssertionError(f"{token} is no JSON")

    value = json.loads(line, parse_constant=refuse)
    assert isinstance(value, dict)
    return value


def test_text_has_the_time_the_level_the_process_the_event_and_its_fields() -> None:
    at = 1_700_000_000.625
    line = line_of("text", record("requests refused", {"count": 3, "code": "overloaded"}, at))
    clock = datetime.fromtimestamp(at).strftime("%H:%M:%S")
    assert line == f"{clock}.625 W broker: requests refused count=3 code=overloaded"


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("", '""'),
        ("a b", '"a b"'),
        ('a"b', '"a\\"b"'),
        ("a\nb", '"a\\nb"'),
        ("\u202e", '"\\u202e"'),
        ("\udcff", '"\\udcff"'),
        ("grün", "grün"),
        (None, "None"),
        (1.5, "1.5"),
    ],
)
def test_a_value_in_text_is_quoted_where_it_would_not_be_one_word(value: object, shown: str) -> None:
    assert line_of("text", record("event", {"key": value})).endswith(f" key={shown}")


@settings(max_examples=80, deadline=None)
@given(st.text(), st.text(), st.dictionaries(st.text(), values, max_size=4))
def test_text_is_one_printable_line_whatever_the_event_holds(role: str, event: str, about: dict[str, Any]) -> None:
    line = line_of("text", record(event, about), role)
    assert line.isprintable()
    assert len(line.splitlines()) == 1


@settings(max_examples=80, deadline=None)
@given(st.text().filter(str.isprintable))
def test_what_can_be_printed_stands_in_text_as_it_is(event: str) -> None:
    assert line_of("text", record(event)).endswith(f" W broker: {event}")


def test_line_ends_in_text_can_be_told_from_what_is_written_so() -> None:
    assert line_of("text", record("a\r\nb\x1b[31m")).endswith(": a\\r\\nb\\u001b[31m")


@settings(max_examples=120, deadline=None)
@given(st.text(), st.text(), st.dictionaries(keys, values, max_size=4))
def test_json_is_one_object_a_line_whatever_the_fields_hold(role: str, event: str, about: dict[str, Any]) -> None:
    line = line_of("json", record(event, about), role)
    assert line.isascii()
    assert len(line.splitlines()) == 1
    found = strict(line)
    assert (found["process"], found["event"], found["pid"], found["level"]) == (role, event, os.getpid(), "warning")
    assert found.keys() == OWN | {f"about_{key}" if key in OWN else key for key in about}


@settings(max_examples=80, deadline=None)
@given(st.dictionaries(keys, st.none() | st.booleans() | st.integers() | st.text() | st.lists(st.text()), max_size=4))
def test_what_json_can_carry_comes_back_from_it(about: dict[str, Any]) -> None:
    found = strict(line_of("json", record("event", about)))
    assert {key: found[f"about_{key}" if key in OWN else key] for key in about} == about


@pytest.mark.parametrize("value", [float("nan"), [float("-inf")], {(1, 2): 3}], ids=repr)
def test_what_json_cannot_carry_becomes_text_and_harms_no_other_field(value: object) -> None:
    found = strict(line_of("json", record("event", {"odd": value, "count": 3, "pid": 4, "name": "x"})))
    assert found["odd"] == str(value)
    assert (found["count"], found["about_pid"], found["pid"], found["name"]) == (3, 4, os.getpid(), "x")


def test_a_value_that_holds_itself_becomes_text() -> None:
    value: list[Any] = []
    value.append(value)
    assert strict(line_of("json", record("event", {"value": value})))["value"] == "[[...]]"


def test_a_path_or_any_other_object_becomes_text_alone() -> None:
    about = {"since": timedelta(1), "ratio": 0.5}
    found = strict(line_of("json", record("event", about)))
    assert (found["since"], found["ratio"]) == ("1 day, 0:00:00", 0.5)


def test_the_time_in_json_is_utc_with_milliseconds() -> None:
    at = 1_700_000_000.03125
    found = strict(line_of("json", record("event", at=at)))
    assert datetime.fromisoformat(found["time"]) == datetime.fromtimestamp(1_700_000_000, UTC) + timedelta(
        milliseconds=31
    )


@pytest.mark.parametrize("form", logs.FORMATS)
def test_an_exception_is_logged_with_its_traceback(form: str, capsys: pytest.CaptureFixture[str]) -> None:
    logs.set_up("worker", form, "info")
    try:
        raise ValueError("two\nlines")
    except ValueError:
        log.exception("it failed", extra=fields(model="m"))
    written = capsys.readouterr().err
    if form == "json":
        [line] = written.splitlines()
        assert strict(line)["exception"].endswith("ValueError: two\nlines")
    else:
        first, second, *_ = written.splitlines()
        assert first.endswith(" E worker: it failed model=m")
        assert second == "Traceback (most recent call last):"
        assert written.endswith("ValueError: two\nlines\n")


@pytest.mark.parametrize(("level", "shown"), [("debug", 4), ("info", 3), ("warning", 2), ("error", 1)])
def test_what_is_below_the_level_is_not_logged(level: str, shown: int, capsys: pytest.CaptureFixture[str]) -> None:
    logs.set_up("broker", "text", level)
    for number in (logging.DEBUG, logging.INFO, logging.WARNING, logging.ERROR):
        log.log(number, "level %d", number)
    assert len(capsys.readouterr().err.splitlines()) == shown


def test_setting_up_again_replaces_what_was_there(capsys: pytest.CaptureFixture[str]) -> None:
    logs.set_up("first", "text", "info")
    logs.set_up("second", "text", "info")
    log.warning("once")
    captured = capsys.readouterr()
    assert captured.err.count("once") == 1
    assert "second: once" in captured.err
    assert captured.out == ""
    assert sys.stderr is not None


# --- floods ---


def passed(repeats: logs.RepeatFilter, *at: float, event: str = "flood", level: int = 30) -> list[logging.LogRecord]:
    made = [record(event, at=each, level=level) for each in at]
    return [each for each in made if repeats.filter(each)]


def test_a_flood_of_one_event_is_cut_off_and_the_next_interval_says_how_much() -> None:
    repeats = logs.RepeatFilter(repeats_max=3, interval_s=10.0)
    assert len(passed(repeats, *[100.0] * 8)) == 3
    assert passed(repeats, 109.9) == []
    [first, second] = passed(repeats, 110.0, 111.0)
    assert getattr(first, "fields", {}) == {"held_back": 6}
    assert getattr(second, "fields", {}) == {}


def test_how_many_were_held_back_stands_beside_what_the_line_says_itself() -> None:
    repeats = logs.RepeatFilter(repeats_max=1, interval_s=1.0)
    passed(repeats, 5.0, 5.0)
    later = record("flood", {"peer": "x"}, at=6.0)
    assert repeats.filter(later)
    assert later.__dict__["fields"] == {"peer": "x", "held_back": 1}


def test_events_and_levels_are_counted_by_themselves() -> None:
    repeats = logs.RepeatFilter(repeats_max=1, interval_s=10.0)
    assert len(passed(repeats, 1.0, 1.0)) == 1
    assert len(passed(repeats, 1.0, 1.0, event="other")) == 1
    assert len(passed(repeats, 1.0, 1.0, level=40)) == 1


def test_a_clock_that_is_set_back_silences_nothing() -> None:
    repeats = logs.RepeatFilter(repeats_max=1, interval_s=10.0)
    assert len(passed(repeats, 1e9, 1e9)) == 1
    [line] = passed(repeats, 1e6)
    assert getattr(line, "fields", {}) == {"held_back": 1}


def test_kinds_without_end_do_not_fill_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "_KINDS_MAX", 5)
    repeats = logs.RepeatFilter(repeats_max=1, interval_s=10.0)
    for number in range(100):
        assert len(passed(repeats, 1.0, event=f"event {number}")) == 1
        assert len(repeats._seen) <= 5


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 5), st.lists(st.floats(0, 4), max_size=60))
def test_no_interval_has_more_lines_of_a_kind_than_allowed_and_none_is_forgotten(
    repeats_max: int, pauses: list[float]
) -> None:
    repeats, at, lines, asked = logs.RepeatFilter(repeats_max, 10.0), 1000.0, 0, 0
    held_back = 0
    for pause in pauses:
        at += pause
        asked += 1
        for line in passed(repeats, at):
            lines += 1
            held_back += getattr(line, "fields", {}).get("held_back", 0)
    [last] = passed(repeats, at + 10.001)  # sums of floats are not exact
    held_back += getattr(last, "fields", {}).get("held_back", 0)
    assert lines + held_back == asked
    assert lines <= repeats_max * ((at - 1000.0) // 10.0 + 1)


@pytest.mark.parametrize("form", logs.FORMATS)
def test_a_flood_is_cut_off_in_a_log_that_is_set_up(form: str, capsys: pytest.CaptureFixture[str]) -> None:
    logs.set_up("gateway", form, "info")
    for number in range(50):
        log.warning("bad request", extra=fields(number=number))
    assert len(capsys.readouterr().err.splitlines()) == 10
