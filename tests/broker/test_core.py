"""Who is there, what they are told of each other, and how the broker begins and ends."""

from __future__ import annotations

import pytest

from penstock.broker.core import Core
from penstock.broker.events import End, FromCaller
from penstock.broker.options import BrokerOptions
from penstock.wire.events import Drain
from penstock.wire.messages import (
    MAX_NAME,
    MAX_REQUESTS,
    Ask,
    Assign,
    Attached,
    Beat,
    Bye,
    CallerHello,
    Expect,
    Expected,
    Forgotten,
    Form,
    Leaving,
    Metrics,
    Models,
    Requests,
    Submit,
    Welcome,
    WorkerAddress,
    WorkerHello,
    Workers,
)
from penstock.wire.metrics import Sample
from penstock.wire.models import LOADING, READY, UNAVAILABLE
from tests.broker.conversation import EPOCH, Conversation, model

# --- hello ---


def test_a_caller_is_welcomed_and_told_of_workers_and_models() -> None:
    talk = Conversation()
    worker = talk.worker(model("m"))
    talk.tick()
    caller = talk.caller("gateway")
    [welcome] = caller.take(Welcome)
    [workers] = caller.take(Workers)
    [models] = caller.take(Models)
    assert (welcome.epoch, welcome.name) == (EPOCH, "gateway")
    assert workers.workers == (WorkerAddress(worker.id, "ipc:///run/w.sock", 0, "w"),)
    assert [(each.name, each.version, each.state) for each in models.models] == [("m", "1", READY)]
    assert caller.heard() == []


def test_a_worker_is_welcomed_and_told_whom_to_expect() -> None:
    talk = Conversation()
    caller = talk.caller()
    worker = talk.worker()
    assert worker.take(Welcome) == [Welcome(EPOCH, "w")]
    assert worker.take(Expect) == [Expect(EPOCH, (Expected(caller.id, 1),))]
    other = talk.caller()
    assert worker.take(Expect) == [Expect(EPOCH, (Expected(other.id, 2),))]
    other.bye()
    assert worker.take(Expect) == [Expect(EPOCH, (), (Forgotten(other.id, 2),))]


def test_callers_hear_of_workers_that_come_and_go() -> None:
    talk = Conversation()
    caller = talk.caller()
    caller.heard()
    worker = talk.worker()
    talk.tick()
    assert [len(message.workers) for message in caller.take(Workers)] == [1]
    assert [message.models[0].state for message in caller.take(Models)] == [READY]
    worker.vanish()
    talk.tick()
    assert [len(message.workers) for message in caller.take(Workers)] == [0]
    assert [message.models[0].state for message in caller.take(Models)] == [UNAVAILABLE]
    talk.tick(0.25)
    talk.tick(0.25)
    assert talk.sweeps == 1


def test_nothing_is_said_while_nothing_changes() -> None:
    talk = Conversation()
    caller, worker = talk.caller(), talk.worker()
    talk.tick()
    talk.forget()
    talk.tick(0.1)
    assert (caller.heard(), worker.heard()) == ([], [])


def test_a_peer_that_says_hello_again_starts_over() -> None:
    talk = Conversation()
    caller = talk.caller("gateway")
    worker = talk.worker(hears=[caller])
    caller.submit(3)
    talk.tick()
    caller.heard()
    caller.say(CallerHello(0, "gateway", 1, True, 3))
    talk.tick()
    assert caller.take(Welcome) == [Welcome(EPOCH, "gateway", False, 1)]
    assert talk.held == (3, 0)  # the worker still has them
    assert caller.submit() == (4,)
    talk.tick()
    assert worker.got() == [1, 2, 3]  # it has not yet said that the new life of the caller hears it
    worker.hear(caller)
    talk.tick()
    assert worker.got() == [4]


@pytest.mark.parametrize("leaves_first", [False, True])
@pytest.mark.parametrize("says_so", [False, True])
def test_a_caller_that_starts_over_may_send_again_what_a_worker_still_runs(leaves_first: bool, says_so: bool) -> None:
    """What runs is then what was sent again: the worker has it once, and says once that it is done."""
    talk = Conversation()
    caller = talk.caller()
    worker = talk.worker(hears=[caller])
    caller.submit(3)
    talk.tick()
    assert worker.got() == [1, 2, 3]
    if leaves_first:
        caller.bye()
    caller.say(CallerHello(0, "", 1, True, 3 if says_so else 0))
    worker.hear(caller)
    caller.last_id = 1
    caller.submit(3)
    talk.tick()
    assert (caller.refused(), worker.got(), talk.held) == ({}, [2, 3, 4], (4, 0))
    worker.done(caller, 1, 2, 3)
    assert talk.held == (3, 0)
    caller.ack(2, 3)
    assert talk.held == (1, 0)


def test_what_another_worker_answers_of_what_was_sent_again_is_freed_there_and_not_run() -> None:
    """The one that had it from the broker before, which this one cannot know."""
    talk = Conversation()
    caller = talk.caller()
    caller.say(CallerHello(0, "", 1, True, 2))
    worker, other = talk.worker(hears=[caller]), talk.worker(name="other")
    caller.submit(3)
    talk.tick()
    assert worker.got() == [1, 2, 3]
    caller.ack(1, 3)
    talk.tick()
    assert worker.news() == ([1, 3], [1])
    assert other.news() == ([1, 3], [])


def test_a_worker_that_says_hello_again_has_lost_what_it_held() -> None:
    talk = Conversation()
    caller = talk.caller()
    worker = talk.worker(hears=[caller])
    caller.submit(2)
    talk.tick()
    assert [group.attempt for group in worker.work()] == [1]
    worker.say(WorkerHello(0, "w", "cpu", 1, (), 1, (model(),)))
    worker.hear(caller)
    talk.tick()
    assert worker.take(Welcome)[-1].name == "w"
    assert [(group.attempt, group.ids) for group in worker.work()] == [(2, (1, 2))]


def test_hellos_that_come_in_one_go_are_no_lost_workers() -> None:
    """Said by one that was cut off, and has come back."""
    talk = Conversation()
    caller = talk.caller()
    worker = talk.worker(hears=[caller])
    hello = WorkerHello(0, "w", "cpu", 1, (), 1, (model(),))

    def told() -> list[str]:
        told = [line.event for line in talk.logs if line.event.startswith("worker")]
        talk.logs.clear()
        return told

    told()
    worker.say(hello)
    assert told() == ["worker lost", "worker joined"]  # it had been heard
    for _ in range(3):
        worker.say(hello)
        talk.tick()
    assert told() == []
    assert len(worker.take(Welcome)) == 5, "each is answered: the connection may have been another when it was said"
    caller.submit()
    worker.hear(caller)
    talk.tick()
    assert worker.got() == [1]
    worker.say(hello)
    assert told() == ["worker lost", "worker joined"]


@pytest.mark.parametrize("epoch", [0, EPOCH - 1, EPOCH + 1])
def test_words_of_another_epoch_are_answered_with_a_wish_for_hello(epoch: int) -> None:
    talk = Conversation()
    caller, worker = talk.caller(), talk.worker()
    talk.forget()
    caller.submit(epoch=epoch)
    caller.say(Beat(epoch))
    worker.say(Attached(epoch, caller.id, 1, True))
    assert caller.heard() == ["HelloWanted", "HelloWanted"]
    assert worker.heard() == ["HelloWanted"]
    assert talk.held == (0, 0)


def test_strangers_are_asked_who_they_are() -> None:
    talk = Conversation()
    caller, worker = talk.caller(), talk.worker()
    caller.bye()
    worker.say(Bye(EPOCH))
    talk.forget()
    caller.submit()
    worker.say(Leaving(EPOCH))
    assert (caller.heard(), worker.heard()) == (["HelloWanted"], ["HelloWanted"])


def test_names_are_unique_over_all_peers_and_fit_their_field() -> None:
    talk = Conversation()
    long = "n" * MAX_NAME
    names = [talk.caller(wished).take(Welcome)[0].name for wished in ("g", "g", "g", "", "", "broker", long, long)]
    names += [talk.worker(name=wished).take(Welcome)[0].name for wished in ("w", "w", "g", "")]
    assert names[:6] == ["g", "g-1", "g-2", "", "", "broker-1"]
    assert names[6:8] == [long, "n" * (MAX_NAME - 2) + "-1"]
    assert names[8:] == ["w", "w-1", "g-3", "cpu"]


def test_a_name_is_free_again_when_its_peer_has_gone() -> None:
    talk = Conversation()
    talk.caller("g").bye()
    assert talk.caller("g").take(Welcome)[0].name == "g"


def test_peers_beyond_the_limit_are_not_taken_in() -> None:
    talk = Conversation(callers_max=1, workers_max=1)
    first, second = talk.caller(), talk.caller()
    worker, other = talk.worker(), talk.worker()
    assert "Welcome" in first.heard()
    assert "Welcome" in worker.heard()
    assert (second.heard(), other.heard()) == ([], [])
    assert [line.event for line in talk.logs if line.level == "error"] == [
        "caller turned away: too many are connected",
        "worker turned away: too many are connected",
    ]
    first.say(CallerHello(0, "", 1, True))  # who is in may start over
    assert "Welcome" in first.heard()


# --- a new broker ---


def test_a_new_broker_waits_for_the_peers_of_the_old_one_before_it_assigns() -> None:
    talk = Conversation(grace=True)
    worker, caller = talk.worker(), talk.caller()
    worker.hear(caller)
    caller.submit()
    talk.tick(0.2)
    assert worker.got() == []
    assert caller.take(Models) == []  # some may be missing: nobody shall think that there are no others
    assert talk.core.due() <= 1000.25
    talk.tick(0.05)
    assert worker.got() == [1]
    assert len(caller.take(Models)) == 1


def test_a_new_broker_has_requests_wait_for_models_that_it_does_not_know_yet() -> None:
    talk = Conversation(grace=True)
    caller = talk.caller()
    caller.submit(2, "m", rows=2)
    caller.submit(1, "m", rows=5)
    caller.submit(1, "n")
    talk.live(1.0)
    assert [message.models for message in caller.take(Models)] == [()]
    loading = talk.worker(model("m", state=LOADING, batch=0), hears=[caller], name="loading")
    talk.live(1.0)
    assert caller.refused() == {}
    worker = talk.worker(model("m"), hears=[caller])
    talk.tick()
    assert (worker.got(), loading.got(), caller.refused()) == ([1, 2], [], {3: "bad_input"})
    talk.live(11.0)
    assert caller.refused() == {4: "unavailable"}
    caller.submit(1, "n")
    talk.tick()
    assert caller.refused() == {5: "not_found"}
    assert [state.name for state in talk.core.registry.states()] == ["m"]


def test_what_the_last_broker_had_taken_in_is_not_turned_away_by_the_next() -> None:
    talk = Conversation(grace=True, queue_requests_max=2, held_requests_max=5)
    caller = talk.caller()
    caller.say(CallerHello(0, "", 1, True, 4))
    caller.submit(4)
    caller.submit(1)
    talk.tick()
    assert caller.refused() == {5: "overloaded"}
    assert talk.held == (4, 0)
    late = talk.caller()
    late.say(CallerHello(0, "", 1, True, 4))
    late.submit(4)
    talk.tick()
    assert late.refused() == dict.fromkeys((2, 3, 4), "overloaded"), "what it holds in all is bounded"


# --- silence and absence ---


def test_peers_that_fall_silent_are_gone() -> None:
    talk = Conversation()
    caller, worker = talk.caller(), talk.worker()
    for _ in range(5):
        talk.tick(1.0)
    assert (len(talk.core.callers), len(talk.core.workers)) == (1, 1)
    caller.say(Beat(EPOCH))
    talk.tick(1.0)
    assert (len(talk.core.callers), len(talk.core.workers)) == (1, 0)
    assert [line.fields["reason"] for line in talk.logs if line.event == "worker lost"] == ["silent for 6.0 s"]
    talk.live(20)
    assert len(talk.core.callers) == 1
    assert worker.id not in talk.core.workers


def test_a_broker_that_was_stopped_itself_holds_silence_against_nobody() -> None:
    talk = Conversation()
    talk.caller()
    talk.worker()
    talk.tick(60)
    talk.tick(1)
    assert (len(talk.core.callers), len(talk.core.workers)) == (1, 1)


def test_beats_are_answered() -> None:
    talk = Conversation()
    caller, worker = talk.caller(), talk.worker()
    talk.forget()
    caller.say(Beat(EPOCH))
    worker.say(Beat(EPOCH))
    assert (caller.heard(), worker.heard()) == (["Beat"], ["Beat"])


def test_who_is_gone_twice_is_gone_once() -> None:
    talk = Conversation()
    caller, worker = talk.caller(), talk.worker()
    for peer in (caller, worker, caller, worker):
        peer.vanish()
    assert [line.event for line in talk.logs if "lost" in line.event or "left" in line.event] == [
        "caller left",
        "worker lost",
    ]


def test_a_caller_that_has_gone_is_heard_by_nobody() -> None:
    talk = Conversation()
    caller, worker = talk.caller(), talk.worker()
    caller.bye()
    worker.hear(caller)  # it crossed the news on its way
    assert talk.core.workers[worker.id].callers == set()


def test_the_next_tick_is_due_when_the_core_says() -> None:
    talk = Conversation()
    caller, worker = talk.caller(), talk.worker()
    talk.tick()
    assert talk.now < talk.core.due() <= talk.now + 2.0
    caller.submit(timeout_s=0.1)
    talk.tick()
    assert talk.core.due() == pytest.approx(talk.now + 0.1)
    caller.cancel(1)
    caller.submit()
    worker.hear(caller)
    talk.tick()
    worker.done(caller, 2)
    caller.ack(2)
    talk.tick()
    assert talk.core.due() == pytest.approx(talk.now + 0.01)  # then the worker hears that its result is free


# --- models ---


def test_a_model_fares_as_well_as_on_the_worker_where_it_fares_best() -> None:
    talk = Conversation()
    caller = talk.caller()
    first = talk.worker(model(state=LOADING, batch=0), name="a")
    talk.worker(model(state=UNAVAILABLE, reason="no memory", batch=0), name="b")
    talk.tick()
    assert [(each.state, each.reason) for each in caller.take(Models)[-1].models] == [(LOADING, "")]
    first.declare(model(state=UNAVAILABLE, reason="bad file", batch=0))
    talk.tick()
    assert [(each.state, each.reason) for each in caller.take(Models)[-1].models] == [(UNAVAILABLE, "bad file")]
    first.declare(model())
    talk.tick()
    assert [each.state for each in caller.take(Models)[-1].models] == [READY]


def test_a_leaving_worker_keeps_what_it_has_and_gets_nothing_new() -> None:
    talk = Conversation()
    caller = talk.caller()
    worker = talk.worker(hears=[caller])
    caller.submit()
    talk.tick()
    worker.say(Leaving(EPOCH))
    caller.submit()
    talk.tick()
    assert worker.got() == [1]
    assert [each.state for each in caller.take(Models)[-1].models] == [UNAVAILABLE]
    worker.done(caller, 1)
    caller.ack(1)
    worker.say(Bye(EPOCH))
    other = talk.worker(hears=[caller])
    talk.tick()
    assert other.got() == [2]
    assert [line.event for line in talk.logs if "worker" in line.event][1:3] == ["worker is leaving", "worker left"]


# --- other hosts ---


def test_a_remote_caller_is_told_only_of_addresses_that_it_can_reach() -> None:
    talk = Conversation()
    near, far = talk.caller(), talk.caller(local=False)
    both = talk.worker(endpoints=["ipc:///run/both.sock", "tcp://10.0.0.1:1"])
    talk.worker(endpoints=["ipc:///run/near.sock"])
    far_only = talk.worker(endpoints=["tcp://10.0.0.2:1"])
    talk.worker(endpoints=[])
    talk.tick()
    assert [each.endpoint for each in near.take(Workers)[-1].workers] == [
        "ipc:///run/both.sock",
        "ipc:///run/near.sock",
        "tcp://10.0.0.2:1",
    ]
    assert far.take(Workers)[-1].workers == (
        WorkerAddress(both.id, "tcp://10.0.0.1:1", 0, "w"),
        WorkerAddress(far_only.id, "tcp://10.0.0.2:1", 0, "w-2"),
    )


def test_a_remote_caller_is_served_where_a_worker_publishes_over_tcp() -> None:
    talk = Conversation()
    far = talk.caller(local=False)
    worker = talk.worker(hears=[far], endpoints=["ipc:///run/w.sock", "tcp://10.0.0.1:1"])
    far.submit()
    talk.tick()
    assert worker.got() == [1]


def test_a_remote_caller_is_told_when_no_worker_publishes_over_tcp() -> None:
    talk = Conversation()
    far = talk.caller(local=False)
    talk.worker()
    far.submit()
    talk.tick()
    [refusal] = far.refusals()
    assert refusal.code == "unavailable"
    assert refusal.message == (
        "no worker that serves model 'm' publishes over TCP; start workers with --bind tcp://HOST:0"
    )


# --- the end ---


def test_a_draining_broker_accepts_nothing_and_finishes_what_it_has() -> None:
    talk = Conversation()
    caller = talk.caller()
    worker = talk.worker(hears=[caller])
    caller.submit(10)
    talk.tick()
    assert len(worker.got()) == 8
    talk.handle(Drain())
    caller.submit()
    talk.tick()
    assert (caller.refusals(), talk.held) == ([], (10, 0)), "its caller keeps it for the next broker"
    worker.done(caller, *range(1, 9))
    talk.tick()
    assert worker.got() == [9, 10]


def test_a_broker_that_ends_says_so_to_everybody_and_callers_keep_what_they_have_for_the_next() -> None:
    talk = Conversation()
    caller = talk.caller()
    worker = talk.worker(hears=[caller])
    caller.submit(10)
    talk.tick()
    talk.forget()
    talk.handle(End())
    assert worker.heard() == ["Bye"]
    assert caller.heard() == ["Bye"]


# --- to be seen ---


def test_garbage_is_counted_by_who_sent_it() -> None:
    talk = Conversation()
    for process in ("caller", "worker", "worker", "control"):
        talk.garbage(process)
    assert [talk.count("penstock_bad_messages", each) for each in ("caller", "worker", "control")] == [1, 2, 1]
    assert {(line.level, line.event, line.fields["reason"]) for line in talk.logs[-4:]} == {
        ("warning", "bad message dropped", "nonsense")
    }


def test_whoever_asks_gets_the_whole_servers_metrics() -> None:
    talk = Conversation()
    caller = talk.caller("gateway")
    worker = talk.worker(hears=[caller])
    unnamed = talk.caller()
    sample = Sample("penstock_process_cpu_seconds", (), 2.0)
    for peer in (caller, worker, unnamed):
        peer.say(Beat(EPOCH, (sample,)))
    caller.submit(12, size=100)
    talk.tick()
    unnamed.say(Ask(EPOCH, 99))
    [answer] = unnamed.take(Metrics)
    assert (answer.serial, [each.name for each in answer.snapshots]) == (99, ["broker", "w", "gateway"])
    assert [each.samples for each in answer.snapshots[1:]] == [(sample,), (sample,)]
    own = {(each.family, *each.labels): each.value for each in answer.snapshots[0].samples}
    assert own == {
        ("penstock_requests", "m", "1"): 12,
        ("penstock_load_waits", "m", "1"): 0,
        ("penstock_queue_requests", "m", "1"): 4,
        ("penstock_running_requests", "m", "1"): 8,
        ("penstock_held_bytes",): 1200,
        ("penstock_sequences",): 0,
        ("penstock_workers",): 1,
        ("penstock_callers",): 2,
    }


def test_a_worker_gets_all_its_work_of_a_tick_in_one_message() -> None:
    talk = Conversation()
    caller, other = talk.caller(), talk.caller()
    worker = talk.worker(model("m"), model("n"), hears=[caller, other], instances=3)
    caller.submit(2, "m")
    caller.submit(2, "n")
    other.submit(2, "m")
    other.submit(1, "m", size=20_000)
    talk.tick()
    [message] = worker.take(Assign)
    assert sorted((group.form.model, group.caller, group.ids) for group in message.groups) == [
        ("m", caller.id, (1, 2)),
        ("m", other.id, (1, 2)),
        ("m", other.id, (3,)),
        ("n", caller.id, (3, 4)),
    ]


def test_more_work_than_a_message_may_hold_goes_in_several() -> None:
    # A receiver keeps no more frames than that: what came beyond them would make the whole message garbage.
    talk = Conversation()
    caller = talk.caller()
    worker = talk.worker(model(batch=MAX_REQUESTS), hears=[caller])
    for _ in range(3):
        caller.submit(2500)
    talk.tick()
    messages = worker.take(Assign)
    assert [sum(len(group.ids) for group in message.groups) for message in messages] == [2500, 2500, 2500]
    assert [number for message in messages for group in message.groups for number in group.ids] == [*range(1, 7501)]


def test_a_worker_is_told_how_long_requests_waited_and_how_much_time_is_left() -> None:
    talk = Conversation()
    caller = talk.caller()
    worker = talk.worker()
    caller.submit(2, timeout_s=[1.0, 3.0])
    talk.tick(0.5)
    worker.hear(caller)
    talk.tick()
    [group] = worker.work()
    assert (group.waited_us, group.timeouts_us) == (500_000, (500_000, 2_500_000))


def test_a_core_names_what_it_does_not_expect() -> None:
    core = Core(BrokerOptions(), EPOCH, 0.0)
    core.handle(FromCaller(b"caller00", CallerHello(0, "", 1, True)), 0.0)
    with pytest.raises(AssertionError, match="a caller does not send Welcome"):
        core.handle(FromCaller(b"caller00", Welcome(EPOCH, "")), 0.0)
    with pytest.raises(AssertionError, match="unexpected event 5"):
        core.handle(5, 0.0)  # type: ignore[arg-type]


def test_a_submit_may_hold_every_kind_of_word_at_once() -> None:
    talk = Conversation()
    caller = talk.caller()
    worker = talk.worker(hears=[caller])
    caller.submit(3)
    talk.tick()
    worker.done(caller, 1, 2)
    group = Requests(Form("m", "1", 0, "", 1, 0, b"", b""), (4,), (1_000_000,))
    caller.say(Submit(EPOCH, [group], (1, 2), (3,)))
    talk.tick()
    assert [(message.freed[0].ranges, message.cancelled[0].ranges) for message in worker.take(Assign)[1:]] == [
        ((1, 2), (3, 3))
    ]
    assert talk.held == (2, 0)


def test_refusals_are_logged_with_how_many_there_were() -> None:
    talk = Conversation()
    caller = talk.caller(name="gateway")
    talk.worker()
    talk.logs.clear()
    caller.submit(2, rows=99)
    caller.submit(3, rows=99)
    talk.tick()
    [line] = talk.logs
    assert (line.level, line.event) == ("warning", "requests refused")
    about = line.fields
    assert (about["caller"], about["count"], about["code"]) == ("gateway", 5, "bad_input")
    assert about["request"] == f"{caller.id.hex()}:1"
