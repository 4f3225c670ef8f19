"""What a process does while descriptors run out: it keeps those that it has, and lets nobody else in.

libzmq ends the process when it cannot accept a local connection (ipc_listener.cpp, an assertion), and looks again and
again for a remote one. So the paths that it listens on are taken away before, while there are still some descriptors
left: who is connected does not notice, and who would connect finds nobody, and tries again.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from penstock.wire.endpoints import Guard
from penstock.wire.process import descriptors

log = logging.getLogger("penstock")


class Doors:
    """The sockets that a process listens on. ``look`` often enough, and whenever somebody has come."""

    def __init__(self, guards: Sequence[Guard]) -> None:
        self._guards = guards
        self._shut = False

    def look(self) -> bool:
        """Whether others may come in."""
        short = descriptors() != "enough"
        if short != self._shut:
            self._shut = short
            for guard in self._guards:
                guard.shut(short)
            if short:
                log.error("descriptors run out; nobody else may connect until there are more (ulimit -n)")
            else:
                log.info("there are descriptors again; others may connect")
        return not short
