"""What every process counts, and how a snapshot of it travels.

A process adds to plain integers and short lists; with its beats it sends those that have changed to the broker, which
keeps the latest of each process, so that any gateway can report the whole server, and a model that nobody asks costs
nothing. prometheus-client only writes the text: its own counters take a lock and some microseconds for each request.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Sequence
from typing import Any, Final, NamedTuple, TypeAlias

from penstock.wire.errors import BadMessage
from penstock.wire.fields import Check, brief, integer, number, record, sequence, text

COUNTER: Final = "counter"
GAUGE: Final = "gauge"
HISTOGRAM: Final = "histogram"

# Upper bounds of histogram buckets. Seconds: from a tiny model's microseconds to the longest wait that is allowed.
SECONDS: Final = (
    0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0,
)  # fmt: skip
ROWS: Final = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0)

WHOLE_EVERY: Final = 30  # beats: then all series are told, whether they have changed or not
MAX_SAMPLES: Final = 100_000  # series in one process's snapshot
MAX_SERIES: Final = MAX_SAMPLES - 100  # of one process with labels; beside them, one of each family
MAX_NUMBER: Final = 1 << 49  # so that those of all peers together are whole numbers of 64 bits
MAX_LABEL: Final = 256
# Of a request, beside the label's own name: OpenMetrics allows 128 characters for both.
MAX_EXEMPLAR: Final = 100


class Family(NamedTuple):
    """A metric. ``process`` names the label that holds which process it came from; the broker fills that in, so that no
    process can speak for another. ``quiet``: it is for Triton's statistics, and not in /metrics."""

    kind: str
    help: str
    labels: tuple[str, ...] = ()
    process: str = ""
    bounds: tuple[float, ...] = ()
    quiet: bool = False


_MODEL: Final = ("model", "version")
_SIZE: Final = (*_MODEL, "rows")
_GPU: Final = ("gpu",)

FAMILIES: Final[dict[str, Family]] = {
    # The broker's.
    "penstock_requests": Family(COUNTER, "Requests that the broker accepted", _MODEL),
    "penstock_load_waits": Family(COUNTER, "Requests that waited for their model to be loaded", _MODEL),
    "penstock_retries": Family(COUNTER, "Requests given to another worker after one was lost", _MODEL),
    "penstock_queue_requests": Family(GAUGE, "Requests that wait in the broker", _MODEL),
    "penstock_running_requests": Family(GAUGE, "Requests that a worker holds", _MODEL),
    "penstock_held_bytes": Family(GAUGE, "Bytes of tensors in messages that the broker holds"),
    "penstock_sequences": Family(GAUGE, "Sequences that are open"),
    "penstock_workers": Family(GAUGE, "Workers that are connected"),
    "penstock_callers": Family(GAUGE, "Gateways and clients that are connected"),
    # A worker's.
    "penstock_queue_seconds": Family(
        HISTOGRAM,
        "From a request's acceptance by the broker to the start of its batch",
        _MODEL,
        "worker",
        SECONDS,
    ),
    "penstock_request_seconds": Family(
        HISTOGRAM, "From a request's acceptance by the broker to the end of its batch", _MODEL, "worker", SECONDS
    ),
    "penstock_compute_seconds": Family(HISTOGRAM, "How long a batch ran", _MODEL, "worker", SECONDS),
    "penstock_batch_rows": Family(HISTOGRAM, "Rows of a batch", _MODEL, "worker", ROWS),
    "penstock_batch_rows_max": Family(
        GAUGE, "Rows of a full batch, as configured or picked for latency_target", _MODEL, "worker"
    ),
    "penstock_expected_batch_seconds": Family(
        GAUGE, "How long a full batch is expected to run, as measured", _MODEL, "worker"
    ),
    "penstock_model_run_bytes": Family(
        GAUGE, "Memory that a model ran in when it was warmed up, beside its weights", _MODEL, "worker"
    ),
    "penstock_heap_bytes": Family(
        GAUGE, "Private weights, and memory that ONNX Runtime holds to run models", (), "worker"
    ),
    "penstock_batches": Family(COUNTER, "Batches, by why they were closed", (*_MODEL, "reason"), "worker"),
    "penstock_model_ready": Family(GAUGE, "1 when the worker serves the model", _MODEL, "worker"),
    "penstock_model_loads": Family(
        COUNTER, "Times that a version was loaded, or could not be", (*_MODEL, "outcome"), "worker"
    ),
    "penstock_model_load_seconds": Family(
        GAUGE, "How long it took to load it, and to warm it up, the last time", _MODEL, "worker"
    ),
    "penstock_model_evictions": Family(
        COUNTER, "Times that a version was unloaded to make room for another", _MODEL, "worker"
    ),
    # Of requests, each counts the whole of its batch.
    "penstock_input_seconds": Family(COUNTER, "Gathering inputs for batches, of all requests", _MODEL, "worker"),
    "penstock_model_seconds": Family(COUNTER, "In the model itself, of all requests", _MODEL, "worker"),
    "penstock_failed_seconds": Family(
        COUNTER, "From acceptance to the end of the batch, of requests that failed in one", _MODEL, "worker"
    ),
    "penstock_failed_rows": Family(COUNTER, "Rows of requests that failed in a batch", _MODEL, "worker"),
    "penstock_last_batch_seconds": Family(GAUGE, "When a batch ended last, Unix time", _MODEL, "worker"),
    "penstock_model_bytes": Family(
        GAUGE, "Weights of a model and memory that it runs in", (*_MODEL, "device"), "worker"
    ),
    # Of batches, by their rows: see size_label.
    "penstock_size_batches": Family(COUNTER, "Batches", _SIZE, "worker", quiet=True),
    "penstock_size_input_seconds": Family(COUNTER, "Gathering their inputs", _SIZE, "worker", quiet=True),
    "penstock_size_model_seconds": Family(COUNTER, "In the model itself", _SIZE, "worker", quiet=True),
    "penstock_size_output_seconds": Family(COUNTER, "Taking apart their outputs", _SIZE, "worker", quiet=True),
    "penstock_unacknowledged_bytes": Family(GAUGE, "Results kept until acknowledged", (), "worker"),
    # A worker's for a GPU, as NVML tells. ``gpu``: its UUID. Several workers on one GPU tell the same of it.
    "penstock_gpu_utilization": Family(GAUGE, "Share of the time that something ran on it, 0 to 1", _GPU, "worker"),
    "penstock_gpu_memory_used_bytes": Family(GAUGE, "Memory of the GPU that is taken, by anyone", _GPU, "worker"),
    "penstock_gpu_memory_total_bytes": Family(GAUGE, "Memory of the GPU", _GPU, "worker"),
    "penstock_gpu_temperature_celsius": Family(GAUGE, "Temperature of the GPU", _GPU, "worker"),
    "penstock_gpu_power_watts": Family(GAUGE, "Power that the GPU draws", _GPU, "worker"),
    "penstock_gpu_power_limit_watts": Family(GAUGE, "Power that the GPU may draw", _GPU, "worker"),
    "penstock_gpu_energy_joules": Family(COUNTER, "Energy since the driver was loaded", _GPU, "worker"),
    "penstock_gpu_throttled": Family(
        GAUGE, "1 while clocks are held down, by heat, power, power_brake or hardware", (*_GPU, "reason"), "worker"
    ),
    "penstock_gpu_ecc_errors": Family(
        COUNTER, "Errors of its memory that could not be corrected, since the worker began", _GPU, "worker"
    ),
    "penstock_gpu_lost": Family(GAUGE, "1 when nothing can run on it; the worker ends", _GPU, "worker"),
    # A gateway's.
    "penstock_http_responses": Family(COUNTER, "HTTP responses", ("code",), "gateway"),
    "penstock_http_request_seconds": Family(
        HISTOGRAM, "From the end of an inference request to its response", (), "gateway", SECONDS
    ),
    "penstock_http_refusal_seconds": Family(
        HISTOGRAM, "From the end of a request to its refusal with 503 or 504", (), "gateway", SECONDS
    ),
    "penstock_http_connections": Family(GAUGE, "Open HTTP connections", (), "gateway"),
    "penstock_http_cut_off": Family(
        COUNTER, "HTTP connections that were cut off because nobody read the answer", (), "gateway"
    ),
    "penstock_http_body_bytes": Family(GAUGE, "Bytes of request bodies in memory", (), "gateway"),
    "penstock_cache_hits": Family(COUNTER, "Requests whose answer was kept", _MODEL, "gateway"),
    "penstock_cache_misses": Family(COUNTER, "Requests whose answer was not kept, so computed", _MODEL, "gateway"),
    "penstock_cache_waits": Family(COUNTER, "Requests that waited for the same to be computed", _MODEL, "gateway"),
    "penstock_cache_hit_seconds": Family(COUNTER, "From the end of requests to their kept answers", _MODEL, "gateway"),
    "penstock_cache_miss_seconds": Family(
        COUNTER, "From the end of requests until it was known that there is no kept answer", _MODEL, "gateway"
    ),
    "penstock_cache_entries": Family(GAUGE, "Answers that are kept, of all gateways of the host", (), "gateway"),
    "penstock_cache_bytes": Family(GAUGE, "Shared memory that these take", (), "gateway"),
    "penstock_cache_evictions": Family(COUNTER, "Answers that it has removed to make room", (), "gateway"),
    "penstock_cache_dropped": Family(COUNTER, "Answers that could not be kept", (), "gateway"),
    "penstock_cache_corrupt": Family(COUNTER, "Kept answers that could not be believed", (), "gateway"),
    "penstock_arena_waiting": Family(GAUGE, "Requests that wait for room in shared memory", (), "gateway"),
    # That of who runs jobs.
    "penstock_jobs": Family(
        GAUGE, "Jobs that the store keeps; of those that share a store, each says it", ("status",), "runner"
    ),
    "penstock_jobs_bytes": Family(GAUGE, "Bytes of requests and results that the store of jobs keeps", (), "runner"),
    "penstock_job_seconds": Family(
        HISTOGRAM, "From a job's start on this runner to its end, or to its being put back", (), "runner", SECONDS
    ),
    "penstock_job_callbacks": Family(COUNTER, "Attempts to call back, by what came of them", ("outcome",), "runner"),
    # Everybody's.
    "penstock_request_failures": Family(
        COUNTER,
        "Requests that ended without a result, by reason, where they ended",
        (*_MODEL, "reason"),
        "process",
    ),
    "penstock_bad_messages": Family(
        COUNTER, "Messages that no peer should send, by who sent them", ("peer",), "process"
    ),
    "penstock_arena_bytes": Family(GAUGE, "Shared memory for large tensors", (), "process"),
    "penstock_arena_used_bytes": Family(GAUGE, "Shared memory that requests and results take", (), "process"),
    "penstock_arena_missing": Family(
        GAUGE, "1 when there was no memory for the shared memory that is configured", (), "process"
    ),
    "penstock_process_cpu_seconds": Family(COUNTER, "Processor time", (), "process"),
    "penstock_process_resident_bytes": Family(GAUGE, "Resident memory", (), "process"),
}


def size_label(rows: int) -> int:
    """The size as which a batch is counted: itself up to 32 rows, and above that rounded up to an eighth of the power
    of two that it is above, so that a model has no more than some 90 sizes."""
    step = max(1, 1 << max(0, (rows - 1).bit_length() - 4)) if rows > 32 else 1
    return -(-rows // step) * step


class Exemplar(NamedTuple):
    """A request that was observed. ``bucket``: the index of its bucket; ``at``: Unix time, seconds."""

    bucket: int
    request: str
    value: float
    at: float


class Histogram:
    """Counts of observations per bucket. ``counts`` has one place more than ``bounds``: what is above the last.

    ``exemplars``: by bucket, a request of those that came last into it: one between two samples, as each costs time.
    """

    __slots__ = ("_wanting", "bounds", "counts", "exemplars", "total")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0
        self.exemplars: dict[int, Exemplar] = {}
        self._wanting = [True] * len(self.counts)

    def observe(self, value: float, count: int = 1) -> None:
        """Count a value, ``count`` times."""
        self.counts[bisect_left(self.bounds, value)] += count
        self.total += value * count

    def observe_one(self, value: float) -> bool:
        """Count a value. Whether its request would make an exemplar: then ``exemplify``."""
        at = bisect_left(self.bounds, value)
        self.counts[at] += 1
        self.total += value
        return self._wanting[at]

    def exemplify(self, value: float, request: str) -> None:
        """``request``: by which the log names it. One that is too long for an exemplar is left out."""
        at = bisect_left(self.bounds, value)
        if len(request) <= MAX_EXEMPLAR:
            self._wanting[at] = False
            self.exemplars[at] = Exemplar(at, request, value, time.time())

    def sample(self, family: str, labels: tuple[str, ...]) -> Sample:
        """What there is to say of it, after which each bucket wants another exemplar."""
        self._wanting = [True] * len(self.counts)
        return Sample(family, labels, (*map(float, self.counts), self.total), tuple(self.exemplars.values()))


SeriesKey: TypeAlias = tuple[str, tuple[str, ...]]  # the family and the labels


class Value:
    """A counter or gauge: add to or set ``value``."""

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value: float = 0


class Sample(NamedTuple):
    """One series. ``value`` is a number, or for a histogram its counts per bucket followed by their total."""

    family: str
    labels: tuple[str, ...]
    value: float | tuple[float, ...]
    exemplars: tuple[Exemplar, ...] = ()


class Meters:
    """The series of one process. Hold what ``value`` and ``histogram`` return: finding it again costs a look-up."""

    def __init__(self) -> None:
        self._series: dict[SeriesKey, Value | Histogram] = {}
        self._told: dict[SeriesKey, float | list[int]] = {}  # what was told last: a number, or counts
        self._until_whole = 0  # times that what has changed is told before all is

    def value(self, family: str, *labels: str) -> Value:
        series = self._find(family, labels)
        assert isinstance(series, Value), f"{family} is a histogram"
        return series

    def histogram(self, family: str, *labels: str) -> Histogram:
        series = self._find(family, labels)
        assert isinstance(series, Histogram), f"{family} is not a histogram"
        return series

    def _find(self, family: str, labels: tuple[str, ...]) -> Value | Histogram:
        series = self._series.get((family, labels))
        if series is None:
            # Models come and go, and each has series of its own. Those that would be too many for a snapshot, which
            # nobody would take, count together under no names.
            if len(self._series) >= MAX_SERIES and any(labels):
                return self._find(family, ("",) * len(labels))
            about = FAMILIES[family]
            assert len(labels) == len(about.labels), f"{family} has the labels {about.labels}"
            series = Histogram(about.bounds) if about.kind == HISTOGRAM else Value()
            self._series[family, labels] = series
        return series

    def samples(self) -> tuple[Sample, ...]:
        return tuple([_sample_of(key, series) for key, series in self._series.items()])

    def changes(self) -> tuple[tuple[Sample, ...], bool]:
        """What there is to tell who was told before: the series that have changed since, and whether these are all that
        there are."""
        whole = not self._until_whole
        self._until_whole = WHOLE_EVERY if whole else self._until_whole - 1
        told, found = self._told, []
        for key, series in self._series.items():
            now = series.value if isinstance(series, Value) else series.counts
            if whole or told.get(key) != now:
                told[key] = now if isinstance(series, Value) else list(series.counts)
                found.append(_sample_of(key, series))
        return tuple(found), whole

    def tell_all(self) -> None:
        """Whoever is told next knows nothing."""
        self._until_whole = 0

    def forget(self, model: str, version: str) -> None:
        """A model's version is gone, and its series with it."""
        for key in [key for key in self._series if key[1][:2] == (model, version)]:
            if FAMILIES[key[0]].labels[:2] == _MODEL:
                del self._series[key]
                self._told.pop(key, None)
        self._until_whole = 0


def _sample_of(key: SeriesKey, series: Value | Histogram) -> Sample:
    return Sample(*key, series.value) if isinstance(series, Value) else series.sample(*key)


class Series:
    """What a peer has told of its series, by its beats."""

    def __init__(self) -> None:
        self._known: dict[SeriesKey, Sample] = {}

    def take(self, samples: Sequence[Sample], whole: bool) -> None:
        """``whole``: it has no others. Those beyond MAX_SAMPLES are not kept."""
        if whole:
            self._known.clear()
        for sample in samples:
            key = sample.family, sample.labels
            if key in self._known or len(self._known) < MAX_SAMPLES:
                self._known[key] = sample

    def samples(self) -> tuple[Sample, ...]:
        return tuple(self._known.values())


def _number(value: Any) -> float:
    if not abs(checked := number(value)) <= MAX_NUMBER:
        raise BadMessage(f"{checked!r} is more than metrics count, {MAX_NUMBER}")
    return checked


def _value(value: Any) -> float | tuple[float, ...]:
    return tuple(map(_number, value)) if type(value) is tuple else _number(value)


def _sample(value: Any) -> Sample:
    if type(value) is not tuple or len(value) != 4:
        raise BadMessage("a sample is [family, labels, value, exemplars]")
    sample = Sample(_name(value[0]), _labels(value[1]), _value(value[2]), _exemplars(value[3]))
    about = FAMILIES.get(sample.family)
    if about is None or len(about.labels) != len(sample.labels):
        raise BadMessage(f"unknown metric {sample.family} with {len(sample.labels)} labels")
    width = len(sample.value) if isinstance(sample.value, tuple) else 0
    if width != (len(about.bounds) + 2 if about.kind == HISTOGRAM else 0):
        raise BadMessage(f"a {about.kind} does not have {width} values")
    if sample.value == ():
        raise BadMessage(f"a {about.kind} is a number, and not a sequence of none")
    buckets = [each.bucket for each in sample.exemplars]
    if len(set(buckets)) != len(buckets) or max(buckets, default=-1) >= max(0, width - 1):
        raise BadMessage(f"a {about.kind} does not have exemplars of its buckets {brief(buckets)}")
    return sample


_name: Final[Check] = text(100)
_labels: Final[Check] = sequence(text(MAX_LABEL), 8)
_exemplars: Final[Check] = sequence(
    record(Exemplar, integer(0, 100), text(MAX_EXEMPLAR), _number, _number), len(SECONDS) + 1
)
check_samples: Final[Check] = sequence(_sample, MAX_SAMPLES)
