"""Jobs in a SQLite file, for the processes of one host."""

from __future__ import annotations

import builtins
import contextlib
import sqlite3
from collections.abc import Collection, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, Final

import msgpack

from penstock.jobs import job as jobs
from penstock.jobs.job import Callback, Job, StoredRequest, StoredResponse
from penstock.jobs.options import JobsOptions
from penstock.jobs.owner import is_dead
from penstock.jobs.sqlfile import SqliteFile
from penstock.jobs.store import (
    IDS_MAX,
    REQUESTS_PART,
    Counts,
    Store,
    StoreError,
    StoreFull,
    checked_ids,
    finished,
    new_secret,
    no_room,
    too_many,
)

_SWEEP_MAX: Final = 1000  # jobs and tombstones of one call
_OWN: Final = tuple(field.name for field in fields(Job) if field.name != "callback")
_CALLBACK: Final = ("url", "state", "attempts", "due_at", "owner", "error")
_COLUMNS: Final = (*_OWN, *(f"callback_{name}" for name in _CALLBACK))
_SELECT: Final = f"SELECT number, {', '.join(_COLUMNS)} FROM jobs"
_INSERT: Final = f"INSERT INTO jobs ({', '.join(_COLUMNS)}) VALUES ({', '.join('?' * len(_COLUMNS))})"
_UPDATE: Final = f"UPDATE jobs SET {', '.join(f'{name} = ?' for name in _COLUMNS)} WHERE number = ?"
_BURIED: Final = ("id", "model", "submitted_at", "started_at", "ended_at", "expires_at")
_CANCEL_WANTED: Final = _OWN.index("cancel_wanted")


class SqliteStore(Store):
    def __init__(self, path: Path, options: JobsOptions) -> None:
        super().__init__(options)
        self._file = SqliteFile(path, options.connections_max, options.store_wait_s)

    def submit(self, request: StoredRequest, now: float) -> Job:
        job = jobs.submitted(request, now)
        with self._file.writing() as connection:
            count, used = connection.execute("SELECT jobs, bytes FROM totals").fetchone()
            if count >= self.options.count_max:
                raise too_many(self.options)
            if used + job.bytes > self.options.bytes_max * REQUESTS_PART:
                raise no_room(job.bytes, self.options)
            if not self._file.has_room(job.bytes):
                raise StoreFull(self._file.full())
            number = connection.execute(_INSERT, _row(job)).lastrowid
            connection.execute(
                "INSERT INTO requests VALUES (?, ?, ?, ?, ?)",
                (number, request.method, request.url, msgpack.packb(dict(request.headers)), request.body),
            )
        return job

    def get(self, ids: Collection[str], now: float) -> Sequence[Job]:
        wanted = checked_ids(ids)
        marks = ", ".join("?" * len(wanted))
        with self._file.reading() as connection:
            rows = connection.execute(f"{_SELECT} WHERE id IN ({marks})", wanted).fetchall()
            buried = connection.execute(
                f"SELECT {', '.join(_BURIED)} FROM tombstones WHERE id IN ({marks}) AND expires_at > ?",
                (*wanted, now - self.options.tombstone_s),
            ).fetchall()
        found = {row[1]: jobs.seen(_job(row), now, self.options) for row in rows}
        found |= {row[0]: Job(status=jobs.EXPIRED, **dict(zip(_BURIED, row, strict=True))) for row in buried}
        return [job for id in wanted if (job := found.get(id)) is not None]

    def list(self, now: float, status: str = "", limit: int = 100, after: str = "") -> Sequence[Job]:
        terms: builtins.list[str] = ["(expires_at IS NULL OR expires_at > ?)"]
        values: builtins.list[Any] = [now, min(limit, IDS_MAX)]
        if status:
            terms.insert(0, "status = ?")
            values.insert(0, status)
        with self._file.reading() as connection:
            if after:
                terms.insert(0, "number < ?")
                values.insert(0, _number_of(connection, after))
            query = f"{_SELECT} WHERE {' AND '.join(terms)} ORDER BY number DESC LIMIT ?"
            return [_job(row) for row in connection.execute(query, values)]

    def request_of(self, id: str) -> StoredRequest | None:
        with self._file.reading() as connection:
            row = connection.execute(
                "SELECT method, url, headers, body, model, callback_url FROM jobs JOIN requests USING (number) "
                "WHERE id = ?",
                (id,),
            ).fetchone()
        if row is None:
            return None
        method, url, headers, body, model, callback_url = row
        return StoredRequest(method, url, msgpack.unpackb(headers), body, model, callback_url or "")

    def response_of(self, id: str) -> StoredResponse | None:
        with self._file.reading() as connection:
            row = connection.execute(
                "SELECT responses.status, headers, body FROM jobs JOIN responses USING (number) WHERE id = ?", (id,)
            ).fetchone()
        return None if row is None else StoredResponse(row[0], msgpack.unpackb(row[1]), row[2])

    def claim(self, owner: str, count: int, now: float, lease_s: float, running: Collection[str] = ()) -> Sequence[Job]:
        with self._file.reading() as connection:
            if not _candidates(connection, owner, 1, now, running):
                return []  # nobody else has to wait for that
        taken: builtins.list[Job] = []
        with self._file.writing() as connection:
            for number, job in _candidates(connection, owner, count, now, running):
                if len(taken) == count:
                    break
                job = jobs.claimed(job, owner, now, lease_s, self.options)
                _write(connection, number, job)
                if job.status == jobs.RUNNING:
                    taken.append(job)
        return taken

    def renew(self, owner: str, ids: Collection[str], now: float, lease_s: float) -> set[str]:
        wanted = checked_ids(ids)
        held = set()
        with self._file.writing() as connection:
            for id in wanted:
                found = _find(connection, id)
                if found is not None and jobs.holds(found[1], owner):
                    _write(connection, found[0], jobs.renewed(found[1], now, lease_s))
                    held.add(id)
        return held

    def wanted_cancels(self, owner: str) -> set[str]:
        with self._file.reading() as connection:
            query = "SELECT id FROM jobs WHERE status = 'running' AND owner = ? AND cancel_wanted"
            return {row[0] for row in connection.execute(query, (owner,))}

    def finish(self, id: str, owner: str, status: str, response: StoredResponse | None, error: str, now: float) -> bool:
        with self._file.writing() as connection:
            found = _find(connection, id)
            if found is None or not jobs.holds(found[1], owner):
                return False
            number, job = found
            used = connection.execute("SELECT bytes FROM totals").fetchone()[0] - job.bytes
            job, response = finished(job, status, response, error, used, now, self.options)
            _write(connection, number, job)
            if response is not None:
                values = (number, response.status, msgpack.packb(dict(response.headers)), response.body)
                connection.execute("INSERT INTO responses VALUES (?, ?, ?, ?)", values)
        return True

    def put_back(self, id: str, owner: str, not_before: float, now: float) -> bool:
        with self._file.writing() as connection:
            found = _find(connection, id)
            if found is None or not jobs.holds(found[1], owner):
                return False
            _write(connection, found[0], jobs.given_back(found[1], not_before, now, self.options))
        return True

    def cancel(self, id: str, now: float) -> Job | None:
        with self._file.writing() as connection:
            found = _find(connection, id)
            if found is not None and not jobs.has_expired(found[1], now):
                job = jobs.cancelled(found[1], now, self.options)
                if job != found[1]:
                    _write(connection, found[0], job)
                return job
        known = self.get([id], now)
        return known[0] if known else None

    def sweep(self, now: float) -> int:
        count = self._bury(now)
        with contextlib.suppress(StoreError):  # a disk that is full; another time
            self._file.vacuum()
        return count

    def _bury(self, now: float) -> int:
        oldest = now - self.options.tombstone_s
        with self._file.reading() as connection:
            due = connection.execute(
                "SELECT EXISTS (SELECT 1 FROM jobs WHERE expires_at <= ?) OR EXISTS (SELECT 1 FROM tombstones WHERE "
                "expires_at <= ?) OR (SELECT tombstones FROM totals) > ?",
                (now, oldest, self.options.tombstones_max),
            ).fetchone()[0]
        if not due:
            return 0
        columns = ", ".join(("number", *_BURIED))
        with self._file.writing() as connection:
            query = "SELECT number FROM jobs WHERE expires_at <= ? ORDER BY expires_at LIMIT ?"
            numbers = connection.execute(query, (now, _SWEEP_MAX)).fetchall()
            connection.executemany(
                f"INSERT INTO tombstones ({columns}) SELECT {columns} FROM jobs WHERE number = ?", numbers
            )
            connection.executemany("DELETE FROM jobs WHERE number = ?", numbers)
            connection.execute(
                "DELETE FROM tombstones WHERE number IN "
                "(SELECT number FROM tombstones WHERE expires_at <= ? ORDER BY expires_at LIMIT ?)",
                (oldest, _SWEEP_MAX),
            )
            many = connection.execute("SELECT tombstones FROM totals").fetchone()[0] - self.options.tombstones_max
            connection.execute(
                "DELETE FROM tombstones WHERE number IN (SELECT number FROM tombstones ORDER BY expires_at LIMIT ?)",
                (max(many, 0),),
            )
        return len(numbers)

    def due_callbacks(self, owner: str, count: int, now: float, lease_s: float) -> Sequence[Job]:
        query = (
            f"{_SELECT} WHERE callback_state = 'pending' AND (callback_due_at <= ? OR callback_due_at > ?) "
            "ORDER BY callback_due_at LIMIT ?"
        )
        later = now + jobs.CALLBACK_LATER_MAX_S + lease_s
        with self._file.reading() as connection:
            if not connection.execute(query, (now, later, 1)).fetchall():
                return []
        taken = []
        with self._file.writing() as connection:
            for row in connection.execute(query, (now, later, count)).fetchall():
                job = _job(row)
                assert job.callback is not None
                begun = jobs.callback_begun(job.callback, owner, now, lease_s, self.options.callback_attempts_max)
                job = replace(job, callback=begun)
                _write(connection, row[0], job)
                if begun.state == jobs.PENDING:
                    taken.append(job)
        return taken

    def callback_done(self, id: str, owner: str, ok: bool, error: str = "", next_at: float | None = None) -> bool:
        with self._file.writing() as connection:
            found = _find(connection, id)
            if found is None or found[1].callback is None or not jobs.calls(found[1].callback, owner):
                return False
            number, job = found
            _write(
                connection, number, replace(job, callback=jobs.callback_ended(found[1].callback, ok, error, next_at))
            )
        return True

    def change(self) -> int:
        return self._file.change()

    def secret(self) -> bytes:
        query = "SELECT value FROM facts WHERE name = 'secret'"
        with self._file.reading() as connection:
            row = connection.execute(query).fetchone()
        if row is None:
            with self._file.writing() as connection:
                connection.execute("INSERT OR IGNORE INTO facts VALUES ('secret', ?)", (new_secret(),))
                row = connection.execute(query).fetchone()
        return bytes(row[0])

    def counts(self) -> Counts:
        with self._file.reading() as connection:
            found = dict(connection.execute("SELECT status, count(*) FROM jobs GROUP BY status").fetchall())
            used, tombstones = connection.execute("SELECT bytes, tombstones FROM totals").fetchone()
            query = "SELECT count(*) FROM jobs WHERE callback_state = 'pending'"
            callbacks = connection.execute(query).fetchone()[0]
        return Counts({status: found.get(status, 0) for status in jobs.STATUSES}, used, tombstones, callbacks)

    def close(self) -> None:
        self._file.close()


def _candidates(
    connection: sqlite3.Connection, owner: str, count: int, now: float, running: Collection[str]
) -> list[tuple[int, Job]]:
    """Jobs that may be run now, in the order of their arrival: all that have lost their runner, and of those that wait
    ``count`` at most."""
    owners = connection.execute("SELECT DISTINCT owner FROM jobs WHERE status = 'running'").fetchall()
    dead = [each for (each,) in owners if each != owner and is_dead(each)]
    lost = f"{_SELECT} WHERE status = 'running' AND (lease_until <= ? OR owner IN ({', '.join('?' * len(dead))}))"
    queued = f"{_SELECT} WHERE status = 'queued' AND (not_before <= ? OR not_before > ?) ORDER BY number LIMIT ?"
    lost_rows = connection.execute(lost, (now, *dead)).fetchall()
    rows = [row for row in lost_rows if row[1] not in running]
    rows += connection.execute(queued, (now, now + jobs.LATER_MAX_S, count)).fetchall()
    return [(row[0], _job(row)) for row in sorted(rows, key=lambda row: int(row[0]))]


def _find(connection: sqlite3.Connection, id: str) -> tuple[int, Job] | None:
    row = connection.execute(f"{_SELECT} WHERE id = ?", (id,)).fetchone()
    return None if row is None else (row[0], _job(row))


def _number_of(connection: sqlite3.Connection, id: str) -> int:
    """Of one that is kept, or has been; 0 for an unknown one."""
    query = "SELECT number FROM jobs WHERE id = ? UNION SELECT number FROM tombstones WHERE id = ?"
    row = connection.execute(query, (id, id)).fetchone()
    return 0 if row is None else int(row[0])


def _write(connection: sqlite3.Connection, number: int, job: Job) -> None:
    connection.execute(_UPDATE, (*_row(job), number))
    if job.ended:
        connection.execute("DELETE FROM requests WHERE number = ?", (number,))


def _row(job: Job) -> tuple[Any, ...]:
    own = tuple(getattr(job, name) for name in _OWN)
    called = job.callback
    if called is None:
        return (*own, *(None,) * len(_CALLBACK))
    return (*own, called.url, called.state, called.attempts, called.due_at, called.owner, called.last_error)


def _job(row: Sequence[Any]) -> Job:
    """Of a row that begins with its number."""
    values = list(row[1 : len(_OWN) + 1])
    values[_CANCEL_WANTED] = bool(values[_CANCEL_WANTED])
    called = row[len(_OWN) + 1 :]
    values.append(None if called[0] is None else Callback(*called))
    return Job(*values)
