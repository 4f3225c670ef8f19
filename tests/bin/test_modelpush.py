"""``penstock models push``: what is copied, what is refused, and when a server serves it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner, Result
from onnx import TensorProto, helper, numpy_helper

from penstock.bin.asking import Outcome
from penstock.bin.cli import cli
from penstock.bin.modelpush import files_of, seen
from penstock.client.publish import PublishError
from penstock.wire.models import IDLE, LOADING, READY, UNAVAILABLE, ModelSpec, ModelState, Route
from tests.system.models import dense, write

SPEC = ModelSpec("net", "2", "onnxruntime_onnx", (), (), True, 32)


def push(models: Path, *arguments: str) -> Result:
    return CliRunner().invoke(cli, ["models", "push", *arguments, f"--models={models}", "--no-wait"])


def tree(path: Path) -> list[str]:
    return sorted(str(each.relative_to(path)) for each in path.rglob("*"))


@pytest.fixture
def models(tmp_path: Path) -> Path:
    (tmp_path / "models").mkdir()
    return tmp_path / "models"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "net.onnx"
    onnx.save(dense(), path)
    return path


def outside(path: Path, location: str) -> Path:
    """A model whose weights lie in a file beside it."""
    weights = numpy_helper.from_array(np.ones((256, 256), np.float32), "w")
    ports = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", 256]) for name in "xy"]
    graph = helper.make_graph([helper.make_node("MatMul", ["x", "w"], ["y"])], "g", ports[:1], ports[1:], [weights])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.save(model, path, save_as_external_data=True, location=location)
    return path


def test_a_file_becomes_the_next_version(models: Path, file: Path) -> None:
    write(models, "net", dense(), "4")
    shown = push(models, "net", str(file))
    assert (shown.exit_code, shown.stderr) == (0, "")
    assert shown.stdout == f"published version 5 of net in {models}\n"
    assert (models / "net/5/model.onnx").read_bytes() == file.read_bytes()
    assert push(models, "net", str(file), "--version=9").stdout == f"published version 9 of net in {models}\n"


def test_the_files_that_weights_lie_in_come_with_it(models: Path, tmp_path: Path) -> None:
    path = outside(tmp_path / "large.onnx", "weights.bin")
    assert push(models, "large", str(path)).exit_code == 0
    assert tree(models) == ["large", "large/1", "large/1/model.onnx", "large/1/weights.bin"]
    assert (models / "large/1/weights.bin").read_bytes() == (tmp_path / "weights.bin").read_bytes()


def test_weights_that_are_not_there_are_a_sentence(models: Path, tmp_path: Path) -> None:
    path = outside(tmp_path / "large.onnx", "weights.bin")
    (tmp_path / "weights.bin").unlink()
    shown = push(models, "large", str(path))
    assert (shown.exit_code, shown.stdout) == (2, "")
    assert shown.stderr.endswith("weights.bin, which is not there; push it from where it is\n")
    assert tree(models) == []


def test_weights_elsewhere_are_a_sentence(models: Path, tmp_path: Path) -> None:
    (tmp_path / "inner").mkdir()
    path = outside(tmp_path / "inner" / "large.onnx", "weights.bin")
    path.write_bytes(path.read_bytes().replace(b"weights.bin", b"../ghts.bin"))
    with pytest.raises(PublishError, match=r"'\.\./ghts\.bin' does not lie beside the model"):
        files_of(path, "model.onnx")


def test_what_is_no_model_is_not_published_unless_it_is_forced(models: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(b"not a model")
    shown = push(models, "net", str(path))
    assert (shown.exit_code, shown.stdout, tree(models)) == (2, "", [])
    assert "is no ONNX model" in shown.stderr
    assert push(models, "net", str(path), "--force").exit_code == 0
    assert push(models, "net", str(tmp_path / "nothing"), "--force").exit_code == 2
    assert push(models, "net", str(tmp_path), "--force").exit_code == 2


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["..", "{file}"], "a model's name is one of a directory"),
        (["net", "{file}", "--version=latest"], "a version is a whole number"),
        (["net", "{file}", "--version=4"], "version 4 of model 'net' is there already"),
        (["net", "{file}x"], "cannot read"),
    ],
)
def test_what_cannot_be_published(models: Path, file: Path, arguments: list[str], sentence: str) -> None:
    write(models, "net", dense(), "4")
    before = tree(models)
    shown = push(models, *[each.format(file=file) for each in arguments])
    assert (shown.exit_code, shown.stdout) == (2, "")
    assert shown.stderr.startswith(f"penstock: {sentence}")
    assert tree(models) == before


def test_a_repository_that_is_a_file_takes_no_versions(file: Path) -> None:
    shown = push(file, "net", str(file))
    assert shown.exit_code == 2
    assert "is a file" in shown.stderr


def test_the_name_of_the_file_is_the_one_that_tritons_configuration_says(models: Path, file: Path) -> None:
    (models / "net").mkdir()
    (models / "net" / "config.pbtxt").write_text('backend: "onnxruntime"\ndefault_model_filename: "net.onnx"\n')
    assert push(models, "net", str(file)).exit_code == 0
    assert "net/1/net.onnx" in tree(models)


def test_without_a_server_it_is_published_and_said(models: Path, file: Path, nowhere: Path) -> None:
    arguments = ["models", "push", "net", str(file), f"--runtime-dir={nowhere}", "--timeout=0.05"]
    shown = CliRunner().invoke(cli, [*arguments, f"--models={models}"])
    assert (shown.exit_code, shown.stdout) == (1, f"published version 1 of net in {models}\n")
    assert shown.stderr.startswith(f"penstock: no Penstock broker answered at {nowhere}")
    assert "--no-wait" in shown.stderr
    shown = CliRunner().invoke(cli, arguments)
    assert (shown.exit_code, shown.stdout) == (1, "")


def test_a_version_that_is_not_asked_for_is_not_waited_for(models: Path, file: Path, nowhere: Path) -> None:
    write(models, "net", dense(), "4", "version_policy = [4]\n")
    arguments = ["models", "push", "net", str(file), f"--runtime-dir={nowhere}", f"--models={models}"]
    shown = CliRunner().invoke(cli, arguments)
    assert shown.exit_code == 0
    assert f"{models}/net/model.toml does not ask for it, but for 4 (version_policy)" in shown.stdout
    assert "--undo" in shown.stdout


def states(*given: tuple[str, str, str]) -> dict[str, ModelState]:
    return {version: ModelState("net", version, state, reason, SPEC) for version, state, reason in given}


OLD, NEW = ("1", READY, ""), ("2", READY, "")


@pytest.mark.parametrize(
    ("given", "route", "first", "outcome"),
    [
        ([OLD], Route("net", ("1",)), True, None),
        ([OLD, ("2", LOADING, "")], Route("net", ("1",)), True, None),
        ([OLD, NEW], Route("net", ("1",)), True, None),
        ([OLD, NEW], Route("net", ("1",)), False, Outcome(True, "version 2 is READY and serves requests that name it")),
        (
            [OLD, NEW],
            Route("net", ("2",)),
            True,
            Outcome(True, "version 2 is READY and serves requests that name no version"),
        ),
        (
            [("2", IDLE, "")],
            Route("net", ("2",)),
            True,
            Outcome(True, "version 2 is IDLE and serves requests that name no version"),
        ),
        (
            [OLD, ("2", UNAVAILABLE, "it is broken")],
            Route("net", ("1",)),
            True,
            Outcome(False, "version 2 is not served: it is broken; version 1 serves on"),
        ),
        ([("2", UNAVAILABLE, "it is broken")], None, True, Outcome(False, "version 2 is not served: it is broken")),
    ],
)
def test_when_a_version_is_served(
    given: list[tuple[str, str, str]], route: Route | None, first: bool, outcome: Outcome | None
) -> None:
    assert seen(states(*given), route, "2", first) == outcome
