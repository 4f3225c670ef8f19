"""Where batches run on a GPU: pinned memory that they are gathered into, memory on the GPU, and for each number of rows
a binding to that.

All inputs of a batch lie side by side, so one copy takes them to the GPU, however many they are; it runs on a stream of
its own, so that it goes on while another instance's batch computes. The bindings name the GPU's memory alone: what is
bound on the host is copied when it is bound (ONNX Runtime's IOBinding), and would be that batch's for ever.

With CUDA graphs, each number of rows that is run has a graph of its own, so batches are padded as with preferred sizes
(staging.py): where none are said, to powers of two.
"""

from __future__ import annotations

import mmap
import weakref
from collections.abc import Mapping, Sequence
from math import prod
from typing import Any, Final, NamedTuple, Protocol, TypeAlias

import numpy as np
import onnxruntime

from penstock.wire.datatypes import ITEM_SIZES
from penstock.wire.models import ModelSpec, TensorSpec
from penstock.wire.tensors import DTYPES, Array
from penstock.worker.staging import BYTES_MAX, ONNX_TYPES, Staging, gather_into, padded, repeat_last, row_shape

_ALIGN: Final = 256  # bytes, as CUDA aligns what it allocates


class Copies(Protocol):
    """See cuda.Stream."""

    def copy_in(self, device: int, host: int, nbytes: int, /) -> None: ...
    def copy_out(self, host: int, device: int, nbytes: int, /) -> None: ...
    def wait(self) -> None: ...


class Device(Protocol):
    """See cuda.Gpu."""

    @property
    def name(self) -> str: ...
    def allocate(self, nbytes: int, /) -> int: ...
    def free(self, address: int, /) -> None: ...
    def pin(self, address: int, nbytes: int, /) -> None: ...
    def unpin(self, address: int, /) -> None: ...
    def stream(self) -> Copies: ...


class _Side(NamedTuple):
    """The inputs, or the outputs, of a number of rows: where each begins, its shape, and the bytes of all."""

    offsets: list[int]
    shapes: list[tuple[int, ...]]
    nbytes: int


class _Size(NamedTuple):
    """What there is for a number of rows."""

    inputs: _Side
    outputs: _Side
    binding: Any
    options: Any


class DeviceStaging:
    """For one batch of a model at a time, as staging.Staging on the CPU. ``inputs[n]``: the arrays for n rows, on the
    host, in the order of the spec; a model whose requests run alone has only those for 1, a whole request."""

    binds = True
    stays = False  # what lies elsewhere is gathered here as well: from here the GPU reads it at its full speed

    def __init__(
        self, session: Any, spec: ModelSpec, device: Device, sizes: Sequence[int] = (), graphs: bool = False
    ) -> None:
        """``sizes``: that batches are padded to; ``graphs``: each of them is recorded. Raises ValueError when the model
        cannot run here, and MemoryError."""
        self._session = session
        self._spec = spec
        self._device = device
        rows = spec.max_batch_size if spec.batchable else 1
        self._sizes = sizes
        sides = [_side(tensors, rows, spec) for tensors in (spec.inputs, spec.outputs)]
        if not spec.inputs or max(side.nbytes for side in sides) > BYTES_MAX:
            raise ValueError(f"rows of '{spec.name}' have no shape of their own, or are too large")
        held: list[tuple[str, int]] = []
        self._release = weakref.finalize(self, _release, device, held)
        self._hosts: list[Array] = []
        self._on_device: list[int] = []
        try:
            for side in sides:
                host = np.frombuffer(mmap.mmap(-1, max(1, side.nbytes)), np.uint8)
                device.pin(host.ctypes.data, len(host))
                held.append(("unpin", host.ctypes.data))
                self._hosts.append(host)
                self._on_device.append(device.allocate(max(1, side.nbytes)))
                held.append(("free", self._on_device[-1]))
            self._copies = device.stream()
        except BaseException:
            self._release()
            raise
        self._of: dict[int, _Size] = {size: self._make(size, graphs) for size in sizes or range(1, rows + 1)}
        self.inputs: list[list[Array]] = [[]]
        self._outputs: list[list[Array]] = [[]]
        for number in range(1, rows + 1):
            size = self._of[padded(sizes, number)]
            self.inputs.append(_views(self._hosts[0], size.inputs, spec.inputs, number, spec.batchable))
            self._outputs.append(_views(self._hosts[1], size.outputs, spec.outputs, number, spec.batchable))

    def run(self, rows: int, feeds: Sequence[Array]) -> list[Array]:
        """The outputs for ``feeds``, which are ``inputs[rows]``. They are this staging's memory, and hold until the
        next run. Raises one of RUN_ERRORS, and CudaError."""
        size = self._compute(rows, feeds)
        self._copies.copy_out(self._hosts[1].ctypes.data, self._on_device[1], size.outputs.nbytes)
        self._copies.wait()
        return self._outputs[rows]

    def run_into(self, rows: int, feeds: Sequence[Array], shapes: Mapping[int, tuple[int, ...]], address: int) -> None:
        """As ``run``, but some outputs, by their indexes, are written side by side to ``address``, and no others."""
        size = self._compute(rows, feeds)
        for at, shape in shapes.items():
            if shape != (rows, *size.outputs.shapes[at][1:]) and shape != size.outputs.shapes[at]:
                raise ValueError(f"an output is of shape {size.outputs.shapes[at]}, not {shape}")
            nbytes = prod(shape) * ITEM_SIZES[self._spec.outputs[at].datatype]
            self._copies.copy_out(address, self._on_device[1] + size.outputs.offsets[at], nbytes)
            address += nbytes
        self._copies.wait()

    def _compute(self, rows: int, feeds: Sequence[Array]) -> _Size:
        gather_into(self.inputs[rows], feeds)
        number = padded(self._sizes, rows)
        if number != rows:
            repeat_last(self.inputs[number], rows)
        size = self._of[number]
        self._copies.copy_in(self._on_device[0], self._hosts[0].ctypes.data, size.inputs.nbytes)
        self._copies.wait()  # ONNX Runtime's stream knows nothing of this one
        self._session.run_with_iobinding(size.binding, size.options)
        return size

    def _make(self, size: int, graphs: bool) -> _Size:
        spec, binding = self._spec, self._session.io_binding()
        inputs, outputs = (_side(tensors, size, spec) for tensors in (spec.inputs, spec.outputs))
        for side, tensors, base, bind in (
            (inputs, spec.inputs, self._on_device[0], binding.bind_input),
            (outputs, spec.outputs, self._on_device[1], binding.bind_output),
        ):
            for each, offset, shape in zip(tensors, side.offsets, side.shapes, strict=True):
                bind(each.name, self._device.name, 0, ONNX_TYPES[each.datatype], shape, base + offset)
        options = None
        if graphs:
            options = onnxruntime.RunOptions()
            options.add_run_config_entry("gpu_graph_id", str(size))
        return _Size(inputs, outputs, binding, options)


AnyStaging: TypeAlias = "Staging | DeviceStaging"


def _side(tensors: Sequence[TensorSpec], rows: int, spec: ModelSpec) -> _Side:
    """Raises ValueError for a tensor whose rows have no shape of their own."""
    offsets, shapes, at = [], [], 0
    for each in tensors:
        row = row_shape(each, spec.batchable)
        if row is None:
            raise ValueError(f"'{each.name}' has no shape of its own")
        shape = (rows, *row) if spec.batchable else row
        offsets.append(at)
        shapes.append(shape)
        at += -(-prod(shape) * ITEM_SIZES[each.datatype] // _ALIGN) * _ALIGN
    return _Side(offsets, shapes, at)


def _views(host: Array, side: _Side, tensors: Sequence[TensorSpec], rows: int, batchable: bool) -> list[Array]:
    found = []
    for each, offset, shape in zip(tensors, side.offsets, side.shapes, strict=True):
        nbytes = prod(shape) * ITEM_SIZES[each.datatype]
        whole = host[offset : offset + nbytes].view(DTYPES[each.datatype]).reshape(shape)
        found.append(whole[:rows] if batchable else whole)
    return found


def _release(device: Device, held: Sequence[tuple[str, int]]) -> None:
    for what, address in reversed(held):
        getattr(device, what)(address)
