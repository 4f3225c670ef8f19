"""How whoever runs jobs is told at once that there is something to look at: a datagram to a socket in the runtime
directory. It is a hint; who is not told looks some time later."""

from __future__ import annotations

import contextlib
import os
import socket
from pathlib import Path


class Bell:
    """Rings it."""

    def __init__(self, path: Path | None) -> None:
        """``path``: None where there is no runtime directory."""
        self._path = path
        self._socket: socket.socket | None = None

    def ring(self) -> None:
        """Does not block, and fails without a word."""
        if self._path is None:
            return
        with contextlib.suppress(OSError):
            if self._socket is None:
                self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
                self._socket.setblocking(False)
            self._socket.sendto(b"\0", os.fspath(self._path))

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None


class Ear:
    """Hears it. Who comes later takes the path over, so that a successor is heard as soon as it is there."""

    def __init__(self, path: Path) -> None:
        """Raises OSError."""
        self._path = path
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
        new = path.with_name(f"{path.name}.{os.getpid()}")
        try:
            self._socket.setblocking(False)
            new.unlink(missing_ok=True)
            self._socket.bind(os.fspath(new))
            self._inode = new.stat().st_ino
            new.replace(path)
        except OSError:
            self._socket.close()
            with contextlib.suppress(OSError):
                new.unlink(missing_ok=True)
            raise

    def fileno(self) -> int:
        return self._socket.fileno()

    def clear(self) -> None:
        """Take in all that has been said."""
        with contextlib.suppress(OSError):
            while self._socket.recv(16):
                pass

    def close(self) -> None:
        self._socket.close()
        with contextlib.suppress(OSError):
            if self._path.stat().st_ino == self._inode:
                self._path.unlink()
