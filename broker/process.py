"""The broker as a process: one thread, one loop, which owns the sockets and obeys the core."""

from __future__ import annotations

import contextlib
import logging
import secrets
import select
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final

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
from penstock.wire.listener import Listener, Peer
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
    Payload,
    Submit,
    WorkerHello,
)
from penstock.wire.process import StopSignal, Watchdog, check_descriptor_limit, fields, measure, notify
from penstock.wire.zmtp import FRAME_MAX_BYTES

log = logging.getLogger("penstock.broker")

_ROUND_MESSAGES: Final = 64  # read from one socket before the others have their turn
_ROUND_S: Final = 0.02  # and at most for so long, whatever it takes to read one: others wait for what follows from it
_LAST_WORDS_S: Final = 0.1  # for what a process has said before it ended
_WORKER_OUT_MAX_BYTES: Final = 4 << 30  # that may wait for a worker; windows and bounds keep it far below
_CALLER_OUT_MAX_BYTES: Final = 16 << 20  # that may wait for a caller which does not read
_SLEEP_MAX_S: Final = 1e6  # epoll(7) has no larger times
_MEASURE_S: Final = 0.5
_LINGER_S: Final = 1.0  # for what was said last
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
        self._opened = contextlib.ExitStack()
        self._recorder: Recorder | None = None

    def start(self) -> None:
        runtime, opened, options = self._settings.runtime, self._opened, self._settings.options
        runtime.make()
        self._epoll = select.epoll()
        opened.callback(self._epoll.close)
        for path in runtime.callers, runtime.workers, runtime.control:
            opened.callback(Guard(path).release)
        self._doors = Doors()
        opened.callback(runtime.sweep)
        runtime.sweep()
        # It is closed last: whoever sees its end has been told already that the broker leaves.
        with binding(runtime.control):
            self._control = ControlServer(runtime.control, self._epoll, self._doors)
        opened.callback(self._control.close)
        self._callers = self._listen("caller", runtime.callers, _CALLER_OUT_MAX_BYTES, FRAME_MAX_BYTES)
        self._workers = self._listen("worker", runtime.workers, _WORKER_OUT_MAX_BYTES, MAX_HEAD_BYTES)
        if self._settings.bind:
            bind_tcp(self._settings.bind, self._callers, self._workers)
        self._stop_signal = StopSignal()
        opened.callback(self._stop_signal.restore)
        self._epoll.register(self._stop_signal.fileno(), select.EPOLLIN)
        self._core = Core(self._settings.options, secrets.randbits(63) | 1, time.monotonic())
        if self._settings.record is not None:
            self._recorder = Recorder(self._settings.record, self._settings.record_max_bytes)
            opened.callback(self._recorder.stop)
            self._recorder.start(time.monotonic())
        self._measure_at = 0.0
        self._watchdog = Watchdog()
        check_descriptor_limit(_PEER_DESCRIPTORS * (options.callers_max + options.workers_max), "callers and workers")
        log.info("broker started", extra=fields(runtime_dir=str(runtime.path), epoch=self._core.epoch))

    def _listen(self, role: str, path: Path, out_max_bytes: int, frame_bytes_max: int) -> Listener:
        listener = Listener(
            self._epoll, "ROUTER", out_max_bytes, self._doors, partial(self._ended, role), frame_bytes_max
        )
        self._opened.callback(listener.close, _LINGER_S)
        with binding(path):
            listener.bind_path(path)
        return listener

    def _ended(self, role: str, peer: Peer, wrong: str) -> None:
        """Whoever has gone is missed by its control connection, or for its silence: it may be back before that."""
        if wrong:
            self._obey(self._core.handle(Garbage(role, wrong, peer.id[:PEER_ID_BYTES]), time.monotonic()))

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
        self._look(until)
        if self._callers.pending or self._workers.pending:
            self._read()
        now = time.monotonic()
        self._obey(self._core.handle(Tick(), now))
        self._watchdog.feed(now)

    def _read(self) -> None:
        until = time.monotonic() + _ROUND_S
        for peer, frames in self._callers.receive(_ROUND_MESSAGES):
            if self._hear("caller", FROM_CALLER, peer.id, frames) > until:
                break
        for peer, frames in self._workers.receive(_ROUND_MESSAGES):
            self._hear("worker", FROM_WORKER, peer.id, frames)

    def _look(self, until: float) -> None:
        """See what has happened; sleep until something does if nothing is left to be done."""
        wait_s = 0.0
        if not (self._callers.pending or self._workers.pending):
            now = time.monotonic()
            if now >= self._measure_at:
                self._measure(now)
            wait_s = max(0.0, min(self._core.due(), until, self._watchdog.due) - now)
        for readable, happened in self._epoll.poll(wait_s if wait_s < _SLEEP_MAX_S else -1):
            if readable in self._callers:
                self._callers.happened(readable, happened)
            elif readable in self._workers:
                self._workers.happened(readable, happened)
            elif happened == select.EPOLLOUT:
                self._control.write(readable)
            else:
                self._read_control(readable)

    def _measure(self, now: float) -> None:
        self._measure_at = now + _MEASURE_S
        measure(self._core.meters)
        self._doors.look()
        self._callers.look(now)
        self._workers.look(now)
        if self._recorder is not None:
            self._recorder.flush()

    def _hear(self, process: str, kinds: Mapping[int, type[Message]], peer: bytes, frames: list[Payload]) -> float:
        """Returns when it was taken in."""
        event: Event
        try:
            if len(peer) != PEER_ID_BYTES:
                raise BadMessage(f"a peer has an identity of {PEER_ID_BYTES} bytes")
            message = unpack(frames[0], frames[1:], kinds)
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
            self._control.accept()
        elif readable in self._control:
            self._read_connection(readable)

    def _read_controls(self) -> None:
        """Whoever is about to introduce itself does it now."""
        self._read_control(self._control.listener)
        for fileno in self._control.unnamed():
            self._read_connection(fileno)

    def _read_connection(self, fileno: int) -> None:
        event = self._control.read(fileno)
        if isinstance(event, Gone):  # it may have said before that it leaves
            until = time.monotonic() + _LAST_WORDS_S
            while (self._callers.read(event.peer) or self._workers.read(event.peer)) and time.monotonic() < until:
                self._read()
        if event is not None:
            self._obey(self._core.handle(event, time.monotonic()))

    def _obey(self, commands: list[Command]) -> None:
        for command in commands:
            match command:
                case ToCaller(peer, message):
                    self._tell(peer, message)
                case ToWorker(peer, message):
                    self._send(peer, message)
                case Log(level, event, about):
                    log.log(logging.getLevelNamesMapping()[level.upper()], event, extra=fields(**about))
                case Share(owner, reader, serial):
                    self._control.share(owner, reader, serial)
                case Sweep():
                    self._settings.runtime.sweep()
                case _:
                    raise AssertionError(f"unexpected command {command!r}")

    def _send(self, peer: bytes, message: Message) -> None:
        """To a worker."""
        if isinstance(message, Assign) and not self._control.shares(peer):
            self._bring(message)
        frames = message.frames if isinstance(message, Carrier) else ()
        outcome = self._workers.send(peer, (pack(message), *frames))
        if outcome != "sent":
            reason = "it takes no messages" if outcome == "full" else "it is not connected"
            self._obey(self._core.handle(Gone(peer, reason), time.monotonic()))

    def _tell(self, caller: bytes, message: Message) -> None:
        """As ``_send``, for a caller."""
        outcome = self._callers.send(caller, (pack(message),))
        if outcome == "gone":
            self._obey(self._core.handle(Gone(caller, "it is not connected"), time.monotonic()))
        # Who is asked to say hello is asked again with all that it says.
        elif outcome == "full" and not isinstance(message, HelloWanted):
            log.warning(
                "caller reads nothing; what it asked for is given up",
                extra=fields(caller=caller.hex(), limit_bytes=_CALLER_OUT_MAX_BYTES),
            )
            self._obey(self._core.handle(Gone(caller, "it reads nothing"), time.monotonic()))

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


def bind_tcp(address: str, callers: Listener, workers: Listener) -> None:
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
            bound = callers.bind_tcp(host, port)
            try:
                workers.bind_tcp(host, bound + 1)
            except (OSError, OverflowError):
                callers.unbind_tcp(bound)
                raise
            log.info("listening on TCP", extra=fields(callers=f"tcp://{shown}:{bound}", workers=bound + 1))
            return
        except OSError as error:
            reason = error.strerror or str(error)
        except OverflowError:  # the port after the last
            reason = "there is no port after it"
    raise EndpointError(f"cannot listen on {address} and the port after it: {reason}")
