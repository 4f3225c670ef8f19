"""gzip and deflate, both ways, within limits (RFC 9110, 8.4; deflate means the zlib format, and some send it bare)."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Callable, Iterator
from typing import Final

from penstock.wire.errors import BAD_INPUT, CANCELLED, TOO_LARGE, UNSUPPORTED, PenstockError
from penstock.wire.tensors import Buffer

_GZIP: Final = 16 + zlib.MAX_WBITS
_LEVEL: Final = 1  # tensors compress badly at any level, and time counts
_EXPANSION_MAX: Final = 1032  # of a byte, by deflate
_EXPANSION_USUAL: Final = 64  # more is suspect
_FED_BYTES: Final = 1 << 16  # zlib copies what it has not used of what it was given
_PIECE_BYTES: Final = 1 << 18
SMALL_BYTES: Final = 1 << 18  # takes some tenths of a millisecond to expand
ENCODINGS: Final = ("gzip", "deflate")


def decompress_small(body: Buffer, encoding: str, bytes_max: int) -> bytes | None:
    """As ``decompress``, but None for what expands to more than ``SMALL_BYTES``."""
    most = min(SMALL_BYTES, bytes_max)
    for window in _windows(encoding):
        expander = zlib.decompressobj(window)
        try:
            whole = expander.decompress(body, most + 1)
        except zlib.error:
            continue
        if len(whole) > bytes_max:
            raise _too_large(bytes_max)
        if len(whole) > most:
            return None
        if not expander.eof or expander.unused_data:
            break
        return whole
    raise _damaged(encoding)


def decompress(body: Buffer, encoding: str, bytes_max: int, wanted: Callable[[], bool] = lambda: True) -> memoryview:
    """A request's body as its sender wrote it. It lets others run, and stops when it is not ``wanted`` any more, after
    each ``_PIECE_BYTES`` of it. Raises PenstockError: unknown, damaged, larger than ``bytes_max``, or not wanted."""
    for window in _windows(encoding):
        try:
            # What is not kept takes no memory.
            if bytes_max / _EXPANSION_MAX < len(body) < bytes_max / _EXPANSION_USUAL:
                _check_size(_pieces(body, encoding, window, wanted), bytes_max)
            whole = bytearray()
            for piece in _pieces(body, encoding, window, wanted):
                whole += piece
                if len(whole) > bytes_max:
                    raise _too_large(bytes_max)
        except zlib.error:
            continue
        return memoryview(whole)
    raise _damaged(encoding)


def _windows(encoding: str) -> list[int]:
    """What zlib calls the formats that an encoding may be. Raises PenstockError."""
    encoding = encoding.strip().lower()
    if encoding not in ENCODINGS:
        raise PenstockError(
            UNSUPPORTED, f"Content-Encoding '{encoding[:40]}' is not known; {' and '.join(ENCODINGS)} are"
        )
    return [_GZIP] if encoding == "gzip" else [zlib.MAX_WBITS, -zlib.MAX_WBITS]


def _check_size(pieces: Iterator[bytes], bytes_max: int) -> None:
    size = 0
    for piece in pieces:
        size += len(piece)
        if size > bytes_max:
            raise _too_large(bytes_max)


def _pieces(body: Buffer, encoding: str, window: int, wanted: Callable[[], bool]) -> Iterator[bytes]:
    """What a body expands to. Raises zlib.error, and PenstockError when it is cut off, followed by something, or not
    wanted any more."""
    expander, rest, left, piece = zlib.decompressobj(window), memoryview(body), b"", b""
    while not expander.eof:
        if not wanted():
            raise PenstockError(CANCELLED, "the client has left")
        if not left:
            fed, rest = rest[:_FED_BYTES], rest[_FED_BYTES:]
            if not fed and len(piece) < _PIECE_BYTES:  # else there may be more of what it was given before
                raise _damaged(encoding)
        piece = expander.decompress(left or fed, _PIECE_BYTES)
        left = expander.unconsumed_tail
        yield piece
    if expander.unused_data or rest:
        raise _damaged(encoding)


def _too_large(bytes_max: int) -> PenstockError:
    return PenstockError(TOO_LARGE, f"the body expands to more than the limit of {bytes_max} bytes")


def _damaged(encoding: str) -> PenstockError:
    return PenstockError(BAD_INPUT, f"the body is not valid {encoding.strip().lower()} data")


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
