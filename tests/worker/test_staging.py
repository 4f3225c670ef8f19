"""Memory that batches run in again and again: the same answers as without, and nothing of a batch before."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from penstock.wire.arena import Arena
from penstock.wire.datatypes import ITEM_SIZES
from penstock.wire.errors import MODEL_FAILED
from penstock.wire.messages import Failure
from penstock.wire.slots import Slots
from penstock.wire.tensors import DTYPES, Array, to_bf16
from penstock.worker.cuda import Gpu
from penstock.worker.execute import execute
from penstock.worker.model import RUN_ERRORS, Model
from penstock.worker.probe import probe
from penstock.worker.staging import Staging
from tests.worker.hostdevice import HostDevice

if TYPE_CHECKING:
    from tests.worker.conftest import Answer, Ports, Requests, Workshop

T = TensorProto
node = helper.make_node
A = b"caller a"
ROWS_MAX = 8
WIDE = 4096  # floats of a row that is worth a slot


def staged(model: Model) -> Model:
    assert model.stage()
    return model


@pytest.fixture(scope="module", params=[None, (3, ROWS_MAX)], ids=["plain", "padded"])
def dense(workshop: Workshop, request: pytest.FixtureRequest) -> Model:
    """y = x w, 3 -> 2, and z = -k of whole numbers."""
    weights = np.random.default_rng(0).standard_normal((3, 2)).astype(np.float32)
    nodes = [node("MatMul", ["x", "w"], ["y"]), node("Neg", ["k"], ["z"])]
    inputs: Ports = {"x": (T.FLOAT, ["N", 3]), "k": (T.INT64, ["N"])}
    outputs: Ports = {"y": (T.FLOAT, ["N", 2]), "z": (T.INT64, ["N"])}
    sizes = {"max_batch_size": ROWS_MAX, "preferred_batch_sizes": request.param}
    return staged(workshop.make(nodes, inputs, outputs, {"w": weights}, name="dense", **sizes))


def sample(rows: int, seed: int) -> dict[str, Array]:
    random = np.random.default_rng(seed)
    return {
        "x": random.standard_normal((rows, 3)).astype(np.float32),
        "k": random.integers(-9, 9, rows, dtype=np.int64),
    }


@settings(deadline=None, max_examples=60)
@given(sizes=st.lists(st.lists(st.integers(1, 4), min_size=1, max_size=4), min_size=1, max_size=4))
def test_batches_one_after_another_get_what_they_would_get_alone(
    dense: Model, requests: Requests, sizes: list[list[int]]
) -> None:
    for number, batch in enumerate(sizes):
        lots, expected, rows = [], {}, 0
        for at, size in enumerate(batch):
            if rows + size > ROWS_MAX:
                break
            rows += size
            inputs = sample(size, 100 * number + at)
            lots.append(requests.lot(dense, [requests.ask(dense, inputs)], [at]))
            expected[at] = requests.expected(dense, inputs)
        answers = requests.answers(requests.run(dense, lots))[A]
        same(answers, expected)


def same(answers: Mapping[int, Answer], expected: Mapping[int, Mapping[str, Array]]) -> None:
    assert answers.keys() == expected.keys()
    for number, outputs in expected.items():
        answer = answers[number]
        assert not isinstance(answer, Failure), answer
        assert answer.keys() == outputs.keys()
        for name, array in outputs.items():
            np.testing.assert_array_equal(answer[name], array)


@pytest.mark.parametrize(
    ("kind", "datatype"),
    [
        *[(T.BOOL, "BOOL"), (T.UINT8, "UINT8"), (T.INT32, "INT32"), (T.UINT64, "UINT64"), (T.FLOAT16, "FP16")],
        *[(T.FLOAT, "FP32"), (T.DOUBLE, "FP64"), (T.BFLOAT16, "BF16")],
    ],
)
def test_every_kind_of_number_runs_there(workshop: Workshop, requests: Requests, kind: int, datatype: str) -> None:
    model = staged(workshop.unary("Identity", kind, ["N", 5], max_batch_size=4))
    with model.staging() as staging:
        assert staging is not None
        assert staging.binds
    values = np.arange(15).reshape(3, 5)
    x = values.astype("f4" if datatype == "BF16" else DTYPES[datatype])  # BF16 come and go as float32
    lot = requests.lot(model, [requests.ask(model, {"x": to_bf16(x) if datatype == "BF16" else x})], [1])
    same(requests.answers(requests.run(model, [lot]))[A], {1: {"y": x}})


def test_bindings_are_made_once(dense: Model, requests: Requests, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a binding is made")

    monkeypatch.setattr("penstock.worker.staging.bind_inputs", refuse)
    monkeypatch.setattr(Model, "run", refuse)
    for rows in range(1, ROWS_MAX + 1):
        requests.run(dense, [requests.lot(dense, [requests.ask(dense, sample(rows, rows))], [1])])


def test_as_many_batches_as_run_at_once_have_memory_of_their_own(workshop: Workshop) -> None:
    model = staged(workshop.unary("Neg", T.FLOAT, ["N", 2], max_batch_size=4, instances=2))
    with model.staging() as one, model.staging() as other, model.staging() as third:
        assert one is not None
        assert other is not None
        assert not np.shares_memory(one.inputs[4][0], other.inputs[4][0])
        assert third is None
    with model.staging() as again:
        assert again in (one, other)


@pytest.mark.parametrize(
    ("kind", "dims"),
    [(T.STRING, ["N", 2]), (T.FLOAT, ["N", "M"]), (T.FLOAT, []), (T.FLOAT, ["N", 0]), (T.FLOAT, ["N", 1 << 30])],
)
def test_rows_without_a_size_or_of_an_enormous_one_have_no_memory_beforehand(
    workshop: Workshop, kind: int, dims: list[str | int]
) -> None:
    model = workshop.unary("Identity", kind, dims, max_batch_size=4)
    assert not model.stage()
    with model.staging() as staging:
        assert staging is None


def test_a_request_that_runs_alone_runs_there_too(workshop: Workshop, requests: Requests) -> None:
    model = staged(workshop.unary("Neg", T.FLOAT, [2, 3]))
    for start in 1, 7:
        x = np.arange(start, start + 6, dtype=np.float32).reshape(2, 3)
        lot = requests.lot(model, [requests.ask(model, {"x": x})], [1])
        same(requests.answers(requests.run(model, [lot]))[A], {1: {"y": -x}})


def test_outputs_whose_shape_only_the_run_tells_are_allocated_by_it(workshop: Workshop, requests: Requests) -> None:
    """Where the row of an output is not declared, nothing is bound, and inputs are still gathered in one place."""
    nodes = [node("Neg", ["x"], ["y"]), node("NonZero", ["x"], ["z"])]
    outputs: Ports = {"y": (T.FLOAT, [1, 4]), "z": (T.INT64, [2, "K"])}
    model = staged(workshop.make(nodes, {"x": (T.FLOAT, [1, 4])}, outputs))
    with model.staging() as staging:
        assert staging is not None
        assert not staging.binds
    for x in ([[0, 1, 2, 0]], [[1, 1, 1, 1]], [[0, 0, 0, 0]]):
        array = np.array(x, np.float32)
        lot = requests.lot(model, [requests.ask(model, {"x": array})], [1])
        expected: dict[str, Array] = {"y": -array, "z": np.array(np.nonzero(array), np.int64)}
        same(requests.answers(requests.run(model, [lot]))[A], {1: expected})


def test_a_declaration_that_is_wrong_is_found_and_not_followed_again(workshop: Workshop, requests: Requests) -> None:
    """y is declared [N, 4] and comes as [N, 2]."""
    nodes = [node("Compress", ["x", "which"], ["y"], axis=1)]
    which = np.array([True, False, True, False])
    ports: tuple[Ports, Ports] = {"x": (T.FLOAT, ["N", 4])}, {"y": (T.FLOAT, ["N", 4])}
    model = workshop.make(nodes, *ports, {"which": which}, max_batch_size=4)
    assert model.stage()
    for start in 1, 5:
        x = np.arange(start, start + 8, dtype=np.float32).reshape(2, 4)
        lot = requests.lot(model, [requests.ask(model, {"x": x})], [1])
        same(requests.answers(requests.run(model, [lot]))[A], {1: {"y": x[:, ::2]}})
        assert not model.stage()


def test_a_batch_that_fails_leaves_the_next_one_well(workshop: Workshop, requests: Requests) -> None:
    table = np.array([10, 11, 12, 13], np.float32)
    ports: tuple[Ports, Ports] = {"i": (T.INT64, ["N"])}, {"y": (T.FLOAT, ["N"])}
    model = staged(workshop.make([node("Gather", ["table", "i"], ["y"])], *ports, {"table": table}, max_batch_size=4))
    indexes = [np.array([value], np.int64) for value in (1, 9, 3)]
    lots = [requests.lot(model, [requests.ask(model, {"i": each})], [at]) for at, each in enumerate(indexes)]
    answers = requests.answers(requests.run(model, lots))[A]
    bad = answers.pop(1)
    assert isinstance(bad, Failure)
    assert bad.code == MODEL_FAILED
    same(answers, {0: {"y": table[[1]]}, 2: {"y": table[[3]]}})
    with model.staging() as staging:
        assert staging is not None


# --- what lies elsewhere ---


@pytest.fixture(scope="module", params=[None, (4, ROWS_MAX)], ids=["plain", "padded"])
def wide(workshop: Workshop, request: pytest.FixtureRequest) -> Model:
    """y = -x, z = |x|, rows of 16 KB."""
    ports: tuple[Ports, Ports] = (
        {"x": (T.FLOAT, ["N", WIDE])},
        {"y": (T.FLOAT, ["N", WIDE]), "z": (T.FLOAT, ["N", WIDE])},
    )
    nodes = [node("Neg", ["x"], ["y"]), node("Abs", ["x"], ["z"])]
    sizes = {"max_batch_size": ROWS_MAX, "preferred_batch_sizes": request.param}
    return staged(workshop.make(nodes, *ports, name="wide", **sizes))


@pytest.mark.parametrize("rows", [1, 2, 5])  # one is copied, more are read where they lie
def test_what_is_written_for_callers_to_read_is_the_same(wide: Model, requests: Requests, rows: int) -> None:
    with closing(Arena(1 << 20, "test")) as arena:
        slots = Slots(arena)
        for start in 0, 1000:
            x = np.arange(start, start + rows * WIDE, dtype=np.float32).reshape(rows, WIDE)
            lot = requests.lot(wide, [requests.ask(wide, {"x": x}, ["y"])], [7])
            lot.reads = True
            executed = requests.run(wide, [lot], lambda model, batch: execute(model, batch, slots))
            [group] = executed.publications[A].groups
            [place] = group.places
            assert bytes(arena.view(place, group.nbytes)) == (-x).tobytes()
            executed.publications[A].give_back()


def test_only_the_outputs_that_are_wanted_are_written(wide: Model) -> None:
    """A binding that was used for another output before must not write that one to where it went then."""
    with wide.staging() as staging:
        assert staging is not None
        feeds = staging.inputs[1]
        feeds[0][...] = 3.0
        first, second = np.zeros((1, WIDE), np.float32), np.zeros((1, WIDE), np.float32)
        staging.run_into(1, feeds, {0: first.shape}, first.ctypes.data)
        feeds[0][...] = 5.0
        staging.run_into(1, feeds, {1: second.shape}, second.ctypes.data)
    assert (first == -3.0).all()
    assert (second == 5.0).all()


def test_a_place_that_is_too_small_is_refused_and_not_written_over(workshop: Workshop) -> None:
    model = staged(workshop.unary("Neg", T.FLOAT, ["N", 4], max_batch_size=2))
    memory = np.zeros(16, np.float32)
    with model.staging() as staging:
        assert staging is not None
        staging.inputs[2][0][...] = 1.0
        with pytest.raises(RUN_ERRORS):
            staging.run_into(2, staging.inputs[2], {0: (1, 4)}, memory.ctypes.data)
    assert not memory.any()


def test_the_memory_of_a_staging_is_aligned(workshop: Workshop) -> None:
    model = workshop.make(
        [node("Neg", ["x"], ["y"]), node("Not", ["b"], ["c"])],
        {"b": (T.BOOL, ["N", 3]), "x": (T.FLOAT, ["N", 7])},
        {"y": (T.FLOAT, ["N", 7]), "c": (T.BOOL, ["N", 3])},
        max_batch_size=3,
    )
    staging = Staging(model._session, model.spec)
    for array, spec in zip(staging.inputs[3], model.spec.inputs, strict=True):
        assert array.ctypes.data % 64 == 0
        assert array.itemsize == ITEM_SIZES[spec.datatype]


# --- padding ---

PREFERRED = (2, 5, ROWS_MAX)


def betrayer(workshop: Workshop, kind: int, dims: list[int | str], **config: Any) -> Model:
    """y = x + the sum of x over all rows, so that each answer tells what was beside it: rows that nobody sent, too."""
    nodes = [node("ReduceSum", ["x", "axis"], ["all"], keepdims=1), node("Add", ["x", "all"], ["y"])]
    ports: tuple[Ports, Ports] = {"x": (kind, dims)}, {"y": (kind, dims)}
    axis = {"axis": np.array([0], np.int64)}
    return workshop.make(nodes, *ports, axis, name="betrayer", preferred_batch_sizes=PREFERRED, **config)


def padded_sum(x: Array) -> Array:
    """What it gives when batches are filled with the last row."""
    size = next(size for size in PREFERRED if size >= len(x))
    answer: Array = x + x.sum(axis=0, keepdims=True) + (size - len(x)) * x[-1]
    return answer


@pytest.fixture(scope="module", params=["staged", "dynamic", "device", "graphs", "unbound"])
def padding(workshop: Workshop, request: pytest.FixtureRequest) -> Model:
    """Wherever its batches run."""
    dims: list[int | str] = ["N", "M"] if request.param == "dynamic" else ["N", WIDE]
    graphs = {"cuda_graphs": True} if request.param == "graphs" else {}
    model = betrayer(workshop, T.FLOAT, dims, **graphs)
    if request.param in ("device", "graphs"):
        model.gpu = cast(Gpu, HostDevice())
    if request.param != "unbound":
        assert model.stage() == (request.param != "dynamic")
    assert model.sizes == PREFERRED
    return model


@pytest.mark.parametrize("reads", [False, True], ids=["in messages", "in the arena"])
@pytest.mark.parametrize("together", [False, True], ids=["apart", "side by side"])
@pytest.mark.parametrize("rows", range(1, ROWS_MAX + 1))
def test_batches_run_as_the_next_preferred_size_filled_with_the_last_row(
    padding: Model, requests: Requests, rows: int, together: bool, reads: bool
) -> None:
    x = np.arange(rows * WIDE, dtype=np.float32).reshape(rows, WIDE) % 8
    pieces = [x] if together else [x[at : at + 1] for at in range(rows)]
    lots = [requests.lot(padding, [requests.ask(padding, {"x": piece})], [at]) for at, piece in enumerate(pieces)]
    with closing(Arena(1 << 21, "test")) as arena:
        slots = Slots(arena)
        for lot in lots:
            lot.reads = reads
        executed = requests.run(padding, lots, lambda model, batch: execute(model, batch, slots))
        assert executed.info.rows == rows, "nobody sees the rows that fill it"
        publication = executed.publications[A]
        got = []
        if reads:
            for group in publication.groups:
                [place] = group.places
                got.append(np.frombuffer(bytes(arena.view(place, group.nbytes)), np.float32).reshape(-1, WIDE))
        else:
            answers = requests.answers(executed)[A]
            for at in range(len(pieces)):
                answer = answers[at]
                assert not isinstance(answer, Failure), answer
                got.append(answer["y"])
        np.testing.assert_array_equal(np.concatenate(got), padded_sum(x))
        publication.give_back()
        assert arena.allocator.used == 0


def test_rows_that_fill_a_batch_are_indexes_that_exist(workshop: Workshop, requests: Requests) -> None:
    """What a larger batch left there might be none."""
    table = np.arange(4, dtype=np.float32)
    ports: tuple[Ports, Ports] = {"i": (T.INT64, ["N"])}, {"y": (T.FLOAT, ["N"])}
    for device in None, HostDevice():
        model = workshop.make([node("Gather", ["t", "i"], ["y"])], *ports, {"t": table}, preferred_batch_sizes=(4, 8))
        model.gpu = cast(Gpu, device)
        staged(model)
        with model.staging() as staging:
            assert staging is not None
            staging.inputs[8][0][...] = 99
        answers = requests.answers(
            requests.run(model, [requests.lot(model, [requests.ask(model, {"i": np.array([1, 3])})], [1])])
        )
        same(answers[A], {1: {"y": np.array([1, 3], np.float32)}})


def test_strings_are_filled_too(workshop: Workshop, requests: Requests) -> None:
    model = workshop.unary("Identity", T.STRING, ["N"], preferred_batch_sizes=(4,))
    lot = requests.lot(model, [requests.ask(model, {"x": np.array(["a", "b"], object)})], [1])
    answer = requests.answers(requests.run(model, [lot]))[A][1]
    assert not isinstance(answer, Failure)
    assert answer["y"].tolist() == [b"a", b"b"]


def test_there_are_bindings_for_preferred_sizes_alone(workshop: Workshop) -> None:
    model = staged(workshop.unary("Neg", T.FLOAT, ["N", 2], preferred_batch_sizes=(4, 8)))
    with model.staging() as staging:
        assert isinstance(staging, Staging)
        assert list(staging._bindings) == list(staging._open) == [4, 8]


def test_graphs_without_preferred_sizes_are_for_powers_of_two(workshop: Workshop) -> None:
    model = workshop.unary("Neg", T.FLOAT, ["N", 2], max_batch_size=12, cuda_graphs=True)
    assert model.sizes == ()
    staged(model)
    assert model.sizes == (), "on the CPU they mean nothing"
    model = workshop.unary("Neg", T.FLOAT, ["N", 2], max_batch_size=12, cuda_graphs=True)
    model.gpu = cast(Gpu, HostDevice())
    staged(model)
    assert model.sizes == (1, 2, 4, 8, 12)


def test_a_model_that_runs_alone_is_not_padded(workshop: Workshop, requests: Requests) -> None:
    model = staged(workshop.unary("Neg", T.FLOAT, [2, 3], preferred_batch_sizes=(4, 8)))
    assert (model.sizes, model.spec.max_batch_size) == ((), 1)
    x = np.ones((2, 3), np.float32)
    same(
        requests.answers(requests.run(model, [requests.lot(model, [requests.ask(model, {"x": x})], [1])]))[A],
        {1: {"y": -x}},
    )


def test_rows_that_are_mixed_are_found_in_padded_batches(workshop: Workshop) -> None:
    model = betrayer(workshop, T.FLOAT, ["N", 4])
    probe(model)
    assert "changes with the rows beside it" in model.why_alone
    assert (model.sizes, model.spec.batchable) == ((), False)
