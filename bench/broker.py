"""What a request costs the broker, from one worker to 32 and from one caller to 500: ``python bench/broker.py``.

A real broker process for each setting; its peers are stand-ins, all in this process, which speak the protocol and do
nothing else: a caller asks, a worker finishes what it is given at once. One request is under way at a time, so that
every message carries one, whoever it goes to, and peers come in turn. The settings take turns, a slice each; what the
broker's processor time per request (beats and wake-ups included) is to that of the first one in the same round, is told
with its quartiles: the median is to be within 20 %. Results go to standard output as a table, and to a JSON file.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    # Run as a script, this folder would come first, and hide the modules that it has namesakes of.
    sys.path[0] = str(Path(__file__).parents[1])

import argparse
import json
import os
import secrets
import select
import signal
import statistics
import subprocess
import tempfile
import time
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any, Final

from bench import http as bench_http
from penstock.wire.codec import pack, pack_layout, ranges, unpack
from penstock.wire.connection import Connection
from penstock.wire.endpoints import RuntimeDir
from penstock.wire.messages import (
    PEER_ID_BYTES,
    TO_CALLER,
    TO_WORKER,
    Assign,
    Attached,
    Beat,
    Bye,
    CallerHello,
    Done,
    Expect,
    Finished,
    Form,
    Message,
    Models,
    Refusals,
    Requests,
    Submit,
    Welcome,
    WorkerHello,
)
from penstock.wire.models import READY, Layout, ModelSpec, ModelState, Tensor, TensorSpec

BAR: Final = 0.2  # how far a setting's median may be from the first one's
_ROW_BYTES: Final = 64
_BATCH_ROWS: Final = 1  # of each assignment, so that what a worker is given does not depend on how many there are
_TIMEOUT_US: Final = 60_000_000
_BEAT_S: Final = 1.0
_START_MAX_S: Final = 30.0
_EVENTS_MAX: Final = 1024

_TENSOR: Final = TensorSpec("x", "FP32", (-1, _ROW_BYTES // 4))
_SPEC: Final = ModelSpec("m", "1", "stand-in", (_TENSOR,), (_TENSOR,), True, _BATCH_ROWS)
_BODY: Final = pack_layout(Layout((Tensor("x", "FP32", (1, _ROW_BYTES // 4), 0, _ROW_BYTES),), ()))
_FORM: Final = Form("m", "1", 0, "", 1, _ROW_BYTES, b"", _BODY)
_PAYLOAD: Final = bytes(_ROW_BYTES)


@dataclass(frozen=True)
class Setting:
    workers: int
    callers: int


@dataclass(frozen=True)
class Figures:
    """Of one setting, medians of all slices. ``broker_us``: processor time a request; ``ratio``: to the first setting's
    in the same round, quartiles."""

    workers: int
    callers: int
    requests_per_s: float
    broker_us: float
    ratio: Sequence[float]


class Peer:
    """A connection to the broker under an id of its own, and what it has been welcomed as."""

    def __init__(self, epoll: select.epoll, endpoint: str, hello: Message, kinds: Mapping[int, type[Message]]) -> None:
        self.id = bytes([secrets.randbelow(255) + 1]) + secrets.token_bytes(PEER_ID_BYTES - 1)
        self.epoch = 0
        self._hello = hello
        self._kinds = kinds
        self._connection = Connection(epoll, endpoint, "DEALER", self.id)
        # There is room for a hundred in the kernel's line of those that the broker has not accepted yet.
        while not self._connection.connect(time.monotonic()):
            time.sleep(0.01)
        self.fileno = self._connection.fileno

    def say(self, message: Message) -> None:
        if not self._connection.send((pack(message),)):
            sys.exit("bench: the broker's connection broke")

    def handle(self, events: int) -> list[Message]:
        """What the broker has said."""
        was_ready = self._connection.ready
        heard = [unpack(frames[0], frames[1:], self._kinds) for frames in self._connection.handle(events)]
        if self._connection.ready and not was_ready:
            self.say(self._hello)
        for message in heard:
            if isinstance(message, Welcome):
                self.epoch = message.epoch
        return heard

    def close(self) -> None:
        self._connection.close()


class Broker:
    """A broker and its stand-in peers, for the time of a ``with``. ``turn`` lets requests go round for some seconds."""

    def __init__(self, setting: Setting, directory: Path, window: int) -> None:
        self.setting = setting
        self._runtime = RuntimeDir(directory)
        self._epoll = select.epoll()
        self._window = window
        self._ended = 0  # requests
        self._under_way = 0
        self._last_id = 0
        self._beat_at = 0.0

    def __enter__(self) -> Broker:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "penstock.bin", "broker", f"--runtime-dir={self._runtime.path}", "--log-level=error"]
        )
        until = time.monotonic() + _START_MAX_S
        while not self._runtime.control.exists():
            if time.monotonic() > until or self._process.poll() is not None:
                sys.exit("bench: the broker did not start")
            time.sleep(0.05)
        models = [ModelState("m", "1", READY, "", _SPEC)]
        # So many instances that one worker alone may hold all that is under way.
        instances = self._window
        self._workers = {}
        for number in range(self.setting.workers):
            hello = WorkerHello(
                0, f"w{number}", "cpu", os.getpid(), [f"tcp://127.0.0.1:{number + 1}"], instances, models
            )
            peer = Peer(self._epoll, f"ipc://{self._runtime.workers}", hello, TO_WORKER)
            self._workers[peer.fileno] = peer
        self._callers = {}
        for _ in range(self.setting.callers):
            hello_caller = CallerHello(0, "", os.getpid(), False)
            peer = Peer(self._epoll, f"ipc://{self._runtime.callers}", hello_caller, TO_CALLER)
            self._callers[peer.fileno] = peer
        self._by_id = {peer.id: peer for peer in self._callers.values()}
        self._attached: set[tuple[int, bytes]] = set()
        self._served: set[int] = set()
        while len(self._attached) < len(self._workers) * len(self._callers) or len(self._served) < len(self._callers):
            if time.monotonic() > until:
                sys.exit(f"bench: the peers of {self.setting} did not come together")
            self._look()
        self._idle = deque(self._callers.values())
        self._unacknowledged: dict[bytes, list[int]] = {peer.id: [] for peer in self._idle}
        return self

    def __exit__(self, *error: object) -> None:
        for caller in self._callers.values():
            caller.say(Submit(caller.epoch, (), ranges(sorted(self._unacknowledged[caller.id]))))
        for peer in (*self._callers.values(), *self._workers.values()):
            peer.say(Bye(peer.epoch))
            peer.close()
        self._process.send_signal(signal.SIGTERM)
        self._process.wait(60)
        self._epoll.close()

    def turn(self, seconds: float) -> tuple[float, float]:
        """(requests a second, the broker's microseconds for each), with the window full from beginning to end."""
        self._fill()
        self._look()
        start, before, cpu = time.monotonic(), self._ended, bench_http._cpu_s(self._process.pid)
        while time.monotonic() - start < seconds:
            self._fill()
            self._look()
        elapsed, used = time.monotonic() - start, bench_http._cpu_s(self._process.pid) - cpu
        count = self._ended - before
        while self._under_way:
            self._look()
        return count / elapsed, used / max(1, count) * 1e6

    def beat(self) -> None:
        """All that an idle peer says: it lives."""
        now = time.monotonic()
        if now >= self._beat_at:
            self._beat_at = now + _BEAT_S
            for peer in (*self._workers.values(), *self._callers.values()):
                if peer.epoch:
                    peer.say(Beat(peer.epoch))
        self._look(0.0)

    def _fill(self) -> None:
        while self._under_way < self._window:
            caller = self._idle.popleft()
            self._idle.append(caller)
            acks = self._unacknowledged[caller.id]
            self._last_id += 1
            said = [Requests(_FORM, (self._last_id,), (_TIMEOUT_US,))]
            caller.say(Submit(caller.epoch, said, ranges(sorted(acks)), blob=_PAYLOAD))
            acks.clear()
            self._under_way += 1

    def _look(self, wait_s: float = 1.0) -> None:
        for fileno, events in self._epoll.poll(wait_s, _EVENTS_MAX):
            worker = self._workers.get(fileno)
            if worker is not None:
                for message in worker.handle(events):
                    self._hear_worker(worker, message)
            else:
                for message in self._callers[fileno].handle(events):
                    if isinstance(message, Models) and message.models:
                        self._served.add(fileno)
                    elif isinstance(message, Refusals):
                        sys.exit(f"bench: refused: {message.refusals[0]}")
        if time.monotonic() >= self._beat_at:
            self.beat()

    def _hear_worker(self, worker: Peer, message: Message) -> None:
        if isinstance(message, Expect):
            for expected in message.callers:
                worker.say(Attached(worker.epoch, expected.caller, expected.serial, True))
                self._attached.add((worker.fileno, expected.caller))
        elif isinstance(message, Assign) and message.groups:
            done = [Finished(each.caller, each.attempt, _ROW_BYTES, each.ids) for each in message.groups]
            worker.say(Done(worker.epoch, done))
            for each in message.groups:
                self._unacknowledged[each.caller] += each.ids
                self._ended += len(each.ids)
                self._under_way -= len(each.ids)


def compare(settings: Sequence[Setting], window: int, rounds: int, seconds: float) -> list[Figures]:
    """All settings in turn, a slice each, ``rounds`` times."""
    with tempfile.TemporaryDirectory(prefix="penstock-bench-") as name, ExitStack() as stack:
        brokers = [
            stack.enter_context(Broker(setting, Path(name) / str(number), window))
            for number, setting in enumerate(settings)
        ]
        slices: list[list[tuple[float, float]]] = [[] for _ in brokers]
        for _ in range(rounds + 1):  # the first is for warming up
            for broker, own in zip(brokers, slices, strict=True):
                for other in brokers:
                    other.beat()
                own.append(broker.turn(seconds))
    figures = []
    for setting, own in zip(settings, slices, strict=True):
        ratios = [mine[1] / first[1] for mine, first in zip(own[1:], slices[0][1:], strict=True)]
        quartiles = [round(ratio, 3) for ratio in statistics.quantiles(ratios)]
        rate, used = (statistics.median(each[at] for each in own[1:]) for at in (0, 1))
        figures.append(Figures(setting.workers, setting.callers, rate, used, quartiles))
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--window", type=int, default=1, help="requests under way; with more, messages carry several")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--seconds", type=float, default=0.5, help="of a slice; less than the broker's patience")
    parser.add_argument("--out", type=Path, default=bench_http.RESULTS / "broker.json")
    arguments = parser.parse_args()
    settings = [Setting(1, 1), Setting(8, 1), Setting(32, 1), Setting(1, 50), Setting(1, 500), Setting(32, 500)]
    figures = compare(settings, arguments.window, arguments.rounds, arguments.seconds)
    machine = bench_http.about_machine()
    print(", ".join(f"{name} {value}" for name, value in machine.items()))
    print("| workers | callers | requests/s | broker CPU-us | to the first (quartiles) |")
    print("|---|---|---|---|---|")
    for each in figures:
        low, middle, high = each.ratio
        print(
            f"| {each.workers} | {each.callers} | {each.requests_per_s:.0f} | {each.broker_us:.1f} "
            f"| {middle:.2f} ({low:.2f} to {high:.2f}) |"
        )
    content: dict[str, Any] = {"machine": machine, "rows": [asdict(each) for each in figures]}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
