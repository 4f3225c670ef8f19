"""Who is given to a worker that takes no more: what goes before what waits there, and no more than a batch of it."""

from __future__ import annotations

import pytest

from penstock.broker.forecast import forecast_for
from penstock.wire.messages import Assign, Cost, Costs
from tests.broker.conversation import EPOCH, CallerTalk, Conversation, WorkerTalk, model

BATCH = 16


def cost(name: str = "m", row_us: int = 1000) -> Cost:
    return Cost(name, "1", 1, BATCH, 1000, (1, BATCH), (4 * row_us, BATCH * row_us))


def server(*costs: Cost) -> tuple[Conversation, CallerTalk, WorkerTalk]:
    talk = Conversation()
    caller = talk.caller()
    worker = talk.worker(*(model(each.model, batch=BATCH) for each in costs), hears=[caller])
    worker.say(Costs(EPOCH, costs))
    talk.tick()
    return talk, caller, worker


def flood(talk: Conversation, caller: CallerTalk, worker: WorkerTalk, name: str = "m", priority: int = 0) -> list[int]:
    """A tenant keeps the worker busy: it has run a batch of it, runs another, and has been given a third. Returns what
    it has."""
    first, second = (caller.submit(BATCH, name, tenant="flood", priority=priority) for _ in range(2))
    talk.tick()
    third = caller.submit(BATCH, name, tenant="flood", priority=priority)
    caller.submit(100, name, tenant="flood", priority=priority)
    worker.done(caller, *first, compute_us=BATCH * 1000)
    talk.tick(0.016)
    talk.forget()
    return [*second, *third]


def given(worker: WorkerTalk) -> tuple[list[int], list[int]]:
    """Ids that have come: those that overtake, and the others."""
    found: tuple[list[int], list[int]] = [], []
    for message in worker.take(Assign):
        for at, group in enumerate(message.groups):
            found[at >= message.overtaking].extend(group.ids)
    return found


def test_a_tenant_that_asks_for_little_overtakes_one_that_asks_for_much() -> None:
    talk, caller, worker = server(cost())
    flood(talk, caller, worker)
    asked = caller.submit(3, tenant="quiet")
    talk.tick()
    assert given(worker) == (list(asked), [])


def test_at_most_a_batch_overtakes() -> None:
    talk, caller, worker = server(cost())
    has = flood(talk, caller, worker)
    asked = caller.submit(10, tenant="quiet") + caller.submit(10, tenant="other")
    talk.tick()
    first, others = given(worker)
    assert (len(first), others) == (BATCH, [])
    assert set(first) <= set(asked)
    caller.submit(1, tenant="third")
    talk.tick()
    assert given(worker) == ([], [])
    worker.done(caller, *first, compute_us=BATCH * 1000)  # the worker has what it takes already
    talk.tick()
    then, others = given(worker)
    assert (len(then), others) == (5, [])
    worker.done(caller, *has[:BATCH], compute_us=BATCH * 1000)
    talk.tick()
    then, others = given(worker)
    assert (then, len(others)) == ([], BATCH - 5)


def test_the_tenant_that_floods_overtakes_nobody() -> None:
    talk, caller, worker = server(cost())
    flood(talk, caller, worker)
    caller.submit(3, tenant="flood")
    talk.tick()
    assert given(worker) == ([], [])


def test_what_is_soon_done_is_not_overtaken() -> None:
    talk, caller, worker = server(cost(row_us=50))
    flood(talk, caller, worker)
    caller.submit(3, tenant="quiet")
    talk.tick()
    assert given(worker) == ([], [])


def test_what_is_more_urgent_overtakes() -> None:
    talk, caller, worker = server(cost())
    flood(talk, caller, worker, priority=4)
    asked = caller.submit(3, priority=1, tenant="flood")
    talk.tick()
    assert given(worker) == (list(asked), [])
    caller.submit(3, priority=5, tenant="flood")
    talk.tick()
    assert given(worker) == ([], [])


def test_a_model_that_asks_for_little_is_given_before_others_are_done() -> None:
    talk, caller, worker = server(cost("heavy"), cost("light", row_us=10))
    flood(talk, caller, worker, "heavy")
    asked = caller.submit(3, "light")
    talk.tick()
    assert given(worker) == ([], list(asked)), "it overtakes nothing of its own: the worker knows which model is next"
    caller.submit(3, "heavy", tenant="flood")
    talk.tick()
    assert given(worker) == ([], [])


def test_requests_that_were_lost_with_their_worker_overtake_nobody_any_more() -> None:
    talk, caller, worker = server(cost())
    flood(talk, caller, worker)
    asked = caller.submit(3, tenant="quiet")
    talk.tick()
    worker.bye()
    other = talk.worker(model(batch=BATCH), hears=[caller])
    talk.tick()
    first, others = given(other)
    assert first == []
    assert set(asked) <= set(others)


def test_who_overtakes_is_told_to_wait_for_what_runs_alone() -> None:
    talk, caller, worker = server(cost())
    flood(talk, caller, worker)
    queue = talk.core.registry.queues["m", "1"]
    assert forecast_for(queue, 3, "quiet").wait_us == BATCH * 1000
    assert forecast_for(queue, 1, "flood").wait_us == BATCH * 1000
    assert forecast_for(queue, 3, "flood").wait_us == pytest.approx(2 * BATCH * 1000 + 100 * 1000)


def test_who_is_overtaken_is_told_of_those_who_will_come() -> None:
    talk, caller, worker = server(cost())
    queue = talk.core.registry.queues["m", "1"]
    has = flood(talk, caller, worker)
    before_us = forecast_for(queue, 3, "flood").wait_us
    waiting = queue.us
    for _ in range(60):  # half of what the worker does is for those that overtake
        quiet = caller.submit(BATCH // 2, tenant="quiet")
        talk.tick()
        running = [*quiet, *has[: BATCH // 2]]
        worker.done(caller, *running, compute_us=BATCH * 1000)
        caller.submit(BATCH // 2, tenant="flood")
        talk.tick(0.016)
        has = has[BATCH // 2 :] + given(worker)[1]
    assert queue.us == waiting
    assert forecast_for(queue, 3, "flood").wait_us == pytest.approx(before_us + waiting, rel=0.15)
