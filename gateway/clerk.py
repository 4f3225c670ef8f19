"""A process that reads and writes large JSON for a gateway, whose loop would stand still meanwhile.

It is this module, run with the number of its end of a socket pair (SOCK_SEQPACKET). An order is a message with the
lengths of its two parts, and a memfd with these: what to do, pickled, and the bytes to do it with. So is the answer.
It does one order after another, and ends with the socket. Both ends are one program, started by the same user, so what
is pickled is trusted as the gateway trusts itself.
"""

from __future__ import annotations

import contextlib
import gc
import mmap
import os
import pickle
import signal
import socket
import struct
import sys
from collections.abc import Sequence
from typing import Any, Final

from penstock.wire.errors import INTERNAL, OVERLOADED, PenstockError
from penstock.wire.process import end_before_others
from penstock.wire.tensors import Buffer

LENGTHS: Final = struct.Struct("<QQ")
_NICENESS: Final = 5  # small requests go first where there are fewer processors than work; more would starve it
_OOM_SCORE: Final = 1000  # what it does can be asked again; the gateway has connections
_WRITTEN_MAX: Final = 1 << 30  # bytes at once; Linux takes no more than 2 GiB


class Sheet:
    """A memfd in two parts. ``about``: bytes of the first, ``nbytes``: of the second. Raises OSError."""

    __slots__ = ("about", "fd", "nbytes")

    def __init__(self, fd: int, about: int, nbytes: int) -> None:
        self.fd = fd
        self.about = about
        self.nbytes = nbytes

    def value(self) -> Any:
        """What was pickled into the first part."""
        return pickle.loads(os.pread(self.fd, self.about, 0))

    def read_into(self, view: memoryview) -> None:
        """Copy the second part, without keeping other threads from running."""
        at, end = 0, min(len(view), self.nbytes)
        while at < end:
            count = os.preadv(self.fd, [view[at : min(end, at + _WRITTEN_MAX)]], self.about + at)
            if not count:
                raise OSError("a sheet is shorter than it was said to be")
            at += count

    def view(self) -> memoryview:
        """The second part, without a copy; it lives as long as it is looked at."""
        if not self.nbytes:
            return memoryview(b"")
        whole = mmap.mmap(self.fd, self.about + self.nbytes, mmap.MAP_SHARED, mmap.PROT_READ)
        return memoryview(whole)[self.about :]

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def __del__(self) -> None:
        self.close()


def write_sheet(value: object, parts: Sequence[Buffer]) -> Sheet:
    """One with these parts, written without keeping other threads from running. Raises OSError."""
    fd = os.memfd_create("penstock-sheet", os.MFD_CLOEXEC)
    try:
        about = pickle.dumps(value)
        for part in (about, *parts):
            view = memoryview(part).cast("B") if len(part) else memoryview(b"")
            while view:
                view = view[os.write(fd, view[:_WRITTEN_MAX]) :]
    except BaseException:
        os.close(fd)
        raise
    return Sheet(fd, len(about), sum(map(len, parts)))


def send_sheet(channel: socket.socket, sheet: Sheet) -> None:
    """Raises OSError. The sheet remains the sender's."""
    socket.send_fds(channel, [LENGTHS.pack(sheet.about, sheet.nbytes)], [sheet.fd])


def receive_sheet(channel: socket.socket) -> Sheet | None:
    """None when the other end has gone. Raises OSError."""
    message, fds, _, _ = socket.recv_fds(channel, LENGTHS.size, 1)
    if len(message) != LENGTHS.size or len(fds) != 1:
        for fd in fds:
            os.close(fd)
        return None
    return Sheet(fds[0], *LENGTHS.unpack(message))


def obey(order: Sheet) -> Sheet:
    """What comes of an order: what its function returns, a value and parts, or a PenstockError as the value."""
    try:
        function, arguments = order.value()
        value, parts = function(*arguments, order.view())
    except PenstockError as error:
        value, parts = error, []
    except MemoryError:
        value, parts = PenstockError(OVERLOADED, "there is not enough memory to read or write this JSON", 1.0), []
    except Exception as error:  # one order's, as on the gateway's loop  # noqa: BLE001
        value, parts = PenstockError(INTERNAL, f"a clerk could not do its work: {error!r:.200}"), []
    return write_sheet(value, parts)


def serve(channel: socket.socket) -> None:
    gc.disable()  # millions of lists are made at a time, and none of them in a circle
    with contextlib.suppress(OSError):  # the gateway has gone
        while (order := receive_sheet(channel)) is not None:
            with contextlib.closing(order), contextlib.closing(obey(order)) as answer:
                send_sheet(channel, answer)
            gc.collect()


def main() -> None:
    # Ctrl-C and systemd mean the gateway, which may still have to answer what is under way here.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    end_before_others(_OOM_SCORE)
    with contextlib.suppress(OSError):
        os.nice(_NICENESS)
    with socket.socket(fileno=int(sys.argv[1])) as channel:
        serve(channel)


if __name__ == "__main__":
    main()
