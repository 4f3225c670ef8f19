"""``penstock up``: starts the processes of one server, says when they serve, starts again what dies, stops all in
order.

On a server systemd does this instead, with the same commands: processes tell either of them that they are ready in
the same way (sd_notify(3)), and are stopped by the same signal.
"""

from __future__ import annotations

import http.client
import json
import logging
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, NamedTuple, NoReturn

from penstock.bin.cpus import format_cpus
from penstock.bin.devices import VISIBLE, Device
from penstock.broker.options import RECORD_MAX_BYTES
from penstock.gateway.process import listen, url_of
from penstock.wire.endpoints import EndpointError, Guard, RuntimeDir
from penstock.wire.process import StopSignal, fields
from penstock.worker.gpus import EXIT_GPU_LOST

log = logging.getLogger("penstock.launcher")

_BACKOFF_FIRST_S: Final = 0.2  # before a process that has died is started again
_BACKOFF_MAX_S: Final = 10.0
_STEADY_S: Final = 30.0  # who has run so long begins with the first backoff again
_STOP_MAX_S: Final = 20.0  # for a process to drain before it is killed
_PROBE_S: Final = 0.05  # between two looks whether HTTP answers
_CREDENTIALS: Final = struct.Struct("3i")  # pid, uid, gid


class LaunchError(Exception):
    """The server cannot start; the message is a sentence, or empty when the process that failed has said it."""

    def __init__(self, sentence: str, code: int = 1) -> None:
        super().__init__(sentence)
        self.code = code


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What to start."""

    models: Path
    http: str
    workers: int  # on each device
    gateways: int
    devices: Sequence[Device]
    shares: Sequence[Collection[int]]  # cores of each worker; empty: any
    bind: str
    config: Path | None
    runtime: RuntimeDir
    log_format: str
    log_level: str
    record: Path | None = None
    record_max_bytes: int = RECORD_MAX_BYTES


@dataclass(slots=True)
class Child:
    """A process and what is needed to start it again. ``exit_code``: of its last life, None while it lives."""

    name: str
    arguments: list[str]
    inherits: tuple[int, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)  # more than the launcher's own
    process: subprocess.Popen[bytes] | None = None
    pidfd: int = -1
    ready: bool = False
    failed: bool = False  # it says that it cannot do its work, and will end
    exit_code: int | None = None
    started: float = 0.0
    backoff_s: float = 0.0
    start_at: float = field(default=float("inf"))


class WorkerPlan(NamedTuple):
    """A worker to start: its name, what the command line says beside what all workers are told, its environment."""

    name: str
    arguments: list[str]
    environment: dict[str, str]


def plan_workers(devices: Sequence[Device], each: int, shares: Sequence[Collection[int]] = ()) -> list[WorkerPlan]:
    """``each``: workers on each device; ``shares``: the cores of each worker, or nothing. Of all GPUs a worker sees its
    own alone, before it begins."""
    found: list[WorkerPlan] = []
    for device in devices:
        for number in range(each):
            name = device.name if device.uuid and each == 1 else f"{device.name}-{number}"
            arguments = [f"--device={device.name}", f"--name={name}"]
            if device.uuid:
                arguments.append(f"--gpu={device.uuid}")
            if shares:
                arguments.append(f"--cpus={format_cpus(shares[len(found)])}")
            found.append(WorkerPlan(name, arguments, {VISIBLE: device.uuid} if device.uuid else {}))
    return found


def next_backoff(before_s: float, ran_s: float) -> float:
    """How long to wait before a process that ran for so long is started again. ``before_s``: how long it was last
    time, 0 when this is the first."""
    return _BACKOFF_FIRST_S if ran_s >= _STEADY_S or not before_s else min(before_s * 2, _BACKOFF_MAX_S)


class Launcher:
    """``run`` starts everything, calls ``announce`` with the URL once it serves, and returns the exit code."""

    def __init__(self, plan: Plan, announce: Callable[[str], None]) -> None:
        self._plan = plan
        self._announce = announce
        self._poll = select.poll()
        self._children: list[Child] = []

    def run(self) -> int:
        """Raises EndpointError and LaunchError when the server cannot start."""
        plan = self._plan
        plan.runtime.make()
        path = plan.runtime.path / "launcher.sock"
        try:
            guard = Guard(path)
        except EndpointError:
            raise LaunchError(
                f"another 'penstock up' runs in {plan.runtime.path}; stop it, or choose another --runtime-dir"
            ) from None
        listener = None
        self._stop_signal = StopSignal()
        self._notify = _notify_socket(path)
        self._poll.register(self._notify, select.POLLIN)
        self._poll.register(self._stop_signal.fileno(), select.POLLIN)
        try:
            listener = listen(plan.http)
            if self._start_all(listener):
                self._announce(url_of(listener))
                self._supervise()
            return 0
        except LaunchError as error:
            if str(error):
                raise
            return error.code
        finally:
            self._stop_all()
            if listener is not None:
                listener.close()
            self._notify.close()
            self._stop_signal.restore()
            guard.release()

    # --- starting ---

    def _start_all(self, listener: socket.socket) -> bool:
        """Broker, workers, gateways; HTTP listens when the models are loaded. False: told to stop meanwhile."""
        plan = self._plan
        options = [
            f"--runtime-dir={plan.runtime.path}",
            f"--log-format={plan.log_format}",
            f"--log-level={plan.log_level}",
        ]
        config = [f"--config={plan.config}"] if plan.config else []
        bind = [f"--bind={plan.bind}"] if plan.bind else []
        record = (
            [f"--record={plan.record}", f"--record-max-bytes={plan.record_max_bytes}"]
            if plan.record is not None
            else []
        )
        broker = self._start("broker", ["broker", *options, *config, *bind, *record])
        if not self._wait([broker]):
            return False
        results = ["--bind=tcp://127.0.0.1:0"] if plan.bind else []
        models = ["--", str(plan.models)]  # a name may begin with a hyphen
        wanted = plan_workers(plan.devices, plan.workers, plan.shares)
        workers: list[Child] = []
        # The first alone: what is wrong with a model is then said once.
        for some in wanted[:1], wanted[1:]:
            for name, arguments, environment in some:
                command = ["worker", *options, *config, *results, *arguments, *models]
                workers.append(self._start(name, command, environment=environment))
            if not self._wait(workers):
                return False
        if not any(worker.ready for worker in workers):
            raise LaunchError("", EXIT_GPU_LOST)
        try:
            listener.listen()
        except OSError as error:  # a port that is only bound is not yet ours alone
            raise LaunchError(f"cannot listen on {plan.http}: {error.strerror}") from None
        fd = listener.fileno()
        gateways = []
        for number in range(plan.gateways):
            name = f"gateway-{number}"
            gateways.append(
                self._start(name, ["gateway", f"--http=fd://{fd}", f"--name={name}", *options, *config], (fd,))
            )
        return self._wait(gateways) and self._wait_until(lambda: _answers(url_of(listener)))

    def _start(
        self,
        name: str,
        arguments: Sequence[str],
        inherits: tuple[int, ...] = (),
        environment: Mapping[str, str] | None = None,
    ) -> Child:
        command, *options = arguments
        start = [sys.executable, "-m", "penstock.bin", command, f"--parent={os.getpid()}"]
        child = Child(name, [*start, *options], inherits, environment or {})
        self._children.append(child)
        self._spawn(child)
        return child

    def _spawn(self, child: Child) -> None:
        environment = os.environ | child.environment | {"NOTIFY_SOCKET": str(self._plan.runtime.path / "launcher.sock")}
        child.process = subprocess.Popen(
            child.arguments,
            env=environment,
            stdin=subprocess.DEVNULL,
            pass_fds=child.inherits,
            start_new_session=True,  # Ctrl-C in a terminal is for the launcher, which stops the others in their order
        )
        child.pidfd = os.pidfd_open(child.process.pid)
        child.ready, child.failed, child.exit_code = False, False, None
        child.started, child.start_at = time.monotonic(), float("inf")
        self._poll.register(child.pidfd, select.POLLIN)

    def _wait(self, children: Sequence[Child]) -> bool:
        """Until all are ready, or have no GPU to work on: the others do without them. False: told to stop meanwhile.
        LaunchError: a process has ended for another reason."""
        return self._wait_until(lambda: all(child.ready or child.failed for child in children))

    def _wait_until(self, condition: Callable[[], bool]) -> bool:
        while not condition():
            self._turn(time.monotonic() + _PROBE_S)
            if self._stop_signal.received:
                return False
            for child in self._children:
                if child.exit_code is not None and child.exit_code != EXIT_GPU_LOST:
                    _give_up(child.name, child.exit_code)
        return True

    # --- running ---

    def _supervise(self) -> None:
        while not self._stop_signal.received:
            self._turn(min(child.start_at for child in self._children))
            now = time.monotonic()
            for child in self._children:
                if child.exit_code is not None and child.start_at == float("inf"):
                    child.backoff_s = next_backoff(child.backoff_s, now - child.started)
                    child.start_at = now + child.backoff_s
                    log.warning(
                        "process ended; it is started again",
                        extra=fields(process=child.name, exit_code=child.exit_code, after_s=child.backoff_s),
                    )
                elif child.start_at <= now:
                    self._spawn(child)

    def _turn(self, until: float) -> None:
        """Take in what has happened, for at most so long."""
        wait_s = min(max(0.0, until - time.monotonic()), 3600.0)
        for readable, _ in self._poll.poll(wait_s * 1000):
            if readable == self._stop_signal.fileno():
                self._stop_signal.clear()
            elif readable == self._notify.fileno():
                self._read_notify()
            else:
                self._reap(readable)

    def _read_notify(self) -> None:
        data, ancillary, _, _ = self._notify.recvmsg(4096, socket.CMSG_SPACE(_CREDENTIALS.size))
        for level, kind, content in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_CREDENTIALS:
                pid, _, _ = _CREDENTIALS.unpack(content[: _CREDENTIALS.size])
                for child in self._children:
                    if child.process is not None and child.process.pid == pid:
                        lines = data.split(b"\n")
                        child.ready |= b"READY=1" in lines
                        child.failed |= any(line.startswith(b"ERRNO=") for line in lines)

    def _reap(self, pidfd: int) -> None:
        child = next(child for child in self._children if child.pidfd == pidfd)
        assert child.process is not None
        child.exit_code = child.process.wait()
        child.failed |= child.exit_code == EXIT_GPU_LOST
        self._poll.unregister(pidfd)
        os.close(pidfd)
        child.pidfd = -1

    # --- stopping ---

    def _stop_all(self) -> None:
        """Gateways first, so that nothing new comes; the broker once it holds nothing; then the workers."""
        gateways = [child for child in self._children if child.name.startswith("gateway")]
        broker = [child for child in self._children if child.name == "broker"]
        workers = [child for child in self._children if child not in gateways and child not in broker]
        for children in (gateways, broker, workers):
            self._stop(children)

    def _stop(self, children: Iterable[Child]) -> None:
        alive = [child for child in children if child.pidfd >= 0]
        for child in alive:
            signal.pidfd_send_signal(child.pidfd, signal.SIGTERM)
        until = time.monotonic() + _STOP_MAX_S
        while any(child.pidfd >= 0 for child in alive):
            if time.monotonic() >= until:
                for child in alive:
                    if child.pidfd >= 0:
                        log.error("process did not stop in time; it is killed", extra=fields(process=child.name))
                        signal.pidfd_send_signal(child.pidfd, signal.SIGKILL)
                until = float("inf")
            self._turn(min(until, time.monotonic() + 1.0))


def _give_up(name: str, exit_code: int) -> NoReturn:
    """Raises LaunchError: what ends by itself has said why, what is ended by a signal has not."""
    if exit_code > 0:
        raise LaunchError("", exit_code)
    how = f"was ended by signal {-exit_code}" if exit_code else "ended"
    raise LaunchError(f"the process {name} {how} before the server was ready; start it again")


def _notify_socket(path: Path) -> socket.socket:
    notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
    notify.bind(os.fspath(path))
    notify.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
    return notify


def _answers(url: str) -> bool:
    """Whether HTTP answers and knows how each model fares: all ready, or for good not."""
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=1.0)
    try:
        connection.request("GET", "/v2/health/ready")
        response = connection.getresponse()
        body = response.read()
    except OSError:
        return False
    finally:
        connection.close()
    if response.status == 200:
        return True
    reason = json.loads(body)["error"].partition("; because ")[0]
    return "(UNAVAILABLE)" in reason and "(LOADING)" not in reason
