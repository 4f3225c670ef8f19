"""What stands in for an ONNX model and for the thread that runs it: nothing is computed, the time is the scenario's.

A worker's core knows of its model what callers need (``spec``), what the user says of it (``config``), to what its
batches are padded (``sizes``), and what it took when it was warmed up (``run_bytes``, ``warm_s``); that is all there is
here. The core decides what is in a batch and when it runs, as on a real worker; ``executed`` is what
``worker/execute.py`` would have come back with.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, cast

from penstock.simulate.scenario import ModelPlan
from penstock.wire.codec import pack_layout
from penstock.wire.messages import COMPLETE, Answers, Form
from penstock.wire.messages import Batch as BatchInfo
from penstock.wire.models import READY, Layout, ModelSpec, ModelState, Tensor, TensorSpec, check
from penstock.wire.slots import PLACED_MIN_BYTES
from penstock.worker.batcher import Batch
from penstock.worker.costs import batch_sizes
from penstock.worker.events import Loaded
from penstock.worker.execute import Executed, Publication
from penstock.worker.model import Model
from penstock.worker.staging import padded

# Rows have no elements, so that a request of any number of rows passes the worker's check without carrying tensors.
_ROW: Final = TensorSpec("x", "FP32", (-1, 0))
_NIL: Final = b"\xc0"  # msgpack's nil: nobody looks into an answer


class StandIn:
    """See above. ``gpu`` None: as on the CPU, whose batches nothing watches over. ``speed``: of its worker."""

    def __init__(self, plan: ModelPlan, speed: float = 1.0) -> None:
        name, version, config, batchable = plan.name, plan.version, plan.config, plan.batchable
        size = config.rows_max if batchable else 1
        self.spec = ModelSpec(name, version, "simulated", (_ROW,), (_ROW,), batchable, size)
        self.config = config
        self.why_alone = "" if batchable else "the scenario says so"
        self.run_bytes = 0
        self.weights = None
        self.run_s = float("inf")
        self.gpu = None
        self.sizes: tuple[int, ...] = (config.preferred_batch_sizes or ()) if batchable else ()
        # As on a real worker, each size has run once before the first request comes.
        self.warm_s = {rows: plan.cost.mean(rows) / speed for rows in self.sizes or batch_sizes(size)}

    def runs_as(self, rows: int) -> int:
        """How many rows a batch has once it is padded."""
        return padded(self.sizes, rows)

    def loaded(self) -> Loaded:
        """What tells a worker's core that it is there."""
        spec = self.spec
        state = ModelState(spec.name, spec.version, READY, self.why_alone, spec)
        return Loaded(state, cast(Model, self))


class Ridden:
    """The answers of a publication, which ride as its one frame: what is published need not be unpacked to be heard.
    As long as nothing, for whoever counts the bytes."""

    __slots__ = ("groups",)

    def __init__(self, groups: Sequence[Answers]) -> None:
        self.groups = groups

    def __len__(self) -> int:
        return 0


class Memory:
    """A caller's arena, of which nobody reads anything."""

    def view(self, offset: int, nbytes: int) -> memoryview:
        return memoryview(b"")

    def views(self, offsets: Sequence[int], nbytes: int) -> list[memoryview]:
        return [memoryview(b"")] * len(offsets)

    def copies(self, offsets: Sequence[int], nbytes: int) -> list[bytes]:
        return [b""] * len(offsets)


def form_of(spec: ModelSpec, version: str, rows: int, nbytes: int, tenant: str, priority: int) -> Form:
    """Of requests with so many rows and bytes. ``version``: as they ask for it. Raises PenstockError when a model does
    not take them."""
    layout = Layout((Tensor(_ROW.name, _ROW.datatype, (rows, 0), 0, 0),))
    size = check(spec, layout)
    return Form(spec.name, version, priority, tenant, size.rows, nbytes, size.key, pack_layout(layout))


def is_placed(form: Form) -> bool:
    """Whether a local caller puts the tensors of such requests into its arena."""
    return form.nbytes >= PLACED_MIN_BYTES


def executed(model: Model, batch: Batch, began: float, now: float) -> Executed:
    """A batch that has run from ``began`` until ``now``."""
    took = now - began
    publications: dict[bytes, Publication] = {}
    queue_s: list[tuple[float, int]] = []
    for lot in batch.lots:
        publication = publications.get(lot.caller)
        if publication is None:
            publication = publications[lot.caller] = Publication()
            publication.frames.append(Ridden(publication.groups))
        queue_us = lot.waited_us + int((began - lot.arrived) * 1e6)
        publication.groups.append(Answers(COMPLETE, 0, _NIL, queue_us, lot.ids, (), lot.waited_us))
        queue_s.append((queue_us * 1e-6, len(lot.ids)))
    took_us = int(took * 1e6)
    info = BatchInfo(batch.serial, batch.rows, batch.reason, took_us, took_us)
    return Executed(model, batch, info, publications, queue_s, took, 0.0)
