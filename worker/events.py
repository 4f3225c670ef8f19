"""What the worker's core hears and what it says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from penstock.wire.messages import Message, Payload
from penstock.wire.models import ModelState
from penstock.worker.batcher import Batch
from penstock.worker.execute import Executed
from penstock.worker.model import Model


@dataclass(slots=True)
class FromBroker:
    message: Message


@dataclass(slots=True)
class BrokerFound:
    """A control connection has been made: whoever listens there may be new."""


@dataclass(slots=True)
class BrokerLost:
    reason: str


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
class Garbage:
    """A peer ("broker" or "caller") sent what is no message."""

    process: str
    reason: str


@dataclass(slots=True)
class Tick:
    """``Core.due`` has come, or all that had arrived has been handled."""


@dataclass(slots=True)
class Drain:
    """Take nothing new from now on."""


@dataclass(slots=True)
class Run:
    """Run a batch; ``Executed`` comes back."""

    batch: Batch
    model: Model


@dataclass(slots=True)
class Say:
    """To the broker."""

    message: Message


@dataclass(slots=True)
class Publish:
    """To whoever hears the caller's topic."""

    caller: bytes
    head: bytes
    frames: Sequence[Payload]


@dataclass(slots=True)
class Log:
    """A line for the log. ``level``: of the logging module, by name."""

    level: str
    event: str
    fields: dict[str, Any] = field(default_factory=dict)


Event: TypeAlias = (
    FromBroker | BrokerFound | BrokerLost | Subscribed | Unsubscribed | Loaded | Garbage | Tick | Drain | Executed
)
Command: TypeAlias = Run | Say | Publish | Log
