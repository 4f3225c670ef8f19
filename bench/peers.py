"""Penstock beside other servers on the same machine: ``python bench/peers.py``.

Installs each server of peerlist.py from PyPI into an environment of its own, kept in the user's cache directory for the
next time. For each model it starts all of them, Penstock too, checks one answer of each against ONNX Runtime's own, and
drives them with wrk (Debian package ``wrk``) in turns: in each round each server once at each number of connections, in
another order each round. A server that uses more than 5 % of a core while nobody asks it anything is held up (SIGSTOP)
while it is not its turn, so that this costs the others nothing; the rest run on, for some take such a pause for time
that their work took. Processor time is that of all processes of a server, user and system, over its requests; wrk's is
not in it. Medians of the rounds go to standard output as a table, to a JSON file, and to a text file and a plot beside
that.

A server that cannot be installed, does not start or answers wrongly is in the table with the reason. tritonserver needs
libpython of the version of Python that runs this (Debian: ``libpython3.11``); the other servers need nothing.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":  # this folder comes first then, and http.py would pass for the standard library's
    sys.path[0] = str(Path(__file__).parents[1])

import argparse
import hashlib
import json
import os
import platform
import shutil
import signal
import statistics
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from socket import create_server, socket
from typing import Any, Final

import numpy as np
import onnxruntime

from bench import http as bench_http
from bench import models as bench_models
from bench import peertell, processes
from bench.peer_servers.session import open_session
from bench.peerlist import PEERS, PORTS, V2_BINARY, Array, Peer, Place, Request, read_answer, request_of, variables_of
from bench.peertell import OWN

INSTALL_MAX_S: Final = 1200.0
START_MAX_S: Final = 120.0  # until the first answer
SETTLE_S: Final = 2.0  # after the first answers, before servers are watched for
IDLE_S: Final = 5.0  # while they are idle
IDLE_MAX_PERCENT: Final = 5.0  # of a core; who uses more is held up when it is not its turn
BACK_MAX_S: Final = 20.0  # until it answers again then
WARM_UP_S: Final = 1  # before each measurement, at the same number of connections
_ASK_MAX_S: Final = 10.0
_LOOK_S: Final = 0.1
_REASON_MAX: Final = 200  # characters
_DONE: Final = "installed.txt"  # in an environment that is complete: what is in it


class PeerError(Exception):
    """Why a server is not measured."""


@dataclass(frozen=True)
class Turn:
    """One measurement, or the medians of several."""

    requests_per_s: float
    p50_ms: float
    p99_ms: float
    cpu_us: float
    errors: int


@dataclass(frozen=True)
class Running:
    """A server that runs and has answered rightly. ``root``: the process that started all others of it. ``busy``: while
    idle."""

    key: str
    url: str
    root: int
    request: Request
    script: Path
    busy: bool = False


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
            yield Running(OWN, server.url, server.pid, request, script)
        finally:
            processes.go_on(server.pid)  # one that is held up would not end


def free_ports(count: int) -> tuple[int, ...]:
    with ExitStack() as stack:
        sockets: list[socket] = [stack.enter_context(create_server(("127.0.0.1", 0))) for _ in range(count)]
        return tuple(each.getsockname()[1] for each in sockets)


# --- measuring


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


def measure(server: Running, connections: Sequence[int], seconds: int) -> Iterator[tuple[int, Turn]]:
    """A server's turn, at each number of connections. Raises PeerError when it is gone."""
    if server.busy:
        processes.go_on(server.root)
    try:
        _wait_until_back(server)
        for count in connections:
            bench_http.run_wrk(server.url, server.script, count, WARM_UP_S)
            before = processes.cpu_s(processes.of(server.root))
            requests, rate, p50_ms, p99_ms, errors = bench_http.run_wrk(server.url, server.script, count, seconds)
            used = processes.cpu_s(processes.of(server.root)) - before
            if not requests:
                raise PeerError(f"answered nothing in {seconds} s at {count} connections")
            yield count, Turn(rate, p50_ms, p99_ms, used / requests * 1e6, errors)
    except subprocess.CalledProcessError as error:
        raise PeerError("cannot be reached any more: " + last_line(error.stderr or error.stdout)) from error
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


def medians(turns: Sequence[Turn]) -> Turn:
    by_name = {name: [asdict(turn)[name] for turn in turns] for name in asdict(turns[0])}
    return Turn(
        **{name: statistics.median(values) for name, values in by_name.items()} | {"errors": sum(by_name["errors"])}
    )


def in_turns(
    servers: Sequence[Running], connections: Sequence[int], seconds: int, repeats: int, say: Callable[[str], None]
) -> tuple[dict[tuple[str, int], list[Turn]], dict[str, str]]:
    """Turns by server and number of connections, and why a server dropped out."""
    turns: dict[tuple[str, int], list[Turn]] = {}
    lost: dict[str, str] = {}
    for number in range(repeats):
        # Another order each time: what one leaves behind in caches and clocks meets another one.
        at = number * max(1, len(servers) // max(1, repeats)) % max(1, len(servers))
        for server in (*servers[at:], *servers[:at]):
            if server.key in lost:
                continue
            try:
                for count, turn in measure(server, connections, seconds):
                    turns.setdefault((server.key, count), []).append(turn)
                    say(f"{server.key}, {count} connections: {turn.requests_per_s:.0f}/s, {turn.cpu_us:.0f} us")
            except PeerError as error:
                lost[server.key] = str(error)
    return turns, lost


# --- all of it


def _stop(number: int, frame: object) -> None:
    """Once: all servers are ended then, and that is not to be interrupted."""
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, signal.SIG_IGN)
    sys.exit("bench: stopped; no results are written")


def measure_model(
    model: str, environments: Mapping[str, Path], directory: Path, arguments: argparse.Namespace
) -> tuple[list[dict[str, Any]], list[dict[str, Any]], dict[str, float]]:
    """Rows of the table, what could not be measured, and what each server uses while idle, in percent of a core."""
    repository = bench_models.make_repository(directory / model / "repository", [model])
    expected = expected_answer(repository, model)
    why: dict[str, str] = {}
    with ExitStack() as stack:
        servers = [stack.enter_context(running_penstock(repository, directory / model / OWN, model, expected))]
        for key, environment in environments.items():
            place = Place(environment, directory / model / key, repository, model, free_ports(PORTS))
            print(f"{model}: starting {peertell.title_of(key)}", file=sys.stderr)
            try:
                servers.append(stack.enter_context(running(key, PEERS[key], place, expected)))
            except PeerError as error:
                why[key] = str(error)
                print(f"{model}: {key}: {error}", file=sys.stderr)
        idle = idle_percents(servers)
        servers = [replace(server, busy=idle[server.key] > IDLE_MAX_PERCENT) for server in servers]
        for server in servers:
            if server.busy:
                print(f"{model}: {server.key} uses {idle[server.key]:.0f} % of a core while idle", file=sys.stderr)
                processes.hold(server.root)
        turns, lost = in_turns(
            servers,
            arguments.connections,
            arguments.seconds,
            arguments.repeats,
            lambda text: print(f"{model}: {text}", file=sys.stderr),
        )
    rows = [
        {"server": key, "model": model, "connections": count, **asdict(medians(each)), "turns": len(each)}
        for (key, count), each in turns.items()
    ]
    return rows, [{"server": key, "model": model, "why": each} for key, each in (why | lost).items()], idle


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    peers, models = list(PEERS), bench_models.MODELS
    parser.add_argument("--peers", type=bench_http.words(peers), default=",".join(peers), help=f"of {', '.join(peers)}")
    parser.add_argument("--models", type=bench_http.words(models), default="tiny,mlp,image", help=", ".join(models))
    parser.add_argument("--connections", type=bench_http.whole_numbers, default="1,16,64")
    parser.add_argument("--seconds", type=bench_http.whole_number, default=4, help="for each run; wrk takes whole ones")
    parser.add_argument("--repeats", type=bench_http.whole_number, default=3)
    parser.add_argument("--environments", type=Path, default=default_environments(), help="where they are installed")
    parser.add_argument("--out", type=Path, default=bench_http.RESULTS / "peers.json")
    arguments = parser.parse_args()
    if shutil.which("wrk") is None:
        sys.exit("bench: wrk is missing; on Debian and Ubuntu: apt install wrk")
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, _stop)
    environments: dict[str, Path] = {}
    rows: list[dict[str, Any]] = []
    failed: list[dict[str, Any]] = []
    idle: dict[str, dict[str, float]] = {}
    for key in arguments.peers:
        try:
            environments[key] = install(PEERS[key], arguments.environments.absolute())
        except PeerError as error:
            print(f"{key}: {error}", file=sys.stderr)
            failed.append({"server": key, "model": "all", "why": str(error)})
    with tempfile.TemporaryDirectory(prefix="penstock-bench-", ignore_cleanup_errors=True) as name:
        for model in arguments.models:
            more_rows, more_failed, idle[model] = measure_model(model, environments, Path(name), arguments)
            rows += more_rows
            failed += more_failed
    content = {
        "machine": bench_http.about_machine(),
        "seconds": arguments.seconds,
        "repeats": arguments.repeats,
        "peers": arguments.peers,
        "cases": rows,
        "failed": failed,
        "idle_percent": idle,
        "installed": {key: (path / _DONE).read_text().splitlines() for key, path in environments.items()},
    }
    text = "\n".join(peertell.tell(content)) + "\n"
    print(text, end="")
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(content, indent=1) + "\n")
    arguments.out.with_suffix(".txt").write_text(text)
    if rows and not peertell.draw(content, arguments.out.with_suffix(".png")):
        print("bench: no plot, matplotlib is missing; pip install 'penstock[report]'", file=sys.stderr)


if __name__ == "__main__":
    main()
