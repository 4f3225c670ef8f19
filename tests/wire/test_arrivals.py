"""Arenas and the messages that announce them, in whatever order both come."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from penstock.wire.arrivals import Arrivals

A, B = b"owner a", b"owner b"


def test_whichever_comes_second_gives_the_arena() -> None:
    arrivals: Arrivals[str] = Arrivals()
    assert arrivals.came(A, 1, "a") is None
    assert arrivals.announced(B, 2) is None
    assert arrivals.announced(A, 1) == "a"
    assert arrivals.came(B, 2, "b") == "b"


def test_only_the_newest_is_waited_for_and_held() -> None:
    arrivals: Arrivals[str] = Arrivals()
    arrivals.announced(A, 1)
    arrivals.announced(A, 2)
    assert arrivals.came(A, 1, "first") is None
    assert arrivals.came(A, 2, "second") == "second"
    arrivals.came(A, 3, "third")
    arrivals.came(A, 4, "fourth")
    assert arrivals.announced(A, 3) == "fourth"
    assert arrivals.announced(A, 4) == "fourth"
    assert not arrivals._came


def test_an_introduction_whose_message_was_lost_is_superseded() -> None:
    arrivals: Arrivals[str] = Arrivals()
    arrivals.came(A, 1, "first")
    assert arrivals.announced(A, 2) is None
    assert arrivals.came(A, 2, "second") == "second"


def test_an_arena_that_is_not_numbered_is_one_that_nobody_has_announced() -> None:
    arrivals: Arrivals[str] = Arrivals()
    assert arrivals.came(A, 0, "a") is None
    assert arrivals.announced(A, 1) is None
    assert not arrivals._came


def test_who_has_gone_is_forgotten_but_not_who_has_come_again() -> None:
    arrivals: Arrivals[str] = Arrivals()
    arrivals.came(A, 1, "a")
    arrivals.announced(B, 2)
    arrivals.forget(A, 1)
    arrivals.forget(B, 2)
    assert arrivals.announced(A, 1) is None
    assert arrivals.came(B, 2, "b") is None
    arrivals.came(A, 3, "again")
    arrivals.forget_all(2)
    assert arrivals.announced(A, 3) == "again"
    assert not arrivals._came


def test_nothing_outlives_the_connection() -> None:
    arrivals: Arrivals[str] = Arrivals()
    arrivals.came(A, 1, "old")
    arrivals.announced(B, 2)
    arrivals.clear()
    assert arrivals.announced(A, 1) is None
    assert arrivals.came(B, 2, "b") is None


@given(st.data())
def test_the_last_introduction_is_always_paired(data: st.DataObject) -> None:
    """Both connections keep their order; messages may be lost, but not the last one."""
    count = data.draw(st.integers(1, 6))
    heard = [number for number in range(1, count + 1) if number == count or data.draw(st.booleans())]
    packets = list(range(1, count + 1))
    arrivals: Arrivals[int] = Arrivals()
    given_out: list[int] = []
    while packets or heard:
        packet = not heard or (bool(packets) and data.draw(st.booleans()))
        arena = arrivals.came(A, packets[0], packets.pop(0)) if packet else arrivals.announced(A, heard.pop(0))
        if arena is not None:
            given_out.append(arena)
    assert given_out[-1] == count
    assert not arrivals._came
    assert not arrivals._wanted
