"""Addresses mean what users expect, and a socket path has one owner."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from penstock.wire.endpoints import (
    BrokerAddress,
    EndpointError,
    Guard,
    RuntimeDir,
    binding,
    check_loopback,
    default_runtime_dir,
    parse_broker,
    parse_host_port,
)

WORKER = bytes.fromhex("0123456789abcdef")


@pytest.fixture
def runtime(tmp_path: Path) -> RuntimeDir:
    runtime = RuntimeDir(tmp_path / "run")
    runtime.make()
    return runtime


def files(runtime: RuntimeDir) -> set[str]:
    return {path.name for path in runtime.path.iterdir()}


# --- the runtime directory ---


def test_a_runtime_directory_is_made_for_its_user_alone(tmp_path: Path) -> None:
    runtime = RuntimeDir(tmp_path / "deep" / "run")
    runtime.make()
    runtime.make()
    assert runtime.path.stat().st_mode & 0o777 == 0o700


def test_its_sockets_have_their_names(tmp_path: Path) -> None:
    runtime = RuntimeDir(tmp_path)
    paths = [runtime.callers, runtime.workers, runtime.control, runtime.results(WORKER)]
    assert [path.name for path in paths] == [
        "callers.sock",
        "workers.sock",
        "control.sock",
        "worker-0123456789abcdef.sock",
    ]
    assert {path.parent for path in paths} == {tmp_path}


@pytest.mark.parametrize("mode", [0o701, 0o750, 0o770, 0o755, 0o777])
def test_a_directory_that_is_open_to_others_is_refused(tmp_path: Path, mode: int) -> None:
    tmp_path.chmod(mode)
    with pytest.raises(EndpointError, match="belongs to somebody else or is open to others; make it yours with mode"):
        RuntimeDir(tmp_path).make()
    assert tmp_path.stat().st_mode & 0o777 == mode
    tmp_path.chmod(0o700)


def test_a_directory_of_somebody_else_is_refused(tmp_path: Path) -> None:
    foreign = Path("/root")
    if os.getuid() == 0:
        foreign = tmp_path
        os.chown(foreign, 65534, -1)
    with pytest.raises(EndpointError, match="belongs to somebody else"):
        RuntimeDir(foreign).make()


def test_a_directory_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run").touch()
    for path in (tmp_path / "run", Path("/proc/run")):
        with pytest.raises(EndpointError, match=r"cannot make the runtime directory .*; choose another"):
            RuntimeDir(path).make()


def test_the_longest_socket_path_has_to_fit() -> None:
    longest = 107 - len("/worker-0123456789abcdef.sock")
    path = "/tmp/" + "ö" * 20
    path += "x" * (longest + 1 - len(os.fsencode(path)))
    with pytest.raises(EndpointError, match=r"makes socket paths of 108 bytes, and Linux allows 107; choose a shorter"):
        RuntimeDir(Path(path)).make()
    assert not Path(path).exists()
    fits = RuntimeDir(Path(path[:-1]))
    try:
        fits.make()
    finally:
        fits.path.rmdir()


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"PENSTOCK_RUNTIME_DIR": "/somewhere", "XDG_RUNTIME_DIR": "/tmp"}, "/somewhere"),
        ({"PENSTOCK_RUNTIME_DIR": "", "XDG_RUNTIME_DIR": "/tmp"}, "/tmp/penstock"),
        ({"XDG_RUNTIME_DIR": "/not/there"}, f"/tmp/penstock-{os.getuid()}"),
        ({}, f"/tmp/penstock-{os.getuid()}"),
    ],
)
def test_where_processes_meet_when_nobody_says(
    variables: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("PENSTOCK_RUNTIME_DIR", "XDG_RUNTIME_DIR"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert default_runtime_dir() == Path(expected)


# --- guards ---


def test_a_path_has_one_holder_at_a_time(runtime: RuntimeDir) -> None:
    guard = Guard(runtime.callers)
    with pytest.raises(EndpointError, match=r"callers.sock is in use by another process"):
        Guard(runtime.callers)
    guard.release()
    Guard(runtime.callers).release()
    assert files(runtime) == set()


def test_refusing_the_second_holder_leaves_the_first_its_socket(runtime: RuntimeDir) -> None:
    guard = Guard(runtime.callers)
    runtime.callers.touch()
    with pytest.raises(EndpointError):
        Guard(runtime.callers)
    assert files(runtime) == {"callers.sock", "callers.lock"}
    guard.release()


def test_releasing_twice_does_not_touch_the_next_holder(runtime: RuntimeDir) -> None:
    first = Guard(runtime.callers)
    first.release()
    second = Guard(runtime.callers)
    first.release()
    assert files(runtime) == {"callers.lock"}
    second.release()


def test_a_guard_that_cannot_lock_says_why(tmp_path: Path) -> None:
    with pytest.raises(EndpointError, match=r"cannot lock .*callers.lock: No such file or directory"):
        Guard(tmp_path / "missing" / "callers.sock")


def hold_and_be_killed(*paths: Path) -> None:
    """A process takes guards, binds their paths, and is killed."""
    script = """
import pathlib, socket, sys
from penstock.wire.endpoints import Guard
kept = []
for path in map(pathlib.Path, sys.argv[1:]):
    kept += [Guard(path), socket.socket(socket.AF_UNIX)]
    kept[-1].bind(str(path))
print("bound", flush=True)
sys.stdin.read()
"""
    command = [sys.executable, "-c", script, *map(str, paths)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"bound\n"
        with pytest.raises(EndpointError, match="in use by another process"):
            Guard(paths[0])
        process.send_signal(signal.SIGKILL)


def test_what_a_killed_process_left_is_swept_and_what_lives_is_not(runtime: RuntimeDir) -> None:
    alive, dead = runtime.results(WORKER), runtime.results(bytes(8))
    guard = Guard(alive)
    alive.touch()
    hold_and_be_killed(dead, runtime.callers)
    assert files(runtime) >= {dead.name, dead.with_suffix(".lock").name, "callers.sock", "callers.lock"}
    runtime.sweep()
    assert files(runtime) == {alive.name, alive.with_suffix(".lock").name}
    taken = Guard(runtime.callers)  # the next broker needs no sweep
    assert not runtime.callers.exists()
    taken.release()
    guard.release()
    assert files(runtime) == set()


def test_a_lock_on_a_file_that_was_removed_meanwhile_guards_nothing(
    runtime: RuntimeDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between open and flock its holder may release, and another may make a new file and lock that one."""
    lock_path = runtime.callers.with_suffix(".lock")
    holder = Guard(runtime.callers)
    others: list[Guard] = []
    flock: Callable[[int, int], None] = fcntl.flock

    def flock_late(fd: int, operation: int) -> None:
        monkeypatch.setattr(fcntl, "flock", flock)
        holder.release()
        others.append(Guard(runtime.callers))
        flock(fd, operation)  # succeeds: nobody else has that file any more

    monkeypatch.setattr(fcntl, "flock", flock_late)
    with pytest.raises(EndpointError, match="in use by another process"):
        Guard(runtime.callers)
    assert lock_path.exists()
    others[0].release()


def test_a_lock_on_a_removed_file_is_taken_again(runtime: RuntimeDir, monkeypatch: pytest.MonkeyPatch) -> None:
    holder = Guard(runtime.callers)
    flock: Callable[[int, int], None] = fcntl.flock

    def flock_late(fd: int, operation: int) -> None:
        monkeypatch.setattr(fcntl, "flock", flock)
        holder.release()
        flock(fd, operation)

    monkeypatch.setattr(fcntl, "flock", flock_late)
    guard = Guard(runtime.callers)
    assert files(runtime) == {"callers.lock"}
    with pytest.raises(EndpointError, match="in use by another process"):
        Guard(runtime.callers)
    guard.release()


# --- addresses ---


@pytest.mark.parametrize(
    ("address", "callers", "workers"),
    [
        ("/run/x", "ipc:///run/x/callers.sock", "ipc:///run/x/workers.sock"),
        (Path("/run/x"), "ipc:///run/x/callers.sock", "ipc:///run/x/workers.sock"),
        ("/run/x/", "ipc:///run/x/callers.sock", "ipc:///run/x/workers.sock"),
        ("ipc:///run/x", "ipc:///run/x/callers.sock", "ipc:///run/x/workers.sock"),
        ("ipc:///run/x/callers.sock", "ipc:///run/x/callers.sock", "ipc:///run/x/workers.sock"),
        ("/run/x/callers.sock", "ipc:///run/x/callers.sock", "ipc:///run/x/workers.sock"),
        ("tcp://127.0.0.1:8100", "tcp://127.0.0.1:8100", "tcp://127.0.0.1:8101"),
        ("tcp://[::1]:8100", "tcp://[::1]:8100", "tcp://[::1]:8101"),
        ("tcp://a.host:65534", "tcp://a.host:65534", "tcp://a.host:65535"),
    ],
)
def test_a_broker_is_where_its_address_says(address: Any, callers: str, workers: str) -> None:
    broker = parse_broker(address)
    assert (broker.callers, broker.workers) == (callers, workers)
    assert str(broker) == ("/run/x" if broker.runtime else callers)


def test_a_relative_directory_is_one_of_this_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert parse_broker("run") == BrokerAddress(RuntimeDir(tmp_path / "run"))


@pytest.mark.parametrize(
    ("address", "sentence"),
    [
        ("", "'' names no runtime directory"),
        ("/", "'/' names no runtime directory"),
        ("ipc://", "'ipc://' names no runtime directory"),
        ("http://x:1", "'http://x:1' is neither a runtime directory, nor ipc://DIRECTORY, nor tcp://HOST:PORT"),
        ("tcp://x", "'tcp://x' is not of the form HOST:PORT"),
        ("tcp://x:0", "'tcp://x:0': a broker's port is from 1 to 65534"),
        ("tcp://x:65535", "'tcp://x:65535': a broker's port is from 1 to 65534"),
        ("tcp://x:65536", "'tcp://x:65536' is not of the form HOST:PORT"),
        ("tcp://::1:8000", "'tcp://::1:8000' is not of the form HOST:PORT"),
    ],
)
def test_an_address_that_is_none_is_refused_with_the_reason(address: str, sentence: str) -> None:
    with pytest.raises(EndpointError) as caught:
        parse_broker(address)
    assert str(caught.value).startswith(sentence)


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [
        ("127.0.0.1:8000", "127.0.0.1", 8000),
        ("localhost:0", "localhost", 0),
        ("[::1]:65535", "::1", 65535),
        ("*:80", "*", 80),
        ("h:0080", "h", 80),
    ],
)
def test_host_and_port_are_told_apart(text: str, host: str, port: int) -> None:
    assert parse_host_port(text) == (host, port)


@pytest.mark.parametrize("text", ["", ":", "host", "host:", ":80", "[]:80", "::1:80", "[::1]", "[::1:80", "a:b:80"])
def test_what_has_no_host_or_no_port_is_refused(text: str) -> None:
    with pytest.raises(EndpointError, match="is not of the form HOST:PORT, such as"):
        parse_host_port(text)


@pytest.mark.parametrize("port", ["port", "-1", "+1", " 80", "65536", "8_0", "٨٠", "²", "9" * 5000])
def test_what_is_no_port_is_refused(port: str) -> None:
    with pytest.raises(EndpointError, match="is not of the form HOST:PORT, such as"):
        parse_host_port(f"host:{port}")


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "::1", "0:0:0:0:0:0:0:1", "localhost"])
def test_loopback_is_allowed(host: str) -> None:
    check_loopback(host, "--bind")


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "*", "", "10.0.0.1", "128.0.0.1", "a.host", "127.1", "localhost.x"])
def test_what_others_may_reach_is_refused(host: str) -> None:
    with pytest.raises(EndpointError, match=r"^--bind: .* can be reached from other machines"):
        check_loopback(host, "--bind")


def test_what_cannot_be_bound_is_a_sentence() -> None:
    full = "cannot listen on x: No space left on device; free space or inodes there, or choose another directory"
    with pytest.raises(EndpointError, match=f"^{full} with --runtime-dir$"), binding("x"):
        raise OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(EndpointError, match=r"^cannot listen on x: Permission denied$"), binding("x"):
        raise OSError(errno.EACCES, "Permission denied")
    with pytest.raises(ZeroDivisionError), binding("x"):
        raise ZeroDivisionError
