"""Models that are published, ordered, labelled and taken back while a server serves: by commands, and over HTTP as
Triton's client does."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import tritonclient.http as triton
from onnx import TensorProto, helper, numpy_helper
from tritonclient.utils import InferenceServerException

from penstock.client import Client
from tests.system.models import make_model, write
from tests.system.servers import Server, StartServer, wait_for

ROW = {"inputs": [{"name": "x", "shape": [1, 2], "datatype": "FP32", "data": [0.0, 0.0]}]}


def constant(version: int) -> onnx.ModelProto:
    """y [N, 2] = x [N, 2] + version: its answers to zeros say which it is."""
    return make_model(
        [helper.make_node("Add", ["x", "version"], ["y"])],
        [("x", TensorProto.FLOAT, ["N", 2])],
        [("y", TensorProto.FLOAT, ["N", 2])],
        [numpy_helper.from_array(np.array([version], np.float32), "version")],
    )


def answer(server: Server, path: str = "net", sticky: str = "") -> str:
    """The version that answers."""
    headers = {"Penstock-Sticky": sticky} if sticky else {}
    status, _, body = server.request("POST", f"/v2/models/{path}/infer", json.dumps(ROW).encode(), headers)
    said = json.loads(body)
    assert status == 200, said
    assert said["outputs"][0]["data"] == [float(said["model_version"])] * 2
    return str(said["model_version"])


class Commands:
    """``penstock models``, of one server."""

    def __init__(self, server: Server) -> None:
        self._runtime = f"--runtime-dir={server.runtime}"

    def __call__(self, *arguments: object, code: int = 0) -> str:
        """What it says."""
        command = [sys.executable, "-m", "penstock.bin", "models", *map(str, arguments), self._runtime]
        done = subprocess.run(command, capture_output=True, text=True, timeout=90, check=False)
        assert done.returncode == code, (done.stdout, done.stderr)
        return done.stdout if code == 0 else done.stderr

    def listed(self) -> dict[str, Any]:
        return {each["version"]: each for each in json.loads(self("ls", "--json")) if each["name"] == "net"}


@pytest.fixture
def models(tmp_path: Path) -> Path:
    write(tmp_path / "models", "net", constant(1), "1")
    return tmp_path / "models"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A model that answers as version 2."""
    path = tmp_path / "two.onnx"
    onnx.save(constant(2), path)
    return path


def test_what_is_pushed_serves_and_can_be_taken_back(start_server: StartServer, models: Path, file: Path) -> None:
    server = start_server(str(models), "--workers=2")
    run = Commands(server)
    said = run("push", "net", file)
    assert said.splitlines() == [
        f"published version 2 of net in {models}",
        "version 2 is READY and serves requests that name no version",
    ]
    assert answer(server) == "2"
    assert 'it was "latest"' in run("rollback", "net")
    assert answer(server) == "1"
    listed = wait_for(lambda: (found := run.listed()).keys() == {"1"} and found, "version 2 to be unloaded")
    assert listed["1"]["current"]
    run("rollback", "net", "--undo")
    assert answer(server) == "2"


def test_what_does_not_load_is_said_and_the_old_version_serves_on(
    start_server: StartServer, models: Path, tmp_path: Path
) -> None:
    server = start_server(str(models))
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"no model")
    run = Commands(server)
    assert "is no ONNX model" in run("push", "net", broken, code=2)
    said = run("push", "net", broken, "--force", code=1)
    assert said.startswith("penstock: version 2 is not served: ")
    assert said.endswith("; version 1 serves on\n")
    assert answer(server) == "1"
    assert (run.listed()["2"]["state"], run.listed()["1"]["current"]) == ("UNAVAILABLE", True)


def test_a_new_model_is_pushed_and_described(start_server: StartServer, models: Path, file: Path) -> None:
    server = start_server(str(models))
    run = Commands(server)
    run("push", "other", file)
    assert server.infer("other", ROW)[0] == 200
    described = run("describe", "other")
    assert f"  configuration  none ({models}/other/model.toml would be one)\n  current        version 1\n" in described
    assert "    inputs   x  FP32 [-1, 2]\n" in described


def test_traffic_is_split_by_labels_and_sticks(start_server: StartServer, models: Path, file: Path) -> None:
    server = start_server(str(models))
    run = Commands(server)
    run("push", "net", file)
    said = run("traffic", "net", "stable=50", "canary=50", "--label=stable=1", "--label=canary=2")
    assert said.endswith("the server has followed\n")
    assert {label: answer(server, f"net/versions/{label}") for label in ("stable", "canary", "1", "2")} == {
        "stable": "1",
        "canary": "2",
        "1": "1",
        "2": "2",
    }
    assert Counter(answer(server) for _ in range(100)) == {"1": 50, "2": 50}
    users = {f"user {each}": answer(server, sticky=f"user {each}") for each in range(20)}
    assert set(users.values()) == {"1", "2"}
    with Client(server.runtime) as client:
        for user, version in users.items():
            assert answer(server, sticky=user) == version
            inputs = {"x": np.zeros((1, 2), np.float32)}
            assert client.infer("net", inputs, sticky=user).version == version
            assert client.submit("net", inputs, sticky=user).result(20).version == version
        assert client.infer("net", inputs, version="canary").version == "2"
    assert run("traffic", "net") == " 50 % stable (version 1)\n 50 % canary (version 2)\n"
    assert (run.listed()["1"]["labels"], run.listed()["2"]["traffic"]) == (["stable"], 50)
    status = server.request("GET", "/v2/models/net/versions/canary/ready")[0]
    assert (status, server.request("GET", "/v2/models/net/versions/beta/ready")[0]) == (200, 400)
    run("traffic", "net", "--clear")
    assert {answer(server) for _ in range(20)} == {"2"}


def test_versions_are_published_over_http(start_server: StartServer, models: Path, file: Path, tmp_path: Path) -> None:
    config = tmp_path / "penstock.toml"
    config.write_text("[gateway]\nmodel_push = true\n")
    server = start_server(str(models), f"--config={config}")
    status, _, body = server.request("POST", "/v2/repository/models/net/versions", file.read_bytes())
    assert (status, json.loads(body)) == (200, {"name": "net", "version": "2"})
    wait_for(lambda: server.request("GET", "/v2/models/net/versions/2/ready")[0] == 200, "version 2 to serve")
    wait_for(lambda: answer(server) == "2", "version 2 to be current")
    status, _, body = server.request("PUT", "/v2/repository/models/net/versions/2", b"other")
    assert (status, "is there already" in json.loads(body)["error"]) == (400, True)
    assert sorted(each.name for each in (models / "net").iterdir()) == ["1", "2"]


def test_nothing_is_published_over_http_by_default(start_server: StartServer, models: Path, file: Path) -> None:
    server = start_server(str(models))
    status, _, body = server.request("PUT", "/v2/repository/models/net/versions/2", file.read_bytes())
    assert (status, "model_push = true" in json.loads(body)["error"]) == (403, True)
    assert [each.name for each in (models / "net").iterdir()] == ["1"]


def test_triton_orders_models(start_server: StartServer, models: Path, file: Path, tmp_path: Path) -> None:
    config = tmp_path / "penstock.toml"
    config.write_text('[gateway]\nmodel_push = true\n[worker]\nmodel_control = "explicit"\n')
    write(models, "other", constant(1), "1")
    (models / "broken" / "1").mkdir(parents=True)
    (models / "broken" / "1" / "model.onnx").write_bytes(b"no model")
    server = start_server(str(models), f"--config={config}")
    run = Commands(server)
    with triton.InferenceServerClient(f"{server.host}:{server.port}") as client:
        assert client.get_model_repository_index() == []
        client.load_model("net")
        assert client.is_model_ready("net")
        assert client.get_model_repository_index() == [{"name": "net", "version": "1", "state": "READY"}]
        assert answer(server) == "1"
        client.load_model("other", config='{"max_batch_size": 3}')
        with Client(server.runtime) as caller:
            assert {state.name: state.spec.max_batch_size for state in caller.models() if state.spec}["other"] == 3
        client.unload_model("other")
        assert not client.is_model_ready("other")
        with pytest.raises(InferenceServerException, match="broken"):
            client.load_model("broken")
        with pytest.raises(InferenceServerException, match="failed to load 'nope'"):
            client.load_model("nope")
        client.load_model("net", config="{}", files={"file:2/model.onnx": file.read_bytes()})
        assert answer(server) == "2"
    assert run("unload", "net") == "net is not served any more\n"
    assert server.infer("net", ROW)[0] == 404
    assert run("load", "net") == "net is loaded\n"
    assert answer(server) == "2"
    assert "failed to load 'nope'" in run("load", "nope", code=1)


def test_a_server_that_follows_its_repository_takes_no_other_orders(start_server: StartServer, models: Path) -> None:
    server = start_server(str(models))
    run = Commands(server)
    assert run("load", "net") == "net is loaded\n"
    assert "explicit model load / unload is not allowed" in run("unload", "net", code=1)
    with (
        triton.InferenceServerClient(f"{server.host}:{server.port}") as client,
        pytest.raises(InferenceServerException, match="explicit model load / unload is not allowed"),
    ):
        client.unload_model("net")
