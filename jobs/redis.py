"""Jobs in Redis, for hosts that share it.

That a job is kept is Redis' promise: with ``appendonly yes`` it outlives a kill of Redis, with ``appendfsync always`` a
power cut, with ``maxmemory-policy noeviction`` (the default) a lack of memory. ``advice`` says what is missing.
"""

from __future__ import annotations

import builtins
from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any, Final

from penstock.jobs import job as jobs
from penstock.jobs.job import Job, StoredRequest, StoredResponse
from penstock.jobs.options import JobsOptions
from penstock.jobs.owner import is_dead
from penstock.jobs.redisformat import (
    new_stamp,
    packed_grave,
    packed_job,
    packed_request,
    texts,
    unpacked_grave,
    unpacked_job,
    unpacked_request,
    unpacked_response,
)
from penstock.jobs.redistable import BATCH_MAX, DONE, PREFIX, TRIES_MAX, Decide, Known, RedisTable
from penstock.jobs.store import (
    IDS_MAX,
    REQUESTS_PART,
    Counts,
    Store,
    checked_ids,
    finished,
    new_secret,
    no_room,
    too_many,
)


class RedisStore(Store):
    def __init__(self, url: str, options: JobsOptions) -> None:
        """Raises StoreError for a URL that cannot be read."""
        super().__init__(options)
        self._table: Final = RedisTable(url, options)
        self._redis: Final = self._table.client

    def submit(self, request: StoredRequest, now: float) -> Job:
        job = jobs.submitted(request, now)
        most = int(self.options.bytes_max * REQUESTS_PART)
        packed = packed_request(request)
        values = (job.id, new_stamp(), packed_job(job), job.bytes, packed, self.options.count_max, most)
        with self._table.talking():
            told = self._table.submit(keys=[PREFIX], args=values)
        if told:
            raise too_many(self.options) if told == 1 else no_room(job.bytes, self.options)
        return job

    def get(self, ids: Collection[str], now: float) -> Sequence[Job]:
        wanted = checked_ids(ids)
        if not wanted:
            return []
        with self._table.talking():
            pipeline = self._redis.pipeline(transaction=True)
            for id in wanted:
                pipeline.hget(f"{PREFIX}job:{id}", "r")
            pipeline.hmget(f"{PREFIX}buried", wanted)
            *kept, buried = pipeline.execute()
        found = []
        oldest = now - self.options.tombstone_s
        for record, grave in zip(kept, buried, strict=True):
            job = None
            if record is not None:
                job = jobs.seen(unpacked_job(record), now, self.options)
            elif grave is not None:
                job = unpacked_grave(grave)[1]
                job = None if jobs.has_expired(job, oldest) else job
            if job is not None:
                found.append(job)
        return found

    def list(self, now: float, status: str = "", limit: int = 100, after: str = "") -> Sequence[Job]:
        limit = min(limit, IDS_MAX)
        index = f"{PREFIX}status:{status}" if status else f"{PREFIX}order"
        found: builtins.list[Job] = []
        with self._table.talking():
            below = f"({self._number_of(after)}" if after else "+inf"
            while len(found) < limit:
                scored = self._redis.zrevrangebyscore(index, below, "-inf", 0, min(limit, BATCH_MAX), withscores=True)
                if not scored:
                    break
                known = self._table.indexed([id.decode() for id, _ in scored])
                found += [job for _, _, job in known.values() if not jobs.has_expired(job, now)]
                below = f"({int(scored[-1][1])}"
        return found[:limit]

    def request_of(self, id: str) -> StoredRequest | None:
        with self._table.talking():
            packed = self._redis.get(f"{PREFIX}request:{id}")
        return None if packed is None else unpacked_request(packed)

    def response_of(self, id: str) -> StoredResponse | None:
        with self._table.talking():
            packed = self._redis.get(f"{PREFIX}response:{id}")
        return None if packed is None else unpacked_response(packed)

    def claim(self, owner: str, count: int, now: float, lease_s: float, running: Collection[str] = ()) -> Sequence[Job]:
        taken: builtins.list[Job] = []
        dead: frozenset[str] = frozenset()

        def decide(job: Job) -> Job | None:
            if job.id in running or not jobs.is_due(job, now, dead):
                return None
            return jobs.claimed(job, owner, now, lease_s, self.options)

        with self._table.talking():
            for _ in range(TRIES_MAX):
                ids, dead = self._candidates(owner, count - len(taken), now)
                known = sorted(self._table.indexed(ids).values(), key=lambda each: each[1])
                wanted = _first(known, decide, count - len(taken))
                if not wanted:
                    break
                saved = self._table.write(wanted)
                taken += [job for (_, _, job), told in saved if told == DONE and job.status == jobs.RUNNING]
        return taken

    def _candidates(self, owner: str, count: int, now: float) -> tuple[builtins.list[str], frozenset[str]]:
        """Ids of what may be run now, and owners that have ended."""
        if count <= 0:
            return [], frozenset()
        pipeline = self._redis.pipeline(transaction=True)
        pipeline.hkeys(f"{PREFIX}owners")
        pipeline.zrangebyscore(f"{PREFIX}leases", "-inf", now, start=0, num=BATCH_MAX)
        pipeline.zrangebyscore(f"{PREFIX}later", "-inf", now, start=0, num=BATCH_MAX)
        pipeline.zrangebyscore(f"{PREFIX}later", now + jobs.LATER_MAX_S, "+inf", start=0, num=BATCH_MAX)
        pipeline.zrange(f"{PREFIX}ready", 0, count - 1)
        owners, lapsed, waited, set_back, ready = map(texts, pipeline.execute())
        dead = frozenset(each for each in owners if each != owner and is_dead(each))
        held = texts(self._redis.zrange(f"{PREFIX}leases", 0, IDS_MAX)) if dead else []
        return [*dict.fromkeys([*lapsed, *held, *waited, *set_back, *ready])], dead

    def renew(self, owner: str, ids: Collection[str], now: float, lease_s: float) -> set[str]:
        def decide(job: Job) -> Job | None:
            return jobs.renewed(job, now, lease_s) if jobs.holds(job, owner) else None

        return set(self._table.alter(checked_ids(ids), decide))

    def wanted_cancels(self, owner: str) -> set[str]:
        with self._table.talking():
            cancels = self._redis.hgetall(f"{PREFIX}cancels")
        return {id.decode() for id, of in cancels.items() if of.decode() == owner}

    def finish(self, id: str, owner: str, status: str, response: StoredResponse | None, error: str, now: float) -> bool:
        with self._table.talking():
            for _ in range(TRIES_MAX):
                found = self._table.read([id]).get(id)
                if found is None or not jobs.holds(found[2], owner):
                    return False
                stamp, number, job = found
                used = self._used() - job.bytes
                ended, kept = finished(job, status, response, error, used, now, self.options)
                limit = -1 if kept is None else self.options.bytes_max
                ((_, told),) = self._table.write([(stamp, number, ended)], kept, limit)
                if told == DONE:
                    return True
        raise self._table.contended()

    def put_back(self, id: str, owner: str, not_before: float, now: float) -> bool:
        def decide(job: Job) -> Job | None:
            return jobs.given_back(job, not_before, now, self.options) if jobs.holds(job, owner) else None

        return bool(self._table.alter([id], decide))

    def cancel(self, id: str, now: float) -> Job | None:
        def decide(job: Job) -> Job | None:
            if jobs.has_expired(job, now):
                return None
            wanted = jobs.cancelled(job, now, self.options)
            return None if wanted == job else wanted

        altered = self._table.alter([id], decide)
        if altered:
            return altered[id]
        known = self.get([id], now)
        return known[0] if known else None

    def sweep(self, now: float) -> int:
        with self._table.talking():
            ids = texts(self._redis.zrangebyscore(f"{PREFIX}ends", "-inf", now, start=0, num=BATCH_MAX))
            values: builtins.list[Any] = [self.options.tombstones_max, now - self.options.tombstone_s, BATCH_MAX]
            for stamp, number, job in self._table.indexed(ids).values():
                values += [job.id, stamp, packed_grave(number, job), job.expires_at]
            return int(self._table.bury(keys=[PREFIX], args=values))

    def due_callbacks(self, owner: str, count: int, now: float, lease_s: float) -> Sequence[Job]:
        def decide(job: Job) -> Job | None:
            called = job.callback
            if called is None or not jobs.callback_is_due(called, now, lease_s):
                return None
            return replace(
                job,
                callback=jobs.callback_begun(called, owner, now, lease_s, self.options.callback_attempts_max),
            )

        with self._table.talking():
            later = now + jobs.CALLBACK_LATER_MAX_S + lease_s
            pipeline = self._redis.pipeline(transaction=True)
            pipeline.zrangebyscore(f"{PREFIX}callbacks", "-inf", now, start=0, num=count)
            pipeline.zrangebyscore(f"{PREFIX}callbacks", later, "+inf", start=0, num=count)
            due, set_back = map(texts, pipeline.execute())
            ids = [*due, *set_back][:count]
            self._table.indexed(ids)
        altered = self._table.alter(ids, decide).values()
        return [job for job in altered if job.callback is not None and job.callback.state == jobs.PENDING]

    def callback_done(self, id: str, owner: str, ok: bool, error: str = "", next_at: float | None = None) -> bool:
        def decide(job: Job) -> Job | None:
            if job.callback is None or not jobs.calls(job.callback, owner):
                return None
            return replace(job, callback=jobs.callback_ended(job.callback, ok, error, next_at))

        return bool(self._table.alter([id], decide))

    def change(self) -> int:
        with self._table.talking():
            return int(self._redis.hget(f"{PREFIX}totals", "change") or 0)

    def secret(self) -> bytes:
        with self._table.talking():
            self._redis.set(f"{PREFIX}secret", new_secret(), nx=True)
            return bytes(self._redis.get(f"{PREFIX}secret") or b"")

    def counts(self) -> Counts:
        with self._table.talking():
            pipeline = self._redis.pipeline(transaction=True)
            for status in jobs.STATUSES:
                pipeline.zcard(f"{PREFIX}status:{status}")
            pipeline.zcard(f"{PREFIX}graves")
            pipeline.zcard(f"{PREFIX}callbacks")
            pipeline.hget(f"{PREFIX}totals", "bytes")
            *counts, tombstones, callbacks, used = pipeline.execute()
        return Counts(dict(zip(jobs.STATUSES, counts, strict=True)), int(used or 0), tombstones, callbacks)

    def advice(self) -> str:
        with self._table.talking():
            about = self._redis.info("persistence", "memory")
        wanted = []
        if not about.get("aof_enabled"):
            wanted.append("appendonly is no: a Redis that ends loses jobs")
        if about.get("maxmemory") and about.get("maxmemory_policy") != "noeviction":
            wanted.append(f"maxmemory-policy is {about['maxmemory_policy']}: Redis may throw jobs away")
        return f"{self._table.name}: {'; '.join(wanted)}" if wanted else ""

    def close(self) -> None:
        self._table.close()

    def _used(self) -> int:
        return int(self._redis.hget(f"{PREFIX}totals", "bytes") or 0)

    def _number_of(self, id: str) -> int:
        """Of one that is kept, or has been; 0 for an unknown one."""
        number = self._redis.hget(f"{PREFIX}job:{id}", "n")
        if number is not None:
            return int(number)
        grave = self._redis.hget(f"{PREFIX}buried", id)
        return 0 if grave is None else unpacked_grave(grave)[0]


def _first(known: Sequence[Known], decide: Decide, count: int) -> list[Known]:
    """What becomes of those that come first, until so many of them run."""
    wanted: list[Known] = []
    for stamp, number, job in known:
        if count == 0:
            break
        new = decide(job)
        if new is not None:
            wanted.append((stamp, number, new))
            count -= new.status == jobs.RUNNING
    return wanted
