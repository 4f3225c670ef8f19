"""Whoever leaves takes what it asked for along, and nobody else waits for it: with real processes, and a model that is
slow enough to be left while it runs."""

from __future__ import annotations

import json
import re
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import numpy as np
import pytest

from penstock.client import Client
from tests.system.models import dense, slow, write
from tests.system.servers import DEADLINE_S, Server, wait_for

MANY = 40  # requests; each is a batch of its own, of some 100 ms
ONE: dict[str, Any] = {"name": "x", "shape": [1, 1], "datatype": "FP32", "data": [1]}
USED = r'penstock_process_cpu_seconds_total\{process="cpu[^"]*"\}'
FOUR: dict[str, Any] = {"name": "x", "shape": [1, 4], "datatype": "FP32", "data": [1, 2, 3, 4]}

# A process that asks for as much as it is told to, and waits.
ASKS = """
import sys, time
import numpy as np
from penstock.client import Client
runtime, model, width, count = sys.argv[1:]
client = Client(runtime)
futures = [client.submit(model, {"x": np.ones((1, int(width)), np.float32)}) for _ in range(int(count))]
print("asked", flush=True)
time.sleep(1000)
"""

Leave = Callable[[], None]
Begin = Callable[[Server, str, dict[str, Any], int, ExitStack], Leave]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    directory = tmp_path_factory.mktemp("cancelling")
    write(directory / "models", "slow", slow(400), config="max_batch_size = 1\n")
    # No batch begins before four rows are together, or one has waited longer than a test takes.
    write(directory / "models", "patient", dense(), config='max_batch_size = 4\nmax_queue_delay = "10s"\n')
    write(directory / "models", "quick", dense())
    server = Server(directory / "run", str(directory / "models"))
    yield server
    server.check_clean_end()


def value(server: Server, family: str, model: str, more: str = "") -> float:
    return sum(
        number
        for name, number in server.metrics().items()
        if name.startswith(f"{family}{{") and f'model="{model}"' in name and more in name
    )


def under_way(server: Server, model: str) -> float:
    """Requests that the broker has, asked now."""
    return value(server, "penstock_queue_requests", model) + value(server, "penstock_running_requests", model)


def connect(server: Server, model: str, tensor: dict[str, Any], count: int) -> socket.socket:
    """A connection that has asked so often."""
    body = json.dumps({"inputs": [tensor]}).encode()
    head = f"POST /v2/models/{model}/infer HTTP/1.1\r\nHost: a\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    connection = socket.create_connection((server.host, server.port), timeout=DEADLINE_S)
    connection.sendall((head + body) * count)
    return connection


def by_connections(how: str) -> Begin:
    """Each with one request."""

    def begin(server: Server, model: str, tensor: dict[str, Any], count: int, stack: ExitStack) -> Leave:
        connections = [stack.enter_context(connect(server, model, tensor, 1)) for _ in range(count)]

        def leave() -> None:
            for connection in connections:
                hang_up(connection, how)

        return leave

    return begin


def by_pipelining(how: str) -> Begin:
    """All on few connections, each of which is read no further than its 16 requests."""

    def begin(server: Server, model: str, tensor: dict[str, Any], count: int, stack: ExitStack) -> Leave:
        counts = [16] * (count // 16) + [count % 16]
        connections = [stack.enter_context(connect(server, model, tensor, each)) for each in counts]

        def leave() -> None:
            for connection in connections:
                hang_up(connection, how)

        return leave

    return begin


def hang_up(connection: socket.socket, how: str) -> None:
    if how == "half":
        connection.shutdown(socket.SHUT_WR)
        return
    if how == "reset":
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


def by_futures(server: Server, model: str, tensor: dict[str, Any], count: int, stack: ExitStack) -> Leave:
    client = stack.enter_context(Client(server.runtime))
    inputs = {"x": np.array([tensor["data"]], np.float32)}
    futures = [client.submit(model, inputs) for _ in range(count)]

    def leave() -> None:
        for future in reversed(futures):
            future.cancel()

    return leave


def by_a_process(server: Server, model: str, tensor: dict[str, Any], count: int, stack: ExitStack) -> Leave:
    process = stack.enter_context(
        subprocess.Popen(
            [sys.executable, "-c", ASKS, str(server.runtime), model, str(tensor["shape"][1]), str(count)],
            stdout=subprocess.PIPE,
            text=True,
        )
    )
    stack.callback(process.kill)
    assert process.stdout is not None
    assert process.stdout.readline() == "asked\n"
    return lambda: process.send_signal(signal.SIGKILL)


WAYS = {
    "connections close": by_connections("close"),
    "connections reset": by_connections("reset"),
    "connections half closed": by_connections("half"),
    "pipelined close": by_pipelining("close"),
    "pipelined reset": by_pipelining("reset"),
    "pipelined half closed": by_pipelining("half"),
    "futures": by_futures,
    "a killed process": by_a_process,
}


@pytest.mark.parametrize("way", WAYS)
def test_who_leaves_takes_its_requests_out_of_the_queue(server: Server, way: str) -> None:
    failures = ("penstock_request_failures_total", "slow", 'reason="cancelled"')
    cancelled, rows = value(server, *failures), value(server, "penstock_batch_rows_sum", "slow")
    with ExitStack() as stack:
        leave = WAYS[way](server, "slow", ONE, MANY, stack)
        wait_for(lambda: under_way(server, "slow") > MANY // 2, "the broker to have them")
        leave()
        wait_for(lambda: under_way(server, "slow") <= 1, "the broker to be rid of them", 20)
        status, answer = server.infer("slow", {"inputs": [ONE]})
        assert (status, answer["outputs"][0]["data"]) == (200, pytest.approx([1.0], rel=0.01))
    hear_of_the_worker(server)
    gone = value(server, *failures) - cancelled
    assert MANY // 2 < gone <= MANY
    ran = value(server, "penstock_batch_rows_sum", "slow") - rows
    assert 1 <= ran < MANY // 2, "those that were cancelled have run"


def hear_of_the_worker(server: Server) -> None:
    """Wait for its next beat, with which all figures come: each has used more of its processor's time than the last.

    What was told before its last answer is here already, as both take the same way. A worker that is asked beats once
    a second; one that is left alone wakes for it half as often."""
    before = processor_s(server)

    def told() -> bool:
        assert server.infer("quick", {"inputs": [FOUR]})[0] == 200
        return processor_s(server) > before

    wait_for(told, "a beat of the worker")


def processor_s(server: Server) -> float:
    [used] = [number for name, number in server.metrics().items() if re.fullmatch(USED, name)]
    return used


@pytest.mark.parametrize("way", WAYS)
def test_who_leaves_takes_its_requests_out_of_a_batch_that_waits(server: Server, way: str) -> None:
    """Three of the four rows that a batch needs are on the worker, and leave: then it waits for four others."""
    with ExitStack() as stack:
        leave = WAYS[way](server, "patient", FOUR, 3, stack)
        wait_for(lambda: value(server, "penstock_running_requests", "patient") == 3, "the worker to have them")
        leave()
        wait_for(lambda: under_way(server, "patient") == 0, "the worker to be rid of them", 20)
        client = stack.enter_context(Client(server.runtime))
        inputs = {"x": np.ones((1, 4), np.float32)}
        futures = [client.submit("patient", inputs, timeout=20.0) for _ in range(4)]
        timings = [future.result(20).timing for future in futures]
    assert {(timing.batch_rows, timing.reason) for timing in timings} == {(4, "full")}
