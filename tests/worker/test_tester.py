"""What a trial says of a model, and that nobody suffers from it: with real processes and real models."""

from __future__ import annotations

import errno
import logging
import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from penstock.worker import tester as trials
from penstock.worker.config import ModelConfig
from penstock.worker.model import LoadError
from penstock.worker.probe import load_and_probe
from penstock.worker.repository import ModelFile, find_models
from penstock.worker.store import Store
from tests.system.models import dense, make_model, never_ends, write
from tests.system.servers import wait_for

LONG_S = 60.0  # longer than any test

OF_A_WORKER = """
import sys
from pathlib import Path
from penstock.worker.repository import ModelFile
from penstock.worker.tester import Tester
tester = Tester(60.0).start()
trial = tester.begin(ModelFile("never", "1", Path(sys.argv[1])))
print(tester.pid, flush=True)
trial.verdict()
"""


@pytest.fixture
def tester() -> Iterator[trials.Tester]:
    started = trials.Tester(LONG_S).start()
    yield started
    started.stop()


@pytest.fixture
def good(tmp_path: Path) -> ModelFile:
    return save(tmp_path, "good", dense())


@pytest.fixture
def never(tmp_path: Path) -> ModelFile:
    return save(tmp_path, "never", never_ends())


def save(folder: Path, name: str, model: onnx.ModelProto) -> ModelFile:
    path = folder / f"{name}.onnx"
    onnx.save(model, path)
    return ModelFile(name, "1", path)


def children(pid: int) -> list[int]:
    if not pid:
        return []
    return [int(each) for each in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def running_trial(tester: trials.Tester) -> int:
    """The process of the one model that is being tried, once there is one."""
    [pid] = wait_for(lambda: children(tester.pid), "a trial to begin")
    return int(pid)


def wait_for_end(pidfd: int) -> None:
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    try:
        assert poll.poll(10_000), "the process goes on"
    finally:
        os.close(pidfd)


# --- what it says ---


def test_model_that_runs_is_fine(tester: trials.Tester, good: ModelFile) -> None:
    assert tester.check(good) == ""


def test_what_loading_would_say_is_said(tester: trials.Tester, tmp_path: Path) -> None:
    path = tmp_path / "bad.onnx"
    path.write_bytes(b"not a model")
    bad = ModelFile("bad", "1", path)
    with pytest.raises(LoadError) as error:
        load_and_probe(bad)
    assert tester.check(bad) == str(error.value)


def test_name_that_is_not_utf8_travels(tester: trials.Tester, good: ModelFile, tmp_path: Path) -> None:
    path = tmp_path / os.fsdecode(b"\xff.onnx")
    good.path.rename(path)
    assert "ONNX Runtime opens no path that is not UTF-8" in tester.check(ModelFile("odd", "1", path))


def test_configuration_counts(tester: trials.Tester, good: ModelFile) -> None:
    config = ModelConfig(providers=("cuda",))
    assert "this worker runs on the CPU" in tester.check(ModelFile("good", "1", good.path, config))


def test_warm_up_that_never_ends_is_ended(good: ModelFile, never: ModelFile) -> None:
    tester = trials.Tester(0.5).start()
    try:
        assert tester.check(never) == (
            f"{never.path} cannot be served: its trial took longer than 0.5 s and was ended; if it needs that long, "
            "raise [worker] trial_max_s, or make it 0 to have no model tried"
        )
        assert tester.check(good) == ""
    finally:
        tester.stop()


@pytest.mark.parametrize(
    ("number", "said"),
    [
        (signal.SIGSEGV, "its trial was ended by signal 11 (SIGSEGV), and so would be the worker"),
        (signal.SIGABRT, "its trial was ended by signal 6 (SIGABRT), and so would be the worker"),
        (signal.SIGKILL, "its trial was ended by signal 9 (SIGKILL), as the kernel does when memory is out"),
    ],
)
def test_what_ends_the_process_is_a_sentence(
    tester: trials.Tester, good: ModelFile, never: ModelFile, number: signal.Signals, said: str
) -> None:
    trial = tester.begin(never)
    os.kill(running_trial(tester), number)
    assert trial.verdict().startswith(f"{never.path} cannot be served: {said}")
    assert tester.check(good) == "", "the tester goes on"


def test_ends_that_have_no_name_are_told_by_number() -> None:
    assert trials.say_end(0) == ""
    assert "exit code 70" in trials.say_end(70)
    assert "signal 40, and so" in trials.say_end(-40)


def test_recorded_requests_are_part_of_the_trial(tester: trials.Tester, tmp_path: Path) -> None:
    write(tmp_path, "net", dense())
    (tmp_path / "net" / "warmup").mkdir()
    np.savez(tmp_path / "net" / "warmup" / "one.npz", x=np.zeros((1, 5), np.float32))
    [file] = find_models(tmp_path)
    assert f"{tmp_path / 'net' / 'warmup' / 'one.npz'} is no request" in tester.check(file)


# --- whom it costs what ---


def test_a_model_is_tried_while_another_is(tester: trials.Tester, good: ModelFile, never: ModelFile) -> None:
    trial = tester.begin(never)
    pidfd = os.pidfd_open(running_trial(tester))
    assert tester.check(good) == ""
    trial.close()
    wait_for_end(pidfd)  # since nobody waits for it any more


def test_no_more_are_tried_than_at_once(tester: trials.Tester, good: ModelFile, never: ModelFile) -> None:
    running = [tester.begin(never) for _ in range(trials.AT_ONCE)]
    wait_for(lambda: len(children(tester.pid)) == trials.AT_ONCE, "trials to begin")
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(tester.check, good)
        assert len(children(tester.pid)) == trials.AT_ONCE
        running.pop().close()
        assert waiting.result(30) == ""
    running.pop().close()


def test_those_that_are_small_are_tried_while_others_are_loaded(
    tester: trials.Tester, good: ModelFile, tmp_path: Path
) -> None:
    bad = tmp_path / "bad.onnx"
    bad.write_bytes(b"not a model")
    files = [good, ModelFile("bad", "1", bad), ModelFile("none", "1", tmp_path / "none.onnx"), good, good]
    found = [(file.name, problem != "") for file, problem, _ in tester.ahead(files)]
    assert sorted(found) == [("bad", True), ("good", False), ("good", False), ("good", False), ("none", True)]


def test_one_that_never_ends_holds_up_nobody(good: ModelFile, never: ModelFile) -> None:
    tester = trials.Tester(1.0).start()
    found = [file.name for file, _, _ in tester.ahead([never, good, good, good])]
    tester.stop()
    assert found == ["good", "good", "good", "never"]


@pytest.mark.parametrize("seconds_max", [0.0, LONG_S])
def test_on_a_gpu_none_is_tried_while_another_is_loaded(good: ModelFile, seconds_max: float) -> None:
    tester = trials.Tester(seconds_max).start()
    files = [replace(good, problem="it is not served"), good]
    found = [(file.name, problem) for file, problem, _ in tester.ahead(files, "cuda:0") if not children(tester.pid)]
    tester.stop()
    assert [name for name, _ in found] == ["good", "good"]


def test_who_takes_no_more_leaves_no_trial_behind(tester: trials.Tester, good: ModelFile, never: ModelFile) -> None:
    following = tester.ahead([good, never, never])
    assert next(following)[1] == ""
    pidfd = os.pidfd_open(wait_for(lambda: children(tester.pid), "a trial to begin")[0])
    following.close()  # type: ignore[attr-defined]
    wait_for_end(pidfd)
    assert tester.check(good) == ""


def test_weights_are_taken_from_the_store_once(tester: trials.Tester, tmp_path: Path) -> None:
    weights = np.random.default_rng(0).standard_normal((512, 512)).astype(np.float32)
    node = onnx.helper.make_node("MatMul", ["x", "w"], ["y"])
    file = save(
        tmp_path,
        "net",
        make_model([node], [("x", 1, ["N", 512])], [("y", 1, ["N", 512])], [numpy_helper.from_array(weights, "w")]),
    )
    trial = tester.begin(file, store=Store(tmp_path / "store"))
    assert trial.verdict() == ""
    assert trial.store is not None
    model = load_and_probe(file, trial.store)
    assert model.weights is not None
    assert model.weights.shared
    assert model.weights is trial.store.take(file.path, file.name)


def test_no_model_is_tried_when_there_is_no_time_for_it(never: ModelFile) -> None:
    tester = trials.Tester(0.0).start()
    assert tester.pid == 0
    assert tester.check(never) == ""
    tester.stop()


def test_where_nothing_can_be_forked_models_are_loaded_untried(
    never: ModelFile, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail() -> int:
        raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    monkeypatch.setattr(os, "fork", fail)
    with caplog.at_level(logging.WARNING, "penstock.worker"):
        tester = trials.Tester(LONG_S).start()
    assert tester.check(never) == ""
    tester.stop()
    [record] = caplog.records
    assert record.__dict__["fields"]["reason"] == "no process can be started: Resource temporarily unavailable"


# --- what is left of it ---


def test_tester_has_nothing_of_the_worker_open(tester: trials.Tester, good: ModelFile) -> None:
    assert tester.check(good) == ""
    links = [os.readlink(each) for each in Path(f"/proc/{tester.pid}/fd").iterdir()]
    assert len(links) == 4
    assert links.count("/dev/null") == 2
    assert sum(link.startswith("socket:") for link in links) == 1


def test_nothing_is_left_when_it_is_stopped(good: ModelFile, never: ModelFile) -> None:
    before = len(os.listdir("/proc/self/fd"))
    tester = trials.Tester(LONG_S).start()
    pidfd = os.pidfd_open(tester.pid)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(tester.check, never)
        trial = os.pidfd_open(running_trial(tester))
        pid = tester.pid
        tester.stop()
        assert waiting.result(30) == f"{never.path} is not loaded: the worker ends"
    wait_for_end(pidfd)
    wait_for_end(trial)
    assert not Path(f"/proc/{pid}").exists(), "it is a zombie"
    assert tester.check(good) == f"{good.path} is not loaded: the worker ends"
    tester.stop()
    assert len(os.listdir("/proc/self/fd")) == before


def test_models_are_loaded_untried_when_the_tester_has_ended(
    good: ModelFile, never: ModelFile, caplog: pytest.LogCaptureFixture
) -> None:
    tester = trials.Tester(LONG_S).start()
    trial = tester.begin(never)
    tried = os.pidfd_open(running_trial(tester))
    with caplog.at_level(logging.WARNING, "penstock.worker"):
        os.kill(tester.pid, signal.SIGKILL)
        assert trial.verdict() == ""
        assert tester.check(good) == ""
    assert [record.message for record in caplog.records] == ["models are loaded without a trial"]
    wait_for_end(tried)
    tester.stop()


def test_all_of_it_ends_with_a_worker_that_is_killed(never: ModelFile) -> None:
    command = [sys.executable, "-c", OF_A_WORKER, str(never.path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as worker:
        assert worker.stdout is not None
        pid = int(worker.stdout.readline())
        tester = os.pidfd_open(pid)
        trial = os.pidfd_open(wait_for(lambda: children(pid), "a trial to begin")[0])
        worker.kill()
        worker.wait(10)
    wait_for_end(tester)
    wait_for_end(trial)


def test_signals_for_all_of_a_terminal_or_a_unit_are_the_workers_alone(tester: trials.Tester, good: ModelFile) -> None:
    assert tester.check(good) == ""
    os.kill(tester.pid, signal.SIGINT)
    os.kill(tester.pid, signal.SIGTERM)
    assert tester.check(good) == ""
