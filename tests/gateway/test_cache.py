"""Which requests are the same, and who waits for whom."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from penstock.client.arrays import make_form
from penstock.gateway.cache import (
    KEY_BYTES,
    LEADS,
    NO_STORE,
    PAST,
    REFRESH,
    WAITS,
    Flight,
    Flights,
    form_key,
    ran,
    read_cache_control,
    request_key,
)
from penstock.gateway.cachevalue import Kept, pack_value, problem_of_url, unpack_value
from penstock.wire.codec import pack_outcome
from penstock.wire.messages import Outcome
from penstock.wire.models import Layout, ModelSpec, Tensor, TensorSpec, Unnamed

X, TEXT = TensorSpec("x", "FP32", (-1, 2)), TensorSpec("t", "BYTES", (-1, 1))
Y, Z = TensorSpec("y", "FP32", (-1, 2)), TensorSpec("z", "FP32", (-1, 2))
SPEC = ModelSpec("m", "1", "onnx", (X,), (Y, Z), True, 64, "b1")


def key(
    spec: ModelSpec = SPEC, rows: int = 1, outputs: tuple[str, ...] = (), priority: int = 0, tenant: str = ""
) -> bytes:
    layout = Layout((Tensor("x", "FP32", (rows, 2), 0, 8 * rows),), outputs)
    return form_key(make_form(spec, layout, 8 * rows, priority, tenant), spec)


def test_who_asks_and_how_urgently_does_not_matter() -> None:
    assert key() == key(priority=3, tenant="gold") == key(spec=Unnamed(*SPEC)) == key(outputs=("y", "z"))


@pytest.mark.parametrize(
    "other",
    [
        key(spec=SPEC._replace(name="n")),
        key(spec=SPEC._replace(version="2")),
        key(spec=SPEC._replace(build="b2")),
        key(rows=2),
        key(outputs=("y",)),
        key(outputs=("z", "y")),
    ],
)
def test_what_changes_the_answer_changes_the_key(other: bytes) -> None:
    assert other != key()
    assert request_key(other, b"12345678") != request_key(key(), b"12345678")


def test_strings_that_are_cut_elsewhere_are_others() -> None:
    spec = SPEC._replace(inputs=(TEXT, TEXT._replace(name="u")))
    keys = set()
    for first in (6, 7):
        layout = Layout((Tensor("t", "BYTES", (1, 1), 0, first), Tensor("u", "BYTES", (1, 1), first, 13 - first)))
        keys.add(form_key(make_form(spec, layout, 13), spec))
    assert len(keys) == 2


@given(st.binary(max_size=100), st.binary(max_size=100))
def test_other_bytes_have_another_key(one: bytes, other: bytes) -> None:
    assert (request_key(key(), one) == request_key(key(), memoryview(bytearray(other)))) == (one == other)


def test_an_answer_says_what_it_is_of() -> None:
    assert ran(pack_outcome(Outcome("m", "7", ()))) == ("m", "7")


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (b"no-cache", REFRESH),
        (b"max-age=3,  No-Cache", REFRESH),
        (b"no-store", NO_STORE),
        (b"no-cache, no-store", NO_STORE),
        (b"only-if-cached", ""),
        (b"", ""),
    ],
)
def test_cache_control_is_read(value: bytes, expected: str) -> None:
    assert read_cache_control({"cache-control": value}) == expected
    assert read_cache_control({}) == ""


# --- values ---


@given(st.binary(min_size=KEY_BYTES, max_size=KEY_BYTES), st.floats(0, 1e9), st.binary(max_size=50), st.binary())
def test_a_value_comes_back(name: bytes, at: float, body: bytes, payload: bytes) -> None:
    assert unpack_value(name, b"before" + pack_value(name, at, body, payload), 6) == Kept(at, body, payload)


@given(st.data(), st.binary(max_size=50), st.binary(max_size=5000))
def test_a_value_with_any_byte_changed_or_cut_or_of_another_key_is_none(
    data: st.DataObject, body: bytes, payload: bytes
) -> None:
    name = b"k" * KEY_BYTES
    value = pack_value(name, 1.0, body, payload)
    at = data.draw(st.integers(0, len(value) - 1))
    changed = bytearray(value)
    changed[at] ^= data.draw(st.integers(1, 255))
    assert unpack_value(name, bytes(changed)) is None
    assert unpack_value(name, value[:at]) is None
    assert unpack_value(name, value + b"x") is None
    assert unpack_value(b"j" * KEY_BYTES, value) is None


@given(st.binary(max_size=200))
def test_anything_is_a_value_or_none(value: bytes) -> None:
    unpack_value(b"k" * KEY_BYTES, value)


def test_a_store_is_a_url() -> None:
    assert [problem_of_url(url) for url in ("", "redis://h:1/0", "rediss://h", "unix:///run/redis.sock")] == [""] * 4
    assert "it is a URL such as redis://HOST:6379/0, not 'localhost'" in problem_of_url("localhost")


# --- flights ---


@dataclass(eq=False)
class Who:
    """One that asks. ``ended``: how often, and by what."""

    flight: Flight[Who] | None = None
    ended: list[str] = field(default_factory=list)


class Waiting(RuleBasedStateMachine):
    """Each that has joined ends once, nobody waits for a flight that is over, and what is computed is wanted."""

    KEYS = (b"a", b"b")
    WAITING_MAX = 3

    def __init__(self) -> None:
        super().__init__()
        self.flights: Flights[Who, Flight[Who]] = Flights(self.WAITING_MAX, Flight)
        self.there: list[Who] = []  # that have not ended
        self.under_way: dict[bytes, Flight[Who]] = {}  # a request of which is computed

    @rule(name=st.sampled_from(KEYS))
    def join(self, name: bytes) -> None:
        who = Who()
        role, who.flight = self.flights.join(name, who)
        if name not in self.under_way:
            assert role == LEADS
            self.under_way[name] = who.flight
        else:
            waiting = sum(len(each.waiting) for each in self.under_way.values())
            if role == PAST:
                assert waiting == self.WAITING_MAX
                return
            assert role == WAITS
        assert who.flight is self.under_way[name]
        self.there.append(who)

    def end(self, who: Who, how: str) -> None:
        who.ended.append(how)
        self.there.remove(who)

    @precondition(lambda self: self.under_way)
    @rule(data=st.data())
    def land(self, data: st.DataObject) -> None:
        flight = self.under_way.pop(data.draw(st.sampled_from(sorted(self.under_way))))
        leader = flight.leader
        for who in ([] if leader is None else [leader]) + self.flights.land(flight):
            self.end(who, "landed")
        assert not [who for who in self.there if who.flight is flight], "one was forgotten"

    @precondition(lambda self: self.under_way)
    @rule(data=st.data())
    def fail(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.under_way)))
        flight = self.under_way[name]
        if flight.leader is not None:
            self.end(flight.leader, "failed")
        others = [who for who in self.there if who.flight is flight]
        leader = self.flights.fail(flight)
        assert leader is (others[0] if others else None), "it was not the turn of this one"
        if leader is None:
            del self.under_way[name]

    @precondition(lambda self: self.there)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        who = data.draw(st.sampled_from(self.there))
        assert who.flight is not None
        self.end(who, "left")
        others = [each for each in self.there if each.flight is who.flight]
        assert self.flights.leave(who.flight, who) == (not others)
        if not others:
            del self.under_way[who.flight.key]

    @invariant()
    def holds(self) -> None:
        self.flights.validate()
        assert len(self.flights) == len(self.under_way)
        for who in self.there:
            assert who.ended == []


TestWaiting = Waiting.TestCase


def test_who_leaves_when_all_is_over_changes_nothing() -> None:
    flights: Flights[str, Flight[str]] = Flights(1, Flight)
    _, flight = flights.join(b"a", "one")
    assert flights.land(flight) == []
    assert not flights.leave(flight, "one")
