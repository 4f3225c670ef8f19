"""What a URL and its headers ask of jobs."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.gateway.jobquery import prefers_async, read_ids, read_listing, read_wait, split_callback
from penstock.wire.errors import BAD_INPUT, PenstockError


@pytest.mark.parametrize(
    "value",
    [
        b"respond-async",
        b"Respond-Async",
        b" respond-async ;a=b",
        b"wait=10, respond-async",
        b'respond-async=""',
        b"handling=lenient,respond-async,wait=1",
        b'a="b, c;d \\"", respond-async',
        b'respond-async; a="b, c"',
    ],
)
def test_who_prefers_it(value: bytes) -> None:
    assert prefers_async(value)


@pytest.mark.parametrize(
    "value",
    [
        None,
        b"",
        b"respond",
        b"respond-asynchronously",
        b"wait=respond-async",
        b"return=minimal",
        b'a="b, respond-async, c"',
        b'a="b\\", respond-async, c"',
        b'a="b, respond-async, c',
        b'"respond-async"',
    ],
)
def test_who_does_not(value: bytes | None) -> None:
    assert not prefers_async(value)


@pytest.mark.parametrize(
    ("url", "without", "callback"),
    [
        (b"/a", b"/a", ""),
        (b"/a?", b"/a?", ""),
        (b"/a?b=c&d", b"/a?b=c&d", ""),
        (b"/a?callback_url=http://x/", b"/a", "http://x/"),
        (b"/a?b=c&callback_url=http%3A%2F%2Fx%2F%3Fy%3Dz%26w&d=e", b"/a?b=c&d=e", "http://x/?y=z&w"),
        (b"/a?callback%5Furl=http://x/%20+", b"/a", "http://x/  "),
        (b"/callback_url=x", b"/callback_url=x", ""),
    ],
)
def test_the_callback_is_taken_out_of_the_url(url: bytes, without: bytes, callback: str) -> None:
    assert split_callback(url) == (without, callback)


@pytest.mark.parametrize(
    ("query", "said"),
    [
        (b"callback_url=", "callback_url is empty"),
        (b"callback_url", "callback_url is empty"),
        (b"callback_url=a&callback_url=b", "callback_url is given more than once"),
        (b"callback_url=%FF", "the URL's query is not UTF-8 once its percent signs are decoded"),
    ],
)
def test_a_callback_that_cannot_be(query: bytes, said: str) -> None:
    with pytest.raises(PenstockError) as raised:
        split_callback(b"/a?" + query)
    assert (raised.value.code, raised.value.message) == (BAD_INPUT, said)


@pytest.mark.parametrize(
    ("query", "seconds"), [(b"", 0), (b"wait=0", 0), (b"wait=2.5", 2.5), (b"wait=60", 60), (b"x=1&wait=.5", 0.5)]
)
def test_how_long_to_wait(query: bytes, seconds: float) -> None:
    assert read_wait(b"/a?" + query) == seconds


@pytest.mark.parametrize("text", ["61", "-1", "nan", "inf", "1e1", "1_0", "%20", "\u0661", "9" * 400])
def test_a_wait_that_is_none(text: str) -> None:
    with pytest.raises(PenstockError, match=r"'wait' is .*from 0 to 60"):
        read_wait(b"/a?wait=" + text.encode())


def test_a_list() -> None:
    assert read_listing(b"/v2/jobs") == ("", 100, "")
    assert read_listing(b"/v2/jobs?status=failed&limit=7&after=abc") == ("failed", 7, "abc")


@pytest.mark.parametrize(
    ("query", "named"),
    [
        ("status=expired", "status"),
        ("limit=0", "limit"),
        ("limit=x", "limit"),
        ("limit=1001", "limit"),
        ("after=%2F", "id"),
    ],
)
def test_a_list_that_cannot_be(query: str, named: str) -> None:
    with pytest.raises(PenstockError, match=f"^'{named}' is ") as raised:
        read_listing(b"/v2/jobs?" + query.encode())
    assert raised.value.code == BAD_INPUT


def test_ids_are_asked_for_once_each() -> None:
    assert read_ids(b"/v2/jobs?id=a&id=b&id=a&x=c") == ["a", "b"]
    with pytest.raises(PenstockError, match="there are 257 ids; ask for at most 256"):
        read_ids(b"/v2/jobs?" + b"&".join(b"id=%d" % number for number in range(257)))


@given(st.binary(max_size=200))
def test_whatever_comes_is_read_or_refused(query: bytes) -> None:
    for read in (split_callback, read_wait, read_listing, read_ids):
        with contextlib.suppress(PenstockError):
            read(b"/a?" + query)
