"""The Unix control connection between the broker and each process on its host.

It says two things that ZeroMQ cannot: that a peer has died, at once, because the kernel closes the connection; and,
since both ends are the same user's, whose it is. Packets (SOCK_SEQPACKET) keep their borders; the first holds the
protocol's version and the peer's id.
"""

from __future__ import annotations

import os
import socket
import struct
from pathlib import Path
from typing import Final

from penstock.wire.errors import BadMessage
from penstock.wire.messages import PEER_ID_BYTES, VERSION

_HELLO: Final = struct.Struct(f"<4sH{PEER_ID_BYTES}s")
_MAGIC: Final = b"PNST"
HELLO_BYTES: Final = _HELLO.size
_CREDENTIALS: Final = struct.Struct("3i")
BACKLOG: Final = 1024


def connect(path: Path, peer: bytes) -> socket.socket | None:
    """A connection that has said who it is, or None while no broker listens there."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
    try:
        connection.connect(os.fspath(path))
        connection.send(_HELLO.pack(_MAGIC, VERSION, peer))
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


def peer_id(packet: bytes) -> bytes:
    """The id in a connection's first packet. Raises BadMessage."""
    if len(packet) != HELLO_BYTES:
        raise BadMessage(f"a control hello has {HELLO_BYTES} bytes, and {len(packet)} came")
    magic, version, peer = _HELLO.unpack(packet)
    if magic != _MAGIC:
        raise BadMessage("a control connection whose first packet is no hello of Penstock's")
    if version != VERSION:
        raise BadMessage(f"the peer speaks version {version} of the protocol, and this broker version {VERSION}")
    return bytes(peer)


def same_user(connection: socket.socket) -> bool:
    """Whether the process at the other end runs as this user (or as root)."""
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    _, uid, _ = _CREDENTIALS.unpack(credentials)
    return uid in (0, os.getuid())
