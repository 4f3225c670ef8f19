"""How many are enough."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.simulate.costs import BatchCost
from penstock.simulate.plan import Target, first_guess, parse_target, search
from penstock.simulate.run import run
from tests.simulate.scenarios import model, scenario, traffic


@given(st.integers(1, 5000), st.integers(1, 5000), st.integers(1, 5000))
def test_the_least_that_is_enough_is_found_in_few_tries(first: int, most: int, enough: int) -> None:
    first = min(first, most)
    steps = search(first, most)
    tried: list[int] = []
    count = next(steps)
    while True:
        tried.append(count)
        assert 1 <= count <= most
        try:
            count = steps.send(count >= enough)
        except StopIteration as stop:
            found = stop.value
            break
    assert found == (enough if enough <= most else None)
    assert len(tried) == len(set(tried)) <= 2 * math.log2(most) + 3
    assert found is None or found == 1 or found - 1 in tried  # its figures are shown beside the answer


@pytest.mark.parametrize(
    ("text", "target"), [("p99=50ms", (0.99, 0.05)), ("p99.9=2s", (0.999, 2.0)), ("p50=900us", (0.5, 0.0009))]
)
def test_targets(text: str, target: tuple[float, float]) -> None:
    assert parse_target(text) == pytest.approx(target)


@pytest.mark.parametrize("text", ["", "99=5ms", "p99=5", "p99=-5ms", "p100=5ms", "p0=5ms", "p99=0ms", "p99<5ms"])
def test_what_is_no_target(text: str) -> None:
    with pytest.raises(ValueError, match="is no target"):
        parse_target(text)


def test_a_target_is_met_by_both_of_its_halves() -> None:
    figures = run(scenario())
    assert figures.total.good_share == 1.0
    p99_s = figures.quantile(0.99)
    assert Target(0.99, p99_s * 1.01, 1.0).met(figures)
    assert not Target(0.99, p99_s * 0.99, 0.5).met(figures)
    assert Target(goodput=1.0).met(figures)
    assert not Target(goodput=0.5).met(run(scenario(traffic=(traffic(deadline_s=0.001),))))


def test_the_first_guess_is_what_full_batches_would_take() -> None:
    made = scenario(
        models=(model(size=10, cost=BatchCost(0.010)), model("n", size=1, cost=BatchCost(0.010))),
        traffic=(traffic(rate=7000.0), traffic(name="n", models=(("n", 1.0),), rate=300.0)),
    )
    assert first_guess(made, made.groups[0]) == 10
    assert first_guess(replace(made, load=2.0), replace(made.groups[0], speed=4.0)) == 5
