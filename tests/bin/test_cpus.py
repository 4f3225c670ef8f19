"""Cores: how they are written, which belong together, and what each worker gets of them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from penstock.bin.cli import cli
from penstock.bin.cpus import format_cpus, parse_cpus, physical_cores, share_cpus, usable_cpus

# Logical processors, dealt out to physical cores of one, two or four.
Cores = Sequence[Sequence[int]]


@st.composite
def machines(draw: st.DrawFn) -> Cores:
    sizes = draw(st.lists(st.sampled_from([1, 2, 4]), min_size=1, max_size=24))
    cpus = draw(st.permutations(range(sum(sizes))))
    return [[cpus[sum(sizes[:at]) + each] for each in range(size)] for at, size in enumerate(sizes)]


# --- lists ---


@pytest.mark.parametrize(
    ("text", "cpus"),
    [("0", {0}), ("0-3,6", {0, 1, 2, 3, 6}), ("6, 0-1\n", {0, 1, 6}), ("2-2,2", {2}), ("65535", {65535})],
)
def test_a_list_is_read_as_the_kernel_writes_it(text: str, cpus: set[int]) -> None:
    assert parse_cpus(text) == cpus


@pytest.mark.parametrize("text", ["", ",", "0,", "a", "-1", "3-1", "0-", "1.5", "0x1", "0 1", "٣", "123456", "0-3/2"])
def test_what_is_no_list_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(repr(text))} is no list of cores"):
        parse_cpus(text)


@given(st.frozensets(st.integers(0, 5000), min_size=1))
def test_what_is_written_is_read_again(cpus: frozenset[int]) -> None:
    assert parse_cpus(format_cpus(cpus)) == cpus


def test_a_list_is_written_as_short_as_can_be() -> None:
    assert format_cpus([6, 3, 1, 0, 2]) == "0-3,6"


# --- shares ---


@given(machines(), st.integers(1, 100))
def test_shares_are_equal_disjoint_and_all_there_is(cores: Cores, count: int) -> None:
    cpus = {cpu for core in cores for cpu in core}
    if count > len(cpus):
        with pytest.raises(ValueError, match=f"^there are {len(cpus)} cores for {count} workers$"):
            share_cpus(cores, count)
        return
    shares = share_cpus(cores, count)
    assert len(shares) == count
    assert sum(map(len, shares)) == len(cpus)
    assert frozenset().union(*shares) == cpus
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@given(machines(), st.integers(1, 100))
def test_no_more_physical_cores_are_divided_than_sizes_demand(cores: Cores, count: int) -> None:
    cores = [core for core in cores if len(core) == 2] or [[0, 1]]
    shares = share_cpus(cores, min(count, 2 * len(cores)))
    divided = [core for core in cores if not any(share.issuperset(core) for share in shares)]
    assert len(divided) == sum(len(share) % 2 for share in shares) / 2


def test_neighbours_stay_together() -> None:
    assert share_cpus([[0, 4], [1, 5], [2, 6], [3, 7]], 2) == [{0, 4, 1, 5}, {2, 6, 3, 7}]
    assert share_cpus([[0], [1], [2]], 2) == [{0, 1}, {2}]


# --- physical cores ---


def test_siblings_are_read_where_the_kernel_tells(tmp_path: Path) -> None:
    for cpu, siblings in {0: "0,4\n", 4: "0,4\n", 1: "1-2\n", 2: "1-2\n", 3: "garbage"}.items():
        (tmp_path / f"cpu{cpu}" / "topology").mkdir(parents=True)
        (tmp_path / f"cpu{cpu}" / "topology" / "thread_siblings_list").write_text(siblings)
    assert physical_cores([0, 1, 2, 3, 4, 9], tmp_path) == [{0, 4}, {1, 2}, {3}, {9}]
    assert physical_cores([0, 2], tmp_path) == [{0}, {2}]


def test_this_machine_has_each_of_its_processors_once() -> None:
    cpus = sorted(cpu for core in physical_cores(usable_cpus()) for cpu in core)
    assert cpus == sorted(os.sched_getaffinity(0))


# --- commands ---


def refusal(*arguments: str) -> str:
    shown = CliRunner().invoke(cli, arguments, prog_name="penstock")
    assert (shown.exit_code, shown.stdout) == (2, "")
    return shown.stderr.partition("Error: ")[2].strip()


def test_a_worker_refuses_what_is_no_list() -> None:
    assert refusal("worker", "--cpus=some") == (
        "Invalid value for '--cpus': 'some' is no list of cores; write numbers and ranges, such as 0-3,6"
    )


def test_a_worker_refuses_cores_that_it_may_not_use() -> None:
    own = format_cpus(os.sched_getaffinity(0))
    assert refusal("worker", f"--cpus={own},60000-60001") == (
        f"Invalid value for '--cpus': this process may not run on 60000-60001; it has the cores {own}"
    )


def test_more_workers_than_cores_cannot_be_pinned(tmp_path: Path) -> None:
    program = "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))}); "
    program += "from penstock.bin.__main__ import main; main()"
    command = [sys.executable, "-c", program, "up", "--pin", "--workers=2", f"--runtime-dir={tmp_path / 'run'}"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr.partition("Error: ")[2] == (
        "--pin: there are 1 cores for 2 workers; start fewer with --workers, or leave --pin out\n"
    )
    assert not (tmp_path / "run").exists()
