"""What is said of a model's facts: each rule where it applies, where it does not, and what must be in the sentence."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from penstock.wire.models import ModelSpec, TensorSpec
from penstock.worker.advice import Facts, advise, amount, changes, operators
from penstock.worker.config import MAX_BATCH_SIZE, ModelConfig
from penstock.worker.onnxfile import OnnxFile, Port
from penstock.worker.trial import Measured, Operators, Optimized, Step

MIB = 1 << 20
SPEC = ModelSpec(
    "m",
    "1",
    "onnxruntime_onnx",
    (TensorSpec("x", "FP32", (-1, 4)),),
    (TensorSpec("y", "FP32", (-1, 2)),),
    True,
    8,
)
X, Y, W = (Port(name, "tensor", "float", shape) for name, shape in (("x", ("N", 4)), ("y", ("N", 2)), ("w", (4, 2))))
FILE = OnnxFile(9, "", {"": 17}, {("", "MatMul"): 1}, (X,), (Y,), ("w",), 1, 32, 0, ())


def steps(**seconds: float) -> Measured:
    """``_1=0.5``: a batch of one takes half a second."""
    return Measured(tuple(Step(int(rows[1:]), took, 10, 0) for rows, took in seconds.items()))


# A row costs as much in any batch as it costs alone would be advised about: here larger batches are worth it.
GOOD = Facts(
    SPEC, "", ModelConfig(), FILE, Optimized({("", "MatMul"): 1}), steps(_1=4e-3, _2=5e-3, _4=7e-3, _8=13e-3), 4
)


def only(facts: Facts) -> str:
    [sentence] = advise(facts)
    return sentence


def with_spec(**changed: Any) -> Facts:
    return replace(GOOD, spec=SPEC._replace(**changed))


def test_nothing_is_said_of_what_is_good() -> None:
    assert advise(GOOD) == []


# --- batches ---


def test_a_fixed_first_dimension_is_to_be_symbolic() -> None:
    spec = SPEC._replace(inputs=(TensorSpec("x", "FP32", (1, 4)),), batchable=False, max_batch_size=1)
    said = only(replace(GOOD, spec=spec, why_alone="whatever"))
    assert said.startswith("the first dimension of input 'x' is fixed at 1, so every request runs by itself.")
    assert "dynamic_shapes" in said
    assert "dynamic_axes={'x': {0: 'N'}}" in said


@pytest.mark.parametrize("inputs", [(), (TensorSpec("x", "FP32", ()),)])
def test_a_fixed_dimension_is_no_matter_where_requests_run_alone_anyway(inputs: tuple[TensorSpec, ...]) -> None:
    outputs = (TensorSpec("y", "FP32", (2,)),)
    assert advise(with_spec(inputs=inputs, outputs=outputs, batchable=False, max_batch_size=1)) == []


def test_rows_that_mix_are_told_with_what_mixes_them() -> None:
    spec = SPEC._replace(batchable=False, max_batch_size=1)
    why = "output 'y' of a row changes with the rows beside it"
    said = only(replace(GOOD, spec=spec, why_alone=why))
    assert said.startswith(f"{why}, so every request runs by itself.")
    assert "softmax" in said
    assert advise(replace(GOOD, spec=spec, why_alone="output 'y' has no dimensions")) == []


def test_sizes_beside_the_rows_divide_batches() -> None:
    inputs = (TensorSpec("a", "FP32", (-1, 4)), TensorSpec("b", "FP32", (-1, -1)))
    assert only(with_spec(inputs=inputs)).startswith("beside its rows, 'b' has dimensions of any size")
    assert advise(with_spec(inputs=inputs, batchable=False, max_batch_size=1)) == []


def test_throughput_that_no_longer_grows_is_a_limit() -> None:
    said = only(replace(GOOD, measured=steps(_1=4e-3, _2=5e-3, _4=10e-3, _8=20e-3)))
    assert said.startswith("rows/s do not grow beyond batches of 2, ")
    assert said.endswith("max_batch_size = 2 in model.toml")


def test_what_a_batch_costs_beside_the_model_makes_larger_ones_worth_it() -> None:
    """The same time for each row: that of handing over a batch counts where it is short."""
    assert advise(replace(GOOD, measured=steps(_1=1e-4, _2=2e-4, _4=4e-4, _8=8e-4))) == []
    said = only(replace(GOOD, measured=steps(_1=1e-2, _2=2e-2, _4=4e-2, _8=8e-2)))
    assert said.endswith("max_batch_size = 1 in model.toml")


def test_rows_that_take_longer_in_large_batches_are_a_limit() -> None:
    said = only(replace(GOOD, measured=steps(_1=4e-3, _2=5e-3, _4=11e-3, _8=30e-3)))
    assert said == "a row takes 1.5 times as long in batches of 8 as of 2: max_batch_size = 2 in model.toml"


def test_size_that_is_picked_or_that_the_engine_wants_is_not_advised_against() -> None:
    measured = steps(_1=4e-3, _2=5e-3, _4=11e-3, _8=30e-3)
    for config in (ModelConfig(latency_target="50ms"), ModelConfig(preferred_batch_sizes=(8,))):
        assert advise(replace(GOOD, config=config, measured=measured)) == []


def test_target_that_a_row_alone_misses_is_told() -> None:
    facts = replace(GOOD, config=ModelConfig(latency_target="7ms"), measured=steps(_1=4e-3, _2=5e-3))
    assert only(facts).startswith("latency_target = '7ms' cannot be kept: a batch of 1 row takes 4 ms, and a request")
    assert advise(replace(facts, config=ModelConfig(latency_target="8ms"))) == []
    assert advise(replace(facts, measured=Measured())) == []


def test_throughput_that_still_grows_is_a_reason_to_try_more() -> None:
    growing = steps(_1=4e-3, _2=4e-3, _4=4e-3, _8=4e-3)
    said = only(replace(GOOD, measured=growing))
    assert said.startswith("rows/s still grow at batches of 8, which is as many as may run together")
    assert said.endswith("try max_batch_size = 16 in model.toml")
    # Batches of 8 were not the largest: the time was up.
    assert advise(replace(GOOD, spec=SPEC._replace(max_batch_size=64), measured=growing)) == []


def test_no_more_rows_are_advised_than_are_allowed() -> None:
    for rows, advised in ((MAX_BATCH_SIZE, []), (MAX_BATCH_SIZE - 1, [MAX_BATCH_SIZE])):
        measured = Measured((Step(1, 1.0, 3, 0), Step(rows, 1.0, 3, 0)))
        said = advise(replace(GOOD, spec=SPEC._replace(max_batch_size=rows), measured=measured))
        assert [int(sentence.split("max_batch_size = ")[1].split()[0]) for sentence in said] == advised


def test_a_model_of_microseconds_is_not_worth_larger_batches() -> None:
    assert advise(replace(GOOD, measured=steps(_1=6e-6, _2=6e-6, _4=6e-6, _8=6e-6))) == []


@pytest.mark.parametrize("measured", [Measured(), steps(_1=1.0)])
def test_one_measurement_or_none_says_nothing_of_batches(measured: Measured) -> None:
    assert advise(replace(GOOD, measured=measured)) == []


# --- tensors and graph ---


def test_float64_and_strings_are_named() -> None:
    said = only(with_spec(outputs=(TensorSpec("y", "FP64", (-1, 2)), TensorSpec("z", "FP32", (-1,)))))
    assert said.startswith("'y' is float64, ")
    said = only(with_spec(inputs=(TensorSpec("t", "BYTES", (-1,)),)))
    assert said.startswith("'t' holds strings, ")


def test_many_names_are_counted() -> None:
    outputs = tuple(TensorSpec(f"y{at}", "FP64", (-1, 2)) for at in range(10))
    assert only(with_spec(outputs=outputs)).startswith("'y0', 'y1', 'y2', 'y3' and 6 more is float64, ")


def optimized(**counts: int) -> Facts:
    return replace(GOOD, optimized=Optimized({("", kind): count for kind, count in counts.items()}))


def test_a_graph_that_mostly_moves_data_is_told() -> None:
    said = only(optimized(MatMul=7, Reshape=4, Transpose=2))
    assert said.startswith(
        "6 of 13 nodes only move or convert data once the optimizer is done (4 Reshape, 2 Transpose)"
    )
    assert advise(optimized(MatMul=20, Reshape=4, Transpose=2)) == []
    assert advise(optimized(MatMul=1, Reshape=4)) == []
    assert advise(replace(GOOD, optimized=Optimized({}, "it failed"))) == []


@pytest.mark.parametrize(("opset", "old"), [(9, True), (12, True), (13, False), (21, False)])
def test_an_old_opset_is_told(opset: int, old: bool) -> None:
    said = advise(replace(GOOD, file=replace(FILE, opsets={"": opset, "ai.onnx.ml": 1})))
    assert [sentence.startswith(f"opset {opset} is old") for sentence in said] == [True] * old


def test_a_model_of_another_domain_alone_has_no_old_opset() -> None:
    assert advise(replace(GOOD, file=replace(FILE, opsets={"ai.onnx.ml": 1}))) == []


def test_weights_that_callers_could_give_are_told_where_that_binds_the_optimizer() -> None:
    said = only(replace(GOOD, file=replace(FILE, inputs=(X, W))))
    assert said.startswith("'w': weights that are listed as inputs as well")
    assert advise(replace(GOOD, file=replace(FILE, inputs=(X, W), ir_version=3))) == []


# --- memory and threads ---


def test_large_weights_are_better_prepared_before_the_first_start() -> None:
    said = only(replace(GOOD, file=replace(FILE, external_bytes=256 * MIB)))
    assert said.startswith("it has 256.0 MiB of weights, which workers share")
    assert advise(replace(GOOD, file=replace(FILE, external_bytes=255 * MIB))) == []


def test_a_file_that_comes_near_its_limit_is_told() -> None:
    _, said = advise(replace(GOOD, file=replace(FILE, inline_bytes=1024 * MIB)))
    assert said.startswith("1.0 GiB of weights are in the file itself")


def test_more_threads_than_cores_are_told() -> None:
    config = ModelConfig(intra_op_threads=2, instances=2)
    assert advise(replace(GOOD, config=config)) == []
    said = only(replace(GOOD, config=config, cores=3))
    assert said.startswith("2 instances of 2 threads each are more than the 3 cores there are")


# --- words ---


def test_what_the_optimizer_did_is_told_in_kinds_of_operators() -> None:
    before: Operators = {("", "Gemm"): 3, ("", "Relu"): 2, ("", "Softmax"): 1}
    after: Operators = {("", "Gemm"): 1, ("com.microsoft", "FusedGemm"): 2, ("", "Softmax"): 1}
    assert changes(before, after) == ["of 6 nodes it makes 4", "new: 2 com.microsoft.FusedGemm", "gone: 2 Gemm, 2 Relu"]
    assert changes({("", "Relu"): 1}, {("", "Relu"): 1}) == ["of 1 node it makes 1"]
    assert changes({("", "Identity"): 1}, {}) == ["of 1 node it makes 0", "gone: 1 Identity"]


def test_operators_are_told_the_most_frequent_first() -> None:
    assert operators({("", "Add"): 1, ("x", "Y"): 3, ("", "B"): 1}) == "3 x.Y, 1 Add, 1 B"


@pytest.mark.parametrize(
    ("nbytes", "said"),
    [(0, "0 bytes"), (1023, "1023 bytes"), (1024, "1.0 KiB"), (MIB, "1.0 MiB"), (3 << 29, "1.5 GiB")],
)
def test_amounts(nbytes: int, said: str) -> None:
    assert amount(nbytes) == said
