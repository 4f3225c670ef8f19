"""Workers that are stopped, or whose model does not return: what they had is answered by others."""

from __future__ import annotations

import signal
import threading
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from penstock.client import Client
from tests.system.models import dense, slow, write
from tests.system.servers import StartProcess, wait_for


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
        wait_for(lambda: sum(line.count("joined the broker") for line in workers[0].errors) == 2, "it to be back")
        np.testing.assert_allclose(client.infer(name, inputs)["y"], expected, rtol=1e-4)
