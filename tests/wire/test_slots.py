"""Slots of an arena."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.wire.arena import Arena
from penstock.wire.slots import Slot, Slots, padded


@pytest.fixture
def slots() -> Iterator[Slots]:
    arena = Arena(1 << 18, "test")
    slots = Slots(arena)
    yield slots
    assert arena.allocator.used == 0, "a slot was not given back"
    arena.close()


@settings(max_examples=200, deadline=None)
@given(nbytes=st.integers(1, 5000), lead=st.integers(0, 5000))
def test_what_follows_the_lead_is_aligned(nbytes: int, lead: int) -> None:
    slots = Slots(Arena(1 << 16, "test"))
    slot = slots.take(lead + nbytes, lead)
    assert slot is not None
    assert len(slot) == lead + nbytes
    slot.view[lead] = 77
    for _ in range(2):
        slot.cut(nbytes)
        assert len(slot) == nbytes
        assert slot.place % 64 == 0
        assert bytes(slots.arena.view(slot.place, 1)) == bytes(slot.view[:1]) == b"\x4d"
    slot.give_back()
    assert slots.arena.allocator.used == 0


def test_a_slot_is_given_back_once(slots: Slots) -> None:
    first = slots.take(100)
    assert first is not None
    first.give_back()
    again = slots.take(100)
    assert again is not None
    first.give_back()
    assert slots.arena.allocator.slots == 1
    again.give_back()


def test_there_is_no_slot_without_room(slots: Slots) -> None:
    assert slots.take(slots.arena.size + 1) is None
    whole = slots.take(slots.arena.size)
    assert whole is not None
    assert slots.take(1) is None
    whole.give_back()


def test_threads_take_slots_that_do_not_meet(slots: Slots) -> None:
    wrong: list[int] = []

    def work(number: int) -> None:
        for _ in range(300):
            slot = slots.take(1000)
            if slot is not None:
                slot.view[:] = bytes([number]) * 1000
                if bytes(slot.view) != bytes([number]) * 1000:
                    wrong.append(number)
                slot.give_back()

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_slot_that_is_shared_is_given_back_by_all(slots: Slots) -> None:
    slot = slots.take(100)
    assert slot is not None
    assert slot.share() is slot
    slot.share()
    for _ in range(2):
        slot.give_back()
        assert slots.arena.allocator.slots == 1
    slot.give_back()
    assert slots.arena.allocator.slots == 0
    slot.give_back()


def test_an_address_is_where_the_bytes_are(slots: Slots) -> None:
    slot = slots.take(100)
    assert slot is not None
    slot.view[:5] = b"hello"
    assert ctypes.string_at(slots.address + slot.place, 5) == b"hello"
    slot.give_back()


# --- waiting ---


class Waiting:
    """Somebody who waits, and how often it was woken."""

    def __init__(self, slots: Slots, nbytes: int, lead: int = 0) -> None:
        self.woken = 0
        self._slots = slots
        self._wait = slots.wait(nbytes, lead, self._wake)

    def _wake(self) -> None:
        self.woken += 1

    def end(self) -> Slot | None:
        return self._slots.end(self._wait)


def test_whoever_waits_is_woken_when_there_is_a_slot(slots: Slots) -> None:
    whole = slots.take(slots.arena.size)
    assert whole is not None
    first, second = Waiting(slots, 1000), Waiting(slots, 1000)
    assert (slots.waiting, first.woken) == (2, 0)
    whole.give_back()
    assert (slots.waiting, first.woken, second.woken) == (0, 1, 1)
    for each in (first, second):
        slot = each.end()
        assert slot is not None
        assert len(slot) == 1000
        slot.view[:] = b"x" * 1000
        assert each.end() is None, "it has one already"
        slot.give_back()


def test_whoever_need_not_wait_is_woken_at_once(slots: Slots) -> None:
    waiting = Waiting(slots, 1000)
    assert waiting.woken == 1
    slot = waiting.end()
    assert slot is not None
    slot.give_back()


def test_nobody_comes_before_those_who_wait(slots: Slots) -> None:
    some = slots.take(64)
    assert some is not None
    waiting = Waiting(slots, slots.arena.size)
    assert slots.take(64) is None
    assert waiting.end() is None
    assert waiting.woken == 0
    slot = slots.take(64)
    assert slot is not None
    slot.give_back()
    some.give_back()


def test_whoever_waits_no_longer_lets_the_others_through(slots: Slots) -> None:
    some = slots.take(64)
    assert some is not None
    large, small = Waiting(slots, slots.arena.size), Waiting(slots, 64)
    assert large.end() is None
    assert (large.woken, small.woken) == (0, 1)
    slot = small.end()
    assert slot is not None
    slot.give_back()
    some.give_back()


@settings(max_examples=50, deadline=None)
@given(nbytes=st.integers(1, 5000), lead=st.integers(0, 5000))
def test_what_is_waited_for_is_aligned_like_what_is_taken(nbytes: int, lead: int) -> None:
    slots = Slots(Arena(1 << 16, "test"))
    slot = Waiting(slots, lead + nbytes, lead).end()
    assert slot is not None
    assert (len(slot), (slot.place + lead) % 64) == (lead + nbytes, 0)
    slot.give_back()
    assert slots.arena.allocator.used == 0


@pytest.mark.parametrize("lead", [0, 1, 63, 64, 100])
def test_what_fits_an_empty_arena_and_nothing_more_can_be_waited_for(slots: Slots, lead: int) -> None:
    nbytes = slots.arena.size - -lead % 64
    assert padded(nbytes, lead) == slots.arena.size
    slot = Waiting(slots, nbytes, lead).end()
    assert slot is not None
    slot.give_back()
    with pytest.raises(ValueError, match="there will never be room"):
        slots.wait(nbytes + 1, lead, lambda: None)


def test_when_it_is_closed_nobody_waits_for_it() -> None:
    slots = Slots(Arena(1 << 16, "test"))
    whole = slots.take(1 << 16)
    assert whole is not None
    before = Waiting(slots, 100)
    slots.close()
    after = Waiting(slots, 100)
    assert (before.woken, after.woken) == (1, 1)
    whole.give_back()
    assert (before.end(), after.end(), slots.take(100)) == (None, None, None)


def test_a_slot_that_was_granted_before_the_end_is_none_after_it() -> None:
    slots = Slots(Arena(1 << 16, "test"))
    waiting = Waiting(slots, 100)
    slots.close()
    assert (waiting.woken, waiting.end()) == (1, None)


def test_threads_that_wait_have_their_turn_all_of_them(slots: Slots) -> None:
    """More than there is room for, each of which needs room for a moment, again and again."""
    served: list[int] = []

    def work(number: int) -> None:
        for turn in range(100):
            nbytes = slots.arena.size if (number + turn) % 7 == 0 else 1000 * (number + 1)
            woken = threading.Event()
            wait = slots.wait(nbytes, 0, woken.set)
            assert woken.wait(60), "nobody gave it a turn"
            slot = slots.end(wait)
            assert slot is not None
            slot.view[:1] = b"x"
            slot.give_back()
        served.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(served) == list(range(8))
    assert slots.waiting == 0
