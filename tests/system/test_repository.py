"""A repository that changes while it serves."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx

from tests.system.models import dense, write
from tests.system.servers import Server, StartServer, wait_for

ROW = np.array([[1.0, 2.0, 3.0, 4.0]], np.float32)
ONE_ROW = {"inputs": [{"name": "x", "shape": [1, 4], "datatype": "FP32", "data": ROW.ravel().tolist()}]}


def answers(server: Server, asked: str, version: int) -> bool:
    """Whether a request is answered by this version."""
    status, answer = server.infer(asked, ONE_ROW)
    if status != 200 or answer["model_version"] != str(version):
        return False
    expected = ROW @ np.random.default_rng(version).standard_normal((4, 3)).astype(np.float32)
    np.testing.assert_allclose(answer["outputs"][0]["data"], expected.ravel(), rtol=1e-5)
    return True


def versions(server: Server, name: str) -> list[str]:
    status, _, body = server.request("GET", f"/v2/models/{name}")
    found: list[str] = json.loads(body)["versions"] if status == 200 else []
    return found


def listed(server: Server) -> str:
    """What ``penstock models`` says."""
    command = [sys.executable, "-m", "penstock.bin", "models", f"--runtime-dir={server.runtime}"]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout


def test_a_version_that_is_renamed_into_place_is_served_and_the_old_one_goes(
    start_server: StartServer, tmp_path: Path
) -> None:
    models = tmp_path / "models"
    write(models, "net", dense(1), "1")
    server = start_server(str(models))
    assert answers(server, "net", 1)
    write(tmp_path / "aside", "net", dense(2), "2")
    (tmp_path / "aside" / "net" / "2").rename(models / "net" / "2")
    wait_for(lambda: answers(server, "net", 2), "version 2")
    wait_for(lambda: versions(server, "net") == ["2"], "the end of others")
    assert server.infer("net/versions/1", ONE_ROW)[0] == 404


def test_a_version_that_cannot_be_loaded_leaves_the_old_one_serving(start_server: StartServer, tmp_path: Path) -> None:
    models = tmp_path / "models"
    write(models, "net", dense(1), "1")
    server = start_server(str(models))
    (models / "net" / "2").mkdir()
    (models / "net" / "2" / "model.onnx").write_bytes(b"not a model")
    wait_for(lambda: "cannot be loaded" in listed(server), "a sentence")
    assert answers(server, "net", 1)
    onnx.save(dense(2), models / "net" / "2" / "model.onnx")
    wait_for(lambda: answers(server, "net", 2), "version 2")


def test_models_come_and_go(start_server: StartServer, tmp_path: Path) -> None:
    models = tmp_path / "models"
    write(models, "one", dense(1), "1")
    server = start_server(str(models))
    write(models, "two", dense(2), "2")
    wait_for(lambda: answers(server, "two", 2), "another model")
    shutil.rmtree(models / "one")
    wait_for(lambda: server.infer("one", ONE_ROW)[0] == 404, "the end of a model")
    assert answers(server, "two", 2)
    shutil.rmtree(models / "two")  # the last: the repository may just not be there
    shutil.rmtree(models)
    write(models, "three", dense(3), "3")
    wait_for(lambda: answers(server, "three", 3), "a repository that is there again")


def test_a_configuration_that_changes_is_followed_and_half_of_one_is_not(
    start_server: StartServer, tmp_path: Path
) -> None:
    models = tmp_path / "models"
    for version in (1, 2, 3):
        write(models, "net", dense(version), str(version))
    server = start_server(str(models))
    assert versions(server, "net") == ["3"]
    (models / "net" / "model.toml").write_text('version_policy = "all"\n')
    wait_for(lambda: versions(server, "net") == ["1", "2", "3"], "all versions")
    assert answers(server, "net/versions/2", 2)
    (models / "net" / "model.toml").write_text("version_policy = [2]\n")
    wait_for(lambda: answers(server, "net", 2), "version 2")
    wait_for(lambda: versions(server, "net") == ["2"], "the end of others")
