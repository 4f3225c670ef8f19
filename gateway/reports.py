"""The whole server's series, on any gateway: as Prometheus text for /metrics, and as they are for the dashboard.

The broker holds the latest snapshot of every process; prometheus-client writes them down.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Final, NamedTuple, TypeAlias

from prometheus_client import CollectorRegistry, exposition
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.openmetrics import exposition as openmetrics
from prometheus_client.registry import Collector
from prometheus_client.samples import Exemplar

from penstock.gateway.triton import triton_metrics
from penstock.wire import metrics
from penstock.wire.messages import Metrics, Snapshot
from penstock.wire.metrics import COUNTER, FAMILIES, GAUGE, Family, Sample

_WAITING_MAX: Final = 100  # scrapes at the same time; more get what this gateway knows by itself


class Exposition(NamedTuple):
    """A way to write series down."""

    content_type: bytes
    write: Callable[[Collector], bytes]


PLAIN: Final = Exposition(exposition.CONTENT_TYPE_PLAIN_0_0_4.encode(), exposition.generate_latest)
# Has exemplars, too. Without a version, the library writes 1.0.
OPENMETRICS: Final = Exposition(
    b"application/openmetrics-text; version=1.0.0; charset=utf-8", openmetrics.generate_latest
)


def form_for(accept: bytes) -> Exposition:
    """What a scraper gets that sends this header."""
    return OPENMETRICS if b"application/openmetrics-text" in accept.lower() else PLAIN


# What hears the snapshots of all processes, and whether the broker has answered; None when it was not asked.
Hear: TypeAlias = "Callable[[Sequence[Snapshot], bool | None], None]"


class Reports:
    """Asks the broker for snapshots and renders them.

    ``ask_broker``: sends the question and returns its serial, or None when there is no broker. ``own``: this process's
    snapshot, which is all there is to report when no answer comes within ``timeout_s``.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        ask_broker: Callable[[], int | None],
        own: Callable[[], Snapshot],
        timeout_s: float,
    ) -> None:
        self._loop = loop
        self._ask_broker = ask_broker
        self._own = own
        self._timeout_s = timeout_s
        self._waiting: dict[int, tuple[Hear, asyncio.TimerHandle]] = {}

    def ask(self, report: Callable[[bytes], None], form: Exposition = PLAIN) -> None:
        """Have ``report`` called with the text, at the latest after the timeout."""
        self.ask_snapshots(lambda snapshots, broker: report(render(snapshots, broker, form)))

    def ask_snapshots(self, hear: Hear) -> None:
        """Have ``hear`` called, at the latest after the timeout; without the broker there is this gateway's alone."""
        if len(self._waiting) >= _WAITING_MAX:
            hear([self._own()], None)
            return
        serial = self._ask_broker()
        if serial is None:
            hear([self._own()], False)
            return
        self._waiting[serial] = hear, self._loop.call_later(self._timeout_s, self._give_up, serial)

    def arrived(self, metrics: Metrics) -> None:
        waiting = self._waiting.pop(metrics.serial, None)
        if waiting is not None:
            hear, timer = waiting
            timer.cancel()
            hear(merge(metrics.snapshots, self._own()), True)

    def _give_up(self, serial: int) -> None:
        hear, _ = self._waiting.pop(serial)
        hear([self._own()], False)


def merge(snapshots: Iterable[Snapshot], own: Snapshot) -> list[Snapshot]:
    """``own``: this gateway's, which is newer than what the broker has of it."""
    return [*(each for each in snapshots if each.name != own.name), own]


def render(snapshots: Sequence[Snapshot], broker: bool | None, form: Exposition = PLAIN) -> bytes:
    """The series of all processes. ``broker``: whether it answers, None when it was not asked."""
    registry = CollectorRegistry()
    registry.register(_Collector(snapshots, broker))
    return form.write(registry)


class _Collector(Collector):
    def __init__(self, snapshots: Sequence[Snapshot], broker: bool | None) -> None:
        self._snapshots = snapshots
        self._broker = broker

    def collect(self) -> Iterator[Metric]:
        if self._broker is not None:
            yield GaugeMetricFamily("penstock_broker_up", "1 when the broker answers", float(self._broker))
        samples: dict[str, list[tuple[str, Sample]]] = {}
        for name, series in self._snapshots:
            for sample in series:
                samples.setdefault(sample.family, []).append((name, sample))
        for family, about in FAMILIES.items():
            if family in samples and not about.quiet:
                yield _metric(family, about, samples[family])
        yield from triton_metrics(sample for _, series in self._snapshots for sample in series)


def _metric(family: str, about: Family, samples: Sequence[tuple[str, Sample]]) -> Metric:
    labels = [*about.labels, about.process] if about.process else list(about.labels)
    metric: CounterMetricFamily | GaugeMetricFamily | HistogramMetricFamily
    if about.kind == COUNTER:
        metric = CounterMetricFamily(family, about.help, labels=labels)
    elif about.kind == GAUGE:
        metric = GaugeMetricFamily(family, about.help, labels=labels)
    else:
        metric = HistogramMetricFamily(family, about.help, labels=labels)
    for process, (_, values, value, exemplars) in samples:
        full = [*values, process] if about.process else list(values)
        if isinstance(value, tuple):
            assert isinstance(metric, HistogramMetricFamily)
            metric.add_metric(full, _buckets(about.bounds, value, exemplars), value[-1])
        else:
            assert not isinstance(metric, HistogramMetricFamily)
            metric.add_metric(full, value)
    return metric


def _buckets(
    bounds: Sequence[float], value: Sequence[float], exemplars: Sequence[metrics.Exemplar]
) -> list[tuple[str, float] | tuple[str, float, Exemplar]]:
    """Cumulative counts by upper bound, as Prometheus wants them."""
    told = {each.bucket: Exemplar({"request_id": each.request}, each.value, each.at) for each in exemplars}
    total, buckets = 0.0, list[tuple[str, float] | tuple[str, float, Exemplar]]()
    for at, (bound, count) in enumerate(zip([*map(str, bounds), "+Inf"], value[:-1], strict=True)):
        total += count
        buckets.append((bound, total, told[at]) if at in told else (bound, total))
    return buckets
