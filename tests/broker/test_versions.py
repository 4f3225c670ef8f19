"""Versions that come and go while requests are under way, as the broker sees it."""

from __future__ import annotations

import time

import pytest

from penstock.broker.events import FromWorker
from penstock.broker.registry import RETIRE_AFTER_S
from penstock.wire.messages import Leaving, Models, Unload, Wake, WorkerHello, WorkerModels
from penstock.wire.models import IDLE, LOADING, UNAVAILABLE, ModelSpec, ModelState, Route, TensorSpec
from tests.broker.conversation import EPOCH, CallerTalk, Conversation, WorkerTalk, model

OTHER = ModelSpec("m", "2", "onnx", (TensorSpec("x", "INT64", (-1,)),), (TensorSpec("x", "FP32", (-1,)),), True, 4)
ONE, TWO = Route("m", ("1",)), Route("m", ("2",))


def current(caller: CallerTalk) -> str:
    """The version that it was told last that is."""
    return next(iter(caller.take(Models)[-1].routes[0].versions), "")


def current_of(talk: Conversation) -> str:
    return talk.core.registry.find("m", "", talk.now).key[1]


def unloaded(worker: WorkerTalk) -> list[tuple[str, str]]:
    return [(name, version) for message in worker.take(Unload) for name, version in message.versions]


def test_a_new_version_is_current_once_all_workers_serve_it() -> None:
    talk = Conversation()
    caller = talk.caller()
    one, two = (talk.worker(model(), hears=[caller], name=name) for name in "ab")
    talk.tick()
    assert current(caller) == "1"
    one.declare(model(), model(version="2", state=LOADING, batch=0), routes=[TWO])
    one.declare(model(), model(version="2"))
    talk.tick()
    assert current(caller) == "1"
    two.declare(model(), model(version="2"), routes=[TWO])
    talk.tick()
    assert current(caller) == "2"


def test_a_version_that_some_worker_cannot_load_leaves_the_old_one_current() -> None:
    talk = Conversation()
    caller = talk.caller()
    one, two = (talk.worker(model(), hears=[caller], name=name) for name in "ab")
    one.declare(model(), model(version="2"), routes=[TWO])
    two.declare(model(), model(version="2", state=UNAVAILABLE, reason="no memory", batch=0), routes=[TWO])
    talk.tick()
    assert current(caller) == "1"
    talk.live(RETIRE_AFTER_S + 1)
    assert unloaded(one) + unloaded(two) == []
    caller.submit(version="")
    talk.tick()
    assert [group.form.version for worker in (one, two) for group in worker.work()] == ["1"]


def test_what_nobody_asks_for_is_unloaded_when_its_requests_have_ended() -> None:
    talk = Conversation()
    caller = talk.caller()
    worker = talk.worker(model(), hears=[caller])
    (first,) = caller.submit()
    talk.tick()
    worker.declare(model(), model(version="2"), routes=[TWO])
    # Who has not heard yet asks for the old one.
    (late,) = caller.submit()
    talk.tick()
    assert caller.refused() == {}
    talk.live(RETIRE_AFTER_S + 0.5)
    assert unloaded(worker) == []
    (refused,) = caller.submit()
    talk.tick()
    assert caller.refused() == {refused: "not_found"}
    worker.finish(worker.work())
    talk.live(0.5)
    assert unloaded(worker) == [], "its results have not been acknowledged"
    caller.ack(first, late)
    talk.live(0.5)
    assert unloaded(worker) == [("m", "1")]
    talk.live(5.0)
    assert unloaded(worker) == [], "once is enough"
    worker.declare(model(version="2"))
    talk.tick()
    assert [state.version for state in caller.take(Models)[-1].models] == ["2"]


def test_results_that_nobody_acknowledges_hold_a_version_for_a_while_only() -> None:
    talk = Conversation()
    caller = talk.caller()
    worker = talk.worker(model(), hears=[caller])
    caller.submit()
    talk.tick()
    worker.declare(model(), model(version="2"), routes=[TWO])
    talk.live(59.0)
    assert unloaded(worker) == []
    talk.live(5.0)
    assert unloaded(worker) == [("m", "1")]


def test_a_version_that_is_asked_for_again_is_found_again() -> None:
    talk = Conversation()
    caller = talk.caller()
    worker = talk.worker(model(), hears=[caller])
    worker.declare(model(), model(version="2"), routes=[TWO])
    caller.submit(version="2")
    talk.live(RETIRE_AFTER_S + 1)
    assert unloaded(worker) == [("m", "1")]
    worker.declare(model(), model(version="2"), routes=[ONE])
    talk.tick()
    assert current(caller) == "1"
    caller.submit(version="1")
    talk.live(1.0)
    assert caller.refused() == {}


def test_a_worker_that_joins_late_may_unload_too() -> None:
    talk = Conversation()
    caller = talk.caller()
    one = talk.worker(model(), name="a", hears=[caller])
    one.declare(model(), model(version="2"), routes=[TWO])
    caller.submit(version="1")
    talk.live(RETIRE_AFTER_S + 1)
    two = WorkerTalk(talk, b"worker99")
    two.say(WorkerHello(0, "b", "cpu", 1, (), 1, (model(), model(version="2")), (TWO,)))
    one.finish(one.work())
    caller.ack(1)
    talk.live(1.0)
    assert unloaded(one) == unloaded(two) == [("m", "1")]


def test_a_model_that_is_removed_is_not_found_and_is_unloaded() -> None:
    talk = Conversation()
    caller = talk.caller()
    worker = talk.worker(model(), model("n"), hears=[caller])
    worker.declare(model(), model("n"), routes=[Route("m")])
    talk.tick()
    assert current(caller) == ""
    caller.submit(version="")
    talk.tick()
    assert caller.refused() == {1: "not_found"}
    talk.live(RETIRE_AFTER_S + 1)
    assert unloaded(worker) == [("m", "1")]


def test_labels_are_versions_by_another_name() -> None:
    talk = Conversation()
    caller = talk.caller()
    route = Route("m", ("2",), (("stable", "1"), ("canary", "2")), (("stable", 90), ("canary", 10)))
    worker = talk.worker(model(), model(version="2"), hears=[caller])
    worker.declare(model(), model(version="2"), routes=[route])
    for version in ("stable", "canary", ""):
        caller.submit(version=version)
    talk.tick()
    assert sorted(group.form.version for group in worker.work()) == ["1", "2", "2"]
    assert caller.take(Models)[-1].routes == (route,)
    talk.live(RETIRE_AFTER_S + 1)
    assert unloaded(worker) == [], "a label asks for it"
    worker.declare(model(), model(version="2"), routes=[TWO])
    caller.submit(version="stable")
    talk.tick()
    assert caller.refused() == {4: "not_found"}


def test_requests_wait_for_a_model_that_is_loaded_because_of_them() -> None:
    talk = Conversation(load_wait_max_s=30.0)
    caller = talk.caller()
    worker = talk.worker(model(state=IDLE), hears=[caller])
    talk.tick()
    assert [state.state for state in caller.take(Models)[-1].models] == [IDLE]
    assert current_of(talk) == "1"
    talk.live(20.0)
    (first,) = caller.submit()
    talk.tick()
    assert [(wake.model, wake.version) for wake in worker.take(Wake)] == [("m", "1")]
    talk.live(29.0)
    assert caller.refused() == {}
    worker.declare(model())
    talk.tick()
    assert worker.got() == [first]
    assert talk.count("penstock_load_waits", "m", "1") == 1


@pytest.mark.parametrize("state", [IDLE, LOADING, UNAVAILABLE])
def test_what_is_not_loaded_in_time_is_refused_and_may_be_asked_for_again(state: str) -> None:
    talk = Conversation(load_wait_max_s=30.0)
    caller = talk.caller()
    worker = talk.worker(model(state=IDLE), hears=[caller])
    (first,) = caller.submit(timeout_s=600.0)
    talk.tick()
    worker.declare(model(state=state))
    talk.live(34.0)
    assert caller.refused() == {first: "unavailable"}
    worker.take(Wake)
    worker.declare(model(state=IDLE))
    (second,) = caller.submit()
    talk.tick()
    assert len(worker.take(Wake)) == 1
    worker.declare(model())
    talk.tick()
    assert (worker.got(), caller.refused()) == ([second], {})


def test_what_has_become_idle_is_unloaded_and_gets_no_more_requests() -> None:
    talk = Conversation()
    caller = talk.caller()
    worker = talk.worker(model(), model("n"), hears=[caller])
    (first,) = caller.submit()
    talk.tick()
    assert worker.got() == [first]
    worker.declare(model(state=IDLE), model("n"))
    assert unloaded(worker) == [("m", "1")]
    worker.declare(model(state=IDLE, reason="still"), model("n"))
    assert unloaded(worker) == [], "it has been told"
    (second,) = caller.submit()
    talk.tick()
    assert (worker.got(), len(worker.take(Wake))) == ([], 1)
    worker.declare(model(), model("n"))
    talk.tick()
    assert worker.got() == [second]


def test_what_waits_when_a_model_becomes_idle_has_it_loaded_again() -> None:
    talk = Conversation()
    caller = talk.caller()
    worker = talk.worker(model(batch=1), hears=[caller])
    caller.submit(4)
    talk.tick()
    assert len(worker.got()) == 2
    worker.declare(model(state=IDLE, batch=1))
    talk.tick()
    assert len(worker.take(Wake)) == 1


def test_one_worker_of_those_that_could_loads_a_model() -> None:
    talk = Conversation()
    caller = talk.caller()
    workers = [talk.worker(model(state=IDLE), hears=[caller], name=name) for name in "ab"]
    caller.submit()
    talk.tick()
    assert sum(len(worker.take(Wake)) for worker in workers) == 1


def test_a_worker_that_runs_more_batches_at_once_is_given_more() -> None:
    talk = Conversation()
    caller = talk.caller()
    worker = talk.worker(model(batch=1), hears=[caller])
    caller.submit(8)
    talk.tick()
    assert len(worker.got()) == 2
    worker.say(WorkerModels(EPOCH, (), instances=3))
    talk.tick()
    assert len(worker.got()) == 2


def looks(talk: Conversation) -> int:
    """How often the broker looks at something in a minute in which nothing happens."""
    until, count = talk.now + 60.0, 0
    while talk.core.due() < until:
        talk.tick(max(0.0, talk.core.due() - talk.now))
        talk.beat()
        count += 1
    return count


def test_what_retires_and_stays_costs_nothing() -> None:
    talk = Conversation()
    caller = talk.caller()
    idle = looks(talk)
    worker = talk.worker(model(), hears=[caller])
    worker.declare(model(), model(version="2"), routes=[TWO])
    talk.live(RETIRE_AFTER_S + 1)
    assert unloaded(worker) == [("m", "1")], "and it does not"
    assert looks(talk) <= idle + 1
    worker.declare(model(), model(version="2"), model(version="3"), routes=[Route("m", ("3",))])
    talk.tick()
    worker.vanish()
    assert looks(talk) <= idle + 4, "its models stay known"
    again = WorkerTalk(talk, b"worker99")
    again.say(WorkerHello(0, "b", "cpu", 1, (), 1, (model(), model(version="3")), (Route("m", ("3",)),)))
    talk.live(1.0)
    assert unloaded(again) == [("m", "1")]


def test_very_many_labels_take_no_longer_than_as_many_models() -> None:
    """A worker that declares all that it can is taken in at once."""
    talk = Conversation()
    worker = WorkerTalk(talk, b"worker99")
    labels = tuple([(f"l{number}", "1") for number in range(64)])
    routes = [Route(f"m{number}", ("1",), labels) for number in range(1000)]
    began = time.process_time()
    hello = WorkerHello(0, "b", "cpu", 1, (), 1, [model(route.name) for route in routes], routes)
    talk.core.handle(FromWorker(worker.id, hello), talk.now)
    assert time.process_time() - began < 0.4
    assert talk.core.registry.find("m999", "l63", talk.now).key == ("m999", "1")


def test_who_names_no_version_is_served_though_the_one_that_was_current_went_with_its_worker() -> None:
    """A worker that is replaced by one that starts with a newer version, which so is current at once."""
    talk = Conversation()
    caller = talk.caller()
    old = talk.worker(model(batch=1), hears=[caller], name="w")
    caller.submit(4, version="~1")
    caller.submit(4, version="1")
    talk.tick()
    assert old.got() == [1, 2]
    new = talk.worker(model(version="2"), hears=[caller], name="w")
    old.say(Leaving(EPOCH))
    talk.tick()
    assert [(each.ids, each.form.version) for each in new.work()] == [((3, 4), "2")]
    assert caller.refused() == dict.fromkeys((5, 6, 7, 8), "unavailable"), "who names it gets no other"
    (late,) = caller.submit(version="~1")
    talk.tick()
    assert new.got() == [late], "who has not heard yet"
    old.vanish()
    talk.live(1.0)
    new.finish(new.work())
    talk.live(1.0)
    new.finish(new.work())
    assert caller.refused() == {}


@pytest.mark.parametrize("version", [model(version="2", batch=2), model(version="2")._replace(spec=OTHER)])
def test_who_names_no_version_and_does_not_fit_another_is_refused(version: ModelState) -> None:
    talk = Conversation()
    caller = talk.caller()
    old = talk.worker(model(), name="w")
    (only,) = caller.submit(version="~1", rows=3)
    talk.worker(version, hears=[caller], name="w")
    old.say(Leaving(EPOCH))
    talk.tick()
    assert caller.refused() == {only: "unavailable"}


def test_who_names_no_version_is_served_by_a_broker_that_never_heard_of_it() -> None:
    talk = Conversation(grace=True)
    caller = talk.caller()
    (early,) = caller.submit(version="~1")
    worker = talk.worker(model(version="2"), hears=[caller])
    (late,) = caller.submit(version="~1")
    talk.live(talk.core.options.unserved_grace_s + 3.0)
    assert sorted(worker.got()) == [early, late]
    assert caller.refused() == {}


def test_who_names_no_version_gets_what_retires_no_more() -> None:
    talk = Conversation()
    caller = talk.caller()
    worker = talk.worker(model(), hears=[caller])
    worker.declare(model(), model(version="2"), routes=[TWO])
    caller.submit(version="~1")
    talk.live(RETIRE_AFTER_S + 1)
    caller.submit(version="~1")
    talk.tick()
    assert [group.form.version for group in worker.work()] == ["1", "2"]


def test_what_a_worker_has_that_is_leaving_retires_like_all_else() -> None:
    talk = Conversation()
    one, two = talk.worker(model(), name="a"), talk.worker(model("n"), name="b")
    one.declare(model(), model(version="2"), routes=[TWO])
    talk.live(RETIRE_AFTER_S + 1)
    assert unloaded(one) == [("m", "1")]
    one.vanish()
    talk.live(1.0)
    two.say(Leaving(EPOCH))
    two.declare(model(), model("n"), routes=[TWO])
    talk.live(1.0)
    assert unloaded(two) == [("m", "1")]
