"""Networks of the size that GPUs are bought for, with random weights: ``build("resnet50", "FP16")``.

    resnet50   x [N, 3, 224, 224]              25.5 million weights, 4.1 billion multiply-adds a row (He et al., 2015)
    bert-base  ids, mask, types [N, 128]       110 million weights, 11 billion multiply-adds a row (Devlin et al., 2018)

``y`` is [N, 1000] of the first, the pooled first token [N, 768] of the second. Inputs that are not whole numbers,
weights and outputs are of the one type. Only what they cost is of use, and that two providers give the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

NAMES: Final = ("resnet50", "bert-base")
TYPES: Final = {"FP32": (TensorProto.FLOAT, np.float32), "FP16": (TensorProto.FLOAT16, np.float16)}
_OPSET: Final = 17
_IR_VERSION: Final = 9
_STAGES: Final = ((3, 64, 1), (4, 128, 2), (6, 256, 2), (3, 512, 2))  # blocks, channels within, stride of the first
_EXPANSION: Final = 4
_TOKENS, _HIDDEN, _HEADS, _LAYERS, _INNER, _WORDS = 128, 768, 12, 12, 3072, 30522
_EPSILON: Final = 1e-5

Array = npt.NDArray[Any]


class _Graph:
    """Nodes and weights, each named after the node that it is for."""

    def __init__(self, datatype: str) -> None:
        self.kind, self.dtype = TYPES[datatype]
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []
        self._rng = np.random.default_rng(0)

    def add(self, operator: str, *inputs: str, **attributes: Any) -> str:
        """Returns the name of what comes out."""
        output = f"{operator.lower()}{len(self.nodes)}"
        self.nodes.append(helper.make_node(operator, inputs, [output], **attributes))
        return output

    def constant(self, values: Any, dtype: Any = None) -> str:
        name = f"weights{len(self.weights)}"
        self.weights.append(numpy_helper.from_array(np.asarray(values, dtype or self.dtype), name))
        return name

    def random(self, *shape: int, deviation: float) -> str:
        return self.constant(self._rng.standard_normal(shape, np.float32) * deviation)

    def dense(self, source: str, inputs: int, outputs: int) -> str:
        product = self.add("MatMul", source, self.random(inputs, outputs, deviation=(1 / inputs) ** 0.5))
        return self.add("Add", product, self.random(outputs, deviation=0.02))

    def normalize(self, source: str, size: int) -> str:
        ones, zeros = self.constant(np.ones(size)), self.constant(np.zeros(size))
        return self.add("LayerNormalization", source, ones, zeros, axis=-1, epsilon=_EPSILON)

    def convolve(self, source: str, inputs: int, outputs: int, kernel: int, stride: int = 1) -> str:
        """With what a batch normalization adds once it has been folded into the weights."""
        weights = self.random(outputs, inputs, kernel, kernel, deviation=(1 / (inputs * kernel * kernel)) ** 0.5)
        bias = self.random(outputs, deviation=0.02)
        return self.add("Conv", source, weights, bias, strides=[stride] * 2, pads=[kernel // 2] * 4)

    def finish(self, name: str, last: str, inputs: Sequence[onnx.ValueInfoProto], row: Sequence[int]) -> bytes:
        self.nodes.append(helper.make_node("Identity", [last], ["y"]))
        y = helper.make_tensor_value_info("y", self.kind, ["N", *row])
        graph = helper.make_graph(self.nodes, name, inputs, [y], self.weights)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", _OPSET)], ir_version=_IR_VERSION)
        return bytes(model.SerializeToString())


def build(name: str, datatype: str) -> bytes:
    """The ONNX file. Raises KeyError for another name or type."""
    return {"resnet50": _resnet50, "bert-base": _bert_base}[name](_Graph(datatype))


def sample(name: str, datatype: str, rows: int, seed: int = 0) -> dict[str, Array]:
    """Valid inputs."""
    rng = np.random.default_rng(seed)
    if name == "resnet50":
        return {"x": rng.standard_normal((rows, 3, 224, 224), np.float32).astype(TYPES[datatype][1])}
    shape = rows, _TOKENS
    lengths = rng.integers(_TOKENS // 2, _TOKENS + 1, (rows, 1))
    return {
        "ids": rng.integers(0, _WORDS, shape, np.int64),
        "mask": (np.arange(_TOKENS) < lengths).astype(np.int64),
        "types": rng.integers(0, 2, shape, np.int64),
    }


def _resnet50(graph: _Graph) -> bytes:
    value = graph.add("Relu", graph.convolve("x", 3, 64, 7, 2))
    value = graph.add("MaxPool", value, kernel_shape=[3, 3], strides=[2, 2], pads=[1] * 4)
    channels = 64
    for blocks, inner, first_stride in _STAGES:
        for number in range(blocks):
            stride = first_stride if number == 0 else 1
            outer = inner * _EXPANSION
            beside = value if channels == outer else graph.convolve(value, channels, outer, 1, stride)
            value = graph.add("Relu", graph.convolve(value, channels, inner, 1))
            value = graph.add("Relu", graph.convolve(value, inner, inner, 3, stride))
            value = graph.add("Relu", graph.add("Add", graph.convolve(value, inner, outer, 1), beside))
            channels = outer
    value = graph.add("Flatten", graph.add("GlobalAveragePool", value))
    x = helper.make_tensor_value_info("x", graph.kind, ["N", 3, 224, 224])
    return graph.finish("resnet50", graph.dense(value, channels, 1000), [x], [1000])


def _bert_base(graph: _Graph) -> bytes:
    tables = [graph.random(count, _HIDDEN, deviation=0.02) for count in (_WORDS, 2)]
    words, types = (graph.add("Gather", table, name) for table, name in zip(tables, ("ids", "types"), strict=True))
    places = graph.random(_TOKENS, _HIDDEN, deviation=0.02)
    value = graph.normalize(graph.add("Add", graph.add("Add", words, types), places), _HIDDEN)
    # [N, 1, 1, tokens]: 0 where there is a token, far below where there is none.
    mask = graph.add("Unsqueeze", graph.add("Cast", "mask", to=graph.kind), graph.constant([1, 2], np.int64))
    absent = graph.add("Mul", graph.add("Sub", graph.constant(1.0), mask), graph.constant(-10000.0))
    heads = graph.constant([0, 0, _HEADS, _HIDDEN // _HEADS], np.int64)
    whole = graph.constant([0, 0, _HIDDEN], np.int64)
    for _ in range(_LAYERS):
        asked, keys, values = (
            graph.add("Transpose", graph.add("Reshape", graph.dense(value, _HIDDEN, _HIDDEN), heads), perm=order)
            for order in ([0, 2, 1, 3], [0, 2, 3, 1], [0, 2, 1, 3])
        )
        scores = graph.add("Mul", graph.add("MatMul", asked, keys), graph.constant((_HIDDEN // _HEADS) ** -0.5))
        seen = graph.add("MatMul", graph.add("Softmax", graph.add("Add", scores, absent), axis=-1), values)
        together = graph.add("Reshape", graph.add("Transpose", seen, perm=[0, 2, 1, 3]), whole)
        value = graph.normalize(graph.add("Add", value, graph.dense(together, _HIDDEN, _HIDDEN)), _HIDDEN)
        inner = graph.dense(value, _HIDDEN, _INNER)
        error = graph.add("Erf", graph.add("Mul", inner, graph.constant(0.5**0.5)))
        half = graph.add("Mul", inner, graph.constant(0.5))
        gelu = graph.add("Mul", half, graph.add("Add", error, graph.constant(1.0)))
        value = graph.normalize(graph.add("Add", value, graph.dense(gelu, _INNER, _HIDDEN)), _HIDDEN)
    first = graph.add("Gather", value, graph.constant(0, np.int64), axis=1)
    inputs = [
        helper.make_tensor_value_info(name, TensorProto.INT64, ["N", _TOKENS]) for name in ("ids", "mask", "types")
    ]
    return graph.finish("bert-base", graph.add("Tanh", graph.dense(first, _HIDDEN, _HIDDEN)), inputs, [_HIDDEN])
