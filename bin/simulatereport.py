"""The plots of ``penstock simulate``: one HTML file that needs nothing else, or PNG files."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Final

from penstock.bin.charts import LOG, TAIL, Axis, Chart, Line, draw_pngs, draw_svg
from penstock.bin.files import write_whole

if TYPE_CHECKING:
    from penstock.simulate.figures import Figures

NO_PNG: Final = "no PNG files: matplotlib is missing; pip install 'penstock[report]', or write a report.html"
_SHARES: Final = tuple(1 - 10 ** -(step / 20) for step in range(20 * 5 + 1))  # to 99.999 %
_LINES_MAX: Final = 8  # of one kind in a chart
_STYLE: Final = (
    "body{font:15px/1.5 sans-serif;max-width:1000px;margin:2em auto;padding:0 1em;color:#222}"
    "pre{overflow-x:auto;font-size:12px;line-height:1.35}svg{width:100%;margin:1em 0}"
)


def charts(ran: Sequence[Figures]) -> list[Chart]:
    seconds = Axis("seconds since the first arrival")
    time = Axis("latency, ms", LOG)
    answered = [each for each in ran if each.total.answered]
    shown = ran[:_LINES_MAX]
    drawn = [
        Chart("latency", "Latency distribution", Axis("of all answers", TAIL), time, _distributions(answered)),
        Chart(
            "time",
            "p99 by time of arrival",
            seconds,
            time,
            [
                Line(_name(each), [(at, part.latency.quantile(0.99) / 1e6) for at, part in each.parts if part.good])
                for each in shown
                if each.total.good
            ],
        ),
        Chart(
            "goodput-time",
            "Asked for, and answered inside the deadline",
            seconds,
            Axis("requests/s"),
            [
                line
                for each in shown[: _LINES_MAX // 2]
                for line in (
                    Line(f"{_name(each)}, asked", [(at, part.arrived / each.part_s) for at, part in each.parts]),
                    Line(f"{_name(each)}, good", [(at, part.good / each.part_s) for at, part in each.parts]),
                )
            ],
        ),
        Chart(
            "batches",
            "Batch sizes",
            Axis("rows"),
            Axis("share of batches, %"),
            [
                Line(f"{_name(each)} {model}".strip(), [(rows, 100 * count / made.count) for rows, count in sizes])
                for each in shown
                for model, made in list(each.batches.items())[: max(1, _LINES_MAX // len(shown))]
                if (sizes := sorted(made.sizes.items()))
            ],
        ),
        Chart(
            "utilisation",
            "Busy workers, the busiest first",
            Axis("worker"),
            Axis("busy, %"),
            [
                Line(_name(each), [(at, 100 * busy) for at, busy in enumerate(sorted(busies, reverse=True), 1)])
                for each in shown
                if (busies := [worker.utilisation for worker in each.workers])
            ],
        ),
    ]
    if any(len(each.tenants) > 1 for each in ran):
        drawn.append(_tenants(answered))
    if len(ran) > 1:
        drawn.append(_goodput(ran))
    return drawn


def _name(figures: Figures) -> str:
    return figures.label or "all"


def _distributions(ran: Sequence[Figures]) -> list[Line]:
    lines = []
    for each in ran[:_LINES_MAX]:
        histogram = each.total.latency
        shares = [share for share in _SHARES if (1 - share) * histogram.total >= 1]
        points = zip(shares, histogram.quantiles(shares), strict=True)
        lines.append(Line(_name(each), [(share, value / 1e6) for share, value in points]))
    return lines


def _tenants(ran: Sequence[Figures]) -> Chart:
    """Of each tenant's answers, by run."""
    lines = []
    for each in ran:
        for tenant, row in each.tenants.items():
            shares = [share for share in _SHARES if (1 - share) * row.latency.total >= 1]
            points = zip(shares, row.latency.quantiles(shares), strict=True)
            if shares:
                lines.append(Line(f"{_name(each)}: {tenant or '-'}", [(share, value / 1e6) for share, value in points]))
    return Chart(
        "tenants",
        "Latency distribution of each tenant",
        Axis("of its answers", TAIL),
        Axis("latency, ms", LOG),
        lines[:_LINES_MAX],
    )


def _goodput(ran: Sequence[Figures]) -> Chart:
    by_rate = sorted(ran, key=lambda each: each.total.arrived)
    return Chart(
        "goodput",
        "Answered inside the deadline, by what is asked for",
        Axis("requests/s asked"),
        Axis("requests/s"),
        [
            Line(
                "good",
                [(each.total.arrived / each.seconds, each.good_per_s) for each in by_rate],
                [_name(each) for each in by_rate],
            ),
            Line("answered", [(each.total.arrived / each.seconds, each.answered_per_s) for each in by_rate]),
        ],
    )


def write_report(path: Path, lines: Sequence[str], ran: Sequence[Figures]) -> bool:
    """``lines``: as printed. For a PNG ``path`` has the first chart, and each other lies beside it under its own name
    behind that. False without matplotlib. Raises OSError."""
    drawn = charts(ran)
    if path.suffix == ".html":
        write_whole(path, _page(lines, drawn))
        return True
    with tempfile.TemporaryDirectory(prefix="penstock-simulate-") as directory:
        if not draw_pngs(drawn, Path(directory)):
            return False
        for number, chart in enumerate(drawn):
            to = path if number == 0 else path.with_name(f"{path.stem}-{chart.name}.png")
            write_whole(to, (Path(directory) / f"{chart.name}.png").read_bytes())
    return True


def _page(lines: Sequence[str], drawn: Sequence[Chart]) -> str:
    parts = [
        "<!DOCTYPE html>",
        '<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">',
        f"<title>penstock simulate: {escape(lines[0])}</title><style>{_STYLE}</style></head><body>",
        "<h1>penstock simulate</h1>",
        f"<pre>{escape(chr(10).join(lines))}</pre>",
        *map(draw_svg, drawn),
        "</body></html>",
    ]
    return "\n".join(parts) + "\n"
