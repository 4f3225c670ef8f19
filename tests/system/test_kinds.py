"""Models of every kind through a real server: served correctly, over HTTP and by the client library, or refused with a
reason."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from penstock.client import Client, PenstockError
from penstock.client.client import DEFAULT_ARENA_BYTES
from penstock.wire.errors import BAD_INPUT, UNAVAILABLE
from penstock.wire.tensors import Array
from tests.system import kinds
from tests.system.kinds import LABELS
from tests.system.servers import Server

Ask = Callable[..., dict[str, Array]]

_NAMES = {"float32": "FP32", "float64": "FP64", "float16": "FP16", "bfloat16": "BF16", "int64": "INT64"}
_TYPES: dict[str, Any] = {name: np.dtype(kind) for kind, name in _NAMES.items()}
WORDS = np.array([["", "é"], ["日本\0", "plain"]], dtype=object)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """It serves all kinds, and says of some that it cannot."""
    kinds.write_all(tmp_path_factory.mktemp("kinds"))
    repository = tmp_path_factory.getbasetemp() / "kinds0"
    server = Server(tmp_path_factory.mktemp("server") / "run", str(repository))
    yield server
    server.check_clean_end()


@pytest.fixture(scope="module", params=["placed", "sent"])
def client(request: pytest.FixtureRequest, server: Server) -> Iterator[Client]:
    """With memory that it shares with workers, and without."""
    with Client(server.runtime, arena_bytes=DEFAULT_ARENA_BYTES if request.param == "placed" else 0) as client:
        yield client


@pytest.fixture(params=["binary", "json", "infer", "submit"])
def ask(request: pytest.FixtureRequest, server: Server, client: Client) -> Ask:
    """``ask(model, x=array)``: its outputs, each way that there is."""
    if request.param == "infer":
        return lambda model, **inputs: dict(client.infer(model, inputs))
    if request.param == "submit":
        return lambda model, **inputs: dict(client.submit(model, inputs).result(30))
    return lambda model, **inputs: over_http(server, model, inputs, binary=request.param == "binary")


def over_http(server: Server, model: str, inputs: dict[str, Array], binary: bool = True) -> dict[str, Array]:
    status, answered, body = post(server, model, inputs, binary)
    assert status == 200, body
    size = int(answered.get("inference-header-content-length", len(body)))
    outputs = json.loads(body[:size])["outputs"]
    at, found = size, {}
    for output in outputs:
        data = output.get("data")
        if binary:
            nbytes = output["parameters"]["binary_data_size"]
            data = unpacked(output["datatype"], body[at : at + nbytes])
            at += nbytes
        kind = object if output["datatype"] == "BYTES" else _TYPES[output["datatype"]]
        array = np.empty(len(data), kind)
        array[:] = [each.encode() for each in data] if kind is object and not binary else data
        found[output["name"]] = array.reshape(output["shape"])
    assert at == len(body)
    return found


def post(server: Server, model: str, inputs: dict[str, Array], binary: bool) -> tuple[int, dict[str, str], bytes]:
    tensors, payload = [], b""
    for name, array in inputs.items():
        about: dict[str, Any] = {"name": name, "shape": array.shape, "datatype": _NAMES.get(array.dtype.name, "BYTES")}
        if binary:
            data = packed(array)
            payload += data
            about["parameters"] = {"binary_data_size": len(data)}
        else:
            about["data"] = array.ravel().tolist()
        tensors.append(about)
    head = json.dumps({"inputs": tensors, "parameters": {"binary_data_output": binary}}).encode()
    headers = {"Inference-Header-Content-Length": str(len(head))} if binary else {}
    return server.request("POST", f"/v2/models/{model}/infer", head + payload, headers)


def packed(array: Array) -> bytes:
    if array.dtype != object:
        return array.tobytes()
    texts = [text.encode() for text in array.ravel()]
    return b"".join(struct.pack("<I", len(text)) + text for text in texts)


def unpacked(datatype: str, data: bytes) -> Any:
    if datatype != "BYTES":
        return np.frombuffer(data, _TYPES[datatype])
    found, at = [], 0
    while at < len(data):
        (length,) = struct.unpack_from("<I", data, at)
        found.append(data[at + 4 : at + 4 + length])
        at += 4 + length
    return found


def refusal(client: Client, model: str, **inputs: Any) -> str:
    with pytest.raises(PenstockError) as raised:
        client.infer(model, inputs)
    assert raised.value.code == BAD_INPUT
    return raised.value.message


# --- strings, and what skl2onnx makes ---


def test_strings_pass_both_ways_whatever_is_in_them(ask: Ask) -> None:
    y = ask("strings", x=WORDS)["y"]
    assert y.tolist() == [[(2 * word).encode() for word in row] for row in WORDS.tolist()]


def test_no_strings_at_all(ask: Ask) -> None:
    assert ask("strings", x=np.empty((2, 0), object))["y"].shape == (2, 0)


@pytest.mark.parametrize("kind", ["U8", ">U8", "S8"])
def test_strings_of_a_width_of_numpy(client: Client, kind: str) -> None:
    words = np.array([["", "a", "word"]], kind)
    assert client.infer("strings", {"x": words})["y"].tolist() == [[b"", b"aa", b"wordword"]]
    assert client.infer("strings", {"x": words[:, ::-1]})["y"].tolist() == [[b"wordword", b"aa", b""]]


def test_a_classifier_answers_labels_and_probabilities(ask: Ask) -> None:
    x = 5 * np.random.default_rng(1).standard_normal((32, 4)).astype(np.float32)
    answer = ask("classifier", x=x)
    assert answer["probabilities"].shape == (32, 3)
    np.testing.assert_allclose(answer["probabilities"].sum(axis=1), 1, rtol=1e-5)
    likely = [LABELS[at].encode() for at in answer["probabilities"].argmax(axis=1)]
    assert answer["label"].tolist() == likely
    assert len(set(likely)) == 3


# --- shapes ---


def test_an_output_whose_shape_depends_on_the_data(ask: Ask) -> None:
    """Its first dimension has the name of the rows' and counts something else: requests run alone."""
    x = np.array([[0, 1, 0, 0], [2, 0, 0, 3]], np.float32)
    assert ask("where", x=x)["y"].tolist() == [[0, 1], [1, 0], [1, 3]]
    assert ask("where", x=x[:1])["y"].tolist() == [[0, 1]]
    assert ask("where", x=np.zeros((3, 4), np.float32))["y"].shape == (0, 2)


def test_requests_whose_outputs_differ_in_shape_do_not_meet(client: Client) -> None:
    rows = [np.eye(4, dtype=np.float32)[:count] for count in (1, 2, 4)] * 20
    answers = [client.submit("where", {"x": row}) for row in rows]
    for row, answer in zip(rows, answers, strict=True):
        assert answer.result(30)["y"].tolist() == [[at, at] for at in range(len(row))]


def test_a_shape_that_is_data(ask: Ask) -> None:
    x = np.arange(2000, dtype=np.float32)
    for shape in [2000], [2, 1000], [10, 10, 20], [1, 2000, 1]:
        np.testing.assert_array_equal(ask("reshape", x=x, to=np.array(shape))["y"], x.reshape(shape))


def test_scalars_in_and_out(ask: Ask) -> None:
    y = ask("scalar", x=np.array(1.5, np.float32))["y"]
    assert (y.shape, y.item()) == ((), 3.0)
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    assert ask("scale", x=x, factor=np.array(2, np.float32))["y"].tolist() == (2 * x).tolist()
    total = ask("sum", x=x)["y"]
    assert (total.shape, total.item()) == ((), 15.0)


def test_a_python_number_is_a_scalar(client: Client) -> None:
    assert client.infer("scalar", {"x": 1.5})["y"].item() == 3.0
    assert client.infer("scalar", {"x": np.float32(1.5)})["y"].item() == 3.0


def test_a_scalar_is_no_row_of_one(client: Client) -> None:
    said = refusal(client, "scalar", x=np.ones(1, np.float32))
    assert said == "unexpected shape for input 'x' for model 'scalar'. Expected [], got [1]"


@pytest.mark.parametrize(("model", "shape"), [("wide", (2, 0)), ("where", (0, 4)), ("sum", (3, 0)), ("fixed", (0, 3))])
def test_tensors_without_elements(ask: Ask, model: str, shape: tuple[int, ...]) -> None:
    y = ask(model, x=np.empty(shape, np.float32))["y"]
    assert y.shape == {"where": (0, 2), "sum": ()}.get(model, shape)
    assert y.sum() == 0


def test_a_batch_without_rows_is_refused(client: Client) -> None:
    said = refusal(client, "wide", x=np.empty((0, 3), np.float32))
    assert said == "a request for 'wide' needs at least one row, and has none"


def test_a_model_without_inputs(ask: Ask) -> None:
    assert ask("constant")["y"].tolist() == [1, 2]


# --- weights that are inputs ---


@pytest.mark.parametrize("model", ["old", "overridable"])
def test_an_input_with_a_value_need_not_and_cannot_be_given(ask: Ask, client: Client, model: str) -> None:
    x = np.array([[1, 1], [2, 3]], np.float32)
    assert ask(model, x=x)["y"].tolist() == [[2, 3], [4, 9]]
    said = refusal(client, model, x=x, w=np.ones(2, np.float32))
    assert said == f"unexpected inference input 'w' for model '{model}'; its inputs are ['x']"


def test_it_is_not_told_of_either(server: Server) -> None:
    for model in "old", "overridable":
        about = json.loads(server.request("GET", f"/v2/models/{model}")[2])
        assert about["inputs"] == [{"name": "x", "datatype": "FP32", "shape": [-1, 2]}]


def test_an_operator_without_its_optional_input(ask: Ask) -> None:
    assert ask("clip", x=np.array([[-5, 5]], np.float32))["y"].tolist() == [[-5, 1]]


# --- half precision ---


def test_half_precision_is_computed_with(server: Server, client: Client) -> None:
    x = np.array([[0.1, 1000.5], [-32752, 2**-24]], np.float16)
    for answer in over_http(server, "half", {"x": x}), client.infer("half", {"x": x}):
        np.testing.assert_array_equal(answer["y"], x + x)
        assert answer["y"].dtype == np.float16


def test_bfloat16_is_computed_with(server: Server, client: Client) -> None:
    x = np.array([[1.5, -3.0], [0.1, 1e18]], ml_dtypes.bfloat16)
    square = (x.astype(np.float32) ** 2).astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(over_http(server, "brain", {"x": x})["y"], square)
    for given in x, x.astype(np.float32), x.astype(">f4"), x.tolist():
        np.testing.assert_array_equal(client.infer("brain", {"x": given})["y"], square.astype(np.float32))


@pytest.mark.parametrize(("model", "kind"), [("half", "float16"), ("brain", "bfloat16")])
def test_json_cannot_carry_half_precision(server: Server, model: str, kind: str) -> None:
    x = np.ones((1, 1), kind)
    status, _, body = post(server, model, {"x": x}, binary=False)
    assert status == 400
    assert "which JSON cannot carry; " in json.loads(body)["error"]


# --- callers whose bytes are in the other order ---

ORDERS = [("wide", ">f4"), ("exact", ">f8"), ("half", ">f2"), ("whole", ">i8")]


@pytest.mark.parametrize("columns", [3, 5000], ids=["small", "large"])
@pytest.mark.parametrize(("model", "kind"), ORDERS)
def test_big_endian_arrays_are_not_misread(client: Client, model: str, kind: str, columns: int) -> None:
    """Also those that are parts of others, and more than once: the client remembers what a plain request looks like."""
    x = (np.arange(4 * columns) % 1000).reshape(2, -1).astype(kind)
    for given in x, x[:, ::2], x[::-1], np.asfortranarray(x), x:
        for answer in client.infer(model, {"x": given}), client.submit(model, {"x": given}).result(30):
            np.testing.assert_array_equal(answer["y"], 2 * given.astype(given.dtype.newbyteorder("<")))
            assert answer["y"].dtype.isnative
    native = x.astype(x.dtype.newbyteorder("<"))
    for given in native, x, native[:, ::2], native.T.copy().T:
        np.testing.assert_array_equal(client.infer(model, {"x": given})["y"], 2 * given.astype(native.dtype))


def test_big_endian_scalars_and_single_rows(client: Client) -> None:
    assert client.infer("scalar", {"x": np.array(1.5, ">f4")})["y"].item() == 3.0
    assert client.infer("scalar", {"x": np.dtype(">f4").type(1.5)})["y"].item() == 3.0
    assert client.infer("flat", {"x": np.arange(5, dtype=">f4")[1::2]})["y"].tolist() == [2, 6]


# --- what is refused ---


@pytest.mark.parametrize("model", kinds.refused())
def test_a_model_that_cannot_be_served_says_why(server: Server, client: Client, model: str) -> None:
    _, reason = kinds.refused()[model]
    [state] = [state for state in client.models() if state.name == model]
    assert (state.state, state.spec) == ("UNAVAILABLE", None)
    assert reason in state.reason
    with pytest.raises(PenstockError) as raised:
        client.infer(model, {"x": np.ones(1, np.float32)})
    assert raised.value.code == UNAVAILABLE
    assert reason in raised.value.message
    status, _, body = post(server, model, {"x": np.ones(1, np.float32)}, binary=True)
    assert status == 503
    assert reason in json.loads(body)["error"]
    assert server.request("GET", f"/v2/models/{model}/ready")[0] == 400
