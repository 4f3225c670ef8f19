"""What a process has had its server told to load, or to serve no more, and who hears what came of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, TypeAlias

from penstock.client.events import OrderDone
from penstock.client.link import Link
from penstock.client.publish import check_model
from penstock.wire.errors import BAD_INPUT, DEADLINE, OVERLOADED, TOO_LARGE, UNAVAILABLE, PenstockError
from penstock.wire.messages import MAX_CONFIG

ORDERS_MAX: Final = 16  # under way
ORDER_WAIT_S: Final = 600.0  # for what came of one; it goes on at the server

Then: TypeAlias = "Callable[[PenstockError | None], None]"


class Orders:
    """Of one link, on the thread that has it. Each ends once: with the broker's word, or with the broker."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self._waiting: dict[int, Then] = {}  # by serial
        link.on_order = self._done

    def send(self, action: str, model: str, config: str, then: Then) -> int:
        """Have ``then`` called with what came of it: nothing to say, or why it was not done. Returns its serial.
        ``action``: LOAD or UNLOAD. ``config``: in place of the model's own configuration, as JSON; "" for that. Raises
        PenstockError."""
        caller = self._link.caller
        if problem := check_model(model):
            raise PenstockError(BAD_INPUT, problem)
        if len(config) > MAX_CONFIG:
            raise PenstockError(
                TOO_LARGE, f"a configuration has at most {MAX_CONFIG} characters, and this one has {len(config)}"
            )
        if not caller.membership.joined:
            raise PenstockError(UNAVAILABLE, f"no broker answers at {caller.identity.address}", 1.0)
        if len(self._waiting) >= ORDERS_MAX:
            raise PenstockError(OVERLOADED, f"{ORDERS_MAX} orders of this process are under way; try again later", 1.0)
        serial, say = caller.order(action, model, config)
        self._waiting[serial] = then
        self._link.say(say.message)
        return serial

    def forget(self, serial: int) -> None:
        """Nobody waits for it any more; it goes on."""
        self._waiting.pop(serial, None)

    def _done(self, done: OrderDone) -> None:
        then = self._waiting.pop(done.serial, None)
        if then is not None:
            then(done.error)


def late(action: str, model: str, limit_s: float) -> PenstockError:
    """What who has waited for so long is told."""
    return PenstockError(
        DEADLINE,
        f"the {action} of model '{model}' has not ended within {limit_s:g} s; it goes on, and the states of the models "
        "tell when it has",
    )
