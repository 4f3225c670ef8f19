"""What the worker's core hears and what it says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

from penstock.wire.events import ArenaCame, BrokerFound, BrokerLost, Drain, FromBroker, Garbage, Log, Say, Tick
from penstock.wire.messages import Loads, Payload, Unload, Wake
from penstock.wire.models import ModelState, Route
from penstock.worker.batcher import Batch
from penstock.worker.execute import Executed
from penstock.worker.model import Model


@dataclass(slots=True)
class Subscribed:
    """One more connection hears the results of a caller."""

    caller: bytes


@dataclass(slots=True)
class Unsubscribed:
    caller: bytes


@dataclass(slots=True)
class Loaded:
    """A version's state has changed. ``model``: it has been loaded, or loaded anew; None: nothing has been."""

    state: ModelState
    model: Model | None


@dataclass(slots=True)
class Tried:
    """It was tried to load a version, which took so long, and was or was not done."""

    name: str
    version: str
    done: bool
    seconds: float


@dataclass(slots=True)
class Renewing:
    """A version is about to be loaded, perhaps in place of what serves: answers are not to be cached any more. With
    ``on`` false that is over, whatever has come of it."""

    name: str
    version: str
    on: bool


@dataclass(slots=True)
class Unwanted:
    """Nobody will ask for a version any more: it can go once nothing of it waits or runs."""

    name: str
    version: str


@dataclass(slots=True)
class Routed:
    """Which versions of a model requests mean has changed; one of no versions: it is not served here any more."""

    route: Route


@dataclass(slots=True)
class Rested:
    """A version is IDLE: it goes from memory once nothing of it waits or runs here."""

    name: str
    version: str


@dataclass(slots=True)
class Followed:
    """All that an order to load has led to has been told before. ``epoch``, ``serial``: of the order."""

    epoch: int
    serial: int


@dataclass(slots=True)
class Grown:
    """There are more compute threads now: so many."""

    instances: int


@dataclass(slots=True)
class DeviceLost:
    """Nothing can run here any more, and the process is about to end."""

    reason: str


@dataclass(slots=True)
class Run:
    """Run a batch; ``Executed`` comes back."""

    batch: Batch
    model: Model


@dataclass(slots=True)
class GiveUp:
    """A batch does not end, and nobody can stop its thread: end the process, once what was said has been sent."""


@dataclass(slots=True)
class Order:
    """For whoever keeps the models: what the broker says of them."""

    message: Unload | Loads | Wake


@dataclass(slots=True)
class Discard:
    """Models that nobody here needs any more: clear the list, which alone holds them, and have their memory
    returned."""

    models: list[Model]


@dataclass(slots=True)
class Publish:
    """To whoever hears the caller's topic."""

    caller: bytes
    head: bytes
    frames: Sequence[Payload]


Event: TypeAlias = (
    FromBroker
    | BrokerFound
    | BrokerLost
    | ArenaCame
    | Subscribed
    | Unsubscribed
    | Loaded
    | Renewing
    | Tried
    | Unwanted
    | Rested
    | Routed
    | Followed
    | Grown
    | DeviceLost
    | Garbage
    | Tick
    | Drain
    | Executed
)
Command: TypeAlias = Run | Say | Publish | Order | Discard | GiveUp | Log
