"""Line charts, drawn as SVG without a library, or as PNG files by matplotlib where that is installed."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Final

from penstock.bin.files import write_whole

LINEAR: Final = "linear"
LOG: Final = "log"
TAIL: Final = "tail"  # shares of 1, by how many nines they have: 0, 0.9, 0.99, 0.999 lie equally far apart

_WIDTH: Final = 860.0
_HEIGHT: Final = 380.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 70.0, 34.0, 40.0, 52.0
_LEGEND: Final = 18.0  # the height of a line in it
_COLORS: Final = ("#1b6ca8", "#d1495b", "#2e8b57", "#b8860b", "#6a4c93", "#00868b", "#8b4513", "#555555")
_NINES_MAX: Final = 6
_TICKS: Final = 6


@dataclass(frozen=True, slots=True)
class Axis:
    """``scale``: one of the three above."""

    title: str
    scale: str = LINEAR


@dataclass(frozen=True, slots=True)
class Line:
    """``points``: x and y. ``names``: of its points, written beside them; none or one for each."""

    name: str
    points: Sequence[tuple[float, float]]
    names: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class Chart:
    """``name``: of its file."""

    name: str
    title: str
    x: Axis
    y: Axis
    lines: Sequence[Line]


def place(scale: str) -> Callable[[float], float]:
    """Where a value lies on an axis, in any unit. For LOG what is not positive lies at a billionth."""
    if scale == LOG:
        return lambda value: math.log10(max(value, 1e-9))
    if scale == TAIL:
        return lambda value: min(_NINES_MAX, -math.log10(max(1.0 - value, 10.0**-_NINES_MAX)))
    return lambda value: value


def ticks(low: float, high: float, scale: str) -> list[float]:
    """Round values from ``low`` to ``high``, at least one of which each lies on or beyond an end."""
    if scale == TAIL:
        last = max(1, math.ceil(place(TAIL)(high) - 1e-9))
        return [1.0 - 10.0**-nines for nines in range(last + 1)]
    if scale == LOG:
        begin, end = math.floor(place(LOG)(low)), math.ceil(place(LOG)(high))
        powers = range(begin, max(end, begin + 1) + 1)
        if len(powers) <= 3:
            steps = [each * 10.0**power for power in powers for each in (1, 2, 5)]
            first = max([step for step in steps if step <= max(low, 1e-9)], default=steps[0])
            last_step = min([step for step in steps if step >= high], default=steps[-1])
            found = [step for step in steps if first <= step <= last_step]
            return found if len(found) > 1 else [found[0], found[0] * 10]
        return [10.0**power for power in powers]
    # Values that differ by less have no marks between them that would differ.
    step = _round_step(max(high - low, 1e-6 * abs(high)) / _TICKS)
    first_number, last_number = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [number * step for number in range(first_number, max(last_number, first_number + 1) + 1)]


def _round_step(step: float) -> float:
    """1, 2 or 5 times a power of ten, not less than ``step``."""
    if step <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(step))
    return next((each * power for each in (1, 2, 5) if each * power >= step * (1 - 1e-9)), 10 * power)


def say(value: float, scale: str) -> str:
    """A tick."""
    if scale == TAIL:
        return f"{value * 100:.6g}%"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def draw_svg(chart: Chart) -> str:
    """An <svg> element that needs nothing from outside."""
    xs = [x for line in chart.lines for x, _ in line.points] or [0.0, 1.0]
    ys = [y for line in chart.lines for _, y in line.points] or [0.0, 1.0]
    x_ticks = ticks(0.0 if chart.x.scale == LINEAR else min(xs), max(xs), chart.x.scale)
    y_ticks = ticks(0.0 if chart.y.scale == LINEAR else min(ys), max(ys), chart.y.scale)
    to_x = _scaled(x_ticks, chart.x.scale, _LEFT, _WIDTH - _RIGHT)
    to_y = _scaled(y_ticks, chart.y.scale, _HEIGHT - _BOTTOM, _TOP)
    height = _HEIGHT + _LEGEND * math.ceil(len(chart.lines) / 4)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH:g} {height:g}" role="img" '
        f'font-family="sans-serif" font-size="12">',
        f"<title>{escape(chart.title)}</title>",
        f'<text x="{_LEFT:g}" y="22" font-size="15" font-weight="bold">{escape(chart.title)}</text>',
    ]
    for value in x_ticks:
        x = to_x(value)
        parts.append(f'<path d="M{x:.1f} {_TOP:g}V{_HEIGHT - _BOTTOM:g}" stroke="#ddd"/>')
        parts.append(_text(x, _HEIGHT - _BOTTOM + 16, say(value, chart.x.scale), "middle"))
    for value in y_ticks:
        y = to_y(value)
        parts.append(f'<path d="M{_LEFT:g} {y:.1f}H{_WIDTH - _RIGHT:g}" stroke="#ddd"/>')
        parts.append(_text(_LEFT - 6, y + 4, say(value, chart.y.scale), "end"))
    parts.append(_text((_LEFT + _WIDTH - _RIGHT) / 2, _HEIGHT - 14, chart.x.title, "middle"))
    middle = (_TOP + _HEIGHT - _BOTTOM) / 2
    parts.append(f'<g transform="rotate(-90 16 {middle:g})">{_text(16, middle, chart.y.title, "middle")}</g>')
    for number, line in enumerate(chart.lines):
        parts += _draw_line(line, _COLORS[number % len(_COLORS)], to_x, to_y)
        x, y = _LEFT + number % 4 * 195, _HEIGHT + _LEGEND * (number // 4) + 4
        parts.append(f'<path d="M{x:g} {y - 4:g}h18" stroke="{_COLORS[number % len(_COLORS)]}" stroke-width="3"/>')
        parts.append(_text(x + 24, y, line.name, "start"))
    return "".join([*parts, "</svg>"])


def _draw_line(line: Line, color: str, to_x: Callable[[float], float], to_y: Callable[[float], float]) -> Iterator[str]:
    places = [(to_x(x), to_y(y)) for x, y in line.points]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    yield f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="1.8"/>'
    for (x, y), name in zip(places, line.names, strict=False):
        yield f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{color}"/>'
        yield _text(min(x + 5, _WIDTH - _RIGHT - 40), y - 6, name, "start")


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="#333">{escape(text)}</text>'


def _scaled(marks: Sequence[float], scale: str, begin: float, end: float) -> Callable[[float], float]:
    """Values to coordinates, the first mark at ``begin`` and the last at ``end``."""
    to = place(scale)
    low, high = to(marks[0]), to(marks[-1])
    return lambda value: begin + (to(value) - low) / (high - low) * (end - begin)


def draw_pngs(charts: Sequence[Chart], directory: Path) -> bool:
    """A file for each, DIRECTORY/NAME.png; False without matplotlib. Raises OSError."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    for chart in charts:
        figure = Figure(figsize=(9, 4.5), layout="constrained")
        axes = figure.add_subplot()
        axes.set_title(chart.title)
        axes.grid(alpha=0.3)
        to_x = place(chart.x.scale) if chart.x.scale == TAIL else float
        for number, line in enumerate(chart.lines):
            x, y = [to_x(each) for each, _ in line.points], [each for _, each in line.points]
            marker = "o" if line.names else None
            axes.plot(x, y, label=line.name, color=_COLORS[number % len(_COLORS)], marker=marker, markersize=4)
            for name, at_x, at_y in zip(line.names, x, y, strict=False):
                axes.annotate(name, (at_x, at_y), textcoords="offset points", xytext=(5, 5), fontsize=8)
        if chart.x.scale == TAIL:
            marks = ticks(0.0, max((x for line in chart.lines for x, _ in line.points), default=0.9), TAIL)
            axes.set_xticks([to_x(mark) for mark in marks], [say(mark, TAIL) for mark in marks])
        elif chart.x.scale == LOG:
            axes.set_xscale("log")
        if chart.y.scale == LOG:
            axes.set_yscale("log")
        axes.set_xlabel(chart.x.title)
        axes.set_ylabel(chart.y.title)
        axes.legend(fontsize=8)
        picture = io.BytesIO()
        figure.savefig(picture, dpi=120, format="png")
        write_whole(directory / f"{chart.name}.png", picture.getvalue())
    return True
