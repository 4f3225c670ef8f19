"""Tensors that lie in their caller's arena."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import numpy as np
import pytest

from penstock.wire.arena import Arena, Mapping
from penstock.wire.errors import BAD_INPUT
from penstock.wire.events import ArenaCame, BrokerLost, Log
from penstock.wire.messages import INLINE_MAX_BYTES, Assign, Attached, Expect, Failure, Finished, Tasks
from penstock.worker.events import Command
from penstock.worker.model import Model

if TYPE_CHECKING:
    from tests.worker.conftest import Answer, Request, Requests, Talk

    StartTalk = Callable[..., Talk]

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
    talk.hear(ArenaCame(caller, mapped(arena)))
    return talk.tell(Expect(talk.epoch, (caller,), (), (caller,)))


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
    assert talk.said(expect(talk, A, arena), Attached) == [Attached(talk.epoch, A, True)]


def test_a_caller_whose_arena_did_not_come_is_not_served(talk: Talk) -> None:
    talk.subscribe(A)
    commands = talk.tell(Expect(talk.epoch, (A, B), (), (A,)))
    assert talk.said(commands, Attached) == []
    assert talk.said(talk.subscribe(B), Attached) == [Attached(talk.epoch, B, True)]
    commands = talk.hear(ArenaCame(A, None, "too many are mapped"))
    [logged] = [command for command in commands if isinstance(command, Log)]
    assert (logged.level, logged.fields) == ("error", {"reason": "too many are mapped"})
    assert talk.said(commands, Attached) == []


def test_an_arena_may_come_after_its_caller_is_expected(talk: Talk, arena: Arena) -> None:
    talk.subscribe(A)
    assert talk.said(talk.tell(Expect(talk.epoch, (A,), (), (A,))), Attached) == []
    assert talk.said(talk.hear(ArenaCame(A, mapped(arena))), Attached) == [Attached(talk.epoch, A, True)]


def test_an_arena_that_comes_after_its_caller_has_gone_is_not_held(talk: Talk, arena: Arena) -> None:
    talk.subscribe(A)
    talk.tell(Expect(talk.epoch, (A,), (), (A,)))
    talk.expect(gone=[A])
    assert talk.hear(ArenaCame(A, mapped(arena))) == []
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
    talk.hear(ArenaCame(A, mapped(newer)))
    talk.expect(gone=[A])
    talk.tell(Expect(talk.epoch, (A,), (), (A,)))
    assign(talk, A, row, put(newer, row.payload))
    [(_, answer)] = talk.heard(talk.finish(), A)
    assert not isinstance(answer, Failure)
    newer.close()


def test_arenas_that_an_old_broker_passed_on_are_forgotten(talk: Talk, arena: Arena) -> None:
    talk.hear(ArenaCame(A, mapped(arena)))
    talk.hear(BrokerLost("its process ended"))
    talk.join(8)
    talk.subscribe(A)
    assert talk.said(talk.tell(Expect(8, (A,), (), (A,))), Attached) == []


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
