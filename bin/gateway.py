"""``penstock gateway``"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import click

from penstock.bin import options


@click.command()
@options.http
@click.option("--name", default="gateway", show_default=True, help="What it is called in logs and metrics.")
@options.jobs_store
@options.config_file
@options.allow_client_shm
@options.process_options
def gateway(
    http: str,
    name: str,
    jobs_store: str | None,
    config: Path | None,
    allow_client_shm: bool,
    runtime_dir: Path | None,
    log_format: str,
    log_level: str,
    parent: int,
) -> None:
    """Run a gateway: HTTP in, HTTP out. It takes a listening socket from systemd when there is one."""
    from penstock.bin.run import run
    from penstock.gateway.process import GatewayProcess, GatewaySettings
    from penstock.gateway.tracing import Tracing, TracingError

    address, given = options.broker_address(runtime_dir), options.load_options(config)
    limits, place = given.gateway, options.jobs_place(jobs_store, given.jobs, address)
    if allow_client_shm:
        limits = replace(limits, allow_client_shm=True)
    try:
        tracing = Tracing(name) if limits.tracing else None
    except TracingError as error:
        raise click.UsageError(str(error)) from None
    settings = GatewaySettings(broker=address, http=http, name=name, options=limits, tracing=tracing, jobs=place)
    run(name, log_format, log_level, parent, lambda: GatewayProcess(settings))
