"""A repository that changes while it serves: what is put there, taken away or broken, and what is said of it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from penstock.client import Client, PenstockError
from tests.system.models import dense, make_model, never_ends, write
from tests.system.servers import Server, StartServer, wait_for

ROW = {"inputs": [{"name": "x", "shape": [1, 2], "datatype": "FP32", "data": [0.0, 0.0]}]}


def constant(version: int) -> onnx.ModelProto:
    """y [N, 2] = x [N, 2] + version: its answers to zeros say which it is."""
    return make_model(
        [helper.make_node("Add", ["x", "version"], ["y"])],
        [("x", TensorProto.FLOAT, ["N", 2])],
        [("y", TensorProto.FLOAT, ["N", 2])],
        [numpy_helper.from_array(np.array([version], np.float32), "version")],
    )


def put(models: Path, version: int, name: str = "net") -> Path:
    """A whole version, renamed into place."""
    staged = models.parent / f"staged-{name}"
    path = write(staged, name, constant(version), str(version))
    (models / name).mkdir(parents=True, exist_ok=True)
    path.parent.rename(models / name / str(version))
    return models / name / str(version)


def answer(server: Server, model: str = "net") -> tuple[int, str]:
    """The status of a request, and the version that has answered it."""
    status, said = server.infer(model, ROW)
    if status != 200:
        return status, said["error"]
    version = said["model_version"]
    assert said["outputs"][0]["data"] == [float(version)] * 2, "it is of another version than it says"
    return status, version


def told(server: Server) -> dict[tuple[str, str], tuple[str, str]]:
    """What ``penstock models`` has of each version: its state, and what is said."""
    command = [sys.executable, "-m", "penstock.bin", "models", f"--runtime-dir={server.runtime}", "ls", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    return {(each["name"], each["version"]): (each["state"], each["reason"]) for each in json.loads(done.stdout)}


def children(pid: int) -> list[int]:
    return [int(each) for each in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def answered(found: Counter[str], version: str) -> bool:
    """Whether a version has answered several requests."""
    return found[version] > 5


def wait_told(server: Server, name: str, version: str, words: str) -> str:
    """Until ``penstock models`` says these of a version. Returns its state."""
    last: dict[str, Any] = {}

    def says() -> bool:
        last["told"] = told(server)
        return words in last["told"].get((name, version), ("", ""))[1]

    try:
        wait_for(says, f"{words!r} of {name} {version}", tick_s=0.1)
    except AssertionError as error:
        raise AssertionError(f"{error}; it says {last['told']}") from None
    state: str = last["told"][name, version][0]
    return state


@contextmanager
def load(server: Server) -> Iterator[Counter[str]]:
    """Requests, one after another, of a client over HTTP and one of the library, until it ends; what they were told, by
    the version."""
    found: Counter[str] = Counter()
    end = threading.Event()
    problems: list[str] = []

    def ask_http() -> None:
        while not end.is_set():
            status, version = answer(server)
            if status != 200:
                problems.append(f"{status}: {version}")
            found[version] += 1

    def ask() -> None:
        with Client(server.runtime) as client:
            while not end.is_set():
                result = client.infer("net", {"x": np.zeros((3, 2), np.float32)})
                if set(result["y"].ravel().tolist()) != {float(result.version)}:
                    problems.append(f"{result['y']} is of version {result.version}")
                found[result.version] += 1

    def run(what: Any) -> None:
        try:
            what()
        except (AssertionError, OSError, PenstockError) as error:
            problems.append(repr(error))

    threads = [threading.Thread(target=run, args=(each,)) for each in (ask_http, ask)]
    for thread in threads:
        thread.start()
    try:
        yield found
    finally:
        end.set()
        for thread in threads:
            thread.join()
    assert problems == []


def test_versions_follow_each_other_while_requests_are_answered(start_server: StartServer, tmp_path: Path) -> None:
    models = tmp_path / "models"
    put(models, 1)
    server = start_server(str(models), "--workers=2")
    with load(server) as found:
        wait_for(lambda: found["1"] > 20, "answers of version 1")
        for version in range(2, 7):
            put(models, version)
            wait_for(partial(answered, found, str(version)), f"answers of version {version}")
            shutil.rmtree(models / "net" / str(version - 1))
    wait_for(lambda: [key for key in told(server) if key[0] == "net"] == [("net", "6")], "the old ones to be unloaded")
    wait_for(lambda: not any('version="1"' in name for name in server.metrics()), "its series to go")


def test_a_version_that_cannot_be_served_leaves_the_old_one_serving(start_server: StartServer, tmp_path: Path) -> None:
    models = tmp_path / "models"
    put(models, 1)
    server = start_server(str(models), "--workers=2")
    with load(server) as found:
        broken = models / "net" / "2"
        broken.mkdir()
        (broken / "model.onnx").write_bytes(b"not a model")
        assert wait_told(server, "net", "2", "cannot be loaded") == "UNAVAILABLE"
        assert server.request("GET", "/v2/health/ready")[0] == 200
        (broken / "model.onnx").write_bytes(constant(2).SerializeToString())
        wait_for(lambda: found["2"] > 5, "answers of version 2")
    assert answer(server) == (200, "2")


def test_models_come_and_go(start_server: StartServer, tmp_path: Path) -> None:
    models = tmp_path / "models"
    put(models, 1)
    server = start_server(str(models))
    put(models, 7, "other")
    wait_for(lambda: answer(server, "other") == (200, "7"), "the other model")
    shutil.rmtree(models / "other")
    wait_for(lambda: answer(server, "other")[0] == 404, "the other model to go")
    wait_for(lambda: ("other", "7") not in told(server), "it to be unloaded")
    assert answer(server) == (200, "1")
    assert server.request("GET", "/v2/health/ready")[0] == 200


def test_a_way_back_by_the_configuration_and_one_that_cannot_be_followed(
    start_server: StartServer, tmp_path: Path
) -> None:
    models = tmp_path / "models"
    put(models, 1)
    put(models, 2)
    server = start_server(str(models))
    config = models / "net" / "model.toml"
    with load(server) as found:
        wait_for(lambda: found["2"], "version 2")
        config.write_text("version_policy = [1]\n")
        wait_for(lambda: found["1"] > 5, "the way back")
        config.write_text("# a comment\nmax_batch_sise = 4\n")
        assert wait_told(server, "net", "1", "model.toml:2: key 'max_batch_sise'") == "READY"
        assert answer(server) == (200, "1")
        found.clear()
        config.unlink()
        wait_for(partial(answered, found, "2"), "version 2 again")


def test_labels_and_traffic(start_server: StartServer, tmp_path: Path) -> None:
    models = tmp_path / "models"
    for version in (3, 4):
        put(models, version)
    config = models / "net" / "model.toml"
    config.write_text("labels = {stable = 3, canary = 4}\ntraffic = {stable = 75, canary = 25}\n")
    server = start_server(str(models))
    assert answer(server, "net/versions/canary") == (200, "4")
    assert answer(server, "net/versions/stable") == (200, "3")
    assert answer(server, "net/versions/none")[0] == 404
    assert Counter(answer(server)[1] for _ in range(100)) == {"3": 75, "4": 25}

    def sticky(name: str) -> str:
        body = json.dumps(ROW).encode()
        said = server.request("POST", "/v2/models/net/infer", body, {"Penstock-Sticky": name})[2]
        version: str = json.loads(said)["model_version"]
        return version

    names = [f"user-{number}" for number in range(40)]
    first = [sticky(name) for name in names]
    assert set(first) == {"3", "4"}
    assert [sticky(name) for name in names] == first
    metrics = server.metrics()
    for each in ("3", "4"):
        assert metrics[f'penstock_requests_total{{model="net",version="{each}"}}'] > 20
    with Client(server.runtime) as client:
        for inputs in ({"x": np.zeros((1, 2), np.float32)}, {"x": [[0.0] * 2]}):  # the short way and the general one
            found = Counter(client.infer("net", inputs).version for _ in range(100))
            assert found == {"3": 75, "4": 25}
    config.write_text("labels = {stable = 3, canary = 4}\ntraffic = {canary = 100}\n")
    wait_for(lambda: {answer(server)[1] for _ in range(20)} == {"4"}, "all of the traffic to go to the canary")


def test_whatever_is_wrong_is_a_sentence_and_everything_else_serves_on(
    start_server: StartServer, tmp_path: Path
) -> None:
    models = tmp_path / "models"
    for name in (
        "net",
        "corrupt",
        "unreadable",
        "latest",
        "two",
        "linked",
        "deleted",
        "kills",
        "config",
        "bytes",
        "pipe",
    ):
        put(models, 1, name)
    (tmp_path / "penstock.toml").write_text("[worker]\ntrial_max_s = 2\n")
    server = start_server(str(models), f"--config={tmp_path / 'penstock.toml'}")
    with load(server) as found:
        (models / "latest" / "latest").mkdir()  # and what is in it comes later
        (models / "corrupt" / "2").mkdir()
        (models / "corrupt" / "2" / "model.onnx").write_bytes(os.urandom(4096))
        put(models, 2, "unreadable").chmod(0)
        shutil.copy(put(models, 2, "two") / "model.onnx", models / "two" / "2" / "other.onnx")
        outside = write(tmp_path / "outside", "linked", constant(2), "2").parent
        (models / "linked" / "2").symlink_to(outside)
        shutil.rmtree(models / "deleted" / "1")
        write(models, "kills", never_ends(), "2")
        (models / "config" / "model.toml").write_text("max_queue_delay = '5 parsecs'\n")
        write(models, "bytes", constant(2), os.fsdecode(b"\xff\n"))
        os.mkfifo(models / "pipe" / "model.toml")
        wait_told(server, "bytes", "??", "is no version")
        shutil.copy(models / "latest" / "1" / "model.onnx", models / "latest" / "latest")
        expected = {
            ("bytes", "??"): ("UNAVAILABLE", "is no version"),
            ("pipe", "1"): ("READY", "is no configuration; replace it; the configuration before it"),
            ("corrupt", "2"): ("UNAVAILABLE", "cannot be loaded"),
            ("latest", "latest"): ("UNAVAILABLE", "is no version"),
            ("two", "2"): ("", "other.onnx"),
            ("linked", "2"): ("UNAVAILABLE", "outside of the repository"),
            ("deleted", "1"): ("READY", "what was loaded before serves on"),
            ("kills", "2"): ("UNAVAILABLE", "longer than 2 s"),
            ("config", "1"): ("READY", "model.toml:1: key 'max_queue_delay'"),
        }
        if os.getuid():  # root reads everything
            expected["unreadable", "2"] = ("UNAVAILABLE", "cannot read")
        for (name, number), (state, words) in expected.items():
            assert wait_told(server, name, number, words) == state or not state, (name, number)
        (models / "unreadable" / "2").chmod(0o700)
        wait_for(lambda: answer(server, "unreadable") == (200, "2"), "what can be read now", tick_s=0.1)
        for name in ("corrupt", "latest", "linked", "deleted", "kills", "config", "bytes", "pipe"):
            assert answer(server, name) == (200, "1"), name
        assert server.request("GET", "/v2/health/ready")[0] == 200
        before = found["1"]
        wait_for(lambda: found["1"] > before + 20, "the others to go on")


def test_a_model_whose_warm_up_does_not_end_is_given_up(start_server: StartServer, tmp_path: Path) -> None:
    models = tmp_path / "models"
    put(models, 1)
    (tmp_path / "penstock.toml").write_text("[worker]\ntrial_max_s = 2\n")
    server = start_server(str(models), f"--config={tmp_path / 'penstock.toml'}")
    workers = server.children("worker")
    with load(server):
        write(models, "net", never_ends(), "2")
        assert wait_told(server, "net", "2", "longer than 2 s") == "UNAVAILABLE"
    assert server.children("worker") == workers, "they live on"
    assert answer(server) == (200, "1")


def test_a_model_whose_warm_up_kills_the_process_is_given_up(start_server: StartServer, tmp_path: Path) -> None:
    models = tmp_path / "models"
    put(models, 1)
    server = start_server(str(models), "--workers=1")
    [worker] = server.children("worker")
    [tester] = children(worker)
    with load(server):
        write(models, "net", never_ends(), "2")
        [trial] = wait_for(lambda: children(tester), "the version to be tried")
        os.kill(trial, signal.SIGSEGV)
        assert wait_told(server, "net", "2", "ended by signal 11 (SIGSEGV)") == "UNAVAILABLE"
    assert server.children("worker") == [worker], "it lives on"
    assert answer(server) == (200, "1")


def test_more_models_than_fit_are_loaded_when_they_are_asked_for(start_server: StartServer, tmp_path: Path) -> None:
    models = tmp_path / "models"
    names = [f"net{number}" for number in range(6)]
    sizes = [(put(models, number + 1, name) / "model.onnx").stat().st_size for number, name in enumerate(names)]
    config = tmp_path / "penstock.toml"
    config.write_text(f"[worker]\nmodel_bytes_max = {10_000_000}\n")
    for name in names:  # what is padded takes room in memory as a file
        (models / name / str(names.index(name) + 1) / "padding").write_bytes(bytes(4_000_000 - sizes[0]))
    server = start_server(str(models), f"--config={config}")
    assert server.request("GET", "/v2/health/ready")[0] == 200

    def states() -> Counter[str]:
        return Counter(state for state, _ in told(server).values())

    assert states()["IDLE"] >= 4
    problems: list[str] = []

    def ask(seed: int) -> None:
        for number in np.random.default_rng(seed).integers(0, len(names), 30):
            found = answer(server, names[number])
            if found != (200, str(number + 1)):
                problems.append(str(found))

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert problems == []
    metrics = server.metrics()
    assert sum(value for name, value in metrics.items() if name.startswith("penstock_load_waits_total")) > 5
    assert sum(value for name, value in metrics.items() if name.startswith("penstock_model_evictions_total")) > 5
    assert states()["READY"] <= 2


def test_models_that_take_turns_in_memory_answer_everybody_while_new_versions_come(
    start_server: StartServer, tmp_path: Path
) -> None:
    models = tmp_path / "models"
    names = [f"net{number}" for number in range(5)]

    def put_large(version: int, name: str) -> None:
        path = write(tmp_path / "staged", name, constant(version), str(version)).parent
        (path / "padding").write_bytes(bytes(4_000_000))
        (models / name).mkdir(parents=True, exist_ok=True)
        path.rename(models / name / str(version))

    for name in names:
        put_large(1, name)
    config = tmp_path / "penstock.toml"
    config.write_text("[worker]\nmodel_bytes_max = 9_000_000\n")
    server = start_server(str(models), "--workers=2", f"--config={config}")
    found: Counter[str] = Counter()
    problems: list[str] = []
    end = threading.Event()

    def ask(seed: int) -> None:
        random = np.random.default_rng(seed)
        with Client(server.runtime) as client:
            while not end.is_set():
                name = names[random.integers(0, len(names))]
                try:
                    found[client.infer(name, {"x": np.zeros((1, 2), np.float32)}).version] += 1
                except PenstockError as error:
                    problems.append(f"{name}: {error}")
                    return

    def count(version: str, enough: int) -> None:
        wait_for(lambda: problems or found[version] >= enough, f"{enough} answers of version {version}")

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    try:
        count("1", 200)
        for name in names:
            put_large(2, name)
        count("2", 200)
        for name in names:  # some are IDLE, and stand in for what fails
            write(models, name, constant(3), "3").write_bytes(b"not a model")
        for name in names:
            wait_told(server, name, "3", "cannot be loaded")
        found.clear()
        count("2", 100)
    finally:
        end.set()
        for thread in threads:
            thread.join()
    assert problems == []
    assert set(found) == {"2"}


@pytest.mark.parametrize("what", ["moved", "emptied"])
def test_a_repository_that_is_gone_of_a_sudden_is_served_on(
    start_server: StartServer, tmp_path: Path, what: str
) -> None:
    """As when the file system that it lies on is not mounted any more."""
    models, away = tmp_path / "models", tmp_path / "away"
    put(models, 1)
    write(models, "dense", dense(), "1")
    server = start_server(str(models))
    if what == "moved":
        models.rename(away)
    else:
        away.mkdir()
        for each in list(models.iterdir()):
            each.rename(away / each.name)
    wait_told(server, "net", "1", "what was loaded before serves on")
    assert answer(server) == (200, "1")
    assert server.request("GET", "/v2/health/ready")[0] == 200
    if what == "moved":
        away.rename(models)
    else:
        for each in list(away.iterdir()):
            each.rename(models / each.name)
    wait_for(lambda: told(server).get(("net", "1")) == ("READY", ""), "all to be well again", tick_s=0.1)
    put(models, 2)
    wait_for(lambda: answer(server) == (200, "2"), "changes to be seen again")
