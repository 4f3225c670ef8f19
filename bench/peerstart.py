"""Installing, starting and checking the servers of peerlist.py, and Penstock beside them, for who measures them."""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from socket import create_server, socket
from typing import Any, Final

import numpy as np
import onnxruntime

from bench import http as bench_http
from bench import models as bench_models
from bench import processes
from bench.peer_servers.session import open_session
from bench.peerlist import (
    PEERS,
    PORTS,
    V2_BINARY,
    Array,
    Peer,
    Place,
    Request,
    read_answer,
    request_of,
    variables_of,
)
from bench.peertell import OWN, title_of

INSTALL_MAX_S: Final = 1200.0
START_MAX_S: Final = 120.0  # until the first answer
SETTLE_S: Final = 2.0  # after the first answers, before servers are watched for
IDLE_S: Final = 5.0  # while they are idle
IDLE_MAX_PERCENT: Final = 5.0  # of a core; who uses more is held up when it is not its turn
BACK_MAX_S: Final = 20.0  # until it answers again then
_ASK_MAX_S: Final = 10.0
_LOOK_S: Final = 0.1
_REASON_MAX: Final = 200  # characters
_DONE: Final = "installed.txt"  # in an environment that is complete: what is in it


class PeerError(Exception):
    """Why a server is not measured."""


@dataclass(frozen=True)
class Running:
    """A server that runs and has answered rightly. ``root``: the process that started all others of it. ``busy``: while
    idle. ``kinds``: of processes, where they are known."""

    key: str
    url: str
    root: int
    request: Request
    script: Path
    busy: bool = False
    kinds: Mapping[int, str] = field(default_factory=dict)


# --- installing


def environment_of(peer: Peer, environments: Path) -> Path:
    """Servers of the same packages share one; another version of anything is another one."""
    said = "\n".join((*requirements(peer), platform.python_version(), platform.machine()))
    name, _, version = peer.packages[0].partition("==")
    return environments / f"{name.partition('[')[0]}-{version}-{hashlib.sha256(said.encode()).hexdigest()[:8]}"


def requirements(peer: Peer) -> list[str]:
    return [*peer.packages, f"onnxruntime=={onnxruntime.__version__}"]


def install(peer: Peer, environments: Path) -> Path:
    """The environment, made if it is not there yet. Raises PeerError."""
    environment = environment_of(peer, environments)
    if (environment / _DONE).is_file():
        return environment
    print(f"installing {' '.join(requirements(peer))} into {environment}", file=sys.stderr)
    shutil.rmtree(environment, ignore_errors=True)
    environment.parent.mkdir(parents=True, exist_ok=True)
    pip = [str(environment / "bin" / "python"), "-m", "pip", "--disable-pip-version-check"]
    _run([sys.executable, "-m", "venv", str(environment)])
    _run([*pip, "install", "--quiet", *requirements(peer)])
    (environment / _DONE).write_text(_run([*pip, "freeze"]))
    return environment


def _run(command: Sequence[str]) -> str:
    """What it prints. Raises PeerError."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=INSTALL_MAX_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise PeerError(f"not installed: {error}"[:_REASON_MAX]) from error
    if done.returncode:
        raise PeerError("not installed: " + last_line(done.stderr))
    return done.stdout


def last_line(text: str) -> str:
    """What a program that failed said last, short enough for a table: an error before anything else."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if "error" in line.lower()]
    return (errors or lines or ["it said nothing"])[-1].replace("|", "/")[:_REASON_MAX]


def install_all(keys: Sequence[str], environments: Path) -> tuple[dict[str, Path], dict[str, str]]:
    """The environments, and why servers have none."""
    found: dict[str, Path] = {}
    why: dict[str, str] = {}
    for key in keys:
        try:
            found[key] = install(PEERS[key], environments)
        except PeerError as error:
            print(f"{key}: {error}", file=sys.stderr)
            why[key] = str(error)
    return found, why


def packages_of(environment: Path) -> list[str]:
    """With their versions, as pip says them."""
    return (environment / _DONE).read_text().splitlines()


def default_environments() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "penstock-bench"


# --- starting


def expected_answer(repository: Path, model: str) -> Array:
    session = open_session(str(repository / model / "1" / "model.onnx"))
    y: Array = session.run(None, bench_models.sample(model, 1))[0]
    return y.ravel()


def ask(url: str, request: Request) -> tuple[Mapping[str, str], bytes]:
    """Headers and body of the answer. Raises OSError."""
    asked = urllib.request.Request(url + request.path, request.body, dict(request.headers), method="POST")
    with urllib.request.urlopen(asked, timeout=_ASK_MAX_S) as answer:
        return answer.headers, answer.read()


def check_answer(protocol: str, headers: Mapping[str, str], body: bytes, expected: Array) -> None:
    """Raises PeerError unless it is what ONNX Runtime says, as far as six digits of a row can be."""
    try:
        found = read_answer(protocol, headers, body)
    except (ValueError, KeyError, TypeError) as error:
        raise PeerError(f"answers with something else: {body[:80]!r}") from error
    if found.shape != expected.shape or not np.allclose(found, expected, rtol=1e-3, atol=1e-3):
        raise PeerError("answers wrongly")


def wait_for_answer(process: subprocess.Popen[bytes], url: str, request: Request, log: Path) -> Any:
    """Raises PeerError when none comes."""
    until = time.monotonic() + START_MAX_S
    while True:
        try:
            return ask(url, request)
        except OSError as error:  # not there yet, or HTTPError: it says that it is not ready
            said = f"{error} {error.read()[:100]!r}" if isinstance(error, urllib.error.HTTPError) else str(error)
        if process.poll() is not None:
            raise PeerError(f"ended at its start: {last_line(log.read_text(errors='replace'))}")
        if time.monotonic() > until:
            raise PeerError(f"no answer within {START_MAX_S:.0f} s: {said}"[:_REASON_MAX])
        time.sleep(_LOOK_S)


@contextmanager
def running(key: str, peer: Peer, place: Place, expected: Array) -> Iterator[Running]:
    """Raises PeerError when it does not start or answers wrongly. Whatever was started is ended."""
    place.directory.mkdir(parents=True)
    log = place.directory / "log.txt"
    try:
        command, variables = peer.start(place)
        with open(log, "wb") as output:
            process = subprocess.Popen(
                command,
                cwd=place.directory,
                env={**os.environ, **variables_of(place), **variables},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
    except (OSError, ValueError) as error:  # what its package has on other systems, or for other versions of Python
        raise PeerError(f"cannot be started: {error}"[:_REASON_MAX]) from error
    try:
        url = f"http://127.0.0.1:{place.ports[0]}"
        request = request_of(peer.protocol, peer.path, place.model)
        headers, body = wait_for_answer(process, url, request, log)
        check_answer(peer.protocol, headers, body, expected)
        script = bench_http.write_post(place.directory / "ask.lua", *request)
        yield Running(key, url, process.pid, request, script)
    finally:
        processes.end(process)


@contextmanager
def running_penstock(repository: Path, directory: Path, model: str, expected: Array) -> Iterator[Running]:
    directory.mkdir(parents=True)
    with bench_http.Server(repository, directory / "run") as server:
        try:
            request = request_of(V2_BINARY, "/v2/models/MODEL/infer", model)
            check_answer(V2_BINARY, *ask(server.url, request), expected)
            script = bench_http.write_post(directory / "ask.lua", *request)
            kinds = {pid: role for role, pids in server.pids.items() for pid in pids}
            yield Running(OWN, server.url, server.pid, request, script, kinds=kinds)
        finally:
            processes.go_on(server.pid)  # one that is held up would not end


def start_all(
    stack: ExitStack, environments: Mapping[str, Path], directory: Path, repository: Path, model: str, expected: Array
) -> tuple[list[Running], dict[str, str]]:
    """Penstock and the others, until the stack is closed; and why some do not run. Each has a directory of its own."""
    servers = [stack.enter_context(running_penstock(repository, directory / OWN, model, expected))]
    why: dict[str, str] = {}
    for key, environment in environments.items():
        place = Place(environment, directory / key, repository, model, free_ports(PORTS))
        print(f"{model}: starting {title_of(key)}", file=sys.stderr)
        try:
            servers.append(stack.enter_context(running(key, PEERS[key], place, expected)))
        except PeerError as error:
            why[key] = str(error)
            print(f"{model}: {key}: {error}", file=sys.stderr)
    return servers, why


def free_ports(count: int) -> tuple[int, ...]:
    with ExitStack() as stack:
        sockets: list[socket] = [stack.enter_context(create_server(("127.0.0.1", 0))) for _ in range(count)]
        return tuple(each.getsockname()[1] for each in sockets)


# --- between turns


def idle_percents(servers: Sequence[Running]) -> dict[str, float]:
    """What each uses of a core while none is asked anything."""
    time.sleep(SETTLE_S)
    before = {server.key: processes.cpu_s(processes.of(server.root)) for server in servers}
    begin = time.monotonic()
    time.sleep(IDLE_S)
    elapsed = time.monotonic() - begin
    return {
        server.key: (processes.cpu_s(processes.of(server.root)) - before[server.key]) / elapsed * 100
        for server in servers
    }


def hold_busy(servers: Sequence[Running], idle: Mapping[str, float]) -> list[Running]:
    """The same servers, with what they do while idle; those that do too much are held up until their turns."""
    servers = [replace(server, busy=idle[server.key] > IDLE_MAX_PERCENT) for server in servers]
    for server in servers:
        if server.busy:
            print(f"{server.key} uses {idle[server.key]:.0f} % of a core while idle", file=sys.stderr)
            processes.hold(server.root)
    return servers


@contextmanager
def running_on(server: Running) -> Iterator[None]:
    """A server's turn: it runs, and has answered. Raises PeerError when it is gone."""
    if server.busy:
        processes.go_on(server.root)
    try:
        _wait_until_back(server)
        yield
    finally:
        if server.busy:
            processes.hold(server.root)


def _wait_until_back(server: Running) -> None:
    """Raises PeerError."""
    until = time.monotonic() + BACK_MAX_S
    while True:
        try:
            ask(server.url, server.request)
            return
        except OSError as error:
            if time.monotonic() > until:
                raise PeerError(f"does not answer any more: {error}"[:_REASON_MAX]) from error
        time.sleep(_LOOK_S)


def in_order(servers: Sequence[Running], number: int, rounds: int) -> list[Running]:
    """Of a round: another order each time, so that what one leaves behind in caches and clocks meets another one."""
    at = number * max(1, len(servers) // max(1, rounds)) % max(1, len(servers))
    return [*servers[at:], *servers[:at]]


def end_once_when_stopped() -> None:
    """On Ctrl-C and SIGTERM."""
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, _stop)


def _stop(number: int, frame: object) -> None:
    """Once: all servers are ended then, and that is not to be interrupted."""
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, signal.SIG_IGN)
    sys.exit("bench: stopped; no results are written")
