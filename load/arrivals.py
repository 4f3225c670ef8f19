"""When requests of an open loop are to start, and a clock that wakes for them in time."""

from __future__ import annotations

import ctypes
import os
import random
import struct
from collections.abc import Iterator
from contextlib import suppress
from typing import Final

_CLOCK_MONOTONIC: Final = 1
_TFD_NONBLOCK: Final = os.O_NONBLOCK
_TFD_CLOEXEC: Final = os.O_CLOEXEC
_TFD_TIMER_ABSTIME: Final = 1
_ITIMERSPEC: Final = struct.Struct("4l")  # interval and first expiry, seconds and nanoseconds each


def poisson(rate: float, seed: int) -> Iterator[int]:
    """Nanoseconds between arrivals that do not know of each other, ``rate`` a second on average."""
    source = random.Random(seed)
    left = 0.0  # of a nanosecond: rounded off each time they would add up
    while True:
        gap = source.expovariate(rate) * 1e9 + left
        whole = int(gap)
        left = gap - whole
        yield whole


class Timer:
    """timerfd(2). Event loops round what they wait to milliseconds, and with that much all that is measured would be
    late. Raises OSError."""

    def __init__(self) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)
        self.fd: int = self._libc.timerfd_create(_CLOCK_MONOTONIC, _TFD_NONBLOCK | _TFD_CLOEXEC)
        if self.fd < 0:
            raise OSError(ctypes.get_errno(), "timerfd_create")

    def set(self, at: int) -> None:
        """Be readable from this time of the monotonic clock on, in nanoseconds."""
        seconds, nanoseconds = divmod(max(1, at), 1_000_000_000)
        spec = _ITIMERSPEC.pack(0, 0, seconds, nanoseconds)
        if self._libc.timerfd_settime(self.fd, _TFD_TIMER_ABSTIME, spec, None):
            raise OSError(ctypes.get_errno(), "timerfd_settime")

    def clear(self) -> None:
        with suppress(BlockingIOError):  # set anew before it could be read
            os.read(self.fd, 8)

    def close(self) -> None:
        os.close(self.fd)
