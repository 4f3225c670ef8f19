"""Every route with what schemathesis makes up, right and wrong: no answer is a 5xx, and all are as the document says.

One process asks for everything, so that it takes half a minute. What is left out is named here, with the reason.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote

import pytest
from onnx import TensorProto
from openapi_spec_validator import validate

from tests.system.models import dense, identity, two_inputs, write
from tests.system.servers import Server

EXAMPLES_MAX: Final = 2  # of each operation
NAMES: Final = ("dense", "a b", "größe", "50%25", "one:two")
ROUTES_LEFT_OUT: Final = {
    "/events": "its answer never ends",
    "/v2/repository/models/{model}/load": "it changes what the others ask; tests/system/test_repository_api.py asks it",
    "/v2/repository/models/{model}/unload": "likewise",
}
VERSIONED: Final = r"\{version\}(/infer|/predict|:\w+)$"  # the same handlers as without a version
CHECKS_LEFT_OUT: Final = {
    "positive_data_acceptance": "a schema cannot say that there are as many elements as a shape says",
    "negative_data_rejection": "what means nothing here is allowed, as Triton and TensorFlow Serving allow it",
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    models = tmp_path_factory.mktemp("models")
    for name in NAMES:
        write(models, name, dense())
    write(models, "sums", two_inputs())
    write(models, "strings", identity(TensorProto.STRING))
    write(models, "half", identity(TensorProto.FLOAT16))
    write(models, "flags", identity(TensorProto.BOOL))
    write(models, "versions", dense(1), "1")
    write(models, "versions", dense(2), "2")
    (models / "versions" / "model.toml").write_text('version_policy = "all"\n')
    server = Server(tmp_path_factory.mktemp("server") / "run", str(models))
    yield server
    server.check_clean_end()


def asked(server: Server) -> dict[str, Any]:
    status, headers, body = server.request("GET", "/openapi.json")
    assert (status, headers["content-type"]) == (200, "application/json")
    found: dict[str, Any] = json.loads(body)
    return found


def test_the_document_of_a_real_server_is_valid_and_knows_its_models(server: Server) -> None:
    found = asked(server)
    validate(found)
    for name in (*NAMES, "sums", "strings", "half", "flags", "versions"):
        escaped = quote(name, safe="")
        for path in (f"/v2/models/{escaped}/infer", f"/v2/models/{escaped}/predict", f"/v1/models/{escaped}:predict"):
            assert path in found["paths"]
    assert "/v2/models/versions/versions/1/infer" in found["paths"]


@pytest.mark.parametrize("name", NAMES)
def test_names_that_need_escapes_are_names_on_every_route(server: Server, name: str) -> None:
    escaped = quote(name, safe="")
    asked_for = {"inputs": [{"name": "x", "shape": [1, 4], "datatype": "FP32", "data": [1, 2, 3, 4]}]}
    plain = {"x": [[1, 2, 3, 4]]}
    for method, path, body in (
        ("GET", f"/v2/models/{escaped}", None),
        ("GET", f"/v2/models/{escaped}/versions/1", None),
        ("GET", f"/v2/models/{escaped}/ready", None),
        ("GET", f"/v2/models/{escaped}/config", None),
        ("GET", f"/v2/models/{escaped}/stats", None),
        ("GET", f"/v1/models/{escaped}", None),
        ("GET", f"/v1/models/{escaped}/versions/1/metadata", None),
        ("POST", f"/v2/models/{escaped}/infer", asked_for),
        ("POST", f"/v2/models/{escaped}/versions/1/infer", asked_for),
        ("POST", f"/v2/models/{escaped}/predict", plain),
        ("POST", f"/v1/models/{escaped}:predict", {"instances": plain["x"]}),
        ("POST", f"/v1/models/{escaped}/versions/1:predict", {"instances": plain["x"]}),
    ):
        status, _, answer = server.request(method, path, json.dumps(body).encode() if body else None)
        assert status == 200, (method, path, answer)
    _, _, answer = server.request("GET", f"/v2/models/{escaped}")
    assert json.loads(answer)["name"] == name
    status, _, answer = server.request("GET", f"/v2/models/{escaped}%2F")
    assert (status, json.loads(answer)["error"]) == (404, f"Request for unknown model: '{name}/' is not found")


@pytest.mark.timeout(240)  # half a minute where nobody else works
def test_whatever_is_asked_is_answered_as_the_document_says(server: Server, tmp_path: Path) -> None:
    paths = asked(server)["paths"]
    assert ROUTES_LEFT_OUT.keys() <= paths.keys(), "they are no more"
    # Of models that are alike one is asked.
    alike = [f"/{quote(name, safe='')}{end}" for name in (*NAMES[1:], "flags", "versions") for end in ("/", ":")]
    left_out = [
        path
        for path in paths
        if path in ROUTES_LEFT_OUT or any(each in path for each in alike) or re.search(VERSIONED, path)
    ]
    asked_for = subprocess.run(
        [
            *(sys.executable, "-m", "schemathesis.cli", "run", f"{server.url}/openapi.json", "--no-color"),
            *("--checks=all", f"--exclude-checks={','.join(CHECKS_LEFT_OUT)}", "--mode=all"),
            *("--phases=examples,coverage,fuzzing", f"--max-examples={EXAMPLES_MAX}"),
            *("--generation-deterministic", "--request-timeout=20", "--suppress-health-check=all"),
            *[word for path in left_out for word in ("--exclude-path", path)],
        ],
        capture_output=True,
        text=True,
        timeout=200,
        cwd=tmp_path,  # it leaves a folder behind
    )
    assert asked_for.returncode == 0, asked_for.stdout
    assert re.search(r"No issues found|passed", asked_for.stdout), asked_for.stdout
    assert server.request("GET", "/v2/health/ready")[0] == 200
