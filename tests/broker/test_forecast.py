"""When a request would be done, by what is before it and what that takes."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.broker.forecast import at_most_us, forecast_for
from penstock.wire.messages import INLINE_MAX_BYTES, MAX_RETRY_AFTER_MS, Assign, Cost, Costs
from tests.broker.conversation import EPOCH, CallerTalk, Conversation, WorkerTalk, model

# 4 ms for one row, 16 ms for a batch of 16.
SIZES, TIMES_US = (1, 16), (4000, 16_000)


def cost(name: str = "m", instances: int = 1, weight: int = 1000, slower: int = 1) -> Cost:
    return Cost(name, "1", instances, 16, weight, SIZES, tuple(slower * us for us in TIMES_US))


def server(
    workers: int = 1, *costs: Cost, instances: int = 1, **options: Any
) -> tuple[Conversation, CallerTalk, list[WorkerTalk]]:
    """A broker whose workers have said what their models take."""
    talk = Conversation(**options)
    caller = talk.caller()
    models = [model(each.model, batch=16) for each in costs or (cost(),)]
    found = [talk.worker(*models, hears=[caller], instances=instances, name=f"w{at}") for at in range(workers)]
    for worker in found:
        worker.say(Costs(EPOCH, costs or (cost(),)))
    talk.tick()
    return talk, caller, found


def done_ms(talk: Conversation, rows: int = 1, name: str = "m", priority: int = 3, tenant: str | bytes = "t") -> float:
    queue = talk.core.registry.queues[name, "1"]
    done_us = forecast_for(queue, priority, tenant).done_us(rows)
    assert done_us <= at_most_us(queue, rows), "the bound that spares forecasts is none"
    return done_us / 1000


def test_an_idle_server_takes_what_a_batch_takes() -> None:
    talk, _, _ = server()
    assert done_ms(talk) == 4.0
    assert done_ms(talk, 16) == 16.0
    assert done_ms(talk, 6) == 8.0


def test_what_is_before_it_is_waited_for() -> None:
    talk, caller, _ = server()
    caller.submit(64, tenant="t")
    talk.tick()
    # 32 are on the worker and 32 wait: 64 ms, which may be a third more, and its own full batch.
    assert done_ms(talk) == pytest.approx(64 * 4 / 3 + 16)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 3),
    st.lists(st.tuples(st.integers(1, 40), st.sampled_from("tu"), st.sampled_from([1, 3, 5])), max_size=6),
    st.integers(1, 100),
    st.sampled_from([1, 3, 5]),
)
def test_no_forecast_says_more_than_its_bound(
    workers: int, waiting: list[tuple[int, str, int]], rows: int, priority: int
) -> None:
    talk, caller, _ = server(workers, cost("m"), cost("n", slower=3))
    for at, (count, tenant, urgency) in enumerate(waiting):
        caller.submit(count, name="mn"[at % 2], tenant=tenant, priority=urgency)
        talk.tick()
    for name in "mn":
        assert done_ms(talk, rows, name, priority) > 0  # and what ``done_ms`` asserts


def test_workers_and_instances_share_it() -> None:
    for talk, caller in (server(4)[:2], server(2, cost(instances=2), instances=2)[:2]):
        caller.submit(256, tenant="t")
        talk.tick()
        assert done_ms(talk) == pytest.approx(64 * 4 / 3 + 16)


def test_instances_beyond_the_models_own_do_not_help() -> None:
    talk, caller, _ = server(1, cost(instances=1), instances=4)
    caller.submit(64, tenant="t")
    talk.tick()
    assert done_ms(talk) == pytest.approx(64 * 4 / 3 + 16)


def test_what_is_less_urgent_is_not_waited_for() -> None:
    talk, caller, _ = server()
    caller.submit(64, tenant="t")
    talk.tick()
    assert done_ms(talk, priority=1) == pytest.approx(16 * 4 / 3 + 16)  # nor for what has been given and not begun
    assert done_ms(talk, priority=5) == pytest.approx(64 * 4 / 3 + 16)


def test_of_other_tenants_only_their_part_beside_ones_own_is_waited_for() -> None:
    talk, caller, _ = server()
    caller.submit(320, tenant="flood")
    talk.tick()
    assert done_ms(talk, tenant="quiet") == pytest.approx(32 * 4 / 3 + 16)
    caller.submit(16, tenant="quiet")
    talk.tick()
    assert done_ms(talk, tenant="quiet") == pytest.approx((32 + 2 * 16) * 4 / 3 + 16)
    assert done_ms(talk, tenant="flood") == pytest.approx((320 + 16) * 4 / 3 + 16)


def test_weights_of_tenants_count() -> None:
    talk, caller, _ = server(tenant_weights={"gold": 4.0})
    caller.submit(320, tenant="flood")
    caller.submit(32, tenant="gold")
    talk.tick()
    waiting = 352 - 32  # of both, after the worker has been given 32
    gold = forecast_for(talk.core.registry.queues["m", "1"], 3, "gold").wait_us / 1000
    own = talk.core.registry.queues["m", "1"].level(3).shares["gold"].us / 1000
    assert gold == pytest.approx(32 + own * (1 + 1 / 4))
    assert gold < waiting / 4


def test_other_models_take_their_part_of_the_workers() -> None:
    talk, caller, _ = server(1, cost("m"), cost("n", weight=3000))
    caller.submit(320, "n")
    talk.tick()
    assert done_ms(talk) == pytest.approx(32 * 4 / 3 + 4), "m is behind n, and served next"
    caller.submit(32, "m")
    talk.tick()
    assert done_ms(talk, tenant=caller.id) == pytest.approx((32 + 32 * (1 + 3)) * 4 / 3 + 16)


def test_a_slow_worker_among_quick_ones_counts_for_less() -> None:
    talk, _, workers = server(4)
    workers[0].say(Costs(EPOCH, [cost(slower=5)]))
    queue = talk.core.registry.queues["m", "1"]
    assert (queue.row_us, queue.best_row_us) == (1250, 1000)
    workers[0].vanish()
    assert (queue.row_us, queue.best_row_us) == (1000, 1000)


def test_the_quickest_may_go() -> None:
    talk, _, workers = server(2)
    workers[0].say(Costs(EPOCH, [cost(slower=5)]))
    workers[1].vanish()
    queue = talk.core.registry.queues["m", "1"]
    assert (queue.row_us, queue.best_row_us) == (5000, 5000)


def test_who_comes_while_nothing_waits_is_not_taken_to_run_in_a_full_batch() -> None:
    talk, caller, _ = server()
    caller.submit(1)
    talk.tick()
    assert done_ms(talk) == pytest.approx(1 * 4 / 3 + 4)


# --- refusals ---


def test_what_cannot_be_done_in_time_is_refused_at_once() -> None:
    talk, caller, _ = server()
    caller.submit(64, tenant="t")
    talk.tick()
    caller.submit(timeout_s=0.1, tenant="t")
    talk.tick()
    [refusal] = caller.refusals()
    assert (refusal.id, refusal.code) == (65, "overloaded")
    assert refusal.retry_after_ms == 64
    assert refusal.message == (
        "the request would be done in about 101 ms, and has 100 ms: 64 ms of work on 'm' are before it; "
        "try again when that is done"
    )
    caller.submit(timeout_s=0.102, tenant="t")
    talk.tick()
    assert caller.refusals() == []


def test_who_would_wait_for_years_is_told_so_in_a_number_that_travels() -> None:
    talk, caller, _ = server(1, cost(slower=5_000_000))
    caller.submit(1000, timeout_s=1e12, tenant="t")
    caller.submit(tenant="t")
    talk.tick()
    [refusal] = caller.refusals()
    assert (refusal.id, refusal.retry_after_ms) == (1001, MAX_RETRY_AFTER_MS)


def test_of_a_group_those_are_taken_that_can_be_done_in_time() -> None:
    talk, caller, _ = server()
    caller.submit(100, timeout_s=0.1)
    talk.tick()
    refused = caller.refused()
    assert set(refused.values()) == {"overloaded"}
    assert sorted(refused) == list(range(80, 101))  # 16 at the end of 63 ms, which may be 84
    assert talk.count("penstock_request_failures", "m", "1", "overloaded") == 21


@pytest.mark.parametrize("hurried", [{1}, {2}, {4}, {1, 2}, {1, 3}, {2, 3, 4}])
@pytest.mark.parametrize("size", [4, INLINE_MAX_BYTES + 1])
def test_requests_of_one_group_have_times_of_their_own(hurried: set[int], size: int) -> None:
    """Who has time is not turned away with who has none, and is given its own tensors."""
    talk, caller, [worker] = server()
    caller.submit(4, timeout_s=[0.001 if number in hurried else 60.0 for number in range(1, 5)], size=size)
    talk.tick()
    assert caller.refused() == dict.fromkeys(sorted(hurried), "overloaded")
    [message] = worker.take(Assign)
    [group] = message.groups
    assert set(group.ids) == {1, 2, 3, 4} - hurried
    pieces = message.frames or [message.blob[at : at + size] for at in range(0, len(message.blob), size)]
    assert list(map(bytes, pieces)) == [bytes([number]) * size for number in group.ids]


@pytest.mark.parametrize("hurried", [1, 2, 3])
def test_who_has_time_is_given_its_own_place(hurried: int) -> None:
    talk, _, [worker] = server()
    caller = talk.caller(arena_bytes=1 << 20)
    worker.hear(caller)
    times = [0.001 if number == hurried else 60.0 for number in range(1, 4)]
    caller.submit(3, timeout_s=times, size=4096, places=(0, 4096, 8192))
    talk.tick()
    [group] = worker.work()
    left = [number for number in range(1, 4) if number != hurried]
    assert (list(group.ids), list(group.places)) == (left, [4096 * (number - 1) for number in left])


def test_a_request_whose_batch_alone_takes_too_long_is_refused() -> None:
    talk, caller, _ = server()
    caller.submit(timeout_s=0.003)
    caller.submit(timeout_s=0.005)
    talk.tick()
    assert caller.refused() == {1: "overloaded"}


def test_a_flood_does_not_have_others_refused() -> None:
    talk, caller, _ = server()
    caller.submit(500, tenant="flood", timeout_s=0.2)
    talk.tick()
    assert caller.refused()
    caller.submit(4, tenant="quiet", timeout_s=0.07)
    talk.tick()
    assert caller.refused() == {}


def test_nothing_is_refused_as_long_as_nobody_knows() -> None:
    talk = Conversation()
    caller = talk.caller()
    talk.worker(hears=[caller])
    caller.submit(500, timeout_s=0.01)
    talk.tick()
    assert caller.refusals() == []


def test_who_has_become_late_is_not_given_to_a_worker() -> None:
    talk, caller, [worker] = server()
    caller.submit(32)
    talk.tick()
    first = worker.work()
    caller.submit(2, timeout_s=0.06)
    talk.tick(0.056)  # the worker is late
    worker.finish(first)
    talk.tick()
    [refusal, _] = caller.refusals()
    assert (refusal.id, refusal.code) == (33, "deadline")
    assert refusal.message == "after 0.056 s in the queue of 'm' there was too little time left to compute it"
    assert worker.got() == []


def test_what_a_slow_worker_cannot_do_in_time_waits_for_a_quick_one() -> None:
    talk, caller, [slow, quick] = server(2)
    slow.say(Costs(EPOCH, [cost(slower=20)]))
    caller.submit(32, timeout_s=0.2)
    talk.tick()
    assert (slow.got(), len(quick.got())) == ([], 32)
    assert caller.refusals() == []


def test_what_was_left_to_a_quick_worker_is_done_by_a_slow_one_when_that_goes() -> None:
    talk, caller, [slow, quick] = server(2)
    slow.say(Costs(EPOCH, [cost(slower=10)]))
    caller.submit(32, timeout_s=60.0)
    talk.tick()
    first = quick.got()
    assert slow.got()
    caller.submit(16, timeout_s=0.15)
    talk.tick()
    assert slow.got() == []
    assert first
    quick.bye()
    talk.live(0.1)
    assert slow.got(), "nobody else is there to be waited for"


def test_time_really_taken_is_charged() -> None:
    talk, caller, [worker] = server()
    caller.submit(160, tenant="slow")
    caller.submit(160, tenant="quick")
    talk.tick()
    given = {"slow": 0, "quick": 0}
    for _ in range(12):
        groups = worker.work()
        for group in groups:
            given[group.form.tenant] += len(group.ids)
            each_us = 3000 if group.form.tenant == "slow" else 1000
            worker.done(caller, *group.ids, compute_us=each_us * len(group.ids))
        talk.tick()
        if 160 in given.values():
            break
    assert given["quick"] / given["slow"] > 1.8


def test_what_was_measured_long_ago_is_tried_again() -> None:
    talk, caller, [worker] = server()
    caller.submit(timeout_s=0.003)
    talk.tick()
    assert caller.refused() == {1: "overloaded"}
    talk.live(1.5)
    caller.submit(3, timeout_s=0.003)
    talk.tick()
    assert caller.refused() == {3: "overloaded", 4: "overloaded"}
    assert worker.got() == [2]
    worker.done(caller, 2, compute_us=2000)
    worker.say(Costs(EPOCH, [cost()._replace(times_us=(2000, 8000))]))
    caller.submit(timeout_s=0.003)
    talk.tick()
    assert caller.refused() == {}
    assert worker.got() == [5]
