"""What ``penstock models`` says of a server's models."""

from __future__ import annotations

from pathlib import Path

from click.testing import CliRunner, Result

from penstock.bin.cli import cli
from tests.system.servers import Server


def models(runtime: Path, *arguments: str) -> Result:
    return CliRunner().invoke(cli, ["models", f"--runtime-dir={runtime}", *arguments])


def test_every_model_has_a_row_under_the_headings(server: Server) -> None:
    shown = models(server.runtime)
    assert (shown.exit_code, shown.stderr) == (0, "")
    heading, *rows = shown.stdout.splitlines()
    assert heading.split() == ["NAME", "VERSION", "STATE", "BATCH"]
    assert [row.split()[:4] for row in sorted(rows) if not row.startswith("broken")] == [
        ["brain", "1", "READY", "32"],
        ["dense", "3", "READY", "32"],
        ["square", "1", "READY", "alone"],
        ["strings", "1", "READY", "32"],
        ["sums", "1", "READY", "32"],
    ]


def test_columns_begin_where_their_headings_do(server: Server) -> None:
    heading, *rows = models(server.runtime).stdout.splitlines()
    for row in rows:
        for column in ("VERSION", "STATE"):
            at = heading.index(column)
            assert row[at - 2 : at] == "  "
            assert row[at] != " "


def test_what_is_not_served_or_not_batched_says_why(server: Server) -> None:
    rows = {line.split()[0]: line for line in models(server.runtime).stdout.splitlines()}
    assert rows["broken"].split()[1:3] == ["1", "UNAVAILABLE"]
    assert "cannot be loaded" in rows["broken"]
    assert len(rows["square"].partition("alone")[2].split()) > 3, "a sentence"
    assert rows["dense"] == rows["dense"].rstrip()


def test_nobody_there_is_an_error_within_the_time_that_was_given(nowhere: Path) -> None:
    shown = models(nowhere, "--timeout=0.05")
    assert (shown.exit_code, shown.stdout) == (1, "")
    assert shown.stderr == (
        f"penstock: no Penstock broker answered at {nowhere} within 0.05 s; "
        "is 'penstock up' running there, and as the same user?\n"
    )


def test_a_server_that_is_named_is_asked_instead_of_the_directory(server: Server) -> None:
    shown = models(server.runtime, "--server=tcp://127.0.0.1:9", "--timeout=0.05")
    assert shown.exit_code == 1
    assert "no Penstock broker answered at tcp://127.0.0.1:9 " in shown.stderr
