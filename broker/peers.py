"""What the broker knows of the processes around it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence

from penstock.broker.costs import batch_us
from penstock.broker.lots import ABANDONED, ASSIGNED, DONE, Lot
from penstock.broker.pools import Pool
from penstock.broker.queues import ModelKey
from penstock.wire.codec import ranges
from penstock.wire.lots import lots_of
from penstock.wire.messages import MAX_MODELS, MAX_REQUESTS, WATCH, Cost, Freed, Version, WorkerModels
from penstock.wire.metrics import Series
from penstock.wire.models import IDLE, READY, ModelState, Route


class CallerPeer:
    """A gateway or a client."""

    def __init__(
        self, number: bytes, name: str, local: bool, arena_bytes: int, now: float, sent_before: int = -1
    ) -> None:
        self.id = number
        self.name = name
        self.local = local  # it reaches Unix sockets of this host
        self.arena_bytes = arena_bytes  # 0: it has none
        self.heard = now
        self.sent_before = sent_before  # requests up to this id may have been on a worker before it said hello
        self.requests: dict[int, Lot] = {}  # those that have not ended for it
        self.rows = 0  # of its requests that the broker has not forgotten
        self.nbytes = 0  # of their tensors, wherever they lie
        self.last_id = -1  # of its requests: ids only grow
        self.gone = False  # as far as the broker knows
        self.given: dict[bytes, int] = {}  # workers whose arena it has been given, and as which introduction
        self.series = Series()


class WorkerPeer:
    """A worker, what it serves, and what it holds.

    It takes work for at most one batch more than it has instances, so that it never waits for the broker between two
    batches while everything else can still be cancelled, reordered or given to another; and beyond that, what may go
    before what waits there.
    """

    def __init__(
        self,
        number: bytes,
        name: str,
        device: str,
        endpoints: Sequence[str],
        instances: int,
        kept_bytes_max: int,
        now: float,
    ) -> None:
        self.id = number
        self.name = name
        self.device = device
        self.endpoints = endpoints
        self.instances = instances
        self.window = instances + 1  # batches
        self.pool: Pool | None = None  # of those that serve the same models; none if it serves none
        self.bucket = -1  # its place there: by its batches,
        self.open: tuple[ModelKey, ...] = ()  # or by models of which it takes rows though it takes no other batch
        self.assigned_us = 0  # what it is expected to take for what it has not finished
        self._busy_since = 0.0  # when it began with that, or last finished something
        self._kept_bytes_max = kept_bytes_max
        self.heard = now
        self.spoke = False  # it has said more than hello
        self.pinged = 0.0  # when it was last asked whether it lives; unanswered if that is later than it was heard
        self.leaving = False
        self.apart = False  # takes nothing but suspects, one at a time
        self.models: dict[ModelKey, ModelState] = {}
        self.routes: dict[str, Route] = {}  # of these
        self.control = WATCH
        self.repository = ""
        self.loads_heard = 0  # the serial of those that it has followed
        self._by_name: dict[str, list[ModelKey]] = {}  # its models
        self.costs: dict[ModelKey, Cost] = {}
        self.expected: dict[bytes, int] = {}  # callers that it has been told of, and as which introduction
        self.callers: set[bytes] = set()  # those that hear it
        self.readers: set[bytes] = set()  # those that read its arena
        self.batches = 0  # at least so many are needed for the rows that it has not finished
        self._rows: dict[ModelKey, int] = {}
        self._left_us = 0  # what these take in batches; -1: not known yet
        self._sizes: dict[ModelKey, int] = {}  # rows of a batch
        self._windows: dict[ModelKey, int] = {}  # batches of one model
        self.held: dict[bytes, dict[int, Lot]] = {}  # by caller: not finished, or not acknowledged
        self.kept_bytes: dict[bytes, int] = {}  # by caller: results that it keeps until they are acknowledged
        self.full: set[bytes] = set()  # callers that get nothing more here until they have acknowledged some
        self._freed: dict[bytes, list[int]] = {}
        self._freed_ranges: list[Freed] = []
        self._cancelled: dict[bytes, list[int]] = {}
        self.series = Series()

    def endpoint_for(self, caller: CallerPeer) -> str | None:
        """Where ``caller`` can hear this worker, if it can."""
        for endpoint in self.endpoints:
            if endpoint.startswith("tcp://") or caller.local:
                return endpoint
        return None

    def set_models(self, models: Sequence[ModelState], routes: Sequence[Route] = ()) -> None:
        """All of its models."""
        self.models = {(state.name, state.version): state for state in models}
        self.routes = {}
        self._take(routes)

    def falls_asleep(self, told: WorkerModels) -> list[ModelKey]:
        """What is IDLE now, and was not."""
        keys = [(state.name, state.version) for state in told.models if state.state == IDLE]
        return [key for key in keys if self.state(key) != IDLE]

    def change_models(self, told: WorkerModels) -> set[str]:
        """What is new of its models. Returns the names of those that have changed."""
        for name, version in told.gone:
            self.models.pop((name, version), None)
        for state in told.models:
            key = state.name, state.version
            if key in self.models or len(self.models) < MAX_MODELS:
                self.models[key] = state
        self.loads_heard = max(self.loads_heard, told.heard)
        self._take(told.routes)
        changed: list[ModelState | Version | Route] = [*told.models, *told.gone, *told.routes]
        return {each.name for each in changed}

    def _take(self, routes: Sequence[Route]) -> None:
        self._by_name = {}
        for key in self.models:
            self._by_name.setdefault(key[0], []).append(key)
        self.routes |= {route.name: route for route in routes}
        self.routes = {name: route for name, route in self.routes.items() if name in self._by_name}
        self._resize()

    def versions(self, name: str) -> Sequence[ModelKey]:
        """Those that it declares of a model."""
        return self._by_name.get(name, ())

    def asked(self, name: str) -> Collection[str]:
        """The versions that its repository asks for where none is named; all of them if it has not said."""
        route = self.routes.get(name)
        return [version for _, version in self.versions(name)] if route is None else route.versions

    def wanted(self, name: str) -> Collection[str]:
        """Likewise, by whatever name."""
        route = self.routes.get(name)
        return [version for _, version in self.versions(name)] if route is None else route.wanted

    def grow(self, instances: int) -> None:
        """It runs so many batches at once from now on."""
        self.instances, self.window = instances, instances + 1
        self._resize()

    def learn(self, costs: Sequence[Cost]) -> None:
        """What its models take here."""
        self.costs |= {key: cost for cost in costs if (key := (cost.model, cost.version)) in self.models}
        self._resize()

    def _resize(self) -> None:
        self._left_us = -1
        # Of what it declares or still runs, and of nothing that it ever declared: names are its own to choose.
        known = self.models.keys() | self._rows.keys()
        self.costs = {key: cost for key, cost in self.costs.items() if key in known}
        self._sizes = {key: size for key, size in self._sizes.items() if key in known}
        self._windows = {key: window for key, window in self._windows.items() if key in known}
        for key, state in self.models.items():
            if state.spec is not None:
                size, cost = state.spec.max_batch_size, self.costs.get(key)
                self._sizes[key] = size if cost is None else min(size, cost.batch_rows)
                self._windows[key] = self.window if cost is None else min(self.window, cost.instances + 1)
        self.batches = sum(-(-rows // self._sizes[key]) for key, rows in self._rows.items())

    def serves(self, key: ModelKey) -> bool:
        state = self.models.get(key)
        return state is not None and state.state == READY and not self.leaving

    def could_serve(self, key: ModelKey) -> bool:
        """Whether it loads a model once it is asked to."""
        return self.state(key) == IDLE and not self.leaving

    def state(self, key: ModelKey) -> str:
        state = self.models.get(key)
        return "" if state is None else state.state

    def room(self, key: ModelKey, more: int = 0) -> int:
        """How many more rows of a model that it serves it takes, if it may be given so many batches ``more``."""
        if self.apart:
            return 0
        size = self._sizes[key]
        rows = self._rows.get(key, 0)
        others = self.batches - -(-rows // size)
        return (min(self.window - others, self._windows[key]) + more) * size - rows

    def size(self, key: ModelKey) -> int:
        """Rows of a batch of a model that it serves."""
        return self._sizes[key]

    def open_models(self) -> tuple[ModelKey, ...]:
        """Those of which it has an unfinished batch that is not full."""
        return tuple([key for key in self._rows if self.serves(key) and self.room(key) > 0])

    def batch_us(self, key: ModelKey, rows: int) -> int:
        """What a batch of a model is expected to take here, 0 if nobody knows."""
        cost = self.costs.get(key)
        return batch_us(cost, rows) if cost is not None else 0

    def left_s(self, now: float) -> float:
        """How long it is expected to be busy with what it has, in batches as they are: a row that is alone in its batch
        may take as long as a full one."""
        us = self._left_us
        if us < 0:
            us = 0
            for key, rows in self._rows.items():
                cost = self.costs.get(key)
                if cost is not None:
                    full, rest = divmod(rows, self._sizes[key])
                    us += full * batch_us(cost, self._sizes[key]) + (batch_us(cost, rest) if rest else 0)
            self._left_us = us
        return max(0.0, us * 1e-6 / self.instances - (now - self._busy_since)) if us else 0.0

    def add(self, key: ModelKey, rows: int, us: int, now: float) -> None:
        """Count in what it has been given."""
        if not self._rows:
            self._busy_since = now
        self.assigned_us += us
        self._add_rows(key, rows)

    def subtract(self, lot: Lot, now: float) -> None:
        """Count out what it has finished."""
        self._busy_since = now
        us = lot.cost_us * len(lot.ids)
        self.assigned_us -= us
        if self.pool is not None:
            self.pool.assigned_us -= us
        self._add_rows(lot.model.key, -lot.rows)

    def _add_rows(self, key: ModelKey, rows: int) -> None:
        self._left_us = -1
        size = self._sizes[key]
        before = self._rows.get(key, 0)
        after = before + rows
        self.batches += -(-after // size) - -(-before // size)
        if after:
            self._rows[key] = after
        else:
            self._rows.pop(key, None)

    def take_from(self, lot: Lot, now: float) -> list[Lot]:
        """Forget what it still runs of an earlier life of a caller, and is given again. Returns what that is."""
        held = self.held.get(lot.caller.id, {})
        before = lots_of(held, lot.ids)
        for each in before:
            self.subtract(each, now)
            for number in each.ids:
                del held[number]
        return before

    def hold(self, lot: Lot) -> None:
        held = self.held.get(lot.caller.id)
        if held is None:
            held = self.held[lot.caller.id] = {}
        held.update(dict.fromkeys(lot.ids, lot))

    def release(self, lot: Lot) -> None:
        """Forget requests, and have the worker forget their results; but not those of a caller that has gone without
        having said that it has them: it may have been stopped, and read them when it is continued. Of these the worker
        knows itself."""
        caller = lot.caller.id
        held = self.held[caller]
        for number in lot.ids:
            del held[number]
        if not held:
            del self.held[caller]
        if not lot.caller.gone:
            freed = self._freed.get(caller)
            if freed is None:
                self._freed[caller] = list(lot.ids)
            else:
                freed += lot.ids
        if lot.kept_bytes:
            left = self.kept_bytes[caller] = self.kept_bytes[caller] - lot.kept_bytes * len(lot.ids)
            if not left:
                del self.kept_bytes[caller]
            if left < self._kept_bytes_max:
                self.full.discard(caller)

    def keep(self, caller: bytes, nbytes: int) -> None:
        """Count bytes of results that it keeps for a caller."""
        if nbytes:
            kept = self.kept_bytes[caller] = self.kept_bytes.get(caller, 0) + nbytes
            if kept >= self._kept_bytes_max:
                self.full.add(caller)

    def cancel(self, lot: Lot) -> None:
        self._cancelled.setdefault(lot.caller.id, []).extend(lot.ids)

    def free(self, caller: bytes, acknowledged: Sequence[int]) -> None:
        """Pass on what a caller has acknowledged, of which only workers may know. ``acknowledged``: ranges."""
        self._freed_ranges.append(Freed(caller, tuple(acknowledged)))

    @property
    def has_urgent_news(self) -> bool:
        return bool(self._cancelled or self._freed_ranges)

    @property
    def has_news(self) -> bool:
        return bool(self._freed) or self.has_urgent_news

    def take_freed(self) -> list[Freed]:
        freed, self._freed = self._freed, {}
        ranges, self._freed_ranges = self._freed_ranges, []
        return _as_ranges(freed) + ranges

    def take_cancelled(self) -> list[Freed]:
        cancelled, self._cancelled = self._cancelled, {}
        return _as_ranges(cancelled)

    def forget_caller(self, caller: bytes) -> None:
        self.expected.pop(caller, None)
        self.callers.discard(caller)
        self.readers.discard(caller)
        self._freed.pop(caller, None)
        self._cancelled.pop(caller, None)
        self._freed_ranges = [freed for freed in self._freed_ranges if freed.caller != caller]

    def validate(self) -> None:
        """Derive again what is counted, for tests. Raises AssertionError."""
        rows: Counter[ModelKey] = Counter()
        kept: Counter[bytes] = Counter()
        assigned_us = 0
        for caller, index in self.held.items():
            lots = set(index.values())
            assert lots, f"{self.name} holds nothing for {caller.hex()}, and still remembers it"
            assert len(index) == sum(len(lot.ids) for lot in lots), f"{self.name} holds parts of {lots}"
            for lot in lots:
                assert lot.worker is self, f"{lot} is not on {self.name}"
                assert lot.caller.id == caller, f"{lot} is held for {caller.hex()}"
                assert all(index.get(number) is lot for number in lot.ids), f"{lot} cannot be found on {self.name}"
                if lot.state == DONE:
                    kept[caller] += lot.kept_bytes * len(lot.ids)
                else:
                    assert lot.state in (ASSIGNED, ABANDONED), f"{lot} is held by {self.name}"
                    rows[lot.model.key] += lot.rows
                    assigned_us += lot.cost_us * len(lot.ids)
        kept = +kept
        batches = sum(-(-count // self._sizes[key]) for key, count in rows.items())
        full = {caller for caller, nbytes in kept.items() if nbytes >= self._kept_bytes_max}
        assert self._rows == rows, f"{self.name}: rows {self._rows} are {dict(rows)}"
        assert self.batches == batches, f"{self.name}: {self.batches} batches are {batches}"
        assert self.assigned_us == assigned_us, f"{self.name}: {self.assigned_us} us are {assigned_us}"
        assert self.kept_bytes == kept, f"{self.name}: kept bytes {self.kept_bytes} are {dict(kept)}"
        assert self.full == full, f"{self.name}: full {self.full} is {full}"


def _as_ranges(ids_of: dict[bytes, list[int]]) -> list[Freed]:
    found = []
    for caller, ids in ids_of.items():
        ids.sort()
        for at in range(0, len(ids), MAX_REQUESTS):
            found.append(Freed(caller, ranges(ids[at : at + MAX_REQUESTS])))
    return found
