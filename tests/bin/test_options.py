"""Options that several commands share: what they take, what they refuse, and with which words."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.bin import options
from penstock.bin.cli import cli
from penstock.bin.devices import CPU, Device
from penstock.broker.options import BrokerOptions
from penstock.gateway.options import GatewayOptions
from penstock.jobs.options import JobsOptions
from penstock.worker.gpus import Gpu, Gpus
from penstock.worker.options import WorkerOptions
from tests.system.servers import PENSTOCK


def refusal(*arguments: str) -> str:
    """What a command that is not even begun says; the exit code is that of bad usage."""
    shown = CliRunner().invoke(cli, arguments, prog_name="penstock")
    assert shown.exit_code == options.EXIT_CANNOT_SERVE == 2
    assert shown.stdout == ""
    return shown.stderr.partition("Error: ")[2].strip()


# --- addresses ---


@pytest.mark.parametrize("command", [["up"], ["broker"], ["worker"], ["gateway"], ["models"], ["infer", "m", "x.npy"]])
@pytest.mark.parametrize("given", ["tcp://127.0.0.1:8100", "ipc:///run/x", "http://x"])
def test_an_address_is_no_runtime_directory(command: list[str], given: str) -> None:
    said = refusal(*command, f"--runtime-dir={given}")
    assert said == (
        f"Invalid value for '--runtime-dir': '{given}' is no directory; "
        "a TCP address goes with --bind, --broker or --server"
    )


@pytest.mark.parametrize("command", [["up"], ["broker"], ["worker"], ["gateway"]])
def test_a_file_is_no_runtime_directory(command: list[str], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert f"Directory '{tmp_path}/file' is a file." in refusal(*command, f"--runtime-dir={tmp_path}/file")


@pytest.mark.parametrize("command", [["up"], ["broker"], ["worker"], ["gateway"]])
def test_the_root_is_no_runtime_directory(command: list[str]) -> None:
    assert "'/' names no runtime directory" in refusal(*command, "--runtime-dir=/")


@pytest.mark.parametrize(
    ("option", "command"),
    [("--broker", ["worker"]), ("--server", ["models"]), ("--server", ["infer", "digits", "x.npy"])],
)
@pytest.mark.parametrize("given", ["127.0.0.1:8100", "", "/run/x", "ipc:///run/x", "TCP://127.0.0.1:8100"])
def test_a_tcp_address_is_written_as_one(option: str, command: list[str], given: str) -> None:
    assert refusal(*command, f"{option}={given}") == (
        f"Invalid value for '{option}': '{given}' is not of the form tcp://HOST:PORT"
    )


@pytest.mark.parametrize("given", ["tcp://host", "tcp://host:0", "tcp://:80", "tcp://host:65535"])
def test_a_brokers_address_names_host_and_port(given: str) -> None:
    said = refusal("worker", f"--broker={given}")
    assert said.startswith(f"'{given}'")


def test_where_the_broker_is_when_nobody_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PENSTOCK_RUNTIME_DIR", "/some/where")
    assert str(options.broker_address(None)) == "/some/where"
    assert str(options.broker_address(Path("/else/where"))) == "/else/where"
    assert str(options.broker_address("tcp://127.0.0.1:8100")) == "tcp://127.0.0.1:8100"


# --- what else is refused ---


@pytest.mark.parametrize("command", ["up", "worker"])
def test_a_device_that_is_not_there_is_refused(command: str, tmp_path: Path) -> None:
    """In a process of its own, which begins to log before it asks for GPUs."""
    asked = [command, "--device=cuda:4000", f"--runtime-dir={tmp_path / 'run'}", "--log-level=debug"]
    ended = subprocess.run([*PENSTOCK, *asked], capture_output=True, text=True, timeout=60, check=False)
    assert (ended.returncode, ended.stdout) == (options.EXIT_CANNOT_SERVE, "")
    assert "Error: --device cuda:4000: " in ended.stderr
    if "no NVIDIA driver answers" in ended.stderr:  # as on most machines that test
        assert ended.stderr.count("no GPU is looked for reason=") == 1


def test_the_driver_is_asked_only_when_a_gpu_may_be_meant(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Gpus] = []

    def absent() -> Gpus:
        asked.append(Gpus([], "none"))
        return asked[-1]

    monkeypatch.setattr(options, "list_gpus", absent)
    assert options.find_devices("cpu") == [CPU] == [options.find_device("cpu", "")]
    assert not asked
    assert options.find_devices(None) == [CPU] == [options.find_device(None, "")]
    assert len(asked) == 2


def test_the_launchers_gpu_goes_by_the_name_that_the_launcher_gave_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """There it is the second, and here the only one that is visible."""
    gpus = [Gpu(0, "GPU-1", pci="0000:01:00.0"), Gpu(1, "GPU-2", pci="0000:02:00.0")]
    monkeypatch.setattr(options, "list_gpus", lambda: Gpus(gpus, ""))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-2")
    assert options.find_device("cuda:1", "GPU-2") == Device("cuda:1", "GPU-2", "0000:02:00.0")
    assert options.find_device("cuda:1", "GPU-3") == Device("cuda:1", "GPU-3"), "it is lost, as will be found"
    assert options.find_device(None, "") == Device("cuda:0", "GPU-2", "0000:02:00.0")
    with pytest.raises(click.UsageError, match="this machine has 2 GPUs, of which"):
        options.find_device("cuda:1", "")


@pytest.mark.parametrize("command", ["up", "broker", "worker", "gateway"])
@pytest.mark.parametrize(
    ("option", "known"), [("--log-format=xml", "'text', 'json'"), ("--log-level=loud", "'debug', 'info'")]
)
def test_an_unknown_kind_of_log_is_refused_with_the_known_ones(command: str, option: str, known: str) -> None:
    assert known in refusal(command, option)


# --- the configuration file ---


def complaint(tmp_path: Path, content: str | bytes) -> str:
    path = tmp_path / "penstock.toml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(click.UsageError) as raised:
        options.load_options(path)
    said = raised.value.message
    assert said.startswith(f"{path}:")
    return said.removeprefix(f"{path}:")


def test_without_a_file_every_limit_has_its_default() -> None:
    assert options.load_options(None) == options.Options()


def test_a_file_says_only_what_is_to_differ(tmp_path: Path) -> None:
    path = tmp_path / "penstock.toml"
    path.write_text(
        "[broker]\nattempts_max = 5\n[broker.tenant_weights]\ngold = 4\n[gateway]\nkeep_alive_s = 10\n"
        "[worker]\narena_bytes = 0\nnuma = false\n"
    )
    broker, worker, gateway, jobs = options.load_options(path)
    assert broker == BrokerOptions(attempts_max=5, tenant_weights={"gold": 4.0})
    assert worker == WorkerOptions(arena_bytes=0, numa=False)
    assert gateway == GatewayOptions(keep_alive_s=10.0)
    assert jobs == JobsOptions()
    path.write_text("")
    assert options.load_options(path) == options.Options()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("[brokr]\n", "1: 'brokr' is not a section; did you mean [broker]?"),
        ("broker = 1\n", "1: 'broker' is not a section; known are [broker], [worker], [gateway], [jobs]"),
        ("attempts_max = 1\n", "1: 'attempts_max' is not a section; it is a key of [broker]"),
        ("[broker]\natempts_max = 1\n", "2: [broker]: key 'atempts_max': unknown; did you mean 'attempts_max'?"),
        ("[gateway]\nattempts_max = 1\n", "2: [gateway]: key 'attempts_max': unknown; "),
        ("[broker]\nattempts_max = 'three'\n", "2: [broker]: key 'attempts_max': Expected `int`, got `str`"),
        ("[gateway]\nhead_bytes_max = 1.5\n", "2: [gateway]: key 'head_bytes_max': Expected `int`, got `float`"),
        ("[gateway]\nkeep_alive_s = []\n", "2: [gateway]: key 'keep_alive_s': Expected `float`, got `array`"),
        ("[gateway]\nkeep_alive_s = -0.5\n", "2: [gateway]: key 'keep_alive_s': it is 0 or more, not -0.5"),
        ("[gateway]\nkeep_alive_s = inf\n", "2: [gateway]: key 'keep_alive_s': it is 0 or more, not inf"),
        ("[gateway]\ncors_origins = 'https://a.b'\n", "2: [gateway]: key 'cors_origins': Expected `array`, got `str`"),
        ("[gateway]\ncors_origins = ['*', 'a.b']\n", "2: [gateway]: key 'cors_origins': 'a.b' is no origin; write "),
        ("[broker]\nsilence_max_s = nan\n", "2: [broker]: key 'silence_max_s': it is 0 or more, not nan"),
        ("[broker]\nattempts_max = -1\n", "2: [broker]: key 'attempts_max': it is 0 or more, not -1"),
        ("[gateway]\narena_bytes = -2\n", "2: [gateway]: key 'arena_bytes': it is -1 or more, not -2"),
        ("[worker]\nnuma = 1\n", "2: [worker]: key 'numa': Expected `bool`, got `int`"),
        ("[broker]\ntenant_weights = 1\n", "2: [broker]: key 'tenant_weights': Expected `object`, got `int`"),
        ("[broker.tenant_weights]\na = 'x'\n", "2: [broker]: key 'tenant_weights.a': Expected `float`, got `str`"),
        (
            "[broker.tenant_weights]\ngold = 0\n",
            "2: [broker]: key 'tenant_weights': the weight of 'gold' is ",
        ),
        (
            "[broker.tenant_weights]\ngold = nan\n",
            "2: [broker]: key 'tenant_weights': the weight of 'gold' is ",
        ),
        ("[broker.tenant_weights]\n'' = 1\n", "2: [broker]: key 'tenant_weights': a tenant has 1 to 64 characters"),
        ("[broker\n", "1: Expected ']' at the end of a table declaration (column 8)"),
        (b"[broker]\n#\xff", "2: 'utf-8'"),
        ("[worker]\nnuma = true\n[gateway]\n# x\ntenant = 1\n", "5: [gateway]: key 'tenant': unknown; known keys are"),
        ("worker.numa = true\nworker.nume = 1\n", "2: [worker]: key 'nume': unknown; did you mean 'numa'?"),
        ("worker = {numa = true, store = 1}\n", "1: [worker]: key 'store': Expected `str`, got `int`"),
        ("[[worker]]\nnuma = true\n", "1: 'worker' is not a section; known are [broker], [worker], [gateway], [jobs]"),
        ('[broker.tenant_weights]\ngold = 1\n\n"a b" = 0\n', "4: [broker]: key 'tenant_weights': the weight of "),
    ],
)
def test_a_file_that_cannot_be_followed_is_refused_with_what_is_wrong(
    tmp_path: Path, content: str | bytes, said: str
) -> None:
    found = complaint(tmp_path, content)
    assert found.startswith(said)
    assert found


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=60) | st.text(alphabet="[]broke.gatwy=\n\"'_ {}1", max_size=60).map(str.encode))
def test_no_file_makes_more_than_a_sentence(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "any.toml"
    path.write_bytes(content)
    said = ""
    try:
        read = options.load_options(path)
    except click.UsageError as error:
        said = error.message
    else:
        assert read == options.Options()
    assert not said or said.startswith(f"{path}:")


@pytest.mark.parametrize("command", ["up", "broker", "gateway"])
def test_a_command_refuses_a_bad_file_before_it_begins(command: str, tmp_path: Path) -> None:
    path = tmp_path / "penstock.toml"
    path.write_text("[broker]\nnonsense = 1\n")
    runtime = f"--runtime-dir={tmp_path / 'run'}"
    assert refusal(command, f"--config={path}", runtime).startswith(f"{path}:2: [broker]: key 'nonsense': unknown")
    assert f"File '{tmp_path}/none' does not exist" in refusal(command, f"--config={tmp_path}/none", runtime)
    assert not (tmp_path / "run").exists()


# --- ending with the launcher ---

CHILD = "import os, sys; from penstock.bin.options import end_with; end_with(int(sys.argv[1])); "
WAITING = CHILD + "print(os.getpid(), flush=True); sys.stdin.read()"
LAUNCHER = "import os, subprocess, sys; sys.exit(subprocess.call([*sys.argv[1:], str(os.getpid())]))"


def test_a_process_ends_when_its_launcher_is_killed() -> None:
    """The launcher's child holds its output open, and only its own end closes it: its input stays open."""
    command = [sys.executable, "-c", LAUNCHER, sys.executable, "-c", WAITING]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as launcher:
        assert launcher.stdout is not None
        child = os.pidfd_open(int(launcher.stdout.readline()))
        try:
            assert select.select([child], [], [], 0)[0] == []
            launcher.send_signal(signal.SIGKILL)
            assert select.select([child], [], [], 30)[0] == [child], "the process lives on without its launcher"
        finally:
            if not select.select([child], [], [], 0)[0]:
                signal.pidfd_send_signal(child, signal.SIGKILL)
            os.close(child)


def run_child(parent: int) -> int:
    command = [sys.executable, "-c", CHILD, str(parent)]
    return subprocess.run(command, timeout=60, check=False).returncode


def test_a_process_whose_launcher_has_ended_already_ends_at_once() -> None:
    with subprocess.Popen(["true"]) as ended:
        pass
    assert run_child(ended.pid) == -signal.SIGTERM


def test_a_process_without_a_launcher_ends_with_nobody() -> None:
    assert run_child(0) == 0


def test_a_process_whose_launcher_lives_goes_on() -> None:
    assert run_child(os.getpid()) == 0
