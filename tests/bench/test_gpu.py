"""The benchmark of a GPU runs on the CPU, too, and its networks are what they claim."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

from bench import gpu, models, networks
from bench.gpu import bare, plot, tell


@pytest.mark.parametrize(("name", "weights"), [("resnet50", 25.5e6), ("bert-base", 109e6)])
def test_networks_have_the_size_that_they_are_named_after(name: str, weights: float) -> None:
    content = networks.build(name, "FP16")
    count = sum(int(np.prod(each.dims)) for each in onnx.load_from_string(content).graph.initializer)
    assert count == pytest.approx(weights, rel=0.03)


def test_a_residual_network_costs_what_it_should() -> None:
    assert models.multiply_adds(networks.build("resnet50", "FP32")) == pytest.approx(4.1e9, rel=0.02)


def test_rows_do_not_depend_on_their_neighbours() -> None:
    session = onnxruntime.InferenceSession(networks.build("resnet50", "FP16"), providers=["CPUExecutionProvider"])
    inputs = networks.sample("resnet50", "FP16", 2)
    [together] = session.run(None, inputs)
    [alone] = session.run(None, {"x": inputs["x"][1:]})
    assert together.dtype == np.float16
    assert np.abs(together[1:] - alone).max() <= 1e-2 * np.abs(alone).max()
    assert 0.1 < np.abs(together).mean() < 10


def test_the_bare_loop_counts_rows(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(networks.build("resnet50", "FP32"))
    rates = bare(path, "resnet50", "FP32", "cpu", 1, 0.1)
    assert rates.keys() == {"run", "bound"}
    assert all(0.1 < rate < 10_000 for rate in rates.values())


def test_figures_are_told_and_drawn() -> None:
    load = {"requests_per_s": 90.0, "errors": {"x": 2}, "gpu_utilization": 0.95, "gpu_memory_bytes": 1e9}
    found = {
        "network": "resnet50",
        "type": "FP16",
        "bare": {32: {"run": 100.0, "bound": 200.0}},
        "limits": {32: load},
        "difference": 2e-4,
        "host_mb": 300.0,
        **dict.fromkeys(("http", "client", "one instance", "little room", "one killed"), load),
    }
    row = tell([json.loads(json.dumps(found), object_hook=_numbers)], 32).splitlines()[-1]
    assert "| 100 | 200 | 90 | **90%** | 90 | **90%** | 95% | 90 | 2.0e-04 | 300 | 1000 | 90, 2 | 2 |" in row
    assert plot([found]).startswith("<svg")


def _numbers(found: dict[str, object]) -> dict[object, object]:
    return {int(key) if key.isdecimal() else key: value for key, value in found.items()}


def test_a_device_that_is_not_there_is_told() -> None:
    command = [sys.executable, gpu.__file__, "--device", "cuda:77", "--networks", "resnet50", "--types", "FP32"]
    ended = subprocess.run([*command, "--seconds", "0.1"], capture_output=True, text=True, check=False, timeout=100)
    assert ended.returncode != 0
    assert "the bare loop ended with" in ended.stderr
