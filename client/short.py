"""The short way of a plain request and its answer: arrays in, one result of a few bytes back.

A request whose like has been sent before is packed behind what the two share; an answer to one request is checked in
line. It is the same message either way, and the same state of the caller core; whatever is not plain goes the general
way, through ``Forms``, ``wire/codec.py`` and ``Caller.handle`` (tests/client/test_short.py). Together with the caller's
own thread reading the socket this makes a lone ``infer`` cost a fifth of tritonclient's; neither alone does.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any, Final

import msgpack
import numpy as np

from penstock.client.arrays import Forms
from penstock.client.caller import Caller
from penstock.client.events import Complete, Sink
from penstock.wire.errors import PenstockError
from penstock.wire.messages import (
    BATCH_REASONS,
    COMPLETE,
    INLINE_MAX_BYTES,
    MAX_BODY_BYTES,
    PEER_ID_BYTES,
    VERSION,
    Batch,
    Form,
    Payload,
    Results,
    Submit,
)
from penstock.wire.slots import PLACED_MIN_BYTES, Slot, Slots
from penstock.wire.tensors import DTYPES, encode

_PLANS_MAX: Final = 1024
_HEAD: Final = b"\x97" + msgpack.packb(VERSION) + msgpack.packb(Submit.TAG)  # an array of seven
_ONE_GROUP: Final = b"\x91\x94"  # an array with an array of four in it
_ROWS_MAX: Final = 1 << 32
_RESULTS: Final = Results.TAG
# Of a message of results, of its one group, of its batch, and of its one id: compared at once, at half the cost of a
# look at each.
_TYPES: Final = (
    *(int, int, int, tuple, bytes, tuple, bytes),
    *(int, int, bytes, int, tuple, tuple, int),
    *(int, int, str, int, int),
    int,
)


class Plan:
    """What requests of one signature share. ``told``: of the caller, when it was made."""

    __slots__ = ("begin", "datatypes", "epoch", "form", "placed", "told")

    def __init__(self, form: Form, datatypes: list[str], told: int) -> None:
        self.form = form
        self.datatypes = datatypes
        self.told = told
        self.placed = form.nbytes >= PLACED_MIN_BYTES
        self.epoch = 0  # of the broker that ``begin`` speaks to
        self.begin = b""


class Short:
    """Of one caller. ``plan`` and ``payload`` may be called by any thread, the others by the one that has the link."""

    def __init__(self, caller: Caller, forms: Forms) -> None:
        self._caller = caller
        self._forms = forms
        self._plans: dict[Any, Plan] = {}
        self._pack = msgpack.Packer().pack
        self.topic = caller.identity.id
        self.topic_frame = bytes((1, len(self.topic))) + self.topic  # with a head that says: more follows

    def prepare(
        self,
        model: str,
        version: str,
        inputs: Mapping[str, Any],
        outputs: Any,
        slots: Slots | None,
        priority: int = 0,
        tenant: str = "",
    ) -> tuple[Plan, bytes | Slot] | None:
        """How to ask this, and a copy of the inputs; None when it is not plain, needs a slot and there is none, or does
        not fit, which the general way tells. ``priority`` and ``tenant`` have been checked."""
        signature = [model, version, outputs, priority, tenant]
        try:
            for name, array in inputs.items():
                if type(array) is not np.ndarray:
                    return None
                signature += (name, array.dtype, array.shape)
            plan = self._plans.get(tuple(signature))
        except (AttributeError, TypeError):  # no mapping, or outputs in a list
            return None
        if plan is None or plan.told != self._caller.told:
            plan = self._make(tuple(signature), inputs, outputs)
            if plan is None:
                return None
        if plan.placed:
            slot = self._place(plan, inputs, slots)
            return None if slot is None else (plan, slot)
        return plan, array.tobytes() if len(inputs) == 1 else b"".join([each.tobytes() for each in inputs.values()])

    def _make(self, signature: tuple[Any, ...], inputs: Mapping[str, Any], outputs: Any) -> Plan | None:
        told = self._caller.told  # before: it may change meanwhile
        try:
            spec = self._caller.find(signature[0], signature[1])
            form, _ = self._forms.build(spec, inputs, outputs, *signature[3:5])
        except PenstockError:
            return None
        expected = {each.name: each.datatype for each in spec.inputs}
        datatypes = [expected[name] for name in inputs]
        for array, datatype in zip(inputs.values(), datatypes, strict=True):
            # BYTES have no size of their own, and one BF16 may come as float32 or as itself.
            if datatype in ("BYTES", "BF16") or array.dtype != DTYPES[datatype]:
                return None
        if form.nbytes > INLINE_MAX_BYTES and not self._caller.shares:
            return None
        if len(self._plans) >= _PLANS_MAX:
            self._plans.clear()
        plan = self._plans[signature] = Plan(form, datatypes, told)
        return plan

    @staticmethod
    def _place(plan: Plan, inputs: Mapping[str, Any], slots: Slots | None) -> Slot | None:
        slot = slots.take(plan.form.nbytes) if slots is not None else None
        if slot is not None:
            at = 0
            for array, datatype in zip(inputs.values(), plan.datatypes, strict=True):
                part = encode(array, datatype)
                slot.view[at : at + len(part)] = part
                at += len(part)
        return slot

    def submit(self, plan: Plan, payload: bytes | Slot, timeout_s: float, sink: Sink, now: float) -> bytes | None:
        """The message that tells the broker of a request, with the acknowledgments that are due. None, and nothing has
        happened: it must go the general way."""
        caller = self._caller
        if plan.placed and not caller.shares:
            return None
        begun = caller.begin(plan.form, payload, timeout_s, sink, now)
        if begun is None:
            return None
        number, acks = begun
        epoch = caller.membership.epoch
        if plan.epoch != epoch:
            plan.epoch = epoch
            plan.begin = b"".join((_HEAD, msgpack.packb(epoch), _ONE_GROUP, msgpack.packb(plan.form)))
        us = int(timeout_s * 1e6) or 1
        if plan.placed:
            rest = ((number,), (us,), (payload.place,), acks, (), b"")  # type: ignore[union-attr]
        else:
            rest = ((number,), (us,), (), acks, (), payload)  # type: ignore[assignment]
        packed: bytes = self._pack(rest)
        return plan.begin + packed[1:]  # the items, without what makes them an array

    def take(self, head: Payload) -> bool:
        """Perform what a message of results means, if it is one plain answer to a request that waits for it."""
        try:
            value = msgpack.unpackb(head, use_list=False)
            protocol, tag, epoch, groups, worker, batch, blob = value
            (group,) = groups
            status, nbytes, body, queue_us, ids, places, held_us = group
            (number,) = ids
            serial, rows, reason, compute_us, model_us = batch
        except (ValueError, TypeError, OverflowError, msgpack.UnpackException):
            return False
        if not (
            (*map(type, value), *map(type, group), *map(type, batch), type(number)) == _TYPES
            and protocol == VERSION
            and tag == _RESULTS
            and status == COMPLETE
            and places == ()
            and len(blob) == nbytes <= INLINE_MAX_BYTES
            and len(worker) == PEER_ID_BYTES
            and len(body) <= MAX_BODY_BYTES
            and 0 <= rows <= _ROWS_MAX
            and reason in BATCH_REASONS
            and min(epoch, queue_us, held_us, number, serial, compute_us, model_us) >= 0
        ):
            return False
        call = self._caller.finish(number, time.monotonic())
        if call is None:
            return False
        ran = tuple.__new__(Batch, batch)  # a NamedTuple's own is a call of a Python function
        call.sink.complete(Complete(call.sink, body, blob, ran, queue_us, held_us, worker))
        return True
