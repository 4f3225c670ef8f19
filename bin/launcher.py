"""``penstock up``: starts the processes of one server, says when they serve, starts again what dies or is stuck,
replaces them one after another when it is asked to or their configuration has changed, and stops all in order.

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
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, NamedTuple, NoReturn

from penstock.bin.cpus import format_cpus
from penstock.bin.devices import VISIBLE, Device
from penstock.bin.options import EXIT_CANNOT_SERVE, Options
from penstock.bin.reload import CONFIG_LOOK_S, ConfigFile, changed_roles, mark_of, sweep, with_config
from penstock.bin.restart import IN_PLACE, SOCKET, Asker, RestartError, rss_bytes
from penstock.bin.supervision import LOOK_S, STUCK_S, Breaker, Pulse
from penstock.broker.options import RECORD_MAX_BYTES
from penstock.gateway.listening import listen, url_of
from penstock.jobs.store import OFF
from penstock.wire.arena import available_bytes
from penstock.wire.endpoints import EndpointError, Guard, InUseError, RuntimeDir, binding
from penstock.wire.process import SHORT_OF_DESCRIPTORS, WATCHDOG_FD, StopSignal, fields
from penstock.worker.config import ConfigError
from penstock.worker.gpus import EXIT_GPU_LOST

log = logging.getLogger("penstock.launcher")

JOBS: Final = "jobs"  # the role of who runs them
_STOP_MORE_S: Final = 10.0  # than its drain_max_s a process may take to end before it is killed
_KILL_MAX_S: Final = 5.0  # for the kernel to end a process that is killed; one that waits for a broken disk stays
_START_MAX_S: Final = 30.0  # for the successor of a broker or a gateway to be ready
_LOAD_MAX_S: Final = 3600.0  # for that of a worker: to prepare one model may take half an hour
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
    jobs_store: str | None = None  # in place of [jobs] store
    allow_client_shm: bool = False
    record: Path | None = None
    record_max_bytes: int = RECORD_MAX_BYTES
    options: Options = field(default_factory=Options)


@dataclass(slots=True)
class Child:
    """A process and what is needed to start it again. ``exit_code``: of its last life, None while it lives. ``held``:
    it is not started again when it ends. ``beats``: an eventfd that it writes to, so that the launcher learns that it
    lives without being woken."""

    name: str
    role: str
    arguments: list[str]
    inherits: tuple[int, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)  # more than the launcher's own
    process: subprocess.Popen[bytes] | None = None
    pidfd: int = -1
    ready: bool = False
    failed: bool = False  # it says that it cannot do its work, and will end
    exit_code: int | None = None
    ready_at: float = 0.0  # when ``ready`` became true
    start_at: float = field(default=float("inf"))
    held: bool = False
    beats: int = -1
    pulse: Pulse = field(default_factory=lambda: Pulse(0.0))
    breaker: Breaker = field(default_factory=Breaker)


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


class Launcher:
    """``run`` starts everything, calls ``announce`` with the URL once it serves, and returns the exit code."""

    def __init__(self, plan: Plan, announce: Callable[[str], None]) -> None:
        self._plan = plan
        self._announce = announce
        self._poll = select.poll()
        self._children: list[Child] = []
        self._look_at = float("inf")
        self._options = plan.options  # in force
        self._config = None if plan.config is None else ConfigFile(plan.config, plan.runtime.path)
        self._asked: Asker | None = None
        self._listener: socket.socket | None = None  # for who asks

    def run(self) -> int:
        """Raises EndpointError and LaunchError when the server cannot start."""
        plan = self._plan
        plan.runtime.make()
        path = plan.runtime.path / "launcher.sock"
        try:
            guard = Guard(path)
        except InUseError:
            raise LaunchError(
                f"another 'penstock up' runs in {plan.runtime.path}; stop it, or choose another --runtime-dir"
            ) from None
        listener = None
        try:
            self._notify = _notify_socket(path)
        except EndpointError:
            guard.release()
            raise
        self._stop_signal = StopSignal()
        self._poll.register(self._notify, select.POLLIN)
        self._poll.register(self._stop_signal.fileno(), select.POLLIN)
        try:
            self._keep_config()
            listener = listen(plan.http)
            if self._start_all(listener):
                self._follow_jobs()
                self._listen_for_asks()
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
            if self._listener is not None:
                self._listener.close()
                (plan.runtime.path / SOCKET).unlink(missing_ok=True)
            sweep(plan.runtime.path)
            self._notify.close()
            self._stop_signal.restore()
            guard.release()

    # --- starting ---

    def _keep_config(self) -> None:
        """The configuration as it is now is the one in force."""
        sweep(self._plan.runtime.path)
        if self._config is None:
            return
        try:
            toml, self._options = self._config.read()
            self._config.copy = self._config.keep(toml)
        except ConfigError as error:
            raise LaunchError(str(error), EXIT_CANNOT_SERVE) from None

    def _start_all(self, listener: socket.socket) -> bool:
        """Broker, workers, gateways; HTTP listens when the models are loaded. False: told to stop meanwhile."""
        plan = self._plan
        options, config = self._common(), self._with_config()
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
        shared = ["--allow-client-shm"] if plan.allow_client_shm else []
        for number in range(plan.gateways):
            name = f"gateway-{number}"
            arguments = [f"--http=fd://{fd}", f"--name={name}", *options, *config, *self._jobs_store(), *shared]
            gateways.append(self._start(name, ["gateway", *arguments], (fd,)))
        return self._wait(gateways) and self._wait_until(lambda: _answers(url_of(listener)))

    def _common(self) -> list[str]:
        """What every process is told."""
        plan = self._plan
        return [
            f"--runtime-dir={plan.runtime.path}",
            f"--log-format={plan.log_format}",
            f"--log-level={plan.log_level}",
        ]

    def _with_config(self) -> list[str]:
        return [f"--config={self._config.copy}"] if self._config else []

    def _jobs_store(self) -> list[str]:
        return [] if self._plan.jobs_store is None else [f"--jobs={self._plan.jobs_store}"]

    def _keeps_no_jobs(self, options: Options) -> bool:
        return (options.jobs.store if self._plan.jobs_store is None else self._plan.jobs_store) == OFF

    def _follow_jobs(self) -> None:
        """Whoever runs jobs is there as long as jobs are kept. Nobody waits for that: the server serves without."""
        running = [child for child in self._children if child.role == JOBS]
        if self._keeps_no_jobs(self._options):
            for child in running:
                child.held = True
                self._stop([child], self._step)
                self._forget(child)
        elif not running:
            command = [JOBS, "run", *self._common(), *self._with_config(), *self._jobs_store()]
            try:
                self._start(JOBS, command)
            except LaunchError as error:  # tried again, as one that has ended
                log.error("process cannot be started; it is tried again", extra=fields(process=JOBS, reason=str(error)))
                self._children[-1].start_at = time.monotonic() + LOOK_S

    def _start(
        self,
        name: str,
        arguments: Sequence[str],
        inherits: tuple[int, ...] = (),
        environment: Mapping[str, str] | None = None,
    ) -> Child:
        """``arguments``: the command, and its options behind it."""
        at = next((at for at, each in enumerate(arguments) if each.startswith("-")), len(arguments))
        start = [sys.executable, "-m", "penstock.bin", *arguments[:at], f"--parent={os.getpid()}"]
        child = Child(name, arguments[0], [*start, *arguments[at:]], inherits, environment or {})
        self._children.append(child)
        try:
            self._spawn(child)
        except OSError as error:
            raise LaunchError(f"cannot start the process {name}: {error.strerror}") from None
        return child

    def _spawn(self, child: Child) -> None:
        """Raises OSError: no process or no descriptor is to be had; nothing is left of the attempt."""
        if child.beats < 0:
            child.beats = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        own = {
            "NOTIFY_SOCKET": str(self._plan.runtime.path / "launcher.sock"),
            "WATCHDOG_USEC": str(round(STUCK_S * 1e6)),
            WATCHDOG_FD: str(child.beats),
        }
        process = subprocess.Popen(
            child.arguments,
            env=os.environ | child.environment | own,
            stdin=subprocess.DEVNULL,
            pass_fds=(*child.inherits, child.beats),
            start_new_session=True,  # Ctrl-C in a terminal is for the launcher, which stops the others in their order
        )
        try:
            child.pidfd = os.pidfd_open(process.pid)
        except OSError:
            process.kill()
            with suppress(subprocess.TimeoutExpired):
                process.wait(_KILL_MAX_S)
            raise
        child.process = process
        child.ready, child.failed, child.exit_code = False, False, None
        child.start_at = float("inf")
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
        self._look_at = time.monotonic() + LOOK_S
        config_at = time.monotonic() if self._config is not None else float("inf")
        while not self._stop_signal.received:
            self._step(config_at)
            if self._asked is not None:
                self._restart(self._asked)
                self._asked.close()
                self._asked = None
            if self._config is not None and time.monotonic() >= config_at:
                if self._config.watch.changed(mark_of(self._config.path)):
                    self._reload(self._config)
                config_at = time.monotonic() + CONFIG_LOOK_S

    def _step(self, until: float) -> None:
        """Take in what happens, for at most so long, and start again what has ended."""
        self._turn(min([until, self._look_at, *[child.start_at for child in self._children]]))
        now = time.monotonic()
        if now >= self._look_at:
            self._look(now)
        for child in self._children:
            if child.held:
                continue
            if child.exit_code is not None and child.start_at == float("inf"):
                self._plan_start(child, now)
            elif child.start_at <= now:
                try:
                    self._spawn(child)
                except OSError as error:
                    child.start_at = now + child.breaker.ended(now, 0.0)
                    log.error(
                        "process cannot be started; it is tried again",
                        extra=fields(process=child.name, reason=error.strerror, after_s=child.start_at - now),
                    )

    def _plan_start(self, child: Child, now: float) -> None:
        was_broken, served_s = child.breaker.broken, now - child.ready_at if child.ready else 0.0
        pause_s = child.breaker.ended(now, served_s, hopeless=child.exit_code == EXIT_CANNOT_SERVE)
        child.start_at = now + pause_s
        about = fields(process=child.name, exit_code=child.exit_code, after_s=pause_s)
        if child.breaker.broken and not was_broken:
            log.error("process ends again and again; it is only tried now and then", extra=about)
        else:
            log.warning("process ended; it is started again", extra=about)

    def _look(self, now: float) -> None:
        """Kill who is stuck, so that it is started again."""
        late_s = now - self._look_at
        self._look_at = now + LOOK_S
        if self._listener is not None:
            self._poll.register(self._listener, select.POLLIN)
        for child in self._children:
            beat = False
            with suppress(BlockingIOError):
                beat = child.beats >= 0 and os.eventfd_read(child.beats) > 0
            stuck = child.pulse.feel(now, beat or not child.ready or child.held, late_s)
            if stuck and child.pidfd >= 0:
                log.error("process is stuck; it is killed", extra=fields(process=child.name, limit_s=STUCK_S))
                signal.pidfd_send_signal(child.pidfd, signal.SIGKILL)

    def _turn(self, until: float) -> None:
        """Take in what has happened, for at most so long."""
        wait_s = min(max(0.0, until - time.monotonic()), 3600.0)
        for readable, _ in self._poll.poll(wait_s * 1000):
            if readable == self._stop_signal.fileno():
                self._stop_signal.clear()
            elif readable == self._notify.fileno():
                self._read_notify()
            elif self._listener is not None and readable == self._listener.fileno():
                self._hear_ask()
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
                        if not child.ready and b"READY=1" in lines:
                            child.ready, child.ready_at = True, time.monotonic()
                            child.pulse = Pulse(child.ready_at)
                        child.failed |= any(line.startswith(b"ERRNO=") for line in lines)

    def _reap(self, pidfd: int) -> None:
        child = next(child for child in self._children if child.pidfd == pidfd)
        assert child.process is not None
        child.exit_code = child.process.wait()
        child.failed |= child.exit_code == EXIT_GPU_LOST
        self._poll.unregister(pidfd)
        os.close(pidfd)
        child.pidfd = -1

    # --- replacing one after another ---

    def _listen_for_asks(self) -> None:
        """Without room for the socket all else is as with it."""
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        path = self._plan.runtime.path / SOCKET
        path.unlink(missing_ok=True)
        try:
            with binding(path):
                listener.bind(os.fspath(path))
        except EndpointError as error:
            listener.close()
            log.warning("'penstock restart' will not be heard", extra=fields(reason=str(error)))
            return
        listener.listen()
        listener.setblocking(False)
        self._poll.register(listener, select.POLLIN)
        self._listener = listener

    def _hear_ask(self) -> None:
        assert self._listener is not None
        try:
            asker = Asker(self._listener.accept()[0])
        except OSError as error:
            if error.errno in SHORT_OF_DESCRIPTORS:
                self._poll.unregister(self._listener)  # until the next look: it would be readable all the time
            return
        if self._asked is None:
            self._asked = asker
        else:
            asker.end("another restart is under way; wait for it")
            asker.close()

    def _restart(self, asker: Asker) -> None:
        """Gateways, who runs jobs, workers, broker: each is replaced, and serves, before the next is touched."""
        try:
            ask = asker.hear()
            log.info("rolling restart begins", extra=fields(roles=" ".join(ask.roles), in_place=ask.in_place))
            for role in ask.roles:
                for child in [child for child in self._children if child.role == role]:
                    self._replace(child, child.arguments, ask.in_place, asker.say)
            log.info("rolling restart ended")
            asker.end("")
        except RestartError as error:
            log.error("rolling restart broken off", extra=fields(reason=str(error)))
            asker.end(str(error))

    def _replace(self, child: Child, arguments: list[str], in_place: bool, say: Callable[[str], None]) -> None:
        """``arguments``: of the new process. Raises RestartError."""
        if self._stop_signal.received:
            raise RestartError("the server is told to stop")
        begin = time.monotonic()
        successor = child
        if self._beside(child, in_place, say):
            successor = Child(child.name, child.role, arguments, child.inherits, child.environment, held=True)
            self._children.append(successor)
            try:
                self._spawn(successor)
                self._wait_for(successor)
            except (OSError, RestartError) as error:
                self._stop([successor], self._step)
                self._forget(successor)
                raise RestartError(f"{child.name} serves on as it was: {error}") from None
        child.held = True
        if not self._stop([child], self._step):
            say(f"{child.name}: it did not end in time, and was killed")
        if successor is child:
            child.held, child.breaker, child.arguments = False, Breaker(), arguments
            try:
                self._spawn(child)
            except OSError as error:  # it is tried again, as ever
                raise RestartError(f"{child.name} cannot be started: {error.strerror}") from None
            self._wait_for(child)
        else:
            self._forget(child)
            successor.held = False
        assert successor.process is not None
        seconds = time.monotonic() - begin
        log.info("process replaced", extra=fields(process=child.name, by=successor.process.pid, seconds=seconds))
        say(f"{child.name}: replaced by {successor.process.pid} in {seconds:.1f} s")

    def _beside(self, child: Child, in_place: bool, say: Callable[[str], None]) -> bool:
        """Whether its successor can be started while it serves."""
        if child.role == "broker" or in_place or child.process is None or child.pidfd < 0:
            return False
        needed = rss_bytes(child.process.pid)
        if needed < available_bytes():
            return True
        say(f"{child.name}: memory does not suffice for two of it ({needed >> 20} MiB); {IN_PLACE}")
        return False

    def _wait_for(self, child: Child) -> None:
        """Until it is ready. Raises RestartError."""
        limit_s = _LOAD_MAX_S if child.role == "worker" else _START_MAX_S
        until = time.monotonic() + limit_s
        while not child.ready:
            self._step(until)
            if time.monotonic() >= until:
                raise RestartError(f"the new process was not ready within {limit_s:g} s")
            if self._stop_signal.received:
                raise RestartError("the server is told to stop")
            if child.exit_code is not None:
                raise RestartError(f"the new process ended with exit code {child.exit_code} before it was ready")

    def _forget(self, child: Child) -> None:
        self._children.remove(child)
        if child.beats >= 0:
            os.close(child.beats)

    # --- another configuration ---

    def _reload(self, config: ConfigFile) -> None:
        """The file has changed. What cannot be followed, or does not come up, changes nothing."""
        try:
            toml, options = config.read()
            roles = changed_roles(self._options, options)
            if not roles:
                log.info("configuration says what is in force already", extra=fields(file=str(config.path)))
                return
            old, new = config.copy, config.keep(toml)
        except ConfigError as error:
            log.error("configuration cannot be followed; the old one stays in force", extra=fields(reason=str(error)))
            return
        if self._keeps_no_jobs(options):
            roles = tuple(role for role in roles if role != JOBS)  # nobody is to run them: see _follow_jobs
        log.info("configuration has changed; processes are replaced", extra=fields(roles=" ".join(roles)))
        try:
            for child in [child for role in roles for child in self._children if child.role == role]:
                self._renew(child, with_config(child.arguments, old, new))
        except RestartError as error:
            log.error("configuration does not work; the old one stays in force", extra=fields(reason=str(error)))
            self._go_back(new, old)
            new.unlink(missing_ok=True)
            return
        for child in self._children:
            child.arguments = with_config(child.arguments, old, new)
        self._options, config.copy = options, new
        self._follow_jobs()
        old.unlink(missing_ok=True)
        log.info("configuration is in force", extra=fields(file=str(config.path)))

    def _renew(self, child: Child, arguments: list[str]) -> None:
        """Raises RestartError. What does not serve now, as one whose GPU is lost, is tried at once, and not waited
        for."""
        if child.pidfd >= 0 and child.ready:
            self._replace(child, arguments, False, log.debug)
            return
        child.arguments, child.breaker = arguments, Breaker()
        if child.pidfd >= 0:  # it is starting, with the old one
            self._signal([child], signal.SIGTERM)
        else:
            child.start_at = time.monotonic()

    def _go_back(self, new: Path, old: Path) -> None:
        """Of those that have been replaced, and of a broker that does not come up."""
        for child in [child for child in self._children if f"--config={new}" in child.arguments]:
            if self._stop_signal.received:
                return
            try:
                self._replace(child, with_config(child.arguments, new, old), not child.ready, log.debug)
            except RestartError as error:
                child.arguments = with_config(child.arguments, new, old)
                log.error("process does not come up", extra=fields(process=child.name, reason=str(error)))

    # --- stopping ---

    def _stop_all(self) -> None:
        """Gateways first, so that nothing new comes, then who runs jobs, and puts back what does not end soon; then the
        broker, which takes in nothing more and ends once it holds nothing, for which it needs the workers: they are
        last."""
        for role in ("gateway", JOBS, "broker", "worker"):
            self._stop([child for child in self._children if child.role == role], self._turn)
        for path in (self._plan.runtime.http, self._plan.runtime.jobs):
            path.unlink(missing_ok=True)
        self._plan.runtime.sweep()  # after those that were killed

    def _stop(self, children: Sequence[Child], turn: Callable[[float], None]) -> bool:
        """Whether all have ended as they were told to. ``turn``: what to do meanwhile."""
        alive = [child for child in children if child.pidfd >= 0]
        limit_s = max((self._drain_max_s(child.role) for child in alive), default=0.0) + _STOP_MORE_S
        self._signal(alive, signal.SIGTERM)
        if self._ended(alive, limit_s, turn):
            return True
        for child in alive:
            if child.pidfd >= 0:
                log.error("process did not stop in time; it is killed", extra=fields(process=child.name))
        self._signal(alive, signal.SIGKILL)
        if not self._ended(alive, _KILL_MAX_S, turn):
            names = " ".join(child.name for child in alive if child.pidfd >= 0)
            log.error("process cannot be killed; it is left behind", extra=fields(process=names))
        return False

    def _signal(self, children: Sequence[Child], number: signal.Signals) -> None:
        for child in children:
            if child.pidfd >= 0:
                signal.pidfd_send_signal(child.pidfd, number)

    def _ended(self, children: Sequence[Child], limit_s: float, turn: Callable[[float], None]) -> bool:
        """Whether all have ended within the limit."""
        until = time.monotonic() + limit_s
        while any(child.pidfd >= 0 for child in children) and time.monotonic() < until:
            turn(until)
        return not any(child.pidfd >= 0 for child in children)

    def _drain_max_s(self, role: str) -> float:
        limit_s: float = getattr(self._options, role).drain_max_s
        return limit_s


def _give_up(name: str, exit_code: int) -> NoReturn:
    """Raises LaunchError: what ends by itself has said why, what is ended by a signal has not."""
    if exit_code > 0:
        raise LaunchError("", exit_code)
    how = f"was ended by signal {-exit_code}" if exit_code else "ended"
    raise LaunchError(f"the process {name} {how} before the server was ready; start it again")


def _notify_socket(path: Path) -> socket.socket:
    notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
    try:
        with binding(path):
            notify.bind(os.fspath(path))
    except EndpointError:
        notify.close()
        raise
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
