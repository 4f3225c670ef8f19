"""What NVML says of GPUs: which there are, and how the one of this worker fares.

The only file that knows pynvml (the package nvidia-ml-py). What a GPU does not tell is None: GeForce cards know no ECC,
slices (MIG) no utilisation. Its calls may take milliseconds, and longer when a GPU is about to be lost, so a thread of
its own makes them (``Watching``).
"""

from __future__ import annotations

import importlib
import logging
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Final, NamedTuple

from penstock.wire.metrics import Meters
from penstock.wire.process import fields

log = logging.getLogger("penstock.worker")

EXIT_GPU_LOST: Final = 69  # EX_UNAVAILABLE of sysexits.h

_EVERY_S: Final = 1.0
_STOP_MAX_S: Final = 1.0  # for a call that hangs in the driver; the thread is left behind then

HEAT: Final = "heat"
POWER: Final = "power"
POWER_BRAKE: Final = "power_brake"  # what supplies the power asked for less
HARDWARE: Final = "hardware"  # the GPU protects itself, for one of the reasons above or another
_THROTTLES: Final = {
    POWER: "SwPowerCap",
    HEAT: "SwThermalSlowdown HwThermalSlowdown",
    POWER_BRAKE: "HwPowerBrakeSlowdown",
    HARDWARE: "HwSlowdown",
}
THROTTLES: Final = tuple(_THROTTLES)

# After these a GPU does no more work until it has been reset, or the machine restarted.
_FATAL: Final = ("GPU_IS_LOST", "RESET_REQUIRED", "IRQ_ISSUE")


@dataclass(frozen=True, slots=True)
class Gpu:
    """A GPU, or a slice of one that is divided (MIG). ``index``: of the whole GPU, as nvidia-smi counts; ``pci``: its
    address, as sysfs has it; ``parent``: of a slice, the whole GPU's UUID. ``unusable``: why nothing can run on it;
    then it may have no UUID, and stands here so that those after it keep their numbers."""

    index: int
    uuid: str
    name: str = ""
    pci: str = ""
    memory_bytes: int = 0
    parent: str = ""
    unusable: str = ""


class Gpus(NamedTuple):
    """All GPUs, or why none can be asked for ("" when they could)."""

    found: list[Gpu]
    absent: str


def list_gpus(nvml: Any = None) -> Gpus:
    """Every GPU of this machine; slices instead of those that are divided. Without a driver there is none."""
    nvml, absent = _open(nvml)
    count = 0
    if nvml is not None:
        try:
            count = nvml.nvmlDeviceGetCount()
        except nvml.NVMLError as error:
            nvml, absent = None, str(error)
    if nvml is None:
        log.debug("no GPU is looked for", extra=fields(reason=absent))
        return Gpus([], absent)
    found: list[Gpu] = []
    for index in range(count):
        try:
            handle = nvml.nvmlDeviceGetHandleByIndex(index)
            found += _list(nvml, handle, index)
        except (nvml.NVMLError, _Lost) as error:
            found.append(Gpu(index, "", unusable=str(error)))
    return Gpus(found, "")


def _open(given: Any) -> tuple[Any, str]:
    """NVML, or None and why there is none."""
    nvml = given
    if nvml is None:
        try:
            nvml = importlib.import_module("pynvml")
        except ImportError:
            return None, "the Python package nvidia-ml-py is missing"
    try:
        nvml.nvmlInit()  # once more does not matter
    except nvml.NVMLError as error:
        return None, str(error)
    return nvml, ""


def _list(nvml: Any, handle: Any, index: int) -> list[Gpu]:
    """One GPU, or its slices. Raises NVMLError when it does not answer."""
    uuid = nvml.nvmlDeviceGetUUID(handle)
    name = _ask(nvml, nvml.nvmlDeviceGetName, handle) or ""
    pci = _ask(nvml, nvml.nvmlDeviceGetPciInfo, handle)
    address = sysfs_address(pci.busId) if pci is not None else ""
    whole = Gpu(index, uuid, name, address, _memory(nvml, handle)[1] or 0)
    mode = _ask(nvml, nvml.nvmlDeviceGetMigMode, handle)
    if mode is None or mode[0] != nvml.NVML_DEVICE_MIG_ENABLE:
        return [whole]
    slices = []
    for number in range(_ask(nvml, nvml.nvmlDeviceGetMaxMigDeviceCount, handle) or 0):
        slice_ = _ask(nvml, nvml.nvmlDeviceGetMigDeviceHandleByIndex, handle, number)
        if slice_ is None:
            continue  # this place is free
        slices.append(
            Gpu(
                index,
                nvml.nvmlDeviceGetUUID(slice_),
                _ask(nvml, nvml.nvmlDeviceGetName, slice_) or name,
                address,
                _memory(nvml, slice_)[1] or 0,
                parent=uuid,
            )
        )
    return slices or [replace(whole, unusable="it is in MIG mode, and has no slices (nvidia-smi mig -cgi ... -C)")]


def sysfs_address(bus_id: str) -> str:
    """ "00000000:3B:00.0" -> "0000:3b:00.0": NVML writes domains longer than the kernel does."""
    domain, _, rest = bus_id.lower().partition(":")
    return f"{domain[-4:] if domain.startswith('0000') else domain}:{rest}"


@dataclass(frozen=True, slots=True)
class GpuReading:
    """How a GPU fares; what it does not tell is None. ``utilization``: 0 to 1. ``energy_j``: since the driver was
    loaded. ``throttles``: of THROTTLES, what holds its clocks down. ``ecc_errors``: those that could not be corrected,
    since it has been watched. ``lost``: why nothing should run on it any more, or ""."""

    utilization: float | None = None
    memory_used_bytes: int | None = None
    memory_total_bytes: int | None = None
    temperature_c: float | None = None
    power_w: float | None = None
    power_limit_w: float | None = None
    energy_j: float | None = None
    throttles: frozenset[str] | None = None
    ecc_errors: int | None = None
    lost: str = ""


class GpuWatch:
    """Reads one GPU or slice, of any thread, one at a time. Constructing it asks for nothing."""

    def __init__(self, uuid: str, nvml: Any = None) -> None:
        self.uuid = uuid
        self._given = nvml
        self._nvml: Any = None
        self._handle: Any = None
        self._whole: Any = (
            None  # of a slice, the GPU that it is part of: heat, power and errors are known of that alone
        )
        self._ecc_before: int | None = None
        self._lost = ""

    def read(self) -> GpuReading:
        """A reading. A GPU that is lost stays so: what runs on it has lost its memory there."""
        if self._lost:
            return GpuReading(lost=self._lost)
        try:
            if self._handle is None:
                self._find()
            reading = self._read()
        except _Lost as error:
            reading = GpuReading(lost=str(error))
        self._lost = reading.lost
        return reading

    def _find(self) -> None:
        """Raises _Lost."""
        self._nvml, absent = _open(self._given)
        if self._nvml is None:
            raise _Lost(f"no NVIDIA driver answers: {absent}")
        nvml = self._nvml
        try:
            self._handle = self._whole = nvml.nvmlDeviceGetHandleByUUID(self.uuid)
        except nvml.NVMLError as error:
            raise _Lost(f"NVML does not find it: {error}") from None
        if self.uuid.startswith("MIG-"):
            self._whole = _ask(nvml, nvml.nvmlDeviceGetDeviceHandleFromMigDeviceHandle, self._handle) or self._handle

    def _read(self) -> GpuReading:
        """Raises _Lost."""
        nvml, handle, whole = self._nvml, self._handle, self._whole
        rates = _ask(nvml, nvml.nvmlDeviceGetUtilizationRates, handle)
        used, total = _memory(nvml, handle)
        temperature = _ask(nvml, nvml.nvmlDeviceGetTemperature, whole, nvml.NVML_TEMPERATURE_GPU)
        return GpuReading(
            utilization=None if rates is None else rates.gpu / 100,
            memory_used_bytes=used,
            memory_total_bytes=total,
            temperature_c=temperature,
            power_w=_thousandth(_ask(nvml, nvml.nvmlDeviceGetPowerUsage, whole)),
            power_limit_w=_thousandth(_ask(nvml, nvml.nvmlDeviceGetEnforcedPowerLimit, whole)),
            energy_j=_thousandth(_ask(nvml, nvml.nvmlDeviceGetTotalEnergyConsumption, whole)),
            throttles=self._throttles(),
            **self._errors(),
        )

    def _throttles(self) -> frozenset[str] | None:
        nvml = self._nvml
        bits = _ask(nvml, nvml.nvmlDeviceGetCurrentClocksThrottleReasons, self._whole)
        if bits is None:
            return None
        return frozenset(
            word
            for word, names in _THROTTLES.items()
            if any(bits & getattr(nvml, f"nvmlClocksThrottleReason{name}") for name in names.split())
        )

    def _errors(self) -> dict[str, Any]:
        """Errors in memory that could not be corrected, and whether they mean its end. What was there when the watch
        began has been dealt with: a process that begins anew gets other pages."""
        nvml = self._nvml
        count = _ask(
            nvml,
            nvml.nvmlDeviceGetTotalEccErrors,
            self._whole,
            nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED,
            nvml.NVML_VOLATILE_ECC,
        )
        rows = _ask(nvml, nvml.nvmlDeviceGetRemappedRows, self._whole)
        if rows is not None and rows[3]:
            return {"lost": "its broken memory cannot be replaced by spare rows any more (row remapper failure)"}
        if count is None:
            return {}
        if self._ecc_before is None or count < self._ecc_before:  # the driver began to count anew
            self._ecc_before = count
        errors = count - self._ecc_before
        if errors:
            return {"ecc_errors": errors, "lost": f"{errors} ECC errors of its memory could not be corrected"}
        return {"ecc_errors": 0}


class _Lost(Exception):
    """The GPU is gone; the message says how."""


def _ask(nvml: Any, call: Callable[..., Any], *arguments: Any) -> Any:
    """What NVML answers, or None when this GPU, driver or user gets no answer. Raises _Lost."""
    try:
        return call(*arguments)
    except nvml.NVMLError as error:
        if error.value in {getattr(nvml, f"NVML_ERROR_{name}") for name in _FATAL}:
            raise _Lost(str(error)) from None
        return None


def _memory(nvml: Any, handle: Any) -> tuple[int | None, int | None]:
    memory = _ask(nvml, nvml.nvmlDeviceGetMemoryInfo, handle)
    return (None, None) if memory is None else (memory.used, memory.total)


def _thousandth(value: float | None) -> float | None:
    return None if value is None else value / 1000


class Watching:
    """Reads now, and on a thread again and again until the GPU is lost. ``latest``: what was read last. ``fileno``, an
    eventfd, is readable once the GPU was lost after the first reading."""

    def __init__(self, watch: GpuWatch, every_s: float = _EVERY_S) -> None:
        self.uuid = watch.uuid
        self.latest = watch.read()
        self._watch = watch
        self._every_s = every_s
        self._lost = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="gpu", daemon=True)
        if not self.latest.lost:
            self._thread.start()

    def fileno(self) -> int:
        return self._lost

    def stop(self) -> None:
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join(_STOP_MAX_S)
        if not self._thread.is_alive():
            os.close(self._lost)

    def _run(self) -> None:
        while not self._stopping.wait(self._every_s):
            self.latest = self._watch.read()
            if self.latest.lost:
                os.eventfd_write(self._lost, 1)
                return


def measure_gpu(meters: Meters, gpu: str, reading: GpuReading) -> None:
    """Bring the series about a GPU up to date. There are none of what it does not tell."""
    for family, value in (
        ("penstock_gpu_utilization", reading.utilization),
        ("penstock_gpu_memory_used_bytes", reading.memory_used_bytes),
        ("penstock_gpu_memory_total_bytes", reading.memory_total_bytes),
        ("penstock_gpu_temperature_celsius", reading.temperature_c),
        ("penstock_gpu_power_watts", reading.power_w),
        ("penstock_gpu_power_limit_watts", reading.power_limit_w),
        ("penstock_gpu_energy_joules", reading.energy_j),
        ("penstock_gpu_ecc_errors", reading.ecc_errors),
        ("penstock_gpu_lost", int(bool(reading.lost))),
    ):
        if value is not None:
            meters.value(family, gpu).value = value
    if reading.throttles is not None:
        for word in THROTTLES:
            meters.value("penstock_gpu_throttled", gpu, word).value = int(word in reading.throttles)
