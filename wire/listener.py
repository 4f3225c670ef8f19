"""The end of ZeroMQ connections that is bound: a ROUTER or an XPUB on the epoll of whoever owns it, without a thread of
its own.

Who is not read waits in its own connection: of each peer one look is taken in, and no more before all of it has been
taken out again, a message of each in turn. A peer that does not read what it is told is the business of whoever tells
it: ``send`` says "full".
"""

from __future__ import annotations

import errno
import os
import select
import socket
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Final

from penstock.wire.connection import Channel
from penstock.wire.doors import Doors
from penstock.wire.errors import BadMessage
from penstock.wire.messages import Payload
from penstock.wire.process import SHORT_OF_DESCRIPTORS
from penstock.wire.zmtp import FRAME_MAX_BYTES, Zmtp

# A subscription has 9 bytes; where none but these come, nobody may send more.
SUBSCRIPTION_MAX_BYTES: Final = 256
HANDSHAKE_MAX_S: Final = 30.0  # from a connection until both ends have agreed
GREETING_MAX: Final = 1024  # connections with which nothing has been agreed yet; then the oldest of them goes
_BACKLOG: Final = 1024
_BUFFER_BYTES: Final = 16 * 1024  # for each peer, of whom there may be thousands; most messages are smaller
_REPLIES_MAX_BYTES: Final = 64 * 1024
_LOOKS: Final = 16  # at most at a frame that is larger than that, before it is somebody else's turn
_GONE: Final = (errno.ECONNRESET, errno.EPIPE, errno.ETIMEDOUT, errno.ENOTCONN)  # no more than that
_READ: Final[int] = select.EPOLLIN | select.EPOLLHUP | select.EPOLLERR


class Peer(Channel):
    """One who has connected. ``id``: as which; empty until both ends have agreed."""

    def __init__(self, epoll: select.epoll, accepted: socket.socket, kind: str, frame_bytes_max: int) -> None:
        """Raises OSError."""
        super().__init__(epoll)
        self.id = b""
        self.topics: set[bytes] = set()
        self.inbox: deque[list[Payload]] = deque()
        self.until = time.monotonic() + HANDSHAKE_MAX_S
        self._socket, self.fileno = accepted, accepted.fileno()
        self._zmtp = Zmtp(kind, frame_bytes_max=frame_bytes_max, buffer_bytes=_BUFFER_BYTES)
        self._watched = select.EPOLLIN
        epoll.register(accepted, self._watched)
        # What does not fit into a connection that is new will be written when there is room.
        self._write((self._zmtp.opening,))

    def read(self) -> bool:
        """Take in what has come. False: nothing more will. Raises OSError, BadMessage."""
        assert self._socket is not None
        zmtp, inbox = self._zmtp, self.inbox
        for _ in range(_LOOKS):
            try:
                size = self._socket.recv_into(zmtp.room())
            except BlockingIOError:
                break
            if not size:
                return False
            messages = zmtp.received(size)
            if messages:
                inbox.extend(messages)
            if zmtp.replies:
                if self.out_bytes < _REPLIES_MAX_BYTES:  # who pings on and reads nothing is not answered for ever
                    self._queue((zmtp.replies,))
                    self.flush()
                zmtp.replies = b""
            if zmtp.idle or inbox:
                break
        if zmtp.ready and not self.ready:
            self.ready = True
            self.id = zmtp.peer
        return True

    def flush(self) -> None:
        """There may be room for what waits. Who hears nothing more may still have said something."""
        try:
            self._flush()
        except OSError:
            self._forget()

    def close(self, until: float = 0.0) -> None:
        """Close; what was sent is still written if the peer takes it in time."""
        self._linger(until)
        self._drop()
        self.inbox.clear()


class Listener:
    """Sockets that are bound, and who has connected. Those that it registers with ``epoll`` are told by ``in``; what
    happens there is to be given to ``happened``, until nothing is ``pending``.

    ``peers``: by the identity that they have given themselves; the last who comes with one has it (a ROUTER alone).
    """

    def __init__(
        self,
        epoll: select.epoll,
        kind: str,
        out_max_bytes: int,
        doors: Doors,
        on_end: Callable[[Peer, str], None],
        frame_bytes_max: int = FRAME_MAX_BYTES,
    ) -> None:
        """``kind``: ROUTER or XPUB. ``out_max_bytes``: what may wait for one peer when ``send`` is called.
        ``on_end``: called with whoever has gone, and with what was wrong with it if anything was."""
        self.peers: dict[bytes, Peer] = {}
        self.topics: dict[bytes, list[Peer]] = {}
        self._epoll = epoll
        self._kind = kind
        self._out_max_bytes = out_max_bytes
        self._frame_bytes_max = frame_bytes_max
        self._on_end = on_end
        self._listeners: dict[int, socket.socket] = {}
        self._all: dict[int, Peer] = {}  # by descriptor
        self._greeting: deque[Peer] = deque()  # those with whom nothing had been agreed when they were last looked at
        self._ready: deque[Peer] = deque()  # those with something in their inbox
        self._paused = False
        self._doors = doors
        doors.add(self)

    def __contains__(self, fileno: int) -> bool:
        return fileno in self._all or fileno in self._listeners

    @property
    def ports(self) -> list[int]:
        """Of TCP, where it listens."""
        return [each.getsockname()[1] for each in self._listeners.values() if each.family != socket.AF_UNIX]

    @property
    def pending(self) -> bool:
        """Messages have come that have not been taken out."""
        return bool(self._ready)

    # --- listening ---

    def bind_path(self, path: Path) -> None:
        """Raises OSError."""
        made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        self._bind(made, str(path))

    def bind_tcp(self, host: str, port: int) -> int:
        """Returns the port, which is any that is free for 0. Raises OSError."""
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        made = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._bind(made, address)
        bound: int = made.getsockname()[1]
        return bound

    def unbind_tcp(self, port: int) -> None:
        """Take back what ``bind_tcp`` has done."""
        for fileno, listener in list(self._listeners.items()):
            if listener.family != socket.AF_UNIX and listener.getsockname()[1] == port:
                del self._listeners[fileno]
                listener.close()

    def unbind(self) -> None:
        """Listen nowhere. Who is connected stays."""
        for listener in self._listeners.values():
            listener.close()
        self._listeners.clear()

    def _bind(self, made: socket.socket, address: object) -> None:
        try:
            made.setblocking(False)
            made.bind(address)  # type: ignore[arg-type]
            made.listen(_BACKLOG)
            self._epoll.register(made, select.EPOLLIN)
        except OSError:
            made.close()
            raise
        self._listeners[made.fileno()] = made

    def pause(self) -> None:
        """Let nobody in: a listener that is left readable would keep the loop busy."""
        if not self._paused:
            self._paused = True
            for listener in self._listeners.values():
                self._epoll.unregister(listener)

    def resume(self) -> None:
        """See ``pause``."""
        if self._paused:
            self._paused = False
            for listener in self._listeners.values():
                self._epoll.register(listener, select.EPOLLIN)

    def _accept(self, listener: socket.socket) -> None:
        """One who waits; epoll tells of the next."""
        if not self._doors.look():
            return
        try:
            accepted, _ = listener.accept()
        except OSError as error:
            if error.errno in SHORT_OF_DESCRIPTORS:
                self.pause()
            return
        try:
            accepted.setblocking(False)
            if accepted.family != socket.AF_UNIX:
                accepted.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            peer = Peer(self._epoll, accepted, self._kind, self._frame_bytes_max)
        except OSError:  # it has gone already
            accepted.close()
            return
        self._all[peer.fileno] = peer
        self._greeting.append(peer)
        if len(self._greeting) > GREETING_MAX:
            self.look(time.monotonic())
            if len(self._greeting) > GREETING_MAX:
                self._end(self._greeting.popleft())

    # --- what happens ---

    def happened(self, fileno: int, events: int) -> None:
        """What epoll has seen of one of ``self``'s descriptors."""
        peer = self._all.get(fileno)
        if peer is None:
            listener = self._listeners.get(fileno)
            if listener is not None:
                self._accept(listener)
            return
        try:
            if events & select.EPOLLOUT:
                peer.flush()
            if events & _READ and not peer.inbox:
                known = peer.ready
                if not peer.read():
                    self._end(peer)
                    return
                if peer.ready and not known:
                    self._name(peer)
                if peer.inbox:
                    self._ready.append(peer)
        except OSError as error:
            self._end(peer, "" if error.errno in _GONE else os.strerror(error.errno or errno.EIO))
        except BadMessage as error:
            self._end(peer, str(error))

    def read(self, identity: bytes) -> bool:
        """Take in what a ROUTER's peer has said, though epoll may not have told yet that it has. Whether there is
        anything."""
        peer = self.peers.get(identity)
        if peer is None:
            return False
        self.happened(peer.fileno, select.EPOLLIN)
        return bool(peer.inbox)

    def receive(self, limit: int) -> Iterator[tuple[Peer, list[Payload]]]:
        """Messages that have come, at most so many: of each peer one in turn."""
        ready = self._ready
        for _ in range(limit):
            if not ready:
                return
            peer = ready.popleft()
            frames = peer.inbox.popleft()
            if peer.inbox:
                ready.append(peer)
            yield peer, frames

    def look(self, now: float) -> None:
        """To be called now and then: end connections with which nothing has been agreed for too long."""
        greeting = deque(peer for peer in self._greeting if not peer.ready and peer.fileno >= 0)
        while greeting and now >= greeting[0].until:
            self._end(greeting.popleft())
        self._greeting = greeting

    def _name(self, peer: Peer) -> None:
        if self._kind == "ROUTER":
            before = self.peers.get(peer.id)
            self.peers[peer.id] = peer
            if before is not None:
                self._end(before)

    def _end(self, peer: Peer, wrong: str = "") -> None:
        del self._all[peer.fileno]
        if peer.inbox:
            self._ready.remove(peer)
        peer.close()
        if self.peers.get(peer.id) is peer:
            del self.peers[peer.id]
        topics, peer.topics = peer.topics, set()
        for topic in topics:
            self._leave(peer, topic)
        peer.topics = topics  # what it heard until now
        self._on_end(peer, wrong)

    # --- what is said ---

    def send(self, identity: bytes, frames: Sequence[Payload]) -> str:
        """To a ROUTER's peer. "sent", "full" (it does not read what it was sent before), or "gone"."""
        peer = self.peers.get(identity)
        if peer is None:
            return "gone"
        if peer.out_bytes >= self._out_max_bytes:
            return "full"
        return "sent" if peer.send(frames) else "gone"

    def publish(self, topic: bytes, frames: Sequence[Payload]) -> None:
        """To all who hear a topic, but for who does not read."""
        for peer in self.topics.get(topic, ()):
            if peer.out_bytes < self._out_max_bytes:
                peer.send((topic, *frames))

    def subscribe(self, peer: Peer, topic: bytes) -> bool:
        """Have it hear a topic from now on. False: it does already, or has gone."""
        if topic in peer.topics or peer.fileno < 0:
            return False
        peer.topics.add(topic)
        self.topics.setdefault(topic, []).append(peer)
        return True

    def unsubscribe(self, peer: Peer, topic: bytes) -> bool:
        """Have it hear a topic no more. False: it does not, or has gone."""
        if topic not in peer.topics or peer.fileno < 0:
            return False
        peer.topics.remove(topic)
        self._leave(peer, topic)
        return True

    def _leave(self, peer: Peer, topic: bytes) -> None:
        hearers = self.topics[topic]
        hearers.remove(peer)
        if not hearers:
            del self.topics[topic]

    def close(self, linger_s: float = 0.0) -> None:
        """Close all; what was sent is still written, if its peer takes it within the time that all of them have."""
        self.unbind()
        until = time.monotonic() + linger_s
        for peer in self._all.values():
            peer.close(until)
        self._all.clear()
        self._ready.clear()
        self._greeting.clear()
        self.peers.clear()
        self.topics.clear()
