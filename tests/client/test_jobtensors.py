"""Arrays in requests and responses of the v2 protocol over HTTP."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from penstock.client.jobtensors import pack_request, read_response
from penstock.wire.errors import BAD_INPUT, INTERNAL, UNSUPPORTED, PenstockError
from penstock.wire.tensors import encode


def no_model(name: str) -> str | None:
    return None


def echo(body: bytes, json_bytes: int) -> tuple[dict[str, str], bytes]:
    """A response whose outputs are the inputs."""
    head = json.loads(body[:json_bytes])
    said = json.dumps({"model_name": "m", "model_version": "1", "outputs": head["inputs"]}).encode()
    return {"inference-header-content-length": str(len(said))}, said + body[json_bytes:]


@pytest.mark.parametrize(
    ("value", "datatype"),
    [
        (np.arange(6, dtype=np.float32).reshape(2, 3), None),
        (np.array([[True, False]]), None),
        (np.array([2**63 + 1], np.uint64), None),
        (np.array([1.5], np.float16), None),
        (np.array([1.5, 2.5], np.float32), "BF16"),
        (np.array(["ä", b"b"], object), None),
        ([[1, 2]], "INT8"),
        (np.empty((0, 4), np.float32), None),
    ],
)
def test_what_is_sent_comes_back(value: Any, datatype: str | None) -> None:
    packed = pack_request({"a": value, "b": np.zeros(3)}, [], {"a": datatype}.get)
    answer = read_response(*echo(packed.body, packed.json_bytes))
    assert list(answer.outputs) == ["a", "b"]
    wanted = np.asarray(value) if np.asarray(value).dtype != object else np.array([b"\xc3\xa4", b"b"], object)
    np.testing.assert_array_equal(answer.outputs["a"], wanted)
    answer.outputs["b"][0] = 1  # it belongs to the receiver
    assert (answer.model, answer.version) == ("m", "1")


def test_outputs_are_named() -> None:
    packed = pack_request({}, ["y", "z"], no_model)
    assert json.loads(packed.body)["outputs"] == [{"name": "y"}, {"name": "z"}]


@pytest.mark.parametrize(
    ("inputs", "said"),
    [
        ([1, 2], "the inputs are arrays by name; list has none"),
        ({"a": [[1], [1, 2]]}, "input 'a' cannot be made an array"),
        ({"a": np.array([1j])}, "input 'a'"),
        ({"a": np.array([1], object)}, "input 'a'"),
    ],
)
def test_what_cannot_be_sent_is_named(inputs: Any, said: str) -> None:
    with pytest.raises(PenstockError, match=said) as raised:
        pack_request(inputs, [], no_model)
    assert raised.value.code == BAD_INPUT


def test_json_is_read_too() -> None:
    outputs = [
        {"name": "x", "datatype": "FP32", "shape": [2, 1], "data": [[1.5], [2.5]]},
        {"name": "s", "datatype": "BYTES", "shape": [2], "data": ["a", "\u00e4"]},
    ]
    answer = read_response({}, json.dumps({"model_name": "m", "model_version": "1", "outputs": outputs}).encode())
    np.testing.assert_array_equal(answer.outputs["x"], np.array([[1.5], [2.5]], np.float32))
    assert answer.outputs["s"].tolist() == [b"a", "\u00e4".encode()]


def test_an_explained_answer_has_its_times() -> None:
    said = {"worker": "gpu0", "batch": 17, "batch_rows": 32, "batch_reason": "full", "held_ms": 12.1, "waited_ms": 3.0}
    head = {"model_name": "m", "model_version": "1", "outputs": [], "parameters": said | {"batch_ms": 4.1}}
    answer = read_response({}, json.dumps(head).encode())
    assert answer.worker == "gpu0"
    assert (answer.complete.queue_us, answer.complete.held_us) == (15_100, 12_100)
    assert answer.complete.batch == (17, 32, "full", 4100, 0)


@pytest.mark.parametrize(
    ("headers", "body", "code"),
    [
        ({}, b"[1]", UNSUPPORTED),
        ({}, b'{"predictions": []}', UNSUPPORTED),
        ({}, b"\xff", UNSUPPORTED),
        ({"content-encoding": "gzip"}, b"{}", UNSUPPORTED),
        ({}, b'{"model_name": "m", "model_version": "1", "outputs": [{"name": "y", "datatype": "FP32"}]}', INTERNAL),
    ],
)
def test_what_is_not_of_this_protocol(headers: dict[str, str], body: bytes, code: str) -> None:
    with pytest.raises(PenstockError) as raised:
        read_response(headers, body)
    assert raised.value.code == code


def test_binary_data_that_is_not_whole() -> None:
    output = {"name": "y", "datatype": "FP32", "shape": [2], "parameters": {"binary_data_size": 8}}
    head = json.dumps({"model_name": "m", "model_version": "1", "outputs": [output]}).encode()
    data = bytes(encode(np.zeros(1, np.float32), "FP32"))
    with pytest.raises(PenstockError, match="output 'y' of the result cannot be read"):
        read_response({"inference-header-content-length": str(len(head))}, head + data)
