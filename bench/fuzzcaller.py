"""What ``fuzz.py`` says to the core that client and gateway share."""

from __future__ import annotations

import os
from contextlib import suppress
from random import Random
from typing import Any

from bench.fuzzexamples import ARENA_BYTES, EPOCH, LARGE, WORKERS, Examples, form_of
from bench.fuzzmutate import malformed, number
from bench.fuzztarget import CoreTarget, census, hear
from penstock.client.arrays import Forms
from penstock.client.caller import Caller, Identity
from penstock.client.events import Complete, Fail, FromWorker
from penstock.client.short import Short
from penstock.wire.arena import Arena
from penstock.wire.arena import Mapping as ArenaMapping
from penstock.wire.errors import BadMessage, PenstockError
from penstock.wire.events import ArenaCame, BrokerFound, BrokerLost, FromBroker, Garbage, Say, Tick
from penstock.wire.messages import (
    FROM_CALLER,
    ON_PUBLICATION,
    TO_CALLER,
    Bye,
    HelloWanted,
    Message,
    Models,
    Refusal,
    Refusals,
    Results,
    Welcome,
    WorkerAddress,
    Workers,
)


class Sink:
    """Of one request: it ends once."""

    def __init__(self, target: CallerCore) -> None:
        self._target = target
        self.ends = 0

    def complete(self, answer: Complete) -> None:
        self._end()
        if answer.held:
            self._target.held.append(answer.held)

    def fail(self, error: PenstockError) -> None:
        self._end()

    def _end(self) -> None:
        self.ends += 1
        assert self.ends == 1, "a request ended twice"
        self._target.open.discard(self)


class CallerCore(CoreTarget):
    """The callers' core, which client and gateway share: nonsense of a broker and of workers, and the short way."""

    name = "caller"
    share = 0.08

    def begin(self, random: Random) -> None:
        super().begin(random)
        self._examples = Examples(random)
        self._now = 1.0
        self._arena = Arena(ARENA_BYTES, "fuzz")
        self.caller = Caller(Identity(b"caller00", "gateway", 1, True, "here", calls_max=64))
        self.short = Short(self.caller, Forms())
        self.open: set[Sink] = set()
        self.held: list[int] = []
        self._serial = 0
        self._count = 0

    def make(self, random: Random) -> Any:
        for _ in range(random.choice((1, 2))):
            self._traffic(random)
        kind = random.random()
        if kind < 0.03:
            return random.choice((BrokerFound(), BrokerLost("it went"), Garbage("worker", "x")))
        if kind < 0.06:
            self._serial += 1
            worker = random.choice([*WORKERS, random.randbytes(8)])
            serial = random.choice((self._serial, number(random)))
            return ArenaCame(worker, serial, ArenaMapping(os.dup(self._arena.fd)))
        table = random.choice(("worker", "worker", "broker"))
        message, other = self._valid(random, table), self._valid(random, table)
        return table, random.random() < 0.5, *malformed(random, message, other, 0.85)

    def feed(self, each: Any) -> bool:
        understood = False
        if not isinstance(each, tuple):
            self._handle(each)
        else:
            table, short, head, frames = each
            if table == "worker" and short and not frames and self.short.take(head):
                understood = True
            else:
                message = hear(head, frames, ON_PUBLICATION if table == "worker" else TO_CALLER)
                if isinstance(message, BadMessage):
                    self._handle(Garbage(table, str(message)))
                else:
                    understood = True
                    self._handle(FromWorker(message) if isinstance(message, Results) else FromBroker(message))
        self._count += 1
        self._now += (0.0, 0.001, 0.05)[self._count % 3]
        self._handle(Tick())
        self._flush()
        if self._count % 20 == 0:
            self.caller.validate()
        return understood

    def _traffic(self, random: Random) -> None:
        kind = random.random()
        if not self.caller.membership.joined or kind < 0.02:
            self._handle(FromBroker(Welcome(EPOCH, "gateway", True, self._serial)))
            self._handle(FromBroker(Models(EPOCH, self._examples.models())))
        elif kind < 0.5 and len(self.caller.calls) < 64:
            form = form_of(1, random.choice((1, 2, LARGE // 4)))
            sink = Sink(self)
            self.open.add(sink)
            number_ = self.caller.submit(form, bytes(form.nbytes), random.choice((0.01, 1.0, 30.0)), sink, self._now)
            if random.random() < 0.1:
                self.caller.cancel(number_)
                self.open.discard(sink)
            self._flush()
        elif self.held and kind < 0.8:
            self.caller.release(self.held.pop(random.randrange(len(self.held))), self._now)

    def _valid(self, random: Random, table: str) -> Message:
        calls = list(self.caller.calls)
        ids = random.sample(calls, min(len(calls), random.randrange(1, 4))) or [1]
        if table == "worker":
            return self._examples.results(ids, random.choice(WORKERS), random.random() < 0.3)
        kind = random.choice((*TO_CALLER.values(), Models, Workers, Workers, Refusals, Refusals))
        if kind in (HelloWanted, Bye, Welcome) and random.random() < 0.8:
            kind = Refusals
        message = self._examples.any_of(kind)
        if isinstance(message, Refusals):
            message.refusals = [Refusal(each, "overloaded", "it is full", 1000) for each in ids]
        elif isinstance(message, Workers):
            self._serial += 1
            message.workers = [
                WorkerAddress(each, f"ipc:///run/{each.decode()}", random.choice((0, self._serial)), "w")
                for each in random.sample(WORKERS, random.randrange(4))
            ]
        return message

    def _handle(self, event: Any) -> None:
        for command in self.caller.handle(event, self._now):
            if isinstance(command, Complete):
                command.sink.complete(command)
            elif isinstance(command, Fail):
                command.sink.fail(command.error)
            elif isinstance(command, Say):
                self.said.append((command.message, FROM_CALLER))

    def _flush(self) -> None:
        if self.caller.wants_flush(self._now):
            for message in self.caller.flush(self._now):
                self.said.append((message, FROM_CALLER))

    def settle(self) -> int:
        self._handle(BrokerLost("the end"))
        self._now += 100.0
        self._handle(Tick())
        while self.held:
            self.caller.release(self.held.pop(), self._now)
        self._handle(FromBroker(Welcome(EPOCH, "gateway", True, 1 << 64)))
        self._handle(FromBroker(Workers(EPOCH, [])))
        self._flush()
        self.caller.validate()
        assert not self.open, f"{len(self.open)} requests never ended"
        assert not self.caller.calls, "requests are left"
        return census([value for name, value in vars(self.caller).items() if name != "models"])

    def close(self) -> None:
        with suppress(ValueError):
            self._arena.close()
