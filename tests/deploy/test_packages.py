"""What ``pip install`` gets: a wheel and an sdist that work where there is no checkout."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with an sdist of what git would give, and the wheel that is made of it."""
    source, packages = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("packages")
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        check=True,
    ).stdout
    for name in filter(None, os.fsdecode(listed).split("\0")):
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(packages), str(source)]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stdout + built.stderr
    return packages


@pytest.fixture(scope="module")
def installed(packages: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The ``bin`` of an environment of its own with the wheel; what the wheel depends on is this environment's."""
    home = tmp_path_factory.mktemp("elsewhere") / "env"
    venv.create(home, with_pip=False)
    [wheel] = packages.glob("*.whl")
    command = [
        sys.executable,
        "-m",
        "pip",
        "--python",
        str(home / "bin" / "python"),
        "install",
        "--no-deps",
        str(wheel),
    ]
    subprocess.run(command, check=True, capture_output=True)
    [site] = (home / "lib").glob("python*/site-packages")
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return home / "bin"


def test_there_is_one_of_each(packages: Path) -> None:
    assert sorted(path.name.removeprefix("penstock-") for path in packages.iterdir()) == [
        "0.1.0-py3-none-any.whl",
        "0.1.0.tar.gz",
    ]


def test_a_wheel_has_what_is_not_python_and_no_tests(packages: Path) -> None:
    [wheel] = packages.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {"penstock/bin/models/digits/1/model.onnx", "penstock/deploy/systemd/penstock-worker@.service"} <= names
    assert {"penstock/client/py.typed", "penstock/wire/py.typed", "penstock/gateway/dashboard.html"} <= names
    assert not [name for name in names if "test_" in name or name.startswith(("tests", "bench", "penstock/bench"))]


def test_what_is_installed_serves_and_asks_itself(installed: Path, tmp_path: Path) -> None:
    script = f"""
import subprocess, sys
up = [{str(installed / "penstock")!r}, "up", "--http=127.0.0.1:0", "--runtime-dir=run"]
server = subprocess.Popen(up, stdout=subprocess.PIPE, text=True)
try:
    assert server.stdout.readline().startswith("penstock ready: ")
    import penstock.client
    import numpy as np
    print(penstock.client.__file__)
    with penstock.client.Client("run") as client:
        scores = client.infer("digits", {{"image": np.load({str(ROOT / "examples/digits/seven.npy")!r})}})["scores"]
    print(scores.argmax())
finally:
    server.terminate()
    assert server.wait(30) == 0
"""
    ran = subprocess.run(
        [installed / "python", "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False, timeout=100
    )
    assert ran.returncode == 0, ran.stderr
    where, largest = ran.stdout.splitlines()
    assert Path(where).is_relative_to(installed.parent)
    assert largest == "7"


def test_what_is_installed_writes_its_units(installed: Path, tmp_path: Path) -> None:
    subprocess.run([installed / "penstock", "systemd", "--to", "etc"], cwd=tmp_path, check=True, capture_output=True)
    broker = (tmp_path / "etc/systemd/system/penstock-broker.service").read_text()
    assert f"ExecStart={installed / 'python'} -m penstock.bin broker" in broker
