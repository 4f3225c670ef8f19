"""Makes the models that the benchmarks serve. Their weights are random: only what they cost is of use.

    python bench/models.py DIRECTORY [NAME...]

    tiny    x [N, 16]            dense 8, 4                                      y [N, 4]
    wide    x [N, 1000]          dense 8, 4                                      y [N, 4]
    mlp     x [N, 1024]          dense 1024, three times                         y [N, 1024]
    image   x [N, 3, 224, 224]   four convolutions, mean pooling, dense 1000     y [N, 1000]
    heavy   x [N, 64]            dense 2048, six times, then dense 8             y [N, 8]

All values are float32, with a ReLU between layers. `tiny` shows what the server itself costs, `wide` what numbers
in JSON do, `mlp` a small model, `image` the transport (602 KB and 63 million multiply-adds a row), and `heavy` what
overload does to a model that is slow for the size of its input.

The seed is fixed: under one version of numpy a name stands for the same weights everywhere.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

Array = npt.NDArray[np.float32]

OPSET = 17
IR_VERSION = 9
WEIGHTS_SEED = 0
DEFAULT_BATCH_SIZE_MAX = 32


# --- the models


class Convolution(NamedTuple):
    """[N, C, H, W] -> [N, outputs, H / stride, W / stride], with zeros around the images."""

    outputs: int
    kernel: int
    stride: int


class Plan(NamedTuple):
    """A model: convolutions, if any, the mean of each channel that comes out of them, then dense layers."""

    row: tuple[int, ...]  # the shape of one row of `x`
    dense: tuple[int, ...]  # the outputs of each layer
    convolutions: tuple[Convolution, ...] = ()


# The first costs 19.3 million multiply-adds; each of the others, where a quarter of the pixels meets four
# times the weights, 14.5 million.
IMAGE_CONVOLUTIONS = (
    Convolution(32, kernel=8, stride=4),
    Convolution(64, kernel=3, stride=2),
    Convolution(128, kernel=3, stride=2),
    Convolution(256, kernel=3, stride=2),
)

PLANS = {
    "tiny": Plan(row=(16,), dense=(8, 4)),
    "wide": Plan(row=(1000,), dense=(8, 4)),
    "mlp": Plan(row=(1024,), dense=(1024, 1024, 1024)),
    "image": Plan(row=(3, 224, 224), dense=(1000,), convolutions=IMAGE_CONVOLUTIONS),
    "heavy": Plan(row=(64,), dense=(2048, 2048, 2048, 2048, 2048, 2048, 8)),
}
MODELS: tuple[str, ...] = tuple(PLANS)


def plan_of(name: str) -> Plan:
    if name not in PLANS:
        raise ValueError(f"there is no benchmark model {name!r}, only {', '.join(MODELS)}")
    return PLANS[name]


# --- building


class Graph:
    """The nodes and weights of an ONNX graph in which each node reads what the one before it made."""

    def __init__(self, source: str, channels: int) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []
        self._value = source
        self._channels = channels
        self._rng = np.random.default_rng(WEIGHTS_SEED)

    def add(self, operator: str, *parameters: onnx.TensorProto, **attributes: Any) -> None:
        inputs = [self._value, *(parameter.name for parameter in parameters)]
        self._value = f"{operator.lower()}{len(self.nodes)}"
        self.nodes.append(helper.make_node(operator, inputs, [self._value], **attributes))
        self.weights += parameters

    def add_dense(self, outputs: int) -> None:
        self.add("Gemm", *self._parameters(outputs, self._channels), transB=1)
        self._channels = outputs

    def add_convolution(self, outputs: int, kernel: int, stride: int) -> None:
        # Rounded up: an odd kernel then makes as many pixels as an even one.
        padding = (kernel - stride + 1) // 2
        parameters = self._parameters(outputs, self._channels, kernel, kernel)
        self.add("Conv", *parameters, strides=[stride] * 2, pads=[padding] * 4)
        self._channels = outputs

    def end_at(self, output: str) -> None:
        self.nodes[-1].output[0] = output

    def _parameters(self, outputs: int, *inputs: int) -> tuple[onnx.TensorProto, onnx.TensorProto]:
        """Random weights [outputs, *inputs] and biases [outputs]."""
        # With this deviation values keep their size through any number of ReLU layers (He et al., 2015).
        deviation = np.float32((2 / prod(inputs)) ** 0.5)
        weights = self._rng.standard_normal((outputs, *inputs), np.float32) * deviation
        biases = self._rng.standard_normal(outputs, np.float32) * np.float32(0.1)
        number = len(self.nodes)
        return (
            numpy_helper.from_array(weights, f"weights{number}"),
            numpy_helper.from_array(biases, f"biases{number}"),
        )


def graph_of(plan: Plan) -> Graph:
    graph = Graph("x", channels=plan.row[0])
    for convolution in plan.convolutions:
        graph.add_convolution(*convolution)
        graph.add("Relu")
    if plan.convolutions:
        graph.add("GlobalAveragePool")
        graph.add("Flatten")
    *hidden, last = plan.dense
    for outputs in hidden:
        graph.add_dense(outputs)
        graph.add("Relu")
    graph.add_dense(last)
    graph.end_at("y")
    return graph


def build(name: str) -> bytes:
    """The ONNX file of a model in MODELS: `x` float32 [N, *row] -> `y` float32 [N, outputs], values around 1.

    Raises ValueError for another name.
    """
    plan = plan_of(name)
    graph = graph_of(plan)
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", *plan.row])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", plan.dense[-1]])
    whole = helper.make_graph(graph.nodes, name, [x], [y], graph.weights)
    opset = helper.make_opsetid("", OPSET)
    model = helper.make_model(whole, opset_imports=[opset], ir_version=IR_VERSION)
    onnx.checker.check_model(model, full_check=True)
    return bytes(model.SerializeToString())


def multiply_adds(model: bytes) -> int:
    """What one row costs, counted in the ONNX file: each weight is used once for each pixel of its output."""
    graph = onnx.shape_inference.infer_shapes(onnx.load_from_string(model)).graph
    weights = {tensor.name: prod(tensor.dims) for tensor in graph.initializer}
    shapes = {value.name: value.type.tensor_type.shape.dim for value in (*graph.value_info, *graph.output)}
    # The axes after rows and channels are the pixels; a dense layer has none, and the empty product is 1.
    pixels = {name: prod(axis.dim_value for axis in shape[2:]) for name, shape in shapes.items()}
    weighted = [node for node in graph.node if node.op_type in ("Conv", "Gemm")]
    return sum(weights[node.input[1]] * pixels[node.output[0]] for node in weighted)


# --- using


def sample(name: str, rows: int, seed: int = 0) -> dict[str, Array]:
    """Valid inputs of a model: `x` float32 [rows, ...], normal with deviation 1.

    Raises ValueError for an unknown name.
    """
    rng = np.random.default_rng((seed, WEIGHTS_SEED, 1))  # not the numbers that the weights are
    return {"x": rng.standard_normal((rows, *plan_of(name).row), np.float32)}


def make_repository(
    directory: Path, names: Sequence[str] = MODELS, max_batch_size: int = DEFAULT_BATCH_SIZE_MAX
) -> Path:
    """Writes `directory`/<name>/1/model.onnx and <name>/model.toml for each name, and returns `directory`.

    Raises ValueError for an unknown name.
    """
    for name in names:
        version = directory / name / "1"
        model = build(name)
        version.mkdir(parents=True, exist_ok=True)
        (version / "model.onnx").write_bytes(model)
        (directory / name / "model.toml").write_text(f"max_batch_size = {max_batch_size}\n")
    return directory


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Make a repository of the benchmarks' models.")
    parser.add_argument("directory", type=Path, metavar="DIRECTORY")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"default: {' '.join(MODELS)}")
    options = parser.parse_args(arguments)
    try:
        make_repository(options.directory, options.names or MODELS)
    except ValueError as error:
        parser.error(str(error))
    return 0


if __name__ == "__main__":
    sys.exit(main())
