"""The life of a request on a worker: one table, and nothing else moves a request from state to state."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from penstock.wire.lots import pick, pick_payload, places_of
from penstock.wire.messages import Payload

if TYPE_CHECKING:
    from penstock.worker.batcher import Line
    from penstock.worker.plan import Plan

WAITING: Final = "WAITING"  # in the batcher
RUNNING: Final = "RUNNING"  # in a batch
ENDED: Final = "ENDED"  # answered or cancelled

TABLE: Final[dict[str, dict[str, str]]] = {
    "start": {WAITING: RUNNING},
    "cancel": {WAITING: ENDED, RUNNING: RUNNING},  # what runs cannot be stopped
    "expire": {WAITING: ENDED},  # taken out when its batch was to begin
    "finish": {RUNNING: ENDED},
}


class IllegalTransition(Exception):
    """A defect: an event that cannot happen to a request in its state."""


class Lot:
    """Requests of one form that came in one message and are in the same state. Compared by identity.

    ``payload``: their tensors (see pick_payload), from byte ``start`` on where they lie in one piece. ``arrived``:
    seconds of this process's monotonic clock; ``timeouts_us``: how long after that each may take; ``waited_us``:
    before that; ``first_deadline``: when the first of them has to have ended. ``reads``: their caller reads results
    where they lie in this worker's arena. ``overtakes``: they go before what came earlier and has not begun. ``alone``:
    each runs by itself. ``line``: where the batcher has them wait.
    """

    __slots__ = (
        "alone",
        "arrived",
        "attempt",
        "caller",
        "first_deadline",
        "ids",
        "index",
        "line",
        "overtakes",
        "payload",
        "plan",
        "reads",
        "start",
        "state",
        "timeouts_us",
        "waited_us",
    )

    def __init__(
        self,
        index: dict[int, Lot],
        caller: bytes,
        attempt: int,
        plan: Plan,
        ids: tuple[int, ...],
        timeouts_us: tuple[int, ...],
        payload: Payload,
        start: int,
        waited_us: int,
        arrived: float,
        reads: bool = False,
        overtakes: bool = False,
        alone: bool = False,
    ) -> None:
        self.index = index  # where the worker finds it by its ids
        self.caller = caller
        self.attempt = attempt
        self.plan = plan
        self.ids = ids
        self.timeouts_us = timeouts_us
        self.payload = payload
        self.start = start
        self.waited_us = waited_us
        self.arrived = arrived
        self.reads = reads
        self.overtakes = overtakes
        self.alone = alone
        self.line: Line | None = None
        self.state = WAITING
        self.first_deadline = arrived + min(timeouts_us) * 1e-6

    @property
    def share(self) -> tuple[int, str | bytes]:
        """For whom they are, and how urgent: as the broker has them in line."""
        form = self.plan.form
        return form.priority, form.tenant or self.caller

    @property
    def rows(self) -> int:
        return self.plan.rows * len(self.ids)

    def late(self, until: float) -> list[int]:
        """Those whose time is up by then."""
        if self.first_deadline > until:
            return []
        limits = zip(self.ids, self.timeouts_us, strict=True)
        return [number for number, us in limits if self.arrived + us * 1e-6 <= until]

    def move(self, event: str) -> str:
        """Take the transition for ``event`` and return the new state. Raises IllegalTransition."""
        try:
            self.state = TABLE[event][self.state]
        except KeyError:
            raise IllegalTransition(f"'{event}' cannot happen to {self!r}") from None
        return self.state

    def split(self, part: Sequence[int]) -> Lot:
        """Part with some requests, but not all. The index follows; the batcher does not."""
        inside, outside = places_of(self.ids, part)
        size = self.plan.form.nbytes
        payload, start = self.payload, self.start
        if type(payload) is not tuple:
            if inside[-1] - inside[0] == len(inside) - 1 and outside[-1] - outside[0] == len(outside) - 1:
                # Both lie in one piece still, as they do when a batch takes the first of a lot: nothing to copy.
                parts = [(payload, start + inside[0] * size), (payload, start + outside[0] * size)]
            else:
                own = memoryview(payload)[start:]
                parts = [(pick_payload(own, size, inside), 0), (pick_payload(own, size, outside), 0)]
        else:
            parts = [(pick_payload(payload, size, inside), 0), (pick_payload(payload, size, outside), 0)]
        other = Lot(
            self.index,
            self.caller,
            self.attempt,
            self.plan,
            pick(self.ids, inside),
            pick(self.timeouts_us, inside),
            *parts[0],
            self.waited_us,
            self.arrived,
            self.reads,
            self.overtakes,
            self.alone,
        )
        other.line = self.line
        other.state = self.state
        self.ids = pick(self.ids, outside)
        self.timeouts_us = pick(self.timeouts_us, outside)
        self.first_deadline = self.arrived + min(self.timeouts_us) * 1e-6
        self.payload, self.start = parts[1]
        self.index.update(dict.fromkeys(other.ids, other))
        return other

    def __repr__(self) -> str:
        return f"<requests {self.caller.hex()}:{self.ids} {self.state} attempt {self.attempt}>"
