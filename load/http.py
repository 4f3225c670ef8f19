"""Load over HTTP/1.1: connections that send the same bytes again and again. One event loop; what an answer costs here
is a read, a look at its first line, a note of its time, and a write."""

from __future__ import annotations

import asyncio
import os
from collections import deque
from time import monotonic_ns
from typing import Final, cast

from penstock.load.answers import AnswerError, Answers, Head
from penstock.load.arrivals import Timer, poisson
from penstock.load.job import UNSENT, HttpTarget, Job, Meter

_AGAIN_S: Final = 0.1  # after a connection could not be made
_LOOKS: Final = 20  # for requests that have expired, in the time that one may take
_LOOK_MAX_S: Final = 0.25
_LEAST_S: Final = 0.001
_TOO_LONG: Final = "no answer to that in time"
_OPEN_S: Final = 10.0  # for the connections that are made before it begins


class Unreachable(Exception):
    """No connection can be made; the message says why."""


class _Connection(asyncio.Protocol):
    """``intended``: when the request on it was to start, 0 while there is none."""

    __slots__ = ("_answers", "_load", "intended", "transport")

    def __init__(self, load: HttpLoad, intended: int) -> None:
        self._load = load
        self._answers = Answers(load.known)
        self.intended = intended
        self.transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)  # uvloop's is one, and says no
        self._load.opened(self)

    def data_received(self, data: bytes) -> None:
        now = monotonic_ns()
        answers = self._answers
        try:
            status = answers.feed(data)
        except AnswerError as error:
            self._load.broken(self, "bad answer", str(error))
            return
        if status is not None:
            self._load.answered(self, now, status, answers)

    def eof_received(self) -> None:
        now = monotonic_ns()
        status = self._answers.eof()
        if status is not None:
            self._load.answered(self, now, status, self._answers)

    def connection_lost(self, error: Exception | None) -> None:
        self._load.broken(self, "closed", str(error or "the server closed the connection before it had answered"))


class HttpLoad:
    """``start`` makes connections, ``run`` uses them."""

    def __init__(self, job: Job) -> None:
        assert isinstance(job.target, HttpTarget)
        self.known: dict[bytes, Head] = {}
        self._job = job
        self._target = job.target
        self._loop = asyncio.get_running_loop()
        self._open_loop = job.rate > 0
        self._all: set[_Connection] = set()
        self._idle: deque[_Connection] = deque()
        self._opening = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self._meter: Meter | None = None
        self._sending = False
        self._ended = asyncio.Event()

    async def start(self) -> None:
        """Raises Unreachable."""
        problems = await asyncio.gather(*(self._open(0, _OPEN_S) for _ in range(self._job.connections)))
        if problem := next(filter(None, problems), ""):
            self._close()
            raise Unreachable(f"{self._job.connections} connections cannot be made: {problem}")

    async def _open(self, intended: int, limit_s: float) -> str:
        """Make a connection. What prevents it, or ""; it is known to ``opened`` before this returns."""
        connection = _Connection(self, intended)
        self._opening += 1
        try:
            async with asyncio.timeout(limit_s):
                await self._loop.create_connection(lambda: connection, self._target.host, self._target.port)
        except TimeoutError:
            problem = _TOO_LONG
        except OSError as error:
            problem = os.strerror(error.errno) if error.errno else str(error)
        else:
            problem = ""
        if connection.transport is not None:
            return ""
        self._opening -= 1
        return problem

    async def run(self, meter: Meter) -> None:
        """Until all that was sent in the measured time has ended."""
        self._meter = meter
        self._sending = True
        looks = self._loop.create_task(self._look())
        timer = Timer() if self._open_loop else None
        try:
            now = monotonic_ns()
            if timer is None:
                for _ in range(self._job.connections - len(self._all)):
                    self._spawn(0)  # in the place of what the server has closed meanwhile
                while self._idle:
                    self._send(self._idle.popleft(), now, now)
            else:
                self._gaps = poisson(self._job.rate, self._job.seed)
                self._next = now + next(self._gaps)
                self._loop.add_reader(timer.fd, self._tick, timer)
                timer.set(self._next)
            await asyncio.sleep((meter.end - monotonic_ns()) / 1e9)
            self._sending = False
            self._check_end()
            await self._ended.wait()
        finally:
            looks.cancel()
            if timer is not None:
                self._loop.remove_reader(timer.fd)
                timer.close()
            self._close()

    # --- what happens to connections ---

    def opened(self, connection: _Connection) -> None:
        self._opening -= 1
        self._all.add(connection)
        if connection.intended:
            self._write(connection)
        else:
            self._free(connection)

    def answered(self, connection: _Connection, now: int, status: int, answers: Answers) -> None:
        intended, connection.intended = connection.intended, 0
        if not intended:
            self._drop(connection)  # an answer that nobody has asked for
            return
        assert self._meter is not None
        if 200 <= status < 300:
            self._meter.answered(intended, now)
        else:
            self._meter.refused(intended, now, f"HTTP {status}", answers.text.decode("utf-8", "replace"))
        if answers.closes:
            self._drop(connection)
            self._replace()
        elif self._sending and not self._open_loop:
            self._send(connection, now, now)
        else:
            self._free(connection)

    def broken(self, connection: _Connection, outcome: str, text: str) -> None:
        if connection not in self._all:
            return
        intended, connection.intended = connection.intended, 0
        self._drop(connection)
        if intended and self._meter is not None:
            self._meter.failed(intended, outcome, text)
        self._replace()

    def _free(self, connection: _Connection) -> None:
        if self._sending and not self._open_loop:
            now = monotonic_ns()
            self._send(connection, now, now)
            return
        self._idle.append(connection)
        self._check_end()

    def _drop(self, connection: _Connection) -> None:
        self._all.discard(connection)
        if not connection.intended and connection in self._idle:
            self._idle.remove(connection)
        if connection.transport is not None:
            connection.transport.abort()

    def _replace(self) -> None:
        """In a closed loop, whose connections ask without end."""
        if self._sending and not self._open_loop:
            self._spawn(0)
        self._check_end()

    def _spawn(self, intended: int) -> None:
        task = self._loop.create_task(self._connect(intended))
        self._tasks.add(task)
        task.add_done_callback(self._connected)

    def _connected(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        self._check_end()

    async def _connect(self, intended: int) -> None:
        """``intended``: of the request that it is for; 0 if it is there to ask again and again."""
        assert self._meter is not None
        while self._sending or intended:
            asked = intended or monotonic_ns()
            left_s = self._job.timeout_s - (monotonic_ns() - asked) / 1e9
            problem = await self._open(intended, max(_LEAST_S, left_s))
            if not problem:
                break
            if problem == _TOO_LONG:
                self._meter.expired(asked, monotonic_ns())
            else:
                self._meter.failed(asked, "no connection", problem)
            if intended:
                break
            await asyncio.sleep(_AGAIN_S)

    # --- what is sent ---

    def _send(self, connection: _Connection, intended: int, now: int) -> None:
        connection.intended = intended
        self._write(connection)

    def _write(self, connection: _Connection) -> None:
        assert connection.transport is not None
        connection.transport.write(self._target.request)

    def _tick(self, timer: Timer) -> None:
        timer.clear()
        if not self._sending:
            return
        now = monotonic_ns()
        while self._next <= now:
            self._arrive(self._next, now)
            self._next += next(self._gaps)
        timer.set(self._next)

    def _arrive(self, intended: int, now: int) -> None:
        meter = self._meter
        assert meter is not None
        outstanding = len(self._all) - len(self._idle) + self._opening
        if self._idle:
            connection = self._idle.popleft()  # the one that has been idle longest: all of them are used
            self._send(connection, intended, now)
        elif outstanding < self._job.outstanding_max:
            self._spawn(intended)
        else:
            meter.failed(intended, UNSENT)
            return
        meter.sent(intended, now, outstanding + 1)

    # --- time ---

    async def _look(self) -> None:
        """For requests that have taken too long. Their connections are closed, as one does who leaves."""
        assert self._meter is not None
        limit = round(self._job.timeout_s * 1e9)
        while True:
            await asyncio.sleep(min(_LOOK_MAX_S, self._job.timeout_s / _LOOKS))
            now = monotonic_ns()
            for connection in list(self._all):
                if connection.intended and now - connection.intended > limit:
                    intended, connection.intended = connection.intended, 0
                    self._meter.expired(intended, now)
                    self._drop(connection)
                    self._replace()

    def _check_end(self) -> None:
        if (
            self._meter is not None
            and not self._sending
            and not self._opening
            and not self._tasks
            and len(self._idle) == len(self._all)
        ):
            self._ended.set()

    def _close(self) -> None:
        for connection in list(self._all):
            self._drop(connection)
