"""``penstock tune`` with real servers: what it finds, what it writes, and what it leaves alone."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner, Result
from onnx import TensorProto, helper, numpy_helper

from penstock.bin.cli import cli
from penstock.bin.search import Point, Setting
from penstock.bin.tune import changes, describe, duration, finish, lay_out, picks_batches, render, setting_of
from penstock.worker.config import ModelConfig
from penstock.worker.probe import load_and_probe
from penstock.worker.repository import find_models
from tests.system.models import dense, identity, make_model, slow, write

CONFIG = "# Ours, as measured in May.\nmax_batch_size = 1  # one at a time\nintra_op_spinning = false\n"
START = Setting(32, 0, 1, 1)


def tune(*arguments: str) -> Result:
    return CliRunner().invoke(cli, ["tune", "--budget", "5s", "--each", "0.2s", *arguments])


@pytest.mark.timeout(240)
def test_batches_are_found_for_a_model_that_gains_by_them_and_written(tmp_path: Path) -> None:
    """Its batches take the same time however many rows they have: so those of one row are the worst there are."""
    write(tmp_path, "slow", slow(20), config=CONFIG)
    for budget in (
        "9s",
        "20s",
        "90s",
    ):  # the second setting is begun after 5 s, and much later where others want the cores
        result = tune(str(tmp_path / "slow"), "--latency", "2s", "--budget", budget)
        assert result.exit_code == 0, result.output
        assert re.search(r"\d+ settings? tried", result.output), result.output
        if "written into" in result.stdout:
            break
    written = (tmp_path / "slow" / "model.toml").read_text()
    match = re.fullmatch(
        r"# Ours, as measured in May\.\nmax_batch_size = (\d+)  # one at a time\nintra_op_spinning = false\n"
        r"((max_queue_delay|instances|intra_op_threads) = .*\n)*",
        written,
    )
    assert match is not None, written
    assert int(match[1]) >= 2
    assert f"written into {tmp_path}/slow/model.toml:\n  max_batch_size = {match[1]}\n" in result.stdout
    assert "batches of 1, delay 0ms, 1 instance, 1 thread: " in result.stderr
    assert find_models(tmp_path)[0].problem == ""
    assert sorted(path.name for path in (tmp_path / "slow").iterdir()) == ["1", "model.toml"]


def test_a_dry_run_and_a_file_write_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("penstock.bin.search._GAIN", 1000.0)  # two loads of
    monkeypatch.setattr("penstock.bin.tune._LEAST_LEFT", 1000)  # one setting: there is no time for another
    path = write(tmp_path, "dense", dense())
    result = tune(str(tmp_path / "dense"), "--latency", "5s", "--dry-run")
    assert result.exit_code == 0, result.output
    assert "the budget is used up" in result.stdout
    assert re.search(r"^best: batches of \d+, .* requests/s with p99 ", result.stdout, re.MULTILINE)
    assert sorted(path.name for path in (tmp_path / "dense").iterdir()) == ["1"]
    named = shutil.copy(path, tmp_path / "named.onnx")
    result = tune(str(named), "--latency", "5s")
    assert result.exit_code == 0, result.output
    assert "written into" not in result.stdout


def test_without_a_setting_that_keeps_the_limit_nothing_changes(tmp_path: Path) -> None:
    write(tmp_path, "slow", slow(20), config=CONFIG)
    result = tune(str(tmp_path / "slow"), "--latency", "100us")
    assert result.exit_code == 1
    assert re.search(
        r"penstock: no setting keeps 0.10 ms: the least p99 was [\d.]+ ms; .*/model.toml stays as it is", result.stderr
    )
    assert "over 0.10 ms" in result.stdout
    assert (tmp_path / "slow" / "model.toml").read_text() == CONFIG


def test_a_model_that_needs_a_shape_says_so(tmp_path: Path) -> None:
    write(tmp_path, "wide", identity(TensorProto.FLOAT, ["N", "M"]))
    result = tune(str(tmp_path / "wide"), "--latency", "1s")
    assert result.exit_code == 1
    assert "input 'x' of 'wide' has dimensions of any size; say which: --input x=1xN" in result.stderr


def test_a_server_that_does_not_start_says_why(tmp_path: Path) -> None:
    (tmp_path / "broken" / "1").mkdir(parents=True)
    (tmp_path / "broken" / "1" / "model.onnx").write_bytes(b"not a model")
    result = tune(str(tmp_path / "broken"), "--latency", "1s")
    assert result.exit_code == 1
    assert result.stderr.startswith("penstock: the server does not start: ")


@pytest.mark.parametrize(
    ("make", "code", "sentence"),
    [
        (lambda path: write(path, "m", dense(), config="instances = 0\n"), 2, "model.toml:1: key 'instances'"),
        (lambda path: (path / "m").mkdir(), 2, "is no directory of one model; give repository/NAME"),
        (lambda path: (path / "m" / "1").mkdir(parents=True), 2, "model.onnx does not exist"),
    ],
)
def test_what_is_no_model_is_a_sentence(tmp_path: Path, make: object, code: int, sentence: str) -> None:
    make(tmp_path)  # type: ignore[operator]
    result = tune(str(tmp_path / "m"), "--latency", "1s")
    assert (result.exit_code, result.stdout) == (code, "")
    assert sentence in result.stderr


def test_settings_are_those_of_model_toml_and_back() -> None:
    assert setting_of(ModelConfig()) == START
    config = ModelConfig(max_batch_size=8, max_queue_delay="2.5ms", instances=3, intra_op_threads=2)
    assert setting_of(config) == Setting(8, 2500, 3, 2)
    assert changes(Setting(8, 2500, 1, 2), START) == {
        "max_batch_size": 8,
        "max_queue_delay": "2500us",
        "intra_op_threads": 2,
    }
    assert changes(START, START) == {}
    assert [duration(each) for each in (0, 500, 2000)] == ["0ms", "500us", "2ms"]
    assert describe(START, batchable=False) == "1 instance, 1 thread"


def test_batches_that_the_worker_or_the_engine_sizes_are_not_tuned() -> None:
    assert not picks_batches(ModelConfig(max_batch_size=8, max_queue_delay="2ms"))
    assert picks_batches(ModelConfig(latency_target="50ms"))
    assert picks_batches(ModelConfig(preferred_batch_sizes=(8, 16)))
    assert setting_of(ModelConfig(preferred_batch_sizes=(8, 16))).max_batch_size == 16


def test_the_frontier_is_a_table_and_bars() -> None:
    tried = {
        START: [Point(1, 100, 0.001), Point(4, 300, 0.004), Point(16, 250, 0.05)],
        START._replace(instances=2): [Point(4, 400, 0.2), Point(16, 900, 0.001, failed=True)],
    }
    assert render(tried, 0.05, True) == [
        "2 settings tried; what none of them beats in both throughput and p99:",
        "  batch  delay  instances  threads  connections  requests/s  p99 ms",
        "     32    0ms          1        1            1         100    1.00",
        "     32    0ms          1        1            4         300    4.00",
        "     32    0ms          2        1            4         400     200  over 50.0 ms",
        "  requests/s by p99:",
        "    1.00 ms ██████████",
        "    4.00 ms ██████████████████████████████",
        "     200 ms ░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░",
    ]
    assert render({}, 0.05, False)[0].startswith("0 settings tried")
    assert all(line.isascii() for line in render(tried, 0.05, False))


def test_what_is_written_elsewhere_is_made_from_the_models_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "own.toml").write_text(CONFIG)
    best = (START._replace(max_batch_size=16), Point(8, 1000.0, 0.02, busy=True))
    finish(best, START._replace(max_batch_size=1), "enough", tmp_path / "own.toml", tmp_path / "other.toml", False)
    assert (tmp_path / "other.toml").read_text() == CONFIG.replace("= 1 ", "= 16 ")
    assert (tmp_path / "own.toml").read_text() == CONFIG
    finish(best, START, "enough", None, tmp_path / "new.toml", False)
    assert (tmp_path / "new.toml").read_text() == "max_batch_size = 16\n"
    new = tmp_path / "beside.toml"
    finish(best, START._replace(max_batch_size=8), "enough", new, new, False, "max_batch_size = 8\nfp16 = true\n")
    assert new.read_text() == "max_batch_size = 16\nfp16 = true\n"
    said = capsys.readouterr().out
    assert said.startswith(
        "best: batches of 16, delay 0ms, 1 instance, 1 thread: 1,000 requests/s with p99 20.0 ms (enough)\n"
        "the generator used most of a core there"
    )
    with pytest.raises(SystemExit):
        finish(best, START, "enough", None, tmp_path / "nowhere" / "new.toml", False)
    assert "penstock: cannot write " in capsys.readouterr().err
    finish((START, best[1]), START, "enough", None, tmp_path / "unwritten.toml", False)
    assert not (tmp_path / "unwritten.toml").exists()


@pytest.mark.parametrize("as_file", [True, False])
def test_a_model_is_laid_out_with_links_also_to_weights_beside_it(tmp_path: Path, as_file: bool) -> None:
    model = make_model(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        [("x", TensorProto.FLOAT, ["N", 64])],
        [("y", TensorProto.FLOAT, ["N", 64])],
        [numpy_helper.from_array(np.eye(64, dtype=np.float32), "w")],
    )
    place = tmp_path / "repository" / "m" / "3"
    place.mkdir(parents=True)
    name = "m.onnx" if as_file else "model.onnx"
    onnx.save(model, place / name, save_as_external_data=True, location="weights.bin", size_threshold=0)
    [file] = find_models(place / name) if as_file else find_models(tmp_path / "repository")
    lay_out(file, tmp_path / "laid", "max_batch_size = 7\n")
    [found] = find_models(tmp_path / "laid")
    assert (found.name, found.version, found.config.max_batch_size) == ("m", file.version, 7)
    row = np.arange(64, dtype=np.float32)[np.newaxis]
    np.testing.assert_array_equal(load_and_probe(found, warm=False).run([row])[0], row)
