"""``penstock up`` as a user meets it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest

from penstock.client import Client
from tests.system.models import dense, never_ends, write
from tests.system.servers import PENSTOCK, Process, Server, StartServer, wait_for

ROOT = Path(__file__).parents[2]
SEVEN = ROOT / "examples" / "digits" / "seven.json"
ONE_ROW = {"inputs": [{"name": "x", "shape": [1, 4], "datatype": "FP32", "data": [1, 2, 3, 4]}]}


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*PENSTOCK, *arguments], capture_output=True, text=True, timeout=60, check=False)


def test_without_arguments_the_bundled_model_is_served_by_http_command_and_client(start_server: StartServer) -> None:
    server = start_server()
    status, answer = server.infer("digits", json.loads(SEVEN.read_text()))
    assert status == 200
    assert answer["outputs"][0]["shape"] == [1, 10]
    assert int(np.argmax(answer["outputs"][0]["data"])) == 7

    printed = run("infer", "digits", str(SEVEN), f"--runtime-dir={server.runtime}")
    assert printed.returncode == 0, printed.stderr
    assert "largest at 7" in printed.stdout

    with Client(server.runtime) as client:
        scores = client.infer("digits", {"image": np.load(SEVEN.with_suffix(".npy"))})["scores"]
    np.testing.assert_allclose(scores.ravel(), answer["outputs"][0]["data"], rtol=1e-5)
    server.check_clean_end()


def test_a_single_file_is_served_under_its_name(start_server: StartServer, tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    onnx.save(dense(), path)
    server = start_server(str(path))
    status, answer = server.infer("net", ONE_ROW)
    assert (status, answer["model_name"], answer["model_version"]) == (200, "net", "1")


def test_a_repository_serves_the_highest_version_of_each_model(start_server: StartServer, tmp_path: Path) -> None:
    write(tmp_path / "models", "net", dense(2), "2")
    write(tmp_path / "models", "net", dense(10), "10")
    server = start_server(str(tmp_path / "models"))
    assert server.infer("net", ONE_ROW)[1]["model_version"] == "10"
    status, _, body = server.request("GET", "/v2/models/net/versions/2")
    assert status == 404
    assert json.loads(body)["error"] == "Request for unknown model: 'net' version 2 is not found"


def test_a_model_for_another_device_is_left_alone(start_server: StartServer, tmp_path: Path) -> None:
    models = str(tmp_path / "models")
    write(tmp_path / "models", "gpu", dense(), config='devices = ["cuda"]\n')
    done = run("up", models, "--device=cpu", f"--runtime-dir={tmp_path / 'run'}")
    assert done.returncode == 2
    assert done.stderr == (
        f"penstock: {models} has no model for cpu: see 'devices' in the model.toml of each, and --device\n"
    )
    write(tmp_path / "models", "net", dense())
    server = start_server(models, "--device=cpu")
    assert server.infer("net", ONE_ROW)[0] == 200
    assert server.infer("gpu", ONE_ROW)[0] == 404
    write(tmp_path / "others", "gpu", dense(), config='devices = ["cuda"]\n')
    arguments = ["worker", str(tmp_path / "others"), "--device=cpu", "--name=idle", f"--runtime-dir={server.runtime}"]
    idle = Process(arguments)
    wait_for(lambda: idle.said("models loaded"), "a worker that has nothing to do for now")
    wait_for(lambda: server.metrics()["penstock_workers"] == 2, "the broker to know it")
    assert server.infer("net", ONE_ROW)[0] == 200
    assert idle.end() == 0, idle.errors


def test_one_bad_model_among_good_ones_is_named_and_the_others_serve(start_server: StartServer, tmp_path: Path) -> None:
    write(tmp_path / "models", "good", dense())
    (tmp_path / "models" / "bad" / "1").mkdir(parents=True)
    (tmp_path / "models" / "bad" / "1" / "model.onnx").write_bytes(b"not a model")
    server = start_server(str(tmp_path / "models"))
    assert server.infer("good", ONE_ROW)[0] == 200
    status, headers, body = server.request("GET", "/v2/health/ready")
    assert (status, headers["retry-after"]) == (503, "1")
    assert "bad (UNAVAILABLE)" in json.loads(body)["error"]
    status, headers, body = server.request("POST", "/v2/models/bad/infer", json.dumps(ONE_ROW).encode())
    assert status == 503
    assert "cannot be loaded" in json.loads(body)["error"]
    listed = run("models", f"--runtime-dir={server.runtime}").stdout
    assert [line.split()[:3] for line in listed.splitlines()[1:]] == [
        ["bad", "1", "UNAVAILABLE"],
        ["good", "1", "READY"],
    ]
    assert "InvalidProtobuf" not in listed
    assert "cannot be loaded" in listed


def test_model_whose_warm_up_never_ends_is_named_and_the_others_serve(
    start_server: StartServer, tmp_path: Path
) -> None:
    write(tmp_path / "models", "good", dense())
    write(tmp_path / "models", "never", never_ends())
    config = tmp_path / "penstock.toml"
    config.write_text("[worker]\ntrial_max_s = 2\n")
    server = start_server(str(tmp_path / "models"), f"--config={config}")
    assert server.infer("good", ONE_ROW)[0] == 200
    listed = run("models", f"--runtime-dir={server.runtime}").stdout
    assert [line.split()[:3] for line in listed.splitlines()[1:]] == [
        ["good", "1", "READY"],
        ["never", "1", "UNAVAILABLE"],
    ]
    assert "its trial took longer than 2 s and was ended" in listed
    assert "raise [worker] trial_max_s" in listed


def test_two_workers_and_two_gateways_all_take_part(start_server: StartServer, repository: Path) -> None:
    server = start_server(str(repository), "--workers=2", "--gateways=2")
    assert len(server.children("worker")) == 2
    assert len(server.children("gateway")) == 2

    def all_have_worked() -> bool:
        for _ in range(20):
            assert server.infer("dense", ONE_ROW)[0] == 200
        metrics = server.metrics()
        workers = {name for name, value in metrics.items() if name.startswith("penstock_batch_rows_count") and value}
        gateways = {
            name
            for name, value in metrics.items()
            if name.startswith("penstock_http_responses_total") and 'code="200"' in name and value
        }
        return len(workers) == 2 and len(gateways) == 2

    wait_for(all_have_worked, "both workers and both gateways to have answered")
    assert server.metrics()["penstock_workers"] == 2


def test_requests_under_way_are_answered_when_it_is_told_to_stop(start_server: StartServer, tmp_path: Path) -> None:
    from tests.system.models import slow

    write(tmp_path / "models", "slow", slow(), config="max_batch_size = 1\n")
    server = start_server(str(tmp_path / "models"))
    with Client(server.runtime) as client:
        calls = [client.submit("slow", {"x": [[float(number)]]}) for number in range(20)]
        wait_for(lambda: server.metrics().get('penstock_running_requests{model="slow",version="1"}'), "work to begin")
        server.send(signal.SIGTERM)
        results = [call.result(30)["y"][0, 0] for call in calls]
    np.testing.assert_allclose(results, range(20), rtol=1e-4)
    assert server.wait() == 0


def test_the_processes_end_with_their_launcher_however_it_ends(start_server: StartServer) -> None:
    server = start_server()
    children = server.children()
    assert len(children) == 4
    server.send(signal.SIGKILL)
    server.wait()
    wait_for(lambda: not [pid for pid in children if Path(f"/proc/{pid}").exists()], "the processes to end")
    again = Server(server.runtime)  # what was left is in nobody's way
    again.check_clean_end()


def test_what_was_left_by_who_has_just_died_is_removed_when_the_server_stops(start_server: StartServer) -> None:
    """No others have been started meanwhile, who would do it."""
    server = start_server()
    [worker], [broker] = server.children("worker"), server.children("broker")
    os.kill(broker, signal.SIGKILL)
    os.kill(worker, signal.SIGKILL)
    server.check_clean_end()


def test_json_logs_are_one_object_a_line_with_the_request_id(start_server: StartServer, repository: Path) -> None:
    server = start_server(str(repository))
    status, answer = server.infer(
        "lookup", {"id": "order-66", "inputs": [{"name": "i", "shape": [1], "datatype": "INT64", "data": [99]}]}
    )
    assert status == 500
    assert answer["error"].startswith("[request id: order-66] model 'lookup' failed on this input")
    wait_for(lambda: any(line.get("request_id") == "order-66" for line in server.log()), "the log line")
    server.check_clean_end()
    assert all(line.startswith("{") for line in server.errors), "every line of the log is JSON"
    assert {"time", "level", "process", "pid", "event"} <= server.log()[0].keys()


def test_the_module_runs_as_a_script_from_anywhere(tmp_path: Path) -> None:
    shown = subprocess.run(
        [sys.executable, "-m", "penstock.bin", "--version"],
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
        env={"PATH": os.environ["PATH"]},
    ).stdout
    assert shown.startswith("penstock, version ")


@pytest.mark.parametrize("role", ["broker", "worker", "gateway"])
def test_a_process_that_is_killed_is_started_again(role: str, start_server: StartServer, repository: Path) -> None:
    server = start_server(str(repository))
    [before] = server.children(role)
    os.kill(before, signal.SIGKILL)

    def is_back() -> bool:
        try:
            return server.children(role) not in ([before], []) and server.infer("dense", ONE_ROW)[0] == 200
        except OSError:  # nobody accepts while the only gateway starts
            return False

    wait_for(is_back, f"the {role} to be started again and serve")
    wait_for(lambda: server.request("GET", "/v2/health/ready")[0] == 200, "readiness")
