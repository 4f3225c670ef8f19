"""Clocks that jump, and machines that are suspended: nobody notices but who reads the log."""

from __future__ import annotations

import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from datetime import UTC, datetime, timedelta
from functools import partial
from http.client import HTTPConnection
from pathlib import Path

import numpy as np
import pytest

from penstock.client import Client
from tests.system.servers import Server, StartServer, wait_for

ROW = {"x": np.ones((1, 4), np.float32)}
BODY = b'{"inputs": [{"name": "x", "shape": [1, 4], "datatype": "FP32", "data": [1, 1, 1, 1]}]}'
JUMPS = ("+5d", "-5d", "+400d", "-3h", "-700d")  # of the clock on the wall, each from the true time
LOOK_S = 5.0  # the launcher looks so often who is stuck, and a peer is lost that is silent so long


class Clock:
    """The clock on the wall of processes that are started in its ``environment``; the monotonic one stays true."""

    def __init__(self, library: Path, path: Path) -> None:
        self._path = path
        self.set("+0")
        self.environment = {
            "LD_PRELOAD": str(library),
            "FAKETIME_TIMESTAMP_FILE": str(path),
            "FAKETIME_NO_CACHE": "1",
            "FAKETIME_DONT_FAKE_MONOTONIC": "1",
        }

    def set(self, offset: str) -> None:
        beside = self._path.with_suffix(".new")
        beside.write_text(f"{offset}\n")
        beside.replace(self._path)


@pytest.fixture
def clock(require_command: Callable[[str, str], str], tmp_path: Path) -> Clock:
    require_command("faketime", "faketime")
    [library] = Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1")
    return Clock(library, tmp_path / "clock")


@contextmanager
def asking(server: Server) -> Iterator[Callable[[], int]]:
    """Ask without end, over HTTP and by the library. Yields how many have been answered; an error is raised at the
    end."""
    answered = [0, 0]
    ended = threading.Event()

    def over_http() -> None:
        with closing(HTTPConnection(server.host, server.port, timeout=30)) as connection:
            while not ended.is_set():
                connection.request("POST", "/v2/models/dense/infer", BODY)
                response = connection.getresponse()
                body = response.read()
                assert response.status == 200, body
                answered[0] += 1

    def by_library() -> None:
        with Client(server.runtime, timeout=30) as client:
            while not ended.is_set():
                client.infer("dense", ROW)
                answered[1] += 1

    with ThreadPoolExecutor(2) as pool:
        calls = [pool.submit(over_http), pool.submit(by_library)]
        try:
            yield lambda: min(answered)
        finally:
            ended.set()
        for call in calls:
            call.result(30)


def processor_s(server: Server) -> dict[str, float]:
    """What each process last told of itself, with a beat."""
    found = server.metrics().items()
    return {name: value for name, value in found if name.startswith("penstock_process_cpu_seconds")}


def more(answered: Callable[[], int], than: int) -> bool:
    return answered() > than


def beaten(server: Server, told: dict[str, float]) -> bool:
    return all(value > told[name] for name, value in processor_s(server).items())


def test_no_decision_follows_the_clock_on_the_wall(
    start_server: StartServer, repository: Path, clock: Clock, tmp_path: Path
) -> None:
    # A look at the clock takes a file here: where others want the cores, a worker may be silent for a second. What went
    # by the clock on the wall would see hours.
    config = tmp_path / "penstock.toml"
    config.write_text("[broker]\nbusy_silence_max_s = 30.0\n")
    server = start_server(str(repository), f"--config={config}", environment=clock.environment)
    wait_for(
        lambda: len(server.children()) == 4 and len(processor_s(server)) == 4, "who runs jobs, which nobody awaits"
    )
    processes = server.children()
    begin = time.monotonic()
    with asking(server) as answered:
        for jump in JUMPS:
            clock.set(jump)
            wait_for(partial(more, answered, answered() + 20), f"answers after {jump}")
            wait_for(partial(beaten, server, processor_s(server)), f"beats of all after {jump}")
        # Until each has been looked at since the last jump.
        wait_for(lambda: time.monotonic() > begin + LOOK_S + 0.5, "time to pass")
    assert server.children() == processes
    unusual = [line for line in server.log() if line["level"] != "info" and "fewer files" not in line["event"]]
    assert [(line["event"], line) for line in unusual] == []
    assert server.end() == 0
    last = {line["process"]: datetime.fromisoformat(line["time"]) for line in server.log()}
    assert last.keys() == {"broker", "cpu-0", "gateway-0", "jobs"}
    for at in last.values():
        assert abs(at - (datetime.now(UTC) - timedelta(days=700))) < timedelta(hours=1)


def test_a_machine_that_was_suspended_serves_on(start_server: StartServer, repository: Path, tmp_path: Path) -> None:
    """All of its processes stop at once, for longer than a peer may be silent, and the monotonic clock goes on."""
    config = tmp_path / "penstock.toml"
    config.write_text("[broker]\nsilence_max_s = 1.0\nbusy_silence_max_s = 0.5\nping_after_s = 0.2\n")
    server = start_server(str(repository), "--workers=2", f"--config={config}")
    processes = [server.pid, *server.children()]
    with asking(server) as answered:
        wait_for(lambda: answered() > 20, "answers")
        for pid in processes:
            os.kill(pid, signal.SIGSTOP)
        try:
            wait_for(lambda: all(stopped(pid) for pid in processes), "all to stop")
            begin = time.monotonic()
            wait_for(lambda: time.monotonic() > begin + 2.5, "time to pass")
        finally:
            for pid in processes:
                os.kill(pid, signal.SIGCONT)
        before = answered()
        wait_for(lambda: answered() > before + 50, "answers")
    wait_for(lambda: server.metrics()["penstock_workers"] == 2, "both workers")
    assert [server.pid, *server.children()] == processes
    assert [line for line in server.log() if line["level"] in ("error", "critical")] == []
    assert server.request("GET", "/v2/health/ready")[0] == 200


def stopped(pid: int) -> bool:
    return re.search(r"^State:\tT", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE) is not None
