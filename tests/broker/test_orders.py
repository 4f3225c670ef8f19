"""Models that callers have the server load, or serve no more."""

from __future__ import annotations

from typing import Any

import pytest

from penstock.broker.orders import CONFIGS_MAX, PENDING_MAX
from penstock.wire.messages import (
    EXPLICIT,
    LOAD,
    MAX_CONFIG,
    NONE,
    UNLOAD,
    WATCH,
    Loads,
    Order,
    Ordered,
    WorkerHello,
)
from penstock.wire.models import LOADING, UNAVAILABLE, Load, ModelState, Route
from tests.broker.conversation import EPOCH, CallerTalk, Conversation, WorkerTalk, model


def join(talk: Conversation, control: str = EXPLICIT, *loads: Load, models: tuple[ModelState, ...] = ()) -> WorkerTalk:
    worker = WorkerTalk(talk, b"worker%02d" % len(talk.inbox))
    worker.say(WorkerHello(0, "w", "cpu", 1, ("ipc:///w",), 1, models, (), control, loads))
    return worker


def order(caller: CallerTalk, name: str, action: str = LOAD, config: str = "", serial: int = 1) -> None:
    caller.say(Order(EPOCH, serial, action, name, config))


def answers(caller: CallerTalk) -> list[tuple[int, str, str]]:
    return [
        (each.serial, *((each.failure.code, each.failure.message) if each.failure else ("", "")))
        for each in caller.take(Ordered)
    ]


def loads(worker: WorkerTalk) -> list[tuple[str, str]]:
    """What it was told last."""
    return [(name, config) for name, config in worker.take(Loads)[-1].loads]


def test_an_order_is_done_when_all_workers_have_followed_it() -> None:
    talk = Conversation()
    one, two, caller = join(talk), join(talk), talk.caller()
    order(caller, "m", config='{"max_batch_size": 4}', serial=7)
    assert loads(one) == loads(two) == [("m", '{"max_batch_size": 4}')]
    one.declare(model("m"), heard=1)
    assert answers(caller) == []
    two.declare(model("m", state=LOADING, batch=0))
    assert answers(caller) == []
    two.declare(model("m"), heard=1)
    assert answers(caller) == [(7, "", "")]


def test_who_is_told_that_a_model_is_loaded_has_been_told_of_it() -> None:
    talk = Conversation()
    worker, caller = join(talk), talk.caller()
    order(caller, "m")
    caller.heard()
    worker.declare(model("m"), heard=1)
    assert caller.heard() == ["Models", "Ordered"]


@pytest.mark.parametrize(
    ("models", "code", "sentence"),
    [
        ([model("m", state=UNAVAILABLE, reason="it is corrupt", batch=0)], "unavailable", "version 1: it is corrupt"),
        ([model("m", "1"), model("m", "2", UNAVAILABLE, "no", batch=0)], "unavailable", "'m', version 2: no"),
        ([], "not_found", "no worker's repository has a model of that name"),
    ],
)
def test_a_model_that_cannot_be_loaded_is_told_with_its_reason(models: Any, code: str, sentence: str) -> None:
    talk = Conversation()
    worker, caller = join(talk), talk.caller()
    order(caller, "m")
    worker.declare(*models, heard=1)
    [(serial, said, told)] = answers(caller)
    assert (serial, said) == (1, code)
    assert told.endswith(sentence)


def test_what_is_served_on_though_it_is_not_asked_for_does_not_count() -> None:
    talk = Conversation()
    worker, caller = join(talk), talk.caller()
    order(caller, "m")
    failed = model("m", "1", UNAVAILABLE, "an old one", batch=0)
    worker.declare(failed, model("m", "2"), routes=[Route("m", ("2",))], heard=1)
    assert answers(caller) == [(1, "", "")]


def test_unloading_takes_a_model_out_of_what_workers_are_told() -> None:
    talk = Conversation()
    worker, caller = join(talk), talk.caller()
    order(caller, "m")
    order(caller, "n", serial=2)
    assert loads(worker) == [("m", ""), ("n", "")]
    worker.declare(model("m"), model("n"), heard=2)
    order(caller, "m", UNLOAD, serial=3)
    assert loads(worker) == [("n", "")]
    worker.declare(model("n"), heard=3)
    order(caller, "m", UNLOAD, serial=4)
    assert [(serial, code) for serial, code, _ in answers(caller)] == [(1, ""), (2, ""), (3, ""), (4, "not_found")]


def test_a_repository_that_is_watched_can_be_looked_at_now() -> None:
    talk = Conversation()
    worker, caller = join(talk, WATCH, models=(model("m"),)), talk.caller()
    order(caller, "m")
    assert loads(worker) == []
    worker.declare(model("m"), heard=1)
    assert answers(caller) == [(1, "", "")]


@pytest.mark.parametrize(
    ("control", "action", "config", "says"),
    [
        (WATCH, UNLOAD, "", "explicit model load / unload is not allowed: this server follows its repository"),
        (WATCH, LOAD, "{}", "explicit model load / unload is not allowed"),
        (NONE, LOAD, "", "model_control is 'none'"),
        (NONE, UNLOAD, "", "model_control is 'none'"),
    ],
)
def test_what_does_not_go_by_orders_says_so(control: str, action: str, config: str, says: str) -> None:
    talk = Conversation()
    worker, caller = join(talk, control, models=(model("m"),)), talk.caller()
    order(caller, "m", action, config)
    [(_, code, sentence)] = answers(caller)
    assert code == "bad_input"
    assert says in sentence
    assert worker.take(Loads) == []


def test_without_a_worker_nothing_can_be_ordered() -> None:
    caller = Conversation().caller()
    order(caller, "m")
    assert answers(caller)[0][1] == "unavailable"


def test_orders_under_way_are_bounded() -> None:
    talk = Conversation()
    join(talk)
    caller = talk.caller()
    for number in range(PENDING_MAX + 1):
        order(caller, f"m{number}", serial=number)
    assert [(serial, code) for serial, code, _ in answers(caller)] == [(PENDING_MAX, "overloaded")]


def test_a_worker_that_goes_is_not_waited_for_and_one_that_comes_is_told_all() -> None:
    talk = Conversation()
    one, two, caller = join(talk), join(talk), talk.caller()
    order(caller, "m")
    one.declare(model("m"), heard=1)
    two.vanish()
    assert answers(caller) == [(1, "", "")]
    assert loads(join(talk)) == [("m", "")]


def test_a_caller_that_goes_is_not_answered() -> None:
    talk = Conversation()
    worker, caller = join(talk), talk.caller()
    order(caller, "m")
    caller.bye()
    worker.declare(model("m"), heard=1)
    assert answers(caller) == []


def test_a_new_broker_takes_over_what_workers_were_told() -> None:
    talk = Conversation()
    one = join(talk, EXPLICIT, Load("m", "{}"))
    assert one.take(Loads) == []
    two = join(talk)
    assert loads(two) == [("m", "{}")]
    three = join(talk, EXPLICIT, Load("m", "{}"), Load("n"))
    assert three.take(Loads) == []
    order(talk.caller(), "o")
    assert loads(one) == loads(two) == loads(three) == [("m", "{}"), ("n", ""), ("o", "")]


def test_an_order_that_is_not_followed_in_time_ends() -> None:
    talk = Conversation()
    join(talk)
    caller = talk.caller()
    order(caller, "m")
    talk.live(3599.0)
    assert answers(caller) == []
    talk.live(4.0)
    [(_, code, sentence)] = answers(caller)
    assert (code, sentence) == ("unavailable", "'m' was not loaded in time; 'penstock models ls' says how it fares")


def test_who_came_before_what_was_ordered_is_known_is_told_of_it() -> None:
    """A worker that was started anew joins a new broker before the one that knows what was ordered."""
    talk = Conversation()
    fresh = join(talk)
    knows = join(talk, EXPLICIT, Load("m"), models=(model("m"),))
    assert loads(fresh) == [("m", "")]
    assert knows.take(Loads) in ([], [Loads(EPOCH, 0, (Load("m"),))])


def test_what_was_ordered_of_the_broker_before_stays_though_an_order_came_first() -> None:
    talk = Conversation()
    early, caller = join(talk), talk.caller()
    order(caller, "n")
    late = join(talk, EXPLICIT, Load("m"), Load("n", "{}"), models=(model("m"),))
    assert loads(early) == loads(late) == [("n", ""), ("m", "")]


def test_what_was_unloaded_does_not_come_back_with_a_worker_that_had_not_heard() -> None:
    talk = Conversation()
    knows, caller = join(talk, EXPLICIT, Load("m"), Load("n"), models=(model("m"),)), talk.caller()
    order(caller, "m", UNLOAD)
    again = join(talk, EXPLICIT, Load("m"), Load("n"), models=(model("m"),))
    assert loads(knows) == loads(again) == [("n", "")]


def test_a_worker_that_joins_does_not_have_the_others_look_again() -> None:
    talk = Conversation()
    one, caller = join(talk), talk.caller()
    order(caller, "m")
    one.take(Loads)
    two = join(talk)
    assert loads(two) == [("m", "")]
    assert one.take(Loads) == []


def test_what_nobody_has_is_not_ordered_any_more() -> None:
    """Else names that are made up would fill what can be ordered."""
    talk = Conversation()
    worker, caller = join(talk), talk.caller()
    for serial in range(1, 4):
        order(caller, f"none{serial}", serial=serial)
        worker.declare(heard=serial)
    assert [code for _, code, _ in answers(caller)] == ["not_found"] * 3
    order(caller, "m", serial=4)
    assert loads(worker) == [("m", "")]


def test_configurations_have_a_bound() -> None:
    talk = Conversation()
    worker, caller = join(talk), talk.caller()
    config = "{" + " " * (MAX_CONFIG - 2) + "}"
    count = CONFIGS_MAX // MAX_CONFIG
    for serial in range(1, count + 3):
        name = f"m{min(serial, count + 1)}"
        order(caller, name, config=config, serial=serial)
        worker.declare(*[model(f"m{each}") for each in range(1, count + 2)], heard=serial)
    codes = [code for _, code, _ in answers(caller)]
    assert codes == [*[""] * count, "overloaded", "overloaded"]
    order(caller, "m1", config=config, serial=100)
    worker.declare(model("m1"), heard=count + 1)
    assert answers(caller) == [(100, "", "")], "in place of what it had"


def test_who_loads_what_another_unloads_is_told_so() -> None:
    talk = Conversation()
    worker, one, two = join(talk), talk.caller(), talk.caller()
    order(one, "m")
    order(two, "m", UNLOAD)
    worker.declare(heard=2)
    assert answers(two) == [(1, "", "")]
    assert answers(one) == [(1, "unavailable", "'m' was unloaded while it was being loaded")]
