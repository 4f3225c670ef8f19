"""``penstock models rollback`` and ``traffic``, of a repository that no server serves."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from penstock.bin.asking import Outcome
from penstock.bin.cli import cli
from penstock.bin.modelroute import followed
from penstock.wire.models import LOADING, READY, UNAVAILABLE, ModelSpec, ModelState, Route

SPEC = ModelSpec("net", "2", "onnxruntime_onnx", (), (), True, 32)


@pytest.fixture
def models(tmp_path: Path) -> Path:
    for version in ("1", "2", "3"):
        (tmp_path / "models" / "net" / version).mkdir(parents=True)
    return tmp_path / "models"


class Command:
    """Of a repository alone: nothing is waited for."""

    def __init__(self, models: Path, nowhere: Path) -> None:
        self.toml = models / "net" / "model.toml"
        self._rest = [f"--models={models}", f"--runtime-dir={nowhere}", "--timeout=0.05", "--no-wait"]

    def __call__(self, *arguments: str) -> Result:
        return CliRunner().invoke(cli, ["models", *arguments, *self._rest])

    def text(self) -> str:
        return self.toml.read_text() if self.toml.exists() else ""


@pytest.fixture
def command(models: Path, nowhere: Path) -> Command:
    return Command(models, nowhere)


# --- rollback ---


def test_back_and_back_and_forward(command: Command) -> None:
    shown = command("rollback", "net")
    assert (shown.exit_code, shown.stderr) == (0, "")
    assert shown.stdout.splitlines() == [
        f'version_policy = [2] in {command.toml}; it was "latest"',
        "to go forward again: penstock models rollback net --undo",
    ]
    assert command.text() == '# before the rollback: version_policy = "latest"\nversion_policy = [2]\n'
    assert command("rollback", "net").stdout.startswith("version_policy = [1] in ")
    shown = command("rollback", "net")
    assert (shown.exit_code, shown.stdout) == (2, "")
    assert shown.stderr == "penstock: model 'net' has no version before 1, which is current; push one\n"
    shown = command("rollback", "net", "--undo")
    assert shown.stdout == f'{command.toml} asks for 3 again: "latest"\n'
    assert command.text() == ""
    shown = command("rollback", "net", "--undo")
    assert (shown.exit_code, shown.stderr) == (2, f"penstock: {command.toml} has no rollback to be undone\n")


def test_back_to_a_version_that_is_named(command: Command) -> None:
    assert command("rollback", "net", "--to=1").exit_code == 0
    assert "version_policy = [1]\n" in command.text()
    shown = command("rollback", "net", "--to=7")
    assert (shown.exit_code, shown.stderr) == (2, "penstock: model 'net' has no version 7; it has 3, 2, 1\n")
    assert command("rollback", "net", "--to=7", "--undo").exit_code == 2


def test_labels_and_traffic_are_said_and_stay(command: Command) -> None:
    text = "labels = {stable = 3}\ntraffic = {stable = 90, 2 = 10}\n"
    command.toml.write_text(text)
    shown = command("rollback", "net")
    assert "traffic goes on as it does: stable 90 %, 2 10 %; see penstock models traffic\n" in shown.stdout
    assert "labels stay as they are: stable 3\n" in shown.stdout
    assert text in command.text()


def test_tritons_configuration_is_changed_by_hand(command: Command, models: Path) -> None:
    (models / "net" / "config.pbtxt").write_text('backend: "onnxruntime"\n')
    shown = command("rollback", "net")
    assert shown.exit_code == 2
    assert "changed by hand: write version_policy { specific { versions: [2] } }" in shown.stderr
    shown = command("traffic", "net", "3=100")
    assert (shown.exit_code, "config.pbtxt is the configuration" in shown.stderr) == (2, True)
    assert not command.toml.exists()


def test_a_model_that_is_not_there_is_a_sentence(command: Command) -> None:
    for arguments in (["rollback", "nope"], ["rollback", "nope", "--undo"], ["traffic", "nope", "1=100"]):
        shown = command(*arguments)
        assert (shown.exit_code, shown.stdout) == (2, "")
        assert shown.stderr.startswith("penstock: there is no model 'nope' in ")


# --- traffic ---


def test_traffic_and_labels_are_set_together_and_changed_apart(command: Command) -> None:
    shown = command("traffic", "net", "stable=95", "canary=5%", "--label=stable=2", "--label=canary=3")
    assert (shown.exit_code, shown.stderr) == (0, "")
    assert shown.stdout == f"{command.toml}: traffic stable 95 %, canary 5 %, labels stable 2, canary 3\n"
    assert command.text() == "traffic = {stable = 95, canary = 5}\nlabels = {stable = 2, canary = 3}\n"
    command("traffic", "net", "stable=50", "canary=50")
    command("traffic", "net", "--label=stable=1")
    assert command.text() == "traffic = {stable = 50, canary = 50}\nlabels = {stable = 1, canary = 3}\n"
    assert command("traffic", "net", "--clear", "--label=stable=").exit_code == 0
    assert command.text() == "labels = {canary = 3}\n"


def test_versions_may_be_targets_and_comments_stay(command: Command) -> None:
    command.toml.write_text("# of mine\ntraffic = {3 = 100}  # all\nweight = 2.0\n")
    assert command("traffic", "net", "2=60", "3=40").exit_code == 0
    assert command.text() == "# of mine\ntraffic = {2 = 60, 3 = 40}  # all\nweight = 2.0\n"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["2=60"], "traffic': it adds up to 60; make it 100"),
        (["canary=100"], "it is neither a label of this file nor a version's number"),
        (["7=100"], "model 'net' has no version 7; it has 3, 2, 1"),
        (["--label=stable=7"], "model 'net' has no version 7"),
        (["3=100", "--label=3=3"], "a whole number looks like a version; call it 'v3'"),
        (["stable"], "'stable' is not of the form TARGET=PERCENT, such as stable=95"),
        (["stable="], "'stable=' is not of the form"),
        (["=5"], "'=5' is not of the form"),
        (["a=5", "a=95"], "'a' is there twice"),
        (["--label=stable"], "'stable' is not of the form NAME=N, such as stable=3"),
        (["3=100", "--clear"], "--clear takes the traffic out, and parts set it; give one of them"),
    ],
)
def test_what_cannot_be_set(command: Command, arguments: list[str], sentence: str) -> None:
    shown = command("traffic", "net", *arguments)
    assert (shown.exit_code, shown.stdout, command.text()) == (2, "", "")
    assert sentence in shown.stderr


def state(version: str, state: str = READY, reason: str = "") -> ModelState:
    return ModelState("net", version, state, reason, SPEC)


@pytest.mark.parametrize(
    ("given", "route", "outcome"),
    [
        ([state("2"), state("3")], None, None),
        ([state("2"), state("3")], Route("net", ("3",)), None),
        ([state("2")], Route("net", ("2",), (("a", "3"),), (("a", 5), ("2", 95))), None),
        ([state("2"), state("3", LOADING)], Route("net", ("2",), (("a", "3"),), (("a", 5), ("2", 95))), None),
        (
            [state("2"), state("3")],
            Route("net", ("2",), (("a", "3"),), (("2", 95), ("a", 5))),
            Outcome(True, "the server has followed"),
        ),
        (
            [state("2"), state("3", UNAVAILABLE, "it is broken")],
            Route("net", ("2",), (("a", "3"),), (("2", 95), ("a", 5))),
            Outcome(
                False,
                "version 3 is not served: it is broken; requests that would go there go to the current version",
            ),
        ),
    ],
)
def test_when_a_server_has_followed(given: list[ModelState], route: Route | None, outcome: Outcome | None) -> None:
    wanted = Route("net", (), (("a", "3"),), (("2", 95), ("a", 5)))
    assert followed({each.version: each for each in given}, route, wanted) == outcome
