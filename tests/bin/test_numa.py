"""Cores and memory next to a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.bin.numa import Place, cores_of, place_of, prefer_memory

PCI = "0000:3b:00.0"


def device(devices: Path, node: str, cpus: str) -> Path:
    (devices / PCI).mkdir()
    (devices / PCI / "numa_node").write_text(node)
    (devices / PCI / "local_cpulist").write_text(cpus)
    return devices


def test_the_kernel_tells_where_a_gpu_is_connected(tmp_path: Path) -> None:
    assert place_of(PCI, device(tmp_path, "1\n", "16-31,48-63\n")) == Place(
        1, frozenset([*range(16, 32), *range(48, 64)])
    )


@pytest.mark.parametrize(("node", "cpus"), [("-1\n", "0-31\n"), ("", "0"), ("one", "0"), ("0\n", ""), ("0\n", "all")])
def test_a_machine_that_does_not_know_is_left_alone(tmp_path: Path, node: str, cpus: str) -> None:
    assert place_of(PCI, device(tmp_path, node, cpus)) is None


@pytest.mark.parametrize("pci", ["", "0000:ff:00.0"])
def test_a_device_that_is_not_there_has_no_place(tmp_path: Path, pci: str) -> None:
    assert place_of(pci, device(tmp_path, "0", "0")) is None


some_cpus = st.frozensets(st.integers(0, 15), min_size=1)


@given(some_cpus, some_cpus)
def test_cores_are_never_more_than_were_given(near: frozenset[int], allowed: frozenset[int]) -> None:
    cores = cores_of(Place(0, near), allowed)
    if cores is None:
        assert not near & allowed or allowed <= near
    else:
        assert cores
        assert cores == near & allowed < allowed


def test_memory_is_asked_for_where_there_is_some() -> None:
    """In a process of its own, which then says what it has asked for, as numa_maps has it."""
    program = (
        "from penstock.bin.numa import prefer_memory\n"
        "try:\n    prefer_memory(0)\n"
        "except OSError as error:\n    print('refused', error)\n"
        "else:\n    print(open('/proc/self/numa_maps').readline())"
    )
    try:
        Path("/proc/self/numa_maps").read_text()
    except OSError:
        pytest.skip("this kernel knows no NUMA")
    said = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60
    ).stdout
    if said.startswith("refused"):
        pytest.skip(f"this machine lets nobody choose: {said}")
    assert " prefer" in said


@pytest.mark.parametrize("node", [-1, 1024])
def test_a_node_that_cannot_be_is_refused(node: int) -> None:
    with pytest.raises(OSError, match=f"memory of node {node}"):
        prefer_memory(node)


PROGRAM = """
import os, sys
from penstock.bin import worker
from penstock.bin.numa import Place
worker.place_of = lambda pci: Place(0, frozenset(map(int, sys.argv[1].split(",")))) if pci == "0000:3b:00.0" else None
worker._stay_near(sys.argv[2])
print(*sorted(os.sched_getaffinity(0)))
"""


@pytest.mark.parametrize("pci", [PCI, "0000:01:00.0", ""])
@pytest.mark.parametrize("foreign", [True, False])
def test_a_worker_keeps_to_the_cores_next_to_its_gpu(pci: str, foreign: bool) -> None:
    own = sorted(os.sched_getaffinity(0))
    near = [60_000] if foreign else [own[-1], 60_000]
    command = [sys.executable, "-c", PROGRAM, ",".join(map(str, near)), pci]
    said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    assert [int(cpu) for cpu in said.split()] == ([own[-1]] if pci == PCI and not foreign else own)
