"""The command group. Each command is a file of its own, which is imported only when it is asked for."""

from __future__ import annotations

import sys
from importlib import import_module
from typing import Any, Final

import click

EXIT_INTERRUPTED: Final = 130  # as shells have it: 128 and the number of SIGINT
_COMMANDS: Final = {
    *("up", "restart", "check", "broker", "worker", "gateway"),
    *("infer", "bench", "tune", "simulate", "models", "jobs", "top", "systemd"),
}


class _Commands(click.Group):
    """To import all of them takes a process longer than to do what most begin with: without the others, broker and
    launcher import half as long (130 ms of 290), and have no numpy."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        found: click.Command = getattr(import_module(f"penstock.bin.{cmd_name}"), cmd_name)
        return found

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            click.echo(err=True)  # behind the ^C of the terminal
            sys.exit(EXIT_INTERRUPTED)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.version_option(package_name="penstock", prog_name="penstock")
def cli() -> None:
    """An inference server for ONNX models on bare metal."""
