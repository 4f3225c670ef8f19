"""What sharing weights saves and costs: memory, start and speed, with the store of prepared models and without.

    python bench/store.py [--megabytes 384] [--rounds 20] [--out bench/results/store.json] [MODEL...]

Three models of random weights, as large as asked for: `dense` (float32 layers of 4096), `conv` (3x3 convolutions of
1024 channels) and `int8` (layers of 4096, quantized as they run). For each:

- `penstock models prepare`, and how long it takes;
- `penstock up` with one worker and with four, with the store and without: the proportional set size (PSS) of all
  workers together once they have run the model, and how long the model took to load;
- both sessions in one process, in turn, the same batch: the median of each, and whether the answers are the same bits.

The arenas are made small (4 MiB), so that memory is that of the models and of Python.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

from penstock.worker.config import ModelConfig
from penstock.worker.model import Model, load
from penstock.worker.store import Store

PENSTOCK = [sys.executable, "-m", "penstock.bin"]
START_MAX_S = 120.0
ROWS = 8
SIDE = 4096
CHANNELS = 1024
WORKERS = (1, 4)
PSS_BAR = 1.4  # four workers to one
SPEED_BAR = 1.05  # shared to plain


# --- the models


def build_dense(nbytes: int) -> onnx.ModelProto:
    rng, nodes, weights, at = np.random.default_rng(0), [], {}, "x"
    for layer in range(max(1, nbytes // (SIDE * SIDE * 4))):
        weights[f"w{layer}"] = rng.standard_normal((SIDE, SIDE), np.float32) / np.float32(SIDE**0.5)
        nodes.append(helper.make_node("MatMul", [at, f"w{layer}"], [f"m{layer}"]))
        nodes.append(helper.make_node("Relu", [f"m{layer}"], [f"h{layer}"]))
        at = f"h{layer}"
    return make(nodes, weights, at, (SIDE,))


def build_conv(nbytes: int) -> onnx.ModelProto:
    rng, nodes, weights, at = np.random.default_rng(0), [], {}, "x"
    for layer in range(max(1, nbytes // (CHANNELS * CHANNELS * 9 * 4))):
        shape = (CHANNELS, CHANNELS, 3, 3)
        weights[f"w{layer}"] = rng.standard_normal(shape, np.float32) / np.float32((CHANNELS * 4) ** 0.5)
        nodes.append(helper.make_node("Conv", [at, f"w{layer}"], [f"c{layer}"], pads=[1, 1, 1, 1]))
        nodes.append(helper.make_node("Relu", [f"c{layer}"], [f"h{layer}"]))
        at = f"h{layer}"
    return make(nodes, weights, at, (CHANNELS, 2, 2))


def build_int8(nbytes: int) -> onnx.ModelProto:
    """As ONNX Runtime's dynamic quantization writes it."""
    rng, nodes, at = np.random.default_rng(0), [], "x"
    weights: dict[str, Any] = {"scale": np.array(0.0004, np.float32), "zero": np.array(0, np.int8)}
    for layer in range(max(1, nbytes // (SIDE * SIDE))):
        weights[f"w{layer}"] = rng.integers(-100, 101, (SIDE, SIDE), np.int8)
        names = [f"{each}{layer}" for each in ("q", "s", "z")]
        nodes += [
            helper.make_node("DynamicQuantizeLinear", [at], names),
            helper.make_node("MatMulInteger", [names[0], f"w{layer}", names[2], "zero"], [f"i{layer}"]),
            helper.make_node("Cast", [f"i{layer}"], [f"f{layer}"], to=TensorProto.FLOAT),
            helper.make_node("Mul", [names[1], "scale"], [f"b{layer}"]),
            helper.make_node("Mul", [f"f{layer}", f"b{layer}"], [f"m{layer}"]),
            helper.make_node("Relu", [f"m{layer}"], [f"h{layer}"]),
        ]
        at = f"h{layer}"
    return make(nodes, weights, at, (SIDE,))


def make(nodes: list[onnx.NodeProto], weights: dict[str, Any], last: str, row: tuple[int, ...]) -> onnx.ModelProto:
    nodes[-1].output[0] = "y"
    ports = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", *row]) for name in "xy"]
    tensors = [numpy_helper.from_array(value, name) for name, value in weights.items()]
    graph = helper.make_graph(nodes, "bench", ports[:1], ports[1:], tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


MODELS: dict[str, Callable[[int], onnx.ModelProto]] = {"dense": build_dense, "conv": build_conv, "int8": build_int8}


# --- servers


def measure_server(folder: Path, models: Path, store: bool, workers: int) -> dict[str, Any]:
    """PSS of all workers together in MB, and the seconds that the slowest took to load."""
    config = folder / "penstock.toml"
    least = 4 << 20 if store else 1 << 60
    config.write_text(
        f'[worker]\nstore = "{folder}/store"\nstore_min_bytes = {least}\narena_bytes = {4 << 20}\n'
        f"[gateway]\narena_bytes = {4 << 20}\nbody_bytes_max = {1 << 20}\n"
    )
    log = folder / "log"
    command = [*PENSTOCK, "up", str(models), f"--workers={workers}", f"--config={config}", "--http=127.0.0.1:0"]
    command += [f"--runtime-dir={folder}/run", "--log-format=json"]
    with log.open("wb") as errors:
        server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors)
    assert server.stdout is not None
    try:
        if not server.stdout.readline().startswith(b"penstock ready"):
            raise SystemExit(log.read_text())
        until = time.monotonic() + START_MAX_S
        while len(loads := find_loads(log)) < workers:
            if time.monotonic() > until:
                raise SystemExit(f"only {len(loads)} of {workers} workers loaded: {log.read_text()}")
            time.sleep(0.1)
        ways = {each["weights"] for each in loads}
        assert ways == {"shared" if store else "private"}, ways
        return {
            "pss_mb": sum(pss_mb(each["pid"]) for each in loads),
            "load_s": max(each["seconds"] for each in loads),
        }
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait()
        server.stdout.close()


def find_loads(log: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    return [line for line in lines if line["event"] == "model loaded"]


def pss_mb(pid: int) -> float:
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    found = re.search(r"^Pss: +(\d+) kB", text, re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024 / 1e6


# --- speed


def measure_speed(path: Path, store: Store, rounds: int) -> dict[str, Any]:
    """Medians in ms of the same batch on both, in turn."""
    plain = load(path, "plain", "1", ModelConfig())
    shared = load(path, "shared", "1", ModelConfig(), store)
    assert shared.weights is not None
    assert shared.weights.shared
    shape = [ROWS, *plain.spec.inputs[0].shape[1:]]
    x = np.random.default_rng(1).standard_normal(shape).astype(np.float32)
    one, other = plain.run([x])[0], shared.run([x])[0]
    times: dict[str, list[float]] = {"plain": [], "shared": []}
    for turn in range(2 * rounds):
        pair: list[tuple[str, Model]] = [("plain", plain), ("shared", shared)]
        for name, model in pair if turn % 2 else reversed(pair):
            begin = time.perf_counter()
            model.run([x])
            times[name].append((time.perf_counter() - begin) * 1e3)
    medians = {f"{name}_ms": statistics.median(each) for name, each in times.items()}
    return medians | {"identical": one.tobytes() == other.tobytes(), "some": bool(np.abs(one).max() > 0)}


def measure(name: str, nbytes: int, rounds: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="penstock-bench-") as given:
        folder = Path(given)
        path = folder / "models" / name / "1" / "model.onnx"
        path.parent.mkdir(parents=True)
        onnx.save(MODELS[name](nbytes), path)
        size = path.stat().st_size
        (folder / "penstock.toml").write_text(f'[worker]\nstore = "{folder}/store"\n')
        begin = time.monotonic()
        command = [*PENSTOCK, "models", "prepare", str(folder / "models"), f"--config={folder}/penstock.toml"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        result: dict[str, Any] = {"weights_mb": size / 1e6, "prepare_s": time.monotonic() - begin}
        for way in "shared", "plain":
            for workers in WORKERS:
                found = measure_server(folder, folder / "models", way == "shared", workers)
                result |= {f"{way}_{workers}_{key}": value for key, value in found.items()}
            result[f"{way}_ratio"] = result[f"{way}_4_pss_mb"] / result[f"{way}_1_pss_mb"]
        result |= measure_speed(path, Store(folder / "store"), rounds)
        result["speed"] = result["shared_ms"] / result["plain_ms"]
        return result


COLUMNS = {
    "weights MB": "weights_mb",
    "prepare s": "prepare_s",
    "1: MB": "shared_1_pss_mb",
    "4: MB": "shared_4_pss_mb",
    "ratio": "shared_ratio",
    "load s": "shared_4_load_s",
    "batch ms": "shared_ms",
    "plain 1: MB": "plain_1_pss_mb",
    "4: MB ": "plain_4_pss_mb",
    "ratio ": "plain_ratio",
    "load s ": "plain_4_load_s",
    "batch ms ": "plain_ms",
    "speed": "speed",
}


def table(results: dict[str, dict[str, Any]]) -> str:
    lines = ["model  " + "  ".join(COLUMNS)]
    for name, result in results.items():
        cells = [f"{result[key]:.{0 if key.endswith('mb') else 2}f}".rjust(len(head)) for head, key in COLUMNS.items()]
        lines.append(f"{name:5}  {'  '.join(cells)}  {'same bits' if result['identical'] else 'OTHER BITS'}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=384, help="of weights, 2**20 bytes each")
    parser.add_argument("--rounds", type=int, default=20, help="half of the batches that are timed on each")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "store.json")
    parser.add_argument("models", nargs="*", default=list(MODELS), help="which")
    arguments = parser.parse_args()
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"
    results = {name: measure(name, arguments.megabytes << 20, arguments.rounds) for name in arguments.models}
    met = {
        name: each["shared_ratio"] <= PSS_BAR and each["speed"] <= SPEED_BAR and each["identical"] and each["some"]
        for name, each in results.items()
    }
    cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    machine = (
        f"{os.cpu_count()} cores of {cpu[1] if cpu else platform.machine()}, ONNX Runtime {onnxruntime.__version__}"
    )
    text = f"{machine}\n\n{table(results)}" + (
        f"\n\nBars: four workers hold at most {PSS_BAR} times what one does, a batch takes at most {SPEED_BAR} times a "
        f"plain session's, the same bits.\nMet: {', '.join(f'{name} {each}' for name, each in met.items())}.\n"
    )
    print(text)
    arguments.out.write_text(json.dumps({"machine": machine, "models": results}, indent=1) + "\n")
    arguments.out.with_suffix(".txt").write_text(text)
    sys.exit(not all(met.values()))


if __name__ == "__main__":
    main()
