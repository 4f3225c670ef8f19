"""What came of a run: counted while it goes on, and summed up at its end."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from penstock.load.histogram import Histogram
from penstock.simulate.arrivals import Kind
from penstock.simulate.scenario import Scenario
from penstock.wire.errors import CANCELLED, DEADLINE, DRAINING, OVERLOADED, TOO_LARGE, UNAVAILABLE

QUANTILES: Final = (0.5, 0.99, 0.999)
PARTS: Final = 60  # of the time, in the plots

ANSWERED: Final = "answered"
# How else a request ends. What the broker turned away was refused, whatever its reason.
_REFUSED: Final = frozenset({OVERLOADED, UNAVAILABLE, DRAINING, TOO_LARGE})


@dataclass(slots=True)
class Row:
    """Requests of one kind, that arrived while it counted. ``good``: answered inside the deadline."""

    arrived: int = 0
    good: int = 0
    late: int = 0
    refused: int = 0
    expired: int = 0
    cancelled: int = 0
    failed: int = 0
    latency: Histogram = field(default_factory=Histogram)

    @property
    def answered(self) -> int:
        return self.good + self.late

    @property
    def ended(self) -> int:
        return self.answered + self.refused + self.expired + self.cancelled + self.failed

    @property
    def good_share(self) -> float:
        """Of those whose caller did not leave."""
        wanted = self.arrived - self.cancelled
        return self.good / wanted if wanted else 0.0

    def add(self, other: Row) -> None:
        for name in ("arrived", "good", "late", "refused", "expired", "cancelled", "failed"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.latency.add(other.latency)


@dataclass(slots=True)
class Part:
    """A stretch of time, by when requests arrived."""

    arrived: int = 0
    good: int = 0
    turned_away: int = 0  # refused, expired or failed
    latency: Histogram = field(default_factory=Histogram)


@dataclass(slots=True)
class Batches:
    """Of one model. ``seconds``: of a device's time."""

    sizes: Counter[int] = field(default_factory=Counter)  # rows: batches
    reasons: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0

    @property
    def count(self) -> int:
        return self.sizes.total()

    @property
    def mean_rows(self) -> float:
        return sum(rows * count for rows, count in self.sizes.items()) / max(1, self.count)


@dataclass(slots=True)
class WorkerTime:
    """Of one worker, over all its lives, while it counted. ``busy_s`` of each thing that computes at once."""

    name: str
    group: str
    busy_s: float = 0.0
    alive_s: float = 0.0
    batches: int = 0
    requests: int = 0

    @property
    def utilisation(self) -> float:
        return self.busy_s / self.alive_s if self.alive_s else 0.0


class Collector:
    """Is told what happens. Times are seconds of the run's clock, on which the traffic begins at ``origin``."""

    def __init__(self, scenario: Scenario, kinds: Sequence[Kind], origin: float) -> None:
        self._begin, self._end = origin + scenario.warmup_s, origin + scenario.duration_s
        self._kinds = kinds
        self.rows = [Row() for _ in kinds]
        self.codes: Counter[str] = Counter()
        self.parts = [Part() for _ in range(PARTS)]
        self._part_s = (self._end - self._begin) / PARTS
        self.batches: dict[str, Batches] = {}
        self.tenants: dict[str, float] = {kind.form.tenant: 0.0 for kind in kinds}  # seconds of devices
        self.workers: dict[str, WorkerTime] = {}

    def arrived(self, kind: int, at: float) -> None:
        if at >= self._begin:
            self.rows[kind].arrived += 1
            self._part(at).arrived += 1

    def ended(self, kind: int, arrived: float, now: float, deadline_s: float, outcome: str) -> None:
        """``now``: when its client has heard. ``outcome``: ANSWERED, or an error's code."""
        if arrived < self._begin:
            return
        row, part = self.rows[kind], self._part(arrived)
        if outcome == ANSWERED:
            took = now - arrived
            # Less than a rounding error beyond it is not late.
            if took <= deadline_s + 1e-9:
                row.good += 1
                part.good += 1
            else:
                row.late += 1
            took_ns = int(took * 1e9)
            row.latency.record(took_ns)
            part.latency.record(took_ns)
            return
        self.codes[outcome] += 1
        if outcome == CANCELLED:
            row.cancelled += 1
            return
        part.turned_away += 1
        if outcome == DEADLINE:
            row.expired += 1
        elif outcome in _REFUSED:
            row.refused += 1
        else:
            row.failed += 1

    def _part(self, at: float) -> Part:
        return self.parts[min(PARTS - 1, max(0, int((at - self._begin) / self._part_s)))]

    def worker(self, name: str, group: str) -> WorkerTime:
        return self.workers.setdefault(name, WorkerTime(name, group))

    def lived(self, worker: WorkerTime, begin: float, end: float, wide: int) -> None:
        """``wide``: how much of it computes at once."""
        worker.alive_s += wide * self._inside(begin, end)

    def ran(
        self, worker: WorkerTime, model: str, rows: int, reason: str, begin: float, end: float, shares: dict[str, int]
    ) -> None:
        """A batch has had a device from ``begin`` to ``end``. ``shares``: rows by tenant."""
        inside = self._inside(begin, end)
        if not inside:
            return
        worker.busy_s += inside
        worker.batches += 1
        batches = self.batches.get(model)
        if batches is None:
            batches = self.batches[model] = Batches()
        batches.sizes[rows] += 1
        batches.reasons[reason] += 1
        batches.seconds += inside
        for tenant, count in shares.items():
            self.tenants[tenant] += inside * count / rows

    def cut(self, worker: WorkerTime, begin: float, end: float) -> None:
        """A batch was lost with its worker."""
        worker.busy_s += self._inside(begin, end)

    def _inside(self, begin: float, end: float) -> float:
        return max(0.0, min(end, self._end) - max(begin, self._begin))


@dataclass(slots=True)
class Figures:
    """Of one run. ``rows``: by model, tenant and priority; ``retries``: requests given to another worker after one was
    lost. ``broker_busy``: share of one processor, as the scenario has it. ``events``: that the run took."""

    label: str
    seconds: float
    total: Row
    rows: dict[tuple[str, str, int], Row]
    models: dict[str, Row]
    tenants: dict[str, Row]
    batches: dict[str, Batches]
    tenant_seconds: dict[str, float]
    workers: list[WorkerTime]
    parts: list[tuple[float, Part]]  # with the time in the middle of each
    codes: dict[str, int]
    retries: int
    broker_busy: float
    events: int
    part_s: float
    weights: Mapping[str, float]  # of tenants; 1 for others

    @property
    def answered_per_s(self) -> float:
        return self.total.answered / self.seconds

    @property
    def good_per_s(self) -> float:
        return self.total.good / self.seconds

    @property
    def utilisation(self) -> float:
        alive_s = sum(each.alive_s for each in self.workers)
        return sum(each.busy_s for each in self.workers) / alive_s if alive_s else 0.0

    @property
    def mean_rows(self) -> float:
        count = sum(each.count for each in self.batches.values())
        return sum(each.mean_rows * each.count for each in self.batches.values()) / count if count else 0.0

    @property
    def fairness(self) -> float:
        return jain(seconds / self.weights.get(tenant, 1.0) for tenant, seconds in self.tenant_seconds.items())

    def quantile(self, share: float) -> float:
        """Latency of answers, seconds."""
        return self.total.latency.quantile(share) / 1e9


def summarize(
    label: str, scenario: Scenario, collector: Collector, kinds: Sequence[Kind], retries: int, busy: float, events: int
) -> Figures:
    total = Row()
    rows: dict[tuple[str, str, int], Row] = {}
    models: dict[str, Row] = {}
    tenants: dict[str, Row] = {}
    for kind, row in zip(kinds, collector.rows, strict=True):
        form = kind.form
        total.add(row)
        rows.setdefault((form.model, form.tenant, form.priority), Row()).add(row)
        models.setdefault(form.model, Row()).add(row)
        tenants.setdefault(form.tenant, Row()).add(row)
    seconds = scenario.duration_s - scenario.warmup_s
    part_s = seconds / PARTS
    return Figures(
        label=label,
        seconds=seconds,
        total=total,
        rows=dict(sorted(rows.items())),
        models=dict(sorted(models.items())),
        tenants=dict(sorted(tenants.items())),
        batches=dict(sorted(collector.batches.items())),
        tenant_seconds=dict(sorted(collector.tenants.items())),
        workers=list(collector.workers.values()),
        parts=[(scenario.warmup_s + (number + 0.5) * part_s, part) for number, part in enumerate(collector.parts)],
        codes=dict(sorted(collector.codes.items())),
        retries=retries,
        broker_busy=busy,
        events=events,
        part_s=part_s,
        weights=scenario.options.tenant_weights,
    )


def jain(shares: Iterable[float]) -> float:
    """Jain's index: 1 when all have the same, 1/n when one of n has everything; 1 also where there is nothing."""
    values = list(shares)
    squares = sum(value * value for value in values)
    return sum(values) ** 2 / (len(values) * squares) if squares else 1.0


def as_object(figures: Figures) -> dict[str, Any]:
    """For machines: seconds, and nothing rounded. Two runs of one scenario and seed give the same."""
    return {
        "label": figures.label,
        "seconds": figures.seconds,
        "all": _row(figures.total, figures.seconds),
        "rows": [
            {"model": model, "tenant": tenant, "priority": priority} | _row(row, figures.seconds)
            for (model, tenant, priority), row in figures.rows.items()
        ],
        "errors": figures.codes,
        "retries": figures.retries,
        "batches": {
            model: {
                "count": each.count,
                "mean_rows": each.mean_rows,
                "sizes": {str(rows): count for rows, count in sorted(each.sizes.items())},
                "reasons": dict(sorted(each.reasons.items())),
                "seconds": each.seconds,
            }
            for model, each in figures.batches.items()
        },
        "workers": [
            {"name": each.name, "utilisation": each.utilisation, "batches": each.batches, "busy_s": each.busy_s}
            for each in figures.workers
        ],
        "utilisation": figures.utilisation,
        "broker_utilisation": figures.broker_busy,
        "tenants": {
            tenant: {"compute_s": seconds, "compute_share": seconds / (sum(figures.tenant_seconds.values()) or 1.0)}
            for tenant, seconds in figures.tenant_seconds.items()
        },
        "fairness": figures.fairness,
        "events": figures.events,
    }


def _row(row: Row, seconds: float) -> dict[str, Any]:
    latency = {
        str(share): value / 1e9 for share, value in zip(QUANTILES, row.latency.quantiles(QUANTILES), strict=True)
    }
    return {
        "arrived": row.arrived,
        "answered": row.answered,
        "good": row.good,
        "late": row.late,
        "refused": row.refused,
        "expired": row.expired,
        "cancelled": row.cancelled,
        "failed": row.failed,
        "answered_per_s": row.answered / seconds,
        "good_per_s": row.good / seconds,
        "good_share": row.good_share,
        "latency_s": latency | {"max": row.latency.largest / 1e9},
    }
