"""The response cache behind the routes: a real caller core that hears what a broker and workers say, and a store."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from penstock.gateway.cachestore import MemoryStore
from penstock.gateway.caching import ResponseCache
from penstock.gateway.connection import Exchange
from penstock.gateway.plain import Plain
from penstock.gateway.tfserving import TensorFlowServing
from penstock.wire.codec import pack_failure
from penstock.wire.errors import MODEL_FAILED
from penstock.wire.events import BrokerLost, FromBroker, Tick
from penstock.wire.messages import FAILED, Failure, Models, Outcome
from penstock.wire.models import READY, ModelState, Route, Tensor
from penstock.wire.slots import Slots
from tests.gateway.serving import Loop
from tests.gateway.test_application import (
    BODY,
    DOUBLED,
    EPOCH,
    INFER,
    INFER_URL,
    Desk,
    Said,
    X,
    said,
    spec,
    waits,
)

HIT, MISS, WAIT = "hit", "miss", "wait"
JSON_PART = json.dumps(
    {
        "inputs": [{"name": "x", "shape": [1, 2], "datatype": "FP32", "parameters": {"binary_data_size": 8}}],
        "outputs": [{"name": "y", "parameters": {"binary_data": True}}],
    }
).encode()
OTHER_BODY = BODY.replace(b"[1, 2]}]", b"[7, 8]}]")


def built(build: str = "b1", version: str = "1") -> ModelState:
    return ModelState("double", version, READY, "", spec(version=version)._replace(build=build))


class Cached(Desk):
    """With one model whose answers are kept, and a store that is open."""

    def __init__(self, loop: Loop, runtime: Path, slots: Slots | None = None, **limits: Any) -> None:
        super().__init__(loop, slots, **{"response_cache_bytes": 4 << 20, **limits})
        self.cache = self.application.cache = ResponseCache(loop.loop, self.application, runtime)
        self.application.add(Plain(self.application).routes)
        self.application.add(TensorFlowServing(self.application).routes)
        self.join(built())
        self.cache.stores.open()
        loop.until(lambda: self.cache.stores.store is not None)

    def tell(self, *models: ModelState, routes: tuple[Route, ...] = ()) -> None:
        self.hear(FromBroker(Models(EPOCH, models, routes)))

    def numbers(self) -> list[int]:
        """Of the requests that have gone to the broker since."""
        messages = self.caller.flush(0.0)
        return [number for message in messages for group in message.groups for number in group.ids]

    def cancelled(self) -> list[int]:
        return [number for message in self.caller.flush(0.0) for number in message.cancels]

    def fails(self, number: int) -> None:
        self.deliver(number, Outcome("", "", ()), b"", pack_failure(Failure(MODEL_FAILED, "it failed", 0)), FAILED)

    def compute(self, exchange: Exchange, x: bytes = X) -> Said:
        """Have it answered by a worker."""
        [number] = self.numbers()
        self.double(number, x)
        return said(exchange)

    def counts(self) -> tuple[float, ...]:
        return tuple(self.meter(f"penstock_cache_{each}", "double", "1") for each in ("hits", "misses", "waits"))

    def leave(self, exchange: Exchange) -> None:
        """Its client hangs up."""
        self.budget.release(exchange)
        exchange._connection = None
        assert exchange.gone is not None
        exchange.gone()

    def binary(self, **headers: str) -> Exchange:
        return self.begin(
            "POST", INFER_URL, JSON_PART + X, Inference_Header_Content_Length=str(len(JSON_PART)), **headers
        )


def how(answer: Said) -> str | None:
    assert answer.status == 200, answer
    return answer.headers.get("Penstock-Cache")


@pytest.fixture
def make(loop: Loop, tmp_path: Path) -> Iterator[Callable[..., Cached]]:
    made: list[Cached] = []

    def start(slots: Slots | None = None, **limits: Any) -> Cached:
        made.append(Cached(loop, tmp_path, slots, **limits))
        return made[-1]

    yield start
    for each in made:
        each.cache.close()


@pytest.fixture
def desk(make: Callable[..., Cached]) -> Cached:
    return make()


# --- hits and misses ---


def test_the_same_is_computed_once_and_then_known(desk: Cached) -> None:
    first = desk.compute(desk.infer())
    assert how(first) == MISS
    for _ in range(4):  # from the store, and from what this gateway remembers
        again = said(desk.infer())
        assert (how(again), again.body) == (HIT, first.body)
        assert again.headers["Server-Timing"].startswith("cache;desc=hit, total;dur=")
        assert json.loads(again.body) == json.loads(DOUBLED)
    assert desk.numbers() == []
    assert desk.counts() == (4, 1, 0)
    assert desk.meter("penstock_http_responses", "200") == 5


def test_other_inputs_are_others(desk: Cached) -> None:
    desk.compute(desk.infer())
    other = desk.begin("POST", INFER_URL, OTHER_BODY)
    assert how(desk.compute(other, np.array([[7, 8]], "<f4").tobytes())) == MISS
    assert json.loads(said(desk.infer()).body)["outputs"][0]["data"] == [2, 4]
    assert json.loads(desk.ask("POST", INFER_URL, OTHER_BODY).body)["outputs"][0]["data"] == [14, 16]


def test_all_protocols_share_it(desk: Cached) -> None:
    desk.compute(desk.infer())
    binary = said(desk.binary())
    assert (how(binary), binary.body[-8:]) == (HIT, np.array([2, 4], "<f4").tobytes())
    plain = desk.ask("POST", "/v2/models/double/predict", b'{"x": [[1, 2]]}')
    assert (how(plain), json.loads(plain.body)) == (HIT, {"y": [[2, 4]]})
    tf = desk.ask("POST", "/v1/models/double:predict", b'{"instances": [[1, 2]]}')
    assert (how(tf), json.loads(tf.body)) == (HIT, {"predictions": [[2, 4]]})
    assert how(said(desk.infer({**INFER, "id": "mine"}))) == HIT
    assert how(said(desk.infer(Penstock_Priority="1", Penstock_Tenant="gold"))) == HIT
    assert how(desk.ask("POST", "/v2/models/double/versions/1/infer", BODY)) == HIT
    assert desk.numbers() == []


def test_each_is_answered_with_its_own_id_and_encoding(desk: Cached) -> None:
    desk.compute(desk.infer())
    for _ in range(3):
        for name in ("one", "two"):
            assert json.loads(said(desk.infer({**INFER, "id": name})).body)["id"] == name
        small = said(desk.infer(Accept_Encoding="gzip"))
        assert (how(small), json.loads(small.body)) == (HIT, json.loads(DOUBLED))


def test_large_answers_are_compressed_when_they_come_again(make: Callable[..., Cached]) -> None:
    import gzip

    desk = make(compress_bytes_min=10)
    desk.compute(desk.infer(Accept_Encoding="gzip"))
    for _ in range(3):
        again = said(desk.infer(Accept_Encoding="gzip"))
        assert (how(again), again.headers["Content-Encoding"]) == (HIT, "gzip")
        assert json.loads(gzip.decompress(again.body)) == json.loads(DOUBLED)


def test_who_wants_to_know_is_told(desk: Cached) -> None:
    desk.compute(desk.infer())
    for _ in range(3):
        parameters = json.loads(said(desk.infer(Penstock_Explain="1")).body)["parameters"]
        assert parameters["cache"] == HIT
        assert parameters["why"] == "the same had been asked before, and the answer was kept"


def test_a_model_whose_answers_are_not_kept_says_nothing_of_it(desk: Cached) -> None:
    desk.tell(built(""))
    for _ in range(2):
        assert how(desk.compute(desk.infer())) is None


def test_no_cache_is_computed_and_refreshes(desk: Cached) -> None:
    desk.compute(desk.infer())
    fresh = desk.infer(Cache_Control="no-cache")
    [number] = desk.numbers()
    y = np.array([[5, 6]], "<f4").tobytes()
    desk.deliver(number, Outcome("double", "1", (Tensor("y", "FP32", (1, 2), 0, 8),)), y)
    assert how(said(fresh)) == MISS
    assert json.loads(said(desk.begin("POST", INFER_URL, BODY + b" ")).body)["outputs"][0]["data"] == [5, 6]


def test_no_store_is_computed_and_not_kept(desk: Cached) -> None:
    assert how(desk.compute(desk.infer(Cache_Control="no-store"))) is None
    assert how(desk.compute(desk.infer())) == MISS


def test_large_requests_go_past_it(make: Callable[..., Cached]) -> None:
    desk = make(response_cache_request_bytes_max=7)
    for _ in range(2):
        assert how(desk.compute(desk.infer())) is None


def test_without_bytes_there_is_none(loop: Loop, tmp_path: Path) -> None:
    desk = Desk(loop, response_cache_bytes=0)
    cache = desk.application.cache = ResponseCache(loop.loop, desk.application, tmp_path)
    desk.join(built())
    for _ in range(2):
        exchange = desk.infer()
        [group] = desk.sent().groups
        desk.double(group.ids[0], X)
        assert how(said(exchange)) is None
    cache.close()
    assert list(tmp_path.iterdir()) == []


def test_where_it_cannot_be_opened_all_is_computed(
    loop: Loop, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    desk = Desk(loop)
    cache = desk.application.cache = ResponseCache(loop.loop, desk.application, tmp_path / "missing" / "directory")
    desk.join(built())
    for _ in range(2):
        exchange = desk.infer()
        [group] = desk.sent().groups
        desk.double(group.ids[0], X)
        assert how(said(exchange)) is None
        loop.until(lambda: caplog.records)
    assert [record.message for record in caplog.records if record.levelno == logging.WARNING] == [
        "answers cannot be kept"
    ]
    cache.close()


def test_an_error_is_not_kept(desk: Cached) -> None:
    exchange = desk.infer()
    [failed] = desk.numbers()
    desk.fails(failed)
    assert said(exchange).status == 500
    assert how(desk.compute(desk.infer())) == MISS


# --- builds ---


def test_another_build_is_computed_anew(desk: Cached) -> None:
    desk.compute(desk.infer())
    assert how(said(desk.infer())) == HIT
    assert how(said(desk.infer())) == HIT
    desk.tell(built("b2"))
    assert how(desk.compute(desk.infer())) == MISS
    assert how(said(desk.infer())) == HIT


def test_what_was_asked_under_another_build_is_not_kept(desk: Cached) -> None:
    exchange = desk.infer()
    desk.tell(built("b2"))
    assert how(desk.compute(exchange)) == MISS
    desk.tell(built("b1"))
    assert how(desk.compute(desk.infer())) == MISS


def test_nobody_waits_for_what_was_asked_under_another_build(desk: Cached) -> None:
    one = desk.infer()
    desk.tell(built("b2"))
    other = desk.infer()
    first, second = desk.numbers()
    desk.double(second, X)
    assert waits(one)
    assert how(said(other)) == MISS
    desk.double(first, X)
    assert how(said(one)) == MISS


def test_nothing_is_known_while_there_is_no_broker_or_it_has_said_nothing(desk: Cached) -> None:
    desk.compute(desk.infer())
    said(desk.infer())
    said(desk.infer())
    desk.hear(BrokerLost("it ended"))
    assert waits(desk.infer())
    assert desk.counts() == (2, 1, 0)


def test_the_answer_of_another_version_than_was_meant_is_not_kept(desk: Cached) -> None:
    desk.tell(built(), built("b2", "2"))
    one, other = desk.infer(), desk.infer()
    [number] = desk.numbers()
    y = np.array([[5, 6]], "<f4").tobytes()
    outcome = Outcome("double", "1", (Tensor("y", "FP32", (1, 2), 0, 8),))
    desk.deliver(number, outcome, y)  # of version 1, where 2 was the newest: the broker may do so
    assert json.loads(said(one).body)["model_version"] == "1"
    assert waits(other), "it was given the answer of another version"
    [number] = desk.numbers()
    desk.deliver(number, outcome._replace(version="2"), y)
    assert json.loads(said(other).body)["model_version"] == "2"
    assert how(said(desk.infer())) == HIT


def test_traffic_that_is_split_has_an_answer_of_each_version(desk: Cached) -> None:
    desk.tell(built(), built("b2", "2"), routes=(Route("double", ("1",), (), (("1", 50), ("2", 50))),))
    outcome = Outcome("double", "1", (Tensor("y", "FP32", (1, 2), 0, 8),))
    for _ in range(2):
        exchange = desk.infer()
        [message] = desk.caller.flush(0.0)
        [group] = message.groups
        version = group.form.version[-1]
        desk.deliver(group.ids[0], outcome._replace(version=version), np.array([[int(version), 0]], "<f4").tobytes())
        assert json.loads(said(exchange).body)["model_version"] == version
    seen = set()
    for _ in range(8):
        answer = json.loads(said(desk.infer()).body)
        assert answer["outputs"][0]["data"][0] == int(answer["model_version"])
        seen.add(answer["model_version"])
    assert seen == {"1", "2"}


# --- those that ask at once ---


def test_those_that_ask_at_once_wait_for_one(desk: Cached) -> None:
    exchanges = [desk.infer(), desk.binary(), desk.begin("POST", "/v2/models/double/predict", b'{"x": [[1, 2]]}')]
    [number] = desk.numbers()
    assert all(waits(exchange) for exchange in exchanges)
    desk.double(number, X)
    assert [how(said(exchange)) for exchange in exchanges] == [MISS, WAIT, WAIT]
    assert json.loads(said(exchanges[2]).body) == {"y": [[2, 4]]}
    assert said(exchanges[1]).body[-8:] == np.array([2, 4], "<f4").tobytes()
    assert desk.counts() == (0, 1, 2)
    assert len(desk.cache.flights) == 0


def test_if_the_one_that_is_computed_fails_another_is_and_only_it_has_failed(desk: Cached) -> None:
    exchanges = [desk.infer() for _ in range(3)]
    [failed] = desk.numbers()
    desk.fails(failed)
    assert said(exchanges[0]).status == 500
    [number] = desk.numbers()
    assert all(waits(exchange) for exchange in exchanges[1:])
    desk.double(number, X)
    assert [how(said(exchange)) for exchange in exchanges[1:]] == [MISS, WAIT]


def test_if_its_client_leaves_it_is_computed_for_the_others(desk: Cached) -> None:
    one, other = desk.infer(), desk.infer()
    [number] = desk.numbers()
    desk.leave(one)
    assert desk.cancelled() == []
    desk.double(number, X)
    assert how(said(other)) == WAIT
    assert how(said(desk.infer())) == HIT


def test_if_it_fails_after_its_client_has_left_another_is_computed(desk: Cached) -> None:
    one, other = desk.infer(), desk.infer()
    [number] = desk.numbers()
    desk.leave(one)
    desk.fails(number)
    assert how(desk.compute(other)) == MISS


def test_if_all_leave_it_is_cancelled(desk: Cached) -> None:
    exchanges = [desk.infer() for _ in range(3)]
    [number] = desk.numbers()
    for exchange in exchanges[:2]:
        desk.leave(exchange)
        assert desk.cancelled() == []
    desk.leave(exchanges[2])
    assert desk.cancelled() == [number]
    assert len(desk.cache.flights) == 0
    assert how(desk.compute(desk.infer())) == MISS


def test_each_has_its_own_time(desk: Cached, loop: Loop) -> None:
    one = desk.infer()
    short = desk.infer(Penstock_Timeout="0.02")
    long = desk.infer()
    [number] = desk.numbers()
    loop.until(lambda: not waits(short))
    answer = said(short)
    assert (answer.status, answer.error) == (504, "no result for model 'double' within 0.02 s")
    desk.double(number, X)
    assert [how(said(exchange)) for exchange in (one, long)] == [MISS, WAIT]


def test_one_whose_time_is_up_leaves_the_others_to_another(desk: Cached) -> None:
    one = desk.infer(Penstock_Timeout="0.001")
    other = desk.infer()
    desk.numbers()
    desk.hear(Tick(), later_s=1.0)
    assert said(one).status == 504
    assert how(desk.compute(other)) == MISS


def test_only_so_many_wait(make: Callable[..., Cached]) -> None:
    desk = make(response_cache_waiting_max=1)
    exchanges = [desk.infer() for _ in range(3)]
    first, second = desk.numbers()
    desk.double(first, X)
    desk.double(second, X)
    assert [how(said(exchange)) for exchange in exchanges] == [MISS, WAIT, None]


def test_very_many_that_cannot_be_submitted_all_fail(desk: Cached) -> None:
    exchanges = [desk.infer() for _ in range(1500)]
    [number] = desk.numbers()
    desk.caller.identity = desk.caller.identity.__class__(b"a caller", "gateway", 1, True, "/run/here", calls_max=0)
    desk.fails(number)
    assert [said(exchange).status for exchange in exchanges] == [500] + [503] * 1499
    assert len(desk.cache.flights) == 0


# --- shared memory ---

LARGE = np.arange(2 * 1000, dtype="<f4").reshape(1000, 2)
LARGE_JSON = json.dumps(
    {"inputs": [{"name": "x", "shape": [1000, 2], "datatype": "FP32", "data": LARGE.ravel().tolist()}]}
).encode()


@pytest.fixture
def shared(make: Callable[..., Cached], slots: Slots) -> Cached:
    return make(slots)


def large(desk: Cached) -> Exchange:
    return desk.begin("POST", INFER_URL, LARGE_JSON)


def result(desk: Cached, number: int) -> None:
    y = (LARGE * 2).tobytes()
    desk.deliver(number, Outcome("double", "1", (Tensor("y", "FP32", (1000, 2), 0, len(y)),)), y)


def data_of(exchange: Exchange) -> list[float]:
    data: list[float] = json.loads(said(exchange).body)["outputs"][0]["data"]
    return data


def test_those_that_wait_take_no_shared_memory(shared: Cached, slots: Slots) -> None:
    exchanges = [large(shared) for _ in range(5)]
    used = slots.arena.allocator.used
    assert 8000 <= used < 16_000
    [number] = shared.numbers()
    result(shared, number)
    for exchange in exchanges:
        assert data_of(exchange) == (LARGE * 2).ravel().tolist()
        shared.budget.release(exchange)


def test_what_others_wait_for_stays_in_its_place_when_its_client_leaves(shared: Cached, slots: Slots) -> None:
    one, other = large(shared), large(shared)
    [message] = shared.caller.flush(0.0)
    [group] = message.groups
    shared.leave(one)
    [place] = group.places
    assert bytes(slots.arena.view(place, 8000)) == LARGE.tobytes()
    assert slots.arena.allocator.used
    shared.fails(group.ids[0])  # the next has it from there
    [message] = shared.caller.flush(0.0)
    assert list(message.groups[0].places) == [place]
    result(shared, message.groups[0].ids[0])
    assert data_of(other) == (LARGE * 2).ravel().tolist()
    shared.budget.release(other)


def test_one_that_leaves_while_it_waits_for_room_leaves_it_to_another(shared: Cached, slots: Slots, loop: Loop) -> None:
    full = slots.take(slots.arena.size)
    assert full is not None
    one, other = large(shared), large(shared)
    assert shared.numbers() == []
    shared.leave(one)
    full.give_back()
    loop.until(lambda: shared.caller._waiting)
    [number] = shared.numbers()
    result(shared, number)
    assert how(said(other)) == MISS
    shared.budget.release(other)


def test_no_room_is_told_to_each_in_its_turn(make: Callable[..., Cached], slots: Slots, loop: Loop) -> None:
    desk = make(slots, arena_wait_s=0.01)
    full = slots.take(slots.arena.size)
    assert full is not None
    exchanges = [large(desk), large(desk)]
    loop.until(lambda: not any(map(waits, exchanges)))
    assert [said(exchange).status for exchange in exchanges] == [503, 503]
    full.give_back()
    assert len(desk.cache.flights) == 0


# --- what is counted ---


def test_what_is_kept_is_measured(desk: Cached) -> None:
    desk.compute(desk.infer())
    store = desk.cache.stores.store
    assert isinstance(store, MemoryStore)
    desk.loop.until(lambda: not store._pending)
    desk.cache.stores.measure(desk.caller.meters)
    assert desk.meter("penstock_cache_entries") == 1
    assert 0 < desk.meter("penstock_cache_bytes") <= 4 << 20
    assert [desk.meter(f"penstock_cache_{each}") for each in ("dropped", "evictions", "corrupt")] == [0, 0, 0]
    assert desk.meter("penstock_cache_miss_seconds", "double", "1") > 0


def test_what_is_remembered_is_bounded(desk: Cached, monkeypatch: pytest.MonkeyPatch) -> None:
    from penstock.gateway import repeats

    monkeypatch.setattr(repeats, "_ANSWERS_MAX", 3)
    desk.compute(desk.infer())
    for number in range(20):
        for _ in range(3):
            assert how(desk.ask("POST", INFER_URL, BODY + b" " * number)) == HIT
        assert len(desk.cache._repeats._known) <= 3
    desk.cache._repeats.clear(0)
    monkeypatch.setattr(repeats, "_ANSWERS_MAX", 1000)
    monkeypatch.setattr(repeats, "_BYTES_MAX", 5000)
    for number in range(20):
        for _ in range(3):
            assert how(desk.ask("POST", INFER_URL, BODY + b" " * number)) == HIT
        assert desk.cache._repeats._bytes <= 6000
    assert 2 <= len(desk.cache._repeats._known) <= 7


def test_more_in_turn_than_there_is_room_for_do_not_all_throw_each_other_out(
    desk: Cached, monkeypatch: pytest.MonkeyPatch
) -> None:
    from penstock.gateway import repeats

    monkeypatch.setattr(repeats, "_ANSWERS_MAX", 16)
    desk.compute(desk.infer())
    known = desk.cache._repeats._known
    found = 0
    for turn in range(20):
        for number in range(20):
            body = BODY + b" " * number
            found += turn > 0 and body in [each for _, each in known]
            assert how(desk.ask("POST", INFER_URL, body)) == HIT
    assert len(known) == 16
    assert found > 0.5 * 19 * 20
    new = BODY + b" " * 100  # comes often
    assert any((desk.ask("POST", INFER_URL, new), new in [each for _, each in known])[1] for _ in range(8))


def test_a_repeat_that_is_too_old_is_computed(make: Callable[..., Cached], monkeypatch: pytest.MonkeyPatch) -> None:
    from penstock.gateway import cachestore, repeats

    desk = make(response_cache_ttl_s=60.0)
    desk.compute(desk.infer())
    for _ in range(3):
        assert how(said(desk.infer())) == HIT

    store = desk.cache.stores.store
    assert isinstance(store, MemoryStore)
    desk.loop.until(lambda: not store._pending)

    class Later:
        @staticmethod
        def monotonic() -> float:
            import time

            return time.monotonic() + 61

    monkeypatch.setattr(repeats, "time", Later)
    monkeypatch.setattr(cachestore, "time", Later)
    assert how(desk.compute(desk.infer())) == MISS
