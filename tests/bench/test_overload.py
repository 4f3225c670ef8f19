"""The benchmark of overload: what is asked, looked at, counted and told. No server is installed here."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from bench import models, overload, overloadtell, peerlist, peerstart
from penstock.load.histogram import Histogram
from penstock.load.job import EXPIRED, LATE, OK, UNSENT, Job, Tally
from penstock.wire.metrics import SECONDS
from tests.system.servers import wait_for

SCRIPT = Path(overload.__file__)
MS = 1_000_000

TURN = overload.Turn(
    times=2.0,
    offered=2000.0,
    goodput=950.0,
    refused=1000.0,
    late=40.0,
    unanswered=10.0,
    p50_ms=60.0,
    p99_ms=99.0,
    refusal_p99_ms=5.0,
    gateway_refusal_p99_ms=4.0,
    expired=3.0,
    batch_rows=31.5,
    batch_ms=14.0,
    running=0.97,
    cores={"gateway": 0.3, "broker": 0.1, "worker": 0.9, "rest": 0.0},
    per_core=1055.0,
    generator=0.2,
    others=0.5,
    behind_ms=0.3,
    doubts=[],
)
PEER_TURN = replace(
    TURN,
    goodput=0.0,
    refusal_p99_ms=None,
    gateway_refusal_p99_ms=None,
    expired=None,
    batch_rows=None,
    batch_ms=None,
    running=None,
    cores={"server": 1.0},
    per_core=0.0,
    doubts=["the generator used 99% of a core"],
)


def server(key: str = "penstock", request: peerlist.Request | None = None) -> peerstart.Running:
    request = request or peerlist.Request("/ask", b"body", {"Content-Type": "text/plain"})
    return peerstart.Running(key, "http://127.0.0.1:8000", os.getpid(), request, Path())


# --- a real run, the shortest there is ---


def test_a_run_prints_tables_and_writes_every_figure(tmp_path: Path) -> None:
    out = tmp_path / "new" / "overload.json"
    # So little that nothing is refused on any machine, and so much time that nothing is late.
    given = ["--alone", "--model=tiny", "--seconds=0.3", "--repeats=1", "--times=0.01,0.02", "--deadline=5000"]
    ended = subprocess.run(
        [sys.executable, SCRIPT, *given, f"--out={out}"],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
        cwd=tmp_path,
    )
    assert ended.returncode == 0, ended.stderr
    assert sorted(path.name for path in out.parent.iterdir()) == ["overload.json", "overload.png", "overload.txt"]
    assert out.with_suffix(".txt").read_text() == ended.stdout
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")

    content = json.loads(out.read_text())
    assert (content["model"], content["deadline_ms"], content["repeats"]) == ("tiny", 5000.0, 1)
    [own] = content["servers"]
    assert (own["server"], own["why"], len(own["turns"])) == ("penstock", "", 2)
    assert own["memory_mb"].keys() == {"fresh", "first_peak", "before", "peak", "after"}
    for load, times in zip(own["loads"], (0.01, 0.02), strict=True):
        assert load.keys() == asdict(TURN).keys() | {"turns"}
        assert (load["times"], load["turns"]) == (times, 1)
        assert load["goodput"] == load["offered"] > 0
        assert 0 < load["p50_ms"] <= load["p99_ms"]
        assert load["cores"].keys() == {"gateway", "broker", "worker", "rest"}
        assert load["expired"] == load["refused"] == load["unanswered"] == 0
    assert [bar["bar"][:6] for bar in content["bars"]] == ["memory"], "nothing was overloaded"
    assert len(re.findall(r"^\| \*\*Penstock\*\*", ended.stdout, re.MULTILINE)) == 5


# --- what is asked ---


def test_all_bytes_of_a_request_are_there() -> None:
    asked = overload.target(server("mosec"), 0.1)
    assert (asked.host, asked.port) == ("127.0.0.1", 8000)
    head, _, body = asked.request.partition(b"\r\n\r\n")
    assert body == b"body"
    assert head.decode().split("\r\n") == [
        "POST /ask HTTP/1.1",
        "Host: 127.0.0.1:8000",
        "Content-Type: text/plain",
        "Content-Length: 4",
    ]


def test_penstock_is_told_of_the_deadline_and_else_nothing_changes() -> None:
    request = peerlist.request_of(peerlist.V2_BINARY, "/v2/models/MODEL/infer", "tiny")
    own = server(request=request)
    assert overload.target(own, 0.0).request.endswith(request.body)
    head, _, body = overload.target(own, 0.1).request.partition(b"\r\n\r\n")
    found = re.search(rb"Inference-Header-Content-Length: (\d+)", head)
    assert found is not None
    length = int(found[1])
    said = json.loads(body[:length])
    assert said.pop("parameters") == {"binary_data_output": True, "timeout": 100_000}
    before = json.loads(request.body[: int(request.headers["Inference-Header-Content-Length"])])
    assert said == {"inputs": before["inputs"]}
    assert body[length:] == models.sample("tiny", 1)["x"].tobytes()


def test_a_closed_loop_has_time_and_an_open_one_gives_up_after_ten_deadlines() -> None:
    closed = overload.make_job(server("mosec"), 0.0, 5.0, 0.0, 0)
    assert (closed.connections, closed.timeout_s, closed.warmup_s) == (overload.CONNECTIONS, 30.0, 1.0)
    opened = overload.make_job(server("mosec"), 100.0, 0.5, 0.1, 0)
    assert (opened.timeout_s, opened.warmup_s, opened.rate) == (1.0, 0.5, 100.0)


# --- what is looked at ---


def test_resident_memory_is_that_of_all_processes_and_the_most_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overload, "MEMORY_EVERY_S", 0.01)
    work = "import sys; kept = bytearray(50_000_000); print('ready', flush=True); sys.stdin.read()"
    command = [sys.executable, "-S", "-c", work]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True) as process:
        assert process.stdout is not None
        process.stdout.readline()
        seen: list[float] = []
        with overload.watching(process.pid, seen):
            wait_for(lambda: len(seen) >= 2, "it to be looked at twice")
        process.kill()
    assert len(seen) >= 2
    assert all(50 < each < 100 for each in seen)


def test_the_machine_is_busy_with_all_but_waiting() -> None:
    stat = "cpu  100 20 30 1000 400 5 6 7 50 0\ncpu0 1 2 3 4\n"
    assert overload.machine_busy_s(stat) == pytest.approx(168 / os.sysconf("SC_CLK_TCK"))


def metrics(at: int) -> overload.Metrics:
    """Of a gateway and a worker: ``at`` seconds after their start."""
    lines = [
        f'penstock_batch_rows_count{{worker="w"}} {70 * at}',
        f'penstock_batch_rows_sum{{worker="w"}} {2100 * at}',
        f'penstock_compute_seconds_sum{{worker="w"}} {0.9 * at}',
        f'penstock_request_failures_total{{process="w",reason="deadline"}} {3 * at}',
        f'penstock_request_failures_total{{process="broker",reason="deadline"}} {at}',
        f'penstock_request_failures_total{{process="broker",reason="overloaded"}} {900 * at}',
    ]
    for bound in (*map(str, SECONDS), "+Inf"):
        count = 100 if bound == "+Inf" or float(bound) >= 0.005 else 90 if float(bound) >= 0.0025 else 0
        lines.append(f'penstock_http_refusal_seconds_bucket{{gateway="g",le="{bound}"}} {count * at}')
    return overload.read_metrics("\n".join(lines))


def test_counters_are_told_apart_by_their_labels() -> None:
    risen = overload.Risen(metrics(1), metrics(3))
    assert risen.sum("penstock_request_failures_total") == 2 * 904
    assert risen.sum("penstock_request_failures_total", reason="deadline") == 8
    assert risen.sum("penstock_requests_total") is None
    assert risen.quantile("penstock_http_refusal_seconds", 0.5) == pytest.approx(0.001 + 0.0015 * 50 / 90)
    assert risen.quantile("penstock_http_refusal_seconds", 0.99) == pytest.approx(0.0025 + 0.0025 * 9 / 10)
    assert overload.Risen(metrics(1), metrics(1)).quantile("penstock_http_refusal_seconds", 0.99) is None


# --- what comes of it ---


def tally() -> Tally:
    ends = {OK: 900, LATE: 50, EXPIRED: 20, UNSENT: 4, "HTTP 503": 800, "HTTP 504": 100, "HTTP 500": 1}
    made = Tally(outcomes=ends, own_cpu_s=[0.5])
    for number in range(1, 901):
        made.slices[0].taken.record(number * MS // 10)
        made.refusals.record(number * MS // 100)
    return made


def job() -> Job:
    return overload.make_job(server("mosec"), 1000.0, 2.0, 0.1, 0)


def test_a_turn_has_all_requests_by_how_they_ended() -> None:
    before = overload.Sight(10.0, {1: 5.0, 2: 7.0}, 100.0, metrics(1))
    after = overload.Sight(12.0, {1: 5.5, 2: 8.8, 3: 0.1}, 104.0, metrics(3))
    turn = overload.make_turn(job(), 4.0, tally(), before, after, {1: "gateway", 2: "worker"}, 0.02)
    assert (turn.goodput, turn.late, turn.refused, turn.unanswered) == (450.0, 25.0, 450.0, 12.5)
    assert turn.offered == 937.5
    assert turn.cores == pytest.approx({"gateway": 0.25, "worker": 0.9, "rest": 0.05})
    assert turn.per_core == pytest.approx(500.0)
    assert turn.others == pytest.approx(2.0 - 1.2 - 0.25 - 0.01)
    assert turn.running == pytest.approx(0.9)
    assert (turn.batch_rows, turn.expired) == (30.0, 4.0)
    assert turn.refusal_p99_ms == pytest.approx(8.91, rel=0.01)
    assert turn.gateway_refusal_p99_ms == pytest.approx(4.75)


def test_what_a_server_does_not_tell_is_not_known() -> None:
    before, after = (overload.Sight(at, {1: at / 2}, 2 * at, {}) for at in (10.0, 12.0))
    made = tally()
    made.refusals = Histogram()
    turn = overload.make_turn(job(), 4.0, made, before, after, {}, 0.0)
    assert turn.cores == {"server": 0.5}
    assert (turn.expired, turn.batch_rows, turn.running) == (None, None, None)
    assert (turn.refusal_p99_ms, turn.gateway_refusal_p99_ms) == (None, None)


def test_medians_are_of_each_figure_alone_and_of_what_is_known() -> None:
    turns = [replace(TURN, goodput=good, batch_rows=rows) for good, rows in ((1.0, 32.0), (5.0, None), (3.0, 30.0))]
    turns[1] = replace(turns[1], cores={"worker": 0.5}, doubts=["slow"])
    median = overload.medians(turns)
    assert (median.goodput, median.batch_rows, median.p50_ms) == (3.0, 31.0, 60.0)
    assert median.cores == {"gateway": 0.3, "broker": 0.1, "worker": 0.9, "rest": 0.0}
    assert median.doubts == ["slow"]
    assert overload.medians([PEER_TURN, PEER_TURN]) == PEER_TURN


def test_each_has_a_turn_in_each_round_and_who_is_gone_has_none_any_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peerstart, "_wait_until_back", lambda server: None)
    courses = [overload.Course(server(key)) for key in "abc"]
    seen = []

    def act(course: overload.Course, number: int) -> None:
        seen.append((course.server.key, number))
        if course.server.key == "b":
            raise peerstart.PeerError("gone")

    overload.in_turns(courses, 3, act)
    assert seen == [("a", 0), ("b", 0), ("c", 0), ("c", 1), ("a", 1), ("c", 2), ("a", 2)]
    assert [course.why for course in courses] == ["", "gone", ""]


# --- the bars, the tables and the plot ---


def content(loads: Mapping[float, float], refusal_ms: float = 4.0, grown_mb: float = 1.0) -> dict[str, Any]:
    """What the JSON file has. ``loads``: Penstock's goodput by times its capacity."""
    turns = [
        replace(TURN, times=times, goodput=good, gateway_refusal_p99_ms=refusal_ms) for times, good in loads.items()
    ]
    memory = {"fresh": 280.0, "first_peak": 310.0, "before": 300.0, "peak": 300.0 + grown_mb, "after": 300.5}
    found = {
        "machine": {"date": "today", "cpu": "2 cores"},
        "model": "heavy",
        "deadline_ms": 100.0,
        "seconds": 10.0,
        "repeats": 3,
        "servers": [
            {
                "server": "penstock",
                "capacity": 1000.0,
                "memory_mb": memory,
                "why": "",
                "loads": list(map(asdict, turns)),
            },
            {"server": "mosec", "capacity": 900.0, "memory_mb": memory, "why": "", "loads": [asdict(PEER_TURN)]},
            {"server": "fastapi", "capacity": 0.0, "memory_mb": None, "why": "gone", "loads": []},
        ],
        "failed": [{"server": "litserve", "why": "not installed"}],
    }
    return found | {"bars": overloadtell.bars(found)}


@pytest.mark.parametrize(
    ("made", "kept"),
    [
        (content({0.9: 1000.0, 2.0: 930.0, 4.0: 999.0}), [True, True, True, True]),
        (content({0.9: 1000.0, 2.0: 929.0, 4.0: 100.0}), [False, False, True, True]),
        (content({0.5: 500.0, 2.0: 1000.0}, refusal_ms=10.1, grown_mb=15.0), [True, False, False]),
        (content({0.5: 500.0}), [True]),
    ],
)
def test_bars_are_kept_or_missed_where_they_were_measured(made: dict[str, Any], kept: list[bool]) -> None:
    assert [bar["kept"] for bar in made["bars"]] == kept


def test_all_is_told_from_what_the_file_has() -> None:
    lines = overloadtell.tell(content({0.9: 1000.0, 2.0: 950.0, 4.0: 900.0}))
    assert lines[0] == "date today, cpu 2 cores"
    results = [line for line in lines if line.count("|") == 14]
    assert results[3].startswith(
        "| **Penstock**, 1000/s | 2000 (2 x) | **950** | 95% | 1000 | 40 | 10 | 60 / 99 | 5.0 |"
    )
    assert results[5].startswith("| mosec 0.9.8, 900/s | 2000 (2 x) | **0** |  | 1000 |")
    used = [line for line in lines if line.count("|") == 8 and "(" in line]
    assert "| gateway 0.30, broker 0.10, worker 0.90, rest 0.00 | 1055 (100%) | 0.20 | 0.50 | 0.3 |" in used[1]
    assert "| server 1.00 | 0 | 0.20* | 0.50 | 0.3* |" in used[-1]
    assert "* mosec 0.9.8, 2 x: the generator used 99% of a core" in lines
    assert "FastAPI 0.165.0 + ONNX Runtime: gone" in lines
    assert "LitServe 0.2.19: not installed" in lines
    assert "| mosec 0.9.8 | 280 | 310 | 300 | 301 | 300 | +0.5 |" in lines
    assert "kept: goodput at 2 times capacity is at least 93% of the best: 95.0%" in lines
    assert "MISSED: goodput at 4 times capacity is at least 93% of the best: 90.0%" in lines


def test_the_plot_is_a_small_picture(tmp_path: Path) -> None:
    path = tmp_path / "overload.png"
    assert overloadtell.draw(content({0.9: 1000.0, 4.0: 900.0}), path)
    assert path.read_bytes().startswith(b"\x89PNG")
    assert path.stat().st_size < 150_000


# --- what is refused ---


@pytest.mark.parametrize(
    ("argument", "said"),
    [
        ("--peers=mosecc", "argument --peers: 'mosecc' is none of fastapi, mosec, "),
        ("--model=huge", "argument --model: invalid choice: 'huge'"),
        ("--times=0.5,0", "argument --times: '0' is no number above 0"),
        ("--times=", "argument --times: '' is no number above 0"),
        ("--deadline=-1", "argument --deadline: '-1' is no number above 0"),
        ("--seconds=inf", "argument --seconds: 'inf' is no number above 0"),
        ("--seconds=nan", "argument --seconds: 'nan' is no number above 0"),
        ("--repeats=0", "argument --repeats: '0' is no whole number from 1 on"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_anything_is_installed(
    capsys: pytest.CaptureFixture[str], argument: str, said: str
) -> None:
    with pytest.raises(SystemExit) as stopped:
        overload.main([argument])
    assert stopped.value.code == 2
    assert said in capsys.readouterr().err


def test_times_are_offered_in_ascending_order() -> None:
    assert overload.positives("4,0.5,2,2") == [0.5, 2.0, 4.0]
