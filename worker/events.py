"""What the worker's core hears and what it says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

from penstock.wire.events import ArenaCame, BrokerFound, BrokerLost, Drain, FromBroker, Garbage, Log, Say, Tick
from penstock.wire.messages import Payload
from penstock.wire.models import ModelState
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
    """A model's state has changed. ``model`` is there when it is READY."""

    state: ModelState
    model: Model | None


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
    | DeviceLost
    | Garbage
    | Tick
    | Drain
    | Executed
)
Command: TypeAlias = Run | Say | Publish | GiveUp | Log
