"""Which cores and which memory lie next to a GPU, and how a process keeps to them."""

from __future__ import annotations

import ctypes
import os
import platform
from collections.abc import Set
from pathlib import Path
from typing import Final, NamedTuple

from penstock.bin.cpus import parse_cpus

_DEVICES: Final = Path("/sys/bus/pci/devices")
_MPOL_PREFERRED: Final = 1
_NODES_MAX: Final = 1024  # what kernels are built for, at most
# glibc has no set_mempolicy(2): that is libnuma's.
_SET_MEMPOLICY: Final = {"x86_64": 238, "aarch64": 237, "riscv64": 237, "ppc64le": 261, "s390x": 270}


class Place(NamedTuple):
    """A NUMA node and its cores."""

    node: int
    cpus: frozenset[int]


def place_of(pci: str, devices: Path = _DEVICES) -> Place | None:
    """Where a device at a PCI address is connected; None where the kernel does not know, as on machines of one node and
    in most virtual ones."""
    try:
        node = int((devices / pci / "numa_node").read_text())
        cpus = parse_cpus((devices / pci / "local_cpulist").read_text())
    except (OSError, ValueError):
        return None
    return Place(node, cpus) if node >= 0 else None


def cores_of(place: Place, allowed: Set[int]) -> frozenset[int] | None:
    """The cores to run on, of those that a process may use already; None: leave them as they are, since it has been
    sent elsewhere, or has these and no others."""
    cpus = place.cpus & allowed
    return cpus if cpus and cpus != allowed else None


def prefer_memory(node: int) -> None:
    """Have all that this thread, and those that it starts, allocate from now on lie in a node's memory while there is
    some left. Raises OSError."""
    number = _SET_MEMPOLICY.get(platform.machine())
    if number is None or not 0 <= node < _NODES_MAX:
        raise OSError(f"no way is known to ask for memory of node {node} on {platform.machine()}")
    bits = 8 * ctypes.sizeof(ctypes.c_ulong)
    mask = (ctypes.c_ulong * (_NODES_MAX // bits))()
    mask[node // bits] |= 1 << node % bits
    libc = ctypes.CDLL(None, use_errno=True)
    # The kernel takes the number of bits for one more than it is.
    if libc.syscall(ctypes.c_long(number), _MPOL_PREFERRED, mask, ctypes.c_ulong(_NODES_MAX + 1)):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
