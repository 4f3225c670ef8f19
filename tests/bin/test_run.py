"""A process is started, serves and is stopped, and ends with the exit code that fits what happened."""

from __future__ import annotations

import subprocess
import sys

PROCESS = """
import gc, sys, threading
from penstock.bin.run import run
from penstock.wire.endpoints import EndpointError

class Process:
    def start(self):
        {start}
    def serve(self):
        {serve}
    def stop(self):
        print("stopped", flush=True)

process, served = run("worker-7", {form!r}, "info", 0, Process)
print(type(process).__name__, served)
"""


def run(start: str = "pass", serve: str = "pass", form: str = "text") -> subprocess.CompletedProcess[str]:
    script = PROCESS.format(start=start, serve=serve, form=form)
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)


def test_a_process_that_has_served_is_stopped_and_returned_with_what_it_served() -> None:
    ended = run(serve="return 'all'")
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "stopped\nProcess all\n", "")


def test_an_address_that_cannot_be_used_is_logged_and_exits_with_1() -> None:
    ended = run(start="raise EndpointError('the port is taken')", form="json")
    assert (ended.returncode, ended.stdout) == (1, "stopped\n")
    assert '"event": "cannot start", "reason": "the port is taken"' in ended.stderr
    assert '"process": "worker-7"' in ended.stderr
    assert "Traceback" not in ended.stderr


def test_any_other_error_is_left_to_the_command_after_the_process_was_stopped() -> None:
    for where in ("start", "serve"):
        ended = run(**{where: "raise KeyError('unexpected')"})
        assert (ended.returncode, ended.stdout) == (1, "stopped\n")
        assert ended.stderr.endswith("KeyError: 'unexpected'\n")


def test_a_thread_that_fails_ends_the_process() -> None:
    failing = "threading.Thread(target=lambda: [].pop(), name='loader', daemon=True).start(); threading.Event().wait()"
    ended = run(serve=failing)
    assert ended.returncode == 70
    first, *_, last = ended.stderr.splitlines()
    assert first.endswith(" C worker-7: thread failed thread=loader")
    assert last == "IndexError: pop from empty list"


def test_what_was_loaded_before_serving_is_not_collected_again_and_again() -> None:
    assert int(run(serve="return gc.get_freeze_count()").stdout.split()[-1]) > 1000
