"""What every process of ours does to be started, watched and stopped: by ``penstock up`` and by systemd alike."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import socket
from pathlib import Path
from types import FrameType
from typing import Final

from penstock.wire.metrics import Meters

_FEEDINGS: Final = 3  # of a watchdog in the time after which it bites


class StopSignal:
    """SIGTERM and SIGINT as a flag and a descriptor to poll; a handler that did more could run in the middle of
    anything.

    Must be made in the main thread. ``restore`` puts back what was before.
    """

    def __init__(self) -> None:
        self.received = False
        self._reader, self._writer = socket.socketpair()
        self._reader.setblocking(False)
        self._writer.setblocking(False)
        self._wakeup = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        self._before = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}

    def fileno(self) -> int:
        return self._reader.fileno()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = True

    def clear(self) -> None:
        """Take what the kernel wrote out of the descriptor, so that it is quiet again."""
        with contextlib.suppress(BlockingIOError):
            self._reader.recv(4096)

    def restore(self) -> None:
        signal.set_wakeup_fd(self._wakeup)
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._reader.close()
        self._writer.close()


def notify(state: str) -> None:
    """Tell whoever started this process how it fares (sd_notify(3)); does nothing when nobody asked to know."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    if address.startswith("@"):
        address = "\0" + address[1:]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as channel:
        try:
            channel.connect(address)
            channel.send(state.encode())
        except OSError:
            return  # it has gone, and with it the interest


def end_before_others(score: int) -> None:
    """Have the kernel end this process, and what it starts, before those of a lower score when memory is out: from 0,
    as all begin, to 1000. A score can only be raised."""
    path = Path("/proc/self/oom_score_adj")
    with contextlib.suppress(OSError):  # then the kernel chooses by itself
        path.write_text(str(max(score, int(path.read_text()))))


class Watchdog:
    """Tells systemd that the loop which does the work turns (sd_watchdog_enabled(3)); does nothing when nobody asked
    for it. ``due``: when to ``feed`` it next, in the same clock."""

    def __init__(self) -> None:
        self.due = float("inf")
        self._every_s = float("inf")
        limit, whose = os.environ.get("WATCHDOG_USEC", ""), os.environ.get("WATCHDOG_PID", "")
        if limit.isdecimal() and int(limit) and whose in ("", str(os.getpid())):
            self._every_s = int(limit) * 1e-6 / _FEEDINGS
            self.due = 0.0

    def feed(self, now: float) -> None:
        if now >= self.due:
            self.due = now + self._every_s
            notify("WATCHDOG=1")


def fields(**values: object) -> dict[str, object]:
    """For a log call's ``extra``: what the line says beside its event, each under its own name."""
    return {"fields": values}


def measure(meters: Meters) -> None:
    """Bring the series about this process up to date."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    meters.value("penstock_process_cpu_seconds").value = used.ru_utime + used.ru_stime
    with open("/proc/self/statm", "rb") as file:
        pages = int(file.read().split()[1])
    meters.value("penstock_process_resident_bytes").value = pages * resource.getpagesize()
