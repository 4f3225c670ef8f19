"""The words for where a request waited."""

from __future__ import annotations

import pytest

from penstock.client.explain import explain
from penstock.wire.messages import BATCH_REASONS, Batch


@pytest.mark.parametrize(
    ("queue_us", "held_us", "batch", "words"),
    [
        (
            15_123,
            12_100,
            Batch(17, 32, "full", 4_000, 3_900),
            "held 12.1 ms at the broker until a worker had room; 3.0 ms on worker gpu0 until an instance was idle; its "
            "batch was closed because it was full; batch 17 of that worker, with 32 rows, took 4.0 ms",
        ),
        (
            60,
            50,
            Batch(1, 1, "idle", 250, 200),
            "a worker had room at once; ran at once on worker gpu0; its batch was closed because an instance was idle; "
            "batch 1 of that worker, with 1 row, took 0.2 ms",
        ),
        (
            2_050,
            0,
            Batch(2, 3, "delay", 1_000, 900),
            "a worker had room at once; 2.0 ms on worker gpu0 while its batch waited for more requests; its batch was "
            "closed because its oldest request had waited as long as max_queue_delay allows; batch 2 of that worker, "
            "with 3 rows, took 1.0 ms",
        ),
    ],
)
def test_where_a_request_waited_and_why(queue_us: int, held_us: int, batch: Batch, words: str) -> None:
    assert explain(queue_us, held_us, batch, "gpu0") == words


def test_every_reason_has_words_of_its_own() -> None:
    told = {explain(0, 0, Batch(1, 1, reason, 1, 1), "w") for reason in BATCH_REASONS}
    assert len(told) == len(BATCH_REASONS)
    assert not any(f"'{reason}'" in each for reason in BATCH_REASONS for each in told)


def test_times_that_contradict_each_other_are_no_negative_waits() -> None:
    assert "ran at once" in explain(100, 200, Batch(1, 1, "idle", 1, 1), "w")
