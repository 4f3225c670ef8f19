"""Where a worker's results can be heard. (The rest of the process is tested with real ones, in tests/system.)"""

from __future__ import annotations

import select
import socket
from collections.abc import Iterator

import pytest

from penstock.wire.doors import Doors
from penstock.wire.endpoints import EndpointError
from penstock.wire.listener import Listener
from penstock.worker.process import bind_results


@pytest.fixture
def results() -> Iterator[Listener]:
    with select.epoll() as epoll:
        publisher = Listener(epoll, "XPUB", 1, Doors(), lambda peer, wrong: None)
        yield publisher
        publisher.close()


@pytest.mark.parametrize(("host", "told"), [("127.0.0.1", "127.0.0.1"), ("127.5.5.5",) * 2, ("localhost", "127.0.0.1")])
def test_any_port_of_the_loopback_is_found_and_told(results: Listener, host: str, told: str) -> None:
    bound = bind_results(f"tcp://{host}:0", results)
    assert bound.startswith(f"tcp://{told}:")
    with socket.create_connection((told, int(bound.rpartition(":")[2])), timeout=10):
        pass


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="this machine has no IPv6")
def test_ipv6_is_written_in_brackets(results: Listener) -> None:
    bound = bind_results("tcp://[::1]:0", results)
    assert bound.startswith("tcp://[::1]:")
    with socket.create_connection(("::1", int(bound.rpartition(":")[2])), timeout=10):
        pass


def test_port_that_was_chosen_is_kept(results: Listener) -> None:
    with socket.create_server(("127.0.0.1", 0)) as chosen:
        port = chosen.getsockname()[1]
    assert bind_results(f"tcp://127.0.0.1:{port}", results) == f"tcp://127.0.0.1:{port}"


def test_port_that_is_taken_is_an_error_that_names_it(results: Listener) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"tcp://127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(EndpointError, match=f"cannot listen on {address}: Address already in use"):
            bind_results(address, results)


@pytest.mark.parametrize(
    "address", ["ipc:///tmp/x", "127.0.0.1:0", "", "tcp:/127.0.0.1:0", "TCP://127.0.0.1:0", "udp://127.0.0.1:0"]
)
def test_address_that_is_not_tcp_is_refused(results: Listener, address: str) -> None:
    with pytest.raises(EndpointError, match=r"--bind .* is not of the form tcp://HOST:PORT"):
        bind_results(address, results)


@pytest.mark.parametrize(
    "address",
    [
        "tcp://127.0.0.1",
        "tcp://127.0.0.1:",
        "tcp://:5000",
        "tcp://127.0.0.1:70000",
        "tcp://127.0.0.1:-1",
        "tcp://127.0.0.1:*",
        "tcp://127.0.0.1:0/x",
        "tcp://::1:0",
        "tcp://",
    ],
)
def test_address_without_host_and_port_is_refused(results: Listener, address: str) -> None:
    with pytest.raises(EndpointError, match="is not of the form HOST:PORT"):
        bind_results(address, results)


@pytest.mark.parametrize("host", ["0.0.0.0", "*", "eth0", "192.168.1.5", "[::]", "example.com", "10.0.0.1"])
def test_only_the_loopback_may_be_bound(results: Listener, host: str) -> None:
    with pytest.raises(EndpointError, match="can be reached from other machines"):
        bind_results(f"tcp://{host}:0", results)
