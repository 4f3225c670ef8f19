"""When requests come."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from penstock.broker.record import COLUMNS
from penstock.simulate.arrivals import Arrivals, curve
from penstock.simulate.scenario import Scenario, ScenarioError, Traffic
from tests.simulate.scenarios import form, scenario, times, traffic


def long(**given: Any) -> Scenario:
    defaults: dict[str, Any] = {"end_s": 100.0, "rate": 200.0}
    return scenario(duration_s=100.0, traffic=(traffic(**(defaults | given)),))


def test_poisson_arrivals_do_not_know_of_each_other() -> None:
    gaps = np.diff(times(long()))
    assert gaps.mean() == pytest.approx(1 / 200, rel=0.03)
    assert gaps.std() == pytest.approx(gaps.mean(), rel=0.03)
    assert min(gaps) >= 0


def test_traffic_begins_and_ends() -> None:
    found = times(long(begin_s=40.0, end_s=60.0))
    assert 40.0 <= found[0] < found[-1] <= 60.0
    assert len(found) == pytest.approx(20 * 200, rel=0.1)


def test_bursts_come_at_the_end_of_each_period() -> None:
    found = np.array(times(long(arrivals="bursts", burst_rate=2000.0, burst_every_s=10.0, burst_length_s=1.0)))
    inside = found % 10.0 >= 9.0
    assert inside.sum() == pytest.approx(10 * 2000, rel=0.05)
    assert (~inside).sum() == pytest.approx(90 * 200, rel=0.05)


def test_a_day_swings_around_its_rate() -> None:
    found = np.array(times(long(arrivals="diurnal", swing=0.8, day_s=100.0)))
    assert len(found) == pytest.approx(100 * 200, rel=0.03)
    assert ((found > 45) & (found < 55)).sum() == pytest.approx(10 * 200 * 1.8, rel=0.1)
    assert (found < 5).sum() + (found > 95).sum() == pytest.approx(10 * 200 * 0.2, rel=0.25)


@pytest.mark.parametrize("arrivals", ["poisson", "bursts", "diurnal"])
def test_a_curve_ascends(arrivals: Any) -> None:
    made = traffic(
        arrivals=arrivals, burst_rate=9.0, burst_every_s=0.3, burst_length_s=0.1, swing=1.0, day_s=1.5, begin_s=0.2
    )
    at, mass = curve(made)
    assert (at[0], at[-1], mass[0]) == (0.2, 2.0, 0.0)
    assert (np.diff(at) > 0).all()
    assert (np.diff(mass) >= -1e-9).all()


def test_a_load_multiplies_rates() -> None:
    twice = Scenario(**{each: getattr(long(), each) for each in Scenario.__slots__} | {"load": 2.0})
    assert len(times(twice)) == pytest.approx(2 * len(times(long())), rel=0.05)


def test_models_and_rows_are_chosen_by_their_shares() -> None:
    arrivals = Arrivals(long(models=(("a", 0.75), ("b", 0.25)), rows=(1, 2)), form)
    found = Counter(arrivals.kinds[each.kind].form[:5:4] for each in arrivals)
    total = found.total()
    shares = {kind: count / total for kind, count in found.items()}
    assert shares == pytest.approx({("a", 1): 0.375, ("a", 2): 0.375, ("b", 1): 0.125, ("b", 2): 0.125}, rel=0.06)


def test_they_come_in_order_whatever_the_traffic() -> None:
    made = scenario(duration_s=400.0, traffic=(traffic(end_s=400.0), traffic(name="b", begin_s=1.0, end_s=399.0)))
    found = times(made)
    assert len(found) > 100_000  # several windows
    assert found == sorted(found)
    assert found == times(made)


def test_too_many_requests_are_refused_before_any_is_made() -> None:
    with pytest.raises(ScenarioError, match="makes 1,000,000,000 requests; 20,000,000 are allowed"):
        Arrivals(long(rate=1e7), form)


def trace_of(path: Path, *groups: list[Any]) -> Traffic:
    head = {"penstock_trace": 1, "began": 5.0, "columns": COLUMNS}
    path.write_text("".join(json.dumps(each) + "\n" for each in (head, *groups)))
    return traffic(arrivals="trace", trace=path, models=(), begin_s=0.5, rate=0.0)


def test_a_trace_is_replayed(tmp_path: Path) -> None:
    groups = [
        [3.0, "m", "", 2, 1, 0, "t", 2, [7, 8]],
        [4.0, "m", "1", 1, 4, 9, "", 0, 30],
        [9.0, "m", "", 1, 1, 0, "t", 2, 1],
    ]
    arrivals = Arrivals(scenario(traffic=(trace_of(tmp_path / "t", *groups),)), form)
    assert [(each.at, each.timeout_us) for each in arrivals] == [(0.5, 7), (0.5, 8), (1.5, 30)]
    assert arrivals.kinds[1].form == form("m", "1", 4, 9, "", 0)


def test_a_load_makes_a_trace_denser(tmp_path: Path) -> None:
    groups = [[0.0, "m", "", 1, 1, 0, "", 0, 7], [1.0, "m", "", 1, 1, 0, "", 0, 7]]
    made = scenario(load=2.0, traffic=(trace_of(tmp_path / "t", *groups),))
    assert times(made) == [0.5, 1.0]
