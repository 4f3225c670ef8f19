"""Which settings of a model are tried, in which order, and which is best. Pure: what a setting reaches is told from
outside."""

from __future__ import annotations

import math
from collections.abc import Generator, Iterable, Mapping, Sequence
from typing import Final, NamedTuple

BETTER: Final = 1.03  # by how much a setting has to be better: measuring one twice differs by as much
_GAIN: Final = 1.05  # more connections have to bring so much more, or no more are tried
_CONNECTIONS_MAX: Final = 1024
_STEP: Final = 4


class Setting(NamedTuple):
    """Rows, microseconds, and numbers: the keys of model.toml that are tried."""

    max_batch_size: int
    max_queue_delay_us: int
    instances: int
    intra_op_threads: int


class Point(NamedTuple):
    """What a setting reached with so many connections. ``failed``: some requests had no answer. ``busy``: the generator
    may have been what limits."""

    connections: int
    requests_per_s: float
    p99_s: float
    failed: bool = False
    busy: bool = False

    def within(self, limit_s: float) -> bool:
        return not self.failed and self.requests_per_s > 0 and self.p99_s <= limit_s


class Score(NamedTuple):
    """Of a setting: requests a second within the limit, or with none the shortest p99; a setting that does not run has
    an endless one."""

    requests_per_s: float
    p99_s: float

    def beats(self, other: Score) -> bool:
        if self.requests_per_s or other.requests_per_s:
            return self.requests_per_s > other.requests_per_s * BETTER
        return self.p99_s * BETTER < other.p99_s


def score(points: Iterable[Point], limit_s: float) -> Score:
    points = list(points)
    best = best_point(points, limit_s)
    if best is not None:
        return Score(best.requests_per_s, best.p99_s)
    return Score(0.0, min([point.p99_s for point in points if not point.failed], default=math.inf))


def best_point(points: Iterable[Point], limit_s: float) -> Point | None:
    return max(
        [point for point in points if point.within(limit_s)], key=lambda point: point.requests_per_s, default=None
    )


def next_connections(points: Sequence[Point], limit_s: float, first: int) -> int | None:
    """With how many connections to go on with a setting; None when more would tell nothing new: four times as many
    while that brings something and keeps the limit, then between the last that kept it and the first that did not."""
    if not points:
        return first
    kept = sorted((point for point in points if point.within(limit_s)), key=lambda point: point.connections)
    broken = sorted(point.connections for point in points if not point.within(limit_s))
    if not kept:
        return max(1, broken[0] // _STEP) if broken[0] > 1 else None
    most = kept[-1].connections
    above = [each for each in broken if each > most]
    if above:
        middle = round(math.sqrt(most * above[0]))
        return middle if above[0] > 2 * most and middle not in (most, above[0]) else None
    if len(kept) > 1 and kept[-1].requests_per_s < kept[-2].requests_per_s * _GAIN:
        return None
    return most * _STEP if most * _STEP <= _CONNECTIONS_MAX else None


def ladders(start: Setting, batchable: bool, cores: int, limit_s: float) -> dict[str, list[int]]:
    """The values of each key, in order, the present one among them. A delay of more than a quarter of the limit is not
    worth a try: it is waited twice where batches run one after another."""
    doubled = [1 << power for power in range(13)]
    found = {
        "max_batch_size": {each for each in doubled if each <= 4096} | {start.max_batch_size},
        "instances": {each for each in doubled if each <= min(cores, 64)} | {start.instances},
        "intra_op_threads": {each for each in doubled if each <= cores} | {start.intra_op_threads},
        "max_queue_delay_us": {each for each in (0, 500, 1000, 2000, 5000, 10_000, 20_000) if each <= limit_s * 1e6 / 4}
        | {start.max_queue_delay_us},
    }
    if not batchable:
        del found["max_batch_size"], found["max_queue_delay_us"]
    return {key: sorted(values) for key, values in found.items()}


def search(start: Setting, values: Mapping[str, Sequence[int]], cores: int) -> Generator[Setting, Score, Setting]:
    """Yields settings to try, is sent the score of each, and returns the best. From the present one it goes up and down
    in one key after another, as long as that makes it better, until no key does; and gives threads for instances and
    back, whose number together the cores bound. None is tried twice."""
    known: dict[Setting, Score] = {}

    def moves(best: Setting) -> Iterable[Setting]:
        for key in values:
            for step in (1, -1):
                if (moved := _moved(best, values, {key: step})) is not None:
                    yield moved
        for one, other in (("instances", "intra_op_threads"), ("intra_op_threads", "instances")):
            if (moved := _moved(best, values, {one: 1, other: -1})) is not None:
                yield moved

    best = start
    known[best] = yield best
    while True:
        origin = best
        for step in moves(origin):
            before, at = origin, step
            while at not in known and _allowed(at, start, cores):
                known[at] = yield at
                if not known[at].beats(known[best]):
                    break
                best, before, further = at, at, _continued(before, at, values)
                if further is None:
                    break
                at = further
            if best != origin:
                break  # from there on, with all keys
        else:
            return best


def _allowed(setting: Setting, start: Setting, cores: int) -> bool:
    """Threads that take turns on cores make all slower; as many as there are at present are allowed in any case."""
    threads = setting.instances * setting.intra_op_threads
    return threads <= max(cores, start.instances * start.intra_op_threads)


def _moved(setting: Setting, values: Mapping[str, Sequence[int]], steps: Mapping[str, int]) -> Setting | None:
    """So many places up or down in each of these keys; None where there is no such value."""
    changed = {}
    for key, step in steps.items():
        at = values[key].index(getattr(setting, key)) + step
        if not 0 <= at < len(values[key]):
            return None
        changed[key] = values[key][at]
    return setting._replace(**changed)


def _continued(before: Setting, after: Setting, values: Mapping[str, Sequence[int]]) -> Setting | None:
    """The same step once more."""
    steps = {
        key: values[key].index(getattr(after, key)) - values[key].index(getattr(before, key))
        for key in values
        if getattr(after, key) != getattr(before, key)
    }
    return _moved(after, values, steps)


def frontier(tried: Mapping[Setting, Sequence[Point]]) -> list[tuple[Setting, Point]]:
    """What no other beats in both, requests a second and p99; by throughput, the least first."""
    every = [(setting, point) for setting, points in tried.items() for point in points if not point.failed]
    every.sort(key=lambda each: (-each[1].requests_per_s, each[1].p99_s))
    found: list[tuple[Setting, Point]] = []
    for setting, point in every:
        if not found or point.p99_s < found[-1][1].p99_s:
            found.append((setting, point))
    return found[::-1]
