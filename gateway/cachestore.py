"""Answers in memory, shared by all gateways of a host: LMDB in the runtime directory.

The loop only reads, which waits for nobody. Writing is a thread's, since the one lock that writers have may be held by
a gateway that is stopped; what cannot be written soon is not kept. A gateway that is killed while it writes leaves a
lock that the next takes over (a robust mutex), and nothing of what it had not committed.

Nothing is to survive the server, so nothing is synced, and the file is made anew by whoever finds that nobody uses it:
which gateways do is known by a lock that each holds. It is written with write(), not through the mapping: where a tmpfs
is full that is an error, and no SIGBUS.
"""

from __future__ import annotations

import ctypes
import fcntl
import logging
import os
import shutil
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Final

import lmdb

from penstock.gateway.cachevalue import Kept, pack_value, unpack_value
from penstock.wire.process import fields

log = logging.getLogger("penstock.gateway")

_SCHEMA: Final = 1  # of the file
_PREFIX: Final = "responses-"
_DATA: Final = "data.mdb"
_READERS: Final = "lock.mdb"
_READER_BYTES: Final = 64
_ROUND: Final = 1 << 20  # bytes, of the whole
_READERS_MAX: Final = 1024  # threads of all gateways of a host that read at once, or did when they were killed
_LARGEST_PART: Final = 16  # an answer that takes more than one part in so many of all the room is not kept
_FULL: Final = 3 / 4  # of the pages are used: then the oldest answers go. LMDB changes a page by making a new one
_MARK: Final = b"mark"  # no key has so few bytes
_TRANSACTION_BYTES: Final = 4 << 20  # that are written at once
_TRANSACTION_MAX: Final = 256  # answers
_GATHER_S: Final = 0.002  # that a writer waits for more
_EVICT_MAX: Final = 4096  # answers that go for one transaction
_CHECK_S: Final = 10.0  # between two looks for readers that were killed
_REST_S: Final = 1.0  # after a failure, in which nothing is written
_END_MAX_S: Final = 1.0  # that the end waits for the writer, which another gateway may hold up
_LOCK_TRIES: Final = 50
_LOCK_TRY_S: Final = 0.01  # between two of them
_SEQ_BYTES: Final = 8


class StoreError(Exception):
    """A sentence: why no answers can be kept."""


class MemoryStore:
    """``get`` and ``put`` are for the loop. Raises StoreError where it cannot be opened."""

    def __init__(self, directory: Path, nbytes: int, pending_bytes_max: int, ttl_s: float = 0.0) -> None:
        """``directory``: this user's alone. ``nbytes``: of all that is kept, with what it takes to find it.
        ``pending_bytes_max``: of what is yet to be written. ``ttl_s``: 0: no limit."""
        nbytes = max(nbytes - nbytes % _ROUND, _ROUND)
        self.largest = nbytes // _LARGEST_PART
        self.dropped = 0  # answers that were not kept
        self.evicted = 0  # that this gateway has removed to make room
        self.corrupt = 0  # that were read and could not be believed
        self._ttl_s = ttl_s
        self._pending_bytes_max = pending_bytes_max
        self._path = directory / f"{_PREFIX}{_SCHEMA}-{nbytes}"
        self._used_max = int(nbytes * _FULL)
        self._lock = _use(self._path, nbytes)
        try:
            self._open(nbytes)
        except (lmdb.Error, OSError) as error:
            os.close(self._lock)
            raise StoreError(f"{self._path}: {error}") from None
        self._said = False
        self._check_at = 0.0
        self._pending: dict[bytes, tuple[bytes, bytes]] = {}
        self._pending_bytes = 0
        self._ready = threading.Condition()
        self._stopping = False
        self._writer = threading.Thread(target=self._write_all, name="cache", daemon=True)
        self._writer.start()

    def _open(self, nbytes: int) -> None:
        if not _is_whole(self._path, nbytes):
            _make(self._path, nbytes)  # those who have the other one open go on with it as long as they can
        self._env = lmdb.open(
            str(self._path),
            map_size=nbytes,
            max_dbs=2,
            max_readers=_READERS_MAX,
            sync=False,
            metasync=False,
            mode=0o600,
        )
        self._answers: Any = self._env.open_db(b"answers")  # by key: the number of its place in the order, its value
        self._order: Any = self._env.open_db(b"order")  # by the number, ascending: keys
        self._psize = self._env.stat()["psize"]

    # --- for the loop ---

    def get(self, key: bytes) -> Kept | None:
        if key in self._pending:
            with self._ready:
                mine = self._pending.get(key)
            if mine is not None:
                return Kept(time.monotonic(), *mine)
        try:
            value = self._env.begin(self._answers).get(key)  # ends with the object
        except lmdb.Error:
            self.corrupt += 1
            return None
        if value is None:
            return None
        kept = unpack_value(key, value, _SEQ_BYTES)
        if kept is None:
            self.corrupt += 1
        elif self._ttl_s and time.monotonic() >= kept.at + self._ttl_s:
            return None
        return kept

    def put(self, key: bytes, body: bytes, payload: bytes) -> None:
        """Keep an answer, if there is time and room to."""
        nbytes = len(body) + len(payload)
        with self._ready:
            if nbytes > self.largest or self._pending_bytes + nbytes > self._pending_bytes_max:
                self.dropped += 1
                return
            self._forget(key, self._pending.get(key))
            self._pending[key] = body, payload
            self._pending_bytes += nbytes
            self._ready.notify()

    def _forget(self, key: bytes, value: tuple[bytes, bytes] | None) -> None:
        """What was to be written has been, or other has come in its place. With the lock."""
        if value is not None and self._pending.get(key) is value:
            del self._pending[key]
            self._pending_bytes -= len(value[0]) + len(value[1])

    def measure(self) -> tuple[int, int]:
        """How many answers are kept, and in how many bytes."""
        try:
            with self._env.begin() as reading:
                return reading.stat(self._answers)["entries"], self._used(reading)
        except lmdb.Error:
            return 0, 0

    def close(self) -> None:
        """What is not written yet is not kept."""
        with self._ready:
            self._stopping = True
            self._ready.notify()
        self._writer.join(_END_MAX_S)
        if self._writer.is_alive():
            # It waits for another gateway's lock, in memory that must stay where it is: until this process ends.
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(self._env))
            return
        self._env.close()
        _let_go(self._path, self._lock)

    # --- the writer ---

    def _write_all(self) -> None:
        while True:
            with self._ready:
                while not self._pending and not self._stopping:
                    self._ready.wait()
                if self._stopping:
                    return
                self._ready.wait_for(lambda: self._stopping, _GATHER_S)
                some = self._some()
            try:
                self._write(some)
            except (lmdb.Error, OSError) as error:
                self._complain(error, len(some))
                with self._ready:
                    self._ready.wait_for(lambda: self._stopping, _REST_S)
            with self._ready:
                for key, value in some.items():
                    self._forget(key, value)

    def _some(self) -> dict[bytes, tuple[bytes, bytes]]:
        """Those that came first."""
        some: dict[bytes, tuple[bytes, bytes]] = {}
        nbytes = 0
        for key, value in islice(self._pending.items(), _TRANSACTION_MAX):
            nbytes += len(value[0]) + len(value[1])
            if some and nbytes > _TRANSACTION_BYTES:
                break
            some[key] = value
        return some

    def _write(self, some: dict[bytes, tuple[bytes, bytes]]) -> None:
        now = time.monotonic()
        if now >= self._check_at:
            self._check_at = now + _CHECK_S
            self._env.reader_check()  # pages that a reader which was killed had in sight are free again
        try:
            self._put(some, now)
            return
        except lmdb.MapFullError:
            pass  # what is free lies in pieces that are too small for a large answer, or in sight of a reader
        self._turn(partial(self._evict, used_max=self._used_max - 4 * self.largest, now=now))
        try:
            self._put(some, now)
        except lmdb.MapFullError:
            self._turn(self._clear)
            self._put(some, now)

    def _turn(self, change: Callable[[Any], None]) -> None:
        """Pages that a transaction frees can be used by the next but one."""
        with self._env.begin(write=True) as writing:
            change(writing)
        with self._env.begin(write=True) as writing:
            writing.put(_MARK, b"", db=self._answers)

    def _clear(self, writing: Any) -> None:
        self.evicted += writing.stat(self._order)["entries"]
        for db in (self._answers, self._order):
            writing.drop(db, delete=False)

    def _put(self, some: dict[bytes, tuple[bytes, bytes]], now: float) -> None:
        with self._env.begin(write=True) as writing:
            with writing.cursor(self._order) as order:
                last = int.from_bytes(order.key(), "big") if order.last() else 0
            for number, (key, (body, payload)) in enumerate(some.items(), last + 1):
                before = writing.get(key, db=self._answers)
                if before is not None:
                    writing.delete(before[:_SEQ_BYTES], db=self._order)
                place = number.to_bytes(_SEQ_BYTES, "big")
                writing.put(key, place + pack_value(key, now, body, payload), db=self._answers)
                writing.put(place, key, db=self._order)
            writing.delete(_MARK, db=self._answers)
            self._evict(writing, self._used_max, now)

    def _evict(self, writing: Any, used_max: int, now: float) -> None:
        """Remove the oldest until no more than so many bytes are used, and those that are too old."""
        evicted = 0
        with writing.cursor(self._order) as order:
            while evicted < _EVICT_MAX and order.first():
                if self._used(writing) <= used_max and not self._is_late(writing, order.value(), now):
                    break
                writing.delete(order.value(), db=self._answers)
                order.delete()
                evicted += 1
        self.evicted += evicted

    def _is_late(self, writing: Any, key: bytes, now: float) -> bool:
        if not self._ttl_s:
            return False
        kept = unpack_value(key, writing.get(key, db=self._answers) or b"", _SEQ_BYTES)
        return kept is None or now >= kept.at + self._ttl_s

    def _used(self, transaction: Any) -> int:
        pages = 0
        for db in (self._answers, self._order):
            about = transaction.stat(db)
            pages += about["branch_pages"] + about["leaf_pages"] + about["overflow_pages"]
        return int(pages * self._psize)

    def _complain(self, error: Exception, count: int) -> None:
        with self._ready:
            self.dropped += count
        if not self._said:
            self._said = True
            log.warning("answers cannot be kept", extra=fields(path=str(self._path), reason=str(error)))


# --- who uses a file ---


def _use(path: Path, nbytes: int) -> int:
    """The lock of those that use a file, held until its descriptor is closed. What nobody used before is removed, and
    so are others of its kind that nobody uses. Raises StoreError."""
    try:
        for other in path.parent.glob(f"{_PREFIX}*.lock"):
            if other != _lock_of(path) and (fd := _try_lock(other, fcntl.LOCK_EX)) is not None:
                _remove(other.with_suffix(""), fd)
        for _ in range(_LOCK_TRIES):
            alone = _try_lock(_lock_of(path), fcntl.LOCK_EX)
            if alone is not None:
                with os.fdopen(alone):
                    _make(path, nbytes)
            shared = _try_lock(_lock_of(path), fcntl.LOCK_SH)
            if shared is not None:
                return shared  # who has come between has made it anew as well, and has it
            time.sleep(_LOCK_TRY_S)  # another gateway is about to
    except OSError as error:
        raise StoreError(f"{_lock_of(path)}: {error.strerror}") from None
    except lmdb.Error as error:
        raise StoreError(str(error)) from None
    raise StoreError(f"{path} is held by a process that does not go on")


def _make(path: Path, nbytes: int) -> None:
    """A new file, at once as long as it may become: one that is shorter was cut, and to read it would be a SIGBUS. So
    it would be to write the list of readers where the disk has no room for it, which LMDB maps without having it."""
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(mode=0o700)
    with open(path / _READERS, "wb") as readers:
        os.posix_fallocate(readers.fileno(), 0, (_READERS_MAX + 64) * _READER_BYTES)
    lmdb.open(str(path), map_size=nbytes, max_readers=_READERS_MAX, sync=False, metasync=False, mode=0o600).close()
    os.truncate(path / _DATA, nbytes)


def _is_whole(path: Path, nbytes: int) -> bool:
    try:
        return (path / _DATA).stat().st_size >= nbytes
    except OSError:
        return False


def _let_go(path: Path, lock: int) -> None:
    """Use it no longer; the last to do so removes it."""
    os.close(lock)
    with suppress(OSError):
        alone = _try_lock(_lock_of(path), fcntl.LOCK_EX)
        if alone is not None:
            _remove(path, alone)


def _remove(path: Path, alone: int) -> None:
    """What nobody uses, and its lock, which is held."""
    shutil.rmtree(path, ignore_errors=True)
    _lock_of(path).unlink(missing_ok=True)
    os.close(alone)


def _try_lock(path: Path, kind: int) -> int | None:
    """A descriptor that holds it; None where it is taken. Raises OSError."""
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(fd, kind | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(fd), os.stat(path)):
                return fd
        except FileNotFoundError:
            pass  # who held it has removed it: what is locked here guards nothing
        except BlockingIOError:
            os.close(fd)
            return None
        os.close(fd)


def _lock_of(path: Path) -> Path:
    return path.with_name(path.name + ".lock")
