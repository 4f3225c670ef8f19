"""What a version is made of, and that callers hear before it changes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import msgspec
import onnx
import pytest
from onnx import TensorProto

from penstock.wire.messages import WorkerModels
from penstock.wire.metrics import Meters
from penstock.wire.models import READY, ModelSpec, ModelState
from penstock.worker import tester
from penstock.worker.batcher import Batcher
from penstock.worker.config import CPU
from penstock.worker.content import content_digest
from penstock.worker.events import Loaded, Renewing
from penstock.worker.keeper import Keeper, load
from penstock.worker.repository import ModelFile, find_models
from penstock.worker.serving import Identity, Serving
from tests.system.models import dense, identity, write

EPOCH = 3
KEY = ("net", "1")


@pytest.fixture
def models(tmp_path: Path) -> Path:
    path = tmp_path / "models"
    write(path, "net", dense())
    (path / "net" / "model.toml").write_text("response_cache = true")
    return path


def found(models: Path) -> ModelFile:
    [file] = find_models(models)
    return file


def test_it_follows_from_the_file_alone(models: Path, tmp_path: Path) -> None:
    digest = content_digest(found(models))
    assert len(digest) == 64
    other = tmp_path / "other"
    write(other, "net", dense())
    os.utime(other / "net" / "1" / "model.onnx", (1, 1))
    assert content_digest(found(other)) == digest
    onnx.save(identity(TensorProto.FLOAT), other / "net" / "1" / "model.onnx")
    assert content_digest(found(other)) != digest


def test_it_follows_from_settings_that_change_results(models: Path) -> None:
    file = found(models)
    digest = content_digest(file)
    for settings, same in (({"instances": 3, "max_queue_delay": "5ms"}, True), ({"tf32": False}, False)):
        config = msgspec.structs.replace(file.config, **settings)
        assert (content_digest(replace(file, config=config)) == digest) == same


def test_it_follows_from_weights_beside_the_model(models: Path) -> None:
    path = models / "net" / "1" / "model.onnx"
    onnx.save(dense(), path, save_as_external_data=True, location="weights", size_threshold=0)
    digest = content_digest(found(models))
    assert digest
    weights = path.parent / "weights"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    assert content_digest(found(models)) not in ("", digest)


def test_what_has_changed_since_it_was_looked_at_has_none(models: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = found(models)
    onnx.save(dense(), file.path)
    assert content_digest(file) == ""
    assert [record.message for record in caplog.records] == ["answers of a model are not cached"]


def test_only_a_model_that_asks_for_it_has_one(models: Path) -> None:
    state, _ = load(found(models), None, CPU)
    assert state.spec is not None
    assert len(state.spec.build) == 64
    (models / "net" / "model.toml").write_text("response_cache = false")
    state, _ = load(found(models), None, CPU)
    assert state.spec is not None
    assert state.spec.build == ""


# --- before it changes ---


def state(build: str, reason: str = "") -> ModelState:
    return ModelState(*KEY, READY, reason, ModelSpec(*KEY, "onnx", (), (), False, 1, build))


@pytest.fixture
def serving() -> Iterator[Serving]:
    identity = Identity(b"12345678", "w", "cpu", 1, (), 1, True)
    serving = Serving(identity, [state("a")], Batcher(), Meters())
    serving.hello()
    yield serving
    serving.validate()


def told(serving: Serving) -> list[str]:
    """The builds that the broker is told of, at once."""
    said = serving.tell(EPOCH, 0.0)
    states = [each for message in said if isinstance(message, WorkerModels) for each in message.models]
    return ["" if each.spec is None else each.spec.build for each in states]


def test_it_is_told_at_once_that_nothing_is_to_be_cached(serving: Serving) -> None:
    serving.tell(EPOCH, 0.0)
    serving.renewing(KEY, True)
    assert serving.due() == 0.0
    assert told(serving) == [""]


def test_what_was_not_loaded_leaves_it_as_it_was(serving: Serving) -> None:
    serving.renewing(KEY, True)
    told(serving)
    serving.loaded(Loaded(state("a", "the new one cannot be served"), None), 1.0)
    assert serving.tell(EPOCH, 1.0)
    assert serving.states[KEY] == state("", "the new one cannot be served")
    serving.renewing(KEY, False)
    assert serving.states[KEY] == state("a", "the new one cannot be served")


def test_what_nobody_caches_is_not_told(serving: Serving) -> None:
    serving.renewing(("other", "1"), True)
    serving.renewing(("other", "1"), False)
    serving.renewing(KEY, False)
    assert told(serving) == []


def test_a_keeper_says_so_before_it_loads(models: Path) -> None:
    keeper = Keeper(models, tester.Tester(0.0), CPU)
    keeper.begin()
    keeper.start(None, lambda key: 0.0)
    events: list[object] = []
    try:
        while not any(isinstance(each, Renewing) and not each.on for each in events):
            events += keeper.take()
    finally:
        keeper.stop()
    kinds = [type(each).__name__ for each in events if type(each) in (Renewing, Loaded)]
    assert kinds[-3:] == ["Renewing", "Loaded", "Renewing"]
