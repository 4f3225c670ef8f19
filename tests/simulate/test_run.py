"""Whole runs: against what queueing theory says, the same again with the same seed, and with workers that die."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest

from penstock.simulate.costs import BatchCost
from penstock.simulate.figures import Figures, as_object
from penstock.simulate.run import run
from penstock.simulate.scenario import Delays, Outage, Scenario, WorkerGroup
from tests.simulate.scenarios import AT_ONCE, model, scenario, times, traffic


def alone(rate: float, seconds: float, workers: int = 1) -> Scenario:
    """Batches of one that take 10 ms each, and Poisson arrivals: with one worker an M/D/1 queue."""
    return scenario(
        duration_s=seconds,
        warmup_s=5.0,
        models=(model(size=1, cost=BatchCost(0.010)),),
        groups=(WorkerGroup("gpu", workers, ("m",)),),
        traffic=(traffic(rate=rate, end_s=seconds, deadline_s=60.0),),
        delays=AT_ONCE,
    )


def mean_s(figures: Figures) -> float:
    """Of the latencies, from the histogram's buckets."""
    histogram = figures.total.latency
    shares = [(rank + 0.5) / 1000 for rank in range(1000)]
    return sum(histogram.quantiles(shares)) / 1000 / 1e9


def waits(made: Scenario) -> list[tuple[float, float]]:
    """When each comes, and how long it waits for a worker alone, by Lindley's recursion: as long as the one before it
    waits and takes, less what has passed since that one came."""
    found: list[tuple[float, float]] = []
    wait = last = 0.0
    for at in times(made):
        wait = max(0.0, wait + 0.010 - (at - last)) if found else 0.0
        found.append((at, wait))
        last = at
    return found


@pytest.mark.parametrize("load", [0.3, 0.6, 0.8])
def test_a_worker_alone_is_an_md1_queue(load: float) -> None:
    """Everybody waits as Lindley says, in a run that is short, as it is slow; and over so many that the mean's standard
    deviation is 1.2 %, they wait as Pollaczek and Khinchine say: load / (2 (1 - load)) times what one takes."""
    made = alone(load * 100, 60.0)
    expected = [wait for at, wait in waits(made) if at >= made.warmup_s]
    figures = run(made)
    assert figures.total.good == figures.total.arrived == len(expected) > 1500
    assert mean_s(figures) == pytest.approx(0.010 + sum(expected) / len(expected), rel=0.003)
    assert figures.total.latency.largest / 1e9 == pytest.approx(0.010 + max(expected), rel=0.001)
    assert figures.utilisation == pytest.approx(len(expected) * 0.010 / (60.0 - made.warmup_s), rel=0.01)
    assert figures.mean_rows == 1.0

    many = [wait for _, wait in waits(alone(load * 100, 5000.0))]
    assert len(many) * 0.010 / 5000.0 == pytest.approx(load, rel=0.03)
    assert sum(many) / len(many) == pytest.approx(0.010 * load / (2 * (1 - load)), rel=0.04)


def test_a_queue_for_three_workers_waits_less_than_three_queues() -> None:
    """Of so many requests the load has a standard deviation of 1 %."""
    three = run(alone(240.0, 45.0, workers=3))
    assert three.utilisation == pytest.approx(0.8, rel=0.03)
    assert 0.0 < mean_s(three) - 0.010 < 0.010 * 0.8 / (2 * 0.2)


def test_the_delays_are_in_every_latency() -> None:
    """Client to gateway, broker, worker, gateway, and back to the client; at hardly any load."""
    delays = Delays(client_s=0.003, hop_s=0.001, broker_request_s=0.0005)
    figures = run(replace(alone(0.5, 200.0), delays=delays))
    assert figures.quantile(0.5) == pytest.approx(0.010 + 2 * 0.003 + 3 * 0.001 + 0.0005, rel=0.01)


def test_a_speed_and_a_jitter_keep_their_means() -> None:
    plan = model(size=1, cost=BatchCost(0.010, jitter=0.5))
    figures = run(replace(alone(100.0, 120.0), models=(plan,), groups=(WorkerGroup("fast", 1, ("m",), speed=2.0),)))
    assert figures.utilisation == pytest.approx(0.5, rel=0.03)


def test_one_device_computes_no_more_at_once_than_it_can() -> None:
    """Two instances on a device that computes one batch at a time: the second waits for it."""
    made = scenario(
        models=(model(size=1, cost=BatchCost(0.010), instances=2),),
        groups=(WorkerGroup("gpu", 1, ("m",), instances=2, parallel=1),),
        traffic=(traffic(rate=1000.0, deadline_s=0.5),),
        delays=AT_ONCE,
    )
    figures = run(made)
    assert figures.total.answered / 2.0 == pytest.approx(100, rel=0.35)
    assert figures.utilisation == pytest.approx(1.0, rel=0.01)
    both = run(replace(made, groups=(WorkerGroup("gpu", 1, ("m",), instances=2),)))
    assert both.workers[0].batches == pytest.approx(2 * figures.workers[0].batches, rel=0.02)


def test_the_same_seed_gives_the_same_and_another_others() -> None:
    made = scenario(
        models=(model(cost=BatchCost(0.002, 0.0005, jitter=0.2)),),
        traffic=(
            traffic(rate=2000.0, hangups=0.05, hangup_after_s=0.004),
            traffic(name="u", arrivals="users", users=5),
        ),
    )
    first = as_object(run(made))
    assert as_object(run(made)) == first
    assert as_object(run(replace(made, seed=4))) != first


def test_arrivals_do_not_depend_on_the_workers() -> None:
    """So that figures of different numbers of workers can be compared."""
    counts = {run(scenario().with_workers(count, "gpu")).total.arrived for count in (1, 2, 3)}
    assert len(counts) == 1


@pytest.mark.parametrize("silent", [False, True])
def test_what_a_dead_worker_had_is_answered_by_others(silent: bool) -> None:
    made = scenario(
        duration_s=8.0,
        groups=(
            WorkerGroup("gpu", 2, ("m",)),
            WorkerGroup("dying", 1, ("m",), outages=(Outage(0.5, 4.0, silent), Outage(4.5, silent=silent))),
        ),
        traffic=(traffic(rate=600.0, end_s=8.0, deadline_s=30.0),),
    )
    figures = run(made, validate=True)
    assert figures.total.answered == figures.total.arrived > 4500
    assert figures.retries > 0
    assert figures.codes == {}
    dying = figures.workers[2]
    assert dying.name == "dying-0"
    assert dying.alive_s == pytest.approx(1.0, abs=0.01)
    slowest_s = figures.total.latency.largest / 1e9
    assert 0.8 < slowest_s < 1.5 if silent else slowest_s < 0.8  # the broker asks whether it lives


def test_without_any_worker_left_everything_ends_all_the_same() -> None:
    made = scenario(groups=(WorkerGroup("gpu", 2, ("m",), outages=(Outage(1.0),)),))
    figures = run(made, validate=True)
    assert 0 < figures.total.good < figures.total.arrived == figures.total.ended


def test_users_wait_for_their_answers() -> None:
    """Ten in a closed loop, with a think time of 90 ms and 10 ms of work for each, on enough workers."""
    made = scenario(
        duration_s=20.0,
        models=(model(size=1, cost=BatchCost(0.010)),),
        groups=(WorkerGroup("gpu", 10, ("m",)),),
        traffic=(traffic(arrivals="users", rate=0.0, users=10, think_s=0.090, end_s=20.0, deadline_s=1.0),),
        delays=AT_ONCE,
    )
    figures = run(made)
    assert figures.total.arrived / 20.0 == pytest.approx(100, rel=0.02)


def test_users_who_are_turned_away_do_not_ask_at_once() -> None:
    made = scenario(
        groups=(WorkerGroup("gpu", 1, ("m",), outages=(Outage(0.1),)),),
        traffic=(traffic(arrivals="users", rate=0.0, users=10, deadline_s=0.05),),
    )
    assert run(made).total.arrived < 10 * 2.0 / 0.05 * 1.5


def test_a_step_puts_together_what_comes_within_it_and_costs_no_more_than_two() -> None:
    exact = run(scenario())
    coarse = run(scenario(step_s=0.002))
    assert coarse.total.arrived == exact.total.arrived
    assert coarse.events < exact.events
    assert exact.quantile(0.5) < coarse.quantile(0.5) < exact.quantile(0.5) + 0.006


def test_several_gateways_and_large_requests() -> None:
    figures = run(scenario(gateways=3, traffic=(traffic(nbytes=600_000), traffic(nbytes=100, name="b"))), validate=True)
    assert figures.total.good == figures.total.arrived


def test_tenants_share_what_is_computed() -> None:
    made = scenario(traffic=(traffic(tenant="a", rate=100.0), traffic(tenant="b", rate=300.0, name="b")))
    figures = run(made)
    seconds = figures.tenant_seconds
    assert seconds["b"] / seconds["a"] == pytest.approx(3.0, rel=0.3)
    assert figures.fairness == pytest.approx(0.8, abs=0.1)
    assert sum(seconds.values()) == pytest.approx(sum(worker.busy_s for worker in figures.workers))


def test_the_limits_of_the_broker_are_the_scenarios() -> None:
    from penstock.broker.options import BrokerOptions

    made = scenario(options=BrokerOptions(queue_requests_max=10), traffic=(traffic(rate=5000.0),))
    figures = run(made)
    assert figures.codes.keys() == {"overloaded"}
    assert figures.total.refused == figures.codes["overloaded"] > 100


def test_what_comes_during_the_warm_up_is_not_counted() -> None:
    counted: Sequence[Figures] = [run(scenario(warmup_s=each)) for each in (0.0, 1.0)]
    assert counted[1].total.arrived == pytest.approx(counted[0].total.arrived / 2, rel=0.2)
    assert counted[1].total.ended == counted[1].total.arrived
