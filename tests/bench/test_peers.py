"""The comparison with other servers: what is counted, told and refused. No server is installed here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from bench import models, peerlist, peers, peerstart, peertell, processes
from bench.peer_servers.session import ROWS_MAX

DEADLINE_S = 20.0

# A process that starts another one, which starts one in a session of its own; the last works for as long as it is told.
FAMILY = """
import subprocess, sys
deeper, seconds = int(sys.argv[1]), sys.argv[2]
if deeper:
    subprocess.run([sys.executable, "-c", sys.argv[3], str(deeper - 1), seconds, sys.argv[3]],
                   start_new_session=deeper == 1)
else:
    import time
    while time.process_time() < float(seconds):
        pass
print("worked", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def family() -> Iterator[subprocess.Popen[bytes]]:
    """Three processes; the last has worked for 50 ms and waits, as the others do for it."""
    command = [sys.executable, "-S", "-c", FAMILY, "2", "0.05", FAMILY]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True)
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"worked\n"
        yield process
        processes.end(process, rest_limit_s=0.0)


def states(pids: set[int]) -> set[str]:
    return {Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] for pid in pids}


def until_states(pids: set[int], *wanted: str) -> None:
    until = time.monotonic() + DEADLINE_S
    while not states(pids) <= set(wanted):
        assert time.monotonic() < until, f"{states(pids)} instead of {wanted}"


# --- the processes of a server ---


def test_a_server_is_all_that_its_first_process_has_started(family: subprocess.Popen[bytes]) -> None:
    """Also what has a session of its own."""
    pids = processes.of(family.pid)
    assert len(pids) == 3
    assert family.pid in pids
    assert os.getpid() not in pids
    assert len({os.getsid(pid) for pid in pids}) == 2
    assert processes.cpu_s(pids) >= 0.05
    assert processes.cpu_s({family.pid}) < processes.cpu_s(pids)


def test_the_time_of_children_that_have_ended_is_not_lost() -> None:
    before = processes.cpu_s({os.getpid()})
    work = "import time\nwhile time.process_time() < 0.1: pass"
    subprocess.run([sys.executable, "-S", "-c", work], check=True)
    assert processes.cpu_s({os.getpid()}) - before >= 0.08


def test_who_has_ended_counts_nothing() -> None:
    with subprocess.Popen([sys.executable, "-S", "-c", ""]) as process:
        process.wait(DEADLINE_S)
    assert processes.cpu_s({process.pid}) == 0.0


def test_all_of_a_server_are_held_up_and_go_on(family: subprocess.Popen[bytes]) -> None:
    pids = processes.of(family.pid)
    processes.hold(family.pid)
    until_states(pids, "T")
    processes.go_on(family.pid)
    until_states(pids, "R", "S")


def test_all_of_a_server_end_also_when_they_are_held_up(family: subprocess.Popen[bytes]) -> None:
    pids = processes.of(family.pid)
    processes.hold(family.pid)
    processes.end(family, rest_limit_s=0.0)  # the first ends when asked, the others are killed
    assert family.poll() is not None
    assert processes._there(pids) == set()


def test_shared_memory_that_a_server_leaves_behind_is_removed() -> None:
    name = f"penstock-test-{os.getpid()}"
    work = f"""
import mmap, sys
with open("/dev/shm/{name}", "wb+") as file:
    file.truncate(4096)
    memory = mmap.mmap(file.fileno(), 4096)
print("mapped", flush=True)
sys.stdin.read()
"""
    command = [sys.executable, "-S", "-c", work]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"mapped\n"
        processes.end(process)
    assert not Path("/dev/shm", name).exists()


# --- what is installed ---


def test_every_server_has_a_version_and_our_onnx_runtime() -> None:
    for key, peer in peerlist.PEERS.items():
        assert all("==" in package for package in peer.packages), key
        assert peerstart.requirements(peer)[-1] == f"onnxruntime=={onnxruntime.__version__}"
        version = peer.packages[0].partition("==")[2]
        assert version in peer.name
        assert "VERSION" not in peer.name


def test_an_environment_is_found_again_and_another_version_has_another(tmp_path: Path) -> None:
    mosec = peerlist.PEERS["mosec"]
    environment = peerstart.environment_of(mosec, tmp_path)
    assert environment == peerstart.environment_of(mosec, tmp_path)
    assert environment.name.startswith("mosec-0.9.8-")
    newer = peerlist.Peer(**{**vars(mosec), "packages": ("mosec==99",)})
    assert peerstart.environment_of(newer, tmp_path) != environment
    assert peerstart.environment_of(peerlist.PEERS["fastapi"], tmp_path).name.startswith("fastapi-")
    # One that is complete is taken as it is; nothing is run.
    environment.mkdir(parents=True)
    (environment / "installed.txt").write_text("mosec==0.9.8\n")
    assert peerstart.install(mosec, tmp_path) == environment


def test_what_cannot_be_run_is_why_nothing_was_installed() -> None:
    with pytest.raises(peerstart.PeerError, match="not installed: ERROR: no such version"):
        peerstart._run([sys.executable, "-S", "-c", "import sys; sys.exit('trying\\nERROR: no such version\\nbye')"])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "it said nothing"),
        ("one\n two \n\n", "two"),
        ("ValueError: a | b\nbye\n", "ValueError: a / b"),
        ("x" * 1000, "x" * 200),
    ],
)
def test_a_reason_fits_into_a_table(text: str, said: str) -> None:
    assert peerstart.last_line(text) == said


# --- what is started ---

# Answers every request with the bytes of a file.
ANSWERING = """
import http.server, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        body = open(sys.argv[1], "rb").read()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def log_message(self, *arguments):
        pass
http.server.HTTPServer(("127.0.0.1", int(sys.argv[2])), Handler).serve_forever()
"""
EXPECTED = np.array([1.0, 2.0, 3.0, 4.0], np.float32)


def started(tmp_path: Path, *command: str) -> AbstractContextManager[peerstart.Running]:
    """A server of one's own, in ``with``. PORT in the command is replaced."""
    repository = models.make_repository(tmp_path / "repository", ["tiny"])
    place = peerlist.Place(tmp_path, tmp_path / "place", repository, "tiny", peerstart.free_ports(1))
    given = [each.replace("PORT", str(place.ports[0])) for each in command]
    peer = peerlist.Peer(**{**vars(peerlist.PEERS["mosec"]), "start": lambda _: peerlist.Start(given)})
    return peerstart.running("own", peer, place, EXPECTED)


def test_a_server_that_answers_rightly_runs_and_is_ended(tmp_path: Path) -> None:
    (tmp_path / "answer").write_bytes(EXPECTED.tobytes())
    with started(tmp_path, sys.executable, "-c", ANSWERING, str(tmp_path / "answer"), "PORT") as server:
        assert server.url.startswith("http://127.0.0.1:")
        assert "/inference" in server.script.read_text()
        assert processes.of(server.root) == {server.root}
    assert processes._there({server.root}) == set()


@pytest.mark.parametrize(
    ("command", "why"),
    [
        (["/no/such/server"], "cannot be started: .*/no/such/server"),
        ([sys.executable, "-S", "-c", "raise ValueError('no licence')"], "ended at its start: ValueError: no licence"),
        ([sys.executable, "-c", ANSWERING, "/dev/null", "PORT"], "answers wrongly"),
    ],
)
def test_why_a_server_does_not_run(tmp_path: Path, command: list[str], why: str) -> None:
    with pytest.raises(peerstart.PeerError, match=why), started(tmp_path, *command):
        pass


# --- what is asked and answered ---


@pytest.mark.parametrize("protocol", [peerlist.RAW, peerlist.V2_BINARY, peerlist.V2_JSON, peerlist.JSON])
def test_all_are_asked_for_the_same_row(protocol: str) -> None:
    path, body, headers = peerlist.request_of(protocol, "/models/MODEL/ask", "tiny")
    assert path == "/models/tiny/ask"
    x = models.sample("tiny", 1)["x"]
    head = int(headers.get("Inference-Header-Content-Length", len(body)))
    if protocol in (peerlist.RAW, peerlist.V2_BINARY):
        assert body[head if protocol == peerlist.V2_BINARY else 0 :] == x.tobytes()
        return
    found = json.loads(body)
    values = found["x"] if protocol == peerlist.JSON else found["inputs"][0]["data"]
    np.testing.assert_allclose(np.array(values).ravel(), x.ravel(), rtol=1e-5)
    assert protocol != peerlist.JSON or np.array(values).shape == x.shape


Y = np.array([1.0, 2.5, -3.0, 0.0], np.float32)
HEAD = b'{"outputs":[{"name":"y","shape":[1,4]}]}'
ANSWERS = {
    peerlist.RAW: ({}, Y.tobytes()),
    peerlist.V2_BINARY: ({"Inference-Header-Content-Length": str(len(HEAD))}, HEAD + Y.tobytes()),
    peerlist.V2_JSON: ({}, json.dumps({"outputs": [{"data": Y.tolist()}]}).encode()),
    peerlist.JSON: ({}, json.dumps([Y.tolist()]).encode()),
}


@pytest.mark.parametrize("protocol", ANSWERS)
def test_the_right_answer_is_taken_and_a_wrong_one_is_not(protocol: str) -> None:
    headers, body = ANSWERS[protocol]
    peerstart.check_answer(protocol, headers, body, Y)
    with pytest.raises(peerstart.PeerError, match="answers wrongly"):
        peerstart.check_answer(protocol, headers, body, Y + 0.5)
    with pytest.raises(peerstart.PeerError, match="answers wrongly"):
        peerstart.check_answer(protocol, headers, body, Y[:3])
    with pytest.raises(peerstart.PeerError, match="answers with something else"):
        peerstart.check_answer(protocol, {}, b"no such model", Y)


def test_what_triton_is_told_of_a_model() -> None:
    text = peerlist.triton_config("image")
    assert f"max_batch_size: {ROWS_MAX}" in text
    assert "dims: [3, 224, 224]" in text
    assert "dims: [1000]" in text


def test_all_batch_as_many_rows() -> None:
    assert ROWS_MAX == models.DEFAULT_BATCH_SIZE_MAX


# --- turns ---


def test_each_has_a_turn_in_each_round_and_who_is_gone_has_none_any_more(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def measure(server: peerstart.Running, connections: list[int], seconds: int) -> Iterator[tuple[int, peers.Turn]]:
        seen.append(server.key)
        for count in connections:
            if server.key == "b" and count == 2:
                raise peerstart.PeerError("gone")
            yield count, peers.Turn(float(count), 1.0, 2.0, 3.0, 1)

    monkeypatch.setattr(peers, "measure", measure)
    request = peerlist.Request("/", b"", {})
    servers = [peerstart.Running(key, "", 0, request, Path()) for key in "abc"]
    said: list[str] = []
    turns, lost = peers.in_turns(servers, [1, 2], 1, 3, said.append)
    assert seen == ["a", "b", "c", "c", "a", "c", "a"]
    assert lost == {"b": "gone"}
    assert {case: len(each) for case, each in turns.items()} == {
        ("a", 1): 3,
        ("a", 2): 3,
        ("b", 1): 1,
        ("c", 1): 3,
        ("c", 2): 3,
    }
    assert len(said) == 13
    assert peers.medians(turns["a", 2]) == peers.Turn(2.0, 1.0, 2.0, 3.0, 3)


def test_who_works_while_nobody_asks_is_seen(family: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peerstart, "SETTLE_S", 0.0)
    monkeypatch.setattr(peerstart, "IDLE_S", 0.1)
    request = peerlist.Request("/", b"", {})
    with subprocess.Popen([sys.executable, "-S", "-c", "while True: pass"], start_new_session=True) as busy:
        servers = [peerstart.Running(str(pid), "", pid, request, Path()) for pid in (family.pid, busy.pid)]
        try:
            percents = peerstart.idle_percents(servers)
        finally:
            busy.kill()
    assert percents[str(family.pid)] < 20 < percents[str(busy.pid)]


# --- the table and the plot ---


def row(server: str, rate: float, model: str = "tiny", errors: int = 0) -> dict[str, object]:
    turn = {"requests_per_s": rate, "p50_ms": 1.0, "p99_ms": 2.0, "cpu_us": 1e6 / rate, "errors": errors}
    return {"server": server, "model": model, "connections": 64, **turn}


def test_the_table_has_the_fastest_first_and_the_reasons_last() -> None:
    rows = [row("penstock", 1000.0), row("mosec", 2000.0), row("bentoml", 10.0, errors=3), row("mosec", 5.0, "mlp")]
    heading, rule, *lines = peertell.table(rows, [{"server": "triton", "model": "mlp", "why": "not installed: no"}])
    assert lines[0] == "| tiny | 64 | mosec 0.9.8 | raw bytes | 2000 | 1.00 | 2.00 | 500.0 |"
    assert lines[1] == "| tiny | 64 | **Penstock** | v2 binary | 1000 | 1.00 | 2.00 | 1000.0 |"
    assert "| 10 (3 errors) |" in lines[2]
    assert lines[3].startswith("| mlp | 64 | mosec 0.9.8 |")
    assert lines[4].startswith(
        "| mlp | | tritonserver of PyTriton 0.7.0, Python backend | v2 binary | not installed: no"
    )
    assert {line.count("|") for line in (heading, rule, *lines)} == {9}


def test_the_short_table_has_a_line_for_each_server_at_one_number_of_connections() -> None:
    rows = [row("penstock", 1000.0), row("mosec", 2000.0), {**row("mosec", 9.0), "connections": 256}]
    rows += [row("penstock", 5.0, "image"), {**row("penstock", 7.0, "image"), "connections": 16}]
    assert peertell.shown_cases(rows) == {"tiny": 64, "image": 16}
    heading, _, *lines = peertell.short_table(rows)
    assert heading == "| server | asked in | tiny, 64 connections | image, 16 connections |"
    assert lines == [
        "| mosec 0.9.8 | raw bytes | 2,000/s, 500 µs, 1 / 2 ms | not measured |",
        "| **Penstock** | v2 binary | 1,000/s, 1,000 µs, 1 / 2 ms | 7/s, 142,857 µs, 1 / 2 ms |",
    ]
    assert peertell.shown_cases(rows[2:3]) == {"tiny": 256}


def test_all_is_told_from_what_the_file_has() -> None:
    about = {"machine": {"date": "today", "cpu": "2 cores"}, "seconds": 2, "repeats": 3, "peers": ["mosec"]}
    lines = peertell.tell({**about, "cases": [row("mosec", 2000.0)], "failed": []})
    assert lines[:2] == ["date today, cpu 2 cores", "medians of 3 turns of 2 s"]
    assert sum(line.startswith("| mosec 0.9.8 |") for line in lines) == 2


def test_what_each_leaves_out_is_told() -> None:
    lines = peertell.about_servers(list(peerlist.PEERS))
    assert len(lines) == 2 + len(peerlist.PEERS)
    assert {line.count("|") for line in lines} == {5}
    assert "| mosec 0.9.8 | raw bytes | 1 ms | no protocol" in lines[3]


def test_servers_have_one_order_in_the_plot() -> None:
    rows = [row("a", 5.0), row("b", 9.0), row("c", 99.0, "mlp"), row("a", 50.0, "mlp")]
    assert peertell.order(rows, ["tiny", "mlp"]) == ["b", "a", "c"]


def test_the_plot_is_a_small_picture(tmp_path: Path) -> None:
    rows = [row("penstock", 1000.0), row("mosec", 2000.0)]
    path = tmp_path / "peers.png"
    assert peertell.draw({"cases": rows, "machine": {"cpu": "x", "date": "y"}}, path)
    assert path.read_bytes().startswith(b"\x89PNG")
    assert path.stat().st_size < 150_000


# --- what is refused ---


@pytest.mark.parametrize(
    ("argument", "said"),
    [
        (
            "--peers=mosec,triiton",
            "argument --peers: 'triiton' is none of fastapi, mosec, triton, pytriton, mlserver, ",
        ),
        ("--models=huge", "argument --models: 'huge' is none of tiny, wide, mlp, image, heavy"),
        ("--connections=0", "argument --connections: '0' is no whole number from 1 on"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_anything_is_installed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], argument: str, said: str
) -> None:
    monkeypatch.setattr(sys, "argv", ["peers.py", argument])
    with pytest.raises(SystemExit) as stopped:
        peers.main()
    assert stopped.value.code == 2
    assert said in capsys.readouterr().err
