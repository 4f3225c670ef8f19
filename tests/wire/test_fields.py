"""Checks let through what they say, and say in the error what came."""

from __future__ import annotations

from typing import Any

import pytest

from penstock.wire.errors import BadMessage
from penstock.wire.fields import Check, binary, flag, integer, number, one_of, optional, pair, record, sequence, text

CASES: list[tuple[Check, list[Any], list[Any]]] = [
    (integer(1, 9), [1, 9], [0, 10, True, 5.0, "5", None, (5,)]),
    (text(3), ["", "abc", "äöü"], ["abcd", b"abc", None, 1]),
    (binary(3, 2), [b"ab", b"abc"], [b"a", b"abcd", "ab", None, bytearray(b"ab")]),
    (flag, [True, False], [1, 0, None, "true"]),
    (number, [0, -1.5, 1 << 63, -0.0], [float("nan"), float("inf"), -float("inf"), True, "1", None]),
    (one_of(frozenset({"a", "b"})), ["a"], ["c", "", 1, None, b"a", ("a",)]),
    (optional(flag), [None, True], [1, ()]),
    (sequence(flag, 2), [(), (True,), (True, False)], [(True,) * 3, (1,), [True], None, "ab"]),
    (pair(flag, text(1)), [(True, "a")], [(True,), (True, "a", "b"), ("a", True), None, {}]),
    (record(complex, number, number), [], [(1,), (1, "2"), (1, 2, 3)]),
]


@pytest.mark.parametrize(("check", "good", "bad"), CASES)
def test_a_check_lets_through_what_it_says_and_nothing_else(check: Check, good: list[Any], bad: list[Any]) -> None:
    for value in good:
        found = check(value)
        assert found == value
    for value in bad:
        with pytest.raises(BadMessage):
            check(value)


def test_a_number_becomes_a_float() -> None:
    assert type(number(3)) is float


def test_a_record_makes_its_class() -> None:
    assert record(complex, number, number)((1, 2)) == 1 + 2j


@pytest.mark.parametrize(
    ("check", "value", "sentence"),
    [
        (integer(1, 9), 10, "10 is not a whole number from 1 to 9"),
        (text(3), "a" * 100, f"'{'a' * 40}' is not a text of at most 3 characters"),
        (binary(3), b"a" * 100, f"b'{'a' * 40}' is not binary data of 0 to 3 bytes"),
        (one_of(frozenset({"b", "a"})), {1: 2}, "dict is not one of ['a', 'b']"),
        (sequence(flag, 2), (1,) * 10_000, "tuple is not a sequence of at most 2"),
        (pair(flag, flag), 1.5, "1.5 is not a sequence of 2 fields"),
    ],
)
def test_an_error_shows_what_came_but_not_all_of_it(check: Check, value: Any, sentence: str) -> None:
    with pytest.raises(BadMessage) as caught:
        check(value)
    assert str(caught.value) == sentence
