"""The highest values of an output, and which classes they are."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from penstock.gateway.classification import Classes, classify, read_classes
from penstock.wire.codec import pack_outcome, unpack_outcome
from penstock.wire.errors import BadMessage, PenstockError
from penstock.wire.messages import Outcome
from penstock.wire.models import ModelSpec, Tensor, TensorSpec
from penstock.wire.tensors import decode

SPEC = ModelSpec(
    "m",
    "1",
    "onnxruntime_onnx",
    (TensorSpec("x", "FP32", (-1, 3)),),
    (TensorSpec("y", "FP32", (-1, 3)), TensorSpec("flags", "BOOL", (-1,)), TensorSpec("text", "BYTES", (-1, 1))),
    True,
    8,
    labels=(("y", "ant\nbee"),),
)


def told(values: Any, datatype: str, most: int, labels: str = "", rows: bool = True) -> Any:
    """What classes are answered for one output, as an array of texts."""
    raw, shape = np.ascontiguousarray(values).tobytes(), values.shape
    body = pack_outcome(Outcome("m", "1", (Tensor("a", "INT8", (2,), 0, 2), Tensor("y", datatype, shape, 2, len(raw)))))
    body, payload = classify({"y": Classes(most, labels)}, rows, body, b"zz" + raw)
    beside, [name, datatype, shape, offset, nbytes] = unpack_outcome(body).tensors
    assert beside == ("a", "INT8", (2,), 0, 2)
    assert payload[:2] == b"zz"
    assert (name, datatype, offset + nbytes) == ("y", "BYTES", len(payload))
    array = decode(datatype, shape, payload[offset:])
    return [[each.decode() for each in row] for row in array] if rows else [each.decode() for each in array]


def test_values_their_classes_and_labels() -> None:
    values = np.array([[0.5, 3.25, -1], [7, 1, 7]], "<f4")
    assert told(values, "FP32", 2, "ant\nbee") == [
        ["3.250000:1:bee", "0.500000:0:ant"],
        ["7.000000:0:ant", "7.000000:2"],
    ]
    assert told(values, "FP32", 1) == [["3.250000:1"], ["7.000000:0"]]
    assert told(values, "FP32", 9)[0] == ["3.250000:1", "0.500000:0", "-1.000000:2"]
    assert told(np.array([15, 0, 32], "<i4"), "INT32", 2, rows=False) == ["32:2", "15:0"]
    assert told(np.array([[1, 2**64 - 1]], "<u8"), "UINT64", 1) == [["18446744073709551615:1"]]
    assert told(np.array([[[1, 2], [4, 3]]], "<i2"), "INT16", 2) == [["4:2", "3:3"]]
    assert told(np.array([[1.5, 2.5]], "<f2"), "FP16", 1) == [["2.500000:1"]]
    assert told(np.array([[1.5, 2.5]], ml_dtypes.bfloat16), "BF16", 1) == [["2.500000:1"]]


def test_what_is_no_number_comes_last_and_what_is_not_there_not_at_all() -> None:
    assert told(np.array([[np.nan, -5, np.inf]], "<f4"), "FP32", 3) == [["inf:2", "-5.000000:1", "nan:0"]]
    assert told(np.zeros((2, 0), "<f4"), "FP32", 3) == [[], []]
    assert told(np.zeros((0, 4), "<f4"), "FP32", 3) == []
    assert told(np.array(3, "<i4"), "INT32", 3, rows=False) == ["3:0"]
    assert told(np.array([3, 4], "<i4"), "INT32", 3) == [["3:0"], ["4:0"]]


@given(
    arrays.arrays(st.sampled_from(["<f4", "<i1", "<u1", "<i8"]), arrays.array_shapes(min_dims=2, max_dims=2)),
    st.integers(1, 20),
)
def test_they_are_those_that_sorting_finds(values: Any, most: int) -> None:
    names = {"<f4": "FP32", "|i1": "INT8", "|u1": "UINT8", "<i8": "INT64"}
    got = told(values, names[values.dtype.str], most)
    for row, found in zip(values.tolist(), got, strict=True):
        keys = [float("-inf") if each != each else each for each in row]
        order = sorted(range(len(row)), key=lambda each: -keys[each])
        assert [int(each.split(":")[1]) for each in found] == order[:most]


def test_an_answer_that_is_cut_off_is_its_senders_fault() -> None:
    body = pack_outcome(Outcome("m", "1", (Tensor("y", "FP32", (1, 3), 0, 12),)))
    with pytest.raises(BadMessage):
        classify({}, True, body, b"1234")


def test_what_a_request_may_ask() -> None:
    assert read_classes(SPEC, "y", 3) == Classes(3, "ant\nbee")
    assert read_classes(SPEC, "nope", 3) == Classes(3, "")  # refused by whoever knows the outputs
    for bad in (0, -1, 1.5, True, "3", None, 1 << 31):
        with pytest.raises(PenstockError, match="output 'y': 'classification' is how many classes"):
            read_classes(SPEC, "y", bad)
    for name, datatype in (("flags", "BOOL"), ("text", "BYTES")):
        with pytest.raises(PenstockError, match=f"for output '{name}' due to unsupported type '{datatype}'"):
            read_classes(SPEC, name, 1)
