"""The life of a request at its caller: one table, and nothing else moves a call from state to state."""

from __future__ import annotations

from typing import Final

from penstock.client.events import Sink
from penstock.wire.messages import Form, Payload

WAITING: Final = "WAITING"  # goes with the next message to the broker
SENT: Final = "SENT"
AGAIN: Final = "AGAIN"  # was sent to a broker that has gone, and goes with the next message, to the next
ENDED: Final = "ENDED"  # with a result, an error, or because nobody wants it any more

TABLE: Final[dict[str, dict[str, str]]] = {
    "send": {WAITING: SENT, AGAIN: SENT},
    "partial": {SENT: SENT, AGAIN: AGAIN},  # more of its result will follow
    "lose": {SENT: AGAIN},
    "end": {WAITING: ENDED, SENT: ENDED, AGAIN: ENDED},  # a worker may have had what is to be sent again
}


class IllegalTransition(Exception):
    """A defect: an event that cannot happen to a call in its state."""


class Call:
    """A request that its caller waits for, with all that it takes to send it again. ``deadline``: seconds of this
    process's monotonic clock."""

    __slots__ = ("deadline", "form", "id", "payload", "sink", "state", "timeout_s")

    def __init__(
        self,
        number: int,
        form: Form,
        payload: Payload,
        timeout_s: float,
        deadline: float,
        sink: Sink,
        state: str = WAITING,
    ) -> None:
        """``state``: SENT for one that its shell sends at once."""
        self.id = number
        self.form = form
        self.payload = payload
        self.timeout_s = timeout_s
        self.deadline = deadline
        self.sink = sink
        self.state = state

    def move(self, event: str) -> str:
        """Take the transition for ``event`` and return the new state. Raises IllegalTransition."""
        try:
            self.state = TABLE[event][self.state]
        except KeyError:
            raise IllegalTransition(f"'{event}' cannot happen to {self!r}") from None
        return self.state

    def __repr__(self) -> str:
        return f"<call {self.id} {self.state}>"
