"""The life of a request on a worker, and lots that part."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.wire.messages import INLINE_MAX_BYTES
from penstock.worker.lots import ENDED, RUNNING, TABLE, WAITING, IllegalTransition, Lot
from penstock.worker.model import Model

if TYPE_CHECKING:
    from tests.worker.conftest import Requests

IDS = [10, 11, 12, 15, 16]
TIMEOUTS_US = [5, 4, 3, 2, 1]


def make(requests: Requests, model: Model, width: int) -> Lot:
    """Five requests of one row, whose numbers are their ids; ``width`` decides whether they travel as frames."""
    asked = [requests.ask(model, {"x": np.full((1, width), number, np.float32)}) for number in IDS]
    lot = requests.lot(model, asked, IDS, timeouts_us=TIMEOUTS_US, arrived=3.0, before=8)
    lot.index.update(dict.fromkeys(IDS, lot))
    return lot


def contents(lot: Lot) -> dict[int, list[float]]:
    """The distinct numbers in each request's payload."""
    size = lot.plan.form.nbytes
    found = {}
    for at, number in enumerate(lot.ids):
        begin = lot.start + at * size
        payload = lot.payload[begin : begin + size] if size <= INLINE_MAX_BYTES else lot.payload[at]
        found[number] = sorted(set(np.frombuffer(payload, np.float32).tolist()))
    return found


@pytest.fixture(params=[2, INLINE_MAX_BYTES], ids=["inline", "frames"])
def lot(request: pytest.FixtureRequest, requests: Requests, double: Model) -> Lot:
    return make(requests, double, request.param)


@pytest.mark.parametrize("event", TABLE)
@pytest.mark.parametrize("state", [WAITING, RUNNING, ENDED])
def test_only_the_table_moves_a_request(lot: Lot, event: str, state: str) -> None:
    lot.state = state
    if state in TABLE[event]:
        assert lot.move(event) == lot.state == TABLE[event][state]
    else:
        with pytest.raises(IllegalTransition, match=rf"'{event}' cannot happen to .*10, 11.*{state}"):
            lot.move(event)


def test_unknown_event_is_illegal(lot: Lot) -> None:
    with pytest.raises(IllegalTransition, match="'explode'"):
        lot.move("explode")


def test_nothing_leaves_the_end() -> None:
    assert not [event for event, moves in TABLE.items() if ENDED in moves]


def test_rows_and_deadlines_are_those_of_its_requests(lot: Lot) -> None:
    assert lot.rows == 5
    assert lot.first_deadline == pytest.approx(3.0 + 1e-6)
    assert lot.late(3.0) == []
    assert lot.late(3.0 + 2.5e-6) == [15, 16]
    assert lot.late(4.0) == IDS


@pytest.mark.parametrize(
    "part", [[10], [10, 11], [16], [15, 16], [11], [10, 16], [10, 12, 16], [11, 12, 15], [10, 11, 12, 15]]
)
def test_both_parts_keep_their_tensors_and_times(lot: Lot, part: list[int]) -> None:
    lot.move("start")
    other = lot.split(part)
    rest = [number for number in IDS if number not in part]
    assert (list(other.ids), list(lot.ids)) == (part, rest)
    for each in other, lot:
        assert contents(each) == {number: [float(number)] for number in each.ids}
        assert each.timeouts_us == tuple(TIMEOUTS_US[IDS.index(number)] for number in each.ids)
        assert (each.state, each.arrived, each.attempt, each.caller) == (RUNNING, 3.0, 1, b"caller a")
        assert each.plan is lot.plan


def test_index_follows_a_split(lot: Lot) -> None:
    index = lot.index
    other = lot.split([11, 16])
    assert {number: each is other for number, each in index.items()} == {
        10: False,
        11: True,
        12: False,
        15: False,
        16: True,
    }
    assert other.index is index


def test_parts_that_stay_in_one_piece_are_not_copied(requests: Requests, double: Model) -> None:
    lot = make(requests, double, 2)
    whole = lot.payload
    first = lot.split([10, 11])
    assert first.payload is whole
    assert lot.payload is whole
    assert (first.start, lot.start) == (8, 8 + 2 * 8)


@settings(deadline=None, max_examples=200)
@given(data=st.data())
def test_lot_may_be_split_again_and_again(data: st.DataObject, requests: Requests, double: Model) -> None:
    width = data.draw(st.sampled_from([2, INLINE_MAX_BYTES]))
    lots = [make(requests, double, width)]
    index = lots[0].index
    for _ in range(data.draw(st.integers(1, 4))):
        large = [lot for lot in lots if len(lot.ids) > 1]
        if large:
            lot = data.draw(st.sampled_from(large))
            part = data.draw(st.sets(st.sampled_from(lot.ids), min_size=1, max_size=len(lot.ids) - 1))
            lots.append(lot.split(sorted(part)))
    assert sorted(number for lot in lots for number in lot.ids) == IDS
    for lot in lots:
        assert contents(lot) == {number: [float(number)] for number in lot.ids}
        assert all(index[number] is lot for number in lot.ids)
