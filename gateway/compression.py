"""gzip and deflate, both ways, within limits (RFC 9110, 8.4; deflate means the zlib format, and some send it bare)."""

from __future__ import annotations

import gzip
import zlib
from typing import Final

from penstock.wire.errors import BAD_INPUT, TOO_LARGE, UNSUPPORTED, PenstockError
from penstock.wire.tensors import Buffer

_GZIP: Final = 16 + zlib.MAX_WBITS
_LEVEL: Final = 1  # tensors compress badly at any level, and time counts
_EXPANSION_MAX: Final = 1032  # of a byte, by deflate
_EXPANSION_USUAL: Final = 64  # more is suspect
_PIECE_BYTES: Final = 1 << 18
ENCODINGS: Final = ("gzip", "deflate")


def decompress(body: Buffer, encoding: str, bytes_max: int) -> bytes:
    """A request's body as its sender wrote it. Raises PenstockError: unknown, damaged, or larger than ``bytes_max``."""
    encoding = encoding.strip().lower()
    if encoding not in ENCODINGS:
        raise PenstockError(
            UNSUPPORTED, f"Content-Encoding '{encoding[:40]}' is not known; {' and '.join(ENCODINGS)} are"
        )
    windows = [_GZIP] if encoding == "gzip" else [zlib.MAX_WBITS, -zlib.MAX_WBITS]
    for window in windows:
        expander = zlib.decompressobj(window)
        try:
            if _is_bomb(body, window, bytes_max):
                raise PenstockError(TOO_LARGE, _too_large(bytes_max))
            whole = expander.decompress(body, bytes_max + 1)
        except zlib.error:
            continue
        if len(whole) > bytes_max:
            raise PenstockError(TOO_LARGE, _too_large(bytes_max))
        if not expander.eof or expander.unused_data:
            break
        return whole
    raise PenstockError(BAD_INPUT, f"the body is not valid {encoding} data")


def _too_large(bytes_max: int) -> str:
    return f"the body expands to more than the limit of {bytes_max} bytes"


def _is_bomb(body: Buffer, window: int, bytes_max: int) -> bool:
    """Whether a small body expands to too much. What is not kept takes no memory, and a third of the time, in which a
    gateway serves nobody else. Raises zlib.error."""
    if not bytes_max / _EXPANSION_MAX < len(body) < bytes_max / _EXPANSION_USUAL:
        return False
    expander, left, size = zlib.decompressobj(window), body, 0
    while left and size <= bytes_max:
        size += len(expander.decompress(left, _PIECE_BYTES))
        left = expander.unconsumed_tail
    return size > bytes_max


def choose(accepted: str) -> str:
    """The encoding for a response to a client that sent this Accept-Encoding; "" for none."""
    weights: dict[str, float] = {}
    for part in accepted.split(","):
        name, _, parameter = part.partition(";")
        weight = parameter.strip().lower().removeprefix("q=")
        try:
            weights[name.strip().lower()] = float(weight) if parameter else 1.0
        except ValueError:
            continue  # what cannot be read is not asked for
    best = max(ENCODINGS, key=lambda name: weights.get(name, weights.get("*", 0.0)))
    wish = weights.get(best, weights.get("*", 0.0))
    return best if wish > 0 and wish >= weights.get("identity", 0.0) else ""


def compress(body: Buffer, encoding: str) -> bytes:
    return gzip.compress(body, _LEVEL, mtime=0) if encoding == "gzip" else zlib.compress(body, _LEVEL)
