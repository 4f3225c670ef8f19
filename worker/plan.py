"""What a form means to a model: checked once, then found by look-up for every request of that form."""

from __future__ import annotations

from typing import Final, NamedTuple

from penstock.wire.codec import pack_outcome, unpack_layout
from penstock.wire.datatypes import ITEM_SIZES, element_count
from penstock.wire.errors import BAD_INPUT, BadMessage, PenstockError
from penstock.wire.messages import Form, Outcome
from penstock.wire.models import Size, Tensor, check
from penstock.worker.model import Model

_BODIES_MAX: Final = 256  # shapes of outputs whose packed description a plan remembers


class Column(NamedTuple):
    """Where an input lies in the payload of each request of a form. ``shape`` has the rows in front."""

    datatype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


class Plan:
    """How requests of one form are put into a batch and taken out again.

    ``columns``: one for each input of the model, in its order. ``outputs``: indexes of the outputs that are wanted.
    """

    def __init__(self, model: Model, form: Form) -> None:
        """Raises PenstockError when the form does not fit the model, whatever its sender made of it."""
        try:
            layout = unpack_layout(form.body)
        except BadMessage as error:
            raise PenstockError(BAD_INPUT, f"the request's layout is malformed: {error}") from None
        spec = model.spec
        if check(spec, layout) != Size(form.rows, form.key):
            raise PenstockError(BAD_INPUT, "the request's rows or key are not those of its tensors")
        given = {tensor.name: tensor for tensor in layout.tensors}
        if any(tensor.offset + tensor.nbytes > form.nbytes for tensor in layout.tensors):
            raise PenstockError(BAD_INPUT, f"a tensor lies outside its payload of {form.nbytes} bytes")
        self.model = model
        self.form = form
        self.key = (spec.name, spec.version)
        self.rows = form.rows
        self.columns = [_column(given[expected.name]) for expected in spec.inputs]
        wanted = layout.outputs or [each.name for each in spec.outputs]
        places = {each.name: at for at, each in enumerate(spec.outputs)}
        self.outputs = [places[name] for name in wanted]
        self.answers_strings = any(spec.outputs[at].datatype == "BYTES" for at in self.outputs)
        self._bodies: dict[tuple[tuple[int, ...], ...], tuple[int, bytes]] = {}

    def describe(self, shapes: tuple[tuple[int, ...], ...]) -> tuple[int, bytes]:
        """(payload bytes, packed Outcome) for wanted outputs of these shapes, none of which is BYTES."""
        known = self._bodies.get(shapes)
        if known is None:
            sizes = [
                element_count(shape) * ITEM_SIZES[self.model.spec.outputs[output].datatype]
                for output, shape in zip(self.outputs, shapes, strict=True)
            ]
            if len(self._bodies) >= _BODIES_MAX:
                self._bodies.clear()
            known = self._bodies[shapes] = sum(sizes), self.outcome(shapes, sizes)
        return known

    def outcome(self, shapes: tuple[tuple[int, ...], ...], sizes: list[int]) -> bytes:
        """The packed Outcome for wanted outputs of these shapes and bytes, which lie one behind the other."""
        tensors, at = [], 0
        for output, shape, nbytes in zip(self.outputs, shapes, sizes, strict=True):
            spec = self.model.spec.outputs[output]
            tensors.append(Tensor(spec.name, spec.datatype, shape, at, nbytes))
            at += nbytes
        return pack_outcome(Outcome(self.model.spec.name, self.model.spec.version, tuple(tensors)))


def _column(tensor: Tensor) -> Column:
    return Column(tensor.datatype, tensor.shape, tensor.offset, tensor.nbytes)
