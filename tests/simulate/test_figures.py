"""What is counted."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.simulate.arrivals import Kind
from penstock.simulate.figures import ANSWERED, Collector, as_object, jain, summarize
from penstock.wire.errors import CANCELLED, DEADLINE, LOST, OVERLOADED
from penstock.wire.messages import Form
from tests.simulate.scenarios import scenario


def kind(model: str = "m", tenant: str = "") -> Kind:
    return Kind(0, Form(model, "1", 0, tenant, 1, 0, b"", b""), 0.1)


def test_each_end_has_its_column() -> None:
    made = scenario(warmup_s=1.0)
    kinds = [kind(tenant="a"), kind(tenant="b")]
    collector = Collector(made, kinds, 10.0)
    ends = [(0.05, ANSWERED), (0.2, ANSWERED), (0.0, OVERLOADED), (0.1, DEADLINE), (0.01, CANCELLED), (0.01, LOST)]
    for took, outcome in ends:
        for number in 0, 0, 1:
            collector.arrived(number, 11.5)
            collector.ended(number, 11.5, 11.5 + took, 0.1, outcome)
    collector.arrived(0, 10.5)
    collector.ended(0, 10.5, 10.6, 0.1, ANSWERED)  # during the warm-up
    figures = summarize("", made, collector, kinds, 0, 0.5, 7)
    total = figures.total
    assert (total.arrived, total.ended, total.good, total.late) == (18, 18, 3, 3)
    assert (total.refused, total.expired, total.cancelled, total.failed) == (3, 3, 3, 3)
    assert total.good_share == 3 / 15
    assert figures.tenants["a"].good == 2
    assert figures.codes == {OVERLOADED: 3, DEADLINE: 3, CANCELLED: 3, LOST: 3}
    assert sum(part.arrived for _, part in figures.parts) == 18
    assert figures.good_per_s == 3.0
    assert figures.quantile(0.5) == pytest.approx(0.05, rel=0.01)
    assert as_object(figures)["rows"][1]["tenant"] == "b"


def test_busy_is_what_lies_inside_what_is_measured() -> None:
    made = scenario(warmup_s=1.0)
    collector = Collector(made, [kind(tenant="a"), kind(tenant="b")], 10.0)
    worker = collector.worker("w", "gpu")
    collector.lived(worker, 10.0, 13.0, 2)
    collector.ran(worker, "m", 4, "full", 10.5, 11.5, {"a": 1, "b": 3})
    collector.ran(worker, "m", 4, "idle", 10.0, 10.5, {"a": 4})
    collector.cut(worker, 11.5, 12.5)
    assert (worker.alive_s, worker.busy_s, worker.batches) == (2.0, 1.0, 1)
    assert worker.utilisation == 0.5
    assert collector.tenants == {"a": 0.125, "b": 0.375}


@given(st.lists(st.floats(0.0, 1e6), min_size=1))
def test_jains_index_lies_between_a_share_and_one(values: list[float]) -> None:
    assert 1 / len(values) - 1e-9 <= jain(values) <= 1 + 1e-9


def test_jains_index_of_what_is_known() -> None:
    assert jain([5.0, 5.0]) == 1.0
    assert jain([5.0, 0.0]) == 0.5
    assert jain([]) == jain([0.0, 0.0]) == 1.0
