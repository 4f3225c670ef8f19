"""``penstock`` as a command: without the server's packages it says how to get them, with them what it can do."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from penstock.bin.asking import Server
from penstock.bin.cli import cli

ROOT = Path(__file__).parents[2]


def run_bare(search: Path) -> subprocess.CompletedProcess[str]:
    """``python -m penstock.bin`` by a Python that has no packages but those in a directory."""
    return subprocess.run(
        [sys.executable, "-S", "-m", "penstock.bin", "up"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={"PYTHONPATH": str(search)},
        cwd=search,
    )


def test_without_the_servers_packages_it_says_how_to_get_them() -> None:
    ended = run_bare(ROOT / "namespace")
    assert ended.returncode == 1
    assert ended.stderr == "penstock: click is missing; this command needs: pip install 'penstock[server]'\n"
    assert ended.stdout == ""


def test_the_package_that_is_missing_is_named(tmp_path: Path) -> None:
    import click

    (tmp_path / "click").symlink_to(Path(click.__file__).parent)
    (tmp_path / "penstock").symlink_to(ROOT / "namespace" / "penstock")
    ended = run_bare(tmp_path)
    assert ended.returncode == 1
    named = ended.stderr.removeprefix("penstock: ").split(" is missing; this command needs: ")
    assert named == [named[0], "pip install 'penstock[server]'\n"]
    assert named[0] in ("numpy", "msgpack", "msgspec")


def test_a_file_of_its_own_that_is_missing_is_no_missing_package(tmp_path: Path) -> None:
    (tmp_path / "penstock" / "bin").mkdir(parents=True)
    for name in ("__init__.py", "__main__.py"):
        shutil.copy(ROOT / "bin" / name, tmp_path / "penstock" / "bin")
    ended = run_bare(tmp_path)
    assert ended.returncode == 1
    assert "No module named 'penstock.bin.cli'" in ended.stderr
    assert "pip install" not in ended.stderr


@pytest.mark.parametrize("role", ["up", "broker"])
def test_a_command_imports_no_other_and_what_it_needs_alone(role: str) -> None:
    """As each process of a server does: importing all of them would be most of what its start takes."""
    code = """
import sys
from penstock.bin.cli import cli
cli.main([sys.argv[1], "--help"], standalone_mode=False)
import penstock.bin.launcher, penstock.broker.process
print(*(name for name in ("numpy", "rich", "penstock.bin.bench", "penstock.bin.infer") if name in sys.modules))
"""
    ended = subprocess.run(
        [sys.executable, "-c", code, role], capture_output=True, text=True, timeout=60, check=False, cwd=ROOT
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.startswith(f"Usage: -c {role} ")
    assert ended.stdout.splitlines()[-1] == ""


@pytest.mark.parametrize("option", ["-h", "--help"])
def test_help_names_every_command(option: str) -> None:
    shown = CliRunner().invoke(cli, [option], prog_name="penstock")
    assert shown.exit_code == 0
    assert shown.output.startswith("Usage: penstock [OPTIONS] COMMAND")
    commands = shown.output.partition("Commands:\n")[2].splitlines()
    assert {line.split()[0] for line in commands} == {
        "up",
        "check",
        "broker",
        "worker",
        "gateway",
        "jobs",
        "infer",
        "bench",
        "tune",
        "simulate",
        "models",
        "restart",
        "top",
        "systemd",
    }
    assert all(len(line.split()) > 1 for line in commands), "each says what it is for"


@pytest.mark.parametrize("command", ["up", "broker", "worker", "gateway", "infer", "bench", "models"])
def test_help_of_a_command_names_its_options_and_hides_the_launchers_own(command: str) -> None:
    shown = CliRunner().invoke(cli, [command, "-h"], prog_name="penstock")
    assert shown.exit_code == 0
    assert "--runtime-dir" in shown.output
    assert "--parent" not in shown.output


def test_an_unknown_command_is_bad_usage() -> None:
    shown = CliRunner().invoke(cli, ["serve"], prog_name="penstock")
    assert shown.exit_code == 2
    assert "No such command 'serve'" in shown.output


def test_a_command_that_is_interrupted_says_nothing_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(server: Server) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Server, "connect", interrupt)
    ended = CliRunner().invoke(cli, ["models", "ls"], prog_name="penstock")
    assert (ended.exit_code, ended.output.strip()) == (130, "")
