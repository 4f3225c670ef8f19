"""ZMTP 3, what ZeroMQ sockets say to each other, without a socket: bytes in, messages and replies out. Pure.

For both ends of a connection without security, towards libzmq or whoever else speaks it. Sources:
https://rfc.zeromq.org/spec/23 (3.0) and https://rfc.zeromq.org/spec/37 (3.1, whose news for us are PING and PONG, and
that a subscription may be a command).
Fuzzed, and held against libzmq, by tests/wire/test_zmtp.py.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Sequence
from typing import Final

from penstock.wire.errors import BadMessage
from penstock.wire.fields import brief
from penstock.wire.messages import MAX_REQUESTS, Payload

FRAME_MAX_BYTES: Final = 2 << 30
MESSAGE_MAX_BYTES: Final = 4 << 30
FRAMES_MAX: Final = MAX_REQUESTS + 2  # a topic, a head, and a payload for each request
COMMAND_MAX_BYTES: Final = 4096

# What is received at once at most. A larger frame gets memory of its own, into which the kernel copies the rest of it.
BUFFER_BYTES: Final = 64 * 1024
# A frame of at least this many bytes is not copied behind its head, but sent from where it lies.
_REFERENCE_MIN_BYTES: Final = 16 * 1024

_MORE, _LONG, _COMMAND = 1, 2, 4
_SIGNATURE: Final = b"\xff" + bytes(8) + b"\x7f"
_MECHANISM: Final = b"NULL".ljust(20, b"\0")
_GREETING: Final = _SIGNATURE + b"\x03\x01" + _MECHANISM + bytes(32)
_LONG_HEAD: Final = struct.Struct(">BQ")
# What each kind of socket may talk to.
_PEERS: Final = {"DEALER": ("ROUTER",), "SUB": ("XPUB", "PUB"), "ROUTER": ("DEALER",), "XPUB": ("SUB", "XSUB")}
_SUBSCRIPTIONS: Final = {b"SUBSCRIBE": b"\x01", b"CANCEL": b"\x00"}  # commands, and how 3.0 has them as messages


def pack(frames: Sequence[Payload]) -> list[Payload]:
    """A message as it travels: small frames in one piece with what stands before them, large ones as they are."""
    if len(frames) == 1 and len(frames[0]) < _REFERENCE_MIN_BYTES:
        return [_head(len(frames[0]), 0) + frames[0]]
    pieces: list[Payload] = []
    gathered: list[Payload] = []
    last = len(frames) - 1
    for at, frame in enumerate(frames):
        size = len(frame)
        gathered.append(_head(size, _MORE if at < last else 0))
        if size < _REFERENCE_MIN_BYTES:
            gathered.append(frame)
        else:
            pieces += (b"".join(gathered), frame)
            gathered = []
    if gathered:
        pieces.append(b"".join(gathered))
    return pieces


def subscription(topic: bytes) -> list[Payload]:
    """What a SUB socket says to hear of a topic: in 3.0 an ordinary message, which libzmq takes from 3.1 too."""
    return pack((b"\x01" + topic,))


def _head(size: int, flags: int) -> bytes:
    return bytes((flags, size)) if size < 256 else _LONG_HEAD.pack(flags | _LONG, size)


class Zmtp:
    """One connection: send ``opening`` first, receive into ``room`` and call ``received``; send what is in ``replies``.

    Nothing may be sent behind the opening before ``ready``: libzmq drops what comes before it has sent its own READY.
    """

    def __init__(
        self,
        kind: str,
        identity: bytes = b"",
        frame_bytes_max: int = FRAME_MAX_BYTES,
        buffer_bytes: int = BUFFER_BYTES,
    ) -> None:
        """``kind``: DEALER or SUB for the end that connects, ROUTER or XPUB for the other. ``identity``: what a ROUTER
        at the other end calls us. ``frame_bytes_max``: of what the peer sends. ``buffer_bytes``: more than a command
        has."""
        self.opening = _GREETING + _ready(kind, identity)
        self.ready = False  # the peer's READY has come
        self.peer = b""  # the identity that the peer has given itself
        self.replies = b""
        self.idle = False  # ready, and between two messages: what is received next begins one, in ``buffer``
        self.buffer = self._buffer = bytearray(buffer_bytes)
        self.view = self._view = memoryview(self._buffer)
        self._kind = kind
        self._frame_bytes_max = frame_bytes_max
        self._greeted = False
        self._have = 0  # bytes at the buffer's beginning
        self._large: memoryview | None = None  # a frame that is received where it will stay
        self._large_have = 0
        self._large_flags = 0
        self._frames: list[Payload] = []  # of a message whose last frame has not come
        self._nbytes = 0  # of these

    def room(self) -> memoryview:
        """Where to receive into next; never empty."""
        if self._large is not None:
            return self._large[self._large_have :]
        return self._view[self._have :] if self._have else self._view

    def received(self, nbytes: int) -> list[list[Payload]]:
        """So many bytes have been received into ``room``. Returns the messages that are now complete, each a list of
        frames. Raises BadMessage when this is not ZMTP, or more than the limits allow; then nothing more can be
        understood of this connection."""
        messages: list[list[Payload]] = []
        if self._large is not None:
            self._large_have += nbytes
            if self._large_have == len(self._large):
                large, self._large = self._large, None
                self._frame(large, self._large_flags, messages)
                self.idle = not self._frames
            return messages
        have = self._have + nbytes
        at = self._greet(have) if not self._greeted else 0
        if self._greeted:
            at, have = self._parse(at, have, messages)
        if at and have > at:
            self._view[: have - at] = self._view[at:have]
        self._have = have - at
        self.idle = self.ready and have == at and self._large is None and not self._frames
        return messages

    def _greet(self, have: int) -> int:
        """Check as much of the greeting as is there. Returns where what follows begins, once it has come."""
        begin = bytes(self._buffer[: min(have, len(_GREETING))])
        if begin[:1] != b"\xff" or not (len(begin) < 10 or begin[9] == 0x7F):
            raise BadMessage("the peer does not speak ZeroMQ's protocol")
        if len(begin) > 10 and begin[10] < 3:
            raise BadMessage(f"the peer speaks ZMTP {begin[10]}, and this process ZMTP 3")
        if len(begin) < len(_GREETING):
            return 0
        if begin[12:32] != _MECHANISM:
            raise BadMessage(f"the peer wants the mechanism {brief(begin[12:32])}, and this process has NULL alone")
        self._greeted = True
        return len(_GREETING)

    def _parse(self, at: int, have: int, messages: list[list[Payload]]) -> tuple[int, int]:
        """Take in frames from ``at`` on. Returns where what is left of the buffer begins and ends."""
        buffer, view = self._buffer, self._view
        while have - at >= 2:
            flags = buffer[at]
            if flags & _LONG:
                if have - at < 9:
                    break
                size, start = int.from_bytes(view[at + 1 : at + 9], "big"), at + 9
            else:
                size, start = buffer[at + 1], at + 2
            self._check(flags, size)
            end = start + size
            if end > have:
                if size <= len(buffer) - 9:  # with its head it has room in the buffer
                    break
                # Not a bytearray, which would be filled with zeros first: a peer may claim what it never sends.
                self._large = memoryview(mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
                self._large_have, self._large_flags = have - start, flags
                self._large[: have - start] = view[start:have]
                return have, have
            if flags & _COMMAND:
                self._command(bytes(view[start:end]), messages)
            else:
                self._frame(bytes(view[start:end]), flags, messages)
            at = end
        return at, have

    def _check(self, flags: int, size: int) -> None:
        if flags > _COMMAND | _LONG or (flags & _COMMAND and flags & _MORE):
            raise BadMessage(f"a frame with the flags {flags:#x}")
        if flags & _COMMAND:
            if size > COMMAND_MAX_BYTES:
                raise BadMessage(f"a command of {size} bytes; {COMMAND_MAX_BYTES} are allowed")
            return
        if not self.ready:
            raise BadMessage("a message before READY")
        if size > self._frame_bytes_max or self._nbytes + size > MESSAGE_MAX_BYTES:
            raise BadMessage(
                f"a frame of {size} bytes behind {self._nbytes}; a frame has at most {self._frame_bytes_max} bytes, "
                f"a message {MESSAGE_MAX_BYTES}"
            )
        if len(self._frames) == FRAMES_MAX:
            raise BadMessage(f"a message of more than {FRAMES_MAX} frames")

    def _frame(self, frame: Payload, flags: int, messages: list[list[Payload]]) -> None:
        self._frames.append(frame)
        if flags & _MORE:
            self._nbytes += len(frame)
        else:
            messages.append(self._frames)
            self._frames, self._nbytes = [], 0

    def _command(self, body: bytes, messages: list[list[Payload]]) -> None:
        """They may stand between the frames of a message."""
        name, rest = _name(body)
        if name == b"ERROR":
            raise BadMessage(f"the peer refuses the connection: {brief(rest[1:])}")
        if name == b"READY":
            if self.ready:
                raise BadMessage("a second READY")
            self._check_peer(rest)
            self.ready = True
        elif not self.ready:
            raise BadMessage(f"the command {brief(name)} before READY")
        elif name == b"PING":  # two bytes of its time to live, and a context that goes back
            self.replies += _command_frame(b"\x04PONG" + rest[2:18])
        elif self._kind == "XPUB" and name in _SUBSCRIPTIONS:
            if len(rest) >= self._frame_bytes_max:
                raise BadMessage(f"a subscription of {len(rest)} bytes; {self._frame_bytes_max - 1} are allowed")
            messages.append([_SUBSCRIPTIONS[name] + rest])

    def _check_peer(self, properties: bytes) -> None:
        said = _properties(properties)
        kind, self.peer = said.get(b"socket-type", b"").decode("ascii", "replace"), said.get(b"identity", b"")
        if kind not in _PEERS[self._kind]:
            raise BadMessage(f"the peer's socket is of the kind {brief(kind)}, and {self._kind} talks to another")


def _ready(kind: str, identity: bytes) -> bytes:
    properties = [(b"Socket-Type", kind.encode()), (b"Identity", identity)]
    packed = [bytes((len(name),)) + name + struct.pack(">I", len(value)) + value for name, value in properties]
    return _command_frame(b"\x05READY" + b"".join(packed))


def _command_frame(body: bytes) -> bytes:
    return _head(len(body), _COMMAND) + body


def _name(body: bytes) -> tuple[bytes, bytes]:
    """A command's name, and what follows it."""
    end = 1 + body[0] if body else 0
    if end < 2 or end > len(body):
        raise BadMessage("a command without a name")
    return body[1:end], body[end:]


def _properties(packed: bytes) -> dict[bytes, bytes]:
    """By name in small letters, since they are the same in any."""
    found: dict[bytes, bytes] = {}
    at = 0
    while at < len(packed):
        value_at = at + 1 + packed[at] + 4
        value_end = value_at + int.from_bytes(packed[value_at - 4 : value_at], "big")
        if value_end > len(packed):
            raise BadMessage("READY ends inside a property")
        found[packed[at + 1 : value_at - 4].lower()] = packed[value_at:value_end]
        at = value_end
    return found
