"""Which store a gateway keeps answers in, and when it is there: it is opened once the first answer may be kept, on a
thread, and what is asked meanwhile is computed."""

from __future__ import annotations

import asyncio
import logging
import tempfile
from pathlib import Path
from typing import TypeAlias

from penstock.gateway.cacheredis import RedisStore
from penstock.gateway.cachestore import MemoryStore, StoreError
from penstock.gateway.options import GatewayOptions
from penstock.wire.metrics import Meters
from penstock.wire.process import fields

log = logging.getLogger("penstock.gateway")

Store: TypeAlias = MemoryStore | RedisStore


class Stores:
    """``store``: None while there is none, or where there cannot be one, which is said once in the log."""

    def __init__(self, loop: asyncio.AbstractEventLoop, options: GatewayOptions, runtime: Path | None) -> None:
        """``runtime``: the directory that all gateways of this host share, if there is one."""
        self.store: Store | None = None
        self._loop = loop
        self._options = options
        self._runtime = runtime
        self._own: tempfile.TemporaryDirectory[str] | None = None  # where there is no runtime directory
        self._wanted = bool(options.response_cache_bytes or options.response_cache_store)
        self._closed = False

    def open(self) -> None:
        """Begin to, unless that has been done."""
        if not self._wanted:
            return
        self._wanted = False
        if not self._options.response_cache_store:
            self._loop.run_in_executor(None, self._open_memory).add_done_callback(self._opened)
            return
        options = self._options
        try:
            self.store = RedisStore(
                self._loop,
                options.response_cache_store,
                options.response_cache_wait_ms,
                options.response_cache_pending_bytes,
                options.response_cache_ttl_s,
            )
        except StoreError as error:
            _complain(error)

    def _open_memory(self) -> MemoryStore:
        options, directory = self._options, self._runtime
        if directory is None:
            self._own = tempfile.TemporaryDirectory(prefix="penstock-")
            directory = Path(self._own.name)
        pending = options.response_cache_pending_bytes
        return MemoryStore(directory, options.response_cache_bytes, pending, options.response_cache_ttl_s)

    def _opened(self, opening: asyncio.Future[MemoryStore]) -> None:
        try:
            store = opening.result()
        except (StoreError, OSError) as error:
            _complain(error)
            return
        if self._closed:
            store.close()
        else:
            self.store = store

    def measure(self, meters: Meters) -> None:
        """Bring the series that are not counted as things happen up to date."""
        store = self.store
        if store is None:
            return
        meters.value("penstock_cache_dropped").value = store.dropped
        meters.value("penstock_cache_corrupt").value = store.corrupt
        if isinstance(store, MemoryStore):
            entries, nbytes = store.measure()
            meters.value("penstock_cache_entries").value = entries
            meters.value("penstock_cache_bytes").value = nbytes
            meters.value("penstock_cache_evictions").value = store.evicted

    def close(self) -> None:
        self._closed, self._wanted = True, False
        store, self.store = self.store, None
        if store is not None:
            store.close()
        if self._own is not None:
            self._own.cleanup()


def _complain(error: Exception) -> None:
    about = fields(reason=str(error), cost="every request is computed until this gateway is started anew")
    log.warning("answers cannot be kept", extra=about)
