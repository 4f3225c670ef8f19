"""``penstock check``"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import click

from penstock.bin import options
from penstock.bin.bundled import BUNDLED_MODELS
from penstock.client.client import DEFAULT_ARENA_BYTES
from penstock.wire.arena import available_bytes, planned_bytes
from penstock.wire.datatypes import ITEM_SIZES, element_count
from penstock.wire.models import ModelSpec, TensorSpec

if TYPE_CHECKING:
    from penstock.worker.model import Model
    from penstock.worker.repository import ModelFile


@click.command()
@click.argument("models", type=click.Path(path_type=Path), default=BUNDLED_MODELS)
@options.workers
@options.gateways
@options.config_file
@click.option("--verbose", is_flag=True, help="The report on each model of a repository, too.")
@click.option(
    "--seconds",
    type=click.FloatRange(1.0, 3600.0),
    default=20.0,
    show_default=True,
    help="What the report on one model may take.",
)
def check(models: Path, workers: int, gateways: int, config: Path | None, verbose: bool, seconds: float) -> None:
    """Say what fits, and start nothing: a server's shared memory into that of this machine, and requests for MODELS (a
    repository or an .onnx file) into the shared memory.

    Of a single .onnx file, and of each model with --verbose, it also reports what is in it, how fast it runs here in
    batches of different sizes, what memory that takes, and what to change.

    Exit code 2, with a sentence each: too little memory, and models that cannot be served. What would be refused, or
    cost more than it need, and settings that have no effect are warnings.
    """
    from penstock.worker.repository import RepositoryError, find_models

    limits = options.load_options(config)
    # In the order in which they start: who comes later finds less.
    kinds = [Kind("worker", workers, limits.worker.arena_bytes), Kind("gateway", gateways, limits.gateway.arena_bytes)]
    arenas, problems = _check_memory(kinds, available_bytes())
    _check_bodies(limits.gateway.body_bytes_max, arenas["gateway"])
    try:
        for file in find_models(models):
            problems += _check_model(file, arenas, seconds if verbose or file.path == models else 0.0)
    except RepositoryError as error:
        problems.append(str(error))
    for problem in problems:
        click.echo(f"penstock: {problem}", err=True)
    sys.exit(options.EXIT_CANNOT_SERVE if problems else 0)


class Kind(NamedTuple):
    """Processes of a server. ``asked``: what their section of the configuration says of ``arena_bytes``."""

    name: str
    number: int
    asked: int


def _check_memory(kinds: Sequence[Kind], available: int) -> tuple[dict[str, int], list[str]]:
    """The size of an arena of each kind, the smallest where they differ, and what is wrong with them together."""
    click.echo(f"memory: {_amount(available)} available")
    arenas: dict[str, int] = {}
    total = 0
    for name, number, asked in kinds:
        sizes: list[int] = []
        for _ in range(number):
            sizes.append(planned_bytes(asked, max(0, available - total)))
            total += sizes[-1]
        arenas[name] = min(sizes)
        each = " to ".join(dict.fromkeys([_amount(min(sizes)), _amount(max(sizes))]))
        click.echo(f"{name}: {number} with {each} of shared memory each ([{name}] arena_bytes)")
    click.echo(f"client: {_amount(DEFAULT_ARENA_BYTES)} unless it says otherwise (Client(arena_bytes=...))")
    click.echo(f"server: {_amount(total)} of shared memory, which {'fits' if total <= available else 'does not fit'}")
    if total <= available:
        return arenas, []
    names = " and ".join(f"{kind.number} {kind.name}{'s' if kind.number > 1 else ''}" for kind in kinds)
    keys = " and ".join(f"[{kind.name}]" for kind in kinds)
    return arenas, [
        f"{names} take {total} bytes of shared memory, and {available} bytes of memory are available; make arena_bytes "
        f"smaller ({keys}), start fewer, or free memory"
    ]


def _check_bodies(body_bytes_max: int, room: int) -> None:
    """``room``: bytes of a gateway's arena."""
    click.echo(f"body: {_amount(body_bytes_max)} at most ([gateway] body_bytes_max)")
    if 0 < room < body_bytes_max:
        click.echo(
            f"warning: body_bytes_max allows {body_bytes_max} bytes, and a gateway's shared memory has {room}: tensors "
            "that take more are refused; raise [gateway] arena_bytes, or lower body_bytes_max"
        )


def _check_model(file: ModelFile, arenas: dict[str, int], seconds: float) -> list[str]:
    """Why a model cannot be served, if so. ``seconds``: for a report; 0: none."""
    from penstock.worker.model import LoadError
    from penstock.worker.probe import load_and_probe, unheeded

    try:
        model = load_and_probe(file, warm=False)
    except LoadError as error:
        return [str(error)]
    for line in _describe(model.spec, arenas["gateway"], arenas["worker"]):
        click.echo(line)
    for sentence in unheeded(file, model):
        click.echo(f"warning: model {model.spec.name}: {sentence}")
    if seconds:
        _report(file, model, seconds)
    return []


def _report(file: ModelFile, model: Model, seconds: float) -> None:
    from penstock.bin.report import gather, render
    from penstock.worker.onnxfile import OnnxFileError

    try:
        facts = gather(file, model, seconds)
    except OnnxFileError as error:  # it has been loaded, so it can be served all the same
        click.echo(f"  no report: {error}")
        return
    columns = shutil.get_terminal_size().columns
    for line in render(facts, columns, _shows_blocks(sys.stdout.encoding)):
        click.echo(line)


def _shows_blocks(encoding: str | None) -> bool:
    """Whether a terminal shows more than ASCII, as far as its encoding tells."""
    try:
        "µ█▏".encode(encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return False
    return True


def _describe(spec: ModelSpec, gateway: int, worker: int) -> Iterator[str]:
    """What a model's tensors take of the arenas of a gateway and a worker: their bytes, 0 for none."""
    taken, given = _bytes_of(spec.inputs, spec.batchable), _bytes_of(spec.outputs, spec.batchable)
    unit, rows = ("row", spec.max_batch_size) if spec.batchable else ("request", 1)
    line = f"model {spec.name}: {_say(taken)} in and {_say(given)} out for each {unit}"
    if taken and gateway:
        line += f"; a gateway has room for {gateway // taken} {unit}s"
        if rows > 1:
            line += f", {gateway // (taken * rows)} full batches of {rows}"
    yield line
    size = f"{rows} rows take" if spec.batchable else "one request takes"
    if taken and 0 < gateway < taken * rows:
        yield (
            f"warning: model {spec.name}: {size} {taken * rows} bytes in, and a gateway's shared memory has {gateway}: "
            "such requests are refused; raise [gateway] arena_bytes"
        )
    if given and 0 < worker < given * rows:
        yield (
            f"warning: model {spec.name}: {size} {given * rows} bytes out, and a worker's shared memory has {worker}: "
            "such results travel in messages, which costs more; raise [worker] arena_bytes"
        )


def _bytes_of(tensors: Sequence[TensorSpec], batchable: bool) -> int | None:
    """What one row of all these takes, or one request where rows do not share batches; None when no shape says."""
    total = 0
    for tensor in tensors:
        shape = tensor.shape[1:] if batchable else tensor.shape
        if tensor.datatype == "BYTES" or -1 in shape:
            return None
        total += element_count(shape) * ITEM_SIZES[tensor.datatype]
    return total


def _say(nbytes: int | None) -> str:
    return "any number of bytes" if nbytes is None else f"{nbytes} bytes"


def _amount(nbytes: int) -> str:
    return f"{nbytes / (1 << 20):.1f} MiB" if nbytes >= 1 << 20 else f"{nbytes} bytes"
