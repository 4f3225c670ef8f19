"""What a request costs the processes of two versions of this server, in paired runs:
``python bench/versions.py before=PATH [now=PATH]``, where a path is that of a checkout.

Each round starts a server of each version anew, in alternating order (memory lies differently each time, and that alone
makes a microsecond), and asks each twice, in turns. What is told is the difference within the rounds: its median, and
between which values half of them lie; and the median of the ratios, by which what one version took on another machine
tells what the other would take there. Both run on the packages that are installed here. Goes to standard output as a
table, and to a JSON file.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":  # this folder comes first then, and http.py would pass for the standard library's
    sys.path[0] = str(Path(__file__).parents[1])

import argparse
import json
import os
import statistics
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict
from typing import Final

from bench import http as bench_http
from bench import models as bench_models

TURNS: Final = 2  # of each server in a round


def a_version(text: str) -> tuple[str, Path]:
    name, equals, path = text.partition("=")
    checkout = Path(path).absolute()
    if not (equals and name and path) or not (checkout / "namespace" / "penstock").exists():
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=PATH, where PATH is a checkout of this project")
    return name, checkout


def cost_us(run: bench_http.Figures) -> float:
    """Of a request, in all processes of the server."""
    return run.gateway_us + run.broker_us + run.worker_us


def measure_round(
    versions: Mapping[str, Path], repository: Path, directory: Path, case: bench_http.Case, seconds: int
) -> dict[str, list[bench_http.Figures]]:
    """``versions``: in the order in which they start and have their turns."""
    script = bench_http.write_script(directory, case)
    with ExitStack() as stack:
        servers = {}
        for name, checkout in versions.items():
            os.environ["PYTHONPATH"] = str(checkout / "namespace")
            runtime = Path(tempfile.mkdtemp(dir=directory))
            servers[name] = stack.enter_context(bench_http.Server(repository, runtime))
        for server in servers.values():
            bench_http.run_wrk(server.url, script, case.connections, 1)
        found: dict[str, list[bench_http.Figures]] = {name: [] for name in versions}
        for _ in range(TURNS):
            for name, server in servers.items():
                found[name].append(bench_http.measure(server, case, script, seconds))
        return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=a_version, help="NAME=PATH of the one that is compared with")
    here = f"now={Path(__file__).parents[1]}"
    parser.add_argument("now", type=a_version, nargs="?", default=a_version(here), help="the other one: this")
    parser.add_argument("--model", choices=["tiny", "wide", "mlp", "image"], default="tiny")
    parser.add_argument("--form", choices=["binary", "json"], default="binary")
    parser.add_argument("--connections", type=bench_http.whole_number, default=64)
    parser.add_argument("--rounds", type=bench_http.whole_number, default=10)
    parser.add_argument("--seconds", type=bench_http.whole_number, default=4, help="of each turn")
    parser.add_argument("--out", type=Path, default=bench_http.RESULTS / "versions.json")
    arguments = parser.parse_args()
    versions = dict([arguments.before, arguments.now])
    case = bench_http.Case(arguments.model, arguments.form, arguments.connections)
    runs: dict[str, list[bench_http.Figures]] = {name: [] for name in versions}
    with tempfile.TemporaryDirectory(prefix="penstock-bench-") as place:
        directory = Path(place)
        repository = bench_models.make_repository(directory / "models", [case.model])
        for number in range(arguments.rounds):
            order = dict(reversed(versions.items())) if number % 2 else versions
            for name, found in measure_round(order, repository, directory, case, arguments.seconds).items():
                runs[name] += found
    machine = bench_http.about_machine()
    print(", ".join(f"{name} {value}" for name, value in machine.items()))
    turns = f"{arguments.rounds} rounds of {TURNS} x {arguments.seconds} s"
    print(f"{case.model}, {case.form}, {case.connections} connections, {turns}")
    print("| version | requests/s | gateway us | broker us | worker us | all us |")
    print("|---|---|---|---|---|---|")
    for name, found in runs.items():
        middle = bench_http.medians(found)
        parts = f"{middle.gateway_us:.2f} | {middle.broker_us:.2f} | {middle.worker_us:.2f}"
        print(f"| {name} | {middle.requests_per_s:.0f} | {parts} | {cost_us(middle):.2f} |")
    (before, first), (now, second) = runs.items()
    more = [cost_us(other) - cost_us(one) for one, other in zip(first, second, strict=True)]
    low, middle_us, high = statistics.quantiles(more, n=4)
    ratio = statistics.median(cost_us(other) / cost_us(one) for one, other in zip(first, second, strict=True))
    print(
        f"{now} takes {middle_us:+.2f} us more than {before}: half of {len(more)} pairs from {low:+.2f} to {high:+.2f}"
    )
    print(f"{ratio:.3f} times as much")
    content = {"machine": machine, "case": asdict(case), "runs": {name: list(map(asdict, runs[name])) for name in runs}}
    arguments.out.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
