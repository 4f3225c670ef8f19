"""Malformed messages and byte strings for ``fuzz.py``: valid ones, of which something is changed.

All of it follows from the random source that it is given.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from random import Random
from typing import Any, Final, TypeAlias

import msgpack

from penstock.wire.codec import pack
from penstock.wire.messages import INLINE_MAX_BYTES, Carrier, Message

Frames: TypeAlias = list[bytes]

_EDGES: Final = (0, 1, 2, 255, 256, 4095, 4096, 4097, 16_384, 16_385, 65_536, (1 << 31) - 1, 1 << 31, (1 << 32) - 1)
_LARGE: Final = (1 << 32, (1 << 32) + 1, 1 << 53, 1 << 62, (1 << 63) - 1, 1 << 63, (1 << 64) - 1)
_NEGATIVE: Final = (-1, -128, -(1 << 31), -(1 << 63))
_FLOATS: Final = (0.0, -0.0, 1.0, 1.5, -1e308, 1e308, 5e-324, float("inf"), float("-inf"), float("nan"))
_TEXTS: Final = ("", "m", "x", "FP32", "BYTES", "READY", "\0", "é" * 40, "\U0010ffff", "x" * 300, "bad_input", "1")
# The first bytes of what is long in msgpack: of arrays, maps, texts, binaries and extensions, with the length to come.
_HEADS: Final = b"\xdc\xdd\xde\xdf\xd9\xda\xdb\xc4\xc5\xc6\xc7\xc8\xc9\xd6\xd8"
_MANY_MAX_BYTES: Final = 1 << 19  # of what is said many times
_MESSAGE_MAX_BYTES: Final = 1 << 22
_TRAVEL_MAX_BYTES: Final = 1 << 20  # of payloads that a message is given when it has been changed


def number(random: Random) -> int:
    """At an edge, or anywhere."""
    kind = random.random()
    if kind < 0.4:
        return random.choice(_EDGES)
    if kind < 0.6:
        return random.choice(_LARGE)
    return random.randrange(20) if kind < 0.8 else random.getrandbits(random.randrange(1, 64))


def nested(random: Random) -> Any:
    """Deeper than any message is, within what msgpack can pack."""
    value: Any = number(random)
    for _ in range(random.choice((3, 30, 200, 500))):
        value = [value] if random.random() < 0.9 else {"x": value}
    return value


def stranger(random: Random) -> Any:
    """A value of any type."""
    makers: Sequence[Callable[[], Any]] = (
        lambda: number(random),
        lambda: random.choice(_NEGATIVE),
        lambda: random.choice(_FLOATS),
        lambda: random.choice(_TEXTS),
        lambda: random.randbytes(random.choice((0, 1, 7, 8, 9, 300))),
        lambda: random.choice((None, True, False)),
        list,
        dict,
        lambda: {"a": [1], 2: b"x"},
        lambda: [stranger(random) for _ in range(random.randrange(4))],
        lambda: nested(random),
        lambda: msgpack.ExtType(random.randrange(128), random.randbytes(4)),
        lambda: msgpack.Timestamp(random.getrandbits(32)),
    )
    return random.choice(makers)()


def alike(random: Random, value: Any) -> Any:
    """A value of the same type: what a check of types lets pass."""
    if type(value) is bool:
        return not value
    if type(value) is int:
        return max(0, value + random.choice((-1, 1))) if random.random() < 0.3 else number(random)
    if type(value) is float:
        return random.choice(_FLOATS)
    if type(value) is str:
        kind = random.random()
        if kind < 0.5:
            return random.choice(_TEXTS)
        if kind < 0.7:
            return value[: random.randrange(len(value) + 1)]
        return value * 2 if kind < 0.8 else random.randbytes(4).hex()  # one that nobody has seen
    if type(value) is bytes:
        return changed_bytes(random, value) if random.random() < 0.5 else random.randbytes(len(value))
    if type(value) is list:
        change_list(random, value)
        return value
    return stranger(random)


def _fits(value: Any, room: int) -> int:
    """What is left of so many bytes for a value and all that is in it, as often as it is; negative if it is larger, by
    how much nobody has looked."""
    if type(value) is list:
        room -= 1
        for each in value:
            if room < 0:
                break
            room = _fits(each, room)
        return room
    return room - (1 + len(value) if isinstance(value, (bytes, str)) else 9)


def change_list(random: Random, items: list[Any]) -> None:
    """Leave out, say twice, put elsewhere, add, or make many of something."""
    kind = random.random()
    if not items:
        items.append(stranger(random))
        return
    at = random.randrange(len(items))
    if kind < 0.25:
        del items[at]
    elif kind < 0.5:
        items.insert(random.randrange(len(items) + 1), items[at])
    elif kind < 0.6:
        items.reverse()
    elif kind < 0.65:
        random.shuffle(items)
    elif kind < 0.7:
        items[:] = items * random.choice((2, 3))
    elif kind < 0.72:
        # As many as there may be, and more; of what is large fewer, since they may be changed, and repeated, again.
        size = _MANY_MAX_BYTES - _fits(items[at], _MANY_MAX_BYTES)
        items[at:at] = [items[at]] * min(random.choice((100, 4095, 5000)), _MANY_MAX_BYTES // size)
    elif kind < 0.85:
        items.append(stranger(random))
    else:
        del items[at:]


def change(random: Random, tree: list[Any], gentle: float) -> None:
    """Change one place of a tree; ``gentle``: how probably into a value of the same type."""
    parent, at = tree, random.randrange(len(tree)) if tree else 0
    while parent and type(parent[at]) is list and parent[at] and random.random() < 0.85:
        parent = parent[at]
        at = random.randrange(len(parent))
    if not parent:
        parent.append(stranger(random))
    elif random.random() < gentle:
        parent[at] = alike(random, parent[at])
    elif random.random() < 0.2:
        change_list(random, parent)
    else:
        parent[at] = stranger(random)


def changed_bytes(random: Random, data: bytes, other: bytes = b"") -> bytes:
    """Bits flipped, cut off, cut out, put in, or joined with another's; lengths that claim more than there is."""
    kind, size = random.random(), len(data)
    if not size or kind < 0.05:
        return random.randbytes(random.randrange(64))
    at = random.randrange(size)
    if kind < 0.35:
        flipped = bytearray(data)
        for _ in range(random.choice((1, 1, 1, 2, 8))):
            flipped[random.randrange(size)] ^= 1 << random.randrange(8)
        return bytes(flipped)
    if kind < 0.55:
        return data[:at]
    if kind < 0.65:
        return data[:at] + data[at + random.randrange(1, 9) :]
    if kind < 0.75:
        return data[:at] + random.randbytes(random.randrange(1, 9)) + data[at:]
    if kind < 0.85:
        return data[:at] + other[random.randrange(len(other) + 1) :]
    if kind < 0.95:
        length = random.choice((0xFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF)).to_bytes(4, "big")
        return data[:at] + bytes([random.choice(_HEADS)]) + length[random.randrange(4) :] + data[at:]
    return data * random.choice((2, 3))


def tree_of(message: Message) -> list[Any]:
    tree: list[Any] = msgpack.unpackb(pack(message), use_list=True, strict_map_key=False)
    return tree


def malformed(random: Random, message: Message, other: Message, gentle: float = 0.5) -> tuple[bytes, Frames]:
    """A message of which something is changed: its first frame and the others. ``other``: one that parts are taken
    from. ``gentle``: how probably a change keeps types, so that the message may be understood, and mean nonsense."""
    frames: Frames = [bytes(each) for each in message.frames] if isinstance(message, Carrier) else []
    kind = random.random()
    if kind < 0.2 * (1.0 - gentle) + 0.02:
        head = changed_bytes(random, pack(message), pack(other))
        return head, _changed_frames(random, frames)
    tree = tree_of(message)
    for _ in range(random.choice((1, 1, 1, 2, 4))):
        change(random, tree, gentle)
        if _fits(tree, _MESSAGE_MAX_BYTES) < 0:  # what is there often has been made many of
            return pack(message), frames
    if tree and random.random() < 0.05:  # a part of another message in the place of one of this
        tree[random.randrange(len(tree))] = random.choice(tree_of(other))
    if isinstance(message, Carrier) and random.random() < 0.7:
        frames = _fit(tree, frames)
    elif random.random() < 0.1:
        frames = _changed_frames(random, frames)
    try:
        return msgpack.packb(tree), frames
    except (ValueError, OverflowError):  # deeper than msgpack packs
        return changed_bytes(random, pack(message)), frames


def _changed_frames(random: Random, frames: Frames) -> Frames:
    changed = [each[: random.randrange(len(each) + 1)] if random.random() < 0.3 else each for each in frames]
    if random.random() < 0.3:
        changed.append(random.randbytes(random.choice((0, 1, INLINE_MAX_BYTES, INLINE_MAX_BYTES + 1))))
    return changed[1:] if random.random() < 0.2 else changed


def _fit(tree: list[Any], frames: Frames) -> Frames:
    """Give a tree that carries payloads as many bytes as its groups now say, where that can be."""
    try:
        blob = 0
        fitting: Frames = []
        for group in tree[3]:
            if type(group[0]) is list:  # requests and tasks begin with a form
                nbytes, ids = group[0][5], group[4 if len(group) == 7 else 1]
                places = group[6 if len(group) == 7 else 3]
            else:
                nbytes, ids, places = group[1], group[4], group[5]
            count = len(ids)
            if places or not count:
                continue
            if nbytes * count > _TRAVEL_MAX_BYTES:
                return frames
            if nbytes <= INLINE_MAX_BYTES:
                blob += nbytes * count
            else:
                fitting += [bytes(nbytes)] * count
        tree[-1] = bytes(blob)
    except (TypeError, LookupError, ValueError, OverflowError):
        return frames
    return fitting
