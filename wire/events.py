"""What the cores of several processes hear and say alike; what only one of them does is in its own ``events``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from penstock.wire.messages import Message


@dataclass(slots=True)
class FromBroker:
    message: Message


class Arena(Protocol):
    """A peer's memory, to be read."""

    def view(self, offset: int, nbytes: int) -> memoryview:
        """Raises BadMessage when it does not lie inside."""

    def views(self, offsets: Sequence[int], nbytes: int) -> list[memoryview]:
        """Raises BadMessage when not all of them lie inside."""

    def copies(self, offsets: Sequence[int], nbytes: int) -> list[bytes] | None:
        """None when not all of them lie inside."""


@dataclass(slots=True)
class ArenaCame:
    """The broker has passed on a peer's arena, as a message with the same serial says. None, with the ``reason``, when
    it cannot be mapped here."""

    peer: bytes
    serial: int
    arena: Arena | None
    reason: str = ""


@dataclass(slots=True)
class BrokerFound:
    """A control connection has been made: whoever listens there may be new."""


@dataclass(slots=True)
class BrokerLost:
    """``expected``: it has said that it leaves."""

    reason: str
    expected: bool = False


@dataclass(slots=True)
class Garbage:
    """A peer ("broker", "caller", "worker" or "control") sent what is no message."""

    process: str
    reason: str
    peer: bytes = b""  # which one, where that is known


@dataclass(slots=True)
class Tick:
    """The core's ``due`` has come, or all that had arrived has been handled."""


@dataclass(slots=True)
class Drain:
    """Take nothing new from now on."""


@dataclass(slots=True)
class Say:
    """To the broker."""

    message: Message


@dataclass(slots=True)
class Log:
    """A line for the log. ``level``: of the logging module, by name."""

    level: str
    event: str
    fields: dict[str, Any] = field(default_factory=dict)
