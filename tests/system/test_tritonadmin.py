"""Triton's extensions that change the server, over all of ``tritonclient.http``: shared memory, logging, tracing; and
that each of its methods works, or is refused with a sentence."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.http as triton
import tritonclient.http.aio as triton_aio
from onnx import TensorProto
from tritonclient.utils import InferenceServerException
from tritonclient.utils import shared_memory as shm

from tests.system.models import dense, identity, two_inputs, write
from tests.system.servers import Server, StartServer, wait_for

A = np.array([[1, 2], [3, 4]], np.int32)
B = np.array([[10, 20], [30, 40]], np.int32)
KEY = f"/tests-{os.getpid()}"


@pytest.fixture
def server(start_server: StartServer, tmp_path: Path) -> Server:
    write(tmp_path / "models", "sums", two_inputs())
    write(tmp_path / "models", "dense", dense())
    write(tmp_path / "models", "wide", identity(TensorProto.FLOAT, ("N", "M")))
    write(tmp_path / "models", "kept", identity(TensorProto.FLOAT, ("N", "M")), config="response_cache = true\n")
    return start_server(str(tmp_path / "models"), "--gateways=2", "--allow-client-shm")


@pytest.fixture(scope="module", autouse=True)
def no_tracker() -> Iterator[None]:
    """Python has a process beside it that looks after shared memory."""
    yield
    resource_tracker._resource_tracker._stop()  # type: ignore[attr-defined]


@pytest.fixture
def client(server: Server) -> Iterator[Any]:
    with triton.InferenceServerClient(f"{server.host}:{server.port}", concurrency=8) as client:
        yield client


@contextlib.contextmanager
def region(nbytes: int, key: str = KEY) -> Iterator[Any]:
    handle = shm.create_shared_memory_region("mine", key, nbytes)
    try:
        yield handle
    finally:
        with contextlib.suppress(shm.SharedMemoryException, FileNotFoundError):
            shm.destroy_shared_memory_region(handle)


def infer_shared(client: Any, size: int = 16, out: str = "mine", offset: int = 32) -> Any:
    """Sums of what lies in the region, into it."""
    inputs = [triton.InferInput(name, [2, 2], "INT32") for name in "ab"]
    for at, each in enumerate(inputs):
        each.set_shared_memory("mine", 16, offset=16 * at)
    outputs = [triton.InferRequestedOutput("sum"), triton.InferRequestedOutput("difference")]
    outputs[0].set_shared_memory(out, size, offset=offset)
    return client.infer("sums", inputs, outputs=outputs)


def test_large_tensors_in_shared_memory(client: Any) -> None:
    array = np.arange(4_000_000, dtype=np.float32).reshape(2, -1)
    with region(2 * array.nbytes) as handle:
        shm.set_shared_memory_region(handle, [array])
        client.register_system_shared_memory("mine", KEY, 2 * array.nbytes)
        given, output = triton.InferInput("x", list(array.shape), "FP32"), triton.InferRequestedOutput("y")
        given.set_shared_memory("mine", array.nbytes)
        output.set_shared_memory("mine", array.nbytes, offset=array.nbytes)
        client.infer("wide", [given], outputs=[output])
        found = shm.get_contents_as_numpy(handle, np.float32, list(array.shape), offset=array.nbytes)
        np.testing.assert_array_equal(found, array)
        os.truncate(f"/dev/shm{KEY}", 1 << 40)  # which takes no memory
        client.register_system_shared_memory("all", KEY, 1 << 40)
        given.set_shared_memory("all", 1 << 40)
        with pytest.raises(InferenceServerException, match="body_bytes_max"):
            client.infer("wide", [given])


def test_large_tensors_in_shared_memory_go_past_the_response_cache(client: Any) -> None:
    array = np.zeros((1, 50_000), np.float32)
    with region(array.nbytes) as handle:
        client.register_system_shared_memory("mine", KEY, array.nbytes)
        given = triton.InferInput("x", list(array.shape), "FP32")
        given.set_shared_memory("mine", array.nbytes)
        for turn in range(20):  # of which each gateway's first ones find its cache closed
            shm.set_shared_memory_region(handle, [array + turn])
            np.testing.assert_array_equal(client.infer("kept", [given]).as_numpy("y"), array + turn)


def test_tensors_in_shared_memory(client: Any) -> None:
    with region(64) as handle:
        shm.set_shared_memory_region(handle, [A, B])
        client.register_system_shared_memory("mine", KEY, 64)
        assert "system_shared_memory" in client.get_server_metadata()["extensions"]
        # Whichever gateway is asked.
        for _ in range(8):
            result = infer_shared(client)
            np.testing.assert_array_equal(shm.get_contents_as_numpy(handle, np.int32, [2, 2], offset=32), A + B)
            np.testing.assert_array_equal(result.as_numpy("difference"), A - B)
            assert result.get_output("sum")["parameters"] == {
                "shared_memory_region": "mine",
                "shared_memory_offset": 32,
                "shared_memory_byte_size": 16,
            }
        assert client.get_system_shared_memory_status() == [{"name": "mine", "key": KEY, "offset": 0, "byte_size": 64}]
        assert client.get_system_shared_memory_status("mine") == client.get_system_shared_memory_status()
        for change, sentence in (
            (lambda: infer_shared(client, size=15), r"output 'sum' \(15 bytes\) should be at least 16 bytes"),
            (lambda: infer_shared(client, offset=60), "Invalid offset . byte size for shared memory region: 'mine'"),
            (lambda: infer_shared(client, offset=65), "Invalid offset for shared memory region: 'mine'"),
            (lambda: infer_shared(client, out="nope"), "Unable to find shared memory region: 'nope'"),
            (lambda: client.get_system_shared_memory_status("x"), "Unable to find system shared memory region: 'x'"),
            (lambda: client.register_system_shared_memory("mine", KEY, 64), "'mine' already in manager"),
            (lambda: client.register_system_shared_memory("x", "/nope", 64), "Unable to open shared memory region"),
            (lambda: client.register_system_shared_memory("x", KEY, 65), "Invalid offset . byte size"),
            (lambda: client.register_system_shared_memory("x", "/../etc/passwd", 4), "is a name of shared memory"),
            (lambda: client.register_system_shared_memory("x", "/penstock-x", 4), "its name is reserved"),
        ):
            with pytest.raises(InferenceServerException, match=sentence):
                change()  # type: ignore[no-untyped-call]
        client.unregister_system_shared_memory("mine")
        client.unregister_system_shared_memory("mine")
        with pytest.raises(InferenceServerException, match="Unable to find shared memory region: 'mine'"):
            infer_shared(client)
        assert client.get_system_shared_memory_status() == []


def test_a_file_that_is_cut_short_or_removed_ends_no_gateway(server: Server, client: Any) -> None:
    with region(64) as handle:
        shm.set_shared_memory_region(handle, [A, B])
        client.register_system_shared_memory("mine", KEY, 64)
        os.truncate(f"/dev/shm{KEY}", 8)
        for _ in range(4):
            with pytest.raises(InferenceServerException, match="Invalid offset"):
                infer_shared(client)
        os.truncate(f"/dev/shm{KEY}", 64)
        infer_shared(client)
        os.unlink(f"/dev/shm{KEY}")
        for _ in range(4):
            with pytest.raises(InferenceServerException, match="Unable to find shared memory region: 'mine'"):
                infer_shared(client)
        assert client.get_system_shared_memory_status() == []
    assert server.process.poll() is None
    assert not server.said("process ended")


CHILD = """
import sys, time
import tritonclient.http as triton
client = triton.InferenceServerClient(sys.argv[1])
client.register_system_shared_memory("mine", sys.argv[2], 64)
print("registered", flush=True)
sys.stdin.read()
"""


def test_a_region_ends_with_the_process_that_registered_it(server: Server, client: Any) -> None:
    with region(64) as handle:
        shm.set_shared_memory_region(handle, [A, B])
        command = [sys.executable, "-c", CHILD, f"{server.host}:{server.port}", KEY]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
            assert child.stdout is not None
            assert child.stdout.readline() == "registered\n"
            infer_shared(client)
            child.send_signal(signal.SIGKILL)
            child.wait(10)
        with pytest.raises(InferenceServerException, match="Unable to find shared memory region: 'mine'"):
            infer_shared(client)
        wait_for(lambda: client.get_system_shared_memory_status() == [], "the region to be forgotten")


def test_without_leave_there_is_none(start_server: StartServer, tmp_path: Path) -> None:
    write(tmp_path / "models", "sums", two_inputs())
    server = start_server(str(tmp_path / "models"))
    with triton.InferenceServerClient(f"{server.host}:{server.port}") as client, region(64):
        assert "system_shared_memory" not in client.get_server_metadata()["extensions"]
        assert client.get_system_shared_memory_status() == []
        client.unregister_system_shared_memory()
        for change in (lambda: client.register_system_shared_memory("mine", KEY, 64), lambda: infer_shared(client)):
            with pytest.raises(InferenceServerException, match="start it with --allow-client-shm"):
                change()  # type: ignore[no-untyped-call]


def test_which_lines_are_logged(server: Server, client: Any) -> None:
    settings = client.get_log_settings()
    assert settings == {
        "log_file": "",
        "log_info": True,
        "log_warning": True,
        "log_error": True,
        "log_verbose_level": 0,
        "log_format": "default",
    }
    client.infer("dense", [_rows()])
    changed = client.update_log_settings({"log_info": False, "log_verbose_level": 0})
    assert changed == settings | {"log_info": False}
    for _ in range(6):
        assert client.get_log_settings() == changed  # of whichever gateway
    assert client.update_log_settings({"log_info": True, "log_verbose_level": 1})["log_verbose_level"] == 1
    for bad, sentence in (
        ({"log_file": "/tmp/x"}, "'log_file' cannot be changed while the server runs"),
        ({"log_format": "ISO8601"}, "'log_format' cannot be changed"),
        ({"log_info": 1}, "'log_info' is true or false"),
        ({"log_verbose_level": -1}, "'log_verbose_level' is a whole number"),
        ({"zebra": 1}, "unknown log setting 'zebra'"),
    ):
        with pytest.raises(InferenceServerException, match=sentence):
            client.update_log_settings(bad)


def _rows() -> Any:
    given = triton.InferInput("x", [1, 4], "FP32")
    given.set_data_from_numpy(np.ones((1, 4), np.float32))
    return given


def test_trace_settings_without_tracing(client: Any) -> None:
    settings = client.get_trace_settings()
    assert (settings["trace_level"], settings["trace_rate"], settings["trace_count"]) == (["OFF"], "1", "-1")
    assert client.update_trace_settings(settings={"trace_rate": "10", "trace_count": 5})["trace_rate"] == "10"
    assert client.get_trace_settings("dense")["trace_count"] == "5"
    changed = client.update_trace_settings("dense", {"trace_rate": 3})
    assert (changed["trace_rate"], client.get_trace_settings()["trace_rate"]) == ("3", "10")
    assert client.update_trace_settings("dense", {"trace_rate": None})["trace_rate"] == "10"
    client.update_trace_settings(settings={"trace_rate": None, "trace_count": None, "trace_file": None})
    assert client.get_trace_settings() == settings
    for bad, sentence in (
        ({"trace_level": ["TIMESTAMPS"]}, "set tracing = true in .gateway."),
        ({"trace_level": ["TENSORS"]}, "traces have times, and no tensors"),
        ({"trace_level": []}, "'trace_level' is a list of OFF or TIMESTAMPS"),
        ({"trace_rate": "0"}, "'trace_rate' is a whole number from 1"),
        ({"trace_count": "many"}, "'trace_count' is a whole number from -1"),
        ({"trace_file": "/tmp/x"}, "'trace_file' cannot be changed"),
        ({"zebra": "1"}, "unknown trace setting 'zebra'"),
    ):
        with pytest.raises(InferenceServerException, match=sentence):
            client.update_trace_settings(settings=bad)
    with pytest.raises(InferenceServerException, match="Request for unknown model: 'nope' is not found"):
        client.get_trace_settings("nope")


# --- all of the client ---


def _same(client: Any) -> None:
    """Parts of a client that ask nothing of a server."""


CALLS: dict[str, Callable[[Any], Any]] = {
    "async_infer": lambda client: client.async_infer("dense", [_rows()]).get_result(),
    "close": _same,
    "generate_request_body": lambda client: client.generate_request_body([_rows()]),
    "get_cuda_shared_memory_status": lambda client: client.get_cuda_shared_memory_status(),
    "get_inference_statistics": lambda client: client.get_inference_statistics("dense", "1"),
    "get_log_settings": lambda client: client.get_log_settings(headers={"x-a": "b"}, query_params={"q": "1"}),
    "get_model_config": lambda client: client.get_model_config("dense"),
    "get_model_metadata": lambda client: client.get_model_metadata("dense", query_params={"q": [1, 2]}),
    "get_model_repository_index": lambda client: client.get_model_repository_index(),
    "get_server_metadata": lambda client: client.get_server_metadata(),
    "get_system_shared_memory_status": lambda client: client.get_system_shared_memory_status(),
    "get_trace_settings": lambda client: client.get_trace_settings("dense"),
    "infer": lambda client: client.infer(
        "dense",
        [_rows()],
        model_version="1",
        outputs=[triton.InferRequestedOutput("y", class_count=1)],
        request_id="a",
        sequence_id=3,
        sequence_start=True,
        sequence_end=True,
        priority=1,
        timeout=9_000_000,
        headers={"X-Request-Id": "b"},
        query_params={"q": "1"},
        request_compression_algorithm="gzip",
        response_compression_algorithm="deflate",
        parameters={"custom": "text", "number": 1, "flag": True},
    ),
    "is_model_ready": lambda client: client.is_model_ready("dense"),
    "is_server_live": lambda client: client.is_server_live(),
    "is_server_ready": lambda client: client.is_server_ready(),
    "parse_response_body": _same,
    "plugin": _same,
    "register_plugin": _same,
    "unregister_plugin": _same,
    "unregister_cuda_shared_memory": lambda client: client.unregister_cuda_shared_memory(),
    "unregister_system_shared_memory": lambda client: client.unregister_system_shared_memory(),
    "load_model": lambda client: client.load_model("dense"),
    "update_log_settings": lambda client: client.update_log_settings({"log_info": True}),
    "update_trace_settings": lambda client: client.update_trace_settings(settings={"trace_rate": "2"}),
}
REFUSED: dict[str, tuple[Callable[[Any], Any], str]] = {
    "register_cuda_shared_memory": (
        lambda client: client.register_cuda_shared_memory("c", b"AAAA", 0, 64),
        "shared memory of CUDA cannot be used",
    ),
    "register_system_shared_memory": (
        lambda client: client.register_system_shared_memory("c", "/nope-nope", 64),
        "Unable to open shared memory region: '/nope-nope'",
    ),
    "unload_model": (lambda client: client.unload_model("dense"), "model_control"),
}


def public(kind: type) -> set[str]:
    return {name for name, _ in inspect.getmembers(kind, inspect.isroutine) if not name.startswith("_")}


def test_every_method_of_the_client_is_answered(client: Any) -> None:
    assert public(triton.InferenceServerClient) == CALLS.keys() | REFUSED.keys(), "treat what is new, here too"
    for name, call in CALLS.items():
        answer = call(client)
        assert answer is not False, name
    for call, sentence in REFUSED.values():
        with pytest.raises(InferenceServerException, match=sentence):
            call(client)


def test_every_method_of_the_aio_client_is_answered(server: Server) -> None:
    async def use() -> None:
        async with triton_aio.InferenceServerClient(f"{server.host}:{server.port}") as client:
            names = public(triton_aio.InferenceServerClient)
            assert names <= CALLS.keys() | REFUSED.keys()
            for name in sorted(names - {"close", "async_infer", *REFUSED}):
                made = CALLS[name](client)
                answer = await made if inspect.isawaitable(made) else made
                assert answer is not False, name

    asyncio.run(use())


def test_settings_end_with_the_server(server: Server, client: Any) -> None:
    client.update_log_settings({"log_info": False})
    runtime = server.runtime
    assert json.loads((runtime / "gateways.json").read_text()) == {"logging": {"log_info": False}}
