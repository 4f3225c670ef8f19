"""The life of a request in the broker: one table, and nothing else moves a request from state to state.

A request ends twice: for its caller (acknowledged, refused, or no longer wanted) and on its worker (DONE). Until both
have happened it is kept; ABANDONED is the time in between, when the caller has no more interest and the worker still
has it. The picture in ARCHITECTURE.md is drawn from TABLE.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final, NamedTuple

from penstock.wire.lots import pick, pick_payload, places_of
from penstock.wire.messages import DEFAULT_PRIORITY, Form, Payload

if TYPE_CHECKING:
    from penstock.broker.peers import CallerPeer, WorkerPeer
    from penstock.broker.queues import ModelQueue
    from penstock.broker.sequences import Step
    from penstock.broker.shares import ShareKey

QUEUED: Final = "QUEUED"  # waits for a worker
ASSIGNED: Final = "ASSIGNED"  # a worker has it
DONE: Final = "DONE"  # the worker has published its result, which its caller has not acknowledged
ABANDONED: Final = "ABANDONED"  # a worker has it, its caller wants nothing more of it
ENDED: Final = "ENDED"

TABLE: Final[dict[str, dict[str, str]]] = {
    "assign": {QUEUED: ASSIGNED},
    "done": {ASSIGNED: DONE, ABANDONED: ENDED},
    # An acknowledgment may overtake DONE, or come for the result of a worker that was thought lost.
    "acknowledge": {QUEUED: ENDED, ASSIGNED: ABANDONED, DONE: ENDED},
    "drop": {QUEUED: ENDED, ASSIGNED: ABANDONED, DONE: ENDED},  # cancelled, expired, or its caller is gone
    "lose": {ASSIGNED: QUEUED, DONE: QUEUED, ABANDONED: ENDED},  # its worker is gone
    "refuse": {QUEUED: ENDED},
}


class IllegalTransition(Exception):
    """A defect: an event that cannot happen to a request in its state."""


class Death(NamedTuple):
    """A worker that was lost while a request was alone there."""

    worker: bytes
    name: str
    reason: str


class Lot:
    """Requests of one form that came in one message and are in the same state. Compared by identity.

    ``payload``: their tensors (see pick_payload), or where they lie in the caller's arena when they are ``placed``
    there. ``accepted``: when they came, seconds of the broker's monotonic clock; ``timeouts_us``: how long after that
    each may take. ``attempt``: how often they have been assigned. ``kept_bytes``: what their worker keeps of each one's
    result. ``due``: when the first of them must be done. ``cost_us``: what each is expected to take of a worker.
    ``priority`` and ``share_key``: where they stand in line. ``turn`` and ``model_turn``: when, in virtual time, it was
    their tenant's turn, and their model's. ``overtakes``: they go before what their worker was given and has not begun.
    ``suspect``: a worker died that had not finished them, so they run alone, one at a time; ``deaths``: of workers that
    they were alone on. ``step``: what it is in a sequence, which no other request shares; None: it is in none.
    """

    __slots__ = (
        "accepted",
        "attempt",
        "caller",
        "cost_us",
        "deaths",
        "due",
        "form",
        "ids",
        "in_line",
        "kept_bytes",
        "model",
        "model_turn",
        "overtakes",
        "payload",
        "placed",
        "priority",
        "share_key",
        "state",
        "step",
        "suspect",
        "timeouts_us",
        "turn",
        "unnamed",
        "worker",
    )

    def __init__(
        self,
        caller: CallerPeer,
        model: ModelQueue,
        form: Form,
        ids: tuple[int, ...],
        timeouts_us: tuple[int, ...],
        payload: Payload,
        placed: bool,
        accepted: float,
        cost_us: int = 0,
    ) -> None:
        self.caller = caller
        self.model = model
        self.form = form
        self.ids = ids
        self.timeouts_us = timeouts_us
        self.payload = payload
        self.placed = placed
        self.accepted = accepted
        self.cost_us = cost_us
        self.due = accepted + min(timeouts_us) * 1e-6
        self.priority = form.priority or DEFAULT_PRIORITY
        self.share_key: ShareKey = form.tenant or caller.id  # who names no tenant is one
        self.state = QUEUED
        self.attempt = 0
        self.worker: WorkerPeer | None = None
        self.kept_bytes = 0
        self.in_line = False  # the queue's own mark
        self.turn = 0.0
        self.model_turn = 0.0
        self.overtakes = False
        self.suspect = False
        self.unnamed = False  # another version would do
        self.deaths: tuple[Death, ...] = ()
        self.step: Step | None = None

    @property
    def unfinished(self) -> bool:
        """Whether a worker has them, and may be running them."""
        return self.state in (ASSIGNED, ABANDONED)

    @property
    def rows(self) -> int:
        return self.form.rows * len(self.ids)

    @property
    def came_before(self) -> bool:
        """Whether a worker may have had some of them before their caller said hello."""
        sent = self.caller.sent_before
        return sent >= 0 and min(self.ids) <= sent

    @property
    def held_bytes(self) -> int:
        """What the broker itself holds of each request's tensors."""
        return 0 if self.placed else self.form.nbytes

    def late(self, now: float) -> list[int]:
        """Those that should have been done by a time."""
        limits = zip(self.ids, self.timeouts_us, strict=True)
        return [number for number, us in limits if self.accepted + us * 1e-6 <= now]

    def move(self, event: str) -> str:
        """Take the transition for ``event`` and return the new state. Raises IllegalTransition."""
        try:
            self.state = TABLE[event][self.state]
        except KeyError:
            raise IllegalTransition(f"'{event}' cannot happen to {self!r}") from None
        return self.state

    def split(self, part: Sequence[int]) -> Lot:
        """Part with some requests, but not all. The indexes of their caller and worker follow; a queue does not."""
        inside, outside = places_of(self.ids, part)
        other = Lot(
            self.caller,
            self.model,
            self.form,
            pick(self.ids, inside),
            pick(self.timeouts_us, inside),
            pick_payload(self.payload, self.form.nbytes, inside),
            self.placed,
            self.accepted,
            self.cost_us,
        )
        other.state = self.state
        other.attempt = self.attempt
        other.worker = self.worker
        other.kept_bytes = self.kept_bytes
        other.unnamed = self.unnamed
        other.suspect, other.deaths = self.suspect, self.deaths
        other.turn, other.model_turn, other.overtakes = self.turn, self.model_turn, self.overtakes
        self.ids = pick(self.ids, outside)
        self.timeouts_us = pick(self.timeouts_us, outside)
        self.due = self.accepted + min(self.timeouts_us) * 1e-6
        self.payload = pick_payload(self.payload, self.form.nbytes, outside)
        index = dict.fromkeys(other.ids, other)
        if self.state != ABANDONED:
            self.caller.requests.update(index)
        if self.worker is not None:
            self.worker.held[self.caller.id].update(index)
        return other

    def __repr__(self) -> str:
        return f"<requests {self.caller.id.hex()}:{self.ids} {self.state} attempt {self.attempt}>"
