"""What is left of a server when more is asked of it than it can do: ``python bench/overload.py``.

Starts Penstock and some servers of peerlist.py (from PyPI, kept as bench/peers.py does) with one model. For each it
first measures the capacity: what 64 connections, each asking again once it is answered, are answered a second. Then
requests arrive at multiples of that, independent of each other (Poisson) and of whether those before are answered. Each
has a deadline, which is counted from when it was to start; of these servers only Penstock can be told of it, and is, in
the request. A client that has waited for ten deadlines hangs up.

Servers have turns, as in bench/peers.py, and medians of the rounds are told: of answers inside the deadline (goodput),
of refusals, of late answers and of what was never answered; how long answers and refusals took, for the client and, of
Penstock, by the gateway's own clock; and the resident memory of all processes of a server.

The generator runs on the same machine. What it and the server's processes use of a core is in the table, and so is what
others on the machine use meanwhile: what a model loses to them is lost goodput, too, and none of the server's doing.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":  # this folder comes first then, and http.py would pass for the standard library's
    sys.path[0] = str(Path(__file__).parents[1])

import argparse
import json
import math
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from typing import Any, Final
from urllib.parse import urlsplit
from urllib.request import urlopen

from bench import http as bench_http
from bench import models as bench_models
from bench import overloadsim, overloadtell, processes
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
    packages_of,
    running_on,
    start_all,
)
from bench.peertell import OWN
from penstock.gateway.figures import quantile
from penstock.load.job import LATE, OK, HttpTarget, Job, Tally
from penstock.load.measure import Look, doubts, figure
from penstock.load.prometheus import Reading, read_samples
from penstock.load.run import LoadError, divide, run_load
from penstock.wire.metrics import SECONDS

CONNECTIONS: Final = 64  # of the closed loop that measures the capacity
OPENED: Final = 512  # connections of an open loop before it begins
OUTSTANDING_MAX: Final = 16_384
PATIENCE: Final = 10  # deadlines, after which a client hangs up
WARM_UP_S: Final = 1.0  # before each measurement, of the same load
SETTLE_S: Final = 2.0  # after a turn: what waits still is done, and processes tell their last figures
MEMORY_EVERY_S: Final = 0.5
REFUSALS: Final = frozenset({"HTTP 429", "HTTP 503", "HTTP 504"})
SIMULATED: Final = "heavy"  # the model of the scenario
SCENARIO: Final = Path(__file__).parent / "scenarios" / "overload.toml"  # of the results that are kept
_METRICS_S: Final = 10.0
_PAGE: Final = os.sysconf("SC_PAGE_SIZE")
_TICK_S: Final = 1 / os.sysconf("SC_CLK_TCK")

Metrics = Mapping[tuple[str, tuple[tuple[str, str], ...]], float]


@dataclass(frozen=True)
class Turn:
    """One load on one server, or the medians of several; None is what a server does not tell.

    ``goodput``, ``refused``, ``late``, ``unanswered``: requests a second that were to start in the measured time, by
    how they ended. ``p50_ms``, ``p99_ms``: of answers, with those that were waited for in vain.
    ``gateway_refusal_p99_ms``: as far as its buckets tell. ``expired``: requests a second whose time was up before a
    batch. ``running``: the share of the time that batches ran. ``cores``: processor time over time, by kind of process.
    ``per_core``: good answers for each second of processor time that who computes (the workers, or the whole server)
    has got; what others take of the machine is not in it.
    ``batch_ms``: the mean of what batches took. ``behind_ms``: how late 99 of 100 requests were sent at most."""

    times: float
    offered: float
    goodput: float
    refused: float
    late: float
    unanswered: float
    p50_ms: float
    p99_ms: float
    refusal_p99_ms: float | None
    gateway_refusal_p99_ms: float | None
    expired: float | None
    batch_rows: float | None
    batch_ms: float | None
    running: float | None
    cores: Mapping[str, float]
    per_core: float
    generator: float
    others: float
    behind_ms: float
    doubts: Sequence[str]


@dataclass(frozen=True)
class Sight:
    """Of a server and its machine, at one time. Seconds of processor time: by process, and of the whole machine."""

    at: float
    cpu_s: Mapping[int, float]
    machine_s: float
    metrics: Metrics


# --- what is asked


def target(server: Running, deadline_s: float) -> HttpTarget:
    """``deadline_s``: that Penstock is told of; 0 for none."""
    request = server.request
    if server.key == OWN and deadline_s:
        request = overloadsim.with_parameters(request, timeout=round(deadline_s * 1e6))
    place = urlsplit(server.url)
    assert place.hostname is not None
    assert place.port is not None
    headers = {"Host": place.netloc, **request.headers, "Content-Length": str(len(request.body))}
    lines = [f"POST {request.path} HTTP/1.1", *(f"{name}: {value}" for name, value in headers.items()), "", ""]
    return HttpTarget(place.hostname, place.port, "\r\n".join(lines).encode("ascii") + request.body)


# --- what is looked at


def resident_mb(root: int) -> float:
    """Resident memory of all processes of a server together."""
    pages = 0
    for pid in processes.of(root):
        with suppress(OSError):  # ended meanwhile
            pages += int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * _PAGE / 1e6


@contextmanager
def watching(root: int, seen: list[float]) -> Iterator[None]:
    """Notes the resident memory of a server every now and then."""
    stop = threading.Event()

    def watch() -> None:
        while not stop.wait(MEMORY_EVERY_S):
            seen.append(resident_mb(root))

    thread = threading.Thread(target=watch, name="memory")
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        seen.append(resident_mb(root))


def read_metrics(text: str) -> Metrics:
    return {(name, tuple(sorted(labels.items()))): value for name, labels, value in read_samples(text)}


def look(server: Running) -> Sight:
    """Penstock's metrics are read last, and take longest."""
    at = time.monotonic()
    cpu_s = {pid: processes.cpu_s([pid]) for pid in processes.of(server.root)}
    machine_s = machine_busy_s(Path("/proc/stat").read_text())
    text = ""
    if server.key == OWN:
        with suppress(OSError), urlopen(server.url + "/metrics", timeout=_METRICS_S) as answer:
            text = answer.read().decode()
    return Sight(at, cpu_s, machine_s, read_metrics(text))


def machine_busy_s(stat: str) -> float:
    """Processor time that was not idle, of all cores together, with what their host took (steal); from /proc/stat."""
    user, nice, system, _, _, irq, softirq, steal = map(int, stat.split("\n", 1)[0].split()[1:9])
    return (user + nice + system + irq + softirq + steal) * _TICK_S


class Risen:
    """By how much counters have risen from one look at them to another."""

    def __init__(self, before: Metrics, after: Metrics) -> None:
        self._before = before
        self._after = after

    def sum(self, name: str, **labels: str) -> float | None:
        """Over all series that have these labels; None where there is none."""
        found = [
            value - self._before.get(key, 0.0)
            for key, value in self._after.items()
            if key[0] == name and labels.items() <= dict(key[1]).items()
        ]
        return sum(found) if found else None

    def quantile(self, family: str, share: float) -> float | None:
        """Of a histogram of seconds; None where nothing was observed."""
        below = [self.sum(f"{family}_bucket", le=str(bound)) or 0.0 for bound in (*SECONDS, "+Inf")]
        counts = [high - low for low, high in zip([0.0, *below], below, strict=False)]
        return quantile(SECONDS, counts, share)


# --- a turn


def measure_capacity(server: Running, seconds: float) -> float:
    """Answers a second. Raises PeerError."""
    tally = load(server, 0.0, seconds, 0.0, 0, lambda: None)
    rate = sum(each.answered for each in tally.slices) / seconds
    if not rate:
        raise PeerError(f"answered nothing in {seconds:g} s at {CONNECTIONS} connections")
    return rate


def make_job(server: Running, rate: float, seconds: float, deadline_s: float, seed: int) -> Job:
    """``rate``: 0 for the closed loop, whose clients have time."""
    return Job(
        target=target(server, deadline_s),
        connections=OPENED if rate else CONNECTIONS,
        rate=rate,
        outstanding_max=OUTSTANDING_MAX,
        warmup_s=min(WARM_UP_S, seconds),
        duration_s=seconds,
        timeout_s=deadline_s * PATIENCE or 30.0,
        deadline_s=deadline_s,
        seed=seed,
    )


def load(
    server: Running, rate: float, seconds: float, deadline_s: float, seed: int, at_edges: Callable[[], None]
) -> Tally:
    """Raises PeerError."""
    try:
        return run_load(divide(make_job(server, rate, seconds, deadline_s, seed), 1), at_edges=at_edges)
    except LoadError as error:
        raise PeerError(f"cannot be loaded: {error}") from error


def measure(server: Running, times: float, capacity: float, seconds: float, deadline_s: float, seed: int) -> Turn:
    """Raises PeerError."""
    rate = times * capacity
    sights: list[Sight] = []
    own: list[float] = []

    def at_edges() -> None:
        sights.append(look(server))
        own.append(time.process_time())

    tally = load(server, rate, seconds, deadline_s, seed, at_edges)
    before, after = sights
    return make_turn(
        make_job(server, rate, seconds, deadline_s, seed), times, tally, before, after, server.kinds, own[1] - own[0]
    )


def make_turn(
    job: Job, times: float, tally: Tally, before: Sight, after: Sight, kinds: Mapping[int, str], own_s: float
) -> Turn:
    """``kinds``: of processes; others are a ``server``. ``own_s``: processor time of who measures."""
    seconds = after.at - before.at
    cores: dict[str, float] = {}
    for pid, cpu_s in after.cpu_s.items():
        kind = kinds.get(pid, "rest" if kinds else "server")
        cores[kind] = cores.get(kind, 0.0) + (cpu_s - before.cpu_s.get(pid, 0.0)) / seconds
    nothing = Look({}, "", Reading({}, None, None))
    figures = figure(job, tally, nothing, nothing)
    ends = dict(tally.outcomes)
    good, late = ends.pop(OK, 0), ends.pop(LATE, 0)
    refused = sum(ends.pop(each, 0) for each in REFUSALS)
    risen = Risen(before.metrics, after.metrics)
    batches, rows = risen.sum("penstock_batch_rows_count"), risen.sum("penstock_batch_rows_sum")
    ran = risen.sum("penstock_compute_seconds_sum")
    expired = risen.sum("penstock_request_failures_total", reason="deadline")
    by_gateway = risen.quantile("penstock_http_refusal_seconds", 0.99)
    computing = cores.get("worker", cores.get("server", 0.0))
    of_all = (after.machine_s - before.machine_s) / seconds
    return Turn(
        times=times,
        offered=(good + late + refused + sum(ends.values())) / job.duration_s,
        goodput=good / job.duration_s,
        refused=refused / job.duration_s,
        late=late / job.duration_s,
        unanswered=sum(ends.values()) / job.duration_s,
        p50_ms=figures.quantiles[0] * 1e3,
        p99_ms=figures.p99_s * 1e3,
        refusal_p99_ms=tally.refusals.quantile(0.99) / 1e6 if tally.refusals.total else None,
        gateway_refusal_p99_ms=None if by_gateway is None else by_gateway * 1e3,
        expired=None if ran is None else (expired or 0.0) / seconds,
        batch_rows=rows / batches if rows is not None and batches else None,
        batch_ms=ran / batches * 1e3 if ran is not None and batches else None,
        running=None if ran is None else ran / seconds,
        cores=cores,
        per_core=good / job.duration_s / computing if computing else 0.0,
        generator=figures.generator,
        others=max(0.0, of_all - sum(cores.values()) - figures.generator - own_s / seconds),
        behind_ms=figures.behind_s * 1e3,
        doubts=doubts(figures),
    )


def explained(
    server: Running, capacity: float, seconds: float, deadline_s: float, number: int
) -> list[overloadsim.Seen]:
    """What the simulator is told: see bench/overloadsim.py. Raises PeerError."""
    found: list[overloadsim.Seen] = []
    pause_ms = 0.0
    for times in overloadsim.TIMES:
        seen: list[overloadsim.Seen] = []
        with overloadsim.asking(server.url, server.request, seen):
            turn = measure(server, times, capacity, seconds, deadline_s, 1000 + number)
        if times >= overloadsim.BUSY_TIMES and turn.batch_rows is not None and turn.batch_ms is not None:
            rate = turn.goodput + len(seen) / (seconds + WARM_UP_S)
            pause_ms = overloadsim.pause_ms(turn.batch_rows, rate, turn.batch_ms)
        found += [each._replace(batch_ms=each.batch_ms + pause_ms) for each in seen]
    return found


def simulated(course: Course, arguments: argparse.Namespace) -> dict[str, Any] | None:
    """What the simulator says of the same loads, and what it was told; None where it was told too little."""
    try:
        known = overloadsim.learn(course.seen)
    except ValueError as error:
        print(f"bench: nothing is simulated: {error}", file=sys.stderr)
        return None
    kept = arguments.out.parent == bench_http.RESULTS
    path = SCENARIO if kept else arguments.out.with_name(f"{arguments.out.stem}-scenario.toml")
    seconds = arguments.seconds * arguments.repeats
    path.write_text(overloadsim.scenario(known, course.capacity, arguments.deadline, arguments.times, seconds))
    return {"known": known._asdict(), "loads": overloadsim.simulate(path)}


def medians(turns: Sequence[Turn]) -> Turn:
    """Of each figure alone."""
    each = [asdict(turn) for turn in turns]
    found: dict[str, Any] = {}
    for name in each[0]:
        values = [one[name] for one in each if one[name] is not None]
        if name == "cores":
            kinds = dict.fromkeys(kind for value in values for kind in value)
            found[name] = {kind: statistics.median(value.get(kind, 0.0) for value in values) for kind in kinds}
        elif name == "doubts":
            found[name] = list(dict.fromkeys(said for value in values for said in value))
        else:
            found[name] = statistics.median(values) if values else None
    return Turn(**found)


# --- all of it


@dataclass
class Course:
    """Of one server through a whole run. ``seen``: of Penstock, what the simulator is told. ``memory``: in MB, when it
    had answered first, after its first overload, the most since then, and at the end. ``why``: it dropped out."""

    server: Running
    capacity: float = 0.0
    turns: list[Turn] | None = None
    seen: list[overloadsim.Seen] = field(default_factory=list)
    memory: dict[str, float] | None = None
    why: str = ""


def in_turns(courses: Sequence[Course], rounds: int, act: Callable[[Course, int], None]) -> None:
    """Each has a turn in each round; who is gone has none any more."""
    by_key = {course.server.key: course for course in courses}
    for number in range(rounds):
        for server in in_order([course.server for course in courses], number, rounds):
            course = by_key[server.key]
            if course.why:
                continue
            try:
                with running_on(server):
                    act(course, number)
            except PeerError as error:
                course.why = str(error)
                print(f"{server.key}: {error}", file=sys.stderr)


def run(courses: Sequence[Course], arguments: argparse.Namespace) -> None:
    """Capacities, a first overload of each, which makes what is kept from then on, and then all turns."""
    found: dict[str, list[float]] = {}
    seconds, deadline_s = arguments.seconds, arguments.deadline / 1e3
    settle_s = min(SETTLE_S, seconds)

    def capacity(course: Course, number: int) -> None:
        key = course.server.key
        found.setdefault(key, []).append(measure_capacity(course.server, seconds))
        course.capacity = statistics.median(found[key])
        print(f"{key}: {found[key][-1]:.0f} answers/s at {CONNECTIONS} connections", file=sys.stderr)

    def first(course: Course, number: int) -> None:
        server = course.server
        peak: list[float] = []
        fresh = resident_mb(server.root)
        with watching(server.root, peak):
            load(server, max(arguments.times) * course.capacity, seconds, deadline_s, 0, lambda: None)
            time.sleep(settle_s)
        course.memory = {"fresh": fresh, "first_peak": max(peak), "before": peak[-1], "peak": peak[-1]}

    def turns(course: Course, number: int) -> None:
        server = course.server
        seen: list[float] = []
        assert course.memory is not None
        with watching(server.root, seen):
            if server.key == OWN and arguments.model == SIMULATED:
                course.seen += explained(server, course.capacity, seconds, deadline_s, number)
            for at, times in enumerate(arguments.times):
                seed = number * len(arguments.times) + at + 1
                made = measure(server, times, course.capacity, seconds, deadline_s, seed)
                course.turns = [*(course.turns or []), made]
                print(f"{server.key}, {times:g} x: {made.goodput:.0f} good/s of {made.offered:.0f}", file=sys.stderr)
                time.sleep(settle_s)
        course.memory["peak"] = max(course.memory["peak"], *seen)
        course.memory["after"] = seen[-1]

    in_turns(courses, arguments.repeats, capacity)
    in_turns(courses, 1, first)
    in_turns(courses, arguments.repeats, turns)


def as_object(course: Course) -> dict[str, Any]:
    """For the JSON file: medians, and all that they are of."""
    turns = course.turns or []
    by_times: dict[float, list[Turn]] = {}
    for turn in turns:
        by_times.setdefault(turn.times, []).append(turn)
    return {
        "server": course.server.key,
        "capacity": course.capacity,
        "memory_mb": course.memory,
        "loads": [asdict(medians(each)) | {"turns": len(each)} for each in by_times.values()],
        "turns": [asdict(turn) for turn in turns],
        "why": course.why,
    }


def positive(text: str) -> float:
    """For argparse: a number above 0."""
    try:
        found = float(text)
    except ValueError:
        found = 0.0
    if not 0 < found < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is no number above 0")
    return found


def positives(text: str) -> list[float]:
    """For argparse: such numbers, in ascending order."""
    return sorted({positive(each) for each in text.split(",")})


def main(given: Iterable[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    peers, models = list(PEERS), bench_models.MODELS
    parser.add_argument("--peers", type=bench_http.words(peers), default="fastapi,mosec", help=f"of {', '.join(peers)}")
    parser.add_argument("--alone", action="store_true", help="Penstock without any other")
    parser.add_argument("--model", choices=models, default="heavy")
    parser.add_argument("--times", type=positives, default="0.5,0.9,1.5,2,4", help="the capacity, that are offered")
    parser.add_argument("--deadline", type=positive, default="100", help="in ms")
    parser.add_argument("--seconds", type=positive, default="10", help="of each measurement")
    parser.add_argument("--repeats", type=bench_http.whole_number, default=3)
    parser.add_argument("--environments", type=Path, default=default_environments(), help="where they are installed")
    parser.add_argument("--out", type=Path, default=bench_http.RESULTS / "overload.json")
    arguments = parser.parse_args(None if given is None else list(given))
    end_once_when_stopped()
    keys = [] if arguments.alone else arguments.peers
    environments, why = install_all(keys, arguments.environments.absolute())
    with ExitStack() as stack:
        directory = Path(
            stack.enter_context(tempfile.TemporaryDirectory(prefix="penstock-bench-", ignore_cleanup_errors=True))
        )
        repository = bench_models.make_repository(directory / "repository", [arguments.model])
        expected = expected_answer(repository, arguments.model)
        servers, more = start_all(stack, environments, directory, repository, arguments.model, expected)
        why |= more
        idle = idle_percents(servers) if keys else {OWN: 0.0}  # nobody else is there to be disturbed
        courses = [Course(server) for server in hold_busy(servers, idle)]
        run(courses, arguments)
        found = [as_object(course) for course in courses]
    own = next(course for course in courses if course.server.key == OWN)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    content = {
        "machine": bench_http.about_machine(),
        "model": arguments.model,
        "deadline_ms": arguments.deadline,
        "seconds": arguments.seconds,
        "repeats": arguments.repeats,
        "servers": found,
        "simulated": simulated(own, arguments) if arguments.model == SIMULATED and not own.why else None,
        "failed": [{"server": key, "why": each} for key, each in why.items()],
        "installed": {key: packages_of(path) for key, path in environments.items()},
    }
    content["bars"] = overloadtell.bars(content)
    text = "\n".join(overloadtell.tell(content)) + "\n"
    print(text, end="")
    arguments.out.write_text(json.dumps(content, indent=1) + "\n")
    arguments.out.with_suffix(".txt").write_text(text)
    if not overloadtell.draw(content, arguments.out.with_suffix(".png")):
        print("bench: no plot, matplotlib is missing; pip install 'penstock[report]'", file=sys.stderr)


if __name__ == "__main__":
    main()
