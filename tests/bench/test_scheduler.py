"""The broker's scheduler is measured in the state that is said, and each decision is a whole one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench import scheduler
from bench.scheduler import Hall, Setting


@pytest.mark.parametrize("setting", [Setting(5, 1, 1, 1), Setting(30, 3, 2, 4), Setting(7, 1, 5, 3)])
def test_hall_stays_as_it_is_however_much_is_decided(setting: Setting) -> None:
    hall = Hall(setting)
    for _ in range(50):
        waiting = sum(queue.requests for queue in hall.core.registry.queues.values())
        assert (waiting, hall.core.ledger.requests) == (setting.queued, setting.queued + 2 * setting.workers)
        assert {worker.batches for worker in hall.core.workers.values()} == {2}
        hall.core.validate()
        hall.decide()
    assert len(hall.core.workers) == setting.workers
    assert len(hall.core.registry.queues) == setting.models


def test_results_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduler, "SETTINGS", (Setting(5, 1, 1, 1), Setting(5, 2, 1, 2)))
    scheduler.main(["--rounds=1", "--decisions=8", f"--json={tmp_path / 'out.json'}"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[:4] for line in lines[3:]] == [["| 5", "1", "1", "1"], ["| 5", "2", "1", "2"]]
    first, other = json.loads((tmp_path / "out.json").read_text())["settings"]
    assert first["ratio"] == 1.0
    assert first["us"] > 0
    assert other["us"] > 0
