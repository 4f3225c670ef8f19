"""Single processes: they find each other in any order, again after a restart, and over TCP."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
import urllib.error
import urllib.request
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from penstock.client import Client, PenstockError
from tests.system.servers import PENSTOCK, Process, StartProcess, wait_for

ROW = {"x": np.ones((1, 4), np.float32)}


def ready(url: str) -> bool:
    try:
        with urllib.request.urlopen(url + "/v2/health/ready", timeout=5) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def url_of(gateway: Process) -> str:
    def find() -> str | None:
        found = re.search(r"url=(http://\S+)", "\n".join(gateway.errors))
        return found[1] if found else None

    url: str = wait_for(find, "the gateway to listen")
    return url


@pytest.mark.parametrize("order", ["gateway worker broker", "worker broker gateway"])
def test_they_find_each_other_in_any_order(
    order: str, start_process: StartProcess, repository: Path, tmp_path: Path
) -> None:
    runtime = f"--runtime-dir={tmp_path / 'run'}"
    commands = {
        "broker": ["broker", runtime],
        "worker": ["worker", str(repository), runtime],
        "gateway": ["gateway", "--http=127.0.0.1:0", runtime],
    }
    started = {}
    for role in order.split():
        started[role] = start_process(*commands[role])
        if role == "gateway":
            url_of(started[role])  # each is up before the next begins
        elif role == "worker":
            wait_for(lambda: started["worker"].said("models loaded"), "the worker")
    wait_for(lambda: ready(url_of(started["gateway"])), "readiness")
    scores = {role: Path(f"/proc/{each.pid}/oom_score_adj").read_text().strip() for role, each in started.items()}
    own = Path("/proc/self/oom_score_adj").read_text().strip()
    assert scores == {"broker": own, "gateway": own, "worker": str(max(500, int(own)))}


def test_each_may_be_restarted_while_the_others_stay(
    start_process: StartProcess, repository: Path, tmp_path: Path
) -> None:
    runtime = f"--runtime-dir={tmp_path / 'run'}"
    broker = start_process("broker", runtime)
    worker = start_process("worker", str(repository), runtime)
    gateway = start_process("gateway", "--http=127.0.0.1:0", runtime)
    wait_for(lambda: ready(url_of(gateway)), "readiness")
    with Client(tmp_path / "run") as client:
        before = client.infer("dense", ROW)["y"]
        for number in (signal.SIGTERM, signal.SIGKILL):
            assert broker.end(number) in (0, -number)
            broker = start_process("broker", runtime)
            wait_for(lambda: ready(url_of(gateway)), "readiness with another broker")
            [after] = wait_for(lambda: try_infer(client), "an answer")
            np.testing.assert_array_equal(after, before)

            assert worker.end(number) in (0, -number)
            wait_for(lambda: not ready(url_of(gateway)), "the gateway to say that no worker has the models")
            worker = start_process("worker", str(repository), runtime)
            wait_for(lambda: ready(url_of(gateway)), "readiness with another worker")
            np.testing.assert_array_equal(client.infer("dense", ROW)["y"], before)


def try_infer(client: Client) -> list[np.ndarray[tuple[int, ...], np.dtype[np.float32]]]:
    """The output, or nothing when a retry may help."""
    try:
        return [client.infer("dense", ROW, timeout=10)["y"]]
    except PenstockError as error:
        if not error.retryable:
            raise
        return []


def test_what_is_in_flight_when_the_broker_dies_is_answered_once_another_is_there(
    start_process: StartProcess, tmp_path: Path
) -> None:
    from tests.system.models import slow, write

    write(tmp_path / "models", "slow", slow(), config="max_batch_size = 1\n")
    runtime = f"--runtime-dir={tmp_path / 'run'}"
    broker = start_process("broker", runtime)
    start_process("worker", str(tmp_path / "models"), runtime)
    with Client(tmp_path / "run") as client:
        wait_for(lambda: [state.state for state in client.models()] == ["READY"], "the model")
        calls = [client.submit("slow", {"x": [[float(number)]]}, timeout=60) for number in range(50)]
        calls[0].result(30)
        broker.end(signal.SIGKILL)
        assert not all(call.done() for call in calls), "fifty requests were not done in the time of one"
        start_process("broker", runtime)
        results = [call.result(60)["y"][0, 0] for call in calls]
    np.testing.assert_allclose(results, range(50), rtol=1e-4)


def test_a_new_broker_answers_soon_after_its_process_has_started(
    start_process: StartProcess, repository: Path, tmp_path: Path
) -> None:
    """Half a second, of which most is its own start and the time that it gives peers to join; no wait of theirs."""
    runtime = f"--runtime-dir={tmp_path / 'run'}"
    broker = start_process("broker", runtime)
    start_process("worker", str(repository), runtime)
    with Client(tmp_path / "run") as client:
        wait_for(lambda: try_infer(client), "an answer")
        for _ in range(3):
            broker.end(signal.SIGKILL)
            call = client.submit("dense", ROW)
            begun = time.monotonic()
            broker = start_process("broker", runtime)
            call.result(30)
            assert time.monotonic() - begun < 5.0, "ten times what it takes on a machine that has nothing else to do"


def test_requests_of_a_worker_that_dies_run_elsewhere(start_process: StartProcess, tmp_path: Path) -> None:
    from tests.system.models import slow, write

    write(tmp_path / "models", "slow", slow(), config="max_batch_size = 4\n")
    runtime = f"--runtime-dir={tmp_path / 'run'}"
    start_process("broker", runtime)
    workers = [start_process("worker", str(tmp_path / "models"), runtime) for _ in range(2)]
    for worker in workers:
        wait_for(partial(worker.said, "models loaded"), "a worker")
    with Client(tmp_path / "run") as client:
        client.infer("slow", {"x": [[0.0]]})
        calls = [client.submit("slow", {"x": [[float(number)]]}) for number in range(40)]
        calls[4].result(30)
        workers[0].end(signal.SIGKILL)
        results = [call.result(60)["y"][0, 0] for call in calls]
    np.testing.assert_allclose(results, range(40), rtol=1e-4)
    assert [path for path in (tmp_path / "run").iterdir() if path.name.startswith("worker-")], "one lives on"


def test_workers_and_clients_join_over_tcp(start_process: StartProcess, repository: Path, tmp_path: Path) -> None:
    broker = start_process("broker", f"--runtime-dir={tmp_path / 'broker'}", "--bind=tcp://127.0.0.1:0")

    def find() -> str | None:
        found = re.search(r"callers=(tcp://\S+)", "\n".join(broker.errors))
        return found[1] if found else None

    address = wait_for(find, "the broker's address")
    worker = start_process("worker", str(repository), f"--broker={address}", "--bind=tcp://127.0.0.1:0")
    wait_for(lambda: worker.said("models loaded"), "the worker")
    with Client(address) as far, Client(tmp_path / "broker") as near:
        wait_for(lambda: far.models(), "the models")
        expected = far.infer("dense", ROW)["y"]
        np.testing.assert_array_equal(near.infer("dense", ROW)["y"], expected)
        wide = np.arange(100_000, dtype=np.float32).reshape(2, 50_000)
        for client in (far, near):  # the near one's lies in memory that the worker does not share
            np.testing.assert_array_equal(client.infer("wide", {"x": wide})["y"], wide)

    local = start_process("worker", str(repository), f"--runtime-dir={tmp_path / 'broker'}")
    wait_for(lambda: local.said("models loaded"), "the local worker")
    assert worker.end() == 0
    with Client(address) as far:
        wait_for(lambda: far.models(), "the models")
        with pytest.raises(PenstockError, match="publishes over TCP; start workers with --bind") as caught:
            far.infer("dense", ROW)
        assert caught.value.retryable


@pytest.mark.parametrize("command", [["broker"], ["worker", "--broker=tcp://127.0.0.1:9"]])
def test_an_address_that_others_can_reach_is_refused(command: list[str], tmp_path: Path) -> None:
    ended = subprocess.run(
        [*PENSTOCK, *command, f"--runtime-dir={tmp_path / 'run'}", "--bind=tcp://0.0.0.0:0"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ended.returncode == 1
    assert "no encryption yet" in ended.stderr


def test_a_second_broker_in_one_directory_is_refused(start_process: StartProcess, tmp_path: Path) -> None:
    first = start_process("broker", f"--runtime-dir={tmp_path / 'run'}")
    wait_for(lambda: first.said("broker started"), "the first broker")
    second = subprocess.run(
        [*PENSTOCK, "broker", f"--runtime-dir={tmp_path / 'run'}"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert second.returncode == 1
    assert "in use by another process" in second.stderr
    os.kill(first.pid, 0)
