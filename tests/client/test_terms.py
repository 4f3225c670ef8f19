"""What a request may ask of the scheduler, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from penstock.client.terms import check_sequence, check_sticky, check_terms, check_timeout
from penstock.wire.errors import BAD_INPUT, PenstockError


@pytest.mark.parametrize("timeout", [1e-6, 0.1, 1, 86_400])
def test_a_timeout_that_can_be(timeout: float) -> None:
    assert check_timeout(timeout) == timeout


@pytest.mark.parametrize("timeout", [0, -1, 86_400.1, float("nan"), float("inf"), -0.0])
def test_a_timeout_that_cannot_be(timeout: float) -> None:
    with pytest.raises(PenstockError, match=r"more than 0 and at most 86400 seconds, not ") as raised:
        check_timeout(timeout)
    assert raised.value.code == BAD_INPUT


@pytest.mark.parametrize(("priority", "tenant"), [(0, ""), (1, "a"), (5, "team blue/7 ~!"), (3, "x" * 64)])
def test_terms_that_can_be(priority: int, tenant: str) -> None:
    check_terms(priority, tenant)


@pytest.mark.parametrize("priority", [-1, 6, 1.0, True, "1", None, [1], 1 << 70])
def test_a_priority_that_cannot_be(priority: Any) -> None:
    with pytest.raises(PenstockError, match=r"from 1, the most urgent, to 5, or 0 for the usual one, which is 3; not "):
        check_terms(priority, "")


@pytest.mark.parametrize("tenant", ["x" * 65, "é", "a\nb", "\x7f", "a\tb", b"a", None, 7, ["a"], "y" * 100_000])
def test_a_tenant_that_cannot_be(tenant: Any) -> None:
    with pytest.raises(PenstockError, match="at most 64 printable ASCII characters, not ") as raised:
        check_terms(0, tenant)
    assert len(raised.value.message) < 200


@pytest.mark.parametrize("sticky", ["", "user 7", "é", "x" * 256])
def test_what_sticks(sticky: str) -> None:
    assert check_sticky(sticky) == sticky


@pytest.mark.parametrize("sticky", ["x" * 257, b"a", None, 7, "y" * 100_000])
def test_what_does_not(sticky: Any) -> None:
    with pytest.raises(PenstockError, match="a text of at most 256 characters, such as a user's id, not ") as raised:
        check_sticky(sticky)
    assert len(raised.value.message) < 200


@pytest.mark.parametrize(
    ("sequence", "start", "end", "told"),
    [
        (0, True, True, ("", 0)),
        ("", False, False, ("", 0)),
        (7, False, False, ("7", 0)),
        (2**64 - 1, True, False, (str(2**64 - 1), 1)),
        ("user é", False, True, ("user é", 2)),
        ("x" * 128, True, True, ("x" * 128, 3)),
    ],
)
def test_sequences_that_can_be(sequence: object, start: bool, end: bool, told: tuple[str, int]) -> None:
    assert check_sequence(sequence, start, end) == told


@pytest.mark.parametrize("sequence", [-1, 2**64, 1.0, True, None, ["a"], "x" * 129, b"a"])
def test_what_is_no_sequence(sequence: object) -> None:
    with pytest.raises(PenstockError, match="'sequence_id' is a whole number of 64 bits or a text of at most 128"):
        check_sequence(sequence, False, False)


@pytest.mark.parametrize("flag", [1, 0, "true", None])
def test_what_neither_begins_nor_ends_one(flag: object) -> None:
    with pytest.raises(PenstockError, match="'sequence_start' is true or false"):
        check_sequence("a", flag, False)
    with pytest.raises(PenstockError, match="'sequence_end' is true or false"):
        check_sequence("a", False, flag)
