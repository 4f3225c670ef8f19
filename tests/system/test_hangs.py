"""Workers that are stopped, or whose model does not return: what they had is answered by others."""

from __future__ import annotations

import math
import resource
import signal
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from penstock.client import Client, PenstockError
from penstock.worker.options import EXIT_HUNG
from tests.system.models import dense, endless, slow, write
from tests.system.servers import Process, Server, StartProcess, StartServer, wait_for

ENDLESS = [[1e18, 0.0]]


@pytest.mark.parametrize("name", ["dense", "slow"])  # runs on the talking thread, and on one of its own
def test_answers_flow_again_soon_after_a_worker_was_stopped(
    name: str, start_process: StartProcess, tmp_path: Path
) -> None:
    write(tmp_path / "models", "dense", dense())
    write(tmp_path / "models", "slow", slow(20), config="max_batch_size = 4\n")
    runtime = f"--runtime-dir={tmp_path / 'run'}"
    broker = start_process("broker", runtime)
    workers = [start_process("worker", str(tmp_path / "models"), runtime) for _ in range(2)]
    for worker in workers:
        wait_for(partial(worker.said, "models loaded"), "a worker")
    inputs = {"x": np.ones((1, 4 if name == "dense" else 1), np.float32)}
    ended, took_s = threading.Event(), [0.0]
    with Client(tmp_path / "run") as client:
        expected = client.infer(name, inputs)["y"]
        answered = threading.Semaphore(0)

        def ask() -> None:
            while not ended.is_set():
                start = time.monotonic()
                np.testing.assert_allclose(client.infer(name, inputs, timeout=30)["y"], expected, rtol=1e-4)
                took_s[0] = max(took_s[0], time.monotonic() - start)
                answered.release()

        threads = [threading.Thread(target=ask) for _ in range(8)]
        for thread in threads:
            thread.start()
        try:
            for _ in range(50):
                assert answered.acquire(timeout=30)
            workers[0].send(signal.SIGSTOP)
            wait_for(lambda: broker.said("worker lost"), "the broker to miss it")
            for _ in range(50):
                assert answered.acquire(timeout=30)
        finally:
            ended.set()
            for thread in threads:
                thread.join(60)
            workers[0].send(signal.SIGCONT)
        assert not any(thread.is_alive() for thread in threads)
        print(f"{name}: the slowest answer took {took_s[0]:.2f} s")
        assert took_s[0] < 3.0
        wait_for(lambda: sum("joined the broker" in line for line in workers[0].errors) > 1, "it to be back")
        np.testing.assert_allclose(client.infer(name, inputs)["y"], expected, rtol=1e-4)


def ask_around(client: Client, count: int, bad: int) -> list[Any]:
    """Requests of which one is poison; how each ends: its answer, or an error."""
    inputs = [[[float(number % 3), 1.0]] if number != bad else ENDLESS for number in range(count)]
    calls = [client.submit("endless", {"x": each}, timeout=50) for each in inputs]
    ends: list[Any] = []
    for number, call in enumerate(calls):
        error = call.exception(60)
        if error is None:
            np.testing.assert_array_equal(call.result()["y"], np.array(inputs[number], np.float32))
        ends.append(error)
    return ends


def check_poisoned(ends: list[Any], bad: int) -> None:
    assert [number for number, error in enumerate(ends) if error is not None] == [bad]
    assert isinstance(ends[bad], PenstockError)
    assert (ends[bad].code, ends[bad].retryable) == ("poisoned", False), ends[bad]


def test_a_model_that_does_not_return_is_left_and_its_neighbours_are_answered(
    start_server: StartServer, tmp_path: Path
) -> None:
    write(tmp_path / "models", "endless", endless(), config='max_batch_size = 8\nmax_compute = "500ms"\n')
    write(tmp_path / "models", "dense", dense())
    server = start_server(str(tmp_path / "models"), "--workers=2")
    with Client(server.runtime) as client:
        ends = ask_around(client, 40, bad=7)
        check_poisoned(ends, 7)
        assert "had not ended after 0.5 s" in ends[7].message
        np.testing.assert_array_equal(client.infer("dense", {"x": np.ones((1, 4), np.float32)})["y"].shape, (1, 3))
    lines = server.log()
    hung = [line for line in lines if line["event"] == "batch does not end"]
    assert 3 <= len(hung) <= 4
    assert {(line["model"], line["limit_s"]) for line in hung} == {("endless", 0.5)}
    assert {line["exit_code"] for line in lines if "exit_code" in line} == {EXIT_HUNG}
    assert status_of_poison(server) == 500


def status_of_poison(server: Server) -> int:
    """The same over HTTP."""
    request = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 2], "data": ENDLESS[0]}]}
    status, answer = server.infer("endless", request)
    assert "while they ran this request and nothing else" in answer["error"]
    return status


def limit_processor_time(worker: Process) -> None:
    """The kernel kills it once it has computed for a second more."""
    ticks = Path(f"/proc/{worker.pid}/stat").read_text().rpartition(")")[2].split()[11:13]
    used_s = math.ceil(sum(map(int, ticks)) / 100)
    resource.prlimit(worker.pid, resource.RLIMIT_CPU, (used_s + 1, used_s + 1))


def test_a_request_that_kills_its_worker_fails_alone(start_process: StartProcess, tmp_path: Path) -> None:
    """The kernel kills whoever computes for too long, at the limit that the test has set."""
    write(tmp_path / "models", "endless", endless(), config="max_batch_size = 8\n")
    runtime = f"--runtime-dir={tmp_path / 'run'}"
    start_process("broker", runtime)
    workers: list[Process] = []
    killed: list[int] = []  # how they ended

    def keep_two() -> None:
        for worker in [each for each in workers if each.process.poll() is not None]:
            killed.append(worker.wait())
            workers.remove(worker)
        for _ in range(2 - len(workers)):
            worker = start_process("worker", str(tmp_path / "models"), runtime)
            workers.append(worker)
            wait_for(partial(worker.said, "models loaded"), "a worker")
            limit_processor_time(worker)

    keep_two()
    ends: list[Any] = []
    with Client(tmp_path / "run") as client:
        asking = threading.Thread(target=lambda: ends.extend(ask_around(client, 40, bad=7)))
        asking.start()
        while asking.is_alive():
            asking.join(0.05)
            keep_two()
    check_poisoned(ends, 7)
    assert "its process ended" in ends[7].message
    assert 3 <= len(killed) <= 4
    assert set(killed) == {-signal.SIGKILL}
