"""Descriptors run out: nobody dies, who is connected is served on, and all is as before once there are some again."""

from __future__ import annotations

import contextlib
import http.client
import os
import resource
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest

from penstock.client import Client, PenstockError
from penstock.wire.process import SPARE_DESCRIPTORS
from tests.system.servers import Server, StartServer, wait_for

ROW = {"x": np.ones((1, 4), np.float32)}
CALM = 0.2  # of a core, at most, for a process that has nothing to do but to be asked now and then
SPAN_S = 3.0  # over which that is measured: longer than the beats are apart


def opened(pid: int) -> int:
    """The highest descriptor of a process, and one."""
    return 1 + max(int(name) for name in os.listdir(f"/proc/{pid}/fd"))


@contextlib.contextmanager
def limited(pid: int, more: int) -> Iterator[None]:
    """A process that may open so many files more."""
    before = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (opened(pid) + more, before[1]))
    yield
    resource.prlimit(pid, resource.RLIMIT_NOFILE, before)


def processor_s(pid: int) -> float:
    ticks = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]
    return sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK")


def check_calm(pid: int) -> None:
    begin, before = time.monotonic(), processor_s(pid)
    wait_for(lambda: time.monotonic() - begin > SPAN_S, "time to pass")
    share = (processor_s(pid) - before) / (time.monotonic() - begin)
    assert share < CALM, f"it used {share:.0%} of a core"


def said(server: Server, role: str, event: str) -> bool:
    return any(line["process"].startswith(role) and line["event"].startswith(event) for line in server.log())


def ask(connection: http.client.HTTPConnection) -> tuple[int, bytes]:
    connection.request("GET", "/v2/health/ready")
    response = connection.getresponse()
    return response.status, response.read()


def answer(server: Server) -> str:
    """What a connection of its own is told, if anything."""
    try:
        status, _, body = server.request("GET", "/v2/health/ready")
    except (OSError, http.client.HTTPException) as error:
        return type(error).__name__
    return f"{status} {body.decode()}"


@pytest.mark.parametrize("more", [SPARE_DESCRIPTORS + 20, -5], ids=["few are left", "none is left"])
def test_a_gateway_refuses_connections_and_serves_those_that_it_has(
    start_server: StartServer, repository: Path, more: int
) -> None:
    server = start_server(str(repository))
    [pid] = server.children("gateway")
    kept = http.client.HTTPConnection(server.host, server.port, timeout=30)
    with ExitStack() as stack, contextlib.closing(kept):
        assert ask(kept) == (200, b"")
        with limited(pid, more):
            for _ in range(200):
                stack.enter_context(socket.create_connection((server.host, server.port), timeout=30))
            wait_for(lambda: said(server, "gateway", "descriptors run out"), "the log to say so")
            check_calm(pid)
            assert ask(kept) == (200, b"")
            if more > 0:
                assert answer(server) == (
                    '503 {"error":"this gateway has no descriptors left for more connections; try again shortly"}'
                )
        stack.close()
        wait_for(lambda: said(server, "gateway", "there are descriptors again"), "the log to say so")
        wait_for(lambda: answer(server).startswith("200"), "it to serve as before")
        assert ask(kept) == (200, b"")
    assert server.children("gateway") == [pid]


def test_connections_that_come_while_there_is_no_descriptor_are_answered_later(
    start_server: StartServer, repository: Path
) -> None:
    server = start_server(str(repository))
    [pid] = server.children("gateway")
    waiting = http.client.HTTPConnection(server.host, server.port, timeout=30)
    with contextlib.closing(waiting):
        with limited(pid, -5):
            waiting.request("GET", "/v2/health/ready")
            wait_for(lambda: said(server, "gateway", "descriptors run out"), "the log to say so")
        assert waiting.getresponse().status == 200


@pytest.mark.parametrize("role", ["broker", "worker"])
@pytest.mark.parametrize("more", [SPARE_DESCRIPTORS + 20, -5], ids=["few are left", "none is left"])
def test_a_broker_and_a_worker_let_nobody_else_in_and_serve_those_that_they_know(
    start_server: StartServer, repository: Path, role: str, more: int
) -> None:
    server = start_server(str(repository))
    [pid] = server.children(role)
    name = "broker" if role == "broker" else "cpu"
    with Client(server.runtime) as known, ExitStack() as others:
        known.infer("dense", ROW)
        wait_for(lambda: 'penstock_jobs_bytes{runner="jobs"}' in server.metrics(), "who runs jobs, which nobody awaits")
        with limited(pid, more):
            for _ in range(40):
                other = others.enter_context(Client(server.runtime, timeout=30))
                with contextlib.suppress(PenstockError):
                    other.infer("dense", ROW, timeout=0.05)
            wait_for(lambda: said(server, name, "descriptors run out"), "the log")
            check_calm(pid)
            known.infer("dense", ROW)
            assert server.request("GET", "/v2/health/ready")[0] == 200
        others.close()
        with Client(server.runtime) as other:
            wait_for(lambda: serves(other), "others to be let in again")
    assert server.children(role) == [pid]


def serves(client: Client) -> bool:
    try:
        client.infer("dense", ROW, timeout=1)
    except PenstockError:
        return False
    return True


def test_a_launcher_that_can_start_nothing_tries_again(start_server: StartServer, repository: Path) -> None:
    server = start_server(str(repository), "--gateways=2")
    before = server.children("gateway")
    others = [*server.children("broker"), *server.children("worker")]
    failed = "process cannot be started; it is tried again"
    with limited(server.pid, -5):
        os.kill(before[0], signal.SIGKILL)
        wait_for(lambda: said(server, "launcher", failed), "the log to say so")
        assert server.process.poll() is None
        assert server.request("GET", "/v2/health/ready")[0] == 200, "the other gateway serves on"
    wait_for(lambda: len(server.children("gateway")) == 2, "another gateway")
    assert [*server.children("broker"), *server.children("worker")] == others
    [first, *_] = [line for line in server.log() if line["event"] == failed]
    assert (first["about_process"], first["reason"]) == ("gateway-0", "Too many open files")
