"""What callers know of a model, and the one check of a request against it.

The gateway and the client library make the check so that a bad request costs no hop; the worker makes it again, because
it trusts no caller. The texts are those of Triton where clients are known to match them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Final, NamedTuple

from penstock.wire.datatypes import DATATYPES, ITEM_SIZES, MAX_DIMS, MAX_ELEMENTS, element_count
from penstock.wire.errors import BAD_INPUT, PenstockError

LOADING: Final = "LOADING"
READY: Final = "READY"
UNAVAILABLE: Final = "UNAVAILABLE"
IDLE: Final = "IDLE"  # not in memory; it is loaded when it is asked for
STATES: Final = frozenset({LOADING, READY, UNAVAILABLE, IDLE})
SERVED: Final = frozenset({READY, IDLE})  # states of what can be asked

MAX_TENSORS: Final = 1024  # inputs or outputs of a model
MAX_LABELS: Final = 512 * 1024  # characters, of all classes of a model
MAX_ROUTES: Final = 64  # versions, labels and parts of a Route
WHOLE: Final = 100  # what the parts of the traffic add up to


class TensorSpec(NamedTuple):
    """An input or output of a model. ``shape``: -1 is a dimension of any size."""

    name: str
    datatype: str
    shape: tuple[int, ...]


class ModelSpec(NamedTuple):
    """One version of a model. ``batchable``: the first dimension counts rows that do not see each other, so that rows
    of several requests run together, at most ``max_batch_size`` at once; otherwise each request runs alone.

    ``build``: "" where answers are not to be cached. A worker tells a digest of what it has loaded; callers are told a
    token of the broker's, which is another as soon as any worker serves other content under the same version.
    ``labels``: of outputs that tell classes apart, by the output's name: what each class is called, a line each.
    """

    name: str
    version: str
    platform: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    batchable: bool
    max_batch_size: int
    build: str = ""
    labels: tuple[tuple[str, str], ...] = ()


class Unnamed(ModelSpec):
    """Of the version that is current, for a request that names none."""

    __slots__ = ()


class ModelState(NamedTuple):
    """How a version fares, on one worker or (as callers see it) on the whole server.

    ``reason`` is why it is UNAVAILABLE, or why it is not batchable, or what else there is to say of it; ``spec`` is
    None until it has been loaded once.
    """

    name: str
    version: str
    state: str
    reason: str
    spec: ModelSpec | None


class Route(NamedTuple):
    """Which versions of a model requests mean. ``versions``: those that are asked for where none is named, the best
    first: a worker tells those of its repository, the broker the one that is served, or none. ``labels``: names of
    versions, as pairs of a label and a version. ``traffic``: to which labels or versions what names none goes, and how
    much of it in percent; none: to the first of ``versions``."""

    name: str
    versions: tuple[str, ...] = ()
    labels: tuple[tuple[str, str], ...] = ()
    traffic: tuple[tuple[str, int], ...] = ()

    @property
    def wanted(self) -> set[str]:
        """All versions that it speaks of."""
        labels = dict(self.labels)
        return {*self.versions, *labels.values(), *[labels.get(each, each) for each, _ in self.traffic]}


class Load(NamedTuple):
    """A model that is to be served where that is said by order. ``config``: in place of its own configuration, as
    JSON; "": none."""

    name: str
    config: str = ""


class Tensor(NamedTuple):
    """A tensor of a request or an answer: ``nbytes`` bytes from ``offset`` on in its payload."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


class Layout(NamedTuple):
    """How a request lies in its payload, and which outputs it wants (none named: all of them)."""

    tensors: tuple[Tensor, ...]
    outputs: tuple[str, ...] = ()


class Size(NamedTuple):
    """What a layout means to the scheduler: its rows, and the key of the requests that it can share a batch with."""

    rows: int
    key: bytes


def is_alike(one: ModelSpec, other: ModelSpec) -> bool:
    """Whether what fits one version fits another, but for how many rows there may be."""
    return (one.inputs, one.outputs, one.batchable) == (other.inputs, other.outputs, other.batchable)


def newest(versions: Sequence[str]) -> str:
    """The highest of some versions: by number where they are numbers, which sort after names."""
    return max(
        versions,
        key=lambda version: (version.isdecimal(), int(version) if version.isdecimal() else 0, version),
    )


def place(state: ModelState) -> tuple[str, bool, int, str]:
    """Where a version stands in a list: by name, then by number, and then what is none."""
    version = state.version
    is_number = version.isdecimal()
    return state.name, not is_number, int(version) if is_number else 0, version


def check(spec: ModelSpec, layout: Layout) -> Size:
    """Whether a request fits a model. Raises PenstockError naming the tensor, what was expected and what came."""
    given = {tensor.name: tensor for tensor in layout.tensors}
    _check_names(spec, layout, given)
    for expected in spec.inputs:
        _check_tensor(spec, expected, given[expected.name])
    if not spec.batchable:
        return Size(1, b"")
    rows = given[spec.inputs[0].name].shape[0]
    dynamic: list[str] = []
    for expected in spec.inputs:
        shape = given[expected.name].shape
        if shape[0] != rows:
            raise PenstockError(
                BAD_INPUT,
                f"input '{expected.name}' batch size does not match other inputs for '{spec.name}': "
                f"{shape[0]} and {rows}",
            )
        if -1 in expected.shape[1:]:
            dynamic.append(",".join(map(str, shape[1:])))
    if rows < 1:
        raise PenstockError(BAD_INPUT, f"a request for '{spec.name}' needs at least one row, and has none")
    if rows > spec.max_batch_size:
        raise PenstockError(
            BAD_INPUT,
            f"inference request batch-size must be <= {spec.max_batch_size} for '{spec.name}', and is {rows}; "
            "split the request, or raise max_batch_size in the model's model.toml",
        )
    return Size(rows, ";".join(dynamic).encode())


def _check_names(spec: ModelSpec, layout: Layout, given: dict[str, Tensor]) -> None:
    expected = [tensor.name for tensor in spec.inputs]
    got = [tensor.name for tensor in layout.tensors]
    if len(given) != len(got):
        [(twice, _)] = Counter(got).most_common(1)
        raise PenstockError(BAD_INPUT, f"input '{twice}' already exists in request for model '{spec.name}'")
    missing = [name for name in expected if name not in given]
    if missing:
        raise PenstockError(
            BAD_INPUT,
            f"expected {len(expected)} inputs but got {len(got)} inputs for model '{spec.name}'. "
            f"Got input(s) {got}, but missing required input(s) {missing}. Please provide all required input(s).",
        )
    if len(got) != len(expected):
        extra = next(name for name in got if name not in expected)
        raise PenstockError(
            BAD_INPUT,
            f"unexpected inference input '{extra}' for model '{spec.name}'; its inputs are {expected}",
        )
    outputs = [tensor.name for tensor in spec.outputs]
    for at, name in enumerate(layout.outputs):
        if name not in outputs:
            raise PenstockError(
                BAD_INPUT,
                f"unexpected inference output '{name}' for model '{spec.name}'; its outputs are {outputs}",
            )
        if name in layout.outputs[:at]:
            raise PenstockError(BAD_INPUT, f"output '{name}' already exists in request for model '{spec.name}'")


def _check_tensor(spec: ModelSpec, expected: TensorSpec, tensor: Tensor) -> None:
    name, shape = tensor.name, tensor.shape
    if tensor.datatype != expected.datatype:
        raise PenstockError(
            BAD_INPUT,
            f"inference input '{name}' data-type is '{tensor.datatype}', but model '{spec.name}' expects "
            f"'{expected.datatype}'",
        )
    if len(shape) != len(expected.shape) or any(
        want not in (-1, dim) for want, dim in zip(expected.shape, shape, strict=True)
    ):
        raise PenstockError(
            BAD_INPUT,
            f"unexpected shape for input '{name}' for model '{spec.name}'. Expected {list(expected.shape)}, "
            f"got {list(shape)}",
        )
    if tensor.datatype == "BYTES":
        # Each element takes at least its length: a shape that claims more is refused before anything is sized by it.
        if tensor.nbytes < 4 * element_count(shape):
            raise PenstockError(
                BAD_INPUT, f"input '{name}' of shape {list(shape)} has too few bytes of data: {tensor.nbytes}"
            )
        return
    takes = element_count(shape) * ITEM_SIZES[tensor.datatype]
    if tensor.nbytes != takes:
        raise PenstockError(
            BAD_INPUT,
            f"input '{name}' of shape {list(shape)} and data-type {tensor.datatype} takes {takes} bytes, "
            f"and {tensor.nbytes} came",
        )


def check_declaration(name: str, datatype: str, shape: Sequence[int]) -> None:
    """Whether a tensor that a user declared can exist at all. Raises PenstockError."""
    if datatype not in DATATYPES:
        raise PenstockError(
            BAD_INPUT,
            f"input '{name}' has the unknown data-type '{datatype:.40}'; known are {', '.join(sorted(DATATYPES))}",
        )
    if len(shape) > MAX_DIMS:
        raise PenstockError(BAD_INPUT, f"input '{name}' has {len(shape)} dimensions; at most {MAX_DIMS} are allowed")
    for dim in shape:
        if type(dim) is not int or not 0 <= dim <= MAX_ELEMENTS:
            raise PenstockError(
                BAD_INPUT,
                f"the shape of input '{name}' holds {repr(dim)[:40]}; a dimension is a whole number, 0 or more",
            )
    if element_count(shape) > MAX_ELEMENTS:
        raise PenstockError(BAD_INPUT, f"byte size overflow for input '{name}' of shape {list(shape)}")
