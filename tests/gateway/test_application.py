"""What each route answers: a real caller core that hears what a broker and workers say, and no sockets."""

from __future__ import annotations

import gzip
import json
import logging
import re
import threading
import time
import weakref
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from importlib.metadata import version
from typing import Any, NamedTuple, cast

import numpy as np
import pytest

from penstock.client.caller import Caller, Identity
from penstock.client.events import Complete, Event, Fail, FromWorker
from penstock.gateway import application
from penstock.gateway.application import Application
from penstock.gateway.compression import decompress
from penstock.gateway.connection import Connection, Exchange
from penstock.gateway.options import GatewayOptions
from penstock.gateway.reader import Budget, Head, Reader
from penstock.gateway.reports import Reports
from penstock.gateway.statuses import STATUSES
from penstock.gateway.waits import BoundedWait
from penstock.wire import errors, process
from penstock.wire.arena import Arena
from penstock.wire.codec import pack, pack_failure, pack_outcome, unpack, unpack_layout
from penstock.wire.events import ArenaCame, BrokerLost, FromBroker, Tick
from penstock.wire.messages import (
    COMPLETE,
    FAILED,
    INLINE_MAX_BYTES,
    ON_PUBLICATION,
    Answers,
    Batch,
    Failure,
    Metrics,
    Models,
    Outcome,
    Refusal,
    Refusals,
    Results,
    Snapshot,
    Submit,
    Welcome,
    WorkerAddress,
    Workers,
)
from penstock.wire.metrics import Sample
from penstock.wire.models import LOADING, READY, UNAVAILABLE, ModelSpec, ModelState, Route, Tensor, TensorSpec
from penstock.wire.slots import Slot, Slots
from tests.gateway.serving import DEADLINE_S, Loop, Serving

EPOCH = 5


def spec(name: str = "double", version: str = "1") -> ModelSpec:
    return ModelSpec(
        name,
        version,
        "onnxruntime_onnx",
        (TensorSpec("x", "FP32", (-1, 2)),),
        (TensorSpec("y", "FP32", (-1, 2)),),
        True,
        1 << 20,
    )


def ready(name: str = "double", version: str = "1") -> ModelState:
    return ModelState(name, version, READY, "", spec(name, version))


class Said(NamedTuple):
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def error(self) -> str:
        """The sentence, of an answer that is nothing but an error."""
        assert self.headers["Content-Type"] == "application/json"
        content = json.loads(self.body)
        assert list(content) == ["error"]
        return str(content["error"])


class Line:
    """Where answers go: the part of a connection that an exchange knows."""

    def __init__(self, desk: Desk) -> None:
        self.budget = desk.budget
        self.slots = desk.slots_now
        self._desk = desk

    def wait(self, nbytes: int, lead: int, then: Callable[[Slot], None], late: Callable[[str], None]) -> BoundedWait:
        desk = self._desk
        assert desk.slots is not None
        return BoundedWait(desk.loop.loop, desk.slots, nbytes, lead, desk.options.arena_wait_s, then, late)

    def answered(self) -> None: ...


class Desk:
    """An application with its caller, the broker and the workers played by the test."""

    def __init__(self, loop: Loop, slots: Slots | None = None, **limits: Any) -> None:
        self.loop = loop
        self.slots = slots
        self.options = GatewayOptions(**{"json_processes_max": 0, **limits})
        self.caller = Caller(Identity(b"a caller", "gateway", 1, True, "/run/here", calls_max=4))
        self.reports = Reports(loop.loop, self._ask_broker, lambda: Snapshot("gateway", ()), 10)
        self.serials: list[int] = []
        self.flushes = 0
        self.application = Application(loop.loop, self.caller, self.options, self.reports, self._flush)
        self.budget = Budget(self.options.bodies_bytes_max)
        self._reader = Reader(self.options, self.budget, {}, self.slots_now, Exchange)

    def slots_now(self) -> Slots | None:
        return self.slots if self.caller.shares else None

    def _flush(self) -> None:
        self.flushes += 1

    def _ask_broker(self) -> int | None:
        if not self.caller.membership.joined:
            return None
        serial, _ = self.caller.ask_metrics()
        self.serials.append(serial)
        return serial

    # --- the broker and the workers ---

    def hear(self, event: Event, later_s: float = 0.0) -> None:
        for command in self.caller.handle(event, time.monotonic() + later_s):
            match command:
                case Complete():
                    command.sink.complete(command)
                case Fail(sink, error):
                    sink.fail(error)

    def join(self, *models: ModelState) -> Desk:
        self.hear(FromBroker(Welcome(EPOCH, "gateway", self.slots is not None)))
        self.hear(FromBroker(Models(EPOCH, models)))
        return self

    def sent(self) -> Submit:
        [message] = self.caller.flush(time.monotonic())
        return message

    def deliver(self, number: int, outcome: Outcome, payload: bytes, body: bytes = b"", status: int = COMPLETE) -> None:
        """The result of a request, as it would come over the wire."""
        answers = Answers(status, len(payload), body or pack_outcome(outcome), 7, (number,))
        large = len(payload) > INLINE_MAX_BYTES
        batch = Batch(1, 1, "idle", 10, 5)
        message = Results(EPOCH, [answers], b"worker 0", batch, blob=b"" if large else payload)
        back = unpack(pack(message), [memoryview(payload)] if large else [], ON_PUBLICATION)
        assert isinstance(back, Results)
        self.hear(FromWorker(back))

    def double(self, number: int, x: bytes) -> None:
        """The right answer to a request for the model."""
        y = (np.frombuffer(x, "<f4") * 2).tobytes()
        self.deliver(number, Outcome("double", "1", (Tensor("y", "FP32", (len(y) // 8, 2), 0, len(y)),)), y)

    # --- the client ---

    def begin(self, method: str, url: str, body: bytes = b"", **headers: str) -> Exchange:
        """A request that may be answered later."""
        exchange = self.exchange(self.read(method, url, body, **headers))
        self.application.handle(exchange)
        return exchange

    def exchange(self, exchange: Exchange, began_s: float = 0.0) -> Exchange:
        """On this desk. ``began_s``: when its head came, from now, if that was before its body."""
        exchange._connection = cast(Connection, Line(self))
        exchange.began += began_s
        return exchange

    def read(self, method: str, url: str, body: bytes = b"", **headers: str) -> Exchange:
        lines = [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
        head = "\r\n".join([f"{method} {url} HTTP/1.1", "Host: a", f"Content-Length: {len(body)}", *lines, "", ""])
        reader, data = self._reader, head.encode("latin-1") + body
        reader.feed(memoryview(data[:100_000]), min(len(data), 100_000))
        if reader.direct is not None:
            reader.direct[:] = data[100_000:]
            reader.filled(len(reader.direct))
        elif data[100_000:]:
            reader.feed(memoryview(data[100_000:]), len(data) - 100_000)
        [exchange] = self._reader.requests
        self._reader.requests = []
        return exchange

    def ask(self, method: str, url: str, body: bytes = b"", **headers: str) -> Said:
        return said(self.begin(method, url, body, **headers))

    def infer(self, request: Any = None, model: str = "double", **headers: str) -> Exchange:
        return self.begin("POST", f"/v2/models/{model}/infer", json.dumps(request or INFER).encode(), **headers)

    def meter(self, family: str, *labels: str) -> float:
        return self.caller.meters.value(family, *labels).value


def said(exchange: Exchange) -> Said:
    assert exchange._response is not None, "it has not been answered"
    before, _, body = (exchange._response + bytes(exchange._tail)).partition(b"\r\n\r\n")
    first, *lines = before.decode().split("\r\n")
    headers = dict(line.split(": ", 1) for line in lines)
    assert int(headers["Content-Length"]) == len(body)
    assert exchange.status == int(first.split()[1])
    return Said(exchange.status, headers, body)


def waits(exchange: Exchange) -> bool:
    return exchange._response is None


X = np.array([[1, 2]], "<f4").tobytes()
INFER_URL = "/v2/models/double/infer"
INFER = {"inputs": [{"name": "x", "shape": [1, 2], "datatype": "FP32", "data": [1, 2]}]}
BODY = json.dumps(INFER).encode()
DOUBLED = (
    b'{"model_name":"double","model_version":"1","outputs":'
    b'[{"name":"y","datatype":"FP32","shape":[1,2],"data":[2.0,4.0]}]}'
)


@pytest.fixture
def desk(loop: Loop) -> Desk:
    return Desk(loop)


@pytest.fixture
def joined(desk: Desk) -> Desk:
    return desk.join(ready())


# --- the server ---


def test_server_says_what_it_is_and_what_works(desk: Desk) -> None:
    for url in ("/v2", "/v2/"):
        answer = desk.ask("GET", url)
        assert (answer.status, answer.headers["Content-Type"]) == (200, "application/json")
        assert json.loads(answer.body) == {
            "name": "penstock",
            "version": version("penstock"),
            "extensions": ["classification", "sequence", "binary_tensor_data", "parameters", "schedule_policy"],
        }


def test_the_dashboard_is_there_with_or_without_a_broker(desk: Desk) -> None:
    answer = desk.ask("GET", "/")
    assert (answer.status, answer.headers["Content-Type"]) == (200, "text/html; charset=utf-8")
    assert answer.headers["Content-Security-Policy"].startswith("default-src 'none'; script-src 'sha256-")
    assert answer.body.startswith(b"<!doctype html>")
    assert desk.meter("penstock_http_responses", "200") == 1


def test_live_is_always_true(desk: Desk) -> None:
    assert desk.ask("GET", "/v2/health/live") == (200, {"Content-Length": "0"}, b"")


def test_ready_when_every_model_is(joined: Desk) -> None:
    assert joined.ask("GET", "/v2/health/ready") == (200, {"Content-Length": "0"}, b"")


@pytest.mark.parametrize(
    ("models", "reason"),
    [
        ([], "no worker has joined"),
        ([ready(), ModelState("b", "1", LOADING, "", None)], "not ready: b (LOADING)"),
        (
            [ModelState("b", "1", UNAVAILABLE, "bad", spec("b")), ModelState("b", "2", LOADING, "", None)],
            "not ready: b (UNAVAILABLE), b (LOADING); because bad",
        ),
        (
            [ModelState(name, "1", UNAVAILABLE, "the GPU is lost", None) for name in "bc"],
            "not ready: b (UNAVAILABLE), c (UNAVAILABLE); because the GPU is lost",
        ),
    ],
)
def test_not_ready_is_503_with_a_reason(desk: Desk, models: list[ModelState], reason: str) -> None:
    answer = desk.join(*models).ask("GET", "/v2/health/ready")
    assert (answer.status, answer.headers["Retry-After"]) == (503, "1")
    assert answer.error == f"Server not ready: {reason}"


def test_not_ready_without_a_broker(joined: Desk) -> None:
    joined.hear(BrokerLost("it ended"))
    assert joined.ask("GET", "/v2/health/ready").error == "Server not ready: no broker answers"


# --- models ---


def test_model_is_described(joined: Desk) -> None:
    answer = joined.ask("GET", "/v2/models/double")
    assert answer.status == 200
    assert json.loads(answer.body) == {
        "name": "double",
        "versions": ["1"],
        "platform": "onnxruntime_onnx",
        "inputs": [{"name": "x", "datatype": "FP32", "shape": [-1, 2]}],
        "outputs": [{"name": "y", "datatype": "FP32", "shape": [-1, 2]}],
    }


def test_model_with_several_versions_names_those_that_can_be_asked(desk: Desk) -> None:
    loading = ModelState("double", "3", LOADING, "", None)
    desk.join(ready(version="10"), ready(version="1"), ready(version="2"), loading)
    assert json.loads(desk.ask("GET", "/v2/models/double").body)["versions"] == ["1", "2", "10"]
    assert json.loads(desk.ask("GET", "/v2/models/double/versions/1").body)["versions"] == ["1"]


def test_model_with_a_name_that_needs_escapes(desk: Desk) -> None:
    desk.join(ready('a "b"/ü'))
    answer = desk.ask("GET", "/v2/models/a%20%22b%22%2F%C3%BC")
    assert json.loads(answer.body)["name"] == 'a "b"/ü'


@pytest.mark.parametrize(
    ("url", "status"),
    [
        ("/v2/models/double/ready", 200),
        ("/v2/models/double/versions/1/ready", 200),
        ("/v2/models/double/versions/9/ready", 400),
        ("/v2/models/nope/ready", 400),
        ("/v2/models/loading/ready", 400),
        ("/v2/models/both/ready", 200),
        ("/v2/models/both/versions/1/ready", 400),
    ],
)
def test_whether_a_model_is_ready(desk: Desk, url: str, status: int) -> None:
    loading = ModelState("loading", "1", LOADING, "", None)
    broken = ModelState("both", "1", UNAVAILABLE, "bad", spec("both"))
    desk.join(ready(), loading, broken, ready("both", "2"))
    answer = desk.ask("GET", url)
    assert answer.status == status
    if status == 400:
        assert answer.error == "Model version not ready"
    else:
        assert answer.body == b""


def test_no_model_is_ready_without_a_broker(joined: Desk) -> None:
    joined.hear(BrokerLost("it ended"))
    assert joined.ask("GET", "/v2/models/double/ready").status == 400


ROUTES = [("GET", ""), ("POST", "/infer")]


@pytest.mark.parametrize(("method", "end"), ROUTES)
def test_unknown_model_is_404(joined: Desk, method: str, end: str) -> None:
    answer = joined.ask(method, "/v2/models/nope" + end, json.dumps(INFER).encode())
    assert (answer.status, answer.error) == (404, "Request for unknown model: 'nope' is not found")


@pytest.mark.parametrize(("method", "end"), ROUTES)
def test_unknown_version_is_404(joined: Desk, method: str, end: str) -> None:
    answer = joined.ask(method, "/v2/models/double/versions/9" + end, json.dumps(INFER).encode())
    assert (answer.status, answer.error) == (404, "Request for unknown model: 'double' version 9 is not found")


@pytest.mark.parametrize(("method", "end"), ROUTES)
def test_model_that_was_never_loaded_is_503(desk: Desk, method: str, end: str) -> None:
    desk.join(ModelState("double", "1", UNAVAILABLE, "InvalidProtobuf", None))
    answer = desk.ask(method, "/v2/models/double" + end, json.dumps(INFER).encode())
    assert (answer.status, answer.headers["Retry-After"]) == (503, "1")
    assert answer.error == "model 'double' is not ready (UNAVAILABLE): InvalidProtobuf"


@pytest.mark.parametrize(("method", "end"), ROUTES)
@pytest.mark.parametrize("join", [False, True])
def test_any_model_is_503_while_nobody_serves(desk: Desk, method: str, end: str, join: bool) -> None:
    if join:
        desk.join()
    answer = desk.ask(method, "/v2/models/double" + end, json.dumps(INFER).encode())
    assert (answer.status, answer.headers["Retry-After"]) == (503, "1")
    assert ("no worker has joined" if join else "no broker answers at /run/here yet") in answer.error


@pytest.mark.parametrize(
    ("method", "url", "allow"),
    [
        ("POST", "/v2", "GET, HEAD, OPTIONS"),
        ("POST", "/metrics", "GET, HEAD, OPTIONS"),
        ("PUT", "/v2/models/double", "GET, HEAD, OPTIONS"),
        ("POST", "/v2/models/double/ready", "GET, HEAD, OPTIONS"),
        ("GET", "/v2/models/double/infer", "OPTIONS, POST"),
        ("HEAD", "/v2/models/double/infer", "OPTIONS, POST"),
        ("GET", "/v2/models/double/versions/1/infer", "OPTIONS, POST"),
    ],
)
def test_wrong_method_is_405(joined: Desk, method: str, url: str, allow: str) -> None:
    answer = joined.ask(method, url)
    assert (answer.status, answer.headers["Allow"], answer.error) == (405, allow, "Method Not Allowed")


@pytest.mark.parametrize(
    ("url", "allow"),
    [
        ("/v2", "GET, HEAD, OPTIONS"),
        ("/v2/models/%C3%BC/infer", "OPTIONS, POST"),
        ("*", "GET, HEAD, OPTIONS, POST"),
    ],
)
def test_options_are_told_without_a_body(joined: Desk, url: str, allow: str) -> None:
    exchange = joined.begin("OPTIONS", url)
    assert exchange.status == 204
    assert exchange._response == f"HTTP/1.1 204 No Content\r\nAllow: {allow}\r\n\r\n".encode()
    assert joined.meter("penstock_http_responses", "204") == 1


def test_there_are_no_options_of_what_is_not_there(joined: Desk) -> None:
    answer = joined.ask("OPTIONS", "/v3")
    assert (answer.status, answer.error) == (404, "Not Found")


@pytest.mark.parametrize(
    "url", ["/", "/v2", "/v2/health/live", "/v2/health/ready", "/v2/models/double", "/v2/models/double/ready", "/v3"]
)
def test_head_has_the_headers_of_get_and_no_body(joined: Desk, serve: Callable[..., Serving], url: str) -> None:
    peer = serve(joined.application).connect()
    for method in ("GET", "HEAD"):
        peer.send(f"{method} {url} HTTP/1.1\r\nHost: a\r\n\r\n".encode())
    whole, bare = peer.response(), peer.response(body=False)
    assert (bare.status, bare.headers) == (whole.status, whole.headers)
    peer.send(b"GET /v2/health/live HTTP/1.0\r\n\r\n")
    assert peer.rest().startswith(b"HTTP/1.1 200 OK\r\n")


def test_head_of_what_goes_on_ends_at_once(joined: Desk, serve: Callable[..., Serving]) -> None:
    peer = serve(joined.application).connect()
    peer.send(b"HEAD /events HTTP/1.1\r\nHost: a\r\n\r\n", b"GET /v2/health/live HTTP/1.0\r\n\r\n")
    headers = peer.response(body=False).headers
    assert (headers["content-type"], headers["cache-control"]) == ("text/event-stream", "no-store")
    assert not {"content-length", "transfer-encoding"} & headers.keys()
    assert peer.rest().startswith(b"HTTP/1.1 200 OK\r\nConnection: close\r\n")


@pytest.mark.parametrize(
    "url", ["/favicon.ico", "/events/x", "/v1", "/v2/models", "/v2/models/double/versions", "/v2/models/double/stats"]
)
def test_unknown_path_is_404(joined: Desk, url: str) -> None:
    answer = joined.ask("GET", url)
    assert (answer.status, answer.error) == (404, "Not Found")
    assert "Allow" not in answer.headers


def test_path_that_is_no_text_is_400(joined: Desk) -> None:
    assert joined.ask("GET", "/v2/models/%FF").status == 400


# --- inference ---


def test_request_goes_to_the_broker_and_its_result_to_the_client(joined: Desk) -> None:
    exchange = joined.infer()
    assert waits(exchange)
    assert joined.flushes == 1
    message = joined.sent()
    [requests] = message.groups
    assert (requests.form.model, requests.form.version, requests.form.rows, requests.ids) == ("double", "~1", 1, (1,))
    assert requests.timeouts_us[0] == pytest.approx(30e6, rel=0.1)
    assert unpack_layout(requests.form.body).tensors == (Tensor("x", "FP32", (1, 2), 0, 8),)
    assert message.blob == X
    joined.double(1, X)
    answer = said(exchange)
    timing = answer.headers.pop("Server-Timing")
    assert answer == (200, {"Content-Type": "application/json", "Content-Length": str(len(DOUBLED))}, DOUBLED)
    assert re.fullmatch(r"queue;dur=0\.007, batch;dur=0\.010, model;dur=0\.005, total;dur=\d+\.\d{3}", timing)
    assert joined.caller.calls == {}


def test_answer_that_cannot_be_written_ends_its_request_alone(
    joined: Desk, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """What is wrong with one answer is no reason to end the process, as a defect of the core is."""

    def broken(*_: object) -> object:
        raise ZeroDivisionError("a defect")

    first, second = joined.infer(), joined.infer()
    joined.sent()
    with monkeypatch.context() as patch, caplog.at_level(logging.ERROR, "penstock.gateway"):
        patch.setattr("penstock.gateway.application.render", broken)
        joined.double(1, X)
    joined.double(2, X)
    assert (said(first).status, said(first).error) == (500, "an internal error; it is in the gateway's log")
    assert said(second).status == 200
    assert [record.message for record in caplog.records] == ["answer cannot be written"]


# --- what is asked of the scheduler ---


TERMS = {"Penstock_Priority": "2", "Penstock_Tenant": "blue", "Penstock_Timeout": "5"}


def test_headers_say_how_urgent_a_request_is_for_whom_and_what_time_it_has(joined: Desk) -> None:
    joined.infer(**TERMS)
    [group] = joined.sent().groups
    assert (group.form.priority, group.form.tenant) == (2, "blue")
    assert group.timeouts_us[0] == pytest.approx(5e6, rel=0.1)


@pytest.mark.parametrize(
    ("parameters", "headers", "priority", "timeout_s"),
    [
        ({"priority": 4}, {}, 4, 30),
        ({"priority": 4}, {"Penstock_Priority": "1"}, 1, 30),
        ({"priority": 4}, {"Penstock_Priority": "0"}, 4, 30),
        ({"timeout": 3_000_000}, {"Penstock_Timeout": "5"}, 0, 3),
        ({"timeout": 7_000_000}, {"Penstock_Timeout": "5"}, 0, 5),
        ({"timeout": 0}, {"Penstock_Timeout": "5"}, 0, 5),
        ({"timeout": 7_000_000}, {}, 0, 7),
        ({}, {"Penstock_Timeout": "3600"}, 0, 3600),
    ],
)
def test_headers_and_parameters_together(
    joined: Desk, parameters: dict[str, int], headers: dict[str, str], priority: int, timeout_s: float
) -> None:
    joined.infer(INFER | {"parameters": parameters}, **headers)
    [group] = joined.sent().groups
    assert group.form.priority == priority
    assert group.timeouts_us[0] == pytest.approx(timeout_s * 1e6, rel=0.1)


@pytest.mark.parametrize(
    ("header", "value"),
    [
        ("Penstock-Timeout", "-1"),
        ("Penstock-Timeout", "86401"),
        ("Penstock-Priority", "9"),
        ("Penstock-Tenant", "x" * 65),
        ("Penstock-Explain", "please"),
    ],
)
def test_header_that_asks_for_what_cannot_be_is_400_and_named(joined: Desk, header: str, value: str) -> None:
    for _ in range(2):  # the head is known the second time, and what it means is not
        answer = said(joined.infer(**{header.replace("-", "_"): value}))
        assert answer.status == 400
        assert answer.error.startswith(f"the header {header}")
    assert joined.caller.calls == {}


def test_invented_tenants_grow_nothing_without_a_limit(joined: Desk) -> None:
    for number in range(3000):
        joined.application.parse.parser.parse(spec(), json.dumps(INFER).encode(), None, 0, f"tenant {number}")
    assert len(joined.application.parse.parser._forms._known) <= 1024


def test_time_of_a_request_runs_since_its_head_has_come(joined: Desk) -> None:
    exchange = joined.exchange(joined.read("POST", INFER_URL, BODY, Penstock_Timeout="5"), -2.0)
    joined.application.handle(exchange)
    [group] = joined.sent().groups
    assert group.timeouts_us[0] == pytest.approx(3e6, rel=0.1)


@pytest.mark.parametrize("way", ["header", "parameter"])
def test_request_whose_time_was_up_when_it_had_come_is_504_and_goes_nowhere(joined: Desk, way: str) -> None:
    parameters = {"parameters": {"timeout": 100_000}} if way == "parameter" else {}
    headers = {"Penstock_Timeout": "0.1"} if way == "header" else {}
    exchange = joined.exchange(
        joined.read("POST", INFER_URL, json.dumps({"id": "7", **INFER, **parameters}).encode(), **headers), -0.2
    )
    joined.application.handle(exchange)
    answer = said(exchange)
    assert answer.status == 504
    assert re.fullmatch(
        r"time was up before the request was queued: 0\.\d{3} s after it began to come, and it has 0\.1 s", answer.error
    )
    assert joined.caller.calls == {}
    assert joined.meter("penstock_request_failures", "double", "", errors.DEADLINE) == 1


def test_request_that_names_no_time_has_all_of_it_when_it_has_come(joined: Desk) -> None:
    exchange = joined.exchange(joined.read("POST", INFER_URL, BODY), -60.0)
    joined.application.handle(exchange)
    [group] = joined.sent().groups
    assert group.timeouts_us[0] == pytest.approx(30e6, rel=0.1)


# --- where time went ---


EXPLAINED = ("why", "worker", "batch", "batch_rows", "batch_reason", "body_ms", "ahead_ms", "held_ms", "waited_ms",
             "batch_ms", "model_ms", "rest_ms", "total_ms")  # fmt: skip


@pytest.mark.parametrize("identifier", ["", "7"])
@pytest.mark.parametrize("binary", [False, True])
@pytest.mark.parametrize("header", [False, True])
@pytest.mark.parametrize("accept", ["", "gzip"])
def test_answer_explains_itself_to_who_asks(
    desk: Desk, identifier: str, binary: bool, header: bool, accept: str
) -> None:
    desk.join(ready())
    desk.hear(FromBroker(Workers(EPOCH, [WorkerAddress(b"worker 0", "ipc://results", 0, "gpu0")])))
    parameters = {"binary_data_output": binary, "explain": True} if not header else {"binary_data_output": binary}
    headers = {"Penstock_Explain": "1"} if header else {}
    if accept:
        headers["Accept_Encoding"] = accept
    exchange = desk.infer(INFER | {"id": identifier, "parameters": parameters}, **headers)
    desk.sent()
    desk.double(1, X)
    answer = said(exchange)
    body = gzip.decompress(answer.body) if answer.headers.get("Content-Encoding") == "gzip" else answer.body
    told = json.loads(body[: int(answer.headers.get("Inference-Header-Content-Length", len(body)))])
    assert list(told) == [*(["id"] if identifier else []), "model_name", "model_version", "parameters", "outputs"]
    assert tuple(told["parameters"]) == EXPLAINED
    assert (told["parameters"]["worker"], told["parameters"]["batch_reason"]) == ("gpu0", "idle")
    assert "Server-Timing" in answer.headers
    if binary:
        assert np.frombuffer(body[-8:], "<f4").tolist() == [2, 4]


def test_nobody_else_is_told(joined: Desk) -> None:
    exchange = joined.infer(INFER | {"parameters": {"explain": False}})
    joined.sent()
    joined.double(1, X)
    assert said(exchange).body == DOUBLED


def test_explain_is_true_or_false(joined: Desk) -> None:
    answer = said(joined.infer(INFER | {"parameters": {"explain": 1}}))
    assert (answer.status, answer.error) == (400, "parameter 'explain' is true or false")


def test_version_in_the_path_is_the_one_that_is_asked(desk: Desk) -> None:
    desk.join(ready(version="1"), ready(version="2"))
    for url, want in (("double", "~2"), ("double/versions/1", "1"), ("double/versions/2", "2")):
        desk.begin("POST", f"/v2/models/{url}/infer", json.dumps(INFER).encode())
        assert desk.sent().groups[0].form.version == want


def test_results_come_in_any_order(joined: Desk) -> None:
    first, second = joined.infer(INFER | {"id": "1"}), joined.infer(INFER | {"id": "2"})
    assert joined.sent().groups[0].ids == (1, 2)
    joined.double(2, X)
    assert (waits(first), json.loads(said(second).body)["id"]) == (True, "2")
    joined.double(1, X)
    assert json.loads(said(first).body)["id"] == "1"


@pytest.mark.parametrize("rows", [1, 4096, 20_000])
def test_binary_request_has_a_binary_answer_whatever_its_size(joined: Desk, rows: int) -> None:
    x = np.arange(rows * 2, dtype="<f4").tobytes()
    tensor = {"name": "x", "shape": [rows, 2], "datatype": "FP32", "parameters": {"binary_data_size": len(x)}}
    text = json.dumps({"inputs": [tensor], "parameters": {"binary_data_output": True}}).encode()
    for number in (1, 2):
        exchange = joined.begin(
            "POST", "/v2/models/double/infer", text + x, Inference_Header_Content_Length=str(len(text))
        )
        joined.sent()
        joined.double(number, x)
        answer = said(exchange)
        at = int(answer.headers["Inference-Header-Content-Length"])
        assert json.loads(answer.body[:at])["outputs"][0]["parameters"] == {"binary_data_size": len(x)}
        np.testing.assert_array_equal(np.frombuffer(answer.body[at:], "<f4"), np.arange(rows * 2) * 2)


@pytest.mark.parametrize(("value", "status"), [("x", 400), ("-1", 400), ("1.5", 400), ("9" * 13, 400), ("", 400)])
def test_header_length_that_is_no_number_is_400(joined: Desk, value: str, status: int) -> None:
    answer = said(joined.infer(Inference_Header_Content_Length=value))
    assert (answer.status, answer.error) == (status, "Inference-Header-Content-Length is not a number of bytes")


def test_white_space_behind_the_header_length_is_no_part_of_it(joined: Desk) -> None:
    assert waits(joined.infer(Inference_Header_Content_Length=f"{len(json.dumps(INFER))} "))


@pytest.mark.parametrize(
    ("body", "words"),
    [(b"", "the request is not JSON"), (b"{}", "no list 'inputs'"), (b"[]", "the request is not a JSON object")],
)
def test_bad_request_is_400_and_goes_nowhere(joined: Desk, body: bytes, words: str) -> None:
    answer = joined.ask("POST", "/v2/models/double/infer", body)
    assert (answer.status, words in answer.error) == (400, True)
    assert (joined.flushes, joined.caller.calls) == (0, {})


def test_text_that_cannot_be_answered_is_400(joined: Desk) -> None:
    body = json.dumps(INFER).replace("[1, 2]}", "[1, NaN]}")
    for identifier in ('"\\ud800"', '"\\udc00x"'):
        text = f'{{"id": {identifier}, {body[1:]}'
        assert joined.ask("POST", "/v2/models/double/infer", text.encode()).status == 400


@pytest.mark.parametrize(
    ("code", "status", "headers"),
    [
        (errors.BAD_INPUT, 400, {}),
        (errors.NOT_FOUND, 404, {}),
        (errors.TOO_LARGE, 413, {}),
        (errors.UNSUPPORTED, 501, {"Accept-Encoding": "gzip, deflate, zstd"}),
        (errors.OVERLOADED, 503, {"Retry-After": "3"}),
        (errors.DRAINING, 503, {"Retry-After": "3"}),
        (errors.UNAVAILABLE, 503, {"Retry-After": "3"}),
        (errors.LOST, 503, {"Retry-After": "3"}),
        (errors.DEADLINE, 504, {}),
        (errors.CANCELLED, 499, {}),
        (errors.MODEL_FAILED, 500, {}),
        (errors.POISONED, 500, {}),
        (errors.INTERNAL, 500, {}),
    ],
)
@pytest.mark.parametrize("worker", [False, True])
def test_every_failure_has_its_status(
    joined: Desk, code: str, status: int, headers: dict[str, str], worker: bool
) -> None:
    exchange = joined.infer(INFER | {"id": "a1"})
    joined.sent()
    if worker:
        failure = pack_failure(Failure(code, "because", 2500))
        joined.deliver(1, Outcome("", "", ()), b"", failure, FAILED)
    else:
        joined.hear(FromBroker(Refusals(EPOCH, [Refusal(1, code, "because", 2500)])))
    answer = said(exchange)
    assert (answer.status, answer.error) == (status, "[request id: a1] because")
    known = {"Content-Type": "application/json", "Content-Length": str(len(answer.body))}
    assert re.fullmatch(r"total;dur=\d+\.\d{3}", answer.headers.pop("Server-Timing"))
    assert answer.headers == known | headers
    refusals = joined.caller.meters.histogram("penstock_http_refusal_seconds")
    assert sum(refusals.counts) == (status in (503, 504))


def test_every_code_has_a_status() -> None:
    assert set(STATUSES) == errors.CODES


def test_failure_of_a_request_without_an_id_has_no_prefix(joined: Desk) -> None:
    exchange = joined.infer()
    joined.sent()
    joined.hear(FromBroker(Refusals(EPOCH, [Refusal(1, errors.OVERLOADED, "full", 0)])))
    answer = said(exchange)
    assert (answer.error, answer.headers["Retry-After"]) == ("full", "1")


def test_request_whose_time_is_up_is_504(joined: Desk) -> None:
    exchange = joined.infer(INFER | {"parameters": {"timeout": 5_000_000}})
    assert joined.sent().groups[0].timeouts_us[0] == pytest.approx(5e6, rel=0.1)
    joined.hear(Tick(), later_s=4)
    assert waits(exchange)
    joined.hear(FromBroker(Welcome(EPOCH, "gateway")), later_s=6)
    joined.hear(Tick(), later_s=6)
    answer = said(exchange)
    assert (answer.status, answer.error) == (504, "no result for model 'double' within 5 s")


def test_request_of_a_broker_that_has_gone_is_answered_by_the_next(joined: Desk) -> None:
    exchange = joined.infer()
    before = joined.sent()
    joined.hear(BrokerLost("the broker's process ended"))
    assert waits(exchange)
    joined.hear(FromBroker(Welcome(EPOCH + 1, "gateway")))
    again = joined.sent()
    assert (again.groups[0].form, again.groups[0].ids) == (before.groups[0].form, before.groups[0].ids)
    assert again.blob == before.blob
    joined.double(1, again.blob)
    assert said(exchange).status == 200


def test_request_of_a_broker_that_has_gone_is_503_when_no_other_comes_in_its_time(joined: Desk) -> None:
    exchange = joined.infer(INFER | {"id": "7", "parameters": {"timeout": 5_000_000}})
    joined.sent()
    joined.hear(BrokerLost("the broker's process ended"))
    joined.hear(Tick(), later_s=4)
    assert waits(exchange)
    joined.hear(Tick(), later_s=6)
    answer = said(exchange)
    assert (answer.status, answer.headers["Retry-After"]) == (503, "1")
    assert "no other answered within the request's 5 s" in answer.error


def test_too_many_requests_under_way_are_503(joined: Desk) -> None:
    waiting = [joined.infer() for _ in range(4)]
    answer = said(joined.infer())
    assert (answer.status, answer.error) == (503, "4 requests of this process are under way")
    assert all(map(waits, waiting))
    assert sum(joined.caller.meters.histogram("penstock_http_refusal_seconds").counts) == 1


def test_client_that_leaves_has_its_request_cancelled(joined: Desk) -> None:
    exchange = joined.infer()
    joined.sent()
    assert exchange.gone is not None
    exchange.gone()
    assert joined.flushes == 2
    assert list(joined.sent().cancels) == [1]
    assert joined.caller.calls == {}
    joined.double(1, X)
    assert waits(exchange)


@pytest.mark.parametrize(
    ("outcome", "payload", "words"),
    [
        (Outcome("double", "1", (Tensor("y", "FP32", (1, 2), 0, 8),)), b"abcd", "an output lies from 0 to 8"),
        (Outcome("double", "1", (Tensor("y", "FP32", (3, 2), 0, 8),)), b"abcdefgh", "takes 24 bytes, and 8 came"),
        (Outcome("double", "1", (Tensor("y", "BYTES", (1,), 0, 5),)), b"\1\0\0\0\xff", "ask for it as binary"),
    ],
)
def test_result_that_cannot_be_told_is_an_error(joined: Desk, outcome: Outcome, payload: bytes, words: str) -> None:
    exchange = joined.infer(INFER | {"id": "7"})
    joined.sent()
    joined.deliver(1, outcome, payload)
    assert said(exchange).error.startswith("[request id: 7] ")
    assert words in said(exchange).error
    assert said(exchange).status in (400, 500)


def test_result_that_is_no_outcome_is_500(joined: Desk) -> None:
    exchange = joined.infer()
    joined.sent()
    joined.deliver(1, Outcome("", "", ()), b"", b"nonsense")
    assert said(exchange).status == 500


# --- compression ---


def test_what_a_request_expands_to_is_charged(loop: Loop) -> None:
    desk = Desk(loop, bodies_bytes_max=200).join(ready())
    body = json.dumps(INFER).encode() + b" " * 500
    exchange = desk.begin("POST", "/v2/models/double/infer", gzip.compress(body), Content_Encoding="gzip")
    assert exchange.status == 503


def test_compressed_request_is_expanded(joined: Desk) -> None:
    for encoding, squeeze in (("gzip", gzip.compress), ("deflate", zlib.compress), ("GZIP ", gzip.compress)):
        body = cast(Callable[[bytes], bytes], squeeze)(json.dumps(INFER).encode())
        assert waits(joined.begin("POST", "/v2/models/double/infer", body, Content_Encoding=encoding))
        assert joined.sent().blob == X


def test_identity_is_no_encoding(joined: Desk) -> None:
    assert waits(joined.infer(Content_Encoding="identity"))


def test_unknown_encoding_is_501_and_told_the_known_ones(joined: Desk) -> None:
    answer = said(joined.infer(Content_Encoding="br"))
    assert (answer.status, answer.headers["Accept-Encoding"]) == (501, "gzip, deflate, zstd")
    assert answer.error == "Content-Encoding 'br' is not known; gzip, deflate and zstd are"


def test_body_that_expands_beyond_the_limit_is_413(loop: Loop) -> None:
    desk = Desk(loop, body_bytes_max=1000).join(ready())
    answer = desk.ask("POST", "/v2/models/double/infer", gzip.compress(b" " * 1001), Content_Encoding="gzip")
    assert answer.status == 413


def large_request(rows: int) -> tuple[bytes, bytes]:
    """A body of which even the compressed form is large, and its tensor."""
    x = np.random.default_rng(0).random((rows, 2), dtype="<f4").tobytes()
    tensor = {"name": "x", "shape": [rows, 2], "datatype": "FP32", "parameters": {"binary_data_size": len(x)}}
    return json.dumps({"inputs": [tensor]}).encode(), x


def squeezed(desk: Desk, rows: int) -> Exchange:
    text, x = large_request(rows)
    length, body = str(len(text)), gzip.compress(text + x, 1)
    return desk.begin(
        "POST", "/v2/models/double/infer", body, Content_Encoding="gzip", Inference_Header_Content_Length=length
    )


def test_large_compressed_request_is_expanded_aside(joined: Desk) -> None:
    exchange = squeezed(joined, 40_000)
    assert joined.caller.calls == {}, "not at once"
    joined.loop.until(lambda: joined.caller.calls)
    assert waits(exchange)
    assert bytes(joined.sent().frames[0]) == large_request(40_000)[1]


def test_large_damaged_request_is_400(joined: Desk) -> None:
    text, x = large_request(40_000)
    body = gzip.compress(text + x, 1)[:-1]
    exchange = joined.begin("POST", "/v2/models/double/infer", body, Content_Encoding="gzip")
    joined.loop.until(lambda: not waits(exchange))
    assert (said(exchange).status, said(exchange).error) == (400, "the body is not valid gzip data")


def test_client_that_leaves_while_its_request_is_expanded_is_forgotten(joined: Desk) -> None:
    exchange, other = squeezed(joined, 40_000), squeezed(joined, 40_000)
    leave(exchange)
    joined.loop.until(lambda: joined.caller.calls)
    joined.loop.run(joined.loop.loop.shutdown_default_executor())
    joined.loop.settle()
    assert (len(joined.caller.calls), joined.flushes) == (1, 1)
    assert waits(other)


def leave(exchange: Exchange) -> None:
    """As its connection does when it ends."""
    exchange._connection = None
    assert exchange.gone is not None
    exchange.gone()


def test_what_only_expands_to_much_is_expanded_aside(joined: Desk) -> None:
    """Small as it comes, and more than is done at once."""
    rows = 40_000
    tensor = {"name": "x", "shape": [rows, 2], "datatype": "FP32", "parameters": {"binary_data_size": rows * 8}}
    text = json.dumps({"inputs": [tensor]}).encode()
    body, length = gzip.compress(text + bytes(rows * 8)), str(len(text))
    assert len(body) < 10_000
    exchange = joined.begin(
        "POST", "/v2/models/double/infer", body, Content_Encoding="gzip", Inference_Header_Content_Length=length
    )
    assert joined.caller.calls == {}, "not at once"
    joined.loop.until(lambda: joined.caller.calls)
    assert waits(exchange)
    assert bytes(joined.sent().frames[0]) == bytes(rows * 8)


def test_many_large_bodies_are_expanded_two_at_a_time_while_others_are_answered(
    joined: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, running, most = threading.Event(), 0, 0
    lock = threading.Lock()

    def slow(*arguments: Any) -> memoryview:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        assert gate.wait(DEADLINE_S)
        with lock:
            running -= 1
        return decompress(*arguments)

    monkeypatch.setattr(application, "decompress", slow)
    large = [squeezed(joined, 40_000) for _ in range(4)]
    bodies = [weakref.ref(exchange.body) for exchange in large]
    joined.loop.until(lambda: running == 2)
    assert joined.ask("GET", "/v2").status == 200
    small = gzip.compress(json.dumps(INFER).encode())
    joined.begin("POST", "/v2/models/double/infer", small, Content_Encoding="gzip")
    assert len(joined.caller.calls) == 1, "a small one waits for nobody"
    for exchange in large[2:]:
        leave(exchange)
        joined.budget.release(exchange)
    assert [body() is None for body in bodies] == [False, False, True, True], "who leaves the line leaves nothing there"
    gate.set()
    joined.loop.until(lambda: len(joined.caller.calls) == 3)
    assert most == 2
    assert all(waits(exchange) for exchange in large[:2])


@pytest.mark.parametrize("rows", [100, 40_000])
@pytest.mark.parametrize(("accept", "expand"), [("gzip", gzip.decompress), ("deflate", zlib.decompress)])
@pytest.mark.parametrize("binary", [False, True])
def test_answer_is_compressed_for_who_asks(
    joined: Desk, rows: int, accept: str, expand: Callable[[bytes], bytes], binary: bool
) -> None:
    x = np.zeros((rows, 2), "<f4").tobytes()
    tensor = {"name": "x", "shape": [rows, 2], "datatype": "FP32", "parameters": {"binary_data_size": len(x)}}
    text = json.dumps({"id": "7", "inputs": [tensor], "parameters": {"binary_data_output": binary}}).encode()
    exchange = joined.begin(
        "POST",
        "/v2/models/double/infer",
        text + x,
        Accept_Encoding=f"{accept}, br",
        Inference_Header_Content_Length=str(len(text)),
    )
    joined.sent()
    joined.double(1, x)
    joined.loop.until(lambda: not waits(exchange))
    answer = said(exchange)
    assert (answer.headers["Content-Encoding"], answer.headers["Vary"]) == (accept, "Accept-Encoding")
    body = expand(answer.body)
    at = int(answer.headers.get("Inference-Header-Content-Length", len(body)))
    told = json.loads(body[:at])
    assert told["id"] == "7"
    if binary:
        assert answer.headers["Content-Type"] == "application/octet-stream"
        assert (at < len(body), body[at:]) == (True, x)
    else:
        assert answer.headers["Content-Type"] == "application/json"
        assert told["outputs"][0]["data"] == [0] * rows * 2


def test_small_answer_is_not_compressed(joined: Desk) -> None:
    exchange = joined.infer(Accept_Encoding="gzip")
    joined.sent()
    joined.double(1, X)
    assert said(exchange).body == DOUBLED
    assert "Content-Encoding" not in said(exchange).headers


# --- metrics and the log ---


def test_metrics_are_the_whole_servers(joined: Desk) -> None:
    exchange = joined.begin("GET", "/metrics")
    assert waits(exchange)
    snapshot = Snapshot("broker", (Sample("penstock_workers", (), 2.0),))
    joined.reports.arrived(Metrics(EPOCH, joined.serials[0], (snapshot,)))
    answer = said(exchange)
    assert answer.headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
    assert b"\npenstock_workers 2.0\n" in answer.body


def test_metrics_name_the_requests_that_they_count(joined: Desk) -> None:
    joined.infer()
    joined.infer(INFER | {"id": "mine"})
    joined.sent()
    joined.double(1, X)
    joined.application.seconds.sample("", ())
    joined.double(2, X)
    told = {each.request for each in joined.application.seconds.exemplars.values()}
    number = joined.caller.identity.id.hex() + ":1"
    assert "mine" in told <= {"mine", number}
    exchange = joined.begin("GET", "/metrics", Accept="application/openmetrics-text; version=1.0.0")
    own = Snapshot("gateway-0", joined.caller.meters.samples())
    joined.reports.arrived(Metrics(EPOCH, joined.serials[0], (own,)))
    answer = said(exchange)
    assert answer.headers["Content-Type"] == "application/openmetrics-text; version=1.0.0; charset=utf-8"
    assert b'# {request_id="mine"}' in answer.body
    assert answer.body.endswith(b"# EOF\n")


def test_metrics_without_a_broker_are_the_own(desk: Desk) -> None:
    assert b"penstock_broker_up 0.0" in desk.ask("GET", "/metrics").body


def test_responses_are_counted_by_status(joined: Desk) -> None:
    joined.ask("GET", "/v2")
    joined.ask("GET", "/v2/health/live")
    joined.ask("GET", "/nope")
    joined.ask("POST", "/v2")
    joined.application.refused(408, "late", {})
    exchange = joined.infer()
    joined.sent()
    joined.double(1, X)
    assert said(exchange).status == 200
    counted = {status: joined.meter("penstock_http_responses", status) for status in ("200", "404", "405", "408")}
    assert counted == {"200": 3, "404": 1, "405": 1, "408": 1}
    assert sum(joined.caller.meters.histogram("penstock_http_request_seconds").counts) == 1


def test_failures_are_counted_under_names_that_the_server_knows(joined: Desk) -> None:
    joined.ask("POST", "/v2/models/double/infer", b"{")
    joined.ask("POST", "/v2/models/double/versions/1/infer", b"{")
    joined.ask("POST", "/v2/models/double/versions/9/infer", b"{")
    joined.ask("POST", "/v2/models/made-up/infer", b"{")
    failures = "penstock_request_failures"
    assert joined.meter(failures, "double", "", errors.BAD_INPUT) == 1
    assert joined.meter(failures, "double", "1", errors.BAD_INPUT) == 1
    assert joined.meter(failures, "double", "", errors.NOT_FOUND) == 1
    assert joined.meter(failures, "", "", errors.NOT_FOUND) == 1


def test_defect_in_a_handler_is_500_and_in_the_log(joined: Desk, caplog: pytest.LogCaptureFixture) -> None:
    def broken(exchange: Exchange, target: object) -> None:
        raise ZeroDivisionError("a defect")

    head = Head(b"GET", b"/v2", {}, 0, True, False)
    exchange = joined.exchange(Exchange(head, b"", 0))
    head.target = type("Target", (), {"handler": staticmethod(broken)})()
    with caplog.at_level(logging.ERROR, "penstock.gateway"):
        joined.application.handle(exchange)
    assert (said(exchange).status, said(exchange).error) == (500, "an internal error; it is in the gateway's log")
    [record] = caplog.records
    assert record.message == "request handler failed"
    assert record.exc_info is not None
    assert record.exc_info[0] is ZeroDivisionError


def test_defect_behind_work_on_a_thread_is_500_and_in_the_log(
    joined: Desk, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(name: str, version: str = "") -> ModelSpec:
        raise ZeroDivisionError("a defect")

    text, x = large_request(40_000)
    monkeypatch.setattr(joined.caller, "find", broken)
    body = gzip.compress(text + x, 1)
    with caplog.at_level(logging.ERROR, "penstock.gateway"):
        exchange = joined.begin("POST", "/v2/models/double/infer", body, Content_Encoding="gzip")
        joined.loop.until(lambda: not waits(exchange))
    assert said(exchange).status == 500
    assert [record.message for record in caplog.records] == ["request handler failed"]


def test_failure_is_logged_with_its_request(joined: Desk, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "penstock.gateway"):
        joined.ask("GET", "/v2/models/nope")
    [record] = caplog.records
    assert record.levelno == logging.INFO
    said_fields = record.__dict__["fields"]
    assert (said_fields["url"], said_fields["status"], said_fields["code"]) == ("/v2/models/nope", 404, "not_found")


def test_lines_that_would_be_held_back_are_not_made(
    joined: Desk, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, str, int, object]] = []

    def holds_back(*kind: Any) -> bool:
        asked.append(kind)
        return len(asked) > 1

    monkeypatch.setattr(process, "holds_back", holds_back)
    with caplog.at_level(logging.INFO, "penstock.gateway"):
        answers = [joined.ask("GET", "/v2/models/nope") for _ in range(3)]
    assert [answer.status for answer in answers] == [404] * 3
    assert len(caplog.records) == 1
    assert asked == [("penstock.gateway", "request failed", logging.INFO, "not_found")] * 3
    assert joined.meter("penstock_http_responses", "404") == 3


# --- shared memory ---


@pytest.fixture
def slots() -> Iterator[Slots]:
    slots = Slots(Arena(4 << 20, "test"))
    yield slots
    slots.close()


def binary(desk: Desk, rows: int) -> Exchange:
    text, x = large_request(rows)
    return desk.begin("POST", "/v2/models/double/infer", text + x, Inference_Header_Content_Length=str(len(text)))


def as_json(desk: Desk, rows: int) -> Exchange:
    values = np.frombuffer(large_request(rows)[1], "<f4").tolist()
    return desk.infer({"inputs": [{"name": "x", "shape": [rows, 2], "datatype": "FP32", "data": values}]})


@pytest.mark.parametrize("rows", [3000, 40_000])
def test_large_binary_tensor_stays_where_it_was_received(loop: Loop, slots: Slots, rows: int) -> None:
    desk = Desk(loop, slots).join(ready())
    binary(desk, rows)
    x = large_request(rows)[1]
    sent = desk.sent()
    [group] = sent.groups
    [place] = group.places
    assert (place % 64, list(sent.frames)) == (0, [])
    assert bytes(slots.arena.view(place, len(x))) == x
    assert slots.arena.allocator.slots == 1


@pytest.mark.parametrize("send", [as_json, squeezed])
def test_large_tensor_that_must_be_unpacked_is_put_where_workers_read(
    loop: Loop, slots: Slots, send: Callable[[Desk, int], Exchange]
) -> None:
    desk = Desk(loop, slots).join(ready())
    exchange = send(desk, 40_000)
    loop.until(lambda: desk.caller.calls)
    x = large_request(40_000)[1]
    [group] = desk.sent().groups
    [place] = group.places
    assert bytes(slots.arena.view(place, len(x))) == x
    assert slots.arena.allocator.slots == 1
    assert bytes(exchange.body) == b"", "the body has gone"
    desk.budget.release(exchange)
    assert slots.arena.allocator.used == 0


def test_tensors_of_which_some_are_json_are_put_together(loop: Loop, slots: Slots) -> None:
    two = spec()._replace(inputs=(TensorSpec("x", "FP32", (-1, 2)), TensorSpec("z", "FP32", (-1, 2))))
    desk = Desk(loop, slots).join(ModelState("double", "1", READY, "", two))
    text, x = large_request(40_000)
    inputs = json.loads(text)["inputs"]
    text = json.dumps(
        {"inputs": [*inputs, {**inputs[0], "name": "z", "parameters": {}, "data": [1] * 80_000}]}
    ).encode()
    exchange = desk.begin("POST", "/v2/models/double/infer", text + x, Inference_Header_Content_Length=str(len(text)))
    [group] = desk.sent().groups
    [place] = group.places
    assert bytes(slots.arena.view(place, 2 * len(x))) == x + np.ones(80_000, "<f4").tobytes()
    assert slots.arena.allocator.slots == 1, "where the body was received is free again"
    desk.budget.release(exchange)
    assert slots.arena.allocator.used == 0


def test_without_a_broker_that_shares_a_tensor_travels(loop: Loop, slots: Slots) -> None:
    desk = Desk(loop, slots).join(ready())
    desk.hear(FromBroker(Welcome(EPOCH, "gateway", False)))
    whole = slots.take(slots.arena.size)
    for send in (binary, as_json, squeezed):
        send(desk, 40_000)
        loop.until(lambda: desk.caller.wants_flush(0))
        sent = desk.sent()
        assert (sent.groups[0].places, bytes(sent.frames[0])) == ((), large_request(40_000)[1])
    assert whole is not None


def test_broker_that_no_longer_shares_is_sent_what_lies_there(loop: Loop, slots: Slots) -> None:
    desk = Desk(loop, slots).join(ready())
    binary(desk, 40_000)
    desk.hear(FromBroker(Welcome(EPOCH, "gateway", False)))
    sent = desk.sent()
    assert (sent.groups[0].places, bytes(sent.frames[0])) == ((), large_request(40_000)[1])


@pytest.mark.parametrize("send", [as_json, squeezed])
def test_without_room_a_tensor_waits(loop: Loop, slots: Slots, send: Callable[[Desk, int], Exchange]) -> None:
    desk = Desk(loop, slots, arena_wait_s=60).join(ready())
    whole = slots.take(slots.arena.size)
    assert whole is not None
    exchange = send(desk, 40_000)
    loop.until(lambda: slots.waiting)
    assert (desk.caller.calls, waits(exchange)) == ({}, True)
    small = desk.infer()
    assert len(desk.caller.calls) == 1, "what is small waits for nobody"
    assert waits(small)
    desk.sent()
    flushes = desk.flushes
    whole.give_back()
    assert len(desk.caller.calls) == 1, "not inside whatever gives room back"
    loop.until(lambda: len(desk.caller.calls) == 2)
    assert desk.flushes == flushes + 1
    x = large_request(40_000)[1]
    [group] = desk.sent().groups
    assert bytes(slots.arena.view(group.places[0], len(x))) == x
    desk.double(2, x)
    assert said(exchange).status == 200
    desk.budget.release(exchange)
    assert slots.arena.allocator.used == 0


@pytest.mark.parametrize("send", [as_json, squeezed])
def test_tensor_that_has_waited_in_vain_is_503(loop: Loop, slots: Slots, send: Callable[[Desk, int], Exchange]) -> None:
    desk = Desk(loop, slots, arena_wait_s=0.02).join(ready())
    whole = slots.take(slots.arena.size)
    assert whole is not None
    exchange = send(desk, 40_000)
    loop.until(lambda: not waits(exchange))
    answer = said(exchange)
    assert (answer.status, answer.headers["Retry-After"]) == (503, "1")
    assert answer.error == (
        "320000 bytes of this gateway's 4194304 bytes of shared memory did not come free within 0.02 s (arena_wait_s); "
        "try again shortly, or raise arena_bytes ([gateway] in the configuration)"
    )
    assert desk.meter("penstock_request_failures", "double", "", "overloaded") == 1
    whole.give_back()
    assert (slots.waiting, slots.arena.allocator.used, desk.caller.calls) == (0, 0, {})


def test_client_that_leaves_does_not_wait_for_room(loop: Loop, slots: Slots) -> None:
    desk = Desk(loop, slots, arena_wait_s=60).join(ready())
    whole = slots.take(slots.arena.size)
    assert whole is not None
    first, second = as_json(desk, 40_000), as_json(desk, 40_000)
    for exchange in (first, second):
        desk.budget.release(exchange)  # as a connection does when it ends
        exchange._connection = None
        assert exchange.gone is not None
        if exchange is second:
            whole.give_back()  # it has its slot, and has not been told
            assert slots.arena.allocator.slots == 1
        exchange.gone()
    assert (slots.waiting, slots.arena.allocator.used) == (0, 0)
    loop.settle()
    assert desk.caller.calls == {}


def test_tensor_that_waited_and_cannot_be_submitted_is_an_error(loop: Loop, slots: Slots) -> None:
    desk = Desk(loop, slots, arena_wait_s=60).join(ready())
    whole = slots.take(slots.arena.size)
    assert whole is not None
    exchange = as_json(desk, 40_000)
    for _ in range(4):
        desk.infer()
    whole.give_back()
    loop.until(lambda: not waits(exchange))
    assert (said(exchange).status, said(exchange).error) == (503, "4 requests of this process are under way")
    assert desk.meter("penstock_request_failures", "double", "", "overloaded") == 1
    desk.budget.release(exchange)
    assert slots.arena.allocator.used == 0


def test_time_that_a_tensor_waits_is_the_requests_own(loop: Loop, slots: Slots) -> None:
    desk = Desk(loop, slots, arena_wait_s=60, request_timeout_s=0.005).join(ready())
    whole = slots.take(slots.arena.size)
    assert whole is not None
    exchange = as_json(desk, 40_000)
    late = time.monotonic() + 0.005
    loop.until(lambda: time.monotonic() > late)
    whole.give_back()
    loop.until(lambda: not waits(exchange))
    assert (said(exchange).status, desk.caller.calls) == (504, {})
    assert "time was up before the request was queued" in said(exchange).error
    desk.budget.release(exchange)
    assert slots.arena.allocator.used == 0


@pytest.mark.parametrize("send", [as_json, squeezed])
@pytest.mark.parametrize("rows", [32_768, 32_769])
def test_tensor_that_is_larger_than_the_arena_is_413(
    loop: Loop, send: Callable[[Desk, int], Exchange], rows: int
) -> None:
    slots = Slots(Arena(1 << 18, "test"))
    desk = Desk(loop, slots).join(ready())
    exchange = send(desk, rows)
    loop.until(lambda: desk.caller.calls or not waits(exchange))
    assert len(desk.caller.calls) == (rows == 32_768)
    if rows > 32_768:
        assert (said(exchange).status, said(exchange).error) == (
            413,
            "the request takes 262152 bytes of shared memory, and this gateway has 262144; send fewer rows at a time, "
            "or raise arena_bytes ([gateway] in the configuration)",
        )
        assert desk.meter("penstock_request_failures", "double", "", "too_large") == 1
    slots.close()


# --- what comes again ---


def binary_request(*values: float, rows: int = 1, identifier: str = "", **parameters: Any) -> tuple[bytes, int]:
    """A body, and how much of it is JSON."""
    x = np.array([values], "<f4").repeat(rows, 0)
    given = {"name": "x", "shape": list(x.shape), "datatype": "FP32", "parameters": {"binary_data_size": x.nbytes}}
    request = {"inputs": [given], "parameters": {"binary_data_output": True, **parameters}}
    text = json.dumps({"id": identifier, **request} if identifier else request).encode()
    return text + x.tobytes(), len(text)


def again(desk: Desk, *values: float, rows: int = 1, headers: dict[str, str] | None = None, **more: Any) -> Exchange:
    """A request that differs from the last only in its tensor."""
    body, lead = binary_request(*values, rows=rows, **more)
    return desk.begin("POST", INFER_URL, body, Inference_Header_Content_Length=str(lead), **(headers or {}))


def answers(desk: Desk, *exchanges: Exchange) -> list[list[float]]:
    """What the worker makes of what has been asked."""
    sent = desk.sent()
    inline = 0
    for group in sent.groups:
        nbytes = group.form.nbytes
        for at, number in enumerate(group.ids):
            if group.places:
                assert desk.slots is not None
                x = bytes(desk.slots.arena.view(group.places[at], nbytes))
            else:
                x = sent.blob[inline : inline + nbytes]
                inline += nbytes
            desk.double(number, x)
    for exchange in exchanges:
        desk.budget.release(exchange)
    said_all = [said(exchange) for exchange in exchanges]
    assert [each.status for each in said_all] == [200] * len(exchanges)
    return [np.frombuffer(each.body[-8:], "<f4").tolist() for each in said_all]


@pytest.mark.parametrize("rows", [1, 2048])
@pytest.mark.parametrize("shares", [True, False])
def test_json_that_comes_again_is_not_read_again(loop: Loop, slots: Slots, rows: int, shares: bool) -> None:
    desk = Desk(loop, slots).join(ready())
    desk.hear(FromBroker(Welcome(EPOCH, "gateway", shares)))
    asked = [again(desk, number, -number, rows=rows) for number in range(4)]
    assert [exchange.known is not None for exchange in asked] == [False, True, True, True]
    assert slots.arena.allocator.slots == (4 if shares and rows > 1 else 0)
    assert answers(desk, *asked) == [[2.0 * number, -2.0 * number] for number in range(4)]
    assert (slots.arena.allocator.slots, desk.budget.used) == (0, 0)


@pytest.mark.parametrize("rows", [1, 2048])
def test_json_that_comes_again_for_another_model_is_read_again(loop: Loop, slots: Slots, rows: int) -> None:
    desk = Desk(loop, slots).join(ready())
    first = again(desk, 1, 2, rows=rows), again(desk, 3, 4, rows=rows)
    desk.hear(FromBroker(Models(EPOCH, [ready(), ready("other")])))
    then = again(desk, 5, 6, rows=rows), again(desk, 7, 8, rows=rows)
    assert [exchange.known is not None for exchange in (*first, *then)] == [False, True, False, True]
    assert answers(desk, *first, *then) == [[2, 4], [6, 8], [10, 12], [14, 16]]
    wider = spec()._replace(inputs=(TensorSpec("x", "FP32", (-1, 3)),))
    desk.hear(FromBroker(Models(EPOCH, [ModelState("double", "1", READY, "", wider)])))
    refused = again(desk, 1, 2, rows=rows)
    assert (said(refused).status, "shape" in said(refused).error) == (400, True)
    desk.hear(FromBroker(Models(EPOCH, [ready("other")])))
    gone = again(desk, 1, 2, rows=rows)
    assert said(gone).error == "Request for unknown model: 'double' is not found"
    for exchange in (refused, gone):
        desk.budget.release(exchange)
    assert (slots.arena.allocator.slots, desk.budget.used) == (0, 0)


def test_a_model_goes_while_a_request_waits_for_its_turn(joined: Desk) -> None:
    """Its connection has read it, and not begun it."""
    done = again(joined, 1, 2), again(joined, 3, 4)
    assert answers(joined, *done) == [[2, 4], [6, 8]]
    body, lead = binary_request(5, 6)
    request = joined.read("POST", INFER_URL, body, Inference_Header_Content_Length=str(lead))
    assert request.known is not None
    joined.hear(FromBroker(Models(EPOCH, [ready("other")])))
    late = joined.exchange(request)
    joined.application.handle(late)
    assert said(late).status == 404


@pytest.mark.parametrize(
    ("extra", "headers"),
    [
        ({"timeout": 10**7}, {}),
        ({"priority": 3}, {}),
        ({}, {"Penstock_Tenant": "a"}),
        ({}, {"Penstock_Timeout": "9"}),
        ({}, {"Accept_Encoding": "gzip"}),
        ({"penstock_explain": True}, {}),
    ],
)
def test_terms_come_again_too(joined: Desk, extra: dict[str, Any], headers: dict[str, str]) -> None:
    first, second = again(joined, 1, 2, headers=headers, **extra), again(joined, 1, 2, headers=headers, **extra)
    assert second.known is not None
    one, other = joined.caller.calls.values()
    assert (one.form, one.timeout_s) == (other.form, other.timeout_s)
    [group] = joined.sent().groups
    for number in group.ids:
        joined.double(number, X)
    assert said(first).headers.keys() == said(second).headers.keys()


@pytest.mark.parametrize(
    ("extra", "headers"),
    [
        ({"sequence_id": 9, "sequence_start": True}, {}),
        ({"identifier": "mine"}, {}),
        ({}, {"Content_Encoding": "gzip"}),
    ],
)
def test_what_may_mean_something_else_is_read_each_time(
    joined: Desk, extra: dict[str, Any], headers: dict[str, str]
) -> None:
    for _ in range(3):
        assert again(joined, 1, 2, headers=headers, **extra).known is None


def test_json_behind_a_head_that_is_not_remembered_is_not_kept(joined: Desk) -> None:
    exchange = again(joined, 1, 2, headers={"Connection": "close"})
    assert (exchange.head.key, exchange.head.known) == (b"", None)


def test_traffic_that_goes_to_several_versions_is_divided_each_time(desk: Desk) -> None:
    desk.hear(FromBroker(Welcome(EPOCH, "gateway", False)))
    route = Route("double", ("1", "2"), (), (("1", 50), ("2", 50)))
    desk.hear(FromBroker(Models(EPOCH, [ready(), ready(version="2")], [route])))
    for number in range(4):
        assert again(desk, number, number).known is None
    assert sorted(call.form.version for call in desk.caller.calls.values()) == ["~1", "~1", "~2", "~2"]


def test_too_many_of_what_comes_again_is_503(joined: Desk) -> None:
    for number in range(4):
        again(joined, number, number)
    fifth = again(joined, 5, 5)
    assert fifth.known is not None
    assert (said(fifth).status, said(fifth).error) == (503, "4 requests of this process are under way")
    assert joined.meter("penstock_request_failures", "double", "", "overloaded") == 1


# --- answers of one batch ---


def publish_batch(desk: Desk, sizes: Sequence[int], number: int, queue_us: Sequence[int] = (7, 7, 7)) -> None:
    """One batch with the answers to requests 1, 2, 3, ... in groups of these sizes; each is its number."""
    body = pack_outcome(Outcome("double", "1", (Tensor("y", "FP32", (1, 2), 0, 8),)))
    ids = iter(range(1, number + 1))
    groups = [
        Answers(COMPLETE, 8, body, us, tuple(next(ids) for _ in range(size)))
        for us, size in zip(queue_us, sizes, strict=False)
    ]
    blob = b"".join(np.array([at, -at], "<f4").tobytes() for at in range(1, number + 1))
    back = unpack(pack(Results(EPOCH, groups, b"worker 0", Batch(1, 4, "idle", 10, 5), blob=blob)), [], ON_PUBLICATION)
    assert isinstance(back, Results)
    desk.hear(FromWorker(back))


def test_answers_of_one_batch_are_each_ones_own(joined: Desk) -> None:
    exchanges = [
        again(joined, 1, 2),
        again(joined, 1, 2),
        again(joined, 1, 2, headers={"Penstock_Explain": "1"}),
        again(joined, 1, 2, headers={"Accept_Encoding": "gzip"}),
    ]
    joined.sent()
    publish_batch(joined, [4], 4)
    one, other, explained, squeezed_one = [said(exchange) for exchange in exchanges]
    assert [np.frombuffer(each.body[-8:], "<f4").tolist() for each in (one, other, explained)] == [
        [1, -1],
        [2, -2],
        [3, -3],
    ]
    assert one.body[:-8] == other.body[:-8]
    assert one.headers.keys() == other.headers.keys()
    assert b'"batch_reason":' in explained.body
    assert b'"batch_reason":' not in other.body
    assert squeezed_one.headers["Inference-Header-Content-Length"] == one.headers["Inference-Header-Content-Length"]
    assert joined.meter("penstock_http_responses", "200") == 4


def test_answers_of_one_batch_that_waited_differently_say_so(joined: Desk) -> None:
    exchanges = [again(joined, 1, 2) for _ in range(3)]
    joined.sent()
    publish_batch(joined, [2, 1], 3, (7000, 9000))
    timings = [said(exchange).headers["Server-Timing"].split(",")[0] for exchange in exchanges]
    assert timings == ["queue;dur=7.000", "queue;dur=7.000", "queue;dur=9.000"]


def test_an_answer_like_the_last_says_its_own_time(joined: Desk) -> None:
    exchanges = [again(joined, 1, 2) for _ in range(2)]
    exchanges[1].arrived -= 1.0
    joined.sent()
    publish_batch(joined, [2], 2)
    first, second = [float(said(each).headers["Server-Timing"].rpartition("total;dur=")[2]) for each in exchanges]
    assert 999 < second - first < 1001 + first


def test_what_names_its_requests_is_answered_with_their_names(joined: Desk) -> None:
    exchanges = [again(joined, 1, 2, identifier=name) for name in ("", "", "a", "b")]
    joined.sent()
    publish_batch(joined, [4], 4)
    assert [json.loads(said(each).body[:-8]).get("id") for each in exchanges] == [None, None, "a", "b"]


# --- results in a worker's memory ---


class Memory:
    def __init__(self, content: bytes) -> None:
        self.content = content

    def view(self, offset: int, nbytes: int) -> memoryview:
        return memoryview(self.content)[offset : offset + nbytes]

    def views(self, offsets: Sequence[int], nbytes: int) -> list[memoryview]:
        return [self.view(offset, nbytes) for offset in offsets]

    def copies(self, offsets: Sequence[int], nbytes: int) -> list[bytes]:
        return [self.content[offset : offset + nbytes] for offset in offsets]


BINARY = {**INFER, "parameters": {"binary_data_output": True}}
Y = np.array([[2, 4]], "<f4").tobytes()


@pytest.fixture
def sharing(desk: Desk) -> Desk:
    """A desk whose one worker has the answer Y in its memory, behind eight bytes, and whose caller copies only less."""
    desk.caller.identity = replace(desk.caller.identity, copied_bytes_max=len(Y) - 1)
    desk.join(ready())
    desk.hear(FromBroker(Workers(EPOCH, [WorkerAddress(b"worker 0", "ipc://results", 1)])))
    desk.hear(ArenaCame(b"worker 0", 1, Memory(bytes(8) + Y)))
    return desk


def place(desk: Desk, number: int) -> None:
    """The result of a request, where it lies."""
    body = pack_outcome(Outcome("double", "1", (Tensor("y", "FP32", (1, 2), 0, 8),)))
    answers = Answers(COMPLETE, 8, body, 7, (number,), (8,))
    message = unpack(pack(Results(EPOCH, [answers], b"worker 0", Batch(1, 1, "idle", 10, 5))), (), ON_PUBLICATION)
    assert isinstance(message, Results)
    desk.hear(FromWorker(message))


def acknowledged(desk: Desk) -> list[int]:
    return list(desk.sent().acks)


@pytest.mark.parametrize("identifier", ["", "mine"])
def test_a_binary_answer_is_sent_from_where_it_lies_and_acknowledged_afterwards(sharing: Desk, identifier: str) -> None:
    exchange = sharing.infer({**BINARY, "id": identifier} if identifier else BINARY)
    assert acknowledged(sharing) == []
    place(sharing, 1)
    assert exchange._response is not None
    assert isinstance(exchange._tail, memoryview)
    assert exchange._tail == Y
    assert (b'"id":"mine"' in exchange._response) == bool(identifier)
    assert acknowledged(sharing) == []
    assert exchange._sent is not None
    exchange._sent()
    assert acknowledged(sharing) == [1, 1]


def test_a_binary_answer_of_few_bytes_is_copied_and_acknowledged_at_once(sharing: Desk) -> None:
    sharing.caller.identity = replace(sharing.caller.identity, copied_bytes_max=len(Y))
    exchange = sharing.infer(BINARY)
    assert acknowledged(sharing) == []
    place(sharing, 1)
    assert exchange.response.endswith(Y)
    assert exchange._sent is None
    assert acknowledged(sharing) == [1, 1]


@pytest.mark.parametrize("headers", [{}, {"Accept_Encoding": "gzip"}])
def test_what_is_made_of_a_result_frees_it_at_once(sharing: Desk, headers: dict[str, str]) -> None:
    exchange = sharing.infer(**headers)
    sharing.sent()
    place(sharing, 1)
    assert not waits(exchange)
    assert acknowledged(sharing) == [1, 1]


def test_a_result_for_a_client_that_has_gone_is_acknowledged(sharing: Desk) -> None:
    exchange = sharing.infer(BINARY)
    sharing.sent()
    exchange._connection = None
    place(sharing, 1)
    assert acknowledged(sharing) == [1, 1]


def test_an_answer_that_cannot_be_rendered_is_acknowledged(sharing: Desk) -> None:
    exchange = sharing.infer()
    sharing.sent()
    answers = Answers(COMPLETE, 8, b"\xc1", 7, (1,), (8,))
    message = unpack(pack(Results(EPOCH, [answers], b"worker 0", Batch(1, 1, "idle", 10, 5))), (), ON_PUBLICATION)
    assert isinstance(message, Results)
    sharing.hear(FromWorker(message))
    assert said(exchange).status == 500
    assert acknowledged(sharing) == [1, 1]
