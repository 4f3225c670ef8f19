"""What ``penstock models`` says of a server's models, and what it does to the store."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner, Result
from onnx import TensorProto, helper, numpy_helper

from penstock.bin.cli import cli
from tests.system.models import dense, identity, write
from tests.system.servers import Server


def models(runtime: Path, *arguments: str) -> Result:
    return CliRunner().invoke(cli, ["models", f"--runtime-dir={runtime}", *arguments])


def test_every_model_has_a_row_under_the_headings(server: Server) -> None:
    shown = models(server.runtime)
    assert (shown.exit_code, shown.stderr) == (0, "")
    heading, *rows = shown.stdout.splitlines()
    assert heading.split() == ["NAME", "VERSION", "STATE", "BATCH", "SERVES"]
    assert [row.split()[:4] for row in sorted(rows) if not row.startswith("broken")] == [
        ["brain", "1", "READY", "32"],
        ["dense", "3", "READY", "32"],
        ["square", "1", "READY", "alone"],
        ["strings", "1", "READY", "32"],
        ["sums", "1", "READY", "32"],
    ]


def test_columns_begin_where_their_headings_do(server: Server) -> None:
    heading, *rows = models(server.runtime).stdout.splitlines()
    for row in rows:
        for column in ("VERSION", "STATE"):
            at = heading.index(column)
            assert row[at - 2 : at] == "  "
            assert row[at] != " "


def test_what_is_not_served_or_not_batched_says_why(server: Server) -> None:
    rows = {line.split()[0]: line for line in models(server.runtime).stdout.splitlines()}
    assert rows["broken"].split()[1:3] == ["1", "UNAVAILABLE"]
    assert "cannot be loaded" in rows["broken"]
    assert len(rows["square"].partition("alone")[2].split()) > 3, "a sentence"
    assert rows["dense"] == rows["dense"].rstrip()


def test_nobody_there_is_an_error_within_the_time_that_was_given(nowhere: Path) -> None:
    shown = models(nowhere, "--timeout=0.05")
    assert (shown.exit_code, shown.stdout) == (1, "")
    assert shown.stderr == (
        f"penstock: no Penstock broker answered at {nowhere} within 0.05 s; "
        "is 'penstock up' running there, and as the same user?\n"
    )


def test_a_server_that_is_named_is_asked_instead_of_the_directory(server: Server) -> None:
    shown = models(server.runtime, "--server=tcp://127.0.0.1:9", "--timeout=0.05")
    assert shown.exit_code == 1
    assert "no Penstock broker answered at tcp://127.0.0.1:9 " in shown.stderr


# --- the store ---


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "penstock.toml"
    path.write_text(f'[worker]\nstore = "{tmp_path}/store"\nstore_min_bytes = 1000\n')
    return path


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A model with weights enough, and one without."""
    write(tmp_path / "models", "heavy", dense())
    write(tmp_path / "models", "strings", identity(TensorProto.STRING))
    write(tmp_path / "models", "large", wide())
    return tmp_path / "models"


def store(config: Path, *arguments: str) -> Result:
    return CliRunner().invoke(cli, ["models", *arguments, f"--config={config}"])


def test_models_are_prepared_once_and_progress_is_shown(config: Path, repository: Path) -> None:
    shown = store(config, "prepare", str(repository))
    assert (shown.exit_code, shown.stderr) == (0, "")
    assert "large: preparing model: step starting, weights 0.26 MB\n" in shown.stdout
    assert "large: model prepared: seconds " in shown.stdout
    assert "strings: not prepared: 0 bytes of weights, and each worker loads its own\n" in shown.stdout
    assert "large: prepared before\n" in store(
        config, "prepare", str(repository / "large/1/model.onnx")
    ).stdout.replace("model: ", "large: ")


def test_models_are_prepared_for_a_gpu_apart(config: Path, repository: Path) -> None:
    store(config, "prepare", str(repository))
    shown = store(config, "prepare", "--gpu", str(repository))
    assert (shown.exit_code, shown.stderr) == (0, "")
    assert "large: model prepared: seconds " in shown.stdout
    assert store(config, "prune").stdout.count("kept large") == 2


def test_what_cannot_be_prepared_is_a_sentence_each(config: Path, repository: Path, tmp_path: Path) -> None:
    (repository / "broken" / "1").mkdir(parents=True)
    (repository / "broken" / "1" / "model.onnx").write_bytes(b"not a model")
    (tmp_path / "store").write_bytes(b"")
    shown = store(config, "prepare", str(repository))
    assert shown.exit_code == 2
    said = shown.stderr.splitlines()
    assert [line.split(": ")[:2] for line in said] == [["penstock", "model broken"], ["penstock", "model large"]]
    assert "is no ONNX model" in said[0]
    assert said[1] == f"penstock: model large: {tmp_path}/store is no directory"


def test_no_models_at_all_are_a_sentence(config: Path, tmp_path: Path) -> None:
    for command in "prepare", "prune":
        shown = store(config, command, str(tmp_path / "nothing"))
        assert (shown.exit_code, shown.stderr.count("\n")) == (2, 1)
        assert "does not exist" in shown.stderr


def test_prune_removes_what_no_model_needs_and_says_so(config: Path, repository: Path, tmp_path: Path) -> None:
    store(config, "prepare", str(repository))
    assert "kept large (0.5 MB): it is needed\n" in store(config, "prune").stdout
    path, moved = repository / "large" / "1" / "model.onnx", tmp_path / "moved.onnx"
    path.rename(moved)
    assert "kept large (0.5 MB): it is needed\n" in store(config, "prune", str(moved)).stdout
    shown = store(config, "prune", "--dry-run").stdout
    assert f"would remove large (0.5 MB): {path} is gone\n0.5 MB would be removed from {tmp_path}/store\n" == shown
    shown = store(config, "prune").stdout
    assert f"removed large (0.5 MB): {path} is gone\n0.5 MB removed from {tmp_path}/store\n" == shown
    assert store(config, "prune").stdout == f"0.0 MB removed from {tmp_path}/store\n"


def test_prune_removes_nothing_when_a_model_cannot_be_read(config: Path, repository: Path, tmp_path: Path) -> None:
    store(config, "prepare", str(repository))
    (repository / "large" / "1" / "model.onnx").unlink()
    (tmp_path / "other.onnx").write_bytes(b"not a model")
    shown = store(config, "prune", str(tmp_path / "other.onnx"))
    assert (shown.exit_code, shown.stdout) == (2, "")
    assert shown.stderr.endswith("; nothing was removed\n")


def wide() -> onnx.ModelProto:
    """256 KiB of weights."""
    weights = numpy_helper.from_array(np.random.default_rng(0).standard_normal((256, 256), np.float32), "w")
    ports = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", 256]) for name in "xy"]
    graph = helper.make_graph([helper.make_node("MatMul", ["x", "w"], ["y"])], "g", ports[:1], ports[1:], [weights])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
