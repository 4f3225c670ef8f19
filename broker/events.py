"""What the broker's core hears and what it says: two small vocabularies that face each other."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, TypeAlias

from penstock.wire.messages import Message


@dataclass(slots=True)
class FromCaller:
    caller: bytes
    message: Message


@dataclass(slots=True)
class FromWorker:
    worker: bytes
    message: Message


@dataclass(slots=True)
class Garbage:
    """A peer sent what is no message. ``process``: "caller", "worker" or "control"."""

    process: str
    peer: bytes
    reason: str


@dataclass(slots=True)
class Gone:
    """A peer's process has ended, or its socket takes nothing more."""

    peer: bytes
    reason: str


@dataclass(slots=True)
class Tick:
    """All that had arrived has been handled: time to assign. Comes after every round, and when ``Core.due`` says so."""


@dataclass(slots=True)
class Drain:
    """Accept no new requests from now on."""


@dataclass(slots=True)
class End:
    """The process is about to end, whatever is left."""


@dataclass(slots=True)
class ToCaller:
    caller: bytes
    message: Message


@dataclass(slots=True)
class ToWorker:
    worker: bytes
    message: Message


@dataclass(slots=True)
class Sweep:
    """Workers have gone: remove what they left in the runtime directory."""


@dataclass(slots=True)
class Log:
    """A line for the log. ``level``: of the logging module, by name."""

    level: str
    event: str
    fields: dict[str, Any] = field(default_factory=dict)


Event: TypeAlias = FromCaller | FromWorker | Garbage | Gone | Tick | Drain | End
Command: TypeAlias = ToCaller | ToWorker | Sweep | Log
