"""When a peer says hello, when it beats, and when it takes the broker for gone."""

from __future__ import annotations

import itertools

import pytest

from penstock.wire.membership import HELLO_AGAIN_MAX_S, HELLO_AGAIN_S, QUIET_BEAT_S, SILENCE_MAX_S, Membership


def joined(now: float = 10.0) -> Membership:
    membership = Membership(local=False)
    membership.welcomed(7, now)
    return membership


def test_a_remote_peer_says_hello_at_once_and_again_until_it_is_welcomed() -> None:
    membership = Membership(local=False)
    assert membership.say(10.0) == "hello"
    assert membership.say(10.0 + HELLO_AGAIN_S / 2) == ""
    assert membership.due() == 10.0 + HELLO_AGAIN_S
    assert membership.say(10.0 + HELLO_AGAIN_S) == "hello"
    membership.welcomed(7, 10.2)
    assert (membership.joined, membership.epoch) == (True, 7)


def test_hello_is_said_less_and_less_often_to_who_may_be_cut_off_and_get_all_of_them_later() -> None:
    membership = joined(10.0)
    membership.lost()
    said = [membership.due()]
    while said[-1] < 60.0:
        assert membership.say(said[-1]) == "hello"
        said.append(membership.due())
    pauses = [later - sooner for sooner, later in itertools.pairwise(said[1:])]
    assert pauses[:4] == pytest.approx([0.2, 0.4, 0.8, 1.0])
    assert set(pauses[4:]) == {HELLO_AGAIN_MAX_S}
    for begin_anew in (membership.found, membership.lost):
        begin_anew()
        assert membership.say(100.0) == "hello"
        assert membership.due() == 100.0 + HELLO_AGAIN_S


def test_a_local_peer_waits_for_its_control_connection_but_not_for_ever() -> None:
    membership = Membership(local=True)
    assert membership.say(10.0) == ""
    assert membership.say(10.9) == ""
    assert membership.due() == 11.0
    assert membership.say(11.0) == "hello"


def test_a_local_peer_says_hello_once_there_is_a_broker() -> None:
    membership = Membership(local=True)
    assert membership.say(10.0) == ""
    membership.found()
    assert membership.say(10.1) == "hello"


def test_finding_a_broker_does_not_disturb_who_has_joined() -> None:
    membership = joined()
    membership.found()
    assert membership.joined
    assert membership.say(10.0) == "beat"


def test_a_member_beats_once_a_second_while_it_is_awake() -> None:
    membership = joined(10.0)
    said = []
    for tenth in range(31):
        now = 10.0 + tenth / 10
        membership.heard(now)
        if membership.say(now) == "beat":
            said.append(now)
    assert said == [10.0, 11.0, 12.0, 13.0]


def test_a_member_with_nothing_else_to_do_sleeps_for_longer() -> None:
    membership = joined(10.0)
    said = []
    while (now := membership.due()) < 16.0:
        membership.heard(now)
        assert membership.say(now) == "beat"
        said.append(now)
    assert said == [10.0, 12.0, 14.0]
    assert QUIET_BEAT_S < SILENCE_MAX_S / 2  # one that is lost or late does no harm


def test_a_silent_broker_is_lost() -> None:
    membership = joined(10.0)
    assert membership.say(10.0) == "beat"
    assert membership.say(10.0 + SILENCE_MAX_S) == "beat"
    assert membership.say(10.1 + SILENCE_MAX_S) == "lost"
    assert not membership.joined
    assert membership.say(10.1 + SILENCE_MAX_S) == "hello"


def test_a_broker_that_is_heard_is_not_lost() -> None:
    membership = joined(10.0)
    membership.heard(14.0)
    assert membership.say(18.9) == "beat"
    assert membership.say(19.1) == "lost"


def test_a_local_peer_that_lost_its_broker_waits_for_the_next() -> None:
    membership = Membership(local=True)
    membership.found()
    assert membership.say(1.0) == "hello"
    membership.welcomed(7, 1.0)
    membership.lost()
    assert membership.say(20.0) == ""
    membership.found()
    assert membership.say(20.1) == "hello"


def test_a_peer_that_the_broker_does_not_know_says_hello_at_once() -> None:
    membership = joined(10.0)
    membership.unknown()
    assert membership.say(10.0) == "hello"


def test_a_hello_under_way_is_not_said_again_for_every_message_that_was_not_understood() -> None:
    membership = joined(10.0)
    membership.unknown()
    said = []
    for _ in range(5):
        said.append(membership.say(10.0))
        membership.unknown()
    assert said == ["hello", "", "", "", ""]
