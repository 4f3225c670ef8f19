"""What the broker says of models: to callers which there are and which version is current, to workers what they may
unload and what is waited for; and orders, from who gave them to who follows them. Pure.

What it has to say is put where the core gathers its commands.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Final

from penstock.broker.events import Command, ToCaller, ToWorker
from penstock.broker.orders import Orders, Pending
from penstock.broker.peers import CallerPeer, WorkerPeer
from penstock.broker.queues import ModelKey, ModelQueue
from penstock.broker.registry import Registry
from penstock.wire.errors import UNAVAILABLE, PenstockError
from penstock.wire.messages import (
    MAX_SENTENCE,
    Failure,
    Models,
    Order,
    Ordered,
    Unload,
    Version,
    Wake,
    WorkerHello,
)

# Between two times that callers are told of models, where these are too many to be told at each change.
_TELL_S: Final = 0.1
_TOLD_AT_ONCE_MAX: Final = 32
_RETIRE_LOOK_S: Final = 0.1  # between two looks whether requests for what nobody asks for have ended


class Catalog:
    """``callers`` and ``workers``: those that have joined, kept by the owner. ``changed``: callers are to be told of
    models."""

    def __init__(
        self,
        epoch: int,
        registry: Registry,
        callers: Mapping[bytes, CallerPeer],
        workers: Mapping[bytes, WorkerPeer],
        say: Callable[[Command], None],
    ) -> None:
        self._epoch = epoch
        self._registry = registry
        self._callers = callers
        self._workers = workers
        self._say = say
        self._orders = Orders()
        self._open = False  # callers are told
        self._tell_at = 0.0  # when they may be told again
        self._retire_at = 0.0
        self.changed = False

    def due(self) -> float:
        """When ``tick`` has something to do."""
        tell = self._tell_at if self.changed and self._open else float("inf")
        if self.changed and self._open and self._registry.builds.withdrawn:
            tell = 0.0
        return min(tell, max(self._retire_at, self._registry.due))

    def open(self) -> None:
        """Workers have had time to join: callers are told from now on."""
        self._open = self.changed = True

    def tick(self, now: float) -> None:
        """Say what is due."""
        for each in self._orders.expire(now):
            late = f"'{each.order.model}' was not loaded in time; 'penstock models ls' says how it fares"
            self._answer(each.caller, each.serial, PenstockError(UNAVAILABLE, late))
        if now >= max(self._retire_at, self._registry.due):
            self._retire_at = now + _RETIRE_LOOK_S
            for worker, keys in self._registry.retire(now).items():
                self._say(ToWorker(worker.id, Unload(self._epoch, [Version(*key) for key in keys])))
        if self.changed and self._open and (now >= self._tell_at or self._registry.builds.withdrawn):
            self._tell_callers()
            if len(self._registry.queues) > _TOLD_AT_ONCE_MAX:
                self._tell_at = now + _TELL_S

    # --- callers ---

    def caller_came(self, caller: CallerPeer) -> None:
        if self._open:
            self._say(ToCaller(caller.id, self._models()))

    def caller_gone(self, caller: CallerPeer) -> None:
        self._orders.caller_gone(caller.id)

    def order(self, caller: CallerPeer, order: Order, now: float) -> None:
        """Have workers follow an order; who gave it is answered when they have."""
        try:
            self._orders.take(caller.id, order, self._workers.values(), now)
        except PenstockError as error:
            self._answer(caller.id, order.serial, error)
            return
        self._tell_loads(self._workers)

    def wake(self, queue: ModelQueue, now: float, wait_s: float) -> None:
        """Have a model loaded for which requests wait, on the worker that has least to do; they wait so long."""
        workers = [worker for worker in queue.sleepers if not worker.apart]
        if workers:
            if not queue.wait_until:
                queue.wait_until = now + wait_s
            least = min(workers, key=lambda worker: worker.assigned_us)
            self._say(ToWorker(least.id, Wake(self._epoch, *queue.key)))

    # --- workers ---

    def worker_came(self, worker: WorkerPeer, hello: WorkerHello) -> None:
        anew, others = self._orders.join(worker, hello.loads)
        self._tell_loads([number for number in self._workers if (anew if number == worker.id else others)])

    def worker_gone(self, worker: WorkerPeer) -> None:
        self._finish(self._orders.worker_gone(worker.id))

    def rest(self, worker: WorkerPeer, keys: Iterable[ModelKey]) -> None:
        """It wants to have these no longer in memory, and gets no more of them."""
        self._say(ToWorker(worker.id, Unload(self._epoch, [Version(*key) for key in keys])))

    def heard(self, worker: WorkerPeer, number: int) -> None:
        """It has followed all orders up to a number."""
        self._finish(self._orders.heard(worker.id, number))

    # --- what is said ---

    def _models(self) -> Models:
        repository = next((each.repository for each in self._workers.values() if each.repository), "")
        return Models(self._epoch, self._registry.states(), self._registry.routes(), repository)

    def _tell_callers(self) -> None:
        self.changed = self._registry.builds.withdrawn = False
        told = self._models()
        for number in self._callers:
            self._say(ToCaller(number, told))

    def _tell_loads(self, workers: Iterable[bytes]) -> None:
        for number in workers:
            self._say(ToWorker(number, self._orders.tell(self._epoch)))

    def _finish(self, done: Iterable[Pending]) -> None:
        """Orders that all workers have followed."""
        for each in done:
            self._answer(each.caller, each.serial, self._orders.finish(each, self._workers.values()))

    def _answer(self, caller: bytes, serial: int, error: PenstockError | None) -> None:
        failure = None
        if error is not None:
            failure = Failure(error.code, error.message[:MAX_SENTENCE], int(error.retry_after_s * 1000))
        elif self.changed and self._open:
            self._tell_callers()  # before: who is told that a model is loaded may ask it at once
        self._say(ToCaller(caller, Ordered(self._epoch, serial, failure)))
