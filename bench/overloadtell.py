"""What bench/overload.py tells of what it measured: tables, the bars, and a plot of goodput over what was offered."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from bench.overloadsim import AGREE, COMPARED, off_by
from bench.peertell import OTHER_COLORS, OWN, OWN_COLOR, TEXT_COLOR, about_servers, title_of

GOOD_SHARE: Final = 0.93  # of the best goodput, that is to be left ...
GOOD_TIMES: Final = (2.0, 4.0)  # ... when so many times the capacity is offered
REFUSAL_MS: Final = 10.0  # p99, by the gateway's clock
FLAT_SHARE: Final = 0.05  # of its memory, that a server may grow by after its first overload
_NAMES: Final = {"goodput": "goodput", "p50_ms": "p50", "p99_ms": "p99", "batch_rows": "rows of a batch"}
_DIGITS: Final = {"goodput": 0, "p50_ms": 1, "p99_ms": 1, "batch_rows": 1}
KINDS: Final = ("gateway", "broker", "worker", "rest", "server")


# --- the bars


def bars(content: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What Penstock is to keep, what was measured, and whether it is kept; of loads that were not measured nothing."""
    own = next(each for each in content["servers"] if each["server"] == OWN)
    best = best_goodput(own)
    found = [
        _bar(
            f"goodput at {each['times']:g} times capacity is at least {GOOD_SHARE:.0%} of the best",
            f"{each['goodput'] / best:.1%}",
            each["goodput"] >= GOOD_SHARE * best,
        )
        for each in own["loads"]
        if best and each["times"] in GOOD_TIMES
    ]
    refusals = {
        each["times"]: each["gateway_refusal_p99_ms"]
        for each in own["loads"]
        if each["times"] > 1 and each["gateway_refusal_p99_ms"] is not None
    }
    if refusals:
        said = ", ".join(f"{ms:.1f} ms at {times:g} times" for times, ms in refusals.items())
        kept = max(refusals.values()) <= REFUSAL_MS
        found.append(_bar(f"refusals within {REFUSAL_MS:g} ms at p99 by the gateway's clock", said, kept))
    memory = own["memory_mb"]
    if memory and "after" in memory:
        grown = memory["peak"] - memory["before"]
        said = f"{grown:+.1f} MB at the peak, {memory['after'] - memory['before']:+.1f} at the end"
        share = f"memory grows by less than {FLAT_SHARE:.0%} after the first overload"
        found.append(_bar(share, f"{said}, of {memory['before']:.0f}", grown < FLAT_SHARE * memory["before"]))
    if content.get("simulated"):
        found += simulator_bars(own, content["simulated"]["loads"])
    return found


def simulator_bars(own: Mapping[str, Any], loads: Sequence[Mapping[str, float]]) -> list[dict[str, Any]]:
    """Of each figure, over all loads."""
    off = [off_by(said, measured) for said, measured in zip(loads, own["loads"], strict=True)]
    found = []
    for name in COMPARED:
        values = [each[name] for each in off if name in each]
        if values:
            worst = max(values, key=abs)
            bar = f"simulator and server agree within {AGREE:.0%} on {_NAMES[name]} at every load"
            found.append(_bar(bar, f"{worst:+.0%} at most", abs(worst) <= AGREE))
    return found


def _bar(bar: str, measured: str, kept: bool) -> dict[str, Any]:
    return {"bar": bar, "measured": measured, "kept": kept}


def best_goodput(server: Mapping[str, Any]) -> float:
    return max((float(each["goodput"]) for each in server["loads"]), default=0.0)


# --- tables


def tell(content: Mapping[str, Any]) -> list[str]:
    """All that the text file has, from what the JSON file has."""
    servers = content["servers"]
    own = next(each for each in servers if each["server"] == OWN)
    return [
        ", ".join(f"{name} {value}" for name, value in content["machine"].items()),
        f"{content['model']}, deadline {content['deadline_ms']:g} ms from the intended start; medians of "
        f"{content['repeats']} turns of {content['seconds']:g} s",
        "",
        *results(servers),
        *(f"{title_of(each['server'])}: {each['why']}" for each in (*content["failed"], *servers) if each["why"]),
        "",
        "In cores, meanwhile; good/s a core: for the processor time that the workers, or a whole other server, had;",
        "behind: how late 99 of 100 requests were sent at most:",
        "",
        *use(servers),
        *notes(servers),
        "",
        "Resident memory of all processes of a server, in MB:",
        "",
        *memory(servers),
        "",
        *(simulator(own, content["simulated"]) if content.get("simulated") else ()),
        *(f"{'kept' if bar['kept'] else 'MISSED'}: {bar['bar']}: {bar['measured']}" for bar in content["bars"]),
        "",
        *about_servers([each["server"] for each in servers if each["server"] != OWN]),
    ]


def results(servers: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = [
        "| server, capacity | offered/s | good/s | of its best | refused/s | late/s | unanswered/s | p50 / p99 ms "
        "| refusals p99 ms | by the gateway's clock | rows of a batch | batches run | expired/s |",
        f"|{'---|' * 13}",
    ]
    for server in servers:
        best = best_goodput(server)
        for each in server["loads"]:
            cells = [
                f"{_name(server)}, {server['capacity']:.0f}/s",
                f"{each['offered']:.0f} ({each['times']:g} x)",
                f"**{each['goodput']:.0f}**",
                f"{each['goodput'] / best:.0%}" if best else "",
                *(f"{each[name]:.0f}" for name in ("refused", "late", "unanswered")),
                f"{each['p50_ms']:.0f} / {each['p99_ms']:.0f}",
                _known(each["refusal_p99_ms"], "{:.1f}"),
                _known(each["gateway_refusal_p99_ms"], "{:.1f}"),
                _known(each["batch_rows"], "{:.1f}"),
                _known(each["running"], "{:.0%}"),
                _known(each["expired"], "{:.0f}"),
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def use(servers: Sequence[Mapping[str, Any]]) -> list[str]:
    """Who used the processors."""
    lines = [
        "| server | offered/s | its processes | good/s a core of who computes | generator | others | behind ms |",
        "|---|---|---|---|---|---|---|",
    ]
    for server in servers:
        best = max((each["per_core"] for each in server["loads"]), default=0.0)
        for each in server["loads"]:
            cores = ", ".join(f"{kind} {each['cores'][kind]:.2f}" for kind in KINDS if kind in each["cores"])
            mark = "*" if each["doubts"] else ""
            cells = [
                _name(server),
                f"{each['offered']:.0f} ({each['times']:g} x)",
                cores,
                _known(each["per_core"], "{:.0f}") + (f" ({each['per_core'] / best:.0%})" if best else ""),
                f"{each['generator']:.2f}{mark}",
                f"{each['others']:.2f}",
                f"{each['behind_ms']:.1f}{mark}",
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def notes(servers: Sequence[Mapping[str, Any]]) -> list[str]:
    """Where the generator may have been what limits."""
    return [
        f"* {title_of(server['server'])}, {each['times']:g} x: {each['doubts'][0]}"
        for server in servers
        for each in server["loads"]
        if each["doubts"]
    ]


def memory(servers: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = [
        "| server | before any overload | most in the first | before the turns | most in them | after them | growth |",
        "|---|---|---|---|---|---|---|",
    ]
    for server in servers:
        found = server["memory_mb"]
        if found and "after" in found:
            cells = " | ".join(f"{found[key]:.0f}" for key in ("fresh", "first_peak", "before", "peak", "after"))
            lines.append(f"| {_name(server)} | {cells} | {found['after'] - found['before']:+.1f} |")
    return lines


def simulator(own: Mapping[str, Any], simulated: Mapping[str, Any]) -> list[str]:
    """Beside what the server did."""
    known = simulated["known"]
    sizes = ", ".join(f"{rows}: {ms:.1f}" for rows, ms in known["batch_ms"].items())
    lines = [
        "The simulator (penstock simulate) of the same loads, and by how much it is off. It was told what the server",
        "said under loads of their own between these (0.2 to 1.5 times the capacity) of its batches and messages:",
        f"ms of a batch by rows {sizes};",
        f"its standard deviation {known['jitter']:.0%}, in moments of {known['lasts_ms']:.0f} ms;",
        f"{known['hop_ms']:.2f} ms from one process to the next,",
        f"{known['client_ms']:.2f} between client and gateway.",
        "",
        "| offered | good/s | p50 ms | p99 ms | rows of a batch |",
        "|---|---|---|---|---|",
    ]
    for said, measured in zip(simulated["loads"], own["loads"], strict=True):
        off = off_by(said, measured)
        cells = [f"{said[name]:.{_DIGITS[name]}f} ({off[name]:+.0%})" if name in off else "" for name in COMPARED]
        lines.append(f"| {said['times']:g} x | {' | '.join(cells)} |")
    return [*lines, ""]


def _name(server: Mapping[str, Any]) -> str:
    title = title_of(server["server"])
    return f"**{title}**" if server["server"] == OWN else title


def _known(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)


# --- the plot


def draw(content: Mapping[str, Any], path: Path) -> bool:
    """Goodput over what was offered, in requests a second and in capacities. False without matplotlib."""
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import FuncFormatter, NullFormatter
    except ImportError:
        return False
    servers = [each for each in content["servers"] if each["loads"]]
    figure = Figure(figsize=(11, 4.2), layout="constrained", facecolor="white")
    by_rate, by_capacity = figure.subplots(1, 2)
    others = iter(OTHER_COLORS)
    for server in servers:
        color = OWN_COLOR if server["server"] == OWN else next(others)
        style = {"color": color, "marker": "o", "markersize": 4, "linewidth": 2, "label": title_of(server["server"])}
        capacity = server["capacity"]
        offered, good = ([each[name] for each in server["loads"]] for name in ("offered", "goodput"))
        by_rate.plot(offered, [max(1.0, each) for each in good], **style)
        by_rate.plot([capacity], [capacity], marker="|", markersize=18, markeredgewidth=2, color=color)
        by_capacity.plot([each["times"] for each in server["loads"]], [each / capacity for each in good], **style)
    by_rate.set_xscale("log")
    by_rate.set_yscale("log")
    for axis in (by_rate.xaxis, by_rate.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.12g}"))
        axis.set_minor_formatter(NullFormatter())
    by_capacity.plot([0, 1], [0, 1], color=TEXT_COLOR, linewidth=0.8, linestyle=":")
    by_capacity.axvline(1, color=TEXT_COLOR, linewidth=0.8, linestyle=":")
    by_capacity.set_xlim(left=0)
    by_capacity.set_ylim(0, 1.15)
    deadline = f"answers within {content['deadline_ms']:g} ms a second"
    for axes, title, below in (
        (by_rate, f"{deadline} (| capacity)", "offered a second"),
        (by_capacity, f"{deadline}, of the capacity", "offered, of the capacity"),
    ):
        axes.set_title(title, fontsize=9, loc="left", color=TEXT_COLOR)
        axes.set_xlabel(below, fontsize=8, color=TEXT_COLOR)
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.3)
        axes.set_axisbelow(True)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    by_capacity.legend(fontsize=8, frameon=False)
    machine = content["machine"]
    figure.suptitle(f"{content['model']}: {machine['cpu']}, {machine['date']}", fontsize=9, color=TEXT_COLOR)
    figure.savefig(path, dpi=90)
    return True
