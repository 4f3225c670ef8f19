"""Plain JSON: tensors by their names, and the route with a broker and workers that the test plays."""

from __future__ import annotations

import gzip
import json
import math
from typing import Any

import numpy as np
import pytest

from penstock.gateway.plain import Plain, read_inputs, write_outputs
from penstock.wire.codec import pack_outcome, unpack_layout
from penstock.wire.errors import BAD_INPUT, BadMessage, PenstockError
from penstock.wire.messages import Outcome
from penstock.wire.models import ModelSpec, Tensor, TensorSpec
from penstock.wire.tensors import decode, encode, pack_strings
from tests.gateway.serving import Loop
from tests.gateway.test_application import Desk, X, ready, said, waits

URL = "/v2/models/double/predict"


def model(*inputs: TensorSpec) -> ModelSpec:
    return ModelSpec("m", "1", "onnxruntime_onnx", inputs, (TensorSpec("y", "FP32", (-1,)),), False, 1)


def read(datatype: str, rank: int, value: Any) -> tuple[tuple[int, ...], Any]:
    """The shape and the values of one input."""
    spec = model(TensorSpec("x", datatype, (-1,) * rank))
    layout, payload = read_inputs(spec, json.dumps({"x": value}).encode())
    [tensor] = layout.tensors
    assert (tensor.name, tensor.datatype, tensor.offset, tensor.nbytes) == ("x", datatype, 0, len(payload))
    return tensor.shape, decode(datatype, tensor.shape, payload).tolist()


@pytest.mark.parametrize(
    ("datatype", "value", "shape"),
    [
        ("FP32", [[1, 2.5]], (1, 2)),
        ("FP64", [[[1], [2]], [[3], [4]]], (2, 2, 1)),
        ("FP16", [[1.5, -2]], (1, 2)),
        ("BF16", [1.5, -2], (2,)),
        ("INT64", [2**63 - 1, -(2**63)], (2,)),
        ("BOOL", [[True], [False]], (2, 1)),
        ("FP32", [], (0,)),
        ("FP32", [[], []], (2, 0)),
        ("FP32", 2.5, ()),
        ("FP16", 2.5, ()),
    ],
)
def test_lists_become_what_the_model_declares(datatype: str, value: Any, shape: tuple[int, ...]) -> None:
    assert read(datatype, len(shape), value) == (shape, value)


def test_strings_become_bytes() -> None:
    assert read("BYTES", 2, [["Grüße", ""]]) == ((1, 2), [["Grüße".encode(), b""]])
    assert read("BYTES", 0, "one") == ((), b"one")


def test_inputs_lie_behind_each_other_in_the_order_in_which_they_came() -> None:
    spec = model(TensorSpec("a", "INT32", (-1,)), TensorSpec("b", "UINT8", (-1,)))
    layout, payload = read_inputs(spec, b'{"b": [7], "a": [1, 2]}')
    assert layout.tensors == (Tensor("b", "UINT8", (1,), 0, 1), Tensor("a", "INT32", (2,), 1, 8))
    assert layout.outputs == ()
    assert payload == b"\7" + np.array([1, 2], "<i4").tobytes()


@pytest.mark.parametrize(
    ("datatype", "value", "sentence"),
    [
        ("FP32", [[1, 2], [3]], "the data of input 'x' is not 2 long everywhere in dimension 2 of [2, 2]"),
        ("FP32", [[1, 2], 3], "the data of input 'x' is not 2 long everywhere in dimension 2 of [2, 2]"),
        ("FP32", [[1, [2]]], "the data of input 'x' holds lists, whole numbers; FP32 takes numbers"),
        ("FP32", None, "the data of input 'x' holds null; FP32 takes numbers"),
        ("FP32", {"a": 1}, "the data of input 'x' holds objects; FP32 takes numbers"),
        ("INT64", [1.5], "the data of input 'x' holds numbers with a fraction; INT64 takes whole numbers"),
        ("UINT8", [256], "the data of input 'x' has a number that does not fit UINT8"),
        ("FP16", [70_000], "the data of input 'x' has a number that does not fit FP16"),
        ("BYTES", [1], "the data of input 'x' holds whole numbers; BYTES takes strings"),
    ],
)
def test_what_does_not_fit_is_named(datatype: str, value: Any, sentence: str) -> None:
    with pytest.raises(PenstockError) as caught:
        read(datatype, 1, value)
    assert (caught.value.code, caught.value.message) == (BAD_INPUT, sentence)


def outcome(*tensors: tuple[str, str, tuple[int, ...], bytes]) -> tuple[bytes, bytes]:
    """A packed outcome and its payload."""
    placed, at = [], 0
    for name, datatype, shape, data in tensors:
        placed.append(Tensor(name, datatype, shape, at, len(data)))
        at += len(data)
    return pack_outcome(Outcome("m", "1", tuple(placed))), b"".join(data for *_, data in tensors)


def numbers(datatype: str, values: Any) -> bytes:
    return bytes(encode(np.array(values, "<f2" if datatype == "FP16" else "<f4"), datatype))


@pytest.mark.parametrize(
    ("datatype", "shape", "data", "written"),
    [
        ("FP32", (2, 1), numbers("FP32", [1, 2.5]), [[1.0], [2.5]]),
        ("FP16", (1, 2), numbers("FP16", [1, 2.5]), [[1.0, 2.5]]),
        ("BF16", (2,), numbers("BF16", [1, -2.5]), [1.0, -2.5]),
        ("INT64", (), np.array(7, "<i8").tobytes(), 7),
        ("BOOL", (2, 1), b"\1\0", [[True], [False]]),
        ("FP32", (2, 0), b"", [[], []]),
        ("FP32", (0, 2), b"", []),
        ("BYTES", (1, 2), pack_strings(["Grüße", ""]), [["Grüße", ""]]),
        ("BYTES", (), pack_strings(["one"]), "one"),
    ],
)
def test_outputs_are_nested_as_their_shape_says(
    datatype: str, shape: tuple[int, ...], data: bytes, written: object
) -> None:
    name = 'y "1"'
    assert json.loads(write_outputs(*outcome((name, datatype, shape, data)))) == {name: written}


def test_outputs_that_are_no_numbers_are_written_as_the_tokens_that_most_know() -> None:
    data = numbers("FP32", [math.nan, -math.inf])
    assert write_outputs(*outcome(("y", "FP32", (1, 2), data))) == b'{"y":[[NaN,-Infinity]]}'
    assert write_outputs(*outcome(("y", "FP32", (), data[4:]))) == b'{"y":-Infinity}'


def test_several_outputs_are_told_by_name() -> None:
    told = write_outputs(*outcome(("b", "UINT8", (1,), b"\7"), ("a", "UINT8", (2,), b"\1\2")))
    assert told == b'{"b":[7],"a":[1,2]}'


def test_outputs_that_cannot_be_written() -> None:
    with pytest.raises(PenstockError, match="not UTF-8"):
        write_outputs(*outcome(("y", "BYTES", (1,), b"\1\0\0\0\xff")))
    body, payload = outcome(("y", "FP32", (1, 2), X))
    with pytest.raises(BadMessage, match="from 0 to 8 in a payload of 7 bytes"):
        write_outputs(body, payload[:-1])


# --- the route ---


@pytest.fixture
def desk(loop: Loop) -> Desk:
    desk = Desk(loop)
    desk.application.add(Plain(desk.application).routes)
    return desk.join(ready(), ready("ö/x"))


@pytest.mark.parametrize(("url", "version"), [(URL, "~1"), ("/v2/models/double/versions/1/predict", "1")])
def test_a_request_and_its_answer(desk: Desk, url: str, version: str) -> None:
    exchange = desk.begin("POST", url, b'{"x": [[1, 2]]}', Penstock_Tenant="blue", Penstock_Priority="2")
    assert waits(exchange)
    message = desk.sent()
    [group] = message.groups
    form = group.form
    assert (form.model, form.version, form.tenant, form.priority) == ("double", version, "blue", 2)
    assert unpack_layout(group.form.body).tensors == (Tensor("x", "FP32", (1, 2), 0, 8),)
    assert message.blob == X
    desk.double(1, X)
    answer = said(exchange)
    assert (answer.status, answer.headers["Content-Type"]) == (200, "application/json")
    assert answer.headers["Server-Timing"].startswith("queue;dur=")
    assert answer.body == b'{"y":[[2.0,4.0]]}'


def test_requests_of_one_form_travel_together(desk: Desk) -> None:
    for _ in range(2):
        desk.begin("POST", URL, b'{"x": [[1, 2]]}')
    [group] = desk.sent().groups
    assert group.ids == (1, 2)


def test_compression_both_ways(desk: Desk) -> None:
    rows = np.arange(400, dtype="<f4").reshape(200, 2)
    body = gzip.compress(json.dumps({"x": rows.tolist()}).encode())
    exchange = desk.begin("POST", URL, body, Content_Encoding="gzip", Accept_Encoding="gzip")
    desk.sent()
    desk.double(1, rows.tobytes())
    answer = said(exchange)
    assert answer.headers["Content-Encoding"] == "gzip"
    assert json.loads(gzip.decompress(answer.body)) == {"y": (rows * 2).tolist()}


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        (b"[[1, 2]]", "the request is not a JSON object of the inputs ['x'] by name"),
        (b"{}", "expected 1 inputs but got 0 inputs for model 'double'. Got input(s) [], but missing required"),
        (b'{"z": [[1, 2]]}', "'z' is no input of model 'double', whose inputs are ['x']"),
        (b'{"inputs": []}', "'inputs' is no input of model 'double', whose inputs are ['x']; requests of the v2"),
        (b'{"x": [1, 2]}', "unexpected shape for input 'x' for model 'double'. Expected [-1, 2], got [2]"),
        (b'{"x": 1}', "unexpected shape for input 'x' for model 'double'. Expected [-1, 2], got []"),
        (b'{"x": ' + b"[" * 500 + b"1" + b"]" * 500 + b"}", "input 'x' has 500 dimensions; at most "),
        (b'{"x"', "the request is not JSON: "),
        (b"", "the request is not JSON: "),
    ],
)
def test_mistakes_are_400_and_named(desk: Desk, body: bytes, sentence: str) -> None:
    answer = desk.ask("POST", URL, body)
    assert answer.status == 400
    assert answer.error.startswith(sentence)
    assert desk.meter("penstock_request_failures", "double", "", BAD_INPUT) == 1
    assert desk.caller.calls == {}


def test_binary_tensors_are_for_the_other_route(desk: Desk) -> None:
    answer = desk.ask("POST", URL, b'{"x": [[1, 2]]}', Inference_Header_Content_Length="5")
    assert (answer.status, "is for .../infer" in answer.error) == (400, True)


def test_names_may_need_escapes_and_be_unknown(desk: Desk) -> None:
    assert waits(desk.begin("POST", "/v2/models/%C3%B6%2Fx/predict", b'{"x": [[1, 2]]}'))
    answer = desk.ask("POST", "/v2/models/nope/predict", b"{}")
    assert (answer.status, answer.error) == (404, "Request for unknown model: 'nope' is not found")
