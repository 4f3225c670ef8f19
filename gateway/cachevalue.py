"""An answer as it is kept. Nothing that is read is believed without its checksum, of which its key is a part: what was
written for other inputs, or only in part, is no answer."""

from __future__ import annotations

import struct
from typing import Final, NamedTuple
from urllib.parse import urlsplit
from zlib import crc32

_HEAD: Final = struct.Struct("<IdIQ")  # the checksum of all that follows; when it was computed; bytes of both parts
HEAD_BYTES: Final = _HEAD.size
_SUM_BYTES: Final = 4
_SCHEMES: Final = ("redis", "rediss", "unix")
_COPIED_MAX_BYTES: Final = 4096  # a copy of what is smaller costs less than a view


class Kept(NamedTuple):
    """``at``: when it was computed, in seconds of a clock that all readers share; 0 where nobody asks. ``body``: its
    packed Outcome."""

    at: float
    body: bytes
    payload: bytes


def pack_value(key: bytes, at: float, body: bytes, payload: bytes) -> bytes:
    rest = b"%b%b%b" % (_HEAD.pack(0, at, len(body), len(payload))[_SUM_BYTES:], body, payload)
    return crc32(rest, crc32(key)).to_bytes(_SUM_BYTES, "little") + rest


def unpack_value(key: bytes, value: bytes, start: int = 0) -> Kept | None:
    """What ``pack_value`` made for this key, from a byte on; None where it is anything else."""
    if len(value) < start + HEAD_BYTES:
        return None
    total, at, body_bytes, payload_bytes = _HEAD.unpack_from(value, start)
    begin = start + HEAD_BYTES
    middle = begin + body_bytes
    if len(value) != middle + payload_bytes:
        return None
    summed = value[start + _SUM_BYTES :] if len(value) <= _COPIED_MAX_BYTES else memoryview(value)[start + _SUM_BYTES :]
    if crc32(summed, crc32(key)) != total:
        return None
    return Kept(at, value[begin:middle], value[middle:])


def problem_of_url(url: str) -> str:
    """Why a store cannot be meant by this, or ""."""
    if url and urlsplit(url).scheme not in _SCHEMES:
        return f"it is a URL such as redis://HOST:6379/0, not {url[:80]!r}; leave it out for memory of this host"
    return ""
