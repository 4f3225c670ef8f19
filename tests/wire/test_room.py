"""Whoever waits for room gets it in turn: nobody is forgotten, and nobody granted more than there is."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from penstock.wire.allocator import Allocator
from penstock.wire.room import Room, Wait

SIZE = 64 * 64
SIZES = st.integers(1, SIZE) | st.integers(1, 200)


class RoomMachine(RuleBasedStateMachine):
    """A room against a list of those who wait."""

    def __init__(self) -> None:
        super().__init__()
        self.allocator = Allocator(64)
        self.room: Room[Wait] = Room(self.allocator)
        self.slots: list[int] = []
        self.line: list[Wait] = []

    @initialize(blocks=st.integers(1, 64))
    def begin(self, blocks: int) -> None:
        self.allocator = Allocator(blocks * 64)
        self.room = Room(self.allocator)

    def granted(self, waits: Sequence[Wait]) -> None:
        """They are the first of the line, in its order."""
        assert list(waits) == self.line[: len(waits)]
        del self.line[: len(waits)]
        assert all(wait.offset >= 0 for wait in waits)
        self.slots += [wait.offset for wait in waits]

    @rule(nbytes=SIZES)
    def take(self, nbytes: int) -> None:
        expected = not self.line and nbytes <= self.allocator.largest
        offset = self.room.take(nbytes)
        assert (offset is not None) == expected
        if offset is not None:
            self.slots.append(offset)

    @rule(nbytes=SIZES)
    def wait(self, nbytes: int) -> None:
        wait = Wait(nbytes)
        if nbytes > self.allocator.size:
            with pytest.raises(ValueError, match=f"there will never be room for {nbytes} bytes in "):
                self.room.wait(wait)
            return
        expected = not self.line and nbytes <= self.allocator.largest
        self.line.append(wait)
        assert self.room.wait(wait) == expected
        if expected:
            self.granted([wait])

    @precondition(lambda self: self.slots)
    @rule(at=st.integers(0, 1000))
    def give(self, at: int) -> None:
        self.granted(self.room.give(self.slots.pop(at % len(self.slots))))

    @precondition(lambda self: self.line)
    @rule(at=st.integers(0, 1000))
    def leave(self, at: int) -> None:
        wait = self.line.pop(at % len(self.line))
        self.granted(self.room.leave(wait))
        assert self.room.leave(wait) == ()
        assert wait.offset == -1

    @invariant()
    def the_first_is_there_for_want_of_room(self) -> None:
        self.allocator.validate()
        assert self.allocator.slots == len(self.slots), "a slot is held by nobody"
        assert len(self.room) == len(self.line)
        assert all(wait.offset == -1 for wait in self.line)
        assert not self.line or self.line[0].nbytes > self.allocator.largest, "a wake-up is lost"

    def teardown(self) -> None:
        """Nobody waits for ever: once all is given back, everybody has had a turn."""
        while self.slots:
            self.granted(self.room.give(self.slots.pop(0)))
        assert self.line == []
        assert self.allocator.used == 0


TestRoom = RoomMachine.TestCase
TestRoom.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


@settings(max_examples=100, deadline=None)
@given(small=st.lists(st.integers(1, 500), min_size=1, max_size=60), taken=st.integers(0, 20))
def test_small_ones_that_keep_coming_do_not_starve_a_large_one(small: list[int], taken: int) -> None:
    """Each of the small ones comes before an older one gives its slot back, so that there is always one there."""
    allocator = Allocator(SIZE)
    room: Room[Wait] = Room(allocator)
    slots = [offset for offset in (room.take(64) for _ in range(taken + 1)) if offset is not None]
    large = Wait(SIZE)
    assert not room.wait(large)
    for nbytes in small:
        room.wait(Wait(nbytes))
        if slots and large.offset < 0:
            granted = room.give(slots.pop(0))
            assert list(granted) == ([large] if not slots else [])
    while slots and large.offset < 0:
        room.give(slots.pop(0))
    assert large.offset == 0


def test_whoever_leaves_the_head_of_the_line_lets_the_others_through() -> None:
    room: Room[Wait] = Room(Allocator(SIZE))
    taken = room.take(64)
    large, first, second, third = Wait(SIZE), Wait(64), Wait(SIZE - 192), Wait(128)
    for wait in (large, first, second, third):
        assert not room.wait(wait)
    assert room.leave(third) == ()
    assert room.leave(large) == [first, second]
    assert len(room) == 0
    assert taken == 0


def test_nobody_waits_once_the_line_is_cleared() -> None:
    room: Room[Wait] = Room(Allocator(SIZE))
    taken = room.take(SIZE)
    waits = [Wait(64), Wait(64)]
    for wait in waits:
        room.wait(wait)
    assert room.clear() == waits
    assert (len(room), room.leave(waits[0])) == (0, ())
    assert taken == 0
    assert room.give(taken) == ()


@pytest.mark.parametrize("nbytes", [0, -1, SIZE + 1])
def test_what_there_will_never_be_room_for_does_not_wait(nbytes: int) -> None:
    room: Room[Wait] = Room(Allocator(SIZE))
    with pytest.raises(ValueError, match="there will never be room"):
        room.wait(Wait(nbytes))
    assert len(room) == 0
