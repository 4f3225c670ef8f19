"""Large JSON, of requests and of answers, beside the loop: read and written by clerks, copied by threads.

What is smaller is done on the loop, since a clerk costs half a millisecond more. Otherwise nothing differs: the same
functions read and write, and errors, hang-ups, deadlines and room in shared memory are those of every request.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from penstock.client.events import Complete
from penstock.gateway.changes import Changes, Style
from penstock.gateway.clerk import Sheet
from penstock.gateway.clerks import Clerks
from penstock.gateway.compression import compress
from penstock.gateway.connection import Exchange, take_slot
from penstock.gateway.inference import Query, Reading, Write, render_body
from penstock.gateway.parse import Parse, Read
from penstock.gateway.regions import Unread
from penstock.wire.errors import INTERNAL, OVERLOADED, BadMessage, PenstockError
from penstock.wire.messages import Payload
from penstock.wire.models import ModelSpec
from penstock.wire.slots import PLACED_MIN_BYTES, Slot
from penstock.wire.tensors import Buffer

if TYPE_CHECKING:
    from penstock.gateway.application import Application
    from penstock.gateway.target import Target

# On the loop these take some 5 ms, on 2 cores of a Xeon: JSON takes 15 ns a byte to read, and 15 ns a byte of float32
# to write.
LARGE_BODY_BYTES: Final = 384 * 1024
LARGE_ANSWER_BYTES: Final = 256 * 1024
LARGE_CLASSES: Final = 8192


def read(function: Read, spec: ModelSpec, body: Buffer) -> tuple[Reading, list[Payload]]:
    """In a clerk: what a body says, and its tensors. Raises PenstockError."""
    reading, payload = function(spec, body)
    return reading, [payload]


def write(
    function: Write | None,
    change: Changes | None,
    body: bytes,
    style: Style,
    identifier: str,
    parameters: bytes,
    encoding: str,
    payload: Buffer,
) -> tuple[tuple[int, int], list[Buffer]]:
    """In a clerk: the body of an answer, and of how many bytes of JSON and of binary outputs it was made, before it was
    compressed, if it is to have an ``encoding``. Raises PenstockError."""
    binary = b""
    try:
        if change is not None:
            body, payload, style = change.apply(body, payload, style)
        if function is not None:
            json = function(body, payload)
        else:
            json, binary = render_body(body, payload, style, identifier, parameters)
    except BadMessage as error:
        raise PenstockError(INTERNAL, str(error)) from None
    sizes = len(json), len(binary)
    return sizes, [compress(json + binary, encoding)] if encoding else [json, binary]


def _move(sheet: Sheet | Unread, view: memoryview) -> None:
    """Copy what it holds, and give up its memory."""
    with contextlib.closing(sheet):
        sheet.read_into(view)


class LargeJson:
    """What an application does otherwise when there is much of it."""

    def __init__(self, application: Application, clerks: Clerks) -> None:
        self._application = application
        self._clerks = clerks
        self.on: Final = application.options.json_processes_max > 0

    def takes(self, target: Target, body: Buffer) -> bool:
        """Whether it is the JSON of a body that is large."""
        return self.on and (target.header_length is None or LARGE_BODY_BYTES <= target.header_length <= len(body))

    def writes(self, query: Query, answer: Complete) -> bool:
        """Whether it is much that an answer holds beside what tells its shapes and binary outputs."""
        if not self.on:
            return False
        nbytes, change = len(answer.payload), query.change
        if change is not None:
            return change.classes_max(query.form.rows, nbytes) >= LARGE_CLASSES
        return nbytes >= LARGE_ANSWER_BYTES and not (query.write is None and query.style.all_binary)

    # --- requests ---

    def read(self, exchange: Exchange, target: Target, parse: Parse, body: Buffer) -> None:
        """Raises PenstockError."""
        spec = parse.find(target)

        def start(reading: Reading, sheet: Sheet) -> None:
            query = parse.query(target, spec, reading, sheet.nbytes)
            self._start(exchange, target, query, sheet)

        errand = self._clerks.run(
            read,
            (parse.reader(target), spec),
            body,
            partial(self._guarded, exchange, target, start),
            partial(self._fail, exchange, target),
        )
        exchange.gone = errand.leave

    def check(
        self,
        exchange: Exchange,
        target: Target,
        parse: Parse,
        body: Buffer,
        then: Callable[[Callable[[], Query]], None],
    ) -> None:
        """Look whether a body is a request, and ask nothing. ``then`` is called with what gives it, or raises
        PenstockError; its defects answer the exchange, as do those that a clerk finds. Raises PenstockError."""
        if len(body) < LARGE_BODY_BYTES or not self.takes(target, body):
            then(lambda: parse(target, body)[0])
            return
        spec = parse.find(target)

        def checked(done: tuple[Reading, Sheet]) -> None:
            reading, sheet = done
            then(lambda: parse.query(target, spec, reading, sheet.nbytes))

        errand = self._clerks.run(
            read,
            (parse.reader(target), spec),
            body,
            lambda reading, sheet: self._application.later(exchange, checked, (reading, sheet)),
            partial(self._fail, exchange, target),
        )
        exchange.gone = errand.leave

    def start(self, exchange: Exchange, target: Target, query: Query, unread: Unread) -> None:
        """Ask with tensors that a thread reads out of clients' memory. Raises PenstockError."""
        if not exchange.expanded(b"", unread.nbytes):
            raise PenstockError(OVERLOADED, "too many bytes of tensors are under way; try again shortly", 1.0)
        self._start(exchange, target, query, unread)

    def _start(self, exchange: Exchange, target: Target, query: Query, sheet: Sheet | Unread) -> None:
        application = self._application
        inference = application.inference(application, exchange, query)
        exchange.body = b""
        if exchange.slot is not None:  # the body lay there, for its binary tensors
            exchange.slot.give_back()
            exchange.slot = None
        slots = exchange.slots
        if slots is None or sheet.nbytes < PLACED_MIN_BYTES:
            payload = sheet.view()
            inference.start(bytes(payload) if slots is not None else payload)
            application.flush()
            return

        def copied(slot: Slot, done: asyncio.Future[None]) -> None:
            if exchange.abandoned or done.exception() is not None:
                slot.give_back()
            if exchange.abandoned:
                return
            if isinstance(error := done.exception(), PenstockError):
                raise error
            if error is not None:
                raise PenstockError(OVERLOADED, "the tensors of a large JSON could not be copied", 1.0)
            exchange.slot = slot
            inference.start(slot)
            application.flush()

        def copy(slot: Slot) -> None:
            exchange.gone = None  # the slot is given back when the copy is there
            copying = asyncio.get_running_loop().run_in_executor(None, _move, sheet, slot.view)
            copying.add_done_callback(partial(self._guarded, exchange, target, copied, slot))

        slot = take_slot(slots, sheet.nbytes)
        if slot is not None:
            copy(slot)
        else:
            exchange.wait(
                sheet.nbytes,
                partial(self._guarded, exchange, target, copy),
                lambda sentence: self._fail(exchange, target, PenstockError(OVERLOADED, sentence, 1.0)),
            )

    def _guarded(self, exchange: Exchange, target: Target, do: Callable[..., None], *arguments: Any) -> None:
        """Go on with a request: what it cannot be, and defects, are its answer."""

        def counted(arguments: tuple[Any, ...]) -> None:
            try:
                do(*arguments)
            except PenstockError as error:
                self._application.count_failure(target, error.code)
                raise

        self._application.later(exchange, counted, arguments)

    def _fail(self, exchange: Exchange, target: Target, error: PenstockError) -> None:
        self._application.count_failure(target, error.code)
        self._application.fail(exchange, error)

    # --- answers ---

    def write(self, exchange: Exchange, query: Query, answer: Complete, begin: bytes, parameters: bytes) -> None:
        """``begin``, ``parameters``: as for ``render``."""
        application = self._application
        encoding = exchange.head.target.accepts
        binary = query.write is None and query.style.binary

        def release() -> None:
            if answer.held:
                application.release(answer.held)
                application.flush()

        def fail(error: PenstockError) -> None:
            application.fail(exchange, error, query.id)

        def send(done: tuple[tuple[int, int], Sheet]) -> None:
            (json_bytes, binary_bytes), sheet = done
            body = sheet.view()
            sheet.close()
            application.count(200)
            exchange.send(200, _head(json_bytes, binary_bytes, len(body), binary, encoding, begin), body)

        errand = self._clerks.run(
            write,
            (query.write, query.change, answer.body, query.style, query.id, parameters, encoding),
            answer.payload,
            lambda sizes, sheet: application.later(exchange, send, (sizes, sheet)),
            fail,
            release,
        )
        exchange.gone = errand.leave


def _head(json_bytes: int, binary_bytes: int, sent_bytes: int, binary: bool, encoding: str, begin: bytes) -> bytes:
    """Of an answer with so many bytes of JSON and of binary tensors, which are ``sent_bytes`` in their encoding.
    ``begin``: its first lines."""
    kind, lines = b"application/json", b""
    if binary or binary_bytes:
        kind, lines = b"application/octet-stream", b"Inference-Header-Content-Length: %d\r\n" % json_bytes
    if encoding:
        lines += b"Content-Encoding: %b\r\nVary: Accept-Encoding\r\n" % encoding.encode()
    return b"%bContent-Type: %b\r\n%bContent-Length: %d\r\n\r\n" % (begin, kind, lines, sent_bytes)
