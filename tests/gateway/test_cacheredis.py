"""Answers in a real Redis."""

from __future__ import annotations

import builtins
import logging
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import redis

from penstock.gateway import cacheredis
from penstock.gateway.cacheredis import RedisStore
from penstock.gateway.cachestore import StoreError
from penstock.gateway.cachevalue import Kept, pack_value
from penstock.gateway.caching import ResponseCache
from tests.gateway.serving import DEADLINE_S, Loop
from tests.gateway.test_application import Desk, X, said, waits
from tests.gateway.test_caching import built, how

KEY, OTHER = b"k" * 32, b"o" * 32


class Server:
    """A redis-server on a socket in a directory."""

    def __init__(self, directory: Path) -> None:
        command = shutil.which("redis-server")
        assert command is not None, "install the Debian package redis-server"
        socket = directory / "redis.sock"
        self.url = f"unix://{socket}"
        self.process = subprocess.Popen(
            [command, "--port", "0", "--unixsocket", str(socket), "--save", "", "--dir", str(directory)],
            stdout=subprocess.DEVNULL,
        )
        self.client = redis.Redis.from_url(self.url)
        latest = time.monotonic() + DEADLINE_S
        while True:
            try:
                self.client.ping()
                return
            except redis.exceptions.ConnectionError:
                assert time.monotonic() < latest, "redis-server did not start"

    def close(self) -> None:
        self.client.close()
        with self.process:
            self.process.kill()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    server = Server(tmp_path)
    yield server
    server.close()


class Stores:
    """Stores on a loop, as gateways have them."""

    def __init__(self, loop: Loop) -> None:
        self.loop = loop
        self.open: list[RedisStore] = []

    def start(self, url: str, wait_ms: float = 2000, pending: int = 1 << 20, ttl_s: float = 0.0) -> RedisStore:
        self.open.append(RedisStore(self.loop.loop, url, wait_ms, pending, ttl_s))
        return self.open[-1]

    def get(self, store: RedisStore, key: bytes = KEY) -> Kept | None:
        found: list[Kept | None] = []
        store.get(key, found.append)
        self.loop.until(lambda: found)
        return found[0]

    def put(self, store: RedisStore, key: bytes, body: bytes, payload: bytes) -> None:
        store.put(key, body, payload)
        self.loop.until(lambda: not store._tasks)

    def close(self) -> None:
        for store in self.open:
            store.close()
            self.loop.until(lambda store=store: not store._tasks)  # type: ignore[misc]


@pytest.fixture
def stores(loop: Loop) -> Iterator[Stores]:
    stores = Stores(loop)
    yield stores
    stores.close()


def test_gateways_share_it(stores: Stores, server: Server) -> None:
    one, other = stores.start(server.url), stores.start(server.url)
    assert stores.get(one) is None
    stores.put(one, KEY, b"body", b"payload")
    assert stores.get(other) == Kept(0.0, b"body", b"payload")
    assert stores.get(other, OTHER) is None
    [name] = server.client.keys("*")
    assert 3_500_000 < server.client.pttl(name) <= 3_600_000


def test_it_is_kept_for_so_long(stores: Stores, server: Server) -> None:
    store = stores.start(server.url, ttl_s=7.0)
    stores.put(store, KEY, b"", b"")
    [name] = server.client.keys("*")
    assert 6000 < server.client.pttl(name) <= 7000


def test_what_cannot_be_believed_is_not_there(stores: Stores, server: Server) -> None:
    store = stores.start(server.url)
    stores.put(store, KEY, b"", b"")
    [name] = server.client.keys("*")
    for value in (b"", b"nonsense", pack_value(OTHER, 0.0, b"", b"another's")):
        server.client.set(name, value)
        assert stores.get(store) is None
    assert store.corrupt == 3


def test_one_that_is_away_is_left_alone_and_asked_again(
    stores: Stores, server: Server, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(cacheredis, "_REST_S", 0.2)
    store = stores.start(server.url)
    stores.put(store, KEY, b"", b"kept")
    server.process.kill()
    server.process.wait(DEADLINE_S)
    assert stores.get(store) is None
    until = store._rest_until
    assert until > time.monotonic() - 1
    while time.monotonic() < until:
        assert stores.get(store) is None
        store.put(OTHER, b"", b"")
    assert store.dropped
    again = Server(Path(server.url.removeprefix("unix://")).parent)
    stores.loop.until(lambda: time.monotonic() >= store._rest_until)
    stores.put(store, KEY, b"", b"kept anew")
    assert stores.get(store) == Kept(0.0, b"", b"kept anew")
    again.close()
    said = [record.message for record in caplog.records if record.name == "penstock.gateway"]
    assert said == ["the response cache is away; answers are computed", "the response cache answers again"]


def test_one_that_is_stopped_is_not_waited_for(
    stores: Stores, server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    store = stores.start(server.url, wait_ms=20)
    stores.put(store, KEY, b"", b"kept")
    server.process.send_signal(signal.SIGSTOP)
    began = time.monotonic()
    for _ in range(20):
        assert stores.get(store) is None
    assert time.monotonic() - began < 2.0
    assert len(caplog.records) == 1
    server.process.send_signal(signal.SIGCONT)


def test_only_so_much_is_written_and_asked_at_once(stores: Stores, server: Server, loop: Loop) -> None:
    store = stores.start(server.url, pending=10)
    store.put(KEY, b"", bytes(8))
    store.put(OTHER, b"", bytes(8))
    assert store.dropped == 1
    loop.until(lambda: not store._pending_bytes)
    found: list[Kept | None] = []
    for _ in range(cacheredis._READS_MAX + 10):
        store.get(KEY, found.append)
    assert store._reads == cacheredis._READS_MAX
    loop.until(lambda: len(found) == cacheredis._READS_MAX + 10)
    assert found.count(None) == 10


def test_what_is_too_large_is_not_kept(stores: Stores, server: Server) -> None:
    store = stores.start(server.url, pending=1 << 30)
    store.put(KEY, b"", bytes(store.largest + 1))
    assert store.dropped == 1


def test_a_url_that_is_none_is_said(loop: Loop) -> None:
    with pytest.raises(StoreError, match="response_cache_store"):
        RedisStore(loop.loop, "redis://host:port", 20, 1)


def test_without_the_package_it_says_how_to_install_it(loop: Loop, monkeypatch: pytest.MonkeyPatch) -> None:
    before = builtins.__import__

    def without(name: str, *arguments: Any) -> Any:
        if name.startswith("redis"):
            raise ImportError(name)
        return before(name, *arguments)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(StoreError, match="pip install redis"):
        RedisStore(loop.loop, "redis://localhost", 20, 1)


# --- behind the routes ---


@pytest.fixture
def make(loop: Loop, server: Server) -> Iterator[Callable[[], Desk]]:
    made: list[ResponseCache] = []

    def start() -> Desk:
        desk = Desk(loop, response_cache_store=server.url, response_cache_wait_ms=2000)
        made.append(ResponseCache(loop.loop, desk.application, None))
        desk.application.cache = made[-1]
        made[-1].stores.open()
        return desk.join(built())

    yield start
    for cache in made:
        store = cache.stores.store
        cache.close()
        assert isinstance(store, RedisStore)
        loop.until(lambda store=store: not store._tasks)  # type: ignore[misc]


def test_an_answer_of_one_gateway_is_anothers(make: Callable[[], Desk], loop: Loop, server: Server) -> None:
    one, other = make(), make()
    exchanges = [one.infer(), one.infer()]
    loop.until(lambda: one.caller._waiting)
    [group] = one.sent().groups
    one.double(group.ids[0], X)
    assert [how(said(exchange)) for exchange in exchanges] == ["miss", "wait"]
    loop.until(lambda: server.client.keys("*"))
    exchanges = [other.infer(), other.infer()]
    assert all(map(waits, exchanges))
    loop.until(lambda: not any(map(waits, exchanges)))
    assert [how(said(exchange)) for exchange in exchanges] == ["hit", "hit"]
    assert said(exchanges[0]).body == said(exchanges[1]).body
    assert np.frombuffer(X, "<f4").tolist() == [1, 2]
    assert not other.caller.calls


def test_who_leaves_while_it_is_looked_for_leaves_it_to_the_others(make: Callable[[], Desk], loop: Loop) -> None:
    desk = make()
    one, other = desk.infer(), desk.infer()
    gone, one.gone = one.gone, None
    one._connection = None
    assert gone is not None
    gone()
    loop.until(lambda: desk.caller._waiting)
    [group] = desk.sent().groups
    desk.double(group.ids[0], X)
    assert how(said(other)) == "miss"


def test_if_all_leave_while_it_is_looked_for_nothing_is_computed(make: Callable[[], Desk], loop: Loop) -> None:
    desk = make()
    exchange = desk.infer()
    assert exchange.gone is not None
    exchange._connection = None
    exchange.gone()
    cache = desk.application.cache
    assert cache is not None
    store = cache.stores.store
    assert isinstance(store, RedisStore)
    loop.until(lambda: not store._tasks)
    assert not desk.caller.calls
    assert len(cache.flights) == 0
