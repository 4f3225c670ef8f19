"""Whether a runner on this host is still there, told by its name."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from penstock.jobs.owner import is_dead, new_owner


def test_this_process_lives() -> None:
    assert not is_dead(new_owner())
    assert new_owner() != new_owner()


def test_a_process_that_has_ended_is_dead_also_before_anybody_has_asked_how() -> None:
    code = "import sys; from penstock.jobs.owner import new_owner; print(new_owner(), flush=True); sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        owner = child.stdout.readline().decode().strip()
        assert not is_dead(owner)
        child.kill()
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # it stays there, as a zombie
        assert is_dead(owner)
    assert is_dead(owner)


def test_another_process_of_the_same_number_is_not_it() -> None:
    where, pid, start, rest = new_owner().split(":")
    assert is_dead(f"{where}:{pid}:{int(start) - 1}:{rest}")


@pytest.mark.parametrize("name", ["", "a", "a:b", "elsewhere.1:1:1:x", "::::", "{where}:x:1:y", "{where}:1:-:y"])
def test_of_others_nothing_is_known(name: str) -> None:
    assert not is_dead(name.format(where=new_owner().partition(":")[0]))


def test_init_lives_whoever_it_belongs_to() -> None:
    where = new_owner().partition(":")[0]
    with open("/proc/1/stat", "rb") as file:
        start = file.read().rpartition(b")")[2].split()[19].decode()
    assert not is_dead(f"{where}:1:{start}:x")
