"""What every process of ours does to be started, watched and stopped: by ``penstock up`` and by systemd alike."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import logging
import os
import resource
import signal
import socket
import struct
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Final, Literal, TypeAlias

from penstock.wire.metrics import Meters

log = logging.getLogger("penstock")

EXIT_DEFECT: Final = 70  # an exception that nobody expected: what is left cannot be relied on (sysexits.h: EX_SOFTWARE)
_PR_SET_PDEATHSIG: Final = 1
SPARE_DESCRIPTORS: Final = 64  # the highest numbers, which are for what a process opens itself and not for who comes
SHORT_OF_DESCRIPTORS: Final = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)  # of accept(2)
Descriptors: TypeAlias = Literal["none", "short", "enough"]
WATCHDOG_FD: Final = "PENSTOCK_WATCHDOG_FD"  # an eventfd to feed instead of NOTIFY_SOCKET: it wakes nobody
_NOTIFY_MAX_US: Final = 5_000_000  # for whoever started this process to hear of it
_FEED_MAX_US: Final = 100_000  # likewise, while others wait for this process
_FEEDINGS: Final = 3  # of a watchdog in the time after which it bites
_EARLY_S: Final = 2.0  # it is fed so long before it is due, by who is awake: an idle process wakes for its beat alone


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


def notify(state: str, channel: socket.socket | None = None) -> None:
    """Tell whoever started this process how it fares (sd_notify(3)); does nothing when nobody asked to know."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    if address.startswith("@"):
        address = "\0" + address[1:]
    # What it cannot be told, because it has gone or there is no descriptor, is no reason to end.
    with contextlib.suppress(OSError):
        if channel is not None:
            channel.sendto(state.encode(), address)
            return
        with _channel(_NOTIFY_MAX_US) as opened:
            opened.sendto(state.encode(), address)


def _channel(limit_us: int) -> socket.socket:
    """``limit_us``: how long to wait when the other end does not read and its queue is full."""
    channel = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
    # The kernel's own time, since for poll(2) there is always room in a socket that is not connected.
    limit = struct.pack("@ll", limit_us // 1_000_000, limit_us % 1_000_000)
    channel.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)
    return channel


def end_before_others(score: int) -> None:
    """Have the kernel end this process, and what it starts, before those of a lower score when memory is out: from 0,
    as all begin, to 1000. A score can only be raised."""
    path = Path("/proc/self/oom_score_adj")
    with contextlib.suppress(OSError):  # then the kernel chooses by itself
        path.write_text(str(max(score, int(path.read_text()))))


def die_with(parent: int) -> None:
    """Have the kernel end this process with the thread that started it."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it has ended already
        os.kill(os.getpid(), signal.SIGKILL)


class Watchdog:
    """Tells systemd (sd_watchdog_enabled(3)) or the launcher that the loop which does the work turns; does nothing when
    nobody asked for it. ``due``: when to ``feed`` it next, in the same clock."""

    def __init__(self) -> None:
        self.due = self._from = float("inf")
        self._every_s = float("inf")
        self._channel: socket.socket | None = None
        self._counter = -1
        limit, whose = os.environ.get("WATCHDOG_USEC", ""), os.environ.get("WATCHDOG_PID", "")
        if limit.isdecimal() and int(limit) and whose in ("", str(os.getpid())):
            self._every_s = int(limit) * 1e-6 / _FEEDINGS
            self.due = self._from = 0.0
            if os.environ.get(WATCHDOG_FD, "").isdecimal():
                self._counter = int(os.environ[WATCHDOG_FD])
            else:
                self._channel = _channel(_FEED_MAX_US)  # kept: who has no descriptor left is not stuck

    def feed(self, now: float) -> None:
        if now < self._from:
            return
        self.due = now + self._every_s
        self._from = self.due - min(_EARLY_S, self._every_s / 2)
        if self._counter >= 0:
            with contextlib.suppress(OSError):
                os.eventfd_write(self._counter, 1)
        else:
            notify("WATCHDOG=1", self._channel)

    def __del__(self) -> None:
        if self._channel is not None:
            self._channel.close()


def raise_descriptor_limit() -> None:
    """Let this process open as many files as it may: the lower limit is for programs that call select(2)."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):  # a kernel whose own limit is lower by now
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def check_descriptor_limit(needed: int, what: str) -> None:
    """Say when fewer files may be open than a configuration allows peers to take."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if resource.RLIM_INFINITY != limit < needed + SPARE_DESCRIPTORS:
        log.warning(
            "fewer files may be open than the configuration may need; raise the limit (ulimit -n, LimitNOFILE=)",
            extra=fields(limit=limit, needed=needed + SPARE_DESCRIPTORS, most=what),
        )


def is_spare(descriptor: int) -> bool:
    """Whether it is one of the last that this process may open: the kernel gives the lowest number that is free."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return resource.RLIM_INFINITY != limit <= descriptor + SPARE_DESCRIPTORS


def descriptors() -> Descriptors:
    """How a file that would be opened now would fare."""
    try:
        descriptor = os.open("/", os.O_PATH | os.O_CLOEXEC)
    except OSError:
        return "none"
    os.close(descriptor)
    return "short" if is_spare(descriptor) else "enough"


def fields(**values: object) -> dict[str, object]:
    """For a log call's ``extra``: what the line says beside its event, each under its own name."""
    return {"fields": values}


def _says_all(name: str, event: str, level: int, code: object) -> bool:
    return False


# Whether a log line of this kind would be held back, since there have been so many; if so, it counts as if it had been
# made. To be asked before one that may come a thousand times a second, which costs as much to make as an answer. By
# logger, event, level and the field ``code``. Whoever sets up logging replaces it (bin/logs.py).
holds_back: Callable[[str, str, int, object], bool] = _says_all


def measure(meters: Meters) -> None:
    """Bring the series about this process up to date."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    meters.value("penstock_process_cpu_seconds").value = used.ru_utime + used.ru_stime
    with contextlib.suppress(OSError), open("/proc/self/statm", "rb") as file:  # else it stays what it was
        meters.value("penstock_process_resident_bytes").value = int(file.read().split()[1]) * resource.getpagesize()
