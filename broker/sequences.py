"""Sequences: requests that belong together, of one version of a model, run on one worker, one after another.

A sequence begins with a request that says START and ends with one that says END, or when nothing has come of it for the
model's ``max_sequence_idle``. Its first request goes wherever any would; from then on it is bound to that worker. At
most one of its requests is with the worker at a time, the others wait here, in the order in which they came. When the
worker goes, or serves the model no more, what was kept there has gone with it: what was asked of the sequence fails,
and so does what follows, until START is said again. But a first request that was under way is tried elsewhere, as any
is.

What waits here stands beside the lines of its model (``ModelQueue.beside``), so that requests without a sequence pass
it by. A worker that has room is given what is bound to it first, at most a batch; where that leaves no room for others,
these are first the next time.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Final, TypeAlias

from penstock.broker.lots import ASSIGNED, QUEUED, Lot
from penstock.wire.errors import BAD_INPUT, OVERLOADED, PenstockError
from penstock.wire.messages import UNNAMED, Form

if TYPE_CHECKING:
    from penstock.broker.assign import Assigner
    from penstock.broker.peers import WorkerPeer
    from penstock.broker.queues import ModelKey, ModelQueue

START: Final = 1
END: Final = 2

Key: TypeAlias = tuple[str, str, str]  # a model's name, the version that requests name, "" for none, and the sequence


class Chain:
    """A sequence. ``worker``: to which it is bound, None until its first request is given out. ``running``: the request
    whose turn it is, ``waiting``: those behind it. ``ends``: the last of them says so. ``touched``: when something of
    it came, or was done."""

    __slots__ = ("ends", "key", "model", "running", "touched", "waiting", "worker")

    def __init__(self, key: Key, model: ModelQueue, now: float) -> None:
        self.key = key
        self.model = model
        self.worker: WorkerPeer | None = None
        self.running: Lot | None = None
        self.waiting: dict[Lot, None] = {}
        self.ends = False
        self.touched = now

    def is_over(self, now: float) -> bool:
        """Whether nobody has used it for as long as its model allows."""
        return self.running is None and now - self.touched > self.model.sequence_idle_s


class Step:
    """What a request is in its sequence. ``beside``: it waits beside the lines of its model."""

    __slots__ = ("beside", "chain", "starts")

    def __init__(self, chain: Chain, starts: bool, beside: bool) -> None:
        self.chain = chain
        self.starts = starts
        self.beside = beside


class Sequences:
    """Those that are open. ``sequences_max``: at most so many; ``waiting_max``: requests that wait in one of them."""

    def __init__(
        self,
        assigner: Assigner,
        queues: Mapping[ModelKey, ModelQueue],
        sequences_max: int,
        waiting_max: int,
    ) -> None:
        self._assigner = assigner
        self._queues = queues
        self._sequences_max = sequences_max
        self._waiting_max = waiting_max
        self._chains: dict[Key, Chain] = {}

    def __len__(self) -> int:
        return len(self._chains)

    # --- in ---

    def find(self, form: Form, now: float) -> Chain | None:
        """The sequence that a request goes on with; None: it begins one. Raises PenstockError where it cannot be."""
        key = _key_of(form)
        chain = self._chains.get(key)
        if chain is not None and (chain.is_over(now) or self._queues.get(chain.model.key) is not chain.model):
            self._forget(chain)
            chain = None
        if not form.phase & START and (chain is None or chain.ends):
            raise PenstockError(
                BAD_INPUT,
                f"inference request for sequence {form.sequence} to model '{form.model}' must specify the START flag "
                "on the first request of the sequence",
            )
        if chain is not None and len(chain.waiting) >= self._waiting_max:
            raise PenstockError(
                OVERLOADED,
                f"{self._waiting_max} requests of sequence {form.sequence} wait (sequence_requests_max); wait for "
                "their answers",
                1.0,
            )
        if chain is None and len(self._chains) >= self._sequences_max:
            self.sweep(now)
            if len(self._chains) >= self._sequences_max:
                raise PenstockError(
                    OVERLOADED, f"the server keeps {self._sequences_max} sequences (sequences_max); end some", 1.0
                )
        return chain

    def enter(self, lot: Lot, chain: Chain | None, form: Form, now: float) -> None:
        """Have a request wait for its turn: what ``find`` has found."""
        if chain is None:
            chain = Chain(_key_of(form), lot.model, now)
            self._chains[chain.key] = chain
        first = chain.running is None and chain.worker is None
        lot.step = Step(chain, bool(form.phase & START), not first)
        chain.touched = now
        chain.ends = bool(form.phase & END)
        lot.model.push(lot)
        if first:
            chain.running = lot
        else:
            chain.waiting[lot] = None
            self._go_on(chain)

    # --- on ---

    def ended(self, lot: Lot, now: float = 0.0) -> None:
        """A request has been done, or goes no further: it is the next one's turn."""
        assert lot.step is not None
        chain = lot.step.chain
        if chain.running is lot:
            chain.running = None
            chain.touched = max(chain.touched, now)
            if chain.worker is not None:
                self._assigner.bound.leave(chain.worker, lot)
            self._go_on(chain)
        else:
            chain.waiting.pop(lot, None)

    def _go_on(self, chain: Chain) -> None:
        if chain.running is not None:
            return
        lot = next(iter(chain.waiting), None)
        if lot is None:
            if chain.ends:
                self._forget(chain)
            return
        del chain.waiting[lot]
        chain.running = lot
        if chain.worker is not None:
            self._assigner.bound.come(chain.worker, lot)
            self._assigner.look_at(chain.worker)
            return
        assert lot.step is not None
        lot.model.remove(lot)
        lot.step.beside = False
        lot.model.push(lot)
        self._assigner.requests_came(lot.model)

    def _forget(self, chain: Chain) -> None:
        if self._chains.get(chain.key) is chain:
            del self._chains[chain.key]

    def may_try_again(self, lot: Lot) -> bool:
        """Whether a request that was lost with its worker can run on another."""
        step = lot.step
        return step is None or (step.starts and step.chain.running is lot)

    def break_off(self, worker: WorkerPeer, gone: bool) -> list[Lot]:
        """A worker has gone, or serves other models now. Returns the requests that waited for it in vain."""
        in_vain: list[Lot] = []
        for chain in [each for each in self._chains.values() if each.worker is worker]:
            if not gone and worker in chain.model.workers:
                continue
            chain.worker = None
            running, left = chain.running, list(chain.waiting)
            if running is not None:
                assert running.step is not None
                if running.state == QUEUED:
                    self._assigner.bound.leave(worker, running)
                    left.insert(0, running)
                elif gone and running.state == ASSIGNED and running.step.starts:
                    continue  # which is tried elsewhere, and what waits is bound to where that is
            at = next((at for at, lot in enumerate(left) if lot.step is not None and lot.step.starts), len(left))
            in_vain += left[:at]
            chain.running, chain.waiting = None, dict.fromkeys(left[at:])
            if chain.waiting:
                self._go_on(chain)
            else:
                self._forget(chain)
        return in_vain

    def sweep(self, now: float) -> None:
        """Forget what nobody uses any more."""
        for chain in list(self._chains.values()):
            if chain.is_over(now):
                self._forget(chain)

    def validate(self, lots: set[Lot]) -> None:
        """For tests. Raises AssertionError."""
        bound = self._assigner.bound.lots()
        for lot in lots:
            if lot.step is None:
                continue
            chain = lot.step.chain
            if lot.state == QUEUED:
                assert self._chains.get(chain.key) is chain, f"the sequence of {lot} has gone"
                assert lot is chain.running or lot in chain.waiting, f"{lot} waits for no turn"
                assert lot.step.beside == (lot in lot.model.beside), f"{lot} waits in the wrong place"
                ready = lot is chain.running and chain.worker is not None
                assert lot.step.beside == (ready or lot in chain.waiting), f"{lot} waits in the wrong place"
                assert (lot in bound) == ready, f"{lot} waits for no worker"
            elif lot.state == ASSIGNED and lot is chain.running:
                assert chain.worker in (None, lot.worker), f"{lot} is not where its sequence is"
        for key, chain in self._chains.items():
            assert chain.key == key, f"{key} is found as another"
            assert chain.running in lots or chain.running is None, f"{key} waits for what has gone"
            assert chain.waiting.keys() <= lots, f"{key} has what has gone"
            assert chain.running is not None or not chain.waiting, f"of {key} nobody looks at what waits"
            assert chain.running is not None or not chain.ends, f"{key} has ended"
            if chain.worker is not None:
                assert chain.worker in chain.model.workers, f"{key} is bound to a worker that does not serve it"
        assert len(self._chains) <= self._sequences_max, f"there are {len(self._chains)} sequences"
        running = [each.running for each in self._chains.values()]
        assert bound <= set(running), f"{bound} are bound, and it is not their turn"


class Bound:
    """Requests whose turn it is, by the worker that they are bound to."""

    def __init__(self) -> None:
        self._ready: dict[WorkerPeer, dict[Lot, None]] = {}
        self._yields: set[WorkerPeer] = set()  # to others, the next time

    def __bool__(self) -> bool:
        return bool(self._ready)

    def come(self, worker: WorkerPeer, lot: Lot) -> None:
        self._ready.setdefault(worker, {})[lot] = None

    def leave(self, worker: WorkerPeer, lot: Lot) -> None:
        ready = self._ready.get(worker)
        if ready is not None:
            ready.pop(lot, None)
            if not ready:
                del self._ready[worker]
                self._yields.discard(worker)

    def goes_first(self, worker: WorkerPeer) -> bool:
        """Whether it is their turn at a worker, before that of others."""
        return worker in self._ready and worker not in self._yields

    def gone_first(self, worker: WorkerPeer, gave: bool, others: bool) -> None:
        """``gave``: whether they were given something; ``others``: whether the others were then."""
        if gave and not others:
            self._yields.add(worker)
        elif others:
            self._yields.discard(worker)

    def give(self, worker: WorkerPeer, given: dict[WorkerPeer, list[Lot]], now: float, first: bool) -> bool:
        """Give a worker what it has room for; ``first``: a batch at most. Whether there was anything."""
        rows: dict[ModelKey, int] = {}
        for lot in list(self._ready.get(worker, ())):
            key = lot.model.key
            if not may_take(worker, lot) or (first and rows.get(key, 0) + lot.rows > max(worker.size(key), lot.rows)):
                continue
            rows[key] = rows.get(key, 0) + lot.rows
            self.leave(worker, lot)
            lot.model.remove(lot)
            level, pool = lot.model.level(lot.priority), worker.pool
            assert pool is not None
            level.given += lot.rows
            level.charge(lot.share_key, lot.cost_us)
            lot.turn = level.done
            lot.model_turn = pool.charge(lot.model, lot.cost_us)
            pool.assigned_us += lot.cost_us
            worker.add(key, lot.rows, lot.cost_us, now)
            pool.place(worker)
            given.setdefault(worker, []).append(lot)
        return bool(rows)

    def lots(self) -> set[Lot]:
        return {lot for ready in self._ready.values() for lot in ready}

    def validate(self, looked_at: Mapping[WorkerPeer, None]) -> None:
        """Whether nothing has been overlooked, for tests. Raises AssertionError."""
        for worker, ready in self._ready.items():
            assert ready, f"{worker.name} has nothing bound to it, and is remembered"
            if worker not in looked_at:
                assert not any(may_take(worker, lot) for lot in ready), f"{worker.name} may take one of {ready}"


def may_take(worker: WorkerPeer, lot: Lot) -> bool:
    caller = lot.caller.id
    if worker.pool is None or worker not in lot.model.workers or caller not in worker.callers or caller in worker.full:
        return False
    return worker.room(lot.model.key) >= lot.rows


def broken(name: str) -> str:
    """What is said of requests whose sequence was on a worker that has gone."""
    return (
        f"the worker that had this sequence of model '{name}' has gone, or serves it no more, and with it what it "
        "knew; begin the sequence anew, with sequence_start"
    )


def _key_of(form: Form) -> Key:
    return form.model, "" if form.version.startswith(UNNAMED) else form.version, form.sequence
