"""A batch, from its requests' bytes to its callers' answers: every request gets what the model alone would give it."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from penstock.wire.arena import Arena
from penstock.wire.arena import Mapping as Mapped
from penstock.wire.codec import unpack_failure
from penstock.wire.errors import BAD_INPUT, MODEL_FAILED, UNAVAILABLE, PenstockError
from penstock.wire.messages import INLINE_MAX_BYTES, Failure
from penstock.wire.tensors import DTYPES, Array, from_bf16, to_bf16
from penstock.worker.batcher import Batch
from penstock.worker.cuda import CudaError
from penstock.worker.execute import execute, failure_answers
from penstock.worker.lots import Lot
from penstock.worker.model import Model, is_device_failure, is_want_of_memory
from penstock.worker.plan import Plan

if TYPE_CHECKING:
    from tests.worker.conftest import Answer, Ports, Requests, Workshop

T = TensorProto
A, B = b"caller a", b"caller b"
LARGE = INLINE_MAX_BYTES // 4 + 1  # float32 numbers that do not ride inside a message

KINDS = {
    "BOOL": T.BOOL, "UINT8": T.UINT8, "UINT16": T.UINT16, "UINT32": T.UINT32, "UINT64": T.UINT64, "INT8": T.INT8,
    "INT16": T.INT16, "INT32": T.INT32, "INT64": T.INT64, "FP16": T.FLOAT16, "FP32": T.FLOAT, "FP64": T.DOUBLE,
}  # fmt: skip


def numbers(*shape: int, start: int = 1) -> Array:
    return np.arange(start, start + int(np.prod(shape)), dtype=np.float32).reshape(shape)


def same(answer: Answer, expected: Mapping[str, Array]) -> None:
    assert not isinstance(answer, Failure), answer
    assert answer.keys() == expected.keys()
    for name, array in expected.items():
        assert answer[name].shape == array.shape
        np.testing.assert_array_equal(answer[name], array)


class Watched:
    """A model whose inputs are looked at as they come in."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.spec = model.spec
        self.seen: list[list[Array]] = []

        self.staging = model.staging

    def run(self, feeds: Sequence[Array]) -> list[Array]:
        self.seen.append(list(feeds))
        return self.model.run(feeds)


# --- where inputs lie ---


def seen(requests: Requests, model: Model, lots: Sequence[Lot]) -> Array:
    """The one input that the model gets for a batch."""
    watched: Any = Watched(model)
    requests.run(watched, lots)
    [[array]] = watched.seen
    assert isinstance(array, np.ndarray)
    return array


@pytest.mark.parametrize(("before", "count", "is_view"), [(0, 1, True), (64, 3, True), (4, 2, True), (1, 1, False)])
def test_requests_that_lie_as_the_model_wants_them_are_not_copied(
    requests: Requests, double: Model, before: int, count: int, is_view: bool
) -> None:
    asked = [requests.ask(double, {"x": numbers(2, 3, start=at)}) for at in range(count)]
    lot = requests.lot(double, asked, range(count), before=before)
    array = seen(requests, double, [lot])
    assert np.shares_memory(array, np.frombuffer(lot.payload, np.uint8)) == is_view
    assert array.flags.aligned
    np.testing.assert_array_equal(array, np.concatenate([numbers(2, 3, start=at) for at in range(count)]))


@pytest.mark.parametrize(("kind", "is_view"), [(TensorProto.FLOAT, True), (TensorProto.INT64, False)])
def test_what_may_be_an_index_is_copied_out_of_memory_that_others_write(
    workshop: Workshop, requests: Requests, kind: int, is_view: bool
) -> None:
    """ONNX Runtime looks at an index twice, to check it and to use it."""
    model = workshop.unary("Neg", kind, ["N", 2])
    x = np.arange(60).reshape(30, 2).astype(np.float32 if kind == TensorProto.FLOAT else np.int64)
    request = requests.ask(model, {"x": x})
    arena = Arena(1 << 14, "test")
    arena.view(64, x.nbytes)[:] = request.payload
    for shared in True, False:
        lot = requests.lot(model, [request], [1])
        if shared:
            lot.payload = (Mapped(os.dup(arena.fd)).view(64, x.nbytes),)
        piece = lot.payload[0] if shared else lot.payload
        array = seen(requests, model, [lot])
        assert np.shares_memory(array, np.frombuffer(piece, np.uint8)) == (is_view or not shared)
        np.testing.assert_array_equal(array, x)
    arena.close()


def test_one_frame_is_not_copied_and_two_are(requests: Requests, double: Model) -> None:
    asked = [requests.ask(double, {"x": numbers(1, LARGE, start=at)}) for at in range(2)]
    for count in 1, 2:
        lot = requests.lot(double, asked[:count], range(count))
        array = seen(requests, double, [lot])
        assert np.shares_memory(array, np.frombuffer(lot.payload[0], np.uint8)) == (count == 1)
        np.testing.assert_array_equal(array, np.concatenate([numbers(1, LARGE, start=at) for at in range(count)]))


def test_bytes_between_tensors_are_passed_over(requests: Requests, pair: Model) -> None:
    inputs: list[dict[str, Array]] = [{"b": np.array([at]), "a": numbers(1, 3, start=at)} for at in range(3)]
    lot = requests.lot(pair, [requests.ask(pair, each, gap=5) for each in inputs], [1, 2, 3], before=3)
    answers = requests.answers(requests.run(pair, [lot]))[A]
    for number, each in zip([1, 2, 3], inputs, strict=True):
        same(answers[number], requests.expected(pair, each))


# --- who gets what ---


def test_callers_get_their_own_rows(requests: Requests, double: Model) -> None:
    shapes = {1: 2, 2: 1, 3: 3}
    inputs = {number: numbers(rows, 2, start=number * 10) for number, rows in shapes.items()}
    lots = [
        requests.lot(double, [requests.ask(double, {"x": inputs[number]})], [number], caller=caller)
        for number, caller in ((1, A), (2, B), (3, A))
    ]
    executed = requests.run(double, lots)
    answers = requests.answers(executed)
    assert {caller: list(each) for caller, each in answers.items()} == {A: [1, 3], B: [2]}
    for caller, number in ((A, 1), (B, 2), (A, 3)):
        same(answers[caller][number], {"y": inputs[number] * 2})
    assert (executed.info.rows, executed.info.reason, executed.info.serial) == (6, "full", 1)


def test_requests_of_one_lot_share_one_answer_head(requests: Requests, double: Model) -> None:
    asked = [requests.ask(double, {"x": numbers(2, 2, start=at)}) for at in range(3)]
    executed = requests.run(double, [requests.lot(double, asked, [7, 8, 9])])
    [group] = executed.publications[A].groups
    assert (group.ids, group.nbytes) == ((7, 8, 9), 16)
    answers = requests.answers(executed)[A]
    for at, number in enumerate([7, 8, 9]):
        same(answers[number], {"y": numbers(2, 2, start=at) * 2})


def test_outputs_come_as_they_were_asked_for(requests: Requests, pair: Model) -> None:
    inputs = {"a": numbers(2, 3), "b": np.array([4, 5])}
    everything = requests.expected(pair, inputs)
    for outputs in (), ("t",), ("t", "s"), ("s",):
        lots = [
            requests.lot(pair, [requests.ask(pair, inputs, outputs)] * 2, [1, 2]),
            requests.lot(pair, [requests.ask(pair, inputs, ("s", "t"))], [3], caller=B),
        ]
        answers = requests.answers(requests.run(pair, lots))
        for number in 1, 2:
            answer = answers[A][number]
            assert list(answer) == list(outputs or ("s", "t"))
            same(answer, {name: everything[name] for name in outputs or ("s", "t")})
        same(answers[B][3], everything)


def test_large_answers_are_frames_of_their_own(requests: Requests, double: Model) -> None:
    asked = [requests.ask(double, {"x": numbers(1, LARGE, start=at)}) for at in range(3)]
    lots = [requests.lot(double, asked[:2], [1, 2]), requests.lot(double, asked[2:], [3], caller=B)]
    executed = requests.run(double, lots)
    assert [len(frame) for frame in executed.publications[A].frames] == [LARGE * 4] * 2
    assert executed.publications[A].inline == []
    answers = requests.answers(executed)
    for caller, number in ((A, 1), (A, 2), (B, 3)):
        same(answers[caller][number], {"y": numbers(1, LARGE, start=number - 1) * 2})


@pytest.mark.parametrize("extra", [0, 1])
def test_answer_is_a_frame_only_above_the_limit(workshop: Workshop, requests: Requests, extra: int) -> None:
    model = workshop.unary("Identity", T.UINT8, ["N", "M"])
    x = np.arange(INLINE_MAX_BYTES + extra).astype(np.uint8)[None]
    executed = requests.run(model, [requests.lot(model, [requests.ask(model, {"x": x})] * 2, [1, 2])])
    assert len(executed.publications[A].frames) == (2 if extra else 0)
    for answer in requests.answers(executed)[A].values():
        same(answer, {"y": x})


def test_small_requests_may_have_large_answers_of_several_outputs(workshop: Workshop, requests: Requests) -> None:
    nodes = [helper.make_node("Expand", ["x", "to"], ["y"]), helper.make_node("Neg", ["x"], ["z"])]
    ports: tuple[Ports, Ports] = {"x": (1, ["N", 1])}, {"y": (1, ["N", LARGE]), "z": (1, ["N", 1])}
    model = workshop.make(nodes, *ports, {"to": np.array([1, LARGE])})
    inputs = {number: numbers(2, 1, start=number) for number in (1, 2)}
    asked = [requests.ask(model, {"x": x}) for x in inputs.values()]
    executed = requests.run(model, [requests.lot(model, asked, list(inputs))])
    assert len(executed.publications[A].frames) == 2
    for number, x in inputs.items():
        same(requests.answers(executed)[A][number], {"y": np.repeat(x, LARGE, axis=1), "z": -x})


# --- datatypes ---


@pytest.mark.parametrize("datatype", KINDS)
def test_every_datatype_is_gathered_and_answered(workshop: Workshop, requests: Requests, datatype: str) -> None:
    model = workshop.unary("Identity", KINDS[datatype], ["N", 2])
    inputs = {number: np.array([[number, 0], [1, number]]).astype(DTYPES[datatype]) for number in range(4)}
    asked = [requests.ask(model, {"x": x}) for x in inputs.values()]
    lots = [requests.lot(model, asked[:3], [0, 1, 2], before=1), requests.lot(model, asked[3:], [3], caller=B)]
    answers = requests.answers(requests.run(model, lots))
    for number, x in inputs.items():
        same(answers[B if number == 3 else A][number], {"y": x})


def test_bfloat16_travels_as_its_bits(workshop: Workshop, requests: Requests) -> None:
    cast = [helper.make_node("Cast", ["x"], ["f"], to=1), helper.make_node("Add", ["f", "f"], ["g"])]
    ports: tuple[Ports, Ports] = {"x": (T.BFLOAT16, ["N"])}, {"y": (T.BFLOAT16, ["N"])}
    model = workshop.make([*cast, helper.make_node("Cast", ["g"], ["y"], to=T.BFLOAT16)], *ports)
    values = np.array([1.5, -0.25], np.float32)
    asked = requests.ask(model, {"x": values})
    assert asked.payload == to_bf16(values).tobytes()
    answers = requests.answers(requests.run(model, [requests.lot(model, [asked] * 2, [1, 2], before=1)]))[A]
    for number in 1, 2:
        same(answers[number], {"y": from_bf16(to_bf16(values * 2))})


def test_any_byte_but_0_is_true(workshop: Workshop, requests: Requests) -> None:
    """Code that was compiled for 0 and 1 would count others several times."""
    nodes = [helper.make_node("Cast", ["x"], ["y"], to=T.INT64), helper.make_node("Not", ["x"], ["z"])]
    ports: tuple[Ports, Ports] = {"x": (T.BOOL, ["N", 5])}, {"y": (T.INT64, ["N", 5]), "z": (T.BOOL, ["N", 5])}
    model = workshop.make(nodes, *ports)
    asked = requests.ask(model, {"x": np.ones((1, 5), bool)})._replace(payload=bytes([0, 1, 2, 128, 255]))
    for lots in (
        [requests.lot(model, [asked], [1])],
        [requests.lot(model, [asked, asked], [1, 2])],
        [requests.lot(model, [asked], [1]), requests.lot(model, [asked], [2])],
    ):
        for answer in requests.answers(requests.run(model, lots))[A].values():
            same(answer, {"y": np.array([[0, 1, 1, 1, 1]]), "z": np.array([[True, False, False, False, False]])})


def objects(elements: Sequence[Sequence[str | bytes]]) -> Array:
    array = np.empty((len(elements), len(elements[0])), dtype=object)
    for at, row in enumerate(elements):
        array[at] = [each.encode() if isinstance(each, str) else each for each in row]
    return array


def test_strings_of_any_length_come_back(requests: Requests, strings: Model) -> None:
    inputs = {1: objects([["", "ü"], ["a\0b", "x" * 100]]), 2: objects([["c", "d"]]), 3: objects([["z" * 50_000, ""]])}
    lots = [requests.lot(strings, [requests.ask(strings, {"x": x})], [number]) for number, x in inputs.items()]
    executed = requests.run(strings, lots)
    assert len(executed.publications[A].frames) == 1
    answers = requests.answers(executed)[A]
    for number, x in inputs.items():
        same(answers[number], {"y": x})


def test_strings_of_one_lot_come_back_each_to_its_own(requests: Requests, strings: Model) -> None:
    inputs = {number: objects([[f"{number}", "x"]]) for number in range(3)}
    for width in 1, 20_000:
        inputs = {number: objects([[f"{number}" * width, "x"]]) for number in range(3)}
        lot = requests.lot(strings, [requests.ask(strings, {"x": x}) for x in inputs.values()], list(inputs))
        answers = requests.answers(requests.run(strings, [lot]))[A]
        for number, x in inputs.items():
            same(answers[number], {"y": x})


def test_string_that_is_not_utf8_is_its_senders_error_alone(requests: Requests, strings: Model) -> None:
    inputs = {1: objects([["fine"]]), 2: objects([[b"\xff"]]), 3: objects([[b"\xed\xb3\xbf"]]), 4: objects([["also"]])}
    lots = [requests.lot(strings, [requests.ask(strings, {"x": x})], [number]) for number, x in inputs.items()]
    executed = requests.run(strings, lots)
    answers = requests.answers(executed)[A]
    for number in 2, 3:
        assert answers[number] == Failure(BAD_INPUT, "input 'x' holds an element that is not UTF-8", 0)
    for number in 1, 4:
        same(answers[number], {"y": inputs[number]})
    assert executed.publications[A].failed == [BAD_INPUT, BAD_INPUT]


@pytest.mark.parametrize(
    "payload", [b"\x09\0\0\0abcd", b"\x03\0\0\0abcd", b"\xff\xff\xff\xffabcd", b"\0\0\0\0\0\0\0\0"]
)
def test_strings_whose_lengths_lie_are_their_senders_error_alone(
    requests: Requests, strings: Model, payload: bytes
) -> None:
    good = requests.ask(strings, {"x": objects([["abcd"]])})
    lot = requests.lot(strings, [good, good._replace(payload=payload)], [1, 2])
    answers = requests.answers(requests.run(strings, [lot]))[A]
    same(answers[1], {"y": objects([["abcd"]])})
    failure = answers[2]
    assert isinstance(failure, Failure)
    assert failure.code == BAD_INPUT


def test_strings_beside_numbers_are_answered_together(workshop: Workshop, requests: Requests) -> None:
    nodes = [helper.make_node("Cast", ["i"], ["s"], to=T.STRING), helper.make_node("Neg", ["i"], ["n"])]
    model = workshop.make(nodes, {"i": (T.INT64, ["N"])}, {"s": (T.STRING, ["N"]), "n": (T.INT64, ["N"])})
    for outputs in ("s", "n"), ("n", "s"), ("n",):
        asked = [requests.ask(model, {"i": np.array([number, 70])}, outputs) for number in range(3)]
        answers = requests.answers(requests.run(model, [requests.lot(model, asked, [0, 1, 2])]))[A]
        for number in range(3):
            expected = {"s": np.array([str(number).encode(), b"70"], dtype=object), "n": np.array([-number, -70])}
            same(answers[number], {name: expected[name] for name in outputs})


def test_strings_that_a_model_gives_and_are_not_utf8_fail_alone(workshop: Workshop, requests: Requests) -> None:
    table = helper.make_tensor("t", T.STRING, [2], np.array([b"fine", b"\xff\xfe"], dtype=object))
    node = helper.make_node("Gather", ["t", "i"], ["y"])
    model = workshop.make([node], {"i": (T.INT64, ["N"])}, {"y": (T.STRING, ["N"])}, {"t": table}, name="table")
    lot = requests.lot(model, [requests.ask(model, {"i": np.array([at])}) for at in (0, 1)], [1, 2])
    answers = requests.answers(requests.run(model, [lot]))[A]
    same(answers[1], {"y": np.array([b"fine"], dtype=object)})
    failure = answers[2]
    assert isinstance(failure, Failure)
    assert failure.code == MODEL_FAILED
    assert failure.message.startswith("model 'table' failed on this input: 'utf-8' codec can't decode byte 0xff")


# --- shapes ---


def test_shape_of_an_output_may_depend_on_its_input(workshop: Workshop, requests: Requests) -> None:
    """Columns that are not zero: as many as there are."""
    nodes = [
        helper.make_node("ReduceMax", ["x"], ["top"], axes=[0], keepdims=0),
        helper.make_node("Cast", ["top"], ["keep"], to=T.BOOL),
        helper.make_node("Compress", ["x", "keep"], ["y"], axis=1),
    ]
    model = workshop.make(nodes, {"x": (1, ["N", 4])}, {"y": (1, ["N", "K"])})
    for x in np.eye(4, dtype=np.float32)[:2], np.zeros((1, 4), np.float32), np.ones((3, 4), np.float32):
        lot = requests.lot(model, [requests.ask(model, {"x": x})] * 2, [1, 2])
        for answer in requests.answers(requests.run(model, [lot]))[A].values():
            same(answer, {"y": x[:, x.max(axis=0) > 0]})


@pytest.mark.parametrize("shape", [(2, 0), (1, 0, 3), (1, 3, 0)])
def test_dimensions_without_elements_are_answered_with_such(
    workshop: Workshop, requests: Requests, shape: tuple[int, ...]
) -> None:
    for kind in T.FLOAT, T.STRING, T.BFLOAT16, T.BOOL:
        model = workshop.unary("Identity", kind, ["N", *["M", "K"][: len(shape) - 1]])
        asked = requests.ask(model, {"x": np.empty(shape, DTYPES[model.spec.inputs[0].datatype])})
        lots = [requests.lot(model, [asked] * 2, [1, 2]), requests.lot(model, [asked], [3], caller=B)]
        answers = requests.answers(requests.run(model, lots))
        for answer in answers[A][1], answers[A][2], answers[B][3]:
            assert not isinstance(answer, Failure)
            assert answer["y"].shape == shape


def test_empty_input_beside_one_with_elements(workshop: Workshop, requests: Requests) -> None:
    node = helper.make_node("Concat", ["a", "b"], ["y"], axis=1)
    model = workshop.make([node], {"a": (1, ["N", "J"]), "b": (1, ["N", "K"])}, {"y": (1, ["N", "L"])})
    inputs = {"a": np.empty((2, 0), np.float32), "b": numbers(2, 2)}
    lot = requests.lot(model, [requests.ask(model, inputs)] * 2, [1, 2])
    for answer in requests.answers(requests.run(model, [lot]))[A].values():
        same(answer, {"y": numbers(2, 2)})


def test_shape_without_elements_that_no_array_can_have_is_the_callers_error(
    workshop: Workshop, requests: Requests
) -> None:
    model = workshop.unary("Identity", T.FLOAT, ["N", "M", "K"])
    asked = requests.ask(model, {"x": np.empty((1, 0, 1 << 40), np.float32)})
    huge = asked.form.body.replace(b"\xcf" + (1 << 40).to_bytes(8, "big"), b"\xcf" + (1 << 62).to_bytes(8, "big"))
    key = asked.form.key.replace(str(1 << 40).encode(), str(1 << 62).encode())
    asked = asked._replace(form=asked.form._replace(body=huge, key=key))
    answer = requests.answers(requests.run(model, [requests.lot(model, [asked], [1])]))[A][1]
    assert isinstance(answer, Failure)
    assert answer.code == BAD_INPUT
    assert answer.message.startswith(f"input 'x' cannot be of shape [1, 0, {1 << 62}]")


# --- models whose requests run alone ---


def test_request_that_runs_alone_keeps_its_whole_shape(requests: Requests, alone: Model) -> None:
    x = numbers(2, 5)
    answers = requests.answers(requests.run(alone, [requests.lot(alone, [requests.ask(alone, {"x": x})], [1])]))
    same(answers[A][1], {"y": -x})


def test_scalars_go_in_and_come_out(workshop: Workshop, requests: Requests) -> None:
    for kind, value in (T.FLOAT, np.array(1.5, np.float32)), (T.BOOL, np.array(True)), (T.STRING, b"one"):
        model = workshop.unary("Identity", kind, [])
        x = np.empty((), dtype=object)
        x[()] = value
        x = value if isinstance(value, np.ndarray) else x
        answers = requests.answers(requests.run(model, [requests.lot(model, [requests.ask(model, {"x": x})], [1])]))
        same(answers[A][1], {"y": x})


def test_model_without_inputs_answers(workshop: Workshop, requests: Requests) -> None:
    constants = {"c": np.array([1, 2], np.float32)}
    model = workshop.make([helper.make_node("Identity", ["c"], ["y"])], {}, {"y": (1, [2])}, constants)
    asked = requests.ask(model, {})
    assert asked.payload == b""
    answers = requests.answers(requests.run(model, [requests.lot(model, [asked], [1])]))
    same(answers[A][1], {"y": constants["c"]})


def test_inputs_of_different_lengths_are_fine_for_a_model_that_runs_alone(
    workshop: Workshop, requests: Requests
) -> None:
    node = helper.make_node("Concat", ["a", "b"], ["y"], axis=0)
    model = workshop.make([node], {"a": (1, ["N"]), "b": (1, [2])}, {"y": (1, ["M"])})
    inputs = {"a": numbers(3), "b": numbers(2)}
    answers = requests.answers(requests.run(model, [requests.lot(model, [requests.ask(model, inputs)], [1])]))
    same(answers[A][1], {"y": np.concatenate([numbers(3), numbers(2)])})


# --- failures ---


def test_request_that_fails_leaves_its_neighbours_their_results(requests: Requests, lookup: Model) -> None:
    indexes = {1: 0, 2: 9, 3: 2, 4: 3, 5: -9}
    asked = {number: requests.ask(lookup, {"i": np.array([index])}) for number, index in indexes.items()}
    lots = [
        requests.lot(lookup, [asked[1], asked[2], asked[3]], [1, 2, 3]),
        requests.lot(lookup, [asked[4]], [4], caller=B),
        requests.lot(lookup, [asked[5]], [5], caller=B),
    ]
    executed = requests.run(lookup, lots)
    answers = requests.answers(executed)
    for caller, number in ((A, 1), (A, 3), (B, 4)):
        same(answers[caller][number], {"y": np.array([10 + indexes[number]], np.float32)})
    for caller, number in ((A, 2), (B, 5)):
        failure = answers[caller][number]
        assert isinstance(failure, Failure)
        assert failure.code == MODEL_FAILED
        assert failure.message.startswith("model 'lookup' failed on this input: ")
        assert f"idx={indexes[number]} must be within" in failure.message
    assert {caller: each.failed for caller, each in executed.publications.items()} == {
        A: [MODEL_FAILED],
        B: [MODEL_FAILED],
    }
    assert executed.info.rows == 5


def test_request_that_fails_alone_is_run_once(requests: Requests, lookup: Model) -> None:
    watched: Any = Watched(lookup)
    asked = requests.ask(lookup, {"i": np.array([9])})
    requests.run(watched, [requests.lot(lookup, [asked], [1])])
    assert len(watched.seen) == 1
    requests.run(watched, [requests.lot(lookup, [asked] * 2, [1, 2])])
    assert [len(feeds[0]) for feeds in watched.seen[1:]] == [2, 1, 1]


def test_batch_whose_output_lost_rows_is_run_one_by_one(workshop: Workshop, requests: Requests) -> None:
    """A model that its owner calls batchable though it cannot be tried, and that drops rows of zeros."""
    nodes = [
        helper.make_node("ReduceMax", ["x"], ["top"], axes=[1], keepdims=0),
        helper.make_node("Cast", ["top"], ["keep"], to=T.BOOL),
        helper.make_node("Compress", ["x", "keep"], ["y"], axis=0),
    ]
    model = workshop.make(nodes, {"x": (1, ["N", 2])}, {"y": (1, ["K", 2])}, max_batch_size=4)
    inputs = {1: numbers(1, 2), 2: np.zeros((1, 2), np.float32), 3: numbers(2, 2)}
    lots = [requests.lot(model, [requests.ask(model, {"x": x})], [number]) for number, x in inputs.items()]
    answers = requests.answers(requests.run(model, lots))[A]
    same(answers[1], {"y": inputs[1]})
    same(answers[2], {"y": np.empty((0, 2), np.float32)})
    same(answers[3], {"y": inputs[3]})


def test_large_request_that_fails_leaves_its_neighbours_their_results(workshop: Workshop, requests: Requests) -> None:
    constants = {"t": np.arange(4, dtype=np.float32)}
    node = helper.make_node("Gather", ["t", "i"], ["y"])
    model = workshop.make([node], {"i": (T.INT64, ["N", "M"])}, {"y": (1, ["N", "M"])}, constants)
    inputs = {number: np.full((1, LARGE), at) for number, at in ((1, 1), (2, 4), (3, 3))}
    lot = requests.lot(model, [requests.ask(model, {"i": i}) for i in inputs.values()], list(inputs))
    answers = requests.answers(requests.run(model, [lot]))[A]
    assert isinstance(answers[2], Failure)
    for number in 1, 3:
        same(answers[number], {"y": inputs[number].astype(np.float32)})


def test_sentence_of_a_failure_is_bounded_and_its_retry_kept() -> None:
    group = failure_answers(PenstockError(UNAVAILABLE, "x" * 5000, 0.25), 7, (1, 2))
    failure = unpack_failure(group.body)
    assert (failure.code, len(failure.message), failure.retry_after_ms) == (UNAVAILABLE, 2000, 250)
    assert (group.ids, group.queue_us, group.nbytes) == ((1, 2), 7, 0)


# --- a want of memory, and a GPU that fails ---


class Small(Watched):
    """A model that has memory for so many rows."""

    def __init__(self, model: Model, most: int) -> None:
        super().__init__(model)
        self.most = most

    def run(self, feeds: Sequence[Array]) -> list[Array]:
        if len(feeds[0]) > self.most:
            self.seen.append(list(feeds))
            raise RuntimeError("Failed to allocate memory for requested buffer of size 1000")
        return super().run(feeds)


@settings(deadline=None, max_examples=60)
@given(
    sizes=st.lists(st.lists(st.integers(1, 4), min_size=1, max_size=4), min_size=1, max_size=5), most=st.integers(0, 40)
)
def test_a_want_of_memory_halves_the_batch_until_it_fits(
    requests: Requests, double: Model, sizes: list[list[int]], most: int
) -> None:
    small: Any = Small(double, most)
    lots: list[Lot] = []
    inputs: dict[int, Array] = {}
    for lot_sizes in sizes:
        # Requests of one lot have one form, so one number of rows.
        ids = [len(inputs) + at for at in range(len(lot_sizes))]
        for number in ids:
            inputs[number] = numbers(lot_sizes[0], 3, start=100 * number)
        lots.append(requests.lot(double, [requests.ask(double, {"x": inputs[number]}) for number in ids], ids))
    answers = requests.answers(requests.run(small, lots))[A]
    assert answers.keys() == inputs.keys()
    for number, x in inputs.items():
        answer = answers[number]
        if len(x) > most:
            assert isinstance(answer, Failure)
            assert "memory" in answer.message
        else:
            same(answer, {"y": 2 * x})
    # Each batch that failed was at least twice one that was tried next.
    assert len(small.seen) <= 2 * len(inputs)


@pytest.mark.parametrize(
    "said",
    [
        "CUDA failure 700: an illegal memory access was encountered ; GPU=0 ; hostname=a ; expr=cudaStreamSynchronize",
        "CUDA failure 719: unspecified launch failure ; GPU=0",
        "CUDNN failure 5000: CUDNN_STATUS_EXECUTION_FAILED ; GPU=0",
        "CUBLAS failure 14: CUBLAS_STATUS_INTERNAL_ERROR ; GPU=0",
    ],
)
@pytest.mark.parametrize("together", [True, False])
def test_a_gpu_that_has_failed_ends_the_process_and_answers_nobody(
    requests: Requests, double: Model, said: str, together: bool
) -> None:
    """What is not answered runs elsewhere."""

    class Broken(Watched):
        def run(self, feeds: Sequence[Array]) -> list[Array]:
            if not together and len(feeds[0]) > 1:
                raise RuntimeError("a node failed")
            raise RuntimeError(f"[ONNXRuntimeError] : 1 : FAIL : {said}")

    broken: Any = Broken(double)
    lots = [requests.lot(double, [requests.ask(double, {"x": numbers(1, 3)})] * 2, [1, 2])]
    with pytest.raises(CudaError, match=said[:12]):
        requests.run(broken, lots)


@pytest.mark.parametrize(
    ("said", "memory", "device"),
    [
        ("CUDA failure 2: out of memory ; GPU=0", True, False),
        ("CUBLAS failure 3: CUBLAS_STATUS_ALLOC_FAILED ; GPU=0", True, False),
        ("Available memory of 10 is smaller than requested bytes of 20", True, False),
        ("CUDNN failure 3000: CUDNN_STATUS_NOT_SUPPORTED", False, False),
        ("CUDA failure 209: no kernel image is available", False, True),
        ("indices element out of data bounds, idx=9", False, False),
    ],
)
def test_failures_are_told_apart(said: str, memory: bool, device: bool) -> None:
    error = RuntimeError(said)
    assert (is_want_of_memory(error), is_device_failure(error)) == (memory, device)


# --- times ---


def test_times_of_a_batch_are_told(requests: Requests, double: Model) -> None:
    asked = requests.ask(double, {"x": numbers(1, 2)})
    arrived = time.monotonic() - 2.0
    lots = [requests.lot(double, [asked] * 3, [1, 2, 3], arrived=arrived), requests.lot(double, [asked], [4])]
    lots[0].waited_us = 1_000_000
    executed = requests.run(double, lots)
    [(waited_s, count), (_, one)] = executed.queue_s
    assert (count, one) == (3, 1)
    assert 3.0 <= waited_s < 30.0
    assert executed.publications[A].groups[0].queue_us == pytest.approx(waited_s * 1e6)
    assert executed.cpu_s >= 0
    assert 0 < executed.compute_s < 30
    assert executed.info.compute_us == int(executed.compute_s * 1e6)
    assert 0 < executed.info.model_us <= executed.info.compute_us


# --- whatever is asked ---

GROUPS = st.lists(
    st.tuples(
        st.sampled_from([A, B]),
        st.integers(1, 3),  # rows of each
        st.integers(1, 3),  # requests
        st.booleans(),  # b before a
        st.integers(0, 9),  # bytes before each tensor
        st.sampled_from([(), ("s",), ("t",), ("t", "s")]),
        st.integers(0, 9),  # bytes before the lot
    ),
    min_size=1,
    max_size=5,
)


@settings(deadline=None, max_examples=500)
@given(groups=GROUPS, seed=st.integers(0, 1000))
def test_every_request_gets_what_it_would_get_alone(
    requests: Requests, pair: Model, groups: list[tuple[bytes, int, int, bool, int, tuple[str, ...], int]], seed: int
) -> None:
    random = np.random.default_rng(seed)
    lots: list[Lot] = []
    inputs: dict[tuple[bytes, int], tuple[dict[str, Array], tuple[str, ...]]] = {}
    for caller, rows, count, swapped, gap, outputs, before in groups:
        ids = range(len(inputs), len(inputs) + count)
        asked = []
        for number in ids:
            given_inputs: dict[str, Array] = {
                "a": random.standard_normal((rows, 3)).astype(np.float32),
                "b": random.integers(-(1 << 60), 1 << 60, rows),
            }
            if swapped:
                given_inputs = {name: given_inputs[name] for name in "ba"}
            inputs[caller, number] = given_inputs, outputs
            asked.append(requests.ask(pair, given_inputs, outputs, gap))
        lots.append(requests.lot(pair, asked, ids, caller=caller, before=before, plan=Plan(pair, asked[0].form)))
    answers = requests.answers(requests.run(pair, lots))
    assert {(caller, number) for caller, each in answers.items() for number in each} == inputs.keys()
    for (caller, number), (given_inputs, outputs) in inputs.items():
        expected = requests.expected(pair, given_inputs)
        same(answers[caller][number], {name: expected[name] for name in outputs or expected})


def test_batch_belongs_to_nobody_else(requests: Requests, double: Model) -> None:
    """Results are read while the next batch is made: none of them may lie in memory that is written again."""
    asked = requests.ask(double, {"x": numbers(1, LARGE)})
    first = execute(double, Batch(1, ("double", "1"), [requests.lot(double, [asked], [1])], 1, "full"))
    before = requests.answers(first)
    for number in range(2, 6):
        other = requests.ask(double, {"x": numbers(1, LARGE, start=number)})
        execute(double, Batch(number, ("double", "1"), [requests.lot(double, [other], [number])], 1, "full"))
    same(requests.answers(first)[A][1], {"y": numbers(1, LARGE) * 2})
    same(before[A][1], {"y": numbers(1, LARGE) * 2})
