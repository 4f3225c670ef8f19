"""Workers that have work and say nothing are asked whether they live; what one had that does not answer, moves."""

from __future__ import annotations

from typing import Any

import pytest

from penstock.wire.messages import Pong, WorkerHello
from tests.broker.conversation import EPOCH, CallerTalk, Conversation, WorkerTalk, model


def two(**options: Any) -> tuple[Conversation, CallerTalk, WorkerTalk, WorkerTalk]:
    """A caller, a worker that has two of its requests, and another that is idle."""
    talk = Conversation(**options)
    caller = talk.caller()
    worker = talk.worker(hears=[caller])
    caller.submit(2)
    talk.tick()
    assert worker.got() == [1, 2]
    return talk, caller, worker, talk.worker(hears=[caller])


def pass_time(talk: Conversation, seconds: float) -> None:
    """As the loop does: a tick when the core says that one is due."""
    until = talk.now + seconds
    while talk.core.due() <= until:
        talk.tick(max(0.0, talk.core.due() - talk.now))
    talk.tick(until - talk.now)


def reasons(talk: Conversation) -> list[object]:
    return [line.fields["reason"] for line in talk.logs if line.event == "worker lost"]


def test_what_a_stopped_worker_had_moves_within_a_second() -> None:
    talk, _caller, worker, other = two()
    talk.stopped.add(worker.id)
    pass_time(talk, 0.75)
    assert (talk.pings[worker.id], reasons(talk), other.got()) == (1, [], [])
    pass_time(talk, 0.15)
    assert reasons(talk) == ["silent for 0.8 s while it had work"]
    assert other.got() == [1]  # it may have been that one that the worker is stuck in
    assert talk.pings[other.id] == 0


def test_a_worker_that_answers_may_take_as_long_as_it_likes() -> None:
    talk, _, worker, other = two()
    pass_time(talk, 4.0)
    assert (worker.id in talk.core.workers, other.got()) == (True, [])
    assert 10 <= talk.pings[worker.id] <= 14


def test_a_worker_that_was_given_work_after_a_long_silence_has_its_time() -> None:
    """It was idle, and silent for that."""
    talk = Conversation()
    caller = talk.caller()
    worker = talk.worker(hears=[caller])
    pass_time(talk, 1.9)
    caller.submit()
    talk.tick()
    talk.stopped.add(worker.id)
    pass_time(talk, 0.75)
    assert worker.id in talk.core.workers
    pass_time(talk, 0.1)
    assert worker.id not in talk.core.workers


def test_an_idle_broker_looks_at_nobody() -> None:
    talk, caller, worker, _ = two()
    worker.done(caller, 1, 2)
    caller.ack(1, 2)
    pass_time(talk, 0.5)
    assert talk.core._look_at == float("inf")
    assert talk.core.due() > talk.now + 0.5  # no sooner than without workers
    assert talk.pings == {}


@pytest.mark.parametrize("stopped_s", [0.5, 2.0, 60.0])
def test_a_broker_that_was_stopped_itself_asks_first(stopped_s: float) -> None:
    talk, _caller, worker, other = two()
    talk.stopped.add(worker.id)
    pass_time(talk, 0.6)  # asked already
    talk.tick(stopped_s)
    assert (reasons(talk), other.got()) == ([], [])
    talk.stopped.discard(worker.id)
    worker.say(Pong(EPOCH))  # it had come while the broker was stopped
    pass_time(talk, 3.0)
    assert reasons(talk) == []


def test_a_worker_that_was_lost_in_error_joins_anew_and_its_late_results_end_nothing() -> None:
    talk, caller, worker, other = two()
    talk.stopped.add(worker.id)
    pass_time(talk, 0.9)
    talk.stopped.clear()
    worker.heard()
    worker.done(caller, 1, 2)
    assert worker.heard() == ["HelloWanted"]
    worker.say(WorkerHello(0, "w", "cpu", 1, (), 1, (model(),)))
    for number in (1, 2):
        talk.tick()
        assert other.got() == [number]
        other.done(caller, number, attempt=2)
    caller.ack(1, 2)
    assert talk.held == (0, 0)
    assert worker.id in talk.core.workers
