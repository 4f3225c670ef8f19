"""What a request from the client library costs, beside tritonclient's: ``python bench/client.py``.

Starts a server, asks it from one process, and reads that process's own processor time: ``submit`` with many requests
under way, ``infer`` one after another, and the same with ``tritonclient.http`` against the same server. ``--requests``
adds a long run of mixed sizes and says how much memory each process has grown by after its first tenth. Judge by
processor time and by ratios. Results go to standard output as a table, and to a JSON file.
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
import tempfile
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Final

import tritonclient.http

from bench import http as bench_http
from bench import models as bench_models
from penstock.client import Client

_WINDOW: Final = 1000  # requests under way with submit
_SIZES: Final = ("tiny", "mlp", "image")  # of the long run: 64 bytes, 4 KB, 602 KB


@dataclass(frozen=True)
class Figures:
    """One way of asking. Microseconds of this process's processor time are per request."""

    client: str
    model: str
    requests_per_s: float
    client_us: float


def measure(client: str, model: str, seconds: float, ask: Callable[[], int]) -> Figures:
    """Call ``ask``, which returns how many requests it has ended, for some seconds."""
    until = time.monotonic() + min(1.0, seconds)
    while time.monotonic() < until:
        ask()
    count, start, cpu = 0, time.monotonic(), time.process_time()
    while time.monotonic() - start < seconds:
        count += ask()
    elapsed, used = time.monotonic() - start, time.process_time() - cpu
    return Figures(client, model, count / elapsed, used / max(1, count) * 1e6)


def submitting(client: Client, model: str, inputs: Mapping[str, Any]) -> Callable[[], int]:
    """Keeps _WINDOW requests under way."""
    under_way: deque[Any] = deque()

    def ask() -> int:
        for _ in range(100):
            under_way.append(client.submit(model, inputs))
        ended = 0
        while len(under_way) > _WINDOW:
            under_way.popleft().result()
            ended += 1
        return ended

    return ask


def inferring(client: Client, model: str, inputs: Mapping[str, Any]) -> Callable[[], int]:
    def ask() -> int:
        client.infer(model, inputs)
        return 1

    return ask


def triton_inferring(url: str, model: str, inputs: Mapping[str, Any]) -> Callable[[], int]:
    client = tritonclient.http.InferenceServerClient(url.removeprefix("http://"))

    def ask() -> int:
        wanted = []
        for name, array in inputs.items():
            wanted.append(tritonclient.http.InferInput(name, array.shape, "FP32"))
            wanted[-1].set_data_from_numpy(array)
        client.infer(model, wanted).as_numpy("y")
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
            for model in ("tiny", "image"):
                inputs = bench_models.sample(model, 1)
                rows.append(measure("infer", model, arguments.seconds, inferring(client, model, inputs)))
                ask = triton_inferring(server.url, model, inputs)
                rows.append(measure("tritonclient.http", model, arguments.seconds, ask))
            tiny = bench_models.sample("tiny", 1)
            rows.append(measure("submit", "tiny", arguments.sustain, submitting(client, "tiny", tiny)))
            if arguments.requests:
                growth = grow(server, client, arguments.requests)
    machine = bench_http.about_machine()
    print(", ".join(f"{name} {value}" for name, value in machine.items()))
    print("| client | model | requests/s | client CPU-us |")
    print("|---|---|---|---|")
    for row in rows:
        print(f"| {row.client} | {row.model} | {row.requests_per_s:.0f} | {row.client_us:.1f} |")
    if growth:
        print(f"MB grown over {arguments.requests} requests: {growth}")
    content = {"machine": machine, "rows": [asdict(row) for row in rows], "requests": arguments.requests}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(content | {"grown_mb": growth}, indent=1) + "\n")


if __name__ == "__main__":
    main()
