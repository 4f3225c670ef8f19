"""What callers know of a model's configuration, as Triton tells it."""

from __future__ import annotations

import json

import pytest

from penstock.gateway.modelconfig import ModelConfig, model_config
from penstock.wire.datatypes import DATATYPES
from penstock.wire.models import LOADING, ModelSpec, ModelState, TensorSpec
from tests.gateway.serving import Loop
from tests.gateway.test_application import Desk, ready, spec


def test_a_model_whose_rows_run_together() -> None:
    inputs = TensorSpec("ids", "INT64", (-1, 8)), TensorSpec("text", "BYTES", (-1, -1))
    model = ModelSpec("m", "3", "onnxruntime_onnx", inputs, (TensorSpec("y", "FP32", (-1,)),), True, 64)
    assert json.loads(json.dumps(model_config(model))) == {
        "name": "m",
        "platform": "onnxruntime_onnx",
        "backend": "onnxruntime",
        "max_batch_size": 64,
        "input": [
            {"name": "ids", "data_type": "TYPE_INT64", "dims": [8]},
            {"name": "text", "data_type": "TYPE_STRING", "dims": [-1]},
        ],
        "output": [{"name": "y", "data_type": "TYPE_FP32", "dims": []}],
        "model_transaction_policy": {"decoupled": False},
        "dynamic_batching": {},
    }


def test_a_model_whose_requests_run_alone_has_all_its_dimensions_and_no_batching() -> None:
    config = model_config(spec()._replace(batchable=False))
    assert config["max_batch_size"] == 0
    assert config["input"] == [{"name": "x", "data_type": "TYPE_FP32", "dims": (-1, 2)}]
    assert "dynamic_batching" not in config


def test_every_type_is_one_that_triton_knows() -> None:
    inputs = tuple(TensorSpec(each, each, (1,)) for each in sorted(DATATYPES))
    told = {each["data_type"] for each in model_config(spec()._replace(inputs=inputs))["input"]}
    whole = {f"TYPE_{sign}INT{bits}" for sign in ("", "U") for bits in (8, 16, 32, 64)}
    assert told == whole | {f"TYPE_{each}" for each in ("BOOL", "FP16", "FP32", "FP64", "BF16", "STRING")}


@pytest.fixture
def desk(loop: Loop) -> Desk:
    desk = Desk(loop)
    desk.application.add(ModelConfig(desk.application).routes)
    wide = spec("double", "2")._replace(inputs=(TensorSpec("x", "FP32", (-1, 9)),))
    return desk.join(
        ready("double", "1"),
        ready("double", "2")._replace(spec=wide),
        ready("ö/x"),
        ModelState("new", "1", LOADING, "", None),
    )


@pytest.mark.parametrize(
    ("url", "name", "dims"),
    [
        ("/v2/models/double/config", "double", [9]),
        ("/v2/models/double/versions/1/config", "double", [2]),
        ("/v2/models/%C3%B6%2Fx/config", "ö/x", [2]),
    ],
)
def test_the_version_that_is_asked_for(desk: Desk, url: str, name: str, dims: list[int]) -> None:
    answer = desk.ask("GET", url)
    assert (answer.status, answer.headers["Content-Type"]) == (200, "application/json")
    config = json.loads(answer.body)
    assert (config["name"], config["input"][0]["dims"]) == (name, dims)


@pytest.mark.parametrize(
    ("url", "status", "sentence"),
    [
        ("/v2/models/nope/config", 404, "Request for unknown model: 'nope' is not found"),
        ("/v2/models/double/versions/9/config", 404, "Request for unknown model: 'double' version 9 is not found"),
        ("/v2/models/new/config", 503, "model 'new' is not ready (LOADING): "),
    ],
)
def test_what_is_not_there(desk: Desk, url: str, status: int, sentence: str) -> None:
    answer = desk.ask("GET", url)
    assert (answer.status, answer.error) == (status, sentence)
