"""Disks that are full, and memory that is not to be had: a clear word, and all that can go on goes on."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import resource
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from penstock.client import Client, PenstockError
from penstock.simulate.trace import read_trace
from tests.system.models import dense, make_model, write
from tests.system.servers import PENSTOCK, Process, Server, StartServer, wait_for

ROW = {"x": np.ones((1, 4), np.float32)}
WIDE = {"x": np.arange(100_000, dtype=np.float32).reshape(2, 50_000)}
NO_ROOM = "No space left on device"

Disk = Callable[..., list[str]]


@pytest.fixture
def disk(tmp_path: Path) -> Disk:
    """``disk("size=1m")``: a command that becomes the one after it, for which ``tmp_path / "disk"`` is a disk of its
    own, which ends with it. ``then``: how the shell gets there."""
    unshare = ["unshare", "--mount", "--propagation=private"]
    if os.geteuid() != 0:
        unshare[1:1] = ["--user", "--map-root-user"]
    place = tmp_path / "disk"
    place.mkdir()
    try:
        subprocess.run([*unshare, "mount", "-t", "tmpfs", "none", str(place)], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"this user may mount nothing: {error}")
    mount = 'mount -t tmpfs -o "$1",mode=0700 none "$0" && shift && '

    def make(limits: str, then: str = 'exec "$@"') -> list[str]:
        return [*unshare, "sh", "-c", mount + then, str(place), limits]

    return make


def inside(process: Process, path: Path) -> Path:
    """A path as the process sees it."""
    return Path(f"/proc/{process.pid}/root{path}")


def fill(path: Path) -> None:
    """Write until there is no room at all."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    with contextlib.suppress(OSError):
        while True:
            os.write(fd, bytes(4096))
    os.close(fd)


def events(server: Server, event: str) -> list[dict[str, object]]:
    return [line for line in server.log() if line["event"].startswith(event)]


def serves(client: Client) -> bool:
    try:
        client.infer("dense", ROW, timeout=1)
    except PenstockError:
        return False
    return True


# --- full disks ---


def heavy(side: int) -> onnx.ModelProto:
    weights = numpy_helper.from_array(np.ones((side, side), np.float32), "w")
    node = helper.make_node("MatMul", ["x", "w"], ["y"])
    shape: list[str | int] = ["N", side]
    return make_model([node], [("x", TensorProto.FLOAT, shape)], [("y", TensorProto.FLOAT, shape)], [weights])


def test_a_model_that_finds_no_room_in_the_store_is_served_without(
    start_server: StartServer, disk: Disk, tmp_path: Path
) -> None:
    models, store = tmp_path / "models", tmp_path / "disk" / "store"
    for name, side in (("large", 1024), ("small", 128)):
        write(models, name, heavy(side))
    config = tmp_path / "penstock.toml"
    config.write_text(f'[worker]\nstore = "{store}"\nstore_min_bytes = 1000\n')
    server = start_server(str(models), f"--config={config}", by=disk("size=1m"))
    [said] = events(server, "weights are not shared")
    assert (said["level"], said["model"]) == ("warning", "large")
    reason = str(said["reason"])
    assert reason.startswith(f"there is no room for it in {store}: {NO_ROOM}; it takes 419")
    assert reason.endswith(" are free; free some, or choose another directory with [worker] store")
    loaded = {line["model"]: line["weights"] for line in events(server, "model loaded")}
    assert loaded == {"large": "private", "small": "shared"}
    with Client(server.runtime) as client:
        for name, side in (("large", 1024), ("small", 128)):
            assert client.infer(name, {"x": np.ones((1, side), np.float32)})["y"][0, 0] == side


def test_a_record_that_finds_no_room_ends_and_the_server_serves_on(
    start_server: StartServer, repository: Path, disk: Disk, tmp_path: Path
) -> None:
    record = tmp_path / "disk" / "trace"
    server = start_server(str(repository), f"--record={record}", by=disk("size=8k"))
    ended = "nothing more is recorded; requests are served as before"
    asked = 0
    with Client(server.runtime) as client:

        def full() -> bool:
            nonlocal asked
            for _ in range(20):
                client.infer("dense", ROW)
                asked += 1
            return bool(events(server, ended))

        wait_for(full, "the disk to be full")
        [said] = events(server, ended)
        assert (said["process"], said["reason"], said["file"]) == ("broker", NO_ROOM, str(record))
        for _ in range(300):
            client.infer("dense", ROW)
    assert len(events(server, ended)) == 1
    assert 0 < read_trace(inside(server, record)).requests < asked


def test_a_log_that_finds_no_room_ends_nobody_and_goes_on_later(
    start_server: StartServer, repository: Path, disk: Disk, tmp_path: Path
) -> None:
    log, filler = tmp_path / "disk" / "log", tmp_path / "disk" / "filler"
    server = start_server(str(repository), "--workers=2", by=disk("size=64k", 'exec "$@" 2>>"$0/log"'))
    first = server.children("worker")
    fill(inside(server, filler))
    fill(inside(server, log))  # the page that it ends in, too
    before = inside(server, log).read_bytes()
    others = [*server.children("broker"), *server.children("gateway")]

    def replace(pid: int) -> None:
        """Of which several processes have something to say."""
        os.kill(pid, signal.SIGKILL)
        wait_for(lambda: pid not in (now := server.children("worker")) and len(now) == 2, "another worker")

    with Client(server.runtime) as client:
        replace(first[0])
        client.infer("dense", ROW, timeout=30)
        assert inside(server, log).read_bytes() == before
        inside(server, filler).unlink()
        replace(first[1])
        wait_for(lambda: b"log lines could not be written" in inside(server, log).read_bytes(), "the log to go on")
        client.infer("dense", ROW, timeout=30)
    wait_for(lambda: server.metrics()["penstock_workers"] == 2, "both workers")
    assert [*server.children("broker"), *server.children("gateway")] == others


def test_a_server_whose_words_find_no_room_serves_and_ends_well(repository: Path, tmp_path: Path) -> None:
    runtime = tmp_path / "run"
    server = Process(
        ["up", str(repository), "--http=127.0.0.1:0", f"--runtime-dir={runtime}"],
        by=["sh", "-c", 'exec "$@" >/dev/full 2>&1', "sh"],
    )
    try:
        wait_for(lambda: (runtime / "callers.sock").exists() and server.children("gateway"), "it to start")
        with Client(runtime) as client:
            wait_for(lambda: serves(client), "it to serve")
            wait_for(lambda: (runtime / "restart.sock").exists(), "it to be ready")
    finally:
        assert server.end() == 0
    assert list(runtime.iterdir()) == []


@pytest.mark.parametrize("arguments", [["up"], ["worker"]])
def test_an_exit_code_needs_no_room(arguments: list[str], tmp_path: Path) -> None:
    """The launcher, or systemd, goes by it: 2 says that another attempt would end in the same way."""
    command = [*PENSTOCK, *arguments, str(tmp_path / "missing"), f"--runtime-dir={tmp_path / 'run'}"]
    with open("/dev/full", "wb") as full:
        done = subprocess.run(command, stdout=full, stderr=full, timeout=60, check=False)
    assert done.returncode == 2


@pytest.mark.parametrize("inodes", [2, 3, 5, 7, 9, 11])
def test_a_runtime_directory_without_room_for_sockets_is_a_sentence(disk: Disk, tmp_path: Path, inodes: int) -> None:
    """Wherever the room ends: for a lock, or a socket, of one process or another."""
    runtime = tmp_path / "disk" / "run"
    command = ["up", "--http=127.0.0.1:0", f"--runtime-dir={runtime}"]
    server = Process(command, by=disk(f"size=1m,nr_inodes={inodes}"))
    assert server.wait() == 1
    said = "\n".join(server.errors)
    assert f"{NO_ROOM}; free space or inodes there, or choose another directory with --runtime-dir" in said
    assert "Traceback" not in said


def test_a_server_without_room_for_its_last_socket_only_cannot_be_asked_to_restart(
    repository: Path, disk: Disk, tmp_path: Path
) -> None:
    """The disk itself, the directory, five sockets and their locks."""
    server = Server(tmp_path / "disk" / "run", str(repository), by=disk("size=1m,nr_inodes=12"))
    try:
        [said] = events(server, "'penstock restart' will not be heard")
        assert NO_ROOM in str(said["reason"])
        assert server.request("GET", "/v2/health/ready")[0] == 200
    finally:
        assert server.end() == 0


def test_a_report_that_finds_no_room_leaves_the_old_one_whole(
    start_server: StartServer, repository: Path, disk: Disk, tmp_path: Path
) -> None:
    server = start_server(str(repository))
    report = tmp_path / "disk" / "report"
    begin = f'mkdir {report} && echo old >{report}/report.html && "$@"'
    end = f"code=$?; cat {report}/report.html; ls -A {report}; exit $code"
    options = [f"--url={server.url}", "--duration=0.2s", "--warmup=0s", f"--report={report}"]
    command = [*disk("size=8k", f"{begin}; {end}"), *PENSTOCK, "bench", "dense", *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == f"penstock: cannot write the report: [Errno 28] {NO_ROOM}"
    assert "requests/s" in done.stdout
    assert done.stdout.endswith("\nold\nreport.html\n")


def kept(server: Server, value: float) -> str:
    """How an answer came that may have been kept."""
    request = {"inputs": [{"name": "x", "shape": [1, 4], "datatype": "FP32", "data": [value] * 4}]}
    status, headers, _ = server.request("POST", "/v2/models/dense/infer", json.dumps(request).encode())
    assert status == 200
    return headers.get("penstock-cache", "")


def test_answers_that_find_no_room_are_not_kept_until_there_is_room(disk: Disk, tmp_path: Path) -> None:
    write(tmp_path / "models", "dense", dense(), config="response_cache = true\n")
    filler = tmp_path / "disk" / "filler"
    server = Server(tmp_path / "disk" / "run", str(tmp_path / "models"), by=disk("size=2m"))
    try:
        gateways = server.children("gateway")
        wait_for(lambda: kept(server, 0) == "hit", "an answer to be kept")
        fill(inside(server, filler))
        assert [kept(server, value) for value in range(1, 300)] == ["miss"] * 299
        [said] = wait_for(lambda: events(server, "answers cannot be kept"), "it to be said")
        assert NO_ROOM in str(said["reason"])
        assert kept(server, 0) == "hit"
        inside(server, filler).unlink()
        wait_for(lambda: kept(server, 1000) == "hit", "another to be kept")
        assert server.children("gateway") == gateways
    finally:
        assert server.end() == 0


def test_a_gateway_that_finds_no_room_for_kept_answers_serves_without(disk: Disk, tmp_path: Path) -> None:
    write(tmp_path / "models", "dense", dense(), config="response_cache = true\n")
    full = 'head -c 2M /dev/zero >"$0/filler" 2>/dev/null; exec "$@"'
    server = Server(tmp_path / "disk" / "run", str(tmp_path / "models"), by=disk("size=1m", full))
    try:
        gateways = server.children("gateway")
        assert {kept(server, value) for value in (1, 1, 2, 2)} == {""}
        assert server.children("gateway") == gateways
        assert any(NO_ROOM in line for line in server.errors)
    finally:
        assert server.end() == 0


# --- no memory for an arena ---


@pytest.fixture
def memory_group() -> Iterator[Path]:
    """A group of processes that may have 400 MB."""
    for top, limit in (("memory", "memory.limit_in_bytes"), ("", "memory.max")):
        group = Path("/sys/fs/cgroup") / top / f"penstock-test-{os.getpid()}"
        try:
            group.mkdir()
        except OSError:
            continue
        try:
            if (group / limit).exists():
                (group / limit).write_text(str(400_000_000))
                yield group
                return
        except PermissionError:
            continue
        finally:
            group.rmdir()
    pytest.skip("this user may make no group of processes (cgroup) with a limit of memory")


@pytest.fixture(params=["more than there is", "no files of that size", "more than the group may have"])
def no_arena(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[list[str], list[str], str]:
    """Arguments and a command to begin with, so that there are no arenas, and why."""
    config = tmp_path / "penstock.toml"
    if request.param == "more than there is":
        config.write_text("[gateway]\narena_bytes = 1125899906842624\n[worker]\narena_bytes = 1125899906842624\n")
        return [f"--config={config}"], [], "does not fit into the "
    if request.param == "no files of that size":
        # Nor may it be Python's compiled files that are cut off, which it would believe.
        return [], ["env", "PYTHONDONTWRITEBYTECODE=1", "prlimit", f"--fsize={1 << 20}"], "File too large"
    group = request.getfixturevalue("memory_group")
    config.write_text("[gateway]\narena_bytes = 390000000\n[worker]\narena_bytes = 390000000\n")
    enter = ["sh", "-c", 'echo $$ >"$0/cgroup.procs" && exec "$@"', str(group)]
    return [f"--config={config}"], enter, "does not fit into the "


def test_who_finds_no_memory_for_an_arena_sends_tensors_in_messages(
    no_arena: tuple[list[str], list[str], str], start_server: StartServer, repository: Path
) -> None:
    arguments, by, why = no_arena
    server = start_server(str(repository), *arguments, by=by)
    said = {str(line["process"]): line for line in events(server, "no shared memory")}
    assert sorted(said) == ["cpu-0", "gateway-0"]
    for line in said.values():
        assert line["level"] == "warning"
        assert why in str(line["reason"])
        assert "arena_bytes in the configuration" in str(line["reason"])
    for _ in range(3):
        assert ask_wide(server) == WIDE["x"].tobytes()
    with Client(server.runtime) as client:
        assert np.array_equal(client.infer("wide", WIDE)["y"], WIDE["x"])
    wait_for(lambda: missing(server) == {"cpu-0": 1, "gateway-0": 1}, "the metrics to say so")
    assert len(events(server, "no shared memory")) == 2, "each says it once"
    assert not any("memfd:penstock" in Path(f"/proc/{pid}/maps").read_text() for pid in server.children("gateway"))
    server.check_clean_end()  # while what limits it is still there


def ask_wide(server: Server) -> bytes:
    """The output for a large input, over HTTP."""
    head = {"name": "x", "shape": [2, 50_000], "datatype": "FP32", "parameters": {"binary_data_size": 400_000}}
    text = json.dumps({"inputs": [head], "parameters": {"binary_data_output": True}}).encode()
    length = {"Inference-Header-Content-Length": str(len(text))}
    status, _, answer = server.request("POST", "/v2/models/wide/infer", text + WIDE["x"].tobytes(), length)
    assert status == 200
    return answer[-400_000:]


def maps(pid: int) -> set[str]:
    """Whose arenas a process has mapped."""
    return set(re.findall(r"memfd:(penstock-[a-z]+-\d)", Path(f"/proc/{pid}/maps").read_text()))


def test_memory_that_comes_later_is_found_and_used(start_server: StartServer, repository: Path) -> None:
    """By processes that serve on meanwhile."""
    by = ["env", "PYTHONDONTWRITEBYTECODE=1", "prlimit", f"--fsize={1 << 20}:unlimited"]
    server = start_server(str(repository), by=by)
    with Client(server.runtime) as client:
        assert np.array_equal(client.infer("wide", WIDE)["y"], WIDE["x"])
        assert missing(server) == {"cpu-0": 1, "gateway-0": 1}
        [worker], [gateway] = server.children("worker"), server.children("gateway")
        for pid in (worker, gateway):
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

        def found() -> bool:
            assert np.array_equal(client.infer("wide", WIDE)["y"], WIDE["x"])
            return missing(server) == {"cpu-0": 0, "gateway-0": 0}

        wait_for(found, "the memory to be found")
        both = {"penstock-cpu-0", "penstock-gateway-0"}
        wait_for(lambda: both == maps(worker) == maps(gateway), "each to have mapped the other's")
        for _ in range(3):
            assert ask_wide(server) == WIDE["x"].tobytes()
            assert np.array_equal(client.infer("wide", WIDE)["y"], WIDE["x"])
    assert server.children("worker") + server.children("gateway") == [worker, gateway]
    said = [str(line["process"]) for line in events(server, "shared memory was found")]
    assert sorted(said) == ["cpu-0", "gateway-0"], "each says it once"
    assert [line for line in server.log() if line["event"].startswith("worker lost")] == []


def missing(server: Server) -> dict[str, float]:
    """Who runs jobs never has one, and comes when it comes."""
    head = 'penstock_arena_missing{process="'
    found = {name[len(head) : -2]: value for name, value in server.metrics().items() if name.startswith(head)}
    return {name: value for name, value in found.items() if name != "jobs"}


def test_a_client_that_finds_no_memory_for_an_arena_sends_tensors_in_messages(
    start_server: StartServer, repository: Path, caplog: pytest.LogCaptureFixture
) -> None:
    server = start_server(str(repository))
    assert missing(server) == {"cpu-0": 0, "gateway-0": 0}
    with caplog.at_level(logging.WARNING), Client(server.runtime, arena_bytes=1 << 50) as client:
        for _ in range(3):
            assert np.array_equal(client.infer("wide", WIDE)["y"], WIDE["x"])
    [said] = [record for record in caplog.records if record.name.startswith("penstock")]
    assert said.getMessage() == "no shared memory; inputs are sent"
