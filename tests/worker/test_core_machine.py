"""Whatever a broker, callers and compute threads do, in whatever order: every request ends once and nothing is left."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from penstock.wire.arena import Arena
from penstock.wire.codec import ranges
from penstock.wire.errors import BAD_INPUT, DEADLINE, UNAVAILABLE
from penstock.wire.events import BrokerFound, BrokerLost, FromBroker
from penstock.wire.messages import Assign, Bye, Failure, Form, Freed, HelloWanted, Tasks
from penstock.wire.slots import PLACED_MIN_BYTES, Slots
from penstock.worker.events import Command, Event, Unsubscribed, Unwanted
from penstock.worker.model import Model

if TYPE_CHECKING:
    from tests.worker.conftest import Request, Talk

    StartTalk = Callable[..., Talk]

CALLERS = [b"caller a", b"caller b", b"caller c"]
READERS = {b"caller a", b"caller b"}  # read results in the worker's arena
WIDE = PLACED_MIN_BYTES // 4 + 1
ARENA_BYTES = 64 * 1024  # for few of them
Key = tuple[bytes, int]  # a request


class Sent(NamedTuple):
    """A request as it was assigned: its input holds ``value`` everywhere. ``code``: how it has to fail, if it has."""

    attempt: int
    value: float
    code: str
    urgent: bool  # may be too late


NOBODYS = Sent(0, 0.0, "", False)  # ended while no broker was there

GROUPS = st.lists(
    st.tuples(
        st.sampled_from(CALLERS),
        st.sampled_from([*["double", "twice", "slow", "padded", "tuned"] * 3, "lying", "unknown"]),
        st.integers(1, 3),  # rows of a request
        st.sampled_from([1, 2, 2, WIDE]),  # numbers in a row
        st.integers(1, 4),  # requests
        st.sampled_from([1, 1, 2]),  # attempt
        st.sampled_from([*[60_000_000] * 8, 4_000, 0]),  # microseconds
    ),
    min_size=1,
    max_size=3,
)
PART = st.lists(st.integers(0, 200), max_size=6)


class CoreMachine(RuleBasedStateMachine):
    """Plays the broker, the callers and the compute threads, and knows what the core should hold."""

    def __init__(self, start_talk: StartTalk, models: Sequence[Model]) -> None:
        super().__init__()
        self.models = {model.spec.name: model for model in models}
        self.slots = Slots(Arena(ARENA_BYTES, "test"))
        self.talk = start_talk(*models, instances=2, slots=self.slots)
        self.known: set[bytes] = set()
        self.assigned: dict[Key, Sent] = {}  # not DONE
        self.cancelled: set[Key] = set()  # or their caller has gone
        self.kept: dict[Key, Sent] = {}  # published, not freed, and their caller may be there to read it
        self.heard: Counter[bytes] = Counter()  # connections that are subscribed to a caller's results
        self.published: set[Key] = set()
        self.freeable: set[Key] = set()  # DONE, not freed
        self.lost: dict[Key, Sent] = {}  # were held when an epoch ended
        self.running: dict[Key, Sent] = {}  # of these, what has run on since, and may not be assigned any more
        self.last = 0
        self.joins = 0

    @property
    def joined(self) -> bool:
        return self.talk.core.membership.joined

    # --- what the core is told, and what must follow ---

    def follow(self, commands: list[Command], again: bool = False) -> None:
        """``again``: results are published anew, because somebody subscribed, or is expected again."""
        published: dict[Key, Sent] = {}
        for caller in CALLERS:
            for number, answer in self.talk.heard(commands, caller):
                key = (caller, number)
                if again or key in self.kept:
                    assert key in self.published  # what is freed may come once more beside what is not
                    continue
                assert caller in self.known or self.heard[caller]
                if not self.joined:
                    published[key] = NOBODYS
                    continue
                if key not in self.assigned and key not in self.running:
                    assert key in self.published  # beside what was answered before
                    continue
                sent = published[key] = self.assigned.get(key) or self.running[key]
                if isinstance(answer, Failure):
                    assert answer.code == sent.code or (sent.urgent and answer.code == DEADLINE), answer
                else:
                    assert not sent.code
                    assert (answer["y"] == sent.value * 2).all()
        for caller, attempt, nbytes, ids, _ in self.talk.done(commands):
            for number in ids:
                key = (caller, number)
                self.freeable.add(key)
                before = self.running.pop(key, None)
                if before is not None and self.assigned.get(key, NOBODYS).attempt != attempt:
                    assert before.attempt == attempt  # of which this broker does not know
                    continue
                assert self.assigned.pop(key).attempt == attempt
                if caller in self.known:
                    assert key in published or key in self.kept or (key in self.cancelled and not nbytes)
        self.kept |= published
        self.published |= published.keys()

    def hear(self, event: Event, after: float = 0.0) -> None:
        self.follow(self.talk.hear(event, after))

    def forget_epoch(self) -> None:
        self.lost |= self.assigned
        runs = {(lot.caller, number) for run in self.talk.batches for lot in run.batch.lots for number in lot.ids}
        self.running = {key: self.running.get(key) or self.assigned[key] for key in runs}
        self.lost |= {key: sent for key, sent in self.kept.items() if sent is not NOBODYS}
        for held in self.known, self.assigned, self.cancelled, self.freeable:
            held.clear()
        self.kept = {key: sent for key, sent in self.kept.items() if self.heard[key[0]]}
        self.freeable = set(self.kept)  # the caller says so to the new broker, which passes it on

    # --- the broker ---

    @initialize()
    def begin(self) -> None:
        self.welcome(["lost"])

    @rule(signs=st.lists(st.sampled_from(["lost", "bye", "unknown", "found", "same"]), max_size=2))
    def welcome(self, signs: list[str]) -> None:
        """A new broker, or the same one, welcomes the worker, perhaps after some signs that it will."""
        for sign in signs:
            if sign == "lost":
                self.hear(BrokerLost("its process ended"))
            elif sign == "found":
                self.hear(BrokerFound())
            elif self.joined:
                self.hear(FromBroker(Bye(self.talk.epoch) if sign == "bye" else HelloWanted(self.talk.epoch)))
            if self.talk.batches and not self.joined:
                self.finish(0)
        self.joins += "same" not in signs or not self.joins
        self.forget_epoch()
        self.follow(self.talk.join(self.joins))
        self.expect(set(CALLERS))

    @rule(callers=st.sets(st.sampled_from(CALLERS)))
    def expect(self, callers: set[bytes]) -> None:
        self.known |= callers
        self.follow(self.talk.expect(*sorted(callers), reading=sorted(callers & READERS)), again=True)

    @precondition(lambda self: self.known)
    @rule(at=st.integers(0, 2))
    def go(self, at: int) -> None:
        caller = sorted(self.known)[at % len(self.known)]
        self.known.discard(caller)
        self.cancelled |= {key for key in self.assigned if key[0] == caller}
        self.follow(self.talk.expect(gone=[caller]))
        self.leave(caller)

    def leave(self, caller: bytes) -> None:
        if caller not in self.known and not self.heard[caller]:
            self.kept = {key: sent for key, sent in self.kept.items() if key[0] != caller}

    @precondition(lambda self: self.known)
    @rule(groups=GROUPS, free=PART, cancel=PART)
    def assign(
        self, groups: list[tuple[bytes, str, int, int, int, int, int]], free: list[int], cancel: list[int]
    ) -> None:
        tasks: list[Tasks] = []
        blob = b""
        freed, cancelled = self.freed(free), self.cancels(cancel)
        for caller, name, rows, width, count, attempt, timeout_us in groups:
            if caller not in self.known:
                continue
            ids = range(self.last + 1, self.last + 1 + count)
            self.last += count
            form = self.form(name, rows, width)
            code = {"lying": BAD_INPUT, "unknown": UNAVAILABLE}.get(name, "")
            for number in ids:
                sent = Sent(attempt, float(number), code, timeout_us < 60_000_000)
                blob += self.send((caller, number), sent, rows, width)
            tasks.append(Tasks(form, caller, attempt, 0, tuple(ids), (timeout_us,) * count))
        alone = any(task.attempt > 1 for task in tasks)
        self.follow(self.talk.tell(Assign(self.talk.epoch, tasks, freed, cancelled, alone=alone, blob=blob)))

    @precondition(lambda self: self.known)
    @rule(groups=GROUPS)
    def assign_only(self, groups: list[tuple[bytes, str, int, int, int, int, int]]) -> None:
        """The same without more: hypothesis leaves some rules out of each run, and of these two seldom both."""
        self.assign(groups, [], [])

    @rule(free=PART, cancel=PART)
    def tidy(self, free: list[int], cancel: list[int]) -> None:
        self.follow(self.talk.tell(Assign(self.talk.epoch, [], self.freed(free), self.cancels(cancel))))

    @precondition(lambda self: self.lost)
    @rule(width=st.integers(1, 2), anew=st.booleans())
    def assign_again(self, width: int, anew: bool) -> None:
        """What was held when an epoch ended comes again under the same ids, with other values to tell them apart."""
        blob, tasks = b"", []
        for (caller, number), before in self.lost.items():
            if caller in self.known:
                attempt = 1 if anew else before.attempt + 1
                runs = (caller, number) in self.running
                sent = before._replace(attempt=attempt) if runs else Sent(attempt, before.value + 0.5, "", False)
                blob += self.send((caller, number), sent, 1, width)
                tasks.append(Tasks(self.form("double", 1, width), caller, sent.attempt, 0, (number,), (60_000_000,)))
        self.lost.clear()
        answered = [key for key in self.assigned if key in self.kept]
        self.follow(self.talk.tell(Assign(self.talk.epoch, tasks, blob=blob)))
        assert not any(key in self.assigned for key in answered), "what was answered before is run again"

    def form(self, name: str, rows: int, width: int) -> Form:
        model = self.models.get(name, self.models["double"])
        request: Request = self.talk.requests.ask(model, {"x": np.zeros((rows, width), np.float32)})
        form = request.form
        if name == "lying":
            return form._replace(rows=rows + 1)
        return form._replace(version="9") if name == "unknown" else form

    def send(self, key: Key, sent: Sent, rows: int, width: int) -> bytes:
        self.assigned[key] = sent
        return np.full((rows, width), sent.value, np.float32).tobytes()

    def freed(self, places: list[int]) -> list[Freed]:
        """Some of what is DONE, which its callers have acknowledged."""
        keys = sorted(self.freeable)
        chosen = {keys[at] for at in places if at < len(keys)}
        self.freeable -= chosen
        for held in self.kept, self.lost:  # what its caller has does not come again
            for key in chosen:
                held.pop(key, None)
        return as_freed(chosen)

    def cancels(self, places: list[int]) -> list[Freed]:
        keys = sorted(self.assigned)
        chosen = {keys[at] for at in places if at < len(keys)}
        self.cancelled |= chosen
        return as_freed(chosen)

    # --- callers, threads and time ---

    @rule(name=st.sampled_from(["double", "slow", "padded", "tuned"]), leaves=st.booleans())
    def replace(self, name: str, leaves: bool) -> None:
        """A model is loaded anew, perhaps after nobody was to ask for it any more; requests do not notice."""
        if leaves:
            self.hear(Unwanted(name, "1"))
        self.follow(self.talk.load(self.models[name]))

    @rule(caller=st.sampled_from(CALLERS))
    def subscribe(self, caller: bytes) -> None:
        commands = self.talk.subscribe(caller)
        self.heard[caller] += 1
        self.follow(commands, again=True)
        heard = {number for number, _ in self.talk.heard(commands, caller)}
        assert {number for each, number in self.kept if each == caller} <= heard

    @rule(caller=st.sampled_from(CALLERS))
    def unsubscribe(self, caller: bytes) -> None:
        self.hear(Unsubscribed(caller))
        self.heard[caller] = max(0, self.heard[caller] - 1)
        self.leave(caller)

    @precondition(lambda self: self.talk.batches)
    @rule(which=st.integers(0, 1))
    def finish(self, which: int) -> None:
        self.follow(self.talk.finish(which=which % len(self.talk.batches)))

    @rule(seconds=st.sampled_from([0.0, 0.001, 0.010, 0.5]))
    def wait(self, seconds: float) -> None:
        self.follow(self.talk.wait(seconds))

    # --- what holds all the time, and at the end ---

    @invariant()
    def core_holds_what_it_should(self) -> None:
        core = self.talk.core
        assert {(caller, number) for caller, held in core._kept.items() for number in held} == set(self.kept)
        if self.joined:
            held = {(caller, number) for caller, index in core._lots.items() for number in index}
            assert held == self.assigned.keys() | self.running.keys()
        for (caller, number), sent in self.kept.items():
            if sent is not NOBODYS:
                kept = core._kept[caller][number]
                answer = dict(self.talk.requests.read(kept.head, kept.frames, self.slots.arena))[number]
                if not isinstance(answer, Failure):
                    assert (answer["y"] == sent.value * 2).all(), "what a caller reads was overwritten"
        assert not core._idle or core._batcher.next(self.talk.now) is None, "an instance is idle beside work"

    def teardown(self) -> None:
        core = self.talk.core
        if not self.joined:  # nobody hears of what is DONE
            self.welcome([])
        for _ in range(1000):
            if not self.talk.batches and not self.assigned:
                break
            if self.talk.batches:
                self.finish(0)
            else:
                self.wait(0.010)
        self.follow(self.talk.tell(Assign(self.talk.epoch, [], as_freed(self.freeable | set(self.kept)))))
        assert core.holds_nothing
        assert core.kept_bytes == 0
        assert self.slots.arena.allocator.used == 0, "a slot is lost"
        self.slots.arena.close()
        assert core._idle == core.identity.instances
        assert not any(line.held for line in core._batcher._lines.values())


def as_freed(keys: set[Key]) -> list[Freed]:
    return [
        Freed(caller, ranges(sorted(number for each, number in keys if each == caller)))
        for caller in sorted({caller for caller, _ in keys})
    ]


def test_every_request_ends_once_whatever_happens(
    start_talk: StartTalk, double: Model, slow: Model, twice: Model, padded: Model, tuned: Model
) -> None:
    machine: Any = lambda: CoreMachine(start_talk, [double, slow, twice, padded, tuned])  # noqa: E731
    run_state_machine_as_test(machine, settings=settings(deadline=None, max_examples=80, stateful_step_count=80))
