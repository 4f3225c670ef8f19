"""Every message between processes: one class per kind, and nothing else goes over a socket.

On the wire a message is a msgpack array ``[VERSION, TAG, EPOCH, fields...]`` in its first frame; tensors that are too
large to ride inside it follow, a frame each, or lie in their sender's arena. codec.py packs and unpacks, and checks
everything a peer could get wrong. docs/protocol.md says the same for someone who writes a client in another language.

What repeats from request to request (model, tensors, sizes) is a ``Form``, and requests that share one travel as a
group: the form once, then a column each for what differs. Packing, checking and looking up a form's fields then costs
per group, not per request, and a column of integers is checked without a loop (16 requests: 0.7 us each as records,
0.2 in columns).
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from operator import countOf, ge, gt
from typing import Any, ClassVar, Final, NamedTuple, TypeAlias

from penstock.wire.datatypes import DATATYPES, MAX_DIMS, MAX_ELEMENTS
from penstock.wire.errors import CODES, BadMessage
from penstock.wire.fields import (
    U64_MAX,
    Check,
    binary,
    flag,
    integer,
    one_of,
    optional,
    pair,
    record,
    sequence,
    text,
)
from penstock.wire.metrics import Sample, check_samples
from penstock.wire.models import (
    MAX_LABELS,
    MAX_ROUTES,
    MAX_TENSORS,
    SERVED,
    STATES,
    WHOLE,
    Layout,
    Load,
    ModelSpec,
    ModelState,
    Route,
    Tensor,
    TensorSpec,
)

VERSION: Final = 1

PEER_ID_BYTES: Final = 8
MAX_NAME: Final = 256  # characters of a model's, tensor's or process's name
MAX_TENANT: Final = 64
MAX_SEQUENCE: Final = 128  # characters, as in Triton
MAX_SENTENCE: Final = 4096
MAX_ENDPOINT: Final = 256
MAX_REQUESTS: Final = 4096  # in one message
MAX_BODY_BYTES: Final = 256 * 1024  # a form's layout
MAX_KEY_BYTES: Final = 4096
MAX_PEERS: Final = 16_384
MAX_MODELS: Final = 4096
MAX_CONFIG: Final = 64 * 1024  # characters of a model's configuration
MAX_PATH: Final = 4096
MAX_BUILD: Final = 64
MAX_TIMEOUT_US: Final = 24 * 3600 * 1_000_000  # what callers let their users ask for
MAX_RETRY_AFTER_MS: Final = 1 << 32
MAX_PRIORITY: Final = 5  # the least urgent; 1 is the most, and 0 stands for
DEFAULT_PRIORITY: Final = 3
MAX_WEIGHT: Final = 1_000_000  # thousandths
DEFAULT_SEQUENCE_IDLE_US: Final = 1_000_000  # as in Triton
MAX_COST_SIZES: Final = 64  # of batches, in one Cost

# A payload that travels rides in its message's blob when it has at most this many bytes; a larger one is a frame of its
# own, which is cheaper to pass on than to copy.
INLINE_MAX_BYTES: Final = 16 * 1024
# A message's first frame: payloads of as many requests as it may have, and what is said of them.
MAX_HEAD_BYTES: Final = MAX_REQUESTS * INLINE_MAX_BYTES + 32 * 1024 * 1024

# How an answer ends, or does not end, a request.
COMPLETE: Final = 0
PARTIAL: Final = 1  # more will follow
FAILED: Final = 2  # the body is a Failure

# What decides which models of its repository a worker serves: the repository, at all times; orders; or the repository
# as it was when the worker began.
WATCH: Final = "watch"
EXPLICIT: Final = "explicit"
NONE: Final = "none"
CONTROLS: Final = frozenset({WATCH, EXPLICIT, NONE})
# Before the version of a request that names none: the one that its caller took to be current, and checked it against.
# Where that is not served any more, another is as good.
UNNAMED: Final = "~"
LOAD: Final = "load"
UNLOAD: Final = "unload"
ACTIONS: Final = frozenset({LOAD, UNLOAD})

BATCH_REASONS: Final = frozenset({"full", "delay", "idle", "deadline", "shape", "alone"})


Payload: TypeAlias = Any  # bytes or memoryview, what has a length and can be sent; or an arena's Slot


class Form(NamedTuple):
    """All of a request that others may share. ``body`` is a packed Layout, which the broker does not look into."""

    model: str
    version: str  # "" asks for the one that is current; see UNNAMED
    priority: int  # 1, the most urgent, to MAX_PRIORITY; 0 stands for DEFAULT_PRIORITY
    tenant: str
    rows: int
    nbytes: int  # of the payload
    key: bytes  # requests of different keys cannot share a batch
    body: bytes
    sequence: str = ""  # that it is a part of, "": none; the broker's alone
    phase: int = 0  # of that: 1 it begins, 2 it ends, 3 both


class Requests(NamedTuple):
    """Requests of one form on their way to the broker. ``places``: see Carrier."""

    form: Form
    ids: tuple[int, ...]
    timeouts_us: tuple[int, ...]
    places: tuple[int, ...] = ()

    @property
    def nbytes(self) -> int:
        return self.form.nbytes


class Tasks(NamedTuple):
    """Requests of one form and caller, which the broker accepted together, on their way to a worker.

    ``attempt``: from 1; above 1 the worker that had the requests before is gone. ``waited_us``: since the broker
    accepted them. ``timeouts_us``: what is left of each one's time. ``places``: see Carrier; in the caller's arena.
    """

    form: Form
    caller: bytes
    attempt: int
    waited_us: int
    ids: tuple[int, ...]
    timeouts_us: tuple[int, ...]
    places: tuple[int, ...] = ()

    @property
    def nbytes(self) -> int:
        return self.form.nbytes


class Answers(NamedTuple):
    """Answers of one shape. ``body`` is a packed Outcome, or a packed Failure where ``status`` is FAILED.

    ``queue_us``: from their acceptance by the broker to the start of their batch; ``held_us``: of that, before the
    broker gave them to this worker. ``places``: see Carrier; in the worker's arena.
    """

    status: int
    nbytes: int  # of each payload
    body: bytes
    queue_us: int
    ids: tuple[int, ...]
    places: tuple[int, ...] = ()
    held_us: int = 0


class Outcome(NamedTuple):
    """What answers of the same shape share."""

    model: str
    version: str
    tensors: tuple[Tensor, ...]


class Failure(NamedTuple):
    code: str
    message: str
    retry_after_ms: int


class Batch(NamedTuple):
    """What an answer's batch was: for people who want to know why a request took as long as it did."""

    serial: int
    rows: int
    reason: str
    compute_us: int  # from its start to its end
    model_us: int  # of that, in the model itself


class Refusal(NamedTuple):
    id: int
    code: str
    message: str
    retry_after_ms: int


class Finished(NamedTuple):
    """Requests of one caller that a worker has finished. ``nbytes``: what it keeps of each until it is acknowledged.
    ``compute_us``: their rows' share of the time that their batch took, all of theirs together; 0 if they did not
    run."""

    caller: bytes
    attempt: int
    nbytes: int
    ids: tuple[int, ...]
    compute_us: int = 0


class Stuck(NamedTuple):
    """Requests of one caller in a batch that does not end."""

    caller: bytes
    attempt: int
    ids: tuple[int, ...]


class Freed(NamedTuple):
    """Requests of one caller that a worker may forget. ``ranges``: first id, last id, first id, last id, ..., both
    included, ascending and apart."""

    caller: bytes
    ranges: tuple[int, ...]


class Cost(NamedTuple):
    """What a model takes on one worker, as far as it has been measured.

    ``instances``: how many of its batches run at once. ``batch_rows``: how many rows its batches have at most, which
    may be fewer than the model's own limit. ``weight``: its share of the worker beside other models, in thousandths.
    ``rows`` ascends; a batch of so many takes ``times_us``. ``sequence_idle_us``: of its sequences nothing is kept when
    nothing has come for so long.
    """

    model: str
    version: str
    instances: int
    batch_rows: int
    weight: int
    rows: tuple[int, ...]
    times_us: tuple[int, ...]
    sequence_idle_us: int = DEFAULT_SEQUENCE_IDLE_US


class WorkerAddress(NamedTuple):
    """``name``: what the worker is called in metrics. ``arena``: the number with which the descriptor of its arena has
    been put into the caller's control connection; 0 when the caller is not given it."""

    worker: bytes
    endpoint: str
    arena: int = 0
    name: str = ""


class Expected(NamedTuple):
    """A caller whose subscription a worker should accept. ``serial`` numbers this introduction. ``shares``: under that
    number, the descriptor of its arena has been put into the worker's control connection. ``reads``: it is given the
    worker's arena, and maps it before it subscribes."""

    caller: bytes
    serial: int
    shares: bool = False
    reads: bool = False


class Forgotten(NamedTuple):
    """A caller that has gone, and all that was introduced of it up to this number."""

    caller: bytes
    serial: int


class Version(NamedTuple):
    """Which model, and which of its versions."""

    name: str
    version: str


class Snapshot(NamedTuple):
    """The series of one process, under the name that the broker gave it."""

    name: str
    samples: tuple[Sample, ...]


_u64: Final = integer(0, U64_MAX)
_peer: Final = binary(PEER_ID_BYTES, PEER_ID_BYTES)
_name: Final = text(MAX_NAME)
_sentence: Final = text(MAX_SENTENCE)
_shape: Final = sequence(integer(0, MAX_ELEMENTS), MAX_DIMS)
_datatype: Final = one_of(DATATYPES)
_tensor_spec: Final = record(TensorSpec, _name, _datatype, sequence(integer(-1, MAX_ELEMENTS), MAX_DIMS))
_tensor_specs: Final = sequence(_tensor_spec, MAX_TENSORS)
_labels: Final = sequence(pair(_name, text(MAX_LABELS)), MAX_TENSORS)
_spec_fields: Final = record(
    ModelSpec,
    *(_name, _name, _name, _tensor_specs, _tensor_specs, flag, integer(1, 1 << 32), text(MAX_BUILD), _labels),
)


def _model_spec(value: Any) -> ModelSpec:
    spec: ModelSpec = _spec_fields(value)
    if spec.batchable and not (spec.inputs and all(each.shape for each in spec.inputs)):
        raise BadMessage("a model that is batchable has inputs, and each of them has a first dimension")
    if sum([len(lines) for _, lines in spec.labels]) > MAX_LABELS:
        raise BadMessage(f"a model has labels of at most {MAX_LABELS} characters")
    return spec


_state_fields: Final = record(ModelState, _name, _name, one_of(STATES), _sentence, optional(_model_spec))


def _model_state(value: Any) -> ModelState:
    state: ModelState = _state_fields(value)
    if state.state in SERVED and state.spec is None:
        raise BadMessage(f"a model that is {state.state} has a spec")
    return state


_models: Final = sequence(_model_state, MAX_MODELS)
_version: Final = record(Version, _name, _name)
_versions: Final = sequence(_version, MAX_MODELS)
_route: Final = record(
    Route,
    _name,
    sequence(_name, MAX_MODELS),
    sequence(pair(_name, _name), MAX_ROUTES),
    sequence(pair(_name, integer(0, WHOLE)), MAX_ROUTES),
)
_routes: Final = sequence(_route, MAX_MODELS)
_load: Final = record(Load, _name, text(MAX_CONFIG))
_loads: Final = sequence(_load, MAX_MODELS)
_tensor: Final = record(Tensor, _name, _datatype, _shape, _u64, _u64)
_tensors: Final = sequence(_tensor, MAX_TENSORS)
check_layout: Final = record(Layout, _tensors, sequence(_name, MAX_TENSORS))
check_outcome: Final = record(Outcome, _name, _name, _tensors)
check_failure: Final = record(Failure, one_of(CODES), _sentence, integer(0, MAX_RETRY_AFTER_MS))
_form_fields: Final = record(
    Form,
    _name,
    _name,
    integer(0, MAX_PRIORITY),
    text(MAX_TENANT),
    integer(1, 1 << 32),
    _u64,
    binary(MAX_KEY_BYTES),
    binary(MAX_BODY_BYTES),
    text(MAX_SEQUENCE),
    integer(0, 3),
)
_blob: Final = binary(1 << 31)

# Forms that have been checked before: a look-up instead of eight checks. Bounded in number and in size.
_known_forms: Final[dict[Any, Form]] = {}
_KNOWN_FORMS_MAX: Final = 4096
_KNOWN_BODY_MAX_BYTES: Final = 1024


def _form(value: Any) -> Form:
    try:
        known = _known_forms.get(value)
    except TypeError:  # it holds something that has no hash, so it cannot be a form
        known = None
    # Equal is not the same: 1 == 1.0 == True, so a form whose numbers are not int must not pass for one that is known.
    if known is not None and type(value[2]) is type(value[4]) is type(value[5]) is type(value[9]) is int:
        return known
    form: Form = _form_fields(value)
    if len(form.body) <= _KNOWN_BODY_MAX_BYTES and not form.sequence:
        if len(_known_forms) >= _KNOWN_FORMS_MAX:
            _known_forms.clear()
        _known_forms[form] = form
    return form


def _column(value: Any, length: int) -> tuple[int, ...]:
    """Whole numbers of at most 64 bits."""
    try:
        if type(value) is tuple and len(value) == length and countOf(map(type, value), int) == length:
            array("Q", value)  # checks how large they are, at a third of what a loop costs
            return value
    except (TypeError, OverflowError):
        pass
    raise BadMessage(f"a column is {length} whole numbers from 0 to {U64_MAX}")


def _ranges(value: Any) -> tuple[int, ...]:
    if type(value) is not tuple or len(value) > 2 * MAX_REQUESTS or len(value) % 2:
        raise BadMessage(f"ranges are at most {MAX_REQUESTS} pairs of a first and a last id, in one sequence")
    if not value:
        return value
    firsts, lasts = _column(value, len(value))[::2], value[1::2]
    if any(map(gt, firsts, lasts)) or any(map(ge, lasts, firsts[1:])):
        raise BadMessage("ranges ascend, and no two of them meet")
    return value


def _cancels(value: Any) -> tuple[int, ...]:
    if type(value) is not tuple or len(value) > MAX_REQUESTS:
        raise BadMessage(f"at most {MAX_REQUESTS} ids can be cancelled at once")
    return _column(value, len(value)) if value else value


def _split(value: Any, count: int, what: str) -> tuple[Any, ...]:
    if type(value) is not tuple or len(value) != count:
        raise BadMessage(f"{what} have {count} fields")
    return value


def _ids(value: Any) -> tuple[int, ...]:
    if type(value) is not tuple or not 1 <= len(value) <= MAX_REQUESTS:
        raise BadMessage(f"a group has from 1 to {MAX_REQUESTS} ids")
    return _column(value, len(value))


def _places(value: Any, count: int) -> tuple[int, ...]:
    return () if value == () else _column(value, count)


def _requests(value: Any) -> Requests:
    form, ids, timeouts, places = _split(value, 4, "requests")
    form, ids = _form(form), _ids(ids)
    return Requests(form, ids, _column(timeouts, len(ids)), _places(places, len(ids)))


def _tasks(value: Any) -> Tasks:
    form, caller, attempt, waited, ids, timeouts, places = _split(value, 7, "tasks")
    form, ids = _form(form), _ids(ids)
    return Tasks(
        form,
        _peer(caller),
        _attempt(attempt),
        _waited(waited),
        ids,
        _column(timeouts, len(ids)),
        _places(places, len(ids)),
    )


def _answers(value: Any) -> Answers:
    status, nbytes, body, queue, ids, places, held = _split(value, 7, "answers")
    ids = _ids(ids)
    places = _places(places, len(ids))
    return Answers(_status(status), _u64(nbytes), _body(body), _u64(queue), ids, places, _u64(held))


def _groups(check: Check) -> Check:
    """Of requests, not more in all than may be in a message."""

    def check_groups(value: Any) -> tuple[Any, ...]:
        if type(value) is not tuple or len(value) > MAX_REQUESTS:
            raise BadMessage(f"a message has at most {MAX_REQUESTS} groups, in one sequence")
        if len(value) <= 1:
            return (check(value[0]),) if value else value
        found, left = [], MAX_REQUESTS
        for each in value:
            group = check(each)
            left -= len(group.ids)
            if left < 0:
                raise BadMessage(f"a message has at most {MAX_REQUESTS} requests")
            found.append(group)
        return tuple(found)

    return check_groups


def _finished(value: Any) -> Finished:
    caller, attempt, nbytes, ids, compute = _split(value, 5, "finished requests")
    return Finished(_peer(caller), _attempt(attempt), _u64(nbytes), _ids(ids), _u64(compute))


def _stuck(value: Any) -> Stuck:
    caller, attempt, ids = _split(value, 3, "stuck requests")
    return Stuck(_peer(caller), _attempt(attempt), _ids(ids))


def _cost(value: Any) -> Cost:
    cost: Cost = _cost_fields(value)
    if len(cost.rows) != len(cost.times_us) or any(map(ge, cost.rows, cost.rows[1:])):
        raise BadMessage("the rows of a cost ascend, and each has its time")
    return cost


def _freed(value: Any) -> Freed:
    caller, ranges = _split(value, 2, "freed requests")
    return Freed(_peer(caller), _ranges(ranges))


_attempt: Final = integer(1, 1 << 16)
_instances: Final = integer(1, 1 << 16)
_waited: Final = integer(0, 1 << 62)  # a worker says it with its own time added
_status: Final = integer(COMPLETE, FAILED)
_body: Final = binary(MAX_BODY_BYTES)
_all_freed: Final = sequence(_freed, MAX_PEERS)
_cost_fields: Final = record(
    Cost,
    _name,
    _name,
    integer(1, 1 << 16),
    integer(1, 1 << 32),
    integer(1, MAX_WEIGHT),
    sequence(integer(1, 1 << 32), MAX_COST_SIZES),
    sequence(integer(1, MAX_TIMEOUT_US), MAX_COST_SIZES),
    integer(1, MAX_TIMEOUT_US),
)


@dataclass(slots=True)
class Message:
    """The base of all. ``CHECKS`` has one check for each field behind ``epoch`` that is packed."""

    TAG: ClassVar[int]
    CHECKS: ClassVar[tuple[Check, ...]] = ()

    epoch: int  # which life of the broker the sender knows; 0: none yet


@dataclass(slots=True)
class Carrier(Message):
    """A message with groups of items that have payloads.

    Those of at most INLINE_MAX_BYTES lie in ``blob``, one behind the other, the others in ``frames``, in the order of
    the groups and their ids. A group may have ``places`` instead: the byte of its writer's arena (of whoever asked, or
    of the worker that answers) where each of its payloads begins. ``starts``, which unpacking fills in, has for each
    other group the byte or the frame where it begins.
    """

    groups: Sequence[Requests] | Sequence[Tasks] | Sequence[Answers]
    blob: bytes = field(default=b"", kw_only=True)
    frames: Sequence[Payload] = field(default=(), kw_only=True)
    starts: Sequence[int] = field(default=(), kw_only=True)


# --- from callers and workers to the broker ---


@dataclass(slots=True)
class CallerHello(Message):
    """A caller's first words to an epoch. ``name``: what it would like to be called in metrics ("": no metrics).
    ``local``: it can reach Unix sockets on the broker's host. ``sent``: the largest id that it has sent to any broker:
    a request up to it may have been on a worker before."""

    TAG = 1
    CHECKS = (_name, integer(0, 1 << 32), flag, _u64)

    name: str
    pid: int
    local: bool
    sent: int = 0


@dataclass(slots=True)
class Submit(Carrier):
    """All that a caller has to say at one turn of its loop: ids whose result it has, ids that it no longer wants, and
    new requests."""

    TAG = 2
    CHECKS = (_groups(_requests), _ranges, _cancels, _blob)

    groups: Sequence[Requests]
    acks: Sequence[int] = ()  # ranges, as in Freed
    cancels: Sequence[int] = ()


@dataclass(slots=True)
class Ask(Message):
    """A caller wants the whole server's metrics; they come as Metrics with the same serial."""

    TAG = 3
    CHECKS = (_u64,)

    serial: int


@dataclass(slots=True)
class Beat(Message):
    """Said at least every two seconds, so that silence means death. Peers add their metrics, all of them or what has
    changed since the last; the broker answers with one."""

    TAG = 4
    CHECKS = (check_samples, flag)

    samples: Sequence[Sample] = ()
    whole: bool = True


@dataclass(slots=True)
class Bye(Message):
    """The sender is about to end and holds nothing any more."""

    TAG = 5


@dataclass(slots=True)
class Leaving(Message):
    """A worker takes nothing new, and ends when what it holds has been acknowledged."""

    TAG = 6


@dataclass(slots=True)
class Order(Message):
    """A caller wants the server to load a model, or to serve it no more; the answer is Ordered with the same serial.
    ``config``: as in Load."""

    TAG = 14
    CHECKS = (_u64, one_of(ACTIONS), _name, text(MAX_CONFIG))

    serial: int
    action: str
    model: str
    config: str = ""


@dataclass(slots=True)
class WorkerHello(Message):
    """A worker's first words to an epoch. ``device``: by which it goes where it wishes for no ``name``.
    ``endpoints``: where it publishes results. ``instances``: how many batches it runs at once. ``control``: one of
    CONTROLS, what decides which models it serves; ``loads``: those that it has been told to, where that does.
    ``repository``: where its models lie, on its host."""

    TAG = 7
    CHECKS = (
        _name,
        text(MAX_NAME, 1),
        integer(0, 1 << 32),
        sequence(text(MAX_ENDPOINT), 8),
        _instances,
        _models,
        _routes,
        one_of(CONTROLS),
        _loads,
        text(MAX_PATH),
    )

    name: str
    device: str
    pid: int
    endpoints: Sequence[str]
    instances: int
    models: Sequence[ModelState]
    routes: Sequence[Route] = ()
    control: str = WATCH
    loads: Sequence[Load] = ()
    repository: str = ""


@dataclass(slots=True)
class WorkerModels(Message):
    """What has changed of a worker's models since it last told. ``gone``: versions that it declares no more;
    ``routes``: of models that have others now, one of no versions where it serves the model no more. ``instances``: as
    in WorkerHello. ``heard``: the serial of the last Loads that it has followed, so that all of these is told."""

    TAG = 8
    CHECKS = (_models, _versions, _routes, _instances, _u64)

    models: Sequence[ModelState]
    gone: Sequence[Version] = ()
    routes: Sequence[Route] = ()
    instances: int = 1
    heard: int = 0


@dataclass(slots=True)
class Attached(Message):
    """A caller hears this worker's results from now on, or no longer does. ``serial``: of the caller's introduction."""

    TAG = 9
    CHECKS = (_peer, _u64, flag)

    caller: bytes
    serial: int
    attached: bool


@dataclass(slots=True)
class Done(Message):
    """Requests that this worker has finished: their results are published, or they were cancelled before."""

    TAG = 10
    CHECKS = (sequence(_finished, MAX_PEERS),)

    done: Sequence[Finished]


@dataclass(slots=True)
class Costs(Message):
    """What this worker's models take: said of those of which it has changed."""

    TAG = 11
    CHECKS = (sequence(_cost, MAX_MODELS),)

    costs: Sequence[Cost]


@dataclass(slots=True)
class Pong(Message):
    """A worker's answer to Ping."""

    TAG = 12


@dataclass(slots=True)
class Hung(Message):
    """A batch of these requests does not end, as ``reason`` says, so this worker does. The others that it has were not
    in it."""

    TAG = 13
    CHECKS = (sequence(_stuck, MAX_REQUESTS), _sentence)

    stuck: Sequence[Stuck]
    reason: str


# --- from the broker ---


@dataclass(slots=True)
class Welcome(Message):
    """The broker knows the peer now, by this name. ``shares``: it has the descriptor of the peer's arena, and passes it
    on. ``serial``: the last introduction before; who is there is introduced anew."""

    TAG = 16
    CHECKS = (_name, flag, _u64)

    name: str
    shares: bool = False
    serial: int = 0


@dataclass(slots=True)
class HelloWanted(Message):
    """The broker does not know the sender, or was spoken to with another epoch than this one: say hello."""

    TAG = 17


@dataclass(slots=True)
class Models(Message):
    """Every model of the server; said again when any of them changes. ``routes``: of each, which versions requests
    mean. ``repository``: where models lie on the broker's host, "" when that is not known."""

    TAG = 18
    CHECKS = (_models, _routes, text(MAX_PATH))

    models: Sequence[ModelState]
    routes: Sequence[Route] = ()
    repository: str = ""


@dataclass(slots=True)
class Workers(Message):
    """Every worker that a caller should subscribe to, once it has mapped the worker's arena if that is shared; said
    again when they change."""

    TAG = 19
    CHECKS = (sequence(record(WorkerAddress, _peer, text(MAX_ENDPOINT), _u64, _name), MAX_PEERS),)

    workers: Sequence[WorkerAddress]


@dataclass(slots=True)
class Refusals(Message):
    """Requests that end without having run."""

    TAG = 20
    CHECKS = (sequence(record(Refusal, _u64, one_of(CODES), _sentence, integer(0, MAX_RETRY_AFTER_MS)), MAX_REQUESTS),)

    refusals: Sequence[Refusal]


@dataclass(slots=True)
class Metrics(Message):
    TAG = 21
    CHECKS = (_u64, sequence(record(Snapshot, _name, check_samples), MAX_PEERS))

    serial: int
    snapshots: Sequence[Snapshot]


@dataclass(slots=True)
class Expect(Message):
    """Callers whose subscription a worker should accept, and callers that have gone."""

    TAG = 22
    CHECKS = (
        sequence(record(Expected, _peer, _u64, flag, flag), MAX_PEERS),
        sequence(record(Forgotten, _peer, _u64), MAX_PEERS),
    )

    callers: Sequence[Expected] = ()
    gone: Sequence[Forgotten] = ()


@dataclass(slots=True)
class Assign(Carrier):
    """Work for a worker; also what it need not keep or do any more. ``overtaking``: so many of the groups, the first
    ones, go before what the worker was given earlier and has not begun. ``alone``: each of these requests is a batch by
    itself, because a worker that had it has died."""

    TAG = 23
    CHECKS = (_groups(_tasks), _all_freed, _all_freed, integer(0, MAX_REQUESTS), flag, _blob)

    groups: Sequence[Tasks]
    freed: Sequence[Freed] = ()
    cancelled: Sequence[Freed] = ()
    overtaking: int = 0
    alone: bool = False


@dataclass(slots=True)
class Ping(Message):
    """The broker has not heard this worker for a while, though it has work: say Pong."""

    TAG = 24


@dataclass(slots=True)
class Ordered(Message):
    """What has become of an Order: nothing to say of it, or why it was not done."""

    TAG = 25
    CHECKS = (_u64, optional(check_failure))

    serial: int
    failure: Failure | None = None


@dataclass(slots=True)
class Unload(Message):
    """Versions that this worker's repository does not ask for, and that nobody will ask it for any more; or such as it
    has told IDLE: it is asked for them no more until it has told them READY."""

    TAG = 26
    CHECKS = (_versions,)

    versions: Sequence[Version]


@dataclass(slots=True)
class Loads(Message):
    """All the models that are to be served where that is said by order; where the repository says it, look at it
    again."""

    TAG = 27
    CHECKS = (_u64, _loads)

    serial: int
    loads: Sequence[Load]


@dataclass(slots=True)
class Wake(Message):
    """Load a version that is IDLE: requests wait for it."""

    TAG = 28
    CHECKS = (_name, _name)

    model: str
    version: str


# --- from workers to callers ---


@dataclass(slots=True)
class Results(Carrier):
    """Answers of one batch for one caller. On the socket a frame with the caller's id stands before it."""

    TAG = 32
    CHECKS = (
        _groups(_answers),
        _peer,
        record(Batch, _u64, integer(0, 1 << 32), one_of(BATCH_REASONS), _u64, _u64),
        _blob,
    )

    groups: Sequence[Answers]
    worker: bytes
    batch: Batch


FROM_CALLER: Final = {m.TAG: m for m in (CallerHello, Submit, Ask, Order, Beat, Bye)}
FROM_WORKER: Final = {
    m.TAG: m for m in (WorkerHello, WorkerModels, Attached, Done, Costs, Pong, Hung, Beat, Leaving, Bye)
}
TO_CALLER: Final = {m.TAG: m for m in (Welcome, HelloWanted, Models, Workers, Refusals, Metrics, Ordered, Beat, Bye)}
TO_WORKER: Final = {m.TAG: m for m in (Welcome, HelloWanted, Expect, Assign, Unload, Loads, Wake, Ping, Beat, Bye)}
ON_PUBLICATION: Final = {m.TAG: m for m in (Results,)}
