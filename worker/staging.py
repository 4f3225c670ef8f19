"""Where batches of a model run: memory that is allocated once, and for each number of rows a binding that is made once.

A *binding* (ONNX Runtime's IOBinding) says where every input and output of a run lies. To run one that is there takes
2 us, to name everything anew 5, to make one 12. The rule, for models whose inputs have rows of one shape:

- an input is copied here, unless all of a batch lies side by side already and is large: then it is read where it lies;
- when each row of each output has a declared shape, outputs are bound: to where their callers read them, or to memory
  here. Else nothing is bound, and ONNX Runtime allocates what comes out (``Model.run``);
- strings cannot be bound at all.

A model may have sizes that its batches are padded to: there are bindings for these alone, the rows beyond repeat the
last one, so that the model sees nothing that it would not see elsewhere, and nobody looks at what comes of them.
"""

from __future__ import annotations

import ctypes
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from math import prod
from operator import is_
from typing import Any, Final

import numpy as np

from penstock.wire.allocator import ALIGN_BYTES
from penstock.wire.datatypes import ITEM_SIZES
from penstock.wire.models import ModelSpec, TensorSpec
from penstock.wire.tensors import DTYPES, Array

BYTES_MAX: Final = 1 << 30  # of one staging; larger batches are gathered anew each time
ONNX_TYPES: Final[dict[str, Any]] = {**DTYPES, "BF16": 16}  # TensorProto.DataType


class Staging:
    """For one batch of a model at a time. ``inputs[n]``: the arrays for n rows, in the order of the spec; a model whose
    requests run alone has only those for 1, a whole request. ``binds``: ``run`` may be called. ``stays``: what lies
    side by side elsewhere may be read there."""

    stays = True

    def __init__(self, session: Any, spec: ModelSpec, sizes: Sequence[int] = ()) -> None:
        """``sizes``: see ``padded``. Raises ValueError when the model cannot run here."""
        self._session = session
        self._sizes = sizes
        self._spec = spec
        rows = spec.max_batch_size if spec.batchable else 1
        inputs, outputs = (
            [_allocate(each, spec.batchable, rows) for each in some] for some in (spec.inputs, spec.outputs)
        )
        if not inputs or any(each is None for each in inputs):
            raise ValueError(f"rows of '{spec.name}' have no shape of their own")
        self.binds = all(each is not None for each in outputs)

        def rows_of(arrays: list[Array | None], number: int) -> list[Any]:
            return [each if each is None or not spec.batchable else each[:number] for each in arrays]

        self.inputs: list[list[Array]] = [rows_of(inputs, number) for number in range(rows + 1)]
        self._outputs: list[list[Array]] = [rows_of(outputs, number) for number in range(rows + 1)]
        self._bindings: dict[int, Any] = {}  # by rows, to the outputs here
        self._open: dict[int, Any] = {}  # by rows, to no outputs
        if self.binds:
            for number in sizes or range(1, rows + 1):
                self._bindings[number] = self._bind(self.inputs[number], number)
                self._open[number] = self._bind(self.inputs[number])

    def run(self, rows: int, feeds: Sequence[Array]) -> list[Array]:
        """The outputs for ``feeds``, each of which is one of ``inputs[rows]`` or lies elsewhere. They are this
        staging's memory, and hold until the next run. Raises one of RUN_ERRORS."""
        size = padded(self._sizes, rows)
        if size != rows:
            gather_into(self.inputs[rows], feeds)
            repeat_last(self.inputs[size], rows)
            self._session.run_with_iobinding(self._bindings[size])
            return self._outputs[rows]
        own = all(map(is_, feeds, self.inputs[rows]))
        self._session.run_with_iobinding(self._bindings[rows] if own else self._bind(feeds, rows))
        return self._outputs[rows]

    def run_into(self, rows: int, feeds: Sequence[Array], shapes: Mapping[int, tuple[int, ...]], address: int) -> None:
        """As ``run``, but some outputs, by their indexes, are written side by side to ``address``, and no others."""
        if padded(self._sizes, rows) != rows:  # there is no room for the rows beyond
            copy_out(self.run(rows, feeds), shapes, address)
            return
        if all(map(is_, feeds, self.inputs[rows])):
            binding = self._open[rows]
            binding.clear_binding_outputs()
        else:
            binding = self._bind(feeds)
        bind_outputs(binding, self._spec, shapes, address)
        self._session.run_with_iobinding(binding)

    def _bind(self, feeds: Sequence[Array], rows: int = 0) -> Any:
        """``rows``: of the outputs here, if these are to be bound."""
        binding = bind_inputs(self._session, self._spec, feeds)
        for spec, place in zip(self._spec.outputs, self._outputs[rows] if rows else (), strict=False):
            binding.bind_output(spec.name, "cpu", 0, ONNX_TYPES[spec.datatype], place.shape, place.ctypes.data)
        return binding


def bind_inputs(session: Any, spec: ModelSpec, feeds: Sequence[Array]) -> Any:
    """A binding to inputs, which must stay where they are until it has run."""
    binding = session.io_binding()
    for each, feed in zip(spec.inputs, feeds, strict=True):
        binding.bind_input(each.name, "cpu", 0, ONNX_TYPES[each.datatype], feed.shape, feed.ctypes.data)
    return binding


def bind_outputs(binding: Any, spec: ModelSpec, shapes: Mapping[int, tuple[int, ...]], address: int) -> None:
    """Some outputs, by their indexes, are to lie side by side from ``address`` on."""
    for at, shape in shapes.items():
        each = spec.outputs[at]
        binding.bind_output(each.name, "cpu", 0, ONNX_TYPES[each.datatype], shape, address)
        address += prod(shape) * ITEM_SIZES[each.datatype]


def padded(sizes: Sequence[int], rows: int) -> int:
    """What batches of so many rows run as: the next of the sizes, or what they are where there are none."""
    at = bisect_left(sizes, rows)
    return sizes[at] if at < len(sizes) else rows


def gather_into(places: Sequence[Array], feeds: Sequence[Array]) -> None:
    """Copy what does not lie there already."""
    for place, feed in zip(places, feeds, strict=True):
        if feed is not place:
            place[...] = feed


def repeat_last(arrays: Sequence[Array], rows: int) -> None:
    """Fill what is behind the first ``rows`` with the last of them."""
    for array in arrays:
        array[rows:] = array[rows - 1]


def pad(feed: Array, size: int) -> Array:
    """A copy with so many rows, the last one repeated."""
    return np.concatenate([feed, np.repeat(feed[-1:], size - len(feed), axis=0)])


def copy_out(outputs: Sequence[Array], shapes: Mapping[int, tuple[int, ...]], address: int) -> None:
    """Copy some outputs, by their indexes, side by side to ``address``, where there is room for them in these shapes.
    Raises ValueError when one is of another."""
    for at, shape in shapes.items():
        if outputs[at].shape != shape:
            raise ValueError(f"an output is of shape {outputs[at].shape}, not {shape}")
        array = np.ascontiguousarray(outputs[at])
        ctypes.memmove(address, array.ctypes.data, array.nbytes)
        address += array.nbytes


def row_shape(tensor: TensorSpec, batchable: bool) -> tuple[int, ...] | None:
    """Of a row, or of one request of a model that runs requests alone; None when it is not known."""
    row = tensor.shape[1:] if batchable else tensor.shape
    # Without dimensions, a request as a whole may be a scalar or of any shape: ONNX Runtime tells neither.
    known = tensor.datatype != "BYTES" and min(row, default=1 if batchable else 0) >= 1
    return tuple(row) if known else None


def _allocate(tensor: TensorSpec, batchable: bool, rows: int) -> Array | None:
    """Memory for so many rows, or for one request of a model that runs requests alone; None when its size is not
    known. It takes real memory only once it is written to."""
    row = row_shape(tensor, batchable)
    if row is None:
        return None
    dtype, shape = DTYPES[tensor.datatype], (rows, *row) if batchable else row
    nbytes = prod(shape) * dtype.itemsize
    if nbytes > BYTES_MAX:
        return None
    memory = np.empty(nbytes + ALIGN_BYTES, np.uint8)
    at = -memory.ctypes.data % ALIGN_BYTES
    return memory[at : at + nbytes].view(dtype).reshape(shape)
