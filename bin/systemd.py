"""``penstock systemd``"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Final

import click

from penstock.bin.files import write_whole

_MODELS: Final = Path("/srv/penstock/models")
_DOCS: Final = "man:systemd.service(5)"
_HOMES: Final = ("/home", "/root", "/run/user")  # what the units hide from the processes
# Where each kind of file lies below /etc, or below /usr/lib in a package.
_PLACES: Final = {
    ".service": "systemd/system",
    ".socket": "systemd/system",
    ".target": "systemd/system",
    ".sysusers.conf": "sysusers.d",
    ".tmpfiles.conf": "tmpfiles.d",
}
_RUN_MAX_S: Final = 60.0  # for one of systemd's commands
_STEPS_SINCE: Final = 254  # the first systemd that lengthens the time between restarts


@click.command()
@click.option("--to", type=click.Path(file_okay=False, path_type=Path), help="Write below this directory, and no more.")
@click.option("--install", is_flag=True, help="Write below /etc, make the user and the directories, tell systemd.")
@click.option(
    "--models",
    type=click.Path(path_type=Path),
    default=_MODELS,
    show_default=True,
    help="What workers serve, unless /etc/penstock/penstock.conf says PENSTOCK_MODELS=...",
)
def systemd(to: Path | None, install: bool, models: Path) -> None:
    """Write systemd units for this installation: a broker, gateways on one socket, who runs jobs, a worker for each
    device.

    DIR/systemd/system, DIR/sysusers.d and DIR/tmpfiles.d are filled; --install fills those of /etc.
    """
    if (to is None) == (not install):
        raise click.UsageError("give --to DIR, or --install")
    hidden = _hidden(Path(sys.prefix), Path(sys.executable))
    if hidden:
        sentence = f"{hidden} lies where services cannot see it; install Penstock below /opt or /usr/local"
        if install:
            raise click.ClickException(sentence)
        click.echo(f"penstock: warning: {sentence}", err=True)
    root = Path("/etc") if to is None else to
    for name, text in render(command(sys.executable), models.absolute(), _version()).items():
        path = root / name
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, text)
        except OSError as error:
            raise click.ClickException(f"cannot write {path}: {error.strerror}") from None
        click.echo(path)
    if not install:
        return
    for arguments in (
        ["systemd-sysusers", "penstock.conf"],
        ["systemd-tmpfiles", "--create", "penstock.conf"],
        ["systemctl", "daemon-reload"],
    ):
        try:
            subprocess.run(arguments, check=True, timeout=_RUN_MAX_S)
        except (OSError, subprocess.SubprocessError) as error:
            raise click.ClickException(f"'{' '.join(arguments)}' failed: {error}") from None
    click.echo("now: systemctl enable --now penstock.target penstock-gateway@1 penstock-worker@cpu")


def render(penstock: str, models: Path, version: int) -> dict[str, str]:
    """The files, by their path below /etc. ``penstock``: the command, as ExecStart= has it; ``version``: systemd's."""
    steps = "RestartSteps=6\nRestartMaxDelaySec=60s\n" if version >= _STEPS_SINCE else ""
    arguments = [f"PENSTOCK{kind}_ARGS=" for kind in ("", "_BROKER", "_GATEWAY", "_JOBS", "_WORKER")]
    environment = [f"PENSTOCK_MODELS={models}", *arguments]
    values: Mapping[str, str] = {
        "@PENSTOCK@": penstock,
        "@DOCS@": _DOCS,
        "@ENVIRONMENT@": "\n".join(f"Environment={quote(each)}" for each in environment),
        "@RESTART_STEPS@\n": steps,
    }
    found = {}
    for source in sorted(files("penstock.deploy").joinpath("systemd").iterdir(), key=lambda each: each.name):
        [(suffix, place)] = [each for each in _PLACES.items() if source.name.endswith(each[0])]
        name = source.name if place == "systemd/system" else source.name.removesuffix(suffix) + ".conf"
        text = source.read_text()
        for key, value in values.items():
            text = text.replace(key, value)
        found[f"{place}/{name}"] = text
    return found


def command(python: str) -> str:
    """What starts ``penstock`` with this interpreter, as ExecStart= has it."""
    return f"{quote(python).replace('$', '$$')} -m penstock.bin"


def quote(word: str) -> str:
    """A word as units have it (systemd.syntax(7)): quoted if need be, and no % in it expanded."""
    escaped = word.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%")
    return f'"{escaped}"' if re.search(r"[\s'\"\\;]", escaped) else escaped


def _hidden(*paths: Path) -> str:
    """The first of the paths that a service with ProtectHome= does not see, or ""."""
    for path in paths:
        for each in (path, path.resolve()):
            if any(each.is_relative_to(home) for home in _HOMES):
                return str(path) if each == path else f"{path} ({each})"
    return ""


def _version() -> int:
    """systemd's; 0 where there is none."""
    try:
        asked = ["systemctl", "--version"]
        shown = subprocess.run(asked, capture_output=True, text=True, check=True, timeout=_RUN_MAX_S).stdout
    except (OSError, subprocess.SubprocessError):
        return 0
    match = re.match(r"systemd (\d+)", shown)
    return int(match[1]) if match else 0
