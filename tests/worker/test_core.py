"""A worker's decisions, as conversations: an event goes in, and this is what follows."""

from __future__ import annotations

import itertools
import weakref
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pytest
from onnx import TensorProto, helper

from penstock.wire.errors import BAD_INPUT, DEADLINE, MODEL_FAILED, UNAVAILABLE
from penstock.wire.events import BrokerFound, BrokerLost, Drain, FromBroker, Garbage, Log, Say, Tick
from penstock.wire.membership import BEAT_S, HELLO_AGAIN_S, QUIET_BEAT_S, SILENCE_MAX_S
from penstock.wire.messages import (
    INLINE_MAX_BYTES,
    MAX_PEERS,
    Assign,
    Attached,
    Beat,
    Bye,
    Cost,
    Costs,
    Done,
    Expect,
    Expected,
    Failure,
    Finished,
    Freed,
    HelloWanted,
    Hung,
    Leaving,
    Loads,
    Stuck,
    Tasks,
    Unload,
    Version,
    Wake,
    Welcome,
    WorkerHello,
    WorkerModels,
)
from penstock.wire.models import IDLE, LOADING, READY, Load, ModelState, Route
from penstock.wire.models import UNAVAILABLE as NOT_LOADED
from penstock.worker import core
from penstock.worker.events import (
    Command,
    DeviceLost,
    Discard,
    Followed,
    GiveUp,
    Grown,
    Loaded,
    Order,
    Publish,
    Rested,
    Routed,
    Run,
    Tried,
    Unsubscribed,
    Unwanted,
)
from penstock.worker.execute import Executed, execute
from penstock.worker.model import Model
from penstock.worker.options import MAX_COMPUTE_S

if TYPE_CHECKING:
    from tests.worker.conftest import Request, Requests, Talk, Workshop

    StartTalk = Callable[..., Talk]

A, B = b"caller a", b"caller b"
MS_US = 1000
MINUTE_US = 60_000_000
FLOAT = TensorProto.FLOAT


@pytest.fixture
def row(requests: Requests, double: Model) -> Request:
    """One row for ``double``: [1, 2], so the answer is [2, 4]."""
    return requests.ask(double, {"x": np.array([[1, 2]], np.float32)})


@pytest.fixture
def slow_row(requests: Requests, slow: Model) -> Request:
    return requests.ask(slow, {"x": np.array([[1, 2]], np.float32)})


@pytest.fixture
def index(requests: Requests, lookup: Model) -> Callable[[int], Request]:
    """``index(i)``: a request for ``lookup``, which has four places."""
    return lambda i: requests.ask(lookup, {"i": np.array([i])})


def ids(talk: Talk, commands: list[Command], caller: bytes = A) -> list[int]:
    """Whose answers are published for a caller."""
    return [number for number, _ in talk.heard(commands, caller)]


def told(talk: Talk, commands: list[Command]) -> dict[int, list[list[float]]]:
    """Results that are published for caller a."""
    found = talk.heard(commands, A)
    return {number: answer["y"].tolist() for number, answer in found if not isinstance(answer, Failure)}


def failure(talk: Talk, commands: list[Command], caller: bytes = A) -> Failure:
    """The one that is published for a caller."""
    answers = [answer for _, answer in talk.heard(commands, caller)]
    assert answers
    assert all(answer == answers[0] for answer in answers)
    assert isinstance(answers[0], Failure)
    return answers[0]


def count(talk: Talk, family: str, *labels: str) -> float:
    return talk.core.meters.value(family, *labels).value


# --- joining a broker ---


def test_hello_is_said_when_the_control_connection_is_made(start_talk: StartTalk, double: Model) -> None:
    talk = start_talk(double)
    assert talk.said(talk.wait(), WorkerHello) == []
    [hello] = talk.said(talk.hear(BrokerFound()), WorkerHello)
    assert (hello.epoch, hello.name, hello.device, hello.pid, hello.instances) == (0, "worker", "cpu", 42, 1)
    assert hello.endpoints == ("ipc://results",)
    assert [state.name for state in hello.models] == ["double"]


def test_hello_is_said_again_until_it_is_answered(start_talk: StartTalk) -> None:
    talk = start_talk()
    talk.hear(BrokerFound())
    assert talk.core.due() == pytest.approx(talk.now + HELLO_AGAIN_S)
    assert talk.said(talk.wait(HELLO_AGAIN_S / 2), WorkerHello) == []
    assert len(talk.said(talk.wait(HELLO_AGAIN_S), WorkerHello)) == 1
    commands = talk.join()
    assert talk.logged(commands) == ["joined the broker"]
    assert talk.said(talk.wait(HELLO_AGAIN_S), WorkerHello) == []
    assert talk.logged(talk.join()) == [], "that was the answer to the second"


def test_worker_on_another_host_says_hello_at_once(start_talk: StartTalk) -> None:
    talk = start_talk(local=False)
    assert len(talk.said(talk.wait(), WorkerHello)) == 1


def test_beat_is_said_every_second_and_brings_what_is_kept(talk: Talk, row: Request) -> None:
    talk.assign(A, [1], row)
    talk.finish()
    talk.wait(BEAT_S / 2)
    assert talk.core.due() == pytest.approx(1.0 + QUIET_BEAT_S)
    assert len(talk.said(talk.wait(BEAT_S / 2), Beat)) == 1
    assert count(talk, "penstock_unacknowledged_bytes") == talk.core.kept_bytes > 0
    assert talk.said(talk.wait(BEAT_S / 2), Beat) == []


def test_silent_broker_is_looked_for(talk: Talk) -> None:
    for _ in range(int(SILENCE_MAX_S)):
        talk.wait(1.0)
    talk.tell(Beat(7))
    commands = talk.wait(SILENCE_MAX_S)
    assert "broker silent; looking for it" not in talk.logged(commands)
    commands = talk.wait(0.1)
    assert talk.logged(commands) == ["broker silent; looking for it"]
    assert not talk.core.membership.joined


def test_end_of_the_control_connection_is_the_brokers_death(talk: Talk) -> None:
    commands = talk.hear(BrokerLost("its process ended"))
    assert commands == [Log("warning", "broker gone; looking for it", {"reason": "its process ended"})]
    assert talk.hear(BrokerLost("again")) == []
    assert talk.said(talk.hear(BrokerFound()), WorkerHello)


def test_a_broker_that_said_it_leaves_is_no_warning(talk: Talk) -> None:
    commands = talk.hear(BrokerLost("the broker has shut down", expected=True))
    assert commands == [Log("info", "broker gone; looking for it", {"reason": "the broker has shut down"})]
    assert not talk.core.membership.joined


def test_good_bye_of_the_broker_ends_the_membership(talk: Talk) -> None:
    assert talk.logged(talk.tell(Bye(7))) == ["broker is shutting down"]
    assert not talk.core.membership.joined


def test_broker_that_does_not_know_the_worker_gets_a_hello_at_once(talk: Talk) -> None:
    [hello] = talk.said(talk.tell(HelloWanted(8)), WorkerHello)
    assert hello.epoch == 0
    assert talk.said(talk.tell(HelloWanted(8)), WorkerHello) == []  # one under way will do


def test_messages_of_another_epoch_are_not_heard(talk: Talk, row: Request) -> None:
    tasks = [Tasks(row.form, A, 1, 0, (1,), (1000,))]
    assert talk.tell(Assign(6, tasks, blob=row.payload)) == []
    assert talk.tell(Expect(6, (Expected(B, 1),))) == []
    assert talk.tell(Bye(6)) == []
    assert talk.core.membership.joined


# --- a new epoch ---


def test_new_epoch_drops_what_waits_and_who_is_known_and_what_runs_goes_on(talk: Talk, row: Request) -> None:
    talk.assign(A, [1], row)
    talk.finish()
    talk.assign(A, [2], row)
    talk.assign(A, [3, 4], row)
    kept = talk.core.kept_bytes
    assert kept > 0
    talk.join(8)
    assert [list(index) for index in talk.core._lots.values()] == [[2]]
    assert talk.core.kept_bytes == kept
    commands = talk.expect(A)
    assert talk.said(commands, Attached) == [talk.attached(A)]
    assert ids(talk, commands) == [1]  # it, or its acknowledgment, may have been lost with the old broker
    assert ids(talk, talk.finish()) == [2]
    talk.tell(Assign(8, [], [Freed(A, (1, 2))]))
    assert talk.core.holds_nothing


def test_a_caller_that_neither_the_new_broker_nor_a_subscription_knows_is_gone(talk: Talk, row: Request) -> None:
    talk.assign(A, [1], row)
    talk.finish()
    talk.hear(Unsubscribed(A))
    talk.join(8)
    assert talk.core.holds_nothing
    assert talk.core.kept_bytes == 0


def test_what_runs_is_not_run_twice_when_a_new_broker_gives_it_again(talk: Talk, row: Request) -> None:
    talk.assign(A, [1, 2], row)
    talk.join(8)
    talk.expect(A)
    talk.assign(A, [2, 3], row)
    commands = talk.finish()
    assert ids(talk, commands) == [1, 2]
    assert [(each.attempt, each.ids) for each in talk.done(commands)] == [(1, (1, 2))]
    assert ids(talk, talk.finish()) == [3]
    assert talk.batches == []


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1)])
def test_what_runs_is_done_as_the_attempt_that_the_broker_knows(
    talk: Talk, row: Request, before: int, after: int
) -> None:
    """A broker that lost sight of this worker counts on; a new one begins anew."""
    talk.assign(A, [1], row, attempt=before)
    talk.tell(HelloWanted(7))
    talk.join(7)
    talk.expect(A)
    talk.assign(A, [1], row, attempt=after)
    commands = talk.finish()
    assert ids(talk, commands) == [1]
    assert Finished(A, after, 8, (1,)) in [each._replace(compute_us=0) for each in talk.done(commands)]
    assert talk.batches == []


def test_what_was_answered_before_a_new_broker_came_is_not_run_again(talk: Talk, row: Request) -> None:
    talk.assign(A, [1, 2], row)
    talk.hear(BrokerLost("its process ended"))
    assert ids(talk, talk.finish()) == [1, 2]
    talk.join(8)
    talk.expect(A)
    commands = talk.assign(A, [2, 3], row)
    assert ids(talk, commands) == [1, 2]  # one message
    assert talk.done(commands) == [Finished(A, 1, 0, (2,))]
    assert ids(talk, talk.finish()) == [3]
    assert talk.batches == []


def test_what_runs_for_a_caller_that_went_and_came_back_is_not_run_again(talk: Talk, row: Request) -> None:
    talk.assign(A, [1], row)
    talk.assign(A, [2], row)
    assert talk.done(talk.expect(gone=[A])) == [Finished(A, 1, 0, (2,))]
    talk.expect(A)
    talk.assign(A, [1, 2], row)
    for number in 1, 2:
        commands = talk.finish()
        assert ids(talk, commands) == [number]
        assert [each.ids for each in talk.done(commands)] == [(number,)]
    assert talk.batches == []


def test_done_is_not_said_to_nobody(talk: Talk, row: Request) -> None:
    talk.assign(A, [1], row)
    talk.hear(BrokerLost("its process ended"))
    commands = talk.finish()
    assert talk.said(commands, Done) == []
    assert ids(talk, commands) == [1]  # its caller may still hear it


# --- who hears ---


def test_attached_is_said_when_an_expected_caller_subscribes(start_talk: StartTalk) -> None:
    talk = start_talk()
    talk.join()
    assert talk.expect(A, B) == []
    assert talk.subscribe(A) == [Say(talk.attached(A))]


def test_attached_is_said_when_a_caller_that_subscribed_is_expected(start_talk: StartTalk) -> None:
    talk = start_talk()
    talk.join()
    assert talk.subscribe(A) == []
    assert talk.expect(B, A) == [Say(talk.attached(A))]


def test_caller_is_detached_when_its_last_connection_ends(talk: Talk) -> None:
    talk.subscribe(A)
    assert talk.hear(Unsubscribed(A)) == []
    assert talk.hear(Unsubscribed(A)) == [Say(talk.attached(A, False))]
    assert talk.hear(Unsubscribed(A)) == []


def test_end_of_a_subscription_that_nobody_expected_is_not_told(talk: Talk) -> None:
    talk.subscribe(B)
    assert talk.hear(Unsubscribed(B)) == []
    assert talk.hear(Unsubscribed(b"stranger")) == []


def test_room_for_topics_is_bounded(talk: Talk) -> None:
    for number in range(MAX_PEERS - 1):
        talk.core._subscriptions[number.to_bytes(8, "big")] = 1
    assert talk.core.may_subscribe(A)
    assert not talk.core.may_subscribe(B)


def test_what_is_not_acknowledged_is_published_on_every_subscription(talk: Talk, row: Request) -> None:
    talk.assign(A, [1, 2], row)
    talk.finish()
    talk.assign(A, [3], row)
    talk.finish()
    assert ids(talk, talk.subscribe(A)) == [1, 2, 3]
    talk.free(A, 1, 1)
    assert ids(talk, talk.subscribe(A)) == [1, 2, 3]  # 1 and 2 are one message
    talk.free(A, 2, 2)
    assert ids(talk, talk.subscribe(A)) == [3]
    talk.free(A, 3, 3)
    assert ids(talk, talk.subscribe(A)) == []


def test_message_is_published_again_as_it_was(talk: Talk, row: Request) -> None:
    talk.assign(A, [1, 2], row)
    [first] = [command for command in talk.finish() if isinstance(command, Publish)]
    commands = talk.subscribe(A)
    assert [command for command in commands if isinstance(command, Publish)] == [first]


def test_what_is_not_acknowledged_for_long_is_published_again_ever_less_often(talk: Talk, row: Request) -> None:
    """A full queue drops a message, and no connection ends."""
    talk.assign(A, [1, 2], row)
    talk.finish()
    said = {beat: ids(talk, talk.wait(BEAT_S)) for beat in range(1, 5)}
    assert said == {1: [], 2: [1, 2], 3: [], 4: [1, 2]}
    talk.free(A, 1, 2)
    assert [ids(talk, talk.wait(BEAT_S)) for _ in range(4)] == [[]] * 4


def test_what_nobody_would_hear_is_not_published_again(start_talk: StartTalk, double: Model, row: Request) -> None:
    talk = start_talk(double)
    talk.join()
    talk.expect(A)
    talk.assign(A, [1], row)
    talk.finish()
    assert [ids(talk, talk.wait(BEAT_S)) for _ in range(4)] == [[]] * 4
    assert ids(talk, talk.subscribe(A)) == [1]


def test_slow_joiner_gets_what_was_published_before_it_heard(
    start_talk: StartTalk, double: Model, row: Request
) -> None:
    talk = start_talk(double)
    talk.join()
    talk.expect(A)
    talk.assign(A, [1], row)
    talk.finish()
    assert ids(talk, talk.subscribe(A)) == [1]


# --- requests ---


def test_request_is_run_published_and_done(talk: Talk, row: Request) -> None:
    assert talk.said(talk.assign(A, [5], row), Done) == []
    [run] = talk.batches
    assert (run.batch.model, run.batch.rows, run.batch.reason) == (("double", "1"), 1, "idle")
    commands = talk.finish()
    [(number, answer)] = talk.heard(commands, A)
    assert number == 5
    assert not isinstance(answer, Failure)
    assert answer["y"].tolist() == [[2, 4]]
    assert talk.done(commands) == [Finished(A, 1, 8, (5,))]


def test_result_is_published_before_it_is_called_done(talk: Talk, row: Request) -> None:
    """So that an acknowledgment, which follows the result, finds it here."""
    talk.assign(A, [5], row)
    kinds = [type(command).__name__ for command in talk.finish()]
    assert kinds.index("Publish") < kinds.index("Say")


def test_done_tells_attempt_and_bytes_of_each_result(talk: Talk, requests: Requests, double: Model) -> None:
    wide = requests.ask(double, {"x": np.ones((2, INLINE_MAX_BYTES), np.float32)})
    talk.assign(A, [1, 2], wide, attempt=3)
    assert talk.done(talk.finish()) == [Finished(A, 3, 2 * 4 * INLINE_MAX_BYTES, (1,))]
    assert talk.done(talk.finish()) == [Finished(A, 3, 2 * 4 * INLINE_MAX_BYTES, (2,))]


def test_requests_that_come_while_an_instance_runs_make_the_next_batch(talk: Talk, row: Request) -> None:
    talk.assign(A, [1], row)
    talk.assign(A, [2, 3], row)
    talk.expect(B)
    talk.assign(B, [1], row)
    assert len(talk.batches) == 1
    talk.finish()
    [run] = talk.batches
    assert run.batch.rows == 3
    commands = talk.finish()
    assert (ids(talk, commands, A), ids(talk, commands, B)) == ([2, 3], [1])
    assert talk.done(commands) == [Finished(A, 1, 8, (2, 3)), Finished(B, 1, 8, (1,))]


def test_every_instance_gets_a_batch(start_talk: StartTalk, double: Model, lookup: Model, row: Request) -> None:
    talk = start_talk(double, lookup, instances=2)
    talk.join()
    talk.expect(A)
    talk.assign(A, [1], row)
    talk.assign(A, [2], row)
    assert len(talk.batches) == 1  # the model itself has one instance
    talk.assign(A, [3], talk.requests.ask(lookup, {"i": np.array([3])}))
    assert [run.batch.model[0] for run in talk.batches] == ["double", "lookup"]


def test_large_payloads_come_and_go_as_frames(talk: Talk, requests: Requests, double: Model) -> None:
    x = np.arange(INLINE_MAX_BYTES, dtype=np.float32)[None]
    talk.assign(A, [1, 2], requests.ask(double, {"x": x}))
    commands = talk.finish()
    for _, answer in talk.heard(commands, A):
        assert not isinstance(answer, Failure)
        np.testing.assert_array_equal(answer["y"], x * 2)
    assert ids(talk, commands) == [1, 2]


def test_several_groups_of_one_message_find_their_payloads(talk: Talk, requests: Requests, double: Model) -> None:
    widths = (2, 5000, 3, 2, 6000)
    asked = [requests.ask(double, {"x": np.full((1, width), width, np.float32)}) for width in widths]
    groups = [Tasks(each.form, A, 1, 0, (number,), (10**7,)) for number, each in enumerate(asked)]
    blob = b"".join(each.payload for each in asked if each.form.nbytes <= INLINE_MAX_BYTES)
    frames = [each.payload for each in asked if each.form.nbytes > INLINE_MAX_BYTES]
    assert (len(blob), len(frames)) == (4 * (2 + 3 + 2), 2)
    commands = talk.tell(Assign(7, groups, blob=blob, frames=frames), frames=frames)
    while talk.batches:
        commands += talk.finish()
    for number, answer in talk.heard(commands, A):
        assert not isinstance(answer, Failure)
        assert answer["y"].tolist() == [[2.0 * widths[number]] * widths[number]]
    assert sorted(ids(talk, commands)) == [0, 1, 2, 3, 4]


def test_batch_waits_for_more_as_long_as_its_model_allows(talk: Talk, slow_row: Request) -> None:
    talk.assign(A, [1], slow_row)
    assert talk.batches == []
    assert talk.core.due() == pytest.approx(talk.now + 0.010)
    talk.assign(A, [2], slow_row)
    talk.wait(0.010)
    [run] = talk.batches
    assert (run.batch.rows, run.batch.reason) == (2, "delay")
    assert talk.core.due() == pytest.approx(1.0 + QUIET_BEAT_S)


def test_time_alone_changes_nothing_while_every_instance_runs(talk: Talk, slow_row: Request, row: Request) -> None:
    talk.assign(A, [1], row)
    talk.assign(A, [2], slow_row)
    assert talk.core.due() > talk.now + 0.5
    talk.wait(0.020)
    assert len(talk.batches) == 1
    talk.finish()
    assert [run.batch.reason for run in talk.batches] == ["delay"]


def test_model_that_fails_is_its_requests_answer(
    start_talk: StartTalk, lookup: Model, index: Callable[[int], Request]
) -> None:
    talk = start_talk(lookup)
    talk.join()
    talk.expect(A)
    talk.assign(A, [1], index(9))
    commands = talk.finish()
    assert failure(talk, commands).code == MODEL_FAILED
    assert talk.done(commands) == [Finished(A, 1, 0, (1,))]
    assert talk.logged(commands) == ["request failed"]
    assert count(talk, "penstock_request_failures", "lookup", "1", MODEL_FAILED) == 1


def test_failure_among_others_splits_what_came_together(
    start_talk: StartTalk, lookup: Model, index: Callable[[int], Request]
) -> None:
    talk = start_talk(lookup)
    talk.join()
    talk.expect(A)
    form = index(0).form
    payloads = b"".join(index(i).payload for i in (0, 9, 2))
    talk.tell(Assign(7, [Tasks(form, A, 1, 0, (1, 2, 3), (10**7,) * 3)], blob=payloads))
    commands = talk.finish()
    answers = dict(talk.heard(commands, A))
    assert [isinstance(answers[number], Failure) for number in (1, 2, 3)] == [False, True, False]
    assert [(each.nbytes, each.ids) for each in talk.done(commands)] == [(4, (1,)), (0, (2,)), (4, (3,))]


# --- results that are kept ---


def test_kept_bytes_are_those_of_messages_with_answers_left(talk: Talk, row: Request) -> None:
    sizes = []
    for numbers in ([1, 2], [4, 5, 6]):
        talk.assign(A, numbers, row)
        [published] = [command for command in talk.finish() if isinstance(command, Publish)]
        sizes.append(len(published.head) + sum(map(len, published.frames)))
    assert talk.core.kept_bytes == sum(sizes)
    talk.free(A, 2, 4)
    assert talk.core.kept_bytes == sum(sizes)
    talk.free(A, 1, 1)
    assert talk.core.kept_bytes == sizes[1]
    assert not talk.core.holds_nothing
    talk.free(A, 5, 6)
    assert talk.core.kept_bytes == 0
    assert talk.core.holds_nothing


def test_frames_count_as_kept(talk: Talk, requests: Requests, double: Model) -> None:
    talk.assign(A, [1], requests.ask(double, {"x": np.ones((1, INLINE_MAX_BYTES), np.float32)}))
    talk.finish()
    assert 4 * INLINE_MAX_BYTES < talk.core.kept_bytes < 4 * INLINE_MAX_BYTES + 500


@pytest.mark.parametrize("ranges", [(1, 3, 5, 5), (0, 1000), (0, 2**64 - 1), (1, 1, 2, 2, 3, 3, 5, 5)])
def test_results_are_freed_by_ranges(talk: Talk, row: Request, ranges: tuple[int, ...]) -> None:
    talk.assign(A, [1, 2, 3], row)
    talk.finish()
    talk.assign(A, [5], row)
    talk.finish()
    talk.free(A, *ranges)
    assert talk.core.holds_nothing


def test_freeing_what_is_not_kept_changes_nothing(talk: Talk, row: Request) -> None:
    talk.assign(A, [1], row)
    assert talk.free(A, 1, 9) == []  # it runs
    assert talk.free(B, 0, 2**64 - 1) == []
    talk.finish()
    talk.free(A, 2, 9)
    assert not talk.core.holds_nothing
    talk.free(A, 1, 1)
    talk.free(A, 1, 1)
    assert talk.core.holds_nothing


# --- cancels, and callers that go ---


def test_request_that_waits_is_cancelled_and_done(talk: Talk, row: Request) -> None:
    talk.assign(A, [1], row)
    talk.assign(A, [2, 3, 4], row)
    commands = talk.cancel(A, 3, 3)
    assert talk.done(commands) == [Finished(A, 1, 0, (3,))]
    assert talk.heard(commands, A) == []
    talk.finish()
    assert ids(talk, talk.finish()) == [2, 4]


def test_whole_lot_that_waits_is_cancelled(talk: Talk, row: Request) -> None:
    talk.assign(A, [1], row)
    talk.assign(A, [2, 3], row)
    talk.assign(A, [4], row, attempt=2)
    commands = talk.cancel(A, 2, 4)
    assert talk.done(commands) == [Finished(A, 1, 0, (2, 3)), Finished(A, 2, 0, (4,))]
    talk.finish()
    assert talk.batches == []


def test_request_that_runs_is_finished_all_the_same(talk: Talk, row: Request) -> None:
    talk.assign(A, [1, 2], row)
    assert talk.cancel(A, 1, 1) == []
    commands = talk.finish()
    assert ids(talk, commands) == [1, 2]
    assert talk.done(commands) == [Finished(A, 1, 8, (1, 2))]


def test_cancel_of_what_is_not_here_changes_nothing(talk: Talk, row: Request) -> None:
    talk.assign(A, [1], row)
    talk.finish()
    assert talk.cancel(A, 0, 2**64 - 1) == []
    assert talk.cancel(B, 1, 1) == []


def test_work_freed_and_cancelled_come_in_one_message(talk: Talk, row: Request) -> None:
    talk.assign(A, [1], row)
    talk.finish()
    talk.assign(A, [2], row)
    talk.assign(A, [3], row)
    tasks = [Tasks(row.form, A, 1, 0, (4,), (10**7,))]
    commands = talk.tell(Assign(7, tasks, [Freed(A, (1, 1))], [Freed(A, (3, 3))], blob=row.payload))
    assert talk.done(commands) == [Finished(A, 1, 0, (3,))]
    talk.finish()
    assert ids(talk, talk.finish()) == [4]


def test_caller_that_has_gone_is_forgotten(talk: Talk, row: Request) -> None:
    talk.assign(A, [1], row)
    talk.finish()
    talk.assign(A, [2], row)
    talk.assign(A, [3], row)
    commands = talk.expect(gone=[A])
    assert talk.done(commands) == [Finished(A, 1, 0, (3,))]
    assert talk.core.kept_bytes > 0  # it may have been stopped, and read on when it is continued
    talk.hear(Unsubscribed(A))
    assert talk.core.kept_bytes == 0
    commands = talk.finish()  # what ran goes to nobody, and the broker hears that it is over
    assert talk.heard(commands, A) == []
    assert talk.done(commands) == [Finished(A, 1, 8, (2,))]
    assert talk.core.holds_nothing


def test_caller_that_nobody_knows_may_be_gone(talk: Talk) -> None:
    assert talk.expect(gone=[B]) == []


def test_a_caller_that_comes_back_is_told_again_what_it_may_have_missed(talk: Talk, row: Request) -> None:
    talk.assign(A, [1], row)
    talk.finish()
    talk.expect(gone=[A])
    assert ids(talk, talk.expect(A)) == [1]


def test_what_was_answered_before_is_not_run_again(talk: Talk, row: Request) -> None:
    """The broker took this worker for lost, and gives it what it has done already; its caller may be reading that."""
    talk.assign(A, [1, 2], row)
    talk.finish()
    talk.tell(HelloWanted(7))
    talk.join(7)
    talk.expect(A)
    commands = talk.assign(A, [2, 3], row, attempt=2)
    assert ids(talk, commands) == [1, 2]  # one message
    assert talk.done(commands) == [Finished(A, 2, 0, (2,))]
    [run] = talk.batches
    assert [lot.ids for lot in run.batch.lots] == [(3,)]
    assert ids(talk, talk.finish()) == [3]
    assert talk.done(talk.assign(A, [1], row, attempt=2)) == [Finished(A, 2, 0, (1,))]


@pytest.mark.parametrize("again", [[1], [2, 1], [1, 2, 3]])
def test_what_waits_or_runs_is_not_taken_a_second_time(talk: Talk, row: Request, again: list[int]) -> None:
    """Whoever says that, be it no broker of ours."""
    talk.assign(A, [1, 2], row)
    talk.assign(A, [3], row)
    talk.assign(A, again, row)
    assert ids(talk, talk.finish()) == [1, 2]
    assert ids(talk, talk.finish()) == [3]


def test_a_request_that_stands_twice_in_what_is_assigned_is_not_taken(talk: Talk, row: Request) -> None:
    said = talk.logged(talk.assign(A, [1, 1], row))
    assert said == ["a request was assigned twice in one message; it is ignored"]
    assert talk.batches == []
    talk.assign(A, [1], row)
    assert ids(talk, talk.finish()) == [1]


def test_what_was_answered_is_not_run_again_whatever_the_attempt(talk: Talk, row: Request) -> None:
    talk.assign(A, [1], row)
    talk.finish()
    assert ids(talk, talk.assign(A, [1], row)) == [1]
    assert talk.batches == []


def test_what_was_answered_keeps_its_answer_whatever_is_assigned_under_its_id(talk: Talk, row: Request) -> None:
    talk.assign(A, [1, 2], row)
    talk.finish()
    talk.assign(A, [1, 2], row._replace(form=row.form._replace(rows=2)))
    answers = talk.heard(talk.subscribe(A), A)
    assert [number for number, _ in answers] == [1, 2]
    assert not [answer for _, answer in answers if isinstance(answer, Failure)]
    talk.free(A, 1, 2)
    assert talk.core.holds_nothing
    assert talk.core.kept_bytes == 0


def test_others_keep_theirs_when_a_caller_goes(talk: Talk, row: Request) -> None:
    talk.expect(B)
    for caller in A, B:
        talk.assign(caller, [1], row)
        talk.finish()
    talk.expect(gone=[A])
    assert ids(talk, talk.subscribe(B), B) == [1]


# --- deadlines ---


def test_request_whose_time_is_up_is_answered_without_running(talk: Talk, row: Request) -> None:
    talk.assign(A, [1], row)
    talk.assign(A, [2], row, timeouts_us=[5 * MS_US])
    commands = talk.finish(after=0.006)
    assert talk.batches == []
    answer = dict(talk.heard(commands, A))[2]
    assert isinstance(answer, Failure)
    assert (answer.code, answer.message) == (
        DEADLINE,
        "time was up before the request's batch on 'double' began",
    )
    assert talk.done(commands) == [Finished(A, 1, 8, (1,)), Finished(A, 1, 0, (2,))]
    assert count(talk, "penstock_request_failures", "double", "1", DEADLINE) == 1


def test_request_that_comes_too_late_already_is_answered_at_once(talk: Talk, row: Request) -> None:
    commands = talk.assign(A, [1, 2], row, timeouts_us=[0, 0])
    assert failure(talk, commands).code == DEADLINE
    assert ids(talk, commands) == [1, 2]
    assert talk.batches == []
    assert ids(talk, talk.assign(A, [3], row)) == []
    assert len(talk.batches) == 1  # the instance is free


def test_only_those_whose_time_is_up_leave_their_batch(talk: Talk, row: Request) -> None:
    talk.assign(A, [1], row)
    talk.assign(A, [2, 3, 4], row, timeouts_us=[60 * MS_US, 5 * MS_US, 60 * MS_US])
    talk.assign(A, [5], row, timeouts_us=[5 * MS_US])
    commands = talk.finish(after=0.010)
    late = {number for number, answer in talk.heard(commands, A) if isinstance(answer, Failure)}
    assert late == {3, 5}
    [run] = talk.batches
    assert run.batch.rows == 2
    commands = talk.finish()
    assert ids(talk, commands) == [2, 4]
    assert [about.rows for about in talk.about(commands)] == [2]


def test_answer_that_says_too_late_is_kept_until_acknowledged(talk: Talk, row: Request) -> None:
    talk.assign(A, [1], row, timeouts_us=[0])
    assert failure(talk, talk.subscribe(A)).code == DEADLINE
    talk.free(A, 1, 1)
    assert talk.core.holds_nothing


def test_waiting_in_the_worker_counts_from_the_brokers_acceptance(talk: Talk, row: Request) -> None:
    tasks = [Tasks(row.form, A, 1, 2_000_000, (2,), (5 * MS_US,))]
    talk.assign(A, [1], row)
    talk.tell(Assign(7, tasks, blob=row.payload))
    [published] = [command for command in talk.finish(after=0.250) if isinstance(command, Publish)][1:]
    message = talk.requests.unpack(published.head, published.frames)
    assert message.groups[0].queue_us == pytest.approx(2_250_000, abs=2)


# --- what batches take ---


def ended(run: Run, seconds: float) -> Executed:
    """A batch that took so long, whatever it took."""
    return replace(execute(run.model, run.batch), compute_s=seconds)


def finish(talk: Talk, seconds: float) -> list[Command]:
    """The first batch ends after so long."""
    run = talk.batches.pop(0)
    return talk.hear(ended(run, seconds), seconds)


def costs(talk: Talk, commands: list[Command]) -> dict[str, Cost]:
    """What is said of what models take, by their names."""
    return {cost.model: cost for message in talk.said(commands, Costs) for cost in message.costs}


@pytest.fixture
def steady(workshop: Workshop) -> Model:
    """As ``double``, and was warmed up: 10 ms, and 1 ms for each row."""
    model = workshop.unary("Neg", FLOAT, ["N", "M"], name="steady", max_batch_size=8, weight=2.5)
    model.warm_s = {rows: 0.010 + 0.001 * rows for rows in (1, 2, 4, 8)}
    return model


@pytest.fixture
def steady_row(requests: Requests, steady: Model) -> Request:
    return requests.ask(steady, {"x": np.array([[1, 2]], np.float32)})


@pytest.fixture
def warm(start_talk: StartTalk, steady: Model, double: Model) -> Talk:
    talk = start_talk(steady, double)
    talk.join()
    talk.expect(A)
    return talk


def test_broker_that_welcomes_a_worker_is_told_what_its_models_take(
    start_talk: StartTalk, steady: Model, double: Model
) -> None:
    talk = start_talk(steady, double)
    for epoch in 7, 8:
        told = costs(talk, talk.join(epoch))
        assert told["steady"] == Cost("steady", "1", 1, 8, 2500, (1, 2, 4, 8), (11_000, 12_000, 14_000, 18_000))
        assert told["double"] == Cost("double", "1", 1, 8, 1000, (), ())  # it was not warmed up


def test_broker_is_told_of_a_model_that_is_loaded_later(start_talk: StartTalk, steady: Model, double: Model) -> None:
    talk = start_talk(double)
    talk.join()
    talk.wait(0.1)
    commands = talk.load(steady)
    assert costs(talk, commands).keys() == {"steady"}
    kinds = [type(command.message) for command in commands if isinstance(command, Say)]
    assert kinds.index(WorkerModels) < kinds.index(Costs), "it is known by then"


def test_first_batch_of_a_model_that_was_not_warmed_up_is_told(warm: Talk, row: Request) -> None:
    warm.assign(A, [1], row)
    told = costs(warm, finish(warm, 0.020))
    assert told["double"].times_us == (20_000, 40_000, 80_000, 160_000)
    assert "steady" not in told


def test_change_is_told_with_what_is_done_at_most_ten_times_a_second(warm: Talk, steady_row: Request) -> None:
    told = []
    for number in range(40):
        warm.assign(A, [number], steady_row)
        commands = finish(warm, 0.044)  # four times as long
        assert not warm.said(commands, Costs) or warm.said(commands, Done)
        if costs(warm, commands):
            told.append((warm.now, costs(warm, commands)["steady"]))
    assert 2 <= len(told) <= 8
    assert all(later - sooner >= 0.1 for (sooner, _), (later, _) in itertools.pairwise(told))
    assert told[-1][1].times_us[0] == pytest.approx(44_000, rel=0.11)
    assert told[-1][1].times_us[3] == pytest.approx(72_000, rel=0.2), "larger batches with it"


def test_what_does_not_change_is_not_told_again(warm: Talk, steady_row: Request) -> None:
    for number in range(40):
        warm.assign(A, [number], steady_row)
        assert not costs(warm, finish(warm, 0.0105))


def test_last_change_is_told_with_a_beat_when_nothing_follows(warm: Talk, steady_row: Request) -> None:
    for number in range(4):
        warm.assign(A, [number], steady_row)
        assert not costs(warm, finish(warm, 0.022))
    assert costs(warm, warm.wait(QUIET_BEAT_S))["steady"].times_us[0] > 16_000
    assert not costs(warm, warm.wait(QUIET_BEAT_S))


def test_batch_in_which_something_failed_teaches_nothing(
    start_talk: StartTalk, lookup: Model, index: Callable[[int], Request]
) -> None:
    """What failed together is run again one by one, which takes much longer."""
    talk = start_talk(lookup)
    talk.join()
    talk.expect(A)
    talk.assign(A, [1], index(9))
    assert not costs(talk, finish(talk, 1.0))
    assert not costs(talk, talk.wait(QUIET_BEAT_S))


def test_requests_are_charged_for_their_rows_share_of_the_batch(talk: Talk, requests: Requests, double: Model) -> None:
    talk.assign(A, [1], requests.ask(double, {"x": np.ones((1, 2), np.float32)}))
    talk.finish()
    talk.expect(B)
    talk.assign(A, [0], requests.ask(double, {"x": np.ones((1, 2), np.float32)}))
    talk.assign(A, [2, 3], requests.ask(double, {"x": np.ones((3, 2), np.float32)}))
    talk.assign(B, [1], requests.ask(double, {"x": np.ones((2, 2), np.float32)}))
    talk.finish()
    commands = finish(talk, 0.008)
    [done] = talk.said(commands, Done)
    assert {(each.caller, each.ids): each.compute_us for each in done.done} == {(A, (2, 3)): 6000, (B, (1,)): 2000}


def test_what_did_not_run_is_charged_nothing(talk: Talk, row: Request) -> None:
    talk.assign(A, [1], row)
    talk.assign(A, [2, 3], row, timeouts_us=[0, MINUTE_US])
    [cancelled] = talk.said(talk.cancel(A, 3, 3), Done)
    [done] = talk.said(finish(talk, 0.001), Done)
    assert [each.compute_us for each in (*cancelled.done, *done.done)] == [0, 1000, 0]


def test_request_that_cannot_end_in_time_is_answered_before_it_runs(warm: Talk, steady_row: Request) -> None:
    warm.assign(A, [1], steady_row)
    warm.assign(A, [2, 3], steady_row, timeouts_us=[20 * MS_US, MINUTE_US])
    commands = finish(warm, 0.011)  # 9 ms are left for a batch that takes 12
    answer = dict(warm.heard(commands, A))[2]
    assert isinstance(answer, Failure)
    assert (answer.code, answer.message) == (
        DEADLINE,
        "time was up before the request's batch on 'steady' could have ended",
    )
    assert Finished(A, 1, 0, (2,)) in warm.done(commands)
    assert [lot.ids for lot in warm.batches[0].batch.lots] == [(3,)]


def test_request_that_can_just_end_in_time_is_run(warm: Talk, steady_row: Request) -> None:
    """With some doubt: nine tenths of what its batch is expected to take are enough."""
    warm.assign(A, [1], steady_row)
    warm.assign(A, [2], steady_row, timeouts_us=[21 * MS_US + 100])
    commands = finish(warm, 0.011)
    assert ids(warm, commands) == [1]
    assert [lot.ids for lot in warm.batches[0].batch.lots] == [(2,)]


def test_worker_that_was_slow_for_a_moment_does_not_refuse_for_ever(warm: Talk, steady_row: Request) -> None:
    for number in range(10):
        warm.assign(A, [number], steady_row)
        finish(warm, 5.0)
    assert failure(warm, warm.assign(A, [20], steady_row, timeouts_us=[100 * MS_US])).code == DEADLINE
    warm.wait(60.0)
    warm.tell(Beat(warm.epoch))
    assert ids(warm, warm.assign(A, [21], steady_row, timeouts_us=[100 * MS_US])) == []
    assert len(warm.batches) == 1


def test_size_that_is_picked_for_a_target_is_told_and_kept(start_talk: StartTalk, workshop: Workshop) -> None:
    """A batch of eight takes 18 ms, of five 15, and may take 15.5."""
    model = workshop.unary("Neg", FLOAT, ["N", "M"], name="tuned", max_batch_size=8, latency_target="31ms")
    model.warm_s = {rows: 0.010 + 0.001 * rows for rows in (1, 2, 4, 8)}
    talk = start_talk(model)
    assert costs(talk, talk.join())["tuned"].batch_rows == 5
    talk.expect(A)
    talk.assign(A, list(range(12)), talk.requests.ask(model, {"x": np.ones((1, 2), np.float32)}))
    assert talk.batches[0].batch.rows == 5
    while talk.batches:
        finish(talk, 2 * (0.010 + 0.001 * talk.batches[0].batch.rows))  # twice as long
    assert costs(talk, talk.wait(QUIET_BEAT_S))["tuned"].batch_rows < 5
    assert count(talk, "penstock_batch_rows_max", "tuned", "1") < 5


def test_preferred_sizes_are_told_as_steps(start_talk: StartTalk, workshop: Workshop) -> None:
    model = workshop.unary("Neg", FLOAT, ["N", "M"], name="fixed", preferred_batch_sizes=(4, 8))
    model.warm_s = {4: 0.004, 8: 0.006}
    talk = start_talk(model)
    told = costs(talk, talk.join())["fixed"]
    assert (told.batch_rows, told.rows, told.times_us) == (8, (1, 4, 5, 8), (4000, 4000, 6000, 6000))
    talk.expect(A)
    commands = talk.assign(A, list(range(3)), talk.requests.ask(model, {"x": np.ones((1, 2), np.float32)}))
    commands = talk.finish()
    assert ids(talk, commands) == [0, 1, 2]
    assert [about.rows for about in talk.about(commands)] == [3], "nobody sees the rows that fill it"


def test_full_batch_of_each_model_is_in_the_metrics(warm: Talk) -> None:
    warm.wait(QUIET_BEAT_S)
    assert count(warm, "penstock_batch_rows_max", "steady", "1") == 8
    assert count(warm, "penstock_expected_batch_seconds", "steady", "1") == pytest.approx(0.018)
    assert count(warm, "penstock_expected_batch_seconds", "double", "1") == 0


def test_heavy_model_does_not_starve_a_light_one(warm: Talk, row: Request, steady_row: Request) -> None:
    """Both have more to do than there is time: ``steady`` has two and a half times the weight, and takes 250 ms where
    ``double`` takes 1."""
    last = itertools.count()
    took: Counter[str] = Counter()
    for _ in range(1200):
        for request in steady_row, row:
            name = request.form.model
            if sum(lot.plan.key[0] == name for lot in warm.core._batcher.waiting()) < 2:
                warm.assign(A, [next(last) for _ in range(8)], request)
        seconds = 0.250 if warm.batches[0].batch.model[0] == "steady" else 0.001
        took[warm.batches[0].batch.model[0]] += round(seconds * 1000)
        finish(warm, seconds)
        warm.core.membership.heard(warm.now)
    assert took["steady"] == pytest.approx(2.5 * took["double"], rel=0.3)


# --- what cannot run ---


def test_form_that_does_not_fit_is_answered(talk: Talk, row: Request) -> None:
    lie = row._replace(form=row.form._replace(rows=2))
    commands = talk.assign(A, [1, 2], lie, attempt=2)
    assert failure(talk, commands).code == BAD_INPUT
    assert "rows or key" in failure(talk, commands).message
    assert talk.done(commands) == [Finished(A, 2, 0, (1, 2))]
    assert talk.batches == []
    assert count(talk, "penstock_request_failures", "double", "1", BAD_INPUT) == 2


def test_unknown_model_is_answered_with_advice_to_retry(talk: Talk, row: Request) -> None:
    commands = talk.assign(A, [1], row._replace(form=row.form._replace(version="2")))
    answer = failure(talk, commands)
    assert (answer.code, answer.retry_after_ms) == (UNAVAILABLE, 100)
    assert "has just left this worker" in answer.message
    assert talk.done(commands) == [Finished(A, 1, 0, (1,))]


def test_refusal_beside_work_leaves_the_work_alone(talk: Talk, row: Request) -> None:
    groups = [
        Tasks(form, A, 1, 0, (number,), (10**7,))
        for number, form in ((1, row.form._replace(body=b"junk")), (2, row.form))
    ]
    commands = talk.tell(Assign(7, groups, blob=row.payload * 2))
    assert failure(talk, commands).message.startswith("the request's layout is malformed")
    assert ids(talk, talk.finish()) == [2]


def test_refusal_for_a_caller_that_has_gone_is_published_to_nobody(talk: Talk, row: Request) -> None:
    commands = talk.assign(B, [1], row._replace(form=row.form._replace(rows=2)))
    assert talk.heard(commands, B) == []
    assert talk.done(commands) == [Finished(B, 1, 0, (1,))]
    assert talk.core.holds_nothing


def test_more_forms_than_are_remembered_are_served_all_the_same(
    talk: Talk, row: Request, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(core, "_PLANS_MAX", 2)
    for number in range(5):
        form = row.form._replace(tenant=f"tenant {number}")
        talk.assign(A, [number], row._replace(form=form))
        assert ids(talk, talk.finish()) == [number]
    assert len(talk.core._plans) <= 2


# --- models ---


def test_change_of_a_model_is_told_alone(start_talk: StartTalk, double: Model, lookup: Model) -> None:
    talk = start_talk(double)
    talk.join()
    talk.wait(0.1)
    [models] = talk.said(talk.load(lookup), WorkerModels)
    assert [(state.name, state.state) for state in models.models] == [("lookup", READY)]
    assert (models.gone, models.routes, models.instances, models.heard) == ((), (), 1, 0)
    assert count(talk, "penstock_model_ready", "lookup", "1") == 1


def test_many_changes_are_told_together_ten_times_a_second(
    start_talk: StartTalk, double: Model, slow: Model, lookup: Model
) -> None:
    talk = start_talk()
    talk.hear(BrokerFound())
    talk.join()
    assert talk.said(talk.load(double), WorkerModels)
    for model in (slow, lookup):
        assert talk.said(talk.load(model), WorkerModels) == []
    assert talk.core.due() == pytest.approx(talk.now + 0.1)
    [models] = talk.said(talk.wait(0.1), WorkerModels)
    assert [state.name for state in models.models] == ["slow", "lookup"]
    assert talk.said(talk.wait(0.2), WorkerModels) == []


def test_what_was_idle_and_is_loaded_is_told_before_it_can_be_idle_again(start_talk: StartTalk, double: Model) -> None:
    """Else the broker would hear nothing of it, and say only once that it can go."""
    talk = start_talk()
    talk.join()
    talk.load(double)
    idle = ModelState("double", "1", IDLE, "", double.spec)
    talk.wait(0.1)
    talk.hear(Loaded(idle, None))
    talk.hear(Rested("double", "1"))
    said = [*talk.said(talk.load(double), WorkerModels), *talk.said(talk.hear(Loaded(idle, None)), WorkerModels)]
    said += talk.said(talk.wait(0.1), WorkerModels)
    assert [state.state for each in said for state in each.models] == [READY, IDLE]


def test_routes_are_told_and_in_the_hello(talk: Talk) -> None:
    talk.wait(0.1)
    route = Route("double", ("1",), (("stable", "1"),))
    [models] = talk.said(talk.hear(Routed(route)), WorkerModels)
    assert (list(models.models), list(models.routes)) == ([], [route])
    [hello] = talk.said(talk.tell(HelloWanted(7)), WorkerHello)
    assert list(hello.routes) == [route]
    talk.join(8)
    talk.wait(0.1)
    [models] = talk.said(talk.hear(Routed(Route("double"))), WorkerModels)
    assert list(models.routes) == [Route("double")]
    [hello] = talk.said(talk.tell(HelloWanted(8)), WorkerHello)
    assert list(hello.routes) == []


def test_what_the_broker_says_of_models_is_for_their_keeper(talk: Talk) -> None:
    for message in (Unload(7, (Version("double", "1"),)), Wake(7, "double", "1"), Loads(7, 3, (Load("m", "{}"),))):
        assert talk.tell(message) == [Order(message)]
    [hello] = talk.said(talk.tell(HelloWanted(7)), WorkerHello)
    assert list(hello.loads) == [Load("m", "{}")]


def test_an_order_that_was_followed_is_told_at_once(talk: Talk, lookup: Model) -> None:
    talk.wait(0.1)
    talk.hear(Routed(Route("lookup", ("1",))))
    talk.load(lookup)
    assert talk.hear(Followed(6, 9)) == [], "that was another broker's"
    [models] = talk.said(talk.hear(Followed(7, 3)), WorkerModels)
    assert (models.heard, [state.name for state in models.models]) == (3, ["lookup"])
    talk.join(8)
    talk.wait(0.1)
    [models] = talk.said(talk.hear(Routed(Route("lookup"))), WorkerModels)
    assert models.heard == 0


def test_a_version_that_nobody_asks_for_goes_when_nothing_of_it_is_held(talk: Talk, row: Request) -> None:
    talk.wait(0.1)
    talk.assign(A, [1], row)
    talk.assign(A, [2], row)
    assert talk.hear(Unwanted("double", "1")) == []
    assert ids(talk, talk.finish()) == [1]
    commands = talk.finish()
    [models] = talk.said(commands, WorkerModels)
    assert (list(models.models), list(models.gone)) == ([], [Version("double", "1")])
    [discard] = [command for command in commands if isinstance(command, Discard)]
    assert [model.spec.name for model in discard.models] == ["double"]
    assert not [sample for sample in talk.core.meters.samples() if sample.labels[:2] == ("double", "1")]
    assert failure(talk, talk.assign(A, [3], row)).code == UNAVAILABLE


def test_a_model_that_is_gone_leaves_no_reference(
    start_talk: StartTalk, workshop: Workshop, requests: Requests
) -> None:
    model = workshop.unary("Identity", FLOAT, ["N", 2], name="fleeting")
    talk = start_talk(model)
    talk.join()
    talk.expect(A)
    talk.subscribe(A)
    talk.assign(A, [1], requests.ask(model, {"x": np.array([[1, 2]], np.float32)}))
    talk.finish()
    gone = weakref.ref(model)
    del model
    [discard] = [each for each in talk.hear(Unwanted("fleeting", "1")) if isinstance(each, Discard)]
    assert gone() is not None
    discard.models.clear()
    assert gone() is None


def test_a_version_that_is_wanted_again_in_time_stays(talk: Talk, row: Request, double: Model) -> None:
    talk.wait(0.1)
    talk.assign(A, [1], row)
    talk.hear(Unwanted("double", "1"))
    talk.load(double)
    commands = talk.finish()
    assert not [command for command in commands if isinstance(command, Discard) and not command.models]
    assert all(not models.gone for models in talk.said(commands, WorkerModels))
    talk.assign(A, [2], row)
    assert ids(talk, talk.finish()) == [2]


def test_requests_keep_the_model_that_they_were_planned_for_and_batches_have_one(
    talk: Talk, workshop: Workshop, requests: Requests
) -> None:
    node = helper.make_node("Mul", ["x", "ten"], ["y"])
    port = (FLOAT, ["N", "M"])
    ten = {"ten": np.array([10], np.float32)}
    tenfold = workshop.make([node], {"x": port}, {"y": port}, ten, name="slow", max_batch_size=2, max_queue_delay="1s")
    row = np.array([[1, 2]], np.float32)
    slow = talk.core.serving.find(("slow", "1"))
    assert slow is not None
    before = requests.ask(slow, {"x": row})
    talk.wait(0.1)
    talk.assign(A, [1, 2, 3], before)
    talk.load(tenfold)
    talk.assign(A, [4], requests.ask(tenfold, {"x": row}))
    talk.wait(0.010)
    assert told(talk, talk.finish()) == {number: [[2, 4]] for number in (1, 2, 3)}
    talk.assign(A, [5], requests.ask(tenfold, {"x": row}))
    assert told(talk, talk.finish()) == {number: [[10, 20]] for number in (4, 5)}


def test_the_model_that_was_replaced_is_discarded_once_nothing_of_it_is_held(talk: Talk, row: Request, double: Model,
                                                                             workshop: Workshop) -> None:  # fmt: skip
    talk.wait(0.1)
    talk.assign(A, [1], row)
    again = workshop.unary("Identity", FLOAT, ["N", "M"], name="double", max_batch_size=8)
    assert [each for each in talk.load(again) if isinstance(each, Discard)] == []
    [discard] = [each for each in talk.finish() if isinstance(each, Discard)]
    assert discard.models == [double]
    [before] = [each for each in talk.load(double) if isinstance(each, Discard)]
    assert before.models == [again]


def test_loads_are_counted(talk: Talk) -> None:
    talk.hear(Tried("double", "1", True, 0.5))
    talk.hear(Tried("double", "1", False, 0.25))
    assert count(talk, "penstock_model_loads", "double", "1", "loaded") == 1
    assert count(talk, "penstock_model_loads", "double", "1", "failed") == 1
    assert count(talk, "penstock_model_load_seconds", "double", "1") == 0.25


def test_more_compute_threads_are_told_and_run_more_at_once(talk: Talk, row: Request, slow_row: Request) -> None:
    talk.wait(0.1)
    talk.assign(A, [1], row)
    [models] = talk.said(talk.hear(Grown(2)), WorkerModels)
    assert models.instances == 2
    talk.assign(A, [2], slow_row)
    talk.wait(0.010)
    assert len(talk.batches) == 2
    [hello] = talk.said(talk.tell(HelloWanted(7)), WorkerHello)
    assert hello.instances == 2


def test_model_that_cannot_be_loaded_is_told_with_its_reason(start_talk: StartTalk) -> None:
    talk = start_talk()
    talk.join()
    talk.wait(0.1)
    state = ModelState("bad", "1", NOT_LOADED, "it is garbage", None)
    [models] = talk.said(talk.hear(Loaded(state, None)), WorkerModels)
    assert list(models.models) == [state]
    assert count(talk, "penstock_model_ready", "bad", "1") == 0


def test_model_that_is_loaded_between_hello_and_welcome_is_told(start_talk: StartTalk, double: Model) -> None:
    talk = start_talk()
    talk.hear(BrokerFound())
    assert talk.said(talk.load(double), WorkerModels) == []
    [models] = talk.said(talk.join(), WorkerModels)
    assert [state.name for state in models.models] == ["double"]
    talk.tell(HelloWanted(7))
    assert talk.said(talk.join(), WorkerModels) == []  # that hello has told it


def test_models_are_told_in_the_hello_and_not_before(start_talk: StartTalk, double: Model) -> None:
    talk = start_talk()
    state = ModelState("double", "1", LOADING, "", None)
    assert talk.said(talk.hear(Loaded(state, None)), WorkerModels) == []
    assert talk.said(talk.load(double), WorkerModels) == []
    [hello] = talk.said(talk.hear(BrokerFound()), WorkerHello)
    assert [(each.name, each.state) for each in hello.models] == [("double", READY)]


# --- the end, and what should not happen ---


def test_draining_worker_says_that_it_leaves_and_finishes_what_it_has(talk: Talk, row: Request) -> None:
    talk.assign(A, [1], row)
    assert talk.hear(Drain()) == [Say(Leaving(7))]
    assert not talk.core.holds_nothing
    assert ids(talk, talk.finish()) == [1]
    assert not talk.core.holds_nothing
    talk.free(A, 1, 1)
    assert talk.core.holds_nothing


@pytest.mark.parametrize("process", ["broker", "caller"])
def test_garbage_is_counted_and_logged(talk: Talk, process: str) -> None:
    [command] = talk.hear(Garbage(process, "not msgpack"))
    assert command == Log("warning", "bad message dropped", {"process": process, "reason": "not msgpack"})
    assert count(talk, "penstock_bad_messages", process) == 1


def test_message_that_no_broker_sends_is_a_defect(talk: Talk) -> None:
    with pytest.raises(AssertionError, match="a broker does not send"):
        talk.core.handle(FromBroker(Leaving(7)), 2.0)


def test_event_that_does_not_exist_is_a_defect(talk: Talk) -> None:
    with pytest.raises(AssertionError, match="unexpected event"):
        talk.core.handle("surprise", 2.0)  # type: ignore[arg-type]


def test_batches_are_counted_by_reason_rows_and_time(talk: Talk, row: Request, slow_row: Request) -> None:
    talk.assign(A, [1], row)
    talk.finish()
    talk.assign(A, [2, 3], slow_row)
    talk.wait(0.010)
    talk.finish()
    talk.assign(A, [4], row, attempt=2)
    talk.finish()
    meters = talk.core.meters
    assert count(talk, "penstock_batches", "double", "1", "idle") == 1
    assert count(talk, "penstock_batches", "double", "1", "alone") == 1
    assert count(talk, "penstock_batches", "slow", "1", "delay") == 1
    assert meters.histogram("penstock_batch_rows", "slow", "1").total == 2
    assert sum(meters.histogram("penstock_queue_seconds", "slow", "1").counts) == 2
    assert sum(meters.histogram("penstock_compute_seconds", "double", "1").counts) == 2


def test_what_is_counted_can_be_sent(talk: Talk, row: Request) -> None:
    talk.assign(A, [1], row)
    talk.finish()
    samples = talk.core.meters.samples()
    assert talk.tell(Beat(7, samples)) == []
    assert {"penstock_batches", "penstock_model_ready"} <= {sample.family for sample in samples}


def test_welcome_may_come_twice(talk: Talk, row: Request) -> None:
    talk.assign(A, [1], row)
    talk.assign(A, [2], row)
    talk.tell(Welcome(7, "worker-1"))
    assert ids(talk, talk.finish()) == [1]
    assert talk.batches == []
    assert talk.wait() == []


def test_tick_without_anything_due_is_silent(talk: Talk) -> None:
    assert talk.hear(Tick()) == []


@pytest.mark.parametrize(
    ("break_it", "complaint"),
    [
        (lambda core: core.__dict__.update(_idle=5), "5 instances are idle while 1 batches run"),
        (lambda core: core.__dict__.update(kept_bytes=1), "bytes are kept, and 1 are counted"),
        (lambda core: core._lots[A].pop(3), "are indexed as"),
        (lambda core: core._batcher._lines["double", "1"].__setattr__("held", 99), "are held, and 99 are counted"),
        (lambda core: core._kept.update({B: {}}), "empty index of results"),
        (lambda core: (core._callers.clear(), core._expected.clear(), core._subscriptions.clear()), "which has gone"),
        (lambda core: core._subscriptions.update({B: 0}), "subscriptions are"),
        (lambda core: core._done.append(1), "were not said"),
        (lambda core: next(core._batcher.waiting()).move("start"), "is among those that wait"),
        (lambda core: next(iter(core._batcher._groups.values())).__setattr__("rows", 7), "and 7 are counted"),
    ],
)
def test_validate_says_what_is_wrong(
    talk: Talk, row: Request, break_it: Callable[[object], object], complaint: str
) -> None:
    talk.assign(A, [1], row)
    talk.finish()
    talk.assign(A, [2], row)
    talk.assign(A, [3, 4], row)
    break_it(talk.core)
    with pytest.raises(AssertionError, match=complaint):
        talk.core.validate()


# --- the device is lost ---


def test_no_model_is_served_on_a_device_that_is_lost(talk: Talk) -> None:
    [told] = talk.said(talk.hear(DeviceLost("cuda:0 (GPU-1) is lost")), WorkerModels)
    assert {(state.state, state.reason) for state in told.models} == {("UNAVAILABLE", "cuda:0 (GPU-1) is lost")}
    assert all(state.spec is not None for state in told.models), "what it is stays known"
    assert count(talk, "penstock_model_ready", "double", "1") == 0


def test_a_broker_that_comes_later_is_told_so_with_the_hello(start_talk: StartTalk, double: Model) -> None:
    talk = start_talk(double)
    assert talk.said(talk.hear(DeviceLost("gone")), WorkerModels) == []
    [hello] = talk.said(talk.hear(BrokerFound()), WorkerHello)
    assert [(state.state, state.reason) for state in hello.models] == [("UNAVAILABLE", "gone")]


def test_what_ran_when_the_device_was_lost_may_still_end(talk: Talk, row: Request) -> None:
    talk.assign(A, [1], row)
    talk.hear(DeviceLost("gone"))
    assert ids(talk, talk.finish()) == [1]


# --- batches that do not end ---


def test_a_batch_that_does_not_end_is_named_and_the_process_ends(talk: Talk, row: Request) -> None:
    talk.assign(A, [1, 2], row)
    talk.assign(A, [3], row)  # waits
    assert talk.core.due() < talk.now + MAX_COMPUTE_S
    commands = talk.wait(MAX_COMPUTE_S)
    assert talk.said(commands, Hung) == [
        Hung(7, [Stuck(A, 1, (1, 2))], "a batch of 'double' had not ended after 30.0 s")
    ]
    assert GiveUp() in commands
    [line] = [each for each in commands if isinstance(each, Log) and each.level == "critical"]
    assert (line.event, line.fields["model"], line.fields["requests"]) == ("batch does not end", "double", 2)
    assert line.fields["named"] == [f"{A.hex()}:1", f"{A.hex()}:2"]
    assert line.fields["seconds"] == 30.0


def test_a_batch_that_is_expected_to_take_long_has_ten_times_as_long(
    start_talk: StartTalk, double: Model, row: Request
) -> None:
    talk = start_talk(double)
    talk.join()
    talk.expect(A)
    talk.subscribe(A)
    for number in range(1, 30):
        talk.assign(A, [number], row)
        run = talk.batches.pop()
        executed = execute(run.model, run.batch)
        talk.hear(replace(executed, compute_s=5.0), after=5.0)
    talk.assign(A, [100], row)
    expected_s = talk.batches[0].batch.expected_s
    assert 10 * expected_s > MAX_COMPUTE_S + 1
    assert GiveUp() not in talk.wait(9.9 * expected_s)
    assert GiveUp() in talk.wait(0.1 * expected_s)


def test_a_process_that_was_stopped_gives_its_batches_their_time_anew(talk: Talk, row: Request) -> None:
    talk.assign(A, [1], row)
    commands = talk.wait(1000.0)
    assert GiveUp() not in commands
    talk.finish()
    assert GiveUp() not in talk.wait(MAX_COMPUTE_S)


def test_a_batch_that_failed_and_runs_in_parts_has_its_time_for_each(talk: Talk, row: Request) -> None:
    talk.assign(A, [1, 2], row)
    [run] = talk.batches
    run.batch.runs = 2
    assert GiveUp() not in talk.wait(MAX_COMPUTE_S)
    run.batch.runs = 3
    assert GiveUp() not in talk.wait(MAX_COMPUTE_S)
    assert GiveUp() in talk.wait(MAX_COMPUTE_S)  # the third part does not end


def test_without_a_limit_a_batch_may_take_for_ever(start_talk: StartTalk, double: Model, row: Request) -> None:
    talk = start_talk(double, max_compute_s=0.0)
    talk.join()
    talk.expect(A)
    talk.subscribe(A)
    talk.assign(A, [1], row)
    assert GiveUp() not in talk.wait(1e6)


def test_what_does_not_end_ends_the_process_without_a_broker_too(talk: Talk, row: Request) -> None:
    talk.assign(A, [1], row)
    talk.hear(BrokerLost("its process ended"))
    commands = talk.wait(MAX_COMPUTE_S)
    assert (talk.said(commands, Hung), GiveUp() in commands) == ([], True)
