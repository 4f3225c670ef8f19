"""How much processor time a request over HTTP costs, and how long it takes: ``python bench/http.py``.

Starts a server, drives it with wrk (Debian package ``wrk``) over several models and numbers of connections, and reads
from /proc what each process used meanwhile. Processor time per request repeats within some 15 % on a shared machine;
requests per second and p99 do not: judge by the first, and by ratios within one run. Medians of the repeats go to
standard output as a table, and with everything else to a JSON file.

``--beside`` runs ``peer_servers/fastapi_ort.py``, FastAPI with ONNX Runtime in one process, in turn with it on the
binary cases; other servers are ``peers.py``'s.
``--requests`` adds a long run of mixed sizes, and says by how many MB each process has grown after its first tenth.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":  # this folder comes first then, and this file would pass for the standard library's http
    sys.path[0] = str(Path(__file__).parents[1])

import os

os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # see penstock.worker

import argparse
import json
import platform
import re
import shutil
import signal
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from socket import create_server
from typing import IO, Any, Final
from urllib.error import URLError
from urllib.request import urlopen

import numpy as np
import onnxruntime

from bench import models as bench_models

ROLES: Final = ("gateway", "broker", "worker")
FORMS: Final = ("binary", "json", "binary-id")
RESULTS: Final = Path(__file__).parent / "results"
_MIXED: Final = {"tiny": 90, "mlp": 9, "image": 1}  # percent of the long run: 64 bytes, 4 KB, 602 KB
_TICK_S: Final = 1 / os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Case:
    """A model, how its requests are written (``binary``, ``json``, or ``binary-id``: each with an id of its own), and
    how many connections ask at once."""

    model: str
    form: str
    connections: int


@dataclass(frozen=True)
class Figures:
    """One run, or the medians of several. Microseconds of processor time are per request."""

    requests_per_s: float
    p50_ms: float
    p99_ms: float
    gateway_us: float
    broker_us: float
    worker_us: float
    batch_rows: float
    errors: int

    @property
    def total_us(self) -> float:
        return self.gateway_us + self.broker_us + self.worker_us


class Server:
    """``penstock up`` on a repository of bench models, for the time of a ``with``."""

    def __init__(self, repository: Path, runtime: Path, *arguments: str, log: IO[bytes] | None = None) -> None:
        """``arguments``: more of ``penstock up``. ``log``: where its log goes, instead of to ours."""
        self._log = log
        self._repository = repository
        self._runtime = runtime
        self._arguments = arguments

    def __enter__(self) -> Server:
        command = [sys.executable, "-m", "penstock.bin", "up", str(self._repository), "--http=127.0.0.1:0"]
        self._process = subprocess.Popen(
            [*command, f"--runtime-dir={self._runtime}", "--log-level=warning", *self._arguments],
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            # As other servers have it: Linux shares a desktop's or a shell's processors out by sessions (autogroups),
            # and in ours it would have to share with who makes the load.
            start_new_session=True,
        )
        assert self._process.stdout is not None
        ready = self._process.stdout.readline()
        if not ready.startswith("penstock ready: "):
            self.__exit__()
            sys.exit("bench: the server did not start")
        self.url = ready.split()[-1]
        self.pid = self._process.pid
        self.pids = {role: list(children(self._process.pid, role)) for role in ROLES}
        return self

    def __exit__(self, *error: object) -> None:
        with self._process:  # closes its output
            self._process.send_signal(signal.SIGTERM)
            self._process.wait(60)

    def cpu_s(self, role: str) -> float:
        """Processor time, user and system, of all processes of a role so far."""
        return sum(_cpu_s(pid) for pid in self.pids[role])

    def batches(self) -> tuple[float, float]:
        """How many batches have run, and of how many rows together."""
        text = urlopen(self.url + "/metrics", timeout=10).read().decode()
        count = re.findall(r"^penstock_batch_rows_count\{.*\} (\S+)", text, re.M)
        total = re.findall(r"^penstock_batch_rows_sum\{.*\} (\S+)", text, re.M)
        return sum(map(float, count)), sum(map(float, total))


class Beside:
    """``peer_servers/fastapi_ort.py`` on a repository of bench models, for the time of a ``with``."""

    def __init__(self, repository: Path) -> None:
        self._repository = repository

    def __enter__(self) -> Beside:
        with create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        command = [sys.executable, "-m", "bench.peer_servers.fastapi_ort", str(self._repository), str(port)]
        self._process = subprocess.Popen(command, cwd=Path(__file__).parents[1])
        self.url = f"http://127.0.0.1:{port}"
        while self._process.poll() is None:
            try:
                urlopen(self.url + "/openapi.json", timeout=10).close()
                return self
            except URLError:
                time.sleep(0.1)
        sys.exit("bench: FastAPI did not start; pip install --editable '.[bench]'")

    def __exit__(self, *error: object) -> None:
        self._process.terminate()
        self._process.wait(60)

    def cpu_s(self) -> float:
        return _cpu_s(self._process.pid)


def resident_mb(pid: int | str) -> float:
    """Resident memory of a process that is its own: not what it shares."""
    fields = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    private = [int(line.split()[1]) for line in fields if line.startswith(("Private_", "Swap:"))]
    return sum(private) / 1024


def children(parent: int, role: str) -> Iterator[int]:
    """Processes of a role, such as ``worker``, that a launcher has started."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                status = (entry / "stat").read_text().rpartition(")")[2].split()
                command = (entry / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue  # ended meanwhile
            if int(status[1]) == parent and role.encode() in command:
                yield int(entry.name)


def _cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) * _TICK_S


def request_body(model: str, form: str) -> tuple[bytes, int]:
    """A request for one row, and how many bytes of it are JSON in front of binary data (0: all is JSON)."""
    inputs, binary = [], b""
    for name, array in bench_models.sample(model, 1).items():
        about: dict[str, Any] = {"name": name, "shape": list(array.shape), "datatype": "FP32"}
        if form == "json":
            about["data"] = [float(f"{value:.6g}") for value in array.ravel()]
        else:
            about["parameters"] = {"binary_data_size": array.nbytes}
            binary += array.tobytes()
        inputs.append(about)
    request: dict[str, Any] = {"inputs": inputs}
    if form != "json":
        request["parameters"] = {"binary_data_output": True}
    if form == "binary-id":
        request = {"id": "0000000000000000", **request}
    head = json.dumps(request, separators=(",", ":")).encode()
    return head + binary, 0 if form == "json" else len(head)


def write_raw_script(directory: Path, model: str) -> Path:
    """A wrk script that sends one row as it is."""
    [array] = bench_models.sample(model, 1).values()
    return write_post(directory / "raw.lua", f"/v2/models/{model}/infer", array.tobytes(), {})


def write_post(script: Path, path: str, body: bytes, headers: Mapping[str, str]) -> Path:
    """A wrk script that sends the same again and again; the body lies in a file beside it."""
    file = script.with_suffix(".body")
    file.write_bytes(body)
    lines = [
        f'local file = io.open("{file}", "rb")',
        f'wrk.method, wrk.path, wrk.body = "POST", "{path}", file:read("*a")',
        *(f'wrk.headers["{name}"] = "{value}"' for name, value in headers.items()),
    ]
    script.write_text("\n".join(lines) + "\n")
    return script


def write_mixed_script(directory: Path, models: Mapping[str, int]) -> Path:
    """A wrk script that sends binary requests for several models, as often as their weights say."""
    lines = ["local requests, weights = {}, {}"]
    for model, weight in models.items():
        body, header_length = request_body(model, "binary")
        (directory / model).with_suffix(".body").write_bytes(body)
        headers = f'{{["Inference-Header-Content-Length"] = "{header_length}"}}'
        lines += [
            f'local file = io.open("{directory}/{model}.body", "rb")',
            f'local made = wrk.format("POST", "/v2/models/{model}/infer", {headers}, file:read("*a"))',
            f"for each = 1, {weight} do table.insert(requests, made) end",
        ]
    # wrk.format wants wrk.headers, which are there only when the script is run: so it is made at the first request.
    made = "\n".join(lines)
    script = directory / "mixed.lua"
    script.write_text(
        f"local requests\nlocal function make()\n{made}\nreturn requests\nend\n"
        "function request()\n  requests = requests or make()\n  return requests[math.random(#requests)]\nend\n"
    )
    return script


def grow(server: Server, script: Path, requests: int, connections: int = 32) -> dict[str, float]:
    """By how many MB each process has grown from the first tenth of a long run to its end."""
    pids = [(role, pid) for role in ROLES for pid in server.pids[role]]
    before: dict[int, float] = {}
    sent = 0
    while sent < requests:
        count, _, _, _, failed = run_wrk(server.url, script, connections, 5)
        if failed:
            sys.exit(f"bench: {failed} requests of the long run failed")
        sent += count
        if not before and sent >= requests // 10:
            before = {pid: resident_mb(pid) for _, pid in pids}
    return {role: round(resident_mb(pid) - before[pid], 2) for role, pid in pids}


def write_script(directory: Path, case: Case) -> Path:
    """A wrk script that sends the case's request."""
    body, header_length = request_body(case.model, case.form)
    (directory / "body").write_bytes(body)
    lines = [
        f'local file = io.open("{directory}/body", "rb")',
        'local body = file:read("*a")',
        "file:close()",
        'wrk.method = "POST"',
        f'wrk.path = "/v2/models/{case.model}/infer"',
        "wrk.body = body",
        f'wrk.headers["Content-Type"] = "application/{"octet-stream" if header_length else "json"}"',
    ]
    if header_length:
        lines.append(f'wrk.headers["Inference-Header-Content-Length"] = "{header_length}"')
    if case.form == "binary-id":
        lines += [
            "local count = 0",
            "function request()",
            "  count = count + 1",
            '  return wrk.format(nil, nil, nil, (body:gsub("0000000000000000", string.format("%016d", count), 1)))',
            "end",
        ]
    script = directory / "script.lua"
    script.write_text("\n".join(lines) + "\n")
    return script


def run_wrk(url: str, script: Path, connections: int, seconds: int) -> tuple[int, float, float, float, int]:
    """(requests, requests/s, p50 ms, p99 ms, errors). wrk takes some 0.1 s more than ``seconds``, and counts them too.
    One thread of it is enough for anything that is measured here."""
    command = [
        "wrk",
        "-t1",
        f"-c{connections}",
        f"-d{seconds}s",
        "--latency",
        "--timeout=30s",
        "-s",
        str(script),
        url,
    ]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    requests = int(_find(r"(\d+) requests in", text))
    errors = re.search(r"Non-2xx or 3xx responses: (\d+)", text)
    sockets = re.search(r"Socket errors: connect (\d+), read (\d+), write (\d+), timeout (\d+)", text)
    failed = int(errors[1]) if errors else 0
    failed += sum(map(int, sockets.groups())) if sockets else 0
    return (
        requests,
        float(_find(r"^Requests/sec:\s+(\S+)", text)),
        _milliseconds(_find(r"^\s+50%\s+(\S+)", text)),
        _milliseconds(_find(r"^\s+99%\s+(\S+)", text)),
        failed,
    )


def _find(pattern: str, text: str) -> str:
    found = re.search(pattern, text, re.MULTILINE)
    if found is None:
        sys.exit(f"bench: wrk printed something else than expected:\n{text}")
    return found[1]


def _milliseconds(text: str) -> float:
    for unit, factor in (("us", 1e-3), ("ms", 1.0), ("s", 1e3)):
        if text.endswith(unit):
            return float(text.removesuffix(unit)) * factor
    raise ValueError(text)


def measure_beside(beside: Beside, script: Path, connections: int, seconds: int) -> tuple[float, float]:
    """(requests/s, microseconds of processor time a request)."""
    before = beside.cpu_s()
    requests, requests_per_s, _, _, errors = run_wrk(beside.url, script, connections, seconds)
    if errors:
        sys.exit(f"bench: {errors} requests beside failed")
    return requests_per_s, (beside.cpu_s() - before) / max(1, requests) * 1e6


def measure(server: Server, case: Case, script: Path, seconds: int) -> Figures:
    batches, rows = server.batches()
    before = {role: server.cpu_s(role) for role in ROLES}
    requests, requests_per_s, p50_ms, p99_ms, errors = run_wrk(server.url, script, case.connections, seconds)
    used = {role: (server.cpu_s(role) - before[role]) / max(1, requests) * 1e6 for role in ROLES}
    more_batches, more_rows = server.batches()
    mean = (more_rows - rows) / max(1.0, more_batches - batches)
    return Figures(requests_per_s, p50_ms, p99_ms, used["gateway"], used["broker"], used["worker"], mean, errors)


def medians(runs: Sequence[Figures]) -> Figures:
    by_name = {name: [asdict(run)[name] for run in runs] for name in asdict(runs[0])}
    return Figures(
        **{name: statistics.median(values) for name, values in by_name.items()} | {"errors": sum(by_name["errors"])}
    )


def bare_model_us(model: str, rows: int, seconds: float = 1.0) -> float:
    """What the model itself costs on one thread: microseconds of processor time a row, in batches of ``rows``."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(bench_models.build(model), options, providers=["CPUExecutionProvider"])
    feed = {name: np.concatenate([array] * rows) for name, array in bench_models.sample(model, 1).items()}
    session.run(None, feed)
    runs, start, until = 0, time.thread_time(), time.monotonic() + seconds
    while time.monotonic() < until:
        session.run(None, feed)
        runs += 1
    return (time.thread_time() - start) / runs / rows * 1e6


@contextmanager
def _directory() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="penstock-bench-") as name:
        yield Path(name)


def about_machine() -> dict[str, str]:
    cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "cpu": f"{os.cpu_count()} cores of {cpu[1] if cpu else platform.machine()}",
        "kernel": platform.release(),
        "python": platform.python_version(),
        "onnxruntime": onnxruntime.__version__,
        **{name: version(name) for name in ("penstock", "uvloop", "httptools", "msgpack")},
    }


def print_table(rows: Sequence[tuple[Case, Figures, float]]) -> None:
    print(
        "| model, form | conn. | requests/s | p50 ms | p99 ms "
        "| CPU-us: gateway | broker | worker | sum | over bare | batch |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    for case, each, bare_us in rows:
        errors = f" ({each.errors} errors)" if each.errors else ""
        print(
            f"| {case.model}, {case.form} | {case.connections} | {each.requests_per_s:.0f}{errors} | {each.p50_ms:.2f} "
            f"| {each.p99_ms:.2f} | {each.gateway_us:.1f} | {each.broker_us:.1f} | {each.worker_us:.1f} "
            f"| **{each.total_us:.1f}** | {each.total_us - bare_us:.1f} | {each.batch_rows:.1f} |"
        )


def cases(models: Sequence[str], forms: Sequence[str], connections: Sequence[int]) -> list[Case]:
    """Binary for all; JSON and ids only for the models where they are what a request costs."""
    return [
        Case(model, form, count)
        for model in models
        for form in forms
        if form == "binary" or model == "tiny" or (model, form) == ("wide", "json")
        for count in connections
    ]


def compared(case: Case, runs: Sequence[Figures], others: Sequence[tuple[float, float]]) -> dict[str, Any]:
    """What ``measure_beside`` gave in turn with runs of a case, as medians, and the ratio of the rates."""
    rate, cpu_us = (statistics.median(each) for each in zip(*others, strict=True))
    ratio = statistics.median([own.requests_per_s / other for own, (other, _) in zip(runs, others, strict=True)])
    return asdict(case) | {"requests_per_s": rate, "cpu_us": cpu_us, "ratio": ratio}


def print_compared(others: Sequence[Mapping[str, Any]]) -> None:
    print("\n| FastAPI + ONNX Runtime, raw bytes | conn. | requests/s | CPU-us | Penstock's requests/s to these |")
    print("|---|---|---|---|---|")
    for each in others:
        print(
            f"| {each['model']} | {each['connections']} | {each['requests_per_s']:.0f} | {each['cpu_us']:.0f} "
            f"| **{each['ratio']:.2f}** |"
        )


def words(known: Sequence[str]) -> Callable[[str], list[str]]:
    """For argparse: some of the known words, with commas between them."""

    def words(text: str) -> list[str]:
        found = text.split(",")
        for word in found:
            if word not in known:
                raise argparse.ArgumentTypeError(f"{word!r} is none of {', '.join(known)}")
        return found

    return words


def whole_number(text: str) -> int:
    """For argparse: a whole number from 1 on."""
    if not text.isascii() or not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 1 on")
    return int(text)


def whole_numbers(text: str) -> list[int]:
    return [whole_number(each) for each in text.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    models = bench_models.MODELS
    parser.add_argument("--models", type=words(models), default="tiny,wide,mlp,image", help=f"of {', '.join(models)}")
    parser.add_argument("--forms", type=words(FORMS), default=",".join(FORMS))
    parser.add_argument("--connections", type=whole_numbers, default="1,16,64,256")
    parser.add_argument("--seconds", type=whole_number, default=5, help="for each run; wrk takes whole ones")
    parser.add_argument("--repeats", type=whole_number, default=3)
    parser.add_argument("--beside", action="store_true", help="FastAPI with ONNX Runtime, in turn with it")
    parser.add_argument("--requests", type=int, default=0, help="of mixed sizes, to see memory grow")
    parser.add_argument("--out", type=Path, default=RESULTS / "http.json")
    arguments = parser.parse_args()
    if shutil.which("wrk") is None:
        sys.exit("bench: wrk is missing; on Debian and Ubuntu: apt install wrk")
    wanted = cases(arguments.models, arguments.forms, arguments.connections)
    rows: list[tuple[Case, Figures, float]] = []
    others: list[dict[str, Any]] = []
    growth: dict[str, float] = {}
    with ExitStack() as stack:
        directory = stack.enter_context(_directory())
        repository = bench_models.make_repository(directory / "models", arguments.models)
        server = stack.enter_context(Server(repository, directory / "run"))
        beside = stack.enter_context(Beside(repository)) if arguments.beside else None
        for number, case in enumerate(wanted, start=1):
            print(f"{number}/{len(wanted)} {case}", file=sys.stderr)
            script, raw = write_script(directory, case), write_raw_script(directory, case.model)
            run_wrk(server.url, script, case.connections, 1)
            runs: list[Figures] = []
            by_others: list[tuple[float, float]] = []
            for _ in range(arguments.repeats):
                runs.append(measure(server, case, script, arguments.seconds))
                if beside is not None and case.form == "binary":
                    by_others.append(measure_beside(beside, raw, case.connections, arguments.seconds))
            figures = medians(runs)
            rows.append((case, figures, bare_model_us(case.model, max(1, round(figures.batch_rows)))))
            if by_others:
                others.append(compared(case, runs, by_others))
        if arguments.requests:
            weights = {model: weight for model, weight in _MIXED.items() if model in arguments.models}
            growth = grow(server, write_mixed_script(directory, weights), arguments.requests)
    machine = about_machine()
    print(", ".join(f"{name} {value}" for name, value in machine.items()))
    print_table(rows)
    if others:
        print_compared(others)
    if growth:
        print(f"\nMB grown over {arguments.requests} requests of mixed sizes: {growth}")
    content = {
        "machine": machine,
        "seconds": arguments.seconds,
        "repeats": arguments.repeats,
        "cases": [
            asdict(case) | asdict(figures) | {"total_us": figures.total_us, "bare_us": bare_us}
            for case, figures, bare_us in rows
        ],
        "fastapi": others,
        "requests": arguments.requests,
        "grown_mb": growth,
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
