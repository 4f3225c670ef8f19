"""Who asked to be called is called: signed, again and again until it has arrived, and nobody else."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest

from penstock.jobs.callbacks import Callbacks, read_secret, show_secret, sign, signing_key
from penstock.jobs.job import (
    CALLBACK_FAILED,
    DELIVERED,
    PENDING,
    SUCCEEDED,
    Callback,
    Job,
    StoredRequest,
    StoredResponse,
)
from penstock.jobs.options import JobsOptions
from penstock.jobs.post import look_up
from penstock.jobs.store import Store, StoreError
from tests.jobs.conftest import Opener
from tests.jobs.strangers import Call, Stranger, raw

_WAIT_S = 30.0
REQUEST = StoredRequest(b"POST", b"/", {}, b"{}", "m")
RESPONSE = StoredResponse(200, {}, b'{"x": 1}')
ALLOW: Any = {"callback_allow": ("127.0.0.0/8",)}


class Clock:
    """Wall time that tests move."""

    def __init__(self) -> None:
        self.now = 1_000_000.5

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def stranger() -> Iterator[Stranger]:
    with Stranger() as stranger:
        yield stranger


@pytest.fixture
def clock() -> Clock:
    return Clock()


Begin = Callable[..., Callbacks]


@pytest.fixture
def begin(clock: Clock) -> Iterator[Begin]:
    """Callbacks of a store, running."""
    begun = []

    def start(store: Store, owner: str = "c", **more: Any) -> Callbacks:
        def body_of(job: Job, response: StoredResponse | None) -> bytes:
            assert job.callback is not None
            result = None if response is None else response.body.decode()
            return json.dumps({"id": job.id, "result": result, "attempts": job.callback.attempts}).encode()

        more = {"look": lambda *_: ["127.0.0.1"], "clock": clock, **more}
        begun.append(Callbacks(store, store.options, owner, body_of, **more))
        begun[-1].start()
        return begun[-1]

    yield start
    for each in begun:
        each.stop(_WAIT_S)


def ended_job(store: Store, url: str, now: float) -> str:
    job = store.submit(replace(REQUEST, callback_url=url), now)
    store.claim("a", 1, now, 15.0)
    assert store.finish(job.id, "a", SUCCEEDED, RESPONSE, "", now)
    return job.id


def callback(store: Store, id: str) -> Callback:
    (job,) = store.get([id], 0.0)
    assert job.callback is not None
    return job.callback


def wait_until(store: Store, id: str, which: Callable[[Callback], bool]) -> Callback:
    until = time.monotonic() + _WAIT_S
    while not which(found := callback(store, id)):
        assert time.monotonic() < until, found
    return found


def tried(attempts: int) -> Callable[[Callback], bool]:
    """So many times, and the last is over."""
    return lambda found: found.attempts == attempts and not found.owner


def is_genuine(key: bytes, call: Call) -> bool:
    """As https://www.standardwebhooks.com tells who is called to verify, without a line of ours."""
    text = call.headers["webhook-id"] + "." + call.headers["webhook-timestamp"] + "."
    wanted = base64.b64encode(hmac.new(key, text.encode() + call.body, hashlib.sha256).digest()).decode()
    return any(hmac.compare_digest(f"v1,{wanted}", each) for each in call.headers["webhook-signature"].split(" "))


def test_a_job_that_has_ended_is_told_and_signed(
    opened: Opener, stranger: Stranger, begin: Begin, clock: Clock
) -> None:
    store = opened(**ALLOW)
    callbacks = begin(store)
    id = ended_job(store, f"http://stranger.example:{stranger.port}/done?x=1", clock.now)
    callbacks.wake()
    call = stranger.next()
    assert call.path == "/done?x=1"
    assert json.loads(call.body) == {"id": id, "result": '{"x": 1}', "attempts": 1}
    assert call.headers["content-type"] == "application/json"
    assert call.headers["webhook-id"] == id
    assert call.headers["webhook-timestamp"] == "1000000"
    assert is_genuine(store.secret(), call)
    assert not is_genuine(bytes(32), call)
    assert not is_genuine(store.secret(), call._replace(body=call.body + b" "))
    assert wait_until(store, id, tried(1)).state == DELIVERED
    assert callbacks.outcomes == {"delivered": 1, "retried": 0, "failed": 0}
    assert store.due_callbacks("d", 10, 1e9, 1.0) == []


def test_a_store_that_is_made_anew_signs_with_its_own_secret(
    opened: Opener, stranger: Stranger, begin: Begin, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = opened(**ALLOW)
    callbacks = begin(store)
    for _ in range(2):
        ended_job(store, f"http://stranger.example:{stranger.port}", clock.now)
        callbacks.wake()
        assert is_genuine(store.secret(), stranger.next())
        monkeypatch.setattr(store, "secret", lambda: bytes(32))  # as somebody who asks it now is told


def test_a_secret_of_the_configuration_signs(opened: Opener, stranger: Stranger, begin: Begin, clock: Clock) -> None:
    key = bytes(range(24))
    store = opened(callback_secret="whsec_" + base64.b64encode(key).decode(), **ALLOW)
    ended_job(store, f"http://stranger.example:{stranger.port}", clock.now)
    begin(store)
    assert is_genuine(key, stranger.next())


def test_the_example_of_the_specification() -> None:
    """From https://github.com/standard-webhooks/standard-webhooks, libraries/python/tests."""
    key = read_secret("whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw")
    body = b'{"test": 2432232314}'
    signature = sign(key, "msg_p5jXN8AQM9LWM0D4loKWxJek", 1614265330, body)
    assert signature == "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="
    assert show_secret(key) == "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"


def test_secrets(opened: Opener) -> None:
    assert read_secret("0123456789abcdef") == b"0123456789abcdef"
    for text, why in (("short", "has 5 bytes, and needs 16"), ("whsec_!", "no base64"), ("whsec_YQ==", "has 1 bytes")):
        with pytest.raises(ValueError, match=why):
            read_secret(text)
        with pytest.raises(ValueError, match="callback_secret"):
            Callbacks(opened(), JobsOptions(callback_secret=text), "c", lambda *_: b"")
    with pytest.raises(ValueError, match="callback_allow"):
        Callbacks(opened(), JobsOptions(callback_allow=("x",)), "c", lambda *_: b"")
    store = opened()
    assert signing_key(store) == store.secret()
    assert signing_key(opened(callback_secret="0123456789abcdef")) == b"0123456789abcdef"


def test_it_is_tried_again_later_and_later(opened: Opener, stranger: Stranger, begin: Begin, clock: Clock) -> None:
    store = opened(**ALLOW)
    stranger.says = [500, 302, 404, 200]
    id = ended_job(store, f"http://stranger.example:{stranger.port}", clock.now)
    callbacks = begin(store)
    for attempt, (wait_s, status) in enumerate([(1.0, 500), (5.0, 302), (30.0, 404)], 1):
        assert json.loads(stranger.next().body)["attempts"] == attempt
        found = wait_until(store, id, tried(attempt))
        assert (found.state, found.last_error) == (PENDING, f"it was answered with status {status}")
        assert 0.79 * wait_s <= found.due_at - clock.now <= 1.21 * wait_s
        clock.now = found.due_at - 0.01
        callbacks.wake()
        assert store.due_callbacks("d", 10, clock.now, 1.0) == []
        clock.now = found.due_at
        callbacks.wake()
    call = stranger.next()
    assert call.headers["webhook-id"] == id
    assert call.headers["webhook-timestamp"] == str(int(clock.now))
    assert is_genuine(store.secret(), call)
    assert wait_until(store, id, tried(4)).state == DELIVERED
    assert callbacks.outcomes == {"delivered": 1, "retried": 3, "failed": 0}


def test_it_is_given_up(opened: Opener, begin: Begin, clock: Clock) -> None:
    store = opened(callback_attempts_max=3, **ALLOW)

    def garble(connection: socket.socket) -> None:
        connection.recv(1 << 16)
        connection.sendall(b"SSH-2.0-OpenSSH_9.2p1")

    with raw(garble) as port:
        id = ended_job(store, f"http://stranger.example:{port}", clock.now)
        callbacks = begin(store)
        for attempt in (1, 2, 3):
            found = wait_until(store, id, tried(attempt))
            clock.now = max(clock.now, found.due_at)
            callbacks.wake()
    assert (found.state, found.last_error) == (CALLBACK_FAILED, "what answers does not speak HTTP/1.1")
    assert callbacks.outcomes == {"delivered": 0, "retried": 2, "failed": 1}


def test_what_was_to_be_tried_again_is_tried_by_the_next_process(
    opened: Opener, stranger: Stranger, begin: Begin, clock: Clock
) -> None:
    store = opened(**ALLOW)
    stranger.says = [503, 200]
    id = ended_job(store, f"http://stranger.example:{stranger.port}", clock.now)
    first = begin(store)
    stranger.next()
    found = wait_until(store, id, tried(1))
    first.stop(_WAIT_S)
    clock.now = found.due_at
    other = opened(**ALLOW)
    begin(other, "d")
    assert json.loads(stranger.next().body)["attempts"] == 2
    assert wait_until(store, id, tried(2)).state == DELIVERED


def test_what_a_process_was_sending_when_it_was_killed_is_sent_again(
    opened: Opener, stranger: Stranger, begin: Begin, clock: Clock
) -> None:
    store = opened(**ALLOW)
    id = ended_job(store, f"http://stranger.example:{stranger.port}", clock.now)
    assert len(store.due_callbacks("killed", 1, clock.now, 70.0)) == 1
    callbacks = begin(store)
    callbacks.wake()
    clock.now += 70.0
    callbacks.wake()
    assert json.loads(stranger.next().body)["attempts"] == 2
    assert wait_until(store, id, tried(2)).state == DELIVERED


@pytest.mark.parametrize(
    ("url", "addresses", "why"),
    [
        ("http://name.example:{port}/", ["127.0.0.1"], "name.example has the address 127.0.0.1, which is not public"),
        ("http://name.example:{port}/", ["8.8.8.8", "::1"], "name.example has the address ::1, which is not public"),
        ("http://127.0.0.1:{port}/", ["127.0.0.1"], "callback_url names 127.0.0.1, which is not public"),
        ("http://localhost:{port}/", None, "callback_url names 127.0.0.1, which is not public"),
    ],
)
def test_who_may_not_be_called_is_not_and_not_again(
    opened: Opener,
    stranger: Stranger,
    begin: Begin,
    clock: Clock,
    url: str,
    addresses: list[str] | None,
    why: str,
) -> None:
    store = opened()
    id = ended_job(store, url.format(port=stranger.port), clock.now)
    callbacks = begin(store, look=look_up if addresses is None else lambda *_: addresses)
    found = wait_until(store, id, tried(1))
    assert found.state == CALLBACK_FAILED
    assert why in found.last_error
    assert callbacks.outcomes == {"delivered": 0, "retried": 0, "failed": 1}
    assert stranger.calls.empty()


def test_a_redirect_to_where_one_may_not_is_not_followed(
    opened: Opener, stranger: Stranger, begin: Begin, clock: Clock
) -> None:
    store = opened(callback_attempts_max=1, **ALLOW)
    with Stranger() as inner:
        stranger.says = [307]
        stranger.location = f"http://127.0.0.1:{inner.port}/"
        id = ended_job(store, f"http://stranger.example:{stranger.port}", clock.now)
        begin(store)
        assert wait_until(store, id, tried(1)).last_error == "it was answered with status 307"
        assert inner.calls.empty()


def test_so_many_at_a_time_and_none_waits_for_the_slow(
    opened: Opener, stranger: Stranger, begin: Begin, clock: Clock
) -> None:
    store = opened(callback_threads_max=2, **ALLOW)
    holding, held = threading.Event(), threading.Semaphore(0)

    def hold(connection: Any) -> None:
        held.release()
        holding.wait(_WAIT_S)

    with raw(hold) as slow:
        ended_job(store, f"http://slow.example:{slow}", clock.now)
        callbacks = begin(store)
        assert held.acquire(timeout=_WAIT_S)
        ids = [ended_job(store, f"http://stranger.example:{stranger.port}", clock.now) for _ in range(5)]
        callbacks.wake()
        for id in ids:
            assert wait_until(store, id, tried(1)).state == DELIVERED
            assert callbacks.sending <= 2
        holding.set()


def test_stopping_waits_for_what_is_under_way_and_begins_nothing(opened: Opener, begin: Begin, clock: Clock) -> None:
    store = opened(**ALLOW)
    asked, answer = threading.Event(), threading.Event()

    def hold(connection: Any) -> None:
        connection.recv(1 << 16)
        asked.set()
        answer.wait(_WAIT_S)
        connection.sendall(b"HTTP/1.1 200 OK\r\n\r\n")

    with raw(hold) as port:
        id = ended_job(store, f"http://slow.example:{port}", clock.now)
        callbacks = begin(store)
        assert asked.wait(_WAIT_S)
        began = time.monotonic()
        callbacks.stop(0.1)
        assert time.monotonic() - began < 5.0
        assert callback(store, id).owner == "c"
        answer.set()
        callbacks.stop(_WAIT_S)
        assert callback(store, id).state == DELIVERED
        other = ended_job(store, f"http://slow.example:{port}", clock.now)
        callbacks.wake()
        assert callback(store, other).attempts == 0


def test_a_store_that_is_away_is_asked_again(
    opened: Opener, stranger: Stranger, begin: Begin, clock: Clock, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    store = opened(**ALLOW)
    id = ended_job(store, f"http://stranger.example:{stranger.port}", clock.now)
    ask, asked = store.due_callbacks, threading.Semaphore(0)

    def away(*_: Any) -> Any:
        asked.release()
        raise StoreError("the store is away")

    monkeypatch.setattr(store, "due_callbacks", away)
    callbacks = begin(store)
    for _ in range(3):
        assert asked.acquire(timeout=_WAIT_S)
        callbacks.wake()
    monkeypatch.setattr(store, "due_callbacks", ask)
    callbacks.wake()
    stranger.next()
    assert wait_until(store, id, tried(1)).state == DELIVERED
    assert [record.message for record in caplog.records if record.levelname == "WARNING"] == ["callbacks have to wait"]
