"""Slots of a caller's arena, and what is sent of them."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.client.arrays import Forms
from penstock.client.caller import Caller, Identity
from penstock.wire.arena import Arena
from penstock.wire.events import FromBroker
from penstock.wire.messages import INLINE_MAX_BYTES, Form, Submit, Welcome
from penstock.wire.models import ModelSpec, TensorSpec
from penstock.wire.slots import Placed, Slot, Slots

LARGE = INLINE_MAX_BYTES + 1


@pytest.fixture
def slots() -> Iterator[Slots]:
    arena = Arena(1 << 18, "test")
    slots = Slots(arena)
    yield slots
    assert arena.allocator.used == 0, "a slot was not given back"
    arena.close()


@settings(max_examples=200, deadline=None)
@given(nbytes=st.integers(1, 5000), lead=st.integers(0, 5000))
def test_what_follows_the_lead_is_aligned(nbytes: int, lead: int) -> None:
    slots = Slots(Arena(1 << 16, "test"))
    slot = slots.take(lead + nbytes, lead)
    assert slot is not None
    tail = slot.tail(nbytes)
    assert (len(slot), len(tail)) == (lead + nbytes, nbytes)
    assert tail.place % 64 == 0
    slot.view[lead] = 77
    assert bytes(slots.arena.view(tail.place, 1)) == bytes(tail.view[:1]) == b"\x4d"
    slot.give_back()
    assert slots.arena.allocator.used == 0


def test_a_slot_is_given_back_once(slots: Slots) -> None:
    first = slots.take(100)
    assert first is not None
    first.give_back()
    again = slots.take(100)
    assert again is not None
    first.give_back()
    assert slots.arena.allocator.slots == 1
    again.give_back()


def test_there_is_no_slot_without_room(slots: Slots) -> None:
    assert slots.take(slots.arena.size + 1) is None
    whole = slots.take(slots.arena.size)
    assert whole is not None
    assert slots.take(1) is None
    whole.give_back()


def test_threads_take_slots_that_do_not_meet(slots: Slots) -> None:
    wrong: list[int] = []

    def work(number: int) -> None:
        for _ in range(300):
            slot = slots.take(1000)
            if slot is not None:
                slot.view[:] = bytes([number]) * 1000
                if bytes(slot.view) != bytes([number]) * 1000:
                    wrong.append(number)
                slot.give_back()

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_large_inputs_are_written_where_they_are_read(slots: Slots) -> None:
    tensors = (TensorSpec("a", "FP32", (-1, -1)), TensorSpec("b", "INT8", (-1,)))
    spec = ModelSpec("m", "1", "", tensors, (), True, 1000)
    a, b = np.arange(10_000, dtype=np.float32).reshape(100, 100), np.arange(100, dtype=np.int8)
    form, payload = Forms().build(spec, {"a": a[:, ::-1], "b": b}, (), slots)
    assert isinstance(payload, Slot)
    assert payload.place % 64 == 0
    assert len(payload) == form.nbytes == a.nbytes + b.nbytes
    assert bytes(payload.view) == a[:, ::-1].tobytes() + b.tobytes()
    _, small = Forms().build(spec, {"a": a[:1], "b": b[:1]}, (), slots)
    assert type(small) is bytes
    whole = slots.take(slots.arena.allocator.largest)
    assert whole is not None
    _, elsewhere = Forms().build(spec, {"a": a, "b": b}, (), slots)
    assert elsewhere == a.tobytes() + b.tobytes()
    payload.give_back()
    whole.give_back()


class Silent:
    def complete(self, answer: object, /) -> None: ...
    def fail(self, error: object, /) -> None: ...


def submit(shares: bool, *payloads: object) -> Submit:
    """What a caller says that has these payloads of LARGE bytes to send."""
    caller = Caller(Identity(b"a caller", "", 1, True, "/run/here"))
    caller.handle(FromBroker(Welcome(7, "", shares)), 0.0)
    form = Form("m", "1", 0, "", 1, LARGE, b"", b"layout")
    for payload in payloads:
        caller.submit(form, payload, 1.0, Silent(), 0.0)
    [message] = caller.flush(0.0)
    caller.validate()
    return message


def test_what_is_placed_stays_and_the_rest_travels() -> None:
    sent = b"x" * LARGE
    memory = memoryview(bytes(LARGE))
    message = submit(True, Placed(64, memory), sent, Placed(0, memory))
    assert [(group.ids, group.places) for group in message.groups] == [((1, 3), (64, 0)), ((2,), ())]
    assert message.frames == [sent]


def test_without_a_broker_that_shares_all_travels() -> None:
    sent = b"x" * LARGE
    memory = memoryview(bytes(LARGE))
    message = submit(False, Placed(64, memory), sent)
    assert [(group.ids, group.places) for group in message.groups] == [((1, 2), ())]
    assert message.frames == [memory, sent]
