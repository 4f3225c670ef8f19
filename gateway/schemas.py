"""What requests to a version of a model hold, and its answers, as JSON Schema, in each protocol. Pure.

What a schema cannot say is that there are as many elements as the shape says.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from penstock.gateway.about import ANYTHING, BINARY, JSON, OBJECT, STRING, STRINGS, Content, Schema, a_list, an_object
from penstock.gateway.jsondata import BINARY_ONLY
from penstock.wire.datatypes import DATATYPES
from penstock.wire.messages import MAX_PRIORITY, MAX_TIMEOUT_US
from penstock.wire.models import MAX_TENSORS, ModelSpec, TensorSpec

_FLOATS_MAX: Final = {"FP16": 65504.0, "BF16": 3.3895313892515355e38, "FP32": 3.4028234663852886e38, "FP64": None}
_ID_MAX: Final = 1024  # characters
_FLAG: Final[Schema] = {"type": "boolean"}

# --- elements, and lists of them ---


def element(datatype: str, rounds: bool = False) -> Schema:
    """One element of a tensor in JSON. ``rounds``: a result, which may be no number."""
    if datatype == "BYTES":
        return STRING
    if datatype == "BOOL":
        return {"type": "boolean"} if rounds else {"enum": [True, False, 0, 1]}
    if datatype in _FLOATS_MAX:
        most = _FLOATS_MAX[datatype]
        if rounds:
            return {"description": "a number, or the token NaN, Infinity or -Infinity, for which there is no type"}
        return {"type": "number"} if most is None else {"type": "number", "minimum": -most, "maximum": most}
    bits = int(datatype.lstrip("UINT"))
    if datatype.startswith("U"):
        return {"type": "integer", "minimum": 0, "maximum": 2**bits - 1}
    return {"type": "integer", "minimum": -(2 ** (bits - 1)), "maximum": 2 ** (bits - 1) - 1}


def nested(shape: Sequence[int], one: Schema) -> Schema:
    """Lists in lists, as a shape says; -1 is any number of them."""
    for dim in reversed(shape):
        one = a_list(one, **({"minItems": dim, "maxItems": dim} if dim != -1 else {}))
    return one


def _rows(spec: ModelSpec, shape: Sequence[int], one: Schema) -> dict[str, Any]:
    """As ``nested``, with no more rows than run at once."""
    schema = dict(nested(shape, one))
    if spec.batchable and shape and shape[0] == -1:
        schema |= {"minItems": 1, "maxItems": spec.max_batch_size}
    return schema


# --- the v2 protocol ---


_PARAMETERS: Final = an_object(
    {
        "priority": {"type": "integer", "minimum": 0, "maximum": MAX_PRIORITY},
        "timeout": {"type": "integer", "minimum": 0, "maximum": MAX_TIMEOUT_US, "description": "microseconds"},
        "explain": _FLAG,
        "binary_data_output": _FLAG,
    },
)


def _shape_schema(shape: Sequence[int], rows_max: int | None) -> Schema:
    dims: list[Schema] = [{"const": dim} if dim != -1 else {"type": "integer", "minimum": 0} for dim in shape]
    if rows_max is not None and dims:
        dims[0] = {"type": "integer", "minimum": 1, "maximum": rows_max}
    return (
        {"type": "array", "prefixItems": dims, "minItems": len(dims), "maxItems": len(dims)}
        if dims
        else a_list({"type": "integer"}, maxItems=0)
    )


def _input(spec: ModelSpec, tensor: TensorSpec) -> Schema:
    name, datatype, shape = tensor
    flat = a_list(element(datatype))
    data = flat if len(shape) < 2 else {"anyOf": [_rows(spec, shape, element(datatype)), flat]}
    shapes = _shape_schema(shape, spec.max_batch_size if spec.batchable else None)
    return an_object(
        {"name": {"const": name}, "datatype": {"const": datatype}, "shape": shapes, "data": data, "parameters": OBJECT},
        ("name", "datatype", "shape", "data"),
    )


def _output(spec: ModelSpec, tensor: TensorSpec) -> Schema:
    shapes = _shape_schema(tensor.shape, spec.max_batch_size if spec.batchable else None)
    return an_object(
        {
            "name": {"const": tensor.name},
            "datatype": {"const": tensor.datatype},
            "shape": shapes,
            "data": a_list(
                {"type": ["number", "string", "null"]} if tensor.datatype != "BOOL" else {"type": "boolean"}
            ),
            "parameters": OBJECT,
        },
        ("name", "datatype", "shape"),
    )


def _either(schemas: Sequence[Schema]) -> Schema:
    return schemas[0] if len(schemas) == 1 else {"anyOf": list(schemas)}


_RAW: Final[Schema] = {"description": "JSON, of Inference-Header-Content-Length bytes, and binary tensors behind it"}


def v2(spec: ModelSpec) -> tuple[Content, Content]:
    """Of a request and of an answer."""
    inputs, outputs = spec.inputs, spec.outputs
    names = an_object(
        {"name": {"enum": [each.name for each in outputs]}, "parameters": an_object({"binary_data": _FLAG})}, ("name",)
    )
    request = an_object(
        {
            "id": {"type": "string", "maxLength": _ID_MAX},
            "parameters": _PARAMETERS,
            "inputs": a_list(
                _either([_input(spec, each) for each in inputs]), minItems=len(inputs), maxItems=len(inputs)
            ),
            "outputs": a_list(names, maxItems=len(outputs)),
        },
        ("inputs",),
    )
    answer = an_object(
        {
            "id": STRING,
            "model_name": {"const": spec.name},
            "model_version": STRING,
            "parameters": OBJECT,
            "outputs": a_list(_either([_output(spec, each) for each in outputs])),
        },
        ("model_name", "model_version", "outputs"),
    )
    binary = {BINARY: _RAW}
    has_json = not any(each.datatype in BINARY_ONLY for each in (*inputs, *outputs))
    return ({JSON: request} if has_json else {}) | binary, {JSON: answer} | binary


_ANY_TENSOR: Final = an_object(
    {
        "name": STRING,
        "datatype": {"enum": sorted(DATATYPES)},
        "shape": a_list({"type": "integer", "minimum": 0}),
        "data": a_list(ANYTHING),
        "parameters": OBJECT,
    },
    ("name", "datatype", "shape"),
)
ANY_REQUEST: Final[Content] = {
    JSON: an_object(
        {
            "id": {"type": "string", "maxLength": _ID_MAX},
            "parameters": _PARAMETERS,
            "inputs": a_list(_ANY_TENSOR, maxItems=MAX_TENSORS),
            "outputs": a_list(an_object({"name": STRING, "parameters": OBJECT}, ("name",)), maxItems=MAX_TENSORS),
        },
        ("inputs",),
    ),
    BINARY: _RAW,
}
ANY_ANSWER: Final[Content] = {
    JSON: an_object(
        {
            "id": STRING,
            "model_name": STRING,
            "model_version": STRING,
            "parameters": OBJECT,
            "outputs": a_list(_ANY_TENSOR),
        },
        ("model_name", "model_version", "outputs"),
    ),
    BINARY: _RAW,
}


# --- plain JSON ---


def _value(spec: ModelSpec, tensor: TensorSpec) -> Schema:
    return _rows(spec, tensor.shape, element(tensor.datatype))


def _result(datatype: str, shape: Sequence[int]) -> Schema:
    return nested(shape, element(datatype, rounds=True))


def plain(spec: ModelSpec) -> tuple[Content, Content]:
    """Of a request and of an answer."""
    names = [each.name for each in spec.inputs]
    values = {each.name: _value(spec, each) for each in spec.inputs}
    results = {each.name: _result(each.datatype, each.shape) for each in spec.outputs}
    return {JSON: an_object(values, names, additionalProperties=False)}, {JSON: an_object(results, list(results))}


# --- TensorFlow Serving ---


def tensorflow(spec: ModelSpec) -> tuple[Content, Content]:
    """Of a request for a prediction, in rows or columns, and of an answer."""
    columns = {each.name: _value(spec, each) for each in spec.inputs}
    rows = {each.name: nested(each.shape[1:], element(each.datatype)) for each in spec.inputs}
    column, row = an_object(columns, list(columns)), an_object(rows, list(rows), additionalProperties=False)
    if len(spec.inputs) == 1:
        [(name, _, _)] = spec.inputs
        column, row = {"anyOf": [columns[name], column]}, {"anyOf": [rows[name], row]}
    signature: Schema = {"enum": ["", "serving_default"]}
    several: dict[str, Any] = {"minItems": 1} | ({"maxItems": spec.max_batch_size} if spec.batchable else {})
    request = {
        "oneOf": [
            an_object({"signature_name": signature, "instances": a_list(row, **several)}, ("instances",)),
            an_object({"signature_name": signature, "inputs": column}, ("inputs",)),
        ]
    }
    return {JSON: request}, ANY_PREDICTION


ANY_INSTANCES: Final[Content] = {
    JSON: {
        "oneOf": [
            an_object({"signature_name": STRING, "instances": a_list(ANYTHING, minItems=1)}, ("instances",)),
            an_object({"signature_name": STRING, "inputs": ANYTHING}, ("inputs",)),
        ]
    }
}
ANY_PREDICTION: Final[Content] = {
    JSON: {
        "oneOf": [
            an_object({"predictions": a_list(ANYTHING)}, ("predictions",)),
            an_object({"outputs": ANYTHING}, ("outputs",)),
        ]
    }
}
EXAMPLES: Final[Content] = {
    JSON: an_object(
        {"signature_name": STRING, "context": OBJECT, "examples": a_list(OBJECT, minItems=1)}, ("examples",)
    )
}
RESULTS: Final[Content] = {JSON: an_object({"results": a_list(ANYTHING)}, ("results",))}
METADATA: Final = an_object(
    {
        "name": STRING,
        "versions": STRINGS,
        "platform": STRING,
        "inputs": a_list(
            an_object({"name": STRING, "datatype": STRING, "shape": a_list({"type": "integer", "minimum": -1})})
        ),
        "outputs": a_list(OBJECT),
    },
    ("name", "versions", "platform", "inputs", "outputs"),
)
