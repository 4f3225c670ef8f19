"""What the caller core hears and what it says."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias

from penstock.wire.errors import PenstockError
from penstock.wire.messages import Batch, Message, Metrics, Payload, Results


class Sink(Protocol):
    """Where a request's end goes: called once, with one or the other."""

    def complete(self, answer: Complete, /) -> None: ...
    def fail(self, error: PenstockError, /) -> None: ...


@dataclass(slots=True)
class FromBroker:
    message: Message


@dataclass(slots=True)
class FromWorker:
    message: Results


@dataclass(slots=True)
class BrokerFound:
    """A control connection has been made: whoever listens there may be new."""


@dataclass(slots=True)
class BrokerLost:
    reason: str


@dataclass(slots=True)
class Garbage:
    """A peer ("broker" or "worker") sent what is no message."""

    process: str
    reason: str


@dataclass(slots=True)
class Tick:
    """``Caller.due`` has come."""


@dataclass(slots=True)
class Complete:
    """A request has its result: a packed Outcome, and the tensors' bytes that it describes."""

    sink: Sink
    body: bytes
    payload: Payload
    batch: Batch
    queue_us: int
    worker: bytes


@dataclass(slots=True)
class Fail:
    sink: Sink
    error: PenstockError


@dataclass(slots=True)
class Say:
    """To the broker."""

    message: Message


@dataclass(slots=True)
class Hear:
    """Connect to a worker's results, or with ``on`` false, no longer."""

    endpoint: str
    on: bool


@dataclass(slots=True)
class Report:
    """The whole server's metrics, that were asked for."""

    metrics: Metrics


@dataclass(slots=True)
class Log:
    """A line for the log. ``level``: of the logging module, by name."""

    level: str
    event: str
    fields: dict[str, Any] = field(default_factory=dict)


Event: TypeAlias = FromBroker | FromWorker | BrokerFound | BrokerLost | Garbage | Tick
Command: TypeAlias = Complete | Fail | Say | Hear | Report | Log
