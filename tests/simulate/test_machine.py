"""Any small scenario: every core holds what it promises after every event, and every request ends exactly once."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from penstock.broker.options import BrokerOptions
from penstock.simulate.costs import BatchCost
from penstock.simulate.figures import as_object
from penstock.simulate.run import Run
from penstock.simulate.scenario import NEVER, Delays, Outage, Scenario, Traffic, WorkerGroup
from tests.simulate.scenarios import model

_MODELS = ("a", "b")
_few_ms = st.integers(0, 30).map(lambda number: number / 1000)


@st.composite
def _groups(draw: st.DrawFn, number: int) -> WorkerGroup:
    outages: list[Outage] = []
    at = 0.0
    for _ in range(draw(st.integers(0, 2))):
        dies_s = at + draw(st.floats(0.001, 0.3))
        at = dies_s + draw(st.floats(0.001, 0.2))
        outages.append(Outage(dies_s, at, draw(st.booleans())))
    for_good: bool = draw(st.booleans())
    if outages and for_good:
        outages[-1] = Outage(outages[-1].dies_s, NEVER, draw(st.booleans()))
    instances = draw(st.integers(0, 3))
    served = draw(st.sampled_from([_MODELS, _MODELS, ("a",), ("b",)]))
    parallel = draw(st.integers(0, instances))
    speed = draw(st.sampled_from([0.2, 1.0, 3.0]))
    return WorkerGroup(f"g{number}", draw(st.integers(1, 3)), served, instances, parallel, speed, tuple(outages))


@st.composite
def _traffic(draw: st.DrawFn, number: int) -> Traffic:
    arrivals = draw(st.sampled_from(["poisson", "bursts", "diurnal", "users"]))
    models = draw(st.sampled_from([(("a", 1.0),), (("b", 1.0),), (("a", 0.7), ("b", 0.3))]))
    return Traffic(
        name=f"t{number}",
        arrivals=arrivals,  # type: ignore[arg-type]
        models=models,
        rows=tuple(draw(st.lists(st.integers(1, 4), min_size=1, max_size=3))),
        nbytes=draw(st.sampled_from([0, 100, 5000])),
        tenant=draw(st.sampled_from(["", "x", "y"])),
        priority=draw(st.integers(0, 5)),
        deadline_s=draw(st.sampled_from([0.002, 0.02, 0.2, 3.0])),
        end_s=0.3,
        rate=draw(st.sampled_from([50.0, 300.0, 1000.0])),
        burst_rate=2000.0,
        burst_every_s=0.2,
        burst_length_s=0.05,
        swing=0.9,
        day_s=0.3,
        users=draw(st.integers(1, 20)) if arrivals == "users" else 0,
        think_s=draw(_few_ms),
        hangups=draw(st.sampled_from([0.0, 0.3])),
        hangup_after_s=draw(_few_ms),
    )


@st.composite
def scenarios(draw: st.DrawFn) -> Scenario:
    delay = draw(st.sampled_from(["0ms", "2ms", "50ms"]))
    return Scenario(
        name="any",
        duration_s=0.3,
        seed=draw(st.integers(0, 1000)),
        groups=tuple(draw(_groups(number)) for number in range(draw(st.integers(1, 3)))),
        models=(
            model("a", 8, BatchCost(0.001, 0.0005, jitter=0.5), max_queue_delay=delay),
            model("b", 4, BatchCost(0.0, 0.004), instances=draw(st.integers(1, 2))),
        ),
        traffic=tuple(draw(_traffic(number)) for number in range(draw(st.integers(1, 3)))),
        warmup_s=draw(st.sampled_from([0.0, 0.1])),
        step_s=draw(st.sampled_from([0.0, 0.0, 0.003])),
        gateways=draw(st.integers(1, 3)),
        delays=Delays(draw(_few_ms), draw(_few_ms), draw(st.sampled_from([0.0, 1e-5, 2e-3]))),
        options=BrokerOptions(queue_requests_max=draw(st.sampled_from([20, 16_384])), unserved_grace_s=0.3),
    )


@pytest.mark.timeout(280)
@settings(deadline=None, max_examples=10, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(scenarios())
def test_whatever_happens_every_request_ends_once_and_every_core_is_sound(scenario: Scenario) -> None:
    served = {name for group in scenario.groups for name in group.models}
    machine = Run(scenario, validate=True)
    figures = machine.run("")
    total = figures.total
    assert machine.arrived == machine.ended
    assert total.ended == total.arrived <= machine.arrived
    assert machine.broker.core.ledger.requests == 0
    assert all(0.0 <= worker.utilisation <= 1.0 + 1e-9 for worker in figures.workers)
    if served == set(_MODELS):
        assert "not_found" not in figures.codes
    assert {"internal", "bad_input", "model_failed"}.isdisjoint(figures.codes)


@settings(deadline=None, max_examples=4, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(scenarios())
def test_any_scenario_can_be_had_again(scenario: Scenario) -> None:
    assert as_object(Run(scenario).run("")) == as_object(Run(scenario).run(""))
