"""A gateway as a process: uvloop, the listening socket, and the caller's sockets beside it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

import uvloop

from penstock.client.link import Link
from penstock.client.orders import Orders
from penstock.gateway import logsettings, modelconfig, repository, sharedmemory, statistics, tracesettings
from penstock.gateway.acceptor import Acceptor
from penstock.gateway.application import Application
from penstock.gateway.caching import ResponseCache
from penstock.gateway.common import Common
from penstock.gateway.connection import Http
from penstock.gateway.jobs import Jobs, NoJobs
from penstock.gateway.listening import Sign, listen, reachable_url, url_of
from penstock.gateway.logsettings import LogSettings
from penstock.gateway.modelconfig import ModelConfig
from penstock.gateway.openapi import OpenApi
from penstock.gateway.options import GatewayOptions
from penstock.gateway.plain import Plain
from penstock.gateway.regions import Regions
from penstock.gateway.reports import Reports
from penstock.gateway.repository import Repository
from penstock.gateway.sharedmemory import SharedMemory
from penstock.gateway.statistics import Statistics
from penstock.gateway.steady import Steady
from penstock.gateway.tfserving import TensorFlowServing
from penstock.gateway.tracesettings import TraceSettings
from penstock.gateway.tracing import Tracing
from penstock.gateway.waits import first_of
from penstock.jobs.place import Place
from penstock.wire.arena import Arena, ArenaSearch, make_arena
from penstock.wire.endpoints import BrokerAddress, EndpointError
from penstock.wire.messages import Snapshot
from penstock.wire.metrics import Meters
from penstock.wire.process import EXIT_DEFECT, Watchdog, check_descriptor_limit, fields, measure, notify

log = logging.getLogger("penstock.gateway")

_BACKLOG: Final = 2048
# A gateway that starts leaves connections in the kernel's queue, and so to the gateways beside it, for as long as it
# may take to hear from a broker that is there: who comes at once is not told that there is none.
_PATIENCE_S: Final = 1.0
_BESIDE: Final = 256  # descriptors beside those of HTTP: workers, the broker, the log
# An exception that nobody expected has come out of the core: the event loop would go on with one that is in the middle
# of something. Whoever started this process starts it again.
_DEFECT: Final = "defect; what this process knows cannot be relied on any more, and it ends"


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewaySettings:
    """Where a gateway listens and whom it asks. ``http``: ``HOST:PORT``, ``fd://N`` for an inherited socket, or "" for
    none.
    ``tracing``: who is told what each request took; it is closed with the gateway. ``jobs``: None where none are
    kept."""

    broker: BrokerAddress
    http: str = "127.0.0.1:8000"
    name: str = "gateway"
    options: GatewayOptions = field(default_factory=GatewayOptions)
    tracing: Tracing | None = None
    jobs: Place | None = None


def _make_arena(settings: GatewaySettings) -> Arena | None:
    if settings.broker.runtime is None:
        return None
    return make_arena(settings.options.arena_bytes, _arena_name(settings), "[gateway] arena_bytes")


def _arena_name(settings: GatewaySettings) -> str:
    return f"penstock-{settings.name}"


class GatewayProcess:
    """``start`` binds, ``serve`` runs until a signal and drains. EndpointError: cannot start."""

    def __init__(self, settings: GatewaySettings) -> None:
        self._settings = settings
        self._listener: socket.socket | None = None

    def start(self) -> None:
        self._arena = _make_arena(self._settings)
        self._listener = listen(self._settings.http)
        try:
            self._listener.listen(_BACKLOG)
        except OSError as error:  # a port that is only bound is not yet ours alone
            raise EndpointError(f"cannot listen on {self._settings.http}: {error.strerror}") from None
        check_descriptor_limit(self._settings.options.connections_max + _BESIDE, "HTTP connections")

    def serve(self) -> None:
        uvloop.run(self._serve())

    def stop(self) -> None:
        if self._listener is not None:
            self._listener.close()
        if self._settings.tracing is not None:
            self._settings.tracing.close()

    async def _serve(self) -> None:
        assert self._listener is not None, "start comes before serve"
        settings, loop = self._settings, asyncio.get_running_loop()
        stopped = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stopped.set)
        coupling = Coupling(loop, settings, self._arena)
        sign = _put_up(settings.broker, self._listener)
        log.info("gateway listens", extra=fields(url=url_of(self._listener)))
        notify("READY=1")
        coupling.pump()
        await first_of(_PATIENCE_S, coupling.introduced, stopped)
        acceptor = Acceptor(self._listener, coupling.http.connection, _BACKLOG)
        await acceptor.start()

        def look() -> None:
            acceptor.look()
            if sign is not None:
                sign.look()

        coupling.http.look = look
        coupling.http.watch()
        await stopped.wait()
        notify("STOPPING=1")
        coupling.http.look = lambda: None
        acceptor.close()
        if sign is not None:
            await asyncio.sleep(0)  # a turn of the loop, in which what it listened on is closed
            sign.take_down()
        await self._drain(coupling.http)
        coupling.close()

    async def _drain(self, http: Http) -> None:
        """Nobody is let in any more: answer what is under way. Connections without a request may bring one more, until
        they are closed."""
        options = self._settings.options
        until = time.monotonic() + options.drain_max_s
        http.drain()
        log.info("gateway draining", extra=fields(connections=len(http.connections), limit_s=options.drain_max_s))
        if not await _within(min(options.drain_idle_s, options.drain_max_s), http.drained):
            http.close_idle()
            if not await _within(until - time.monotonic(), http.drained):
                log.warning("drain limit is over; requests are given up", extra=fields(requests=http.unanswered))
        log.info("gateway stopped", extra=fields(connections_left=len(http.connections)))
        http.stop()


def _put_up(broker: BrokerAddress, listener: socket.socket) -> Sign | None:
    """Clients of this host find HTTP by it; those that are told where it is do without."""
    if broker.runtime is None:
        return None
    sign = Sign(broker.runtime.http, reachable_url(listener))
    try:
        sign.put_up()
    except OSError as error:
        log.warning("the URL is not written down", extra=fields(file=str(broker.runtime.http), reason=error.strerror))
    return sign


async def _within(limit_s: float, event: asyncio.Event) -> bool:
    """Whether it is set before the time is up."""
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(event.wait(), max(0.0, limit_s))
    return event.is_set()


class Coupling:
    """The HTTP side and the caller's connections on one loop. Requests of one turn of the loop leave in one message."""

    def __init__(self, loop: asyncio.AbstractEventLoop, settings: GatewaySettings, arena: Arena | None) -> None:
        self._loop = loop
        self.introduced = asyncio.Event()  # a broker has said what models there are
        wanted = settings.broker.runtime is not None and settings.options.arena_bytes != 0
        search = ArenaSearch(settings.options.arena_bytes, _arena_name(settings), wanted and arena is None)
        self._link = Link(settings.broker, settings.name, lambda metrics: reports.arrived(metrics), arena, search)
        self._link.measure = self._measure
        self._wants_arena = wanted
        reports = Reports(loop, self._ask_broker, self._snapshot, settings.options.report_timeout_s)
        self._steady = Steady()
        self._models: object = None  # what readiness follows from, when it was last looked at
        self._epoch = 0
        self.measures: list[Callable[[], None]] = []  # what else is to bring its series up to date
        self.joined_at = float("inf")  # when this broker was found, in the monotonic clock
        # Without a listener nothing is answered over HTTP, and so nothing is said of it.
        self._meters = self._link.caller.meters if settings.http else Meters()
        self.application = Application(
            loop,
            self._link.caller,
            settings.options,
            reports,
            self._flush_soon,
            settings.tracing,
            self._steady,
            self._meters,
        )
        application = self.application
        application.add(Repository(loop, application, Orders(self._link)).routes, *repository.EXTENSIONS)
        application.add(Statistics(application, reports).routes, statistics.EXTENSION)
        application.add(Plain(application).routes)
        application.add(ModelConfig(application).routes, modelconfig.EXTENSION)
        application.add(TensorFlowServing(application).routes)
        application.add(OpenApi(loop, application).routes)
        self._jobs = None if settings.jobs is None else Jobs(loop, application, settings.jobs, settings.broker.runtime)
        if self._jobs is None:
            NoJobs(application)
        else:
            application.add(self._jobs.routes)
        runtime = None if settings.broker.runtime is None else settings.broker.runtime.path
        self._cache = application.cache = ResponseCache(loop, application, runtime)
        self.measures.append(lambda: self._cache.stores.measure(application.caller.meters))
        common = Common(runtime)
        self._logs = LogSettings(application, common)
        regions = Regions(common, settings.options.allow_client_shm, settings.options.body_bytes_max)
        application.parse.parser.regions = regions if regions.allowed else None
        shared = [sharedmemory.EXTENSION] if regions.allowed else []
        application.add(SharedMemory(loop, application, regions).routes, *shared)
        traces = TraceSettings(application, common, runtime, settings.tracing is not None)
        application.add(traces.routes, tracesettings.EXTENSION)
        application.add(self._logs.routes, logsettings.EXTENSION)
        if settings.tracing is not None:
            settings.tracing.wants = traces.wants
        self.http = Http(loop, settings.options, self.application, self._link.slots)
        if self._jobs is not None:
            self._jobs.draining = lambda: self.http.draining
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = float("inf")
        self._watchdog = Watchdog()
        loop.add_reader(self._link.fileno(), self.pump)

    def pump(self) -> None:
        """Handle what has come from the broker and the workers."""
        try:
            self._pump()
        except Exception:
            log.exception(_DEFECT)
            os._exit(EXIT_DEFECT)

    def _pump(self) -> None:
        self._link.pump()
        now, caller = time.monotonic(), self._link.caller
        self._watchdog.feed(now)
        models, epoch = caller.models, caller.membership.epoch
        if epoch != self._epoch:
            self.joined_at = now
        if models is not self._models or epoch != self._epoch:
            self._models, self._epoch = models, epoch
            self._steady.saw(caller.is_ready(), now)
            if models is not None:
                self.introduced.set()
        self._set_timer()

    def _flush_soon(self) -> None:
        """Once for all that this turn of the loop brings."""
        if not self._link.will_flush:
            self._link.will_flush = True
            self._loop.call_soon(self._flush)

    def _flush(self) -> None:
        self._link.will_flush = False
        try:
            self._link.flush()
            self._set_timer()
        except Exception:
            log.exception(_DEFECT)
            os._exit(EXIT_DEFECT)

    def _set_timer(self) -> None:
        """Be called when the link is due. A timer that is early costs one turn; one for each change would cost more."""
        due = min(self._link.due(), self._watchdog.due)
        if self._timer is not None and self._timer_at <= due:
            return
        if self._timer is not None:
            self._timer.cancel()
        self._timer_at = due
        self._timer = self._loop.call_later(max(0.0, due - time.monotonic()), self._timed)

    def _timed(self) -> None:
        self._timer = None
        self.pump()

    def _ask_broker(self) -> int | None:
        if not self._link.caller.membership.joined:
            return None
        serial, say = self._link.caller.ask_metrics()
        self._link.say(say.message)
        return serial

    def _measure(self) -> None:
        """Bring the series that are not counted as things happen up to date, at each beat."""
        self._logs.look()
        caller = self._link.caller
        self._meters.value("penstock_http_connections").value = len(self.http.connections)
        self._meters.value("penstock_http_cut_off").value = self.http.cut_off
        self._meters.value("penstock_http_body_bytes").value = self.http.budget.used
        slots = self._link.slots()
        caller.meters.value("penstock_arena_missing").value = int(self._wants_arena and slots is None)
        if slots is not None:
            caller.meters.value("penstock_arena_bytes").value = slots.arena.size
            caller.meters.value("penstock_arena_used_bytes").value = slots.arena.allocator.used
            caller.meters.value("penstock_arena_waiting").value = slots.waiting
        for own in self.measures:
            own()
        measure(caller.meters)

    def _snapshot(self) -> Snapshot:
        self._measure()
        return Snapshot(self._link.caller.name, self._link.caller.meters.samples())

    def close(self) -> None:
        self._cache.close()
        self._loop.remove_reader(self._link.fileno())
        if self._timer is not None:
            self._timer.cancel()
        if self._jobs is not None:
            self._jobs.close()
        self.application.clerks.close()
        self._link.close()
