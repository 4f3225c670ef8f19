"""What bench/peers.py tells of what it measured: tables, and a plot of one number of connections for each model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from bench.peerlist import PEERS, V2_BINARY

OWN: Final = "penstock"
# The numbers of connections of the short table and of the plot, where they were measured.
SHOWN: Final[Mapping[str, int]] = {"tiny": 64, "mlp": 64, "image": 16, "heavy": 64}
OWN_COLOR: Final = "#d1495b"
_OTHER_COLOR: Final = "#7d93a8"
OTHER_COLORS: Final = (_OTHER_COLOR, "#30638e", "#edae49", "#00798c", "#8d6a9f", "#5b8e7d", "#a3a3a3")  # of lines
TEXT_COLOR: Final = "#222222"


# --- tables


def title_of(key: str) -> str:
    return "Penstock" if key == OWN else PEERS[key].name


def protocol_of(key: str) -> str:
    return V2_BINARY if key == OWN else PEERS[key].protocol


def table(rows: Sequence[Mapping[str, Any]], failed: Sequence[Mapping[str, Any]]) -> list[str]:
    """The fastest of each case comes first, what could not be measured last."""
    lines = [
        "| model | conn. | server | protocol | requests/s | p50 ms | p99 ms | CPU-us a request |",
        "|---|---|---|---|---|---|---|---|",
    ]
    cases = list(dict.fromkeys((row["model"], row["connections"]) for row in rows))
    for model, connections in cases:
        here = [row for row in rows if (row["model"], row["connections"]) == (model, connections)]
        for row in sorted(here, key=lambda each: -float(each["requests_per_s"])):
            key = row["server"]
            errors = f" ({row['errors']} errors)" if row["errors"] else ""
            lines.append(
                f"| {model} | {connections} | {_bold(title_of(key), key == OWN)} | {protocol_of(key)} "
                f"| {row['requests_per_s']:.0f}{errors} | {row['p50_ms']:.2f} | {row['p99_ms']:.2f} "
                f"| {row['cpu_us']:.1f} |"
            )
    for each in failed:
        key = each["server"]
        lines.append(f"| {each['model']} | | {title_of(key)} | {protocol_of(key)} | {each['why']} | | | |")
    return lines


def shown_cases(rows: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """A number of connections for each model: that of SHOWN, or else the largest there is."""
    found: dict[str, set[int]] = {}
    for row in rows:
        found.setdefault(row["model"], set()).add(row["connections"])
    return {model: SHOWN[model] if SHOWN[model] in each else max(each) for model, each in found.items()}


def short_table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """A line for each server, and a column for each model: what the README has."""
    cases = shown_cases(rows)
    by_case = {(row["server"], row["model"], row["connections"]): row for row in rows}
    columns = "".join(f" {model}, {connections} connections |" for model, connections in cases.items())
    lines = [f"| server | asked in |{columns}", f"|---|---|{'---|' * len(cases)}"]
    for key in order(rows, list(cases)):
        cells = [f"{_bold(title_of(key), key == OWN)}", protocol_of(key)]
        for case in cases.items():
            row = by_case.get((key, *case))
            cells.append("not measured" if row is None else _cell(row))
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def tell(content: Mapping[str, Any]) -> list[str]:
    """All that the text file has, from what the JSON file has."""
    rows = content["cases"]
    return [
        ", ".join(f"{name} {value}" for name, value in content["machine"].items()),
        f"medians of {content['repeats']} turns of {content['seconds']} s",
        "",
        *table(rows, content["failed"]),
        "",
        "requests/s, CPU µs a request, p50 / p99:",
        "",
        *short_table(rows),
        "",
        *about_servers(content["peers"]),
    ]


def draw(content: Mapping[str, Any], path: Path) -> bool:
    """False without matplotlib."""
    rows = content["cases"]
    names = {row["server"]: title_of(row["server"]) for row in rows}
    return _draw(rows, shown_cases(rows), names, OWN, content["machine"], path)


def _cell(row: Mapping[str, Any]) -> str:
    p50, p99 = _three_digits(row["p50_ms"]), _three_digits(row["p99_ms"])
    return f"{row['requests_per_s']:,.0f}/s, {row['cpu_us']:,.0f} µs, {p50} / {p99} ms"


def _three_digits(value: float) -> str:
    return f"{value:.3g}" if value < 999.5 else f"{value:,.0f}"


def _bold(text: str, bold: bool) -> str:
    return f"**{text}**" if bold else text


def about_servers(keys: Sequence[str]) -> list[str]:
    lines = ["| server | asked in | waits for a batch to fill | left out |", "|---|---|---|---|"]
    for key in keys:
        peer = PEERS[key]
        lines.append(f"| {peer.name} | {peer.protocol} | {peer.waits} | {peer.leaves_out} |")
    return lines


# --- the plot


def _draw(
    rows: Sequence[Mapping[str, Any]],
    cases: Mapping[str, int],
    names: Mapping[str, str],
    own: str,
    machine: Mapping[str, str],
    path: Path,
) -> bool:
    """False without matplotlib. ``cases``: how many connections, by model. ``own``: the server whose color is another
    one."""
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import FuncFormatter, NullFormatter
    except ImportError:
        return False
    models = list(cases)
    keys = order(rows, models)
    figure = Figure(figsize=(11, 0.8 + (0.6 + 0.29 * len(keys)) * len(models)), layout="constrained", facecolor="white")
    grid = figure.subplots(len(models), 3, squeeze=False, sharey=True)
    for (model, connections), (rate, cpu, latency) in zip(cases.items(), grid, strict=True):
        here = {row["server"]: row for row in rows if (row["model"], row["connections"]) == (model, connections)}
        _bars(rate, keys, {key: row["requests_per_s"] for key, row in here.items()}, own)
        _bars(cpu, keys, {key: row["cpu_us"] for key, row in here.items()}, own)
        _spans(latency, keys, {key: (row["p50_ms"], row["p99_ms"]) for key, row in here.items()}, own)
        rate.set_title(f"{model}, {connections} connections: requests/s", fontsize=9, loc="left", color=TEXT_COLOR)
        cpu.set_title("CPU µs a request (less is better)", fontsize=9, loc="left", color=TEXT_COLOR)
        latency.set_title("p50 (dot) to p99 (bar), ms (less is better)", fontsize=9, loc="left", color=TEXT_COLOR)
        rate.set_yticks(range(len(keys)), [names[key].replace(", ", ",\n") for key in keys], fontsize=8)
        rate.set_ylim(len(keys) - 0.4, -0.6)
        for axes in (rate, cpu, latency):
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.12g}"))
            axes.xaxis.set_minor_formatter(NullFormatter())
            axes.tick_params(labelsize=8)
    figure.suptitle(f"{machine['cpu']}, {machine['date']}; logarithmic scales", fontsize=9, color=TEXT_COLOR)
    figure.savefig(path, dpi=90)
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
    colors = [OWN_COLOR if key == own else _OTHER_COLOR for _, key in shown]
    axes.barh([at for at, _ in shown], [values[key] for _, key in shown], color=colors, height=0.7)
    for at, key in shown:
        axes.annotate(
            f"{values[key]:,.0f}",
            (values[key], at),
            textcoords="offset points",
            xytext=(3, 0),
            va="center",
            fontsize=8,
            color=TEXT_COLOR,
        )
    _scale(axes, list(values.values()), begin=2.0)


def _spans(axes: Any, keys: Sequence[str], values: Mapping[str, tuple[float, float]], own: str) -> None:
    for at, key in enumerate(keys):
        if key in values:
            low, high = values[key]
            color = OWN_COLOR if key == own else _OTHER_COLOR
            axes.plot([low, high], [at, at], color=color, linewidth=3, solid_capstyle="butt")
            axes.plot([low], [at], "o", color=color, markersize=6)
            text = f"{_three_digits(low)} to {_three_digits(high)}"
            axes.annotate(
                text, (high, at), textcoords="offset points", xytext=(5, 0), va="center", fontsize=8, color=TEXT_COLOR
            )
    _scale(axes, [each for pair in values.values() for each in pair], begin=1.5)


def _scale(axes: Any, values: Sequence[float], begin: float) -> None:
    axes.set_xscale("log")
    axes.set_xlim(min(values) / begin, max(values) * (max(values) / min(values)) ** 0.35 * 1.5)  # room for the figures
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
