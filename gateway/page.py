"""``GET /`` and ``GET /docs``: an HTML file each, and headers that forbid the browser to run or fetch anything but what
is in it."""

from __future__ import annotations

import base64
import hashlib
import re
from pathlib import Path
from typing import Final, NamedTuple

_DIRECTORY: Final = Path(__file__).parent


class Page(NamedTuple):
    """``headers``: lines, each with its CRLF."""

    body: bytes
    headers: bytes


def load_page(name: str = "dashboard.html") -> Page:
    body = (_DIRECTORY / name).read_bytes()
    policy = "; ".join(
        (
            "default-src 'none'",
            f"script-src {_hash(body, b'script')}",
            f"style-src {_hash(body, b'style')}",
            "connect-src 'self'",
            "img-src data:",  # its icon, which is empty
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
        )
    )
    headers = {
        "Content-Security-Policy": policy,
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache",
    }
    return Page(body, "".join(f"{name}: {value}\r\n" for name, value in headers.items()).encode())


def _hash(body: bytes, element: bytes) -> str:
    """What the only element of a kind holds, as a source of a Content-Security-Policy."""
    [content] = re.findall(b"<%b>(.*?)</%b>" % (element, element), body, re.DOTALL)
    return f"'sha256-{base64.b64encode(hashlib.sha256(content).digest()).decode()}'"
