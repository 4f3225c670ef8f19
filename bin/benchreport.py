"""The report of ``penstock bench``: one HTML file that needs nothing else, and its plots as PNG files."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Final

from penstock.bin.charts import LOG, TAIL, Axis, Chart, Line, draw_pngs, draw_svg
from penstock.bin.files import write_whole

if TYPE_CHECKING:
    from penstock.load.measure import Figures

NO_PNG: Final = "no PNG files: matplotlib is missing; pip install 'penstock[report]' (the HTML has all the plots)"
_SHARES: Final = tuple(1 - 10 ** -(step / 20) for step in range(20 * 5 + 1))  # to 99.999 %
_STYLE: Final = (
    "body{font:15px/1.5 sans-serif;max-width:900px;margin:2em auto;padding:0 1em;color:#222}"
    "table{border-collapse:collapse;margin:1em 0}td,th{padding:.25em .7em;text-align:right}"
    "tr{border-bottom:1px solid #ddd}"
    "td:first-child,th:first-child,td:last-child,th:last-child{text-align:left}svg{width:100%;margin:1em 0}"
)


def charts(measured: Sequence[tuple[str, Figures]]) -> list[Chart]:
    """``measured``: what came of each load, with its label."""
    from penstock.load.measure import series

    answered = [(label, each, series(each)) for label, each in measured if each.histogram().total]
    milliseconds = Axis("latency, ms", LOG)
    seconds = Axis("seconds since the measurement began")
    return [
        Chart(
            "latency",
            "Latency distribution",
            Axis("of all requests", TAIL),
            milliseconds,
            [Line(label, _distribution(each)) for label, each, _ in answered],
        ),
        Chart(
            "time",
            "Latency over time (p50 and p99)",
            seconds,
            milliseconds,
            [
                Line(f"{label}, {name}", [(part[0], part[column] * 1e3) for part in parts])
                for label, _, parts in answered
                for name, column in (("p50", 1), ("p99", 2))
            ],
        ),
        Chart(
            "throughput-time",
            "Answers over time",
            seconds,
            Axis("requests/s"),
            [Line(label, [(part[0], part[3]) for part in parts]) for label, _, parts in answered],
        ),
        Chart(
            "throughput",
            "Latency against throughput",
            Axis("requests/s"),
            milliseconds,
            [
                Line(
                    name,
                    [(each.requests_per_s, each.quantiles[at] * 1e3) for _, each, _ in answered],
                    [label for label, _, _ in answered] if at == 2 else [],
                )
                for name, at in (("p50", 0), ("p99", 2))
            ],
        ),
    ]


def _distribution(each: Figures) -> list[tuple[float, float]]:
    """Milliseconds by share, as far out as there are requests beyond it."""
    histogram = each.histogram()
    shares = [share for share in _SHARES if (1 - share) * histogram.total >= 1]
    return [(share, value / 1e6) for share, value in zip(shares, histogram.quantiles(shares), strict=True)]


def write_report(
    directory: Path,
    introduction: Sequence[str],
    table: Sequence[Sequence[str]],
    notes: Sequence[str],
    measured: Sequence[tuple[str, Figures]],
) -> tuple[Path, str]:
    """``table``: rows of cells, the heads first. Returns the HTML file, and a sentence when there are no PNG files.
    Raises OSError."""
    drawn = charts(measured)
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "report.html"
    write_whole(path, _page(introduction, table, notes, drawn))
    return path, "" if draw_pngs(drawn, directory) else NO_PNG


def _page(
    introduction: Sequence[str], table: Sequence[Sequence[str]], notes: Sequence[str], drawn: Sequence[Chart]
) -> str:
    heads, *rows = table
    lines = [
        "<!DOCTYPE html>",
        '<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">',
        f"<title>penstock bench: {escape(introduction[0])}</title><style>{_STYLE}</style></head><body>",
        "<h1>penstock bench</h1>",
        *(f"<p>{escape(line.strip())}</p>" for line in introduction),
        f"<p>{datetime.now(UTC):%Y-%m-%d %H:%M} UTC</p>",
        "<table><tr>" + "".join(f"<th>{escape(head)}</th>" for head in heads) + "</tr>",
        *("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows),
        "</table>",
        *(f"<p>{escape(note)}</p>" for note in notes),
        *map(draw_svg, drawn),
        "</body></html>",
    ]
    return "\n".join(lines) + "\n"
