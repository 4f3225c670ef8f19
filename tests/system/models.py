"""Models that the system tests serve."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper


def dense(seed: int = 0) -> onnx.ModelProto:
    """y [N, 3] = x [N, 4] times a random matrix, which is also its initializer "w"."""
    weights = np.random.default_rng(seed).standard_normal((4, 3)).astype(np.float32)
    return make_model(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        [("x", TensorProto.FLOAT, ["N", 4])],
        [("y", TensorProto.FLOAT, ["N", 3])],
        [numpy_helper.from_array(weights, "w")],
    )


def identity(datatype: int, shape: Sequence[str | int] = ("N", 2)) -> onnx.ModelProto:
    return make_model(
        [helper.make_node("Identity", ["x"], ["y"])], [("x", datatype, shape)], [("y", datatype, shape)], []
    )


def lookup() -> onnx.ModelProto:
    """y [N, 2] = rows of a table of three, by index i [N]: an index out of range fails."""
    table = np.arange(6, dtype=np.float32).reshape(3, 2)
    return make_model(
        [helper.make_node("Gather", ["table", "i"], ["y"])],
        [("i", TensorProto.INT64, ["N"])],
        [("y", TensorProto.FLOAT, ["N", 2])],
        [numpy_helper.from_array(table, "table")],
    )


def two_inputs() -> onnx.ModelProto:
    """sum, difference [N, 2] of a, b [N, 2], int32."""
    return make_model(
        [helper.make_node("Add", ["a", "b"], ["sum"]), helper.make_node("Sub", ["a", "b"], ["difference"])],
        [("a", TensorProto.INT32, ["N", 2]), ("b", TensorProto.INT32, ["N", 2])],
        [("sum", TensorProto.INT32, ["N", 2]), ("difference", TensorProto.INT32, ["N", 2])],
        [],
    )


def slow(layers: int = 200) -> onnx.ModelProto:
    """y [N, 1] = x [N, 1], by way of many large layers: some tens of milliseconds a batch."""
    side = 1024
    nodes = [helper.make_node("MatMul", ["x", "spread"], ["h0"])]
    nodes += [helper.make_node("MatMul", [f"h{each}", "turn"], [f"h{each + 1}"]) for each in range(layers)]
    nodes.append(helper.make_node("MatMul", [f"h{layers}", "gather"], ["y"]))
    return make_model(
        nodes,
        [("x", TensorProto.FLOAT, ["N", 1])],
        [("y", TensorProto.FLOAT, ["N", 1])],
        [
            numpy_helper.from_array(np.ones((1, side), np.float32), "spread"),
            numpy_helper.from_array(np.eye(side, dtype=np.float32)[::-1].copy(), "turn"),
            numpy_helper.from_array(np.full((side, 1), 1 / side, np.float32), "gather"),
        ],
    )


def endless() -> onnx.ModelProto:
    """y [N, 2] = x [N, 2], after as many rounds of a loop as the largest number in the batch: 1e18 never end. It takes
    long enough without them to have a thread of its own."""
    side = 1024
    weights = [
        numpy_helper.from_array(np.zeros(1, np.float32), "nothing"),
        numpy_helper.from_array(np.ones((2, side), np.float32), "spread"),
        numpy_helper.from_array(np.eye(side, dtype=np.float32)[::-1].copy(), "turn"),
        numpy_helper.from_array(np.zeros((side, 2), np.float32), "gather"),
    ]
    body = helper.make_graph(
        [helper.make_node("Identity", ["on"], ["goes_on"]), helper.make_node("Add", ["before", "nothing"], ["after"])],
        "body",
        [
            helper.make_tensor_value_info("round", TensorProto.INT64, []),
            helper.make_tensor_value_info("on", TensorProto.BOOL, []),
            helper.make_tensor_value_info("before", TensorProto.FLOAT, ["N", 2]),
        ],
        [
            helper.make_tensor_value_info("goes_on", TensorProto.BOOL, []),
            helper.make_tensor_value_info("after", TensorProto.FLOAT, ["N", 2]),
        ],
    )
    return make_model(
        [
            helper.make_node("ReduceMax", ["x"], ["most"], keepdims=0),
            helper.make_node("Cast", ["most"], ["rounds"], to=TensorProto.INT64),
            helper.make_node("Loop", ["rounds", "", "x"], ["looped"], body=body),
            helper.make_node("MatMul", ["looped", "spread"], ["wide"]),
            helper.make_node("MatMul", ["wide", "turn"], ["turned"]),
            helper.make_node("MatMul", ["turned", "gather"], ["zero"]),
            helper.make_node("Add", ["looped", "zero"], ["y"]),
        ],
        [("x", TensorProto.FLOAT, ["N", 2])],
        [("y", TensorProto.FLOAT, ["N", 2])],
        weights,
    )


def never_ends() -> onnx.ModelProto:
    """y [N, 2] = x [N, 2], after more rounds of a loop than anybody waits for, whatever x is."""
    body = helper.make_graph(
        [helper.make_node("Identity", ["on"], ["goes_on"]), helper.make_node("Add", ["before", "nothing"], ["after"])],
        "body",
        [
            helper.make_tensor_value_info("round", TensorProto.INT64, []),
            helper.make_tensor_value_info("on", TensorProto.BOOL, []),
            helper.make_tensor_value_info("before", TensorProto.FLOAT, ["N", 2]),
        ],
        [
            helper.make_tensor_value_info("goes_on", TensorProto.BOOL, []),
            helper.make_tensor_value_info("after", TensorProto.FLOAT, ["N", 2]),
        ],
    )
    return make_model(
        [helper.make_node("Loop", ["rounds", "", "x"], ["y"], body=body)],
        [("x", TensorProto.FLOAT, ["N", 2])],
        [("y", TensorProto.FLOAT, ["N", 2])],
        [
            numpy_helper.from_array(np.array(1 << 60), "rounds"),
            numpy_helper.from_array(np.zeros(1, np.float32), "nothing"),
        ],
    )


def slow_wide(side: int, layers: int = 200) -> onnx.ModelProto:
    """y [N, side] = x [N, side], which is turned round again and again, an even number of times."""
    nodes = [helper.make_node("Identity", ["x"], ["h0"])]
    nodes += [helper.make_node("MatMul", [f"h{each}", "turn"], [f"h{each + 1}"]) for each in range(layers)]
    nodes.append(helper.make_node("Identity", [f"h{layers}"], ["y"]))
    return make_model(
        nodes,
        [("x", TensorProto.FLOAT, ["N", side])],
        [("y", TensorProto.FLOAT, ["N", side])],
        [numpy_helper.from_array(np.eye(side, dtype=np.float32)[::-1].copy(), "turn")],
    )


def make_model(
    nodes: Sequence[onnx.NodeProto],
    inputs: Sequence[tuple[str, int, Sequence[str | int]]],
    outputs: Sequence[tuple[str, int, Sequence[str | int]]],
    initializers: Sequence[onnx.TensorProto],
) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info(*each) for each in inputs],
        [helper.make_tensor_value_info(*each) for each in outputs],
        initializers,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


def write(repository: Path, name: str, model: onnx.ModelProto, version: str = "1", config: str = "") -> Path:
    """Put a model into a repository."""
    path = repository / name / version / "model.onnx"
    path.parent.mkdir(parents=True)
    onnx.save(model, path)
    if config:
        (repository / name / "model.toml").write_text(config)
    return path
