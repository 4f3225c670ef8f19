"""Scenarios as files: what is read, and that whatever is wrong is named by line and key."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.simulate.costs import BatchCost
from penstock.simulate.read import parse_scenario, read_scenario
from penstock.simulate.scenario import NEVER, Delays, Outage, ScenarioError, Sweep
from tests.simulate.scenarios import SMALL, parse

SCENARIOS = sorted((Path(__file__).resolve().parents[2] / "bench" / "scenarios").glob("*.toml"))


def complaint(text: str) -> str:
    """What is wrong with a scenario, without the file's name."""
    with pytest.raises(ScenarioError) as raised:
        parse(text)
    said = str(raised.value)
    assert said.startswith("some/scenario.toml: line "), said
    assert "\n" not in said
    return said.removeprefix("some/scenario.toml: line ")


def test_what_is_said_is_read_and_the_rest_has_defaults() -> None:
    read = parse(SMALL)
    assert (read.name, read.duration_s, read.seed, read.gateways, read.step_s) == ("scenario", 2.0, 3, 1, 0.0)
    assert read.models[0].cost == BatchCost(0.002, 0.0005)
    assert read.models[0].config.max_batch_size == 8
    assert [(group.name, group.count, group.models) for group in read.groups] == [("worker", 2, ("m",))]
    assert (read.traffic[0].models, read.traffic[0].deadline_s, read.traffic[0].end_s) == ((("m", 1.0),), 0.1, 2.0)
    assert read.delays.client_s == 0.0
    assert read.delays.hop_s == pytest.approx(Delays().hop_s)


@pytest.mark.parametrize(("size", "batchable"), [("1", True), ("0", False)])
def test_no_batches_at_all_are_none_of_one_row(size: str, batchable: bool) -> None:
    [plan] = parse(SMALL.replace("max_batch_size = 8", f"max_batch_size = {size}")).models
    assert plan.batchable is batchable


def test_the_other_forms() -> None:
    text = SMALL.replace("fixed_ms = 2.0\nper_row_ms = 0.5", 'batch_ms = { 8 = 4.0, 1 = 2.0 }\nmax_queue_delay = "3ms"')
    text = text.replace('name = "m"', 'name = "m"\ncopies = 3').replace(
        'model = "m"', 'model = "m-*"\nskew = 1\nrows = [1, 4]'
    )
    text += '[[workers]]\nname = "old"\nspeed = 0.5\nmodels = ["m-0"]\n'
    text += 'outages = [{ dies = "1s", returns = "1500ms", silent = true }, { dies = "1.9s" }]\n'
    text += '[delays]\nhop = "1ms"\n[broker]\nqueue_requests_max = 5\n[sweep]\nload = [0.5, 2]\n'
    read = parse(text)
    assert [plan.name for plan in read.models] == ["m-0", "m-1", "m-2"]
    assert read.models[2].cost.table == ((1, 0.002), (8, 0.004))
    assert read.models[1].config.max_queue_delay_s == 0.003
    assert [share for _, share in read.traffic[0].models] == pytest.approx([6 / 11, 3 / 11, 2 / 11])
    assert read.groups[1].outages == (Outage(1.0, 1.5, True), Outage(1.9, NEVER))
    assert (read.options.queue_requests_max, read.delays.hop_s) == (5, 0.001)
    assert read.sweep == Sweep("load", (0.5, 2.0))
    assert [(label, case.load) for label, case in read.cases()] == [("load 0.5", 0.5), ("load 2", 2.0)]


def test_sweeps_over_traffic_and_workers() -> None:
    flood = SMALL + '[[traffic]]\nname = "flood"\nmodel = "m"\nrate = 9000\n'
    cases = parse(flood + '[sweep]\nwithout = ["", "flood"]\n').cases()
    assert [(label, len(case.traffic)) for label, case in cases] == [("all traffic", 2), ("without flood", 1)]
    cases = parse(SMALL + "[sweep]\nworkers = [1, 4]\n").cases()
    assert [(label, case.workers) for label, case in cases] == [("1 worker", 1), ("4 workers", 4)]


@pytest.mark.parametrize("path", SCENARIOS, ids=lambda path: path.stem)
def test_the_scenarios_of_the_repository_can_be_read(path: Path) -> None:
    assert read_scenario(path).workers > 0


def test_there_are_the_scenarios_that_the_documentation_names() -> None:
    names = {"overload", "noisy-tenant", "slow-worker", "worker-dies-in-a-burst", "diurnal"}
    assert names <= {path.stem for path in SCENARIOS}


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ('duration = "2s"', "", "1: Object missing required field `duration`"),
        ('duration = "2s"', 'duration = "2 days"', "1: key 'duration': '2 days' is no duration"),
        ('duration = "2s"', 'duration = "0s"', "1: key 'duration': '0s' is not between 0.001 and 86400 seconds"),
        ('duration = "2s"', "duration = 2", "1: key 'duration': Expected `str`, got `int`"),
        ("seed = 3", "sede = 3", "2: key 'sede': unknown key; did you mean 'seed'?"),
        ("seed = 3", "seed = -1", "2: key 'seed': Expected `int` >= 0"),
        ("seed = 3", "seed = 1_", "2: "),
        ("seed = 3", 'warmup = "2s"', "2: key 'warmup': it is less than the duration, which is 2s"),
        ("seed = 3", 'step = "2s"', "2: key 'step': '2s' is not between 0 and 1 seconds"),
        ('name = "m"', 'name = ""', "5: key 'models[0].name': Expected `str` of length >= 1"),
        (
            "max_batch_size = 8",
            "max_batch_siz = 8",
            "6: key 'models[0].max_batch_siz': unknown key; did you mean 'max_batch_size'?",
        ),
        ("max_batch_size = 8", "max_batch_size = -1", "6: key 'models[0].max_batch_size': Expected `int` >= 0"),
        (
            "max_batch_size = 8",
            'jitter_lasts = "5ms"',
            "6: key 'models[0].jitter_lasts': it has no effect without jitter",
        ),
        ("max_batch_size = 8", 'max_queue_delay = "2"', "6: key 'models[0].max_queue_delay': '2' is not a duration"),
        (
            "max_batch_size = 8",
            'batchable = false\nlatency_target = "50ms"',
            "7: key 'models[0].latency_target': it has no effect where batchable = false",
        ),
        ("max_batch_size = 8", "jitter = -0.1", "6: key 'models[0].jitter': Expected `float` >= 0.0"),
        (
            "max_batch_size = 8",
            'jitter_shape = "normal"\njitter = 0.5',
            "7: key 'models[0].jitter': of a normal distribution",
        ),
        ("max_batch_size = 8", 'jitter_shape = "flat"', "6: key 'models[0].jitter_shape': Invalid enum value 'flat'"),
        ("fixed_ms = 2.0\nper_row_ms = 0.5", "", "4: key 'models[0]': a model says what its batches take"),
        ("fixed_ms = 2.0", "fixed_ms = -2.0", "7: key 'models[0].fixed_ms': Expected `float` >= 0.0"),
        ("fixed_ms = 2.0", "fixed_ms = nan", "7: key 'models[0].fixed_ms'"),
        ("fixed_ms = 2.0", "batch_ms = { 8 = 4.0 }", "7: key 'models[0].batch_ms': with it there are no fixed_ms"),
        (
            "fixed_ms = 2.0\nper_row_ms = 0.5",
            "batch_ms = { 4 = 4.0 }",
            "7: key 'models[0].batch_ms': it says nothing of batches of 8 rows",
        ),
        (
            "fixed_ms = 2.0\nper_row_ms = 0.5",
            "batch_ms = {\n8 = 4.0, x = 1.0 }".replace("\n", " "),
            "7: key 'models[0].batch_ms.x': 'x' is no number of rows",
        ),
        ("count = 2", "count = 0", "11: key 'workers[0].count': Expected `int` >= 1"),
        (
            "count = 2",
            "count = 5000",
            "11: key 'workers[0].count': 5000 workers are more than workers_max, which is 4096",
        ),
        ("count = 2", "speed = 0", "11: key 'workers[0].speed': Expected `float` > 0.0"),
        ("count = 2", "parallel = 2", "11: key 'workers[0].parallel': no more than 1 batches run at once"),
        ("count = 2", 'models = ["n"]', "11: key 'workers[0].models[0]': no model is called 'n'; there are m"),
        (
            "count = 2",
            'outages = [{ dies = "2s", returns = "1s" }]',
            "11: key 'workers[0].outages[0].returns': it is after 2s",
        ),
        (
            "count = 2",
            'outages = [{ dies = "2s" }, { dies = "3s" }]',
            "11: key 'workers[0].outages[1].dies': it is after",
        ),
        (
            "count = 2",
            'outages = [{ die = "2s" }]',
            "11: key 'workers[0].outages[0].die': unknown key; did you mean 'dies'?",
        ),
        ('model = "m"', 'model = "mm"', "14: key 'traffic[0].model': no model is called 'mm'; did you mean 'm'?"),
        ('model = "m"', "", "13: key 'traffic[0]': traffic with arrivals 'poisson' says 'model'"),
        (
            'model = "m"',
            'model = "m"\nrows = 9',
            "15: key 'traffic[0].rows': model 'm' takes at most 8 rows in a batch",
        ),
        ('model = "m"', 'model = "m"\npriority = 6', "15: key 'traffic[0].priority': Expected `int` <= 5"),
        ('model = "m"', 'model = "m"\nhangups = 1.5', "15: key 'traffic[0].hangups': Expected `float` <= 1.0"),
        (
            'model = "m"',
            'model = "m"\nusers = 3',
            "15: key 'traffic[0].users': arrivals are 'poisson' here; it goes with users",
        ),
        ('model = "m"', 'model = "m"\nend = "3s"', "15: key 'traffic[0].end': traffic lies within the duration"),
        ('model = "m"', 'model = "m"\nbegin = "2s"', "15: key 'traffic[0].begin': traffic lies within the duration"),
        ("rate = 400", "rate = -400", "15: key 'traffic[0].rate': Expected `float` > 0.0"),
        (
            "rate = 400",
            'rate = 1\narrivals = "bursts"',
            "13: key 'traffic[0]': traffic with arrivals 'bursts' says 'burst_rate'",
        ),
        (
            "rate = 400",
            'arrivals = "trace"\nfile = "x"',
            "14: key 'traffic[0].model': arrivals are 'trace' here; each request of a trace has its own",
        ),
        ('deadline = "100ms"', 'deadline = "-1s"', "16: key 'traffic[0].deadline': '-1s' is no duration"),
        ('deadline = "100ms"', "[sweep]\nlod = [1]", "17: key 'sweep.lod': unknown key; did you mean 'load'?"),
        ('deadline = "100ms"', "[sweep]", "16: key 'sweep': a sweep is over one of load, without and workers"),
        ('deadline = "100ms"', '[sweep]\nwithout = ["x"]', "17: key 'sweep.without[0]': no traffic is called 'x'"),
        (
            'deadline = "100ms"',
            "[broker]\nqueue_requests_mx = 3",
            "17: key 'broker.queue_requests_mx': unknown key; did you mean 'queue_requests_max'?",
        ),
        (
            'deadline = "100ms"',
            "[broker]\nqueue_requests_max = -3",
            "17: key 'broker.queue_requests_max': it is 0 or more, not -3",
        ),
        (
            'deadline = "100ms"',
            "[broker.tenant_weights]\na = 0",
            "17: key 'broker.tenant_weights.a': a tenant has 1 to",
        ),
        ('deadline = "100ms"', '[delays]\nhop = "1h"', "17: key 'delays.hop': '1h' is not between 0 and 10 seconds"),
        (
            'deadline = "100ms"',
            '[[models]]\nname = "m"\nfixed_ms = 1',
            "16: key 'models[1]': a second model 'm, 1'",
        ),
    ],
)
def test_what_is_wrong_is_named_by_line_and_key(before: str, after: str, said: str) -> None:
    assert before in SMALL
    text = complaint(SMALL.replace(before, after))
    assert text.startswith(said), text


def test_sections_that_are_missing_or_of_another_kind() -> None:
    assert complaint('duration = "1s"\n') == "1: a scenario has [[models]]"
    assert complaint('duration = "1s"\nmodels = 3\n').startswith("2: key 'models': it is an array of tables")
    assert complaint(SMALL + "[[sweep]]\nload = [1]\n").startswith("17: key 'sweep': it is a table, [sweep]")


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ScenarioError, match="cannot be read"):
        read_scenario(tmp_path / "none.toml")
    (tmp_path / "bytes.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(ScenarioError, match="cannot be read"):
        read_scenario(tmp_path / "bytes.toml")
    (tmp_path / "large.toml").write_bytes(b"# " + b"x" * (1 << 20))
    with pytest.raises(ScenarioError, match="too many for a scenario"):
        read_scenario(tmp_path / "large.toml")


@given(st.integers(0, len(SMALL)), st.integers(0, 20), st.text(max_size=10) | st.sampled_from(["= -1", "[[x]]", "nan"]))
def test_a_scenario_is_read_or_refused_with_a_sentence(at: int, cut: int, put: str) -> None:
    text = SMALL[:at] + put + SMALL[at + cut :]
    said = "x.toml: "
    try:
        parse_scenario(text, Path("x.toml"))
    except ScenarioError as error:
        said = str(error)
    assert said.startswith("x.toml: ")
