"""Spans of a real server's requests, as whoever collects them gets them (OTLP over HTTP)."""

from __future__ import annotations

import json
import os
import queue
import signal
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from tests.system.servers import Process, Server

SEVEN = (Path(__file__).parents[2] / "examples/digits/seven.json").read_bytes()
TRACE, CALLER = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
PATIENCE_S = 30.0


class Collector:
    """Listens where spans are sent, and keeps them."""

    def __init__(self) -> None:
        spans: queue.Queue[Any] = queue.Queue()

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
                    about = attributes(resource.resource)
                    for scope in resource.scope_spans:
                        for span in scope.spans:
                            spans.put((self.path, about, span))
                self.send_response(200)
                self.end_headers()

            def log_message(self, *arguments: Any) -> None:
                pass

        self.spans = spans
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self._thread.start()

    def take(self, count: int) -> dict[str, Any]:
        """So many spans, by name."""
        found = [self.spans.get(timeout=PATIENCE_S) for _ in range(count)]
        return {span.name: span for _, _, span in found}

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


def attributes(of: Any) -> dict[str, Any]:
    return {each.key: getattr(each.value, each.value.WhichOneof("value")) for each in of.attributes}


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    started = Collector()
    yield started
    started.close()


@pytest.fixture(scope="module")
def server(collector: Collector, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("traced")
    (folder / "penstock.toml").write_text("[gateway]\ntracing = true\n")
    environment = {
        "OTEL_EXPORTER_OTLP_ENDPOINT": collector.url,
        "OTEL_BSP_SCHEDULE_DELAY": "50",
        "OTEL_SERVICE_NAME": "digits-server",
    }
    started = Server(folder / "run", f"--config={folder / 'penstock.toml'}", environment=environment)
    yield started
    started.check_clean_end()


def test_a_request_is_a_child_of_its_callers_span_and_has_its_parts(server: Server, collector: Collector) -> None:
    headers = {"traceparent": f"00-{TRACE}-{CALLER}-01", "tracestate": "vendor=1"}
    status, _, _ = server.request("POST", "/v2/models/digits/infer", SEVEN, headers)
    assert status == 200
    spans = collector.take(4)
    assert spans.keys() == {"POST /v2/models/digits/infer", "queue", "batch", "model"}
    whole = spans["POST /v2/models/digits/infer"]
    assert {span.trace_id.hex() for span in spans.values()} == {TRACE}
    assert whole.parent_span_id.hex() == CALLER
    assert whole.trace_state == "vendor=1"
    assert spans["queue"].parent_span_id == spans["batch"].parent_span_id == whole.span_id
    assert spans["model"].parent_span_id == spans["batch"].span_id
    about = attributes(whole)
    assert (about["penstock.model"], about["http.response.status_code"]) == ("digits", 200)
    batch = attributes(spans["batch"])
    assert (batch["penstock.batch.rows"], batch["penstock.batch.reason"]) == (1, "idle")
    start, end = whole.start_time_unix_nano, whole.end_time_unix_nano
    for span in spans.values():
        assert start <= span.start_time_unix_nano <= span.end_time_unix_nano <= end
    assert spans["model"].end_time_unix_nano > spans["model"].start_time_unix_nano


def test_a_request_without_a_trace_begins_one_and_has_its_id(server: Server, collector: Collector) -> None:
    request = json.loads(SEVEN) | {"id": "mine"}
    status, _ = server.infer("digits", request)
    assert status == 200
    whole = collector.take(4)["POST /v2/models/digits/infer"]
    assert whole.parent_span_id == b""
    assert attributes(whole)["penstock.request_id"] == "mine"


def test_a_request_that_fails_says_so(server: Server, collector: Collector) -> None:
    request = json.loads(SEVEN) | {"parameters": {"timeout": 100_000}}
    [worker] = server.children("worker")
    os.kill(worker, signal.SIGSTOP)
    try:
        status, _ = server.infer("digits", request)
    finally:
        os.kill(worker, signal.SIGCONT)
    assert status == 504
    [span] = collector.take(1).values()
    about = attributes(span)
    assert (about["http.response.status_code"], about["error.type"]) == (504, "deadline")
    assert span.status.code == span.status.STATUS_CODE_ERROR


def test_they_come_from_the_service_that_the_environment_names(server: Server, collector: Collector) -> None:
    server.infer("digits", json.loads(SEVEN))
    for _ in range(4):
        path, about, _ = collector.spans.get(timeout=PATIENCE_S)
        assert path == "/v1/traces"
        assert (about["service.name"], about["penstock.gateway"]) == ("digits-server", "gateway-0")


def test_what_was_not_sent_yet_is_sent_at_the_end(collector: Collector, tmp_path: Path) -> None:
    (tmp_path / "penstock.toml").write_text("[gateway]\ntracing = true\n")
    environment = {"OTEL_EXPORTER_OTLP_ENDPOINT": collector.url, "OTEL_BSP_SCHEDULE_DELAY": "600000"}
    server = Server(tmp_path / "run", f"--config={tmp_path / 'penstock.toml'}", environment=environment)
    status, _ = server.infer("digits", json.loads(SEVEN))
    assert status == 200
    assert collector.spans.empty()
    server.check_clean_end()
    assert len(collector.take(4)) == 4


def test_without_opentelemetry_it_is_said_what_to_install(tmp_path: Path) -> None:
    (tmp_path / "penstock.toml").write_text("[gateway]\ntracing = true\n")
    (tmp_path / "opentelemetry.py").write_text("raise ImportError('it is not there')\n")
    process = Process(
        ["gateway", f"--runtime-dir={tmp_path / 'run'}", f"--config={tmp_path / 'penstock.toml'}"],
        {"PYTHONPATH": str(tmp_path)},
    )
    assert process.wait() == 2
    assert process.said("pip install 'penstock[otel]'")
