"""The broker's end of the control connections: who is connected, who has gone, and whose arena is where."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from penstock.broker.events import Came, Gone
from penstock.wire import control
from penstock.wire.arena import ArenaError, Mapping
from penstock.wire.errors import BadMessage
from penstock.wire.events import Garbage

_UNNAMED_MAX: Final = 256  # connections that have not said who they are yet


class ControlServer:
    """Accepts connections and reads their first packet; afterwards a connection only ends."""

    def __init__(self, path: Path) -> None:
        self._listener = control.listen(path)
        self._connections: dict[int, socket.socket] = {}
        self._peers: dict[int, bytes] = {}
        self._filenos: dict[bytes, int] = {}  # by peer
        self._arenas: dict[bytes, tuple[int, Mapping]] = {}  # by peer: the descriptor, and what is behind it

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

    def read(self, fileno: int) -> Came | Gone | Garbage | None:
        """What a connection that became readable says. After Gone or Garbage it is closed."""
        connection = self._connections[fileno]
        known = self._peers.get(fileno)
        try:
            introduced = control.receive(connection)
            if introduced is None:
                self._close(fileno)
                return Gone(known, "its process ended", disconnected=True) if known else None
            return self._introduced(fileno, known, *introduced)
        except BlockingIOError:
            return None
        except BadMessage as error:
            self._close(fileno)
            return Garbage("control", str(error), known or b"")

    def _introduced(self, fileno: int, known: bytes | None, peer: bytes, arena: int) -> Came:
        try:
            if known is not None:
                raise BadMessage("a second packet on a control connection")
            if peer in self._filenos:
                raise BadMessage("a second control connection of one peer")
            size = 0
            if arena != control.NO_ARENA:
                mapping = Mapping(os.dup(arena))
                self._arenas[peer] = arena, mapping
                size = mapping.size
        except (ArenaError, BadMessage, OSError) as error:
            if arena != control.NO_ARENA:
                os.close(arena)
            raise BadMessage(str(error)) from None
        self._peers[fileno] = peer
        self._filenos[peer] = fileno
        return Came(peer, size)

    def share(self, owner: bytes, reader: bytes) -> None:
        """Pass an arena on. Who takes nothing is disconnected, and read as gone."""
        arena, fileno = self._arenas.get(owner), self._filenos.get(reader)
        if arena is None or fileno is None:
            return  # one of them has gone meanwhile, which is an event of its own
        connection = self._connections[fileno]
        try:
            control.introduce(connection, owner, arena[0])
        except OSError:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)  # which makes it readable

    def shares(self, reader: bytes) -> bool:
        """Whether a peer has a control connection, and so the arenas of others."""
        return reader in self._filenos

    def view(self, owner: bytes, place: int, nbytes: int) -> memoryview:
        """What lies in an arena. Raises BadMessage when it does not."""
        return self._arenas[owner][1].view(place, nbytes)

    def unnamed(self) -> list[int]:
        """Connections that have not said who they are yet."""
        return [fileno for fileno in self._connections if fileno not in self._peers]

    def __contains__(self, fileno: int) -> bool:
        return fileno in self._connections

    def _close(self, fileno: int) -> None:
        self._connections.pop(fileno).close()
        peer = self._peers.pop(fileno, None)
        if peer is not None:
            del self._filenos[peer]
            arena = self._arenas.pop(peer, None)
            if arena is not None:
                os.close(arena[0])

    def close(self) -> None:
        self._listener.close()
        for fileno in list(self._connections):
            self._close(fileno)
