"""Tensors in callers' arenas: who is given which, and what the broker makes of places."""

from __future__ import annotations

import pytest

from penstock.broker.events import Came, Gone
from penstock.wire.errors import BAD_INPUT
from penstock.wire.events import Garbage
from penstock.wire.messages import INLINE_MAX_BYTES, Assign, CallerHello, Expect, Form, Requests, Welcome
from tests.broker.conversation import EPOCH, Conversation, model

LARGE = INLINE_MAX_BYTES + 1
ARENA = 1 << 20


def test_an_arena_is_passed_on_before_its_owner_is_expected() -> None:
    talk = Conversation()
    first = talk.worker(connected=True)
    caller = talk.caller(arena_bytes=ARENA)
    assert caller.take(Welcome) == [Welcome(EPOCH, "", True)]
    assert talk.shared == [(caller.id, first.id)]
    assert first.take(Expect) == [Expect(EPOCH, (), (), ()), Expect(EPOCH, (caller.id,), (), (caller.id,))]
    second = talk.worker(connected=True)
    assert talk.shared == [(caller.id, first.id), (caller.id, second.id)]
    assert second.take(Expect) == [Expect(EPOCH, (caller.id,), (), (caller.id,))]


def test_without_an_arena_or_a_connection_nothing_is_shared() -> None:
    talk = Conversation()
    connected, far = talk.worker(connected=True), talk.worker()
    plain, owner = talk.caller(), talk.caller(arena_bytes=ARENA)
    assert plain.take(Welcome) == [Welcome(EPOCH, "", False)]
    assert talk.shared == [(owner.id, connected.id)]
    assert [message.sharing for message in connected.take(Expect)] == [(), (), (owner.id,)]
    assert [message.sharing for message in far.take(Expect)] == [(), (), ()]


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


def test_who_says_hello_again_is_passed_on_again() -> None:
    talk = Conversation()
    worker = talk.worker(connected=True)
    caller = talk.caller(arena_bytes=ARENA)
    worker.take(Expect)
    talk.shared.clear()
    caller.say(CallerHello(0, "", 1, True))
    assert worker.take(Expect) == [Expect(EPOCH, (), (caller.id,)), Expect(EPOCH, (caller.id,), (), (caller.id,))]
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
