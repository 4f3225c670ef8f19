"""``penstock worker``"""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from typing import Final

import click

from penstock.bin import options
from penstock.bin.bundled import BUNDLED_MODELS
from penstock.bin.cpus import format_cpus, pin, usable_cpus
from penstock.bin.devices import VISIBLE
from penstock.bin.numa import cores_of, place_of, prefer_memory
from penstock.wire.process import end_before_others, fields
from penstock.worker.gpus import EXIT_GPU_LOST

log = logging.getLogger("penstock")

# When memory is out, what a worker had runs elsewhere; without the broker nothing does. (What prepares models: 1000.)
_OOM_SCORE: Final = 500


@click.command()
@click.argument("models", type=click.Path(path_type=Path), default=BUNDLED_MODELS)
@click.option("--name", default="", help="What it is called in logs and metrics.  [default: its device]")
@options.device
@click.option("--gpu", default="", hidden=True)  # the launcher's own: the UUID of the device
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
    device: str | None,
    gpu: str,
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

    With --bind its results can be heard over TCP, port 0 for any. Exit code 2: nothing could be loaded; 69: its GPU is
    lost; 75: a batch did not end.
    """
    from penstock.bin import logs
    from penstock.bin.run import run

    address = options.broker_address(broker or runtime_dir)
    limits = options.load_options(config).worker
    end_before_others(_OOM_SCORE)
    logs.set_up(name or "worker", log_format, log_level)
    where = options.find_device(device, gpu)
    # All of this before there are threads of ours and of ONNX Runtime, which inherit it, and before CUDA is loaded.
    if where.uuid:
        os.environ[VISIBLE] = where.uuid
    if cpus is not None:
        pin(cpus)
    elif limits.numa:
        _stay_near(where.pci)
    from penstock.worker.process import WorkerProcess, WorkerSettings
    from penstock.worker.repository import RepositoryError

    settings = WorkerSettings(
        broker=address,
        models=models,
        name=name,
        device=where.name,
        gpu=where.uuid,
        gpu_unusable=where.unusable,
        bind=bind,
        options=limits,
    )
    try:
        process, served = run(name or "worker", log_format, log_level, parent, lambda: WorkerProcess(settings))
    except RepositoryError as error:
        click.echo(f"penstock: {error}", err=True)
        sys.exit(options.EXIT_CANNOT_SERVE)
    if process.lost:
        click.echo(f"penstock: {where.name} is lost: {process.lost}", err=True)
        sys.exit(EXIT_GPU_LOST)
    if not served:
        for failure in process.failures:
            click.echo(f"penstock: {failure}", err=True)
        sys.exit(options.EXIT_CANNOT_SERVE)


def _stay_near(pci: str) -> None:
    """Run on the cores next to a GPU, and have memory there. Without a GPU, or where the kernel does not know, nothing
    is bound."""
    place = place_of(pci) if pci else None
    if place is None:
        return
    cores = cores_of(place, usable_cpus())
    try:
        if cores is not None:
            pin(cores)
        prefer_memory(place.node)
    except OSError as error:
        log.debug("not bound to the memory next to the GPU", extra=fields(node=place.node, reason=str(error)))
    log.info("near its GPU", extra=fields(node=place.node, cores=format_cpus(usable_cpus())))
