"""An allocator hands out slots that do not overlap, takes them back, and refuses only when it must."""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from penstock.wire.allocator import ALIGN_BYTES, Allocator


def padded(nbytes: int) -> int:
    """What a slot occupies."""
    return -(-nbytes // 64) * 64


def width(size: int) -> int:
    """How wide the class of ``size`` is, by its definition: 32 equal parts of each power of two, and none narrower
    than 64 bytes."""
    power = 1
    while power * 2 <= size:
        power *= 2
    return max(power // 32, 64)


def class_begin(size: int) -> int:
    """The least size in the class of ``size``."""
    return size // width(size) * width(size)


def next_class_begin(size: int) -> int:
    """``size``, rounded up to where a class begins."""
    return -(-size // width(size)) * width(size)


def runs_of(slots: dict[int, int], size: int) -> list[int]:
    """How long each stretch between slots is."""
    edges = [(0, 0), *sorted(slots.items()), (size, 0)]
    gaps = [after[0] - (before[0] + padded(before[1])) for before, after in itertools.pairwise(edges)]
    return [gap for gap in gaps if gap]


def check_sums(allocator: Allocator, slots: dict[int, int]) -> None:
    """What holds at any time, given the slots and what was asked for each."""
    allocator.validate()
    assert allocator.slots == len(slots)
    assert allocator.used == sum(map(padded, slots.values()))
    assert allocator.used - sum(slots.values()) <= 63 * len(slots)
    assert allocator.free == allocator.size - allocator.used == sum(runs_of(slots, allocator.size))


def check_bounds(allocator: Allocator, slots: dict[int, int]) -> None:
    """All that the module promises. To ask for ``largest`` ends what is kept."""
    check_sums(allocator, slots)
    runs = runs_of(slots, allocator.size)
    longest = max(runs, default=0)
    assert class_begin(longest) <= allocator.largest <= longest if runs else allocator.largest == 0
    assert allocator.largest * 33 > longest * 32 or not runs
    if sum(class_begin(run) == class_begin(longest) for run in runs) == 1:
        assert allocator.largest == longest


class AllocatorMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.slots: dict[int, int] = {}
        self.allocator = Allocator(64)

    @initialize(size=st.integers(1, 1 << 12) | st.integers(1 << 12, 1 << 32))
    def begin(self, size: int) -> None:
        self.allocator = Allocator(size * 64)

    def attempt(self, nbytes: int, granted: bool | None = None) -> None:
        longest = max(runs_of(self.slots, self.allocator.size), default=0)
        offset = self.allocator.take(nbytes)
        assert granted in (None, offset is not None)
        if offset is None:
            assert longest < next_class_begin(padded(nbytes)), "a refusal while there was a run that is long enough"
            return
        assert type(offset) is int
        assert offset % ALIGN_BYTES == 0
        assert 0 <= offset <= offset + nbytes <= self.allocator.size
        for other, size in self.slots.items():
            assert offset + nbytes <= other or other + size <= offset, f"{offset} overlaps {other}"
        self.slots[offset] = nbytes

    @rule(nbytes=st.integers(1, 1 << 14))
    def take(self, nbytes: int) -> None:
        self.attempt(nbytes)

    @rule(power=st.integers(0, 38), part=st.integers(0, 31), beside=st.integers(-65, 65))
    def take_near_where_a_class_begins(self, power: int, part: int, beside: int) -> None:
        self.attempt(max(1, ((1 << power) + (part << power) // 32) + beside))

    @rule(beside=st.integers(-65, 65))
    def take_about_the_largest(self, beside: int) -> None:
        nbytes = max(1, self.allocator.largest + beside)
        self.attempt(nbytes, nbytes <= self.allocator.largest)

    @rule(beside=st.integers(-65, 65))
    def take_about_the_longest(self, beside: int) -> None:
        """Without a look at what is kept."""
        self.attempt(max(1, max(runs_of(self.slots, self.allocator.size), default=0) + beside))

    @rule(part=st.integers(2, 100))
    def take_a_part_of_the_largest(self, part: int) -> None:
        nbytes = max(1, self.allocator.largest // part)
        self.attempt(nbytes, nbytes <= self.allocator.largest)

    @rule()
    def look(self) -> None:
        check_bounds(self.allocator, self.slots)

    @precondition(lambda self: self.slots)
    @rule(at=st.integers(0, 1000))
    def take_the_same_again(self, at: int) -> None:
        self.attempt(list(self.slots.values())[at % len(self.slots)])

    @precondition(lambda self: self.slots)
    @rule(at=st.integers(0, 1000))
    def give(self, at: int) -> None:
        offset = list(self.slots)[at % len(self.slots)]
        del self.slots[offset]
        self.allocator.give(offset)

    @precondition(lambda self: self.slots)
    @rule(at=st.integers(0, 1000))
    def give_twice(self, at: int) -> None:
        offset = list(self.slots)[at % len(self.slots)]
        del self.slots[offset]
        self.allocator.give(offset)
        self.give_what_is_none(offset)

    @rule(offset=st.integers(-64, 1 << 16))
    def give_what_is_none(self, offset: int) -> None:
        if offset not in self.slots:
            with pytest.raises(ValueError, match=rf"^no slot begins at offset {offset}: it was given back before"):
                self.allocator.give(offset)

    @precondition(lambda self: self.slots)
    @rule(seed=st.integers(0, 1000))
    def give_all(self, seed: int) -> None:
        offsets = list(self.slots)
        random.Random(seed).shuffle(offsets)
        for offset in offsets:
            self.allocator.give(offset)
        self.slots.clear()
        assert self.allocator.largest == self.allocator.free == self.allocator.size

    @precondition(lambda self: self.slots)
    @rule(at=st.integers(0, 1000))
    def give_and_take_again(self, at: int) -> None:
        """What is kept is of use at once, wherever it lies."""
        offset = list(self.slots)[at % len(self.slots)]
        nbytes = self.slots[offset]
        self.allocator.give(offset)
        again = self.allocator.take(nbytes)
        assert again is not None
        if padded(nbytes) <= 1 << 14:
            assert again == offset
        else:
            del self.slots[offset]
            self.slots[again] = nbytes

    @invariant()
    def keeps_its_promises(self) -> None:
        check_sums(self.allocator, self.slots)


TestAllocator = AllocatorMachine.TestCase
TestAllocator.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)


# --- by example ---


@pytest.mark.parametrize("size", [64, 128, 4096, 4096 + 64, 1 << 30, (1 << 40) - 64])
def test_the_whole_can_be_one_slot(size: int) -> None:
    allocator = Allocator(size)
    assert allocator.largest == size
    assert allocator.take(size + 1) is None
    assert allocator.take(size) == 0
    assert (allocator.free, allocator.used, allocator.largest, allocator.slots) == (0, size, 0, 1)
    assert allocator.take(1) is None
    allocator.give(0)
    assert (allocator.free, allocator.used, allocator.largest, allocator.slots) == (size, 0, size, 0)
    allocator.validate()


@pytest.mark.parametrize(("nbytes", "used"), [(1, 64), (63, 64), (64, 64), (65, 128), (4096, 4096), (4097, 4160)])
def test_a_slot_wastes_less_than_64_bytes(nbytes: int, used: int) -> None:
    allocator = Allocator(1 << 20)
    allocator.take(nbytes)
    assert allocator.used == used


def filled(size: int, nbytes: int) -> Allocator:
    """Slots of ``nbytes``, a multiple of 64, side by side, and nothing free."""
    allocator = Allocator(size)
    taken = [allocator.take(nbytes) for _ in range(size // nbytes)]
    assert sorted(offset for offset in taken if offset is not None) == list(range(0, size, nbytes))
    return allocator


@pytest.mark.parametrize("order", [(1, 2, 3), (1, 3, 2), (2, 1, 3), (2, 3, 1), (3, 1, 2), (3, 2, 1)])
def test_neighbours_that_are_free_are_one_run(order: tuple[int, ...]) -> None:
    allocator = filled(64 * 1024, 8192)
    for at in order:
        allocator.give(at * 8192)
        allocator.validate()
    assert allocator.largest == 3 * 8192
    assert allocator.take(3 * 8192) == 8192


def test_runs_that_do_not_touch_are_not_added_up() -> None:
    allocator = filled(64 * 1024, 8192)
    for at in (0, 2, 4, 6):
        allocator.give(at * 8192)
    assert allocator.free == 4 * 8192
    assert allocator.largest == 8192
    assert allocator.take(8193) is None


def test_a_slot_as_large_as_one_given_back_takes_its_place() -> None:
    """Otherwise requests of one size, which begins no class, would wear the range away."""
    allocator = Allocator(1 << 30)
    offsets = [allocator.take(602_112) for _ in range(9)]
    for offset in (offsets[3], offsets[6]):
        assert offset is not None
        allocator.give(offset)
    assert {allocator.take(602_112), allocator.take(602_112)} == {offsets[3], offsets[6]}


def test_a_small_slot_does_not_break_a_large_run() -> None:
    allocator = filled(1 << 20, 4096)
    for at in (5, *range(100, 200)):
        allocator.give(at * 4096)
    assert allocator.largest == 100 * 4096
    assert allocator.take(4000) == 5 * 4096
    assert allocator.largest == 100 * 4096


def test_what_is_kept_is_not_refused() -> None:
    """Slots of another size want the room of those that were given back."""
    allocator = filled(1 << 20, 4096)
    for at in range(4):
        allocator.give(at * 4096)
    assert allocator.take(1 << 14) == 0
    allocator.validate()


@pytest.mark.parametrize("before", [64, 4096, 1 << 14, (1 << 14) + 64, (1 << 19) - 64])
def test_what_was_given_back_divides_no_larger_slots(before: int) -> None:
    """An arena with room for two of them has it whatever was there before."""
    allocator = Allocator(1 << 20)
    assert allocator.take(before) == 0
    allocator.give(0)
    assert {allocator.take(1 << 19), allocator.take(1 << 19)} == {0, 1 << 19}
    allocator.validate()


@pytest.mark.parametrize("sizes", [1, 300])
def test_no_more_than_so_much_is_kept(sizes: int) -> None:
    """So that to end it is a short pause."""
    allocator = Allocator(1 << 26)
    taken = [allocator.take(64 * (1 + at % sizes)) for at in range(1000)]
    for offset in taken:
        assert offset is not None
        allocator.give(offset)
        allocator.validate()  # counts it
    assert allocator.largest == allocator.size


def two_runs(first: int, second: int) -> tuple[Allocator, int, int]:
    """Nothing is free but two runs of these lengths, given back in this order."""
    allocator = Allocator(1 << 20)
    one, _, two, _ = (allocator.take(nbytes) for nbytes in (first, 64, second, (1 << 20) - first - 64 - second))
    assert one is not None
    assert two is not None
    assert allocator.free == 0
    allocator.give(one)
    assert allocator.largest == first
    allocator.give(two)
    return allocator, one, two


def test_what_may_be_refused_is_less_than_one_part_in_32() -> None:
    """Two runs of one class, the shorter one given back last: the longer one is not looked at."""
    allocator, long, short = two_runs(65_536 + 2048 - 64, 65_536)
    assert allocator.largest == 65_536
    assert allocator.take(65_537) is None
    assert allocator.take(65_536) == short
    assert allocator.take(65_536 + 2048 - 64) == long


def test_one_part_in_32_more_is_another_class() -> None:
    allocator, long, _ = two_runs(65_536 + 2048, 65_536)
    assert allocator.largest == 65_536 + 2048
    assert allocator.take(65_536 + 2048) == long


@pytest.mark.parametrize("nbytes", [0, -1, -64, 1.0, None, "64", True])
def test_what_is_no_size_is_an_error(nbytes: Any) -> None:
    allocator = Allocator(4096)
    with pytest.raises(ValueError, match="a slot has 1 byte or more, not "):
        allocator.take(nbytes)
    check_bounds(allocator, {})


@pytest.mark.parametrize("size", [0, -64, 1, 63, 65, 100, 64.0, None, True])
def test_a_range_is_a_multiple_of_64_bytes(size: Any) -> None:
    with pytest.raises(ValueError, match="an allocator's size is a positive multiple of 64 bytes, not "):
        Allocator(size)


@given(st.integers(1, 1 << 30))
def test_the_classes_are_as_fine_as_promised(grains: int) -> None:
    """The definition above, which the tests measure by, is itself what the module says."""
    size = grains * 64
    low, high = class_begin(size), next_class_begin(size)
    assert low <= size <= high
    assert class_begin(high) == high
    assert high in (low, low + width(size))
    assert high * 32 <= size * 33
    assert width(size) * 32 <= size or width(size) == 64


def test_a_long_life_leaves_nothing() -> None:
    chance = random.Random(7)
    allocator = Allocator(1 << 26)
    slots: dict[int, int] = {}
    for step in range(20_000):
        if slots and chance.random() < 0.5:
            offset = chance.choice(list(slots)) if step % 100 == 0 else next(iter(slots))
            del slots[offset]
            allocator.give(offset)
        else:
            nbytes = chance.choice([100, 4096, 60_000, 602_112, 1_000_003])
            taken = allocator.take(nbytes)
            if taken is not None:
                slots[taken] = nbytes
        if step % 500 == 0:
            check_sums(allocator, slots)
        if step % 5000 == 0:
            check_bounds(allocator, slots)
    check_bounds(allocator, slots)
    for offset in slots:
        allocator.give(offset)
    check_bounds(allocator, {})
    assert allocator.largest == allocator.size


@pytest.mark.parametrize(
    ("index", "wrong", "sentence"),
    [
        ("_kept", {64: [64] * 65}, "65 slots of one size are kept, and 64 should be at most"),
        ("_kept", {64 * n: [] for n in range(1, 18)}, "slots of 17 sizes are kept, and 16 should be at most"),
        ("_kept", {(1 << 14) + 64: []}, "a slot of 16448 bytes is kept, and 16384 is the most"),
        ("_kept", {64: [64]}, "a free run begins at 64, and what is before it ends at 128"),
        ("_slots", {}, "a free run begins at 64, and what is before it ends at 0"),
        ("_slots", {0: 32, 32: 32}, "the slot at 0 has 32 bytes, no multiple of 64"),
        ("_runs", {}, "slots and free runs end at 64 of 256"),
        ("_runs", {128: 64, 256: 128}, "two free runs touch at 128"),
        ("_ends", {}, "ends by start are {}, and should be {64: 256}"),
        ("_classes", [[]], "runs by class are {}, and should be {3: {256}}"),
        ("_classes", [[], [], [], [256, 256]], "a run is listed twice"),
        ("_places", {256: 1}, "places are {256: 1}, and should be {256: 0}"),
        ("_filled", 0, "the bitmap is 0, and should be 1000"),
    ],
)
def test_validate_says_what_is_wrong(index: str, wrong: Any, sentence: str) -> None:
    allocator = Allocator(256)
    allocator.take(1)
    allocator.validate()
    setattr(allocator, index, wrong)
    with pytest.raises(AssertionError) as caught:
        allocator.validate()
    assert str(caught.value).startswith(sentence)
