"""Triton's statistics extension: what each version has done since its workers began, as load tools read it before and
after they measure.

https://github.com/triton-inference-server/server/blob/main/docs/protocol/extension_statistics.md has the shape. Workers
tell the broker with their beats, so that what has just run is there within one. Durations are added up over requests,
each of which counts the whole of its batch: ``compute_input`` gathering it, ``compute_infer`` the model itself,
``compute_output`` the rest. ``batch_stats`` are of batches, by their rows: as they are up to 32, rounded up above, see
size_label. The time of requests that failed before a worker had them is not measured.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any, Final, TypeAlias

from penstock.gateway.about import MODELS, OBJECT, About, a_list, an_object, json
from penstock.gateway.application import Application
from penstock.gateway.connection import Exchange
from penstock.gateway.reports import Reports
from penstock.gateway.routes import Route
from penstock.gateway.target import Handler, Target
from penstock.gateway.triton import NOTHING_SPENT, Told
from penstock.wire.errors import OVERLOADED, UNAVAILABLE, PenstockError
from penstock.wire.messages import Snapshot
from penstock.wire.metrics import Sample
from penstock.wire.models import SERVED

EXTENSION: Final = "statistics"
_NS: Final = 1e9
_MS: Final = 1e3
_PARTS: Final = {"compute_input": "input", "compute_infer": "model", "compute_output": "output"}

_Version: TypeAlias = tuple[str, str]  # the name of a model and its version


def model_stats(samples: Iterable[Sample], versions: Iterable[_Version]) -> dict[str, list[dict[str, Any]]]:
    """Of these versions, from the samples of all processes."""
    told = Told(samples)
    spent, failed, sizes, memory = told.spent(), _failed(told), _sizes(told), _memory(told)
    answered, rows, last = told.answered(), told.rows(), told.most("penstock_last_batch_seconds")
    failed_s = told.sums("penstock_failed_seconds")

    def row(key: _Version) -> dict[str, Any]:
        times = spent.get(key, NOTHING_SPENT)
        lost_s, batches = failed_s.get(key, 0.0), sizes.get(key, {})
        return {
            "name": key[0],
            "version": key[1],
            "last_inference": round(last.get(key, 0.0) * _MS),
            "inference_count": round(rows.get(key, 0.0)),
            "execution_count": sum([each["compute_infer"]["count"] for each in batches.values()]),
            "inference_stats": {
                "success": _spent(answered.get(key, 0.0), max(0.0, times.total_s - lost_s)),
                "fail": _spent(failed.get(key, 0.0), lost_s),
                "queue": _spent(times.requests, times.queue_s),
                "compute_input": _spent(times.requests, times.input_s),
                "compute_infer": _spent(times.requests, times.infer_s),
                "compute_output": _spent(times.requests, times.output_s),
                **{
                    f"cache_{name}": _spent(counts.get(key, 0.0), seconds.get(key, 0.0))
                    for name, (counts, seconds) in told.cached().items()
                },
            },
            "response_stats": {},
            "batch_stats": [{"batch_size": size, **batches[size]} for size in sorted(batches)],
            "memory_usage": memory.get(key, []),
        }

    return {"model_stats": [row(key) for key in versions]}


def _failed(told: Told) -> dict[_Version, float]:
    failed: dict[_Version, float] = {}
    for (model, version, _), value in told.failures().items():
        failed[model, version] = failed.get((model, version), 0.0) + value
    return failed


def _sizes(told: Told) -> dict[_Version, dict[int, dict[str, dict[str, int]]]]:
    """Of the batches of each version, by their rows."""
    found: dict[_Version, dict[int, dict[str, dict[str, int]]]] = {}
    parts = {part: told.sums(f"penstock_size_{name}_seconds") for part, name in _PARTS.items()}
    for key, count in told.sums("penstock_size_batches").items():
        model, version, rows = key
        times = {part: _spent(count, seconds.get(key, 0.0)) for part, seconds in parts.items()}
        found.setdefault((model, version), {})[int(rows)] = times
    return found


def _memory(told: Told) -> dict[_Version, list[dict[str, Any]]]:
    """What each version takes, by device: of all workers there."""
    found: dict[_Version, list[dict[str, Any]]] = {}
    for (model, version, device), nbytes in sorted(told.sums("penstock_model_bytes").items()):
        kind, _, number = device.partition(":")
        about = {"type": "GPU" if kind == "cuda" else "CPU", "id": int(number) if number.isdecimal() else 0}
        found.setdefault((model, version), []).append(about | {"byte_size": round(nbytes)})
    return found


def _spent(count: float, seconds: float) -> dict[str, int]:
    return {"count": round(count), "ns": round(seconds * _NS)}


_ABOUT: Final = About(
    "What has been asked and how long it took, as Triton counts",
    MODELS,
    json(an_object({"model_stats": a_list(OBJECT)}, ("model_stats",))),
    errors=(404, 503),
)


class Statistics:
    """``routes``: for the application to answer."""

    def __init__(self, application: Application, reports: Reports) -> None:
        self._application = application
        self._caller = application.caller
        self._reports = reports
        self.routes: list[Route[Handler]] = [
            Route("GET", f"/v2/models{model}/stats", self._stats, about=_ABOUT)
            for model in ("", "/{model}", "/{model}/versions/{version}")
        ]

    def _stats(self, exchange: Exchange, target: Target) -> None:
        versions = self._versions(target)

        def answer(heard: tuple[Sequence[Snapshot], bool | None]) -> None:
            snapshots, broker = heard
            if broker is None:
                raise PenstockError(OVERLOADED, "too many ask for metrics and statistics; try again shortly", 1.0)
            if not broker:
                # This gateway's alone would look as if everything had been undone.
                raise PenstockError(UNAVAILABLE, "the broker, which knows the statistics, does not answer yet", 1.0)
            samples = [sample for _, series in snapshots for sample in series]
            self._application.answer_json(exchange, model_stats(samples, versions))

        later = partial(self._application.later, exchange, answer)
        self._reports.ask_snapshots(lambda snapshots, broker: later((snapshots, broker)))

    def _versions(self, target: Target) -> list[_Version]:
        """Those that are asked for and can be asked. Raises PenstockError where there are none."""
        models = self._caller.models or {}
        if target.version and (state := self._caller.state(target.model, target.version)) is not None:
            return [(state.name, state.version)]
        if target.version or (target.model and target.model not in models):
            self._caller.find(target.model, target.version)  # says why not
        chosen = [models.get(target.model, {})] if target.model else models.values()
        states = [state for versions in chosen for state in versions.values() if state.state in SERVED]
        return sorted((state.name, state.version) for state in states)
