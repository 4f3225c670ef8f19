"""What a request wants to become of an answer's outputs before it is said: classes in place of values, see
classification.py."""

from __future__ import annotations

from typing import NamedTuple

from penstock.gateway.classification import Classes, classify
from penstock.wire.messages import Payload


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

    __slots__ = ("_rows", "classes")

    def __init__(self, rows: bool) -> None:
        self._rows = rows
        self.classes: dict[str, Classes] = {}

    def has(self, name: str) -> bool:
        """Whether an output is not said as the model gives it."""
        return name in self.classes

    def apply(self, body: bytes, payload: Payload, style: Style) -> tuple[bytes, Payload, Style]:
        """An answer, packed, as it is to be said. May be called on a thread. Raises BadMessage or PenstockError."""
        if self.classes:
            body, payload = classify(self.classes, self._rows, body, payload)
        return body, payload, style
