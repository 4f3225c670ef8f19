"""What the flood of one tenant costs another: ``python bench/tenants.py``.

A server with one worker and the compute-bound model of models.py. What it answers in time while it is flooded, which
takes something of the machine, is its capacity. Two tenants, each with a generator of its own, ask for the same part of
that; then one of them asks for a multiple of the capacity beside. The part is seven tenths of the half that each may
have: on a shared machine the capacity falls by a fifth for moments, and who asks for more than its share then waits,
flood or not. All have a deadline, which they tell. Requests arrive independently of each other (Poisson), over HTTP.
Times without and with the flood alternate, and the medians of their figures are told: latencies of the tenant that does
not flood, from when each request was to start. `penstock simulate bench/scenarios/noisy-tenant.toml` asks the same of
two workers in virtual time.

The generators run on the same machine: what a flood takes of it is lost to everybody, beside what the scheduler can do.
So the flood is made by wrk, which takes least of it: each of many connections pauses for a random time after each
answer. Goes to standard output as a table, and to a JSON file.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":  # this folder comes first then, and http.py would pass for the standard library's
    sys.path[0] = str(Path(__file__).parents[1])

import argparse
import json
import math
import re
import statistics
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Final, Self
from urllib.parse import urlsplit

from bench import http as bench_http
from bench import models as bench_models
from penstock.load.job import LATE, OK, HttpTarget, Job, Tally
from penstock.load.run import run_load

CONNECTIONS: Final = 64  # of the closed loop that measures what the server can do while nothing floods it
OPENED: Final = 128  # connections of an open loop before it begins
OUTSTANDING_MAX: Final = 16_384
FLOODING: Final = 1024  # connections of the flood: so many that those which wait for an answer do not slow it down
WARM_UP_S: Final = 2.0  # of both tenants, before the one is measured
BAR: Final = 0.5  # of its p99 that a flood may cost
_MODEL: Final = "heavy"


@dataclass(frozen=True)
class Turn:
    """Of the tenant that does not flood. Requests a second that were to start, by how they ended: ``good`` inside the
    deadline, ``late`` after it, ``refused`` or not answered at all. ``beside``: good answers a second of the other, but
    for those to its flood; ``flooded`` and ``served``: requests a second of that, and those that were answered well."""

    flood: bool
    p50_ms: float
    p99_ms: float
    good: float
    late: float
    refused: float
    beside: float
    flooded: float
    served: float


class Flood:
    """So many requests a second that pass for the other tenant's, for so long. Ended by ``with``."""

    def __init__(self, directory: Path, asked: HttpTarget, rate: float, seconds: float) -> None:
        (directory / "flood").write_bytes(asked.request)
        script = directory / "flood.lua"
        script.write_text(
            f'local file = io.open("{directory}/flood", "rb")\n'
            'local content = file:read("*a")\n'
            "file:close()\n"
            "function request() return content end\n"
            f"function delay() return -math.log(1 - math.random()) * {FLOODING / rate * 1e3:g} end\n"
        )
        command = ["wrk", "-t1", f"-c{FLOODING}", f"-d{math.ceil(seconds)}s", "--timeout=30s", "-s", str(script)]
        self._process = subprocess.Popen(
            [*command, f"http://{asked.host}:{asked.port}"], stdout=subprocess.PIPE, text=True
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()

    def ended(self) -> tuple[float, float]:
        """Requests a second, and those that were answered well. Waits for its end."""
        text, _ = self._process.communicate(timeout=120)
        found = re.search(r"(\d+) requests in ([0-9.]+)(s|m)", text)
        if found is None or self._process.returncode:
            sys.exit(f"bench: wrk failed, and printed:\n{text}")
        count, seconds = int(found[1]), float(found[2]) * (60 if found[3] == "m" else 1)
        refused = re.search(r"Non-2xx or 3xx responses: (\d+)", text)
        return count / seconds, (count - (int(refused[1]) if refused else 0)) / seconds


def target(url: str, tenant: str, deadline_s: float) -> HttpTarget:
    body, length = bench_http.request_body(_MODEL, "binary")
    place = urlsplit(url)
    assert place.hostname is not None
    assert place.port is not None
    lines = [
        f"POST /v2/models/{_MODEL}/infer HTTP/1.1",
        f"Host: {place.netloc}",
        f"Content-Length: {len(body)}",
        f"Inference-Header-Content-Length: {length}",
        f"Penstock-Tenant: {tenant}",
    ]
    if deadline_s:
        lines.append(f"Penstock-Timeout: {deadline_s:g}")
    return HttpTarget(place.hostname, place.port, "\r\n".join([*lines, "", ""]).encode("ascii") + body)


def make_job(asked: HttpTarget, rate: float, seconds: float, warmup_s: float, deadline_s: float, seed: int) -> Job:
    """``rate``: 0 for the closed loop."""
    return Job(
        target=asked,
        connections=OPENED if rate else CONNECTIONS,
        rate=rate,
        outstanding_max=OUTSTANDING_MAX,
        warmup_s=warmup_s,
        duration_s=seconds,
        timeout_s=10 * deadline_s or 30.0,
        deadline_s=deadline_s,
        seed=seed,
    )


def measure_capacity(directory: Path, url: str, flood: float, seconds: float, deadline_s: float) -> tuple[float, float]:
    """Answers a second: of a closed loop, and in time to a flood of ``flood`` times that."""
    tally = run_load([make_job(target(url, "capacity", 0.0), 0.0, seconds, min(1.0, seconds), 0.0, 0)])
    most = sum(each.answered for each in tally.slices) / seconds
    with Flood(directory, target(url, "noisy", deadline_s), flood * most, seconds) as running:
        return most, running.ended()[1]


def measure(directory: Path, url: str, part: float, flood: float, seconds: float, deadline_s: float, seed: int) -> Turn:
    """``part`` and ``flood``: requests a second of each tenant, and of the flood, who both begin before and end after
    the tenant that is measured."""
    steady = make_job(target(url, "steady", deadline_s), part, seconds, WARM_UP_S, deadline_s, seed)
    noisy_target = target(url, "noisy", deadline_s)
    around = seconds + 2 * WARM_UP_S
    noisy = make_job(noisy_target, part, around, 0.5, deadline_s, seed + 1000)
    with ThreadPoolExecutor(1, "noisy") as pool:
        other = pool.submit(run_load, [noisy])
        if not flood:
            return make_turn(run_load([steady]), other.result(), (0.0, 0.0), seconds, around)
        with Flood(directory, noisy_target, flood, around) as beside:
            return make_turn(run_load([steady]), other.result(), beside.ended(), seconds, around)


def make_turn(tally: Tally, other: Tally, flood: tuple[float, float], seconds: float, around_s: float) -> Turn:
    ends = dict(tally.outcomes)
    good, late = ends.pop(OK, 0), ends.pop(LATE, 0)
    taken = tally.taken()
    return Turn(
        flood=flood[0] > 0,
        p50_ms=taken.quantile(0.5) / 1e6,
        p99_ms=taken.quantile(0.99) / 1e6,
        good=good / seconds,
        late=late / seconds,
        refused=sum(ends.values()) / seconds,
        beside=other.outcomes.get(OK, 0) / around_s,
        flooded=flood[0],
        served=flood[1],
    )


def medians(turns: Sequence[Turn]) -> Turn:
    """Of each figure alone."""
    each = [asdict(turn) for turn in turns]
    return Turn(**{name: statistics.median(one[name] for one in each) for name in each[0]})


def print_table(turns: Sequence[Turn]) -> None:
    quiet, flood = (medians([turn for turn in turns if turn.flood == with_it]) for with_it in (False, True))
    print("| | p50 ms | p99 ms | in time/s | late/s | refused/s | the other's, in time/s | of its flood, in time/s |")
    print("|---|---|---|---|---|---|---|---|")
    for name, turn in (("both ask for the same", quiet), ("the other floods", flood)):
        print(
            f"| {name} | {turn.p50_ms:.1f} | {turn.p99_ms:.1f} | {turn.good:.0f} | {turn.late:.1f} "
            f"| {turn.refused:.1f} | {turn.beside:.0f} "
            f"| {turn.served:.0f} of {turn.flooded:.0f} |"
        )
    all_p99 = (", ".join(f"{turn.p99_ms:.0f}" for turn in turns if turn.flood == with_it) for with_it in (False, True))
    print("p99 of each turn: {} without, {} with the flood".format(*all_p99))
    cost = flood.p99_ms / quiet.p99_ms - 1
    print(f"the flood costs {cost:+.0%} of p99 (bar: below {BAR:+.0%}): {'kept' if cost < BAR else 'MISSED'}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=bench_http.whole_number, default=5)
    parser.add_argument("--seconds", type=float, default=8.0, help="of each turn")
    parser.add_argument("--part", type=float, default=0.35, help="of the capacity that each tenant asks for")
    parser.add_argument("--flood", type=float, default=2.0, help="times what a closed loop is answered")
    parser.add_argument("--deadline", type=float, default=0.25, help="seconds")
    parser.add_argument("--out", type=Path, default=bench_http.RESULTS / "tenants.json")
    arguments = parser.parse_args()
    turns: list[Turn] = []
    with tempfile.TemporaryDirectory(prefix="penstock-bench-") as name:
        repository = bench_models.make_repository(Path(name) / "models", [_MODEL])
        with bench_http.Server(repository, Path(name) / "run", "--workers=1") as server:
            seconds, deadline_s = arguments.seconds, arguments.deadline
            most, capacity = measure_capacity(Path(name), server.url, arguments.flood, seconds, deadline_s)
            part, more = arguments.part * capacity, arguments.flood * most
            for seed in range(2 * arguments.repeats):
                flood = more if seed % 2 else 0.0
                turns.append(measure(Path(name), server.url, part, flood, seconds, deadline_s, seed // 2))
    machine = bench_http.about_machine()
    print(", ".join(f"{name} {value}" for name, value in machine.items()))
    print(f"capacity {most:.0f}/s, and {capacity:.0f}/s in a flood; each tenant asks for {part:.0f}/s,")
    print(f"the flood is {more:.0f}/s more")
    print(f"deadline {arguments.deadline * 1e3:.0f} ms")
    print_table(turns)
    content = {"machine": machine, "most": most, "capacity": capacity, "part": arguments.part, "flood": arguments.flood}
    content |= {"deadline_s": arguments.deadline, "turns": [asdict(turn) for turn in turns]}
    arguments.out.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
