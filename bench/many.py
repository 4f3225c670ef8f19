"""Very many small models: ``python bench/many.py``.

Starts a server with 500 copies of the bundled digits model, says how long that took and what of it was processor time,
asks each of them once, renames another version of one of them into place, and reads what an idle server uses, beside
one that serves a single model: an idle model is to cost nothing. Exit code 1: a bar was missed.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":  # this folder comes first then, and http.py would pass for the standard library's
    sys.path[0] = str(Path(__file__).parents[1])

import argparse
import json
import os
import shutil
import tempfile
import time
from contextlib import ExitStack
from typing import Any, Final

import numpy as np

from bench import http as bench_http
from bench import processes
from bench.idle import cpu_ns
from penstock.bin.bundled import BUNDLED_MODELS
from penstock.client import Client

MODELS: Final = 500
START_BAR_S: Final = 20.0
_WAIT_S: Final = 30.0
_REST_S: Final = 5.0  # until what a start has left to do is done


def measure(models: int, workers: int, seconds: float) -> dict[str, Any]:
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="penstock-bench-")))
        repository = directory / "models"
        for number in range(models):
            shutil.copytree(BUNDLED_MODELS / "digits", repository / f"digits-{number}")
        shutil.copytree(repository / "digits-0" / "1", directory / "staged")
        begin = time.monotonic()
        server = stack.enter_context(bench_http.Server(repository, directory / "run", f"--workers={workers}"))
        start_s = time.monotonic() - begin
        start_cpu_s = processes.cpu_s(processes.of(server.pid))
        client = stack.enter_context(Client(directory / "run"))
        states = client.models()
        spec = next(state.spec for state in states if state.spec)
        inputs = {each.name: np.zeros([max(1, dim) for dim in each.shape], np.float32) for each in spec.inputs}
        for number in range(models):
            client.infer(f"digits-{number}", inputs)
        begin = time.monotonic()
        os.rename(directory / "staged", repository / "digits-0" / "2")
        while client.infer("digits-0", inputs).version != "2":
            if time.monotonic() - begin > _WAIT_S:
                sys.exit("bench: the new version of one of them does not answer")
            time.sleep(0.005)
        swap_s = time.monotonic() - begin
        time.sleep(_REST_S)
        pids = processes.of(server.pid)
        before = {pid: cpu_ns(pid) for pid in pids}
        time.sleep(seconds)
        used = sum(cpu_ns(pid) - before[pid] for pid in pids) / seconds / 1e9
        return {
            "models": models,
            "ready": sum(state.state == "READY" for state in states),
            "start_s": round(start_s, 2),
            "start_cpu_s": round(start_cpu_s, 2),
            "swap_s": round(swap_s, 3),
            "idle_percent_of_a_core": round(used * 100, 3),
        }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=int, default=MODELS)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=20.0, help="of idleness")
    parser.add_argument("--out", type=Path, default=bench_http.RESULTS / "many.json")
    arguments = parser.parse_args()
    machine = bench_http.about_machine()
    print(", ".join(f"{name} {value}" for name, value in machine.items()))
    print(
        "| models | ready after, s | processor time, s | another version of one answers after, s | idle, % of a core |"
    )
    print("|---|---|---|---|---|")
    found = []
    for models in (1, arguments.models):
        figures = measure(models, arguments.workers, arguments.seconds)
        found.append(figures)
        print(
            f"| {models} | {figures['start_s']:.1f} | {figures['start_cpu_s']:.1f} | {figures['swap_s']:.2f} "
            f"| {figures['idle_percent_of_a_core']:.2f} |",
            flush=True,
        )
    content = {"machine": machine, "workers": arguments.workers, "runs": found}
    arguments.out.write_text(json.dumps(content, indent=1) + "\n")
    all_ready = all(figures["ready"] == figures["models"] for figures in found)
    return 0 if all_ready and found[-1]["start_s"] < START_BAR_S else 1


if __name__ == "__main__":
    sys.exit(main())
