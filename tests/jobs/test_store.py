"""What every store of jobs does: each test runs against both kinds."""

from __future__ import annotations

from dataclasses import replace

import pytest

from penstock.jobs import job as jobs
from penstock.jobs.job import CANCELLED, EXPIRED, FAILED, QUEUED, RUNNING, SUCCEEDED, StoredRequest, StoredResponse
from penstock.jobs.store import IDS_MAX, Store, StoreError, StoreFull
from tests.jobs.conftest import Opener

REQUEST = StoredRequest(
    b"POST",
    b"/v2/models/digits/infer?x=%20",
    {"content-type": b"application/json", "penstock-tenant": b"caf\xe9"},
    b'{"inputs": []}\0\xff',
    "digits",
)
RESPONSE = StoredResponse(200, {"content-type": b"application/json"}, b'{"outputs": []}\0\xff')


def run(store: Store, owner: str, now: float) -> str:
    """Submit a job, and have this owner claim it."""
    job = store.submit(REQUEST, now)
    assert [each.id for each in store.claim(owner, 1, now, 15.0)] == [job.id]
    return job.id


def status(store: Store, id: str, now: float = 0.0) -> str:
    return store.get([id], now)[0].status


def test_a_job_from_its_submission_to_its_tombstone(opened: Opener) -> None:
    store = opened(ttl_s=100.0, tombstone_s=1000.0)
    job = store.submit(REQUEST, 10.0)
    assert (job.status, job.model, job.submitted_at, job.bytes) == (QUEUED, "digits", 10.0, REQUEST.size)
    assert store.get([job.id], 11.0) == [job]
    assert store.request_of(job.id) == REQUEST
    assert store.response_of(job.id) is None

    (running,) = store.claim("a", 10, 12.0, 15.0)
    assert running == replace(job, status=RUNNING, owner="a", lease_until=27.0, attempts=1, started_at=12.0)
    assert store.get([job.id], 12.0) == [running]
    assert store.request_of(job.id) == REQUEST

    assert store.finish(job.id, "a", SUCCEEDED, RESPONSE, "", 13.0)
    (ended,) = store.get([job.id], 13.0)
    assert (ended.status, ended.ended_at, ended.expires_at, ended.http_status) == (SUCCEEDED, 13.0, 113.0, 200)
    assert (ended.bytes, ended.owner, ended.ended) == (RESPONSE.size, "", True)
    assert store.response_of(job.id) == RESPONSE
    assert store.request_of(job.id) is None

    (expired,) = store.get([job.id], 113.0)
    assert (expired.status, expired.model, expired.ended_at, expired.bytes) == (EXPIRED, "digits", 13.0, 0)
    assert store.sweep(113.0) == 1
    assert store.get([job.id], 113.0) == [expired]
    assert store.response_of(job.id) is None
    assert (store.counts().bytes, store.counts().tombstones) == (0, 1)
    assert store.get([job.id], 1113.0) == []
    assert store.sweep(1113.0) == 0
    assert store.counts().tombstones == 0


def test_what_one_has_stored_another_finds(opened: Opener) -> None:
    id = run(opened(), "a", 1.0)
    other = opened()
    assert other.finish(id, "a", FAILED, replace(RESPONSE, status=500), "", 2.0)
    assert opened().response_of(id) == replace(RESPONSE, status=500)


def test_they_are_run_in_the_order_in_which_they_came(opened: Opener) -> None:
    store = opened()
    ids = [store.submit(REQUEST, 1.0).id for _ in range(25)]
    claimed = [job.id for _ in range(3) for job in store.claim("a", 10, 1.0, 15.0)]
    assert claimed == ids
    assert store.claim("a", 10, 1.0, 15.0) == []


def test_one_that_was_put_back_waits_and_keeps_its_place(opened: Opener) -> None:
    store = opened()
    first, second = store.submit(REQUEST, 1.0).id, store.submit(REQUEST, 1.0).id
    store.claim("a", 1, 1.0, 15.0)
    assert not store.put_back(first, "b", 5.0, 2.0)
    assert store.put_back(first, "a", 5.0, 2.0)
    assert not store.put_back(first, "a", 5.0, 2.0)
    assert [job.id for job in store.claim("b", 10, 4.9, 15.0)] == [second]
    assert store.put_back(second, "b", 5.0, 4.9)
    assert [(job.id, job.attempts, job.deaths) for job in store.claim("b", 10, 5.0, 15.0)] == [
        (first, 2, 0),
        (second, 2, 0),
    ]
    assert store.get([first], 5.0)[0].started_at == 1.0


def test_a_lease_that_is_renewed_does_not_run_out(opened: Opener) -> None:
    store = opened()
    id = run(store, "a", 1.0)
    assert store.claim("b", 10, 15.9, 15.0) == []
    assert store.renew("a", [id, "unknown"], 15.9, 15.0) == {id}
    assert store.renew("b", [id], 15.9, 15.0) == set()
    assert store.claim("b", 10, 30.8, 15.0) == []
    assert [job.id for job in store.claim("b", 10, 30.9, 15.0)] == [id]


def test_who_was_suspended_is_not_given_what_it_runs(opened: Opener) -> None:
    store = opened()
    id = run(store, "a", 1.0)
    assert store.claim("a", 10, 1000.0, 15.0, {id}) == []
    assert store.renew("a", [id], 1000.0, 15.0) == {id}
    assert store.claim("b", 10, 1014.9, 15.0, {"another"}) == []
    assert [job.id for job in store.claim("a", 10, 1015.0, 15.0)] == [id], "it could not end it"


def test_a_clock_that_is_set_back_has_nobody_wait(opened: Opener) -> None:
    """Longer than one waits at all, that is."""
    store = opened(ttl_s=1e6)
    id = store.submit(replace(REQUEST, callback_url="https://example.com/done"), 10_000.0).id
    store.claim("a", 1, 10_000.0, 15.0)
    assert store.put_back(id, "a", 10_020.0, 10_000.0)
    assert store.claim("a", 1, 9990.0, 15.0) == []
    assert [job.id for job in store.claim("a", 1, 10_020.0 - jobs.LATER_MAX_S - 0.1, 15.0)] == [id]
    store.finish(id, "a", SUCCEEDED, RESPONSE, "", 10_000.0)
    assert len(store.due_callbacks("c", 10, 10_000.0, 20.0)) == 1
    assert store.callback_done(id, "c", False, "it said 500", 10_600.0)
    before = 10_600.0 - jobs.CALLBACK_LATER_MAX_S
    assert store.due_callbacks("c", 10, before - 20.0, 20.0) == []
    assert len(store.due_callbacks("c", 10, before - 20.1, 20.0)) == 1
    assert len(store.due_callbacks("d", 10, before, 5000.0)) == 1
    assert store.due_callbacks("e", 10, before + 1.0, 5000.0) == [], "who sends it may take as long as it was given"


def test_who_has_lost_the_lease_ends_nothing(opened: Opener) -> None:
    store = opened()
    id = run(store, "a", 1.0)
    (job,) = store.claim("b", 10, 16.0, 15.0)
    assert (job.id, job.owner, job.attempts, job.deaths) == (id, "b", 2, 1)
    assert not store.finish(id, "a", SUCCEEDED, RESPONSE, "", 17.0)
    assert not store.put_back(id, "a", 0.0, 17.0)
    assert store.renew("a", [id], 17.0, 15.0) == set()
    assert store.finish(id, "b", SUCCEEDED, RESPONSE, "", 18.0)
    assert not store.finish(id, "b", FAILED, None, "late", 18.0)
    assert store.get([id], 18.0)[0].ended_at == 18.0


def test_who_is_late_and_has_lost_it_to_nobody_ends_it(opened: Opener) -> None:
    store = opened()
    id = run(store, "a", 1.0)
    assert store.finish(id, "a", SUCCEEDED, RESPONSE, "", 100.0)


def test_a_job_under_which_runners_end_fails(opened: Opener) -> None:
    store = opened(attempts_max=3)
    id = run(store, "a", 0.0)
    innocent = store.submit(REQUEST, 0.0).id
    store.claim("a", 1, 0.0, 1000.0)
    for turn in (1, 2):
        assert [job.id for job in store.claim("a", 10, turn * 20.0, 15.0)] == [id]
    assert store.claim("a", 10, 60.0, 15.0) == []
    (job,) = store.get([id], 60.0)
    assert (job.status, job.deaths, job.attempts) == (FAILED, 3, 3)
    assert job.error == "its runner ended 3 times while it ran (attempts_max)"
    assert status(store, innocent) == RUNNING


def test_one_that_waits_is_cancelled_at_once(opened: Opener) -> None:
    store = opened()
    id = store.submit(REQUEST, 1.0).id
    job = store.cancel(id, 2.0)
    assert job is not None
    assert (job.status, job.ended_at, job.bytes) == (CANCELLED, 2.0, 0)
    assert store.cancel(id, 3.0) == job
    assert store.claim("a", 1, 3.0, 15.0) == []
    assert store.request_of(id) is None


def test_one_that_runs_is_cancelled_by_its_runner(opened: Opener) -> None:
    store = opened()
    id = run(store, "a", 1.0)
    job = store.cancel(id, 2.0)
    assert job is not None
    assert (job.status, job.cancel_wanted) == (RUNNING, True)
    assert store.wanted_cancels("a") == {id}
    assert store.wanted_cancels("b") == set()
    assert store.finish(id, "a", CANCELLED, None, "", 3.0)
    assert store.wanted_cancels("a") == set()
    assert status(store, id) == CANCELLED


def test_a_result_that_was_there_before_the_cancelling_stays(opened: Opener) -> None:
    store = opened()
    id = run(store, "a", 1.0)
    store.cancel(id, 2.0)
    assert store.finish(id, "a", SUCCEEDED, RESPONSE, "", 3.0)
    job = store.cancel(id, 4.0)
    assert job is not None
    assert (job.status, job.cancel_wanted) == (SUCCEEDED, False)
    assert store.response_of(id) == RESPONSE


@pytest.mark.parametrize("how", ["put back", "runner gone"])
def test_one_that_was_cancelled_does_not_run_again(opened: Opener, how: str) -> None:
    store = opened()
    id = run(store, "a", 1.0)
    store.cancel(id, 2.0)
    if how == "put back":
        assert store.put_back(id, "a", 2.0, 2.0)
        assert status(store, id) == CANCELLED
    assert store.claim("b", 1, 100.0, 15.0) == []
    assert status(store, id) == CANCELLED


def test_nobody_cancels_what_is_not_there(opened: Opener) -> None:
    store = opened(ttl_s=10.0)
    assert store.cancel("unknown", 1.0) is None
    id = store.submit(REQUEST, 1.0).id
    store.cancel(id, 1.0)
    for swept in (0, 1):
        assert store.cancel(id, 11.0) == store.get([id], 11.0)[0]
        assert status(store, id, 11.0) == EXPIRED
        assert store.sweep(11.0) == 1 - swept


def test_so_many_jobs_and_no_more(opened: Opener) -> None:
    store = opened(count_max=2, ttl_s=10.0)
    first = store.submit(REQUEST, 1.0).id
    store.submit(REQUEST, 1.0)
    with pytest.raises(StoreFull, match=r"2 jobs are kept, which is all \(\[jobs\] count_max\)"):
        store.submit(REQUEST, 1.0)
    store.cancel(first, 2.0)
    with pytest.raises(StoreFull):
        store.submit(REQUEST, 2.0)
    store.sweep(12.0)
    store.submit(REQUEST, 12.0)


def test_so_many_bytes_and_no_more(opened: Opener) -> None:
    size = REQUEST.size
    store = opened(bytes_max=size * 4)
    ids = [store.submit(REQUEST, 1.0).id for _ in range(3)]
    assert store.counts().bytes == 3 * size
    with pytest.raises(StoreFull, match=r"no room for a job of \d+ bytes: requests may take 75% .*bytes_max"):
        store.submit(REQUEST, 1.0)
    store.claim("a", 3, 1.0, 15.0)
    assert store.finish(ids[0], "a", SUCCEEDED, StoredResponse(200, {}, bytes(2 * size)), "", 2.0)
    assert store.counts().bytes == 4 * size
    assert store.finish(ids[1], "a", SUCCEEDED, StoredResponse(200, {}, bytes(size + 1)), "", 2.0)
    (job,) = store.get([ids[1]], 2.0)
    assert (job.status, job.http_status, job.bytes) == (FAILED, None, 0)
    assert job.error == f"its result of {size + 1} bytes found no room among {size * 4} of all jobs ([jobs] bytes_max)"
    assert store.response_of(ids[1]) is None
    assert store.counts().bytes == 3 * size


def test_a_result_has_a_bound_of_its_own(opened: Opener) -> None:
    store = opened(result_bytes_max=100)
    small, large = run(store, "a", 1.0), run(store, "a", 1.0)
    assert store.finish(small, "a", SUCCEEDED, StoredResponse(200, {}, bytes(100)), "", 2.0)
    assert store.finish(large, "a", SUCCEEDED, StoredResponse(200, {}, bytes(101)), "", 2.0)
    assert status(store, small) == SUCCEEDED
    (job,) = store.get([large], 2.0)
    assert (job.status, job.error) == (
        FAILED,
        "its result of 101 bytes is larger than 100 ([jobs] result_bytes_max)",
    )


def test_tombstones_are_bounded_and_the_oldest_go_first(opened: Opener) -> None:
    store = opened(tombstones_max=2, ttl_s=10.0)
    ids = []
    for turn in range(4):
        ids.append(store.submit(REQUEST, float(turn)).id)
        store.cancel(ids[-1], float(turn))
    assert store.sweep(12.0) == 3
    assert store.sweep(13.0) == 1
    assert [job.id for job in store.get(ids, 13.0)] == ids[2:]
    assert store.counts().tombstones == 2


def test_lists_begin_with_the_newest(opened: Opener) -> None:
    store = opened(ttl_s=10.0)
    ids = [store.submit(REQUEST, 1.0).id for _ in range(5)]
    newest = ids[::-1]
    store.cancel(ids[1], 1.0)
    store.claim("a", 2, 1.0, 15.0)
    assert [job.id for job in store.list(2.0)] == newest
    assert [job.id for job in store.list(2.0, limit=2)] == newest[:2]
    assert [job.id for job in store.list(2.0, limit=2, after=newest[1])] == newest[2:4]
    assert [job.id for job in store.list(2.0, limit=2, after=newest[3])] == newest[4:]
    assert store.list(2.0, after="unknown") == []
    assert [job.id for job in store.list(2.0, RUNNING)] == [ids[2], ids[0]]
    assert [job.id for job in store.list(2.0, RUNNING, after=ids[2])] == [ids[0]]
    assert [job.id for job in store.list(11.0)] == [each for each in newest if each != ids[1]]
    assert store.sweep(11.0) == 1
    assert [job.id for job in store.list(11.0, after=ids[1])] == [ids[0]]


def test_many_are_found_in_the_order_in_which_they_are_asked_for(opened: Opener) -> None:
    store = opened()
    ids = [store.submit(REQUEST, 1.0).id for _ in range(3)]
    wanted = [ids[2], "unknown", ids[0], ids[2], ids[1]]
    assert [job.id for job in store.get(wanted, 1.0)] == [ids[2], ids[0], ids[1]]
    assert store.get([], 1.0) == []
    with pytest.raises(ValueError, match="can be at a time"):
        store.get([str(number) for number in range(IDS_MAX + 1)], 1.0)


def test_a_change_is_noticed_wherever_it_was_made(opened: Opener) -> None:
    store, other = opened(), opened()
    seen = store.change()
    assert store.change() == seen
    id = other.submit(REQUEST, 1.0).id
    assert store.change() != seen
    seen = store.change()
    store.get([id], 1.0)
    assert store.claim("a", 0, 1.0, 15.0) == []
    assert store.sweep(1.0) == 0
    assert store.change() == seen
    store.cancel(id, 2.0)
    assert store.change() != seen


def test_the_secret_is_made_once(opened: Opener) -> None:
    secret = opened().secret()
    assert len(secret) == 32
    assert opened().secret() == secret


def test_a_callback_is_due_until_it_has_arrived(opened: Opener) -> None:
    store = opened(ttl_s=1.0)
    url = "https://example.com/done"
    id = store.submit(replace(REQUEST, callback_url=url), 1.0).id
    assert store.due_callbacks("c", 10, 1.0, 20.0) == []
    store.claim("a", 1, 1.0, 15.0)
    store.finish(id, "a", SUCCEEDED, RESPONSE, "", 2.0)
    assert store.counts().callbacks == 1

    (job,) = store.due_callbacks("c", 10, 2.0, 20.0)
    assert job.callback is not None
    assert (job.id, job.callback.url, job.callback.attempts) == (id, url, 1)
    assert store.due_callbacks("d", 10, 2.0, 20.0) == []
    assert not store.callback_done(id, "d", True)
    assert store.callback_done(id, "c", False, "it said 500", 30.0)
    assert store.due_callbacks("c", 10, 29.9, 20.0) == []

    (job,) = store.due_callbacks("c", 10, 30.0, 20.0)
    assert job.callback is not None
    assert (job.callback.attempts, job.callback.last_error) == (2, "it said 500")
    (job,) = store.due_callbacks("d", 10, 50.0, 20.0)  # c has ended
    assert job.callback is not None
    assert job.callback.attempts == 3
    assert not store.callback_done(id, "c", True)
    assert store.callback_done(id, "d", True)
    assert not store.callback_done(id, "d", True)

    (job,) = store.get([id], 50.0)
    assert job.callback is not None
    assert (job.callback.state, job.callback.last_error) == (jobs.DELIVERED, "")
    assert store.due_callbacks("c", 10, 10_000.0, 20.0) == []
    assert store.counts().callbacks == 0


def test_a_callback_is_given_up(opened: Opener) -> None:
    store = opened(callback_attempts_max=2)
    failed, lost = (store.submit(replace(REQUEST, callback_url="http://example.com"), 1.0).id for _ in range(2))
    store.cancel(failed, 1.0)
    store.cancel(lost, 1.0)
    assert len(store.due_callbacks("c", 10, 1.0, 5.0)) == 2
    assert store.callback_done(failed, "c", False, "no", None)
    assert [job.id for job in store.due_callbacks("c", 10, 6.0, 5.0)] == [lost]
    assert store.due_callbacks("c", 10, 11.0, 5.0) == []
    told = [job.callback for job in store.get([failed, lost], 11.0)]
    assert [(each.state, each.last_error) for each in told if each] == [
        (jobs.CALLBACK_FAILED, "no"),
        (jobs.CALLBACK_FAILED, "the process that sent it ended"),
    ]


def test_a_sentence_that_is_kept_is_bounded_and_is_text(opened: Opener) -> None:
    store = opened()
    id = run(store, "a", 1.0)
    assert store.finish(id, "a", FAILED, None, "\ud800" + "x" * 10_000, 2.0)
    assert store.get([id], 2.0)[0].error == "?" + "x" * (jobs.ERROR_CHARACTERS_MAX - 1)


def test_a_store_that_is_closed_says_so(opened: Opener) -> None:
    store = opened()
    store.submit(REQUEST, 1.0)
    store.close()
    store.close()
    with pytest.raises(StoreError, match="the store of jobs is closed"):
        store.counts()
    with pytest.raises(StoreError, match="the store of jobs is closed"):
        store.change()
