"""What the caller core hears and what it says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, TypeAlias

from penstock.wire.errors import PenstockError
from penstock.wire.events import ArenaCame, BrokerFound, BrokerLost, FromBroker, Garbage, Log, Say, Tick
from penstock.wire.messages import Batch, Metrics, Payload, Results


class Sink(Protocol):
    """Where a request's end goes: called once, with one or the other."""

    def complete(self, answer: Complete, /) -> None: ...
    def fail(self, error: PenstockError, /) -> None: ...


@dataclass(slots=True)
class FromWorker:
    message: Results


@dataclass(slots=True)
class Complete:
    """A request has its result: a packed Outcome, and the tensors' bytes that it describes.

    ``held``: where it is not 0, these lie in the worker's memory, and stay there until ``Caller.release(held)``.
    """

    sink: Sink
    body: bytes
    payload: Payload
    batch: Batch
    queue_us: int
    held_us: int
    worker: bytes
    held: int = 0


@dataclass(slots=True)
class Fail:
    sink: Sink
    error: PenstockError


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
class OrderDone:
    """What came of an order: nothing to say of it, or why it was not done."""

    serial: int
    error: PenstockError | None


Event: TypeAlias = FromBroker | FromWorker | ArenaCame | BrokerFound | BrokerLost | Garbage | Tick
Command: TypeAlias = Complete | Fail | Say | Hear | Report | OrderDone | Log
