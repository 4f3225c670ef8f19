"""Valid messages of every kind, for hypothesis."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from penstock.wire.datatypes import DATATYPES, MAX_ELEMENTS
from penstock.wire.errors import CODES
from penstock.wire.fields import U64_MAX
from penstock.wire.messages import (
    ACTIONS,
    BATCH_REASONS,
    COMPLETE,
    CONTROLS,
    FAILED,
    FROM_CALLER,
    FROM_WORKER,
    INLINE_MAX_BYTES,
    MAX_PRIORITY,
    MAX_TIMEOUT_US,
    MAX_WEIGHT,
    ON_PUBLICATION,
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
from penstock.wire.metrics import FAMILIES, HISTOGRAM, MAX_NUMBER, Exemplar, Sample
from penstock.wire.models import SERVED, STATES, WHOLE, Layout, Load, ModelSpec, ModelState, Route, Tensor, TensorSpec

KINDS: dict[int, type[Message]] = {**FROM_CALLER, **FROM_WORKER, **TO_CALLER, **TO_WORKER, **ON_PUBLICATION}

u64 = st.integers(0, U64_MAX)
u32 = st.integers(0, 1 << 32)
names = st.text(max_size=8)
peers = st.binary(min_size=8, max_size=8)
flags = st.booleans()
datatypes = st.sampled_from(sorted(DATATYPES))
numbers = st.floats(-MAX_NUMBER, MAX_NUMBER)


def few(inner: st.SearchStrategy[Any], least: int = 0) -> st.SearchStrategy[tuple[Any, ...]]:
    return st.lists(inner, min_size=least, max_size=3).map(tuple)


ids = st.lists(u64, min_size=1, max_size=5).map(tuple)
id_ranges = st.lists(u64, max_size=6, unique=True).map(lambda each: tuple(sorted(each[: len(each) // 2 * 2])))
tensors = st.builds(Tensor, names, datatypes, few(st.integers(0, MAX_ELEMENTS)), u64, u64)
dimensions = st.integers(-1, MAX_ELEMENTS)
tensor_specs = few(st.builds(TensorSpec, names, datatypes, few(dimensions)))
row_specs = few(st.builds(TensorSpec, names, datatypes, few(dimensions, 1)), 1)
specs = st.builds(
    ModelSpec, names, names, names, tensor_specs, tensor_specs, st.just(False), st.integers(1, 1 << 32), names
) | st.builds(ModelSpec, names, names, names, row_specs, tensor_specs, st.just(True), st.integers(1, 1 << 32), names)
states = st.builds(ModelState, names, names, st.sampled_from(sorted(STATES - SERVED)), names, st.none() | specs)
models = few(states | st.builds(ModelState, names, names, st.sampled_from(sorted(SERVED)), names, specs))
layouts = st.builds(Layout, few(tensors), few(names))
outcomes = st.builds(Outcome, names, names, few(tensors))
failures = st.builds(Failure, st.sampled_from(sorted(CODES)), names, u32)
sizes = st.sampled_from([0, 1, 7, INLINE_MAX_BYTES, INLINE_MAX_BYTES + 1])
bodies = st.binary(max_size=20)
forms = st.builds(
    Form,
    names,
    names,
    st.integers(0, MAX_PRIORITY),
    names,
    st.integers(1, 1 << 32),
    sizes,
    bodies,
    bodies,
    st.just("") | names,
    st.integers(0, 3),
)


@st.composite
def samples(draw: st.DrawFn) -> Sample:
    name = draw(st.sampled_from(sorted(FAMILIES)))
    about = FAMILIES[name]
    labels = tuple(draw(names) for _ in about.labels)
    if about.kind == HISTOGRAM:
        width = len(about.bounds) + 2
        buckets = draw(st.lists(st.integers(0, width - 2), max_size=3, unique=True))
        exemplars = tuple(Exemplar(bucket, draw(names), draw(numbers), draw(numbers)) for bucket in buckets)
        return Sample(name, labels, tuple(draw(st.lists(numbers, min_size=width, max_size=width))), exemplars)
    return Sample(name, labels, draw(numbers))


def places(count: int) -> st.SearchStrategy[tuple[int, ...]]:
    """Where payloads lie, if they lie in an arena."""
    return st.just(()) | st.lists(u64, min_size=count, max_size=count).map(tuple)


@st.composite
def requests(draw: st.DrawFn) -> Requests:
    numbers, form = draw(ids), draw(forms)
    return Requests(form, numbers, tuple(draw(u64) for _ in numbers), draw(places(len(numbers))))


@st.composite
def tasks(draw: st.DrawFn) -> Tasks:
    numbers, form = draw(ids), draw(forms)
    attempt, timeouts = draw(st.integers(1, 1 << 16)), tuple(draw(u64) for _ in numbers)
    return Tasks(
        form, draw(peers), attempt, draw(st.integers(0, 1 << 62)), numbers, timeouts, draw(places(len(numbers)))
    )


@st.composite
def answers(draw: st.DrawFn) -> Answers:
    numbers = draw(ids)
    status, nbytes = draw(st.integers(COMPLETE, FAILED)), draw(sizes)
    return Answers(status, nbytes, draw(bodies), draw(u64), numbers, draw(places(len(numbers))), draw(u64))


finished = st.builds(Finished, peers, st.integers(1, 1 << 16), u64, ids, u64)
stuck = st.builds(Stuck, peers, st.integers(1, 1 << 16), ids)
freed = few(st.builds(Freed, peers, id_ranges))


@st.composite
def costs(draw: st.DrawFn) -> Cost:
    rows = sorted(draw(st.sets(st.integers(1, 1 << 32), max_size=3)))
    times = tuple(draw(st.integers(1, MAX_TIMEOUT_US)) for _ in rows)
    limits = draw(st.integers(1, 1 << 16)), draw(st.integers(1, 1 << 32)), draw(st.integers(1, MAX_WEIGHT))
    return Cost(draw(names), draw(names), *limits, tuple(rows), times)


labels = few(st.tuples(names, names))
routes = few(st.builds(Route, names, few(names), labels, few(st.tuples(names, st.integers(0, WHOLE)))))
versions = few(st.builds(Version, names, names))
loads = few(st.builds(Load, names, names))
failures = st.builds(Failure, st.sampled_from(sorted(CODES)), names, u32)
refusals = st.builds(Refusal, u64, st.sampled_from(sorted(CODES)), names, u32)
batches = st.builds(Batch, u64, u32, st.sampled_from(sorted(BATCH_REASONS)), u64, u64)
snapshots = st.builds(Snapshot, names, few(samples()))


def payloads(groups: tuple[Any, ...]) -> dict[str, Any]:
    """What a Carrier with these groups has beside them: ``blob``, ``frames`` and ``starts``."""
    blob = b""
    frames: list[bytes] = []
    starts: list[int] = []
    for group in groups:
        size, count = group.nbytes, len(group.ids)
        if group.places:
            starts.append(0)
        elif size <= INLINE_MAX_BYTES:
            starts.append(len(blob))
            blob += bytes(size * count)
        else:
            starts.append(len(frames))
            frames += [bytes(size)] * count
    return {"blob": blob, "frames": frames, "starts": starts}


@st.composite
def carriers(
    draw: st.DrawFn, kind: type[Any], groups: st.SearchStrategy[Any], *others: st.SearchStrategy[Any]
) -> Message:
    drawn = draw(few(groups))
    message: Message = kind(draw(u64), drawn, *(draw(other) for other in others), **payloads(drawn))
    return message


MESSAGES: dict[type[Message], st.SearchStrategy[Message]] = {
    CallerHello: st.builds(CallerHello, u64, names, u32, flags),
    Submit: carriers(Submit, requests(), id_ranges, few(u64)),
    Ask: st.builds(Ask, u64, u64),
    Beat: st.builds(Beat, u64, few(samples()), flags),
    Bye: st.builds(Bye, u64),
    Leaving: st.builds(Leaving, u64),
    WorkerHello: st.builds(
        WorkerHello,
        u64,
        names,
        st.text(min_size=1, max_size=8),
        u32,
        few(names),
        st.integers(1, 1 << 16),
        models,
        routes,
        st.sampled_from(sorted(CONTROLS)),
        loads,
        names,
    ),
    WorkerModels: st.builds(WorkerModels, u64, models, versions, routes, st.integers(1, 1 << 16), u64),
    Order: st.builds(Order, u64, u64, st.sampled_from(sorted(ACTIONS)), names, names),
    Ordered: st.builds(Ordered, u64, u64, st.none() | failures),
    Unload: st.builds(Unload, u64, versions),
    Loads: st.builds(Loads, u64, u64, loads),
    Wake: st.builds(Wake, u64, names, names),
    Attached: st.builds(Attached, u64, peers, u64, flags),
    Done: st.builds(Done, u64, few(finished)),
    Ping: st.builds(Ping, u64),
    Pong: st.builds(Pong, u64),
    Hung: st.builds(Hung, u64, few(stuck), names),
    Costs: st.builds(Costs, u64, few(costs())),
    Welcome: st.builds(Welcome, u64, names, flags, u64),
    HelloWanted: st.builds(HelloWanted, u64),
    Models: st.builds(Models, u64, models, routes, names),
    Workers: st.builds(Workers, u64, few(st.builds(WorkerAddress, peers, names, u64, names))),
    Refusals: st.builds(Refusals, u64, few(refusals)),
    Metrics: st.builds(Metrics, u64, u64, few(snapshots)),
    Expect: st.builds(
        Expect,
        u64,
        few(st.builds(Expected, peers, u64, flags, flags)),
        few(st.builds(Forgotten, peers, u64)),
    ),
    Assign: carriers(Assign, tasks(), freed, freed, st.integers(0, 9), flags),
    Results: carriers(Results, answers(), peers, batches),
}
messages: st.SearchStrategy[Message] = st.one_of(*MESSAGES.values())
