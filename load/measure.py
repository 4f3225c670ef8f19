"""One load: has it made, looks at the server's processor time and batches meanwhile, and says what came of it."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple

from penstock.load.histogram import Histogram
from penstock.load.job import LATE, OK, SLICES, UNSENT, Job, Tally
from penstock.load.processes import family, holders, listeners, read_all, unix_listeners
from penstock.load.prometheus import Reading, mean_batch, read_metrics
from penstock.load.run import divide, run_load
from penstock.load.server import HttpServer, ServerError

QUANTILES: Final = (0.5, 0.9, 0.99, 0.999)
GENERATOR_BUSY: Final = 0.8  # of a core: from here on the generator may have been what limits
_BEHIND_SHARE: Final = 0.1  # of the median that sending late may take without a word


class Look(NamedTuple):
    """At a server, at one time: seconds of processor time by process, or why these are not known; and its metrics."""

    cpu_s: Mapping[Any, float]
    unknown: str
    metrics: Reading


class Account:
    """Knows which processes the server is. ``pids``: said by the user. ``server``: over HTTP. ``metrics``: where its
    metrics are, the whole URL. ``runtime``: the runtime directory of a Penstock without HTTP."""

    def __init__(
        self,
        model: str,
        pids: Collection[int] = (),
        server: HttpServer | None = None,
        metrics: HttpServer | None = None,
        runtime: Path | None = None,
    ) -> None:
        self._model = model
        self._pids = pids
        self._server = server
        self._metrics = metrics
        self._runtime = runtime
        self._roots: set[int] | None = None

    def look(self) -> Look:
        """The first takes longest, since it has to find the processes."""
        if self._roots is None:
            self._roots = self._find_roots()
        # Processor time first: a server under load may take its time to tell its metrics.
        stats = read_all() if self._roots else {}
        found = family(self._roots, stats, os.getpid())
        metrics = self._read_metrics()
        if found and (self._pids or len(found) >= len(metrics.cpu_s)):
            return Look({pid: stats[pid].cpu_s for pid in found}, "", metrics)
        if metrics.cpu_s:  # a Penstock whose processes were not started together, or on another machine
            return Look(metrics.cpu_s, "", metrics)
        unknown = "its processes are not to be found on this machine; name one of them with --pid if they are here"
        return Look({}, unknown, metrics)

    def _find_roots(self) -> set[int]:
        roots = set(self._pids)
        if not roots and self._server is not None and self._server.address:
            roots = holders(listeners(self._server.address, self._server.place.port))
        if not roots and self._runtime is not None:
            roots = holders(unix_listeners(self._runtime))
        return roots

    def _read_metrics(self) -> Reading:
        if self._metrics is None:
            return Reading({}, None, None)
        try:
            status, text = self._metrics.ask("GET", "")
        except ServerError:
            status, text = 0, b""
        return read_metrics(text.decode("utf-8", "replace") if status == 200 else "", self._model)


@dataclass(frozen=True, slots=True)
class Figures:
    """What came of a load. Seconds, and shares of 1. ``quantiles``: of QUANTILES. ``cpu_s``: of the server, for each
    request that it answered; None with the reason in ``unknown``. ``generator``: the busiest one's share of a core.
    ``behind_s``: how much later than intended 99 of 100 requests were sent at most."""

    connections: int
    rate: float
    duration_s: float
    requests_per_s: float
    in_time_per_s: float
    quantiles: Sequence[float]
    max_s: float
    errors: Mapping[str, int]
    texts: Mapping[str, str]
    late: int
    cpu_s: float | None
    unknown: str
    mean_batch: float | None
    generator: float
    behind_s: float
    outstanding: int
    outstanding_max: int
    tally: Tally

    @property
    def p99_s(self) -> float:
        return self.quantiles[2]

    def histogram(self) -> Histogram:
        return self.tally.taken()


def measure(
    job: Job, processes: int, account: Account, progress: Callable[[float, int], None] = lambda elapsed_s, answers: None
) -> Figures:
    """Raises LoadError."""
    account.look()
    looks: list[Look] = []
    tally = run_load(divide(job, processes), progress, lambda: looks.append(account.look()))
    return figure(job, tally, *looks)


def figure(job: Job, tally: Tally, before: Look, after: Look) -> Figures:
    answered = sum(each.answered for each in tally.slices)
    taken = tally.taken()
    outcomes = dict(tally.outcomes)
    in_time, late = outcomes.pop(OK, 0), outcomes.pop(LATE, 0)
    unknown = before.unknown or after.unknown or ("" if answered else "nothing was answered")
    used = sum(cpu_s - before.cpu_s.get(pid, 0.0) for pid, cpu_s in after.cpu_s.items())
    *quantiles, _ = *taken.quantiles(QUANTILES), 0.0
    return Figures(
        connections=job.connections,
        rate=job.rate,
        duration_s=job.duration_s,
        requests_per_s=answered / job.duration_s,
        in_time_per_s=answered / job.duration_s * in_time / max(1, in_time + late),
        quantiles=[each / 1e9 for each in quantiles],
        max_s=taken.largest / 1e9,
        errors=dict(sorted(outcomes.items())),
        texts=tally.texts,
        late=late,
        cpu_s=None if unknown else used / answered,
        unknown=unknown,
        mean_batch=mean_batch(before.metrics, after.metrics),
        generator=max(tally.own_cpu_s) / job.duration_s,
        behind_s=tally.behind.quantile(0.99) / 1e9,
        outstanding=tally.outstanding,
        outstanding_max=job.outstanding_max if job.rate else 0,
        tally=tally,
    )


def doubts(figures: Figures) -> list[str]:
    """Why these figures may be more of the generator than of the server, a sentence each."""
    said = []
    if figures.generator > GENERATOR_BUSY:
        said.append(
            f"the generator used {figures.generator:.0%} of a core: it may have been what limits, and made latencies "
            "longer; give it more with --processes, or another machine"
        )
    if figures.behind_s > max(1e-3, _BEHIND_SHARE * figures.quantiles[0]):
        said.append(
            f"1 of 100 requests was sent {figures.behind_s * 1e3:,.1f} ms or more after it was to be: the generator "
            "had too little processor time, and the latencies have it in them"
        )
    return said


def remarks(figures: Figures) -> list[str]:
    """What must be known to read these figures, a sentence each."""
    said = doubts(figures)
    if unsent := figures.errors.get(UNSENT, 0):
        said.append(
            f"{figures.outstanding_max:,} requests were outstanding, and {unsent:,} that were to start meanwhile were "
            "not sent: the server does not keep up with this rate (--outstanding allows more)"
        )
    if figures.late:
        in_time = figures.in_time_per_s
        said.append(f"{figures.late:,} answers came after the deadline; {in_time:,.0f} a second before it")
    said += [f"{outcome}: {text}" for outcome, text in sorted(figures.texts.items())]
    return said


def series(figures: Figures) -> list[tuple[float, float, float, float]]:
    """Of each slice of the time in which something was to be answered: its middle in seconds, p50, p99 (seconds), and
    answers a second."""
    width = figures.duration_s / SLICES
    found = []
    for number, each in enumerate(figures.tally.slices):
        if each.taken.total:
            p50, p99 = each.taken.quantiles((0.5, 0.99))
            found.append(((number + 0.5) * width, p50 / 1e9, p99 / 1e9, each.answered / width))
    return found
