"""Peers that send garbage over the sockets: counted, logged, dropped; nobody dies of it, nobody else notices."""

from __future__ import annotations

import os
import random
import socket
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import msgpack
import numpy as np
import pytest
import zmq
from zmq.utils.monitor import recv_monitor_message

from penstock.client import Client
from penstock.wire.control import HELLO_BYTES
from penstock.wire.listener import SUBSCRIPTION_MAX_BYTES
from penstock.wire.messages import MAX_HEAD_BYTES
from tests.system.servers import Server, wait_for

ROW = {"x": np.ones((1, 4), np.float32)}


@pytest.fixture
def context() -> Iterator[zmq.Context[zmq.Socket[bytes]]]:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    context.linger = 0
    yield context
    context.destroy(linger=0)


def garbage(seed: int) -> Iterator[list[bytes]]:
    """Messages that are almost, or not at all, what the protocol says."""
    source = random.Random(seed)
    yield [b""]
    yield [b"\xc1"]
    yield [b"\x91" * 100_000]
    yield [os.urandom(10_000)] * 50
    for tag in range(40):
        yield [msgpack.packb([1, tag, 0])]
        yield [msgpack.packb([1, tag, 1, [], [], [], b""])]
        yield [
            msgpack.packb([1, tag, source.getrandbits(63), *[source.choice([None, -1, "x", b"x", [], {}, 1.5])] * 5])
        ]
    yield [msgpack.packb([2, 1, 0, "client", 1, True])]
    yield [msgpack.packb([1, 1, 0, "x" * 100_000, 1, True])]


def still_serves(server: Server) -> None:
    with Client(server.runtime) as client:
        np.testing.assert_array_equal(client.infer("dense", ROW)["y"].shape, (1, 3))


def counted(server: Server, count: float) -> bool:
    return bad_messages(server) >= count


def bad_messages(server: Server) -> float:
    return sum(value for name, value in server.metrics().items() if name.startswith("penstock_bad_messages_total"))


@pytest.mark.parametrize("end", ["callers.sock", "workers.sock"])
def test_garbage_to_the_broker(server: Server, context: zmq.Context[zmq.Socket[bytes]], end: str) -> None:
    before = bad_messages(server)
    with context.socket(zmq.DEALER) as dealer:
        dealer.set(zmq.IDENTITY, b"garbage!")
        dealer.connect(f"ipc://{server.runtime / end}")
        for message in garbage(1):
            dealer.send_multipart(message)
        wait_for(lambda: bad_messages(server) > before + 40, "garbage to be counted")
    still_serves(server)
    assert any(line["event"] == "bad message dropped" and line["peer"] == b"garbage!".hex() for line in server.log())


def test_identities_that_are_none(server: Server, context: zmq.Context[zmq.Socket[bytes]]) -> None:
    before = bad_messages(server)
    for count, identity in enumerate((b"x", b"x" * 200), start=1):
        with context.socket(zmq.DEALER) as dealer:
            dealer.set(zmq.IDENTITY, identity)
            dealer.connect(f"ipc://{server.runtime / 'callers.sock'}")
            dealer.send(msgpack.packb([1, 1, 0, "", 1, True]))
            wait_for(partial(counted, server, before + count), "it to be counted")
    still_serves(server)


def test_garbage_and_greedy_subscriptions_to_a_worker(server: Server, context: zmq.Context[zmq.Socket[bytes]]) -> None:
    [path] = [path for path in server.runtime.iterdir() if path.name.startswith("worker-") and path.suffix == ".sock"]
    before = bad_messages(server)
    with context.socket(zmq.XSUB) as listener:
        listener.connect(f"ipc://{path}")
        for count, said in enumerate((b"\x01", b"\x01abc", b"\x01" + b"x" * 100_000), start=1):
            listener.send(said)
            wait_for(partial(counted, server, before + count), "garbage to be counted")
        for said in (b"\x07whatever", b""):
            listener.send(said)
        still_serves(server)
        assert not listener.poll(0), "who subscribes to everything hears nothing"


def test_garbage_to_the_control_socket(server: Server) -> None:
    for packet in (b"x", b"x" * HELLO_BYTES, b"x" * 100_000):
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as peer:
            peer.connect(str(server.runtime / "control.sock"))
            peer.send(packet)
            peer.settimeout(30)
            assert peer.recv(1) == b"", "the broker closes it"
    still_serves(server)


@pytest.mark.parametrize("where", ["workers", "results"])
def test_who_sends_more_than_may_come_there_is_cut_off(
    server: Server, context: zmq.Context[zmq.Socket[bytes]], where: str
) -> None:
    """Before it takes memory, and nobody else notices."""
    if where == "workers":
        path, peer, frames = server.runtime / "workers.sock", context.socket(zmq.DEALER), [bytes(MAX_HEAD_BYTES + 1)]
    else:
        [path] = server.runtime.glob("worker-*.sock")
        peer, frames = context.socket(zmq.XSUB), [b"\x02" + bytes(SUBSCRIPTION_MAX_BYTES)]
    before = server.children("broker") + server.children("worker")
    events = zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED
    with peer, peer.get_monitor_socket(events) as watch, Client(server.runtime) as client:
        client.infer("dense", ROW)
        peer.set(zmq.RECONNECT_IVL, -1)
        peer.connect(f"ipc://{path}")
        assert watch.poll(30_000), "no connection"
        assert recv_monitor_message(watch)["event"] == zmq.EVENT_HANDSHAKE_SUCCEEDED
        peer.send_multipart(frames, copy=False)
        assert watch.poll(30_000), "it is not cut off"
        assert recv_monitor_message(watch)["event"] == zmq.EVENT_DISCONNECTED
        client.infer("dense", ROW)
        peer.disable_monitor()
    still_serves(server)
    assert server.children("broker") + server.children("worker") == before


def test_the_runtime_directory_is_closed_to_others(server: Server) -> None:
    assert Path(server.runtime).stat().st_mode & 0o077 == 0
