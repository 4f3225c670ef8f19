"""When a batch is closed and what is in it: pure, and the only place that decides it.

Requests wait in groups that may share a batch: same model, same shape of a row. A group is closed when it is full,
when its oldest request has waited as long as the model allows, or at once when an instance is idle and no delay is
configured; every batch says which it was.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeAlias

from penstock.wire.fifo import Fifo
from penstock.worker.lots import WAITING, Lot

ModelKey: TypeAlias = tuple[str, str]


@dataclass(frozen=True, slots=True)
class Rules:
    """What a model's configuration says of its batches. ``window``: rows that the broker sends before any is
    finished."""

    rows_max: int
    delay_s: float
    instances: int
    window: int
    batchable: bool


@dataclass(slots=True, eq=False)
class Batch:
    """Lots that run together. ``serial`` numbers a worker's batches; ``reason`` is one of BATCH_REASONS."""

    serial: int
    model: ModelKey
    lots: list[Lot]
    rows: int
    reason: str


class Group:
    """Requests that may share a batch, oldest first."""

    __slots__ = ("earliest_deadline", "key", "lots", "rows")

    def __init__(self, key: tuple[ModelKey, bytes]) -> None:
        self.key = key
        self.lots: Fifo[Lot] = Fifo()
        self.rows = 0
        self.earliest_deadline = float("inf")


class Batcher:
    """Not started requests of one worker. Times are seconds of the caller's monotonic clock."""

    def __init__(self) -> None:
        self._rules: dict[ModelKey, Rules] = {}
        self._groups: dict[tuple[ModelKey, bytes], Group] = {}
        self._alone: Fifo[Lot] = Fifo()  # were on a worker that was lost
        self._held: dict[ModelKey, int] = {}  # rows that wait or run
        self._running: dict[ModelKey, int] = {}  # batches
        self._serial = 0

    def set_rules(self, model: ModelKey, rules: Rules) -> None:
        self._rules[model] = rules

    def add(self, lot: Lot) -> None:
        model = lot.plan.key
        self._held[model] = self._held.get(model, 0) + lot.rows
        if lot.attempt > 1:
            self._alone.push(lot)
            return
        key = (model, lot.plan.form.key)
        group = self._groups.get(key)
        if group is None:
            group = self._groups[key] = Group(key)
        group.lots.push(lot)
        group.rows += lot.rows
        if self._rules[model].delay_s:
            group.earliest_deadline = min(group.earliest_deadline, lot.first_deadline)

    def remove(self, lot: Lot, whole: bool) -> None:
        """Take out requests that wait: a whole lot, or what has been split from one that stays."""
        model = lot.plan.key
        self._held[model] -= lot.rows
        if lot.attempt > 1:
            if whole:
                self._alone.remove(lot)
            return
        group = self._groups[model, lot.plan.form.key]
        group.rows -= lot.rows
        if whole:
            group.lots.remove(lot)
            if not group.lots:
                del self._groups[group.key]

    def next(self, now: float) -> Batch | None:
        """The batch that an idle instance should run now, if any: of those that may start, the longest waiting one."""
        if self._alone:
            for lot in self._alone:
                if self._may_run(lot.plan.key):
                    return self._take_alone(lot)
        chosen: Group | None = None
        chosen_reason, oldest = "", float("inf")
        for group in self._groups.values():
            arrived = group.lots.first().arrived
            if arrived < oldest and self._may_run(group.key[0]):
                reason = self._reason(group, now)
                if reason:
                    chosen, chosen_reason, oldest = group, reason, arrived
        return self._close(chosen, chosen_reason) if chosen else None

    def ended(self, batch: Batch) -> None:
        """A batch has run."""
        self._held[batch.model] -= batch.rows
        self._running[batch.model] -= 1

    def shrink(self, batch: Batch, lots: list[Lot]) -> None:
        """Only ``lots`` of a batch are run after all."""
        rows = sum([lot.rows for lot in lots])
        self._held[batch.model] -= batch.rows - rows
        batch.lots, batch.rows = lots, rows

    def due(self) -> float:
        """When waiting alone makes a batch ready, if nothing else does before."""
        dues = (self._due(group) for group in self._groups.values() if self._may_run(group.key[0]))
        return min(dues, default=float("inf"))

    @property
    def running(self) -> int:
        """Batches that have not ended."""
        return sum(self._running.values())

    def waiting(self) -> Iterator[Lot]:
        for group in self._groups.values():
            yield from group.lots
        yield from self._alone

    def validate(self) -> None:
        """For tests: derive every index and counter anew. Raises AssertionError saying what is wrong."""
        rows: Counter[ModelKey] = Counter()
        for key, group in self._groups.items():
            lots = list(group.lots)
            assert lots, f"the group {key} is empty"
            assert key == group.key, f"the group {group.key} is found as {key}"
            total = sum(lot.rows for lot in lots)
            assert group.rows == total, f"{key} has {total} rows, and {group.rows} are counted"
            for lot in lots:
                assert (lot.plan.key, lot.plan.form.key) == key, f"{lot!r} is in the group {key}"
                assert lot.attempt == 1, f"{lot!r} is in a group"
                if self._rules[key[0]].delay_s:
                    assert group.earliest_deadline <= lot.first_deadline, f"{lot!r} is due before its group"
        assert all(lot.attempt > 1 for lot in self._alone), f"{list(self._alone)} run alone without a reason"
        for lot in self.waiting():
            assert lot.ids, "a lot without requests waits"
            assert lot.state == WAITING, f"{lot!r} is among those that wait"
            rows[lot.plan.key] += lot.rows
        for model, held in self._held.items():
            running, rules = self._running.get(model, 0), self._rules[model]
            assert 0 <= running <= rules.instances, f"{running} batches of {model} run"
            low, high = rows[model] + running, rows[model] + running * rules.rows_max
            assert low <= held <= high, f"{low} to {high} rows of {model} are held, and {held} are counted"

    def _may_run(self, model: ModelKey) -> bool:
        return self._running.get(model, 0) < self._rules[model].instances

    def _due(self, group: Group) -> float:
        delay = self._rules[group.key[0]].delay_s
        return min(group.lots.first().arrived + delay, group.earliest_deadline - delay)

    def _reason(self, group: Group, now: float) -> str:
        """Why a group should be closed now, or ""."""
        model = group.key[0]
        rules = self._rules[model]
        if not rules.batchable:
            return "alone"
        if group.rows >= rules.rows_max:
            return "full"
        if rules.delay_s == 0:
            return "idle"
        if group.lots.first().arrived + rules.delay_s <= now:
            return "delay"
        if group.earliest_deadline - rules.delay_s <= now:
            return "deadline"  # waiting on would leave it less time than it has waited
        if self._held[model] >= rules.window:
            return "shape"  # the rest of the window holds rows of other shapes: none can come to fill this one
        return ""

    def _take_alone(self, lot: Lot) -> Batch:
        if len(lot.ids) > 1:
            lot = lot.split(lot.ids[:1])
        else:
            self._alone.remove(lot)
        return self._batch(lot.plan.key, [lot], lot.rows, "alone")

    def _close(self, group: Group, reason: str) -> Batch:
        room = self._rules[group.key[0]].rows_max
        taken: list[Lot] = []
        waiting = group.lots
        while waiting:
            lot = waiting.first()
            fits = room // lot.plan.rows
            if not fits:
                break
            if fits < len(lot.ids):
                lot = lot.split(lot.ids[:fits])
            else:
                waiting.pop()
            taken.append(lot)
            room -= lot.rows
        rows = sum([lot.rows for lot in taken])
        group.rows -= rows
        if not waiting:
            del self._groups[group.key]
        elif group.earliest_deadline < float("inf"):
            group.earliest_deadline = min(lot.first_deadline for lot in waiting)
        return self._batch(group.key[0], taken, rows, reason)

    def _batch(self, model: ModelKey, lots: list[Lot], rows: int, reason: str) -> Batch:
        self._serial += 1
        self._running[model] = self._running.get(model, 0) + 1
        return Batch(self._serial, model, lots, rows, reason)
