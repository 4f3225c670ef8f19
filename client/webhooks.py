"""Whether a callback is from the server that it says it is from: https://www.standardwebhooks.com."""

from __future__ import annotations

import base64
import binascii
import hmac
import time
from collections.abc import Mapping
from typing import Final

from penstock.wire.errors import BAD_INPUT, PenstockError

AGE_MAX_S: Final = 300.0  # of a callback, and how far clocks may differ: what is older may be a copy
_PREFIX: Final = "whsec_"


def verify_callback(
    secret: str | bytes,
    headers: Mapping[str, str],
    body: bytes,
    *,
    age_max_s: float = AGE_MAX_S,
    now: float | None = None,
) -> str:
    """The id of the job that a callback is about. ``secret``: as ``penstock jobs secret`` prints it, or its bytes;
    ``headers``: of the request, ``body``: as it came, before it is parsed. ``now``: in seconds since 1970. Raises
    PenstockError for one that has another signature, or none, or is too old: do not believe it."""
    given = {name.lower(): value for name, value in headers.items()}
    ident, timestamp = given.get("webhook-id", ""), given.get("webhook-timestamp", "")
    signatures = given.get("webhook-signature", "").split()
    if not (ident and timestamp.isascii() and timestamp.isdecimal() and len(timestamp) < 15 and signatures):
        raise PenstockError(BAD_INPUT, "the headers webhook-id, webhook-timestamp and webhook-signature are not there")
    if abs((time.time() if now is None else now) - int(timestamp)) > age_max_s:
        raise PenstockError(BAD_INPUT, f"the callback was sent more than {age_max_s:g} s ago, or clocks differ")
    signed = hmac.digest(_key(secret), f"{ident}.{timestamp}.".encode() + body, "sha256")
    wanted = f"v1,{base64.b64encode(signed).decode()}".encode()
    if not any(hmac.compare_digest(wanted, each.encode()) for each in signatures):
        raise PenstockError(BAD_INPUT, "the callback is not signed with this secret, or has been changed")
    return ident


def _key(secret: str | bytes) -> bytes:
    """Raises PenstockError."""
    if isinstance(secret, bytes):
        return secret
    if not secret.startswith(_PREFIX):
        return secret.encode()
    try:
        return base64.b64decode(secret.removeprefix(_PREFIX), validate=True)
    except binascii.Error:
        raise PenstockError(BAD_INPUT, "what follows whsec_ in the secret is no base64") from None
