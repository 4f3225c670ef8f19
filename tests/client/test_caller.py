"""The caller core, as conversations: what the broker and the workers say, and what follows."""

from __future__ import annotations

import gc
import weakref
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest

from penstock.client.events import Event, Hear, OrderDone, Report
from penstock.client.splits import split_of
from penstock.wire.errors import (
    BAD_INPUT,
    DEADLINE,
    INTERNAL,
    NOT_FOUND,
    OVERLOADED,
    UNAVAILABLE,
    PenstockError,
)
from penstock.wire.events import BrokerFound, FromBroker, Garbage, Log, Say, Tick
from penstock.wire.messages import (
    COMPLETE,
    FAILED,
    INLINE_MAX_BYTES,
    MAX_REQUESTS,
    PARTIAL,
    Answers,
    Ask,
    Beat,
    Bye,
    CallerHello,
    Failure,
    Form,
    HelloWanted,
    Metrics,
    Models,
    Order,
    Ordered,
    Refusal,
    Refusals,
    Snapshot,
    Welcome,
    WorkerAddress,
    Workers,
)
from penstock.wire.models import LOADING, READY, ModelState, Route
from penstock.wire.models import UNAVAILABLE as NOT_LOADED

if TYPE_CHECKING:
    from tests.client.conftest import Conversation

MakeForm = Callable[..., Form]
MakeState = Callable[..., ModelState]


# --- requests go out ---


def test_nothing_is_sent_before_welcome(conversation: Conversation, form: MakeForm) -> None:
    number, _ = conversation.submit(form())
    assert conversation.flush() == []
    conversation.join()
    assert conversation.caller.wants_flush(conversation.now)
    [message] = conversation.flush()
    assert (message.epoch, message.groups[0].ids) == (9, (number,))


def test_requests_of_one_flush_share_one_message_and_are_grouped_by_form(joined: Conversation, form: MakeForm) -> None:
    one, other = form("one"), form("other")
    for at, each in enumerate((one, other, one)):
        joined.submit(each, b"payload%d" % at, timeout_s=1.0 + at)
    [message] = joined.flush()
    assert [(group.form, group.ids) for group in message.groups] == [(one, (1, 3)), (other, (2,))]
    assert [group.timeouts_us for group in message.groups] == [(1_000_000, 3_000_000), (2_000_000,)]
    assert message.blob == b"payload0payload2payload1"
    assert joined.flush() != [], "a message may be empty, but a request is sent once"
    assert joined.flush()[0].groups == []


def test_timeouts_are_what_is_left_when_the_message_goes(conversation: Conversation, form: MakeForm) -> None:
    conversation.submit(form(), timeout_s=2.0)
    conversation.pass_time(0.5)
    conversation.join()
    [message] = conversation.flush()
    assert message.groups[0].timeouts_us == (1_500_000,)


def test_large_payload_is_a_frame_of_its_own(joined: Conversation, form: MakeForm) -> None:
    large = b"x" * (INLINE_MAX_BYTES + 1)
    joined.submit(form(nbytes=len(large)), large)
    joined.submit(form(nbytes=INLINE_MAX_BYTES), large[1:])
    [message] = joined.flush()
    assert (message.blob, message.frames) == (large[1:], [large])


def test_more_requests_than_a_message_holds_are_split(joined: Conversation, form: MakeForm) -> None:
    same = form()
    for number in range(MAX_REQUESTS + 1):
        joined.submit(same, b"%8d" % number)
    first, second = joined.flush()
    assert first.groups[0].ids == tuple(range(1, MAX_REQUESTS + 1))
    assert (second.groups[0].ids, second.blob) == ((MAX_REQUESTS + 1,), b"%8d" % MAX_REQUESTS)


def test_more_acknowledgments_and_cancels_than_a_message_holds_are_split(joined: Conversation, form: MakeForm) -> None:
    joined.send(form(), 2 * MAX_REQUESTS + 2)
    joined.answer(*range(1, MAX_REQUESTS + 1))
    joined.answer(MAX_REQUESTS + 1)
    for number in range(MAX_REQUESTS + 2, 2 * MAX_REQUESTS + 3):
        joined.caller.cancel(number)
    first, second = joined.flush()
    assert (first.acks, second.acks) == ((1, MAX_REQUESTS), (MAX_REQUESTS + 1, MAX_REQUESTS + 1))
    assert (len(first.cancels), len(second.cancels)) == (MAX_REQUESTS, 1)


def test_one_request_too_many_is_refused(new_conversation: Callable[..., Conversation], form: MakeForm) -> None:
    conversation = new_conversation(calls_max=2)
    conversation.join()
    conversation.send(form(), 2)
    with pytest.raises(PenstockError, match="2 requests of this process are under way") as refused:
        conversation.submit(form())
    assert (refused.value.code, refused.value.retryable, refused.value.retry_after_s) == (OVERLOADED, True, 1.0)
    conversation.answer(1)
    conversation.submit(form())


# --- results come in ---


def test_results_complete_sinks_with_their_part_of_the_payload(joined: Conversation, form: MakeForm) -> None:
    ends = joined.send(form(), 3)
    joined.answer(3, 1, body=b"how it lies")
    assert (ends[0].payload, ends[2].payload) == (b"   1", b"   3")
    assert ends[1].calls == 0
    [answer] = ends[0].answers
    assert (answer.body, answer.queue_us, answer.worker) == (b"how it lies", 1500, b"a worker")
    assert (answer.batch.rows, answer.batch.reason, answer.batch.compute_us) == (3, "idle", 700)


def test_groups_of_one_message_may_differ_in_size(joined: Conversation, form: MakeForm) -> None:
    ends = joined.send(form(), 5)
    large = [bytes([number]) * (INLINE_MAX_BYTES + 1) for number in range(2)]
    joined.publish(
        (Answers(COMPLETE, 2, b"", 0, (1, 2)), [b"aa", b"bb"]),
        (Answers(COMPLETE, len(large[0]), b"", 0, (4, 5)), large),
        (Answers(COMPLETE, 3, b"", 0, (3,)), [b"ccc"]),
    )
    assert [end.payload for end in ends] == [b"aa", b"bb", b"ccc", *large]


def test_empty_payload_is_a_result(joined: Conversation, form: MakeForm) -> None:
    [end] = joined.send(form(nbytes=8))
    joined.publish((Answers(COMPLETE, 0, b"", 0, (1,)), [b""]))
    assert end.payload == b""


def test_partial_result_does_not_end_a_request(joined: Conversation, form: MakeForm) -> None:
    [end] = joined.send(form())
    joined.answer(1, status=PARTIAL)
    joined.answer(1, status=PARTIAL)
    assert end.calls == 0
    assert joined.acknowledged() == [], "that would end it"
    joined.answer(1)
    assert end.calls == 1
    assert joined.acknowledged() == [1]


def test_failure_ends_with_code_sentence_and_time_to_wait(joined: Conversation, form: MakeForm) -> None:
    ends = joined.send(form(), 2)
    joined.answer_failed(1, 2, code="model_failed", sentence="it divided by zero", after_ms=1500)
    for end in ends:
        assert (end.error.code, end.error.message) == ("model_failed", "it divided by zero")
        assert (end.error.retryable, end.error.retry_after_s) == (False, 1.5)
    assert joined.acknowledged() == [1, 2]


def test_failure_that_cannot_be_read_is_one_all_the_same(joined: Conversation, form: MakeForm) -> None:
    [end] = joined.send(form())
    joined.publish((Answers(FAILED, 0, b"\xc1", 0, (1,)), [b""]))
    assert end.error.code == INTERNAL
    assert end.error.message.startswith("a worker failed, and its reason cannot be read: ")


def test_refusal_ends_a_request_and_is_not_acknowledged(joined: Conversation, form: MakeForm) -> None:
    ends = joined.send(form(), 2)
    joined.refuse(1, code=OVERLOADED, sentence="the queue is full", after_ms=250)
    assert (ends[0].error.code, ends[0].error.message) == (OVERLOADED, "the queue is full")
    assert (ends[0].error.retryable, ends[0].error.retry_after_s) == (True, 0.25)
    assert ends[1].calls == 0
    assert joined.acknowledged() == []


def test_first_terminal_event_wins(joined: Conversation, form: MakeForm) -> None:
    answered, refused, failed = joined.send(form(), 3)
    joined.answer(1)
    joined.refuse(2)
    joined.answer_failed(3, code=BAD_INPUT, sentence="no")
    for _ in range(2):
        joined.answer(1, 2, 3)
        joined.refuse(1, 2, 3)
        joined.answer_failed(1, 2, 3, code=BAD_INPUT, sentence="no")
    assert answered.payload == b"   1"
    assert refused.error.code == OVERLOADED
    assert failed.error.code == BAD_INPUT


def test_nobody_can_end_a_request_that_was_never_sent(joined: Conversation, form: MakeForm) -> None:
    _, end = joined.submit(form())
    joined.answer(1)
    joined.answer_failed(1, code=BAD_INPUT, sentence="no")
    joined.refuse(1)
    assert end.calls == 0
    assert joined.flush()[0].groups[0].ids == (1,)


# --- acknowledgments ---


def test_answers_nobody_waits_for_are_acknowledged(joined: Conversation, form: MakeForm) -> None:
    joined.send(form(), 2)
    joined.refuse(1)
    joined.answer(1)  # the refusal was first
    joined.answer(77)  # of a life before, or never asked for
    assert joined.acknowledged() == [1, 77]


def test_acknowledgments_travel_with_the_next_request(joined: Conversation, form: MakeForm) -> None:
    joined.send(form(), 3)
    joined.answer(2, 1)
    joined.answer(3)
    joined.submit(form())
    [message] = joined.flush()
    assert (message.groups[0].ids, message.acks) == ((4,), (1, 3))
    assert joined.acknowledged() == [], "once"


def test_acknowledgments_wait_only_milliseconds_for_a_request(joined: Conversation, form: MakeForm) -> None:
    joined.send(form(), 3)
    joined.hear(Tick())
    joined.answer(1)
    heard = joined.now
    assert not joined.caller.wants_flush(heard)
    assert heard < joined.caller.due() <= heard + 0.005
    joined.answer(2)  # does not put it off
    joined.now = joined.caller.due()
    assert joined.now <= heard + 0.005
    assert joined.caller.wants_flush(joined.now)
    assert joined.acknowledged() == [1, 2]
    assert not joined.caller.wants_flush(joined.now + 1)


def test_result_that_comes_again_does_not_acknowledge_its_neighbours(joined: Conversation, form: MakeForm) -> None:
    joined.send(form(), 3)
    joined.answer(1)
    joined.answer(1)  # published again, because the subscription was renewed
    joined.answer(3)
    assert joined.acknowledged() == [1, 3]


# --- cancelling ---


def test_cancelled_before_it_was_sent_is_never_sent(joined: Conversation, form: MakeForm) -> None:
    number, end = joined.submit(form())
    kept, _ = joined.submit(form())
    joined.caller.cancel(number)
    [message] = joined.flush()
    assert (message.groups[0].ids, message.cancels) == ((kept,), [])
    assert end.calls == 0


def test_cancelled_after_it_was_sent_is_taken_back(joined: Conversation, form: MakeForm) -> None:
    [end] = joined.send(form())
    joined.caller.cancel(1)
    joined.caller.cancel(1)
    assert joined.caller.wants_flush(joined.now)
    [message] = joined.flush()
    assert message.cancels == [1]
    joined.answer(1)
    assert end.calls == 0
    assert joined.acknowledged() == [1], "it had run already: the worker need not keep it"


def test_cancelling_what_is_unknown_or_over_does_nothing(joined: Conversation, form: MakeForm) -> None:
    [end] = joined.send(form())
    joined.answer(1)
    joined.caller.cancel(1)
    joined.caller.cancel(55)
    assert end.calls == 1
    assert joined.flush()[0].cancels == []


# --- time ---


def test_request_ends_at_its_deadline_although_no_broker_answers(conversation: Conversation, form: MakeForm) -> None:
    _, end = conversation.submit(form(), timeout_s=2.0)
    conversation.pass_time(2.0)
    assert end.calls == 0
    conversation.pass_time(0.4)
    assert (end.error.code, end.error.retryable) == (UNAVAILABLE, True)
    assert end.error.message == (
        "no Penstock broker answered at /run/penstock within 2 s; is 'penstock up' running there, and as the same user?"
    )
    conversation.join()
    assert conversation.flush()[0].groups == [], "it is not sent any more"


def test_what_has_ended_while_there_was_no_broker_is_not_kept(conversation: Conversation, form: MakeForm) -> None:
    ends = [conversation.submit(form(), timeout_s=timeout_s)[1] for timeout_s in (0.5, 60.0)]
    kept = [weakref.ref(end) for end in ends]
    conversation.caller.cancel(2)
    conversation.pass_time(1.0)
    assert ends[0].calls == 1
    del ends
    gc.collect()
    assert [reference() for reference in kept] == [None, None]


def test_what_has_ended_while_the_broker_takes_nothing_is_not_kept(joined: Conversation, form: MakeForm) -> None:
    end = joined.submit(form())[1]
    kept = weakref.ref(end)
    joined.caller.cancel(1)
    del end
    joined.now += 1.0
    joined.hear(Tick())
    gc.collect()
    assert kept() is None


def test_request_ends_at_its_deadline_although_the_broker_is_there(joined: Conversation, form: MakeForm) -> None:
    [end] = joined.send(form(), timeout_s=0.25)
    joined.pass_time(0.25 + 0.4)
    assert (end.error.code, end.error.retryable) == (DEADLINE, False)
    assert end.error.message == "no result for model 'digits' within 0.25 s"


def test_request_whose_time_is_up_is_cancelled_at_the_broker(joined: Conversation, form: MakeForm) -> None:
    joined.send(form(), timeout_s=1.0)
    joined.now += 2.0
    joined.hear(Tick())
    assert joined.caller.wants_flush(joined.now)
    assert joined.flush()[0].cancels == [1]


def test_the_brokers_own_word_on_a_deadline_is_waited_for(joined: Conversation, form: MakeForm) -> None:
    [end] = joined.send(form(), timeout_s=1.0)
    joined.pass_time(1.1)
    joined.refuse(1, code=DEADLINE, sentence="time was up after 1.000 s in the queue of 'digits'")
    assert end.error.message == "time was up after 1.000 s in the queue of 'digits'"


def test_late_request_is_sent_with_the_least_time_there_is(joined: Conversation, form: MakeForm) -> None:
    joined.submit(form(), timeout_s=0.0)
    joined.now += 0.05
    assert joined.flush()[0].groups[0].timeouts_us == (1,)


def test_idle_caller_is_not_due_but_for_its_beat(joined: Conversation, form: MakeForm) -> None:
    joined.send(form(), 1)
    joined.answer(1)
    joined.pass_time(0.5)
    joined.hear(Tick())
    assert joined.caller.due() > joined.now + 0.4


# --- the broker comes and goes ---


def test_local_caller_says_hello_when_it_has_found_a_broker(conversation: Conversation) -> None:
    assert conversation.pass_time(0.5) == []
    conversation.hear(BrokerFound())
    assert conversation.hear(Tick()) == [Say(CallerHello(0, "", 77, True))]


def test_caller_on_another_host_says_hello_until_it_is_welcomed(new_conversation: Callable[..., Conversation]) -> None:
    conversation = new_conversation(local=False, name="gateway")
    said = conversation.pass_time(0.75)
    assert said == [Say(CallerHello(0, "gateway", 77, False))] * 4  # less and less often
    conversation.join()
    assert conversation.caller.name == "caller"
    assert [type(command) for command in conversation.pass_time(0.9)] == [Say]


def test_caller_beats_once_a_second_and_takes_a_silent_broker_for_gone(joined: Conversation, form: MakeForm) -> None:
    [end] = joined.send(form(), timeout_s=60.0)
    said = joined.pass_time(3.5)
    assert said == [Say(Beat(9))] * 4
    joined.broker(Beat(9))
    joined.pass_time(4.9)
    assert joined.flush() != []
    joined.pass_time(1.5)
    assert not joined.caller.membership.joined
    assert end.calls == 0


def test_what_a_lost_broker_had_goes_to_the_next_before_what_is_new(joined: Conversation, form: MakeForm) -> None:
    one, other = form("one"), form("other")
    ends = [joined.submit(each, b"payload%d" % at, timeout_s=10.0)[1] for at, each in enumerate((one, other, one))]
    joined.flush()
    ends += joined.send(one)
    _, new = joined.submit(one, b"payload4", timeout_s=10.0)
    joined.caller.cancel(1)
    joined.answer(4)
    [logged] = joined.lose()
    assert isinstance(logged, Log)
    joined.pass_time(2.0)
    joined.caller.cancel(2)
    assert joined.flush() == []
    joined.join(epoch=10)
    [message] = joined.flush()
    assert (message.epoch, message.cancels, message.blob) == (10, [], b"payload2payload4")
    assert [(group.form, group.ids) for group in message.groups] == [(one, (3, 5))]
    assert message.groups[0].timeouts_us == (8_000_000, 8_000_000)
    joined.answer(3, 5)
    assert [end.calls for end in (*ends, new)] == [0, 0, 1, 1, 1]


def test_more_than_a_message_holds_is_sent_again_in_the_order_of_its_ids(joined: Conversation, form: MakeForm) -> None:
    forms = [form("one"), form("other")]
    for at in range(MAX_REQUESTS + 2):
        joined.submit(forms[at % 2])
    joined.flush()
    joined.lose()
    joined.join(epoch=10)
    sent = [[number for group in message.groups for number in group.ids] for message in joined.flush()]
    assert [sorted(ids) for ids in sent] == [list(range(1, MAX_REQUESTS + 1)), [MAX_REQUESTS + 1, MAX_REQUESTS + 2]]


@pytest.mark.parametrize("failed", [False, True])
def test_a_worker_may_answer_what_no_broker_has(joined: Conversation, form: MakeForm, failed: bool) -> None:
    """It had it from the last one. What was never sent it cannot have had."""
    [sent] = joined.send(form())
    _, waiting = joined.submit(form())
    joined.lose()
    joined.answer(1, 2, status=PARTIAL)
    assert sent.calls == 0
    if failed:
        joined.answer_failed(1, 2, code=BAD_INPUT, sentence="no")
    else:
        joined.answer(1, 2)
    assert (sent.calls, waiting.calls) == (1, 0)
    joined.join(epoch=10)
    [message] = joined.flush()
    assert [group.ids for group in message.groups] == [(2,)]


def test_a_broker_hears_which_ids_workers_may_know(joined: Conversation, form: MakeForm) -> None:
    joined.send(form(), 3)
    joined.submit(form())
    joined.broker(HelloWanted(9))
    assert joined.hear(Tick()) == [Say(CallerHello(0, "", 77, True, 3))]


def test_what_was_sent_ends_at_its_deadline_although_no_other_broker_comes(
    joined: Conversation, form: MakeForm
) -> None:
    [end] = joined.send(form(), timeout_s=2.0)
    joined.lose()
    joined.pass_time(2.0)
    assert end.calls == 0
    joined.pass_time(0.4)
    assert (end.error.code, end.error.retryable) == (UNAVAILABLE, True)
    assert end.error.message == "the broker at /run/penstock went, and no other answered within the request's 2 s"
    joined.join(epoch=10)
    assert joined.flush()[0].groups == []


def test_loss_is_said_once(joined: Conversation) -> None:
    assert len(joined.lose()) == 1
    assert joined.lose() == []


def test_next_broker_is_not_told_of_what_the_last_one_knew(joined: Conversation, form: MakeForm) -> None:
    joined.send(form(), 2)
    joined.answer(1)
    joined.caller.cancel(2)
    joined.lose()
    joined.answer(2)  # a worker that has not noticed yet
    joined.join(epoch=10)
    [message] = joined.flush()
    assert (message.acks, message.cancels) == ((), [])


def test_caller_sleeps_while_there_is_no_broker_though_results_come(joined: Conversation, form: MakeForm) -> None:
    joined.send(form())
    joined.lose()
    joined.answer(1)
    assert not joined.caller.wants_flush(joined.now + 1)
    joined.pass_time(5.0)  # fails if the caller is always due


def test_hello_is_said_again_to_a_broker_that_does_not_know_the_caller(joined: Conversation, form: MakeForm) -> None:
    joined.send(form())
    [logged] = joined.broker(HelloWanted(10))
    assert isinstance(logged, Log)
    assert logged.fields == {"reason": "the broker restarted"}
    assert joined.hear(Tick()) == [Say(CallerHello(0, "", 77, True, 1))]


def test_broker_that_forgot_the_caller_is_sent_again_what_it_had(joined: Conversation, form: MakeForm) -> None:
    [end] = joined.send(form())
    [logged] = joined.broker(HelloWanted(9))
    assert isinstance(logged, Log)
    assert logged.fields == {"reason": "the broker took this process for gone"}
    joined.join(epoch=9)
    assert joined.flush()[0].groups[0].ids == (1,)
    joined.answer(1)
    assert end.calls == 1


def test_several_hellos_wanted_bring_one(joined: Conversation) -> None:
    joined.broker(HelloWanted(10))
    said = joined.hear(Tick())
    joined.broker(HelloWanted(10))
    assert len(said) == 1
    joined.join(epoch=10)
    assert joined.caller.membership.epoch == 10


def test_second_welcome_of_an_epoch_changes_nothing(joined: Conversation, form: MakeForm) -> None:
    [end] = joined.send(form())
    joined.join()
    joined.answer(1)
    assert end.calls == 1
    assert not end.errors


def test_welcome_of_another_epoch_means_that_the_broker_restarted(joined: Conversation, form: MakeForm) -> None:
    joined.send(form())
    joined.join(epoch=10)
    [message] = joined.flush()
    assert (message.epoch, message.groups[0].ids) == (10, (1,))


def test_words_of_another_epoch_are_ignored(joined: Conversation, form: MakeForm, state: MakeState) -> None:
    [end] = joined.send(form())
    joined.broker(Refusals(8, [Refusal(1, OVERLOADED, "full", 0)]))
    joined.broker(Workers(8, [WorkerAddress(b"a worker", "ipc:///w")]))
    joined.broker(Bye(8))
    assert end.calls == 0
    assert joined.caller.models is None
    assert joined.caller.membership.joined


def test_workers_have_names_until_their_last_answers_have_come(joined: Conversation) -> None:
    one, other = b"worker 1", b"worker 2"
    addresses = [WorkerAddress(one, "ipc:///1", 0, "gpu0"), WorkerAddress(other, "ipc:///2", 0, "gpu1")]
    name = joined.caller.worker_name
    assert name(one) == one.hex()
    joined.broker(Workers(9, addresses))
    assert (name(one), name(other)) == ("gpu0", "gpu1")
    joined.broker(Workers(9, addresses[1:]))
    assert (name(one), name(other)) == ("gpu0", "gpu1"), "what it published last may still be on the way"
    joined.broker(Workers(9, addresses[1:]))
    assert (name(one), name(other)) == (one.hex(), "gpu1"), "nor are they kept for ever"


def test_what_a_broker_had_that_says_bye_waits_for_the_next(joined: Conversation, form: MakeForm) -> None:
    [end] = joined.send(form())
    joined.broker(Bye(9))
    assert not joined.caller.membership.joined
    joined.join(epoch=10)
    assert joined.flush()[0].groups[0].ids == (1,)
    assert end.calls == 0


def test_a_broker_does_not_send_what_callers_say(joined: Conversation) -> None:
    with pytest.raises(AssertionError, match="a broker does not send"):
        joined.caller.handle(FromBroker(Ask(9, 1)), joined.now)


def test_unknown_event_is_a_defect(joined: Conversation) -> None:
    nonsense: Any = "nonsense"
    event: Event = nonsense
    with pytest.raises(AssertionError, match="unexpected event 'nonsense'"):
        joined.caller.handle(event, joined.now)


# --- workers, models, metrics ---


def test_workers_are_heard_while_the_broker_lists_them(joined: Conversation) -> None:
    one, other = WorkerAddress(b"worker 1", "ipc:///one"), WorkerAddress(b"worker 2", "ipc:///two")
    assert joined.broker(Workers(9, [one])) == [Hear("ipc:///one", True)]
    assert joined.broker(Workers(9, [one, other])) == [Hear("ipc:///two", True)]
    assert joined.broker(Workers(9, [other, one])) == []
    assert joined.broker(Workers(9, [other])) == [Hear("ipc:///one", False)]
    joined.lose()
    joined.join(epoch=10)
    assert joined.broker(Workers(10, [one])) == [Hear("ipc:///one", True)], "the other may be about to join"
    assert [command for command in joined.live(11) if isinstance(command, Hear)] == [Hear("ipc:///two", False)]


@pytest.mark.parametrize(
    ("name", "version", "code", "sentence"),
    [
        ("nosuch", "", NOT_FOUND, "Request for unknown model: 'nosuch' is not found"),
        ("digits", "7", NOT_FOUND, "Request for unknown model: 'digits' version 7 is not found"),
        ("broken", "", UNAVAILABLE, "model 'broken' is not ready (UNAVAILABLE): it is a test"),
        ("slow", "1", UNAVAILABLE, "model 'slow' is not ready (LOADING): it is a test"),
    ],
)
def test_model_that_cannot_be_asked_is_named(
    joined: Conversation, state: MakeState, name: str, version: str, code: str, sentence: str
) -> None:
    joined.serve(state("digits"), state("broken", "1", NOT_LOADED, False), state("slow", "1", LOADING, False))
    with pytest.raises(PenstockError) as error:
        joined.caller.find(name, version)
    assert (error.value.code, error.value.message) == (code, sentence)


def test_find_before_the_broker_answers_says_where_it_is_looked_for(conversation: Conversation) -> None:
    with pytest.raises(PenstockError, match="no broker answers at /run/penstock yet") as error:
        conversation.caller.find("digits")
    assert (error.value.code, error.value.retry_after_s) == (UNAVAILABLE, 1.0)


def test_find_before_a_worker_has_joined_says_so(joined: Conversation) -> None:
    joined.serve()
    with pytest.raises(PenstockError, match="no worker has joined this server yet; try again shortly") as error:
        joined.caller.find("digits")
    assert error.value.retryable


def test_find_without_a_version_takes_the_newest_that_is_ready(joined: Conversation, state: MakeState) -> None:
    joined.serve(state(version="2"), state(version="10"), state(version="11", state=NOT_LOADED))
    assert joined.caller.find("digits").version == "10"
    assert joined.caller.find("digits", "2").version == "2"
    joined.serve(state(version="2", state=NOT_LOADED), state(version="11", state=NOT_LOADED))
    assert joined.caller.find("digits").version == "11"


def test_find_remembers_until_the_models_change(joined: Conversation, state: MakeState) -> None:
    joined.serve(state(version="1"))
    first = joined.caller.find("digits")
    assert joined.caller.find("digits") is first
    joined.serve(state(version="1"), state(version="2"))
    assert joined.caller.find("digits").version == "2"


def test_what_find_found_in_old_models_is_not_kept_for_the_new(joined: Conversation, state: MakeState) -> None:
    joined.serve(state(version="1"))
    caller = joined.caller
    search = caller._search

    def search_slowly(name: str, version: str) -> Any:
        """As another thread that is overtaken by news."""
        spec = search(name, version)
        caller._told = [state(version="2")]
        caller._set_models({})
        return spec

    caller._search = search_slowly  # type: ignore[method-assign]
    assert caller.find("digits").version == "1"
    caller._search = search  # type: ignore[method-assign]
    assert caller.find("digits").version == "2"


def test_models_of_the_last_broker_can_be_asked_until_their_workers_have_had_time_to_join(
    joined: Conversation, state: MakeState
) -> None:
    joined.serve(state("one"), state("two"))
    joined.lose()
    assert joined.caller.find("two").name == "two"
    joined.join(epoch=10)
    joined.serve(state("one"))
    assert joined.caller.find("two").name == "two"
    assert not joined.caller.is_ready()
    joined.live(9)
    joined.serve(state("one"), state("three"))
    assert joined.caller.models is not None
    assert joined.caller.models.keys() == {"one", "two", "three"}
    joined.live(2)
    assert joined.caller.models.keys() == {"one", "three"}
    assert joined.caller.is_ready()


def test_routes_say_which_version_a_request_means(joined: Conversation, state: MakeState) -> None:
    joined.broker(
        Models(9, (state("m", "1"), state("m", "2")), (Route("m", ("1",), (("canary", "2"),)),), "/srv/models")
    )
    caller = joined.caller
    assert [caller.find("m", each).version for each in ("", "1", "2", "canary")] == ["1", "1", "2", "2"]
    assert caller.repository == "/srv/models"
    with pytest.raises(PenstockError, match="'m' version stable is not found"):
        caller.find("m", "stable")
    joined.broker(Models(9, (state("m", "1"), state("m", "2")), (Route("m", ("2",)),)))
    assert caller.find("m").version == "2"
    joined.broker(Models(9, (state("m", "1"),), (Route("m"),)))
    with pytest.raises(PenstockError, match="unknown model: 'm' is not found"):
        caller.find("m")
    assert caller.find("m", "1").version == "1"


def test_traffic_is_split_and_who_is_sticky_stays(joined: Conversation, state: MakeState) -> None:
    route = Route("m", ("2",), (("canary", "2"),), (("1", 70), ("canary", 30)))
    joined.broker(Models(9, (state("m", "1"), state("m", "2")), (route,)))
    caller = joined.caller
    assert Counter(caller.find("m").version for _ in range(100)) == {"1": 70, "2": 30}
    found = {name: caller.find("m", sticky=name).version for name in map(str, range(50))}
    assert set(found.values()) == {"1", "2"}
    assert {name: caller.find("m", sticky=name).version for name in found} == found
    assert caller.find("m", "1", "0").version == "1"
    joined.broker(Models(9, (state("m", "1", state=LOADING), state("m", "2")), (route,)))
    assert Counter(caller.find("m").version for _ in range(100)) == {"2": 100}


def test_the_part_of_what_is_not_served_goes_to_the_current_version(joined: Conversation, state: MakeState) -> None:
    """However a request is built: its version is picked once, and is one from then on."""
    route = Route("m", ("3",), (), (("1", 50), ("2", 50)))
    states = state("m", "1", state=LOADING), state("m", "2"), state("m", "3")
    joined.broker(Models(9, states, (route,)))
    caller = joined.caller
    assert Counter(caller.find("m", caller.pick("m")).version for _ in range(100)) == {"2": 50, "3": 50}


def test_who_asks_while_models_change_finds_what_was_or_what_is(
    joined: Conversation, state: MakeState, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As another thread does, which may run at any moment."""
    caller, found = joined.caller, []

    def look(route: Route, *rest: Any) -> Any:
        found.append(caller.find("m").version)
        return split_of(route, *rest)

    joined.broker(Models(9, (state("m", "1"),), (Route("m", ("1",)),)))
    monkeypatch.setattr("penstock.client.caller.split_of", look)
    joined.broker(Models(9, (state("m", "2"),), (Route("m", ("2",)),)))
    assert [*found, caller.find("m").version] == ["1", "2"]


def test_orders_end_with_their_answer_or_with_their_broker(joined: Conversation) -> None:
    caller = joined.caller
    first, say = caller.order("load", "m", "{}")
    assert say.message == Order(9, first, "load", "m", "{}")
    second, _ = caller.order("unload", "m")
    assert joined.broker(Ordered(9, first)) == [OrderDone(first, None)]
    assert joined.broker(Ordered(9, first)) == []
    [done] = [command for command in joined.lose() if isinstance(command, OrderDone)]
    assert (done.serial, done.error.code if done.error else "") == (second, UNAVAILABLE)
    joined.join()
    third, _ = caller.order("load", "n")
    [answer] = joined.broker(Ordered(9, third, Failure("not_found", "no such model", 0)))
    assert isinstance(answer, OrderDone)
    assert str(answer.error) == "no such model"


def test_ready_when_a_broker_serves_every_model(conversation: Conversation, state: MakeState) -> None:
    assert not conversation.caller.is_ready()
    conversation.join()
    assert not conversation.caller.is_ready()
    conversation.serve()
    assert not conversation.caller.is_ready()
    conversation.serve(state("one"), state("two", state=LOADING))
    assert not conversation.caller.is_ready()
    conversation.serve(state("one"), state("two", state=READY))
    assert conversation.caller.is_ready()
    conversation.serve(state("one"), state("one", "2", state=LOADING))
    assert conversation.caller.is_ready(), "one version is enough"
    conversation.serve(state("one"), state("one", "2", state=LOADING), state("two", state=LOADING))
    assert not conversation.caller.is_ready()
    assert [each.name for each in conversation.caller.unserved()] == ["two"]
    conversation.lose()
    assert not conversation.caller.is_ready()


def test_metrics_that_were_asked_for_are_reported(joined: Conversation) -> None:
    first, say = joined.caller.ask_metrics()
    assert say == Say(Ask(9, first))
    second, _ = joined.caller.ask_metrics()
    assert second > first
    [report] = joined.broker(Metrics(9, second, [Snapshot("broker", ())]))
    assert isinstance(report, Report)
    assert (report.metrics.serial, report.metrics.snapshots[0].name) == (second, "broker")


def test_garbage_is_counted_by_who_sent_it_and_logged(joined: Conversation) -> None:
    joined.hear(Garbage("worker", "not msgpack"))
    [logged] = joined.hear(Garbage("worker", "not msgpack"))
    joined.hear(Garbage("broker", "no array"))
    assert logged == Log("warning", "bad message dropped", {"process": "worker", "reason": "not msgpack"})
    samples = {sample.labels: sample.value for sample in joined.caller.meters.samples()}
    assert samples == {("worker",): 2, ("broker",): 1}


def test_new_name_comes_with_a_welcome(joined: Conversation) -> None:
    joined.broker(Welcome(9, "gateway-3"))
    assert joined.caller.name == "gateway-3"
