"""``penstock broker``"""

from __future__ import annotations

from pathlib import Path

import click

from penstock.bin import options


@click.command()
@options.bind
@options.config_file
@options.record
@options.process_options
def broker(
    bind: str,
    config: Path | None,
    record: Path | None,
    record_max_bytes: int,
    runtime_dir: Path | None,
    log_format: str,
    log_level: str,
    parent: int,
) -> None:
    """Run the broker: it decides which worker runs what."""
    from penstock.bin.run import run
    from penstock.broker.process import BrokerProcess, BrokerSettings

    address = options.broker_address(runtime_dir)
    if address.runtime is None:
        raise click.UsageError("--runtime-dir is a directory; a TCP address goes with --bind")
    settings = BrokerSettings(
        runtime=address.runtime,
        bind=bind,
        options=options.load_options(config).broker,
        record=record,
        record_max_bytes=record_max_bytes,
    )
    run("broker", log_format, log_level, parent, lambda: BrokerProcess(settings))
