"""What ``fuzz.py`` says to a gateway: HTTP connections in process, on a loop and a transport that are played.

The reader, the connection, the application and the caller core are the gateway's own; the broker and the workers answer
what is asked, or refuse it. Whatever comes, what goes back is HTTP: answers that are whole, or the connection's end.
"""

from __future__ import annotations

import asyncio
import heapq
import logging
import os
import re
import shutil
import tempfile
import zlib
from base64 import b64encode
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from random import Random
from typing import Any, Final

import orjson

from bench.fuzzexamples import EPOCH
from bench.fuzzmutate import changed_bytes, number
from bench.fuzztarget import Target, census
from bench.fuzztfserving import request as tfserving_request
from penstock.client.caller import Caller, Identity
from penstock.client.events import Complete, Fail, FromWorker, OrderDone
from penstock.client.orders import Orders
from penstock.gateway.application import Application
from penstock.gateway.connection import Connection, Http
from penstock.gateway.options import GatewayOptions
from penstock.gateway.reports import Reports
from penstock.gateway.repository import Repository
from penstock.gateway.tfserving import TensorFlowServing
from penstock.wire.arena import Arena
from penstock.wire.codec import pack, pack_outcome, unpack, unpack_layout
from penstock.wire.events import FromBroker
from penstock.wire.messages import (
    COMPLETE,
    INLINE_MAX_BYTES,
    ON_PUBLICATION,
    Answers,
    Batch,
    Failure,
    Message,
    Models,
    Order,
    Ordered,
    Outcome,
    Refusal,
    Refusals,
    Results,
    Snapshot,
    Submit,
    Welcome,
)
from penstock.wire.models import IDLE, LOADING, READY, ModelSpec, ModelState, Route, TensorSpec
from penstock.wire.slots import Slots

_ARENA_BYTES: Final = 1 << 20
_HEADS_MAX: Final = 1024  # gateway/reader.py
_TYPES: Final = ("FP32", "INT64", "BOOL", "BYTES", "FP16", "FP64", "UINT8", "BF16")
_LINE: Final = re.compile(rb"HTTP/1\.1 (\d{3}) [A-Za-z ]+")
_HEADERS: Final = (
    *(b"Content-Length: 5", b"Content-Length: 0", b"Content-Length: -1", b"Content-Length: 18446744073709551616"),
    *(b"Content-Length: 99999999999999999999", b"Content-Length: 1, 1", b"Content-Length: 70000"),
    *(b"Transfer-Encoding: chunked", b"Transfer-Encoding: gzip, chunked", b"Transfer-Encoding: identity"),
    *(
        b"Content-Encoding: gzip",
        b"Content-Encoding: deflate",
        b"Content-Encoding: br",
        b"Content-Encoding: gzip, gzip",
    ),
    *(b"Inference-Header-Content-Length: 5", b"Inference-Header-Content-Length: 0", b"Expect: 100-continue"),
    *(b"Inference-Header-Content-Length: 99999999999", b"Inference-Header-Content-Length: -1", b"Expect: what"),
    *(b"Connection: close", b"Connection: keep-alive", b"Connection: Upgrade\r\nUpgrade: h2c", b"Host: b", b"Host:"),
    *(b"Accept-Encoding: gzip", b"Accept-Encoding: deflate;q=nan, *;q=-1", b"Accept: application/openmetrics-text"),
    *(b"Penstock-Timeout: 0.5", b"Penstock-Timeout: 1e9", b"Penstock-Priority: 9", b"Penstock-Priority: \xb2"),
    *(b"Penstock-Tenant: \xff", b"Penstock-Explain: 1", b"X: " + b"y" * 5000, b": none", b"A b: c", b"X:\r\n folded"),
    *(b"Penstock-Sticky: user 7", b"Penstock-Sticky: \xff\xc3\xa9", b"Penstock-Sticky: " + b"x" * 300),
    *(b"traceparent: 00-0-0-0", b"X\0: y", b"X: \0", b"Content-Length: 5\r\nContent-Length: 6", b"X: y\nZ: a"),
)
_TARGETS: Final = (
    *(b"/v2", b"/v2/health/live", b"/v2/health/ready", b"/metrics", b"/", b"/events", b"/v2/models/m0", b"*"),
    *(b"/v2/models/m0/ready", b"/v2/models/none/infer", b"/v2/models/m0/versions/9/infer", b"/%ff", b"/%", b"//"),
    *(b"/v2/models/m0/versions/canary/infer", b"/v2/models/m0/versions/canary", b"/v2/models/m1/versions/2/ready"),
    *(b"/v2/repository/index", b"/v2/repository/r/index", b"/v2/repository/models/m0/load", b"/v2/repository/models"),
    *(b"http://a/v2", b"http://a", b"/v2?x=" + b"y" * 3000, b"/v2/models/%00/infer", b"/" + b"a/" * 500, b"a:1", b""),
)


# Names of models, and of versions, as they stand in a path.
_NAMES: Final = (b"m0", b"m0", b"new", b"%2e%2e", b"..", b"a%2Fb", b"%00", b"a b", b"%20", b"x" * 300, b"%c3%a9" * 200)
_VERSIONS: Final = (
    b"1",
    b"2",
    b"7",
    b"canary",
    b"latest",
    b"01",
    b"-1",
    b"1" * 19,
    b"..",
    b"%2e%2e%2f9",
    b"%00",
    b"%d9%a3",
)

_ODD: Final[tuple[Any, ...]] = (
    None,
    True,
    -1,
    1.5,
    "x",
    [],
    {},
    1 << 63,
    (1 << 64) - 1,
    0,
    [0],
    ["x", 1],
    [[1], [2, 3]],
    {"a": []},
)


class Loop:
    """Of asyncio's, what a gateway's HTTP side uses, in a time that only ``pass_time`` lets pass."""

    def __init__(self) -> None:
        self._now = 0.0
        self._serial = 0
        self._due: list[tuple[float, int, asyncio.TimerHandle]] = []

    def time(self) -> float:
        return self._now

    def get_debug(self) -> bool:
        return False

    def call_later(self, delay_s: float, callback: Callable[..., object], *arguments: Any) -> asyncio.TimerHandle:
        handle = asyncio.TimerHandle(self._now + delay_s, callback, arguments, self)  # type: ignore[arg-type]
        self._serial += 1
        heapq.heappush(self._due, (self._now + delay_s, self._serial, handle))
        return handle

    def call_soon(
        self, callback: Callable[..., object], *arguments: Any, context: object = None
    ) -> asyncio.TimerHandle:
        return self.call_later(0.0, callback, *arguments)

    def create_future(self) -> asyncio.Future[Any]:
        return asyncio.Future(loop=self)  # type: ignore[arg-type]

    def run_in_executor(self, executor: None, work: Callable[..., Any], *arguments: Any) -> asyncio.Future[Any]:
        future = self.create_future()
        try:
            future.set_result(work(*arguments))
        except Exception as error:  # noqa: BLE001 - as a thread does
            future.set_exception(error)
        return future

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        raise context.get("exception") or AssertionError(context["message"])

    def _timer_handle_cancelled(self, handle: asyncio.TimerHandle) -> None: ...

    def pass_time(self, seconds: float) -> None:
        until = self._now + seconds
        while self._due and self._due[0][0] <= until:
            self._now, _, handle = heapq.heappop(self._due)
            if not handle.cancelled():
                callback, arguments = handle._callback, handle._args  # type: ignore[attr-defined]
                callback(*arguments)
        self._now = until


class Broker:
    """Of a link, what orders know. ``ordered``: what waits for an answer."""

    def __init__(self, caller: Caller) -> None:
        self.caller = caller
        self.on_order: Callable[[OrderDone], None] = lambda done: None
        self.ordered: list[int] = []

    def say(self, message: Message) -> None:
        assert isinstance(message, Order)
        pack(message)
        self.ordered.append(message.serial)


class Hangups:
    """Nobody hangs up unseen here."""

    def watch(self, fileno: int, gone: Callable[[], None]) -> None: ...
    def forget(self, fileno: int, gone: Callable[[], None]) -> None: ...
    def close(self) -> None: ...


class Transport:
    """Keeps what is written. ``slow``: its client reads only when it is told to."""

    def __init__(self, slow: bool) -> None:
        self.written = bytearray()
        self.connection: Connection | None = None
        self.closed = self.reading = False
        self.slow = slow
        self._stuck = 0

    def get_extra_info(self, name: str) -> Any:
        return self if name == "socket" else None

    def fileno(self) -> int:
        return 0

    def set_write_buffer_limits(self, high: int) -> None: ...

    def get_write_buffer_size(self) -> int:
        return self._stuck

    def write(self, data: bytes) -> None:
        if self.closed:
            return
        self.written += data
        if self.slow and not self._stuck:
            self._stuck = len(data)
            assert self.connection is not None
            self.connection.pause_writing()

    def writelines(self, parts: tuple[bytes, ...]) -> None:
        self.write(b"".join(parts))

    def read_all(self) -> None:
        """The client reads."""
        if self._stuck:
            self._stuck = 0
            assert self.connection is not None
            self.connection.resume_writing()

    def pause_reading(self) -> None:
        self.reading = False

    def resume_reading(self) -> None:
        self.reading = True

    def is_closing(self) -> bool:
        return self.closed

    def can_write_eof(self) -> bool:
        return True

    def write_eof(self) -> None: ...

    def close(self) -> None:
        self.closed = True

    abort = close


class HttpTarget(Target):
    """The gateway: one input is all that a client says on a connection, in pieces, cut off anywhere."""

    name = "http"
    share = 0.08

    def begin(self, random: Random) -> None:
        _raise_what_is_logged()
        self._answers = Random(random.random())
        self.loop = Loop()
        loop: Any = self.loop
        self.slots = Slots(Arena(_ARENA_BYTES, "fuzz"))
        # Small, so that they are met: a body may take as long as so many bytes of JSON.
        options = GatewayOptions(
            body_bytes_max=256 << 10, bodies_bytes_max=1 << 20, head_bytes_max=8192, model_push=True
        )
        self.repository = Path(tempfile.mkdtemp(dir="/dev/shm" if os.path.isdir("/dev/shm") else None))
        self.caller = Caller(Identity(b"a caller", "gateway", 1, True, "here", calls_max=8))
        reports = Reports(loop, lambda: None, lambda: Snapshot("gateway", self.caller.meters.samples()), 1.0)
        self.application = Application(loop, self.caller, options, reports, lambda: None)
        link: Any = Broker(self.caller)
        self.broker: Broker = link
        self.application.add(Repository(loop, self.application, Orders(link)).routes)
        self.application.add(TensorFlowServing(self.application).routes)
        self.http = Http(loop, options, self.application, lambda: self.slots if self.caller.shares else None)
        self.http.hangups = Hangups()  # type: ignore[assignment]
        self._hear(FromBroker(Welcome(EPOCH, "gateway", True)))
        states = [_model(each) for each in range(len(_TYPES))]
        states += [ModelState("m0", "2", IDLE, "", states[0].spec), ModelState("m0", "3", LOADING, "", None)]
        labels, traffic = (("canary", "2"), ("stable", "1"), ("odd", "9")), (("stable", 60), ("canary", 39), ("3", 1))
        routes = [Route("m0", ("1",), labels, traffic), *[Route(each.name, ("1",)) for each in states[1 : len(_TYPES)]]]
        self._hear(FromBroker(Models(EPOCH, states, routes, str(self.repository))))

    # --- what clients say ---

    def make(self, random: Random) -> tuple[bool, list[bytes]]:
        if random.random() < 0.2:  # the same again and again, one read each, of which little is looked at anew
            asked = _request(random)
            times = range(random.choice((2, 3, 6)))
            return False, [asked if random.random() < 0.7 else changed_bytes(random, asked, asked) for _ in times]
        stream = b"".join(_request(random) for _ in range(random.choice((1, 1, 1, 2, 20))))
        if random.random() < 0.4:
            stream = changed_bytes(random, stream, _request(random))
        pieces = []
        while stream:
            size = random.choice((1, 5, 100, 4000, 70_000, len(stream), len(stream)))
            pieces.append(stream[:size])
            stream = stream[size:]
            if len(pieces) > 50:
                size = len(stream)
        return random.random() < 0.1, pieces

    def feed(self, each: tuple[bool, list[bytes]]) -> bool:
        slow, pieces = each
        transport, connection = Transport(slow), self.http.connection()
        transport.connection, transport.reading = connection, True
        connection.connection_made(transport)  # type: ignore[arg-type]
        for piece in pieces:
            at = 0
            while at < len(piece) and not transport.closed:
                if not transport.reading:
                    self._go_on(transport)
                    if not transport.reading:
                        break  # nothing more is read from this client
                room = connection.get_buffer(-1)
                part = piece[at : at + len(room)]
                room[: len(part)] = part
                connection.buffer_updated(len(part))
                at += len(part)
            self._answer()
        self._go_on(transport)
        transport.closed = True
        connection.connection_lost(None)
        self.loop.pass_time(0.01)
        return 200 in list(statuses(bytes(transport.written), b"HEAD" in b"".join(pieces)))

    def _go_on(self, transport: Transport) -> None:
        """The client reads, all that is asked is answered, and who waits for room has it or has waited long enough."""
        for seconds in (0.0, 0.1, 2.0):
            transport.read_all()
            self._answer()
            self.loop.pass_time(seconds)
            if transport.reading:
                return

    # --- the broker and the workers ---

    def _hear(self, event: Any) -> None:
        for command in self.caller.handle(event, 1.0):
            if isinstance(command, Complete):
                command.sink.complete(command)
            elif isinstance(command, Fail):
                command.sink.fail(command.error)
            elif isinstance(command, OrderDone):
                self.broker.on_order(command)

    def _answer(self) -> None:
        ordered, self.broker.ordered = self.broker.ordered, []
        for serial in ordered:
            failure = self._answers.choice((None, None, Failure("unavailable", "it is corrupt", 0)))
            if self._answers.random() < 0.95:  # else its client waits until it leaves
                self._hear(FromBroker(Ordered(EPOCH, serial, failure)))
        if not self.caller.wants_flush(1.0):
            return
        for message in self.caller.flush(1.0):
            for group in message.groups:
                for number_ in group.ids:
                    self._end(message, group, number_)

    def _end(self, message: Submit, group: Any, number_: int) -> None:
        kind = self._answers.random()
        if kind < 0.2:
            self._hear(FromBroker(Refusals(EPOCH, [Refusal(number_, "overloaded", "it is full", 1000)])))
            return
        tensors = unpack_layout(group.form.body).tensors
        if kind < 0.25:  # a worker that cannot count
            tensors = tuple(each._replace(nbytes=each.nbytes + 1) for each in tensors)
        body = pack_outcome(Outcome(group.form.model, "1", tuple(each._replace(name="y") for each in tensors)))
        payload = bytes(group.nbytes)
        if not group.places:
            for each in tensors:
                assert each.offset <= group.nbytes, "a tensor outside of its payload was asked"
        large = group.nbytes > INLINE_MAX_BYTES
        answers = Answers(COMPLETE, group.nbytes, body, 5, (number_,))
        results = Results(EPOCH, [answers], b"worker00", Batch(1, 1, "idle", 9, 5), blob=b"" if large else payload)
        heard = unpack(pack(results), [payload] if large else [], ON_PUBLICATION)
        assert isinstance(heard, Results)
        self._hear(FromWorker(heard))

    def settle(self) -> int:
        self.loop.pass_time(100.0)
        self._answer()
        published = [each.relative_to(self.repository) for each in self.repository.rglob("*")]
        strange = [each for each in published if each.parts[0].startswith(".") or len(each.parts) > 3]
        assert not strange, f"these are left in the repository: {strange}"
        for each in self.repository.iterdir():
            shutil.rmtree(each)
        for serial in list(self.caller._orders):  # the broker answers in the end, whoever waits
            self._hear(FromBroker(Ordered(EPOCH, serial)))
        used = self.slots.arena.allocator.used
        held = self.http.budget.used, used, self.slots.waiting, len(self.http.connections), len(self.caller.calls)
        assert held == (0, 0, 0, 0, 0), f"of the budget, the arena, waits, connections and calls are left: {held}"
        assert self.http.streams == 0, "answers go on to nobody"
        self.caller.validate()
        assert len(self.http.heads) <= _HEADS_MAX, f"{len(self.http.heads)} heads are remembered"
        return census(
            self.http.connections, self.loop, self.application._feed, self.application._responses, self.caller
        )

    def close(self) -> None:
        self.slots.close()
        shutil.rmtree(self.repository)

    def bytes_of(self, each: tuple[bool, list[bytes]]) -> bytes:
        return b"".join(each[1])

    def with_bytes(self, each: tuple[bool, list[bytes]], data: bytes) -> tuple[bool, list[bytes]]:
        return each[0], [data]


class _Raises(logging.Handler):
    """A defect that the application answers with 500 and logs is a finding."""

    def emit(self, record: logging.LogRecord) -> None:
        if record.exc_info and record.exc_info[1] is not None:
            raise record.exc_info[1]


def _raise_what_is_logged() -> None:
    log = logging.getLogger("penstock.gateway")
    if not any(isinstance(each, _Raises) for each in log.handlers):
        log.addHandler(_Raises(logging.ERROR))
        log.setLevel(logging.ERROR)
        log.propagate = False


def _model(at: int) -> ModelState:
    shape = (-1, 2) if at % 2 else (-1, -1)
    spec = ModelSpec(
        *(f"m{at}", "1", "onnx", (TensorSpec("x", _TYPES[at], shape),), (TensorSpec("y", _TYPES[at], shape),)),
        batchable=at % 3 > 0,
        max_batch_size=64,
    )
    return ModelState(spec.name, "1", READY, "", spec)


def statuses(written: bytes, heads: bool, whole: bool = True) -> Iterator[int]:
    """Of all answers, each of which is well formed and whole. ``heads``: some may be to HEAD, without their bodies.
    ``whole``: false where the last may have been cut off."""
    while written:
        head, end, written = written.partition(b"\r\n\r\n")
        line, *lines = head.split(b"\r\n")
        if not end and not whole:
            return
        match = _LINE.fullmatch(line) if end else None
        assert match, f"this is no answer: {head[:200]!r}"
        status = int(match[1])
        if status == 100:
            assert not lines
            continue
        headers = dict(each.split(b": ", 1) for each in lines)
        if b"Transfer-Encoding" in headers or headers.get(b"Content-Type") == b"text/event-stream":
            yield status
            return  # goes on until the connection ends
        if status == 204 or (heads and (not written or written.startswith(b"HTTP/1.1 "))):
            yield status
            continue  # without a body
        length = int(headers[b"Content-Length"])
        body, written = written[:length], written[length:]
        if len(body) < length and not whole:
            return
        assert len(body) == length, f"{len(body)} of {length} bytes: {head[:200]!r}"
        if status >= 400 and body:
            assert list(orjson.loads(body)) == ["error"], body[:200]
        yield status


def _request(random: Random) -> bytes:
    """Something between a valid request and none."""
    kind = random.random()
    if kind < 0.04:
        return random.randbytes(random.choice((1, 10, 300, 9000)))
    if kind < 0.06:
        return b"GET /v2 HTTP/1.1\r\nHost: a\r\n" + b"X: y\r\n" * random.choice((90, 101, 3000)) + b"\r\n"
    method, target, body, headers = b"GET", random.choice(_TARGETS), b"", [b"Host: a"]
    if kind < 0.2:
        at = random.randrange(len(_TYPES))
        odd = random.choice((*_ODD, _nested(random.choice((3, 40, 200)))))
        target, body = tfserving_request(random, _TYPES[at] == "BYTES", at, odd)
        method = b"POST" if b":" in target or random.random() < 0.2 else b"GET"
        if random.random() < 0.08:
            body = changed_bytes(random, body, b'[NaN,-Infinity,1e999,"\\ud800",' + b"[" * 2000)
    elif kind < 0.75:
        at = random.randrange(len(_TYPES))
        version = b"" if random.random() < 0.9 else b"/versions/%b" % random.choice(_VERSIONS)
        method, target = b"POST", b"/v2/models/m%d%b/infer" % (at, version)
        body, more = _inference(random, at)
        headers += more
    elif kind < 0.93:
        method, target, body = _repository(random)
        if random.random() < 0.2:
            body = zlib.compress(body) if random.random() < 0.8 else _bomb(31, b"[", 1 << 22)
            headers.append(b"Content-Encoding: deflate")
    elif random.random() < 0.3:
        method = random.choice((b"POST", b"HEAD", b"PUT", b"OPTIONS", b"CONNECT", b"PRI", b"get", b"", b"\xff"))
    if random.random() < 0.15:
        target = random.choice(_TARGETS)
    chunked = random.random() < 0.15
    headers.append(b"Transfer-Encoding: chunked" if chunked else b"Content-Length: %d" % len(body))
    for _ in range(random.choice((0, 0, 1, 2))):
        headers.insert(random.randrange(len(headers) + 1), random.choice(_HEADERS))
    if random.random() < 0.05:
        headers.pop(random.randrange(len(headers)))
    version = random.choice((b"1.0", b"2.0", b"0.9", b"1.10", b"x")) if random.random() < 0.1 else b"1.1"
    head = b"%b %b HTTP/%b\r\n%b\r\n\r\n" % (method, target, version, b"\r\n".join(headers))
    return head + (_chunks(random, body) if chunked else body)


def _chunks(random: Random, body: bytes) -> bytes:
    parts = []
    while body:
        size = random.choice((1, 2, 3, 50, 4000, 100_000))
        part, body = body[:size], body[size:]
        sign = b"%x" % len(part)
        if random.random() < 0.01:
            sign = random.choice((b"ffffffffffffffffff", b"-1", b"", b"0x5", b"5;" + b"e" * 9000, b"5;a=b", b" 5"))
        parts.append(sign + random.choice((b"\r\n",) * 30 + (b"\n", b"", b"\r")) + part + b"\r\n")
    trailer = b"Host: b\r\nContent-Length: 5\r\n" if random.random() < 0.1 else b""
    return b"".join(parts) + b"0\r\n" + trailer + b"\r\n"


def _repository(random: Random) -> tuple[bytes, bytes, bytes]:
    """Something that is asked of the model repository: method, target and body."""
    name, version = random.choice(_NAMES), random.choice(_VERSIONS)
    kind = random.random()
    if kind < 0.15:
        json = {"ready": random.choice((True, False, *_ODD))} if random.random() < 0.5 else random.choice(_ODD)
        return b"POST", random.choice((b"/v2/repository/index", b"/v2/repository/r/index")), orjson.dumps(json)
    if kind < 0.35:
        path = b"/versions" if random.random() < 0.4 else b"/versions/%b" % version
        method = b"PUT" if random.random() < 0.7 else b"POST"
        return method, b"/v2/repository/models/%b%b" % (name, path), random.randbytes(random.choice((0, 1, 5000)))
    parameters: dict[str, Any] = {}
    if random.random() < 0.5:
        parameters["config"] = random.choice(
            ("{}", '{"max_batch_size": 8}', "[", "1", '"\\ud800"', " " * 70_000, *_ODD)
        )
    for _ in range(random.choice((0, 0, 1, 3, 17))):
        data = b64encode(random.randbytes(random.choice((1, 100)))).decode()
        at = random.choice(("1", "2", str(random.randrange(10**6)), "..", "01", "latest"))
        key = f"file:{at}/{random.choice(('model.onnx',) * 5 + ('x', '../x', 'model.onnx/x'))}"
        parameters[key] = random.choice((data, data, data, "é", "=", "AAA", *_ODD))
    if random.random() < 0.2:
        parameters[random.choice(("unload_dependents", "nonsense"))] = random.choice(_ODD)
    request = random.choice(({"parameters": parameters},) * 4 + (parameters, {"parameters": random.choice(_ODD)}))
    action = random.choice((b"load", b"load", b"unload"))
    return b"POST", b"/v2/repository/models/%b/%b" % (name, action), orjson.dumps(request)


def _inference(random: Random, at: int) -> tuple[bytes, list[bytes]]:
    """A request for a model: its body, and headers that belong to it."""
    datatype, rows, columns = _TYPES[at], random.choice((1, 1, 2, 64, 65, 700)), 2
    count, headers = rows * columns, list[bytes]()
    binary = random.random() < 0.5 or datatype in ("FP16", "BF16")
    tensor: dict[str, Any] = {"name": "x", "datatype": datatype, "shape": [rows, columns]}
    sizes = {"FP32": 4, "INT64": 8, "BOOL": 1, "BYTES": 5, "FP16": 2, "FP64": 8, "UINT8": 1, "BF16": 2}
    data = b"\1\0\0\0x" * count if datatype == "BYTES" else bytes(sizes[datatype] * count)
    if binary:
        tensor["parameters"] = {"binary_data_size": len(data)}
    else:
        data, tensor["data"] = b"", ["x" if datatype == "BYTES" else random.choice((0, 1))] * count
    request: dict[str, Any] = {"inputs": [tensor]}
    if random.random() < 0.5 or datatype in ("FP16", "BF16"):
        request["parameters"] = {"binary_data_output": True}
    if random.random() < 0.2:
        request["id"] = random.choice(("1", "é", "x" * 1024))
    if random.random() < 0.5:
        for _ in range(random.choice((1, 1, 2))):
            _spoil(random, request)
    try:
        json = orjson.dumps(request)
    except (TypeError, orjson.JSONEncodeError):
        json = b"{"
    if random.random() < 0.08:
        json = changed_bytes(random, json, b'[NaN,Infinity,1e999,"\\ud800",' + b"[" * 2000)
    if binary:
        headers.append(b"Inference-Header-Content-Length: %d" % len(json))
    body = json + data
    kind = random.random()
    if kind < 0.08:
        body = zlib.compress(body)
        headers.append(b"Content-Encoding: deflate")
    elif kind < 0.1:
        body = _bomb(
            random.choice((31, 15, -15)), random.choice((b" ", b"[", b"\0")), random.choice((1 << 17, 1 << 22))
        )
        headers.append(random.choice((b"Content-Encoding: gzip", b"Content-Encoding: deflate")))
    return body, headers


@cache
def _bomb(window: int, of: bytes, size: int) -> bytes:
    """Few bytes that become many."""
    bomb = zlib.compressobj(wbits=window)
    return bomb.compress(of * size) + bomb.flush()


def _spoil(random: Random, request: dict[str, Any]) -> None:
    """Change something of a request's JSON."""
    tensors = request.get("inputs")
    tensor = tensors[0] if type(tensors) is list and tensors and type(tensors[0]) is dict else {}
    odd = random.choice((*_ODD, _nested(random.choice((3, 100, 200)))))
    name = random.choice(("name", "datatype", "shape", "data", "parameters"))
    match random.randrange(11):
        case 0:
            tensor[name] = odd
        case 1:
            tensor.pop(name, None)
        case 2:
            tensor["shape"] = [number(random) % (1 << 63) for _ in range(random.choice((0, 1, 2, 3, 33)))]
        case 3:
            tensor["parameters"] = {"binary_data_size": number(random)}
        case 4:
            request[random.choice(("inputs", "outputs", "parameters", "id"))] = odd
        case 5:
            request["inputs"] = [tensor] * random.choice((0, 2, 50))
        case 6:
            request["inputs"] = _many(random, {"datatype": "FP32", "shape": [0, 2], "data": []})
        case 7:
            request["outputs"] = _many(random, {})
        case 8:
            request["outputs"] = [{"name": "y", "parameters": {"binary_data": odd}}]
        case 9:
            request["parameters"] = {"timeout": random.choice((odd, 1, 10**12)), "binary_data_output": odd}
        case _:
            request["parameters"] = {"priority": odd, "explain": True}


def _nested(depth: int) -> Any:
    deep: Any = 0
    for _ in range(depth):
        deep = [deep]
    return deep


def _many(random: Random, each: dict[str, Any]) -> list[dict[str, Any]]:
    """Of different names, but for the last two."""
    count = random.choice((2, 50, 3000)) if random.random() < 0.1 else 2
    return [each | {"name": f"x{min(at, count - 2)}"} for at in range(count)]
