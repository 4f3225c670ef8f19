"""What is found in a model repository, and what is said of what is not one."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from penstock.worker import repository
from penstock.worker.config import ModelConfig
from penstock.worker.repository import ModelFile, RepositoryError, find_models


def put(root: Path, *names: str) -> Path:
    """Empty files under ``root``: nobody looks into them here."""
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return root


def complaint(path: Path) -> str:
    with pytest.raises(RepositoryError) as raised:
        find_models(path)
    return str(raised.value)


def test_models_come_in_the_order_of_their_names(tmp_path: Path) -> None:
    put(tmp_path, "b/1/model.onnx", "a/1/model.onnx")
    assert find_models(tmp_path) == [
        ModelFile("a", "1", tmp_path / "a/1/model.onnx"),
        ModelFile("b", "1", tmp_path / "b/1/model.onnx"),
    ]


def test_highest_version_is_the_highest_number(tmp_path: Path) -> None:
    put(tmp_path, "m/2/model.onnx", "m/10/model.onnx", "m/9/model.onnx")
    [file] = find_models(tmp_path)
    assert (file.version, file.path) == ("10", tmp_path / "m/10/model.onnx")


def test_what_is_no_number_is_no_version(tmp_path: Path) -> None:
    put(tmp_path, "m/1/model.onnx", "m/warmup/one.npz", "m/.2/model.onnx", "m/3")
    [file] = find_models(tmp_path)
    assert (file.version, file.problem) == ("1", "")


@pytest.mark.parametrize("name", ["latest", "2.old", "-3", "007"])
def test_a_model_that_lies_where_no_version_can_be_is_a_problem_of_its_own(tmp_path: Path, name: str) -> None:
    put(tmp_path, "m/1/model.onnx", f"m/{name}/model.onnx")
    one, stray = find_models(tmp_path)
    assert (one.version, one.problem) == ("1", "")
    words = "is no version: its name is no whole number without leading zeros; rename it"
    assert (stray.version, stray.problem) == (name, f"{tmp_path}/m/{name} {words}")


def test_the_policy_says_which_versions_are_served(tmp_path: Path) -> None:
    put(tmp_path, "m/1/model.onnx", "m/2/model.onnx", "m/3/model.onnx")
    (tmp_path / "m/model.toml").write_text("version_policy = {latest = 2}")
    assert [(file.version, file.path) for file in find_models(tmp_path)] == [
        ("3", tmp_path / "m/3/model.onnx"),
        ("2", tmp_path / "m/2/model.onnx"),
    ]


def test_a_version_that_is_named_and_not_there_is_a_problem(tmp_path: Path) -> None:
    put(tmp_path, "m/1/model.onnx")
    (tmp_path / "m/model.toml").write_text("version_policy = [1, 4]")
    four, one = find_models(tmp_path)
    assert (four.version, four.problem) == ("4", f"{tmp_path}/m/4/model.onnx does not exist")
    assert (one.version, one.problem) == ("1", "")


def test_configuration_lies_beside_the_versions(tmp_path: Path) -> None:
    put(tmp_path, "m/1/model.onnx")
    (tmp_path / "m/model.toml").write_text("instances = 2")
    [file] = find_models(tmp_path)
    assert file.config == ModelConfig(instances=2)


def test_bad_configuration_is_that_models_problem_alone(tmp_path: Path) -> None:
    put(tmp_path, "bad/1/model.onnx", "good/1/model.onnx")
    (tmp_path / "bad/model.toml").write_text("instnces = 2")
    bad, good = find_models(tmp_path)
    assert bad.problem == f"{tmp_path}/bad/model.toml: unknown key 'instnces'; did you mean 'instances'?"
    assert good.problem == ""


def test_model_without_a_version_says_where_to_put_it(tmp_path: Path) -> None:
    put(tmp_path, "m/model.onnx", "other/1/model.onnx")
    file, _ = find_models(tmp_path)
    assert file.problem == f"{tmp_path}/m has no version directory; put the model at m/1/model.onnx"


def test_version_without_a_file_is_a_problem(tmp_path: Path) -> None:
    put(tmp_path, "m/1/model.onnx", "m/2/notes.txt")
    [file] = find_models(tmp_path)
    assert (file.version, file.problem) == ("2", f"{tmp_path}/m/2/model.onnx does not exist")


def test_directory_called_model_onnx_is_a_problem(tmp_path: Path) -> None:
    (tmp_path / "m/1/model.onnx").mkdir(parents=True)
    [file] = find_models(tmp_path)
    assert file.problem.endswith("model.onnx does not exist")


def test_hidden_directories_and_files_beside_models_are_passed_over(tmp_path: Path) -> None:
    put(tmp_path, "m/1/model.onnx", ".git/1/model.onnx", "README.md", "other.onnx")
    assert [file.name for file in find_models(tmp_path)] == ["m"]


def test_links_to_models_are_followed(tmp_path: Path) -> None:
    put(tmp_path, "stored/v7/model.onnx", "models/m/readme")
    (tmp_path / "models/m/1").symlink_to(tmp_path / "stored/v7")
    [file] = find_models(tmp_path / "models")
    assert (file.name, file.problem) == ("m", "")


def test_name_that_is_not_utf8_is_a_problem_and_shown_as_it_can_be(tmp_path: Path) -> None:
    put(tmp_path, os.fsdecode(b"m\xff/1/model.onnx"))
    [file] = find_models(tmp_path)
    assert file.name == "m?"
    assert file.problem == r"the name 'm\udcff' is not UTF-8; rename it"


def test_file_whose_name_is_not_utf8_is_shown_as_it_can_be(tmp_path: Path) -> None:
    name = os.fsdecode(b"m\xff.onnx")
    [file] = find_models(put(tmp_path, name) / name)
    assert file.name.encode() == b"m?"
    assert "is not UTF-8" in file.problem


@pytest.mark.parametrize("name", ["a\nb", "a\x1b[31mb", "a\u202eb", "a\xa0b"])
def test_name_that_cannot_be_printed_is_a_problem(tmp_path: Path, name: str) -> None:
    put(tmp_path, f"{name}/1/model.onnx")
    [file] = find_models(tmp_path)
    assert "cannot be printed" in file.problem
    assert file.problem.isprintable()


@pytest.mark.parametrize("name", ["with space", "ü", "模型", "a'b", "-x"])
def test_any_name_that_can_be_printed_will_do(tmp_path: Path, name: str) -> None:
    put(tmp_path, f"{name}/1/model.onnx")
    assert find_models(tmp_path) == [ModelFile(name, "1", tmp_path / name / "1/model.onnx")]


def test_name_longer_than_a_message_takes_is_a_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(repository, "MAX_NAME", 8)  # Linux has no names of more than 255 bytes
    put(tmp_path, "eight888/1/model.onnx", "nine99999/1/model.onnx")
    eight, nine = find_models(tmp_path)
    assert eight.problem == ""
    assert (nine.name, nine.problem) == ("nine9999", "the name 'nine99999...' is longer than 8 characters; rename it")


def test_one_file_is_one_model_named_after_it(tmp_path: Path) -> None:
    path = put(tmp_path, "resnet.v2.onnx") / "resnet.v2.onnx"
    assert find_models(path) == [ModelFile("resnet.v2", "1", path)]


def test_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    path = put(tmp_path, "model.pt") / "model.pt"
    assert complaint(path) == f"{path} is neither a directory nor an .onnx file"


def test_nothing_there_is_refused(tmp_path: Path) -> None:
    assert complaint(tmp_path / "nope").startswith(f"{tmp_path}/nope does not exist; give an .onnx file or")


def test_empty_directory_says_what_a_repository_looks_like(tmp_path: Path) -> None:
    assert complaint(tmp_path) == f"{tmp_path} holds no models: a repository has the form NAME/VERSION/model.onnx"


def test_loose_file_in_an_empty_repository_says_where_it_belongs(tmp_path: Path) -> None:
    text = complaint(put(tmp_path, "resnet.onnx"))
    assert text.endswith(f"; resnet.onnx lies beside it: move it to {tmp_path}/resnet/1/model.onnx, or give the file")


def test_directory_of_one_model_names_the_repository_above(tmp_path: Path) -> None:
    put(tmp_path, "m/1/model.onnx", "m/2/model.onnx")
    assert complaint(tmp_path / "m") == f"{tmp_path}/m is one model, not a repository; give {tmp_path} instead"


def test_working_directory_of_one_model_names_the_repository_above(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(put(tmp_path, "m/1/model.onnx") / "m")
    assert complaint(Path()) == f". is one model, not a repository; give {tmp_path} instead"


def test_models_with_numbers_for_names_are_a_repository(tmp_path: Path) -> None:
    put(tmp_path, "1/1/model.onnx", "2/1/model.onnx")
    assert [file.name for file in find_models(tmp_path)] == ["1", "2"]


@pytest.mark.skipif(os.getuid() == 0, reason="root may read every directory")
def test_directory_that_may_not_be_read_is_that_models_problem(tmp_path: Path) -> None:
    put(tmp_path, "m/1/model.onnx")
    (tmp_path / "m").chmod(0)
    try:
        [file] = find_models(tmp_path)
    finally:
        (tmp_path / "m").chmod(0o700)
    assert file.problem == f"cannot read {tmp_path}/m: Permission denied"


@pytest.mark.skipif(os.getuid() == 0, reason="root may read every directory")
def test_repository_that_may_not_be_read_is_refused(tmp_path: Path) -> None:
    (tmp_path / "models").mkdir(mode=0)
    assert complaint(tmp_path / "models") == f"cannot read {tmp_path}/models: Permission denied"
