"""A worker as a process: the main thread talks and obeys the core, compute threads run models, one thread keeps them
(keeper.py), once a process beside it has tried them (tester.py)."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import secrets
import select
import sys
import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, NoReturn

from penstock.wire import control
from penstock.wire.arena import ArenaSearch, make_arena
from penstock.wire.codec import pack, unpack
from penstock.wire.connection import Broken, Connection
from penstock.wire.doors import Doors
from penstock.wire.endpoints import BrokerAddress, EndpointError, Guard, binding, check_loopback, parse_host_port
from penstock.wire.errors import BadMessage
from penstock.wire.events import BrokerFound, BrokerLost, Drain, FromBroker, Garbage, Log, Say, Tick
from penstock.wire.listener import SUBSCRIPTION_MAX_BYTES, Listener, Peer
from penstock.wire.messages import (
    EXPLICIT,
    MAX_SENTENCE,
    PEER_ID_BYTES,
    TO_WORKER,
    Beat,
    Bye,
    Carrier,
    Message,
    Payload,
)
from penstock.wire.models import READY, UNAVAILABLE
from penstock.wire.process import StopSignal, Watchdog, fields, measure, notify
from penstock.wire.slots import Slots
from penstock.worker.config import CPU
from penstock.worker.core import Core
from penstock.worker.cuda import CudaError, find_gpu
from penstock.worker.events import (
    Command,
    DeviceLost,
    Discard,
    Event,
    GiveUp,
    Grown,
    Loaded,
    Order,
    Publish,
    Run,
    Subscribed,
    Unsubscribed,
)
from penstock.worker.gpus import EXIT_GPU_LOST, GpuWatch, Watching, measure_gpu
from penstock.worker.instances import Instances
from penstock.worker.keeper import Keeper
from penstock.worker.memory import GiveBackRule, give_back, heap_bytes, share_arena
from penstock.worker.options import EXIT_HUNG, WorkerOptions
from penstock.worker.serving import Identity
from penstock.worker.store import Store, StoreError, find_store
from penstock.worker.tester import Tester

log = logging.getLogger("penstock.worker")

_ROUND_MESSAGES: Final = 64
_OUT_MAX_BYTES: Final = 4 << 30  # that may wait for one caller; what a worker keeps for it is far below
_LINGER_S: Final = 0.2  # for what was said last
_SLEEP_MAX_S: Final = 1e6  # epoll(7) has no larger times
_CONTROL_AGAIN_S: Final = 0.02  # between two looks for a broker's control socket
LOST_S: Final = 20.0  # that a worker whose GPU is lost when it begins tells so; it is not ready meanwhile
_SWITCH_INTERVAL_S: Final = 0.0005  # the talking thread gets the GIL back within this from a compute thread's Python


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerSettings:
    """What a worker serves and for whom. ``device``: "cpu" or "cuda:N", by which it goes; ``gpu``: the UUID of that GPU
    or slice, the only one that this process sees; ``gpu_unusable``: why nothing can run on it, or "". ``bind``: "" or
    ``tcp://HOST:PORT``, where callers on other hosts hear it."""

    broker: BrokerAddress
    models: Path
    name: str = ""
    device: str = CPU
    gpu: str = ""
    gpu_unusable: str = ""
    bind: str = ""
    options: WorkerOptions = field(default_factory=WorkerOptions)


def _pin(slots: Slots) -> None:
    """Have the GPU write results where callers read them, at its full speed; else the driver copies them once more."""
    try:
        find_gpu().pin(slots.address, slots.arena.size)
    except (CudaError, MemoryError) as error:
        log.debug("shared memory is not pinned", extra=fields(reason=str(error)))


def _find_store(settings: WorkerSettings) -> Store | None:
    try:
        return find_store(settings.options, settings.device != CPU)
    except StoreError as error:
        cost = "each worker holds its own copy of all weights"
        log.warning("no store of prepared models", extra=fields(reason=str(error), cost=cost))
        return None


class WorkerProcess:
    """``start`` opens, ``serve`` runs until a signal and drains, ``stop`` closes. ``serve`` returns whether any model
    could be loaded. RepositoryError, EndpointError: cannot start.

    A GPU that is lost while models are on it ends the process at once, with EXIT_GPU_LOST, and so does a batch that
    does not end, with EXIT_HUNG: no thread can be stopped. A GPU that is lost when the process begins is told to the
    broker for a while, before ``serve`` returns and ``lost`` says why: so the reason is in health and metrics while
    whoever started this process does so again and again, and does it slowly.
    """

    def __init__(self, settings: WorkerSettings) -> None:
        self._settings = settings
        # It forks: before there are threads, sockets, and anything of CUDA.
        self._tester = Tester(settings.options.trial_max_s, settings.options.run_bytes_max).start()
        self._opened = contextlib.ExitStack()
        self._opened.callback(self._tester.stop)
        self._control: Any = None
        self._control_at = 0.0
        self._search = ArenaSearch(0, "", False)
        self._arena_at = 0.0  # when memory for an arena is to be looked for, or the broker to be told of it
        self._give_back = GiveBackRule()
        self._watchdog = Watchdog()
        self._gpu: Watching | None = None
        self._guard: Guard | None = None
        self.failures: list[str] = []  # a sentence for each model that could not be loaded
        self.lost = ""  # why the GPU cannot be used

    def start(self) -> None:
        settings, opened = self._settings, self._opened
        self._epoll = select.epoll()
        opened.callback(self._epoll.close)
        limits = settings.options
        how = limits.model_control, limits.links_out, limits.model_bytes_max
        self._keeper = Keeper(settings.models, self._tester, settings.device, *how)
        opened.callback(self._keeper.stop)
        files = self._keeper.begin()
        sys.setswitchinterval(_SWITCH_INTERVAL_S)
        number = bytes([secrets.randbelow(255) + 1]) + secrets.token_bytes(PEER_ID_BYTES - 1)
        self._slots: Slots | None = None
        self._doors = Doors()
        if settings.broker.runtime is not None:
            name = f"penstock-{settings.name or settings.device}"
            asked = settings.options.arena_bytes
            arena = make_arena(asked, name, "[worker] arena_bytes")
            self._search = ArenaSearch(asked, name, arena is None)
            if arena is not None:
                opened.callback(arena.close)
                self._slots = Slots(arena)
            settings.broker.runtime.make()
            self._guard = Guard(settings.broker.runtime.results(number))
            opened.callback(self._guard.release)
        # It is closed last: by its end the broker knows that this process has ended, and what was said last has left.
        opened.callback(self._lose_control)
        self._results = Listener(
            self._epoll, "XPUB", _OUT_MAX_BYTES, self._doors, self._hearer_ended, SUBSCRIPTION_MAX_BYTES
        )
        opened.callback(self._results.close, _LINGER_S)
        endpoints = tuple(self._bind(number))
        self._broker = Connection(self._epoll, settings.broker.workers, "DEALER", number)
        opened.callback(self._broker.close, _LINGER_S)
        share_arena(settings.options.run_bytes_max)
        instances = max([file.config.instances for file in files], default=1)
        graphs = settings.device != CPU and any(file.config.cuda_graphs for file in files)
        self._instances = Instances(instances, self._slots, graphs)
        opened.callback(self._instances.stop)
        self._stop_signal = StopSignal()
        opened.callback(self._stop_signal.restore)
        local = settings.broker.runtime is not None
        about = settings.name, settings.device, os.getpid(), endpoints, instances, local
        repository = os.path.abspath(settings.models) if local else ""
        identity = Identity(number, *about, limits.model_control, repository)
        self._core = Core(identity, [], limits.max_compute_s)
        self._take_news()
        for readable in (self._instances.fileno(), self._keeper.fileno(), self._stop_signal.fileno()):
            self._epoll.register(readable, select.EPOLLIN)
        self._watch_gpu()
        if not self.lost:
            self._keeper.start(_find_store(settings), self._core.serving.used)

    def _watch_gpu(self) -> None:
        settings = self._settings
        if settings.gpu_unusable:
            self.lost = settings.gpu_unusable
        elif settings.gpu:
            self._gpu = Watching(GpuWatch(settings.gpu))
            self._epoll.register(self._gpu.fileno(), select.EPOLLIN)
            self._opened.callback(self._gpu.stop)
            self.lost = self._gpu.latest.lost

    def _bind(self, number: bytes) -> Iterable[str]:
        runtime, bind = self._settings.broker.runtime, self._settings.bind
        if runtime is not None:
            with binding(f"ipc://{runtime.results(number)}"):
                self._results.bind_path(runtime.results(number))
            yield f"ipc://{runtime.results(number)}"
        if bind or runtime is None:
            yield bind_results(bind or "tcp://127.0.0.1:0", self._results)

    def serve(self) -> bool:
        if self.lost:
            self._tell_lost()
            return False
        # Whoever is told that this worker is ready may ask it at once: so the broker is told before.
        while self._is_loading or self._core.has_untold:
            self._turn(float("inf"))
            if self._stop_signal.received:
                break
        states = self._core.serving.states.values()
        ready = sum(state.state == READY for state in states)
        self.failures = [state.reason for state in states if state.state == UNAVAILABLE]
        if states and not ready and self._settings.options.model_control != EXPLICIT:
            return self._stop_signal.received
        if self._settings.device != CPU and self._slots is not None:
            _pin(self._slots)
        log.info("models loaded", extra=fields(ready=ready, failed=len(self.failures)))
        notify("READY=1")
        while not self._stop_signal.received:
            self._turn(float("inf"))
        notify("STOPPING=1")
        self._drain()
        return True

    @property
    def _is_loading(self) -> bool:
        """What was there at the beginning."""
        return not self._keeper.settled or self._keeper.has_news

    def _drain(self) -> None:
        """Finish what has been assigned and wait for its acknowledgment, within the limit."""
        until = time.monotonic() + self._settings.options.drain_max_s
        self._obey(self._core.handle(Drain(), time.monotonic()))
        while not self._core.holds_nothing and self._core.membership.joined and time.monotonic() < until:
            self._turn(until)
        self._broker.send((pack(Bye(self._core.membership.epoch)),))
        if not self._core.holds_nothing and self._core.membership.joined:
            log.warning("drain limit is over; what is left is given elsewhere")
        log.info("worker stopped", extra=fields(drained=self._core.holds_nothing))

    def _tell_lost(self) -> None:
        """Have the broker know why this worker serves nothing, for a while."""
        self._hear_lost(self.lost)
        notify(f"ERRNO={errno.ENODEV}\nSTATUS=GPU lost: {self.lost}")
        until = time.monotonic() + LOST_S
        while not self._stop_signal.received and time.monotonic() < until:
            self._turn(until)
        self._broker.send((pack(Bye(self._core.membership.epoch)),))

    def _hear_lost(self, reason: str) -> None:
        settings = self._settings
        log.error("GPU lost", extra=fields(device=settings.device, gpu=settings.gpu, reason=reason))
        self._core.meters.value("penstock_gpu_lost", settings.gpu or settings.device).value = 1
        self._hear(DeviceLost(f"{settings.device} ({settings.gpu or 'a GPU'}) is lost: {reason}"[:MAX_SENTENCE]))

    def _end(self, reason: str) -> NoReturn:
        """The GPU is lost: what it was to compute is given elsewhere once the broker knows. An orderly end would wait
        for threads that hang in the driver."""
        self._hear_lost(reason)
        self._broker.send((pack(Bye(self._core.membership.epoch)),))
        self._end_at_once(EXIT_GPU_LOST)

    def _end_at_once(self, code: int) -> NoReturn:
        self._results.close(_LINGER_S)
        self._broker.close(_LINGER_S)
        if self._guard is not None:
            self._guard.release()
        os._exit(code)

    def stop(self) -> None:
        """Close what has been opened, in whatever state; what was said last is still delivered."""
        self._opened.close()

    # --- the loop ---

    def _turn(self, until: float) -> None:
        """Sleep until there is something to do, or until the core or ``until`` says, and do it."""
        self._look(until)
        for peer, frames in self._results.receive(_ROUND_MESSAGES):
            self._hear_subscription(peer, frames)
        for executed in self._instances.take():
            self._hear(executed)
        if self._keeper.has_news:
            self._take_news()
        if self._gpu is not None and self._gpu.latest.lost and not self.lost:
            self._end(self._gpu.latest.lost)
        now = time.monotonic()
        self._watchdog.feed(now)
        if now >= self._arena_at:
            self._look_for_arena(now)
        if now >= self._core.due():
            self._hear(Tick())

    def _look(self, until: float) -> None:
        """See what has happened; sleep until something does if nothing is left to be done."""
        wait_s = 0.0
        if not self._results.pending:
            self._keep_control()
            now = time.monotonic()
            if now >= self._broker.retry_at:
                self._broker.connect(now)
            due = min(self._core.due(), until, self._control_at, self._arena_at, self._watchdog.due)
            wait_s = max(0.0, min(due, self._broker.retry_at) - now)
        for readable, happened in self._epoll.poll(wait_s if wait_s < _SLEEP_MAX_S else -1):
            if readable == self._broker.fileno:
                self._read_broker(happened)
            elif readable in self._results:
                self._results.happened(readable, happened)
            elif readable in (self._instances.fileno(), self._keeper.fileno()):
                os.eventfd_read(readable)
            elif readable == self._stop_signal.fileno():
                self._stop_signal.clear()
            elif self._gpu is not None and readable == self._gpu.fileno():
                pass  # woken is all that it takes
            elif self._control is not None and readable == self._control.fileno():
                self._read_control()

    def _read_broker(self, happened: int) -> None:
        was_ready = self._broker.ready
        try:
            messages = self._broker.handle(happened)
        except (Broken, BadMessage) as error:  # it is made again
            if isinstance(error, BadMessage):
                self._hear(Garbage("broker", str(error)))
            return
        if self._broker.ready and not was_ready:
            self._reached()
        for frames in messages:
            try:
                event: Event = FromBroker(unpack(frames[0], frames[1:], TO_WORKER))
            except BadMessage as error:
                event = Garbage("broker", str(error))
            self._hear(event)

    def _reached(self) -> None:
        """There may be a broker to greet: who listens for workers, and has a control connection if it is here."""
        if self._broker.ready and (self._control is not None or self._settings.broker.runtime is None):
            self._hear(BrokerFound())

    def _take_news(self) -> None:
        """What has become of models."""
        for event in self._keeper.take():
            if isinstance(event, Loaded) and event.model is not None:
                config = event.model.config
                if self._instances.grow(config.instances, self._settings.device != CPU and config.cuda_graphs):
                    self._hear(Grown(config.instances))
            self._hear(event)

    def _hear(self, event: Event) -> None:
        self._obey(self._core.handle(event, time.monotonic()))

    def _hear_subscription(self, peer: Peer, frames: list[Payload]) -> None:
        """1 or 0 and a topic: a connection wants to hear it, or no more. That takes effect only when it is accepted
        here; so nobody can ask for everything."""
        said = frames[0]
        caller = said[1:]
        if len(frames) > 1 or len(caller) != PEER_ID_BYTES or said[0] > 1:
            self._hear(Garbage("caller", f"a subscription is 1 or 0 and {PEER_ID_BYTES} bytes"))
        elif said[0] == 0:
            if self._results.unsubscribe(peer, caller):
                self._hear(Unsubscribed(caller))
        elif self._core.may_subscribe(caller) and self._results.subscribe(peer, caller):
            self._hear(Subscribed(caller))

    def _hearer_ended(self, peer: Peer, wrong: str) -> None:
        if wrong:
            self._hear(Garbage("caller", wrong))
        for caller in peer.topics:
            self._hear(Unsubscribed(caller))

    def _obey(self, commands: list[Command]) -> None:
        """Perform commands, and what follows from batches that ran at once."""
        todo = deque(commands)
        while todo:
            command = todo.popleft()
            match command:
                case Publish(caller, head, frames):
                    self._results.publish(caller, (head, *frames))
                case Say(message):
                    self._say(message)
                case Run(batch, model):
                    executed = self._instances.run(model, batch)
                    if executed is not None:
                        todo.extend(self._core.handle(executed, time.monotonic()))
                case Order(message):
                    self._keeper.ask(message)
                case Discard():
                    self._keeper.ask(command)
                case GiveUp():
                    self._end_at_once(EXIT_HUNG)
                case Log(level, event, about):
                    log.log(logging.getLevelNamesMapping()[level.upper()], event, extra=fields(**about))
                case _:
                    raise AssertionError(f"unexpected command {command!r}")

    def _say(self, message: Message) -> None:
        if isinstance(message, Beat):
            if self._give_back.due(self._instances.batches, time.monotonic()):
                give_back()
            meters = self._core.meters
            wanted = self._settings.broker.runtime is not None and self._settings.options.arena_bytes != 0
            meters.value("penstock_arena_missing").value = int(wanted and self._slots is None)
            if self._slots is not None:
                meters.value("penstock_arena_bytes").value = self._slots.arena.size
                meters.value("penstock_arena_used_bytes").value = self._slots.arena.allocator.used
            meters.value("penstock_heap_bytes").value = heap_bytes()
            if self._gpu is not None:
                measure_gpu(meters, self._gpu.uuid, self._gpu.latest)
            measure(meters)
            self._doors.look()
            self._results.look(time.monotonic())
            message.samples, message.whole = meters.changes()
        assert not isinstance(message, Carrier)
        if not self._broker.full:
            self._broker.send((pack(message),))

    # --- the control connection ---

    def _keep_control(self) -> None:
        """Look for the broker's control socket now and then while there is no connection."""
        runtime = self._settings.broker.runtime
        if runtime is None:
            self._control_at = float("inf")
            return
        if self._control is not None or time.monotonic() < self._control_at:
            return
        arena = control.NO_ARENA if self._slots is None else self._slots.arena.fd
        self._control = control.connect(runtime.control, self._core.identity.id, arena)
        if self._control is None:
            self._control_at = time.monotonic() + _CONTROL_AGAIN_S
            return
        self._control_at = float("inf")
        if self._slots is not None:
            self._arena_at = float("inf")  # the broker has been told
        self._epoll.register(self._control.fileno(), select.EPOLLIN)
        if self._broker.fileno < 0:
            self._broker.retry_at = 0.0  # who listens here listens there too
        self._reached()

    def _look_for_arena(self, now: float) -> None:
        """For the memory that was not there at the beginning; and tell the broker when it is."""
        if self._slots is None:
            arena = self._search.look(now)
            self._arena_at = self._search.due
            if arena is None:
                return
            self._slots = Slots(arena)
            self._opened.callback(self._slots.close)
            if self._settings.device != CPU:
                _pin(self._slots)
            self._instances.share(self._slots)
        told = self._control is None or control.announce(
            self._control, self._core.identity.id, self._slots.arena.fd
        )  # else when it is connected
        self._arena_at = float("inf") if told else now + _CONTROL_AGAIN_S

    def _read_control(self) -> None:
        """Take in the arenas that the broker passes on, and its end."""
        assert self._control is not None
        try:
            for came in control.receive_arenas(self._control):
                self._hear(came)
        except ConnectionError as error:
            self._lose_control()
            self._hear(BrokerLost(str(error), isinstance(error, control.BrokerLeft)))

    def _lose_control(self) -> None:
        if self._control is not None:
            self._epoll.unregister(self._control.fileno())
            self._control.close()
            self._control = None
            self._control_at = 0.0


def bind_results(address: str, results: Listener) -> str:
    """Bind a worker's results to a TCP address, port 0 for any. Returns where. Raises EndpointError."""
    if not address.startswith("tcp://"):
        raise EndpointError(f"--bind {address!r} is not of the form tcp://HOST:PORT")
    host, port = parse_host_port(address.removeprefix("tcp://"), address)
    check_loopback(host, "--bind")
    if host == "localhost":
        host = "127.0.0.1"  # whoever reads the name elsewhere might find ::1 by it
    with binding(address):
        bound = results.bind_tcp(host, port)
    return f"tcp://[{host}]:{bound}" if ":" in host else f"tcp://{host}:{bound}"
