"""Which of many like events are logged."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from penstock.wire.quiet import Quiet


def test_a_few_are_told_and_the_others_counted() -> None:
    quiet = Quiet()
    assert [quiet.note("full", 5.0) for _ in range(15)] == [1] * 10 + [0] * 5
    assert quiet.note("other", 5.0, 3) == 3
    assert quiet.unsaid(5.5) == []
    assert quiet.note("full", 6.1) == 6
    assert quiet.unsaid(7.0) == []
    assert quiet.note("full", 7.2, 2) == 2


def test_what_was_not_told_is_told_when_nothing_more_comes() -> None:
    quiet = Quiet()
    for _ in range(30):
        quiet.note("full", 5.0, 2)
    assert quiet.unsaid(6.0) == [("full", 40)]
    assert quiet.unsaid(9.0) == []


def test_kinds_without_end_are_forgotten() -> None:
    quiet = Quiet()
    for number in range(1000):
        assert quiet.note(str(number), 5.0) == 1
    assert len(quiet._kinds) <= 256


@given(st.lists(st.tuples(st.sampled_from("ab"), st.floats(0, 0.3), st.integers(1, 5)), max_size=80))
def test_every_event_is_told_once(events: list[tuple[str, float, int]]) -> None:
    quiet, now = Quiet(), 0.0
    told = {"a": 0, "b": 0}
    came = dict(told)
    lines = 0
    for kind, pause, count in events:
        now += pause
        came[kind] += count
        said = quiet.note(kind, now, count)
        told[kind] += said
        lines += said > 0
    for kind, count in quiet.unsaid(now + 1.0):
        told[kind] += count
    assert told == came
    assert lines <= 2 * 10 * (now + 1)
