"""Lots are found by their requests, and split exactly where fates part."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.wire.lots import lots_of, pick, pick_payload, places_of
from penstock.wire.messages import INLINE_MAX_BYTES

LIGHT = settings(max_examples=200, deadline=None)


class Lot:
    """The least that a lot is: ids, and an index that follows when it is split."""

    def __init__(self, index: dict[int, Lot], ids: tuple[int, ...]) -> None:
        self.index = index
        self.ids = ids
        index.update(dict.fromkeys(ids, self))

    def split(self, part: Sequence[int], /) -> Lot:
        inside, outside = places_of(self.ids, part)
        assert inside, "nothing to part with"
        assert outside, "nothing would be left"
        ids, self.ids = pick(self.ids, inside), pick(self.ids, outside)
        return Lot(self.index, ids)


def lots(sizes: list[int]) -> dict[int, Lot]:
    """An index of lots of these sizes, whose ids grow."""
    index: dict[int, Lot] = {}
    for size in sizes:
        Lot(index, tuple(range(len(index), len(index) + size)))
    return index


@LIGHT
@given(st.lists(st.integers(1, 5), max_size=4), st.lists(st.integers(0, 25), max_size=12))
def test_lots_hold_exactly_the_requests_that_were_asked_for(sizes: list[int], ids: list[int]) -> None:
    index = lots(sizes)
    known = set(index)
    found = lots_of(index, ids)
    assert sorted(number for lot in found for number in lot.ids) == sorted(known & set(ids))
    assert len(set(found)) == len(found)
    assert all(number in index[number].ids for number in known)
    assert sum(len(lot.ids) for lot in set(index.values())) == len(known)


def test_a_whole_lot_is_not_split() -> None:
    index = lots([3, 2])
    for ids in ((0, 1, 2), [2, 0, 1], (0, 1, 2, 99)):
        assert lots_of(index, ids) == [index[0]]


def test_requests_asked_for_twice_count_once() -> None:
    # Otherwise the rest would be a lot without requests.
    index = lots([2])
    [part] = lots_of(index, (1, 1))
    assert (part.ids, index[0].ids) == ((1,), (0,))
    assert lots_of(index, (0, 0)) == [index[0]]


def test_nothing_asked_for_is_nothing_found() -> None:
    assert lots_of(lots([2]), ()) == []
    assert lots_of({}, (1, 2)) == []


@LIGHT
@given(st.lists(st.integers(), unique=True), st.lists(st.integers()))
def test_places_are_inside_or_outside(ids: list[int], part: list[int]) -> None:
    inside, outside = places_of(ids, part)
    assert pick(ids, inside) == tuple(number for number in ids if number in part)
    assert pick(ids, outside) == tuple(number for number in ids if number not in part)


def test_a_payload_in_one_piece_is_picked_by_size() -> None:
    assert pick_payload(b"aabbccdd", 2, [1, 3]) == b"bbdd"
    assert pick_payload(memoryview(b"aabb"), 2, [0]) == b"aa"
    assert pick_payload(b"", 0, [0, 5]) == b""


def test_a_payload_of_frames_is_picked_by_place_without_a_copy() -> None:
    frames = tuple(bytes(INLINE_MAX_BYTES + 1) for _ in range(3))
    picked = pick_payload(frames, INLINE_MAX_BYTES + 1, [2, 0])
    assert [id(frame) for frame in picked] == [id(frames[2]), id(frames[0])]
