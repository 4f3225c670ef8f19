"""Versions that change under full load: ``python bench/swap.py``.

A server with two workers serves one model, whose answers name the version that computed them. Clients over HTTP and of
the client library ask as fast as they are answered, every one of several rows, while each second another version is
renamed into the repository, and the oldest of three is removed. What *failed* was answered with an error; what is
*mixed* has rows of another version than the one that the answer says it is of. The memory of all processes of the
server (PSS: what they share counts once) is read at the end of each second.

Then, with nothing else to do, versions of the bundled digits model are renamed into a repository, and it is told how
long it took until one of them answered. Exit code 1: something failed, was mixed, or a bar was missed.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":  # this folder comes first then, and http.py would pass for the standard library's
    sys.path[0] = str(Path(__file__).parents[1])

import argparse
import http.client
import json
import os
import shutil
import statistics
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Final
from urllib.parse import urlsplit

import numpy as np
from onnx import TensorProto, helper, numpy_helper

from bench import http as bench_http
from bench import processes
from penstock.bin.bundled import BUNDLED_MODELS
from penstock.client import Client, PenstockError

SWAPS: Final = 60
KEPT: Final = 3  # versions on disk
EARLY: Final = 10  # swap after which memory is compared
MEMORY_BAR: Final = 0.03
FIRST_BAR_S: Final = 1.5
ROWS: Final = 4
_WIDTH: Final = 512
_WINDOW: Final = 8  # requests of a library client that are under way
_WAIT_S: Final = 30.0  # for a version to answer


@dataclass
class Told:
    """What the clients of one run were told."""

    answers: Counter[str] = field(default_factory=Counter)  # by version
    failed: list[str] = field(default_factory=list)
    mixed: int = 0
    first: dict[str, float] = field(default_factory=dict)  # when a version answered first
    lock: threading.Lock = field(default_factory=threading.Lock)

    def take(self, version: str, values: Sequence[float]) -> None:
        with self.lock:
            self.answers[version] += 1
            self.first.setdefault(version, time.monotonic())
            self.mixed += any(value != float(version) for value in values)

    def fail(self, sentence: str) -> None:
        with self.lock:
            self.failed.append(sentence)


def model_of(version: int) -> bytes:
    """y = sum(tanh(W x)) * 0 + version, by row; W has a megabyte."""
    weights = np.random.default_rng(version).standard_normal((_WIDTH, _WIDTH)).astype(np.float32)
    constants = {"W": weights, "zero": np.float32(0), "version": np.float32(version), "axes": np.array([1])}
    nodes = [
        helper.make_node("MatMul", ["x", "W"], ["wx"]),
        helper.make_node("Tanh", ["wx"], ["t"]),
        helper.make_node("ReduceSum", ["t", "axes"], ["s"]),
        helper.make_node("Mul", ["s", "zero"], ["n"]),
        helper.make_node("Add", ["n", "version"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "swap",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", _WIDTH])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 1])],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    content: bytes = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9
    ).SerializeToString()
    return content


def stage(directory: Path, version: int) -> Path:
    """A version that only has to be renamed into place."""
    staged = directory / f"staged-{version}"
    staged.mkdir(parents=True)
    (staged / "model.onnx").write_bytes(model_of(version))
    return staged


def pss_mb(pids: set[int]) -> float:
    total = 0
    for pid in pids:
        try:
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        except OSError:  # a process that tried a model has ended meanwhile
            continue
        total += next(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return total / 1000


def ask_http(url: str, told: Told, end: threading.Event) -> None:
    host = urlsplit(url).netloc
    connection = http.client.HTTPConnection(host, timeout=_WAIT_S)
    values = np.zeros((ROWS, _WIDTH), np.float32)
    declared = {"name": "x", "shape": list(values.shape), "datatype": "FP32", "parameters": {}}
    declared["parameters"] = {"binary_data_size": values.nbytes}
    head = json.dumps({"inputs": [declared], "parameters": {"binary_data_output": False}}).encode()
    headers = {"Inference-Header-Content-Length": str(len(head))}
    while not end.is_set():
        connection.request("POST", "/v2/models/swap/infer", head + values.tobytes(), headers)
        answer = connection.getresponse()
        body = answer.read()
        if answer.status == 200:
            said = json.loads(body)
            told.take(said["model_version"], said["outputs"][0]["data"])
        else:
            told.fail(f"HTTP {answer.status}: {body.decode()[:200]}")
    connection.close()


def ask(runtime: Path, told: Told, end: threading.Event) -> None:
    values = np.zeros((ROWS, _WIDTH), np.float32)
    with Client(runtime) as client:
        window = [client.submit("swap", {"x": values}) for _ in range(_WINDOW)]
        while window:
            future = window.pop(0)
            try:
                result = future.result(_WAIT_S)
                told.take(result.version, result["y"][:, 0].tolist())
            except PenstockError as error:
                told.fail(f"{error.code}: {error}")
            if not end.is_set():
                window.append(client.submit("swap", {"x": values}))


def swap(swaps: int, period_s: float, workers: int) -> dict[str, Any]:
    """Versions 2, 3, ... one after another while all ask."""
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="penstock-bench-")))
        models = directory / "models" / "swap"
        models.mkdir(parents=True)
        stage(directory, 1).rename(models / "1")
        staged = {version: stage(directory, version) for version in range(2, swaps + 2)}
        server = stack.enter_context(bench_http.Server(models.parent, directory / "run", f"--workers={workers}"))
        told, end = Told(), threading.Event()
        threads = [threading.Thread(target=ask_http, args=(server.url, told, end)) for _ in range(2)]
        threads += [threading.Thread(target=ask, args=(directory / "run", told, end)) for _ in range(2)]
        for thread in threads:
            thread.start()
        memory: list[float] = []
        renamed: dict[str, float] = {}
        begin = time.monotonic()
        try:
            for number, (version, path) in enumerate(staged.items()):
                path.rename(models / str(version))
                renamed[str(version)] = time.monotonic()
                if version > KEPT:
                    shutil.rmtree(models / str(version - KEPT))
                time.sleep(max(0.0, begin + (number + 1) * period_s - time.monotonic()))
                memory.append(pss_mb(processes.of(server.pid)))
            last = str(swaps + 1)
            until = time.monotonic() + _WAIT_S
            while last not in told.first and time.monotonic() < until:
                time.sleep(0.05)
        finally:
            end.set()
            for thread in threads:
                thread.join()
        seconds = time.monotonic() - begin
    took = [told.first[version] - at for version, at in renamed.items() if version in told.first]
    early, late = memory[EARLY - 1 : EARLY + 2], memory[-3:]
    return {
        "swaps": swaps,
        "seconds": round(seconds, 1),
        "answers": sum(told.answers.values()),
        "per_s": round(sum(told.answers.values()) / seconds),
        "versions_that_answered": len(told.answers.keys() - {"1"}),
        "failed": len(told.failed),
        "failures": told.failed[:5],
        "mixed": told.mixed,
        "first_answer_s": {"median": round(statistics.median(took), 3), "max": round(max(took), 3)},
        "memory_mb": [round(each, 1) for each in memory],
        "memory_early_mb": round(statistics.mean(early), 1),
        "memory_late_mb": round(statistics.mean(late), 1),
        "memory_growth": round(statistics.mean(late) / statistics.mean(early) - 1, 4),
    }


def first_answers(times: int, workers: int) -> list[float]:
    """Seconds from the rename of a version of digits to its first answer."""
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="penstock-bench-")))
        models = directory / "models"
        shutil.copytree(BUNDLED_MODELS, models)
        server = stack.enter_context(bench_http.Server(models, directory / "run", f"--workers={workers}"))
        assert server.pid
        client = stack.enter_context(Client(directory / "run"))
        spec = next(state.spec for state in client.models() if state.spec)
        inputs = {each.name: np.zeros([max(1, dim) for dim in each.shape], np.float32) for each in spec.inputs}
        found = []
        for version in range(2, times + 2):
            shutil.copytree(models / "digits" / "1", directory / "staged")
            begin = time.monotonic()
            os.rename(directory / "staged", models / "digits" / str(version))
            while client.infer("digits", inputs).version != str(version):
                if time.monotonic() - begin > _WAIT_S:
                    sys.exit(f"bench: version {version} of digits does not answer")
                time.sleep(0.005)
            found.append(round(time.monotonic() - begin, 3))
            time.sleep(1.0)
        return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--swaps", type=int, default=SWAPS)
    parser.add_argument("--period", type=float, default=1.0, help="seconds between two of them")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--times", type=int, default=10, help="that digits is renamed")
    parser.add_argument("--out", type=Path, default=bench_http.RESULTS / "swap.json")
    arguments = parser.parse_args()
    machine = bench_http.about_machine()
    print(", ".join(f"{name} {value}" for name, value in machine.items()))
    swapped = swap(arguments.swaps, arguments.period, arguments.workers)
    for name, value in swapped.items():
        print(f"{name}: {value}")
    first = first_answers(arguments.times, arguments.workers)
    print(f"digits, from its rename to its first answer: {first} s (bar {FIRST_BAR_S})")
    growth = swapped["memory_growth"]
    print(f"memory after the last swap beside that after swap {EARLY}: {growth:+.1%} (bar {MEMORY_BAR:.0%})")
    arguments.out.write_text(json.dumps({"machine": machine, "swap": swapped, "digits_s": first}, indent=1) + "\n")
    kept = max(first) < FIRST_BAR_S and growth <= MEMORY_BAR
    whole = swapped["versions_that_answered"] == arguments.swaps
    return 0 if kept and whole and not swapped["failed"] and not swapped["mixed"] else 1


if __name__ == "__main__":
    sys.exit(main())
