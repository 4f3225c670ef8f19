"""Triton's statistics extension: what each version has done since its workers began, as load tools read it before and
after they measure.

https://github.com/triton-inference-server/server/blob/main/docs/protocol/extension_statistics.md has the shape. Workers
tell the broker with their beats, so that what has just run is there within one. What is not measured apart is 0: the
copying into and out of a batch, which is within ``compute_infer``, the time of failed requests, which is with the
others', and when the last request came. ``batch_stats`` is empty: batches are counted by ranges of sizes, and their
times not by size. So is ``memory_usage``.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any, Final, TypeAlias

from penstock.gateway.about import MODELS, OBJECT, About, a_list, an_object, json
from penstock.gateway.application import Application, Handler, Target
from penstock.gateway.connection import Exchange
from penstock.gateway.reports import Reports
from penstock.gateway.routes import Route
from penstock.gateway.triton import Told
from penstock.wire.errors import OVERLOADED, UNAVAILABLE, PenstockError
from penstock.wire.messages import Snapshot
from penstock.wire.metrics import Sample
from penstock.wire.models import SERVED

EXTENSION: Final = "statistics"
_NS: Final = 1e9
_NOT_MEASURED: Final = ("compute_input", "compute_output")

_Version: TypeAlias = tuple[str, str]  # the name of a model and its version


def model_stats(samples: Iterable[Sample], versions: Iterable[_Version]) -> dict[str, list[dict[str, Any]]]:
    """Of these versions, from the samples of all processes."""
    told = Told(samples)
    ran, answered = told.sums("penstock_request_seconds", count=True), told.answered()
    total, queued = told.sums("penstock_request_seconds"), told.sums("penstock_queue_seconds")
    rows, batches = told.sums("penstock_batch_rows"), told.sums("penstock_batch_rows", count=True)
    failed: dict[_Version, float] = {}
    for (model, version, _), value in told.failures().items():
        failed[model, version] = failed.get((model, version), 0.0) + value

    def row(key: _Version) -> dict[str, Any]:
        queue_s, total_s = queued.get(key, 0.0), total.get(key, 0.0)
        count = ran.get(key, 0.0)
        return {
            "name": key[0],
            "version": key[1],
            "last_inference": 0,
            "inference_count": round(rows.get(key, 0.0)),
            "execution_count": round(batches.get(key, 0.0)),
            "inference_stats": {
                "success": _spent(answered.get(key, 0.0), total_s),
                "fail": _spent(failed.get(key, 0.0), 0.0),
                "queue": _spent(count, queue_s),
                "compute_infer": _spent(count, max(0.0, total_s - queue_s)),
                **{name: _spent(0, 0) for name in _NOT_MEASURED},
                **{
                    f"cache_{name}": _spent(counts.get(key, 0.0), seconds.get(key, 0.0))
                    for name, (counts, seconds) in told.cached().items()
                },
            },
            "response_stats": {},
            "batch_stats": [],
            "memory_usage": [],
        }

    return {"model_stats": [row(key) for key in versions]}


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
