"""What is said of a server's models."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from penstock.bin.cli import cli
from penstock.bin.modellist import config_of, description, serves
from penstock.wire.models import READY, UNAVAILABLE, ModelSpec, ModelState, Route, TensorSpec
from tests.system.servers import Server

SPLIT = Route(
    "net", ("3",), (("stable", "3"), ("canary", "4"), ("old", "2")), (("stable", 90), ("canary", 5), ("4", 5))
)


def models(runtime: Path, *arguments: str) -> Result:
    return CliRunner().invoke(cli, ["models", *arguments, f"--runtime-dir={runtime}"])


@pytest.mark.parametrize(
    ("route", "version", "words"),
    [
        (None, "3", ""),
        (Route("net", ("3",)), "3", "default"),
        (Route("net", ("3",)), "4", ""),
        (Route("net", ("3",), (("stable", "3"),)), "3", "default, stable"),
        (SPLIT, "3", "stable 90 %"),
        (SPLIT, "4", "canary 5 %, 5 %"),
        (SPLIT, "2", "old"),
    ],
)
def test_what_leads_to_a_version(route: Route | None, version: str, words: str) -> None:
    assert serves(route, version) == words


def test_a_model_is_described(tmp_path: Path) -> None:
    x, y = TensorSpec("x", "FP32", (-1, 4)), TensorSpec("y", "FP32", (-1, 3))
    spec = ModelSpec("net", "3", "onnxruntime_onnx", (x, y), (y,), True, 32)
    states = [ModelState("net", "3", READY, "", spec), ModelState("net", "4", UNAVAILABLE, "it is broken", None)]
    assert list(description("net", states, SPLIT, "somewhere")) == [
        "net",
        "  configuration  somewhere",
        "  current        version 3",
        "  labels         stable 3, canary 4, old 2",
        "  traffic        stable 90 %, canary 5 %, 4 5 %",
        "",
        "  version 3  READY  serves stable 90 %",
        "    inputs   x  FP32 [-1, 4]",
        "             y  FP32 [-1, 3]",
        "    outputs  y  FP32 [-1, 3]",
        "    batches  up to 32 rows",
        "",
        "  version 4  UNAVAILABLE  serves canary 5 %, 5 %",
        "    it is broken",
    ]


def test_where_a_model_is_configured(tmp_path: Path) -> None:
    assert config_of("", "net").startswith("unknown")
    assert config_of(str(tmp_path), "net") == f"{tmp_path}/net on the server's host"
    (tmp_path / "net").mkdir()
    assert config_of(str(tmp_path), "net") == f"none ({tmp_path}/net/model.toml would be one)"
    (tmp_path / "net" / "config.pbtxt").touch()
    assert config_of(str(tmp_path), "net") == f"{tmp_path}/net/config.pbtxt"
    (tmp_path / "net" / "model.toml").touch()
    assert config_of(str(tmp_path), "net") == f"{tmp_path}/net/model.toml"
    assert config_of(str(tmp_path / "net" / "model.toml"), "net").startswith("none: ")


def test_ls_is_what_is_shown_without_a_command(server: Server) -> None:
    shown = models(server.runtime, "ls")
    assert (shown.exit_code, shown.stderr) == (0, "")
    assert shown.stdout == CliRunner().invoke(cli, ["models", f"--runtime-dir={server.runtime}"]).stdout
    assert CliRunner().invoke(cli, ["models", f"--runtime-dir={server.runtime}", "ls"]).stdout == shown.stdout


def test_ls_as_json(server: Server) -> None:
    found = {each["name"]: each for each in json.loads(models(server.runtime, "ls", "--json").stdout)}
    assert found["dense"] == {
        "name": "dense",
        "version": "3",
        "state": "READY",
        "reason": "",
        "batchable": True,
        "max_batch_size": 32,
        "current": True,
        "labels": [],
        "traffic": 0,
    }
    assert (found["broken"]["state"], found["broken"]["max_batch_size"]) == ("UNAVAILABLE", None)


def test_describe_says_inputs_and_outputs(server: Server) -> None:
    shown = models(server.runtime, "describe", "dense")
    assert (shown.exit_code, shown.stderr) == (0, "")
    assert "  current        version 3\n" in shown.stdout
    assert "    inputs   x  FP32 [-1, 4]\n    outputs  y  FP32 [-1, 3]\n" in shown.stdout
    shown = models(server.runtime, "describe", "nope")
    assert (shown.exit_code, shown.stdout) == (1, "")
    assert shown.stderr.startswith("penstock: the server has no model 'nope'; it has brain, broken, dense, ")


def test_nobody_there_is_an_error_of_each_command(nowhere: Path) -> None:
    commands = (["ls"], ["describe", "a"], ["load", "a"], ["unload", "a"], ["traffic", "a"], ["rollback", "a"])
    for arguments in (*commands, ["push", "a", "a.onnx"]):
        shown = models(nowhere, *arguments, "--timeout=0.05")
        assert (shown.exit_code, shown.stdout) == (1, ""), arguments
        assert shown.stderr.startswith(f"penstock: no Penstock broker answered at {nowhere} within 0.05 s"), arguments


def test_a_configuration_to_load_with_may_be_in_a_file(nowhere: Path, tmp_path: Path) -> None:
    shown = models(nowhere, "load", "a", f"--config=@{tmp_path}/nothing")
    assert shown.exit_code == 2
    assert f"cannot read {tmp_path}/nothing: No such file or directory" in shown.stderr
