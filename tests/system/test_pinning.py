"""``penstock up --pin``: workers on cores of their own."""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path

from penstock.bin.cpus import format_cpus, physical_cores, share_cpus, usable_cpus
from tests.system.servers import StartServer, wait_for


def threads_allowed(pid: int) -> set[str]:
    """The cores that the threads of a process may use, as the kernel writes them."""
    found: set[str] = set()
    for status in Path(f"/proc/{pid}/task").glob("*/status"):
        found |= set(re.findall(r"^Cpus_allowed_list:\s*(\S+)$", status.read_text(), re.MULTILINE))
    return found


def test_all_threads_of_a_worker_keep_to_its_cores(start_server: StartServer) -> None:
    """Also after it had to be started again."""
    count = min(2, len(usable_cpus()))
    shares = [format_cpus(share) for share in share_cpus(physical_cores(usable_cpus()), count)]
    server = start_server("--pin", f"--workers={count}")
    workers = server.children("worker")
    assert sorted(threads_allowed(pid).pop() for pid in workers) == sorted(shares)
    assert [len(threads_allowed(pid)) for pid in workers] == [1] * count
    assert min(len(os.listdir(f"/proc/{pid}/task")) for pid in workers) >= 3
    own = {format_cpus(usable_cpus())}
    assert [threads_allowed(pid) for pid in (*server.children("broker"), *server.children("gateway"))] == [own, own]
    before = threads_allowed(workers[-1])
    os.kill(workers[-1], signal.SIGKILL)
    [new] = wait_for(lambda: set(server.children("worker")) - set(workers), "another in its place")
    wait_for(lambda: threads_allowed(new) == before, "it to keep to the same cores")
