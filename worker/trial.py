"""A model tried in a process that is thrown away, so that what it says of memory is the model's alone, and nothing that
happens there, or takes too long, is anybody else's.

The process is this module: it gets its task as JSON, and prints what it finds, a line of JSON each, as it finds it. So
what was found before it had to be ended still counts.
"""

from __future__ import annotations

import json
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np
import onnxruntime

from penstock.worker.config import ModelConfig
from penstock.worker.costs import batch_sizes
from penstock.worker.memory import give_back, share_arena
from penstock.worker.model import LOG_FATAL_ONLY, RUN_ERRORS, LoadError, Model, brief, load
from penstock.worker.onnxfile import OnnxFileError, read_onnx
from penstock.worker.probe import FAILURES, SIZES, sample

_STEP_S: Final = 0.5  # for one batch size, unless three runs take longer
_RUNS_MIN: Final = 3
_RUNS_MAX: Final = 2000
_START_S: Final = 2.0  # beside its own time: for the process to start, and for what cannot be foreseen

_UNWRITTEN: Final[tuple[type[Exception], ...]] = (*RUN_ERRORS, OnnxFileError)

Operators = Mapping[tuple[str, str], int]  # nodes of each (domain, type)


@dataclass(frozen=True, slots=True)
class Step:
    """Batches of so many rows: how long one takes, the median of ``runs``, and how many bytes of memory it takes beside
    the loaded model: inputs, outputs, and what ONNX Runtime keeps to run such again."""

    rows: int
    seconds: float
    runs: int
    grown_bytes: int

    @property
    def rows_per_s(self) -> float:
        return self.rows / self.seconds

    @property
    def row_s(self) -> float:
        return self.seconds / self.rows


@dataclass(frozen=True, slots=True)
class Measured:
    """``size``: of symbolic dimensions other than the rows. ``loaded_bytes``: what loading took of memory. ``cut``: why
    there are not all steps, "" when there are."""

    steps: tuple[Step, ...] = ()
    size: int = 0
    loaded_bytes: int = 0
    cut: str = ""


@dataclass(frozen=True, slots=True)
class Optimized:
    """What ONNX Runtime makes of a graph when it loads it. ``problem``: why that is not known, or ""."""

    operators: Operators
    problem: str = ""


# --- in the process that asks ---


def optimize(path: Path, seconds: float) -> Optimized:
    """Have the optimizer write down what it made of a model."""
    operators: dict[tuple[str, str], int] = {}
    problem = f"it took longer than {seconds:.0f} s"
    # Made here: the process may be ended before it could tidy up.
    with tempfile.TemporaryDirectory(prefix="penstock-check-") as directory:
        for line in _try({"task": "optimize", "path": str(path), "directory": directory}, seconds):
            operators = {(domain, kind): count for domain, kind, count in line.get("operators", [])}
            problem = line.get("problem", "")
    return Optimized(operators, problem)


def measure(path: Path, config: ModelConfig, why_alone: str, rows_max: int, seconds: float) -> Measured:
    """Run batches of 1, 2, 4, ... ``rows_max`` rows, or of the sizes that batches are padded to, on made-up inputs, as
    far as the time goes. ``why_alone``: as the model's; then it is one request."""
    task = {
        "task": "measure",
        "path": str(path),
        "config": msgspec.to_builtins(config),
        "why_alone": why_alone,
        "rows_max": rows_max,
        "seconds": seconds,
    }
    steps: list[Step] = []
    about: dict[str, Any] = {"cut": "ended"}
    for line in _try(task, seconds):
        if "rows" in line:
            steps.append(Step(**line))
        else:
            about |= line
    if about["cut"] and not about.get("known"):
        when = f"after batches of {steps[-1].rows} rows" if steps else "before the first batch had run"
        about["cut"] = f"the time was up {when}"
    return Measured(tuple(steps), about.get("size", 0), about.get("loaded_bytes", 0), about["cut"])


def _try(task: Mapping[str, Any], seconds: float) -> Iterator[dict[str, Any]]:
    """What a process of its own says of a task, until its time is up; last how it ended, if that was not meant."""
    command = [sys.executable, "-m", "penstock.worker.trial", json.dumps(task)]
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as tried:
        assert tried.stdout is not None
        up = threading.Event()

        def end() -> None:
            up.set()
            tried.kill()

        timer = threading.Timer(seconds + _START_S, end)
        timer.start()
        try:
            for line in tried.stdout:
                if line.endswith(b"\n"):
                    yield json.loads(line)
            if tried.wait() and not up.is_set():
                yield _ended(tried.returncode)
        finally:
            timer.cancel()
            tried.kill()


def _ended(code: int) -> dict[str, Any]:
    how = f"was ended by signal {-code}" + (", as for want of memory" if code == -9 else "")
    sentence = f"the process that tried it {how if code < 0 else f'failed with exit code {code}'}"
    return {"problem": sentence, "cut": sentence, "known": True}


# --- in the process that is thrown away ---


def _optimize(path: Path, directory: Path) -> Iterator[dict[str, Any]]:
    after = directory / "optimized.onnx"
    options = onnxruntime.SessionOptions()
    options.log_severity_level = LOG_FATAL_ONLY
    options.optimized_model_filepath = str(after)
    # A file of more than 2 GiB cannot be written; weights of their own can.
    options.add_session_config_entry("session.optimized_model_external_initializers_file_name", "weights")
    options.add_session_config_entry("session.optimized_model_external_initializers_min_size_in_bytes", "1024")
    try:
        onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        operators = read_onnx(after).operators
    except _UNWRITTEN as error:
        yield {"problem": brief(error)}
        return
    yield {"operators": [[domain, kind, count] for (domain, kind), count in operators.items()]}


def _measure(
    path: Path, config: ModelConfig, why_alone: str, rows_max: int, seconds: float
) -> Iterator[dict[str, Any]]:
    until = time.monotonic() + seconds
    np.random.default_rng(0).standard_normal(1)  # what numpy loads for it is not the model's
    share_arena(-1)  # as in a worker
    give_back()
    before = _anonymous_bytes()
    try:
        model = load(path, "model", "1", config)
    except LoadError as error:
        yield {"cut": str(error), "known": True}
        return
    if why_alone:
        model.run_alone(why_alone)
    give_back()  # what was only needed to load it
    loaded = _anonymous_bytes()
    size, problem = _find_size(model)
    yield {"size": size, "loaded_bytes": max(0, loaded - before)}
    if problem:
        yield {"cut": f"it could not be run on made-up inputs ({problem})", "known": True}
        return
    sizes = list(model.sizes) or batch_sizes(rows_max) if model.spec.batchable else [1]
    row_s = 0.0
    for at, rows in enumerate(sizes):
        left = until - time.monotonic()
        if row_s * rows * (1 + _RUNS_MIN) > max(0.0, left):
            yield {"cut": f"batches of {rows} rows would take longer than the time there is for this", "known": True}
            return
        try:
            step = _step(model, rows, size, left / (len(sizes) - at), loaded)
        except FAILURES as error:
            yield {"cut": f"a batch of {rows} rows cannot be run ({brief(error)})", "known": True}
            return
        row_s = step["seconds"] / rows
        yield step
    yield {"cut": ""}


def _find_size(model: Model) -> tuple[int, str]:
    """What symbolic dimensions may be, and what is wrong with the first when none is right."""
    problems = []
    for size in SIZES:
        try:
            model.run(sample(model, 1, size))
            return size, ""
        except FAILURES as error:
            problems.append(brief(error))
    return 0, problems[0]


def _step(model: Model, rows: int, size: int, seconds: float, loaded: int) -> dict[str, Any]:
    give_back()  # what other sizes took
    feeds = sample(model, rows, size)
    outputs = model.run(feeds)  # the first of a shape also plans its memory
    took: list[float] = []
    until = time.perf_counter() + min(seconds, _STEP_S)
    while len(took) < _RUNS_MIN or (len(took) < _RUNS_MAX and time.perf_counter() < until):
        start = time.perf_counter()
        outputs = model.run(feeds)
        took.append(time.perf_counter() - start)
    grown = max(0, _anonymous_bytes() - loaded)  # with inputs and outputs, which are there at the same time
    del outputs
    return {"rows": rows, "seconds": statistics.median(took), "runs": len(took), "grown_bytes": grown}


def _anonymous_bytes() -> int:
    """Resident memory of this process that is no file's."""
    status = Path("/proc/self/status").read_text()
    found = re.search(r"^RssAnon:\s*(\d+) kB$", status, re.MULTILINE)
    assert found is not None
    return int(found[1]) << 10


def main() -> None:
    task = json.loads(sys.argv[1])
    path = Path(task["path"])
    if task["task"] == "optimize":
        found = _optimize(path, Path(task["directory"]))
    else:
        config = msgspec.convert(task["config"], ModelConfig)
        found = _measure(path, config, task["why_alone"], task["rows_max"], task["seconds"])
    for line in found:
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
