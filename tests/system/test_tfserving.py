"""TensorFlow Serving's REST API of a real server, asked as its clients do: plain HTTP and JSON."""

from __future__ import annotations

import base64
import gzip
import json
import re
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import numpy_helper

from tests.system.models import dense, two_inputs, write
from tests.system.servers import Server, StartServer, wait_for

DOCS = Path(__file__).parents[2] / "docs" / "tfserving.md"
WEIGHTS = numpy_helper.to_array(dense().graph.initializer[0])


def post(server: Server, path: str, request: Any, headers: dict[str, str] | None = None) -> tuple[int, Any]:
    body = request if isinstance(request, bytes) else json.dumps(request).encode()
    status, got, answer = server.request("POST", f"/v1/models/{path}", body, headers)
    assert got["content-type"] == "application/json"
    return status, json.loads(answer)


def get(server: Server, path: str) -> tuple[int, Any]:
    status, _, answer = server.request("GET", f"/v1/models/{path}")
    return status, json.loads(answer)


def test_status_and_metadata(server: Server) -> None:
    available = {"version": "1", "state": "AVAILABLE", "status": {"error_code": "OK", "error_message": ""}}
    assert get(server, "dense") == (200, {"model_version_status": [available]})
    assert get(server, "dense/versions/1") == (200, {"model_version_status": [available]})
    status, content = get(server, "sums/metadata")
    signature = content["metadata"]["signature_def"]["signature_def"]["serving_default"]
    assert status == 200
    assert {name: each["dtype"] for name, each in signature["inputs"].items()} == {"a": "DT_INT32", "b": "DT_INT32"}
    assert signature["outputs"].keys() == {"sum", "difference"}


def test_rows_and_columns_have_the_same_answer(server: Server) -> None:
    rows = np.random.default_rng(1).standard_normal((5, 4)).astype(np.float32)
    for path in ("dense:predict", "dense/versions/1:predict"):
        for request, key in (
            ({"instances": rows.tolist()}, "predictions"),
            ({"instances": [{"x": row} for row in rows.tolist()]}, "predictions"),
            ({"inputs": rows.tolist()}, "outputs"),
            ({"inputs": {"x": rows.tolist()}, "signature_name": "serving_default"}, "outputs"),
        ):
            status, content = post(server, path, request)
            assert status == 200, content
            np.testing.assert_allclose(content[key], rows @ WEIGHTS, rtol=1e-4, atol=1e-5)


def test_several_inputs_and_outputs(server: Server) -> None:
    assert post(server, "sums:predict", {"instances": [{"a": [1, 2], "b": [3, 5]}] * 2}) == (
        200,
        {"predictions": [{"sum": [4, 7], "difference": [-2, -3]}] * 2},
    )
    assert post(server, "sums:predict", {"inputs": {"a": [[1, 2]], "b": [[3, 5]]}}) == (
        200,
        {"outputs": {"sum": [[4, 7]], "difference": [[-2, -3]]}},
    )


def test_texts_and_floats_of_16_bits(server: Server) -> None:
    text = {"b64": base64.b64encode("grün".encode()).decode()}
    assert post(server, "strings:predict", {"instances": [[text, "b"]]}) == (200, {"predictions": [["grün", "b"]]})
    for model in ("half", "brain"):
        assert post(server, f"{model}:predict", {"instances": [[0.5, 3]]}) == (200, {"predictions": [[0.5, 3.0]]})


def test_nan_goes_through(server: Server) -> None:
    status, _, body = server.request("POST", "/v1/models/half:predict", b'{"instances": [[NaN, -Infinity]]}')
    assert (status, body) == (200, b'{"predictions":[[NaN,-Infinity]]}')


def test_large_rows_compressed(server: Server) -> None:
    rows = np.random.default_rng(2).standard_normal((4, 50_000)).astype(np.float32)
    body = gzip.compress(json.dumps({"instances": rows.tolist()}).encode(), 1)
    status, content = post(server, "wide:predict", body, {"Content-Encoding": "gzip"})
    assert status == 200, content
    assert (np.array(content["predictions"], np.float32) == rows).all()


def test_classify_and_regress(server: Server) -> None:
    status, content = post(server, "dense:classify", {"context": {"x": [1, 0, 0, 0]}, "examples": [{}, {"x": [0] * 4}]})
    assert status == 200, content
    first, second = content["results"]
    assert [label for label, _ in first] == ["0", "1", "2"]
    np.testing.assert_allclose([score for _, score in first], WEIGHTS[0], rtol=1e-4)
    assert second == [["0", 0.0], ["1", 0.0], ["2", 0.0]]
    status, content = post(server, "dense:regress", {"examples": [{"x": [1, 2, 3, 4]}]})
    assert status == 400
    assert "cannot be asked to regress" in content["error"]


@pytest.mark.parametrize(
    ("path", "body", "status", "words"),
    [
        ("nope:predict", {"instances": [1]}, 404, "Servable not found for request: Latest(nope)"),
        ("dense/versions/9:predict", {"instances": [1]}, 404, "Servable not found for request: Specific(dense, 9)"),
        ("dense/labels/a:predict", {"instances": [1]}, 400, "Unrecognized servable version label: a"),
        ("dense:guess", {}, 400, "Malformed request: POST /v1/models/dense:guess"),
        ("dense:predict", b"{", 400, "not JSON"),
        ("dense:predict", {"instances": [[1, 2]]}, 400, "shape for input 'x'"),
        ("dense:predict", {"instances": [[1, 2, 3, "4"]]}, 400, "input 'x' holds strings"),
        ("dense:predict", {"instances": [[0] * 4] * 33}, 400, "batch-size must be <= 32"),
        ("lookup:predict", {"instances": [9]}, 500, "model 'lookup' failed on this input"),
    ],
)
def test_errors(server: Server, path: str, body: Any, status: int, words: str) -> None:
    got, content = post(server, path, body)
    assert got == status
    assert list(content) == ["error"]
    assert words in content["error"]


def test_labels(start_server: StartServer, tmp_path: Path) -> None:
    models = tmp_path / "models"
    for number in (1, 2):
        write(models, "net", dense(number), str(number))
    (models / "net" / "model.toml").write_text('version_policy = "all"\nlabels = { stable = 1, canary = 2 }\n')
    server = start_server(str(models))
    for label, version in (("stable", "1"), ("canary", "2")):
        status, content = get(server, f"net/labels/{label}")
        assert [each["version"] for each in content["model_version_status"]] == [version], content
        status, content = post(server, f"net/labels/{label}:predict", {"instances": [[1, 0, 0, 0]]})
        assert status == 200, content
        weights = numpy_helper.to_array(dense(int(version)).graph.initializer[0])
        np.testing.assert_allclose(content["predictions"], weights[:1], rtol=1e-4)
    assert [each["version"] for each in get(server, "net")[1]["model_version_status"]] == ["2", "1"]


def test_the_examples_in_the_docs(start_server: StartServer, tmp_path: Path) -> None:
    """Each command has the answer below it."""
    write(tmp_path / "models", "sums", two_inputs(), "1")
    server = start_server(str(tmp_path / "models"))
    wait_for(lambda: get(server, "sums")[0] == 200, "the model")
    examples = re.findall(r"```sh\n(curl.*?)```\n\n```json\n(.*?)```", DOCS.read_text(), re.DOTALL)
    assert examples
    for command, answer in examples:
        here = command.replace("localhost:8000", f"{server.host}:{server.port}")
        done = subprocess.run(["bash", "-c", here], capture_output=True, text=True, timeout=30, check=True)
        assert json.loads(done.stdout) == json.loads(answer), command
