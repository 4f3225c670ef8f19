"""The plot of bench/peers.py: what each server does with each model, at the largest number of connections."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

_OWN: Final = "#d1495b"
_OTHER: Final = "#7d93a8"
_TEXT: Final = "#222222"


def draw(
    rows: Sequence[Mapping[str, Any]], names: Mapping[str, str], own: str, machine: Mapping[str, str], path: Path
) -> bool:
    """False without matplotlib. ``own``: the server whose color is another one."""
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import FuncFormatter, NullFormatter
    except ImportError:
        return False
    models = list(dict.fromkeys(row["model"] for row in rows))
    keys = order(rows, models)
    figure = Figure(figsize=(11, 0.8 + (0.6 + 0.29 * len(keys)) * len(models)), layout="constrained", facecolor="white")
    grid = figure.subplots(len(models), 3, squeeze=False, sharey=True)
    for model, (rate, cpu, latency) in zip(models, grid, strict=True):
        connections = max(row["connections"] for row in rows if row["model"] == model)
        here = {row["server"]: row for row in rows if (row["model"], row["connections"]) == (model, connections)}
        _bars(rate, keys, {key: row["requests_per_s"] for key, row in here.items()}, own)
        _bars(cpu, keys, {key: row["cpu_us"] for key, row in here.items()}, own)
        _spans(latency, keys, {key: (row["p50_ms"], row["p99_ms"]) for key, row in here.items()}, own)
        rate.set_title(f"{model}, {connections} connections: requests/s", fontsize=9, loc="left", color=_TEXT)
        cpu.set_title("CPU µs a request (less is better)", fontsize=9, loc="left", color=_TEXT)
        latency.set_title("p50 (dot) to p99 (bar), ms (less is better)", fontsize=9, loc="left", color=_TEXT)
        rate.set_yticks(range(len(keys)), [names[key].replace(", ", ",\n") for key in keys], fontsize=8)
        rate.set_ylim(len(keys) - 0.4, -0.6)
        for axes in (rate, cpu, latency):
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.12g}"))
            axes.xaxis.set_minor_formatter(NullFormatter())
            axes.tick_params(labelsize=8)
    figure.suptitle(f"{machine['cpu']}, {machine['date']}; logarithmic scales", fontsize=9, color=_TEXT)
    figure.savefig(path, dpi=110)
    return True


def order(rows: Sequence[Mapping[str, Any]], models: Sequence[str]) -> list[str]:
    """Servers, the fastest on the first model first; the same in every panel."""
    best: dict[str, tuple[int, float]] = {}
    for row in rows:
        at = models.index(row["model"]), -float(row["requests_per_s"])
        best[row["server"]] = min(at, best.get(row["server"], at))
    return sorted(best, key=lambda key: best[key])


def _bars(axes: Any, keys: Sequence[str], values: Mapping[str, float], own: str) -> None:
    shown = [(at, key) for at, key in enumerate(keys) if key in values]
    colors = [_OWN if key == own else _OTHER for _, key in shown]
    axes.barh([at for at, _ in shown], [values[key] for _, key in shown], color=colors, height=0.7)
    for at, key in shown:
        axes.annotate(
            f"{values[key]:,.0f}",
            (values[key], at),
            textcoords="offset points",
            xytext=(3, 0),
            va="center",
            fontsize=8,
            color=_TEXT,
        )
    _scale(axes, list(values.values()), begin=2.0)


def _spans(axes: Any, keys: Sequence[str], values: Mapping[str, tuple[float, float]], own: str) -> None:
    for at, key in enumerate(keys):
        if key in values:
            low, high = values[key]
            color = _OWN if key == own else _OTHER
            axes.plot([low, high], [at, at], color=color, linewidth=3, solid_capstyle="butt")
            axes.plot([low], [at], "o", color=color, markersize=6)
            text = f"{low:.3g} to {high:.3g}"
            axes.annotate(
                text, (high, at), textcoords="offset points", xytext=(5, 0), va="center", fontsize=8, color=_TEXT
            )
    _scale(axes, [each for pair in values.values() for each in pair], begin=1.5)


def _scale(axes: Any, values: Sequence[float], begin: float) -> None:
    axes.set_xscale("log")
    axes.set_xlim(min(values) / begin, max(values) * (max(values) / min(values)) ** 0.35 * 1.5)  # room for the figures
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
