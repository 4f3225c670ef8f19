"""The broker as a process: real sockets, a real signal, and peers that are threads of this one."""

from __future__ import annotations

import os
import select
import signal
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import zmq

from penstock.broker.options import BrokerOptions
from penstock.broker.process import BrokerProcess, BrokerSettings, bind_tcp
from penstock.wire import control
from penstock.wire.arena import Arena
from penstock.wire.codec import pack, unpack
from penstock.wire.doors import Doors
from penstock.wire.endpoints import EndpointError, Guard, RuntimeDir
from penstock.wire.listener import Listener
from penstock.wire.messages import (
    TO_CALLER,
    TO_WORKER,
    Ask,
    Assign,
    Attached,
    Bye,
    CallerHello,
    Carrier,
    Done,
    Expect,
    Finished,
    Form,
    HelloWanted,
    Message,
    Metrics,
    Models,
    Refusals,
    Requests,
    Submit,
    Welcome,
    WorkerHello,
)
from tests.broker.conversation import model

WAIT_S = 20.0
SECOND = 1_000_000


class Peer:
    """A caller or worker on a broker's sockets, by libzmq."""

    def __init__(self, context: zmq.Context[Any], address: str, number: bytes) -> None:
        self.id = number
        self.epoch = 0
        self.kinds: dict[int, type[Message]] = {**TO_CALLER, **TO_WORKER}
        self.socket = context.socket(zmq.DEALER)
        self.socket.set(zmq.IDENTITY, number)
        self.socket.set(zmq.IMMEDIATE, 1)  # who sends waits until the connection stands
        for limit in zmq.RCVTIMEO, zmq.SNDTIMEO:
            self.socket.set(limit, int(WAIT_S * 1000))
        self.socket.connect(address)

    def say(self, message: Message) -> None:
        message.epoch = self.epoch
        self.say_bytes(pack(message), message.frames if isinstance(message, Carrier) else ())

    def say_bytes(self, head: bytes, frames: Any = ()) -> None:
        self.socket.send_multipart([head, *frames])

    def hear(self, kind: type[Message]) -> Any:
        """The next message of a kind; others before it are passed over."""
        while True:
            head, *frames = self.socket.recv_multipart()
            message = unpack(head, frames, self.kinds)
            if isinstance(message, kind):
                return message

    def join(self, hello: Message) -> None:
        self.say(hello)
        self.epoch = self.hear(Welcome).epoch

    def join_as_caller(self) -> None:
        self.join(CallerHello(0, "", 1, True))
        self.hear(Models)

    def join_as_worker(self, *callers: bytes) -> None:
        """``callers``: those that are there and hear it."""
        self.join(WorkerHello(0, "w", "cpu", 1, (), 1, (model(),)))
        if callers:
            self.attach(*callers)

    def attach(self, *callers: bytes) -> None:
        """Say that these hear it, once they are all expected."""
        waited = set(callers)
        while waited:
            for expected in self.hear(Expect).callers:
                if expected.caller in waited:
                    waited.remove(expected.caller)
                    self.say(Attached(0, expected.caller, expected.serial, True))


def ask(number: int, size: int = 0, timeout_us: int = 60 * SECOND, version: str = "1") -> Submit:
    payload = bytes([number]) * size
    inline = size <= 16 * 1024
    groups = [Requests(Form("m", version, 0, "", 1, size, b"", b"layout"), (number,), (timeout_us,))]
    return Submit(0, groups, blob=payload if inline else b"", frames=() if inline else [payload])


@pytest.fixture
def runtime(tmp_path: Path) -> RuntimeDir:
    return RuntimeDir(tmp_path / "run")


@pytest.fixture
def context() -> Iterator[zmq.Context[Any]]:
    context: zmq.Context[Any] = zmq.Context()
    yield context
    context.term()


@pytest.fixture
def routers() -> Iterator[list[Listener]]:
    with select.epoll() as epoll:
        routers = [Listener(epoll, "ROUTER", 1, Doors(), lambda peer, wrong: None) for _ in range(4)]
        yield routers
        for router in routers:
            router.close()


@pytest.fixture
def serve(runtime: RuntimeDir, context: zmq.Context[Any]) -> Iterator[Callable[..., None]]:
    """Runs a broker in this thread while the peers in ``talk`` speak in another; ends it with a signal after them."""
    peers: list[Peer] = []

    def make(role: str, number: bytes) -> Peer:
        path = runtime.callers if role == "caller" else runtime.workers
        peers.append(Peer(context, f"ipc://{path}", number))
        return peers[-1]

    def run(talk: Callable[[Callable[[str, bytes], Peer]], None], ends: bool = True, **settings: Any) -> None:
        def talk_and_end() -> None:
            try:
                talk(make)
            finally:
                if ends:
                    os.kill(os.getpid(), signal.SIGTERM)

        process = BrokerProcess(BrokerSettings(runtime=runtime, **settings))
        process.start()
        try:
            with ThreadPoolExecutor(1) as pool:
                future = pool.submit(talk_and_end)
                process.serve()
                future.result()
        finally:
            process.stop()

    yield run
    for peer in peers:
        peer.socket.close(0)


@pytest.mark.parametrize("size", [0, 100, 200_000])
def test_a_request_goes_from_its_caller_to_a_worker_and_ends(serve: Callable[..., None], size: int) -> None:
    def talk(make: Callable[[str, bytes], Peer]) -> None:
        caller, worker = make("caller", b"caller00"), make("worker", b"worker00")
        worker.join_as_worker()
        caller.join_as_caller()
        worker.attach(caller.id)
        caller.say(ask(7, size))
        work = worker.hear(Assign)
        assert [(group.caller, group.ids) for group in work.groups] == [(caller.id, (7,))]
        assert (work.blob or b"".join(work.frames)) == bytes([7]) * size
        worker.say(Done(0, [Finished(caller.id, 1, 0, (7,))]))
        caller.say(Submit(0, (), (7, 7)))
        assert worker.hear(Assign).freed == ((caller.id, (7, 7)),)

    serve(talk)


def test_what_is_asked_is_recorded_whether_or_not_it_is_accepted(serve: Callable[..., None], tmp_path: Path) -> None:
    def talk(make: Callable[[str, bytes], Peer]) -> None:
        caller, worker = make("caller", b"caller00"), make("worker", b"worker00")
        caller.join_as_caller()
        caller.say(ask(1, version=""))
        caller.hear(Refusals)
        worker.join_as_worker(caller.id)
        caller.say(ask(2, 100))
        worker.hear(Assign)

    serve(talk, record=tmp_path / "trace", options=BrokerOptions(drain_max_s=0.0))
    head, *groups = (tmp_path / "trace").read_text().splitlines()
    assert head.startswith('{"penstock_trace":1,')
    assert [line.partition(",")[2] for line in groups] == [
        f'"m","",1,1,0,"",0,{60 * SECOND}]',
        f'"m","1",1,1,100,"",0,{60 * SECOND}]',
    ]


def test_a_trace_that_cannot_be_written_keeps_nobody_from_being_served(serve: Callable[..., None]) -> None:
    def talk(make: Callable[[str, bytes], Peer]) -> None:
        caller, worker = make("caller", b"caller00"), make("worker", b"worker00")
        worker.join_as_worker()
        caller.join_as_caller()
        worker.attach(caller.id)
        caller.say(ask(2, 100))
        worker.hear(Assign)

    serve(talk, record=Path("/dev/full"), options=BrokerOptions(drain_max_s=0.0))


def test_who_ends_its_control_connection_is_gone_at_once(serve: Callable[..., None], runtime: RuntimeDir) -> None:
    def talk(make: Callable[[str, bytes], Peer]) -> None:
        first, second, caller = make("worker", b"worker00"), make("worker", b"worker01"), make("caller", b"caller00")
        held = control.connect(runtime.control, first.id)
        assert held is not None
        first.join_as_worker()
        caller.join_as_caller()
        first.attach(caller.id)
        caller.say(ask(1))
        assert first.hear(Assign).groups[0].attempt == 1
        second.join_as_worker(caller.id)
        held.close()
        assert second.hear(Assign).groups[0].attempt == 2

    serve(talk, options=BrokerOptions(silence_max_s=1000.0, drain_max_s=0.0))


def test_what_lies_in_an_arena_is_brought_to_who_cannot_read_it(
    serve: Callable[..., None], runtime: RuntimeDir
) -> None:
    """Four requests in one message: in the arena or in the message, small and large."""
    sizes, places = (3000, 20_000, 3000, 20_000), (64, 4096, None, None)
    payloads = [bytes([number]) * size for number, size in enumerate(sizes)]
    arena = Arena(1 << 16, "test")
    groups: list[Requests] = []
    for number, (size, place) in enumerate(zip(sizes, places, strict=True)):
        form = Form("m", "1", 0, "", 1, size, b"", b"%d" % number)
        groups.append(Requests(form, (number + 1,), (60 * SECOND,), () if place is None else (place,)))
        if place is not None:
            arena.view(place, size)[:] = payloads[number]

    def talk(make: Callable[[str, bytes], Peer]) -> None:
        far, caller = make("worker", b"worker00"), make("caller", b"caller00")
        held = control.connect(runtime.control, caller.id, arena.fd)
        assert held is not None
        caller.join_as_caller()
        far.join_as_worker(caller.id)
        caller.say(Submit(0, groups, blob=payloads[2], frames=[payloads[3]]))
        brought = far.hear(Assign)
        assert [group.places for group in brought.groups] == [()] * 4
        for group, start in zip(brought.groups, brought.starts, strict=True):
            [number] = group.ids
            small = group.nbytes == 3000
            assert (brought.blob[start : start + 3000] if small else brought.frames[start]) == payloads[number - 1]
        held.close()

    serve(talk, options=BrokerOptions(drain_max_s=0.0))
    arena.close()


def test_a_broker_survives_whatever_comes_and_counts_it(serve: Callable[..., None], runtime: RuntimeDir) -> None:
    def talk(make: Callable[[str, bytes], Peer]) -> None:
        short, many, caller = make("caller", b"short"), make("caller", b"many...."), make("caller", b"caller00")
        short.say_bytes(b"\x93\x01\x05\x00")
        for garbage in (b"", b"\xc1", b"x" * 1000, b"\x91" * 2000, pack(Assign(0, ()))):
            caller.say_bytes(garbage, [b"", b"x" * 100])
        many.say_bytes(pack(Bye(0)), [b""] * 5000)  # which ends its connection
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as stranger:
            stranger.connect(str(runtime.control))
            stranger.send(b"GET / HTTP/1.1")
            assert select.select([stranger], [], [], WAIT_S)[0]
        caller.join_as_caller()
        caller.say(Ask(0, 1))
        broker = caller.hear(Metrics).snapshots[0]
        counted = {each.labels: each.value for each in broker.samples if each.family == "penstock_bad_messages"}
        assert counted == {("caller",): 7, ("control",): 1}

    serve(talk)


def test_a_peer_of_an_earlier_broker_is_asked_to_say_hello(serve: Callable[..., None]) -> None:
    def talk(make: Callable[[str, bytes], Peer]) -> None:
        caller = make("caller", b"caller00")
        caller.epoch = 12345
        caller.say(ask(1))
        assert caller.hear(HelloWanted).epoch != 12345

    serve(talk)


def test_deadlines_pass_without_anything_happening(serve: Callable[..., None]) -> None:
    def talk(make: Callable[[str, bytes], Peer]) -> None:
        caller, worker = make("caller", b"caller00"), make("worker", b"worker00")
        worker.join_as_worker()
        caller.join_as_caller()
        caller.say(ask(1, timeout_us=20_000))
        [refusal] = caller.hear(Refusals).refusals
        assert (refusal.id, refusal.code) == (1, "deadline")

    serve(talk)


def test_a_signal_drains_and_then_everybody_is_told(serve: Callable[..., None], runtime: RuntimeDir) -> None:
    def talk(make: Callable[[str, bytes], Peer]) -> None:
        caller, worker = make("caller", b"caller00"), make("worker", b"worker00")
        worker.join_as_worker()
        caller.join_as_caller()
        worker.attach(caller.id)
        caller.say(ask(1))
        worker.hear(Assign)
        os.kill(os.getpid(), signal.SIGTERM)
        worker.say(Done(0, [Finished(caller.id, 1, 0, (1,))]))
        caller.say(Submit(0, (), (1, 1)))
        for peer in (caller, worker):
            peer.hear(Bye)

    serve(talk, ends=False)
    assert list(runtime.path.iterdir()) == []


def test_draining_ends_when_its_time_is_up(serve: Callable[..., None]) -> None:
    def talk(make: Callable[[str, bytes], Peer]) -> None:
        caller, worker = make("caller", b"caller00"), make("worker", b"worker00")
        worker.join_as_worker()
        caller.join_as_caller()
        caller.say(ask(1))
        caller.say(Ask(0, 1))
        caller.hear(Metrics)  # so the request is in
        os.kill(os.getpid(), signal.SIGTERM)
        caller.hear(Bye)

    serve(talk, ends=False, options=BrokerOptions(drain_max_s=0.05))


def test_a_second_broker_in_the_same_directory_does_not_start(serve: Callable[..., None], runtime: RuntimeDir) -> None:
    def talk(make: Callable[[str, bytes], Peer]) -> None:
        with pytest.raises(EndpointError, match=r"callers.sock is in use by another process"):
            Guard(runtime.callers)
        make("caller", b"caller00").join_as_caller()  # the first one does not notice

    serve(talk)


def port_of(bound: Listener) -> int:
    [port] = bound.ports
    return port


def test_a_broker_listens_on_a_port_and_the_next(routers: list[Listener]) -> None:
    bind_tcp("tcp://127.0.0.1:0", *routers[:2])
    port = port_of(routers[0])
    assert port_of(routers[1]) == port + 1
    with pytest.raises(EndpointError, match=rf"cannot listen on tcp://127.0.0.1:{port} and the port after it"):
        bind_tcp(f"tcp://127.0.0.1:{port}", *routers[2:])


@pytest.mark.parametrize(
    ("address", "sentence"),
    [
        ("tcp://0.0.0.0:1", "0.0.0.0 can be reached from other machines"),
        ("tcp://127.0.0.1", "is not of the form HOST:PORT"),
        ("127.0.0.1:1", "is not of the form tcp://HOST:PORT"),
    ],
)
def test_an_address_that_a_broker_may_not_use_is_refused(routers: list[Listener], address: str, sentence: str) -> None:
    with pytest.raises(EndpointError, match=sentence):
        bind_tcp(address, *routers[:2])
