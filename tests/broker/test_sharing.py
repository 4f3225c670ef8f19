"""Tensors in callers' arenas: who is given which, and what the broker makes of places."""

from __future__ import annotations

import pytest

from penstock.broker.events import Came, Gone
from penstock.wire.errors import BAD_INPUT
from penstock.wire.events import Garbage
from penstock.wire.messages import (
    INLINE_MAX_BYTES,
    Assign,
    Attached,
    CallerHello,
    Expect,
    Form,
    Requests,
    Welcome,
    WorkerHello,
    Workers,
)
from tests.broker.conversation import EPOCH, CallerTalk, Conversation, WorkerTalk, model

LARGE = INLINE_MAX_BYTES + 1
ARENA = 1 << 20


def test_an_arena_is_passed_on_before_its_owner_is_expected() -> None:
    talk = Conversation()
    first = talk.worker(connected=True)
    caller = talk.caller(arena_bytes=ARENA)
    assert caller.take(Welcome) == [Welcome(EPOCH, "", True)]
    assert talk.shared == [(caller.id, first.id)]
    assert expected(first) == [[], [(caller.id, True, False)]]
    second = talk.worker(connected=True)
    assert talk.shared == [(caller.id, first.id), (caller.id, second.id)]
    assert expected(second) == [[(caller.id, True, False)]]


def test_without_an_arena_or_a_connection_nothing_is_shared() -> None:
    talk = Conversation()
    connected, far = talk.worker(connected=True), talk.worker()
    plain, owner = talk.caller(), talk.caller(arena_bytes=ARENA)
    assert plain.take(Welcome) == [Welcome(EPOCH, "", False)]
    assert talk.shared == [(owner.id, connected.id)]
    assert expected(connected) == [[], [(plain.id, False, False)], [(owner.id, True, False)]]
    assert expected(far) == [[], [(plain.id, False, False)], [(owner.id, False, False)]]


def test_places_reach_the_worker_and_are_not_held() -> None:
    talk = Conversation(held_bytes_max=0)
    caller = talk.caller(arena_bytes=ARENA)
    worker = talk.worker(model(batch=2), hears=[caller], connected=True)
    talk.tick()
    caller.submit(3, size=LARGE, places=[0, 640, 64])
    talk.tick()
    assert talk.held == (3, 0)
    groups = worker.work()
    assert [(group.ids, group.places) for group in groups] == [((1, 2, 3), (0, 640, 64))]
    worker.finish(groups)
    caller.ack(1, 2, 3)
    assert talk.held == (0, 0)


def test_places_stay_with_their_requests_when_these_part() -> None:
    talk = Conversation()
    caller = talk.caller(arena_bytes=ARENA)
    worker = talk.worker(model(batch=1), hears=[caller], connected=True)
    talk.tick()
    ids = caller.submit(4, size=LARGE, places=[10, 20, 30, 40])
    caller.cancel(ids[0])
    talk.tick()
    seen: dict[int, int] = {}
    while groups := worker.work():
        seen |= {number: place for group in groups for number, place in zip(group.ids, group.places, strict=True)}
        worker.finish(groups)
        talk.tick()
    assert seen == {2: 20, 3: 30, 4: 40}


def test_what_a_lost_worker_had_lies_where_it_lay() -> None:
    talk = Conversation()
    caller = talk.caller(arena_bytes=ARENA)
    lost = talk.worker(hears=[caller], connected=True)
    talk.tick()
    caller.submit(size=LARGE, places=[128])
    talk.tick()
    assert [group.places for group in lost.work()] == [(128,)]
    lost.vanish()
    other = talk.worker(hears=[caller], connected=True)
    talk.tick()
    assert [(group.attempt, group.places) for group in other.work()] == [(2, (128,))]


def test_what_travels_and_what_stays_go_together() -> None:
    talk = Conversation()
    caller = talk.caller(arena_bytes=ARENA)
    worker = talk.worker(model(batch=8), hears=[caller], connected=True)
    talk.tick()
    form = Form("m", "1", 0, "", 1, LARGE, b"", b"layout")
    small = form._replace(nbytes=3)
    groups = [
        Requests(form, (1,), (10**6,)),
        Requests(form, (2, 3), (10**6,) * 2, (64, 0)),
        Requests(small, (4,), (10**6,)),
        Requests(form, (5,), (10**6,)),
    ]
    caller.ask(groups)
    talk.tick()
    [message] = worker.take(Assign)
    places = {group.ids: group.places for group in message.groups}
    assert places == {(1,): (), (2, 3): (64, 0), (4,): (), (5,): ()}
    assert [bytes(frame[:1]) for frame in message.frames] == [b"\x01", b"\x05"]
    assert message.blob == b"\x04" * 3


@pytest.mark.parametrize("place", [ARENA - LARGE + 1, ARENA, 2**64 - 1])
def test_places_outside_the_arena_are_refused(place: int) -> None:
    talk = Conversation()
    caller = talk.caller(arena_bytes=ARENA)
    worker = talk.worker(hears=[caller], connected=True)
    talk.tick()
    caller.submit(2, size=LARGE, places=[0, place])
    caller.submit(size=LARGE, places=[ARENA - LARGE])
    talk.tick()
    refusals = caller.refusals()
    assert [(each.id, each.code) for each in refusals] == [(1, BAD_INPUT), (2, BAD_INPUT)]
    assert f"{LARGE} bytes at {place} do not lie in the caller's arena of {ARENA} bytes" in refusals[0].message
    assert worker.got() == [3]


def test_places_of_a_caller_that_shares_nothing_are_refused() -> None:
    talk = Conversation()
    caller = talk.caller()
    talk.worker(hears=[caller], connected=True)
    talk.tick()
    caller.submit(size=LARGE, places=[0])
    talk.tick()
    [refusal] = caller.refusals()
    assert (refusal.code, "this caller shares none" in refusal.message) == (BAD_INPUT, True)
    assert talk.held == (0, 0)


def test_an_arena_lasts_as_long_as_the_control_connection() -> None:
    talk = Conversation()
    caller = talk.caller(arena_bytes=ARENA)
    hello = CallerHello(0, "", 1, True)
    talk.handle(Gone(caller.id, "silent for 5.0 s"))
    caller.take(Welcome)
    caller.say(hello)
    assert caller.take(Welcome) == [Welcome(EPOCH, "", True)]
    talk.handle(Gone(caller.id, "its process ended", disconnected=True))
    caller.say(hello)
    assert caller.take(Welcome) == [Welcome(EPOCH, "", False)]
    talk.handle(Came(caller.id, 5))
    caller.say(hello)
    assert caller.take(Welcome) == [Welcome(EPOCH, "", True)]


def test_an_arena_that_is_found_later_is_passed_on_to_all_who_may_read_it() -> None:
    talk = Conversation()
    near, far = talk.worker(connected=True), talk.worker(endpoints=["tcp://10.0.0.1:1"])
    caller = talk.caller(connected=True)
    near.hear(caller)
    far.hear(caller)
    talk.tick()
    talk.forget()
    talk.handle(Came(caller.id, ARENA))
    assert caller.take(Welcome) == [Welcome(EPOCH, "", True)]
    assert talk.shared == [(caller.id, near.id)]
    assert (expected(near), expected(far)) == ([[(caller.id, True, False)]], [])
    assert talk.core.workers[near.id].callers == set(), "until it has mapped it"
    assert talk.core.workers[far.id].callers == {caller.id}
    near.hear(caller)
    caller.submit(size=LARGE, places=[0])
    talk.tick()
    assert caller.refused() == {}


def test_a_workers_arena_that_is_found_later_is_given_to_its_callers() -> None:
    talk = Conversation()
    worker = talk.worker(connected=True)
    caller, far = talk.caller(connected=True), talk.caller()
    caller.take(Workers)
    far.take(Workers)
    worker.take(Expect)
    talk.handle(Came(worker.id, ARENA))
    assert expected(worker) == [[(caller.id, False, True)]]
    assert talk.shared == [(worker.id, caller.id)]
    [told] = caller.take(Workers)
    assert [each.arena for each in told.workers] == [talk.serials[worker.id, caller.id]]
    assert far.take(Workers) == []


def test_who_says_hello_again_is_passed_on_again() -> None:
    talk = Conversation()
    worker = talk.worker(connected=True)
    caller = talk.caller(arena_bytes=ARENA)
    worker.take(Expect)
    talk.shared.clear()
    caller.say(CallerHello(0, "", 1, True))
    gone, come = worker.take(Expect)
    [(number, serial)] = gone.gone
    [again] = come.callers
    assert (number, again.caller, again.shares) == (caller.id, caller.id, True)
    assert again.serial > serial, "what had been introduced before is another introduction"
    assert talk.shared == [(caller.id, worker.id)]


def test_who_talks_nonsense_on_its_control_connection_is_gone_and_so_is_its_arena() -> None:
    """The connection was closed: to look into the arena of a caller that is still there would end the broker."""
    talk = Conversation()
    caller = talk.caller(arena_bytes=ARENA)
    talk.handle(Garbage("control", "a second packet on a control connection", caller.id))
    assert talk.core.callers == {}
    caller.say(CallerHello(0, "", 1, True))
    caller.take(Welcome)
    talk.worker(hears=[caller])
    talk.tick()
    caller.submit(size=LARGE, places=[0])
    talk.tick()
    assert list(caller.refused().values()) == [BAD_INPUT]
    assert talk.held == (0, 0)


# --- results in workers' arenas ---


def addresses(caller: CallerTalk) -> list[list[tuple[bytes, bool]]]:
    """The workers that a caller is told of, and whether they share, message by message."""
    told = [message.workers for message in caller.take(Workers)]
    for each in told[-1]:
        assert each.arena == (caller.talk.serials[each.worker, caller.id] if each.arena else 0)
    return [[(each.worker, each.arena > 0) for each in workers] for workers in told]


def expected(worker: WorkerTalk) -> list[list[tuple[bytes, bool, bool]]]:
    """The callers that a worker is told of, and whether they share and read, message by message."""
    told = [message.callers for message in worker.take(Expect) if not message.gone]
    for each in (each for callers in told for each in callers if each.shares):
        assert each.serial <= worker.talk.serials[each.caller, worker.id]
    return [[(each.caller, each.shares, each.reads) for each in callers] for callers in told]


def test_a_workers_arena_is_passed_on_before_its_callers_hear_of_it() -> None:
    talk = Conversation()
    plain, far = talk.caller(connected=True), talk.caller()
    owner = talk.worker(connected=True, arena_bytes=ARENA)
    assert expected(owner) == [[(plain.id, False, True), (far.id, False, False)]]
    assert talk.shared == []
    addresses(plain), addresses(far)
    talk.tick()
    assert talk.shared == [(owner.id, plain.id)]
    assert addresses(plain) == [[(owner.id, True)]]
    assert addresses(far) == [[(owner.id, False)]]
    late = talk.caller(connected=True)
    assert talk.shared == [(owner.id, plain.id), (owner.id, late.id)]
    assert addresses(late) == [[(owner.id, True)]]
    assert expected(owner) == [[(late.id, False, True)]]


def test_a_workers_arena_is_passed_on_once_while_it_stays() -> None:
    talk = Conversation()
    caller = talk.caller(connected=True)
    first = talk.worker(connected=True, arena_bytes=ARENA)
    talk.tick()
    second = talk.worker(connected=True, arena_bytes=ARENA)
    talk.tick()
    assert talk.shared == [(first.id, caller.id), (second.id, caller.id)]
    first.vanish()
    talk.tick()
    assert addresses(caller)[-1] == [(second.id, True)]
    first.say(WorkerHello(0, "w", "cpu", 1, ("ipc:///run/w.sock",), 1, (model(),)))
    talk.tick()
    assert talk.shared[2:] == [(first.id, caller.id)]


def test_a_worker_without_a_connection_or_an_arena_shares_nothing() -> None:
    talk = Conversation()
    caller = talk.caller(connected=True)
    workers = talk.worker(connected=True), talk.worker()
    talk.tick()
    assert talk.shared == []
    assert addresses(caller)[-1] == [(worker.id, False) for worker in workers]
    assert [expected(worker) for worker in workers] == [[[(caller.id, False, False)]]] * 2


def test_what_this_broker_does_not_know_is_passed_on_to_all_workers() -> None:
    """A worker had it from the broker before this one, and keeps it where its caller has read it."""
    talk = Conversation()
    caller = talk.caller(connected=True)
    owner, plain = talk.worker(connected=True, arena_bytes=ARENA), talk.worker()
    talk.tick()
    caller.ack(3, 4, 9)
    talk.tick()  # at once: nothing may follow
    assert owner.news() == plain.news() == ([3, 4, 9], [])


def test_what_was_done_by_a_worker_that_was_thought_lost_is_freed_there_when_it_is_back() -> None:
    talk = Conversation()
    caller = talk.caller(connected=True)
    lost = talk.worker(hears=[caller], connected=True, arena_bytes=ARENA)
    talk.tick()
    caller.submit()
    talk.tick()
    assert lost.got() == [1]
    lost.done(caller, 1, size=5000)
    lost.vanish("silent for 5.0 s")
    other = talk.worker(hears=[caller], connected=True, arena_bytes=ARENA)
    talk.tick()
    assert other.got() == [1]
    caller.ack(1)  # of the first one's result
    lost.say(WorkerHello(0, "w", "cpu", 1, ("ipc:///run/w.sock",), 1, (model(),)))
    lost.hear(caller)
    caller.ack(1)  # it is published again, and so acknowledged
    talk.tick()
    assert lost.news() == ([1], [])
    other.done(caller, 1, attempt=2)
    assert talk.held == (0, 0)


def test_a_caller_that_never_acknowledges_gets_nothing_more_from_a_worker_whose_memory_it_fills() -> None:
    talk = Conversation(unacknowledged_bytes_max=10_000)
    greedy, modest = talk.caller(connected=True), talk.caller(connected=True)
    worker = talk.worker(hears=[greedy, modest], connected=True, arena_bytes=ARENA)
    talk.tick()
    for _ in range(2):
        greedy.submit()
        talk.tick()
        worker.done(greedy, *worker.got(), size=5000)
    greedy.submit()
    modest.submit()
    talk.tick()
    assert [group.caller for group in worker.work()] == [modest.id]
    worker.done(modest, 1, size=5000)
    greedy.ack(1)
    talk.tick()
    assert [(group.caller, group.ids) for group in worker.work()] == [(greedy.id, (3,))]


def test_a_worker_that_speaks_of_a_caller_of_before_is_not_believed() -> None:
    """It has not read yet that this one had gone, and does not have what it needs of the one that came."""
    talk = Conversation()
    caller = talk.caller(arena_bytes=ARENA)
    worker = talk.worker(connected=True)
    [told] = worker.take(Expect)
    [before] = told.callers
    talk.tick()
    caller.say(CallerHello(0, "", 1, True))
    worker.say(Attached(EPOCH, caller.id, before.serial, True))
    caller.submit(size=LARGE, places=[0])
    talk.tick()
    assert worker.got() == []
    worker.hear(caller)
    talk.tick()
    assert worker.got() == [1]
    worker.say(Attached(EPOCH, caller.id, before.serial, False))
    caller.submit(size=LARGE, places=[0])
    talk.tick()
    assert worker.got() == [2]


def test_what_a_caller_that_has_gone_did_not_acknowledge_is_not_freed() -> None:
    """It may have been stopped, and have the result: whoever keeps that knows whether it still can be read."""
    talk = Conversation()
    caller = talk.caller(connected=True)
    worker = talk.worker(hears=[caller], connected=True, arena_bytes=ARENA)
    talk.tick()
    caller.submit(2)
    talk.tick()
    assert worker.got() == [1, 2]
    worker.done(caller, 1, size=5000)
    caller.vanish("silent for 5.0 s")
    caller.say(CallerHello(0, "", 1, True))
    worker.done(caller, 2, size=5000)
    talk.tick(1.0)
    assert worker.news() == ([], [])
    assert talk.held == (0, 0)
    caller.ack(2)
    talk.tick()
    assert worker.news() == ([2], [])
