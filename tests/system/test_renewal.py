"""A broker that ends, in whatever way, takes nothing with it: who asked is answered when another is there."""

from __future__ import annotations

import os
import signal
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from penstock.client import Client
from tests.system.models import slow, slow_wide, write
from tests.system.servers import Server, StartServer, wait_for

WIDTH = 1024  # numbers in a row of "wide": 4 KiB, which lie in shared memory
REQUESTS = 12  # of each model, by each way


@pytest.fixture
def server(start_server: StartServer, tmp_path: Path) -> Server:
    """Two workers, on which each request takes some tens of milliseconds and runs alone."""
    write(tmp_path / "models", "slow", slow(), config="max_batch_size = 1\n")
    write(tmp_path / "models", "wide", slow_wide(WIDTH), config="max_batch_size = 1\n")
    return start_server(str(tmp_path / "models"), "--workers=2")


def row(model: str, value: float) -> list[list[float]]:
    return [[value] * (WIDTH if model == "wide" else 1)]


def over_http(server: Server, model: str, value: float) -> Any:
    inputs = [{"name": "x", "shape": [1, len(row(model, value)[0])], "datatype": "FP32", "data": row(model, value)}]
    status, answer = server.infer(model, {"inputs": inputs})
    assert status == 200, answer
    return [answer["outputs"][0]["data"]]


def by_client(client: Client, model: str, value: float) -> Any:
    return client.infer(model, {"x": row(model, value)})["y"]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_every_request_is_answered_when_the_broker_ends_under_load(server: Server, number: signal.Signals) -> None:
    """Some run, some wait, some lie in shared memory; and some are asked while no broker is there."""
    asked: list[tuple[str, float, Future[Any]]] = []
    with Client(server.runtime, timeout=60.0) as client, ThreadPoolExecutor(6 * REQUESTS) as threads:

        def ask(value: float) -> None:
            for model in "slow", "wide":
                asked.append((model, value, threads.submit(over_http, server, model, value)))
                asked.append((model, value, threads.submit(by_client, client, model, value)))

        def answers() -> int:
            return sum(future.done() for _, _, future in asked)

        for at in range(REQUESTS):
            ask(float(at))
        futures = [client.submit("slow", {"x": [[float(at)]]}) for at in range(REQUESTS)]
        for ends in 1, 2:
            wait_for(partial(lambda before: answers() >= before + 3, answers()), "more answers")
            [broker] = wait_for(lambda: server.children("broker"), "a broker")
            os.kill(broker, number)
            ask(100.0 + ends)
        for model, value, future in asked:
            np.testing.assert_allclose(future.result(60), row(model, value), rtol=1e-3)
        results = [future.result(60)["y"][0, 0] for future in futures]
    np.testing.assert_allclose(results, range(REQUESTS), rtol=1e-3)
    failed = {name for name, count in server.metrics().items() if "request_failures" in name and count}
    assert failed == set()
    wait_for(lambda: not left(server), "all that was in shared memory to be given back")


def left(server: Server) -> dict[str, float]:
    """What workers and gateways still hold for somebody."""
    families = ("penstock_arena_used_bytes", "penstock_unacknowledged_bytes")
    return {name: value for name, value in server.metrics().items() if name.startswith(families) and value}
