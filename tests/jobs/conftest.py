"""Stores of both kinds, real ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from penstock.jobs.options import JobsOptions
from penstock.jobs.store import Store, open_store

Opener = Callable[..., Store]


@pytest.fixture(params=["sqlite"])
def where(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Where a store of each kind lies, which nobody has used."""
    return str(tmp_path / "jobs.sqlite")


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
