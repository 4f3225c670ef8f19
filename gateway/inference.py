"""An inference request of the v2 protocol: from its body to a form and a payload, and from an answer to a response.

The JSON part of a binary request is the same for every request of a client that does not send ids, and so is the head
of its response: both are looked up by their bytes, and parsed or built only the first time.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final, NamedTuple, TypeAlias

import orjson

from penstock.client.arrays import Forms, in_sequence
from penstock.client.terms import check_sequence
from penstock.gateway.changes import Changes, Style
from penstock.gateway.classification import read_classes
from penstock.gateway.jsondata import BINARY_ONLY, NUMBERS, dump_data, loads, pack_data
from penstock.gateway.regions import NOT_ALLOWED, Place, Regions, Unread
from penstock.wire.codec import unpack_layout, unpack_outcome
from penstock.wire.datatypes import ITEM_SIZES, element_count
from penstock.wire.errors import BAD_INPUT, BadMessage, PenstockError
from penstock.wire.messages import MAX_PRIORITY, MAX_TIMEOUT_US, Form, Outcome, Payload
from penstock.wire.models import MAX_TENSORS, Layout, ModelSpec, Tensor, check_declaration
from penstock.wire.tensors import Buffer

_KNOWN_MAX: Final = 1024
KNOWN_BYTES_MAX: Final = 4096  # of a JSON part that is remembered
_FRAME_BYTES_MAX: Final = 256 * 1024  # of a JSON request whose parts are looked up
_DATA: Final = b'"data":'
_DECODER: Final = json.JSONDecoder()
_NOTHING: Final = memoryview(b"")
_ID_MAX: Final = 1024  # characters
_NAME_MAX: Final = 256  # characters
_TOO_MUCH: Final = (
    "a request that names shared memory has at most some hundred KB of JSON; put its other tensors there as well, or "
    "send them as binary"
)
ONLY_JOBS_CALL: Final = "a callback_url is for requests with the header 'Prefer: respond-async', which become jobs"


# From an answer, packed, and its payload to the JSON that is sent. Raises BadMessage or PenstockError.
Write: TypeAlias = Callable[[bytes, Payload], bytes]


@dataclass(slots=True)  # whose attributes are read in a third of the time that a NamedTuple's take
class Query:
    """What a request's JSON says: everything but its tensors. ``timeout_s``: 0 where it names none. ``explain``: the
    answer is to say where its time went.

    ``reusable``: another request with the same JSON and other binary tensors means the same, as long as the model
    stays. ``write``: how another protocol than this one says the answer. ``change``: what is to become of the answer
    before it is said. ``fleeting``: tensors lie in the client's memory, so that the same bytes may mean something else.
    """

    spec: ModelSpec
    form: Form
    style: Style
    id: str
    timeout_s: float
    explain: bool
    reusable: bool
    write: Write | None = None
    change: Changes | None = None
    fleeting: bool = False


class Reading(NamedTuple):
    """What a body says beside its tensors' bytes, before it is held against the model; all as in Query. ``priority``: 0
    where it says none. ``sequence``: its id, and whether the request starts and ends it. ``callback_url``: what it
    gives for it, None where it gives nothing. A reading can be made in another process, unless it is fleeting."""

    layout: Layout
    style: Style
    id: str = ""
    priority: int = 0
    timeout_s: float = 0.0
    explain: bool = False
    reusable: bool = False
    write: Write | None = None
    change: Changes | None = None
    sequence: tuple[Any, Any, Any] | None = None
    callback_url: Any = None
    fleeting: bool = False


class _Frame(NamedTuple):
    """A request in JSON that comes again with other numbers: it is found by what is before the data of its one input.
    ``end``: what is behind them. Any JSON value in their place makes the same request with other data."""

    end: bytes
    query: Query
    name: str
    datatype: str
    shape: tuple[int, ...]


class CallbackAsked(PenstockError):
    """A request that is a good one, but asks to have its answer sent somewhere, for which it has to be a job."""

    def __init__(self, url: str) -> None:
        super().__init__(BAD_INPUT, ONLY_JOBS_CALL)
        self.url = url


class Parser:
    """Parses bodies for models, and remembers the JSON parts that come again and again."""

    def __init__(self, callbacks: bool = False) -> None:
        """``callbacks``: requests may ask for one, and others see to it."""
        self._callbacks = callbacks
        self._known: dict[tuple[str, str, bytes, int, str], Query] = {}
        self._frames: dict[tuple[str, str, bytes, int, str], _Frame] = {}
        self._forms = Forms()
        self.regions: Regions | None = None  # shared memory of clients, where there is any

    def parse(
        self, spec: ModelSpec, body: Buffer, header_length: int | None, priority: int = 0, tenant: str = ""
    ) -> tuple[Query, Payload]:
        """``header_length``: bytes of JSON before the binary tensors, None when all is JSON, 0 when there is none and
        the body is the only input. ``priority``: what holds whatever the JSON says, unless it is 0. Raises
        PenstockError."""
        if header_length is None:
            return self._parse_json(spec, body, priority, tenant)
        if not header_length:
            return self._parse_raw(spec, body, priority, tenant)
        if header_length > len(body):
            raise PenstockError(
                BAD_INPUT, f"Inference-Header-Content-Length is {header_length}, and the body has {len(body)} bytes"
            )
        if header_length > KNOWN_BYTES_MAX:
            return self._parse(spec, body[:header_length], memoryview(body)[header_length:], priority, tenant)
        key = (spec.name, spec.version, bytes(body[:header_length]), priority, tenant)
        query = self._known.get(key)
        if query is not None and query.spec is spec and query.form.nbytes == len(body) - header_length:
            return query, body[header_length:]
        query, payload = self._parse(spec, key[2], memoryview(body)[header_length:], priority, tenant)
        if query.reusable:
            if len(self._known) >= _KNOWN_MAX:
                self._known.clear()
            self._known[key] = query
        return query, payload

    def _parse_json(self, spec: ModelSpec, body: Buffer, priority: int, tenant: str) -> tuple[Query, Payload]:
        if isinstance(body, memoryview) or len(body) > _FRAME_BYTES_MAX:
            return self._parse(spec, body, _NOTHING, priority, tenant)
        at = body.find(_DATA, 0, KNOWN_BYTES_MAX) + len(_DATA)
        if at < len(_DATA):
            return self._parse(spec, body, _NOTHING, priority, tenant)
        key = (spec.name, spec.version, bytes(body[:at]), priority, tenant)
        frame = self._frames.get(key)
        if frame is not None and frame.query.spec is spec and body.endswith(frame.end):
            end, query, name, datatype, shape = frame
            text = body[at : len(body) - len(end)]
            try:
                data = orjson.loads(text)
            except orjson.JSONDecodeError:
                pass  # or it holds a NaN: the whole says what there is to say
            else:
                plain = b"r" not in text and b"l" not in text  # of true and false; a letter alone is found much faster
                return query, pack_data(name, datatype, shape, data, plain)
        query, payload = self._parse(spec, body, _NOTHING, priority, tenant)
        known = frame is not None and frame.query.spec is spec
        if not known and (frame := _frame(body, at, query)) is not None:
            if len(self._frames) >= _KNOWN_MAX:
                self._frames.clear()
            self._frames[key] = frame
        return query, payload

    def _parse_raw(self, spec: ModelSpec, body: Buffer, priority: int, tenant: str) -> tuple[Query, Payload]:
        """Triton's raw binary request: one row, to be answered with binary tensors."""
        if len(spec.inputs) != 1:
            raise PenstockError(
                BAD_INPUT,
                f"a body without JSON (Inference-Header-Content-Length: 0) is for models with one input; "
                f"'{spec.name}' has {[each.name for each in spec.inputs]}",
            )
        [(name, datatype, _)] = spec.inputs
        payload = len(body).to_bytes(4, "little") + bytes(body) if datatype == "BYTES" else body
        tensor = Tensor(name, datatype, _raw_shape(spec, len(body)), 0, len(payload))
        form = self._forms.find(spec, Layout((tensor,)), len(payload), priority, tenant)
        return Query(spec, form, Style(True), "", 0.0, False, False), payload

    def _parse(
        self, spec: ModelSpec, text: Buffer, binary: memoryview, priority: int, tenant: str
    ) -> tuple[Query, Payload]:
        reading, payload = read_request(spec, text, binary, self.regions)
        return self.query(spec, reading, len(payload), priority, tenant), payload

    def query(self, spec: ModelSpec, reading: Reading, nbytes: int, priority: int = 0, tenant: str = "") -> Query:
        """What a request asks whose tensors take ``nbytes``. Raises PenstockError when it does not fit the model."""
        try:
            return self._query(spec, reading, nbytes, priority, tenant)
        except CallbackAsked:
            raise
        except PenstockError as error:
            raise _named(error, reading.id) from None

    def _query(self, spec: ModelSpec, reading: Reading, nbytes: int, priority: int, tenant: str) -> Query:
        form = self._forms.find(spec, reading.layout, nbytes, priority or reading.priority, tenant)
        if reading.sequence is not None:
            form = in_sequence(form, *check_sequence(*reading.sequence))
        callback_url = reading.callback_url
        if callback_url is not None and not self._callbacks:
            if type(callback_url) is not str:
                raise PenstockError(BAD_INPUT, "parameter 'callback_url' is a URL")
            raise CallbackAsked(callback_url)
        return Query(
            spec,
            form,
            reading.style,
            reading.id,
            reading.timeout_s,
            reading.explain,
            reading.reusable,
            reading.write,
            reading.change,
            reading.fleeting,
        )


def read_request(
    spec: ModelSpec, text: Buffer, binary: memoryview, regions: Regions | None = None
) -> tuple[Reading, Payload]:
    """A request's JSON, and the tensors that came behind it. Raises PenstockError."""
    request = _object(loads(text), "the request")
    identifier = request.get("id", "")
    if type(identifier) is not str or len(identifier) > _ID_MAX:
        raise PenstockError(BAD_INPUT, f"'id' is a string of at most {_ID_MAX} characters")
    try:
        return _read_request(spec, request, identifier, binary, regions)
    except PenstockError as error:
        raise _named(error, identifier) from None


def _named(error: PenstockError, identifier: str) -> PenstockError:
    """As Triton says it, of a request that has an id."""
    if identifier:
        return PenstockError(error.code, f"[request id: {identifier}] {error.message}", error.retry_after_s)
    return error


def _read_request(
    spec: ModelSpec, request: dict[str, Any], identifier: str, binary: memoryview, regions: Regions | None
) -> tuple[Reading, Payload]:
    parameters = _object(request.get("parameters", {}), "'parameters'")
    outputs, style, change = _read_outputs(spec, request.get("outputs", []), parameters, regions)
    _check_style(spec, outputs, style, change)
    tensors, payload, all_binary = _read_inputs(request.get("inputs"), binary, regions)
    priority, timeout_us, explain, callback_url, sequence = 0, 0, False, None, None
    if parameters:
        priority = _integer(parameters, "priority", MAX_PRIORITY)
        timeout_us = _integer(parameters, "timeout", MAX_TIMEOUT_US)
        explain = _flag(parameters, "explain", False)
        callback_url = _given(parameters["callback_url"]) if "callback_url" in parameters else None
        if "sequence_id" in parameters:
            start, end = parameters.get("sequence_start", False), parameters.get("sequence_end", False)
            sequence = parameters["sequence_id"], start, end
    fleeting = regions is not None and _is_shared(request["inputs"], change)
    reading = Reading(
        Layout(tuple(tensors), tuple(outputs)),
        style,
        identifier,
        priority,
        timeout_us / 1e6,
        explain,
        all_binary and not (identifier or fleeting or sequence is not None),
        None,
        change,
        sequence,
        callback_url,
        fleeting,
    )
    return reading, payload


def _given(value: Any) -> Any:
    """None is nothing that was given."""
    return False if value is None else value


def read_body(
    header_length: int | None, spec: ModelSpec, body: Buffer, shared: bool = False
) -> tuple[Reading, Payload]:
    """A whole body. ``header_length``: as for ``Parser.parse``, but not 0. ``shared``: clients may have shared memory,
    but not with this one. Raises PenstockError."""
    end = len(body) if header_length is None else header_length
    view = memoryview(body)
    try:
        return read_request(spec, view[:end], view[end:])
    except PenstockError as error:
        if shared and error.message.endswith(NOT_ALLOWED):
            raise PenstockError(error.code, error.message.removesuffix(NOT_ALLOWED) + _TOO_MUCH) from None
        raise


def _frame(body: bytes | bytearray, at: int, query: Query) -> _Frame | None:
    """Of a request with an input whose data begin at ``at``; None where another of its bytes could mean something
    else."""
    tensors = unpack_layout(query.form.body).tensors
    if (
        query.id
        or query.form.sequence
        or query.fleeting
        or len(tensors) != 1
        or tensors[0].datatype not in NUMBERS
        or body.count(_DATA) != 1
    ):
        return None
    text = body[at:].decode("latin-1")  # a character for each byte
    start = len(text) - len(text.lstrip(" \t\r\n"))
    try:
        _, length = _DECODER.raw_decode(text, start)
    except ValueError:
        return None
    begin, end = body[:at], body[at + length :]
    if len(end) > KNOWN_BYTES_MAX or b"\\" in begin or b"\\" in end:  # escaped, a key may be "data" as well
        return None
    return _Frame(bytes(end), query, *tensors[0][:3])


def _raw_shape(spec: ModelSpec, nbytes: int) -> tuple[int, ...]:
    """Of the one input of a model, when it is one row of so many bytes, or one string."""
    [(name, datatype, shape)] = spec.inputs
    if spec.batchable:
        shape = (1, *shape[1:])
    one = tuple(abs(dim) for dim in shape)
    if element_count(one) != 1 if datatype == "BYTES" else shape.count(-1) > 1:
        raise PenstockError(
            BAD_INPUT,
            f"input '{name}' of model '{spec.name}' is {datatype} of shape {list(spec.inputs[0].shape)}, which a body "
            "without JSON does not tell: it is one string, or numbers of which one dimension is open; say it in JSON",
        )
    if datatype == "BYTES":
        return one
    step = element_count([dim for dim in shape if dim != -1]) * ITEM_SIZES[datatype]
    return tuple(nbytes // step if dim == -1 and step else max(dim, 0) for dim in shape)


def _read_inputs(
    inputs: Any, binary: memoryview, regions: Regions | None = None
) -> tuple[list[Tensor], Payload | Unread, bool]:
    """The tensors of a request and where they lie, and whether all of them came as binary."""
    if type(inputs) is not list:
        raise PenstockError(BAD_INPUT, "the request has no list 'inputs'")
    _check_count(inputs, "inputs")
    tensors: list[Tensor] = []
    parts: list[Buffer | Place] = []
    at = taken = 0
    all_binary = True
    for each in inputs:
        name, datatype, shape = _declaration(_object(each, "an input"))
        size = _binary_size(each, name)
        if size is None:
            all_binary = False
            if "shared_memory_region" in each.get("parameters", {}):
                if "data" in each:
                    raise PenstockError(BAD_INPUT, f"input '{name}' has both data and a shared_memory_region")
                part: Buffer | Place = _allowed(regions).read(name, each["parameters"], at)
            elif "data" not in each:
                raise PenstockError(BAD_INPUT, f"input '{name}' has neither data nor a binary_data_size")
            else:
                part = pack_data(name, datatype, shape, each["data"])
        else:
            if "data" in each:
                raise PenstockError(BAD_INPUT, f"input '{name}' has both data and a binary_data_size")
            if size > len(binary) - taken:
                raise PenstockError(
                    BAD_INPUT, f"input '{name}' claims {size} bytes of binary data, and {len(binary) - taken} are left"
                )
            part = binary[taken : taken + size]
            taken += size
        nbytes = part.nbytes if isinstance(part, Place) else len(part)
        tensors.append(Tensor(name, datatype, shape, at, nbytes))
        parts.append(part)
        at += nbytes
    if taken != len(binary):
        raise PenstockError(
            BAD_INPUT, f"the request carries {len(binary)} bytes of binary data, and its inputs claim {taken}"
        )
    # Inputs that are all binary lie side by side already.
    if all_binary:
        return tensors, binary, True
    read = [part for part in parts if not isinstance(part, Place)]
    return tensors, b"".join(read) if len(read) == len(parts) else Unread(parts), False


def _check_count(tensors: list[Any], what: str) -> None:
    """No model has more: what is said of them would otherwise take as long as its client likes."""
    if len(tensors) > MAX_TENSORS:
        raise PenstockError(BAD_INPUT, f"the request has {len(tensors)} {what}; at most {MAX_TENSORS} are allowed")


def _declaration(each: dict[str, Any]) -> tuple[str, str, tuple[int, ...]]:
    name, datatype, shape = each.get("name"), each.get("datatype"), each.get("shape")
    if type(name) is not str or len(name) > _NAME_MAX:
        raise PenstockError(BAD_INPUT, f"an input's 'name' is a string of at most {_NAME_MAX} characters")
    if type(datatype) is not str:
        raise PenstockError(BAD_INPUT, f"input '{name}' has no 'datatype'")
    if type(shape) is not list:
        raise PenstockError(BAD_INPUT, f"input '{name}' has no list 'shape'")
    check_declaration(name, datatype, shape)
    return name, datatype, tuple(shape)


def _binary_size(each: dict[str, Any], name: str) -> int | None:
    size = _object(each.get("parameters", {}), f"'parameters' of input '{name}'").get("binary_data_size")
    if size is not None and (type(size) is not int or size < 0):
        raise PenstockError(BAD_INPUT, f"binary_data_size of input '{name}' is a whole number, 0 or more")
    return size


def _read_outputs(
    spec: ModelSpec, outputs: Any, parameters: dict[str, Any], regions: Regions | None
) -> tuple[list[str], Style, Changes | None]:
    default = _flag(parameters, "binary_data_output", False)
    if type(outputs) is not list:
        raise PenstockError(BAD_INPUT, "'outputs' is a list")
    _check_count(outputs, "outputs")
    names: list[str] = []
    exceptions: set[str] = set()
    changes: Changes | None = None
    for each in outputs:
        name = _object(each, "an output").get("name")
        if type(name) is not str or len(name) > _NAME_MAX:
            raise PenstockError(BAD_INPUT, f"an output's 'name' is a string of at most {_NAME_MAX} characters")
        names.append(name)
        own = _object(each.get("parameters", {}), f"'parameters' of output '{name}'")
        if "classification" in own:
            changes = changes or Changes(spec.batchable)
            changes.classes[name] = read_classes(spec, name, own["classification"])
        if "shared_memory_region" in own:
            changes = changes or Changes(spec.batchable)
            changes.places[name] = _allowed(regions).place(name, own)
        if _flag(own, "binary_data", default) != default:
            exceptions.add(name)
    return names, Style(default, frozenset(exceptions)), changes


def _is_shared(inputs: list[dict[str, Any]], changes: Changes | None) -> bool:
    """Whether anything of a request lies in its client's memory."""
    if changes is not None and changes.places:
        return True
    return any("shared_memory_region" in each.get("parameters", {}) for each in inputs)


def _allowed(regions: Regions | None) -> Regions:
    if regions is None:
        raise PenstockError(BAD_INPUT, NOT_ALLOWED)
    return regions


def _check_style(spec: ModelSpec, outputs: Sequence[str], style: Style, changes: Changes | None) -> None:
    for each in spec.outputs:
        if changes is not None and changes.has(each.name):
            continue
        if each.datatype in BINARY_ONLY and (not outputs or each.name in outputs) and not style.is_binary(each.name):
            raise PenstockError(
                BAD_INPUT,
                f"output '{each.name}' is {each.datatype}, which JSON cannot carry; ask for it with binary_data",
            )


def _object(value: Any, what: str) -> dict[str, Any]:
    if type(value) is not dict:
        raise PenstockError(BAD_INPUT, f"{what} is not a JSON object")
    return value


def _flag(parameters: dict[str, Any], key: str, default: bool) -> bool:
    value = parameters.get(key, default)
    if type(value) is not bool:
        raise PenstockError(BAD_INPUT, f"parameter '{key}' is true or false")
    return value


def _integer(parameters: dict[str, Any], key: str, high: int) -> int:
    value = parameters.get(key, 0)
    if type(value) is not int or not 0 <= value <= high:
        raise PenstockError(BAD_INPUT, f"parameter '{key}' is a whole number from 0 to {high}")
    return value


# --- answers ---


class _Output(NamedTuple):
    """An output in a response. ``before``: its JSON up to its data, or the whole of it when it is binary."""

    before: bytes
    binary: bool
    datatype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(slots=True)
class _Head:
    """What answers of one shape and style have in common. ``start``: JSON up to the outputs, without an id or
    parameters."""

    start: bytes
    outputs: list[_Output]
    response: bytes  # head, behind its first lines, and JSON of one without those, if all is binary; else empty
    whole_bytes: int  # of a payload that is just the binary outputs, in their order; -1: none is


_HEADS_MAX: Final = 4096
OK: Final = b"HTTP/1.1 200 OK\r\n"
_OUTPUTS: Final = b'"outputs":['
_BINARY_HEAD: Final = (
    b"%bContent-Type: application/octet-stream\r\nInference-Header-Content-Length: %d\r\nContent-Length: %d\r\n\r\n%b"
)
_JSON_HEAD: Final = b"%bContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b"


@lru_cache(maxsize=_HEADS_MAX)
def _head(body: bytes, style: Style) -> _Head:
    """Raises BadMessage for a body that is no packed Outcome."""
    outcome = unpack_outcome(body)
    start = b'{"model_name":%b,"model_version":%b,%b' % (
        orjson.dumps(outcome.model),
        orjson.dumps(outcome.version),
        _OUTPUTS,
    )
    elsewhere = dict(style.elsewhere)
    outputs = [_output(each, style.is_binary(each.name), elsewhere.get(each.name, b"")) for each in outcome.tensors]
    response = b""
    if not elsewhere and all(output.binary for output in outputs):
        json = start + b",".join(output.before for output in outputs) + b"]}"
        nbytes = sum(output.nbytes for output in outputs)
        response = wrap(json, nbytes, b"", True)
    return _Head(start, outputs, response, _whole_bytes(outcome))


def _output(tensor: Tensor, binary: bool, elsewhere: bytes) -> _Output:
    described = orjson.dumps({"name": tensor.name, "datatype": tensor.datatype, "shape": tensor.shape})
    if elsewhere:
        whole = b'%b,"parameters":%b}' % (described[:-1], elsewhere)
        return _Output(whole, True, tensor.datatype, tensor.shape, tensor.offset, 0)
    tail = b',"parameters":{"binary_data_size":%d}}' % tensor.nbytes if binary else b',"data":'
    return _Output(described[:-1] + tail, binary, tensor.datatype, tensor.shape, tensor.offset, tensor.nbytes)


def _whole_bytes(outcome: Outcome) -> int:
    at = 0
    for tensor in outcome.tensors:
        if tensor.offset != at:
            return -1
        at += tensor.nbytes
    return at


def render(
    body: bytes, payload: Payload, style: Style, identifier: str, begin: bytes = OK, parameters: bytes = b""
) -> tuple[bytes, Payload]:
    """An answer as an HTTP response: its head and JSON, and the binary outputs that follow: the payload itself, when
    that is just these. ``begin``: its first lines. ``parameters``: a JSON object for the answer's, if any.

    Raises BadMessage or PenstockError for an answer that cannot be rendered.
    """
    head = _head(body, style)
    if head.response and len(payload) == head.whole_bytes:
        if not (identifier or parameters):
            return begin + head.response, payload
        json = b"%b%b]}" % (_start(head, identifier, parameters), b",".join([each.before for each in head.outputs]))
        return wrap(json, len(payload), begin, True), payload
    json, binary = render_body(body, payload, style, identifier, parameters)
    return wrap(json, len(binary), begin, style.binary or bool(binary)), binary


def render_body(
    body: bytes, payload: Payload, style: Style, identifier: str, parameters: bytes = b""
) -> tuple[bytes, bytes]:
    """An answer's JSON and its binary outputs."""
    head = _head(body, style)
    view = memoryview(payload)
    parts: list[bytes] = []
    binary: list[memoryview] = []
    for before, is_binary, datatype, shape, offset, nbytes in head.outputs:
        data = cut(view, offset, nbytes)
        if is_binary:
            parts.append(before)
            binary.append(data)
        else:
            parts.append(b"%b%b}" % (before, dump_data(datatype, shape, data)))
    return b"%b%b]}" % (_start(head, identifier, parameters), b",".join(parts)), b"".join(binary)


def cut(payload: memoryview, offset: int, nbytes: int) -> memoryview:
    """The bytes of an output. Raises BadMessage where they are not there."""
    data = payload[offset : offset + nbytes]
    if len(data) != nbytes:
        raise BadMessage(f"an output lies from {offset} to {offset + nbytes} in a payload of {len(payload)} bytes")
    return data


def _start(head: _Head, identifier: str, parameters: bytes) -> bytes:
    start = head.start
    if parameters:
        start = b'%b"parameters":%b,%b' % (start.removesuffix(_OUTPUTS), parameters, _OUTPUTS)
    return b'{"id":%b,%b' % (orjson.dumps(identifier), start[1:]) if identifier else start


def wrap(json: bytes, binary_bytes: int, begin: bytes, binary: bool) -> bytes:
    """The head of a response and its JSON, before ``binary_bytes`` more. ``begin``: its first lines."""
    if binary:
        return _BINARY_HEAD % (begin, len(json), len(json) + binary_bytes, json)
    return _JSON_HEAD % (begin, len(json), json)
