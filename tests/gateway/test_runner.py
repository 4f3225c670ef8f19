"""Who runs jobs: a real loop and a real store, and an application that the test plays."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import pytest

from penstock.client.caller import Caller, Identity
from penstock.gateway import runner as running
from penstock.gateway.application import Application
from penstock.gateway.connection import Exchange, Http
from penstock.gateway.headless import Answer
from penstock.gateway.options import GatewayOptions
from penstock.gateway.runner import Runner, may_come_right, not_before, stored
from penstock.jobs.job import CANCELLED, FAILED, QUEUED, RUNNING, SUCCEEDED, Job, StoredRequest, StoredResponse
from penstock.jobs.options import JobsOptions
from penstock.jobs.owner import new_owner
from penstock.jobs.store import Store, StoreError, open_store
from tests.gateway.serving import Echo, Loop

REQUEST = StoredRequest(b"POST", b"/v2/models/m/infer", {"x-request-id": b"7"}, b"body", "m")


class Played(Echo):
    """Holds what it is asked until the test answers."""

    def __init__(self) -> None:
        super().__init__()
        self.hold = True
        self.caller = Caller(Identity(b"a caller", "jobs", 1, True, "/run/here"))


class Desk:
    def __init__(self, loop: Loop, path: Path, **options: Any) -> None:
        self.loop = loop
        self.options = JobsOptions(**options)
        self.store = open_store(str(path), self.options)
        self.application = Played()
        self.broker_s = 100.0
        self.ended: list[str] = []
        self.stopped = asyncio.Event()
        self.runner = self.another()
        self._task = loop.loop.create_task(self.runner.run(self.stopped))

    def another(self, store: Store | None = None) -> Runner:
        return Runner(
            cast(Application, self.application),
            Http(self.loop.loop, GatewayOptions(), self.application),
            store or self.store,
            self.options,
            new_owner(),
            lambda: self.broker_s,
            lambda job: self.ended.append(job.id),
        )

    def submit(self, request: StoredRequest = REQUEST) -> str:
        job = self.store.submit(request, time.time())
        self.runner.wake()
        return job.id

    def job(self, ident: str) -> Job:
        [job] = self.store.get([ident], time.time())
        return job

    def asked(self, count: int = 1) -> list[Exchange]:
        self.loop.until(lambda: len(self.application.exchanges) >= count)
        return self.application.exchanges

    def until(self, ident: str, status: str) -> Job:
        self.loop.until(lambda: self.job(ident).status == status)
        return self.job(ident)

    def close(self) -> None:
        self.stopped.set()
        self.loop.run(self._task)
        self.loop.run(self.runner.drain(0))
        self.store.close()


@pytest.fixture
def open_desk(loop: Loop, tmp_path: Path) -> Iterator[Callable[..., Desk]]:
    desks: list[Desk] = []

    def make(**options: Any) -> Desk:
        desks.append(Desk(loop, tmp_path / "jobs.sqlite", **options))
        return desks[-1]

    yield make
    for desk in desks:
        desk.close()


@pytest.fixture
def desk(open_desk: Callable[..., Desk]) -> Desk:
    return open_desk()


def test_a_job_is_asked_as_it_came_and_its_answer_kept(desk: Desk) -> None:
    ident = desk.submit()
    [exchange] = desk.asked()
    assert (exchange.head.method, exchange.head.url, exchange.body) == (b"POST", b"/v2/models/m/infer", b"body")
    assert exchange.head.headers == {"x-request-id": b"7"}
    assert desk.job(ident).status == RUNNING
    exchange.answer(200, b"{}", extra=b"Inference-Header-Content-Length: 2\r\nServer-Timing: a\r\n")
    assert desk.until(ident, SUCCEEDED).http_status == 200
    kept = {"content-type": b"application/json", "inference-header-content-length": b"2"}
    assert desk.store.response_of(ident) == StoredResponse(200, kept, b"{}")
    desk.loop.until(lambda: desk.ended == [ident])
    assert desk.runner.running == {}


@pytest.mark.parametrize("status", [400, 404, 413, 500, 504])
def test_an_error_ends_it(desk: Desk, status: int) -> None:
    ident = desk.submit()
    desk.asked()[0].answer_error(status, "a sentence")
    assert desk.until(ident, FAILED).http_status == status


@pytest.mark.parametrize(("status", "broker_s"), [(503, 100.0), (404, 1.0)])
def test_what_may_come_right_is_tried_again(desk: Desk, status: int, broker_s: float) -> None:
    desk.broker_s = broker_s
    ident = desk.submit()
    desk.asked()[0].answer_error(status, "not now")
    desk.until(ident, QUEUED)
    desk.asked(2)[1].answer(200, b"{}")
    assert desk.until(ident, SUCCEEDED).attempts == 2


def test_after_its_time_it_fails_with_what_was_said_last(open_desk: Callable[..., Desk]) -> None:
    desk = open_desk(run_max_s=0.0)
    ident = desk.submit()
    desk.asked()[0].answer_error(503, "no worker")
    assert desk.until(ident, FAILED).http_status == 503


def test_a_lease_that_ran_out_while_nobody_looked_is_renewed(open_desk: Callable[..., Desk]) -> None:
    """As after a suspend: the job is not begun a second time beside itself."""
    desk = open_desk(lease_s=1e-6)
    ident = desk.submit()
    [exchange] = desk.asked()
    for _ in range(3):
        desk.submit(StoredRequest(b"POST", b"/other", {}, b""))  # has it look
        desk.asked(len(desk.application.exchanges) + 1)[-1].answer(200, b"")
    exchange.answer(200, b"{}")
    assert desk.until(ident, SUCCEEDED).attempts == 1
    assert [each.head.url for each in desk.application.exchanges].count(b"/v2/models/m/infer") == 1


def test_so_many_run_at_a_time_in_their_order(open_desk: Callable[..., Desk]) -> None:
    desk = open_desk(running_max=2)
    idents = [desk.submit(StoredRequest(b"POST", b"/%d" % number, {}, b"")) for number in range(4)]
    desk.asked(2)
    desk.loop.settle()
    by_url = {each.head.url: each for each in desk.application.exchanges}  # each read by a thread of its own
    assert sorted(by_url) == [b"/0", b"/1"]
    by_url[b"/1"].answer(200, b"")
    assert desk.asked(3)[2].head.url == b"/2"
    assert [desk.job(ident).status for ident in idents] == [RUNNING, SUCCEEDED, RUNNING, QUEUED]


def test_a_cancelled_job_ends(desk: Desk) -> None:
    ident = desk.submit()
    desk.asked()
    desk.store.cancel(ident, time.time())
    desk.until(ident, CANCELLED)
    assert desk.application.gone == [b"/v2/models/m/infer"]
    assert desk.store.response_of(ident) is None


def test_a_job_that_somebody_else_has_taken_is_left_to_it(open_desk: Callable[..., Desk]) -> None:
    desk = open_desk(lease_s=1.0)
    ident = desk.submit()
    desk.asked()
    [taken] = desk.store.claim("somebody else", 10, time.time() + 100, 1000.0)
    assert taken.id == ident
    desk.loop.until(lambda: not desk.runner.running)
    assert desk.application.gone == [b"/v2/models/m/infer"]
    assert (desk.job(ident).status, desk.job(ident).owner) == (RUNNING, "somebody else")


def test_the_lease_is_renewed(open_desk: Callable[..., Desk]) -> None:
    desk = open_desk(lease_s=1.0)
    ident = desk.submit()
    desk.asked()
    until = desk.job(ident).lease_until
    desk.loop.until(lambda: desk.job(ident).lease_until > until)


def test_at_the_end_what_runs_is_put_back(desk: Desk) -> None:
    ident = desk.submit()
    desk.asked()
    desk.stopped.set()
    desk.loop.run(desk.runner.drain(0.01))
    assert desk.job(ident).status == QUEUED
    assert desk.application.gone == [b"/v2/models/m/infer"]


def test_at_the_end_what_is_done_in_time_is_done(desk: Desk) -> None:
    ident = desk.submit()
    [exchange] = desk.asked()
    desk.stopped.set()
    desk.loop.loop.call_soon(lambda: exchange.answer(200, b"{}"))
    desk.loop.run(desk.runner.drain(10))
    assert desk.job(ident).status == SUCCEEDED


def test_a_result_is_kept_though_its_store_was_away(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(running, "_FINISH_TRIES_S", (0.0, 0.01, 0.01))
    ident = desk.submit()
    [exchange] = desk.asked()
    finish, failures = desk.store.finish, [StoreError("away"), StoreError("away")]

    def fail(*arguments: Any) -> bool:
        if failures:
            raise failures.pop()
        return finish(*arguments)

    monkeypatch.setattr(desk.store, "finish", fail)
    exchange.answer(200, b"{}")
    assert desk.until(ident, SUCCEEDED).attempts == 1


def test_a_store_that_is_away_is_asked_again(
    desk: Desk, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(running, "_AWAY_S", 0.01)
    change, failures = desk.store.change, [StoreError("the disk is full")] * 3

    def fail() -> int:
        if failures:
            raise failures.pop()
        return change()

    monkeypatch.setattr(desk.store, "change", fail)
    desk.runner.wake()
    desk.loop.until(lambda: not failures)
    desk.submit()
    desk.asked()
    assert [each.levelname for each in caplog.records if "does not answer" in each.message] == ["ERROR"]


# --- decisions ---


def test_the_waits_grow() -> None:
    waits = [not_before(Job("a", QUEUED, "m", 0.0, attempts=number), 0.0) for number in (1, 2, 3, 8, 100_000)]
    assert waits == pytest.approx([0.2, 0.4, 0.8, 20.0, 20.0])


@pytest.mark.parametrize(
    ("status", "broker_s", "may"),
    [(503, 0.0, True), (503, 1e9, True), (404, 0.0, True), (404, 1e9, False), (500, 0.0, False), (200, 0.0, False)],
)
def test_what_may_come_right(status: int, broker_s: float, may: bool) -> None:
    assert may_come_right(status, broker_s) == may


def test_only_what_belongs_to_the_body_is_kept() -> None:
    headers = {"content-type": b"a", "content-length": b"3", "x-request-id": b"7"}
    assert stored(Answer(201, headers, b"abc")) == StoredResponse(201, {"content-type": b"a"}, b"abc")
