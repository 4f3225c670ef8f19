"""Triton's statistics: the numbers out of samples, and the routes with a broker that the test plays."""

from __future__ import annotations

import json
from typing import Any

import pytest

from penstock.gateway.statistics import Statistics, model_stats
from penstock.wire.errors import BAD_INPUT, MODEL_FAILED, OVERLOADED
from penstock.wire.messages import Metrics, Snapshot
from penstock.wire.metrics import Meters
from penstock.wire.models import LOADING, ModelState
from tests.gateway.serving import Loop
from tests.gateway.test_application import EPOCH, Desk, ready, said, waits
from tests.gateway.test_triton import KEY, worker

MS = 1_000_000  # ns
NONE = {"count": 0, "ns": 0}
ALL = "/v2/models/stats"


def test_versions_are_told_as_triton_does() -> None:
    first, second = worker(0.002, 0.010, 3, 6), worker(0.001, 0.020, 2, 2, failed=1)
    second.value("penstock_request_failures", *KEY, OVERLOADED).value = 4
    for process, at, device in ((first, 1000.5, "cpu"), (second, 900.0, "cuda:3")):
        process.value("penstock_last_batch_seconds", *KEY).value = at
        process.value("penstock_model_bytes", *KEY, device).value = 7
    [stats] = model_stats([*first.samples(), *second.samples()], [KEY])["model_stats"]
    assert stats == {
        "name": "m",
        "version": "1",
        "last_inference": 1_000_500,
        "inference_count": 7,
        "execution_count": 2,
        "inference_stats": {
            "success": {"count": 4, "ns": (3 * 12 + 1 * 21) * MS},
            "fail": {"count": 5, "ns": 21 * MS},
            "queue": {"count": 5, "ns": (3 * 2 + 2 * 1) * MS},
            "compute_input": {"count": 5, "ns": (3 * 1 + 2 * 2) * MS},
            "compute_infer": {"count": 5, "ns": (3 * 7 + 2 * 14) * MS},
            "compute_output": {"count": 5, "ns": (3 * 2 + 2 * 4) * MS},
            **dict.fromkeys(("cache_hit", "cache_miss"), NONE),
        },
        "response_stats": {},
        "batch_stats": [
            {"batch_size": 2, **batch(1, 20)},
            {"batch_size": 6, **batch(1, 10)},
        ],
        "memory_usage": [
            {"type": "CPU", "id": 0, "byte_size": 7},
            {"type": "GPU", "id": 3, "byte_size": 7},
        ],
    }


def batch(count: int, ms: int) -> dict[str, dict[str, int]]:
    parts = {"compute_input": 1, "compute_infer": 7, "compute_output": 2}
    return {part: {"count": count, "ns": count * share * ms * MS // 10} for part, share in parts.items()}


def test_what_has_not_run_is_there_with_zeros_and_others_are_not() -> None:
    meters = worker(0.001, 0.001, 1, 1)
    meters.value("penstock_request_failures", "idle", "2", BAD_INPUT).value = 1
    meters.value("penstock_request_failures", "idle", "3", MODEL_FAILED).value = 7
    [stats] = model_stats(meters.samples(), [("idle", "2")])["model_stats"]
    assert (stats["name"], stats["version"], stats["inference_count"]) == ("idle", "2", 0)
    assert stats["inference_stats"]["fail"] == {"count": 1, "ns": 0}
    assert stats["inference_stats"]["success"] == stats["inference_stats"]["queue"] == NONE


def test_what_gateways_kept_is_told() -> None:
    meters = worker(0.001, 0.001, 1, 1)
    for name, value in (("hits", 3), ("hit_seconds", 0.002), ("misses", 1), ("miss_seconds", 0.001)):
        meters.value(f"penstock_cache_{name}", *KEY).value = value
    [stats] = model_stats(meters.samples(), [KEY])["model_stats"]
    assert stats["inference_stats"]["cache_hit"] == {"count": 3, "ns": 2 * MS}
    assert stats["inference_stats"]["cache_miss"] == {"count": 1, "ns": MS}


# --- the routes ---


@pytest.fixture
def desk(loop: Loop) -> Desk:
    desk = Desk(loop)
    desk.application.add(Statistics(desk.application, desk.reports).routes)
    return desk.join(
        ready("b", "2"), ready("a"), ready("b", "10"), ready("ö/x"), ModelState("b", "3", LOADING, "", None)
    )


def stats(desk: Desk, url: str, *processes: Meters) -> list[dict[str, Any]]:
    exchange = desk.begin("GET", url)
    assert waits(exchange)
    snapshots = tuple(Snapshot(f"cpu-{at}", meters.samples()) for at, meters in enumerate(processes))
    desk.reports.arrived(Metrics(EPOCH, desk.serials.pop(), snapshots))
    answer = said(exchange)
    assert (answer.status, answer.headers["Content-Type"]) == (200, "application/json")
    content: dict[str, list[dict[str, Any]]] = json.loads(answer.body)
    assert list(content) == ["model_stats"]
    return content["model_stats"]


@pytest.mark.parametrize(
    ("url", "versions"),
    [
        (ALL, [("a", "1"), ("b", "10"), ("b", "2"), ("ö/x", "1")]),
        ("/v2/models/b/stats", [("b", "10"), ("b", "2")]),
        ("/v2/models/b/versions/2/stats", [("b", "2")]),
        ("/v2/models/b/versions/3/stats", [("b", "3")]),
        ("/v2/models/%C3%B6%2Fx/stats", [("ö/x", "1")]),
    ],
)
def test_those_that_are_asked_for(desk: Desk, url: str, versions: list[tuple[str, str]]) -> None:
    assert [(each["name"], each["version"]) for each in stats(desk, url)] == versions


def test_the_numbers_are_those_of_all_processes(desk: Desk) -> None:
    processes = []
    for rows in (1, 2):
        meters = Meters()
        meters.histogram("penstock_batch_rows", "a", "1").observe(rows)
        meters.value("penstock_size_batches", "a", "1", str(rows)).value = 1
        processes.append(meters)
    [one] = stats(desk, "/v2/models/a/stats", *processes)
    assert (one["inference_count"], one["execution_count"]) == (3, 2)


@pytest.mark.parametrize(
    ("url", "sentence"),
    [
        ("/v2/models/c/stats", "Request for unknown model: 'c' is not found"),
        ("/v2/models/b/versions/9/stats", "Request for unknown model: 'b' version 9 is not found"),
    ],
)
def test_unknown_ones_are_404(desk: Desk, url: str, sentence: str) -> None:
    answer = desk.ask("GET", url)
    assert (answer.status, answer.error) == (404, sentence)


def test_without_a_broker_it_is_503_and_not_zeros(loop: Loop) -> None:
    desk = Desk(loop)
    desk.application.add(Statistics(desk.application, desk.reports).routes)
    answer = desk.ask("GET", ALL)
    assert (answer.status, answer.headers["Retry-After"]) == (503, "1")
    assert answer.error == "the broker, which knows the statistics, does not answer yet"


def test_with_too_many_that_ask_it_is_503(desk: Desk) -> None:
    for _ in range(100):
        desk.begin("GET", ALL)
    answer = desk.ask("GET", ALL)
    assert (answer.status, answer.error) == (503, "too many ask for metrics and statistics; try again shortly")
    for serial in desk.serials:
        desk.reports.arrived(Metrics(EPOCH, serial, ()))


def test_a_model_may_be_called_stats(desk: Desk) -> None:
    desk.join(ready("stats"))
    assert [each["name"] for each in stats(desk, ALL)] == ["stats"]
    assert [each["name"] for each in stats(desk, "/v2/models/stats/stats")] == ["stats"]
    assert desk.ask("GET", "/v2/models/stats/ready").status == 200
