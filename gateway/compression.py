"""gzip, deflate and zstd, both ways, within limits (RFC 9110, 8.4; deflate means the zlib format, and some send it
bare; RFC 8878, and RFC 9659 for how much memory a zstd frame may ask for)."""

from __future__ import annotations

import gzip
import sys
import zlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Final, Protocol

from penstock.wire.errors import BAD_INPUT, CANCELLED, TOO_LARGE, UNSUPPORTED, PenstockError
from penstock.wire.tensors import Buffer

if TYPE_CHECKING or sys.version_info < (3, 14):
    from backports import zstd as zstd
else:
    from compression import zstd as zstd

_GZIP: Final = 16 + zlib.MAX_WBITS
_LEVEL: Final = 1  # tensors compress badly at any level, and time counts
_EXPANSION_MAX: Final = 1032  # of a byte, by deflate; zstd has no limit
_EXPANSION_USUAL: Final = 64  # more is suspect
_FED_BYTES: Final = 1 << 16  # what is not used of what was given is copied
_PIECE_BYTES: Final = 1 << 18
# Whose data may be pieces, one behind another (RFC 1952, 2.2; RFC 8878, 3).
_MAY_BE_JOINED: Final = frozenset({"gzip", "zstd"})
_JOINED_MAX: Final = 10_000  # each costs some microseconds, however little it holds
_WINDOW_LOG_MAX: Final = 23  # 8 MiB, which every reader has to have and no sender may exceed
SMALL_BYTES: Final = 1 << 18  # takes some tenths of a millisecond to expand
ENCODINGS: Final = ("gzip", "deflate", "zstd")
_PREFERRED: Final = ("zstd", "gzip", "deflate")  # by the processor's time, of those that a client names alike
_NAMED: Final = f"{', '.join(ENCODINGS[:-1])} and {ENCODINGS[-1]}"
_DAMAGES: Final = (zlib.error, zstd.ZstdError)


class _Expander(Protocol):
    """``hungry``: it needs more input to go on. ``unused_data``: what came behind the end, when that is reached
    (``eof``)."""

    @property
    def hungry(self) -> bool: ...

    @property
    def eof(self) -> bool: ...

    @property
    def unused_data(self) -> bytes: ...

    def expand(self, data: Buffer, bytes_max: int) -> bytes:
        """At most so many more bytes. ``data``: empty unless it is hungry. Raises what ``_DAMAGES`` has."""


class _Zlib:
    def __init__(self, window: int) -> None:
        self._zlib = zlib.decompressobj(window)
        self._left: Buffer = b""
        self.hungry = True

    def expand(self, data: Buffer, bytes_max: int) -> bytes:
        piece = self._zlib.decompress(self._left or data, bytes_max)
        self._left = self._zlib.unconsumed_tail
        self.hungry = not self._left and len(piece) < bytes_max  # else there may be more of what it has
        return piece

    @property
    def eof(self) -> bool:
        return self._zlib.eof

    @property
    def unused_data(self) -> bytes:
        return self._zlib.unused_data


class _Zstd:
    def __init__(self) -> None:
        self._zstd = zstd.ZstdDecompressor(options={zstd.DecompressionParameter.window_log_max: _WINDOW_LOG_MAX})

    def expand(self, data: Buffer, bytes_max: int) -> bytes:
        try:
            return self._zstd.decompress(data, bytes_max)
        except zstd.ZstdError as error:
            if "too much memory" in str(error):
                raise PenstockError(
                    TOO_LARGE,
                    f"the body's zstd frame asks for a window of more than {1 << _WINDOW_LOG_MAX} bytes (RFC 9659); "
                    "compress it without --long and --ultra",
                ) from None
            raise

    @property
    def hungry(self) -> bool:
        return self._zstd.needs_input

    @property
    def eof(self) -> bool:
        return self._zstd.eof

    @property
    def unused_data(self) -> bytes:
        return self._zstd.unused_data


def _gzip() -> _Expander:
    return _Zlib(_GZIP)


def _deflate() -> _Expander:
    return _Zlib(zlib.MAX_WBITS)


def _bare() -> _Expander:
    return _Zlib(-zlib.MAX_WBITS)


_FORMATS: Final[dict[str, tuple[Callable[[], _Expander], ...]]] = {
    "gzip": (_gzip,),
    "deflate": (_deflate, _bare),
    "zstd": (_Zstd,),
}


def decompress_small(body: Buffer, encoding: str, bytes_max: int) -> bytes | None:
    """As ``decompress``, but None for what expands to more than ``SMALL_BYTES``, or is not in one piece."""
    most = min(SMALL_BYTES, bytes_max)
    for make in _formats(encoding):
        expander = make()
        try:
            whole = expander.expand(body, most + 1)
        except _DAMAGES:
            continue
        if len(whole) > bytes_max:
            raise _too_large(bytes_max)
        if len(whole) > most:
            return None
        if not expander.eof or (expander.unused_data and not _may_be_joined(encoding)):
            break
        return None if expander.unused_data else whole
    raise _damaged(encoding)


def decompress(body: Buffer, encoding: str, bytes_max: int, wanted: Callable[[], bool] = lambda: True) -> memoryview:
    """A request's body as its sender wrote it. It lets others run, and stops when it is not ``wanted`` any more, after
    each ``_PIECE_BYTES`` of it. Raises PenstockError: unknown, damaged, larger than ``bytes_max``, or not wanted."""
    for make in _formats(encoding):
        try:
            # What is not kept takes no memory.
            least = 0 if make is _Zstd else bytes_max / _EXPANSION_MAX
            if least < len(body) < bytes_max / _EXPANSION_USUAL:
                _check_size(_pieces(body, encoding, make, wanted), bytes_max)
            whole = bytearray()
            for piece in _pieces(body, encoding, make, wanted):
                whole += piece
                if len(whole) > bytes_max:
                    raise _too_large(bytes_max)
        except _DAMAGES:
            continue
        return memoryview(whole)
    raise _damaged(encoding)


def _formats(encoding: str) -> tuple[Callable[[], _Expander], ...]:
    """What an encoding may be. Raises PenstockError."""
    found = _FORMATS.get(encoding.strip().lower())
    if found is None:
        raise PenstockError(UNSUPPORTED, f"Content-Encoding '{encoding[:40]}' is not known; {_NAMED} are")
    return found


def _may_be_joined(encoding: str) -> bool:
    return encoding.strip().lower() in _MAY_BE_JOINED


def _check_size(pieces: Iterator[bytes], bytes_max: int) -> None:
    size = 0
    for piece in pieces:
        size += len(piece)
        if size > bytes_max:
            raise _too_large(bytes_max)


def _pieces(body: Buffer, encoding: str, make: Callable[[], _Expander], wanted: Callable[[], bool]) -> Iterator[bytes]:
    """What a body expands to. Raises what ``_DAMAGES`` has, and PenstockError when it is cut off, followed by
    something, or not wanted any more."""
    whole, at = memoryview(body), 0
    for _ in range(_JOINED_MAX):
        expander = make()
        while not expander.eof:
            if not wanted():
                raise PenstockError(CANCELLED, "the client has left")
            fed = whole[:0]
            if expander.hungry:
                fed = whole[at : at + _FED_BYTES]
                at += len(fed)
                if not fed:
                    raise _damaged(encoding)
            yield expander.expand(fed, _PIECE_BYTES)
        at -= len(expander.unused_data)
        if at == len(whole):
            return
        if not _may_be_joined(encoding):
            raise _damaged(encoding)
    raise PenstockError(TOO_LARGE, f"the body is more than {_JOINED_MAX} pieces of {encoding}; join them to one")


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
    named = [name for name in _PREFERRED if name in weights]
    others = [name for name in ENCODINGS if name not in weights]
    best = max(named + others, key=lambda name: weights.get(name, weights.get("*", 0.0)))
    wish = weights.get(best, weights.get("*", 0.0))
    return best if wish > 0 and wish >= weights.get("identity", 0.0) else ""


def compress(body: Buffer, encoding: str) -> bytes:
    if encoding == "zstd":
        return zstd.compress(body, _LEVEL)
    return gzip.compress(body, _LEVEL, mtime=0) if encoding == "gzip" else zlib.compress(body, _LEVEL)
