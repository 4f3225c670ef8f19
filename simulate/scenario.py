"""What is simulated, as plain values: read.py makes them of a file, run.py obeys them. Times are seconds."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final, Literal

from penstock.broker.options import BrokerOptions
from penstock.simulate.costs import BatchCost
from penstock.worker.config import ModelConfig

NEVER: Final = float("inf")

Arrivals = Literal["poisson", "bursts", "diurnal", "trace", "users"]
SweepKey = Literal["load", "without", "workers"]


class ScenarioError(Exception):
    """A scenario or a trace that cannot be followed; the message names the file, the line, the key and what is
    expected."""


@dataclass(frozen=True, slots=True)
class ModelPlan:
    """A model, of which ``config`` is what a model.toml would say."""

    name: str
    version: str
    config: ModelConfig
    batchable: bool
    cost: BatchCost


@dataclass(frozen=True, slots=True)
class Outage:
    """Workers die, and come back as new processes; times count from the first arrival. ``silent``: as a host that is
    cut off, whose end nothing tells the broker."""

    dies_s: float
    returns_s: float = NEVER
    silent: bool = False


@dataclass(frozen=True, slots=True)
class WorkerGroup:
    """Workers that are alike. ``instances``: batches that each runs at once, 0 for as many as a real one would;
    ``parallel``: of these, how many its device computes at once, 0 for all; ``speed``: a batch takes its time divided
    by it. ``models``: the names that they serve."""

    name: str
    count: int
    models: tuple[str, ...]
    instances: int = 0
    parallel: int = 0
    speed: float = 1.0
    outages: tuple[Outage, ...] = ()


@dataclass(frozen=True, slots=True)
class Traffic:
    """One stream of requests.

    ``models``: names and how likely each is. ``rows``: sizes, each as likely. ``rate``: a second, on average (of bursts
    between them). ``hangups``: the share of requests whose caller leaves, after ``hangup_after_s`` on average.
    """

    name: str
    arrivals: Arrivals
    models: tuple[tuple[str, float], ...] = ()
    rows: tuple[int, ...] = (1,)
    nbytes: int = 0
    tenant: str = ""
    priority: int = 0
    deadline_s: float = 30.0
    begin_s: float = 0.0
    end_s: float = NEVER
    rate: float = 0.0
    burst_rate: float = 0.0
    burst_every_s: float = 0.0
    burst_length_s: float = 0.0
    swing: float = 0.0
    day_s: float = 0.0
    users: int = 0
    think_s: float = 0.0
    hangups: float = 0.0
    hangup_after_s: float = 0.0
    trace: Path | None = None


@dataclass(frozen=True, slots=True)
class Delays:
    """``client_s``: between a client and its gateway, each way; ``hop_s``: between any two of our processes.
    ``broker_request_s``: processor time of the broker for each request."""

    client_s: float = 0.0
    hop_s: float = 50e-6
    broker_request_s: float = 10e-6


@dataclass(frozen=True, slots=True)
class Sweep:
    """Several runs: with every rate times so much, without some traffic, or with so many workers."""

    key: SweepKey
    values: tuple[float, ...] | tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Scenario:
    """``step_s``: what happens within so long happens at its end, which makes large scenarios cheaper; 0: nothing is
    put together. ``warmup_s``: what arrives before is not counted."""

    name: str
    duration_s: float
    groups: tuple[WorkerGroup, ...]
    models: tuple[ModelPlan, ...]
    traffic: tuple[Traffic, ...]
    seed: int = 0
    warmup_s: float = 0.0
    step_s: float = 0.0
    gateways: int = 1
    load: float = 1.0  # times which every rate is taken, and through which a trace's times are divided
    delays: Delays = field(default_factory=Delays)
    options: BrokerOptions = field(default_factory=BrokerOptions)
    sweep: Sweep | None = None

    def cases(self) -> list[tuple[str, Scenario]]:
        """The runs that are asked for, each with a label; one where nothing is swept over."""
        if self.sweep is None:
            return [("", self)]
        return [_case(self, self.sweep.key, value) for value in self.sweep.values]

    def with_workers(self, count: int, group: str) -> Scenario:
        groups = [replace(each, count=count) if each.name == group else each for each in self.groups]
        return replace(self, groups=tuple(groups), sweep=None)

    @property
    def workers(self) -> int:
        return sum(group.count for group in self.groups)


def _case(scenario: Scenario, key: SweepKey, value: float | str) -> tuple[str, Scenario]:
    single = replace(scenario, sweep=None)
    if key == "load":
        return f"load {value:g}", replace(single, load=float(value))
    if key == "workers":
        return f"{value} worker{'s' if value != 1 else ''}", single.with_workers(int(value), scenario.groups[0].name)
    if not value:
        return "all traffic", single
    left = tuple(each for each in scenario.traffic if each.name != value)
    return f"without {value}", replace(single, traffic=left)
