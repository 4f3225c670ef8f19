"""The broker's end of the control connections: who is connected, who has gone, and whose arena is where."""

from __future__ import annotations

import contextlib
import os
import select
import socket
from collections import deque
from pathlib import Path
from typing import Final

from penstock.broker.events import Came, Gone
from penstock.wire import control
from penstock.wire.arena import ArenaError, Mapping
from penstock.wire.doors import Doors
from penstock.wire.errors import BadMessage
from penstock.wire.events import Garbage
from penstock.wire.messages import MAX_PEERS
from penstock.wire.process import SHORT_OF_DESCRIPTORS

_UNNAMED_MAX: Final = 256  # connections that have not said who they are yet
_OUTBOX_MAX: Final = 2 * MAX_PEERS  # arenas that wait for one reader


class ControlServer:
    """Accepts connections and reads their first packet; afterwards a connection only ends, or takes what ``share`` puts
    into it. Registers its descriptors with ``epoll``."""

    def __init__(self, path: Path, epoll: select.epoll, doors: Doors) -> None:
        self._listener = control.listen(path)
        self._epoll = epoll
        epoll.register(self._listener, select.EPOLLIN)
        self._outboxes: dict[int, deque[tuple[bytes, int]]] = {}  # whose arenas wait for room, and as which serial
        # Of those that have said who they are there are as many as there are descriptors.
        self._connections: dict[int, socket.socket] = {}
        self._peers: dict[int, bytes] = {}
        self._filenos: dict[bytes, int] = {}  # by peer
        self._arenas: dict[bytes, tuple[int, Mapping]] = {}  # by peer: the descriptor, and what is behind it
        self._paused = False  # who waits is not accepted, for want of descriptors
        self._doors = doors
        doors.add(self)

    @property
    def listener(self) -> int:
        return self._listener.fileno()

    def accept(self) -> list[int]:
        """Accept all who wait; returns their descriptors. Processes of other users are turned away."""
        accepted: list[int] = []
        while self._doors.look():
            try:
                connection, _ = self._listener.accept()
            except OSError as error:
                if error.errno in SHORT_OF_DESCRIPTORS:
                    self.pause()
                break
            connection.setblocking(False)
            crowded = len(self._connections) - len(self._peers) >= _UNNAMED_MAX
            if crowded or not control.same_user(connection):
                connection.close()
                continue
            self._connections[connection.fileno()] = connection
            self._epoll.register(connection, select.EPOLLIN)
            accepted.append(connection.fileno())
        return accepted

    def pause(self) -> None:
        """Let nobody in: a listener that is left readable would keep the loop busy."""
        if not self._paused:
            self._paused = True
            self._epoll.unregister(self._listener)

    def resume(self) -> None:
        """See ``pause``."""
        if self._paused:
            self._paused = False
            self._epoll.register(self._listener, select.EPOLLIN)

    def read(self, fileno: int) -> Came | Gone | Garbage | None:
        """What a connection that became readable says. After Gone or Garbage it is closed."""
        connection = self._connections[fileno]
        known = self._peers.get(fileno)
        try:
            introduced = control.receive(connection)
            if introduced is None:
                self._close(fileno)
                return Gone(known, "its process ended", disconnected=True) if known else None
            if introduced.cut:
                raise BadMessage("an arena came for which this process has no descriptor left")
            return self._introduced(fileno, known, introduced.peer, introduced.arena)
        except BlockingIOError:
            return None
        except BadMessage as error:
            self._close(fileno)
            return Garbage("control", str(error), known or b"")

    def _introduced(self, fileno: int, known: bytes | None, peer: bytes, arena: int) -> Came:
        try:
            if known is not None and (peer != known or arena == control.NO_ARENA or peer in self._arenas):
                raise BadMessage("a second packet on a control connection")
            if known is None and peer in self._filenos:
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

    def share(self, owner: bytes, reader: bytes, serial: int) -> None:
        """Pass an arena on, as soon as the reader's connection takes it: the kernel lets few packets wait
        (net.unix.max_dgram_qlen, 10 where nobody has raised it)."""
        fileno = self._filenos.get(reader)
        if fileno is None:
            return  # it has gone meanwhile, which is an event of its own
        outbox = self._outboxes.get(fileno)
        if outbox is None:
            outbox = self._outboxes[fileno] = deque()
        outbox.append((owner, serial))
        if len(outbox) == 1:
            self.write(fileno)
        elif len(outbox) > _OUTBOX_MAX:
            self._cut(fileno)

    def write(self, fileno: int) -> None:
        """A connection may take more of what waits for it. Who is found to be gone is read as such."""
        outbox = self._outboxes.get(fileno)
        if outbox is None:
            return  # it has ended since it was polled
        connection = self._connections[fileno]
        try:
            while outbox:
                owner, serial = outbox[0]
                arena = self._arenas.get(owner)
                if arena is not None:  # else it has gone meanwhile, of which the reader will hear
                    control.introduce(connection, owner, arena[0], serial)
                outbox.popleft()
        except BlockingIOError:
            self._epoll.modify(fileno, select.EPOLLIN | select.EPOLLOUT)
            return
        except OSError:
            self._cut(fileno)
            return
        del self._outboxes[fileno]
        self._epoll.modify(fileno, select.EPOLLIN)

    def _cut(self, fileno: int) -> None:
        """End a connection; it becomes readable, and is read as gone."""
        self._outboxes.pop(fileno, None)
        self._epoll.modify(fileno, select.EPOLLIN)
        with contextlib.suppress(OSError):
            self._connections[fileno].shutdown(socket.SHUT_RDWR)

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
        self._epoll.unregister(fileno)
        self._outboxes.pop(fileno, None)
        self._connections.pop(fileno).close()
        peer = self._peers.pop(fileno, None)
        if peer is not None:
            del self._filenos[peer]
            arena = self._arenas.pop(peer, None)
            if arena is not None:
                os.close(arena[0])

    def close(self) -> None:
        """Whoever is connected is told that the broker leaves."""
        if not self._paused:
            self._epoll.unregister(self._listener)
        self._listener.close()
        for fileno, connection in list(self._connections.items()):
            with contextlib.suppress(OSError):
                control.leave(connection)
            self._close(fileno)
