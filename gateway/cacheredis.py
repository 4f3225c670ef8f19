"""Answers in Redis, for gateways of several hosts (``response_cache_store = "redis://..."``).

Nobody waits for it for longer than ``response_cache_wait_ms``: what has not come by then is not there. When it is away,
or slow again and again, it is left alone for a while. Its memory is bounded by its own ``maxmemory``, and what it keeps
by a time to live.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Any, Final
from urllib.parse import urlsplit

from penstock.gateway.cachestore import StoreError
from penstock.gateway.cachevalue import Kept, pack_value, unpack_value
from penstock.wire.process import fields

log = logging.getLogger("penstock.gateway")

_PREFIX: Final = b"penstock:response:1:"
_CONNECTIONS_MAX: Final = 16
_READS_MAX: Final = 256  # that are awaited at once; more are not there
_LATE_MAX: Final = 5  # in a row: then it is left alone
_REST_S: Final = 5.0
_TTL_S: Final = 3600.0  # where nothing else is said
_WRITE_MAX_S: Final = 2.0
_END_MAX_S: Final = 1.0
_LARGEST_BYTES: Final = 16 << 20


class RedisStore:
    """``get`` and ``put`` are for the loop that it was made on."""

    def __init__(
        self, loop: asyncio.AbstractEventLoop, url: str, wait_ms: float, pending_bytes_max: int, ttl_s: float = 0.0
    ) -> None:
        """Raises StoreError. ``pending_bytes_max``: of what is being written. ``ttl_s``: 0: an hour."""
        try:
            from redis.asyncio import BlockingConnectionPool, Redis
            from redis.exceptions import RedisError
        except ImportError:
            raise StoreError(
                "response_cache_store needs the package redis, which is not installed: pip install redis"
            ) from None
        self.largest = _LARGEST_BYTES
        self.dropped = 0  # answers that were not kept
        self.corrupt = 0  # that were read and could not be believed
        self._failures: Any = (RedisError, OSError, TimeoutError)
        self._loop = loop
        self._wait_s = wait_ms / 1000
        self._ttl_ms = int((ttl_s or _TTL_S) * 1000)
        self._pending_bytes_max = pending_bytes_max
        self._pending_bytes = 0
        self._where = urlsplit(url).hostname or urlsplit(url).path  # and no password
        try:
            pool = BlockingConnectionPool.from_url(
                url, max_connections=_CONNECTIONS_MAX, timeout=self._wait_s, socket_connect_timeout=_WRITE_MAX_S
            )
        except ValueError as error:
            raise StoreError(f"response_cache_store: {error}") from None
        self._redis: Any = Redis.from_pool(pool)  # which is closed with it
        self._tasks: set[asyncio.Task[None]] = set()
        self._reads = 0
        self._late = 0  # in a row
        self._rest_until = 0.0
        self._said = False

    def get(self, key: bytes, then: Callable[[Kept | None], None]) -> None:
        """``then`` is called on a later turn of the loop."""
        if self._reads >= _READS_MAX or time.monotonic() < self._rest_until:
            self._loop.call_soon(then, None)
            return
        self._reads += 1
        self._begin(self._get(key, then))

    def put(self, key: bytes, body: bytes, payload: bytes) -> None:
        """Keep an answer, if there is room to."""
        nbytes = len(body) + len(payload)
        if (
            nbytes > self.largest
            or self._pending_bytes + nbytes > self._pending_bytes_max
            or time.monotonic() < self._rest_until
        ):
            self.dropped += 1
            return
        self._pending_bytes += nbytes
        self._begin(self._put(key, pack_value(key, 0.0, body, payload), nbytes))

    def _begin(self, work: Any) -> None:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _get(self, key: bytes, then: Callable[[Kept | None], None]) -> None:
        kept = None
        try:
            value = await self._ask(self._redis.get(_PREFIX + key), self._wait_s)
            if isinstance(value, bytes):
                kept = unpack_value(key, value)
                self.corrupt += kept is None
        finally:
            self._reads -= 1
        then(kept)

    async def _put(self, key: bytes, value: bytes, nbytes: int) -> None:
        try:
            if not await self._ask(self._redis.set(_PREFIX + key, value, px=self._ttl_ms), _WRITE_MAX_S):
                self.dropped += 1
        finally:
            self._pending_bytes -= nbytes

    async def _ask(self, reply: Awaitable[Any], limit_s: float) -> Any:
        """None when nothing comes of it."""
        try:
            async with asyncio.timeout(limit_s):
                value = await reply
        except self._failures as error:
            self._failed(error, isinstance(error, TimeoutError))
            return None
        self._late = 0
        if self._said:
            self._said = False
            log.info("the response cache answers again", extra=fields(redis=self._where))
        return value

    def _failed(self, error: Exception, late: bool) -> None:
        self._late += 1
        if late and self._late < _LATE_MAX:
            return
        self._rest_until = time.monotonic() + _REST_S
        if not self._said:
            self._said = True
            reason = "it does not answer in time (response_cache_wait_ms)" if late else str(error)
            about = fields(redis=self._where, reason=reason, again_in_s=_REST_S)
            log.warning("the response cache is away; answers are computed", extra=about)

    def close(self) -> None:
        """What is being asked ends without an answer."""
        for task in self._tasks:
            task.cancel()
        self._begin(self._disconnect())

    async def _disconnect(self) -> None:
        try:
            async with asyncio.timeout(_END_MAX_S):
                await self._redis.aclose()
        except self._failures as error:
            log.debug("the response cache was not left in good order", extra=fields(reason=str(error)))
