"""Runs jobs: starts a generator for each, has them begin together, and puts together what they measured."""

from __future__ import annotations

import json
import pickle
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from typing import Any, Final

from penstock.load.job import Job, Tally

_LEAD_S: Final = 0.05  # between the word to begin and the beginning: as much as a word may take
_START_MAX_S: Final = 60.0  # for generators to be ready
_END_S: Final = 10.0  # that they may take beyond what they have to wait for


class LoadError(Exception):
    """No load could be made; the message is a sentence."""


def divide(job: Job, processes: int) -> list[Job]:
    """The same load from several generators, each with its share; fewer than asked for where there is not one
    connection for each."""
    count = max(1, min(processes, job.connections))
    shares = [job.connections // count + (number < job.connections % count) for number in range(count)]
    return [
        replace(
            job,
            connections=share,
            rate=job.rate / count,
            outstanding_max=max(1, job.outstanding_max // count),
            seed=job.seed + number,
        )
        for number, share in enumerate(shares)
    ]


def run_load(
    jobs: Sequence[Job],
    progress: Callable[[float, int], None] = lambda elapsed_s, answers: None,
    at_edges: Callable[[], None] = lambda: None,
) -> Tally:
    """Have these jobs done at the same time. ``progress`` is told every now and then how many seconds have passed, of
    warm-up and measured time together, and how many answers have come; ``at_edges`` is called when the measured time
    begins, and when it ends. Raises LoadError."""
    with ExitStack() as stack:
        said: queue.SimpleQueue[tuple[int, dict[str, Any]]] = queue.SimpleQueue()
        generators = [stack.enter_context(_Generator(number, job, said)) for number, job in enumerate(jobs)]
        for _ in generators:
            _next(said, "ready", time.monotonic() + _START_MAX_S)
        begin = time.monotonic() + _LEAD_S
        for generator in generators:
            generator.begin(round(begin * 1e9))
        job = jobs[0]
        edges = [begin + job.warmup_s, begin + job.warmup_s + job.duration_s]
        until = edges[-1] + job.timeout_s + _END_S
        answers = [0] * len(generators)
        tally: Tally | None = None
        ended = 0
        while ended < len(generators) or edges:
            now = time.monotonic()
            if edges and now >= edges[0]:
                del edges[0]
                at_edges()
                continue
            if now >= until:
                raise LoadError("a generator did not end in time")
            try:
                number, line = said.get(timeout=(edges[0] if edges else until) - now)
            except queue.Empty:
                continue
            if "answers" in line:
                answers[number] = line["answers"]
                progress(time.monotonic() - begin, sum(answers))
                continue
            part = Tally.load(_get(line, "tally"))
            ended += 1
            if tally is None:
                tally = part
            else:
                tally.add(part)
        assert tally is not None
        return tally


def _next(said: queue.SimpleQueue[tuple[int, dict[str, Any]]], key: str, until: float) -> None:
    try:
        _, line = said.get(timeout=max(0.0, until - time.monotonic()))
    except queue.Empty:
        raise LoadError("a generator did not start in time") from None
    _get(line, key)


def _get(line: dict[str, Any], key: str) -> Any:
    if key not in line:
        raise LoadError(line.get("error", "a generator ended before it was done"))
    return line[key]


class _Generator:
    """A process, and a thread that reads what it says."""

    def __init__(self, number: int, job: Job, said: queue.SimpleQueue[tuple[int, dict[str, Any]]]) -> None:
        self._number = number
        self._said = said
        self._process = subprocess.Popen(
            [sys.executable, "-m", "penstock.load"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        self._reader = threading.Thread(target=self._read, name="generator", daemon=True)
        self._reader.start()
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # it has ended, which the reader sees
            pickle.dump(job, self._process.stdin)
            self._process.stdin.flush()

    def begin(self, at: int) -> None:
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            self._process.stdin.write(b"%d\n" % at)
            self._process.stdin.flush()

    def _read(self) -> None:
        assert self._process.stdout is not None
        line: dict[str, Any] = {}
        for text in self._process.stdout:
            line = json.loads(text)
            self._said.put((self._number, line))
        if not line.keys() & {"tally", "error"}:
            self._said.put((self._number, {}))  # it has died

    def __enter__(self) -> _Generator:
        return self

    def __exit__(self, *error: object) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        if error[0] is not None:
            self._process.kill()
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.wait(_END_S)
        self._reader.join(_END_S)
        self._process.stdout.close()
