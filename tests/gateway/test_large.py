"""Large JSON takes another way, and all else is the same: answers, errors, hang-ups and room."""

from __future__ import annotations

import gzip
import json
import os
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from penstock.gateway import large
from penstock.gateway.clerk import Sheet
from penstock.gateway.connection import Exchange
from penstock.gateway.large import LARGE_ANSWER_BYTES, LARGE_BODY_BYTES
from penstock.gateway.plain import Plain
from penstock.gateway.tfserving import TensorFlowServing
from penstock.wire import errors
from penstock.wire.arena import Arena
from penstock.wire.messages import Outcome
from penstock.wire.models import Tensor
from penstock.wire.slots import Slots
from tests.gateway.serving import DEADLINE_S, Loop
from tests.gateway.test_application import Desk, ready, said, waits

ROWS = 33_000
ARRAY = (np.arange(2 * ROWS, dtype=np.float32) / 7).reshape(ROWS, 2)
X = {"name": "x", "shape": [ROWS, 2], "datatype": "FP32", "data": ARRAY.ravel().tolist()}
INFER = {"inputs": [X]}
ASKED = {
    "/v2/models/double/infer": INFER,
    "/v2/models/double/predict": {"x": ARRAY.tolist()},
    "/v1/models/double:predict": {"instances": ARRAY.tolist()},
}


def body_of(request: Any) -> bytes:
    body = json.dumps(request).encode()
    assert len(body) >= LARGE_BODY_BYTES
    return body


@pytest.fixture
def desks(loop: Loop) -> Iterator[Callable[..., Desk]]:
    opened: list[Desk] = []

    def start(slots: Slots | None = None, processes: int = 1, **limits: Any) -> Desk:
        desk = Desk(loop, slots, json_processes_max=processes, **limits)
        desk.application.add(Plain(desk.application).routes)
        desk.application.add(TensorFlowServing(desk.application).routes)
        opened.append(desk)
        return desk.join(ready())

    yield start
    for desk in opened:
        desk.application.clerks.close()


def payload_of(desk: Desk) -> bytes:
    """Of the request that is sent, once it is."""
    desk.loop.until(lambda: desk.caller.wants_flush(0))
    sent = desk.sent()
    return bytes(sent.frames[0] if sent.frames else sent.blob)


def answered(desk: Desk, exchange: Exchange) -> Any:
    desk.loop.until(lambda: not waits(exchange))
    return said(exchange)


@pytest.mark.parametrize("url", ASKED)
def test_it_is_asked_and_answered_as_if_it_were_small(desks: Callable[..., Desk], url: str) -> None:
    told = []
    for processes in (0, 1):
        desk = desks(processes=processes)
        exchange = desk.begin("POST", url, body_of(ASKED[url]))
        sent = payload_of(desk)
        assert sent == ARRAY.tobytes()
        desk.double(1, sent)
        told.append(answered(desk, exchange))
        assert len(desk.application.clerks.processes) == processes
    assert {**told[0].headers, "Server-Timing": ""} == {**told[1].headers, "Server-Timing": ""}
    assert told[0].body == told[1].body
    assert len(told[0].body) > LARGE_ANSWER_BYTES


@pytest.mark.parametrize("binary", [True, False])
def test_many_classes_are_told_as_a_few_are(desks: Callable[..., Desk], binary: bool) -> None:
    told = []
    for processes in (0, 1):
        desk = desks(processes=processes)
        output = {"name": "y", "parameters": {"classification": 2, "binary_data": binary}}
        exchange = desk.begin("POST", "/v2/models/double/infer", body_of({**INFER, "outputs": [output]}))
        desk.double(1, payload_of(desk))
        told.append(answered(desk, exchange))
    assert {**told[0].headers, "Server-Timing": ""} == {**told[1].headers, "Server-Timing": ""}
    assert told[0].body == told[1].body
    assert b"9428.286133:1" in told[0].body


def test_few_classes_cost_no_process(desks: Callable[..., Desk]) -> None:
    desk = desks()
    request = {"inputs": [X | {"shape": [2, 2], "data": [1, 2, 4, 3]}]}
    output = {"name": "y", "parameters": {"classification": 1 << 30}}
    exchange = desk.begin("POST", "/v2/models/double/infer", json.dumps({**request, "outputs": [output]}).encode())
    desk.double(1, payload_of(desk))
    assert json.loads(said(exchange).body)["outputs"][0]["data"] == [
        *("4.000000:1", "2.000000:0", "8.000000:0", "6.000000:1")
    ]
    assert desk.application.clerks.processes == []


@pytest.fixture
def slots() -> Iterator[Slots]:
    slots = Slots(Arena(1 << 20, "test"))
    yield slots
    assert (slots.arena.allocator.used, slots.waiting) == (0, 0), "a slot was not given back"
    slots.close()


def test_tensors_lie_where_workers_read_them(desks: Callable[..., Desk], slots: Slots) -> None:
    desk = desks(slots)
    exchange = desk.begin("POST", "/v2/models/double/infer", body_of(INFER))
    desk.loop.until(lambda: desk.caller.wants_flush(0))
    [group] = desk.sent().groups
    assert bytes(slots.arena.view(group.places[0], ARRAY.nbytes)) == ARRAY.tobytes()
    assert exchange.body == b"", "nobody needs it any more"
    desk.double(1, ARRAY.tobytes())
    assert answered(desk, exchange).status == 200
    desk.budget.release(exchange)


def test_tensors_wait_for_room(desks: Callable[..., Desk], slots: Slots) -> None:
    desk = desks(slots, arena_wait_s=60)
    whole = slots.take(slots.arena.size)
    assert whole is not None
    exchange = desk.begin("POST", "/v2/models/double/infer", body_of(INFER))
    desk.loop.until(lambda: slots.waiting)
    whole.give_back()
    desk.loop.until(lambda: desk.caller.calls)
    desk.budget.release(exchange)


def test_tensors_for_which_there_is_no_room_in_time(desks: Callable[..., Desk], slots: Slots) -> None:
    desk = desks(slots, arena_wait_s=0.02)
    whole = slots.take(slots.arena.size)
    assert whole is not None
    answer = answered(desk, desk.begin("POST", "/v2/models/double/infer", body_of(INFER)))
    assert (answer.status, "arena_wait_s" in answer.error) == (503, True)
    assert desk.meter("penstock_request_failures", "double", "", "overloaded") == 1
    whole.give_back()


def test_tensors_that_never_fit(desks: Callable[..., Desk]) -> None:
    slots = Slots(Arena(4096, "test"))
    desk = desks(slots)
    answer = answered(desk, desk.begin("POST", "/v2/models/double/infer", body_of(INFER)))
    assert (answer.status, "arena_bytes" in answer.error) == (413, True)


@pytest.mark.parametrize("url", ASKED)
@pytest.mark.parametrize("damage", [b"}", b"x", b'"'], ids=["more", "letter", "quote"])
def test_errors_are_those_of_small_requests(desks: Callable[..., Desk], url: str, damage: bytes) -> None:
    body = body_of(ASKED[url])
    at = len(body) // 2
    told = []
    for processes in (0, 1):
        desk = desks(processes=processes)
        exchange = desk.begin("POST", url, body[:at] + damage + body[at:], X_Request_Id="mine")
        told.append((answered(desk, exchange), desk.meter("penstock_request_failures", "double", "", "bad_input")))
    (first, counted), (second, likewise) = told
    assert (first.status, first.body, counted) == (second.status, second.body, likewise)
    assert (first.status, counted) == (400, 1)


def test_what_does_not_fit_the_model_is_told(desks: Callable[..., Desk]) -> None:
    wide = {"inputs": [X | {"shape": [ROWS * 2, 1]}]}
    desk = desks()
    answer = answered(desk, desk.begin("POST", "/v2/models/double/infer", body_of(wide)))
    assert (answer.status, "Expected [-1, 2]" in answer.error) == (400, True)


def test_a_model_that_is_not_there_costs_no_process(desks: Callable[..., Desk]) -> None:
    desk = desks()
    assert desk.ask("POST", "/v2/models/nope/infer", body_of(INFER)).status == 404
    assert desk.application.clerks.processes == []


def test_large_json_before_binary_tensors(desks: Callable[..., Desk]) -> None:
    desk = desks()
    about = {"name": "x", "shape": [1, 2], "datatype": "FP32", "parameters": {"binary_data_size": 8}}
    text = json.dumps({"inputs": [about], "parameters": {"much": "x" * LARGE_BODY_BYTES}}).encode()
    tensor = ARRAY[:1].tobytes()
    desk.begin("POST", "/v2/models/double/infer", text + tensor, **{"Inference-Header-Content-Length": str(len(text))})
    assert payload_of(desk) == tensor
    assert len(desk.application.clerks.processes) == 1


def test_large_binary_tensors_cost_no_process(desks: Callable[..., Desk]) -> None:
    desk = desks()
    about = {"name": "x", "shape": [ROWS, 2], "datatype": "FP32", "parameters": {"binary_data_size": ARRAY.nbytes}}
    text = json.dumps({"inputs": [about], "parameters": {"binary_data_output": True}}).encode()
    length = {"Inference-Header-Content-Length": str(len(text))}
    exchange = desk.begin("POST", "/v2/models/double/infer", text + ARRAY.tobytes(), **length)
    desk.double(1, payload_of(desk))
    assert said(exchange).status == 200
    assert desk.application.clerks.processes == []


def test_large_json_may_be_compressed_both_ways(desks: Callable[..., Desk]) -> None:
    desk = desks()
    body = gzip.compress(body_of(INFER), 1)
    coded = {"Content-Encoding": "gzip", "Accept-Encoding": "gzip"}
    exchange = desk.begin("POST", "/v2/models/double/infer", body, **coded)
    desk.double(1, payload_of(desk))
    answer = answered(desk, exchange)
    assert answer.headers["Content-Encoding"] == "gzip"
    [y] = json.loads(gzip.decompress(answer.body))["outputs"]
    assert np.array_equal(np.array(y["data"], np.float32), (ARRAY * 2).ravel())
    desk.budget.release(exchange)


def test_mixed_answers(desks: Callable[..., Desk]) -> None:
    desk = desks()
    text = json.dumps({"inputs": [{"name": "x", "shape": [1, 2], "datatype": "FP32", "data": [1, 2]}]}).encode()
    exchange = desk.begin("POST", "/v2/models/double/infer", text[:-1] + b',"outputs":[{"name":"y"}]}')
    payload_of(desk)
    both = (Tensor("y", "FP32", (ROWS, 2), 0, ARRAY.nbytes), Tensor("z", "FP32", (1,), ARRAY.nbytes, 4))
    desk.deliver(1, Outcome("double", "1", both), ARRAY.tobytes() + bytes(4))
    y, z = json.loads(answered(desk, exchange).body)["outputs"]
    assert np.array_equal(np.array(y["data"], np.float32), ARRAY.ravel())
    assert z["data"] == [0.0]


def test_who_hangs_up_is_not_asked_for(desks: Callable[..., Desk], slots: Slots) -> None:
    desk = desks(slots)
    first, second = (desk.begin("POST", "/v2/models/double/infer", body_of(INFER)) for _ in range(2))
    assert first.gone is not None
    first.gone()
    first._connection = None
    desk.loop.until(lambda: desk.caller.calls)
    assert len(desk.caller.calls) == 1
    desk.budget.release(second)
    assert waits(first)


def test_who_hangs_up_while_tensors_are_copied(
    desks: Callable[..., Desk], slots: Slots, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = threading.Event()
    copy = large._move

    def move(sheet: Sheet, view: memoryview) -> None:
        assert left.wait(DEADLINE_S)  # else the copy may be there, and the request sent, before it can be left
        copy(sheet, view)

    monkeypatch.setattr(large, "_move", move)
    desk = desks(slots)
    exchange = desk.begin("POST", "/v2/models/double/infer", body_of(INFER))
    desk.loop.until(lambda: slots.arena.allocator.used)
    exchange._connection = None  # its slot is being written
    left.set()
    desk.loop.until(lambda: not slots.arena.allocator.used)
    assert desk.caller.calls == {}


def test_a_process_that_dies_is_one_requests_500(desks: Callable[..., Desk]) -> None:
    desk = desks()
    exchange = desk.begin("POST", "/v2/models/double/infer", body_of(INFER))
    desk.loop.until(lambda: desk.application.clerks.processes)
    os.kill(desk.application.clerks.processes[0], signal.SIGKILL)
    answer = answered(desk, exchange)
    assert (answer.status, "it is replaced" in answer.error) == (500, True)
    assert desk.meter("penstock_request_failures", "double", "", errors.INTERNAL) == 1
    desk.begin("POST", "/v2/models/double/infer", body_of(INFER))
    assert payload_of(desk) == ARRAY.tobytes()


def test_a_request_whose_time_is_up_is_not_queued(desks: Callable[..., Desk]) -> None:
    desk = desks()
    exchange = desk.begin("POST", "/v2/models/double/infer", body_of(INFER), Penstock_Timeout="0.001")
    answer = answered(desk, exchange)
    assert (answer.status, "time was up before" in answer.error) == (504, True)
    assert desk.caller.calls == {}


def test_an_answer_that_json_cannot_carry(desks: Callable[..., Desk]) -> None:
    desk = desks()
    exchange = desk.infer()
    payload_of(desk)
    data = (b"\1\0\0\0\xff") * 80_000
    desk.deliver(1, Outcome("double", "1", (Tensor("y", "BYTES", (80_000,), 0, len(data)),)), data)
    answer = answered(desk, exchange)
    assert (answer.status, "not UTF-8" in answer.error) == (400, True)
