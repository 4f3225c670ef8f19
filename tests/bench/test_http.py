"""The benchmark over HTTP measures what it says: the right requests, wrk's own figures, the server's processes."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench import http as bench
from bench import models

SCRIPT = Path(bench.__file__)

FIGURES = bench.Figures(1000.0, 1.0, 2.0, 10.0, 20.0, 30.0, 4.0, 0)

# What wrk 4.1.0 prints.
WRK = """Running 1s test @ http://127.0.0.1:8000
  1 threads and 2 connections
  Thread Stats   Avg      Stdev     Max   +/- Stdev
    Latency   280.03us  158.71us   4.25ms   92.87%
    Req/Sec     6.92k   181.88     7.13k    72.73%
  Latency Distribution
     50%  263.00us
     75%  331.00us
     90%  393.00us
     99%    1.21s
  7573 requests in 1.10s, 3.76MB read
Requests/sec:   6885.83
Transfer/sec:      3.42MB
"""
WRK_ERRORS = WRK.replace(
    "Requests/sec",
    "  Socket errors: connect 1, read 20, write 300, timeout 4000\n  Non-2xx or 3xx responses: 50000\nRequests/sec",
)


# --- a real run, the shortest there is ---


def test_a_run_prints_a_table_and_writes_every_figure(
    tmp_path: Path, require_command: Callable[[str, str], str]
) -> None:
    require_command("wrk", "wrk")
    out = tmp_path / "new" / "http.json"
    arguments = ["--models=tiny", "--forms=binary-id", "--connections=2", "--seconds=1", "--repeats=1"]
    ended = subprocess.run(
        [sys.executable, SCRIPT, *arguments, f"--out={out}"],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
        cwd=tmp_path,
    )
    assert ended.returncode == 0, ended.stderr
    assert "1/1 Case(model='tiny', form='binary-id', connections=2)" in ended.stderr

    content = json.loads(out.read_text())
    assert content.keys() == {"machine", "seconds", "repeats", "cases", "fastapi", "requests", "grown_mb"}
    assert (content["seconds"], content["repeats"]) == (1, 1)
    assert {"date", "cpu", "kernel", "python", "penstock", "onnxruntime"} <= content["machine"].keys()
    [case] = content["cases"]
    assert case.keys() == {"model", "form", "connections", "total_us", "bare_us"} | asdict(FIGURES).keys()
    assert (case["model"], case["form"], case["connections"], case["errors"]) == ("tiny", "binary-id", 2, 0)
    assert case["requests_per_s"] > 10
    assert 0 < case["p50_ms"] <= case["p99_ms"]
    assert 1 <= case["batch_rows"] <= 2, "two connections ask for a row each"
    shares = [case[f"{role}_us"] for role in bench.ROLES]
    assert all(share > 0 for share in shares), "every process has worked"
    assert case["total_us"] == pytest.approx(sum(shares))
    assert 0 < case["bare_us"] < case["total_us"]

    machine, *table = ended.stdout.splitlines()
    assert f"penstock {content['machine']['penstock']}" in machine
    assert [line.count("|") for line in table] == [12, 12, 12]
    assert table[-1].startswith(f"| tiny, binary-id | 2 | {case['requests_per_s']:.0f} | {case['p50_ms']:.2f} |")
    assert [path.name for path in tmp_path.iterdir()] == ["new"]


def test_each_request_with_an_id_has_one_of_its_own(tmp_path: Path, require_command: Callable[[str, str], str]) -> None:
    wrk = require_command("wrk", "wrk")
    script = bench.write_script(tmp_path, bench.Case("tiny", "binary-id", 1))
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(30)
        url = f"http://127.0.0.1:{server.getsockname()[1]}"
        with subprocess.Popen(
            [wrk, "-t1", "-c1", "-d60s", "-s", script, url], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        ) as process:
            try:
                heads, bodies = take_requests(server, 3)
            finally:
                process.kill()
    assert {head.partition("\r\n")[0] for head in heads} == {"POST /v2/models/tiny/infer HTTP/1.1"}
    lengths = [int(head.partition("Inference-Header-Content-Length: ")[2].split()[0]) for head in heads]
    requests = [json.loads(body[:length]) for body, length in zip(bodies, lengths, strict=True)]
    first = int(requests[0]["id"])  # wrk itself asks for some before it sends one
    assert [request["id"] for request in requests] == [f"{first + number:016}" for number in range(3)]
    assert {body[length:] for body, length in zip(bodies, lengths, strict=True)} == {
        models.sample("tiny", 1)["x"].tobytes()
    }


def take_requests(server: socket.socket, count: int) -> tuple[list[str], list[bytes]]:
    """Heads and bodies of the first requests; each is answered. wrk first connects once to see that it can."""
    heads: list[str] = []
    bodies: list[bytes] = []
    while len(heads) < count:
        connection, _ = server.accept()
        connection.settimeout(30)
        with connection, connection.makefile("rb") as reader:
            while len(heads) < count and (line := reader.readline()):
                lines = [line]
                while (line := reader.readline()).strip():
                    lines.append(line)
                heads.append(b"".join(lines).decode())
                bodies.append(reader.read(int(heads[-1].partition("\r\nContent-Length: ")[2].split()[0])))
                connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
    return heads, bodies


def test_a_server_that_does_not_start_is_said(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="bench: the server did not start"), bench.Server(tmp_path, tmp_path / "run"):
        pass


# --- what is asked ---


@pytest.mark.parametrize("form", bench.FORMS)
def test_a_request_is_one_row_of_the_model(form: str) -> None:
    body, header_length = bench.request_body("tiny", form)
    row = models.sample("tiny", 1)["x"]
    request = json.loads(body[:header_length] if header_length else body)
    [tensor] = request["inputs"]
    assert (tensor["name"], tensor["shape"], tensor["datatype"]) == ("x", [1, 16], "FP32")
    assert ("id" in request) == (form == "binary-id")
    if form == "json":
        assert header_length == 0
        np.testing.assert_allclose(tensor["data"], row.ravel(), rtol=1e-5)
    else:
        assert tensor["parameters"] == {"binary_data_size": row.nbytes}
        assert request["parameters"] == {"binary_data_output": True}
        assert body[header_length:] == row.tobytes()


def test_json_and_ids_are_asked_of_the_small_model_alone() -> None:
    found = bench.cases(["mlp", "tiny"], ["binary", "json", "binary-id"], [1, 64])
    assert [(case.model, case.form, case.connections) for case in found] == [
        ("mlp", "binary", 1),
        ("mlp", "binary", 64),
        ("tiny", "binary", 1),
        ("tiny", "binary", 64),
        ("tiny", "json", 1),
        ("tiny", "json", 64),
        ("tiny", "binary-id", 1),
        ("tiny", "binary-id", 64),
    ]


@pytest.mark.parametrize(("form", "content_type"), [("binary", "octet-stream"), ("json", "json")])
def test_the_script_says_where_binary_data_begin(tmp_path: Path, form: str, content_type: str) -> None:
    text = bench.write_script(tmp_path, bench.Case("tiny", form, 1)).read_text()
    body, header_length = bench.request_body("tiny", form)
    assert (tmp_path / "body").read_bytes() == body
    assert f'"application/{content_type}"' in text
    assert (f'"Inference-Header-Content-Length"] = "{header_length}"' in text) == (form == "binary")
    assert ("Inference-Header" in text) == (form == "binary")


# --- what comes of it ---


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Has ``wrk`` print a text, and write its arguments into a file."""

    def make(text: str) -> None:
        (tmp_path / "printed").write_text(text)
        script = tmp_path / "wrk"
        script.write_text(f'#!/bin/sh\necho "$*" > "{tmp_path}/arguments"\ncat "{tmp_path}/printed"\n')
        script.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")

    return make


def test_the_figures_are_those_of_wrk(stand_in: Callable[[str], None], tmp_path: Path) -> None:
    stand_in(WRK)
    assert bench.run_wrk("http://x", Path("/script"), 2, 1) == (7573, 6885.83, 0.263, 1210.0, 0)
    said = (tmp_path / "arguments").read_text().split()
    assert said == ["-t1", "-c2", "-d1s", "--latency", "--timeout=30s", "-s", "/script", "http://x"]


def test_bad_answers_and_broken_connections_are_errors(stand_in: Callable[[str], None]) -> None:
    stand_in(WRK_ERRORS)
    assert bench.run_wrk("http://x", Path("/script"), 2, 1)[-1] == 54321


def test_what_wrk_does_not_usually_print_ends_it_with_that_text(stand_in: Callable[[str], None]) -> None:
    stand_in("unable to create thread\n")
    with pytest.raises(SystemExit) as stopped:
        bench.run_wrk("http://x", Path("/script"), 2, 1)
    assert stopped.value.code == "bench: wrk printed something else than expected:\nunable to create thread\n"


@pytest.mark.parametrize(
    ("text", "milliseconds"), [("263.00us", 0.263), ("1.50ms", 1.5), ("2.25s", 2250.0), ("0.00us", 0.0)]
)
def test_latencies_are_read_in_every_unit(text: str, milliseconds: float) -> None:
    assert bench._milliseconds(text) == pytest.approx(milliseconds)


@pytest.mark.parametrize("text", ["1.00m", "1.00h", "12", "xms"])
def test_a_latency_in_no_known_unit_is_not_guessed(text: str) -> None:
    with pytest.raises(ValueError, match=text.removesuffix("ms")):
        bench._milliseconds(text)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.floats(1, 1e6), st.integers(0, 5)), min_size=1, max_size=7))
def test_medians_are_of_each_figure_alone_and_errors_add_up(runs: list[tuple[float, int]]) -> None:
    figures = [bench.Figures(each, -each, each, each, each, each, each, errors) for each, errors in runs]
    median = bench.medians(figures)
    assert median.errors == sum(errors for _, errors in runs)
    assert median.requests_per_s == -median.p50_ms == median.worker_us == float(np.median([each for each, _ in runs]))


def test_the_sum_is_over_all_processes() -> None:
    assert FIGURES.total_us == 60.0


def test_the_model_itself_costs_some_time() -> None:
    assert 0 < bench.bare_model_us("tiny", rows=4, seconds=0.02) < 10_000


def test_the_table_has_a_row_for_each_case_and_shows_errors(capsys: pytest.CaptureFixture[str]) -> None:
    bad = bench.Figures(**asdict(FIGURES) | {"errors": 3})
    bench.print_table([(bench.Case("tiny", "json", 1), FIGURES, 5.0), (bench.Case("mlp", "binary", 64), bad, 5.0)])
    *heading, first, second = capsys.readouterr().out.splitlines()
    assert len(heading) == 2
    assert first == "| tiny, json | 1 | 1000 | 1.00 | 2.00 | 10.0 | 20.0 | 30.0 | **60.0** | 55.0 | 4.0 |"
    assert second.startswith("| mlp, binary | 64 | 1000 (3 errors) | ")
    assert {line.count("|") for line in (*heading, first, second)} == {12}


# --- what is refused ---


def refusal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    monkeypatch.setattr(sys, "argv", ["http.py", *arguments])
    with pytest.raises(SystemExit) as stopped:
        bench.main()
    assert stopped.value.code == 2
    return capsys.readouterr().err.splitlines()[-1].partition("error: ")[2]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--models=tiny,huge", "argument --models: 'huge' is none of tiny, wide, mlp, image, heavy"),
        ("--models=", "argument --models: '' is none of tiny, wide, mlp, image, heavy"),
        ("--forms=jsn", "argument --forms: 'jsn' is none of binary, json, binary-id"),
        ("--connections=1,0", "argument --connections: '0' is no whole number from 1 on"),
        ("--connections=many", "argument --connections: 'many' is no whole number from 1 on"),
        ("--seconds=0.5", "argument --seconds: '0.5' is no whole number from 1 on"),
        ("--repeats=0", "argument --repeats: '0' is no whole number from 1 on"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_anything_is_started(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: str, said: str
) -> None:
    assert refusal(monkeypatch, capsys, arguments) == said


def test_without_wrk_it_names_the_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["http.py", f"--out={tmp_path / 'out.json'}"])
    with pytest.raises(SystemExit) as stopped:
        bench.main()
    assert stopped.value.code == "bench: wrk is missing; on Debian and Ubuntu: apt install wrk"
    assert list(tmp_path.iterdir()) == []


def test_importing_it_leaves_the_path_of_modules_alone() -> None:
    program = "import sys; before = sys.path[:]; import bench.http; assert sys.path == before, sys.path"
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=SCRIPT.parents[1])
    assert (ended.returncode, ended.stderr) == (0, "")
