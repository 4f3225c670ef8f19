"""Triton's classification extension: the highest values of an output, and which classes they are.

https://github.com/triton-inference-server/server/blob/main/docs/protocol/extension_classification.md has it. An output
with the parameter ``classification = n`` is answered as strings "value:index" or "value:index:label", n for each row,
or fewer where there are not so many values, the highest first; of equal ones the first, and what is no number last.
Values are written as Triton writes them: whole numbers as they are, others with six decimals.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any, Final, NamedTuple

import numpy as np

from penstock.wire.codec import pack_outcome, unpack_outcome
from penstock.wire.datatypes import element_count
from penstock.wire.errors import BAD_INPUT, BadMessage, PenstockError
from penstock.wire.messages import Outcome, Payload
from penstock.wire.models import ModelSpec, Tensor
from penstock.wire.tensors import Array, Buffer, decode, pack_strings

COUNT_MAX: Final = (1 << 31) - 1
_UNRANKED: Final = frozenset({"BYTES", "BOOL"})
_LABELS_KEPT: Final = 64  # models' labels that are kept apart


class Classes(NamedTuple):
    """How many of an output are asked for, and what each is called: a line each, or ""."""

    most: int
    labels: str


def read_classes(spec: ModelSpec, name: str, count: Any) -> Classes:
    """What a request says of an output of a model. Raises PenstockError."""
    if type(count) is not int or not 1 <= count <= COUNT_MAX:
        raise PenstockError(
            BAD_INPUT,
            f"output '{name}': 'classification' is how many classes to tell, a whole number from 1 to {COUNT_MAX}",
        )
    output = next((each for each in spec.outputs if each.name == name), None)
    if output is not None and output.datatype in _UNRANKED:
        raise PenstockError(
            BAD_INPUT,
            f"class result not available for output '{name}' due to unsupported type '{output.datatype}'; ask for it "
            "without 'classification'",
        )
    return Classes(count, dict(spec.labels).get(name, ""))


def classify(wanted: Mapping[str, Classes], rows: bool, body: bytes, payload: Payload) -> tuple[bytes, Payload]:
    """An answer with classes in place of some of its outputs. ``rows``: their first dimension counts rows. Raises
    BadMessage or PenstockError."""
    outcome, view = unpack_outcome(body), memoryview(payload)
    tensors: list[Tensor] = []
    parts: list[Buffer] = []
    at = 0
    for tensor in outcome.tensors:
        name, datatype, shape, offset, nbytes = tensor
        part: Buffer = view[offset : offset + nbytes]
        if len(part) != nbytes:
            raise BadMessage(f"an output lies from {offset} to {offset + nbytes} in a payload of {len(payload)} bytes")
        classes = wanted.get(name)
        if classes is not None:
            number = shape[0] if rows and shape else 1
            values = decode(datatype, shape, part).reshape(number, element_count(shape) // number if number else 0)
            count = min(classes.most, values.shape[1])
            datatype, shape = "BYTES", (number, count) if rows else (count,)
            part = pack_strings(_rank(values, count, _named(classes.labels)))
        tensors.append(Tensor(name, datatype, tuple(shape), at, len(part)))
        parts.append(part)
        at += len(part)
    return pack_outcome(Outcome(outcome.model, outcome.version, tuple(tensors))), b"".join(parts)


@lru_cache(maxsize=_LABELS_KEPT)
def _named(labels: str) -> tuple[str, ...]:
    return tuple(labels.split("\n")) if labels else ()


def _rank(values: Array, count: int, labels: tuple[str, ...]) -> list[str]:
    """``values``: a row for each row, with what each class has."""
    if values.dtype.kind == "f":
        keys = np.where(np.isnan(values), -np.inf, values)
        form = "%f:%d"
    else:
        keys, form = values, "%d:%d"
    found: list[str] = []
    for row, key in zip(values, keys, strict=True):
        for index in _highest(key, count).tolist():
            told = form % (row[index], index)
            label = labels[index] if index < len(labels) else ""
            found.append(f"{told}:{label}" if label else told)
    return found


def _highest(key: Array, count: int) -> Array:
    """The indices of the highest values, the highest first, of equal ones the first."""
    if count < len(key):
        # What is as high as the last of them may be there more often than there is room.
        least = np.partition(key, len(key) - count)[len(key) - count]
        above = np.flatnonzero(key > least)
        chosen = np.concatenate([above, np.flatnonzero(key == least)[: count - len(above)]])
    else:
        chosen = np.arange(len(key))
    # Ascending and turned around, of the values turned around, equal ones stay in order, also of unsigned numbers.
    order = np.argsort(key[chosen][::-1], kind="stable")[::-1]
    return chosen[len(chosen) - 1 - order]
