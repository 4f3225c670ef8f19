"""``/events`` on real connections: a reading a second for all who listen, and none for nobody."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from penstock.gateway.connection import Exchange
from penstock.gateway.feed import Feed
from penstock.gateway.reports import Reports
from penstock.wire.errors import PenstockError
from penstock.wire.messages import Metrics, Snapshot
from penstock.wire.metrics import Sample
from penstock.wire.models import READY, ModelState
from tests.gateway.serving import Chunks, Echo, Loop, Peer, Serving

Serve = Callable[..., Serving]
OWN = Snapshot("gateway-0", (Sample("penstock_http_connections", (), 3.0),))
GET = b"GET /events HTTP/1.1\r\nHost: a\r\n\r\n"


class Desk(Echo):
    """An application that has nothing but a feed, which asks a broker that counts."""

    def __init__(self, loop: Loop) -> None:
        super().__init__()
        self.up = True
        self.answers = True
        self.asked = 0
        self.reports = Reports(loop.loop, self._ask_broker, lambda: OWN, 0.02)
        self.models = [ModelState("m", "1", READY, "", None)]
        self.feed = Feed(loop.loop, self.reports, lambda: "gateway-0", lambda: self.models, 0.01)
        self._loop = loop

    def _ask_broker(self) -> int | None:
        if not self.up:
            return None
        self.asked += 1
        counted = Snapshot("broker", (Sample("penstock_requests", ("m", "1"), 10.0 * self.asked),))
        if self.answers:
            self._loop.loop.call_soon(self.reports.arrived, Metrics(1, self.asked, (counted,)))
        return self.asked

    def tell(self, exchange: Exchange) -> None:
        try:
            self.feed.join(exchange)
        except PenstockError as error:
            exchange.answer_error(503, error.message)


@pytest.fixture
def desk(loop: Loop) -> Desk:
    return Desk(loop)


class Listener:
    def __init__(self, peer: Peer) -> None:
        peer.send(GET)
        self.peer = peer
        self._chunks = Chunks(peer)
        self.headers = self._chunks.head()
        self._heard = ""

    def event(self) -> dict[str, Any]:
        """The next that says something."""
        while True:
            while "\n\n" not in self._heard:
                data = self._chunks.next()
                assert data, "there will be no more"
                self._heard += data.decode()
            event, _, self._heard = self._heard.partition("\n\n")
            if event.startswith("data: "):
                told: dict[str, Any] = json.loads(event.removeprefix("data: "))
                return told
            assert event == "retry: 1000"

    def ended(self) -> bool:
        while self._chunks.next():
            pass
        return self.peer.rest() == b""


def test_who_listens_is_told_again_and_again(desk: Desk, serve: Serve) -> None:
    listener = Listener(serve(desk).connect())
    assert listener.headers["content-type"] == "text/event-stream"
    assert listener.headers["cache-control"] == "no-store"
    first, second = listener.event(), listener.event()
    assert (first["seconds"], first["broker"], first["gateway"]) == (0, True, "gateway-0")
    assert [model["name"] for model in first["models"]] == ["m"]
    assert first["problems"] == ["no worker has joined"]
    assert second["seconds"] > 0
    assert second["rate"] == pytest.approx(10 / second["seconds"], rel=0.1)


def test_all_who_listen_are_told_the_same_of_one_question(desk: Desk, serve: Serve) -> None:
    serving = serve(desk)
    listeners = [Listener(serving.connect()) for _ in range(5)]
    for listener in listeners:
        for _ in range(4):
            assert listener.event()["broker"]
    assert desk.asked < 5 * 4, "not once for each of them"


def test_nobody_is_asked_while_nobody_listens(desk: Desk, serve: Serve, loop: Loop) -> None:
    serving = serve(desk)
    loop.settle()
    assert desk.asked == 0
    listener = Listener(serving.connect())
    listener.event()
    listener.peer.reset()
    serving.ended()
    loop.until(lambda: not desk.feed._asking)
    asked = desk.asked
    later: list[bool] = []
    loop.loop.call_later(0.05, later.append, True)  # five times as long as between two questions
    loop.until(lambda: later)
    assert desk.asked == asked
    assert Listener(serving.connect()).event()["broker"]
    assert desk.asked > asked


def test_without_a_broker_the_gateway_speaks_for_itself(desk: Desk, serve: Serve) -> None:
    desk.up = False
    view = Listener(serve(desk).connect()).event()
    assert not view["broker"]
    assert view["problems"][0].startswith("no broker answers")
    assert [(each["name"], each["connections"]) for each in view["processes"]] == [("gateway-0", 3)]


def test_a_broker_that_does_not_answer_ends_nothing(desk: Desk, serve: Serve) -> None:
    listener = Listener(serve(desk).connect())
    assert listener.event()["broker"]
    desk.answers = False
    while listener.event()["broker"]:
        pass
    desk.answers = True
    while not listener.event()["broker"]:
        pass


def test_a_reading_that_cannot_be_told_does_not_end_the_feed(desk: Desk, serve: Serve, loop: Loop) -> None:
    listener = Listener(serve(desk).connect())
    listener.event()
    good, desk.models = desk.models, None  # type: ignore[assignment]
    loop.until(lambda: loop.errors)
    desk.models = good
    loop.errors.clear()
    assert listener.event()["models"]


def test_draining_gateway_sends_listeners_away(desk: Desk, serve: Serve, loop: Loop) -> None:
    serving = serve(desk)
    listener = Listener(serving.connect())
    listener.event()
    serving.http.drain()
    assert listener.ended()
    loop.until(lambda: not desk.feed._asking)
    loop.run(serving.http.drained.wait())


def test_too_many_listeners_are_refused(desk: Desk, serve: Serve) -> None:
    serving = serve(desk, streams_max=1)
    first = Listener(serving.connect())
    second = serving.connect()
    second.send(GET)
    assert second.response().status == 503
    assert first.event()["broker"]
