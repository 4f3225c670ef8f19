"""The SQLite file of a store: made whole or not at all, opened by as many connections as there are threads that ask.

Its jobs are rows of one table; requests and responses, which may be large, are rows of others with the same number, so
that who looks for jobs does not read them. Triggers count jobs and bytes, so that no code can forget to.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import sqlite3
import stat
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from penstock.jobs.store import SCHEMA, StoreError

APPLICATION: Final = 0x50454E4A  # "PENJ", which file(1) can tell
_PAGE_BYTES: Final = 4096
_VACUUM_PAGES: Final = 1024  # given back to the file system in one transaction
_VACUUM_TURNS: Final = 8  # and so many of them at a time
_SPARE_BYTES: Final = 16 << 20  # of the disk, which new jobs leave: with nothing left, nothing could be ended or swept
_LOG_BYTES: Final = 4 << 20  # of the write-ahead log, once what is in it has been taken over

_TABLES: Final = """
CREATE TABLE jobs (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL UNIQUE,
    status TEXT NOT NULL,
    model TEXT NOT NULL,
    submitted_at REAL NOT NULL,
    bytes INTEGER NOT NULL,
    started_at REAL,
    ended_at REAL,
    expires_at REAL,
    attempts INTEGER NOT NULL,
    deaths INTEGER NOT NULL,
    not_before REAL NOT NULL,
    owner TEXT NOT NULL,
    lease_until REAL NOT NULL,
    cancel_wanted INTEGER NOT NULL,
    http_status INTEGER,
    error TEXT NOT NULL,
    callback_url TEXT,
    callback_state TEXT,
    callback_attempts INTEGER,
    callback_due_at REAL,
    callback_owner TEXT,
    callback_error TEXT
);
CREATE INDEX jobs_by_status ON jobs (status, number);
CREATE INDEX jobs_by_end ON jobs (expires_at) WHERE expires_at IS NOT NULL;
CREATE INDEX jobs_by_callback ON jobs (callback_due_at) WHERE callback_state = 'pending';
CREATE TABLE requests (number INTEGER PRIMARY KEY, method BLOB, url BLOB, headers BLOB, body BLOB);
CREATE TABLE responses (number INTEGER PRIMARY KEY, status INTEGER, headers BLOB, body BLOB);
CREATE TABLE tombstones (
    number INTEGER PRIMARY KEY,
    id TEXT NOT NULL UNIQUE,
    model TEXT NOT NULL,
    submitted_at REAL NOT NULL,
    started_at REAL,
    ended_at REAL,
    expires_at REAL NOT NULL
);
CREATE INDEX tombstones_by_end ON tombstones (expires_at);
CREATE TABLE totals (jobs INTEGER NOT NULL, bytes INTEGER NOT NULL, tombstones INTEGER NOT NULL);
INSERT INTO totals VALUES (0, 0, 0);
CREATE TRIGGER one_more AFTER INSERT ON jobs BEGIN
    UPDATE totals SET jobs = jobs + 1, bytes = bytes + NEW.bytes;
END;
CREATE TRIGGER other_bytes AFTER UPDATE OF bytes ON jobs BEGIN
    UPDATE totals SET bytes = bytes + NEW.bytes - OLD.bytes;
END;
CREATE TRIGGER one_less AFTER DELETE ON jobs BEGIN
    UPDATE totals SET jobs = jobs - 1, bytes = bytes - OLD.bytes;
    DELETE FROM requests WHERE number = OLD.number;
    DELETE FROM responses WHERE number = OLD.number;
END;
CREATE TRIGGER one_tombstone_more AFTER INSERT ON tombstones BEGIN
    UPDATE totals SET tombstones = tombstones + 1;
END;
CREATE TRIGGER one_tombstone_less AFTER DELETE ON tombstones BEGIN
    UPDATE totals SET tombstones = tombstones - 1;
END;
CREATE TABLE facts (name TEXT PRIMARY KEY, value BLOB NOT NULL);
"""


class SqliteFile:
    """``wait_s``: for others that write, and for one of ``connections_max`` connections."""

    def __init__(self, path: Path, connections_max: int, wait_s: float) -> None:
        self.path = path
        self._wait_s: Final = wait_s
        self._turns: Final = threading.BoundedSemaphore(connections_max)
        self._writes: Final = threading.Lock()
        self._lock: Final = threading.Lock()
        self._idle: list[sqlite3.Connection] = []
        self._opened = (0, 0)  # device and inode of the file that they are connections to
        self._closed = False
        self._watch: sqlite3.Connection | None = None  # never writes, so it sees what all others do
        self._watches = 0

    @contextlib.contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        """What is read with it is of one moment. Raises StoreError."""
        with self._connection("BEGIN") as connection:
            yield connection

    @contextlib.contextmanager
    def writing(self) -> Iterator[sqlite3.Connection]:
        """What is written with it is durable at its end, or not at all. Raises StoreError."""
        # SQLite has who finds another writing sleep and look again, ever longer: threads of one process need not.
        if not self._writes.acquire(timeout=self._wait_s):
            raise StoreError(f"the store of jobs {self.path} is busy for more than {self._wait_s:g} s (store_wait_s)")
        try:
            with self._connection("BEGIN IMMEDIATE") as connection:
                yield connection
        finally:
            self._writes.release()

    def change(self) -> int:
        """Another number than before when anything has been written since, by whomever. Raises StoreError."""
        with self._lock:
            try:
                self._check_which()
                if self._watch is None:
                    self._watch = self._open()
                    self._watches += 1
                version: int = self._watch.execute("PRAGMA data_version").fetchone()[0]
            except (sqlite3.Error, OSError) as error:
                self._close_watch()
                raise self._told(error) from None
            return (self._watches << 32) + version

    def has_room(self, size: int) -> bool:
        """Whether the disk has room for so many bytes, in the log and in the file, and for what comes after. Raises
        StoreError."""
        try:
            about = os.statvfs(self.path.parent)
        except OSError as error:
            raise self._told(error) from None
        return about.f_bavail * about.f_frsize >= 2 * size + _SPARE_BYTES

    def full(self) -> str:
        return f"there is no room left on the disk of the store of jobs {self.path}; free some"

    def vacuum(self) -> None:
        """Give free pages back to the file system, a bounded number of them, when they are many: what is put in later
        would take them anyway."""
        for _ in range(_VACUUM_TURNS):
            with self._connection("") as connection:
                free = connection.execute("PRAGMA freelist_count").fetchone()[0]
                if free < max(_VACUUM_PAGES, connection.execute("PRAGMA page_count").fetchone()[0] // 4):
                    return
                # A step for each page; ``execute`` makes one alone of what has no columns.
                connection.executescript(f"PRAGMA incremental_vacuum({_VACUUM_PAGES})")

    def close(self) -> None:
        with self._lock:
            self._closed = True
            self._forget()

    @contextlib.contextmanager
    def _connection(self, begin: str) -> Iterator[sqlite3.Connection]:
        if not self._turns.acquire(timeout=self._wait_s):
            raise StoreError(f"the store of jobs {self.path} is busy for more than {self._wait_s:g} s (store_wait_s)")
        try:
            connection, opened = self._take()
            with contextlib.ExitStack() as back:
                back.callback(connection.close)
                if begin:
                    connection.execute(begin)
                refused = None
                try:
                    yield connection
                except StoreError as error:
                    refused = error
                if begin:
                    connection.execute("ROLLBACK" if refused else "COMMIT")
                back.pop_all()
                self._give_back(connection, opened)
                if refused:
                    raise refused
        except (sqlite3.Error, OSError) as error:
            raise self._told(error) from None
        finally:
            self._turns.release()

    def _take(self) -> tuple[sqlite3.Connection, tuple[int, int]]:
        with self._lock:
            self._check_which()
            if self._idle:
                return self._idle.pop(), self._opened
            return self._open(), self._opened

    def _give_back(self, connection: sqlite3.Connection, opened: tuple[int, int]) -> None:
        with self._lock:
            if self._closed or opened != self._opened:
                connection.close()
            else:
                self._idle.append(connection)

    def _check_which(self) -> None:
        """Connections are to the file that has the path now: somebody may have moved the last one aside."""
        if self._closed:
            raise StoreError("the store of jobs is closed")
        try:
            about = self.path.stat()
        except FileNotFoundError:
            self._forget()
            create(self.path)
            about = self.path.stat()
        if (about.st_dev, about.st_ino) != self._opened:
            self._forget()
            self._opened = (about.st_dev, about.st_ino)

    def _forget(self) -> None:
        self._close_watch()
        while self._idle:
            self._idle.pop().close()

    def _close_watch(self) -> None:
        if self._watch is not None:
            self._watch.close()
            self._watch = None

    def _open(self) -> sqlite3.Connection:
        connection = _connect(self.path, self._wait_s)
        try:
            application = connection.execute("PRAGMA application_id").fetchone()[0]
            schema = connection.execute("PRAGMA user_version").fetchone()[0]
            if application != APPLICATION:
                raise StoreError(f"{self.path} is no store of jobs; move it aside, or name another with [jobs] store")
            if schema != SCHEMA:
                raise StoreError(
                    f"{self.path} is a store of jobs of version {schema}, and this Penstock reads {SCHEMA}; "
                    "move it aside"
                )
        except BaseException:
            connection.close()
            raise
        return connection

    def _told(self, error: sqlite3.Error | OSError) -> StoreError:
        """In a sentence, with the way out."""
        if isinstance(error, OSError):
            return StoreError(f"the store of jobs {self.path} cannot be used: {error.strerror or error}")
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF
        if code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
            return StoreError(
                f"the store of jobs {self.path} is damaged ({error}); it is left as it is: move it aside, with what "
                "lies beside it under the same name and -wal or -shm, and a new one is made"
            )
        if code == sqlite3.SQLITE_FULL:
            return StoreError(self.full())
        if code == sqlite3.SQLITE_BUSY:
            return StoreError(
                f"others write to the store of jobs {self.path} for more than {self._wait_s:g} s (store_wait_s)"
            )
        return StoreError(f"the store of jobs {self.path} cannot be used: {error}")


def create(path: Path) -> None:
    """A new file, complete when it is there, for its user alone; whoever is first makes it. Raises OSError,
    sqlite3.Error, and StoreError where others could have put one."""
    _check_directory(path.parent)
    for beside in (path.with_name(f"{path.name}-wal"), path.with_name(f"{path.name}-shm")):
        if beside.exists():
            raise StoreError(f"{beside} is what a store of jobs has left that was moved or deleted; move it aside, too")
    new = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    os.close(os.open(new, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
    try:
        connection = _connect(new, 0.0)
        try:
            connection.execute(f"PRAGMA page_size = {_PAGE_BYTES}")
            connection.execute("PRAGMA auto_vacuum = INCREMENTAL")
            connection.execute("PRAGMA journal_mode = WAL").fetchall()
            connection.executescript(f"BEGIN;{_TABLES}COMMIT;")
            connection.execute(f"PRAGMA application_id = {APPLICATION}")
            connection.execute(f"PRAGMA user_version = {SCHEMA}")
        finally:
            connection.close()
        with contextlib.suppress(FileExistsError):
            os.link(new, path)
    finally:
        for name in (new.name, f"{new.name}-wal", f"{new.name}-shm"):
            new.with_name(name).unlink(missing_ok=True)
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def _connect(path: Path, wait_s: float) -> sqlite3.Connection:
    connection = sqlite3.connect(
        f"{path.absolute().as_uri()}?mode=rw", uri=True, timeout=wait_s, isolation_level=None, check_same_thread=False
    )
    connection.execute("PRAGMA synchronous = FULL")  # what has been accepted outlives a power cut
    connection.execute("PRAGMA temp_store = MEMORY")
    connection.execute(f"PRAGMA journal_size_limit = {_LOG_BYTES}")
    return connection


def _check_directory(path: Path) -> None:
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    about = path.stat()
    if about.st_uid != os.geteuid() or stat.S_IMODE(about.st_mode) & 0o022:
        raise StoreError(f"{path} belongs to somebody else, or others may write to it; make it yours with mode 0700")
