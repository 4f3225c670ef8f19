"""What a process does while descriptors run out: it keeps those that it has, and lets nobody else in.

Who is connected does not notice; who would connect waits in the kernel's queue until there are descriptors again.
"""

from __future__ import annotations

import logging
from typing import Protocol

from penstock.wire.process import descriptors

log = logging.getLogger("penstock")


class Door(Protocol):
    """Where others come in. Both methods do nothing the second time."""

    def pause(self) -> None: ...
    def resume(self) -> None: ...


class Doors:
    """All of a process's. To be looked at before somebody is let in, and now and then."""

    def __init__(self) -> None:
        self._doors: list[Door] = []
        self._shut = False

    def add(self, door: Door) -> None:
        self._doors.append(door)

    def look(self) -> bool:
        """Whether others may come in."""
        short = descriptors() != "enough"
        for door in self._doors:
            if short:
                door.pause()
            else:
                door.resume()
        if short != self._shut:
            self._shut = short
            if short:
                log.error("descriptors run out; nobody else may connect until there are more (ulimit -n)")
            else:
                log.info("there are descriptors again; others may connect")
        return not short
