"""A server whose processes end again and again does not call itself ready in between."""

from __future__ import annotations

from penstock.gateway.steady import LOSSES_MAX, LOSSES_SPAN_S, STEADY_S, Steady


def flap(steady: Steady, times: int, begin: float, every_s: float) -> float:
    """Ready for some seconds, so many times; returns when it was ready for the last time."""
    for number in range(times):
        now = begin + number * every_s
        steady.saw(True, now)
        steady.saw(True, now + 1.0)
        steady.saw(False, now + 5.0)
        steady.saw(False, now + 6.0)
    return now + 5.0


def test_a_few_losses_are_what_restarts_cost() -> None:
    steady = Steady()
    now = flap(steady, LOSSES_MAX - 1, 0.0, 20.0)
    steady.saw(True, now + 1.0)
    assert steady.reason(now + 1.0) == ""


def test_after_many_it_is_ready_once_it_has_been_for_a_while() -> None:
    steady = Steady()
    now = flap(steady, LOSSES_MAX, 0.0, 20.0) + 1.0
    steady.saw(True, now)
    for after_s, ready in ((0.0, False), (STEADY_S - 0.1, False), (STEADY_S, True), (1000.0, True)):
        assert (steady.reason(now + after_s) == "") == ready
    assert steady.reason(now) == (
        "it was ready 5 times within 10 minutes and then was not; it counts as ready once it has been for 20 s"
    )


def test_a_process_that_is_tried_once_a_minute_makes_no_difference() -> None:
    """The launcher's breaker is open, and each try serves for some seconds."""
    steady = Steady()
    now = flap(steady, LOSSES_MAX, 0.0, 10.0)
    for _ in range(30):
        now = flap(steady, 1, now + 60.0, 0.0)
        steady.saw(True, now + 60.0)
        assert steady.reason(now + 64.0) != ""
        steady.saw(False, now + 65.0)


def test_losses_are_forgotten() -> None:
    steady = Steady()
    now = flap(steady, LOSSES_MAX, 0.0, 20.0)
    steady.saw(True, now + LOSSES_SPAN_S)
    assert steady.reason(now + LOSSES_SPAN_S) == ""
