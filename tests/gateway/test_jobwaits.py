"""Long polls, on a real loop, of a store that the test plays."""

from __future__ import annotations

import threading
from collections.abc import Collection
from typing import cast

import pytest

from penstock.gateway import jobwaits
from penstock.gateway.jobwaits import Waits
from penstock.jobs.job import RUNNING, SUCCEEDED, Job
from penstock.jobs.store import Store, StoreError
from penstock.wire.errors import OVERLOADED, PenstockError
from tests.gateway.serving import Loop


class Played:
    """``jobs``: the status of each."""

    def __init__(self, **jobs: str) -> None:
        self.jobs = jobs
        self.changes = 0
        self.asked: list[list[str]] = []
        self.away = False
        self.looks = threading.Semaphore(0)

    def end(self, ident: str) -> None:
        self.jobs[ident] = SUCCEEDED
        self.changes += 1

    def change(self) -> int:
        self.looks.release()
        if self.away:
            raise StoreError("away")
        return self.changes

    def get(self, ids: Collection[str], now: float) -> list[Job]:
        self.asked.append(list(ids))
        return [Job(each, self.jobs[each], "m", 0.0) for each in ids if each in self.jobs]


class Desk:
    def __init__(self, loop: Loop, store: Played, waiting_max: int = 10) -> None:
        self.loop = loop
        self.store = store
        self.draining = False
        self.waits = Waits(loop.loop, cast(Store, store), waiting_max, lambda: self.draining)
        self.ended: list[str] = []

    def look(self) -> None:
        """Let the store be looked at twice more."""
        for _ in range(2):
            self.loop.until(lambda: self.store.looks.acquire(blocking=False))


@pytest.fixture(autouse=True)
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobwaits, "LOOK_S", 0.001)


def test_who_waits_is_told_once(loop: Loop) -> None:
    desk = Desk(loop, Played(a=RUNNING, b=RUNNING))
    desk.waits.wait(["a"], 60, lambda: desk.ended.append("a"))
    desk.waits.wait(["b", "a"], 60, lambda: desk.ended.append("b or a"))
    desk.waits.wait(["b"], 60, lambda: desk.ended.append("b"))
    desk.look()
    assert desk.ended == []
    desk.store.end("a")
    loop.until(lambda: len(desk.ended) == 2)
    desk.store.end("b")
    loop.until(lambda: len(desk.ended) == 3)
    assert desk.ended == ["a", "b or a", "b"]
    loop.settle()
    assert desk.waits._waiters == {}


def test_jobs_are_looked_at_only_when_something_has_changed(loop: Loop) -> None:
    desk = Desk(loop, Played(a=RUNNING))
    leave = desk.waits.wait(["a"], 60, lambda: desk.ended.append("a"))
    desk.look()
    desk.look()
    assert desk.store.asked == [["a"]]
    desk.store.changes += 1
    desk.look()
    desk.look()
    assert desk.store.asked == [["a"], ["a"]]
    leave()


def test_who_comes_when_it_has_ended_is_told(loop: Loop) -> None:
    """Between being looked at and being waited for."""
    desk = Desk(loop, Played(a=RUNNING, b=RUNNING))
    leave = desk.waits.wait(["b"], 60, lambda: desk.ended.append("b"))
    desk.look()
    desk.store.jobs["a"] = SUCCEEDED  # and the change has been seen
    desk.waits.wait(["a"], 60, lambda: desk.ended.append("a"))
    loop.until(lambda: desk.ended == ["a"])
    leave()


def test_a_job_that_nobody_knows_is_not_waited_for(loop: Loop) -> None:
    desk = Desk(loop, Played())
    desk.waits.wait(["a"], 60, lambda: desk.ended.append("a"))
    loop.until(lambda: desk.ended)


def test_the_time_is_up(loop: Loop) -> None:
    desk = Desk(loop, Played(a=RUNNING))
    desk.waits.wait(["a"], 0.01, lambda: desk.ended.append("a"))
    loop.until(lambda: desk.ended)


def test_who_leaves_is_not_told(loop: Loop) -> None:
    desk = Desk(loop, Played(a=RUNNING))
    leave = desk.waits.wait(["a"], 60, lambda: desk.ended.append("a"))
    leave()
    leave()
    desk.store.end("a")
    loop.until(lambda: not desk.waits._ticking)
    assert desk.ended == []


def test_a_gateway_that_ends_waits_for_nothing(loop: Loop) -> None:
    desk = Desk(loop, Played(a=RUNNING))
    desk.waits.wait(["a"], 60, lambda: desk.ended.append("a"))
    desk.look()
    desk.draining = True
    loop.until(lambda: desk.ended)


@pytest.mark.parametrize("each", [1, 32])
def test_too_many(loop: Loop, each: int) -> None:
    desk = Desk(loop, Played(a=RUNNING), waiting_max=2)
    ids = ["a"] * each
    leaves = [desk.waits.wait(ids, 60, lambda: None) for _ in range(2 if each == 1 else 1)]
    with pytest.raises(PenstockError, match="waiting_max") as raised:
        desk.waits.wait(ids, 60, lambda: None)
    assert raised.value.code == OVERLOADED
    leaves[0]()
    leaves[0] = desk.waits.wait(ids, 60, lambda: None)
    for leave in leaves:
        leave()


def test_a_store_that_is_away_is_said_once_and_looked_at_again(loop: Loop, caplog: pytest.LogCaptureFixture) -> None:
    desk = Desk(loop, Played(a=RUNNING))
    desk.store.away = True
    desk.waits.wait(["a"], 60, lambda: desk.ended.append("a"))
    desk.look()
    desk.look()
    desk.store.away = False
    desk.store.end("a")
    loop.until(lambda: desk.ended)
    assert len([each for each in caplog.records if "cannot be looked at" in each.message]) == 1
