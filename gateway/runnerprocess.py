"""The process that runs jobs: a gateway that listens to nobody, for each way in which requests may come is one in which
they may have been stored."""

from __future__ import annotations

import asyncio
import logging
import math
import signal
from dataclasses import dataclass, field, replace
from typing import Final

import orjson
import uvloop

from penstock.client.terms import TIMEOUT_MAX_S
from penstock.gateway.inference import Parser
from penstock.gateway.jobwake import Ear
from penstock.gateway.options import GatewayOptions
from penstock.gateway.process import Coupling, GatewaySettings
from penstock.gateway.runner import Runner
from penstock.gateway.tracing import Tracing
from penstock.gateway.waits import first_of
from penstock.jobs.callbacks import Callbacks
from penstock.jobs.document import document
from penstock.jobs.job import Job, StoredResponse
from penstock.jobs.options import JobsOptions
from penstock.jobs.owner import new_owner
from penstock.jobs.place import Place
from penstock.jobs.store import Store, open_store
from penstock.wire.endpoints import BrokerAddress
from penstock.wire.metrics import Meters
from penstock.wire.process import fields, notify

log = logging.getLogger("penstock.jobs")

_SHUT_S: Final = 2.0  # for callbacks that are under way; what has not ended by then is sent again


@dataclass(frozen=True, slots=True, kw_only=True)
class RunnerSettings:
    """Whose jobs are run, and by which server. ``tracing`` is closed with the process."""

    broker: BrokerAddress
    place: Place
    name: str = "jobs"
    options: GatewayOptions = field(default_factory=GatewayOptions)
    tracing: Tracing | None = None


class RunnerProcess:
    """``serve`` runs until a signal, and drains."""

    def __init__(self, settings: RunnerSettings) -> None:
        self._settings = settings
        self._store: Store | None = None

    def start(self) -> None:
        """Raises StoreError for what is no store."""
        self._store = open_store(self._settings.place.where, self._settings.place.options)

    def serve(self) -> None:
        uvloop.run(self._serve())

    def stop(self) -> None:
        if self._store is not None:
            self._store.close()
        if self._settings.tracing is not None:
            self._settings.tracing.close()

    async def _serve(self) -> None:
        assert self._store is not None, "start comes before serve"
        settings, loop, jobs = self._settings, asyncio.get_running_loop(), self._settings.place.options
        stopped = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stopped.set)
        owner = new_owner()
        # Shared memory would be there for large tensors that come now and then, and be taken all the time. A request
        # that names no time of its own has as long as a job may take: nobody waits at the other end.
        limit_s = min(max(jobs.run_max_s, settings.options.request_timeout_s), TIMEOUT_MAX_S)
        options = replace(settings.options, arena_bytes=0, request_timeout_s=limit_s)
        coupling = Coupling(
            loop,
            GatewaySettings(
                broker=settings.broker, http="", name=settings.name, options=options, tracing=settings.tracing
            ),
            None,
        )
        coupling.application.parse.parser = Parser(callbacks=True)  # which are sent from here
        callbacks = Callbacks(self._store, jobs, owner, lambda job, response: _body(job, response, jobs))
        runner = Runner(
            coupling.application,
            coupling.http,
            self._store,
            jobs,
            owner,
            lambda: max(0.0, loop.time() - coupling.joined_at),
            lambda job: None if job.callback is None else callbacks.wake(),
        )
        coupling.measures.append(lambda: _measure(callbacks, coupling.application.caller.meters))
        ear = self._listen(runner, loop)
        callbacks.start()
        log.info("jobs are run", extra=fields(store=settings.place.shown))
        notify("READY=1")
        coupling.pump()
        await first_of(math.inf, coupling.introduced, stopped)
        await runner.run(stopped)
        notify("STOPPING=1")
        if ear is not None:
            loop.remove_reader(ear.fileno())
            ear.close()
        await runner.drain(jobs.drain_max_s)
        callbacks.stop(_SHUT_S)
        coupling.close()

    def _listen(self, runner: Runner, loop: asyncio.AbstractEventLoop) -> Ear | None:
        """Without it, jobs begin some time later."""
        if self._settings.broker.runtime is None:
            return None
        try:
            ear = Ear(self._settings.broker.runtime.jobs)
        except OSError as error:
            log.warning("jobs begin late: nobody can say that there is one", extra=fields(reason=error.strerror))
            return None

        def hear() -> None:
            ear.clear()
            runner.wake()

        loop.add_reader(ear.fileno(), hear)
        runner.heard = True
        return ear


def _body(job: Job, response: StoredResponse | None, options: JobsOptions) -> bytes:
    """What is sent of a job that has ended."""
    return orjson.dumps(document(job, response, options.callback_result_bytes_max))


def _measure(callbacks: Callbacks, meters: Meters) -> None:
    for outcome, number in callbacks.outcomes.items():
        meters.value("penstock_job_callbacks", outcome).value = number
