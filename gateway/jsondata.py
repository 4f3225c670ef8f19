"""Tensors in JSON: the ``data`` of an input to bytes, the bytes of an output to ``data``.

JSON has no FP16 and BF16 (they travel as binary only), and no NaN or infinities: those are written, and read, as the
tokens NaN, Infinity and -Infinity that Python's json module and most others know.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from functools import lru_cache
from itertools import chain
from typing import Any, Final

import numpy as np
import orjson

from penstock.wire.datatypes import ITEM_SIZES, element_count
from penstock.wire.errors import BAD_INPUT, PenstockError
from penstock.wire.tensors import DTYPES, Buffer, decode, from_bf16, pack_strings, to_bf16

BINARY_ONLY: Final = frozenset({"FP16", "BF16"})
_FLOATS: Final = frozenset({"FP16", "BF16", "FP32", "FP64"})
_STRINGS: Final = {str, bytes}
_NUMBERS: Final = {int, float}
# What struct packs in half the time that numpy takes, and a few in a tenth; it refuses what does not fit as well.
_LETTERS: Final = {
    "FP32": "f",
    "FP64": "d",
    "INT8": "b",
    "INT16": "h",
    "INT32": "i",
    "INT64": "q",
    "UINT8": "B",
    "UINT16": "H",
    "UINT32": "I",
    "UINT64": "Q",
}
NUMBERS: Final = frozenset(_LETTERS)  # datatypes of a fixed size that JSON carries as numbers
_LETTERS_MAX: Final = 16 * 1024  # elements: it takes them as arguments


def loads(text: Buffer) -> Any:
    """JSON, with the tokens NaN, Infinity and -Infinity where they occur. Raises PenstockError for what is none."""
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError as error:
        raw = bytes(text)
        if b"NaN" in raw or b"Infinity" in raw:
            try:
                value = json.loads(raw.decode())
                if b"\\u" in raw:
                    json.dumps(value, ensure_ascii=False).encode()  # half a surrogate pair is no text, as above
                return value
            except (ValueError, RecursionError):
                pass  # then the first error says it better
        raise PenstockError(BAD_INPUT, f"the request is not JSON: {error}") from None


def pack_data(name: str, datatype: str, shape: Sequence[int], data: Any, plain: bool = False) -> bytes:
    """The bytes of an input given in JSON, nested or flat. ``plain``: there is neither true nor false in it. Raises
    PenstockError naming the input and what is wrong."""
    if datatype in BINARY_ONLY:
        raise PenstockError(
            BAD_INPUT,
            f"input '{name}' is {datatype}, which JSON cannot carry; send it with the binary tensor extension",
        )
    if type(data) is not list:
        raise PenstockError(BAD_INPUT, f"the data of input '{name}' is not a list")
    flat = flatten(name, shape, data)
    if len(flat) != element_count(shape):
        raise PenstockError(
            BAD_INPUT,
            f"input '{name}' has {len(flat)} elements in its data; its shape {list(shape)} "
            f"takes {element_count(shape)}",
        )
    return pack_elements(name, datatype, flat, plain)


def pack_elements(name: str, datatype: str, flat: list[Any], plain: bool = False) -> bytes:
    """The bytes of an input's elements. Floats of 16 bits are rounded to the nearest. Raises as ``pack_data`` does."""
    letter = _LETTERS.get(datatype) if len(flat) <= _LETTERS_MAX else None
    if letter is not None and (plain or bool not in set(map(type, flat))):  # which struct takes for 0 and 1
        try:
            return _packer(letter, len(flat)).pack(*flat)
        except (struct.error, OverflowError):
            pass  # below it is said what is wrong
    kinds = set(map(type, flat))
    if datatype == "BYTES":
        _expect(name, datatype, kinds <= _STRINGS, "strings", kinds)
        return pack_strings(flat)
    if datatype == "BOOL":
        if kinds <= {int} and not set(flat) - {0, 1}:
            return bytes(flat)
        _expect(name, datatype, kinds <= {bool}, "true and false", kinds)
        return bytes(flat)
    if datatype in _FLOATS:
        _expect(name, datatype, kinds <= _NUMBERS, "numbers", kinds)
    else:
        _expect(name, datatype, kinds <= {int}, "whole numbers", kinds)
    try:
        with np.errstate(over="raise"):
            if datatype == "BF16":
                return _pack_bf16(flat)
            return np.array(flat, DTYPES[datatype]).tobytes()
    except (OverflowError, FloatingPointError):
        raise PenstockError(
            BAD_INPUT, f"the data of input '{name}' has a number that does not fit {datatype}"
        ) from None


@lru_cache(maxsize=1024)
def _packer(letter: str, count: int) -> struct.Struct:
    return struct.Struct(f"<{count}{letter}")


def _pack_bf16(flat: list[Any]) -> bytes:
    array = np.array(flat, np.float32)
    bits = to_bf16(array)
    if (np.isinf(from_bf16(bits)) & np.isfinite(array)).any():
        raise OverflowError
    return bits.tobytes()


def flatten(name: str, shape: Sequence[int], data: list[Any]) -> list[Any]:
    """Nested lists as one, level by level as the shape has dimensions. Raises PenstockError where one is not as long as
    that says."""
    level = data
    for depth, size in enumerate(shape[1:], start=2):
        if not level or type(level[0]) is not list:
            return level  # flat from here on: the count decides
        if any(type(part) is not list or len(part) != size for part in level):
            raise PenstockError(
                BAD_INPUT,
                f"the data of input '{name}' is not {size} long everywhere in dimension {depth} of {list(shape)}",
            )
        level = list(chain.from_iterable(level))
    return level


def _expect(name: str, datatype: str, holds: bool, what: str, kinds: set[type]) -> None:
    if not holds:
        came = ", ".join(sorted(_JSON_NAMES.get(kind, kind.__name__) for kind in kinds))
        raise PenstockError(BAD_INPUT, f"the data of input '{name}' holds {came}; {datatype} takes {what}")


_JSON_NAMES: Final[dict[type, str]] = {
    str: "strings",
    bool: "booleans",
    int: "whole numbers",
    float: "numbers with a fraction",
    list: "lists",
    dict: "objects",
    type(None): "null",
}


def dump_data(datatype: str, shape: Sequence[int], data: Buffer, nested: bool = False) -> bytes:
    """The bytes of an output as a JSON list, flat or nested as its shape. Raises PenstockError for a string that is not
    UTF-8."""
    if datatype in _LETTERS and not nested:
        if len(data) != element_count(shape) * ITEM_SIZES[datatype]:
            decode(datatype, shape, data)  # which says what is wrong
        array = np.frombuffer(data, DTYPES[datatype])
    else:
        array = decode(datatype, shape, data).reshape(-1)
    if datatype == "BYTES":
        try:
            array = np.array([element.decode() for element in array], object)
        except UnicodeDecodeError:
            raise PenstockError(
                BAD_INPUT, "an output holds a string that is not UTF-8, which JSON cannot carry; ask for it as binary"
            ) from None
        return orjson.dumps((array.reshape(shape) if nested else array).tolist())
    if nested and shape:  # without a dimension there is one number, and orjson writes lists alone
        array = array.reshape(shape)
    dumped = orjson.dumps(array, option=orjson.OPT_SERIALIZE_NUMPY)
    if b"null" in dumped:  # orjson's word for NaN and infinities
        dumped = json.dumps(array.tolist(), separators=(",", ":")).encode()
    return dumped if shape or not nested else dumped[1:-1]
