"""Which processes are a server, and what they have used: over made-up trees, and over this very process."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from penstock.load.processes import Stat, cpu_s, family, holders, listeners, read_all, read_stat, unix_listeners

SHELL, BENCH, LAUNCHER, GATEWAY, WORKER, OTHER, GENERATOR = 10, 11, 20, 21, 22, 30, 12


def tree(server_group: int) -> dict[int, Stat]:
    parents = {1: 0, SHELL: 1, BENCH: SHELL, GENERATOR: BENCH, LAUNCHER: SHELL, GATEWAY: LAUNCHER, WORKER: LAUNCHER}
    groups = {1: 1, SHELL: SHELL, BENCH: BENCH, GENERATOR: BENCH} | dict.fromkeys(
        [LAUNCHER, GATEWAY, WORKER], server_group
    )
    return {pid: Stat(parents[pid], groups[pid], 0.0) for pid in parents} | {OTHER: Stat(1, server_group, 0.0)}


def test_a_server_is_what_was_started_together() -> None:
    assert family([GATEWAY], tree(LAUNCHER), BENCH) == {LAUNCHER, GATEWAY, WORKER, OTHER}


def test_descendants_belong_to_it_whatever_their_group() -> None:
    stats = tree(LAUNCHER)
    stats[WORKER] = Stat(GATEWAY, 99, 0.0)
    assert family([GATEWAY], stats, BENCH) == {LAUNCHER, GATEWAY, WORKER, OTHER}


def test_a_group_that_this_process_is_in_is_no_server() -> None:
    stats = tree(SHELL)
    stats[BENCH] = Stat(SHELL, SHELL, 0.0)
    assert family([LAUNCHER], stats, BENCH) == {LAUNCHER, GATEWAY, WORKER}


def test_neither_this_process_nor_its_ancestors_are_the_server() -> None:
    stats = tree(LAUNCHER)
    stats[BENCH] = Stat(LAUNCHER, BENCH, 0.0)  # started by the server itself
    assert family([GATEWAY], stats, BENCH) == {GATEWAY, WORKER, OTHER}


def test_who_has_ended_is_left_out() -> None:
    assert family([77], tree(LAUNCHER), BENCH) == set()


@pytest.mark.parametrize("address", ["127.0.0.1", "0.0.0.0", "::1"])
def test_the_process_behind_an_address_is_found(address: str) -> None:
    kind = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(kind) as listener:
        try:
            listener.bind((address, 0))
        except OSError:
            pytest.skip("this host has no IPv6")
        port = listener.getsockname()[1]
        asked = "127.0.0.1" if address == "0.0.0.0" else address
        assert listeners(asked, port) == set()  # bound, and not listening
        listener.listen()
        found = listeners(asked, port)
        assert found == {str(os.fstat(listener.fileno()).st_ino)}
        assert holders(found) == {os.getpid()}
    assert listeners(asked, port) == set()


def test_the_process_behind_a_runtime_directory_is_found(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "callers.sock"))
        listener.listen()
        assert holders(unix_listeners(tmp_path)) == {os.getpid()}
    assert unix_listeners(tmp_path / "other") == set()
    assert holders(set()) == set()


def test_processor_time_is_what_the_kernel_counts() -> None:
    until = time.process_time() + 0.05
    before = cpu_s([os.getpid()])
    while time.process_time() < until:
        pass
    used = cpu_s([os.getpid()]) - before
    assert 0.02 <= used < 1.0  # in steps of a hundredth of a second
    assert cpu_s([os.getpid()]) == pytest.approx(time.process_time(), abs=0.05)


def test_children_are_seen_and_the_dead_are_not() -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    assert child.stdin is not None
    assert read_all()[child.pid].parent == os.getpid()
    child.stdin.close()
    child.wait()
    assert read_stat(child.pid) is None
    assert cpu_s([child.pid]) == 0.0
