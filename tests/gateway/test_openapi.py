"""The document says what the routes do, and what the models take."""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from openapi_spec_validator import validate

from penstock.gateway import openapi
from penstock.gateway.about import TAGS
from penstock.gateway.modelconfig import ModelConfig
from penstock.gateway.openapi import VERSIONS_MAX, OpenApi, document
from penstock.gateway.plain import Plain
from penstock.gateway.schemas import element, nested, plain, tensorflow, v2
from penstock.gateway.statistics import Statistics
from penstock.gateway.tfserving import TensorFlowServing
from penstock.wire.models import LOADING, ModelSpec, ModelState, TensorSpec
from tests.gateway.serving import Loop
from tests.gateway.test_application import Desk, ready, said


@pytest.fixture
def desk(loop: Loop) -> Iterator[Desk]:
    desk = Desk(loop)
    application = desk.application
    for part in (Plain(application), ModelConfig(application), TensorFlowServing(application)):
        application.add(part.routes)
    application.add(Statistics(application, desk.reports).routes)
    application.add(OpenApi(loop.loop, application).routes)
    yield desk
    application.clerks.close()


def asked(desk: Desk) -> dict[str, Any]:
    exchange = desk.begin("GET", "/openapi.json")
    desk.loop.until(lambda: exchange._response)
    answer = said(exchange)
    assert (answer.status, answer.headers["Content-Type"]) == (200, "application/json")
    found: dict[str, Any] = json.loads(answer.body)
    return found


def test_every_route_says_what_it_is(desk: Desk) -> None:
    assert [route.pattern for route in desk.application.table if route.about is None] == []
    for route in desk.application.table:
        assert route.about is not None
        assert route.about.tag in TAGS
        assert route.about.summary[:1].isupper()
        assert not route.about.summary.endswith(".")
    paths = asked(desk)["paths"]
    assert {route.pattern for route in desk.application.table} == set(paths)


def test_every_route_of_every_file_says_what_it_is() -> None:
    """Also those that are not in the table here."""
    silent = [
        f"{path.name}:{node.lineno}"
        for path in sorted(Path(openapi.__file__).parent.glob("*.py"))
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "Route"
        if len(node.args) < 5 and "about" not in [each.arg for each in node.keywords]
    ]
    assert silent == []


def test_the_document_is_valid(desk: Desk) -> None:
    validate(asked(desk))
    strange = ModelSpec(
        'a "b"/é {x}', "1:2", "", (TensorSpec("i", "FP16", ()),), (TensorSpec("o", "BYTES", ()),), False, 1
    )
    desk.join(ready(), ready("other", "1"), ready("other", "2"), ModelState(strange.name, "1:2", "READY", "", strange))
    found = asked(desk)
    validate(found)
    identifiers = [each["operationId"] for methods in found["paths"].values() for each in methods.values()]
    assert len(identifiers) == len(set(identifiers))


def test_models_have_paths_of_their_own_as_long_as_they_are_served(desk: Desk) -> None:
    def own() -> set[str]:
        paths = asked(desk)["paths"]
        return {path for path, methods in paths.items() if any("x-model" in each for each in methods.values())}

    assert own() == set()
    desk.join(ready("a b"), ready("c", "1"), ready("c", "2"), ModelState("d", "1", LOADING, "", None))
    versionless = {"/v2/models/{}/infer", "/v2/models/{}/predict", "/v1/models/{}:predict"}
    versioned = {each.replace("{}", "{}/versions/1") for each in versionless}
    assert own() == {each.format("a%20b") for each in versionless} | {
        each.format("c") for each in versionless | versioned
    }
    desk.join(ready("c", "1"))
    assert own() == {each.format("c") for each in versionless}


def test_the_same_document_is_made_once(desk: Desk) -> None:
    desk.join(ready())
    asked(desk)
    assert desk.ask("GET", "/openapi.json").status == 200, "at once the second time"


def test_thousands_of_models_are_no_document_without_end(desk: Desk) -> None:
    states = [ready(f"m{number:04}") for number in range(3000)]
    found = document(desk.application.table, states, "1", {each.name: "1" for each in states})
    own = {each["x-model"] for methods in found["paths"].values() for each in methods.values() if "x-model" in each}
    assert own == {f"m{number:04}" for number in range(VERSIONS_MAX)}
    assert f"Of 3000 versions of models the first {VERSIONS_MAX}" in found["info"]["description"]


def test_the_page_is_there_and_may_run_nothing_else(desk: Desk) -> None:
    answer = desk.ask("GET", "/docs")
    assert (answer.status, answer.headers["Content-Type"]) == (200, "text/html; charset=utf-8")
    assert answer.headers["Content-Security-Policy"].startswith("default-src 'none'; script-src 'sha256-")
    assert answer.body.startswith(b"<!doctype html>")
    assert b"http://" not in answer.body
    assert b"innerHTML" not in answer.body


# --- what the schemas of a model allow ---


PAIR = ModelSpec(
    "pair",
    "1",
    "",
    (TensorSpec("a", "INT8", (-1, 2)), TensorSpec("b", "BYTES", (-1,))),
    (TensorSpec("c", "FP32", (-1, 2)),),
    True,
    4,
)
A = {"name": "a", "datatype": "INT8", "shape": [2, 2], "data": [1, 2, 3, 4]}
B = {"name": "b", "datatype": "BYTES", "shape": [2], "data": ["x", "y"]}


def fits(schema: Any, value: Any) -> bool:
    return bool(jsonschema.Draft202012Validator(schema).is_valid(value))


@pytest.mark.parametrize(
    ("inputs", "good"),
    [
        ([A, B], True),
        ([B, A], True),
        ([A | {"data": [[1, 2], [3, 4]]}, B], True),
        ([A], False),
        ([A, B | {"name": "z"}], False),
        ([A | {"datatype": "INT16"}, B], False),
        ([A | {"shape": [2, 3]}, B], False),
        ([A | {"shape": [5, 2]}, B], False),
        ([A | {"data": [128]}, B], False),
        ([A | {"data": ["x"]}, B], False),
    ],
)
def test_requests_of_v2(inputs: list[Any], good: bool) -> None:
    body, _ = v2(PAIR)
    assert fits(body["application/json"], {"inputs": inputs}) == good


@pytest.mark.parametrize(
    ("value", "good"),
    [
        ({"a": [[1, 2]], "b": ["x"]}, True),
        ({"a": [[1, 2]]}, False),
        ({"a": [[1, 2, 3]], "b": ["x"]}, False),
        ({"a": [[1, 2]], "b": ["x"], "z": 1}, False),
        ({"a": [[1, 2]] * 5, "b": ["x"] * 5}, False),
    ],
)
def test_requests_in_plain_json(value: Any, good: bool) -> None:
    body, _ = plain(PAIR)
    assert fits(body["application/json"], value) == good


@pytest.mark.parametrize(
    ("value", "good"),
    [
        ({"instances": [{"a": [1, 2], "b": "x"}]}, True),
        ({"inputs": {"a": [[1, 2]], "b": ["x"]}}, True),
        ({"instances": [], "inputs": {}}, False),
        ({"instances": [{"a": [1, 2]}]}, False),
        ({}, False),
    ],
)
def test_requests_of_tensorflow_serving(value: Any, good: bool) -> None:
    body, _ = tensorflow(PAIR)
    assert fits(body["application/json"], value) == good


def test_a_model_that_json_cannot_carry_takes_binary_tensors_alone() -> None:
    half = ModelSpec("half", "1", "", (TensorSpec("x", "FP16", (1,)),), (TensorSpec("y", "FP16", (1,)),), False, 1)
    body, _ = v2(half)
    assert list(body) == ["application/octet-stream"]
    assert fits(plain(half)[0]["application/json"], {"x": [1.5]})


@pytest.mark.parametrize(
    ("datatype", "good", "bad"),
    [("BOOL", True, 2), ("UINT8", 255, 256), ("INT64", -(2**63), 2**63), ("FP32", 1.5, 1e39), ("BYTES", "x", 1)],
)
def test_elements(datatype: str, good: Any, bad: Any) -> None:
    assert fits(element(datatype), good)
    assert not fits(element(datatype), bad)
    assert fits(nested((-1, 2), element(datatype)), [[good, good], [good, good]])
    assert not fits(nested((-1, 2), element(datatype)), [[good]])
