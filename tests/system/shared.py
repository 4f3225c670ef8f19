"""What lies in /dev/shm, which all of a machine share: what is left there, and what others are at work with."""

from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path

from tests.system.servers import wait_for

DIRECTORY = Path("/dev/shm")
PATIENCE_S = 5.0  # others map what they make, or remove it, in thousandths


class SharedMemory:
    """What there was."""

    def __init__(self) -> None:
        self._before = set(os.listdir(DIRECTORY))

    def left(self) -> set[str]:
        """What is there more than before, and nobody uses."""
        return _unused(set(os.listdir(DIRECTORY)) - self._before)

    def check(self, sentence: str) -> None:
        """Fail if there is anything left."""
        with contextlib.suppress(AssertionError):
            wait_for(lambda: not self.left(), "others to be done", PATIENCE_S)
        assert self.left() == set(), sentence


def _unused(names: set[str]) -> set[str]:
    """Those that no process has mapped: with all of ours ended, what is mapped is of whoever else works on this
    machine."""
    mapped = set()
    for maps in Path("/proc").glob("[0-9]*/maps") if names else ():
        with contextlib.suppress(OSError):
            mapped |= set(re.findall(r" (\d+) +/dev/shm/", maps.read_text()))
    found = set()
    for name in names:
        with contextlib.suppress(FileNotFoundError):
            if str((DIRECTORY / name).stat().st_ino) not in mapped:
                found.add(name)
    return found
