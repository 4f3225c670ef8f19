"""Virtual time."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from penstock.simulate.clock import NEVER, Alarm, Clock


@given(st.lists(st.sampled_from([0.0, 1.0, 1.0, 2.5, 3.0])))
def test_what_is_said_happens_in_the_order_of_its_time(times: list[float]) -> None:
    clock = Clock()
    seen: list[tuple[float, int]] = []
    for number, at in enumerate(times):
        clock.at(at, lambda number: seen.append((clock.now, number)), number)
    clock.run(lambda: True)
    assert seen == sorted((at, number) for number, at in enumerate(times))
    assert clock.events == len(times)


def test_what_is_late_happens_now() -> None:
    clock = Clock()
    seen: list[float] = []
    clock.at(2.0, lambda _: clock.at(1.0, lambda _: seen.append(clock.now), None), None)
    clock.run(lambda: True)
    assert seen == [2.0]


def test_it_stops_when_told() -> None:
    clock = Clock()
    seen: list[int] = []
    for number in range(5):
        clock.at(number, seen.append, number)
    clock.run(lambda: len(seen) < 3)
    assert seen == [0, 1, 2]


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 20) | st.none()), max_size=12))
def test_an_alarm_rings_when_it_was_wanted_last(wishes: list[tuple[int, int | None]]) -> None:
    clock = Clock()
    rung: list[float] = []
    alarm = Alarm(clock, lambda: rung.append(clock.now))
    expected: list[float] = []
    wanted = NEVER

    def want(at: float) -> None:
        nonlocal wanted
        if wanted < clock.now:
            expected.append(wanted)
        wanted = max(at, clock.now)
        alarm.want(wanted)

    for when, at in sorted(wishes, key=lambda each: each[0]):
        clock.at(when + 0.5, want, NEVER if at is None else at)
    clock.run(lambda: True)
    assert rung == expected + ([wanted] if wanted < NEVER else [])
