"""What malformed messages, requests and files do to Penstock: ``python bench/fuzz.py --inputs 10000000 --live 300000``.

In process, inputs that follow from ``--seed`` are fed to what reads them: the decoders of all messages, of ZeroMQ's
frames and of the control connection; the whole cores of broker, worker and caller; the gateway from its connections to
the caller core; the readers of model.toml and model.onnx. Each is a valid message or request of which something is
changed: bits, lengths, types, numbers at their edges, fields left out or said twice, parts of others. A finding is

- an exception that is not documented, or a broken invariant: the cores derive what they count anew now and then, all
  that a core says can be read by whom it is for, and what a gateway answers is HTTP;
- an input that takes more than 100 ms of processor time (bodies that expand are limited to 256 KiB here: to parse as
  many bytes of JSON as ``body_bytes_max`` allows, 64 MiB, takes longer, and is documented);
- growth: when all peers have left nothing may be held for them, and a core holds no more, and the process has no more
  memory, after many inputs than after few.

It is told with what feeds it again: ``--target NAME --seed S --replay NUMBER``. With ``--live N`` a real server gets as
many over its sockets, while a client checks every answer. Results go to standard output as a table, and with
``--results`` to results/fuzz.txt. The exit code is 1 when anything was found.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    # Run as a script, this folder would come first, and hide the modules that it has namesakes of.
    sys.path[0] = str(Path(__file__).parents[1])

import os

os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # see penstock.worker

import argparse
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import repeat
from multiprocessing import get_context
from typing import Final

from bench import fuzzlive, fuzzrun
from bench import http as bench_http
from bench.fuzzbroker import Broker
from bench.fuzzcaller import CallerCore
from bench.fuzzfiles import Files
from bench.fuzzhttp import HttpTarget
from bench.fuzztarget import Target
from bench.fuzzwire import Codec, Control, Zmtp
from bench.fuzzworker import Worker

TARGETS: Final[dict[str, type[Target]]] = {
    each.name: each for each in (Codec, Zmtp, Control, Files, Broker, Worker, CallerCore, HttpTarget)
}


def table(tallies: Sequence[fuzzrun.Tally]) -> Iterator[str]:
    yield "| target | inputs | inputs/s | refused | understood | worst ms | growth MB | findings |"
    yield "|---|---|---|---|---|---|---|---|"
    for each in tallies:
        refused, rate = each.inputs - each.understood, each.inputs / max(each.seconds, 1e-9)
        yield (
            f"| {each.target} | {each.inputs:,} | {rate:,.0f} | {refused:,} | {each.understood:,} "
            f"| {each.worst_s * 1000:.1f} | {each.growth / 1e6:.1f} | {len(each.findings)} |"
        )


def feed(chosen: Sequence[type[Target]], seed: int, counts: Sequence[int], processes: int) -> Iterator[fuzzrun.Tally]:
    if processes == 1:
        yield from map(fuzzrun.run, chosen, repeat(seed), counts)
        return
    # A process for each: what it grows by is its own.
    with ProcessPoolExecutor(processes, get_context("spawn"), max_tasks_per_child=1) as pool:
        yield from pool.map(fuzzrun.run, chosen, repeat(seed), counts)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--inputs", type=int, default=0, help="in process, shared out among the targets")
    parser.add_argument("--target", choices=TARGETS, action="append", help="these alone, with all inputs")
    parser.add_argument("--processes", type=int, default=2, help="targets that are fed at a time; 1: in this one")
    parser.add_argument("--live", type=int, default=0, help="inputs that a real server gets")
    parser.add_argument("--replay", type=int, help="feed the inputs of one --target up to this one, as it was found")
    parser.add_argument("--results", type=Path, nargs="?", const=bench_http.RESULTS / "fuzz.txt")
    options = parser.parse_args(arguments)
    if arguments is None and os.environ.get("PYTHONHASHSEED") != "0":
        # The order of sets is part of what follows from a seed.
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | {"PYTHONHASHSEED": "0"})
    if options.replay is not None:
        [name] = options.target
        found = fuzzrun.replay(TARGETS[name], options.seed, options.replay)
        print(found or "nothing is wrong with it")
        return int(found is not None)
    chosen = [TARGETS[name] for name in options.target or TARGETS]
    whole = sum(each.share for each in chosen)
    tallies = []
    if options.inputs:
        counts = [round(options.inputs * each.share / whole) for each in chosen]
        for tally in feed(chosen, options.seed, counts, options.processes):
            tallies.append(tally)
            print(f"{tally.target}: {tally.inputs:,} inputs, {len(tally.findings)} findings", file=sys.stderr)
    lines = [", ".join(f"{name} {value}" for name, value in bench_http.about_machine().items())]
    findings = [str(finding) for tally in tallies for finding in tally.findings]
    if tallies:
        lines += [f"in process, seed {options.seed}: {sum(each.inputs for each in tallies):,} inputs", *table(tallies)]
    if options.live:
        outcome = fuzzlive.run(options.seed, options.live)
        lines += outcome.lines
        findings += outcome.findings
    print("\n".join([*lines, *findings]))
    if options.results is not None:
        options.results.write_text("\n".join([*lines, *findings]) + "\n")
    return int(bool(findings))


if __name__ == "__main__":
    sys.exit(main())
