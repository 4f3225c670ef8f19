"""Models in ONNX Runtime: what they take and give, and what is said of files that cannot be served."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from penstock.wire.messages import MAX_NAME
from penstock.wire.models import MAX_TENSORS, TensorSpec
from penstock.wire.tensors import DTYPES, Array, from_bf16, to_bf16
from penstock.worker.config import DEFAULT_BATCH_SIZE, ModelConfig
from penstock.worker.model import RUN_ERRORS, LoadError, Model, brief, load

if TYPE_CHECKING:
    from tests.worker.conftest import Workshop

T = TensorProto
KINDS = {
    "BOOL": T.BOOL,
    "UINT8": T.UINT8,
    "UINT16": T.UINT16,
    "UINT32": T.UINT32,
    "UINT64": T.UINT64,
    "INT8": T.INT8,
    "INT16": T.INT16,
    "INT32": T.INT32,
    "INT64": T.INT64,
    "FP16": T.FLOAT16,
    "BF16": T.BFLOAT16,
    "FP32": T.FLOAT,
    "FP64": T.DOUBLE,
    "BYTES": T.STRING,
}


def complaint(path: Path) -> str:
    """Why a file cannot be served: one line that begins with its name."""
    with pytest.raises(LoadError) as raised:
        load(path, "m", "1", ModelConfig())
    text = str(raised.value)
    assert text.startswith(f"{path} cannot be ")
    assert "\n" not in text
    assert "[ONNXRuntimeError]" not in text
    assert "onnxruntime_src" not in text
    return text.removeprefix(f"{path} cannot be ")


# --- datatypes ---


def test_every_datatype_of_the_protocol_is_tried_here() -> None:
    assert KINDS.keys() == DTYPES.keys()


@pytest.mark.parametrize("datatype", KINDS)
def test_datatype_is_known_both_ways(workshop: Workshop, datatype: str) -> None:
    model = workshop.unary("Identity", KINDS[datatype], ["N", 2])
    assert model.spec.inputs == (TensorSpec("x", datatype, (-1, 2)),)
    assert model.spec.outputs == (TensorSpec("y", datatype, (-1, 2)),)


@pytest.mark.parametrize("datatype", KINDS)
def test_values_of_every_datatype_pass_through(workshop: Workshop, datatype: str) -> None:
    model = workshop.unary("Identity", KINDS[datatype], ["N", 2])
    x = np.array([[0, 1], [1, 1]]).astype(DTYPES[datatype])
    if datatype == "BYTES":
        x = np.array([["", "ü"], ["a\0b", "c"]], dtype=object)
    [y] = model.run([x])
    assert (y.dtype, y.shape) == (x.dtype, x.shape)
    np.testing.assert_array_equal(y, x)


def test_bfloat16_is_computed_with_and_not_only_passed_on(workshop: Workshop) -> None:
    model = workshop.make(
        [helper.make_node("Cast", ["x"], ["f"], to=T.FLOAT), helper.make_node("Cast", ["f"], ["y"], to=T.BFLOAT16)],
        {"x": (T.BFLOAT16, ["N"])},
        {"f": (T.FLOAT, ["N"]), "y": (T.BFLOAT16, ["N"])},
    )
    values = np.array([1.5, -2.25, np.inf], np.float32)
    f, y = model.run([to_bf16(values)])
    np.testing.assert_array_equal(f, values)
    np.testing.assert_array_equal(from_bf16(y), values)


def test_bfloat16_from_read_only_memory_and_without_elements(workshop: Workshop) -> None:
    model = workshop.unary("Identity", T.BFLOAT16, ["N", "M"])
    shared = np.frombuffer(bytes(range(12)), "<u2").reshape(2, 3)
    np.testing.assert_array_equal(model.run([shared])[0], shared)
    for shape in (2, 0), (0, 3):
        assert model.run([np.empty(shape, "<u2")])[0].shape == shape


def test_several_inputs_are_given_in_the_order_of_the_spec(pair: Model) -> None:
    assert [tensor.name for tensor in pair.spec.inputs] == ["a", "b"]
    s, t = pair.run([np.ones((2, 3), np.float32), np.array([4, 5])])
    assert (s.tolist(), t.tolist()) == ([[2.0] * 3] * 2, [8, 10])


# --- what is not a tensor that the protocol knows ---


def sequences() -> bytes:
    x = helper.make_tensor_value_info("x", T.FLOAT, ["N", 2])
    y = helper.make_value_info("y", helper.make_sequence_type_proto(helper.make_tensor_type_proto(T.FLOAT, None)))
    graph = helper.make_graph([helper.make_node("SequenceConstruct", ["x"], ["y"])], "g", [x], [y])
    content: bytes = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9
    ).SerializeToString()
    return content


def maps() -> bytes:
    """Class probabilities as scikit-learn's converter leaves them."""
    kind = helper.make_sequence_type_proto(helper.make_map_type_proto(T.INT64, helper.make_tensor_type_proto(1, [])))
    node = helper.make_node("ZipMap", ["x"], ["y"], domain="ai.onnx.ml", classlabels_int64s=[0, 1])
    x = helper.make_tensor_value_info("x", T.FLOAT, ["N", 2])
    graph = helper.make_graph([node], "g", [x], [helper.make_value_info("y", kind)])
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("ai.onnx.ml", 1)]
    content: bytes = helper.make_model(graph, opset_imports=opsets, ir_version=9).SerializeToString()
    return content


def test_sequences_are_refused(workshop: Workshop) -> None:
    text = complaint(workshop.save(sequences()))
    assert text == ("served: output 'y' is of type seq(tensor(float)), which the v2 protocol has no datatype for")


def test_maps_are_refused_with_the_way_out(workshop: Workshop) -> None:
    text = complaint(workshop.save(maps()))
    assert text.startswith("served: output 'y' is of type seq(map(int64,tensor(float)))")
    assert text.endswith("; export it without ZipMap (options={'zipmap': False})")


def test_tensor_of_another_type_is_refused(workshop: Workshop) -> None:
    node = helper.make_node("Cast", ["x"], ["y"], to=T.FLOAT)
    x = helper.make_tensor_value_info("x", T.FLOAT8E4M3FN, ["N"])
    graph = helper.make_graph([node], "g", [x], [helper.make_tensor_value_info("y", T.FLOAT, ["N"])])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9)
    assert "input 'x' is of type tensor(float8e4m3fn)" in complaint(workshop.save(model.SerializeToString()))


def test_bfloat16_beside_strings_is_refused(workshop: Workshop) -> None:
    nodes = [helper.make_node("Identity", [name], [name + name]) for name in "xs"]
    content = workshop.build(
        nodes,
        {"x": (T.BFLOAT16, ["N"]), "s": (T.STRING, ["N"])},
        {"xx": (T.BFLOAT16, ["N"]), "ss": (T.STRING, ["N"])},
    )
    assert "both bfloat16 and string tensors" in complaint(workshop.save(content))


# --- files that are no models ---


@pytest.mark.parametrize("content", [b"garbage" * 100, b"", b"\x08\x09", b"\x00" * 1000])
def test_file_that_is_no_model_is_refused(workshop: Workshop, content: bytes) -> None:
    assert complaint(workshop.save(content)).startswith("loaded: ")


def test_half_a_model_is_refused(workshop: Workshop) -> None:
    content = workshop.build([helper.make_node("Neg", ["x"], ["y"])], {"x": (1, ["N"])}, {"y": (1, ["N"])})
    assert "Protobuf parsing failed" in complaint(workshop.save(content[: len(content) // 2]))


def test_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    assert "File doesn't exist" in complaint(tmp_path / "nope.onnx")


def test_missing_operator_is_named(workshop: Workshop) -> None:
    node = helper.make_node("Frobnicate", ["x"], ["y"], domain="com.example")
    content = workshop.build([node], {"x": (1, ["N"])}, {"y": (1, ["N"])}, domain="com.example")
    assert complaint(workshop.save(content)) == (
        "loaded: Fatal error: com.example:Frobnicate(-1) is not a registered function/op"
    )


def test_missing_operator_whose_name_is_not_utf8_leaves_what_can_be_read(workshop: Workshop) -> None:
    node = helper.make_node("Frobnicate", ["x"], ["y"], domain="com.example")
    content = workshop.build([node], {"x": (1, ["N"])}, {"y": (1, ["N"])}, domain="com.example")
    said = complaint(workshop.save(content.replace(b"Frob", b"\xff\xfe\xff\xfe")))
    assert said in (
        "loaded: Fail",
        f"loaded: Fatal error: com.example:{chr(0xFFFD) * 4}nicate(-1) is not a registered function/op",
    )


def test_graph_whose_types_do_not_fit_is_refused(workshop: Workshop) -> None:
    content = workshop.build([helper.make_node("Relu", ["x"], ["y"])], {"x": (T.STRING, ["N"])}, {"y": (1, ["N"])})
    assert "tensor(string)" in complaint(workshop.save(content))


def test_operator_set_of_the_future_is_refused_without_source_lines(workshop: Workshop) -> None:
    proto = onnx.load_from_string(workshop.build([], {"x": (1, ["N"])}, {"x": (1, ["N"])}))
    proto.opset_import[0].version = 999
    assert complaint(workshop.save(proto.SerializeToString())).startswith("loaded: ONNX Runtime only *guarantees*")


def test_weights_that_lie_elsewhere_and_are_missing_are_named(workshop: Workshop) -> None:
    weights = helper.make_tensor("w", T.FLOAT, [4], np.ones(4, np.float32).tobytes(), raw=True)
    weights.data_location = T.EXTERNAL
    weights.ClearField("raw_data")
    for key, value in {"location": "weights.bin", "offset": "0", "length": "16"}.items():
        weights.external_data.add(key=key, value=value)
    content = workshop.build(
        [helper.make_node("Add", ["x", "w"], ["y"])], {"x": (1, ["N", 4])}, {"y": (1, ["N", 4])}, {"w": weights}
    )
    assert "weights.bin" in complaint(workshop.save(content))


def test_path_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    path = tmp_path / os.fsdecode(b"\xff") / "model.onnx"
    assert complaint(path) == "loaded: ONNX Runtime opens no path that is not UTF-8; rename it"


def test_tensor_whose_name_is_not_utf8_is_refused(workshop: Workshop) -> None:
    content = workshop.build([helper.make_node("Neg", ["xx"], ["y"])], {"xx": (1, ["N"])}, {"y": (1, ["N"])})
    assert complaint(workshop.save(content.replace(b"xx", b"\xff\xfe"))) == (
        "served: it has a tensor whose name is not UTF-8"
    )


def test_tensor_whose_name_no_message_takes_is_refused(workshop: Workshop) -> None:
    fits, name = "x" * MAX_NAME, "x" * (MAX_NAME + 1)
    ports = {"y": (1, ["N"])}
    workshop.make([helper.make_node("Neg", [fits], ["y"])], {fits: (1, ["N"])}, ports)
    content = workshop.build([helper.make_node("Neg", [name], ["y"])], {name: (1, ["N"])}, ports)
    assert f"'{'x' * 40}...'" in complaint(workshop.save(content))


def test_more_tensors_than_a_message_takes_are_refused(workshop: Workshop) -> None:
    nodes = [helper.make_node("Identity", ["x"], [f"y{at}"]) for at in range(MAX_TENSORS + 1)]
    outputs = {f"y{at}": (1, ["N"]) for at in range(MAX_TENSORS + 1)}
    text = complaint(workshop.save(workshop.build(nodes, {"x": (1, ["N"])}, outputs)))
    assert text == f"served: it has 1 inputs and {MAX_TENSORS + 1} outputs; {MAX_TENSORS} are allowed"


# --- shapes and batches ---


@pytest.mark.parametrize(
    ("x", "y", "reason"),
    [
        (["N", 2], ["N", 2], ""),
        (["N"], ["N"], ""),
        ([None, 2], ["N", 2], ""),
        (["a", "b"], ["c", "d"], ""),
        ([2, 2], ["N", 2], "the first dimension of input 'x' is fixed at 2"),
        (["N", 2], [1, 2], "the first dimension of output 'y' is fixed at 1"),
        ([], [], "input 'x' has no dimensions"),
    ],
)
def test_first_dimensions_without_a_size_make_a_model_batchable(
    workshop: Workshop, x: Sequence[int | str | None], y: Sequence[int | str | None], reason: str
) -> None:
    model = workshop.make([helper.make_node("Neg", ["x"], ["y"])], {"x": (1, x)}, {"y": (1, y)}, max_batch_size=4)
    assert (model.why_alone, model.spec.batchable) == (reason, not reason)
    assert model.spec.max_batch_size == (1 if reason else 4)


def test_model_without_inputs_runs_alone(workshop: Workshop) -> None:
    node = helper.make_node("Identity", ["c"], ["y"])
    model = workshop.make([node], {}, {"y": (1, [2])}, {"c": np.array([1, 2], np.float32)})
    assert (model.spec.inputs, model.why_alone) == ((), "it has no inputs")
    assert model.run([])[0].tolist() == [1, 2]


def test_output_of_unknown_rank_makes_a_model_run_alone(workshop: Workshop) -> None:
    node = helper.make_node("ConstantOfShape", ["s"], ["y"])
    model = workshop.make([node], {"s": (T.INT64, ["N"])}, {"y": (1, None)})
    assert model.why_alone == "output 'y' has no dimensions"


def test_symbolic_and_unknown_dimensions_are_any_size_to_callers(workshop: Workshop) -> None:
    model = workshop.unary("Neg", 1, ["N", "width", None, 3])
    assert model.spec.inputs[0].shape == (-1, -1, -1, 3)
    assert model.dims == [["N", "width", None, 3]]


def test_batch_size_is_the_configured_or_the_default_one(workshop: Workshop) -> None:
    assert workshop.unary("Neg", 1, ["N"]).spec.max_batch_size == DEFAULT_BATCH_SIZE
    assert workshop.unary("Neg", 1, ["N"], max_batch_size=5).spec.max_batch_size == 5


def test_weights_are_no_inputs(workshop: Workshop) -> None:
    """Even where old exporters list them as such: they have a value already."""
    weights = np.array([2, 3], np.float32)
    model = workshop.make(
        [helper.make_node("Mul", ["x", "w"], ["y"])],
        {"x": (1, ["N", 2]), "w": (1, [2])},
        {"y": (1, ["N", 2])},
        {"w": weights},
    )
    assert [tensor.name for tensor in model.spec.inputs] == ["x"]
    assert model.run([np.ones((1, 2), np.float32)])[0].tolist() == [[2, 3]]


# --- failing ---


def fails(model: Model, feeds: Sequence[Array]) -> Exception:
    with pytest.raises(RUN_ERRORS) as raised:
        model.run(feeds)
    assert isinstance(raised.value, Exception)
    return raised.value


def test_error_of_a_model_is_brief_and_names_the_node(lookup: Model) -> None:
    text = brief(fails(lookup, [np.array([7])]))
    assert text.startswith("Non-zero status code returned while running Gather node.")
    assert text.endswith("idx=7 must be within the inclusive range [-4,3]")


def test_error_is_brief_about_where_in_onnx_runtime_it_was_raised(workshop: Workshop) -> None:
    node = helper.make_node("Reshape", ["x", "to"], ["y"])
    model = workshop.make([node], {"x": (1, ["N", "M"])}, {"y": (1, ["N", 2])}, {"to": np.array([-1, 2])})
    text = brief(fails(model, [np.ones((1, 3), np.float32)]))
    assert text.endswith(
        "Status Message: size != 0 && (input_shape_size % size) == 0 was false. The input tensor cannot be reshaped "
        "to the requested shape. Input shape:{1,3}, requested shape:{-1,2}"
    )


def test_brief_is_one_line_of_bounded_length() -> None:
    text = brief(ValueError("a\n\n  b" + "c" * 5000))
    assert text.startswith("a bc")
    assert len(text) == 1000


def test_strings_of_a_model_that_are_not_utf8_are_its_failure(workshop: Workshop) -> None:
    table = helper.make_tensor("table", T.STRING, [2], np.array([b"fine", b"\xff\xfe"], dtype=object))
    node = helper.make_node("Gather", ["table", "i"], ["y"])
    model = workshop.make([node], {"i": (T.INT64, ["N"])}, {"y": (T.STRING, ["N"])}, {"table": table})
    assert model.run([np.array([0])])[0].tolist() == ["fine"]
    assert "utf-8" in brief(fails(model, [np.array([1])]))


def test_shape_too_large_for_numpy_is_the_models_failure(workshop: Workshop) -> None:
    node = helper.make_node("ConstantOfShape", ["s"], ["y"])
    model = workshop.make([node], {"s": (T.INT64, ["N"])}, {"y": (1, None)})
    for shape in [0, 1 << 62, 8], [1 << 40], [-1]:
        assert brief(fails(model, [np.array(shape)]))


def test_running_alone_says_why(workshop: Workshop) -> None:
    model = workshop.unary("Neg", 1, ["N"], max_batch_size=4)
    model.run_alone("it mixes rows")
    assert (model.spec.batchable, model.spec.max_batch_size, model.why_alone) == (False, 1, "it mixes rows")


@pytest.mark.parametrize("spinning", [False, True])
def test_threads_wait_for_work_as_configured(workshop: Workshop, spinning: bool) -> None:
    config: dict[str, Any] = {"intra_op_spinning": True} if spinning else {}
    model = workshop.unary("Neg", 1, ["N"], intra_op_threads=2, **config)
    options = model._session.get_session_options()
    assert options.intra_op_num_threads == 2
    assert options.get_session_config_entry("session.intra_op.allow_spinning") == str(int(spinning))


LOADS = """
import os, sys
from pathlib import Path
from penstock.worker.config import ModelConfig
from penstock.worker.model import load
load(Path(sys.argv[1]), "m", "1", ModelConfig())
print(*(os.path.realpath(f"/proc/self/fd/{number}") for number in os.listdir("/proc/self/fd")))
"""


def test_nothing_is_reported_to_anybody(workshop: Workshop, tmp_path: Path) -> None:
    """ONNX Runtime would keep what it reports in the user's home until it is sent."""
    path = workshop.save(workshop.build([helper.make_node("Neg", ["x"], ["y"])], {"x": (1, ["N"])}, {"y": (1, ["N"])}))
    environment = {name: value for name, value in os.environ.items() if name not in ("ORT_DISABLE_TELEMETRY", "CI")}
    command = [sys.executable, "-c", LOADS, str(path)]
    said = subprocess.run(command, env=environment | {"HOME": str(tmp_path / "home")}, capture_output=True, check=True)
    assert b".onnxruntime" not in said.stdout
    assert not (tmp_path / "home").exists()
