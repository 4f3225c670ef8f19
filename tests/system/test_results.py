"""Large results in workers' memory: read there, held there, and given back however a process ends."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from penstock.client import Client, PenstockError
from tests.system.servers import Server, StartProcess, StartServer, wait_for

WIDE = np.arange(100_000, dtype=np.float32).reshape(2, 50_000)
LARGE = np.arange(1_500_000, dtype=np.float32).reshape(30, 50_000)  # more than the kernel takes for a connection
USED = "penstock_arena_used_bytes"


def used(server: Server, process: str = "") -> float:
    """Bytes of shared memory that are taken, in all processes or in one."""
    samples = server.metrics().items()
    return sum(value for name, value in samples if name.startswith(USED) and process in name)


def maps_of(pid: int) -> str:
    return Path(f"/proc/{pid}/maps").read_text()


@pytest.fixture(scope="module")
def server(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("results") / "run", str(repository), "--workers=2", "--gateways=2")
    yield server
    server.check_clean_end()


@pytest.fixture
def client(server: Server) -> Iterator[Client]:
    with Client(server.runtime) as client:
        yield client


def held_by(client: Client) -> set[int]:
    assert client._talk is not None
    return set(client._talk.link.caller._held)


# --- borrowing ---


def test_a_borrowed_result_stays_as_it_is_while_others_come(client: Client, server: Server) -> None:
    with client.infer("wide", {"x": WIDE}, copy=False) as borrowed:
        y = borrowed["y"]
        assert not y.flags.writeable
        assert len(held_by(client)) == 1
        for number in range(50):
            assert client.infer("wide", {"x": WIDE + number})["y"][0, 0] == number
        np.testing.assert_array_equal(y, WIDE)
    assert list(borrowed) == []
    del y
    wait_for(lambda: not held_by(client), "the result to be let go of")
    wait_for(lambda: used(server) == 0, "the worker to have its memory back")


def test_what_outlives_its_context_can_still_be_read(client: Client, server: Server) -> None:
    with client.infer("wide", {"x": WIDE}, copy=False) as borrowed:
        part = borrowed["y"][1, 10:20]
    for number in range(50):
        client.infer("wide", {"x": WIDE + number})
    np.testing.assert_array_equal(part, WIDE[1, 10:20])
    del part
    wait_for(lambda: used(server) == 0, "the worker to have its memory back")


def test_many_may_be_borrowed_at_once(client: Client, server: Server) -> None:
    calls = [client.submit("wide", {"x": WIDE + number}, copy=False) for number in range(60)]
    results = [call.result(30) for call in calls]
    assert len(held_by(client)) == 60
    for number, result in enumerate(results):
        np.testing.assert_array_equal(result["y"], WIDE + number)
    del results, result, calls
    wait_for(lambda: used(server) == 0, "the worker to have its memory back")


def test_small_results_can_be_borrowed_too(client: Client) -> None:
    with client.infer("half", {"x": np.ones((1, 2), np.float16)}, copy=False) as result:
        assert result["x" if "x" in result else "y"].tolist() == [[1, 1]]
        assert not held_by(client)


def test_results_of_a_client_that_was_cancelled_are_given_back(client: Client, server: Server) -> None:
    for _ in range(20):
        client.submit("wide", {"x": WIDE}).cancel()
    client.infer("wide", {"x": WIDE})
    wait_for(lambda: used(server) == 0, "the worker to have its memory back")


def test_a_borrowed_result_outlives_broker_and_worker(
    start_process: StartProcess, repository: Path, tmp_path: Path
) -> None:
    runtime = f"--runtime-dir={tmp_path / 'run'}"
    broker = start_process("broker", runtime)
    worker = start_process("worker", str(repository), runtime)
    wait_for(partial(worker.said, "models loaded"), "a worker")
    with Client(tmp_path / "run") as client:
        with client.infer("wide", {"x": WIDE}, copy=False) as borrowed:
            broker.end(signal.SIGKILL)
            broker = start_process("broker", runtime)
            for number in range(20):
                wait_for(partial(try_infer, client, number), "an answer")
            np.testing.assert_array_equal(borrowed["y"], WIDE)
            worker.end(signal.SIGKILL)
            worker = start_process("worker", str(repository), runtime)
            for number in range(20):
                wait_for(partial(try_infer, client, number), "an answer")
            np.testing.assert_array_equal(borrowed["y"], WIDE)
        assert "penstock-cpu" in maps_of(os.getpid())


def try_infer(client: Client, number: int) -> bool:
    """False: a process was gone, and it may help to try again."""
    try:
        result = client.infer("wide", {"x": WIDE + number}, timeout=20)
    except PenstockError as error:
        if not error.retryable:
            raise
        return False
    np.testing.assert_array_equal(result["y"], WIDE + number)
    return True


BORROWS_AND_WAITS = """
import sys, numpy as np
from penstock.client import Client, PenstockError
client = Client(sys.argv[1])
kept = [client.infer("wide", {"x": np.ones((2, 50_000), np.float32)}, copy=False) for _ in range(10)]
print("borrowed", flush=True)
sys.stdin.read()
"""


def test_what_a_killed_client_had_borrowed_is_given_back(server: Server) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", BORROWS_AND_WAITS, str(server.runtime)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"borrowed\n"
    wait_for(lambda: used(server, "cpu") >= 10 * WIDE.nbytes, "the worker to say what it lends")
    process.kill()
    process.communicate()
    wait_for(lambda: used(server) == 0, "the worker to have its memory back")


# --- answers over HTTP ---


def post() -> bytes:
    """A request for LARGE with a binary answer."""
    tensor = {"name": "x", "shape": LARGE.shape, "datatype": "FP32", "parameters": {"binary_data_size": LARGE.nbytes}}
    content = json.dumps({"inputs": [tensor], "parameters": {"binary_data_output": True}}).encode()
    lines = (
        "POST /v2/models/wide/infer HTTP/1.1",
        "Host: h",
        f"Inference-Header-Content-Length: {len(content)}",
        f"Content-Length: {len(content) + LARGE.nbytes}",
        "",
        "",
    )
    return "\r\n".join(lines).encode() + content + LARGE.tobytes()


def connect(server: Server, receive_bytes: int) -> socket.socket:
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
    connection.settimeout(30)
    connection.connect((server.host, server.port))
    return connection


def read_answer(connection: socket.socket) -> bytes:
    heard = b""
    while len(heard) < LARGE.nbytes or len(heard) < heard.index(b"\r\n\r\n") + 4 + length_of(heard):
        part = connection.recv(1 << 20)
        assert part, "the connection ended"
        heard += part
    return heard


def length_of(heard: bytes) -> int:
    return int(heard.split(b"\r\nContent-Length: ")[1].split(b"\r\n")[0])


def test_a_slow_client_is_read_to_from_the_workers_memory(server: Server) -> None:
    """Its answer stays there until the kernel has all of it, whatever others ask for meanwhile."""
    with ExitStack() as stack:
        slow = [stack.enter_context(connect(server, 4096)) for _ in range(6)]
        for connection in slow:
            connection.sendall(post())
        wait_for(lambda: used(server, "cpu") >= LARGE.nbytes, "answers to wait")
        with Client(server.runtime) as client:
            for number in range(30):
                client.infer("wide", {"x": WIDE + number})
        for connection in slow:
            assert read_answer(connection).endswith(LARGE.tobytes())
    wait_for(lambda: used(server) == 0, "slots to be given back")


def test_clients_that_leave_while_they_are_answered(server: Server) -> None:
    connections = [connect(server, 4096) for _ in range(6)]
    for connection in connections:
        connection.sendall(post())
    wait_for(lambda: used(server, "cpu") >= LARGE.nbytes, "answers to wait")
    for connection in connections:
        connection.close()
    wait_for(lambda: used(server) == 0, "slots to be given back")


def test_what_a_killed_gateway_was_sending_is_given_back(start_server: StartServer, repository: Path) -> None:
    server = start_server(str(repository), "--gateways=2")
    connections = [connect(server, 4096) for _ in range(6)]
    for connection in connections:
        connection.sendall(post())
    wait_for(lambda: used(server, "cpu") >= LARGE.nbytes, "answers to wait")
    gateways = server.children("gateway")
    for pid in gateways:
        os.kill(pid, signal.SIGKILL)
    for connection in connections:
        connection.close()
    wait_for(lambda: set(server.children("gateway")).isdisjoint(gateways), "others in their place")
    wait_for(lambda: used(server) == 0, "slots to be given back")


def test_a_stopped_gateway_sends_what_it_was_sending_when_it_is_continued(
    start_server: StartServer, repository: Path
) -> None:
    """The broker takes it for gone. Its worker does not, and keeps what it may still read."""
    server = start_server(str(repository))
    [gateway] = server.children("gateway")
    connection = connect(server, 4096)
    connection.sendall(post())
    wait_for(lambda: used(server, "cpu") >= LARGE.nbytes, "the answer to wait")
    os.kill(gateway, signal.SIGSTOP)
    try:
        wait_for(partial(server.said, "caller left"), "the broker to miss it")
        with Client(server.runtime) as client:
            for number in range(50):
                client.infer("wide", {"x": WIDE + number})
    finally:
        os.kill(gateway, signal.SIGCONT)
    assert read_answer(connection).endswith(LARGE.tobytes())
    connection.close()
    wait_for(lambda: used(server) == 0, "slots to be given back")


# --- who is given what ---


def test_a_worker_joins_many_clients(start_process: StartProcess, repository: Path, tmp_path: Path) -> None:
    """More arenas than the kernel lets wait in one connection (net.unix.max_dgram_qlen)."""
    runtime = f"--runtime-dir={tmp_path / 'run'}"
    start_process("broker", runtime)
    first = start_process("worker", str(repository), runtime)
    wait_for(partial(first.said, "models loaded"), "a worker")
    with ExitStack() as stack:
        clients = [stack.enter_context(Client(tmp_path / "run", arena_bytes=1 << 20)) for _ in range(40)]
        for client in clients:
            client.infer("wide", {"x": WIDE})
        second = start_process("worker", str(repository), runtime)
        wait_for(partial(second.said, "models loaded"), "another worker")
        wait_for(lambda: maps_of(second.pid).count("penstock-client") == 40, "it to be given all arenas")
        first.end(signal.SIGKILL)
        for number, client in enumerate(clients):
            np.testing.assert_array_equal(client.infer("wide", {"x": WIDE + number})["y"], WIDE + number)


def test_without_shared_memory_everything_travels(start_server: StartServer, repository: Path, tmp_path: Path) -> None:
    config = tmp_path / "penstock.toml"
    config.write_text("[gateway]\narena_bytes = 0\n[worker]\narena_bytes = 0\n")
    server = start_server(str(repository), f"--config={config}")
    with connect(server, 1 << 20) as connection, Client(server.runtime, arena_bytes=0) as client:
        for number in range(3):
            connection.sendall(post())
            assert read_answer(connection).endswith(LARGE.tobytes())
            np.testing.assert_array_equal(client.infer("wide", {"x": WIDE + number}, copy=False)["y"], WIDE + number)
    assert not any("memfd:penstock" in maps_of(pid) for pid in server.children())
