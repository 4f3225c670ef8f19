"""``GET /events``: the figures of the whole server, once a second, as server-sent events.

They are computed once for all who listen, and while nobody does nothing is asked.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from functools import partial
from typing import Final

import orjson

from penstock.gateway.connection import Exchange, Stream
from penstock.gateway.figures import Reading, Window
from penstock.gateway.reports import Reports
from penstock.wire.messages import Snapshot
from penstock.wire.models import ModelState

CONTENT_TYPE: Final = b"text/event-stream"
# A proxy in front that gathers what it passes on would keep the events.
_EXTRA: Final = b"Cache-Control: no-store\r\nX-Accel-Buffering: no\r\nX-Content-Type-Options: nosniff\r\n"
# For HEAD: how long the body would be is not known.
FEED_HEAD: Final = b"HTTP/1.1 200 OK\r\nContent-Type: %b\r\n%b\r\n" % (CONTENT_TYPE, _EXTRA)
_RETRY: Final = b"retry: 1000\n\n"  # milliseconds after which a browser whose connection has ended comes again


class Feed:
    """Those who listen. ``own``: this gateway's name; ``models``: what the server serves."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        reports: Reports,
        own: Callable[[], str],
        models: Callable[[], Sequence[ModelState]],
        every_s: float = 1.0,
    ) -> None:
        self._loop = loop
        self._reports = reports
        self._own = own
        self._models = models
        self._every_s = every_s
        self._streams: set[Stream] = set()
        self._window = Window()
        self._latest = b""
        self._latest_at = float("-inf")
        self._asking = False  # an answer, or the timer, is under way

    def join(self, exchange: Exchange) -> None:
        """Answer with events until the client leaves. Raises PenstockError when too many listen."""
        stream = exchange.begin(CONTENT_TYPE, _EXTRA)
        exchange.gone = partial(self._streams.discard, stream)
        self._streams.add(stream)
        fresh = self._loop.time() - self._latest_at < 2 * self._every_s
        stream.push(_RETRY + self._latest if fresh else _RETRY)
        if not self._asking:
            self._ask()

    def _ask(self) -> None:
        self._asking = bool(self._streams)
        if self._asking:
            self._asked_at = self._loop.time()
            self._reports.ask_snapshots(self._arrived)

    def _arrived(self, snapshots: Sequence[Snapshot], broker: bool | None) -> None:
        now = self._loop.time()
        self._loop.call_later(max(0.0, self._asked_at + self._every_s - now), self._ask)
        if broker is None:  # too many ask at the same time
            return
        self._window.add(Reading(now, broker, snapshots, self._models()))
        self._latest = b"data: %b\n\n" % orjson.dumps(self._window.view(self._own()))
        self._latest_at = now
        for stream in self._streams:
            stream.push(self._latest)
