"""What a form means to a model, and forms that lie: the worker trusts no caller's word."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest

from penstock.wire.codec import pack_layout, unpack_outcome
from penstock.wire.errors import BAD_INPUT, PenstockError
from penstock.wire.messages import Form
from penstock.wire.models import Layout, Tensor
from penstock.worker.model import Model
from penstock.worker.plan import Column, Plan

if TYPE_CHECKING:
    from tests.worker.conftest import Requests

A = np.ones((2, 3), np.float32)
B = np.arange(2)


@pytest.fixture
def form(requests: Requests, pair: Model) -> Form:
    """Two rows for ``pair``, which says the truth: a takes bytes 0 to 24 and b 24 to 40."""
    return requests.ask(pair, {"a": A, "b": B}).form


def layout(*tensors: Tensor, outputs: tuple[str, ...] = ()) -> bytes:
    return pack_layout(Layout(tensors, outputs))


def refusal(model: Model, form: Form) -> str:
    with pytest.raises(PenstockError) as raised:
        Plan(model, form)
    assert raised.value.code == BAD_INPUT
    return raised.value.message


def test_columns_say_where_each_input_of_the_model_lies(pair: Model, form: Form) -> None:
    plan = Plan(pair, form)
    assert plan.columns == [Column("FP32", (2, 3), 0, 24), Column("INT64", (2,), 24, 16)]
    assert (plan.rows, plan.key, plan.outputs, plan.answers_strings) == (2, ("pair", "1"), [0, 1], False)


def test_columns_are_in_the_order_of_the_model_whatever_that_of_the_request(requests: Requests, pair: Model) -> None:
    plan = Plan(pair, requests.ask(pair, {"b": B, "a": A}, gap=4).form)
    assert [column.offset for column in plan.columns] == [4 + 16 + 4, 4]


def test_outputs_are_those_that_are_wanted_in_that_order(requests: Requests, pair: Model) -> None:
    for outputs, places in ((), [0, 1]), (("t",), [1]), (("t", "s"), [1, 0]):
        assert Plan(pair, requests.ask(pair, {"a": A, "b": B}, outputs).form).outputs == places


def test_strings_count_only_among_outputs_that_are_wanted(requests: Requests, strings: Model) -> None:
    form = requests.ask(strings, {"x": np.array([["a"]], dtype=object)}).form
    assert Plan(strings, form).answers_strings


def test_request_that_runs_alone_has_one_row_whatever_its_shape(requests: Requests, alone: Model) -> None:
    plan = Plan(alone, requests.ask(alone, {"x": np.ones((2, 5), np.float32)}).form)
    assert (plan.rows, plan.columns[0].shape, plan.form.key) == (1, (2, 5), b"")


# --- forms that lie ---


@pytest.mark.parametrize(("offset", "nbytes"), [(41, 40), (17, 40), (0, 39), (1 << 63, 40), (2**64 - 1, 40), (0, 0)])
def test_tensor_outside_its_payload_is_refused(pair: Model, form: Form, offset: int, nbytes: int) -> None:
    body = layout(Tensor("a", "FP32", (2, 3), offset, 24), Tensor("b", "INT64", (2,), 24, 16))
    assert refusal(pair, form._replace(body=body, nbytes=nbytes)) == (
        f"a tensor lies outside its payload of {nbytes} bytes"
    )


@pytest.mark.parametrize("nbytes", [23, 25, 0, 1 << 60])
def test_size_that_is_not_the_shapes_is_refused(pair: Model, form: Form, nbytes: int) -> None:
    body = layout(Tensor("a", "FP32", (2, 3), 0, nbytes), Tensor("b", "INT64", (2,), 24, 16))
    assert f"takes 24 bytes, and {nbytes} came" in refusal(pair, form._replace(body=body))


@pytest.mark.parametrize("change", [{"rows": 1}, {"rows": 3}, {"rows": 1 << 32}, {"key": b"3"}, {"key": b"\0"}])
def test_rows_or_key_that_are_not_the_tensors_are_refused(pair: Model, form: Form, change: dict[str, object]) -> None:
    assert refusal(pair, form._replace(**change)) == "the request's rows or key are not those of its tensors"  # type: ignore[arg-type]


def test_key_of_a_row_of_another_length_is_refused(requests: Requests, double: Model) -> None:
    """It would be put into one array with rows that are longer than it."""
    short = requests.ask(double, {"x": np.ones((1, 2), np.float32)}).form
    long = requests.ask(double, {"x": np.ones((1, 9), np.float32)}).form
    assert short.key != long.key
    assert "rows or key" in refusal(double, short._replace(key=long.key))


@pytest.mark.parametrize(
    "body", [b"", b"\xc1", b"\x93\x01\x02\x03", b"\x92\x90\x90\x90", b"\x92\x91\x90\x90", b"\xff" * 99]
)
def test_body_that_is_no_layout_is_refused(pair: Model, form: Form, body: bytes) -> None:
    assert refusal(pair, form._replace(body=body)).startswith("the request's layout is malformed: ")


def test_output_that_the_model_has_not_is_refused(pair: Model, form: Form) -> None:
    tensors = Tensor("a", "FP32", (2, 3), 0, 24), Tensor("b", "INT64", (2,), 24, 16)
    for outputs in ("nope",), ("s", "nope"), ("a",):
        body = layout(*tensors, outputs=outputs)
        assert "unexpected inference output" in refusal(pair, form._replace(body=body))
    body = layout(*tensors, outputs=("s", "s"))
    assert "output 's' already exists" in refusal(pair, form._replace(body=body))


def test_inputs_that_are_missing_or_too_many_or_doubled_are_refused(pair: Model, form: Form) -> None:
    a, b = Tensor("a", "FP32", (2, 3), 0, 24), Tensor("b", "INT64", (2,), 24, 16)
    assert "expected 2 inputs but got 1" in refusal(pair, form._replace(body=layout(a)))
    assert "expected 2 inputs but got 0" in refusal(pair, form._replace(body=layout()))
    assert "unexpected inference input 'c'" in refusal(pair, form._replace(body=layout(a, b, b._replace(name="c"))))
    assert "input 'a' already exists" in refusal(pair, form._replace(body=layout(a, a, b)))


def test_other_datatypes_and_shapes_are_refused(pair: Model, form: Form) -> None:
    a, b = Tensor("a", "FP32", (2, 3), 0, 24), Tensor("b", "INT64", (2,), 24, 16)
    assert "'INT32'" in refusal(pair, form._replace(body=layout(a._replace(datatype="INT32"), b)))
    for shape in (3, 2), (2, 3, 1), (), (6,), (2, 1 << 62):
        assert "unexpected shape" in refusal(pair, form._replace(body=layout(a._replace(shape=shape), b)))
    assert "batch size does not match" in refusal(pair, form._replace(body=layout(a, b._replace(shape=(1,), nbytes=8))))


def test_more_rows_than_a_batch_holds_are_refused(pair: Model, form: Form) -> None:
    rows = pair.spec.max_batch_size + 1
    body = layout(Tensor("a", "FP32", (rows, 3), 0, rows * 12), Tensor("b", "INT64", (rows,), 0, rows * 8))
    assert "batch-size must be <= 16" in refusal(pair, form._replace(body=body, rows=rows, nbytes=rows * 12))


def test_strings_that_cannot_fit_into_their_bytes_are_refused(requests: Requests, strings: Model) -> None:
    form = requests.ask(strings, {"x": np.array([["a", "b"]], dtype=object)}).form
    body = layout(Tensor("x", "BYTES", (1, 1 << 40), 0, form.nbytes))
    lie = form._replace(body=body, key=str(1 << 40).encode())
    assert "has too few bytes of data: 10" in refusal(strings, lie)


# --- what comes out ---


def test_description_of_outputs_says_where_each_lies(pair: Model, form: Form) -> None:
    nbytes, body = Plan(pair, form).describe(((2, 3), (2,)))
    outcome = unpack_outcome(body)
    assert (nbytes, outcome.model, outcome.version) == (24 + 16, "pair", "1")
    assert outcome.tensors == (Tensor("s", "FP32", (2, 3), 0, 24), Tensor("t", "INT64", (2,), 24, 16))


def test_descriptions_are_remembered_within_bounds(pair: Model, form: Form) -> None:
    plan = Plan(pair, form)
    first = plan.describe(((2, 3), (2,)))
    assert plan.describe(((2, 3), (2,))) is first
    for rows in range(1000):
        assert plan.describe(((rows, 3), (rows,)))[0] == rows * 20
    again = plan.describe(((2, 3), (2,)))
    assert again == first
    assert again is not first
