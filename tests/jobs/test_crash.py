"""Processes that share a store are killed in the middle of what they do: nothing is lost, and nothing happens twice."""

from __future__ import annotations

import random
import time
from collections import Counter
from pathlib import Path

import pytest

from penstock.jobs.job import SUCCEEDED
from penstock.jobs.store import Store, open_store
from tests.jobs import runners

_KILLS = 24
_WAIT_S = 60.0


@pytest.mark.timeout(180)
def test_nothing_is_lost_and_nothing_ends_twice(where: str, tmp_path: Path) -> None:
    notes = tmp_path / "notes"
    notes.mkdir()
    chance = random.Random(1)
    roles = ["submit", "run", "run"]
    living = [(role, runners.begin(role, where, notes)) for role in roles]
    try:
        for _ in range(_KILLS):
            number = chance.randrange(len(living))
            role, process = living[number]
            before = lines(notes)
            wait_for_more(notes, len(before) + chance.randrange(5, 40))
            assert process.poll() is None, "a process has ended by itself"
            process.kill()
            process.wait(_WAIT_S)
            living[number] = (role, runners.begin(role, where, notes))
        for number, (role, process) in enumerate(living):
            if role == "submit":
                process.kill()
                process.wait(_WAIT_S)
                living[number] = ("gone", process)
        store = open_store(where, runners.OPTIONS)
        wait_until_all_have_ended(store)
    finally:
        for _, process in living:
            process.kill()
            process.wait(_WAIT_S)

    told = [line.split() for line in lines(notes)]
    by_kind = Counter(words[0] for words in told)
    assert by_kind["submitted"] > _KILLS
    assert not by_kind["defect"], [words for words in told if words[0] == "defect"]
    assert not by_kind["error"], [" ".join(words) for words in told if words[0] == "error"]
    submitted = {words[1]: words[2] for words in told if words[0] == "submitted"}
    ids = [*submitted]
    found = {job.id: job for start in range(0, len(ids), 1000) for job in store.get(ids[start : start + 1000], 0.0)}
    assert found.keys() == submitted.keys(), "what was accepted is there"
    for id, body in submitted.items():
        assert found[id].status == SUCCEEDED
        response = store.response_of(id)
        assert response is not None
        assert response.body.hex() == body
    ends = Counter(words[1] for words in told if words[0] == "finished")
    assert max(ends.values()) == 1, "each ends once"
    claims = Counter((words[1], words[2]) for words in told if words[0] == "claimed")
    assert max(claims.values()) == 1, "nobody has the same turn as another"
    died = [job for job in found.values() if job.attempts > 1]
    assert all(job.deaths == job.attempts - 1 for job in found.values())
    assert died, "no runner was killed while it ran a job: this has tested nothing"
    store.close()


def lines(notes: Path) -> list[str]:
    return [line for path in notes.iterdir() for line in path.read_text().splitlines()]


def wait_for_more(notes: Path, count: int) -> None:
    until = time.monotonic() + _WAIT_S
    while len(lines(notes)) < count:
        assert time.monotonic() < until, "nothing happens any more"


def wait_until_all_have_ended(store: Store) -> None:
    until = time.monotonic() + _WAIT_S
    while True:
        counts = store.counts().by_status
        if counts["queued"] + counts["running"] == 0:
            return
        assert time.monotonic() < until, counts
