"""What ``penstock check`` says of one model: the file, what becomes of it, and what it costs on this machine."""

from __future__ import annotations

import textwrap
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Final

from penstock.bin.cpus import usable_cpus
from penstock.wire.models import TensorSpec

if TYPE_CHECKING:
    from penstock.worker.advice import Facts
    from penstock.worker.model import Model
    from penstock.worker.onnxfile import OnnxFile, Port
    from penstock.worker.repository import ModelFile
    from penstock.worker.trial import Measured, Optimized, Step

_OPTIMIZE_SHARE: Final = 0.4  # of the seconds, at most
_LEAST_S: Final = 1.0
_WRAP_LEAST: Final = 60  # columns; narrower ones wrap in the terminal
_EIGHTHS: Final = " ▏▎▍▌▋▊▉"
_BAR_MAX: Final = 40  # columns
_OPERATORS_MAX: Final = 100  # letters
_HEADS: Final = ("rows", "ms/batch", "µs/row", "rows/s", "memory")


def gather(file: ModelFile, model: Model, seconds: float) -> Facts:
    """All that can be found out about a model, within so many seconds or little more. Raises OnnxFileError."""
    from penstock.worker.advice import Facts
    from penstock.worker.onnxfile import read_onnx
    from penstock.worker.trial import measure, optimize

    until = time.monotonic() + seconds
    said = read_onnx(file.path)
    optimized = optimize(file.path, seconds * _OPTIMIZE_SHARE)
    spec, left = model.spec, max(_LEAST_S, until - time.monotonic())
    measured = measure(file.path, file.config, model.why_alone, spec.max_batch_size, left)
    return Facts(spec, model.why_alone, file.config, said, optimized, measured, len(usable_cpus()))


def render(facts: Facts, columns: int, blocks: bool) -> Iterator[str]:
    """Lines. ``columns``: of the terminal. ``blocks``: whether it shows more than ASCII."""
    from penstock.worker.advice import advise

    def wrap(text: str, indent: int = 2, mark: str = "") -> list[str]:
        rest = " " * (indent + 2)
        first = " " * indent + mark
        width = max(_WRAP_LEAST, columns)
        return textwrap.wrap(
            text, width, initial_indent=first, subsequent_indent=rest, break_long_words=False, break_on_hyphens=False
        )

    yield from wrap(f"file: {_file(facts.file)}")
    yield from wrap(f"inputs: {_tensors(facts.spec.inputs, facts.file.inputs)}")
    yield from wrap(f"outputs: {_tensors(facts.spec.outputs, facts.file.outputs)}")
    yield from wrap(f"batches: {_batches(facts)}")
    yield from wrap(f"weights: {_weights(facts.file, facts.measured)}")
    first, *more = _optimizer(facts.file, facts.optimized)
    yield from wrap(f"optimizer: {first}")
    for line in more:
        yield from wrap(line, 4)
    if facts.measured.steps:
        yield from wrap(_setting(facts))
    if facts.spec.batchable and facts.measured.steps:
        yield from ("    " + line for line in table(facts.measured.steps, blocks))
        yield "  rows/s:"
        yield from ("    " + line for line in plot(facts.measured.steps, columns - 4, blocks))
    if facts.measured.cut:
        yield from wrap(f"cut short: {facts.measured.cut}")
    advice = advise(facts)
    yield "  what to change:" if advice else "  what to change: nothing that could be seen"
    for sentence in advice:
        yield from wrap(sentence, 4, "- ")


# --- the file ---


def _file(file: OnnxFile) -> str:
    from penstock.worker.advice import counted, operators

    opsets = ", ".join(f"{domain or 'opset'} {version}" for domain, version in sorted(file.opsets.items()))
    maker = f", made by {file.producer}" if file.producer else ""
    counts = operators(file.operators)
    if len(counts) > _OPERATORS_MAX:
        counts = counts[:_OPERATORS_MAX].rpartition(",")[0] + ", ..."
    return f"{opsets}, IR version {file.ir_version}{maker}; {counted(sum(file.operators.values()), 'node')}: {counts}"


def _tensors(specs: Sequence[TensorSpec], ports: Sequence[Port]) -> str:
    """With the names that the file has for dimensions."""
    shapes = {port.name: port.shape for port in ports}
    said = []
    for name, datatype, sizes in specs:
        names = shapes.get(name) or [None] * len(sizes)
        shape = [str(size if size >= 0 else dim or "any") for size, dim in zip(sizes, names, strict=True)]
        said.append(f"{name} {datatype} [{', '.join(shape)}]")
    return ", ".join(said) or "none"


def _batches(facts: Facts) -> str:
    config = facts.config
    if facts.spec.batchable:
        said = f"rows of several requests run together, at most {facts.spec.max_batch_size}"
        if config.preferred_batch_sizes:
            said += f", padded to {', '.join(map(str, config.preferred_batch_sizes))}"
        if config.latency_target is not None and (rows := _picked(facts)):
            said += f"; {rows} for latency_target = '{config.latency_target}', as fast as it is here and now"
        return said
    return f"each request runs by itself: {facts.why_alone}"


def _picked(facts: Facts) -> int:
    """The rows of a batch that a worker picks for a latency target; 0: nothing was measured."""
    from penstock.worker.costs import Curve
    from penstock.worker.tuning import batch_time

    steps = facts.measured.steps
    if not steps:
        return 0
    curve = Curve([step.rows for step in steps], facts.config.preferred_batch_sizes is not None)
    curve.begin({step.rows: step.seconds for step in steps})
    return curve.rows_within(batch_time(facts.config.latency_target_s))


def _weights(file: OnnxFile, measured: Measured) -> str:
    from penstock.worker.advice import amount, counted

    said = f"{amount(file.weight_bytes)} in {counted(file.weights, 'tensor')}" if file.weights else "none"
    if file.external_files:
        names = ", ".join(file.external_files[:3]) + (", ..." if len(file.external_files) > 3 else "")
        said += f", {amount(file.external_bytes)} of them beside the file ({names})"
    return (
        f"{said}; loaded, the model takes {amount(measured.loaded_bytes)} of memory" if measured.loaded_bytes else said
    )


def _optimizer(file: OnnxFile, optimized: Optimized) -> list[str]:
    from penstock.worker.advice import changes

    if optimized.problem:
        return [f"what it does is not known ({optimized.problem})"]
    return changes(file.operators, optimized.operators)


# --- the table and the plot ---


def _setting(facts: Facts) -> str:
    """What was measured; all of it where there is only one kind of batch."""
    from penstock.worker.advice import counted

    spec, [first, *_] = facts.spec, facts.measured.steps
    said = f"measured here, on {counted(facts.config.intra_op_threads, 'thread')}"
    if any(-1 in each.shape[1 if spec.batchable else 0 :] for each in spec.inputs):
        said += f", with {facts.measured.size} for dimensions of any size"
    if spec.batchable:
        return f"{said}:"
    return (
        f"{said}: {first.seconds * 1e3:.3f} ms a request, {first.rows_per_s:,.0f} requests/s, "
        f"+{first.grown_bytes / (1 << 20):.1f} MiB of memory"
    )


def table(steps: Sequence[Step], blocks: bool) -> list[str]:
    """A line of heads and one for each step, in columns that end together."""
    heads = [head if blocks else head.replace("µ", "u") for head in _HEADS]
    rows = [
        [
            f"{step.rows}",
            f"{step.seconds * 1e3:.3f}",
            f"{step.row_s * 1e6:.1f}",
            f"{step.rows_per_s:,.0f}",
            f"+{step.grown_bytes / (1 << 20):.1f} MiB",
        ]
        for step in steps
    ]
    widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]
    return ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in (heads, *rows)]


def plot(steps: Sequence[Step], columns: int, blocks: bool) -> list[str]:
    """A bar for each step, as long as its rows/s. None is longer than the columns that are left, if there are any."""
    labels = [f"{step.rows}" for step in steps]
    width = max(map(len, labels))
    room = max(1, min(_BAR_MAX, columns - width - 1))
    most = max(step.rows_per_s for step in steps)
    lines = []
    for label, step in zip(labels, steps, strict=True):
        eighths = round(step.rows_per_s / most * room * 8)
        whole, part = divmod(eighths, 8)
        bar = "█" * whole + _EIGHTHS[part].strip() if blocks else "#" * round(eighths / 8)
        lines.append(f"{label.rjust(width)} {bar}".rstrip())
    return lines
