"""Everything with a deadline is looked at once a turn."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.gateway.wheel import Wheel


class Item:
    def __init__(self, deadline: float) -> None:
        self.deadline = deadline


def turn(wheel: Wheel[Item], now: float, spokes: int = 4) -> list[Item]:
    return [item for _ in range(spokes) for item in wheel.advance(now)]


def test_one_turn_finds_those_that_are_late_and_no_others() -> None:
    wheel: Wheel[Item] = Wheel()
    early, late, forever = Item(11.0), Item(10.0), Item(float("inf"))
    for item in (early, late, forever):
        wheel.add(item)
    assert turn(wheel, 9.9) == []
    assert turn(wheel, 10.0) == [late]
    assert set(turn(wheel, 1e9)) == {early, late}


def test_late_ones_stay_until_they_are_discarded() -> None:
    wheel: Wheel[Item] = Wheel()
    item = Item(1.0)
    wheel.add(item)
    assert turn(wheel, 2.0) == turn(wheel, 3.0) == [item]
    wheel.discard(item)
    assert (turn(wheel, 4.0), len(wheel), wheel.items()) == ([], 0, [])


def test_deadline_may_move_as_often_as_it_likes() -> None:
    wheel: Wheel[Item] = Wheel()
    item = Item(1.0)
    wheel.add(item)
    item.deadline = 5.0
    assert turn(wheel, 4.0) == []
    item.deadline = 3.0
    assert turn(wheel, 4.0) == [item]


def test_what_is_not_there_can_be_discarded() -> None:
    wheel: Wheel[Item] = Wheel()
    wheel.discard(Item(0.0))
    assert len(wheel) == 0


def test_one_step_looks_at_an_even_part() -> None:
    wheel: Wheel[Item] = Wheel(spokes=4)
    for _ in range(400):
        wheel.add(Item(0.0))
    assert [len(wheel.advance(1.0)) for _ in range(4)] == [100] * 4


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 9), st.lists(st.tuples(st.booleans(), st.integers(0, 9)), max_size=60))
def test_a_turn_finds_each_late_member_exactly_once(spokes: int, steps: list[tuple[bool, int]]) -> None:
    wheel: Wheel[Item] = Wheel(spokes)
    members: list[Item] = []
    for add, value in steps:
        if add or not members:
            members.append(Item(value))
            wheel.add(members[-1])
        else:
            wheel.discard(members.pop(value % len(members)))
    assert len(wheel) == len(wheel.items()) == len(members)
    found = turn(wheel, 5.0, spokes)
    assert len(found) == len(set(found))
    assert set(found) == {item for item in members if item.deadline <= 5}
