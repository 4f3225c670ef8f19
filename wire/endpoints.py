"""Where processes find each other: a runtime directory on one host, a TCP address between hosts.

A runtime directory (0700) holds ``callers.sock`` and ``workers.sock`` (the broker's ROUTERs), ``control.sock`` (its
Unix control socket), one ``worker-<id>.sock`` for each worker's results, ``jobs.sock``, by which who runs jobs is
woken, and ``http``, a gateway's URL. Each bound path is guarded by a lock that
its owner holds for life: what a process that was killed has left there is told from what a living one has.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import ipaddress
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

_PATH_MAX_BYTES: Final = 107  # sun_path of a Unix socket, without its final zero


class EndpointError(ValueError):
    """An address that cannot be used; the message is a sentence for the user."""


class InUseError(EndpointError):
    """A living process has it."""


@contextlib.contextmanager
def binding(what: object) -> Iterator[None]:
    """Raises EndpointError for what cannot be bound there, such as a socket on a full disk."""
    try:
        yield
    except OSError as error:
        raise EndpointError(f"cannot listen on {what}: {error.strerror}{_way_out(error.errno)}") from None


def _way_out(number: int | None) -> str:
    if number not in (errno.ENOSPC, errno.EDQUOT):
        return ""
    return "; free space or inodes there, or choose another directory with --runtime-dir"


def default_runtime_dir() -> Path:
    """$PENSTOCK_RUNTIME_DIR, else systemd's for this user or service, else a directory of this user's in /tmp."""
    given = os.environ.get("PENSTOCK_RUNTIME_DIR")
    if given:
        return Path(given)
    home = os.environ.get("XDG_RUNTIME_DIR")
    if home and os.access(home, os.W_OK):
        return Path(home) / "penstock"
    return Path(f"/tmp/penstock-{os.getuid()}")


@dataclass(frozen=True, slots=True)
class RuntimeDir:
    path: Path

    @property
    def callers(self) -> Path:
        return self.path / "callers.sock"

    @property
    def workers(self) -> Path:
        return self.path / "workers.sock"

    @property
    def control(self) -> Path:
        return self.path / "control.sock"

    @property
    def http(self) -> Path:
        """Where a gateway says which URL it listens at."""
        return self.path / "http"

    @property
    def jobs(self) -> Path:
        """Where who runs jobs is told that there is something to look at."""
        return self.path / "jobs.sock"

    def results(self, worker: bytes) -> Path:
        return self.path / f"worker-{worker.hex()}.sock"

    def make(self) -> None:
        """Create it, readable by this user alone. Raises EndpointError when it cannot be ours, or its name is too
        long."""
        longest = len(os.fsencode(self.results(bytes(8))))
        if longest > _PATH_MAX_BYTES:
            raise EndpointError(
                f"the runtime directory {self.path} makes socket paths of {longest} bytes, and Linux allows "
                f"{_PATH_MAX_BYTES}; choose a shorter one with --runtime-dir"
            )
        try:
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            about = self.path.stat()
        except OSError as error:
            raise EndpointError(
                f"cannot make the runtime directory {self.path}: {error.strerror}; choose another with --runtime-dir"
            ) from None
        if about.st_uid != os.getuid() or stat.S_IMODE(about.st_mode) & 0o077:
            raise EndpointError(
                f"the runtime directory {self.path} belongs to somebody else or is open to others; "
                "make it yours with mode 0700, or choose another with --runtime-dir"
            )

    def sweep(self) -> None:
        """Remove the sockets of processes that were killed: those whose lock nobody holds."""
        for lock in self.path.glob("*.lock"):
            try:
                Guard(lock.with_suffix(".sock")).release()
            except EndpointError:
                continue  # alive


class Guard:
    """The right to bind a socket path, held as a lock on the file beside it until ``release``, which removes both.

    The kernel drops the lock of a process that dies, however it dies; whoever takes it next removes what was left.
    Raises EndpointError when a living process holds it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock_path = path.with_suffix(".lock")
        try:
            self._fd = self._lock()
        except OSError as error:
            raise EndpointError(f"cannot lock {self._lock_path}: {error.strerror}{_way_out(error.errno)}") from None
        path.unlink(missing_ok=True)

    def _lock(self) -> int:
        while True:
            fd = os.open(self._lock_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # Whoever held it until now may have removed the file: then what is locked here guards nothing.
                if os.path.samestat(os.fstat(fd), os.stat(self._lock_path)):
                    return fd
            except FileNotFoundError:
                pass
            except OSError as error:
                os.close(fd)
                if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                    raise InUseError(f"{self.path} is in use by another process") from None
                raise
            os.close(fd)

    def release(self) -> None:
        """Remove the socket and the lock. Does nothing the second time."""
        if self._fd >= 0:
            for path in (self.path, self._lock_path):
                path.unlink(missing_ok=True)
            os.close(self._fd)
            self._fd = -1


@dataclass(frozen=True, slots=True)
class BrokerAddress:
    """Where a broker is: its runtime directory, or the host and port of its callers' socket. Workers join one port
    up."""

    runtime: RuntimeDir | None
    host: str = ""
    port: int = 0

    @property
    def callers(self) -> str:
        return f"ipc://{self.runtime.callers}" if self.runtime else f"tcp://{_bracket(self.host)}:{self.port}"

    @property
    def workers(self) -> str:
        return f"ipc://{self.runtime.workers}" if self.runtime else f"tcp://{_bracket(self.host)}:{self.port + 1}"

    def __str__(self) -> str:
        return str(self.runtime.path) if self.runtime else self.callers


def parse_broker(address: str | os.PathLike[str]) -> BrokerAddress:
    """A runtime directory, ``ipc://`` and one, or ``tcp://HOST:PORT``. Raises EndpointError."""
    given = os.fspath(address)
    if given.startswith("tcp://"):
        host, port = parse_host_port(given.removeprefix("tcp://"), given)
        if not 0 < port < 65535:
            raise EndpointError(f"{given!r}: a broker's port is from 1 to 65534")
        return BrokerAddress(None, host, port)
    if "://" in given and not given.startswith("ipc://"):
        raise EndpointError(f"{given!r} is neither a runtime directory, nor ipc://DIRECTORY, nor tcp://HOST:PORT")
    path = Path(given.removeprefix("ipc://"))
    if path.name == "callers.sock":
        path = path.parent
    if not path.name:
        raise EndpointError(f"{given!r} names no runtime directory")
    return BrokerAddress(RuntimeDir(path.absolute()))


def parse_host_port(text: str, whole: str = "") -> tuple[str, int]:
    """``HOST:PORT``, an IPv6 host in brackets. Raises EndpointError."""
    host, colon, port = text.rpartition(":")
    bare = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    plain = bare == host and ":" in host
    number = int(port) if port.isascii() and port.isdecimal() and len(port) <= 5 else -1
    if not colon or not bare or plain or not 0 <= number <= 65535:
        raise EndpointError(f"{whole or text!r} is not of the form HOST:PORT, such as 127.0.0.1:8000 or [::1]:8000")
    return bare, number


def check_loopback(host: str, option: str) -> None:
    """Raises EndpointError unless ``host`` is this machine's loopback."""
    try:
        loopback = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        loopback = False
    if not loopback:
        raise EndpointError(
            f"{option}: {host} can be reached from other machines, and the ZeroMQ side has no encryption yet; "
            "bind to 127.0.0.1 and join hosts through an encrypted tunnel (WireGuard, ssh -L)"
        )


def _bracket(host: str) -> str:
    return f"[{host}]" if ":" in host else host
