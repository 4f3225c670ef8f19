"""TensorFlow Serving's REST API: a real caller core that hears what a broker and workers say, and no sockets."""

from __future__ import annotations

import base64
import contextlib
import gzip
import json
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from penstock.gateway.connection import Exchange
from penstock.gateway.tfjson import read_classify, read_predict, write_columns, write_rows
from penstock.gateway.tfserving import TensorFlowServing
from penstock.wire.codec import pack_outcome, unpack_layout
from penstock.wire.errors import OVERLOADED, PenstockError
from penstock.wire.events import FromBroker
from penstock.wire.messages import Models, Outcome, Refusal, Refusals
from penstock.wire.models import IDLE, LOADING, READY, UNAVAILABLE, ModelSpec, ModelState, Route, Tensor, TensorSpec
from penstock.wire.slots import PLACED_MIN_BYTES, Slots
from penstock.wire.tensors import DTYPES, Array, Buffer, decode, encode
from tests.gateway.serving import Loop
from tests.gateway.test_application import EPOCH, Desk, Said, ready, said, spec, waits

X = ("x", "FP32", (-1, 2))
Y = ("y", "FP32", (-1, 2))


def model(inputs: Sequence[tuple[Any, ...]] = (X,), outputs: Sequence[tuple[Any, ...]] = (Y,), name: str = "m") -> Any:
    """One that batches where all of its inputs and outputs have rows."""
    both = [TensorSpec(*each) for each in inputs], [TensorSpec(*each) for each in outputs]
    batches = all(each.shape[:1] == (-1,) for each in both[0] + both[1])
    return ModelSpec(name, "1", "onnxruntime_onnx", tuple(both[0]), tuple(both[1]), batches, 1 << 20)


class Serving(Desk):
    """A gateway that answers this protocol, too."""

    def __init__(self, loop: Loop, slots: Slots | None = None, **limits: Any) -> None:
        super().__init__(loop, slots, **limits)
        self.application.add(TensorFlowServing(self.application).routes)

    def serve(self, *models: ModelState | ModelSpec, routes: tuple[Route, ...] = ()) -> Serving:
        states = [
            ModelState(each.name, "1", READY, "", each) if isinstance(each, ModelSpec) else each for each in models
        ]
        self.join(*states)
        if routes:
            self.hear(FromBroker(Models(EPOCH, tuple(states), routes)))
        return self

    def post(self, path: str, request: Any, **headers: str) -> Exchange:
        body = request if isinstance(request, bytes) else json.dumps(request).encode()
        return self.begin("POST", f"/v1/models/{path}", body, **headers)

    def read_model(self, path: str) -> tuple[int, Any]:
        answer = self.ask("GET", f"/v1/models/{path}")
        assert answer.headers["Content-Type"] == "application/json"
        return answer.status, json.loads(answer.body)

    def asked(self) -> tuple[dict[str, Array], tuple[str, ...], int]:
        """What has been sent of the only request: inputs, the outputs that it wants, and its number."""
        message = self.sent()
        [group] = message.groups
        layout = unpack_layout(group.form.body)
        data = bytes(message.blob)
        found = {
            name: decode(datatype, shape, data[offset : offset + nbytes])
            for name, datatype, shape, offset, nbytes in layout.tensors
        }
        return found, layout.outputs, group.ids[0]

    def reply(self, number: int, **outputs: tuple[str, Any]) -> None:
        """Outputs by name, as a datatype and a value."""
        self.deliver(number, *answer(**outputs))

    def predict(self, request: Any, /, verb: str = "predict", **outputs: tuple[str, Any]) -> Any:
        """The answer of model "m" to a request, which it answers with these outputs."""
        exchange = self.post(f"m:{verb}", request)
        self.reply(self.asked()[2], **outputs)
        response = said(exchange)
        assert response.status == 200, response
        return json.loads(response.body)

    def error(self, request: Any, path: str = "m:predict") -> tuple[int, str]:
        answer = said(self.post(path, request))
        return answer.status, answer.error


def answer(**outputs: tuple[str, Any]) -> tuple[Outcome, bytes]:
    tensors: list[Tensor] = []
    payload = b""
    for name, (datatype, value) in outputs.items():
        array = np.asarray(value, None if datatype in ("BYTES", "BF16") else DTYPES[datatype])
        data = bytes(encode(array.astype(object) if datatype == "BYTES" else array, datatype))
        tensors.append(Tensor(name, datatype, array.shape, len(payload), len(data)))
        payload += data
    return Outcome("m", "1", tuple(tensors)), payload


@pytest.fixture
def desk(loop: Loop) -> Serving:
    return Serving(loop)


TWO = model((("a", "INT32", (-1, 2)), ("b", "FP32", (-1,))), (("s", "FP32", (-1,)), ("t", "INT64", (-1, 2))))


# --- what there is ---


def test_status_of_every_version_the_newest_first(desk: Serving) -> None:
    desk.serve(
        ready("m", "9"),
        ready("m", "10"),
        ModelState("m", "11", LOADING, "", None),
        ModelState("m", "12", UNAVAILABLE, "it is broken", None),
        ModelState("m", "8", UNAVAILABLE, "", None),
        ModelState("m", "7", IDLE, "", spec("m")),
        ready("other"),
    )

    def row(version: str, state: str, code: str = "OK", message: str = "") -> dict[str, Any]:
        return {"version": version, "state": state, "status": {"error_code": code, "error_message": message}}

    assert desk.read_model("m") == (
        200,
        {
            "model_version_status": [
                row("12", "END", "UNAVAILABLE", "it is broken"),
                row("11", "LOADING"),
                row("10", "AVAILABLE"),
                row("9", "AVAILABLE"),
                row("8", "END"),
                row("7", "AVAILABLE"),
            ]
        },
    )
    assert desk.read_model("m/versions/10") == (200, {"model_version_status": [row("10", "AVAILABLE")]})


def test_status_of_what_is_not_there(desk: Serving) -> None:
    assert desk.read_model("m")[0] == 503
    desk.serve(ready("m"))
    assert desk.read_model("half") == (404, {"error": "Could not find any versions of model half"})
    assert desk.read_model("m/versions/2") == (404, {"error": "Could not find version 2 of model m"})
    assert desk.read_model("m/labels/stable") == (400, {"error": "Unrecognized servable version label: stable"})


def test_metadata(desk: Serving) -> None:
    desk.serve(model((X, ("t", "BYTES", ())), (("y", "BF16", (-1,)),)))
    status, content = desk.read_model("m/metadata")
    assert status == 200
    assert content["model_spec"] == {"name": "m", "signature_name": "", "version": "1"}
    unnamed = [{"size": "-1", "name": ""}, {"size": "2", "name": ""}]
    assert content["metadata"]["signature_def"]["signature_def"] == {
        "serving_default": {
            "inputs": {
                "x": {"dtype": "DT_FLOAT", "tensor_shape": {"dim": unnamed, "unknown_rank": False}, "name": "x"},
                "t": {"dtype": "DT_STRING", "tensor_shape": {"dim": [], "unknown_rank": False}, "name": "t"},
            },
            "outputs": {
                "y": {"dtype": "DT_BFLOAT16", "tensor_shape": {"dim": unnamed[:1], "unknown_rank": False}, "name": "y"}
            },
            "method_name": "tensorflow/serving/predict",
        }
    }
    assert desk.read_model("half/metadata") == (404, {"error": "Servable not found for request: Latest(half)"})


# --- rows and columns ---


def test_rows_of_a_model_with_one_input(desk: Serving) -> None:
    desk.serve(model())
    exchange = desk.post("m:predict", {"instances": [[1, 2], [3.5, 4]]})
    inputs, outputs, number = desk.asked()
    assert inputs["x"].tolist() == [[1, 2], [3.5, 4]]
    assert outputs == ()
    desk.reply(number, y=("FP32", [[0.1, 2], [3, 4]]))
    assert said(exchange).body == b'{"predictions":[[0.1,2.0],[3.0,4.0]]}'
    assert desk.meter("penstock_http_responses", "200") == 1


def test_rows_may_name_the_only_input(desk: Serving) -> None:
    desk.serve(model())
    answer = desk.predict({"instances": [{"x": [1, 2]}], "signature_name": "serving_default"}, y=("FP32", [[1, 2]]))
    assert answer == {"predictions": [[1, 2]]}


def test_rows_that_are_scalars(desk: Serving) -> None:
    desk.serve(model((("x", "INT64", (-1,)),)))
    desk.post("m:predict", {"instances": [1, 2, 3]})
    assert desk.asked()[0]["x"].tolist() == [1, 2, 3]


def test_rows_of_a_model_with_several_inputs_and_outputs(desk: Serving) -> None:
    desk.serve(TWO)
    exchange = desk.post("m:predict", {"instances": [{"a": [1, 2], "b": 3}, {"b": 6, "a": [4, 5]}]})
    inputs, _, number = desk.asked()
    assert {name: array.tolist() for name, array in inputs.items()} == {"a": [[1, 2], [4, 5]], "b": [3, 6]}
    desk.reply(number, s=("FP32", [0.1, 2]), t=("INT64", [[1, 2], [3, 4]]))
    assert said(exchange).body == b'{"predictions":[{"s":0.1,"t":[1,2]},{"s":2.0,"t":[3,4]}]}'


def test_columns(desk: Serving) -> None:
    desk.serve(TWO)
    exchange = desk.post("m:predict", {"inputs": {"a": [[1, 2], [4, 5]], "b": [3, 6]}})
    inputs, _, number = desk.asked()
    assert {name: array.tolist() for name, array in inputs.items()} == {"a": [[1, 2], [4, 5]], "b": [3, 6]}
    desk.reply(number, s=("FP32", [0.1, 2]), t=("INT64", [[1, 2], [3, 4]]))
    assert said(exchange).body == b'{"outputs":{"s":[0.1,2.0],"t":[[1,2],[3,4]]}}'


@pytest.mark.parametrize("inputs", [[[1, 2]], {"x": [[1, 2]]}])
def test_a_bare_column(desk: Serving, inputs: Any) -> None:
    desk.serve(model())
    assert desk.predict({"inputs": inputs}, y=("FP32", [[2, 4]])) == {"outputs": [[2, 4]]}


def test_a_scalar(desk: Serving) -> None:
    desk.serve(model((("x", "FP64", ()),), (("y", "FP64", ()),)))
    assert desk.predict({"inputs": 5}, y=("FP64", 2.5)) == {"outputs": 2.5}
    exchange = desk.post("m:predict", {"inputs": {"x": 5}})
    desk.reply(desk.asked()[2], y=("FP64", 2.5))
    assert json.loads(said(exchange).body) == {"outputs": 2.5}


def test_nan_and_infinities(desk: Serving) -> None:
    desk.serve(model())
    exchange = desk.post("m:predict", b'{"instances": [[NaN, -Infinity]]}')
    inputs, _, number = desk.asked()
    assert math.isnan(inputs["x"][0, 0])
    assert inputs["x"][0, 1] == -math.inf
    desk.reply(number, y=("FP32", [[math.nan, math.inf]]))
    assert said(exchange).body == b'{"predictions":[[NaN,Infinity]]}'


def test_nan_in_rows_of_several_outputs(desk: Serving) -> None:
    desk.serve(TWO)
    exchange = desk.post("m:predict", {"instances": [{"a": [1, 2], "b": 3}]})
    desk.reply(desk.asked()[2], s=("FP32", [math.nan]), t=("INT64", [[1, 2]]))
    assert said(exchange).body == b'{"predictions":[{"s":NaN,"t":[1,2]}]}'


@pytest.mark.parametrize("datatype", ["FP16", "BF16"])
def test_floats_of_16_bits(desk: Serving, datatype: str) -> None:
    desk.serve(model((("x", datatype, (-1, 2)),), (("y", datatype, (-1, 2)),)))
    exchange = desk.post("m:predict", {"instances": [[1, 2.5]]})
    inputs, _, number = desk.asked()
    assert inputs["x"].tolist() == [[1, 2.5]]
    desk.reply(number, y=(datatype, np.array([[0.5, -3]], np.float32)))
    assert said(exchange).body == b'{"predictions":[[0.5,-3.0]]}'
    status, error = desk.error({"instances": [[3.4e38 if datatype == "BF16" else 70000, 1]]})
    assert (status, error) == (400, f"the data of input 'x' has a number that does not fit {datatype}")


def test_binaries(desk: Serving) -> None:
    desk.serve(model((("x", "BYTES", (-1,)),), (("text", "BYTES", (-1,)), ("raw_bytes", "BYTES", (-1, 1)))))
    exchange = desk.post("m:predict", {"instances": [{"b64": "/wA="}, "grün", {"b64": "YQ"}]})
    inputs, _, number = desk.asked()
    assert inputs["x"].tolist() == [b"\xff\0", "grün".encode(), b"a"]
    desk.reply(number, text=("BYTES", [b"null", b"b"]), raw_bytes=("BYTES", [[b"\xff"], [b""]]))
    assert json.loads(said(exchange).body) == {
        "predictions": [{"text": "null", "raw_bytes": [{"b64": "/w=="}]}, {"text": "b", "raw_bytes": [{"b64": ""}]}]
    }


def test_text_that_is_none(desk: Serving) -> None:
    desk.serve(model(outputs=[("y", "BYTES", (-1,))]))
    exchange = desk.post("m:predict", {"instances": [[1, 2]]})
    desk.reply(desk.asked()[2], y=("BYTES", [b"\xff"]))
    response = said(exchange)
    assert response.status == 400
    assert response.error.startswith("output 'y' holds a string that is not UTF-8")
    assert "_bytes" in response.error


@pytest.mark.parametrize(
    ("outputs", "words"),
    [
        ({"s": ("FP32", [1]), "t": ("FP32", [1, 2])}, "Tensor name: t has inconsistent batch size: 2 expecting: 1"),
        ({"s": ("FP32", 1)}, "Tensor name: s has no shape information"),
    ],
)
def test_outputs_without_rows_in_common(desk: Serving, outputs: dict[str, Any], words: str) -> None:
    desk.serve(model())
    exchange = desk.post("m:predict", {"instances": [[1, 2]]})
    desk.reply(desk.asked()[2], **outputs)
    response = said(exchange)
    assert response.status == 400
    assert words in response.error
    assert "'inputs'" in response.error


BAD: list[tuple[Any, str]] = [
    (b"", "not JSON"),
    (b"{", "not JSON"),
    (b"[" * 100_000, "not JSON"),
    ([], "not a JSON object"),
    ({}, "Missing 'inputs' or 'instances' key"),
    ({"instances": [[1, 2]], "inputs": []}, "only one of 'inputs' or 'instances'"),
    ({"instances": []}, "'instances' is a list of at least one row"),
    ({"instances": 5}, "'instances' is a list of at least one row"),
    ({"instances": [[1, 2]], "signature_name": 3}, "'signature_name' is a string"),
    ({"instances": [[1, 2]], "signature_name": "old"}, 'Serving signature key "old" not found; there is one'),
    ({"instances": [[1, 2], [3]]}, "input 'x' is not 2 long everywhere in dimension 2"),
    ({"instances": [[1, 2], 3]}, "input 'x' is not 2 long everywhere"),
    ({"instances": [1, [2]]}, "input 'x' holds lists"),
    ({"instances": [[1, 2, 3]]}, "unexpected shape for input 'x' for model 'm'. Expected [-1, 2], got [1, 3]"),
    ({"instances": [["1", "2"]]}, "input 'x' holds strings; FP32 takes numbers"),
    ({"instances": [[None, 2]]}, "input 'x' holds null"),
    ({"instances": [[{"b64": "YQ=="}, 2]]}, "input 'x' holds objects"),
    ({"instances": [[1e300, 2]]}, "input 'x' has a number that does not fit FP32"),
    ({"instances": [{"z": [1, 2]}]}, "element: 0 of 'instances' list. JSON object: ['z'] keys must be equal to: x"),
    ({"instances": [{"x": [1, 2]}, {}]}, "Failed to process element: 1 of 'instances'"),
    ({"instances": [{"x": [1, 2]}, [1, 2]]}, "Expecting object but got list at item 1 of input list"),
    ({"instances": [[1, 2], {"x": [1, 2]}]}, "input 'x' is not 2 long everywhere"),
    ({"inputs": {"z": [[1, 2]]}}, "Missing named input: x in 'inputs' object."),
    ({"inputs": 5}, "unexpected shape for input 'x'"),
    ({"inputs": None}, "input 'x' holds null"),
    ({"inputs": []}, "unexpected shape for input 'x'"),
    ({"inputs": [[]]}, "unexpected shape for input 'x'"),
    (b'{"inputs": ' + b"[" * 40 + b"]" * 40 + b"}", "input 'x' has more than 32 dimensions"),
]


@pytest.mark.parametrize(("request_", "words"), BAD)
def test_bad_requests(desk: Serving, request_: Any, words: str) -> None:
    desk.serve(model())
    status, error = desk.error(request_)
    assert status == 400
    assert words in error


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        ({"instances": [[1, 2]]}, "instances is a plain list, but expecting list of objects as multiple input tensors"),
        ({"inputs": [[1, 2]]}, "inputs is a plain value/list, but expecting an object as multiple input tensors"),
        ({"inputs": {"a": [[1, 2]]}}, "Missing named input: b in 'inputs' object."),
        ({"instances": [{"a": [1, 2.5], "b": 1}]}, "input 'a' holds numbers with a fraction, whole numbers; INT32"),
    ],
)
def test_bad_requests_to_a_model_with_several_inputs(desk: Serving, request_: Any, words: str) -> None:
    desk.serve(TWO)
    status, error = desk.error(request_)
    assert status == 400
    assert words in error


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ({"b64": "*"}, "not base64"),
        ({"b64": "ü"}, "not base64"),
        ({"b64": 5}, 'not {"b64": "..."}'),
        ({"b46": "YQ=="}, 'not {"b64": "..."}'),
        (5, "holds whole numbers; BYTES takes strings"),
    ],
)
def test_bad_binaries(desk: Serving, value: Any, words: str) -> None:
    desk.serve(model((("x", "BYTES", (-1, 1)),)))
    status, error = desk.error({"instances": [[value]]})
    assert status == 400
    assert "input 'x'" in error
    assert words in error


# --- versions ---


def sent_to(desk: Serving, path: str) -> str:
    assert waits(desk.post(f"{path}:predict", {"instances": [[1, 2]]}))
    [group] = desk.sent().groups
    return group.form.version


def test_versions_and_labels(desk: Serving) -> None:
    route = Route("m", ("2",), (("stable", "1"), ("1", "2")))
    desk.serve(ready("m", "1"), ready("m", "2"), routes=(route,))
    assert sent_to(desk, "m") == "~2", "or whichever is current"
    assert sent_to(desk, "m/versions/1") == "1"
    assert sent_to(desk, "m/labels/stable") == "1"
    assert sent_to(desk, "m/labels/1") == "2"
    assert desk.read_model("m/labels/stable/metadata")[1]["model_spec"]["version"] == "1"
    assert [each["version"] for each in desk.read_model("m/labels/stable")[1]["model_version_status"]] == ["1"]
    status, error = desk.error({}, "m/labels/canary:predict")
    assert (status, error) == (400, "Unrecognized servable version label: canary")
    assert desk.error({}, "m/versions/9:predict") == (404, "Servable not found for request: Specific(m, 9)")
    assert desk.error({}, "half:predict") == (404, "Servable not found for request: Latest(half)")
    assert desk.error({}, "half/labels/a:predict") == (404, "Servable not found for request: Latest(half)")
    assert desk.meter("penstock_request_failures", "", "", "not_found") == 2


def test_traffic_is_split_as_elsewhere(desk: Serving) -> None:
    route = Route("m", ("1",), (), (("1", 50), ("2", 50)))
    desk.serve(ready("m", "1"), ready("m", "2"), routes=(route,))
    assert {sent_to(desk, "m") for _ in range(4)} == {"~1", "~2"}


# --- routes ---


def test_methods_and_paths(desk: Serving) -> None:
    desk.serve(model())
    answer = desk.ask("GET", "/v1/models/m:predict")
    assert (answer.status, answer.headers["Allow"], answer.error) == (405, "OPTIONS, POST", "Method Not Allowed")
    assert desk.ask("DELETE", "/v1/models/m").headers["Allow"] == "GET, HEAD, OPTIONS, POST"
    assert desk.ask("POST", "/v1/models/m/metadata").status == 405
    answer = desk.ask("POST", "/v1/models/m:guess", b"{}")
    assert answer.status == 400
    assert answer.error.startswith("Malformed request: POST /v1/models/m:guess; ")
    assert ":predict" in answer.error
    assert desk.ask("GET", "/v1/models/m/nothing").status == 404
    assert waits(desk.begin("POST", "/V1/Models/m:Predict", b'{"instances": [[1, 2]]}'))


# --- as requests of v2 ---


def test_compressed_both_ways(loop: Loop) -> None:
    desk = Serving(loop, compress_bytes_min=1).serve(model())
    body = gzip.compress(b'{"instances": [[1, 2]]}')
    exchange = desk.post("m:predict", body, Content_Encoding="gzip", Accept_Encoding="gzip")
    desk.reply(desk.asked()[2], y=("FP32", [[1, 2]]))
    response = said(exchange)
    assert (response.headers["Content-Encoding"], response.headers["Content-Type"]) == ("gzip", "application/json")
    assert gzip.decompress(response.body) == b'{"predictions":[[1.0,2.0]]}'


def test_large_tensors_are_placed(loop: Loop, slots: Slots) -> None:
    desk = Serving(loop, slots)
    desk.serve(model((("x", "FP64", (-1, -1)),)))
    exchange = desk.post("m:predict", {"instances": [[1] * (PLACED_MIN_BYTES // 8)]})
    [group] = desk.sent().groups
    assert len(group.places) == 1
    desk.reply(group.ids[0], y=("FP32", [[1, 2]]))
    assert said(exchange).status == 200
    desk.budget.release(exchange)
    assert slots.arena.allocator.used == 0


def test_refusals_have_their_status(desk: Serving) -> None:
    desk.serve(model())
    exchange = desk.post("m:predict", {"instances": [[1, 2]]})
    number = desk.asked()[2]
    desk.hear(FromBroker(Refusals(EPOCH, (Refusal(number, OVERLOADED, "Exceeds maximum queue size", 2000),))))
    response = said(exchange)
    assert (response.status, response.headers["Retry-After"]) == (503, "2")
    assert response.error == "Exceeds maximum queue size"


# --- examples ---

FEATURES = (("age", "FP32", (-1, 1)), ("name", "BYTES", (-1,)), ("path", "INT64", (-1, -1, 2)))
EXAMPLES = {
    "context": {"name": "all", "path": [1, 2]},
    "examples": [{"age": 5, "path": [3, 4]}, {"age": [6.5], "name": {"b64": "YQ=="}, "unknown": 1}],
}


def test_examples_are_rows_of_features(desk: Serving) -> None:
    desk.serve(model(FEATURES, (("y", "FP32", (-1, 1)), ("z", "INT64", (-1,)))))
    exchange = desk.post("m:regress", EXAMPLES)
    inputs, outputs, number = desk.asked()
    assert {name: array.tolist() for name, array in inputs.items()} == {
        "age": [[5], [6.5]],
        "name": [b"all", b"a"],
        "path": [[[3, 4]], [[1, 2]]],
    }
    assert outputs == ("y",)
    desk.reply(number, y=("FP32", [[0.5], [math.nan]]))
    assert said(exchange).body == b'{"results":[0.5,NaN]}'


def test_classes_are_numbered(desk: Serving) -> None:
    desk.serve(model(outputs=[("label", "INT64", (-1,)), ("p", "FP16", (-1, 2))]))
    answer = desk.predict({"examples": [{"x": [1, 2]}]}, "classify", p=("FP16", [[0.25, 0.75]]))
    assert answer == {"results": [[["0", 0.25], ["1", 0.75]]]}


def test_classes_have_names(desk: Serving) -> None:
    outputs = ("scores", "FP32", (-1, 2)), ("logits", "FP32", (-1, 2)), ("classes", "BYTES", (-1, 2))
    desk.serve(model(outputs=outputs))
    exchange = desk.post("m:classify", {"examples": [{"x": [1, 2]}] * 2})
    _, wanted, number = desk.asked()
    assert wanted == ("scores", "classes")
    names = [[b"cat", b"dog"], [b"dog", b"cat"]]
    desk.reply(number, scores=("FP32", [[0.25, 0.75], [1, 0]]), classes=("BYTES", names))
    assert json.loads(said(exchange).body) == {
        "results": [[["cat", 0.25], ["dog", 0.75]], [["dog", 1.0], ["cat", 0.0]]]
    }


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        ({}, "'examples' is a list of at least one example"),
        ({"examples": []}, "'examples' is a list of at least one example"),
        ({"examples": [5]}, "'examples' has another value at 0"),
        ({"examples": [{"x": [1, 2]}], "context": []}, "'context' is a JSON object of features"),
        ({"examples": [{"x": [1, 2]}, {}]}, "Feature: x is missing in example 1, and in 'context'"),
        ({"examples": [{"x": [1, 2]}, {"x": 1}]}, "Feature: x has 2 values in example 0, and 1 in example 1"),
        ({"examples": [{"x": [1, 2, 3]}]}, "Feature: x has 3 values in each example; the input takes [2]"),
        ({"examples": [{"x": [[1], [2]]}]}, "input 'x' holds lists"),
        ({"examples": [{"x": ["a", "b"]}]}, "input 'x' holds strings"),
        ({"examples": [{"x": [1, 2]}], "signature_name": "classify"}, 'key "classify" not found'),
    ],
)
def test_bad_examples(desk: Serving, request_: Any, words: str) -> None:
    desk.serve(model())
    status, error = desk.error(request_, "m:classify")
    assert status == 400
    assert words in error


@pytest.mark.parametrize(
    ("verb", "asked", "words"),
    [
        ("classify", model(outputs=[("y", "FP32", (-1,))]), "cannot be asked to classify: that takes one output"),
        ("classify", model(outputs=[("y", "FP32", (-1, 2)), ("z", "FP32", (-1, 2))]), "'z' (FP32 [-1, 2])"),
        ("regress", model(), "cannot be asked to regress: that takes one output of floats"),
        ("regress", model(outputs=[("y", "INT64", (-1,))]), "'y' (INT64 [-1])"),
        ("classify", model((("x", "FP32", (1, 2)),)), "cannot be asked to classify: examples are rows of features"),
        ("classify", model((("x", "FP32", (-1, -1, -1)),)), "'x' (FP32 [-1, -1, -1])"),
    ],
)
def test_models_that_cannot_be_asked_so(desk: Serving, verb: str, asked: ModelSpec, words: str) -> None:
    desk.serve(asked)
    status, error = desk.error({"examples": [{"x": [1, 2]}]}, f"m:{verb}")
    assert status == 400
    assert words in error
    assert "use :predict" in error


# --- round trips ---

NUMBERS = [datatype for datatype in DTYPES if datatype not in ("BYTES", "BF16")]
VALUES = st.sampled_from(NUMBERS).flatmap(
    lambda datatype: st.tuples(
        st.just(datatype),
        arrays(
            DTYPES[datatype],
            array_shapes(min_dims=1, max_dims=4, max_side=4),
            elements={"allow_nan": False} if datatype.startswith("FP") else None,
        ),
    )
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(VALUES, st.booleans())
def test_what_is_answered_can_be_asked_again(value: tuple[str, Array], rows: bool) -> None:
    """The same JSON, with another key, comes to the same bytes."""
    datatype, array = value
    outcome, payload = answer(x=(datatype, array))
    text = (write_rows if rows else write_columns)(pack_outcome(outcome), payload)
    given_, asked = ("predictions", "instances") if rows else ("outputs", "inputs")
    name = TensorSpec("x", datatype, (-1,) * array.ndim)
    model = ModelSpec("m", "1", "", (name,), (), False, 1)
    question = read_predict(model, json.dumps({asked: json.loads(text)[given_]}).encode())
    assert question.layout.tensors[0].shape == array.shape
    assert decode(datatype, array.shape, question.payload).tolist() == array.tolist()


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(-5, 5), st.binary(max_size=5)), min_size=1, max_size=5))
def test_named_rows_can_be_asked_again(values: list[tuple[int, bytes]]) -> None:
    numbers, texts = map(list, zip(*values, strict=True))
    outcome, payload = answer(n=("INT8", numbers), x_bytes=("BYTES", np.array(texts, object)))
    predictions = json.loads(write_rows(pack_outcome(outcome), payload))["predictions"]
    assert predictions == [
        {"n": number, "x_bytes": {"b64": base64.b64encode(text).decode()}} for number, text in values
    ]
    inputs = TensorSpec("n", "INT8", (-1,)), TensorSpec("x_bytes", "BYTES", (-1,))
    model = ModelSpec("m", "1", "", inputs, (), False, 1)
    assert read_predict(model, json.dumps({"instances": predictions}).encode()).payload == payload


ANY = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["x", "b", "b64", "instances", "inputs", "examples"]), inner, max_size=2)
    ),
    max_leaves=8,
)


@settings(max_examples=300, deadline=None)
@given(
    st.dictionaries(st.sampled_from(["instances", "inputs", "signature_name", "examples", "context"]), ANY),
    st.sampled_from(sorted(DTYPES)),
    st.sampled_from([read_predict, read_classify]),
)
def test_anything_is_read_or_refused(request: Any, datatype: str, read: Callable[[ModelSpec, Buffer], Any]) -> None:
    outputs = (TensorSpec("y", "FP32", (-1, 2)),)
    model = ModelSpec("m", "1", "", (TensorSpec("x", datatype, (-1, -1)),), outputs, False, 1)
    with contextlib.suppress(PenstockError):
        read(model, json.dumps(request).encode())


def test_said_is_what_v2_says(desk: Serving) -> None:
    """Errors look the same, whatever protocol was spoken."""
    desk.serve(model())
    v1: Said = said(desk.post("m:predict", b"{"))
    v2 = desk.ask("POST", "/v2/models/m/infer", b"{")
    assert (v1.status, v1.error) == (v2.status, v2.error)
