"""Figures from what was measured, and what is said of them."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest

from penstock.load.job import EXPIRED, LATE, OK, UNSENT, HttpTarget, Job, Tally
from penstock.load.measure import Account, Figures, Look, figure, remarks, series
from penstock.load.prometheus import Reading
from penstock.load.server import HttpServer
from tests.load.servers import plain_server

MS = 1_000_000
NOTHING = Reading({}, None, None)
JOB = Job(
    target=HttpTarget("h", 1, b""),
    connections=4,
    rate=100.0,
    outstanding_max=64,
    warmup_s=1.0,
    duration_s=10.0,
    timeout_s=1.0,
    deadline_s=0.05,
    seed=0,
)


def tally() -> Tally:
    made = Tally(outcomes={OK: 750, LATE: 250, "HTTP 503": 3, EXPIRED: 1}, own_cpu_s=[1.0, 2.0], outstanding=9)
    for number in range(1000):
        made.slices[number % 50].taken.record((number + 1) * MS)
        made.slices[number % 50].answered += 1
    return made


UNKNOWN = Look({}, "no", NOTHING)


def made(before: Look = UNKNOWN, after: Look = UNKNOWN) -> Figures:
    return figure(JOB, tally(), before, after)


def test_figures_are_of_the_measured_time() -> None:
    figures = made()
    assert (figures.requests_per_s, figures.in_time_per_s) == (100.0, 75.0)
    assert figures.quantiles == pytest.approx([0.5, 0.9, 0.99, 0.999], rel=0.005)
    assert figures.max_s == 1.0
    assert figures.errors == {"HTTP 503": 3, EXPIRED: 1}
    assert figures.generator == 0.2
    assert (figures.cpu_s, figures.unknown) == (None, "no")


def test_processor_time_is_of_all_processes_also_of_those_that_came_meanwhile() -> None:
    before = Look({1: 10.0, 2: 5.0}, "", Reading({}, 100, 10))
    after = Look({1: 10.5, 3: 0.25}, "", Reading({}, 180, 30))
    figures = made(before, after)
    assert figures.cpu_s == pytest.approx(0.75 / 1000)
    assert figures.mean_batch == 4.0


def test_slices_are_shown_where_something_came() -> None:
    figures = made()
    parts = series(figures)
    assert len(parts) == 50
    assert parts[0][0] == 0.1
    assert parts[0][3] == 100.0
    assert series(replace(figures, tally=Tally())) == []


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"generator": 0.81}, "the generator used 81% of a core"),
        ({"errors": {UNSENT: 7}}, "64 requests were outstanding, and 7 that were to start"),
        ({"behind_s": 0.2}, "1 of 100 requests was sent 200.0 ms or more after it was to be"),
        ({"late": 250}, "250 answers came after the deadline; 75 a second before it"),
        ({"texts": {"HTTP 503": "full"}}, "HTTP 503: full"),
    ],
)
def test_what_must_be_known_is_said(change: dict[str, object], sentence: str) -> None:
    quiet = replace(made(), late=0)
    assert remarks(quiet) == []
    [said] = remarks(replace(quiet, **change))  # type: ignore[arg-type]
    assert said.startswith(sentence)


def test_an_account_of_a_process_that_is_named() -> None:
    parent = os.getppid()
    look = Account("m", [parent]).look()
    assert parent in look.cpu_s
    assert os.getpid() not in look.cpu_s


def told(count: int) -> str:
    """The metrics of a server that has so many processes."""
    return "".join(f'penstock_process_cpu_seconds_total{{process="{each}"}} 2.5\n' for each in range(count))


def test_what_a_server_tells_counts_where_not_all_of_its_processes_are_found() -> None:
    """As when an init system has started each, or some run elsewhere."""
    with plain_server(metrics=told(10_000)) as server:
        asked, metrics = HttpServer(server.url, 5), HttpServer(f"{server.url}/metrics", 5)
        asked.speaks_binary()
        look = Account("m", server=asked, metrics=metrics).look()
    assert len(look.cpu_s) == 10_000
    assert set(look.cpu_s.values()) == {2.5}


def test_processes_that_are_found_count_where_they_are_all() -> None:
    with plain_server(metrics=told(1)) as server:
        asked, metrics = HttpServer(server.url, 5), HttpServer(f"{server.url}/metrics", 5)
        asked.speaks_binary()
        look = Account("m", server=asked, metrics=metrics).look()
    assert os.getpid() in look.cpu_s
    assert len(look.metrics.cpu_s) == 1


def test_an_account_of_nobody_says_so() -> None:
    look = Account("m").look()
    assert (look.cpu_s, look.metrics) == ({}, NOTHING)
    assert "name one of them with --pid" in look.unknown
