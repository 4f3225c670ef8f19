"""Jobs with real processes: asked for in every protocol, waited for, cancelled, called back, and none lost or answered
twice whatever ends meanwhile."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import os
import queue
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import numpy as np
import pytest

from penstock.client import Client, Job, PenstockError, as_completed, verify_callback
from penstock.wire import errors
from tests.jobs.redisserver import RedisServer
from tests.system.models import dense, lookup, write
from tests.system.servers import DEADLINE_S, PENSTOCK, Server, StartServer, wait_for

X = np.array([[1, 2, 3, 4]], np.float32)
WEIGHTS = np.random.default_rng(0).standard_normal((4, 3)).astype(np.float32)  # those of dense()
V2 = json.dumps({"inputs": [{"name": "x", "shape": [1, 4], "datatype": "FP32", "data": [1, 2, 3, 4]}]}).encode()
HEAD = json.dumps(
    {
        "inputs": [{"name": "x", "shape": [1, 4], "datatype": "FP32", "parameters": {"binary_data_size": 16}}],
        "parameters": {"binary_data_output": True},
    }
).encode()
LATER = {"Prefer": "respond-async"}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``patient`` waits until four rows are there, or for longer than a test takes."""
    path = tmp_path_factory.mktemp("models")
    write(path, "dense", dense())
    write(path, "lookup", lookup())
    write(path, "patient", dense(), config='max_batch_size = 4\nmax_queue_delay = "60s"\n')
    return path


@pytest.fixture(scope="module")
def server(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    directory = tmp_path_factory.mktemp("jobs")
    (directory / "penstock.toml").write_text("[jobs]\ndrain_max_s = 0.2\n")
    server = Server(directory / "run", str(models), f"--config={directory / 'penstock.toml'}")
    yield server
    server.check_clean_end()


@pytest.fixture
def client(server: Server) -> Iterator[Client]:
    with Client(server.runtime) as client:
        yield client


def submit(server: Server, path: str, body: bytes = V2, headers: dict[str, str] | None = None) -> str:
    """A job's id."""
    status, found, said = server.request("POST", path, body, LATER | (headers or {}))
    assert status == 202, said
    about = json.loads(said)
    assert list(about) == ["id", "status"]
    assert found["location"] == f"/v2/jobs/{about['id']}"
    assert found["preference-applied"] == "respond-async"
    return str(about["id"])


def about(server: Server, job: str, more: str = "") -> dict[str, Any]:
    status, _, said = server.request("GET", f"/v2/jobs/{job}{more}")
    assert status == 200, said
    found: dict[str, Any] = json.loads(said)
    return found


def wait_until(server: Server, job: str, status: str) -> dict[str, Any]:
    found: dict[str, Any] = wait_for(
        lambda: found if (found := about(server, job))["status"] == status else None, f"a job that is {status}"
    )
    return found


def release(server: Server, *jobs: str) -> None:
    """Have jobs for the model that waits for four rows end: others come, again where those were not there yet."""
    tensor = {"name": "x", "shape": [4 - len(jobs), 4], "datatype": "FP32", "data": [0] * 4 * (4 - len(jobs))}
    body = json.dumps({"inputs": [tensor]}).encode()

    def ended() -> bool:
        server.request("POST", "/v2/models/patient/infer", body, {"Penstock-Timeout": "1"})
        return all(about(server, job, "?wait=0.5")["ended_at"] is not None for job in jobs)

    wait_for(ended, "jobs to end")


def check_result(outputs: Any) -> None:
    np.testing.assert_allclose(np.array(outputs, np.float32).reshape(1, 3), X @ WEIGHTS, rtol=1e-5)


# --- in every protocol ---


class Spoken(NamedTuple):
    """A request of a protocol. ``read``: from the body of its answer to the outputs."""

    path: str
    body: bytes
    headers: dict[str, str]
    read: Callable[[bytes], Any]


PROTOCOLS = {
    "v2": Spoken("/v2/models/dense/infer", V2, {}, lambda body: json.loads(body)["outputs"][0]["data"]),
    "binary": Spoken(
        "/v2/models/dense/infer",
        HEAD + X.tobytes(),
        {"Inference-Header-Content-Length": str(len(HEAD))},
        lambda body: np.frombuffer(body[-12:], np.float32),
    ),
    "raw": Spoken(
        "/v2/models/dense/versions/1/infer",
        X.tobytes(),
        {"Inference-Header-Content-Length": "0"},
        lambda body: np.frombuffer(body[-12:], np.float32),
    ),
    "plain": Spoken("/v2/models/dense/predict", b'{"x": [[1, 2, 3, 4]]}', {}, lambda body: json.loads(body)["y"]),
    "tfs": Spoken(
        "/v1/models/dense:predict",
        b'{"instances": [[1, 2, 3, 4]]}',
        {},
        lambda body: json.loads(body)["predictions"],
    ),
}


@pytest.mark.parametrize("name", PROTOCOLS)
def test_every_protocol_has_jobs(server: Server, name: str) -> None:
    path, body, headers, read = PROTOCOLS[name]
    straight = server.request("POST", path, body, headers)
    job = submit(server, path, body, headers)
    status, found, said = server.request("GET", f"/v2/jobs/{job}/result?wait=20")
    assert status == 200
    assert said == straight[2]
    check_result(read(said))
    for header in ("content-type", "inference-header-content-length"):
        assert found.get(header) == straight[1].get(header)
    told = about(server, job)
    assert (told["status"], told["model"], told["http_status"], told["attempts"]) == ("succeeded", "dense", 200, 1)
    assert told["submitted_at"] <= told["started_at"] <= told["ended_at"] < told["expires_at"]
    if name in ("binary", "raw"):
        assert "result" not in told
    else:
        assert told["result"] == json.loads(said)


def test_a_compressed_request_is_a_job_too(server: Server) -> None:
    import gzip

    job = submit(server, "/v2/models/dense/infer", gzip.compress(V2), {"Content-Encoding": "gzip"})
    check_result(about(server, job, "?wait=20")["result"]["outputs"][0]["data"])


@pytest.mark.parametrize(
    ("path", "body", "status", "said"),
    [
        ("/v2/models/dense/infer", b"{", 400, "not JSON"),
        ("/v2/models/dense/infer", b'{"inputs": []}', 400, "x"),
        ("/v2/models/nothing/infer", V2, 404, "nothing"),
        ("/v2/models/dense/predict", b'{"z": 1}', 400, "z"),
        ("/v1/models/dense:predict", b'{"instances": "x"}', 400, "instances"),
        ("/v2/models/dense/infer?callback_url=ftp://a/", V2, 400, "callback_url"),
        ("/v2/models/dense/infer?callback_url=http://127.0.0.1/", V2, 400, "127.0.0.1"),
        ("/v2/models/dense/infer?callback_url=http%3A%2F%2F%5B%3A%3A1%5D%2F", V2, 400, "::1"),
        ("/v2/models/dense/infer?callback_url=http://a.b/&callback_url=http://a.b/", V2, 400, "more than once"),
    ],
)
def test_what_is_wrong_is_said_at_once(server: Server, path: str, body: bytes, status: int, said: str) -> None:
    before = json.loads(server.request("GET", "/v2/jobs?limit=1000")[2])["jobs"]
    answer = server.request("POST", path, body, LATER)
    assert answer[0] == status
    assert said in json.loads(answer[2])["error"]
    assert len(json.loads(server.request("GET", "/v2/jobs?limit=1000")[2])["jobs"]) == len(before)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v2/models/dense/infer?callback_url=https://a.example/", V2),
        ("/v2/models/dense/infer?x=1&callback%5furl=https://a.example/", V2),
        ("/v1/models/dense:predict?callback_url=https://a.example/", b'{"instances": [[1, 2, 3, 4]]}'),
        ("/v2/models/dense/infer", V2[:-1] + b', "parameters": {"callback_url": "https://a.example/"}}'),
    ],
)
def test_only_jobs_are_called_back(server: Server, path: str, body: bytes) -> None:
    for _ in range(2):  # the head is remembered
        status, _, said = server.request("POST", path, body)
        assert status == 400
        assert "Prefer: respond-async" in json.loads(said)["error"]


@pytest.mark.parametrize("prefer", ["wait=5", "respond-async-not", "handling=lenient"])
def test_other_preferences_are_not_ours(server: Server, prefer: str) -> None:
    assert server.request("POST", "/v2/models/dense/infer", V2, {"Prefer": prefer})[0] == 200


@pytest.mark.parametrize("prefer", ["respond-async, wait=100", "wait=1,Respond-Async; a=b"])
def test_preferences_are_read_as_they_are_written(server: Server, prefer: str) -> None:
    assert server.request("POST", "/v2/models/dense/infer", V2, {"Prefer": prefer})[0] == 202


def test_a_request_that_fails_is_a_failed_job(server: Server) -> None:
    body = json.dumps({"inputs": [{"name": "i", "shape": [1], "datatype": "INT64", "data": [9]}]}).encode()
    straight = server.request("POST", "/v2/models/lookup/infer", body)
    job = submit(server, "/v2/models/lookup/infer", body)
    found = about(server, job, "?wait=20")
    assert (found["status"], found["http_status"]) == ("failed", straight[0])
    assert "result" not in found
    status, _, said = server.request("GET", f"/v2/jobs/{job}/result")
    assert status == straight[0] == 500
    assert json.loads(said)["error"] == found["error"]
    assert "lookup" in found["error"]


def test_the_time_of_a_job_is_that_of_its_run(server: Server) -> None:
    job = submit(server, "/v2/models/dense/infer", V2, {"Penstock-Timeout": "0.000001"})
    found = about(server, job, "?wait=20")
    assert (found["status"], found["http_status"]) == ("failed", 504)


# --- waiting, and cancelling ---


def test_a_long_poll_ends_with_the_job_and_not_before(server: Server) -> None:
    job = submit(server, "/v2/models/patient/infer")
    status, found, said = server.request("GET", f"/v2/jobs/{job}?wait=0.3")
    assert status == 200
    assert found["retry-after"] == "1"
    assert json.loads(said)["status"] in ("queued", "running")
    status, _, said = server.request("GET", f"/v2/jobs/{job}/result?wait=0.1")
    assert status == 202
    assert json.loads(said)["id"] == job
    wait_until(server, job, "running")
    with ThreadPoolExecutor(3) as threads:
        waiting = [
            threads.submit(server.request, "GET", path)
            for path in (f"/v2/jobs/{job}?wait=25", f"/v2/jobs/{job}/result?wait=25", f"/v2/jobs?id={job}&wait=25")
        ]
        release(server, job)
        one, result, several = [each.result(DEADLINE_S) for each in waiting]
    assert json.loads(one[2])["status"] == "succeeded"
    check_result(json.loads(result[2])["outputs"][0]["data"])
    assert [each["id"] for each in json.loads(several[2])["jobs"]] == [job]


@pytest.mark.parametrize("query", ["wait=61", "wait=-1", "wait=nan", "wait=1e1", "wait=x"])
def test_a_wait_that_is_none_is_400(server: Server, query: str) -> None:
    status, _, said = server.request("GET", f"/v2/jobs/{'0' * 32}?{query}")
    assert status == 400
    assert "'wait'" in json.loads(said)["error"]


@pytest.mark.parametrize("query", ["status=lost", "limit=0", "limit=1001", "limit=x", "id=%20", f"id={'a' * 65}"])
def test_a_list_of_what_cannot_be_is_400(server: Server, query: str) -> None:
    status, _, said = server.request("GET", f"/v2/jobs?{query}")
    assert status == 400
    assert f"'{query.partition('=')[0]}'" in json.loads(said)["error"]


def test_a_running_job_is_cancelled(server: Server) -> None:
    job = submit(server, "/v2/models/patient/infer")
    wait_until(server, job, "running")
    status, _, said = server.request("DELETE", f"/v2/jobs/{job}")
    assert status == 200
    assert json.loads(said)["id"] == job
    found = wait_until(server, job, "cancelled")
    assert found["http_status"] is None
    assert server.request("GET", f"/v2/jobs/{job}/result")[0] == 499
    status, _, said = server.request("DELETE", f"/v2/jobs/{job}")  # again
    assert status == 200
    assert json.loads(said)["status"] == "cancelled"
    # Its row has left the batch that it waited for.
    other = submit(server, "/v2/models/patient/infer")
    wait_until(server, other, "running")
    release(server, other)
    assert about(server, other, "?wait=20")["status"] == "succeeded"


def test_a_queued_job_is_cancelled_and_an_ended_one_is_not(server: Server) -> None:
    [runner] = server.children("jobs")
    os.kill(runner, signal.SIGSTOP)
    try:
        job = submit(server, "/v2/models/dense/infer")
        assert about(server, job)["status"] == "queued"
        status, _, said = server.request("DELETE", f"/v2/jobs/{job}")
        assert (status, json.loads(said)["status"]) == (200, "cancelled")
    finally:
        os.kill(runner, signal.SIGCONT)
    done = submit(server, "/v2/models/dense/infer")
    assert about(server, done, "?wait=20")["status"] == "succeeded"
    status, _, said = server.request("DELETE", f"/v2/jobs/{done}")
    assert (status, json.loads(said)["status"]) == (200, "succeeded")
    assert about(server, done)["status"] == "succeeded"


def test_a_job_that_never_was_is_404(server: Server) -> None:
    for method, path in (("GET", ""), ("GET", "/result"), ("DELETE", "")):
        status, _, said = server.request(method, f"/v2/jobs/{'0' * 32}{path}")
        assert status == 404
        assert json.loads(said)["error"] == f"there is no job '{'0' * 32}'"
    found = json.loads(server.request("GET", f"/v2/jobs?id={'0' * 32}&wait=20")[2])["jobs"]
    assert [(each["id"], each["status"]) for each in found] == [("0" * 32, "unknown")]


def test_the_routes_say_what_they_take(server: Server) -> None:
    status, found, _ = server.request("POST", "/v2/jobs")
    assert (status, found["allow"]) == (405, "GET, HEAD, OPTIONS")
    status, found, _ = server.request("OPTIONS", "/v2/jobs/x")
    assert (status, found["allow"]) == (204, "DELETE, GET, HEAD, OPTIONS")


def test_jobs_are_listed_page_by_page(server: Server) -> None:
    jobs = [submit(server, "/v2/models/dense/infer") for _ in range(5)]
    for job in jobs:
        about(server, job, "?wait=20")
    first = json.loads(server.request("GET", "/v2/jobs?limit=2&status=succeeded")[2])["jobs"]
    more = json.loads(server.request("GET", f"/v2/jobs?limit=3&after={first[-1]['id']}")[2])["jobs"]
    assert [each["id"] for each in first + more] == jobs[::-1]
    assert all("result" not in each for each in first)


# --- limits ---


def test_full_and_forgotten(models: Path, start_server: StartServer, tmp_path: Path) -> None:
    """503 naming the bound, 410 for a job whose time to live is over, 404 for none."""
    config = tmp_path / "penstock.toml"
    config.write_text("[jobs]\ncount_max = 3\nttl_s = 2.0\ndrain_max_s = 0.0\n")
    server = start_server(str(models), f"--config={config}")
    jobs = [submit(server, "/v2/models/dense/infer") for _ in range(3)]
    status, found, said = server.request("POST", "/v2/models/dense/infer", V2, LATER)
    assert status == 503
    assert int(found["retry-after"]) >= 1
    assert "count_max" in json.loads(said)["error"]
    assert server.infer("dense", json.loads(V2))[0] == 200  # which is not a job
    for path in ("", "/result"):
        wait_for(partial(gone, server, f"{jobs[0]}{path}"), "a job to be forgotten")
    assert server.request("DELETE", f"/v2/jobs/{jobs[0]}")[0] == 410
    assert server.request("GET", f"/v2/jobs/{'0' * 32}")[0] == 404
    wait_for(lambda: server.request("POST", "/v2/models/dense/infer", V2, LATER)[0] == 202, "room")


def test_too_many_long_polls_are_refused(models: Path, start_server: StartServer, tmp_path: Path) -> None:
    config = tmp_path / "penstock.toml"
    config.write_text("[jobs]\nwaiting_max = 1\ndrain_max_s = 0.0\n[gateway]\ndrain_idle_s = 0.2\n")
    server = start_server(str(models), f"--config={config}")
    job = submit(server, "/v2/models/patient/infer")
    with ThreadPoolExecutor(2) as threads:
        waiting = {threads.submit(server.request, "GET", f"/v2/jobs/{job}?wait=30") for _ in range(2)}
        [refused], [one] = wait(waiting, timeout=DEADLINE_S, return_when=FIRST_COMPLETED)
        status, _, said = refused.result(DEADLINE_S)
        assert status == 503
        assert "waiting_max" in json.loads(said)["error"]
        # Whoever waits does not keep a gateway that is to end.
        begin = time.monotonic()
        server.send(signal.SIGTERM)
        assert one.result(DEADLINE_S)[0] == 200
        assert time.monotonic() - begin < 10


def test_without_jobs_everything_is_answered_at_once(models: Path, start_server: StartServer) -> None:
    server = start_server(str(models), "--jobs=off")
    assert server.children("jobs") == []
    status, found, said = server.request("POST", "/v2/models/dense/infer", V2, LATER)
    assert status == 200
    assert "preference-applied" not in found
    check_result(json.loads(said)["outputs"][0]["data"])
    status, _, said = server.request("POST", "/v2/models/dense/infer?callback_url=http://a.example/", V2, LATER)
    assert status == 501
    assert "[jobs] store is off" in json.loads(said)["error"]
    assert server.request("GET", "/v2/jobs")[0] == 404
    with Client(server.runtime) as client, pytest.raises(PenstockError, match="keeps no jobs") as raised:
        client.submit_job("dense", {"x": X})
    assert raised.value.code == errors.UNSUPPORTED


def test_a_store_that_cannot_be_opened_harms_nobody_else(
    models: Path, start_server: StartServer, tmp_path: Path
) -> None:
    server = start_server(str(models), f"--jobs={tmp_path / 'nowhere' / 'below'}")
    (tmp_path / "nowhere").write_text("a file where a directory would be")
    assert server.infer("dense", json.loads(V2))[0] == 200
    status, found, said = server.request("POST", "/v2/models/dense/infer", V2, LATER)
    assert (status, found["retry-after"]) == (503, "1")
    assert "nowhere" in json.loads(said)["error"]
    assert server.request("GET", "/v2/jobs")[0] == 503


# --- nothing is lost ---


def kill(server: Server, role: str) -> None:
    """-9, and wait for the server to serve again."""
    [pid] = server.children(role)
    os.kill(pid, signal.SIGKILL)
    wait_for(lambda: server.children(role) not in ([], [pid]), f"another {role}")
    wait_for(lambda: is_ready(server), "a server that is ready")


def is_ready(server: Server) -> bool:
    with contextlib.suppress(OSError, http.client.HTTPException):
        return server.request("GET", "/v2/health/ready")[0] == 200
    return False


def gone(server: Server, job: str) -> bool:
    return server.request("GET", f"/v2/jobs/{job}")[0] == 410


def test_a_job_survives_everything(models: Path, start_server: StartServer, tmp_path: Path) -> None:
    """kill -9 of every process, one after another while it runs, and of all at once."""
    config = tmp_path / "penstock.toml"
    config.write_text("[jobs]\nlease_s = 2.0\n[broker]\nattempts_max = 10\n")
    run = [str(models), f"--config={config}"]
    first = start_server(*run)
    job = submit(first, "/v2/models/patient/infer")
    early = submit(first, "/v2/models/dense/infer")  # whose result is there already
    result = about(first, early, "?wait=20")["result"]
    for role in ("broker", "gateway", "jobs"):
        wait_until(first, job, "running")
        kill(first, role)
    assert about(first, early)["result"] == result
    wait_for(lambda: about(first, job)["attempts"] == 2, "the job to be run by the next")
    children = first.children()
    for pid in (first.pid, *children):
        os.kill(pid, signal.SIGKILL)
    first.wait()
    wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in children), "their end")

    second = Server(first.runtime, *run)
    try:
        assert about(second, early)["result"] == result
        wait_until(second, job, "running")
        wait_for(lambda: runs(second), "the job at the worker")
        kill(second, "worker")  # what is run again does not wait for others
        found = about(second, job, "?wait=25")
        assert found["status"] == "succeeded"
        check_result(found["result"]["outputs"][0]["data"])
        assert found["attempts"] == 3  # runners that ran it
        assert [each["id"] for each in json.loads(second.request("GET", "/v2/jobs")[2])["jobs"]] == [early, job]
    finally:
        second.check_clean_end()


def test_what_runs_when_the_server_stops_is_run_by_the_next(
    models: Path, start_server: StartServer, tmp_path: Path
) -> None:
    config = tmp_path / "penstock.toml"
    config.write_text("[jobs]\ndrain_max_s = 0.2\n")
    first = start_server(str(models), f"--config={config}")
    jobs = [submit(first, "/v2/models/patient/infer") for _ in range(2)]
    for job in jobs:
        wait_until(first, job, "running")
    first.check_clean_end()
    where = [f"--runtime-dir={first.runtime}", f"--config={config}"]
    shown = json.loads(subprocess.check_output([*PENSTOCK, "jobs", "ls", "--json", *where], timeout=DEADLINE_S))
    assert {each["id"]: each["status"] for each in shown} == dict.fromkeys(jobs, "queued")
    second = Server(first.runtime, str(models), f"--config={config}")
    try:
        for job in jobs:
            wait_until(second, job, "running")
        release(second, *jobs)
        for job in jobs:
            check_result(about(second, job, "?wait=20")["result"]["outputs"][0]["data"])
    finally:
        second.check_clean_end()


def test_a_rolling_restart_and_another_configuration_lose_no_job(
    models: Path, start_server: StartServer, tmp_path: Path
) -> None:
    config = tmp_path / "penstock.toml"
    config.write_text("[jobs]\ndrain_max_s = 0.2\n")
    server = start_server(str(models), f"--config={config}")
    job = submit(server, "/v2/models/patient/infer")
    wait_until(server, job, "running")
    [before] = server.children("jobs")
    command = [*PENSTOCK, "restart", "jobs", "gateway", f"--runtime-dir={server.runtime}"]
    subprocess.run(command, check=True, timeout=DEADLINE_S, capture_output=True)
    [after] = server.children("jobs")
    assert after != before
    wait_until(server, job, "running")
    [gateway] = server.children("gateway")
    config.write_text("[jobs]\ndrain_max_s = 0.2\nttl_s = 100\n")
    wait_for(
        lambda: server.children("jobs") not in ([], [after]) and len(server.children("jobs")) == 1, "another runner"
    )
    wait_for(lambda: gateway not in server.children("gateway"), "another gateway")
    wait_until(server, job, "running")
    release(server, job)
    found = about(server, job, "?wait=20")
    assert found["status"] == "succeeded"
    config.write_text('[jobs]\nstore = "off"\n')
    wait_for(lambda: server.children("jobs") == [], "no runner")
    wait_for(lambda: server.request("GET", "/v2/jobs")[0] == 404, "no jobs")
    config.write_text("[jobs]\ndrain_max_s = 0.2\n")
    wait_for(lambda: len(server.children("jobs")) == 1, "a runner again")
    wait_for(lambda: server.request("GET", f"/v2/jobs/{job}")[0] == 200, "the job again")


# --- callbacks ---


class Hook(NamedTuple):
    """Somebody who is called back. ``answers``: what to answer, one after another, the last one for ever."""

    url: str
    calls: queue.Queue[tuple[dict[str, str], bytes]]
    answers: list[int]


@pytest.fixture
def hook() -> Iterator[Hook]:
    calls: queue.Queue[tuple[dict[str, str], bytes]] = queue.Queue(100)
    answers = [200]

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            calls.put((dict(self.headers.items()), self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(answers.pop(0) if len(answers) > 1 else answers[0])
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, format: str, *arguments: Any) -> None: ...

    listening = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=listening.serve_forever)
    thread.start()
    yield Hook(f"http://127.0.0.1:{listening.server_port}/done?a=b", calls, answers)
    listening.shutdown()
    thread.join(DEADLINE_S)
    listening.server_close()


def secret_of(*where: str) -> str:
    return subprocess.check_output([*PENSTOCK, "jobs", "secret", *where], timeout=DEADLINE_S, text=True).strip()


@pytest.mark.parametrize("how", ["url", "parameters"])
def test_who_asked_is_called_back(
    models: Path, start_server: StartServer, tmp_path: Path, hook: Hook, how: str
) -> None:
    """Signed, and again when it was not taken; also after everything has ended by kill -9 in between."""
    config = tmp_path / "penstock.toml"
    config.write_text('[jobs]\ncallback_allow = ["127.0.0.0/8"]\n')
    server = start_server(str(models), f"--config={config}")
    hook.answers[:] = [500, 200]
    if how == "url":
        job = submit(server, f"/v2/models/dense/infer?callback_url={quote(hook.url, safe='')}")
    else:
        body = json.loads(V2) | {"parameters": {"callback_url": hook.url}}
        job = submit(server, "/v2/models/dense/infer", json.dumps(body).encode())
    hook.calls.get(timeout=DEADLINE_S)
    told = about(server, job)["callback"]
    assert (told["url"], told["attempts"]) == (hook.url, 1)
    children = server.children()
    for pid in (server.pid, *children):
        os.kill(pid, signal.SIGKILL)
    server.wait()
    wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in children), "their end")
    # Were the process killed before it could note the answer, the callback is due when its lease is over.
    second = Server(server.runtime, str(models), f"--config={config}")
    try:
        headers, body_ = hook.calls.get(timeout=90)
        secret = secret_of(f"--runtime-dir={server.runtime}", f"--config={config}")
        assert verify_callback(secret, headers, body_) == job
        with pytest.raises(PenstockError, match="not signed with this secret"):
            verify_callback(secret, headers, body_ + b" ")
        found = json.loads(body_)
        assert (found["id"], found["status"]) == (job, "succeeded")
        check_result(found["result"]["outputs"][0]["data"])
        wait_for(lambda: about(second, job)["callback"]["state"] == "delivered", "the callback to be noted")
    finally:
        second.check_clean_end()


# --- hosts that share a store ---


def test_two_servers_share_a_store(
    models: Path,
    start_server: StartServer,
    tmp_path_factory: pytest.TempPathFactory,
    require_command: Callable[[str, str], str],
    tmp_path: Path,
) -> None:
    """What one takes in, the other tells of, and runs when the first has no runner; each job ends once."""
    command = require_command("redis-server", "redis-server")
    config = tmp_path / "penstock.toml"
    config.write_text("[jobs]\nlease_s = 1.0\nrunning_max = 2\n")
    with RedisServer(command, tmp_path_factory.mktemp("redis")) as redis:
        run = [str(models), f"--jobs={redis.url}", f"--config={config}"]
        one, other = start_server(*run), start_server(*run)
        jobs = [submit(server, "/v2/models/dense/infer") for _ in range(10) for server in (one, other)]
        for job in jobs:
            for server in (one, other):
                check_result(about(server, job, "?wait=20")["result"]["outputs"][0]["data"])
        assert {about(one, job)["attempts"] for job in jobs} == {1}
        # Its host is gone for good, and with it what ran there.
        job = submit(one, "/v2/models/patient/infer")
        wait_until(other, job, "running")
        holders = wait_for(lambda: [server for server in (one, other) if runs(server)], "it at a worker")
        [holder] = holders
        [left] = [server for server in (one, other) if server is not holder]
        pids = [holder.pid, *holder.children()]
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        holder.wait()
        wait_for(lambda: about(left, job)["attempts"] == 2, "the job to be run by the other")
        wait_until(left, job, "running")
        wait_for(lambda: runs(left), "the job at its worker")
        release(left, job)
        check_result(about(left, job, "?wait=20")["result"]["outputs"][0]["data"])
        for path in holder.runtime.iterdir():
            path.unlink()
        left.check_clean_end()


def runs(server: Server) -> bool:
    metrics = server.metrics()
    return any(
        value
        for name, value in metrics.items()
        if 'model="patient"' in name and name.startswith(("penstock_queue_requests{", "penstock_running_requests{"))
    )


# --- the client library ---


def test_a_client_has_jobs(client: Client, server: Server) -> None:
    job = client.submit_job("dense", {"x": X})
    with job.result(20) as result:
        check_result(result["y"])
        assert (result.model, result.version) == ("dense", "1")
        assert result.timing.batch_rows >= 1
        assert result.timing.worker.startswith("cpu")
    assert job.done()
    assert job.status() == "succeeded"
    assert not job.cancel()
    again = client.job(job.id)
    check_result(again.result(20)["y"])
    named = client.submit_job("dense", {"x": [[1, 2, 3, 4]]}, version="1", outputs=["y"], priority=5, tenant="gold")
    check_result(named.result(20)["y"])
    check_result(client.job(submit(server, "/v2/models/dense/infer")).result(20)["y"])  # with JSON
    with Client(server.runtime / "nowhere", http=server.url) as remote:
        check_result(remote.job(job.id).result(20)["y"])


def test_what_is_wrong_is_the_same_error(client: Client) -> None:
    cases: list[tuple[str, Callable[[], object]]] = [
        (errors.NOT_FOUND, lambda: client.submit_job("nothing", {"x": X})),
        (errors.BAD_INPUT, lambda: client.submit_job("dense", {"x": X[:, :2]})),
        (errors.BAD_INPUT, lambda: client.submit_job("dense", {"x": [["a"]]})),
        (errors.BAD_INPUT, lambda: client.submit_job("dense", {"x": X}, callback_url="http://10.1.2.3/")),
        (errors.NOT_FOUND, lambda: client.job("nothing").result(1)),
        (errors.NOT_FOUND, lambda: client.job("nothing").status()),
        (errors.NOT_FOUND, lambda: client.job("nothing").cancel()),
    ]
    for code, do in cases:
        with pytest.raises(PenstockError) as raised:
            do()
        assert raised.value.code == code
    job = client.submit_job("dense", {"x": X}, time_limit=1e-6)
    with pytest.raises(PenstockError) as raised:
        job.result(20)
    assert raised.value.code == errors.DEADLINE
    assert job.status() == "failed"


def test_a_client_waits_no_longer_than_it_likes_and_cancels(client: Client) -> None:
    job = client.submit_job("patient", {"x": X})
    with pytest.raises(PenstockError, match=r"has not ended within 0\.2 s; it goes on"):
        job.result(0.2)
    assert job.cancel()
    with pytest.raises(PenstockError) as raised:
        job.result(20)
    assert raised.value.code == errors.CANCELLED


def test_callbacks_of_jobs(client: Client) -> None:
    ended: queue.Queue[Job] = queue.Queue(10)
    waits = client.submit_job("patient", {"x": X})
    waits.add_done_callback(ended.put)
    quick = client.submit_job("dense", {"x": X})
    quick.add_done_callback(lambda job: 1 / 0)  # which keeps nobody else from theirs
    quick.add_done_callback(ended.put)
    assert ended.get(timeout=20) is quick
    waits.cancel()
    assert ended.get(timeout=20) is waits


@pytest.mark.parametrize("count", [50, 300])
def test_as_completed(client: Client, count: int) -> None:
    with ThreadPoolExecutor(4) as threads:
        jobs = list(threads.map(lambda number: client.submit_job("dense", {"x": X * number}), range(count)))
    found = {}
    for job in as_completed(jobs, timeout=60):
        assert job.id not in found
        found[job.id] = job.result(20)["y"]
    for number, job in enumerate(jobs):
        np.testing.assert_allclose(found[job.id], X @ WEIGHTS * number, rtol=1e-4, atol=1e-5)


def test_the_first_to_end_comes_first(client: Client) -> None:
    slow = client.submit_job("patient", {"x": X})
    quick = client.submit_job("dense", {"x": X})
    order = iter(as_completed([slow, quick, client.job("0" * 32)], timeout=30))
    assert {next(order).id, next(order).id} == {quick.id, "0" * 32}
    assert slow.cancel()
    assert next(order) is slow
    late = client.submit_job("patient", {"x": X})
    with pytest.raises(PenstockError, match=r"1 of 1 jobs have not ended within 0\.1 s"):
        list(as_completed([late], timeout=0.1))
    late.cancel()


def test_with_an_event_loop(client: Client) -> None:
    async def run() -> None:
        jobs = [client.submit_job("dense", {"x": X}) for _ in range(10)]
        found = [job async for job in as_completed(jobs, timeout=30)]
        assert {job.id for job in found} == {job.id for job in jobs}
        check_result((await found[0])["y"])

    asyncio.run(run())


def test_a_result_is_waited_for_through_a_restart(models: Path, start_server: StartServer, tmp_path: Path) -> None:
    config = tmp_path / "penstock.toml"
    config.write_text("[jobs]\ndrain_max_s = 0.2\n[gateway]\ndrain_idle_s = 0.2\n")
    first = start_server(str(models), f"--config={config}")
    with Client(first.runtime) as client, ThreadPoolExecutor(2) as threads:
        job = client.submit_job("patient", {"x": X})
        waits = threads.submit(job.result, 60)
        completes = threads.submit(lambda: [each.id for each in as_completed([job], timeout=60)])
        wait_until(first, job.id, "running")
        first.check_clean_end()
        second = Server(first.runtime, str(models), f"--config={config}")
        try:
            wait_until(second, job.id, "running")
            release(second, job.id)
            check_result(waits.result(60)["y"])
            assert completes.result(60) == [job.id]
        finally:
            second.check_clean_end()


# --- the commands ---


def test_jobs_from_the_command_line(server: Server) -> None:
    where = f"--runtime-dir={server.runtime}"

    def say(*arguments: str, code: int = 0) -> str:
        shown = subprocess.run(
            [*PENSTOCK, "jobs", *arguments, where], capture_output=True, text=True, check=False, timeout=DEADLINE_S
        )
        assert shown.returncode == code, shown
        return shown.stdout if code == 0 else shown.stderr

    done = submit(server, "/v2/models/dense/infer")
    about(server, done, "?wait=20")
    waits = submit(server, "/v2/models/patient/infer")
    wait_until(server, waits, "running")
    lines = say("ls", "--limit=2").splitlines()
    assert lines[0].split() == ["ID", "STATUS", "MODEL", "AGE", "TOOK", "ATTEMPTS"]
    assert [line.split()[:3] for line in lines[1:]] == [[waits, "running", "patient"], [done, "succeeded", "dense"]]
    assert waits in [each["id"] for each in json.loads(say("ls", "--json", "--status=running"))]
    check_result(json.loads(say("show", done))["result"]["outputs"][0]["data"])
    check_result(json.loads(say("show", done, "--result"))["outputs"][0]["data"])
    assert say("cancel", waits) == f"{waits}: is told to end\n"
    wait_until(server, waits, "cancelled")
    assert say("cancel", waits, done) == f"{waits}: cancelled\n{done}: succeeded\n"
    assert say("show", "nothing", code=1) == "penstock: there is no job 'nothing'\n"
    assert say("show", waits, "--result", code=1) == f"penstock: job '{waits}' is cancelled, and has no response\n"
    assert say("secret").startswith("whsec_")
    assert say("secret") == say("secret")
