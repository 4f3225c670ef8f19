"""The folders are the packages, and each imports only what ARCHITECTURE.md allows it."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = sorted(path.parent.name for path in ROOT.glob("*/__init__.py"))

# What of ours each folder may import, and, for those that the client library consists of, what of others.
OURS = {
    "wire": set[str](),
    "broker": {"wire"},
    "worker": {"wire"},
    "client": {"wire"},
    "jobs": {"wire"},
    "gateway": {"wire", "client", "jobs"},
    "load": {"wire", "client"},
    "simulate": {"wire", "broker", "worker", "load"},
    "bin": {"wire", "broker", "worker", "client", "gateway", "jobs", "load", "simulate", "deploy"},
    "deploy": set[str](),
}
LIBRARIES = {"msgpack", "numpy"}


def imports(package: str) -> Iterator[tuple[str, str]]:
    """Each import in a folder: where it stands, and the full name of the module."""
    for path in sorted((ROOT / package).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            where = f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 0)}"
            if isinstance(node, ast.Import):
                for alias in node.names:
                    yield where, alias.name
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{where}: imports are absolute"
                if node.module == "penstock":
                    for alias in node.names:
                        yield where, f"penstock.{alias.name}"
                else:
                    yield where, str(node.module)


def test_setuptools_knows_every_package() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    settings = project["tool"]["setuptools"]
    assert settings["package-dir"] == {"penstock": "."}
    assert settings["packages"] == [f"penstock.{name}" for name in PACKAGES]


def test_the_type_checker_sees_every_package() -> None:
    for name in PACKAGES:
        assert (ROOT / "namespace" / "penstock" / name).resolve() == ROOT / name


def test_a_package_has_no_packages_inside() -> None:
    assert [str(path) for name in PACKAGES for path in (ROOT / name).glob("*/**/__init__.py")] == []


def test_every_package_has_its_place_in_the_table() -> None:
    assert set(PACKAGES) <= OURS.keys()


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_imports_only_those_below_it(package: str) -> None:
    allowed = OURS[package] | {package}
    found = [(where, name) for where, name in imports(package) if name.split(".")[0] == "penstock"]
    assert [each for each in found if each[1].split(".")[1] not in allowed] == []


@pytest.mark.parametrize("package", ["wire", "client"])
def test_the_client_library_needs_two_libraries(package: str) -> None:
    allowed = LIBRARIES | {"penstock"} | sys.stdlib_module_names
    assert [each for each in imports(package) if each[1].split(".")[0] not in allowed] == []


def test_a_broker_starts_without_numpy() -> None:
    """Importing it would take a third of the time until a new broker is there."""
    code = (
        "import sys, penstock.bin.broker, penstock.bin.run, penstock.broker.process; sys.exit('numpy' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0


def test_plain_installation_asks_for_these_two() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert {each.split(">")[0] for each in project["dependencies"]} == LIBRARIES
