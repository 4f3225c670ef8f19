"""Cross-origin requests (the Fetch standard's CORS protocol): which pages of other sites may ask from a browser.

None may unless ``cors_origins`` in ``[gateway]`` names theirs, or says "*": browsers keep the answers from the others.
Cookies are never asked for.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Final

ANY: Final = "*"
_ORIGIN: Final = re.compile(r"[a-z][a-z0-9+.-]*://(?:[a-z0-9._-]+|\[[0-9a-f:.]+\])(?::\d{1,5})?")
_MAX_AGE_S: Final = 600  # for which a browser need not ask again what it may

# Of what a page sends, beside what any may: the headers that mean something here.
_ALLOW_HEADERS: Final = (
    *("Accept-Encoding", "Content-Encoding", "Content-Type", "Inference-Header-Content-Length"),
    *("Penstock-Explain", "Penstock-Priority", "Penstock-Sticky", "Penstock-Tenant", "Penstock-Timeout"),
    *("Traceparent", "Tracestate", "X-Request-Id"),
)
# Of what it gets.
_EXPOSE: Final = b"Inference-Header-Content-Length, Retry-After, Server-Timing, X-Request-Id"
_ALLOWED: Final = b"Access-Control-Allow-Origin: %b\r\nAccess-Control-Expose-Headers: " + _EXPOSE + b"\r\n"
_VARY: Final = b"Vary: Origin\r\n"


def problem_of_origin(origin: str) -> str:
    """Why no page can come from it, or ""."""
    if origin == ANY or _ORIGIN.fullmatch(origin):
        return ""
    return f'{origin[:80]!r} is no origin; write one as browsers do, such as https://example.org:8443, or "*" for all'


class Cors:
    """``origins``: whose pages may ask."""

    def __init__(self, origins: Sequence[str]) -> None:
        self._origins = frozenset(each.encode() for each in origins)
        self._any = ANY in origins

    def lines(self, headers: Mapping[str, bytes]) -> bytes:
        """Of an answer to a request with these headers, by lower-case name. Only who says an origin gets any."""
        origin = headers.get("origin")
        if origin is None or not self._origins:
            return b""
        if self._any:
            return _ALLOWED % ANY.encode()
        return _VARY + _ALLOWED % origin if origin in self._origins else _VARY

    def preflight(self, headers: Mapping[str, bytes], methods: Sequence[str]) -> bytes:
        """More lines of an answer to OPTIONS, where a browser asks with it what a page may send. ``methods``: of the
        path."""
        if "access-control-request-method" not in headers:
            return b""
        if not self._any and headers.get("origin") not in self._origins:
            return b""
        return (
            f"Access-Control-Allow-Methods: {', '.join(methods)}\r\n"
            f"Access-Control-Allow-Headers: {', '.join(_ALLOW_HEADERS)}\r\n"
            f"Access-Control-Max-Age: {_MAX_AGE_S}\r\n"
        ).encode()
