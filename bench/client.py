"""What a request from the client library costs, beside tritonclient's: ``python bench/client.py``.

Starts a server, asks it from one process, and reads that process's own processor time: ``infer`` one after another, on
one thread and on several that share the client, in turn with ``tritonclient.http`` against the same server, which gives
the ratio of the two with its quartiles; then ``submit`` with many requests under way. ``--requests`` adds a long run of
mixed sizes and says how much memory each process has grown by after its first tenth. Judge by processor time and by
ratios. Results go to standard output as a table, and to a JSON file.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    # Run as a script, this folder would come first, and hide the modules that it has namesakes of.
    sys.path[0] = str(Path(__file__).parents[1])

import argparse
import json
import random
import statistics
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass
from typing import Any, Final

import tritonclient.http

from bench import http as bench_http
from bench import models as bench_models
from penstock.client import Client

_WINDOW: Final = 1000  # requests under way with submit
_STEP: Final = 100  # of them are submitted, and as many ended, before the clock is looked at
_SIZES: Final = ("tiny", "mlp", "image")  # of the long run: 64 bytes, 4 KB, 602 KB


_SLICE_S: Final = 0.25  # of one way of asking, before it is the other's turn
_THREADS: Final = (1, 4, 16)


@dataclass(frozen=True)
class Figures:
    """One way of asking. Microseconds of this process's processor time are per request, the median of all slices.
    ``ratio``: to tritonclient's in the same round, quartiles."""

    client: str
    model: str
    threads: int
    requests_per_s: float
    client_us: float
    ratio: Sequence[float] = ()


class Crew:
    """Threads that ask at the same time."""

    def __init__(self, ask: Callable[[], int], threads: int = 1) -> None:
        self.threads = threads
        self._ask = ask
        self._pool = ThreadPoolExecutor(threads)

    def spend(self, seconds: float) -> tuple[float, float]:
        """Have each of them ask for some seconds. Returns requests a second, and microseconds of this process's time
        for each."""
        start, cpu = time.monotonic(), time.process_time()
        ended = [self._pool.submit(self._work, start + seconds) for _ in range(self.threads)]
        count = sum(each.result() for each in ended)
        elapsed, used = time.monotonic() - start, time.process_time() - cpu
        return count / elapsed, used / max(1, count) * 1e6

    def _work(self, until: float) -> int:
        count = self._ask()
        while time.monotonic() < until:
            count += self._ask()
        return count

    def close(self) -> None:
        self._pool.shutdown()


def measure(client: str, model: str, seconds: float, ask: Callable[[], int]) -> Figures:
    """One way of asking by itself, after a second of it. ``ask`` returns how many requests it has ended."""
    with closing(Crew(ask)) as crew:
        crew.spend(min(1.0, seconds))
        return Figures(client, model, 1, *crew.spend(seconds))


def compare(model: str, threads: int, seconds: float, ways: Mapping[str, Callable[[], int]]) -> list[Figures]:
    """Several ways in turn, a slice each, for ``seconds`` each; the last one is what the others are compared with."""
    slice_s = min(_SLICE_S, seconds)
    with ExitStack() as stack:
        crews = {way: stack.enter_context(closing(Crew(ask, threads))) for way, ask in ways.items()}
        for crew in crews.values():
            crew.spend(slice_s)
        count = max(2, round(seconds / slice_s))
        rounds = [{way: crew.spend(slice_s) for way, crew in crews.items()} for _ in range(count)]
    last = list(ways)[-1]
    figures = []
    for way in ways:
        ratios = [each[way][1] / each[last][1] for each in rounds]
        quartiles = [round(ratio, 3) for ratio in statistics.quantiles(ratios)] if way != last else ()
        rps, used = (statistics.median(each[way][at] for each in rounds) for at in (0, 1))
        figures.append(Figures(way, model, threads, rps, used, quartiles))
    return figures


def submitting(client: Client, model: str, inputs: Mapping[str, Any]) -> Callable[[], int]:
    """Keeps _WINDOW requests under way, from the first call on."""
    under_way: deque[Any] = deque()

    def ask() -> int:
        while len(under_way) < _WINDOW + _STEP:
            under_way.append(client.submit(model, inputs))
        for _ in range(_STEP):
            under_way.popleft().result()
        return _STEP

    return ask


def inferring(client: Client, model: str, inputs: Mapping[str, Any]) -> Callable[[], int]:
    def ask() -> int:
        client.infer(model, inputs)
        return 1

    return ask


def triton_inferring(url: str, model: str, inputs: Mapping[str, Any]) -> Callable[[], int]:
    """With a connection for each thread: a tritonclient is not to be shared."""
    own = threading.local()

    def ask() -> int:
        if not hasattr(own, "client"):
            own.client = tritonclient.http.InferenceServerClient(url.removeprefix("http://"))
        wanted = []
        for name, array in inputs.items():
            wanted.append(tritonclient.http.InferInput(name, array.shape, "FP32"))
            wanted[-1].set_data_from_numpy(array)
        own.client.infer(model, wanted).as_numpy("y")
        return 1

    return ask


def grow(server: bench_http.Server, client: Client, requests: int) -> dict[str, float]:
    """By how many MB each process has grown from the first tenth of a run of mixed sizes to its end."""
    source = random.Random(0)
    samples = {model: bench_models.sample(model, 1) for model in _SIZES}
    pids = {role: pid for role in bench_http.ROLES for pid in server.pids[role]} | {"client": "self"}
    before: dict[str, float] = {}
    under_way: deque[Any] = deque()
    for number in range(requests):
        if number == requests // 10:
            before = {role: bench_http.resident_mb(pid) for role, pid in pids.items()}
        model = source.choices(_SIZES, (90, 9, 1))[0]
        under_way.append(client.submit(model, samples[model]))
        if len(under_way) > _WINDOW:
            under_way.popleft().result()
    for call in under_way:
        call.result()
    return {role: round(bench_http.resident_mb(pid) - before[role], 2) for role, pid in pids.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=5.0, help="for each way of asking")
    parser.add_argument("--sustain", type=float, default=60.0, help="seconds of submit on tiny")
    parser.add_argument("--requests", type=int, default=1_000_000, help="of mixed sizes, to see memory grow; 0: none")
    parser.add_argument("--out", type=Path, default=bench_http.RESULTS / "client.json")
    arguments = parser.parse_args()
    rows: list[Figures] = []
    growth: dict[str, float] = {}
    with tempfile.TemporaryDirectory(prefix="penstock-bench-") as name:
        directory = Path(name)
        repository = bench_models.make_repository(directory / "models", _SIZES)
        with bench_http.Server(repository, directory / "run") as server, Client(directory / "run") as client:
            for model, threads in [(model, threads) for model in ("tiny", "image") for threads in _THREADS]:
                inputs = bench_models.sample(model, 1)
                ways = {
                    "infer": inferring(client, model, inputs),
                    "tritonclient.http": triton_inferring(server.url, model, inputs),
                }
                rows += compare(model, threads, arguments.seconds, ways)
            tiny = bench_models.sample("tiny", 1)
            rows.append(measure("submit", "tiny", arguments.sustain, submitting(client, "tiny", tiny)))
            if arguments.requests:
                growth = grow(server, client, arguments.requests)
    machine = bench_http.about_machine()
    print(", ".join(f"{name} {value}" for name, value in machine.items()))
    print("| client | model | threads | requests/s | client CPU-us | of tritonclient's (quartiles) |")
    print("|---|---|---|---|---|---|")
    for row in rows:
        ratio = f"{row.ratio[1]:.2f} ({row.ratio[0]:.2f} to {row.ratio[2]:.2f})" if row.ratio else ""
        print(
            f"| {row.client} | {row.model} | {row.threads} | {row.requests_per_s:.0f} | {row.client_us:.1f} | {ratio} |"
        )
    if growth:
        print(f"MB grown over {arguments.requests} requests: {growth}")
    content = {"machine": machine, "rows": [asdict(row) for row in rows], "requests": arguments.requests}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(content | {"grown_mb": growth}, indent=1) + "\n")


if __name__ == "__main__":
    main()
