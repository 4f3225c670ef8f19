"""The short way says and hears what the general way does."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

import msgpack
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.client.arrays import Forms, decode_outcome
from penstock.client.caller import Caller, Identity
from penstock.client.events import Complete, FromWorker
from penstock.client.short import Short
from penstock.wire.arena import Arena
from penstock.wire.codec import pack, pack_outcome, unpack
from penstock.wire.errors import BadMessage
from penstock.wire.events import BrokerLost, FromBroker
from penstock.wire.messages import (
    FROM_CALLER,
    ON_PUBLICATION,
    Answers,
    Batch,
    Models,
    Outcome,
    Results,
    Submit,
    Welcome,
)
from penstock.wire.models import READY, ModelSpec, ModelState, Tensor, TensorSpec
from penstock.wire.slots import PLACED_MIN_BYTES, Slot, Slots

EPOCH = 1 << 40
DTYPES = {"FP32": np.float32, "INT8": np.int8, "BOOL": np.bool_, "FP64": np.float64}
INPUTS = (TensorSpec("a", "FP32", (-1, -1)), TensorSpec("b", "INT8", (-1, 3)))
SPEC = ModelSpec("m", "1", "onnx", INPUTS, (TensorSpec("y", "FP32", (-1, 4)),), True, 1000)
OUTCOME = pack_outcome(Outcome("m", "1", (Tensor("y", "FP32", (1, 4), 0, 16),)))
WORKER = b"a worker"


class Sink:
    def __init__(self) -> None:
        self.answers: list[Complete] = []

    def complete(self, answer: Complete, /) -> None:
        self.answers.append(answer)

    def fail(self, error: object, /) -> None:
        raise AssertionError(error)


def make(epoch: int = EPOCH, shares: bool = True, spec: ModelSpec = SPEC) -> tuple[Caller, Forms, Short]:
    caller, forms = Caller(Identity(b"a caller", "", 1, True, "/run/here")), Forms()
    caller.handle(FromBroker(Welcome(epoch, "", shares)), 0.0)
    caller.handle(FromBroker(Models(epoch, [ModelState(spec.name, spec.version, READY, "", spec)])), 0.0)
    return caller, forms, Short(caller, forms)


def say(caller: Caller, forms: Forms, short: Short, inputs: Any, slots: Slots | None, limit_s: float) -> Submit:
    """What a request looks like that goes the short way, or the general one for want of it."""
    prepared = short.prepare("m", "", inputs, (), slots)
    assert prepared is not None
    plan, payload = prepared
    packed = short.submit(plan, payload, limit_s, Sink(), 0.0)
    assert packed is not None
    caller.validate()
    if isinstance(payload, Slot):
        assert bytes(payload.view) == b"".join(array.tobytes() for array in inputs.values())
        payload.give_back()
    message = unpack(packed, [], FROM_CALLER)
    assert isinstance(message, Submit)
    return message


def say_generally(caller: Caller, forms: Forms, inputs: Any, slots: Slots | None, limit_s: float) -> Submit:
    form, parts = forms.build(caller.find("m"), inputs, ())
    payload: Any = b"".join(parts)
    if slots is not None and len(payload) >= PLACED_MIN_BYTES:
        payload = slots.take(len(payload))
    caller.submit(form, payload, limit_s, Sink(), 0.0)
    [message] = caller.flush(0.0)
    if isinstance(payload, Slot):
        payload.give_back()
    again = unpack(pack(message), message.frames, FROM_CALLER)
    assert isinstance(again, Submit)
    return again


arrays = st.tuples(st.integers(1, 5), st.integers(1, 300), st.booleans()).map(
    lambda drawn: {
        "a": np.arange(drawn[0] * drawn[1] * 2, dtype=np.float32).reshape(drawn[0], -1)[:, :: 2 if drawn[2] else 1],
        "b": np.arange(drawn[0] * 3, dtype=np.int8).reshape(drawn[0], 3),
    }
)


@given(st.lists(arrays, min_size=1, max_size=4), st.lists(st.integers(1, 20), unique=True), st.floats(1e-7, 80_000.0))
def test_both_ways_say_the_same(asked: list[dict[str, Any]], acks: list[int], limit_s: float) -> None:
    arenas = [Arena(1 << 16, "test") for _ in range(2)]
    (one, one_forms, short), (other, other_forms, _) = make(), make()
    for caller in (one, other):
        for number in acks:
            caller.release(number, 0.0)
    for inputs in asked:
        said = say(one, one_forms, short, inputs, Slots(arenas[0]), limit_s)
        assert said == say_generally(other, other_forms, inputs, Slots(arenas[1]), limit_s)
        assert one.calls.keys() == other.calls.keys()
        assert [call.state for call in one.calls.values()] == [call.state for call in other.calls.values()]
        assert (one._acks, one._acknowledge_at) == (other._acks, other._acknowledge_at)
    for arena in arenas:
        assert arena.allocator.used == 0
        arena.close()


def test_a_new_broker_and_new_models_are_noticed() -> None:
    caller, forms, short = make()
    inputs = {"a": np.ones((1, 2), np.float32), "b": np.ones((1, 3), np.int8)}
    assert say(caller, forms, short, inputs, None, 1.0).epoch == EPOCH
    caller.handle(BrokerLost("gone"), 0.0) if not caller.calls else caller.calls.clear()
    caller.handle(BrokerLost("gone"), 0.0)
    prepared = short.prepare("m", "", inputs, (), None)
    assert prepared is not None
    assert short.submit(*prepared, 1.0, Sink(), 1.0) is None, "nobody is there"
    caller.handle(FromBroker(Welcome(EPOCH + 1, "", True)), 0.0)
    spec = SPEC._replace(version="2")
    caller.handle(FromBroker(Models(EPOCH + 1, [ModelState("m", "2", READY, "", spec)])), 0.0)
    said = say(caller, forms, short, inputs, None, 1.0)
    assert (said.epoch, said.groups[0].form.version) == (EPOCH + 1, "~2")


def test_what_was_remembered_holds_no_models_that_were() -> None:
    """Versions come and go for ever, and each is asked for by its number."""
    caller, _, short = make()
    inputs = {"a": np.ones((1, 2), np.float32), "b": np.ones((1, 3), np.int8)}
    models = []
    for version in map(str, range(10)):
        spec = SPEC._replace(version=version)
        caller.handle(FromBroker(Models(EPOCH, [ModelState("m", version, READY, "", spec)])), 0.0)
        assert short.prepare("m", version, inputs, (), None) is not None
        models.append(caller.models)
    others = [dict[str, Any]() for _ in models]
    assert [sys.getrefcount(each) for each in models[:-1]] == [sys.getrefcount(each) for each in others[:-1]]


@pytest.mark.parametrize(
    "inputs",
    [
        {"a": [[1.0]], "b": np.ones((1, 3), np.int8)},
        {"a": np.ones((1, 2), np.float32)},
        {"a": np.ones((1, 2), ">f4"), "b": np.ones((1, 3), np.int8)},
        {"a": np.ones((1, 2), np.float64), "b": np.ones((1, 3), np.int8)},
        {"a": np.ones((600, 2), np.float32), "b": np.ones((600, 3), np.int8)},
        [1, 2],
        None,
    ],
)
def test_what_is_not_plain_goes_the_general_way(inputs: Any) -> None:
    """The fifth has no slot to lie in."""
    assert make()[2].prepare("m", "", inputs, (), None) is None


def test_outputs_in_a_list_go_the_general_way() -> None:
    inputs = {"a": np.ones((1, 2), np.float32), "b": np.ones((1, 3), np.int8)}
    short = make()[2]
    assert short.prepare("m", "", inputs, ["y"], None) is None
    assert short.prepare("m", "", inputs, ("y",), None) is not None
    assert short.prepare("nosuch", "", inputs, (), None) is None


def test_what_waits_to_be_said_goes_first() -> None:
    caller, forms, short = make()
    inputs = {"a": np.ones((1, 2), np.float32), "b": np.ones((1, 3), np.int8)}
    form, parts = forms.build(SPEC, inputs, ())
    caller.submit(form, b"".join(parts), 1.0, Sink(), 0.0)
    prepared = short.prepare("m", "", inputs, (), None)
    assert prepared is not None
    assert short.submit(*prepared, 1.0, Sink(), 0.0) is None
    caller.validate()


# --- what is heard ---

plain: list[Any] = [1, 32, EPOCH, [[0, 16, OUTCOME, 55, [2], [], 33]], WORKER, [7, 1, "idle", 44, 40], bytes(range(16))]
odd = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 40),
    st.integers(-(1 << 63), (1 << 64) - 1),
    st.floats(),
    st.binary(max_size=20),
    st.text(max_size=8),
    st.lists(st.integers(0, 9), max_size=4),
    st.dictionaries(st.text(max_size=2), st.integers(0, 9), max_size=2),
    st.sampled_from(
        [OUTCOME, WORKER, "full", "nonsense", [[0, 16, OUTCOME, 55, [2], [], 33]] * 2, 16, 1.0, [2, 3], [64]]
    ),
)
places: list[tuple[int, ...]] = [(at,) for at in range(7)]
places += [(3, 0), *[(3, 0, at) for at in range(7)], (3, 0, 4, 0), *[(5, at) for at in range(4)]]


def change(path: tuple[int, ...], value: Any, whole: Any) -> Any:
    if not path:
        return value
    return [change(path[1:], value, each) if at == path[0] else each for at, each in enumerate(whole)]


def sent() -> tuple[Caller, Short, Sink]:
    """A caller with three requests under way, of which the third was cancelled."""
    caller, forms, short = make()
    sink = Sink()
    inputs = {"a": np.ones((1, 2), np.float32), "b": np.ones((1, 3), np.int8)}
    form, parts = forms.build(SPEC, inputs, ())
    for _ in range(3):
        caller.submit(form, b"".join(parts), 1.0, sink, 0.0)
    caller.flush(0.0)
    caller.cancel(3)
    caller.flush(0.0)
    return caller, short, sink


@given(st.lists(st.tuples(st.sampled_from(places), odd), max_size=2))
def test_both_ways_hear_the_same(changes: list[tuple[tuple[int, ...], Any]]) -> None:
    message = plain
    for path, value in changes:
        try:
            message = change(path, value, message)
        except TypeError:  # what was changed before has no such place any more
            continue
    head = msgpack.packb(message)
    (one, short, answered), (other, _, _) = sent(), sent()
    before = dict(one.calls), list(one._acks)
    taken = short.take(memoryview(head))
    one.validate()
    if not taken:
        assert (one.calls, one._acks, answered.answers) == (*before, []), "nothing has happened"
        assert changes, "what is plain goes the short way"
        return
    try:
        heard = unpack(head, (), ON_PUBLICATION)
    except BadMessage as error:
        raise AssertionError(f"only the short way takes it: {error}") from None
    assert isinstance(heard, Results)
    [command] = other.handle(FromWorker(heard), 0.0)
    assert isinstance(command, Complete)
    [answer] = answered.answers
    assert replace(answer, sink=command.sink) == command
    assert type(answer.batch) is Batch
    assert one.calls.keys() == other.calls.keys()
    assert one._acks == other._acks


@pytest.mark.parametrize(
    "head", [b"", b"\xc1", msgpack.packb(plain) + b"x", msgpack.packb({"abcdefg": 1}), b"\xc4\x07" + b"1" * 7]
)
def test_garbage_is_left_to_the_general_way(head: bytes) -> None:
    _, short, answered = sent()
    assert not short.take(head)
    assert not answered.answers


def test_plain_message_is_what_workers_send() -> None:
    message = Results(
        EPOCH, [Answers(0, 16, OUTCOME, 55, (2,), (), 33)], WORKER, Batch(7, 1, "idle", 44, 40), blob=bytes(range(16))
    )
    assert msgpack.unpackb(pack(message)) == plain


@pytest.mark.parametrize("copy", [True, False])
def test_outputs_are_the_same_however_they_are_read(copy: bool) -> None:
    """Some can be copied in one piece, some cannot."""
    layouts = [
        ("FP32", (1, 4), 0), ("INT8", (3,), 16), ("FP64", (2,), 24), ("FP64", (2,), 27), ("BOOL", (0, 2), 0),
        ("UINT64", (2, 2), 8),
    ]  # fmt: skip
    payload = bytes(range(64))
    for count in range(1, len(layouts) + 1):
        tensors = []
        for at, (datatype, shape, offset) in enumerate(layouts[:count]):
            size = int(np.prod(shape)) * {"FP32": 4, "INT8": 1, "FP64": 8, "BOOL": 1, "UINT64": 8}[datatype]
            tensors.append(Tensor(f"y{at}", datatype, shape, offset, size))
        _, outputs = decode_outcome(pack_outcome(Outcome("m", "1", tuple(tensors))), payload, copy)
        for tensor in tensors:
            array = outputs[tensor.name]
            assert array.tobytes() == payload[tensor.offset : tensor.offset + tensor.nbytes]
            assert array.shape == tensor.shape
            assert array.flags.writeable is copy
            assert array.flags.aligned or not copy
