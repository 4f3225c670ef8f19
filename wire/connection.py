"""ZeroMQ connections without ZeroMQ's I/O thread: non-blocking sockets that whoever owns them reads and writes.

``wire/zmtp.py`` says what the bytes mean. ``Channel`` is what both ends have in common, ``Connection`` the end that
connects (``wire/listener.py`` has the other): one that breaks is made again, by ``connect`` once ``retry_at`` has come;
what waited in it is not said to whoever listens there next.
"""

from __future__ import annotations

import errno
import os
import select
import socket
import time
from collections import deque
from collections.abc import Sequence
from typing import Final

from penstock.wire import zmtp
from penstock.wire.endpoints import EndpointError, parse_host_port
from penstock.wire.errors import BadMessage
from penstock.wire.messages import Payload
from penstock.wire.zmtp import Zmtp

OUT_MAX_BYTES: Final = 64 << 20  # may wait for a peer that does not read; then it is ``full``
_RETRY_S: Final = 0.02  # before the first attempt to connect again; doubled up to
_RETRY_MAX_S: Final = 0.1
_PATH_MAX_BYTES: Final = 107  # sun_path of a Unix socket, without its final zero
_PIECES_MAX: Final = 1024  # of one sendmsg(2): IOV_MAX
_NEVER: Final = float("inf")
_NO_SIGNAL: Final[int] = socket.MSG_NOSIGNAL


class Broken(Exception):
    """The connection has ended; the message says why."""


class Channel:
    """A socket that speaks ZMTP, registered with an ``epoll``.

    ``fileno``: -1 while there is no socket. ``ready``: both ends have agreed, and can speak.
    ``out_bytes``: so many wait for room.
    """

    def __init__(self, epoll: select.epoll) -> None:
        self.fileno = -1
        self.ready = False
        self.out_bytes = 0
        self._epoll = epoll
        self._socket: socket.socket | None = None
        self._zmtp: Zmtp
        self._watched = 0  # what epoll has been told to look for
        self._out: deque[Payload] = deque()  # bounded by whoever sends

    def send(self, frames: Sequence[Payload]) -> bool:
        """Send one message, or have it wait for room. False: it is not ``ready``, and nobody will hear it."""
        if not self.ready:
            return False
        pieces = zmtp.pack(frames)
        if not self._out:
            return self._write(pieces)
        self._queue(pieces)
        return True

    def _write(self, pieces: Sequence[Payload]) -> bool:
        """To the kernel what it takes, the rest into the queue. False: the connection is broken, which reading it will
        tell."""
        assert self._socket is not None
        try:
            if len(pieces) == 1:
                sent = self._socket.send(pieces[0], socket.MSG_NOSIGNAL)
            else:
                sent = self._socket.sendmsg(pieces[:_PIECES_MAX], (), socket.MSG_NOSIGNAL)
        except BlockingIOError:
            sent = 0
        except OSError:
            return False
        if len(pieces) > 1 or sent < len(pieces[0]):
            self._queue(_rest(pieces, sent))
        return True

    def _queue(self, pieces: Sequence[Payload]) -> None:
        self._out.extend(pieces)
        self.out_bytes += sum(map(len, pieces))
        self._watch()

    def _flush(self) -> None:
        """Raises OSError."""
        assert self._socket is not None
        out = self._out
        while out:
            pieces = [out.popleft() for _ in range(min(len(out), _PIECES_MAX))]
            try:
                sent = self._socket.sendmsg(pieces, (), socket.MSG_NOSIGNAL)
            except BlockingIOError:
                sent = 0
            self.out_bytes -= sent
            rest = _rest(pieces, sent)
            if rest:
                out.extendleft(reversed(rest))
                break
        self._watch()

    def _watch(self) -> None:
        """Have epoll tell when there is room, if anything waits for that."""
        wanted = select.EPOLLIN | select.EPOLLOUT if self._out else select.EPOLLIN
        if wanted != self._watched:
            self._watched = wanted
            self._epoll.modify(self.fileno, wanted)

    def _linger(self, until: float) -> None:
        """Write what waits if the peer takes it in time."""
        if self._socket is None or not self.ready:
            return
        poll = select.poll()
        poll.register(self._socket, select.POLLOUT)
        left_s = max(0.0, until - time.monotonic())
        try:
            # The time is that of all: who takes a little now and then would hold this up as long as it likes.
            while self._out and left_s >= 0 and poll.poll(left_s * 1000):
                self._flush()
                left_s = until - time.monotonic()
        except OSError:
            pass  # the peer has gone

    def _drop(self) -> None:
        if self._socket is not None:
            self._socket.close()  # the kernel takes it out of epoll
        self._socket, self.fileno = None, -1
        self.ready = False
        self._out.clear()
        self.out_bytes = 0

    def _forget(self) -> None:
        """What waits will not be heard."""
        self._out.clear()
        self.out_bytes = 0
        self._watch()


class Connection(Channel):
    """To the socket bound at ``endpoint``, as one of the kind ``kind``. ``retry_at``: when to ``connect``, inf while
    there is a socket."""

    def __init__(
        self, epoll: select.epoll, endpoint: str, kind: str, identity: bytes = b"", first: Sequence[Payload] = ()
    ) -> None:
        """``first``: what is said whenever the connection has been made. Raises EndpointError for an endpoint that can
        be none."""
        super().__init__(epoll)
        self.endpoint = endpoint
        self.retry_at = 0.0
        self._path, self._host, self._port = _parse(endpoint)
        self._kind, self._identity, self._first = kind, identity, first
        self._retry_s = _RETRY_S
        self._attempts = 0
        self._connecting = False
        self._received = 0  # bytes that ``glance`` has received, and that have not been taken in

    @property
    def full(self) -> bool:
        """So much waits that nothing more should be sent; it ends with a wake-up."""
        return self.out_bytes >= OUT_MAX_BYTES

    def connect(self, now: float) -> bool:
        """Begin. False: it has failed at once, and ``retry_at`` says when to try again. A host's name is looked up
        here, which blocks."""
        self._zmtp = Zmtp(self._kind, self._identity)
        self._attempts += 1
        try:
            made = self._socket = self._open()
            self.fileno, self.retry_at = made.fileno(), _NEVER
            self._watched = select.EPOLLIN | select.EPOLLOUT if self._connecting else select.EPOLLIN
            self._epoll.register(made, self._watched)
            if not self._connecting:
                self._greet()
        except (OSError, ValueError):  # ValueError: a host that cannot be one
            self._drop()
            self._retry(now)
            return False
        return True

    def _open(self) -> socket.socket:
        """A socket that is connected, or about to be. Raises OSError, ValueError."""
        if self._path:
            family, address = socket.AF_UNIX, self._path
        else:
            found = socket.getaddrinfo(self._host, self._port, type=socket.SOCK_STREAM)
            family, _, _, _, address = found[self._attempts % len(found)]  # type: ignore[assignment]
        made = socket.socket(family, socket.SOCK_STREAM)
        try:
            made.setblocking(False)
            if family != socket.AF_UNIX:
                made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            code = made.connect_ex(address)
            self._connecting = code == errno.EINPROGRESS
            if code and not self._connecting:
                raise OSError(code, os.strerror(code))
        except BaseException:
            made.close()
            raise
        return made

    def _greet(self) -> None:
        """Raises OSError."""
        assert self._socket is not None
        opening = self._zmtp.opening
        if self._socket.send(opening, socket.MSG_NOSIGNAL) < len(opening):
            raise OSError(errno.EIO, "a new connection takes fewer bytes than a greeting")

    def send_small(self, frame: bytes) -> bool:
        """As ``send`` for a message of one small frame, at half the cost."""
        size = len(frame)
        if self._out or not self.ready or size > 255:
            return self.send((frame,))
        try:
            sent = self._socket.send(bytes((0, size)) + frame, _NO_SIGNAL)  # type: ignore[union-attr]
        except OSError:
            sent = 0  # no room, or broken, which the next write tells
        return sent == size + 2 or self._write(_rest(zmtp.pack((frame,)), sent))

    def glance(self, begin: bytes) -> memoryview | None:
        """Receive. When that is one message of two frames and no more, of which the first with its head is ``begin``,
        its second, which lies there until more is received. None: ``handle`` tells what it is, or what is wrong."""
        zmtp = self._zmtp
        if self._received or not zmtp.idle:
            return None
        buffer = zmtp.buffer
        try:
            size = self._received = self._socket.recv_into(buffer)  # type: ignore[union-attr]
        except OSError:
            return None
        at = len(begin)
        if size < at + 2 or not buffer.startswith(begin):
            return None
        if buffer[at] == 0:  # the last frame, a short one
            at, end = at + 2, at + 2 + buffer[at + 1]
        elif buffer[at] == 2 and size > at + 9:  # a long one
            at, end = at + 9, at + 9 + int.from_bytes(buffer[at + 1 : at + 9], "big")
        else:
            return None
        if end != size:
            return None
        self._received = 0
        return zmtp.view[at:size]

    def handle(self, events: int) -> list[list[Payload]]:
        """epoll has seen ``events``. Returns messages that have come, each a list of frames. Raises Broken and, when
        the peer talks nonsense, BadMessage: then the connection has been closed, and is to be made again."""
        try:
            return self._handle(events)
        except (OSError, Broken, BadMessage) as error:
            self._drop()
            self._retry(time.monotonic())
            if isinstance(error, OSError):
                raise Broken(os.strerror(error.errno or errno.ECONNRESET)) from None
            raise

    def _handle(self, events: int) -> list[list[Payload]]:
        assert self._socket is not None
        if self._connecting:
            if events == select.EPOLLIN:
                return []  # seen of a descriptor that had this number before
            code = self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            if code:
                raise OSError(code, os.strerror(code))
            self._connecting = False
            self._greet()
            self._watch()
        if events & select.EPOLLOUT:
            self._flush()
        size, self._received = self._received, 0
        if not size:
            try:
                size = self._socket.recv_into(self._zmtp.room())
            except BlockingIOError:
                return []
            if not size:
                raise Broken("the peer has closed it")
        messages = self._zmtp.received(size)
        if self._zmtp.replies:
            if not self.full:  # who pings on and reads nothing is not answered for ever
                self._queue((self._zmtp.replies,))
            self._zmtp.replies = b""
        if self._zmtp.ready and not self.ready:
            self.ready = True
            self._retry_s = _RETRY_S
            self._queue(self._first)
            self._flush()
        return messages

    def close(self, linger_s: float = 0.0) -> None:
        """Close for good; what was sent is still written if the peer takes it within the time."""
        self._linger(time.monotonic() + linger_s)
        self._drop()
        self.retry_at = _NEVER

    def _retry(self, now: float) -> None:
        self.retry_at = now + self._retry_s
        self._retry_s = min(2 * self._retry_s, _RETRY_MAX_S)

    def _drop(self) -> None:
        super()._drop()
        self._connecting = False
        self._received = 0


def _parse(endpoint: str) -> tuple[str, str, int]:
    """A path, or a host and a port. Raises EndpointError."""
    if endpoint.startswith("ipc://"):
        path = endpoint.removeprefix("ipc://")
        if not 0 < len(os.fsencode(path)) <= _PATH_MAX_BYTES or "\0" in path:
            raise EndpointError(f"{endpoint!r} is no path of a socket, which has at most {_PATH_MAX_BYTES} bytes")
        return path, "", 0
    if endpoint.startswith("tcp://"):
        return "", *parse_host_port(endpoint.removeprefix("tcp://"), endpoint)
    raise EndpointError(f"{endpoint!r} is neither ipc://PATH nor tcp://HOST:PORT")


def _rest(pieces: Sequence[Payload], sent: int) -> list[Payload]:
    """What is left of some pieces when so many bytes of them have been sent."""
    for at, piece in enumerate(pieces):
        if sent < len(piece):
            return [memoryview(piece)[sent:] if sent else piece, *pieces[at + 1 :]]
        sent -= len(piece)
    return []
