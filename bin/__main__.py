"""``penstock``: the commands."""

from __future__ import annotations

import errno
import os
import sys
from typing import Final, NoReturn

_NO_ROOM: Final = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# numpy's BLAS has a thread for each core from the moment it is imported, and buffers for each; nothing here multiplies
# matrices with numpy. A worker or gateway starts with a sixth less processor time so.
_NO_BLAS_THREADS: Final = ("OPENBLAS_NUM_THREADS", "1")


def main() -> None:
    """The console script. Without the server's packages, or with a full disk, it says so in a sentence."""
    os.environ.setdefault(*_NO_BLAS_THREADS)
    try:
        from penstock.bin.cli import cli
        from penstock.bin.logs import never_fail

        never_fail()
        cli(prog_name="penstock")
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("penstock"):
            raise
        sys.exit(f"penstock: {error.name} is missing; this command needs: pip install 'penstock[server]'")
    except OSError as error:
        if error.errno not in _NO_ROOM:
            raise
        _no_room(error)


def _no_room(error: OSError) -> NoReturn:
    """Standard output, most likely, since each command says which of its own files cannot be written. What waits to be
    written there would fail again at the end, with an exit code and words of the interpreter's own."""
    where = error.filename or "what is to be written (standard output, or a temporary file)"
    sys.stderr.write(f"penstock: there is no room for {where}: {error.strerror}\n")
    sys.stderr.flush()
    os.dup2(os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC), 1)
    sys.exit(1)


if __name__ == "__main__":
    main()
