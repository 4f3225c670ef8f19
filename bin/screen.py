"""A view of a server as text for a terminal. Pure: what is seen is a function of the view and the size.

Names and reasons come from the server: they are put in as plain text, and what is no printable character is replaced,
so that none can say anything to the terminal.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final, Generic, TypeVar

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.measure import Measurement
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from penstock.gateway.figures import BROKER, GpuFigures, ModelFigures, ProcessFigures, View
from penstock.wire.models import LOADING, READY

T = TypeVar("T")

_BARS: Final = "▁▂▃▄▅▆▇█"
_NOTHING: Final = "-"
_GOOD: Final = "green"
_BAD: Final = "bold red"
_SOFT: Final = "bright_black"


@dataclass(frozen=True, slots=True)
class Column(Generic[T]):
    """``from_width``: of the terminal, in characters, from which on there is room for it."""

    title: str
    cell: Callable[[T], str | Text]
    from_width: int = 0
    number: bool = True


def plain(text: str, style: str = "") -> Text:
    return Text("".join(each if each.isprintable() else "\N{REPLACEMENT CHARACTER}" for each in text), style=style)


def number(value: float | None) -> str:
    if value is None:
        return _NOTHING
    if value >= 9999.5:
        return f"{value / 1000:.0f}k" if value >= 99_950 else f"{value / 1000:.1f}k"
    if value >= 99.5 or value == int(value):
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 0.05 else "<0.1"


def duration(seconds: float | None) -> str:
    if seconds is None:
        return _NOTHING
    if seconds >= 0.9995:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    ms = seconds * 1000
    return f"{ms:.2f} ms" if ms < 1 else f"{ms:.1f} ms" if ms < 10 else f"{ms:.0f} ms"


def size(nbytes: int) -> str:
    if not nbytes:
        return _NOTHING
    unit, name = (1 << 20, "MiB") if nbytes < 1 << 30 else (1 << 30, "GiB")
    return f"{nbytes / unit:.1f} {name}" if nbytes < 10 * unit else f"{nbytes / unit:.0f} {name}"


def bars(values: Sequence[float]) -> str:
    """A bar for each value, as high as it is beside the largest; nothing for nothing."""
    highest = max(values, default=0.0)
    return "".join(
        _BARS[max(0, min(len(_BARS) - 1, round(value / highest * len(_BARS)) - 1))] if value > 0 else " "
        for value in values
    )


@dataclass(frozen=True, slots=True)
class Screen:
    """What is seen. ``note``: where it comes from; ``lost``: why nothing new comes, "" while it does; ``rates`` and
    ``queues``: of the last views, the newest last. With ``whole`` it is as high as it needs to be."""

    view: View | None
    note: str
    lost: str = ""
    rates: Sequence[float] = ()
    queues: Sequence[float] = ()
    whole: bool = False

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        height = None if self.whole else (options.height or console.height)
        lines = console.render_lines(self._group(options.max_width, height), options.update(height=None), pad=False)
        for at, line in enumerate(lines[:height]):
            yield from line
            if self.whole or at + 1 < min(len(lines), height or 0):
                yield Segment.line()

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        return Measurement(1, options.max_width)

    def _group(self, width: int, height: int | None) -> Group:
        return Group(*self._parts(width, height))

    def _parts(self, width: int, height: int | None) -> Iterator[RenderableType]:
        yield self._heading()
        view = self.view
        if view is None:
            if not self.lost:
                yield Text("nothing is known yet", style=_SOFT)
            return
        yield from _problems(view)
        yield Text()
        yield from self._totals(view, width)
        yield Text()
        processes = sorted(view.processes, key=lambda each: each.missing_s is None)
        models = sorted(view.models, key=lambda each: (each.state == READY, -each.rate, each.name, each.version))
        # What is above takes a line for each problem, and some more; tables have a heading each and a line between.
        left = None if height is None else max(2, height - 12 - len(view.problems))
        if view.gpus:
            gpus = sorted(view.gpus, key=lambda each: not each.lost)
            most = None if left is None else max(1, min(len(gpus), left // 3))
            yield from _table(_GPU_COLUMNS, gpus, width, most)
            yield Text()
            left = None if left is None or most is None else max(2, left - most - 2)
        share = None if left is None else max(1, min(len(processes), left // 2), left - len(models))
        yield from _table(_process_columns(view), processes, width, share)
        yield Text()
        left_for_models = None if left is None or share is None else max(1, left - min(share, len(processes)))
        yield from _table(_model_columns(view), models, width, left_for_models, view.models_left_out)

    def _heading(self) -> Text:
        text = Text.assemble(("Penstock", "bold"), "  ", plain(self.note, _SOFT), no_wrap=True, overflow="ellipsis")
        if self.lost:
            text.append_text(Text("\n")).append_text(plain(f"trying again: {self.lost}", _BAD))
        return text

    def _totals(self, view: View, width: int) -> Iterator[Text]:
        known = view.seconds > 0
        failing = sum(view.failures.values())
        yield _line(
            ("requests/s ", number(view.rate) if known else _NOTHING),
            ("p50 ", duration(view.p50_s)),
            ("p95 ", duration(view.p95_s)),
            ("waiting ", number(view.queue)),
            ("running ", number(view.running)),
            ("clients ", number(view.clients)),
        )
        failures = _line(("failures/s ", number(failing) if known else _NOTHING))
        if failing:
            failures.stylize(_BAD)
            reasons = ", ".join(f"{reason} {number(rate)}" for reason, rate in view.failures.items())
            failures.append_text(plain(f"  {reasons}"))
        yield failures
        places = [*(f"{bound:.0f}" for bound in view.bounds), "more"]
        total = sum(view.batches)
        ran = [f"{place}: {count / total:.0%}" for place, count in zip(places, view.batches, strict=False) if count]
        yield _line(("rows/batch ", number(view.rows)), ("batches by rows ", ", ".join(ran) or _NOTHING))
        for title, values in (("requests/s ", self.rates), ("waiting    ", self.queues)):
            if values:
                yield Text.assemble((title, _SOFT), bars(values[-max(1, width - len(title) - 1) :]), no_wrap=True)


def _line(*pairs: tuple[str, str]) -> Text:
    text = Text()
    for title, value in pairs:
        text.append("   " if len(text) else "").append(title, _SOFT).append(value, "bold")
    return text


def _problems(view: View) -> Iterator[Text]:
    if not view.problems:
        models = len(view.models) + view.models_left_out
        yield Text(f"all is well: {models} model{' is' if models == 1 else 's are'} ready", style=_GOOD)
    for problem in view.problems:
        text = plain(problem, _BAD)
        text.no_wrap, text.overflow = True, "ellipsis"
        yield text


def _rated(view: View, value: float | None) -> str:
    return number(value) if view.seconds else _NOTHING


def _model_columns(view: View) -> Sequence[Column[ModelFigures]]:
    return (
        Column("Model", lambda model: plain(model.name), number=False),
        Column("Version", lambda model: plain(model.version), 100, number=False),
        Column("State", _state, number=False),
        Column("Workers", lambda model: number(model.workers), 120),
        Column("Req/s", lambda model: _rated(view, model.rate)),
        Column("Fail/s", lambda model: _rated(view, model.failures), 60),
        Column("Waiting", lambda model: number(model.queue), 70),
        Column("Running", lambda model: number(model.running), 110),
        Column("p50", lambda model: duration(model.p50_s), 80),
        Column("p95", lambda model: duration(model.p95_s), 50),
        Column("Rows/batch", lambda model: number(model.rows), 90),
    )


def _state(model: ModelFigures) -> Text:
    return Text(model.state, style=_GOOD if model.state == READY else "yellow" if model.state == LOADING else _BAD)


def _process_columns(view: View) -> Sequence[Column[ProcessFigures]]:
    def state(each: ProcessFigures) -> Text:
        if each.missing_s is not None:
            return Text(f"missing for {each.missing_s:.0f} s", style=_BAD)
        if not view.broker and each.name not in (BROKER, view.gateway):
            return Text("not known", style="yellow")
        return Text("up", style=_GOOD)

    def shared(each: ProcessFigures) -> str:
        if not each.shared_bytes:
            return _NOTHING
        return f"{each.shared_used_bytes / each.shared_bytes:.0%} of {size(each.shared_bytes)}"

    return (
        Column("Process", lambda each: plain(each.name), number=False),
        Column("Role", lambda each: plain(each.role), 70, number=False),
        Column("State", state, number=False),
        Column("CPU", lambda each: f"{each.cpu:.0%}" if view.seconds else _NOTHING),
        Column("Memory", lambda each: size(each.memory_bytes), 60),
        Column("Shared memory", shared, 110),
        Column("Req/s", lambda each: _rated(view, each.rate), 50),
        Column("p50", lambda each: duration(each.p50_s), 90),
        Column("p95", lambda each: duration(each.p95_s), 80),
    )


def _gpu_state(gpu: GpuFigures) -> Text:
    if gpu.lost:
        return Text("lost", style=_BAD)
    return plain(", ".join(gpu.throttles), "yellow") if gpu.throttles else Text("up", style=_GOOD)


def _gpu_memory(gpu: GpuFigures) -> str:
    if gpu.memory_used_bytes is None or gpu.memory_total_bytes is None:
        return _NOTHING
    return f"{size(gpu.memory_used_bytes)} of {size(gpu.memory_total_bytes)}"


def _gpu_power(gpu: GpuFigures) -> str:
    if gpu.power_w is None:
        return _NOTHING
    return f"{gpu.power_w:.0f} W" if gpu.power_limit_w is None else f"{gpu.power_w:.0f} of {gpu.power_limit_w:.0f} W"


_GPU_COLUMNS: Final[Sequence[Column[GpuFigures]]] = (
    Column("GPU of", lambda gpu: plain(", ".join(gpu.workers)), number=False),
    Column("State", _gpu_state, number=False),
    Column("Busy", lambda gpu: _NOTHING if gpu.utilization is None else f"{gpu.utilization:.0%}"),
    Column("Memory", _gpu_memory, 60),
    Column("Temperature", lambda gpu: _NOTHING if gpu.temperature_c is None else f"{gpu.temperature_c:.0f} °C", 80),
    Column("Power", _gpu_power, 90),
    Column("UUID", lambda gpu: plain(gpu.uuid), 140, number=False),
)


def _table(
    columns: Sequence[Column[T]], rows: Sequence[T], width: int, rows_max: int | None, left_out: int = 0
) -> Iterator[RenderableType]:
    """At most so many lines below the heading; the last one says how many rows are not shown."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold", pad_edge=False)
    chosen = [column for column in columns if width >= column.from_width]
    for column in chosen:
        table.add_column(
            column.title,
            justify="right" if column.number else "left",
            no_wrap=True,
            overflow="ellipsis",
            min_width=None if column is chosen[0] else min(len(column.title), 6),
        )
    shown = len(rows) if rows_max is None or len(rows) + bool(left_out) <= rows_max else max(0, rows_max - 1)
    for row in rows[:shown]:
        table.add_row(*(column.cell(row) for column in chosen))
    yield table
    if more := len(rows) - shown + left_out:
        yield Text(f"and {more} more", style=_SOFT)
