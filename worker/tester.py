"""Models are tried before a worker loads them, each in a process that is thrown away: what ends that process, or never
ends in it, would have ended the worker, and with it what every other model does there.

A new Python with ONNX Runtime takes 0.6 s of processor time. So the worker forks once, at its very beginning, when
there are no threads but the sleeping ones of OpenBLAS, which knows of forks, no sockets and nothing of CUDA. That child
is the *tester*. It has one thread, keeps of what is open the one socket to the worker and standard error, and runs one
model of nobody's, so that what ONNX Runtime sets up at its first is there. For each model it forks once more:

    worker ──task, pipe──► tester ──fork──► trial: load, probe, smallest and largest batch, recorded requests
       ▲                     │                │ what is wrong, {"said": ""} when nothing is
       └─────────pipe────────┴────────────────┘ and from the tester how it ended

Whoever asks has a pipe of its own, so several may. Nothing outlives the worker: the kernel ends the tester with it, and
trials with the tester (PR_SET_PDEATHSIG).
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import json
import logging
import os
import resource
import select
import signal
import socket
import sys
import threading
import time
import traceback
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NoReturn

import msgspec
import numpy as np

from penstock.wire.process import EXIT_DEFECT, die_with, end_before_others, fields
from penstock.worker.config import CPU, ModelConfig
from penstock.worker.memory import share_arena
from penstock.worker.model import LoadError, shares_weights
from penstock.worker.onnxfile import OnnxFileError, read_onnx
from penstock.worker.probe import load_and_probe
from penstock.worker.repository import ModelFile
from penstock.worker.store import Store, Taken, Weights

log = logging.getLogger("penstock.worker")

AT_ONCE: Final = 2  # trials; who asks for another waits. 500 small models take 12.7 s on two cores with 1, 8.7 with 2.
_END_S: Final = 10.0  # for a process that is killed, or told to end, to have ended
_TASK_MAX_BYTES: Final = 64 << 10
_WORD_MAX_BYTES: Final = 256 << 10  # of all that is said of a trial
_SMALL_MAX_BYTES: Final = 4 << 20  # of a model that is tried while another is loaded: what both take is little
_OOM_SCORE: Final = 1000  # when memory is out the kernel ends trials before anything that serves
_STOPPED: Final = "the worker ends"


class Trial:
    """One model that is being tried. ``store``: to load it with, since its weights have been taken from the store
    already; None where it was given none."""

    def __init__(self, tester: Tester, file: ModelFile, store: Store | None, reader: int = -1) -> None:
        self._tester = tester
        self.file = file
        self.reader = reader  # -1: it is not tried
        self.store = store
        self.small = False

    def verdict(self) -> str:
        """Why the model is not to be loaded, a sentence; "" when it may be."""
        if self.reader < 0:
            return ""
        try:
            said = self._read()
        finally:
            self.close()
        last = said[-1] if said else {}
        if "ended" not in last:
            return self._tester.missed("the process that tries models does not answer", self.file)
        if last["ended"]:
            return f"{self.file.path} cannot be served: {last['ended']}"
        return str(said[0].get("said", ""))

    def _read(self) -> list[dict[str, Any]]:
        until = time.monotonic() + self._tester.patience_s
        poll = select.poll()
        poll.register(self.reader, select.POLLIN)
        text = b""
        while len(text) < _WORD_MAX_BYTES and poll.poll(max(0.0, until - time.monotonic()) * 1000):
            more = os.read(self.reader, _WORD_MAX_BYTES)
            if not more:
                break
            text += more
        return [json.loads(line) for line in text.split(b"\n")[:-1]]

    def close(self) -> None:
        """Whoever does not want to know any more: a trial that nobody waits for is ended."""
        if self.reader >= 0:
            os.close(self.reader)
            self.reader = -1
            self._tester.leave()


class Tester:
    """``seconds_max``: that a trial may take, 0: no model is tried; ``run_bytes_max``: what models run in, as in the
    worker. ``start`` forks, so it comes before threads, sockets and CUDA, in the main thread, with which the tester
    ends; the other methods are for any.

    Should the tester end by itself, that is said once, and models are loaded untried from then on: somebody may have
    killed it, and a server that takes no new version because of that helps nobody. It is not forked again, since by
    then the worker has threads; a worker that is started anew has one.
    """

    def __init__(self, seconds_max: float, run_bytes_max: int = -1) -> None:
        self._seconds_max = seconds_max
        self._run_bytes_max = run_bytes_max
        self.patience_s = seconds_max + _END_S
        self.pid = 0
        self._socket: socket.socket | None = None
        self._lock = threading.Lock()
        self._free = threading.Semaphore(AT_ONCE)
        self._stopped = False
        self._told = False  # that models are loaded untried

    def start(self) -> Tester:
        if not self._seconds_max:
            return self
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        worker = os.getpid()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 counts OpenBLAS's threads
            try:
                self.pid = os.fork()
            except OSError as error:
                self._tell(f"no process can be started: {error.strerror}")
                ours.close()
                theirs.close()
                return self
        if not self.pid:
            _become(
                "penstock-tester",
                lambda: _Serving(theirs.detach(), self._seconds_max, self._run_bytes_max, worker).serve(),
            )
        theirs.close()
        ours.setblocking(False)
        self._socket = ours
        return self

    def begin(self, file: ModelFile, device: str = CPU, store: Store | None = None) -> Trial:
        """Have a model tried. Its weights are taken from the store first, so that a large one is prepared by now, and
        its trial maps what is there."""
        if self._socket is None or file.problem:
            return Trial(self, file, store)
        if store is not None and shares_weights(file.config, device):
            store = Taken(store.root, store.on_gpu, store.take(file.path, file.name))
        # Each that is under way has its limit, so one of them ends.
        if not self._free.acquire(timeout=2 * self.patience_s):
            self.missed(f"{AT_ONCE} others are being tried", file)
            return Trial(self, file, store)
        try:
            reader, writer = os.pipe()
        except OSError as error:
            self.leave()
            self.missed(f"no pipe can be opened: {error.strerror}", file)
            return Trial(self, file, store)
        self._ask(_pack(file, device, store), writer)
        return Trial(self, file, store, reader)

    def _ask(self, task: bytes, writer: int) -> None:
        """Have a task done, and what is said of it written: nothing when the tester has ended, or this worker is to."""
        with self._lock, contextlib.suppress(OSError):
            assert self._socket is not None
            if self._socket.fileno() >= 0:
                socket.send_fds(self._socket, [task], [writer])
        os.close(writer)

    def check(self, file: ModelFile, device: str = CPU, store: Store | None = None) -> str:
        """Why a model is not to be loaded, a sentence; "" when it may be."""
        return self.begin(file, device, store).verdict()

    def ahead(
        self, files: Sequence[ModelFile], device: str = CPU, store: Store | None = None
    ) -> Iterator[tuple[ModelFile, str, Store | None]]:
        """Each model, why it is not to be loaded, and the store to load it with; in their order, unless one takes
        longer than those after it. While one is loaded others are tried, if they are small; none on a GPU, whose
        memory nobody gives back to make room for a trial."""
        left = deque(files)
        running: list[Trial] = []
        try:
            while left or running:
                self._begin_some(left, running, AT_ONCE if device == CPU else 1, 1, device, store)
                trial = _first_to_end(running, self.patience_s)
                running.remove(trial)
                problem = trial.verdict()
                self._begin_some(left, running, AT_ONCE if device == CPU else 0, 0, device, store)
                yield trial.file, problem, trial.store
        finally:
            for each in running:
                each.close()

    def _begin_some(
        self, left: deque[ModelFile], running: list[Trial], most: int, large: int, device: str, store: Store | None
    ) -> None:
        """Have as many as ``most`` tried at once, of which so many may be large."""
        while left and len(running) < most:
            small = _is_small(left[0])
            if not small and sum(not each.small for each in running) >= large:
                return
            trial = self.begin(left.popleft(), device, store)
            trial.small = small
            running.append(trial)

    def missed(self, reason: str, file: ModelFile) -> str:
        """A model could not be tried: what is to be said of it."""
        if self._stopped:
            return f"{file.path} is not loaded: {_STOPPED}"
        self._tell(reason)
        return ""

    def _tell(self, reason: str) -> None:
        with self._lock:
            told, self._told = self._told, True
        if not told:
            cost = "one that cannot run may end this worker; start the worker anew to have them tried"
            log.warning("models are loaded without a trial", extra=fields(reason=reason, cost=cost))

    def leave(self) -> None:
        self._free.release()

    def stop(self) -> None:
        """End it, and what it tries; returns when they are no more."""
        with self._lock:
            self._stopped = True
            if self._socket is not None:
                self._socket.close()
        if not self.pid:
            return
        pidfd = os.pidfd_open(self.pid)
        try:
            ended = select.poll()
            ended.register(pidfd, select.POLLIN)
            if not ended.poll(_END_S * 1000):
                os.kill(self.pid, signal.SIGKILL)
            if ended.poll(_END_S * 1000):  # else it waits for a broken disk, say
                os.waitpid(self.pid, 0)
        finally:
            os.close(pidfd)
            self.pid = 0


def _first_to_end(trials: Sequence[Trial], seconds: float) -> Trial:
    """The first that says something, or is not tried at all; after so many seconds any."""
    poll = select.poll()
    for each in trials:
        if each.reader < 0:
            return each
        poll.register(each.reader, select.POLLIN)
    found = {fd for fd, _ in poll.poll(seconds * 1000)}
    return next((each for each in trials if each.reader in found), trials[0])


def _is_small(file: ModelFile) -> bool:
    try:
        about = file.path.stat()
        return about.st_size < _SMALL_MAX_BYTES and read_onnx(file.path).weight_bytes < _SMALL_MAX_BYTES
    except (OSError, OnnxFileError):
        return False


def _pack(file: ModelFile, device: str, store: Store | None) -> bytes:
    about: dict[str, Any] = {
        "name": file.name,
        "version": file.version,
        "path": os.fspath(file.path),
        "config": msgspec.to_builtins(file.config),
        "warmup": os.fspath(file.warmup or ""),
        "device": device,
    }
    if isinstance(store, Taken):
        weights = store.weights
        prepared = os.fspath(weights.prepared or "")
        about["store"] = [os.fspath(store.root), store.on_gpu, weights.nbytes, prepared]
    return json.dumps(about).encode()  # which has a way to write names that are not UTF-8


def _unpack(text: bytes) -> tuple[ModelFile, str, Store | None]:
    about = json.loads(text)
    config = msgspec.convert(about["config"], ModelConfig)
    warmup = Path(about["warmup"]) if about["warmup"] else None
    file = ModelFile(about["name"], about["version"], Path(about["path"]), config, warmup=warmup)
    if "store" not in about:
        return file, about["device"], None
    root, on_gpu, nbytes, prepared = about["store"]
    return file, about["device"], Taken(Path(root), on_gpu, Weights(nbytes, Path(prepared) if prepared else None))


# --- in the tester ---


@dataclass(slots=True)
class _Running:
    """A trial as the tester sees it. ``writer``: to who asked; ``killed``: why, "" as long as it was not."""

    pid: int
    pidfd: int
    writer: int
    until: float
    killed: str = ""

    def kill(self, why: str) -> None:
        self.killed = self.killed or why
        self.until = float("inf")
        signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)


class _Serving:
    def __init__(self, fd: int, seconds_max: float, run_bytes_max: int, worker: int) -> None:
        self._fd = fd
        self._seconds_max = seconds_max
        self._run_bytes_max = run_bytes_max
        self._worker = worker
        self._running: list[_Running] = []

    def serve(self) -> None:
        """Until the worker has closed its end."""
        die_with(self._worker)
        _close_others({self._fd})
        self._prepare()
        with socket.socket(fileno=self._fd) as asks:
            while self._turn(asks):
                pass
        for each in self._running:
            each.kill(_STOPPED)
        for each in self._running:
            os.waitpid(each.pid, 0)

    def _prepare(self) -> None:
        """What every trial would do first."""
        share_arena(self._run_bytes_max)
        np.random.default_rng(0).standard_normal(1)
        gc.freeze()  # a collection would write to what is the worker's own memory until then

    def _turn(self, asks: socket.socket) -> bool:
        """Wait for something, and do it. False when the worker wants nothing any more."""
        poll = select.poll()
        if len(self._running) < AT_ONCE:
            poll.register(asks, select.POLLIN)
        for each in self._running:
            poll.register(each.pidfd, select.POLLIN)
            if not each.killed:
                poll.register(each.writer, 0)  # an error, when nobody reads any more
        until = min((each.until for each in self._running), default=float("inf"))
        left = until - time.monotonic()
        found = {fd for fd, _ in poll.poll(None if left == float("inf") else max(0.0, left) * 1000)}
        for each in list(self._running):
            if each.pidfd in found:
                self._bury(each)
            elif each.writer in found:
                each.kill(_STOPPED)
            elif each.until <= time.monotonic():
                each.kill(_say_long(self._seconds_max))
        return asks.fileno() not in found or self._take(asks)

    def _take(self, asks: socket.socket) -> bool:
        text, fds, _, _ = socket.recv_fds(asks, _TASK_MAX_BYTES, 1)
        if not text:
            return False
        [writer] = fds
        tester = os.getpid()
        try:
            pid = os.fork()
        except OSError as error:
            _say(writer, ended=f"no process can be started to try it ({error.strerror}); put it there again later")
            os.close(writer)
            return True
        if not pid:
            _become("penstock-trial", lambda: _try(text, writer, tester))
        self._running.append(_Running(pid, os.pidfd_open(pid), writer, time.monotonic() + self._seconds_max))
        return True

    def _bury(self, each: _Running) -> None:
        _, status = os.waitpid(each.pid, 0)
        os.close(each.pidfd)
        self._running.remove(each)
        with contextlib.suppress(BrokenPipeError):  # whoever asked does not want to know any more
            _say(each.writer, ended=each.killed or say_end(os.waitstatus_to_exitcode(status)))
        os.close(each.writer)


def say_end(code: int) -> str:
    """What was wrong with the end of a trial, or "". ``code``: the signal below 0, as subprocess has it."""
    if not code:
        return ""
    if code > 0:
        return f"its trial failed with exit code {code}; what it wrote to standard error is above"
    number = -code
    try:
        name = f"signal {number} ({signal.Signals(number).name})"
    except ValueError:
        name = f"signal {number}"
    if number == signal.SIGKILL:
        return (
            f"its trial was ended by {name}, as the kernel does when memory is out; give it more memory, or lower its "
            "max_batch_size"
        )
    return (
        f"its trial was ended by {name}, and so would be the worker; export it anew, or try another version of "
        "ONNX Runtime"
    )


def _say_long(seconds: float) -> str:
    return (
        f"its trial took longer than {seconds:g} s and was ended; if it needs that long, raise [worker] trial_max_s, "
        "or make it 0 to have no model tried"
    )


def _say(fd: int, **what: object) -> None:
    os.write(fd, json.dumps(what).encode() + b"\n")


def _close_others(keep: set[int]) -> None:
    """All that is open but standard error; nothing is read, and nothing printed."""
    for name in os.listdir("/proc/self/fd"):
        if int(name) > 2 and int(name) not in keep:
            with contextlib.suppress(OSError):  # the listing's own
                os.close(int(name))
    null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    os.dup2(null, 0)
    os.dup2(null, 1)
    os.close(null)


def _become(name: str, run: Callable[[], None]) -> NoReturn:
    """The end of a fork: nothing of who forked is gone back to, nor tidied up. ``name``: as ps and top show it."""
    code = EXIT_DEFECT
    try:
        Path("/proc/self/comm").write_text(name)
        gc.freeze()  # what holds descriptors would close those numbers again, whoever has them by then
        faulthandler.disable()
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGINT, signal.SIGTERM):  # for all processes of a terminal, or a unit: the worker decides
            signal.signal(number, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        logging.disable(logging.CRITICAL)  # the worker says it
        run()
        code = 0
    finally:
        if code:
            traceback.print_exc()
            sys.stderr.flush()
        os._exit(code)


# --- in the process that is thrown away ---


def _try(text: bytes, writer: int, tester: int) -> None:
    die_with(tester)
    _close_others({writer})
    end_before_others(_OOM_SCORE)
    file, device, store = _unpack(text)
    problem = ""
    try:
        model = load_and_probe(file, store, device=device, thorough=False)
        del model  # a worker takes it out of memory, too, one day
    except LoadError as error:
        problem = str(error)
    _say(writer, said=problem)
