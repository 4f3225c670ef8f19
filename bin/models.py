"""``penstock models``"""

from __future__ import annotations

import sys
from pathlib import Path

import click

from penstock.bin import options
from penstock.client import Client, PenstockError
from penstock.wire.models import ModelState


@click.command()
@options.runtime_dir
@options.server
@click.option("--timeout", type=float, default=5.0, show_default=True, help="Seconds.")
def models(runtime_dir: Path | None, server: str | None, timeout: float) -> None:
    """List what the server serves, and why what is not served is not."""
    try:
        with Client(server or runtime_dir, timeout=timeout) as client:
            states = client.models()
    except PenstockError as error:
        click.echo(f"penstock: {error}", err=True)
        sys.exit(1)
    rows = [("NAME", "VERSION", "STATE", "BATCH", ""), *map(_row, states)]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    for row in rows:
        click.echo("  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[4]]).rstrip())


def _row(state: ModelState) -> tuple[str, str, str, str, str]:
    spec = state.spec
    batch = "" if spec is None else str(spec.max_batch_size) if spec.batchable else "alone"
    return state.name, state.version, state.state, batch, state.reason
