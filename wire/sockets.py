"""ZeroMQ as every process here uses it: raw sockets, drained until empty, woken by their file descriptor.

``zmq.backend.Socket`` is pyzmq's socket without its Python layer: a third less processor time for a message than
``zmq.Socket``, a fifth of ``zmq.asyncio``.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator, Sequence
from typing import Any, Final, Protocol, cast

import zmq
import zmq.backend

from penstock.wire.messages import MAX_REQUESTS, Payload

# Frames of at least this many bytes are handed to ZeroMQ by reference: below, the bookkeeping costs more than a copy.
_REFERENCE_MIN_BYTES: Final = 64 * 1024

# Messages of one peer that have been received and wait to be read. Nothing is lost beyond it: its connection is not
# read on until whoever is flooded has caught up, and what the peer sends waits with the peer.
UNREAD_MAX: Final = 128

# A frame that is larger than its socket allows closes its connection before it takes memory. Where tensors travel, a
# frame is all that one request has; where none do, it is the head of a message; a subscription has 9 bytes, and what
# ZeroMQ says to begin a connection some 50.
MAX_FRAME_BYTES: Final = 2 << 30
MAX_SUBSCRIPTION_BYTES: Final = 256


class RawSocket(Protocol):
    """What we use of ``zmq.backend.Socket``, which has no annotations of its own."""

    def send(self, data: Any, flags: int = 0, copy: bool = True) -> Any: ...
    def recv(self, flags: int = 0, copy: bool = True) -> Any: ...
    def get(self, option: int) -> Any: ...
    def set(self, option: int, value: Any) -> None: ...
    def bind(self, address: str) -> None: ...
    def unbind(self, address: str) -> None: ...
    def connect(self, address: str) -> None: ...
    def disconnect(self, address: str) -> None: ...
    def close(self, linger: int | None = None) -> None: ...


class Socket:
    """A socket and whether it may have something to read.

    Its descriptor is edge-triggered (zmq_getsockopt(3), ZMQ_FD): one wake-up stands for all that has come, and a send
    may swallow it. So ``pending`` is set by whoever sees ``fileno`` readable and by every send, and cleared only when
    the socket has been found empty; a loop sleeps only while nothing is pending.
    """

    def __init__(
        self,
        context: zmq.Context[Any],
        kind: int,
        high_water: int,
        identity: bytes = b"",
        frame_bytes_max: int = MAX_FRAME_BYTES,
    ) -> None:
        """``high_water``: messages that may wait for each peer; what it must exceed is up to its owner, since a PUB
        drops beyond it in silence. ``frame_bytes_max``: of what peers send. Nothing lingers."""
        raw = self.raw = cast(RawSocket, zmq.backend.Socket(context, kind))
        raw.set(zmq.LINGER, 0)
        raw.set(zmq.SNDHWM, high_water)
        raw.set(zmq.RCVHWM, UNREAD_MAX)
        raw.set(zmq.MAXMSGSIZE, frame_bytes_max)
        raw.set(zmq.RECONNECT_IVL, 20)  # milliseconds, at most twice as many: less than a new broker's rejoin_grace
        raw.set(zmq.IPV6, 1)
        if kind == zmq.DEALER:
            raw.set(zmq.IMMEDIATE, 1)  # nothing waits for a broker that is not there, to be heard by the next one
        if kind == zmq.ROUTER:
            raw.set(zmq.ROUTER_MANDATORY, 1)
            raw.set(zmq.ROUTER_HANDOVER, 1)
        if identity:
            raw.set(zmq.IDENTITY, identity)
        self.pending = True
        self._fileno: int = raw.get(zmq.FD)

    def fileno(self) -> int:
        return self._fileno

    def receive(self, heads: int, limit: int) -> Iterator[tuple[list[bytes], list[Payload]]]:
        """The messages that are there now, at most ``limit``: the first ``heads`` frames as bytes, the rest by
        reference.

        Small frames are copied because holding them would hold the whole buffer that they were received in. A message
        with fewer frames than ``heads`` comes with those that it has.
        """
        recv, get = self.raw.recv, self.raw.get
        for _ in range(limit):
            # Asking first costs 0.8 us; the exception of a recv that finds nothing costs 2.
            if not get(zmq.EVENTS) & zmq.POLLIN:
                self.pending = False
                return
            frame = recv(zmq.NOBLOCK, False)
            first = [frame.bytes]
            while frame.more and len(first) < heads:
                frame = recv(zmq.NOBLOCK, False)
                first.append(frame.bytes)
            rest: list[Payload] = []
            while frame.more:
                frame = recv(zmq.NOBLOCK, False)
                if len(rest) <= MAX_REQUESTS:  # one more than any message has, so that unpacking refuses it
                    rest.append(frame)
            yield first, rest

    def send(self, heads: Sequence[bytes], frames: Sequence[Payload] = ()) -> str:
        """Send one message. Returns "sent", "full" (the peer takes nothing now) or "gone" (there is no such peer)."""
        more = zmq.NOBLOCK | zmq.SNDMORE
        push = self.raw.send
        self.pending = True
        try:
            for head in heads[:-1]:
                push(head, more)
            push(heads[-1], more if frames else zmq.NOBLOCK)
            last = len(frames) - 1
            for at, frame in enumerate(frames):
                by_copy = not isinstance(frame, zmq.Frame) and len(frame) < _REFERENCE_MIN_BYTES
                push(frame, more if at < last else zmq.NOBLOCK, by_copy)
        except zmq.Again:
            return "full"
        except zmq.ZMQError as error:
            if error.errno == errno.EHOSTUNREACH:
                return "gone"
            raise
        return "sent"

    def close(self, linger_ms: int = 0) -> None:
        """Close; what was sent is still delivered within the time."""
        self.raw.close(linger_ms)
