"""The units: understood by systemd, as narrow as they say, and wide enough for what runs in them."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from shutil import which
from urllib.request import Request, urlopen

import pytest

from penstock.bin.systemd import command, render
from tests.deploy import boot, confine
from tests.system.servers import Process, wait_for

EXPOSURE_MAX = 1.8
SERVICES = [
    *("penstock-broker.service", "penstock-gateway@.service", "penstock-worker@.service"),
    "penstock-jobs.service",
]
ROOT = Path(__file__).parents[2]

needs_systemd = pytest.mark.skipif(which("systemd-analyze") is None, reason="needs the Debian package systemd")


@pytest.fixture(scope="module")
def units(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with all of them, for this interpreter."""
    directory = tmp_path_factory.mktemp("etc")
    for name, text in render(command(sys.executable), Path("/srv/penstock/models"), 252).items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return directory / "systemd" / "system"


def test_there_is_a_unit_for_everything(units: Path) -> None:
    found = {path.name for path in units.iterdir()}
    assert found == {*SERVICES, "penstock.target", "penstock-gateway.socket"}
    for path in units.iterdir():
        assert not re.findall(r"@[A-Z_]+@", path.read_text())


@needs_systemd
def test_systemd_has_nothing_to_say_of_them(units: Path) -> None:
    # It ends well even when it does not know a key, so what it says counts.
    shown = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", *units.iterdir()], capture_output=True, text=True, check=False
    )
    assert (shown.returncode, shown.stdout, shown.stderr) == (0, "", "")


@needs_systemd
@pytest.mark.parametrize("device", ["cpu", "cuda:0"])
def test_a_worker_for_each_device_is_an_instance(units: Path, device: str) -> None:
    template = units / "penstock-worker@.service"
    command = ["systemd-analyze", "verify", "--man=no", f"{template}:penstock-worker@{device}.service"]
    shown = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (shown.returncode, shown.stdout, shown.stderr) == (0, "", "")
    assert " --name %i --device %i " in template.read_text()


def test_a_worker_may_use_gpus_and_no_other_service_does(units: Path) -> None:
    """char-nvidia*: the names in /proc/devices are nvidia or nvidia-frontend, nvidia-uvm and nvidia-caps."""
    allowed = {name: re.findall(r"^DeviceAllow=(.*)$", (units / name).read_text(), re.M) for name in SERVICES}
    assert allowed.pop("penstock-worker@.service") == ["char-nvidia* rw"]
    assert set(map(tuple, allowed.values())) == {()}


@needs_systemd
@pytest.mark.parametrize("service", SERVICES)
def test_little_is_exposed(units: Path, service: str) -> None:
    shown = subprocess.run(
        ["systemd-analyze", "security", "--offline=true", units / service], capture_output=True, text=True, check=True
    ).stdout
    match = re.search(r"Overall exposure level for \S+: ([\d.]+)", shown)
    assert match is not None
    assert float(match[1]) <= EXPOSURE_MAX


def test_services_are_confined_alike(units: Path) -> None:
    """But for devices, the network and home directories, of which each needs another part."""
    own = ("Device", "PrivateDevices", "ProtectHome", "IPAddress", "#")
    parts = []
    for service in SERVICES:
        lines = (units / service).read_text().partition("# What it may do")[2].partition("[Install]")[0].splitlines()
        parts.append([line for line in lines[1:] if line and not line.startswith(own)])
    assert parts == parts[:1] * len(SERVICES)


def test_who_takes_jobs_in_and_who_runs_them_have_the_same_store(units: Path) -> None:
    for service in ("penstock-gateway@.service", "penstock-jobs.service"):
        text = (units / service).read_text()
        assert re.findall(r"^StateDirectory(?:Mode)?=.*$", text, re.M) == [
            "StateDirectory=penstock",
            "StateDirectoryMode=0700",
        ]


# --- under the filter of its unit, each process does its work ---


@pytest.fixture
def start(units: Path) -> Iterator[Callable[..., Process]]:
    """``start(unit, arguments...)``: the process of a unit, under what the unit allows it."""
    started: list[Process] = []

    def run(unit: str, *arguments: str) -> Process:
        by = [sys.executable, str(Path(confine.__file__)), str(units / unit)]
        started.append(Process(arguments, by=by))
        return started[-1]

    yield run
    for process in reversed(started):
        assert process.end() == 0, process.errors


@needs_systemd
def test_every_process_works_under_the_system_call_filter_of_its_unit(
    start: Callable[..., Process], tmp_path: Path
) -> None:
    runtime = f"--runtime-dir={tmp_path / 'run'}"
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    processes = [
        start("penstock-broker.service", "broker", runtime),
        start("penstock-worker@.service", "worker", runtime, "--name=cpu"),
        start("penstock-gateway@.service", "gateway", runtime, f"--http=127.0.0.1:{port}"),
        start("penstock-jobs.service", "jobs", "run", runtime),
    ]
    url = f"http://127.0.0.1:{port}/v2"

    def ready() -> bool:
        for process in processes:
            assert process.process.poll() is None, process.errors
        try:
            return bool(urlopen(f"{url}/health/ready", timeout=10).status == 200)
        except OSError:
            return False

    wait_for(ready, "a server that is ready")
    seven = Request(f"{url}/models/digits/infer", (ROOT / "examples/digits/seven.json").read_bytes())
    with urlopen(seven, timeout=10) as answer:
        scores = json.load(answer)["outputs"][0]["data"]
    assert scores.index(max(scores)) == 7
    seven.add_header("Prefer", "respond-async")
    with urlopen(seven, timeout=10) as answer:
        job = f"http://127.0.0.1:{port}{answer.headers['Location']}"
    with urlopen(f"{job}?wait=30", timeout=40) as answer:
        assert json.load(answer)["result"]["outputs"][0]["data"] == scores


@needs_systemd
def test_the_filter_is_one(units: Path) -> None:
    """What keeps the test above from meaning nothing: under the same filter, something else is refused."""
    code = "import os\ntry:\n    os.setgroups([])\nexcept OSError as error:\n    print(error.errno)"
    shown = subprocess.run(
        [
            sys.executable,
            confine.__file__,
            units / SERVICES[0],
            sys.executable,
            "-c",
            code.replace("setgroups([])", "chroot('/')"),
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    assert shown.stdout.strip() == "1"
    assert "keyctl" not in confine.allowed((units / SERVICES[0]).read_text())


# --- the watchdog ---


@pytest.mark.parametrize("role", ["broker", "gateway", "worker", "jobs"])
def test_an_idle_process_without_peers_feeds_its_watchdog(tmp_path: Path, role: str) -> None:
    """And says that it is ready, which waits for nobody."""
    arguments = {"broker": [], "gateway": ["--http=127.0.0.1:0"], "worker": [], "jobs": []}[role]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as supervisor:
        supervisor.bind(str(tmp_path / "notify"))
        supervisor.settimeout(30)
        asked = {"NOTIFY_SOCKET": str(tmp_path / "notify"), "WATCHDOG_USEC": "600000"}
        command = ["jobs", "run"] if role == "jobs" else [role]
        process = Process([*command, f"--runtime-dir={tmp_path / 'run'}", *arguments], asked)
        try:
            said: list[bytes] = []
            while said.count(b"WATCHDOG=1") < 4 or b"READY=1" not in said:
                said.append(supervisor.recv(100))
        finally:
            assert process.end() == 0
    assert set(said) <= {b"READY=1", b"WATCHDOG=1"}


# --- under a real systemd ---


def why_no_manager() -> str:
    """Why a user's manager cannot be had here, or ""."""
    if not boot.MANAGER.exists():
        return "needs the Debian package systemd"
    if os.geteuid() != 0:
        return "needs root, for a /run of its own"
    tried = subprocess.run(
        ["unshare", "--mount", "mount", "-t", "tmpfs", "tmpfs", "/run"], capture_output=True, check=False
    )
    return "" if tried.returncode == 0 else "may not mount anything here"


@pytest.mark.skipif(bool(why_no_manager()), reason=why_no_manager())
def test_systemd_starts_watches_and_stops_them(tmp_path: Path) -> None:
    """Also after a kill -9, and after a hang that only the watchdog sees; one gateway stands in for the other. Then
    they are installed as for a system."""
    command = ["unshare", "--mount", "--propagation", "private", sys.executable, boot.__file__, str(tmp_path)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, timeout=110)
    manager = tmp_path / "manager.log"
    assert ended.returncode == 0, ended.stderr + (manager.read_text() if manager.exists() else "")
    told = json.loads(ended.stdout)
    assert told.pop("installed") == {
        "said": "now: systemctl enable --now penstock.target penstock-gateway@1 penstock-worker@cpu",
        "started by": [f"/srv/python/bin/{boot.PYTHON}"],
        "may log in": False,
        "owned": True,
    }
    assert set(told.pop("active").values()) == {"active"}
    assert set(told.pop("results").values()) == {"success"}
    assert told.pop("restarted") == list(boot.ROLLED)
    assert told.pop("while restarted") == [7]
    assert told == {
        "answer": 7,
        "after a kill": 7,
        "after a hang": 7,
        "a job from before": 7,
        "with one gateway": 7,
        "left": [],
    }
