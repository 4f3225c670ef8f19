"""A worker and clients on another host, whose cable is cut and mended while every answer is checked."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from urllib.request import urlopen

import pytest

from bench import chaos
from tests.chaos.hosts import Hosts, NotAllowed, Tunnels
from tests.system.models import dense, write
from tests.system.servers import Process, wait_for

BROKER, HTTP = 7000, 8000  # ports; workers join the broker at the port after the first
RESULTS = {"near": 7010, "far": 7011, "idle": 7012}  # of workers
ADDRESS = f"tcp://127.0.0.1:{BROKER}"  # on both hosts
URL = f"http://127.0.0.1:{HTTP}"
NEVER = float("inf")


@dataclass(frozen=True)
class Models:
    asked: Path
    idle: Path  # nobody asks for what is there
    answers: chaos.Answers


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    asked, idle = (tmp_path_factory.mktemp(name) for name in ("asked", "idle"))
    chaos.make_repository(asked)
    write(idle, "dense", dense())
    return Models(asked, idle, chaos.Answers(asked / "heavy" / "1" / "model.onnx"))


@pytest.fixture(scope="module")
def hosts(require_command: Callable[[str, str], str]) -> Iterator[Hosts]:
    require_command("ip", "iproute2")
    with ExitStack() as stack:
        try:
            made = stack.enter_context(Hosts())
        except NotAllowed as why:
            pytest.skip(f"network namespaces are not allowed here ({why})")
        yield made


class Servers:
    """Broker, gateway and a worker on host A, two workers on host B, and tunnels between what they listen on."""

    def __init__(self, hosts: Hosts, tunnels: Tunnels, models: Models, directory: Path, stack: ExitStack) -> None:
        self._hosts, self._stack = hosts, stack
        for port in (BROKER, BROKER + 1, RESULTS["near"]):
            tunnels.forward(hosts.b, hosts.a, port)
        for name in ("far", "idle"):
            tunnels.forward(hosts.a, hosts.b, RESULTS[name])
        self.runtime = directory / "a"
        with hosts.a.inside():
            runtime = f"--runtime-dir={self.runtime}"
            self.broker = self._start("broker", runtime, f"--bind={ADDRESS}")
            self.near = self._start_worker("near", models.asked, runtime)
            self._start("gateway", runtime, f"--http=127.0.0.1:{HTTP}")
        with hosts.b.inside():
            runtime = f"--runtime-dir={directory / 'b'}"
            self.far = self._start_worker("far", models.asked, runtime, f"--broker={ADDRESS}")
            self.idle = self._start_worker("idle", models.idle, runtime, f"--broker={ADDRESS}")
        for worker in (self.near, self.far, self.idle):
            wait_for(partial(worker.said, "models loaded"), "a worker")

    def _start(self, *arguments: str) -> Process:
        process = Process([*arguments, "--log-format=json"])
        self._stack.callback(process.end)
        return process

    def _start_worker(self, name: str, models: Path, *arguments: str) -> Process:
        return self._start(
            "worker", str(models), *arguments, f"--name={name}", f"--bind=tcp://127.0.0.1:{RESULTS[name]}"
        )

    def told(self, event: str, worker: str) -> list[str]:
        """Of a worker by the broker: the reasons that it gave."""
        lines = [json.loads(line) for line in self.broker.errors]
        return [line.get("reason", "") for line in lines if (line["event"], line.get("worker")) == (event, worker)]

    def metrics(self) -> dict[str, float]:
        with self._hosts.a.inside():
            text = urlopen(f"{URL}/metrics", timeout=10).read().decode()
        return {name: float(value) for name, value in re.findall(r"^([a-z_]+(?:\{.*\})?) (\S+)$", text, re.MULTILINE)}

    def callers(self) -> int:
        return int(self.metrics()["penstock_callers"])

    def batches(self, worker: str) -> float:
        """How many it has run, as far as it has told; 0 while the broker does not know it."""
        told = re.compile(rf'penstock_batch_rows_count{{.*worker="{worker}".*}}')
        return sum([value for name, value in self.metrics().items() if told.fullmatch(name)])


@pytest.mark.parametrize("patience_ms", [0, 2000], ids=["tunnels stall", "tunnels break"])
def test_a_host_is_cut_off_and_comes_back(hosts: Hosts, models: Models, tmp_path: Path, patience_ms: int) -> None:
    """Over tunnels that stall, what was sent before the cut and during it comes late, in one go. Of those that break
    each end notices by itself."""
    with ExitStack() as stack:
        stack.callback(hosts.mend)
        servers = Servers(hosts, stack.enter_context(Tunnels(patience_ms)), models, tmp_path, stack)

        def ask(askers: list[chaos.Asker], rate: float, first: int) -> chaos.Load:
            for asker in askers:
                stack.callback(asker.close)
            return stack.enter_context(chaos.Load(askers, models.answers, rate, first))

        with hosts.a.inside():
            near = ask([*(chaos.HttpAsker(URL) for _ in range(4)), chaos.LibraryAsker(servers.runtime)], 200.0, 0)
        with hosts.b.inside():
            far = ask([chaos.LibraryAsker(ADDRESS) for _ in range(2)], 40.0, 1_000_000)

        def answered(load: chaos.Load, what: str) -> chaos.Recovery:
            """Something that is asked from now on, for every client."""
            recovery = load.happened(what)
            wait_for(lambda: recovery.last_s < NEVER, f"answers: {what}")
            return recovery

        answered(far, "before")
        wait_for(lambda: min(servers.batches("near"), servers.batches("far")) > 0, "work for both")
        callers = servers.callers()

        # On a machine that is busy a worker may have been lost and found before.
        before = {name: len(servers.told("worker lost", name)) for name in ("far", "idle")}

        def loss(name: str) -> str:
            """Why, when it has come."""
            return str(wait_for(lambda: servers.told("worker lost", name)[before[name] :], f"the loss of {name}")[0])

        cut = near.happened("cut")
        hosts.cut()
        wait_for(lambda: cut.last_s < NEVER, "answers without the other host")
        assert loss("far").endswith("while it had work")
        silence = loss("idle")
        assert float(silence.split()[2]) > 5, f"{silence}: its heartbeats tell"
        wait_for(lambda: servers.callers() == callers - 2, "the loss of the other host's clients")
        for worker in (servers.far, servers.idle):
            wait_for(partial(worker.said, "broker silent"), "the other host to notice")
        answered(near, "while it is cut off")

        hosts.mend()
        mended = answered(far, "mended")
        wait_for(lambda: servers.callers() == callers, "the clients")
        ran = wait_for(lambda: servers.batches("far"), "the worker")
        wait_for(lambda: servers.batches("far") > ran, "work for it")
        wait_for(lambda: len(servers.told("worker joined", "idle")) > before["idle"] + 1, "the other")
        answered(near, "mended")
        print(f"{silence}; {cut}; {mended}")
        assert "it started over" not in servers.told("worker lost", "far") + servers.told("worker lost", "idle")
        assert [process.process.poll() for process in (servers.far, servers.idle)] == [None, None]
    for load in (near, far):
        score = load.score
        assert (score.wrong, score.duplicated) == ([], [])
    assert near.score.lost == []
    assert near.score.answered == near.score.accepted
    # Requests that were out there for longer than they had may fail, but so that they may be asked again.
    assert [each for each in far.score.lost if " no answer in " not in each] == []
    assert len(far.score.lost) + far.score.answered == far.score.accepted
