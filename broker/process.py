"""The broker as a process: one thread, one loop, which owns the sockets and obeys the core."""

from __future__ import annotations

import contextlib
import logging
import secrets
import select
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import zmq

from penstock.broker.backlog import Backlog
from penstock.broker.control import ControlServer
from penstock.broker.core import Core
from penstock.broker.events import (
    Command,
    End,
    Event,
    FromCaller,
    FromWorker,
    Gone,
    Share,
    Sweep,
    ToCaller,
    ToWorker,
)
from penstock.broker.options import RECORD_MAX_BYTES, BrokerOptions
from penstock.broker.record import Recorder
from penstock.wire.codec import pack, unpack
from penstock.wire.doors import Doors
from penstock.wire.endpoints import EndpointError, Guard, RuntimeDir, binding, check_loopback, parse_host_port
from penstock.wire.errors import BadMessage
from penstock.wire.events import Drain, Garbage, Log, Tick
from penstock.wire.messages import (
    FROM_CALLER,
    FROM_WORKER,
    INLINE_MAX_BYTES,
    MAX_HEAD_BYTES,
    PEER_ID_BYTES,
    Assign,
    CallerHello,
    Carrier,
    HelloWanted,
    Message,
    Submit,
    WorkerHello,
)
from penstock.wire.process import StopSignal, Watchdog, check_descriptor_limit, fields, measure, notify
from penstock.wire.sockets import MAX_FRAME_BYTES, Socket

log = logging.getLogger("penstock.broker")

_ROUND_MESSAGES: Final = 64  # read from one socket before the others have their turn
_ROUND_S: Final = 0.02  # and at most for so long, whatever it takes to read one: others wait for what follows from it
_WORKER_HIGH_WATER: Final = 100_000  # messages that may wait for a worker; windows and bounds keep it far below
# Messages, of some KB at most, that may wait in ZeroMQ for a caller; what is more waits here, until it is too much.
_CALLER_HIGH_WATER: Final = 256
_CALLER_WAITING_MAX_BYTES: Final = 16 << 20
_CALLER_AGAIN_S: Final = 0.01  # between two looks whether it reads again
_MEASURE_S: Final = 0.5
_LINGER_MS: Final = 1000  # for what was said last
_PEER_DESCRIPTORS: Final = 4  # of a peer on this host: two connections, its arena, and the mapping of it


@dataclass(frozen=True, slots=True, kw_only=True)
class BrokerSettings:
    """Where a broker listens, and its limits. ``bind``: "" or ``tcp://HOST:PORT`` beside the runtime directory.
    ``record``: a file for what is asked."""

    runtime: RuntimeDir
    bind: str = ""
    options: BrokerOptions = field(default_factory=BrokerOptions)
    record: Path | None = None
    record_max_bytes: int = RECORD_MAX_BYTES


class BrokerProcess:
    """``start`` binds, ``serve`` runs until a signal and drains, ``stop`` closes. EndpointError: cannot be bound."""

    def __init__(self, settings: BrokerSettings) -> None:
        self._settings = settings
        self._poll = select.poll()
        self._opened = contextlib.ExitStack()
        self._recorder: Recorder | None = None
        self._backlog = Backlog(_CALLER_WAITING_MAX_BYTES)
        self._backlog_at = 0.0

    def start(self) -> None:
        runtime, opened, options = self._settings.runtime, self._opened, self._settings.options
        runtime.make()
        guards = []
        for path in runtime.callers, runtime.workers, runtime.control:
            guards.append(Guard(path))
            opened.callback(guards[-1].release)
        self._doors = Doors(guards)
        opened.callback(runtime.sweep)
        runtime.sweep()
        # It is closed last: whoever sees its end has been told already that the broker leaves.
        with binding(runtime.control):
            self._control = ControlServer(runtime.control, self._poll)
        opened.callback(self._control.close)
        self._context: zmq.Context[Any] = zmq.Context()
        opened.callback(self._context.term)
        self._callers = self._bind(f"ipc://{runtime.callers}", _CALLER_HIGH_WATER, MAX_FRAME_BYTES)
        self._workers = self._bind(f"ipc://{runtime.workers}", _WORKER_HIGH_WATER, MAX_HEAD_BYTES)
        if self._settings.bind:
            bind_tcp(self._settings.bind, self._callers, self._workers)
        self._stop_signal = StopSignal()
        opened.callback(self._stop_signal.restore)
        self._poll.register(self._stop_signal.fileno(), select.POLLIN)
        self._core = Core(self._settings.options, secrets.randbits(63) | 1, time.monotonic())
        if self._settings.record is not None:
            self._recorder = Recorder(self._settings.record, self._settings.record_max_bytes)
            opened.callback(self._recorder.stop)
            self._recorder.start(time.monotonic())
        self._measure_at = 0.0
        self._watchdog = Watchdog()
        check_descriptor_limit(_PEER_DESCRIPTORS * (options.callers_max + options.workers_max), "callers and workers")
        log.info("broker started", extra=fields(runtime_dir=str(runtime.path), epoch=self._core.epoch))

    def _bind(self, address: str, high_water: int, frame_bytes_max: int) -> Socket:
        socket = Socket(self._context, zmq.ROUTER, high_water, frame_bytes_max=frame_bytes_max)
        self._opened.callback(socket.close, _LINGER_MS)
        with binding(address):
            socket.raw.bind(address)
        self._poll.register(socket.fileno(), select.POLLIN)
        return socket

    def serve(self) -> None:
        notify("READY=1")
        while not self._stop_signal.received:
            self._turn(float("inf"))
        notify("STOPPING=1")
        self._obey(self._core.handle(Drain(), time.monotonic()))
        until = time.monotonic() + self._settings.options.drain_max_s
        log.info(
            "broker draining",
            extra=fields(requests=self._core.ledger.requests, limit_s=self._settings.options.drain_max_s),
        )
        while self._core.ledger.requests and time.monotonic() < until:
            self._turn(until)
        if self._core.ledger.requests:
            log.warning("drain limit is over; requests are given up", extra=fields(requests=self._core.ledger.requests))
        self._obey(self._core.handle(End(), time.monotonic()))
        log.info("broker stopped", extra=fields(requests_left=self._core.ledger.requests))

    def stop(self) -> None:
        """Close what has been opened, in whatever state; what was said last is still delivered."""
        self._opened.close()

    def _turn(self, until: float) -> None:
        """Sleep until there is something to read, or until the core or ``until`` says, and read what there is."""
        if not (self._callers.pending or self._workers.pending):
            self._sleep(until)
        if self._callers.pending or self._workers.pending:
            self._read()
        now = time.monotonic()
        if self._backlog and now >= self._backlog_at:
            self._send_backlog(now)
        self._obey(self._core.handle(Tick(), now))
        self._watchdog.feed(now)

    def _read(self) -> None:
        until = time.monotonic() + _ROUND_S
        for heads, frames in self._callers.receive(2, _ROUND_MESSAGES):
            if self._hear("caller", FROM_CALLER, heads, frames) > until:
                break
        for heads, frames in self._workers.receive(2, _ROUND_MESSAGES):
            self._hear("worker", FROM_WORKER, heads, frames)

    def _sleep(self, until: float) -> None:
        now = time.monotonic()
        if now >= self._measure_at:
            self._measure_at = now + _MEASURE_S
            measure(self._core.meters)
            self._look_at_doors()
            if self._recorder is not None:
                self._recorder.flush()
        wait_s = min(self._core.due(), until, self._watchdog.due) - now
        if self._backlog:
            wait_s = min(wait_s, self._backlog_at - now)
        for readable, happened in self._poll.poll(max(0.0, wait_s) * 1000):
            if readable == self._callers.fileno():
                self._callers.pending = True
            elif readable == self._workers.fileno():
                self._workers.pending = True
            elif happened == select.POLLOUT:
                self._control.write(readable)
            else:
                self._read_control(readable)

    def _hear(self, process: str, kinds: Mapping[int, type[Message]], heads: list[bytes], frames: list[Any]) -> float:
        """Returns when it was taken in."""
        peer = heads[0]
        event: Event
        try:
            if len(peer) != PEER_ID_BYTES or len(heads) != 2:
                raise BadMessage(
                    f"a peer has an identity of {PEER_ID_BYTES} bytes and sends messages of one frame or more"
                )
            message = unpack(heads[1], frames, kinds)
            if isinstance(message, CallerHello | WorkerHello):
                self._read_controls()  # what it has sent there was sent before
            event = FromCaller(peer, message) if process == "caller" else FromWorker(peer, message)
            if self._recorder is not None and isinstance(message, Submit):
                self._recorder.add(message.groups, time.monotonic())
        except BadMessage as error:
            event = Garbage(process, str(error), peer[:PEER_ID_BYTES])
        now = time.monotonic()
        self._obey(self._core.handle(event, now))
        return now

    def _read_control(self, readable: int) -> None:
        if readable == self._stop_signal.fileno():
            self._stop_signal.clear()
        elif readable == self._control.listener:
            if self._control.accept():
                self._look_at_doors()
        elif readable in self._control:
            self._read_connection(readable)

    def _look_at_doors(self) -> None:
        if self._doors.look():
            self._control.resume()

    def _read_controls(self) -> None:
        """Whoever is about to introduce itself does it now."""
        self._read_control(self._control.listener)
        for fileno in self._control.unnamed():
            self._read_connection(fileno)

    def _read_connection(self, fileno: int) -> None:
        event = self._control.read(fileno)
        if isinstance(event, Gone):
            self._read()  # it may have said before that it leaves
        if event is not None:
            self._obey(self._core.handle(event, time.monotonic()))

    def _obey(self, commands: list[Command]) -> None:
        for command in commands:
            match command:
                case ToCaller(peer, message):
                    self._tell(peer, message)
                case ToWorker(peer, message):
                    self._send(self._workers, peer, message)
                case Log(level, event, about):
                    log.log(logging.getLevelNamesMapping()[level.upper()], event, extra=fields(**about))
                case Share(owner, reader, serial):
                    self._control.share(owner, reader, serial)
                case Sweep():
                    self._settings.runtime.sweep()
                case _:
                    raise AssertionError(f"unexpected command {command!r}")

    def _send(self, socket: Socket, peer: bytes, message: Message) -> None:
        if isinstance(message, Assign) and not self._control.shares(peer):
            self._bring(message)
        frames = message.frames if isinstance(message, Carrier) else ()
        outcome = socket.send((peer, pack(message)), frames)
        if outcome != "sent":
            reason = "it takes no messages" if outcome == "full" else "it is not connected"
            self._obey(self._core.handle(Gone(peer, reason), time.monotonic()))

    def _tell(self, caller: bytes, message: Message) -> None:
        """As ``_send``, for a caller that may not read for a while."""
        packed = pack(message)
        if caller not in self._backlog:
            outcome = self._callers.send((caller, packed))
            if outcome == "gone":
                self._obey(self._core.handle(Gone(caller, "it is not connected"), time.monotonic()))
            if outcome != "full":
                return
        # Who is asked to say hello is asked again with all that it says.
        if not isinstance(message, HelloWanted) and not self._backlog.add(caller, packed):
            log.warning(
                "caller reads nothing; what it asked for is given up",
                extra=fields(caller=caller.hex(), limit_bytes=_CALLER_WAITING_MAX_BYTES),
            )
            self._obey(self._core.handle(Gone(caller, "it reads nothing"), time.monotonic()))

    def _send_backlog(self, now: float) -> None:
        self._backlog_at = now + _CALLER_AGAIN_S
        # Who was silent for too long may stay connected: of such there may be more than callers_max.
        self._backlog.keep(self._core.callers)
        for caller in self._backlog.send(lambda peer, packed: self._callers.send((peer, packed))):
            self._obey(self._core.handle(Gone(caller, "it is not connected"), now))

    def _bring(self, message: Assign) -> None:
        """For a worker that shares no memory with the callers: what lies in their arenas travels."""
        if not any(group.places for group in message.groups):
            return
        inline: list[Any] = []
        frames: list[Any] = []
        at = sent = 0
        for group in message.groups:
            size, count = group.nbytes, len(group.ids)
            into = inline if size <= INLINE_MAX_BYTES else frames
            if group.places:
                into += [self._control.view(group.caller, place, size) for place in group.places]
            elif into is frames:
                into += message.frames[sent : sent + count]
                sent += count
            else:
                into.append(message.blob[at : at + size * count])
                at += size * count
        message.groups = [group._replace(places=()) for group in message.groups]
        message.blob, message.frames = b"".join(inline), frames


def bind_tcp(address: str, callers: Socket, workers: Socket) -> None:
    """Listen on a TCP port for callers and on the next one for workers; port 0 finds two that are free.

    Raises EndpointError: not loopback, or in use.
    """
    host, port = parse_host_port(address.removeprefix("tcp://"), address)
    if not address.startswith("tcp://"):
        raise EndpointError(f"--bind {address!r} is not of the form tcp://HOST:PORT")
    check_loopback(host, "--bind")
    shown = f"[{host}]" if ":" in host else host
    for _ in range(100 if port == 0 else 1):
        try:
            callers.raw.bind(f"tcp://{shown}:{port or '*'}")
            bound = int(callers.raw.get(zmq.LAST_ENDPOINT).rstrip(b"\0").rpartition(b":")[2])
            try:
                workers.raw.bind(f"tcp://{shown}:{bound + 1}")
            except zmq.ZMQError:
                callers.raw.unbind(f"tcp://{shown}:{bound}")
                raise
            log.info("listening on TCP", extra=fields(callers=f"tcp://{shown}:{bound}", workers=bound + 1))
            return
        except zmq.ZMQError as error:
            reason = str(error)
    raise EndpointError(f"cannot listen on {address} and the port after it: {reason}")
