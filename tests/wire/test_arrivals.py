"""Arenas and the messages that announce them, in whatever order both come."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from penstock.wire.arrivals import Arrivals

A, B = b"owner a", b"owner b"


def test_whichever_comes_second_gives_the_arena() -> None:
    arrivals: Arrivals[str] = Arrivals()
    assert arrivals.came(A, "a") is None
    assert arrivals.announced(B) is None
    assert arrivals.announced(A) == "a"
    assert arrivals.came(B, "b") == "b"


def test_what_was_announced_again_is_waited_for() -> None:
    arrivals: Arrivals[str] = Arrivals()
    assert arrivals.announced(A) is None
    assert arrivals.announced(A) is None
    assert arrivals.came(A, "first") is None
    assert arrivals.came(A, "second") == "second"
    assert arrivals.came(A, "third") is None


def test_a_new_broker_announces_anew() -> None:
    arrivals: Arrivals[str] = Arrivals()
    arrivals.came(A, "old")
    arrivals.announced(B)
    arrivals.clear()
    assert arrivals.announced(A) is None
    assert arrivals.came(B, "b") is None


@given(st.lists(st.tuples(st.sampled_from([A, B]), st.booleans())))
def test_nothing_is_left_once_all_has_come(order: list[tuple[bytes, bool]]) -> None:
    """Whatever the order, as many come as are announced, and then nothing is held."""
    arrivals: Arrivals[int] = Arrivals()
    balance = {A: 0, B: 0}
    last: dict[bytes, int | None] = {A: None, B: None}
    for number, (owner, comes) in enumerate(order):
        last[owner] = arrivals.came(owner, number) if comes else arrivals.announced(owner)
        balance[owner] += 1 if comes else -1
    for owner, surplus in balance.items():
        for number in range(abs(surplus)):
            last[owner] = arrivals.announced(owner) if surplus > 0 else arrivals.came(owner, 1000 + number)
        assert last[owner] is not None or not any(each == owner for each, _ in order)
    assert not arrivals._came
    assert not arrivals._due
