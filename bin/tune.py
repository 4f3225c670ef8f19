"""``penstock tune``"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

import click

from penstock.bin import bench, options
from penstock.bin.cpus import usable_cpus
from penstock.bin.files import write_whole
from penstock.bin.infer import InputError
from penstock.bin.modeltoml import EditError, edit, to_toml
from penstock.bin.search import (
    Point,
    Setting,
    best_point,
    frontier,
    ladders,
    next_connections,
    score,
    search,
)
from penstock.client import Client, PenstockError

if TYPE_CHECKING:
    from penstock.worker.config import ModelConfig
    from penstock.worker.repository import ModelFile

_WARMUP_S: Final = 0.3
_TIMEOUT_S: Final = 10.0  # for an answer under load
_START_MAX_S: Final = 120.0  # for a server to load the model
_STOP_MAX_S: Final = 30.0
_FIRST: Final = 1  # connections of the first setting; others begin below where the best one was
_BAR_MAX: Final = 40  # columns
_LEAST_LEFT: Final = 2  # loads that there must be time for, or another setting is not begun


class TuneError(Exception):
    """It cannot go on; the message is a sentence."""


@dataclass(frozen=True, slots=True)
class Wish:
    """What the user wants. ``until``: of the monotonic clock."""

    model: Path
    file: ModelFile
    latency_s: float
    load_s: float
    until: float
    rows: int
    inputs: Sequence[str]


@click.command()
@click.argument("model", type=click.Path(path_type=Path, exists=True))
@click.option("--latency", type=options.Duration(1e-5, 60), required=True, help="What 99 of 100 may take at most.")
@click.option("--budget", type=options.Duration(5), default="5m", show_default=True, help="What all of it may take.")
@click.option("--each", "load_s", type=options.Duration(0.2, 60), default="2s", show_default=True, help="Of each load.")
@click.option("--rows", type=click.IntRange(1), default=1, show_default=True, help="In each request.")
@click.option("--input", "inputs", metavar="NAME=SHAPE|FILE", multiple=True, help="As 'penstock bench' takes it.")
@click.option(
    "--to", type=click.Path(dir_okay=False, path_type=Path), help="Write this file.  [default: its model.toml]"
)
@click.option("--dry-run", is_flag=True, help="Write nothing.")
def tune(
    model: Path,
    latency: float,
    budget: float,
    load_s: float,
    rows: int,
    inputs: Sequence[str],
    to: Path | None,
    dry_run: bool,
) -> None:
    """Find the settings of MODEL with which this machine answers most requests a second, 99 of 100 of them within
    --latency, and write them into its model.toml.

    MODEL is a directory of a repository (repository/NAME), or an .onnx file: then nothing is written without --to. One
    server after another is started with it, on HTTP of this machine, and loaded; nothing else should run meanwhile.

    Exit code 1: no setting was found that keeps --latency. Exit code 2: the model cannot be served.
    """
    from penstock.load.inputs import InputsError
    from penstock.load.run import LoadError
    from penstock.load.server import ServerError
    from penstock.worker.config import ConfigError, load_config

    file = find_model(model)
    # A model.toml beside a config.pbtxt would have that one not read any more: whoever wants this says --to.
    own = model / "model.toml" if model.is_dir() and file.config_name == "model.toml" else None
    target, base = to or own, own or to  # what is written, and what it is made from
    wish = Wish(model, file, latency, load_s, time.monotonic() + budget, rows, inputs)
    tried: dict[Setting, list[Point]] = {}
    try:
        config = load_config(base) if base is not None and base.exists() else file.config
        start = setting_of(config)
        otherwise = to_toml(config) if file.config_name != "model.toml" else ""
        text = _read(base, otherwise)
        why = _try_all(wish, text, start, tried, not picks_batches(config))
    except (TuneError, ConfigError, EditError, InputsError, InputError, ServerError, LoadError, PenstockError) as error:
        click.echo(f"penstock: {error}", err=True)
        sys.exit(1)
    click.echo("\n".join(render(tried, latency, _blocks())))
    best = max(
        ((setting, point) for setting, points in tried.items() if (point := best_point(points, latency)) is not None),
        key=lambda each: each[1].requests_per_s,
        default=None,
    )
    if best is None:
        least = bench.milliseconds(min(score(points, latency).p99_s for points in tried.values()))
        stays = "nothing is written" if target is None else f"{target} stays as it is"
        click.echo(
            f"penstock: no setting keeps {bench.milliseconds(latency)} ms: the least p99 was {least} ms; {stays}",
            err=True,
        )
        sys.exit(1)
    finish(best, start, why, base, target, dry_run, otherwise)


def find_model(path: Path) -> ModelFile:
    """Raises click.UsageError; exits 2 when it cannot be served."""
    from penstock.worker.repository import RepositoryError, find_models

    try:
        if path.is_dir():
            path = path.resolve()
            if not any(entry.name.isdecimal() for entry in path.iterdir() if entry.is_dir()):
                raise click.UsageError(f"{path} is no directory of one model; give repository/NAME or an .onnx file")
            found = [each for each in find_models(path.parent) if each.name == path.name]
        else:
            found = find_models(path)
        if not found:
            raise RepositoryError(f"{path} is no model of the repository {path.parent}")
        if found[0].problem:
            raise RepositoryError(found[0].problem)
    except (RepositoryError, OSError) as error:
        click.echo(f"penstock: {error}", err=True)
        sys.exit(options.EXIT_CANNOT_SERVE)
    return found[0]


def _read(path: Path | None, otherwise: str) -> str:
    """A model.toml, or ``otherwise`` where there is none. Raises TuneError."""
    if path is None or not path.exists():
        return otherwise
    try:
        return path.read_bytes().decode("utf-8")
    except (OSError, ValueError) as error:
        raise TuneError(f"cannot read {path}: {error}") from None


def setting_of(config: ModelConfig) -> Setting:
    """What a model.toml says now."""
    return Setting(
        config.rows_max,
        round(config.max_queue_delay_s * 1e6),
        config.instances,
        config.intra_op_threads,
    )


def picks_batches(config: ModelConfig) -> bool:
    """Whether batch size and delay are not for tuning: the worker picks them itself, or the engine wants some sizes."""
    return config.latency_target is not None or config.preferred_batch_sizes is not None


def changes(setting: Setting, start: Setting) -> dict[str, int | str]:
    """What to write into model.toml to come from one to the other."""
    changed: dict[str, int | str] = {}
    for key, value, before in zip(setting._fields, setting, start, strict=True):
        if value != before:
            changed[key.removesuffix("_us")] = duration(value) if key.endswith("_us") else value
    return changed


def duration(microseconds: int) -> str:
    """2000 -> "2ms", 500 -> "500us"."""
    whole, part = divmod(microseconds, 1000)
    return f"{microseconds}us" if part else f"{whole}ms"


# --- trying ---


def _try_all(wish: Wish, text: str, start: Setting, tried: dict[Setting, list[Point]], batches: bool = True) -> str:
    """Fill ``tried``. ``batches``: tune their size and delay, too. Returns why it ended. Raises all that trying the
    first setting may."""
    begin = time.monotonic()
    first = _FIRST
    batchable = True
    steps = None
    setting = start
    while True:
        points, problem = [], ""
        try:
            with _serve(wish, edit(text, changes(setting, start))) as server:
                if steps is None:
                    batchable = server.batchable and batches
                    cores = len(usable_cpus())
                    steps = search(start, ladders(start, batchable, cores, wish.latency_s), cores)
                    next(steps)
                points = server.climb(first)
        except TuneError as error:
            if steps is None:
                raise
            problem = str(error)
        tried[setting] = points
        assert steps is not None
        if (best := best_point(points, wish.latency_s)) is not None:
            first = max(1, best.connections // 4)
        said = problem or _say(points, wish.latency_s)
        click.echo(f"{time.monotonic() - begin:4.0f} s  {describe(setting, batchable)}: {said}", err=True)
        try:
            setting = steps.send(score(points, wish.latency_s))
        except StopIteration:
            return "nothing near the best setting is better"
        if time.monotonic() + _LEAST_LEFT * (wish.load_s + _WARMUP_S) > wish.until:
            return "the budget is used up"


def describe(setting: Setting, batchable: bool = True) -> str:
    batches = (
        f"batches of {setting.max_batch_size}, delay {duration(setting.max_queue_delay_us)}, " if batchable else ""
    )
    return f"{batches}{_count(setting.instances, 'instance')}, {_count(setting.intra_op_threads, 'thread')}"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' if number != 1 else ''}"


def _say(points: Sequence[Point], limit_s: float) -> str:
    point = best_point(points, limit_s)
    if point is None:
        reached = score(points, limit_s)
        return f"p99 {bench.milliseconds(reached.p99_s)} ms at least" if points else "no time was left to load it"
    with_so_many = bench.label(point.connections, 0)
    return f"{point.requests_per_s:,.0f} requests/s, p99 {bench.milliseconds(point.p99_s)} ms, {with_so_many}"


@dataclass(frozen=True, slots=True)
class _Server:
    """One that runs, with the request that it is loaded with."""

    wish: Wish
    subject: bench.Subject
    batchable: bool

    def climb(self, first: int) -> list[Point]:
        """Loads with more and more connections, as long as there is time. Raises LoadError."""
        from penstock.load.job import Job
        from penstock.load.measure import GENERATOR_BUSY, measure

        wish = self.wish
        points: list[Point] = []
        while (connections := next_connections(points, wish.latency_s, first)) is not None:
            if points and time.monotonic() + wish.load_s + _WARMUP_S > wish.until:
                break
            job = Job(
                target=self.subject.target,
                connections=connections,
                rate=0.0,
                outstanding_max=connections,
                warmup_s=_WARMUP_S,
                duration_s=wish.load_s,
                timeout_s=_TIMEOUT_S,
                deadline_s=0.0,
                seed=0,
            )
            figures = measure(job, 1, self.subject.account)
            busy = figures.generator > GENERATOR_BUSY
            points.append(Point(connections, figures.requests_per_s, figures.p99_s, bool(figures.errors), busy))
        return points


@contextmanager
def _serve(wish: Wish, text: str) -> Iterator[_Server]:
    """A server of the model with this model.toml. Raises TuneError when it does not start, and what asking it may."""
    with tempfile.TemporaryDirectory(prefix="penstock-tune-") as name:
        directory = Path(name)
        lay_out(wish.file, directory / "models", text)
        errors = directory / "errors"
        (directory / "penstock.toml").write_text("[worker]\nlinks_out = true\n")  # to the model's own files
        command = [sys.executable, "-m", "penstock.bin", "up", str(directory / "models"), "--http=127.0.0.1:0"]
        command.append(f"--config={directory / 'penstock.toml'}")
        with errors.open("wb") as file:
            process = subprocess.Popen(
                [*command, f"--runtime-dir={directory / 'run'}", "--log-level=error"],
                stdout=subprocess.PIPE,
                stderr=file,
                text=True,
                start_new_session=True,  # a Ctrl-C is for this process, which ends it
            )
        with process:
            try:
                url = _wait_ready(process, errors)
                shapes, files = bench.divide_inputs(wish.inputs)
                subject = bench.over_http(wish.file.name, "", url, "auto", wish.rows, shapes, files, (), None)
                yield _Server(wish, subject, _is_batchable(directory / "run", wish.file.name))
            finally:
                _stop(process)


def _wait_ready(process: subprocess.Popen[str], errors: Path) -> str:
    """Its URL. Raises TuneError."""
    assert process.stdout is not None
    killer = threading.Timer(_START_MAX_S, process.kill)
    killer.start()
    try:
        ready = process.stdout.readline()
    finally:
        killer.cancel()
        killer.join(_STOP_MAX_S)
    if not ready.startswith("penstock ready: "):
        said = errors.read_text(errors="replace").strip().splitlines()
        raise TuneError(f"the server does not start: {said[-1] if said else 'it says nothing'}")
    return ready.split()[-1]


def _stop(process: subprocess.Popen[str]) -> None:
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(_STOP_MAX_S)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)


def _is_batchable(runtime: Path, model: str) -> bool:
    with Client(runtime, timeout=_TIMEOUT_S, arena_bytes=0) as client:
        return any(state.name == model and state.spec is not None and state.spec.batchable for state in client.models())


def lay_out(file: ModelFile, directory: Path, text: str) -> None:
    """A repository of this one model, with links to its files and a model.toml of its own. Raises TuneError."""
    from penstock.worker.onnxfile import OnnxFileError, read_onnx

    path = file.path.resolve()
    home = directory / file.name
    home.mkdir(parents=True)
    (home / "model.toml").write_text(text, encoding="utf-8", newline="")
    if path.name == "model.onnx":
        (home / file.version).symlink_to(path.parent, target_is_directory=True)
        return
    place = home / file.version
    place.mkdir()
    (place / "model.onnx").symlink_to(path)
    try:
        beside = read_onnx(path).external_files
    except OnnxFileError as error:
        raise TuneError(str(error)) from None
    for name in beside:
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).symlink_to(path.parent / name)


# --- telling ---


def render(tried: Mapping[Setting, Sequence[Point]], limit_s: float, blocks: bool) -> list[str]:
    """The frontier as a table, and as bars."""
    heads = ["batch", "delay", "instances", "threads", "connections", "requests/s", "p99 ms", ""]
    edge = frontier(tried)
    rows = [
        [
            str(setting.max_batch_size),
            duration(setting.max_queue_delay_us),
            str(setting.instances),
            str(setting.intra_op_threads),
            str(point.connections),
            f"{point.requests_per_s:,.0f}",
            bench.milliseconds(point.p99_s),
            "" if point.within(limit_s) else f"over {bench.milliseconds(limit_s)} ms",
        ]
        for setting, point in edge
    ]
    count = _count(len(tried), "setting")
    lines = [f"{count} tried; what none of them beats in both throughput and p99:"]
    lines += ["  " + line for line in bench.columns(heads, rows, left={len(heads) - 1})]
    most = max([point.requests_per_s for _, point in edge], default=0.0) or 1.0
    labels = [f"{bench.milliseconds(point.p99_s)} ms" for _, point in edge]
    width = max(map(len, labels), default=0)
    lines.append("  requests/s by p99:")
    for text, (_, point) in zip(labels, edge, strict=True):
        mark = "#" if not blocks else "█" if point.within(limit_s) else "░"
        lines.append(f"    {text.rjust(width)} {mark * max(1, round(point.requests_per_s / most * _BAR_MAX))}")
    return lines


def _blocks() -> bool:
    """Whether standard output shows more than ASCII."""
    try:
        "█░".encode(sys.stdout.encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return False
    return True


def finish(
    best: tuple[Setting, Point],
    start: Setting,
    why: str,
    base: Path | None,
    target: Path | None,
    dry_run: bool,
    otherwise: str = "",
) -> None:
    """Say what is best, and write it. ``otherwise``: what is changed for it where ``base`` is not."""
    setting, point = best
    reached = f"{point.requests_per_s:,.0f} requests/s with p99 {bench.milliseconds(point.p99_s)} ms"
    click.echo(f"best: {describe(setting)}: {reached} ({why})")
    if point.busy:
        click.echo("the generator used most of a core there: it may have been what limits, and the server may do more")
    values = changes(setting, start)
    if not values:
        click.echo("these are the present settings; nothing to write")
        return
    lines = "".join(f"  {key} = {_toml(value)}\n" for key, value in values.items())
    if target is None or dry_run:
        click.echo(f"not written{'' if dry_run else ', since no --to says where'}:\n{lines}", nl=False)
        return
    try:
        write_whole(target, edit(_read(base, otherwise), values))
    except (OSError, EditError, TuneError) as error:
        click.echo(f"penstock: cannot write {target}: {error}", err=True)
        sys.exit(1)
    click.echo(f"written into {target}:\n{lines}", nl=False)


def _toml(value: int | str) -> str:
    return f'"{value}"' if isinstance(value, str) else str(value)
