"""Boots the units under a real systemd, a user's manager: ``python boot.py DIRECTORY``, as root in a mount namespace.

The manager has a /run of its own. A drop-in takes back what belongs to the system's manager alone: the user, hiding
what lies below /home and /tmp, where a checkout may be, and parts of /proc and /dev that a container has not. What is
found out goes to standard output as JSON.
"""

from __future__ import annotations

import json
import os
import pwd
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any
from urllib.request import Request, urlopen

from penstock.bin.systemd import command, render

ROOT = Path(__file__).parents[2]
PYTHON = f"python{sys.version_info[0]}.{sys.version_info[1]}"
UNITS = ("penstock.target", "penstock-gateway@1", "penstock-gateway@2", "penstock-worker@cpu")
ROLLED = ("penstock-gateway@1", "penstock-gateway@2", "penstock-worker@cpu")
SERVICES = ("penstock-broker", "penstock-gateway@1", "penstock-gateway@2", "penstock-jobs", "penstock-worker@cpu")
MANAGER = Path("/lib/systemd/systemd")
PATIENCE_S = 30.0
DROP_IN = """[Service]
User=
Group=
PrivateTmp=no
ProtectHome=no
ProtectKernelLogs=no
ProtectKernelTunables=no
WatchdogSec=2s
Environment=PENSTOCK_MODELS={models}
"""


def wait_for(condition: Callable[[], Any], what: str) -> Any:
    """What ``condition`` returns as soon as it is true; it is asked again and again, as tests.system.servers does."""
    until = time.monotonic() + PATIENCE_S
    tick = threading.Event()
    while not (value := condition()):
        if time.monotonic() > until:
            raise TimeoutError(f"waited in vain for {what}\n" + control("status", "penstock*", check=False))
        tick.wait(0.05)
    return value


def control(*arguments: str, check: bool = True) -> str:
    run = subprocess.run(["systemctl", "--user", "--no-pager", *arguments], capture_output=True, text=True, check=False)
    if check and run.returncode:
        raise RuntimeError(
            f"systemctl {' '.join(arguments)}: {run.stderr}{control('status', 'penstock*', check=False)}"
        )
    return run.stdout


def shown(unit: str, name: str) -> str:
    return control("show", unit, f"--property={name}", "--value").strip()


def install(config: Path) -> int:
    """The units and their drop-ins. Returns the port of HTTP."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port: int = free.getsockname()[1]
    units = config / "systemd" / "user"
    units.mkdir(parents=True)
    for name, text in render(command(sys.executable), ROOT / "bin" / "models", 252).items():
        if name.startswith("systemd/system/"):
            (units / Path(name).name).write_text(text)
    for kind in ("broker", "gateway@", "jobs", "worker@"):
        service = f"penstock-{kind}.service"
        (units / f"{service}.d").mkdir()
        (units / f"{service}.d" / "test.conf").write_text(DROP_IN.format(models=ROOT / "bin" / "models"))
    (units / "penstock-gateway.socket.d").mkdir()
    listen = f"[Socket]\nListenStream=\nListenStream=127.0.0.1:{port}\n"
    (units / "penstock-gateway.socket.d" / "test.conf").write_text(listen)
    return port


def main() -> None:
    directory = Path(sys.argv[1])
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", "/run"], check=True)
    Path("/run/systemd/system").mkdir(parents=True)  # by which a manager sees that there is a systemd
    Path("/run/penstock").mkdir(mode=0o700)
    runtime = Path("/run/user/0")
    runtime.mkdir(parents=True, mode=0o700)
    os.environ |= {
        "XDG_RUNTIME_DIR": str(runtime),
        "XDG_CONFIG_HOME": str(directory / "config"),
        "XDG_CACHE_HOME": str(directory / "cache"),
        "XDG_STATE_HOME": str(directory / "state"),
        "HOME": str(directory),
    }
    url = f"http://127.0.0.1:{install(directory / 'config')}/v2"
    with (directory / "manager.log").open("wb") as log:
        manager = subprocess.Popen([str(MANAGER), "--user", "--log-target=console"], stdout=log, stderr=log)
    try:
        wait_for(lambda: (runtime / "systemd" / "private").exists(), "the manager")
        print(json.dumps({**boot(url), "installed": install_below_etc(directory, runtime)}))
    finally:
        control("stop", "penstock.target", check=False)
        manager.send_signal(signal.SIGTERM)
        manager.wait(PATIENCE_S)


def install_below_etc(directory: Path, runtime: Path) -> dict[str, Any]:
    """``penstock systemd --install`` as a user types it, below a copy of /etc, where the manager is the system's."""
    shutil.copytree("/etc", directory / "etc", symlinks=True)
    subprocess.run(["mount", "--bind", directory / "etc", "/etc"], check=True)
    # Where services can see it; the tests' own interpreter may lie anywhere.
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", "/srv"], check=True)
    python = Path("/srv/python")
    python.mkdir()
    subprocess.run(["mount", "--bind", sys.base_prefix, python], check=True)
    Path("/run/systemd/private").symlink_to(runtime / "systemd" / "private")
    ended = subprocess.run(
        [python / "bin" / PYTHON, "-m", "penstock.bin", "systemd", "--install", "--models", "/srv/models"],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT / "namespace"), *sys.path[1:]])},
        capture_output=True,
        text=True,
        check=False,
    )
    if ended.returncode:
        raise RuntimeError(ended.stdout + ended.stderr)
    user = pwd.getpwnam("penstock")
    found = Path("/run/penstock").stat()
    return {
        "said": ended.stdout.splitlines()[-1],
        "started by": re.findall(r"ExecStart=(\S+)", Path("/etc/systemd/system/penstock-broker.service").read_text()),
        "may log in": not user.pw_shell.endswith("nologin"),
        "owned": (found.st_uid, found.st_gid, found.st_mode & 0o777) == (user.pw_uid, user.pw_gid, 0o700),
    }


def boot(url: str) -> dict[str, Any]:
    control("enable", "--now", *UNITS)
    wait_for(lambda: is_ready(url), "a server that is ready")
    told: dict[str, Any] = {
        "active": {each: shown(each, "ActiveState") for each in SERVICES},
        "answer": infer(url),
    }
    # One after another, as docs/deploy.md says, while somebody asks all the time: nobody notices.
    pids = {each: shown(each, "MainPID") for each in ROLLED}
    with Asking(url) as asking:
        for each in ROLLED:
            control("restart", each)
            wait_for(asking.more(5), "answers after a restart")
    told["while restarted"] = sorted(set(asking.answers), key=str)
    told["restarted"] = [each for each in ROLLED if shown(each, "MainPID") not in ("0", pids[each])]
    job = defer(url)
    # Killed: systemd starts it again, and the server serves again.
    before = shown("penstock-worker@cpu", "MainPID")
    os.kill(int(before), signal.SIGKILL)
    wait_for(lambda: shown("penstock-worker@cpu", "MainPID") not in ("0", before), "another worker")
    wait_for(lambda: is_ready(url), "a server with another worker")
    told["after a kill"] = infer(url)
    # Stopped: its loop does not turn any more, which the watchdog sees.
    before = shown("penstock-broker", "MainPID")
    os.kill(int(before), signal.SIGSTOP)
    wait_for(lambda: shown("penstock-broker", "MainPID") not in ("0", before), "another broker")
    wait_for(lambda: is_ready(url), "a server with another broker")
    told["after a hang"] = infer(url)
    told["a job from before"] = digit_of(urlopen(f"{url}/jobs/{job}/result?wait=30", timeout=40))
    # One gateway goes, and the other has the same socket.
    control("stop", "penstock-gateway@1")
    told["with one gateway"] = infer(url)
    control("stop", "penstock.target")
    wait_for(lambda: all(shown(each, "ActiveState") != "active" for each in SERVICES), "the end")
    told["results"] = {each: shown(each, "Result") for each in SERVICES}
    told["left"] = sorted(path.name for path in Path("/run/penstock").iterdir() if path.suffix == ".sock")
    return told


class Asking:
    """A thread that asks again and again. ``answers``: digits, and what went wrong."""

    def __init__(self, url: str) -> None:
        self.answers: list[int | str] = []
        self._url = url
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                self.answers.append(infer(self._url))
            except OSError as error:
                self.answers.append(str(error))

    def more(self, count: int) -> Callable[[], bool]:
        """Whether so many answers have come since."""
        before = len(self.answers)
        return lambda: len(self.answers) > before + count

    def __enter__(self) -> Asking:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(PATIENCE_S)


def is_ready(url: str) -> bool:
    try:
        with urlopen(f"{url}/health/ready", timeout=10) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def infer(url: str) -> int:
    """Which digit the bundled model sees in its example."""
    request = Request(f"{url}/models/digits/infer", (ROOT / "examples/digits/seven.json").read_bytes())
    with urlopen(request, timeout=10) as answer:
        return digit_of(answer)


def digit_of(answer: IO[bytes]) -> int:
    scores = json.load(answer)["outputs"][0]["data"]
    return int(scores.index(max(scores)))


def defer(url: str) -> str:
    """A job that asks the same: its id."""
    body = (ROOT / "examples/digits/seven.json").read_bytes()
    with urlopen(Request(f"{url}/models/digits/infer", body, {"Prefer": "respond-async"}), timeout=10) as answer:
        return str(json.load(answer)["id"])


if __name__ == "__main__":
    main()
