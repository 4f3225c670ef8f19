"""``penstock restart`` under load: nobody notices."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from penstock.bin.supervision import ENDS_MAX, TRY_AGAIN_S
from penstock.client import Client, PenstockError
from tests.system.models import slow, write
from tests.system.servers import PENSTOCK, Server, StartServer, wait_for


def held(server: Server) -> float:
    """Requests that the broker holds."""
    names = ("penstock_queue_requests{", "penstock_running_requests{")
    return sum(value for name, value in server.metrics().items() if name.startswith(names))


class Load:
    """Threads that ask one after another over HTTP, each on a connection that is kept alive as long as the server
    keeps it, and with the client library. ``wrong``: whatever was not the right answer."""

    def __init__(self, server: Server) -> None:
        self.answers = 0
        self.wrong: list[str] = []
        self.connections = 0
        self._server = server
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(ask,)) for ask in (self._http, self._http, self._lib)]

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(60)

    def _run(self, ask: object) -> None:
        try:
            ask()  # type: ignore[operator]
        except Exception as error:  # noqa: BLE001
            self.wrong.append(repr(error))

    def _check(self, number: int, output: object) -> None:
        self.answers += 1
        if not np.allclose(np.asarray(output), number):
            self.wrong.append(f"{number}: {output}")

    def _http(self) -> None:
        connection = http.client.HTTPConnection(self._server.host, self._server.port, timeout=60)
        connection.auto_open = 0
        number = 0
        with contextlib.closing(connection):
            while not self._stop.is_set():
                if connection.sock is None:
                    connection.connect()
                    self.connections += 1
                number += 1
                tensor = {"name": "x", "shape": [1, 1], "datatype": "FP32", "data": [float(number)]}
                connection.request("POST", "/v2/models/slow/infer", json.dumps({"inputs": [tensor]}))
                response = connection.getresponse()
                body = response.read()
                if response.status != 200:
                    self.wrong.append(f"{response.status} {body!r}")
                    continue
                self._check(number, json.loads(body)["outputs"][0]["data"])

    def _lib(self) -> None:
        number = 0
        with Client(self._server.runtime) as client:
            while not self._stop.is_set():
                number += 1
                self._check(number, client.infer("slow", {"x": np.full((1, 1), number, np.float32)})["y"])


@pytest.fixture
def models(tmp_path: Path) -> str:
    write(tmp_path / "models", "slow", slow(20), config="max_batch_size = 4\n")
    return str(tmp_path / "models")


def restart(server: Server, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [*PENSTOCK, "restart", *arguments, f"--runtime-dir={server.runtime}"]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


@pytest.fixture
def server(start_server: StartServer, models: str) -> Server:
    return start_server(models, "--workers=2", "--gateways=2")


@pytest.mark.parametrize("options", [[], ["--in-place"]], ids=["beside", "in place"])
def test_gateways_and_workers_are_replaced_under_load_and_no_request_fails(server: Server, options: list[str]) -> None:
    before = {role: server.children(role) for role in ("gateway", "worker", "broker")}
    with Load(server) as load:
        wait_for(lambda: load.answers > 20, "the load to begin")
        done = restart(server, "gateway", "worker", *options)
        answers = load.answers
        wait_for(lambda: load.answers > answers + 20, "the load to go on")
    assert done.returncode == 0, done.stderr
    names = [line.partition(":")[0] for line in done.stdout.splitlines()]
    assert names == ["gateway-0", "gateway-1", "cpu-0", "cpu-1"]
    assert load.wrong == []
    assert load.connections >= 2
    for role, pids in before.items():
        after = server.children(role)
        assert len(after) == len(pids)
        assert set(after).isdisjoint(pids) == (role != "broker")
    assert not [line for line in server.log() if line["level"] in ("error", "critical")]


def test_the_broker_is_replaced_last_and_the_server_serves_again(server: Server) -> None:
    before = server.children()
    done = restart(server)
    assert done.returncode == 0, done.stderr
    assert [line.split(":")[0] for line in done.stdout.splitlines()][-1] == "broker"
    assert set(server.children()).isdisjoint(before)
    wait_for(lambda: server.request("GET", "/v2/health/ready")[0] == 200, "readiness")


def test_who_cannot_be_replaced_serves_on(server: Server, models: str) -> None:
    before = server.children()
    Path(models).rename(f"{models}-elsewhere")
    done = restart(server, "worker")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("penstock: cpu-0 serves on as it was: the new process ended with exit code 2")
    assert server.children() == before
    assert server.request("GET", "/v2/health/ready")[0] == 200


def test_a_new_version_is_served_and_the_old_one_forgotten(server: Server, models: str) -> None:
    """What only the old workers had is not waited for."""
    (Path(models) / "slow" / "1").rename(Path(models) / "slow" / "2")
    assert restart(server, "worker").returncode == 0
    wait_for(lambda: server.request("GET", "/v2/health/ready")[0] == 200, "readiness")
    assert server.request("GET", "/v2/models/slow/versions/2")[0] == 200
    assert server.request("GET", "/v2/models/slow/versions/1")[0] == 404


def test_there_has_to_be_a_server(tmp_path: Path) -> None:
    command = [*PENSTOCK, "restart", f"--runtime-dir={tmp_path / 'run'}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith(f"penstock: no 'penstock up' serves in {tmp_path / 'run'}")


def test_processes_that_are_stuck_are_killed_and_started_again(server: Server) -> None:
    stuck = {role: server.children(role)[0] for role in ("gateway", "worker", "broker")}
    for pid in stuck.values():
        os.kill(pid, signal.SIGSTOP)

    def replaced() -> bool:
        return all(len(server.children(role)) >= 1 and pid not in server.children(role) for role, pid in stuck.items())

    wait_for(replaced, "them to be killed and started again")
    said = [line["about_process"] for line in server.log() if line["event"].startswith("process is stuck")]
    assert sorted(said) == ["broker", "cpu-0", "gateway-0"]
    wait_for(lambda: server.request("GET", "/v2/health/ready")[0] == 200, "readiness")


def test_a_worker_that_dies_again_and_again_is_left_alone_and_the_server_not_ready(
    start_server: StartServer, models: str
) -> None:
    """Each time some seconds after it was ready, in between which nobody should be sent here."""
    server = start_server(models)

    def health() -> tuple[int, str]:
        status, _, body = server.request("GET", "/v2/health/ready")
        return status, body.decode()

    before: list[int] = []

    def one_more() -> bool:
        return server.children("worker") not in ([], before) and "not ready: slow" not in health()[1]

    for _ in range(ENDS_MAX):
        wait_for(one_more, "a worker that serves")
        before[:] = server.children("worker")
        os.kill(before[0], signal.SIGKILL)
        wait_for(lambda: health()[0] == 503, "the gateway to notice")
    wait_for(lambda: [line for line in server.log() if line["level"] == "error"], "the launcher to say so")
    [said] = [line for line in server.log() if line["process"] == "launcher" and line["level"] == "error"]
    assert said["event"] == "process ends again and again; it is only tried now and then"
    assert (said["about_process"], said["exit_code"], said["after_s"]) == ("cpu-0", -signal.SIGKILL, TRY_AGAIN_S)
    assert server.children("worker") == []
    assert restart(server, "worker").returncode == 0, "whoever asks for it need not wait"
    with Client(server.runtime) as client:
        client.infer("slow", {"x": np.ones((1, 1), np.float32)})
    assert health()[0] == 503
    assert "it was ready 5 times within 10 minutes" in health()[1]  # tests/gateway/test_steady.py: until when


def test_what_is_not_done_when_the_drain_limit_is_over_is_given_up_and_said(
    start_server: StartServer, models: str, tmp_path: Path
) -> None:
    config = tmp_path / "penstock.toml"
    config.write_text("".join(f"[{role}]\ndrain_max_s = 0.3\n" for role in ("gateway", "worker", "broker")))
    server = start_server(models, f"--config={config}")
    [worker] = server.children("worker")
    with Client(server.runtime) as client, ThreadPoolExecutor(1) as pool:
        os.kill(worker, signal.SIGSTOP)
        # It would wait for another broker as long as it may.
        call = client.submit("slow", {"x": np.ones((1, 1), np.float32)}, timeout=4.0)
        tensor = {"name": "x", "shape": [1, 1], "datatype": "FP32", "data": [1.0]}
        asked = pool.submit(server.infer, "slow", {"inputs": [tensor]})
        wait_for(lambda: held(server) == 2, "both to be known")
        server.send(signal.SIGTERM)
        assert isinstance(asked.exception(30), http.client.HTTPException | OSError)
        assert isinstance(call.exception(30), PenstockError)
        with contextlib.suppress(ProcessLookupError):  # the launcher may have killed it by now
            os.kill(worker, signal.SIGCONT)
    assert server.wait() == 0
    over = {line["process"]: line.get("requests") for line in server.log() if line["event"].startswith("drain limit")}
    assert over.keys() == {"gateway-0", "broker"}
    assert over["gateway-0"] == 1
