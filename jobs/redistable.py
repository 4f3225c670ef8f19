"""The jobs in a Redis, read and replaced: see ``redisscripts.py``."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from penstock.jobs.job import Job, StoredResponse
from penstock.jobs.options import JobsOptions
from penstock.jobs.redisformat import new_stamp, packed_response, saved_values, unpacked_job
from penstock.jobs.redisscripts import BURY, FORGET, SAVE, SUBMIT
from penstock.jobs.store import SCHEMA, StoreError, without_password

PREFIX: Final = "penstock:{jobs}:"
TRIES_MAX: Final = 32  # when others change the same jobs
BATCH_MAX: Final = 500  # jobs of one script
DONE: Final = 1

Known = tuple[bytes, int, Job]  # stamp, number, job
Decide = Callable[[Job], "Job | None"]  # None: leave it as it is


class RedisTable:
    def __init__(self, url: str, options: JobsOptions) -> None:
        """Raises StoreError for a URL that cannot be read."""
        self.name: Final = without_password(url)
        self._closed = False
        self._checked = False
        try:
            pool = redis.BlockingConnectionPool.from_url(
                url,
                max_connections=options.connections_max,
                timeout=options.store_wait_s,
                socket_timeout=options.store_wait_s,
                socket_connect_timeout=options.store_wait_s,
                retry=Retry(NoBackoff(), 1, (redis.ConnectionError,)),  # that Redis has closed since it was used
                client_name="penstock",
            )
        except (ValueError, redis.RedisError) as error:
            raise StoreError(f"[jobs] store is {self.name}, which is no address of a Redis: {error}") from None
        self.client: Final[Any] = redis.Redis(connection_pool=pool)  # its types are those of any client's
        self.submit = self.client.register_script(SUBMIT)
        self._save = self.client.register_script(SAVE)
        self.bury = self.client.register_script(BURY)
        self._forget = self.client.register_script(FORGET)

    def close(self) -> None:
        self._closed = True
        self.client.close()
        self.client.connection_pool.disconnect()

    @contextlib.contextmanager
    def talking(self) -> Iterator[None]:
        """Raises StoreError for whatever goes wrong."""
        if self._closed:
            raise StoreError("the store of jobs is closed")
        try:
            if not self._checked:
                self._check()
            yield
        except redis.RedisError as error:
            if "maxmemory" in str(error):  # also in a script, where it has no class of its own
                raise StoreError(f"the store of jobs {self.name} has no memory left (its maxmemory)") from None
            raise StoreError(f"the store of jobs {self.name} cannot be used: {error}") from None
        except OSError as error:
            raise StoreError(f"the store of jobs {self.name} cannot be used: {error.strerror or error}") from None

    def _check(self) -> None:
        self.client.set(f"{PREFIX}schema", SCHEMA, nx=True)
        schema = int(self.client.get(f"{PREFIX}schema") or 0)
        if schema != SCHEMA:
            raise StoreError(
                f"the jobs in {self.name} are of version {schema}, and this Penstock reads {SCHEMA}; name another "
                "database with [jobs] store"
            )
        self._checked = True

    def alter(self, ids: Sequence[str], decide: Decide) -> dict[str, Job]:
        """Those that became something else, as they are then, in the order of ``ids``."""
        done: dict[str, Job] = {}
        left = ids
        with self.talking():
            for _ in range(TRIES_MAX):
                wanted = [
                    (stamp, number, new)
                    for stamp, number, job in self.read(left).values()
                    if (new := decide(job)) is not None
                ]
                saved = self.write(wanted)
                done |= {job.id: job for (_, _, job), told in saved if told == DONE}
                left = [job.id for (_, _, job), told in saved if told != DONE]
                if not left:
                    return {id: done[id] for id in ids if id in done}
        raise self.contended()

    def indexed(self, ids: Sequence[str]) -> dict[str, Known]:
        """Of ids that an index has: those that are not there, since Redis has evicted them, go from it."""
        known = self.read(ids)
        missing = [id for id in ids if id not in known]
        if missing:
            self._forget(keys=[PREFIX], args=missing)
        return known

    def read(self, ids: Sequence[str]) -> dict[str, Known]:
        """By id, in their order, without those that are not there."""
        if not ids:
            return {}
        pipeline = self.client.pipeline(transaction=False)
        for id in ids:
            pipeline.hmget(f"{PREFIX}job:{id}", "t", "n", "r")
        told = pipeline.execute()
        return {id: (t, int(n), unpacked_job(r)) for id, (t, n, r) in zip(ids, told, strict=True) if t is not None}

    def write(
        self, known: Sequence[Known], response: StoredResponse | None = None, limit: int = -1
    ) -> list[tuple[Known, int]]:
        """Each with what came of it: ``DONE``, 2 for too many bytes, 0 for one that has changed."""
        saved: list[tuple[Known, int]] = []
        packed = packed_response(response)
        for start in range(0, len(known), BATCH_MAX):
            some = known[start : start + BATCH_MAX]
            values: list[Any] = [limit]
            for stamp, _, job in some:
                values += [job.id, stamp, new_stamp(), *saved_values(job), packed]
            saved += zip(some, self._save(keys=[PREFIX], args=values), strict=True)
        return saved

    def contended(self) -> StoreError:
        return StoreError(f"others change the same jobs in {self.name} all the time; try again shortly")
