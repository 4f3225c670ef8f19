"""A model of each kind that users have, as small as it can be."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from tests.system.models import write

T: Final = TensorProto
node: Final = helper.make_node
tensor: Final = helper.make_tensor_value_info
TENSOR: Final = helper.make_tensor_type_proto
LABELS: Final = ["ä", "", "日本"]


def make(
    nodes: Sequence[onnx.NodeProto],
    inputs: Sequence[onnx.ValueInfoProto],
    outputs: Sequence[onnx.ValueInfoProto],
    constants: dict[str, Any] | None = None,
    *,
    opset: int = 17,
    ir_version: int = 9,
    ml: int = 0,
) -> onnx.ModelProto:
    """``ml``: the version of ai.onnx.ml, 0 for none."""
    initializers = [numpy_helper.from_array(value, name) for name, value in (constants or {}).items()]
    opsets = [helper.make_opsetid("", opset)] + ([helper.make_opsetid("ai.onnx.ml", ml)] if ml else [])
    graph = helper.make_graph(nodes, "graph", inputs, outputs, initializers)
    return helper.make_model(graph, opset_imports=opsets, ir_version=ir_version)


def classifier(zipmap: bool) -> onnx.ModelProto:
    """What skl2onnx makes of a LogisticRegression on four columns with string labels: with ZipMap, its default, or with
    options={"zipmap": False}."""
    rng = np.random.default_rng(0)
    linear = node(
        "LinearClassifier",
        ["x"],
        ["label", "probabilities"],
        domain="ai.onnx.ml",
        classlabels_strings=LABELS,
        coefficients=rng.standard_normal(12).tolist(),
        intercepts=rng.standard_normal(3).tolist(),
        multi_class=1,
        post_transform="SOFTMAX",
    )
    x, label = tensor("x", T.FLOAT, [None, 4]), tensor("label", T.STRING, [None])
    if not zipmap:
        return make([linear], [x], [label, tensor("probabilities", T.FLOAT, [None, 3])], ml=1)
    mapped = node("ZipMap", ["probabilities"], ["maps"], domain="ai.onnx.ml", classlabels_strings=LABELS)
    kind = helper.make_sequence_type_proto(helper.make_map_type_proto(T.STRING, TENSOR(T.FLOAT, [])))
    return make([linear, mapped], [x], [label, helper.make_value_info("maps", kind)], ml=1)


def scaled(ir_version: int, opset: int) -> onnx.ModelProto:
    """y [N, 2] = x times w, which is an input that has a value: in old files each weight had to be one, from version 4
    on it is one whose value callers may give."""
    ports = [tensor("x", T.FLOAT, ["N", 2]), tensor("w", T.FLOAT, [2])]
    weights = {"w": np.array([2, 3], np.float32)}
    product = node("Mul", ["x", "w"], ["y"])
    return make([product], ports, [tensor("y", T.FLOAT, ["N", 2])], weights, opset=opset, ir_version=ir_version)


def double(kind: int, shape: Sequence[int | str | None] | None) -> onnx.ModelProto:
    """y = x + x."""
    return make([node("Add", ["x", "x"], ["y"])], [tensor("x", kind, shape)], [tensor("y", kind, shape)])


def optional(kind: onnx.TypeProto) -> onnx.TypeProto:
    return helper.make_optional_type_proto(kind)


def served() -> dict[str, onnx.ModelProto]:
    rows: list[int | str | None] = ["N", "M"]
    square = [
        node("Cast", ["x"], ["wide"], to=T.FLOAT),
        node("Mul", ["wide", "wide"], ["product"]),
        node("Cast", ["product"], ["y"], to=T.BFLOAT16),
    ]
    where = [node("NonZero", ["x"], ["columns"]), node("Transpose", ["columns"], ["y"], perm=[1, 0])]
    scale = [tensor("x", T.FLOAT, rows), tensor("factor", T.FLOAT, [])]
    return {
        "classifier": classifier(zipmap=False),
        # y [N, M] = each string twice
        "strings": make(
            [node("StringConcat", ["x", "x"], ["y"])],
            [tensor("x", T.STRING, rows)],
            [tensor("y", T.STRING, rows)],
            opset=20,
        ),
        # y [K, 2] = where x [N, 4] is not 0: rows by name, and their number is that of what is found
        "where": make(where, [tensor("x", T.FLOAT, ["N", 4])], [tensor("y", T.INT64, ["N", 2])]),
        "scalar": double(T.FLOAT, []),
        "scale": make([node("Mul", ["x", "factor"], ["y"])], scale, [tensor("y", T.FLOAT, rows)]),
        # y: a scalar
        "sum": make(
            [node("ReduceSum", ["x"], ["y"], keepdims=0)], [tensor("x", T.FLOAT, rows)], [tensor("y", T.FLOAT, [])]
        ),
        "half": double(T.FLOAT16, rows),
        "brain": make(square, [tensor("x", T.BFLOAT16, rows)], [tensor("y", T.BFLOAT16, rows)]),
        "whole": double(T.INT64, rows),
        "wide": double(T.FLOAT, rows),
        "exact": double(T.DOUBLE, rows),
        "flat": double(T.FLOAT, ["N"]),
        "fixed": double(T.FLOAT, [0, 3]),
        "old": scaled(ir_version=3, opset=8),
        "overridable": scaled(ir_version=9, opset=17),
        "constant": make(
            [node("Identity", ["c"], ["y"])],
            [],
            [tensor("y", T.FLOAT, [2])],
            {"c": np.array([1, 2], np.float32)},
        ),
        # y: x [N] in whatever shape "to" says
        "reshape": make(
            [node("Reshape", ["x", "to"], ["y"])],
            [tensor("x", T.FLOAT, ["N"]), tensor("to", T.INT64, ["R"])],
            [tensor("y", T.FLOAT, None)],
        ),
        # The lower limit, an optional input of the operator, is left out.
        "clip": make(
            [node("Clip", ["x", "", "top"], ["y"])],
            [tensor("x", T.FLOAT, rows)],
            [tensor("y", T.FLOAT, rows)],
            {"top": np.array(1, np.float32)},
        ),
    }


def refused() -> dict[str, tuple[onnx.ModelProto, str]]:
    """Models, and what must be said of each."""
    x = tensor("x", T.FLOAT, ["N", 2])
    floats = TENSOR(T.FLOAT, None)
    sequence = helper.make_sequence_type_proto(floats)
    given = helper.make_value_info("x", optional(TENSOR(T.FLOAT, ["N"])))
    gives = helper.make_value_info("y", optional(TENSOR(T.FLOAT, ["N", 2])))
    several = helper.make_value_info("s", sequence)
    both = [tensor("x", T.BFLOAT16, ["N"]), tensor("s", T.STRING, ["N"])]
    both_out = [tensor("xx", T.BFLOAT16, ["N"]), tensor("ss", T.STRING, ["N"])]
    return {
        "maps": (
            classifier(zipmap=True),
            "output 'maps' is of type seq(map(string,tensor(float))), which the v2 protocol has no datatype for; "
            "export it without ZipMap (options={'zipmap': False})",
        ),
        "sequence-out": (
            make([node("SequenceConstruct", ["x"], ["s"])], [x], [several]),
            "output 's' is of type seq(tensor(float)), which the v2 protocol has no datatype for",
        ),
        "sequence-in": (
            make(
                [node("SequenceAt", ["s", "i"], ["y"])],
                [several, tensor("i", T.INT64, [])],
                [tensor("y", T.FLOAT, None)],
            ),
            "input 's' is of type seq(tensor(float)), which the v2 protocol has no datatype for",
        ),
        "optional-in": (
            make([node("OptionalHasElement", ["x"], ["y"])], [given], [tensor("y", T.BOOL, [])], opset=18),
            "input 'x' is of type optional(tensor(float)), which the v2 protocol has no datatype for; "
            "export it as a tensor",
        ),
        "optional-out": (
            make([node("Optional", ["x"], ["y"])], [x], [gives], opset=18),
            "output 'y' is of type optional(tensor(float)), which the v2 protocol has no datatype for; "
            "export it as a tensor",
        ),
        "any-rank": (
            double(T.FLOAT, None),
            "input 'x' is declared without a shape, so what comes cannot be checked; export it with one, whose "
            "dimensions may be symbolic",
        ),
        "brain-add": (double(T.BFLOAT16, ["N"]), "Could not find an implementation for Add(14)"),
        "brain-and-strings": (
            make([node("Identity", ["x"], ["xx"]), node("Identity", ["s"], ["ss"])], both, both_out),
            "it has both bfloat16 and string tensors, which cannot be run together from Python",
        ),
        "eighth": (
            make(
                [node("Cast", ["x"], ["y"], to=T.FLOAT)],
                [tensor("x", T.FLOAT8E4M3FN, ["N"])],
                [tensor("y", T.FLOAT, ["N"])],
                opset=19,
            ),
            "input 'x' is of type tensor(float8e4m3fn), which the v2 protocol has no datatype for",
        ),
    }


def write_all(repository: Path) -> None:
    for name, model in served().items():
        write(repository, name, model)
    for name, (model, _) in refused().items():
        write(repository, name, model)
