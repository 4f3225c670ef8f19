"""``penstock up``"""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path

import click

from penstock.bin import options
from penstock.bin.bundled import BUNDLED_MODELS
from penstock.bin.cpus import physical_cores, share_cpus, usable_cpus
from penstock.wire.process import fields

log = logging.getLogger("penstock.launcher")


@click.command()
@click.argument("models", type=click.Path(path_type=Path), default=BUNDLED_MODELS)
@options.http
@options.workers
@options.gateways
@options.device
@options.pin
@options.bind
@options.jobs_store
@options.config_file
@options.allow_client_shm
@options.record
@options.runtime_dir
@options.log_format
@options.log_level
def up(
    models: Path,
    http: str,
    workers: int,
    gateways: int,
    device: str | None,
    pin: bool,
    bind: str,
    jobs_store: str | None,
    config: Path | None,
    allow_client_shm: bool,
    record: Path | None,
    record_max_bytes: int,
    runtime_dir: Path | None,
    log_format: str,
    log_level: str,
) -> None:
    """Serve MODELS: a model repository (NAME/VERSION/model.onnx) or one .onnx file. Without it, the bundled digits
    model.

    Prints "penstock ready: URL" once the models are loaded and HTTP answers. Ctrl-C or SIGTERM finishes what is under
    way and stops. Exit code 2: the models cannot be served.
    """
    from penstock.bin import logs
    from penstock.bin.launcher import Launcher, LaunchError, Plan
    from penstock.wire.endpoints import EndpointError
    from penstock.worker.repository import RepositoryError, find_models

    address = options.broker_address(runtime_dir)
    if address.runtime is None:
        raise click.UsageError("--runtime-dir is a directory; a TCP address goes with --bind")
    limits = options.load_options(config)  # what is wrong with it is said once, here
    options.jobs_place(jobs_store, limits.jobs, address)  # likewise
    logs.set_up("launcher", log_format, log_level)
    devices = options.find_devices(device)
    shares = _shares(workers * len(devices)) if pin else []
    try:
        names = [each.name for each in devices]
        files = [file for name in names for file in find_models(models, name)]
        if not files:
            raise RepositoryError(
                f"{models} has no model for {' or '.join(names)}: see 'devices' in the model.toml of each, and --device"
            )
        if all(file.problem for file in files):
            raise RepositoryError("; ".join(file.problem for file in files))
        plan = Plan(
            models=models,
            http=http,
            workers=workers,
            gateways=gateways,
            devices=devices,
            shares=shares,
            bind=bind,
            jobs_store=jobs_store,
            config=config,
            allow_client_shm=allow_client_shm,
            record=record,
            record_max_bytes=record_max_bytes,
            options=limits,
            runtime=address.runtime,
            log_format=log_format,
            log_level=log_level,
        )
        sys.exit(Launcher(plan, _announce).run())
    except RepositoryError as error:
        click.echo(f"penstock: {error}", err=True)
        sys.exit(options.EXIT_CANNOT_SERVE)
    except (EndpointError, LaunchError) as error:
        click.echo(f"penstock: {error}", err=True)
        sys.exit(1)


def _announce(url: str) -> None:
    """A server whose words nobody can read serves all the same."""
    try:
        click.echo(f"penstock ready: {url}")
    except OSError as error:
        log.warning("standard output cannot be written", extra=fields(ready=url, reason=error.strerror))
        os.dup2(os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC), 1)  # what waits there would fail again at the end


def _shares(workers: int) -> list[frozenset[int]]:
    """The cores of each worker. Raises click.UsageError."""
    try:
        return share_cpus(physical_cores(usable_cpus()), workers)
    except ValueError as error:
        raise click.UsageError(f"--pin: {error}; start fewer with --workers, or leave --pin out") from None
