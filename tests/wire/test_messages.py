"""The vocabulary itself: tags, checks and the limits of single fields."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest

from penstock.wire import messages
from penstock.wire.codec import pack, unpack
from penstock.wire.errors import BadMessage
from penstock.wire.messages import (
    FROM_CALLER,
    FROM_WORKER,
    MAX_NAME,
    MAX_REQUESTS,
    MAX_SENTENCE,
    TO_CALLER,
    Carrier,
    Freed,
    Message,
    Models,
    Refusal,
    Refusals,
    Submit,
    Welcome,
    WorkerHello,
    WorkerModels,
)
from penstock.wire.models import READY, UNAVAILABLE, ModelSpec, ModelState, TensorSpec
from tests.wire.strategies import KINDS, MESSAGES

BESIDE = {"epoch", "blob", "frames", "starts"}
X = TensorSpec("x", "FP32", (-1, 3))


def test_every_message_can_be_said_by_somebody() -> None:
    defined = {
        each
        for each in vars(messages).values()
        if isinstance(each, type) and issubclass(each, Message) and each not in (Message, Carrier)
    }
    assert defined == set(KINDS.values())


def test_no_two_kinds_share_a_tag() -> None:
    assert len({kind.TAG for kind in KINDS.values()}) == len(set(KINDS.values()))


@pytest.mark.parametrize("kind", MESSAGES, ids=lambda kind: kind.__name__)
def test_every_field_has_a_check(kind: type[Message]) -> None:
    own = [field for field in fields(kind) if field.name not in BESIDE]
    assert len(kind.CHECKS) == len(own) + issubclass(kind, Carrier)


def test_broker_and_peers_share_no_message_but_the_two_that_both_say() -> None:
    said = {**FROM_CALLER, **FROM_WORKER}
    assert {kind.__name__ for tag, kind in TO_CALLER.items() if tag in said} == {"Beat", "Bye"}


def spec(batchable: bool, *inputs: TensorSpec) -> ModelSpec:
    return ModelSpec("m", "1", "onnx", inputs, (X,), batchable, 8)


@pytest.mark.parametrize(
    ("state", "sentence"),
    [
        (ModelState("m", "1", READY, "", None), "a model that is READY has a spec"),
        (ModelState("m", "1", "FINE", "", None), "'FINE' is not one of"),
        (ModelState("m", "1", READY, "", spec(True)), "a model that is batchable has inputs"),
        (ModelState("m", "1", READY, "", spec(True, X, TensorSpec("y", "FP32", ()))), "each of them has a first"),
        (ModelState("m", "1", READY, "", spec(False, TensorSpec("y", "FP31", ()))), "'FP31' is not one of"),
        (ModelState("m" * (MAX_NAME + 1), "1", READY, "", spec(True, X)), "is not a text of at most 256 characters"),
        (ModelState("m", "1", UNAVAILABLE, "r" * (MAX_SENTENCE + 1), None), "is not a text of at most 4096"),
    ],
)
def test_a_model_that_could_not_be_served_is_refused(state: ModelState, sentence: str) -> None:
    for message, kinds in ((WorkerModels(1, (state,)), FROM_WORKER), (Models(1, (state,)), TO_CALLER)):
        with pytest.raises(BadMessage, match=sentence):
            unpack(pack(message), (), dict[int, type[Message]](kinds))


def test_a_model_without_inputs_runs_alone() -> None:
    message = WorkerModels(1, (ModelState("m", "1", READY, "", spec(False)),))
    assert unpack(pack(message), (), FROM_WORKER) == message


@pytest.mark.parametrize(
    "message",
    [
        Welcome(1, "n" * MAX_NAME),
        Refusals(1, (Refusal(1, "lost", "s" * MAX_SENTENCE, 0),) * MAX_REQUESTS),
        Submit(1, (), tuple(range(0, 4 * MAX_REQUESTS, 2)), tuple(range(MAX_REQUESTS)), starts=[]),
        WorkerHello(0, "", "c", 1, (), 1, ()),
    ],
    ids=lambda message: type(message).__name__,
)
def test_limits_are_included(message: Message) -> None:
    assert unpack(pack(message), (), KINDS) == message


@pytest.mark.parametrize(
    "message",
    [
        Welcome(1, "n" * (MAX_NAME + 1)),
        Refusals(1, (Refusal(1, "lost", "s" * (MAX_SENTENCE + 1), 0),)),
        Refusals(1, (Refusal(1, "lost", "", 0),) * (MAX_REQUESTS + 1)),
        Refusals(1, (Refusal(1, "bad luck", "", 0),)),
        Submit(1, (), tuple(range(0, 4 * MAX_REQUESTS + 4, 2))),
        Submit(1, (), (), tuple(range(MAX_REQUESTS + 1))),
        Submit(1, (), (), (-1,)),
        WorkerHello(0, "", "", 1, (), 1, ()),
    ],
    ids=lambda message: type(message).__name__,
)
def test_what_is_beyond_a_limit_is_refused(message: Message) -> None:
    with pytest.raises(BadMessage):
        unpack(pack(message), (), KINDS)


@pytest.mark.parametrize("count", [MAX_REQUESTS, MAX_REQUESTS + 1])
def test_requests_of_all_groups_together_are_limited(count: int) -> None:
    form = messages.Form("m", "1", 0, "", 1, 0, b"", b"")
    halves = [range(1, 4), range(4, count + 1)]
    message = Submit(1, [messages.Requests(form, tuple(ids), (1,) * len(ids)) for ids in halves])
    if count <= MAX_REQUESTS:
        assert unpack(pack(message), (), KINDS) == replace(message, groups=tuple(message.groups), starts=[0, 0])
        return
    with pytest.raises(BadMessage, match="at most 4096 requests"):
        unpack(pack(message), (), KINDS)


def test_a_first_frame_is_limited_before_it_is_looked_at() -> None:
    with pytest.raises(BadMessage, match="at most 100663296 bytes"):
        unpack(bytes(messages.MAX_HEAD_BYTES + 1), (), KINDS)


def test_a_group_knows_the_bytes_of_its_payloads() -> None:
    form = messages.Form("m", "1", 0, "", 1, 77, b"", b"")
    groups: list[Any] = [messages.Requests(form, (1,), (1,)), messages.Tasks(form, b"caller..", 1, 0, (1,), (1,))]
    assert [group.nbytes for group in groups] == [77, 77]


def test_what_is_freed_is_told_in_ranges() -> None:
    message = messages.Assign(1, (), (Freed(b"caller..", (1, 4, 9, 9)),), starts=[])
    assert unpack(pack(message), (), messages.TO_WORKER) == message
