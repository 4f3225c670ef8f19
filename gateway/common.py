"""What all gateways of one server agree upon and clients may change: a file in the runtime directory with sections,
each a JSON object. It outlives gateways, and goes with the server. Without a runtime directory, where the broker is
reached over TCP, it is this gateway's alone.

It is replaced as a whole, by one at a time, and read again where it has been: a look costs one stat(2).
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final, TypeAlias

import orjson

from penstock.wire.errors import OVERLOADED, PenstockError

FILE_NAME: Final = "gateways.json"
LOCK_NAME: Final = "gateways.lock-file"
_BYTES_MAX: Final = 4 << 20
_LOCK_WAIT_S: Final = 0.05  # for another gateway, which has it for less than a thousandth
_LOCK_TRY_MS: Final = 1

Section: TypeAlias = dict[str, Any]


class Common:
    """``runtime``: the directory, None where there is none."""

    def __init__(self, runtime: Path | None) -> None:
        self._path = None if runtime is None else runtime / FILE_NAME
        self._lock = None if runtime is None else runtime / LOCK_NAME
        self._stamp: tuple[int, int, int] | None = None
        self._sections: dict[str, Section] = {}

    def read(self, section: str) -> Section:
        """As it is now; the same object for as long as nothing has changed. Not to be changed by who reads it."""
        self._look()
        found = self._sections.get(section)
        if found is None:
            found = self._sections[section] = {}
        return found

    def change(self, section: str, change: Callable[[Section], None]) -> Section:
        """Have a section changed, in a copy, for all gateways, and return it. What ``change`` raises goes on, and then
        nothing has changed. Raises PenstockError where that cannot be written."""
        with self._locked():
            new = orjson.loads(orjson.dumps(self.read(section)))
            change(new)
            sections = {**self._sections, section: new}
            self._write(sections)
            self._sections = sections
            return self.read(section) if self._path is not None else new

    def _look(self) -> None:
        if self._path is None:
            return
        try:
            about = os.stat(self._path)
        except OSError:
            stamp = None
        else:
            stamp = about.st_ino, about.st_mtime_ns, about.st_size
        if stamp == self._stamp:
            return
        self._stamp = stamp
        sections: Any = {}
        with contextlib.suppress(OSError, orjson.JSONDecodeError), open(self._path, "rb") as file:
            sections = orjson.loads(file.read(_BYTES_MAX))
        self._sections = sections if isinstance(sections, dict) else {}

    def _write(self, sections: dict[str, Section]) -> None:
        if self._path is None:
            return
        content = orjson.dumps(sections)
        if len(content) > _BYTES_MAX:
            raise PenstockError(OVERLOADED, f"what gateways share has {_BYTES_MAX} bytes at most; unregister something")
        staged = self._path.with_suffix(f".{os.getpid()}")
        try:
            staged.write_bytes(content)
            staged.rename(self._path)
        except OSError as error:
            raise PenstockError(OVERLOADED, f"{self._path} cannot be written: {error.strerror}") from None

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        if self._lock is None:
            yield
            return
        try:
            fd = os.open(self._lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise PenstockError(OVERLOADED, f"{self._lock} cannot be locked: {error.strerror}") from None
        try:
            _take(fd)
            yield
        finally:
            os.close(fd)


def _take(fd: int) -> None:
    """Raises PenstockError where another has it for too long."""
    until = time.monotonic() + _LOCK_WAIT_S
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except OSError:
            if time.monotonic() > until:
                raise PenstockError(
                    OVERLOADED, "another gateway changes settings at this moment; try again shortly", 1.0
                ) from None
        select.poll().poll(_LOCK_TRY_MS)
