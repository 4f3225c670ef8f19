"""Does a model keep its rows apart? Small models that do, do not, or cannot be asked."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from onnx import TensorProto, helper

from penstock.worker.model import Model
from penstock.worker.probe import probe, warm_up

if TYPE_CHECKING:
    from tests.worker.conftest import Dims, Ports, Workshop

T = TensorProto
node = helper.make_node
ROWS: Dims = ["N", 4]


def mixes(model: Model) -> str:
    """Probe a model that looks batchable. Why it runs alone, "" when it does not."""
    assert model.spec.batchable
    probe(model)
    assert model.spec.batchable == (not model.why_alone)
    assert model.run_s < float("inf")
    return model.why_alone


def make(workshop: Workshop, *nodes: Any, out: Dims = ROWS, kind: int = T.FLOAT, **more: Any) -> Model:
    """x -> y, x of four columns."""
    return workshop.make(nodes, {"x": (kind, ROWS)}, {"y": (kind, out)}, **more)


# --- models that keep rows apart ---


def test_elementwise_model_is_batchable(workshop: Workshop) -> None:
    assert mixes(make(workshop, node("Relu", ["x"], ["y"]))) == ""


def test_dense_layers_with_softmax_over_the_row_are_batchable(workshop: Workshop) -> None:
    weights = np.random.default_rng(1).standard_normal((4, 4)).astype(np.float32)
    nodes = [node("MatMul", ["x", "w"], ["h"]), node("Softmax", ["h"], ["y"], axis=1)]
    assert mixes(make(workshop, *nodes, constants={"w": weights})) == ""


def test_rows_that_give_nan_and_infinity_are_batchable(workshop: Workshop) -> None:
    nodes = [node("Log", ["x"], ["l"]), node("Reciprocal", ["z"], ["i"]), node("Add", ["l", "i"], ["y"])]
    zero = {"z": np.zeros(4, np.float32)}
    assert mixes(make(workshop, *nodes, constants=zero)) == ""


@pytest.mark.parametrize("kind", [T.FLOAT16, T.BFLOAT16, T.DOUBLE, T.INT8, T.UINT64, T.BOOL, T.STRING])
def test_model_of_any_datatype_is_tried(workshop: Workshop, kind: int) -> None:
    assert mixes(make(workshop, node("Identity", ["x"], ["y"]), kind=kind)) == ""


def test_integers_are_tried_as_indexes_into_small_tables(workshop: Workshop) -> None:
    table = {"t": np.arange(6, dtype=np.float32).reshape(2, 3)}
    ports: tuple[Ports, Ports] = {"x": (T.INT64, ["N"])}, {"y": (T.FLOAT, ["N", 3])}
    assert mixes(workshop.make([node("Gather", ["t", "x"], ["y"])], *ports, table)) == ""


def test_inputs_that_share_a_symbolic_dimension_are_given_the_same_size(workshop: Workshop) -> None:
    port: tuple[int, Dims] = (T.FLOAT, ["N", "D"])
    model = workshop.make([node("Add", ["a", "b"], ["y"])], {"a": port, "b": port}, {"y": port})
    assert mixes(model) == ""


@pytest.mark.parametrize("multiple", [32, 7 * 32, 3, 128])
def test_sizes_are_tried_until_one_is_accepted(workshop: Workshop, multiple: int) -> None:
    nodes = [node("Reshape", ["x", "to"], ["y"])]
    ports: tuple[Ports, Ports] = {"x": (T.FLOAT, ["N", "M"])}, {"y": (T.FLOAT, ["N", "K", multiple])}
    assert mixes(workshop.make(nodes, *ports, {"to": np.array([0, -1, multiple])})) == ""


# --- models that mix rows ---


def test_softmax_over_the_batch_is_found(workshop: Workshop) -> None:
    text = mixes(make(workshop, node("Softmax", ["x"], ["y"], axis=0)))
    assert text == "output 'y' of a row changes with the rows beside it"


@pytest.mark.parametrize("kind", [T.FLOAT, T.FLOAT16])
def test_mean_over_the_batch_is_found(workshop: Workshop, kind: int) -> None:
    nodes = [node("ReduceMean", ["x"], ["m"], axes=[0]), node("Sub", ["x", "m"], ["y"])]
    assert "changes with the rows beside it" in mixes(make(workshop, *nodes, kind=kind))


def test_sorting_across_rows_is_found(workshop: Workshop) -> None:
    nodes = [node("Shape", ["x"], ["n"], start=0, end=1), node("TopK", ["x", "n"], ["y", "at"], axis=0)]
    assert "changes with the rows beside it" in mixes(make(workshop, *nodes))


@pytest.mark.parametrize("reverse", [0, 1])
def test_running_sum_over_rows_of_integers_is_found(workshop: Workshop, reverse: int) -> None:
    """Forward it leaves the first row as it is, backward the last."""
    constants = {"axis": np.array(0)}
    model = make(workshop, node("CumSum", ["x", "axis"], ["y"], reverse=reverse), kind=T.INT64, constants=constants)
    assert "changes with the rows beside it" in mixes(model)


@pytest.mark.parametrize("kind", [T.INT32, T.INT64, T.DOUBLE])
def test_maximum_over_a_batch_of_single_numbers_is_found(workshop: Workshop, kind: int) -> None:
    """Two rows of 0 or 1 are often equal, and then their maximum is what each of them is."""
    nodes = [node("ReduceMax", ["x"], ["top"], axes=[0]), node("Sub", ["x", "top"], ["y"])]
    model = workshop.make(nodes, {"x": (kind, ["N"])}, {"y": (kind, ["N"])})
    assert "changes with the rows beside it" in mixes(model)


@pytest.mark.parametrize("kind", [T.BOOL, T.FLOAT, T.INT8, T.STRING, T.BFLOAT16])
def test_scalars_of_any_kind_are_made(workshop: Workshop, kind: int) -> None:
    model = workshop.unary("Identity", kind, [])
    probe(model)
    assert model.run_s < 1


def test_one_output_of_several_that_mixes_is_named(workshop: Workshop) -> None:
    nodes = [node("Relu", ["x"], ["y"]), node("Softmax", ["x"], ["z"], axis=0)]
    ports: tuple[Ports, Ports] = {"x": (T.FLOAT, ROWS)}, {"y": (T.FLOAT, ROWS), "z": (T.FLOAT, ROWS)}
    model = workshop.make(nodes, *ports)
    assert mixes(model) == "output 'z' of a row changes with the rows beside it"


def test_output_without_a_row_for_each_row_is_found(workshop: Workshop) -> None:
    model = make(workshop, node("Concat", ["x", "x"], ["y"], axis=0), out=["M", 4])
    assert mixes(model) == "output 'y' does not have a row for each row of the input"


def test_output_that_lost_its_rows_is_found(workshop: Workshop) -> None:
    """A scalar that its model declares as a vector."""
    nodes = [
        node("ReduceSum", ["x"], ["s"]),
        node("Shape", ["x"], ["n"], end=1),
        node("Slice", ["n", "n", "n"], ["to"]),
        node("Reshape", ["s", "to"], ["y"]),
    ]
    model = make(workshop, *nodes, out=["M"])
    assert mixes(model) == "output 'y' does not have a row for each row of the input"


def test_mixing_is_found_though_max_batch_size_was_given(workshop: Workshop) -> None:
    model = make(workshop, node("Softmax", ["x"], ["y"], axis=0), max_batch_size=4)
    assert mixes(model)
    assert model.spec.max_batch_size == 1


# --- models whose shapes have said it already ---


@pytest.mark.parametrize(("x", "y"), [([2, 4], ROWS), (ROWS, []), ([], ["N"])])
def test_model_that_is_not_batchable_is_timed_only(workshop: Workshop, x: Dims, y: Dims) -> None:
    operator = node("ReduceSum", ["x"], ["y"], keepdims=0) if not y else node("Neg", ["x"], ["y"])
    model = workshop.make([operator], {"x": (T.FLOAT, x)}, {"y": (T.FLOAT, y)})
    before = model.why_alone
    probe(model)
    assert model.why_alone == before != ""
    assert model.run_s < 1


def test_model_without_inputs_is_timed(workshop: Workshop) -> None:
    model = workshop.make([node("Identity", ["c"], ["y"])], {}, {"y": (1, [2])}, {"c": np.ones(2, np.float32)})
    probe(model)
    assert model.run_s < 1


# --- models that cannot be tried ---


def picky(workshop: Workshop, **config: Any) -> Model:
    """Takes rows of 17 numbers only, and does not say so."""
    constants = {"to": np.array([0, 17])}
    ports: tuple[Ports, Ports] = {"x": (T.FLOAT, ["N", "M"])}, {"y": (T.FLOAT, ["N", 17])}
    return workshop.make([node("Reshape", ["x", "to"], ["y"])], *ports, constants, **config)


def test_model_that_accepts_no_made_up_input_runs_alone_and_says_how_to_change_it(workshop: Workshop) -> None:
    model = picky(workshop)
    probe(model)
    assert not model.spec.batchable
    assert model.why_alone.startswith(
        "it could not be tried with made-up inputs; set max_batch_size in model.toml if its rows are independent (Non-"
    )
    assert "cannot be reshaped" in model.why_alone


def test_model_that_cannot_be_tried_is_batchable_when_its_owner_says_so(workshop: Workshop) -> None:
    model = picky(workshop, max_batch_size=4)
    probe(model)
    assert (model.spec.batchable, model.spec.max_batch_size) == (True, 4)
    assert model.run_s == float("inf")


def test_strings_that_must_be_numbers_other_than_0_and_1_cannot_be_tried(workshop: Workshop) -> None:
    nodes = [
        node("Cast", ["x"], ["i"], to=T.INT64),
        node("Sub", ["i", "low"], ["at"]),
        node("Gather", ["t", "at"], ["y"]),
    ]
    constants = {"low": np.array(7), "t": np.array([1, 2], np.float32)}
    ports: tuple[Ports, Ports] = {"x": (T.STRING, ["N"])}, {"y": (T.FLOAT, ["N"])}
    model = workshop.make(nodes, *ports, constants)
    probe(model)
    assert "indices element out of data bounds" in model.why_alone


def test_inputs_that_would_be_enormous_are_not_made(workshop: Workshop) -> None:
    model = workshop.unary("Identity", T.UINT8, ["N", 1 << 14, 1 << 14])
    probe(model)
    assert "is too large to try" in model.why_alone


def test_inputs_of_more_elements_than_a_float_counts_are_not_made(workshop: Workshop) -> None:
    model = workshop.unary("Identity", T.UINT8, ["N", *[1 << 62] * 20])
    probe(model)
    assert "is too large to try" in model.why_alone


def test_full_batch_that_would_be_enormous_is_not_timed(workshop: Workshop) -> None:
    model = workshop.unary("Identity", T.UINT8, ["N", 1 << 10, 1 << 6], max_batch_size=2048)
    probe(model)
    assert (model.spec.batchable, model.run_s) == (True, float("inf"))


def test_model_that_takes_only_two_rows_runs_alone(workshop: Workshop) -> None:
    """Two rows and one pass the comparison here, a full batch fails."""
    nodes = [node("Gather", ["t", "n"], ["one"]), node("Mul", ["x", "one"], ["y"]), node("Shape", ["x"], ["n"], end=1)]
    nodes = [nodes[2], nodes[0], nodes[1]]
    model = make(workshop, *nodes, constants={"t": np.ones(3, np.float32)})
    probe(model)
    assert "indices element out of data bounds" in model.why_alone


# --- warming up ---


class Sizes:
    """How many rows each run of a model has had."""

    def __init__(self, model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seen: list[int] = []
        run, run_in = model.run, model.run_in

        def watch(feeds: Any) -> Any:
            self.seen.append(len(feeds[0]))
            return run(feeds)

        def watch_in(staging: Any, rows: int, feeds: Any) -> Any:
            assert all(feed is place for feed, place in zip(feeds, staging.inputs[rows], strict=True))
            self.seen.append(rows)
            return run_in(staging, rows, feeds)

        monkeypatch.setattr(model, "run", watch)
        monkeypatch.setattr(model, "run_in", watch_in)


@pytest.mark.parametrize("stages", [True, False])
def test_batches_of_every_size_are_run_the_largest_first(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch, stages: bool
) -> None:
    model = workshop.unary("Neg", T.FLOAT, ["N", 4], max_batch_size=6)
    if stages:
        assert model.stage()
    sizes = Sizes(model, monkeypatch)
    warm_up(model, 8)
    assert sizes.seen[:6] == [6, 5, 4, 3, 2, 1]


@pytest.mark.parametrize(
    ("preferred", "first", "timed"), [(None, [6, 5, 4, 3, 2, 1], [1, 2, 4, 6]), ((3, 6), [6, 3], [3, 6])]
)
def test_sizes_that_have_run_are_timed_in_a_second_run(
    workshop: Workshop,
    monkeypatch: pytest.MonkeyPatch,
    preferred: tuple[int, ...] | None,
    first: list[int],
    timed: list[int],
) -> None:
    """The first plans memory, which takes longer."""
    model = workshop.unary("Neg", T.FLOAT, ["N", 4], max_batch_size=6, preferred_batch_sizes=preferred)
    assert model.stage()
    sizes = Sizes(model, monkeypatch)
    warm_up(model, 8)
    assert sizes.seen == [*first, *timed]
    assert list(model.warm_s) == timed
    assert all(seconds > 0 for seconds in model.warm_s.values())


def test_a_model_that_runs_alone_is_warmed_up_once(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    model = workshop.unary("Neg", T.FLOAT, [3, 4])
    sizes = Sizes(model, monkeypatch)
    warm_up(model, 8)
    assert sizes.seen == [3, 3]
    assert list(model.warm_s) == [1]


def test_sizes_that_cannot_run_are_left_out_and_told(
    workshop: Workshop, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows in pairs only: five of them cannot be."""
    nodes = [node("Reshape", ["x", "pairs"], ["p"]), node("Reshape", ["p", "rows"], ["y"])]
    shapes = {"pairs": np.array([-1, 8], np.int64), "rows": np.array([-1, 4], np.int64)}
    model = make(workshop, *nodes, constants=shapes, max_batch_size=6)
    sizes = Sizes(model, monkeypatch)
    warm_up(model, 8)
    assert sizes.seen == [6, 5, 4, 3, 2, 1, 2, 4, 6]
    assert list(model.warm_s) == [2, 4, 6]
    [record] = [record for record in caplog.records if record.message == "model warmed up in part"]
    told = record.fields  # type: ignore[attr-defined]
    assert (told["sizes_failed"], told["rows"], told["cold_up_to_rows"]) == (3, 1, 0)
    assert "Reshape" in told["reason"]
