"""Long polls: who waits for jobs to end, on one timer, which runs only while somebody does."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from typing import Final

from penstock.jobs.store import IDS_MAX, Store, StoreError
from penstock.wire.errors import OVERLOADED, PenstockError
from penstock.wire.process import fields

log = logging.getLogger("penstock.gateway")

LOOK_S: Final = 0.025  # between two looks at the store, one for all
_IDS_EACH: Final = 16  # jobs for each long poll that may wait, of all of them together


class _Waiter:
    """One long poll."""

    __slots__ = ("ids", "then", "until")

    def __init__(self, ids: Sequence[str], until: float, then: Callable[[], None]) -> None:
        self.ids = ids
        self.until = until
        self.then = then


class Waits:
    """At most ``waiting_max`` long polls at a time. Those that are left when the gateway drains end at once."""

    def __init__(
        self, loop: asyncio.AbstractEventLoop, store: Store, waiting_max: int, draining: Callable[[], bool]
    ) -> None:
        self._loop = loop
        self._store = store
        self._waiting_max = waiting_max
        self._draining = draining
        self._waiters: dict[_Waiter, None] = {}
        self._ids = 0  # of all of them
        self._change: int | None = None  # of the store, when it was last looked at; None: look anyway
        self._looking = False
        self._ticking = False
        self._told = False  # that the store does not answer

    def wait(self, ids: Sequence[str], seconds: float, then: Callable[[], None]) -> Callable[[], None]:
        """``then`` is called once one of the jobs has ended or is not known, or the time is up. Returns what ends the
        wait without that. Raises PenstockError when too many wait already."""
        if len(self._waiters) >= self._waiting_max or self._ids + len(ids) > self._waiting_max * _IDS_EACH:
            raise PenstockError(
                OVERLOADED,
                f"{len(self._waiters)} long polls wait for jobs ([jobs] waiting_max); ask without 'wait'",
                1.0,
            )
        waiter = _Waiter(ids, self._loop.time() + seconds, then)
        self._waiters[waiter] = None
        self._ids += len(ids)
        self._change = None  # its job may have ended since it was looked at
        if not self._ticking:
            self._ticking = True
            self._loop.call_later(LOOK_S, self._tick)
        return lambda: self._forget(waiter)

    def _forget(self, waiter: _Waiter) -> None:
        if waiter in self._waiters:
            del self._waiters[waiter]
            self._ids -= len(waiter.ids)

    def _end(self, waiters: list[_Waiter]) -> None:
        for waiter in waiters:
            self._forget(waiter)
        for waiter in waiters:
            waiter.then()

    def _tick(self) -> None:
        now, draining = self._loop.time(), self._draining()
        self._end([each for each in self._waiters if draining or each.until <= now])
        self._ticking = bool(self._waiters)
        if not self._ticking:
            return
        self._loop.call_later(LOOK_S, self._tick)
        if not self._looking:
            self._looking = True
            ids, change = {each for waiter in self._waiters for each in waiter.ids}, self._change
            self._change = -1 if change is None else change  # whoever comes now sets it back
            self._loop.run_in_executor(None, self._look, sorted(ids), change).add_done_callback(self._looked)

    def _look(self, ids: list[str], change: int | None) -> tuple[int, set[str]]:
        """On a thread: the store's change, and those that need not be waited for any more."""
        now = self._store.change()
        if now == change:
            return now, set()
        open_ids: set[str] = set()
        for at in range(0, len(ids), IDS_MAX):
            open_ids |= {job.id for job in self._store.get(ids[at : at + IDS_MAX], time.time()) if not job.ended}
        return now, set(ids) - open_ids

    def _looked(self, done: asyncio.Future[tuple[int, set[str]]]) -> None:
        self._looking = False
        try:
            change, ended = done.result()
        except StoreError as error:
            self._change = None
            if not self._told:
                self._told = True
                log.warning("jobs that are waited for cannot be looked at", extra=fields(reason=str(error)))
            return
        self._told = False
        if self._change is not None:
            self._change = change
        if ended:
            self._end([each for each in self._waiters if not ended.isdisjoint(each.ids)])
