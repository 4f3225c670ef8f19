"""Preparing a model for the store, in a process of its own: ``python -m penstock.worker.prepare``.

Preparing takes memory for all weights twice or more, which a worker would not give back, and ONNX Runtime may end the
process in the middle of it. So somebody does it who ends afterwards: who dies with the process that asked, is the first
that the kernel ends when memory is short, and whose memory and files have a limit.
"""

from __future__ import annotations

import contextlib
import errno
import gc
import json
import os
import resource
import select
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import msgspec

from penstock.wire.process import die_with
from penstock.worker.manifest import (
    MODEL,
    WEIGHTS,
    FileSum,
    Setting,
    Unusable,
    cpu_digest,
    find_source,
    sum_files,
)

# Dense layers took 2.2 times their weights, convolutions 3.3, int8 2.3; ONNX Runtime and Python 100 MB.
_MEMORY_FACTOR: Final = 5
_MEMORY_MORE_BYTES: Final = 512 << 20
# Weights are written as they were and, where a kernel wants them otherwise, as that has them: twice, at most.
_DISK_FACTOR: Final = 3
_DISK_MORE_BYTES: Final = 64 << 20
_SECONDS_MAX: Final = 1800.0
_TELL_S: Final = 3.0  # between two words on how far it is
_END_S: Final = 10.0  # for the other process to end, once it has said its last or was killed
_POLL_MS: Final = 200
_LINE_MAX_BYTES: Final = 1 << 16
_NO_ROOM: Final = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

_OPTIONS: Final = {
    "session.optimized_model_external_initializers_file_name": WEIGHTS,
    "session.optimized_model_external_initializers_min_size_in_bytes": "1024",
}
_PREPACKED: Final = {"session.save_external_prepacked_constant_initializers": "1"}
# For a GPU, only what is the same for all providers: it need not be there when a model is prepared, and what the CPU's
# own optimizations make cannot run on it. Its sessions go on from there, and read weights where they are mapped.
_LEVELS: Final = {False: "ORT_ENABLE_ALL", True: "ORT_ENABLE_BASIC"}

Tell = Callable[[str, Mapping[str, object]], None]  # an event and what is said of it


class NotPrepared(Exception):
    """The message is why. ``lasting``: it will be so the next time, too."""

    def __init__(self, reason: str, lasting: bool = False) -> None:
        super().__init__(reason)
        self.lasting = lasting


def find_setting(on_gpu: bool = False) -> Setting:
    """What models are prepared for here. Raises OSError where the processor cannot be told."""
    import onnxruntime

    cpu = cpu_digest(Path("/proc/cpuinfo").read_text(errors="replace"))
    provider = "CUDAExecutionProvider" if on_gpu else "CPUExecutionProvider"
    return Setting(onnxruntime.__version__, provider, _options(on_gpu) | {"level": _LEVELS[on_gpu]}, cpu)


def _options(on_gpu: bool) -> dict[str, str]:
    return _OPTIONS if on_gpu else _OPTIONS | _PREPACKED


# --- on the side of who asks ---


def prepare(
    source: Path, key: str, nbytes: int, folder: Path, locks: Sequence[int], tell: Tell, on_gpu: bool = False
) -> dict[str, FileSum]:
    """Have ``folder``, which is empty, filled with the prepared model, sealed and on the disk; returns its files.
    ``nbytes``: of the model's own. ``locks``: descriptors that the other process keeps open too, so that nobody else
    takes a lock over while it lives. Raises NotPrepared."""
    arguments = json.dumps(
        {
            "parent": os.getpid(),
            "source": str(source),
            "key": key,
            "nbytes": nbytes,
            "folder": str(folder),
            "on_gpu": on_gpu,
        }
    )
    errors = os.memfd_create("penstock-errors", os.MFD_CLOEXEC)
    # -P: nothing is imported from where it happens to be started.
    command = [sys.executable, "-P", "-m", __name__, arguments]
    try:
        child = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors, pass_fds=tuple(locks)
        )
    except OSError as error:
        os.close(errors)
        raise NotPrepared(f"no process could be started for it: {error.strerror}") from None
    try:
        last = _follow(child, folder, tell)
        if last.get("done"):
            return msgspec.convert(last["files"], dict[str, FileSum])
        reason = last.get("problem") or _say_end(child.returncode, os.pread(errors, 2000, 0))
        raise NotPrepared(str(reason), bool(last.get("lasting")))
    finally:
        child.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):  # it waits for a broken disk, say
            child.wait(_END_S)
        if child.stdout is not None:
            child.stdout.close()
        os.close(errors)


def _follow(child: subprocess.Popen[bytes], folder: Path, tell: Tell) -> dict[str, Any]:
    """The last thing that it says. Raises NotPrepared when it takes too long."""
    assert child.stdout is not None
    fd = child.stdout.fileno()
    os.set_blocking(fd, False)
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    begin = told = time.monotonic()
    said: dict[str, Any] = {}
    rest = b""
    while True:
        if poll.poll(_POLL_MS):
            more = os.read(fd, _LINE_MAX_BYTES)
            if not more:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    child.wait(_END_S)
                return said
            *lines, rest = (rest + more).split(b"\n")
            for line in lines:
                said = json.loads(line)
        now = time.monotonic()
        if now - begin > _SECONDS_MAX:
            raise NotPrepared(f"it took more than {_SECONDS_MAX:.0f} s")
        if now - told >= _TELL_S:
            told = now
            tell(
                "preparing model",
                {
                    "step": said.get("step", "starting"),
                    "seconds": round(now - begin),
                    "written_mb": _written_mb(folder),
                },
            )


def _written_mb(folder: Path) -> int:
    total = 0
    for name in MODEL, WEIGHTS:
        try:
            total += os.stat(folder / name).st_size
        except OSError:
            continue
    return total // 1_000_000


def _say_end(code: int | None, errors: bytes) -> str:
    """Of a process that said nothing. ``code``: None of one that has not ended either."""
    if code is None:
        return f"preparing it said nothing, and did not end within {_END_S:g} s"
    text = " ".join(errors.decode("utf-8", "replace").split())[-300:]
    how = f"signal {-code}" if code < 0 else f"exit code {code}"
    return f"preparing it ended with {how}" + (f": {text}" if text else "")


# --- the process ---


def main() -> None:
    given = json.loads(sys.argv[1])
    die_with(given["parent"])
    nbytes = given["nbytes"]
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _limit(resource.RLIMIT_DATA, _MEMORY_MORE_BYTES + _MEMORY_FACTOR * nbytes)
    _limit(resource.RLIMIT_FSIZE, _DISK_MORE_BYTES + _DISK_FACTOR * nbytes)
    with contextlib.suppress(OSError):  # then the kernel chooses by itself
        Path("/proc/self/oom_score_adj").write_text("1000")
    source, folder = Path(given["source"]), Path(given["folder"])
    try:
        _make(source, folder, nbytes, given["on_gpu"])
        _say(step="checking what was written")
        files = sum_files(folder)
        _check_source(source, given["key"], given["on_gpu"])
        _say(done=True, files=msgspec.to_builtins(files))
    except NotPrepared as error:
        _say(problem=str(error), lasting=error.lasting)
    except OSError as error:
        _say(problem=say_oserror(error, folder.parent, nbytes))
    except MemoryError:
        most = resource.getrlimit(resource.RLIMIT_DATA)[0]
        _say(problem=f"preparing it takes more than {most // 1_000_000} MB of memory")


def _make(source: Path, folder: Path, nbytes: int, on_gpu: bool) -> None:
    """Write the optimized model and its weights. Raises NotPrepared, OSError and MemoryError."""
    from onnxruntime import GraphOptimizationLevel

    from penstock.worker import model
    from penstock.worker.providers import open_session

    _say(step="making room")
    _check_room(folder, nbytes)
    _say(step="optimizing")
    options = model.session_options(1)
    options.optimized_model_filepath = str(folder / MODEL)
    options.graph_optimization_level = getattr(GraphOptimizationLevel, _LEVELS[on_gpu])
    for key, value in _options(on_gpu).items():
        options.add_session_config_entry(key, value)
    try:
        original = open_session(source, options)
        wanted = model.interface(original)
        del original, options
        gc.collect()
        # What ONNX Runtime could not write, for want of room or for itself, shows when it is opened.
        _say(step="opening what was written")
        found = model.interface(open_session(folder / MODEL, model.session_options(1)))
    except model.RUN_ERRORS as error:
        _check_room(folder, nbytes)
        reason = model.brief(error)
        if isinstance(error, MemoryError) or "bad_alloc" in reason or "allocate" in reason:
            raise MemoryError from None
        raise NotPrepared(reason, _can_be_opened(source)) from None
    if found != wanted:
        raise NotPrepared("its optimized form has other inputs or outputs", lasting=True)


def _can_be_opened(source: Path) -> bool:
    """Whether it is only preparing that fails: that will not change, and need not be tried again."""
    from penstock.worker import model
    from penstock.worker.providers import open_session

    try:
        open_session(source, model.session_options(1))
    except model.RUN_ERRORS:
        return False
    return True


def _check_room(folder: Path, nbytes: int) -> None:
    """Raises OSError when there is no room for the weights: ONNX Runtime does not notice everything that is not
    written."""
    path = folder / ".room"
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        os.posix_fallocate(fd, 0, max(1, nbytes))
    except OSError as error:
        if error.errno != errno.EOPNOTSUPP:
            raise
    finally:
        os.close(fd)
        os.unlink(path)


def _check_source(source: Path, key: str, on_gpu: bool) -> None:
    """What was replaced meanwhile must not be found under the key of what was there before. Raises NotPrepared."""
    try:
        changed = find_source(source, find_setting(on_gpu)).key != key
    except Unusable as error:
        raise NotPrepared(str(error)) from None
    if changed:
        raise NotPrepared("it was replaced while it was being prepared")


def _say(**what: object) -> None:
    print(json.dumps(what), flush=True)


def say_oserror(error: OSError, store: Path, nbytes: int) -> str:
    """What went wrong in a store with a model that takes so many bytes there."""
    if error.errno in _NO_ROOM:
        sentence = f"there is no room for it in {store}: {error.strerror}; it takes {nbytes} bytes there"
        with contextlib.suppress(OSError):
            about = os.statvfs(store)
            sentence += f", and {about.f_bavail * about.f_frsize} are free"
        return sentence + "; free some, or choose another directory with [worker] store"
    return f"{error.strerror}: {error.filename}" if error.filename else str(error.strerror)


def _limit(which: int, most: int) -> None:
    """Never more than what is allowed already."""
    _, hard = resource.getrlimit(which)
    soft = most if hard == resource.RLIM_INFINITY else min(most, hard)
    resource.setrlimit(which, (soft, soft))


if __name__ == "__main__":
    main()
