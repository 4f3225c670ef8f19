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
import json
import shutil
import statistics
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any, Final

from bench import http as bench_http
from bench import models as bench_models
from bench import peertell, processes
from bench.peerlist import PEERS
from bench.peerstart import (
    PeerError,
    Running,
    default_environments,
    end_once_when_stopped,
    expected_answer,
    hold_busy,
    idle_percents,
    in_order,
    install_all,
    last_line,
    packages_of,
    running_on,
    start_all,
)

WARM_UP_S: Final = 1  # before each measurement, at the same number of connections


@dataclass(frozen=True)
class Turn:
    """One measurement, or the medians of several."""

    requests_per_s: float
    p50_ms: float
    p99_ms: float
    cpu_us: float
    errors: int


# --- measuring


def measure(server: Running, connections: Sequence[int], seconds: int) -> Iterator[tuple[int, Turn]]:
    """A server's turn, at each number of connections. Raises PeerError when it is gone."""
    with running_on(server):
        try:
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
        for server in in_order(servers, number, repeats):
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


def measure_model(
    model: str, environments: Mapping[str, Path], directory: Path, arguments: argparse.Namespace
) -> tuple[list[dict[str, Any]], list[dict[str, Any]], dict[str, float]]:
    """Rows of the table, what could not be measured, and what each server uses while idle, in percent of a core."""
    repository = bench_models.make_repository(directory / model / "repository", [model])
    expected = expected_answer(repository, model)
    with ExitStack() as stack:
        servers, why = start_all(stack, environments, directory / model, repository, model, expected)
        idle = idle_percents(servers)
        servers = hold_busy(servers, idle)
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
    end_once_when_stopped()
    rows: list[dict[str, Any]] = []
    idle: dict[str, dict[str, float]] = {}
    environments, why = install_all(arguments.peers, arguments.environments.absolute())
    failed = [{"server": key, "model": "all", "why": each} for key, each in why.items()]
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
        "installed": {key: packages_of(path) for key, path in environments.items()},
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
