"""Rates, quantiles and what is missing, out of readings that the tests make up."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.gateway.figures import WINDOW_S, GpuFigures, Reading, View, Window, quantile, rise, rises
from penstock.wire.messages import Snapshot
from penstock.wire.metrics import ROWS, SECONDS, Histogram, Meters, Sample
from penstock.wire.models import LOADING, READY, UNAVAILABLE, ModelState

M = ModelState("m", "1", READY, "", None)

seconds = st.floats(1e-6, 100.0)


def counts(values: Sequence[float], bounds: tuple[float, ...] = SECONDS) -> tuple[float, ...]:
    histogram = Histogram(bounds)
    for value in values:
        histogram.observe(value)
    return (*map(float, histogram.counts), histogram.total)


# --- quantiles ---


@given(st.lists(seconds, max_size=50), st.lists(seconds, min_size=1, max_size=50), st.floats(0.01, 1.0))
def test_a_quantile_of_what_came_since_lies_in_the_right_bucket(
    before: list[float], since: list[float], share: float
) -> None:
    change = rise(counts(before), counts(before + since))
    assert isinstance(change, tuple)
    found = quantile(SECONDS, change[:-1], share)
    assert found is not None
    exact = sorted(since)[max(0, math.ceil(share * len(since) * (1 - 1e-12)) - 1)]
    place = bisect_left(SECONDS, exact)
    if place == len(SECONDS):
        assert found == SECONDS[-1]
    else:
        assert (SECONDS[place - 1] if place else 0.0) <= found <= SECONDS[place]


@given(st.lists(seconds, min_size=1), st.floats(0, 1), st.floats(0, 1))
def test_a_larger_share_is_no_smaller_value(values: list[float], one: float, other: float) -> None:
    low, high = (quantile(SECONDS, counts(values)[:-1], share) for share in sorted((one, other)))
    assert low is not None
    assert high is not None
    assert low <= high


def test_a_quantile_lies_evenly_within_its_bucket() -> None:
    assert quantile((1.0, 2.0, 4.0), (0, 4, 4, 0), 0.25) == 1.5
    assert quantile((1.0, 2.0, 4.0), (0, 4, 4, 0), 0.75) == 3.0
    assert quantile((1.0, 2.0, 4.0), (0, 0, 0, 7), 0.5) == 4.0


def test_nothing_has_no_quantile() -> None:
    assert quantile(SECONDS, (0,) * (len(SECONDS) + 1), 0.5) is None


# --- counters ---

numbers = st.integers(0, 10**9).map(float)


@given(numbers, numbers)
def test_a_rise_is_never_negative_and_exact_while_nothing_restarts(before: float, more: float) -> None:
    assert rise(before, before + more) == more
    assert rise(before + more + 1, before) == before, "it began anew, and has counted so many since"


@given(st.lists(seconds), st.lists(seconds))
def test_a_histogram_that_began_anew_has_no_negative_counts(before: list[float], after: list[float]) -> None:
    change = rise(counts(before), counts(after))
    assert isinstance(change, tuple)
    assert all(count >= 0 for count in change[:-1])
    assert sum(change[:-1]) <= len(after)


def test_a_histogram_that_began_anew_counts_all_of_it() -> None:
    assert rise(counts([1, 1, 1]), counts([1, 9])) == counts([1, 9])


def reading(at: float, *snapshots: Snapshot, broker: bool = True, models: Sequence[ModelState] = (M,)) -> Reading:
    return Reading(at, broker, snapshots, models)


def counted(name: str, requests: float, *more: Sample) -> Snapshot:
    return Snapshot(name, (Sample("penstock_requests", ("m", "1"), requests), *more))


def test_what_a_process_counted_before_it_was_known_is_left_out() -> None:
    before, after = reading(0, counted("a", 5)), reading(1, counted("a", 7), counted("b", 1000))
    assert rises(before, after) == {("a", "penstock_requests", ("m", "1")): 2}
    unborn = reading(0, counted("a", 5), Snapshot("b", ()))
    assert rises(unborn, after) == {("a", "penstock_requests", ("m", "1")): 2}


def test_a_new_series_of_a_known_process_counts_from_nothing() -> None:
    new = Sample("penstock_request_failures", ("m", "1", "lost"), 3.0)
    found = rises(reading(0, counted("a", 5)), reading(1, counted("a", 5, new)))
    assert found == {("a", "penstock_request_failures", ("m", "1", "lost")): 3}


# --- the view ---


def view_of(*readings: Reading) -> View:
    window = Window()
    for each in readings:
        window.add(each)
    return window.view("gateway-0")


@given(st.lists(st.tuples(st.floats(0.01, 4), st.none() | st.integers(0, 1000)), min_size=2, max_size=30))
def test_no_rate_is_ever_negative_or_more_than_was_counted(turns: list[tuple[float, int | None]]) -> None:
    """A broker that counts, is away (None) and begins anew, however it likes."""
    window, at = Window(), 0.0
    for pause, count in turns:
        at += pause
        there = () if count is None else (counted("broker", count),)
        window.add(reading(at, *there, broker=count is not None))
        view = window.view("gateway-0")
        assert 0 <= view.rate <= 1000 * len(turns) / 0.01
        assert view.seconds <= WINDOW_S + 0.5 or view.seconds <= max(4.0, pause)
        assert all(model.rate >= 0 for model in view.models)


def test_rates_are_over_the_last_seconds() -> None:
    readings = [reading(at, counted("broker", 10 * at if at < 20 else 200 + 50 * (at - 20))) for at in range(40)]
    view = view_of(*readings)
    assert (view.rate, view.models[0].rate, view.processes[0].rate) == (50, 50, 50)
    assert view.seconds == WINDOW_S


def test_a_long_silence_is_not_averaged_over() -> None:
    view = view_of(
        reading(0, counted("broker", 0)), reading(1, counted("broker", 10)), reading(600, counted("broker", 9e6))
    )
    assert (view.seconds, view.rate) == (0, 0)


def worker(name: str, at: int) -> Snapshot:
    """After so many seconds, each with ten batches of four requests in 3 ms, of which one failed."""
    meters = Meters()
    meters.value("penstock_model_ready", "m", "1").value = 1
    meters.value("penstock_request_failures", "m", "1", "model_failed").value = at
    meters.histogram("penstock_batch_rows", "m", "1").observe(4, 10 * at)
    meters.histogram("penstock_request_seconds", "m", "1").observe(0.003, 40 * at)
    meters.value("penstock_process_cpu_seconds").value = 0.25 * at
    meters.value("penstock_process_resident_bytes").value = 5000
    meters.value("penstock_arena_bytes").value = 1000
    meters.value("penstock_arena_used_bytes").value = 100
    return Snapshot(name, meters.samples())


def broker(at: int) -> Snapshot:
    meters = Meters()
    meters.value("penstock_requests", "m", "1").value = 80 * at
    meters.value("penstock_queue_requests", "m", "1").value = 6
    meters.value("penstock_running_requests", "m", "1").value = 8
    meters.value("penstock_callers").value = 3
    return Snapshot("broker", meters.samples())


def gateway(at: int) -> Snapshot:
    meters = Meters()
    meters.histogram("penstock_http_request_seconds").observe(0.02, 70 * at)
    meters.value("penstock_http_connections").value = 12
    return Snapshot("gateway-0", meters.samples())


def server(at: int, *workers: str, models: Sequence[ModelState] = (M,)) -> Reading:
    return reading(at, broker(at), gateway(at), *(worker(name, at) for name in workers), models=models)


def test_all_of_a_server_is_in_the_view() -> None:
    view = view_of(*(server(at, "cpu-0", "cpu-1") for at in range(4)))
    assert (view.rate, view.queue, view.running, view.clients, view.rows) == (80, 6, 8, 2, 4)
    assert view.failures == {"model_failed": 2}
    assert view.batches == [0, 0, 60] + [0] * (len(ROWS) - 2)
    assert view.p50_s is not None
    assert 0.0025 < view.p50_s < 0.005
    [model] = view.models
    assert (model.workers, model.rate, model.failures, model.queue, model.running, model.rows) == (2, 80, 2, 6, 8, 4)
    assert (model.p50_s, model.p95_s) == (view.p50_s, view.p95_s)
    assert [(each.name, each.role) for each in view.processes] == [
        ("broker", "broker"),
        ("gateway-0", "gateway"),
        ("cpu-0", "worker"),
        ("cpu-1", "worker"),
    ]
    _, door, first, _ = view.processes
    assert (door.rate, door.connections) == (70, 12)
    assert (first.rate, first.cpu, first.memory_bytes, first.missing_s) == (40, 0.25, 5000, None)
    assert (first.shared_bytes, first.shared_used_bytes) == (1000, 100)
    assert view.problems == ["requests fail, a second: model_failed 2"]


def well(at: int, *workers: str, models: Sequence[ModelState] = (M,)) -> Reading:
    told = server(at, *workers, models=models)
    return told._replace(
        snapshots=[
            Snapshot(name, tuple(each for each in series if each.family != "penstock_request_failures"))
            for name, series in told.snapshots
        ]
    )


def test_a_server_that_is_well_has_no_problems() -> None:
    assert view_of(well(0, "cpu-0"), well(1, "cpu-0")).problems == []


def test_a_process_that_has_left_is_missing_until_it_comes_back() -> None:
    window = Window()
    window.add(well(0, "cpu-0", "cpu-1"))
    for at in range(1, 4):
        window.add(well(at, "cpu-0"))
    view = window.view("gateway-0")
    assert {each.name: each.missing_s for each in view.processes} == {
        "broker": None,
        "gateway-0": None,
        "cpu-0": None,
        "cpu-1": 3.0,
    }
    assert view.problems == ["the worker cpu-1 has been missing for 3 s"]
    window.add(well(4, "cpu-0", "cpu-1"))
    assert window.view("gateway-0").problems == []


def test_a_process_that_stays_away_is_forgotten() -> None:
    window = Window()
    window.add(well(0, "cpu-0", "cpu-1"))
    for at in range(1, 302):
        window.add(well(at, "cpu-0"))
    assert [each.name for each in window.view("gateway-0").processes] == ["broker", "gateway-0", "cpu-0"]


def test_without_a_broker_it_alone_is_missing() -> None:
    window = Window()
    window.add(well(0, "cpu-0"))
    for at in range(1, 5):
        window.add(reading(at, gateway(at), broker=False))
    view = window.view("gateway-0")
    assert {each.name: each.missing_s for each in view.processes} == {"broker": 4, "gateway-0": None, "cpu-0": None}
    assert view.problems == [
        "no broker answers: nothing runs until it is back, and nothing is known of other processes"
    ]


@pytest.mark.parametrize(
    ("models", "problems"),
    [
        ([M, ModelState("b", "2", LOADING, "", None)], ["model b version 2 is LOADING"]),
        ([ModelState("b", "2", UNAVAILABLE, "no such file", None)], ["model b version 2 is UNAVAILABLE: no such file"]),
        (
            [ModelState("b", str(each), LOADING, "", None) for each in range(7)],
            [*(f"model b version {each} is LOADING" for each in range(5)), "2 more models are not ready"],
        ),
    ],
)
def test_models_that_are_not_ready_are_problems(models: list[ModelState], problems: list[str]) -> None:
    assert view_of(well(0, "cpu-0", models=models)).problems == problems


def test_no_worker_and_full_memory_are_problems() -> None:
    full = Snapshot(
        "gateway-0",
        (
            Sample("penstock_http_connections", (), 1.0),
            Sample("penstock_arena_bytes", (), 100.0),
            Sample("penstock_arena_used_bytes", (), 95.0),
        ),
    )
    view = view_of(reading(0, broker(0), full))
    assert view.problems == ["no worker has joined", "the shared memory of gateway-0 is 95% full"]


def test_failures_that_are_the_callers_own_are_no_problem() -> None:
    bad = [Sample("penstock_request_failures", ("m", "1", "bad_input"), 7.0 * at) for at in range(3)]
    view = view_of(*(reading(at, *well(at, "a").snapshots, counted("p", 0, bad[at])) for at in range(3)))
    assert (view.failures, view.problems) == ({"bad_input": 7}, [])


def test_of_many_models_those_that_need_a_look_are_shown() -> None:
    models = [ModelState(f"m{each:03}", "1", READY, "", None) for each in range(300)]
    models[250] = models[250]._replace(state=LOADING)
    busy = [Snapshot("broker", (Sample("penstock_requests", ("m299", "1"), 5.0 * at),)) for at in range(2)]
    view = view_of(*(reading(at, busy[at], models=models) for at in range(2)))
    shown = {model.name for model in view.models}
    assert (len(shown), view.models_left_out) == (200, 100)
    assert {"m250", "m299", "m000"} < shown


def test_a_reason_without_end_is_cut() -> None:
    [model] = view_of(well(0, models=[ModelState("b", "1", UNAVAILABLE, "x" * 10_000, None)])).models
    assert len(model.reason) == 500


def test_who_found_no_memory_to_share_is_a_problem() -> None:
    meters = Meters()
    meters.value("penstock_arena_missing").value = 1
    second = Snapshot("cpu-1", (*worker("cpu-1", 0).samples, *meters.samples()))
    found = view_of(reading(0, broker(0), worker("cpu-0", 0), second)).problems
    assert found == [
        "cpu-1 found no memory for shared memory, and large tensors cost it more; free some, and restart it"
    ]


# --- GPUs ---


def gpu_worker(name: str, uuid: str, lost: float = 0, *throttles: str, **told: float) -> Snapshot:
    meters = Meters()
    meters.value("penstock_gpu_lost", uuid).value = lost
    for what, value in told.items():
        meters.value(f"penstock_gpu_{what}", uuid).value = value
    for word in ("heat", "power", "power_brake", "hardware"):
        meters.value("penstock_gpu_throttled", uuid, word).value = int(word in throttles)
    return Snapshot(name, meters.samples())


def test_a_gpu_is_shown_once_with_all_its_workers() -> None:
    about = {
        "utilization": 0.9,
        "memory_used_bytes": 2.0**30,
        "memory_total_bytes": 2.0**33,
        "temperature_celsius": 70.0,
        "power_watts": 250.0,
        "power_limit_watts": 300.0,
    }
    first, second = (gpu_worker(f"cuda:1-{each}", "GPU-b", 0, "power", **about) for each in range(2))
    other = gpu_worker("cuda:0", "GPU-c")
    view = view_of(reading(0, second, first, other))
    assert view.gpus == [
        GpuFigures("GPU-c", ["cuda:0"], False, None, None, None, None, None, None, []),
        GpuFigures("GPU-b", ["cuda:1-0", "cuda:1-1"], False, 0.9, 1 << 30, 1 << 33, 70, 250, 300, ["power"]),
    ]
    assert view.problems == [], "a busy GPU is often at the limit of its power"


def test_without_gpus_there_are_none_in_the_view() -> None:
    assert view_of(well(0, "cpu-0")).gpus == []


def test_a_gpu_that_is_lost_or_too_hot_is_a_problem() -> None:
    lost = gpu_worker("cuda:0", "GPU-a", 1)
    hot = gpu_worker("cuda:1", "GPU-b", 0, "heat", "hardware", "power")
    assert view_of(reading(0, lost, hot)).problems == [
        "the GPU of cuda:0 is lost: GPU-a",
        "the GPU of cuda:1 is held down by hardware and heat: GPU-b",
    ]
