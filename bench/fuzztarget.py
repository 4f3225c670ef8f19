"""What ``fuzz.py`` feeds: a target makes inputs and takes them in.

What it raises, beside what is documented, is a finding. Cores are given plain traffic between what is malformed, so
that there is something to go wrong; after every phase all peers leave, and nothing of theirs may be left.
"""

from __future__ import annotations

import gc
import types
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Mapping
from random import Random
from typing import Any, ClassVar, Final, TypeAlias

from bench.fuzzmutate import Frames
from penstock.wire.codec import pack, unpack
from penstock.wire.errors import BadMessage
from penstock.wire.messages import Carrier, Message

Kinds: TypeAlias = Mapping[int, type[Message]]

_NOT_DATA: Final = (type, types.ModuleType, types.FunctionType, types.BuiltinFunctionType, Random)


class Target(ABC):
    """``name``: as ``--target`` has it. ``phase``: inputs between two times that everybody leaves, ``phases``: how many
    of them begin with the same state. ``share``: of all inputs."""

    name: ClassVar[str]
    phase: ClassVar[int] = 500
    phases: ClassVar[int] = 8
    share: ClassVar[float] = 0.0

    def begin(self, random: Random) -> None:  # noqa: B027 - most have no state
        """A new state."""

    @abstractmethod
    def make(self, random: Random) -> Any:
        """The next input."""

    @abstractmethod
    def feed(self, each: Any) -> bool:
        """Take it in. Whether it was understood."""

    def check(self) -> None:  # noqa: B027 - most say nothing
        """Whether what was said can be understood; the time that it takes is not the input's."""

    def settle(self) -> int:
        """Everybody leaves. How much is still held; raises AssertionError where it should be nothing."""
        return 0

    def close(self) -> None:  # noqa: B027 - most have nothing open
        """Let go of what is open."""

    def bytes_of(self, each: Any) -> bytes | None:
        """What of an input can be made smaller, if anything."""
        return None

    def with_bytes(self, each: Any, data: bytes) -> Any:
        """The input with other bytes, where ``bytes_of`` gives any."""
        return each


class CoreTarget(Target):
    """A target that says something. ``said``: what has not been checked yet, and what its hearer knows."""

    def begin(self, random: Random) -> None:
        self.said: list[tuple[Message, Kinds]] = []

    def check(self) -> None:
        said, self.said = self.said, []
        for message, kinds in said:
            check_said(message, kinds)


def check_said(message: Message, kinds: Kinds) -> None:
    """Whoever it is for can read it."""
    frames = list(map(bytes, message.frames)) if isinstance(message, Carrier) else []
    try:
        unpack(pack(message), frames, kinds)
    except BadMessage as error:
        raise AssertionError(f"said {message!r:.300}, which nobody understands: {error}") from error


def hear(head: bytes, frames: Frames, kinds: Kinds) -> Message | BadMessage:
    """What a shell makes of a message."""
    try:
        return unpack(head, frames, kinds)
    except BadMessage as error:
        return error


def census(*roots: Any) -> int:
    """How many elements all containers have that can be reached from some objects."""
    seen: set[int] = set()
    todo, total = list(roots), 0
    while todo:
        each = todo.pop()
        if id(each) in seen or isinstance(each, _NOT_DATA):
            continue
        seen.add(id(each))
        if isinstance(each, (dict, list, set, deque)):
            total += len(each)
        todo += gc.get_referents(each)
    return total
