"""Load through the client library: one thread that keeps requests under way, as a program that uses it would."""

from __future__ import annotations

import queue
import time
from collections.abc import Callable
from concurrent.futures import Future
from time import monotonic_ns
from typing import Final

from penstock.client import Client, PenstockError, Result
from penstock.load.arrivals import poisson
from penstock.load.job import UNSENT, Job, LibraryTarget, Meter
from penstock.wire.errors import DEADLINE

_REACH_S: Final = 10.0  # for the first call
_SLACK_NS: Final = 100_000  # what sleep(3) may take longer than it should


class LibraryLoad:
    def __init__(self, job: Job) -> None:
        assert isinstance(job.target, LibraryTarget)
        self._job = job
        self._target = job.target
        self._client = Client(job.target.address, timeout=job.timeout_s, tenant=job.target.tenant)

    def start(self) -> None:
        """Raises PenstockError."""
        target = self._target
        limit_s = max(_REACH_S, self._job.timeout_s)  # which connecting is part of
        self._client.infer(target.model, target.inputs, version=target.version, timeout=limit_s)

    def run(self, meter: Meter) -> None:
        """Until all that was sent in the measured time has ended."""
        if self._job.rate > 0:
            self._run_open(meter)
        elif self._job.connections == 1:
            self._run_alone(meter)
        else:
            self._run_closed(meter)

    def close(self) -> None:
        self._client.close()

    def _run_alone(self, meter: Meter) -> None:
        """The call that waits, which is the fastest."""
        target, client = self._target, self._client
        while (intended := monotonic_ns()) < meter.end:
            try:
                client.infer(target.model, target.inputs, version=target.version, priority=target.priority)
            except PenstockError as error:
                _book_error(meter, intended, monotonic_ns(), error)
            else:
                meter.answered(intended, monotonic_ns())

    def _run_closed(self, meter: Meter) -> None:
        ended: queue.SimpleQueue[tuple[int, int, Future[Result]]] = queue.SimpleQueue()
        under_way = 0
        sending = True
        while sending or under_way:
            while sending and under_way < self._job.connections:
                intended = monotonic_ns()
                if self._submit(meter, intended, lambda *each: ended.put(each)):
                    under_way += 1
                sending = intended < meter.end
            if under_way:
                intended, now, future = ended.get()
                under_way -= 1
                _book(meter, intended, now, future)
                sending = sending and now < meter.end

    def _run_open(self, meter: Meter) -> None:
        ended: queue.SimpleQueue[tuple[int, int, Future[Result]]] = queue.SimpleQueue()
        gaps = poisson(self._job.rate, self._job.seed)
        at = monotonic_ns() + next(gaps)
        under_way = 0
        while at < meter.end or under_way:
            try:
                while under_way:
                    left = (at - monotonic_ns() - _SLACK_NS) / 1e9 if at < meter.end else None
                    intended, now, future = ended.get(timeout=left) if left is None or left > 0 else ended.get_nowait()
                    under_way -= 1
                    _book(meter, intended, now, future)
            except queue.Empty:
                pass
            if at >= meter.end:
                continue
            if (left_ns := at - monotonic_ns()) > 0:
                time.sleep(left_ns / 1e9)
            now = monotonic_ns()
            if under_way >= self._job.outstanding_max:
                meter.failed(at, UNSENT)
            elif self._submit(meter, at, lambda *each: ended.put(each)):
                under_way += 1
                meter.sent(at, now, under_way)
            at += next(gaps)

    def _submit(self, meter: Meter, intended: int, note: Callable[[int, int, Future[Result]], None]) -> bool:
        """Whether ``note`` will be called with when it was to start, when it ended, and how."""
        target = self._target
        try:
            future = self._client.submit(target.model, target.inputs, version=target.version, priority=target.priority)
        except PenstockError as error:
            _book_error(meter, intended, monotonic_ns(), error)
            return False
        future.add_done_callback(lambda done: note(intended, monotonic_ns(), done))
        return True


def _book(meter: Meter, intended: int, now: int, future: Future[Result]) -> None:
    error = future.exception()
    if error is None:
        meter.answered(intended, now)
    elif isinstance(error, PenstockError):
        _book_error(meter, intended, now, error)
    else:
        raise error


def _book_error(meter: Meter, intended: int, now: int, error: PenstockError) -> None:
    if error.code == DEADLINE:
        meter.expired(intended, now)
    else:
        meter.refused(intended, now, error.code, error.message)
