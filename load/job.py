"""What a generator is told to do, and what it hands back. Times are nanoseconds of the monotonic clock, which all
processes of a machine share."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Final

from penstock.load.histogram import Histogram
from penstock.wire.tensors import Array

SLICES: Final = 50  # of the measured time, for what changes in it
TEXT_MAX: Final = 300  # characters of an error's text that are kept

OK: Final = "ok"
LATE: Final = "late"  # answered, but after the deadline
EXPIRED: Final = "expired"  # no answer within the timeout
UNSENT: Final = "unsent"  # too many were outstanding


@dataclass(frozen=True, slots=True)
class HttpTarget:
    """``request``: all bytes of it, head and body, the same each time."""

    host: str
    port: int
    request: bytes


@dataclass(frozen=True, slots=True)
class LibraryTarget:
    """``address``: of a broker, as ``Client`` takes it. ``priority``, ``tenant``: of all requests."""

    address: str
    model: str
    version: str
    inputs: dict[str, Array]
    priority: int = 0
    tenant: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """``connections``: closed loop, how many ask, each again when it is answered; open loop, how many are opened before
    it begins. ``rate``: arrivals a second, 0 for a closed loop. ``outstanding_max``: open loop, how many requests are
    sent and not answered at most; what arrives beyond is not sent, and counted. ``deadline_s``: 0 for none."""

    target: HttpTarget | LibraryTarget
    connections: int
    rate: float
    outstanding_max: int
    warmup_s: float
    duration_s: float
    timeout_s: float
    deadline_s: float
    seed: int


@dataclass(slots=True)
class Slice:
    """A part of the measured time. ``taken``: of requests that were to start in it, from then to their answer (or to
    where one stopped waiting). ``answered``: those whose answer, one without error, came in it."""

    taken: Histogram = field(default_factory=Histogram)
    answered: int = 0


@dataclass(slots=True)
class Tally:
    """What was measured. ``outcomes``: of the requests that were to start in the measured time, how many ended how.
    ``texts``: for an outcome that is an error, what the first of them said. ``behind``: how much later than intended
    requests of an open loop were sent. ``refusals``: of requests that an error answered, from when they were to start
    to that. ``own_cpu_s``: processor time of each generator while it was measured.
    ``outstanding``: the most at once."""

    slices: list[Slice] = field(default_factory=lambda: [Slice() for _ in range(SLICES)])
    outcomes: dict[str, int] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)
    behind: Histogram = field(default_factory=Histogram)
    refusals: Histogram = field(default_factory=Histogram)
    own_cpu_s: list[float] = field(default_factory=list)
    outstanding: int = 0

    def add(self, other: Tally) -> None:
        for mine, its in zip(self.slices, other.slices, strict=True):
            mine.taken.add(its.taken)
            mine.answered += its.answered
        for outcome, count in other.outcomes.items():
            self.outcomes[outcome] = self.outcomes.get(outcome, 0) + count
        self.texts = other.texts | self.texts
        self.behind.add(other.behind)
        self.refusals.add(other.refusals)
        self.own_cpu_s += other.own_cpu_s
        self.outstanding += other.outstanding

    def taken(self) -> Histogram:
        """Of the whole time."""
        whole = Histogram()
        for each in self.slices:
            whole.add(each.taken)
        return whole

    def export(self) -> dict[str, Any]:
        """As JSON carries it."""
        return {
            "slices": [[each.taken.export(), each.answered] for each in self.slices],
            "outcomes": self.outcomes,
            "texts": self.texts,
            "behind": self.behind.export(),
            "refusals": self.refusals.export(),
            "own_cpu_s": self.own_cpu_s,
            "outstanding": self.outstanding,
        }

    @classmethod
    def load(cls, exported: dict[str, Any]) -> Tally:
        return cls(
            [Slice(Histogram.load(taken), answered) for taken, answered in exported["slices"]],
            exported["outcomes"],
            exported["texts"],
            Histogram.load(exported["behind"]),
            Histogram.load(exported["refusals"]),
            exported["own_cpu_s"],
            exported["outstanding"],
        )


class Meter:
    """Books what happens into a tally. ``begin``: of the measured time."""

    def __init__(self, begin: int, duration_s: float, deadline_s: float) -> None:
        self.tally = Tally()
        self.begin = begin
        self.end = begin + round(duration_s * 1e9)
        self._width = (self.end - begin) / SLICES
        self._deadline = round(deadline_s * 1e9) or 1 << 62
        self.answers = 0  # without error, since the start

    def answered(self, intended: int, now: int) -> None:
        """An answer without error."""
        self.answers += 1
        tally = self.tally
        if self.begin <= now < self.end:
            tally.slices[min(SLICES - 1, int((now - self.begin) / self._width))].answered += 1
        if self.begin <= intended < self.end:
            tally.slices[min(SLICES - 1, int((intended - self.begin) / self._width))].taken.record(now - intended)
            outcome = OK if now - intended <= self._deadline else LATE
            tally.outcomes[outcome] = tally.outcomes.get(outcome, 0) + 1

    def expired(self, intended: int, now: int) -> None:
        """Nobody waits for its answer any more. It counts among the latencies with the time that was waited: without
        those that took longest of all, these would look better the worse it gets."""
        if self.begin <= intended < self.end:
            self.tally.slices[min(SLICES - 1, int((intended - self.begin) / self._width))].taken.record(now - intended)
            self.failed(intended, EXPIRED)

    def refused(self, intended: int, now: int, outcome: str, text: str) -> None:
        """Answered with an error. Its time is kept apart: it says nothing of how long an answer takes."""
        if self.begin <= intended < self.end:
            self.tally.refusals.record(now - intended)
            self.failed(intended, outcome, text)

    def failed(self, intended: int, outcome: str, text: str = "") -> None:
        """Another end, which is counted only."""
        if self.begin <= intended < self.end:
            outcomes = self.tally.outcomes
            outcomes[outcome] = outcomes.get(outcome, 0) + 1
            if text and outcome not in self.tally.texts:
                self.tally.texts[outcome] = text[:TEXT_MAX]

    def sent(self, intended: int, now: int, outstanding: int) -> None:
        """Of an open loop. ``outstanding``: with it."""
        if self.begin <= intended < self.end:
            self.tally.behind.record(now - intended)
            if outstanding > self.tally.outstanding:
                self.tally.outstanding = outstanding
