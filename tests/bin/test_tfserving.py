"""What becomes of a model_config_list of TensorFlow Serving."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.bin.cli import cli
from penstock.bin.tfserving import Link, Plan, Served, Version, Write, parse_list, plan
from penstock.worker.config import ConfigError
from penstock.worker.repository import find_models

BASE = Path("/serving/net")
INTO = Path("/into")
HOME = INTO / "net"

# As its documentation has it, and more.
LIST = """
model_config_list {
  # the first
  config {
    name: 'net'
    base_path: '/serving/net/'
    model_platform: 'tensorflow'
    model_version_policy { specific { versions: 42 versions: 43 } }
    version_labels { key: 'stable' value: 42 }
    version_labels { key: 'canary' value: 43 }
  }
  config: {
    name: "other",
    base_path: "/serving/other"
    model_type: TENSORFLOW
    logging_config { log_collector_config { type: "" filename_prefix: "/x" } sampling_config { sampling_rate: 0.1 } }
  };
  config { name: 'three' base_path: '/t' model_version_policy: { latest: { num_versions: 3 } } }
  config { name: 'every' base_path: '/e' model_version_policy { all { } } }
}
"""


def test_a_list_is_read() -> None:
    net, other, three, every = parse_list(LIST, "models.config")
    assert (net.name, net.base, net.policy) == ("net", BASE, (42, 43))
    assert (net.labels, net.warnings) == ({"stable": 42, "canary": 43}, ())
    assert (other.policy, three.policy, every.policy) == ("latest", {"latest": 3}, "all")
    [logging] = other.warnings
    assert logging.startswith("logging_config is left out: ")


def model(text: str) -> str:
    return f"model_config_list {{ config {{ {text} }} }}"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", ": it names no models; it takes model_config_list { config { ... } }"),
        (
            "model_config_list {\n config { nam: 'x' } }",
            ":2: field 'nam': unknown in ModelConfig; did you mean",
        ),
        (
            "model_config_list {\n config { zebra: 1 } }",
            ":2: field 'zebra': unknown in ModelConfig; if it is of a newer",
        ),
        ("model_config_list {", ':1: Expected "}".'),
        ("custom_model_config { }", ": custom_model_config: only a model_config_list says where models lie"),
        (model("base_path: '/x'"), ": model_config_list.config[0].name: '' cannot be the name of a directory"),
        (model("name: '../x' base_path: '/x'"), ": model_config_list.config[0].name: '../x' cannot be"),
        (model("name: '.x' base_path: '/x'"), ": model_config_list.config[0].name: '.x' cannot be"),
        (model("name: 'a\\nb' base_path: '/x'"), ": model_config_list.config[0].name: the name 'a\\nb' holds"),
        (
            model("name: 'x' base_path: '/x' version_labels { key: '7' value: 7 }"),
            ": model_config_list.config[0].version_labels: '7': a whole number looks like a version",
        ),
        (
            model("name: 'x' base_path: '/x' version_labels { key: 'a' value: -7 }"),
            ": model_config_list.config[0].version_labels: 'a': -7 is no version",
        ),
        (model("name: 'x'"), ": model_config_list.config[0].base_path: '' is no absolute path; make it one"),
        (model("name: 'x' base_path: 'x'"), ": model_config_list.config[0].base_path: 'x' is no absolute path"),
        (
            model("name: 'x' base_path: 'gs://b/x'"),
            ": model_config_list.config[0].base_path: 'gs://b/x' is not on this",
        ),
        (
            "model_config_list { config [ { name: 'x' base_path: '/a' }, { name: 'x' base_path: '/b' } ] }",
            ": model_config_list.config[1].name: 'x' is there twice; rename one",
        ),
        (
            model("name: 'x' base_path: '/x' model_version_policy { specific { versions: -1 } }"),
            ": model_config_list.config[0].model_version_policy.specific.versions: name 1 to 64 of them",
        ),
        (
            model("name: 'x' base_path: '/x' model_version_policy { specific { } }"),
            ": model_config_list.config[0].model_version_policy.specific.versions: name 1 to 64 of them",
        ),
        (
            model("name: 'x' base_path: '/x' model_version_policy { latest { num_versions: 65 } }"),
            ": model_config_list.config[0].model_version_policy.latest.num_versions: 65 is more than 64",
        ),
    ],
)
def test_what_is_no_list_is_a_sentence(text: str, said: str) -> None:
    with pytest.raises(ConfigError) as raised:
        parse_list(text, "models.config")
    assert str(raised.value).startswith(f"models.config{said}")
    assert str(raised.value).isprintable()


WORDS = (
    "model_config_list config name base_path '/a' 'b' '\\xff' version_labels key value all specific { } [ ] : , 1 -1"
)


@settings(deadline=None, max_examples=150)
@given(st.one_of(st.text(max_size=40), st.lists(st.sampled_from(WORDS.split(" ")), max_size=16).map(" ".join)))
def test_any_text_is_a_list_or_a_sentence(text: str) -> None:
    try:
        said = str(parse_list(text, "f")[0].base)
    except ConfigError as error:
        said = str(error)
    assert said.isprintable()


# --- what to do ---


def test_the_newest_is_one_link_which_follows_what_comes() -> None:
    found = plan(Served("net", BASE, "latest"), [Version("1", has_onnx=False), Version("2")], INTO)
    assert found == Plan((Link(HOME, BASE),))


def test_named_versions_are_links_beside_a_model_toml() -> None:
    found = plan(Served("net", BASE, (42, 43)), [Version("42"), Version("43"), Version("44")], INTO)
    assert found == Plan(
        (
            Write(HOME / "model.toml", "version_policy = [42, 43]\n"),
            Link(HOME / "42", BASE / "42"),
            Link(HOME / "43", BASE / "43"),
        )
    )


@pytest.mark.parametrize(("policy", "text"), [("all", '"all"'), ({"latest": 2}, "{latest = 2}")])
def test_for_several_it_is_said_that_later_ones_are_not_seen(policy: str, text: str) -> None:
    found = plan(Served("net", BASE, policy, ("labels",)), [Version("1"), Version("2")], INTO)  # type: ignore[arg-type]
    assert found.steps[0] == Write(HOME / "model.toml", f"version_policy = {text}\n")
    assert found.steps[1:] == (Link(HOME / "1", BASE / "1"), Link(HOME / "2", BASE / "2"))
    assert found.warnings == ("labels", "what comes to /serving/net later is not seen at /into/net; import again then")


def test_labels_are_labels_and_versions_that_have_one_are_linked() -> None:
    found = plan(Served("net", BASE, "latest", labels={"old": 1}), [Version("1"), Version("2"), Version("3")], INTO)
    assert found.steps[0] == Write(HOME / "model.toml", "labels = {old = 1}\n")
    assert {step.path.name for step in found.steps[1:]} == {"1", "2", "3"}
    found = plan(Served("net", BASE, (3,), labels={"old": 1}), [Version("1"), Version("2"), Version("3")], INTO)
    assert {step.path.name for step in found.steps[1:]} == {"1", "3"}


def test_versions_with_leading_zeros_get_names_without() -> None:
    found = plan(Served("net", BASE, "latest"), [Version("00000123")], INTO)
    assert found.steps == (Link(HOME / "123", BASE / "00000123"),)


def test_a_saved_model_is_converted_first() -> None:
    found = plan(Served("net", BASE, "latest"), [Version("1"), Version("2", False, True)], INTO)
    assert found == Plan(
        problems=(
            "/serving/net/2 holds a saved_model.pb, and only ONNX models are served: python -m tf2onnx.convert "
            "--saved-model /serving/net/2 --output /serving/net/2/model.onnx",
        )
    )


def test_what_can_be_served_is_and_the_rest_is_said() -> None:
    versions = [Version("1"), Version("2", has_onnx=False)]
    found = plan(Served("net", BASE, (1, 2, 3)), versions, INTO)
    assert found.steps[1:] == (Link(HOME / "1", BASE / "1"),)
    assert found.problems == (
        "/serving/net/3 is not there, and the version policy names it",
        "/serving/net/2/model.onnx does not exist",
    )


def test_without_versions_there_is_nothing_to_do() -> None:
    [problem] = plan(Served("net", BASE, "latest"), [], INTO).problems
    assert problem == "/serving/net has no version directory, such as /serving/net/1"


# --- the command ---


@pytest.fixture
def serving(tmp_path: Path) -> Path:
    """What TensorFlow Serving has: two models, one of them not converted."""
    for name in ("net/41/model.onnx", "net/42/model.onnx", "every/1/model.onnx", "raw/1/saved_model.pb"):
        path = tmp_path / "serving" / name
        path.parent.mkdir(parents=True)
        path.touch()
    configs = [
        f"config {{ name: 'net' base_path: '{tmp_path}/serving/net' "
        "model_version_policy { specific { versions: 42 } } version_labels { key: 'a' value: 42 } }",
        f"config {{ name: 'plain' base_path: '{tmp_path}/serving/net' }}",
        f"config {{ name: 'raw' base_path: '{tmp_path}/serving/raw' }}",
        f"config {{ name: 'gone' base_path: '{tmp_path}/serving/gone' }}",
    ]
    path = tmp_path / "models.config"
    path.write_text("model_config_list {\n" + "\n".join(configs) + "\n}\n")
    return path


def run(path: Path, *arguments: str) -> Result:
    command = ["models", "import-tfserving", str(path), f"--into={path.parent}/into", *arguments]
    return CliRunner().invoke(cli, command)


def test_a_list_becomes_a_repository(serving: Path) -> None:
    root = serving.parent
    shown = run(serving)
    assert shown.exit_code == 2
    assert shown.stdout.splitlines() == [
        f"net: wrote {root}/into/net/model.toml: version_policy = [42]",
        "labels = {a = 42}",
        f"net: linked {root}/into/net/42 to {root}/serving/net/42",
        f"plain: linked {root}/into/plain to {root}/serving/net",
        f"the links lead out of {root}/into: serve it with links_out = true in [worker] of penstock.toml",
    ]
    raw, gone = shown.stderr.splitlines()
    assert raw.startswith(f"penstock: model raw: {root}/serving/raw/1 holds a saved_model.pb, ")
    assert gone.startswith(f"penstock: model gone: {root}/serving/gone does not exist; if it is a path in a container")
    net, plain = find_models(root / "into")
    assert (net.name, net.version, net.problem) == ("net", "42", "")
    assert (plain.name, plain.version, plain.path) == ("plain", "42", root / "into/plain/42/model.onnx")


def test_importing_again_changes_nothing_and_adds_what_is_new(serving: Path) -> None:
    root = serving.parent
    policy = "model_version_policy { all { } }"
    serving.write_text(model(f"name: 'net' base_path: '{root}/serving/net' {policy}"))
    assert run(serving).exit_code == 0
    (root / "serving/net/43").mkdir()
    (root / "serving/net/43/model.onnx").touch()
    shown = run(serving)
    assert (shown.exit_code, shown.stderr) == (0, "")
    assert f"net: {root}/into/net/42 is there\nnet: linked {root}/into/net/43 to " in shown.stdout
    assert [file.version for file in find_models(root / "into")] == ["43", "42", "41"]


@pytest.mark.parametrize("place", ["net/model.toml", "net/42", "net"])
def test_what_is_something_else_is_never_replaced(serving: Path, place: str) -> None:
    path = serving.parent / "into" / place
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("ours")
    before = sorted(path.parent.rglob("*"))
    shown = run(serving)
    assert shown.exit_code == 2
    assert "model net: " in shown.stderr
    assert path.read_text() == "ours"
    assert sorted(each for each in path.parent.rglob("*") if each.name not in ("plain",)) == before


def test_a_dry_run_does_nothing(serving: Path) -> None:
    shown = run(serving, "--dry-run")
    assert shown.exit_code == 2
    assert f"net: would write {serving.parent}/into/net/model.toml: version_policy = [42]" in shown.stdout
    assert "plain: would link " in shown.stdout
    assert not os.path.lexists(serving.parent / "into")


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    shown = run(tmp_path / "none")
    assert (shown.exit_code, shown.stdout, shown.stderr.count("\n")) == (2, "", 1)
    assert "none" in shown.stderr


def test_where_to_has_to_be_said(serving: Path) -> None:
    shown = CliRunner().invoke(cli, ["models", "import-tfserving", str(serving)])
    assert shown.exit_code == 2
    assert "--into" in shown.stderr
