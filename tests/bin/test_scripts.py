"""The shell scripts: their syntax, and how they make the virtual environment.

In place of Python, pip and the checkers stand small scripts that write down how they were called: what the real ones do
needs PyPI.
"""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
from pathlib import Path
from typing import IO

import pytest

from tests.system.servers import wait_for

ROOT = Path(__file__).parents[2]
TOOLS = ("sh", "cat", "cksum", "dirname", "flock", "mkdir", "cp", "readlink", "rm", "touch")

# A Python of some version. It can make environments, in which its copy is the python that installs.
PYTHON = """#!/bin/sh
echo "{name} $*" >> "{root}/calls"
case "$1" in
    -c)
        case "$2" in
            *version_info*) exit {old} ;;
            *) [ -e "$(dirname "$0")/pip" ] ;;
        esac ;;
    -m)
        case "$2" in
            venv)
                mkdir -p "$3/bin"
                cp "$0" "$3/bin/python"
                if [ -e "{root}/no-ensurepip" ]; then exit 1; fi
                touch "$3/bin/pip" ;;
            pip)
                if [ -e "{root}/gate" ]; then cat "{root}/gate"; fi
                if [ -e "{root}/offline" ]; then exit 1; fi ;;
            *) echo "ran $*" ;;
        esac ;;
esac
"""
RECORD = """#!/bin/sh
echo "{name} $*" >> "{root}/calls"
exit {code}
"""


class Checkout:
    """A copy of the scripts in a folder of their own, and a PATH that has just what they need."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "check out"  # folders may have such names
        self.tools = folder / "tools"
        self.venv = self.root / ".venv"
        (self.root / "bin").mkdir(parents=True)
        self.tools.mkdir()
        for name in ("penstock", "test", "environment"):
            shutil.copy(ROOT / "bin" / name, self.root / "bin")
        for name in TOOLS:
            path = shutil.which(name)
            assert path is not None, f"{name} is missing"
            (self.tools / name).symlink_to(path)
        (self.root / "pyproject.toml").write_text("[project]\n")
        self.environment = {"PATH": str(self.tools)}

    def put(self, path: Path, content: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
        path.chmod(0o755)

    def add_python(self, name: str = "python3", old: bool = False) -> None:
        self.put(self.tools / name, PYTHON.format(name=name, root=self.root, old=int(old)))

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command or (str(self.root / "bin" / "penstock"), "--version"),
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
            env=self.environment,
        )

    def calls(self) -> list[str]:
        """How the stand-ins were called since the last look, without the checks of versions."""
        path = self.root / "calls"
        lines = path.read_text().splitlines() if path.exists() else []
        path.unlink(missing_ok=True)
        return [line.replace(f"{self.root}/", "") for line in lines if " -c " not in line]


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return Checkout(tmp_path)


def install(checkout: Checkout, extra: str = "server") -> str:
    return f"python3 -m pip install --progress-bar off --quiet --editable {checkout.root}[{extra}]"


# --- syntax ---


@pytest.mark.parametrize("script", ["bin/penstock", "bin/test", "bin/environment"])
def test_a_shell_script_can_be_parsed(script: str) -> None:
    checked = subprocess.run(["sh", "-n", ROOT / script], capture_output=True, text=True, timeout=60, check=False)
    assert (checked.returncode, checked.stderr) == (0, "")


def test_the_script_of_ci_can_be_parsed() -> None:
    script = ROOT / ".ci" / "run"
    checked = subprocess.run(["bash", "-n", script], capture_output=True, text=True, timeout=60, check=False)
    assert (checked.returncode, checked.stderr) == (0, "")


@pytest.mark.parametrize("script", ["bin/penstock", "bin/test", ".ci/run"])
def test_a_script_that_is_run_is_executable(script: str) -> None:
    assert (ROOT / script).stat().st_mode & stat.S_IXUSR
    assert (ROOT / script).read_text().startswith("#!/")


# --- making the environment ---


def test_the_first_use_makes_an_environment_and_the_second_uses_it(checkout: Checkout) -> None:
    checkout.add_python()
    first = checkout.run()
    assert (first.returncode, first.stdout) == (0, "ran -m penstock.bin --version\n")
    assert "first use: making a virtual environment" in first.stderr
    assert first.stderr.endswith("penstock: installed\n")
    assert checkout.calls() == ["python3 -m venv .venv", install(checkout), "python3 -m penstock.bin --version"]
    second = checkout.run()
    assert (second.returncode, second.stdout, second.stderr) == (0, first.stdout, "")
    assert checkout.calls() == ["python3 -m penstock.bin --version"]


def test_what_is_needed_is_installed_again_when_it_changes(checkout: Checkout) -> None:
    checkout.add_python()
    checkout.run()
    checkout.calls()
    (checkout.root / "pyproject.toml").write_text("[project]\nname = 'x'\n")
    again = checkout.run()
    assert again.returncode == 0
    assert "first use" not in again.stderr
    assert checkout.calls() == [install(checkout), "python3 -m penstock.bin --version"]


def test_an_environment_without_pip_was_half_made_and_is_made_again(checkout: Checkout) -> None:
    checkout.add_python()
    checkout.put(checkout.venv / "bin" / "python", PYTHON.format(name="half", root=checkout.root, old=0))
    (checkout.venv / "left").touch()
    assert checkout.run().returncode == 0
    assert checkout.calls() == ["python3 -m venv .venv", install(checkout), "python3 -m penstock.bin --version"]
    assert not (checkout.venv / "left").exists()


def test_an_environment_whose_python_is_gone_is_made_again(checkout: Checkout) -> None:
    """As after an upgrade of the system's Python: the environment's is a link to it."""
    checkout.add_python()
    checkout.run()
    checkout.calls()
    (checkout.venv / "bin" / "python").unlink()
    (checkout.venv / "bin" / "python").symlink_to("/usr/bin/python-that-was")
    again = checkout.run()
    assert (again.returncode, again.stdout) == (0, "ran -m penstock.bin --version\n")
    assert checkout.calls() == ["python3 -m venv .venv", install(checkout), "python3 -m penstock.bin --version"]


def test_a_newer_python_is_found_beside_an_old_one(checkout: Checkout) -> None:
    checkout.add_python("python3", old=True)
    checkout.add_python("python3.12")
    assert checkout.run().returncode == 0
    assert checkout.calls()[0] == "python3.12 -m venv .venv"


@pytest.mark.parametrize("old", [True, False])
def test_without_a_python_that_is_new_enough_it_says_so(checkout: Checkout, old: bool) -> None:
    if old:
        checkout.add_python(old=True)
    ended = checkout.run()
    assert (ended.returncode, ended.stdout) == (1, "")
    assert ended.stderr == "penstock: needs Python 3.11 or newer, and none was found as python3\n"
    assert not checkout.venv.exists()


def test_without_pythons_venv_it_names_the_package_and_leaves_nothing_half_made(checkout: Checkout) -> None:
    checkout.add_python()
    (checkout.root / "no-ensurepip").touch()
    ended = checkout.run()
    assert (ended.returncode, ended.stdout) == (1, "")
    assert ended.stderr.endswith("on Debian and Ubuntu: apt install python3-venv\n")
    assert not checkout.venv.exists()
    assert checkout.calls() == ["python3 -m venv .venv"]


def test_an_installation_that_failed_is_tried_again_the_next_time(checkout: Checkout) -> None:
    checkout.add_python()
    (checkout.root / "offline").touch()
    ended = checkout.run()
    assert (ended.returncode, ended.stdout) == (1, "")
    assert ended.stderr.endswith("penstock: installing failed; see above. Is PyPI within reach?\n")
    checkout.calls()
    (checkout.root / "offline").unlink()
    assert checkout.run().returncode == 0
    assert checkout.calls() == [install(checkout), "python3 -m penstock.bin --version"]


def waits_for_a_lock(path: Path) -> bool:
    """Whether somebody waits for the lock on a file."""
    number = str(path.stat().st_ino)
    waiting = [line.split() for line in Path("/proc/locks").read_text().splitlines() if "->" in line]
    return any(words[2] == "FLOCK" and words[6].split(":")[-1] == number for words in waiting)


def test_of_two_at_once_one_makes_the_environment_and_the_other_waits(checkout: Checkout) -> None:
    checkout.add_python()
    os.mkfifo(checkout.root / "gate")  # holds the installation up until somebody has opened it for writing
    command = [str(checkout.root / "bin" / "penstock"), "up"]

    def start() -> subprocess.Popen[str]:
        return subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=checkout.environment
        )

    with start() as first:
        said: IO[str] | None = first.stderr
        assert said is not None
        assert "first use" in said.readline()
        assert "installing packages" in said.readline()
        with start() as second:
            try:
                wait_for(lambda: waits_for_a_lock(checkout.root / ".venv.lock"), "the second to wait for the first")
            finally:
                (checkout.root / "gate").write_text("")
            outputs = [process.communicate(timeout=60) for process in (first, second)]
    assert outputs == [("ran -m penstock.bin up\n", "penstock: installed\n"), ("ran -m penstock.bin up\n", "")]
    assert checkout.calls() == ["python3 -m venv .venv", install(checkout), *["python3 -m penstock.bin up"] * 2]


# --- running ---


def test_the_command_may_be_a_link_from_elsewhere_and_passes_its_arguments_on(
    checkout: Checkout, tmp_path: Path
) -> None:
    checkout.add_python()
    (tmp_path / "penstock").symlink_to(checkout.root / "bin" / "penstock")
    ended = checkout.run(str(tmp_path / "penstock"), "up", "two words", "")
    assert (ended.returncode, ended.stdout) == (0, "ran -m penstock.bin up two words \n")


def test_all_checks_come_before_the_tests_which_get_the_arguments(checkout: Checkout) -> None:
    checkout.add_python()
    checkout.run(str(checkout.root / "bin" / "test"))
    assert checkout.calls()[:2] == ["python3 -m venv .venv", install(checkout, "test")]
    for name in ("ruff", "mypy"):
        checkout.put(checkout.venv / "bin" / name, RECORD.format(name=name, root=checkout.root, code=0))
    (checkout.root / "bench" / "peer_servers").mkdir(parents=True)
    (checkout.root / "bench" / "http.py").touch()
    (checkout.root / "bench" / "peer_servers" / "one.py").touch()
    ended = checkout.run(str(checkout.root / "bin" / "test"), "tests/wire", "-k", "fifo")
    beside = "-n 3 --dist worksteal"  # first, so that the arguments may say otherwise
    assert (ended.returncode, ended.stdout) == (0, f"ran -m pytest {beside} tests/wire -k fifo\n")
    assert checkout.calls() == [
        "ruff check .",
        "ruff format --check .",
        "mypy namespace/penstock tests examples/digits/train.py bench/http.py bench/peer_servers/one.py",
        f"python3 -m pytest {beside} tests/wire -k fifo",
    ]


def test_a_check_that_fails_ends_it(checkout: Checkout) -> None:
    checkout.add_python()
    checkout.run(str(checkout.root / "bin" / "test"))
    checkout.calls()
    checkout.put(checkout.venv / "bin" / "ruff", RECORD.format(name="ruff", root=checkout.root, code=3))
    ended = checkout.run(str(checkout.root / "bin" / "test"))
    assert (ended.returncode, ended.stdout) == (3, "")
    assert checkout.calls() == ["ruff check ."]
