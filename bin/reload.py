"""A configuration file that changes while the server runs: when it counts as changed, whom a change is about, and the
copy of it that is in force. What a process reads when it is started again is the copy: the file may be half written.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Final, TypeAlias

from penstock.bin.files import write_whole
from penstock.bin.options import Options, options_of
from penstock.bin.restart import ROLES
from penstock.worker.config import ConfigError, Toml, read_toml

CONFIG_LOOK_S: Final = 0.7  # between two looks at the file
_BOTH: Final = {"gateway", "jobs"}
_AGREED: Final = ("gateways.*", "trace-*.count")
_COPY: Final = "penstock-{}.toml"  # in the runtime directory, which nobody else can read

Mark: TypeAlias = tuple[int, ...]  # what differs when a file is written or replaced; (): there is none


def mark_of(path: Path) -> Mark:
    try:
        about = path.stat()  # of what a link leads to
    except OSError:
        return ()
    return about.st_mtime_ns, about.st_ctime_ns, about.st_size, about.st_ino, about.st_dev


class Watch:
    """Whether a file has changed. Pure: what is seen of it is given."""

    def __init__(self, mark: Mark) -> None:
        self._told = self._seen = mark

    def changed(self, mark: Mark) -> bool:
        """True once for each change, when two looks have found the same: who writes may not be done."""
        still, self._seen = mark == self._seen, mark
        if not still or mark == self._told:
            return False
        self._told = mark
        return True


def changed_roles(old: Options, new: Options) -> tuple[str, ...]:
    """The kinds of processes whose section differs, in the order in which they are replaced. Who runs jobs answers
    requests as a gateway does, and a gateway takes jobs in: each has both sections."""
    differ = {role for role in ROLES if getattr(old, role) != getattr(new, role)}
    if differ & _BOTH:
        differ |= _BOTH
    return tuple(role for role in ROLES if role in differ)


def with_config(arguments: list[str], old: Path, new: Path) -> list[str]:
    """A command line with another configuration."""
    return [f"--config={new}" if each == f"--config={old}" else each for each in arguments]


class ConfigFile:
    """The user's file, and the copies of it. ``copy``: the one in force."""

    def __init__(self, path: Path, directory: Path) -> None:
        self.path = path
        self.watch = Watch(mark_of(path))
        self._directory = directory
        self._copies = 0
        self.copy = path

    def read(self) -> tuple[Toml, Options]:
        """Raises ConfigError."""
        if self.path.exists() and not self.path.is_file():  # a pipe has nothing to say the second time
            raise ConfigError(f"{self.path} is no file that can be read again; write it to one")
        try:
            toml = read_toml(self.path)
        except FileNotFoundError:
            raise ConfigError(f"{self.path} does not exist; put it back") from None
        return toml, options_of(toml)

    def keep(self, toml: Toml) -> Path:
        """Another copy, with what has been judged. Raises ConfigError where there is no room for it."""
        self._copies += 1
        copy = self._directory / _COPY.format(self._copies)
        try:
            write_whole(copy, toml.text)
        except OSError as error:
            raise ConfigError(f"cannot write {copy}: {error.strerror}; free space there") from None
        return copy


def sweep(directory: Path) -> None:
    """Remove all copies, also those of a launcher that was killed, and what gateways have agreed upon (common.py and
    tracesettings.py there)."""
    for pattern in (_COPY.format("*"), *_AGREED):
        for copy in directory.glob(pattern):
            with suppress(OSError):
                os.unlink(copy)
