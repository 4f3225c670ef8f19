"""A model in memory: an ONNX Runtime session, what it takes and gives, and how to run it."""

from __future__ import annotations

import ctypes
import logging
import re
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import onnxruntime
from onnxruntime.capi import onnxruntime_pybind11_state as _state

from penstock.wire.allocator import ALIGN_BYTES
from penstock.wire.datatypes import ITEM_SIZES, MAX_DIMS, element_count
from penstock.wire.messages import MAX_NAME
from penstock.wire.models import MAX_TENSORS, ModelSpec, TensorSpec
from penstock.wire.process import fields
from penstock.wire.tensors import Array
from penstock.worker.config import CPU, ModelConfig
from penstock.worker.costs import batch_sizes
from penstock.worker.cuda import CudaError, Gpu, find_gpu
from penstock.worker.memory import join_arena
from penstock.worker.ondevice import AnyStaging, DeviceStaging
from penstock.worker.onnxfile import OnnxFileError, read_onnx
from penstock.worker.providers import ProviderError, Session, choose, open_session, tensorrt_version
from penstock.worker.staging import Staging, bind_inputs, bind_outputs, copy_out, pad, padded
from penstock.worker.store import Store, StoreError, Weights

log = logging.getLogger("penstock.worker")

_DATATYPES: Final = {
    "tensor(bool)": "BOOL",
    "tensor(uint8)": "UINT8",
    "tensor(uint16)": "UINT16",
    "tensor(uint32)": "UINT32",
    "tensor(uint64)": "UINT64",
    "tensor(int8)": "INT8",
    "tensor(int16)": "INT16",
    "tensor(int32)": "INT32",
    "tensor(int64)": "INT64",
    "tensor(float16)": "FP16",
    "tensor(bfloat16)": "BF16",
    "tensor(float)": "FP32",
    "tensor(double)": "FP64",
    "tensor(string)": "BYTES",
}
_HINTS: Final = {
    "seq(map(": "; export it without ZipMap (options={'zipmap': False})",
    "optional(tensor(": "; export it as a tensor",
}
_ONNX_BFLOAT16: Final = 16  # TensorProto.DataType
_SHAPES_MAX: Final = 1024  # of inputs, for which a model remembers the shapes of its outputs
LOG_FATAL_ONLY: Final = 4  # errors come as exceptions, which are told in our own words

# ONNX Runtime's own exceptions have no common base.
ORT_ERRORS: Final[tuple[type[Exception], ...]] = tuple(
    each for each in vars(_state).values() if isinstance(each, type) and issubclass(each, Exception)
)
# What Model.run may raise: also errors of numpy and of the binding, as for a model's strings that are not UTF-8.
RUN_ERRORS: Final[tuple[type[Exception], ...]] = (*ORT_ERRORS, ValueError, RuntimeError, MemoryError)
# What ONNX Runtime says when memory is short: of the shared arena's limit, and of the system's, and on a GPU.
_ARENA_IS_FULL: Final = "is smaller than requested bytes"
_WANT_OF_MEMORY: Final = re.compile(
    rf"{_ARENA_IS_FULL}|Failed to allocate memory|CUDA (?:failure|error) 2\b|out of memory|STATUS_ALLOC_FAILED"
)
_DEVICE_FAILURE: Final = re.compile(
    r"CUDA (?:failure|error) \d|cudaError|STATUS_(?:EXECUTION_FAILED|INTERNAL_ERROR|MAPPING_ERROR|NOT_INITIALIZED)"
)

# In an ONNX Runtime error: its number, the file's name once more, and where in its source it was raised.
_NOISE: Final = re.compile(
    r"\[ONNXRuntimeError\] : \d+ : \w+ : (?:Load model from .*? failed: ?)?"
    r"|\S*/onnxruntime_src/\S+:\d+ [^()]*\([^()]*\)(?: const)? ?"
)


class LoadError(Exception):
    """A model that cannot be served; the message is a sentence for the user."""


class Foreseen(NamedTuple):
    """What outputs will be before the model has run: their shapes by index, and the bytes that they take side by side.
    0: that is not known, or one of them would not be aligned."""

    shapes: dict[int, tuple[int, ...]]
    nbytes: int


class Model:
    """A loaded model. ``spec`` says what callers need; ``why_alone`` why rows of several requests must not run together
    (empty when they may); ``dims`` has the names of the inputs' symbolic dimensions; ``sizes``: to which batches are
    padded (staging.py), none: to none.

    ``run`` may be called by several threads at once: the session is shared by all instances. ``gpu``: what it runs on,
    None for the CPU.
    """

    def __init__(
        self,
        session: Any,
        name: str,
        version: str,
        config: ModelConfig,
        weights: Weights | None = None,
        gpu: Gpu | None = None,
    ) -> None:
        self.config = config
        self.gpu = gpu
        self.weights = weights  # held for as long as the session may read them
        self._session = session
        inputs = session.get_inputs()
        outputs = session.get_outputs()
        if max(len(inputs), len(outputs)) > MAX_TENSORS:
            raise LoadError(f"it has {len(inputs)} inputs and {len(outputs)} outputs; {MAX_TENSORS} are allowed")
        self.dims: list[list[int | str | None]] = [list(each.shape) for each in inputs]
        self.why_alone = "its max_batch_size is 0" if config.max_batch_size == 0 else _why_alone(inputs, outputs)
        self.spec = ModelSpec(
            name,
            version,
            "onnxruntime_onnx",
            tuple(_spec("input", each) for each in inputs),
            tuple(_spec("output", each) for each in outputs),
            True,
            config.rows_max,
        )
        self.sizes: tuple[int, ...] = config.preferred_batch_sizes or ()
        self._names = [each.name for each in self.spec.outputs]
        self._output_dims: list[list[int | str | None]] = [list(each.shape) for each in outputs]
        self._known_shapes: dict[tuple[Any, ...], Foreseen] = {}
        self._binds = all(each.datatype != "BYTES" for each in self.spec.inputs)
        self._stagings: deque[AnyStaging] = deque()  # those that no batch has
        # numpy has no bfloat16, so such models take ONNX Runtime's own values in and out.
        datatypes = {each.datatype for each in (*self.spec.inputs, *self.spec.outputs)}
        self._has_bf16 = "BF16" in datatypes
        if {"BF16", "BYTES"} <= datatypes:
            raise LoadError("it has both bfloat16 and string tensors, which cannot be run together from Python")
        self.unlabelled: list[str] = []  # sentences: why classes of its outputs have no labels
        self.run_s = float("inf")  # how long a full batch took when it was tried
        self.warm_s: dict[int, float] = {}  # what a batch took at warm-up, by rows
        self.run_bytes = 0  # what its runs take beside its weights, as far as it was tried
        if self.why_alone:
            self.run_alone(self.why_alone)

    def run_alone(self, reason: str) -> None:
        """From now on each request runs by itself."""
        self.why_alone = reason
        self.spec = self.spec._replace(batchable=False, max_batch_size=1)
        self.sizes = ()

    def stage(self) -> bool:
        """Make the memory that its batches run in, for as many as run at once. False: none can be made beforehand."""
        if not self._binds:
            return False
        sizes = self.sizes
        if self.gpu is not None and self.config.cuda_graphs and self.spec.batchable and not sizes:
            self.sizes = tuple(batch_sizes(self.spec.max_batch_size))
        try:
            self._stagings.extend([self._make_staging() for _ in range(self.config.instances)])
        except (ValueError, MemoryError):
            self._stagings.clear()
            self.sizes = sizes
            return False
        return True

    def _make_staging(self) -> AnyStaging:
        if self.gpu is None:
            return Staging(self._session, self.spec, self.sizes)
        return DeviceStaging(self._session, self.spec, self.gpu, self.sizes, self.config.cuda_graphs)

    @contextmanager
    def staging(self) -> Iterator[AnyStaging | None]:
        """Memory for one batch; None when there is none."""
        try:
            taken = self._stagings.popleft()
        except IndexError:
            yield None
            return
        try:
            yield taken
        finally:
            if self._binds:
                self._stagings.append(taken)

    def run(self, feeds: Sequence[Array]) -> list[Array]:
        """The outputs for one array per input, in the order of the spec; BF16 are uint16 arrays, BYTES object arrays
        of str. Releases the GIL. Raises one of RUN_ERRORS when the model fails on them."""
        rows = len(feeds[0]) if self.sizes else 0
        size = padded(self.sizes, rows)
        if size == rows:
            return self._run_as_it_is(feeds)
        outputs = self._run_as_it_is([pad(feed, size) for feed in feeds])
        return [each[:rows] if each.shape[:1] == (size,) else each for each in outputs]

    def _run_as_it_is(self, feeds: Sequence[Array]) -> list[Array]:
        if self._has_bf16:
            return self._run_values(feeds)
        feed = {spec.name: array for spec, array in zip(self.spec.inputs, feeds, strict=True)}
        outputs: list[Array] = self._session.run(self._names, feed)
        return outputs

    def foresee(self, feeds: Sequence[Array], wanted: Sequence[int]) -> Foreseen:
        """What some outputs, by their indexes, will be for these inputs, as far as the model's declaration tells."""
        key = (*wanted, *[feed.shape for feed in feeds])
        known = self._known_shapes.get(key)
        if known is None:
            if len(self._known_shapes) >= _SHAPES_MAX:
                self._known_shapes.clear()
            shapes = self._find_shapes(feeds, wanted)
            sizes = [element_count(shape) * ITEM_SIZES[self.spec.outputs[at].datatype] for at, shape in shapes.items()]
            aligned = not any(size % ALIGN_BYTES for size in sizes[:-1])
            known = self._known_shapes[key] = Foreseen(shapes, sum(sizes) if aligned else 0)
        return known

    def _find_shapes(self, feeds: Sequence[Array], wanted: Sequence[int]) -> dict[int, tuple[int, ...]]:
        sizes: dict[Any, int] = {}
        for dims, feed in zip(self.dims, feeds, strict=True):
            sizes |= {dim: size for dim, size in zip(dims, feed.shape, strict=True) if type(dim) is str}
        shapes: dict[int, tuple[int, ...]] = {}
        for at in wanted:
            spec, dims = self.spec.outputs[at], self._output_dims[at]
            shape = [dim if type(dim) is int else sizes.get(dim, 0) for dim in dims]
            if self.spec.batchable:
                shape[0] = len(feeds[0])  # each row has one, whatever its name
            # A scalar is declared without dimensions, and so is what may have any.
            if not shape or min(shape) < 1 or spec.datatype == "BYTES":
                return {}
            shapes[at] = tuple(shape)
        return shapes if self._binds and all(feed.size for feed in feeds) else {}

    def run_in(self, staging: AnyStaging, rows: int, feeds: Sequence[Array]) -> list[Array]:
        """As ``run``, in memory that is there already: the outputs hold until the staging is used again."""
        if not (staging.binds and self._binds):
            return self.run(feeds)
        try:
            return staging.run(rows, feeds)
        except RUN_ERRORS as error:
            return self._run_unbound(feeds, error)

    def run_into(
        self,
        feeds: Sequence[Array],
        shapes: Mapping[int, tuple[int, ...]],
        address: int,
        staging: AnyStaging | None = None,
        rows: int = 0,
    ) -> bool:
        """Have some outputs written side by side to ``address``, where there is room for them in these shapes. False
        when they turn out to be of others; then it is not tried again. Raises as ``run``."""
        try:
            if staging is not None and staging.binds:
                staging.run_into(rows, feeds, shapes, address)
            elif self.sizes and len(feeds[0]) not in self.sizes:  # there is no room for the rows beyond
                copy_out(self.run(feeds), shapes, address)
            else:
                binding = bind_inputs(self._session, self.spec, feeds)
                bind_outputs(binding, self.spec, shapes, address)
                self._session.run_with_iobinding(binding)
        except RUN_ERRORS as error:
            self._run_unbound(feeds, error)
            return False
        return True

    def _run_unbound(self, feeds: Sequence[Array], error: Exception) -> list[Array]:
        """After a bound run has failed: raises too, unless it was the binding, which is not tried again, or a want of
        memory that has passed."""
        outputs = self.run(feeds)
        if not is_want_of_memory(error):
            self._binds = False
            self._stagings.clear()
            self._known_shapes.clear()
        return outputs

    def _run_values(self, feeds: Sequence[Array]) -> list[Array]:
        make = onnxruntime.OrtValue
        feed = {
            spec.name: make.ortvalue_from_numpy_with_onnx_type(array, _ONNX_BFLOAT16)
            if spec.datatype == "BF16"
            else make.ortvalue_from_numpy(array)
            for spec, array in zip(self.spec.inputs, feeds, strict=True)
        }
        return [
            _bits(value) if spec.datatype == "BF16" else value.numpy()
            for spec, value in zip(self.spec.outputs, self._session.run_with_ort_values(self._names, feed), strict=True)
        ]


def load(
    path: Path, name: str, version: str, config: ModelConfig, store: Store | None = None, device: str = CPU
) -> Model:
    """``store``: where its weights may be shared with other processes; ``device``: "cpu", or one that CUDA sees. Raises
    LoadError saying what is wrong with the file, or with the device."""
    if any("\ud800" <= letter <= "\udfff" for letter in str(path)):
        raise LoadError(f"{path} cannot be loaded: ONNX Runtime opens no path that is not UTF-8; rename it")
    try:
        wanted = choose(config, device)
        if "tensorrt" in wanted.wanted and store is not None:
            wanted = choose(config, device, _engines(store, path, name))
        weights = store.take(path, name) if store is not None and _shares(wanted, device) else None
        session = _open_shared(weights, config, name, wanted)
        if session is None:
            session = open_session(path, session_options(config.intra_op_threads, config.intra_op_spinning), wanted)
        gpu = find_gpu() if wanted.on_gpu else None
    except (ProviderError, CudaError) as error:
        raise LoadError(f"model '{name}' cannot be loaded: {error}") from None
    except RUN_ERRORS as error:
        raise LoadError(f"{path} cannot be loaded: {brief(error)}") from None
    try:
        _check_ranks(path, session)
        return Model(session, name, version, config, weights, gpu)
    except LoadError as error:
        raise LoadError(f"{path} cannot be served: {error}") from None
    except UnicodeDecodeError:
        raise LoadError(f"{path} cannot be served: it has a tensor whose name is not UTF-8") from None


def shares_weights(config: ModelConfig, device: str) -> bool:
    """Whether a model's weights are to be taken from the store, if there is one."""
    try:
        return _shares(choose(config, device), device)
    except ProviderError:
        return False


def _shares(wanted: Session, device: str) -> bool:
    """TensorRT keeps weights in its engines, and what runs on the CPU beside a GPU is small."""
    return wanted.wanted[0] != "tensorrt" and wanted.on_gpu == (device != CPU)


def _engines(store: Store, path: Path, name: str) -> Path | None:
    """Raises CudaError."""
    gpu = find_gpu()
    try:
        return store.engines(path, f"sm{gpu.capability}-tensorrt{tensorrt_version()}-cuda{gpu.driver}")
    except StoreError as error:
        cost = "TensorRT builds it anew at each start, which can take minutes"
        log.warning("no place for TensorRT's engines", extra=fields(model=name, reason=str(error), cost=cost))
        return None


def _open_shared(weights: Weights | None, config: ModelConfig, name: str, wanted: Session) -> Any:
    """A session on a prepared model, or None; then ``weights`` are no longer shared."""
    if weights is None or weights.prepared is None:
        return None
    try:
        options = session_options(config.intra_op_threads, config.intra_op_spinning)
        return open_session(weights.prepared, options, wanted)
    except RUN_ERRORS as error:
        weights.give_up(name, f"its prepared form cannot be opened: {brief(error)}")
        return None


def session_options(threads: int, spinning: bool = False) -> Any:
    """For preparing a model as for opening it: of another level, what is prepared would be prepared again."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = LOG_FATAL_ONLY
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.intra_op_num_threads = threads
    # A thread that spins burns some 25 ms after each batch before it sleeps, which others need.
    options.add_session_config_entry("session.intra_op.allow_spinning", "1" if spinning else "0")
    join_arena(options)
    return options


def interface(session: Any) -> list[list[tuple[str, str, list[int | str | None]]]]:
    """What a session declares: inputs, outputs, and initializers that a caller could give instead."""
    kinds = session.get_inputs(), session.get_outputs(), session.get_overridable_initializers()
    return [[(each.name, each.type, list(each.shape)) for each in ports] for ports in kinds]


def is_want_of_memory(error: Exception) -> bool:
    """Whether there was no room to run, on the host or the GPU: with fewer rows there may be."""
    return isinstance(error, MemoryError) or _WANT_OF_MEMORY.search(str(error)) is not None


def is_device_failure(error: Exception) -> bool:
    """Whether the GPU has failed, and nothing that this process has on it can be relied on. (A model may ask of cuDNN
    what that cannot do: this is the model's failure.)"""
    return not is_want_of_memory(error) and _DEVICE_FAILURE.search(str(error)) is not None


def brief(error: Exception) -> str:
    """What an error of ONNX Runtime says to a user, in one line."""
    # What is said of a file may hold bytes that are no text: Python 3.11.2 then has the error without its words, later
    # ones have this instead of the error.
    text = str(error)
    if isinstance(error, UnicodeDecodeError) and error.object.startswith(b"[ONNXRuntimeError]"):
        text = error.object.decode("utf-8", "replace")
    told = " ".join(_NOISE.sub("", text).split())[:1000] or type(error).__name__
    if _ARENA_IS_FULL in told:
        told += "; raise [worker] run_bytes_max, or lower the model's max_batch_size"
    return told


def _check_ranks(path: Path, session: Any) -> None:
    """Raises LoadError for an input that may have any number of dimensions: to ONNX Runtime it looks like a scalar."""
    if all(each.shape for each in session.get_inputs()):
        return
    try:
        ports = {port.name: port for port in read_onnx(path).inputs}
    except OnnxFileError:
        return  # it has been loaded, so there is nothing wrong with it that matters here
    for each in session.get_inputs():
        if each.name in ports and ports[each.name].kind == "tensor" and ports[each.name].shape is None:
            raise LoadError(
                f"input '{each.name}' is declared without a shape, so what comes cannot be checked; export it with "
                "one, whose dimensions may be symbolic"
            )


def _spec(kind: str, about: Any) -> TensorSpec:
    datatype = _DATATYPES.get(about.type)
    if datatype is None:
        hint = next((hint for start, hint in _HINTS.items() if about.type.startswith(start)), "")
        raise LoadError(
            f"{kind} '{about.name}' is of type {about.type}, which the v2 protocol has no datatype for{hint}"
        )
    if len(about.name) > MAX_NAME or len(about.shape) > MAX_DIMS:
        limits = f"{MAX_NAME} characters of a name and {MAX_DIMS} dimensions"
        raise LoadError(f"{kind} '{about.name[:40]}...' with {len(about.shape)} dimensions exceeds {limits}")
    return TensorSpec(about.name, datatype, tuple(dim if type(dim) is int and dim >= 0 else -1 for dim in about.shape))


def _why_alone(inputs: Sequence[Any], outputs: Sequence[Any]) -> str:
    """Why the shapes rule out batches, or ""."""
    if not inputs:
        return "it has no inputs"
    for kind, tensors in (("input", inputs), ("output", outputs)):
        for each in tensors:
            if not each.shape:
                return f"{kind} '{each.name}' has no dimensions"
            if type(each.shape[0]) is int:
                return f"the first dimension of {kind} '{each.name}' is fixed at {each.shape[0]}"
    return ""


def _bits(value: Any) -> Array:
    """The bits of a bfloat16 OrtValue, copied."""
    shape = value.shape()
    raw = ctypes.string_at(value.data_ptr(), 2 * int(np.prod(shape, dtype=np.int64)))
    return np.frombuffer(raw, "<u2").reshape(shape)
