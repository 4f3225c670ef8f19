"""What holds for a caller whatever the broker and the workers say, and in whatever order."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

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

from penstock.client.calls import WAITING
from penstock.wire.codec import ids_in
from penstock.wire.errors import DEADLINE, UNAVAILABLE
from penstock.wire.events import BrokerFound, Garbage
from penstock.wire.messages import (
    COMPLETE,
    INLINE_MAX_BYTES,
    PARTIAL,
    Bye,
    Form,
    HelloWanted,
    Refusal,
    Refusals,
    Submit,
)

if TYPE_CHECKING:
    from tests.client.conftest import Conversation, End

TIMEOUT_MAX_S = 3.0
# Few ids, so that the same are hit again and again; some of them are unknown when they come.
IDS = st.lists(st.integers(1, 8), min_size=1, max_size=4, unique=True).map(tuple)


def payloads_in(message: Submit) -> dict[int, bytes]:
    """By id, as a broker reads them."""
    blob, frames = message.blob, list(message.frames)
    found = {}
    for group in message.groups:
        for number in group.ids:
            if group.nbytes > INLINE_MAX_BYTES:
                found[number] = bytes(frames.pop(0))
            else:
                found[number], blob = blob[: group.nbytes], blob[group.nbytes :]
    return found


def test_every_request_ends_exactly_once(
    new_conversation: Callable[..., Conversation], form: Callable[..., Form]
) -> None:
    forms = [form("one"), form("two", 16), form("large", 20_000)]

    class Caller(RuleBasedStateMachine):
        """Beside the caller: what its end should have been for each request, as far as that can be foretold."""

        def __init__(self) -> None:
            super().__init__()
            self.conversation = new_conversation()
            self.caller = self.conversation.caller
            self.ends: dict[int, End] = {}
            self.cancelled: set[int] = set()
            self.expected: dict[int, str] = {}
            self.answered: set[int] = set()  # what may be acknowledged
            self.known: set[int] = set()  # to the broker that is there
            self.payloads: dict[int, bytes] = {}
            self.epoch = 0

        def under_way(self, number: int) -> bool:
            """Some broker has been sent it, and so some worker may have it."""
            call = self.caller.calls.get(number)
            return call is not None and call.state != WAITING

        @rule(choice=st.lists(st.tuples(st.integers(0, 2), st.floats(0.001, TIMEOUT_MAX_S)), min_size=1, max_size=3))
        def submit(self, choice: list[tuple[int, float]]) -> None:
            for which, timeout_s in choice:
                chosen = forms[which]
                payload = bytes([len(self.ends) % 256]) * chosen.nbytes
                number, end = self.conversation.submit(chosen, payload, timeout_s)
                assert number not in self.ends, "an id is used again"
                self.ends[number], self.payloads[number] = end, payload

        @rule()
        def send(self) -> None:
            self.conversation.flush()

        @rule(number=st.integers(1, 8))
        def cancel(self, number: int) -> None:
            if number in self.caller.calls:
                self.cancelled.add(number)
            self.caller.cancel(number)

        @rule(ids=IDS, partial=st.booleans())
        def results(self, ids: tuple[int, ...], partial: bool) -> None:
            if not partial:
                self.answered.update(ids)
                self.foretell(ids, "answer")
            self.conversation.answer(*ids, status=PARTIAL if partial else COMPLETE)

        @rule(ids=IDS)
        def failures(self, ids: tuple[int, ...]) -> None:
            self.answered.update(ids)
            self.foretell(ids, "error")
            self.conversation.answer_failed(*ids, code="model_failed", sentence="no")

        @rule(ids=IDS)
        def refusals(self, ids: tuple[int, ...]) -> None:
            ids = tuple(self.known.intersection(ids))
            if ids and self.caller.membership.joined:
                self.foretell(ids, "error")
                self.conversation.refuse(*ids)

        @rule(ids=IDS)
        def what_is_not_for_it(self, ids: tuple[int, ...]) -> None:
            refusals = [Refusal(number, "overloaded", "of another epoch", 0) for number in ids]
            self.conversation.broker(Refusals(self.epoch + 1, refusals))
            self.conversation.hear(Garbage("worker", "not msgpack"))

        def foretell(self, ids: tuple[int, ...], end: str) -> None:
            for number in ids:
                if self.under_way(number):
                    self.expected.setdefault(number, end)

        @precondition(lambda self: self.caller.membership.joined)
        @rule(how=st.sampled_from(["found", "not found", "bye", "forgot", "restarted", "restarted unheard"]))
        def lose(self, how: str) -> None:
            self.known.clear()
            match how:
                case "found":
                    self.conversation.lose()
                    self.conversation.hear(BrokerFound())
                case "not found":
                    self.conversation.lose()
                case "bye":
                    self.conversation.broker(Bye(self.epoch))
                case "forgot":
                    self.conversation.broker(HelloWanted(self.epoch))
                case "restarted":
                    self.conversation.broker(HelloWanted(self.epoch + 1))
                case "restarted unheard":
                    self.epoch += 1
                    self.conversation.join(self.epoch)

        @initialize(joined=st.booleans())
        def begin(self, joined: bool) -> None:
            if joined:
                self.welcome(True)

        @rule(anew=st.booleans())
        def welcome(self, anew: bool) -> None:
            if anew and not self.caller.membership.joined:
                self.epoch += 1
            if self.epoch:
                self.conversation.join(self.epoch)

        @rule(seconds=st.sampled_from([0.001, 0.004, 0.05, 0.2, 1.0, 6.0]))
        def time(self, seconds: float) -> None:
            self.conversation.pass_time(seconds)

        @invariant()
        def no_end_comes_twice_or_unwanted(self) -> None:
            for number, end in self.ends.items():
                assert end.calls <= (number not in self.cancelled)
                assert end.calls + (number in self.cancelled) + (number in self.caller.calls) == 1

        @invariant()
        def the_first_word_counts(self) -> None:
            for number, expected in self.expected.items():
                end = self.ends[number]
                assert (len(end.answers), len(end.errors)) == ((1, 0) if expected == "answer" else (0, 1))

        @invariant()
        def without_a_word_only_time_ends_a_request(self) -> None:
            for number, end in self.ends.items():
                if number not in self.expected:
                    assert not end.answers
                    assert {error.code for error in end.errors} <= {DEADLINE, UNAVAILABLE}

        @invariant()
        def the_broker_is_told_what_is_true(self) -> None:
            told, self.conversation.sent = self.conversation.sent, []
            for message in told:
                assert message.epoch == self.epoch
                assert self.answered.issuperset(ids_in(message.acks, dict.fromkeys(range(1000))))
                assert self.known.issuperset(message.cancels)
                assert not self.caller.calls.keys() & set(message.cancels)
                asked = payloads_in(message)
                assert min(asked, default=1 << 64) > max(self.known, default=0), "sent twice, or not in their order"
                assert asked.items() <= self.payloads.items()
                self.known |= asked.keys()
            if not self.caller.membership.joined:
                self.known.clear()

        @rule()
        def every_broker_has_all_that_is_under_way(self) -> None:
            self.send()
            self.the_broker_is_told_what_is_true()
            if self.caller.membership.joined:
                assert self.caller.calls.keys() <= self.known

        def teardown(self) -> None:
            self.conversation.pass_time(TIMEOUT_MAX_S + 1.0)
            assert not self.caller.calls
            self.no_end_comes_twice_or_unwanted()

    run_state_machine_as_test(Caller, settings=settings(max_examples=100, stateful_step_count=50, deadline=None))
