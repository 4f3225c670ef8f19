"""The client library against a real broker and a real worker."""

from __future__ import annotations

import gc
import os
import pickle
import re
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor, wait
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnxruntime
import pytest

from penstock.bin.bundled import BUNDLED_MODELS
from penstock.client import Client, PenstockError, Result
from penstock.client.client import _take_within
from penstock.client.link import Link
from penstock.wire.arena import Arena
from penstock.wire.endpoints import parse_broker
from penstock.wire.errors import BAD_INPUT, CANCELLED, DEADLINE, NOT_FOUND, OVERLOADED, TOO_LARGE, UNAVAILABLE
from penstock.wire.messages import Form, Metrics
from penstock.wire.slots import Slot, Slots
from penstock.wire.tensors import Array

if TYPE_CHECKING:
    from tests.client.serving import Server

CLOSED = "this Client is closed"


@pytest.fixture(scope="module")
def images() -> Array:
    return np.random.default_rng(0).random((40, 1, 8, 8), np.float32)


@pytest.fixture(scope="module")
def scores(images: Array) -> Array:
    """What the model says of each image when nobody is between."""
    session = onnxruntime.InferenceSession(
        str(BUNDLED_MODELS / "digits" / "1" / "model.onnx"), providers=["CPUExecutionProvider"]
    )
    result: Array = session.run(["scores"], {"image": images})[0]
    return result


@pytest.fixture
def callers(server: Server, serving: Any) -> Iterator[Callable[[], float]]:
    """How many callers the broker knows, this one left out."""
    reports: list[Metrics] = []
    link = Link(parse_broker(server.runtime), "", reports.append)
    serving.drive(link, lambda: link.caller.membership.joined)

    def count() -> float:
        reports.clear()
        link.say(link.caller.ask_metrics()[1].message)
        serving.drive(link, lambda: reports)
        samples = next(snapshot.samples for snapshot in reports[0].snapshots if snapshot.name == "broker")
        value = next(sample.value for sample in samples if sample.family == "penstock_callers")
        assert isinstance(value, float)
        return value - 1

    yield count
    link.close()


def refused(call: Callable[..., Any], *arguments: Any, **options: Any) -> PenstockError:
    with pytest.raises(PenstockError) as error:
        call(*arguments, **options)
    return error.value


# --- results ---


def test_result_is_what_the_model_says(client: Client, images: Array, scores: Array) -> None:
    result = client.infer("digits", {"image": images[:3]})
    np.testing.assert_allclose(result["scores"], scores[:3], rtol=1e-4, atol=1e-5)
    assert (result.model, result.version) == ("digits", "1")
    assert (list(result), len(result), "scores" in result, "x" in result) == (["scores"], 1, True, False)
    assert repr(result) == "<Result of digits version 1: scores: float32[3, 10]>"


def test_result_tells_what_became_of_the_request(client: Client, images: Array) -> None:
    first = client.infer("digits", {"image": images[:3]})
    second = client.submit("digits", {"image": images[:3]}).result(20)
    for result in (first, second):
        timing = result.timing
        assert timing.batch_rows == 3
        assert timing.reason == "idle"
        assert 0 <= timing.queue_s < 20
        assert timing.held_s + timing.waited_s == pytest.approx(timing.queue_s)
        assert 0 < timing.model_s <= timing.compute_s < 20
        assert timing.worker.startswith("cpu")
        assert f"worker {timing.worker}" in result.explain()
        assert f"batch {timing.batch} of that worker, with 3 rows" in result.explain()
    assert second.timing.batch > first.timing.batch


@pytest.mark.parametrize("way", ["infer", "submit"])
def test_priorities_and_tenants_go_with_each_call(
    server: Server, images: Array, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    forms: list[tuple[int, str]] = []
    with Client(server.runtime, tenant="blue") as client:
        client.models()
        assert client._talk is not None
        caller = client._talk.link.caller

        def noting(method: Callable[..., Any]) -> Callable[..., Any]:
            def note(form: Form, *rest: Any) -> Any:
                forms.append((form.priority, form.tenant))
                return method(form, *rest)

            return note

        for name in ("submit", "begin"):
            monkeypatch.setattr(caller, name, noting(getattr(caller, name)))
        for terms in ({}, {"priority": 1}, {"tenant": "red"}, {"tenant": "", "priority": 5}, {}):
            answer = getattr(client, way)("digits", {"image": images[:1]}, **terms)
            assert len(answer if way == "infer" else answer.result(20)) == 1
    assert list(dict.fromkeys(forms)) == [(0, "blue"), (1, "blue"), (0, "red"), (5, "")]
    assert forms[-1] == (0, "blue")


@pytest.mark.parametrize(
    ("terms", "words"),
    [({"priority": 6}, "a priority is"), ({"priority": "1"}, "a priority is"), ({"tenant": "é"}, "a tenant is")],
)
def test_terms_that_cannot_be_are_refused(client: Client, images: Array, terms: dict[str, Any], words: str) -> None:
    for method in (client.infer, client.submit):
        error = refused(method, "digits", {"image": images[:1]}, **terms)
        assert (error.code, words in error.message) == (BAD_INPUT, True)
    if "tenant" in terms:
        assert refused(Client, **terms).code == BAD_INPUT


def test_outputs_are_the_receivers_own(client: Client, images: Array) -> None:
    first = client.infer("digits", {"image": images[:1]})["scores"]
    first[:] = 7
    assert (client.infer("digits", {"image": images[:1]})["scores"] != 7).all()


def test_unknown_output_of_a_result_is_named(client: Client, images: Array) -> None:
    result = client.infer("digits", {"image": images[:1]}, outputs=["scores"], version="1")
    with pytest.raises(KeyError, match=r"model 'digits' has no output 'score'; it has \['scores'\]"):
        result["score"]


def test_many_threads_get_each_its_own_result(client: Client, images: Array, scores: Array) -> None:
    def ask(at: int) -> Array:
        return client.infer("digits", {"image": images[at : at + 1]})["scores"]

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(ask, range(40)))
    np.testing.assert_allclose(np.concatenate(answers), scores, rtol=1e-4, atol=1e-5)


def test_submitted_requests_share_batches(client: Client, images: Array, scores: Array) -> None:
    futures = [client.submit("digits", {"image": images[at : at + 1]}) for at in range(40)]
    results = [future.result(20) for future in futures]
    np.testing.assert_allclose(np.concatenate([each["scores"] for each in results]), scores, rtol=1e-4, atol=1e-5)


def test_inputs_may_change_once_submit_has_returned(client: Client) -> None:
    x = np.ones((1, 2), np.float32)
    futures = []
    for number in range(4):
        x[:] = number
        futures.append(client.submit("patient", {"x": x}, timeout=60.0))
    assert [future.result(20)["y"].tolist() for future in futures] == [[[number, number]] for number in range(4)]


def test_large_tensors_travel_both_ways(client: Client) -> None:
    x = np.random.default_rng(2).random((5, 200_000), np.float32)
    result = client.infer("wide", {"x": x})
    np.testing.assert_array_equal(result["y"], x)
    assert result["y"].flags.writeable


def test_strings_travel_both_ways(client: Client) -> None:
    assert client.infer("strings", {"x": ["one", b"two", "", "\u00fc"]})["y"].tolist() == [
        b"one",
        b"two",
        b"",
        b"\xc3\xbc",
    ]


def test_several_clients_of_one_process_do_not_meet(server: Server, images: Array, scores: Array) -> None:
    with Client(server.runtime) as one, Client(f"ipc://{server.runtime}") as other:
        futures = [
            (one, other)[at % 2].submit("digits", {"image": images[at : at + 1]}, timeout=20.0) for at in range(10)
        ]
        answers = [future.result(20)["scores"] for future in futures]
    np.testing.assert_allclose(np.concatenate(answers), scores[:10], rtol=1e-4, atol=1e-5)


def test_client_over_tcp(server: Server, images: Array, scores: Array) -> None:
    with Client(server.tcp, timeout=20.0) as client:
        x = np.ones((2, 200_000), np.float32)
        np.testing.assert_array_equal(client.infer("wide", {"x": x})["y"], x)
        result = client.infer("digits", {"image": images[:32]})
    np.testing.assert_allclose(result["scores"], scores[:32], rtol=1e-4, atol=1e-5)


def test_models_say_how_they_fare(client: Client) -> None:
    states = {state.name: state for state in client.models()}
    assert {name: state.state for name, state in states.items()} == {
        "digits": "READY", "wide": "READY", "strings": "READY", "patient": "READY", "broken": "UNAVAILABLE"
    }  # fmt: skip
    assert states["broken"].spec is None
    assert states["broken"].reason
    assert states["digits"].spec is not None
    assert states["digits"].spec.inputs[0] == ("image", "FP32", (-1, 1, 8, 8))


# --- what goes wrong ---


@pytest.mark.parametrize(
    ("model", "inputs", "code", "said"),
    [
        ("digit", {"image": []}, NOT_FOUND, "Request for unknown model: 'digit' is not found"),
        ("broken", {"x": []}, UNAVAILABLE, "model 'broken' is not ready (UNAVAILABLE): "),
        ("digits", {"picture": [1.0]}, BAD_INPUT, "missing required input(s) ['image']"),
        ("digits", {"image": [1.0]}, BAD_INPUT, "unexpected shape for input 'image'"),
        ("digits", {"image": [["a"]]}, BAD_INPUT, "input 'image' cannot be made an array of FP32"),
        ("digits", {"image": np.zeros((1, 1, 8, 8))}, BAD_INPUT, "expects 'FP32'"),
        ("digits", {"image": np.zeros((40, 1, 8, 8), "f4")}, BAD_INPUT, "batch-size must be <= 32"),
    ],
)
def test_request_that_does_not_fit_is_refused_before_it_is_sent(
    client: Client, model: str, inputs: dict[str, Any], code: str, said: str
) -> None:
    error = refused(client.submit, model, inputs)
    assert error.code == code
    assert said in error.message


def test_error_can_be_sent_to_another_process(client: Client) -> None:
    error = refused(client.infer, "nosuch", {})
    again = pickle.loads(pickle.dumps(error))
    assert (again.code, again.message, again.retryable) == (error.code, error.message, False)


@pytest.mark.parametrize("timeout", [0, -1, float("nan"), float("inf"), 90_000])
def test_timeout_that_is_none_is_refused(client: Client, timeout: float) -> None:
    said = "a timeout is more than 0 and at most 86400 seconds, not "
    for error in (
        refused(client.infer, "digits", {}, timeout=timeout),
        refused(client.models, timeout=timeout),
        refused(Client, timeout=timeout),
    ):
        assert error.message == f"{said}{timeout!r}"


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("http://localhost:8000", "is neither a runtime directory, nor ipc://DIRECTORY, nor tcp://HOST:PORT"),
        ("tcp://localhost", "is not of the form HOST:PORT"),
        ("tcp://localhost:0", "a broker's port is from 1 to 65534"),
    ],
)
def test_address_that_cannot_be_one_is_refused(address: str, said: str) -> None:
    error = refused(Client, address)
    assert (error.code, said in error.message) == (BAD_INPUT, True)


@pytest.mark.parametrize("address", ["nowhere", "tcp://127.0.0.1:1"])
def test_address_where_nobody_answers_raises_in_time(tmp_path: Path, address: str) -> None:
    given = address if "://" in address else str(tmp_path / address)
    with Client(given) as client:
        start = time.monotonic()
        error = refused(client.infer, "digits", {}, timeout=0.1)
        assert 0.1 <= time.monotonic() - start < 5
    assert (error.code, error.retryable) == (UNAVAILABLE, True)
    assert error.message == (
        f"no Penstock broker answered at {given} within 0.1 s; is 'penstock up' running there, and as the same user?"
    )


def test_default_address_is_the_default_runtime_directory(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PENSTOCK_RUNTIME_DIR", str(server.runtime))
    with Client() as client:
        assert len(client.models(timeout=20.0)) == 5


def test_request_that_takes_too_long_ends_in_time(client: Client, server: Server, images: Array) -> None:
    client.infer("digits", {"image": images[:1]})
    with server.worker_stopped():
        start = time.monotonic()
        error = refused(client.infer, "digits", {"image": images[:1]}, timeout=0.2)
        assert 0.2 <= time.monotonic() - start < 5
    assert (error.code, error.retryable) == (DEADLINE, False)
    assert re.fullmatch(r"no result for model 'digits' within 0\.(2|19\d*) s", error.message)  # what was left of it
    assert len(client.infer("digits", {"image": images[:1]})) == 1, "what came late is dropped"


# --- cancelling ---


def test_cancelled_request_does_not_run(client: Client) -> None:
    ones = np.ones((1, 2), np.float32)
    unwanted = client.submit("patient", {"x": ones * 7}, timeout=60.0)
    assert unwanted.cancel()
    futures = [client.submit("patient", {"x": ones}, timeout=60.0) for _ in range(4)]
    timings = [future.result(20).timing for future in futures]
    # Only four together are a full batch: with a fifth, one of these would wait for ten seconds.
    assert [(timing.batch_rows, timing.reason) for timing in timings] == [(4, "full")] * 4
    with pytest.raises(CancelledError):
        unwanted.result(0)


def test_future_that_has_ended_cannot_be_cancelled(client: Client, images: Array) -> None:
    future = client.submit("digits", {"image": images[:1]})
    wait([future], 20)
    assert not future.cancel()
    assert not future.cancelled()


# --- room in shared memory ---


WIDE = np.arange(200_000, dtype=np.float32).reshape(1, 200_000)  # 800,000 bytes
ARENA_BYTES = 1 << 20


@pytest.fixture
def narrow(server: Server) -> Iterator[Client]:
    """With room for one large request."""
    with Client(server.runtime, timeout=20.0, arena_bytes=ARENA_BYTES) as client:
        client.models()
        yield client


def slots_of(client: Client) -> Slots:
    assert client._talk is not None
    slots = client._talk.link.slots()
    assert slots is not None
    return slots


@pytest.fixture
def whole(narrow: Client) -> Iterator[Slot]:
    """All the room there is, taken."""
    whole = slots_of(narrow).take(ARENA_BYTES)
    assert whole is not None
    yield whole
    whole.give_back()


def wait_until(condition: Callable[[], object]) -> None:
    """Of what another thread does, and tells nobody."""
    until, tick = time.monotonic() + 20, threading.Event()
    while not condition():
        assert time.monotonic() < until, "it did not happen"
        tick.wait(0.001)


def test_large_inputs_may_change_once_submit_has_returned(narrow: Client) -> None:
    x = WIDE.copy()
    future = narrow.submit("wide", {"x": x[:, ::-1]})
    x[:] = 0
    np.testing.assert_array_equal(future.result(20)["y"], WIDE[:, ::-1])
    assert slots_of(narrow).arena.allocator.used == 0


def test_submit_waits_for_room(narrow: Client, whole: Slot, images: Array) -> None:
    slots = slots_of(narrow)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(narrow.infer, "wide", {"x": WIDE})
        wait_until(lambda: slots.waiting == 1)
        second = pool.submit(narrow.infer, "wide", {"x": WIDE + 1})
        wait_until(lambda: slots.waiting == 2)
        assert len(narrow.infer("digits", {"image": images[:1]})) == 1, "what is small needs no room"
        whole.give_back()
        np.testing.assert_array_equal(first.result(20)["y"], WIDE)
        np.testing.assert_array_equal(second.result(20)["y"], WIDE + 1)
    assert (slots.waiting, slots.arena.allocator.used) == (0, 0)


def test_more_than_there_is_room_for_runs_one_after_the_other(narrow: Client) -> None:
    futures = [narrow.submit("wide", {"x": WIDE + number}) for number in range(10)]
    for number, future in enumerate(futures):
        np.testing.assert_array_equal(future.result(20)["y"], WIDE + number)


def test_without_room_in_time_a_call_is_refused(narrow: Client, whole: Slot) -> None:
    start = time.monotonic()
    error = refused(narrow.submit, "wide", {"x": WIDE}, timeout=0.05)
    assert 0.05 <= time.monotonic() - start < 5
    assert (error.code, error.retryable, error.retry_after_s) == (OVERLOADED, True, 1.0)
    assert error.message.startswith(
        "800000 bytes of this client's 1048576 bytes of shared memory did not come free within 0.0"
    )
    assert error.message.endswith("; have less under way, or give it more with Client(arena_bytes=...)")
    assert slots_of(narrow).waiting == 0


def test_a_call_waits_for_room_no_longer_than_the_limit(
    narrow: Client, whole: Slot, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("penstock.client.client.ARENA_WAIT_MAX_S", 0.02)
    error = refused(narrow.infer, "wide", {"x": WIDE}, timeout=600.0)
    assert "did not come free within 0.02 s" in error.message


def test_inputs_that_never_fit_are_refused_with_the_way_out(narrow: Client) -> None:
    error = refused(narrow.infer, "wide", {"x": np.concatenate([WIDE, WIDE])})
    assert (error.code, error.retryable) == (TOO_LARGE, False)
    assert error.message == (
        "the inputs take 1600000 bytes, and this client's shared memory has 1048576; send fewer rows at a time, or "
        "give it more with Client(arena_bytes=...)"
    )


def test_callback_of_a_future_does_not_wait_for_room(
    narrow: Client, whole: Slot, images: Array, server: Server
) -> None:
    """It runs on the thread that gives slots back."""
    said: list[PenstockError] = []
    called = threading.Event()

    def submit_more(future: Future[Result]) -> None:
        said.append(refused(narrow.submit, "wide", {"x": WIDE}, timeout=600.0))
        called.set()

    with server.worker_stopped():  # else it might end before it has a callback
        narrow.submit("digits", {"image": images[:1]}).add_done_callback(submit_more)
    assert called.wait(20)
    assert (said[0].code, said[0].retry_after_s) == (OVERLOADED, 1.0)
    assert said[0].message == (
        "800000 bytes of this client's 1048576 bytes of shared memory are not free, and a callback cannot wait; have "
        "less under way, or give it more with Client(arena_bytes=...)"
    )
    whole.give_back()
    np.testing.assert_array_equal(narrow.infer("wide", {"x": WIDE})["y"], WIDE)


def test_callback_of_a_future_submits_more_while_there_is_room(narrow: Client) -> None:
    """The slot of the one that has ended is free by then."""
    more: list[Future[Result]] = []
    called = threading.Event()

    def submit_more(future: Future[Result]) -> None:
        more.append(narrow.submit("wide", {"x": WIDE + 1}))
        called.set()

    narrow.submit("wide", {"x": WIDE}).add_done_callback(submit_more)
    assert called.wait(20)
    np.testing.assert_array_equal(more[0].result(20)["y"], WIDE + 1)


def test_cancelled_request_leaves_its_room(narrow: Client, server: Server) -> None:
    with server.worker_stopped():
        future = narrow.submit("wide", {"x": WIDE})
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(narrow.submit, "wide", {"x": WIDE})
            wait_until(lambda: slots_of(narrow).waiting)
            assert future.cancel()
            other = waiting.result(20)
    np.testing.assert_array_equal(other.result(20)["y"], WIDE)


def test_threads_that_wait_for_room_hear_that_the_client_was_closed(server: Server) -> None:
    client = Client(server.runtime, timeout=60.0, arena_bytes=ARENA_BYTES)
    client.models()
    slots = slots_of(client)
    whole = slots.take(ARENA_BYTES)
    assert whole is not None
    with ThreadPoolExecutor(3) as pool:
        waiting = [pool.submit(client.infer, "wide", {"x": WIDE}) for _ in range(3)]
        wait_until(lambda: slots.waiting == 3)
        client.close()
        assert [refused(each.result, 20).message for each in waiting] == [CLOSED] * 3
    whole.give_back()


def test_closing_while_others_wait_for_room_ends_every_future(server: Server) -> None:
    client = Client(server.runtime, timeout=20.0, arena_bytes=ARENA_BYTES)
    client.models()

    def submit_until_refused() -> list[Future[Result]]:
        futures: list[Future[Result]] = []

        def submit_on() -> None:
            while True:
                futures.append(client.submit("wide", {"x": WIDE}))
                going.set()

        assert refused(submit_on).message == CLOSED
        return futures

    going = threading.Event()
    with ThreadPoolExecutor(4) as pool:
        submitters = [pool.submit(submit_until_refused) for _ in range(4)]
        assert going.wait(20)
        client.close()
        futures = [future for submitter in submitters for future in submitter.result(20)]
    assert all(future.done() for future in futures)


def test_wait_for_room_that_is_interrupted_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    slots = Slots(Arena(ARENA_BYTES, "test"))
    whole = slots.take(ARENA_BYTES)
    assert whole is not None

    def interrupt(event: threading.Event, limit_s: float) -> None:
        whole.give_back()  # it is granted in the same moment
        raise KeyboardInterrupt

    monkeypatch.setattr(threading.Event, "wait", interrupt)
    with pytest.raises(KeyboardInterrupt):
        _take_within(slots, 1000, 60)
    assert (slots.waiting, slots.arena.allocator.used) == (0, 0)
    slots.close()


def test_client_without_shared_memory_sends_whatever_there_is(server: Server) -> None:
    with Client(server.runtime, timeout=20.0, arena_bytes=0) as client:
        futures = [client.submit("wide", {"x": WIDE + number}) for number in range(4)]
        for number, future in enumerate(futures):
            np.testing.assert_array_equal(future.result(20)["y"], WIDE + number)


# --- the end ---


def test_closing_ends_what_is_under_way(server: Server) -> None:
    client = Client(server.runtime)
    futures = [client.submit("patient", {"x": [[1.0, 2.0]]}, timeout=60.0) for _ in range(3)]
    client.close()
    for future in futures:
        error = refused(future.result, 0)
        assert (error.code, error.message) == (CANCELLED, "the client was closed")


def test_closing_while_others_submit_ends_every_future(server: Server, images: Array) -> None:
    client = Client(server.runtime, timeout=20.0)
    client.models()
    busy = threading.Barrier(5)

    def submit_until_refused() -> list[Future[Result]]:
        futures = [client.submit("digits", {"image": images[:1]})]

        def submit_on() -> None:
            while True:
                futures.append(client.submit("digits", {"image": images[:1]}))

        busy.wait(20)
        assert refused(submit_on).message == CLOSED
        return futures

    with ThreadPoolExecutor(4) as pool:
        submitters = [pool.submit(submit_until_refused) for _ in range(4)]
        busy.wait(20)
        client.close()
        futures = [future for submitter in submitters for future in submitter.result(20)]
    assert all(future.done() for future in futures)
    said = {str(future.exception()) for future in futures if future.exception() is not None}
    assert said <= {"the client was closed"}


def test_closed_client_says_so(server: Server) -> None:
    with Client(server.runtime) as used, Client(server.runtime) as unused:
        used.models()
    for client in (used, unused):
        client.close()
        assert refused(client.models).message == CLOSED
        assert refused(client.infer, "digits", {}).message == CLOSED


def test_thread_that_waits_for_a_broker_hears_that_the_client_was_closed(tmp_path: Path) -> None:
    client = Client(tmp_path)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(client.models, timeout=30.0)
        # Its thread has been started, so that there is something to be closed under it.
        started = threading.Event()
        while client._talk is None:
            started.wait(0.001)
        client.close()
        assert refused(waiting.result, 20).message == CLOSED


def test_callback_of_a_future_may_close_the_client(server: Server, images: Array) -> None:
    client = Client(server.runtime)
    closed = threading.Event()

    def close(future: Future[Result]) -> None:
        client.close()
        closed.set()

    future = client.submit("digits", {"image": images[:1]}, timeout=20.0)
    future.add_done_callback(close)
    assert len(future.result(20)) == 1
    assert closed.wait(20)
    client.close()
    assert refused(client.models).message == CLOSED


def test_closed_client_leaves_neither_thread_nor_descriptor(server: Server) -> None:
    def use() -> tuple[list[str], list[threading.Thread]]:
        with Client(server.runtime) as client:
            client.models()
        del client
        gc.collect()  # others that were closed before
        return os.listdir("/proc/self/fd"), threading.enumerate()

    assert use() == use()


@pytest.mark.parametrize("call", [Client.models, partial(Client.infer, model="wide", inputs={"x": WIDE})])
def test_client_made_before_a_fork_says_what_to_do_after_it(client: Client, call: Callable[[Client], object]) -> None:
    client.models()
    reader, writer = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # a fork with threads, which is what this is about
        child = os.fork()
    if not child:
        try:
            call(client)
        except PenstockError as error:
            client.close()
            os.write(writer, error.message.encode())
        finally:
            os._exit(0)
    os.close(writer)
    with open(reader) as said:
        assert said.read() == (
            "this Client was made before a fork and cannot be used after it; make one in each process"
        )
    os.waitpid(child, 0)
    assert len(client.models()) == 5, "the parent's goes on"


KILLED = """
import os, signal, sys
from penstock.client import Client
client = Client(sys.argv[1])
client.submit("patient", {"x": [[1.0, 2.0]]}, timeout=60.0)
client.models()
print("ready", flush=True)
signal.pause()
"""


def test_client_that_is_killed_is_forgotten(server: Server, callers: Callable[[], float], client: Client) -> None:
    before = callers()
    with subprocess.Popen([sys.executable, "-c", KILLED, str(server.runtime)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        assert callers() == before + 1
        process.kill()
    until = time.monotonic() + 20
    while callers() != before:
        assert time.monotonic() < until
    # What it had submitted is gone too: it would have been the fourth of a batch with these three.
    futures = [client.submit("patient", {"x": [[1.0, 2.0]]}, timeout=60.0) for _ in range(4)]
    timings = [future.result(20).timing for future in futures]
    assert [(timing.batch_rows, timing.reason) for timing in timings] == [(4, "full")] * 4


NEVER_CLOSED = """
import sys
from penstock.client import Client
client = Client(sys.argv[1])
client.submit("patient", {"x": [[1.0, 2.0]]}, timeout=60.0)
print(len(client.models()))
"""


def test_program_that_never_closes_its_client_ends_all_the_same(server: Server) -> None:
    done = subprocess.run([sys.executable, "-c", NEVER_CLOSED, str(server.runtime)], capture_output=True, timeout=20)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"5\n", b"")


def test_client_outlives_its_broker(serving: Any, models: Path, tmp_path: Path, images: Array) -> None:
    with serving.Server(tmp_path) as server:
        broker = server.start("broker")
        server.start("worker", str(models / "digits" / "1" / "model.onnx"))
        server.wait()
        with Client(server.runtime, timeout=20.0) as client:
            with server.worker_stopped():
                future = client.submit("model", {"image": images[:1]})
                assert refused(client.infer, "model", {"image": images[:1]}, timeout=0.1).code == DEADLINE
                server.end(broker, signal.SIGKILL)  # by now it holds the first one
            server.start("broker")
            assert len(future.result(20)) == 1
            assert len(client.infer("model", {"image": images[:1]})) == 1
