"""Which models there are, which workers serve them, and which one a name and version mean."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Final

from penstock.broker.peers import WorkerPeer
from penstock.broker.queues import ModelKey, ModelQueue
from penstock.wire.errors import NOT_FOUND, UNAVAILABLE, PenstockError
from penstock.wire.models import LOADING, READY, ModelState, newest
from penstock.wire.models import UNAVAILABLE as UNAVAILABLE_STATE

_NO_WEIGHTS: Final[Mapping[str, float]] = {}
_AWAY_MAX: Final = 4096  # workers that have gone whose models are known: names are the workers' own to choose


class Registry:
    """The models that workers have declared.

    A worker's models stay known when it goes, under its name: it may be restarting, and a server that forgot them would
    answer 404 and call itself ready. They go when a worker of that name declares others, very many have gone since,
    or when it leaves, as it was told to, while another goes by its name and a number (see Names): its successor, which
    was started beside it.

    While the broker is young, a model that is asked for and that nobody has declared may be that of a worker that has
    yet to join, and its callers know it from the broker before: requests wait for it as for one that is away.
    """

    def __init__(self, models_max: int, weights: Mapping[str, float] = _NO_WEIGHTS, young_until: float = 0.0) -> None:
        """``weights``: of tenants."""
        self.queues: dict[ModelKey, ModelQueue] = {}
        self._versions: dict[str, set[str]] = {}
        self._declared: dict[str, dict[ModelKey, ModelState]] = {}  # by the worker's name
        self._away: dict[str, None] = {}  # names of workers that have gone, in their order
        self._unheard: set[ModelKey] = set()  # of the queues, those of models that nobody has declared
        self._young_until = young_until
        self._models_max = models_max
        self._weights = weights

    def declare(self, worker: WorkerPeer, now: float) -> list[ModelQueue]:
        """Take in what a worker says of its models, or that it is leaving. Returns the queues that have ended with
        it."""
        self._declared[worker.name] = dict(worker.models)
        self._away.pop(worker.name, None)
        while len(self._away) > _AWAY_MAX:
            longest = next(iter(self._away))
            del self._away[longest], self._declared[longest]
        if worker.leaving and any(_stem(worker.name, other) for other in self._declared.keys() - self._away.keys()):
            del self._declared[worker.name]
        self._unheard -= worker.models.keys()
        for key, state in worker.models.items():
            queue = self.queues.get(key)
            if queue is None and len(self.queues) < self._models_max:
                queue = self._make(key, now)
            if queue is not None:
                self._versions.setdefault(key[0], set()).add(key[1])
                queue.spec = state.spec or queue.spec
        for key, queue in self.queues.items():
            self._enlist(queue, worker, worker.serves(key), now)
        known = self._unheard.union(*self._declared.values())
        return [self._forget(key) for key in list(self.queues) if key not in known]

    def withdraw(self, worker: WorkerPeer, now: float) -> None:
        """A worker has gone; its models stay known."""
        if worker.name in self._declared:
            self._away[worker.name] = None
        for queue in self.queues.values():
            self._enlist(queue, worker, False, now)

    def is_young(self, now: float) -> bool:
        """Whether workers of the broker before this one may have yet to join."""
        return now < self._young_until

    def forget_unheard(self, now: float) -> None:
        """What nobody has declared by now nobody will, once nothing waits for it any more."""
        if not self.is_young(now):
            for key in [key for key in self._unheard if not self.queues[key].requests]:
                self._unheard.discard(key)
                del self.queues[key]

    def find(self, name: str, version: str, now: float) -> ModelQueue:
        """The queue for requests of this name and version ("": the newest that is served). Raises PenstockError."""
        queue = self.queues.get((name, version))
        if queue is not None:
            return queue
        if version and self.is_young(now) and len(self.queues) < self._models_max:
            self._unheard.add((name, version))
            return self._make((name, version), now)
        if not self._declared:
            raise PenstockError(UNAVAILABLE, "no worker has joined this server yet; try again shortly")
        versions = self._versions.get(name)
        if versions is None:
            raise PenstockError(NOT_FOUND, f"Request for unknown model: '{name}' is not found")
        if version:
            raise PenstockError(NOT_FOUND, f"Request for unknown model: '{name}' version {version} is not found")
        served = [each for each in versions if self.queues[name, each].workers]
        return self.queues[name, newest(served or list(versions))]

    def state(self, key: ModelKey) -> ModelState:
        """How a model fares on the server as a whole: as well as on the worker where it fares best."""
        spec = self.queues[key].spec
        told = [models[key] for models in self._declared.values() if key in models]
        if self.queues[key].workers:
            reason = next((state.reason for state in told if state.state == READY), "")
            return ModelState(*key, READY, reason, spec)
        loading = [state for state in told if state.state == LOADING]
        failed = [state for state in told if state.state == UNAVAILABLE_STATE]
        if loading:
            return ModelState(*key, LOADING, loading[0].reason, spec)
        reason = failed[0].reason if failed else "no worker serves it at present"
        return ModelState(*key, UNAVAILABLE_STATE, reason, spec)

    def states(self) -> list[ModelState]:
        return [self.state(key) for key in sorted(self.queues.keys() - self._unheard)]

    def validate(self, workers: Collection[WorkerPeer]) -> None:
        """Derive again what is indexed, for tests. Raises AssertionError."""
        versions: dict[str, set[str]] = {}
        for key, queue in self.queues.items():
            if key not in self._unheard:
                versions.setdefault(key[0], set()).add(key[1])
            serving = {worker for worker in workers if worker.serves(key)}
            assert queue.key == key, f"{key} is the queue of {queue.key}"
            assert len(queue.workers) == len(serving), f"{key} has {len(queue.workers)} workers, not {len(serving)}"
            assert set(queue.workers) == serving, f"{key} is served by others than its workers"
            queue.validate()
        assert self._versions == versions, f"versions {self._versions} are {versions}"
        assert self._away.keys() <= self._declared.keys(), "a worker has gone that never declared anything"
        assert self._unheard == self.queues.keys() - set().union(*self._declared.values()), "a model is (not) declared"

    def _enlist(self, queue: ModelQueue, worker: WorkerPeer, serves: bool, now: float) -> None:
        listed = worker in queue.workers
        if serves and not listed:
            queue.enlist(worker)
        elif listed and not serves:
            queue.dismiss(worker, now)

    def _make(self, key: ModelKey, now: float) -> ModelQueue:
        queue = self.queues[key] = ModelQueue(key, None, self._weights)
        queue.unserved_since = now
        return queue

    def _forget(self, key: ModelKey) -> ModelQueue:
        name, version = key
        self._versions[name].discard(version)
        if not self._versions[name]:
            del self._versions[name]
        return self.queues.pop(key)


def _stem(one: str, other: str) -> bool:
    """Whether two workers wished for the same name: one has it, and the other its number behind it."""
    short, long = sorted((one, other), key=len)
    number = long[len(short) + 1 :]
    return long.startswith(f"{short}-") and number.isdecimal() and number[0] != "0"
