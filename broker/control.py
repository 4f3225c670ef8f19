"""The broker's end of the control connections: who is connected, and who has gone."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from penstock.broker.events import Gone
from penstock.wire import control
from penstock.wire.errors import BadMessage
from penstock.wire.events import Garbage

_UNNAMED_MAX: Final = 256  # connections that have not said who they are yet


class ControlServer:
    """Accepts connections and reads their first packet; afterwards a connection only ends.

    ``filenos`` changes with every accepted or ended connection.
    """

    def __init__(self, path: Path) -> None:
        self._listener = control.listen(path)
        self._connections: dict[int, socket.socket] = {}
        self._peers: dict[int, bytes] = {}

    @property
    def listener(self) -> int:
        return self._listener.fileno()

    def accept(self) -> Iterator[int]:
        """Accept all who wait; yields their descriptors. Processes of other users are turned away."""
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:  # nobody waits, or descriptors have run out: they may wait on
                return
            connection.setblocking(False)
            crowded = len(self._connections) - len(self._peers) >= _UNNAMED_MAX
            if crowded or not control.same_user(connection):
                connection.close()
                continue
            self._connections[connection.fileno()] = connection
            yield connection.fileno()

    def read(self, fileno: int) -> Gone | Garbage | None:
        """What a connection that became readable says. After Gone or Garbage it is closed."""
        connection = self._connections[fileno]
        known = self._peers.get(fileno)
        try:
            packet = connection.recv(control.HELLO_BYTES + 1)
        except BlockingIOError:
            return None
        except OSError:
            packet = b""
        if not packet:
            self._close(fileno)
            return Gone(known, "its process ended") if known else None
        try:
            if known:
                raise BadMessage("a second packet on a control connection")
            self._peers[fileno] = control.peer_id(packet)
        except BadMessage as error:
            self._close(fileno)
            return Garbage("control", str(error), known or b"")
        return None

    def __contains__(self, fileno: int) -> bool:
        return fileno in self._connections

    def _close(self, fileno: int) -> None:
        self._connections.pop(fileno).close()
        self._peers.pop(fileno, None)

    def close(self) -> None:
        self._listener.close()
        for fileno in list(self._connections):
            self._close(fileno)
