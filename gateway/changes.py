"""What a request wants to become of an answer's outputs before it is said: classes in place of values, see
classification.py, and data in the client's own memory, see regions.py."""

from __future__ import annotations

from typing import NamedTuple

import orjson

from penstock.gateway.classification import Classes, classify
from penstock.gateway.regions import Place
from penstock.wire.codec import pack_outcome, unpack_outcome
from penstock.wire.errors import BAD_INPUT, BadMessage, PenstockError
from penstock.wire.messages import Outcome, Payload
from penstock.wire.models import Tensor


class Style(NamedTuple):
    """How outputs are to be answered: those named in ``exceptions`` the other way than ``binary`` says, those in
    ``elsewhere`` not at all, but for the JSON that says where they are (its ``parameters``)."""

    binary: bool
    exceptions: frozenset[str] = frozenset()
    elsewhere: tuple[tuple[str, bytes], ...] = ()

    @property
    def all_binary(self) -> bool:
        return self.binary and not self.exceptions

    def is_binary(self, name: str) -> bool:
        return self.binary != (name in self.exceptions)


class Changes:
    """``rows``: outputs have a row for each row of the request."""

    __slots__ = ("_rows", "classes", "places")

    def __init__(self, rows: bool) -> None:
        self._rows = rows
        self.classes: dict[str, Classes] = {}
        self.places: dict[str, Place] = {}

    def has(self, name: str) -> bool:
        """Whether an output is not said as the model gives it."""
        return name in self.classes or name in self.places

    def classes_max(self, rows: int, nbytes: int) -> int:
        """How many classes an answer of so many bytes tells at most; 0 where other things become of it, too."""
        if self.places:
            return 0
        return min(nbytes, max(rows, 1) * sum([each.most for each in self.classes.values()]))

    def apply(self, body: bytes, payload: Payload, style: Style) -> tuple[bytes, Payload, Style]:
        """An answer, packed, as it is to be said. May be called on a thread. Raises BadMessage or PenstockError."""
        if self.classes:
            body, payload = classify(self.classes, self._rows, body, payload)
        return self._put(body, payload, style) if self.places else (body, payload, style)

    def _put(self, body: bytes, payload: Payload, style: Style) -> tuple[bytes, Payload, Style]:
        """Write outputs where they are wanted, and leave them out of the payload."""
        outcome, view = unpack_outcome(body), memoryview(payload)
        tensors: list[Tensor] = []
        parts: list[memoryview] = []
        elsewhere: list[tuple[str, bytes]] = []
        at = 0
        for tensor in outcome.tensors:
            part = view[tensor.offset : tensor.offset + tensor.nbytes]
            if len(part) != tensor.nbytes:
                raise BadMessage(f"an output of {tensor.nbytes} bytes lies outside of a payload of {len(payload)}")
            place = self.places.get(tensor.name)
            if place is None:
                parts.append(part)
            elif len(part) > place.nbytes:
                raise PenstockError(
                    BAD_INPUT,
                    f"shared memory size specified with the request for output '{tensor.name}' ({place.nbytes} bytes) "
                    f"should be at least {len(part)} bytes to hold the results",
                )
            else:
                place.region.write(place.at, part)
                told = place.parameters | {"shared_memory_byte_size": len(part)}
                elsewhere.append((tensor.name, orjson.dumps(told)))
                part = part[:0]
            tensors.append(tensor._replace(offset=at, nbytes=len(part)))
            at += len(part)
        packed = pack_outcome(Outcome(outcome.model, outcome.version, tuple(tensors)))
        return packed, b"".join(parts), style._replace(elsewhere=tuple(elsewhere))
