"""One HTTP connection: bytes from the transport to the reader, requests to the application, answers back in their
order.

An asyncio.BufferedProtocol with plain callbacks: a Task and a Future for each request would cost a third more. Reads
go into one buffer that all connections share (get_buffer, read and buffer_updated follow each other without a break),
large bodies straight into a buffer of their own.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Final, Protocol, cast

import orjson

from penstock.gateway.hangups import Hangups
from penstock.gateway.options import GatewayOptions
from penstock.gateway.reader import BODY, FULL, HEAD, IDLE, Budget, Head, HttpError, Known, Reader, Request
from penstock.gateway.waits import BoundedWait, too_large
from penstock.wire.errors import DRAINING, OVERLOADED, TOO_LARGE, PenstockError
from penstock.wire.messages import Payload
from penstock.wire.process import is_spare
from penstock.wire.slots import Slot, Slots
from penstock.wire.tensors import Buffer

_SHARED: Final = memoryview(bytearray(256 * 1024))
_SHARED_START: Final = _SHARED[:4096]  # for a head, and little of the body that is to be received elsewhere

REASONS: Final = {
    200: "OK",
    202: "Accepted",
    204: "No Content",
    400: "Bad Request",
    403: "Forbidden",
    404: "Not Found",
    405: "Method Not Allowed",
    408: "Request Timeout",
    410: "Gone",
    413: "Content Too Large",
    415: "Unsupported Media Type",
    417: "Expectation Failed",
    429: "Too Many Requests",
    431: "Request Header Fields Too Large",
    499: "Client Closed Request",
    500: "Internal Server Error",
    501: "Not Implemented",
    503: "Service Unavailable",
    504: "Gateway Timeout",
    505: "HTTP Version Not Supported",
}
_STATUS_LINES: Final = {status: f"HTTP/1.1 {status} {reason}\r\n".encode() for status, reason in REASONS.items()}


# What is written at once of an answer; between two pieces of a larger one all others have their turn. The kernel takes
# as much as its client reads meanwhile: 45 MB in one go were 40 ms.
PIECE_BYTES: Final = 512 * 1024
_WATCH_S: Final = 2.0  # between two looks for connections that are late


class Application(Protocol):
    """What answers requests."""

    def handle(self, exchange: Exchange, /) -> None:
        """Answer, now or later, by ``exchange.answer`` or ``exchange.send``. Must not raise."""

    def refused(self, status: int, sentence: str, headers: Mapping[str, bytes], /) -> bytes:
        """A connection was answered without a request, of which these headers had been read. What the answer has
        among its own, as for every answer to them."""

    def sent(self) -> None:
        """What had to wait for a client has left, and whoever wanted to know has been called."""


class Line(Protocol):
    """What an exchange knows of where its answer goes."""

    @property
    def budget(self) -> Budget: ...
    @property
    def ends(self) -> tuple[tuple[str, int], tuple[str, int]] | None: ...
    def slots(self) -> Slots | None: ...
    def answered(self) -> None: ...
    def begin(self, exchange: Exchange, content_type: bytes, extra: bytes, /) -> Stream: ...
    def wait(
        self, nbytes: int, lead: int, then: Callable[[Slot], None], late: Callable[[str], None], /
    ) -> BoundedWait: ...


class Exchange(Request):
    """A request and its one answer. ``gone`` is called when the client leaves before it has been answered, and when a
    gateway that drains ends an answer that goes on. ``began``, ``arrived``: when all of the request's head, and all of
    the request, had come, in seconds of the monotonic clock."""

    __slots__ = ("_connection", "_response", "_sent", "_tail", "arrived", "began", "gone", "status")

    def __init__(
        self, head: Head, body: Buffer, charged: int, slot: Slot | None = None, known: Known | None = None
    ) -> None:
        """Belongs to no connection yet."""
        self.head = head  # rather than by way of super(), which takes as long again
        self.body = body
        self.charged = charged
        self.slot = slot
        self.known = known
        self.arrived = self.began = time.monotonic()
        self.status = 0
        self.gone: Callable[[], None] | None = None
        self._connection: Line | None = None
        self._response: bytes | None = None
        self._tail: Buffer = b""
        self._sent: Callable[[], None] | None = None

    @property
    def ends(self) -> tuple[tuple[str, int], tuple[str, int]] | None:
        """The addresses of its TCP connection, ours and the client's; None where it has none."""
        return None if self._connection is None else self._connection.ends

    def send(self, status: int, response: bytes, tail: Buffer = b"", sent: Callable[[], None] | None = None) -> None:
        """Answer with a whole response, which says nothing of the connection: for a connection that is kept alive.

        ``tail``: the end of the body, where it is not to be copied behind the rest. ``sent`` is called once nobody
        reads it any more: the kernel has all of it, or the client has gone.
        """
        connection = self._connection
        if connection is None:
            if sent is not None:
                sent()
            return
        self.status = status
        self._response = response
        self._tail = tail
        self._sent = sent
        connection.answered()

    def answer(
        self, status: int, body: bytes = b"", content_type: bytes = b"application/json", extra: bytes = b""
    ) -> None:
        """Answer with a body. ``extra``: more header lines, each with its CRLF."""
        self.send(status, _response(status, body, content_type, extra))

    def answer_large(
        self, status: int, body: bytes, content_type: bytes = b"application/json", extra: bytes = b""
    ) -> None:
        """As ``answer``, with a body that is not copied."""
        head = b"%bContent-Type: %b\r\n%bContent-Length: %d\r\n\r\n"
        self.send(status, head % (_STATUS_LINES[status], content_type, extra, len(body)), body)

    def answer_error(self, status: int, sentence: str, extra: bytes = b"") -> None:
        self.answer(status, error_body(sentence), extra=extra)

    def begin(self, content_type: bytes, extra: bytes = b"") -> Stream:
        """Answer with 200 and a body that goes on until it is finished. It is the last answer of its connection: what
        the client has asked behind it is not answered. Raises PenstockError when there are too many of them, or the
        gateway drains."""
        assert self._connection is not None, "the client has left"
        return self._connection.begin(self, content_type, extra)

    @property
    def response(self) -> bytes:
        """All that it was answered, where that is one piece of memory; else b""."""
        return b"" if self._response is None or self._tail else self._response

    @property
    def abandoned(self) -> bool:
        return self._connection is None

    def place(self, payload: Buffer) -> Payload | None:
        """A large payload of this request where workers can read it: already there when it is the end of a body that
        was received there, or copied; as it is while they read nothing of this gateway's. None while there is no room:
        then ``wait``. Raises PenstockError when there never will be."""
        if self.slot is not None:
            if isinstance(payload, memoryview):
                self.slot.cut(len(payload))
                return self.slot
            self.slot.give_back()  # some of its tensors were JSON, and now they lie together elsewhere
            self.slot = None
        self.body = b""
        slots = self.slots
        if slots is None:
            return payload
        slot = take_slot(slots, len(payload))
        return None if slot is None else self.put(payload, slot)

    @property
    def slots(self) -> Slots | None:
        """Where workers read this gateway's tensors, if anywhere."""
        return None if self._connection is None else self._connection.slots()

    def put(self, payload: Buffer, slot: Slot) -> Slot:
        """Copy a payload of this request into a slot, which is given back with the request."""
        slot.view[:] = payload
        self.slot = slot
        return slot

    def wait(self, nbytes: int, then: Callable[[Slot], None], late: Callable[[str], None]) -> None:
        """Have one of them called when there is a slot, or was none in time (see BoundedWait), unless the client has
        left by then."""
        assert self._connection is not None
        self.gone = self._connection.wait(nbytes, 0, then, late).leave

    def let_go(self) -> None:
        """Nobody needs its body any more, though it is not answered yet."""
        if self._connection is not None:
            self._connection.budget.release(self)

    def expanded(self, body: Buffer, more: int = 0) -> bool:
        """The body was compressed, and is this, or so many bytes ``more`` belong to it. False when there is no room for
        it."""
        if self._connection is None:
            return True
        if not self._connection.budget.take(len(body) + more):
            return False
        self.charged += len(body) + more
        self.body = body
        return True


def take_slot(slots: Slots, nbytes: int) -> Slot | None:
    """None while there is no room. Raises PenstockError when there never will be."""
    if nbytes > slots.arena.size:
        raise PenstockError(TOO_LARGE, too_large(nbytes, slots.arena.size))
    return slots.take(nbytes)


class Stream:
    """An answer that goes on: ``push`` as often as there is something to say, then ``finish``. Nothing is kept for a
    client that does not read: what is pushed while the last has not left is skipped, and the client has as long as for
    any other answer. Both do nothing once the client has left."""

    __slots__ = ("_chunked", "_connection", "_exchange", "_head")

    def __init__(self, connection: Connection, exchange: Exchange, content_type: bytes, extra: bytes) -> None:
        self._connection = connection
        self._exchange = exchange
        self._chunked = not exchange.head.http10  # which reads until the connection is closed
        coding = b"Transfer-Encoding: chunked\r\n" if self._chunked else b""
        self._head = b"%bContent-Type: %b\r\n%b%b\r\n" % (_STATUS_LINES[200], content_type, extra, coding)

    def push(self, data: bytes) -> bool:
        """Send a part that is not empty. False when it is skipped: the last one has not left, or an answer before this
        one on its connection has not."""
        if self._chunked:
            data = b"%x\r\n%b\r\n" % (len(data), data)
        return self._write(data)

    def start(self) -> bool:
        """Send the head alone, if it is this answer's turn; else it leaves with the first part."""
        return self._write(b"")

    def _write(self, data: bytes) -> bool:
        transport = self._connection.ready(self._exchange)
        if transport is None:
            return False
        if self._head:
            lines = self._exchange.head.lines
            data = _with_connection(_with_lines(self._head, lines), b"close") + data
            self._head = b""
        if data:
            transport.write(data)
        return True

    def finish(self) -> None:
        """The body is whole."""
        if not self._exchange.abandoned:
            self._connection.finished(self._exchange, self._head, b"0\r\n\r\n" if self._chunked else b"")


def _response(status: int, body: bytes, content_type: bytes, extra: bytes) -> bytes:
    if status == 204:  # which has neither (RFC 9110, 8.6)
        return b"%b%b\r\n" % (_STATUS_LINES[status], extra)
    kind = b"Content-Type: %b\r\n" % content_type if body else b""
    return b"%b%b%bContent-Length: %d\r\n\r\n%b" % (_STATUS_LINES[status], kind, extra, len(body), body)


def error_body(sentence: str) -> bytes:
    return orjson.dumps({"error": sentence})


class Connection(asyncio.BufferedProtocol):
    """``deadline``: when it is to be ended if nothing happens, in the loop's time; infinite while a request is
    answered."""

    __slots__ = (
        "_began",
        "_encrypts",
        "_exchanges",
        "_fileno",
        "_full",
        "_held",
        "_http",
        "_last",
        "_lingering",
        "_phase",
        "_reader",
        "_reading_paused",
        "_rest",
        "_stream",
        "_transport",
        "_unsent",
        "_wait",
        "_writing_paused",
        "deadline",
        "slots",
    )

    def __init__(self, http: Http) -> None:
        self.deadline = float("inf")
        self._http = http
        self.slots = http.slots
        self._reader = Reader(http.options, http.budget, http.heads, http.slots, Exchange)
        self._exchanges: deque[Exchange] = deque()  # in the order of their requests; the first is answered first
        self._unsent: list[Callable[[], None]] = []  # to be called when all that was written has left
        self._encrypts = False
        self._transport: asyncio.Transport | None = None
        self._last = False  # no further request is taken
        self._lingering = False  # all is said; what still comes is thrown away
        self._reading_paused = False
        self._full = False  # the transport takes no more at present
        self._writing_paused = False  # the client has to read before it is answered further
        self._rest: memoryview | None = None  # what is still to be written of a large answer, the first exchange's
        self._held: list[Exchange] = []  # that have come, and are not begun while the client reads no answers
        self._phase = IDLE  # the one that the deadline is for
        self._began = 0.0  # when the head came whose body is still to come, on the monotonic clock
        self._wait: BoundedWait | None = None  # for room for the body that has begun
        self._fileno = -1  # while hanging up is watched for, because nothing is read
        self._stream: Stream | None = None  # the answer that goes on

    def wait(self, nbytes: int, lead: int, then: Callable[[Slot], None], late: Callable[[str], None]) -> BoundedWait:
        http, slots = self._http, self.slots()
        assert slots is not None, "there is nothing to wait for"
        return BoundedWait(http.loop, slots, nbytes, lead, http.options.arena_wait_s, then, late)

    @property
    def budget(self) -> Budget:
        return self._http.budget

    # --- asyncio calls these ---

    @property
    def ends(self) -> tuple[tuple[str, int], tuple[str, int]] | None:
        if self._transport is None:
            return None
        near, far = self._transport.get_extra_info("sockname"), self._transport.get_extra_info("peername")
        return ((near[0], near[1]), (far[0], far[1])) if type(near) is tuple and type(far) is tuple else None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is one in all but name
        self._encrypts = transport.get_extra_info("sslcontext") is not None
        if not self._encrypts:
            # Whatever the kernel does not take at once pauses writing, and resumes it once it has: so it is known when.
            self._transport.set_write_buffer_limits(high=0)
        http = self._http
        self.deadline = http.idle_until
        http.connections.add(self)
        if len(http.connections) > http.options.connections_max:
            self._refuse(HttpError(503, f"{len(http.connections) - 1} connections are open; try again shortly"))
        elif is_spare(transport.get_extra_info("socket").fileno()):
            self._refuse(HttpError(503, "this gateway has no descriptors left for more connections; try again shortly"))

    def connection_lost(self, error: Exception | None) -> None:
        self._transport = None
        self._http.forget(self)
        self._no_stream()
        self._wait_no_longer()
        self._forget_hangup()
        self._reader.close()
        for exchange in self._held:
            self._http.budget.release(exchange)
        self._held.clear()
        for exchange in self._exchanges:
            self._drop(exchange)
            if exchange._response is None and exchange.gone is not None:
                exchange.gone()
            if exchange._sent is not None:
                self._unsent.append(exchange._sent)
        self._exchanges.clear()
        if self._unsent:
            self._all_sent()
            self._http.application.sent()

    def get_buffer(self, hint: int) -> memoryview:
        reader = self._reader
        if reader.direct is not None:
            return reader.direct
        return _SHARED_START if reader.expects_large and reader.phase is not BODY else _SHARED

    def buffer_updated(self, count: int) -> None:
        if self._lingering:
            return
        reader = self._reader
        if reader.direct is not None:
            reader.filled(count)
        else:
            reader.feed(_SHARED, count)
        if reader.requests:
            self._take_requests()
        if reader.error is not None:
            if not self._held:  # else behind the answers to these
                self._refuse(reader.error)
        elif reader.phase != self._phase or reader.wants_continue:
            self._enter(reader.phase)

    def eof_received(self) -> bool:
        """The client has closed its side. Whether it has left or would still read cannot be told, and nearly all have
        left: nobody computes for them."""
        return False

    def pause_writing(self) -> None:
        """The client does not read fast enough: read no more from it until it has."""
        assert self._transport is not None
        self._full = True
        if not self._writing_paused:
            self._hold(self._transport.get_write_buffer_size())

    def resume_writing(self) -> None:
        self._full = False
        if self._rest is None:
            self._go_on()
        else:
            self._write_more()

    def _hold(self, left: int) -> None:
        """Take nothing more from the client until it has read that many bytes."""
        options = self._http.options
        self._writing_paused = True
        self.deadline = self._http.loop.time() + options.write_timeout_s + left / options.body_bytes_per_s_min
        self._pause_reading()

    def _go_on(self) -> None:
        """The client has read what was written."""
        self._writing_paused = False
        if self._unsent:
            self._all_sent()
            self._http.application.sent()
        self._set_deadline()
        if self._held:
            self._take_requests()
            if self._reader.error is not None and not self._held:
                self._refuse(self._reader.error)
        self._resume_reading()

    # --- requests ---

    def _take_requests(self) -> None:
        http, reader = self._http, self._reader
        exchanges, reader.requests = reader.requests, []
        if self._held:
            exchanges, self._held = self._held + exchanges, []
        for exchange in exchanges:
            if self._last:
                http.budget.release(exchange)
            elif self._writing_paused:
                # One read may bring thousands, and each answer may be a thousand times as large.
                self._held.append(exchange)
            else:
                exchange._connection = self
                if self._began:
                    exchange.began, self._began = self._began, 0.0
                self._exchanges.append(exchange)
                if not exchange.head.keep_alive or http.draining:
                    self._last = True
                http.application.handle(exchange)
        self._phase = IDLE
        if self._exchanges:
            if not self._writing_paused:  # which has a deadline of its own
                self.deadline = float("inf")  # the answers have theirs
            if len(self._exchanges) >= http.options.pipelined_max:
                self._pause_reading()
                self._watch_hangup()
        elif not self._last and not self._writing_paused:
            self._set_deadline()

    def _enter(self, phase: str) -> None:
        """The reader has come to another part of a request."""
        if phase == FULL:
            self._pause_reading()
        if self._last:
            return  # it will not be answered
        if self._reader.wants_continue and phase != FULL and not self._exchanges and self._transport is not None:
            self._reader.wants_continue = False
            self._transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        if phase != self._phase:
            if phase != HEAD and self._phase in (IDLE, HEAD):
                self._began = time.monotonic()
            self._phase = phase
            if not self._writing_paused:  # which has a deadline of its own
                self._set_deadline()
            if phase == FULL:
                self._wait_for_room()

    def _wait_for_room(self) -> None:
        """For the body that has begun. It stays with its client meanwhile, who cannot be late."""
        self._watch_hangup()
        nbytes, lead = self._reader.wanted
        self._wait = self.wait(nbytes, lead, self._has_room, self._has_none)

    def _has_room(self, slot: Slot) -> None:
        self._wait_no_longer()
        self._reader.place(slot)
        self._enter(self._reader.phase)
        self._resume_reading()

    def _has_none(self, sentence: str) -> None:
        self._wait_no_longer()
        self._refuse(HttpError(503, sentence))

    def _wait_no_longer(self) -> None:
        if self._wait is not None:
            self._wait.leave()
            self._wait = None

    def _watch_hangup(self) -> None:
        """While nothing is read, though the client waits for what it has asked, or for room for it."""
        if self._fileno < 0 and self._transport is not None and not self._transport.is_closing():
            self._fileno = self._transport.get_extra_info("socket").fileno()
            self._http.hangups.watch(self._fileno, self.abort)

    def _forget_hangup(self) -> None:
        if self._fileno >= 0:
            self._http.hangups.forget(self._fileno, self.abort)
            self._fileno = -1

    def _set_deadline(self) -> None:
        http = self._http
        if self._phase == HEAD:
            self.deadline = http.loop.time() + http.options.head_timeout_s
        elif self._phase == BODY:
            seconds = http.options.body_timeout_s + self._reader.body_left / http.options.body_bytes_per_s_min
            self.deadline = http.loop.time() + seconds
        elif self._exchanges or self._phase == FULL:
            self.deadline = float("inf")
        else:
            self.deadline = http.idle_until

    def expire(self) -> None:
        """The deadline has passed."""
        assert self._transport is not None
        if self._writing_paused or self._lingering or self._transport.is_closing():
            if not self._lingering or self._writing_paused:  # else it has been refused, and that was counted
                self._http.cut_off += 1
            self._transport.abort()
        elif self._last or self._reading_paused:
            self.deadline = float("inf")  # it waits for its answers, and not for more from the client
        elif self._phase == HEAD:
            self._refuse(HttpError(408, f"the head did not come within {self._http.options.head_timeout_s:g} s"))
        elif self._phase == BODY:
            self._refuse(HttpError(408, "the body came too slowly"))
        else:
            self._close()

    def _refuse(self, error: HttpError) -> None:
        """Answer with an error, behind whatever is still to be answered, and end the connection."""
        self._reader.close()
        if self._transport is None or self._last:
            return  # what follows the last request is not even refused
        self._last = True
        self._phase = IDLE
        head = Head(b"", b"", {}, 0, False, False)  # it could not be read, or not all of what is behind it
        head.lines = self._http.application.refused(error.status, error.sentence, self._reader.headers)
        exchange = Exchange(head, b"", 0)
        exchange._connection = self
        self._exchanges.append(exchange)
        extra = b"Retry-After: 1\r\n" if error.status == 503 else b""
        exchange.answer_error(error.status, error.sentence, extra)

    # --- answers ---

    def answered(self) -> None:
        """Write what answers there are, in their order, up to one that is large."""
        transport = self._transport
        if transport is None or self._rest is not None:
            return
        exchanges, budget = self._exchanges, self._http.budget
        while exchanges and (response := exchanges[0]._response) is not None:
            first = exchanges[0]
            budget.release(first)
            head, tail = first.head, first._tail
            last = self._last and len(exchanges) == 1
            if head.lines:
                response = _with_lines(response, head.lines)
            if last or not head.usual:
                if head.method == b"HEAD":
                    response, tail = response[: response.index(b"\r\n\r\n") + 4], b""
                if last or head.http10:
                    response = _with_connection(response, b"close" if last else b"keep-alive")
            if len(tail) > PIECE_BYTES:
                self._rest = memoryview(tail)
                self._hold(len(tail))
                self._write_piece(transport, self._rest, response)
                return
            exchanges.popleft()
            first._connection = first.gone = None  # the second leads back to it: nothing is left to the collector
            if tail:
                # What is encrypted is copied anyway; nobody says when.
                transport.writelines((response, bytes(tail) if self._encrypts else tail))
            else:
                transport.write(response)
            if first._sent is not None:
                self._unsent.append(first._sent)
                if self._encrypts or not transport.get_write_buffer_size():
                    self._all_sent()
            if last:
                self._finish()
                return
        if self._reading_paused and len(exchanges) < self._http.options.pipelined_max:
            self._resume_reading()
        if not exchanges and not self._writing_paused:
            if self._phase is IDLE:
                self.deadline = self._http.idle_until  # what _set_deadline comes to, nearly always
            else:
                self._set_deadline()
            if self._reader.wants_continue:
                self._enter(self._reader.phase)

    def _write_piece(self, transport: asyncio.Transport, rest: memoryview, head: bytes = b"") -> None:
        piece, self._rest = rest[:PIECE_BYTES], rest[PIECE_BYTES:]
        transport.writelines((head, bytes(piece) if self._encrypts else piece))
        if not self._full:
            self._http.loop.call_soon(self._write_more)

    def _write_more(self) -> None:
        """What was written of a large answer has left."""
        transport, rest = self._transport, self._rest
        if transport is None or rest is None or transport.is_closing():
            return
        if rest:
            self._write_piece(transport, rest)
            return
        self._rest, self._writing_paused = None, False
        first = self._exchanges.popleft()
        first._connection = first.gone = None
        if first._sent is not None:
            first._sent()
            self._http.application.sent()
        if self._last and not self._exchanges:
            self._finish()
            return
        self.answered()
        if not self._writing_paused:  # by what was behind it
            self._go_on()

    # --- answers that go on ---

    def begin(self, exchange: Exchange, content_type: bytes, extra: bytes) -> Stream:
        """See ``Exchange.begin``."""
        http = self._http
        if http.draining:
            raise PenstockError(DRAINING, "this gateway is about to end", 1.0)
        if http.streams >= http.options.streams_max:
            raise PenstockError(OVERLOADED, f"{http.streams} answers go on (streams_max); try again shortly", 5.0)
        http.streams += 1
        self._last = True
        while (behind := self._exchanges[-1]) is not exchange:
            self._exchanges.pop()
            self._drop(behind)
            if behind._response is None and behind.gone is not None:
                behind.gone()
            if behind._sent is not None:
                behind._sent()
        exchange.status = 200
        self._http.budget.release(exchange)
        self._stream = Stream(self, exchange, content_type, extra)
        self._stream.start()
        return self._stream

    def ready(self, exchange: Exchange) -> asyncio.Transport | None:
        """Where to write more of an answer that goes on: None while it is not its turn or something has not left."""
        transport = self._transport
        if transport is None or not self._exchanges or self._exchanges[0] is not exchange or transport.is_closing():
            return None
        return None if transport.get_write_buffer_size() else transport

    def finished(self, exchange: Exchange, head: bytes, end: bytes) -> None:
        """An answer that went on is whole but for ``end``, and for its head when it was not yet its turn."""
        self._no_stream()
        if head:
            exchange.send(200, head + end)
            return
        assert self._transport is not None
        self._exchanges.clear()
        self._drop(exchange)
        self._transport.write(end)
        self._finish()

    def _no_stream(self) -> None:
        if self._stream is not None:
            self._stream = None
            self._http.streams -= 1

    def _all_sent(self) -> None:
        """All that was written has left, or never will."""
        unsent, self._unsent = self._unsent, []
        for sent in unsent:
            sent()

    def _drop(self, exchange: Exchange) -> None:
        """The exchange has nothing to do with this connection any more."""
        self._http.budget.release(exchange)
        exchange._connection = None

    def _finish(self) -> None:
        """Everything is said. Closing at once would reset the connection under a client that is still sending, and
        with it the answer that says why (RFC 9112, 9.6)."""
        assert self._transport is not None
        self._wait_no_longer()
        self._forget_hangup()
        if self._reader.phase == IDLE or not self._transport.can_write_eof():
            self._close()
            return
        self._lingering = True
        self._transport.write_eof()
        if not self._writing_paused:  # which has a deadline of its own
            self.deadline = self._http.loop.time() + self._http.options.linger_s
        self._resume_reading()

    def _close(self) -> None:
        """Close once everything is written, or when that takes too long."""
        assert self._transport is not None
        self._transport.close()
        if not self._writing_paused:
            self.deadline = self._http.loop.time() + self._http.options.write_timeout_s

    def _pause_reading(self) -> None:
        if not self._reading_paused and self._transport is not None and not self._transport.is_closing():
            self._reading_paused = True
            self._transport.pause_reading()

    def _resume_reading(self) -> None:
        ready = self._lingering or (
            not self._writing_paused
            and not self._held
            and len(self._exchanges) < self._http.options.pipelined_max
            and self._reader.phase != FULL
        )
        if ready and self._reading_paused and self._transport is not None and not self._transport.is_closing():
            self._reading_paused = False
            self._forget_hangup()
            self._transport.resume_reading()

    def abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    @property
    def unanswered(self) -> int:
        """Requests that have come."""
        return len(self._exchanges) + len(self._held)

    def close_if_idle(self) -> None:
        """End it unless a request is under way, or has begun to come."""
        if not self.unanswered and self._phase == IDLE and not self._lingering and self._transport is not None:
            self._last = True
            self._close()

    def drain(self) -> None:
        """The gateway is about to end: answer what has come, and close when there is nothing to answer any more. What
        goes on ends now."""
        if self._exchanges and not self._held:
            self._last = True
        if self._stream is not None:
            exchange = self._stream._exchange
            self._stream.finish()
            if exchange.gone is not None:
                exchange.gone()


def _with_connection(response: bytes, value: bytes) -> bytes:
    """A response that says what becomes of its connection."""
    return _with_lines(response, b"Connection: %b\r\n" % value)


def _with_lines(response: bytes, lines: bytes) -> bytes:
    """A response with more headers."""
    status, _, rest = response.partition(b"\r\n")
    return b"%b\r\n%b%b" % (status, lines, rest)


class Http:
    """What all connections of a gateway share. ``draining``: connections close after their answer."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        options: GatewayOptions,
        application: Application,
        slots: Callable[[], Slots | None] = lambda: None,
    ) -> None:
        """``slots``: where workers read tensors at present, if anywhere. ``look``, to be replaced: called with each
        look for connections that are late."""
        self.look: Callable[[], None] = lambda: None
        self.slots = slots
        self.loop = loop
        self.options = options
        self.application = application
        self.budget = Budget(options.bodies_bytes_max)
        self.heads: dict[bytes, Head] = {}
        self.connections: set[Connection] = set()
        self.streams = 0  # answers that go on
        self.cut_off = 0  # connections whose clients did not read their answers
        self.idle_until = loop.time() + options.keep_alive_s  # for who asks nothing from now on; moved on by ``watch``
        self.hangups = Hangups(loop)
        self.draining = False
        self.drained = asyncio.Event()  # draining, and no connection is left
        self._watching: asyncio.TimerHandle | None = None

    def connection(self) -> Connection:
        """For create_server."""
        return Connection(self)

    def watch(self, every_s: float = _WATCH_S) -> None:
        """End what is late, from now on and until ``stop``. All connections share one timer: one each would cost more
        than parsing a request does, and here a deadline is an attribute, set as often as one likes. The price is that
        it is kept only to within ``every_s`` seconds, that of an idle connection to twice as many."""
        now = self.loop.time()
        self.idle_until = now + self.options.keep_alive_s + every_s
        for connection in [connection for connection in self.connections if connection.deadline <= now]:
            connection.expire()
        self.look()
        self._watching = self.loop.call_later(every_s, self.watch, every_s)

    def drain(self) -> None:
        """Close connections as soon as they have nothing under way; idle ones may still bring one request."""
        self.draining = True
        for connection in list(self.connections):
            connection.drain()
        self._note_drained()

    def close_idle(self) -> None:
        """They have had the time to bring one."""
        for connection in list(self.connections):
            connection.close_if_idle()

    @property
    def unanswered(self) -> int:
        """Requests on all connections."""
        return sum(connection.unanswered for connection in self.connections)

    def forget(self, connection: Connection) -> None:
        """A connection has ended."""
        self.connections.discard(connection)
        self._note_drained()

    def _note_drained(self) -> None:
        if self.draining and not self.connections:
            self.drained.set()

    def stop(self) -> None:
        if self._watching is not None:
            self._watching.cancel()
        for connection in list(self.connections):
            connection.abort()
        self.hangups.close()
