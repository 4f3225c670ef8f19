"""How many workers a scenario needs: doubled until they are enough, then halved between enough and too few. Pure."""

from __future__ import annotations

import re
from collections.abc import Generator
from dataclasses import dataclass
from typing import Final

from penstock.simulate.figures import Figures
from penstock.simulate.scenario import Scenario, WorkerGroup

_TARGET: Final = re.compile(r"p(\d{1,2}(?:\.\d{1,3})?)=(\d+(?:\.\d+)?)(us|ms|s)", re.ASCII)
_UNITS_S: Final = {"us": 1e-6, "ms": 1e-3, "s": 1.0}


@dataclass(frozen=True, slots=True)
class Target:
    """What must hold: a share of the answers within a time, and a share of all requests answered inside their
    deadlines. ``quantile`` 0: no matter how long answers take."""

    quantile: float = 0.0
    limit_s: float = 0.0
    goodput: float = 0.0

    def met(self, figures: Figures) -> bool:
        total = figures.total
        if total.good_share < self.goodput or not total.answered:
            return False
        return not self.quantile or figures.quantile(self.quantile) <= self.limit_s

    def __str__(self) -> str:
        said = [f"p{self.quantile * 100:g} within {self.limit_s * 1e3:g} ms"] if self.quantile else []
        said += [f"{self.goodput * 100:g} % of requests inside their deadline"] if self.goodput else []
        return " and ".join(said)


def parse_target(text: str) -> tuple[float, float]:
    """ "p99=50ms" -> (0.99, 0.05). Raises ValueError."""
    match = _TARGET.fullmatch(text.strip())
    if match is None or not float(match[1]) or not float(match[2]):
        raise ValueError(f"{text!r} is no target; write a percentile and a time, such as p99=50ms")
    return float(match[1]) / 100, float(match[2]) * _UNITS_S[match[3]]


def search(first: int, most: int) -> Generator[int, bool, int | None]:
    """Yields how many to try, and is sent whether that was enough. Returns the least that was, if none of fewer that
    were tried is; None: not even ``most`` are. More are taken never to be worse."""
    low, high = 0, first  # too few; perhaps enough
    while not (yield high):
        low = high
        if high >= most:
            return None
        high = min(most, high * 2)
    while high - low > 1:
        middle = (low + high) // 2
        if (yield middle):
            high = middle
        else:
            low = middle
    return high


def first_guess(scenario: Scenario, group: WorkerGroup) -> int:
    """How many workers of a group the average load would keep busy in full batches, about: where to begin."""
    plans = {plan.name: plan for plan in scenario.models}
    wide = group.parallel or group.instances or 1
    busy = 0.0
    for traffic in scenario.traffic:
        for name, share in traffic.models:
            plan = plans[name]
            size = plan.config.rows_max if plan.batchable else 1
            rows = sum(traffic.rows) / len(traffic.rows) if plan.batchable else 1
            busy += traffic.rate * scenario.load * share * rows * plan.cost.mean(size) / size
    return max(1, int(busy / (group.speed * wide)))
