"""Run a command as one of the units would: ``python confine.py UNIT COMMAND...``.

The system call filter and MemoryDenyWriteExecute= of a unit are applied without systemd, by libseccomp and prctl(2), to
this process, which then becomes the command.
"""

from __future__ import annotations

import ctypes
import errno
import os
import re
import subprocess
import sys
from pathlib import Path

_ALLOW, _ERRNO = 0x7FFF0000, 0x00050000  # SCMP_ACT_ALLOW, SCMP_ACT_ERRNO
_PR_SET_NO_NEW_PRIVS, _PR_SET_MDWE, _PR_MDWE_REFUSE_EXEC_GAIN = 38, 65, 1


def calls_of(names: str) -> set[str]:
    """System calls by name, those of sets such as @system-service included."""
    found: set[str] = set()
    for name in names.split():
        if not name.startswith("@"):
            found.add(name)
            continue
        command = ["systemd-analyze", "syscall-filter", name]
        shown = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        lines = [line.strip() for line in shown.splitlines()[1:]]
        found |= calls_of(" ".join(line for line in lines if line and not line.startswith("#")))
    return found


def allowed(unit: str) -> set[str]:
    """What the SystemCallFilter= lines of a unit leave; systemd always adds @default."""
    found = calls_of("@default")
    for line in re.findall(r"^SystemCallFilter=(.*)$", unit, re.M):
        if line.startswith("~"):
            found -= calls_of(line[1:]) - calls_of("@default")
        else:
            found |= calls_of(line)
    return found


def confine(unit: str) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if "\nMemoryDenyWriteExecute=yes\n" in unit:
        # Kernels before 6.3 do not know it.
        libc.prctl(_PR_SET_MDWE, _PR_MDWE_REFUSE_EXEC_GAIN, 0, 0, 0)
    seccomp = ctypes.CDLL("libseccomp.so.2")
    seccomp.seccomp_init.restype = ctypes.c_void_p
    context = ctypes.c_void_p(seccomp.seccomp_init(_ERRNO | errno.EPERM))
    for name in allowed(unit):
        number = seccomp.seccomp_syscall_resolve_name(name.encode())
        if number >= 0:  # else it is of another architecture
            assert seccomp.seccomp_rule_add_array(context, _ALLOW, number, 0, None) == 0, name
    assert libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0
    assert seccomp.seccomp_load(context) == 0


if __name__ == "__main__":
    confine(Path(sys.argv[1]).read_text())
    os.execvp(sys.argv[2], sys.argv[2:])
