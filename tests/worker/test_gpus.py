"""What NVML says, by a stand-in for it; and what is said where it really is absent."""

from __future__ import annotations

import logging
import select
from typing import Any

import pynvml
import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.wire.metrics import FAMILIES, Meters
from penstock.worker.gpus import THROTTLES, Gpu, GpuReading, GpuWatch, Watching, list_gpus, measure_gpu, sysfs_address
from tests.worker.nvml import Card, Nvml, divided, error, h100

FATAL = ["GPU_IS_LOST", "RESET_REQUIRED", "IRQ_ISSUE"]


def has_driver() -> bool:
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return False
    return True


# --- which there are ---


@pytest.mark.skipif(has_driver(), reason="this machine has a driver")
def test_without_a_driver_there_is_no_gpu_and_one_line_for_who_wants_to_know(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.DEBUG):
        gpus = list_gpus()
    assert gpus == ([], "NVML Shared Library Not Found")
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [("DEBUG", "no GPU is looked for")]


@pytest.mark.parametrize("absent", ["LIBRARY_NOT_FOUND", "DRIVER_NOT_LOADED", "LIB_RM_VERSION_MISMATCH", "UNKNOWN"])
def test_a_driver_that_does_not_answer_is_as_good_as_none(absent: str) -> None:
    found, why = list_gpus(Nvml(h100(), absent=absent))
    assert found == []
    assert why


def test_all_gpus_are_listed_and_slices_instead_of_what_is_divided() -> None:
    found, absent = list_gpus(Nvml(h100(), divided()))
    assert absent == ""
    assert found == [
        Gpu(0, "GPU-11111111-aaaa", "NVIDIA H100 80GB HBM3", "0000:3b:00.0", 80 << 30),
        *(
            Gpu(
                *(1, f"MIG-{number}0000000-cccc", "NVIDIA H100 80GB HBM3 MIG 3g.40gb", "0000:86:00.0", 40 << 30),
                parent="GPU-22222222-bbbb",
            )
            for number in range(2)
        ),
    ]


def test_a_gpu_that_is_divided_into_nothing_cannot_be_used() -> None:
    card = divided()
    card.slices[:] = [None]
    [gpu], _ = list_gpus(Nvml(card))
    assert gpu.unusable.startswith("it is in MIG mode, and has no slices")


def test_a_lost_gpu_keeps_its_place() -> None:
    lost = h100()
    lost.fails = "GPU_IS_LOST"
    found, _ = list_gpus(Nvml(lost, h100("GPU-2")))
    assert [(gpu.index, gpu.uuid, gpu.unusable) for gpu in found] == [(0, "", "GPU is lost"), (1, "GPU-2", "")]


def test_a_gpu_that_tells_its_uuid_alone_is_listed() -> None:
    assert list_gpus(Nvml(Card("GPU-1"))).found == [Gpu(0, "GPU-1")]


@pytest.mark.parametrize(
    ("told", "address"), [("00000000:3B:00.0", "0000:3b:00.0"), ("00010000:01:00.0", "00010000:01:00.0")]
)
def test_addresses_are_written_as_the_kernel_does(told: str, address: str) -> None:
    assert sysfs_address(told) == address


# --- how one fares ---


def test_all_that_a_gpu_tells_is_read() -> None:
    assert GpuWatch("GPU-11111111-aaaa", Nvml(h100())).read() == GpuReading(
        utilization=0.93,
        memory_used_bytes=20 << 30,
        memory_total_bytes=80 << 30,
        temperature_c=61,
        power_w=512.345,
        power_limit_w=700.0,
        energy_j=9876.543,
        throttles=frozenset({"power"}),
        ecc_errors=0,
    )


def test_of_a_slice_its_gpu_tells_the_rest() -> None:
    reading = GpuWatch("MIG-10000000-cccc", Nvml(divided())).read()
    assert (reading.utilization, reading.memory_total_bytes) == (None, 40 << 30)
    assert (reading.temperature_c, reading.ecc_errors, reading.lost) == (61, 0, "")


def test_a_slice_is_lost_with_its_gpu() -> None:
    card = divided()
    watch = GpuWatch("MIG-10000000-cccc", Nvml(card))
    assert watch.read().lost == ""
    card.fails = "GPU_IS_LOST"
    assert watch.read().lost == "GPU is lost"


def test_what_a_gpu_does_not_tell_is_not_known() -> None:
    assert GpuWatch("GPU-1", Nvml(Card("GPU-1"))).read() == GpuReading()


@given(st.sets(st.sampled_from(sorted(h100().known))), st.sampled_from(["NOT_SUPPORTED", "NO_PERMISSION", "UNKNOWN"]))
def test_whatever_is_not_told_the_rest_is(missing: set[str], how: str) -> None:
    card = h100()
    for what in missing:
        card.known[what] = error(how)
    reading = GpuWatch(card.uuid, Nvml(card)).read()
    assert reading.lost == ""
    assert (reading.temperature_c is None) == ("Temperature" in missing)
    assert (reading.throttles is None) == ("CurrentClocksThrottleReasons" in missing)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("GpuIdle", set()),
        ("ApplicationsClocksSetting", set()),
        ("SwPowerCap", {"power"}),
        ("SwThermalSlowdown", {"heat"}),
        ("HwThermalSlowdown", {"heat"}),
        ("HwPowerBrakeSlowdown", {"power_brake"}),
        ("HwSlowdown", {"hardware"}),
    ],
)
def test_what_holds_clocks_down_is_a_word(name: str, words: set[str]) -> None:
    card = h100()
    card.known["CurrentClocksThrottleReasons"] = getattr(pynvml, f"nvmlClocksThrottleReason{name}")
    assert GpuWatch(card.uuid, Nvml(card)).read().throttles == frozenset(words)
    assert words <= set(THROTTLES)


# --- when one is lost ---


@pytest.mark.parametrize("how", FATAL)
def test_a_gpu_that_is_lost_stays_lost(how: str) -> None:
    card = h100()
    watch = GpuWatch(card.uuid, Nvml(card))
    assert watch.read().lost == ""
    card.fails = how
    reason = watch.read().lost
    assert reason
    card.fails = ""
    assert watch.read() == GpuReading(lost=reason)


@given(st.sampled_from(sorted({*h100().known} - {"Name", "PciInfo", "MigMode"})), st.sampled_from(FATAL))
def test_any_call_may_be_the_one_that_says_so(what: str, how: str) -> None:
    card = h100()
    card.known[what] = error(how)
    assert GpuWatch(card.uuid, Nvml(card)).read().lost


def test_one_that_is_not_found_is_lost() -> None:
    assert GpuWatch("GPU-9", Nvml(h100())).read().lost == "NVML does not find it: Not Found"
    assert GpuWatch("GPU-9", Nvml(absent="DRIVER_NOT_LOADED")).read().lost == (
        "no NVIDIA driver answers: Driver Not Loaded"
    )


def test_errors_of_memory_that_were_there_before_do_not_count() -> None:
    card = h100()
    watch = GpuWatch(card.uuid, Nvml(card))
    assert (watch.read().ecc_errors, watch.read().lost) == (0, "")
    card.known["TotalEccErrors"] = 9
    reading = watch.read()
    assert (reading.ecc_errors, reading.lost) == (2, "2 ECC errors of its memory could not be corrected")
    assert watch.read().lost == reading.lost
    assert GpuWatch(card.uuid, Nvml(card)).read().lost == "", "who begins anew gets other memory"


def test_a_driver_that_begins_to_count_anew_has_found_no_error() -> None:
    card = h100()
    watch = GpuWatch(card.uuid, Nvml(card))
    watch.read()
    for count, errors in ((0, 0), (0, 0), (1, 1)):
        card.known["TotalEccErrors"] = count
        assert watch.read().ecc_errors == errors


def test_memory_that_cannot_be_replaced_ends_it() -> None:
    card = h100()
    card.known["RemappedRows"] = (0, 9, 0, 1)
    assert "row remapper failure" in GpuWatch(card.uuid, Nvml(card)).read().lost


# --- watching ---


def is_readable(watching: Watching, wait_s: float) -> bool:
    return bool(select.select([watching.fileno()], [], [], wait_s)[0])


def test_the_loop_is_woken_when_the_gpu_is_lost() -> None:
    card = h100()
    watching = Watching(GpuWatch(card.uuid, Nvml(card)), every_s=0.001)
    try:
        assert watching.latest.utilization == 0.93
        assert not is_readable(watching, 0)
        card.fails = "GPU_IS_LOST"
        assert is_readable(watching, 30)
        assert watching.latest.lost == "GPU is lost"
    finally:
        watching.stop()


def test_one_that_is_lost_at_once_is_not_watched() -> None:
    watching = Watching(GpuWatch("GPU-9", Nvml()))
    assert watching.latest.lost
    assert not is_readable(watching, 0)
    watching.stop()


# --- metrics ---


def told(reading: GpuReading) -> dict[tuple[str, ...], Any]:
    meters = Meters()
    measure_gpu(meters, "GPU-1", reading)
    return {(sample.family, *sample.labels): sample.value for sample in meters.samples()}


def test_a_reading_fills_all_series() -> None:
    card = h100()
    values = told(GpuWatch(card.uuid, Nvml(card)).read())
    assert {key[0] for key in values} == {name for name in FAMILIES if name.startswith("penstock_gpu_")}
    assert values["penstock_gpu_utilization", "GPU-1"] == 0.93
    assert {key[2]: on for key, on in values.items() if key[0] == "penstock_gpu_throttled"} == {
        "heat": 0,
        "power": 1,
        "power_brake": 0,
        "hardware": 0,
    }
    assert values["penstock_gpu_lost", "GPU-1"] == 0


def test_there_are_no_series_of_what_is_not_told() -> None:
    assert told(GpuReading()) == {("penstock_gpu_lost", "GPU-1"): 0}
    assert told(GpuReading(lost="gone")) == {("penstock_gpu_lost", "GPU-1"): 1}
