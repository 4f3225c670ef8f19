"""Anything may happen in any order, and every request ends once for its caller.

Hypothesis plays callers, workers, the clock and the sockets between them. Peers are honest about who they are and
otherwise careless: they say things twice, too late, about requests that they do not have, and die at any moment. The
core is validated after every event (see Conversation); here stands what peers may expect of it.
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule

from penstock.wire.messages import (
    INLINE_MAX_BYTES,
    Assign,
    CallerHello,
    Cost,
    Costs,
    Done,
    Expect,
    Finished,
    Form,
    Leaving,
    Refusals,
    Requests,
    Submit,
    WorkerHello,
)
from penstock.wire.models import LOADING, Route
from tests.broker.conversation import EPOCH, CallerTalk, Conversation, WorkerTalk, model, spread

T = TypeVar("T")

CALLERS, WORKERS = 3, 3
LARGE = INLINE_MAX_BYTES + 1
MODELS = {"m": model("m", batch=4), "n": model("n", batch=2)}

HAPPENINGS = (
    *("caller", "remote caller", "worker", "sharing worker", "tcp worker"),
    *("heard", "heard", "heard", "unheard", "models", "models", "costs", "nonsense", "leaving"),
    *("caller bye", "caller gone", "caller hello", "worker gone", "worker gone", "worker hello", "worker stopped"),
)

picks = st.lists(st.integers(0, 50), max_size=8) | st.just([*range(50)])  # some of what there is, or all


@dataclass
class CallerLife:
    """What a caller knows of its requests, since it last said hello."""

    talk: CallerTalk
    before: int = 0  # the last id of its life before
    groups: list[Requests] = field(default_factory=list)  # all that it asked for,
    sizes: dict[int, int] = field(default_factory=dict)  # and how large each is
    answered: set[int] = field(default_factory=set)  # have a result, which may be acknowledged or not
    acknowledged: set[int] = field(default_factory=set)
    cancelled: set[int] = field(default_factory=set)
    refused: set[int] = field(default_factory=set)
    closed: set[int] = field(default_factory=set)  # the broker knew that they had ended when it last spoke

    @property
    def open(self) -> list[int]:
        return sorted(self.sizes.keys() - self.answered - self.acknowledged - self.cancelled - self.refused)


@dataclass
class WorkerLife:
    """What a worker has, since it last said hello. Requests are known by caller and id."""

    talk: WorkerTalk
    holds: dict[tuple[bytes, int], int] = field(default_factory=dict)  # the attempt
    earlier: set[tuple[bytes, int]] = field(default_factory=set)  # of these, what its caller has sent anew since
    keeps: set[tuple[bytes, int]] = field(default_factory=set)  # results, until they are freed
    hears: set[bytes] = field(default_factory=set)
    serves: set[str] = field(default_factory=lambda: set(MODELS))
    shares: bool = False  # callers read results in its memory, so it keeps them until they are acknowledged


def some(things: Sequence[T], picks: list[int]) -> list[T]:
    return [things[pick % len(things)] for pick in picks] if things else []


def part_of(group: Requests, ids: Container[int]) -> Requests | None:
    """Those of a group that are sent again."""
    at = [at for at, number in enumerate(group.ids) if number in ids]
    places = tuple(group.places[each] for each in at) if group.places else ()
    timeouts_us = tuple(group.timeouts_us[each] for each in at)
    return Requests(group.form, tuple(group.ids[each] for each in at), timeouts_us, places) if at else None


def place_of(number: int) -> int:
    """Where in its caller's arena the payload of a request lies."""
    return number * 64


class CoreMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.talk = Conversation(
            queue_requests_max=12,
            held_requests_max=25,
            caller_requests_max=15,
            held_bytes_max=6 * LARGE,
            unacknowledged_bytes_max=100,
            attempts_max=5,
            unserved_grace_s=3.0,
            queue_rows_max=20,
            queue_bytes_max=5 * LARGE,
            tenant_weights={"heavy": 3.0},
            sequences_max=3,
            sequence_requests_max=4,
        )
        self.callers: dict[bytes, CallerLife] = {}
        self.workers: dict[bytes, WorkerLife] = {}
        self.sequences: dict[tuple[bytes, int], tuple[str, str, str]] = {}  # which requests are of one
        self.suspects: set[tuple[bytes, int]] = set()  # a worker died that had them, and none has finished them since
        for who in ("caller", "caller", "worker", "worker"):
            self.join(who)

    def caller(self, pick: int) -> CallerLife:
        return list(self.callers.values())[pick % len(self.callers)]

    def worker(self, pick: int) -> WorkerLife:
        return list(self.workers.values())[pick % len(self.workers)]

    def has_caller(self) -> bool:
        return bool(self.callers)

    def has_worker(self) -> bool:
        return bool(self.workers)

    # --- what the broker says ---

    def hear(self) -> None:
        """Have everybody read what has come, in its order."""
        for caller in self.callers.values():
            for refusals in caller.talk.take(Refusals):
                for refusal in refusals.refusals:
                    self.refuse(caller, refusal.id)
            caller.talk.inbox.clear()
        for worker in self.workers.values():
            for message in worker.talk.inbox:
                if isinstance(message, Expect):
                    gone = {each.caller for each in message.gone}
                    worker.hears -= gone
                    if not worker.shares:
                        worker.keeps = {key for key in worker.keeps if key[0] not in gone}
                elif isinstance(message, Assign):
                    self.assigned(worker, message)
            worker.talk.inbox.clear()

    def tick(self, seconds: float) -> None:
        self.talk.tick(seconds)
        for number in self.workers.keys() - self.talk.core.workers.keys():
            self.died(self.workers.pop(number))
        self.hear()
        for caller in self.callers.values():
            caller.closed = caller.acknowledged | caller.cancelled | caller.refused

    def refuse(self, caller: CallerLife, number: int) -> None:
        assert number in caller.sizes, "a refusal of what was never asked for"
        assert number not in caller.closed, f"request {number} ended twice"
        assert number not in caller.refused, f"request {number} was refused twice"
        caller.refused.add(number)

    def assigned(self, worker: WorkerLife, message: Assign) -> None:
        for freed in message.freed:
            for number in spread(freed.ranges):
                known = (freed.caller, number) in worker.keeps
                stray = number in self.callers[freed.caller].acknowledged
                assert known or stray, f"request {number} was freed and is not kept"
                worker.keeps.discard((freed.caller, number))
        for cancelled in message.cancelled:
            caller = self.callers[cancelled.caller]
            for number in spread(cancelled.ranges):
                ended = number in caller.cancelled or number in caller.acknowledged
                assert ended, f"request {number} was cancelled by nobody"
        assert message.overtaking <= len(message.groups)
        if message.alone:
            assert [len(group.ids) for group in message.groups] == [1]
            assert worker.holds == {}, "a suspect was given to a worker that has something else"
        for group, start in zip(message.groups, message.starts, strict=True):
            assert group.caller in worker.hears, "work for a caller that does not hear this worker"
            assert group.form.model in worker.serves, "work for a model that this worker does not serve"
            caller, size = self.callers[group.caller], group.nbytes
            for at, number in enumerate(group.ids):
                key = (group.caller, number)
                assert message.alone or key not in self.suspects, f"{key} may have killed a worker, and is not alone"
                holders = [each for each in self.workers.values() if key in each.holds]
                assert holders == [] or number <= caller.before, f"{key} was given to two workers"
                assert number not in caller.closed, f"{key} had ended, and was assigned"
                if group.places:
                    assert group.places[at] == place_of(number)
                else:
                    payload = message.frames[start + at] if size == LARGE else message.blob[start + at * size :][:size]
                    assert payload == bytes([number % 256]) * caller.sizes[number]
                sequence = self.sequences.get(key)
                beside = [
                    each for each in worker.holds.keys() - {key} if sequence and self.sequences.get(each) == sequence
                ]
                assert beside == [], f"{key} is with {worker.talk.id.hex()} beside {beside} of its sequence"
                worker.holds[key] = group.attempt
                worker.earlier.discard(key)

    def died(self, worker: WorkerLife) -> None:
        self.suspects |= worker.holds.keys() - worker.earlier

    # --- callers ---

    @precondition(has_caller)
    @rule(
        pick=st.integers(0, 9),
        name=st.sampled_from("mmmmnnn?"),
        version=st.sampled_from(["1", "1", ""]),
        rows=st.sampled_from([1, 1, 1, 1, 2, 2, 3, 5]),
        sizes=st.lists(st.sampled_from([0, 5, LARGE]), min_size=1, max_size=2),
        count=st.integers(1, 6),
        tenant=st.sampled_from(["", "", "t", "heavy"]),
        priority=st.sampled_from([0, 0, 1, 5]),
        timeouts_s=st.lists(st.sampled_from([0.0, 0.4, 2.0, 60.0, 60.0, 60.0, 60.0]), min_size=6, max_size=6),
        mixed=st.booleans(),
        placed=st.booleans(),
        sequence=st.sampled_from(["", "", "", "a", "b"]),
        phase=st.sampled_from([0, 0, 1, 1, 2, 3]),
        acks=picks,
        cancels=picks,
        tick=st.booleans(),
    )
    def caller_speaks(
        self,
        pick: int,
        name: str,
        version: str,
        rows: int,
        sizes: list[int],
        count: int,
        tenant: str,
        priority: int,
        timeouts_s: list[float],
        mixed: bool,
        placed: bool,
        sequence: str,
        phase: int,
        acks: list[int],
        cancels: list[int],
        tick: bool,
    ) -> None:
        """Groups of one or two forms, whose ids may be mixed; acknowledgments and cancels travel with them."""
        caller = self.caller(pick)
        ended = some(sorted(caller.answered), acks)
        unwanted = some(caller.open, cancels)[:2]
        first = caller.talk.last_id + 1
        ids = range(first, first + count * len(sizes))
        caller.talk.last_id = ids[-1]
        groups: list[Requests] = []
        for at, size in enumerate(sizes):
            form = Form(
                name, version, priority, tenant, rows, size, b"", b"%d" % at, sequence, phase if sequence else 0
            )
            own = ids[at :: len(sizes)] if mixed else ids[at * count : (at + 1) * count]
            places = tuple(map(place_of, own)) if placed and size == LARGE else ()
            groups.append(Requests(form, tuple(own), tuple(int(each * 1e6) for each in timeouts_s[:count]), places))
            caller.sizes |= dict.fromkeys(own, size)
            if sequence:
                self.sequences |= {(caller.talk.id, number): (name, version, sequence) for number in own}
        self.submit(caller, groups, ended, unwanted)
        if tick:
            self.tick(0.001)

    @precondition(has_caller)
    @rule(pick=st.integers(0, 9), acks=picks, cancels=picks, anything=st.sampled_from([False, False, True]))
    def caller_ends_requests(self, pick: int, acks: list[int], cancels: list[int], anything: bool) -> None:
        """Acknowledge what has come and cancel what has not, or say either of anything at all."""
        caller = self.caller(pick)
        every = sorted(caller.sizes)
        ended = some(every if anything else sorted(caller.answered), acks)
        self.submit(caller, [], ended, some(every if anything else caller.open, cancels))

    def submit(self, caller: CallerLife, groups: list[Requests], acks: list[int], cancels: list[int]) -> None:
        travel = [group for group in groups if not group.places]
        payloads = [bytes([number % 256]) * group.nbytes for group in travel for number in group.ids]
        blob = b"".join(each for each in payloads if len(each) != LARGE)
        frames = [each for each in payloads if len(each) == LARGE]
        pairs = [number for each in sorted(set(acks)) for number in (each, each)]
        message = Submit(EPOCH, groups, pairs, cancels, blob=blob, frames=frames)
        caller.groups += groups
        caller.talk.say(message)
        caller.acknowledged |= set(acks)
        caller.cancelled |= set(cancels) - caller.acknowledged

    # --- workers ---

    @precondition(has_worker)
    @rule(
        pick=st.integers(0, 9),
        picks=picks,
        size=st.sampled_from([0, 1, 60]),
        delivered=st.sampled_from([True, True, False]),
        twice=st.booleans(),
        tick=st.booleans(),
    )
    def worker_is_done(
        self, pick: int, picks: list[int], size: int, delivered: bool, twice: bool, tick: bool = False
    ) -> None:
        """With some of what it has; whether their callers have heard the results by now is another matter."""
        worker = self.worker(pick)
        groups: dict[tuple[bytes, int], list[int]] = {}
        for caller, number in dict.fromkeys(some(list(worker.holds), picks)):
            attempt = worker.holds.pop((caller, number))
            self.suspects.discard((caller, number))
            groups.setdefault((caller, attempt), []).append(number)
            worker.keeps.add((caller, number))
            if delivered:
                self.deliver(caller, number)
        done = [Finished(*key, size, tuple(ids), 700 * len(ids) * delivered) for key, ids in groups.items()]
        worker.talk.say(Done(EPOCH, done * 2 if twice else done))
        if tick:
            self.tick(0.001)

    def deliver(self, caller: bytes, number: int) -> None:
        life = self.callers.get(caller)
        if life is not None and number in life.open:
            life.answered.add(number)

    # --- coming and going ---

    @rule(
        what=st.sampled_from(HAPPENINGS),
        pick=st.integers(0, 9),
        whom=st.integers(0, 9),
        serves=st.sets(st.sampled_from(sorted(MODELS))),
        removed=st.booleans(),
    )
    def something_happens(self, what: str, pick: int, whom: int, serves: set[str], removed: bool) -> None:
        if what in ("caller", "remote caller", "worker", "tcp worker"):
            self.join(what, 1 + removed)
        elif what.startswith("caller"):
            if self.callers:
                self.end_caller(self.caller(pick).talk, what)
        elif self.workers:
            worker = self.worker(pick)
            if what in ("heard", "unheard"):
                if self.callers:
                    self.attach(worker, self.caller(whom).talk, what == "heard")
            elif what == "models":
                others = [] if removed else [model(name, state=LOADING, batch=0) for name in MODELS.keys() - serves]
                # Some that it serves on are asked for by nobody any more.
                routes = [Route(name, ("1",) if (pick + at) % 3 else ()) for at, name in enumerate(sorted(MODELS))]
                worker.talk.declare(*(MODELS[name] for name in sorted(serves)), *others, routes=routes)
                worker.serves = serves
            elif what == "costs":  # of a worker that is slow or quick, and of models that it may not have
                slow = 1000 if removed else 10
                costs = [Cost(name, "1", 1 + whom % 2, 2 + pick % 3, 500, (1, 4), (slow, 3 * slow)) for name in serves]
                worker.talk.say(Costs(EPOCH, costs))
            elif what == "leaving":
                worker.talk.say(Leaving(EPOCH))
                worker.serves = set()
            elif what == "nonsense":  # done with other attempts than those that it has, and with what it does not have
                wrong = [Finished(*key[:1], attempt + 1, 5, key[1:]) for key, attempt in worker.holds.items()]
                unknown = [Finished(caller, 1, 5, (999, 1000)) for caller in [*self.callers, b"nobody.."]]
                worker.talk.say(Done(EPOCH, wrong + unknown))
            elif what == "worker stopped":  # it is lost when it has work and does not answer
                self.talk.stopped.add(worker.talk.id)
            else:
                self.end_worker(worker.talk, what)

    @precondition(has_caller)
    @rule(pick=st.integers(0, 9), tick=st.booleans())
    def caller_sends_again(self, pick: int, tick: bool) -> None:
        """What workers may have begun, to a broker that has forgotten it."""
        self.end_caller(self.caller(pick).talk, "caller hello")
        if tick:
            self.tick(0.001)

    def join(self, who: str, instances: int = 1) -> None:
        if "caller" in who and len(self.callers) < CALLERS:
            caller = self.talk.caller(local=who == "caller", arena_bytes=1 << 40)
            self.callers[caller.id] = CallerLife(caller)
        elif "worker" in who and len(self.workers) < WORKERS:
            callers = [each.talk for each in self.callers.values()]
            endpoints = ["ipc:///run/w.sock"] + ["tcp://10.0.0.1:1"] * (who == "tcp worker")
            shares = who == "sharing worker"
            worker = self.talk.worker(
                *MODELS.values(),
                hears=callers,
                instances=instances,
                endpoints=endpoints,
                connected=shares,
                arena_bytes=1 << 40,
            )
            self.workers[worker.id] = WorkerLife(worker, hears=set(self.callers), shares=shares)

    def attach(self, worker: WorkerLife, caller: CallerTalk, attached: bool) -> None:
        worker.talk.hear(caller, attached)
        worker.hears = worker.hears | {caller.id} if attached else worker.hears - {caller.id}

    def end_caller(self, caller: CallerTalk, how: str) -> None:
        before = self.callers.pop(caller.id)
        if how != "caller hello":
            for worker in self.workers.values():
                worker.keeps = {key for key in worker.keeps if key[0] != caller.id}
        if how == "caller bye":
            caller.bye()
        elif how == "caller gone":
            caller.vanish()
        else:
            # To the broker these are new requests, of which it knows nothing bad.
            self.suspects = {key for key in self.suspects if key[0] != caller.id}
            for worker in self.workers.values():
                worker.earlier |= {key for key in worker.holds if key[0] == caller.id}
            caller.say(CallerHello(0, "", 1, True, caller.last_id))
            life = self.callers[caller.id] = CallerLife(caller, caller.last_id)
            life.sizes = {number: before.sizes[number] for number in before.open}
            self.submit(life, [part for group in before.groups if (part := part_of(group, life.sizes))], [], [])
            hearing = [worker for worker in self.workers.values() if caller.id in worker.hears]
            self.hear()
            for worker in hearing:
                self.attach(worker, caller, True)
        self.hear()

    def end_worker(self, worker: WorkerTalk, how: str) -> None:
        before = self.workers.pop(worker.id)
        if how == "worker gone":
            worker.vanish()
            self.died(before)
        else:
            models = tuple(MODELS.values())
            worker.say(WorkerHello(0, "w", "cpu", 1, ("ipc:///run/w.sock",), 1, models))
            for caller in self.callers.values():
                worker.hear(caller.talk)
            kept = before.keeps if before.shares else set()
            self.workers[worker.id] = WorkerLife(worker, keeps=kept, hears=set(self.callers), shares=before.shares)

    # --- time ---

    @rule(seconds=st.sampled_from([0.0, 0.0, 0.005, 0.02, 0.3]))
    def time_passes(self, seconds: float) -> None:
        self.tick(seconds)

    @rule(steps=st.sampled_from([1, 1, 2, 8]), stopped=st.booleans())
    def much_time_passes(self, steps: int, stopped: bool) -> None:
        """While everybody beats, or while the broker was stopped."""
        if stopped:
            self.tick(steps * 2.0)
        for _ in range(steps):
            self.talk.beat()
            self.tick(0.5)

    # --- the end ---

    def teardown(self) -> None:
        """Everybody becomes careful and patient: then everything that is left ends."""
        self.talk.stopped.clear()
        while len(self.workers) >= WORKERS:
            self.end_worker(self.worker(0).talk, "worker gone")
        self.join("tcp worker", 2)
        for worker in self.workers.values():  # which others of their sequence are bound to
            for caller in self.callers.values():
                self.attach(worker, caller.talk, True)
        for _ in range(120):  # suspects run one after another
            self.tick(0.02)
            for at, worker in enumerate(list(self.workers.values())):
                self.worker_is_done(at, list(range(len(worker.holds))), 1, True, False)
                for number, request in list(worker.keeps):
                    self.deliver(number, request)  # what was lost on the way is published again
            for caller in self.callers.values():
                again = {key[1] for each in self.workers.values() for key in each.keeps if key[0] == caller.talk.id}
                self.submit(caller, [], sorted(caller.answered - caller.acknowledged | again), [])
            if self.talk.held == (0, 0):
                break
        assert self.talk.held == (0, 0), "something is held for ever"
        self.tick(0.02)
        self.tick(0.02)
        for life in self.callers.values():
            assert life.open == [], "some requests never ended"
        for worker in self.workers.values():
            assert worker.holds == {}
            assert {key for key in worker.keeps if key[0] in self.callers} == set(), "results are kept for ever"


TestCore = CoreMachine.TestCase
TestCore.settings = settings(
    max_examples=120, stateful_step_count=50, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
