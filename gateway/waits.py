"""Waiting on an event loop, with a limit: for room in shared memory, for one of several events."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable

from penstock.wire.slots import Slot, Slots


class BoundedWait:
    """A wait for a slot of at most ``limit_s`` seconds. It ends once, on a turn of the loop of its own: ``then`` is
    called with the slot, or ``late`` with a sentence when there was none in time; or by ``leave``."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        slots: Slots,
        nbytes: int,
        lead: int,
        limit_s: float,
        then: Callable[[Slot], None],
        late: Callable[[str], None],
    ) -> None:
        """``nbytes`` and ``lead`` as for ``Slots.take``."""
        self._loop = loop
        self._slots = slots
        self._limit_s = limit_s
        self._then = then
        self._late = late
        self._ending: asyncio.Handle = loop.call_later(limit_s, self._end)
        self._wait = slots.wait(nbytes, lead, self._wake)

    def _wake(self) -> None:
        """Not more than this: whoever gives room back is in the midst of something else."""
        self._ending.cancel()
        self._ending = self._loop.call_soon(self._end)

    def _end(self) -> None:
        slot = self._slots.end(self._wait)
        if slot is not None:
            self._then(slot)
            return
        self._late(
            f"{self._wait.nbytes} bytes of this gateway's {self._slots.arena.size} bytes of shared memory did not come "
            f"free within {self._limit_s:g} s (arena_wait_s); try again shortly, or raise arena_bytes ([gateway] in "
            "the configuration)"
        )

    def leave(self) -> None:
        """Nobody needs the slot any more, whether it is there or not. Does nothing once it has ended."""
        self._ending.cancel()
        slot = self._slots.end(self._wait)
        if slot is not None:
            slot.give_back()


def too_large(nbytes: int, size: int) -> str:
    """Why there will never be room. ``size``: of the arena."""
    return (
        f"the request takes {nbytes} bytes of shared memory, and this gateway has {size}; send fewer rows at a time, "
        "or raise arena_bytes ([gateway] in the configuration)"
    )


async def first_of(limit_s: float, *events: asyncio.Event) -> None:
    """Until one of them is set or the time is up."""
    waits = [asyncio.ensure_future(event.wait()) for event in events]
    await asyncio.wait(waits, timeout=None if limit_s == math.inf else limit_s, return_when=asyncio.FIRST_COMPLETED)
    for wait in waits:
        wait.cancel()
