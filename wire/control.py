"""The Unix control connection between the broker and each process on its host.

It says what ZeroMQ cannot: that a peer has died, at once, because the kernel closes the connection; since both ends are
the same user's, whose it is; and where its arena is, as a descriptor. Packets (SOCK_SEQPACKET) keep their borders. Each
introduces a peer: the protocol's version, its id, the introduction's number and, beside them, its arena's descriptor if
it has one. A peer sends one, about itself, with the number 0, and another when it comes to have an arena; the broker
passes on those of others, and says with the number 0, about nobody, that it leaves: what it says over ZeroMQ at its
very end is not always delivered.
"""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple

from penstock.wire.arena import ArenaError, Mapping
from penstock.wire.errors import BadMessage
from penstock.wire.events import ArenaCame
from penstock.wire.messages import PEER_ID_BYTES, VERSION

_HELLO: Final = struct.Struct(f"<4sH{PEER_ID_BYTES}sQ")
_MAGIC: Final = b"PNST"
_DESCRIPTOR: Final = struct.Struct("i")
_CREDENTIALS: Final = struct.Struct("3i")
HELLO_BYTES: Final = _HELLO.size
BACKLOG: Final = 1024
NO_ARENA: Final = -1  # in place of a descriptor
_NOBODY: Final = bytes(PEER_ID_BYTES)


class BrokerLeft(ConnectionError):
    """The broker has shut down, as it was told to."""


def connect(path: Path, peer: bytes, arena: int = NO_ARENA) -> socket.socket | None:
    """A connection that has said who it is, or None while no broker listens there. ``arena``: a descriptor."""
    try:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
    except OSError:
        return None  # no descriptor is left at present
    try:
        connection.connect(os.fspath(path))
        introduce(connection, peer, arena)
    except OSError:
        connection.close()
        return None
    return connection


def listen(path: Path) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
    try:
        listener.bind(os.fspath(path))
        listener.listen(BACKLOG)
    except OSError:
        listener.close()
        raise
    return listener


class Introduction(NamedTuple):
    """``arena``: a descriptor, or NO_ARENA; ``cut``: the kernel had none left in this process for it."""

    peer: bytes
    serial: int
    arena: int
    cut: bool = False


def introduce(connection: socket.socket, peer: bytes, arena: int = NO_ARENA, serial: int = 0) -> None:
    """Raises OSError, BlockingIOError when the other end does not read."""
    socket.send_fds(connection, [_HELLO.pack(_MAGIC, VERSION, peer, serial)], [] if arena == NO_ARENA else [arena])


def announce(connection: socket.socket, peer: bytes, arena: int) -> bool:
    """Say that a peer that had no arena has one now. False when the broker takes nothing at present; when it has gone,
    which its connection will say, there is nothing to be said."""
    try:
        introduce(connection, peer, arena)
    except BlockingIOError:
        return False
    except OSError:
        pass
    return True


def leave(connection: socket.socket) -> None:
    """Say that the broker shuts down. Raises OSError, BlockingIOError when the other end does not read."""
    introduce(connection, _NOBODY)


def receive(connection: socket.socket) -> Introduction | None:
    """The next peer that is introduced; its arena's descriptor is the receiver's to close.

    None when the other end has gone. Raises BlockingIOError when nothing has come, and BadMessage.
    """
    try:
        # socket.recv_fds would leave descriptors open across an exec: it ignores its flags in Python 3.11.
        packet, ancillary, flags, _ = connection.recvmsg(
            HELLO_BYTES + 1, socket.CMSG_LEN(_DESCRIPTOR.size), socket.MSG_CMSG_CLOEXEC
        )
    except BlockingIOError:
        raise
    except OSError:
        return None
    if not packet:
        return None
    arena = _DESCRIPTOR.unpack(ancillary[0][2])[0] if ancillary else NO_ARENA
    try:
        return Introduction(*_unpack(packet), arena, arena == NO_ARENA and bool(flags & socket.MSG_CTRUNC))
    except BadMessage:
        if arena != NO_ARENA:
            os.close(arena)
        raise


def receive_arenas(connection: socket.socket) -> Iterator[ArenaCame]:
    """The arenas that the broker has passed on by now. Raises ConnectionError when it has gone, or talks nonsense;
    BrokerLeft when it has said so before."""
    while True:
        try:
            introduced = receive(connection)
        except BlockingIOError:
            return
        except BadMessage as error:
            raise ConnectionError(f"the broker talks nonsense: {error}") from None
        if introduced is None:
            raise ConnectionError("the broker's process ended")
        peer, serial, arena, cut = introduced
        if cut:
            yield ArenaCame(peer, serial, None, "this process has no descriptor left for it")
            continue
        if arena == NO_ARENA:
            if peer == _NOBODY:
                raise BrokerLeft("the broker has shut down")
            raise ConnectionError("the broker talks nonsense: it passes an arena on without its descriptor")
        try:
            yield ArenaCame(peer, serial, Mapping(arena))
        except ArenaError as error:
            yield ArenaCame(peer, serial, None, str(error))


def _unpack(packet: bytes) -> tuple[bytes, int]:
    if len(packet) != HELLO_BYTES:
        raise BadMessage(f"a control hello has {HELLO_BYTES} bytes, and {len(packet)} came")
    magic, version, peer, serial = _HELLO.unpack(packet)
    if magic != _MAGIC:
        raise BadMessage("a control connection whose first packet is no hello of Penstock's")
    if version != VERSION:
        raise BadMessage(f"the peer speaks version {version} of the protocol, and this broker version {VERSION}")
    return bytes(peer), serial


def same_user(connection: socket.socket) -> bool:
    """Whether the process at the other end runs as this user (or as root)."""
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    _, uid, _ = _CREDENTIALS.unpack(credentials)
    return uid in (0, os.getuid())
