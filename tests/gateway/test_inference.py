"""Bodies of inference requests to forms and payloads, and answers to responses."""

from __future__ import annotations

import json
import math
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.gateway.changes import Style
from penstock.gateway.inference import Parser, Query, render, render_body
from penstock.wire.codec import pack_outcome, unpack_layout
from penstock.wire.errors import BAD_INPUT, BadMessage, PenstockError
from penstock.wire.messages import Outcome
from penstock.wire.models import MAX_TENSORS, Layout, ModelSpec, Tensor, TensorSpec
from penstock.wire.tensors import DTYPES, Buffer, decode, pack_strings

PAIR = ModelSpec(
    "pair",
    "3",
    "onnxruntime_onnx",
    (TensorSpec("a", "INT32", (-1, 2)), TensorSpec("b", "BYTES", (-1, 1))),
    (TensorSpec("sum", "INT32", (-1, 2)), TensorSpec("text", "BYTES", (-1, 1))),
    True,
    8,
)
HALF = ModelSpec(
    "half",
    "1",
    "onnxruntime_onnx",
    (TensorSpec("x", "FP16", (-1,)),),
    (TensorSpec("y", "FP16", (-1,)), TensorSpec("z", "FP32", (-1,))),
    False,
    1,
)
A_RAW = np.array([[1, 2], [3, 4]], "<i4").tobytes()
B_RAW = pack_strings(["x", "yz"])
A_JSON = {"name": "a", "shape": [2, 2], "datatype": "INT32", "data": [1, 2, 3, 4]}
B_JSON = {"name": "b", "shape": [2, 1], "datatype": "BYTES", "data": ["x", "yz"]}


def as_binary(each: dict[str, Any], size: Any) -> dict[str, Any]:
    return {key: value for key, value in each.items() if key != "data"} | {"parameters": {"binary_data_size": size}}


A_BINARY, B_BINARY = as_binary(A_JSON, len(A_RAW)), as_binary(B_JSON, len(B_RAW))


def parse(
    request: Any, binary: bytes | None = None, spec: ModelSpec = PAIR, parser: Parser | None = None
) -> tuple[Query, bytes]:
    text = json.dumps(request).encode()
    parsed, payload = (parser or Parser()).parse(spec, text + (binary or b""), None if binary is None else len(text))
    return parsed, bytes(payload)


def refusal(request: Any, binary: bytes | None = None, spec: ModelSpec = PAIR) -> str:
    with pytest.raises(PenstockError) as raised:
        parse(request, binary, spec)
    assert raised.value.code == BAD_INPUT
    return raised.value.message


# --- requests ---


@pytest.mark.parametrize(
    ("inputs", "binary"),
    [
        ([A_JSON, B_JSON], None),
        ([A_JSON, B_JSON], b""),
        ([A_JSON | {"data": [[1, 2], [3, 4]]}, B_JSON | {"data": [["x"], ["yz"]]}], None),
        ([A_BINARY, B_BINARY], A_RAW + B_RAW),
        ([A_BINARY, B_JSON], A_RAW),
        ([A_JSON, B_BINARY], B_RAW),
    ],
)
def test_inputs_in_json_and_binary_mean_the_same(inputs: list[Any], binary: bytes | None) -> None:
    query, payload = parse({"inputs": inputs}, binary)
    assert payload == A_RAW + B_RAW
    assert unpack_layout(query.form.body) == Layout(
        (Tensor("a", "INT32", (2, 2), 0, 16), Tensor("b", "BYTES", (2, 1), 16, len(B_RAW)))
    )
    form = query.form
    assert (form.model, form.version, form.rows, form.nbytes, form.priority) == ("pair", "3", 2, len(payload), 0)
    assert (query.spec, query.id, query.timeout_s, query.style) == (PAIR, "", 0, Style(False))


def test_inputs_lie_in_the_order_of_the_request() -> None:
    query, payload = parse({"inputs": [B_BINARY, A_BINARY]}, B_RAW + A_RAW)
    assert payload == B_RAW + A_RAW
    assert [tensor.name for tensor in unpack_layout(query.form.body).tensors] == ["b", "a"]


def test_large_binary_inputs_are_not_copied() -> None:
    text = json.dumps({"inputs": [A_BINARY, B_BINARY]}).encode()
    body = memoryview(bytearray(text + A_RAW + B_RAW))
    parser = Parser()
    for _ in range(2):
        _, payload = parser.parse(PAIR, body, len(text))
        assert isinstance(payload, memoryview)
        assert payload.obj is body.obj


def test_id_priority_and_timeout() -> None:
    parameters = {"priority": 1, "timeout": 1_500_000, "something": "else"}
    query, _ = parse({"id": "né 1", "parameters": parameters, "inputs": [A_JSON, B_JSON]})
    assert (query.id, query.form.priority, query.timeout_s) == ("né 1", 1, 1.5)


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"parameters": {"priority": 9}}, "parameter 'priority' is a whole number"),  # before it is held
        ({"inputs": [A_JSON | {"shape": [4, 1]}, B_JSON]}, "unexpected shape for input 'a'"),  # against the model
        ({"inputs": [A_JSON | {"data": [1]}, B_JSON]}, "input 'a' has 1 elements"),
        ({"outputs": [{"name": "nope"}]}, "unexpected inference output 'nope'"),
    ],
)
def test_what_is_wrong_names_the_request(wrong: dict[str, Any], sentence: str) -> None:
    request = {"inputs": [A_JSON, B_JSON], **wrong}
    assert refusal(request).startswith(sentence)
    assert refusal({"id": "a1", **request}).startswith(f"[request id: a1] {sentence}")


@pytest.mark.parametrize("binary", [False, True])
def test_requests_that_differ_in_urgency_or_tenant_are_not_taken_for_each_other(binary: bool) -> None:
    """Though their JSON is the same, and known."""
    parser = Parser()
    inputs, raw = ([A_BINARY, B_BINARY], A_RAW + B_RAW) if binary else ([A_JSON, B_JSON], b"")
    text = json.dumps({"inputs": inputs, "parameters": {"priority": 4}}).encode()
    length = len(text) if binary else None
    for _ in range(2):
        for priority, tenant in ((0, ""), (1, ""), (0, "blue"), (1, "blue"), (0, "red")):
            form = parser.parse(PAIR, text + raw, length, priority, tenant)[0].form
            assert (form.priority, form.tenant) == (priority or 4, tenant)
            assert parser.parse(PAIR, text + raw, length, priority, tenant)[0].form is form


def test_a_priority_that_is_none_is_refused_whatever_holds() -> None:
    text = json.dumps({"inputs": [A_JSON, B_JSON], "parameters": {"priority": 9}}).encode()
    with pytest.raises(PenstockError, match="parameter 'priority' is a whole number from 0 to 5"):
        Parser().parse(PAIR, text, None, 2)


def test_what_is_remembered_of_tenants_is_bounded() -> None:
    parser = Parser()
    text = json.dumps({"inputs": [A_BINARY, B_BINARY]}).encode()
    for number in range(3000):
        parser.parse(PAIR, text + A_RAW + B_RAW, len(text), 0, f"tenant {number}")
    assert len(parser._known) <= 1024
    assert len(parser._forms._known) <= 1024


@pytest.mark.parametrize(
    ("outputs", "default", "style", "binary"),
    [
        ([], None, Style(False), []),
        ([], False, Style(False), []),
        ([], True, Style(True), ["sum", "text"]),
        ([{"name": "sum"}], None, Style(False), []),
        ([{"name": "sum"}], True, Style(True), ["sum", "text"]),
        ([{"name": "sum", "parameters": {}}], True, Style(True), ["sum", "text"]),
        ([{"name": "sum", "parameters": {"binary_data": True}}], None, Style(False, frozenset({"sum"})), ["sum"]),
        ([{"name": "sum", "parameters": {"binary_data": False}}], True, Style(True, frozenset({"sum"})), ["text"]),
        ([{"name": "sum", "parameters": {"binary_data": True}}], True, Style(True), ["sum", "text"]),
    ],
)
def test_outputs_that_are_wanted_and_how(outputs: list[Any], default: bool | None, style: Style, binary: Any) -> None:
    parameters = {} if default is None else {"binary_data_output": default}
    query, _ = parse({"parameters": parameters, "inputs": [A_JSON, B_JSON], "outputs": outputs})
    assert query.style == style
    assert [name for name in ("sum", "text") if query.style.is_binary(name)] == binary
    assert unpack_layout(query.form.body).outputs == tuple(each["name"] for each in outputs)


def test_half_floats_are_asked_for_as_binary() -> None:
    x = {"name": "x", "shape": [1], "datatype": "FP16", "parameters": {"binary_data_size": 2}}
    query, _ = parse({"inputs": [x], "parameters": {"binary_data_output": True}}, b"ab", HALF)
    assert query.style == Style(True)
    assert parse({"inputs": [x], "outputs": [{"name": "z"}]}, b"ab", HALF)[0].style == Style(False)
    for outputs in ([], [{"name": "y"}], [{"name": "z"}, {"name": "y", "parameters": {"binary_data": False}}]):
        assert refusal({"inputs": [x], "outputs": outputs}, b"ab", HALF) == (
            "output 'y' is FP16, which JSON cannot carry; ask for it with binary_data"
        )


def changed(**values: Any) -> dict[str, Any]:
    """A good request, in which ``a`` is otherwise."""
    each = {key: value for key, value in (A_JSON | values).items() if value is not ...}
    return {"inputs": [each, B_JSON]}


@pytest.mark.parametrize(
    ("request_", "sentence"),
    [
        ([], "the request is not a JSON object"),
        ({}, "the request has no list 'inputs'"),
        ({"inputs": {}}, "the request has no list 'inputs'"),
        ({"inputs": [1]}, "an input is not a JSON object"),
        ({"inputs": [A_JSON, B_JSON], "id": 7}, "'id' is a string of at most 1024 characters"),
        ({"inputs": [A_JSON, B_JSON], "id": "x" * 1025}, "'id' is a string of at most 1024 characters"),
        ({"inputs": [A_JSON, B_JSON], "parameters": []}, "'parameters' is not a JSON object"),
        ({"inputs": [A_JSON, B_JSON], "parameters": {"priority": -1}}, "parameter 'priority' is a whole number from 0"),
        ({"inputs": [A_JSON, B_JSON], "parameters": {"priority": 6}}, "from 0 to 5"),
        ({"inputs": [A_JSON, B_JSON], "parameters": {"priority": True}}, "parameter 'priority' is a whole number"),
        ({"inputs": [A_JSON, B_JSON], "parameters": {"timeout": 1.5}}, "parameter 'timeout' is a whole number"),
        ({"inputs": [A_JSON, B_JSON], "parameters": {"timeout": 1 << 60}}, "from 0 to 86400000000"),
        (
            {"inputs": [A_JSON, B_JSON], "parameters": {"binary_data_output": 1}},
            "'binary_data_output' is true or false",
        ),
        ({"inputs": [A_JSON, B_JSON], "outputs": {}}, "'outputs' is a list"),
        ({"inputs": [A_JSON, B_JSON], "outputs": ["sum"]}, "an output is not a JSON object"),
        ({"inputs": [A_JSON, B_JSON], "outputs": [{}]}, "an output's 'name' is a string of at most 256 characters"),
        (
            {"inputs": [A_JSON, B_JSON], "outputs": [{"name": "nope"}]},
            "unexpected inference output 'nope' for model 'pair'; its outputs are ['sum', 'text']",
        ),
        (
            {"inputs": [A_JSON, B_JSON], "outputs": [{"name": "sum"}, {"name": "sum"}]},
            "output 'sum' already exists in request for model 'pair'",
        ),
        (
            {"inputs": [A_JSON, B_JSON], "outputs": [{"name": "sum", "parameters": {"binary_data": "yes"}}]},
            "parameter 'binary_data' is true or false",
        ),
        (
            {"inputs": [A_JSON, B_JSON], "outputs": [{"name": "sum", "parameters": []}]},
            "'parameters' of output 'sum' is not a JSON object",
        ),
        (
            {"inputs": [A_JSON, B_JSON], "outputs": [{"name": "sum", "parameters": {"classification": 0}}]},
            "output 'sum': 'classification' is how many classes to tell, a whole number from 1 to 2147483647",
        ),
        (
            {"inputs": [A_JSON, B_JSON], "outputs": [{"name": "text", "parameters": {"classification": 1}}]},
            "class result not available for output 'text' due to unsupported type 'BYTES'",
        ),
        (changed(name=...), "an input's 'name' is a string of at most 256 characters"),
        (changed(name="x" * 257), "an input's 'name' is a string of at most 256 characters"),
        (changed(datatype=...), "input 'a' has no 'datatype'"),
        (changed(datatype="INT33"), "input 'a' has the unknown data-type 'INT33'; known are BF16, BOOL, BYTES"),
        (changed(shape=...), "input 'a' has no list 'shape'"),
        (changed(shape="2"), "input 'a' has no list 'shape'"),
        (changed(shape=[2, "2"]), "the shape of input 'a' holds '2'; a dimension is a whole number, 0 or more"),
        (changed(shape=[2, -1]), "the shape of input 'a' holds -1; a dimension is a whole number, 0 or more"),
        (changed(shape=[2, 2.0]), "the shape of input 'a' holds 2.0; a dimension is a whole number, 0 or more"),
        (changed(shape=[2, True]), "the shape of input 'a' holds True; a dimension is a whole number, 0 or more"),
        (changed(shape=[1] * 33), "input 'a' has 33 dimensions; at most 32 are allowed"),
        (changed(shape=[1 << 40, 1 << 40]), "byte size overflow for input 'a' of shape"),
        (changed(data=...), "input 'a' has neither data nor a binary_data_size"),
        (changed(parameters=[]), "'parameters' of input 'a' is not a JSON object"),
        (changed(parameters={"binary_data_size": 16}), "input 'a' has both data and a binary_data_size"),
        (changed(data=[1, 2, 3]), "input 'a' has 3 elements in its data; its shape [2, 2] takes 4"),
        (
            changed(datatype="INT64"),
            "inference input 'a' data-type is 'INT64', but model 'pair' expects 'INT32'",
        ),
        (
            changed(shape=[4, 1]),
            "unexpected shape for input 'a' for model 'pair'. Expected [-1, 2], got [4, 1]",
        ),
        (
            changed(shape=[1, 2], data=[1, 2]),
            "input 'b' batch size does not match other inputs for 'pair': 2 and 1",
        ),
        ({"inputs": []}, "expected 2 inputs but got 0 inputs for model 'pair'. Got input(s) [], but missing"),
        ({"inputs": [A_JSON]}, "missing required input(s) ['b']"),
        ({"inputs": [A_JSON, B_JSON, A_JSON]}, "input 'a' already exists in request for model 'pair'"),
        (
            {"inputs": [A_JSON, B_JSON, A_JSON | {"name": "c"}]},
            "unexpected inference input 'c' for model 'pair'; its inputs are ['a', 'b']",
        ),
        (
            {
                "inputs": [
                    A_JSON | {"shape": [9, 2], "data": [0] * 18},
                    B_JSON | {"shape": [9, 1], "data": [""] * 9},
                ]
            },
            "inference request batch-size must be <= 8 for 'pair', and is 9; split the request",
        ),
    ],
)
def test_request_that_makes_no_sense_is_told_why(request_: Any, sentence: str) -> None:
    assert sentence in refusal(request_)


@pytest.mark.parametrize(
    ("inputs", "binary", "sentence"),
    [
        ([A_BINARY, B_BINARY], A_RAW, "input 'b' claims 11 bytes of binary data, and 0 are left"),
        ([A_BINARY, B_BINARY], A_RAW + B_RAW[:-1], "input 'b' claims 11 bytes of binary data, and 10 are left"),
        (
            [A_BINARY, B_BINARY],
            A_RAW + B_RAW + b"!",
            "the request carries 28 bytes of binary data, and its inputs claim 27",
        ),
        ([A_JSON, B_JSON], b"!", "the request carries 1 bytes of binary data, and its inputs claim 0"),
        (
            [as_binary(A_JSON, 12), B_BINARY],
            A_RAW[:12] + B_RAW,
            "input 'a' of shape [2, 2] and data-type INT32 takes 16 bytes, and 12 came",
        ),
        ([A_BINARY, as_binary(B_JSON, 7)], A_RAW + B_RAW[:7], "input 'b' of shape [2, 1] has too few bytes of data: 7"),
        (
            [as_binary(A_JSON, -1), B_BINARY],
            A_RAW + B_RAW,
            "binary_data_size of input 'a' is a whole number, 0 or more",
        ),
        ([as_binary(A_JSON, 16.0), B_BINARY], A_RAW + B_RAW, "binary_data_size of input 'a' is a whole number"),
        ([as_binary(A_JSON, "16"), B_BINARY], A_RAW + B_RAW, "binary_data_size of input 'a' is a whole number"),
        ([as_binary(A_JSON, True), B_BINARY], A_RAW + B_RAW, "binary_data_size of input 'a' is a whole number"),
        ([as_binary(A_JSON, 1 << 70), B_BINARY], A_RAW + B_RAW, "input 'a'"),
    ],
)
def test_sizes_that_lie_are_refused(inputs: list[Any], binary: bytes, sentence: str) -> None:
    assert sentence in refusal({"inputs": inputs}, binary)


@pytest.mark.parametrize(("key", "each"), [("inputs", A_JSON), ("outputs", {"name": "sum"})])
def test_more_tensors_than_any_model_has_are_not_looked_at(key: str, each: dict[str, Any]) -> None:
    sentence = refusal({"inputs": [A_JSON, B_JSON], key: [each] * (MAX_TENSORS + 1)})
    assert sentence == f"the request has 1025 {key}; at most 1024 are allowed"
    assert "at most" not in refusal({"inputs": [A_JSON, B_JSON], key: [each] * MAX_TENSORS})


def test_header_length_beyond_the_body_is_refused() -> None:
    with pytest.raises(PenstockError) as raised:
        Parser().parse(PAIR, b"{}", 1_000_000)
    assert raised.value.message == "Inference-Header-Content-Length is 1000000, and the body has 2 bytes"


def single(datatype: str, shape: tuple[int, ...], batchable: bool) -> ModelSpec:
    return PAIR._replace(inputs=(TensorSpec("x", datatype, shape),), batchable=batchable)


@pytest.mark.parametrize(
    ("datatype", "declared", "batchable", "nbytes", "shape"),
    [
        ("FP32", (-1, 4), True, 16, (1, 4)),
        ("FP32", (-1, 4), False, 48, (3, 4)),
        ("FP16", (-1, -1, 2), True, 12, (1, 3, 2)),
        ("INT64", (2,), False, 16, (2,)),
        ("UINT8", (-1,), False, 0, (0,)),
    ],
)
def test_body_without_json_is_one_row_of_the_only_input(
    datatype: str, declared: tuple[int, ...], batchable: bool, nbytes: int, shape: tuple[int, ...]
) -> None:
    query, payload = Parser().parse(single(datatype, declared, batchable), bytes(range(nbytes)), 0, 2, "blue")
    assert unpack_layout(query.form.body) == Layout((Tensor("x", datatype, shape, 0, nbytes),))
    assert bytes(payload) == bytes(range(nbytes))
    assert (query.style, query.id, query.form.priority, query.form.tenant) == (Style(True), "", 2, "blue")


@pytest.mark.parametrize(("declared", "batchable", "shape"), [((-1, 1), True, (1, 1)), ((-1,), False, (1,))])
def test_body_without_json_may_be_a_string(declared: tuple[int, ...], batchable: bool, shape: tuple[int, ...]) -> None:
    query, payload = Parser().parse(single("BYTES", declared, batchable), "Grüße".encode(), 0)
    assert decode("BYTES", shape, payload).ravel().tolist() == ["Grüße".encode()]
    assert unpack_layout(query.form.body).tensors[0].shape == shape


@pytest.mark.parametrize(
    ("spec", "sentence"),
    [
        (PAIR, "is for models with one input; 'pair' has ['a', 'b']"),
        (single("FP32", (-1, -1, -1), True), "input 'x' of model 'pair' is FP32 of shape [-1, -1, -1], which a body"),
        (single("BYTES", (-1, 2), True), "input 'x' of model 'pair' is BYTES of shape [-1, 2], which a body without"),
        (single("FP32", (-1, 4), True), "takes 16 bytes, and 7 came"),
        (single("FP32", (-1, 2), False), "input 'x' of shape [0, 2] and data-type FP32 takes 0 bytes, and 7 came"),
    ],
)
def test_body_without_json_that_does_not_fit_is_refused(spec: ModelSpec, sentence: str) -> None:
    with pytest.raises(PenstockError) as raised:
        Parser().parse(spec, bytes(7), 0)
    assert (raised.value.code, sentence in raised.value.message) == (BAD_INPUT, True), raised.value.message


@pytest.mark.parametrize("by", [-1, 1, 5])
def test_header_length_that_lies_is_refused(by: int) -> None:
    text = json.dumps({"inputs": [A_BINARY, B_BINARY]}).encode()
    with pytest.raises(PenstockError, match="the request is not JSON"):
        Parser().parse(PAIR, text + A_RAW + B_RAW, len(text) + by)


# --- requests that come again ---


def test_template_with_other_tensors_is_not_parsed_again() -> None:
    parser = Parser()
    first, _ = parse({"inputs": [A_BINARY, B_BINARY]}, A_RAW + B_RAW, parser=parser)
    second, payload = parse({"inputs": [A_BINARY, B_BINARY]}, A_RAW[::-1] + B_RAW, parser=parser)
    assert second is first
    assert payload == A_RAW[::-1] + B_RAW


def test_template_means_something_else_when_the_model_has_changed() -> None:
    parser = Parser()
    first, _ = parse({"inputs": [A_BINARY, B_BINARY]}, A_RAW + B_RAW, parser=parser)
    again = PAIR._replace(max_batch_size=8)
    assert again == PAIR
    second, _ = parse({"inputs": [A_BINARY, B_BINARY]}, A_RAW + B_RAW, again, parser)
    assert second is not first
    assert second.spec is again
    with pytest.raises(PenstockError, match="batch-size must be <= 1"):
        parse({"inputs": [A_BINARY, B_BINARY]}, A_RAW + B_RAW, PAIR._replace(max_batch_size=1), parser)


def test_template_of_one_version_is_not_that_of_another() -> None:
    parser = Parser()
    other = PAIR._replace(version="4")
    for spec in (PAIR, other, PAIR):
        query, _ = parse({"inputs": [A_BINARY, B_BINARY]}, A_RAW + B_RAW, spec, parser)
        assert (query.spec, query.form.version) == (spec, spec.version)


def test_template_with_another_size_is_checked_again() -> None:
    parser = Parser()
    parse({"inputs": [A_BINARY, B_BINARY]}, A_RAW + B_RAW, parser=parser)
    for binary in (A_RAW + B_RAW[:-1], A_RAW + B_RAW + b"!", b""):
        with pytest.raises(PenstockError, match="binary data"):
            parse({"inputs": [A_BINARY, B_BINARY]}, binary, parser=parser)


@pytest.mark.parametrize(
    ("request_", "binary"),
    [
        ({"inputs": [A_JSON, B_BINARY]}, B_RAW),
        ({"inputs": [A_JSON, B_JSON]}, b""),
        ({"id": "1", "inputs": [A_BINARY, B_BINARY]}, A_RAW + B_RAW),
        ({"inputs": [A_BINARY, B_BINARY], "x": "y" * 4096}, A_RAW + B_RAW),
    ],
)
def test_request_that_is_more_than_its_template_is_parsed_each_time(request_: Any, binary: bytes) -> None:
    parser = Parser()
    assert parse(request_, binary, parser=parser)[0] is not parse(request_, binary, parser=parser)[0]


def test_requests_that_differ_in_their_id_share_a_form() -> None:
    parser = Parser()
    queries = [
        parse({"id": str(number), "inputs": [A_BINARY, B_BINARY]}, A_RAW + B_RAW, parser=parser)[0]
        for number in range(3)
    ]
    assert [query.id for query in queries] == ["0", "1", "2"]
    assert queries[0].form is queries[1].form is queries[2].form


def test_refused_request_is_not_remembered() -> None:
    parser = Parser()
    for _ in range(2):
        with pytest.raises(PenstockError, match="unexpected inference output"):
            parse({"inputs": [A_BINARY, B_BINARY], "outputs": [{"name": "x"}]}, A_RAW + B_RAW, parser=parser)


# --- requests in JSON that differ in their numbers alone ---


NUMBER = st.one_of(st.integers(-5, 300), st.sampled_from([2**31, -(2**63), 2**64, 10**400]), st.floats(width=32))
VALUES = st.one_of(
    *(st.lists(NUMBER | each, min_size=3, max_size=5) for each in (st.nothing(), st.booleans(), st.text(max_size=2))),
    st.lists(st.lists(NUMBER, min_size=2, max_size=2), min_size=2, max_size=2),
    st.sampled_from([None, 1, "x", {}, [None], [], [[1, 2], [3]], [[], [1, 2, 3, 4]]]),
)


@st.composite
def similar(draw: st.DrawFn) -> list[bytes]:
    """Requests with the same words around their data, and some bytes of theirs replaced."""
    each = draw(st.permutations(["name", "shape", "datatype", "data"]))
    spaces = draw(st.sampled_from([(",", ":"), (", ", ": "), (",", " : ")]))
    bodies = []
    for _ in range(3):
        values = {"name": "x", "shape": [2, 2], "datatype": DATATYPE, "data": draw(VALUES)}
        beside = {"outputs": [{"name": "y"}], "parameters": {"data": [1, 2, 3, 4]} if draw(st.booleans()) else {}}
        request = {"inputs": [{key: values[key] for key in each}], **beside}
        text = json.dumps(request, separators=spaces)
        if draw(st.booleans()):
            text = text.replace("data", "d\\u0061ta", 1)
        raw = bytearray(text.encode())
        if draw(st.booleans()):
            at = draw(st.integers(0, len(raw)))
            new = st.sampled_from([b"null", b"[", b"]", b"],", b"{", b"}", b'"', b"-", b"NaN", b"1e999", b"true", b" "])
            raw[at : at + draw(st.integers(0, 3))] = draw(new)
        bodies.append(bytes(raw))
    return bodies


DATATYPE = "INT32"


def outcome_of(parser: Parser, spec: ModelSpec, body: bytes) -> object:
    try:
        query, payload = parser.parse(spec, body, None)
    except PenstockError as error:
        return error.code, error.message
    return query.form, query.style, query.id, query.timeout_s, query.explain, bytes(payload)


@settings(max_examples=400, deadline=None)
@given(similar(), st.sampled_from(["INT32", "UINT8", "UINT64", "FP32", "FP64", "BOOL", "BYTES"]))
def test_what_came_before_does_not_change_what_a_request_means(bodies: list[bytes], datatype: str) -> None:
    spec, used = single(datatype, (-1, 2), True), Parser()
    for body in bodies:
        body = body.replace(DATATYPE.encode(), datatype.encode())
        assert outcome_of(used, spec, body) == outcome_of(Parser(), spec, body)


@pytest.mark.parametrize("separators", [(",", ":"), (", ", ": ")])
def test_words_around_numbers_are_parsed_once(separators: tuple[str, str]) -> None:
    parser, spec = Parser(), single("FP32", (-1, 2), True)

    def query(*data: float) -> tuple[Query, list[float]]:
        request = {"inputs": [{"name": "x", "shape": [1, 2], "datatype": "FP32", "data": data}]}
        found, payload = parser.parse(spec, json.dumps(request, separators=separators).encode(), None)
        return found, np.frombuffer(payload, "<f4").tolist()

    first, _ = query(1, 2)
    again, data = query(0.5, 7)
    assert again is first
    assert data == [0.5, 7]
    not_a_number, data = query(0.5, float("nan"))
    assert not_a_number == first
    assert math.isnan(data[1])
    spec = spec._replace(max_batch_size=7)
    other, _ = query(0.5, 7)
    assert other.spec is spec
    assert query(1, 1)[0] is other


def test_words_around_numbers_are_remembered_up_to_a_size() -> None:
    parser, spec = Parser(), single("FP32", (-1, 2), True)
    for length, same in ((3000, True), (5000, False)):
        for key in ("before", "behind"):
            around = {"inputs": [{"name": "x", "shape": [1, 2], "datatype": "FP32", "data": [1, 2]}]}
            filled = {"ignored": " " * length}
            body = json.dumps({**filled, **around} if key == "before" else {**around, **filled}).encode()
            assert (parser.parse(spec, body, None)[0] is parser.parse(spec, body, None)[0]) == same, (length, key)


# --- anything at all ---


@st.composite
def damaged(draw: st.DrawFn) -> tuple[bytes, int | None]:
    """A valid body with some bytes replaced, and any header length."""
    inputs, binary = draw(
        st.sampled_from([([A_JSON, B_JSON], b""), ([A_BINARY, B_BINARY], A_RAW + B_RAW), ([A_BINARY, B_JSON], A_RAW)])
    )
    text = json.dumps({"id": "i", "inputs": inputs, "outputs": [{"name": "sum"}]}).encode()
    raw = bytearray(text + binary)
    for _ in range(draw(st.integers(0, 3))):
        at = draw(st.integers(0, len(raw)))
        new = st.binary(max_size=3) | st.sampled_from([b"null", b"[", b"]", b"{", b"}", b'"', b"-", b"NaN", b"1e999"])
        raw[at : at + draw(st.integers(0, 3))] = draw(new)
    length = len(text) if binary else None
    return bytes(raw), draw(st.just(length) | st.none() | st.integers(0, len(raw) + 2))


@settings(max_examples=500, deadline=None)
@given(damaged() | st.tuples(st.binary(max_size=80), st.none() | st.integers(0, 90)))
def test_any_body_is_a_request_or_refused(given_: tuple[bytes, int | None]) -> None:
    body, header_length = given_
    try:
        query, payload = SHARED.parse(PAIR, body, header_length)
    except PenstockError as error:
        outcome: object = json.dumps(error.message, ensure_ascii=False).encode() and error.code
    else:
        outcome = len(payload) == query.form.nbytes
    assert outcome in (True, BAD_INPUT)


SHARED = Parser()


# --- answers ---


class Said(NamedTuple):
    status: bytes
    headers: dict[str, str]
    text: bytes  # the JSON part
    binary: bytes


def respond(outcome: Outcome, payload: Buffer, style: Style, identifier: str = "") -> Said:
    return split(*render(pack_outcome(outcome), payload, style, identifier))


def split(head: bytes, tail: Buffer) -> Said:
    before, _, body = (head + bytes(tail)).partition(b"\r\n\r\n")
    first, *lines = before.split(b"\r\n")
    headers = dict(line.decode().split(": ", 1) for line in lines)
    assert int(headers["Content-Length"]) == len(body)
    at = int(headers.get("Inference-Header-Content-Length", len(body)))
    return Said(first, headers, body[:at], body[at:])


SUM = Tensor("sum", "INT32", (2, 2), 0, 16)
TEXT = Tensor("text", "BYTES", (2, 1), 16, len(B_RAW))
ANSWER = Outcome("pair", "3", (SUM, TEXT))


def test_answer_in_json() -> None:
    said = respond(ANSWER, A_RAW + B_RAW, Style(False))
    assert said.status == b"HTTP/1.1 200 OK"
    assert said.headers == {"Content-Type": "application/json", "Content-Length": str(len(said.text))}
    assert said.text == (
        b'{"model_name":"pair","model_version":"3","outputs":['
        b'{"name":"sum","datatype":"INT32","shape":[2,2],"data":[1,2,3,4]},'
        b'{"name":"text","datatype":"BYTES","shape":[2,1],"data":["x","yz"]}]}'
    )


@pytest.mark.parametrize("identifier", ["", "7"])
def test_answer_as_binary(identifier: str) -> None:
    said = respond(ANSWER, A_RAW + B_RAW, Style(True), identifier)
    assert said.headers == {
        "Content-Type": "application/octet-stream",
        "Inference-Header-Content-Length": str(len(said.text)),
        "Content-Length": str(len(said.text) + len(said.binary)),
    }
    start = b'{"id":"7",' if identifier else b"{"
    assert said.text == start + (
        b'"model_name":"pair","model_version":"3","outputs":['
        b'{"name":"sum","datatype":"INT32","shape":[2,2],"parameters":{"binary_data_size":16}},'
        b'{"name":"text","datatype":"BYTES","shape":[2,1],"parameters":{"binary_data_size":11}}]}'
    )
    assert said.binary == A_RAW + B_RAW


@pytest.mark.parametrize("style", [Style(True), Style(False), Style(True, frozenset({"sum"}))])
@pytest.mark.parametrize("identifier", ["", "7"])
def test_answer_with_more_headers_and_parameters(style: Style, identifier: str) -> None:
    payload = A_RAW + B_RAW
    plain = respond(ANSWER, payload, style, identifier)
    head, tail = render(pack_outcome(ANSWER), payload, style, identifier, b"HTTP/1.1 200 OK\r\nA: b\r\n", b'{"c":1}')
    said = split(head, tail)
    assert (said.headers.pop("A"), said.status, said.binary) == ("b", plain.status, plain.binary)
    assert said.headers.keys() == plain.headers.keys()
    told = json.loads(said.text)
    assert list(told)[-2:] == ["parameters", "outputs"]
    assert told.pop("parameters") == {"c": 1}
    assert told == json.loads(plain.text)
    more = split(*render(pack_outcome(ANSWER), payload, style, identifier, b"HTTP/1.1 200 OK\r\nA: b\r\n"))
    assert (more.headers.pop("A"), more) == ("b", plain)


def test_binary_answer_is_not_copied() -> None:
    payload = memoryview(A_RAW + B_RAW)
    assert render(pack_outcome(ANSWER), payload, Style(True), "")[1] is payload


def test_some_outputs_as_binary() -> None:
    said = respond(ANSWER, A_RAW + B_RAW, Style(True, frozenset({"sum"})))
    assert [each.get("data") for each in json.loads(said.text)["outputs"]] == [[1, 2, 3, 4], None]
    assert said.binary == B_RAW


def test_keys_come_in_the_order_that_clients_know() -> None:
    said = json.loads(respond(ANSWER, A_RAW + B_RAW, Style(False, frozenset({"text"})), "7").text)
    assert list(said) == ["id", "model_name", "model_version", "outputs"]
    assert [list(each) for each in said["outputs"]] == [
        ["name", "datatype", "shape", "data"],
        ["name", "datatype", "shape", "parameters"],
    ]


@pytest.mark.parametrize("text", ['"', "\\", "\n\0", "é \N{GRINNING FACE}", "</script>", "x" * 256])
def test_names_and_ids_are_escaped(text: str) -> None:
    outcome = Outcome(text, text, (Tensor(text, "UINT8", (1,), 0, 1),))
    for style in (Style(False), Style(True)):
        said = json.loads(respond(outcome, b"a", style, text).text)
        assert (said["id"], said["model_name"], said["model_version"]) == (text, text, text)
        assert said["outputs"][0]["name"] == text


@pytest.mark.parametrize("style", [Style(True), Style(False), Style(True, frozenset({"sum"}))])
@pytest.mark.parametrize("payload", [A_RAW + B_RAW[:-1], A_RAW, b""])
def test_answer_beyond_its_payload_is_an_error(payload: bytes, style: Style) -> None:
    with pytest.raises(BadMessage, match="an output lies from"):
        render(pack_outcome(ANSWER), payload, style, "")


def test_what_lies_behind_the_outputs_is_not_sent() -> None:
    assert respond(ANSWER, A_RAW + B_RAW + b"padding", Style(True)).binary == A_RAW + B_RAW


@pytest.mark.parametrize("body", [b"", b"\xc1", b"\x93\xa1m\xa1v\x00"])
def test_answer_that_is_no_outcome_is_an_error(body: bytes) -> None:
    with pytest.raises(BadMessage):
        render(body, b"", Style(False), "")


def test_answer_with_a_string_that_json_cannot_carry_is_an_error() -> None:
    outcome = Outcome("m", "1", (Tensor("t", "BYTES", (1,), 0, 5),))
    with pytest.raises(PenstockError, match="ask for it as binary"):
        render_body(pack_outcome(outcome), b"\x01\0\0\0\xff", Style(False), "")
    assert respond(outcome, b"\x01\0\0\0\xff", Style(True)).binary == b"\x01\0\0\0\xff"


CHARACTERS = st.characters(codec="utf-8")
NAMES = st.text(CHARACTERS, min_size=1, max_size=8)


@st.composite
def tensors(draw: st.DrawFn) -> tuple[list[Tensor], bytes]:
    """Tensors of any kind, and the payload that they lie in, with gaps as a worker may leave them."""
    found: list[Tensor] = []
    payload = b""
    for name in draw(st.lists(NAMES, min_size=1, max_size=4, unique=True)):
        datatype = draw(st.sampled_from(sorted(DTYPES)))
        shape = tuple(draw(st.lists(st.integers(0, 3), max_size=3)))
        count = math.prod(shape)
        if datatype == "BYTES":
            raw = pack_strings(draw(st.lists(NAMES, min_size=count, max_size=count)))
        else:
            size = count * DTYPES[datatype].itemsize
            raw = draw(st.binary(min_size=size, max_size=size))
            raw = bytes(byte & 1 for byte in raw) if datatype == "BOOL" else raw
        payload += draw(st.sampled_from([b"", b"", b"gap"]))
        found.append(Tensor(name, datatype, shape, len(payload), len(raw)))
        payload += raw
    return found, payload + draw(st.sampled_from([b"", b"", b"gap"]))


@settings(max_examples=300, deadline=None)
@given(tensors(), st.booleans(), st.data(), st.just("") | st.text(CHARACTERS))
def test_response_read_as_a_request_has_the_same_tensors(
    lying: tuple[list[Tensor], bytes], binary: bool, data: st.DataObject, identifier: str
) -> None:
    lies, payload = lying
    only = {tensor.name for tensor in lies if tensor.datatype in ("FP16", "BF16")}
    may = sorted(({tensor.name for tensor in lies} - only) if binary else {tensor.name for tensor in lies})
    exceptions = frozenset(data.draw(st.sets(st.sampled_from(may)))) if may else frozenset()
    style = Style(binary, exceptions if binary else exceptions | only)
    said = respond(Outcome("m", "1", tuple(lies)), payload, style, identifier)

    text = json.dumps({"inputs": json.loads(said.text)["outputs"]}).encode()
    inputs = tuple(TensorSpec(tensor.name, tensor.datatype, tensor.shape) for tensor in lies)
    spec = ModelSpec("m", "1", "p", inputs, (), False, 1)
    query, back = Parser().parse(spec, text + said.binary, len(text) if said.binary else None)
    for before, after in zip(lies, unpack_layout(query.form.body).tensors, strict=True):
        assert before[:3] == after[:3]
        one = payload[before.offset : before.offset + before.nbytes]
        other = bytes(back[after.offset : after.offset + after.nbytes])
        if style.is_binary(before.name) or before.datatype not in ("FP32", "FP64"):
            assert one == other
        else:  # a NaN may come back as another one
            shape = before.shape
            np.testing.assert_array_equal(decode(before.datatype, shape, one), decode(before.datatype, shape, other))


def test_a_request_of_a_sequence_has_a_form_of_its_own_and_is_not_remembered() -> None:
    parser = Parser()
    request = {"inputs": [A_BINARY, B_BINARY], "parameters": {"sequence_id": 7, "sequence_start": True}}
    forms = [parse(request, A_RAW + B_RAW, parser=parser)[0].form for _ in range(2)]
    assert [(each.sequence, each.phase) for each in forms] == [("7", 1)] * 2
    assert forms[0] is not forms[1]
    plain = parse({"inputs": [A_BINARY, B_BINARY]}, A_RAW + B_RAW, parser=parser)[0]
    assert (plain.form.sequence, plain.reusable) == ("", True)
    assert "'sequence_id' is a whole number" in refusal(
        {"inputs": [A_JSON, B_JSON], "parameters": {"sequence_id": 1.5}}
    )
