"""Two versions of the server are compared in pairs."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from bench import versions

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("text", ["", "now", str(ROOT), "now=", "now=/nowhere"])
def test_what_is_no_version(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="is not NAME=PATH"):
        versions.a_version(text)


def test_two_versions_are_asked_in_turns(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    require_command: Callable[[str, str], str],
) -> None:
    require_command("wrk", "wrk")
    out = tmp_path / "out.json"
    command = ["versions.py", f"one={ROOT}", f"other={ROOT}", "--rounds=1", "--seconds=1", f"--out={out}"]
    monkeypatch.setattr(sys, "argv", command)
    monkeypatch.setenv("PYTHONPATH", "")
    versions.main()
    runs = json.loads(out.read_text())["runs"]
    assert list(runs) == ["one", "other"]
    assert [len(found) for found in runs.values()] == [versions.TURNS] * 2
    assert all(run["gateway_us"] > 0 and run["broker_us"] > 0 for found in runs.values() for run in found)
    assert "us more than one: half of 2 pairs" in capsys.readouterr().out
