"""Tensors become bytes and arrays again; bytes that are no tensor are refused."""

from __future__ import annotations

import math
import struct
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.wire.datatypes import ITEM_SIZES
from penstock.wire.errors import BAD_INPUT, PenstockError
from penstock.wire.tensors import DTYPES, datatype_of, decode, encode, from_bf16, pack_strings, to_bf16, unpack_strings

LIGHT = settings(max_examples=60, deadline=None)

shapes = st.lists(st.integers(0, 3), max_size=4)
FIXED = sorted(set(DTYPES) - {"BYTES"})


def test_both_tables_of_datatypes_agree() -> None:
    assert DTYPES.keys() == ITEM_SIZES.keys()
    assert {name: DTYPES[name].itemsize for name in FIXED} | {"BYTES": 0} == ITEM_SIZES


def bits(value: float) -> int:
    """The bits of a float32."""
    number: int = struct.unpack("<I", struct.pack("<f", value))[0]
    return number


def nearest_bf16(value: float) -> int:
    """The bits of the bfloat16 nearest to a finite float32, ties to even: by comparing both neighbours."""
    below = bits(value) >> 16  # towards zero
    above = below + 1
    low, high = (struct.unpack("<f", struct.pack("<I", each << 16))[0] for each in (below, above))
    if math.isinf(high):
        high = math.copysign(2.0**128, value)
    to_low, to_high = abs(value - low), abs(high - value)
    if to_low == to_high:
        return below if below % 2 == 0 else above
    return below if to_low < to_high else above


@pytest.mark.parametrize("datatype", FIXED)
def test_every_value_of_a_datatype_survives(datatype: str) -> None:
    @LIGHT
    @given(st.data(), shapes)
    def survives(data: st.DataObject, shape: list[int]) -> None:
        nbytes = math.prod(shape) * ITEM_SIZES[datatype]
        raw = data.draw(st.binary(min_size=nbytes, max_size=nbytes))
        if datatype == "BOOL":
            raw = bytes(byte % 2 for byte in raw)
        array = decode(datatype, shape, raw)
        assert array.shape == tuple(shape)
        assert array.dtype == (np.float32 if datatype == "BF16" else DTYPES[datatype])
        if datatype != "BF16" or not np.isnan(array).any():  # a signalling NaN becomes a quiet one
            assert bytes(encode(array, datatype)) == raw

    survives()


@LIGHT
@given(st.data(), shapes)
def test_strings_survive(data: st.DataObject, shape: list[int]) -> None:
    count = math.prod(shape)
    elements = data.draw(st.lists(st.binary(max_size=9) | st.text(max_size=5), min_size=count, max_size=count))
    array = np.empty(count, dtype=object)
    array[:] = elements
    packed = encode(array.reshape(shape), "BYTES")
    found = decode("BYTES", shape, packed)
    assert found.shape == tuple(shape)
    assert found.ravel().tolist() == [each.encode() if isinstance(each, str) else each for each in elements]


def test_strings_travel_with_their_lengths_before_them() -> None:
    assert pack_strings(["é", b"", b"ab"]) == b"\x02\0\0\0\xc3\xa9" + b"\0\0\0\0" + b"\x02\0\0\0ab"


@pytest.mark.parametrize("element", [1, None, 1.5, ["a"], bytearray(b"a")])
def test_an_element_of_bytes_is_a_string(element: Any) -> None:
    with pytest.raises(PenstockError, match=f"a BYTES element is str or bytes, not {type(element).__name__}"):
        pack_strings(["a", element])


def test_arrays_of_numpy_strings_are_bytes_too() -> None:
    assert encode(np.array(["a", "bc"]), "BYTES") == encode(np.array([b"a", b"bc"]), "BYTES")


@LIGHT
@given(st.binary(max_size=30), st.integers(0, 5))
def test_any_data_is_strings_or_refused(data: bytes, count: int) -> None:
    try:
        elements = unpack_strings(data, count)
    except PenstockError:
        return
    assert len(elements) == count
    assert pack_strings(elements) == data


@pytest.mark.parametrize(
    ("data", "count", "sentence"),
    [
        (b"\x01\0\0\0a\x02\0", 2, "BYTES data ends inside the length of element 1"),
        (b"\x05\0\0\0abc", 1, "element 0 of BYTES data claims 5 bytes, and 3 are left"),
        (b"\xff\xff\xff\xff", 1, "element 0 of BYTES data claims 4294967295 bytes, and 0 are left"),
        (b"\0\0\0\0", 2, "BYTES data of 4 bytes holds 1 elements in 4 bytes; 2 are expected"),
        (b"\0\0\0\0\0\0\0\0", 1, "BYTES data of 8 bytes holds 1 elements in 4 bytes; 1 are expected"),
        (b"a", 0, "BYTES data of 1 bytes holds 0 elements in 0 bytes; 0 are expected"),
    ],
)
def test_malformed_strings_are_refused_with_the_reason(data: bytes, count: int, sentence: str) -> None:
    with pytest.raises(PenstockError) as caught:
        unpack_strings(data, count)
    assert (caught.value.code, caught.value.message) == (BAD_INPUT, sentence)


@pytest.mark.parametrize("datatype", FIXED)
def test_data_has_the_bytes_that_the_shape_takes(datatype: str) -> None:
    takes = 6 * ITEM_SIZES[datatype]
    for came in (0, takes - 1, takes + 1):
        with pytest.raises(PenstockError) as caught:
            decode(datatype, (2, 3), bytes(came))
        sentence = f"{datatype} of shape [2, 3] takes {takes} bytes, and {came} came"
        assert (caught.value.code, caught.value.message) == (BAD_INPUT, sentence)


@pytest.mark.parametrize("shape", [(0, 1 << 62), (1 << 62, 0, 1 << 62)])
@pytest.mark.parametrize("datatype", ["FP32", "BF16", "BYTES"])
def test_an_empty_tensor_of_an_absurd_shape_is_refused(datatype: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(PenstockError, match="cannot be made an array"):
        decode(datatype, shape, b"")


def test_a_shape_takes_no_memory_before_the_data_is_there() -> None:
    with pytest.raises(PenstockError, match="holds 0 elements in 0 bytes; 1099511627776 are expected"):
        decode("BYTES", (1 << 40,), b"")


@pytest.mark.parametrize("datatype", sorted(set(FIXED) - {"BF16"}))
def test_decoding_copies_nothing_and_gives_nothing_to_write_to(datatype: str) -> None:
    data = bytearray(ITEM_SIZES[datatype] * 2)
    array = decode(datatype, (2,), data)
    data[:] = b"\x01" * len(data)
    assert array.all()
    assert not array.flags.writeable


def test_encoding_copies_only_what_does_not_lie_as_it_travels() -> None:
    array = np.arange(6, dtype="<f4").reshape(2, 3)
    encoded = encode(array, "FP32")
    turned = encode(array.T, "FP32")
    array[:] = 9
    assert bytes(encoded) == np.full(6, 9, "<f4").tobytes()
    assert bytes(turned) == np.array([0, 3, 1, 4, 2, 5], "<f4").tobytes()
    assert bytes(encode(np.arange(3, dtype=">i4"), "INT32")) == np.arange(3, dtype="<i4").tobytes()


@settings(max_examples=400, deadline=None)
@given(st.floats(width=32, allow_nan=False, allow_infinity=False))
def test_bf16_rounds_to_nearest_with_ties_to_even(value: float) -> None:
    assert to_bf16(np.array([value], np.float32)).tolist() == [nearest_bf16(value)]


@pytest.mark.parametrize(
    ("given_bits", "expected"),
    [
        (0x3F808000, 0x3F80),  # 1 + 2**-8: a tie, down to even
        (0x3F818000, 0x3F82),  # a tie, up to even
        (0x3F808001, 0x3F81),
        (0x7F7FFFFF, 0x7F80),  # the largest float32 is nearer to infinity
        (0x7F7F7FFF, 0x7F7F),
        (0x00008000, 0x0000),  # subnormals
        (0x00018000, 0x0002),
        (0x80000000, 0x8000),  # -0
        (0x7F800000, 0x7F80),  # infinities
        (0xFF800000, 0xFF80),
    ],
)
def test_bf16_of_hard_cases(given_bits: int, expected: int) -> None:
    array = np.array([given_bits], "<u4").view("<f4")
    assert to_bf16(array).tolist() == [expected]


@pytest.mark.parametrize("nan_bits", [0x7FC00000, 0x7F800001, 0xFFFFFFFF, 0x7FFFFFFF, 0xFF800001])
def test_bf16_of_nan_is_nan(nan_bits: int) -> None:
    array = np.array([nan_bits], "<u4").view("<f4")
    assert np.isnan(from_bf16(to_bf16(array))).all()


def test_every_bf16_survives_as_float32() -> None:
    every = np.arange(1 << 16, dtype="<u2")
    numbers = from_bf16(every)
    known = ~np.isnan(numbers)
    assert (to_bf16(numbers[known]) == every[known]).all()
    assert np.isnan(from_bf16(to_bf16(numbers[~known]))).all()


def test_bf16_keeps_shapes_and_takes_any_layout() -> None:
    array = np.arange(6, dtype="<f4").reshape(2, 3)
    assert to_bf16(array.T).tolist() == [[0, 0x4040], [0x3F80, 0x4080], [0x4000, 0x40A0]]
    assert to_bf16(np.float32(1.0) * np.ones(())).shape == ()
    assert from_bf16(to_bf16(array.astype(np.float16))).tolist() == array.tolist()


@pytest.mark.parametrize("datatype", sorted(set(FIXED) - {"BF16"}))
def test_the_datatype_of_an_array_does_not_depend_on_its_byte_order(datatype: str) -> None:
    assert datatype_of(np.zeros(1, DTYPES[datatype].newbyteorder("<"))) == datatype
    assert datatype_of(np.zeros(1, DTYPES[datatype].newbyteorder(">"))) == datatype


@pytest.mark.parametrize("array", [np.array(["a"]), np.array([b"a"]), np.array(["a", b"b"], object)])
def test_arrays_of_strings_have_the_datatype_bytes(array: Any) -> None:
    assert datatype_of(array) == "BYTES"


@pytest.mark.parametrize("dtype", ["c8", "M8[s]", "f4,i4"])
def test_an_array_without_a_datatype_is_refused(dtype: str) -> None:
    with pytest.raises(PenstockError, match=r"has no datatype; convert it to one of BOOL, UINT8") as caught:
        datatype_of(np.zeros(1, dtype))
    assert caught.value.code == BAD_INPUT


def test_arrays_of_ml_dtypes_are_bf16() -> None:
    bfloat16 = pytest.importorskip("ml_dtypes").bfloat16
    array = np.array([1.0, -2.5, 3.140625], bfloat16)
    assert datatype_of(array) == "BF16"
    assert bytes(encode(array, "BF16")) == array.tobytes()
    assert decode("BF16", (3,), encode(array, "BF16")).tolist() == [1.0, -2.5, 3.140625]
