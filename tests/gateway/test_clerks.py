"""Processes beside an event loop: real ones, in their turn, lost and replaced."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from penstock.gateway.clerk import Sheet
from penstock.gateway.clerks import Clerks, Errand
from penstock.gateway.options import GatewayOptions
from penstock.wire.errors import BAD_INPUT, INTERNAL, OVERLOADED, PenstockError
from penstock.wire.tensors import Buffer
from tests.gateway.serving import Loop

# --- what clerks are told to do: they import this module ---


def turned(data: Buffer) -> tuple[str, list[Buffer]]:
    return f"{len(data)} bytes", [bytes(data)[::-1], b"!"]


def refuse(data: Buffer) -> tuple[str, list[Buffer]]:
    raise PenstockError(BAD_INPUT, "no")


def fall_over(data: Buffer) -> tuple[str, list[Buffer]]:
    raise ZeroDivisionError("dear me")


def run_out(data: Buffer) -> tuple[str, list[Buffer]]:
    raise MemoryError


def die(data: Buffer) -> tuple[str, list[Buffer]]:
    os.kill(os.getpid(), signal.SIGKILL)
    return "", []


def whoami(data: Buffer) -> tuple[tuple[int, int, str], list[Buffer]]:
    return (os.getpid(), os.nice(0), Path("/proc/self/oom_score_adj").read_text().strip()), []


def stay(path: str, data: Buffer) -> tuple[int, list[Buffer]]:
    """Until the file is there."""
    until = time.monotonic() + 20
    while not Path(path).exists():
        assert time.monotonic() < until
    return os.getpid(), []


class Office:
    """Clerks, and what became of each errand."""

    def __init__(self, loop: Loop, **limits: Any) -> None:
        self.loop = loop
        self.clerks = Clerks(loop.loop, GatewayOptions(**limits))
        self.told: list[Any] = []
        self.released: list[str] = []

    def run(self, function: Callable[..., Any], *arguments: Any, data: bytes = b"", name: str = "") -> Errand:
        def then(value: Any, sheet: Sheet) -> None:
            self.told.append((value, bytes(sheet.view())))
            sheet.close()

        return self.clerks.run(function, arguments, data, then, self.told.append, lambda: self.released.append(name))

    def hear(self, count: int = 1) -> list[Any]:
        self.loop.until(lambda: len(self.told) >= count)
        return self.told


@pytest.fixture
def office(loop: Loop, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Office]]:
    root = str(Path(__file__).parents[2])
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([root, os.environ.get("PYTHONPATH", "")]))
    offices: list[Office] = []

    def open_one(**limits: Any) -> Office:
        offices.append(Office(loop, **limits))
        return offices[-1]

    yield open_one
    for each in offices:
        pids = each.clerks.processes
        each.clerks.close()
        assert [pid for pid in pids if Path(f"/proc/{pid}").exists()] == []


def test_what_a_clerk_returns_comes_back(office: Callable[..., Office]) -> None:
    one = office()
    one.run(turned, data=b"abc", name="data")
    assert one.hear() == [("3 bytes", b"cba!")]
    assert one.released == ["data"]


def test_what_is_large_goes_and_comes_whole(office: Callable[..., Office]) -> None:
    one, data = office(), bytes(range(256)) * 40_000
    one.run(turned, data=data)
    assert one.hear() == [(f"{len(data)} bytes", data[::-1] + b"!")]


def test_one_clerk_does_one_errand_after_another_and_out_of_the_way(office: Callable[..., Office]) -> None:
    one = office(json_processes_max=1)
    for _ in range(3):
        one.run(whoami)
    [first, *others] = [value for value, _ in one.hear(3)]
    assert others == [first, first]
    assert first[1:] == (5, "1000")
    assert one.clerks.processes == [first[0]]


def test_two_work_at_the_same_time_and_no_more(office: Callable[..., Office], tmp_path: Path) -> None:
    one = office(json_processes_max=2)
    for name in "abc":
        one.run(stay, str(tmp_path / name))
    one.loop.until(lambda: len(one.clerks.processes) == 2)
    assert one.clerks.waiting == 1
    (tmp_path / "c").touch()
    (tmp_path / "b").touch()
    pids = [value for value, _ in one.hear(2)]
    (tmp_path / "a").touch()
    assert pids[0] == pids[1] != one.hear(3)[2][0], "the one that was free has done the third"


def test_errors_are_values_and_the_clerk_goes_on(office: Callable[..., Office]) -> None:
    one = office(json_processes_max=1)
    for function in (refuse, fall_over, run_out, whoami):
        one.run(function)
    refused, fell, out, (last, _) = one.hear(4)
    assert (refused.code, refused.message) == (BAD_INPUT, "no")
    assert (fell.code, "dear me" in fell.message) == (INTERNAL, True)
    assert out.code == OVERLOADED
    assert one.clerks.processes == [last[0]]


def test_a_clerk_that_dies_fails_its_errand_alone(office: Callable[..., Office]) -> None:
    one = office(json_processes_max=1)
    one.run(die)
    one.run(whoami)
    first, second = one.hear(2)
    assert (first.code, "it is replaced" in first.message) == (INTERNAL, True)
    assert one.clerks.processes == [second[0][0]]


def test_a_clerk_that_was_killed_while_idle_fails_nothing_twice(office: Callable[..., Office]) -> None:
    one = office(json_processes_max=1)
    one.run(whoami)
    [(value, _)] = one.hear()
    os.kill(value[0], signal.SIGKILL)
    one.loop.until(lambda: not one.clerks.processes)
    one.run(whoami)
    assert one.hear(2)[1][0][0] != value[0]


def test_one_that_takes_too_long_is_ended(office: Callable[..., Office], tmp_path: Path) -> None:
    one = office(json_work_max_s=0.05, json_processes_max=1)
    one.run(stay, str(tmp_path / "never"))
    [error] = one.hear()
    assert (error.code, "json_work_max_s" in error.message) == (INTERNAL, True)


def test_who_waits_too_long_is_told_so(office: Callable[..., Office], tmp_path: Path) -> None:
    one = office(json_wait_s=0.05, json_processes_max=1)
    one.run(stay, str(tmp_path / "go"), name="first")
    one.loop.until(lambda: one.released == ["first"])
    one.run(turned, name="second")
    [error] = one.hear()
    assert (error.code, error.retry_after_s, "json_wait_s" in error.message) == (OVERLOADED, 1.0, True)
    assert one.released == ["first", "second"]
    (tmp_path / "go").touch()
    one.hear(2)


def test_who_leaves_is_told_nothing(office: Callable[..., Office], tmp_path: Path) -> None:
    one = office(json_processes_max=1)
    busy = one.run(stay, str(tmp_path / "go"), name="busy")
    one.loop.until(lambda: one.released == ["busy"])
    waiting = one.run(turned, name="waiting")
    waiting.leave()
    assert (one.released, one.clerks.waiting) == (["busy", "waiting"], 0)
    busy.leave()
    (tmp_path / "go").touch()
    one.run(turned, data=b"x")
    assert one.hear() == [("1 bytes", b"x!")]


def test_idle_clerks_end(office: Callable[..., Office]) -> None:
    one = office(json_idle_s=0.01)
    one.run(whoami)
    [(value, _)] = one.hear()
    one.loop.until(lambda: not Path(f"/proc/{value[0]}").exists())
    assert one.clerks.processes == []


def test_a_clerk_ends_with_its_gateway(office: Callable[..., Office]) -> None:
    one = office(json_processes_max=1)
    one.run(whoami)
    one.hear()
    [clerk] = one.clerks._idle
    clerk.channel.shutdown(2)  # as the kernel does for a gateway that was killed
    assert clerk.process.wait(20) == 0


def test_no_process_to_be_had(office: Callable[..., Office], monkeypatch: pytest.MonkeyPatch) -> None:
    one = office()

    def none(*arguments: object, **more: object) -> None:
        raise OSError(11, "Resource temporarily unavailable")

    monkeypatch.setattr("subprocess.Popen", none)
    one.run(turned, name="data")
    [error] = one.hear()
    assert (error.code, "no process can be started" in error.message) == (OVERLOADED, True)
    assert one.released == ["data"]
