"""The thread that keeps a worker's models, on real directories and with real models."""

from __future__ import annotations

import gc
import logging
import os
import select
import shutil
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import onnx
import pytest
from onnx import TensorProto

from penstock.wire.messages import EXPLICIT, NONE, WATCH, Loads, Unload, Version
from penstock.wire.models import READY, UNAVAILABLE, Load, Route
from penstock.worker import keeper as keeper_module
from penstock.worker import tester, watch
from penstock.worker.config import CPU
from penstock.worker.events import Discard, Followed, Loaded, Routed, Tried, Unwanted
from penstock.worker.keeper import Keeper, load
from penstock.worker.model import Model
from penstock.worker.repository import RepositoryError, find_models
from tests.system.models import dense, identity, write

DEADLINE_MS = 20_000


class Worker:
    """The main thread of a worker, as far as a keeper knows it."""

    def __init__(self, path: Path, control: str = WATCH) -> None:
        self.keeper = Keeper(path, tester.Tester(0.0), CPU, control)
        self.models: dict[tuple[str, str], Model] = {}
        self.states: dict[tuple[str, str], tuple[str, str]] = {}
        self.routes: dict[str, Route] = {}
        self.followed: list[Followed] = []
        self.tried: list[Tried] = []

    def start(self) -> Worker:
        self.keeper.begin()
        self.keeper.start(None, lambda key: 0.0)
        self.wait(lambda: self.keeper.settled)
        return self

    def wait(self, condition: Callable[[], object]) -> None:
        poll = select.poll()
        poll.register(self.keeper.fileno(), select.POLLIN)
        self.take()
        while not condition():
            assert poll.poll(DEADLINE_MS), f"waited in vain; states are {self.states}"
            os.eventfd_read(self.keeper.fileno())
            self.take()

    def take(self) -> None:
        for event in self.keeper.take():
            match event:
                case Loaded(state, model):
                    self.states[state.name, state.version] = (state.state, state.reason)
                    if model is not None:
                        self.models[state.name, state.version] = model
                case Unwanted(name, version):
                    del self.states[name, version]
                    self.models.pop((name, version), None)
                case Routed(route):
                    self.routes[route.name] = route
                case Followed():
                    self.followed.append(event)
                case Tried():
                    self.tried.append(event)

    def state(self, version: int, name: str = "net") -> str:
        return self.states.get((name, str(version)), ("", ""))[0]


@pytest.fixture
def make() -> Iterator[Callable[..., Worker]]:
    made: list[Worker] = []

    def make_one(path: Path, control: str = WATCH) -> Worker:
        made.append(Worker(path, control))
        return made[-1]

    yield make_one
    for each in made:
        each.keeper.stop()
    assert "keeper" not in [thread.name for thread in threading.enumerate()]


@pytest.fixture
def models(tmp_path: Path) -> Path:
    write(tmp_path / "models", "net", dense(1), "1")
    return tmp_path / "models"


def test_what_is_there_is_loaded_and_what_is_renamed_into_place(
    make: Callable[..., Worker], models: Path, tmp_path: Path
) -> None:
    worker = make(models).start()
    assert worker.states == {("net", "1"): (READY, "")}
    assert [(each.version, each.done) for each in worker.tried] == [("1", True)]
    write(tmp_path / "aside", "net", dense(2), "2")
    (tmp_path / "aside/net/2").rename(models / "net/2")
    worker.wait(lambda: worker.state(2) == READY)
    assert worker.routes["net"] == Route("net", ("2",))
    assert worker.models.keys() == {("net", "1"), ("net", "2")}
    worker.keeper.ask(Unload(7, [Version("net", "1")]))
    worker.wait(lambda: worker.models.keys() == {("net", "2")})


def test_what_is_copied_is_loaded_once_it_is_still(make: Callable[..., Worker], models: Path) -> None:
    worker = make(models).start()
    (models / "net/2").mkdir()
    with (models / "net/2/model.onnx").open("wb") as file:
        content = dense(2).SerializeToString()
        file.write(content[:50])
        file.flush()
        worker.wait(lambda: worker.state(2))
        file.write(content[50:])
    worker.wait(lambda: worker.state(2) == READY)


def test_it_is_seen_where_nobody_tells(
    make: Callable[..., Worker], models: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(watch, "file_system", lambda path: "nfs4")
    monkeypatch.setattr(keeper_module, "POLL_S", 0.05)
    with caplog.at_level(logging.WARNING, "penstock.worker"):
        worker = make(models).start()
    [record] = caplog.records
    assert record.message == "the repository is looked at now and then, since nobody tells of changes"
    write(models, "net", dense(2), "2")
    worker.wait(lambda: worker.state(2) == READY)


def test_a_file_that_changes_is_loaded_anew(make: Callable[..., Worker], models: Path) -> None:
    path = models / "net/1/model.onnx"
    worker = make(path).start()
    assert worker.state(1, "model") == READY
    first = worker.models["model", "1"]
    onnx.save(dense(2), path)
    worker.wait(lambda: worker.models["model", "1"] is not first)


def test_one_that_is_bad_is_a_sentence_and_the_others_are_loaded(make: Callable[..., Worker], models: Path) -> None:
    write(models, "bad", dense(1)).write_bytes(b"garbage")
    worker = make(models).start()
    assert worker.state(1) == READY
    state, reason = worker.states["bad", "1"]
    assert (state, "bad/1/model.onnx" in reason) == (UNAVAILABLE, True)


def test_models_that_are_ordered_are_loaded_with_their_configuration(make: Callable[..., Worker], models: Path) -> None:
    write(models, "other", dense(1), "1")
    worker = make(models, EXPLICIT).start()
    assert worker.states == {}
    worker.keeper.ask(Loads(7, 1, [Load("net", '{"max_batch_size": 3}')]))
    worker.wait(lambda: worker.followed == [Followed(7, 1)])
    assert worker.models["net", "1"].spec.max_batch_size == 3
    worker.keeper.ask(Loads(7, 2, [Load("other"), Load("nope")]))
    worker.wait(lambda: len(worker.followed) == 2)
    assert worker.routes["net"] == Route("net")
    assert worker.state(1, "other") == READY
    assert worker.states["nope", "1"] == (UNAVAILABLE, f"there is no model 'nope' in {models}")
    assert worker.state(1) == READY, "until the broker says that nobody will ask for it"


def test_where_nothing_is_watched_orders_are_followed_by_doing_nothing(
    make: Callable[..., Worker], models: Path
) -> None:
    worker = make(models, NONE).start()
    write(models, "net", dense(2), "2")
    worker.keeper.ask(Loads(7, 1, []))
    worker.wait(lambda: worker.followed == [Followed(7, 1)])
    assert worker.states.keys() == {("net", "1")}


def test_an_order_where_it_is_watched_waits_for_what_has_come(make: Callable[..., Worker], models: Path) -> None:
    worker = make(models).start()
    write(models, "net", dense(2), "2")
    worker.keeper.ask(Loads(7, 1, []))
    worker.wait(lambda: worker.followed == [Followed(7, 1)])
    assert worker.state(2) == READY


def test_what_is_discarded_is_held_by_nobody(make: Callable[..., Worker], models: Path) -> None:
    worker = make(models).start()
    released = [worker.models.pop(("net", "1"))]
    gone = threading.Event()
    weakref.finalize(released[0], gone.set)
    worker.keeper.ask(Discard(released))
    if not gone.wait(DEADLINE_MS / 1000):
        pytest.fail(f"it is held by {gc.get_referrers(released)}")


def test_a_repository_that_goes_keeps_what_is_loaded(make: Callable[..., Worker], models: Path) -> None:
    worker = make(models).start()
    shutil.rmtree(models)
    worker.wait(lambda: "does not exist" in worker.states["net", "1"][1])
    assert worker.state(1) == READY


def test_nothing_there_is_an_error_at_the_beginning(make: Callable[..., Worker], tmp_path: Path) -> None:
    worker = make(tmp_path / "nope")
    with pytest.raises(RepositoryError, match="does not exist"):
        worker.keeper.begin()


def test_settings_without_effect_are_a_warning_at_load(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    sizes = "preferred_batch_sizes = [2, 4]\n"
    write(tmp_path, "batches", identity(TensorProto.FLOAT, ["N", 2]), config=sizes)
    write(tmp_path, "square", identity(TensorProto.FLOAT, [2, 2]), config=sizes)
    with caplog.at_level(logging.WARNING, "penstock.worker"):
        states = [load(file, None, CPU)[0] for file in find_models(tmp_path)]
    assert [state.state for state in states] == [READY, READY]
    [record] = caplog.records
    said = record.__dict__["fields"]
    assert (record.levelno, record.message, said["model"]) == (logging.WARNING, "settings have no effect", "square")
    assert said["reason"].startswith("key 'preferred_batch_sizes' in model.toml has no effect: ")
