"""Several versions of a model at once."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import tritonclient.http as triton

from tests.system.models import dense, write
from tests.system.servers import StartServer

ROW = np.array([[1.0, 2.0, 3.0, 4.0]], np.float32)
ONE_ROW = {"inputs": [{"name": "x", "shape": [1, 4], "datatype": "FP32", "data": ROW.ravel().tolist()}]}


def expected(seed: int) -> np.ndarray:
    return ROW @ np.random.default_rng(seed).standard_normal((4, 3)).astype(np.float32)


def test_versions_are_served_beside_each_other(start_server: StartServer, tmp_path: Path) -> None:
    models = tmp_path / "models"
    for version in (1, 2, 3):
        write(models, "net", dense(version), str(version))
    (models / "net" / "model.toml").write_text("version_policy = {latest = 2}\n")
    server = start_server(str(models))
    for asked, version in (("net", 3), ("net/versions/3", 3), ("net/versions/2", 2)):
        status, answer = server.infer(asked, ONE_ROW)
        assert (status, answer["model_version"]) == (200, str(version))
        np.testing.assert_allclose(answer["outputs"][0]["data"], expected(version).ravel(), rtol=1e-5)
    assert server.infer("net/versions/1", ONE_ROW)[0] == 404
    assert json.loads(server.request("GET", "/v2/models/net")[2])["versions"] == ["2", "3"]


def test_what_is_wrong_with_one_version_is_said_and_the_others_serve(start_server: StartServer, tmp_path: Path) -> None:
    models = tmp_path / "models"
    write(models, "net", dense(1), "1")
    write(models, "net", dense(2), "latest")
    write(models, "net", dense(3), "3").write_bytes(b"not a model")
    (models / "net" / "model.toml").write_text("version_policy = [1, 3, 7]\n")
    server = start_server(str(models))
    assert server.request("GET", "/v2/health/ready")[0] == 200
    status, answer = server.infer("net", ONE_ROW)
    assert (status, answer["model_version"]) == (200, "1")
    command = [sys.executable, "-m", "penstock.bin", "models", f"--runtime-dir={server.runtime}"]
    lines = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout.splitlines()[1:]
    assert [line.split()[:3] for line in lines] == [
        ["net", "1", "READY"],
        ["net", "3", "UNAVAILABLE"],
        ["net", "7", "UNAVAILABLE"],
        ["net", "latest", "UNAVAILABLE"],
    ]
    for line, words in zip(lines[1:], ("cannot be loaded", "does not exist", "is no version"), strict=True):
        assert words in line


RANKS = """
# As Triton has it: no model.toml, the names of files its own.
name: "ranks"
platform: "onnxruntime_onnx"
default_model_filename: "net.onnx"
max_batch_size: 16
input [ { name: "x" data_type: TYPE_FP32 dims: [ 4 ] } ]
output [ { name: "y" data_type: TYPE_FP32 dims: [ 3 ] } ]
version_policy: { specific: { versions: [ 1, 3 ] } }
dynamic_batching { max_queue_delay_microseconds: 100 }
instance_group [ { count: 2 kind: KIND_CPU } ]
response_cache { enable: true }
"""
WHOLE = """
backend: "onnxruntime"
max_batch_size: 0
input [ { name: "x", data_type: TYPE_FP32, dims: [ -1, 4 ] } ]
output [ { name: "y", data_type: TYPE_FP32, dims: [ -1, 3 ] } ]
"""


def test_a_repository_of_triton_serves_unchanged(start_server: StartServer, tmp_path: Path) -> None:
    models = tmp_path / "models"
    for version in (1, 2, 3):
        (models / "ranks" / str(version)).mkdir(parents=True)
        onnx.save(dense(version), models / "ranks" / str(version) / "net.onnx")
    (models / "ranks" / "config.pbtxt").write_text(RANKS)
    write(models, "whole", dense(7))
    (models / "whole" / "config.pbtxt").write_text(WHOLE)
    server = start_server(str(models))
    rows = np.repeat(ROW, 40, axis=0)  # more than are batched, which is nobody's business where requests run alone
    with triton.InferenceServerClient(f"{server.host}:{server.port}") as client:
        assert client.is_server_ready()
        assert client.get_model_metadata("ranks")["versions"] == ["1", "3"]
        for name, asked, given, seed in (
            ("ranks", "", ROW, 3),
            ("ranks", "3", ROW, 3),
            ("ranks", "1", ROW, 1),
            ("whole", "", rows, 7),
        ):
            tensor = triton.InferInput("x", list(given.shape), "FP32").set_data_from_numpy(given)
            answer = client.infer(name, [tensor], model_version=asked).as_numpy("y")
            np.testing.assert_allclose(answer, np.repeat(expected(seed), len(given), axis=0), rtol=1e-5)
        assert not client.is_model_ready("ranks", "2")
