"""How a protocol reads the body of an inference request: on the loop, or, if it is large, in another process."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Protocol, TypeAlias

from penstock.gateway.inference import Parser, Query, Reading, read_body
from penstock.wire.messages import Payload
from penstock.wire.models import ModelSpec
from penstock.wire.tensors import Buffer


class Asked(Protocol):
    """What a request's head says of an inference (see ``application.Target``)."""

    header_length: int | None
    priority: int
    tenant: str


# From a body to what it says, and its tensors. Pure, and to be pickled: a function of a module, or a partial of one.
# Raises PenstockError.
Read: TypeAlias = Callable[[ModelSpec, Buffer], tuple[Reading, Payload]]


class Parse:
    """From a target and a body to a query and a payload. ``find``: which model is meant. All of it raises
    PenstockError."""

    __slots__ = ("_read", "find", "parser")

    def __init__(self, find: Callable[..., ModelSpec], read: Read) -> None:
        """``find``: of a Target."""
        self.find = find
        self._read = read
        self.parser = Parser()

    def __call__(self, target: Asked, body: Buffer) -> tuple[Query, Payload]:
        spec = self.find(target)
        reading, payload = self._read(spec, body)
        return self.query(target, spec, reading, len(payload)), payload

    def reader(self, target: Asked) -> Read:
        """What reads the body in its place."""
        return self._read

    def query(self, target: Asked, spec: ModelSpec, reading: Reading, nbytes: int) -> Query:
        """What is asked, when another has read it. ``nbytes``: of the payload."""
        return self.parser.query(spec, reading, nbytes, target.priority, target.tenant)


class ParseV2(Parse):
    """Bodies of the v2 protocol, with or without binary tensors behind their JSON."""

    __slots__ = ()

    def __init__(self, find: Callable[..., ModelSpec]) -> None:
        super().__init__(find, partial(read_body, None))

    def __call__(self, target: Asked, body: Buffer) -> tuple[Query, Payload]:
        return self.parser.parse(self.find(target), body, target.header_length, target.priority, target.tenant)

    def reader(self, target: Asked) -> Read:
        return partial(read_body, target.header_length, shared=self.parser.regions is not None)
