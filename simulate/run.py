"""Runs a scenario: the cores of a broker and of its workers, in virtual time, from the first arrival to the last end.

The only choices here are the scenario's. What is assigned where, batched with what and refused is decided by
``penstock.broker.core`` and ``penstock.worker.core``, which are told of events and of a time, as on a real server.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from random import Random
from typing import Final

import numpy as np

from penstock.simulate.arrivals import Arrivals
from penstock.simulate.clock import Clock
from penstock.simulate.costs import Drawn
from penstock.simulate.figures import ANSWERED, Collector, Figures, summarize
from penstock.simulate.peers import Broker, Gateway, Worker
from penstock.simulate.scenario import NEVER, Outage, Scenario, ScenarioError, WorkerGroup
from penstock.simulate.standin import StandIn, form_of
from penstock.wire.errors import PenstockError
from penstock.wire.messages import MAX_REQUESTS, Form
from penstock.worker.serving import Identity

_START_S: Final = 1.0  # from when the processes start to the first arrival; more with the beats of all of them
_AGAIN_S: Final = 0.001  # at least, before a user who was turned away asks again
_END_MAX_S: Final = 120.0  # from the end to when the broker must have forgotten everything
_GC_EVERY: Final = 200_000  # objects that are made before the collector looks for cycles, of which there are hardly any

Progress = Callable[[float, int], None]  # how much of the time has passed, seconds, and how many requests have come


def run(scenario: Scenario, label: str = "", validate: bool = False, progress: Progress | None = None) -> Figures:
    """``validate``: have every core check itself after each event; at the end they do in any case. Raises
    ScenarioError."""
    with _few_collections():
        return Run(scenario, validate, progress).run(label)


@contextmanager
def _few_collections() -> Iterator[None]:
    before = gc.get_threshold()
    gc.set_threshold(_GC_EVERY, 20, 100)
    try:
        yield
    finally:
        gc.set_threshold(*before)


class Run:
    """One run. Times inside are those of its clock; the traffic begins ``_START_S`` after it."""

    def __init__(self, scenario: Scenario, validate: bool = False, progress: Progress | None = None) -> None:
        self._scenario = scenario
        self._validate = validate
        self._progress = progress
        self.clock = Clock()
        self._costs = {(plan.name, plan.version): Drawn(plan.cost) for plan in scenario.models}
        self._models = {(plan.name, plan.version): StandIn(plan) for plan in scenario.models}
        # By the speed of workers: workers that are alike share them.
        self._at_speed = {
            group.speed: [StandIn(plan, group.speed) for plan in scenario.models] for group in scenario.groups
        }
        self._arrivals = Arrivals(scenario, self._form)
        self._waiting = iter(self._arrivals)
        self._next = next(self._waiting, None)
        self.collector = Collector(scenario, self._arrivals.kinds, _START_S)
        self.broker = Broker(self.clock, scenario.options, scenario.delays, scenario.step_s, validate)
        self.gateways = [self._gateway(number) for number in range(scenario.gateways)]
        self._turn = 0  # of the gateways
        self._users: dict[int, Random] = {}  # by their traffic
        self._asking = 0  # users that will ask again
        self._leaving = Random(f"{scenario.seed}/hangups")
        self._lives = 0
        self._told = 0.0
        self.arrived = 0
        self.ended = 0
        self._hangups = any(traffic.hangups for traffic in scenario.traffic)

    def run(self, label: str) -> Figures:
        scenario = self._scenario
        for group in scenario.groups:
            for number in range(group.count):
                self._start_worker((group, f"{group.name}-{number}", 0))
        if self._next is not None:
            self.clock.at(_START_S + self._next.at, self._arrive, None)
        for number, traffic in enumerate(scenario.traffic):
            if traffic.users:
                self._start_users(number)
        self.clock.run(self._goes_on)
        self._check()
        busy = self.broker.busy_s / max(1e-9, self.clock.now - _START_S)
        meters = self.broker.core.meters
        retries = sum(int(meters.value("penstock_retries", *key).value) for key in self._models)
        return summarize(label, scenario, self.collector, self._arrivals.kinds, retries, busy, self.clock.events)

    def _goes_on(self) -> bool:
        if self._next is not None or self._asking or self.arrived > self.ended:
            return True
        end = _START_S + self._scenario.duration_s
        if self.clock.now < end:
            return True  # the workers are measured until then, and what dies in it does
        if not self.broker.core.ledger.requests:
            return False
        assert self.clock.now < end + _END_MAX_S, "the broker does not forget what has ended"
        return True  # some wait for an acknowledgment

    def _check(self) -> None:
        """What holds when everything is over. Raises AssertionError."""
        end = self.clock.now
        for worker in list(self.broker.workers.values()):
            worker.live_until(end)
            worker.core.validate()
        self.broker.core.validate()
        assert self.arrived == self.ended, f"{self.arrived} requests came, and {self.ended} ended"
        assert not any(gateway.open for gateway in self.gateways), "a request has not ended"
        counted = sum(row.ended for row in self.collector.rows)
        assert counted == sum(row.arrived for row in self.collector.rows), "a request was not counted, or twice"

    # --- who is there ---

    def _form(self, model: str, version: str, rows: int, nbytes: int, tenant: str, priority: int) -> Form:
        """Raises ScenarioError."""
        versions = [each for name, each in self._models if name == model]
        if not versions or (version and version not in versions):
            asked = f"'{model}', version {version!r}" if versions else f"'{model}'"
            raise ScenarioError(
                f"{self._scenario.name}: the trace asks for model {asked}; add it to [[models]], with its version"
            )
        spec = self._models[model, version or versions[-1]].spec
        try:
            return form_of(spec, version or spec.version, rows, nbytes, tenant, priority)
        except PenstockError as error:
            raise ScenarioError(f"{self._scenario.name}: {error}") from None

    def _gateway(self, number: int) -> Gateway:
        peer = b"g" + number.to_bytes(7, "big")
        gateway = Gateway(self.clock, self.broker, peer, self._arrivals.kinds, self._scenario.delays, self._heard)
        self.broker.gateways[peer] = gateway
        return gateway

    def _start_worker(self, what: tuple[WorkerGroup, str, int]) -> None:
        """``what``: its group and name, and how many outages are behind it."""
        group, name, outages = what
        scenario, number = self._scenario, self._lives
        self._lives += 1
        models = [each for each in self._at_speed[group.speed] if each.spec.name in group.models]
        instances = group.instances or max(each.config.instances for each in models)
        peer = b"w" + number.to_bytes(7, "big")
        worker = Worker(
            self.clock,
            self.broker,
            Identity(peer, name, "simulated", number + 1, (f"ipc://{name}",), instances, True),
            models,
            self._costs,
            group.speed,
            group.parallel or instances,
            Random(f"{scenario.seed}/{name}/{outages}"),
            scenario.delays.hop_s,
            self.collector,
            self.collector.worker(name, group.name),
            self._validate,
        )
        self.broker.workers[peer] = worker
        worker.start()
        if outages < len(group.outages):
            outage = group.outages[outages]
            self.clock.at(_START_S + outage.dies_s, self._kill, (worker, outage, group, name, outages + 1))

    def _kill(self, what: tuple[Worker, Outage, WorkerGroup, str, int]) -> None:
        worker, outage, *again = what
        worker.die(outage.silent)
        if outage.returns_s < NEVER:
            self.clock.at(_START_S + outage.returns_s, self._start_worker, tuple(again))

    # --- what is asked ---

    def _arrive(self, _: None) -> None:
        """The next requests: one, or what comes within a step."""
        scenario, arrival = self._scenario, self._next
        assert arrival is not None
        until = arrival.at + scenario.step_s
        batches: list[list[tuple[int, float, int]]] = [[] for _ in self.gateways]
        while arrival is not None and arrival.at <= until:
            at, kind, timeout_us = arrival
            self.arrived += 1
            self.collector.arrived(kind, _START_S + at)
            batches[self._turn].append((kind, _START_S + at, timeout_us))
            self._turn = (self._turn + 1) % len(batches)
            arrival = next(self._waiting, None)
        self._next = arrival
        if arrival is not None:
            self.clock.at(_START_S + arrival.at, self._arrive, None)
        later = self.clock.now + scenario.step_s + scenario.delays.client_s
        for gateway, batch in zip(self.gateways, batches, strict=True):
            if batch:
                self.clock.at(later, self._ask, (gateway, batch))
        if self._progress is not None and until - self._told > scenario.duration_s / 200:
            self._told = until
            self._progress(until, self.arrived)

    def _ask(self, what: tuple[Gateway, list[tuple[int, float, int]]]) -> None:
        gateway, batch = what
        numbers: list[int] = []
        for at in range(0, len(batch), MAX_REQUESTS):
            numbers += gateway.ask(batch[at : at + MAX_REQUESTS])
        if not self._hangups:
            return
        for number, (kind, _, _) in zip(numbers, batch, strict=True):
            traffic = self._scenario.traffic[self._arrivals.kinds[kind].traffic]
            if traffic.hangups and self._leaving.random() < traffic.hangups:
                after_s = self._leaving.expovariate(1 / traffic.hangup_after_s) if traffic.hangup_after_s else 0.0
                self.clock.at(self.clock.now + after_s, gateway.cancel, number)

    def _heard(self, kind: int, sent: float, now: float, limit_s: float, code: str, after_s: float) -> None:
        self.ended += 1
        self.collector.ended(kind, sent, now, limit_s, code)
        number = self._arrivals.kinds[kind].traffic
        if number in self._users:
            traffic = self._scenario.traffic[number]
            # Whoever is turned away waits as long as the server says.
            wait_s = traffic.think_s if code == ANSWERED else max(traffic.think_s, after_s, _AGAIN_S)
            self._asking += 1
            self.clock.at(now + wait_s, self._user_asks, number)

    # --- users, who ask again once they are answered ---

    def _start_users(self, number: int) -> None:
        traffic = self._scenario.traffic[number]
        source = self._users[number] = Random(f"{self._scenario.seed}/users/{number}")
        for _ in range(round(traffic.users * self._scenario.load)):
            self._asking += 1
            begin = _START_S + traffic.begin_s + source.random() * traffic.think_s
            self.clock.at(begin, self._user_asks, number)

    def _user_asks(self, number: int) -> None:
        self._asking -= 1
        traffic, now = self._scenario.traffic[number], self.clock.now
        if now - _START_S >= traffic.end_s:
            return
        shares = self._arrivals.shares_of[number]
        at = int(np.searchsorted(shares, self._users[number].random() * shares[-1], side="right"))
        kind = self._arrivals.kinds_of[number][at]
        self.arrived += 1
        self.collector.arrived(kind, now)
        gateway = self.gateways[self._turn]
        self._turn = (self._turn + 1) % len(self.gateways)
        request = (kind, now, round(traffic.deadline_s * 1e6))
        self.clock.at(now + self._scenario.delays.client_s, self._ask, (gateway, [request]))
