"""What ``penstock simulate`` says of the load that bench/overload.py puts on a real server.

The simulator runs the server's own scheduler and batcher, and has to be told what only a machine knows: how long
batches take, by how much that varies, and how long messages are under way. That is asked of the server itself, under
loads of their own between the measured ones: some requests want an explanation, and their answers say in which batch
they ran, how many rows it had, how long it took, and how much of their time lay outside queue and batch. What
latencies, batches and goodput follow from that at each load is the simulator's to say, and the server's to confirm.
"""

from __future__ import annotations

import http.client
import json
import math
import statistics
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from time import monotonic
from typing import Any, Final, NamedTuple
from urllib.parse import urlsplit

from bench.peerlist import Request
from penstock.simulate.costs import BatchCost, table_of
from penstock.simulate.figures import Figures
from penstock.simulate.read import read_scenario
from penstock.simulate.run import run

TIMES: Final = (1.5, 0.9, 0.6, 0.2)  # the capacity, that are offered meanwhile
BUSY_TIMES: Final = 0.5  # from which on a worker is never without work
AGREE: Final = 0.15  # of what the server did, by which the simulator may be off
COMPARED: Final = ("goodput", "p50_ms", "p99_ms", "batch_rows")
_SIZES: Final = (1, 2, 4, 8, 12, 16, 20, 24, 28, 32)
_SEEN_MIN: Final = 5
_NEAR_S: Final = 0.2  # two answers that say whether a slow moment lasts
_PAIRS_MIN: Final = 30
_ALIKE_MIN: Final = 0.05  # below, it is chance
_ALIKE_MAX: Final = 0.95
_HOPS: Final = 3  # of a request and its answer, between gateway, broker and worker
_ASK_EVERY_S: Final = 0.03
_PATIENCE_S: Final = 10.0


class Seen(NamedTuple):
    """A request that was explained: when, in seconds of one clock; its batch; and the time that it was in neither queue
    nor batch, inside the server and outside, in ms."""

    at: float
    rows: int
    batch_ms: float
    inside_ms: float
    outside_ms: float


class Known(NamedTuple):
    """What a scenario has of a machine. ``batch_ms``: by rows. ``lasts_ms``: slow moments, as a scenario's
    ``jitter_lasts``."""

    batch_ms: Mapping[int, float]
    jitter: float
    lasts_ms: float
    hop_ms: float
    client_ms: float


# --- what is asked of the server


def with_parameters(request: Request, **parameters: object) -> Request:
    """A binary request of the v2 protocol that says these, too."""
    length = int(request.headers["Inference-Header-Content-Length"])
    head = json.loads(request.body[:length])
    head.setdefault("parameters", {}).update(parameters)
    said = json.dumps(head, separators=(",", ":")).encode()
    headers = {**request.headers, "Inference-Header-Content-Length": str(len(said))}
    return Request(request.path, said + request.body[length:], headers)


def read_seen(said: Mapping[str, Any], at: float, seconds: float) -> Seen:
    """``said``: an answer's parameters; ``at``: when it came; ``seconds``: what it took for the client."""
    return Seen(at, said["batch_rows"], said["batch_ms"], said["rest_ms"], max(0.0, seconds * 1e3 - said["total_ms"]))


@contextmanager
def asking(url: str, request: Request, seen: list[Seen]) -> Iterator[None]:
    """Asks now and then, one request after another, and notes what is explained. What is refused explains nothing."""
    place, wanted, stop = urlsplit(url), with_parameters(request, explain=True), threading.Event()
    assert place.hostname is not None

    def ask(connection: http.client.HTTPConnection) -> None:
        while not stop.wait(_ASK_EVERY_S):
            begin = monotonic()
            connection.request("POST", wanted.path, wanted.body, dict(wanted.headers))
            response = connection.getresponse()
            body = response.read()
            end = monotonic()
            if response.status == 200:
                length = int(response.headers["Inference-Header-Content-Length"])
                seen.append(read_seen(json.loads(body[:length])["parameters"], end, end - begin))

    connection = http.client.HTTPConnection(place.hostname, place.port, timeout=_PATIENCE_S)
    thread = threading.Thread(target=ask, args=(connection,), name="explained")
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        connection.close()


def pause_ms(rows: float, rate: float, batch_ms: float) -> float:
    """Between two batches of a device that is never without work: ``rows`` of a batch, ``rate`` of them a second."""
    return max(0.0, rows / rate * 1e3 - batch_ms)


def learn(seen: Sequence[Seen]) -> Known:
    """``seen``: with the pauses between batches in ``batch_ms``. Raises ValueError when that is too little."""
    batch_ms: dict[int, float] = {}
    for size in _SIZES:
        near = [each.batch_ms for each in seen if min(_SIZES, key=lambda of: abs(of - each.rows)) == size]
        if len(near) >= _SEEN_MIN:
            batch_ms[size] = max(statistics.median(near), *batch_ms.values(), 0.0)
    if len(batch_ms) < 2 or _SIZES[-1] not in batch_ms:
        raise ValueError(f"{len(seen)} answers say too little of what batches take")
    cost = BatchCost(table=table_of(batch_ms))
    ratios = [math.log(each.batch_ms / cost.mean(each.rows)) for each in seen]
    return Known(
        batch_ms,
        statistics.pstdev(ratios),
        lasts_s([each.at for each in seen], ratios) * 1e3,
        statistics.median(each.inside_ms for each in seen) / _HOPS,
        statistics.median(each.outside_ms for each in seen) / 2,
    )


def lasts_s(at: Sequence[float], ratios: Sequence[float]) -> float:
    """How long a slow moment lasts, to 1/e: from how alike ``ratios`` are that follow each other soon. 0: they are
    not."""
    pairs = [
        (after - before, one, other)
        for before, after, one, other in zip(at, at[1:], ratios, ratios[1:], strict=False)
        if after - before <= _NEAR_S
    ]
    if len(pairs) < _PAIRS_MIN:
        return 0.0
    gaps, ones, others = zip(*pairs, strict=True)
    if min(map(statistics.pstdev, (ones, others))) == 0.0:
        return 0.0
    alike = statistics.correlation(ones, others)
    return -statistics.fmean(gaps) / math.log(min(alike, _ALIKE_MAX)) if alike > _ALIKE_MIN else 0.0


# --- what the simulator says


def scenario(known: Known, capacity: float, deadline_ms: float, times: Sequence[float], seconds: float) -> str:
    """A scenario file for the same model and loads."""
    sizes = ", ".join(f"{rows} = {ms:.2f}" for rows, ms in known.batch_ms.items())
    return f"""# The compute-bound model of bench/models.py, asked for up to four times what its worker can do.
# Every request has {deadline_ms:g} ms. Written by bench/overload.py, which put the same load on a real server.

duration = "{seconds + 2:g}s"
warmup = "2s"
seed = 1

[[models]]
name = "heavy"
max_batch_size = 32
batch_ms = {{ {sizes} }}
jitter = {known.jitter:.3f}
jitter_lasts = "{known.lasts_ms:.0f}ms"

[[workers]]
name = "cpu"

[[traffic]]
name = "requests"
model = "heavy"
rate = {capacity:.0f}
deadline = "{deadline_ms:g}ms"

[delays]
client = "{known.client_ms * 1e3:.0f}us"
hop = "{known.hop_ms * 1e3:.0f}us"

[sweep]
load = [{", ".join(f"{each:g}" for each in times)}]
"""


def simulate(path: Path) -> list[dict[str, float]]:
    """What comes of each load of a scenario file, in the words of bench/overload.py. Raises ScenarioError."""
    return [as_turn(case.load, run(case, label)) for label, case in read_scenario(path).cases()]


def as_turn(times: float, figures: Figures) -> dict[str, float]:
    total = figures.total
    return {
        "times": times,
        "goodput": total.good / figures.seconds,
        "p50_ms": total.latency.quantile(0.5) / 1e6,
        "p99_ms": total.latency.quantile(0.99) / 1e6,
        "batch_rows": figures.batches["heavy"].mean_rows,
    }


def off_by(said: Mapping[str, float], measured: Mapping[str, Any]) -> dict[str, float]:
    """By how much of what was measured the simulator is off, by figure."""
    return {name: said[name] / measured[name] - 1 for name in COMPARED if measured.get(name)}
