"""A batch, from its requests' bytes to its callers' answers: gather, run, take apart. Runs on a compute thread.

The requests of a lot lie side by side in the message that brought them, so a lot is gathered, and its answers are taken
apart, with one strided copy for all of them; a batch of one lot is not even copied.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from mmap import mmap
from typing import Final, NamedTuple

import numpy as np

from penstock.wire.codec import pack_failure
from penstock.wire.errors import BAD_INPUT, MODEL_FAILED, PenstockError
from penstock.wire.messages import COMPLETE, FAILED, INLINE_MAX_BYTES, Answers, Failure, Payload
from penstock.wire.messages import Batch as BatchInfo
from penstock.wire.slots import PLACED_MIN_BYTES, Slot, Slots
from penstock.wire.tensors import DTYPES, Array, decode, pack_strings
from penstock.worker.batcher import Batch
from penstock.worker.cuda import CudaError
from penstock.worker.lots import Lot
from penstock.worker.model import RUN_ERRORS, Model, brief, is_device_failure, is_want_of_memory
from penstock.worker.ondevice import AnyStaging

_SENTENCE_MAX: Final = 2000
_FAILURES: Final[tuple[type[Exception], ...]] = (*RUN_ERRORS, PenstockError)
# A batch of fewer bytes is copied to where bindings have been made for it, which costs less than to make one.
_STAY_MIN_BYTES: Final = 64 * 1024
_FLOATS: Final = frozenset({"FP16", "FP32", "FP64", "BF16"})


@dataclass(slots=True)
class Publication:
    """What one caller gets of a batch: answers, and their payloads as in a Carrier; those with places lie in ``slots``.
    ``failed``: codes of those that did."""

    groups: list[Answers] = field(default_factory=list)
    inline: list[bytes] = field(default_factory=list)
    frames: list[Payload] = field(default_factory=list)
    slots: list[Slot] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)

    def give_back(self) -> None:
        """Nobody gets it: its slots are free."""
        for slot in self.slots:
            slot.give_back()


class Run(NamedTuple):
    """What the model took that did not fail: rows, and the seconds for gathering, running and taking apart."""

    rows: int
    input_s: float
    model_s: float
    output_s: float


@dataclass(slots=True)
class Executed:
    """A batch that has run, and what its callers get of it. Times in seconds. ``failed_s``, ``failed_rows``: of the
    requests in it that failed; ``ended``: Unix time."""

    model: Model
    batch: Batch
    info: BatchInfo
    publications: dict[bytes, Publication]
    queue_s: list[
        tuple[float, int]
    ]  # from acceptance by the broker to the start of the batch, and for how many requests
    compute_s: float
    cpu_s: float  # of the thread that ran it
    runs: list[Run] = field(default_factory=list)
    failed_s: float = 0.0
    failed_rows: int = 0
    ended: float = 0.0


def execute(model: Model, batch: Batch, slots: Slots | None = None) -> Executed:
    """Run a batch. ``slots``: where large outputs go while there is room. Never raises for what a request or the model
    does: a batch that fails is run again one by one, or in halves where memory was short, so that only those that fail
    alone are told so. Raises CudaError when the GPU has failed: this process can do nothing more on it."""
    cpu_start = time.thread_time()
    running = _Running(model, slots, batch)
    try:
        running.run(batch.lots)
    except _FAILURES as error:
        for publication in running.publications.values():
            publication.give_back()
        running.publications.clear()
        running.run_apart(batch.lots, error)
    took = time.monotonic() - running.start
    info = BatchInfo(batch.serial, batch.rows, batch.reason, int(took * 1e6), int(running.model_s * 1e6))
    queue_s = [(_queue_us(lot, running.start) * 1e-6, len(lot.ids)) for lot in batch.lots]
    return Executed(
        model,
        batch,
        info,
        running.publications,
        queue_s,
        took,
        time.thread_time() - cpu_start,
        running.runs,
        running.failed_s + running.failed * took,
        running.failed_rows,
        time.time(),
    )


def _queue_us(lot: Lot, start: float) -> int:
    return lot.waited_us + int((start - lot.arrived) * 1e6)


class _Running:
    """A batch that is run, from ``start`` on. ``publications``: what its callers get, as far as it has come.
    ``model_s``: how long the model itself ran."""

    def __init__(self, model: Model, slots: Slots | None, batch: Batch) -> None:
        self.start = time.monotonic()
        self.publications: dict[bytes, Publication] = {}
        self.model_s = 0.0
        self.runs: list[Run] = []
        self.failed = self.failed_rows = 0
        self.failed_s = 0.0  # before the batch
        self._model = model
        self._slots = slots
        self._batch = batch

    def run(self, lots: Sequence[Lot]) -> None:
        """All of them together. Raises one of _FAILURES; then some may have their answers nevertheless."""
        self._batch.runs += 1
        with self._model.staging() as staging:
            self._run_in(staging, lots)
        self.runs.append(Run(sum([lot.rows for lot in lots]), *self._took, time.monotonic() - self._answering))

    def run_apart(self, lots: Sequence[Lot], error: Exception) -> None:
        """``error`` is what all of them together gave. Raises CudaError."""
        if is_device_failure(error):
            raise CudaError(brief(error))
        if not is_want_of_memory(error) or sum([len(lot.ids) for lot in lots]) == 1:
            self._run_one_by_one(lots, error)
            return
        for half in _halves(lots):
            try:
                self.run(half)
            except _FAILURES as failure:
                self.run_apart(half, failure)

    def _run_one_by_one(self, lots: Sequence[Lot], error: Exception) -> None:
        alone = len(lots) == 1 and len(lots[0].ids) == 1
        for lot in lots:
            for at, number in enumerate(lot.ids):
                own: Exception | None = error if alone else None
                if not alone:
                    try:
                        self.run([_part_of(lot, at, at + 1)])
                    except _FAILURES as failure:
                        if is_device_failure(failure):
                            raise CudaError(brief(failure)) from None
                        own = failure
                if own is not None:
                    self._fail(lot, number, own)

    def _fail(self, lot: Lot, number: int, error: Exception) -> None:
        if not isinstance(error, PenstockError):
            name = self._model.spec.name
            error = PenstockError(MODEL_FAILED, f"model '{name}' failed on this input: {brief(error)}")
        publication = self._publication(lot)
        publication.groups.append(failure_answers(error, _queue_us(lot, self.start), (number,)))
        publication.failed.append(error.code)
        self.failed += 1
        self.failed_rows += lot.plan.rows
        self.failed_s += _queue_us(lot, self.start) * 1e-6

    def _publication(self, lot: Lot) -> Publication:
        return self.publications.setdefault(lot.caller, Publication())

    def _run_in(self, staging: AnyStaging | None, lots: Sequence[Lot]) -> None:
        """``staging``: where it runs, if there is memory for it already."""
        start, model = time.monotonic(), self._model
        rows = sum([lot.rows for lot in lots])
        count = rows if model.spec.batchable else 1
        places: Sequence[Array | None] = (
            staging.inputs[count] if staging is not None else [None] * len(model.spec.inputs)
        )
        stays = staging is None or staging.stays
        feeds = [_gather(model, lots, at, rows, place, stays) for at, place in enumerate(places)]
        self._gathered_s = time.monotonic() - start
        if self._slots is not None and self._run_placed(staging, lots, count, feeds, self._slots):
            return
        begin = time.monotonic()
        outputs = model.run(feeds) if staging is None else model.run_in(staging, count, feeds)
        self._ran(begin)
        if len(lots) == 1 and len(lots[0].ids) == 1:
            self._answer(lots[0], outputs)
            return
        for spec, output in zip(model.spec.outputs, outputs, strict=True):
            if output.shape[:1] != (rows,):
                raise PenstockError(MODEL_FAILED, f"output '{spec.name}' has no row for each of {rows} rows")
        if len(lots) == 1:
            self._answer(lots[0], outputs)
            return
        at = 0
        for lot in lots:
            end = at + lot.rows
            self._answer(lot, [output[at:end] for output in outputs])
            at = end

    def _ran(self, begin: float) -> None:
        """The model has, since then."""
        self._answering = time.monotonic()
        self._took = self._gathered_s, self._answering - begin
        self.model_s += self._took[1]

    def _run_placed(
        self, staging: AnyStaging | None, lots: Sequence[Lot], count: int, feeds: Sequence[Array], slots: Slots
    ) -> bool:
        """Have the model write its outputs where callers read them, when it is known how large they will be, and worth
        it. False: they are not there, for whatever reason."""
        wanted = lots[0].plan.outputs
        shapes, nbytes = self._model.foresee(feeds, wanted)
        if nbytes < PLACED_MIN_BYTES:
            return False
        requests = sum([len(lot.ids) for lot in lots])
        if nbytes < PLACED_MIN_BYTES * requests or not any(lot.reads for lot in lots):
            return False
        # Each request's outputs lie side by side; those of a batch lie so only if there is one.
        if (len(wanted) > 1 and requests > 1) or any(lot.plan.outputs != wanted for lot in lots):
            return False
        slot = slots.take(nbytes)
        if slot is None:
            return False
        try:
            start = time.monotonic()
            ran = self._model.run_into(feeds, shapes, slots.address + slot.place, staging, count)
            self._ran(start)
            if not ran:
                return False
            begin = 0
            for lot in lots:
                rows = lot.plan.rows
                own = tuple([shape if requests == 1 else (rows, *shape[1:]) for shape in shapes.values()])
                nbytes, body = lot.plan.describe(own)
                end = begin + nbytes * len(lot.ids)
                into = self._publication(lot)
                queue_us = _queue_us(lot, self.start)
                if lot.reads and nbytes >= PLACED_MIN_BYTES:
                    places = tuple(range(slot.place + begin, slot.place + end, nbytes))
                    into.groups.append(Answers(COMPLETE, nbytes, body, queue_us, lot.ids, places, lot.waited_us))
                    into.slots.append(slot.share())
                else:
                    into.groups.append(Answers(COMPLETE, nbytes, body, queue_us, lot.ids, (), lot.waited_us))
                    _send(into, memoryview(bytes(slot.view[begin:end])), nbytes)
                begin = end
            return True
        finally:
            slot.give_back()

    def _answer(self, lot: Lot, outputs: Sequence[Array]) -> None:
        """Put the outputs of a lot's rows into its caller's answers."""
        plan, count = lot.plan, len(lot.ids)
        into = self._publication(lot)
        wanted = [outputs[at] for at in plan.outputs]
        if plan.answers_strings:
            for at, number in enumerate(lot.ids):
                part = wanted if count == 1 else [output[at * plan.rows : (at + 1) * plan.rows] for output in wanted]
                _answer_strings(lot, number, part, _queue_us(lot, self.start), into)
            return
        shapes = tuple([(plan.rows, *output.shape[1:]) if count > 1 else output.shape for output in wanted])
        nbytes, body = plan.describe(shapes)
        queue_us = _queue_us(lot, self.start)
        if lot.reads and self._slots is not None and nbytes >= PLACED_MIN_BYTES:
            slot = self._slots.take(nbytes * count)
            if slot is not None:
                _fill(slot, wanted, count)
                places = tuple(range(slot.place, slot.place + nbytes * count, nbytes))
                into.groups.append(Answers(COMPLETE, nbytes, body, queue_us, lot.ids, places, lot.waited_us))
                into.slots.append(slot)
                return
        into.groups.append(Answers(COMPLETE, nbytes, body, queue_us, lot.ids, (), lot.waited_us))
        if len(wanted) == 1 and nbytes <= INLINE_MAX_BYTES:
            into.inline.append(wanted[0].tobytes())
            return
        blocks = [_rows_of(output, count) for output in wanted]
        block = np.concatenate(blocks, axis=1)  # a copy even of one: where a batch ran, the next one will
        _send(into, block.reshape(-1).data, nbytes)


def _send(into: Publication, block: memoryview, nbytes: int) -> None:
    """Payloads of so many bytes each, that lie side by side, as they travel in a message."""
    if nbytes <= INLINE_MAX_BYTES:
        into.inline.append(bytes(block))
    else:
        into.frames += [block[at : at + nbytes] for at in range(0, len(block), nbytes)]


def _halves(lots: Sequence[Lot]) -> tuple[list[Lot], list[Lot]]:
    """Requests, two or more, as two halves."""
    left = sum([len(lot.ids) for lot in lots]) // 2
    first: list[Lot] = []
    second: list[Lot] = []
    for lot in lots:
        count = len(lot.ids)
        if left >= count:
            first.append(lot)
        elif left > 0:
            first.append(_part_of(lot, 0, left))
            second.append(_part_of(lot, left, count))
        else:
            second.append(lot)
        left -= count
    return first, second


def _part_of(lot: Lot, begin: int, end: int) -> Lot:
    """Some of a lot's requests by themselves, for this once: the lot stays as it is."""
    size = lot.plan.form.nbytes
    payload: Payload
    if type(lot.payload) is tuple:
        payload, start = lot.payload[begin:end], 0
    else:
        payload, start = lot.payload, lot.start + begin * size
    times = lot.timeouts_us[begin:end]
    ids = lot.ids[begin:end]
    waited_us, arrived = lot.waited_us, lot.arrived
    return Lot({}, lot.caller, lot.attempt, lot.plan, ids, times, payload, start, waited_us, arrived, lot.reads)


def _gather(model: Model, lots: Sequence[Lot], at: int, rows: int, place: Array | None, stays: bool) -> Array:
    """Input ``at`` of all requests, in one array: ``place``, if there is one, or a view of where they lie, when they
    may (``stays``), lie there as the model wants them, and copying would cost more.

    Raises PenstockError for strings that are none, and shapes that cannot be.
    """
    datatype = model.spec.inputs[at].datatype
    if datatype == "BYTES":
        return _gather_strings(lots, at)
    dtype = DTYPES[datatype]
    _, shape, _, _ = lots[0].plan.columns[at]
    if model.spec.batchable:
        shape = (rows, *shape[1:])
    blocks = [block for lot in lots for block in _blocks(lot, at)]
    if (
        stays
        and len(blocks) == 1
        and (place is None or place.nbytes >= _STAY_MIN_BYTES)
        and _may_stay(blocks[0], datatype)
    ):
        view = np.frombuffer(blocks[0], dtype)
        if view.flags.aligned:
            return view.reshape(shape)
    try:
        array = np.empty(shape, dtype) if place is None else place
    except ValueError as error:  # without elements a shape may claim any size in its other dimensions
        name = model.spec.inputs[at].name
        raise PenstockError(BAD_INPUT, f"input '{name}' cannot be of shape {list(shape)}: {error}") from None
    flat, end = array.reshape(-1).view(np.uint8), 0
    into = flat.data
    for block in blocks:
        begin, end = end, end + block.nbytes
        if block.ndim == 1:
            into[begin:end] = block  # a tenth of what numpy takes for a small one
        else:
            flat[begin:end].reshape(block.shape)[...] = block
    if datatype == "BOOL":
        # Any other byte than 0 and 1 is no bool to the code that ONNX Runtime's compiler made.
        np.not_equal(flat, 0, out=array.reshape(-1))
    return array


def _may_stay(block: memoryview, datatype: str) -> bool:
    """Whether a model can and may run on what lies there. A caller's arena can change meanwhile, once the request has
    ended for it: wrong numbers, of which nobody hears. But whole numbers may be indexes, which ONNX Runtime checks
    before it uses them, and not while it does."""
    if not block.contiguous or datatype == "BOOL":
        return False
    return datatype in _FLOATS or not isinstance(block.obj, mmap)


def _blocks(lot: Lot, at: int) -> list[memoryview]:
    """Where input ``at`` of a lot's requests lies: views of bytes, [bytes] or [requests, bytes of one]."""
    plan = lot.plan
    _, _, offset, nbytes = plan.columns[at]
    size, count = plan.form.nbytes, len(lot.ids)
    if not nbytes:
        return []
    if type(lot.payload) is tuple:
        return [memoryview(piece)[offset : offset + nbytes] for piece in lot.payload]
    start = lot.start
    if size == nbytes:
        return [memoryview(lot.payload)[start : start + count * size]]
    block = np.frombuffer(lot.payload, np.uint8, count * size, start).reshape(count, size)
    return [block[:, offset : offset + nbytes].data]


def _gather_strings(lots: Sequence[Lot], at: int) -> Array:
    parts = []
    for lot in lots:
        for number in range(len(lot.ids)):
            one = _part_of(lot, number, number + 1)
            _, shape, offset, nbytes = lot.plan.columns[at]
            inline = type(lot.payload) is not tuple
            view = memoryview(one.payload)[one.start :] if inline else memoryview(one.payload[0])
            elements = decode("BYTES", shape, bytes(view[offset : offset + nbytes]))
            try:
                texts = [element.decode() for element in elements.ravel()]
            except UnicodeDecodeError:
                name = lot.plan.model.spec.inputs[at].name
                raise PenstockError(BAD_INPUT, f"input '{name}' holds an element that is not UTF-8") from None
            part = np.empty(len(texts), dtype=object)
            part[:] = texts
            parts.append(part.reshape(shape))
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _rows_of(output: Array, count: int) -> Array:
    """An output's bytes, [requests, bytes of one]."""
    return np.ascontiguousarray(output).reshape(-1).view(np.uint8).reshape(count, -1)


def _fill(slot: Slot, outputs: Sequence[Array], count: int) -> None:
    """Write outputs of a number of requests into a slot, each request's side by side."""
    rows = np.frombuffer(slot.view, np.uint8).reshape(count, -1)
    at = 0
    for output in outputs:
        part = _rows_of(output, count)
        rows[:, at : at + part.shape[1]] = part
        at += part.shape[1]


def _answer_strings(lot: Lot, number: int, outputs: Sequence[Array], queue_us: int, into: Publication) -> None:
    """An answer with strings, whose size is its own."""
    plan = lot.plan
    specs = plan.model.spec.outputs
    parts: list[bytes] = [
        pack_strings(output.ravel().tolist())
        if specs[at].datatype == "BYTES"
        else np.ascontiguousarray(output).tobytes()
        for at, output in zip(plan.outputs, outputs, strict=True)
    ]
    payload = b"".join(parts)
    body = plan.outcome(tuple(output.shape for output in outputs), [len(part) for part in parts])
    into.groups.append(Answers(COMPLETE, len(payload), body, queue_us, (number,), (), lot.waited_us))
    if len(payload) <= INLINE_MAX_BYTES:
        into.inline.append(payload)
    else:
        into.frames.append(payload)


def failure_answers(error: PenstockError, queue_us: int, ids: tuple[int, ...]) -> Answers:
    """One error for some requests."""
    failure = Failure(error.code, error.message[:_SENTENCE_MAX], int(error.retry_after_s * 1000))
    return Answers(FAILED, 0, pack_failure(failure), queue_us, ids)
