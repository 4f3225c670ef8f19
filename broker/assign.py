"""Which waiting request goes to which worker. Fair and simple: lines in turn, the least busy worker, equal shares."""

from __future__ import annotations

from collections.abc import Collection
from typing import TypeAlias

from penstock.broker.lots import Lot
from penstock.broker.peers import WorkerPeer
from penstock.broker.queues import ModelQueue

Given: TypeAlias = dict[WorkerPeer, list[Lot]]


class Assigner:
    """Finds work for workers, and workers for work, without looking at either more often than something has changed.

    A model is ``blocked`` when every worker that serves it has a full window: new requests for it then wait without a
    search, until a worker has room again and looks for work itself.
    """

    def __init__(self) -> None:
        self._idle: set[WorkerPeer] = set()
        self._changed: dict[ModelQueue, None] = {}  # have new requests; dicts, because a set has no order
        self._free: dict[WorkerPeer, None] = {}  # have more room than before
        self._waiting: dict[ModelQueue, None] = {}  # have requests that found no worker
        self._blocked: set[ModelQueue] = set()

    def requests_came(self, model: ModelQueue) -> None:
        if model not in self._blocked:
            self._changed[model] = None

    def room_came(self, worker: WorkerPeer) -> None:
        """A worker finished something, hears another caller, or serves another model."""
        self._free[worker] = None
        if worker.batches == 0:
            self._idle.add(worker)

    def model_went(self, model: ModelQueue) -> None:
        self._changed.pop(model, None)
        self._waiting.pop(model, None)
        self._blocked.discard(model)

    def worker_went(self, worker: WorkerPeer) -> None:
        self._free.pop(worker, None)
        self._idle.discard(worker)

    def assign(self) -> Given:
        """Give out all that can be given, and say what went where. Counts the rows; moves no request."""
        given: Given = {}
        if self._free:
            free, self._free = self._free, {}
            for worker in free:
                self._fill(worker, given)
        if self._changed:
            changed, self._changed = self._changed, {}
            for model in changed:
                self._spread(model, given)
        return given

    def validate(self, models: Collection[ModelQueue], workers: Collection[WorkerPeer]) -> None:
        """Whether nothing has been overlooked, for tests. Raises AssertionError."""
        idle = {worker for worker in workers if worker.batches == 0}
        assert self._idle == idle, f"idle are {[worker.name for worker in idle]}"
        assert self._free.keys() <= set(workers), "a worker that has gone is to be filled"
        looked_at = self._changed.keys() | self._waiting.keys() | self._blocked
        assert looked_at <= set(models), "a model that has gone is looked at"
        assert self._waiting.keys() >= self._blocked, "a blocked model does not wait"
        for model in models:
            if model in self._changed:
                continue
            assert not model.requests or model in self._waiting, f"nobody looks at {model.requests} of {model.key}"
            for worker in model.workers:
                if worker in self._free:
                    continue
                room = worker.room(model.key)
                full = room <= 0 or worker.batches >= worker.window
                assert model not in self._blocked or full, f"{model.key} is blocked, {worker.name} has {room} rows"
                overlooked = worker in idle and model.could_give(room, worker.callers, worker.full)
                assert not overlooked, f"{worker.name} is idle, and {model.requests} of {model.key} wait"

    def _fill(self, worker: WorkerPeer, given: Given) -> None:
        """Work for a worker that has room, from each waiting model in turn.

        A model whose turn it is, and for which there is no room, ends the filling: others that go on to fill up their
        last batch could keep it waiting for ever.
        """
        for model in list(self._waiting):
            if not worker.serves(model.key):
                continue
            room = worker.room(model.key)
            if room <= 0:
                break
            gave = self._give(model, worker, room, room, given)
            if not model.requests:
                self._settle(model)
            else:
                if gave:
                    self._waiting[model] = self._waiting.pop(model)  # behind the others
                if worker.room(model.key) > 0:
                    self._blocked.discard(model)

    def _spread(self, model: ModelQueue, given: Given) -> None:
        """Workers for a model's requests: equal shares for those that are idle, then the least busy are filled."""
        passed: set[WorkerPeer] = set()  # have room, but not for the first request, or hear none of the callers
        while model.requests:
            worker = self._choose(model, passed)
            if worker is None:
                break
            share = -(-model.rows // max(1, len(self._idle)))
            if not self._give(model, worker, worker.room(model.key), share, given):
                passed.add(worker)
        if not model.requests:
            self._settle(model)
        else:
            self._waiting[model] = None
            if not passed:
                self._blocked.add(model)

    def _settle(self, model: ModelQueue) -> None:
        self._waiting.pop(model, None)
        self._blocked.discard(model)

    def _choose(self, model: ModelQueue, passed: set[WorkerPeer]) -> WorkerPeer | None:
        """The next idle worker, else the least busy one that has room."""
        best = None
        for _ in range(len(model.workers)):
            worker = model.workers[0]
            model.workers.rotate(-1)
            if worker in passed or worker.room(model.key) <= 0:
                continue
            if worker.batches == 0:
                return worker
            if best is None or worker.batches < best.batches:
                best = worker
        return best

    def _give(self, model: ModelQueue, worker: WorkerPeer, room: int, enough: int, given: Given) -> bool:
        rows = model.rows
        lots = model.take(room, enough, worker.callers, worker.full)
        if not lots:
            return False
        worker.add_rows(model.key, rows - model.rows)
        self._idle.discard(worker)
        known = given.get(worker)
        if known is None:
            given[worker] = lots
        else:
            known += lots
        return True
