"""Small scenarios, as text and as values."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from penstock.simulate.arrivals import Arrivals
from penstock.simulate.costs import BatchCost
from penstock.simulate.read import parse_scenario
from penstock.simulate.scenario import Delays, ModelPlan, Scenario, Traffic, WorkerGroup
from penstock.wire.messages import Form
from penstock.worker.config import ModelConfig

SMALL = """\
duration = "2s"
seed = 3

[[models]]
name = "m"
max_batch_size = 8
fixed_ms = 2.0
per_row_ms = 0.5

[[workers]]
count = 2

[[traffic]]
model = "m"
rate = 400
deadline = "100ms"
"""

AT_ONCE = Delays(0.0, 0.0, 0.0)  # nothing takes time but the computing


def parse(text: str) -> Scenario:
    return parse_scenario(text, Path("some/scenario.toml"))


def model(name: str = "m", size: int = 8, cost: BatchCost | None = None, **config: Any) -> ModelPlan:
    return ModelPlan(name, "1", ModelConfig(max_batch_size=size, **config), True, cost or BatchCost(0.002, 0.0005))


def scenario(**given: Any) -> Scenario:
    """Two workers, a model of batches of eight, and 400 requests a second for two seconds."""
    defaults: dict[str, Any] = {
        "name": "small",
        "duration_s": 2.0,
        "groups": (WorkerGroup("gpu", 2, ("m",)),),
        "models": (model(),),
        "traffic": (traffic(),),
        "seed": 3,
    }
    return Scenario(**(defaults | given))


def traffic(**given: Any) -> Traffic:
    defaults: dict[str, Any] = {
        "name": "requests",
        "arrivals": "poisson",
        "models": (("m", 1.0),),
        "rate": 400.0,
        "deadline_s": 0.1,
        "end_s": 2.0,
    }
    return Traffic(**(defaults | given))


def form(model: str, version: str, rows: int, nbytes: int, tenant: str, priority: int) -> Form:
    return Form(model, version, priority, tenant, rows, nbytes, b"", b"")


def times(made: Scenario) -> list[float]:
    """When requests come, in seconds."""
    return [arrival.at for arrival in Arrivals(made, form)]
