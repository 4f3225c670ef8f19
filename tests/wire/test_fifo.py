"""A Fifo is a list from whose middle members may leave."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from penstock.wire.fifo import Fifo


class FifoMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.fifo: Fifo[int] = Fifo()
        self.model: list[int] = []
        self.made = 0

    @rule()
    def push(self) -> None:
        self.made += 1
        self.fifo.push(self.made)
        self.model.append(self.made)

    @rule()
    def push_front(self) -> None:
        self.made += 1
        self.fifo.push_front(self.made)
        self.model.insert(0, self.made)

    @precondition(lambda self: self.model)
    @rule(at=st.integers(0, 1000))
    def remove(self, at: int) -> None:
        self.fifo.remove(self.model.pop(at % len(self.model)))

    @precondition(lambda self: self.model)
    @rule()
    def pop(self) -> None:
        assert self.fifo.pop() == self.model.pop(0)

    @precondition(lambda self: self.model)
    @rule()
    def first(self) -> None:
        assert self.fifo.first() == self.model[0]

    @precondition(lambda self: not self.model)
    @rule()
    def nothing_is_there(self) -> None:
        for take in (self.fifo.first, self.fifo.pop):
            with pytest.raises(IndexError):
                take()

    @invariant()
    def holds_the_same(self) -> None:
        assert len(self.fifo) == len(self.model)
        assert list(self.fifo) == self.model
        assert bool(self.fifo) == bool(self.model)


TestFifo = FifoMachine.TestCase
TestFifo.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_removed_members_are_let_go_before_they_are_many() -> None:
    fifo: Fifo[int] = Fifo()
    for number in range(1000):
        fifo.push(number)
    for number in range(999):
        fifo.remove(number)
        assert len(fifo._items) <= 2 * len(fifo) + 2
    assert list(fifo) == [999]
