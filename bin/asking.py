"""Commands that ask a server of its models: where it is, how long to wait, and what to say when it does not answer."""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple, NoReturn, TypeVar

import click

from penstock.bin import options
from penstock.client import Client, PenstockError
from penstock.wire.models import ModelState, Route

F = TypeVar("F", bound=Callable[..., Any])

EXIT_FAILED: Final = 1  # the server did not do it, or does not answer
REACH_S: Final = 5.0  # for a server to answer at all
_LOOK_S: Final = 0.05  # between two looks at what a server serves: it says so by itself, to whoever is connected


class Outcome(NamedTuple):
    """What was waited for has come, or never will; and what to say."""

    ok: bool
    sentence: str


# Sees the states of a model's versions, and its route; None: it is to be looked at again.
Look = Callable[[Mapping[str, ModelState], Route | None], Outcome | None]


class Server(NamedTuple):
    """A server, and for how many seconds a command waits for what it asks."""

    address: Path | str | None
    timeout_s: float

    def connect(self) -> Client:
        return Client(self.address, timeout=min(REACH_S, self.timeout_s))

    def wait(self, model: str, look: Look) -> Outcome:
        """Until ``look`` has seen enough, or the time is up. Raises PenstockError where nobody answers."""
        until = time.monotonic() + self.timeout_s
        with self.connect() as client:
            while True:
                states = {state.version: state for state in client.models() if state.name == model}
                route = next((route for route in client.routes() if route.name == model), None)
                outcome = look(states, route)
                if outcome is not None:
                    return outcome
                if time.monotonic() >= until:
                    return Outcome(False, _late(model, states, route, self.timeout_s))
                time.sleep(_LOOK_S)


def _late(model: str, states: Mapping[str, ModelState], route: Route | None, limit_s: float) -> str:
    current = f", and serves version {route.versions[0]}" if route is not None and route.versions else ""
    said = "; ".join(
        f"version {state.version} is {state.state}{f' ({state.reason})' if state.reason else ''}"
        for state in states.values()
    )
    return (
        f"the server has not followed within {limit_s:g} s{current}: {said or f'it has no model {model!r}'}; it may "
        "still do so ('penstock models ls'), unless it does not watch its repository (model_control in [worker])"
    )


def asks(timeout_s: float) -> Callable[[F], F]:
    """Of a command below ``penstock models``: gives it a Server, by options of its own or else by those of the group.
    What the server refuses is a sentence and exit code 1."""

    def decorate(command: F) -> F:
        @functools.wraps(command)
        def run(runtime_dir: Path | None, server: str | None, timeout: float | None, **arguments: Any) -> None:
            group = click.get_current_context().parent
            given = {} if group is None else group.params
            asked = server or runtime_dir or given.get("server") or given.get("runtime_dir")
            limit_s = next((each for each in (timeout, given.get("timeout")) if each is not None), timeout_s)
            try:
                command(Server(asked, limit_s), **arguments)
            except PenstockError as error:
                fail(str(error))

        help_text = f"Seconds.  [default: {timeout_s:g}]"
        wrapped: Any = click.option("--timeout", type=click.FloatRange(0, min_open=True), help=help_text)(run)
        found: F = options.runtime_dir(options.server(wrapped))
        return found

    return decorate


def fail(sentence: str, code: int = EXIT_FAILED) -> NoReturn:
    click.echo(f"penstock: {sentence}", err=True)
    sys.exit(code)


def end(outcome: Outcome) -> None:
    """Say what came of it."""
    if not outcome.ok:
        fail(outcome.sentence)
    click.echo(outcome.sentence)
