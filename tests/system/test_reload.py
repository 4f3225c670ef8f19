"""A configuration file that changes while the server serves."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from penstock.bin.supervision import TRY_AGAIN_S
from penstock.client import Client
from tests.system.models import slow, write
from tests.system.servers import Server, StartServer, wait_for
from tests.system.test_restart import Load


@pytest.fixture
def models(tmp_path: Path) -> Path:
    write(tmp_path / "models", "slow", slow(20), config="max_batch_size = 4\n")
    return tmp_path / "models"


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "penstock.toml"
    path.write_text("[gateway]\nheaders_max = 50\n")
    return path


@pytest.fixture
def server(start_server: StartServer, models: Path, config: Path) -> Server:
    return start_server(str(models), "--workers=2", "--gateways=2", f"--config={config}")


def said(server: Server, event: str) -> list[dict[str, Any]]:
    return [line for line in server.log() if line["event"].startswith(event)]


def replaced(server: Server, name: str) -> list[dict[str, Any]]:
    """Whose names begin so: who runs jobs follows gateways."""
    return [line for line in said(server, "process replaced") if line["about_process"].startswith(name)]


def headers_allowed(server: Server, number: int) -> bool:
    """By each gateway that answers."""
    headers = {f"x-{each}": "1" for each in range(number)}
    return {server.request("GET", "/v2/health/live", headers=headers)[0] for _ in range(10)} == {200}


def test_a_valid_change_takes_effect_under_load_and_no_request_fails(server: Server, config: Path) -> None:
    before = {role: server.children(role) for role in ("gateway", "worker", "broker")}
    assert not headers_allowed(server, 60)
    with Load(server) as load:
        wait_for(lambda: load.answers > 20, "the load to begin")
        config.write_text("[gateway]\nheaders_max = 90\n[worker]\nmax_compute_s = 20\n")
        wait_for(lambda: said(server, "configuration is in force"), "the change")
        answers = load.answers
        wait_for(lambda: load.answers > answers + 20, "the load to go on")
    assert load.wrong == []
    assert headers_allowed(server, 60)
    for role, pids in before.items():
        after = server.children(role)
        assert len(after) == len(pids)
        assert set(after).isdisjoint(pids) == (role != "broker"), "whom it is not about stays"
    assert not [line for line in server.log() if line["level"] in ("error", "critical")]
    server.check_clean_end()


def test_a_change_of_the_broker_s_is_lossless_too(server: Server, config: Path) -> None:
    before = server.children("broker")
    with Load(server) as load:
        wait_for(lambda: load.answers > 20, "the load to begin")
        config.write_text("[gateway]\nheaders_max = 50\n[broker.tenant_weights]\ngold = 2\n")
        wait_for(lambda: said(server, "configuration is in force"), "the change")
        answers = load.answers
        wait_for(lambda: load.answers > answers + 20, "the load to go on")
    assert load.wrong == []
    assert set(server.children("broker")).isdisjoint(before)


def test_an_invalid_file_changes_nothing_and_is_said(server: Server, config: Path) -> None:
    before = server.children()
    config.write_text("[gateway]\nheaders_max = 90\n\nheaders_mx = 3\n")
    [line] = wait_for(lambda: said(server, "configuration cannot"), "the launcher to say so")
    assert (line["level"], line["process"]) == ("error", "launcher")
    assert line["reason"] == f"{config}:4: [gateway]: key 'headers_mx': unknown; did you mean 'headers_max'?"
    config.unlink()
    wait_for(lambda: len(said(server, "configuration cannot")) == 2, "the launcher to say so")
    assert said(server, "configuration cannot")[1]["reason"] == f"{config} does not exist; put it back"
    assert server.children() == before
    assert not headers_allowed(server, 60)

    [broker] = server.children("broker")
    [gateway, _] = server.children("gateway")
    os.kill(gateway, signal.SIGKILL)  # what is started again has what is in force
    wait_for(lambda: gateway not in server.children("gateway") and len(server.children("gateway")) == 2, "another")
    wait_for(lambda: len(said(server, "gateway listens")) == 3, "it to serve")
    assert not headers_allowed(server, 60)

    config.write_text("# as it was\n[gateway]\nheaders_max = 50\n")
    wait_for(lambda: said(server, "configuration says what is in force already"), "the launcher to say so")
    assert server.children("broker") == [broker]
    server.check_clean_end()


def test_where_a_new_process_does_not_come_up_all_is_as_it_was(server: Server, models: Path, config: Path) -> None:
    """The gateways had been replaced by then."""
    workers = server.children("worker")
    hidden = models.rename(f"{models}-elsewhere")
    config.write_text("[gateway]\nheaders_max = 90\n[worker]\nmax_compute_s = 20\n")
    [line] = wait_for(lambda: said(server, "configuration does not work"), "the launcher to say so")
    assert line["reason"].startswith("cpu-0 serves on as it was: the new process ended with exit code 2")
    wait_for(lambda: len(replaced(server, "gateway")) == 4, "the gateways to have gone back")
    assert server.children("worker") == workers
    assert not headers_allowed(server, 60)
    hidden.rename(models)
    config.write_text("[gateway]\nheaders_max = 90\n[worker]\nmax_compute_s = 21\n")
    wait_for(lambda: said(server, "configuration is in force"), "the change")
    assert headers_allowed(server, 60)
    with Client(server.runtime) as client:
        client.infer("slow", {"x": np.ones((1, 1), np.float32)})
    server.check_clean_end()


def test_what_does_not_serve_is_tried_with_the_new_one_at_once(server: Server, models: Path, config: Path) -> None:
    hidden = models.rename(f"{models}-elsewhere")
    [_, victim] = server.children("worker")
    os.kill(victim, signal.SIGKILL)
    [line] = wait_for(lambda: said(server, "process ends again and again"), "the launcher to give it a rest")
    assert line["exit_code"] == 2
    hidden.rename(models)
    config.write_text("[gateway]\nheaders_max = 50\n[worker]\nmax_compute_s = 20\n")
    wait_for(lambda: said(server, "configuration is in force"), "the change")
    wait_for(lambda: server.metrics()["penstock_workers"] == 2, "both workers", deadline_s=TRY_AGAIN_S / 2)
    server.check_clean_end()
