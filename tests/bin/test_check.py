"""What ``penstock check`` says of memory, limits and models, and when it says that something does not fit."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import onnx
import pytest
from click.testing import CliRunner, Result
from onnx import TensorProto

from penstock.bin import check as module
from penstock.bin.cli import cli
from tests.system.kinds import classifier
from tests.system.models import dense, identity, lookup, two_inputs, write
from tests.system.servers import PENSTOCK

AVAILABLE = 1 << 30


@pytest.fixture(autouse=True)
def memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with 1 GiB to spare."""
    monkeypatch.setattr(module, "available_bytes", lambda: AVAILABLE)


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    return tmp_path / "models"


def check(*arguments: object) -> Result:
    return CliRunner().invoke(cli, ["check", *map(str, arguments)], prog_name="penstock")


def configured(tmp_path: Path, content: str, *arguments: object) -> Result:
    path = tmp_path / "penstock.toml"
    path.write_text(content)
    return check(f"--config={path}", *arguments)


# --- what fits ---


def test_everything_is_told_a_line_each() -> None:
    shown = check()
    assert (shown.exit_code, shown.stderr) == (0, "")
    assert shown.stdout.splitlines() == [
        "memory: 1024.0 MiB available",
        "worker: 1 with 128.0 MiB of shared memory each ([worker] arena_bytes)",
        "gateway: 1 with 112.0 MiB of shared memory each ([gateway] arena_bytes)",
        "client: 64.0 MiB unless it says otherwise (Client(arena_bytes=...))",
        "server: 240.0 MiB of shared memory, which fits",
        "body: 64.0 MiB at most ([gateway] body_bytes_max)",
        "model digits: 256 bytes in and 40 bytes out for each row; a gateway has room for 458752 rows, 14336 full "
        "batches of 32",
    ]


def test_defaults_leave_room_for_those_that_start_later() -> None:
    shown = check("--workers=20", "--gateways=20")
    assert shown.exit_code == 0
    worker, gateway = shown.stdout.splitlines()[1:3]
    assert worker == "worker: 20 with 10.1 MiB to 128.0 MiB of shared memory each ([worker] arena_bytes)"
    assert gateway == "gateway: 20 with 733184 bytes to 8.9 MiB of shared memory each ([gateway] arena_bytes)"


def test_sizes_are_those_of_the_configuration_in_whole_pages(tmp_path: Path) -> None:
    shown = configured(tmp_path, "[worker]\narena_bytes = 0\n[gateway]\narena_bytes = 100000000\n", "--gateways=2")
    assert shown.exit_code == 0
    assert shown.stdout.splitlines()[1:5] == [
        "worker: 1 with 0 bytes of shared memory each ([worker] arena_bytes)",
        "gateway: 2 with 95.4 MiB of shared memory each ([gateway] arena_bytes)",
        "client: 64.0 MiB unless it says otherwise (Client(arena_bytes=...))",
        "server: 190.7 MiB of shared memory, which fits",
    ]


def test_rows_and_batches_are_counted_where_shapes_say(tmp_path: Path, repository: Path) -> None:
    write(repository, "dense", dense(), config="max_batch_size = 1000\n")
    write(repository, "half", identity(TensorProto.FLOAT16, ["N", 100, 10]))
    write(repository, "lookup", lookup())
    write(repository, "square", identity(TensorProto.DOUBLE, [2, 8]))
    write(repository, "strings", identity(TensorProto.STRING))
    write(repository, "sums", two_inputs())
    write(repository, "wide", identity(TensorProto.FLOAT, ["N", "M"]))
    shown = configured(tmp_path, "[gateway]\nbody_bytes_max = 1\narena_bytes = 1048576\n", repository)
    assert (shown.exit_code, shown.stderr) == (0, "")
    assert shown.stdout.splitlines()[6:] == [
        "model dense: 16 bytes in and 12 bytes out for each row; a gateway has room for 65536 rows, 65 full batches "
        "of 1000",
        "model half: 2000 bytes in and 2000 bytes out for each row; a gateway has room for 524 rows, 16 full batches "
        "of 32",
        "model lookup: 8 bytes in and 8 bytes out for each row; a gateway has room for 131072 rows, 4096 full batches "
        "of 32",
        "model square: 128 bytes in and 128 bytes out for each request; a gateway has room for 8192 requests",
        "model strings: any number of bytes in and any number of bytes out for each row",
        "model sums: 16 bytes in and 16 bytes out for each row; a gateway has room for 65536 rows, 2048 full batches "
        "of 32",
        "model wide: any number of bytes in and any number of bytes out for each row",
    ]


def test_without_shared_memory_nothing_is_counted_in_it(tmp_path: Path) -> None:
    shown = configured(tmp_path, "[gateway]\narena_bytes = 0\n[worker]\narena_bytes = 0\n")
    assert shown.exit_code == 0
    assert shown.stdout.splitlines()[-2:] == [
        "body: 64.0 MiB at most ([gateway] body_bytes_max)",
        "model digits: 256 bytes in and 40 bytes out for each row",
    ]


# --- what is a warning ---


def warnings(shown: Result) -> list[str]:
    assert (shown.exit_code, shown.stderr) == (0, "")
    return [line for line in shown.stdout.splitlines() if line.startswith("warning: ")]


def test_a_limit_of_bodies_above_the_arena_is_a_warning(tmp_path: Path) -> None:
    for limit, count in ((1048576, 0), (1048577, 1)):
        shown = configured(tmp_path, f"[gateway]\narena_bytes = 1048576\nbody_bytes_max = {limit}\n")
        assert len(warnings(shown)) == count
    assert warnings(shown) == [
        "warning: body_bytes_max allows 1048577 bytes, and a gateway's shared memory has 1048576: tensors that take "
        "more are refused; raise [gateway] arena_bytes, or lower body_bytes_max"
    ]


def test_a_model_whose_batch_does_not_fit_is_named(tmp_path: Path, repository: Path) -> None:
    write(repository, "fits", identity(TensorProto.FLOAT, ["N", 2048]))
    write(repository, "is_wide", identity(TensorProto.FLOAT, ["N", 2049]))
    write(repository, "whole", identity(TensorProto.FLOAT, [100_000]))
    limits = "[gateway]\narena_bytes = 262144\nbody_bytes_max = 1\n"
    assert warnings(configured(tmp_path, limits, repository)) == [
        "warning: model is_wide: 32 rows take 262272 bytes in, and a gateway's shared memory has 262144: such "
        "requests are refused; raise [gateway] arena_bytes",
        "warning: model whole: one request takes 400000 bytes in, and a gateway's shared memory has 262144: such "
        "requests are refused; raise [gateway] arena_bytes",
    ]
    assert warnings(configured(tmp_path, "[worker]\narena_bytes = 262144\n", repository)) == [
        "warning: model is_wide: 32 rows take 262272 bytes out, and a worker's shared memory has 262144: such "
        "results travel in messages, which costs more; raise [worker] arena_bytes",
        "warning: model whole: one request takes 400000 bytes out, and a worker's shared memory has 262144: such "
        "results travel in messages, which costs more; raise [worker] arena_bytes",
    ]


def test_settings_without_effect_are_a_warning(repository: Path) -> None:
    target = 'latency_target = "50ms"\n'
    write(repository, "batches", identity(TensorProto.FLOAT, ["N", 2]), config=target)
    write(repository, "square", identity(TensorProto.FLOAT, [2, 2]), config=target)
    assert warnings(check(repository)) == [
        "warning: model square: key 'latency_target' in model.toml has no effect: requests of this model run alone, "
        "since the first dimension of input 'x' is fixed at 2; leave it out, or export the model with independent rows "
        "along a symbolic first dimension"
    ]


def test_what_a_config_pbtxt_asks_for_in_vain_is_a_warning(repository: Path) -> None:
    write(repository, "net", dense())
    (repository / "net" / "config.pbtxt").write_text("input { name: 'z' }\n")
    assert warnings(check(repository)) == [
        "warning: model net: config.pbtxt: input[0]: the model has no input 'z'; the model is followed",
    ]


# --- what does not fit: 2 ---


def test_more_shared_memory_than_there_is_does_not_fit(tmp_path: Path) -> None:
    content = f"[gateway]\narena_bytes = {AVAILABLE // 4}\n[worker]\narena_bytes = {AVAILABLE // 2}\n"
    assert configured(tmp_path, content, "--gateways=2").exit_code == 0
    shown = configured(tmp_path, content, "--gateways=3")
    assert shown.exit_code == 2
    assert "server: 1280.0 MiB of shared memory, which does not fit\n" in shown.stdout
    assert shown.stderr == (
        "penstock: 1 worker and 3 gateways take 1342177280 bytes of shared memory, and 1073741824 bytes of memory are "
        "available; make arena_bytes smaller ([worker] and [gateway]), start fewer, or free memory\n"
    )


def test_models_that_cannot_be_served_are_told_beside_those_that_can(repository: Path) -> None:
    write(repository, "bad", dense()).write_bytes(b"not a model")
    (repository / "empty").mkdir()
    write(repository, "good", dense())
    shown = check(repository)
    assert shown.exit_code == 2
    assert "model good: 16 bytes in and 12 bytes out" in shown.stdout
    bad, empty = shown.stderr.splitlines()
    assert bad.startswith(f"penstock: {repository}/bad/1/model.onnx cannot be loaded: ")
    assert empty == f"penstock: {repository}/empty has no version directory; put the model at empty/1/model.onnx"


def test_no_models_are_one_sentence(tmp_path: Path) -> None:
    shown = check(tmp_path / "none")
    assert shown.exit_code == 2
    assert shown.stderr == f"penstock: {tmp_path}/none does not exist; give an .onnx file or a model repository\n"


@pytest.mark.parametrize("option", ["--workers=0", "--gateways=257", "--nonsense"])
def test_bad_usage(option: str) -> None:
    shown = check(option)
    assert shown.exit_code == 2
    assert option.partition("=")[0] in shown.stderr.partition("Error: ")[2]


def test_a_bad_configuration_is_refused_before_anything_is_told(tmp_path: Path) -> None:
    shown = configured(tmp_path, "[gateway]\nnonsense = 1\n")
    assert (shown.exit_code, shown.stdout) == (2, "")
    assert ":2: [gateway]: key 'nonsense': unknown" in shown.stderr


# --- the report on a model ---


def test_one_file_gets_a_report(tmp_path: Path) -> None:
    onnx.save(dense(), tmp_path / "net.onnx")
    shown = check(tmp_path / "net.onnx")
    assert (shown.exit_code, shown.stderr) == (0, "")
    lines = shown.stdout.splitlines()
    assert lines[6].startswith("model net: 16 bytes in and 12 bytes out for each row")
    assert lines[7] == "  file: opset 17, IR version 9; 1 node: 1 MatMul"
    assert "  optimizer: of 1 node it makes 1" in lines
    table = lines[lines.index("  measured here, on 1 thread:") + 1 :]
    assert [line.split()[0] for line in table[:7]] == ["rows", "1", "2", "4", "8", "16", "32"]
    assert table[7] == "  rows/s:"
    assert lines[-1] == "  what to change: nothing that could be seen"


def test_a_repository_gets_one_when_asked(repository: Path) -> None:
    write(repository, "dense", dense(), config="max_batch_size = 2\n")
    write(repository, "square", identity(TensorProto.DOUBLE, [2, 8]))
    assert "optimizer" not in check(repository).stdout
    shown = check(repository, "--verbose")
    assert shown.exit_code == 0
    assert shown.stdout.count("  optimizer: ") == 2
    square = " ".join(shown.stdout.partition("model square")[2].split())
    assert "each request runs by itself: the first dimension of input 'x' is fixed at 2" in square
    assert "- the first dimension of input 'x' is fixed at 2, so every request runs by itself." in square
    assert "'x', 'y' is float64" in square


def test_a_file_that_cannot_be_served_gets_a_sentence_instead(tmp_path: Path) -> None:
    onnx.save(classifier(zipmap=True), tmp_path / "net.onnx")
    shown = check(tmp_path / "net.onnx")
    assert shown.exit_code == 2
    assert shown.stderr.startswith(f"penstock: {tmp_path}/net.onnx cannot be served: output 'maps' is of type seq(map(")
    assert shown.stderr.endswith("export it without ZipMap (options={'zipmap': False})\n")
    assert "optimizer" not in shown.stdout


def test_a_terminal_of_ascii_gets_ascii(tmp_path: Path) -> None:
    onnx.save(dense(), tmp_path / "net.onnx")
    environment = os.environ | {"PYTHONIOENCODING": "ascii", "COLUMNS": "70"}
    command = [*PENSTOCK, "check", str(tmp_path / "net.onnx")]
    shown = subprocess.run(command, env=environment, capture_output=True, timeout=60, check=True)
    report = shown.stdout.decode("ascii").partition("model net")[2].splitlines()[1:]
    assert any(line.startswith("    32 ####") for line in report)
    assert max(map(len, report)) <= 70


@pytest.mark.parametrize("seconds", ["0", "x", "4000"])
def test_a_time_for_the_report_that_is_none(seconds: str) -> None:
    shown = check(f"--seconds={seconds}")
    assert shown.exit_code == 2
    assert "--seconds" in shown.stderr.partition("Error: ")[2]
