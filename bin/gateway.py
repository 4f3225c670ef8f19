"""``penstock gateway``"""

from __future__ import annotations

from pathlib import Path

import click

from penstock.bin import options


@click.command()
@options.http
@click.option("--name", default="gateway", show_default=True, help="What it is called in logs and metrics.")
@options.config_file
@options.process_options
def gateway(
    http: str, name: str, config: Path | None, runtime_dir: Path | None, log_format: str, log_level: str, parent: int
) -> None:
    """Run a gateway: HTTP in, HTTP out. It takes a listening socket from systemd when there is one."""
    from penstock.bin.run import run
    from penstock.gateway.process import GatewayProcess, GatewaySettings

    address = options.broker_address(runtime_dir)
    settings = GatewaySettings(broker=address, http=http, name=name, options=options.load_options(config).gateway)
    run(name, log_format, log_level, parent, lambda: GatewayProcess(settings))
