"""Slots of an arena."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.wire.arena import Arena
from penstock.wire.slots import Slots


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
    tail = slot.tail(nbytes)
    assert (len(slot), len(tail)) == (lead + nbytes, nbytes)
    assert tail.place % 64 == 0
    slot.view[lead] = 77
    assert bytes(slots.arena.view(tail.place, 1)) == bytes(tail.view[:1]) == b"\x4d"
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
