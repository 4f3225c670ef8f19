"""Reads what ``--record`` on a live broker has written; broker/record.py says what that looks like."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple

from penstock.broker.record import COLUMNS, TRACE_VERSION
from penstock.simulate.scenario import ScenarioError
from penstock.wire.messages import MAX_NAME, MAX_PRIORITY, MAX_REQUESTS, MAX_TENANT, MAX_TIMEOUT_US

REQUESTS_MAX: Final = 20_000_000  # of a trace, and of a scenario
_SIZES_MAX: Final = 1 << 40


class Asked(NamedTuple):
    """What requests of a trace have in common. ``version``: as it was asked for."""

    model: str
    version: str
    rows: int
    nbytes: int
    tenant: str
    priority: int


@dataclass(frozen=True, slots=True)
class Trace:
    """``groups``: when, counted from the first of all and ascending; what, by its place in ``asked``; and what is left
    of each request's time, in microseconds."""

    asked: tuple[Asked, ...]
    groups: list[tuple[float, int, tuple[int, ...]]]

    @property
    def requests(self) -> int:
        return sum(len(timeouts) for _, _, timeouts in self.groups)


def read_trace(path: Path) -> Trace:
    """Raises ScenarioError naming the line. One that ends in the middle of a line, as after a crash, is read up to
    there; so is a part before a new head."""
    try:
        with path.open(encoding="utf-8") as file:
            return _read(path, file)
    except (OSError, UnicodeDecodeError) as error:
        raise ScenarioError(f"{path} cannot be read: {error}") from None


def _read(path: Path, lines: Iterator[str]) -> Trace:
    known: dict[Asked, int] = {}
    groups: list[tuple[float, int, tuple[int, ...]]] = []
    first_began: float | None = None
    offset = 0.0
    count = 0
    torn = 0  # the line that could not be read, if it was the last
    for number, line in enumerate(lines, 1):
        try:
            value = json.loads(line)
        except ValueError:
            if torn:
                break
            torn = number
            continue
        if isinstance(value, dict):
            began = _head(path, number, value)
            first_began = began if first_began is None else first_began
            offset = began - first_began
            torn = 0
            continue
        if torn or first_began is None:
            break
        at, asked, timeouts = _group(path, number, value)
        count += len(timeouts)
        if count > REQUESTS_MAX:
            raise ScenarioError(f"{path}: line {number}: a trace has at most {REQUESTS_MAX:,} requests")
        groups.append((offset + at, known.setdefault(asked, len(known)), timeouts))
    else:
        if first_began is not None and groups:
            groups.sort(key=lambda group: group[0])  # a clock that was set back between two lives of the broker
            begin = groups[0][0]
            return Trace(tuple(known), [(at - begin, kind, timeouts) for at, kind, timeouts in groups])
    if first_began is None:
        raise ScenarioError(f"{path}: line 1: this is no trace: its first line has no 'penstock_trace'")
    if torn:
        raise ScenarioError(f"{path}: line {torn}: this is no JSON")
    raise ScenarioError(f"{path}: there is no request in it")


def _head(path: Path, number: int, value: dict[str, Any]) -> float:
    if value.get("penstock_trace") != TRACE_VERSION or tuple(value.get("columns", ())) != COLUMNS:
        raise ScenarioError(f"{path}: line {number}: not a trace of version {TRACE_VERSION}, with {', '.join(COLUMNS)}")
    began = value.get("began")
    if isinstance(began, bool) or not isinstance(began, int | float) or not 0 <= began < 1e12:
        raise ScenarioError(f"{path}: line {number}: 'began' is a time of day in seconds, not {began!r:.50}")
    return float(began)


def _group(path: Path, number: int, value: Any) -> tuple[float, Asked, tuple[int, ...]]:
    def wrong(column: str, given: Any) -> ScenarioError:
        return ScenarioError(f"{path}: line {number}: '{column}' cannot be {given!r:.50}")

    if not isinstance(value, list) or len(value) != len(COLUMNS):
        raise ScenarioError(f"{path}: line {number}: a group of requests has {', '.join(COLUMNS)}")
    seconds, model, version, count, rows, nbytes, tenant, priority, timeout = value
    if type(seconds) not in (int, float) or not 0 <= seconds < 1e9:
        raise wrong("seconds", seconds)
    for column, text, most in (
        ("model", model, MAX_NAME),
        ("version", version, MAX_NAME),
        ("tenant", tenant, MAX_TENANT),
    ):
        if not isinstance(text, str) or len(text) > most:
            raise wrong(column, text)
    for column, whole, least, most in (
        ("count", count, 1, MAX_REQUESTS),
        ("rows", rows, 1, _SIZES_MAX),
        ("bytes", nbytes, 0, _SIZES_MAX),
        ("priority", priority, 0, MAX_PRIORITY),
    ):
        if type(whole) is not int or not least <= whole <= most:
            raise wrong(column, whole)
    timeouts = timeout if isinstance(timeout, list) else [timeout] * count
    if len(timeouts) != count or any(type(each) is not int or not 0 <= each <= MAX_TIMEOUT_US for each in timeouts):
        raise wrong("timeout_us", timeout)
    return float(seconds), Asked(model, version, rows, nbytes, tenant, priority), tuple(timeouts)
