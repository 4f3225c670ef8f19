"""A request's life is what the table says; splitting a lot changes nothing but the lot."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.broker.lots import ABANDONED, ASSIGNED, DONE, ENDED, QUEUED, TABLE, IllegalTransition
from penstock.wire.messages import INLINE_MAX_BYTES
from tests.broker.parts import give, make_caller, make_lot, make_queue, make_worker

STATES = (QUEUED, ASSIGNED, DONE, ABANDONED, ENDED)


@pytest.mark.parametrize("event", TABLE)
@pytest.mark.parametrize("state", STATES)
def test_a_lot_moves_as_the_table_says_and_not_otherwise(event: str, state: str) -> None:
    lot = make_lot(make_caller(), make_queue(), (1, 2))
    lot.state = state
    if state in TABLE[event]:
        assert lot.move(event) == lot.state == TABLE[event][state]
    else:
        sentence = f"'{event}' cannot happen to <requests {b'caller00'.hex()}:\\(1, 2\\) {state} attempt 0>"
        with pytest.raises(IllegalTransition, match=sentence):
            lot.move(event)
        assert lot.state == state


def test_every_state_can_be_reached_and_only_the_end_is_an_end() -> None:
    moves = [(before, after) for event in TABLE.values() for before, after in event.items()]
    assert {after for _, after in moves} | {QUEUED} == set(STATES)
    assert {before for before, _ in moves} == set(STATES) - {ENDED}


def test_an_unknown_event_is_illegal() -> None:
    with pytest.raises(IllegalTransition, match="'explode' cannot happen"):
        make_lot(make_caller(), make_queue(), (1,)).move("explode")


@settings(max_examples=150, deadline=None)
@given(
    st.integers(2, 8),
    st.data(),
    st.sampled_from([0, 3, INLINE_MAX_BYTES + 1]),
    st.sampled_from([QUEUED, ASSIGNED, DONE, ABANDONED]),
)
def test_splitting_keeps_every_request_with_what_is_its_own(
    count: int, data: st.DataObject, size: int, state: str
) -> None:
    caller, queue, worker = make_caller(), make_queue(), make_worker()
    ids = data.draw(st.lists(st.integers(0, 255), min_size=count, max_size=count, unique=True))
    part = data.draw(st.lists(st.sampled_from(ids), min_size=1, max_size=count - 1, unique=True))
    lot = make_lot(caller, queue, ids, rows=2, size=size)
    lot.timeouts_us = tuple(1000 + number for number in ids)
    if state != QUEUED:
        give(worker, lot)
        lot.state = state
        lot.kept_bytes = 7 if state == DONE else 0
    if state == ABANDONED:
        caller.requests.clear()
    other = lot.split(part)
    assert sorted(other.ids) == sorted(part)
    assert sorted(lot.ids + other.ids) == sorted(ids)
    for each in (lot, other):
        assert each.rows == 2 * len(each.ids)
        assert each.timeouts_us == tuple(1000 + number for number in each.ids)
        payloads = tuple(bytes([number]) * size for number in each.ids)
        assert each.payload == (payloads if size > INLINE_MAX_BYTES else b"".join(payloads))
        assert (each.state, each.worker, each.attempt) == (state, lot.worker, lot.attempt)
        assert (each.kept_bytes, each.accepted, each.form) == (lot.kept_bytes, lot.accepted, lot.form)
        for number in each.ids:
            assert caller.requests.get(number) is (None if state == ABANDONED else each)
            assert worker.held.get(caller.id, {}).get(number) is (None if state == QUEUED else each)


def test_deadlines_of_a_lot_are_those_of_its_requests() -> None:
    lot = make_lot(make_caller(), make_queue(), (1, 2, 3))
    lot.accepted, lot.timeouts_us = 10.0, (3_000_000, 1_000_000, 2_000_000)
    assert [lot.late(now) for now in (10.9, 11.0, 12.5, 13.0)] == [[], [2], [2, 3], [1, 2, 3]]
    other = lot.split((2,))
    assert (lot.due, other.due) == (12.0, 11.0)
