"""Models that callers have the server load, or serve no more, and what became of that. Pure.

Where orders decide what is served, the set of what was ordered is the broker's, and every worker is told all of it: so
one that starts anew has what the others have. A broker that starts anew takes over what its workers have, in whatever
order they join, but for what it was told meanwhile to serve no more.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from penstock.broker.peers import WorkerPeer
from penstock.wire.errors import BAD_INPUT, NOT_FOUND, OVERLOADED, UNAVAILABLE, PenstockError
from penstock.wire.messages import EXPLICIT, MAX_MODELS, NONE, UNLOAD, Loads, Order
from penstock.wire.models import LOADING, Load
from penstock.wire.models import UNAVAILABLE as UNAVAILABLE_STATE

PENDING_MAX: Final = 64  # orders that workers have not followed yet
CONFIGS_MAX: Final = 4 << 20  # characters of all configurations: every worker is told all of them at each order
_ORDER_MAX_S: Final = 3600.0  # for all of them to follow one: an engine for a GPU may take long to build


@dataclass(slots=True, eq=False)
class Pending:
    """``serial``: the caller's own; ``number``: of the Loads that tell of it; ``waits``: workers that have not followed
    it; ``undone``: a later order has taken it back."""

    caller: bytes
    serial: int
    order: Order
    number: int
    waits: set[bytes]
    until: float
    undone: bool = False


class Orders:
    """What was ordered, in one epoch."""

    def __init__(self) -> None:
        self.loads: dict[str, Load] = {}
        self.number = 0  # of the last Loads
        self._pending: list[Pending] = []
        self._undone: dict[str, None] = {}  # models that are not to be served, whatever a worker was told before

    def tell(self, epoch: int) -> Loads:
        return Loads(epoch, self.number, list(self.loads.values()))

    def join(self, worker: WorkerPeer, loads: Sequence[Load]) -> tuple[bool, bool]:
        """A worker has come that was told these before. Whether it must be told anew, and whether the others must."""
        if worker.control != EXPLICIT:
            return False, False
        grown = False
        for load in loads:
            if load.name not in self.loads and load.name not in self._undone and not self._full(load):
                self.loads[load.name] = load
                grown = True
        return {load.name: load for load in loads} != self.loads, grown

    def _full(self, load: Load) -> str:
        """Why there is no room for one more, or for one in place of what it was, or ""."""
        others = [each.config for name, each in self.loads.items() if name != load.name]
        if len(others) >= MAX_MODELS:
            return f"{MAX_MODELS} models are loaded, which is all that there can be"
        if load.config and sum(map(len, others)) + len(load.config) > CONFIGS_MAX:
            return f"the configurations of all loads have at most {CONFIGS_MAX} characters together; unload some"
        return ""

    def _undo(self, name: str) -> None:
        self.loads.pop(name, None)
        self._undone[name] = None
        if len(self._undone) > MAX_MODELS:
            del self._undone[next(iter(self._undone))]

    def take(self, caller: bytes, order: Order, workers: Collection[WorkerPeer], now: float) -> None:
        """A new order, of which all workers are to be told. Raises PenstockError when it cannot be followed."""
        self._check(order, workers)
        explicit = any(worker.control == EXPLICIT for worker in workers)
        if order.action == UNLOAD:
            if order.model not in self.loads:
                raise PenstockError(NOT_FOUND, f"model '{order.model}' is not loaded; 'penstock models ls' has those")
            self._undo(order.model)
            for each in self._pending:
                each.undone = each.undone or each.order.model == order.model
        elif explicit:
            load = Load(order.model, order.config)
            if problem := self._full(load):
                raise PenstockError(OVERLOADED, problem)
            self.loads[load.name] = load
            self._undone.pop(load.name, None)
        self.number += 1
        waits = {worker.id for worker in workers}
        self._pending.append(Pending(caller, order.serial, order, self.number, waits, now + _ORDER_MAX_S))

    def _check(self, order: Order, workers: Collection[WorkerPeer]) -> None:
        controls = {worker.control for worker in workers}
        if not workers:
            raise PenstockError(UNAVAILABLE, "no worker has joined this server yet; try again shortly", 1.0)
        if len(self._pending) >= PENDING_MAX:
            raise PenstockError(OVERLOADED, f"{PENDING_MAX} models are being loaded; try again shortly", 1.0)
        if NONE in controls:
            raise PenstockError(
                BAD_INPUT,
                "this server serves what its repository had when it began (model_control is 'none'): restart it, or "
                "set model_control in [worker]",
            )
        if controls != {EXPLICIT} and (order.action == UNLOAD or order.config):
            raise PenstockError(
                BAD_INPUT,
                "explicit model load / unload is not allowed: this server follows its repository (model_control is "
                f"'watch'); change what lies in the directory of '{order.model}', or set model_control = \"explicit\" "
                "in [worker]",
            )

    def heard(self, worker: bytes, number: int) -> list[Pending]:
        """A worker has followed all up to a number. Returns what all have followed now."""
        for each in self._pending:
            if each.number <= number:
                each.waits.discard(worker)
        return self._take_done()

    def worker_gone(self, worker: bytes) -> list[Pending]:
        """It is not waited for."""
        for each in self._pending:
            each.waits.discard(worker)
        return self._take_done()

    def caller_gone(self, caller: bytes) -> None:
        self._pending = [each for each in self._pending if each.caller != caller]

    def expire(self, now: float) -> list[Pending]:
        """What was not followed in time."""
        if not self._pending:
            return []
        late = [each for each in self._pending if now >= each.until]
        self._pending = [each for each in self._pending if now < each.until]
        return late

    def _take_done(self) -> list[Pending]:
        done = [each for each in self._pending if not each.waits]
        self._pending = [each for each in self._pending if each.waits]
        return done

    def finish(self, done: Pending, workers: Collection[WorkerPeer]) -> PenstockError | None:
        """Why an order that was followed did not do what it was to, or None. What nobody has is not ordered any more:
        names are the callers' to choose."""
        error, name = outcome(done.order, workers), done.order.model
        if error is None:
            return None
        if done.undone:
            return PenstockError(UNAVAILABLE, f"'{name}' was unloaded while it was being loaded")
        if error.code == NOT_FOUND and not any(each.order.model == name for each in self._pending):
            self._undo(name)
        return error


def outcome(order: Order, workers: Iterable[WorkerPeer]) -> PenstockError | None:
    """Why an order that was followed did not do what it was to, or None."""
    if order.action == UNLOAD:
        return None
    name = order.model
    told = [worker.models[key] for worker in workers for key in worker.versions(name) if key[1] in worker.wanted(name)]
    if not told:
        return PenstockError(NOT_FOUND, f"failed to load '{name}': no worker's repository has a model of that name")
    for state in told:
        if state.state == UNAVAILABLE_STATE:
            return PenstockError(UNAVAILABLE, f"failed to load '{name}', version {state.version}: {state.reason}")
        if state.state == LOADING:
            return PenstockError(UNAVAILABLE, f"'{name}', version {state.version}, is still being loaded", 1.0)
    return None
