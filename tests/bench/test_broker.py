"""The broker's benchmark: its stand-ins speak the protocol, and nothing of theirs is lost."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.broker import Broker, Setting, compare


@pytest.mark.parametrize("window", [1, 7])
def test_requests_go_round_and_all_end(tmp_path: Path, window: int) -> None:
    with Broker(Setting(2, 3), tmp_path / "run", window) as broker:
        rates = [broker.turn(0.1) for _ in range(2)]
        assert all(rate > 0 for rate, _ in rates)
        assert broker._under_way == 0
        assert broker._ended == broker._last_id >= window


def test_settings_are_compared_with_the_first() -> None:
    first, other = compare([Setting(1, 1), Setting(2, 2)], window=1, rounds=3, seconds=0.1)
    assert list(first.ratio) == [1.0, 1.0, 1.0]
    assert (other.workers, other.callers, len(other.ratio)) == (2, 2, 3)
    assert other.broker_us > 0
