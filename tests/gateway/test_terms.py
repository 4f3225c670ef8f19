"""Headers that ask something of the scheduler."""

from __future__ import annotations

import pytest

from penstock.gateway.terms import Terms, read_terms
from penstock.wire.errors import BAD_INPUT, PenstockError


@pytest.mark.parametrize(
    ("headers", "terms"),
    [
        ({}, Terms(0.0, 0, "", False)),
        ({"host": b"a"}, Terms(0.0, 0, "", False)),
        ({"penstock-timeout": b"0.1"}, Terms(timeout_s=0.1)),
        ({"penstock-timeout": b" 5 "}, Terms(timeout_s=5)),
        ({"penstock-timeout": b".25"}, Terms(timeout_s=0.25)),
        ({"penstock-timeout": b"86400.0"}, Terms(timeout_s=86_400)),
        ({"penstock-timeout": b"0.000001"}, Terms(timeout_s=1e-6)),
        ({"penstock-priority": b"1"}, Terms(priority=1)),
        ({"penstock-priority": b"0"}, Terms(priority=0)),
        ({"penstock-tenant": b"team blue"}, Terms(tenant="team blue")),
        ({"penstock-tenant": b""}, Terms()),
        ({"penstock-explain": b"1"}, Terms(explain=True)),
        ({"penstock-explain": b"0"}, Terms()),
        ({"penstock-sticky": b"user 7"}, Terms(sticky="user 7")),
        ({"penstock-sticky": b"x" * 256}, Terms(sticky="x" * 256)),
        ({"penstock-sticky": b""}, Terms()),
        ({"penstock-sticky": "Zoë".encode()}, Terms(sticky="Zoë")),
        ({"penstock-sticky": "Zoë".encode("latin-1")}, Terms(sticky="Zoë")),
        (
            {"penstock-tenant": b"a", "penstock-priority": b"5", "penstock-timeout": b"1", "penstock-explain": b"1"},
            Terms(1, 5, "a", True),
        ),
    ],
)
def test_what_headers_ask_for(headers: dict[str, bytes], terms: Terms) -> None:
    assert read_terms(headers) == terms


@pytest.mark.parametrize(
    "value",
    [b"", b"0", b"0.0", b"-1", b"+1", b"86400.1", b"1e3", b"nan", b"inf", b"1_0", b"0x1", b"1,5", b"1s", b".", b"\xb2",
     b"1, 1", b"9" * 10_000, b"1." + b"0" * 100],
)  # fmt: skip
def test_a_timeout_that_is_none_is_named_with_what_is_allowed(value: bytes) -> None:
    with pytest.raises(PenstockError) as raised:
        read_terms({"penstock-timeout": value})
    assert raised.value.code == BAD_INPUT
    assert raised.value.message.startswith("the header Penstock-Timeout is '")
    assert raised.value.message.endswith("a decimal number such as 0.1, more than 0 and at most 86400")
    assert len(raised.value.message) < 200


@pytest.mark.parametrize(
    ("header", "value", "sentence"),
    [
        ("priority", b"6", "the header Penstock-Priority: a priority is a whole number from 1, the most urgent, to 5"),
        ("priority", b"-1", "not '-1'"),
        ("priority", b"1.0", "not '1.0'"),
        ("priority", b"high", "not 'high'"),
        ("priority", b"", "not ''"),
        ("priority", b"\xb2", "not "),
        ("priority", b"1" * 5000, "(5002 characters)"),
        (
            "sticky",
            b"x" * 257,
            "the header Penstock-Sticky: what a request sticks to a version by is a text of at most",
        ),
        ("tenant", b"x" * 65, "the header Penstock-Tenant: a tenant is at most 64 printable ASCII characters"),
        ("tenant", "é".encode(), "printable ASCII"),
        ("tenant", b"a\x01b", "printable ASCII"),
        ("explain", b"yes", "the header Penstock-Explain is 1 or 0, not 'yes'"),
        ("explain", b"", "the header Penstock-Explain is 1 or 0, not ''"),
    ],
)
def test_what_is_none_is_named_with_what_is_allowed(header: str, value: bytes, sentence: str) -> None:
    with pytest.raises(PenstockError) as raised:
        read_terms({f"penstock-{header}": value})
    assert raised.value.code == BAD_INPUT
    assert sentence in raised.value.message
    assert len(raised.value.message) < 250
