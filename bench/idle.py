"""What a server costs that nobody asks anything: ``python bench/idle.py``.

Starts a server with two workers, one of its models with two threads, sends some requests to each model over HTTP and
with the client library, and leaves the connections open. Then it reads what processor time each process uses until the
seconds are over, with microseconds that the kernel counts for each thread (/proc/PID/task/TID/schedstat). In percent of
one core; the library's share is that of this process. Goes to standard output as a table, and to a JSON file.
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
import tempfile
import time
from collections.abc import Mapping
from contextlib import ExitStack, closing

from bench import http as bench_http
from bench import models as bench_models
from penstock.client import Client

CONNECTIONS = 16
_MODELS = ("tiny", "mlp")
_THREADED = "mlp"
_REQUESTS = 50  # to each model over each connection


def cpu_ns(pid: int) -> int:
    """Nanoseconds for which the threads of a process have run so far."""
    return sum(int(each.read_text().split()[0]) for each in Path(f"/proc/{pid}/task").glob("*/schedstat"))


def percents(before: Mapping[str, int], after: Mapping[str, int], seconds: float) -> dict[str, float]:
    """Nanoseconds by process -> percent of one core."""
    return {name: (after[name] - before[name]) / seconds / 1e9 * 100 for name in before}


def ask_http(connection: http.client.HTTPConnection) -> None:
    for model in _MODELS:
        body, length = bench_http.request_body(model, "binary")
        for _ in range(_REQUESTS):
            headers = {"Inference-Header-Content-Length": str(length)}
            connection.request("POST", f"/v2/models/{model}/infer", body, headers)
            answer = connection.getresponse()
            said = answer.read()
            if answer.status != 200:
                sys.exit(f"bench: {said!r}")


def ask(client: Client) -> None:
    for model in _MODELS:
        for rows in range(1, _REQUESTS):
            client.infer(model, bench_models.sample(model, 1 + rows % 32))


def measure(seconds: float, connections: int) -> dict[str, float]:
    """Percent of one core, by process."""
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="penstock-bench-")))
        repository = bench_models.make_repository(directory / "models", _MODELS)
        with open(repository / _THREADED / "model.toml", "a") as file:
            file.write("intra_op_threads = 2\n")
        server = stack.enter_context(bench_http.Server(repository, directory / "run", "--workers=2"))
        host = server.url.removeprefix("http://")
        opened = [stack.enter_context(closing(http.client.HTTPConnection(host))) for _ in range(connections)]
        client = stack.enter_context(Client(directory / "run"))
        for connection in opened:
            ask_http(connection)
        ask(client)
        pids = {"penstock up": server.pid}
        for role in (*bench_http.ROLES, "jobs"):
            found = sorted(bench_http.children(server.pid, role))
            pids |= {f"{role} {number}": pid for number, pid in enumerate(found)}
        # This process as well: its client's thread beats.
        time.sleep(2.0)
        before = {name: cpu_ns(pid) for name, pid in pids.items()} | {"client": cpu_ns(os.getpid())}
        start = time.monotonic()
        time.sleep(seconds)
        after = {name: cpu_ns(pid) for name, pid in pids.items()} | {"client": cpu_ns(os.getpid())}
        return percents(before, after, time.monotonic() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=30.0, help="of idleness")
    parser.add_argument("--connections", type=int, default=CONNECTIONS, help="kept alive over HTTP")
    parser.add_argument("--out", type=Path, default=bench_http.RESULTS / "idle.json")
    arguments = parser.parse_args()
    used = measure(arguments.seconds, arguments.connections)
    server = sum(percent for name, percent in used.items() if name != "client")
    machine = bench_http.about_machine()
    print(", ".join(f"{name} {value}" for name, value in machine.items()))
    print(f"{arguments.seconds:g} s idle, {arguments.connections} connections over HTTP and one client library")
    print("| process | percent of one core |\n|---|---|")
    for name, percent in used.items():
        print(f"| {name} | {percent:.3f} |")
    print(f"| **the server** | **{server:.3f}** |")
    content = {"machine": machine, "seconds": arguments.seconds, "connections": arguments.connections}
    arguments.out.write_text(json.dumps(content | {"percent": used, "server": server}, indent=1) + "\n")


if __name__ == "__main__":
    main()
