"""The processes that read and write large JSON (``clerk.py``): started when they are needed, so many at a time, and
ended when they have nothing to do for a while.

A thread would not do: orjson and Python's own lists hold the interpreter's lock all the while, 0.7 s for 50 MB. What is
copied to and from a clerk is copied by threads, which can, since the kernel does it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Final, TypeAlias

from penstock.gateway.clerk import Sheet, receive_sheet, send_sheet, write_sheet
from penstock.gateway.options import GatewayOptions
from penstock.wire.errors import INTERNAL, OVERLOADED, PenstockError
from penstock.wire.process import fields
from penstock.wire.tensors import Buffer

log = logging.getLogger("penstock.gateway")

_END_S: Final = 5.0  # for a process that was killed to be gone
_RETRY_S: Final = 1.0

Then: TypeAlias = "Callable[[Any, Sheet], None]"
Fail: TypeAlias = "Callable[[PenstockError], None]"


class Errand:
    """``leave`` when nobody wants its result any more: neither ``then`` nor ``fail`` is called after that."""

    __slots__ = ("_clerks", "data", "done_with", "fail", "late", "order", "then", "wanted")

    def __init__(self, clerks: Clerks, order: object, data: Buffer, then: Then, fail: Fail) -> None:
        self._clerks = clerks
        self.order = order
        self.data = data
        self.then = then
        self.fail = fail
        self.done_with: Callable[[], None] = _nothing
        self.late: asyncio.TimerHandle | None = None
        self.wanted = True

    def leave(self) -> None:
        self.wanted = False
        self._clerks.forget(self)

    def drop(self) -> None:
        """Nobody reads what it was to be done with any more."""
        self.data = b""
        done, self.done_with = self.done_with, _nothing
        done()


def _nothing() -> None:
    """There is nothing to do."""


class _Clerk:
    """One process, and this gateway's end of its socket. ``timer``: to end it, for it takes too long or is idle."""

    __slots__ = ("channel", "errand", "process", "slow", "timer")

    def __init__(self) -> None:
        """Raises OSError."""
        self.errand: Errand | None = None
        self.slow = False
        self.timer: asyncio.TimerHandle | None = None
        self.channel, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            with other:
                self.process = subprocess.Popen(
                    [sys.executable, "-P", "-m", "penstock.gateway.clerk", str(other.fileno())],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    pass_fds=[other.fileno()],
                    process_group=0,  # Ctrl-C means the gateway
                )
        except BaseException:
            self.channel.close()
            raise
        self.channel.setblocking(False)

    def cancel_timer(self) -> None:
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None


class Clerks:
    """At most ``json_processes_max`` at a time; what comes more waits in line for ``json_wait_s``."""

    def __init__(self, loop: asyncio.AbstractEventLoop, options: GatewayOptions) -> None:
        self._loop = loop
        self._options = options
        self._line: dict[Errand, None] = {}  # in the order in which they came
        self._idle: list[_Clerk] = []
        self._busy: set[_Clerk] = set()

    @property
    def waiting(self) -> int:
        return len(self._line)

    @property
    def processes(self) -> list[int]:
        """Their ids."""
        return [clerk.process.pid for clerk in (*self._idle, *self._busy)]

    def run(
        self,
        function: Callable[..., tuple[object, Sequence[Buffer]]],
        arguments: tuple[Any, ...],
        data: Buffer,
        then: Then,
        fail: Fail,
        done_with: Callable[[], None] = _nothing,
    ) -> Errand:
        """Have a clerk call a function of a module with these arguments and ``data``. It returns a value and parts:
        ``then`` is called with the value and the sheet in which the parts lie; or ``fail``, with a PenstockError. Both
        on a turn of the loop of their own. ``done_with``: called once ``data`` is not read any more, whatever comes of
        it."""
        errand = Errand(self, (function, arguments), data, then, fail)
        errand.done_with = done_with
        errand.late = self._loop.call_later(self._options.json_wait_s, self._late, errand)
        self._line[errand] = None
        self._loop.call_soon(self._begin)
        return errand

    def forget(self, errand: Errand) -> None:
        """Nobody wants it: if it still waits, it leaves the line."""
        if errand in self._line:
            self._take(errand)
            errand.drop()

    def _take(self, errand: Errand) -> None:
        del self._line[errand]
        if errand.late is not None:
            errand.late.cancel()
            errand.late = None

    def _late(self, errand: Errand) -> None:
        self._take(errand)
        errand.drop()
        sentence = (
            f"the turn of this request's large JSON did not come within {self._options.json_wait_s:g} s (json_wait_s), "
            "since others are read and written; try again shortly"
        )
        self._refuse(errand, PenstockError(OVERLOADED, sentence, _RETRY_S))

    def _refuse(self, errand: Errand, error: PenstockError) -> None:
        if errand.wanted:
            errand.wanted = False
            errand.fail(error)

    def _begin(self) -> None:
        """Those whose turn it is."""
        while self._line and (self._idle or len(self._busy) < self._options.json_processes_max):
            errand = next(iter(self._line))
            self._take(errand)
            try:
                clerk = self._idle.pop() if self._idle else _Clerk()
            except OSError as error:
                errand.drop()
                sentence = f"no process can be started for large JSON: {error.strerror}"
                self._refuse(errand, PenstockError(OVERLOADED, sentence, _RETRY_S))
                continue
            clerk.cancel_timer()
            clerk.errand = errand
            self._busy.add(clerk)
            self._loop.add_reader(clerk.channel.fileno(), self._heard, clerk)
            writing = self._loop.run_in_executor(None, write_sheet, errand.order, [errand.data])
            writing.add_done_callback(partial(self._written, clerk, errand))

    def _written(self, clerk: _Clerk, errand: Errand, written: asyncio.Future[Sheet]) -> None:
        errand.drop()
        if clerk.errand is not errand:  # it has ended meanwhile
            written.exception()
            return
        try:
            with contextlib.closing(written.result()) as sheet:
                send_sheet(clerk.channel, sheet)
        except (OSError, MemoryError) as error:
            sentence = f"large JSON could not be given to a process: {error}"
            self._refuse(errand, PenstockError(OVERLOADED, sentence, _RETRY_S))
            self._end(clerk)
            return
        clerk.timer = self._loop.call_later(self._options.json_work_max_s, self._too_slow, clerk)

    def _heard(self, clerk: _Clerk) -> None:
        """It has done its work, or has ended."""
        try:
            sheet = receive_sheet(clerk.channel)
        except BlockingIOError:
            return
        except OSError:
            sheet = None
        errand, clerk.errand = clerk.errand, None
        if sheet is None or errand is None:
            self._lost(clerk, errand)
            return
        clerk.cancel_timer()
        self._busy.discard(clerk)
        self._idle.append(clerk)
        clerk.timer = self._loop.call_later(self._options.json_idle_s, self._end, clerk)
        self._begin()
        value = sheet.value() if errand.wanted else None
        if isinstance(value, PenstockError):
            self._refuse(errand, value)
        elif errand.wanted:
            errand.wanted = False
            errand.then(value, sheet)

    def _lost(self, clerk: _Clerk, errand: Errand | None) -> None:
        if clerk.slow:
            sentence = f"large JSON took longer than {self._options.json_work_max_s:g} s (json_work_max_s)"
        else:
            sentence = "the process that read or wrote this request's large JSON has ended; it is replaced"
        log.warning("a clerk was lost", extra=fields(process=clerk.process.pid, reason=sentence))
        self._end(clerk)
        if errand is not None:
            self._refuse(errand, PenstockError(INTERNAL, sentence))

    def _too_slow(self, clerk: _Clerk) -> None:
        clerk.slow = True
        clerk.process.kill()  # its socket says the rest

    def _end(self, clerk: _Clerk) -> None:
        clerk.cancel_timer()
        self._busy.discard(clerk)
        if clerk in self._idle:
            self._idle.remove(clerk)
        self._leave(clerk)
        self._loop.run_in_executor(None, _bury, clerk.process)
        self._begin()

    def _leave(self, clerk: _Clerk) -> None:
        if clerk.channel.fileno() >= 0:
            self._loop.remove_reader(clerk.channel.fileno())
            clerk.channel.close()
        clerk.process.kill()

    def close(self) -> None:
        """End them all; nobody is told."""
        for errand in list(self._line):
            errand.leave()
        for clerk in (*self._idle, *self._busy):
            clerk.cancel_timer()
            clerk.errand = None  # so what a thread still writes for it goes nowhere
            self._leave(clerk)
            _bury(clerk.process)
        self._idle.clear()
        self._busy.clear()


def _bury(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(_END_S)
