"""The processor time of a server on this host: which processes are it, and what they have used."""

from __future__ import annotations

import os
import socket
import struct
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Final, NamedTuple

_PROC: Final = Path("/proc")
_LISTEN: Final = "0A"  # in /proc/net/tcp


class Stat(NamedTuple):
    """Of a process. ``group``: its process group. ``cpu_s``: in steps of the kernel's nanoseconds, not of the clock
    ticks of proc_pid_stat(5), in which a short measurement can use nothing."""

    parent: int
    group: int
    cpu_s: float


def read_stat(pid: int) -> Stat | None:
    """None when it has ended."""
    try:
        fields = (_PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
        cpu_s = time.clock_gettime(~pid << 3 | 2)  # what clock_getcpuclockid(3) gives on Linux
    except OSError:
        return None
    return Stat(int(fields[1]), int(fields[2]), cpu_s)  # of proc_pid_stat(5), from the third field on: ppid, pgrp


def read_all() -> dict[int, Stat]:
    found = {}
    for entry in _PROC.iterdir():
        if entry.name.isdecimal() and (stat := read_stat(int(entry.name))) is not None:
            found[int(entry.name)] = stat
    return found


def family(roots: Iterable[int], all_stats: Mapping[int, Stat], own: int) -> set[int]:
    """Processes, their descendants, and those of their process groups: what was started together. Not a group that
    ``own`` is in, which is a script's that has started both; and neither ``own`` nor those that it descends from."""
    roots = set(roots) & all_stats.keys()
    not_these = set()
    above = own
    while above in all_stats and above not in not_these:
        not_these.add(above)
        above = all_stats[above].parent
    own_group = all_stats[own].group if own in all_stats else 0
    groups = {all_stats[root].group for root in roots} - {own_group, 0}
    found = roots | {pid for pid, stat in all_stats.items() if stat.group in groups}
    children: dict[int, list[int]] = {}
    for pid, stat in all_stats.items():
        children.setdefault(stat.parent, []).append(pid)
    waiting = list(found)
    while waiting:
        for child in children.get(waiting.pop(), ()):
            if child not in found and child != own:
                found.add(child)
                waiting.append(child)
    return found - (not_these - roots)


def cpu_s(pids: Iterable[int]) -> float:
    """Processor time, user and system, of those that are there still."""
    return sum(stat.cpu_s for stat in map(read_stat, pids) if stat is not None)


def listeners(address: str, port: int, net: Path = _PROC / "net") -> set[str]:
    """The inodes of sockets of this host that listen for connections to an IP address and port."""
    wanted = {address, "0.0.0.0", "::", "::ffff:" + address}
    found = set()
    for name in ("tcp", "tcp6"):
        try:
            lines = (net / name).read_text().splitlines()[1:]
        except OSError:
            continue
        for line in lines:
            fields = line.split()
            host, _, at = fields[1].partition(":")
            if fields[3] == _LISTEN and int(at, 16) == port and _address(host) in wanted:
                found.add(fields[9])
    return found


def _address(text: str) -> str:
    """ "0100007F" -> "127.0.0.1": words in the byte order of the machine."""
    raw = b"".join(struct.pack("=I", int(text[at : at + 8], 16)) for at in range(0, len(text), 8))
    return socket.inet_ntop(socket.AF_INET if len(raw) == 4 else socket.AF_INET6, raw)


def unix_listeners(directory: Path, net: Path = _PROC / "net") -> set[str]:
    """The inodes of Unix sockets in a directory."""
    prefix = f"{directory.resolve()}/"
    try:
        lines = (net / "unix").read_text(errors="replace").splitlines()[1:]
    except OSError:
        return set()
    fields = (line.split(None, 7) for line in lines)
    return {each[6] for each in fields if len(each) == 8 and each[7].startswith(prefix)}


def holders(inodes: set[str]) -> set[int]:
    """The processes that have one of these sockets open, as far as this user may look."""
    wanted = {f"socket:[{inode}]" for inode in inodes}
    found = set()
    for entry in _PROC.iterdir() if wanted else ():
        if entry.name.isdecimal():
            try:
                descriptors = os.listdir(entry / "fd")
            except OSError:
                continue  # another user's, or ended meanwhile
            for descriptor in descriptors:
                with suppress(OSError):  # closed meanwhile
                    if os.readlink(entry / "fd" / descriptor) in wanted:
                        found.add(int(entry.name))
                        break
    return found
