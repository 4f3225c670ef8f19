"""Who hangs up while nothing is read from it.

A loop that does not read from a connection does not look at it either: that its client has gone would show only when
it is read again. An epoll instance inside the loop's own tells it at once, and leaves unread what was sent (EPOLLRDHUP,
see epoll_ctl(2)). TCP's own limit remains: behind more than the kernel's buffer takes, the end waits to be sent, too.
"""

from __future__ import annotations

import asyncio
import contextlib
import select
from collections.abc import Callable


class Hangups:
    """Descriptors that are watched. Opened with the first, closed by ``close``."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._epoll: select.epoll | None = None
        self._watched: dict[int, Callable[[], None]] = {}

    def watch(self, fileno: int, gone: Callable[[], None]) -> None:
        """Call ``gone`` once the other end has closed its side, unless it is forgotten before."""
        if self._epoll is None:
            self._epoll = select.epoll()
            self._loop.add_reader(self._epoll.fileno(), self._look)
        self._epoll.register(fileno, select.EPOLLRDHUP)
        self._watched[fileno] = gone

    def forget(self, fileno: int, gone: Callable[[], None]) -> None:
        """Does nothing when it is not watched for this any more: its number may be another's by now."""
        if self._watched.get(fileno) == gone:
            del self._watched[fileno]
            if self._epoll is not None:
                with contextlib.suppress(OSError):  # it was closed, which is enough
                    self._epoll.unregister(fileno)

    def _look(self) -> None:
        assert self._epoll is not None
        for fileno, _ in self._epoll.poll(0):
            gone = self._watched.get(fileno)
            if gone is not None:
                self.forget(fileno, gone)
                gone()

    def close(self) -> None:
        if self._epoll is not None:
            self._loop.remove_reader(self._epoll.fileno())
            self._epoll.close()
            self._epoll = None
