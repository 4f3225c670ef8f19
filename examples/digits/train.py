"""Trains the bundled model `digits`, a small convolutional network, and writes it as ONNX.

    python examples/digits/train.py [--out PATH] [--epochs N] [--seed N] [--example PATH]

The network, in plain numpy (a block is a 3x3 convolution, batch normalisation and ReLU):

    image                       [N, 1, 8, 8]    grey values 0..16, as in scikit-learn's load_digits
    Block(1 -> 16)              [N, 8, 8, 16]
    Block(16 -> 16, stride 2)   [N, 4, 4, 16]
    Block(16 -> 32, stride 2)   [N, 2, 2, 32]
    Dense(128 -> 10)            [N, 10]         scores: logits, one per digit; softmax makes probabilities

Inside, channels come last: then a convolution, a normalisation and their gradients need no transposition.
ONNX wants them first, which the export settles once, in the weights.

Nothing scales the grey values: the first normalisation learns their range, and the export folds it into the
weights with the rest, so that the graph is convolutions, ReLUs and one matrix product.

A quarter of the images never takes part in training. The split does not depend on `--seed`, so the accuracies
of two runs compare. The same seed on the same machine gives the same file, byte for byte.
"""

from __future__ import annotations

import os

os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # see penstock.worker

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]  # it comes with scikit-learn

Array = npt.NDArray[np.float32]
Labels = npt.NDArray[np.int64]

REPOSITORY = Path(__file__).resolve().parents[2]
DEFAULT_OUT = REPOSITORY / "bin" / "models" / "digits" / "1" / "model.onnx"

HELD_OUT_IMAGES = 450
SPLIT_SEED = 0
ACCURACY_MIN = 0.97

BATCH_IMAGES = 64
# Chosen by cross-validation among the training images, so that the held-out ones decide nothing: 98.1 %
# without moved images and smoothed labels, 99.3 % with both.
DEFAULT_EPOCHS = 60
LEARNING_RATE = 0.1
MOVED_SHARE = 0.5
SMOOTHING = 0.1

OPSET = 17
IR_VERSION = 9
# numpy and ONNX Runtime add up in different orders; logits reach about 6.
TOLERANCE = 1e-4


class Unfit(Exception):
    """The trained network must not be written; the message says why."""


# --- data


class Split(NamedTuple):
    """Images float32 [N, 1, 8, 8], grey values 0..16; labels int64 [N], the digits 0..9 that they show."""

    train_images: Array
    train_labels: Labels
    held_out_images: Array
    held_out_labels: Labels


def load_split() -> Split:
    """The 1797 images of scikit-learn's `load_digits`; the 450 held out have each digit in the same share."""
    pixels, digits = load_digits(return_X_y=True)
    images = pixels.astype(np.float32).reshape(-1, 1, 8, 8)
    labels = digits.astype(np.int64)
    train_images, held_out_images, train_labels, held_out_labels = train_test_split(
        images, labels, test_size=HELD_OUT_IMAGES, stratify=labels, random_state=SPLIT_SEED
    )
    return Split(train_images, train_labels, held_out_images, held_out_labels)


# --- convolution as a matrix product


def im2col(images: Array, stride: int) -> Array:
    """The 3x3 patch around every pixel: [N, H, W, C] -> [N, H / stride, W / stride, C * 9], zeros outside."""
    padded = np.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)))
    patches = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(1, 2))[:, ::stride, ::stride]
    return patches.reshape(*patches.shape[:3], -1)


def col2im(columns: Array, shape: tuple[int, ...], stride: int) -> Array:
    """The transpose of `im2col`: adds every patch back at its place in images of `shape` [N, H, W, C]."""
    count, height, width, channels = shape
    patches = columns.reshape(*columns.shape[:3], channels, 3, 3)
    padded = np.zeros((count, height + 2, width + 2, channels), np.float32)
    for row in range(3):
        for column in range(3):
            below, across = slice(row, row + height, stride), slice(column, column + width, stride)
            padded[:, below, across] += patches[..., row, column]
    return padded[:, 1:-1, 1:-1]


# --- the trained network, ready for export


class Convolution(NamedTuple):
    """weights [inputs * 9, outputs] and bias [outputs], with the normalisation folded in."""

    weights: Array
    bias: Array
    stride: int


class Classifier(NamedTuple):
    """The network without anything that only training needs: what is measured is what is exported."""

    convolutions: list[Convolution]
    dense_weights: Array  # [128, 10]
    dense_bias: Array  # [10]

    def scores(self, images: Array) -> Array:
        """Logits [N, 10] for images [N, 1, 8, 8]."""
        values = images.reshape(-1, 8, 8, 1)
        for weights, bias, stride in self.convolutions:
            values = np.maximum(np.tensordot(im2col(values, stride), weights, axes=1) + bias, 0)
        return values.reshape(len(images), -1) @ self.dense_weights + self.dense_bias


def accuracy(scores: Array, labels: Labels) -> float:
    """The share, 0..1, of rows of `scores` [N, 10] whose largest entry is at the row's label."""
    return float(np.mean(scores.argmax(axis=1) == labels))


# --- the network in training


class Parameter:
    """An array that is learned, its latest gradient, and how fast it moves."""

    MOMENTUM = 0.9

    def __init__(self, value: Array) -> None:
        self.value = value
        self.gradient = np.zeros_like(value)
        self._velocity = np.zeros_like(value)

    def step(self, rate: float) -> None:
        """One step of gradient descent with momentum."""
        self._velocity = self.MOMENTUM * self._velocity - rate * self.gradient
        self.value = self.value + self._velocity


def random_weights(rng: np.random.Generator, inputs: int, outputs: int) -> Parameter:
    """Normal, [inputs, outputs], of the variance that keeps signals level through ReLUs (He et al., 2015)."""
    return Parameter(rng.standard_normal((inputs, outputs), np.float32) * np.float32((2 / inputs) ** 0.5))


class Normalisation:
    """Batch normalisation of images [N, H, W, channels] (Ioffe and Szegedy, 2015)."""

    MOMENTUM = 0.9
    EPSILON = np.float32(1e-5)
    ALL_PIXELS = (0, 1, 2)  # the axes over which a channel has its mean and its variance

    def __init__(self, channels: int) -> None:
        self.scale = Parameter(np.ones(channels, np.float32))
        self.shift = Parameter(np.zeros(channels, np.float32))
        # Running averages over batches: what stands for a batch's own figures once training is over.
        self._mean = np.zeros(channels, np.float32)
        self._variance = np.ones(channels, np.float32)
        # Kept by `forward` for `backward`.
        self._normal = np.empty(0, np.float32)
        self._deviation = np.empty(0, np.float32)

    def forward(self, images: Array) -> Array:
        mean, variance = images.mean(axis=self.ALL_PIXELS), images.var(axis=self.ALL_PIXELS)
        self._mean += (1 - self.MOMENTUM) * (mean - self._mean)
        self._variance += (1 - self.MOMENTUM) * (variance - self._variance)
        self._deviation = np.sqrt(variance + self.EPSILON)
        self._normal = (images - mean) / self._deviation
        return self._normal * self.scale.value + self.shift.value

    def backward(self, gradient: Array) -> Array:
        self.scale.gradient = (gradient * self._normal).sum(axis=self.ALL_PIXELS)
        self.shift.gradient = gradient.sum(axis=self.ALL_PIXELS)
        # Every pixel also moves the mean and the deviation that all pixels of its channel share.
        pixels = np.float32(gradient.size / gradient.shape[-1])
        shared = (self.shift.gradient + self._normal * self.scale.gradient) / pixels
        return (gradient - shared) * (self.scale.value / self._deviation)

    def fold_into(self, weights: Array) -> tuple[Array, Array]:
        """Weights and bias that do in one product what `weights` and this normalisation do in two steps."""
        factor = self.scale.value / np.sqrt(self._variance + self.EPSILON)
        return weights * factor, self.shift.value - self._mean * factor


class Block:
    """A 3x3 convolution, batch normalisation and ReLU: [N, H, W, inputs] -> [N, H', W', outputs]."""

    def __init__(self, rng: np.random.Generator, inputs: int, outputs: int, stride: int = 1) -> None:
        self._stride = stride
        # No bias: the normalisation that follows would subtract it again.
        self._weights = random_weights(rng, inputs * 9, outputs)
        self._normalisation = Normalisation(outputs)
        # Kept by `forward` for `backward`.
        self._shape: tuple[int, ...] = ()
        self._columns = np.empty(0, np.float32)
        self._active = np.empty(0, np.bool_)

    def parameters(self) -> list[Parameter]:
        return [self._weights, self._normalisation.scale, self._normalisation.shift]

    def forward(self, images: Array) -> Array:
        self._shape = images.shape
        self._columns = im2col(images, self._stride)
        products = np.tensordot(self._columns, self._weights.value, axes=1)
        normal = self._normalisation.forward(products)
        self._active = normal > 0
        return normal * self._active

    def backward(self, gradient: Array) -> Array:
        gradient = self._normalisation.backward(gradient * self._active)
        self._weights.gradient = np.tensordot(self._columns, gradient, axes=((0, 1, 2), (0, 1, 2)))
        return col2im(np.tensordot(gradient, self._weights.value.T, axes=1), self._shape, self._stride)

    def folded(self) -> Convolution:
        return Convolution(*self._normalisation.fold_into(self._weights.value), self._stride)


class Dense:
    """A dense layer: [N, inputs] -> [N, outputs]."""

    def __init__(self, rng: np.random.Generator, inputs: int, outputs: int) -> None:
        self.weights = random_weights(rng, inputs, outputs)
        self.bias = Parameter(np.zeros(outputs, np.float32))
        # Kept by `forward` for `backward`.
        self._rows = np.empty(0, np.float32)

    def forward(self, rows: Array) -> Array:
        self._rows = rows
        return rows @ self.weights.value + self.bias.value

    def backward(self, gradient: Array) -> Array:
        self.weights.gradient = self._rows.T @ gradient
        self.bias.gradient = gradient.sum(axis=0)
        return gradient @ self.weights.value.T


class Network:
    """The network as the top of this file draws it, in training."""

    def __init__(self, rng: np.random.Generator) -> None:
        self._blocks = [Block(rng, 1, 16), Block(rng, 16, 16, stride=2), Block(rng, 16, 32, stride=2)]
        self._dense = Dense(rng, 128, 10)

    def parameters(self) -> list[Parameter]:
        in_blocks = [parameter for block in self._blocks for parameter in block.parameters()]
        return [*in_blocks, self._dense.weights, self._dense.bias]

    def forward(self, images: Array) -> Array:
        """Logits [N, 10] for images [N, 1, 8, 8]."""
        values = images.reshape(-1, 8, 8, 1)
        for block in self._blocks:
            values = block.forward(values)
        return self._dense.forward(values.reshape(len(images), -1))

    def backward(self, gradient: Array) -> None:
        """Gives every parameter its gradient, from the gradient [N, 10] of the latest scores."""
        gradient = self._dense.backward(gradient).reshape(-1, 2, 2, 32)
        for block in reversed(self._blocks):
            gradient = block.backward(gradient)

    def classifier(self) -> Classifier:
        convolutions = [block.folded() for block in self._blocks]
        return Classifier(convolutions, self._dense.weights.value.copy(), self._dense.bias.value.copy())


# --- training


def jittered(rng: np.random.Generator, images: Array) -> Array:
    """A copy of images [N, 1, 8, 8] in which about half are moved by up to a pixel, with zeros moving in."""
    moves = rng.integers(-1, 2, (2, len(images))) * (rng.random(len(images)) < MOVED_SHARE)
    padded = np.pad(images, ((0, 0), (0, 0), (1, 1), (1, 1)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, images.shape[2:], axis=(2, 3))
    return windows[np.arange(len(images)), :, 1 + moves[0], 1 + moves[1]]


def cross_entropy(scores: Array, labels: Labels) -> tuple[float, Array]:
    """The mean loss in nats of logits [N, 10] against smoothed labels, and its gradient [N, 10]."""
    count, classes = scores.shape
    targets = np.full_like(scores, SMOOTHING / classes)
    targets[np.arange(count), labels] += 1 - SMOOTHING
    lowered = scores - scores.max(axis=1, keepdims=True)  # so that exp cannot overflow
    log_probabilities = lowered - np.log(np.exp(lowered).sum(axis=1, keepdims=True))
    loss = -float((targets * log_probabilities).sum()) / count
    return loss, (np.exp(log_probabilities) - targets) / np.float32(count)


def learning_rate(epoch: int, epochs: int) -> float:
    """Half a cosine from LEARNING_RATE in epoch 0 towards 0 after the last: large steps first, then small."""
    return LEARNING_RATE * 0.5 * (1 + float(np.cos(np.pi * epoch / epochs)))


def train_epoch(network: Network, split: Split, rng: np.random.Generator, rate: float) -> float:
    """One pass over the training images in random order; the mean loss of its batches in nats."""
    losses = []
    order = rng.permutation(len(split.train_images))
    # Batches are full, for their statistics; a short rest waits for the next epoch's shuffle.
    for start in range(0, len(order) - BATCH_IMAGES + 1, BATCH_IMAGES):
        batch = order[start : start + BATCH_IMAGES]
        scores = network.forward(jittered(rng, split.train_images[batch]))
        loss, gradient = cross_entropy(scores, split.train_labels[batch])
        network.backward(gradient)
        for parameter in network.parameters():
            parameter.step(rate)
        losses.append(loss)
    return float(np.mean(losses))


def train(split: Split, epochs: int, seed: int) -> Classifier:
    """Trains for `epochs` passes over the training images and prints a line of progress after each."""
    rng = np.random.default_rng(seed)
    network = Network(rng)
    # Threads would split the sums in as many parts as there are cores, and round them differently.
    with threadpool_limits(1):
        for epoch in range(epochs):
            loss = train_epoch(network, split, rng, learning_rate(epoch, epochs))
            held_out = accuracy(network.classifier().scores(split.held_out_images), split.held_out_labels)
            print(f"epoch {epoch + 1:2} of {epochs}: loss {loss:.4f}, held out {100 * held_out:.1f} %")
    return network.classifier()


# --- export


def to_onnx(classifier: Classifier) -> bytes:
    """The model file: `image` float32 [N, 1, 8, 8], grey values 0..16 -> `scores` float32 [N, 10], logits."""
    nodes: list[onnx.NodeProto] = []
    tensors: dict[str, Array] = {}
    value = "image"
    for number, (weights, bias, stride) in enumerate(classifier.convolutions, start=1):
        kernels, biases, products = f"kernels{number}", f"biases{number}", f"conv{number}"
        tensors |= {kernels: weights.T.reshape(len(bias), -1, 3, 3), biases: bias}
        inputs, value = [value, kernels, biases], f"relu{number}"
        nodes.append(helper.make_node("Conv", inputs, [products], strides=[stride] * 2, pads=[1] * 4))
        nodes.append(helper.make_node("Relu", [products], [value]))
    # The last block's values arrive channels first, [32, 2, 2], where training had [2, 2, 32].
    dense = classifier.dense_weights.reshape(2, 2, 32, 10).transpose(2, 0, 1, 3).reshape(128, 10)
    tensors |= {"dense": dense, "dense_biases": classifier.dense_bias}
    nodes.append(helper.make_node("Flatten", [value], ["flat"]))
    nodes.append(helper.make_node("Gemm", ["flat", "dense", "dense_biases"], ["scores"]))
    return serialised(nodes, tensors)


def serialised(nodes: list[onnx.NodeProto], tensors: dict[str, Array]) -> bytes:
    """The checked ONNX file of a graph from `image` to `scores`."""
    image = helper.make_tensor_value_info("image", TensorProto.FLOAT, ["N", 1, 8, 8])
    scores = helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["N", 10])
    weights = [numpy_helper.from_array(array, name) for name, array in tensors.items()]
    graph = helper.make_graph(nodes, "digits", [image], [scores], weights)
    opset = helper.make_opsetid("", OPSET)
    model = helper.make_model(graph, opset_imports=[opset], ir_version=IR_VERSION)
    onnx.checker.check_model(model, full_check=True)
    return bytes(model.SerializeToString())


def run(model: bytes, images: Array) -> Array:
    """What ONNX Runtime makes of images [N, 1, 8, 8]: scores [N, 10]."""
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    scores: Array = session.run(["scores"], {"image": images})[0]
    return scores


def check(model: bytes, classifier: Classifier, split: Split) -> float:
    """The accuracy, 0..1, of the exported model on the held-out images.

    Raises Unfit when ONNX Runtime and numpy disagree, a batch mixes its rows, or the accuracy is too low.
    """
    images, labels = split.held_out_images, split.held_out_labels
    scores, expected = run(model, images), classifier.scores(images)
    reached = accuracy(scores, labels)
    if reached != accuracy(expected, labels) or not np.allclose(scores, expected, atol=TOLERANCE):
        raise Unfit("ONNX Runtime computes other scores than the network in numpy: the export is wrong")
    singles = np.concatenate([run(model, images[:1]), run(model, images[1:2])])
    if not np.allclose(run(model, images[:2]), singles, atol=TOLERANCE):
        raise Unfit("a batch of two images gets other scores than the two alone: the model is not batchable")
    if reached <= ACCURACY_MIN:
        raise Unfit(f"accuracy is {100 * reached:.1f} %, and must be above {100 * ACCURACY_MIN:.0f} %")
    return reached


def write_example(path: Path, classifier: Classifier, split: Split) -> None:
    """Writes the held-out seven with the highest score for 7: a v2 request at `path`, its array beside it.

    The array, in an .npy file of the same name, is float32 [1, 1, 8, 8], grey values 0..16.
    """
    sevens = split.held_out_images[split.held_out_labels == 7]
    index = int(classifier.scores(sevens)[:, 7].argmax())
    image = sevens[index : index + 1]
    # One line of text per row of pixels, so that the digit can be seen in the file.
    pixels = ",\n".join("  " + ", ".join(f"{value:2.0f}" for value in row) for row in image[0, 0])
    head = '{"inputs": [{"name": "image", "shape": [1, 1, 8, 8], "datatype": "FP32", "data": ['
    path.write_text(f"{head}\n{pixels}\n]}}]}}\n")
    np.save(path.with_suffix(".npy"), image)


# --- command line


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train the digits model and write it as ONNX.")
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT, metavar="PATH", help="the ONNX file")
    parser.add_argument("--epochs", type=int, default=DEFAULT_EPOCHS, metavar="N", help="default %(default)s")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="default %(default)s")
    parser.add_argument(
        "--example", type=Path, metavar="PATH", help="also write a v2 request (.json) and its image (.npy)"
    )
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Trains, checks, writes; 1, with nothing written, when the model fails a check."""
    options = parse(arguments)
    split = load_split()
    classifier = train(split, options.epochs, options.seed)
    model = to_onnx(classifier)
    try:
        reached = check(model, classifier, split)
    except Unfit as error:
        print(f"not written: {error}", file=sys.stderr)
        return 1
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_bytes(model)
    if options.example is not None:
        write_example(options.example, classifier, split)
    print(f"wrote {options.out} ({len(model) / 1000:.1f} KB)")
    print(f"accuracy on {len(split.held_out_labels)} held-out images: {100 * reached:.1f} %")
    return 0


if __name__ == "__main__":
    sys.exit(main())
