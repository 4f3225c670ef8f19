"""Plain JSON for people: ``{"x": [[1, 2]]}``, inputs by their names, is answered with ``{"y": [[3, 4]]}``.

Shapes are those of the lists, types those that the model declares. Numbers become FP16 and BF16 as well, which the v2
protocol's JSON does not carry. What there is to say beside the tensors is said in headers (``terms.py``).
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, Final

import numpy as np
import orjson

from penstock.gateway.about import INFERENCE_ERRORS, OBJECT, PLAIN, About, json
from penstock.gateway.application import Application
from penstock.gateway.changes import Style
from penstock.gateway.connection import Exchange
from penstock.gateway.inference import Reading, cut
from penstock.gateway.jsondata import BINARY_ONLY, dump_data, loads, pack_data
from penstock.gateway.parse import Parse
from penstock.gateway.routes import Route
from penstock.gateway.schemas import plain
from penstock.gateway.target import Handler, Target
from penstock.wire.codec import unpack_outcome
from penstock.wire.errors import BAD_INPUT, PenstockError
from penstock.wire.messages import Outcome, Payload
from penstock.wire.models import Layout, ModelSpec, Tensor, TensorSpec
from penstock.wire.tensors import Buffer, decode, encode

_SHOWN_MAX: Final = 200  # characters of a name that is refused
_OUTCOMES_MAX: Final = 1024
_ABOUT: Final = About(
    "Ask a model by the names of its inputs",
    PLAIN,
    json(OBJECT),
    json(OBJECT),
    errors=INFERENCE_ERRORS,
    inference=True,
    of_model=plain,
)


def read_inputs(spec: ModelSpec, body: Buffer) -> tuple[Layout, bytes]:
    """The tensors of a request, and their bytes. Raises PenstockError naming the input and what was expected."""
    request = loads(body)
    expected = {each.name: each for each in spec.inputs}
    if type(request) is not dict:
        raise PenstockError(BAD_INPUT, f"the request is not a JSON object of the inputs {list(expected)} by name")
    tensors: list[Tensor] = []
    parts: list[bytes] = []
    at = 0
    for name, value in request.items():
        tensor = expected.get(name)
        if tensor is None:
            raise PenstockError(BAD_INPUT, _unknown(name, spec.name, list(expected)))
        shape = _shape(value)
        part = _pack(tensor, shape, value)
        tensors.append(Tensor(name, tensor.datatype, shape, at, len(part)))
        parts.append(part)
        at += len(part)
    return Layout(tuple(tensors)), b"".join(parts)


def read_body(spec: ModelSpec, body: Buffer) -> tuple[Reading, Payload]:
    """Raises PenstockError."""
    layout, payload = read_inputs(spec, body)
    return Reading(layout, Style(False), write=write_outputs), payload


def _unknown(name: str, model: str, expected: list[str]) -> str:
    sentence = f"'{name[:_SHOWN_MAX]}' is no input of model '{model}', whose inputs are {expected}"
    return sentence + "; requests of the v2 protocol go to .../infer" if name == "inputs" else sentence


def _shape(value: Any) -> tuple[int, ...]:
    """Of lists in lists, by the first of each: whether the others are as long is seen when they are packed."""
    shape = []
    while type(value) is list:
        shape.append(len(value))
        value = value[0] if value else None
    return tuple(shape)


def _pack(tensor: TensorSpec, shape: tuple[int, ...], value: Any) -> bytes:
    data = value if shape else [value]
    if tensor.datatype not in BINARY_ONLY:
        return pack_data(tensor.name, tensor.datatype, shape, data)
    wide = decode("FP32", shape, pack_data(tensor.name, "FP32", shape, data))
    try:
        with np.errstate(over="raise"):
            return bytes(encode(wide.astype("<f2") if tensor.datatype == "FP16" else wide, tensor.datatype))
    except FloatingPointError:
        raise PenstockError(
            BAD_INPUT, f"the data of input '{tensor.name}' has a number that does not fit {tensor.datatype}"
        ) from None


@lru_cache(maxsize=_OUTCOMES_MAX)
def _outcome(body: bytes) -> Outcome:
    """Raises BadMessage for a body that is no packed Outcome."""
    return unpack_outcome(body)


def write_outputs(body: bytes, payload: Payload) -> bytes:
    """An answer: its outputs by name."""
    view = memoryview(payload)
    parts: list[bytes] = []
    for name, datatype, shape, offset, nbytes in _outcome(body).tensors:
        data = dump_data(datatype, shape, cut(view, offset, nbytes), nested=True)
        parts.append(b"%b:%b" % (orjson.dumps(name), data))
    return b"{%b}" % b",".join(parts)


class Plain:
    """``routes``: for the application to answer."""

    def __init__(self, application: Application) -> None:
        self._application = application
        self._parse = Parse(application.find, read_body)
        self.routes: list[Route[Handler]] = [
            Route("POST", f"/v2/models/{{model}}{version}/predict", self._predict, about=_ABOUT)
            for version in ("", "/versions/{version}")
        ]

    def _predict(self, exchange: Exchange, target: Target) -> None:
        if target.header_length is not None:
            raise PenstockError(
                BAD_INPUT, "Inference-Header-Content-Length is for .../infer; here the whole body is JSON"
            )
        self._application.infer(exchange, target, self._parse)
