"""The launcher: when it starts again what has died, when it gives up, and in which order it stops."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from penstock.bin import launcher
from penstock.bin.devices import CPU, Device
from penstock.bin.launcher import Child, Launcher, Plan, plan_workers
from penstock.bin.restart import RestartError
from penstock.wire.endpoints import RuntimeDir
from tests.system.models import dense, slow, write
from tests.system.servers import Process, Server, wait_for

Launch = Callable[..., Process]


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[Launch]:
    """``penstock up`` that need not come as far as to serve; what is left of it at the end is killed."""
    started: list[Process] = []

    def start(*arguments: str) -> Process:
        process = Process(["up", *arguments, "--http=127.0.0.1:0", f"--runtime-dir={tmp_path / 'run'}"])
        started.append(process)
        return process

    yield start
    for process in started:
        process.end(signal.SIGKILL)


@pytest.fixture
def long_to_load(tmp_path: Path) -> str:
    """A repository that keeps a worker busy until it has been looked at."""
    path = write(tmp_path / "slow", "slow-0", slow(300))
    for number in range(1, 20):
        link = tmp_path / "slow" / f"slow-{number}" / "1" / "model.onnx"
        link.parent.mkdir(parents=True)
        link.symlink_to(path)
    return str(tmp_path / "slow")


def child(launcher: Process, role: str) -> int:
    [pid] = wait_for(lambda: launcher.children(role), f"the {role} to be started")
    return int(pid)


def alive(pids: list[int]) -> list[int]:
    return [pid for pid in pids if Path(f"/proc/{pid}").exists()]


# --- starting again ---


def test_a_process_that_dies_again_and_again_is_started_again_more_and_more_slowly(tmp_path: Path) -> None:
    server = Server(tmp_path / "run")

    def restarts() -> list[tuple[object, object, object]]:
        return [
            (line["about_process"], line["exit_code"], line["after_s"])
            for line in server.log()
            if line["event"] == "process ended; it is started again"
        ]

    before = child(server, "worker")
    os.kill(before, signal.SIGKILL)
    wait_for(lambda: server.children("worker") not in ([], [before]), "another worker")
    wait_for(lambda: [line["event"] for line in server.log()].count("models loaded") == 2, "it to load the models")
    os.kill(child(server, "worker"), signal.SIGTERM)
    wait_for(lambda: len(restarts()) == 2, "the second end to be noticed")
    assert restarts() == [("cpu-0", -signal.SIGKILL, 0.2), ("cpu-0", 0, 0.4)]
    server.check_clean_end()


def test_a_successor_that_is_never_ready_is_not_waited_for_without_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launcher, "_START_MAX_S", 0.1)
    plan = Plan(
        models=tmp_path,
        http="127.0.0.1:0",
        workers=1,
        gateways=1,
        devices=[],
        shares=[],
        bind="",
        config=None,
        runtime=RuntimeDir(tmp_path),
        log_format="text",
        log_level="info",
    )
    one = Launcher(plan, print)
    one._stop_signal = one._notify = SimpleNamespace(received=False, fileno=lambda: -1)  # type: ignore[assignment]
    successor = Child("gateway-0", "gateway", ["tail", "-f", "/dev/null"], held=True)
    one._children.append(successor)
    one._spawn(successor)
    try:
        with pytest.raises(RestartError, match="was not ready within"):
            one._wait_for(successor)
    finally:
        one._stop([successor], one._turn)
        one._forget(successor)


# --- who starts ---

GPU = Device("cuda:0", "GPU-1", "0000:3b:00.0")
OTHER = Device("cuda:1", "MIG-2", "0000:86:00.0")


def test_a_worker_sees_its_own_gpu_alone() -> None:
    assert plan_workers([GPU, OTHER], 1) == [
        ("cuda:0", ["--device=cuda:0", "--name=cuda:0", "--gpu=GPU-1"], {"CUDA_VISIBLE_DEVICES": "GPU-1"}),
        ("cuda:1", ["--device=cuda:1", "--name=cuda:1", "--gpu=MIG-2"], {"CUDA_VISIBLE_DEVICES": "MIG-2"}),
    ]


def test_several_workers_on_each_device_are_numbered() -> None:
    planned = plan_workers([GPU, CPU], 2)
    assert [each.name for each in planned] == ["cuda:0-0", "cuda:0-1", "cpu-0", "cpu-1"]
    assert {each.environment.get("CUDA_VISIBLE_DEVICES") for each in planned[:2]} == {"GPU-1"}
    assert plan_workers([CPU], 1) == [("cpu-0", ["--device=cpu", "--name=cpu-0"], {})]


def test_shares_of_cores_are_those_of_all_workers() -> None:
    planned = plan_workers([GPU, CPU], 2, [{number} for number in range(4)])
    assert [each.arguments[-1] for each in planned] == ["--cpus=0", "--cpus=1", "--cpus=2", "--cpus=3"]


# --- giving up ---


@pytest.mark.parametrize(
    ("role", "name", "number"),
    [("broker", "broker", signal.SIGKILL), ("worker", "cpu-0", signal.SIGKILL)],
)
def test_a_process_that_is_killed_before_the_server_is_ready_is_named_and_all_end(
    launch: Launch, long_to_load: str, role: str, name: str, number: signal.Signals
) -> None:
    launcher = launch(long_to_load)
    child(launcher, "worker")
    children = launcher.children()
    os.kill(child(launcher, role), number)
    assert launcher.wait() == 1
    assert launcher.errors[-1] == (
        f"penstock: the process {name} was ended by signal {number:d} before the server was ready; start it again"
    )
    assert alive(children) == []
    assert launcher.lines.get(timeout=30) == "", "it never said that it was ready"


def test_the_exit_code_and_the_words_of_a_worker_that_can_load_nothing_are_the_launchers(
    launch: Launch, tmp_path: Path
) -> None:
    (tmp_path / "net.onnx").write_bytes(b"not a model")
    launcher = launch(str(tmp_path / "net.onnx"), "--workers=3")
    assert launcher.wait() == 2
    said = [line for line in launcher.errors if line.startswith("penstock: ")]
    assert len(said) == 1, said
    assert "cannot be loaded" in said[0]
    assert list((tmp_path / "run").iterdir()) == []


def test_told_to_stop_while_it_starts_it_stops_with_0(launch: Launch, long_to_load: str, tmp_path: Path) -> None:
    launcher = launch(long_to_load)
    child(launcher, "worker")
    children = launcher.children()
    assert launcher.end(signal.SIGINT) == 0, launcher.errors
    assert alive(children) == []
    assert list((tmp_path / "run").iterdir()) == []
    assert launcher.lines.get(timeout=30) == "", "it never said that it was ready"


# --- what it starts ---


def test_a_repository_may_have_a_name_that_begins_with_a_hyphen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "--models", "net", dense())
    monkeypatch.chdir(tmp_path)
    server = Server(tmp_path / "run", "--workers=2", "./--models")
    server.check_clean_end()


def test_a_model_that_is_called_loading_and_cannot_be_loaded_is_not_waited_for(tmp_path: Path) -> None:
    write(tmp_path / "models", "net", dense())
    (tmp_path / "models" / "LOADING" / "1").mkdir(parents=True)
    server = Server(tmp_path / "run", str(tmp_path / "models"))
    assert server.request("GET", "/v2/models/net/ready")[0] == 200
    server.check_clean_end()


def test_only_a_process_itself_can_say_that_it_is_ready(launch: Launch, long_to_load: str, tmp_path: Path) -> None:
    """The kernel tells the launcher who says something. It reads one message a turn, and few fit into the queue before
    it, so that it has read most of them when the last is sent."""
    launcher = launch(long_to_load)
    child(launcher, "worker")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as stranger:
        stranger.settimeout(30)
        stranger.connect(str(tmp_path / "run" / "launcher.sock"))
        for said in (b"READY=1", b"READY=1\nREADY=1", b"", b"\0" * 5000) * 300:
            stranger.send(said)
    assert launcher.children("gateway") == []
    assert launcher.end() == 0, launcher.errors
    assert not launcher.said("gateway listens")


def test_processes_have_names_and_are_stopped_in_the_order_of_a_request(tmp_path: Path) -> None:
    server = Server(tmp_path / "run", "--workers=2", "--gateways=2")
    server.check_clean_end()
    order = ["gateway stopped", "broker stopped", "worker stopped"]
    ended = [order.index(line["event"]) for line in server.log() if line["event"] in order]
    assert ended == [0, 0, 1, 2, 2]
    names = {line["process"] for line in server.log()}
    assert names == {"broker", "cpu-0", "cpu-1", "gateway-0", "gateway-1"}
