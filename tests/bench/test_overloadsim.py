"""What the simulator is told of a server, and what it says: the fitting, the scenario and the comparison."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random
from typing import Any

import pytest

from bench import overloadsim, overloadtell
from bench.overloadsim import Known, Seen
from bench.peerlist import Request
from penstock.simulate.costs import Mood

KNOWN = Known({1: 6.0, 8: 8.0, 16: 10.0, 32: 16.0}, 0.1, 40.0, 0.4, 0.6)


def seen(rows: int, batch_ms: float, count: int = 5) -> list[Seen]:
    return [Seen(0.0, rows, batch_ms, 1.2, 1.0)] * count


def test_an_explanation_is_asked_for_in_the_request_itself() -> None:
    head = b'{"inputs":[]}'
    request = Request("/v2/models/heavy/infer", head + b"tensor", {"Inference-Header-Content-Length": str(len(head))})
    wanted = overloadsim.with_parameters(request, explain=True)
    length = int(wanted.headers["Inference-Header-Content-Length"])
    assert json.loads(wanted.body[:length])["parameters"]["explain"] is True
    assert wanted.body[length:] == b"tensor"


def test_what_is_explained_is_read() -> None:
    said = {"batch_rows": 8, "batch_ms": 7.5, "rest_ms": 1.0, "total_ms": 14.0}
    assert overloadsim.read_seen(said, 5.0, 0.0152) == pytest.approx((5.0, 8, 7.5, 1.0, 1.2))


def test_batches_are_learned_by_their_rows() -> None:
    known = overloadsim.learn([*seen(1, 6.0), *seen(8, 8.0), *seen(9, 8.0), *seen(32, 16.0), *seen(31, 100.0, 1)])
    assert known.batch_ms == {1: 6.0, 8: 8.0, 32: 16.0}
    assert (known.hop_ms, known.client_ms) == pytest.approx((0.4, 0.5))
    assert known.jitter > 0.1


def test_slow_moments_are_learned_by_how_alike_batches_are() -> None:
    source, mood = Random(1), Mood(0.05)
    at = [number * 0.03 for number in range(5000)]
    ratios = [0.1 * mood.draw(source, when) for when in at]
    assert overloadsim.lasts_s(at, ratios) == pytest.approx(0.05, rel=0.1)
    source.shuffle(ratios)
    assert overloadsim.lasts_s(at, ratios) == 0.0
    assert overloadsim.lasts_s(at, [0.0] * len(at)) == 0.0
    assert overloadsim.lasts_s([when * 100 for when in at], ratios) == 0.0


def test_larger_batches_take_no_less() -> None:
    known = overloadsim.learn([*seen(1, 7.0), *seen(8, 6.5), *seen(32, 16.0)])
    assert known.batch_ms == {1: 7.0, 8: 7.0, 32: 16.0}


@pytest.mark.parametrize(
    "found", [[], seen(32, 16.0), [*seen(1, 6.0, 4), *seen(32, 16.0)], [*seen(1, 6.0), *seen(8, 8.0)], seen(1, 6.0, 4)]
)
def test_too_little_is_said(found: list[Seen]) -> None:
    with pytest.raises(ValueError, match="say too little of what batches take"):
        overloadsim.learn(found)


def test_the_pause_between_batches_is_what_they_leave_of_the_time() -> None:
    assert overloadsim.pause_ms(20.0, 2000.0, 9.5) == pytest.approx(0.5)
    assert overloadsim.pause_ms(20.0, 2000.0, 10.5) == 0.0


def test_the_scenario_is_one_that_the_simulator_follows(tmp_path: Path) -> None:
    path = tmp_path / "scenario.toml"
    path.write_text(overloadsim.scenario(KNOWN, 2000.0, 100.0, [0.5, 2.0], 3.0))
    half, twice = overloadsim.simulate(path)
    assert (half["times"], twice["times"]) == (0.5, 2.0)
    assert half["goodput"] == pytest.approx(1000, rel=0.1)
    assert twice["goodput"] == pytest.approx(32 / 0.016, rel=0.1)
    assert half["batch_rows"] < twice["batch_rows"] == pytest.approx(32, abs=0.5)
    assert half["p50_ms"] < twice["p50_ms"] < twice["p99_ms"] < 110


def test_the_simulator_is_compared_with_what_was_measured() -> None:
    said = {"times": 2.0, "goodput": 900.0, "p50_ms": 60.0, "p99_ms": 80.0, "batch_rows": 32.0}
    load: dict[str, Any] = {"goodput": 1000.0, "p50_ms": 60.0, "p99_ms": 100.0, "batch_rows": None}
    off = overloadsim.off_by(said, load)
    assert off == {"goodput": pytest.approx(-0.1), "p50_ms": 0.0, "p99_ms": pytest.approx(-0.2)}
    bars = overloadtell.simulator_bars({"loads": [load]}, [said])
    assert [(bar["measured"], bar["kept"]) for bar in bars] == [
        ("-10% at most", True),
        ("+0% at most", True),
        ("-20% at most", False),
    ]
    lines = overloadtell.simulator({"loads": [load]}, {"known": KNOWN._asdict(), "loads": [said]})
    assert "| 2 x | 900 (-10%) | 60.0 (+0%) | 80.0 (-20%) |  |" in lines
