"""Between numpy arrays and what travels: a request's form and payload, an answer's tensors."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any, Final, NamedTuple

import numpy as np

from penstock.wire.codec import pack_layout, unpack_outcome
from penstock.wire.datatypes import ITEM_SIZES, element_count
from penstock.wire.errors import BAD_INPUT, PenstockError
from penstock.wire.messages import UNNAMED, Form, Outcome, Payload
from penstock.wire.models import Layout, ModelSpec, Tensor, Unnamed, check, check_declaration
from penstock.wire.tensors import DTYPES, Array, Buffer, datatype_of, decode, encode

_FORMS_MAX: Final = 1024
_PLAIN_MAX_BYTES: Final = 4096  # of outputs that share the memory that they are copied into

# What a list must not hold if it is to become an array of a kind: numpy would cut 1.5 to 1, and read "1" as a number.
_UNFIT: Final = {"b": "fcSU", "i": "fcSU", "u": "fcSU", "f": "cSU"}
_KINDS: Final = {"f": "numbers with a fraction", "c": "complex numbers", "S": "strings", "U": "strings"}


class Forms:
    """Builds requests for models, and remembers the forms of those that were built before: requests of the same form
    travel together only if it is the same object."""

    def __init__(self) -> None:
        self._known: dict[tuple[Layout, int, str], tuple[ModelSpec, Form]] = {}

    def build(
        self, spec: ModelSpec, inputs: Mapping[str, Any], outputs: Sequence[str], priority: int = 0, tenant: str = ""
    ) -> tuple[Form, Sequence[Buffer]]:
        """The form and the payload of a request, in parts, which may be the inputs' own memory. Raises PenstockError
        naming the input that does not fit."""
        if not hasattr(inputs, "items"):
            names = [each.name for each in spec.inputs]
            raise PenstockError(
                BAD_INPUT, f"the inputs of '{spec.name}' are arrays by name, {names}; {type(inputs).__name__} has none"
            )
        expected = {each.name: each.datatype for each in spec.inputs}
        tensors: list[Tensor] = []
        parts: list[Buffer] = []
        at = 0
        for name, value in inputs.items():
            array, datatype = as_array(name, value, expected.get(name))
            try:
                part = encode(array, datatype)
            except (PenstockError, UnicodeEncodeError) as error:
                raise PenstockError(BAD_INPUT, f"input '{name}': {error}") from None
            tensors.append(Tensor(name, datatype, array.shape, at, len(part)))
            parts.append(part)
            at += len(part)
        return self.find(spec, Layout(tuple(tensors), tuple(outputs)), at, priority, tenant), parts

    def find(self, spec: ModelSpec, layout: Layout, nbytes: int, priority: int = 0, tenant: str = "") -> Form:
        """The form of requests with this layout and payload bytes. Raises PenstockError when they do not fit the
        model."""
        key = layout, priority, tenant
        known = self._known.get(key)
        if known is not None and known[0] is spec and known[1].nbytes == nbytes:
            return known[1]
        form = make_form(spec, layout, nbytes, priority, tenant)
        if len(self._known) >= _FORMS_MAX:
            self._known.clear()
        self._known[key] = spec, form
        return form


def make_form(spec: ModelSpec, layout: Layout, nbytes: int, priority: int = 0, tenant: str = "") -> Form:
    """The form of requests with this layout. Raises PenstockError when they do not fit the model."""
    for tensor in layout.tensors:
        check_declaration(tensor.name, tensor.datatype, tensor.shape)
    rows, key = check(spec, layout)
    version = UNNAMED + spec.version if type(spec) is Unnamed else spec.version
    return Form(spec.name, version, priority, tenant, rows, nbytes, key, pack_layout(layout))


def in_sequence(form: Form, sequence: str, phase: int) -> Form:
    """The form of one request of a sequence; "": of none. No other request has it, so that each goes by itself."""
    return form._replace(sequence=sequence, phase=phase) if sequence else form


def as_array(name: str, value: Any, datatype: str | None) -> tuple[Array, str]:
    """A value as an array and its datatype: lists become what the model expects, arrays say themselves what they
    are."""
    if not isinstance(value, np.ndarray) and not isinstance(value, np.generic):
        dtype = DTYPES.get(datatype or "")
        if datatype == "BF16":
            dtype = np.dtype("<f4")
        try:
            value = _made(value, dtype)
        except (ValueError, TypeError, ArithmeticError) as error:
            wanted = f" of {datatype}" if datatype else ""
            raise PenstockError(BAD_INPUT, f"input '{name}' cannot be made an array{wanted}: {error}") from None
    array = np.asarray(value)
    if datatype == "BF16" and array.dtype.newbyteorder("<") == DTYPES["FP32"]:
        return array, "BF16"
    try:
        return array, datatype_of(array)
    except PenstockError as error:
        raise PenstockError(error.code, f"input '{name}': {error.message}") from None


def _made(value: Any, dtype: np.dtype[Any] | None) -> Array:
    """Raises TypeError, ValueError or ArithmeticError for what does not fit the type."""
    with np.errstate(over="raise"):
        made = np.asarray(value, dtype)
    if made.size and made.dtype.kind in _UNFIT:
        kind = np.asarray(value).dtype.kind
        if kind in _UNFIT[made.dtype.kind]:
            raise TypeError(f"it holds {_KINDS[kind]}")
    return made


class _Plain(NamedTuple):
    """Tensors of at most _PLAIN_MAX_BYTES together that are copied at once, or one of any size."""

    nbytes: int
    tensors: tuple[tuple[str, tuple[int, ...], np.dtype[Any], int], ...]  # name, shape, dtype, offset


@lru_cache(maxsize=1024)
def _outcome(body: bytes) -> tuple[Outcome, _Plain | None]:
    """An outcome, and how to copy its tensors in one piece, where that is possible."""
    outcome = unpack_outcome(body)
    end = max([tensor.offset + tensor.nbytes for tensor in outcome.tensors], default=0)
    if len(outcome.tensors) != 1 and end > _PLAIN_MAX_BYTES:
        return outcome, None
    tensors = []
    for name, datatype, shape, offset, nbytes in outcome.tensors:
        size = ITEM_SIZES[datatype]
        if datatype in ("BYTES", "BF16") or not nbytes or nbytes != element_count(shape) * size or offset % size:
            return outcome, None
        tensors.append((name, shape, DTYPES[datatype], offset))
    return outcome, _Plain(end, tuple(tensors))


def decode_outcome(
    body: bytes, payload: Payload, copy: bool = True, let_go: Callable[[], None] | None = None
) -> tuple[Outcome, dict[str, Array]]:
    """An answer's tensors by name, copied out of the payload, or read-only views of it. ``let_go`` is called once the
    payload is not read any more. Raises BadMessage or PenstockError."""
    if let_go is not None:
        payload = np.frombuffer(payload, np.uint8)  # all that is made of it below holds on to it
        weakref.finalize(payload, let_go).atexit = False
    outcome, plain = _outcome(body)
    if plain is not None and copy and len(payload) >= plain.nbytes:
        memory = bytearray(payload)
        arrays = {}
        for name, shape, dtype, at in plain.tensors:  # not a comprehension, which is a function of its own
            arrays[name] = np.ndarray(shape, dtype, memory, at)
        return outcome, arrays
    view = memoryview(payload)
    outputs = {
        name: decode(datatype, shape, view[offset : offset + nbytes])
        for name, datatype, shape, offset, nbytes in outcome.tensors
    }
    return outcome, {name: np.array(output) for name, output in outputs.items()} if copy else outputs
