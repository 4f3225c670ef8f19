"""What a request holds: made up in the shape that is declared, or given; and that the server reads it as meant."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from penstock.gateway.inference import Parser
from penstock.load.inputs import InputsError, choose, parse_shape, read_metadata, write_body, write_request
from penstock.wire.codec import unpack_layout
from penstock.wire.models import ModelSpec, TensorSpec
from penstock.wire.tensors import DTYPES, Array, decode

X = TensorSpec("x", "FP32", (-1, 3))
IDS = TensorSpec("ids", "INT64", (-1, -1))
FIXED = TensorSpec("fixed", "UINT8", (2, 2))


@pytest.mark.parametrize(
    ("text", "shape"),
    [
        ("1x3x224", (1, 3, 224)),
        ("1,3,224", (1, 3, 224)),
        ("[1, 3]", (1, 3)),
        ("7", (7,)),
        ("[]", ()),
        ("", None),
        ("1x", None),
        ("-1x3", None),
        ("N", None),
        ("a.npy", None),
        ("1.5", None),
    ],
)
def test_shapes_are_read(text: str, shape: tuple[int, ...] | None) -> None:
    assert parse_shape(text) == shape


# JSON does not carry the two halves to this server.
@pytest.mark.parametrize(
    ("datatype", "binary"),
    [(each, True) for each in sorted(DTYPES)] + [(each, False) for each in sorted(DTYPES.keys() - {"FP16", "BF16"})],
)
def test_the_server_reads_what_was_made_up(datatype: str, binary: bool) -> None:
    specs = [TensorSpec("x", datatype, (-1, 3)), TensorSpec("y", datatype, (-1,))]
    inputs = choose("m", specs, 2, {}, {})
    body, length = write_body(inputs, specs, binary)
    read = parse(specs, body, length if binary else None)
    for name, array in inputs.items():
        assert read[name].shape == array.shape
        if datatype == "BYTES":
            assert [each.decode() for each in read[name].flat] == list(array.flat)
        else:
            tolerance = {"BF16": 1e-2, "FP32": 1e-5}.get(datatype, 0.0)
            np.testing.assert_allclose(read[name].astype("f8"), array.astype("f8"), rtol=tolerance)


def parse(specs: list[TensorSpec], body: bytes, length: int | None) -> dict[str, Array]:
    """As the gateway does."""
    spec = ModelSpec("m", "1", "onnxruntime_onnx", tuple(specs), (X,), True, 8)
    query, payload = Parser().parse(spec, body, length)
    view = memoryview(payload)
    return {
        tensor.name: decode(tensor.datatype, tensor.shape, view[tensor.offset : tensor.offset + tensor.nbytes])
        for tensor in unpack_layout(query.form.body).tensors
    }


def test_what_is_given_goes_before_what_is_declared() -> None:
    ids = np.array([[7, 8, 9]])
    chosen = choose("m", [X, IDS, FIXED], 1, {"x": (5, 3)}, {"ids": ids})
    assert chosen["x"].shape == (5, 3)
    assert chosen["ids"] is ids
    assert chosen["fixed"].shape == (2, 2)


def test_an_only_input_needs_no_name() -> None:
    assert choose("m", [IDS], 1, {"": (1, 7)}, {})["ids"].shape == (1, 7)
    assert choose("m", [IDS], 1, {}, {"": np.ones((2, 2), "i8")})["ids"].shape == (2, 2)


@pytest.mark.parametrize(
    ("specs", "rows", "shapes", "arrays", "sentence"),
    [
        ([IDS], 1, {}, {}, "input 'ids' of 'm' has dimensions of any size; say which: --input ids=1xN with numbers"),
        ([FIXED], 4, {}, {}, r"has the shape \[2, 2\], whose first dimension is no number of rows"),
        ([X], 1, {"x": (1, 4)}, {}, r"has the shape \[-1, 3\], not \[1, 4\]"),
        ([X], 1, {"x": (3,)}, {}, r"not \[3\]"),
        ([X], 1, {"z": (1, 3)}, {}, r"'m' has no input 'z'; it has \['x'\]"),
        ([X, FIXED], 1, {"": (1, 3)}, {}, "'m' has several inputs; write --input NAME="),
        ([X], 1, {}, {"x": np.ones((1, 3))}, "is FP32, and what is given is FP64; convert it to float32"),
        ([X], 1, {}, {"x": np.ones((1, 4), "f4")}, r"not \[1, 4\]"),
        ([X], 1, {}, {"x": np.ones((1, 3), "c8")}, "an array of complex64 has no datatype"),
        ([X], 1, {"x": (1 << 40, 3)}, {}, "is larger than 1024 MiB"),
    ],
)
def test_what_no_request_can_be_made_of_is_a_sentence(
    specs: list[TensorSpec], rows: int, shapes: dict[str, Any], arrays: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(InputsError, match=sentence):
        choose("m", specs, rows, shapes, arrays)


def test_bytes_that_are_no_text_need_a_server_with_binary_tensors() -> None:
    spec = TensorSpec("x", "BYTES", (-1,))
    given = {"x": np.array([b"\xff"], object)}
    assert write_body(given, [spec], True)[0].endswith(b"\x01\0\0\0\xff")
    with pytest.raises(InputsError, match="no UTF-8"):
        write_body(given, [spec], False)


def test_metadata_are_read() -> None:
    said = {"name": "m", "inputs": [{"name": "x", "datatype": "FP32", "shape": [-1, 3]}], "outputs": []}
    assert read_metadata("m", said) == [X]


@pytest.mark.parametrize("said", [None, [], {}, {"inputs": 3}, {"inputs": [{"name": "x"}]}, {"inputs": ["x"]}])
def test_metadata_that_are_none_are_refused(said: Any) -> None:
    with pytest.raises(InputsError, match="no model metadata"):
        read_metadata("m", said)


def test_a_datatype_that_is_none_is_refused() -> None:
    with pytest.raises(InputsError, match="of the datatype FP8, which v2 has not"):
        read_metadata("m", {"inputs": [{"name": "x", "datatype": "FP8", "shape": []}]})


def test_a_request_says_how_long_it_and_its_json_are() -> None:
    assert write_request("h:1", "/p", b"{}", 0) == (
        b"POST /p HTTP/1.1\r\nHost: h:1\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n{}"
    )
    assert b"\r\nInference-Header-Content-Length: 2\r\n\r\n{}xyz" in write_request("h:1", "/p", b"{}xyz", 2)
