"""What every process does to be started, watched and stopped."""

from __future__ import annotations

import contextlib
import logging
import os
import resource
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from penstock.wire.metrics import Meters
from penstock.wire.process import (
    SPARE_DESCRIPTORS,
    WATCHDOG_FD,
    StopSignal,
    Watchdog,
    check_descriptor_limit,
    descriptors,
    fields,
    measure,
    notify,
)


@pytest.fixture
def stop_signal() -> Iterator[StopSignal]:
    stop = StopSignal()
    yield stop
    stop.restore()


@pytest.fixture
def supervisor(tmp_path: Path) -> Iterator[socket.socket]:
    """A socket as systemd gives one to a service of Type=notify."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel:
        channel.bind(str(tmp_path / "notify"))
        channel.settimeout(10)
        yield channel


def readable(stop: StopSignal, timeout_s: float) -> bool:
    return bool(select.select([stop.fileno()], [], [], timeout_s)[0])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_a_flag_and_wakes_whoever_polls(stop_signal: StopSignal, number: signal.Signals) -> None:
    before = stop_signal.received, readable(stop_signal, 0)
    os.kill(os.getpid(), number)
    after = stop_signal.received, readable(stop_signal, 10)
    stop_signal.clear()
    cleared = stop_signal.received, readable(stop_signal, 0)
    assert (before, after, cleared) == ((False, False), (True, True), (True, False))


def test_many_signals_do_no_harm(stop_signal: StopSignal) -> None:
    stop_signal.clear()
    for _ in range(300):
        os.kill(os.getpid(), signal.SIGTERM)
    assert stop_signal.received
    stop_signal.clear()
    assert not readable(stop_signal, 0)


def test_restoring_puts_back_what_was_there() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    stop = StopSignal()
    stop.restore()
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before
    assert signal.set_wakeup_fd(-1) == -1


def test_the_supervisor_is_told(supervisor: socket.socket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
    notify("READY=1")
    notify("STOPPING=1")
    assert [supervisor.recv(100), supervisor.recv(100)] == [b"READY=1", b"STOPPING=1"]


def test_a_supervisor_may_listen_on_an_abstract_address(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel:
        channel.bind("")  # the kernel finds one
        address: bytes = channel.getsockname()
        channel.settimeout(10)
        monkeypatch.setenv("NOTIFY_SOCKET", "@" + address[1:].decode())
        notify("READY=1")
        assert channel.recv(100) == b"READY=1"


@pytest.mark.parametrize("address", ["", "/nowhere/at/all", "@nobody-is-here", "x" * 300])
def test_nobody_has_to_want_to_know(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", address)
    notify("READY=1")


def test_a_supervisor_that_does_not_read_holds_nobody_up(
    supervisor: socket.socket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
    monkeypatch.setenv("WATCHDOG_USEC", "3000000")
    monkeypatch.setattr("penstock.wire.process._NOTIFY_MAX_US", 1000)
    monkeypatch.setattr("penstock.wire.process._FEED_MAX_US", 1000)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as other, contextlib.suppress(BlockingIOError):
        other.setblocking(False)
        while True:
            other.sendto(b"STATUS=", str(tmp_path / "notify"))
    notify("READY=1")
    Watchdog().feed(0.0)
    supervisor.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        while said := supervisor.recv(100):
            assert said == b"STATUS=", "there was no room for more"


def test_a_process_measures_itself() -> None:
    meters = Meters()
    measure(meters)
    measured = {sample.family: sample.value for sample in meters.samples()}
    assert measured.keys() == {"penstock_process_cpu_seconds", "penstock_process_resident_bytes"}
    seconds, resident = measured["penstock_process_cpu_seconds"], measured["penstock_process_resident_bytes"]
    assert isinstance(seconds, float)
    assert isinstance(resident, int)
    assert 0 < seconds < 1e6
    assert 1 << 20 < resident < 1 << 40


def test_fields_of_a_log_line_keep_their_names() -> None:
    assert fields(model="m", name="x") == {"fields": {"model": "m", "name": "x"}}


# --- the watchdog ---


def test_a_watchdog_is_fed_three_times_before_it_bites(
    monkeypatch: pytest.MonkeyPatch, supervisor: socket.socket, tmp_path: Path
) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
    monkeypatch.setenv("WATCHDOG_USEC", "30000000")
    monkeypatch.setenv("WATCHDOG_PID", str(os.getpid()))
    watchdog = Watchdog()
    fed = []
    for now in range(40):
        watchdog.feed(float(now))
        if select.select([supervisor], [], [], 0)[0]:
            assert supervisor.recv(100) == b"WATCHDOG=1"
            fed.append(now)
            assert watchdog.due == now + 10
    assert fed == [0, 8, 16, 24, 32], "by whoever is awake a little before it is due"


@pytest.mark.parametrize(
    "environment",
    [{}, {"WATCHDOG_USEC": "0"}, {"WATCHDOG_USEC": "soon"}, {"WATCHDOG_USEC": "1000", "WATCHDOG_PID": "1"}],
)
def test_a_watchdog_that_nobody_asked_for_is_not_fed(
    monkeypatch: pytest.MonkeyPatch, supervisor: socket.socket, tmp_path: Path, environment: dict[str, str]
) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
    for name in ("WATCHDOG_USEC", "WATCHDOG_PID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    watchdog = Watchdog()
    watchdog.feed(1e9)
    assert watchdog.due == float("inf")
    assert not select.select([supervisor], [], [], 0)[0]


# --- descriptors ---


@contextlib.contextmanager
def limited(limit: int) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def lowest_free() -> int:
    descriptor = os.open("/", os.O_PATH)
    os.close(descriptor)
    return descriptor


def test_the_last_descriptors_are_short() -> None:
    free = lowest_free()
    for limit, expected in (
        (free, "none"),
        (free + SPARE_DESCRIPTORS, "short"),
        (free + SPARE_DESCRIPTORS + 1, "enough"),
    ):
        with limited(limit):
            found = descriptors()
        assert found == expected


def test_who_has_no_descriptor_left_is_measured_and_feeds_its_watchdog_all_the_same(
    monkeypatch: pytest.MonkeyPatch, supervisor: socket.socket, tmp_path: Path
) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
    monkeypatch.setenv("WATCHDOG_USEC", "30000000")
    watchdog, meters = Watchdog(), Meters()
    measure(meters)
    with limited(lowest_free()):
        measure(meters)
        notify("READY=1")
        watchdog.feed(0.0)
    assert supervisor.recv(100) == b"WATCHDOG=1"
    assert {sample.family for sample in meters.samples()} >= {"penstock_process_resident_bytes"}


def test_a_process_may_open_as_many_files_as_it_is_ever_allowed() -> None:
    script = (
        "import resource as r\nfrom penstock.wire.process import raise_descriptor_limit\n"
        "r.setrlimit(r.RLIMIT_NOFILE, (100, 500)); raise_descriptor_limit(); print(*r.getrlimit(r.RLIMIT_NOFILE))"
    )
    shown = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    assert shown.stdout.split() == ["500", "500"]


def test_a_limit_below_what_the_configuration_may_need_is_said(caplog: pytest.LogCaptureFixture) -> None:
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    with caplog.at_level(logging.WARNING, "penstock"):
        check_descriptor_limit(limit - SPARE_DESCRIPTORS, "what fits")
        assert caplog.records == []
        check_descriptor_limit(limit - SPARE_DESCRIPTORS + 1, "HTTP connections")
    [record] = caplog.records
    assert record.__dict__["fields"] == {"limit": limit, "needed": limit + 1, "most": "HTTP connections"}


def test_a_watchdog_may_be_fed_without_waking_anybody(monkeypatch: pytest.MonkeyPatch) -> None:
    counter = os.eventfd(0, os.EFD_NONBLOCK)
    monkeypatch.setenv("WATCHDOG_USEC", "9000000")
    monkeypatch.setenv(WATCHDOG_FD, str(counter))
    monkeypatch.setenv("NOTIFY_SOCKET", "/nowhere")
    watchdog = Watchdog()
    for now in (0.0, 1.0, 1.6, 3.2):
        watchdog.feed(now)
    assert os.eventfd_read(counter) == 3
    os.close(counter)
