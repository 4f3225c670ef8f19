"""Whom a gateway lets in, and that it goes on when descriptors run out.

The event loop accepts. While no descriptor is left at all it would look at the listening socket again and again, so it
is taken away from the loop then, and whoever comes waits in the kernel.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import Callable

from penstock.wire.process import descriptors

log = logging.getLogger("penstock.gateway")


class Acceptor:
    """``start`` lets them in, until ``close``."""

    def __init__(self, listener: socket.socket, make: Callable[[], asyncio.BaseProtocol], backlog: int) -> None:
        self._loop = asyncio.get_running_loop()
        self._listener = listener
        self._make = make
        self._backlog = backlog
        self._server: asyncio.AbstractServer | None = None
        self._short = False
        self._starting: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Raises OSError."""
        # A copy: what a server listens on is closed with it.
        self._server = await self._loop.create_server(self._make, sock=self._listener.dup(), backlog=self._backlog)

    def look(self) -> None:
        """How many descriptors are left; to be called again and again."""
        now = descriptors()
        if (now != "enough") != self._short:
            self._short = not self._short
            if self._short:
                log.error("descriptors run out; connections are refused until there are more (ulimit -n)")
            else:
                log.info("there are descriptors again")
        if now == "none" and self._server is not None:
            self._server.close()
            self._server = None
        elif now == "enough" and self._server is None and (self._starting is None or self._starting.done()):
            self._starting = self._loop.create_task(self._start_again())

    async def _start_again(self) -> None:
        with contextlib.suppress(OSError):  # it is tried again at the next look
            await self.start()

    def close(self) -> None:
        if self._starting is not None:
            self._starting.cancel()
        if self._server is not None:
            self._server.close()
            self._server = None
        self._listener.close()
