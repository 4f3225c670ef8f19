"""Workers that share weights, as real servers."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from tests.system.servers import Process, StartServer, wait_for


def write_dense(path: Path, side: int) -> Path:
    weights = np.random.default_rng(0).standard_normal((side, side), np.float32)
    ports = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", side]) for name in "xy"]
    node = helper.make_node("MatMul", ["x", "w"], ["y"])
    graph = helper.make_graph([node], "g", ports[:1], ports[1:], [numpy_helper.from_array(weights, "w")])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)
    return path


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "penstock.toml"
    path.write_text(f'[worker]\nstore = "{tmp_path}/store"\nstore_min_bytes = 100000\n')
    return path


def events(log: list[dict[str, Any]], event: str) -> list[dict[str, Any]]:
    return [line for line in log if line["event"] == event]


def test_workers_prepare_once_and_map_the_same(start_server: StartServer, config: Path, tmp_path: Path) -> None:
    model = write_dense(tmp_path / "dense.onnx", 256)
    server = start_server(str(model), "--workers=2", f"--config={config}")
    wait_for(lambda: len(events(server.log(), "model loaded")) == 2, "both workers")
    assert len(events(server.log(), "model prepared")) == 1
    loaded = events(server.log(), "model loaded")
    assert [(each["weights"], each["weights_mb"]) for each in loaded] == [("shared", 0.3)] * 2
    files = {
        line.split(maxsplit=5)[4:][0]
        for worker in server.children("worker")
        for line in Path(f"/proc/{worker}/maps").read_text().splitlines()
        if line.endswith("weights.bin")
    }
    assert len(files) == 1, "one inode"
    x = np.ones((1, 256), np.float32)
    request = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 256], "data": x.ravel().tolist()}]}
    status, answer = server.infer("dense", request)
    assert status == 200
    assert len(answer["outputs"][0]["data"]) == 256


def test_server_without_a_store_serves_and_says_what_it_costs(
    start_server: StartServer, config: Path, tmp_path: Path
) -> None:
    (tmp_path / "store").write_bytes(b"")
    server = start_server(str(write_dense(tmp_path / "dense.onnx", 256)), f"--config={config}")
    [said] = events(server.log(), "weights are not shared")
    assert (said["level"], said["model"], said["reason"]) == ("warning", "dense", f"{tmp_path}/store is no directory")
    assert said["cost"] == "each worker holds its own copy of 0.26 MB of weights"
    [loaded] = events(server.log(), "model loaded")
    assert loaded["weights"] == "private"


def test_server_that_is_stopped_while_it_prepares_stops(config: Path, tmp_path: Path) -> None:
    model = write_dense(tmp_path / "dense.onnx", 2048)
    server = Process(["up", str(model), "--http=127.0.0.1:0", f"--runtime-dir={tmp_path}/run", f"--config={config}"])
    child = wait_for(lambda: preparing(str(model)), "a process that prepares")
    os.kill(child, signal.SIGSTOP)  # it will not end by itself
    server.end()
    wait_for(lambda: not preparing(str(model)), "the end of what it started")


def preparing(model: str) -> int:
    """The process that prepares a model and will end with who asked for it, or 0."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                command = (entry / "cmdline").read_bytes().decode("utf-8", "replace")
                mine = "penstock.worker.prepare" in command and model in command
                if mine and (entry / "oom_score_adj").read_text() == "1000\n":
                    return int(entry.name)
            except OSError:
                continue
    return 0
