"""The benchmark of the client library, in its shortest form."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from bench import client


def test_a_run_prints_a_table_and_writes_every_figure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "client.json"
    arguments = ["--seconds=0.05", "--sustain=0.1", "--requests=200", f"--out={out}"]
    monkeypatch.setattr(sys, "argv", ["client.py", *arguments])
    client.main()
    content = json.loads(out.read_text())
    asked = [(row["client"], row["model"], row["threads"]) for row in content["rows"]]
    assert asked == [
        (way, model, threads)
        for model in ("tiny", "image")
        for threads in (1, 4, 16)
        for way in ("infer", "tritonclient.http")
    ] + [("submit", "tiny", 1)]
    assert [len(row["ratio"]) for row in content["rows"]] == [3, 0] * 6 + [0]
    assert all(row["requests_per_s"] > 0 and row["client_us"] > 0 for row in content["rows"])
    assert set(content["grown_mb"]) == {"gateway", "broker", "worker", "client"}
    printed = capsys.readouterr().out
    assert "| submit | tiny | 1 |" in printed
    assert "MB grown over 200 requests" in printed
