"""Requests built from what users have, and answers as arrays."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from penstock.client.arrays import Forms, decode_outcome, make_form
from penstock.wire.codec import pack_outcome, unpack_layout
from penstock.wire.errors import BAD_INPUT, BadMessage, PenstockError
from penstock.wire.messages import Form, Outcome
from penstock.wire.models import Layout, ModelSpec, Tensor, TensorSpec
from penstock.wire.tensors import DTYPES, Array

NUMBERS = sorted(set(DTYPES) - {"BYTES", "BF16"})


def make_spec(*inputs: tuple[str, str, tuple[int, ...]], rows_max: int = 32) -> ModelSpec:
    specs = tuple(TensorSpec(*each) for each in inputs)
    outputs = TensorSpec("y", "FP32", (-1,)), TensorSpec("z", "FP32", (-1,))
    return ModelSpec("model", "3", "", specs, outputs, True, rows_max)


def build(spec: ModelSpec, **inputs: Any) -> tuple[Form, bytes]:
    form, parts = Forms().build(spec, inputs, ())
    return form, b"".join(parts)


def there_and_back(datatype: str, shape: tuple[int, ...], value: Any) -> Array:
    """What a value becomes at a model that answers with its input."""
    form, payload = build(make_spec(("x", datatype, shape)), x=value)
    layout = unpack_layout(form.body)
    _, outputs = decode_outcome(pack_outcome(Outcome("model", "3", layout.tensors)), payload)
    return outputs["x"]


def refuse(spec: ModelSpec, **inputs: Any) -> str:
    with pytest.raises(PenstockError) as error:
        build(spec, **inputs)
    assert error.value.code == BAD_INPUT
    return error.value.message


# --- building ---


def test_inputs_lie_one_behind_the_other() -> None:
    spec = make_spec(("a", "INT16", (-1, 2)), ("b", "UINT8", (-1,)))
    form, parts = Forms().build(spec, {"a": [[1, 2]], "b": [3]}, ("z",))
    assert b"".join(parts) == b"\1\0\2\0\3"
    assert (form.model, form.version, form.rows, form.nbytes) == ("model", "3", 1, 5)
    tensors = (Tensor("a", "INT16", (1, 2), 0, 4), Tensor("b", "UINT8", (1,), 4, 1))
    assert unpack_layout(form.body) == Layout(tensors, ("z",))


def test_same_layout_gives_the_same_form() -> None:
    forms, spec = Forms(), make_spec(("x", "FP32", (-1, 2)))
    first, _ = forms.build(spec, {"x": [[1, 2]]}, ())
    again, _ = forms.build(spec, {"x": np.zeros((1, 2), np.float32)}, ())
    other, _ = forms.build(spec, {"x": [[1, 2], [3, 4]]}, ())
    assert first is again
    assert (first.rows, other.rows) == (1, 2)


def test_form_of_a_model_that_changed_is_made_anew() -> None:
    forms = Forms()
    before, _ = forms.build(make_spec(("x", "FP32", (-1,))), {"x": [1.0]}, ())
    after, _ = forms.build(make_spec(("x", "FP32", (-1,)))._replace(version="4"), {"x": [1.0]}, ())
    assert (before.version, after.version) == ("3", "4")


def test_forms_are_remembered_only_up_to_a_limit() -> None:
    forms, spec = Forms(), make_spec(("x", "UINT8", (-1, -1)))
    for width in range(1100):
        forms.build(spec, {"x": np.zeros((1, width), np.uint8)}, ())
    assert len(forms._known) <= 1024


def test_form_has_priority_and_tenant() -> None:
    spec, layout = make_spec(("x", "UINT8", (-1,))), Layout((Tensor("x", "UINT8", (2,), 0, 2),))
    form = make_form(spec, layout, 2, priority=4, tenant="them")
    assert (form.priority, form.tenant, form.rows) == (4, "them", 2)
    assert Forms().find(spec, layout, 2, priority=4).priority == 4


@pytest.mark.parametrize("datatype", NUMBERS)
def test_array_of_each_datatype_travels(datatype: str) -> None:
    x = np.array([[0, 1], [1, 0]], DTYPES[datatype])
    back = there_and_back(datatype, (-1, 2), x)
    assert back.dtype == x.dtype
    np.testing.assert_array_equal(back, x)


@pytest.mark.parametrize("datatype", NUMBERS)
def test_list_becomes_what_the_model_expects(datatype: str) -> None:
    back = there_and_back(datatype, (-1, 2), [[0, 1], [1, 0]])
    assert back.dtype == DTYPES[datatype]
    assert back.tolist() == [[0, 1], [1, 0]]


@given(
    x=npst.arrays(
        st.sampled_from([DTYPES[name] for name in NUMBERS] + [DTYPES[name].newbyteorder(">") for name in NUMBERS]),
        npst.array_shapes(min_dims=2, max_dims=4, max_side=4),
    ),
    data=st.data(),
)
@settings(deadline=None, max_examples=100)
def test_array_in_any_order_comes_back_equal(x: Array, data: st.DataObject) -> None:
    """Big-endian, transposed, strided backwards: what a user sees is what travels."""
    x = x.transpose(data.draw(st.permutations(range(x.ndim))))
    x = x[tuple(slice(None, None, data.draw(st.sampled_from([1, -1, 2]))) for _ in x.shape)]
    name = {str(dtype): name for name, dtype in DTYPES.items() if name != "BF16"}[str(x.dtype.newbyteorder("<"))]
    back = there_and_back(name, (-1,) * x.ndim, x)
    assert back.flags.writeable
    np.testing.assert_array_equal(back, x)


@given(strings=st.lists(st.text(st.characters(exclude_categories=["Cs"])) | st.binary(), min_size=1, max_size=8))
@settings(deadline=None, max_examples=50)
def test_strings_come_back_as_bytes(strings: list[str | bytes]) -> None:
    back = there_and_back("BYTES", (-1,), strings)
    assert back.tolist() == [each.encode() if isinstance(each, str) else each for each in strings]


@pytest.mark.parametrize(
    "value", [np.array([["a", "bc"]]), np.array([[b"a", b"bc"]]), np.array([["a", b"bc"]], object), [["a", b"bc"]]]
)
def test_arrays_of_strings_travel(value: Any) -> None:
    assert there_and_back("BYTES", (-1, 2), value).tolist() == [[b"a", b"bc"]]


@pytest.mark.parametrize("value", [np.array([1.5, 3.14159], np.float32), [1.5, 3.14159]])
def test_float32_is_rounded_to_bf16(value: Any) -> None:
    back = there_and_back("BF16", (-1,), value)
    assert back.dtype == np.float32
    assert back.tolist() == [1.5, 3.140625]


def test_bfloat16_of_ml_dtypes_is_bf16() -> None:
    assert there_and_back("BF16", (-1,), np.array([1.5, -2], ml_dtypes.bfloat16)).tolist() == [1.5, -2]


@pytest.mark.parametrize("value", [np.float32(3), np.array(3, np.float32), 3, 3.0])
def test_scalar_is_an_input_of_no_dimensions(value: Any) -> None:
    spec = make_spec(("x", "FP32", ()))._replace(batchable=False)
    form, payload = build(spec, x=value)
    assert unpack_layout(form.body).tensors[0].shape == ()
    assert np.frombuffer(payload, np.float32) == [3]


def test_input_may_have_no_elements() -> None:
    assert there_and_back("FP32", (-1, -1), [[], []]).shape == (2, 0)
    assert there_and_back("INT64", (-1, -1), np.zeros((2, 0), np.int64)).shape == (2, 0)


# --- what does not fit ---


def test_array_of_another_type_is_refused_by_name() -> None:
    said = refuse(make_spec(("x", "FP32", (-1,))), x=np.array([1.0]))
    assert said == "inference input 'x' data-type is 'FP64', but model 'model' expects 'FP32'"


def test_array_of_no_datatype_is_refused_by_name() -> None:
    said = refuse(make_spec(("x", "FP32", (-1,))), x=np.array([1j]))
    assert said.startswith("input 'x': an array of complex128 has no datatype; convert it to one of BOOL, UINT8,")


def test_other_shape_is_refused_by_name() -> None:
    said = refuse(make_spec(("x", "FP32", (-1, 2))), x=[1.0, 2.0])
    assert said == "unexpected shape for input 'x' for model 'model'. Expected [-1, 2], got [2]"


def test_missing_input_is_named() -> None:
    spec = make_spec(("a", "FP32", (-1,)), ("b", "FP32", (-1,)))
    assert "Got input(s) ['a'], but missing required input(s) ['b']" in refuse(spec, a=[1.0])
    assert "missing required input(s) ['a', 'b']" in refuse(spec)


def test_unknown_input_is_named() -> None:
    said = refuse(make_spec(("x", "FP32", (-1,))), x=[1.0], y=[2.0])
    assert said == "unexpected inference input 'y' for model 'model'; its inputs are ['x']"


def test_inputs_with_different_rows_are_refused() -> None:
    said = refuse(make_spec(("a", "FP32", (-1,)), ("b", "FP32", (-1,))), a=[1.0], b=[1.0, 2.0])
    assert said == "input 'b' batch size does not match other inputs for 'model': 2 and 1"


@pytest.mark.parametrize(("rows", "said"), [(0, "needs at least one row"), (5, "batch-size must be <= 4")])
def test_too_few_or_too_many_rows_are_refused(rows: int, said: str) -> None:
    assert said in refuse(make_spec(("x", "FP32", (-1,)), rows_max=4), x=np.zeros(rows, np.float32))


def test_unknown_output_is_refused() -> None:
    with pytest.raises(PenstockError, match="unexpected inference output 'w' for model 'model'"):
        Forms().build(make_spec(("x", "FP32", (-1,))), {"x": [1.0]}, ("y", "w"))


def test_inputs_without_names_are_refused() -> None:
    nameless: Any = np.zeros((1, 2), np.float32)
    with pytest.raises(PenstockError, match=r"the inputs of 'model' are arrays by name, \['x'\]; ndarray has none"):
        Forms().build(make_spec(("x", "FP32", (-1, 2))), nameless, ())


@pytest.mark.parametrize(
    ("datatype", "value", "reason"),
    [
        ("FP32", [[1.0], [2.0, 3.0]], "setting an array element with a sequence"),
        ("FP32", ["one"], "could not convert string to float: 'one'"),
        ("FP32", ["1"], "it holds strings"),
        ("FP32", [1e39], "overflow encountered"),
        ("FP16", [70000], "overflow encountered"),
        ("INT64", [1.5], "it holds numbers with a fraction"),
        ("INT64", [1 << 63], "too large"),
        ("INT64", [None], "not 'NoneType'"),
        ("UINT8", [256], "out of bounds for uint8"),
        ("UINT8", [-1], "out of bounds for uint8"),
        ("BOOL", ["no"], "it holds strings"),
        ("BOOL", [0.5], "it holds numbers with a fraction"),
    ],
)
def test_list_that_does_not_fit_is_refused_and_not_bent(datatype: str, value: Any, reason: str) -> None:
    said = refuse(make_spec(("x", datatype, (-1,))), x=value)
    assert said.startswith(f"input 'x' cannot be made an array of {datatype}: ")
    assert reason in said


@pytest.mark.parametrize(
    ("value", "reason"),
    [([1], "a BYTES element is str or bytes, not int"), (["\ud800"], "surrogates not allowed")],
)
def test_element_that_is_no_string_is_refused_by_its_input(value: Any, reason: str) -> None:
    said = refuse(make_spec(("x", "BYTES", (-1,))), x=value)
    assert said.startswith("input 'x': ")
    assert reason in said


# --- answers ---


def test_outputs_come_by_name_and_belong_to_the_receiver() -> None:
    tensors = (Tensor("y", "FP32", (2,), 0, 8), Tensor("s", "BYTES", (1,), 8, 6))
    payload = bytearray(np.array([1, 2], "<f4").tobytes() + b"\2\0\0\0ok")
    outcome, outputs = decode_outcome(pack_outcome(Outcome("model", "3", tensors)), payload)
    payload[:] = bytes(len(payload))
    assert (outcome.model, outcome.version) == ("model", "3")
    assert (outputs["y"].tolist(), outputs["s"].tolist()) == ([1, 2], [b"ok"])
    assert outputs["y"].flags.writeable
    assert outputs["y"].flags.owndata


@pytest.mark.parametrize(("offset", "nbytes"), [(0, 4), (4, 8), (100, 8), (1 << 63, 8)])
def test_answer_that_points_outside_its_payload_is_refused(offset: int, nbytes: int) -> None:
    body = pack_outcome(Outcome("model", "3", (Tensor("y", "FP32", (2,), offset, nbytes),)))
    with pytest.raises(PenstockError, match="takes 8 bytes"):
        decode_outcome(body, bytes(8))


@given(body=st.binary(max_size=40), payload=st.binary(max_size=40))
@settings(deadline=None, max_examples=100)
def test_answer_that_is_none_raises_what_the_client_expects(body: bytes, payload: bytes) -> None:
    try:
        outcome, outputs = decode_outcome(body, payload)
    except (BadMessage, PenstockError):
        return
    assert outputs.keys() == {tensor.name for tensor in outcome.tensors}
