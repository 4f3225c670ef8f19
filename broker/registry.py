"""Which models there are, which workers serve them, and which one a name and version mean."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Final, NamedTuple

from penstock.broker.builds import Builds
from penstock.broker.peers import WorkerPeer
from penstock.broker.queues import ModelKey, ModelQueue
from penstock.broker.routing import Tally, choose
from penstock.wire.errors import NOT_FOUND, UNAVAILABLE, PenstockError
from penstock.wire.models import IDLE, LOADING, READY, SERVED, ModelState, Route, newest
from penstock.wire.models import UNAVAILABLE as UNAVAILABLE_STATE

_NO_WEIGHTS: Final[Mapping[str, float]] = {}
_AWAY_MAX: Final = 4096  # workers that have gone whose models are known: names are the workers' own to choose
RETIRE_AFTER_S: Final = 2.0  # callers that have not heard yet that another version is current ask for the old one
_NEVER: Final = float("inf")
_RETIRE_MAX_S: Final = 60.0  # for what has been answered to be acknowledged


class _Retiring(NamedTuple):
    """A version that nobody asks for any more. ``told``: workers that may unload it."""

    since: float
    told: set[bytes]


class Registry:
    """The models that workers have declared.

    A worker's models stay known when it goes, under its name: it may be restarting, and a server that forgot them would
    answer 404 and call itself ready. They go when a worker of that name declares others, very many have gone since,
    or when it leaves, as it was told to, while another goes by its name and a number (see Names): its successor, which
    was started beside it.

    While the broker is young, a model that is asked for and that nobody has declared may be that of a worker that has
    yet to join, and its callers know it from the broker before: requests wait for it as for one that is away.

    Of each model one version is current (see routing.py). One that is not, and that no repository asks for, is retired:
    after a while it is not found any more, and once no request for it is left its workers may unload it.
    """

    def __init__(
        self,
        models_max: int,
        weights: Mapping[str, float] = _NO_WEIGHTS,
        young_until: float = 0.0,
        epoch: int = 0,
    ) -> None:
        """``weights``: of tenants."""
        self.queues: dict[ModelKey, ModelQueue] = {}
        self._versions: dict[str, set[str]] = {}
        self._declared: dict[str, dict[ModelKey, ModelState]] = {}  # by the worker's name
        self._away: dict[str, None] = {}  # names of workers that have gone, in their order
        self._unheard: set[ModelKey] = set()  # of the queues, those of models that nobody has declared
        self._workers: dict[WorkerPeer, None] = {}  # those that are there
        self._current: dict[str, str] = {}  # the version of each model that is; of none that nobody asks for
        self._terms: dict[str, Route] = {}  # labels and traffic, as whoever spoke last told them
        self._labels: dict[str, dict[str, str]] = {}  # versions, by model and label
        self._retiring: dict[ModelKey, _Retiring] = {}
        self._looks: dict[ModelKey, None] = {}  # of those, what some worker has not been told of that has it
        self.due = _NEVER  # when ``retire`` has something to do, if nothing happens before
        self.builds = Builds(epoch)
        self._young_until = young_until
        self._models_max = models_max
        self._weights = weights

    def declare(self, worker: WorkerPeer, now: float, names: Iterable[str] | None = None) -> list[ModelQueue]:
        """Take in what a worker says of its models, or that it is leaving. ``names``: of those of which it says
        anything new; None: of all. Returns the queues that have ended with it."""
        if names is None:
            names = [name for name, _ in (*worker.models, *self.queues)]
        self._workers[worker] = None
        before = self._declared.get(worker.name, {})
        self._declared[worker.name] = dict(worker.models)
        self._away.pop(worker.name, None)
        changed = dict.fromkeys([*names, *[name for name, _ in before.keys() - worker.models.keys()]])  # in their order
        while len(self._away) > _AWAY_MAX:
            longest = next(iter(self._away))
            del self._away[longest]
            changed |= dict.fromkeys([name for name, _ in self._declared.pop(longest)])
        if worker.leaving and any(_stem(worker.name, other) for other in self._declared.keys() - self._away.keys()):
            del self._declared[worker.name]
        for name in changed:
            for key in worker.versions(name):
                self._unheard.discard(key)
                queue = self.queues.get(key)
                if queue is None and len(self.queues) < self._models_max:
                    queue = self._make(key, now)
                if queue is not None:
                    self._versions.setdefault(name, set()).add(key[1])
                    queue.spec = worker.models[key].spec or queue.spec
            if name in worker.routes:
                self._terms[name] = worker.routes[name]
        gone = []
        for name in changed:
            for key in self._keys(name):
                self._enlist(self.queues[key], worker, now)
                self._see_builds(self.queues[key])
                if not any(key in models for models in self._declared.values()):
                    gone.append(self._forget(key))
            self._route(name, now)
        return gone

    def withdraw(self, worker: WorkerPeer, now: float) -> None:
        """A worker has gone; its models stay known."""
        if worker.name in self._declared:
            self._away[worker.name] = None
        self._workers.pop(worker, None)
        for key in worker.models:
            queue = self.queues.get(key)
            if queue is not None:
                self._dismiss(queue, worker, now)
                self._see_builds(queue)
        for name in {name for name, _ in worker.models}:
            self._route(name, now)

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
        """The queue for requests of this name and version, a label, or "": the current one. Raises PenstockError."""
        queue = self.queues.get((name, version))
        if queue is not None and not queue.retired:
            return queue
        if version and queue is None and self.is_young(now) and len(self.queues) < self._models_max:
            named = self._label(name, version)
            if (name, named) in self.queues:
                return self.queues[name, named]
            self._unheard.add((name, version))
            return self._make((name, version), now)
        if not self._declared:
            raise PenstockError(UNAVAILABLE, "no worker has joined this server yet; try again shortly")
        meant = self._label(name, version) if version else self._current.get(name, "")
        queue = self.queues.get((name, meant)) if meant else None
        if queue is not None and not queue.retired:
            return queue
        if version and name in self._versions:
            raise PenstockError(NOT_FOUND, f"Request for unknown model: '{name}' version {version} is not found")
        raise PenstockError(NOT_FOUND, f"Request for unknown model: '{name}' is not found")

    def current(self, name: str) -> ModelQueue | None:
        """The queue of the version that is current, if there is one."""
        return self.queues.get((name, self._current.get(name, "")))

    def state(self, key: ModelKey) -> ModelState:
        """How a model fares on the server as a whole: as well as on the worker where it fares best."""
        queue, token = self.queues[key], self.builds.token(key)
        spec = queue.spec
        if spec is not None and spec.build != token:
            spec = spec._replace(build=token)
        told = [models[key] for models in self._declared.values() if key in models]
        if queue.workers or queue.sleepers:
            state = READY if queue.workers else IDLE
            reason = next((each.reason for each in told if each.state == state and each.reason), "")
            return ModelState(*key, state, reason, spec)
        loading = [state for state in told if state.state == LOADING]
        failed = [state for state in told if state.state == UNAVAILABLE_STATE]
        if loading:
            return ModelState(*key, LOADING, loading[0].reason, spec)
        reason = failed[0].reason if failed else "no worker serves it at present"
        return ModelState(*key, UNAVAILABLE_STATE, reason, spec)

    def states(self) -> list[ModelState]:
        return [self.state(key) for key in sorted(self.queues.keys() - self._unheard)]

    def routes(self) -> list[Route]:
        """Of every model, as callers are told them."""
        found = []
        for name in sorted(self._versions):
            current, terms = self._current.get(name), self._terms.get(name) or Route(name)
            found.append(terms._replace(versions=() if current is None else (current,)))
        return found

    def retire(self, now: float) -> dict[WorkerPeer, list[ModelKey]]:
        """What workers may unload from now on."""
        may: dict[WorkerPeer, list[ModelKey]] = {}
        self.due = _NEVER
        for key in list(self._looks):
            since, told = self._retiring[key]
            if now >= since:
                queue = self.queues[key]
                queue.retired = True
                untold = self._untold(key)
                if not queue.held or now - since > _RETIRE_MAX_S:
                    for worker in untold:
                        told.add(worker.id)
                        may.setdefault(worker, []).append(key)
                    untold = []
                if not untold:
                    del self._looks[key]
                    continue
            self.due = min(self.due, since)
        return may

    def _untold(self, key: ModelKey) -> list[WorkerPeer]:
        """Who has what retires, and does not know."""
        told = self._retiring[key].told
        return [worker for worker in self._workers if key in worker.models and worker.id not in told]

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
            assert set(queue.sleepers) == {worker for worker in workers if worker.could_serve(key)}, f"{key} sleeps"
            queue.validate()
            builds = {worker.models[key].spec.build for worker in (*queue.workers, *queue.sleepers)}  # type: ignore[union-attr]
            assert bool(self.builds.token(key)) == (len(builds) == 1 and builds != {""}), f"{key} is of {builds}"
        assert self._versions == versions, f"versions {self._versions} are {versions}"
        assert self._away.keys() <= self._declared.keys(), "a worker has gone that never declared anything"
        assert self._unheard == self.queues.keys() - set().union(*self._declared.values()), "a model is (not) declared"
        assert set(self._workers) == set(workers), "a worker is (not) there"
        for name, version in self._current.items():
            assert version in versions.get(name, ()), f"{version} of '{name}' is current, and is not there"
        for name, version in self._retiring:
            assert self._current.get(name) != version, f"{version} of '{name}' is current, and retires"
            assert (name, version) in self.queues, f"{version} of '{name}' retires, and is not there"
            looked = (name, version) in self._looks or not self._untold((name, version))
            assert looked, f"nobody looks whether {version} of '{name}' may be unloaded"
            assert (name, version) in self._looks or self.queues[name, version].retired, f"{version} does not retire"
        assert self._looks.keys() <= self._retiring.keys(), "what does not retire is looked at"
        due = min([self._retiring[key].since for key in self._looks], default=_NEVER)
        assert self.due <= due, f"what retires at {due} is looked at at {self.due}"
        assert {key for key, queue in self.queues.items() if queue.retired} <= self._retiring.keys(), "it came back"

    def _label(self, name: str, label: str) -> str:
        """The version of this name, or ""."""
        return self._labels.get(name, {}).get(label, "")

    def _keys(self, name: str) -> list[ModelKey]:
        return [(name, version) for version in self._versions.get(name, ())]

    def _route(self, name: str, now: float) -> None:
        """Choose the current version of a model anew, and what retires."""
        keys = self._keys(name)
        if not keys:
            self._current.pop(name, None)
            self._terms.pop(name, None)
            self._labels.pop(name, None)
        workers = [worker for worker in self._workers if not worker.leaving and any(worker.versions(name))]
        if not workers and keys:  # they may come back
            stays = [version for _, version in keys if (name, version) not in self._retiring]
            if stays and self._current.get(name) not in stays:
                self._current[name] = newest(stays)
            elif not stays:
                self._current.pop(name, None)
            for key in keys:  # those that are leaving may have it
                if key in self._retiring:
                    self._look_at(key)
            return
        asked = {version for worker in workers for version in worker.asked(name)}
        wanted = {version for worker in workers for version in worker.wanted(name)}
        tallies = {
            version: Tally(version in asked, sum([worker.state((name, version)) in SERVED for worker in workers]))
            for _, version in keys
        }
        current = choose(self._current.get(name, ""), tallies, len(workers))
        if current:
            self._current[name] = current
        else:
            self._current.pop(name, None)
        terms = self._terms.get(name)
        if terms is not None and terms.labels:
            self._labels[name] = dict(terms.labels)
        else:
            self._labels.pop(name, None)
        for key in keys:
            if key[1] == current or key[1] in wanted:
                self.queues[key].retired = False
                self._retiring.pop(key, None)
                self._looks.pop(key, None)
            else:
                self._retiring.setdefault(key, _Retiring(now + RETIRE_AFTER_S, set()))
                self._look_at(key)

    def _look_at(self, key: ModelKey) -> None:
        """See whether what retires may be unloaded."""
        self._looks[key] = None
        self.due = min(self.due, self._retiring[key].since)

    def _enlist(self, queue: ModelQueue, worker: WorkerPeer, now: float) -> None:
        serves = worker.serves(queue.key)
        if serves and worker not in queue.workers:
            queue.enlist(worker)
        elif not serves:
            self._dismiss(queue, worker, now)
        if worker.could_serve(queue.key):
            queue.sleepers[worker] = None
        else:
            queue.sleepers.pop(worker, None)

    @staticmethod
    def _dismiss(queue: ModelQueue, worker: WorkerPeer, now: float) -> None:
        queue.sleepers.pop(worker, None)
        if worker in queue.workers:
            queue.dismiss(worker, now)

    def _see_builds(self, queue: ModelQueue) -> None:
        """What those say that serve it, or would once they are asked to."""
        told = set()
        for worker in (*queue.workers, *queue.sleepers):
            spec = worker.models[queue.key].spec
            told.add("" if spec is None else spec.build)
        self.builds.saw(queue.key, told)

    def _make(self, key: ModelKey, now: float) -> ModelQueue:
        queue = self.queues[key] = ModelQueue(key, None, self._weights)
        queue.unserved_since = now
        return queue

    def _forget(self, key: ModelKey) -> ModelQueue:
        name, version = key
        self._versions[name].discard(version)
        if not self._versions[name]:
            del self._versions[name]
        self._retiring.pop(key, None)
        self._looks.pop(key, None)
        self.builds.forget(key)
        return self.queues.pop(key)


def _stem(one: str, other: str) -> bool:
    """Whether two workers wished for the same name: one has it, and the other its number behind it."""
    short, long = sorted((one, other), key=len)
    number = long[len(short) + 1 :]
    return long.startswith(f"{short}-") and number.isdecimal() and number[0] != "0"
