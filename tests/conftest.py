"""What all tests share: tools that may be missing, and a look at what they leave behind."""

from __future__ import annotations

import gc
import os
import re
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from tests.system.shared import SharedMemory

os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # tests import it themselves; see penstock.worker
# Where nothing is to be compiled and kept, thousands of processes here would compile the same again, and so would we
# these tests. What is written is not under version control.
sys.dont_write_bytecode = False
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
# A shell without job control has what it runs in the background ignore Ctrl-C, and that is inherited.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
# What an example takes depends on who else works on the machine, other tests among them; pytest-timeout has the limit.
settings.register_profile("shared", settings(deadline=None, suppress_health_check=[HealthCheck.too_slow]))
settings.load_profile("shared")


def pytest_collection_finish() -> None:
    """What has been imported and collected by now stays to the end. A full collection would look through all of it in
    vain, for half a second, and some tests want one for each of their cases."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def require_command() -> Callable[[str, str], str]:
    """``require_command("wrk", "wrk")``: its path; without it the test is left out, in CI it fails. The second is the
    Debian package."""

    def require(command: str, package: str) -> str:
        path = shutil.which(command)
        if path is None:
            sentence = f"{command} is missing (Debian package {package})"
            if os.environ.get("CI"):
                pytest.fail(sentence + "; .ci/run installs it")
            pytest.skip(sentence)
        return path

    return require


@pytest.fixture
def tmp_path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As pytest's own, with less of the test's name: sockets lie in it, and Linux allows 107 bytes for their paths, of
    which a process among several (pytest-xdist) and a long user's name take some, too."""
    name = re.sub(r"\W", "_", request.node.name.removeprefix("test_"))[:12]
    return tmp_path_factory.mktemp(name)


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where models are prepared unless a test says otherwise, also by processes that it starts: never for the user
    who runs the tests."""
    path = tmp_path_factory.mktemp("cache")
    with _environment("XDG_CACHE_HOME", path):
        yield path


@pytest.fixture(scope="session", autouse=True)
def state(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Likewise, where servers keep jobs."""
    path = tmp_path_factory.mktemp("state")
    with _environment("XDG_STATE_HOME", path):
        yield path


@contextmanager
def _environment(name: str, path: Path) -> Iterator[None]:
    before = os.environ.get(name)
    os.environ[name] = str(path)
    yield
    if before is None:
        del os.environ[name]
    else:
        os.environ[name] = before


@pytest.fixture(scope="session", autouse=True)
def nothing_left_behind() -> Iterator[None]:
    """When all tests are done there is no process, thread or shared memory more than before."""
    shared = SharedMemory()
    threads = set(threading.enumerate())
    yield
    assert _children() == [], "tests left processes behind"
    left = [thread for thread in threading.enumerate() if thread not in threads and thread.is_alive()]
    assert [thread.name for thread in left if not thread.daemon] == [], "tests left threads behind"
    shared.check("tests left shared memory behind")


def _children() -> list[str]:
    """The commands of this process's living children."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                state, parent = (entry / "stat").read_text().rpartition(")")[2].split()[:2]
                command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode("utf-8", "replace").strip()
            except OSError:
                continue
            if int(parent) == os.getpid() and state != "Z":
                found.append(command)
    return found
