"""The sockets around the caller core: with a real broker and worker, and with peers that say what none should."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import zmq

from penstock.client.arrays import Forms, decode_outcome
from penstock.client.calls import AGAIN, WAITING
from penstock.client.link import Link
from penstock.wire.codec import pack, unpack
from penstock.wire.connection import Connection
from penstock.wire.endpoints import BrokerAddress, parse_broker
from penstock.wire.events import FromBroker
from penstock.wire.messages import (
    FROM_CALLER,
    Bye,
    CallerHello,
    Form,
    Message,
    Metrics,
    Submit,
    Welcome,
    WorkerAddress,
    Workers,
)

if TYPE_CHECKING:
    from tests.client.conftest import End
    from tests.client.serving import Server

MakeLink = Callable[..., Link]


@pytest.fixture
def context() -> Iterator[zmq.Context[zmq.Socket[bytes]]]:
    """Ends only if every socket of it has been closed."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    yield context
    context.term()


@pytest.fixture
def link(server: Server) -> Iterator[Link]:
    """To the server of all tests."""
    link = Link(parse_broker(server.runtime), "", lambda metrics: None)
    yield link
    link.close()


class Peer:
    """A broker and a worker in the hands of a test, which may say anything."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], directory: Path, drive: Callable[..., None]) -> None:
        self._router, self._publisher = context.socket(zmq.ROUTER), context.socket(zmq.XPUB)
        for socket in (self._router, self._publisher):
            socket.setsockopt(zmq.RCVTIMEO, 10_000)
        self._context = context
        port = self._router.bind_to_random_port("tcp://127.0.0.1")
        self._address = f"tcp://127.0.0.1:{port}"
        self.worker = f"ipc://{directory}/worker.sock"
        self._publisher.bind(self.worker)
        self.link = Link(BrokerAddress(None, "127.0.0.1", port), "", lambda metrics: None)
        self._drive = drive
        self._open = True

    def close_link(self) -> None:
        if self._open:
            self._open = False
            self.link.close()

    def close(self) -> None:
        self.close_link()
        self._router.close(0)
        self._publisher.close(0)

    def restart(self) -> None:
        """Another broker listens where this one did."""
        address = self._address
        self._router.close(0)
        self._router = self._context.socket(zmq.ROUTER)
        self._router.setsockopt(zmq.RCVTIMEO, 10_000)
        self._drive(self.link, lambda: self._binds(address))

    def _binds(self, address: str) -> bool:
        try:
            self._router.bind(address)
        except zmq.ZMQError:  # libzmq closes the old one when it gets to it
            return False
        return True

    def hear(self, kind: type[Message]) -> Message:
        """What the link says next that is of this kind."""
        while True:
            if self._open:
                self._drive(self.link, lambda: self._router.poll(0))
            message = unpack(self._router.recv_multipart()[1], [], FROM_CALLER)
            if isinstance(message, kind):
                return message

    def say(self, *frames: bytes) -> None:
        self._router.send_multipart([self.link.caller.identity.id, *frames])

    def welcome(self) -> None:
        self.hear(CallerHello)
        self.say(pack(Welcome(5, "caller")))
        self._drive(self.link, lambda: self.link.caller.membership.joined)

    def publish(self, *frames: bytes) -> None:
        """To the link, which connects and subscribes first."""
        self._drive(self.link, lambda: self._publisher.poll(0))
        assert self._publisher.recv() == b"\1" + self.link.caller.identity.id
        self._publisher.send_multipart([self.link.caller.identity.id, *frames])

    def garbage(self) -> dict[str, float]:
        """How often, by who sent it."""
        samples = self.link.caller.meters.samples()
        return {each.labels[0]: each.value for each in samples if not isinstance(each.value, tuple)}


@pytest.fixture
def peer(context: zmq.Context[zmq.Socket[bytes]], serving: Any, tmp_path: Path) -> Iterator[Peer]:
    peer = Peer(context, tmp_path, serving.drive)
    yield peer
    peer.close()


# --- with a real server ---


def test_link_joins_and_learns_what_is_served(link: Link, serving: Any) -> None:
    serving.drive(link, lambda: link.caller.models is not None)
    assert link.caller.membership.joined
    assert link.caller.models is not None
    assert set(link.caller.models) == {"digits", "wide", "strings", "patient", "broken"}
    assert not link.caller.is_ready(), "one model is broken"


def test_requests_of_one_flush_come_back_each_to_its_own_sink(link: Link, serving: Any, end: Callable[[], End]) -> None:
    serving.drive(link, lambda: link.caller.models is not None)
    spec, forms, ends = link.caller.find("digits"), Forms(), [end() for _ in range(5)]
    images = np.random.default_rng(1).random((5, 1, 1, 8, 8), np.float32)
    for image, each in zip(images, ends, strict=True):
        form, parts = forms.build(spec, {"image": image}, ())
        link.caller.submit(form, b"".join(parts), 20.0, each, time.monotonic())
    link.flush()
    serving.drive(link, lambda: all(each.calls for each in ends))
    scores = [decode_outcome(each.answers[0].body, each.answers[0].payload)[1]["scores"] for each in ends]
    assert {each.shape for each in scores} == {(1, 10)}
    assert len({each.tobytes() for each in scores}) == 5


def test_whole_servers_metrics_come_when_asked_for(server: Server, serving: Any) -> None:
    reports: list[Metrics] = []
    link = Link(parse_broker(server.runtime), "a test", reports.append)
    try:
        serving.drive(link, lambda: link.caller.membership.joined)
        link.pump()  # its first beat
        serial, say = link.caller.ask_metrics()
        link.say(say.message)
        serving.drive(link, lambda: reports)
        assert reports[0].serial == serial
        snapshots = {snapshot.name: {sample.family for sample in snapshot.samples} for snapshot in reports[0].snapshots}
        assert snapshots.keys() == {"broker", "cpu", "a test"}
        assert "penstock_callers" in snapshots["broker"]
        assert "penstock_process_cpu_seconds" in snapshots["a test"]
    finally:
        link.close()


def test_idle_link_is_not_due_before_its_next_beat(link: Link, serving: Any) -> None:
    serving.drive(link, lambda: link.caller.models is not None and link.due() > time.monotonic() + 0.5)
    link.pump()
    assert link.due() > time.monotonic() + 0.5


# --- with peers that say what none should ---


def test_link_says_bye_when_it_closes(peer: Peer) -> None:
    peer.welcome()
    peer.close_link()
    assert peer.hear(Bye) == Bye(5)


def test_garbage_is_dropped_and_counted_by_who_sent_it(peer: Peer, serving: Any) -> None:
    peer.welcome()
    for frames in ([b""], [b"\xc1"], [pack(CallerHello(5, "", 1, True))], [pack(Welcome(5, "")), b"more"]):
        peer.say(*frames)
    peer.say(pack(Workers(5, [WorkerAddress(b"worker 1", peer.worker)])))
    peer.publish(b"\xc1")
    serving.drive(peer.link, lambda: peer.garbage() == {"broker": 4, "worker": 1})
    assert peer.link.caller.membership.joined


def test_result_without_a_head_is_garbage(peer: Peer, serving: Any) -> None:
    peer.welcome()
    peer.say(pack(Workers(5, [WorkerAddress(b"worker 1", peer.worker)])))
    peer.publish()
    serving.drive(peer.link, lambda: peer.garbage() == {"worker": 1})


def test_address_that_is_none_is_logged_and_left_out(
    peer: Peer, serving: Any, caplog: pytest.LogCaptureFixture
) -> None:
    peer.welcome()
    nonsense = WorkerAddress(b"worker 1", "nonsense")
    good = WorkerAddress(b"worker 2", peer.worker)
    peer.say(pack(Workers(5, [nonsense, good])))
    peer.publish(b"\xc1")
    serving.drive(peer.link, lambda: peer.garbage() == {"worker": 1})
    peer.say(pack(Workers(5, [good])))
    peer.say(b"")
    serving.drive(peer.link, lambda: peer.garbage() == {"worker": 1, "broker": 1})
    said = [record.__dict__["fields"]["endpoint"] for record in caplog.records if "cannot be used" in record.message]
    assert said == ["nonsense"]


def test_requests_that_cannot_be_sent_wait_for_a_broker(form: Callable[..., Form], end: Callable[[], End]) -> None:
    """As when the connection breaks and the broker lives on: nobody has them, and nobody would ever answer."""
    link = Link(BrokerAddress(None, "127.0.0.1", 1), "", lambda metrics: None)
    try:
        link.caller.handle(FromBroker(Welcome(5, "caller")), 0.0)
        unsent = end()
        link.caller.submit(form(), b"12345678", 60.0, unsent, 0.0)
        link.flush()
        assert not link.caller.membership.joined
        assert [call.state for call in link.caller.calls.values()] == [AGAIN]
        assert unsent.calls == 0
    finally:
        link.close()


def test_connection_that_breaks_is_made_again_and_what_is_under_way_sent_again(
    peer: Peer, serving: Any, form: Callable[..., Form], end: Callable[[], End]
) -> None:
    """Without a control connection nothing else tells of it."""
    peer.welcome()
    peer.link.caller.submit(form(), b"12345678", 60.0, end(), time.monotonic())
    peer.link.flush()
    for _ in range(2):
        peer.restart()
        peer.welcome()
        submit = peer.hear(Submit)
        assert isinstance(submit, Submit)
        assert [group.ids for group in submit.groups] == [(1,)]
    peer.close_link()
    assert peer.hear(Bye) == Bye(5)


def test_what_the_broker_does_not_read_waits_in_the_core(
    peer: Peer,
    serving: Any,
    form: Callable[..., Form],
    end: Callable[[], End],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    peer.welcome()
    with monkeypatch.context() as full:
        full.setattr(Connection, "full", True)
        for _ in range(2):
            peer.link.caller.submit(form(), b"12345678", 60.0, end(), time.monotonic())
            peer.link.flush()
            peer.link.pump()
        assert [call.state for call in peer.link.caller.calls.values()] == [WAITING] * 2
        assert peer.link.due() > time.monotonic(), "a loop does not spin meanwhile"
    assert [record.message for record in caplog.records if record.levelname == "WARNING"] == [
        "the broker takes no messages; requests wait"
    ]
    peer.link.pump()
    submit = peer.hear(Submit)
    assert isinstance(submit, Submit)
    assert [group.ids for group in submit.groups] == [(1,), (2,)]


def test_all_that_an_owner_flushes_later_leaves_in_one_message(
    peer: Peer, form: Callable[..., Form], end: Callable[[], End]
) -> None:
    peer.welcome()
    link = peer.link
    for ask_more in (True, False):
        link.caller.submit(form(), b"x" * 8, 60.0, end(), time.monotonic())
        link.will_flush = ask_more
        link.pump()  # in the turn in which it was submitted
    message = peer.hear(Submit)
    assert isinstance(message, Submit)
    assert [group.ids for group in message.groups] == [(1,), (2,)]
    assert not link.caller.has_news


def test_nothing_is_no_message(peer: Peer, form: Callable[..., Form], end: Callable[[], End]) -> None:
    peer.welcome()
    link = peer.link
    link.flush()
    link.caller.submit(form(), b"x" * 8, 60.0, end(), time.monotonic())
    link.flush()
    link.flush()
    link.caller.cancel(1)
    link.flush()
    first, second = peer.hear(Submit), peer.hear(Submit)
    assert isinstance(first, Submit)
    assert isinstance(second, Submit)
    assert [group.ids for group in first.groups] == [(1,)]
    assert (list(second.groups), list(second.cancels)) == ([], [1])


def test_closed_link_leaves_no_descriptor(server: Server, serving: Any) -> None:
    before = os.listdir("/proc/self/fd")
    link = Link(parse_broker(server.runtime), "", lambda metrics: None)
    serving.drive(link, lambda: link.caller._arenas)
    assert len(os.listdir("/proc/self/fd")) > len(before)
    link.close()
    assert os.listdir("/proc/self/fd") == before
