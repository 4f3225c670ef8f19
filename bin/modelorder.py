"""``penstock models load`` and ``unload``: what a server serves, where orders say it."""

from __future__ import annotations

from pathlib import Path

import click

from penstock.bin.asking import Server, asks
from penstock.client.orders import ORDER_WAIT_S


def _read_config(ctx: click.Context, param: click.Parameter, value: str | None) -> str:
    if value is None or not value.startswith("@"):
        return value or ""
    try:
        return Path(value[1:]).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise click.BadParameter(f"cannot read {value[1:]}: {getattr(error, 'strerror', None) or error}") from None


@click.command()
@click.argument("model")
@click.option(
    "--config", metavar="JSON|@FILE", callback=_read_config, help="In place of its own configuration, as a JSON object."
)
@asks(ORDER_WAIT_S)
def load(server: Server, model: str, config: str) -> None:
    """Have the server load MODEL, and wait until all workers have.

    Where the server follows its repository, it looks at that again now; --config is for those that load by order
    (model_control = "explicit").
    """
    with server.connect() as client:
        client.load_model(model, config, timeout=server.timeout_s)
    click.echo(f"{model} is loaded")


@click.command()
@click.argument("model")
@asks(ORDER_WAIT_S)
def unload(server: Server, model: str) -> None:
    """Have the server serve MODEL no more: requests that are under way end, and its memory returns.

    For servers that load by order (model_control = "explicit").
    """
    with server.connect() as client:
        client.unload_model(model, timeout=server.timeout_s)
    click.echo(f"{model} is not served any more")
