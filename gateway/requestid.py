"""``X-Request-Id``: what a client or a proxy calls a request, for its answer and for the log.

It is written back, so it is read strictly: what might be something else in a log or a header is taken for none.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final

REQUEST_ID_MAX: Final = 128  # characters
_VALID: Final = re.compile(rb"[A-Za-z0-9._~:/+=@-]{1,%d}" % REQUEST_ID_MAX)


def read_request_id(headers: Mapping[str, bytes]) -> str:
    """Of headers by lower-case name; "" where there is none, or none that can be."""
    value = headers.get("x-request-id", b"").strip(b" \t")
    return value.decode() if _VALID.fullmatch(value) else ""


def request_id_line(headers: Mapping[str, bytes]) -> bytes:
    """The header of an answer, or nothing."""
    value = read_request_id(headers)
    return f"X-Request-Id: {value}\r\n".encode() if value else b""
