"""Which process is at the other end of a connection, where that is on this host: the kernel lists sockets by their
addresses, and by process which sockets it has open. Only processes that this one may look at are found: of the same
user, in the same namespaces."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple

_PROC: Final = Path("/proc")
_PIDS_MAX: Final = 65_536  # that are looked at
_V4_IN_V6: Final = bytes(10) + b"\xff\xff"


class Lease(NamedTuple):
    """A process. ``started``: when, by which it is told from another that has its number later."""

    pid: int
    started: int


def is_alive(lease: Lease) -> bool:
    """Whether it has not ended; one that nobody has waited for has."""
    return _started(lease.pid) == lease.started


def _started(pid: int) -> int:
    """In ticks since boot; -1 of one that has ended."""
    try:
        fields = (_PROC / str(pid) / "stat").read_bytes().rpartition(b")")[2].split()
        return -1 if fields[0] in (b"Z", b"X") else int(fields[19])
    except (OSError, IndexError, ValueError):
        return -1


def find_peer(near: tuple[str, int], far: tuple[str, int]) -> Lease | None:
    """Who has the other end of a TCP connection: ``far`` is its address, ``near`` ours. None: nobody that can be seen
    here. Takes some thousandths of a second, more where there are many processes: not for an event loop."""
    inode = _inode(far, near)
    if inode is None:
        return None
    wanted = f"socket:[{inode}]"
    found = None
    for pid in _pids():
        if not _has(pid, wanted):
            continue
        lease = Lease(pid, _started(pid))
        # Of several, as after a fork, the oldest is there for longest: the memory may be any one's.
        if lease.started >= 0 and (found is None or lease.started < found.started):
            found = lease
    return found


def _has(pid: int, wanted: str) -> bool:
    """Whether a process has a descriptor open that is shown so."""
    with contextlib.suppress(OSError), os.scandir(_PROC / str(pid) / "fd") as descriptors:
        for descriptor in descriptors:
            with contextlib.suppress(OSError):
                if os.readlink(descriptor.path) == wanted:
                    return True
    return False


def _pids() -> Iterator[int]:
    with contextlib.suppress(OSError):
        names = [name for name in os.listdir(_PROC) if name.isdecimal()]
        yield from (int(name) for name in names[:_PIDS_MAX] if int(name) != os.getpid())


def _inode(local: tuple[str, int], remote: tuple[str, int]) -> str | None:
    for table in ("tcp", "tcp6"):
        try:
            wanted = _row(local, table), _row(remote, table)
            lines = (_PROC / "net" / table).read_text().splitlines()[1:]
        except (OSError, ValueError):
            continue
        for line in lines:
            fields = line.split()
            if (fields[1], fields[2]) == wanted and fields[9] != "0":
                return fields[9]
    return None


def _row(address: tuple[str, int], table: str) -> str:
    """An address as the kernel writes it: words of 32 bits in the order of this host. Raises ValueError."""
    host, port = address
    try:
        packed = socket.inet_pton(socket.AF_INET6 if ":" in host else socket.AF_INET, host)
    except OSError as error:
        raise ValueError(str(error)) from None
    if table == "tcp" and packed.startswith(_V4_IN_V6) and len(packed) == 16:
        packed = packed[12:]
    if table == "tcp6" and len(packed) == 4:
        packed = _V4_IN_V6 + packed
    if len(packed) != (4 if table == "tcp" else 16):
        raise ValueError(f"{host} is in another table")
    order = "<" if sys.byteorder == "little" else ">"
    words = struct.unpack(f"{order}{len(packed) // 4}I", packed)
    return f"{''.join(f'{word:08X}' for word in words)}:{port:04X}"
