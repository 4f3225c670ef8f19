"""Checks for the fields of a message: each takes an unpacked value and returns it, or raises BadMessage.

msgpack gives tuples, int, float, str, bytes, bool, None and dict; a check says which of them a field may be, and how
large. They are for the messages that are rare; those that carry requests check them in loops of their own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, TypeAlias

from penstock.wire.errors import BadMessage

Check: TypeAlias = Callable[[Any], Any]

U64_MAX: Final = (1 << 64) - 1


def integer(low: int, high: int) -> Check:
    def check(value: Any) -> int:
        if type(value) is not int or not low <= value <= high:
            raise BadMessage(f"{brief(value)} is not a whole number from {low} to {high}")
        return value

    return check


def text(longest: int, shortest: int = 0) -> Check:
    """A str of so many characters."""
    size = f"{shortest} to {longest}" if shortest else f"at most {longest}"

    def check(value: Any) -> str:
        if type(value) is not str or not shortest <= len(value) <= longest:
            raise BadMessage(f"{brief(value)} is not a text of {size} characters")
        return value

    return check


def binary(longest: int, shortest: int = 0) -> Check:
    def check(value: Any) -> bytes:
        if type(value) is not bytes or not shortest <= len(value) <= longest:
            raise BadMessage(f"{brief(value)} is not binary data of {shortest} to {longest} bytes")
        return value

    return check


def flag(value: Any) -> bool:
    if type(value) is not bool:
        raise BadMessage(f"{brief(value)} is not true or false")
    return value


def number(value: Any) -> float:
    """A finite number."""
    if type(value) not in (int, float) or not abs(value) < float("inf"):
        raise BadMessage(f"{brief(value)} is not a finite number")
    return float(value)


def one_of(allowed: frozenset[str]) -> Check:
    def check(value: Any) -> str:
        if type(value) is not str or value not in allowed:
            raise BadMessage(f"{brief(value)} is not one of {sorted(allowed)}")
        return value

    return check


def optional(inner: Check) -> Check:
    def check(value: Any) -> Any:
        return None if value is None else inner(value)

    return check


def sequence(inner: Check, longest: int) -> Check:
    def check(value: Any) -> tuple[Any, ...]:
        if type(value) is not tuple or len(value) > longest:
            raise BadMessage(f"{brief(value)} is not a sequence of at most {longest}")
        return tuple(map(inner, value)) if value else value

    return check


def record(make: Callable[..., Any], *inner: Check) -> Check:
    """A sequence with one check for each place, made into a tuple class by ``make``."""

    def check(value: Any) -> Any:
        if type(value) is not tuple or len(value) != len(inner):
            raise BadMessage(f"{brief(value)} is not a sequence of {len(inner)} fields")
        return make(*[check_field(field) for check_field, field in zip(inner, value, strict=True)])

    return check


def pair(first: Check, second: Check) -> Check:
    return record(lambda one, two: (one, two), first, second)


def brief(value: Any) -> str:
    """A value as an error shows it; what is nested is not shown, since it may be as deep and long as its sender
    likes."""
    if isinstance(value, (tuple, dict)):
        return type(value).__name__
    return repr(value[:40] if isinstance(value, (str, bytes)) else value)
