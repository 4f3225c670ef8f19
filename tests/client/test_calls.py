"""The table that moves a call from state to state."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest

from penstock.client.calls import AGAIN, ENDED, SENT, TABLE, WAITING, Call, IllegalTransition
from penstock.wire.messages import Form

if TYPE_CHECKING:
    from tests.client.conftest import Conversation

STATES = (WAITING, SENT, AGAIN, ENDED)
LEGAL = {
    (WAITING, "send"): SENT,
    (WAITING, "end"): ENDED,
    (SENT, "partial"): SENT,
    (SENT, "lose"): AGAIN,
    (SENT, "end"): ENDED,
    (AGAIN, "send"): SENT,
    (AGAIN, "partial"): AGAIN,
    (AGAIN, "end"): ENDED,
}


def make_call(conversation: Conversation, form: Form, state: str) -> Call:
    number, _ = conversation.submit(form)
    call = conversation.caller.calls[number]
    call.state = state
    return call


def test_table_names_only_known_states() -> None:
    assert {state for moves in TABLE.values() for pair in moves.items() for state in pair} == set(STATES)


@pytest.mark.parametrize("event", TABLE)
@pytest.mark.parametrize("state", STATES)
def test_only_legal_transitions_are_taken(
    conversation: Conversation, form: Callable[..., Form], state: str, event: str
) -> None:
    call = make_call(conversation, form(), state)
    if (state, event) in LEGAL:
        assert call.move(event) == call.state == LEGAL[state, event]
    else:
        with pytest.raises(IllegalTransition, match=f"'{event}' cannot happen to <call 1 {state}>"):
            call.move(event)
        assert call.state == state


def test_unknown_event_is_illegal(conversation: Conversation, form: Callable[..., Form]) -> None:
    with pytest.raises(IllegalTransition, match="'sned' cannot happen"):
        make_call(conversation, form(), WAITING).move("sned")
