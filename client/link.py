"""A caller's connections, for a loop of whatever kind.

All of them are behind one descriptor, ``fileno``. A loop of another calls ``pump`` when that is readable and when
``due`` has come; a loop that has nothing else calls ``wait`` and gives what it returns to ``handle``. Both call
``flush`` once after they have submitted.
"""

from __future__ import annotations

import logging
import os
import secrets
import select
import socket as sockets
import time
from collections.abc import Callable
from functools import partial
from typing import Final

from penstock.client.caller import Caller, Identity
from penstock.client.events import Command, Complete, Event, Fail, FromWorker, Hear, OrderDone, Report
from penstock.client.short import Short
from penstock.wire import control, zmtp
from penstock.wire.arena import Arena, ArenaSearch
from penstock.wire.codec import pack, unpack
from penstock.wire.connection import Broken, Connection
from penstock.wire.endpoints import BrokerAddress, EndpointError
from penstock.wire.errors import BadMessage
from penstock.wire.events import BrokerFound, BrokerLost, FromBroker, Garbage, Log, Say, Tick
from penstock.wire.messages import (
    ON_PUBLICATION,
    PEER_ID_BYTES,
    TO_CALLER,
    Beat,
    Bye,
    Carrier,
    Message,
    Metrics,
    Payload,
    Results,
)
from penstock.wire.process import fields, measure
from penstock.wire.slots import Slots

log = logging.getLogger("penstock.client")

_READABLE: Final[int] = select.EPOLLIN
EVENTS_MAX: Final = 64  # of one look; there may be more at the next
_CONTROL_AGAIN_S: Final = 0.02  # between two looks for a broker's control socket
_LINGER_S: Final = 0.2  # for what was said last
_FULL_AGAIN_S: Final = 0.1  # between two looks at what is due while the broker takes nothing


class Link:
    """One caller's connections to a broker and its workers. Belongs to one thread at a time; ``wait`` alone may be
    called while another has it.

    ``on_report`` is called with the whole server's metrics when they come.
    """

    def __init__(
        self,
        address: BrokerAddress,
        name: str,
        on_report: Callable[[Metrics], None],
        arena: Arena | None = None,
        search: ArenaSearch | None = None,
    ) -> None:
        """``arena``: of this process, whose descriptor workers on this host are given; ``search``: for one, if there
        is none. It is closed with the link.
        Raises EndpointError for an address whose sockets can be none."""
        number = bytes([secrets.randbelow(255) + 1]) + secrets.token_bytes(PEER_ID_BYTES - 1)
        self._address = address
        self._slots = None if arena is None else Slots(arena)
        self._search = search
        self._arena_at = 0.0 if search is not None else float("inf")  # when to look for it, or tell the broker of it
        self._on_report = on_report
        self.caller = Caller(Identity(number, name, os.getpid(), address.runtime is not None, str(address)))
        self._epoll = select.epoll()
        self.poll = self._epoll.poll  # as ``wait``, without a call between
        try:
            self.broker = Connection(self._epoll, address.callers, "DEALER", number)
        except EndpointError:
            self._epoll.close()
            raise
        # Before they are told; an owner that has more to measure replaces it.
        self.measure: Callable[[], None] = partial(measure, self.caller.meters)
        # An owner that orders models replaces it.
        self.on_order: Callable[[OrderDone], None] = lambda done: None
        self._subscription = zmtp.subscription(number)
        self._workers: dict[str, Connection] = {}  # by endpoint
        self._handlers: dict[int, Callable[[int], None]] = {}  # by descriptor
        self._filenos: dict[int, Connection] = {}  # those of workers
        self._retry_at = 0.0  # when the next connection is to be made (again)
        self.short: Short | None = None  # the way of plain answers, for who expects them
        self.will_flush = False  # its owner says so, that what it submits until then goes with the rest
        self._heard = False  # since ``take`` began, the core has been told of something
        self._full = False  # the broker takes nothing; it has been logged
        self._control: sockets.socket | None = None
        self._control_at = 0.0 if address.runtime is not None else float("inf")

    def slots(self) -> Slots | None:
        """Where large tensors lie so that workers read them there; None while they would not."""
        return self._slots if self.caller.shares else None

    def fileno(self) -> int:
        return self._epoll.fileno()

    def watch(self, fileno: int, handler: Callable[[int], None]) -> None:
        """Have ``handle`` call this too when a descriptor of the loop's own is readable."""
        self._handlers[fileno] = handler
        self._epoll.register(fileno, select.EPOLLIN)

    def due(self) -> float:
        """When ``pump`` has something to do even if nothing happens before."""
        due = self.caller.due()
        if self._full:
            due = max(due, time.monotonic() + _FULL_AGAIN_S)
        return min(due, self._control_at, self._retry_at, self._arena_at)

    def wait(self, timeout_s: float) -> list[tuple[int, int]]:
        """What has happened, to be given to ``handle``; nothing when the time is up."""
        return self._epoll.poll(timeout_s, EVENTS_MAX)

    def handle(self, events: list[tuple[int, int]]) -> None:
        """Take in what ``wait`` has seen, and do whatever is due."""
        self.take(events)
        self.tick()

    def take(self, events: list[tuple[int, int]]) -> bool:
        """Take in what ``wait`` has seen. Whether ``tick`` should follow: something else than plain answers came."""
        self._heard = False
        short = self.short
        for fileno, happened in events:
            worker = self._filenos.get(fileno)
            if worker is not None and short is not None and happened == _READABLE:
                head = worker.glance(short.topic_frame)
                if head is not None:
                    if not short.take(head):
                        self._from_worker([short.topic, bytes(head)])
                    continue
            handler = self._handlers.get(fileno)  # None: closed since
            if handler is not None:
                handler(happened)
        return self._heard

    def tick(self) -> None:
        """Do whatever is due."""
        now = time.monotonic()
        if now >= self._control_at:
            self._find_broker(now)
        if now >= self._retry_at:
            self._connect(now)
        if now >= self._arena_at:
            self._look_for_arena(now)
        if now >= self.caller.due():
            self._hear(Tick())
        if not self.will_flush and self.caller.wants_flush(now):
            self.flush()

    def pump(self) -> None:
        """Take in what has happened by now, and do whatever is due."""
        self.handle(self.wait(0))

    def flush(self) -> None:
        """Send what has been submitted and what is to be acknowledged. While the broker reads nothing, and enough waits
        for it, it stays in the core."""
        if self.broker.full:
            if not self._full:
                self._full = True
                log.warning("the broker takes no messages; requests wait")
            return
        self._full = False
        if not self.caller.has_news:
            return
        for message in self.caller.flush(time.monotonic()):
            if not self.broker.send((pack(message), *message.frames)):
                self.broke()
                break

    def broke(self) -> None:
        """What was sent has not been heard."""
        self._hear(BrokerLost("the connection to the broker broke"))

    def say(self, message: Message) -> None:
        if isinstance(message, Beat) and self.caller.identity.name:
            self.measure()
            message.samples, message.whole = self.caller.meters.changes()
        if not self.broker.full:
            self.broker.send((pack(message), *(message.frames if isinstance(message, Carrier) else ())))

    def close(self) -> None:
        """Say good-bye and close; what was said last is still delivered."""
        if self.caller.membership.joined:
            self.say(Bye(self.caller.membership.epoch))
        self.caller.close()
        self.broker.close(_LINGER_S)
        for connection in self._workers.values():
            connection.close()
        if self._control is not None:
            self._control.close()
        if self._slots is not None:
            self._slots.close()
        self._epoll.close()
        self._handlers.clear()  # they know the link and its owner, which would wait for a collection of garbage

    # --- connections ---

    def _connect(self, now: float) -> None:
        """Make those that are due (again)."""
        for connection in (self.broker, *self._workers.values()):
            if now >= connection.retry_at and connection.connect(now):
                self._handlers[connection.fileno] = partial(self._happened, connection)
                if connection is not self.broker:
                    self._filenos[connection.fileno] = connection
        self._set_retry()

    def _reached(self) -> None:
        """A broker can be spoken to, perhaps a new one, or one that has not got all that was said."""
        if self.caller.membership.joined:
            self._hear(BrokerLost("the connection to the broker broke"))
        if self._control is not None or self._address.runtime is None:
            self._hear(BrokerFound())

    def _happened(self, connection: Connection, events: int) -> None:
        fileno, was_ready = connection.fileno, connection.ready
        try:
            messages = connection.handle(events)
        except (Broken, BadMessage) as error:
            del self._handlers[fileno]
            self._filenos.pop(fileno, None)
            self._set_retry()
            if isinstance(error, BadMessage):
                self._hear(Garbage("broker" if connection is self.broker else "worker", str(error)))
            # A process that ends closes this and the control connection, which says so; else nobody does.
            if connection is self.broker and self._control is None and self.caller.membership.joined:
                self._hear(BrokerLost("the connection to the broker broke"))
            return
        if connection is self.broker and connection.ready and not was_ready:
            self._reached()
        hear = self._from_broker if connection is self.broker else self._from_worker
        for frames in messages:
            hear(frames)

    def _set_retry(self) -> None:
        self._retry_at = min([self.broker.retry_at, *[each.retry_at for each in self._workers.values()]])

    def _hear_worker(self, endpoint: str, on: bool) -> None:
        if on:
            try:
                self._workers[endpoint] = Connection(self._epoll, endpoint, "SUB", first=self._subscription)
            except EndpointError as error:
                log.warning("a worker's address cannot be used", extra=fields(endpoint=endpoint, reason=str(error)))
                return
        else:
            gone = self._workers.pop(endpoint, None)
            if gone is not None:
                self._handlers.pop(gone.fileno, None)
                self._filenos.pop(gone.fileno, None)
                gone.close()
        self._set_retry()

    # --- what comes ---

    def _from_worker(self, frames: list[Payload]) -> None:
        try:
            if len(frames) < 2:
                raise BadMessage("a result has a topic and a head")
            message = unpack(frames[1], frames[2:], ON_PUBLICATION)
            assert isinstance(message, Results)
            event: Event = FromWorker(message)
        except BadMessage as error:
            event = Garbage("worker", str(error))
        self._hear(event)

    def _from_broker(self, frames: list[Payload]) -> None:
        try:
            event: Event = FromBroker(unpack(frames[0], frames[1:], TO_CALLER))
        except BadMessage as error:
            event = Garbage("broker", str(error))
        self._hear(event)

    def _hear(self, event: Event) -> None:
        self._heard = True
        self._obey(self.caller.handle(event, time.monotonic()))

    def _obey(self, commands: list[Command]) -> None:
        commands.reverse()
        while commands:  # none is kept: what belongs to one that has been answered serves the next, and is in the cache
            command = commands.pop()
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
                case OrderDone():
                    self.on_order(command)
                case Log(level, event, about):
                    log.log(logging.getLevelNamesMapping()[level.upper()], event, extra=fields(**about))
                case _:
                    raise AssertionError(f"unexpected command {command!r}")

    def _find_broker(self, now: float) -> None:
        assert self._address.runtime is not None
        arena = control.NO_ARENA if self._slots is None else self._slots.arena.fd
        self._control = control.connect(self._address.runtime.control, self.caller.identity.id, arena)
        if self._control is None:
            self._control_at = now + _CONTROL_AGAIN_S
            return
        self._control_at = float("inf")
        if self._slots is not None:
            self._arena_at = float("inf")  # the broker has been told
        self.watch(self._control.fileno(), self._read_control)
        if self.broker.ready:
            self._hear(BrokerFound())
        elif self.broker.fileno < 0:
            self.broker.retry_at = self._retry_at = now  # who listens here listens there too

    def _look_for_arena(self, now: float) -> None:
        """For the memory that was not there at the beginning; and tell the broker when it is."""
        if self._slots is None:
            assert self._search is not None
            arena = self._search.look(now)
            self._arena_at = self._search.due
            if arena is None:
                return
            self._slots = Slots(arena)
        told = self._control is None or control.announce(
            self._control, self.caller.identity.id, self._slots.arena.fd
        )  # else when it is connected
        self._arena_at = float("inf") if told else now + _CONTROL_AGAIN_S

    def _read_control(self, events: int) -> None:
        """Take in the arenas of workers that the broker passes on, and its end."""
        assert self._control is not None
        try:
            for came in control.receive_arenas(self._control):
                self._hear(came)
        except ConnectionError as error:
            del self._handlers[self._control.fileno()]
            self._control.close()
            self._control = None
            self._control_at = 0.0
            self._hear(BrokerLost(str(error), isinstance(error, control.BrokerLeft)))
