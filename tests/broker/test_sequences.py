"""Sequences: on one worker, one after another, until they end, are forgotten, or their worker goes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from penstock.wire.messages import UNNAMED, Cost, Costs, Leaving
from penstock.wire.models import LOADING, Route
from tests.broker.conversation import EPOCH, CallerTalk, Conversation, WorkerTalk, model

MIDDLE, START, END, BOTH = 0, 1, 2, 3


class Scene:
    """Workers that serve m, and a caller that hears all of them."""

    def __init__(self, workers: int = 2, **options: Any) -> None:
        self.talk = Conversation(**options)
        self.caller = self.talk.caller()
        self.workers = [self.talk.worker(hears=[self.caller]) for _ in range(workers)]
        self.talk.tick()
        self.talk.forget()

    def ask(self, phase: int = MIDDLE, sequence: str = "a", **more: Any) -> int:
        [number] = self.caller.submit(sequence=sequence, phase=phase, **more)
        self.talk.tick()
        return number

    def where(self) -> dict[int, WorkerTalk]:
        """Who has been given what since this was last asked."""
        return {number: worker for worker in self.workers for number in worker.got()}

    def done(self, worker: WorkerTalk, *ids: int) -> None:
        worker.done(self.caller, *ids)
        self.caller.ack(*ids)
        self.talk.tick()

    def run(self, phase: int = MIDDLE, sequence: str = "a", **more: Any) -> WorkerTalk:
        """Who runs a request that is asked, and done, now."""
        number = self.ask(phase, sequence, **more)
        where = self.where()
        assert list(where) == [number]
        self.done(where[number], number)
        return where[number]

    def refused(self) -> list[tuple[int, str, str]]:
        self.talk.tick()
        return [(each.id, each.code, each.message) for each in self.caller.refusals()]


def unbegun(number: int, sequence: str = "a") -> list[tuple[int, str, str]]:
    sentence = (
        f"inference request for sequence {sequence} to model 'm' must specify the START flag on the first request of "
        "the sequence"
    )
    return [(number, "bad_input", sentence)]


def test_all_of_a_sequence_goes_to_one_worker() -> None:
    scene = Scene(4)
    first = scene.run(START)
    assert [scene.run() for _ in range(20)] == [first] * 20
    assert scene.run(END) is first
    assert scene.refused() == []


def test_sequences_are_spread_over_workers() -> None:
    scene = Scene(4)
    numbers = [scene.ask(START, each) for each in "abcd"]
    where = scene.where()
    assert {id(where[number]) for number in numbers} == {id(worker) for worker in scene.workers}


def test_one_after_another_in_the_order_in_which_they_came() -> None:
    scene = Scene()
    first = scene.ask(START)
    [(_, worker)] = scene.where().items()
    rest = [scene.ask() for _ in range(3)]
    assert scene.where() == {}
    for before, number in zip([first, *rest], [*rest, None], strict=True):
        scene.done(worker, before)
        assert scene.where() == ({} if number is None else {number: worker})
    assert scene.talk.held == (0, 0)


def test_those_of_one_message_too() -> None:
    scene = Scene()
    ids = scene.caller.submit(3, size=5, sequence="a", phase=START)
    scene.talk.tick()
    for number in ids:
        [(got, worker)] = scene.where().items()
        assert got == number
        scene.done(worker, number)
    assert scene.where() == {}


def test_others_are_served_beside_it() -> None:
    scene = Scene(1)
    scene.ask(START)
    assert len(scene.where()) == 1
    scene.ask()
    other = scene.ask(START, "b")
    [alone] = scene.caller.submit()
    scene.talk.tick()
    assert set(scene.where()) == {other, alone}


def test_it_begins_with_start_and_ends_with_end() -> None:
    scene = Scene()
    assert scene.refused() == []
    number = scene.ask()
    assert scene.refused() == unbegun(number)
    scene.run(BOTH)
    number = scene.ask()
    assert scene.refused() == unbegun(number)
    scene.run(START)
    scene.run(END)
    number = scene.ask(END)
    assert scene.refused() == unbegun(number)
    assert scene.talk.count("penstock_request_failures", "", "", "bad_input") == 3


def test_what_comes_behind_an_end_that_is_under_way_is_too_late() -> None:
    scene = Scene()
    scene.ask(BOTH)
    number = scene.ask()
    assert scene.refused() == unbegun(number)
    again = scene.ask(START)  # but it may begin anew
    [(first, worker)] = scene.where().items()
    scene.done(worker, first)
    assert scene.where() == {again: worker}


def test_sequences_of_other_models_and_versions_are_others() -> None:
    scene = Scene(1)
    for worker in scene.workers:
        worker.declare(model("m"), model("m", "2"), model("n"), routes=[Route("m", ("2",))])
    scene.run(START)
    for name, version in (("n", "1"), ("m", "2"), ("m", "")):
        number = scene.ask(name=name, version=version)
        [(refused, code, _)] = scene.refused()
        assert (refused, code) == (number, "bad_input")


def test_it_keeps_the_version_that_it_began_with() -> None:
    scene = Scene(1)
    [worker] = scene.workers
    worker.declare(model("m", "1"), routes=[Route("m", ("1",))])
    scene.run(START, version=UNNAMED + "1")
    worker.declare(model("m", "1"), model("m", "2"), routes=[Route("m", ("2", "1"))])
    for version in (UNNAMED + "2", UNNAMED + "1", ""):
        number = scene.ask(version=version)
        [group] = worker.work()
        assert (group.form.version, group.form.sequence, group.ids) == ("1", "", (number,))
        scene.done(worker, number)
    scene.run(END, version="")
    scene.ask(START, version="")
    assert [group.form.version for group in worker.work()] == ["2"]


@pytest.mark.parametrize("idle_s", [1.0, 5.0])
def test_it_is_over_when_nothing_comes_for_too_long(idle_s: float) -> None:
    scene = Scene(1)
    if idle_s != 1.0:
        scene.workers[0].say(Costs(EPOCH, [Cost("m", "1", 1, 4, 1000, (), (), int(idle_s * 1e6))]))
    scene.run(START)
    for _ in range(3):
        scene.talk.live(0.9 * idle_s)
        scene.run()
    first = scene.ask()
    [worker] = scene.where().values()
    scene.talk.live(3 * idle_s)  # as long as one runs it lives
    scene.done(worker, first)
    scene.run()
    scene.talk.live(1.1 * idle_s)
    number = scene.ask()
    assert scene.refused() == unbegun(number)


def test_it_is_forgotten_with_time() -> None:
    scene = Scene(1)
    for at in range(50):
        scene.run(START, str(at))
    assert len(scene.talk.core.ledger.sequences) == 50
    scene.talk.live(4.0)
    assert len(scene.talk.core.ledger.sequences) == 0


def lost(scene: Scene, *ids: int) -> None:
    refused = scene.refused()
    assert sorted([number for number, _, _ in refused]) == list(ids)
    for _, code, sentence in refused:
        assert code == "lost"
        assert sentence.startswith("the worker that had this sequence of model 'm' has gone, or serves it no more")


def test_with_its_worker_it_is_lost() -> None:
    scene = Scene()
    worker = scene.run(START)
    running, waiting = scene.ask(), scene.ask()
    assert scene.where() == {running: worker}
    scene.workers.remove(worker)
    worker.vanish()
    lost(scene, running, waiting)
    number = scene.ask()
    assert scene.refused() == unbegun(number)
    assert scene.run(START) is scene.workers[0]
    assert scene.talk.held == (0, 0)


def test_one_that_nothing_is_asked_of_is_lost_too() -> None:
    scene = Scene()
    worker = scene.run(START)
    scene.workers.remove(worker)
    worker.vanish()
    number = scene.ask()
    assert scene.refused() == unbegun(number)


def test_a_first_request_is_tried_elsewhere_and_the_others_follow() -> None:
    scene = Scene()
    first, second = scene.ask(START), scene.ask()
    [(_, worker)] = scene.where().items()
    scene.workers.remove(worker)
    worker.vanish()
    scene.talk.tick()
    [other] = scene.workers
    assert scene.where() == {first: other}
    other.done(scene.caller, first, attempt=2)
    scene.talk.tick()
    assert scene.where() == {second: other}


def test_what_begins_anew_behind_what_is_lost_goes_on_elsewhere() -> None:
    scene = Scene()
    worker = scene.run(START)
    running, waiting, anew, behind = scene.ask(), scene.ask(), scene.ask(START), scene.ask()
    scene.where()
    scene.workers.remove(worker)
    worker.vanish()
    assert sorted(number for number, code, _ in scene.refused() if code == "lost") == [running, waiting]
    [other] = scene.workers
    assert scene.where() == {anew: other}
    scene.done(other, anew)
    assert scene.where() == {behind: other}


def test_a_result_that_may_have_been_lost_is_not_made_again() -> None:
    scene = Scene()
    worker = scene.run(START)
    number = scene.ask()
    scene.where()
    worker.done(scene.caller, number, size=10)  # and is not acknowledged
    scene.workers.remove(worker)
    worker.vanish()
    lost(scene, number)
    assert scene.where() == {}


@pytest.mark.parametrize("how", ["leaving", "unloaded"])
def test_a_worker_that_serves_it_no_more_ends_it(how: str) -> None:
    scene = Scene()
    worker = scene.run(START)
    running, waiting = scene.ask(), scene.ask()
    scene.where()
    if how == "leaving":
        worker.say(Leaving(EPOCH))
    else:
        worker.declare(model("m", state=LOADING, batch=0))
    lost(scene, waiting)
    scene.done(worker, running)  # what it has, it ends
    assert scene.refused() == []
    number = scene.ask()
    assert scene.refused() == unbegun(number)


def test_who_cancels_goes_out_of_the_way() -> None:
    scene = Scene()
    first, second, third = scene.ask(START), scene.ask(), scene.ask()
    [(_, worker)] = scene.where().items()
    scene.caller.cancel(second)
    scene.talk.tick()
    scene.done(worker, first)
    assert scene.where() == {third: worker}
    scene.caller.cancel(third)  # the worker has it, so the next one waits for it
    fourth = scene.ask()
    assert scene.where() == {}
    scene.done(worker, third)
    assert scene.where() == {fourth: worker}


def test_what_waits_for_too_long_ends() -> None:
    scene = Scene()
    first, second, third = scene.ask(START), scene.ask(timeout_s=0.1), scene.ask()
    [(_, worker)] = scene.where().items()
    scene.talk.tick(0.2)
    assert [(number, code) for number, code, _ in scene.refused()] == [(second, "deadline")]
    scene.done(worker, first)
    assert scene.where() == {third: worker}


def test_a_caller_that_leaves_leaves_no_gap() -> None:
    scene = Scene(1)
    other = scene.talk.caller()
    [worker] = scene.workers
    worker.hear(other)
    scene.ask(START)
    other.submit(sequence="a")
    mine = scene.ask()
    scene.where()
    other.bye()
    scene.done(worker, 1)
    assert scene.where() == {mine: worker}


def test_it_waits_for_room_where_it_is_bound() -> None:
    scene = Scene()
    worker = scene.run(START)
    scene.caller.submit(40)  # both are full
    scene.talk.tick()
    full = worker.got()
    number = scene.ask()
    assert number not in scene.where()
    scene.done(worker, *full)
    assert scene.where()[number] is worker


def test_neither_they_nor_others_wait_for_ever() -> None:
    """Requests of many sequences, and others, for one worker that is never without work: both are served."""
    scene = Scene(1, queue_requests_max=1000)
    [worker] = scene.workers
    names = [f"s{at}" for at in range(20)]
    for name in names:
        scene.run(START, name)
    plain = set(scene.caller.submit(200))
    for name in names:
        for _ in range(10):
            scene.caller.submit(sequence=name)
    scene.talk.tick()
    served: list[bool] = []
    for _ in range(20):
        got = worker.got()
        assert got
        served += [number in plain for number in got]
        scene.done(worker, *got)
    assert 0.3 < sum(served) / len(served) < 0.7


@pytest.mark.parametrize(
    ("option", "sentence"), [("sequences_max", "keeps 3"), ("sequence_requests_max", "3 requests")]
)
def test_there_are_bounds(option: str, sentence: str) -> None:
    scene = Scene(**{option: 3})
    refused: Sequence[Any] = []
    for at in range(5):
        scene.ask(START, str(at) if option == "sequences_max" else "a")
        refused = refused or scene.refused()
    [(_, code, said)] = refused[:1]
    assert code == "overloaded"
    assert sentence in said
    assert option in said


def test_how_many_there_are_is_told() -> None:
    scene = Scene()
    scene.run(START)
    scene.run(START, "b")
    scene.ask()
    scene.ask()
    samples = {each.family: each.value for each in scene.talk.core._snapshots()[0].samples}
    assert samples["penstock_sequences"] == 2
    assert samples["penstock_queue_requests"] == 1


def test_a_caller_that_sends_again_goes_behind_what_still_runs() -> None:
    scene = Scene(1)
    [worker] = scene.workers
    scene.ask(START)
    scene.where()
    again = CallerTalk(scene.talk, scene.caller.id)
    scene.caller.bye()
    other = scene.talk.caller()
    worker.hear(other)
    [number] = other.submit(sequence="a")
    scene.talk.tick()
    assert worker.got() == []
    worker.done(again, 1)
    scene.talk.tick()
    assert worker.got() == [number]
