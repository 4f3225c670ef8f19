"""Real processes, as a user starts them: waited for by what they say, ended and looked after."""

from __future__ import annotations

import contextlib
import fcntl
import http.client
import json
import os
import queue
import re
import select
import signal
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

PENSTOCK = [sys.executable, "-m", "penstock.bin"]
DEADLINE_S = 30.0


def wait_for(condition: Callable[[], Any], what: str, deadline_s: float = DEADLINE_S, tick_s: float = 0.02) -> Any:
    """What ``condition`` returns as soon as it is true. The state of another process has no event to wait for here,
    so it is asked for again and again, with a deadline."""
    until = time.monotonic() + deadline_s
    tick = threading.Event()
    while not (value := condition()):
        assert time.monotonic() < until, f"waited {deadline_s:.0f} s in vain for {what}"
        tick.wait(tick_s)
    return value


class Process:
    """A ``penstock`` command. Its standard output can be waited for; its standard error is kept."""

    def __init__(
        self, arguments: Sequence[str], environment: dict[str, str] | None = None, by: Sequence[str] = ()
    ) -> None:
        """``by``: a command that becomes the command after it."""
        self.arguments = list(arguments)
        self.process = subprocess.Popen(
            [*by, *PENSTOCK, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | (environment or {}),
        )
        self.lines: queue.Queue[str] = queue.Queue()
        self._errors: list[str] = []
        self._reading = True
        self._readers = [
            threading.Thread(target=self._read_output, daemon=True),
            threading.Thread(target=self._read_errors, daemon=True),
        ]
        for reader in self._readers:
            reader.start()

    def _read_output(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.put(line.rstrip("\n"))
        self.lines.put("")

    def _read_errors(self) -> None:
        assert self.process.stderr is not None
        pipe, begun = self.process.stderr.fileno(), b""
        poll = select.poll()
        poll.register(pipe, select.POLLIN)
        while True:
            self._reading = False
            poll.poll()
            self._reading = True
            data = os.read(pipe, 1 << 16)
            *lines, begun = (begun + data).split(b"\n")
            if not data and begun:
                lines.append(begun)
            self._errors.extend(line.decode() for line in lines)
            if not data:
                return

    def _has_all(self) -> bool:
        """Whether all that has been written to its standard error has been read. Whoever reads says so first."""
        assert self.process.stderr is not None
        unread = fcntl.ioctl(self.process.stderr, termios.FIONREAD, bytes(4))
        return not any(unread) and not self._reading

    @property
    def errors(self) -> list[str]:
        """The lines of its standard error, with all that it has written by now."""
        if self._readers[1].is_alive():
            wait_for(
                lambda: not self._readers[1].is_alive() or self._has_all(),
                "its standard error to be read",
                tick_s=0.001,
            )
        return self._errors

    @property
    def pid(self) -> int:
        return self.process.pid

    def said(self, text: str) -> bool:
        """Whether a line with ``text`` has been logged."""
        return any(text in line for line in self.errors)

    def children(self, role: str = "") -> list[int]:
        """Its child processes that run ``penstock ROLE``."""
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdecimal():
                with contextlib.suppress(OSError):
                    state, parent = (entry / "stat").read_text().rpartition(")")[2].split()[:2]
                    command = (entry / "cmdline").read_bytes().split(b"\0")
                    if int(parent) == self.pid and state != "Z" and (not role or role.encode() in command):
                        found.append(int(entry.name))
        return sorted(found)

    def send(self, number: int) -> None:
        self.process.send_signal(number)

    def end(self, number: int = signal.SIGTERM) -> int:
        """Send a signal, wait for the end and return the exit code."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        return self.wait()

    def wait(self) -> int:
        code = self.process.wait(DEADLINE_S)
        for reader in self._readers:
            reader.join(DEADLINE_S)
        assert self.process.stdout is not None
        assert self.process.stderr is not None
        self.process.stdout.close()
        self.process.stderr.close()
        return code


class Server(Process):
    """``penstock up``, ready. ``runtime``: its runtime directory."""

    def __init__(
        self, runtime: Path, *arguments: str, environment: dict[str, str] | None = None, by: Sequence[str] = ()
    ) -> None:
        self.runtime = runtime
        command = ["up", *arguments, "--http=127.0.0.1:0", f"--runtime-dir={runtime}", "--log-format=json"]
        super().__init__(command, environment, by)
        try:
            ready = self.lines.get(timeout=DEADLINE_S)
        except queue.Empty:
            ready = "nothing in time"
        if not ready.startswith("penstock ready: "):
            self.end(signal.SIGKILL)
            pytest.fail(f"the server did not start: {self.errors}")
        self.url = ready.removeprefix("penstock ready: ")
        self.host, _, port = self.url.removeprefix("http://").rpartition(":")
        self.port = int(port)

    def request(
        self, method: str, path: str, body: bytes | None = None, headers: dict[str, str] | None = None
    ) -> tuple[int, dict[str, str], bytes]:
        """(status, headers by lower-case name, body), over a connection of its own."""
        connection = http.client.HTTPConnection(self.host, self.port, timeout=DEADLINE_S)
        try:
            connection.request(method, path, body, headers or {})
            response = connection.getresponse()
            return response.status, {name.lower(): value for name, value in response.getheaders()}, response.read()
        finally:
            connection.close()

    def infer(self, model: str, request: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        """A JSON inference request: (status, the JSON that came back)."""
        status, _, body = self.request("POST", f"/v2/models/{model}/infer", json.dumps(request).encode())
        return status, json.loads(body)

    def metrics(self) -> dict[str, float]:
        """Prometheus samples by name and labels."""
        text = self.request("GET", "/metrics")[2].decode()
        return {name: float(value) for name, value in re.findall(r"^([a-z_]+(?:\{.*\})?) (\S+)$", text, re.MULTILINE)}

    def log(self) -> list[dict[str, Any]]:
        """The log lines so far."""
        return [json.loads(line) for line in self.errors if line.startswith("{")]

    def check_clean_end(self) -> None:
        """Stop it as a user does: exit code 0, no process and no file left."""
        children = self.children()
        assert self.end() == 0, self.errors
        assert [pid for pid in children if Path(f"/proc/{pid}").exists()] == []
        assert list(self.runtime.iterdir()) == []


StartServer = Callable[..., Server]
StartProcess = Callable[..., Process]
