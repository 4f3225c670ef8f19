"""What the broker knows of the processes around it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from penstock.broker.lots import ABANDONED, ASSIGNED, DONE, Lot
from penstock.broker.queues import ModelKey
from penstock.wire.codec import ranges
from penstock.wire.messages import MAX_REQUESTS, Cost, Freed
from penstock.wire.metrics import Sample
from penstock.wire.models import READY, ModelState


class CallerPeer:
    """A gateway or a client."""

    def __init__(self, number: bytes, name: str, local: bool, arena_bytes: int, now: float) -> None:
        self.id = number
        self.name = name
        self.local = local  # it reaches Unix sockets of this host
        self.arena_bytes = arena_bytes  # 0: it has none
        self.heard = now
        self.requests: dict[int, Lot] = {}  # those that have not ended for it
        self.last_id = -1  # of its requests: ids only grow
        self.gone = False  # as far as the broker knows
        self.given: dict[bytes, int] = {}  # workers whose arena it has been given, and as which introduction
        self.samples: Sequence[Sample] = ()


class WorkerPeer:
    """A worker, what it serves, and what it holds.

    It takes work for at most one batch more than it has instances, so that it never waits for the broker between two
    batches while everything else can still be cancelled, reordered or given to another.
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
        self.window = instances + 1  # batches
        self._kept_bytes_max = kept_bytes_max
        self.heard = now
        self.leaving = False
        self.models: dict[ModelKey, ModelState] = {}
        self.costs: dict[ModelKey, Cost] = {}
        self.expected: dict[bytes, int] = {}  # callers that it has been told of, and as which introduction
        self.callers: set[bytes] = set()  # those that hear it
        self.readers: set[bytes] = set()  # those that read its arena
        self.batches = 0  # at least so many are needed for the rows that it has not finished
        self._rows: dict[ModelKey, int] = {}
        self._sizes: dict[ModelKey, int] = {}  # rows of a batch
        self.held: dict[bytes, dict[int, Lot]] = {}  # by caller: not finished, or not acknowledged
        self.kept_bytes: dict[bytes, int] = {}  # by caller: results that it keeps until they are acknowledged
        self.full: set[bytes] = set()  # callers that get nothing more here until they have acknowledged some
        self._freed: dict[bytes, list[int]] = {}
        self._freed_ranges: list[Freed] = []
        self._cancelled: dict[bytes, list[int]] = {}
        self.samples: Sequence[Sample] = ()

    def endpoint_for(self, caller: CallerPeer) -> str | None:
        """Where ``caller`` can hear this worker, if it can."""
        for endpoint in self.endpoints:
            if endpoint.startswith("tcp://") or caller.local:
                return endpoint
        return None

    def set_models(self, models: Sequence[ModelState]) -> None:
        self.models = {(state.name, state.version): state for state in models}
        self._sizes |= {key: state.spec.max_batch_size for key, state in self.models.items() if state.spec}
        self.batches = sum(-(-rows // self._sizes[key]) for key, rows in self._rows.items())

    def serves(self, key: ModelKey) -> bool:
        state = self.models.get(key)
        return state is not None and state.state == READY and not self.leaving

    def room(self, key: ModelKey) -> int:
        """How many more rows of a model that it serves it takes."""
        size = self._sizes[key]
        rows = self._rows.get(key, 0)
        others = self.batches - -(-rows // size)
        return (self.window - others) * size - rows

    def add_rows(self, key: ModelKey, rows: int) -> None:
        """Count rows in, or with a negative number out."""
        size = self._sizes[key]
        before = self._rows.get(key, 0)
        after = before + rows
        self.batches += -(-after // size) - -(-before // size)
        if after:
            self._rows[key] = after
        else:
            self._rows.pop(key, None)

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
        kept = +kept
        batches = sum(-(-count // self._sizes[key]) for key, count in rows.items())
        full = {caller for caller, nbytes in kept.items() if nbytes >= self._kept_bytes_max}
        assert self._rows == rows, f"{self.name}: rows {self._rows} are {dict(rows)}"
        assert self.batches == batches, f"{self.name}: {self.batches} batches are {batches}"
        assert self.kept_bytes == kept, f"{self.name}: kept bytes {self.kept_bytes} are {dict(kept)}"
        assert self.full == full, f"{self.name}: full {self.full} is {full}"


def _as_ranges(ids_of: dict[bytes, list[int]]) -> list[Freed]:
    found = []
    for caller, ids in ids_of.items():
        ids.sort()
        for at in range(0, len(ids), MAX_REQUESTS):
            found.append(Freed(caller, ranges(ids[at : at + MAX_REQUESTS])))
    return found
