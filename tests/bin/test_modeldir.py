"""A model's directory, and the changes to its model.toml."""

from __future__ import annotations

from pathlib import Path

import pytest

from penstock.bin.asking import Server
from penstock.bin.modeldir import ModelDir, ModelDirError, find_repository, pin, unpin
from penstock.worker.config import ModelConfig


def model(repository: Path, *versions: str, toml: str = "", pbtxt: str = "") -> ModelDir:
    for version in versions:
        (repository / "net" / version).mkdir(parents=True)
    if toml:
        (repository / "net" / "model.toml").write_text(toml)
    if pbtxt:
        (repository / "net" / "config.pbtxt").write_text(pbtxt)
    return ModelDir(repository, "net")


def test_versions_are_the_newest_first(tmp_path: Path) -> None:
    found = model(tmp_path, "9", "10", "latest", "007")
    assert found.versions() == ["10", "9"]
    found.check_version("9")
    with pytest.raises(ModelDirError, match="model 'net' has no version 7; it has 10, 9"):
        found.check_version("7")


def test_what_is_not_there_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(ModelDirError, match="there is no model 'nope' in "):
        ModelDir(tmp_path, "nope").versions()
    with pytest.raises(ModelDirError, match="is no model repository"):
        ModelDir(tmp_path / "nothing", "net")
    with pytest.raises(ModelDirError, match="a model's name"):
        ModelDir(tmp_path, "../net")


def test_which_file_is_the_configuration(tmp_path: Path) -> None:
    found = model(tmp_path, "1")
    assert (found.config_path, found.config(), found.file_name()) == (None, ModelConfig(), "model.onnx")
    found = model(tmp_path, pbtxt='backend: "onnxruntime"\nversion_policy { all {} }\n')
    assert (found.config_path, found.config().version_policy) == (found.pbtxt, "all")
    found = model(tmp_path, toml="version_policy = [1]\n")
    assert (found.config_path, found.config().version_policy) == (found.toml, (1,))


def test_a_configuration_that_cannot_be_followed_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(ModelDirError, match=r"model\.toml:1: key 'wieght': unknown; did you mean 'weight'"):
        model(tmp_path, "1", toml="wieght = 1\n").config()


def test_a_change_is_judged_before_it_is_written(tmp_path: Path) -> None:
    found = model(tmp_path, "1", toml="weight = 2.0  # twice\n")
    found.change(lambda text: text + "instances = 2\n", "")
    assert found.toml.read_text() == "weight = 2.0  # twice\ninstances = 2\n"
    with pytest.raises(ModelDirError) as raised:
        found.change(lambda text: text + "traffic = {canary = 100}\n", "")
    assert str(raised.value).startswith(f"{found.toml}:3: key 'traffic.canary': ")
    assert found.toml.read_text() == "weight = 2.0  # twice\ninstances = 2\n"


def test_a_model_without_a_configuration_gets_one(tmp_path: Path) -> None:
    found = model(tmp_path, "1")
    found.change(lambda text: f"{text}weight = 2.0\n", "")
    assert found.toml.read_text() == "weight = 2.0\n"


def test_tritons_configuration_is_left_to_its_user(tmp_path: Path) -> None:
    found = model(tmp_path, "1", pbtxt='backend: "onnxruntime"\n')
    with pytest.raises(ModelDirError, match=r"config\.pbtxt is the configuration of model 'net'.*by hand: write this"):
        found.change(lambda text: text, "write this")
    assert not found.toml.exists()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "weight = 2.0  # twice\n",
        'version_policy = "all"  # both\nweight = 2.0\n',
        "# of mine\nversion_policy = {latest = 2}\n",
        "version_policy = [\n  4,\n  7,  # two\n]\n",
        "labels = {stable = 3}\n\n[traffic]\nstable = 100\n",
    ],
)
def test_a_rollback_and_its_end(tmp_path: Path, text: str) -> None:
    found = model(tmp_path, "1", toml=text)
    before = found.config()
    found.change(lambda text: pin(text, "3", before), "")
    assert found.config().version_policy == (3,)
    again = found.config()
    found.change(lambda text: pin(text, "2", again), "")
    assert found.config().version_policy == (2,)
    found.change(lambda text: unpin(text) or "", "")
    assert found.config() == before
    assert "rollback" not in found.toml.read_text()
    for comment in (part.partition("#")[2] for part in text.splitlines() if "#" in part and "two" not in part):
        assert comment in found.toml.read_text()


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_all_else_in_a_configuration_stays_as_it_is(tmp_path: Path, end: str) -> None:
    found = model(tmp_path, "1")
    found.toml.write_bytes(
        end.join(["# mine", "weight = 2.0  # twice", "", "[labels]", "# of é", "a = 1", ""]).encode()
    )
    before, config = found.toml.read_bytes(), found.config()
    found.change(lambda text: pin(text, "3", config), "")
    pinned = found.toml.read_bytes()
    assert pinned.count(b"\n") == pinned.count(end.encode()), "the lines all end alike"
    found.change(lambda text: unpin(text) or "", "")
    assert found.toml.read_bytes() == before


def test_a_pin_that_somebody_else_wrote_is_taken_out(tmp_path: Path) -> None:
    assert unpin("version_policy = [3]\nweight = 2.0\n") == "weight = 2.0\n"
    assert unpin('version_policy = "all"\n') is None
    assert unpin("") is None


def test_a_repository_is_named_or_asked_for(tmp_path: Path) -> None:
    assert find_repository(Server(None, 0.01), tmp_path) == tmp_path
    with pytest.raises(ModelDirError, match="lie on its host"):
        find_repository(Server("tcp://127.0.0.1:9", 0.01), None)
