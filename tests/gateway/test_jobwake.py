"""A datagram that wakes whoever runs jobs."""

from __future__ import annotations

import select
from pathlib import Path

from penstock.gateway.jobwake import Bell, Ear


def heard(ear: Ear) -> bool:
    return bool(select.select([ear.fileno()], [], [], 0)[0])


def test_who_rings_is_heard(tmp_path: Path) -> None:
    path = tmp_path / "jobs.sock"
    bell = Bell(path)
    bell.ring()  # nobody is there
    ear = Ear(path)
    assert not heard(ear)
    bell.ring()
    bell.ring()
    assert heard(ear)
    ear.clear()
    assert not heard(ear)
    ear.close()
    assert list(tmp_path.iterdir()) == []
    bell.ring()
    bell.close()
    bell.close()


def test_a_successor_is_heard_and_stays_when_the_first_ends(tmp_path: Path) -> None:
    path = tmp_path / "jobs.sock"
    bell, first = Bell(path), Ear(path)
    bell.ring()
    second = Ear(path)
    bell.ring()
    assert heard(second)
    first.close()
    assert path.exists()
    bell.ring()
    second.close()
    assert list(tmp_path.iterdir()) == []
    bell.close()


def test_ringing_never_blocks(tmp_path: Path) -> None:
    path = tmp_path / "jobs.sock"
    bell, ear = Bell(path), Ear(path)
    for _ in range(10_000):
        bell.ring()
    ear.close()
    bell.close()


def test_without_a_runtime_directory_nobody_is_told() -> None:
    bell = Bell(None)
    bell.ring()
    bell.close()
