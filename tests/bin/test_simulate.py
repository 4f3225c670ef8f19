"""``penstock simulate``: what it prints and writes, and what it says of what it cannot follow."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from penstock.bin.cli import cli
from penstock.bin.simulate import lines_of
from penstock.bin.simulatereport import charts
from penstock.simulate.run import run
from tests.simulate.scenarios import SMALL, scenario, traffic


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "small.toml"
    path.write_text(SMALL)
    return path


def simulate(*arguments: str | Path) -> Result:
    return CliRunner().invoke(cli, ["simulate", *map(str, arguments)])


def test_a_table_and_the_same_again(path: Path) -> None:
    result = simulate(path)
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[0] == "small: 2 workers, 1 models, 2 s, seed 3"
    heads = "run requests/s answered/s good/s good refused expired p50 ms p99 ms p99.9 ms rows busy fairness"
    assert lines[1].split() == heads.split()
    assert "100.0 %" in lines[2]
    assert "  m: " in result.stdout
    assert "worker-0" in result.stdout
    assert simulate(path).stdout == result.stdout
    assert simulate(path, "--seed", "4").stdout != result.stdout


def test_a_sweep_has_a_row_for_each_run_and_figures_for_machines(path: Path, tmp_path: Path) -> None:
    path.write_text(SMALL + "[sweep]\nload = [0.5, 20]\n")
    to = tmp_path / "figures.json"
    result = simulate(path, "--json", to)
    assert result.exit_code == 0, result.output
    assert [line.split()[:2] for line in result.stdout.splitlines()[2:4]] == [["load", "0.5"], ["load", "20"]]
    written = json.loads(to.read_text())
    assert [each["label"] for each in written["runs"]] == ["load 0.5", "load 20"]
    calm, flooded = (each["all"] for each in written["runs"])
    assert calm["good_share"] == 1.0 > flooded["good_share"]
    assert calm["latency_s"].keys() == {"0.5", "0.99", "0.999", "max"}


def test_plots_as_a_page_and_as_pictures(path: Path, tmp_path: Path) -> None:
    path.write_text(SMALL + "[sweep]\nload = [0.5, 2]\n")
    page, picture = tmp_path / "report.html", tmp_path / "report.png"
    assert simulate(path, "--report", page).exit_code == 0
    text = page.read_text()
    assert text.count("<svg") == 6
    assert "Batch sizes" in text
    assert "http" not in text.replace("http://www.w3.org/2000/svg", "")
    result = simulate(path, "--report", picture)
    assert result.exit_code == 0, result.output
    assert sorted(each.name for each in tmp_path.glob("*.png")) == [
        "report-batches.png", "report-goodput-time.png", "report-goodput.png", "report-time.png",
        "report-utilisation.png", "report.png",
    ]  # fmt: skip
    assert simulate(path, "--report", tmp_path / "report.pdf").exit_code == 2


def test_tenants_have_rows_and_a_chart() -> None:
    made = scenario(traffic=(traffic(tenant="a"), traffic(tenant="b", name="b")))
    figures = run(made, "both")
    text = "\n".join(lines_of(made, [figures]))
    assert re.search(r"^  all +a ", text, re.MULTILINE)
    assert [chart.name for chart in charts([figures])][-1] == "tenants"


def test_how_many_workers_it_takes(path: Path, tmp_path: Path) -> None:
    path.write_text(SMALL.replace("rate = 400", "rate = 4000"))
    to = tmp_path / "plan.json"
    result = simulate(path, "--plan", "--target", "p99=50ms", "--goodput", "0.99", "--json", to)
    assert result.exit_code == 0, result.output
    found = json.loads(to.read_text())["workers"]
    assert 2 <= found <= 5
    said = f"{found} workers: with so many, and not with {found - 1}, p99 within 50 ms and 99 % of requests"
    assert said in result.stdout
    assert f"\n{found} workers:\n" in result.stdout  # its figures
    assert f"\n{found - 1} worker{'s' if found > 2 else ''}:\n" in result.stdout


def test_a_plan_that_cannot_be_kept(path: Path) -> None:
    result = simulate(path, "--plan", "--target", "p99=1ms", "--most", "4")
    assert result.exit_code == 1
    assert "no: 4 workers and fewer do not keep p99 within 1 ms" in result.stdout


def test_a_plan_varies_the_group_that_is_named(path: Path) -> None:
    path.write_text(SMALL + '[[workers]]\nname = "old"\nspeed = 0.5\n')
    assert "say which to vary with --group: ['worker', 'old']" in simulate(path, "--plan").output
    assert "no [[workers]] are called 'new'" in simulate(path, "--plan", "--group", "new").output
    assert simulate(path, "--plan", "--group", "old").exit_code == 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--target", "p99=5ms"], "--target, --goodput and --group go with --plan"),
        (["--plan", "--target", "99"], "'99' is no target; write a percentile and a time, such as p99=50ms"),
        (["--plan", "--goodput", "1.5"], "1.5 is not in the range 0<x<=1"),
        (["--seed", "-1"], "-1 is not in the range x>=0"),
    ],
)
def test_what_options_cannot_be(path: Path, arguments: list[str], said: str) -> None:
    result = simulate(path, *arguments)
    assert result.exit_code == 2
    assert said in result.output


def test_a_scenario_that_cannot_be_followed(path: Path) -> None:
    path.write_text(SMALL.replace("rate = 400", "rate = -400"))
    result = simulate(path)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr == f"penstock: {path}: line 15: key 'traffic[0].rate': Expected `float` > 0.0\n"


def test_a_recorded_trace_is_replayed_and_must_fit(path: Path) -> None:
    head = '{"penstock_trace":1,"began":1.0,"columns":["seconds","model","version","count","rows","bytes","tenant",'
    lines = [
        head + '"priority","timeout_us"]}',
        '[0.5,"m","1",3,2,600000,"t",1,50000]',
        '[0.6,"m","1",1,1,9,"",0,50000]',
    ]
    (path.parent / "trace.jsonl").write_text("\n".join(lines) + "\n")
    begin = SMALL[: SMALL.index("[[traffic]]")]
    path.write_text(begin + '[[traffic]]\narrivals = "trace"\nfile = "trace.jsonl"\n')
    result = simulate(path, "--validate")
    assert result.exit_code == 0, result.output
    assert "m (priority 1)" in result.stdout
    path.write_text(
        begin.replace('name = "m"', 'name = "other"') + '[[traffic]]\narrivals = "trace"\nfile = "trace.jsonl"\n'
    )
    result = simulate(path)
    assert result.exit_code == 2
    assert "the trace asks for model 'm'; add it to [[models]]" in result.stderr


def test_a_file_that_cannot_be_written(path: Path, tmp_path: Path) -> None:
    result = simulate(path, "--json", tmp_path / "none" / "x.json")
    assert result.exit_code == 1
    assert "cannot write" in result.stderr


@pytest.mark.parametrize("command", ["up", "broker"])
def test_a_trace_is_recorded_where_there_is_a_directory(tmp_path: Path, command: str) -> None:
    result = CliRunner().invoke(cli, [command, "--record", str(tmp_path / "none" / "trace")])
    assert result.exit_code == 2
    assert "there is no directory" in result.output
