"""Which waiting request goes to which worker: the least busy worker, the model that is furthest behind its share."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Final, TypeAlias

from penstock.broker.lots import Lot
from penstock.broker.peers import WorkerPeer
from penstock.broker.pools import LONG_S, Pool, Turn
from penstock.broker.queues import ModelKey, ModelQueue
from penstock.broker.sequences import Bound
from penstock.broker.shares import Taking
from penstock.broker.suspects import Suspects

Given: TypeAlias = dict[WorkerPeer, list[Lot]]

# What is given out is to be done in time. A batch is now and then quicker than expected: so much quicker is hoped for.
_HOPE: Final = 0.9
_COMPARED_MAX: Final = 8  # workers with as many batches: the best of so many is nearly always a good one


class Assigner:
    """Finds work for workers, and workers for work, without looking at either more often than something has changed.

    ``late``: what was found to be too late to be given to anybody, to be refused by the owner.
    """

    def __init__(self) -> None:
        self.pools: dict[frozenset[ModelKey], Pool] = {}
        self.late: list[Lot] = []
        self.suspects = Suspects()
        self.bound = Bound()
        self._changed: dict[ModelQueue, None] = {}  # have new requests; dicts, because a set has no order
        self._free: dict[WorkerPeer, None] = {}  # have more room than before

    def requests_came(self, model: ModelQueue) -> None:
        self._changed[model] = None

    def room_came(self, worker: WorkerPeer) -> None:
        """A worker finished something, hears another caller, or serves another model."""
        if worker.pool is not None:
            worker.pool.place(worker, begins=True)
            self._free[worker] = None
            if self.suspects:
                self.suspects.room_came()

    def look_at(self, worker: WorkerPeer) -> None:
        """Something is bound to a worker."""
        if worker.pool is not None:
            self._free[worker] = None

    def model_went(self, model: ModelQueue) -> None:
        self._changed.pop(model, None)
        self.suspects.model_went(model)

    def enlist(self, worker: WorkerPeer, models: Mapping[ModelKey, ModelQueue]) -> None:
        """Put a worker where it belongs by the models that it serves now."""
        key = frozenset(each for each in worker.models if each in models and worker.serves(each))
        pool = self.pools.get(key)
        if pool is None and key:
            pool = self.pools[key] = Pool([models[each] for each in sorted(key)])
            for model in pool.models:
                model.pools.append(pool)
                if model.requests:
                    pool.wait(model)
        self._move(worker, pool)
        self.room_came(worker)

    def _move(self, worker: WorkerPeer, pool: Pool | None) -> None:
        before, worker.pool = worker.pool, pool
        if pool is before:
            return
        self._free.pop(worker, None)
        if before is not None:
            before.leave(worker)
            if not before.workers:
                self._dissolve(before)
        if pool is not None:
            pool.join(worker)

    def grow(self, worker: WorkerPeer, instances: int) -> None:
        """A worker runs more batches at once than it did."""
        pool = worker.pool
        if pool is not None:
            pool.leave(worker)
        worker.grow(instances)
        if pool is not None:
            pool.join(worker)
        self.room_came(worker)

    def worker_went(self, worker: WorkerPeer) -> None:
        pool = worker.pool
        self._move(worker, None)
        self.suspects.worker_went(worker)
        for model in pool.models if pool is not None else ():
            self.worker_changed(model)

    def worker_changed(self, model: ModelQueue) -> None:
        """What waited for a worker that is faster than others may wait for it in vain."""
        if model.requests:
            self._changed[model] = None

    def _dissolve(self, pool: Pool) -> None:
        for model in pool.models:
            model.pools.remove(pool)
        for key, each in self.pools.items():
            if each is pool:
                del self.pools[key]
                return

    def assign(self, now: float = 0.0) -> Given:
        """Give out all that can be given, and say what went where. Counts the rows; moves no request."""
        given: Given = {}
        if self.suspects:
            for worker in self.suspects.assign(given, now):
                self.room_came(worker)
        if self._free:
            free, self._free = self._free, {}
            for worker in free:
                if self.bound:
                    self._fill_both(worker, given, now)
                else:
                    self._fill(worker, given, now)
        if self._changed:
            changed, self._changed = self._changed, {}
            for model in changed:
                self._spread(model, given, now)
        return given

    def _fill_both(self, worker: WorkerPeer, given: Given, now: float) -> None:
        """What is bound to a worker, and other work for it."""
        gave = self.bound.goes_first(worker) and self.bound.give(worker, given, now, True)
        before = len(given.get(worker, ()))
        self._fill(worker, given, now)
        self.bound.gone_first(worker, gave, len(given.get(worker, ())) > before)
        self.bound.give(worker, given, now, False)

    def _fill(self, worker: WorkerPeer, given: Given, now: float) -> None:
        """Work for a worker that has room: a batch for the model that is furthest behind, and so on.

        A model whose turn it is, and for which there is no room, ends the filling: others that go on to fill up their
        last batch could keep it waiting for ever. But it does not, if it is the model's own limit that leaves no room.
        """
        pool = worker.pool
        assert pool is not None
        if worker.apart:
            return
        passed: list[Turn] = []
        while (turn := pool.next()) is not None:
            model = turn[2]
            if not model.requests:
                continue
            room = worker.room(model.key)
            if room > 0 and self._give(model, worker, room, min(room, worker.size(model.key)), given, now):
                if model.requests:
                    pool.wait(model)
                continue
            passed.append(turn)
            if room <= 0 and worker.batches >= worker.window:
                break
        for turn in passed:
            self._overtake(turn[2], worker, given, now)
            if turn[2].requests:
                pool.put_back(turn)

    def _spread(self, model: ModelQueue, given: Given, now: float) -> None:
        """Workers for a model's requests: equal shares for those that are idle, then the least busy are filled."""
        passed: set[WorkerPeer] = set()  # have room, but not for the first request, or hear none of the callers
        while model.requests:
            worker = self._choose(model, passed, now)
            if worker is None:
                break
            share = -(-model.rows // max(1, sum([pool.idle for pool in model.pools])))
            if not self._give(model, worker, worker.room(model.key), share, given, now):
                passed.add(worker)
        while model.requests and model.is_behind():
            worker = self._choose(model, (), now, 1)
            if worker is None or not self._overtake(model, worker, given, now):
                break
        for pool in model.pools:
            if model.requests:
                pool.wait(model)
            else:
                pool.settle(model)

    def _overtake(self, model: ModelQueue, worker: WorkerPeer, given: Given, now: float) -> bool:
        """Give a worker that takes no more, requests of a model that is behind others there, or such as may go before
        others of their own model: at most a batch more."""
        room = worker.room(model.key, 1)
        if room <= 0 or worker.batches < worker.window or worker.left_s(now) < LONG_S:
            return False
        return self._give(model, worker, room, min(room, worker.size(model.key)), given, now, early=True)

    @staticmethod
    def _choose(model: ModelQueue, passed: Collection[WorkerPeer], now: float, more: int = 0) -> WorkerPeer | None:
        """The worker with the fewest batches that has room, or one of those that take no ``more``; of equals, one that
        will soon be done with them, or where they do not take long, the one that has had so few for longest."""
        best, least = None, (0, 0.0)
        for pool in model.pools:
            looks = 0
            for worker in pool.full() if more else pool.candidates(model):
                batches = 0 if more else worker.batches
                if best is not None and batches > least[0]:
                    break
                if worker in passed or worker.room(model.key, more) <= 0:
                    continue
                left_s = worker.left_s(now) if batches or more else 0.0
                if best is None or (batches, left_s) < least:
                    best, least = worker, (batches, left_s)
                looks += 1
                if left_s < LONG_S or looks >= _COMPARED_MAX:
                    break
        return best

    def _give(
        self,
        model: ModelQueue,
        worker: WorkerPeer,
        room: int,
        enough: int,
        given: Given,
        now: float,
        early: bool = False,
    ) -> bool:
        """``early``: only what may be given to a worker that takes no more."""
        pool = worker.pool
        assert pool is not None
        taking = Taking(room, worker.callers, worker.full, now)
        taking.overtakes = early and not pool.is_behind(model)
        if model.row_us and not model.is_stale(now):
            left_s = 0.0 if early else worker.left_s(now)
            took_s = left_s + worker.batch_us(model.key, min(enough, model.rows)) * 1e-6
            # What is due before that cannot be done by this worker in time; perhaps others could do it.
            taking.horizon, taking.hopeless = now + _HOPE * took_s, not model.is_slow(worker)
        gave = model.take(taking, enough)
        self.late += taking.late
        if not gave:
            return False
        lots = taking.lots
        turn = pool.charge(model, taking.us, early)
        for lot in lots:
            lot.model_turn = turn
        pool.assigned_us += taking.us
        worker.add(model.key, taking.rows, taking.us, now)
        pool.place(worker)
        known = given.get(worker)
        if known is None:
            given[worker] = lots
        elif taking.overtakes:
            given[worker] = lots + known
        else:
            known += lots
        return True

    def validate(self, models: Collection[ModelQueue], workers: Collection[WorkerPeer]) -> None:
        """Whether nothing has been overlooked, for tests. Raises AssertionError."""
        assert self._free.keys() <= set(workers), "a worker that has gone is to be filled"
        assert self._changed.keys() <= set(models), "a model that has gone is looked at"
        assert not self.late, f"{self.late} have not been refused"
        self.suspects.validate()
        self.bound.validate(self._free)
        for key, pool in self.pools.items():
            assert key == frozenset(model.key for model in pool.models), f"a pool of {key} has others"
            assert set(pool.models) <= set(models), "a model that has gone has a pool"
            assert pool.workers <= set(workers), "a worker that has gone is in a pool"
            pool.validate()
        for worker in workers:
            known = worker.pool in self.pools.values() if worker.pool is not None else True
            assert known, f"{worker.name} is in a pool that is no more"
        for model in models:
            pools = {id(worker.pool) for worker in model.workers}
            assert pools == {id(pool) for pool in model.pools}, f"{model.key} is served by other pools"
            if model in self._changed:
                continue
            for pool in model.pools:
                waits = not model.requests or model in pool.waiting
                assert waits, f"nobody looks at {model.requests} of {model.key}"
            for worker in model.workers:
                if worker in self._free or worker.batches or model.is_slow(worker):
                    continue  # the last of these may leave it to others
                overlooked = model.could_give(worker.room(model.key), worker.callers, worker.full)
                assert not overlooked, f"{worker.name} is idle, and {model.requests} of {model.key} wait"
