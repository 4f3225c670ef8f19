"""Valid messages and models, of which ``fuzz.py`` makes malformed ones."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import Any, Final

import numpy as np
from onnx import TensorProto, helper, numpy_helper

from bench.fuzztarget import Kinds
from penstock.wire.codec import (
    pack_failure,
    pack_layout,
    pack_outcome,
)
from penstock.wire.messages import (
    COMPLETE,
    EXPLICIT,
    FAILED,
    FROM_CALLER,
    FROM_WORKER,
    INLINE_MAX_BYTES,
    LOAD,
    ON_PUBLICATION,
    PARTIAL,
    TO_CALLER,
    TO_WORKER,
    UNLOAD,
    WATCH,
    Answers,
    Ask,
    Assign,
    Attached,
    Batch,
    Beat,
    Bye,
    CallerHello,
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
    Loads,
    Message,
    Metrics,
    Models,
    Order,
    Ordered,
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
    Unload,
    Version,
    Wake,
    Welcome,
    WorkerAddress,
    WorkerHello,
    WorkerModels,
    Workers,
)
from penstock.wire.metrics import Meters
from penstock.wire.models import LOADING, READY, SERVED, Layout, Load, ModelSpec, ModelState, Route, Tensor, TensorSpec

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

ARENA_BYTES: Final = 1 << 16

LARGE: Final = INLINE_MAX_BYTES + 4

_TENSOR: Final = TensorSpec("x", "FP32", (-1, -1))


def model_state(name: str = "double", version: str = "1", state: str = READY, batch: int = 8) -> ModelState:
    spec = ModelSpec(name, version, "onnx", (_TENSOR,), (TensorSpec("y", "FP32", (-1, -1)),), True, batch, "9f3c")
    return ModelState(name, version, state, "", spec if state in SERVED else None)


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
        width = random.choice((1, 2, 2, 3, 700, LARGE // 4)) if random.random() < 0.3 else 2
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
        random, width = self._random, self._random.choice((1, 2, LARGE // 4))
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
            WorkerHello: lambda: WorkerHello(
                0,
                "w",
                "cpu",
                1,
                ["ipc:///run/w"],
                2,
                self.models(),
                self.routes(),
                random.choice((WATCH, EXPLICIT)),
                self.loads(),
                "/srv/models",
            ),
            WorkerModels: lambda: WorkerModels(EPOCH, self.models(), self.versions(), self.routes(), 2, first),
            Order: lambda: Order(EPOCH, first, random.choice((LOAD, UNLOAD)), "double", random.choice(("", "{}"))),
            Ordered: lambda: Ordered(EPOCH, first, random.choice((None, Failure("unavailable", "it is not", 0)))),
            Unload: lambda: Unload(EPOCH, self.versions()),
            Loads: lambda: Loads(EPOCH, first, self.loads()),
            Wake: lambda: Wake(EPOCH, *random.choice(self.versions())),
            Attached: lambda: Attached(EPOCH, caller, first, True),
            Done: lambda: Done(EPOCH, [Finished(caller, 1, 8, (first, first + 1), 900)]),
            Costs: lambda: Costs(EPOCH, [Cost("double", "1", 1, 8, 1000, (1, 8), (100, 500))]),
            Ping: lambda: Ping(EPOCH),
            Pong: lambda: Pong(EPOCH),
            Hung: lambda: Hung(EPOCH, [Stuck(caller, 1, (first, first + 1))], "a batch does not end"),
            Welcome: lambda: Welcome(EPOCH, "gateway", True, 3),
            HelloWanted: lambda: HelloWanted(EPOCH),
            Models: lambda: Models(EPOCH, self.models(), self.routes(), "/srv/models"),
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

    def routes(self) -> list[Route]:
        routes = [
            Route("double", ("1",)),
            Route("double", ("2", "1"), (("stable", "1"),), (("stable", 90), ("2", 10))),
            Route("other", ("2",)),
            Route("other"),
        ]
        return self._random.sample(routes, self._random.randrange(4))

    def versions(self) -> list[Version]:
        return self._random.sample([Version("double", "1"), Version("other", "2"), Version("gone", "1")], 2)

    def loads(self) -> list[Load]:
        return self._random.sample([Load("double"), Load("other", '{"max_batch_size": 4}')], self._random.randrange(3))


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
