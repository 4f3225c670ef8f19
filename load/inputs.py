"""What a request holds: made up from what the server says of the model, or given; and its bytes in the Open Inference
Protocol v2."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, Final

import numpy as np

from penstock.wire.datatypes import ITEM_SIZES, element_count
from penstock.wire.errors import PenstockError
from penstock.wire.models import TensorSpec
from penstock.wire.tensors import DTYPES, Array, datatype_of, encode, from_bf16

_SHAPE: Final = re.compile(r"\[?(\d+(?:[x,]\d+)*)?\]?")
_MAX_BYTES: Final = 1 << 30  # of one input


class InputsError(Exception):
    """Inputs that no request can be made of; the message is a sentence that names the input."""


def parse_shape(text: str) -> tuple[int, ...] | None:
    """ "1x3x224", "1,3,224" or "[1,3,224]" -> (1, 3, 224), "[]" -> (); None for what is no shape."""
    match = _SHAPE.fullmatch(text.replace(" ", ""))
    if match is None or not text:
        return None
    return tuple(map(int, re.split("[x,]", match[1]))) if match[1] else ()


def choose(
    model: str,
    specs: Sequence[TensorSpec],
    rows: int,
    shapes: Mapping[str, tuple[int, ...]],
    arrays: Mapping[str, Array],
) -> dict[str, Array]:
    """An array for each input: the one given, or one made up in the shape that is given or declared, with ``rows`` in
    its first dimension where that may be any number. ``shapes`` and ``arrays`` may have "" as the only input's name.
    BF16 are float32 here. Raises InputsError."""
    only = specs[0].name if len(specs) == 1 else ""
    shapes = {name or only: shape for name, shape in shapes.items()}
    arrays = {name or only: array for name, array in arrays.items()}
    names = [spec.name for spec in specs]
    for name in (*shapes, *arrays):
        if not name:
            raise InputsError(f"'{model}' has several inputs; write --input NAME=..., with one of {names}")
        if name not in names:
            raise InputsError(f"'{model}' has no input '{name}'; it has {names}")
    chosen = {}
    for number, spec in enumerate(specs):
        if spec.name in arrays:
            _check(model, spec, arrays[spec.name])
            chosen[spec.name] = np.asarray(arrays[spec.name])
            continue
        shape = _shape(model, spec, rows, shapes.get(spec.name))
        if element_count(shape) * max(1, ITEM_SIZES[spec.datatype]) > _MAX_BYTES:
            raise InputsError(f"input '{spec.name}' of shape {list(shape)} is larger than {_MAX_BYTES >> 20} MiB")
        chosen[spec.name] = _made_up(spec.datatype, shape, number)
    return chosen


def _shape(model: str, spec: TensorSpec, rows: int, given: tuple[int, ...] | None) -> tuple[int, ...]:
    if given is not None:
        if not _fits(spec.shape, given):
            raise InputsError(f"input '{spec.name}' of '{model}' has the shape {list(spec.shape)}, not {list(given)}")
        return given
    if spec.shape and spec.shape[0] == -1:
        shape = (rows, *spec.shape[1:])
    elif rows != 1:
        raise InputsError(
            f"input '{spec.name}' of '{model}' has the shape {list(spec.shape)}, whose first dimension is no number of "
            "rows; leave --rows out"
        )
    else:
        shape = spec.shape
    if -1 in shape:
        like = "x".join("N" if dim < 0 else str(dim) for dim in shape)
        raise InputsError(
            f"input '{spec.name}' of '{model}' has dimensions of any size; say which: --input {spec.name}={like} with "
            "numbers for N"
        )
    return shape


def _check(model: str, spec: TensorSpec, array: Array) -> None:
    try:
        datatype = datatype_of(array)
    except PenstockError as error:
        raise InputsError(f"input '{spec.name}': {error}") from None
    if datatype != spec.datatype and (spec.datatype, datatype) != ("BF16", "FP32"):
        wanted = "float32" if spec.datatype == "BF16" else DTYPES[spec.datatype].name
        raise InputsError(
            f"input '{spec.name}' of '{model}' is {spec.datatype}, and what is given is {datatype}; convert it to "
            f"{wanted}"
        )
    if not _fits(spec.shape, array.shape):
        raise InputsError(f"input '{spec.name}' of '{model}' has the shape {list(spec.shape)}, not {list(array.shape)}")


def _fits(declared: Sequence[int], shape: Sequence[int]) -> bool:
    """No dimensions are declared where a server does not know how many there are, and where there are none."""
    return not declared or (
        len(declared) == len(shape) and all(want in (-1, dim) for want, dim in zip(declared, shape, strict=True))
    )


def _made_up(datatype: str, shape: Sequence[int], seed: int) -> Array:
    """Random where any value will do, 0 and 1 where a number may be an index, short words where text is wanted."""
    random = np.random.default_rng(seed)
    if datatype in ("FP16", "FP32", "FP64", "BF16"):
        return random.standard_normal(shape).astype("<f4" if datatype == "BF16" else DTYPES[datatype])
    bits = np.asarray(random.integers(0, 2, shape))
    return bits.astype("U1").astype(object) if datatype == "BYTES" else bits.astype(DTYPES[datatype])


def read_metadata(model: str, metadata: Any) -> list[TensorSpec]:
    """The inputs in an answer to ``GET /v2/models/M``. Raises InputsError for what is no such answer."""
    try:
        specs = [
            TensorSpec(str(each["name"]), str(each["datatype"]), tuple(int(dim) for dim in each.get("shape", ())))
            for each in metadata["inputs"]
        ]
    except (KeyError, TypeError, ValueError, AttributeError):
        raise InputsError(f"what the server says of '{model}' is no model metadata of the v2 protocol") from None
    for spec in specs:
        if spec.datatype not in DTYPES:
            raise InputsError(f"input '{spec.name}' of '{model}' is of the datatype {spec.datatype}, which v2 has not")
    return specs


def write_body(
    inputs: Mapping[str, Array], specs: Sequence[TensorSpec], binary: bool, timeout_us: int = 0
) -> tuple[bytes, int]:
    """A v2 request for all outputs, and how many bytes of it are JSON in front of binary data; 0 where all is JSON.
    ``timeout_us``: what it tells the server of its deadline, if anything. Raises InputsError."""
    described: list[dict[str, Any]] = []
    parts = []
    for spec in specs:
        array = inputs[spec.name]
        tensor: dict[str, Any] = {"name": spec.name, "shape": list(array.shape), "datatype": spec.datatype}
        try:
            data = bytes(encode(array, spec.datatype))
        except (PenstockError, UnicodeEncodeError) as error:
            raise InputsError(f"input '{spec.name}': {error}") from None
        if binary:
            tensor["parameters"] = {"binary_data_size": len(data)}
            parts.append(data)
        else:
            tensor["data"] = _plain(spec, array)
        described.append(tensor)
    request: dict[str, Any] = {"inputs": described}
    parameters = {"timeout": timeout_us} if timeout_us else {}
    if binary:
        parameters["binary_data_output"] = True
    if parameters:
        request["parameters"] = parameters
    head = json.dumps(request, separators=(",", ":")).encode()
    return head + b"".join(parts), len(head) if binary else 0


def _plain(spec: TensorSpec, array: Array) -> list[Any]:
    """As JSON carries it, flat."""
    if spec.datatype == "BF16":
        array = from_bf16(np.frombuffer(encode(array, "BF16"), "<u2"))
    elements: list[Any] = array.ravel().tolist()
    if spec.datatype == "BYTES":
        try:
            return [each.decode() if isinstance(each, bytes) else each for each in elements]
        except UnicodeDecodeError:
            raise InputsError(
                f"input '{spec.name}' holds bytes that are no UTF-8, which JSON cannot carry, and the server takes no "
                "binary tensors"
            ) from None
    if spec.datatype in ("FP16", "FP32", "BF16"):
        return [float(f"{each:.6g}") for each in elements]  # what a float32 has, not the digits of its float64
    return elements


def write_request(
    host: str, path: str, body: bytes, json_bytes: int, more: Mapping[str, str] = MappingProxyType({})
) -> bytes:
    """All bytes of a POST over HTTP/1.1. ``host``: with the port, as in a URL. ``more``: headers."""
    kind = "application/octet-stream" if json_bytes else "application/json"
    lines = [f"POST {path} HTTP/1.1", f"Host: {host}", f"Content-Type: {kind}", f"Content-Length: {len(body)}"]
    if json_bytes:
        lines.append(f"Inference-Header-Content-Length: {json_bytes}")
    lines += [f"{name}: {value}" for name, value in more.items()]
    return "\r\n".join([*lines, "", ""]).encode("ascii") + body
