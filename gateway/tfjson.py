"""TensorFlow Serving's JSON: requests to a model's tensors, and answers in the form that was asked in. Pure.

A model served there has signatures, and says what may be asked of it. An ONNX model has inputs and outputs, which make
one: ``serving_default``. What they mean to ``:classify`` and ``:regress`` follows from their types and shapes alone.

Source: https://github.com/tensorflow/serving/blob/master/tensorflow_serving/g3doc/api_rest.md; the sentences are those
of its json_tensor.cc where they say enough.
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Iterable, Sequence
from functools import lru_cache, partial
from typing import Any, Final, NamedTuple

import numpy as np
import orjson

from penstock.gateway.inference import Write
from penstock.gateway.jsondata import flatten, loads, pack_elements
from penstock.wire.codec import unpack_outcome
from penstock.wire.datatypes import MAX_DIMS
from penstock.wire.errors import BAD_INPUT, BadMessage, PenstockError
from penstock.wire.messages import Outcome, Payload
from penstock.wire.models import Layout, ModelSpec, Tensor, TensorSpec
from penstock.wire.tensors import Array, Buffer, decode

SIGNATURE: Final = "serving_default"
TYPES: Final = {
    "BOOL": "DT_BOOL",
    "UINT8": "DT_UINT8",
    "UINT16": "DT_UINT16",
    "UINT32": "DT_UINT32",
    "UINT64": "DT_UINT64",
    "INT8": "DT_INT8",
    "INT16": "DT_INT16",
    "INT32": "DT_INT32",
    "INT64": "DT_INT64",
    "FP16": "DT_HALF",
    "BF16": "DT_BFLOAT16",
    "FP32": "DT_FLOAT",
    "FP64": "DT_DOUBLE",
    "BYTES": "DT_STRING",
}
_FLOATS: Final = frozenset({"FP16", "BF16", "FP32", "FP64"})
_BASE64: Final = "b64"
_BYTES_END: Final = "_bytes"  # of the names of outputs that are answered in base64
_OUTCOMES_MAX: Final = 1024  # that are remembered
_SHOWN_MAX: Final = 100  # characters of what is refused


class Question(NamedTuple):
    """An inference request: its tensors, where they lie, and how its answer is written."""

    layout: Layout
    payload: bytes
    write: Write


def read_predict(spec: ModelSpec, body: Buffer) -> Question:
    """Rows, or columns. Raises PenstockError."""
    request = _read(body)
    if "instances" in request:
        if "inputs" in request:
            raise _bad("Not formatted correctly expecting only one of 'inputs' or 'instances' keys to exist")
        return _question(spec, _from_rows(spec, request["instances"]), write_rows)
    if "inputs" not in request:
        raise _bad("Missing 'inputs' or 'instances' key")
    return _question(spec, _from_columns(spec, request["inputs"]), write_columns)


def _read(body: Buffer) -> dict[str, Any]:
    request = loads(body)
    if type(request) is not dict:
        raise _bad("the request is not a JSON object")
    name = request.get("signature_name", "")
    if type(name) is not str:
        raise _bad("'signature_name' is a string")
    if name not in ("", SIGNATURE):
        raise _bad(f'Serving signature key "{name[:_SHOWN_MAX]}" not found; there is one, "{SIGNATURE}"')
    return request


def _bad(sentence: str) -> PenstockError:
    return PenstockError(BAD_INPUT, sentence)


# --- rows and columns ---


def _from_rows(spec: ModelSpec, rows: Any) -> dict[str, Any]:
    """The values of each input, a row after another."""
    if type(rows) is not list or not rows:
        raise _bad("'instances' is a list of at least one row")
    names = [each.name for each in spec.inputs]
    if not _is_object(rows[0]):
        if len(names) != 1:
            raise _bad(
                "instances is a plain list, but expecting list of objects as multiple input tensors required as per "
                f"tensorinfo_map; the inputs of '{spec.name}' are {names}"
            )
        return {names[0]: rows}
    wanted = set(names)
    for at, row in enumerate(rows):
        if not _is_object(row):
            raise _bad(f"Expecting object but got list at item {at} of input list 'instances'")
        if row.keys() != wanted:
            keys = str(list(row))[:_SHOWN_MAX]
            raise _bad(
                f"Failed to process element: {at} of 'instances' list. JSON object: {keys} keys must be equal to: "
                f"{','.join(sorted(wanted))}"
            )
    return {name: [row[name] for row in rows] for name in names}


def _from_columns(spec: ModelSpec, columns: Any) -> dict[str, Any]:
    names = [each.name for each in spec.inputs]
    if not _is_object(columns):
        if len(names) != 1:
            raise _bad(
                "inputs is a plain value/list, but expecting an object as multiple input tensors required as per "
                f"tensorinfo_map; the inputs of '{spec.name}' are {names}"
            )
        return {names[0]: columns}
    for name in names:
        if name not in columns:
            raise _bad(f"Missing named input: {name} in 'inputs' object.")
    return {name: columns[name] for name in names}


def _is_object(value: Any) -> bool:
    """Whether it names inputs."""
    return type(value) is dict and value.keys() != {_BASE64}


def _question(spec: ModelSpec, values: dict[str, Any], write: Write) -> Question:
    shapes: list[Sequence[int]] = []
    parts: list[list[Any]] = []
    for name, value in values.items():
        shape = _shape(name, value)
        shapes.append(shape)
        parts.append(flatten(name, shape, value) if shape else [value])
    return _packed(spec, shapes, parts, (), write)


def _packed(
    spec: ModelSpec, shapes: list[Sequence[int]], parts: list[list[Any]], outputs: tuple[str, ...], write: Write
) -> Question:
    """``shapes``, ``parts``: of each input, with its elements in the order in which they lie."""
    tensors: list[Tensor] = []
    packed: list[bytes] = []
    at = 0
    for each, shape, flat in zip(spec.inputs, shapes, parts, strict=True):
        if each.datatype == "BYTES":
            flat = [_binary(each.name, value) if type(value) is dict else value for value in flat]
        data = pack_elements(each.name, each.datatype, flat)
        tensors.append(Tensor(each.name, each.datatype, tuple(shape), at, len(data)))
        packed.append(data)
        at += len(data)
    return Question(Layout(tuple(tensors), outputs), packed[0] if len(packed) == 1 else b"".join(packed), write)


def _shape(name: str, value: Any) -> list[int]:
    """What the first of the nested lists say; the others are held to it."""
    shape: list[int] = []
    while type(value) is list:
        shape.append(len(value))
        if len(shape) > MAX_DIMS:
            raise _bad(f"input '{name}' has more than {MAX_DIMS} dimensions")
        value = value[0] if value else None
    return shape


def _binary(name: str, value: dict[str, Any]) -> bytes:
    text = value.get(_BASE64)
    if len(value) != 1 or type(text) is not str:
        raise _bad(f"""the data of input '{name}' holds an object that is not {{"b64": "..."}}""")
    try:
        return base64.b64decode(text + "=" * (-len(text) % 4), validate=True)
    except ValueError:
        raise _bad(f"the data of input '{name}' holds a 'b64' that is not base64") from None


# --- examples ---


def read_classify(spec: ModelSpec, body: Buffer) -> Question:
    """Raises PenstockError, also for a model that cannot be asked for classes."""
    matrices = [each for each in spec.outputs if len(each.shape) == 2]
    scores = _one([each for each in matrices if each.datatype in _FLOATS], "scores")
    if scores is None:
        raise _bad(
            f"model '{spec.name}' cannot be asked to classify: that takes one output of floats of shape [rows, "
            f"classes], or one that is named 'scores', and its outputs are {_described(spec.outputs)}; use :predict"
        )
    labels = _one([each for each in matrices if each.datatype == "BYTES"], "classes")
    wanted = (scores.name,) if labels is None else (scores.name, labels.name)
    return _examples(spec, _read(body), "classify", wanted, partial(write_classes, wanted))


def read_regress(spec: ModelSpec, body: Buffer) -> Question:
    """Raises PenstockError, also for a model that cannot be asked for a number."""
    numbers = [
        each
        for each in spec.outputs
        if each.datatype in _FLOATS and each.shape and all(dim == 1 for dim in each.shape[1:])
    ]
    value = _one(numbers, "outputs")
    if value is None:
        raise _bad(
            f"model '{spec.name}' cannot be asked to regress: that takes one output of floats of shape [rows] or "
            f"[rows, 1], or one that is named 'outputs', and its outputs are {_described(spec.outputs)}; use :predict"
        )
    return _examples(spec, _read(body), "regress", (value.name,), write_numbers)


def _one(tensors: Sequence[TensorSpec], name: str) -> TensorSpec | None:
    """The only one, or the one of this name."""
    found = tensors if len(tensors) == 1 else [each for each in tensors if each.name == name]
    return found[0] if found else None


def _described(tensors: Iterable[TensorSpec]) -> str:
    return ", ".join(f"'{each.name}' ({each.datatype} {list(each.shape)})" for each in tensors)


def _examples(spec: ModelSpec, request: dict[str, Any], verb: str, outputs: tuple[str, ...], write: Write) -> Question:
    for each in spec.inputs:
        if not each.shape or each.shape[0] != -1 or each.shape[1:].count(-1) > 1:
            raise _bad(
                f"model '{spec.name}' cannot be asked to {verb}: examples are rows of features, and its input is "
                f"{_described([each])}; use :predict"
            )
    context = request.get("context", {})
    examples = request.get("examples")
    if type(context) is not dict:
        raise _bad("'context' is a JSON object of features")
    if type(examples) is not list or not examples:
        raise _bad("'examples' is a list of at least one example")
    for at, example in enumerate(examples):
        if type(example) is not dict:
            raise _bad(f"Example must be JSON object; 'examples' has another value at {at}")
    shapes: list[Sequence[int]] = []
    parts: list[list[Any]] = []
    for each in spec.inputs:
        rows = [_feature(each, at, example, context) for at, example in enumerate(examples)]
        shapes.append((len(rows), *_row_shape(each, rows)))
        parts.append([value for row in rows for value in row])
    return _packed(spec, shapes, parts, outputs, write)


def _feature(each: TensorSpec, at: int, example: dict[str, Any], context: dict[str, Any]) -> list[Any]:
    """One input's values in one example: a list of them, or the only one."""
    name = each.name
    if name in example:
        value = example[name]
    elif name in context:
        value = context[name]
    else:
        raise _bad(f"Feature: {name} is missing in example {at}, and in 'context'")
    return value if type(value) is list else [value]


def _row_shape(each: TensorSpec, rows: list[list[Any]]) -> tuple[int, ...]:
    """As an example's values lie in the input."""
    count, rest = len(rows[0]), each.shape[1:]
    known = math.prod(dim for dim in rest if dim != -1)
    for at, row in enumerate(rows):
        if len(row) != count:
            raise _bad(f"Feature: {each.name} has {count} values in example 0, and {len(row)} in example {at}")
    if -1 in rest:
        free = count // known if known else 0
        shape = tuple([free if dim == -1 else dim for dim in rest])
    else:
        shape = rest
    if math.prod(shape) != count:
        raise _bad(f"Feature: {each.name} has {count} values in each example; the input takes {list(rest)}")
    return shape


# --- answers ---


def write_rows(body: bytes, payload: Payload) -> bytes:
    """Raises BadMessage, and PenstockError for outputs that have no rows in common."""
    arrays = _arrays(body, payload)
    count = -1
    for name, array in arrays.items():
        if not array.ndim:
            raise _bad(f"Tensor name: {name} has no shape information; ask for columns, with 'inputs'")
        if count not in (-1, len(array)):
            raise _bad(
                f"Tensor name: {name} has inconsistent batch size: {len(array)} expecting: {count}; ask for columns, "
                "with 'inputs'"
            )
        count = len(array)
    if len(arrays) == 1:
        [array] = arrays.values()
        return _dumps({"predictions": _plain(array)})
    columns = [_plain(array) for array in arrays.values()]
    return _dumps({"predictions": [dict(zip(arrays, row, strict=True)) for row in zip(*columns, strict=True)]})


def write_columns(body: bytes, payload: Payload) -> bytes:
    """Raises BadMessage and PenstockError."""
    columns = {name: _plain(array) for name, array in _arrays(body, payload).items()}
    return _dumps({"outputs": next(iter(columns.values())) if len(columns) == 1 else columns})


def write_classes(names: tuple[str, ...], body: bytes, payload: Payload) -> bytes:
    """``names``: of the scores, and of the labels where the model has those; else they are numbers from 0 on. Raises
    BadMessage and PenstockError."""
    arrays = _arrays(body, payload)
    scores = arrays[names[0]]
    if len(names) == 1:
        numbers = [str(each) for each in range(scores.shape[1])]
        labels = [numbers] * len(scores)
    else:
        labels = arrays[names[1]].tolist()
        if arrays[names[1]].shape != scores.shape:
            raise _bad(f"outputs '{names[1]}' and '{names[0]}' have different shapes; use :predict")
    rows = zip(labels, scores, strict=True)
    return _dumps({"results": [[list(pair) for pair in zip(*row, strict=True)] for row in rows]})


def write_numbers(body: bytes, payload: Payload) -> bytes:
    """Raises BadMessage and PenstockError."""
    [array] = _arrays(body, payload).values()
    return _dumps({"results": array.reshape(-1)})


@lru_cache(maxsize=_OUTCOMES_MAX)
def _outcome(body: bytes) -> Outcome:
    return unpack_outcome(body)


def _arrays(body: bytes, payload: Payload) -> dict[str, Array]:
    """Outputs by name; strings as they are to be in JSON."""
    view = memoryview(payload)
    arrays: dict[str, Array] = {}
    for name, datatype, shape, offset, nbytes in _outcome(body).tensors:
        data = view[offset : offset + nbytes]
        if len(data) != nbytes:
            raise BadMessage(f"an output lies from {offset} to {offset + nbytes} in a payload of {len(view)} bytes")
        array = decode(datatype, shape, data)
        if datatype == "BYTES":
            array = _as_text(name, array)
        elif datatype == "FP16":
            array = array.astype(np.float32)
        arrays[name] = array
    return arrays


def _as_text(name: str, array: Array) -> Array:
    texts = np.empty(array.shape, object)
    try:
        for at, value in np.ndenumerate(array):
            if name.endswith(_BYTES_END):
                texts[at] = {_BASE64: base64.b64encode(value).decode()}
            else:
                texts[at] = value.decode()
    except UnicodeDecodeError:
        raise _bad(
            f"output '{name}' holds a string that is not UTF-8, which JSON cannot carry; outputs whose names end in "
            f"{_BYTES_END} are answered in base64, and /v2/models/.../infer answers any as binary"
        ) from None
    return texts


def _plain(array: Array) -> Any:
    """What orjson takes: it knows neither objects in arrays nor those of no dimension."""
    return array if array.ndim and array.dtype != object else array.tolist()


def _dumps(value: Any) -> bytes:
    dumped = orjson.dumps(value, option=orjson.OPT_SERIALIZE_NUMPY)
    if b"null" in dumped:  # orjson's word for NaN and infinities, which are tokens here
        return json.dumps(value, separators=(",", ":"), default=lambda array: array.tolist()).encode()
    return dumped
