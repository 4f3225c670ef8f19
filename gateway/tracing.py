"""OpenTelemetry spans of inference requests, for who has switched them on ([gateway] tracing = true).

    POST /v2/models/M/infer      the gateway: from the end of the request to its answer; child of the caller's span, if
    |                            it sent one (W3C Trace Context, https://www.w3.org/TR/trace-context/)
    +-- queue                    from its acceptance by the broker to the start of its batch
    +-- batch                    from there to its end, on the worker
        +-- model                of that, in ONNX Runtime

Only the gateway knows of OpenTelemetry: workers say with each answer how long each part took. When each began, on a
clock of this host, is not told; what messages took to go and come is taken to be equal. Where spans go, how many are
kept and under which name, OpenTelemetry's own variables say (OTEL_EXPORTER_OTLP_ENDPOINT, OTEL_TRACES_SAMPLER,
OTEL_SERVICE_NAME). A request that is refused before it is asked has none.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from importlib.metadata import version
from typing import Any, Final, NamedTuple

from penstock.client.events import Complete
from penstock.gateway.reader import Head
from penstock.wire.errors import PenstockError

_SECOND_NS: Final = 1_000_000_000
_SHUTDOWN_S: Final = 2.0  # for spans that have not been sent when the gateway ends


class TracingError(Exception):
    """Spans cannot be made; the message is a sentence for the user."""


class Parts(NamedTuple):
    """(start, end) of each, in nanoseconds since 1970."""

    queue: tuple[int, int]
    batch: tuple[int, int]
    model: tuple[int, int]


def divide(start_ns: int, end_ns: int, queue_us: int, compute_us: int, model_us: int) -> Parts:
    """When the parts of a request were, which took so long. What is left of its time is halved: the way there, and the
    way back; likewise what is left of the batch's around the model. Parts that take longer than the whole, which
    differing clocks can make of them, are cut."""
    whole = max(0, end_ns - start_ns)
    queue = min(1000 * queue_us, whole)
    batch = min(1000 * compute_us, whole - queue)
    model = min(1000 * model_us, batch)
    queue_at = start_ns + (whole - queue - batch) // 2
    batch_at = queue_at + queue
    model_at = batch_at + (batch - model) // 2
    return Parts((queue_at, batch_at), (batch_at, batch_at + batch), (model_at, model_at + model))


class Tracing:
    """``ended`` is called once for each request. Spans are sent by a thread of OpenTelemetry's own; what it cannot send
    in time it drops."""

    def __init__(self, gateway: str) -> None:
        """Raises TracingError when OpenTelemetry is not installed."""
        try:
            from opentelemetry import trace
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
            from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
        except ImportError as error:
            raise TracingError(
                f"[gateway] tracing needs OpenTelemetry: pip install 'penstock[otel]' ({error})"
            ) from None
        # What the environment says comes first.
        defaults = Resource({"service.name": "penstock", "penstock.gateway": gateway})
        self._provider = TracerProvider(resource=defaults.merge(Resource.create()), shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
        self._tracer = self._provider.get_tracer("penstock", version("penstock"))
        self._extract = TraceContextTextMapPropagator().extract
        self._trace = trace
        self.wants: Callable[[str], bool] = lambda model: True  # whether a model's request is to be traced

    def ended(
        self,
        head: Head,
        model: tuple[str, str],
        seconds: float,
        status: int,
        request_id: str,
        answer: Complete | None = None,
        error: PenstockError | None = None,
    ) -> None:
        """A request for a model (name, version) has been answered with ``status``, now, ``seconds`` after it came."""
        if not self.wants(model[0]):
            return
        trace = self._trace
        end_ns = time.time_ns()
        start_ns = end_ns - int(seconds * _SECOND_NS)
        about: dict[str, Any] = {
            "http.request.method": head.method.decode("latin-1"),
            "http.route": "/v2/models/{model}/infer",
            "http.response.status_code": status,
            "penstock.model": model[0],
            "penstock.version": model[1],
        }
        if request_id:
            about["penstock.request_id"] = request_id
        span = self._tracer.start_span(
            f"POST /v2/models/{model[0]}/infer", self._context(head.headers), trace.SpanKind.SERVER, about,
            start_time=start_ns,
        )  # fmt: skip
        if error is not None:
            span.set_attribute("error.type", error.code)
            if status >= 500:
                span.set_status(trace.StatusCode.ERROR, error.message)
        if answer is not None and span.is_recording():
            self._add_parts(trace.set_span_in_context(span), start_ns, end_ns, answer)
        span.end(end_ns)

    def _add_parts(self, parent: Any, start_ns: int, end_ns: int, answer: Complete) -> None:
        batch = answer.batch
        parts = divide(start_ns, end_ns, answer.queue_us, batch.compute_us, batch.model_us)
        self._tracer.start_span("queue", parent, start_time=parts.queue[0]).end(parts.queue[1])
        about: dict[str, Any] = {
            "penstock.batch.rows": batch.rows,
            "penstock.batch.reason": batch.reason,
            "penstock.batch.serial": batch.serial,
            "penstock.worker": answer.worker.hex(),
        }
        span = self._tracer.start_span("batch", parent, attributes=about, start_time=parts.batch[0])
        inside = self._trace.set_span_in_context(span)
        self._tracer.start_span("model", inside, start_time=parts.model[0]).end(parts.model[1])
        span.end(parts.batch[1])

    def _context(self, headers: Mapping[str, bytes]) -> Any:
        carrier = {name: headers[name].decode("latin-1") for name in ("traceparent", "tracestate") if name in headers}
        return self._extract(carrier)

    def close(self) -> None:
        """Send what is left, within a limit, which OpenTelemetry's own calls do not keep: where nobody answers they
        take the time of several exports."""
        ending = threading.Thread(target=self._provider.shutdown, name="tracing", daemon=True)
        ending.start()
        ending.join(_SHUTDOWN_S)
