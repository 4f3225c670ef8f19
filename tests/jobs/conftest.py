"""Stores of both kinds, real ones."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from penstock.jobs.options import JobsOptions
from penstock.jobs.store import Store, open_store
from tests.jobs.redisserver import RedisServer

Opener = Callable[..., Store]
RequireCommand = Callable[[str, str], str]


@pytest.fixture(scope="session")
def redis_server(require_command: RequireCommand, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """One for all tests that leave it running."""
    command = require_command("redis-server", "redis-server")
    with RedisServer(command, tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest.fixture(params=["sqlite", "redis"])
def where(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Where a store of each kind lies, which nobody has used."""
    if request.param == "sqlite":
        return str(tmp_path / "jobs.sqlite")
    server: RedisServer = request.getfixturevalue("redis_server")
    server.flush()
    return server.url


@pytest.fixture
def opened(where: str) -> Iterator[Opener]:
    """Stores there: of the options that are given."""
    stores = []

    def open_one(**options: Any) -> Store:
        stores.append(open_store(where, JobsOptions(**options)))
        return stores[-1]

    yield open_one
    for store in stores:
        store.close()


@pytest.fixture(params=["sqlite", "redis"])
def fresh_stores(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[], Callable[[JobsOptions], Store]]:
    """Each call makes an empty place; what it returns opens a store there."""
    if request.param == "redis":
        server: RedisServer = request.getfixturevalue("redis_server")

        def flushed() -> Callable[[JobsOptions], Store]:
            server.flush()
            return partial(open_store, server.url)

        return flushed
    numbers = itertools.count()
    return lambda: partial(open_store, str(tmp_path / f"{next(numbers)}.sqlite"))
