"""Tensors in shared memory: a caller's own in its arena, and results in those of workers."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from penstock.client.arrays import decode_outcome
from penstock.client.caller import Caller, Identity
from penstock.client.events import Command, FromWorker, Hear
from penstock.wire.codec import pack, pack_outcome, unpack
from penstock.wire.errors import INTERNAL, BadMessage
from penstock.wire.events import ArenaCame, BrokerFound, BrokerLost, FromBroker, Log
from penstock.wire.messages import (
    COMPLETE,
    INLINE_MAX_BYTES,
    ON_PUBLICATION,
    Answers,
    Form,
    Outcome,
    Results,
    Submit,
    Welcome,
    WorkerAddress,
    Workers,
)
from penstock.wire.messages import Batch as BatchInfo
from penstock.wire.models import Tensor
from penstock.wire.slots import PLACED_MIN_BYTES, Placed

if TYPE_CHECKING:
    from tests.client.conftest import Conversation

LARGE = INLINE_MAX_BYTES + 1
WORKER, OTHER = b"a worker", b"another."
BATCH = BatchInfo(serial=5, rows=3, reason="idle", compute_us=700, model_us=600)


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


# --- results in workers' arenas ---


class Memory:
    """A worker's arena, as bytes."""

    def __init__(self, content: bytes) -> None:
        self.content = content

    def view(self, offset: int, nbytes: int) -> memoryview:
        if offset + nbytes > len(self.content):
            raise BadMessage("outside")
        return memoryview(self.content)[offset : offset + nbytes]

    def views(self, offsets: Sequence[int], nbytes: int) -> list[memoryview]:
        return [self.view(offset, nbytes) for offset in offsets]

    def copies(self, offsets: Sequence[int], nbytes: int) -> list[bytes] | None:
        if max(offsets) + nbytes > len(self.content):
            return None
        return [self.content[offset : offset + nbytes] for offset in offsets]


MEMORY = Memory(b"".join(b"%4d" % number for number in range(100)))


def hears(commands: Sequence[Command]) -> list[tuple[str, bool]]:
    return [(command.endpoint, command.on) for command in commands if isinstance(command, Hear)]


def name_workers(talk: Conversation, *workers: bytes, sharing: Sequence[bytes] = ()) -> list[tuple[str, bool]]:
    """The broker tells of workers; what the caller begins and ends to hear."""
    addresses = []
    for worker in workers:
        known = talk.caller._sharing.get(worker, 0)
        serial = (known or introduce(worker)) if worker in sharing else 0
        addresses.append(WorkerAddress(worker, f"ipc://{worker.decode()}", serial))
    return hears(talk.broker(Workers(talk.caller.membership.epoch, addresses)))


_serials = itertools.count(1)
_begun: dict[bytes, int] = {}


def introduce(worker: bytes) -> int:
    """The number of a worker's next introduction to the caller, or of one of which only the arena has come."""
    return _begun.pop(worker, 0) or next(_serials)


def give(talk: Conversation, worker: bytes, reason: str = "") -> list[Command]:
    """The broker passes a worker's arena on: as the last Workers said, or the next one will say."""
    serial = talk.caller._arrivals._wanted.get(worker, 0)
    if not serial:
        serial = _begun[worker] = next(_serials)
    return talk.hear(ArenaCame(worker, serial, None if reason else MEMORY, reason))


def publish(
    talk: Conversation, *ids: int, places: Sequence[int] | None = None, worker: bytes = WORKER
) -> list[Command]:
    """Results of four bytes each, request 7's in place 28, unless they are said to lie elsewhere."""
    answers = Answers(COMPLETE, 4, b"outcome", 1500, ids, tuple(places or [4 * number for number in ids]))
    message = unpack(pack(Results(3, [answers], worker, BATCH)), (), ON_PUBLICATION)
    assert isinstance(message, Results)
    return talk.hear(FromWorker(message))


@pytest.fixture
def sharing(joined: Conversation) -> Conversation:
    """A conversation with a caller that reads WORKER's arena, and copies less than four bytes."""
    joined.caller.identity = replace(joined.caller.identity, copied_bytes_max=3)
    name_workers(joined, WORKER, sharing=[WORKER])
    give(joined, WORKER)
    return joined


@pytest.fixture
def copying(sharing: Conversation) -> Conversation:
    """One that copies as many."""
    sharing.caller.identity = replace(sharing.caller.identity, copied_bytes_max=4)
    return sharing


def test_a_worker_that_shares_is_heard_once_its_arena_is_here(joined: Conversation) -> None:
    assert name_workers(joined, WORKER, OTHER, sharing=[WORKER]) == [("ipc://another.", True)]
    assert hears(give(joined, WORKER)) == [("ipc://a worker", True)]


def test_an_arena_may_come_before_its_worker_is_named(joined: Conversation) -> None:
    assert hears(give(joined, WORKER)) == []
    assert name_workers(joined, WORKER, sharing=[WORKER]) == [("ipc://a worker", True)]


def test_a_worker_whose_arena_cannot_be_mapped_is_not_heard(joined: Conversation) -> None:
    name_workers(joined, WORKER, sharing=[WORKER])
    commands = give(joined, WORKER, "too many are mapped")
    assert hears(commands) == []
    [logged] = [command for command in commands if isinstance(command, Log)]
    assert (logged.level, logged.fields) == ("error", {"reason": "too many are mapped"})


def test_an_arena_goes_with_its_worker_and_comes_with_it_again(sharing: Conversation) -> None:
    give(sharing, WORKER)  # passed on anew before this caller reads that it had gone
    assert name_workers(sharing) == [("ipc://a worker", False)]
    assert sharing.caller._arenas == {}
    assert name_workers(sharing, WORKER, sharing=[WORKER]) == [("ipc://a worker", True)]


def test_a_result_is_read_where_it_lies_and_acknowledged_when_it_has_been(
    sharing: Conversation, form: Callable[..., Form]
) -> None:
    first, second = sharing.send(form(), 2)
    publish(sharing, 1, 2)
    assert (first.payload, second.payload) == (b"   1", b"   2")
    assert sharing.acknowledged() == []
    sharing.caller.release(first.answers[0].held, sharing.now)
    assert sharing.acknowledged() == [1]
    sharing.caller.release(second.answers[0].held, sharing.now)
    sharing.pass_time(0.01)  # even if nothing else is to be said
    assert [message.acks for message in sharing.sent][-1] == (2, 2)


def test_what_comes_again_while_it_is_read_is_not_acknowledged(
    sharing: Conversation, form: Callable[..., Form]
) -> None:
    [end] = sharing.send(form())
    publish(sharing, 1)
    publish(sharing, 1)
    assert end.calls == 1
    assert sharing.acknowledged() == []
    sharing.caller.release(1, sharing.now)
    assert sharing.acknowledged() == [1]


def test_a_late_result_is_acknowledged_and_not_read(sharing: Conversation, form: Callable[..., Form]) -> None:
    number, end = sharing.submit(form())
    sharing.flush()
    sharing.caller.cancel(number)
    publish(sharing, number, places=[1 << 40])
    assert end.calls == 0
    assert sharing.acknowledged() == [number]


def test_a_result_that_lies_outside_its_workers_arena_is_an_error(
    sharing: Conversation, form: Callable[..., Form]
) -> None:
    first, second = sharing.send(form(), 2)
    publish(sharing, 1, 2, places=[397, 8])
    assert (first.error.code, "does not lie where it says" in first.error.message) == (INTERNAL, True)
    assert second.payload == b"   2"
    assert sharing.acknowledged() == [1]


def test_small_results_are_copied_and_acknowledged_at_once(copying: Conversation, form: Callable[..., Form]) -> None:
    first, second = copying.send(form(), 2)
    publish(copying, 1, 2)
    assert (first.payload, second.payload) == (b"   1", b"   2")
    assert [type(end.payload) for end in (first, second)] == [bytes, bytes]
    assert [end.answers[0].held for end in (first, second)] == [0, 0]
    assert copying.acknowledged() == [1, 2]
    publish(copying, 1, 2)
    assert copying.acknowledged() == [1, 2], "it has not been heard"
    assert (first.calls, second.calls) == (1, 1)


def test_small_results_for_nobody_are_acknowledged(copying: Conversation, form: Callable[..., Form]) -> None:
    [end] = copying.send(form())
    publish(copying, 1, 7)
    assert end.payload == b"   1"
    assert copying.acknowledged() == [1, 7]


def test_of_small_results_one_that_lies_outside_is_an_error(copying: Conversation, form: Callable[..., Form]) -> None:
    first, second = copying.send(form(), 2)
    publish(copying, 1, 2, places=[397, 8])
    assert (first.error.code, "does not lie where it says" in first.error.message) == (INTERNAL, True)
    assert second.payload == b"   2"
    copying.caller.release(second.answers[0].held, copying.now)
    assert copying.acknowledged() == [1, 2]


def test_small_results_of_a_worker_whose_arena_is_not_here_are_waited_for(
    copying: Conversation, form: Callable[..., Form]
) -> None:
    [end] = copying.send(form())
    publish(copying, 1, worker=OTHER)
    assert (end.calls, copying.acknowledged()) == (0, [])


def test_a_result_of_a_worker_whose_arena_is_not_here_is_waited_for(
    sharing: Conversation, form: Callable[..., Form]
) -> None:
    """It is published again when this caller subscribes anew, with the arena there."""
    [end] = sharing.send(form())
    publish(sharing, 1, worker=OTHER)
    assert end.calls == 0
    assert sharing.acknowledged() == []
    name_workers(sharing, OTHER, sharing=[OTHER])
    give(sharing, OTHER)
    publish(sharing, 1, worker=OTHER)
    assert end.payload == b"   1"


def test_what_is_read_outlives_a_broker(sharing: Conversation, form: Callable[..., Form]) -> None:
    """A broker dies between DONE and the acknowledgment: the worker publishes again for the next one."""
    first, second = sharing.send(form(), 2)
    publish(sharing, 1)
    sharing.hear(BrokerLost("its process ended"))
    assert (first.payload, second.calls) == (b"   1", 0)
    sharing.hear(BrokerFound())
    sharing.join(10)
    assert name_workers(sharing) == []  # it may be about to join,
    assert name_workers(sharing, WORKER, sharing=[WORKER]) == []  # and is heard all the time: its arena is still here
    publish(sharing, 1, 2)
    assert second.payload == b"   2"
    sharing.caller.release(2, sharing.now)
    assert sharing.acknowledged() == [2]
    sharing.caller.release(1, sharing.now)
    assert sharing.acknowledged() == [1]


def test_what_was_read_while_there_was_no_broker_is_acknowledged_when_it_comes_again(
    sharing: Conversation, form: Callable[..., Form]
) -> None:
    [end] = sharing.send(form())
    publish(sharing, 1)
    sharing.hear(BrokerLost("its process ended"))
    sharing.caller.release(end.answers[0].held, sharing.now)
    sharing.join(10)
    publish(sharing, 1)
    assert sharing.acknowledged() == [1]


def test_arenas_that_a_lost_broker_passed_on_are_not_taken_for_those_of_the_next(joined: Conversation) -> None:
    give(joined, WORKER)
    joined.hear(BrokerLost("its process ended"))
    joined.join(10)
    assert name_workers(joined, WORKER, sharing=[WORKER]) == []
    assert hears(give(joined, WORKER)) == [("ipc://a worker", True)]


def test_an_arena_may_overtake_the_welcome(joined: Conversation) -> None:
    """They travel over different connections."""
    joined.hear(BrokerLost("its process ended"))
    give(joined, WORKER)
    joined.join(10)
    assert name_workers(joined, WORKER, sharing=[WORKER]) == [("ipc://a worker", True)]


# --- outputs that are borrowed ---


def outcome_of(*tensors: Tensor) -> bytes:
    return pack_outcome(Outcome("m", "1", tensors))


def test_borrowed_outputs_are_let_go_of_with_the_last_array_over_them() -> None:
    let_go: list[bool] = []
    payload = memoryview(np.arange(8, dtype=np.float32).tobytes())
    body = outcome_of(Tensor("a", "FP32", (2, 2), 0, 16), Tensor("b", "FP32", (4,), 16, 16))
    _, outputs = decode_outcome(body, payload, copy=False, let_go=lambda: let_go.append(True))
    part = outputs["b"][1:].reshape(3, 1)
    assert not outputs["a"].flags.writeable
    np.testing.assert_array_equal(outputs["a"], [[0, 1], [2, 3]])
    del outputs
    assert not let_go
    np.testing.assert_array_equal(part, [[5], [6], [7]])
    del part
    assert let_go == [True]


def test_copied_outputs_let_go_at_once() -> None:
    let_go: list[bool] = []
    payload = memoryview(np.arange(4, dtype=np.float32).tobytes())
    body = outcome_of(Tensor("a", "FP32", (4,), 0, 16))
    _, outputs = decode_outcome(body, payload, let_go=lambda: let_go.append(True))
    assert let_go == [True]
    outputs["a"][:] = 7


def test_what_cannot_be_decoded_is_let_go_of() -> None:
    let_go: list[bool] = []
    with pytest.raises(BadMessage):
        decode_outcome(b"\xc1", memoryview(bytes(16)), copy=False, let_go=lambda: let_go.append(True))
    assert let_go == [True]


def test_a_worker_is_heard_as_long_as_something_is_read_in_its_memory(
    sharing: Conversation, form: Callable[..., Form]
) -> None:
    """To end the connection would tell it that its reader has gone; a new broker has yet to hear of it."""
    [end] = sharing.send(form())
    publish(sharing, 1)
    sharing.hear(BrokerLost("its process ended"))
    sharing.join(10)
    assert name_workers(sharing) == []
    assert name_workers(sharing, OTHER) == [("ipc://another.", True)]
    assert hears(sharing.live(20)) == []
    sharing.caller.release(end.answers[0].held, sharing.now)
    assert hears(sharing.pass_time(0.2)) == [("ipc://a worker", False)]
    assert sharing.acknowledged() == []  # said before, when it was let go of


def test_a_worker_of_the_last_broker_is_heard_for_as_long_as_it_may_be_about_to_join(sharing: Conversation) -> None:
    """It may be about to publish what it ran meanwhile."""
    sharing.hear(BrokerLost("its process ended"))
    sharing.pass_time(60.0)
    sharing.join(10)
    assert name_workers(sharing) == []
    assert hears(sharing.live(9)) == []
    assert hears(sharing.live(2)) == [("ipc://a worker", False)]


def test_a_large_request_is_sent_again_as_the_next_broker_can_have_it(
    sharing: Conversation, form: Callable[..., Form]
) -> None:
    placed: Any = Placed(128, memoryview(bytes([7]) * PLACED_MIN_BYTES))
    sharing.submit(form(nbytes=PLACED_MIN_BYTES), placed)
    for epoch, shares in (10, True), (11, False), (12, True):
        sharing.hear(BrokerLost("its process ended"))
        sharing.broker(Welcome(epoch, "caller", shares))
        [message] = sharing.flush()
        [group] = message.groups
        assert (group.ids, group.places) == ((1,), (128,) if shares else ())
        assert message.blob == (b"" if shares else bytes(placed.view))


def test_a_worker_that_is_named_again_while_it_is_read_is_heard_on(
    sharing: Conversation, form: Callable[..., Form]
) -> None:
    [end] = sharing.send(form())
    publish(sharing, 1)
    assert name_workers(sharing) == []
    assert name_workers(sharing, WORKER, sharing=[WORKER]) == []
    give(sharing, WORKER)
    sharing.caller.release(end.answers[0].held, sharing.now)
    assert hears(sharing.pass_time(0.2)) == []
