"""The command group. Each command is a file of its own; those that start processes import them only when they run."""

from __future__ import annotations

from importlib.metadata import version

import click

from penstock.bin import bench, broker, check, gateway, infer, models, restart, simulate, systemd, top, tune, up, worker


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.version_option(version("penstock"), prog_name="penstock")
def cli() -> None:
    """An inference server for ONNX models on bare metal."""


_COMMANDS = (
    *(up.up, restart.restart, check.check, broker.broker, worker.worker, gateway.gateway),
    *(infer.infer, bench.bench, tune.tune, simulate.simulate, models.models, top.top, systemd.systemd),
)
for command in _COMMANDS:
    cli.add_command(command)
