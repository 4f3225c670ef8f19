"""``penstock restart``, and how it and the launcher talk: a line of JSON each, over a Unix socket of this user's."""

from __future__ import annotations

import json
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, Final, NamedTuple

import click

from penstock.bin import options

ROLES: Final = ("gateway", "jobs", "worker", "broker")  # in the order in which they are replaced
SOCKET: Final = "restart.sock"  # in the runtime directory
IN_PLACE: Final = "it is stopped before its successor starts"
_HEAR_S: Final = 1.0  # for the launcher to hear what is asked, which is sent at once
_LINE_MAX_BYTES: Final = 4096


class RestartError(Exception):
    """Not everything was restarted; the message is a sentence."""


class Ask(NamedTuple):
    """What is to be replaced. ``in_place``: never two of one at a time."""

    roles: tuple[str, ...]
    in_place: bool


class Asker:
    """The launcher's end of a connection. Who asked may leave meanwhile; what was begun goes on."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        connection.settimeout(_HEAR_S)

    def hear(self) -> Ask:
        """Raises RestartError for what is no such line."""
        until, line = time.monotonic() + _HEAR_S, b""
        try:
            # The time is that of all of it: meanwhile the launcher does nothing else.
            while not line.endswith(b"\n") and len(line) < _LINE_MAX_BYTES and (left_s := until - time.monotonic()) > 0:
                self._connection.settimeout(left_s)
                more = self._connection.recv(_LINE_MAX_BYTES - len(line))
                if not more:
                    break
                line += more
            self._connection.settimeout(_HEAR_S)
            asked = json.loads(line)
            return Ask(tuple(role for role in ROLES if role in asked["roles"]), bool(asked["in_place"]))
        except (OSError, ValueError, KeyError, TypeError):
            raise RestartError("it was not said what to restart") from None

    def say(self, sentence: str) -> None:
        self._send({"say": sentence})

    def end(self, problem: str) -> None:
        """Nothing more will be said. ``problem``: a sentence, or empty when all is well."""
        self._send({"end": problem})

    def _send(self, line: dict[str, str]) -> None:
        with suppress(OSError):
            self._connection.sendall(json.dumps(line).encode() + b"\n")

    def close(self) -> None:
        self._connection.close()


def rss_bytes(pid: int) -> int:
    """The memory that a process has for itself; 0 when that is not known."""
    with suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) << 10
    return 0


@click.command()
@click.argument("roles", nargs=-1, type=click.Choice(ROLES), metavar="[gateway] [jobs] [worker] [broker]")
@click.option(
    "--in-place", is_flag=True, help="Stop each before its successor starts: where memory does for one alone."
)
@options.runtime_dir
def restart(roles: tuple[str, ...], in_place: bool, runtime_dir: Path | None) -> None:
    """Replace the processes of a running 'penstock up' one after another, while it serves.

    All of them, or those of some kinds: gateways, who runs jobs, then workers, then the broker. The next is touched
    when the one before is ready; but for the broker, the new one is started before the old one drains. Exit code 1:
    something did not work, and what has not been replaced serves on.
    """
    address = options.broker_address(runtime_dir)
    if address.runtime is None:
        raise click.UsageError("--runtime-dir is a directory")
    try:
        for sentence in ask(address.runtime.path, Ask(roles or ROLES, in_place)):
            click.echo(sentence)
    except RestartError as error:
        click.echo(f"penstock: {error}", err=True)
        sys.exit(1)


def ask(runtime: Path, what: Ask) -> Iterator[str]:
    """Have a launcher restart something; yields what it says meanwhile. Raises RestartError."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        try:
            connection.connect(str(runtime / SOCKET))
            connection.sendall(json.dumps(what._asdict()).encode() + b"\n")
        except OSError as error:
            raise RestartError(f"no 'penstock up' serves in {runtime}: {error.strerror}") from None
        with connection.makefile("rb") as lines:
            for line in lines:
                said: dict[str, Any] = json.loads(line)
                if "end" in said:
                    if said["end"]:
                        raise RestartError(said["end"])
                    return
                yield said["say"]
    raise RestartError("the server has ended before it was done")
