"""Bodies as they travel, and what is refused before it takes room."""

from __future__ import annotations

import gzip
import tracemalloc
import zlib
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.gateway.compression import choose, compress, decompress
from penstock.wire.errors import BAD_INPUT, TOO_LARGE, UNSUPPORTED, PenstockError


def raw_deflate(body: bytes) -> bytes:
    squeezer = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    return squeezer.compress(body) + squeezer.flush()


FORMATS: list[tuple[str, Callable[[bytes], bytes]]] = [
    ("gzip", gzip.compress),
    ("deflate", zlib.compress),
    ("deflate", raw_deflate),
]


def refusal(body: bytes, encoding: str, bytes_max: int = 1000) -> PenstockError:
    with pytest.raises(PenstockError) as raised:
        decompress(body, encoding, bytes_max)
    return raised.value


@pytest.mark.parametrize(("encoding", "squeeze"), FORMATS)
@pytest.mark.parametrize("body", [b"", b"hello", bytes(range(256)) * 40])
def test_body_comes_out_as_it_was(encoding: str, squeeze: Callable[[bytes], bytes], body: bytes) -> None:
    assert decompress(squeeze(body), encoding, len(body)) == body
    assert decompress(memoryview(squeeze(body)), encoding.upper(), len(body)) == body


@pytest.mark.parametrize(("encoding", "squeeze"), FORMATS)
def test_body_over_the_limit_is_refused(encoding: str, squeeze: Callable[[bytes], bytes]) -> None:
    error = refusal(squeeze(b"x" * 1001), encoding)
    assert (error.code, error.message) == (TOO_LARGE, "the body expands to more than the limit of 1000 bytes")


@pytest.mark.parametrize(("encoding", "squeeze"), FORMATS)
def test_small_bomb_takes_no_memory(encoding: str, squeeze: Callable[[bytes], bytes]) -> None:
    limit = 8 << 20
    bomb = squeeze(bytes(limit + 10_000))
    tracemalloc.start()
    try:
        assert refusal(bomb, encoding, limit).code == TOO_LARGE
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()
    assert decompress(squeeze(bytes(limit)), encoding, limit) == bytes(limit)


@pytest.mark.parametrize(("encoding", "squeeze"), FORMATS)
def test_bomb_is_stopped_at_the_limit(encoding: str, squeeze: Callable[[bytes], bytes]) -> None:
    bomb = squeeze(bytes(50_000_000))
    tracemalloc.start()
    try:
        assert refusal(bomb, encoding, 100_000).code == TOO_LARGE
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 1_000_000


@pytest.mark.parametrize(("encoding", "squeeze"), FORMATS)
def test_damaged_body_is_refused(encoding: str, squeeze: Callable[[bytes], bytes]) -> None:
    whole = squeeze(b"hello, hello, hello")
    for damaged in (whole[:-1], whole[: len(whole) // 2], whole[:1], b"", whole + b"x", whole + whole, b"hello"):
        error = refusal(damaged, encoding)
        assert (error.code, error.message) == (BAD_INPUT, f"the body is not valid {encoding} data")


def test_checksum_counts() -> None:
    whole = gzip.compress(b"hello")
    assert refusal(whole[:-8] + b"\0" * 8, "gzip").code == BAD_INPUT


@pytest.mark.parametrize("encoding", ["br", "zstd", "gzip, gzip", "x" * 1000, ""])
def test_unknown_encoding_is_not_done(encoding: str) -> None:
    error = refusal(b"", encoding)
    assert error.code == UNSUPPORTED
    assert error.message == f"Content-Encoding '{encoding[:40]}' is not known; gzip and deflate are"


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200), st.sampled_from(["gzip", "deflate"]), st.booleans())
def test_any_bytes_are_a_body_or_an_error(body: bytes, encoding: str, begin_well: bool) -> None:
    start = compress(b"hello", encoding)[:8] if begin_well else b""
    try:
        outcome: int | str = len(decompress(start + body, encoding, 1000))
    except PenstockError as error:
        outcome = error.code
    assert outcome in (BAD_INPUT, TOO_LARGE) or int(outcome) <= 1000


@pytest.mark.parametrize(
    ("accepted", "chosen"),
    [
        ("", ""),
        ("gzip", "gzip"),
        ("deflate", "deflate"),
        ("gzip, deflate", "gzip"),
        ("deflate, gzip", "gzip"),
        ("GZIP", "gzip"),
        ("br", ""),
        ("br, deflate", "deflate"),
        ("*", "gzip"),
        ("*;q=0", ""),
        ("gzip;q=0", ""),
        ("gzip;q=0, *", "deflate"),
        ("gzip;q=0, deflate;q=0, *", ""),
        ("gzip;q=0.2, deflate;q=0.8", "deflate"),
        ("gzip; q=0.2 , deflate ; Q=0.8", "deflate"),
        ("deflate;q=0.5, *;q=0.9", "gzip"),
        ("identity", ""),
        ("identity;q=0", ""),
        ("identity, gzip", "gzip"),
        ("identity;q=1, gzip;q=0.5", ""),
        ("identity;q=0.5, gzip;q=0.8", "gzip"),
        ("gzip;q=x", ""),
        ("gzip;q=", ""),
        ("gzip;q=nan", ""),
        ("gzip;q=-1", ""),
        ("gzip;level=9, deflate", "deflate"),
        (",,;;=,", ""),
    ],
)
def test_choice_for_accept_encoding(accepted: str, chosen: str) -> None:
    assert choose(accepted) == chosen


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet="gzipdeflat*;q=,.01 xé", max_size=40))
def test_any_accept_encoding_has_a_choice(accepted: str) -> None:
    assert choose(accepted) in ("", "gzip", "deflate")


@pytest.mark.parametrize("encoding", ["gzip", "deflate"])
def test_what_is_sent_can_be_read_by_everybody(encoding: str) -> None:
    body = b'{"outputs":[]}' * 100
    sent = compress(body, encoding)
    assert len(sent) < len(body)
    assert (gzip if encoding == "gzip" else zlib).decompress(sent) == body
    assert compress(body, encoding) == sent, "it does not depend on the time"
