"""A caller's sockets, for a loop of whatever kind.

The loop polls ``filenos`` and ``control_fileno``, calls ``pump`` or ``read_control`` when one is readable, ``pump``
also when ``due`` has come, and ``flush`` once after it has submitted.
"""

from __future__ import annotations

import logging
import os
import secrets
import socket as sockets
import time
from collections.abc import Callable
from typing import Any, Final

import zmq

from penstock.client.caller import Caller, Identity
from penstock.client.events import Command, Complete, Event, Fail, FromWorker, Hear, Report
from penstock.wire import control
from penstock.wire.arena import Arena
from penstock.wire.codec import pack, unpack
from penstock.wire.endpoints import BrokerAddress
from penstock.wire.errors import BadMessage
from penstock.wire.events import BrokerFound, BrokerLost, FromBroker, Garbage, Log, Say, Tick
from penstock.wire.messages import ON_PUBLICATION, PEER_ID_BYTES, TO_CALLER, Beat, Bye, Message, Metrics, Results
from penstock.wire.process import fields, measure
from penstock.wire.slots import Slots
from penstock.wire.sockets import Socket

log = logging.getLogger("penstock.client")

_ROUND_MESSAGES: Final = 64
_HIGH_WATER: Final = 100_000  # messages that may wait; a caller's bound of calls keeps it far below
_CONTROL_AGAIN_S: Final = 0.05  # between two looks for a broker's control socket


class Link:
    """One caller's connection to a broker and its workers. Belongs to one thread.

    ``on_report`` is called with the whole server's metrics when they come.
    """

    def __init__(
        self,
        context: zmq.Context[Any],
        address: BrokerAddress,
        name: str,
        on_report: Callable[[Metrics], None],
        arena: Arena | None = None,
    ) -> None:
        """``arena``: of this process, whose descriptor workers on this host are given. It is closed with the link."""
        number = bytes([secrets.randbelow(255) + 1]) + secrets.token_bytes(PEER_ID_BYTES - 1)
        self._address = address
        self._slots = None if arena is None else Slots(arena)
        self._on_report = on_report
        self.caller = Caller(Identity(number, name, os.getpid(), address.runtime is not None, str(address)))
        self._broker = Socket(context, zmq.DEALER, _HIGH_WATER, number)
        self._broker.raw.connect(address.callers)
        self._results = Socket(context, zmq.SUB, _HIGH_WATER)
        self._results.raw.set(zmq.SUBSCRIBE, number)
        self._control: sockets.socket | None = None
        self._control_at = 0.0 if address.runtime is not None else float("inf")

    def slots(self) -> Slots | None:
        """Where large tensors lie so that workers read them there; None while they would not."""
        return self._slots if self.caller.shares else None

    def filenos(self) -> tuple[int, int]:
        return self._broker.fileno(), self._results.fileno()

    def readable(self, fileno: int) -> None:
        """One of ``filenos`` is readable: ``pump`` will look there."""
        if fileno == self._broker.fileno():
            self._broker.pending = True
        elif fileno == self._results.fileno():
            self._results.pending = True

    @property
    def control_fileno(self) -> int | None:
        """The control connection's, while there is one; it changes only inside ``pump`` and ``read_control``."""
        return None if self._control is None else self._control.fileno()

    def due(self) -> float:
        """When ``pump`` has something to do even if nothing happens before."""
        if self._results.pending or self._broker.pending:
            return 0.0
        return min(self.caller.due(), self._control_at)

    def pump(self) -> bool:
        """Handle everything that has come, and whatever is due. Whether there is more already: then call again."""
        if self._results.pending:
            self._read_results()
        if self._broker.pending:
            self._read_broker()
        now = time.monotonic()
        if now >= self._control_at:
            self._find_broker(now)
        if now >= self.caller.due():
            self._hear(Tick())
        if self.caller.wants_flush(now):
            self.flush()
        return self._results.pending or self._broker.pending

    def flush(self) -> None:
        """Send what has been submitted and what is to be acknowledged."""
        for message in self.caller.flush(time.monotonic()):
            if self._broker.send((pack(message),), message.frames) != "sent":
                self._hear(BrokerLost("the connection to the broker broke"))
                break
        if self._broker.pending:
            self._read_broker()

    def say(self, message: Message) -> None:
        if isinstance(message, Beat) and self.caller.identity.name:
            measure(self.caller.meters)
            message.samples = self.caller.meters.samples()
        self._broker.send((pack(message),))

    def close(self) -> None:
        """Say good-bye and close; what was said last is still delivered."""
        if self.caller.membership.joined:
            self.say(Bye(self.caller.membership.epoch))
        self.caller.close()
        self._broker.close(200)
        self._results.close(0)
        if self._control is not None:
            self._control.close()
        if self._slots is not None:
            self._slots.close()

    def _read_results(self) -> None:
        for heads, frames in self._results.receive(2, _ROUND_MESSAGES):
            try:
                if len(heads) != 2:
                    raise BadMessage("a result has a topic and a head")
                message = unpack(heads[1], [frame.buffer for frame in frames], ON_PUBLICATION)
                assert isinstance(message, Results)
                event: Event = FromWorker(message)
            except BadMessage as error:
                event = Garbage("worker", str(error))
            self._hear(event)

    def _read_broker(self) -> None:
        for heads, frames in self._broker.receive(1, _ROUND_MESSAGES):
            try:
                event: Event = FromBroker(unpack(heads[0], frames, TO_CALLER))
            except BadMessage as error:
                event = Garbage("broker", str(error))
            self._hear(event)

    def _hear(self, event: Event) -> None:
        self._obey(self.caller.handle(event, time.monotonic()))

    def _obey(self, commands: list[Command]) -> None:
        for command in commands:
            match command:
                case Complete():
                    command.sink.complete(command)
                case Fail(sink, error):
                    sink.fail(error)
                case Say(message):
                    self.say(message)
                case Hear(endpoint, on):
                    self._hear_worker(endpoint, on)
                case Report(metrics):
                    self._on_report(metrics)
                case Log(level, event, about):
                    log.log(logging.getLevelNamesMapping()[level.upper()], event, extra=fields(**about))
                case _:
                    raise AssertionError(f"unexpected command {command!r}")

    def _hear_worker(self, endpoint: str, on: bool) -> None:
        self._results.pending = True  # to connect may swallow a wake-up, as to send does
        try:
            (self._results.raw.connect if on else self._results.raw.disconnect)(endpoint)
        except zmq.ZMQError as error:
            log.warning("a worker's address cannot be used", extra=fields(endpoint=endpoint, reason=str(error)))

    def _find_broker(self, now: float) -> None:
        assert self._address.runtime is not None
        arena = control.NO_ARENA if self._slots is None else self._slots.arena.fd
        self._control = control.connect(self._address.runtime.control, self.caller.identity.id, arena)
        if self._control is None:
            self._control_at = now + _CONTROL_AGAIN_S
        else:
            self._control_at = float("inf")
            self._hear(BrokerFound())

    def read_control(self) -> None:
        """Take in the arenas of workers that the broker passes on, and its end."""
        assert self._control is not None
        try:
            while (came := control.receive_arena(self._control)) is not None:
                self._hear(came)
        except BlockingIOError:
            return
        except BadMessage as error:
            log.warning("the broker talks nonsense", extra=fields(reason=str(error)))
        self._control.close()
        self._control = None
        self._control_at = 0.0
        self._hear(BrokerLost("the broker's process ended"))
