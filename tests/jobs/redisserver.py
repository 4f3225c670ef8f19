"""A Redis of a test's own: on a Unix socket in its directory, where no other can be meant."""

from __future__ import annotations

import shutil
import subprocess
import time
from pathlib import Path
from types import TracebackType

import redis

_WAIT_S = 30.0


class RedisServer:
    """``extra``: more of its configuration, as on its command line."""

    def __init__(self, command: str, directory: Path, *extra: str) -> None:
        self.directory = directory
        self.socket = directory / "redis.sock"
        self.url = f"unix://{self.socket}"
        self._command = [command, "--port", "0", "--unixsocket", str(self.socket), "--unixsocketperm", "700"]
        self._command += ["--dir", str(directory), "--save", "", "--daemonize", "no", "--loglevel", "warning", *extra]
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with (self.directory / "redis.log").open("ab") as log:
            self._process = subprocess.Popen(self._command, stdout=log, stderr=log)
        self.wait()

    def wait(self) -> None:
        """Until it answers, and has read what it had kept."""
        until = time.monotonic() + _WAIT_S
        with redis.Redis(unix_socket_path=str(self.socket), socket_timeout=_WAIT_S) as client:
            while True:
                try:
                    client.ping()
                    return
                except redis.RedisError:
                    assert time.monotonic() < until, (self.directory / "redis.log").read_text()
                    assert self._process is not None
                    assert self._process.poll() is None, (self.directory / "redis.log").read_text()
                    try:
                        self._process.wait(0.02)
                    except subprocess.TimeoutExpired:
                        continue

    def flush(self) -> None:
        with redis.Redis(unix_socket_path=str(self.socket), socket_timeout=_WAIT_S) as client:
            client.flushall()

    @property
    def process(self) -> subprocess.Popen[bytes]:
        assert self._process is not None
        return self._process

    def kill(self) -> None:
        """As kill -9 does."""
        self.process.kill()
        self.process.wait(_WAIT_S)

    def __enter__(self) -> RedisServer:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._process is not None and self._process.poll() is None:
            self.kill()


def directory_for(base: Path) -> Path:
    """Short enough for a socket, and empty."""
    shutil.rmtree(base / "r", ignore_errors=True)
    (base / "r").mkdir()
    return base / "r"
