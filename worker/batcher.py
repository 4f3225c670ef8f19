"""When a batch is closed and what is in it: pure, and the only place that decides it.

Requests wait in groups that may share a batch: same model, same shape of a row. A group is closed when it is full,
when its oldest request has waited as long as the model allows, or at once when an instance is idle and no delay is
configured; every batch says which it was. What cannot end in time any more is taken out before, so others have its
place.

Among models whose groups may run it is the turn of the one that has had the least time on this worker, by its weight:
start-time fair queueing. A batch begins at the virtual time at which its model's last one ended, or at that of the
batch that began last anywhere if this is later; it ends there by its expected time over the model's weight later, which
is put right once it has run. The least beginning is next. So a model that was idle comes soon, and has no credit for
the time before; one whose batches take long has fewer of them. Within a model the group that waits longest is next.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, TypeAlias

from penstock.wire.fifo import Fifo
from penstock.worker import tuning
from penstock.worker.costs import Curve, batch_sizes
from penstock.worker.lots import WAITING, Lot

ModelKey: TypeAlias = tuple[str, str]

_DOUBT: Final = 0.9  # of the time that its batch is expected to take a request must have left, or it is given up


@dataclass(frozen=True, slots=True)
class Rules:
    """What a model's configuration says of its batches. ``window``: rows that the broker sends before any is
    finished. ``weight``: its share of the worker beside other models. ``target_s``: for which the size of batches and
    the delay are picked, within ``rows_max``; 0: none. ``sizes``: to which batches are padded, ascending to
    ``rows_max``; none: to none. ``enough``: rows with which a group waits no longer; 0: a full batch."""

    rows_max: int
    delay_s: float
    instances: int
    window: int
    batchable: bool
    weight: float = 1.0
    target_s: float = 0.0
    sizes: tuple[int, ...] = ()
    enough: int = 0


@dataclass(slots=True, eq=False)
class Batch:
    """Lots that run together. ``serial`` numbers a worker's batches; ``reason`` is one of BATCH_REASONS;
    ``expected_s``: what it is expected to take. ``runs``: how often it, or a part of it, has been begun: by the thread
    that runs it. ``line``: of its model."""

    serial: int
    model: ModelKey
    lots: list[Lot]
    rows: int
    reason: str
    expected_s: float = 0.0
    runs: int = 0
    line: Line | None = None


class Line:
    """A model's place among others; one that takes the place of another has a line of its own. ``limit``: rows of a
    batch. ``end``: the virtual time at which its last batch ends."""

    __slots__ = ("came", "curve", "end", "held", "key", "limit", "rules", "running")

    def __init__(self, key: ModelKey, rules: Rules, curve: Curve) -> None:
        self.key = key
        self.rules = rules
        self.curve = curve
        self.held = 0  # rows that wait or run
        self.running = 0  # batches
        self.end = 0.0
        self.limit = rules.rows_max
        self.came = tuning.Fading()  # rows; counted where there is a target
        self.tune()

    def tune(self) -> None:
        """Pick the size of batches anew."""
        target_s = self.rules.target_s
        if target_s:
            self.limit = self.curve.rows_within(tuning.batch_time(target_s))

    def take(self, waiting: int) -> int:
        """How many of so many rows run now. Where batches are padded: all of them, or only as many as fill a smaller
        size, whichever does more rows in the time."""
        if waiting >= self.limit:
            return self.limit
        sizes = self.rules.sizes
        if not sizes:
            return waiting
        at = bisect_right(sizes, waiting)
        if at == 0 or sizes[at - 1] == waiting:
            return waiting
        whole, padded = sizes[at - 1], sizes[at]
        # As long as nothing is known of either, time is taken to grow with the size.
        whole_s, padded_s = self.curve.seconds(whole) or whole, self.curve.seconds(padded) or padded
        return waiting if waiting * whole_s >= whole * padded_s else whole


class Group:
    """Requests that may share a batch: first those that overtake others, in the order in which they came, then the
    others likewise. Nobody overtakes what is its own. ``earliest_deadline``: nothing here has an earlier one.
    ``delay_s``: how long the oldest may wait."""

    __slots__ = ("_behind", "_first", "delay_s", "earliest_deadline", "key", "line", "rows")

    def __init__(self, key: tuple[Line, bytes], line: Line) -> None:
        self.key = key
        self.line = line
        self._first: Fifo[Lot] = Fifo()
        self._behind: Fifo[Lot] = Fifo()
        self.rows = 0
        self.earliest_deadline = float("inf")
        self.delay_s = line.rules.delay_s

    def __len__(self) -> int:
        return len(self._first) + len(self._behind)

    def __iter__(self) -> Iterator[Lot]:
        yield from self._first
        yield from self._behind

    @property
    def oldest(self) -> float:
        """When it came."""
        if not self._first:
            return self._behind.first().arrived
        came = self._first.first().arrived
        return min(came, self._behind.first().arrived) if self._behind else came

    def push(self, lot: Lot) -> None:
        if not lot.overtakes:
            self._behind.push(lot)
            return
        if self._behind:
            self._bring_along(lot)
        self._first.push(lot)

    def _bring_along(self, lot: Lot) -> None:
        """Have what its tenant was given here before go before it."""
        own = [each for each in self._behind if each.share == lot.share]
        for each in own:
            self._behind.remove(each)
            each.overtakes = True
            self._first.push(each)

    def remove(self, lot: Lot) -> None:
        (self._first if lot.overtakes else self._behind).remove(lot)

    def next(self) -> Lot:
        """Whose turn it is."""
        return (self._first or self._behind).first()

    def pop(self) -> None:
        (self._first or self._behind).pop()


class Batcher:
    """Not started requests of one worker. Times are seconds of the caller's monotonic clock.

    ``late``: requests that ``next`` has taken out since they cannot end in time; whoever calls it ends them.
    """

    def __init__(self) -> None:
        self.late: list[Lot] = []
        self._lines: dict[ModelKey, Line] = {}
        self._left: list[Line] = []  # of what has been replaced, or dropped, and waits or runs still
        self._groups: dict[tuple[Line, bytes], Group] = {}
        self._alone: Fifo[Lot] = Fifo()  # run by themselves, before all others
        self._busy = tuning.Fading()  # batches that run at once; counted where there is a target
        self._tuned = False  # whether any model has one
        self._begun = 0.0  # the virtual time at which the last batch began
        self._serial = 0

    def set_rules(self, model: ModelKey, rules: Rules, curve: Curve | None = None) -> Line:
        """``curve``: what its batches take; whoever learns that tells it. Rules that change keep it: with another it is
        another model, with which nothing that waits is mixed."""
        line = self._lines.get(model)
        if line is not None and curve is None:
            line.rules, line.limit = rules, rules.rows_max
            line.tune()
        else:
            before, line = line, Line(model, rules, curve or Curve(rules.sizes or batch_sizes(rules.rows_max)))
            if before is not None:
                line.end = before.end
                self._leave(before)
            self._lines[model] = line
        self._tuned = any(each.rules.target_s for each in self._lines.values())
        return line

    def drop(self, model: ModelKey) -> None:
        """Nothing of it comes any more."""
        self._leave(self._lines.pop(model))

    def _leave(self, line: Line) -> None:
        self._left = [each for each in self._left if each.held]
        if line.held:
            self._left.append(line)

    def limit(self, model: ModelKey) -> int:
        """How many rows its batches have at most now."""
        return self._lines[model].limit

    def add(self, lot: Lot) -> None:
        line = lot.line = self._lines[lot.plan.key]
        rows = lot.rows
        line.held += rows
        if line.rules.target_s:
            line.came.add(rows, lot.arrived)
        if lot.alone:
            self._alone.push(lot)
            return
        key = (line, lot.plan.form.key)
        group = self._groups.get(key)
        if group is None:
            group = self._groups[key] = Group(key, line)
            if line.rules.target_s:
                group.delay_s = self._delay(line, rows, lot.arrived)
        group.push(lot)
        group.rows += rows
        if lot.first_deadline < group.earliest_deadline:
            group.earliest_deadline = lot.first_deadline

    def remove(self, lot: Lot, whole: bool) -> None:
        """Take out requests that wait: a whole lot, or what has been split from one that stays."""
        line = lot.line
        assert line is not None, f"{lot!r} does not wait"
        line.held -= lot.rows
        if lot.alone:
            if whole:
                self._alone.remove(lot)
            return
        group = self._groups[line, lot.plan.form.key]
        group.rows -= lot.rows
        if whole:
            group.remove(lot)
            if not group:
                del self._groups[group.key]

    def next(self, now: float) -> Batch | None:
        """The batch that an idle instance should run now, if any. See ``late``, too."""
        if self._alone:
            batch = self._next_alone(now)
            if batch is not None:
                return batch
        while True:
            chosen: Group | None = None
            chosen_reason, least, oldest = "", float("inf"), float("inf")
            for group in self._groups.values():
                line = group.line
                if line.running >= line.rules.instances:
                    continue
                begin = line.end if line.end > self._begun else self._begun
                arrived = group.oldest
                if begin < least or (begin == least and arrived < oldest):
                    reason = self._reason(group, now)
                    if reason:
                        chosen, chosen_reason, least, oldest = group, reason, begin, arrived
            if chosen is None:
                return None
            batch = self._close(chosen, chosen_reason, now)
            if batch is not None:
                return batch

    def ended(self, batch: Batch, seconds: float, now: float) -> None:
        """A batch has run, for so long."""
        line = batch.line
        assert line is not None, f"{batch} is of no model"
        line.held -= batch.rows
        line.running -= 1
        line.end += (seconds - batch.expected_s) / line.rules.weight
        if self._tuned:
            self._busy.add_span(seconds, now)
            line.tune()

    def due(self) -> float:
        """When waiting alone makes a batch ready, if nothing else does before."""
        dues = [self._due(each) for each in self._groups.values() if each.line.running < each.line.rules.instances]
        return min(dues, default=float("inf"))

    @property
    def running(self) -> int:
        """Batches that have not ended."""
        return sum(line.running for line in (*self._lines.values(), *self._left))

    def waiting(self) -> Iterator[Lot]:
        for group in self._groups.values():
            yield from group
        yield from self._alone

    def validate(self) -> None:
        """For tests: derive every index and counter anew. Raises AssertionError saying what is wrong."""
        rows: Counter[Line] = Counter()
        lines = {*self._lines.values(), *self._left}
        for key, group in self._groups.items():
            lots = list(group)
            assert lots, f"the group {key} is empty"
            assert key == group.key, f"the group {group.key} is found as {key}"
            assert group.line is key[0], f"the group {key} is in another model's line"
            assert group.line in lines, f"the group {key} is in a line of nobody's"
            total = sum(lot.rows for lot in lots)
            assert group.rows == total, f"{key} has {total} rows, and {group.rows} are counted"
            for lot in lots:
                assert (lot.line, lot.plan.form.key) == key, f"{lot!r} is in the group {key}"
                assert lot.plan.model is lots[0].plan.model, f"{lot!r} is of another model than {lots[0]!r}"
                assert not lot.alone, f"{lot!r} is in a group"
                assert group.earliest_deadline <= lot.first_deadline, f"{lot!r} is due before its group"
        assert all(lot.alone for lot in self._alone), f"{list(self._alone)} run alone without a reason"
        for lot in self.waiting():
            assert lot.ids, "a lot without requests waits"
            assert lot.state == WAITING, f"{lot!r} is among those that wait"
            assert lot.line is not None, f"{lot!r} waits in no line"
            rows[lot.line] += lot.rows
        for line in lines:
            model, running, rules = line.key, line.running, line.rules
            assert 0 <= running <= rules.instances, f"{running} batches of {model} run"
            assert 1 <= line.limit <= rules.rows_max, f"batches of {model} have {line.limit} rows"
            low, high = rows[line] + running, rows[line] + running * rules.rows_max
            assert low <= line.held <= high, f"{low} to {high} rows of {model} are held, and {line.held} are counted"
            line.curve.validate()

    def _delay(self, line: Line, rows: int, now: float) -> float:
        """How long a group of so many rows whose first request has just come, or is the first that is left, waits."""
        limit, rules = line.limit, line.rules
        busy = self._busy.rate(now) / rules.instances  # when so many always run, it waits for others at every batch
        full_s = line.curve.seconds(limit)
        return tuning.delay(rules.target_s, full_s, max(0, limit - rows), line.came.rate(now), busy)

    def _due(self, group: Group) -> float:
        return min(group.oldest + group.delay_s, self._urgent(group))

    def _urgent(self, group: Group) -> float:
        """When waiting on would leave the most urgent request less time, beside what its batch takes, than it has
        waited."""
        return group.earliest_deadline - group.delay_s - group.line.curve.seconds(group.line.take(group.rows))

    def _reason(self, group: Group, now: float) -> str:
        """Why a group should be closed now, or ""."""
        line = group.line
        rules = line.rules
        if not rules.batchable:
            return "alone"
        if group.rows >= line.limit or 0 < rules.enough <= group.rows:
            return "full"
        if group.delay_s == 0:
            return "idle"
        if group.oldest + group.delay_s <= now:
            return "delay"
        if self._urgent(group) <= now:
            return "deadline"
        if line.held * rules.rows_max >= rules.window * line.limit:
            return "shape"  # the rest of the window holds rows of other shapes: none can come to fill this one
        return ""

    def _next_alone(self, now: float) -> Batch | None:
        while (lot := next((each for each in self._alone if _may_run(each)), None)) is not None:
            line = lot.line
            assert line is not None, f"{lot!r} waits in no line"
            ids = lot.late(now + _DOUBT * line.curve.reliable(lot.plan.rows, now))
            if ids and self._take_late(lot, ids):
                continue
            if len(lot.ids) > 1:
                lot = lot.split(lot.ids[:1])
            else:
                self._alone.remove(lot)
            return self._batch(line, [lot], lot.rows, "alone")
        return None

    def _close(self, group: Group, reason: str, now: float) -> Batch | None:
        """None: nothing in it could end in time."""
        line = group.line
        room = line.take(group.rows)
        if group.earliest_deadline <= now + _DOUBT * line.curve.reliable(room, now):
            fits = self._drop_late(group, room, now)
            if not group:
                return None
            if fits < min(room, group.rows):
                reason = "deadline"
            room = fits
        taken: list[Lot] = []
        while group:
            lot = group.next()
            fits = room // lot.plan.rows
            if fits <= 0:
                if taken:
                    break
                fits = 1  # it has more rows than batches should have
            if fits < len(lot.ids):
                lot = lot.split(lot.ids[:fits])
            else:
                group.pop()
            taken.append(lot)
            room -= lot.rows
        rows = sum([lot.rows for lot in taken])
        group.rows -= rows
        if not group:
            del self._groups[group.key]
        else:
            if line.rules.target_s:
                group.delay_s = self._delay(line, group.rows, now)
            if group.delay_s:
                group.earliest_deadline = min([lot.first_deadline for lot in group])
        return self._batch(line, taken, rows, reason)

    def _drop_late(self, group: Group, room: int, now: float) -> int:
        """Take out of a group what cannot end in time in a batch of ``room`` rows, so that others have its place; if
        that left less than half a batch, then in one of half as many, and so on: to run few is better than to drop
        all. Returns how many rows the batch may have. This is looked for only when something may be late."""
        curve, lots = group.line.curve, list(group)
        least = min([lot.plan.rows for lot in lots])
        while True:
            late = []
            for lot in lots:
                ids = lot.late(now + _DOUBT * curve.reliable(max(room, lot.plan.rows), now))
                if ids:
                    late.append((lot, ids))
            left = group.rows - sum([lot.plan.rows * len(ids) for lot, ids in late])
            if not late or 2 * left >= room or room <= least:
                break
            room //= 2
        for lot, ids in late:
            self._take_late(lot, ids)
        if group:
            group.earliest_deadline = min([lot.first_deadline for lot in group])
        return room

    def _take_late(self, lot: Lot, ids: list[int]) -> bool:
        """Take out some requests of a lot. Whether these are all."""
        whole = len(ids) == len(lot.ids)
        late = lot if whole else lot.split(ids)
        self.remove(late, whole)
        self.late.append(late)
        return whole

    def _batch(self, line: Line, lots: list[Lot], rows: int, reason: str) -> Batch:
        expected_s = line.curve.seconds(rows)
        if line.end > self._begun:
            self._begun = line.end
        line.end = self._begun + expected_s / line.rules.weight
        line.running += 1
        self._serial += 1
        return Batch(self._serial, line.key, lots, rows, reason, expected_s, line=line)


def _may_run(lot: Lot) -> bool:
    line = lot.line
    return line is not None and line.running < line.rules.instances
