"""Requests that a worker had not finished when it died: they run alone, and what kills again and again is poison."""

from __future__ import annotations

from typing import Any

import pytest

from penstock.wire.messages import Assign, Hung, Stuck, WorkerHello
from tests.broker.conversation import EPOCH, CallerTalk, Conversation, WorkerTalk, model


def crashed(count: int, workers: int = 1, **options: Any) -> tuple[Conversation, CallerTalk, list[WorkerTalk]]:
    """A worker died with so many requests. Returns others, which are idle and have been given nothing yet."""
    talk = Conversation(**options)
    caller = talk.caller()
    worker = talk.worker(hears=[caller])
    caller.submit(count)
    talk.tick()
    assert worker.got() == [*range(1, count + 1)]
    others = [talk.worker(hears=[caller]) for _ in range(workers)]
    talk.forget()
    worker.vanish()
    return talk, caller, others


def alone(worker: WorkerTalk) -> list[int]:
    """The ids that have come, each by itself."""
    messages = worker.take(Assign)
    assert all(message.alone for message in messages if message.groups)
    return [number for message in messages for group in message.groups for number in group.ids]


def finish(talk: Conversation, caller: CallerTalk, worker: WorkerTalk, number: int, attempt: int = 2) -> None:
    worker.done(caller, number, attempt=attempt)
    caller.ack(number)
    talk.tick()


def test_neighbours_of_poison_are_answered_and_poison_fails() -> None:
    talk, caller, [worker] = crashed(3, deaths_max=2)
    talk.tick()
    assert alone(worker) == [1]
    finish(talk, caller, worker, 1)
    assert alone(worker) == [2]
    worker.vanish("its process ended")
    talk.tick()
    other = talk.worker(hears=[caller], name="x")
    talk.tick()
    assert alone(other) == [3]  # what has just killed goes behind the others
    finish(talk, caller, other, 3)
    assert alone(other) == [2]
    other.vanish("silent")
    talk.tick()
    [refusal] = caller.refusals()
    assert (refusal.id, refusal.code, refusal.retry_after_ms) == (2, "poisoned", 0)
    assert refusal.message == (
        "2 workers, one after another, were lost while they ran this request and nothing else: "
        "w-1 (its process ended), x (silent); model 'm' cannot run this input, so it is not tried again"
    )
    assert talk.count("penstock_request_failures", "m", "1", "poisoned") == 1
    assert talk.held == (0, 0)


@pytest.mark.parametrize("deaths_max", [1, 3])
def test_who_was_alone_from_the_beginning_needs_no_second_trial(deaths_max: int) -> None:
    talk, caller, workers = crashed(1, workers=deaths_max - 1, deaths_max=deaths_max)
    for _ in workers:
        assert caller.refused() == {}
        talk.tick()
        for other in workers:
            if other.got():
                other.vanish()
    talk.tick()
    assert caller.refused() == {1: "poisoned"}


def test_others_go_on_in_batches_while_suspects_run_alone() -> None:
    talk, caller, workers = crashed(4, workers=2)
    caller.submit(8)
    talk.tick()
    [apart] = [worker for worker in workers if talk.core.workers[worker.id].apart]
    [other] = [worker for worker in workers if worker is not apart]
    assert alone(apart) == [1]
    assert other.got() == [*range(5, 13)]
    for number in (1, 2, 3):
        finish(talk, caller, apart, number)
        assert alone(apart) == [number + 1]
    caller.submit(3)
    talk.tick()
    assert apart.got() == []  # it is not done with the last of them
    finish(talk, caller, apart, 4)
    assert apart.got() == [13, 14, 15]


def test_a_busy_worker_is_set_apart_until_no_suspect_is_left() -> None:
    talk = Conversation()
    caller = talk.caller()
    first, second = talk.worker(hears=[caller]), talk.worker(hears=[caller])
    caller.submit(18)  # more than both take
    talk.tick()
    had = first.got()
    busy = second.got()
    assert (len(had), len(busy)) == (8, 8)
    first.vanish()
    talk.tick()
    second.done(caller, *busy[:6])
    talk.tick()
    assert second.got() == []  # suspects wait for it to be idle
    second.done(caller, *busy[6:])
    for number in had:
        talk.tick()
        assert alone(second) == [number]
        second.done(caller, number, attempt=2)
    talk.tick()
    assert second.got() == [17, 18]
    assert not talk.core.workers[second.id].apart


def test_whoever_runs_alone_and_ends_is_no_suspect_any_more() -> None:
    """Killed by chance, it is not held against it."""
    talk, caller, [worker] = crashed(1)
    talk.tick()
    assert alone(worker) == [1]
    worker.vanish()
    for attempt in (3, 4, 5, 6):  # done, and the result lost with its worker
        other = talk.worker(hears=[caller])
        talk.tick()
        [message] = other.take(Assign)
        assert (message.alone, message.groups[0].attempt) == (attempt == 3, attempt)
        other.done(caller, 1, attempt=attempt)
        other.vanish()
    assert caller.refused() == {}


def test_what_was_published_is_not_blamed() -> None:
    talk = Conversation()
    caller = talk.caller()
    worker = talk.worker(hears=[caller])
    caller.submit(4)
    talk.tick()
    worker.done(caller, 1, 2)
    other = talk.worker(hears=[caller])
    third = talk.worker(hears=[caller])
    talk.forget()
    worker.vanish()
    talk.tick()
    apart, free = (other, third) if talk.core.workers[other.id].apart else (third, other)
    assert (alone(apart), free.got()) == ([3], [1, 2])


def test_suspects_that_nobody_wants_any_more_set_their_worker_free() -> None:
    talk, caller, [worker] = crashed(3)
    talk.tick()
    assert alone(worker) == [1]
    caller.submit(2)
    caller.cancel(2)
    talk.tick()
    caller.cancel(1, 3)
    talk.tick()
    assert worker.got() == []  # it may still run the first
    worker.done(caller, 1, attempt=2)
    talk.tick()
    assert worker.got() == [4, 5]


def test_suspects_whose_time_is_up_are_told_so() -> None:
    talk = Conversation()
    caller = talk.caller()
    worker = talk.worker(hears=[caller])
    caller.submit(2, timeout_s=[1.0, 60.0])
    talk.tick()
    worker.vanish()
    talk.live(2.0)
    assert caller.refused() == {1: "deadline"}
    other = talk.worker(hears=[caller])
    talk.tick()
    assert alone(other) == [2]


def test_suspects_do_not_wait_for_ever_for_a_worker() -> None:
    talk, caller, [worker] = crashed(2, unserved_grace_s=3.0)
    worker.bye()
    talk.live(6.0)
    assert caller.refused() == {1: "unavailable", 2: "unavailable"}
    assert talk.held == (0, 0)


def test_a_worker_that_lives_after_all_was_killed_by_nobody() -> None:
    """One that was stopped, twice, and continued each time."""
    talk, caller, [worker] = crashed(1)
    for attempt in (2, 3, 4):
        talk.tick()
        assert alone(worker) == [1]
        worker.vanish("silent for 0.8 s while it had work")
        worker.say(WorkerHello(0, "w", "cpu", 1, (), 1, (model(),)))
        worker.hear(caller)
        assert caller.refused() == {}, attempt


def test_a_worker_that_does_not_hear_their_caller_is_not_set_apart() -> None:
    talk, caller, [worker] = crashed(1)
    other = talk.caller()
    worker.hear(other)
    worker.hear(caller, False)
    other.submit(2)
    talk.tick()
    assert worker.got() == [1, 2]
    worker.hear(caller)
    worker.done(other, 1, 2)
    talk.tick()
    assert alone(worker) == [1]


@pytest.mark.parametrize("instances", [1, 2])
def test_suspects_of_several_models_take_turns_on_a_worker(instances: int) -> None:
    talk = Conversation()
    caller = talk.caller()
    models = model("m"), model("n")
    worker = talk.worker(*models, hears=[caller])
    caller.submit(2, "m")
    caller.submit(2, "n")
    talk.tick()
    assert sorted(worker.got()) == [1, 2, 3, 4]
    worker.vanish()
    other = talk.worker(*models, hears=[caller], instances=instances)
    seen = []
    for _ in range(4):
        talk.tick()
        [number] = alone(other)
        seen.append(number)
        other.done(caller, number, attempt=2)
    assert sorted(seen) == [1, 2, 3, 4]
    caller.ack(*seen)
    assert talk.held == (0, 0)


def hang(caller: CallerTalk, worker: WorkerTalk, *ids: int, attempt: int = 1) -> None:
    """A batch of these requests does not end there."""
    worker.say(Hung(EPOCH, [Stuck(caller.id, attempt, ids)], "a batch of 'm' had not ended after 30.0 s"))


def test_of_a_worker_that_says_what_does_not_end_the_rest_moves_without_blame() -> None:
    talk = Conversation()
    caller = talk.caller()
    worker = talk.worker(hears=[caller])
    caller.submit(6)
    talk.tick()
    others = [talk.worker(hears=[caller]) for _ in range(2)]
    talk.forget()
    hang(caller, worker, 1, 2, 3)
    hang(caller, worker, 4)  # it has gone for the broker
    talk.tick()
    apart, free = sorted(others, key=lambda each: not talk.core.workers[each.id].apart)
    assert (alone(apart), free.got()) == ([1], [4, 5, 6])
    assert [line.fields["reason"] for line in talk.logs if line.event == "worker lost"] == [
        "a batch of 'm' had not ended after 30.0 s"
    ]


def test_what_never_ends_is_poison() -> None:
    talk, caller, workers = crashed(2, workers=3)
    while workers:
        talk.tick()
        for worker in workers:
            for number in alone(worker):
                attempt = talk.core.callers[caller.id].requests[number].attempt
                if number == 2:
                    hang(caller, worker, number, attempt=attempt)
                    workers.remove(worker)
                    break
                finish(talk, caller, worker, number, attempt)
    talk.tick()
    [refusal] = caller.refusals()
    assert (refusal.id, refusal.code) == (2, "poisoned")
    assert refusal.message.count("a batch of 'm' had not ended after 30.0 s") == 3


def test_a_worker_that_names_what_it_does_not_have_blames_nobody() -> None:
    talk, caller, [worker] = crashed(2)
    talk.tick()
    assert alone(worker) == [1]
    hang(caller, worker, 1, attempt=1)
    hang(caller, worker, 99, attempt=2)
    other = talk.worker(hears=[caller])
    talk.tick()
    assert alone(other) == [2]  # each is suspect still, and nobody was convicted
    assert caller.refused() == {}
