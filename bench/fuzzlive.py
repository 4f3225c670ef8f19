"""What ``fuzz.py --live`` does: a real server gets malformed requests, messages, packets and bytes over its sockets,
while well-behaved clients check every answer.

Afterwards its processes are the same, hold as many descriptors as before and little more memory, and it is ready.
"""

from __future__ import annotations

import json
import logging
import os
import select
import socket
import struct
import tempfile
import threading
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from random import Random
from typing import IO, Any, Final, Self
from urllib.error import HTTPError, URLError
from urllib.request import urlopen

import numpy as np
import zmq

from bench import http as bench_http
from bench import processes
from bench.fuzzexamples import Examples, model_contents
from bench.fuzzhttp import HttpTarget, statuses
from bench.fuzzmutate import changed_bytes, malformed
from penstock.client import Client
from penstock.wire.codec import pack, unpack
from penstock.wire.endpoints import RuntimeDir
from penstock.wire.errors import PenstockError
from penstock.wire.messages import (
    FROM_CALLER,
    FROM_WORKER,
    TO_CALLER,
    TO_WORKER,
    CallerHello,
    Carrier,
    Message,
    Welcome,
    WorkerHello,
    WorkerModels,
)
from penstock.wire.zmtp import Zmtp

GROWTH_MAX_BYTES: Final = 48 << 20  # of one process's own memory, behind the first tenth of the inputs
_SHARES: Final = {"http": 60, "callers.sock": 14, "workers.sock": 10, "raw": 6, "control.sock": 6, "results": 4}
_LOOK_MS: Final = 5  # for answers, before so many connections are left
_WINDOW: Final = 48  # HTTP connections that are open at a time
_LIFE: Final = 1000  # messages of one peer, then another comes
_WAIT_S: Final = 10.0
_SETTLE_S: Final = 40.0  # for descriptors to be closed, at most
_QUIET_S: Final = 12.0  # and at least: the broker takes those for gone who are silent for 5 s, and looks each 2
_SELDOM: Final = 10  # lines of a kind
_LINE_MAX: Final = 4000
_PAUSE_S: Final = 0.02  # between two answers that are checked
_STILL_S: Final = 2.0  # a machine that stands still for so long makes peers take each other for dead, and
_AFTER_S: Final = 20.0  # requests fail as long as that; this is told, and not held against the server
_MODELS: Final = {
    "double": "double",
    "other": "other",
    "m0": "double",
    "m1": "other",
    "m3": "strings",
    "check": "double",
}


@dataclass
class Outcome:
    lines: list[str] = field(default_factory=list)
    findings: list[str] = field(default_factory=list)


class Beside(ABC):
    """A thread that does something again and again beside the flood, until it is told to stop."""

    def __init__(self) -> None:
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        self._thread.join(60)

    def _run(self) -> None:
        while not self._ended.wait(_PAUSE_S):
            self.turn()

    @abstractmethod
    def turn(self) -> None:
        """Do it once more."""


class Check(Beside):
    """Asks and compares."""

    def __init__(self, name: str, ask: Callable[[np.ndarray], np.ndarray]) -> None:
        self.name = name
        self.answers = 0
        self.worst_s = 0.0
        self.wrong: list[tuple[float, str]] = []  # when, and what
        self._ask = ask
        super().__init__()

    def turn(self) -> None:
        number = self.answers
        x = np.full((1, 1000 if number % 4 == 0 else 3), number % 1000, np.float32)
        before = time.monotonic()
        try:
            right = np.array_equal(self._ask(x), x + x)
            said = "another result"
        except (OSError, HTTPException, ValueError, KeyError, PenstockError) as error:
            right, said = False, repr(error)
        self.worst_s = max(self.worst_s, time.monotonic() - before)
        self.answers += 1
        if not right and len(self.wrong) < 20:
            self.wrong.append((time.monotonic(), f"{self.name}, answer {number}: {said}"))


class Pauses(Beside):
    """Notes when the machine stood still, or this process was not let run: as (when it went on, for how many
    seconds)."""

    def __init__(self) -> None:
        self.seen: list[tuple[float, float]] = []
        self._last = time.monotonic()
        super().__init__()

    def turn(self) -> None:
        now = time.monotonic()
        if now - self._last > _STILL_S:
            self.seen.append((now, now - self._last))
        self._last = now

    def explain(self, at: float) -> bool:
        """Whether what went wrong then may be due to that."""
        return any(went_on - seconds <= at <= went_on + _AFTER_S for went_on, seconds in self.seen)


def ask_http(connection: HTTPConnection) -> Callable[[np.ndarray], np.ndarray]:
    def ask(x: np.ndarray) -> np.ndarray:
        tensor = {"name": "x", "datatype": "FP32", "shape": x.shape, "data": x.ravel().tolist()}
        try:
            connection.request("POST", "/v2/models/check/infer", json.dumps({"inputs": [tensor]}))
            answer = json.loads(connection.getresponse().read())
        except (OSError, HTTPException):
            connection.close()  # the next request makes another
            raise
        return np.array(answer["outputs"][0]["data"], np.float32).reshape(x.shape)

    return ask


@dataclass(frozen=True)
class State:
    """Of a server's processes, by pid."""

    memory: dict[int, int]  # bytes that are their own
    descriptors: dict[int, int]


def state_of(pids: set[int]) -> State:
    memory, descriptors = {}, {}
    for pid in pids:
        with suppress(OSError):
            status = Path(f"/proc/{pid}/status").read_text()
            memory[pid] = int(status.partition("RssAnon:")[2].split()[0]) * 1024
            descriptors[pid] = len(os.listdir(f"/proc/{pid}/fd"))
    return State(memory, descriptors)


class Flood:
    """Inputs over a server's sockets. ``sent``: by socket; ``statuses``: of HTTP."""

    def __init__(self, server: bench_http.Server, runtime: RuntimeDir, random: Random) -> None:
        self.sent: Counter[str] = Counter()
        self.statuses: Counter[int] = Counter()
        self.findings: list[str] = []
        host, _, port = server.url.removeprefix("http://").rpartition(":")
        self._address = host, int(port)
        self._runtime = runtime
        self._random = random
        self._http = HttpTarget()
        self._examples = Examples(random)
        self._open: list[tuple[socket.socket, bytes]] = []
        self._context: zmq.Context[Any] = zmq.Context()
        self._context.linger = 0
        self._peers: dict[str, tuple[zmq.Socket[Any], int]] = {}

    def close(self) -> None:
        self._read_http()
        self._context.destroy(linger=0)

    def send(self, count: int) -> None:
        kinds = self._random.choices(list(_SHARES), list(_SHARES.values()), k=count)
        for kind in kinds:
            with suppress(BlockingIOError, ConnectionError, TimeoutError):  # it has been refused, which it may be
                if kind == "http":
                    self._say_http()
                elif kind in ("callers.sock", "workers.sock"):
                    self._say_message(kind)
                elif kind == "raw":
                    self._say_raw()
                elif kind == "control.sock":
                    self._say_control()
                else:
                    self._subscribe()
            self.sent[kind] += 1

    def _say_http(self) -> None:
        if len(self._open) >= _WINDOW:
            self._read_http()
        random = self._random
        client = socket.create_connection(self._address, timeout=_WAIT_S)
        _, pieces = self._http.make(random)
        client.setblocking(False)
        with suppress(OSError):  # it does not take more, or has answered and closed
            for piece in pieces:
                client.send(piece)
            if random.random() < 0.1:
                client.shutdown(socket.SHUT_WR)
        if random.random() < 0.1:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            client.close()
        else:
            self._open.append((client, b"".join(pieces)))

    def _read_http(self) -> None:
        """What has been answered until now, and leave."""
        poll = select.poll()
        for client, _ in self._open:
            poll.register(client, select.POLLIN)
        poll.poll(_LOOK_MS)
        for client, said in self._open:
            heard = b""
            with suppress(OSError):
                while more := client.recv(1 << 20):
                    heard += more
            client.close()
            try:
                self.statuses.update(statuses(heard, b"HEAD" in said, whole=False))
            except (AssertionError, ValueError) as error:
                self.findings.append(f"HTTP: {error!r} to {said[:2000]!r}")
        self._open.clear()

    def _say_message(self, end: str) -> None:
        random = self._random
        kinds = FROM_CALLER if end == "callers.sock" else FROM_WORKER
        if end not in self._peers or random.random() < 1 / _LIFE:
            self._join(end)
        dealer, epoch = self._peers[end]
        message, other = (self._example(kinds) for _ in range(2))
        message.epoch = epoch if message.epoch else 0
        head, frames = malformed(random, message, other, 0.7)
        try:
            dealer.send_multipart([head, *frames], zmq.NOBLOCK, copy=True)
        except zmq.Again:  # as many as the broker takes unread of one peer wait: another goes on
            self._join(end)
            dealer, _ = self._peers[end]
            dealer.send_multipart([head, *frames], zmq.NOBLOCK, copy=True)
        with suppress(zmq.Again):
            while True:
                dealer.recv_multipart(zmq.NOBLOCK)

    def _example(self, kinds: Any) -> Message:
        """Of a worker, nothing that it serves: a server remembers that, and says that it is not there any more."""
        choice = [kind for kind in kinds.values() if kind is not WorkerModels]
        message = self._examples.any_of(self._random.choice(choice))
        if isinstance(message, WorkerHello):
            message.models = ()
        return message

    def _join(self, end: str) -> None:
        if end in self._peers:
            self._peers[end][0].close(0)
        dealer = self._context.socket(zmq.DEALER)
        dealer.set(zmq.IDENTITY, self._random.choice((b"\x01" + self._random.randbytes(7),) * 9 + (b"x" * 200,)))
        dealer.connect(f"ipc://{self._runtime.path / end}")
        caller = end == "callers.sock"
        dealer.send(pack(CallerHello(0, "", 1, True) if caller else WorkerHello(0, "fuzz", "cpu", 1, (), 1, ())))
        epoch = 1
        while dealer.poll(1000):
            head, *frames = dealer.recv_multipart()
            heard = unpack(head, frames, TO_CALLER if caller else TO_WORKER)
            if isinstance(heard, Welcome):
                epoch = heard.epoch
                break
        self._peers[end] = dealer, epoch

    def _say_raw(self) -> None:
        """Bytes that are not quite ZeroMQ's, to any of its sockets."""
        random = self._random
        paths = [self._runtime.callers, self._runtime.workers, *self._runtime.path.glob("worker-*.sock")]
        stream = Zmtp(random.choice(("DEALER", "SUB")), b"\x01" + random.randbytes(7)).opening
        message = self._example(FROM_CALLER)
        body = pack(message)
        stream += struct.pack(">BQ", 2, len(body)) + body if not isinstance(message, Carrier) else b"\x00\x01x"
        keep = random.choice((0, 64, 64, len(stream) // 2))
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
            client.settimeout(_WAIT_S)
            client.connect(os.fspath(random.choice(paths)))
            client.sendall(stream[:keep] + changed_bytes(random, stream[keep:], stream))
            if random.random() < 0.5:
                client.setblocking(False)
                with suppress(OSError):
                    client.recv(4096)

    def _say_control(self) -> None:
        random = self._random
        hello = struct.pack("<4sH8sQ", b"PNST", 1, b"\x01" + random.randbytes(7), random.getrandbits(64))
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as client:
            client.settimeout(_WAIT_S)
            client.connect(os.fspath(self._runtime.control))
            for _ in range(random.choice((1, 1, 2))):
                packet = changed_bytes(random, hello, hello) if random.random() < 0.7 else hello
                socket.send_fds(client, [packet or b"x"], [client.fileno()] * random.choice((0, 1, 3)))

    def _subscribe(self) -> None:
        random = self._random
        paths = list(self._runtime.path.glob("worker-*.sock"))
        if "results" not in self._peers or random.random() < 1 / 100:
            if "results" in self._peers:
                self._peers["results"][0].close(0)
            listener = self._context.socket(zmq.XSUB)
            listener.connect(f"ipc://{random.choice(paths)}")
            self._peers["results"] = listener, 0
        # A larger one than may come ends the connection, and what is on its way there.
        size = 5000 if random.random() < 0.02 else random.choice((0, 7, 8, 8, 8, 9, 250))
        topic = random.choice((b"\1", b"\0", b"\1", b"\7", b"")) + random.randbytes(size)
        with suppress(zmq.ZMQError):
            self._peers["results"][0].send(topic, zmq.NOBLOCK)


def make_repository(directory: Path) -> Path:
    contents = model_contents()
    for name, content in _MODELS.items():
        folder = directory / name / "1"
        folder.mkdir(parents=True)
        (folder / "model.onnx").write_bytes(contents[content])
    return directory


def is_ready(url: str) -> str:
    """Or why not."""
    try:
        with urlopen(url + "/v2/health/ready", timeout=_WAIT_S):
            return ""
    except HTTPError as error:
        return error.read().decode()
    except URLError as error:
        return str(error)


def run(seed: int, count: int) -> Outcome:
    outcome, random = Outcome(), Random(f"{seed} live")
    logging.getLogger("penstock.client").setLevel(logging.ERROR)  # it is told of workers that are none
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="penstock-fuzz-")))
        repository, runtime = make_repository(directory / "models"), RuntimeDir(directory / "run")
        log = stack.enter_context(tempfile.TemporaryFile())
        more = ("--log-format=json", f"--jobs={directory / 'jobs.sqlite'}")
        server = stack.enter_context(bench_http.Server(repository, runtime.path, *more, log=log))
        runs_jobs(runtime)
        pids = lasting(server.pid)
        connection = HTTPConnection(server.url.removeprefix("http://"), timeout=_WAIT_S)
        stack.callback(connection.close)
        client = stack.enter_context(Client(runtime.path))
        checks = [
            Check("HTTP", ask_http(connection)),
            Check("client library", lambda x: client.infer("check", {"x": x}, timeout=_WAIT_S)["y"]),
        ]
        flood = Flood(server, runtime, random)
        began = time.monotonic()
        with Pauses() as pauses, checks[0], checks[1]:
            flood.send(count // 10)
            warm = settled(pids)
            flood.send(count - count // 10)
            flood.close()
            after = settled(pids, warm)
        seconds = time.monotonic() - began
        outcome.findings += flood.findings[:20] + list(_changes(pids, lasting(server.pid), warm, after))
        reason = is_ready(server.url)
        if reason:
            outcome.findings.append(f"the server is not ready: {reason}")
        for check in checks:
            outcome.findings += [said for at, said in check.wrong if not pauses.explain(at)]
        outcome.lines += _lines(server, seed, seconds, flood, checks, warm, after)
        outcome.lines += [f"the machine stood still for {seconds:.1f} s" for _, seconds in pauses.seen]
        log.seek(0)
        outcome.lines += _logged(log)
    return outcome


def runs_jobs(runtime: RuntimeDir) -> None:
    """Wait for the last of a server's processes, which it does not wait for itself before it says that it is ready."""
    until = time.monotonic() + _SETTLE_S
    while not runtime.jobs.exists() and time.monotonic() < until:
        time.sleep(_LOOK_MS / 1000)


def lasting(root: int) -> set[int]:
    """A server's processes, but those that read large JSON, which come when there is some and end when there is
    none."""
    return {pid for pid in processes.of(root) if not _is_clerk(pid)}


def _is_clerk(pid: int) -> bool:
    try:
        return b"penstock.gateway.clerk" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return True  # it has ended meanwhile


def settled(pids: set[int], before: State | None = None) -> State:
    """When all who came have been taken for gone, and no more descriptors are open than ``before``; at first, when for
    so long none has been opened, since what begins, and who is told of it, opens some."""
    began = quiet = time.monotonic()
    last = state_of(pids)
    while True:
        time.sleep(_QUIET_S / 6)
        now, at = state_of(pids), time.monotonic()
        if before is None and _opened(last, now):
            quiet = at
        last = now
        closed = before is None or not _opened(before, now)
        if at - began > _SETTLE_S or (closed and at - quiet > _QUIET_S):
            return now


def _opened(before: State, after: State) -> bool:
    """Whether any process has more descriptors than it had."""
    return any(count > before.descriptors.get(pid, 0) for pid, count in after.descriptors.items())


def _changes(pids: set[int], left: set[int], warm: State, after: State) -> Iterator[str]:
    if pids != left:
        yield f"processes have ended or begun: {sorted(pids)} were there, and now {sorted(left)}"
    for pid in sorted(pids & after.memory.keys()):
        grown = after.memory[pid] - warm.memory[pid]
        if grown > GROWTH_MAX_BYTES:
            yield f"process {pid} grew by {grown / 1e6:.1f} MB"
        if after.descriptors[pid] > warm.descriptors[pid]:
            yield f"process {pid} has {after.descriptors[pid]} descriptors open, and had {warm.descriptors[pid]}"


def _logged(log: IO[bytes]) -> Iterator[str]:
    """What a server has warned of: how often, and as it stands there if it was seldom."""
    counts: Counter[str] = Counter()
    seldom: dict[str, list[str]] = {}
    for line in log:
        with suppress(ValueError, KeyError):
            event = json.loads(line)["event"]
            counts[event] += 1
            seldom.setdefault(event, []).append(line.decode().strip()[:_LINE_MAX])
            del seldom[event][_SELDOM:]
    yield "logged: " + ", ".join(f"{event}: {count:,}" for event, count in counts.most_common())
    for event, lines in seldom.items():
        if counts[event] < _SELDOM:
            yield from lines


def _lines(
    server: bench_http.Server,
    seed: int,
    seconds: float,
    flood: Flood,
    checks: list[Check],
    warm: State,
    after: State,
) -> Iterator[str]:
    sent = sum(flood.sent.values())
    yield f"live, seed {seed}: {sent:,} inputs in {seconds:.0f} s, {sent / seconds:,.0f}/s"
    yield "| socket | inputs |"
    yield "|---|---|"
    yield from (f"| {name} | {count:,} |" for name, count in flood.sent.items())
    answers = ", ".join(f"{status}: {count:,}" for status, count in sorted(flood.statuses.items()))
    yield f"answers to HTTP by status: {answers}"
    for check in checks:
        yield (
            f"checked over {check.name}: {check.answers:,} answers, {len(check.wrong)} not right, "
            f"the slowest after {check.worst_s * 1000:.0f} ms"
        )
    yield "| process | MB before | MB after | descriptors before | after |"
    yield "|---|---|---|---|---|"
    for role, pids in {"up": [server.pid], **server.pids}.items():
        for pid in pids:
            if pid in after.memory:
                yield (
                    f"| {role} | {warm.memory[pid] / 1e6:.1f} | {after.memory[pid] / 1e6:.1f} "
                    f"| {warm.descriptors[pid]} | {after.descriptors[pid]} |"
                )
