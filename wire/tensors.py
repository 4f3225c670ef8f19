"""Tensors as bytes: the datatypes of the Open Inference Protocol v2, little endian, row major, without padding.

Source: https://github.com/kserve/open-inference-protocol and Triton's binary tensor data extension, which adds BF16
and the encoding of BYTES: each element is its length (uint32) followed by that many bytes.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from typing import Any, Final, TypeAlias

import numpy as np
import numpy.typing as npt

from penstock.wire.datatypes import ITEM_SIZES, element_count
from penstock.wire.errors import BAD_INPUT, PenstockError

Array: TypeAlias = npt.NDArray[Any]
Buffer: TypeAlias = bytes | bytearray | memoryview

# BF16 has no numpy type of its own; its bits travel as uint16. BYTES has no fixed size.
DTYPES: Final[dict[str, np.dtype[Any]]] = {
    "BOOL": np.dtype("?"),
    "UINT8": np.dtype("<u1"),
    "UINT16": np.dtype("<u2"),
    "UINT32": np.dtype("<u4"),
    "UINT64": np.dtype("<u8"),
    "INT8": np.dtype("<i1"),
    "INT16": np.dtype("<i2"),
    "INT32": np.dtype("<i4"),
    "INT64": np.dtype("<i8"),
    "FP16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
    "FP32": np.dtype("<f4"),
    "FP64": np.dtype("<f8"),
    "BYTES": np.dtype(object),
}
_NAMES: Final = {dtype: name for name, dtype in DTYPES.items() if name != "BF16"}

_LENGTH: Final = struct.Struct("<I")


def datatype_of(array: Array) -> str:
    """The v2 datatype of a numpy array; strings, bytes and objects are BYTES. Raises PenstockError for any other."""
    dtype = array.dtype
    if dtype.kind in "OSU":
        return "BYTES"
    name = _NAMES.get(dtype.newbyteorder("<"))
    if name is not None:
        return name
    if dtype.name == "bfloat16":  # ml_dtypes, which we do not need to import for this
        return "BF16"
    raise PenstockError(BAD_INPUT, f"an array of {dtype} has no datatype; convert it to one of {', '.join(DTYPES)}")


def encode(array: Array, datatype: str) -> Buffer:
    """The bytes of an array as ``datatype``; no copy when it already lies in memory as it travels.

    A float array given as BF16 is rounded to the nearest, ties to even. Raises PenstockError when it does not fit.
    """
    if datatype == "BYTES":
        return pack_strings(array.ravel().tolist())
    if datatype == "BF16" and array.dtype.kind == "f":
        array = to_bf16(array)
    elif array.dtype.name == "bfloat16":
        array = array.view(np.uint16)
    flat = np.ascontiguousarray(array, dtype=DTYPES[datatype]).reshape(-1)
    return flat.view(np.uint8).data


def decode(datatype: str, shape: Sequence[int], data: Buffer) -> Array:
    """The array that ``data`` holds: a read-only view of it where the datatype has a numpy type.

    BYTES become an object array of ``bytes``; BF16 becomes float32, which holds every value of it exactly.
    Raises PenstockError when the number of bytes or strings is not what the shape asks for.
    """
    if datatype == "BYTES":
        elements = unpack_strings(data, element_count(shape))
        array = np.empty(len(elements), dtype=object)
        array[:] = elements
        return _reshape(array, datatype, shape)
    expected = element_count(shape) * ITEM_SIZES[datatype]
    if len(data) != expected:
        raise PenstockError(
            BAD_INPUT, f"{datatype} of shape {list(shape)} takes {expected} bytes, and {len(data)} came"
        )
    array = _reshape(np.frombuffer(data, DTYPES[datatype]), datatype, shape)
    if datatype == "BF16":
        return from_bf16(array)
    array.flags.writeable = False
    return array


def _reshape(array: Array, datatype: str, shape: Sequence[int]) -> Array:
    try:
        return array.reshape(shape)
    except ValueError as error:  # without elements a shape may claim any size in its other dimensions
        raise PenstockError(BAD_INPUT, f"{datatype} of shape {list(shape)} cannot be made an array: {error}") from None


def pack_strings(elements: Iterable[Any]) -> bytes:
    """BYTES: str as UTF-8, bytes as they are. Raises PenstockError for an element that is neither."""
    parts: list[bytes] = []
    for element in elements:
        if isinstance(element, str):
            element = element.encode()
        elif not isinstance(element, bytes):
            raise PenstockError(BAD_INPUT, f"a BYTES element is str or bytes, not {type(element).__name__}")
        parts.append(_LENGTH.pack(len(element)))
        parts.append(element)
    return b"".join(parts)


def unpack_strings(data: Buffer, count: int) -> list[bytes]:
    """The ``count`` elements of BYTES data. Raises PenstockError when the lengths in it do not add up."""
    view = bytes(data)
    elements: list[bytes] = []
    at, end = 0, len(view)
    while at < end and len(elements) < count:
        if end - at < 4:
            raise PenstockError(BAD_INPUT, f"BYTES data ends inside the length of element {len(elements)}")
        (length,) = _LENGTH.unpack_from(view, at)
        at += 4
        if length > end - at:
            raise PenstockError(
                BAD_INPUT,
                f"element {len(elements)} of BYTES data claims {length} bytes, and {end - at} are left",
            )
        elements.append(view[at : at + length])
        at += length
    if at != end or len(elements) != count:
        raise PenstockError(
            BAD_INPUT,
            f"BYTES data of {end} bytes holds {len(elements)} elements in {at} bytes; {count} are expected",
        )
    return elements


def to_bf16(array: Array) -> Array:
    """float -> the bits of bfloat16, rounded to nearest even, as uint16 of the same shape; NaN stays NaN."""
    bits = np.ascontiguousarray(array, dtype="<f4").view("<u4")
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    quiet = (bits >> 16) | 0x40
    return np.where(np.isnan(array), quiet, rounded).astype("<u2").reshape(array.shape)


def from_bf16(bits: Array) -> Array:
    """The bits of bfloat16 (uint16) -> float32 of the same shape, exactly."""
    return (bits.astype("<u4") << 16).view("<f4")
