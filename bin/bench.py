"""``penstock bench``"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from penstock.bin import options
from penstock.bin.infer import InputError, read_inputs
from penstock.client import Client, PenstockError
from penstock.client.terms import check_terms
from penstock.wire.messages import MAX_PRIORITY
from penstock.wire.models import READY

if TYPE_CHECKING:
    from penstock.load.job import HttpTarget, Job, LibraryTarget
    from penstock.load.measure import Account, Figures
    from penstock.wire.models import TensorSpec
    from penstock.wire.tensors import Array

DEFAULT_URL: Final = "http://127.0.0.1:8000"
_CONNECTIONS: Final = "1,16,64"
_CONNECTIONS_MAX: Final = 16_384
_OPENED: Final = 16  # connections of an open loop before it begins
_ASK_S: Final = 30.0  # for each question before a load begins
_METRICS_S: Final = 5.0
_LIBRARY_S: Final = 10.0  # for a server to be found with the client library
_FILES: Final = (".npy", ".npz", ".json")


class _Numbers(click.ParamType):  # type: ignore[type-arg]
    """ "1,16,64" -> (1, 16, 64)."""

    name = "numbers"

    def __init__(self, kind: type[int] | type[float], most: float) -> None:
        self._kind = kind
        self._most = most

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[float, ...]:
        if isinstance(value, tuple):
            return value
        try:
            numbers = tuple(self._kind(each.replace("_", "")) for each in str(value).split(","))
        except ValueError:
            self.fail(f"{value!r} is no list of numbers, such as 1,16,64", param, ctx)
        for number in numbers:
            if not 0 < number <= self._most:
                self.fail(f"{number} is not more than 0 and at most {self._most:g}", param, ctx)
        return numbers


@dataclass(frozen=True, slots=True)
class Subject:
    """What is loaded: the same request again and again. ``way``: how it is asked, in words."""

    model: str
    where: str
    way: str
    inputs: Mapping[str, tuple[str, tuple[int, ...]]]  # datatype and shape by name
    target: HttpTarget | LibraryTarget
    account: Account


@click.command()
@click.argument("model")
@click.option("--version", default="", help="Of the model.  [default: the server's choice]")
@click.option("--url", metavar="http://HOST:PORT", default=None, help=f"Of any v2 server.  [default: {DEFAULT_URL}]")
@options.runtime_dir
@options.server
@click.option(
    "--by",
    type=click.Choice(["http", "client"]),
    default=None,
    help="HTTP, or Penstock's client library.  [default: http, unless --runtime-dir or --server is given]",
)
@click.option(
    "--connections",
    metavar="N,...",
    type=_Numbers(int, _CONNECTIONS_MAX),
    default=None,
    help=f"Closed loops: so many ask, each again once it is answered.  [default: {_CONNECTIONS}]",
)
@click.option(
    "--rate",
    metavar="R,...",
    type=_Numbers(float, 1e6),
    default=None,
    help="Open loops instead: so many arrive a second, whether or not those before are answered.",
)
@click.option("--duration", type=options.Duration(0.1), default="10s", show_default=True, help="Of each load.")
@click.option("--warmup", type=options.Duration(), default="1s", show_default=True, help="Before each, not measured.")
@click.option("--timeout", type=options.Duration(0.001), default="30s", show_default=True, help="For each answer.")
@click.option("--deadline", type=options.Duration(), default="0s", help="Answers after that count as late.")
@click.option("--tell-deadline", is_flag=True, help="Requests over HTTP say it, as the parameter 'timeout'.")
@click.option("--priority", type=click.IntRange(0, MAX_PRIORITY), default=0, help="Of all requests, 1 is the highest.")
@click.option("--tenant", default="", help="For whom all requests are.")
@click.option("--rows", type=click.IntRange(1), default=1, show_default=True, help="In each request.")
@click.option(
    "--input",
    "inputs",
    metavar="NAME=SHAPE|FILE",
    multiple=True,
    help="A shape such as x=1x3x224x224, or a .npy, .npz or .json file as 'penstock infer' takes it.",
)
@click.option(
    "--encoding",
    type=click.Choice(["auto", "binary", "json"]),
    default="auto",
    show_default=True,
    help="Of tensors over HTTP; auto: binary where the server says that it can.",
)
@click.option(
    "--outstanding",
    type=click.IntRange(1, _CONNECTIONS_MAX),
    default=1024,
    show_default=True,
    help="Open loop: how many requests are unanswered at most; others are not sent, and counted.",
)
@click.option("--processes", type=click.IntRange(1, 64), default=1, show_default=True, help="That make the load.")
@click.option("--pid", type=click.IntRange(1), multiple=True, help="Of the server, for its processor time.")
@click.option("--metrics", metavar="URL", default=None, help="Where its metrics are.  [default: URL/metrics]")
@click.option("--report", type=click.Path(file_okay=False, path_type=Path), help="Write report.html and plots there.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of a table.")
def bench(
    model: str,
    version: str,
    url: str | None,
    runtime_dir: Path | None,
    server: str | None,
    by: str | None,
    connections: tuple[int, ...] | None,
    rate: tuple[float, ...] | None,
    duration: float,
    warmup: float,
    timeout: float,
    deadline: float,
    tell_deadline: bool,
    priority: int,
    tenant: str,
    rows: int,
    inputs: Sequence[str],
    encoding: str,
    outstanding: int,
    processes: int,
    pid: Sequence[int],
    metrics: str | None,
    report: Path | None,
    as_json: bool,
) -> None:
    """Load MODEL on a server, and say how fast it answers and what that costs.

    Works with any server that speaks the v2 protocol: Penstock, Triton, MLServer, KServe. Inputs are made up in the
    shapes that the server tells. Latencies of an open loop count from when a request was to start: what a slow server
    keeps waiting is not left out.

    Exit code 1: no server, no such model, requests that are refused, or no answer at all under a load.
    """
    from penstock.load.inputs import InputsError
    from penstock.load.run import LoadError
    from penstock.load.server import ServerError

    by = by or ("client" if runtime_dir or server else "http")
    try:
        check_terms(priority, tenant)
    except PenstockError as error:
        raise click.UsageError(error.message) from None
    if by == "http" and (runtime_dir or server):
        raise click.UsageError("--runtime-dir and --server go with --by client; over HTTP it is --url")
    if by == "client" and (url or encoding != "auto"):
        raise click.UsageError(
            "--url and --encoding go with --by http; the client library takes --runtime-dir or --server"
        )
    if tell_deadline and (by == "client" or not deadline):
        raise click.UsageError("--tell-deadline goes with --deadline and --by http; the client library says --timeout")
    told_us = round(deadline * 1e6) if tell_deadline else 0
    try:
        shapes, files = divide_inputs(inputs)
        if by == "http":
            subject = over_http(
                model,
                version,
                url or DEFAULT_URL,
                encoding,
                rows,
                shapes,
                files,
                pid,
                metrics,
                told_us,
                priority,
                tenant,
            )
        else:
            subject = through_library(
                model, version, server or runtime_dir, rows, shapes, files, pid, metrics, priority, tenant
            )
        jobs = make_jobs(subject, connections, rate, outstanding, warmup, duration, timeout, deadline)
        if not as_json:
            click.echo("\n".join(_introduction(subject, duration)))
        measured = [_measure(subject, job, processes) for job in jobs]
    except (InputsError, InputError, ServerError, LoadError, PenstockError) as error:
        click.echo(f"penstock: {error}", err=True)
        sys.exit(1)
    if as_json:
        click.echo(json.dumps(as_object(subject, measured)))
    else:
        click.echo("\n".join(render(measured)))
    if report is not None:
        _write_report(report, subject, measured)
    if not all(each.requests_per_s for each in measured):
        sys.exit(1)


def divide_inputs(given: Sequence[str]) -> tuple[dict[str, tuple[int, ...]], list[str]]:
    """Shapes by name ("" for the only input), and what is left, which are files. Raises InputsError."""
    from penstock.load.inputs import InputsError, parse_shape

    shapes, files = {}, []
    for each in given:
        name, _, value = each.rpartition("=")
        shape = parse_shape(value)
        if shape is not None:
            shapes[name] = shape
        elif each == "-" or each.endswith(_FILES):
            files.append(each)
        else:
            raise InputsError(
                f"{each!r} is neither a shape, such as x=1x3x224x224, nor a file that ends with {', '.join(_FILES)}"
            )
    return shapes, files


def over_http(
    model: str,
    version: str,
    url: str,
    encoding: str,
    rows: int,
    shapes: Mapping[str, tuple[int, ...]],
    files: Sequence[str],
    pids: Sequence[int],
    metrics: str | None,
    timeout_us: int = 0,
    priority: int = 0,
    tenant: str = "",
) -> Subject:
    """``timeout_us``: what requests tell the server of their deadline. ``priority``, ``tenant``: with the headers that
    Penstock knows, and others ignore. Raises click.UsageError, and InputsError,
    InputError and ServerError, also when the request is refused."""
    from penstock.load.measure import Account
    from penstock.load.server import HttpServer, ServerError

    try:
        server = HttpServer(url, _ASK_S)
        told = HttpServer(metrics or f"{server.url}/metrics", _METRICS_S)
    except ValueError as error:
        raise click.UsageError(str(error)) from None
    binary = encoding == "binary" or (encoding == "auto" and server.speaks_binary())
    specs = server.inputs_of(model, version)
    chosen = _choose(model, specs, rows, shapes, files)
    try:
        target = server.prepare(model, version, chosen, specs, binary, timeout_us, _headers(priority, tenant))
    except ServerError as error:
        raise ServerError(f"{error}{_hint(specs, files)}") from None
    way = f"over HTTP, {'binary tensors' if binary else 'JSON'}"
    return Subject(model, server.url, way, _about(specs, chosen), target, Account(model, pids, server, told))


def through_library(
    model: str,
    version: str,
    address: Path | str | None,
    rows: int,
    shapes: Mapping[str, tuple[int, ...]],
    files: Sequence[str],
    pids: Sequence[int],
    metrics: str | None,
    priority: int = 0,
    tenant: str = "",
) -> Subject:
    """Raises click.UsageError, and InputsError, InputError and PenstockError, also when the request is refused."""
    from penstock.load.job import LibraryTarget
    from penstock.load.measure import Account
    from penstock.load.server import HttpServer

    broker = options.broker_address(address)
    try:
        told = HttpServer(metrics, _METRICS_S) if metrics else None
    except ValueError as error:
        raise click.UsageError(str(error)) from None
    where = str(address) if isinstance(address, str) else str(broker)
    with Client(address, timeout=_LIBRARY_S, tenant=tenant) as client:
        states = [state for state in client.models() if state.name == model and version in ("", state.version)]
        spec = next((state.spec for state in states if state.state == READY and state.spec is not None), None)
        if spec is None:  # whatever is wrong, a call says it
            client.infer(model, {}, version=version)
            raise PenstockError("not_found", f"'{model}' is not served")
        specs = list(spec.inputs)
        chosen = _choose(model, specs, rows, shapes, files)
        try:
            client.infer(model, chosen, version=version, priority=priority)
        except PenstockError as error:
            raise PenstockError(error.code, f"{error}{_hint(specs, files)}") from None
    runtime = broker.runtime.path if broker.runtime is not None else None
    target = LibraryTarget(str(address or (runtime or "")), model, version, chosen, priority, tenant)
    account = Account(model, pids, metrics=told, runtime=runtime)
    return Subject(model, where, "with the client library", _about(specs, chosen), target, account)


def _headers(priority: int, tenant: str) -> dict[str, str]:
    headers = {"Penstock-Priority": str(priority)} if priority else {}
    return headers | {"Penstock-Tenant": tenant} if tenant else headers


def _choose(
    model: str, specs: Sequence[TensorSpec], rows: int, shapes: Mapping[str, tuple[int, ...]], files: Sequence[str]
) -> dict[str, Array]:
    """Raises InputsError and InputError."""
    import numpy as np

    from penstock.load.inputs import choose
    from penstock.wire.models import ModelSpec

    # The files are read as for a model of Penstock's; of that, only its inputs count.
    spec = ModelSpec(model, "", "", tuple(specs), (), False, 1)
    arrays = {name: np.asarray(array) for name, array in read_inputs(files, spec).items()} if files else {}
    return choose(model, specs, rows, shapes, arrays)


def _hint(specs: Sequence[TensorSpec], files: Sequence[str]) -> str:
    """What may help when a request is refused: it may be the values, if these are made up."""
    return "" if files else f"; if it is the made-up values, give real ones: --input {specs[0].name}=FILE.npy"


def _about(specs: Sequence[TensorSpec], chosen: Mapping[str, Array]) -> dict[str, tuple[str, tuple[int, ...]]]:
    return {spec.name: (spec.datatype, chosen[spec.name].shape) for spec in specs}


def make_jobs(
    subject: Subject,
    connections: Sequence[int] | None,
    rates: Sequence[float] | None,
    outstanding: int,
    warmup_s: float,
    duration_s: float,
    timeout_s: float,
    deadline_s: float,
) -> list[Job]:
    """Closed loops, or open ones where there are rates: then the largest of ``connections`` is how many are opened
    before."""
    from penstock.load.job import Job

    opened = min(outstanding, max(connections or [_OPENED]))
    loads = [(opened, rate) for rate in rates] if rates else [(each, 0.0) for each in connections or (1, 16, 64)]
    return [
        Job(
            target=subject.target,
            connections=count,
            rate=rate,
            outstanding_max=outstanding,
            warmup_s=warmup_s,
            duration_s=duration_s,
            timeout_s=timeout_s,
            deadline_s=deadline_s,
            seed=number,
        )
        for number, (count, rate) in enumerate(loads)
    ]


def _measure(subject: Subject, job: Job, processes: int) -> Figures:
    from penstock.load.measure import measure

    with progress_bar(label(job.connections, job.rate), job.warmup_s + job.duration_s) as progress:
        return measure(job, processes, subject.account, progress)


@contextmanager
def progress_bar(text: str, seconds: float) -> Iterator[Callable[[float, int], None]]:
    """On a terminal, which standard error is; elsewhere none."""
    if not sys.stderr.isatty():
        yield lambda elapsed_s, answers: None
        return
    bar: Any
    with click.progressbar(length=1000, label=text, file=sys.stderr, item_show_func=lambda each: each or "") as bar:

        def progress(elapsed_s: float, answers: int) -> None:
            share = min(1000, int(1000 * elapsed_s / seconds))
            bar.update(max(0, share - bar.pos), f"{answers / max(elapsed_s, 1e-3):,.0f} requests/s")

        yield progress
        bar.update(1000 - bar.pos, "")


# --- what is printed ---


def label(connections: int, rate: float) -> str:
    """Of a load."""
    if rate:
        return f"{rate:,g}/s"
    return f"{connections:,} connection{'s' if connections > 1 else ''}"


def _introduction(subject: Subject, duration_s: float) -> list[str]:
    said = ", ".join(f"{name} {kind} {list(shape)}" for name, (kind, shape) in subject.inputs.items())
    return [f"{subject.model} at {subject.where}, {subject.way}, {duration_s:g} s each", f"  inputs: {said}"]


_HEADS: Final = ("load", "requests/s", "p50 ms", "p90 ms", "p99 ms", "p99.9 ms", "max ms", "CPU µs", "batch", "errors")


def render(measured: Sequence[Figures]) -> list[str]:
    """Lines: the table, and what must be known to read it."""
    rows = [_row(each) for each in measured]
    return ["  " + line for line in (*columns(_HEADS, rows, left={0, len(_HEADS) - 1}), *_notes(measured))]


def _notes(measured: Sequence[Figures]) -> list[str]:
    from penstock.load.measure import remarks

    unknown = next((each.unknown for each in measured if each.cpu_s is None), "")
    return [
        *([f"CPU µs: not known; {unknown}"] if unknown else []),
        *(f"{label(each.connections, each.rate)}: {sentence}" for each in measured for sentence in remarks(each)),
    ]


def _row(each: Figures) -> list[str]:
    return [
        label(each.connections, each.rate),
        f"{each.requests_per_s:,.0f}" if each.requests_per_s >= 100 else f"{each.requests_per_s:.3g}",
        *(milliseconds(quantile) for quantile in (*each.quantiles, each.max_s)),
        "?" if each.cpu_s is None else f"{each.cpu_s * 1e6:,.0f}" if each.cpu_s >= 1e-4 else f"{each.cpu_s * 1e6:.1f}",
        "?" if each.mean_batch is None else f"{each.mean_batch:.1f}",
        ", ".join(f"{count:,} {outcome}" for outcome, count in each.errors.items()) or "none",
    ]


def milliseconds(seconds: float) -> str:
    """With three digits that count."""
    value = seconds * 1e3
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def columns(heads: Sequence[str], rows: Sequence[Sequence[str]], left: set[int]) -> list[str]:
    """Lines whose cells end together, or begin so in the columns ``left``."""
    widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if number in left else cell.rjust(width)
            for number, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in (heads, *rows)
    ]


def as_object(subject: Subject, measured: Sequence[Figures]) -> dict[str, Any]:
    """For machines: seconds, and nothing rounded."""
    from penstock.load.measure import QUANTILES, remarks

    return {
        "model": subject.model,
        "server": subject.where,
        "way": subject.way,
        "inputs": [{"name": name, "datatype": kind, "shape": shape} for name, (kind, shape) in subject.inputs.items()],
        "loads": [
            {
                "connections": each.connections,
                "rate": each.rate or None,
                "duration_s": each.duration_s,
                "requests_per_s": each.requests_per_s,
                "in_time_per_s": each.in_time_per_s,
                "latency_s": dict(zip(map(str, QUANTILES), each.quantiles, strict=True)) | {"max": each.max_s},
                "errors": dict(each.errors),
                "late": each.late,
                "cpu_s_per_request": each.cpu_s,
                "mean_batch": each.mean_batch,
                "generator_cores": each.generator,
                "sent_behind_s": each.behind_s,
                "outstanding": each.outstanding,
                "remarks": remarks(each),
            }
            for each in measured
        ],
    }


def _write_report(directory: Path, subject: Subject, measured: Sequence[Figures]) -> None:
    from penstock.bin.benchreport import write_report

    rows = [_HEADS, *map(_row, measured)]
    labelled = [(label(each.connections, each.rate), each) for each in measured]
    introduction = _introduction(subject, measured[0].duration_s)
    try:
        written, missing = write_report(directory, introduction, rows, _notes(measured), labelled)
    except OSError as error:
        click.echo(f"penstock: cannot write the report: {error}", err=True)
        sys.exit(1)
    click.echo(f"penstock: wrote {written}", err=True)
    if missing:
        click.echo(f"penstock: {missing}", err=True)
