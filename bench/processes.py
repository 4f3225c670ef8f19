"""All processes of a server together: what they have used, holding them up for a while, ending them."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Collection, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Final

from penstock.load import processes

END_MAX_S: Final = 15.0  # for a server to end when it is asked to; then it is killed
REST_MAX_S: Final = 3.0  # for those of its processes that are there still when the first one has ended
_LOOK_S: Final = 0.05
_ROUNDS_MAX: Final = 20  # of looking for processes that were started while others were held up
_TICK_S: Final = 1 / os.sysconf("SC_CLK_TCK")


def of(root: int) -> set[int]:
    """A process, its descendants, and its process group where that is not ours as well."""
    return processes.family({root}, processes.read_all(), os.getpid())


def cpu_s(pids: Iterable[int]) -> float:
    """Processor time, user and system, of processes and of those of their children that have ended."""
    total = 0.0
    for pid in pids:
        with suppress(OSError):  # ended meanwhile, and is in the time of its parent's ended children
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            total += sum(map(int, fields[11:15])) * _TICK_S  # utime, stime, cutime, cstime of proc_pid_stat(5)
    return total


def hold(root: int) -> None:
    """Until ``go_on``. What they start meanwhile is held up as well."""
    held: set[int] = set()
    for _ in range(_ROUNDS_MAX):
        more = of(root) - held
        if not more:
            return
        _send(more, signal.SIGSTOP)
        held |= more


def go_on(root: int) -> None:
    _send(of(root), signal.SIGCONT)


def end(process: subprocess.Popen[bytes], limit_s: float = END_MAX_S, rest_limit_s: float = REST_MAX_S) -> None:
    """Asks the first of a server's processes to end, then kills what is left of them. Shared memory that they leave
    behind is removed: some leave theirs even when nobody kills them."""
    pids = of(process.pid)
    shared = _shared_memory(pids)
    try:
        _end(process, pids, limit_s, rest_limit_s)
    finally:
        for path in shared:
            path.unlink(missing_ok=True)


def _end(process: subprocess.Popen[bytes], pids: set[int], limit_s: float, rest_limit_s: float) -> None:
    _send(pids, signal.SIGCONT)
    process.terminate()
    if not _wait(lambda: process.poll() is not None, limit_s):
        pids |= of(process.pid)
    elif _wait(lambda: not _there(pids), rest_limit_s):
        return
    _send(_there(pids), signal.SIGKILL)
    _wait(lambda: process.poll() is not None and not _there(pids), limit_s)


def _shared_memory(pids: Iterable[int]) -> set[Path]:
    """Of those that have a name, what they have mapped."""
    found = set()
    for pid in pids:
        with suppress(OSError):
            for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
                _, slash, name = line.partition(" /dev/shm/")
                if slash and not name.endswith(" (deleted)"):
                    found.add(Path("/dev/shm", name))
    return found


def _there(pids: Collection[int]) -> set[int]:
    """Those that have not ended; what has ended and nobody has asked about is a zombie."""
    found = set()
    for pid in pids:
        with suppress(OSError):
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
                found.add(pid)
    return found


def _wait(ended: Callable[[], bool], limit_s: float) -> bool:
    until = time.monotonic() + limit_s
    while not ended():
        if time.monotonic() > until:
            return False
        time.sleep(_LOOK_S)
    return True


def _send(pids: Iterable[int], number: signal.Signals) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, number)
