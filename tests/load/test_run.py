"""Loads, made by the real generator against servers whose answers are known."""

from __future__ import annotations

import socket
import threading
import time
from contextlib import ExitStack

import pytest

from penstock.load.inputs import write_request
from penstock.load.job import EXPIRED, LATE, OK, UNSENT, HttpTarget, Job, Meter, Tally
from penstock.load.run import LoadError, divide, run_load
from tests.load.servers import deaf_server, plain_server

SECOND = 1_000_000_000


def make_job(
    port: int,
    connections: int = 2,
    rate: float = 0.0,
    outstanding: int = 8,
    duration_s: float = 0.5,
    timeout_s: float = 10.0,
    deadline_s: float = 0.0,
) -> Job:
    return Job(
        target=HttpTarget("127.0.0.1", port, write_request("h", "/v2/models/m/infer", b"{}", 0)),
        connections=connections,
        rate=rate,
        outstanding_max=outstanding,
        warmup_s=0.1,
        duration_s=duration_s,
        timeout_s=timeout_s,
        deadline_s=deadline_s,
        seed=0,
    )


def test_a_closed_loop_asks_again_on_each_of_its_connections() -> None:
    told: list[int] = []
    edges: list[float] = []
    with plain_server() as server:
        job = make_job(server.server_address[1], connections=3)
        tally = run_load([job], lambda elapsed_s, answers: told.append(answers), lambda: edges.append(time.monotonic()))
        sent = len(server.requests)
    assert set(tally.outcomes) == {OK}
    assert tally.taken().total == tally.outcomes[OK]
    assert 10 < tally.outcomes[OK] <= sent
    # What came in the measured time and what was sent in it differ by what was under way when it began and ended.
    assert abs(sum(each.answered for each in tally.slices) - tally.outcomes[OK]) <= 3
    assert told == sorted(told)
    assert told[-1] > 0
    assert edges[1] - edges[0] == pytest.approx(job.duration_s, abs=0.2)
    assert len(tally.own_cpu_s) == 1


def test_an_open_loop_sends_what_arrives_whether_or_not_it_is_answered() -> None:
    with plain_server() as server:
        tally = run_load([make_job(server.server_address[1], rate=200, outstanding=200, duration_s=1.0)])
    # Two hundred are expected, and 5 standard deviations more or less.
    assert 130 <= sum(tally.outcomes.values()) <= 270
    assert set(tally.outcomes) == {OK}
    assert tally.behind.total == tally.outcomes[OK]
    assert 1 <= tally.outstanding <= 200


def test_the_time_that_a_stall_keeps_requests_waiting_is_in_their_latency() -> None:
    """A server that stops once for half a second: in a closed loop that is one slow answer, in an open one all that
    arrive meanwhile are late."""
    gate = threading.Event()

    def stall(number: int) -> tuple[int, bytes]:
        if number == 60:
            threading.Timer(0.5, gate.set).start()
        if 60 <= number < 1000 and not gate.is_set():
            gate.wait()
        return 200, b"{}"

    with plain_server(stall) as server:
        tally = run_load([make_job(server.server_address[1], rate=200, outstanding=500, duration_s=1.5)])
    taken = tally.taken()
    assert tally.outcomes == {OK: taken.total}
    # Of some 300 arrivals a third came in the half second; the median of those waited for half of it.
    assert taken.largest >= 0.45 * SECOND
    assert taken.quantile(0.85) >= 0.1 * SECOND


def test_what_cannot_be_outstanding_is_not_sent_and_counted() -> None:
    with deaf_server() as port:
        tally = run_load([make_job(port, rate=500, outstanding=5, timeout_s=0.3)])
    assert tally.outstanding <= 5
    assert tally.outcomes[UNSENT] > tally.outcomes[EXPIRED] > 0
    assert set(tally.outcomes) == {UNSENT, EXPIRED}
    # Those that expired count with the time for which they were waited for.
    assert tally.taken().total == tally.outcomes[EXPIRED]
    assert tally.taken().least >= 0.3 * SECOND


def test_a_closed_loop_goes_on_after_requests_have_expired() -> None:
    with deaf_server() as port:
        tally = run_load([make_job(port, connections=2, timeout_s=0.05)])
    assert set(tally.outcomes) == {EXPIRED}
    assert tally.outcomes[EXPIRED] >= 6  # of at most 20


@pytest.mark.parametrize("rate", [0.0, 100.0])
def test_errors_are_counted_by_status_with_what_the_first_said(rate: float) -> None:
    def refuse(number: int) -> tuple[int, bytes]:
        return (200, b"{}") if number % 3 == 0 else (503, b'{"error": "full"}') if number % 3 == 1 else (400, b"bad")

    with plain_server(refuse) as server:
        tally = run_load([make_job(server.server_address[1], rate=rate)])
    assert set(tally.outcomes) == {OK, "HTTP 400", "HTTP 503"}
    assert tally.texts == {"HTTP 400": "bad", "HTTP 503": '{"error": "full"}'}
    assert tally.taken().total == tally.outcomes[OK]  # refusals are quick, and no answers


@pytest.mark.parametrize("rate", [0.0, 50.0])
def test_a_server_that_closes_is_connected_to_again(rate: float) -> None:
    answer = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\n{}"
    with deaf_server((answer,)) as port:
        tally = run_load([make_job(port, rate=rate)])
    assert tally.outcomes[OK] > 5
    assert set(tally.outcomes) <= {OK, "closed"}  # one may be sent on what was just being closed


def test_what_is_no_answer_is_said() -> None:
    with deaf_server((b"220 mail.example.org ESMTP\r\n\r\n",)) as port:
        tally = run_load([make_job(port)])
    assert set(tally.outcomes) == {"bad answer"}
    assert "is no status line of HTTP/1.1" in tally.texts["bad answer"]


def test_late_answers_are_answers_and_told_apart() -> None:
    with plain_server() as server:
        tally = run_load([make_job(server.server_address[1], deadline_s=1e-9)])
    assert set(tally.outcomes) == {LATE}
    assert tally.taken().total == tally.outcomes[LATE]


def test_several_generators_are_one_load() -> None:
    with plain_server() as server:
        jobs = divide(make_job(server.server_address[1], connections=5, rate=200, outstanding=9, duration_s=1.0), 2)
        tally = run_load(jobs)
    assert [(job.connections, job.rate, job.outstanding_max) for job in jobs] == [(3, 100.0, 4), (2, 100.0, 4)]
    assert jobs[0].seed != jobs[1].seed
    assert len(tally.own_cpu_s) == 2
    assert tally.outcomes[OK] > 0
    assert 130 <= sum(tally.outcomes.values()) <= 270  # a slow machine has no room for some, and says so


def test_there_are_no_more_generators_than_connections() -> None:
    assert [job.connections for job in divide(make_job(1, connections=2), 9)] == [1, 1]


def test_where_nobody_listens_no_load_can_be_made() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with pytest.raises(LoadError, match="2 connections cannot be made: Connection refused"):
        run_load([make_job(port)])


def test_a_server_that_goes_away_is_counted_and_does_not_end_the_load() -> None:
    answer = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\n{}"
    with ExitStack() as server:
        job = make_job(server.enter_context(deaf_server((answer,))), duration_s=1.5)
        gone: list[threading.Timer] = []

        def begun() -> None:
            gone.append(threading.Timer(0.5, server.close))
            gone[-1].start()

        tally = run_load([job], at_edges=begun)
        for timer in gone:
            timer.join()
    assert tally.outcomes[OK] > 0
    assert tally.outcomes["no connection"] > 0
    # Reset, if it was in the line of those that the server had not accepted yet.
    assert tally.texts["no connection"] in ("Connection refused", "Connection reset by peer")


def test_a_tally_is_the_same_after_its_way_through_json() -> None:
    meter = Meter(1000, 1.0, 0.0)
    meter.answered(1000, 5_000_000)
    meter.expired(2_000, 900_000_000)
    meter.refused(3_000, 5_000, "HTTP 503", "full")
    meter.refused(3_000, 7_000, "HTTP 503", "fuller")
    meter.sent(3_000, 4_000, 7)
    tally = Tally.load(meter.tally.export())
    assert tally.export() == meter.tally.export()
    assert tally.outcomes == {OK: 1, EXPIRED: 1, "HTTP 503": 2}
    assert tally.texts == {"HTTP 503": "full"}
    assert (tally.outstanding, tally.behind.largest) == (7, 1000)
    assert (tally.refusals.total, tally.refusals.least, tally.refusals.largest) == (2, 2000, 4000)


def test_only_what_belongs_to_the_measured_time_is_measured() -> None:
    meter = Meter(1000, 1.0, 0.0)
    meter.answered(999, 2000)  # sent before, answered in it
    meter.answered(SECOND, SECOND + 5000)  # sent in it, answered after
    for late in (999, SECOND + 1000):
        meter.failed(late, "closed")
        meter.refused(late, late + 1, "HTTP 503", "full")
        meter.expired(late, late + 1)
        meter.sent(late, late, 1)
    tally = meter.tally
    assert tally.outcomes == {OK: 1}
    assert sum(each.answered for each in tally.slices) == 1
    assert tally.taken().total == 1
    assert tally.behind.total == 0
    assert meter.answers == 2
