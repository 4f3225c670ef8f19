"""Floods: real processes whose memory stays bounded, which serve others meanwhile, and refuse and count what is too
much.
"""

from __future__ import annotations

import contextlib
import gzip
import http.client
import os
import resource
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto

from penstock.client import Client, PenstockError
from penstock.client.client import Result
from penstock.wire.process import SPARE_DESCRIPTORS
from tests.system.models import dense, identity, write
from tests.system.servers import Process, Server, StartServer, wait_for

MB = 1 << 20
ANSWER_MAX_S = 10.0  # for one of who asks for little, on whatever machine; a quiet one answers in hundredths
ROLES = ("broker", "worker", "gateway")


def memory(pid: int) -> int:
    """Bytes that are a process's own; of what is shared each would have all."""
    return int(Path(f"/proc/{pid}/status").read_text().partition("RssAnon:")[2].split()[0]) * 1024


class Memory:
    """What the processes of a server have grown by, as far as anybody has looked."""

    def __init__(self, server: Server) -> None:
        self._pids = {role: server.children(role)[0] for role in ROLES}
        self._before = {role: memory(pid) for role, pid in self._pids.items()}
        self.most = dict.fromkeys(ROLES, 0)

    def look(self) -> dict[str, int]:
        now = {role: memory(pid) - self._before[role] for role, pid in self._pids.items()}
        self.most = {role: max(self.most[role], grown) for role, grown in now.items()}
        return now

    def check(self, **most: int) -> None:
        """Fail if one has grown by more than what is said, in MB."""
        self.look()
        for role, mb in most.items():
            assert self.most[role] < mb * MB, f"{role} grew by {self.most[role] / MB:.0f} MB"

    def __str__(self) -> str:
        return ", ".join(f"{role} {grown / MB:+.1f} MB" for role, grown in self.most.items())


class Neighbour:
    """Asks for one thing after another while others flood, and checks every answer."""

    def __init__(self, ask: Callable[[float], float]) -> None:
        self.answers = 0
        self.slowest_s = 0.0
        self.wrong: list[str] = []
        self._ask = ask
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Neighbour:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._ended.wait(0.002):
            before, asked = time.monotonic(), float(self.answers % 1000)
            try:
                answer = self._ask(asked)
                if answer != asked:
                    self.wrong.append(f"{answer} for {asked}")
            except (PenstockError, OSError, http.client.HTTPException) as error:
                self.wrong.append(repr(error))
            self.slowest_s = max(self.slowest_s, time.monotonic() - before)
            self.answers += 1

    def check(self) -> None:
        assert self.wrong == []
        assert self.slowest_s < ANSWER_MAX_S


def ask_client(client: Client) -> Callable[[float], float]:
    def ask(value: float) -> float:
        x = np.full((1, 2), value, np.float32)
        return float(client.infer("same", {"x": x}, timeout=ANSWER_MAX_S)["y"][0, 1])

    return ask


def ask_http(server: Server) -> Callable[[float], float]:
    def ask(value: float) -> float:
        tensor = {"name": "x", "shape": [1, 2], "datatype": "FP32", "data": [value, value]}
        status, answer = server.infer("same", {"inputs": [tensor]})
        return float(answer["outputs"][0]["data"][1]) if status == 200 else -1.0

    return ask


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models")
    write(path, "dense", dense())
    write(path, "same", identity(TensorProto.FLOAT))
    return path


@pytest.fixture
def serve(start_server: StartServer, models: Path, tmp_path: Path) -> Callable[[str], Server]:
    def start(config: str) -> Server:
        path = tmp_path / "penstock.toml"
        path.write_text(config)
        return start_server(str(models), f"--config={path}")

    return start


def counted(metrics: dict[str, float], name: str, *labels: str) -> float:
    """The sum of the series that have all of these labels."""
    return sum(value for key, value in metrics.items() if key.startswith(name) and all(each in key for each in labels))


# --- connections ---

CONNECTIONS = 10_000


@pytest.fixture
def descriptors() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = CONNECTIONS + 4 * SPARE_DESCRIPTORS
    if hard < needed:
        pytest.skip(f"{CONNECTIONS} connections need {needed} descriptors, and the hard RLIMIT_NOFILE is {hard}")
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@contextlib.contextmanager
def idle_connections(server: Server, count: int) -> Iterator[None]:
    """Each has had an answer and asks for nothing more."""
    with ExitStack() as stack:
        opened: list[socket.socket] = []
        for at in range(0, count, 500):
            some = [
                stack.enter_context(socket.create_connection((server.host, server.port), timeout=30))
                for _ in range(min(500, count - at))
            ]
            for each in some:
                # By a reset, since so many ports in TIME_WAIT would be missed by the tests after this one.
                each.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                each.sendall(b"GET /v2/health/live HTTP/1.1\r\nHost: h\r\n\r\n")
            for each in some:
                assert each.recv(4096).startswith(b"HTTP/1.1 200 ")
            opened += some
        yield
        readable = select.poll()
        for each in opened:
            readable.register(each, select.POLLIN)
        assert readable.poll(0) == [], "the server has closed some of them"


def test_ten_thousand_idle_connections(serve: Callable[[str], Server], descriptors: None) -> None:
    server = serve("")
    [pid] = server.children("gateway")
    kept = http.client.HTTPConnection(server.host, server.port, timeout=30)

    def ready() -> int:
        kept.request("GET", "/v2/health/ready")
        with kept.getresponse() as response:
            response.read()
            return response.status

    def connections() -> int:
        return len(os.listdir(f"/proc/{pid}/fd"))

    with contextlib.closing(kept), Client(server.runtime) as client, Neighbour(ask_client(client)) as beside:
        assert ready() == 200
        grown, before = Memory(server), connections()
        rounds = []
        for _ in range(2):
            with idle_connections(server, CONNECTIONS - 1):
                rounds.append(grown.look()["gateway"])
                status, headers, body = server.request("GET", "/v2/health/ready")
                assert (status, headers["retry-after"]) == (503, "1")
                assert body == b'{"error":"10000 connections are open; try again shortly"}'
                assert ready() == 200, "who is connected is served"
            wait_for(lambda: connections() <= before, "descriptors to be closed")
        wait_for(lambda: counted(server.metrics(), "penstock_http_connections") <= 2, "connections to be forgotten")
        assert counted(server.metrics(), "penstock_http_responses_total", 'code="503"') == 2
    print(f"{rounds[0] / CONNECTIONS:.0f} bytes a connection, {rounds[1] / CONNECTIONS:.0f} the second time; {grown}")
    beside.check()
    assert rounds[0] < CONNECTIONS * 8192
    assert rounds[1] < rounds[0] + 8 * MB, "what they took is used again"
    grown.check(broker=16, worker=16)


# --- requests ---

REQUESTS = 100_000
CALLERS = 4
WAITING = """[broker]
queue_requests_max = 120_000
queue_rows_max = 120_000
silence_max_s = 60.0
busy_silence_max_s = 60.0
"""


@contextlib.contextmanager
def stopped(server: Server) -> Iterator[Callable[[], None]]:
    """The only worker does nothing until what this yields is called."""
    [pid] = server.children("worker")
    os.kill(pid, signal.SIGSTOP)
    try:
        yield lambda: os.kill(pid, signal.SIGCONT)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


def submit(client: Client, first: int, count: int) -> list[Future[Result]]:
    x = np.zeros((1, 2), np.float32)
    futures = []
    for number in range(first, first + count):
        x[:] = number
        futures.append(client.submit("same", {"x": x}, timeout=100))
    return futures


def waiting(server: Server) -> float:
    return counted(server.metrics(), "penstock_queue_requests", 'model="same"')


def test_a_hundred_thousand_requests_wait_and_are_all_answered(serve: Callable[[str], Server]) -> None:
    server = serve(WAITING)
    with ExitStack() as stack:
        clients = [stack.enter_context(Client(server.runtime)) for _ in range(CALLERS)]
        other = stack.enter_context(Client(server.runtime, tenant="small"))
        for client in (*clients, other):
            client.infer("same", {"x": np.zeros((1, 2), np.float32)})
        grown = Memory(server)
        with stopped(server) as go_on:
            each = REQUESTS // CALLERS
            futures = [future for at, client in enumerate(clients) for future in submit(client, at * each, each)]
            room = REQUESTS - 1000  # a few are on the worker
            wait_for(lambda: waiting(server) > room, "all to wait")
            taken = grown.look()["broker"] / REQUESTS
            urgent = other.submit("same", {"x": np.ones((1, 2), np.float32)}, priority=1, timeout=100)
            wait_for(lambda: counted(server.metrics(), "penstock_requests_total") > REQUESTS + CALLERS, "it to wait")
            began = time.monotonic()
            go_on()
            assert urgent.result(60)["y"][0, 0] == 1
            urgent_s, done_before = time.monotonic() - began, sum(future.done() for future in futures)
            values = [int(future.result(60)["y"][0, 0]) for future in futures]
            seconds = time.monotonic() - began
        assert values == list(range(REQUESTS))
        wait_for(lambda: waiting(server) == 0, "the queue to be empty")
    print(f"{taken:.0f} bytes a request; the urgent one after {urgent_s:.3f} s, {done_before} others before it;")
    print(f"{REQUESTS / seconds:.0f}/s; {grown}")
    assert done_before < REQUESTS / 4
    assert taken < 2048
    grown.check(worker=64, gateway=16)


def test_what_is_too_much_is_refused_at_once(serve: Callable[[str], Server]) -> None:
    """With the limits as they are: a caller may fill seven eighths of a queue, and others have what is left."""
    server = serve("[broker]\nsilence_max_s = 60.0\nbusy_silence_max_s = 60.0\n")
    count, queue = 20_000, 16_384
    with Client(server.runtime) as client, Client(server.runtime) as other:
        client.infer("same", {"x": np.zeros((1, 2), np.float32)})
        grown = Memory(server)
        with stopped(server) as go_on:
            futures = submit(client, 0, count)
            begun = time.monotonic()
            wait_for(lambda: sum(future.done() for future in futures) >= count - queue, "refusals, and nothing else")
            refused_s = time.monotonic() - begun
            beside = other.submit("same", {"x": np.ones((1, 2), np.float32)}, timeout=100)
            wait_for(lambda: waiting(server) > queue - queue // 8, "it to wait")
            grown.look()
            go_on()
            assert beside.result(60)["y"][0, 0] == 1
            outcomes = Counter(
                error.code if isinstance(error, PenstockError) else "answered"
                for error in (future.exception(60) for future in futures)
            )
        assert outcomes.keys() == {"answered", "overloaded"}
        assert queue - queue // 8 <= outcomes["answered"] < queue - queue // 8 + 1000, outcomes
        refused = counted(server.metrics(), "penstock_request_failures_total", 'reason="overloaded"')
        assert refused == outcomes["overloaded"]
    print(f"the surplus was refused {refused_s:.2f} s after it had been asked; {grown}")
    assert refused_s < ANSWER_MAX_S
    grown.check(broker=48, worker=64)


# --- peers of the broker ---


class Flooder:
    """See flooder.py."""

    def __init__(self, what: str, server: Server) -> None:
        self.sent = 0
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.system.flooder", what, str(server.runtime)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[2],
        )

    def __enter__(self) -> Flooder:
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == "begun\n"
        return self

    def __exit__(self, *error: object) -> None:
        try:
            self.sent = int(self._process.communicate(timeout=30)[0])
        finally:
            self._process.kill()
            self._process.wait()


def said(process: Process, text: str) -> Callable[[], bool]:
    return lambda: process.said(text)


def flood(server: Server, what: str, until: Callable[[], bool]) -> Memory:
    """Until then, and until somebody beside it has had a hundred answers."""
    with Client(server.runtime) as client:
        client.infer("same", {"x": np.zeros((1, 2), np.float32)})
        grown = Memory(server)
        with Flooder(what, server) as flooder, Neighbour(ask_client(client)) as beside:
            wait_for(lambda: (grown.look(), until() and beside.answers > 100)[1], f"{what} to be counted", 60)
    wait_for(lambda: counted(server.metrics(), "penstock_callers") == 2, "the others to be forgotten")
    print(f"{what}: {flooder.sent} messages, the slowest answer beside after {beside.slowest_s:.3f} s, {grown}")
    beside.check()
    return grown


def test_a_caller_that_floods_and_never_acknowledges(serve: Callable[[str], Server]) -> None:
    server = serve("[broker]\ncaller_requests_max = 8192\n")
    bound = "8192 requests of this caller are under way, which is all that it may have"
    grown = flood(server, "submits", said(server, bound))
    assert counted(server.metrics(), "penstock_request_failures_total", 'reason="overloaded"') > 0
    assert counted(server.metrics(), "penstock_requests_total", 'model="dense"') == 8192
    # The broker: 8192 requests of some 1 KB; messages that it has not read (128 of 1 KB) and that the caller has not
    # (256 of some 30 KB, and 16 MB). The worker: as many results.
    grown.check(broker=64, worker=48, gateway=16)


def test_a_caller_that_does_not_read_its_refusals_is_given_up(serve: Callable[[str], Server]) -> None:
    server = serve("")
    grown = flood(server, "surplus", said(server, "caller reads nothing; what it asked for is given up"))
    assert counted(server.metrics(), "penstock_request_failures_total", 'reason="overloaded"') > 50_000
    # As above, with messages of 60 KB that are not read, and of one lot of 4096 after the other what is being unpacked.
    grown.check(broker=128, worker=48, gateway=16)


def test_a_caller_that_asks_for_metrics_and_does_not_read_them(serve: Callable[[str], Server]) -> None:
    server = serve("")
    grown = flood(server, "asks", said(server, "caller reads nothing; what it asked for is given up"))
    grown.check(broker=96, worker=16, gateway=16)


def test_a_peer_that_sends_garbage_as_fast_as_it_can(serve: Callable[[str], Server]) -> None:
    server = serve("")

    def bad() -> bool:
        return counted(server.metrics(), "penstock_bad_messages_total", 'peer="caller"') > 1000

    grown = flood(server, "garbage", bad)
    # 128 messages of up to 100 KB that have not been read, and what the allocator keeps of those before.
    grown.check(broker=64, worker=16, gateway=16)


# --- clients of the gateway ---

EACH = 100
BOMBS = 8  # each takes a thread of the gateway's a tenth of a second
SHORT = """[gateway]
head_timeout_s = 1.0
body_timeout_s = 1.0
write_timeout_s = 1.0
body_bytes_per_s_min = 1_000_000_000
"""


def connect(server: Server, said: bytes, receive_bytes: int = 0) -> socket.socket:
    client = socket.socket()
    if receive_bytes:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
    client.settimeout(30)
    client.connect((server.host, server.port))
    client.sendall(said)
    return client


def rest(client: socket.socket) -> bytes:
    """All that comes until the connection ends, in whatever way."""
    heard = b""
    with contextlib.suppress(ConnectionError):
        while more := client.recv(65536):
            heard += more
    return heard


def test_slow_clients_and_bombs_all_at_once(serve: Callable[[str], Server]) -> None:
    server = serve(SHORT)
    bomb = gzip.compress(bytes(65 * MB), 9)
    lines = "Host: h\r\nContent-Encoding: gzip\r\nContent-Length: " + str(len(bomb))
    path = "POST /v2/models/same/infer HTTP/1.1\r\n"
    unread = b"GET / HTTP/1.1\r\nHost: h\r\n\r\n" * 200
    with ExitStack() as stack, Neighbour(ask_http(server)) as beside:
        wait_for(lambda: beside.answers > 10, "answers before")
        grown = Memory(server)

        def several(count: int, said: bytes, receive_bytes: int = 0) -> list[socket.socket]:
            return [stack.enter_context(connect(server, said, receive_bytes)) for _ in range(count)]

        deaf = several(EACH, unread, 4096)
        loris = several(EACH, b"GET /v2/health/live HTTP/1.1\r\nHost: h\r\nX-")
        slow = several(EACH, f"{path}Host: h\r\nContent-Length: 100000\r\n\r\n{{".encode())
        bombs = several(BOMBS, f"{path}{lines}\r\n\r\n".encode() + bomb)
        for client in bombs:
            assert client.recv(4096).startswith(b"HTTP/1.1 413 ")
            client.close()
            grown.look()
        for client in loris + slow:
            with contextlib.suppress(ConnectionError):
                client.sendall(b"a")  # some go on for a while
        for client in loris + slow:
            assert rest(client).startswith(b"HTTP/1.1 408 ")
        grown.look()
        metric = "penstock_http_cut_off_total"
        wait_for(lambda: counted(server.metrics(), metric) >= EACH, "those that do not read to be cut off")
        # Not because they have gone: they are there, and read nothing.
        wait_for(lambda: counted(server.metrics(), "penstock_http_connections") <= 2, "connections to be forgotten")
        assert all(client.fileno() >= 0 for client in deaf)
    metrics = server.metrics()
    print(f"the slowest answer beside them after {beside.slowest_s:.3f} s, {grown}")
    beside.check()
    assert counted(metrics, "penstock_http_responses_total", 'code="408"') == 2 * EACH
    assert counted(metrics, "penstock_http_responses_total", 'code="413"') == BOMBS
    # One bomb at a time is looked into, in small pieces; and one answer of a connection waits to be read.
    grown.check(gateway=64, broker=16, worker=16)


def test_small_requests_are_answered_while_large_bodies_are_expanded(serve: Callable[[str], Server]) -> None:
    """On the gateway's loop they would be answered after all that came before them."""
    server = serve("")
    bodies = [gzip.compress(bytes(60 * MB), 9)[:-1], gzip.compress(bytes(65 * MB), 9)] * 4
    head = "POST /v2/models/same/infer HTTP/1.1\r\nHost: h\r\nContent-Encoding: gzip\r\nContent-Length: "
    ask = ask_http(server)
    with ExitStack() as stack:
        clients = [stack.enter_context(connect(server, b"")) for _ in bodies]
        for client, body in zip(clients, bodies, strict=True):
            client.sendall(f"{head}{len(body)}\r\n\r\n".encode() + body)
        assert server.request("GET", "/v2/health/live")[0] == 200
        answered, _, _ = select.select(clients, [], [], 0)
        assert len(answered) < len(clients), "it has waited for all of them"
        assert ask(3.0) == 3.0
        for client, status in zip(clients, [b"400", b"413"] * 4, strict=True):
            assert client.recv(4096).startswith(b"HTTP/1.1 " + status)
