"""Triton's names for what our own series say, so that its dashboards and alerts work here.

https://github.com/triton-inference-server/server/blob/main/docs/user_guide/metrics.md has them. As there, durations are
microseconds added up over requests: each request counts the whole of the batch that it was in.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Final, NamedTuple

from prometheus_client.metrics_core import Metric

from penstock.wire import errors
from penstock.wire.metrics import FAMILIES, HISTOGRAM, Sample

_BACKEND: Final = "BACKEND"
_REASONS: Final = {
    errors.MODEL_FAILED: _BACKEND,
    errors.POISONED: _BACKEND,
    errors.INTERNAL: _BACKEND,
    errors.CANCELLED: "CANCELED",
    errors.OVERLOADED: "REJECTED",
    errors.DRAINING: "REJECTED",
    errors.UNAVAILABLE: "REJECTED",
    errors.DEADLINE: "REJECTED",
}
_OTHER: Final = "OTHER"
_US: Final = 1e6

_HELP: Final = {
    "nv_inference_request_success": "Requests that a model has answered",
    "nv_inference_request_failure": "Requests that have failed, by Triton's reasons",
    "nv_inference_count": "Rows that have run",
    "nv_inference_exec_count": "Batches that have run",
    "nv_inference_pending_request_count": "Requests that wait in the broker",
    "nv_inference_request_duration_us": "From a request's acceptance to the end of its batch, of all requests",
    "nv_inference_queue_duration_us": "From a request's acceptance to the start of its batch, of all requests",
    "nv_cache_num_hits_per_model": "Requests whose answer was in the response cache",
    "nv_cache_num_misses_per_model": "Requests whose answer was not in the response cache",
    "nv_cache_hit_duration_per_model": "From a request's end to its answer from the response cache, of all such",
    "nv_cache_miss_duration_per_model": "From a request's end until it was known that none is there, of all such",
    "nv_inference_compute_input_duration_us": "Gathering inputs for its batch, of all requests",
    "nv_inference_compute_infer_duration_us": "The model itself, of all requests",
    "nv_inference_compute_output_duration_us": "The rest of the time of its batch, of all requests",
}

_GPU: Final = {
    "nv_gpu_utilization": ("penstock_gpu_utilization", "Share of the time that something ran on the GPU, 0 to 1"),
    "nv_gpu_memory_total_bytes": ("penstock_gpu_memory_total_bytes", "Memory of the GPU"),
    "nv_gpu_memory_used_bytes": ("penstock_gpu_memory_used_bytes", "Memory of the GPU that is taken"),
    "nv_gpu_power_usage": ("penstock_gpu_power_watts", "Power that the GPU draws, in watts"),
    "nv_gpu_power_limit": ("penstock_gpu_power_limit_watts", "Power that the GPU may draw, in watts"),
    "nv_energy_consumption": ("penstock_gpu_energy_joules", "Energy since the driver was loaded, in joules"),
}

_Labels = tuple[str, ...]
_Sums = dict[_Labels, float]


def triton_metrics(samples: Iterable[Sample]) -> Iterator[Metric]:
    """From the samples of all processes."""
    told = Told(samples)
    failed = told.failures()
    spent = told.spent().items()
    cached = told.cached()
    values: Mapping[str, _Sums] = {
        "nv_inference_request_success": told.answered(),
        "nv_inference_request_failure": failed,
        "nv_inference_count": told.rows(),
        "nv_inference_exec_count": told.runs(),
        "nv_inference_pending_request_count": told.sums("penstock_queue_requests"),
        "nv_inference_request_duration_us": {key: times.total_s * _US for key, times in spent},
        "nv_inference_queue_duration_us": {key: times.queue_s * _US for key, times in spent},
        "nv_inference_compute_input_duration_us": {key: times.input_s * _US for key, times in spent},
        "nv_inference_compute_infer_duration_us": {key: times.infer_s * _US for key, times in spent},
        "nv_inference_compute_output_duration_us": {key: times.output_s * _US for key, times in spent},
        "nv_cache_num_hits_per_model": cached["hit"][0],
        "nv_cache_num_misses_per_model": cached["miss"][0],
        "nv_cache_hit_duration_per_model": {key: value * _US for key, value in cached["hit"][1].items()},
        "nv_cache_miss_duration_per_model": {key: value * _US for key, value in cached["miss"][1].items()},
    }
    for name, sums in values.items():
        if sums:
            # "counter" would have the library add _total to the name, which Triton's do not have.
            metric = Metric(name, _HELP[name], "unknown")
            for labels, value in sorted(sums.items()):
                metric.add_sample(name, dict(zip(("model", "version", "reason"), labels, strict=False)), value)
            yield metric
    for name, (family, about) in _GPU.items():
        found = told.once(family)
        if found:
            metric = Metric(name, about, "unknown")
            for (gpu,), value in sorted(found.items()):
                metric.add_sample(name, {"gpu_uuid": gpu}, value)
            yield metric


class Spent(NamedTuple):
    """Of a version: requests, and what they took in all, each counting the whole of its batch."""

    requests: float
    total_s: float
    queue_s: float
    input_s: float
    infer_s: float
    output_s: float


NOTHING_SPENT: Final = Spent(0.0, 0.0, 0.0, 0.0, 0.0, 0.0)


class Told:
    """Samples by family."""

    def __init__(self, samples: Iterable[Sample]) -> None:
        self._samples: dict[str, list[Sample]] = {}
        for sample in samples:
            self._samples.setdefault(sample.family, []).append(sample)

    def sums(self, family: str, count: bool = False) -> _Sums:
        """By model and version, over all processes. Of a histogram the sum of what was observed, or how many were."""
        found: _Sums = {}
        for sample in self._samples.get(family, ()):
            value = sample.value
            if isinstance(value, tuple):
                assert FAMILIES[family].kind == HISTOGRAM
                value = sum(value[:-1]) if count else value[-1]
            found[sample.labels] = found.get(sample.labels, 0.0) + value
        return found

    def cached(self) -> Mapping[str, tuple[_Sums, _Sums]]:
        """By whether an answer was kept, "hit" or "miss": how many requests, and seconds that it took to find out."""
        return {
            "hit": (self.sums("penstock_cache_hits"), self.sums("penstock_cache_hit_seconds")),
            "miss": (self.sums("penstock_cache_misses"), self.sums("penstock_cache_miss_seconds")),
        }

    def once(self, family: str) -> _Sums:
        """By labels, from whichever process tells it: several workers on one GPU tell the same."""
        return {each.labels: each.value for each in self._samples.get(family, ()) if not isinstance(each.value, tuple)}

    def most(self, family: str) -> _Sums:
        """By labels, the highest of all processes."""
        found: _Sums = {}
        for each in self._samples.get(family, ()):
            if not isinstance(each.value, tuple):
                found[each.labels] = max(found.get(each.labels, 0.0), each.value)
        return found

    def spent(self) -> dict[_Labels, Spent]:
        """By model and version."""
        counts, queued = self.sums("penstock_request_seconds", count=True), self.sums("penstock_queue_seconds")
        inputs, models = self.sums("penstock_input_seconds"), self.sums("penstock_model_seconds")
        found = {}
        for key, total_s in self.sums("penstock_request_seconds").items():
            queue_s, input_s, infer_s = queued.get(key, 0.0), inputs.get(key, 0.0), models.get(key, 0.0)
            output_s = max(0.0, total_s - queue_s - input_s - infer_s)
            found[key] = Spent(counts[key], total_s, queue_s, input_s, infer_s, output_s)
        return found

    def rows(self) -> _Sums:
        """That have run and not failed, by model and version."""
        failed = self.sums("penstock_failed_rows")
        return {key: rows - failed.get(key, 0.0) for key, rows in self.sums("penstock_batch_rows").items()}

    def runs(self) -> _Sums:
        """Of the model that did not fail, by model and version."""
        found: _Sums = {}
        for (model, version, _), count in self.sums("penstock_size_batches").items():
            found[model, version] = found.get((model, version), 0.0) + count
        return found

    def answered(self) -> _Sums:
        """Requests that have run and not failed, by model and version."""
        failed = self.failures()
        ran = self.sums("penstock_request_seconds", count=True)
        return {key: max(0.0, value - failed.get((*key, _BACKEND), 0.0)) for key, value in ran.items()}

    def failures(self) -> _Sums:
        """By model, version and Triton's reason."""
        found: _Sums = {}
        for (model, version, reason), value in self.sums("penstock_request_failures").items():
            key = model, version, _REASONS.get(reason, _OTHER)
            found[key] = found.get(key, 0.0) + value
        return found
