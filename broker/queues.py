"""What waits for a model, and what is known of what it takes."""

from __future__ import annotations

from collections.abc import Collection, Container, Mapping
from typing import TYPE_CHECKING, Final, TypeAlias

from penstock.broker.costs import batch_us
from penstock.broker.lots import QUEUED, Lot
from penstock.broker.shares import LEAST_SHARE, Level, Taking
from penstock.wire.messages import DEFAULT_SEQUENCE_IDLE_US, Cost
from penstock.wire.models import ModelSpec

if TYPE_CHECKING:
    from penstock.broker.peers import WorkerPeer
    from penstock.broker.pools import Pool

ModelKey: TypeAlias = tuple[str, str]
_SLOW: Final = 1.5  # times what the fastest worker takes
# What was measured longer ago, or longer than so many times what a batch takes, is not relied on.
_STALE_S: Final = 1.0
_STALE_BATCHES: Final = 10
_SPEED_SCALE: Final = 1 << 80
_NO_WEIGHTS: Final[Mapping[str, float]] = {}


class ModelQueue:
    """A model version that callers may ask for: what waits for it, and who serves it.

    ``spec`` is the newest that a worker told; it outlives the worker, so that requests can wait while one restarts.
    ``row_us``: what a row is expected to take, in a full
    batch, as the mean of its workers; 0 as long as none has said. ``weight``: its share of a worker beside
    other models. ``weights``: of tenants, 1 of those that are not named. ``suspects`` wait by themselves (see
    suspects.py), and are not counted among the others; likewise those ``beside``, which wait for their turn in a
    sequence.
    """

    def __init__(self, key: ModelKey, spec: ModelSpec | None, weights: Mapping[str, float] = _NO_WEIGHTS) -> None:
        self.key = key
        self.spec = spec
        self.workers: dict[WorkerPeer, None] = {}  # those that have it READY
        self.pools: list[Pool] = []  # of these
        self.sleepers: dict[WorkerPeer, None] = {}  # those that load it when it is asked for
        self.held = 0  # requests that the broker has not forgotten
        self.retired = False  # it is not found any more
        self.unserved_since = 0.0  # when the last of them left
        self.wait_until = 0.0  # requests wait so long for one to load it; 0: none has been asked to
        self.suspects: dict[Lot, None] = {}
        self.beside: dict[Lot, None] = {}
        self.sequence_idle_s = DEFAULT_SEQUENCE_IDLE_US * 1e-6  # after which nothing of a sequence is expected any more
        self.unseen = spec is None  # requests have been taken in, if any, without a look at what it takes
        self.requests = 0
        self.rows = 0
        self.nbytes = 0
        self.us = 0
        self.weight = 1.0
        self.weighs = 0.0  # the weight with which it waits now
        self.row_us = 0
        self._weights = weights
        self._levels: list[Level] = []  # in which something has waited, the most urgent first
        self._overtaking = 0  # rows that were given out before their turn, and are not done
        self.instances = 1  # of its batches that a worker runs at once
        self.batch_rows = 1  # of a full batch
        self._cost: Cost | None = None  # of the fastest of its workers
        self.best_row_us = 0.0  # on the fastest of its workers
        self.measured = float("-inf")  # when one of its batches was last known to have run
        self._told_us: dict[WorkerPeer, float] = {}  # what a row takes there
        self._speed = 0  # of all of them together, see _speed_of

    def push(self, lot: Lot, front: bool = False) -> None:
        """Put requests behind the others of their caller and tenant, or before them: these have waited once already.
        Suspects are put behind each other."""
        if lot.suspect:
            lot.in_line = True
            self.suspects[lot] = None
            return
        if lot.step is not None and lot.step.beside:
            lot.in_line = True
            self.beside[lot] = None
            return
        self.level(lot.priority).push(lot, self._weights.get(lot.form.tenant, 1.0), front)
        self._count(lot, 1)

    def remove(self, lot: Lot) -> None:
        """Take out requests: a lot that waits in its line, or what has left its line and is counted still."""
        if lot.suspect:
            if lot.in_line:
                lot.in_line = False
                del self.suspects[lot]
            return
        if lot in self.beside:
            lot.in_line = False
            del self.beside[lot]
            return
        self.level(lot.priority).remove(lot)
        self._count(lot, -1)

    def take(self, taking: Taking, enough: int) -> bool:
        """Requests of no more rows than make ``enough``; whether there were any.

        The more urgent first, but for what these owe the others. A request that does not fit ends the taking: whoever
        overtakes it could keep it waiting for ever.
        """
        levels = self._levels
        if taking.overtakes:
            self._take_over(taking, enough)
        elif len(levels) == 1:
            levels[0].take(taking, enough)
        else:
            self._take_mixed(taking, enough)
        if taking.lots:
            self.rows -= taking.rows
            self.us -= taking.us
            for lot in taking.lots:
                self.requests -= len(lot.ids)
                self.nbytes -= len(lot.ids) * lot.form.nbytes
            for pool in self.pools:
                pool.waiting_us -= taking.us
            if not self.requests:
                self._weigh(0.0)
        return bool(taking.lots)

    def next_suspect(self, worker: WorkerPeer) -> Lot | None:
        """The first that a worker of this model may be given."""
        for lot in self.suspects:
            if lot.caller.id in worker.callers and lot.caller.id not in worker.full:
                return lot
        return None

    def take_suspect(self, worker: WorkerPeer) -> Lot | None:
        """One request for a worker that is set apart. Its tenant is charged for it, as for all others."""
        lot = self.next_suspect(worker)
        if lot is None:
            return None
        if len(lot.ids) > 1:
            lot = lot.split(lot.ids[:1])
        else:
            self.remove(lot)
        level = self.level(lot.priority)
        level.given += lot.rows
        level.charge(lot.share_key, lot.cost_us)
        lot.turn = level.done
        return lot

    def _take_mixed(self, taking: Taking, enough: int) -> None:
        levels = [level for level in self._levels if level.requests]
        for level in reversed(levels[1:]):
            if level.owed >= 1 and not taking.stuck:
                rows = taking.rows
                level.take(taking, min(enough, rows + int(level.owed)))
                if level.requests:
                    level.owed -= taking.rows - rows
        for at, level in enumerate(levels):
            if taking.stuck or taking.rows >= enough:
                return
            rows = taking.rows
            level.take(taking, enough)
            for other in levels[at + 1 :]:
                other.owe((taking.rows - rows) * LEAST_SHARE)

    def _take_over(self, taking: Taking, enough: int) -> None:
        """What may go before what has been given out: of tenants that are behind it; and of the more urgent, as many
        rows as they overtake."""
        less_urgent = sum([level.given for level in self._levels]) - self._overtaking
        for level in self._levels:
            less_urgent -= level.given
            if level.requests and not taking.stuck:
                level.take(taking, enough)
                rows = taking.rows
                if less_urgent > 0 and rows < enough and level.requests:
                    taking.overtakes = False
                    level.take(taking, min(enough, rows + less_urgent))
                    taking.overtakes = True
        for lot in taking.lots:
            lot.overtakes = True
        self._overtaking += taking.rows

    def is_behind(self) -> bool:
        """Whether anything that waits may overtake what has been given out."""
        given = 0
        for level in reversed(self._levels):
            if level.requests and (given > self._overtaking or level.first_is_behind()):
                return True
            given += level.given
        return any(pool.is_behind(self) for pool in self.pools)

    def may_overtake(self, priority: int, share_key: str | bytes) -> bool:
        """Whether a request of this priority and tenant goes before others that have been given out."""
        less_urgent = sum([level.given for level in self._levels if level.priority > priority])
        return less_urgent > self._overtaking or self.level(priority).is_behind(share_key)

    def level(self, priority: int) -> Level:
        for level in self._levels:
            if level.priority == priority:
                return level
        level = Level(priority)
        self._levels.append(level)
        self._levels.sort(key=lambda each: each.priority)
        return level

    def ahead_us(self, priority: int, share_key: str | bytes) -> int:
        """What is expected to be served before a request of this priority and tenant that comes now: what waits and is
        as urgent or more, but not more of other tenants than their shares beside its own line."""
        total = fair = 0.0
        for level in self._levels:
            if level.priority < priority:
                total += level.us
            elif level.priority == priority:
                fair = total
                total += level.us
                share = level.shares.get(share_key)
                own, weight = (share.us, share.weight) if share is not None else (0, self._weight_of(share_key))
                others = level.weight - (weight if share is not None and share.number else 0.0)
                fair += own * (1 + others / weight)
                return int(min(total, fair))
        return int(total)

    def _weight_of(self, share_key: str | bytes) -> float:
        return self._weights.get(share_key, 1.0) if isinstance(share_key, str) else 1.0

    def end(self, lot: Lot, over_us: float) -> None:
        """A worker no longer has what it was given. ``over_us``: what it took beyond what its tenant was charged."""
        level = self.level(lot.priority)
        level.given -= lot.rows
        level.done = max(level.done, lot.turn)
        level.charge(lot.share_key, over_us)
        if lot.overtakes:
            lot.overtakes = False
            self._overtaking -= lot.rows

    def lots(self) -> list[Lot]:
        return [*self.suspects, *self.beside, *(lot for level in self._levels for lot in level.lots())]

    @property
    def waits(self) -> bool:
        return bool(self.requests or self.suspects or self.beside)

    def learn(self, worker: WorkerPeer) -> None:
        """What a row takes on one of its workers, as far as that has said it."""
        cost = worker.costs.get(self.key)
        if cost is not None and worker in self.workers:
            self.sequence_idle_s = cost.sequence_idle_us * 1e-6
        if cost is None or not cost.times_us or worker not in self.workers:
            return
        self.weight, self.instances, self.batch_rows = cost.weight / 1000, cost.instances, cost.batch_rows
        told_us = cost.times_us[-1] / cost.rows[-1]
        before_us = self._told_us.get(worker, 0.0)
        self._told_us[worker] = told_us
        self._count_told(told_us, before_us)
        if told_us <= self.best_row_us or len(self._told_us) == 1:
            self.best_row_us, self._cost = told_us, cost
        elif before_us == self.best_row_us:
            self._find_best()

    def _count_told(self, new_us: float, old_us: float) -> None:
        self._speed += _speed_of(new_us) - _speed_of(old_us)
        if self._told_us:
            # Each does as much as it can, so it is how many rows they do in a time that has a mean.
            self.row_us = max(1, round(len(self._told_us) * _SPEED_SCALE / self._speed))

    def _find_best(self) -> None:
        if self._told_us:
            best = min(self._told_us, key=self._told_us.__getitem__)
            self.best_row_us, self._cost = self._told_us[best], best.costs[self.key]

    def batch_us(self, rows: int) -> int:
        """What a batch takes on the fastest of its workers, 0 if nobody knows."""
        return batch_us(self._cost, rows) if self._cost is not None else 0

    def is_stale(self, now: float) -> bool:
        """Whether what is known was measured long ago. A request is refused on the strength of it, and were it wrong,
        nothing would run any more that could put it right: so now and then one is tried."""
        return now - self.measured > max(_STALE_S, _STALE_BATCHES * self.batch_us(self.batch_rows) * 1e-6)

    def is_slow(self, worker: WorkerPeer) -> bool:
        """Whether others are so much faster that what would be late on this one may be in time there."""
        return self._told_us.get(worker, 0.0) > _SLOW * self.best_row_us

    def enlist(self, worker: WorkerPeer) -> None:
        self.workers[worker] = None
        self.wait_until = 0.0
        self.learn(worker)

    def dismiss(self, worker: WorkerPeer, now: float) -> None:
        del self.workers[worker]
        told_us = self._told_us.pop(worker, 0.0)
        if told_us:
            self._count_told(0.0, told_us)
            if told_us == self.best_row_us:
                self._find_best()
        if not self.workers:
            self.unserved_since = now

    def _count(self, lot: Lot, sign: int) -> None:
        count = sign * len(lot.ids)
        us = count * lot.cost_us
        before = self.requests
        self.requests += count
        self.rows += count * lot.form.rows
        self.nbytes += count * lot.form.nbytes
        self.us += us
        for pool in self.pools:
            pool.waiting_us += us
        if not before:
            self._weigh(self.weight)
        elif not self.requests:
            self._weigh(0.0)

    def _weigh(self, weight: float) -> None:
        """Say how much of its pools it asks for now."""
        for pool in self.pools:
            pool.weight += weight - self.weighs
        self.weighs = weight

    def could_give(self, room: int, hears: Container[bytes], full: Container[bytes]) -> bool:
        """Whether ``take`` with this room would find anything, for tests."""
        levels = [level for level in self._levels if level.requests]
        owed = [level for level in reversed(levels[1:]) if level.owed >= 1]
        for level in [*owed, *levels]:
            for share in level.in_turn():
                for caller in share.turns:
                    if caller in hears and caller not in full:
                        return next(iter(share.lines[caller])).form.rows <= room
        return False

    def validate_given(self, lots: Collection[Lot]) -> None:
        """Derive again what is counted of what workers have been given, for tests. Raises AssertionError."""
        for level in self._levels:
            rows = sum(lot.rows for lot in lots if lot.priority == level.priority)
            assert level.given == rows, (
                f"{self.key} at priority {level.priority}: {level.given} rows are given, not {rows}"
            )
        rows = sum(lot.rows for lot in lots if lot.overtakes)
        assert self._overtaking == rows, f"{self.key}: {self._overtaking} rows overtake, not {rows}"

    def validate(self) -> None:
        """Derive again what is counted, for tests. Raises AssertionError."""
        lots = [lot for lot in self.lots() if not lot.suspect and lot not in self.beside]
        assert self.requests == sum(len(lot.ids) for lot in lots), f"{self.key}: {self.requests} requests in {lots}"
        assert self.rows == sum(lot.rows for lot in lots), f"{self.key}: {self.rows} rows in {lots}"
        assert self.us == sum(len(lot.ids) * lot.cost_us for lot in lots), f"{self.key}: {self.us} us in {lots}"
        nbytes = sum(len(lot.ids) * lot.form.nbytes for lot in lots)
        assert self.nbytes == nbytes, f"{self.key}: {self.nbytes} bytes are {nbytes}"
        assert len(set(lots)) == len(lots), f"{self.key}: a lot waits twice in {lots}"
        priorities = [level.priority for level in self._levels]
        assert priorities == sorted(set(priorities)), f"{self.key}: priorities are {priorities}"
        speed = sum(map(_speed_of, self._told_us.values()))
        assert self._speed == speed, f"{self.key}: workers are as quick as {self._speed}, not {speed}"
        best = min(self._told_us.values(), default=self.best_row_us)
        assert self.best_row_us == best, f"{self.key}: a row takes {best} us at best"
        assert self._told_us.keys() <= self.workers.keys(), f"{self.key}: a worker that has gone has told"
        for level in self._levels:
            level.validate(f"{self.key} at priority {level.priority}")
        for lot in self.lots():
            assert lot.state == QUEUED, f"{lot} waits in a line"
            assert lot.suspect == (lot in self.suspects), f"{lot} waits in the wrong place"
            assert lot.model is self, f"{lot} waits for another model"


def _speed_of(row_us: float) -> int:
    """Rows in a microsecond, in parts that are so small and whole that sums of them are exact whatever is added and
    taken away; 0 where nothing is known."""
    return round(_SPEED_SCALE / row_us) if row_us else 0
