"""Whose turn it is: tenants by compute time, priorities before each other, and nobody for ever last."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.broker.lots import Lot
from penstock.broker.queues import ModelQueue
from penstock.broker.shares import LEAST_SHARE, Taking
from tests.broker.conversation import model
from tests.broker.parts import make_caller, make_lot

CALLERS = [make_caller(number) for number in range(3)]
HEARS = frozenset(caller.id for caller in CALLERS)


class Counting:
    """A queue that is filled by tenants, and from which batches are taken one after another."""

    def __init__(self, weights: Mapping[str, float] | None = None) -> None:
        self.queue = ModelQueue(("m", "1"), model().spec, weights or {})
        self.last_id = 0

    def ask(
        self, count: int, tenant: str = "", priority: int = 0, cost_us: int = 1000, rows: int = 1, caller: int = 0
    ) -> Lot:
        ids = range(self.last_id + 1, self.last_id + 1 + count)
        self.last_id += count
        owner = CALLERS[caller]
        lot = make_lot(owner, self.queue, ids, rows, tenant=tenant, priority=priority, cost_us=cost_us)
        self.queue.push(lot)
        return lot

    def take(self, rows: int, horizon: float = 0.0, hopeless: bool = True) -> list[Lot]:
        taking = Taking(rows, HEARS, (), horizon, hopeless)
        self.queue.take(taking, rows)
        for lot in taking.late:
            self.queue.remove(lot)
        self.queue.validate()
        return taking.lots

    def served(self, batches: int, rows: int = 8) -> Counter[str]:
        """Microseconds that tenants have been given in so many batches, each of which was done before the next."""
        given: Counter[str] = Counter()
        for _ in range(batches):
            for lot in self.take(rows):
                given[lot.form.tenant] += lot.cost_us * len(lot.ids)
                self.queue.end(lot, 0.0)
        return given

    def overtake(self, rows: int) -> list[Lot]:
        taking = Taking(rows, HEARS, ())
        taking.overtakes = True
        self.queue.take(taking, rows)
        self.queue.validate()
        return taking.lots


def test_tenants_that_ask_for_the_same_get_the_same() -> None:
    counting = Counting()
    counting.ask(900, "flood")
    counting.ask(100, "quiet")
    assert counting.served(20) == {"flood": 80_000, "quiet": 80_000}


def test_a_tenant_is_charged_for_time_and_not_for_requests() -> None:
    counting = Counting()
    counting.ask(500, "long", cost_us=5000)
    counting.ask(500, "short")
    given = counting.served(40)
    assert given["long"] == pytest.approx(given["short"], rel=0.15)


def test_a_weight_is_a_part_in_proportion() -> None:
    counting = Counting({"gold": 3.0})
    counting.ask(900, "gold")
    counting.ask(900, "iron")
    given = counting.served(40)
    assert given["gold"] / given["iron"] == pytest.approx(3.0, rel=0.1)


def test_who_comes_again_and_again_is_not_taken_for_new() -> None:
    """One that always asks for a little more than it was given has no more than its part, though its line is empty now
    and then."""
    counting = Counting()
    counting.ask(2000, "waits")
    given: Counter[str] = Counter()
    for _ in range(100):
        counting.ask(6, "comes")
        given += counting.served(1)
    assert given["comes"] == pytest.approx(given["waits"], rel=0.1)


def test_a_tenant_that_was_idle_has_gathered_no_credit() -> None:
    counting = Counting()
    counting.ask(2000, "busy")
    counting.served(100)
    counting.ask(500, "late")
    given = counting.served(10)
    assert abs(given["busy"] - given["late"]) <= 8000


def test_what_a_tenant_really_took_is_made_up_for() -> None:
    counting = Counting()
    counting.ask(900, "slow")
    counting.ask(900, "quick")
    for _ in range(60):
        for lot in counting.take(8):
            if lot.form.tenant == "slow":
                counting.queue.end(lot, 2000.0 * len(lot.ids))  # three times what was expected
    left = Counter({lot.form.tenant: len(lot.ids) for lot in counting.queue.lots()})
    assert (900 - left["quick"]) / (900 - left["slow"]) == pytest.approx(3.0, rel=0.15)


def test_who_is_behind_what_was_given_may_overtake_it() -> None:
    counting = Counting()
    counting.ask(8, "flood")
    first = counting.take(8)
    counting.ask(80, "flood")
    counting.take(8)
    counting.ask(5, "quiet")
    for lot in first:
        counting.queue.end(lot, 0.0)
    counting.ask(5, "other")
    assert counting.queue.may_overtake(3, "other")
    assert not counting.queue.may_overtake(3, "flood")
    taken = counting.overtake(8)
    assert Counter(lot.form.tenant for lot in taken for _ in lot.ids) == {"quiet": 4, "other": 4}
    assert all(lot.overtakes for lot in taken)
    assert [lot.form.tenant for lot in counting.overtake(80)] == ["quiet", "other"]


def test_nobody_overtakes_more_than_he_is_behind() -> None:
    counting = Counting()
    counting.ask(8, "flood")
    first = counting.take(8)
    counting.ask(80, "flood")
    counting.take(8)
    for lot in first:
        counting.queue.end(lot, 0.0)
    counting.ask(100, "quiet")
    taken = [lot for _ in range(20) for lot in counting.overtake(1)]
    # What was given is behind by 8 rows: those that were taken together, as one request, begin at the same time.
    assert len(taken) == 8
    assert not counting.queue.may_overtake(3, "quiet")


def test_what_is_more_urgent_overtakes_as_many_rows_as_are_less_urgent() -> None:
    counting = Counting()
    counting.ask(20, priority=5)
    given = counting.take(6)
    counting.ask(20, priority=3)
    assert counting.queue.may_overtake(3, CALLERS[0].id)
    assert sum(len(lot.ids) for lot in counting.overtake(4)) == 4
    assert sum(len(lot.ids) for lot in counting.overtake(4)) == 2
    assert counting.overtake(4) == []
    for lot in given:
        counting.queue.end(lot, 0.0)
    assert not counting.queue.may_overtake(3, CALLERS[0].id)


def test_whose_turn_it_was_alone_has_to_wait_when_another_comes() -> None:
    """A turn that has not been looked at for long is not taken for an early one."""
    counting = Counting()
    counting.ask(1000, "busy")
    counting.served(100)
    counting.ask(100, "late")
    assert [lot.form.tenant for lot in counting.take(1)] == ["late"]


def test_callers_of_one_tenant_share_its_part() -> None:
    counting = Counting()
    counting.ask(100, "a", caller=0)
    counting.ask(100, "a", caller=1)
    counting.ask(100, "b", caller=2)
    given = Counter((lot.form.tenant, lot.caller.id) for lot in counting.take(8) for _ in lot.ids)
    assert sorted(given.values()) == [2, 2, 4]


def test_who_names_no_tenant_is_one_by_itself() -> None:
    counting = Counting()
    counting.ask(100, caller=0)
    counting.ask(100, caller=1)
    assert sorted(Counter(lot.caller.id for lot in counting.take(8) for _ in lot.ids).values()) == [4, 4]


def test_the_more_urgent_goes_first() -> None:
    counting = Counting()
    late, middle, first = [counting.ask(2, priority=priority) for priority in (5, 0, 1)]
    assert [lot.ids for lot in counting.take(6)] == [first.ids, middle.ids, late.ids]


def test_a_low_priority_still_moves() -> None:
    counting = Counting()
    counting.ask(2000, "urgent", 1)
    counting.ask(2000, "background", 5)
    given = counting.served(100, rows=16)
    assert given["background"] / given["urgent"] == pytest.approx(LEAST_SHARE, rel=0.1)


def test_what_is_owed_is_not_more_than_was_waited_for() -> None:
    counting = Counting()
    counting.ask(1000, "urgent", 1)
    counting.served(100)
    counting.ask(1000, "urgent", 1)
    counting.ask(100, "background", 5)
    assert counting.served(1) == {"urgent": 8000}


def test_a_large_request_of_low_priority_comes_when_enough_is_owed() -> None:
    counting = Counting()
    counting.ask(500, "urgent", 1)
    counting.ask(2, "background", 5, rows=8)
    batches = [counting.served(1) for _ in range(20)]
    assert [batch["background"] for batch in batches].index(64_000 // 8) <= 4
    assert sum(batch["background"] for batch in batches) == 16_000


@pytest.mark.parametrize("hopeless", [True, False])
def test_what_cannot_be_done_in_time_is_not_taken(hopeless: bool) -> None:
    counting = Counting()
    soon, later = counting.ask(3), counting.ask(3)
    later.accepted, later.due = 5.0, 6.0
    mixed = counting.ask(2)
    mixed.timeouts_us, mixed.due = (1_000_000, 9_000_000), 1.0
    taken = counting.take(8, horizon=2.0, hopeless=hopeless)
    if hopeless:  # nobody could do it: it leaves its line
        assert [lot.ids for lot in taken] == [later.ids, mixed.ids]
        assert len(mixed.ids) == 1
        assert counting.queue.requests == 0
    else:  # it waits for a worker that is faster, and what is behind it too
        assert taken == []
        assert counting.queue.requests == 8
    assert soon.state == "QUEUED"


def test_tenants_that_come_once_are_forgotten() -> None:
    counting = Counting()
    for number in range(3000):
        counting.queue.push(make_lot(CALLERS[0], counting.queue, (number,), tenant=f"tenant {number}"))
        assert counting.queue.take(Taking(1, HEARS, ()), 1)
    counting.queue.validate()
    assert len(counting.queue.level(3).shares) <= 2048


@settings(max_examples=60, deadline=None)
@given(
    st.dictionaries(st.sampled_from("abcd"), st.sampled_from([0.5, 1.0, 2.0, 8.0]), min_size=2),
    st.dictionaries(st.sampled_from("abcd"), st.integers(200, 5000), min_size=4),
    st.integers(4, 64),
)
def test_whoever_waits_all_the_time_has_its_part(weights: dict[str, float], costs: dict[str, int], rows: int) -> None:
    counting = Counting(weights)
    for tenant in weights:
        counting.ask(900, tenant, cost_us=costs[tenant])
    given = counting.served(800 // rows, rows)
    parts = {tenant: given[tenant] / weight for tenant, weight in weights.items()}
    # Nobody is ahead of another by more than what each is given at once.
    most = max(rows * cost / weights[tenant] for tenant, cost in costs.items() if tenant in weights)
    assert max(parts.values()) - min(parts.values()) <= 2 * most
