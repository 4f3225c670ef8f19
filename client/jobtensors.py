"""Between arrays and the requests and responses of the v2 protocol over HTTP, with binary tensors."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, cast

import numpy as np

from penstock.client.arrays import as_array
from penstock.client.events import Complete, Sink
from penstock.wire.errors import BAD_INPUT, INTERNAL, UNSUPPORTED, PenstockError
from penstock.wire.messages import Batch
from penstock.wire.tensors import DTYPES, Array, Buffer, decode, encode, pack_strings

_NOBODY = cast(Sink, None)  # waits for an answer that has come


class Packed(NamedTuple):
    """A request's body, of which so many bytes are JSON."""

    body: bytes
    json_bytes: int


def pack_request(inputs: Mapping[str, Any], outputs: Sequence[str], datatype_of: Callable[[str], str | None]) -> Packed:
    """``datatype_of``: what the model expects of an input, None for one that it does not have. Raises PenstockError
    naming the input that cannot be sent."""
    if not hasattr(inputs, "items"):
        raise PenstockError(BAD_INPUT, f"the inputs are arrays by name; {type(inputs).__name__} has none")
    declared: list[dict[str, Any]] = []
    parts: list[Buffer] = []
    for name, value in inputs.items():
        array, datatype = as_array(name, value, datatype_of(name))
        try:
            part = encode(array, datatype)
        except (PenstockError, UnicodeEncodeError) as error:
            raise PenstockError(BAD_INPUT, f"input '{name}': {error}") from None
        parameters = {"binary_data_size": len(part)}
        declared.append({"name": name, "datatype": datatype, "shape": array.shape, "parameters": parameters})
        parts.append(part)
    # Explained, so that its Result has the times of any other.
    request: dict[str, Any] = {"inputs": declared, "parameters": {"binary_data_output": True, "explain": True}}
    if outputs:
        request["outputs"] = [{"name": name} for name in outputs]
    head = json.dumps(request).encode()
    return Packed(b"".join((head, *parts)), len(head))


class Answer(NamedTuple):
    """What a Result is made of."""

    model: str
    version: str
    outputs: dict[str, Array]
    complete: Complete
    worker: str


def read_response(headers: Mapping[str, str], body: bytes) -> Answer:
    """Raises PenstockError for one that is not of this protocol."""
    length = headers.get("inference-header-content-length", "")
    if "content-encoding" in headers:
        raise PenstockError(UNSUPPORTED, "the result is compressed; fetch it from GET /v2/jobs/ID/result")
    at = int(length) if length.isdecimal() else len(body)
    try:
        head = json.loads(body[:at])
        found = {each["name"]: each for each in head["outputs"]}
        model, version = str(head["model_name"]), str(head["model_version"])
    except (ValueError, KeyError, TypeError):
        raise PenstockError(
            UNSUPPORTED, "the result is not one of the v2 protocol; fetch it from GET /v2/jobs/ID/result"
        ) from None
    outputs = {}
    for name, each in found.items():
        try:
            nbytes = each.get("parameters", {}).get("binary_data_size")
            data = _from_json(each) if nbytes is None else body[at : at + nbytes]
            at += nbytes or 0
            outputs[name] = np.array(decode(each["datatype"], each["shape"], data))  # which belongs to its receiver
        except (KeyError, TypeError, ValueError, PenstockError) as error:
            raise PenstockError(INTERNAL, f"output '{name}' of the result cannot be read: {error}") from None
    said = head.get("parameters", {})
    return Answer(model, version, outputs, _complete(said), str(said.get("worker", "")))


def _from_json(output: Mapping[str, Any]) -> Buffer:
    if output["datatype"] == "BYTES":
        return pack_strings(np.array(output["data"], dtype=object).ravel().tolist())
    return encode(np.array(output["data"], DTYPES[output["datatype"]]), output["datatype"])


def _complete(said: Mapping[str, Any]) -> Complete:
    """What an explained answer says of its way; zeros for one that is not."""

    def us(name: str) -> int:
        return round(float(said.get(name, 0.0)) * 1000)

    held_us = us("held_ms")
    batch = Batch(
        int(said.get("batch", 0)),
        int(said.get("batch_rows", 0)),
        str(said.get("batch_reason", "")),
        us("batch_ms"),
        us("model_ms"),
    )
    return Complete(_NOBODY, b"", b"", batch, held_us + us("waited_ms"), held_us, b"")
