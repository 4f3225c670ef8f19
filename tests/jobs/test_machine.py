"""Stores of both kinds against a model in memory that was written without them: whatever is done in whatever order."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from penstock.jobs.job import StoredRequest, StoredResponse
from penstock.jobs.options import JobsOptions
from penstock.jobs.store import Store, StoreFull

OPTIONS = JobsOptions(
    count_max=6,
    bytes_max=4000,
    result_bytes_max=1500,
    ttl_s=1500.0,
    tombstone_s=3000.0,
    attempts_max=3,
    callback_attempts_max=2,
)
LEASE_S = 10.0
OWNERS = st.sampled_from(["a", "b"])
STATES = ("queued", "running", "succeeded", "failed", "cancelled")


@dataclass
class Known:
    """What the model knows of a job."""

    status: str = "queued"
    size: int = 0
    body: bytes = b""
    answer: bytes | None = None
    owner: str = ""
    lease: float = 0.0
    wait: float = 0.0
    cancel: bool = False
    begun: int = 0
    deaths: int = 0
    expires: float | None = None
    buried: bool = False
    called: bool = False
    call_state: str = ""
    call_owner: str = ""
    call_due: float = 0.0
    calls: int = 0

    def end(self, status: str, now: float, answer: bytes | None = None) -> None:
        self.status, self.answer, self.owner, self.cancel = status, answer, "", False
        self.size = len(answer or b"")
        self.expires = now + OPTIONS.ttl_s
        if self.called:
            self.call_state, self.call_due = "pending", now

    def ended(self) -> bool:
        return self.expires is not None

    def gone(self, now: float) -> bool:
        return self.expires is not None and self.expires <= now


@dataclass
class Model:
    """By id, in the order of their arrival; those that are forgotten are not there."""

    jobs: dict[str, Known] = field(default_factory=dict)

    def kept(self) -> dict[str, Known]:
        return {id: job for id, job in self.jobs.items() if not job.buried}

    def bytes(self) -> int:
        return sum(job.size for job in self.kept().values())


class Machine(RuleBasedStateMachine):
    def __init__(self, fresh: Callable[[], Callable[[JobsOptions], Store]]) -> None:
        super().__init__()
        self.open = fresh()
        self.store = self.open(OPTIONS)
        self.model = Model()
        self.now = 1000.0
        self.change = self.store.change()

    def teardown(self) -> None:
        self.store.close()

    def any_id(self, data: st.DataObject) -> str:
        return str(data.draw(st.sampled_from(["unknown", *self.model.jobs])))

    def any_turn(self, data: st.DataObject, owner: str) -> tuple[str, str]:
        """A job and an owner, most often its own."""
        running = [id for id, job in self.model.kept().items() if job.status == "running"]
        own = data.draw(st.integers(0, 3)) > 0
        if running and own:
            id = data.draw(st.sampled_from(running))
            return id, self.model.jobs[id].owner
        return self.any_id(data), owner

    @initialize(count=st.integers(0, 4))
    def begin(self, count: int) -> None:
        for _ in range(count):
            self.submit(100, False)

    @rule(seconds=st.sampled_from([0.5, 4.0, 9.0, 11.0, 400.0, 1600.0]))
    def time_goes_on(self, seconds: float) -> None:
        self.now += seconds

    @rule()
    def another_process(self) -> None:
        self.store.close()
        self.store = self.open(OPTIONS)

    @rule(size=st.integers(0, 1800), called=st.booleans())
    def submit(self, size: int, called: bool) -> None:
        body = bytes(size)
        request = StoredRequest(b"POST", b"/", {"a": b"b"}, body, "m", "http://a" if called else "")
        total = size + 5 + 2 + (8 if called else 0)
        full = len(self.model.kept()) >= 6 or self.model.bytes() + total > 3000
        try:
            job = self.store.submit(request, self.now)
        except StoreFull:
            assert full
            return
        assert not full
        self.model.jobs[job.id] = Known(size=total, body=body, called=called)

    @rule(owner=OWNERS, count=st.integers(0, 4), remembers=st.booleans())
    def claim(self, owner: str, count: int, remembers: bool) -> None:
        kept = self.model.kept().items()
        running = {id for id, job in kept if remembers and job.status == "running" and job.owner == owner}
        wanted: list[str] = []
        for id, job in self.model.kept().items():
            if len(wanted) == count:
                break
            if job.status == "running" and job.lease <= self.now and id not in running:
                job.deaths += 1
                if job.cancel or job.deaths >= OPTIONS.attempts_max:
                    job.end("cancelled" if job.cancel else "failed", self.now)
                    continue
            elif job.status != "queued" or job.wait > self.now:
                continue
            job.status, job.owner, job.lease = "running", owner, self.now + LEASE_S
            job.begun += 1
            wanted.append(id)
        assert [job.id for job in self.store.claim(owner, count, self.now, LEASE_S, running)] == wanted

    @rule(owner=OWNERS)
    def renew(self, owner: str) -> None:
        held = {id for id, job in self.model.kept().items() if job.status == "running" and job.owner == owner}
        for id in held:
            self.model.jobs[id].lease = self.now + LEASE_S
        assert self.store.renew(owner, [*self.model.jobs, "unknown"], self.now, LEASE_S) == held

    @rule(data=st.data(), owner=OWNERS, size=st.integers(0, 1700), ok=st.booleans())
    def finish(self, data: st.DataObject, owner: str, size: int, ok: bool) -> None:
        id, owner = self.any_turn(data, owner)
        held = self.is_held(id, owner)
        response = StoredResponse(200, {}, b"x" * size)
        done = self.store.finish(id, owner, "succeeded" if ok else "failed", response, "", self.now)
        assert done == held
        if held:
            job = self.model.jobs[id]
            if size > 1500 or self.model.bytes() - job.size + size > 4000:
                job.end("failed", self.now)
            else:
                job.end("succeeded" if ok else "failed", self.now, response.body)

    @rule(data=st.data(), owner=OWNERS, wait=st.sampled_from([0.0, 5.0]))
    def put_back(self, data: st.DataObject, owner: str, wait: float) -> None:
        id, owner = self.any_turn(data, owner)
        held = self.is_held(id, owner)
        assert self.store.put_back(id, owner, self.now + wait, self.now) == held
        if held:
            job = self.model.jobs[id]
            if job.cancel:
                job.end("cancelled", self.now)
            else:
                job.status, job.owner, job.wait = "queued", "", self.now + wait

    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        id, _ = self.any_turn(data, "")
        got = self.store.cancel(id, self.now)
        job = self.model.jobs.get(id)
        if job is None:
            assert got is None
        elif job.status == "queued":
            job.end("cancelled", self.now)
        elif job.status == "running":
            job.cancel = True
        assert got is None or got in self.store.get([id], self.now)

    @rule()
    def sweep(self) -> None:
        due = [job for job in self.model.kept().values() if job.gone(self.now)]
        assert self.store.sweep(self.now) == len(due)
        for job in due:
            job.buried, job.size = True, 0

    @rule(owner=OWNERS)
    def callbacks(self, owner: str) -> None:
        wanted = set()
        for id, job in self.model.kept().items():
            if job.call_state == "pending" and job.call_due <= self.now:
                if job.calls >= 2:
                    job.call_state = "failed"
                else:
                    job.calls += 1
                    job.call_owner, job.call_due = owner, self.now + LEASE_S
                    wanted.add(id)
        assert {job.id for job in self.store.due_callbacks(owner, 100, self.now, LEASE_S)} == wanted

    @rule(data=st.data(), owner=OWNERS, ok=st.booleans(), again=st.booleans())
    def called(self, data: st.DataObject, owner: str, ok: bool, again: bool) -> None:
        id = self.any_id(data)
        job = self.model.kept().get(id)
        held = job is not None and job.call_state == "pending" and job.call_owner == owner
        next_at = self.now + 3.0 if again else None
        assert self.store.callback_done(id, owner, ok, "no", next_at) == held
        if held and job is not None:
            job.call_owner = ""
            job.call_state = "delivered" if ok else "pending" if again else "failed"
            job.call_due = self.now + 3.0

    def is_held(self, id: str, owner: str) -> bool:
        job = self.model.jobs.get(id)
        return job is not None and not job.buried and job.status == "running" and job.owner == owner

    @invariant()
    def both_say_the_same(self) -> None:
        for id, job in [*self.model.jobs.items()]:
            if job.expires is not None and job.expires + OPTIONS.tombstone_s <= self.now and job.buried:
                del self.model.jobs[id]
        now, known = self.now, self.model.jobs
        seen = {id: job for id, job in known.items() if not (job.gone(now - OPTIONS.tombstone_s))}
        got = self.store.get([*known, "unknown"], now)
        assert [job.id for job in got] == [*seen]
        for told, (id, wanted) in zip(got, seen.items(), strict=True):
            assert told.status == ("expired" if wanted.gone(now) else wanted.status)
            if wanted.gone(now):
                continue
            assert (told.attempts, told.deaths, told.cancel_wanted) == (wanted.begun, wanted.deaths, wanted.cancel)
            assert (told.owner, told.bytes, told.expires_at) == (wanted.owner, wanted.size, wanted.expires)
            request, response = self.store.request_of(id), self.store.response_of(id)
            assert (request is None) == wanted.ended()
            assert request is None or request.body == wanted.body
            assert (response and response.body) == wanted.answer
            if wanted.called:
                assert told.callback is not None
                assert (told.callback.state, told.callback.attempts) == (wanted.call_state, wanted.calls)
        live = [id for id, job in self.model.kept().items() if not job.gone(now)]
        assert [job.id for job in self.store.list(now)] == live[::-1]
        counts = self.store.counts()
        kept = [job.status for job in self.model.kept().values()]
        assert counts.by_status == {status: kept.count(status) for status in STATES}
        assert counts.bytes == self.model.bytes()
        assert counts.callbacks == sum(job.call_state == "pending" for job in self.model.kept().values())
        for owner in ("a", "b"):
            wanted_cancels = {id for id, job in known.items() if job.cancel and job.owner == owner}
            assert self.store.wanted_cancels(owner) == wanted_cancels


def test_a_store_does_what_the_model_does(fresh_stores: Callable[[], Callable[[JobsOptions], Store]]) -> None:
    class Test(Machine):
        def __init__(self) -> None:
            super().__init__(fresh_stores)

    run_state_machine_as_test(Test, settings=settings(max_examples=40, stateful_step_count=30, deadline=None))
