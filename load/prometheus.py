"""What a server's /metrics tell about a load: its processor time, and how large its batches were."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Final, NamedTuple

_SAMPLE: Final = re.compile(r"^([A-Za-z_:][\w:]*)(?:\{(.*)\})? (\S+)", re.MULTILINE)
_LABEL: Final = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')


class Reading(NamedTuple):
    """``cpu_s``: by process, empty when the server does not tell. ``rows`` and ``batches`` of the model: None then."""

    cpu_s: dict[str, float]
    rows: float | None
    batches: float | None


def read_samples(text: str) -> Iterator[tuple[str, dict[str, str], float]]:
    """Name, labels and value of each sample in Prometheus text. Labels are as they are written there."""
    for name, labels, value in _SAMPLE.findall(text):
        yield name, dict(_LABEL.findall(labels)), float(value)


def read_metrics(text: str, model: str) -> Reading:
    """From Prometheus text. Triton's names count rows and batches, which Penstock has as well."""
    cpu_s: dict[str, float] = {}
    counts: dict[str, float] = {}
    for name, labels, value in _SAMPLE.findall(text):
        if name == "penstock_process_cpu_seconds_total":
            cpu_s[labels] = float(value)
        elif name in ("nv_inference_count", "nv_inference_exec_count") and dict(_LABEL.findall(labels)).get(
            "model"
        ) == _escape(model):
            counts[name] = counts.get(name, 0.0) + float(value)
    return Reading(cpu_s, counts.get("nv_inference_count"), counts.get("nv_inference_exec_count"))


def mean_batch(before: Reading, after: Reading) -> float | None:
    """Rows of a batch, between two readings; None when they do not tell. What has not been counted yet need not be
    there."""
    if after.rows is None or after.batches is None:
        return None
    batches = after.batches - (before.batches or 0.0)
    return (after.rows - (before.rows or 0.0)) / batches if batches > 0 else None


def _escape(text: str) -> str:
    return text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
