"""Triton's repository API, and models that are published over HTTP: a real caller core, a real directory, and a broker
that the test plays."""

from __future__ import annotations

import base64
import gzip
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import pytest

from penstock.client.events import Event, OrderDone
from penstock.client.link import Link
from penstock.client.orders import ORDERS_MAX, Orders
from penstock.gateway import repository as module
from penstock.gateway.connection import Exchange
from penstock.gateway.repository import Repository
from penstock.wire.errors import BAD_INPUT, NOT_FOUND, OVERLOADED, UNAVAILABLE
from penstock.wire.events import BrokerLost, FromBroker
from penstock.wire.messages import LOAD, MAX_CONFIG, UNLOAD, Failure, Message, Models, Order, Ordered, Welcome
from penstock.wire.models import IDLE, LOADING, ModelState, Route
from penstock.wire.models import UNAVAILABLE as UNAVAILABLE_STATE
from tests.gateway.serving import Loop
from tests.gateway.test_application import EPOCH, Desk, Said, ready, said, spec, waits


class Broker:
    """What of a link the orders know: what is said to the broker stays here."""

    def __init__(self, desk: Desk) -> None:
        self.caller = desk.caller
        self.on_order: Callable[[OrderDone], None]
        self.heard: list[Order] = []

    def say(self, message: Message) -> None:
        assert isinstance(message, Order)
        self.heard.append(message)


class Store(Desk):
    """A gateway beside a repository."""

    def __init__(self, loop: Loop, repository: Path, **limits: Any) -> None:
        super().__init__(loop, **limits)
        self.repository = repository
        self.broker = Broker(self)
        orders = Orders(cast(Link, self.broker))
        self.application.add(Repository(loop.loop, self.application, orders).routes)

    def hear(self, event: Event, later_s: float = 0.0) -> None:
        for command in self.caller.handle(event, time.monotonic() + later_s):
            if isinstance(command, OrderDone):
                self.broker.on_order(command)

    def join(self, *models: ModelState, routes: tuple[Route, ...] = ()) -> Store:
        self.hear(FromBroker(Welcome(EPOCH, "gateway", False)))
        self.hear(FromBroker(Models(EPOCH, models, routes, str(self.repository))))
        return self

    def post(self, path: str, request: Any = None, **headers: str) -> Exchange:
        body = b"" if request is None else json.dumps(request).encode()
        return self.begin("POST", f"/v2/repository/{path}", body, **headers)

    def ordered(self, failure: Failure | None = None) -> Order:
        """The broker answers what was ordered last."""
        order = self.broker.heard[-1]
        self.hear(FromBroker(Ordered(EPOCH, order.serial, failure)))
        return order

    def wait(self, exchange: Exchange) -> Said:
        """For what is done on a thread."""
        self.loop.until(lambda: not waits(exchange))
        return said(exchange)

    def put(self, path: str, body: bytes, method: str = "PUT", **headers: str) -> Said:
        return self.wait(self.begin(method, f"/v2/repository/models/{path}", body, **headers))

    def tree(self) -> list[str]:
        return sorted(str(each.relative_to(self.repository)) for each in self.repository.rglob("*"))


@pytest.fixture
def store(loop: Loop, tmp_path: Path) -> Store:
    return Store(loop, tmp_path, model_push=True).join(ready())


# --- index ---


def test_the_index_has_every_version_with_its_state(store: Store) -> None:
    store.join(
        ready(version="10"),
        ready(version="9"),
        ModelState("a", "1", UNAVAILABLE_STATE, "it is broken", None),
        ModelState("b", "2", LOADING, "", None),
        ModelState("idle", "1", IDLE, "", spec("idle")),
    )
    served = [
        {"name": "double", "version": "9", "state": "READY"},
        {"name": "double", "version": "10", "state": "READY"},
        {"name": "idle", "version": "1", "state": "READY", "reason": module._NOT_LOADED},
    ]
    others = [
        {"name": "a", "version": "1", "state": "UNAVAILABLE", "reason": "it is broken"},
        {"name": "b", "version": "2", "state": "LOADING"},
    ]
    for path, request in (("index", None), ("index", {}), ("any/index", {"ready": False})):
        answer = said(store.post(path, request))
        assert (answer.status, json.loads(answer.body)) == (200, others + served)
    assert json.loads(said(store.post("index", {"ready": True})).body) == served


def test_an_index_that_nothing_is_known_of_is_empty(loop: Loop, tmp_path: Path) -> None:
    assert json.loads(said(Store(loop, tmp_path).post("index")).body) == []


@pytest.mark.parametrize(
    ("request_", "sentence"),
    [([], "the request is not a JSON object"), ({"ready": 1}, "'ready' is true or false")],
)
def test_an_index_that_is_not_asked_for_rightly(store: Store, request_: Any, sentence: str) -> None:
    answer = said(store.post("index", request_))
    assert (answer.status, answer.error) == (400, sentence)


# --- orders ---


def test_a_load_is_answered_when_the_server_has_followed(store: Store) -> None:
    exchange = store.post("models/net/load")
    assert waits(exchange)
    order = store.ordered()
    assert (order.action, order.model, order.config) == (LOAD, "net", "")
    assert said(exchange) == (200, {"Content-Length": "0"}, b"")


def test_an_unload_too_whatever_depends_on_it(store: Store) -> None:
    for request in (None, {}, {"parameters": {"unload_dependents": True}}):
        exchange = store.post("models/net/unload", request)
        assert store.ordered().action == UNLOAD
        assert said(exchange).status == 200


def test_a_configuration_is_passed_on(store: Store) -> None:
    exchange = store.post("models/net/load", {"parameters": {"config": '{"max_batch_size": 4}'}})
    assert store.ordered().config == '{"max_batch_size": 4}'
    assert said(exchange).status == 200


@pytest.mark.parametrize("code", [BAD_INPUT, NOT_FOUND, UNAVAILABLE])
def test_what_cannot_be_loaded_is_said_as_triton_does(store: Store, code: str) -> None:
    exchange = store.post("models/net/load")
    store.ordered(Failure(code, "failed to load 'net': it is broken", 0))
    assert (said(exchange).status, said(exchange).error) == (400, "failed to load 'net': it is broken")


def test_what_may_be_asked_again_soon_says_so(store: Store) -> None:
    exchange = store.post("models/net/load")
    store.ordered(Failure(OVERLOADED, "64 models are being loaded; try again shortly", 1000))
    assert (said(exchange).status, said(exchange).headers["Retry-After"]) == (503, "1")


def test_an_order_ends_with_its_broker(store: Store) -> None:
    exchange = store.post("models/net/load")
    store.hear(BrokerLost("it ended"))
    assert said(exchange).status == 400
    assert "the broker went" in said(exchange).error
    answer = said(store.post("models/net/load"))
    assert (answer.status, answer.error) == (503, "no broker answers at /run/here")


def test_orders_under_way_are_bounded_and_who_leaves_makes_room(store: Store) -> None:
    exchanges = [store.post("models/net/load") for _ in range(ORDERS_MAX)]
    answer = said(store.post("models/net/load"))
    assert (answer.status, answer.error) == (503, f"{ORDERS_MAX} orders of this process are under way; try again later")
    assert exchanges[0].gone is not None
    exchanges[0].gone()
    last = store.post("models/net/load")
    assert waits(last)
    store.hear(FromBroker(Ordered(EPOCH, store.broker.heard[0].serial)))  # of the one that left: nobody waits for it
    store.ordered()
    assert (waits(exchanges[0]), said(last).status) == (True, 200)


def test_an_order_that_takes_too_long_is_said_to_go_on(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ORDER_WAIT_S", 0.01)
    answer = store.wait(store.post("models/net/load"))
    assert answer.status == 504
    assert answer.error.startswith("the load of model 'net' has not ended within 0.01 s; it goes on")
    store.ordered()  # nobody hears of it


@pytest.mark.parametrize(
    ("path", "request_", "sentence"),
    [
        ("net/load", [], "the request is not a JSON object"),
        ("net/load", {"parameters": 1}, "'parameters' is not a JSON object"),
        ("net/load", {"parameters": {"config": {}}}, "parameter 'config' is a string"),
        ("net/load", {"parameters": {"config": "[]"}}, "parameter 'config' is not a JSON object, as text"),
        ("net/load", {"parameters": {"config": "{"}}, "the request is not JSON: "),
        ("net/load", {"parameters": {"konfig": "{}"}}, "parameter 'konfig' is unknown; known are config and file:"),
        ("net/load", {"parameters": {"file:1/other.bin": ""}}, "parameter 'file:1/other.bin' does not name a file of"),
        ("net/load", {"parameters": {"file:../model.onnx": ""}}, "parameter 'file:../model.onnx' does not name a file"),
        ("net/unload", {"parameters": {"unload_dependents": 1}}, "parameter 'unload_dependents' is true or false"),
        ("..%2Fnet/load", None, "a model's name is one of a directory"),
        ("n" * 257 + "/load", None, "a model's name has at most 256 characters"),
    ],
)
def test_orders_that_cannot_be_passed_on(store: Store, path: str, request_: Any, sentence: str) -> None:
    answer = said(store.post(f"models/{path}", request_))
    assert (answer.status, answer.error[: len(sentence)]) == (400, sentence)
    assert store.broker.heard == []


def test_a_configuration_has_a_limit(store: Store) -> None:
    config = json.dumps({"x": "x" * MAX_CONFIG})
    answer = said(store.post("models/net/load", {"parameters": {"config": config}}))
    assert (answer.status, answer.error.split(",")[0]) == (413, f"a configuration has at most {MAX_CONFIG} characters")


def test_a_request_may_be_compressed(store: Store) -> None:
    body = gzip.compress(b'{"parameters": {"config": "{}"}}')
    exchange = store.begin("POST", "/v2/repository/models/net/load", body, Content_Encoding="gzip")
    assert store.ordered().config == "{}"
    assert said(exchange).status == 200


# --- new versions ---


def test_versions_are_published_under_a_number_or_the_next(store: Store) -> None:
    answer = store.put("net/versions/3", b"three")
    assert (answer.status, json.loads(answer.body)) == (200, {"name": "net", "version": "3"})
    answer = store.put("net/versions", b"four", "POST")
    assert (answer.status, json.loads(answer.body)) == (200, {"name": "net", "version": "4"})
    assert store.tree() == ["net", "net/3", "net/3/model.onnx", "net/4", "net/4/model.onnx"]
    assert (store.repository / "net/4/model.onnx").read_bytes() == b"four"


def test_a_large_file_comes_whole(store: Store) -> None:
    content = os.urandom(3 * module._CHUNK + 1)
    assert store.put("net/versions/1", content).status == 200
    assert (store.repository / "net/1/model.onnx").read_bytes() == content
    assert store.put("net/versions/2", gzip.compress(content), Content_Encoding="gzip").status == 200
    assert (store.repository / "net/2/model.onnx").read_bytes() == content


def test_a_version_that_is_there_is_not_replaced(store: Store) -> None:
    store.put("net/versions/3", b"three")
    answer = store.put("net/versions/3", b"other")
    assert (answer.status, answer.error.split(";")[0]) == (400, "version 3 of model 'net' is there already")
    assert (store.repository / "net/3/model.onnx").read_bytes() == b"three"


def test_files_that_come_with_a_load_are_published_first(store: Store) -> None:
    content = os.urandom(module._CHUNK + 5)
    parameters = {"file:7/model.onnx": base64.b64encode(content).decode(), "config": "{}"}
    exchange = store.post("models/net/load", {"parameters": parameters})
    store.loop.until(lambda: store.broker.heard)
    assert (store.repository / "net/7/model.onnx").read_bytes() == content
    assert store.ordered().config == "{}"
    assert said(exchange).status == 200


def test_a_file_that_is_not_base64_is_not_published(store: Store) -> None:
    answer = store.wait(store.post("models/net/load", {"parameters": {"file:7/model.onnx": "no base64!"}}))
    assert (answer.status, answer.error) == (400, "parameter 'file:7/model.onnx' is not base64")
    assert (store.tree(), store.broker.heard) == ([], [])


@pytest.mark.parametrize(
    ("path", "body", "sentence"),
    [
        ("net/versions/1", b"", "the body is empty; it is to be an ONNX file"),
        ("net/versions/latest", b"x", "a version is a whole number of at most 18 digits"),
        ("net/versions/..", b"x", "a version is a whole number"),
        ("..%2Fnet/versions/1", b"x", "a model's name is one of a directory, without / and without a dot in front"),
        (".net/versions/1", b"x", "a model's name is one of a directory"),
    ],
)
def test_what_cannot_be_published(store: Store, path: str, body: bytes, sentence: str) -> None:
    answer = store.put(path, body)
    assert (answer.status, answer.error[: len(sentence)]) == (400, sentence)
    assert store.tree() == []


def test_nothing_is_published_unless_it_may_be(loop: Loop, tmp_path: Path) -> None:
    store = Store(loop, tmp_path).join(ready())
    load = said(store.post("models/net/load", {"parameters": {"file:1/model.onnx": "eA=="}}))
    for answer in (store.put("net/versions/1", b"x"), store.put("net/versions", b"x", "POST"), load):
        assert answer.status == 403
        assert "set model_push = true in [gateway]" in answer.error
    assert store.tree() == []


def test_nothing_is_published_where_it_would_lie_elsewhere(store: Store) -> None:
    store.hear(FromBroker(Models(EPOCH, [ready()])))
    assert store.put("net/versions/1", b"x").status == 503
    store.hear(FromBroker(Models(EPOCH, [ready()], (), str(store.repository / "model.onnx"))))
    answer = store.put("net/versions/1", b"x")
    assert (answer.status, answer.error.split(";")[0].split("/")[-1]) == (400, "model.onnx is no model repository")


def test_who_leaves_while_it_is_written_leaves_nothing_behind(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, go_on, ended = threading.Event(), threading.Event(), threading.Event()
    parts = module._parts

    def slow(body: bytes, work: Any) -> Iterator[Any]:
        begun.set()
        assert go_on.wait(20)
        try:
            yield from parts(body, work)
        finally:
            ended.set()

    monkeypatch.setattr(module, "_parts", slow)
    exchange = store.begin("PUT", "/v2/repository/models/net/versions/1", b"model")
    store.loop.until(begun.is_set)
    assert exchange.gone is not None
    exchange.gone()
    go_on.set()
    store.loop.until(ended.is_set)
    store.loop.run(store.loop.loop.shutdown_default_executor())  # it has ended
    assert (store.tree(), waits(exchange)) == ([], True)


# --- labels and traffic ---


def test_a_label_is_asked_as_a_version(store: Store) -> None:
    store.join(ready(version="3"), ready(version="4"), routes=(Route("double", ("3",), (("canary", "4"),)),))
    assert json.loads(store.ask("GET", "/v2/models/double/versions/canary").body)["versions"] == ["4"]
    for path, status in (("", 200), ("/versions/canary", 200), ("/versions/4", 200), ("/versions/stable", 400)):
        assert store.ask("GET", f"/v2/models/double{path}/ready").status == status
    body = json.dumps({"inputs": [{"name": "x", "shape": [1, 2], "datatype": "FP32", "data": [1, 2]}]}).encode()
    store.begin("POST", "/v2/models/double/versions/canary/infer", body)
    [group] = store.sent().groups
    assert group.form.version == "4"


def test_traffic_is_split_and_sticks_by_the_header(store: Store) -> None:
    route = Route("double", ("3",), (("stable", "3"), ("canary", "4")), (("stable", 50), ("canary", 50)))
    store.join(ready(version="3"), ready(version="4"), routes=(route,))
    body = json.dumps({"inputs": [{"name": "x", "shape": [1, 2], "datatype": "FP32", "data": [1, 2]}]}).encode()

    def version(**headers: str) -> str:
        exchange = store.begin("POST", "/v2/models/double/infer", body, **headers)
        [group] = store.sent().groups
        assert exchange.gone is not None
        exchange.gone()
        store.sent()
        return group.form.version.removeprefix("~")

    assert {version() for _ in range(20)} == {"3", "4"}
    users = {f"user {each}": version(Penstock_Sticky=f"user {each}") for each in range(20)}
    assert set(users.values()) == {"3", "4"}
    assert all(version(Penstock_Sticky=user) == users[user] for user in users for _ in range(3))
    assert {json.loads(store.ask("GET", "/v2/models/double").body)["versions"][0] for _ in range(4)} == {"3"}


def test_what_does_not_stick_is_said(store: Store) -> None:
    answer = store.ask("GET", "/v2/models/double", Penstock_Sticky="x" * 257)
    assert answer.status == 400
    assert answer.error.startswith("the header Penstock-Sticky: what a request sticks to a version by is a text of at")
