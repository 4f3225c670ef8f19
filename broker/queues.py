"""What waits for a model: one line per caller and tenant, served in turn, so that nobody's flood is another's wait."""

from __future__ import annotations

from collections import deque
from collections.abc import Container
from typing import TYPE_CHECKING, TypeAlias

from penstock.broker.lots import QUEUED, Lot
from penstock.wire.fifo import Fifo
from penstock.wire.models import ModelSpec

if TYPE_CHECKING:
    from penstock.broker.peers import CallerPeer, WorkerPeer

FlowKey: TypeAlias = tuple[bytes, str]
ModelKey: TypeAlias = tuple[str, str]


class Flow:
    """The requests of one caller and tenant, oldest first."""

    __slots__ = ("caller", "key", "lots")

    def __init__(self, key: FlowKey, caller: CallerPeer) -> None:
        self.key = key
        self.caller = caller
        self.lots: Fifo[Lot] = Fifo()


class ModelQueue:
    """A model version that callers may ask for: what waits for it, and who serves it.

    ``spec`` is the newest that a worker told; it outlives the worker, so that requests can wait while one restarts.
    """

    def __init__(self, key: ModelKey, spec: ModelSpec | None) -> None:
        self.key = key
        self.spec = spec
        self.workers: deque[WorkerPeer] = deque()  # those that have it READY, in the order of their turn
        self.unserved_since = 0.0  # when the last of them left
        self.requests = 0
        self.rows = 0
        self._flows: dict[FlowKey, Flow] = {}
        self._turns: deque[Flow] = deque()

    def push(self, lot: Lot) -> None:
        """Put requests behind the others of their caller and tenant."""
        self._flow(lot).lots.push(lot)
        lot.in_line = True
        self.requests += len(lot.ids)
        self.rows += lot.rows

    def push_front(self, lot: Lot) -> None:
        """Put requests before the others: they have waited once already."""
        self._flow(lot).lots.push_front(lot)
        lot.in_line = True
        self.requests += len(lot.ids)
        self.rows += lot.rows

    def _flow(self, lot: Lot) -> Flow:
        key = (lot.caller.id, lot.form.tenant)
        flow = self._flows.get(key)
        if flow is None:
            flow = self._flows[key] = Flow(key, lot.caller)
            self._turns.append(flow)
        return flow

    def remove(self, lot: Lot) -> None:
        """Take out requests: a lot that waits in its line, or what has been split from one."""
        key = (lot.caller.id, lot.form.tenant)
        flow = self._flows[key]
        if lot.in_line:
            flow.lots.remove(lot)
            lot.in_line = False
        self.requests -= len(lot.ids)
        self.rows -= lot.rows
        if not flow.lots:
            del self._flows[key]
            self._turns.remove(flow)

    def take(self, room: int, enough: int, hears: Container[bytes], full: Container[bytes]) -> list[Lot]:
        """Requests of at most ``room`` rows together and no more than make ``enough``, a share from each line in turn.

        Only from callers in ``hears`` and not in ``full``. A request that does not fit ends the taking: whoever
        overtakes it could keep it waiting for ever.
        """
        taken: list[Lot] = []
        turns, passed, rows = self._turns, 0, 0
        share = enough if len(turns) <= 1 else max(1, enough // len(turns))
        while passed < len(turns) and rows < enough:
            flow = turns[0]
            if flow.caller.id not in hears or flow.caller.id in full:
                turns.rotate(-1)
                passed += 1
                continue
            passed = 0
            lot = flow.lots.first()
            size, count = lot.form.rows, len(lot.ids)
            wanted = min(-(-min(share, enough - rows) // size), (room - rows) // size)
            if not wanted:
                break
            if wanted < count:
                count = wanted
                lot = lot.split(lot.ids[:count])
            else:
                flow.lots.pop().in_line = False
            taken.append(lot)
            rows += count * size
            self.requests -= count
            if not flow.lots:
                turns.popleft()
                del self._flows[flow.key]
            else:
                turns.rotate(-1)
        self.rows -= rows
        return taken

    def lots(self) -> list[Lot]:
        return [lot for flow in self._flows.values() for lot in flow.lots]

    def could_give(self, room: int, hears: Container[bytes], full: Container[bytes]) -> bool:
        """Whether ``take`` with this room would find anything."""
        for flow in self._turns:
            if flow.caller.id in hears and flow.caller.id not in full:
                return next(iter(flow.lots)).form.rows <= room
        return False

    def validate(self) -> None:
        """Derive again what is counted, for tests. Raises AssertionError."""
        lots = self.lots()
        assert self.requests == sum(len(lot.ids) for lot in lots), f"{self.key}: {self.requests} requests in {lots}"
        assert self.rows == sum(lot.rows for lot in lots), f"{self.key}: {self.rows} rows in {lots}"
        assert len(set(lots)) == len(lots), f"{self.key}: a lot waits twice in {lots}"
        assert len(self._turns) == len(self._flows), f"{self.key}: a line has no turn, or two"
        for flow in self._turns:
            assert self._flows.get(flow.key) is flow, f"{self.key}: a line that has ended still has its turn"
            assert flow.lots, f"{self.key}: an empty line"
            assert len(flow.lots) == len(list(flow.lots)), f"{self.key}: a line does not know its length"
            for lot in flow.lots:
                assert flow.key == (lot.caller.id, lot.form.tenant), f"{lot} waits in another's line"
                assert flow.caller is lot.caller, f"{lot} waits in the line of a caller that has gone"
                assert lot.state == QUEUED, f"{lot} waits in a line"
                assert lot.in_line, f"{lot} is not marked as waiting in a line"
                assert lot.model is self, f"{lot} waits for another model"
