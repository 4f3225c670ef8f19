"""What waits for callers that do not read."""

from __future__ import annotations

from penstock.broker.backlog import Backlog

ONE, OTHER = b"caller01", b"caller02"


class Taker:
    """Takes as many messages as it is said to."""

    def __init__(self, room: int = 0) -> None:
        self.room = room
        self.took: list[bytes] = []
        self.gone: set[bytes] = set()

    def send(self, peer: bytes, packed: bytes) -> str:
        if peer in self.gone:
            return "gone"
        if len(self.took) >= self.room:
            return "full"
        self.took.append(packed)
        return "sent"


def test_what_waits_leaves_in_order_as_far_as_it_is_taken() -> None:
    backlog, taker = Backlog(100), Taker(2)
    for number in range(3):
        assert backlog.add(ONE, b"%d" % number)
    assert (list(backlog.send(taker.send)), taker.took, ONE in backlog) == ([], [b"0", b"1"], True)
    taker.room = 9
    assert (list(backlog.send(taker.send)), taker.took, ONE in backlog) == ([], [b"0", b"1", b"2"], False)
    assert not backlog


def test_what_is_too_much_drops_all_of_that_peer_and_of_no_other() -> None:
    backlog = Backlog(10)
    assert backlog.add(ONE, bytes(10))
    assert backlog.add(OTHER, bytes(1))
    assert not backlog.add(ONE, bytes(1))
    assert (ONE in backlog, OTHER in backlog, len(backlog)) == (False, True, 1)
    assert backlog.add(ONE, bytes(10)), "it begins anew"


def test_what_has_left_makes_room() -> None:
    backlog, taker = Backlog(10), Taker(1)
    assert backlog.add(ONE, bytes(6))
    assert backlog.add(ONE, bytes(4))
    assert list(backlog.send(taker.send)) == []
    assert backlog.add(ONE, bytes(6))
    assert not backlog.add(ONE, bytes(1))


def test_a_peer_that_has_gone_is_told_and_forgotten() -> None:
    backlog, taker = Backlog(10), Taker(9)
    taker.gone.add(ONE)
    assert backlog.add(ONE, b"1")
    assert backlog.add(OTHER, b"2")
    assert (list(backlog.send(taker.send)), taker.took, len(backlog)) == ([ONE], [b"2"], 0)


def test_what_waits_for_who_is_no_caller_any_more_is_dropped() -> None:
    backlog, taker = Backlog(100), Taker(9)
    for peer in ONE, OTHER:
        backlog.add(peer, peer)
    backlog.keep({OTHER})
    assert (ONE in backlog, OTHER in backlog) == (False, True)
    assert list(backlog.send(taker.send)) == []
    assert taker.took == [OTHER]
    assert backlog.add(ONE, bytes(100)), "nothing is counted of what was dropped"
