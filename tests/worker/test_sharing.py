"""Tensors that lie in their caller's arena."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import numpy as np
import pytest
from onnx import TensorProto, helper

from penstock.wire.arena import Arena, Mapping
from penstock.wire.errors import BAD_INPUT
from penstock.wire.events import ArenaCame, BrokerLost, Log
from penstock.wire.messages import INLINE_MAX_BYTES, Assign, Attached, Failure, Finished, Results, Tasks
from penstock.wire.slots import Slots
from penstock.worker.events import Command, Publish, Unsubscribed
from penstock.worker.model import Model

if TYPE_CHECKING:
    from tests.worker.conftest import Answer, Ports, Request, Requests, Talk, Workshop

    StartTalk = Callable[..., Talk]

FLOAT, INT64 = TensorProto.FLOAT, TensorProto.INT64
A, B = b"caller a", b"caller b"
WIDTH = INLINE_MAX_BYTES // 4 + 1  # of a row that is too large to ride in a message


@pytest.fixture
def arena() -> Iterator[Arena]:
    arena = Arena(1 << 20, "test")
    yield arena
    arena.close()


@pytest.fixture
def row(requests: Requests, double: Model) -> Request:
    return requests.ask(double, {"x": np.arange(WIDTH, dtype=np.float32)[None]})


def mapped(arena: Arena) -> Mapping:
    return Mapping(os.dup(arena.fd))


def expect(talk: Talk, caller: bytes, arena: Arena) -> list[Command]:
    """A caller that shares its arena, as the broker tells of it."""
    talk.come(caller, mapped(arena))
    return talk.expect(caller, sharing=[caller])


def put(arena: Arena, payload: bytes) -> int:
    place = arena.take(len(payload))
    assert place is not None
    arena.view(place, len(payload))[:] = payload
    return place


def assign(talk: Talk, caller: bytes, request: Request, *places: int, attempt: int = 1) -> list[Command]:
    ids = tuple(range(1, len(places) + 1))
    tasks = Tasks(request.form, caller, attempt, 0, ids, (60_000_000,) * len(ids), places)
    return talk.tell(Assign(talk.epoch, [tasks]))


@pytest.fixture
def talk(start_talk: StartTalk, double: Model) -> Talk:
    talk: Talk = start_talk(double)
    talk.join()
    return talk


def test_a_caller_is_attached_once_its_arena_is_there(talk: Talk, arena: Arena) -> None:
    talk.subscribe(A)
    assert talk.said(expect(talk, A, arena), Attached) == [talk.attached(A)]


def test_a_caller_whose_arena_did_not_come_is_not_served(talk: Talk) -> None:
    talk.subscribe(A)
    commands = talk.expect(A, B, sharing=[A])
    assert talk.said(commands, Attached) == []
    assert talk.said(talk.subscribe(B), Attached) == [talk.attached(B)]
    commands = talk.hear(ArenaCame(A, talk.serials[A], None, "too many are mapped"))
    [logged] = [command for command in commands if isinstance(command, Log)]
    assert (logged.level, logged.fields) == ("error", {"reason": "too many are mapped"})
    assert talk.said(commands, Attached) == []


def test_an_arena_may_come_after_its_caller_is_expected(talk: Talk, arena: Arena) -> None:
    talk.subscribe(A)
    assert talk.said(talk.expect(A, sharing=[A]), Attached) == []
    assert talk.said(talk.hear(ArenaCame(A, talk.serials[A], mapped(arena))), Attached) == [talk.attached(A)]


def test_an_arena_that_comes_after_its_caller_has_gone_is_not_held(talk: Talk, arena: Arena) -> None:
    talk.subscribe(A)
    talk.expect(A, sharing=[A])
    talk.expect(gone=[A])
    assert talk.hear(ArenaCame(A, talk.serials[A], mapped(arena))) == []
    assert talk.core._arenas == {}


def test_requests_run_on_what_lies_there(talk: Talk, arena: Arena, row: Request, double: Model) -> None:
    expect(talk, A, arena)
    rows = [np.full((1, WIDTH), value, np.float32) for value in (1, 2, 3)]
    assign(talk, A, row, *(put(arena, each.tobytes()) for each in reversed(rows)))
    answers: dict[int, Answer] = {}
    while talk.batches:
        answers |= dict(talk.heard(talk.finish(), A))
    for number, value in ((1, 3), (2, 2), (3, 1)):
        answer = answers[number]
        assert not isinstance(answer, Failure)
        np.testing.assert_array_equal(answer["y"], rows[value - 1] * 2)


@pytest.mark.parametrize("place", [(1 << 20) - 1, 1 << 20, 2**64 - 1])
def test_places_outside_the_arena_are_an_answer(talk: Talk, arena: Arena, row: Request, place: int) -> None:
    expect(talk, A, arena)
    commands = assign(talk, A, row, put(arena, row.payload), place)
    answers = dict(talk.heard(commands, A))
    assert set(answers) == {1, 2}
    for answer in answers.values():
        assert isinstance(answer, Failure)
        assert answer.code == BAD_INPUT
        assert "do not lie where they are said to" in answer.message
    assert talk.done(commands) == [Finished(A, 1, 0, (1, 2))]
    assert not talk.batches


def test_places_of_a_caller_that_shares_nothing_are_an_answer(talk: Talk, arena: Arena, row: Request) -> None:
    expect(talk, A, arena)
    talk.expect(B)
    [(_, answer)] = talk.heard(assign(talk, B, row, 0), B)
    assert isinstance(answer, Failure)
    assert (answer.code, "shares none" in answer.message) == (BAD_INPUT, True)


def test_an_arena_goes_with_its_caller(talk: Talk, arena: Arena, row: Request) -> None:
    expect(talk, A, arena)
    talk.expect(gone=[A])
    talk.expect(A)
    [(_, answer)] = talk.heard(assign(talk, A, row, 0), A)
    assert isinstance(answer, Failure)


def test_a_batch_outlives_its_callers_arena(talk: Talk, arena: Arena, row: Request) -> None:
    expect(talk, A, arena)
    assign(talk, A, row, put(arena, row.payload))
    arena.close()
    talk.expect(gone=[A])
    talk.finish()
    assert talk.core.holds_nothing


def test_a_caller_that_comes_again_has_its_newest_arena(talk: Talk, arena: Arena, row: Request) -> None:
    """It is passed on before Expect says that the old one has gone."""
    expect(talk, A, arena)
    newer = Arena(1 << 20, "test")
    talk.come(A, mapped(newer))
    talk.expect(gone=[A])
    talk.expect(A, sharing=[A])
    assign(talk, A, row, put(newer, row.payload))
    [(_, answer)] = talk.heard(talk.finish(), A)
    assert not isinstance(answer, Failure)
    newer.close()


def test_arenas_that_an_old_broker_passed_on_are_forgotten(talk: Talk, arena: Arena) -> None:
    talk.come(A, mapped(arena))
    talk.hear(BrokerLost("its process ended"))
    talk.join(8)
    talk.subscribe(A)
    assert talk.said(talk.expect(A, sharing=[A]), Attached) == []


def test_payloads_are_not_copied_on_their_way_to_the_batch(talk: Talk, arena: Arena, row: Request) -> None:
    expect(talk, A, arena)
    place = put(arena, row.payload)
    assign(talk, A, row, place)
    [run] = talk.batches
    [payload] = run.batch.lots[0].payload
    assert (
        np.frombuffer(payload, np.uint8).ctypes.data
        == np.frombuffer(talk.core._arenas[A].view(place, len(row.payload)), np.uint8).ctypes.data
    )


# --- results in the worker's arena ---


@pytest.fixture
def slots() -> Iterator[Slots]:
    arena = Arena(1 << 20, "test")
    slots = Slots(arena)
    yield slots
    assert arena.allocator.used == 0, "a slot is lost"
    arena.close()


@pytest.fixture
def reading(start_talk: StartTalk, double: Model, pair: Model, alone: Model, slots: Slots) -> Talk:
    """A conversation in which caller a reads this worker's arena and caller b does not; both hear it."""
    talk = start_talk(double, pair, alone, slots=slots)
    talk.join()
    talk.subscribe(A)
    talk.subscribe(B)
    talk.expect(A, B, reading=[A])
    return talk


def ones(requests: Requests, model: Model, width: int, rows: int = 1, value: float = 1.0) -> Request:
    return requests.ask(model, {"x": np.full((rows, width), value, np.float32)})


def published(talk: Talk, commands: list[Command], caller: bytes) -> Results:
    [publish] = [command for command in commands if isinstance(command, Publish) and command.caller == caller]
    return talk.requests.unpack(publish.head, publish.frames)


def test_large_results_lie_in_the_arena_until_they_are_acknowledged(
    reading: Talk, requests: Requests, double: Model, slots: Slots
) -> None:
    reading.assign(A, [1, 2, 3], ones(requests, double, 600))
    commands = reading.finish()
    message = published(reading, commands, A)
    [group] = message.groups
    assert (len(group.places), message.blob, list(message.frames)) == (3, b"", [])
    for _, answer in reading.heard(commands, A):
        assert not isinstance(answer, Failure)
        np.testing.assert_array_equal(answer["y"], np.full((1, 600), 2))
    assert reading.core.kept_bytes > 3 * 2400
    assert reading.done(commands) == [Finished(A, 1, 2400, (1, 2, 3))]
    reading.free(A, 1, 2)
    assert slots.arena.allocator.slots == 1
    reading.free(A, 3, 3)
    assert slots.arena.allocator.slots == 0
    assert reading.core.kept_bytes == 0


def test_the_model_writes_them_there(
    reading: Talk, requests: Requests, double: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(feeds: object) -> None:
        raise AssertionError("the outputs were made elsewhere, to be copied")

    monkeypatch.setattr(double, "run", run)
    reading.assign(A, [1, 2], ones(requests, double, 600))
    [group] = published(reading, reading.finish(), A).groups
    assert group.places[1] - group.places[0] == 2400
    reading.free(A, 1, 2)


def test_small_results_and_those_of_others_travel(
    reading: Talk, requests: Requests, double: Model, slots: Slots
) -> None:
    reading.assign(A, [1], ones(requests, double, 5))
    [group] = published(reading, reading.finish(), A).groups
    assert group.places == ()
    reading.assign(B, [1], ones(requests, double, 600))
    [group] = published(reading, reading.finish(), B).groups
    assert group.places == ()
    assert slots.arena.allocator.used == 0


def test_one_batch_for_who_reads_and_who_does_not(
    reading: Talk, requests: Requests, double: Model, slots: Slots
) -> None:
    blocker = ones(requests, double, 3)
    reading.assign(A, [1], blocker)
    reading.assign(A, [2, 3], ones(requests, double, 600, value=3.0))
    reading.assign(B, [4], ones(requests, double, 600, value=4.0))
    reading.assign(A, [5], ones(requests, double, 600, rows=2, value=5.0))
    reading.finish()
    commands = reading.finish()
    places = [group.places != () for group in published(reading, commands, A).groups]
    assert places == [True, True]
    assert [group.places for group in published(reading, commands, B).groups] == [()]
    values = {number: answer["y"] for caller in (A, B) for number, answer in reading.heard(commands, caller)}  # type: ignore[call-overload]
    for number, value, rows in ((2, 6, 1), (3, 6, 1), (4, 8, 1), (5, 10, 2)):
        np.testing.assert_array_equal(values[number], np.full((rows, 600), value))
    reading.free(A, 1, 5)
    reading.free(B, 4, 4)
    assert slots.arena.allocator.used == 0


def test_outputs_of_several_requests_lie_side_by_side_for_each(
    start_talk: StartTalk, workshop: Workshop, requests: Requests, slots: Slots
) -> None:
    nodes = [helper.make_node("Add", ["x", "x"], ["s"]), helper.make_node("Neg", ["x"], ["n"])]
    ports: tuple[Ports, Ports] = {"x": (FLOAT, ["N", 700])}, {"s": (FLOAT, ["N", 700]), "n": (FLOAT, ["N", 700])}
    model = workshop.make(nodes, *ports, name="two", max_batch_size=8)
    talk = start_talk(model, slots=slots)
    talk.join()
    talk.expect(A, reading=[A])
    for ids in ([1], [2, 3]):
        talk.assign(A, ids, ones(requests, model, 700))
        commands = talk.finish()
        [group] = published(talk, commands, A).groups
        assert group.nbytes == 2 * 2800
        assert len(group.places) == len(ids)
        for _, answer in talk.heard(commands, A):
            assert not isinstance(answer, Failure)
            np.testing.assert_array_equal(answer["s"], np.full((1, 700), 2))
            np.testing.assert_array_equal(answer["n"], np.full((1, 700), -1))
    talk.free(A, 1, 3)


def test_a_shape_that_was_declared_wrongly_is_found_out(
    start_talk: StartTalk, workshop: Workshop, requests: Requests, slots: Slots
) -> None:
    """The output is said to be as wide as the input, and is not: it comes all the same, from then on by copying."""
    node = helper.make_node("Compress", ["x", "which"], ["y"], axis=1)
    which = np.array([True, False] * 400)
    model = workshop.make(
        [node], {"x": (FLOAT, ["N", "M"])}, {"y": (FLOAT, ["N", "M"])}, {"which": which}, name="half", max_batch_size=8
    )
    talk = start_talk(model, slots=slots)
    talk.join()
    talk.expect(A, reading=[A])
    for number in (1, 2):
        talk.assign(A, [number], ones(requests, model, 1600))
        commands = talk.finish()
        [(_, answer)] = talk.heard(commands, A)
        assert not isinstance(answer, Failure)
        assert answer["y"].shape == (1, 400)
    assert model.foresee([np.ones((1, 1600), np.float32)], [0]).nbytes == 0
    talk.free(A, 1, 2)


def test_a_full_arena_makes_results_travel(reading: Talk, requests: Requests, double: Model, slots: Slots) -> None:
    whole = slots.take(slots.arena.size)
    assert whole is not None
    reading.assign(A, [1], ones(requests, double, 600))
    commands = reading.finish()
    assert [group.places for group in published(reading, commands, A).groups] == [()]
    [(_, answer)] = reading.heard(commands, A)
    assert not isinstance(answer, Failure)
    whole.give_back()


def test_failures_leave_no_slot_behind(
    start_talk: StartTalk, workshop: Workshop, requests: Requests, slots: Slots
) -> None:
    node = helper.make_node("Gather", ["table", "i"], ["y"])
    table = np.ones((4, 700), np.float32)
    ports: tuple[Ports, Ports] = {"i": (INT64, ["N"])}, {"y": (FLOAT, ["N", 700])}
    model = workshop.make([node], *ports, {"table": table}, name="rows", max_batch_size=16)
    talk = start_talk(model, slots=slots)
    talk.join()
    talk.expect(A, reading=[A])
    talk.assign(A, [1], requests.ask(model, {"i": np.array([1])}))
    talk.assign(A, [2], requests.ask(model, {"i": np.array([2])}))
    talk.assign(A, [3], requests.ask(model, {"i": np.array([9])}))
    talk.finish()
    answers = dict(talk.heard(talk.finish(), A))
    assert isinstance(answers[3], Failure)
    assert not isinstance(answers[2], Failure)
    talk.free(A, 1, 3)


def test_what_nobody_wants_any_more_leaves_no_slot_behind(
    reading: Talk, requests: Requests, double: Model, slots: Slots
) -> None:
    reading.assign(A, [1], ones(requests, double, 600))
    reading.expect(gone=[A])
    reading.hear(Unsubscribed(A))
    reading.finish()
    assert slots.arena.allocator.used == 0
    reading.expect(A, reading=[A])
    reading.subscribe(A)
    reading.assign(A, [2], ones(requests, double, 600))
    reading.join(8)
    reading.finish()
    assert slots.arena.allocator.slots == 1, "its caller is about to join the new broker too"
    reading.hear(Unsubscribed(A))
    assert slots.arena.allocator.used == 0


def test_a_stopped_caller_reads_on_where_it_was(reading: Talk, requests: Requests, double: Model, slots: Slots) -> None:
    """The broker has not heard of it for long and takes it for gone; its connection to this worker is still there."""
    reading.assign(A, [1], ones(requests, double, 600))
    reading.finish()
    reading.expect(gone=[A])
    assert slots.arena.allocator.slots == 1
    assert reading.heard(reading.expect(A, reading=[A]), A) != []
    reading.free(A, 1, 1)
    assert slots.arena.allocator.slots == 0


def test_a_killed_caller_keeps_nothing(reading: Talk, requests: Requests, double: Model, slots: Slots) -> None:
    for first, second in ((Unsubscribed(A), None), (None, Unsubscribed(A))):
        reading.expect(A, reading=[A])
        reading.assign(A, [1], ones(requests, double, 600))
        reading.finish()
        if first is not None:
            reading.hear(first)
        assert slots.arena.allocator.slots == 1
        reading.expect(gone=[A])
        if second is not None:
            reading.hear(second)
        assert slots.arena.allocator.slots == 0
        reading.subscribe(A)


def test_a_broker_that_restarts_between_done_and_acknowledgment(
    reading: Talk, requests: Requests, double: Model, slots: Slots
) -> None:
    """Nobody knows of the result but this worker and its caller, which may have read it, or be reading it still."""
    reading.assign(A, [1], ones(requests, double, 600))
    reading.finish()
    reading.hear(BrokerLost("its process ended"))
    reading.join(8)
    assert slots.arena.allocator.slots == 1
    [(number, answer)] = reading.heard(reading.expect(A, reading=[A]), A)
    assert (number, isinstance(answer, Failure)) == (1, False)
    reading.free(A, 1, 1)  # the caller acknowledges it to the new broker, which passes that on
    assert slots.arena.allocator.slots == 0
