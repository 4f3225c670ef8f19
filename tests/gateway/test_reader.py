"""Reads in, requests and at most one error out."""

from __future__ import annotations

import itertools
import tracemalloc
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.gateway.options import GatewayOptions
from penstock.gateway.reader import BODY, BROKEN, FULL, HEAD, IDLE, Budget, Head, Known, Reader, Request
from penstock.wire.slots import Slots

GET = b"GET /v2 HTTP/1.1\r\nHost: here\r\n\r\n"
POST = b"POST /infer HTTP/1.1\r\nHost: here\r\nContent-Length: 5\r\n\r\nhello"
CHUNKED = b"POST /infer HTTP/1.1\r\nHost: here\r\nTransfer-Encoding: chunked\r\n\r\n"
FAST = settings(max_examples=300, deadline=None)


class Conversation:
    """A reader that is fed as a connection feeds it, and what has come out."""

    def __init__(
        self,
        options: GatewayOptions | None = None,
        budget: Budget | None = None,
        heads: dict[bytes, Head] | None = None,
        slots: Slots | None = None,
    ) -> None:
        self.budget = budget or Budget(1 << 30)
        self.heads = {} if heads is None else heads
        self.reader: Reader[Request] = Reader(options or GatewayOptions(), self.budget, self.heads, lambda: slots)
        self.requests: list[Request] = []
        self.found: list[Head] = []
        self.bodies: list[bytes] = []
        self.charged: list[int] = []

    def hear(self, *reads: bytes) -> Conversation:
        reader = self.reader
        for read in reads:
            rest = read
            while rest and reader.error is None:
                if reader.direct is None:
                    reader.feed(memoryview(rest), len(rest))
                    rest = b""
                else:
                    count = min(len(rest), len(reader.direct))
                    reader.direct[:count] = rest[:count]
                    reader.filled(count)
                    rest = rest[count:]
                self.requests += reader.requests
                for request in reader.requests:
                    self.found.append(request.head)
                    self.bodies.append(bytes(request.body))
                    self.charged.append(request.charged)
                reader.requests = []
        return self

    @property
    def status(self) -> int:
        return self.reader.error.status if self.reader.error else 0

    @property
    def sentence(self) -> str:
        return self.reader.error.sentence if self.reader.error else ""

    def said(self) -> list[tuple[object, ...]]:
        """All that came out, as far as an answer depends on it: nothing behind a request that is the last."""
        told: list[tuple[object, ...]] = []
        for head, body, charged in zip(self.found, self.bodies, self.charged, strict=True):
            told.append((head.method, head.url, head.headers, head.length, head.keep_alive, head.http10, body, charged))
            if not head.keep_alive:
                return told
        return [*told, (self.status, self.sentence)]


def hear(*reads: bytes) -> Conversation:
    return Conversation().hear(*reads)


def head(line: bytes, *headers: bytes) -> bytes:
    return b"\r\n".join([line, *headers, b"", b""])


# --- requests ---


def test_request_without_body() -> None:
    said = hear(GET)
    assert [(h.method, h.url, h.length, h.keep_alive, h.http10) for h in said.found] == [
        (b"GET", b"/v2", 0, True, False)
    ]
    assert said.found[0].headers == {"host": b"here"}
    assert said.bodies == [b""]
    assert (said.status, said.reader.phase) == (0, IDLE)


def test_headers_that_mean_something_are_kept_by_lower_case_name_and_others_are_not() -> None:
    said = hear(head(b"GET / HTTP/1.1", b"HOST: a", b"X-Other: b", b"accept-encoding: gzip", b"Content-type: c"))
    assert said.found[0].headers == {"host": b"a", "accept-encoding": b"gzip", "content-type": b"c"}


def test_header_that_may_be_there_twice_becomes_a_list() -> None:
    said = hear(head(b"GET / HTTP/1.1", b"Host: a", b"Accept-Encoding: gzip", b"Accept-Encoding: deflate"))
    assert said.found[0].headers["accept-encoding"] == b"gzip, deflate"


def test_pipelined_requests_come_out_in_order() -> None:
    said = hear(GET + POST + CHUNKED + b"3\r\nabc\r\n0\r\n\r\n" + GET)
    assert said.bodies == [b"", b"hello", b"abc", b""]
    assert [h.length for h in said.found] == [0, 5, -1, 0]


def test_reader_is_in_the_head_then_in_the_body_then_idle() -> None:
    said = hear(POST[:20])
    assert said.reader.phase == HEAD
    assert said.hear(POST[20:-3]).reader.phase == BODY
    assert said.reader.body_left == 3
    assert said.hear(POST[-3:]).reader.phase == IDLE


def test_empty_lines_before_a_request_are_skipped() -> None:
    assert hear(b"\r\n\r\n" + GET + b"\r\n" + GET).bodies == [b"", b""]


def test_chunks_with_extensions_and_trailers() -> None:
    said = hear(CHUNKED + b'3;a=b;c="d"\r\nabc\r\n02\r\nde\r\n0;last\r\nX-Sum: 1\r\nHost: elsewhere\r\n\r\n' + GET)
    assert said.bodies == [b"abcde", b""]
    assert said.found[0].headers["host"] == b"here", "trailers say nothing"
    assert said.charged == [5, 0]


@pytest.mark.parametrize(
    ("version", "connection", "keep_alive"),
    [
        (b"1.1", b"", True),
        (b"1.1", b"Connection: keep-alive", True),
        (b"1.1", b"Connection: close", False),
        (b"1.1", b"connection: Close", False),
        (b"1.1", b"Connection: x, close", False),
        (b"1.0", b"", False),
        (b"1.0", b"Connection: keep-alive", True),
        (b"1.0", b"Connection: Keep-Alive", True),
        (b"1.0", b"Connection: close", False),
    ],
)
def test_whether_the_connection_is_kept(version: bytes, connection: bytes, keep_alive: bool) -> None:
    lines = [b"Host: a"] + [connection] * bool(connection)
    [found] = hear(head(b"GET / HTTP/" + version, *lines)).found
    assert (found.keep_alive, found.http10) == (keep_alive, version == b"1.0")


def test_http_1_0_needs_no_host() -> None:
    assert hear(b"GET / HTTP/1.0\r\n\r\n").status == 0


# --- what is refused ---

HOST = b"Host: a"
PLAIN = (b"POST / HTTP/1.1", HOST)


@pytest.mark.parametrize(
    ("raw", "status", "words"),
    [
        (b"GET /\r\n\r\n", 505, "HTTP/0.9 is not spoken here"),
        (head(b"GET / HTTP/2.0", HOST), 505, "HTTP/2.0 is not spoken here"),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400, "not HTTP/1.1"),
        (head(b"GET / HTTP/1.2", HOST), 400, "not HTTP/1.1"),
        (head(b"get / HTTP/1.1", HOST), 400, "not HTTP/1.1"),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400, "not HTTP/1.1"),  # TLS
        (head(b"GET / HTTP/1.1"), 400, "needs a Host header"),
        (head(b"GET / HTTP/1.1", HOST, HOST), 400, "the header host is there twice"),
        (b"GET / HTTP/1.1\nHost: a\n\n", 400, "not HTTP/1.1"),
        (b"GET / HTTP/1.1\r\nHost: a\n\n", 400, "not HTTP/1.1"),
        (head(b"GET / HTTP/1.1", HOST, b"X: a", b" folded"), 400, "not HTTP/1.1"),
        (head(b"GET / HTTP/1.1", HOST, b"X : a"), 400, "not HTTP/1.1"),
        (head(b"GET / HTTP/1.1", HOST, b"X: a\0b"), 400, "not HTTP/1.1"),
        (head(*PLAIN, b"Content-Length: 5", b"Content-Length: 5"), 400, "Content-Length"),
        (head(*PLAIN, b"Content-Length: 5", b"Content-Length: 6"), 400, "Content-Length"),
        (head(*PLAIN, b"Content-Length: 5, 5"), 400, "Content-Length"),
        (head(*PLAIN, b"Content-Length: five"), 400, "Content-Length"),
        (head(*PLAIN, b"Content-Length: 0x5"), 400, "Content-Length"),
        (head(*PLAIN, b"Content-Length: +5"), 400, "Content-Length"),
        (head(*PLAIN, b"Content-Length: -5"), 400, "Content-Length"),
        (head(*PLAIN, b"Content-Length: 5 5"), 400, "Content-Length"),
        (head(*PLAIN, b"Content-Length:"), 400, "Content-Length"),
        (head(*PLAIN, b"Content-Length: " + b"9" * 30), 400, "Content-Length"),
        (head(*PLAIN, b"Content-Length: " + b"9" * 5000), 400, "Content-Length"),
        (head(*PLAIN, b"Content-Length: 67108865"), 413, "67108865 bytes is over the limit of 67108864"),
        (head(b"POST / HTTP/1.0", b"Transfer-Encoding: chunked"), 400, "HTTP/1.0 has no Transfer-Encoding"),
        (head(*PLAIN, b"Transfer-Encoding: chunked", b"Content-Length: 5"), 400, "Content-Length"),
        (head(*PLAIN, b"Content-Length: 5", b"Transfer-Encoding: chunked"), 400, "Transfer-Encoding"),
        (head(*PLAIN, b"Transfer-Encoding: gzip"), 501, "only chunked is known"),
        (head(*PLAIN, b"Transfer-Encoding: gzip, chunked"), 501, "only chunked is known"),
        (head(*PLAIN, b"Transfer-Encoding: identity"), 501, "only chunked is known"),
        (head(*PLAIN, b"Transfer-Encoding: xchunked"), 501, "only chunked is known"),
        (head(*PLAIN, b"Transfer-Encoding: chunked, gzip"), 400, "not HTTP/1.1"),
        (head(*PLAIN, b"Transfer-Encoding: chunked", b"Transfer-Encoding: chunked"), 400, "not HTTP/1.1"),
        (head(*PLAIN, b"Transfer-Encoding:"), 400, "not HTTP/1.1"),
        (CHUNKED + b"g\r\n", 400, "not HTTP/1.1"),
        (CHUNKED + b"-1\r\n", 400, "not HTTP/1.1"),
        (CHUNKED + b"fffffffffffffffff\r\n", 400, "not HTTP/1.1"),
        (CHUNKED + b"3\r\nabcd\r\n", 400, "not HTTP/1.1"),
        (CHUNKED + b"3\nabc\n0\n\n", 400, "not HTTP/1.1"),
        (CHUNKED + b"0\r\nContent-Length: 9\r\n\r\n", 400, "Content-Length"),
        (head(*PLAIN, b"Content-Length: 5", b"Expect: more"), 417, "only 100-continue is known"),
        (head(b"CONNECT a:80 HTTP/1.1", HOST), 501, "leave out CONNECT"),
        (head(*PLAIN, b"Content-Length: 5", b"Connection: Upgrade", b"Upgrade: h2c"), 501, "leave out CONNECT"),
        (head(*PLAIN, b"Transfer-Encoding: chunked", b"Connection: Upgrade", b"Upgrade: x"), 501, "leave out CONNECT"),
        (head(*PLAIN, b"Inference-Header-Content-Length: 1", b"inference-header-content-length: 1"), 400, "twice"),
        (head(*PLAIN, b"Content-Type: a", b"Content-Type: a"), 400, "content-type is there twice"),
        (head(*PLAIN, b"Penstock-Tenant: a", b"penstock-tenant: b"), 400, "penstock-tenant is there twice"),
    ],
)
def test_refused(raw: bytes, status: int, words: str) -> None:
    said = hear(raw)
    assert (said.status, said.found) == (status, [])
    assert words in said.sentence
    assert (said.reader.phase, said.budget.used) == (BROKEN, 0)


def test_requests_before_an_error_come_out() -> None:
    said = hear(GET + POST + b"nonsense\r\n\r\n")
    assert (said.bodies, said.status) == ([b"", b"hello"], 400)


def test_nothing_is_read_behind_an_error() -> None:
    said = hear(b"nonsense\r\n\r\n")
    error = said.reader.error
    said.reader.feed(memoryview(GET), len(GET))
    assert (said.reader.requests, said.reader.error) == ([], error)


def test_nothing_is_read_after_the_end() -> None:
    said = hear(POST[:-2])
    said.reader.close()
    said.hear(b"lo" + POST)
    assert (said.found, said.budget.used, said.reader.phase) == ([], 0, BROKEN)


def test_white_space_behind_a_value_is_no_part_of_it() -> None:
    said = hear(head(*PLAIN, b"Transfer-Encoding: chunked ", b"Expect: 100-continue ") + b"1\r\na\r\n0\r\n\r\n")
    assert (said.bodies, said.sentence) == ([b"a"], "")


# --- Expect and Upgrade ---


def expecting(version: bytes, length: bytes) -> Reader[Request]:
    return hear(head(b"POST / HTTP/" + version, HOST, b"Expect: 100-Continue", length)).reader


def test_expectation_is_noted_until_the_body_is_there() -> None:
    said = hear(head(*PLAIN, b"Expect: 100-continue", b"Content-Length: 5"))
    assert said.reader.wants_continue
    said.hear(b"hello")
    assert (said.bodies, said.reader.wants_continue) == ([b"hello"], False)


def test_expectation_of_a_chunked_body_is_noted() -> None:
    assert expecting(b"1.1", b"Transfer-Encoding: chunked").wants_continue


def test_nobody_waits_to_send_an_empty_body() -> None:
    assert not expecting(b"1.1", b"Content-Length: 0").wants_continue


def test_expectation_in_http_1_0_is_ignored() -> None:
    reader = expecting(b"1.0", b"Content-Length: 5")
    assert (reader.wants_continue, reader.phase) == (False, BODY)


UPGRADE = head(b"GET /a HTTP/1.1", HOST, b"Connection: Upgrade, HTTP2-Settings", b"Upgrade: h2c", b"HTTP2-Settings: A")


def test_offer_of_another_protocol_is_ignored() -> None:
    said = hear(UPGRADE + POST)
    assert [(h.method, h.keep_alive) for h in said.found] == [(b"GET", True), (b"POST", True)]
    assert said.bodies == [b"", b"hello"]


def test_many_offers_in_one_read_are_as_good_as_one() -> None:
    said = hear(UPGRADE * 2000 + GET)
    assert (len(said.found), said.status) == (2001, 0)


# --- the same, however it is cut ---

VALID = st.sampled_from(
    [
        GET,
        POST,
        b"\r\n" + GET,
        UPGRADE,
        CHUNKED + b"0\r\n\r\n",
        CHUNKED + b"3;x=y\r\nabc\r\n2\r\n\r\n\r\n0\r\nX: y\r\n\r\n",
        head(*PLAIN, b"Content-Length: 12") + b"\r\n\r\nGET / x\r\n",
        head(*PLAIN, b"X-Empty:", b"Content-Length: 3", b"Y: ") + b"\0\n\r",
        head(b"GET /%41?b=c HTTP/1.1", b"Accept-Encoding: gzip", HOST, b"Accept-Encoding: deflate ;q=1 "),
        head(b"POST / HTTP/1.0", b"Connection: keep-alive", b"Content-Length: 2") + b"ab",
        head(b"HEAD / HTTP/1.1", HOST, b"Connection: close"),
        head(*PLAIN, b"Expect: 100-continue", b"Content-Length: 70000") + b"x" * 70000,
    ]
)
WRONG = st.sampled_from(
    [
        b"",
        b"GET / HTTP/1.1\r\n\r\n",
        b"nonsense\r\n",
        head(*PLAIN, b"Content-Length: 3", b"Content-Length: 3"),
        head(*PLAIN, b"Expect: x", b"Content-Length: 3"),
        head(*PLAIN, *(b"A: b" for _ in range(100))),
        head(*PLAIN, b"Content-Length: 100000"),
        CHUNKED + b"3\r\nabcd",
        CHUNKED + b"11171\r\n" + b"x" * 70001,
        POST[:-1],
        GET[:10],
    ]
)


def cut(raw: bytes, places: Sequence[int]) -> list[bytes]:
    ends = sorted({place % (len(raw) + 1) for place in places} | {0, len(raw)})
    return [raw[start:end] for start, end in itertools.pairwise(ends)]


@FAST
@given(
    st.lists(VALID, max_size=5),
    WRONG,
    st.lists(st.integers(0, 1 << 20), max_size=12),
    st.none() | st.tuples(st.integers(0, 1 << 20), st.binary(max_size=2)),
)
def test_the_same_stream_means_the_same_however_it_is_cut(
    requests: list[bytes], end: bytes, places: list[int], damage: tuple[int, bytes] | None
) -> None:
    raw = b"".join(requests) + end
    if damage is not None:
        at = damage[0] % (len(raw) + 1)
        raw = raw[:at] + damage[1] + raw[at + 1 :]
    options = GatewayOptions(body_bytes_max=70_000)
    whole = Conversation(options).hear(raw)
    parts = Conversation(options)
    parts.hear(*cut(raw, places)).hear(*[b""] * 2)
    assert parts.said() == whole.said()
    for said in (whole, parts):
        said.reader.close()
        assert said.budget.used == sum(said.charged)


@FAST
@given(st.lists(VALID, min_size=1, max_size=4), st.lists(st.integers(0, 1 << 20), max_size=6))
def test_heads_that_are_known_mean_the_same(requests: list[bytes], places: list[int]) -> None:
    heads: dict[bytes, Head] = {}
    for request in requests:
        Conversation(heads=heads).hear(request)
    raw = b"".join(requests)
    fresh = Conversation().hear(raw)
    for reads in (requests, cut(raw, places), [raw]):
        assert Conversation(heads=heads).hear(*reads).said() == fresh.said()


@settings(max_examples=25, deadline=None)
@given(
    st.integers(65_000, 200_000),
    st.integers(0, 70_000),
    st.lists(st.integers(1, 50_000), min_size=1, max_size=20),
)
def test_large_body_lands_intact_whatever_the_reads(size: int, first: int, sizes: list[int]) -> None:
    body = bytes(i * 7 & 255 for i in range(1000)) * (size // 1000 + 1)
    raw = head(*PLAIN, b"Content-Length: %d" % size) + body[:size] + POST
    places = [first]
    while places[-1] < len(raw):
        places.append(places[-1] + sizes[len(places) % len(sizes)])
    said = hear(*cut(raw, [place for place in places if place <= len(raw)]))
    assert said.bodies == [body[:size], b"hello"]
    assert said.charged == [size, 5]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(65_000, 90_000), min_size=1, max_size=4), st.lists(st.integers(0, 20_000), max_size=9))
def test_large_requests_whose_heads_are_known_mean_the_same(lengths: list[int], places: list[int]) -> None:
    heads: dict[bytes, Head] = {}
    raws = [head(*PLAIN, b"Content-Length: %d" % size) for size in lengths]
    for raw in raws:
        Conversation(heads=heads).hear(raw)
    stream = b"".join(raw + bytes([65 + at]) * size for at, (raw, size) in enumerate(zip(raws, lengths, strict=True)))
    starts = [0]
    for raw, size in zip(raws, lengths, strict=True):
        starts.append(starts[-1] + len(raw) + size)
    cuts = sorted({start + place for start, place in zip(starts[:-1] * 3, places, strict=False)} | set(starts))
    known, fresh = Conversation(heads=heads).hear(*cut(stream, cuts)), Conversation().hear(stream)
    assert known.said() == fresh.said()
    assert known.charged == lengths


def test_a_body_that_was_large_lets_the_next_be_expected_so() -> None:
    said = hear(LARGE_HEAD)
    expected = [said.reader.expects_large]
    for read in (b"a" * 100_000, GET, LARGE_HEAD, b"a" * 100_000, POST):
        said.hear(read)
        expected.append(said.reader.expects_large)
    assert expected == [False, True, False, False, True, False]


def test_rest_of_a_large_body_goes_straight_into_its_buffer() -> None:
    said = hear(head(*PLAIN, b"Content-Length: 100000") + b"a" * 1000)
    assert said.reader.direct is not None
    assert len(said.reader.direct) == said.reader.body_left == 99_000
    said.hear(b"b" * 98_000)
    assert said.reader.body_left == 1000
    said.hear(b"c" * 1000 + GET)
    assert said.bodies == [b"a" * 1000 + b"b" * 98_000 + b"c" * 1000, b""]


def test_small_rest_of_a_body_goes_through_the_parser() -> None:
    assert hear(head(*PLAIN, b"Content-Length: 100000") + b"a" * 40_000).reader.direct is None


# --- heads that are known ---


def test_second_request_with_the_same_head_is_not_parsed() -> None:
    said = hear(POST, POST[:-5] + b"world")
    assert said.found[0] is said.found[1]
    assert said.bodies == [b"hello", b"world"]
    assert said.charged == [5, 5]


def test_known_head_is_shared_by_connections() -> None:
    heads: dict[bytes, Head] = {}
    first, second = Conversation(heads=heads).hear(POST), Conversation(heads=heads).hear(POST)
    assert first.found[0] is second.found[0]


def test_known_head_with_a_body_that_looks_like_the_end_of_a_head() -> None:
    raw = head(*PLAIN, b"Content-Length: 8")
    said = hear(raw + b"\r\n\r\nGET ", raw + b"\r\n\r\n\r\n\r\n")
    assert said.found[0] is said.found[1]
    assert said.bodies == [b"\r\n\r\nGET ", b"\r\n\r\n\r\n\r\n"]


def test_known_head_with_part_of_its_body() -> None:
    said = hear(POST, POST[:-2], b"lo")
    assert said.bodies == [b"hello", b"hello"]
    assert said.found[0] is not said.found[1]


def test_known_head_with_another_request_behind_it() -> None:
    said = hear(POST, POST + GET)
    assert said.bodies == [b"hello", b"hello", b""]


def test_known_head_behind_half_a_request() -> None:
    said = hear(GET, GET[:5], GET)
    assert (len(said.found), said.status) == (1, 400)


@pytest.mark.parametrize(
    "raw",
    [
        GET + POST,
        b"\r\n" + GET,
        b"\r\n\r\n" + GET,
        CHUNKED + b"0\r\n\r\n",
        head(b"GET / HTTP/1.1", HOST, b"Connection: close"),
        head(b"GET / HTTP/1.0"),
        head(b"GET / HTTP/1.1", HOST, b"X: " + b"y" * 2048),
        head(*PLAIN, b"Content-Length: 40000") + b"x" * 40000,
        b"GET / HTTP/1.1\r\n\r\n",
        POST[:-1],
    ],
)
def test_head_is_not_remembered(raw: bytes) -> None:
    assert hear(raw).heads == {}


def test_head_of_a_request_in_several_reads_is_not_remembered() -> None:
    assert hear(POST[:10], POST[10:], GET[:-2], GET[-2:]).heads == {}


LARGE_HEAD = head(*PLAIN, b"Content-Length: 100000")


def test_second_large_request_with_the_same_head_is_not_parsed() -> None:
    said = hear(
        LARGE_HEAD + b"a" * 1000, b"b" * 99_000, LARGE_HEAD + b"c" * 10, b"d" * 99_990, LARGE_HEAD, b"e" * 100_000, GET
    )
    assert said.found[0] is said.found[1] is said.found[2]
    assert [len(body) for body in said.bodies] == [100_000, 100_000, 100_000, 0]
    assert bytes(said.bodies[1]) == b"c" * 10 + b"d" * 99_990
    assert said.charged == [100_000, 100_000, 100_000, 0]


def test_known_large_head_with_nearly_all_of_its_body() -> None:
    """What is left is not worth a buffer of its own."""
    size = 70_000
    raw = head(*PLAIN, b"Content-Length: %d" % size)
    said = hear(raw, b"a" * size, raw + b"b" * 8000, b"c" * (size - 8000))
    assert [len(body) for body in said.bodies] == [size, size]


@pytest.mark.parametrize(
    "reads",
    [
        [GET + LARGE_HEAD],
        [b"\r\n" + LARGE_HEAD],
        [LARGE_HEAD[:10], LARGE_HEAD[10:]],
        [head(*PLAIN, b"Content-Length: 100000", b"Connection: close")],
        [head(*PLAIN, b"Content-Length: 100000", b"Expect: 100-continue")],
        [head(*PLAIN, b"Content-Length: 100000", b"X: " + b"y" * 2048)],
        [head(*PLAIN, b"Transfer-Encoding: chunked") + b"186a0\r\n"],
        [head(*PLAIN, b"Content-Length: 60000")],
        [head(b"POST / HTTP/1.0", b"Content-Length: 100000")],
        [head(b"POST / HTTP/1.1", b"Content-Length: 100000")],
    ],
)
def test_large_head_is_not_remembered(reads: list[bytes]) -> None:
    assert hear(*reads).heads == {}


def test_known_large_head_over_what_is_left_of_the_budget_is_refused() -> None:
    heads: dict[bytes, Head] = {}
    Conversation(heads=heads).hear(LARGE_HEAD)
    assert len(heads) == 1
    said = Conversation(budget=Budget(150_000), heads=heads)
    assert said.budget.take(60_000)
    said.hear(LARGE_HEAD + b"a")
    assert (said.status, said.budget.used) == (503, 60_000)


def test_only_so_many_heads_are_remembered() -> None:
    said = hear(*[head(b"GET /%d HTTP/1.1" % number, HOST) for number in range(1500)])
    assert len(said.found) == 1500
    assert 0 < len(said.heads) <= 1024


# --- limits ---

SMALL = GatewayOptions(head_bytes_max=2000, headers_max=10, body_bytes_max=1000)


def bounded(*reads: bytes) -> Conversation:
    return Conversation(SMALL).hear(*reads)


def test_head_up_to_the_limit_is_read_however_it_is_cut() -> None:
    raw = head(b"GET / HTTP/1.1", HOST, *(b"X-%d: " % number + b"y" * 300 for number in range(6)))
    assert bounded(raw).status == 0
    assert bounded(*cut(raw, range(0, 2000, 7))).status == 0


@pytest.mark.parametrize("step", [1, 7, 999, 5000])
def test_head_over_the_limit_is_refused_however_it_is_cut(step: int) -> None:
    raw = head(b"GET / HTTP/1.1", HOST, *(b"X-%d: " % number + b"y" * 300 for number in range(7)))
    said = bounded(*cut(raw, range(0, 5000, step)))
    assert (said.status, said.found) == (431, [])
    assert "more than 2000 bytes" in said.sentence


def test_body_in_the_read_that_ends_a_head_is_no_part_of_the_head() -> None:
    raw = head(*PLAIN, b"Content-Length: 60000") + b"x" * 60_000
    for place in range(1, 50, 7):
        said = hear(*cut(raw, [place]))
        assert (said.status, list(map(len, said.bodies))) == (0, [60_000])


def test_requests_in_the_read_that_begins_a_head_are_no_part_of_it() -> None:
    said = bounded(POST * 200 + GET[:-5], GET[-5:])
    assert (len(said.found), said.status) == (201, 0)


@pytest.mark.parametrize(
    "start",
    [b"GET /", b"GET / HTTP/1.1\r\nX", b"GET / HTTP/1.1\r\nHost: a\r\nX: ", b"GET / HTTP/1.1\r\nHost: a\r\nX: a "],
)
def test_head_that_never_ends_is_refused(start: bytes) -> None:
    said = bounded(start, *[b"y" * 100] * 21)
    assert said.status == 431


@pytest.mark.parametrize("start", [b"0\r\nX: ", b"1;", b"1\r\na\r\n1;x="])
def test_trailer_and_chunk_extension_that_never_end_are_refused(start: bytes) -> None:
    said = bounded(CHUNKED, start, *[b"y" * 100] * 21)
    assert (said.status, said.budget.used) == (431, 0)


def test_body_in_chunks_is_not_counted_as_a_head() -> None:
    parts = [b"%x\r\n" % 900, *[b"x" * 9] * 100, b"\r\n", b"0\r\n", b"\r\n"]
    assert bounded(CHUNKED, *parts).bodies == [b"x" * 900]


@pytest.mark.parametrize("trailers", [False, True])
def test_too_many_headers_are_refused(trailers: bool) -> None:
    many = b"".join(b"X: y\r\n" for _ in range(11)) + b"\r\n"
    said = bounded(CHUNKED + b"0\r\n" + many if trailers else b"GET / HTTP/1.1\r\n" + many)
    assert (said.status, said.sentence) == (431, "the request has more than 10 headers")


def test_as_many_headers_as_the_limit_says_are_read() -> None:
    assert bounded(head(b"GET / HTTP/1.1", HOST, *[b"X: y"] * 9)).status == 0


def test_body_over_the_limit_is_refused_before_it_comes() -> None:
    said = bounded(head(*PLAIN, b"Content-Length: 1001"))
    assert (said.status, said.reader.phase) == (413, BROKEN)
    assert bounded(head(*PLAIN, b"Content-Length: 1000")).status == 0


def test_chunks_over_the_limit_are_refused_when_they_are_too_many() -> None:
    said = bounded(CHUNKED + b"1f4\r\n" + b"x" * 500 + b"\r\n1f4\r\n" + b"x" * 500 + b"\r\n")
    assert (said.status, said.budget.used) == (0, 1000)
    said.hear(b"1\r\nx\r\n")
    assert (said.status, said.budget.used) == (413, 0)
    assert "over the limit of 1000 bytes" in said.sentence


@pytest.mark.parametrize(
    ("head", "part"),
    [(CHUNKED, b"2\r\nab\r\n"), (b"POST /v2 HTTP/1.1\r\nHost: a\r\nContent-Length: 40000\r\n\r\n", b"ab")],
)
def test_small_parts_take_no_more_memory_than_they_are_charged(head: bytes, part: bytes) -> None:
    said = Conversation()
    tracemalloc.start()
    try:
        said.hear(head)
        for _ in range(20_000 - 1):
            said.hear(part)
        if head is CHUNKED:
            said.hear(part)
        taken = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert said.budget.used == 40_000
    assert taken < 2 * 40_000


# --- the budget ---


def test_body_beyond_the_budget_is_refused() -> None:
    said = Conversation(budget=Budget(8)).hear(POST)
    assert said.budget.used == 5
    said.hear(POST)
    assert (said.status, said.sentence) == (503, "5 bytes of request bodies are under way; try again shortly")
    assert said.budget.used == 5, "the first is still under way"


def test_known_head_beyond_the_budget_is_refused() -> None:
    said = Conversation(budget=Budget(8)).hear(POST)
    said.budget.give_back(5)
    assert said.hear(POST, POST).status == 503
    assert (len(said.found), said.budget.used) == (2, 5)


def test_chunks_beyond_the_budget_are_refused() -> None:
    said = Conversation(budget=Budget(8)).hear(CHUNKED + b"5\r\nhello\r\n")
    assert (said.status, said.budget.used) == (0, 5)
    assert said.hear(b"4\r\nmore\r\n").status == 503
    assert said.budget.used == 0


def test_requests_without_a_body_take_nothing() -> None:
    said = Conversation(budget=Budget(0)).hear(GET, GET, CHUNKED + b"0\r\n\r\n")
    assert (len(said.found), said.status) == (3, 0)


@pytest.mark.parametrize(
    "raw",
    [
        head(*PLAIN, b"Content-Length: 5"),
        POST[:-1],
        head(*PLAIN, b"Content-Length: 100000") + b"x" * 70_000,
        CHUNKED + b"5\r\nhel",
    ],
)
def test_end_in_the_middle_of_a_body_gives_the_budget_back(raw: bytes) -> None:
    said = hear(raw)
    assert said.budget.used > 0
    said.reader.close()
    said.reader.close()
    assert said.budget.used == 0


# --- anything at all ---


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    """Valid requests with some bytes replaced, removed or put in."""
    raw = bytearray(b"".join(draw(st.lists(VALID.filter(lambda each: len(each) < 1000), min_size=1, max_size=3))))
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(raw)))
        raw[at : at + draw(st.integers(0, 4))] = draw(
            st.binary(max_size=4) | st.sampled_from([b"\r\n", b"\n", b"\r", b"0", b":", b" ", b"\xff"])
        )
    return bytes(raw)


@settings(max_examples=400, deadline=None)
@given(st.binary(max_size=300) | damaged(), st.lists(st.integers(0, 1 << 20), max_size=4))
def test_any_bytes_are_requests_or_an_error_and_never_take_more_than_they_are(raw: bytes, places: list[int]) -> None:
    said = Conversation(SMALL, Budget(4000)).hear(*cut(raw, places))
    assert said.status in (0, 400, 413, 417, 431, 501, 503, 505)
    said.reader.close()
    assert said.budget.used == sum(said.charged) <= 4000
    assert all(charged == len(body) for charged, body in zip(said.charged, said.bodies, strict=True))


# --- shared memory ---


LARGE = 200_000


def large(lead: int = 64, length: int = LARGE, *more: bytes) -> bytes:
    """The head of a request whose tensors begin after ``lead`` bytes of its body."""
    about = b"Inference-Header-Content-Length: %d" % lead
    return head(b"POST / HTTP/1.1", b"Host: here", b"Content-Length: %d" % length, about, *more)


@pytest.mark.parametrize("lead", [1, 64, 100, LARGE])
@pytest.mark.parametrize("first", [0, 1, 70_000])
def test_large_body_is_received_where_its_tensors_are_read(slots: Slots, lead: int, first: int) -> None:
    body = bytes(range(250)) * (LARGE // 250)
    said = Conversation(slots=slots).hear(large(lead) + body[:first], body[first:])
    [request] = said.requests
    assert request.slot is not None
    assert (request.slot.place + lead) % 64 == 0
    assert bytes(request.slot.view) == bytes(request.body) == body
    said.budget.release(request)
    said.budget.release(request)  # does nothing the second time
    assert (bytes(request.body), said.budget.used) == (b"", 0)


def test_white_space_behind_the_lead_is_no_part_of_it(slots: Slots) -> None:
    said = Conversation(slots=slots).hear(large(100).replace(b": 100\r", b": 100 \t\r"), b"x" * LARGE)
    [request] = said.requests
    assert request.slot is not None
    said.budget.release(request)


@pytest.mark.parametrize(
    "about",
    [
        b"X: y",
        b"Inference-Header-Content-Length: x",
        b"Inference-Header-Content-Length: -1",
        b"Inference-Header-Content-Length: 0",
        b"Inference-Header-Content-Length: " + b"9" * 13,
        b"Inference-Header-Content-Length: ",
        b"Inference-Header-Content-Length: 64\r\nContent-Encoding: gzip",
        b"Inference-Header-Content-Length: 64\r\nContent-Encoding: br",
    ],
)
def test_body_that_does_not_hold_its_tensors_as_they_are_is_received_elsewhere(slots: Slots, about: bytes) -> None:
    request = head(b"POST / HTTP/1.1", b"Host: here", b"Content-Length: %d" % LARGE, about)
    said = Conversation(slots=slots).hear(request, b"x" * LARGE)
    assert [request.slot for request in said.requests] == [None]
    assert said.bodies == [b"x" * LARGE]


def test_identity_is_no_encoding(slots: Slots) -> None:
    said = Conversation(slots=slots).hear(large(64, LARGE, b"Content-Encoding: Identity"), b"x" * LARGE)
    [request] = said.requests
    assert request.slot is not None
    said.budget.release(request)


def test_while_workers_read_nothing_here_a_body_is_received_elsewhere() -> None:
    said = Conversation(slots=None).hear(large(), b"x" * LARGE)
    assert [request.slot for request in said.requests] == [None]


@pytest.mark.parametrize("first", [0, 1, 70_000])
def test_without_room_nothing_more_is_read_until_there_is(slots: Slots, first: int) -> None:
    whole = slots.take(slots.arena.size)
    assert whole is not None
    said = Conversation(slots=slots).hear(large(100) + b"a" * first)
    reader = said.reader
    assert (reader.phase, reader.direct, reader.wanted) == (FULL, None, (LARGE, 100))
    whole.give_back()
    slot = slots.take(*reader.wanted)
    assert slot is not None
    reader.place(slot)
    assert reader.phase == BODY
    said.hear(b"b" * (LARGE - first) + GET)
    assert said.bodies == [b"a" * first + b"b" * (LARGE - first), b""]
    request = said.requests[0]
    assert request.slot is slot
    said.budget.release(request)


def test_body_without_room_that_is_given_up_takes_nothing(slots: Slots) -> None:
    whole = slots.take(slots.arena.size)
    assert whole is not None
    said = Conversation(slots=slots).hear(large())
    assert (said.reader.phase, said.budget.used) == (FULL, LARGE)
    said.reader.close()
    assert (said.reader.phase, said.budget.used) == (BROKEN, 0)
    whole.give_back()


@pytest.mark.parametrize("lead", [1, 64, 100])
def test_body_that_fits_no_arena_is_refused_before_it_comes(slots: Slots, lead: int) -> None:
    size = slots.arena.size
    fits = size - -lead % 64
    said = Conversation(slots=slots).hear(large(lead, fits))
    assert (said.status, said.reader.phase) == (0, BODY)
    said.reader.close()
    said = Conversation(slots=slots).hear(large(lead, fits + 1, b"Expect: 100-continue"))
    assert (said.status, said.reader.wants_continue) == (413, False)
    assert said.sentence == (
        f"the request takes {size + 1} bytes of shared memory, and this gateway has {size}; send fewer rows at a time, "
        "or raise arena_bytes ([gateway] in the configuration)"
    )
    assert said.budget.used == 0


def test_body_that_does_not_go_there_may_be_larger_than_the_arena(slots: Slots) -> None:
    length = slots.arena.size * 2
    assert Conversation(slots=slots).hear(large(64, length, b"Content-Encoding: gzip")).status == 0
    assert Conversation(slots=None).hear(large(64, length)).status == 0


def test_slot_of_a_connection_that_ends_is_given_back(slots: Slots) -> None:
    said = Conversation(slots=slots).hear(large(), b"x" * (LARGE - 1))
    assert slots.arena.allocator.used
    said.reader.close()


def test_each_request_of_a_connection_has_its_own_slot(slots: Slots) -> None:
    said = Conversation(slots=slots).hear(large(), b"a" * LARGE + large(), b"b" * LARGE)
    assert [bytes(request.body[:1]) for request in said.requests] == [b"a", b"b"]
    for request in said.requests:
        said.budget.release(request)


# --- bodies that come with their heads


def small(lead: int, length: int) -> bytes:
    about = b"Content-Length: %d" % length, b"Inference-Header-Content-Length: %d" % lead
    return head(b"POST /v2/models/m/infer HTTP/1.1", b"Host: here", *about)


@pytest.mark.parametrize("lead", [1, 100, 150])
def test_tensors_that_come_with_a_known_head_go_where_workers_read(slots: Slots, lead: int) -> None:
    length = lead + 4096
    said = Conversation(slots=slots).hear(small(lead, length) + b"a" * length)
    for letter in b"bc":
        said.hear(small(lead, length) + bytes([letter]) * length)
    assert said.bodies == [bytes([letter]) * length for letter in b"abc"]
    slotted = [request.slot for request in said.requests]
    assert slotted[0] is None, "it is known once it has been read"
    for request in said.requests[1:]:
        assert request.slot is not None
        assert (request.slot.place + lead) % 64 == 0, "the first tensor is aligned"
        assert request.charged == length
    for request in said.requests:
        said.budget.release(request)


@pytest.mark.parametrize(("lead", "length", "placed"), [(100, 2147, False), (100, 2148, True), (4096, 4096, False)])
def test_what_is_not_worth_a_slot_has_none(slots: Slots, lead: int, length: int, placed: bool) -> None:
    said = Conversation(slots=slots)
    for _ in range(2):
        said.hear(small(lead, length) + b"a" * length)
    assert said.bodies == [b"a" * length] * 2
    assert (said.requests[1].slot is not None) == placed
    for request in said.requests:
        said.budget.release(request)


def test_while_there_is_no_room_a_body_that_has_come_is_kept(slots: Slots) -> None:
    said = Conversation(slots=slots).hear(small(100, 4196) + b"a" * 4196)
    whole = slots.take(slots.arena.size)
    assert whole is not None
    said.hear(small(100, 4196) + b"b" * 4196)
    whole.give_back()
    said.hear(small(100, 4196) + b"c" * 4196)
    assert [request.slot is not None for request in said.requests] == [False, False, True]
    assert said.bodies == [b"a" * 4196, b"b" * 4196, b"c" * 4196]
    for request in said.requests:
        said.budget.release(request)


# --- bodies that begin with what is known


def test_of_a_body_that_begins_with_what_is_known_only_the_rest_is_given() -> None:
    raw = head(*PLAIN, b"Content-Length: 8")
    said = hear(raw + b"same one")
    known = said.found[0].known = Known(b"same ", "what it means")
    said.hear(raw + b"same two", raw + b"else six", raw + b"same ten")
    assert said.bodies == [b"same one", b"two", b"else six", b"ten"]
    assert [request.known for request in said.requests] == [None, known, None, known]
    assert said.charged == [8] * 4


def test_what_is_known_is_shared_by_connections_and_looked_up_behind_another_head() -> None:
    heads: dict[bytes, Head] = {}
    first, raw = Conversation(heads=heads), head(*PLAIN, b"Content-Length: 8")
    first.hear(raw + b"same one", GET)
    first.found[0].known = Known(b"same ", "what it means")
    for _ in range(2):
        first.hear(raw + b"same two", GET)
    assert first.bodies == [b"same one", b"", b"two", b"", b"two", b""]
    assert Conversation(heads=heads).hear(raw + b"same two").bodies == [b"two"]


def test_what_lies_in_the_buffer_behind_a_read_is_no_part_of_it() -> None:
    """The buffer of all connections still holds what came before."""
    raw = head(*PLAIN, b"Content-Length: 8")
    said = hear(raw + b"same one")
    said.found[0].known = Known(b"same ", "what it means")
    buffer = bytearray(raw + b"same two" + bytes(100))
    reader = said.reader
    for size in len(raw) + 8, len(raw) + 3, 5:
        reader.feed(memoryview(buffer), size)
        buffer[:5] = raw[:5] if size == len(raw) + 8 else b"e two"
    assert [bytes(request.body) for request in reader.requests] == [b"two", b"same two"]
    assert reader.phase is IDLE


def test_what_comes_at_once_is_what_one_read_may_bring() -> None:
    few, chunked, large = hear(POST, POST), hear(CHUNKED + b"0\r\n\r\n"), hear(LARGE_HEAD, b"a" * 100_000)
    assert [each.comes_at_once for each in few.found] == [True, True]
    assert [each.comes_at_once for each in chunked.found] == [False], "its head is not remembered"
    assert [(each.key, each.comes_at_once) for each in large.found] == [(LARGE_HEAD, False)]


@pytest.mark.parametrize("lead", [1, 100, 150])
def test_what_is_known_takes_no_room_where_workers_read(slots: Slots, lead: int) -> None:
    length = lead + 4096
    said = Conversation(slots=slots).hear(small(lead, length) + b"a" * length)
    said.found[0].known = Known(b"j" * lead, "what it means")
    for letter in b"bc":
        said.hear(small(lead, length) + b"j" * lead + bytes([letter]) * 4096)
    assert said.bodies[1:] == [b"b" * 4096, b"c" * 4096]
    for request in said.requests[1:]:
        assert request.slot is not None
        assert (request.slot.place % 64, len(request.slot), request.charged) == (0, 4096, length)
    assert slots.arena.allocator.used == 2 * 4096
    for request in said.requests:
        said.budget.release(request)
    assert (slots.arena.allocator.slots, said.budget.used) == (0, 0)


def test_while_there_is_no_room_all_of_a_body_is_kept(slots: Slots) -> None:
    said = Conversation(slots=slots).hear(small(100, 4196) + b"a" * 4196)
    said.found[0].known = Known(b"j" * 100, "what it means")
    whole = slots.take(slots.arena.size)
    assert whole is not None
    said.hear(small(100, 4196) + b"j" * 100 + b"b" * 4096)
    whole.give_back()
    assert said.bodies[1] == b"j" * 100 + b"b" * 4096
    assert (said.requests[1].slot, said.requests[1].known) == (None, None)
    for request in said.requests:
        said.budget.release(request)


@pytest.mark.parametrize("length", [120, 4196])
def test_what_is_known_no_more_is_put_before_the_rest_again(slots: Slots, length: int) -> None:
    said = Conversation(slots=slots).hear(small(100, length) + b"a" * length)
    said.found[0].known = Known(b"j" * 100, "what it means")
    body = b"j" * 100 + b"b" * (length - 100)
    said.hear(small(100, length) + body)
    request = said.requests[1]
    assert request.known is not None
    for _ in range(2):
        request.restore()
        assert (request.slot, bytes(request.body)) == (None, body)
    assert said.requests[1].known is None
    assert slots.arena.allocator.slots == 0
    for each in said.requests:
        said.budget.release(each)


@FAST
@given(st.lists(st.tuples(st.sampled_from([b"same ", b"some ", b"s"]), st.binary(min_size=3, max_size=3)), max_size=8))
def test_with_or_without_what_is_known_all_bodies_are_the_same(bodies: list[tuple[bytes, bytes]]) -> None:
    raws = [head(*PLAIN, b"Content-Length: %d" % len(start + rest)) + start + rest for start, rest in bodies]
    said = Conversation()
    for raw in raws:
        said.hear(raw)
        said.found[-1].known = Known(b"same ", "what it means")
    whole = [b"" if request.known is None else request.known.start for request in said.requests]
    assert [a + b for a, b in zip(whole, said.bodies, strict=True)] == [start + rest for start, rest in bodies]
