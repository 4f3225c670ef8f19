"""``penstock worker``"""

from __future__ import annotations

import sys
from pathlib import Path

import click

from penstock.bin import options
from penstock.bin.bundled import BUNDLED_MODELS
from penstock.bin.cpus import pin


@click.command()
@click.argument("models", type=click.Path(path_type=Path), default=BUNDLED_MODELS)
@click.option("--name", default="", help="What it is called in logs and metrics.  [default: its device]")
@options.device
@options.cpus
@click.option(
    "--broker",
    metavar="tcp://HOST:PORT",
    callback=options.check_tcp,
    default=None,
    help="Join a broker over TCP instead of by --runtime-dir.",
)
@options.bind
@options.config_file
@options.process_options
def worker(
    models: Path,
    name: str,
    device: str,
    cpus: frozenset[int] | None,
    broker: str | None,
    bind: str,
    config: Path | None,
    runtime_dir: Path | None,
    log_format: str,
    log_level: str,
    parent: int,
) -> None:
    """Run a worker: it loads MODELS (a repository or an .onnx file), forms batches and runs them.

    With --bind its results can be heard over TCP, port 0 for any. Exit code 2: nothing could be loaded.
    """
    if cpus is not None:
        pin(cpus)  # before there are threads of ours and of ONNX Runtime, which inherit it
    from penstock.bin.run import run
    from penstock.worker.process import WorkerProcess, WorkerSettings
    from penstock.worker.repository import RepositoryError

    settings = WorkerSettings(
        broker=options.broker_address(broker or runtime_dir),
        models=models,
        name=name,
        device=options.check_device(device),
        bind=bind,
        options=options.load_options(config).worker,
    )
    try:
        process, served = run(name or "worker", log_format, log_level, parent, lambda: WorkerProcess(settings))
    except RepositoryError as error:
        click.echo(f"penstock: {error}", err=True)
        sys.exit(options.EXIT_CANNOT_SERVE)
    if not served:
        for failure in process.failures:
            click.echo(f"penstock: {failure}", err=True)
        sys.exit(options.EXIT_CANNOT_SERVE)
