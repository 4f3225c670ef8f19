"""Which requests are the same, and who waits for whom: the response cache without any store, socket or clock.

Requests are the same when they ask the same build of the same version for the same outputs of the same bytes, in
whatever protocol, encoding or priority. Their key is a cryptographic hash of all that, so that nobody can make up a
request whose answer others get for theirs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any, Final, Generic, NamedTuple, TypeVar

import msgpack
from blake3 import blake3

from penstock.wire.codec import pack_layout, unpack_layout, unpack_outcome
from penstock.wire.messages import Form
from penstock.wire.models import Layout, ModelSpec
from penstock.wire.tensors import Buffer

KEY_BYTES: Final = 32
LEADS: Final = "leads"  # it is to be computed, for all that ask the same meanwhile
WAITS: Final = "waits"  # for the one that leads
PAST: Final = "past"  # too many wait already: it is to be computed for itself
REFRESH: Final = "no-cache"  # what is kept is not for this request; its own answer is kept
NO_STORE: Final = "no-store"  # nor is that
_FORMAT: Final = 1  # of what goes into a key
_OUTCOMES_MAX: Final = 1024

W = TypeVar("W")
F = TypeVar("F", bound="Flight[Any]")


def read_cache_control(headers: Mapping[str, bytes]) -> str:
    """REFRESH, NO_STORE or "", from a request's headers by lower-case name. What else they may say changes nothing."""
    said = {each.strip().lower() for each in headers.get("cache-control", b"").split(b",")}
    if b"no-store" in said:
        return NO_STORE
    return REFRESH if b"no-cache" in said else ""


def form_key(form: Form, spec: ModelSpec) -> bytes:
    """What all requests of a form have in common, as the key of the hash of their bytes. All outputs in the model's own
    order are the same as none named; whose request it is, and how urgent, does not matter."""
    layout = unpack_layout(form.body)
    if layout.outputs == tuple([each.name for each in spec.outputs]):
        layout = Layout(layout.tensors)
    said: bytes = msgpack.packb((_FORMAT, spec.name, spec.version, spec.build, pack_layout(layout)))
    return blake3(said).digest()


def request_key(form_key: bytes, payload: Buffer) -> bytes:
    """Of one request: KEY_BYTES bytes."""
    return blake3(payload, key=form_key).digest()


class Ran(NamedTuple):
    """What an answer says that it is of."""

    model: str
    version: str


@lru_cache(maxsize=_OUTCOMES_MAX)
def ran(body: bytes) -> Ran:
    """Of a packed Outcome. Raises BadMessage."""
    outcome = unpack_outcome(body)
    return Ran(outcome.model, outcome.version)


class Flight(Generic[W]):
    """An answer that is being computed. ``leader``: whose request it is that is, None when its client has left and
    others wait. ``waiting``: those others, in their order. ``over``: it has landed, or nobody wants it any more."""

    __slots__ = ("key", "leader", "over", "waiting")

    def __init__(self, key: bytes, leader: W) -> None:
        self.key = key
        self.leader: W | None = leader
        self.waiting: dict[W, None] = {}
        self.over = False


class Flights(Generic[W, F]):
    """Answers that are being computed, and who waits for them. Each that has joined ends once: it lands with its
    flight, fails as the one that leads, or leaves. ``waiting``: how many wait, for all flights."""

    def __init__(self, waiting_max: int, make: Callable[[bytes, W], F]) -> None:
        """``make``: a flight, of its key and who leads it."""
        self._waiting_max = waiting_max
        self._make = make
        self._flights: dict[bytes, F] = {}
        self.waiting = 0

    def __len__(self) -> int:
        return len(self._flights)

    def join(self, key: bytes, who: W) -> tuple[str, F]:
        """Whether it LEADS, WAITS, or has to go PAST; and the flight of this key."""
        flight = self._flights.get(key)
        if flight is None:
            flight = self._flights[key] = self._make(key, who)
            return LEADS, flight
        if self.waiting >= self._waiting_max:
            return PAST, flight
        flight.waiting[who] = None
        self.waiting += 1
        return WAITS, flight

    def land(self, flight: F) -> list[W]:
        """The answer is there. Returns those that have waited for it, beside the one that leads."""
        self._end(flight)
        waiting: list[W] = list(flight.waiting)
        self.waiting -= len(waiting)
        flight.waiting.clear()
        return waiting

    def fail(self, flight: F) -> W | None:
        """Nothing has come of the request that was computed, which ends with that. Returns whose is to be instead, and
        leads from now on; None: nobody waits, so the flight is over."""
        if not flight.waiting:
            self._end(flight)
            flight.leader = None
            return None
        leader: W = next(iter(flight.waiting))
        flight.leader = leader
        del flight.waiting[leader]
        self.waiting -= 1
        return leader

    def leave(self, flight: F, who: W) -> bool:
        """It does not want the answer any more. Whether nobody does, so that what is computed is to be cancelled."""
        if flight.over:
            return False
        if flight.leader is who:
            flight.leader = None
        elif who in flight.waiting:
            del flight.waiting[who]
            self.waiting -= 1
        if flight.leader is not None or flight.waiting:
            return False
        self._end(flight)
        return True

    def _end(self, flight: F) -> None:
        assert not flight.over, "a flight lands once"
        flight.over = True
        del self._flights[flight.key]

    def validate(self) -> None:
        """For tests. Raises AssertionError."""
        assert self.waiting == sum([len(each.waiting) for each in self._flights.values()]) <= self._waiting_max
        for key, flight in self._flights.items():
            assert key == flight.key, f"{key!r} is of {flight.key!r}"
            assert not flight.over, f"{key!r} is over"
            assert flight.leader is not None or flight.waiting, f"nobody wants {key!r}"
            assert flight.leader not in flight.waiting, "one waits for itself"
