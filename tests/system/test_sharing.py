"""Large tensors in shared memory, and the same ones sent: between real processes that live, lie and die."""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
import zmq

from penstock.client import Client, PenstockError
from penstock.client.arrays import make_form
from penstock.wire import control
from penstock.wire.arena import Arena
from penstock.wire.codec import pack, unpack
from penstock.wire.errors import BAD_INPUT, TOO_LARGE
from penstock.wire.messages import TO_CALLER, CallerHello, Message, Refusals, Requests, Submit, Welcome
from penstock.wire.models import Layout, Tensor
from penstock.wire.tensors import Array
from tests.system.servers import Server, StartProcess, StartServer, wait_for
from tests.system.shared import SharedMemory

WIDE = np.arange(100_000, dtype=np.float32).reshape(2, 50_000)
USED = "penstock_arena_used_bytes"

M = TypeVar("M", bound=Message)


def wide_request(binary: bool, compress: bool = False, x: Array = WIDE) -> tuple[bytes, dict[str, str]]:
    tensor: dict[str, object] = {"name": "x", "shape": list(x.shape), "datatype": "FP32"}
    if binary:
        tensor["parameters"] = {"binary_data_size": x.nbytes}
        head = json.dumps({"inputs": [tensor], "parameters": {"binary_data_output": True}}).encode()
        body, headers = head + x.tobytes(), {"Inference-Header-Content-Length": str(len(head))}
    else:
        body, headers = json.dumps({"inputs": [{**tensor, "data": x.ravel().tolist()}]}).encode(), {}
    return (gzip.compress(body, 1), headers | {"Content-Encoding": "gzip"}) if compress else (body, headers)


def raw_request() -> tuple[bytes, bytes]:
    """The head and body of a binary request for WIDE."""
    body, headers = wide_request(True)
    lines = [f"{name}: {value}" for name, value in {**headers, "Content-Length": str(len(body))}.items()]
    return "\r\n".join(["POST /v2/models/wide/infer HTTP/1.1", "Host: h", *lines, "", ""]).encode(), body


def ask(server: Server, binary: bool = True, compress: bool = False) -> Array:
    """What the model makes of WIDE, over HTTP."""
    body, headers = wide_request(binary, compress)
    status, answered, content = server.request("POST", "/v2/models/wide/infer", body, headers)
    assert status == 200, content[:1000]
    if binary:
        return np.frombuffer(content[int(answered["inference-header-content-length"]) :], "<f4").reshape(WIDE.shape)
    return np.array(json.loads(content)["outputs"][0]["data"], np.float32).reshape(WIDE.shape)


def gauge(server: Server, family: str) -> float:
    return sum(value for name, value in server.metrics().items() if name.startswith(family))


def maps_of(pid: int) -> str:
    return Path(f"/proc/{pid}/maps").read_text()


@pytest.fixture(scope="module", params=["shared", "sent"])
def server(
    request: pytest.FixtureRequest, repository: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    """The same server with shared memory and without."""
    directory = tmp_path_factory.mktemp("sharing")
    gateway, worker = (4 << 20, -1) if request.param == "shared" else (0, 0)
    config = f"[gateway]\narena_bytes = {gateway}\n[worker]\narena_bytes = {worker}\n"
    (directory / "penstock.toml").write_text(config)
    server = Server(directory / "run", str(repository), f"--config={directory / 'penstock.toml'}", "--workers=2")
    yield server
    server.check_clean_end()


@pytest.fixture(scope="module")
def shared(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("shared") / "run", str(repository))
    yield server
    server.check_clean_end()


@pytest.fixture
def context() -> Iterator[zmq.Context[Any]]:
    context: zmq.Context[Any] = zmq.Context()
    yield context
    context.destroy(linger=0)


@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize("binary", [False, True])
def test_large_tensors_over_http(server: Server, binary: bool, compress: bool) -> None:
    for _ in range(3):
        np.testing.assert_array_equal(ask(server, binary, compress), WIDE)
    wait_for(lambda: gauge(server, USED) == 0, "slots to be given back")


@pytest.mark.parametrize("arena_bytes", [0, 1 << 20, 64 << 20])
def test_large_tensors_of_a_client(server: Server, arena_bytes: int) -> None:
    with Client(server.runtime, arena_bytes=arena_bytes) as client:
        calls = [client.submit("wide", {"x": WIDE + number}) for number in range(20)]
        for number, call in enumerate(calls):
            np.testing.assert_array_equal(call.result(30)["y"], WIDE + number)


def test_many_connections_at_once(server: Server) -> None:
    """More at once than the arena has room for: the rest waits."""
    wrong: list[object] = []

    def work() -> None:
        try:
            for _ in range(5):
                np.testing.assert_array_equal(ask(server), WIDE)
        except BaseException as error:  # told on the main thread
            wrong.append(error)
            raise

    threads = [threading.Thread(target=work) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not wrong
    wait_for(lambda: gauge(server, USED) == 0, "slots to be given back")


def test_a_request_holds_its_slot_until_it_has_ended(start_server: StartServer, repository: Path) -> None:
    server = start_server(str(repository))
    [worker] = server.children("worker")
    np.testing.assert_array_equal(ask(server), WIDE)
    os.kill(worker, signal.SIGSTOP)
    answers: list[Array] = []
    thread = threading.Thread(target=lambda: answers.append(ask(server)))
    thread.start()
    try:
        wait_for(lambda: gauge(server, USED) >= WIDE.nbytes, "the request to be received")
        assert gauge(server, "penstock_held_bytes") == 0
    finally:
        os.kill(worker, signal.SIGCONT)
    thread.join(30)
    np.testing.assert_array_equal(answers[0], WIDE)
    wait_for(lambda: gauge(server, USED) == 0, "the slot to be given back")


def test_a_client_that_hangs_up_frees_its_slot(start_server: StartServer, repository: Path) -> None:
    server = start_server(str(repository))
    [worker] = server.children("worker")
    os.kill(worker, signal.SIGSTOP)
    try:
        head, body = raw_request()
        with socket.create_connection((server.host, server.port), 10) as connection:
            connection.sendall(head + body)
            wait_for(lambda: gauge(server, USED) >= WIDE.nbytes, "the request to be received")
        wait_for(lambda: gauge(server, USED) == 0, "the slot to be given back")
        with socket.create_connection((server.host, server.port), 10) as connection:
            connection.sendall(head + body[:-1])
            wait_for(lambda: gauge(server, USED) >= WIDE.nbytes, "most of the request to be received")
        wait_for(lambda: gauge(server, USED) == 0, "the slot of half a request to be given back")
    finally:
        os.kill(worker, signal.SIGCONT)


# --- more than there is room for ---


SMALL = {"inputs": [{"name": "x", "shape": [1, 4], "datatype": "FP32", "data": [1, 2, 3, 4]}]}
KINDS = [(binary, compress) for binary in (True, False) for compress in (False, True)]


@pytest.fixture(scope="module")
def crowded(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with room for two large requests."""
    directory = tmp_path_factory.mktemp("crowded")
    (directory / "penstock.toml").write_text("[gateway]\narena_bytes = 1048576\narena_wait_s = 0.1\n")
    server = Server(directory / "run", str(repository), f"--config={directory / 'penstock.toml'}")
    yield server
    server.check_clean_end()


def check_no_room(status: int, headers: dict[str, str], content: bytes) -> None:
    assert (status, headers["retry-after"]) == (503, "1")
    sentence = json.loads(content)["error"]
    assert "of this gateway's 1048576 bytes of shared memory did not come free within 0.1 s" in sentence


@pytest.mark.parametrize(("binary", "compress"), KINDS)
def test_without_room_a_large_request_is_refused_and_small_ones_are_served(
    crowded: Server, binary: bool, compress: bool
) -> None:
    head, body = raw_request()
    with contextlib.ExitStack() as opened:
        slow = [opened.enter_context(socket.create_connection((crowded.host, crowded.port), 30)) for _ in range(2)]
        for connection in slow:  # which take all the room, and need it no sooner than they have sent the rest
            connection.sendall(head + body[:-1])
        wait_for(lambda: gauge(crowded, USED) >= 2 * WIDE.nbytes, "both to be received")
        check_no_room(*crowded.request("POST", "/v2/models/wide/infer", *wide_request(binary, compress)))
        assert crowded.infer("dense", SMALL)[0] == 200
        for connection in slow:
            connection.sendall(body[-1:])
            assert connection.recv(12) == b"HTTP/1.1 200"
    np.testing.assert_array_equal(ask(crowded, binary, compress), WIDE)
    wait_for(lambda: gauge(crowded, USED) == 0, "slots to be given back")


def test_whoever_waits_has_the_room_that_comes_free(
    start_server: StartServer, repository: Path, tmp_path: Path
) -> None:
    (tmp_path / "penstock.toml").write_text("[gateway]\narena_bytes = 1048576\narena_wait_s = 60\n")
    server = start_server(str(repository), f"--config={tmp_path / 'penstock.toml'}")
    [worker] = server.children("worker")
    np.testing.assert_array_equal(ask(server), WIDE)
    answers: list[Array] = []
    threads = [threading.Thread(target=lambda kind=kind: answers.append(ask(server, *kind))) for kind in KINDS * 3]
    os.kill(worker, signal.SIGSTOP)
    try:
        for thread in threads:
            thread.start()
        wait_for(lambda: gauge(server, "penstock_arena_waiting") == len(threads) - 2, "all but two to wait")
    finally:
        os.kill(worker, signal.SIGCONT)
    for thread in threads:
        thread.join(60)
    assert len(answers) == len(threads)
    for answer in answers:
        np.testing.assert_array_equal(answer, WIDE)
    wait_for(lambda: gauge(server, USED) == 0, "slots to be given back")
    assert gauge(server, "penstock_arena_waiting") == 0


def test_a_crowd_is_served_or_told_when_to_come_again(crowded: Server) -> None:
    """While a worker is stopped, nothing comes free."""
    [worker] = crowded.children("worker")
    requests = [wide_request(*kind) for kind in KINDS]
    statuses: list[int] = []
    wrong: list[BaseException] = []
    refused = threading.Event()

    def send(turn: int) -> None:
        try:
            for at in range(6):
                status, headers, content = crowded.request(
                    "POST", "/v2/models/wide/infer", *requests[(turn + at) % len(requests)]
                )
                statuses.append(status)
                if status != 200:
                    check_no_room(status, headers, content)
                    refused.set()
        except BaseException as error:  # told on the main thread
            wrong.append(error)
            raise

    threads = [threading.Thread(target=send, args=(turn,)) for turn in range(16)]
    os.kill(worker, signal.SIGSTOP)
    try:
        for thread in threads:
            thread.start()
        assert refused.wait(30)
    finally:
        os.kill(worker, signal.SIGCONT)
    while any(thread.is_alive() for thread in threads):
        assert crowded.infer("dense", SMALL)[0] == 200
    assert not wrong
    assert len(statuses) == 16 * 6
    assert set(statuses) == {200, 503}
    wait_for(lambda: gauge(crowded, USED) == 0, "slots to be given back")
    np.testing.assert_array_equal(ask(crowded), WIDE)


@pytest.mark.parametrize(("binary", "compress"), KINDS)
def test_a_request_that_is_larger_than_the_arena_is_told_both_sizes(
    crowded: Server, binary: bool, compress: bool
) -> None:
    x = np.resize(WIDE, (6, 50_000))
    body, headers = wide_request(binary, compress, x)
    status, _, content = crowded.request("POST", "/v2/models/wide/infer", body, headers)
    takes = int(re.findall(rb"takes (\d+) bytes of shared memory, and this gateway has 1048576;", content)[0])
    assert status == 413
    assert x.nbytes <= takes <= x.nbytes + 1000, "with the JSON in front of it at most"


def test_a_client_with_little_room_waits_for_it(crowded: Server) -> None:
    with Client(crowded.runtime, arena_bytes=1 << 20) as client:
        calls = [client.submit("wide", {"x": WIDE + number}) for number in range(20)]
        for number, call in enumerate(calls):
            np.testing.assert_array_equal(call.result(30)["y"], WIDE + number)
        with pytest.raises(PenstockError) as raised:
            client.infer("wide", {"x": np.resize(WIDE, (6, 50_000))})
        assert raised.value.code == TOO_LARGE


# --- who is killed, or lies ---


def test_what_a_killed_worker_had_is_read_by_another(
    start_process: StartProcess, repository: Path, tmp_path: Path
) -> None:
    runtime = f"--runtime-dir={tmp_path / 'run'}"
    start_process("broker", runtime)
    workers = [start_process("worker", str(repository), runtime) for _ in range(2)]
    for worker in workers:
        wait_for(partial(worker.said, "models loaded"), "a worker")
    with Client(tmp_path / "run") as client:
        client.infer("wide", {"x": WIDE})
        os.kill(workers[0].pid, signal.SIGSTOP)
        calls = [client.submit("wide", {"x": WIDE + number}) for number in range(40)]
        wait_for(lambda: sum(call.done() for call in calls) > 20, "the other to work")
        workers[0].end(signal.SIGKILL)
        for number, call in enumerate(calls):
            np.testing.assert_array_equal(call.result(30)["y"], WIDE + number)


SENDS_AND_WAITS = """
import sys, numpy as np
from penstock.client import Client, PenstockError
client = Client(sys.argv[1])
calls = [client.submit("wide", {"x": np.ones((2, 50_000), np.float32)}) for _ in range(50)]
calls[0].result(30)
print("sent", flush=True)
sys.stdin.read()
"""


def test_a_killed_client_leaves_no_memory_behind(start_server: StartServer, repository: Path) -> None:
    server = start_server(str(repository), "--workers=2")
    peers = [*server.children("broker"), *server.children("worker")]
    process = subprocess.Popen(
        [sys.executable, "-c", SENDS_AND_WAITS, str(server.runtime)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"sent\n"
    assert all("penstock-client" in maps_of(pid) for pid in peers)
    process.kill()
    process.communicate()
    wait_for(lambda: not any("penstock-client" in maps_of(pid) for pid in peers), "its memory to be let go of")
    np.testing.assert_array_equal(ask(server), WIDE)


@pytest.mark.parametrize("role", ["broker", "worker", "gateway"])
def test_large_tensors_after_any_process_was_killed(role: str, start_server: StartServer, repository: Path) -> None:
    server = start_server(str(repository))
    shared = SharedMemory()
    with Client(server.runtime) as client:
        client.infer("wide", {"x": WIDE})
        [pid] = server.children(role)
        os.kill(pid, signal.SIGKILL)
        wait_for(lambda: server.children(role) not in ([], [pid]), "another in its place")
        wait_for(lambda: server.request("GET", "/v2/health/ready")[0] == 200, "the server to be ready")
        np.testing.assert_array_equal(ask(server), WIDE)
        np.testing.assert_array_equal(client.infer("wide", {"x": WIDE})["y"], WIDE)
    wait_for(lambda: gauge(server, USED) == 0, "slots to be given back")
    shared.check("a killed process left shared memory behind")


class Liar:
    """A caller that says what it likes of its arena."""

    def __init__(self, server: Server, context: zmq.Context[Any], arena: Arena | None) -> None:
        self.id = b"\x01" + os.urandom(7)
        self._serial = 0
        with Client(server.runtime) as client:
            [self._spec] = [state.spec for state in client.models() if state.name == "wide"]
        self._control = control.connect(
            server.runtime / "control.sock", self.id, control.NO_ARENA if arena is None else arena.fd
        )
        self._socket = context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.IDENTITY, self.id)
        self._socket.connect(f"ipc://{server.runtime}/callers.sock")
        self._socket.send(pack(CallerHello(0, "", os.getpid(), True)))
        self.welcome = self._wait_for(Welcome)

    def _wait_for(self, kind: type[M]) -> M:
        while self._socket.poll(10_000):
            message = unpack(self._socket.recv(), [], TO_CALLER)
            if isinstance(message, kind):
                return message
        pytest.fail("nothing came")

    def refused(self, place: int) -> str:
        """What is said of a tensor in this place."""
        assert self._spec is not None
        self._serial += 1
        form = make_form(self._spec, Layout((Tensor("x", "FP32", WIDE.shape, 0, WIDE.nbytes),), ()), WIDE.nbytes)
        group = Requests(form, (self._serial,), (10_000_000,), (place,))
        self._socket.send(pack(Submit(self.welcome.epoch, [group])))
        [refusal] = self._wait_for(Refusals).refusals
        assert refusal.code == BAD_INPUT
        return refusal.message

    def close(self) -> None:
        self._socket.close(0)
        if self._control is not None:
            self._control.close()


@pytest.mark.parametrize("place", [(1 << 20) - WIDE.nbytes + 64, 1 << 20, 2**64 - 1])
def test_a_place_outside_the_arena_is_refused(shared: Server, context: zmq.Context[Any], place: int) -> None:
    arena = Arena(1 << 20, "liar")
    liar = Liar(shared, context, arena)
    assert liar.welcome.shares
    assert "do not lie in the caller's arena" in liar.refused(place)
    liar.close()
    arena.close()
    np.testing.assert_array_equal(ask(shared), WIDE)


def test_places_without_an_arena_are_refused(shared: Server, context: zmq.Context[Any]) -> None:
    liar = Liar(shared, context, None)
    assert not liar.welcome.shares
    assert "this caller shares none" in liar.refused(0)
    liar.close()
    np.testing.assert_array_equal(ask(shared), WIDE)


def test_an_arena_that_could_be_cut_off_is_refused(shared: Server) -> None:
    descriptor = os.memfd_create("liar", os.MFD_ALLOW_SEALING)
    os.ftruncate(descriptor, 1 << 20)
    connection = control.connect(shared.runtime / "control.sock", b"\x01" + os.urandom(7), descriptor)
    os.close(descriptor)
    assert connection is not None
    connection.settimeout(30)
    assert connection.recv(100) == b"", "the broker closes it"
    connection.close()
    np.testing.assert_array_equal(ask(shared), WIDE)
