"""A trace of what is asked of a broker, for ``penstock simulate``: when, of which model, how much; never a tensor.

A line of JSON for each group of requests that came together, behind a head for each life of the broker:

    {"penstock_trace": 1, "began": 1700000000.25, "columns": ["seconds", "model", ...]}
    [0.001234, "digits", "1", 3, 1, 3136, "", 0, 30000000]

``seconds`` count from ``began``, a time of day; ``timeout_us`` is one number for the group, or a list where they
differ. A file that is there is continued, so that a broker that is started anew records on.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import orjson

from penstock.broker.options import RECORD_MAX_BYTES
from penstock.wire.messages import UNNAMED, Requests
from penstock.wire.process import fields

log = logging.getLogger("penstock.broker")

TRACE_VERSION: Final = 1
COLUMNS: Final = ("seconds", "model", "version", "count", "rows", "bytes", "tenant", "priority", "timeout_us")
_BUFFER_GROUPS: Final = 256  # that are written together, in a fifth of a millisecond


class Recorder:
    """Writes to a file until it has ``max_bytes``, or cannot be written; then it says so once, and nothing more.

    ``start`` opens, ``add`` takes what came, ``flush`` writes it, ``stop`` closes. None of them raises. An ``add``
    costs a fifth of a microsecond, and a group another when it is written.
    """

    def __init__(self, path: Path, max_bytes: int = RECORD_MAX_BYTES) -> None:
        self._path = path
        self._max_bytes = max_bytes
        self._fd = -1
        self._size = 0
        self._began = 0.0  # of the monotonic clock
        self._waiting: list[tuple[float, Requests]] = []

    @property
    def recording(self) -> bool:
        return self._fd >= 0

    def start(self, now: float) -> None:
        """``now``: of the clock that ``add`` is told the time of."""
        try:
            # As what only this user is to read: names of models and tenants are in it.
            flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK
            self._fd = os.open(self._path, flags, 0o600)
            self._size = os.fstat(self._fd).st_size
            torn = self._size > 0 and os.pread(self._fd, 1, self._size - 1) != b"\n"
        except OSError as error:
            self._give_up(error.strerror or str(error))
            return
        self._began = now
        head = {"penstock_trace": TRACE_VERSION, "began": round(time.time(), 6), "columns": COLUMNS}
        self._write((b"\n" if torn else b"") + orjson.dumps(head) + b"\n")
        if self.recording:
            log.info("recording what is asked", extra=fields(file=str(self._path), max_bytes=self._max_bytes))

    def add(self, groups: Sequence[Requests], now: float) -> None:
        """Groups that came in one message; they are not changed later."""
        if self._fd >= 0:
            self._waiting += [(now, group) for group in groups]
            if len(self._waiting) >= _BUFFER_GROUPS:
                self.flush()

    def flush(self) -> None:
        """Write what waits; in an idle moment, or when it is much."""
        if self._waiting:
            waiting, self._waiting = self._waiting, []
            self._write(b"".join([_line(now - self._began, group) for now, group in waiting]))

    def stop(self) -> None:
        self.flush()
        self._close()

    def _write(self, data: bytes) -> None:
        """Whole lines, as many as there is room for."""
        if self._fd < 0:
            return
        room = self._max_bytes - self._size
        part = data if len(data) <= room else data[: data.rfind(b"\n", 0, max(0, room)) + 1]
        full = len(part) < len(data)
        try:
            while part:
                written = os.write(self._fd, part)
                self._size += written
                part = part[written:]
        except OSError as error:
            self._give_up(error.strerror or str(error))
            return
        if full:
            self._give_up(f"it has as many bytes as it may, {self._max_bytes}")

    def _give_up(self, reason: str) -> None:
        log.warning(
            "nothing more is recorded; requests are served as before",
            extra=fields(file=str(self._path), reason=reason, bytes=self._size),
        )
        self._close()

    def _close(self) -> None:
        self._waiting.clear()
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _line(seconds: float, group: Requests) -> bytes:
    form, timeouts = group.form, group.timeouts_us
    told = timeouts[0] if len(set(timeouts)) == 1 else timeouts
    row = (
        round(seconds, 6),
        form.model,
        form.version.removeprefix(UNNAMED),
        len(group.ids),
        form.rows,
        form.nbytes,
        form.tenant,
    )
    return orjson.dumps((*row, form.priority, told)) + b"\n"
