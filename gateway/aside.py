"""Work that would keep the event loop from everybody else: on threads, so many at a time and each in its turn."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from typing import Any, Final, TypeAlias

from penstock.wire.errors import OVERLOADED, PenstockError

Then: TypeAlias = "Callable[[asyncio.Future[Any]], None]"


_NOT_EXPANDED: Final = "the body could not be expanded within {} (expand_wait_s)"


class Work:
    """``leave`` when nobody wants its result any more; it may ask ``wanted`` from its thread."""

    __slots__ = ("_aside", "do", "late_at", "then", "wanted")

    def __init__(self, aside: Aside, do: Callable[[Work], Any], then: Then, late_at: float) -> None:
        self._aside = aside
        self.do = do
        self.then = then
        self.late_at = late_at
        self.wanted = True

    def leave(self) -> None:
        self.wanted = False
        self._aside.forget(self)
        self.do = _nothing  # what it was to work on is held by nobody else now


def _nothing(work: Work) -> None:
    """What is left to do."""


class Aside:
    """At most ``threads_max`` pieces of work at a time, on threads of the loop's own executor. The others wait in line,
    at most ``wait_max_s`` seconds and then until one of those before them ends."""

    def __init__(
        self, loop: asyncio.AbstractEventLoop, threads_max: int, wait_max_s: float, late: str = _NOT_EXPANDED
    ) -> None:
        """``late``: what those are told that had to wait longer."""
        self._late: Final = late
        self._loop = loop
        self._threads_max: Final = threads_max
        self._wait_max_s: Final = wait_max_s
        self._running = 0
        self._line: dict[Work, None] = {}  # in the order in which they came

    @property
    def waiting(self) -> int:
        return len(self._line)

    def run(self, do: Callable[[Work], Any], then: Then) -> Work:
        """``then`` is called on a turn of the loop of its own with what ``do`` returned or raised, or with a
        PenstockError when it had to wait too long; unless it was left before."""
        work = Work(self, do, then, self._loop.time() + self._wait_max_s)
        self._line[work] = None
        self._begin()
        return work

    def forget(self, work: Work) -> None:
        self._line.pop(work, None)

    def _begin(self) -> None:
        """Those whose turn it is."""
        while self._line and self._running < self._threads_max:
            work = next(iter(self._line))
            del self._line[work]
            if self._loop.time() > work.late_at:
                self._refuse(work)
                continue
            self._running += 1
            self._loop.run_in_executor(None, work.do, work).add_done_callback(partial(self._end, work))

    def _refuse(self, work: Work) -> None:
        late: asyncio.Future[Any] = self._loop.create_future()
        late.set_exception(
            PenstockError(
                OVERLOADED,
                f"{self._late.format(f'{self._wait_max_s:g} s')}, since others are; try again shortly",
                1.0,
            )
        )
        late.add_done_callback(partial(self._tell, work))

    def _end(self, work: Work, done: asyncio.Future[Any]) -> None:
        self._running -= 1
        self._begin()
        self._tell(work, done)

    def _tell(self, work: Work, done: asyncio.Future[Any]) -> None:
        if work.wanted:
            work.then(done)
        else:
            done.exception()  # so that nobody complains that it was not asked for
