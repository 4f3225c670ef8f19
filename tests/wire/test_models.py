"""A request is checked against its model, and whoever sent it is told what to mend."""

from __future__ import annotations

import time

import pytest

from penstock.wire.datatypes import MAX_DIMS, MAX_ELEMENTS
from penstock.wire.errors import BAD_INPUT, PenstockError
from penstock.wire.models import Layout, ModelSpec, Size, Tensor, TensorSpec, check, check_declaration, newest

PAIR = ModelSpec(
    "pair",
    "1",
    "onnx",
    (TensorSpec("a", "FP32", (-1, 3)), TensorSpec("b", "INT8", (-1, -1))),
    (TensorSpec("sum", "FP32", (-1, 3)), TensorSpec("top", "INT64", (-1,))),
    batchable=True,
    max_batch_size=8,
)
TEXTS = ModelSpec("texts", "1", "onnx", (TensorSpec("text", "BYTES", (-1, 2)),), (), True, 8)
WHOLE = ModelSpec("whole", "1", "onnx", (TensorSpec("x", "FP64", (-1, 2)),), (), batchable=False, max_batch_size=1)


def a(rows: int = 2, datatype: str = "FP32", shape: tuple[int, ...] = (), nbytes: int = -1) -> Tensor:
    return Tensor("a", datatype, shape or (rows, 3), 0, nbytes if nbytes >= 0 else rows * 12)


def b(rows: int = 2, width: int = 5) -> Tensor:
    return Tensor("b", "INT8", (rows, width), 0, rows * width)


def refusal(spec: ModelSpec, *tensors: Tensor, outputs: tuple[str, ...] = ()) -> str:
    with pytest.raises(PenstockError) as caught:
        check(spec, Layout(tensors, outputs))
    assert caught.value.code == BAD_INPUT
    return caught.value.message


def test_a_request_that_fits_has_rows_and_the_key_of_its_kind() -> None:
    assert check(PAIR, Layout((a(), b()))) == Size(2, b"5")
    assert check(PAIR, Layout((b(8, 0), a(8)), ("top",))) == Size(8, b"0")


def test_requests_share_a_batch_only_where_their_other_dimensions_agree() -> None:
    keys = {check(PAIR, Layout((a(rows), b(rows, width)))).key for rows in (1, 2) for width in (4, 5)}
    assert keys == {b"4", b"5"}


def test_a_model_that_is_not_batchable_takes_any_first_dimension_as_one_row() -> None:
    for first in (0, 1, 100):
        assert check(WHOLE, Layout((Tensor("x", "FP64", (first, 2), 0, first * 16),))) == Size(1, b"")


@pytest.mark.parametrize(
    ("tensors", "outputs", "sentence"),
    [
        (
            (),
            (),
            "expected 2 inputs but got 0 inputs for model 'pair'. Got input(s) [], but missing required input(s) "
            "['a', 'b']. Please provide all required input(s).",
        ),
        (
            (a(), Tensor("c", "FP32", (2, 3), 0, 24)),
            (),
            "expected 2 inputs but got 2 inputs for model 'pair'. Got input(s) ['a', 'c'], but missing required "
            "input(s) ['b']. Please provide all required input(s).",
        ),
        (
            (a(), b(), Tensor("c", "FP32", (2, 3), 0, 24)),
            (),
            "unexpected inference input 'c' for model 'pair'; its inputs are ['a', 'b']",
        ),
        ((a(), b(), a()), (), "input 'a' already exists in request for model 'pair'"),
        ((a(), a()), (), "input 'a' already exists in request for model 'pair'"),
        (
            (a(), b()),
            ("top", "bottom"),
            "unexpected inference output 'bottom' for model 'pair'; its outputs are ['sum', 'top']",
        ),
        ((a(), b()), ("top", "sum", "top"), "output 'top' already exists in request for model 'pair'"),
        (
            (a(datatype="FP64"), b()),
            (),
            "inference input 'a' data-type is 'FP64', but model 'pair' expects 'FP32'",
        ),
        (
            (a(shape=(2, 4)), b()),
            (),
            "unexpected shape for input 'a' for model 'pair'. Expected [-1, 3], got [2, 4]",
        ),
        (
            (a(shape=(2,)), b()),
            (),
            "unexpected shape for input 'a' for model 'pair'. Expected [-1, 3], got [2]",
        ),
        (
            (a(shape=(2, 3, 1)), b()),
            (),
            "unexpected shape for input 'a' for model 'pair'. Expected [-1, 3], got [2, 3, 1]",
        ),
        ((a(nbytes=23), b()), (), "input 'a' of shape [2, 3] and data-type FP32 takes 24 bytes, and 23 came"),
        ((a(nbytes=25), b()), (), "input 'a' of shape [2, 3] and data-type FP32 takes 24 bytes, and 25 came"),
        ((a(2), b(3)), (), "input 'b' batch size does not match other inputs for 'pair': 3 and 2"),
        ((a(0), b(0)), (), "a request for 'pair' needs at least one row, and has none"),
        (
            (a(9), b(9)),
            (),
            "inference request batch-size must be <= 8 for 'pair', and is 9; split the request, or raise "
            "max_batch_size in the model's model.toml",
        ),
    ],
)
def test_a_request_that_does_not_fit_is_told_why(
    tensors: tuple[Tensor, ...], outputs: tuple[str, ...], sentence: str
) -> None:
    assert refusal(PAIR, *tensors, outputs=outputs) == sentence


def test_which_of_many_inputs_came_twice_is_found_at_once() -> None:
    many = [Tensor(f"x{at}", "FP32", (1,), 0, 4) for at in range(100_000)]
    before = time.thread_time()
    sentence = refusal(PAIR, *many, many[-1])
    assert sentence == "input 'x99999' already exists in request for model 'pair'"
    assert time.thread_time() - before < 2.0  # a look at all others for each would take a minute


def test_strings_have_at_least_their_lengths() -> None:
    for nbytes in (16, 1000):
        assert check(TEXTS, Layout((Tensor("text", "BYTES", (2, 2), 0, nbytes),))) == Size(2, b"")
    sentence = "input 'text' of shape [2, 2] has too few bytes of data: 15"
    assert refusal(TEXTS, Tensor("text", "BYTES", (2, 2), 0, 15)) == sentence


@pytest.mark.parametrize("shape", [(), (0,), (1, 2, 3), (1,) * MAX_DIMS, (MAX_ELEMENTS,), (MAX_ELEMENTS, 0)])
def test_a_declaration_that_can_exist_is_accepted(shape: tuple[int, ...]) -> None:
    check_declaration("x", "FP32", shape)


@pytest.mark.parametrize(
    ("datatype", "shape", "sentence"),
    [
        ("FP31", (1,), "input 'x' has the unknown data-type 'FP31'; known are BF16, BOOL, BYTES, FP16, FP32, FP64, "),
        ("FP32", (1,) * 33, "input 'x' has 33 dimensions; at most 32 are allowed"),
        ("FP32", (2, -1), "the shape of input 'x' holds -1; a dimension is a whole number, 0 or more"),
        ("FP32", (2.0,), "the shape of input 'x' holds 2.0; a dimension is a whole number, 0 or more"),
        ("FP32", (True,), "the shape of input 'x' holds True; a dimension is a whole number, 0 or more"),
        ("FP32", ("2",), "the shape of input 'x' holds '2'; a dimension is a whole number, 0 or more"),
        ("FP32", ((1 << 62) + 1,), "the shape of input 'x' holds 4611686018427387905; a dimension is"),
        ("FP32", (1 << 31, 1 << 32), "byte size overflow for input 'x' of shape [2147483648, 4294967296]"),
    ],
)
def test_a_declaration_that_cannot_exist_is_told_why(datatype: str, shape: tuple[int, ...], sentence: str) -> None:
    with pytest.raises(PenstockError) as caught:
        check_declaration("x", datatype, shape)
    assert caught.value.code == BAD_INPUT
    assert caught.value.message.startswith(sentence)


@pytest.mark.parametrize(
    ("versions", "expected"),
    [
        (["1"], "1"),
        (["1", "10", "9"], "10"),
        (["beta", "alpha"], "beta"),
        (["1", "beta"], "1"),
        (["2", "002", "1"], "2"),
        (["-1", "0"], "0"),
    ],
)
def test_the_newest_version_is_the_highest_number_else_the_last_name(versions: list[str], expected: str) -> None:
    assert newest(versions) == expected
    assert newest(versions[::-1]) == expected
