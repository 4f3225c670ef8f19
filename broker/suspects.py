"""Requests that a worker had not finished when it died: any of them may have ended it.

Nobody but the worker knows what it ran, and to have it say so would cost every batch. So after a death all of them are
suspects, and run alone, with nothing else on their worker: whoever is there when that dies too has done it, or was
unlucky, since somebody may kill workers at random. Twice unlucky hardly anybody is, and that is what the ledger calls
poison.

Workers are set apart for suspects: these take nothing else, and once they are idle one suspect after another, until
none is left. So suspects wait for what such a worker has, and for each other, and for nothing that comes meanwhile;
others go on elsewhere. At most half of a model's workers are set apart, but one in any case.
"""

from __future__ import annotations

from penstock.broker.lots import Lot
from penstock.broker.peers import WorkerPeer
from penstock.broker.queues import ModelQueue


class Suspects:
    """Finds workers for suspects, which wait in their models' queues."""

    def __init__(self) -> None:
        self._models: dict[ModelQueue, None] = {}  # for which any wait
        self._apart: dict[WorkerPeer, None] = {}
        self._changed = False  # another worker might be set apart

    def __bool__(self) -> bool:
        return bool(self._models or self._apart)

    def came(self, model: ModelQueue) -> None:
        self._models[model] = None
        self._changed = True

    def room_came(self) -> None:
        """A worker may take what none has taken: it serves another model, or hears another caller."""
        self._changed = True

    def worker_went(self, worker: WorkerPeer) -> None:
        self._apart.pop(worker, None)
        self._changed = True

    def model_went(self, model: ModelQueue) -> None:
        self._models.pop(model, None)

    def assign(self, given: dict[WorkerPeer, list[Lot]], now: float) -> list[WorkerPeer]:
        """Give a suspect to each worker that is set apart and idle. Returns workers that are no longer set apart."""
        free = []
        for worker in list(self._apart):
            if not worker.batches and not self._give(worker, given, now):
                del self._apart[worker]
                _set(worker, False)
                free.append(worker)
        if self._changed:
            self._changed = False
            for model in list(self._models):
                self._set_apart(model, given, now)
        return free

    def _set_apart(self, model: ModelQueue, given: dict[WorkerPeer, list[Lot]], now: float) -> None:
        """Set workers apart for a model: those that will be idle soonest."""
        if not model.suspects:
            del self._models[model]
            return
        number = min((len(model.workers) + 1) // 2, sum([len(lot.ids) for lot in model.suspects]))
        number -= sum([worker.apart for worker in model.workers])
        if number <= 0:
            return
        fit = [each for each in model.workers if not each.apart and model.next_suspect(each) is not None]
        fit.sort(key=lambda each: (each.batches, each.left_s(now)))
        for worker in fit[:number]:
            _set(worker, True)
            self._apart[worker] = None
            if not worker.batches:
                self._give(worker, given, now)

    def _give(self, worker: WorkerPeer, given: dict[WorkerPeer, list[Lot]], now: float) -> bool:
        """Whether there was a suspect for an idle worker."""
        for model in list(self._models):
            if worker not in model.workers or worker.pool is None:
                continue
            lot = model.take_suspect(worker)
            if lot is None:
                continue
            lot.model_turn = worker.pool.charge(model, lot.cost_us)
            worker.pool.assigned_us += lot.cost_us
            worker.add(model.key, lot.rows, lot.cost_us, now)
            worker.pool.place(worker)
            given[worker] = [lot]
            return True
        return False

    def validate(self) -> None:
        """Whether nothing has been overlooked, for tests. Raises AssertionError."""
        for worker in self._apart:
            assert worker.apart, f"{worker.name} is not set apart"
            unfinished = [lot for index in worker.held.values() for lot in set(index.values()) if lot.unfinished]
            alone = len(unfinished) == 1 and len(unfinished[0].ids) == 1
            assert alone or not any(lot.suspect for lot in unfinished), f"{unfinished} run beside each other"


def _set(worker: WorkerPeer, apart: bool) -> None:
    worker.apart = apart
    if worker.pool is not None:
        worker.pool.place(worker)
