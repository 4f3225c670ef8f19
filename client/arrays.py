"""Between numpy arrays and what travels: a request's form and payload, an answer's tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, Final

import numpy as np

from penstock.wire.codec import pack_layout, unpack_outcome
from penstock.wire.errors import BAD_INPUT, PenstockError
from penstock.wire.messages import Form, Outcome, Payload
from penstock.wire.models import Layout, ModelSpec, Tensor, check, check_declaration
from penstock.wire.tensors import DTYPES, Array, datatype_of, decode, encode

_FORMS_MAX: Final = 1024


class Forms:
    """Builds requests for models, and remembers the forms of those that were built before."""

    def __init__(self) -> None:
        self._known: dict[tuple[ModelSpec, Layout], Form] = {}

    def build(self, spec: ModelSpec, inputs: Mapping[str, Any], outputs: Sequence[str]) -> tuple[Form, bytes]:
        """The form and payload (a copy) of a request. Raises PenstockError naming the input that does not fit."""
        expected = {each.name: each.datatype for each in spec.inputs}
        tensors, parts, at = [], [], 0
        for name, value in inputs.items():
            array, datatype = _as_array(name, value, expected.get(name))
            part = encode(array, datatype)
            tensors.append(Tensor(name, datatype, array.shape, at, len(part)))
            parts.append(part)
            at += len(part)
        return self._form(spec, Layout(tuple(tensors), tuple(outputs)), at), b"".join(parts)

    def _form(self, spec: ModelSpec, layout: Layout, nbytes: int) -> Form:
        key = (spec, layout)
        form = self._known.get(key)
        if form is None:
            form = make_form(spec, layout, nbytes)
            if len(self._known) >= _FORMS_MAX:
                self._known.clear()
            self._known[key] = form
        return form


def make_form(spec: ModelSpec, layout: Layout, nbytes: int, priority: int = 0, tenant: str = "") -> Form:
    """The form of requests with this layout. Raises PenstockError when they do not fit the model."""
    for tensor in layout.tensors:
        check_declaration(tensor.name, tensor.datatype, tensor.shape)
    rows, key = check(spec, layout)
    return Form(spec.name, spec.version, priority, tenant, rows, nbytes, key, pack_layout(layout))


def _as_array(name: str, value: Any, datatype: str | None) -> tuple[Array, str]:
    """A value as an array and its datatype: lists become what the model expects, arrays say themselves what they
    are."""
    if not isinstance(value, np.ndarray) and not isinstance(value, np.generic):
        dtype = DTYPES.get(datatype or "")
        if datatype == "BF16":
            dtype = np.dtype("<f4")
        try:
            value = np.asarray(value, dtype)
        except (ValueError, TypeError, OverflowError) as error:
            wanted = f" of {datatype}" if datatype else ""
            raise PenstockError(BAD_INPUT, f"input '{name}' cannot be made an array{wanted}: {error}") from None
    array = np.asarray(value)
    if datatype == "BF16" and array.dtype == np.float32:
        return array, "BF16"
    try:
        return array, datatype_of(array)
    except PenstockError as error:
        raise PenstockError(error.code, f"input '{name}': {error.message}") from None


@lru_cache(maxsize=1024)
def _outcome(body: bytes) -> Outcome:
    return unpack_outcome(body)


def decode_outcome(body: bytes, payload: Payload) -> tuple[Outcome, dict[str, Array]]:
    """An answer's tensors by name, copied out of the payload. Raises BadMessage or PenstockError."""
    outcome = _outcome(body)
    view = memoryview(payload)
    return outcome, {
        name: np.array(decode(datatype, shape, view[offset : offset + nbytes]))
        for name, datatype, shape, offset, nbytes in outcome.tensors
    }
