"""A generator: reads a job from standard input, makes its connections, says that it is ready, and begins when it is
told to. Says how many answers have come while it runs, and then what was measured. A line of JSON each time."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import pickle
import resource
import signal
import sys
import threading
import time
from typing import Any, Final

import uvloop

from penstock.client import PenstockError
from penstock.load.http import HttpLoad, Unreachable
from penstock.load.job import HttpTarget, Job, Meter
from penstock.load.library import LibraryLoad

_SAY_S: Final = 0.25
_END_S: Final = 10.0  # for the watching thread to end, which looks up at least every _SAY_S


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C is for whoever started this, who ends it
    _, files = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))  # a connection is a file
    job = pickle.load(sys.stdin.buffer)
    assert isinstance(job, Job)
    try:
        if isinstance(job.target, HttpTarget):
            uvloop.run(_over_http(job))
        else:
            _through_library(job)
    except (Unreachable, PenstockError) as error:
        _say({"error": str(error)})


async def _over_http(job: Job) -> None:
    asyncio.get_running_loop().set_exception_handler(_fail)
    load = HttpLoad(job)
    await load.start()
    with _Watch(job) as watch:
        await load.run(watch.meter)


def _fail(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """A defect of ours in a callback: what would be measured after it is worth nothing."""
    loop.default_exception_handler(context)
    sys.stderr.flush()
    os._exit(1)


def _through_library(job: Job) -> None:
    load = LibraryLoad(job)
    try:
        load.start()
        with _Watch(job) as watch:
            load.run(watch.meter)
    finally:
        load.close()


class _Watch:
    """Around a run: waits for the word to begin, looks at this process's own time when the measured time begins and
    ends, and says how it goes, and in the end what it was."""

    def __init__(self, job: Job) -> None:
        gc.collect()
        gc.freeze()
        _say({"ready": True})
        begin = int(sys.stdin.buffer.readline() or b"0")  # nothing: nobody is there any more
        self.meter = Meter(begin + round(job.warmup_s * 1e9), job.duration_s, job.deadline_s)
        self._used: list[float] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watch", daemon=True)

    def __enter__(self) -> _Watch:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join(_END_S)
        if error[0] is None:
            first, last = self._used[0], self._used[-1]
            self.meter.tally.own_cpu_s.append(last - first)
            _say({"tally": self.meter.tally.export()})

    def _watch(self) -> None:
        marks = [self.meter.begin, self.meter.end]
        while marks:
            left_s = (marks[0] - time.monotonic_ns()) / 1e9
            if left_s <= 0:
                del marks[0]
                self._used.append(_cpu_s())
            elif self._stop.wait(min(left_s, _SAY_S)):
                self._used.append(_cpu_s())
                return
            else:
                _say({"answers": self.meter.answers})


def _cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def _say(line: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(line) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
