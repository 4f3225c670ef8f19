"""What a server answers over HTTP, above all to what is wrong: a 4xx that names the thing, and nobody else
disturbed."""

from __future__ import annotations

import concurrent.futures
import gzip
import json
import socket
import struct
import time
from typing import Any

import numpy as np
import pytest

from tests.system.servers import DEADLINE_S, Server, wait_for

X: dict[str, Any] = {"name": "x", "shape": [1, 4], "datatype": "FP32", "data": [1, 2, 3, 4]}
A: dict[str, Any] = {"name": "a", "shape": [1, 2], "datatype": "INT32", "data": [1, 2]}
B: dict[str, Any] = {"name": "b", "shape": [1, 2], "datatype": "INT32", "data": [3, 4]}


def request(*inputs: dict[str, Any], **more: Any) -> bytes:
    return json.dumps({"inputs": list(inputs), **more}).encode()


BAD_REQUESTS: list[tuple[str, str, bytes, int, list[str]]] = [
    ("unknown model", "nope", request(X), 404, ["unknown model: 'nope'"]),
    ("unknown version", "dense/versions/9", request(X), 404, ["'dense' version 9"]),
    ("no inputs", "sums", request(), 400, ["expected 2 inputs but got 0 inputs for model 'sums'", "['a', 'b']"]),
    ("missing input", "sums", request(A), 400, ["missing required input(s) ['b']"]),
    ("extra input", "sums", request(A, B, X), 400, ["unexpected inference input 'x' for model 'sums'"]),
    ("input twice", "sums", request(A, A), 400, ["input 'a' already exists"]),
    ("datatype", "dense", request(X | {"datatype": "INT32"}), 400, ["'x' data-type is 'INT32'", "expects 'FP32'"]),
    ("unknown datatype", "dense", request(X | {"datatype": "FP33"}), 400, ["'x'", "unknown data-type 'FP33'"]),
    ("shape", "dense", request(X | {"shape": [1, 2, 2]}), 400, ["input 'x'", "Expected [-1, 4], got [1, 2, 2]"]),
    ("width", "dense", request(X | {"shape": [1, 5], "data": [1] * 5}), 400, ["Expected [-1, 4], got [1, 5]"]),
    ("count", "dense", request(X | {"data": [1, 2, 3]}), 400, ["input 'x' has 3 elements", "takes 4"]),
    ("negative", "dense", request(X | {"shape": [-1, 4]}), 400, ["input 'x'", "-1"]),
    ("overflow", "dense", request(X | {"shape": [2**40, 2**40]}), 400, ["byte size overflow for input 'x'"]),
    ("fraction", "dense", request(X | {"shape": [1.0, 4]}), 400, ["shape of input 'x'", "1.0"]),
    ("no rows", "dense", request(X | {"shape": [0, 4], "data": []}), 400, ["at least one row"]),
    ("rows", "dense", request(X | {"shape": [33, 4], "data": [0] * 132}), 400, ["batch-size must be <= 32"]),
    (
        "rows differ",
        "sums",
        request(A, B | {"shape": [2, 2], "data": [1, 2, 3, 4]}),
        400,
        ["input 'b' batch size does not match other inputs for 'sums'"],
    ),
    ("text", "dense", request(X | {"data": ["1", "2", "3", "4"]}), 400, ["input 'x' holds strings", "FP32"]),
    ("null", "dense", request(X | {"data": [1, None, 3, 4]}), 400, ["input 'x' holds", "null"]),
    ("too large a number", "sums", request(A | {"data": [1, 2**40]}, B), 400, ["input 'a'", "does not fit INT32"]),
    ("FP16 in JSON", "half", request(X | {"datatype": "FP16"}), 400, ["is FP16, which JSON cannot carry"]),
    ("no JSON", "dense", b"{", 400, ["not JSON"]),
    ("a list", "dense", b"[]", 400, ["not a JSON object"]),
    ("empty", "dense", b"", 400, ["not JSON"]),
    ("nested without end", "dense", b"[" * 100_000, 400, ["not JSON"]),
    ("not UTF-8", "dense", b'{"inputs": [{"name": "\xff"}]}', 400, ["not JSON"]),
    ("unknown output", "dense", request(X, outputs=[{"name": "z"}]), 400, ["unexpected inference output 'z'", "['y']"]),
    ("output twice", "dense", request(X, outputs=[{"name": "y"}] * 2), 400, ["output 'y' already exists"]),
    ("id", "dense", request(X, id=7), 400, ["'id' is a string"]),
    ("timeout", "dense", request(X, parameters={"timeout": -5}), 400, ["'timeout' is a whole number"]),
    ("priority", "dense", request(X, parameters={"priority": "high"}), 400, ["'priority' is a whole number"]),
    ("out of range for the model", "lookup", request(X | {"name": "i", "shape": [1], "datatype": "INT64", "data": [9]}),
     500, ["model 'lookup' failed on this input", "out of data bounds"]),
]  # fmt: skip


@pytest.mark.parametrize(
    ("path", "body", "status", "words"), [each[1:] for each in BAD_REQUESTS], ids=[each[0] for each in BAD_REQUESTS]
)
def test_bad_requests_are_told_what_is_wrong(
    server: Server, path: str, body: bytes, status: int, words: list[str]
) -> None:
    got, headers, answer = server.request("POST", f"/v2/models/{path}/infer", body)
    error = json.loads(answer)["error"]
    assert got == status, error
    assert headers["content-type"] == "application/json"
    for word in words:
        assert word in error


def binary(array: Any, datatype: str, name: str = "x", size: int | None = None) -> tuple[bytes, int]:
    about = {
        "name": name,
        "shape": list(array.shape),
        "datatype": datatype,
        "parameters": {"binary_data_size": array.nbytes if size is None else size},
    }
    head = request(about)
    return head + array.tobytes(), len(head)


@pytest.mark.parametrize(
    ("length", "words"),
    [
        ("0", "takes 16 bytes, and 120 came"),  # a raw tensor
        ("999999", "and the body has"),
        ("-5", "not a number"),
        ("five", "not a number"),
        ("10", "not JSON"),
    ],
)
def test_a_binary_header_length_that_lies(server: Server, length: str, words: str) -> None:
    body, _ = binary(np.ones((1, 4), np.float32), "FP32")
    status, _, answer = server.request(
        "POST", "/v2/models/dense/infer", body, {"Inference-Header-Content-Length": length}
    )
    assert status == 400
    assert words in json.loads(answer)["error"]


@pytest.mark.parametrize(
    ("size", "words"), [(12, "claim"), (20, "are left"), (-1, "0 or more"), (2**70, "whole number")]
)
def test_a_binary_size_that_lies(server: Server, size: int, words: str) -> None:
    body, length = binary(np.ones((1, 4), np.float32), "FP32", size=size)
    status, _, answer = server.request(
        "POST", "/v2/models/dense/infer", body, {"Inference-Header-Content-Length": str(length)}
    )
    assert status == 400
    assert words in json.loads(answer)["error"]


@pytest.mark.parametrize(
    ("header", "value", "words"),
    [
        ("Penstock-Timeout", "-1", "more than 0 and at most 86400"),
        ("Penstock-Timeout", "0", "more than 0 and at most 86400"),
        ("Penstock-Timeout", "nan", "more than 0 and at most 86400"),
        ("Penstock-Timeout", "1e9", "more than 0 and at most 86400"),
        ("Penstock-Timeout", "86401", "more than 0 and at most 86400"),
        ("Penstock-Priority", "6", "from 1, the most urgent, to 5"),
        ("Penstock-Priority", "high", "from 1, the most urgent, to 5"),
        ("Penstock-Tenant", "x" * 65, "at most 64 printable ASCII characters"),
        ("Penstock-Tenant", "\xe9", "at most 64 printable ASCII characters"),
        ("Penstock-Explain", "true", "1 or 0"),
    ],
)
def test_headers_that_ask_for_what_cannot_be(server: Server, header: str, value: str, words: str) -> None:
    status, headers, answer = server.request("POST", "/v2/models/dense/infer", request(X), {header: value})
    error = json.loads(answer)["error"]
    assert (status, header in error, words in error) == (400, True, True), error
    assert headers["server-timing"].startswith("total;dur=")


def test_headers_say_how_urgent_and_for_whom_and_answers_where_time_went(server: Server) -> None:
    asked = {"Penstock-Timeout": "20", "Penstock-Priority": "1", "Penstock-Tenant": "blue", "Penstock-Explain": "1"}
    body, length = binary(np.ones((1, 4), np.float32), "FP32")
    for sent, more in ((request(X), {}), (body, {"Inference-Header-Content-Length": str(length)})):
        status, headers, answer = server.request("POST", "/v2/models/dense/infer", sent, asked | more)
        assert status == 200, answer
        told = json.loads(answer)["parameters"]
        assert told["worker"] == "cpu-0"
        assert told["batch_rows"] == 1
        assert told["why"].endswith(f"batch {told['batch']} of that worker, with 1 row, took {told['batch_ms']:.1f} ms")
        parts = ("body_ms", "ahead_ms", "held_ms", "waited_ms", "batch_ms", "rest_ms")
        assert sum(told[part] for part in parts[1:]) == pytest.approx(told["total_ms"], abs=0.1)
        assert all(told[part] >= 0 for part in parts)
        timing = dict(each.split(";dur=") for each in headers["server-timing"].split(", "))
        assert list(timing) == ["queue", "batch", "model", "total"]
        assert float(timing["batch"]) == told["batch_ms"]
    status, headers, answer = server.request("POST", "/v2/models/dense/infer", request(X))
    assert "parameters" not in json.loads(answer)
    assert "server-timing" in headers


def test_a_body_that_uses_up_its_requests_time_is_504(server: Server) -> None:
    body = request(X)
    lines = [
        "POST /v2/models/dense/infer HTTP/1.1",
        "Host: a",
        f"Content-Length: {len(body)}",
        "Penstock-Timeout: 0.05",
    ]
    head = "\r\n".join([*lines, "", ""])

    def coming() -> bool:
        return any(count for name, count in server.metrics().items() if name.startswith("penstock_http_body_bytes"))

    with socket.create_connection((server.host, server.port), timeout=DEADLINE_S) as client:
        client.sendall(head.encode() + body[:10])
        wait_for(coming, "the gateway to have its head")
        late = time.monotonic() + 0.06
        wait_for(lambda: time.monotonic() > late, "its time to be up")
        client.sendall(body[10:])
        answer = client.recv(65536)
    assert answer.startswith(b"HTTP/1.1 504 ")
    assert b"time was up before the request was queued" in answer


def test_plain_json(server: Server) -> None:
    body = json.dumps({"a": [[1, 2]], "b": [[3, 4]]}).encode()
    for path in ("sums", "sums/versions/1"):
        status, headers, answer = server.request("POST", f"/v2/models/{path}/predict", body)
        assert (status, headers["content-type"]) == (200, "application/json")
        assert json.loads(answer) == {"sum": [[4, 6]], "difference": [[-2, -2]]}
    for model, value in (("half", [[1.5, -2.0]]), ("brain", [[1.5, -2.0]]), ("strings", [["Grüße", ""]])):
        status, _, answer = server.request("POST", f"/v2/models/{model}/predict", json.dumps({"x": value}).encode())
        assert (status, json.loads(answer)) == (200, {"y": value})
    status, _, answer = server.request("POST", "/v2/models/lookup/predict", b'{"i": [9]}')
    assert (status, "model 'lookup' failed on this input" in json.loads(answer)["error"]) == (500, True)


def test_a_body_that_is_the_only_input(server: Server) -> None:
    for model, body in (("half", np.array([1.5, -2], "<f2").tobytes()), ("wide", bytes(200_000))):
        headers = {"Inference-Header-Content-Length": "0"}
        status, headers, answer = server.request("POST", f"/v2/models/{model}/infer", body, headers)
        at = int(headers["inference-header-content-length"])
        assert (status, json.loads(answer[:at])["outputs"][0]["shape"][0], answer[at:]) == (200, 1, body)


def test_paths_and_methods(server: Server) -> None:
    assert server.request("GET", "/v2/")[0] == 200
    status, headers, answer = server.request("GET", "/v2/models/dense/infer")
    assert (status, headers["allow"], json.loads(answer)) == (405, "OPTIONS, POST", {"error": "Method Not Allowed"})
    status, _, answer = server.request("GET", "/v3")
    assert (status, json.loads(answer)) == (404, {"error": "Not Found"})
    assert server.request("GET", "/v2/models/names%20with%20spaces%20%C3%A9")[0] == 200
    status, _, answer = server.request("GET", "/v2/models/%FF")
    assert status == 400
    assert "UTF-8" in json.loads(answer)["error"]


def test_not_a_number_and_infinities_travel_as_tokens(server: Server) -> None:
    body = b'{"inputs": [{"name": "x", "shape": [1, 4], "datatype": "FP32", "data": [NaN, Infinity, -Infinity, 0]}]}'
    status, _, answer = server.request("POST", "/v2/models/dense/infer", body)
    assert status == 200
    assert b"NaN" in answer
    assert all(np.isnan(json.loads(answer)["outputs"][0]["data"]))


def test_a_body_over_the_limit_is_refused_and_the_client_reads_why(server: Server) -> None:
    with socket.create_connection((server.host, server.port), timeout=DEADLINE_S) as client:
        client.sendall(b"POST /v2/models/dense/infer HTTP/1.1\r\nHost: a\r\nContent-Length: 100000000000\r\n\r\n")
        client.sendall(b"x" * 100_000)
        answer = read_all(client)
    assert answer.startswith(b"HTTP/1.1 413 ")
    assert b"body_bytes_max" in answer


def read_all(client: socket.socket) -> bytes:
    parts = []
    while part := client.recv(65536):
        parts.append(part)
    return b"".join(parts)


def test_a_bomb_is_stopped_at_the_limit(server: Server) -> None:
    bomb = gzip.compress(b"\0" * (200 << 20), 9)
    status, _, answer = server.request("POST", "/v2/models/dense/infer", bomb, {"Content-Encoding": "gzip"})
    assert status == 413
    assert "expands to more than the limit" in json.loads(answer)["error"]


def test_what_is_not_http_gets_400_and_the_server_goes_on(server: Server) -> None:
    with socket.create_connection((server.host, server.port), timeout=DEADLINE_S) as client:
        client.sendall(struct.pack("<100Q", *range(100)))
        assert read_all(client).startswith(b"HTTP/1.1 400 ")
    assert server.infer("dense", {"inputs": [X]})[0] == 200


def test_a_bad_request_fails_alone_in_its_batch(server: Server) -> None:
    """Requests of many clients share batches; an index out of range is one client's affair."""

    def ask(index: int) -> tuple[int, Any]:
        return server.infer("lookup", {"inputs": [{"name": "i", "shape": [1], "datatype": "INT64", "data": [index]}]})

    indexes = [0, 1, 2, 7] * 32
    with concurrent.futures.ThreadPoolExecutor(32) as pool:
        answers = list(pool.map(ask, indexes))
    for index, (status, answer) in zip(indexes, answers, strict=True):
        if index == 7:
            assert status == 500
            assert "model 'lookup' failed on this input" in answer["error"]
        else:
            assert answer["outputs"][0]["data"] == [2.0 * index, 2.0 * index + 1]


def test_a_time_that_is_up_is_504(server: Server) -> None:
    status, answer = server.infer("dense", {"inputs": [X], "parameters": {"timeout": 1}})
    assert status == 504, answer
    assert "time was up" in answer["error"]


def test_the_metrics_name_what_happened(server: Server) -> None:
    server.infer("dense", {"inputs": [X]})
    server.infer("dense", {"inputs": []})
    wait_for(lambda: server.metrics().get("penstock_broker_up") == 1, "the broker's part")

    def told() -> bool:
        metrics = server.metrics()
        names = {name.partition("{")[0] for name in metrics}
        return {
            "penstock_requests_total",
            "penstock_request_failures_total",
            "penstock_queue_requests",
            "penstock_queue_seconds_bucket",
            "penstock_compute_seconds_bucket",
            "penstock_batch_rows_sum",
            "penstock_batches_total",
            "penstock_model_ready",
            "penstock_model_run_bytes",
            "penstock_batch_rows_max",
            "penstock_expected_batch_seconds",
            "penstock_heap_bytes",
            "penstock_http_request_seconds_count",
            "penstock_process_cpu_seconds_total",
        } <= names and any('reason="bad_input"' in name and 'model="dense"' in name for name in metrics)

    wait_for(told, "all families of metrics")
    labels = [name for name in server.metrics() if "nope" in name]
    assert labels == [], "a name that a client made up is no label"
