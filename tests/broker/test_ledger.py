"""The life of requests, as their callers and workers live it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from penstock.wire.errors import OVERLOADED
from penstock.wire.events import Drain
from penstock.wire.messages import MAX_SENTENCE, Assign, Form, Models, Requests, Submit, WorkerHello
from penstock.wire.models import LOADING, UNAVAILABLE
from tests.broker.conversation import EPOCH, CallerTalk, Conversation, WorkerTalk, model

LARGE = 20_000  # bytes that travel in a frame of their own


def pair(**options: Any) -> tuple[Conversation, CallerTalk, WorkerTalk]:
    """A caller and a worker that hear each other; the worker has room for 8 rows."""
    talk = Conversation(**options)
    caller = talk.caller()
    return talk, caller, talk.worker(hears=[caller])


def started(count: int, **options: Any) -> tuple[Conversation, CallerTalk, WorkerTalk]:
    """The same, and the worker has these many requests."""
    talk, caller, worker = pair(**options)
    caller.submit(count)
    talk.tick()
    assert worker.got() == list(range(1, count + 1))
    return talk, caller, worker


# --- in ---


@pytest.mark.parametrize("size", [0, 10, LARGE])
def test_a_request_goes_with_its_payload_to_a_worker(size: int) -> None:
    talk, caller, worker = pair()
    caller.submit(2, size=size)
    assert talk.held == (2, 2 * size)
    talk.tick()
    [message] = worker.take(Assign)
    [group] = message.groups
    assert (group.caller, group.attempt, group.ids, group.form.body) == (caller.id, 1, (1, 2), b"layout")
    payloads = [bytes([1]) * size, bytes([2]) * size]
    assert (message.blob, list(message.frames)) == ((b"", payloads) if size == LARGE else (b"".join(payloads), []))


def test_payloads_stay_with_their_requests_when_groups_are_mixed_and_split() -> None:
    talk, caller, worker = pair()
    forms = [Form("m", "1", 0, tenant, 1, size, b"", b"") for tenant, size in (("a", 3), ("b", LARGE), ("c", 5))]
    groups = [Requests(form, tuple(range(at, at + 5)), (10**7,) * 5) for at, form in enumerate(forms, 1)]
    groups = [group._replace(ids=tuple(5 * at + each for each in range(1, 6))) for at, group in enumerate(groups)]
    caller.ask(groups)
    seen: dict[int, bytes] = {}
    for _ in range(4):
        talk.tick()
        for message in worker.take(Assign):
            for group, start in zip(message.groups, message.starts, strict=True):
                for at, number in enumerate(group.ids):
                    begin = start + at * group.nbytes
                    large = group.nbytes == LARGE
                    seen[number] = message.frames[start + at] if large else message.blob[begin : begin + group.nbytes]
            worker.finish(message.groups)
    assert seen == {number: bytes([number]) * (3, LARGE, 5)[(number - 1) // 5] for number in range(1, 16)}


def test_requests_go_only_to_workers_that_their_caller_hears() -> None:
    talk = Conversation()
    caller, stranger = talk.caller(), talk.caller()
    deaf, worker = talk.worker(), talk.worker(hears=[caller])
    caller.submit(20)
    stranger.submit()
    talk.tick()
    assert (len(worker.got()), deaf.got()) == (8, [])
    deaf.hear(stranger)
    talk.tick()
    assert deaf.got() == [1]
    worker.hear(caller, False)
    worker.done(caller, *range(1, 9))
    talk.tick()
    assert worker.got() == []


def test_a_worker_has_a_batch_more_than_it_has_instances_and_no_more() -> None:
    talk = Conversation()
    caller = talk.caller()
    worker = talk.worker(model(batch=4), hears=[caller], instances=3)
    caller.submit(40)
    talk.tick()
    assert len(worker.got()) == 16
    worker.done(caller, 1, 2, 3)
    talk.tick()
    assert worker.got() == [17, 18, 19]


def test_the_window_is_over_all_models_together() -> None:
    talk = Conversation()
    caller = talk.caller()
    worker = talk.worker(model("m", batch=4), model("n", batch=2), hears=[caller])
    caller.submit(4, "m")
    caller.submit(20, "n")
    talk.tick()
    assert [(group.form.model, len(group.ids)) for group in worker.work()] == [("m", 4), ("n", 2)]
    worker.done(caller, 1, 2, 3)
    talk.tick()
    assert worker.got() == []
    worker.done(caller, 4)
    talk.tick()
    assert [(group.form.model, len(group.ids)) for group in worker.work()] == [("n", 2)]


@pytest.mark.parametrize("rows", [1, 3, 5, 8])
def test_models_that_wait_for_the_same_worker_are_served_in_turn(rows: int) -> None:
    talk = Conversation()
    caller = talk.caller()
    worker = talk.worker(model("m", batch=8), model("n", batch=8), hears=[caller])
    caller.submit(200, "m", rows=rows)
    caller.submit(200, "n", rows=rows)
    got = {"m": 0, "n": 0}
    ready: list[int] = []
    for _ in range(60):
        talk.tick()
        for group in worker.work():
            got[group.form.model] += len(group.ids)
            ready += group.ids
        worker.done(caller, ready.pop(0))  # one at a time, so that batches are never finished as a whole
    assert min(got.values()) > 15
    assert max(got.values()) < 60


def test_a_request_without_a_version_gets_the_newest_that_is_served() -> None:
    talk = Conversation()
    caller = talk.caller()
    worker = talk.worker(model("m", "1"), model("m", "2"), model("m", "10", LOADING, batch=0), hears=[caller])
    caller.submit(version="")
    talk.tick()
    assert [group.form.version for group in worker.work()] == ["2"]


@pytest.mark.parametrize(
    ("asked", "code", "sentence"),
    [
        ({"name": "x"}, "not_found", "Request for unknown model: 'x' is not found"),
        ({"version": "9"}, "not_found", "Request for unknown model: 'm' version 9 is not found"),
        ({"rows": 5}, "bad_input", "inference request batch-size must be <= 4 for 'm'"),
        ({"name": "new"}, "unavailable", "model 'new' is not ready (LOADING): reading the file"),
    ],
)
def test_what_cannot_be_served_is_refused_at_the_next_tick(asked: dict[str, Any], code: str, sentence: str) -> None:
    talk = Conversation()
    caller = talk.caller()
    talk.worker(model(), model("new", state=LOADING, reason="reading the file", batch=0), hears=[caller])
    caller.submit(2, **asked)
    assert talk.held == (0, 0)
    talk.tick()
    assert [(each.id, each.code, each.message) for each in caller.refusals()] == [
        (1, code, sentence),
        (2, code, sentence),
    ]


def test_nothing_can_be_asked_before_a_worker_has_joined() -> None:
    talk = Conversation()
    caller = talk.caller()
    caller.submit()
    talk.tick()
    [refusal] = caller.refusals()
    assert (refusal.code, refusal.message) == (
        "unavailable",
        "no worker has joined this server yet; try again shortly",
    )


def test_a_reason_too_long_for_a_refusal_is_cut() -> None:
    talk = Conversation()
    caller = talk.caller()
    talk.worker(model(state=UNAVAILABLE, reason="r" * MAX_SENTENCE, batch=0))
    caller.submit()
    talk.tick()
    [refusal] = caller.refusals()
    assert len(refusal.message) == MAX_SENTENCE


def test_metrics_of_what_was_refused_bear_only_names_that_the_server_knows() -> None:
    talk = Conversation()
    caller = talk.caller()
    for name in ("a", "b", "c"):
        caller.submit(name=name)
    talk.worker(model(), name="w")
    for name in ("d", "e", "m"):
        caller.submit(name=name, version="", rows=5)
    labels = {sample.labels for sample in talk.core.meters.samples() if sample.family == "penstock_request_failures"}
    assert labels == {("", "", "unavailable"), ("", "", "not_found"), ("m", "1", "bad_input")}


def test_ids_grow_or_are_refused() -> None:
    talk, caller, worker = pair()
    form = Form("m", "1", 0, "", 1, 0, b"", b"")
    caller.ask([Requests(form, (5, 9), (10**7,) * 2), Requests(form._replace(tenant="t"), (7,), (10**7,))])
    caller.ask([Requests(form, (9, 10), (10**7,) * 2)])
    caller.ask([Requests(form, (11,), (10**7,)), Requests(form._replace(tenant="t"), (11,), (10**7,))])
    talk.tick()
    assert sorted(worker.got()) == [5, 7, 9, 11]
    assert [(each.id, each.code) for each in caller.refusals()] == [
        (9, "bad_input"),
        (10, "bad_input"),
        (11, "bad_input"),
    ]


def test_an_id_that_stands_twice_in_a_group_is_refused_once() -> None:
    talk, caller, worker = pair()
    caller.ask([Requests(Form("m", "1", 0, "", 1, 3, b"", b""), (1, 2, 1), (10**7,) * 3)])
    talk.tick()
    assert caller.refused() == {1: "bad_input", 2: "bad_input"}
    assert (talk.held, worker.got()) == ((0, 0), [])


# --- bounds ---


def test_a_caller_that_fills_a_queue_leaves_the_last_eighth_to_others() -> None:
    talk = Conversation(queue_requests_max=80)
    flooder, other = talk.caller(), talk.caller()
    talk.worker()
    flooder.submit(100)
    assert talk.held[0] == 70
    other.submit(20)
    assert talk.held[0] == 80, "as many as are left, and as an eighth is"


@pytest.mark.parametrize("options", [{"queue_bytes_max": 800}, {"held_bytes_max": 800}])
def test_a_caller_that_has_nothing_may_ask_for_one_however_large(options: dict[str, Any]) -> None:
    talk = Conversation(**options)
    caller, other = talk.caller(), talk.caller()
    talk.worker()
    caller.submit(1, size=800)
    assert talk.held == (1, 800)
    other.submit(1, size=1)
    assert talk.held == (1, 800)


@pytest.mark.parametrize(
    ("options", "size", "accepted", "sentence"),
    [
        (
            {"queue_requests_max": 3},
            0,
            3,
            "Exceeds maximum queue size: at most 3 requests wait for model 'm'; try again shortly",
        ),
        ({"held_requests_max": 2}, 9, 2, "the server holds at most 2 requests; try again shortly"),
        (
            {"caller_requests_max": 4},
            9,
            4,
            "4 requests of this caller are under way, which is all that it may have; try again shortly",
        ),
        ({"held_bytes_max": 25}, 10, 2, "the server holds 0 of at most 25 bytes; try again shortly"),
    ],
)
def test_what_is_over_a_bound_is_refused_with_its_sentence(
    options: dict[str, Any], size: int, accepted: int, sentence: str
) -> None:
    talk = Conversation(**options)
    caller = talk.caller()
    talk.worker()
    caller.submit(5, size=size)
    assert talk.held == (accepted, accepted * size)
    talk.tick()
    refusals = caller.refusals()
    assert [each.id for each in refusals] == list(range(accepted + 1, 6))
    assert {(each.code, each.message, each.retry_after_ms) for each in refusals} == {("overloaded", sentence, 1000)}
    assert talk.count("penstock_request_failures", "m", "1", "overloaded") == 5 - accepted
    caller.submit(size=size)
    talk.tick()
    assert caller.refused() == {6: "overloaded"}


def test_a_request_that_could_never_be_held_is_too_large() -> None:
    talk, caller, _ = pair(held_bytes_max=25)
    caller.submit(size=26)
    talk.tick()
    [refusal] = caller.refusals()
    assert (refusal.code, refusal.retry_after_ms) == ("too_large", 0)
    assert refusal.message == "the request has 26 bytes, and the server holds 25 at most"


def test_one_callers_flood_leaves_room_for_another() -> None:
    talk = Conversation(caller_requests_max=4)
    flooding, other = talk.caller(), talk.caller()
    talk.worker()
    flooding.submit(10)
    other.submit(2)
    assert talk.held == (6, 0)


def test_acknowledgments_make_room_before_the_requests_of_the_same_message() -> None:
    talk, caller, worker = started(2, held_requests_max=2)
    worker.done(caller, 1, 2)
    group = Requests(Form("m", "1", 0, "", 1, 0, b"", b""), (3, 4), (10**7,) * 2)
    caller.say(Submit(EPOCH, [group], (1, 2)))
    talk.tick()
    assert (caller.refused(), worker.got()) == ({}, [3, 4])


def test_what_was_assigned_makes_room_in_the_queue_and_none_in_the_server() -> None:
    talk, caller, worker = pair(queue_requests_max=3, held_requests_max=5)
    for _ in range(3):
        caller.submit(3)
        talk.tick()
    assert worker.got() == [1, 2, 3, 4, 5]
    assert caller.refused() == dict.fromkeys((6, 7, 8, 9), "overloaded")


def test_a_caller_that_does_not_acknowledge_gets_nothing_more_from_that_worker() -> None:
    talk, caller, worker = pair(unacknowledged_bytes_max=1000)
    other = talk.caller()
    worker.hear(other)
    caller.submit(2)
    talk.tick()
    worker.finish(worker.work(), size=500)
    caller.submit(2)
    other.submit(1)
    talk.tick()
    assert [group.caller for group in worker.work()] == [other.id]
    elsewhere = talk.worker(hears=[caller])
    talk.tick()
    assert elsewhere.got() == [3, 4]
    caller.submit(20)
    talk.tick()
    assert worker.got() == []
    caller.ack(1)
    talk.tick()
    assert len(worker.got()) == 7


# --- DONE and acknowledgment ---


def test_a_request_ends_when_its_result_was_acknowledged() -> None:
    talk, caller, worker = started(3)
    worker.done(caller, 1, 2, 3, size=100)
    assert talk.held == (3, 0)  # DONE is not delivery
    caller.ack(1, 2, 3)
    assert talk.held == (0, 0)
    talk.tick()
    assert worker.news() == ([], [])
    talk.tick(0.011)
    assert worker.news() == ([1, 2, 3], [])
    talk.tick(1.0)
    assert worker.news() == ([], [])


def test_freed_results_travel_with_the_next_work() -> None:
    talk, caller, worker = started(3)
    worker.done(caller, 1, 3)
    caller.ack(1, 3)
    caller.submit()
    talk.tick()
    [message] = worker.take(Assign)
    assert [(each.caller, each.ranges) for each in message.freed] == [(caller.id, (1, 1, 3, 3))]
    assert [group.ids for group in message.groups] == [(4,)]


def test_an_acknowledgment_may_come_before_done() -> None:
    talk, caller, worker = started(2)
    caller.ack(1, 2)
    talk.tick(0.1)
    assert (talk.held, worker.news()) == ((2, 0), ([], []))
    worker.done(caller, 1, 2, size=100)
    assert talk.held == (0, 0)
    talk.tick(0.1)
    talk.tick(0.1)
    assert worker.news() == ([1, 2], [])


def test_requests_of_one_message_may_end_one_by_one_in_any_order() -> None:
    talk, caller, worker = started(4)
    worker.done(caller, 3)
    caller.ack(1, 3)
    worker.done(caller, 2, 1)
    caller.ack(4)
    assert talk.held == (2, 0)
    caller.ack(2)
    worker.done(caller, 4)
    assert talk.held == (0, 0)
    talk.tick(0.1)
    talk.tick(0.1)
    assert worker.news() == ([1, 2, 3, 4], [])


def test_what_is_said_twice_counts_once() -> None:
    talk, caller, worker = started(3)
    worker.done(caller, 1, 2, 1, size=10)
    worker.done(caller, 1, 2, size=10)
    caller.ack(1)
    caller.ack(1)
    caller.cancel(3, 3)
    worker.done(caller, 3)
    worker.done(caller, 3)
    assert talk.held == (1, 0)


def test_what_is_cancelled_twice_while_it_waits_counts_once() -> None:
    talk, caller, worker = pair()
    caller.submit(2)
    caller.cancel(1, 1)
    caller.cancel(1, 2, 2)
    caller.submit()
    talk.tick()
    assert (worker.got(), talk.held) == ([3], (1, 0))


def test_words_about_requests_that_nobody_has_are_ignored() -> None:
    talk, caller, worker = started(2)
    caller.ack(3, 4, 5)
    caller.cancel(9)
    worker.done(caller, 7, 8)
    worker.done(caller, 1, attempt=2)
    worker.done(talk.caller(), 1)
    caller.say(Submit(EPOCH, (), (0, (1 << 64) - 1)))
    assert talk.held == (2, 0)
    talk.tick()
    assert "Refusals" not in caller.heard()
    worker.done(caller, 1, 2)
    assert talk.held == (0, 0)


def test_a_worker_cannot_end_what_another_has() -> None:
    talk, caller, _ = started(1)
    talk.worker(hears=[caller]).done(caller, 1)
    caller.ack(1)
    assert talk.held == (1, 0)


def test_a_result_waits_for_its_acknowledgment_as_long_as_its_caller_lives() -> None:
    """It may be reading it still, in the worker's memory. What it may leave unacknowledged is bounded."""
    talk, caller, worker = pair(caller_requests_max=2)
    caller.submit(2, timeout_s=1.0)
    talk.tick()
    worker.done(caller, 1, 2)
    talk.live(100.0)
    assert talk.held == (2, 0)
    assert worker.news() == ([], [])
    caller.submit()
    talk.tick()
    assert caller.refused() == {3: OVERLOADED}
    caller.vanish()
    assert talk.held == (0, 0)


# --- cancelling ---


def test_what_is_cancelled_while_it_waits_is_never_assigned() -> None:
    talk, caller, worker = pair()
    caller.submit(4)
    caller.cancel(2, 3)
    assert talk.held == (2, 0)
    talk.tick()
    assert worker.got() == [1, 4]
    assert caller.refusals() == []
    assert talk.count("penstock_request_failures", "m", "1", "cancelled") == 2


@pytest.mark.parametrize("leave", [CallerTalk.vanish, CallerTalk.bye])
def test_what_a_caller_that_leaves_waits_for_counts_as_cancelled(leave: Callable[[CallerTalk], None]) -> None:
    talk, caller, worker = started(8)
    caller.submit(3)
    talk.tick()
    assert worker.got() == []
    worker.done(caller, 1, 2)  # whether it had these results nobody knows
    caller.ack(1)
    caller.cancel(3)
    leave(caller)
    assert talk.count("penstock_request_failures", "m", "1", "cancelled") == 1 + 5 + 3


def test_what_is_cancelled_on_a_worker_is_told_it_at_once() -> None:
    talk, caller, worker = started(3)
    caller.cancel(2)
    talk.tick()
    assert worker.news() == ([], [2])
    assert talk.held == (3, 0)
    worker.done(caller, 2)
    assert talk.held == (2, 0)
    talk.tick()
    talk.tick(0.1)
    assert worker.news() == ([2], [])


def test_a_result_that_is_no_longer_wanted_is_freed() -> None:
    talk, caller, worker = started(1)
    worker.done(caller, 1, size=50)
    caller.cancel(1)
    assert talk.held == (0, 0)
    talk.tick()
    talk.tick(0.1)
    assert worker.news() == ([1], [])


def test_cancelled_requests_make_room_for_others_once_the_worker_has_let_them_go() -> None:
    talk, caller, worker = started(8)
    caller.submit(4)
    caller.cancel(1, 2, 3, 4)
    talk.tick()
    assert worker.got() == []
    worker.done(caller, 1, 2, 3, 4)
    talk.tick()
    assert worker.got() == [9, 10, 11, 12]


# --- deadlines ---


def test_what_waits_past_its_deadline_is_refused() -> None:
    talk = Conversation()
    caller = talk.caller()
    talk.worker()
    caller.submit(timeout_s=1.0)
    talk.tick()
    talk.tick(0.999)
    assert caller.refused() == {}
    talk.tick(0.002)
    [refusal] = caller.refusals()
    assert (refusal.id, refusal.code) == (1, "deadline")
    assert refusal.message == "time was up after 1.001 s in the queue of 'm'"
    assert talk.held == (0, 0)


def test_of_requests_that_came_together_only_the_late_ones_are_refused() -> None:
    talk, caller, worker = pair()
    worker.hear(caller, False)
    caller.submit(4, size=3, timeout_s=[1.0, 9.0, 2.0, 1.0])
    talk.tick()
    talk.tick(1.5)
    assert caller.refused() == {1: "deadline", 4: "deadline"}
    talk.tick(1.0)
    assert caller.refused() == {3: "deadline"}
    worker.hear(caller)
    talk.tick()
    [message] = worker.take(Assign)
    assert ([group.ids for group in message.groups], message.blob) == ([(2,)], bytes([2]) * 3)


def test_a_deadline_that_a_cancelled_request_had_is_nobody_elses() -> None:
    talk = Conversation()
    caller = talk.caller()
    talk.worker()
    caller.submit(2, timeout_s=[1.0, 2.0])
    talk.tick()
    caller.cancel(1)
    talk.tick(1.5)
    assert caller.refused() == {}
    talk.tick(1.0)
    assert caller.refused() == {2: "deadline"}


def test_a_refusal_names_the_lack_of_workers_where_that_is_why() -> None:
    talk, caller, worker = pair()
    worker.vanish()
    caller.submit(timeout_s=1.0)
    talk.tick()
    talk.tick(1.5)
    assert caller.refusals()[0].message.endswith(" s in the queue of 'm', which no worker serves at present")


def test_deadlines_of_what_runs_are_the_workers_business() -> None:
    talk, caller, worker = pair()
    caller.submit(timeout_s=1.0)
    talk.tick()
    talk.tick(5.0)
    assert caller.refused() == {}
    worker.vanish()
    talk.tick()
    assert caller.refused() == {1: "deadline"}


def test_deadlines_are_forgotten_with_their_requests() -> None:
    talk, caller, worker = pair()
    for _ in range(40):
        caller.submit(40)
        caller.submit(40, tenant="t")
        talk.tick(0.01)
        caller.cancel(*range(1, caller.last_id + 1))
        worker.finish(worker.work())
    talk.live(1.0)
    assert talk.held == (0, 0)
    assert len(talk.core.ledger._deadlines) <= 1000


# --- workers that are lost ---


@pytest.mark.parametrize("how", ["done before", "in good order"])
def test_requests_of_a_lost_worker_run_elsewhere(how: str) -> None:
    """Those that it may have died of run alone: see test_suspects.py."""
    talk, caller, worker = started(3)
    other = talk.worker(hears=[caller])
    if how == "done before":
        worker.done(caller, 1, 2, 3, size=100)
        worker.vanish()
    else:
        worker.bye()
    talk.tick()
    assert [(group.ids, group.attempt, group.waited_us > 0) for group in other.work()] == [((1, 2, 3), 2, False)]
    assert talk.count("penstock_retries", "m", "1") == 3
    other.done(caller, 1, 2, 3, attempt=2)
    caller.ack(1, 2, 3)
    assert talk.held == (0, 0)


def test_what_has_waited_once_goes_before_what_came_later() -> None:
    talk, caller, worker = pair()
    for _ in range(3):
        caller.submit()
    talk.tick()
    caller.submit(3)
    other = talk.worker(hears=[caller])
    worker.bye()
    talk.tick()
    assert other.got() == [1, 2, 3, 4, 5, 6]


def test_a_request_is_not_tried_for_ever() -> None:
    talk = Conversation(attempts_max=2)
    caller = talk.caller()
    for attempt in (1, 2):
        worker = talk.worker(hears=[caller])
        if attempt == 1:
            caller.submit(2)
        talk.tick()
        assert [group.attempt for group in worker.work()] == [attempt]
        worker.done(caller, 1, 2, attempt=attempt)  # and the result is lost with it
        worker.vanish()
    talk.tick()
    refusals = caller.refusals()
    assert [(each.id, each.code) for each in refusals] == [(1, "lost"), (2, "lost")]
    assert refusals[0].message == "2 workers were lost while they held the request, one after another"
    assert talk.held == (0, 0)


def test_a_result_that_outlived_its_worker_ends_the_request_wherever_it_is_by_then() -> None:
    talk, caller, worker = started(2)
    worker.done(caller, 1, 2)
    worker.vanish()
    caller.ack(1)  # while it waits again
    assert talk.held == (1, 0)
    other = talk.worker(hears=[caller])
    talk.tick()
    assert other.got() == [2]
    caller.ack(2)  # while it runs again, in vain
    talk.tick()
    assert other.news() == ([2], [2])  # wherever it may be kept
    other.done(caller, 2, attempt=2)
    assert talk.held == (0, 0)


def test_what_nobody_wants_is_not_run_again() -> None:
    talk, caller, worker = started(3)
    caller.cancel(1)
    caller.ack(2)
    worker.vanish()
    other = talk.worker(hears=[caller])
    talk.tick()
    assert other.got() == [3]


def test_a_worker_thought_lost_cannot_end_what_another_has_now() -> None:
    talk, caller, worker = started(1)
    worker.vanish()
    other = talk.worker(hears=[caller])
    talk.tick()
    worker.heard()
    worker.done(caller, 1)
    assert worker.heard() == ["HelloWanted"]
    worker.say(WorkerHello(0, "w", "cpu", 1, (), 1, (model(),)))
    worker.done(caller, 1)
    caller.ack(1)
    assert talk.held == (1, 0)
    other.done(caller, 1, attempt=2)
    assert talk.held == (0, 0)


# --- models that go ---


def test_requests_wait_for_a_worker_that_restarts() -> None:
    talk, caller, worker = pair(unserved_grace_s=3.0)
    worker.vanish()
    talk.live(2.0)
    caller.submit()
    worker = talk.worker(hears=[caller])
    talk.tick()
    assert worker.got() == [1]


def test_requests_do_not_wait_for_ever_for_a_worker() -> None:
    talk, caller, worker = pair(unserved_grace_s=3.0)
    worker.vanish()
    caller.submit()
    talk.live(2.5)
    assert caller.refused() == {}
    talk.live(2.5)
    caller.submit()
    talk.tick()
    refusals = caller.refusals()
    assert [(each.id, each.code, each.message) for each in refusals] == [
        (1, "unavailable", "no worker serves model 'm' at present"),
        (2, "unavailable", "no worker serves model 'm' at present"),
    ]


def test_a_model_that_is_removed_takes_its_queue_along() -> None:
    talk, caller, worker = pair()
    caller.submit(9)
    talk.tick()
    worker.declare(model("other"))
    talk.tick()
    [refusal] = caller.refusals()
    assert (refusal.id, refusal.code) == (9, "unavailable")
    assert refusal.message == "model 'm' was removed while the request waited"
    assert [each.name for each in caller.take(Models)[-1].models] == ["other"]
    worker.done(caller, *range(1, 9))
    caller.ack(*range(1, 9))
    assert talk.held == (0, 0)


def test_what_a_lost_worker_held_of_a_removed_model_is_refused() -> None:
    # Nobody would look at that queue again, until the deadline.
    talk, caller, worker = started(2)
    worker.declare(model("other"))
    worker.vanish()
    talk.tick()
    assert caller.refused() == {1: "unavailable", 2: "unavailable"}
    assert talk.held == (0, 0)


def test_a_model_that_comes_back_begins_anew() -> None:
    talk, caller, worker = started(2)
    worker.declare(model("other"))
    worker.declare(model())
    caller.submit()
    worker.vanish()
    other = talk.worker(hears=[caller])
    talk.tick()
    assert caller.refused() == {1: "unavailable", 2: "unavailable"}
    assert other.got() == [3]


# --- callers that go ---


@pytest.mark.parametrize("says_bye", [True, False])
def test_everything_of_a_caller_goes_with_it(says_bye: bool) -> None:
    talk, caller, worker = pair(queue_requests_max=100)
    other = talk.caller()
    worker.hear(other)
    caller.submit(4)
    talk.tick()
    worker.done(caller, 1, 2, size=100)
    caller.ack(1)
    caller.cancel(3)
    caller.submit(6)
    talk.tick()
    caller.submit(6)
    other.submit(1)
    if says_bye:
        caller.bye()
    else:
        caller.vanish()
    talk.tick()
    # What waited and what was done is forgotten; what runs is not, because the worker has no room yet.
    assert talk.held == (9, 0)
    worker.done(caller, 3, 4, *range(5, 11))
    assert talk.held == (1, 0)
    worker.done(other, 1)
    other.ack(1)
    assert talk.held == (0, 0)


def test_refusals_of_a_caller_that_has_gone_are_not_sent() -> None:
    talk = Conversation()
    caller = talk.caller()
    caller.submit()
    caller.bye()
    talk.tick()
    assert "Refusals" not in caller.heard()


def test_a_draining_broker_still_takes_acknowledgments_and_cancels() -> None:
    talk, caller, worker = started(3)
    talk.handle(Drain())
    worker.done(caller, 1)
    caller.ack(1)
    caller.cancel(2)
    worker.done(caller, 2)
    assert talk.held == (1, 0)
