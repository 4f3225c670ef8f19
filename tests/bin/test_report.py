"""The report on a model: its lines, its table, and bars that stay within the terminal."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.bin.report import plot, render, table
from penstock.wire.models import ModelSpec, TensorSpec
from penstock.worker.advice import Facts
from penstock.worker.config import ModelConfig
from penstock.worker.onnxfile import OnnxFile, Port
from penstock.worker.trial import Measured, Optimized, Step

MIB = 1 << 20
STEPS = (Step(1, 2e-3, 9, 0), Step(2, 2.5e-3, 9, MIB // 2), Step(4, 4e-3, 9, 3 * MIB))
SPEC = ModelSpec(
    "net",
    "1",
    "onnxruntime_onnx",
    (TensorSpec("x", "FP32", (-1, 4, -1)), TensorSpec("t", "BYTES", (-1,))),
    (TensorSpec("y", "FP64", (-1, 2)),),
    True,
    8,
)
FILE = OnnxFile(
    9,
    "pytorch",
    {"": 17, "ai.onnx.ml": 3},
    {("", "Gemm"): 2, ("", "Relu"): 1},
    (Port("x", "tensor", "float", ("N", 4, None)), Port("t", "tensor", "string", ("N",))),
    (Port("y", "tensor", "double", ("N", 2)),),
    ("w", "b"),
    2,
    1024,
    3 * MIB,
    ("weights.bin",),
)
FACTS = Facts(
    SPEC,
    "",
    ModelConfig(),
    FILE,
    Optimized({("", "Gemm"): 1, ("com.microsoft", "FusedGemm"): 1}),
    Measured(STEPS, 8, 2 * MIB, "the time was up"),
    4,
)


def test_everything_is_told_in_its_order() -> None:
    assert list(render(FACTS, 100, True)) == [
        "  file: opset 17, ai.onnx.ml 3, IR version 9, made by pytorch; 3 nodes: 2 Gemm, 1 Relu",
        "  inputs: x FP32 [N, 4, any], t BYTES [N]",
        "  outputs: y FP64 [N, 2]",
        "  batches: rows of several requests run together, at most 8",
        "  weights: 3.0 MiB in 2 tensors, 3.0 MiB of them beside the file (weights.bin); loaded, the model",
        "    takes 2.0 MiB of memory",
        "  optimizer: of 3 nodes it makes 2",
        "    new: 1 com.microsoft.FusedGemm",
        "    gone: 1 Gemm, 1 Relu",
        "  measured here, on 1 thread, with 8 for dimensions of any size:",
        "    rows  ms/batch  µs/row  rows/s    memory",
        "       1     2.000  2000.0     500  +0.0 MiB",
        "       2     2.500  1250.0     800  +0.5 MiB",
        "       4     4.000  1000.0   1,000  +3.0 MiB",
        "  rows/s:",
        "    1 ████████████████████",
        "    2 ████████████████████████████████",
        "    4 ████████████████████████████████████████",
        "  cut short: the time was up",
        "  what to change:",
        "    - beside its rows, 'x' has dimensions of any size, and only requests of the same sizes share a",
        "      batch: have callers pad to a few sizes",
        "    - 'y' is float64, which takes twice the memory and time of float32: export it as float32 unless",
        "      the digits matter",
        "    - 't' holds strings, which are packed and copied one by one and never lie in shared memory:",
        "      numbers cost less, where callers can look them up",
    ]


def batches(config: ModelConfig, measured: Measured = FACTS.measured) -> str:
    """What is said of them, in one line."""
    [line] = [
        line for line in render(replace(FACTS, config=config, measured=measured), 500, True) if "batches: " in line
    ]
    return line.removeprefix("  batches: rows of several requests run together, at most 8")


def test_sizes_that_batches_are_padded_to_and_the_one_that_is_picked_are_told() -> None:
    """Batches of 2 take 2.5 ms here, of 4 take 4."""
    assert batches(ModelConfig(preferred_batch_sizes=(4, 8))) == ", padded to 4, 8"
    target = ModelConfig(latency_target="6.5ms")
    assert batches(target) == "; 3 for latency_target = '6.5ms', as fast as it is here and now"
    assert batches(target, Measured()) == ""


def test_a_model_whose_requests_run_alone_has_neither_table_nor_plot() -> None:
    spec = SPEC._replace(
        inputs=(TensorSpec("x", "FP32", ()),), outputs=(TensorSpec("y", "FP32", ()),), batchable=False, max_batch_size=1
    )
    file = replace(FILE, inputs=(), outputs=(), weights=0, inline_bytes=0, external_bytes=0, external_files=())
    facts = replace(FACTS, spec=spec, why_alone="input 'x' has no dimensions", file=file)
    facts = replace(facts, measured=Measured(STEPS[:1], 8, 0), optimized=Optimized({}, "it took longer than 8 s"))
    assert list(render(facts, 100, True))[1:] == [
        "  inputs: x FP32 []",
        "  outputs: y FP32 []",
        "  batches: each request runs by itself: input 'x' has no dimensions",
        "  weights: none",
        "  optimizer: what it does is not known (it took longer than 8 s)",
        "  measured here, on 1 thread: 2.000 ms a request, 500 requests/s, +0.0 MiB of memory",
        "  what to change: nothing that could be seen",
    ]


def test_a_model_that_could_not_be_run_says_why() -> None:
    lines = list(render(replace(FACTS, measured=Measured(cut="it could not be run")), 100, True))
    assert "  cut short: it could not be run" in lines
    assert not any("rows/s" in line for line in lines)


def test_many_kinds_of_operators_are_not_all_named() -> None:
    many = {("", f"Operator{number}"): 1 for number in range(100)}
    first = " ".join(line.strip() for line in render(replace(FACTS, file=replace(FILE, operators=many)), 1000, True))
    assert "100 nodes: 1 Operator0, 1 Operator1," in first
    assert first.partition("  inputs")[0].count("Operator") < 200


@pytest.mark.parametrize("columns", [20, 60, 80, 200])
def test_without_blocks_all_is_ascii(columns: int) -> None:
    lines = list(render(FACTS, columns, False))
    assert all(line.isascii() for line in lines)
    assert "us/row" in "\n".join(lines)
    assert "    4 #" in "\n".join(lines)
    assert max(map(len, lines)) <= max(columns, 60)


def test_columns_end_together() -> None:
    lines = table((Step(1, 1e-6, 3, 0), Step(4096, 12.5, 3, 5 << 30)), True)
    assert len({len(line) for line in lines}) == 1
    assert lines[2].split() == ["4096", "12500.000", "3051.8", "328", "+5120.0", "MiB"]


@given(
    st.lists(st.floats(1e-7, 100), min_size=1, max_size=13),
    st.integers(-5, 300),
    st.booleans(),
)
def test_bars_are_as_long_as_rates_and_fit(seconds: list[float], columns: int, blocks: bool) -> None:
    steps = [Step(1 << at, took, 3, 0) for at, took in enumerate(seconds)]
    lines = plot(steps, columns, blocks)
    label = len(str(steps[-1].rows))
    assert all(len(line) <= max(columns, label + 2) for line in lines)
    lengths = [len(line[label + 1 :]) for line in lines]
    by_rate = sorted(zip([step.rows_per_s for step in steps], lengths, strict=True))
    assert [length for _, length in by_rate] == sorted(lengths)
    assert by_rate[-1][1] == max(1, min(40, columns - label - 1))
