"""Real processes for tests: brokers and workers as ``penstock up`` and systemd start them, and a loop for a Link."""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Final

from onnx import TensorProto, helper

from penstock.bin.bundled import BUNDLED_MODELS
from penstock.client.link import Link
from penstock.wire.endpoints import parse_broker
from penstock.wire.models import LOADING

DEADLINE_S: Final = 30.0
WIDE: Final = 200_000  # elements of a row of the model "wide": 800 KB


class Server:
    """A broker and workers that share a runtime directory. They have to end well: with exit code 0, leaving nothing."""

    def __init__(self, directory: Path) -> None:
        self.runtime = directory / "run"
        self._directory = directory
        self._processes: dict[str, list[subprocess.Popen[bytes]]] = {"broker": [], "worker": []}
        self._notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
        self._notify.bind(os.fspath(directory / "notify.sock"))

    def __enter__(self) -> Server:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(self, role: str, *arguments: str) -> subprocess.Popen[bytes]:
        """Start ``penstock ROLE`` and wait until it says that it is ready."""
        with self.log(role).open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "penstock.bin", role, *arguments, f"--runtime-dir={self.runtime}"],
                env=os.environ | {"NOTIFY_SOCKET": str(self._directory / "notify.sock")},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        self._processes[role].append(process)
        ended = os.pidfd_open(process.pid)
        try:
            while True:
                readable, _, _ = select.select([self._notify.fileno(), ended], [], [], DEADLINE_S)
                assert self._notify.fileno() in readable, f"{role} is not ready: {self.log(role).read_text()}"
                if self._notify.recv(4096) == b"READY=1":
                    return process
        finally:
            os.close(ended)

    def log(self, role: str) -> Path:
        return self._directory / f"{role}.log"

    def end(self, process: subprocess.Popen[bytes], number: int) -> int:
        """Send a signal that ends a process. Its exit code."""
        for processes in self._processes.values():
            if process in processes:
                processes.remove(process)
        process.send_signal(number)
        return process.wait(DEADLINE_S)

    def stop(self) -> None:
        left = [process for role in ("broker", "worker") for process in self._processes[role]]
        codes = [self.end(process, signal.SIGTERM) for process in left]
        self._notify.close()
        assert codes == [0] * len(codes), [self.log(role).read_text() for role in ("broker", "worker")]
        assert os.listdir(self.runtime) == []

    @contextlib.contextmanager
    def worker_stopped(self) -> Iterator[None]:
        """The worker neither runs nor is gone."""
        worker = self._processes["worker"][-1]
        worker.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, worker.pid, os.WSTOPPED)
        try:
            yield
        finally:
            worker.send_signal(signal.SIGCONT)

    @property
    def tcp(self) -> str:
        """The address of a broker that logs JSON and was started with --bind."""
        for line in self.log("broker").read_text().splitlines():
            address: str | None = json.loads(line).get("callers")
            if address is not None:
                return address
        raise AssertionError("the broker does not listen on TCP")

    def wait(self) -> None:
        """Until the broker can tell of every model whether it is served."""
        link = Link(parse_broker(self.runtime), "", lambda metrics: None)
        try:
            drive(link, lambda: is_settled(link))
        finally:
            link.close()


def is_settled(link: Link) -> bool:
    states = [state for versions in (link.caller.models or {}).values() for state in versions.values()]
    return bool(states) and all(state.state != LOADING for state in states)


def drive(link: Link, condition: Callable[[], Any]) -> None:
    """The loop that a Link needs, until ``condition`` holds."""
    until = time.monotonic() + DEADLINE_S
    while not condition():
        now = time.monotonic()
        assert now < until, f"waited {DEADLINE_S:.0f} s in vain"
        link.handle(link.wait(max(0.0, min(link.due(), until) - now)))


def make_repository(directory: Path) -> Path:
    """``digits``; ``wide`` and ``strings``, which answer with their input; ``patient``, whose requests wait for three
    others as long as their own time allows, at most 10 s; ``broken``, which cannot be loaded."""
    shutil.copytree(BUNDLED_MODELS / "digits", directory / "digits")
    _write(directory / "wide", _identity("FLOAT", ["N", WIDE]))
    _write(directory / "strings", _identity("STRING", ["N"]))
    _write(directory / "patient", _identity("FLOAT", ["N", 2]), 'max_queue_delay = "10s"\nmax_batch_size = 4\n')
    _write(directory / "broken", b"this is no model")
    return directory


def _write(directory: Path, model: bytes, config: str = "") -> None:
    (directory / "1").mkdir(parents=True)
    (directory / "1" / "model.onnx").write_bytes(model)
    if config:
        (directory / "model.toml").write_text(config)


def _identity(kind: str, shape: list[str | int]) -> bytes:
    x, y = (helper.make_tensor_value_info(name, TensorProto.DataType.Value(kind), shape) for name in "xy")
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "identity", [x], [y])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    content: bytes = model.SerializeToString()
    return content
