"""A wait for room ends once: with a slot, in vain, or because nobody needs it any more."""

from __future__ import annotations

import pytest

from penstock.gateway.waits import BoundedWait, too_large
from penstock.wire.slots import Slot, Slots
from tests.gateway.serving import Loop


class Waiting:
    """Somebody who waits on a loop, and what became of it."""

    def __init__(self, loop: Loop, slots: Slots, nbytes: int, limit_s: float = 60.0, lead: int = 0) -> None:
        self.slots: list[Slot] = []
        self.sentences: list[str] = []
        self.wait = BoundedWait(loop.loop, slots, nbytes, lead, limit_s, self.slots.append, self.sentences.append)

    @property
    def ended(self) -> int:
        return len(self.slots) + len(self.sentences)


@pytest.fixture
def whole(slots: Slots) -> Slot:
    """All there is, taken."""
    whole = slots.take(slots.arena.size)
    assert whole is not None
    return whole


def test_slot_comes_on_a_turn_of_its_own(loop: Loop, slots: Slots, whole: Slot) -> None:
    waiting = Waiting(loop, slots, 1000, lead=100)
    whole.give_back()
    assert (slots.waiting, waiting.ended) == (0, 0)
    loop.until(lambda: waiting.ended)
    [slot] = waiting.slots
    assert (len(slot), (slot.place + 100) % 64) == (1000, 0)
    waiting.wait.leave()
    assert slots.arena.allocator.slots == 1, "it belongs to whoever has waited"
    slot.give_back()


def test_there_may_be_room_at_once(loop: Loop, slots: Slots) -> None:
    waiting = Waiting(loop, slots, 1000)
    assert waiting.ended == 0
    loop.until(lambda: waiting.ended)
    waiting.slots[0].give_back()


@pytest.mark.parametrize("limit_s", [0.0, 0.01])
def test_without_room_in_time_it_ends_with_a_sentence(loop: Loop, slots: Slots, whole: Slot, limit_s: float) -> None:
    first, second = Waiting(loop, slots, 1000, limit_s, lead=100), Waiting(loop, slots, 2000)
    loop.until(lambda: first.ended)
    assert first.sentences == [
        f"1028 bytes of this gateway's 1048576 bytes of shared memory did not come free within {limit_s:g} s "
        "(arena_wait_s); try again shortly, or raise arena_bytes ([gateway] in the configuration)"
    ]
    assert (slots.waiting, second.ended) == (1, 0)
    whole.give_back()
    loop.until(lambda: second.ended)
    assert first.ended == 1
    second.slots[0].give_back()


def test_slot_that_comes_at_the_last_moment_counts(loop: Loop, slots: Slots, whole: Slot) -> None:
    waiting = Waiting(loop, slots, 1000, 0.0)
    whole.give_back()
    loop.until(lambda: waiting.ended)
    loop.settle()
    assert waiting.sentences == []
    waiting.slots[0].give_back()


@pytest.mark.parametrize("granted", [False, True])
def test_whoever_leaves_is_told_nothing_and_keeps_nothing(loop: Loop, slots: Slots, whole: Slot, granted: bool) -> None:
    waiting = Waiting(loop, slots, 1000, 0.01)
    if granted:
        whole.give_back()
        assert slots.arena.allocator.slots == 1
    waiting.wait.leave()
    assert slots.waiting == 0
    late = Waiting(loop, slots, 1000, 0.02)
    loop.until(lambda: late.ended)
    assert waiting.ended == 0
    whole.give_back()
    for slot in late.slots:
        slot.give_back()


def test_slots_that_are_closed_end_it(loop: Loop, slots: Slots, whole: Slot) -> None:
    waiting = Waiting(loop, slots, 1000)
    slots.close()
    loop.until(lambda: waiting.ended)
    assert waiting.slots == []
    whole.give_back()


def test_both_sizes_are_told_of_what_never_fits() -> None:
    assert too_large(30, 20) == (
        "the request takes 30 bytes of shared memory, and this gateway has 20; send fewer rows at a time, or raise "
        "arena_bytes ([gateway] in the configuration)"
    )
