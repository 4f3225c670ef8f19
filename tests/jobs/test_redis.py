"""What only Redis does: it goes away, comes back, forgets, and is shared by hosts."""

from __future__ import annotations

import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import redis

from penstock.jobs.job import QUEUED, SUCCEEDED, StoredRequest, StoredResponse
from penstock.jobs.options import JobsOptions
from penstock.jobs.owner import new_owner
from penstock.jobs.redis import RedisStore
from penstock.jobs.redistable import PREFIX
from penstock.jobs.store import SCHEMA, StoreError, StoreFull, without_password
from tests.jobs.conftest import RequireCommand
from tests.jobs.redisserver import RedisServer

REQUEST = StoredRequest(b"POST", b"/", {}, b"body", "m")
RESPONSE = StoredResponse(200, {}, b"result")


@pytest.fixture
def store(redis_server: RedisServer) -> Iterator[RedisStore]:
    redis_server.flush()
    store = RedisStore(redis_server.url, JobsOptions())
    yield store
    store.close()


@pytest.fixture
def client(redis_server: RedisServer) -> Iterator[Any]:
    with redis.Redis(unix_socket_path=str(redis_server.socket)) as client:
        yield client


@pytest.fixture
def own_server(require_command: RequireCommand, tmp_path: Path) -> Iterator[RedisServer]:
    """One that writes down what it is told, as one for jobs should."""
    command = require_command("redis-server", "redis-server")
    with RedisServer(command, tmp_path, "--appendonly", "yes", "--appendfsync", "always") as server:
        yield server


def test_what_was_accepted_outlives_a_kill_of_redis(own_server: RedisServer) -> None:
    store = RedisStore(own_server.url, JobsOptions())
    waiting = store.submit(REQUEST, 1.0).id
    ended = store.submit(REQUEST, 1.0).id
    secret = store.secret()
    claimed = store.claim("a", 1, 1.0, 1000.0)[0].id
    assert claimed == waiting
    assert store.put_back(waiting, "a", 0.0, 1.0)
    running = store.claim("a", 2, 1.0, 1000.0)
    assert [job.id for job in running] == [waiting, ended]
    assert store.finish(ended, "a", SUCCEEDED, RESPONSE, "", 2.0)

    own_server.kill()
    for ask in (
        store.change,
        store.counts,
        lambda: store.submit(REQUEST, 2.0),
        lambda: store.renew("a", [ended], 2, 1),
    ):
        with pytest.raises(StoreError, match="cannot be used: "):
            ask()
    own_server.start()

    assert store.renew("a", [waiting], 2.0, 15.0) == {waiting}, "the lease has outlived it, too"
    assert store.finish(waiting, "a", SUCCEEDED, RESPONSE, "", 3.0)
    assert [job.status for job in store.get([waiting, ended], 3.0)] == [SUCCEEDED, SUCCEEDED]
    assert store.response_of(ended) == RESPONSE
    assert store.secret() == secret
    assert store.advice() == ""
    store.close()


def test_one_that_was_away_when_all_began(own_server: RedisServer) -> None:
    own_server.kill()
    store = RedisStore(own_server.url, JobsOptions())
    with pytest.raises(StoreError):
        store.counts()
    own_server.start()
    assert store.submit(REQUEST, 1.0).status == QUEUED
    store.close()


def test_connections_that_redis_has_closed_are_not_noticed(store: RedisStore, client: Any) -> None:
    store.submit(REQUEST, 1.0)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: store.counts(), range(16)))
    client.client_kill_filter(_type="normal", skipme=True)
    store.submit(REQUEST, 1.0)
    assert store.counts().by_status[QUEUED] == 2


def test_one_that_does_not_answer_is_given_up(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        store = RedisStore(f"redis://127.0.0.1:{silent.getsockname()[1]}/0", JobsOptions(store_wait_s=0.2))
        began = time.monotonic()
        with pytest.raises(StoreError, match="Timeout"):
            store.change()
        assert time.monotonic() - began < 5.0
        store.close()


@pytest.mark.parametrize("url", ["redis://host:port/0", "redis://h:1/x?db=y", "redis://host:99999999"])
def test_an_address_that_cannot_be_is_told_at_once_or_when_it_is_used(url: str) -> None:
    with pytest.raises(StoreError, match=r"\[jobs\] store is redis://h|cannot be used"):
        RedisStore(url, JobsOptions(store_wait_s=0.2)).change()


def test_passwords_are_never_shown() -> None:
    store = RedisStore("redis://user:geheim@127.0.0.1:1/3?client_name=x", JobsOptions(store_wait_s=0.2))
    with pytest.raises(StoreError) as told:
        store.counts()
    assert "geheim" not in str(told.value)
    shown = {"redis://h/1?password=geheim": "redis://h/1", "unix://:geheim@/run/r.sock?db=2": "unix:///run/r.sock"}
    assert {url: without_password(url) for url in shown} == shown
    assert "redis://127.0.0.1:1/3 cannot be used" in str(told.value)
    with pytest.raises(StoreError) as told:
        RedisStore("redis://user:geheim@host:port", JobsOptions())
    assert "geheim" not in str(told.value)


def test_all_keys_have_one_prefix_and_one_slot(store: RedisStore, client: Any) -> None:
    for _ in range(3):
        store.submit(StoredRequest(b"POST", b"/", {}, b"body", "m", "http://a"), 1.0)
    for job in store.claim("a", 2, 1.0, 15.0):
        store.finish(job.id, "a", SUCCEEDED, RESPONSE, "", 1.0)
    store.claim("a", 1, 1.0, 15.0)
    store.cancel(store.list(1.0)[0].id, 1.0)
    store.secret()
    keys = [key.decode() for key in client.keys("*")]
    assert len(keys) > 10
    assert [key for key in keys if not key.startswith(PREFIX)] == []
    assert PREFIX.count("{") == 1


def test_nothing_is_left_of_jobs_but_their_tombstones(store: RedisStore, client: Any) -> None:
    for _ in range(3):
        store.submit(StoredRequest(b"POST", b"/", {}, b"body", "m", "http://a"), 1.0)
    for job in store.claim("a", 1, 1.0, 15.0):
        store.finish(job.id, "a", SUCCEEDED, RESPONSE, "", 1.0)
    store.claim("a", 1, 1.0, 15.0)
    for job in store.list(1.0):
        store.cancel(job.id, 1.0)
    assert store.claim("b", 5, 100.0, 15.0) == []
    assert store.sweep(5e3) == 3
    assert {key.decode().removeprefix(PREFIX) for key in client.keys("*")} == {"schema", "totals", "buried", "graves"}
    store.sweep(1e9)
    assert {key.decode().removeprefix(PREFIX) for key in client.keys("*")} == {"schema", "totals"}
    assert client.hget(f"{PREFIX}totals", "bytes") == b"0"


def test_runners_on_many_hosts_take_each_job_once(store: RedisStore, redis_server: RedisServer) -> None:
    ids = [store.submit(REQUEST, 1.0).id for _ in range(200)]
    start = threading.Barrier(6)

    def run(number: int) -> list[str]:
        taken: list[str] = []
        own = RedisStore(redis_server.url, JobsOptions())
        start.wait(10)
        while some := own.claim(f"owner {number}", 5, 1.0, 1000.0):
            taken += [job.id for job in some]
            for job in some:
                assert own.finish(job.id, f"owner {number}", SUCCEEDED, RESPONSE, "", 2.0)
        own.close()
        return taken

    with ThreadPoolExecutor(6) as pool:
        taken = [id for some in pool.map(run, range(6)) for id in some]
    assert sorted(taken) == sorted(ids)
    assert store.counts().by_status[SUCCEEDED] == 200
    assert store.counts().bytes == 200 * RESPONSE.size


def test_what_a_dead_runner_of_this_host_held_is_run_at_once(store: RedisStore) -> None:
    with subprocess.Popen(["sleep", "60"]) as child:
        where, _, _, rest = new_owner().split(":")
        start = Path(f"/proc/{child.pid}/stat").read_bytes().rpartition(b")")[2].split()[19].decode()
        owner = f"{where}:{child.pid}:{start}:{rest}"
        job = store.submit(REQUEST, 1.0)
        store.claim(owner, 1, 1.0, 1000.0)
        assert store.claim("b", 1, 2.0, 15.0) == []
        child.kill()
        child.wait(10)
    assert [each.id for each in store.claim("b", 1, 3.0, 15.0)] == [job.id]


def test_what_redis_has_thrown_away_holds_up_nobody(store: RedisStore, client: Any) -> None:
    ids = [store.submit(REQUEST, 1.0).id for _ in range(4)]
    for id in ids[:2]:
        client.delete(f"{PREFIX}job:{id}")
    assert [job.id for job in store.list(1.0)] == ids[:1:-1]
    assert [job.id for job in store.claim("a", 1, 1.0, 15.0)] == ids[2:3]
    assert store.counts().by_status == {"queued": 1, "running": 1, "succeeded": 0, "failed": 0, "cancelled": 0}
    client.delete(f"{PREFIX}job:{ids[2]}", f"{PREFIX}job:{ids[3]}")
    assert not store.finish(ids[2], "a", SUCCEEDED, RESPONSE, "", 2.0)
    assert store.claim("a", 5, 100.0, 15.0) == []
    assert store.get(ids, 100.0) == []
    assert store.counts().bytes == 0
    assert not client.exists(f"{PREFIX}order", f"{PREFIX}ready", f"{PREFIX}leases")


def test_asking_again_is_found_to_have_been_done(
    store: RedisStore, client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when Redis did it and its answer was lost."""
    store.submit(REQUEST, 1.0)
    known = store._table.read([store.list(1.0)[0].id])
    arguments: list[Any] = []

    def twice(keys: list[str], args: list[Any]) -> Any:
        arguments.append(args)
        first = save(keys=keys, args=args)
        assert save(keys=keys, args=args) == first == [1]
        return first

    save = store._table._save
    monkeypatch.setattr(store._table, "_save", twice)
    assert len(store.claim("a", 1, 1.0, 15.0)) == 1
    assert arguments
    assert known != store._table.read([*known])
    assert client.hget(f"{PREFIX}owners", "a") == b"1"


def test_no_memory_is_a_refusal_and_nothing_is_lost(own_server: RedisServer) -> None:
    with redis.Redis(unix_socket_path=str(own_server.socket)) as client:
        client.config_set("maxmemory", "8mb")
        store = RedisStore(own_server.url, JobsOptions())
        large = StoredRequest(b"POST", b"/", {}, bytes(500_000), "m")
        ids = []

        def fill() -> None:
            for _ in range(100):
                ids.append(store.submit(large, 1.0).id)

        with pytest.raises(StoreError, match=r"has no memory left \(its maxmemory\)"):
            fill()
        assert len(ids) > 3
        client.config_set("maxmemory", "64mb")
        assert len(store.get(ids, 1.0)) == len(ids)
        assert store.counts().bytes == len(ids) * large.size
        assert store.advice() == ""
        client.config_set("maxmemory-policy", "allkeys-lru")
        client.config_set("appendonly", "no")
        assert store.advice() == (
            f"unix://{own_server.socket}: appendonly is no: a Redis that ends loses jobs; "
            "maxmemory-policy is allkeys-lru: Redis may throw jobs away"
        )
        store.close()


def test_jobs_of_another_version_are_left_alone(store: RedisStore, client: Any) -> None:
    client.set(f"{PREFIX}schema", SCHEMA + 1)
    with pytest.raises(StoreError, match=f"are of version {SCHEMA + 1}, and this Penstock reads {SCHEMA}"):
        store.submit(REQUEST, 1.0)
    assert client.keys("*") == [f"{PREFIX}schema".encode()]


def test_full_is_full_for_all_at_once(redis_server: RedisServer) -> None:
    redis_server.flush()
    options = JobsOptions(count_max=10)
    stores = [RedisStore(redis_server.url, options) for _ in range(4)]

    def submit(store: RedisStore) -> int:
        count = 0
        for _ in range(10):
            try:
                store.submit(REQUEST, 1.0)
                count += 1
            except StoreFull:
                pass
        return count

    with ThreadPoolExecutor(4) as pool:
        assert sum(pool.map(submit, stores)) == 10
    for store in stores:
        store.close()
