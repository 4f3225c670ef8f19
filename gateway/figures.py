"""What the dashboard and ``penstock top`` show: rates, quantiles and what is missing, out of what all processes count.

Pure: readings go in, a view comes out; time is part of a reading. Counters of a process that has started again begin
at nothing, and those of one that was not there a moment ago may be old: neither makes a rate that was not.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from operator import add, lt, sub
from typing import Final, NamedTuple, TypeAlias

from penstock.wire import errors
from penstock.wire.messages import Snapshot
from penstock.wire.metrics import FAMILIES, ROWS, SECONDS
from penstock.wire.models import READY, ModelState

WINDOW_S: Final = 5.0  # what rates and quantiles are over; a process tells of itself each second or two
_REMEMBERED_S: Final = 300.0  # a process that has left is missed so long
_MODELS_MAX: Final = 200  # in a view: those that are not ready, then the busiest
_REASON_MAX: Final = 500  # characters of why a model is not served
_NAMED_MAX: Final = 5  # models that are named among the problems
_ORDINARY: Final = "power"  # a busy GPU often is at the limit of its power
_FULL: Final = 0.9  # of shared memory, from which on it is a problem

BROKER: Final = "broker"
GATEWAY: Final = "gateway"
WORKER: Final = "worker"
RUNNER: Final = "jobs"  # who runs them

# Failures that say something of the server, and not only of who asked.
_OURS: Final = frozenset(
    {
        errors.MODEL_FAILED,
        errors.POISONED,
        errors.INTERNAL,
        errors.LOST,
        errors.OVERLOADED,
        errors.DEADLINE,
        errors.UNAVAILABLE,
    }
)

Number: TypeAlias = "float | tuple[float, ...]"
Key: TypeAlias = tuple[str, str, tuple[str, ...]]  # process, family, labels

_COUNTED: Final = frozenset(
    {
        "penstock_requests",
        "penstock_request_failures",
        "penstock_request_seconds",
        "penstock_batch_rows",
        "penstock_http_request_seconds",
        "penstock_job_seconds",
        "penstock_process_cpu_seconds",
    }
)


class Reading(NamedTuple):
    """What was known ``at`` a time, in seconds of a clock that never goes back. ``broker``: whether it answered; if not
    there is only the snapshot of the gateway that asked."""

    at: float
    broker: bool
    snapshots: Sequence[Snapshot]
    models: Sequence[ModelState]


@dataclass(frozen=True, slots=True)
class ModelFigures:
    """A version of a model. ``rate`` and ``failures``: requests a second. ``p50_s``, ``p95_s``: seconds from a
    request's acceptance to the end of its batch, None when none ended. ``rows``: of a batch, on average."""

    name: str
    version: str
    state: str
    reason: str
    workers: int  # that serve it
    queue: int
    running: int
    rate: float
    failures: float
    p50_s: float | None
    p95_s: float | None
    rows: float | None


@dataclass(frozen=True, slots=True)
class ProcessFigures:
    """A process. ``missing_s``: since when it has not been there, None while it is. ``cpu``: cores that it uses.
    ``rate``: requests a second that it has accepted (broker), run (worker) or answered (gateway), and ``p50_s`` and
    ``p95_s`` how long it took. ``shared_bytes``: of its shared memory."""

    name: str
    role: str
    missing_s: float | None
    cpu: float
    memory_bytes: int
    shared_bytes: int
    shared_used_bytes: int
    rate: float
    p50_s: float | None
    p95_s: float | None
    connections: int


@dataclass(frozen=True, slots=True)
class GpuFigures:
    """A GPU or a slice of one, by its UUID; what it does not tell is None. ``utilization``: 0 to 1. ``throttles``: what
    holds its clocks down."""

    uuid: str
    workers: list[str]
    lost: bool
    utilization: float | None
    memory_used_bytes: int | None
    memory_total_bytes: int | None
    temperature_c: float | None
    power_w: float | None
    power_limit_w: float | None
    throttles: list[str]


@dataclass(frozen=True, slots=True)
class View:
    """The whole server. ``seconds``: what rates and quantiles are over; 0: there is nothing yet to compare with, and
    they mean nothing. ``batches``: how many had at most ``bounds`` rows each, and more than the last."""

    seconds: float
    broker: bool
    gateway: str  # that says so
    problems: list[str]
    rate: float
    failures: dict[str, float]  # a second, by reason
    queue: int
    running: int
    p50_s: float | None
    p95_s: float | None
    rows: float | None
    batches: list[float]
    bounds: list[float]
    clients: int  # of the client library
    models: list[ModelFigures]
    models_left_out: int
    processes: list[ProcessFigures]
    gpus: list[GpuFigures] = field(default_factory=list)


def rise(before: Number, after: Number) -> Number:
    """By how much a counter, or each count of a histogram, has risen. One that is lower than it was began anew."""
    if isinstance(after, tuple):
        if not isinstance(before, tuple) or len(before) != len(after):
            return after
        return after if any(map(lt, after, before)) else tuple(map(sub, after, before))
    return after if isinstance(before, tuple) or after < before else after - before


def quantile(bounds: Sequence[float], counts: Sequence[float], share: float) -> float | None:
    """Below which value a ``share`` of what was observed lies, as far as buckets tell: evenly spread within one. Of
    what is above the last bound, that bound. None when nothing was observed."""
    total = sum(counts)
    if total <= 0:
        return None
    below, lowest = 0.0, 0.0
    for bound, count in zip(bounds, counts, strict=False):
        if count and below + count >= share * total:
            return min(bound, lowest + (bound - lowest) * max(0.0, share * total - below) / count)
        below += count
        lowest = bound
    return bounds[-1]


def rises(before: Reading, after: Reading) -> dict[Key, Number]:
    """What has been counted between two readings, where it is anything. A process that the first does not know has
    counted from nobody knows when, which is left out."""
    known = {name: series for name, series in before.snapshots if series}
    found: dict[Key, Number] = {}
    for name, series in after.snapshots:
        if name not in known:
            continue
        old = {(family, labels): value for family, labels, value, _ in known[name] if family in _COUNTED}
        for family, labels, value, _ in series:
            if family in _COUNTED:
                last = old.get((family, labels), 0.0)
                if value != last and value:
                    found[name, family, labels] = rise(last, value)
    return found


class _Step(NamedTuple):
    """From one reading to the next. ``sums`` as ``gather`` has them."""

    seconds: float
    sums: Mapping[tuple[str, ...], Number]


def gather(found: Mapping[Key, Number]) -> dict[tuple[str, ...], Number]:
    """Rises added up: under (family,) altogether, under (family, process), and under (family, model, version); of
    failures also under (family, "", "", reason)."""
    sums: dict[tuple[str, ...], Number] = {}
    for (process, family, labels), value in found.items():
        keys: tuple[tuple[str, ...], ...] = ((family,), (family, process))
        if labels:
            keys = *keys, (family, *labels[:2])
        if len(labels) > 2:
            keys = *keys, (family, "", "", labels[-1])
        for key in keys:
            before = sums.get(key)
            sums[key] = value if before is None else _plus(before, value)
    return sums


@dataclass(slots=True)
class _Known:
    role: str
    seen: float


@dataclass(slots=True)
class Window:
    """The last readings, and what they come to."""

    last: Reading | None = None
    _steps: deque[_Step] = field(default_factory=deque)
    _known: dict[str, _Known] = field(default_factory=dict)

    def add(self, reading: Reading) -> None:
        """Readings come in the order of their times."""
        last, steps = self.last, self._steps
        self.last = reading
        if last is not None and 0 < reading.at - last.at <= WINDOW_S:
            steps.append(_Step(reading.at - last.at, gather(rises(last, reading))))
            while len(steps) > 1 and sum(step.seconds for step in steps) > WINDOW_S + 0.5:
                steps.popleft()
        else:
            steps.clear()
        for name, series in reading.snapshots:
            role = _role(name, (sample.family for sample in series))
            known = self._known.get(name)
            if known is not None:
                known.seen, known.role = reading.at, role or known.role
            elif role:
                self._known[name] = _Known(role, reading.at)
        for name in [name for name, known in self._known.items() if reading.at - known.seen > _REMEMBERED_S]:
            del self._known[name]
        if not reading.broker:  # it alone is missing, as far as anybody knows
            for name, known in self._known.items():
                if name != BROKER:
                    known.seen = reading.at

    def view(self, gateway: str) -> View:
        """What the last reading and those before it say, to the gateway of that name."""
        assert self.last is not None, "there is a reading"
        return _view(self.last, _Sums(self._steps), self._known, gateway)


_ROLES: Final = {"worker": WORKER, "gateway": GATEWAY, "runner": RUNNER}  # by whose families a process has


def _role(name: str, families: Iterable[str]) -> str:
    """What a process is, as far as its series tell; "" while it has none."""
    if name == BROKER:
        return BROKER
    found = {FAMILIES[family].process for family in families if family in FAMILIES}
    return next((role for family, role in _ROLES.items() if family in found), "")


class _Sums:
    """What was counted in all steps: altogether, of each process, and of each model (name and version)."""

    def __init__(self, steps: Iterable[_Step]) -> None:
        self.seconds = 0.0
        self._sums: dict[tuple[str, ...], Number] = {}
        for step in steps:
            self.seconds += step.seconds
            for key, value in step.sums.items():
                before = self._sums.get(key)
                self._sums[key] = value if before is None else _plus(before, value)

    def rate(self, family: str, *whose: str) -> float:
        """A second. ``whose``: a process, a model's name and version, or nothing for all."""
        value = self._sums.get((family, *whose), 0.0)
        return 0.0 if isinstance(value, tuple) or not self.seconds else value / self.seconds

    def counts(self, family: str, *whose: str) -> tuple[float, ...]:
        """Of a histogram, its total last."""
        value = self._sums.get((family, *whose))
        return value if isinstance(value, tuple) else (0.0,) * (len(FAMILIES[family].bounds) + 2)

    def failures(self) -> dict[str, float]:
        """A second, by reason; the most frequent first."""
        family = "penstock_request_failures"
        found = {key[3]: self.rate(*key) for key in self._sums if key[0] == family and len(key) == 4}
        return dict(sorted(found.items(), key=lambda item: -item[1]))


def _plus(before: Number, value: Number) -> Number:
    if isinstance(before, tuple) and isinstance(value, tuple):
        return tuple(map(add, before, value))
    return value if isinstance(before, tuple) or isinstance(value, tuple) else before + value


class _Latency(NamedTuple):
    p50_s: float | None
    p95_s: float | None


def _latency(counts: Sequence[float]) -> _Latency:
    return _Latency(quantile(SECONDS, counts[:-1], 0.5), quantile(SECONDS, counts[:-1], 0.95))


def _mean(counts: Sequence[float]) -> float | None:
    observed = sum(counts[:-1])
    return counts[-1] / observed if observed else None


def _view(reading: Reading, sums: _Sums, known: Mapping[str, _Known], gateway: str) -> View:
    gauges: dict[str, dict[tuple[str, ...], float]] = {}
    for name, series in reading.snapshots:
        for family, labels, value, _ in series:
            if not isinstance(value, tuple):
                gauges.setdefault(family, {})[(*labels, name)] = value
    processes = _processes(reading, sums, known, gauges)
    serving = Counter(labels[:2] for labels, value in gauges.get("penstock_model_ready", {}).items() if value)
    models = [_model(state, serving[state.name, state.version], sums, gauges) for state in reading.models]
    batches = sums.counts("penstock_batch_rows")
    latency = _latency(sums.counts("penstock_request_seconds"))
    gpus = _gpus(gauges)
    callers = sum(gauges.get("penstock_callers", {}).values())
    ours = sum(1 for each in processes if each.role in (GATEWAY, RUNNER) and each.missing_s is None)
    failures = sums.failures()
    chosen = sorted(models, key=lambda model: (model.state == READY, -model.rate, model.name, model.version))
    return View(
        seconds=round(sums.seconds, 3),
        broker=reading.broker,
        gateway=gateway,
        problems=_problems(reading, processes, models, failures, gpus, gauges.get("penstock_arena_missing", {})),
        rate=sums.rate("penstock_requests"),
        failures=failures,
        queue=int(sum(gauges.get("penstock_queue_requests", {}).values())),
        running=int(sum(gauges.get("penstock_running_requests", {}).values())),
        p50_s=latency.p50_s,
        p95_s=latency.p95_s,
        rows=_mean(batches),
        batches=list(batches[:-1]),
        bounds=list(ROWS),
        clients=max(0, int(callers) - ours),
        models=sorted(chosen[:_MODELS_MAX], key=lambda model: (model.name, model.version)),
        models_left_out=len(models) - len(chosen[:_MODELS_MAX]),
        processes=processes,
        gpus=gpus,
    )


def _model(
    state: ModelState, workers: int, sums: _Sums, gauges: Mapping[str, Mapping[tuple[str, ...], float]]
) -> ModelFigures:
    key = state.name, state.version
    latency = _latency(sums.counts("penstock_request_seconds", *key))
    return ModelFigures(
        name=state.name,
        version=state.version,
        state=state.state,
        reason=state.reason[:_REASON_MAX],
        workers=workers,
        queue=int(gauges.get("penstock_queue_requests", {}).get((*key, BROKER), 0)),
        running=int(gauges.get("penstock_running_requests", {}).get((*key, BROKER), 0)),
        rate=sums.rate("penstock_requests", *key),
        failures=sums.rate("penstock_request_failures", *key),
        p50_s=latency.p50_s,
        p95_s=latency.p95_s,
        rows=_mean(sums.counts("penstock_batch_rows", *key)),
    )


_ORDER: Final = (BROKER, GATEWAY, RUNNER, WORKER)
_LATENCIES: Final = {
    GATEWAY: "penstock_http_request_seconds",
    RUNNER: "penstock_job_seconds",
    WORKER: "penstock_request_seconds",
}


def _processes(
    reading: Reading,
    sums: _Sums,
    known: Mapping[str, _Known],
    gauges: Mapping[str, Mapping[tuple[str, ...], float]],
) -> list[ProcessFigures]:
    found = []
    for name, about in known.items():

        def gauge(family: str, name: str = name) -> int:
            return int(gauges.get(family, {}).get((name,), 0))

        latency, rate = _Latency(None, None), sums.rate("penstock_requests", name)
        if about.role in _LATENCIES:
            counts = sums.counts(_LATENCIES[about.role], name)
            latency = _latency(counts)
            rate = sum(counts[:-1]) / sums.seconds if sums.seconds else 0.0
        found.append(
            ProcessFigures(
                name=name,
                role=about.role,
                missing_s=None if about.seen == reading.at else round(reading.at - about.seen, 1),
                cpu=sums.rate("penstock_process_cpu_seconds", name),
                memory_bytes=gauge("penstock_process_resident_bytes"),
                shared_bytes=gauge("penstock_arena_bytes"),
                shared_used_bytes=gauge("penstock_arena_used_bytes"),
                rate=rate,
                p50_s=latency.p50_s,
                p95_s=latency.p95_s,
                connections=gauge("penstock_http_connections"),
            )
        )
    return sorted(found, key=lambda process: (_ORDER.index(process.role), process.name))


def _gpus(gauges: Mapping[str, Mapping[tuple[str, ...], float]]) -> list[GpuFigures]:
    """Every GPU once, also when several workers are on it: they tell the same, a moment apart."""
    workers: dict[str, list[str]] = {}
    for uuid, worker in sorted(gauges.get("penstock_gpu_lost", {})):
        workers.setdefault(uuid, []).append(worker)
    found = []
    for uuid, names in workers.items():

        def told(what: str, key: tuple[str, str] = (uuid, names[0])) -> float | None:
            return gauges.get(f"penstock_gpu_{what}", {}).get(key)

        throttled = gauges.get("penstock_gpu_throttled", {})
        held = {key[1] for key, on in throttled.items() if on and (key[0], key[2]) == (uuid, names[0])}
        used, total = told("memory_used_bytes"), told("memory_total_bytes")
        found.append(
            GpuFigures(
                uuid=uuid,
                workers=names,
                lost=any(gauges["penstock_gpu_lost"][uuid, name] for name in names),
                utilization=told("utilization"),
                memory_used_bytes=None if used is None else int(used),
                memory_total_bytes=None if total is None else int(total),
                temperature_c=told("temperature_celsius"),
                power_w=told("power_watts"),
                power_limit_w=told("power_limit_watts"),
                throttles=sorted(held),
            )
        )
    return sorted(found, key=lambda gpu: gpu.workers)


def _problems(
    reading: Reading,
    processes: Sequence[ProcessFigures],
    models: Sequence[ModelFigures],
    failures: Mapping[str, float],
    gpus: Sequence[GpuFigures],
    without_arena: Mapping[tuple[str, ...], float],
) -> list[str]:
    """What somebody should know at three in the morning, the worst first."""
    found = []
    if not reading.broker:
        found.append("no broker answers: nothing runs until it is back, and nothing is known of other processes")
    found += [
        f"the {each.role} {each.name} has been missing for {each.missing_s:.0f} s"
        for each in processes
        if each.missing_s is not None and each.role != BROKER
    ]
    found += [f"the GPU of {', '.join(each.workers)} is lost: {each.uuid}" for each in gpus if each.lost]
    if reading.broker and not any(each.role == WORKER and each.missing_s is None for each in processes):
        found.append("no worker has joined")
    waiting = [model for model in models if model.state != READY]
    found += [
        f"model {each.name} version {each.version} is {each.state}" + (f": {each.reason}" if each.reason else "")
        for each in waiting[:_NAMED_MAX]
    ]
    if len(waiting) > _NAMED_MAX:
        found.append(f"{len(waiting) - _NAMED_MAX} more models are not ready")
    ours = {reason: rate for reason, rate in failures.items() if reason in _OURS}
    if ours:
        reasons = ", ".join(f"{reason} {rate:.2g}" for reason, rate in ours.items())
        found.append(f"requests fail, a second: {reasons}")
    found += [
        f"the shared memory of {each.name} is {each.shared_used_bytes / each.shared_bytes:.0%} full"
        for each in processes
        if each.shared_bytes and each.shared_used_bytes >= _FULL * each.shared_bytes
    ]
    found += [
        f"{each.name} found no memory for shared memory, and large tensors cost it more; free some, and restart it"
        for each in processes
        if without_arena.get((each.name,))
    ]
    found += [
        f"the GPU of {', '.join(each.workers)} is held down by {' and '.join(words)}: {each.uuid}"
        for each in gpus
        if (words := [word for word in each.throttles if word != _ORDINARY])
    ]
    return found
