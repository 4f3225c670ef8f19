"""What the broker's core hears and what it says: two small vocabularies that face each other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from penstock.wire.events import Drain, Garbage, Log, Tick
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
class Came:
    """A peer has made its control connection. ``arena_bytes``: the size of its arena, 0 when it has none."""

    peer: bytes
    arena_bytes: int


@dataclass(slots=True)
class Gone:
    """A peer's process has ended, or its socket takes nothing more. ``disconnected``: so has its control connection."""

    peer: bytes
    reason: str
    disconnected: bool = False


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
class Share:
    """Put the descriptor of a peer's arena into the control connection of another, with a number that the message
    about it has as well."""

    owner: bytes
    reader: bytes
    serial: int


@dataclass(slots=True)
class Sweep:
    """Workers have gone: remove what they left in the runtime directory."""


Event: TypeAlias = FromCaller | FromWorker | Garbage | Came | Gone | Tick | Drain | End
Command: TypeAlias = ToCaller | ToWorker | Share | Sweep | Log
