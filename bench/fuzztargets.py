"""What ``fuzz.py`` feeds: the decoders, the three cores and the readers of files, each as its shell feeds it.

A target makes inputs and takes them in. What it raises, beside what is documented, is a finding. Cores are given plain
traffic between what is malformed, so that there is something to go wrong; after every phase all peers leave, and
nothing of theirs may be left.
"""

from __future__ import annotations

import gc
import os
import socket
import struct
import tempfile
import types
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from random import Random
from typing import Any, ClassVar, Final, TypeAlias

import numpy as np
from onnx import TensorProto, helper, numpy_helper

from bench.fuzzmutate import Frames, changed_bytes, malformed, number
from penstock.broker.core import Core as BrokerCore
from penstock.broker.events import Came, FromCaller, Gone, ToCaller, ToWorker
from penstock.broker.events import FromWorker as BrokerFromWorker
from penstock.broker.options import BrokerOptions
from penstock.broker.peers import CallerPeer, WorkerPeer
from penstock.client.arrays import Forms
from penstock.client.caller import Caller, Identity
from penstock.client.events import Complete, Fail, FromWorker
from penstock.client.short import Short
from penstock.wire import control, zmtp
from penstock.wire.arena import Arena
from penstock.wire.arena import Mapping as ArenaMapping
from penstock.wire.codec import (
    pack,
    pack_failure,
    pack_layout,
    pack_outcome,
    ranges,
    unpack,
    unpack_failure,
    unpack_layout,
    unpack_outcome,
)
from penstock.wire.errors import BadMessage, PenstockError
from penstock.wire.events import ArenaCame, BrokerFound, BrokerLost, FromBroker, Garbage, Say, Tick
from penstock.wire.messages import (
    COMPLETE,
    FAILED,
    FROM_CALLER,
    FROM_WORKER,
    INLINE_MAX_BYTES,
    ON_PUBLICATION,
    PARTIAL,
    TO_CALLER,
    TO_WORKER,
    Answers,
    Ask,
    Assign,
    Attached,
    Batch,
    Beat,
    Bye,
    CallerHello,
    Carrier,
    Cost,
    Costs,
    Done,
    Expect,
    Expected,
    Failure,
    Finished,
    Forgotten,
    Form,
    Freed,
    HelloWanted,
    Hung,
    Leaving,
    Message,
    Metrics,
    Models,
    Outcome,
    Ping,
    Pong,
    Refusal,
    Refusals,
    Requests,
    Results,
    Snapshot,
    Stuck,
    Submit,
    Tasks,
    Welcome,
    WorkerAddress,
    WorkerHello,
    WorkerModels,
    Workers,
)
from penstock.wire.metrics import Meters
from penstock.wire.models import LOADING, READY, Layout, ModelSpec, ModelState, Tensor, TensorSpec
from penstock.wire.slots import Slots
from penstock.worker.config import ConfigError, ModelConfig, load_config
from penstock.worker.core import Core as WorkerCore
from penstock.worker.core import Identity as WorkerIdentity
from penstock.worker.events import Loaded, Publish, Run, Subscribed, Unsubscribed
from penstock.worker.execute import execute
from penstock.worker.model import Model, load
from penstock.worker.onnxfile import OnnxFileError, read_onnx

Kinds: TypeAlias = Mapping[int, type[Message]]

EPOCH: Final = 7
TABLES: Final[dict[str, Kinds]] = {
    "FROM_CALLER": FROM_CALLER,
    "FROM_WORKER": FROM_WORKER,
    "TO_CALLER": TO_CALLER,
    "TO_WORKER": TO_WORKER,
    "ON_PUBLICATION": ON_PUBLICATION,
}
CALLERS: Final = [b"caller%02d" % each for each in range(3)]
WORKERS: Final = [b"worker%02d" % each for each in range(3)]
_ARENA_BYTES: Final = 1 << 16
_LARGE: Final = INLINE_MAX_BYTES + 4
_TENSOR: Final = TensorSpec("x", "FP32", (-1, -1))
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


def model_state(name: str = "double", version: str = "1", state: str = READY, batch: int = 8) -> ModelState:
    spec = ModelSpec(name, version, "onnx", (_TENSOR,), (TensorSpec("y", "FP32", (-1, -1)),), True, batch)
    return ModelState(name, version, state, "", spec if state == READY else None)


def form_of(
    rows: int, width: int, name: str = "double", version: str = "1", priority: int = 0, tenant: str = ""
) -> Form:
    nbytes = 4 * rows * width
    body = pack_layout(Layout((Tensor("x", "FP32", (rows, width), 0, nbytes),), ()))
    return Form(name, version, priority, tenant, rows, nbytes, b"%d" % width, body)


def outcome_of(rows: int, width: int) -> bytes:
    return pack_outcome(Outcome("double", "1", (Tensor("y", "FP32", (rows, width), 0, 4 * rows * width),)))


class Examples:
    """Valid messages as real traffic has them."""

    def __init__(self, random: Random) -> None:
        self._random = random
        meters = Meters()
        meters.value("penstock_callers").value = 3
        meters.histogram("penstock_queue_seconds", "double", "1").observe(0.01)
        self._samples = meters.samples()

    def carry(self, kind: type[Any], groups: Sequence[Any], *others: Any) -> Any:
        """A Carrier whose payloads are zeros."""
        travel = [group for group in groups if not group.places]
        blob = b"".join(bytes(each.nbytes * len(each.ids)) for each in travel if each.nbytes <= INLINE_MAX_BYTES)
        frames = [bytes(each.nbytes) for each in travel if each.nbytes > INLINE_MAX_BYTES for _ in each.ids]
        return kind(EPOCH, groups, *others, blob=blob, frames=frames)

    def form(self) -> Form:
        random = self._random
        width = random.choice((1, 2, 2, 3, 700, _LARGE // 4)) if random.random() < 0.3 else 2
        name = random.choice(("double", "double", "double", "other", "gone"))
        version, priority = random.choice(("1", "1", "")), random.choice((0, 0, 1, 5))
        return form_of(random.choice((1, 1, 2)), width, name, version, priority, random.choice(("", "t")))

    def requests(self, first: int, placed: bool = False) -> Requests:
        random, form = self._random, self.form()
        ids = tuple(range(first, first + random.choice((1, 1, 2, 5))))
        places = tuple(64 * each for each in range(len(ids))) if placed else ()
        return Requests(form, ids, tuple([random.choice((1, 1000, *[60_000_000] * 6))] * len(ids)), places)

    def tasks(self, first: int, caller: bytes, placed: bool = False) -> Tasks:
        requests = self.requests(first, placed)
        form = requests.form._replace(version="1")
        attempt = self._random.choice((1, 1, 1, 2))
        return Tasks(form, caller, attempt, 100, requests.ids, requests.timeouts_us, requests.places)

    def answers(self, ids: tuple[int, ...], placed: bool = False) -> Answers:
        random, width = self._random, self._random.choice((1, 2, _LARGE // 4))
        status = random.choice((COMPLETE, COMPLETE, COMPLETE, PARTIAL, FAILED))
        if status == FAILED:
            return Answers(status, 0, pack_failure(Failure("model_failed", "it failed", 0)), 5, ids)
        places = tuple(64 * each for each in range(len(ids))) if placed else ()
        return Answers(status, 4 * width, outcome_of(1, width), 5, ids, places, 3)

    def results(self, ids: Sequence[int], worker: bytes, placed: bool = False) -> Results:
        groups = [self.answers((each,), placed) for each in ids]
        message: Results = self.carry(Results, groups, worker, Batch(1, len(groups), "idle", 50, 40))
        return message

    def any_of(self, kind: type[Message]) -> Message:
        """One of a kind, of peers that anybody may have."""
        random, caller = self._random, self._random.choice(CALLERS)
        first = random.randrange(1, 50)
        freed = [Freed(caller, (first, first + 3))]
        made: dict[type[Message], Any] = {
            CallerHello: lambda: CallerHello(0, random.choice(("", "gateway")), 1, random.random() < 0.8),
            Submit: lambda: self.carry(Submit, [self.requests(first), self.requests(first + 9)], (1, 2), (3,)),
            Ask: lambda: Ask(EPOCH, 5),
            Beat: lambda: Beat(EPOCH, self._samples),
            Bye: lambda: Bye(EPOCH),
            Leaving: lambda: Leaving(EPOCH),
            WorkerHello: lambda: WorkerHello(0, "w", "cpu", 1, ["ipc:///run/w"], 2, self.models()),
            WorkerModels: lambda: WorkerModels(EPOCH, self.models()),
            Attached: lambda: Attached(EPOCH, caller, first, True),
            Done: lambda: Done(EPOCH, [Finished(caller, 1, 8, (first, first + 1), 900)]),
            Costs: lambda: Costs(EPOCH, [Cost("double", "1", 1, 8, 1000, (1, 8), (100, 500))]),
            Ping: lambda: Ping(EPOCH),
            Pong: lambda: Pong(EPOCH),
            Hung: lambda: Hung(EPOCH, [Stuck(caller, 1, (first, first + 1))], "a batch does not end"),
            Welcome: lambda: Welcome(EPOCH, "gateway", True, 3),
            HelloWanted: lambda: HelloWanted(EPOCH),
            Models: lambda: Models(EPOCH, self.models()),
            Workers: lambda: Workers(EPOCH, [WorkerAddress(each, "ipc:///run/w", 0, "w") for each in WORKERS]),
            Refusals: lambda: Refusals(EPOCH, [Refusal(first, "overloaded", "it is full", 1000)]),
            Metrics: lambda: Metrics(EPOCH, 1, [Snapshot("broker", self._samples)]),
            Expect: lambda: Expect(EPOCH, [Expected(caller, first, True, True)], [Forgotten(caller, 1)]),
            Assign: lambda: self.carry(Assign, [self.tasks(at, caller) for at in (first, first + 9)], freed, freed),
            Results: lambda: self.results(range(first, first + 3), random.choice(WORKERS)),
        }
        message: Message = made[kind]()
        return message

    def models(self) -> list[ModelState]:
        states = [model_state(), model_state("other", "2"), model_state("other", state=LOADING)]
        return self._random.sample(states, self._random.randrange(1, 4))


def hear(head: bytes, frames: Frames, kinds: Kinds) -> Message | BadMessage:
    """What a shell makes of a message."""
    try:
        return unpack(head, frames, kinds)
    except BadMessage as error:
        return error


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
    """``wire.zmtp``: what a caller receives, in pieces."""

    name = "zmtp"
    share = 0.10

    def make(self, random: Random) -> list[bytes]:
        kind, peer = random.choice((("DEALER", "ROUTER"), ("SUB", "XPUB")))
        opening = zmtp.Zmtp(peer, b"x").opening
        bodies = [random.randbytes(random.choice((0, 1, 254, 255, 256, 70_000))) for _ in range(random.randrange(4))]
        stream = opening + b"".join(map(bytes, zmtp.pack(bodies or [b"x"]))) + b"\x04\x07\x04PING\0\x01"
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
        reader = zmtp.Zmtp(each[0].decode(), b"caller00")
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


class Files(Target):
    """The readers of what lies in a repository: model.toml and model.onnx."""

    name = "files"
    share = 0.02
    _TOML: Final = (
        b'max_batch_size = 32\nmax_queue_delay = "2ms"\npreferred_batch_sizes = [8, 16, 32]\nweight = 1.0\n'
        b'instances = 2\nintra_op_spinning = false\nproviders = ["cuda", "cpu"]\ngpu_memory_limit = 8589934592\n'
    )

    def begin(self, random: Random) -> None:
        self._directory = tempfile.TemporaryDirectory()
        self._path = Path(self._directory.name, "file")
        self._onnx = model_contents()["other"]

    def make(self, random: Random) -> tuple[str, bytes]:
        if random.random() < 0.6:
            return "onnx", self._changed(random, self._onnx, self._TOML)
        odd = (b"9" * 5000, b"[" * 2000, b"nan", b'"9e9s"', b"{a.b.c=1}", b"-1", b"1e400", b'"\\ud800"', b"\0")
        values = [*odd, b"[]", b"0", b'""', b"true", b"1" * 300, b'"' + b"9" * 400 + b's"', b"1979-05-27"]
        lines = self._TOML.splitlines(keepends=True)
        for at in range(len(lines)):
            if random.random() < 0.3:
                lines[at] = lines[at].partition(b"=")[0] + b"= " + random.choice(values) + b"\n"
        random.shuffle(lines)
        text = b"".join(lines[: random.randrange(len(lines) + 1)])
        return "toml", self._changed(random, text, self._onnx) if random.random() < 0.5 else text

    @staticmethod
    def _changed(random: Random, data: bytes, other: bytes) -> bytes:
        for _ in range(random.choice((1, 1, 2, 5))):
            data = changed_bytes(random, data, other)
        return data

    def feed(self, each: tuple[str, bytes]) -> bool:
        kind, data = each
        self._path.write_bytes(data)
        try:
            if kind == "toml":
                load_config(self._path)
            else:
                read_onnx(self._path)
        except (ConfigError, OnnxFileError):
            return False
        return True

    def close(self) -> None:
        self._directory.cleanup()

    def bytes_of(self, each: tuple[str, bytes]) -> bytes:
        return each[1]

    def with_bytes(self, each: tuple[str, bytes], data: bytes) -> tuple[str, bytes]:
        return each[0], data


class Broker(CoreTarget):
    """The broker's core, fed as its shell feeds it, by callers and workers that mostly talk nonsense."""

    name = "broker"
    share = 0.10

    def begin(self, random: Random) -> None:
        super().begin(random)
        self._examples = Examples(random)
        self._now = 1000.0
        options = BrokerOptions(queue_requests_max=200, held_bytes_max=1 << 24, callers_max=40, workers_max=40)
        self.core = BrokerCore(options, EPOCH, self._now)
        self._last_id = 0
        self._count = 0

    def make(self, random: Random) -> Any:
        for _ in range(random.choice((0, 1, 2))):
            self._traffic(random)
        kind = random.random()
        if kind < 0.02:
            return Came(random.choice(CALLERS + WORKERS), random.choice((0, _ARENA_BYTES, 1 << 40)))
        if kind < 0.03:
            return Gone(random.choice(CALLERS + WORKERS), "it went", random.random() < 0.5)
        process, peer, message = self._valid(random)
        if random.random() < 0.05:  # somebody else says it
            peer = random.choice([*CALLERS, *WORKERS, random.randbytes(8)])
        return process, peer, *malformed(random, message, self._valid(random)[2], 0.85)

    def feed(self, each: Any) -> bool:
        understood = False
        if not isinstance(each, tuple):
            self._handle(each)
        else:
            process, peer, head, frames = each
            message = hear(head, frames, FROM_CALLER if process == "caller" else FROM_WORKER)
            if isinstance(message, BadMessage):
                self._handle(Garbage(process, str(message), peer))
            else:
                understood = True
                self._handle(FromCaller(peer, message) if process == "caller" else BrokerFromWorker(peer, message))
        self._count += 1
        if self._count % 3 == 0:
            self._now += (0.0, 0.0001, 0.01, 0.01, 0.4)[self._count % 5]
            self._handle(Tick())
        if self._count % 50 == 0:
            self.core.validate()
        return understood

    def _traffic(self, random: Random) -> None:
        process, peer, message = self._valid(random)
        kinds = FROM_CALLER if process == "caller" else FROM_WORKER
        heard = unpack(pack(message), message.frames if isinstance(message, Carrier) else (), kinds)
        self._handle(FromCaller(peer, heard) if process == "caller" else BrokerFromWorker(peer, heard))

    def _valid(self, random: Random) -> tuple[str, bytes, Message]:
        """What a peer may say, and who it is."""
        if random.random() < 0.5:
            peer = random.choice(CALLERS)
            return "caller", peer, self._of_caller(random, self.core.callers.get(peer))
        peer = random.choice(WORKERS)
        return "worker", peer, self._of_worker(random, self.core.workers.get(peer))

    def _of_caller(self, random: Random, caller: CallerPeer | None) -> Message:
        examples = self._examples
        if caller is None or random.random() < 0.01:
            return examples.any_of(CallerHello)
        if random.random() < 0.2:
            return examples.any_of(random.choice((*[Beat] * 10, *[Ask] * 9, Bye)))
        first = self._last_id + 1
        groups = [examples.requests(first, random.random() < 0.2), examples.requests(first + 5)]
        self._last_id += 10
        known = sorted(caller.requests)
        acks = ranges(sorted(random.sample(known, min(len(known), random.choice((0, 3, 50))))))
        cancels = tuple(random.sample(known, min(len(known), random.choice((0, 0, 2)))))
        message: Message = examples.carry(Submit, groups[: random.randrange(3)], acks, cancels)
        return message

    def _of_worker(self, random: Random, worker: WorkerPeer | None) -> Message:
        examples = self._examples
        if worker is None or random.random() < 0.01:
            return examples.any_of(WorkerHello)
        unheard = sorted(worker.expected.keys() - worker.callers)
        if unheard and random.random() < 0.5:
            return Attached(EPOCH, unheard[0], worker.expected[unheard[0]], True)
        if worker.held and random.random() < 0.6:
            lots = [lot for held in worker.held.values() for lot in dict.fromkeys(held.values())]
            lots = random.sample(lots, min(len(lots), 8))
            return Done(EPOCH, [Finished(lot.caller.id, lot.attempt, 8, lot.ids, 500) for lot in lots])
        kinds: tuple[type[Message], ...] = tuple(FROM_WORKER.values())
        kind = random.choice(kinds)
        return examples.any_of(kind if kind not in (Leaving, Bye, Hung, WorkerHello) or random.random() < 0.1 else Beat)

    def _handle(self, event: Any) -> None:
        for command in self.core.handle(event, self._now):
            if isinstance(command, ToCaller):
                self.said.append((command.message, TO_CALLER))
            elif isinstance(command, ToWorker):
                self.said.append((command.message, TO_WORKER))

    def settle(self) -> int:
        core = self.core
        for peer in {*core.callers, *core.workers, *CALLERS, *WORKERS}:
            self._handle(Gone(peer, "the end", True))
        self._now += 0.5
        self._handle(Tick())
        core.validate()
        ledger = core.ledger
        assert not core.callers, "callers are left"
        assert not core.workers, "workers are left"
        held = ledger.requests, ledger.rows, ledger.bytes
        assert held == (0, 0, 0), f"requests, rows and bytes are held of nobody: {held}"
        return census(core)


def _saved(nodes: Sequence[Any], kind: int, shape: Sequence[str], constants: Sequence[Any]) -> bytes:
    ports = [helper.make_tensor_value_info(name, kind, shape) for name in "xy"]
    graph = helper.make_graph(nodes, "graph", ports[:1], ports[1:], constants)
    content: bytes = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9
    ).SerializeToString()
    return content


def model_contents() -> dict[str, bytes]:
    """Files of models: y = x + x; y = x, strings; and a table of four in which others than 0 to 3 are not found."""
    table = numpy_helper.from_array(np.arange(4, dtype=np.int64), "table")
    shape = ["N", "M"]
    return {
        "double": _saved([helper.make_node("Add", ["x", "x"], ["y"])], TensorProto.FLOAT, shape, []),
        "strings": _saved([helper.make_node("Identity", ["x"], ["y"])], TensorProto.STRING, shape, []),
        "other": _saved([helper.make_node("Gather", ["table", "x"], ["y"])], TensorProto.INT64, shape, [table]),
    }


def _load_models() -> list[Model]:
    with tempfile.TemporaryDirectory() as name:
        models = []
        for model, content in model_contents().items():
            path = Path(name, f"{model}.onnx")
            path.write_bytes(content)
            delay = "1ms" if model == "double" else "0ms"
            models.append(load(path, model, "1", ModelConfig(max_batch_size=8, max_queue_delay=delay)))
        return models


class Worker(CoreTarget):
    """The worker's core with real models, fed by a broker that mostly talks nonsense, and by subscriptions."""

    name = "worker"
    share = 0.05
    _models: ClassVar[list[Model]] = []

    def begin(self, random: Random) -> None:
        super().begin(random)
        self._examples = Examples(random)
        if not self._models:
            self._models.extend(_load_models())
        self._now = 1.0
        self.slots = Slots(Arena(_ARENA_BYTES, "fuzz"))
        self.core = WorkerCore(WorkerIdentity(b"a worker", "w", "cpu", 1, ("ipc:///run/w",), 2, True), [])
        self._batches: list[Run] = []
        self._published: list[Publish] = []
        self._subscribed: dict[bytes, int] = {}
        self._last_id = 0
        self._serial = 0
        self._count = 0
        for model in self._models:
            spec = model.spec
            self._handle(Loaded(ModelState(spec.name, spec.version, READY, "", spec), model))

    def make(self, random: Random) -> Any:
        for _ in range(random.choice((0, 1, 2))):
            self._handle(self._event(random))
        if random.random() < 0.1:
            return self._event(random, wrong=True)
        return malformed(random, self._valid(random), self._valid(random), 0.85)

    def feed(self, each: Any) -> bool:
        understood = False
        if isinstance(each, tuple):
            message = hear(each[0], each[1], TO_WORKER)
            understood = not isinstance(message, BadMessage)
            self._handle(Garbage("broker", "nonsense") if isinstance(message, BadMessage) else FromBroker(message))
        else:
            self._handle(each)
        self._count += 1
        self._now += (0.0, 0.0001, 0.01, 0.2)[self._count % 4]
        self._handle(Tick())
        if len(self._batches) > self._count % 2:
            self._finish()
        if self._count % 20 == 0:
            self.core.validate()
        return understood

    def _finish(self) -> None:
        run = self._batches.pop(0)
        executed = execute(run.model, run.batch, self.slots)
        executed.compute_s = 0.001  # what it took is another each time
        self._handle(executed)

    def _event(self, random: Random, wrong: bool = False) -> Any:
        """``wrong``: at a time when it does not happen."""
        caller = random.randbytes(8) if wrong else random.choice(CALLERS)
        kind = random.random()
        if kind < 0.15 and self.core.may_subscribe(caller):
            self._subscribed[caller] = self._subscribed.get(caller, 0) + 1
            return Subscribed(caller)
        if kind < 0.2 and (wrong or self._subscribed.get(caller)):
            self._subscribed[caller] = max(0, self._subscribed.get(caller, 0) - 1)
            return Unsubscribed(caller)
        if kind < 0.3:
            self._serial += 1
            return ArenaCame(caller, self._serial, ArenaMapping(os.dup(self.slots.arena.fd)))
        if kind < 0.32:
            return random.choice((BrokerFound(), BrokerLost("it went")))
        message = self._valid(random)
        frames = message.frames if isinstance(message, Carrier) else ()
        return FromBroker(unpack(pack(message), frames, TO_WORKER))

    def _valid(self, random: Random) -> Message:
        examples, caller, core = self._examples, random.choice(CALLERS), self.core
        kind = random.choice((Expect, Expect, Assign, Assign, Assign, Assign, Beat, Bye, HelloWanted))
        if not core.membership.joined or random.random() < 0.02:
            return Welcome(random.choice((EPOCH, EPOCH, EPOCH + 1)), "w", True, self._serial)
        message: Message
        if kind is Expect:
            self._serial += 1
            expected = Expected(caller, self._serial, random.random() < 0.5, random.random() < 0.5)
            gone = [Forgotten(random.choice(CALLERS), self._serial - 1)] if random.random() < 0.2 else []
            message = Expect(EPOCH, [expected], gone)
        elif kind is Assign:
            self._last_id += 10
            shares = caller in core._arenas and random.random() < 0.5
            groups = [examples.tasks(self._last_id - 10, caller, shares), examples.tasks(self._last_id - 5, caller)]
            freed = Freed(caller, (max(0, self._last_id - 60), self._last_id - 20)) if self._last_id > 20 else None
            cancelled = Freed(caller, (max(0, self._last_id - 40), self._last_id - 15)) if self._last_id > 20 else None
            message = examples.carry(
                Assign,
                groups[: random.randrange(3)],
                [freed] if freed and random.random() < 0.5 else [],
                [cancelled] if cancelled and random.random() < 0.2 else [],
            )
        else:
            message = examples.any_of(kind if kind is Beat or random.random() < 0.1 else Beat)
        message.epoch = core.membership.epoch
        return message

    def _handle(self, event: Any) -> None:
        for command in self.core.handle(event, self._now):
            if isinstance(command, Run):
                self._batches.append(command)
            elif isinstance(command, Say):
                self.said.append((command.message, FROM_WORKER))
            elif isinstance(command, Publish):
                self._published.append(command)

    def check(self) -> None:
        super().check()
        published, self._published = self._published, []
        for command in published:
            heard = hear(command.head, list(command.frames), ON_PUBLICATION)
            assert not isinstance(heard, BadMessage), f"published what nobody understands: {heard}"

    def settle(self) -> int:
        core = self.core
        while self._batches:
            self._finish()
        self._handle(FromBroker(Welcome(EPOCH, "w", True, self._serial)))
        while self._batches:
            self._finish()
        for caller, count in self._subscribed.items():
            for _ in range(count):
                self._handle(Unsubscribed(caller))
        self._subscribed.clear()
        core.validate()
        assert core.holds_nothing, "requests or results are held of nobody"
        assert core.kept_bytes == 0, f"{core.kept_bytes} bytes are kept"
        used = self.slots.arena.allocator.used
        assert used == 0, f"{used} bytes of the arena are lost"
        return census([value for name, value in vars(core).items() if name not in ("_models", "_plans", "_batcher")])

    def close(self) -> None:
        self.slots.close()


class Sink:
    """Of one request: it ends once."""

    def __init__(self, target: CallerCore) -> None:
        self._target = target
        self.ends = 0

    def complete(self, answer: Complete) -> None:
        self._end()
        if answer.held:
            self._target.held.append(answer.held)

    def fail(self, error: PenstockError) -> None:
        self._end()

    def _end(self) -> None:
        self.ends += 1
        assert self.ends == 1, "a request ended twice"
        self._target.open.discard(self)


class CallerCore(CoreTarget):
    """The callers' core, which client and gateway share: nonsense of a broker and of workers, and the short way."""

    name = "caller"
    share = 0.08

    def begin(self, random: Random) -> None:
        super().begin(random)
        self._examples = Examples(random)
        self._now = 1.0
        self._arena = Arena(_ARENA_BYTES, "fuzz")
        self.caller = Caller(Identity(b"caller00", "gateway", 1, True, "here", calls_max=64))
        self.short = Short(self.caller, Forms())
        self.open: set[Sink] = set()
        self.held: list[int] = []
        self._serial = 0
        self._count = 0

    def make(self, random: Random) -> Any:
        for _ in range(random.choice((1, 2))):
            self._traffic(random)
        kind = random.random()
        if kind < 0.03:
            return random.choice((BrokerFound(), BrokerLost("it went"), Garbage("worker", "x")))
        if kind < 0.06:
            self._serial += 1
            worker = random.choice([*WORKERS, random.randbytes(8)])
            serial = random.choice((self._serial, number(random)))
            return ArenaCame(worker, serial, ArenaMapping(os.dup(self._arena.fd)))
        table = random.choice(("worker", "worker", "broker"))
        message, other = self._valid(random, table), self._valid(random, table)
        return table, random.random() < 0.5, *malformed(random, message, other, 0.85)

    def feed(self, each: Any) -> bool:
        understood = False
        if not isinstance(each, tuple):
            self._handle(each)
        else:
            table, short, head, frames = each
            if table == "worker" and short and not frames and self.short.take(head):
                understood = True
            else:
                message = hear(head, frames, ON_PUBLICATION if table == "worker" else TO_CALLER)
                if isinstance(message, BadMessage):
                    self._handle(Garbage(table, str(message)))
                else:
                    understood = True
                    self._handle(FromWorker(message) if isinstance(message, Results) else FromBroker(message))
        self._count += 1
        self._now += (0.0, 0.001, 0.05)[self._count % 3]
        self._handle(Tick())
        self._flush()
        if self._count % 20 == 0:
            self.caller.validate()
        return understood

    def _traffic(self, random: Random) -> None:
        kind = random.random()
        if not self.caller.membership.joined or kind < 0.02:
            self._handle(FromBroker(Welcome(EPOCH, "gateway", True, self._serial)))
            self._handle(FromBroker(Models(EPOCH, self._examples.models())))
        elif kind < 0.5 and len(self.caller.calls) < 64:
            form = form_of(1, random.choice((1, 2, _LARGE // 4)))
            sink = Sink(self)
            self.open.add(sink)
            number_ = self.caller.submit(form, bytes(form.nbytes), random.choice((0.01, 1.0, 30.0)), sink, self._now)
            if random.random() < 0.1:
                self.caller.cancel(number_)
                self.open.discard(sink)
            self._flush()
        elif self.held and kind < 0.8:
            self.caller.release(self.held.pop(random.randrange(len(self.held))), self._now)

    def _valid(self, random: Random, table: str) -> Message:
        calls = list(self.caller.calls)
        ids = random.sample(calls, min(len(calls), random.randrange(1, 4))) or [1]
        if table == "worker":
            return self._examples.results(ids, random.choice(WORKERS), random.random() < 0.3)
        kind = random.choice((*TO_CALLER.values(), Models, Workers, Workers, Refusals, Refusals))
        if kind in (HelloWanted, Bye, Welcome) and random.random() < 0.8:
            kind = Refusals
        message = self._examples.any_of(kind)
        if isinstance(message, Refusals):
            message.refusals = [Refusal(each, "overloaded", "it is full", 1000) for each in ids]
        elif isinstance(message, Workers):
            self._serial += 1
            message.workers = [
                WorkerAddress(each, f"ipc:///run/{each.decode()}", random.choice((0, self._serial)), "w")
                for each in random.sample(WORKERS, random.randrange(4))
            ]
        return message

    def _handle(self, event: Any) -> None:
        for command in self.caller.handle(event, self._now):
            if isinstance(command, Complete):
                command.sink.complete(command)
            elif isinstance(command, Fail):
                command.sink.fail(command.error)
            elif isinstance(command, Say):
                self.said.append((command.message, FROM_CALLER))

    def _flush(self) -> None:
        if self.caller.wants_flush(self._now):
            for message in self.caller.flush(self._now):
                self.said.append((message, FROM_CALLER))

    def settle(self) -> int:
        self._handle(BrokerLost("the end"))
        self._now += 100.0
        self._handle(Tick())
        while self.held:
            self.caller.release(self.held.pop(), self._now)
        self._handle(FromBroker(Welcome(EPOCH, "gateway", True, 1 << 64)))
        self._handle(FromBroker(Workers(EPOCH, [])))
        self._flush()
        self.caller.validate()
        assert not self.open, f"{len(self.open)} requests never ended"
        assert not self.caller.calls, "requests are left"
        return census([value for name, value in vars(self.caller).items() if name != "models"])

    def close(self) -> None:
        with suppress(ValueError):
            self._arena.close()
