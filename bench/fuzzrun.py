"""Feeds targets, and looks: at what they raise, how long they take, what they hold and how the process grows."""

from __future__ import annotations

import gc
import hashlib
import os
import re
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random
from typing import Any, Final

from bench.fuzztarget import Target
from penstock.worker.memory import give_back

SLOW_S: Final = 0.1  # of processor time, that no input may take
SLOW_BYTES: Final = 64 << 10  # a larger one may take as often SLOW_S as it has so many
GROWTH_MAX_BYTES: Final = 32 << 20  # of the process, behind the first fifth of the inputs
HELD_MORE: Final = 1.1  # that may be held in the last phases, to what was in those before
HELD_SLACK: Final = 100
_SHRINK_TRIES: Final = 2000
_SHOWN_MAX: Final = 1000
_ADDRESS: Final = re.compile(" at 0x[0-9a-f]+")
_PAGE: Final = os.sysconf("SC_PAGE_SIZE")


@dataclass
class Finding(Exception):
    """What went wrong at input ``number`` of a target. ``what``: the exception, or a sentence."""

    target: str
    seed: int
    number: int
    what: str
    each: str
    where: str = ""

    def __str__(self) -> str:
        again = f"python bench/fuzz.py --target {self.target} --seed {self.seed} --replay {self.number}"
        first = f"{self.target}, seed {self.seed}, input {self.number}: {self.what}"
        return "\n".join([first, *([self.each] if self.each else []), f"{self.where}again: {again}"])


@dataclass
class Tally:
    """Of one target."""

    target: str
    inputs: int = 0
    understood: int = 0
    seconds: float = 0.0
    worst_s: float = 0.0
    held: list[list[int]] = field(default_factory=list)  # by phase
    rss: list[int] = field(default_factory=list)  # bytes, behind each phase but those of the first fifth
    digest: str = ""  # of all inputs, where it was asked for
    findings: list[Finding] = field(default_factory=list)

    @property
    def growth(self) -> int:
        """Of the least that the process had: what a large input takes for a moment comes back."""
        third = len(self.rss) // 3
        return min(self.rss[-third:]) - min(self.rss[:third]) if third else 0

    def held_about(self, first: int, last: int) -> float:
        """How much was held on average behind some phases."""
        found = [each for phase in self.held[first:last] for each in phase]
        return sum(found) / max(1, len(found))


def rss_bytes(pid: int | str = "self") -> int:
    with open(f"/proc/{pid}/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * _PAGE


def start(make: Callable[[], Target], seed: int, number: int) -> tuple[Target, Random, int]:
    """A target in the state that a round begins with, its random source, and the first number of that round."""
    target = make()
    round_ = number // (target.phase * target.phases)
    random = Random(f"{seed} {target.name} {round_}")
    target.begin(random)
    return target, random, round_ * target.phase * target.phases


def run(make: Callable[[], Target], seed: int, count: int, stop_after: int = 5, digest: bool = False) -> Tally:
    """Feed inputs 0 to ``count``; findings end the round that they are in."""
    tally = Tally(make().name)
    summed = hashlib.sha256()
    number, began = 0, time.monotonic()
    while number < count:
        target, random, number = start(make, seed, number)
        tally.held = tally.held or [[] for _ in range(target.phases)]
        gc.disable()  # its pauses are not an input's; it is done between two phases
        try:
            for phase in range(target.phases):
                for _ in range(min(target.phase, count - number)):
                    each = _one(target, random, seed, number, tally)
                    if digest:
                        summed.update(_ADDRESS.sub("", repr(each)).encode())
                    number += 1
                _settle(target, seed, number - 1, phase, tally)
                gc.collect()
                if number >= count / 5:
                    give_back()  # what the C library only keeps is no growth
                    tally.rss.append(rss_bytes())
                if number >= count:
                    break
        except Finding as finding:
            finding.__cause__ = finding.__context__ = (
                None  # its frames would keep all that the target holds, which would pass for growth
            )
            tally.findings.append(finding.with_traceback(None))
            number = (number // (target.phase * target.phases) + 1) * target.phase * target.phases
        finally:
            gc.enable()
            target.close()
        if len(tally.findings) >= stop_after:
            break
    tally.seconds = time.monotonic() - began
    tally.digest = summed.hexdigest()
    _check_growth(tally, seed)
    return tally


def _one(target: Target, random: Random, seed: int, number: int, tally: Tally) -> Any:
    each: Any = None
    try:
        each = target.make(random)
        before = time.thread_time_ns()
        tally.understood += target.feed(each)
        took_s = (time.thread_time_ns() - before) / 1e9
        target.check()
    except Exception as error:
        raise _finding(target, seed, number, error, each) from error
    tally.inputs += 1
    tally.worst_s = max(tally.worst_s, took_s)
    if took_s > SLOW_S and took_s > SLOW_S * _size(each) / SLOW_BYTES:
        shown = repr(each)[:_SHOWN_MAX]
        tally.findings.append(Finding(target.name, seed, number, f"it took {took_s * 1000:.0f} ms", shown))
    return each


def _size(each: Any) -> int:
    return sum(map(_size, each)) if isinstance(each, (tuple, list)) else len(each) if isinstance(each, bytes) else 0


def _settle(target: Target, seed: int, number: int, phase: int, tally: Tally) -> None:
    try:
        tally.held[phase].append(target.settle())
        target.check()
    except Exception as error:
        raise _finding(target, seed, number, error, "when all had left") from error


def _finding(target: Target, seed: int, number: int, error: Exception, each: Any) -> Finding:
    frames = traceback.extract_tb(error.__traceback__)[-4:]
    where = "".join(
        f"  {os.path.relpath(frame.filename)}:{frame.lineno} {frame.name}: {frame.line}\n" for frame in frames
    )
    data = target.bytes_of(each) if each is not None and not isinstance(each, str) else None
    if data is not None:
        each = target.with_bytes(each, shrink(data, lambda less: _fails(target, each, less, type(error))))
    return Finding(target.name, seed, number, f"{type(error).__name__}: {error}"[:500], repr(each)[:_SHOWN_MAX], where)


def _fails(target: Target, each: Any, data: bytes, kind: type[Exception]) -> bool:
    try:
        target.feed(target.with_bytes(each, data))
    except Exception as error:  # noqa: BLE001 - as above
        return type(error) is kind
    return False


def shrink(data: bytes, fails: Callable[[bytes], bool]) -> bytes:
    """Fewer bytes that fail as well."""
    size, tries = max(1, len(data) // 2), 0
    while size and tries < _SHRINK_TRIES:
        at = 0
        while at < len(data) and tries < _SHRINK_TRIES:
            less = data[:at] + data[at + size :]
            tries += 1
            if fails(less):
                data = less
            else:
                at += size
        size //= 2
    return data


def _check_growth(tally: Tally, seed: int) -> None:
    whole = [phase for phase in tally.held if len(phase) == len(tally.held[-1])]
    if len(whole) == len(tally.held) and tally.held and tally.held[-1]:
        half, quarter = len(whole) // 2, len(whole) - len(whole) // 4
        before, after = tally.held_about(half // 2, half), tally.held_about(quarter, len(whole))
        if after > before * HELD_MORE + HELD_SLACK:
            what = f"{after:.0f} elements are held where {before:.0f} were"
            tally.findings.append(Finding(tally.target, seed, tally.inputs, what, "when all had left"))
    if tally.growth > GROWTH_MAX_BYTES:
        what = f"the process grew by {tally.growth >> 20} MiB"
        tally.findings.append(Finding(tally.target, seed, tally.inputs, what, ""))


def replay(make: Callable[[], Target], seed: int, number: int) -> Finding | None:
    """Feed the round of an input, up to it, and say what went wrong."""
    target, random, at = start(make, seed, number)
    tally = Tally(target.name, held=[[] for _ in range(target.phases)])
    first = at
    try:
        while at <= number:
            _one(target, random, seed, at, tally)
            at += 1
            if (at - first) % target.phase == 0 or at > number:
                _settle(target, seed, at - 1, (at - 1 - first) // target.phase, tally)
    except Finding as finding:
        return finding
    finally:
        target.close()
    return tally.findings[-1] if tally.findings else None
