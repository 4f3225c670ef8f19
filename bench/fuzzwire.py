"""What ``fuzz.py`` says to the decoders of ``wire``: messages, ZeroMQ's frames and packets of control connections."""

from __future__ import annotations

import os
import socket
import struct
from random import Random
from typing import Final

from bench.fuzzexamples import CALLERS, TABLES, Examples, outcome_of
from bench.fuzzmutate import Frames, changed_bytes, malformed, number
from bench.fuzztarget import Kinds, Target
from penstock.wire import control, zmtp
from penstock.wire.codec import pack, pack_failure, unpack, unpack_failure, unpack_layout, unpack_outcome
from penstock.wire.errors import BadMessage
from penstock.wire.messages import Failure, Message


class Codec(Target):
    """``wire.codec``: each direction's messages, and what is packed inside them."""

    name = "codec"
    share = 0.45
    _INNER: Final = {"layout": unpack_layout, "outcome": unpack_outcome, "failure": unpack_failure}

    def begin(self, random: Random) -> None:
        self._examples = Examples(random)
        self._understood: tuple[Message, Frames, Kinds] | None = None

    def make(self, random: Random) -> tuple[str, bytes, Frames]:
        if random.random() < 0.1:
            form = self._examples.form()
            failure = pack_failure(Failure("lost", "x", 1))
            packed = {"layout": form.body, "outcome": outcome_of(1, 2), "failure": failure}
            inner = random.choice(sorted(packed))
            return inner, changed_bytes(random, packed[inner], form.body), []
        table = random.choice(sorted(TABLES))
        kinds = list(TABLES[table].values())
        message, other = (self._examples.any_of(random.choice(kinds)) for _ in range(2))
        return table, *malformed(random, message, other, random.choice((0.0, 0.5, 0.9)))

    def feed(self, each: tuple[str, bytes, Frames]) -> bool:
        table, head, frames = each
        try:
            if table in self._INNER:
                self._INNER[table](head)
                return True
            self._understood = unpack(head, frames, TABLES[table]), frames, TABLES[table]
        except BadMessage:
            return False
        return True

    def check(self) -> None:
        if self._understood is not None:
            message, frames, kinds = self._understood
            self._understood = None
            assert unpack(pack(message), frames, kinds) == message, "packed again, it is another message"

    def bytes_of(self, each: tuple[str, bytes, Frames]) -> bytes:
        return each[1]

    def with_bytes(self, each: tuple[str, bytes, Frames], data: bytes) -> tuple[str, bytes, Frames]:
        return each[0], data, each[2]


class Zmtp(Target):
    """``wire.zmtp``: what any end of a connection receives, in pieces."""

    name = "zmtp"
    share = 0.10

    def make(self, random: Random) -> list[bytes]:
        kind, peer = random.choice((("DEALER", "ROUTER"), ("SUB", "XPUB"), ("ROUTER", "DEALER"), ("XPUB", "SUB")))
        opening = zmtp.Zmtp(peer, b"x").opening
        bodies = [random.randbytes(random.choice((0, 1, 254, 255, 256, 70_000))) for _ in range(random.randrange(4))]
        stream = opening + b"".join(map(bytes, zmtp.pack(bodies or [b"x"]))) + b"\x04\x07\x04PING\0\x01"
        stream += b"\x04\x0c\x09SUBSCRIBEtt" * random.randrange(2)
        # Most of it behind the greeting, which is soon found to be none.
        keep = random.choice((0, 64, 64, len(opening), len(opening)))
        if random.random() < 0.3:
            claims = struct.pack(">BQ", random.choice((2, 3, 6)), random.choice((number(random), 1 << 20)))
            stream = stream[:keep] + claims + stream[keep:]
        stream = stream[:keep] + changed_bytes(random, stream[keep:], stream)
        pieces = [kind.encode()]
        while stream:
            size = random.choice((1, 9, 64, 1000, len(stream)))
            pieces.append(stream[:size])
            stream = stream[size:]
        return pieces

    def feed(self, each: list[bytes]) -> bool:
        reader = zmtp.Zmtp(
            each[0].decode(), b"caller00", *((1 << 20, 16_384) if each[0] in (b"ROUTER", b"XPUB") else ())
        )
        try:
            for piece in each[1:]:
                while piece:
                    room = reader.room()
                    part = piece[: len(room)]
                    room[: len(part)] = part
                    reader.received(len(part))
                    piece = piece[len(part) :]
        except BadMessage:
            return False
        return reader.ready


class Control(Target):
    """``wire.control``: the packets of a control connection, over a real one, some with descriptors."""

    name = "control"
    share = 0.12

    def begin(self, random: Random) -> None:
        self._ours, self._theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._ours.setblocking(False)
        self._null = os.open(os.devnull, os.O_RDONLY)
        self._descriptors = len(os.listdir("/proc/self/fd"))

    def make(self, random: Random) -> tuple[bytes, int]:
        hello = struct.pack("<4sH8sQ", b"PNST", 1, random.choice([*CALLERS, bytes(8)]), random.getrandbits(64))
        packet = changed_bytes(random, hello, hello) if random.random() < 0.9 else hello
        return packet or b"x", random.choice((0, 0, 1, 2, 9))

    def feed(self, each: tuple[bytes, int]) -> bool:
        packet, descriptors = each
        socket.send_fds(self._theirs, [packet], [self._null] * descriptors)
        try:
            introduced = control.receive(self._ours)
        except BadMessage:
            return False
        assert introduced is not None, "it ended"
        if introduced.arena != control.NO_ARENA:
            os.close(introduced.arena)
        return True

    def settle(self) -> int:
        left = len(os.listdir("/proc/self/fd")) - self._descriptors
        assert not left, f"{left} descriptors were left open"
        return 0

    def close(self) -> None:
        self._ours.close()
        self._theirs.close()
        os.close(self._null)
