"""Log lines: text for people, JSON for machines, and never more than so many of a kind."""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from typing import Any, Final

FORMATS: Final = ("text", "json")
_REPEATS_MAX: Final = 10  # lines of one event and level in one interval; the rest are counted
_INTERVAL_S: Final = 10.0
_KINDS_MAX: Final = 10_000  # that are counted


def set_up(role: str, form: str, level: str) -> None:
    """Log to standard error. ``role`` stands in every line; ``form`` is one of FORMATS."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_JsonFormatter(role) if form == "json" else _TextFormatter(role))
    handler.addFilter(RepeatFilter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())


class RepeatFilter(logging.Filter):
    """Lets so many lines of a kind through in an interval; the first of the next interval says how many it held back.

    A flood of bad requests must not become a flood of lines.
    """

    def __init__(self, repeats_max: int = _REPEATS_MAX, interval_s: float = _INTERVAL_S) -> None:
        super().__init__()
        self._repeats_max = repeats_max
        self._interval_s = interval_s
        self._seen: dict[tuple[str, str, int], tuple[float, int]] = {}  # since when, how many

    def filter(self, record: logging.LogRecord) -> bool:
        key = (record.name, str(record.msg), record.levelno)
        since, count = self._seen.get(key, (record.created, 0))
        if not 0 <= record.created - since < self._interval_s:  # nor is a clock that was set back waited for
            if count > self._repeats_max:
                held_back = {"held_back": count - self._repeats_max}
                record.__dict__["fields"] = {**getattr(record, "fields", {}), **held_back}
            since, count = record.created, 0
        if len(self._seen) >= _KINDS_MAX:
            self._seen.clear()
        self._seen[key] = since, count + 1
        return count < self._repeats_max


class _TextFormatter(logging.Formatter):
    """``12:34:56.789 W broker: requests refused count=3 code=overloaded``"""

    def __init__(self, role: str) -> None:
        super().__init__()
        self._role = role

    def format(self, record: logging.LogRecord) -> str:
        stamp = time.strftime("%H:%M:%S", time.localtime(record.created))
        words = [f"{stamp}.{int(record.msecs):03d} {record.levelname[0]} {self._role}: {record.getMessage()}"]
        words += [f"{key}={_quoted(value)}" for key, value in getattr(record, "fields", {}).items()]
        line = _printable(" ".join(words))
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


class _JsonFormatter(logging.Formatter):
    """One object a line: time (RFC 3339, UTC), level, process, pid, event, and the fields of the event. A field with
    the name of one of those is about another process: "about_pid" is not the pid of who says it."""

    def __init__(self, role: str) -> None:
        super().__init__()
        self._role = role

    def format(self, record: logging.LogRecord) -> str:
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line: dict[str, Any] = {
            "time": f"{stamp}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "process": self._role,
            "pid": os.getpid(),
            "event": record.getMessage(),
        }
        own = frozenset(line)
        for key, value in getattr(record, "fields", {}).items():
            line[f"about_{key}" if key in own else key] = value
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        try:
            return json.dumps(line, default=str, allow_nan=False)
        except (TypeError, ValueError):  # NaN, keys of a dictionary that JSON has not, what holds itself
            return json.dumps({key: value if isinstance(value, int) else str(value) for key, value in line.items()})


def _printable(text: str) -> str:
    """With escapes for line ends and whatever else cannot be seen: one event is one line."""
    if text.isprintable():
        return text
    return "".join(each if each.isprintable() else json.dumps(each)[1:-1] for each in text)


def _quoted(value: object) -> str:
    text = str(value)
    return text if text and text.isprintable() and " " not in text and '"' not in text else json.dumps(text)
