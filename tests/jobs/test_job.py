"""What may become of a job, and nothing else."""

from __future__ import annotations

from dataclasses import replace

import pytest

from penstock.jobs import job as jobs
from penstock.jobs.job import (
    CALLBACK_WAITS_S,
    CANCELLED,
    ENDED,
    EXPIRED,
    FAILED,
    QUEUED,
    RUNNING,
    STATUSES,
    SUCCEEDED,
    TRANSITIONS,
    IllegalTransition,
    Job,
    StoredRequest,
    StoredResponse,
)
from penstock.jobs.options import JobsOptions

OPTIONS = JobsOptions()
JOB = Job("id", QUEUED, "digits", 1.0, 10)
IN = {status: replace(JOB, status=status) for status in (*STATUSES, EXPIRED)}
EVENTS = sorted({event for events in TRANSITIONS.values() for event in events})


def test_every_status_has_its_row() -> None:
    assert set(TRANSITIONS) == {*STATUSES, EXPIRED}
    assert {to for events in TRANSITIONS.values() for to in events.values()} <= set(TRANSITIONS)
    assert all(set(TRANSITIONS[status]) == {"expire"} for status in ENDED)


@pytest.mark.parametrize("status", TRANSITIONS)
@pytest.mark.parametrize("event", EVENTS)
def test_what_is_not_in_the_table_raises(status: str, event: str) -> None:
    if event in TRANSITIONS[status]:
        assert jobs.next_status(status, event) == TRANSITIONS[status][event]
    else:
        with pytest.raises(IllegalTransition, match=f"a job that is {status} cannot {event}"):
            jobs.next_status(status, event)


@pytest.mark.parametrize("status", sorted(ENDED | {EXPIRED}))
def test_nothing_happens_to_one_that_has_ended_but_that_it_expires(status: str) -> None:
    job = IN[status]
    for wanted in ENDED:
        with pytest.raises(IllegalTransition):
            jobs.ended(job, wanted, None, "", 2.0, OPTIONS)
    with pytest.raises(IllegalTransition):
        jobs.claimed(job, "a", 2.0, 1.0, OPTIONS)
    with pytest.raises(IllegalTransition):
        jobs.given_back(job, 2.0, 2.0, OPTIONS)
    assert jobs.cancelled(job, 2.0, OPTIONS) == job
    assert not jobs.is_due(job, 1e12)
    assert not jobs.holds(job, "")


def test_one_that_waits_can_only_be_claimed_or_cancelled() -> None:
    for wanted in (SUCCEEDED, FAILED):
        with pytest.raises(IllegalTransition):
            jobs.ended(JOB, wanted, None, "", 2.0, OPTIONS)
    assert jobs.ended(JOB, CANCELLED, None, "", 2.0, OPTIONS).status == CANCELLED


def test_ids_cannot_be_guessed() -> None:
    request = StoredRequest(b"POST", b"/", {}, b"")
    ids = {jobs.submitted(request, 1.0).id for _ in range(1000)}
    assert len(ids) == 1000
    assert {len(id) for id in ids} == {32}


def test_what_counts_as_bytes() -> None:
    assert StoredRequest(b"POST", b"/x", {"ab": b"cde"}, bytes(100), "m", "http://a").size == 4 + 2 + 5 + 100 + 8
    assert StoredResponse(200, {"ab": b"cde"}, bytes(100)).size == 105


def test_one_that_is_put_back_waits_from_then_on() -> None:
    running = jobs.claimed(JOB, "a", 5.0, 10.0, OPTIONS)
    back = jobs.given_back(running, 9.0, 6.0, OPTIONS)
    assert (back.status, back.owner, back.not_before, back.attempts) == (QUEUED, "", 9.0, 1)
    assert (jobs.is_due(back, 8.9), jobs.is_due(back, 9.0)) == (False, True)


def test_the_job_of_a_runner_that_is_known_to_be_dead_is_due() -> None:
    running = jobs.claimed(JOB, "a", 5.0, 10.0, OPTIONS)
    assert not jobs.is_due(running, 6.0, frozenset({"b"}))
    assert jobs.is_due(running, 6.0, frozenset({"a"}))
    again = jobs.claimed(running, "b", 6.0, 10.0, OPTIONS)
    assert (again.status, again.owner, again.deaths, again.started_at) == (RUNNING, "b", 1, 5.0)


def test_one_with_a_callback_is_kept_until_that_has_been_tried() -> None:
    request = StoredRequest(b"POST", b"/", {}, b"", callback_url="http://a")
    options = JobsOptions(ttl_s=1.0)
    job = jobs.cancelled(jobs.submitted(request, 0.0), 10.0, options)
    assert job.expires_at is not None
    assert job.expires_at - 10.0 == jobs.callback_span_s(options) > sum(CALLBACK_WAITS_S) * 1.2
    assert jobs.cancelled(JOB, 10.0, options).expires_at == 11.0


def test_callbacks_wait_longer_each_time() -> None:
    assert [jobs.callback_wait_s(attempt) for attempt in range(1, 8)] == [1.0, 5.0, 30.0, 120.0, 600.0, 600.0, 600.0]


def test_a_tombstone_has_neither_error_nor_callback() -> None:
    ended = replace(IN[FAILED], error="no", ended_at=2.0, expires_at=3.0, callback=jobs.Callback("http://a"))
    assert jobs.tombstone(ended) == Job("id", EXPIRED, "digits", 1.0, ended_at=2.0, expires_at=3.0)
    assert jobs.seen(ended, 2.9, OPTIONS) == ended
    assert jobs.seen(ended, 3.0, OPTIONS) == jobs.tombstone(ended)
    assert jobs.seen(ended, 3.0 + OPTIONS.tombstone_s, OPTIONS) is None
