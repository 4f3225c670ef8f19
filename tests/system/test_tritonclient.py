"""``tritonclient.http`` works unchanged, sync and aio."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import tritonclient.http as triton
import tritonclient.http.aio as triton_aio
from tritonclient.utils import InferenceServerException

from tests.system.models import dense, write
from tests.system.servers import Server, StartServer, wait_for

A = np.array([[1, 2], [3, 4]], np.int32)
B = np.array([[10, 20], [30, 40]], np.int32)


@pytest.fixture
def client(server: Server) -> Iterator[Any]:
    with triton.InferenceServerClient(f"{server.host}:{server.port}", concurrency=4) as client:
        yield client


def sums(binary: bool = True) -> list[Any]:
    inputs = [triton.InferInput("a", [2, 2], "INT32"), triton.InferInput("b", [2, 2], "INT32")]
    inputs[0].set_data_from_numpy(A, binary_data=binary)
    inputs[1].set_data_from_numpy(B, binary_data=binary)
    return inputs


def one(name: str, array: Any, datatype: str, binary: bool = True) -> list[Any]:
    given = triton.InferInput(name, list(array.shape), datatype)
    given.set_data_from_numpy(array, binary_data=binary)
    return [given]


def test_the_server_and_its_models_describe_themselves(client: Any) -> None:
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("sums")
    assert client.is_model_ready("sums", "1")
    assert not client.is_model_ready("sums", "9")
    assert not client.is_model_ready("nope")
    assert client.get_server_metadata()["name"] == "penstock"
    metadata = client.get_model_metadata("sums")
    assert metadata["name"] == "sums"
    assert metadata["versions"] == ["1"]
    assert metadata["inputs"] == [
        {"name": "a", "datatype": "INT32", "shape": [-1, 2]},
        {"name": "b", "datatype": "INT32", "shape": [-1, 2]},
    ]
    assert client.is_model_ready("names with spaces é")


@pytest.mark.parametrize("binary", [True, False])
@pytest.mark.parametrize("wanted", [None, True, False])
def test_infer_with_binary_and_json_tensors_both_ways(client: Any, binary: bool, wanted: bool | None) -> None:
    outputs = None
    if wanted is not None:
        outputs = [triton.InferRequestedOutput(name, binary_data=wanted) for name in ("difference", "sum")]
    result = client.infer("sums", sums(binary), outputs=outputs, request_id="a-1", timeout=5_000_000)
    np.testing.assert_array_equal(result.as_numpy("sum"), A + B)
    np.testing.assert_array_equal(result.as_numpy("difference"), A - B)
    assert result.get_response()["id"] == "a-1"
    if outputs is not None:
        assert [each["name"] for each in result.get_response()["outputs"]] == ["difference", "sum"]


def test_only_the_outputs_that_are_asked_for_come(client: Any) -> None:
    result = client.infer("sums", sums(), outputs=[triton.InferRequestedOutput("difference")])
    assert result.as_numpy("sum") is None
    np.testing.assert_array_equal(result.as_numpy("difference"), A - B)


@pytest.mark.parametrize("binary", [True, False])
def test_who_asks_is_told_where_the_time_went(client: Any, binary: bool) -> None:
    outputs = [triton.InferRequestedOutput("sum", binary_data=binary)]
    headers = {"Penstock-Tenant": "blue", "Penstock-Timeout": "5"}
    asked = {"priority": 2, "timeout": 4_000_000, "parameters": {"explain": True}, "headers": headers}
    result = client.infer("sums", sums(binary), outputs=outputs, **asked)
    np.testing.assert_array_equal(result.as_numpy("sum"), A + B)
    told = result.get_response()["parameters"]
    assert (told["worker"], told["batch_rows"]) == ("cpu-0", 2)
    assert told["why"]


@pytest.mark.parametrize("request_encoding", [None, "gzip", "deflate"])
@pytest.mark.parametrize("response_encoding", [None, "gzip", "deflate"])
def test_compression_both_ways(client: Any, request_encoding: str | None, response_encoding: str | None) -> None:
    wide = np.arange(50_000, dtype=np.float32).reshape(1, -1)
    result = client.infer(
        "wide",
        one("x", wide, "FP32"),
        request_compression_algorithm=request_encoding,
        response_compression_algorithm=response_encoding,
    )
    np.testing.assert_array_equal(result.as_numpy("y"), wide)


def test_strings_half_and_bfloat16(client: Any) -> None:
    texts = np.array([["Grüße", "b"]], dtype=object)
    for binary in (True, False):
        result = client.infer("strings", one("x", texts, "BYTES", binary))
        assert [element.decode() for element in result.as_numpy("y").ravel()] == ["Grüße", "b"]
    half = np.array([[1.5, -2.0]], np.float16)
    np.testing.assert_array_equal(client.infer("half", one("x", half, "FP16")).as_numpy("y"), half)
    brain = np.array([[1.5, -2.0]], ml_dtypes.bfloat16)
    np.testing.assert_array_equal(client.infer("brain", one("x", brain, "BF16")).as_numpy("y"), brain)


def test_async_infer(client: Any) -> None:
    calls = [client.async_infer("sums", sums()) for _ in range(8)]
    for call in calls:
        np.testing.assert_array_equal(call.get_result().as_numpy("sum"), A + B)


def test_errors_arrive_as_exceptions_with_their_sentence(client: Any) -> None:
    with pytest.raises(InferenceServerException, match="Request for unknown model: 'nope' is not found"):
        client.infer("nope", sums())
    with pytest.raises(InferenceServerException, match="data-type is 'FP32', but model 'lookup' expects 'INT64'"):
        client.infer("lookup", one("i", np.zeros(1, np.float32), "FP32"))
    with pytest.raises(InferenceServerException, match="unexpected inference output 'NOPE' for model 'sums'"):
        client.infer("sums", sums(), outputs=[triton.InferRequestedOutput("NOPE")])


def test_statistics_are_those_of_the_whole_server(client: Any) -> None:
    model = "names with spaces é"  # which no other test here asks

    def told(version: str = "") -> dict[str, Any]:
        [stats] = client.get_inference_statistics(model, version)["model_stats"]
        assert (stats["name"], stats["version"]) == (model, "1")
        return dict(stats)

    assert told()["inference_stats"]["success"] == {"count": 0, "ns": 0}
    rows = np.ones((2, 4), np.float32)
    for _ in range(3):
        client.infer(model, one("x", rows, "FP32"))
    wait_for(lambda: told()["inference_count"] == 6, "the worker to tell")
    stats = told("1")
    assert stats["execution_count"] == 3
    times = stats["inference_stats"]
    for part in ("success", "queue", "compute_input", "compute_infer", "compute_output"):
        assert times[part]["count"] == 3
        assert times[part]["ns"] > 0
    parts = sum(times[part]["ns"] for part in ("queue", "compute_input", "compute_infer", "compute_output"))
    assert times["success"]["ns"] == pytest.approx(parts, abs=10)
    assert times["fail"] == {"count": 0, "ns": 0}
    assert abs(stats["last_inference"] / 1000 - time.time()) < 60
    [size] = stats["batch_stats"]
    assert (size["batch_size"], size["compute_infer"]["count"]) == (2, 3)
    assert size["compute_infer"]["ns"] <= times["compute_infer"]["ns"]
    [memory] = stats["memory_usage"]
    assert (memory["type"], memory["id"]) == ("CPU", 0)

    def failed() -> dict[str, Any]:
        return dict(client.get_inference_statistics("lookup")["model_stats"][0])

    with pytest.raises(InferenceServerException):
        client.infer("lookup", one("i", np.array([99]), "INT64"))
    wait_for(lambda: failed()["inference_stats"]["fail"]["ns"] > 0, "the worker to tell")
    assert failed()["inference_stats"]["fail"]["count"] >= 1
    assert failed()["inference_stats"]["success"] == {"count": 0, "ns": 0}
    assert (failed()["inference_count"], failed()["execution_count"]) == (0, 0)
    names = {each["name"] for each in client.get_inference_statistics()["model_stats"]}
    assert {"dense", "sums", model} <= names
    with pytest.raises(InferenceServerException, match="Request for unknown model: 'nope' is not found"):
        client.get_inference_statistics("nope")


def test_the_configuration_of_models(client: Any) -> None:
    config = client.get_model_config("sums")
    assert (config["name"], config["backend"], config["dynamic_batching"]) == ("sums", "onnxruntime", {})
    assert config["max_batch_size"] >= 1
    assert config["input"] == [{"name": name, "data_type": "TYPE_INT32", "dims": [2]} for name in ("a", "b")]
    assert client.get_model_config("strings", "1")["output"] == [{"name": "y", "data_type": "TYPE_STRING", "dims": [2]}]
    with pytest.raises(InferenceServerException, match="Request for unknown model: 'nope' is not found"):
        client.get_model_config("nope")


def test_the_extensions_are_those_that_work(client: Any) -> None:
    assert client.get_server_metadata()["extensions"] == [
        "classification",
        "sequence",
        "binary_tensor_data",
        "parameters",
        "schedule_policy",
        "model_repository",
        "model_repository(unload_dependents)",
        "statistics",
        "model_configuration",
        "trace",
        "logging",
    ]


def test_models_are_listed_loaded_and_unloaded(start_server: StartServer, tmp_path: Path) -> None:
    write(tmp_path / "models", "dense", dense())
    config = tmp_path / "penstock.toml"
    config.write_text('[worker]\nmodel_control = "explicit"\n')
    server = start_server(str(tmp_path / "models"), f"--config={config}")
    rows = np.ones((1, 4), np.float32)
    with triton.InferenceServerClient(f"{server.host}:{server.port}") as client:
        client.load_model("dense")
        assert client.get_model_repository_index() == [{"name": "dense", "version": "1", "state": "READY"}]
        assert client.infer("dense", one("x", rows, "FP32")).as_numpy("y").shape == (1, 3)
        client.load_model("dense", config='{"max_batch_size": 8}')
        assert client.get_model_config("dense")["max_batch_size"] == 8
        client.unload_model("dense")
        assert not client.is_model_ready("dense")
        with pytest.raises(InferenceServerException):
            client.load_model("nope")


def test_the_aio_client(server: Server) -> None:
    async def use() -> None:
        async with triton_aio.InferenceServerClient(f"{server.host}:{server.port}") as client:
            assert await client.is_server_live()
            assert await client.is_server_ready()
            assert await client.is_model_ready("sums")
            assert (await client.get_server_metadata())["name"] == "penstock"
            assert (await client.get_model_metadata("sums"))["name"] == "sums"
            results = await asyncio.gather(*(client.infer("sums", sums(binary)) for binary in (True, False) * 8))
            for result in results:
                np.testing.assert_array_equal(result.as_numpy("sum"), A + B)
            for encoding in ("gzip", "deflate"):
                result = await client.infer(
                    "sums", sums(), request_compression_algorithm=encoding, response_compression_algorithm=encoding
                )
                np.testing.assert_array_equal(result.as_numpy("sum"), A + B)

    asyncio.run(use())
