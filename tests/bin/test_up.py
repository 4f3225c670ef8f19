"""What ``penstock up`` and the commands under it refuse, and with which exit code. (What they serve: tests/system.)"""

from __future__ import annotations

import os
import re
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.system.models import dense, write
from tests.system.servers import PENSTOCK, Server


@pytest.fixture
def taken() -> Iterator[str]:
    """Where somebody else listens."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"127.0.0.1:{server.getsockname()[1]}"


def run(tmp_path: Path, *arguments: str) -> tuple[int, str]:
    """(exit code, what it said). It prints nothing, and leaves no socket behind."""
    runtime = tmp_path / "run"
    ended = subprocess.run(
        [*PENSTOCK, *arguments, f"--runtime-dir={runtime}"], capture_output=True, text=True, timeout=60, check=False
    )
    assert ended.stdout == ""
    assert "Traceback" not in ended.stderr
    assert not runtime.exists() or list(runtime.iterdir()) == []
    return ended.returncode, ended.stderr


# --- what cannot be served: 2 ---


@pytest.mark.parametrize("command", ["up", "worker"])
def test_models_that_do_not_exist(tmp_path: Path, command: str) -> None:
    code, said = run(tmp_path, command, f"{tmp_path}/none")
    assert (code, said) == (
        2,
        f"penstock: {tmp_path}/none does not exist; give an .onnx file or a model repository\n",
    )


@pytest.mark.parametrize("command", ["up", "worker"])
def test_a_file_that_is_no_model(tmp_path: Path, command: str) -> None:
    (tmp_path / "model.pt").touch()
    code, said = run(tmp_path, command, f"{tmp_path}/model.pt")
    assert (code, said) == (2, f"penstock: {tmp_path}/model.pt is neither a directory nor an .onnx file\n")


def test_a_repository_in_which_every_model_has_a_problem_before_anything_is_started(tmp_path: Path) -> None:
    (tmp_path / "models" / "a").mkdir(parents=True)
    (tmp_path / "models" / "b" / "1").mkdir(parents=True)
    code, said = run(tmp_path, "up", f"{tmp_path}/models")
    assert code == 2
    assert said == (
        f"penstock: {tmp_path}/models/a has no version directory; put the model at a/1/model.onnx; "
        f"{tmp_path}/models/b/1/model.onnx does not exist\n"
    )
    assert not (tmp_path / "run").exists()


def test_a_worker_that_could_load_nothing_says_why_for_each_model(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write(tmp_path / "models", name, dense()).write_bytes(b"not a model")
    code, said = run(tmp_path, "worker", f"{tmp_path}/models")
    assert code == 2
    sentences = [line for line in said.splitlines() if line.startswith("penstock: ")]
    assert len(sentences) == 2
    assert all("cannot be loaded" in sentence for sentence in sentences)


# --- bad usage: 2 as well ---


@pytest.mark.parametrize("option", ["--workers=0", "--gateways=0", "--workers=257", "--gateways=x", "--nonsense"])
def test_bad_usage(tmp_path: Path, option: str) -> None:
    code, said = run(tmp_path, "up", option)
    assert code == 2
    assert said.startswith("Usage: penstock")
    assert option.partition("=")[0] in said.partition("Error: ")[2]


# --- what cannot be had here: 1 ---


@pytest.mark.parametrize("where", ["", "8000", "fd://x"])
def test_a_place_for_http_that_is_none(tmp_path: Path, where: str) -> None:
    code, said = run(tmp_path, "up", f"--http={where}")
    assert code == 1
    assert re.fullmatch(rf"penstock: .*'{re.escape(where.removeprefix('fd://'))}' is n.*\n", said)


def test_a_port_that_is_taken(tmp_path: Path, taken: str) -> None:
    code, said = run(tmp_path, "up", f"--http={taken}")
    assert (code, said) == (
        1,
        f"penstock: cannot listen on {taken}: Address already in use; choose another with --http HOST:PORT\n",
    )


@pytest.mark.parametrize("where", ["8000", "fd://x"])
def test_a_gateway_that_cannot_listen(tmp_path: Path, where: str) -> None:
    code, said = run(tmp_path, "gateway", f"--http={where}")
    assert code == 1
    assert " E gateway: cannot start reason=" in said


@pytest.mark.parametrize(
    ("bind", "words"), [("tcp://0.0.0.0:0", "no encryption yet"), ("nonsense", "is not of the form")]
)
def test_what_the_broker_refuses_is_said_once_by_the_broker(tmp_path: Path, bind: str, words: str) -> None:
    code, said = run(tmp_path, "up", "--http=127.0.0.1:0", f"--bind={bind}")
    assert code == 1
    [line] = said.splitlines()
    assert " E broker: cannot start reason=" in line
    assert words in line


def test_a_runtime_directory_that_is_open_to_others(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir(mode=0o755)
    code, said = run(tmp_path, "up")
    assert code == 1
    assert said.startswith(f"penstock: the runtime directory {tmp_path}/run belongs to somebody else or is open")


def test_a_second_server_in_one_directory(tmp_path: Path) -> None:
    first = Server(tmp_path / "run")
    second = subprocess.run(
        [*PENSTOCK, "up", "--http=127.0.0.1:0", f"--runtime-dir={tmp_path / 'run'}"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (second.returncode, second.stdout) == (1, "")
    assert second.stderr == (
        f"penstock: another 'penstock up' runs in {tmp_path}/run; stop it, or choose another --runtime-dir\n"
    )
    os.kill(first.pid, 0)
    assert first.request("GET", "/v2/health/ready")[0] == 200
    first.check_clean_end()
