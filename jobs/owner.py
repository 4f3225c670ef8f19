"""Who runs a job: a name that tells, on the same host, whether that process is still there.

It has the boot, the namespace of process ids, the id and the start time of the process, and something random. Only who
shares boot and namespace can tell; everybody else waits for the lease to end.
"""

from __future__ import annotations

import os
import secrets
from functools import lru_cache
from pathlib import Path
from typing import Final

_UNKNOWN: Final = "-"


def new_owner() -> str:
    """A name for a runner in this process."""
    return f"{_where()}:{os.getpid()}:{_start_of(os.getpid()) or _UNKNOWN}:{secrets.token_hex(4)}"


def is_dead(owner: str) -> bool:
    """Whether it has surely ended."""
    where, _, rest = owner.partition(":")
    pid, _, rest = rest.partition(":")
    start = rest.partition(":")[0]
    if where != _where() or _UNKNOWN in where or not pid.isdecimal() or not start.isdecimal():
        return False
    now = _start_of(int(pid))
    return now != start if now else not _exists(int(pid))


def _exists(pid: int) -> bool:
    """Also where /proc does not show the processes of others."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


@lru_cache(maxsize=1)
def _where() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip().replace("-", "")
        return f"{boot[:12]}.{os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return _UNKNOWN


def _start_of(pid: int) -> str:
    """In ticks since the boot; "" where there is no such process, or it has ended and nobody has asked how."""
    try:
        fields = Path("/proc", str(pid), "stat").read_bytes().rpartition(b")")[2].split()
    except OSError:
        return ""
    return "0" if fields[0] in (b"Z", b"X") else fields[19].decode()
