"""Workers that serve the same models: who of them is least busy, and which model's turn it is there.

To find a worker for a request, or work for a worker, costs the same however many there are, but for a heap of the
models that wait.
"""

from __future__ import annotations

import heapq
from collections.abc import Collection, Iterator
from itertools import islice
from typing import TYPE_CHECKING, Final, TypeAlias

from penstock.broker.queues import ModelKey, ModelQueue

if TYPE_CHECKING:
    from penstock.broker.peers import WorkerPeer

# Who has less to do than that, will soon be done with it: it is not worth a message to overtake that.
LONG_S: Final = 0.005
_LATELY_US: Final = 250_000
_LOOKS_MAX: Final = 64  # at workers that cannot take a request, until it waits for one that looks for work itself
Turn: TypeAlias = tuple[float, int, ModelQueue]  # when, in virtual time; a number that no other turn has; whose


class Pool:
    """``models``: of the workers; ``servers``: batches that they run at once; ``assigned_us``: what they are expected
    to take for what they have; ``waiting_us`` and ``weight``: of the models, as far as requests wait for them;
    ``early``: the part of what they have been given lately that went before others."""

    def __init__(self, models: Collection[ModelQueue]) -> None:
        self.models = list(models)
        self.workers: set[WorkerPeer] = set()
        self.servers = 0
        self.assigned_us = 0
        self.early = 0.0
        self.waiting_us = sum(model.us for model in models)
        self.weight = sum(model.weighs for model in models)
        self._by_batches: dict[int, dict[WorkerPeer, None]] = {}  # those that take another batch; dicts have an order
        self._full: dict[WorkerPeer, None] = {}  # the others, since when they are
        self._open: dict[ModelKey, dict[WorkerPeer, None]] = {}  # of these, those that take rows for a batch
        # Start-time fair queueing between models, as between tenants (see shares.py).
        self._now = 0.0  # the virtual time of what was given out last
        self._done = 0.0  # of what has been done
        self._served: dict[ModelQueue, float] = {}
        self._turns: list[Turn] = []  # a heap
        self._numbers: dict[ModelQueue, int] = {}  # of the entries that count, of models that wait
        self._entered = 0

    @property
    def idle(self) -> int:
        """How many workers have nothing to do."""
        return len(self._by_batches.get(0, ()))

    # --- workers ---

    def join(self, worker: WorkerPeer) -> None:
        self.workers.add(worker)
        self.servers += worker.instances
        self.assigned_us += worker.assigned_us
        self.place(worker)

    def leave(self, worker: WorkerPeer) -> None:
        self.workers.discard(worker)
        self.servers -= worker.instances
        self.assigned_us -= worker.assigned_us
        self._unplace(worker)

    def place(self, worker: WorkerPeer, begins: bool = False) -> None:
        """Find a worker again by what it has now. ``begins``: it has just been done with something."""
        batches = worker.batches
        if batches < worker.window:
            if worker.bucket == batches:
                return
            self._unplace(worker)
            worker.bucket = batches
            same = self._by_batches.get(batches)
            if same is None:
                same = self._by_batches[batches] = {}
            same[worker] = None
            return
        if worker in self._full and not begins:
            self._close(worker)
        else:
            self._unplace(worker)
            self._full[worker] = None
        worker.open = worker.open_models()
        for key in worker.open:
            self._open.setdefault(key, {})[worker] = None

    def _unplace(self, worker: WorkerPeer) -> None:
        if worker.bucket >= 0:
            same = self._by_batches[worker.bucket]
            del same[worker]
            if not same:
                del self._by_batches[worker.bucket]
            worker.bucket = -1
        elif worker in self._full:
            del self._full[worker]
            self._close(worker)

    def _close(self, worker: WorkerPeer) -> None:
        for key in worker.open:
            same = self._open[key]
            del same[worker]
            if not same:
                del self._open[key]
        worker.open = ()

    def candidates(self, model: ModelQueue) -> Iterator[WorkerPeer]:
        """Workers that may have room for a model, those with the fewest batches first. Ask anew once one has been given
        something."""
        for batches in sorted(self._by_batches):
            same = self._by_batches[batches]
            yield from _some(same) if batches else islice(same, _LOOKS_MAX)
        yield from self._open.get(model.key, ())

    def full(self) -> Iterator[WorkerPeer]:
        """Workers that take no more batches, likewise."""
        return _some(self._full)

    # --- models ---

    def wait(self, model: ModelQueue) -> None:
        """Requests for it have found no worker."""
        if model not in self._numbers:
            self._enter(model)

    def settle(self, model: ModelQueue) -> None:
        """Nothing of it waits any more."""
        self._numbers.pop(model, None)

    def charge(self, model: ModelQueue, us: float, early: bool = False) -> float:
        """Count what a model was given. Returns when, in virtual time, it was its turn."""
        self.early += (early - self.early) * min(0.5, us / (self.servers * _LATELY_US))
        turn = max(self._done, self._served.get(model, 0.0))
        self._now = max(self._now, turn)
        self._served[model] = turn + us / model.weight
        return turn

    def end(self, model: ModelQueue, turn: float, over_us: float) -> None:
        """A worker no longer has what a model was given. ``over_us``: what it took beyond what was charged."""
        self._done = max(self._done, min(turn, self._now))
        if model in self._served:
            self._served[model] += over_us / model.weight

    def is_behind(self, model: ModelQueue) -> bool:
        """Whether others have been given something before whose turn its own is now."""
        return max(self._done, self._served.get(model, 0.0)) < self._now

    def next(self) -> Turn | None:
        """The waiting model whose turn it is, for as long as its turn is not given back by ``put_back``."""
        turns = self._turns
        while turns:
            turn = heapq.heappop(turns)
            model = turn[2]
            if self._numbers.get(model) == turn[1]:
                del self._numbers[model]
                return turn
        return None

    def put_back(self, turn: Turn) -> None:
        """It is still this model's turn."""
        self._numbers[turn[2]] = turn[1]
        heapq.heappush(self._turns, turn)

    def _enter(self, model: ModelQueue) -> None:
        self._entered += 1
        self._numbers[model] = self._entered
        if len(self._turns) > 64 + 2 * len(self._numbers):
            self._turns = [entry for entry in self._turns if self._numbers.get(entry[2]) == entry[1]]
            heapq.heapify(self._turns)
        heapq.heappush(self._turns, (max(self._done, self._served.get(model, 0.0)), self._entered, model))

    @property
    def waiting(self) -> Collection[ModelQueue]:
        return self._numbers.keys()

    def validate(self) -> None:
        """Derive again what is counted, for tests. Raises AssertionError."""
        assert self.workers, "a pool without workers"
        assert self.servers == sum(worker.instances for worker in self.workers), f"{self.servers} servers"
        assigned = sum(worker.assigned_us for worker in self.workers)
        assert self.assigned_us == assigned, f"{self.assigned_us} us are assigned, not {assigned}"
        waiting = sum(model.us for model in self.models)
        assert self.waiting_us == waiting, f"{self.waiting_us} us wait, not {waiting}"
        assert abs(self.weight - sum(model.weighs for model in self.models)) < 1e-6, f"the weight is {self.weight}"
        placed = {worker: batches for batches, same in self._by_batches.items() for worker in same}
        for worker in self.workers:
            assert worker.pool is self, f"{worker.name} is in another pool"
            if worker.batches < worker.window:
                assert placed.pop(worker) == worker.batches == worker.bucket, f"{worker.name} is misplaced"
                assert worker.open == (), f"{worker.name} has a place too many"
                assert worker not in self._full, f"{worker.name} has a place too many"
            else:
                assert worker in self._full, f"{worker.name} is not found"
                assert worker.open == worker.open_models(), f"{worker.name}: {worker.open} are open"
                assert all(worker in self._open[key] for key in worker.open), f"{worker.name} is not found"
        assert not placed, f"{placed} have gone"
        opened = {worker for same in self._open.values() for worker in same}
        assert opened <= self._full.keys() <= self.workers, "an open worker has gone"
        numbers = {number for _, number, _ in self._turns}
        assert set(self._numbers.values()) <= numbers, "a model that waits has no turn"
        assert self._numbers.keys() <= set(self.models), "a model waits that is not served"


def _some(workers: dict[WorkerPeer, None]) -> Iterator[WorkerPeer]:
    """Some from either end: those that have been there for longest may be those whose batches take longest."""
    half = min(_LOOKS_MAX, len(workers)) // 2
    for pair in zip(islice(workers, half), islice(reversed(workers), half), strict=True):
        yield from pair
    if len(workers) % 2 and len(workers) < _LOOKS_MAX:
        yield next(islice(workers, half, None))
