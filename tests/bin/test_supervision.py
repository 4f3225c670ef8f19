"""When a process is started again, and when it is taken for stuck."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.bin.supervision import (
    BACKOFF_MAX_S,
    ENDS_MAX,
    ENDS_SPAN_S,
    LATE_S,
    LOOK_S,
    STEADY_S,
    STUCK_S,
    TRY_AGAIN_S,
    Breaker,
    Pulse,
    next_backoff,
)


def test_a_process_is_started_again_at_once_and_then_after_ever_longer_pauses() -> None:
    backoffs = [0.0]
    for _ in range(10):
        backoffs.append(next_backoff(backoffs[-1], served_s=1.0))
    assert backoffs[1:5] == [0.2, 0.4, 0.8, 1.6]
    assert backoffs[-2:] == [10.0, 10.0]


def test_a_process_that_served_for_a_while_begins_with_the_shortest_pause_again() -> None:
    assert next_backoff(10.0, served_s=4.9) == 10.0
    assert next_backoff(10.0, served_s=5.0) == 0.2


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0, 100), max_size=20))
def test_pauses_stay_within_their_limits(runs: list[float]) -> None:
    before = 0.0
    for served_s in runs:
        after = next_backoff(before, served_s)
        assert 0.2 <= after <= max(0.2, min(10.0, before * 2))
        before = after


def live(breaker: Breaker, runs: list[float]) -> list[float]:
    """The pauses after lives of these lengths, one after another."""
    now, pauses = 1000.0, []
    for served_s in runs:
        now += served_s
        pauses.append(breaker.ended(now, served_s))
        now += pauses[-1]
    return pauses


@pytest.mark.parametrize("served_s", [0.0, 1.0, 4.9])
def test_a_process_that_dies_again_and_again_is_then_tried_once_a_minute(served_s: float) -> None:
    breaker = Breaker()
    pauses = live(breaker, [served_s] * 8)
    assert pauses == [0.2, 0.4, 0.8, 1.6, TRY_AGAIN_S, TRY_AGAIN_S, TRY_AGAIN_S, TRY_AGAIN_S]
    assert breaker.broken


def test_a_try_that_goes_well_is_the_end_of_it() -> None:
    breaker = Breaker()
    live(breaker, [0.0] * ENDS_MAX)
    assert (live(breaker, [STEADY_S]), breaker.broken) == ([0.2], False)
    assert live(breaker, [0.0] * 3) == [0.4, 0.8, 1.6]


def test_who_serves_between_its_deaths_is_started_again_at_once_however_many_there_are() -> None:
    """Such as a broker that somebody kills again and again: without it nobody is served."""
    breaker = Breaker()
    assert (live(breaker, [STEADY_S] * 50), breaker.broken) == ([0.2] * 50, False)


def test_deaths_that_are_far_apart_break_nothing() -> None:
    breaker = Breaker()
    for number in range(50):
        breaker.ended(1000.0 + number * ENDS_SPAN_S / (ENDS_MAX - 2), 0.0)
    assert not breaker.broken


def test_what_cannot_work_as_it_is_told_to_is_tried_once_a_minute_from_the_beginning() -> None:
    breaker = Breaker()
    assert breaker.ended(1000.0, 1.0, hopeless=True) == TRY_AGAIN_S
    assert breaker.ended(1061.0, 1.0) == TRY_AGAIN_S


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(0, 100), min_size=1, max_size=40))
def test_no_process_is_started_often_for_long(runs: list[float]) -> None:
    """At most ENDS_MAX starts in any ENDS_SPAN_S, but for those that ran steadily between."""
    breaker = Breaker()
    pauses = live(breaker, runs)
    assert all(pause == TRY_AGAIN_S or 0.2 <= pause <= BACKOFF_MAX_S for pause in pauses)
    assert breaker.broken == (pauses[-1] == TRY_AGAIN_S)


def test_who_says_nothing_for_so_long_is_stuck() -> None:
    pulse = Pulse(100.0)
    assert not pulse.feel(100.0 + LOOK_S, beat=True, late_s=0.0)
    assert not pulse.feel(100.0 + 2 * LOOK_S, beat=False, late_s=0.0)
    assert pulse.feel(100.0 + LOOK_S + STUCK_S, beat=False, late_s=0.0)


def test_nobody_is_stuck_because_the_whole_machine_stood_still() -> None:
    pulse = Pulse(100.0)
    assert not pulse.feel(1000.0, beat=False, late_s=1000.0 - 100.0 - LOOK_S)
    assert not pulse.feel(1000.0 + LOOK_S, beat=False, late_s=LATE_S)
    assert pulse.feel(1000.0 + STUCK_S, beat=False, late_s=0.0)
