"""Bodies as they travel, and what is refused before it takes room."""

from __future__ import annotations

import gzip
import random
import tracemalloc
import zlib
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.gateway import compression
from penstock.gateway.compression import SMALL_BYTES, choose, compress, decompress, decompress_small
from penstock.wire.errors import BAD_INPUT, CANCELLED, TOO_LARGE, UNSUPPORTED, PenstockError

zstd = compression.zstd


def raw_deflate(body: bytes) -> bytes:
    squeezer = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    return squeezer.compress(body) + squeezer.flush()


def zstd_in_pieces(body: bytes) -> bytes:
    """Whose sender did not know how long it would be."""
    squeezer = zstd.ZstdCompressor(level=3)
    return b"".join(squeezer.compress(body[at : at + 5000]) for at in range(0, len(body), 5000)) + squeezer.flush()


FORMATS: list[tuple[str, Callable[[bytes], bytes]]] = [
    ("gzip", gzip.compress),
    ("deflate", zlib.compress),
    ("deflate", raw_deflate),
    ("zstd", zstd.compress),
    ("zstd", zstd_in_pieces),
]


def refusal(body: bytes, encoding: str, bytes_max: int = 1000) -> PenstockError:
    """What both ways say to it, unless one leaves it to the other."""
    with pytest.raises(PenstockError) as raised:
        decompress(body, encoding, bytes_max)
    told: PenstockError | None = None
    try:
        assert decompress_small(body, encoding, bytes_max) is None
        assert encoding != "deflate", "which is never in pieces"
    except PenstockError as error:
        told = error
    assert told is None or (told.code, told.message) == (raised.value.code, raised.value.message)
    return raised.value


@pytest.mark.parametrize(("encoding", "squeeze"), FORMATS)
@pytest.mark.parametrize("body", [b"", b"hello", bytes(range(256)) * 40])
def test_body_comes_out_as_it_was(encoding: str, squeeze: Callable[[bytes], bytes], body: bytes) -> None:
    assert decompress(squeeze(body), encoding, len(body)) == body
    assert decompress(memoryview(squeeze(body)), encoding.upper(), len(body)) == body
    assert decompress_small(memoryview(squeeze(body)), encoding.upper(), len(body)) == body


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
        with pytest.raises(PenstockError, match="expands to more than the limit of"):
            decompress(bomb, encoding, limit)
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
    for damaged in (whole[:-1], whole[: len(whole) // 2], whole[:1], b"", whole + b"x", whole + whole[:-1], b"hello"):
        error = refusal(damaged, encoding)
        assert (error.code, error.message) == (BAD_INPUT, f"the body is not valid {encoding} data")


@pytest.mark.parametrize(("encoding", "squeeze"), FORMATS)
@pytest.mark.parametrize("more", [-1, 0, 1])
def test_what_is_not_small_is_left_to_a_thread(encoding: str, squeeze: Callable[[bytes], bytes], more: int) -> None:
    body = bytes(SMALL_BYTES + more)
    assert decompress_small(squeeze(body), encoding, 2 * SMALL_BYTES) == (None if more > 0 else body)
    assert decompress(squeeze(body), encoding, len(body)) == body


@pytest.mark.parametrize(("encoding", "squeeze"), FORMATS)
def test_large_body_comes_out_as_it_was_and_damage_is_noticed_wherever_it_is(
    encoding: str, squeeze: Callable[[bytes], bytes]
) -> None:
    """In pieces: of what expands much and little, and ends inside of a piece and at its end."""
    noise = random.Random(0).randbytes(3 << 17)
    for body in (noise, bytes(3 << 18), bytes((3 << 18) + 258), noise + bytes(1 << 20) + noise):
        whole = squeeze(body)
        assert decompress(whole, encoding, len(body)) == body
        for damaged in (whole[:-1], whole[: len(whole) // 2], whole + b"x"):
            with pytest.raises(PenstockError, match=f"the body is not valid {encoding} data"):
                decompress(damaged, encoding, len(body))


@pytest.mark.parametrize(("encoding", "squeeze"), FORMATS)
def test_pieces_one_behind_another_are_one_body(encoding: str, squeeze: Callable[[bytes], bytes]) -> None:
    """As bgzip and pzstd write them, of any size (zlib's format knows none of this)."""
    noise = random.Random(0).randbytes(100_000)
    parts = [b"hello", b"", noise, b"", noise[:65_000], b"end"]
    whole = b"".join(map(squeeze, parts))
    if encoding == "deflate":
        assert refusal(whole, encoding, 1 << 20).code == BAD_INPUT
        return
    assert decompress(whole, encoding, 165_008) == b"".join(parts)
    assert decompress_small(whole, encoding, 165_008) is None
    assert refusal(whole, encoding, 165_007).code == TOO_LARGE
    assert refusal(whole + whole[:10], encoding, 1 << 20).code == BAD_INPUT
    assert refusal(squeeze(b"") * 10_001, encoding).message.startswith("the body is more than 10000 pieces")
    assert not decompress(squeeze(b"") * 10_000, encoding, 0)


def test_it_stops_when_it_is_not_wanted_any_more() -> None:
    looks = 0

    def wanted() -> bool:
        nonlocal looks
        looks += 1
        return looks < 3

    with pytest.raises(PenstockError) as raised:
        decompress(gzip.compress(bytes(64 << 20)), "gzip", 64 << 20, wanted)
    assert (raised.value.code, looks) == (CANCELLED, 3)


def test_a_frame_that_wants_much_memory_is_refused() -> None:
    """Of 2 GB here, though it holds next to nothing; up to 8 MiB there may be."""
    for log in (31, 27, 24, 23):
        squeezer = zstd.ZstdCompressor(options={zstd.CompressionParameter.window_log: log})
        frame = squeezer.compress(b"hello") + squeezer.flush()
        if log == 23:
            assert bytes(decompress(frame, "zstd", 1000)) == b"hello"
        else:
            error = refusal(frame, "zstd")
            assert (error.code, "window of more than 8388608 bytes" in error.message) == (TOO_LARGE, True)


def test_checksum_counts() -> None:
    whole = gzip.compress(b"hello")
    assert refusal(whole[:-8] + b"\0" * 8, "gzip").code == BAD_INPUT


@pytest.mark.parametrize("encoding", ["br", "zstd, gzip", "gzip, gzip", "x" * 1000, ""])
def test_unknown_encoding_is_not_done(encoding: str) -> None:
    error = refusal(b"", encoding)
    assert error.code == UNSUPPORTED
    assert error.message == f"Content-Encoding '{encoding[:40]}' is not known; gzip, deflate and zstd are"


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200), st.sampled_from(["gzip", "deflate", "zstd"]), st.booleans())
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
        ("zstd", "zstd"),
        ("gzip, deflate, br, zstd", "zstd"),
        ("gzip, zstd;q=0.9", "gzip"),
        ("zstd;q=0, *", "gzip"),
        ("zstd, *", "zstd"),
        ("deflate, gzip", "gzip"),
        ("GZIP", "gzip"),
        ("br", ""),
        ("br, deflate", "deflate"),
        ("*", "gzip"),
        ("*;q=0", ""),
        ("gzip;q=0", ""),
        ("gzip;q=0, *", "deflate"),
        ("gzip;q=0, deflate;q=0, *", "zstd"),
        ("gzip;q=0.2, deflate;q=0.8", "deflate"),
        ("gzip;q=0, deflate;q=0, zstd;q=0, *", ""),
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
@given(st.text(alphabet="gzipdeflatszd*;q=,.01 xé", max_size=40))
def test_any_accept_encoding_has_a_choice(accepted: str) -> None:
    assert choose(accepted) in ("", "gzip", "deflate", "zstd")


@pytest.mark.parametrize("encoding", ["gzip", "deflate", "zstd"])
def test_what_is_sent_can_be_read_by_everybody(encoding: str) -> None:
    body = b'{"outputs":[]}' * 100
    sent = compress(body, encoding)
    assert len(sent) < len(body)
    assert {"gzip": gzip, "deflate": zlib, "zstd": zstd}[encoding].decompress(sent) == body
    assert compress(body, encoding) == sent, "it does not depend on the time"
