"""Kills, stops, continues, restarts and floods processes of a server under a load whose every answer is checked:
``python bench/chaos.py --minutes 10 --seed 1``.

A server with two gateways, two workers and a broker serves two models: one that says ``2 x + 1`` of tensors that are
small or large (in shared memory), where every request has other values, and the compute-bound one of models.py, of
whose inputs the answers are known. Clients over HTTP and of the client library ask at half of what they were answered
before. Each request has ten seconds. It is sent again where its connection was closed, or where the error says that it
may be. What is *wrong* was not the answer to what was asked, what is *lost* was not answered in its time or ended with
an error that says not to ask again, and what is *duplicated* was answered twice. Others submit jobs, of which each has
a minute, and which are not submitted again once they are on disk.

A seed is a schedule of faults. For each of them it is told how long it took until a request that was sent after it was
answered, to anybody and to everybody; jobs are not counted in that. Faults that the schedule has for a process that is
not there are passed over.
Exit code 1: something was wrong, lost or duplicated.
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
import random
import select
import signal
import socket
import statistics
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, field
from typing import Any, Final, Protocol
from urllib.parse import urlsplit

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper

from bench import http as bench_http
from bench import models as bench_models
from penstock.client import Client, PenstockError

DEADLINE_S: Final = 10.0
JOB_DEADLINE_S: Final = 60.0  # its runner may end, and the one that takes over, too
HTTP_CLIENTS: Final = 4
LIBRARY_CLIENTS: Final = 4
JOB_CLIENTS: Final = 4
JOBS_A_S: Final = 10.0
QUIET_S: Final = 3.0  # between two faults at least, and at most twice as long after the last one has ended
STOPPED_S: Final = (0.5, 3.0)
FLOOD: Final = 2000  # requests
LARGE: Final = 40_000  # float32 values: 160 KB, which lie in shared memory
MEDIUM: Final = (700, 1024, 3000)  # which lie there, too, and are received with their head, in one read
KNOWN: Final = 64  # inputs of the compute-bound model
ROLES: Final = ("gateway", "worker", "broker", "jobs")
DEEDS: Final = ("kill", "kill", "kill", "stop", "stop", "end")
REASONS_MAX: Final = 20
_RETRY_S: Final = 0.02


@dataclass(frozen=True)
class Fault:
    """``after_s``: the one before has ended. ``which``: of the processes of the role. ``for_s``: of a stop."""

    after_s: float
    deed: str
    role: str
    which: int
    for_s: float

    @property
    def name(self) -> str:
        return f"{self.deed} {self.role}" if self.role else self.deed


@dataclass
class Recovery:
    """Seconds from a fault until an answer to what was sent after it: of anybody, and of the last of all clients."""

    fault: str
    at_s: float
    first_s: float = float("inf")
    last_s: float = float("inf")


@dataclass
class Score:
    accepted: int = 0
    answered: int = 0
    again: int = 0  # sent once more
    reasons: dict[str, int] = field(default_factory=dict)  # for that; REASONS_MAX different ones
    wrong: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    duplicated: list[str] = field(default_factory=list)


def schedule(seed: int, seconds: float, quiet_s: float = QUIET_S, roles: Sequence[str] = ROLES) -> list[Fault]:
    """The faults that fit into a time: the same for the same seed. ``roles``: of whom there are processes."""
    chance = random.Random(seed)
    faults: list[Fault] = []
    at = 0.0
    while True:
        after_s = chance.uniform(1.0, 2.0) * quiet_s
        deed = chance.choice([*DEEDS, "flood"])
        role = "" if deed == "flood" else chance.choice(roles)
        for_s = chance.uniform(*STOPPED_S) if deed == "stop" else 0.0
        at += after_s + for_s
        if at + quiet_s > seconds:
            return faults
        faults.append(Fault(after_s, deed, role, chance.randrange(1 << 16), for_s))


# --- what is asked


class Question:
    """A request, and what its answer has to be."""

    def __init__(self, number: int) -> None:
        chance = random.Random(number)
        self.number = number
        self.heavy = number % 4 == 0
        if self.heavy:
            self.model, self.which = "heavy", chance.randrange(KNOWN)
            return
        self.model = "affine"
        width = {1: LARGE, 5: chance.choice(MEDIUM)}.get(number % 8) or chance.randrange(1, 64)
        self.x = np.arange(number, number + width, dtype=np.float32).reshape(1, width) % np.float32(1 << 20)


class Answers:
    """What the compute-bound model says, as ONNX Runtime says it to one row alone."""

    def __init__(self, model: Path) -> None:
        session = onnxruntime.InferenceSession(str(model))
        chance = np.random.default_rng(0)
        self.inputs = [chance.standard_normal((1, 64), np.float32) for _ in range(KNOWN)]
        self.outputs = [session.run(None, {"x": x})[0] for x in self.inputs]

    def ask(self, question: Question) -> Any:
        return self.inputs[question.which] if question.heavy else question.x

    def is_right(self, question: Question, y: Any) -> bool:
        if not question.heavy:
            return np.array_equal(y, question.x * 2 + 1)
        known = self.outputs[question.which]  # rows of a batch are added up in another order than one alone
        return np.shape(y) == known.shape and bool(np.allclose(y, known, rtol=1e-3, atol=1e-4))


def make_repository(directory: Path) -> Path:
    bench_models.make_repository(directory, ["heavy"])
    two, one = (helper.make_tensor(name, TensorProto.FLOAT, [], [value]) for name, value in (("two", 2), ("one", 1)))
    nodes = [helper.make_node("Mul", ["x", "two"], ["z"]), helper.make_node("Add", ["z", "one"], ["y"])]
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", "W"]) for name in "xy")
    graph = helper.make_graph(nodes, "affine", [x], [y], [two, one])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", bench_models.OPSET)])
    model.ir_version = bench_models.IR_VERSION
    path = directory / "affine" / "1" / "model.onnx"
    path.parent.mkdir(parents=True)
    onnx.save(model, str(path))
    return directory


# --- who asks


class Again(Exception):
    """The same may be asked again."""


class Given(Exception):
    """It may not."""


class Asker(Protocol):
    def ask(self, model: str, x: Any, timeout_s: float) -> Any:
        """The output. Raises Again, Given."""

    def extra(self) -> str:
        """What came that nobody had asked for."""

    def close(self) -> None: ...


class HttpAsker:
    def __init__(self, url: str) -> None:
        self._place = urlsplit(url)
        self._socket: socket.socket | None = None

    def ask(self, model: str, x: Any, timeout_s: float) -> Any:
        about = {"name": "x", "shape": list(x.shape), "datatype": "FP32", "parameters": {"binary_data_size": x.nbytes}}
        parameters = {"binary_data_output": True, "timeout": int(timeout_s * 1e6)}
        head = json.dumps({"inputs": [about], "parameters": parameters}).encode()
        try:
            if self._socket is None:
                self._socket = socket.create_connection((self._place.hostname, self._place.port), DEADLINE_S + 1)
                self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._socket.settimeout(timeout_s + 1)
            body = head + x.tobytes()
            lines = (
                f"POST /v2/models/{model}/infer HTTP/1.1",
                f"Host: {self._place.netloc}",
                f"Inference-Header-Content-Length: {len(head)}",
                f"Content-Length: {len(body)}",
            )
            # All at once, which http.client does not do: gateways read what comes in one piece in another way.
            self._socket.sendall("\r\n".join((*lines, "", "")).encode() + body)
            answer = http.client.HTTPResponse(self._socket, method="POST")
            answer.begin()
            body = answer.read()
        except (OSError, http.client.HTTPException) as error:
            self.close()
            raise Again(repr(error)) from None
        if answer.will_close:
            self.close()
        if answer.status == 503:
            raise Again(body.decode())
        if answer.status != 200:
            raise Given(f"{answer.status} {body.decode()}")
        length = int(answer.headers["Inference-Header-Content-Length"])
        [output] = json.loads(body[:length])["outputs"]
        return np.frombuffer(body[length:], np.float32).reshape(output["shape"])

    def extra(self) -> str:
        """Between two requests nothing may come but the end of the connection."""
        sock = self._socket
        if sock is None or not select.select([sock], [], [], 0)[0]:
            return ""
        try:
            came = sock.recv(100, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except OSError:
            came = b""
        self.close()
        return came.decode("latin-1")

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None


class LibraryAsker:
    def __init__(self, address: Path | str) -> None:
        self._client = Client(address)
        self._ends: Counter[int] = Counter()
        self._asked = 0

    def ask(self, model: str, x: Any, timeout_s: float) -> Any:
        self._asked += 1
        number = self._asked
        try:
            future = self._client.submit(model, {"x": x}, timeout=timeout_s)
            future.add_done_callback(lambda _: self._ends.update([number]))
            return future.result(timeout_s + 5)["y"]
        except PenstockError as error:
            raise (Again if error.retryable else Given)(repr(error)) from None
        except TimeoutError:
            raise Given("its future never ended") from None

    def extra(self) -> str:
        twice = [number for number, count in self._ends.items() if count > 1]
        self._ends.clear()
        return f"ended twice: {twice}" if twice else ""

    def close(self) -> None:
        self._client.close()


class JobAsker:
    """Of what is kept on disk first, and asked for then."""

    def __init__(self, address: Path | str) -> None:
        self._client = Client(address)

    def ask(self, model: str, x: Any, timeout_s: float) -> Any:
        until = time.monotonic() + timeout_s
        try:
            job = self._client.submit_job(model, {"x": x})
        except PenstockError as error:
            raise (Again if error.retryable else Given)(repr(error)) from None
        try:
            return job.result(until - time.monotonic())["y"]
        except PenstockError as error:
            raise Given(f"job {job.id}: {error!r}") from None
        except TimeoutError:
            raise Given(f"job {job.id} never ended") from None

    def extra(self) -> str:
        return ""

    def close(self) -> None:
        self._client.close()


class Load:
    """Clients that ask until they are told to end, at a rate; 0: as soon as they have been answered. Each question has
    ``limit_s``."""

    def __init__(
        self,
        askers: Sequence[Asker],
        answers: Answers,
        rate: float,
        first: int = 0,
        limit_s: float = DEADLINE_S,
    ) -> None:
        self.score = Score()
        self.next_number = first
        self._askers = askers
        self._answers = answers
        self._rate = rate
        self._limit_s = limit_s
        self._lock = threading.Lock()
        self._end = threading.Event()
        self._recoveries: list[Recovery] = []
        self._waits_for: list[set[int]] = []
        self._begin = time.monotonic()
        self._threads = [threading.Thread(target=self._run, args=(at,), daemon=True) for at in range(len(askers))]

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._end.set()
        for thread in self._threads:
            thread.join(3 * self._limit_s)

    @property
    def elapsed_s(self) -> float:
        return time.monotonic() - self._begin

    def happened(self, fault: str) -> Recovery:
        """From now on, wait for answers."""
        recovery = Recovery(fault, self.elapsed_s)
        with self._lock:
            self._recoveries.append(recovery)
            self._waits_for.append(set(range(len(self._askers))))
        return recovery

    def _run(self, at: int) -> None:
        asker = self._askers[at]
        pause = len(self._askers) / self._rate if self._rate else 0.0
        due = time.monotonic() + pause * at / len(self._askers)
        while not self._end.is_set():
            if pause:
                self._end.wait(due - time.monotonic())
                due = max(due + pause, time.monotonic() - pause)
                if self._end.is_set():
                    return
            with self._lock:
                number = self.next_number
                self.next_number += 1
                self.score.accepted += 1
            self._ask(at, asker, Question(number))

    def _ask(self, at: int, asker: Asker, question: Question) -> None:
        x, until, last = self._answers.ask(question), time.monotonic() + self._limit_s, ""
        while (left_s := until - time.monotonic()) > 0:
            sent = self.elapsed_s
            if extra := asker.extra():
                self._note(self.score.duplicated, question, extra)
            try:
                y = asker.ask(question.model, x, left_s)
            except Again as why:
                last = str(why)
                self._note_again(last)
                self._end.wait(_RETRY_S) if not self._end.is_set() else time.sleep(_RETRY_S)
                continue
            except Given as why:
                self._note(self.score.lost, question, str(why))
                return
            if not self._answers.is_right(question, y):
                self._note(self.score.wrong, question, f"{np.asarray(y).ravel()[:4]} of {np.size(y)}")
                return
            self._answered(at, sent)
            return
        self._note(self.score.lost, question, f"no answer in {self._limit_s:g} s; the last: {last}")

    def _note_again(self, why: str) -> None:
        with self._lock:
            self.score.again += 1
            reasons, why = self.score.reasons, why[:120]
            if why in reasons or len(reasons) < REASONS_MAX:
                reasons[why] = reasons.get(why, 0) + 1

    def _answered(self, at: int, sent: float) -> None:
        now = self.elapsed_s
        with self._lock:
            self.score.answered += 1
            for recovery, waits in zip(self._recoveries, self._waits_for, strict=True):
                if waits and sent >= recovery.at_s:
                    recovery.first_s = min(recovery.first_s, now - recovery.at_s)
                    waits.discard(at)
                    if not waits:
                        recovery.last_s = now - recovery.at_s

    def _note(self, what: list[str], question: Question, why: str) -> None:
        with self._lock:
            what.append(f"{self.elapsed_s:.2f} s: request {question.number} of {question.model}: {why[:300]}")


# --- what is done to them


def pids_of(root: int, role: str) -> list[int]:
    return sorted(bench_http.children(root, role))


def flood(runtime: Path) -> None:
    """Many requests at once that have next to no time, and rubbish."""
    with Client(runtime) as client:
        x = np.zeros((1, 64), np.float32)
        futures = []
        for _ in range(FLOOD):
            with suppress(PenstockError):  # there is no broker at present
                futures.append(client.submit("heavy", {"x": x}, timeout=0.05, tenant="flood"))
        for name in ("callers.sock", "control.sock"):
            with suppress(OSError), socket.socket(socket.AF_UNIX) as rubbish:
                rubbish.connect(str(runtime / name))
                rubbish.sendall(os.urandom(4096))
        for future in futures:
            with suppress(PenstockError):
                future.result(DEADLINE_S)


def do(fault: Fault, root: int, runtime: Path) -> str:
    """What was done; "" if there is nobody to do it to. Ends when the fault has."""
    if fault.deed == "flood":
        flood(runtime)
        return fault.name
    there = pids_of(root, fault.role)
    if not there:
        return ""
    pid = there[fault.which % len(there)]
    numbers = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP, "end": signal.SIGTERM}
    with suppress(ProcessLookupError):
        os.kill(pid, numbers[fault.deed])
        if fault.deed == "stop":
            time.sleep(fault.for_s)
            os.kill(pid, signal.SIGCONT)
    return f"{fault.name} {fault.which % len(there)}"


@dataclass(frozen=True)
class Outcome:
    """``undisturbed``, ``goodput``: answers a second, before the faults and while they were. ``jobs``: of those."""

    seed: int
    rate: float
    undisturbed: float
    goodput: float
    score: Score
    jobs: Score
    recoveries: Sequence[Recovery]

    @property
    def kept(self) -> bool:
        return not any(score.wrong or score.lost or score.duplicated for score in (self.score, self.jobs))


def answered_a_second(
    askers: Sequence[Asker], answers: Answers, rate: float, seconds: float, first: int
) -> tuple[float, int]:
    """Also the number of the next question."""
    with Load(askers, answers, rate, first) as load:
        time.sleep(seconds)
    return load.score.answered / seconds, load.next_number


def run(
    seed: int,
    seconds: float,
    capacity_s: float = 3.0,
    undisturbed_s: float = 5.0,
    quiet_s: float = QUIET_S,
    told: Callable[[str], None] = lambda line: None,
) -> Outcome:
    """A whole run. ``told``: of each fault."""
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="penstock-chaos-")))
        repository = make_repository(directory / "models")
        answers = Answers(repository / "heavy" / "1" / "model.onnx")
        runtime = directory / "run"
        server = stack.enter_context(
            bench_http.Server(repository, runtime, "--workers=2", "--gateways=2", "--log-level=error")
        )
        askers: list[Asker] = [HttpAsker(server.url) for _ in range(HTTP_CLIENTS)]
        askers += [LibraryAsker(runtime) for _ in range(LIBRARY_CLIENTS)]
        submitters: list[Asker] = [JobAsker(runtime) for _ in range(JOB_CLIENTS)]
        for asker in askers + submitters:
            stack.callback(asker.close)
        capacity, first = answered_a_second(askers, answers, 0.0, capacity_s, 0)
        undisturbed, first = answered_a_second(askers, answers, capacity / 2, undisturbed_s, first)
        recoveries: list[Recovery] = []
        jobs = Load(submitters, answers, JOBS_A_S, limit_s=JOB_DEADLINE_S)
        with jobs, Load(askers, answers, capacity / 2, first) as load:
            for fault in schedule(seed, seconds, quiet_s):
                time.sleep(fault.after_s)
                recovery = load.happened(fault.name)
                if not do(fault, server.pid, runtime):
                    recovery.fault += " (there was none)"
                told(f"{recovery.at_s:7.2f} s {recovery.fault}")
                recoveries.append(recovery)
            time.sleep(max(0.0, seconds - load.elapsed_s))
            answered, elapsed_s = load.score.answered, load.elapsed_s
        return Outcome(seed, capacity / 2, undisturbed, answered / elapsed_s, load.score, jobs.score, recoveries)


def tell(outcome: Outcome) -> list[str]:
    score, jobs = outcome.score, outcome.jobs
    lines = [
        f"seed {outcome.seed}: {len(outcome.recoveries)} faults at {outcome.rate:.0f} requests/s",
        f"accepted {score.accepted}, answered {score.answered}, sent again {score.again}",
        f"wrong {len(score.wrong)}, lost {len(score.lost)}, duplicated {len(score.duplicated)}",
        f"jobs: accepted {jobs.accepted}, answered {jobs.answered}, submitted again {jobs.again}; "
        f"wrong {len(jobs.wrong)}, lost {len(jobs.lost)}",
        f"goodput {outcome.goodput:.0f}/s, undisturbed {outcome.undisturbed:.0f}/s: "
        f"{outcome.goodput / outcome.undisturbed:.0%}",
        "| fault | times | first answer s, median | most | to every client s, median | most |",
        "|---|---|---|---|---|---|",
    ]
    kinds: dict[str, list[Recovery]] = {}
    for each in outcome.recoveries:
        kinds.setdefault(each.fault, []).append(each)
    for name, of_kind in sorted(kinds.items()):
        firsts, lasts = [each.first_s for each in of_kind], [each.last_s for each in of_kind]
        lines.append(
            f"| {name} | {len(of_kind)} | {statistics.median(firsts):.2f} | {max(firsts):.2f} "
            f"| {statistics.median(lasts):.2f} | {max(lasts):.2f} |"
        )
    for what in (score, jobs):
        lines += [f"sent again {count} times: {why}" for why, count in what.reasons.items()]
        for name, found in (("wrong", what.wrong), ("lost", what.lost), ("duplicated", what.duplicated)):
            lines += [f"{name}: {each}" for each in found[:20]]
    return lines


def as_object(outcome: Outcome) -> Mapping[str, Any]:
    found = asdict(outcome)
    for each in found["recoveries"]:
        for key in ("first_s", "last_s"):
            each[key] = None if each[key] == float("inf") else each[key]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=bench_http.RESULTS / "chaos.json")
    arguments = parser.parse_args()
    print(f"seed {arguments.seed}", flush=True)
    outcome = run(arguments.seed, 60 * arguments.minutes, told=lambda line: print(line, file=sys.stderr, flush=True))
    machine = bench_http.about_machine()
    print(", ".join(f"{name} {value}" for name, value in machine.items()))
    print("\n".join(tell(outcome)))
    arguments.out.write_text(json.dumps({"machine": machine, **as_object(outcome)}, indent=1) + "\n")
    sys.exit(0 if outcome.kept else 1)


if __name__ == "__main__":
    main()
