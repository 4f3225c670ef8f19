"""Threads that share a client: who leads, who follows, and what happens when one of them goes."""

from __future__ import annotations

import gc
import signal
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from penstock.client import Client, PenstockError, Result
from penstock.client.talk import Talk
from penstock.wire.errors import CANCELLED, DEADLINE, LOST, OVERLOADED

if TYPE_CHECKING:
    from tests.client.serving import Server

IMAGE = np.ones((1, 1, 8, 8), np.float32)
DEADLINE_S = 20.0


@pytest.fixture
def talk(client: Client) -> Talk:
    """The client's, once it is there, and nobody leads."""
    client.infer("digits", {"image": IMAGE})
    assert client._talk is not None
    return client._talk


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(16) as pool:
        yield pool


def until(condition: Callable[[], object]) -> None:
    latest = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < latest, "it did not happen"
        time.sleep(0)


def ask(client: Client, timeout: float = DEADLINE_S) -> Result:
    return client.infer("digits", {"image": IMAGE}, timeout=timeout)


def code(future: Future[Any]) -> str:
    error = future.exception(DEADLINE_S)
    assert isinstance(error, PenstockError), error
    return error.code


def at_rest(talk: Talk) -> bool:
    caller = talk.link.caller
    return not (talk._leader or talk._followers or talk._under_way or caller.calls or caller._acks)


def test_first_leads_and_hands_on_to_whoever_has_waited_longest(
    client: Client, talk: Talk, server: Server, pool: ThreadPoolExecutor
) -> None:
    with server.worker_stopped():
        first = pool.submit(ask, client, 0.3)
        until(lambda: talk._leader is not None)
        leader = talk._leader
        others = []
        for count in range(1, 4):
            others.append(pool.submit(ask, client))
            until(lambda: len(talk._followers) == count)  # noqa: B023
        assert talk._leader is leader
        oldest = next(iter(talk._followers))
        assert code(first) == DEADLINE
        until(lambda: talk._leader is oldest)
        assert len(talk._followers) == 2
    assert [len(each.result(DEADLINE_S)) for each in others] == [1, 1, 1]
    until(lambda: at_rest(talk))


def test_acknowledgment_of_the_last_result_follows(client: Client, talk: Talk) -> None:
    ask(client)
    until(lambda: at_rest(talk))


def test_threads_and_futures_at_once(client: Client, talk: Talk, pool: ThreadPoolExecutor) -> None:
    wide = np.random.default_rng(1).random((16, 200_000), np.float32)

    def work(at: int) -> None:
        for _ in range(5):
            row = wide[at : at + 1]
            future = client.submit("wide", {"x": row})
            assert ask(client)["scores"].shape == (1, 10)
            np.testing.assert_array_equal(client.infer("wide", {"x": row})["y"], row)
            np.testing.assert_array_equal(future.result(DEADLINE_S)["y"], row)

    for each in [pool.submit(work, at) for at in range(16)]:
        each.result(60)
    until(lambda: at_rest(talk))
    talk.link.caller.validate()


def test_future_ends_after_a_leader_has_left(
    client: Client, talk: Talk, server: Server, pool: ThreadPoolExecutor
) -> None:
    with server.worker_stopped():
        leading = pool.submit(ask, client, 0.3)
        until(lambda: talk._leader is not None)
        future = client.submit("digits", {"image": IMAGE}, timeout=DEADLINE_S)
        assert code(leading) == DEADLINE
    assert len(future.result(DEADLINE_S)) == 1


def test_callback_may_ask_and_cancel(client: Client) -> None:
    told: list[Result] = []
    called = threading.Event()
    other = client.submit("patient", {"x": np.ones((1, 2), np.float32)}, timeout=60.0)

    def back(future: Future[Result]) -> None:
        told.append(ask(client))
        other.cancel()
        client.submit("digits", {"image": IMAGE})
        called.set()

    client.submit("digits", {"image": IMAGE}).add_done_callback(back)
    assert called.wait(DEADLINE_S)
    assert len(told[0]) == 1
    assert other.cancelled()


def test_no_more_wait_for_a_callback_that_does_not_return_than_may_be_under_way(
    client: Client, talk: Talk, server: Server
) -> None:
    caller = talk.link.caller
    caller.identity = replace(caller.identity, calls_max=8)
    inside, go_on = threading.Event(), threading.Event()

    def stay(future: Future[Any]) -> None:
        inside.set()
        go_on.wait(DEADLINE_S)

    with server.worker_stopped():  # else it may be answered by then, and this thread be the one to call back
        client.submit("digits", {"image": IMAGE}).add_done_callback(stay)
    assert inside.wait(DEADLINE_S)
    try:
        futures = [client.submit("digits", {"image": IMAGE}) for _ in range(8)]
        with pytest.raises(PenstockError, match="does a callback of a future not return") as refused:
            client.submit("digits", {"image": IMAGE})
        assert refused.value.code == OVERLOADED
    finally:
        go_on.set()
    for future in futures:
        assert future.result(DEADLINE_S)


def test_closing_ends_leader_and_followers(server: Server, pool: ThreadPoolExecutor) -> None:
    client = Client(server.runtime, timeout=DEADLINE_S)
    ask(client)
    talk = client._talk
    assert talk is not None
    with server.worker_stopped():
        asked = [pool.submit(ask, client) for _ in range(4)]
        until(lambda: talk._leader is not None and len(talk._followers) == 3)
        client.close()
        assert [code(each) for each in asked] == [CANCELLED] * 4
    assert not talk.thread.is_alive()


def interrupt(when: Callable[[], object]) -> threading.Thread:
    """Ctrl-C on the main thread, once the condition holds."""

    def work() -> None:
        until(when)
        signal.pthread_kill(main, signal.SIGINT)

    main = threading.get_ident()
    thread = threading.Thread(target=work)
    thread.start()
    return thread


@pytest.mark.parametrize("follows", [False, True])
def test_who_is_interrupted_hands_on_and_cancels(
    client: Client, talk: Talk, server: Server, pool: ThreadPoolExecutor, follows: bool
) -> None:
    with server.worker_stopped():
        others = [pool.submit(ask, client)] if follows else []
        until(lambda: (talk._leader is not None) is follows)
        thread = interrupt(lambda: len(talk._followers) if follows else talk._leader)
        with pytest.raises(KeyboardInterrupt):
            ask(client)
        thread.join()
        until(lambda: len(talk.link.caller.calls) == len(others))
        assert (talk._leader is not None) is follows
        others.append(pool.submit(ask, client))
    assert [len(each.result(DEADLINE_S)) for each in others] == [1] * len(others)
    until(lambda: at_rest(talk))


@pytest.mark.parametrize("follows", [False, True])
def test_interrupt_inside_the_core_ends_all_and_begins_anew(
    client: Client,
    talk: Talk,
    server: Server,
    pool: ThreadPoolExecutor,
    follows: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def interrupted(*arguments: Any) -> None:
        raise KeyboardInterrupt

    link = talk.link
    with server.worker_stopped():
        asked = [pool.submit(ask, client) for _ in range(2 if follows else 0)]
        until(lambda: len(talk._followers) == (1 if follows else 0))
        asked.append(client.submit("digits", {"image": IMAGE}))
        until(lambda: len(link.caller.calls) == len(asked))
        assert link.short is not None
        with monkeypatch.context() as patched:
            patched.setattr(link.short, "submit", interrupted)
            with pytest.raises(KeyboardInterrupt):
                ask(client)
        assert [code(each) for each in asked] == [LOST] * len(asked)
    assert len(ask(client)) == 1
    assert talk.link is not link
    until(lambda: at_rest(talk))


def test_what_goes_wrong_in_the_keeper_does_not_end_it(
    client: Client, talk: Talk, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def wrong(*arguments: Any) -> None:
        raise ZeroDivisionError

    link = talk.link
    monkeypatch.setattr(link.caller, "submit", wrong)
    assert code(client.submit("digits", {"image": IMAGE})) == LOST
    assert len(ask(client)) == 1
    assert "a defect of the client" in caplog.text
    assert talk.link is not link


def test_who_asks_from_inside_the_core_is_told_so(client: Client, talk: Talk, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a signal handler may, which runs between any two bytecodes of the main thread."""
    told: list[PenstockError] = []

    def handler(*arguments: Any) -> None:
        with pytest.raises(PenstockError) as error:
            ask(client)
        told.append(error.value)

    short = talk.link.short
    with monkeypatch.context() as patched:
        patched.setattr(short, "submit", handler)
        assert len(ask(client)) == 1, "what it interrupted goes on"
    assert [error.code for error in told] == [LOST]
    assert len(ask(client)) == 1
    until(lambda: at_rest(talk))


def test_closed_client_is_freed_at_once(server: Server) -> None:
    """And its descriptors with it, not only when garbage is next collected."""
    client = Client(server.runtime, timeout=DEADLINE_S)
    ask(client)
    client.submit("digits", {"image": IMAGE}).result(DEADLINE_S)
    with pytest.raises(PenstockError), server.worker_stopped():
        ask(client, 0.01)
    assert client._talk is not None
    talk = weakref.ref(client._talk)
    gc.disable()
    try:
        client.close()
        del client
        assert talk() is None
    finally:
        gc.enable()
