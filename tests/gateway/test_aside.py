"""Work beside an event loop: bounded, in its turn, and given up."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator

import pytest

from penstock.gateway.aside import Aside, Work
from penstock.wire.errors import OVERLOADED, PenstockError
from tests.gateway.serving import DEADLINE_S, Loop


class Jobs:
    """Work that ends when the test says so."""

    def __init__(self, loop: Loop) -> None:
        self.began: list[str] = []
        self.ended: list[str] = []
        self.errors: list[Exception] = []
        self._gates: dict[str, threading.Event] = {}
        self._loop = loop

    def add(self, aside: Aside, name: str) -> Work:
        gate = self._gates[name] = threading.Event()

        def do(work: Work) -> str:
            self.began.append(name)
            assert gate.wait(DEADLINE_S)
            if name.startswith("bad"):
                raise PenstockError("bad_input", name)
            return name

        def then(done: asyncio.Future[str]) -> None:
            try:
                self.ended.append(done.result())
            except PenstockError as error:
                self.errors.append(error)

        return aside.run(do, then)

    def let(self, *names: str) -> None:
        for name in names:
            self._gates[name].set()

    def let_all(self) -> None:
        self.let(*self._gates)


@pytest.fixture
def jobs(loop: Loop) -> Iterator[Jobs]:
    jobs = Jobs(loop)
    yield jobs
    jobs.let_all()


def test_so_many_at_a_time_and_the_others_in_their_order(loop: Loop, jobs: Jobs) -> None:
    aside = Aside(loop.loop, 2, 60)
    for name in "abcd":
        jobs.add(aside, name)
    loop.until(lambda: len(jobs.began) == 2)
    assert (set(jobs.began), aside.waiting) == ({"a", "b"}, 2)
    jobs.let("b")
    loop.until(lambda: jobs.began[2:] == ["c"])
    assert (jobs.ended, aside.waiting) == (["b"], 1)
    jobs.let_all()
    loop.until(lambda: len(jobs.ended) == 4)
    assert jobs.began[3:] == ["d"]


def test_an_error_is_told_and_takes_no_place(loop: Loop, jobs: Jobs) -> None:
    aside = Aside(loop.loop, 1, 60)
    jobs.add(aside, "bad")
    jobs.add(aside, "a")
    jobs.let_all()
    loop.until(lambda: jobs.ended == ["a"])
    assert [str(error) for error in jobs.errors] == ["bad"]


def test_who_leaves_is_not_begun_and_not_told(loop: Loop, jobs: Jobs) -> None:
    aside = Aside(loop.loop, 1, 60)
    runs, waits, last = jobs.add(aside, "runs"), jobs.add(aside, "waits"), jobs.add(aside, "last")
    loop.until(lambda: jobs.began)
    runs.leave()
    waits.leave()
    assert (runs.wanted, aside.waiting) == (False, 1)
    jobs.let_all()
    loop.until(lambda: jobs.ended)
    assert (jobs.began, jobs.ended, last.wanted) == (["runs", "last"], ["last"], True)
    last.leave()


def test_who_has_waited_too_long_is_refused(loop: Loop, jobs: Jobs) -> None:
    aside = Aside(loop.loop, 1, -1)
    aside.forget(jobs.add(aside, "late"))
    loop.until(lambda: jobs.errors)
    [error] = jobs.errors
    assert isinstance(error, PenstockError)
    assert (error.code, error.retry_after_s) == (OVERLOADED, 1.0)
    assert "expand_wait_s" in error.message
    assert jobs.began == []
    assert aside.waiting == 0
