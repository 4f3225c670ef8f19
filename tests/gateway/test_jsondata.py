"""Tensors in JSON, both ways."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.gateway.jsondata import dump_data, loads, pack_data
from penstock.wire.errors import BAD_INPUT, PenstockError
from penstock.wire.tensors import DTYPES, decode, encode

NAN, INF = float("nan"), float("inf")
NUMERIC = sorted(set(DTYPES) - {"FP16", "BF16", "BYTES", "BOOL"})


def refusal(datatype: str, shape: list[int], data: Any) -> str:
    with pytest.raises(PenstockError) as raised:
        pack_data("x", datatype, shape, data)
    assert raised.value.code == BAD_INPUT
    return raised.value.message


# --- text ---


def test_json_is_read() -> None:
    assert loads(b'{"a":[1,2.5,"\xc3\xa9",true,null]}') == {"a": [1, 2.5, "é", True, None]}
    assert loads(memoryview(b"[1]")) == [1]


def test_last_of_keys_that_are_there_twice_wins() -> None:
    assert loads(b'{"a":1,"a":2}') == {"a": 2}
    assert loads(b'{"a":1,"a":NaN,"a":2}') == {"a": 2}


def test_tokens_that_are_no_json_are_read_where_they_stand_for_numbers() -> None:
    found = loads(b'{"data":[NaN,Infinity,-Infinity,1],"text":"NaN"}')
    assert math.isnan(found["data"][0])
    assert found["data"][1:] == [INF, -INF, 1]
    assert found["text"] == "NaN"


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{",
        b"{'a':1}",
        b'{"a":1}x',
        b"[nan]",
        b"[NaN",
        b'"\xff"',
        b'"\xff",NaN',
        b"[NaN]\xff",
        b'["\\ud800",NaN]',
        b'["\xed\xa0\x80",NaN]',
        b"\xef\xbb\xbf[NaN]",
        b"[NaN," + b"9" * 5000 + b"]",
        b'["a\nb",NaN]',
    ],
)
def test_what_is_no_json_is_refused(text: bytes) -> None:
    with pytest.raises(PenstockError, match=r"^the request is not JSON: ") as raised:
        loads(text)
    assert raised.value.code == BAD_INPUT


def test_whole_pairs_of_surrogates_are_text_beside_nan() -> None:
    assert loads(b'["\\ud83d\\ude00",NaN]')[0] == "\N{GRINNING FACE}"


@pytest.mark.parametrize("inner", [b"", b"NaN"])
def test_deep_nesting_is_refused(inner: bytes) -> None:
    with pytest.raises(PenstockError, match=r"^the request is not JSON: "):
        loads(b"[" * 100_000 + inner + b"]" * 100_000)


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=60) | st.text(alphabet='[]{}",:NaInfity-0123.eE\\u d8', max_size=60).map(str.encode))
def test_any_bytes_are_json_or_refused(text: bytes) -> None:
    try:
        value = loads(text)
    except PenstockError:
        return
    json.dumps(value, ensure_ascii=False).encode()


# --- data to bytes ---


@pytest.mark.parametrize("datatype", NUMERIC)
def test_numbers_flat_and_nested(datatype: str) -> None:
    expected = np.array([[1, 2, 3], [4, 5, 6]], DTYPES[datatype]).tobytes()
    for data in ([1, 2, 3, 4, 5, 6], [[1, 2, 3], [4, 5, 6]]):
        assert pack_data("x", datatype, [2, 3], data) == expected
    assert pack_data("x", datatype, [1, 2, 3], [[[1, 2, 3], [4, 5, 6]]]) == expected


@pytest.mark.parametrize("datatype", NUMERIC)
def test_largest_and_smallest_numbers(datatype: str) -> None:
    dtype = DTYPES[datatype]
    info: Any = np.finfo(dtype) if dtype.kind == "f" else np.iinfo(dtype)
    data = [info.min.item() if dtype.kind == "f" else info.min, info.max.item() if dtype.kind == "f" else info.max]
    assert pack_data("x", datatype, [2], data) == np.array(data, dtype).tobytes()


def test_floats_take_whole_numbers_nan_and_infinities() -> None:
    packed = pack_data("x", "FP32", [5], [1, 2.5, NAN, INF, -INF])
    np.testing.assert_array_equal(np.frombuffer(packed, "<f4"), [1, 2.5, NAN, INF, -INF])


@pytest.mark.parametrize("data", [[True, False], [1, 0], [[True], [False]]])
def test_booleans_are_also_one_and_zero(data: list[Any]) -> None:
    assert pack_data("x", "BOOL", [2, 1], data) == b"\x01\x00"


def test_strings_are_lengths_and_utf_8() -> None:
    assert pack_data("x", "BYTES", [3], ["a", "", "é"]) == b"\x01\0\0\0a\0\0\0\0\x02\0\0\0\xc3\xa9"


@pytest.mark.parametrize("datatype", ["FP32", "BOOL", "BYTES", "UINT8"])
@pytest.mark.parametrize(("shape", "data"), [([0], []), ([2, 0], [[], []]), ([0, 3], []), ([2, 0, 3], [[], []])])
def test_nothing_is_data_too(datatype: str, shape: list[int], data: list[Any]) -> None:
    assert pack_data("x", datatype, shape, data) == b""


def test_scalar_is_a_list_of_one() -> None:
    assert pack_data("x", "INT32", [], [7]) == b"\x07\0\0\0"


@pytest.mark.parametrize(
    ("shape", "data", "sentence"),
    [
        ([2, 3], [1, 2, 3], "input 'x' has 3 elements in its data; its shape [2, 3] takes 6"),
        ([2], [], "input 'x' has 0 elements in its data; its shape [2] takes 2"),
        ([2, 3], [[1, 2, 3]] * 3, "input 'x' has 9 elements in its data; its shape [2, 3] takes 6"),
        ([], [1, 2], "input 'x' has 2 elements in its data; its shape [] takes 1"),
        ([1 << 62], [1], f"input 'x' has 1 elements in its data; its shape [{1 << 62}] takes {1 << 62}"),
        ([2, 3], [[1, 2, 3], [4, 5]], "the data of input 'x' is not 3 long everywhere in dimension 2 of [2, 3]"),
        ([2, 3], [[1, 2], [3, 4]], "the data of input 'x' is not 3 long everywhere in dimension 2 of [2, 3]"),
        ([2, 1], [[1], 2], "the data of input 'x' is not 1 long everywhere in dimension 2 of [2, 1]"),
        (
            [1, 2, 2],
            [[[1, 2], [3]]],
            "the data of input 'x' is not 2 long everywhere in dimension 3 of [1, 2, 2]",
        ),
        ([2], [1, [2]], "the data of input 'x' holds lists, whole numbers; INT32 takes whole numbers"),
        ([1], [[1]], "the data of input 'x' holds lists; INT32 takes whole numbers"),
        ([], [[1]], "the data of input 'x' holds lists; INT32 takes whole numbers"),
    ],
)
def test_data_of_another_shape_is_refused(shape: list[int], data: Any, sentence: str) -> None:
    assert refusal("INT32", shape, data) == sentence


@pytest.mark.parametrize("data", [1, "1", None, {"a": 1}, True])
def test_data_is_a_list(data: Any) -> None:
    assert refusal("INT32", [1], data) == "the data of input 'x' is not a list"


@pytest.mark.parametrize(
    ("datatype", "data", "came", "takes"),
    [
        ("INT32", [1.5], "numbers with a fraction", "whole numbers"),
        ("INT32", [1.0], "numbers with a fraction", "whole numbers"),
        ("INT32", [NAN], "numbers with a fraction", "whole numbers"),
        ("INT32", ["1"], "strings", "whole numbers"),
        ("INT32", [True], "booleans", "whole numbers"),
        ("INT32", [None], "null", "whole numbers"),
        ("UINT8", [{}], "objects", "whole numbers"),
        ("FP32", ["NaN"], "strings", "numbers"),
        ("FP32", [True], "booleans", "numbers"),
        ("FP64", [None], "null", "numbers"),
        ("BOOL", [2], "whole numbers", "true and false"),
        ("BOOL", [0.0], "numbers with a fraction", "true and false"),
        ("BOOL", ["true"], "strings", "true and false"),
        ("BYTES", [1], "whole numbers", "strings"),
        ("BYTES", [None], "null", "strings"),
    ],
)
def test_data_of_another_kind_is_refused(datatype: str, data: list[Any], came: str, takes: str) -> None:
    assert refusal(datatype, [1], data) == f"the data of input 'x' holds {came}; {datatype} takes {takes}"


def test_all_kinds_that_came_are_named() -> None:
    assert refusal("INT8", [4], [1, "a", None, 1.5]) == (
        "the data of input 'x' holds null, numbers with a fraction, strings, whole numbers; INT8 takes whole numbers"
    )


@pytest.mark.parametrize(
    ("datatype", "number"),
    [
        ("UINT8", 256),
        ("UINT8", -1),
        ("INT8", 128),
        ("INT8", -129),
        ("UINT16", 65_536),
        ("INT16", -32_769),
        ("UINT32", 1 << 32),
        ("INT32", 1 << 31),
        ("UINT64", 1 << 64),
        ("UINT64", -1),
        ("INT64", 1 << 63),
        ("FP32", 1e39),
        ("FP32", -(10**39)),
        ("FP64", 10**400),
    ],
)
def test_number_that_does_not_fit_is_refused(datatype: str, number: float) -> None:
    assert refusal(datatype, [2], [0, number]) == f"the data of input 'x' has a number that does not fit {datatype}"


@pytest.mark.parametrize("datatype", ["FP16", "BF16"])
def test_half_floats_come_as_binary_only(datatype: str) -> None:
    assert refusal(datatype, [1], [1.0]) == (
        f"input 'x' is {datatype}, which JSON cannot carry; send it with the binary tensor extension"
    )


json_values: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers(-300, 300) | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=2), inner, max_size=2),
    max_leaves=10,
)


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(sorted(DTYPES)), st.lists(st.integers(0, 3), max_size=3), json_values)
def test_any_data_is_a_tensor_or_refused(datatype: str, shape: list[int], data: Any) -> None:
    try:
        packed = pack_data("x", datatype, shape, data)
    except PenstockError as error:
        outcome: object = "'x'" in error.message
    else:
        outcome = decode(datatype, shape, packed).shape == tuple(shape)
    assert outcome is True


# --- bytes to data ---


@pytest.mark.parametrize(
    ("datatype", "values", "text"),
    [
        ("BOOL", [True, False], b"[true,false]"),
        ("UINT8", [0, 255], b"[0,255]"),
        ("INT64", [-(1 << 63), (1 << 63) - 1], b"[-9223372036854775808,9223372036854775807]"),
        ("UINT64", [(1 << 64) - 1], b"[18446744073709551615]"),
        ("FP32", [0.1, 1.0], b"[0.1,1.0]"),
        ("FP64", [0.1, -2.5], b"[0.1,-2.5]"),
        ("FP32", [NAN, 1.5, INF, -INF], b"[NaN,1.5,Infinity,-Infinity]"),
        ("FP64", [NAN], b"[NaN]"),
        ("BYTES", ["null", 'a"b', "é"], b'["null","a\\"b","\xc3\xa9"]'),
        ("FP32", [], b"[]"),
        ("BYTES", [], b"[]"),
    ],
)
def test_data_is_a_flat_list(datatype: str, values: list[Any], text: bytes) -> None:
    array = np.array(values, object if datatype == "BYTES" else DTYPES[datatype])
    for shape in ([len(values)], [1, len(values)]):
        assert dump_data(datatype, shape, encode(array, datatype)) == text


def test_string_that_is_no_text_is_refused() -> None:
    with pytest.raises(PenstockError, match="not UTF-8, which JSON cannot carry; ask for it as binary") as raised:
        dump_data("BYTES", [1], b"\x01\0\0\0\xff")
    assert raised.value.code == BAD_INPUT


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_what_is_written_is_read_as_the_same(data: st.DataObject) -> None:
    datatype = data.draw(st.sampled_from([*NUMERIC, "BOOL"]))
    dtype = DTYPES[datatype]
    shape = data.draw(st.lists(st.integers(0, 3), max_size=3))
    count = math.prod(shape) * dtype.itemsize
    raw = data.draw(st.binary(min_size=count, max_size=count))
    if datatype == "BOOL":
        raw = bytes(byte & 1 for byte in raw)
    before = np.frombuffer(raw, dtype)
    packed = pack_data("x", datatype, shape, loads(dump_data(datatype, shape, raw)))
    np.testing.assert_array_equal(np.frombuffer(packed, dtype), before)
