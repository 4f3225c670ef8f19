"""Triton's names for our series."""

from __future__ import annotations

import pytest

from penstock.gateway.triton import triton_metrics
from penstock.wire.errors import BAD_INPUT, CANCELLED, MODEL_FAILED, OVERLOADED
from penstock.wire.metrics import Meters, Sample

KEY = ("m", "1")
GPU = {
    *("nv_gpu_utilization", "nv_gpu_memory_total_bytes", "nv_gpu_memory_used_bytes"),
    *("nv_gpu_power_usage", "nv_gpu_power_limit", "nv_energy_consumption"),
}


def told(*processes: Meters) -> dict[tuple[str, ...], float]:
    """Values by name and labels."""
    samples: list[Sample] = [sample for each in processes for sample in each.samples()]
    found: dict[tuple[str, ...], float] = {}
    for metric in triton_metrics(samples):
        assert metric.documentation
        for sample in metric.samples:
            labels = ["gpu_uuid"] if sample.name in GPU else ["model", "version", "reason"]
            assert list(sample.labels) == labels[: len(sample.labels)]
            found[sample.name, *sample.labels.values()] = sample.value
    return found


def worker(queue_s: float, compute_s: float, requests: int, rows: int, failed: int = 0) -> Meters:
    """After one batch."""
    meters = Meters()
    meters.histogram("penstock_queue_seconds", *KEY).observe(queue_s, requests)
    meters.histogram("penstock_request_seconds", *KEY).observe(queue_s + compute_s, requests)
    meters.histogram("penstock_batch_rows", *KEY).observe(rows)
    meters.value("penstock_input_seconds", *KEY).value = 0.1 * compute_s * requests
    meters.value("penstock_model_seconds", *KEY).value = 0.7 * compute_s * requests
    meters.value("penstock_size_batches", *KEY, str(rows)).value = 1
    for part, share in (("input", 0.1), ("model", 0.7), ("output", 0.2)):
        meters.value(f"penstock_size_{part}_seconds", *KEY, str(rows)).value = share * compute_s
    if failed:
        meters.value("penstock_request_failures", *KEY, MODEL_FAILED).value = failed
        meters.value("penstock_failed_rows", *KEY).value = failed
        meters.value("penstock_failed_seconds", *KEY).value = failed * (queue_s + compute_s)
    return meters


def test_workers_are_added_up_and_each_request_counts_its_whole_batch() -> None:
    values = told(worker(0.002, 0.010, 3, 6), worker(0.001, 0.020, 2, 2, failed=1))
    assert values["nv_inference_request_success", *KEY] == 4
    assert values["nv_inference_request_failure", *KEY, "BACKEND"] == 1
    assert values["nv_inference_count", *KEY] == 7
    assert values["nv_inference_exec_count", *KEY] == 2
    assert values["nv_inference_queue_duration_us", *KEY] == pytest.approx(3 * 2000 + 2 * 1000)
    for part, share in (("input", 0.1), ("infer", 0.7), ("output", 0.2)):
        name = f"nv_inference_compute_{part}_duration_us"
        assert values[name, *KEY] == pytest.approx(share * (3 * 10_000 + 2 * 20_000))
    assert values["nv_inference_request_duration_us", *KEY] == pytest.approx(3 * 12_000 + 2 * 21_000)


def test_what_waits_is_pending() -> None:
    broker = Meters()
    broker.value("penstock_queue_requests", *KEY).value = 7
    assert told(broker) == {("nv_inference_pending_request_count", *KEY): 7}


def test_reasons_are_those_that_triton_knows() -> None:
    meters = Meters()
    for reason, count in ((OVERLOADED, 1), (CANCELLED, 2), (BAD_INPUT, 4), ("deadline", 8)):
        meters.value("penstock_request_failures", *KEY, reason).value = count
    name = "nv_inference_request_failure"
    assert told(meters) == {(name, *KEY, "REJECTED"): 9, (name, *KEY, "CANCELED"): 2, (name, *KEY, "OTHER"): 4}


def test_nothing_is_said_of_what_has_not_been_measured() -> None:
    assert told(Meters()) == {}


def test_a_gpu_is_there_once_also_with_several_workers_on_it() -> None:
    processes = []
    for uuid, watts in (("GPU-1", 300.0), ("GPU-1", 300.0), ("GPU-2", 80.0)):
        meters = Meters()
        for what in ("utilization", "memory_used_bytes", "memory_total_bytes", "power_limit_watts", "energy_joules"):
            meters.value(f"penstock_gpu_{what}", uuid).value = 0.5
        meters.value("penstock_gpu_power_watts", uuid).value = watts
        processes.append(meters)
    values = told(*processes)
    assert {key[0] for key in values} == GPU
    assert len(values) == 2 * len(GPU)
    assert (values["nv_gpu_power_usage", "GPU-1"], values["nv_gpu_power_usage", "GPU-2"]) == (300, 80)
