"""``penstock systemd``: what it writes, and what it says about where it cannot work."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from penstock.bin import systemd
from penstock.bin.systemd import command, quote, render


def test_files_are_written_where_a_package_has_them(tmp_path: Path) -> None:
    shown = CliRunner().invoke(systemd.systemd, ["--to", str(tmp_path), "--models", "/data/models"])
    assert shown.exit_code == 0
    found = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file())
    assert found == [
        "systemd/system/penstock-broker.service",
        "systemd/system/penstock-gateway.socket",
        "systemd/system/penstock-gateway@.service",
        "systemd/system/penstock-jobs.service",
        "systemd/system/penstock-worker@.service",
        "systemd/system/penstock.target",
        "sysusers.d/penstock.conf",
        "tmpfiles.d/penstock.conf",
    ]
    worker = (tmp_path / "systemd/system/penstock-worker@.service").read_text()
    assert f"ExecStart={sys.executable} -m penstock.bin worker --name %i --device %i" in worker
    assert "Environment=PENSTOCK_MODELS=/data/models\n" in worker


@pytest.mark.parametrize("arguments", [[], ["--install", "--to", "x"]])
def test_it_is_told_where_to(arguments: list[str]) -> None:
    shown = CliRunner().invoke(systemd.systemd, arguments)
    assert (shown.exit_code, "give --to DIR, or --install" in shown.output) == (2, True)


def test_a_directory_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    shown = CliRunner().invoke(systemd.systemd, ["--to", str(tmp_path / "file" / "etc")])
    assert shown.exit_code == 1
    assert f"cannot write {tmp_path}/file" in shown.output


def test_an_interpreter_that_services_cannot_see_is_not_installed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(sys, "executable", "/home/someone/.venv/bin/python")
    shown = CliRunner().invoke(systemd.systemd, ["--install"])
    assert shown.exit_code == 1
    assert "/home/someone/.venv/bin/python lies where services cannot see it" in shown.output
    shown = CliRunner().invoke(systemd.systemd, ["--to", str(tmp_path)])
    assert shown.exit_code == 0
    assert "warning" in shown.output


@pytest.mark.parametrize(("version", "steps"), [(0, False), (252, False), (254, True), (257, True)])
def test_restarts_come_more_slowly_where_systemd_can_do_that(version: int, steps: bool) -> None:
    broker = render("penstock", Path("/models"), version)["systemd/system/penstock-broker.service"]
    assert ("RestartSteps=6\nRestartMaxDelaySec=60s\n" in broker) == steps
    assert "RestartSec=500ms\n" in broker


@pytest.mark.parametrize(
    ("word", "quoted"),
    [
        ("/opt/penstock", "/opt/penstock"),
        ("/opt/a b", '"/opt/a b"'),
        ('/opt/"x"', '"/opt/\\"x\\""'),
        ("/opt/100%", "/opt/100%%"),
    ],
)
def test_words_are_quoted_as_units_have_them(word: str, quoted: str) -> None:
    assert quote(word) == quoted


def test_no_variable_is_expanded_in_a_command() -> None:
    assert command("/opt/$HOME/python") == "/opt/$$HOME/python -m penstock.bin"


def test_a_systemctl_that_does_not_end_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = tmp_path / "systemctl"
    command.write_text("#!/bin/sh\nexec tail -f /dev/null\n")
    command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(systemd, "_RUN_MAX_S", 0.05)
    assert systemd._version() == 0
