"""Cores: as users write them, as the kernel groups them, and which of them each worker gets."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Final

_PART: Final = re.compile(r"(\d{1,5})(?:-(\d{1,5}))?", re.ASCII)
_SYSTEM: Final = Path("/sys/devices/system/cpu")


def parse_cpus(text: str) -> frozenset[int]:
    """ "0-3,6" -> {0, 1, 2, 3, 6}, the kernel's own way to write them (cpuset(7)). Raises ValueError."""
    found: set[int] = set()
    for part in text.split(","):
        match = _PART.fullmatch(part.strip())
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if first > last:
            raise ValueError(f"{text!r} is no list of cores; write numbers and ranges, such as 0-3,6")
        found.update(range(first, last + 1))
    return frozenset(found)


def format_cpus(cpus: Iterable[int]) -> str:
    """{0, 1, 2, 3, 6} -> "0-3,6"."""
    runs: list[list[int]] = []
    for cpu in sorted(cpus):
        if runs and runs[-1][-1] == cpu - 1:
            runs[-1].append(cpu)
        else:
            runs.append([cpu])
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def share_cpus(cores: Sequence[Collection[int]], count: int) -> list[frozenset[int]]:
    """``cores``: logical processors that are one physical core each -> disjoint shares of all of them, whose sizes
    differ by at most one. A physical core is divided only where the sizes leave no other way. Raises ValueError when
    there are fewer logical processors than shares."""
    cpus = [cpu for core in sorted(map(sorted, cores)) for cpu in core]
    if len(cpus) < count:
        raise ValueError(f"there are {len(cpus)} cores for {count} workers")
    size, larger = divmod(len(cpus), count)
    # Neighbours, who often share a cache. Shares of odd size lie side by side, so that two of them divide one core.
    ends = [number * size + min(number, larger) for number in range(count + 1)]
    return [frozenset(cpus[begin:end]) for begin, end in pairwise(ends)]


def physical_cores(cpus: Collection[int], system: Path = _SYSTEM) -> list[frozenset[int]]:
    """Which of these logical processors are one physical core (SMT siblings), as far as the kernel tells."""
    cores: set[frozenset[int]] = set()
    left = set(cpus)
    for cpu in sorted(cpus):
        if cpu in left:
            try:
                siblings = parse_cpus((system / f"cpu{cpu}" / "topology" / "thread_siblings_list").read_text())
            except (OSError, ValueError):
                siblings = frozenset()
            core = (siblings | {cpu}) & left
            left -= core
            cores.add(core)
    return sorted(cores, key=min)


def usable_cpus() -> frozenset[int]:
    """The logical processors that this process may run on."""
    return frozenset(os.sched_getaffinity(0))


def pin(cpus: Collection[int]) -> None:
    """Have every thread of this process, and all that they start, run on these only. Raises OSError."""
    os.sched_setaffinity(0, cpus)
    # numpy's mathematical library starts threads as soon as it is imported, and these start no others.
    for thread in os.listdir("/proc/self/task"):
        os.sched_setaffinity(int(thread), cpus)
