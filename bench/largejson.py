"""Whether large JSON holds other requests up: ``python bench/largejson.py``.

One client asks the model ``tiny`` one binary request after another over one connection, and between them whether the
gateway is live, which nobody else has a part in; it notes how long each took.
Beside it another process asks for 50 MB of JSON, in or out, again and again: with the gateway's processes for that, or
without them (``json_processes_max = 0``), where the loop does it. ``busy`` is no request but a process that
computes, as niced as those are, and ``binary`` asks for the same tensors without JSON: what of the delay is the
machine's, and what the model's. Bar: no answer that is the gateway's alone comes more than 20 ms later than the slowest
one beside ``busy``.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":  # this folder comes first then, and http.py would pass for the standard library's
    sys.path[0] = str(Path(__file__).parents[1])

import argparse
import contextlib
import json
import multiprocessing
import os
import socket
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from multiprocessing.synchronize import Event
from typing import Any, Final

from onnx import TensorProto, helper, save_model

from bench import http as bench_http
from bench import models as bench_models

BAR_MS: Final = 20.0
KINDS: Final = ("alone", "busy", "binary in", "binary out", "in", "out", "tensorflow")
JSON: Final = ("in", "out", "tensorflow")
_SIDE: Final = 2000  # numbers in a row of the model that is asked much
_DIGITS: Final = 8


def make_wide(path: Path, function: str) -> None:
    """y of x [N, 2000]: ``Identity``, or ``ReduceSum`` to [N, 1]; or of x [N, 1] repeated to [N, 2000]."""
    wide: tuple[str | int, ...] = ("N", _SIDE)
    thin: tuple[str | int, ...] = ("N", 1)
    constants = []
    if function == "Identity":
        nodes, before, after = [helper.make_node("Identity", ["x"], ["y"])], wide, wide
    elif function == "ReduceSum":
        constants = [helper.make_tensor("axes", TensorProto.INT64, [1], [1])]
        nodes, before, after = [helper.make_node("ReduceSum", ["x", "axes"], ["y"])], wide, thin
    else:
        constants = [helper.make_tensor("repeats", TensorProto.INT64, [2], [1, _SIDE])]
        nodes, before, after = [helper.make_node("Tile", ["x", "repeats"], ["y"])], thin, wide
    graph = helper.make_graph(
        nodes,
        function,
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, before)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, after)],
        constants,
    )
    model = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", bench_models.OPSET)], ir_version=bench_models.IR_VERSION
    )
    (path / "1").mkdir(parents=True)
    save_model(model, path / "1" / "model.onnx")
    (path / "model.toml").write_text("max_batch_size = 4096\n")


def large_request(kind: str, megabytes: int) -> tuple[str, bytes, str]:
    """The path and the body of what asks for so much JSON, or for the same tensors as they are; and more headers."""
    count = megabytes * 1_000_000 // (_DIGITS + 3)
    rows = count // _SIDE
    if kind.startswith("binary"):
        columns, model = (_SIDE, "sum") if kind == "binary in" else (1, "tile")
        parameters = f'"parameters":{{"binary_data_size":{4 * rows * columns}}}'
        about = f'{{"name":"x","datatype":"FP32","shape":[{rows},{columns}],{parameters}}}'
        text = f'{{"parameters":{{"binary_data_output":true}},"inputs":[{about}]}}'
        more = f"Inference-Header-Content-Length: {len(text)}\r\n"
        return f"/v2/models/{model}/infer", text.encode() + bytes(4 * rows * columns), more
    if kind == "out":
        data = ",".join(f"{at / 7:.{_DIGITS}f}" for at in range(rows))
        about = f'{{"name":"x","datatype":"FP32","shape":[{rows},1],"data":[{data}]}}'
        return "/v2/models/tile/infer", f'{{"inputs":[{about}]}}'.encode(), ""
    row = ",".join(f"{at / _SIDE:.{_DIGITS}f}" for at in range(_SIDE))
    if kind == "tensorflow":
        return "/v1/models/sum:predict", f'{{"inputs":[{",".join([f"[{row}]"] * rows)}]}}'.encode(), ""
    data = ",".join([row] * rows)
    return (
        "/v2/models/sum/infer",
        f'{{"inputs":[{{"name":"x","datatype":"FP32","shape":[{rows},{_SIDE}],"data":[{data}]}}]}}'.encode(),
        "",
    )


def head_of(path: str, length: int, more: str = "") -> bytes:
    return f"POST {path} HTTP/1.1\r\nHost: bench\r\n{more}Content-Length: {length}\r\n\r\n".encode()


def ask(channel: socket.socket, request: bytes) -> tuple[int, int]:
    """The status of an answer, and the bytes of its body."""
    channel.sendall(request)
    heard = b""
    while b"\r\n\r\n" not in heard:
        heard += channel.recv(1 << 20)
    head, _, rest = heard.partition(b"\r\n\r\n")
    length = next(int(line[15:]) for line in head.split(b"\r\n") if line.lower().startswith(b"content-length:"))
    left = length - len(rest)
    while left:
        left -= len(channel.recv(min(left, 1 << 20)))
    return int(head.split()[1]), length


def ask_for_much(port: int, kind: str, megabytes: int, ready: Event, stop: Event, told: Any) -> None:
    """In a process of its own: one large request after another. Tells how many, how long they took, and their bytes."""
    if kind == "busy":
        os.nice(5)
        ready.set()
        while not stop.is_set():
            sum(range(100_000))
        told.put((0, 0.0, 0, 0))
        return
    path, body, more = large_request(kind, megabytes)
    request = head_of(path, len(body), more) + body
    took: list[float] = []
    length = 0
    with socket.create_connection(("127.0.0.1", port), timeout=60) as channel:
        while not stop.is_set():
            begin = time.monotonic()
            status, length = ask(channel, request)
            if status != 200:
                told.put((-status, 0.0, 0, 0))
                ready.set()
                return
            took.append(time.monotonic() - begin)
            ready.set()  # the first has started what it takes
    told.put((len(took), statistics.median(took), len(body), length))


def measure(server: bench_http.Server, kind: str, seconds: float, megabytes: int) -> dict[str, Any]:
    port = int(server.url.rpartition(":")[2])
    body, json_bytes = bench_http.request_body("tiny", "binary")
    more = f"Inference-Header-Content-Length: {json_bytes}\r\n"
    small = head_of("/v2/models/tiny/infer", len(body), more) + body
    context = multiprocessing.get_context("spawn")
    ready, stop, told = context.Event(), context.Event(), context.Queue()
    live = b"GET /v2/health/live HTTP/1.1\r\nHost: bench\r\n\r\n"
    took: dict[str, list[float]] = {"tiny": [], "live": []}
    with ExitStack() as stack:
        channel = stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=60))
        asker = None
        if kind != "alone":
            asker = context.Process(target=ask_for_much, args=(port, kind, megabytes, ready, stop, told))
            asker.start()
            if not ready.wait(60):
                sys.exit("bench: the first large request was not answered")
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            for name, request in (("tiny", small), ("live", live)):
                begin = time.monotonic()
                status, _ = ask(channel, request)
                assert status == 200
                took[name].append(time.monotonic() - begin)
        large: tuple[int, float, int, int] = (0, 0.0, 0, 0)
        if asker is not None:
            stop.set()
            large = told.get(timeout=60)
            asker.join(60)
    if large[0] < 0:
        sys.exit(f"bench: {kind} was answered with {-large[0]}")
    return {name: summary(each) for name, each in took.items()} | {
        "large": large[0],
        "large_s": large[1],
        "large_in_mb": large[2] / 1e6,
        "large_out_mb": large[3] / 1e6,
    }


def summary(took: list[float]) -> dict[str, float]:
    """Milliseconds."""
    ordered = sorted(took)
    return {
        "requests": len(ordered),
        "median": 1e3 * statistics.median(ordered),
        "p99": 1e3 * ordered[int(0.99 * len(ordered))],
        "max": 1e3 * ordered[-1],
        "over_20": sum(each > BAR_MS / 1e3 for each in ordered),
    }


@contextlib.contextmanager
def serving(processes: int) -> Iterator[bench_http.Server]:
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="penstock-bench-")))
        repository = bench_models.make_repository(directory / "models", ["tiny"])
        make_wide(repository / "sum", "ReduceSum")
        make_wide(repository / "tile", "Tile")
        config = directory / "penstock.toml"
        config.write_text(f"[gateway]\njson_processes_max = {processes}\n")
        yield stack.enter_context(bench_http.Server(repository, directory / "run", f"--config={config}", "--workers=1"))


def line_of(case: str, got: dict[str, Any]) -> str:
    line = f"{case:<26}"
    for name in ("tiny", "live"):
        each = got[name]
        line += f"{each['requests']:>7}{each['median']:>8.2f}{each['p99']:>8.2f}{each['max']:>9.2f}{each['over_20']:>5}"
    return f"{line}{got['large']:>7}{got['large_s']:>8.2f}"


def main() -> int:
    parser = argparse.ArgumentParser(description="Whether large JSON holds other requests up.")
    parser.add_argument("--seconds", type=float, default=10.0, help="of each case")
    parser.add_argument("--megabytes", type=int, default=50)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--without", action="store_true", help="on the loop, too")
    parser.add_argument("--output", type=Path, default=bench_http.RESULTS / "largejson.json")
    options = parser.parse_args()
    heading = f"{'':>7}{'median':>8}{'p99':>8}{'max':>9}{'>20':>5}"
    print(
        f"{'ms, beside':<26}{heading.replace(' ' * 7, '   tiny', 1)}{heading.replace(' ' * 7, '   live', 1)}"
        f"{'large':>7}{'s each':>8}"
    )
    results: dict[str, Any] = {}
    for processes in (2, 0) if options.without else (2,):
        with serving(processes) as server:
            for kind in options.kinds:
                if not (processes or kind in JSON):
                    continue
                case = kind if processes else f"{kind}, on the loop"
                results[case] = measure(server, kind, options.seconds, options.megabytes)
                print(line_of(case, results[case]), flush=True)
    about = {"seconds": options.seconds, "megabytes": options.megabytes, "processors": os.cpu_count()}
    options.output.write_text(json.dumps({**about, "cases": results}, indent=1) + "\n")
    base = results.get("busy") or results.get("alone")
    worst = max(
        (got["live"]["max"] for case, got in results.items() if got["large"] and "loop" not in case), default=0.0
    )
    if base and worst > base["live"]["max"] + BAR_MS:
        print(f"bar missed: {worst:.1f} ms at worst, {base['live']['max']:.1f} without; {BAR_MS:g} ms more are allowed")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
