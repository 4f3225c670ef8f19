"""The routes and their handlers: the Open Inference Protocol v2, /metrics, and the dashboard.

A handler answers its exchange, at once or from a callback. Errors are PenstockError, turned into statuses here and
nowhere else.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib.metadata import version
from typing import TYPE_CHECKING, Final, TypeVar

import orjson

from penstock.client.caller import Caller
from penstock.client.events import Complete
from penstock.gateway import abouts
from penstock.gateway.aside import Aside
from penstock.gateway.changes import Style
from penstock.gateway.clerks import Clerks
from penstock.gateway.compression import ENCODINGS, compress, decompress, decompress_small
from penstock.gateway.connection import Exchange
from penstock.gateway.cors import Cors
from penstock.gateway.feed import FEED_HEAD, Feed
from penstock.gateway.inference import KNOWN_BYTES_MAX, OK, Query, render, render_body, wrap
from penstock.gateway.large import LARGE_ANSWER_BYTES, LARGE_BODY_BYTES, LargeJson
from penstock.gateway.options import GatewayOptions
from penstock.gateway.page import load_page
from penstock.gateway.parse import Parse, ParseV2
from penstock.gateway.reader import Head, Known
from penstock.gateway.regions import Unread
from penstock.gateway.reports import Reports, form_for
from penstock.gateway.requestid import read_request_id, request_id_line
from penstock.gateway.routes import Route, RouteError, Routes
from penstock.gateway.statuses import STATUSES
from penstock.gateway.steady import Steady
from penstock.gateway.target import Defer, Handler, Target
from penstock.gateway.timing import ServerTiming, Stencil, explanation, total_line
from penstock.gateway.tracing import Tracing
from penstock.gateway.underway import Inference, TracedInference
from penstock.wire import errors, process
from penstock.wire.errors import OVERLOADED, BadMessage, PenstockError
from penstock.wire.messages import Payload
from penstock.wire.metrics import Meters, Value
from penstock.wire.models import SERVED, ModelSpec, ModelState, place
from penstock.wire.process import fields
from penstock.wire.slots import PLACED_MIN_BYTES, Slot
from penstock.wire.tensors import Buffer

if TYPE_CHECKING:
    from penstock.gateway.caching import ResponseCache

log = logging.getLogger("penstock.gateway")

# Of these routes; other files bring theirs.
_EXTENSIONS: Final = ("classification", "sequence", "binary_tensor_data", "parameters", "schedule_policy")
_FAILED: Final = "request failed"
_REFUSALS: Final = (503, 504)  # whose time is counted: what the server cannot do, or not in time
_REASONS_MAX: Final = 3  # why models are not ready, in one answer
_ACCEPT_ENCODING: Final = f"Accept-Encoding: {', '.join(ENCODINGS)}\r\n".encode()
_JOIN_MAX_BYTES: Final = 64 * 1024  # a larger payload is written behind the head instead of being copied
_ASIDE_MIN_BYTES: Final = 128 * 1024  # what is larger is compressed and expanded on a thread
_EXPANDING_MAX: Final = 2  # bodies at a time: each takes a processor's time, and up to body_bytes_max of memory

T = TypeVar("T")


class Application:
    """Answers a gateway's requests. ``flush`` is called once after requests have been submitted."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        caller: Caller,
        options: GatewayOptions,
        reports: Reports,
        flush: Callable[[], None],
        tracing: Tracing | None = None,
        steady: Steady | None = None,
        meters: Meters | None = None,
    ) -> None:
        """``meters``: where what is answered over HTTP is counted, the caller's where there are none."""
        self.inference: Callable[[Application, Exchange, Query], Inference] = (
            Inference if tracing is None else partial(TracedInference, tracing)
        )
        self.is_traced = tracing is not None
        self.cache: ResponseCache | None = None  # of models that have one
        self._steady = steady or Steady()
        self._loop = loop
        self.caller = caller
        self.options = options
        self._reports = reports
        self.flush = flush
        self._expanding = Aside(loop, _EXPANDING_MAX, options.expand_wait_s)
        self._feed = Feed(loop, reports, lambda: caller.name, self._states)
        self._page = load_page()
        self._cors = Cors(options.cors_origins)
        self.parse = ParseV2(self.find)
        self.clerks = Clerks(loop, options)
        self.large = LargeJson(self, self.clerks)
        self.deferral: Callable[[Head], Defer | None] = lambda head: None  # to be replaced, see jobs.py
        self._timing = ServerTiming()
        self._stencil: Stencil | None = None  # of the last answer that had one
        self._meters = caller.meters if meters is None else meters
        self._answered = self._meters.value("penstock_http_responses", "200")
        self._responses: dict[int, Value] = {200: self._answered}
        self.seconds = self._meters.histogram("penstock_http_request_seconds")
        self._refusals = self._meters.histogram("penstock_http_refusal_seconds")
        self._extensions = list(_EXTENSIONS)
        self.version = version("penstock")
        self._server = {"name": "penstock", "version": self.version, "extensions": self._extensions}
        routes: list[Route[Handler]] = [
            Route("GET", "/v2", self._metadata, about=abouts.METADATA),
            Route("GET", "/v2/health/live", self._live, about=abouts.LIVE),
            Route("GET", "/v2/health/ready", self._ready, about=abouts.READY),
            Route("GET", "/metrics", self._metrics, about=abouts.METRICS),
            Route("GET", "/", self._dashboard, about=abouts.DASHBOARD),
            Route("GET", "/events", self._events, about=abouts.EVENTS),
        ]
        for model in ("/v2/models/{model}", "/v2/models/{model}/versions/{version}"):
            routes += [
                Route("GET", model, self._model_metadata, about=abouts.MODEL),
                Route("GET", model + "/ready", self._model_ready, about=abouts.MODEL_READY),
                Route("POST", model + "/infer", self.infer, about=abouts.INFER),
            ]
        self._routes: Routes[Handler] = Routes(routes)

    def add(self, routes: Sequence[Route[Handler]], *extensions: str) -> None:
        """Answer these as well. ``extensions``: what of Triton's they are."""
        self._routes.add(routes)
        self._extensions += extensions

    @property
    def table(self) -> Sequence[Route[Handler]]:
        """What is answered here."""
        return self._routes.table

    def handle(self, exchange: Exchange) -> None:
        """Answer a request, now or later."""
        head = exchange.head
        try:
            target = head.target
            if target is None:
                head.lines = self.lines(head.headers)
                handler, arguments = self._find_handler(head)
                target = Target(handler, arguments, head.headers)
                target.defer = self.deferral(head)
                head.target = target
            if exchange.known is None:
                target.handler(exchange, target)
            else:
                self._infer_again(exchange, target, exchange.known)
        except PenstockError as error:
            self.fail(exchange, error)
        except RouteError as error:
            self._refuse(exchange, error)
        except Exception:
            log.exception("request handler failed", extra=fields(url=repr(head.url)))
            self.crashed(exchange)

    def lines(self, headers: Mapping[str, bytes]) -> bytes:
        """What every answer to a request with these headers has among its own."""
        return request_id_line(headers) + self._cors.lines(headers)

    def _refuse(self, exchange: Exchange, error: RouteError) -> None:
        self.count(error.status)
        exchange.answer_error(error.status, error.sentence, _allow(error.allow) if error.allow else b"")

    def _find_handler(self, head: Head) -> tuple[Handler, dict[str, str]]:
        return (self._options, {}) if head.method == b"OPTIONS" else self._routes.find(head.method, head.url)

    def _options(self, exchange: Exchange, target: Target) -> None:
        url = exchange.head.url
        allowed = self._routes.methods() if url == b"*" else self._routes.allowed(url)  # RFC 9110, 9.3.7
        self.count(204)
        exchange.answer(204, extra=_allow(allowed) + self._cors.preflight(exchange.head.headers, allowed))

    def crashed(self, exchange: Exchange) -> None:
        """A defect of ours must end one request, not the connections of everybody else."""
        self.count(500)
        total = total_line(time.monotonic() - exchange.arrived)
        exchange.answer_error(500, "an internal error; it is in the gateway's log", total)

    def refused(self, status: int, sentence: str, headers: Mapping[str, bytes]) -> bytes:
        """A connection was answered without a request, of which these headers had been read."""
        self.count(status)
        given = read_request_id(headers)
        about = {"x_request_id": given} if given else {}
        log.info("connection refused", extra=fields(status=status, reason=sentence, **about))
        return self.lines(headers)

    def sent(self) -> None:
        """Results that had to wait for their clients may be acknowledged."""
        self.flush()

    def fail(self, exchange: Exchange, error: PenstockError, identifier: str = "", number: int = 0) -> None:
        """Answer with an error. ``identifier``: the request's own id, ``number``: the broker's for it."""
        status = STATUSES[error.code]
        level = logging.WARNING if status >= 500 else logging.INFO
        if log.isEnabledFor(level) and not process.holds_back(log.name, _FAILED, level, error.code):
            given = read_request_id(exchange.head.headers)
            log.log(
                level,
                _FAILED,
                extra=fields(
                    request_id=self.name(identifier, number),
                    url=exchange.head.url.decode("latin-1"),
                    status=status,
                    code=error.code,
                    reason=error.message,
                    **({"x_request_id": given} if given else {}),
                ),
            )
        seconds = time.monotonic() - exchange.arrived
        if status in _REFUSALS:
            self._refusals.observe(seconds)
        extra = total_line(seconds)
        if status == 503:
            extra += b"Retry-After: %d\r\n" % max(1, math.ceil(error.retry_after_s))
        elif status == 501:
            extra += _ACCEPT_ENCODING
        sentence = f"[request id: {identifier}] {error.message}" if identifier else error.message
        self.count(status)
        exchange.answer_error(status, sentence, extra)

    def name(self, identifier: str, number: int) -> str:
        """By which the log and the metrics name a request. ``identifier``: its own id, ``number``: the broker's for
        it."""
        return identifier or (f"{self.caller.identity.id.hex()}:{number}" if number else "")

    def repeat(self, exchange: Exchange, response: bytes, seconds: float) -> None:
        """Answer an inference request, after some time, with what others were answered."""
        if self.seconds.observe_one(seconds):
            self.seconds.exemplify(seconds, self.name("", 0))
        self._answered.value += 1
        exchange.send(200, response)

    def count(self, status: int) -> None:
        counter = self._responses.get(status)
        if counter is None:
            counter = self._responses[status] = self._meters.value("penstock_http_responses", str(status))
        counter.value += 1

    def answer_json(self, exchange: Exchange, value: object) -> None:
        self.count(200)
        exchange.answer(200, orjson.dumps(value))

    # --- the server and its models ---

    def _metadata(self, exchange: Exchange, target: Target) -> None:
        self.answer_json(exchange, self._server)

    def _live(self, exchange: Exchange, target: Target) -> None:
        self.count(200)
        exchange.answer(200)

    def _ready(self, exchange: Exchange, target: Target) -> None:
        caller = self.caller
        ready, unsteady = caller.is_ready(), self._steady.reason(time.monotonic())
        if ready and not unsteady:
            self.count(200)
            exchange.answer(200)
            return
        if ready:
            reason = unsteady
        elif not caller.membership.joined:
            reason = "no broker answers"
        else:
            waits = caller.unserved()
            named = ", ".join(f"{state.name} ({state.state})" for state in waits[:10])
            reason = f"not ready: {named}" if waits else "no worker has joined"
            # Often one for all, such as a GPU that is lost.
            why = list(dict.fromkeys(state.reason for state in waits if state.reason))
            reason += f"; because {'; '.join(why[:_REASONS_MAX])}" if why else ""
        self.count(503)
        exchange.answer_error(503, f"Server not ready: {reason}", b"Retry-After: 1\r\n")

    def _states(self) -> list[ModelState]:
        return [state for versions in (self.caller.models or {}).values() for state in versions.values()]

    def find(self, target: Target) -> ModelSpec:
        return self.caller.find(target.model, target.version, target.sticky)

    def _state(self, target: Target) -> ModelState | None:
        """Of the version that is asked for; where none is, of the one that is current, wherever traffic goes."""
        return self.caller.state(target.model, target.version)

    def current(self, target: Target) -> ModelSpec:
        """The version that is asked for; where none is, the one that is current. Raises PenstockError."""
        state = self._state(target)
        return self.caller.find(target.model, target.version if state is None else state.version)

    def _model_metadata(self, exchange: Exchange, target: Target) -> None:
        spec = self.current(target)
        known = (self.caller.models or {}).get(spec.name, {}).values()
        served = [state.version for state in sorted(known, key=place) if state.state in SERVED]
        self.answer_json(
            exchange,
            {
                "name": spec.name,
                "versions": [spec.version] if target.version else served,
                "platform": spec.platform,
                "inputs": [each._asdict() for each in spec.inputs],
                "outputs": [each._asdict() for each in spec.outputs],
            },
        )

    def _model_ready(self, exchange: Exchange, target: Target) -> None:
        state = self._state(target)
        if self.caller.membership.joined and state is not None and state.state in SERVED:
            self.count(200)
            exchange.answer(200)
        else:
            self.count(400)
            exchange.answer_error(400, "Model version not ready")

    # --- inference ---

    def infer(self, exchange: Exchange, target: Target, parse: Parse | None = None) -> None:
        """Answer an inference request in any protocol. ``parse``: its own; else it is that of v2."""
        parse = parse or self.parse
        if target.defer is not None:
            target.defer(exchange, target, parse)
            return
        if target.encoding:
            self.expand(exchange, target, partial(self._submit, parse))
        else:
            self._submit(parse, exchange, target, exchange.body)

    def read_body(self, exchange: Exchange, target: Target, then: Callable[[Exchange, Target, Buffer], None]) -> None:
        """Do something with a body, compressed or not."""
        if target.encoding:
            self.expand(exchange, target, then)
        else:
            then(exchange, target, exchange.body)

    def expand(self, exchange: Exchange, target: Target, then: Callable[[Exchange, Target, Buffer], None]) -> None:
        """Do something with a body as it was before it was compressed."""
        body = exchange.body
        bytes_max = self.options.body_bytes_max

        def expanded(whole: Buffer) -> None:
            if not exchange.expanded(whole):
                raise PenstockError(OVERLOADED, "too many bytes of request bodies are under way; try again shortly")
            then(exchange, target, whole)

        if len(body) <= _ASIDE_MIN_BYTES:
            whole = decompress_small(body, target.encoding, bytes_max)
            if whole is not None:
                expanded(whole)
                return
        exchange.gone = self._expanding.run(
            lambda work: decompress(body, target.encoding, bytes_max, lambda: work.wanted),
            partial(self.later, exchange, lambda done: expanded(done.result())),
        ).leave

    def _submit(self, parse: Parse, exchange: Exchange, target: Target, body: Buffer) -> None:
        if target.repeats and self.cache is not None and self.cache.repeat(exchange, target, body):
            return
        try:
            if len(body) >= LARGE_BODY_BYTES and self.large.takes(target, body):
                self.large.read(exchange, target, parse, body)
                return
            query, payload = parse(target, body)
            placed = query.form.nbytes >= PLACED_MIN_BYTES
            if placed and type(payload) is Unread:  # it is not here for the cache
                self.large.start(exchange, target, query, payload)
                return
            if query.spec.build and self.cache is not None and self.cache.take(exchange, target, query, payload, body):
                return
            if query.reusable and parse is self.parse and exchange.head.comes_at_once:
                self._remember(exchange.head, query, body)
            there = exchange.place(payload) if placed else payload
            if there is None:
                self._wait_for_room(exchange, target, query, payload)
                return
        except PenstockError as error:
            self.count_failure(target, error.code)
            raise
        self._ask(exchange, target, query, there)

    def _remember(self, head: Head, query: Query, body: Buffer) -> None:
        """The JSON of a request comes again, with the same head and other tensors: then it need not even be looked up.
        Unless each request may mean another version, or be one that has been answered before."""
        target: Target = head.target
        header_length = target.header_length or 0
        if target.encoding or not 0 < header_length <= KNOWN_BYTES_MAX or query.spec.name in self.caller.splits:
            return
        if query.spec.build and self.cache is not None:
            return
        head.known = Known(bytes(body[:header_length]), (query, self.caller.told))

    def _infer_again(self, exchange: Exchange, target: Target, known: Known) -> None:
        """Answer a request whose JSON has come before: see ``_remember``."""
        query, told = known.meaning
        if told == self.caller.told:
            self._ask(exchange, target, query, exchange.body if exchange.slot is None else exchange.slot)
        else:
            exchange.restore()
            target.handler(exchange, target)

    def _ask(self, exchange: Exchange, target: Target, query: Query, payload: Payload) -> None:
        try:
            self.inference(self, exchange, query).start(payload)
        except PenstockError as error:
            self.count_failure(target, error.code)
            raise
        self.flush()

    def _wait_for_room(self, exchange: Exchange, target: Target, query: Query, payload: Buffer) -> None:
        """Ask once the tensors lie where workers read them."""

        def start(slot: Slot) -> None:
            self._ask(exchange, target, query, exchange.put(payload, slot))

        def fail(sentence: str) -> None:
            self.count_failure(target, OVERLOADED)
            raise PenstockError(OVERLOADED, sentence, 1.0)

        exchange.wait(len(payload), partial(self.later, exchange, start), partial(self.later, exchange, fail))

    def finish(
        self, exchange: Exchange, query: Query, answer: Complete, asked: float, total_s: float, lines: bytes = b""
    ) -> None:
        """Answer an inference request with its result, which was back ``total_s`` seconds after all of it had come.
        ``asked``: when it was on its way to the broker, in seconds of the monotonic clock. ``lines``: more header
        lines."""
        target: Target = exchange.head.target
        like, payload = self._stencil, answer.payload
        if (
            like is not None
            and answer.body is like.body
            and answer.batch is like.batch
            and answer.queue_us == like.queue_us
            and query is like.query
            and target is like.target
            and len(payload) == like.nbytes
            and not lines
        ):
            self._answered.value += 1
            exchange.send(200, b"%b%.3f%b%b" % (like.before, total_s * 1e3, like.after, payload))
            return
        begin, parameters = self._timing.begin(answer.batch, answer.queue_us, total_s), b""
        if lines:
            begin += lines
        if query.explain or target.explain:
            worker, arrived = self.caller.worker_name(answer.worker), exchange.arrived
            parameters = explanation(answer, worker, arrived - exchange.began, asked - arrived, total_s)
        if (query.change is not None or len(payload) >= LARGE_ANSWER_BYTES) and self.large.writes(query, answer):
            self.large.write(exchange, query, answer, begin, parameters)
            return
        if query.change is not None:
            self._change(exchange, query, answer, begin, parameters)
            return
        encoding, write = target.accepts, query.write
        try:
            if encoding:
                if write is not None:
                    json, binary = write(answer.body, payload), b""
                else:
                    json, binary = render_body(answer.body, payload, query.style, query.id, parameters)
                self._send_compressed(exchange, json, binary, encoding, begin)
            elif write is not None:
                self._send(exchange, wrap(write(answer.body, payload), 0, begin, False), b"")
            else:
                head, tail = render(answer.body, payload, query.style, query.id, begin, parameters)
                if tail is payload:
                    if answer.held:
                        self.count(200)
                        exchange.send(200, head, tail, partial(self.release, answer.held))
                        return
                    if len(tail) <= _JOIN_MAX_BYTES and not (lines or parameters or query.id):
                        self._stencil = Stencil(answer, query, target, head)
                self._send(exchange, head, tail)
        except (BadMessage, PenstockError) as error:
            code = error.code if isinstance(error, PenstockError) else errors.INTERNAL
            self.fail(exchange, PenstockError(code, str(error)), query.id)
        if answer.held:  # what is sent of it has been copied
            self.release(answer.held)

    def _change(self, exchange: Exchange, query: Query, answer: Complete, begin: bytes, parameters: bytes) -> None:
        """Answer with a result that is not to be said as it is. A large one is changed on a thread."""
        assert query.change is not None
        work = partial(query.change.apply, answer.body, answer.payload, query.style)

        def changed(done: asyncio.Future[tuple[bytes, Payload, Style]]) -> None:
            if answer.held:  # what has come of it is another's memory
                self.release(answer.held)
            if exchange.abandoned:
                done.exception()
            else:
                self.later(exchange, say, done)

        def say(done: asyncio.Future[tuple[bytes, Payload, Style]]) -> None:
            try:
                body, payload, style = done.result()
                encoding = exchange.head.target.accepts
                if encoding:
                    json, binary = render_body(body, payload, style, query.id, parameters)
                    self._send_compressed(exchange, json, binary, encoding, begin)
                else:
                    self._send(exchange, *render(body, payload, style, query.id, begin, parameters))
            except (BadMessage, PenstockError) as error:
                code = error.code if isinstance(error, PenstockError) else errors.INTERNAL
                self.fail(exchange, PenstockError(code, str(error)), query.id)

        if len(answer.payload) > _ASIDE_MIN_BYTES:
            self._loop.run_in_executor(None, work).add_done_callback(changed)
        else:
            now: asyncio.Future[tuple[bytes, Payload, Style]] = self._loop.create_future()
            try:
                now.set_result(work())
            except (BadMessage, PenstockError) as error:
                now.set_exception(error)
            changed(now)

    def _send_compressed(self, exchange: Exchange, json: bytes, binary: bytes, encoding: str, begin: bytes) -> None:
        if not encoding or len(json) + len(binary) < self.options.compress_bytes_min:
            self._send(exchange, wrap(json, len(binary), begin, bool(binary)), binary)
            return

        def compressed(body: bytes) -> None:
            self.count(200)
            lines = b"%bContent-Encoding: %b\r\nVary: Accept-Encoding\r\n"
            extra = lines % (begin.removeprefix(OK), encoding.encode())
            if binary:
                extra += b"Inference-Header-Content-Length: %d\r\n" % len(json)
            exchange.answer(200, body, b"application/octet-stream" if binary else b"application/json", extra)

        self._compress(exchange, json + binary, encoding, compressed)

    def release(self, held: int) -> None:
        self.caller.release(held, time.monotonic())

    def _send(self, exchange: Exchange, head: bytes, tail: Payload) -> None:
        self._answered.value += 1
        if len(tail) <= _JOIN_MAX_BYTES:
            exchange.send(200, head + tail)
        else:
            exchange.send(200, head, tail)

    def _compress(self, exchange: Exchange, data: bytes, encoding: str, then: Callable[[bytes], None]) -> None:
        """Compress an answer, on a thread if it is large, and then do something with it."""
        if len(data) <= _ASIDE_MIN_BYTES:
            then(compress(data, encoding))
            return

        def done(future: asyncio.Future[bytes]) -> None:
            if exchange.abandoned:
                future.exception()
            else:
                self.later(exchange, lambda done: then(done.result()), future)

        # What waits for a thread leaves with its client: else those that ask and hang up would fill the memory, as what
        # stands in the executor's queue stays there.
        waiting = [data]
        exchange.gone = waiting.clear
        self._loop.run_in_executor(None, lambda: compress(waiting.pop(), encoding)).add_done_callback(done)

    def later(self, exchange: Exchange, handler: Callable[[T], None], argument: T) -> None:
        """Go on with a request: errors answer it, as in ``handle``."""
        try:
            handler(argument)
        except PenstockError as error:
            self.fail(exchange, error)
        except RouteError as error:
            self._refuse(exchange, error)
        except Exception:
            log.exception("request handler failed", extra=fields(url=repr(exchange.head.url)))
            self.crashed(exchange)

    def count_failure(self, target: Target, code: str) -> None:
        """Count a request that went no further than this gateway. Only names that the server has become labels."""
        state = self._state(target) if target.version else None
        known = state.version if state is not None else ""
        labels = (target.model, known) if target.model in (self.caller.models or {}) else ("", "")
        self.caller.meters.value("penstock_request_failures", *labels, code).value += 1

    # --- metrics, and the dashboard ---

    def _dashboard(self, exchange: Exchange, target: Target) -> None:
        self.count(200)
        exchange.answer(200, self._page.body, b"text/html; charset=utf-8", self._page.headers)

    def _events(self, exchange: Exchange, target: Target) -> None:
        if exchange.head.method == b"HEAD":
            exchange.send(200, FEED_HEAD)
        else:
            self._feed.join(exchange)
        self.count(200)

    def _metrics(self, exchange: Exchange, target: Target) -> None:
        form = form_for(exchange.head.headers.get("accept", b""))

        def report(text: bytes) -> None:
            self.count(200)
            exchange.answer(200, text, form.content_type)

        self._reports.ask(report, form)


def _allow(methods: Sequence[str]) -> bytes:
    return f"Allow: {', '.join(methods)}\r\n".encode()
