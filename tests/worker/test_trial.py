"""Models in processes that are thrown away: what they say, and what is said of those that do not get far."""

from __future__ import annotations

import sys
import tempfile
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper

from penstock.worker import trial
from penstock.worker.config import MAX_BATCH_SIZE, ModelConfig
from penstock.worker.costs import batch_sizes
from penstock.worker.trial import Measured, measure, optimize
from tests.system.models import dense

if TYPE_CHECKING:
    from tests.worker.conftest import Ports, Workshop

T = TensorProto
LONG_S = 60.0


def measured(path: Path, rows_max: int = 8, why_alone: str = "", seconds: float = LONG_S, **config: object) -> Measured:
    return measure(path, ModelConfig(**config), why_alone, rows_max, seconds)  # type: ignore[arg-type]


@given(st.integers(1, MAX_BATCH_SIZE))
def test_sizes_double_up_to_the_largest(rows_max: int) -> None:
    sizes = batch_sizes(rows_max)
    assert (sizes[0], sizes[-1]) == (1, rows_max)
    assert all(before < after <= 2 * before for before, after in pairwise(sizes))
    assert len(sizes) == len(set(sizes)) <= 13


# --- measuring ---


def test_each_batch_size_is_run_and_the_memory_of_the_largest_stays(workshop: Workshop) -> None:
    path = workshop.save(negation(workshop, 250_000))  # a megabyte a row
    found = measured(path, 5)
    assert [step.rows for step in found.steps] == [1, 2, 4, 5]
    assert found.cut == ""
    assert all(step.runs >= 3 and step.seconds > 0 for step in found.steps)
    assert found.steps[-1].grown_bytes >= 10_000_000  # inputs and outputs
    assert found.steps[0].grown_bytes < found.steps[-1].grown_bytes


def negation(workshop: Workshop, columns: int) -> bytes:
    port: Ports = {"x": (T.FLOAT, ["N", columns])}
    return workshop.build([helper.make_node("Neg", ["x"], ["y"])], port, {"y": (T.FLOAT, ["N", columns])})


def test_loading_is_told_apart_from_running(workshop: Workshop) -> None:
    weights = np.random.default_rng(0).standard_normal((2000, 1000)).astype(np.float32)
    content = workshop.build(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        {"x": (T.FLOAT, ["N", 2000])},
        {"y": (T.FLOAT, ["N", 1000])},
        {"w": weights},
    )
    found = measured(workshop.save(content), 1)
    assert found.loaded_bytes >= 8_000_000
    assert found.steps[0].grown_bytes < 8_000_000


def test_a_model_whose_requests_run_alone_is_measured_with_one(workshop: Workshop) -> None:
    found = measured(workshop.save(negation(workshop, 4)), 1, "it mixes rows")
    assert [step.rows for step in found.steps] == [1]


def test_dimensions_of_any_size_get_one_that_the_model_takes(workshop: Workshop) -> None:
    node = helper.make_node("Reshape", ["x", "to"], ["y"])
    content = workshop.build(
        [node], {"x": (T.FLOAT, ["N", "M"])}, {"y": (T.FLOAT, ["N", "K", 32])}, {"to": np.array([0, -1, 32])}
    )
    found = measured(workshop.save(content), 2)
    assert (found.size, len(found.steps), found.cut) == (32, 2, "")


def test_a_model_that_takes_nothing_that_is_made_up_says_so(workshop: Workshop) -> None:
    node = helper.make_node("Reshape", ["x", "to"], ["y"])
    content = workshop.build(
        [node], {"x": (T.FLOAT, ["N", "M"])}, {"y": (T.FLOAT, ["N", 17])}, {"to": np.array([0, 17])}
    )
    found = measured(workshop.save(content))
    assert found.steps == ()
    assert found.cut.startswith("it could not be run on made-up inputs (Non-zero status code")


def test_a_batch_that_fails_ends_the_measurement(workshop: Workshop) -> None:
    """It has room for three rows, and does not say so."""
    nodes = [
        helper.make_node("Shape", ["x"], ["n"], end=1),
        helper.make_node("Gather", ["t", "n"], ["one"]),
        helper.make_node("Mul", ["x", "one"], ["y"]),
    ]
    port: Ports = {"x": (T.FLOAT, ["N", 4])}
    content = workshop.build(nodes, port, {"y": (T.FLOAT, ["N", 4])}, {"t": np.ones(4, np.float32)})
    found = measured(workshop.save(content))
    assert [step.rows for step in found.steps] == [1, 2]
    assert found.cut.startswith("a batch of 4 rows cannot be run (")


def test_what_there_is_no_time_for_is_left_out(workshop: Workshop) -> None:
    found = measured(workshop.save(negation(workshop, 4)), seconds=0.0)
    assert [step.rows for step in found.steps] == [1]
    assert found.cut == "batches of 2 rows would take longer than the time there is for this"


def test_a_process_that_takes_too_long_is_ended_and_leaves_nothing(
    workshop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trial, "_START_S", 0.0)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    path = workshop.save(negation(workshop, 4))
    found = measured(path, seconds=0.001)
    assert (found.steps, found.cut) == ((), "the time was up before the first batch had run")
    assert optimize(path, 0.001).problem == "it took longer than 0 s"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("end", "how"),
    [
        ("exit 3", "failed with exit code 3"),
        ("kill -9 $$", "was ended by signal 9, as for want of memory"),
        ("kill -11 $$", "was ended by signal 11"),
    ],
)
def test_a_process_that_ends_otherwise_is_told_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: str, how: str
) -> None:
    """Here in place of Python, a shell that ends so after a first word."""
    shell = tmp_path / "python"
    shell.write_text(f"""#!/bin/sh\necho '{{"size": 8, "loaded_bytes": 1}}'\n{end}\n""")
    shell.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(shell))
    assert measured(tmp_path / "net.onnx") == Measured((), 8, 1, f"the process that tried it {how}")
    assert optimize(tmp_path / "net.onnx", LONG_S).problem == f"the process that tried it {how}"


def test_a_file_that_cannot_be_loaded_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "bad.onnx").write_bytes(b"not a model")
    found = measured(tmp_path / "bad.onnx")
    assert found.cut.startswith(f"{tmp_path}/bad.onnx cannot be loaded: ")
    assert "Protobuf parsing failed" in optimize(tmp_path / "bad.onnx", LONG_S).problem


# --- optimizing ---


def test_fused_operators_are_counted(workshop: Workshop) -> None:
    weights = {"w": np.ones((4, 4), np.float32), "b": np.ones(4, np.float32)}
    nodes = [helper.make_node("Gemm", ["x", "w", "b"], ["h"]), helper.make_node("Relu", ["h"], ["y"])]
    port: Ports = {"x": (T.FLOAT, ["N", 4])}
    path = workshop.save(workshop.build(nodes, port, {"y": (T.FLOAT, ["N", 4])}, weights))
    assert optimize(path, LONG_S) == trial.Optimized({("com.microsoft", "FusedGemm"): 1}, "")


def test_weights_beside_the_file_are_found_and_nothing_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    path = tmp_path / "dense.onnx"
    onnx.save(dense(), path, save_as_external_data=True, location="weights", size_threshold=0)
    assert optimize(path, LONG_S) == trial.Optimized({("", "MatMul"): 1}, "")
    assert measured(path, 1).cut == ""
    assert list(scratch.iterdir()) == []
    assert sorted(each.name for each in tmp_path.iterdir()) == ["dense.onnx", "scratch", "weights"]
