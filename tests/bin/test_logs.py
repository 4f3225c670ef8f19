"""Log lines: one for each event whatever it holds, and never more than so many of a kind."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.bin import logs
from penstock.wire import process
from penstock.wire.process import fields

log = logging.getLogger("penstock.test")

COSTLY = ("_srcfile", "logThreads", "logProcesses", "logMultiprocessing")
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
    handlers, level, holds_back = root.handlers[:], root.level, process.holds_back
    costly = {each: getattr(logging, each) for each in COSTLY}
    yield
    for handler in root.handlers:
        if handler not in handlers:
            handler.close()
    root.handlers[:] = handlers
    root.setLevel(level)
    process.holds_back = holds_back
    for each, value in costly.items():
        setattr(logging, each, value)


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


def passed(repeats: logs.Repeats, *at: float, event: str = "flood", level: int = 30, **about: Any) -> int:
    """How many lines were let through."""
    return sum(repeats.passes(record(event, about, each, level)) for each in at)


def told(repeats: logs.Repeats) -> list[tuple[str, int, dict[str, Any]]]:
    return [(each.getMessage(), each.levelno, each.__dict__["fields"]) for each in repeats.take()]


def test_a_flood_of_one_event_is_cut_off_and_it_is_told_once_how_much() -> None:
    repeats = logs.Repeats(repeats_max=3, interval_s=10.0)
    assert told(repeats) == []
    assert passed(repeats, *[100.0] * 8, 109.9) == 3
    assert passed(repeats, 110.0, 111.0) == 2
    assert told(repeats) == [("flood", 30, {"held_back": 6})]
    assert told(repeats) == []


def test_the_interval_goes_on_when_it_was_told_what_was_held_back() -> None:
    repeats = logs.Repeats(repeats_max=1, interval_s=10.0)
    assert passed(repeats, 100.0, 100.0) == 1
    assert len(repeats.take()) == 1
    assert passed(repeats, 109.0) == 0
    assert told(repeats) == [("flood", 30, {"held_back": 1})]


def test_a_line_that_stands_for_many_is_counted_as_many() -> None:
    repeats = logs.Repeats(repeats_max=1, interval_s=10.0)
    passed(repeats, 100.0, 100.0, count=40)
    passed(repeats, 100.0, count=2)
    assert told(repeats) == [("flood", 30, {"held_back": 42})]


def test_events_levels_and_codes_are_counted_by_themselves() -> None:
    repeats = logs.Repeats(repeats_max=1, interval_s=10.0)
    assert passed(repeats, 1.0, 1.0) == 1
    assert passed(repeats, 1.0, 1.0, event="other") == 1
    assert passed(repeats, 1.0, 1.0, level=40) == 1
    assert passed(repeats, 1.0, 1.0, 1.0, code="deadline") == 1
    assert told(repeats) == [
        ("flood", 30, {"held_back": 1}),
        ("other", 30, {"held_back": 1}),
        ("flood", 40, {"held_back": 1}),
        ("flood", 30, {"held_back": 2, "code": "deadline"}),
    ]


def test_a_clock_that_is_set_back_silences_nothing() -> None:
    repeats = logs.Repeats(repeats_max=1, interval_s=10.0)
    assert passed(repeats, 1e9, 1e9) == 1
    assert passed(repeats, 1e6) == 1


def test_kinds_without_end_do_not_fill_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "_KINDS_MAX", 5)
    repeats = logs.Repeats(repeats_max=1, interval_s=10.0)
    for number in range(100):
        assert passed(repeats, 1.0, event=f"event {number}") == 1
        assert len(repeats._seen) <= 5
    assert told(repeats) == []


def test_who_asks_first_is_told_what_holds_for_lines() -> None:
    repeats, kind = logs.Repeats(repeats_max=2, interval_s=10.0), ("penstock.test", "flood", 30, None)
    for at in 100.0, 100.0:
        assert not repeats.holds_back(kind, at)
        assert passed(repeats, at) == 1
    assert repeats.holds_back(kind, 101.0)
    assert repeats.holds_back(kind, 109.0, 3)
    assert passed(repeats, 109.5) == 0
    assert not repeats.holds_back((*kind[:3], "deadline"), 109.0)
    assert not repeats.holds_back(kind, 110.0)
    assert passed(repeats, 110.0, 110.0, 110.0) == 2
    assert told(repeats) == [("flood", 30, {"held_back": 6})]


def test_nothing_is_held_back_where_no_log_is_set_up() -> None:
    assert flood(50, asks=True) == 50


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 5), st.lists(st.tuples(st.floats(0, 4), st.integers(1, 9), st.booleans()), max_size=60))
def test_no_interval_has_more_lines_of_a_kind_than_allowed_and_none_is_forgotten(
    repeats_max: int, asked: list[tuple[float, int, bool]]
) -> None:
    repeats, at, lines, said = logs.Repeats(repeats_max, 10.0), 1000.0, 0, 0
    for pause, count, tell in asked:
        at += pause
        if passed(repeats, at, count=count):
            lines += 1
            said += count
        if tell:
            said += sum(about["held_back"] for _, _, about in told(repeats))
    said += sum(about["held_back"] for _, _, about in told(repeats))
    assert said == sum(count for _, count, _ in asked)
    assert lines <= repeats_max * ((at - 1000.0) // 10.0 + 1)


def flood(lines: int, asks: bool = False) -> int:
    """How many lines were made. ``asks``: whether they would be held back, before they are."""
    made = 0
    for number in range(lines):
        if not asks or not process.holds_back(log.name, "bad request", logging.WARNING, "bad_input"):
            log.warning("bad request", extra=fields(number=number, code="bad_input"))
            made += 1
    return made


@pytest.mark.parametrize("asks", [False, True])
@pytest.mark.parametrize("form", logs.FORMATS)
def test_a_flood_is_cut_off_in_a_log_that_is_set_up_and_told_of_at_the_end(
    form: str, asks: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    logs.set_up("gateway", form, "info")
    assert flood(50, asks) == (10 if asks else 50)
    assert len(capsys.readouterr().err.splitlines()) == 10
    [handler] = logging.getLogger().handlers
    handler.close()
    [line] = capsys.readouterr().err.splitlines()
    if form == "json":
        found = strict(line)
        assert (found["event"], found["level"], found["held_back"]) == ("bad request", "warning", 40)
    else:
        assert line.endswith(" W gateway: bad request held_back=40 code=bad_input")


@pytest.mark.parametrize("asks", [False, True])
def test_a_flood_that_is_over_is_told_of_while_the_process_runs(
    asks: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logs, "_INTERVAL_S", 0.0)  # of the timer alone
    logs.set_up("gateway", "json", "info")
    flood(10, asks)
    assert not timers(), "a timer runs, and there is nothing to tell"
    flood(30, asks)
    while running := timers():
        running[0].join()
    lines = [strict(line) for line in capsys.readouterr().err.splitlines()]
    assert sum(line.get("held_back", 0) for line in lines) == 30
    assert len([line for line in lines if "number" in line]) == 10


def timers() -> list[threading.Timer]:
    """Of the handler that is there now: one that was there before may tell something still."""
    [handler] = logging.getLogger().handlers
    running = [each for each in threading.enumerate() if isinstance(each, threading.Timer)]
    return [each for each in running if getattr(each.function, "__self__", None) is handler]


def test_where_no_thread_is_to_be_had_a_flood_harms_nobody(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(timer: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Timer, "start", refuse)
    logs.set_up("gateway", "text", "info")
    flood(12)
    [handler] = logging.getLogger().handlers
    handler.close()
    assert capsys.readouterr().err.splitlines()[-1].endswith(" held_back=2 code=bad_input")


def test_a_process_that_ends_in_a_flood_tells_of_it_and_does_not_wait() -> None:
    script = (
        "import logging\n"
        "from penstock.bin import logs\n"
        "logs.set_up('broker', 'text', 'info')\n"
        "for _ in range(25): logging.getLogger('penstock').warning('refused')\n"
    )
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=9.0, check=True)
    lines = ended.stderr.splitlines()
    assert len(lines) == 11
    assert lines[-1].endswith(" W broker: refused held_back=15")


# --- standard error that cannot be written ---


@pytest.mark.parametrize("form", logs.FORMATS)
def test_lines_that_find_no_room_are_counted_and_told_of_later(form: str, tmp_path: Path) -> None:
    """A limit on files stands for a disk, which ends in the middle of a line and has room again later."""
    script = (
        "import logging, resource, sys\n"
        "from penstock.bin import logs\n"
        "logs.never_fail()\n"
        "logs.set_up('broker', sys.argv[1], 'info')\n"
        "log = logging.getLogger('penstock')\n"
        "log.info('first')\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (120, resource.RLIM_INFINITY))\n"
        "for number in range(5): log.info('lost %d', number)\n"
        "print('lost too', file=sys.stderr)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)\n"
        "log.info('second')\n"
        "log.info('third')\n"
    )
    path = tmp_path / "log"
    with path.open("wb") as file:
        subprocess.run([sys.executable, "-B", "-c", script, form], stderr=file, timeout=60, check=True)
    lines = path.read_text().splitlines()
    first, *torn, second, told, third = lines
    assert [word in line for word, line in zip(("first", "second", "third"), (first, second, third), strict=True)] == (
        [True] * 3
    )
    assert "log lines could not be written" in told
    count = strict(told)["count"] if form == "json" else int(told.rpartition("count=")[2])
    written = sum("lost" in line for line in torn[:-1])
    assert written + count == 6


def test_standard_error_that_is_full_changes_no_exit_code() -> None:
    with open("/dev/full", "wb") as full:
        for script in ("sys.exit(2)", "sys.exit('a sentence')", "logs.set_up('x', 'text', 'info'); 1 / 0"):
            code = f"import sys; from penstock.bin import logs; logs.never_fail(); {script}"
            done = subprocess.run([sys.executable, "-c", code], stderr=full, timeout=60, check=False)
            assert done.returncode == (2 if "2" in script else 1)


def test_standard_output_that_is_full_is_a_sentence() -> None:
    command = [sys.executable, "-m", "penstock.bin", "--help"]
    with open("/dev/full", "wb") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("penstock: there is no room for what is to be written (standard output, ")
    assert done.stderr.endswith(": No space left on device\n")


@pytest.mark.parametrize("pair", [os.pipe, lambda: [each.detach() for each in socket.socketpair()]])
def test_who_stops_reading_the_log_holds_nobody_up(pair: Callable[[], Sequence[int]]) -> None:
    """A pager, or a terminal after Ctrl-S: lines are lost until it reads again."""
    reader, writer = pair()
    try:
        log = logs.Unbroken(writer)
        for number in range(1000):
            log.write(b"%4d %b\n" % (number, bytes(1000)))
        assert 0 < log.lost < 1000
        assert os.get_blocking(writer), "others that write there are not changed"
        os.set_blocking(reader, False)
        with contextlib.suppress(BlockingIOError):
            while os.read(reader, 1 << 20):
                pass
        lost = log.lost
        log.write(b"again\n")
        assert log.lost == lost
        assert os.read(reader, 1 << 20).endswith(b"again\n")
    finally:
        os.close(reader)
        os.close(writer)
