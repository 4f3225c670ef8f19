"""A server on GPUs that are made up: NVIDIA's library is a stand-in in every process, and models run on the CPU."""

from __future__ import annotations

import json
import os
import re
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from penstock.worker.config import ModelConfig
from penstock.worker.gpus import EXIT_GPU_LOST
from tests.system.chromium import Browser
from tests.system.models import dense, slow, write
from tests.system.servers import PENSTOCK, Process, Server, StartServer, wait_for

ROOT = Path(__file__).parents[2]
# Python imports it before anything else. A file by the name of a GPU says that this one is lost.
STAND_IN = """
import sys
from pathlib import Path
from typing import Any
from tests.worker.nvml import Card, Nvml, error, h100

class Losable(Card):
    def ask(self, what: str) -> Any:
        if what == "Temperature" and Path({lost!r}, self.uuid).exists():
            raise error("GPU_IS_LOST")
        return super().ask(what)

sys.modules["pynvml"] = Nvml(*[Losable(uuid, h100().known) for uuid in ("GPU-1", "GPU-2")])
"""
ROW = {"inputs": [{"name": "x", "shape": [1, 1], "datatype": "FP32", "data": [2.0]}]}


def make_environment(directory: Path) -> dict[str, str]:
    """Its folder ``lost`` has the GPUs that are."""
    (directory / "lost").mkdir()
    (directory / "site").mkdir()
    (directory / "site" / "sitecustomize.py").write_text(STAND_IN.format(lost=str(directory / "lost")))
    paths = [str(directory / "site"), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {"PYTHONPATH": os.pathsep.join(paths)}


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    return make_environment(tmp_path)


@pytest.fixture
def lost(tmp_path: Path, environment: dict[str, str]) -> Path:
    return tmp_path / "lost"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("models")
    config = 'providers = ["cpu"]\n' if "providers" in ModelConfig.__struct_fields__ else ""
    write(path, "slow", slow(20), config=config)
    write(path, "dense", dense(), config=config)
    return str(path)


@pytest.fixture(scope="module")
def server(models: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One with two GPUs that are well."""
    directory = tmp_path_factory.mktemp("server")
    server = Server(directory / "run", models, environment=make_environment(directory))
    yield server
    server.check_clean_end()


def visible(pid: int) -> str:
    variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    return b"".join(each for each in variables if each.startswith(b"CUDA_VISIBLE_DEVICES=")).decode().partition("=")[2]


def logged(server: Server, event: str) -> list[dict[str, Any]]:
    return [line for line in server.log() if line["event"] == event]


def test_every_gpu_has_a_worker_that_sees_it_alone(server: Server) -> None:
    assert sorted(visible(pid) for pid in server.children("worker")) == ["GPU-1", "GPU-2"]
    joined = {(line["worker"], line["device"]) for line in logged(server, "worker joined")}
    assert joined == {("cuda:0", "cuda:0"), ("cuda:1", "cuda:1")}
    metrics = wait_for(
        lambda: (told := server.metrics()).get('nv_gpu_utilization{gpu_uuid="GPU-2"}') and told, "figures of GPUs"
    )
    assert metrics['penstock_gpu_power_watts{gpu="GPU-2",worker="cuda:1"}'] == 512.345
    assert metrics['nv_gpu_power_usage{gpu_uuid="GPU-2"}'] == 512.345
    assert metrics['penstock_gpu_throttled{gpu="GPU-2",reason="power",worker="cuda:1"}'] == 1


def test_the_page_and_top_show_gpus(server: Server, browser: Browser) -> None:
    wait_for(lambda: 'nv_gpu_utilization{gpu_uuid="GPU-2"}' in server.metrics(), "figures of GPUs")
    top = [*PENSTOCK, "top", "--once", f"--url={server.url}"]
    said = subprocess.run(top, capture_output=True, text=True, check=True, env=os.environ | {"COLUMNS": "160"}).stdout
    assert re.search(r"cuda:1 +power +93% +20 GiB of 80 GiB +61 °C +512 of 700 W +GPU-2", said)
    browser.open(server.url + "/")
    row = "document.querySelectorAll('#gpus tbody tr')[1]"
    browser.until(row, "GPUs on the page")
    cells = browser.evaluate(f"[...{row}.cells].map((cell) => cell.textContent)")
    assert cells == [
        *("cuda:1", "held down by power", "93 %", "20\u00a0GiB of 80\u00a0GiB", "61 °C", "512 of 700 W", "GPU-2")
    ]
    assert not browser.evaluate("document.getElementById('gpus-card').hidden")


def test_an_inherited_list_of_gpus_is_kept_to(
    start_server: StartServer, models: str, environment: dict[str, str]
) -> None:
    server = start_server(models, "--workers=2", environment=environment | {"CUDA_VISIBLE_DEVICES": "1"})
    assert [visible(pid) for pid in server.children("worker")] == ["GPU-2", "GPU-2"]
    assert {line["worker"] for line in logged(server, "worker joined")} == {"cuda:0-0", "cuda:0-1"}
    server = start_server(models, environment=environment | {"CUDA_VISIBLE_DEVICES": ""})
    assert {line["worker"] for line in logged(server, "worker joined")} == {"cpu-0"}


def test_a_gpu_that_is_lost_takes_its_worker_alone(
    start_server: StartServer, models: str, environment: dict[str, str], lost: Path
) -> None:
    """What its worker held is run elsewhere, and whoever looks finds out why there is one less."""
    server = start_server(models, "--device=cuda", environment=environment)
    statuses: list[int] = []
    enough = threading.Event()

    def ask() -> None:
        while not enough.is_set():
            statuses.append(server.infer("slow", ROW)[0])

    askers = [threading.Thread(target=ask) for _ in range(4)]
    for asker in askers:
        asker.start()
    try:
        wait_for(lambda: len(statuses) > 20, "answers")
        (lost / "GPU-1").touch()
        wait_for(lambda: logged(server, "process ended; it is started again"), "a worker to end")
        before = len(statuses)
        wait_for(lambda: len(statuses) > before + 20, "answers of the other")
        wait_for(
            lambda: server.metrics().get('penstock_gpu_lost{gpu="GPU-1",worker="cuda:0"}') == 1,
            "the worker that was started again to say why it serves nothing",
        )
    finally:
        enough.set()
        for asker in askers:
            asker.join()
    assert set(statuses) == {200}
    [ended] = logged(server, "process ended; it is started again")
    assert (ended["about_process"], ended["exit_code"]) == ("cuda:0", EXIT_GPU_LOST)
    assert {(line["device"], line["gpu"], line["reason"]) for line in logged(server, "GPU lost")} == {
        ("cuda:0", "GPU-1", "GPU is lost")
    }
    assert server.request("GET", "/v2/health/ready")[0] == 200
    metrics = server.metrics()
    assert metrics['penstock_model_ready{model="slow",version="1",worker="cuda:0"}'] == 0
    assert metrics['penstock_model_ready{model="slow",version="1",worker="cuda:1"}'] == 1


def test_health_says_that_the_only_gpu_is_lost(
    start_server: StartServer, models: str, environment: dict[str, str], lost: Path
) -> None:
    server = start_server(models, "--device=cuda:1", environment=environment)
    (lost / "GPU-2").touch()
    wait_for(lambda: server.request("GET", "/v2/health/ready")[0] == 503, "the server to say that it is not ready")
    said = json.loads(server.request("GET", "/v2/health/ready")[2])["error"]
    assert re.search(r"cuda:1 \(GPU-2\) is lost: GPU is lost", said)


def test_a_server_starts_without_a_gpu_that_is_lost_already(
    start_server: StartServer, models: str, environment: dict[str, str], lost: Path
) -> None:
    """It is listed, and lost when its worker begins."""
    (lost / "GPU-2").touch()
    server = start_server(models, environment=environment)
    assert server.infer("slow", ROW)[0] == 200
    assert logged(server, "GPU lost")[0]["gpu"] == "GPU-2"


def test_a_server_whose_only_gpu_is_lost_does_not_start(
    tmp_path: Path, models: str, environment: dict[str, str], lost: Path
) -> None:
    (lost / "GPU-1").touch()
    arguments = ["up", models, "--device=cuda:0", "--http=127.0.0.1:0", f"--runtime-dir={tmp_path / 'run'}"]
    server = Process(arguments, environment)
    assert server.wait() == EXIT_GPU_LOST
    assert "penstock: cuda:0 is lost: GPU is lost" in server.errors
    assert list((tmp_path / "run").iterdir()) == []
