"""Models built in code, requests for them, and conversations with a worker's core."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias, TypeVar

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from penstock.wire.arena import Arena
from penstock.wire.codec import pack, pack_layout, unpack, unpack_failure, unpack_outcome
from penstock.wire.events import Arena as ReadableArena
from penstock.wire.events import ArenaCame, FromBroker, Log, Say, Tick
from penstock.wire.messages import (
    FAILED,
    INLINE_MAX_BYTES,
    ON_PUBLICATION,
    TO_WORKER,
    Answers,
    Assign,
    Attached,
    Done,
    Expect,
    Expected,
    Failure,
    Finished,
    Forgotten,
    Form,
    Freed,
    Message,
    Results,
    Tasks,
    Welcome,
)
from penstock.wire.messages import Batch as BatchInfo
from penstock.wire.models import READY, Layout, ModelState, Tensor, check
from penstock.wire.slots import Slots
from penstock.wire.tensors import Array, decode, encode
from penstock.worker.batcher import Batch
from penstock.worker.config import ModelConfig
from penstock.worker.core import Core
from penstock.worker.events import Command, Event, Loaded, Publish, Run, Subscribed
from penstock.worker.execute import Executed, execute
from penstock.worker.lots import Lot
from penstock.worker.model import Model, load
from penstock.worker.options import MAX_COMPUTE_S
from penstock.worker.plan import Plan
from penstock.worker.serving import Identity

Dims: TypeAlias = Sequence[int | str | None] | None
Ports: TypeAlias = Mapping[str, tuple[int, Dims]]  # by name: the element type and the dimensions
Answer: TypeAlias = dict[str, Array] | Failure
MakeLot: TypeAlias = Callable[..., Lot]

FLOAT, INT64, STRING, BFLOAT16 = TensorProto.FLOAT, TensorProto.INT64, TensorProto.STRING, TensorProto.BFLOAT16
WORKER = b"a worker"
MINUTE_US = 60_000_000

M = TypeVar("M", bound=Message)


class Workshop:
    """Makes models of a few nodes and loads them as a worker does."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._serial = itertools.count()

    def build(
        self,
        nodes: Sequence[onnx.NodeProto],
        inputs: Ports,
        outputs: Ports,
        constants: Mapping[str, Array | onnx.TensorProto] | None = None,
        domain: str = "",
    ) -> bytes:
        graph = helper.make_graph(
            nodes,
            "graph",
            [helper.make_tensor_value_info(name, *port) for name, port in inputs.items()],
            [helper.make_tensor_value_info(name, *port) for name, port in outputs.items()],
            [
                numpy_helper.from_array(value, name) if isinstance(value, np.ndarray) else value
                for name, value in (constants or {}).items()
            ],
        )
        opsets = [helper.make_opsetid("", 17)] + ([helper.make_opsetid(domain, 1)] if domain else [])
        content: bytes = helper.make_model(graph, opset_imports=opsets, ir_version=9).SerializeToString()
        return content

    def save(self, content: bytes) -> Path:
        path = self._folder / f"{next(self._serial)}.onnx"
        path.write_bytes(content)
        return path

    def load(self, content: bytes, name: str = "model", **config: Any) -> Model:
        """With the configuration's keys as keywords. Not probed."""
        return load(self.save(content), name, "1", ModelConfig(**config))

    def make(
        self,
        nodes: Sequence[onnx.NodeProto],
        inputs: Ports,
        outputs: Ports,
        constants: Mapping[str, Array | onnx.TensorProto] | None = None,
        *,
        name: str = "model",
        **config: Any,
    ) -> Model:
        return self.load(self.build(nodes, inputs, outputs, constants), name, **config)

    def unary(self, operator: str, kind: int, dims: Dims, *, name: str = "model", **config: Any) -> Model:
        """y = operator(x), of the same type and shape."""
        node = helper.make_node(operator, ["x"], ["y"])
        return self.make([node], {"x": (kind, dims)}, {"y": (kind, dims)}, name=name, **config)


class Request(NamedTuple):
    form: Form
    payload: bytes


class Requests:
    """Requests as callers make them, and answers as callers read them."""

    def ask(
        self,
        model: Model,
        inputs: Mapping[str, Array],
        outputs: Sequence[str] = (),
        gap: int = 0,
    ) -> Request:
        """Tensors lie in the order of ``inputs``, ``gap`` bytes before each."""
        spec = model.spec
        datatypes = {tensor.name: tensor.datatype for tensor in spec.inputs}
        tensors: list[Tensor] = []
        payload = b""
        for name, array in inputs.items():
            payload += bytes(gap)
            data = bytes(encode(array, datatypes[name]))
            tensors.append(Tensor(name, datatypes[name], array.shape, len(payload), len(data)))
            payload += data
        layout = Layout(tuple(tensors), tuple(outputs))
        size = check(spec, layout)
        body = pack_layout(layout)
        return Request(Form(spec.name, spec.version, 0, "", size.rows, len(payload), size.key, body), payload)

    def lot(
        self,
        model: Model,
        requests: Sequence[Request],
        ids: Sequence[int],
        *,
        caller: bytes = b"caller a",
        attempt: int = 1,
        timeouts_us: Sequence[int] = (),
        arrived: float = 0.0,
        plan: Plan | None = None,
        before: int = 0,
    ) -> Lot:
        """Requests of one form side by side, ``before`` bytes into the message's blob."""
        form = requests[0].form
        assert {request.form for request in requests} == {form}
        payload: Any = tuple(memoryview(request.payload) for request in requests)
        if form.nbytes <= INLINE_MAX_BYTES:
            payload = bytes(before) + b"".join(payload)
        timeouts = tuple(timeouts_us) or (MINUTE_US,) * len(ids)
        plan = plan or Plan(model, form)
        alone = attempt > 1
        return Lot({}, caller, attempt, plan, tuple(ids), timeouts, payload, before, 0, arrived, alone=alone)

    def run(self, model: Model, lots: Sequence[Lot], run: Callable[[Model, Batch], Executed] = execute) -> Executed:
        """Run lots as one batch."""
        rows = sum(lot.rows for lot in lots)
        return run(model, Batch(1, (model.spec.name, model.spec.version), list(lots), rows, "full"))

    def answers(self, executed: Executed) -> dict[bytes, dict[int, Answer]]:
        """What each caller reads, by id: outputs by name, or a failure."""
        found: dict[bytes, dict[int, Answer]] = {}
        for caller, publication in executed.publications.items():
            message = Results(
                1,
                publication.groups,
                WORKER,
                executed.info,
                blob=b"".join(publication.inline),
                frames=publication.frames,
            )
            found[caller] = dict(self.read(pack(message), message.frames))
        return found

    def unpack(self, head: bytes, frames: Sequence[Any]) -> Results:
        message = unpack(head, frames, ON_PUBLICATION)
        assert isinstance(message, Results)
        return message

    def read(self, head: bytes, frames: Sequence[Any], arena: Arena | None = None) -> list[tuple[int, Answer]]:
        """The answers in a published message, as they are now where they lie in the worker's arena."""
        message = self.unpack(head, frames)
        found: list[tuple[int, Answer]] = []
        for group, start in zip(message.groups, message.starts, strict=True):
            for at, number in enumerate(group.ids):
                if group.places:
                    assert arena is not None, "a caller is sent places that cannot read them"
                    payload: Any = bytes(arena.view(group.places[at], group.nbytes))
                elif group.nbytes <= INLINE_MAX_BYTES:
                    begin = start + at * group.nbytes
                    payload = message.blob[begin : begin + group.nbytes]
                else:
                    payload = message.frames[start + at]
                found.append((number, _read(group, payload)))
        return found

    def expected(self, model: Model, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """What the model itself gives for one request."""
        outputs = model.run([inputs[tensor.name] for tensor in model.spec.inputs])
        return {tensor.name: output for tensor, output in zip(model.spec.outputs, outputs, strict=True)}


def _read(group: Answers, payload: Any) -> Answer:
    if group.status == FAILED:
        return unpack_failure(group.body)
    outcome = unpack_outcome(group.body)
    assert sum(tensor.nbytes for tensor in outcome.tensors) == group.nbytes
    return {
        tensor.name: decode(tensor.datatype, tensor.shape, payload[tensor.offset : tensor.offset + tensor.nbytes])
        for tensor in outcome.tensors
    }


class Talk:
    """A conversation with a core: what it hears, what it says, and a clock that stands still between two words.

    Every event is followed by ``validate``. Batches wait in ``batches`` until ``finish`` runs one. Each method returns
    the commands that followed. ``now``: seconds.
    """

    def __init__(
        self,
        requests: Requests,
        instances: int = 1,
        local: bool = True,
        slots: Slots | None = None,
        max_compute_s: float = MAX_COMPUTE_S,
    ) -> None:
        """``slots``: of the worker's arena."""
        self.requests = requests
        self.slots = slots
        self.now = 1.0
        identity = Identity(WORKER, "worker", "cpu", 42, ("ipc://results",), instances, local)
        self.core = Core(identity, [], max_compute_s)
        self.batches: list[Run] = []
        self.serials: dict[bytes, int] = {}  # of callers' last introductions
        self._serial = 0
        self._begun: set[bytes] = set()

    def hear(self, event: Event, after: float = 0.0) -> list[Command]:
        """What an event, ``after`` seconds, leads to."""
        self.now += after
        commands = self.core.handle(event, self.now)
        self.core.validate()
        self.batches += [command for command in commands if isinstance(command, Run)]
        return commands

    def tell(self, message: Message, after: float = 0.0, frames: Sequence[Any] = ()) -> list[Command]:
        """A message of the broker, as it comes off the wire."""
        return self.hear(FromBroker(unpack(pack(message), frames, TO_WORKER)), after)

    def wait(self, seconds: float = 0.0) -> list[Command]:
        return self.hear(Tick(), seconds)

    @property
    def epoch(self) -> int:
        return self.core.membership.epoch

    def load(self, model: Model) -> list[Command]:
        spec = model.spec
        return self.hear(Loaded(ModelState(spec.name, spec.version, READY, "", spec), model))

    def join(self, epoch: int = 7) -> list[Command]:
        return self.tell(Welcome(epoch, "worker-1"))

    def expect(
        self,
        *callers: bytes,
        gone: Sequence[bytes] = (),
        reading: Sequence[bytes] = (),
        sharing: Sequence[bytes] = (),
    ) -> list[Command]:
        """The broker introduces callers, and says which have gone."""
        introduced = [
            Expected(caller, self.introduce(caller), caller in sharing, caller in reading) for caller in callers
        ]
        before = [Forgotten(each, self.serials.get(each, 0) - (each in self._begun)) for each in gone]
        return self.tell(Expect(self.epoch, introduced, before))

    def introduce(self, caller: bytes) -> int:
        """The number of a new introduction, or of the one that has been begun by ``come``."""
        if caller not in self._begun:
            self._serial += 1
            self.serials[caller] = self._serial
        self._begun.discard(caller)
        return self.serials[caller]

    def come(self, caller: bytes, arena: ReadableArena | None, reason: str = "") -> list[Command]:
        """A caller's arena, before the message that introduces it."""
        serial = self.introduce(caller)
        self._begun.add(caller)
        return self.hear(ArenaCame(caller, serial, arena, reason))

    def attached(self, caller: bytes, attached: bool = True) -> Attached:
        """What the worker says of a caller's subscription."""
        return Attached(self.epoch, caller, self.serials[caller], attached)

    def subscribe(self, caller: bytes) -> list[Command]:
        return self.hear(Subscribed(caller))

    def assign(
        self,
        caller: bytes,
        ids: Sequence[int],
        request: Request,
        *,
        attempt: int = 1,
        timeouts_us: Sequence[int] = (),
    ) -> list[Command]:
        """The same request under each of some ids; alone when a worker that had it before has died."""
        timeouts = tuple(timeouts_us) or (MINUTE_US,) * len(ids)
        tasks = Tasks(request.form, caller, attempt, 0, tuple(ids), timeouts)
        payloads, alone = [request.payload] * len(ids), attempt > 1
        if request.form.nbytes <= INLINE_MAX_BYTES:
            return self.tell(Assign(self.epoch, [tasks], alone=alone, blob=b"".join(payloads)))
        return self.tell(Assign(self.epoch, [tasks], alone=alone, frames=payloads), frames=payloads)

    def free(self, caller: bytes, *ranges: int) -> list[Command]:
        return self.tell(Assign(self.epoch, [], [Freed(caller, ranges)]))

    def cancel(self, caller: bytes, *ranges: int) -> list[Command]:
        return self.tell(Assign(self.epoch, [], [], [Freed(caller, ranges)]))

    def finish(self, after: float = 0.0, which: int = 0) -> list[Command]:
        """One of the batches that run has ended, by default the one that was started first."""
        run = self.batches.pop(which)
        return self.hear(execute(run.model, run.batch, self.slots), after)

    def said(self, commands: Sequence[Command], kind: type[M]) -> list[M]:
        """The messages of one kind to the broker."""
        messages = [command.message for command in commands if isinstance(command, Say)]
        return [message for message in messages if isinstance(message, kind)]

    def done(self, commands: Sequence[Command]) -> list[Finished]:
        """What is said to be done, without what it took, which is never the same twice."""
        return [each._replace(compute_us=0) for message in self.said(commands, Done) for each in message.done]

    def heard(self, commands: Sequence[Command], caller: bytes) -> list[tuple[int, Answer]]:
        """What is published for a caller."""
        published = [command for command in commands if isinstance(command, Publish) and command.caller == caller]
        arena = None if self.slots is None else self.slots.arena
        return [answer for each in published for answer in self.requests.read(each.head, each.frames, arena)]

    def about(self, commands: Sequence[Command]) -> list[BatchInfo]:
        """What published messages say of their batches."""
        published = [command for command in commands if isinstance(command, Publish)]
        return [self.requests.unpack(command.head, command.frames).batch for command in published]

    def logged(self, commands: Sequence[Command]) -> list[str]:
        return [command.event for command in commands if isinstance(command, Log)]


@pytest.fixture(scope="session")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return Workshop(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="session")
def requests() -> Requests:
    return Requests()


def _double(workshop: Workshop, name: str, **config: Any) -> Model:
    node = helper.make_node("Add", ["x", "x"], ["y"])
    port = (FLOAT, ["N", "M"])
    return workshop.make([node], {"x": port}, {"y": port}, name=name, max_batch_size=8, **config)


@pytest.fixture(scope="session")
def double(workshop: Workshop) -> Model:
    """y = x + x, rows of any length; requests share a batch when their rows are as long."""
    return _double(workshop, "double")


@pytest.fixture(scope="session")
def slow(workshop: Workshop) -> Model:
    """As ``double``, but its batches may wait 10 ms for more."""
    return _double(workshop, "slow", max_queue_delay="10ms")


@pytest.fixture(scope="session")
def twice(workshop: Workshop) -> Model:
    """As ``slow``, and two of its batches may run at once."""
    return _double(workshop, "twice", max_queue_delay="1ms", instances=2)


@pytest.fixture(scope="session")
def padded(workshop: Workshop) -> Model:
    """As ``double``, and its batches have three or eight rows."""
    return _double(workshop, "padded", preferred_batch_sizes=(3, 8), weight=0.5)


@pytest.fixture(scope="session")
def tuned(workshop: Workshop) -> Model:
    """As ``double``, but how many rows its batches have and what they wait for is picked."""
    model = _double(workshop, "tuned", latency_target="10ms", instances=2)
    model.warm_s = {rows: 0.001 * rows for rows in (1, 2, 4, 8)}
    return model


@pytest.fixture(scope="session")
def pair(workshop: Workshop) -> Model:
    """s = a + a, float32 [N, 3]; t = b + b, int64 [N]."""
    nodes = [helper.make_node("Add", ["a", "a"], ["s"]), helper.make_node("Add", ["b", "b"], ["t"])]
    inputs: Ports = {"a": (FLOAT, ["N", 3]), "b": (INT64, ["N"])}
    outputs: Ports = {"s": (FLOAT, ["N", 3]), "t": (INT64, ["N"])}
    return workshop.make(nodes, inputs, outputs, name="pair", max_batch_size=16)


@pytest.fixture(scope="session")
def lookup(workshop: Workshop) -> Model:
    """y = table[i] with a table of four: an index beyond it is an error of ONNX Runtime."""
    node = helper.make_node("Gather", ["table", "i"], ["y"])
    table = np.array([10, 11, 12, 13], np.float32)
    ports: tuple[Ports, Ports] = {"i": (INT64, ["N"])}, {"y": (FLOAT, ["N"])}
    return workshop.make([node], *ports, {"table": table}, name="lookup", max_batch_size=16)


@pytest.fixture(scope="session")
def strings(workshop: Workshop) -> Model:
    return workshop.unary("Identity", STRING, ["N", "M"], name="strings", max_batch_size=16)


@pytest.fixture(scope="session")
def alone(workshop: Workshop) -> Model:
    """Its first dimension is fixed, so each request runs by itself."""
    return workshop.unary("Neg", FLOAT, [2, "M"], name="alone")


@pytest.fixture(scope="session")
def make_lot(requests: Requests, double: Model, slow: Model) -> MakeLot:
    """``make_lot(ids, now, rows=1, width=1, timeouts_us=MINUTE_US, attempt=1, model="double")``: a lot that arrived at
    ``now``. Requests of other widths cannot share a batch."""
    models = {"double": double, "slow": slow}
    plans: dict[tuple[str, int, int], Plan] = {}

    def make(
        ids: list[int],
        now: float,
        rows: int = 1,
        width: int = 1,
        timeouts_us: int | Sequence[int] = MINUTE_US,
        attempt: int = 1,
        model: str = "double",
    ) -> Lot:
        request = requests.ask(models[model], {"x": np.ones((rows, width), np.float32)})
        plan = plans.get((model, rows, width))
        if plan is None:
            plan = plans[model, rows, width] = Plan(models[model], request.form)
        timeouts = [timeouts_us] * len(ids) if isinstance(timeouts_us, int) else timeouts_us
        every = [request] * len(ids)
        lot = requests.lot(models[model], every, ids, timeouts_us=timeouts, arrived=now, attempt=attempt, plan=plan)
        lot.index.update(dict.fromkeys(ids, lot))
        return lot

    return make


@pytest.fixture
def start_talk(requests: Requests) -> Callable[..., Talk]:
    """``start_talk(*models, instances=1, local=True, slots=None, max_compute_s=MAX_COMPUTE_S)``: a conversation with a
    core that has loaded them."""

    def start(*models: Model, **about: Any) -> Talk:
        talk = Talk(requests, **about)
        for model in models:
            talk.load(model)
        return talk

    return start


@pytest.fixture
def talk(start_talk: Callable[..., Talk], double: Model, slow: Model) -> Talk:
    """With one instance and the models ``double`` and ``slow``; a broker has welcomed it, caller a hears it."""
    started = start_talk(double, slow)
    started.join()
    started.expect(b"caller a")
    started.subscribe(b"caller a")
    return started
