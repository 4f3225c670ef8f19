"""Is a GPU kept busy, and are its results right? ``python bench/gpu.py``, on a machine with one; ``--device cpu`` tries
the script itself.

For networks of the size of ResNet-50 and BERT-base (``networks.py``), in FP32 and FP16:

- results over HTTP against ONNX Runtime on the CPU, in FP32;
- throughput over HTTP and with the client library, with 64 requests under way, against a bare loop of ONNX Runtime at
  the limit's batch size in a process of its own: ``session.run`` on arrays, and on memory that is on the GPU already,
  where nothing is copied at all; how much of the time the GPU was busy meanwhile (as the worker's metrics have it);
- by batch limit; with one instance and with two, which is what copying during a run is worth; memory;
- with room for few rows only (``gpu_memory_limit``), and with one of two workers killed in the middle.

A table goes to standard output, everything to a JSON file and plots beside it.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":  # this folder comes first then, and http.py would pass for the standard library's
    sys.path[0] = str(Path(__file__).parents[1])

import argparse
import json
import os
import re
import signal
import statistics
import subprocess
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from typing import Any, Final
from urllib.request import urlopen

import numpy as np
import onnxruntime

from bench import http as bench_http
from bench import networks
from penstock.bin.charts import LINEAR, Axis, Chart, Line, draw_svg
from penstock.client import Client
from penstock.worker.config import ModelConfig
from penstock.worker.providers import choose, open_session

CLIENTS: Final = 64
_LIMITS: Final = (1, 8, 32)
_CHECKED: Final = 40  # rows that are compared
_SAMPLE_S: Final = 0.25


def options() -> Any:
    chosen = onnxruntime.SessionOptions()
    chosen.log_severity_level = 3
    chosen.intra_op_num_threads = 1
    return chosen


# --- the bare loop, in a process of its own


def bare(path: Path, name: str, datatype: str, device: str, rows: int, seconds: float) -> dict[str, float]:
    """Rows a second: ``run`` of arrays, and ``bound``, where inputs and outputs lie on the device."""
    session = open_session(path, options(), choose(ModelConfig(tf32=False), device))
    feed = networks.sample(name, datatype, rows)
    output = session.get_outputs()[0].name
    binding = session.io_binding()
    where = "cpu" if device == "cpu" else "cuda"
    values = {key: onnxruntime.OrtValue.ortvalue_from_numpy(value, where, 0) for key, value in feed.items()}
    for key, value in values.items():
        binding.bind_ortvalue_input(key, value)
    binding.bind_output(output, where, 0)

    def rate(ask: Any) -> float:
        for _ in range(5):
            ask()
        count, start = 0, time.monotonic()
        while time.monotonic() - start < seconds:
            ask()
            count += 1
        return count * rows / (time.monotonic() - start)

    return {
        "run": rate(lambda: session.run([output], feed)),
        "bound": rate(lambda: session.run_with_iobinding(binding)),
    }


def ask_bare(path: Path, *arguments: object) -> dict[str, float]:
    command = [sys.executable, __file__, "--bare", str(path), *map(str, arguments)]
    ended = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if ended.returncode:
        sys.exit(f"bench: the bare loop ended with {ended.returncode}")
    answer: dict[str, float] = json.loads(ended.stdout.splitlines()[-1])
    return answer


# --- the server


def make_repository(directory: Path, name: str, content: bytes, **config: object) -> Path:
    version = directory / name / "1"
    version.mkdir(parents=True)
    (version / "model.onnx").write_bytes(content)
    lines = [f"{key} = {json.dumps(value)}" for key, value in {"tf32": False, **config}.items()]
    (directory / name / "model.toml").write_text("\n".join(lines) + "\n")
    return directory


class Gauge:
    """Follows a series of /metrics for the time of a ``with``. ``mean`` and ``most``: of its values; 0 without any."""

    def __init__(self, url: str, *names: str) -> None:
        self._url = url
        self._values: dict[str, list[float]] = {name: [] for name in names}
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._follow)

    def __enter__(self) -> Gauge:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._thread.join()

    def _follow(self) -> None:
        while not self._over.wait(_SAMPLE_S):
            text = urlopen(f"{self._url}/metrics", timeout=10).read().decode()
            for name, values in self._values.items():
                values += map(float, re.findall(rf"^{name}(?:\{{.*\}})? (\S+)", text, re.M)[:1])

    def mean(self, name: str) -> float:
        return statistics.fmean(self._values[name] or [0.0])

    def most(self, name: str) -> float:
        return max(self._values[name], default=0.0)


class Trial:
    """One server with one network."""

    def __init__(
        self, stack: ExitStack, name: str, content: bytes, device: str, *arguments: str, **config: object
    ) -> None:
        self.name = name
        self.directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="penstock-bench-")))
        repository = make_repository(self.directory / "models", name, content, **config)
        self.server = stack.enter_context(
            bench_http.Server(repository, self.directory / "run", f"--device={device}", *arguments)
        )

    def load(self, datatype: str, by: str, seconds: float) -> dict[str, Any]:
        """With CLIENTS under way. What ``penstock bench`` says, and how busy the GPU was."""
        inputs = self.directory / "inputs.npz"
        np.savez(inputs, **networks.sample(self.name, datatype, 1))  # type: ignore[arg-type]
        where = [f"--url={self.server.url}"] if by == "http" else [f"--runtime-dir={self.directory / 'run'}"]
        with Gauge(self.server.url, "penstock_gpu_utilization", "penstock_gpu_memory_used_bytes") as gauge:
            ended = subprocess.run(
                [
                    *(sys.executable, "-m", "penstock.bin", "bench", self.name, f"--by={by}", *where),
                    *(f"--input={inputs}", f"--connections={CLIENTS}", f"--duration={seconds}s", "--warmup=2s"),
                    "--json",
                ],
                stdout=subprocess.PIPE,
                text=True,
                check=False,
            )
        if not ended.stdout:
            sys.exit(f"bench: penstock bench ended with {ended.returncode}")
        [told] = json.loads(ended.stdout)["loads"]
        told["gpu_utilization"] = gauge.mean("penstock_gpu_utilization")
        told["gpu_memory_bytes"] = gauge.most("penstock_gpu_memory_used_bytes")
        return dict(told)

    def host_mb(self) -> float:
        return sum(bench_http.resident_mb(pid) for pid in self.server.pids["worker"])


def compare(trial: Trial, datatype: str, reference: Any) -> float:
    """The largest difference to what the CPU gives, as a share of the largest value."""
    inputs = networks.sample(trial.name, datatype, _CHECKED, seed=7)
    kinds = {each.name: np.int64 if "int64" in each.type else np.float32 for each in reference.get_inputs()}
    wanted = reference.run(None, {name: value.astype(kinds[name]) for name, value in inputs.items()})[0]
    with closing(Client(trial.directory / "run")) as client:
        under_way = [
            client.submit(trial.name, {name: value[at : at + 1] for name, value in inputs.items()})
            for at in range(_CHECKED)
        ]
        got = np.concatenate([each.result()["y"] for each in under_way]).astype(np.float32)
    return float(np.abs(got - wanted).max() / np.abs(wanted).max())


def kill_one(trial: Trial, datatype: str, seconds: float) -> dict[str, Any]:
    """A worker is killed in the middle of a load."""
    timer = threading.Timer(2.0 + seconds / 2, os.kill, (trial.server.pids["worker"][0], signal.SIGKILL))
    timer.start()
    try:
        return trial.load(datatype, "http", seconds)
    finally:
        timer.join()


# --- all of it


def measure(name: str, datatype: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """All figures of one network."""
    device, seconds, limit = arguments.device, arguments.seconds, max(arguments.limits)
    content = networks.build(name, datatype)
    found: dict[str, Any] = {"network": name, "type": datatype, "limits": {}}
    with tempfile.TemporaryDirectory(prefix="penstock-bench-") as folder:
        path = Path(folder) / "model.onnx"
        path.write_bytes(content)
        found["bare"] = {rows: ask_bare(path, name, datatype, device, rows, seconds) for rows in arguments.limits}
        path.write_bytes(networks.build(name, "FP32"))
        reference = onnxruntime.InferenceSession(str(path), options(), providers=["CPUExecutionProvider"])
        with ExitStack() as stack:
            trial = Trial(stack, name, content, device, max_batch_size=limit)
            found["difference"] = compare(trial, datatype, reference)
            found["http"], found["client"] = (trial.load(datatype, by, seconds) for by in ("http", "client"))
            found["host_mb"] = trial.host_mb()
        del reference
    for rows in arguments.limits:
        with ExitStack() as stack:
            trial = Trial(stack, name, content, device, max_batch_size=rows)
            found["limits"][rows] = trial.load(datatype, "http", seconds)
    with ExitStack() as stack:
        trial = Trial(stack, name, content, device, max_batch_size=limit, instances=1)
        found["one instance"] = trial.load(datatype, "http", seconds)
    with ExitStack() as stack:
        config = stack.enter_context(tempfile.NamedTemporaryFile("w", suffix=".toml"))
        config.write(f"[worker]\nrun_bytes_max = {arguments.room_mb << 20}\n")
        config.flush()
        room = {} if device == "cpu" else {"gpu_memory_limit": arguments.room_mb << 20}
        trial = Trial(stack, name, content, device, f"--config={config.name}", max_batch_size=limit, **room)
        found["little room"] = trial.load(datatype, "http", seconds)
    with ExitStack() as stack:
        trial = Trial(stack, name, content, device, "--workers=2", max_batch_size=limit)
        found["one killed"] = kill_one(trial, datatype, seconds)
    return found


def tell(found: Sequence[Mapping[str, Any]], limit: int) -> str:
    lines = [
        "| network | bare, rows/s | bare, on the GPU | HTTP | of bare | client | of bare | GPU busy | one instance | "
        "difference to the CPU | host MB | GPU MB | little room: rows/s, errors | one killed: errors |",
        "|" + "---|" * 14,
    ]
    for each in found:
        run, bound = (each["bare"][limit][key] for key in ("run", "bound"))
        http, client, little, killed = (each[key] for key in ("http", "client", "little room", "one killed"))
        cells = [
            f"{each['network']}, {each['type']}",
            f"{run:.0f}",
            f"{bound:.0f}",
            f"{http['requests_per_s']:.0f}",
            f"**{http['requests_per_s'] / run:.0%}**",
            f"{client['requests_per_s']:.0f}",
            f"**{client['requests_per_s'] / run:.0%}**",
            f"{http['gpu_utilization']:.0%}",
            f"{each['one instance']['requests_per_s']:.0f}",
            f"{each['difference']:.1e}",
            f"{each['host_mb']:.0f}",
            f"{http['gpu_memory_bytes'] / 1e6:.0f}",
            f"{little['requests_per_s']:.0f}, {sum(little['errors'].values())}",
            f"{sum(killed['errors'].values())}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(found: Sequence[Mapping[str, Any]]) -> str:
    lines = []
    for each in found:
        title = f"{each['network']}, {each['type']}"
        lines.append(Line(title, [(int(rows), told["requests_per_s"]) for rows, told in each["limits"].items()]))
        lines.append(Line(f"{title}, bare", [(int(rows), told["run"]) for rows, told in each["bare"].items()]))
    axes = Axis("rows of a batch, at most", LINEAR), Axis("rows a second", LINEAR)
    return draw_svg(Chart("gpu", f"{CLIENTS} clients over HTTP, and bare loops", *axes, lines))


def main() -> None:
    if sys.argv[1:2] == ["--bare"]:
        path, name, datatype, device, rows, seconds = sys.argv[2:]
        print(json.dumps(bare(Path(path), name, datatype, device, int(rows), float(seconds))))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--networks", default=",".join(networks.NAMES))
    parser.add_argument("--types", default=",".join(networks.TYPES))
    parser.add_argument("--limits", type=lambda text: [int(each) for each in text.split(",")], default=_LIMITS)
    parser.add_argument("--seconds", type=float, default=5.0, help="of each load")
    parser.add_argument("--room-mb", type=int, default=256, help="for runs, where there is little")
    parser.add_argument("--out", type=Path, default=bench_http.RESULTS / "gpu.json")
    arguments = parser.parse_args()
    found = []
    machine = bench_http.about_machine()
    print(", ".join(f"{name} {value}" for name, value in machine.items()))
    for name in arguments.networks.split(","):
        for datatype in arguments.types.split(","):
            print(f"{name}, {datatype} ...", file=sys.stderr, flush=True)
            found.append(measure(name, datatype, arguments))
            content = {"machine": machine, "device": arguments.device, "found": found}
            arguments.out.write_text(json.dumps(content, indent=1) + "\n")
    print(tell(found, max(arguments.limits)))
    arguments.out.with_suffix(".svg").write_text(plot(found))


if __name__ == "__main__":
    main()
