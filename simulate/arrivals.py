"""When which request arrives: all of it decided by the seed, and by nothing that happens to a request."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from penstock.simulate.scenario import Scenario, ScenarioError, Traffic
from penstock.simulate.trace import REQUESTS_MAX, Trace, read_trace
from penstock.wire.messages import Form

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]

_WINDOW_REQUESTS: Final = 50_000  # that are made at once, more or less
_DAY_POINTS: Final = 1440  # by which a day's curve is drawn
_CHUNK: Final = 4096


@dataclass(frozen=True, slots=True, eq=False)
class Kind:
    """Requests that differ in nothing but when they come, and with a trace in their time. ``traffic``: its number."""

    traffic: int
    form: Form
    deadline_s: float


class Arrival(NamedTuple):
    """``at``: seconds from the beginning of all traffic. ``kind``: its number."""

    at: float
    kind: int
    timeout_us: int


FormMaker = Callable[[str, str, int, int, str, int], Form]  # of a model, a version, rows, bytes, a tenant, a priority


class Arrivals:
    """Of the traffic of a scenario, but for that of users, each of whom waits for an answer: of these it has the kinds
    alone. Raises ScenarioError: a trace that cannot be read, or more requests than there may be."""

    def __init__(self, scenario: Scenario, make_form: FormMaker) -> None:
        """``make_form`` raises ScenarioError where there is no such model."""
        self.kinds: list[Kind] = []
        self.kinds_of: list[range] = []  # by the traffic's number
        self.shares_of: list[Floats] = []  # how likely each of these is
        self._sources: list[_Random | _Replayed] = []
        self._duration_s = scenario.duration_s
        for number, traffic in enumerate(scenario.traffic):
            first = len(self.kinds)
            if traffic.trace is not None:
                trace = read_trace(traffic.trace)
                self.kinds += [Kind(number, make_form(*asked), 0.0) for asked in trace.asked]
                self._sources.append(_Replayed(traffic, trace, first, scenario.load))
                shares = [1.0]
            else:
                shares = []
                for model, share in traffic.models:
                    for rows in traffic.rows:
                        form = make_form(model, "", rows, traffic.nbytes, traffic.tenant, traffic.priority)
                        self.kinds.append(Kind(number, form, traffic.deadline_s))
                        shares.append(share / len(traffic.rows))
                if not traffic.users:
                    seed = np.random.default_rng([scenario.seed, number])
                    self._sources.append(_Random(traffic, first, shares, scenario.load, seed))
            self.kinds_of.append(range(first, len(self.kinds)))
            self.shares_of.append(np.cumsum(shares))
        self.expected = sum(source.expected for source in self._sources)
        if self.expected > REQUESTS_MAX:
            raise ScenarioError(
                f"the traffic of '{scenario.name}' makes {self.expected:,.0f} requests; {REQUESTS_MAX:,} are allowed"
            )

    def __iter__(self) -> Iterator[Arrival]:
        windows = max(1, math.ceil(self.expected / _WINDOW_REQUESTS))
        for number in range(1, windows + 1):
            # The last reaches beyond the end, so that rounding leaves nobody out.
            until = self._duration_s * number / windows if number < windows else math.inf
            taken = [source.take(until) for source in self._sources]
            if not taken:
                return
            at, kinds, timeouts = (np.concatenate(column) for column in zip(*taken, strict=True))
            order = np.argsort(at, kind="stable")
            yield from map(Arrival, at[order].tolist(), kinds[order].tolist(), timeouts[order].tolist())


def curve(traffic: Traffic) -> tuple[Floats, Floats]:
    """Times, ascending, and how many requests have come on average until then; in between it is a straight line."""
    begin, end, rate = traffic.begin_s, traffic.end_s, traffic.rate
    if traffic.arrivals == "bursts":
        starts = np.arange(begin + traffic.burst_every_s - traffic.burst_length_s, end, traffic.burst_every_s)
        edges = np.unique(np.clip(np.concatenate(([begin, end], starts, starts + traffic.burst_length_s)), begin, end))
        middles = (edges[:-1] + edges[1:]) / 2
        inside = (middles - begin) % traffic.burst_every_s >= traffic.burst_every_s - traffic.burst_length_s
        rates = np.where(inside, traffic.burst_rate, rate)
        return edges, np.concatenate(([0.0], np.cumsum(rates * np.diff(edges))))
    if traffic.arrivals == "diurnal":  # least at the beginning, and most half a day later
        points = math.ceil((end - begin) / traffic.day_s * _DAY_POINTS) + 1
        times = np.linspace(begin, end, max(2, points))
        angle = 2 * np.pi * (times - begin) / traffic.day_s
        return times, rate * ((times - begin) - traffic.swing * traffic.day_s / (2 * np.pi) * np.sin(angle))
    return np.array([begin, end]), np.array([0.0, rate * (end - begin)])


class _Random:
    """Poisson arrivals, of a rate that may change: they come evenly on the scale of how many have come on average."""

    def __init__(
        self, traffic: Traffic, first: int, shares: Sequence[float], load: float, source: np.random.Generator
    ) -> None:
        self._times, mass = curve(traffic)
        self._mass = mass * load
        self.expected = float(self._mass[-1])
        self._first = first
        self._shares = np.cumsum(shares)
        self._timeout_us = round(traffic.deadline_s * 1e6)
        self._source = source
        self._waiting: Floats = np.empty(0)  # on that scale
        self._last = 0.0

    def take(self, until: float) -> tuple[Floats, Integers, Integers]:
        """Times, kinds and timeouts of those before a time."""
        limit = float(np.interp(until, self._times, self._mass)) if until < math.inf else self.expected
        while self._last < limit:
            more = self._last + np.cumsum(self._source.standard_exponential(_CHUNK))
            self._waiting = np.concatenate((self._waiting, more))
            self._last = float(more[-1])
        count = int(np.searchsorted(self._waiting, limit))
        at = np.interp(self._waiting[:count], self._mass, self._times)
        self._waiting = self._waiting[count:]
        kinds = np.searchsorted(self._shares, self._source.random(count) * self._shares[-1], side="right")
        return at, kinds + self._first, np.full(count, self._timeout_us)


class _Replayed:
    """A trace, from where its traffic begins to where it ends."""

    def __init__(self, traffic: Traffic, trace: Trace, first: int, load: float) -> None:
        counts = [len(timeouts) for _, _, timeouts in trace.groups]
        at = traffic.begin_s + np.repeat([at for at, _, _ in trace.groups], counts) / load
        count = int(np.searchsorted(at, traffic.end_s))
        self._at = at[:count]
        self._kinds = np.repeat([first + kind for _, kind, _ in trace.groups], counts)[:count]
        self._timeouts = np.array([us for _, _, timeouts in trace.groups for us in timeouts], np.int64)[:count]
        self.expected = float(count)
        self._taken = 0

    def take(self, until: float) -> tuple[Floats, Integers, Integers]:
        begin = self._taken
        self._taken = end = int(np.searchsorted(self._at, until))
        return self._at[begin:end], self._kinds[begin:end], self._timeouts[begin:end]
