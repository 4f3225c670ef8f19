"""What an answer that was kept costs, beside one that is computed: ``python bench/cache.py``.

Servers with and without ``response_cache`` run side by side, one gateway each, and are driven by wrk in turns, so
that what else the machine does hits all alike. Processor time is that of all processes of a server, from /proc's
schedstat, for each request. ``live`` is GET /v2/health/live, the least that a request can cost; ``hit``: the same
request again and again; ``hit, of many``: of more inputs than a gateway remembers byte for byte, one after another,
so that each is read, hashed, looked up in the memory that gateways share, and seldom remembered; ``miss``: what is
computed, and kept. Medians of the rounds go to standard output as a table.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).parents[1])

import argparse
import json
import re
import statistics
import subprocess
import tempfile
from collections.abc import Iterator
from typing import Final

import numpy as np

from bench import http as bench_http
from bench import models as bench_models

_CONNECTIONS: Final = 64
_VARIANTS: Final = 20_000  # requests that differ; more than a gateway remembers byte for byte
_MODELS: Final = ("tiny", "mlp")


def run_s(server: bench_http.Server) -> float:
    """Processor time of all processes of a server so far, exactly."""
    total_ns = 0
    for role in bench_http.ROLES:
        for pid in server.pids[role]:
            for thread in Path(f"/proc/{pid}/task").iterdir():
                total_ns += int((thread / "schedstat").read_text().split()[0])
    return total_ns / 1e9


def write_many(script: Path, model: str, bodies: list[bytes], header_length: int) -> Path:
    """A wrk script that sends these one after another."""
    file = script.with_suffix(".bodies")
    file.write_bytes(b"".join(bodies))
    header = f'["Inference-Header-Content-Length"] = "{header_length}"' if header_length else ""
    script.write_text(
        f'local file, requests, at = io.open("{file}", "rb"), nil, 0\n'
        "local function make()\n"
        "  local made = {}\n"
        f"  for each = 1, {len(bodies)} do\n"
        f'    made[each] = wrk.format("POST", "/v2/models/{model}/infer", {{{header}}}, file:read({len(bodies[0])}))\n'
        "  end\n  return made\nend\n"
        "function request()\n"
        "  requests = requests or make()\n"
        f"  at = at % {len(bodies)} + 1\n  return requests[at]\nend\n"
    )
    return script


def variants(model: str) -> tuple[list[bytes], int]:
    """Requests that differ in their inputs. And the length of their JSON part."""
    body, length = bench_http.request_body(model, "binary")
    return [body[:length] + np.float32(number).tobytes() + body[length + 4 :] for number in range(_VARIANTS)], length


def ask(server: bench_http.Server, seconds: int, *arguments: str) -> tuple[float, float]:
    """Microseconds of processor time for each request, and requests a second."""
    before = run_s(server)
    command = ["wrk", "-t1", f"-c{_CONNECTIONS}", f"-d{seconds}s", *arguments]
    said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=seconds + 60).stdout
    used_s = run_s(server) - before
    if "Non-2xx" in said or "Socket errors" in said:
        sys.exit(f"bench: requests failed\n{said}")
    found = re.search(r"(\d+) requests in ([\d.]+)s", said)
    assert found is not None, said
    count = int(found[1])
    return used_s / count * 1e6, count / float(found[2])


def cases(directory: Path) -> Iterator[tuple[str, bool, list[str], str]]:
    """Name, whether it is the server that keeps answers, wrk's arguments, and the path."""
    yield "live", True, [], "/v2/health/live"
    for model in _MODELS:
        path = f"/v2/models/{model}/infer"
        scripts = {}
        for form in ("binary", "json"):
            body, length = bench_http.request_body(model, form)
            headers = {"Inference-Header-Content-Length": str(length)} if length else {}
            scripts[form] = bench_http.write_post(directory / f"{model}-{form}.lua", path, body, headers)
        for form, script in scripts.items():
            yield f"{model}, {form}: computed", False, ["-s", str(script)], ""
            yield f"{model}, {form}: hit", True, ["-s", str(script)], ""
        script = write_many(directory / f"{model}-others.lua", model, *variants(model))
        yield f"{model}, binary: hit, of many", True, ["-s", str(script)], ""
        yield f"{model}, binary: computed, all differ", False, ["-s", str(script)], ""
        headers_script = script.with_name(f"{model}-misses.lua")
        headers_script.write_text(script.read_text().replace("{[", '{["Cache-Control"] = "no-cache", [', 1))
        yield f"{model}, binary: miss (no-cache, kept)", True, ["-s", str(headers_script)], ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=int, default=3, help="of each run")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, default=bench_http.RESULTS / "cache.json")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="penstock-bench-") as folder:
        directory = Path(folder)
        repositories = [bench_models.make_repository(directory / name, _MODELS) for name in ("kept", "computed")]
        for model in _MODELS:
            with (repositories[0] / model / "model.toml").open("a") as file:
                file.write("response_cache = true\n")
        found: dict[str, list[tuple[float, float]]] = {}
        with (
            bench_http.Server(repositories[0], directory / "run0") as kept,
            bench_http.Server(repositories[1], directory / "run1") as computed,
        ):
            for _ in range(options.rounds):
                for name, is_kept, arguments, path in cases(directory):
                    server = kept if is_kept else computed
                    found.setdefault(name, []).append(ask(server, options.seconds, *arguments, server.url + path))
    machine = bench_http.about_machine()
    print(", ".join(f"{name} {value}" for name, value in machine.items()))
    print(f"{_CONNECTIONS} connections, {options.rounds} rounds of {options.seconds} s, medians (least)")
    print("| case | CPU-us | least | requests/s |")
    print("|---|---|---|---|")
    rows = {}
    for name, runs in found.items():
        costs = [cost for cost, _ in runs]
        rows[name] = {"us": statistics.median(costs), "least_us": min(costs), "per_s": max(rate for _, rate in runs)}
        row = rows[name]
        print(f"| {name} | **{row['us']:.1f}** | {row['least_us']:.1f} | {row['per_s']:.0f} |")
    options.json.write_text(json.dumps({"machine": machine, "cases": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
