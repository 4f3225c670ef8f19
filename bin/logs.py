"""Log lines: text for people, JSON for machines, and never more than so many of a kind."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import select
import socket
import stat
import sys
import time
from collections.abc import Callable
from threading import Timer
from typing import Any, Final, TextIO, TypeAlias

from penstock.wire import process

FORMATS: Final = ("text", "json")
_REPEATS_MAX: Final = 10  # lines of a kind in one interval; the rest are counted
_INTERVAL_S: Final = 10.0  # after it, too, it is told how many those are
_KINDS_MAX: Final = 10_000  # that are known

_STDERR: Final = 2
_ROOM_MAX_S: Final = 0.2  # for who reads the log to make room in a pipe
_LOST: Final = "log lines could not be written"

_Kind: TypeAlias = tuple[str, str, int, object]  # logger, event, level, and the code, of what has one


def set_up(role: str, form: str, level: str) -> None:
    """Log to standard error. ``role`` stands in every line; ``form`` is one of FORMATS."""
    # A line that is held back costs what its record does: a third of it for what no line of ours says, where it was
    # made and on which thread.
    logging._srcfile = None
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    root = logging.getLogger()
    handler = _Handler(_JsonFormatter(role) if form == "json" else _TextFormatter(role))
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    process.holds_back = handler.holds_back


class Unbroken(io.RawIOBase):
    """A descriptor to write to that never fails: on a full disk, or with nobody who reads, lines are lost and counted
    in ``lost``. What is written goes out at once, so that nothing old is in the way later; what comes behind a line
    that could only be begun begins a new one. Whoever reads slowly is waited for a little; whoever has stopped, as a
    pager does and a terminal after Ctrl-S, once, and then not until there is room again."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._opened = contextlib.ExitStack()
        self._send = _sender(fd, self._opened)
        self._stuck = False
        self._torn = False
        self.lost = 0

    def writable(self) -> bool:
        return True

    def isatty(self) -> bool:
        return os.isatty(self._fd)

    def fileno(self) -> int:
        return self._fd

    def write(self, data: Any) -> int:
        left = memoryview(data).cast("B")
        size = len(left)
        try:
            if self._torn:
                self._write(memoryview(b"\n"))
                self._torn = False
            while left:
                written = self._write(left)
                left = left[written:]
        except OSError:
            self.lost += bytes(left).count(b"\n")
            self._torn |= 0 < len(left) < size
        return size

    def close(self) -> None:
        self._opened.close()
        super().close()

    def _write(self, data: memoryview) -> int:
        """Raises OSError."""
        until = 0.0
        while True:
            try:
                written = self._send(data)
            except BlockingIOError:
                if self._stuck:
                    raise
                until = until or time.monotonic() + _ROOM_MAX_S
                self._stuck = not self._has_room(until - time.monotonic())
            else:
                self._stuck = False
                return written

    def _has_room(self, limit_s: float) -> bool:
        poll = select.poll()
        poll.register(self._fd, select.POLLOUT)
        return limit_s > 0 and bool(poll.poll(limit_s * 1000))


def _sender(fd: int, opened: contextlib.ExitStack) -> Callable[[memoryview], int]:
    """What writes to a descriptor, and raises BlockingIOError where it would wait, as far as it can be had. The
    descriptor itself stays as it is: other processes have it too. ``opened``: what is to be closed in the end."""
    with contextlib.suppress(OSError):
        if stat.S_ISSOCK(os.fstat(fd).st_mode):
            channel = opened.enter_context(socket.socket(fileno=os.dup(fd)))
            return lambda data: channel.send(data, socket.MSG_DONTWAIT)
        if stat.S_ISFIFO(os.fstat(fd).st_mode) or os.isatty(fd):
            own = os.open(f"/proc/self/fd/{fd}", os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
            opened.callback(os.close, own)
            return lambda data: os.write(own, data)
    return lambda data: os.write(fd, data)


def never_fail() -> None:
    """Have standard error lose what cannot be written, whoever writes: no word is worth a process, or its exit code."""
    if isinstance(sys.stderr, io.TextIOWrapper) and not isinstance(sys.stderr.buffer, Unbroken):
        if sys.stderr.fileno() != _STDERR:
            return  # somebody has put another one there
        sys.stderr = io.TextIOWrapper(
            Unbroken(_STDERR),  # unbuffered: nothing waits to fail again later
            encoding=sys.stderr.encoding,
            errors=sys.stderr.errors,
            write_through=True,
        )


class Repeats:
    """Lets so many lines of a kind through in an interval, and counts the others until they are told. A line with a
    field ``count`` stands for so many.

    A flood of bad requests must not become a flood of lines.
    """

    def __init__(self, repeats_max: int = _REPEATS_MAX, interval_s: float = _INTERVAL_S) -> None:
        self._repeats_max = repeats_max
        self._interval_s = interval_s
        self._seen: dict[_Kind, tuple[float, int]] = {}  # since when, how many lines
        self._held_back: dict[_Kind, int] = {}

    def passes(self, record: logging.LogRecord) -> bool:
        said = getattr(record, "fields", {})
        kind = (record.name, str(record.msg), record.levelno, said.get("code"))
        if self.holds_back(kind, record.created, said.get("count", 1)):
            return False
        since, lines = self._seen.get(kind, (record.created, 0))
        if len(self._seen) >= _KINDS_MAX:
            self._seen.clear()
        self._seen[kind] = since, lines + 1
        return True

    def holds_back(self, kind: _Kind, now: float, count: int = 1) -> bool:
        """Whether enough has been said of a kind, and if so, count what is not said. ``now``: Unix time."""
        since, lines = self._seen.get(kind, (now, 0))
        if not 0 <= now - since < self._interval_s:  # nor is a clock that was set back waited for
            self._seen.pop(kind, None)
            return False
        if lines < self._repeats_max:
            return False
        self._held_back[kind] = self._held_back.get(kind, 0) + count
        return True

    def take(self) -> list[logging.LogRecord]:
        """For each kind of which something was held back, a record that says how much. It is told once."""
        held_back, self._held_back = self._held_back, {}
        records = []
        for (name, event, level, code), count in held_back.items():
            record = logging.LogRecord(name, level, "", 0, event, None, None)
            record.__dict__["fields"] = {"held_back": count, **({} if code is None else {"code": code})}
            records.append(record)
        return records


class _Handler(logging.StreamHandler[TextIO]):
    """Writes lines, and of those that are held back how many they were: some seconds later, or at the end. A timer runs
    only while there is something to tell, since an idle process should sleep."""

    def __init__(self, formatter: logging.Formatter) -> None:
        super().__init__(sys.stderr)
        self.setFormatter(formatter)
        self._repeats = Repeats()
        self._timer: Timer | None = None

    def handle(self, record: logging.LogRecord) -> bool:
        self.acquire()
        try:
            passes = self._repeats.passes(record)
            if passes:
                self.emit(record)
            elif self._timer is None:
                self._set_timer()
        finally:
            self.release()
        return passes

    def holds_back(self, name: str, event: str, level: int, code: object) -> bool:
        """See ``process.holds_back``."""
        self.acquire()
        try:
            held_back = self._repeats.holds_back((name, event, level, code), time.time())
            if held_back and self._timer is None:
                self._set_timer()
        finally:
            self.release()
        return held_back

    def emit(self, record: logging.LogRecord) -> None:
        raw = getattr(self.stream, "buffer", None)
        before = raw.lost if isinstance(raw, Unbroken) else 0
        super().emit(record)
        if before and isinstance(raw, Unbroken) and raw.lost == before:  # it can be written again
            raw.lost = 0
            told = logging.LogRecord("penstock", logging.WARNING, "", 0, _LOST, None, None)
            told.__dict__["fields"] = {"count": before}
            super().emit(told)
            raw.lost += before if raw.lost else 0

    def _set_timer(self) -> None:
        timer = Timer(_INTERVAL_S, self.tell)
        timer.daemon = True
        try:
            timer.start()
        except RuntimeError:  # no thread is to be had: the next line that is held back tries again, or the end tells
            return
        self._timer = timer

    def tell(self) -> None:
        """Write how much was held back."""
        self.acquire()
        try:
            self._timer = None
            for record in self._repeats.take():
                self.emit(record)
        finally:
            self.release()

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self.tell()
        super().close()


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
