"""Messages to bytes and back.

``unpack`` trusts nothing: whatever bytes and frames come, it returns a message whose every field and payload is what
docs/protocol.md says, or raises BadMessage. Fuzzed by tests/wire/test_codec.py.
"""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import fields
from operator import attrgetter
from typing import Any, Final

import msgpack

from penstock.wire.errors import BadMessage
from penstock.wire.fields import U64_MAX, Check, brief
from penstock.wire.messages import (
    INLINE_MAX_BYTES,
    MAX_HEAD_BYTES,
    VERSION,
    Carrier,
    Failure,
    Message,
    Outcome,
    Payload,
    check_failure,
    check_layout,
    check_outcome,
)
from penstock.wire.models import Layout

_NOT_PACKED: Final = ("frames", "starts", "blob")
_getters: dict[type[Message], attrgetter[tuple[Any, ...]]] = {}
_KEPT_BYTES_MAX: Final = 1 << 18  # of memory that a packer has come to use


class _Thread(threading.local):
    """A thread's own packer: to make one takes longer than to pack a small message with it."""

    def __init__(self) -> None:
        self.packer = msgpack.Packer()


_thread = _Thread()


def pack(message: Message) -> bytes:
    """The first frame of a message; a Carrier's ``frames`` are sent behind it."""
    kind = type(message)
    getter = _getters.get(kind)
    if getter is None:
        getter = _getters[kind] = _getter(kind)
    packed: bytes = _thread.packer.pack((VERSION, *getter(message)))
    if len(packed) > _KEPT_BYTES_MAX:
        _thread.packer = msgpack.Packer()
    return packed


def _getter(kind: type[Message]) -> attrgetter[tuple[Any, ...]]:
    """What reads the packed fields in their order: the dataclass's, a Carrier's blob last."""
    names = [field.name for field in fields(kind) if field.name not in _NOT_PACKED]
    if issubclass(kind, Carrier):
        names.append("blob")
    return attrgetter("TAG", *names)


def unpack(head: bytes, frames: Sequence[Payload], kinds: Mapping[int, type[Message]]) -> Message:
    """The message of which ``head`` is the first frame and ``frames`` are the others.

    ``kinds``: what this peer may say, by tag. Raises BadMessage.
    """
    if len(head) > MAX_HEAD_BYTES:
        raise BadMessage(f"the first frame of a message has at most {MAX_HEAD_BYTES} bytes, and {len(head)} came")
    value = _unpack(head)
    if type(value) is not tuple or len(value) < 3:
        raise BadMessage("a message is an array [version, tag, epoch, fields...]")
    if value[0] != VERSION:
        raise BadMessage(
            f"the peer speaks version {brief(value[0])} of the protocol, and this process version {VERSION}"
        )
    tag, epoch = value[1:3]
    kind = kinds.get(tag) if type(tag) is int else None
    if kind is None:
        raise BadMessage(f"this peer does not send messages with the tag {brief(tag)}")
    if type(epoch) is not int or not 0 <= epoch <= U64_MAX:
        raise BadMessage("an epoch is a whole number of at most 64 bits")
    checks = kind.CHECKS
    if len(value) != 3 + len(checks):
        raise BadMessage(f"{kind.__name__} has {3 + len(checks)} fields, and {len(value)} came")
    checked = [check(field) for check, field in zip(checks, value[3:], strict=True)]
    if not issubclass(kind, Carrier):
        if frames:
            raise BadMessage(f"{kind.__name__} has one frame, and {1 + len(frames)} came")
        return kind(epoch, *checked)
    message = kind(epoch, *checked[:-1], blob=checked[-1], frames=frames)
    message.starts = _find_starts(message)
    return message


def _find_starts(message: Carrier) -> list[int]:
    frames = message.frames
    starts: list[int] = []
    at = taken = 0
    for group in message.groups:
        size, count = group.nbytes, len(group.ids)
        if group.places:
            starts.append(0)
            continue
        if size <= INLINE_MAX_BYTES:
            starts.append(at)
            at += size * count
            continue
        starts.append(taken)
        if any(len(frame) != size for frame in frames[taken : taken + count]):
            raise BadMessage(f"a payload of {size} bytes came as a frame of another size")
        taken += count
    if at != len(message.blob) or taken != len(frames):
        raise BadMessage(
            f"payloads of {at} bytes and {taken} frames came as {len(message.blob)} bytes and {len(frames)} frames"
        )
    return starts


def pack_layout(layout: Layout) -> bytes:
    packed: bytes = msgpack.packb(layout)
    return packed


def unpack_layout(body: bytes) -> Layout:
    """Raises BadMessage."""
    layout: Layout = _checked(body, check_layout)
    return layout


def pack_outcome(outcome: Outcome) -> bytes:
    packed: bytes = msgpack.packb(outcome)
    return packed


def unpack_outcome(body: bytes) -> Outcome:
    """Raises BadMessage."""
    outcome: Outcome = _checked(body, check_outcome)
    return outcome


def pack_failure(failure: Failure) -> bytes:
    packed: bytes = msgpack.packb(failure)
    return packed


def unpack_failure(body: bytes) -> Failure:
    """Raises BadMessage."""
    failure: Failure = _checked(body, check_failure)
    return failure


def _checked(body: bytes, check: Check) -> Any:
    return check(_unpack(body))


def _unpack(data: bytes) -> Any:
    try:
        return msgpack.unpackb(data, use_list=False)
    except (ValueError, TypeError, OverflowError, msgpack.UnpackException) as error:
        raise BadMessage(f"not msgpack: {error}") from None


def ranges(ids: Sequence[int]) -> tuple[int, ...]:
    """Ids, ascending and each once, as ranges: first, last, first, last, ..., both ends included."""
    if not ids:
        return ()
    if ids[-1] - ids[0] == len(ids) - 1:
        return ids[0], ids[-1]
    found: list[int] = []
    first = last = ids[0]
    for number in ids[1:]:
        if number != last + 1:
            found += (first, last)
            first = number
        last = number
    found += (first, last)
    return tuple(found)


def ids_in(ranges: Sequence[int], known: Mapping[int, Any]) -> list[int]:
    """Those of ``known`` that lie in ``ranges``, each once. A range is as long as its sender says; the work is bounded
    by ``known``."""
    found: list[int] = []
    left = len(known)
    for at in range(0, len(ranges), 2):
        first, last = ranges[at], ranges[at + 1]
        left -= last - first + 1
        if left < 0:
            return [number for number in known if _lies_in(ranges, number)]
        found += [number for number in range(first, last + 1) if number in known]
    return found


def _lies_in(ranges: Sequence[int], number: int) -> bool:
    at = bisect_left(ranges, number)
    return at % 2 == 1 or (at < len(ranges) and ranges[at] == number)
