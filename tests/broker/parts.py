"""The broker's parts, made as the core makes them, for tests of one of them alone."""

from __future__ import annotations

from collections.abc import Sequence

from penstock.broker.lots import Lot
from penstock.broker.peers import CallerPeer, WorkerPeer
from penstock.broker.queues import ModelQueue
from penstock.wire.messages import INLINE_MAX_BYTES, Form
from penstock.wire.models import ModelState
from tests.broker.conversation import model

KEY = ("m", "1")


def make_caller(number: int = 0, local: bool = True) -> CallerPeer:
    return CallerPeer(b"caller%02d" % number, "", local, 0, 0.0)


def make_worker(
    number: int = 0,
    models: Sequence[ModelState] = (model(),),
    hears: Sequence[CallerPeer] = (),
    instances: int = 1,
    kept_bytes_max: int = 1000,
    endpoints: Sequence[str] = (),
    name: str = "",
) -> WorkerPeer:
    peer = WorkerPeer(b"worker%02d" % number, name or f"w{number}", "cpu", endpoints, instances, kept_bytes_max, 0.0)
    peer.set_models(models)
    peer.callers.update(each.id for each in hears)
    return peer


def make_queue(*workers: WorkerPeer, name: str = "m") -> ModelQueue:
    queue = ModelQueue((name, "1"), model(name).spec)
    queue.workers.update(dict.fromkeys(workers))
    return queue


def make_lot(
    caller: CallerPeer,
    queue: ModelQueue,
    ids: Sequence[int],
    rows: int = 1,
    size: int = 0,
    tenant: str = "",
    priority: int = 0,
    cost_us: int = 1000,
) -> Lot:
    """A lot that waits, and that its caller knows; the payload of request 5 is 5, 5, 5, ..."""
    form = Form(*queue.key, priority, tenant, rows, size, b"", b"")
    payloads = [bytes([number % 256]) * size for number in ids]
    payload = b"".join(payloads) if size <= INLINE_MAX_BYTES else tuple(payloads)
    lot = Lot(caller, queue, form, tuple(ids), (1_000_000,) * len(ids), payload, False, 0.0, cost_us * rows)
    caller.requests.update(dict.fromkeys(ids, lot))
    return lot


def give(worker: WorkerPeer, lot: Lot) -> None:
    """Have a worker hold a lot, as the assigner and the ledger do together."""
    lot.move("assign")
    lot.attempt += 1
    lot.worker = worker
    worker.hold(lot)
    worker.add(lot.model.key, lot.rows, lot.cost_us * len(lot.ids), 0.0)
