"""What a decision of the broker costs, and how that grows: ``python bench/scheduler.py``.

The broker's core alone, with messages as they come out of the codec: workers are full, requests wait, and in turn
one batch is done, one request comes, and the broker gives out another one. A decision is all of that. One thing is
varied at a time: how many requests wait, models, tenants, workers. Each figure is the median of some rounds, and
is to grow as the logarithm of what is varied, or less. Results go to standard output as a
table, and to a JSON file.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    # Run as a script, this folder would come first, and hide the modules that it has namesakes of.
    sys.path[0] = str(Path(__file__).parents[1])

import argparse
import gc
import json
import statistics
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Final

from bench import http as bench_http
from penstock.broker.core import Core
from penstock.broker.events import FromCaller, FromWorker, ToWorker
from penstock.broker.options import BrokerOptions
from penstock.wire.events import Tick
from penstock.wire.messages import (
    Assign,
    Attached,
    CallerHello,
    Cost,
    Costs,
    Done,
    Finished,
    Form,
    Requests,
    Submit,
    WorkerHello,
)
from penstock.wire.models import READY, ModelSpec, ModelState, TensorSpec

_CALLER: Final = b"a caller"
_HOUR_US: Final = 3_600_000_000
_STEP_S: Final = 1e-6
_TENSOR: Final = TensorSpec("x", "FP32", (-1, 16))
BASE: Final = 1000  # requests that wait where something else is varied


@dataclass(frozen=True)
class Setting:
    queued: int
    models: int
    tenants: int
    workers: int


SETTINGS: Final = (
    *[Setting(queued, 1, 1, 1) for queued in (100, 1000, 10_000, 100_000)],
    *[Setting(BASE, models, 1, 1) for models in (10, 100, 1000)],
    *[Setting(BASE, 1, tenants, 1) for tenants in (10, 100, 1000)],
    *[Setting(BASE, 1, 1, workers) for workers in (10, 100, 1000, 10_000)],
    Setting(100_000, 1000, 1000, 1000),
)


class Hall:
    """A broker's core in the state that a setting says, with every worker full."""

    def __init__(self, setting: Setting) -> None:
        many = 1 << 30
        options = BrokerOptions(
            queue_requests_max=many,
            queue_rows_max=many,
            held_requests_max=many,
            held_rows_max=many,
            caller_requests_max=many,
            workers_max=many,
            silence_max_s=1e9,
            busy_silence_max_s=1e9,
        )
        self.now = 1000.0
        self.core = Core(options, 1, self.now)
        self.now += options.rejoin_grace_s
        self._forms = [
            Form(f"m{number % setting.models}", "1", 0, f"t{number % setting.tenants}", 1, 0, b"", b"")
            for number in range(max(setting.models, setting.tenants))
        ]
        self._last_id = 0
        self._held: deque[tuple[bytes, Form, int]] = deque()
        self._say(FromCaller(_CALLER, CallerHello(0, "", 1, True)))
        specs = [ModelSpec(f"m{each}", "1", "", (_TENSOR,), (_TENSOR,), True, 1) for each in range(setting.models)]
        states = tuple(ModelState(spec.name, "1", READY, "", spec) for spec in specs)
        costs = [Cost(spec.name, "1", 1, 1, 1000, (1,), (1000,)) for spec in specs]
        for number in range(setting.workers):
            worker = b"%08d" % number
            self._say(FromWorker(worker, WorkerHello(0, f"w{number}", "cpu", 1, ("ipc:///w",), 1, states)))
            self._say(FromWorker(worker, Costs(1, costs)))
            serial = self.core.workers[worker].expected[_CALLER]
            self._say(FromWorker(worker, Attached(1, _CALLER, serial, True)))
        for _ in range(setting.queued + 2 * setting.workers):
            self.submit()
        self._say(Tick())

    def submit(self) -> None:
        self._last_id += 1
        form = self._forms[self._last_id % len(self._forms)]
        self._say(FromCaller(_CALLER, Submit(1, [Requests(form, (self._last_id,), (_HOUR_US,))], starts=[0])))

    def decide(self) -> None:
        """One request is done and acknowledged, another one comes, and the worker is given the next."""
        worker, _, number = self._held.popleft()
        self._say(FromWorker(worker, Done(1, [Finished(_CALLER, 1, 0, (number,), 1000)])))
        self._last_id += 1
        form = self._forms[self._last_id % len(self._forms)]
        group = Requests(form, (self._last_id,), (_HOUR_US,))
        self._say(FromCaller(_CALLER, Submit(1, [group], (number, number), starts=[0])))
        self._say(Tick())

    def _say(self, event: FromCaller | FromWorker | Tick) -> None:
        self.now += _STEP_S
        for command in self.core.handle(event, self.now):
            if isinstance(command, ToWorker) and isinstance(command.message, Assign):
                for group in command.message.groups:
                    self._held += [(command.worker, group.form, number) for number in group.ids]


def measure(hall: Hall, decisions: int) -> float:
    """Microseconds of processor time for each decision."""
    gc.collect()
    gc.disable()
    try:
        start = time.process_time()
        for _ in range(decisions):
            hall.decide()
        return (time.process_time() - start) / decisions * 1e6
    finally:
        gc.enable()


def run(settings: Sequence[Setting], rounds: int, decisions: int) -> list[tuple[Setting, float, float]]:
    """Each setting with its median in microseconds, and that of its ratios to the first setting of the same round."""
    taken: dict[Setting, list[float]] = {setting: [] for setting in settings}
    for setting in settings:  # one hall at a time: the largest takes half a gigabyte
        hall = Hall(setting)
        measure(hall, decisions // 4)
        taken[setting] += [measure(hall, decisions) for _ in range(rounds)]
    first = statistics.median(taken[settings[0]])
    medians = {setting: statistics.median(each) for setting, each in taken.items()}
    return [(setting, us, us / first) for setting, us in medians.items()]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--decisions", type=int, default=4000, help="in each round")
    parser.add_argument("--json", type=Path, default=Path(__file__).parent / "results" / "scheduler.json")
    options = parser.parse_args(arguments)
    results = run(SETTINGS, options.rounds, options.decisions)
    machine = bench_http.about_machine()
    print(", ".join(f"{name} {value}" for name, value in machine.items()))
    print("| waiting | models | tenants | workers | us a decision | to the first |")
    print("|---|---|---|---|---|---|")
    for setting, us, ratio in results:
        print(
            f"| {setting.queued:,} | {setting.models:,} | {setting.tenants:,} | {setting.workers:,} | {us:.1f} "
            f"| {ratio:.2f} |"
        )
    rows = [asdict(setting) | {"us": us, "ratio": ratio} for setting, us, ratio in results]
    options.json.write_text(json.dumps({"machine": machine, "settings": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
