"""What is found in a model repository, and what is said of what is not one."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from penstock.wire.models import Route
from penstock.worker import repository
from penstock.worker.config import ModelConfig
from penstock.worker.repository import ModelFile, Repository, RepositoryError, find_models


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
    assert bad.problem == f"{tmp_path}/bad/model.toml:1: key 'instnces': unknown; did you mean 'instances'?"
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
@pytest.mark.parametrize("mode", [0, 0o100, 0o400])
@pytest.mark.parametrize("what", ["2", "2/more", "warmup", "stray"])
def test_directory_of_a_model_that_may_not_be_read_leaves_the_others(tmp_path: Path, what: str, mode: int) -> None:
    put(tmp_path, "m/1/model.onnx", "m/2/model.onnx", f"m/{what}/file", "n/1/model.onnx")
    (tmp_path / "m" / what).chmod(mode)
    try:
        look = Repository(tmp_path).look()
    finally:
        (tmp_path / "m" / what).chmod(0o700)
    assert not look.problem
    assert [file.problem for file in look.models["n"].files] == [""]
    [file] = look.models["m"].files
    assert file.problem == ("" if what == "stray" else f"cannot read {tmp_path}/m/2: Permission denied")


@pytest.mark.parametrize("name", [b"\xff\xfe", b"a\nb", b"\x1b[31m"])
def test_stray_whose_name_cannot_be_printed_is_shown_as_it_can_be(tmp_path: Path, name: bytes) -> None:
    put(tmp_path, "m/1/model.onnx", f"m/{os.fsdecode(name)}/model.onnx")
    [stray] = Repository(tmp_path).look().models["m"].strays
    assert stray.version.isprintable()
    assert stray.version.encode().count(b"?") >= 1


def test_a_model_that_is_a_link_to_what_is_not_there_is_a_sentence(tmp_path: Path) -> None:
    """As when the file system that it leads to is not mounted: so it is not taken for removed."""
    put(tmp_path, "n/1/model.onnx")
    (tmp_path / "m").symlink_to("nowhere")
    for names in (None, {"m"}):
        found = Repository(tmp_path).look(names).models["m"]
        assert found.hollow
        assert found.files[0].problem == f"cannot read {tmp_path}/m: No such file or directory"


@pytest.mark.parametrize("place", ["m/2", "m/2/model.onnx", "m/model.toml", "m/warmup", "m/stray/model.onnx", "other"])
@pytest.mark.parametrize("to", ["x" * 300, "loop"])
def test_link_that_leads_nowhere_leaves_the_others(tmp_path: Path, place: str, to: str) -> None:
    put(tmp_path, "m/1/model.onnx", "m/3/model.onnx", "n/1/model.onnx")
    (tmp_path / place).parent.mkdir(exist_ok=True)
    (tmp_path / place).symlink_to((tmp_path / place).name if to == "loop" else to)
    look = Repository(tmp_path).look()
    assert not look.problem
    assert [file.problem for file in look.models["n"].files] == [""]
    assert [file.version for file in look.models["m"].files] == ["3"]


@pytest.mark.skipif(os.getuid() == 0, reason="root may read every directory")
def test_repository_that_may_not_be_read_is_refused(tmp_path: Path) -> None:
    (tmp_path / "models").mkdir(mode=0)
    assert complaint(tmp_path / "models") == f"cannot read {tmp_path}/models: Permission denied"


def test_versions_that_labels_and_traffic_name_are_served_too(tmp_path: Path) -> None:
    put(tmp_path, *(f"m/{number}/model.onnx" for number in (1, 2, 3, 4)))
    (tmp_path / "m/model.toml").write_text('labels = {stable = 2, gone = 7}\ntraffic = {stable = 99, "1" = 1}\n')
    found = find_models(tmp_path)
    assert [(each.version, bool(each.problem)) for each in found] == [
        ("7", True),
        ("4", False),
        ("2", False),
        ("1", False),
    ]


def test_models_for_other_devices_are_left_out(tmp_path: Path) -> None:
    put(tmp_path, "any/1/model.onnx", "gpu/1/model.onnx", "second/1/model.onnx", "empty/notes")
    (tmp_path / "gpu/model.toml").write_text('devices = ["cuda"]\n')
    (tmp_path / "second/model.toml").write_text('devices = ["cuda:1"]\n')
    (tmp_path / "empty/model.toml").write_text('devices = ["cuda:1"]\n')
    assert [each.name for each in find_models(tmp_path, "cpu")] == ["any"]
    assert [each.name for each in find_models(tmp_path, "cuda:0")] == ["any", "gpu"]
    assert [each.name for each in find_models(tmp_path, "cuda:1")] == ["any", "empty", "gpu", "second"]
    assert [each.name for each in find_models(tmp_path)] == ["any", "empty", "gpu", "second"]


# --- what may be wrong with one model, or be no more ---


def test_links_within_the_repository_are_followed_and_others_are_refused(tmp_path: Path) -> None:
    put(tmp_path, "stored/7/model.onnx", "models/m/.releases/a/model.onnx", "models/n/1/readme", "models/o/1/net")
    models = tmp_path / "models"
    (models / "m/2").symlink_to(".releases/a")
    (models / "p").symlink_to(tmp_path / "stored")
    (models / "q").mkdir()
    (models / "q/1").symlink_to(tmp_path / "stored/7")
    (models / "n/1/model.onnx").symlink_to(tmp_path / "stored/7/model.onnx")
    (models / "o/1/model.onnx").symlink_to("net")
    look = Repository(models).look()
    problems = {name: found.files[0].problem for name, found in look.models.items()}
    assert (problems["m"], problems["o"]) == ("", "")
    for name, path in (("n", "n/1/model.onnx"), ("p", "p"), ("q", "q/1")):
        assert problems[name].startswith(f"{models}/{path} leads to {tmp_path}/stored/7"[: -2 if name == "p" else None])
        assert problems[name].endswith("or allow such links: links_out = true in [worker] of penstock.toml")
    allowed = Repository(models, links_out=True).look()
    assert {found.files[0].problem for found in allowed.models.values()} == {""}


def test_a_repository_may_be_a_link(tmp_path: Path) -> None:
    put(tmp_path, "there/m/1/model.onnx")
    (tmp_path / "models").symlink_to("there")
    assert Repository(tmp_path / "models").look().models["m"].files[0].problem == ""


def test_models_beside_the_one_that_is_served_are_a_sentence(tmp_path: Path) -> None:
    put(tmp_path, "m/1/model.onnx", "m/1/other.onnx", "n/1/a.onnx", "n/1/b.onnx", "o/1/net.onnx")
    m, n, o = find_models(tmp_path)
    assert (m.problem, m.note) == ("", "model.onnx is served, and not other.onnx beside it: a version is one model")
    path = f"{tmp_path}/n/1/model.onnx"
    assert n.problem == f"{path} does not exist; a.onnx, b.onnx are there: rename the one that is meant to model.onnx"
    assert o.problem.endswith("does not exist; net.onnx is there: rename it to model.onnx")


def test_versions_that_labels_and_traffic_name_are_found_and_what_a_request_means(tmp_path: Path) -> None:
    put(tmp_path, *[f"m/{version}/model.onnx" for version in range(1, 9)])
    (tmp_path / "m/model.toml").write_text("labels = {old = 2}\n[traffic]\nold = 90\n4 = 10\n")
    found = Repository(tmp_path).look().models["m"]
    assert found.route == Route("m", ("8",), (("old", "2"),), (("old", 90), ("4", 10)))
    assert [file.version for file in found.files] == ["8", "4", "2"]
    assert [file.version for file in found.others] == ["7", "6", "5", "3"]


def test_a_configuration_that_cannot_be_followed_any_more_leaves_the_one_before(tmp_path: Path) -> None:
    put(tmp_path, "m/1/model.onnx", "m/2/model.onnx")
    (tmp_path / "m/model.toml").write_text("version_policy = [1]\nweight = 2.0")
    repository = Repository(tmp_path)
    before = repository.look().models["m"]
    (tmp_path / "m/model.toml").write_text("version_policy = [1]\nwieght = 2.0")
    found = repository.look().models["m"]
    assert (found.files, found.route) == (before.files, before.route)
    assert found.problem == f"{tmp_path}/m/model.toml:2: key 'wieght': unknown; did you mean 'weight'?"
    assert found.config != before.config


@pytest.mark.parametrize(
    "change",
    [
        lambda version: (version / "model.onnx").write_bytes(b"other"),
        lambda version: (version / "weights").touch(),
        lambda version: (version / "more/weights").write_bytes(b"longer"),
        lambda version: (version / "model.onnx").replace(version / "weights"),
        lambda version: (version.parent / "model.toml").write_text("weight = 3.0"),
    ],
)
def test_a_change_of_what_a_version_is_made_of_is_seen(tmp_path: Path, change: Callable[[Path], object]) -> None:
    put(tmp_path, "m/1/model.onnx", "m/1/more/weights")
    repository = Repository(tmp_path)
    [before] = repository.look().models["m"].files
    assert repository.look().models["m"].files[0].mark == before.mark
    change(tmp_path / "m/1")
    assert repository.look().models["m"].files[0].mark != before.mark


def test_where_requests_go_is_nothing_that_a_version_is_made_of(tmp_path: Path) -> None:
    put(tmp_path, "m/1/model.onnx")
    repository = Repository(tmp_path)
    [before] = repository.look().models["m"].files
    (tmp_path / "m/model.toml").write_text('version_policy = "all"\nlabels = {stable = 1}\ntraffic = {stable = 100}\n')
    [after] = repository.look().models["m"].files
    assert after.mark == before.mark


def test_one_model_is_looked_at_alone_and_one_that_is_not_there_is_not_found(tmp_path: Path) -> None:
    put(tmp_path, "m/1/model.onnx", "n/1/model.onnx")
    repository = Repository(tmp_path)
    names = frozenset({"m", "nope", "../m", ""})
    look = repository.look(names)
    assert (list(look.models), look.names, look.problem) == (["m"], names, "")


def test_orders_have_configurations_and_name_what_is_not_there(tmp_path: Path) -> None:
    put(tmp_path, "m/1/model.onnx", "n/1/model.onnx", "o/1/model.onnx")
    (tmp_path / "m/model.toml").write_text("weight = 2.0\nmax_batch_size = 4\n")
    loads = {"m": '{"max_batch_size": 8}', "n": '{"wieght": 1}', "nope": "", "../m": ""}
    models = Repository(tmp_path).look(None, loads).models
    assert models.keys() == loads.keys()
    assert models["m"].files[0].config == ModelConfig(weight=2.0, max_batch_size=8)
    assert "did you mean 'weight'?" in models["n"].files[0].problem
    assert models["nope"].files[0].problem == f"there is no model 'nope' in {tmp_path}"
    assert models["../m"].files[0].problem.startswith("there is no model '../m'")


@pytest.mark.parametrize("text", ["[]", "{", '{"max_batch_size": "x"}', '{"traffic": {"a": 100}}', "1" * 5000])
def test_an_order_that_cannot_be_followed_is_a_sentence(tmp_path: Path, text: str) -> None:
    put(tmp_path, "m/1/model.onnx")
    [file] = Repository(tmp_path).look(None, {"m": text}).models["m"].files
    assert file.problem.startswith("the configuration that model 'm' is to be loaded with")


def test_more_versions_than_are_served_are_left_out_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(repository, "VERSIONS_MAX", 2)
    put(tmp_path, *[f"{name}/1/model.onnx" for name in "abcdef"])
    files = find_models(tmp_path)
    assert [file.problem != "" for file in files] == [False, False, True, True]
    assert files[2].problem == f"{tmp_path} holds more than the 2 versions that are served; this one is left out"


def test_a_version_of_more_files_than_a_model_is_made_of_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(repository, "_FILES_MAX", 3)
    put(tmp_path, "m/1/model.onnx", *[f"m/1/{number}" for number in range(5)])
    [file] = find_models(tmp_path)
    assert file.problem.startswith(f"{tmp_path}/m/1 holds more than 3 files")


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ('{"max_batch_size": 8}', {"max_batch_size": 8, "max_queue_delay": "2ms"}),
        ('{"version_policy": {"latest": 2}}', {"version_policy": {"latest": 2}, "max_queue_delay": "2ms"}),
        # As tritonclient's load_model sends it: all of the configuration.
        (
            '{"backend": "onnxruntime", "max_batch_size": 4, "dynamic_batching": {"max_queue_delay_microseconds": 100},'
            ' "version_policy": {"specific": {"versions": [1, 3]}}, "instance_group": [{"count": 2}]}',
            {"max_batch_size": 4, "max_queue_delay": "100us", "version_policy": (1, 3), "instances": 2},
        ),
        ('{"version_policy": {"latest": {"num_versions": 2}}}', {"version_policy": {"latest": 2}}),
    ],
)
def test_an_order_may_have_a_configuration_in_either_form(
    tmp_path: Path, override: str, expected: dict[str, Any]
) -> None:
    for version in "123":
        (tmp_path / "m" / version).mkdir(parents=True)
        (tmp_path / "m" / version / "model.onnx").touch()
    (tmp_path / "m" / "model.toml").write_text("max_queue_delay = '2ms'\n")
    found = Repository(tmp_path).look(None, {"m": override}).models["m"]
    config = found.files[0].config
    assert {key: getattr(config, key) for key in expected} == expected


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ('{"backend": "tensorflow"}', "only ONNX models are served"),
        ('{"backend": "onnxruntime", "zebra": 1}', "zebra"),
        ('{"max_batch_size": "many"}', "key 'max_batch_size'"),
        ('{"max_batch_sise": 4}', "did you mean 'max_batch_size'?"),
        ("[]", "is a JSON object with keys of a model.toml, or Triton's"),
        ("{", "is not JSON"),
    ],
)
def test_a_configuration_of_an_order_that_cannot_be_followed_says_so(tmp_path: Path, override: str, says: str) -> None:
    (tmp_path / "m" / "1").mkdir(parents=True)
    (tmp_path / "m" / "1" / "model.onnx").touch()
    found = Repository(tmp_path).look(None, {"m": override}).models["m"]
    assert says in found.problem or says in found.files[0].problem
    assert "the configuration that model 'm' is to be loaded with" in (found.problem or found.files[0].problem)


def test_directories_that_files_may_yet_come_into_are_watched(tmp_path: Path) -> None:
    """Where one is made and then filled, only its being made is told of in the directory around it."""
    model = tmp_path / "m"
    for each in ("1", "2/deep/er", "latest", "warmup"):
        (model / each).mkdir(parents=True)
    (model / "1" / "model.onnx").write_bytes(b"x")
    found = Repository(tmp_path).look().models["m"]
    assert {str(each.relative_to(tmp_path)) for each in found.directories} == {
        *("m", "m/1", "m/2", "m/2/deep", "m/2/deep/er", "m/latest", "m/warmup"),
    }
    shutil.rmtree(model / "1")
    shutil.rmtree(model / "2")
    found = Repository(tmp_path).look().models["m"]
    assert found.hollow
    assert {each.name for each in found.directories} == {"m", "latest", "warmup"}
