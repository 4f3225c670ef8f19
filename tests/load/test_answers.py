"""Answers are found in the bytes however these are cut, and what is no answer is refused."""

from __future__ import annotations

import http.client
import io
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.load.answers import AnswerError, Answers

PLAIN = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello"
CHUNKED = b"HTTP/1.1 503 no\r\nTransfer-Encoding: chunked\r\n\r\n3;x=y\r\nabc\r\n0a\r\n0123456789\r\n0\r\n\r\n"
TRAILED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, chunked\r\n\r\n1\r\n0\r\n0\r\nA: b\r\n\r\n"
EMPTY = b"HTTP/1.1 204 No Content\r\n\r\n"
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
CLOSING = b"HTTP/1.1 400 Bad\r\nConnection: close\r\nContent-Length: 2\r\n\r\nno"
OLD = b"HTTP/1.0 200 OK\r\nContent-Length: 0\r\n\r\n"
WHOLE = {
    PLAIN: (200, False),
    CHUNKED: (503, False),
    TRAILED: (200, False),
    EMPTY: (204, False),
    CONTINUE + PLAIN: (200, False),
    CLOSING: (400, True),
    OLD: (200, True),
}


def pieces(data: bytes, cuts: list[int]) -> list[bytes]:
    edges = sorted({0, len(data), *(cut % len(data) for cut in cuts)})
    return [data[begin:end] for begin, end in pairwise(edges)]


@given(st.lists(st.tuples(st.sampled_from(sorted(WHOLE)), st.lists(st.integers(0, 200))), max_size=5))
def test_an_answer_ends_with_its_last_byte_however_it_comes(answers: list[tuple[bytes, list[int]]]) -> None:
    reader = Answers({})
    for data, cuts in answers:
        *before, last = pieces(data, cuts)
        assert [reader.feed(piece) for piece in before] == [None] * len(before)
        assert (reader.feed(last), reader.closes) == WHOLE[data]


@given(st.lists(st.binary(min_size=1, max_size=50), max_size=5), st.lists(st.integers(0, 500)))
def test_it_reads_chunks_as_the_standard_library_does(chunks: list[bytes], cuts: list[int]) -> None:
    body = b"".join(b"%x\r\n%b\r\n" % (len(chunk), chunk) for chunk in chunks) + b"0\r\n\r\n"
    data = b"HTTP/1.1 500 x\r\nTransfer-Encoding: chunked\r\n\r\n" + body

    class Socket:
        def makefile(self, mode: str) -> io.BytesIO:
            return io.BytesIO(data)

    response = http.client.HTTPResponse(Socket())  # type: ignore[arg-type]
    response.begin()
    assert response.read() == b"".join(chunks)
    reader = Answers({})
    assert [reader.feed(piece) for piece in pieces(data, cuts)][-1] == 500


def test_without_a_length_the_end_of_the_connection_is_that_of_the_answer() -> None:
    reader = Answers({})
    assert reader.eof() is None
    assert reader.feed(b"HTTP/1.1 404 Not Found\r\n\r\nnothing ") is None
    assert reader.feed(b"here") is None
    assert reader.eof() == 404
    assert reader.closes
    assert reader.text == b"nothing here"


def test_an_answer_cut_off_is_none() -> None:
    reader = Answers({})
    assert reader.feed(PLAIN[:-1]) is None
    assert reader.eof() is None


def test_the_text_of_an_error_is_kept_up_to_a_limit_and_no_other() -> None:
    reader = Answers({})
    reader.feed(CLOSING)
    assert reader.text == b"no"
    reader.feed(PLAIN)
    assert reader.text == b""
    reader.feed(b"HTTP/1.1 500 x\r\nContent-Length: 10000\r\n\r\n" + b"x" * 10000)
    assert reader.text == b"x" * 4096


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (b"SSH-2.0-OpenSSH_9.6\r\n\r\n", "is no status line"),
        (b"HTTP/2 200\r\n\r\n", "is no status line"),
        (b"HTTP/1.1 abc\r\n\r\n", "is no status line"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n", "no Content-Length"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nxyz\r\n", "no size of a chunk"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + b"1" * 70000, "no line"),
        (PLAIN + b"HTTP", "4 bytes came after the end"),
        (EMPTY + b"x", "1 bytes came after the end"),
        (CHUNKED + b"x", "1 bytes came after the end"),
        (b"x" * 70000, "longer than 65536 bytes"),
    ],
)
def test_what_is_no_answer_is_refused(data: bytes, sentence: str) -> None:
    with pytest.raises(AnswerError, match=sentence):
        Answers({}).feed(data)


def test_heads_that_differ_in_what_they_tell_of_time_are_known() -> None:
    known: dict[bytes, object] = {}
    reader = Answers(known)  # type: ignore[arg-type]
    for status in (200, 404):
        for number in range(500):
            timing = b"Server-Timing: queue;dur=%d, total;dur=1" % number
            for lines in ([timing, b"Content-Length: 5"], [b"Content-Length: 5", timing]):
                data = b"\r\n".join([b"HTTP/1.1 %d OK" % status, *lines, b"", b"hello"])
                assert reader.feed(data) == status
    assert len(known) == 2


def test_what_is_known_of_heads_is_bounded() -> None:
    known: dict[bytes, object] = {}
    reader = Answers(known)  # type: ignore[arg-type]
    for number in range(2000):
        assert reader.feed(b"HTTP/1.1 200 OK\r\nDate: %d\r\nContent-Length: 0\r\n\r\n" % number) == 200
    assert len(known) <= 256
