"""What waits for a model: lines in turn, order within a line, nobody overtakes."""

from __future__ import annotations

from collections.abc import Collection

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from penstock.broker.lots import Lot
from penstock.broker.queues import ModelQueue
from penstock.broker.shares import Taking
from tests.broker.parts import make_caller, make_lot, make_queue

CALLERS = [make_caller(number) for number in range(3)]
EVERYBODY = frozenset(caller.id for caller in CALLERS)


def ids(lots: list[Lot]) -> list[int]:
    return [number for lot in lots for number in lot.ids]


def take(queue: ModelQueue, room: int, enough: int, hears: Collection[bytes], full: Collection[bytes]) -> list[Lot]:
    taking = Taking(room, hears, full)
    assert queue.take(taking, enough) == bool(taking.lots)
    assert taking.rows == sum(lot.rows for lot in taking.lots)
    assert taking.us == sum(lot.cost_us * len(lot.ids) for lot in taking.lots)
    return taking.lots


def filled(*lines: int, rows: int = 1) -> ModelQueue:
    """A queue with a line of so many requests for each caller; ids tell callers by their hundreds."""
    queue = make_queue()
    for caller, count in zip(CALLERS, lines, strict=False):
        if count:
            at = 100 * CALLERS.index(caller)
            queue.push(make_lot(caller, queue, range(at, at + count), rows))
    return queue


def test_a_line_is_served_in_its_order() -> None:
    queue = make_queue()
    for first in (1, 4, 7):
        queue.push(make_lot(CALLERS[0], queue, range(first, first + 3)))
    assert ids(take(queue, 4, 4, EVERYBODY, ())) == [1, 2, 3, 4]
    assert ids(take(queue, 100, 100, EVERYBODY, ())) == [5, 6, 7, 8, 9]
    assert take(queue, 100, 100, EVERYBODY, ()) == []


def test_what_is_put_in_front_is_served_first() -> None:
    queue = filled(2)
    queue.push(make_lot(CALLERS[0], queue, (10, 11)), front=True)
    assert ids(take(queue, 9, 9, EVERYBODY, ())) == [10, 11, 0, 1]


def test_lines_have_equal_shares() -> None:
    queue = filled(50, 50, 50)
    taken = ids(take(queue, 12, 12, EVERYBODY, ()))
    assert sorted(taken) == [0, 1, 2, 3, 100, 101, 102, 103, 200, 201, 202, 203]


def test_lines_are_served_in_turn_across_takings() -> None:
    queue = filled(3, 1, 3)
    order = [ids(take(queue, 1, 1, EVERYBODY, ()))[0] for _ in range(7)]
    assert order == [0, 100, 200, 1, 201, 2, 202]


def test_what_a_short_line_leaves_goes_to_the_others() -> None:
    assert len(ids(take(filled(50, 1, 50), 12, 12, EVERYBODY, ()))) == 12


def test_tenants_of_one_caller_have_lines_of_their_own() -> None:
    queue = make_queue()
    queue.push(make_lot(CALLERS[0], queue, range(10), tenant="flood"))
    queue.push(make_lot(CALLERS[0], queue, (50,), tenant="quiet"))
    assert ids(take(queue, 2, 2, EVERYBODY, ())) == [0, 50]


def test_only_callers_that_hear_and_are_not_full_are_served() -> None:
    queue = filled(5, 5, 5)
    hears, full = {CALLERS[0].id, CALLERS[2].id}, {CALLERS[0].id}
    assert ids(take(queue, 9, 9, hears, full)) == [200, 201, 202, 203, 204]
    assert take(queue, 9, 9, hears, full) == []
    assert take(queue, 9, 9, (), ()) == []
    assert queue.requests == 10


def test_nobody_overtakes_a_request_that_does_not_fit() -> None:
    queue = make_queue()
    queue.push(make_lot(CALLERS[0], queue, (1,), rows=4))
    queue.push(make_lot(CALLERS[1], queue, (2,), rows=1))
    assert take(queue, 3, 3, EVERYBODY, ()) == []
    assert not queue.could_give(3, EVERYBODY, ())
    assert ids(take(queue, 4, 4, EVERYBODY, ())) == [1]


def test_a_share_is_never_less_than_a_request() -> None:
    assert ids(take(filled(2, 2, rows=4), 8, 2, EVERYBODY, ())) == [0]


def test_a_queue_that_was_emptied_gives_nothing() -> None:
    queue = make_queue()
    lot = make_lot(CALLERS[0], queue, (1,))
    queue.push(lot)
    queue.remove(lot)
    assert take(queue, 9, 9, EVERYBODY, ()) == []
    assert not queue.could_give(9, EVERYBODY, ())


class QueueMachine(RuleBasedStateMachine):
    """Lines as plain lists of (id, rows); the queue must agree with what these say may be taken."""

    def __init__(self) -> None:
        super().__init__()
        self.queue = make_queue()
        self.lines: dict[tuple[bytes, str], list[tuple[int, int]]] = {}
        self.index: dict[int, Lot] = {}
        self.last_id = 0

    def make(self, caller: int, tenant: str, count: int, rows: int) -> tuple[Lot, list[tuple[int, int]]]:
        numbers = range(self.last_id + 1, self.last_id + 1 + count)
        self.last_id += count
        owner = CALLERS[caller]
        lot = make_lot(owner, self.queue, numbers, rows, size=3, tenant=tenant)
        self.lines.setdefault((owner.id, tenant), [])
        return lot, [(number, rows) for number in numbers]

    @rule(
        caller=st.integers(0, 2),
        tenant=st.sampled_from(["", "t"]),
        count=st.integers(1, 5),
        rows=st.integers(1, 4),
        front=st.booleans(),
    )
    def push(self, caller: int, tenant: str, count: int, rows: int, front: bool) -> None:
        lot, requests = self.make(caller, tenant, count, rows)
        line = self.lines[lot.caller.id, tenant]
        if front:
            self.queue.push(lot, front=True)
            line[:0] = requests
        else:
            self.queue.push(lot)
            line += requests

    @precondition(lambda self: self.queue.requests)
    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        lot = data.draw(st.sampled_from(self.queue.lots()))
        part = data.draw(st.lists(st.sampled_from(lot.ids), min_size=1, unique=True))
        leaving = lot if len(part) == len(lot.ids) else lot.split(part)
        self.queue.remove(leaving)
        key = (lot.caller.id, lot.form.tenant)
        self.lines[key] = [each for each in self.lines[key] if each[0] not in part]

    @rule(
        room=st.integers(0, 12),
        enough=st.integers(1, 12),
        hears=st.sets(st.sampled_from(sorted(EVERYBODY))),
        full=st.sets(st.sampled_from(sorted(EVERYBODY)), max_size=1),
    )
    def take(self, room: int, enough: int, hears: set[bytes], full: set[bytes]) -> None:
        could = self.queue.could_give(room, hears, full)
        taken = take(self.queue, room, enough, hears, full)
        assert could == bool(taken)
        rows = 0
        for lot in taken:
            assert lot.caller.id in hears - full
            assert not lot.in_line
            assert lot.payload == b"".join(bytes([number % 256]) * 3 for number in lot.ids)
            line = self.lines[lot.caller.id, lot.form.tenant]
            for number in lot.ids:
                assert rows < enough, "more than enough"
                assert line.pop(0) == (number, lot.form.rows), "out of order"
                rows += lot.form.rows
        assert rows <= room, "more than there is room for"
        heads = [line[0][1] for (caller, _), line in self.lines.items() if line and caller in hears - full]
        if rows < enough and heads:
            assert max(heads) > room - rows, "what fits was left"

    @invariant()
    def holds_the_same(self) -> None:
        self.queue.validate()
        found: dict[tuple[bytes, str], list[tuple[int, int]]] = {}
        for lot in self.queue.lots():
            found.setdefault((lot.caller.id, lot.form.tenant), []).extend((each, lot.form.rows) for each in lot.ids)
        assert found == {key: line for key, line in self.lines.items() if line}


TestQueue = QueueMachine.TestCase
TestQueue.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
