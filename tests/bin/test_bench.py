"""``penstock bench`` against a server of ours and against others, as its users call it."""

from __future__ import annotations

import json
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
from click.testing import CliRunner, Result

from penstock.bin.bench import label, milliseconds
from penstock.bin.cli import cli
from penstock.bin.options import Duration
from tests.load.servers import plain_server
from tests.system.servers import Server, wait_for

ROOT = Path(__file__).parents[2]
COUNTED = 'nv_inference_count{model="dense",version="3"}'
LONG = ("--duration", "2.5s")  # the server tells what it has counted about once a second
SHORT = ("--duration", "0.2s", "--warmup", "0.1s")


def run(*arguments: str) -> Result:
    return CliRunner().invoke(cli, ["bench", *SHORT, *arguments])


def loads(result: Result) -> list[dict[str, Any]]:
    assert result.exit_code == 0, result.output
    return list(json.loads(result.stdout)["loads"])


def test_closed_loops_are_a_table(server: Server) -> None:
    result = run("dense", "--url", server.url, "--connections", "1,4")
    assert result.exit_code == 0, result.output
    introduction, inputs, heads, *rows = result.stdout.splitlines()
    assert introduction == f"dense at {server.url}, over HTTP, binary tensors, 0.2 s each"
    assert inputs == "  inputs: x FP32 [1, 4]"
    names = ["load", "requests/s", "p50 ms", "p90 ms", "p99 ms", "p99.9 ms", "max ms", "CPU µs", "batch", "errors"]
    assert re.split(" {2,}", heads.strip()) == names
    assert [row.split()[0] for row in rows[:2]] == ["1", "4"]
    for row in rows[:2]:
        assert re.fullmatch(r"  \d connections? +[\d,]+( +[\d.,]+){6} +[\d.?]+  none", row), row


def test_figures_are_those_of_the_server(server: Server) -> None:
    before = server.metrics()[COUNTED]
    [load] = loads(run("dense", "--url", server.url, "--connections", "4", "--rows", "3", "--json", *LONG))
    rows = 3 * load["requests_per_s"] * load["duration_s"]
    # The server counts those of the warm-up, too, and tells what it has counted now and then.
    wait_for(lambda: server.metrics()[COUNTED] - before >= rows, "the server to have counted them")
    assert server.metrics()[COUNTED] - before <= 2 * rows + 100
    assert load["errors"] == {}
    assert 3 <= load["mean_batch"] <= 12
    assert 0 < load["cpu_s_per_request"] < 0.1
    quantiles = [load["latency_s"][each] for each in ("0.5", "0.9", "0.99", "0.999", "max")]
    assert quantiles == sorted(quantiles)
    # Four ask without a pause: so many as are under way at once, by Little's law, as far as a short time shows it.
    assert load["requests_per_s"] * load["latency_s"]["0.5"] < 4.5


def test_open_loops_keep_their_rate(server: Server) -> None:
    given = ("--rate", "100,300", "--duration", "0.4s", "--deadline", "1us", "--json")
    first, second = loads(run("dense", "--url", server.url, *given))
    assert (first["rate"], second["rate"]) == (100, 300)
    assert 10 < first["requests_per_s"] * 0.4 < 80
    assert 60 < second["requests_per_s"] * 0.4 < 180
    assert first["late"] > 0
    assert first["in_time_per_s"] == 0


def test_requests_tell_their_deadline_when_they_are_to() -> None:
    with plain_server() as other:
        run("m", "--url", other.url, "--connections", "1", "--deadline", "50ms", "--tell-deadline")
        assert json.loads(other.requests[-1][1])["parameters"] == {"timeout": 50_000}
        run("m", "--url", other.url, "--connections", "1", "--deadline", "50ms")
        assert "parameters" not in json.loads(other.requests[-1][1])


def test_requests_say_their_priority_and_tenant_when_they_are_to(server: Server) -> None:
    with plain_server() as other:
        run("m", "--url", other.url, "--connections", "1", "--priority", "2", "--tenant", "team blue")
        asked = [headers for headers, _ in other.requests]
        assert {(each["penstock-priority"], each["penstock-tenant"]) for each in asked} == {("2", "team blue")}
        run("m", "--url", other.url, "--connections", "1")
        assert not {"penstock-priority", "penstock-tenant"} & other.requests[-1][0].keys()
    for where in (("--url", server.url), ("--runtime-dir", str(server.runtime))):
        for load in (("--connections", "1"), ("--connections", "2"), ("--rate", "100")):
            [measured] = loads(run("dense", *where, *load, "--json", "--priority", "5", "--tenant", "red"))
            assert (measured["errors"], measured["requests_per_s"] > 0) == ({}, True)


@pytest.mark.parametrize(("option", "value"), [("--priority", "6"), ("--tenant", "x" * 65), ("--tenant", "é")])
def test_a_priority_or_tenant_that_cannot_be_is_refused(option: str, value: str) -> None:
    result = run("m", option, value)
    assert result.exit_code == 2
    assert "at most 64 printable ASCII" in result.output if option == "--tenant" else "0<=x<=5" in result.output


def test_an_overloaded_server_shows_with_the_client_library_too(server: Server) -> None:
    arguments = ("--runtime-dir", str(server.runtime), "--json")
    [load] = loads(run("dense", *arguments, "--rate", "50000", "--outstanding", "2"))
    assert load["errors"]["unsent"] > 0
    assert load["outstanding"] == 2
    assert any(remark.startswith("2 requests were outstanding, and ") for remark in load["remarks"])
    [load] = loads(run("dense", *arguments, "--rate", "2000", "--timeout", "1ms", "--warmup", "0s", "--rows", "32"))
    assert set(load["errors"]) <= {"expired", "unsent", "overloaded"}  # the server knows that it takes longer
    # What expired was waited for, and is among the latencies.
    assert load["latency_s"]["max"] < 1.0


@pytest.mark.parametrize("arguments", [("--connections", "1"), ("--connections", "8"), ("--rate", "200")])
def test_the_client_library_is_measured_too(server: Server, arguments: tuple[str, ...]) -> None:
    [load] = loads(run("sums", "--runtime-dir", str(server.runtime), "--json", *arguments))
    assert load["requests_per_s"] > 0
    assert load["errors"] == {}
    assert load["cpu_s_per_request"] > 0  # of the processes whose sockets lie in that directory


def test_metrics_tell_of_batches_wherever_they_are(server: Server) -> None:
    metrics = f"{server.url}/metrics"
    arguments = ("--runtime-dir", str(server.runtime), "--metrics", metrics, "--json", "--connections", "2", *LONG)
    [load] = loads(run("dense", *arguments))
    assert 1 <= load["mean_batch"] <= 2


@pytest.mark.parametrize("extensions", [(), ("binary_tensor_data",)])
def test_any_v2_server_can_be_measured(extensions: tuple[str, ...]) -> None:
    with plain_server(extensions=extensions) as other:
        result = run("m", "--url", other.url, "--connections", "2")
        headers, body = other.requests[-1]
    assert result.exit_code == 0, result.output
    assert ("inference-header-content-length" in headers) == bool(extensions)
    if not extensions:
        [tensor] = json.loads(body)["inputs"]
        assert (tensor["name"], tensor["shape"], len(tensor["data"])) == ("x", [1, 2], 2)
    assert "binary tensors" in result.stdout if extensions else "JSON" in result.stdout
    [row] = [line for line in result.stdout.splitlines() if line.startswith("  2 connections ")]
    used, batch, errors = row.split()[8:]
    assert float(used.replace(",", "")) > 0  # of this very process, in which the server is a thread
    assert (batch, errors) == ("?", "none")  # it has no metrics


def test_errors_under_load_are_shown(server: Server) -> None:
    def refuse(number: int) -> tuple[int, bytes]:
        return (200, b"{}") if number % 2 == 0 else (503, b'{"error": "queue is full"}')

    with plain_server(refuse) as other:
        result = run("m", "--url", other.url, "--connections", "2")
    assert result.exit_code == 0
    assert re.search(r"\d HTTP 503$", result.stdout, re.MULTILINE)
    assert '  2 connections: HTTP 503: {"error": "queue is full"}' in result.stdout


def test_a_load_without_any_answer_is_a_failure() -> None:
    with plain_server(lambda number: (200 if number == 0 else 500, b"")) as other:
        result = run("m", "--url", other.url, "--connections", "2")
    assert result.exit_code == 1
    assert re.search(r"^  2 connections +0 .*HTTP 500$", result.stdout, re.MULTILINE)


def test_inputs_are_given_as_files_or_shapes(server: Server, tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.ones((7, 4), "f4"))
    result = run("dense", "--url", server.url, "--input", f"x={tmp_path}/x.npy", "--connections", "1")
    assert "  inputs: x FP32 [7, 4]" in result.stdout
    result = run("dense", "--url", server.url, "--input", "5x4", "--connections", "1")
    assert "  inputs: x FP32 [5, 4]" in result.stdout
    np.savez(tmp_path / "both.npz", a=np.ones((2, 2), "i4"), b=np.ones((2, 2), "i4"))
    result = run("sums", "--url", server.url, "--input", f"{tmp_path}/both.npz", "--connections", "1")
    assert "  inputs: a INT32 [2, 2], b INT32 [2, 2]" in result.stdout


@pytest.mark.parametrize("model", ["strings", "brain", "square"])
def test_models_of_other_kinds_are_asked_with_what_fits_them(server: Server, model: str) -> None:
    [load] = loads(run(model, "--url", server.url, "--connections", "1", "--json"))
    assert load["requests_per_s"] > 0


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["nothing"], "answers 404 when asked for model 'nothing': "),
        (["broken"], "answers 503 when asked for model 'broken': "),
        (["dense", "--input", "x=1x5"], "input 'x' of 'dense' has the shape [-1, 4], not [1, 5]"),
        (["dense", "--input", "y=1x4"], "'dense' has no input 'y'; it has ['x']"),
        (["sums", "--input", "1x2"], "'sums' has several inputs; write --input NAME=..., with one of ['a', 'b']"),
        (["square", "--rows", "2"], "leave --rows out"),
        (["dense", "--rows", "5000"], "the server answers 400 to the request: inference request batch-size must be"),
        (["dense", "--input", "x=any"], "'x=any' is neither a shape, such as x=1x3x224x224, nor a file"),
        (["dense", "--input", "nothing.npy"], "cannot read nothing.npy"),
    ],
)
def test_what_cannot_be_asked_is_a_sentence(server: Server, arguments: list[str], sentence: str) -> None:
    result = run(*arguments, "--url", server.url)
    assert result.exit_code == 1, result.output
    assert result.stderr.startswith("penstock: ")
    assert sentence in result.stderr


def test_a_wrong_datatype_is_a_sentence(server: Server, tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.ones((1, 4)))
    result = run("dense", "--url", server.url, "--input", str(tmp_path / "x.npy"))
    assert result.exit_code == 1
    assert result.stderr == (
        "penstock: input 'x' of 'dense' is FP32, and what is given is FP64; convert it to float32\n"
    )


def test_a_server_that_is_not_there_is_a_sentence(nowhere: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    result = run("m", "--url", f"http://127.0.0.1:{port}")
    assert (result.exit_code, result.stderr) == (
        1,
        f"penstock: no server answers at http://127.0.0.1:{port}: Connection refused\n",
    )


def test_a_model_that_the_client_library_does_not_find_is_a_sentence(server: Server) -> None:
    result = run("nothing", "--runtime-dir", str(server.runtime))
    assert result.exit_code == 1
    assert "unknown model: 'nothing'" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--connections", "0"], "0 is not more than 0"),
        (["--connections", "1,x"], "is no list of numbers"),
        (["--rate", "-1"], "-1.0 is not more than 0"),
        (["--duration", "soon"], "'soon' is not a duration"),
        (["--duration", "0s"], "is not between 0.1"),
        (["--url", "https://h"], "is no http:// URL"),
        (["--url", "http://h", "--by", "client"], "--url and --encoding go with --by http"),
        (["--tell-deadline"], "--tell-deadline goes with --deadline"),
        (["--server", "tcp://h:1", "--by", "http"], "--runtime-dir and --server go with --by client"),
    ],
)
def test_bad_usage_is_said(arguments: list[str], sentence: str) -> None:
    result = CliRunner().invoke(cli, ["bench", "m", *arguments])
    assert result.exit_code == 2
    assert sentence in result.stderr


def test_the_report_is_one_file_and_its_plots(server: Server, tmp_path: Path) -> None:
    result = run("dense", "--url", server.url, "--connections", "1,2", "--report", str(tmp_path / "a" / "b"))
    assert result.exit_code == 0, result.output
    assert result.stderr == f"penstock: wrote {tmp_path}/a/b/report.html\n"
    page = (tmp_path / "a" / "b" / "report.html").read_text(encoding="utf-8")
    assert page.count("<svg") == 4
    assert "<td>2 connections</td>" in page
    # Nothing is fetched from anywhere.
    assert re.findall(r"(?:src|href|url)\s*[=(]|@import|<script|<link", page) == []
    made = sorted(path.name for path in (tmp_path / "a" / "b").glob("*.png"))
    assert made == ["latency.png", "throughput-time.png", "throughput.png", "time.png"]


def test_without_matplotlib_the_report_has_its_html_and_says_what_is_missing(server: Server, tmp_path: Path) -> None:
    (tmp_path / "matplotlib.py").write_text("raise ImportError('not here')\n")
    code = "import sys; sys.path.insert(0, sys.argv.pop(1)); from penstock.bin.__main__ import main; main()"
    arguments = ["bench", "dense", "--url", server.url, "--connections=1", "--report", str(tmp_path / "out"), *SHORT]
    ended = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path), *arguments], capture_output=True, text=True, timeout=60, check=False
    )
    assert ended.returncode == 0, ended.stderr
    assert "pip install 'penstock[report]'" in ended.stderr
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["report.html"]


def test_a_report_that_cannot_be_written_is_a_sentence(server: Server, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    result = run("dense", "--url", server.url, "--connections", "1", "--report", str(tmp_path / "file" / "under"))
    assert result.exit_code == 1
    assert "penstock: cannot write the report: " in result.stderr


def test_a_terminal_shows_how_far_it_is(server: Server) -> None:
    """Its standard error is one here, by way of script(1)."""
    script = shutil.which("script")
    if script is None:
        pytest.skip("script(1) is missing (Debian package bsdutils)")
    command = f"{sys.executable} -m penstock.bin bench dense --url {server.url} --connections 2 {' '.join(SHORT)}"
    ended = subprocess.run([script, "-qec", command, "/dev/null"], capture_output=True, timeout=60, check=True)
    assert re.search(rb"2 connections +\[#+\] +100%", ended.stdout)


@pytest.mark.parametrize(
    ("text", "seconds"), [("500ms", 0.5), ("10s", 10), ("2m", 120), ("1.5", 1.5), ("250us", 2.5e-4)]
)
def test_durations_have_units(text: str, seconds: float) -> None:
    assert Duration().convert(text, None, None) == pytest.approx(seconds)


@pytest.mark.parametrize("text", ["", "s", "1h", "-1s", "1e3", "nan", "2d"])
def test_what_is_no_duration_is_refused(text: str) -> None:
    with pytest.raises(click.BadParameter):
        Duration().convert(text, None, None)


def test_labels_and_milliseconds_are_short() -> None:
    assert [label(1, 0), label(2000, 0), label(16, 2500.0)] == ["1 connection", "2,000 connections", "2,500/s"]
    assert [milliseconds(each) for each in (0.0001234, 0.01234, 0.1234, 12.34)] == ["0.12", "12.3", "123", "12,340"]
