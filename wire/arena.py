"""Shared memory that one process writes and its peers read.

An arena is a memfd: memory without a name, which ends with the last process that holds it, however they end. Once its
owner has mapped it, it is sealed (memfd_create(2), fcntl(2)): its size is fixed, so that no reader meets the end of the
file (SIGBUS); nobody can map it for writing or write to it any more, through whatever descriptor; and no seal can be
added. So peers that are given the descriptor (SCM_RIGHTS) can read it, and only its owner's mapping writes.

Its pages are allocated when it is made: memory that is missing is an error then, and not a fault later.

Views are memoryviews into the mapping, without a copy. ``close`` does not pull the memory from under them: it is
unmapped when the last view of it, or array over one, has gone. (``mmap.close`` raises BufferError while there are any,
so an owner could not end while a result is still being written to a connection.)
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import mmap
import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Final, NamedTuple

from penstock.wire.allocator import Allocator
from penstock.wire.errors import BadMessage
from penstock.wire.fields import brief
from penstock.wire.process import fields

log = logging.getLogger("penstock")

_F_SEAL_FUTURE_WRITE: Final = 0x10  # <linux/fcntl.h>, since Linux 5.1; Python's fcntl does not have it
_READERS_SEALS: Final = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | _F_SEAL_FUTURE_WRITE
_SEALS: Final = _READERS_SEALS | fcntl.F_SEAL_SEAL

_DEFAULT_MAX_BYTES: Final = 256 << 20
_AGAIN_S: Final = 1.0  # after which memory that was not there is looked for again; doubled up to
_AGAIN_MAX_S: Final = 60.0
_LOOK_S: Final = 0.05  # between two looks at whether the kernel has allocated it
_NEVER: Final = float("inf")
_MEMINFO: Final = Path("/proc/meminfo")
_CGROUP: Final = Path("/proc/self/cgroup")
_CGROUPS: Final = Path("/sys/fs/cgroup")


class _Limits(NamedTuple):
    """Where a version of cgroups says what memory is allowed. ``line``: how that of /proc/self/cgroup goes on after the
    first colon; ``caches``: files that the kernel gives up before it is short."""

    line: str
    folder: str
    limit: str
    used: str
    caches: tuple[str, str]


_VERSIONS: Final = (
    _Limits(":/", "", "memory.max", "memory.current", ("active_file", "inactive_file")),
    _Limits(
        "memory:/",
        "memory",
        "memory.limit_in_bytes",
        "memory.usage_in_bytes",
        ("total_active_file", "total_inactive_file"),
    ),
)

_WAYS_OUT: Final = {
    errno.EFBIG: "make it smaller, or raise the limit of file sizes (ulimit -f)",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.ENFILE: "raise the system's limit of open files (sysctl fs.file-max)",
}


class ArenaError(Exception):
    """An arena that cannot be made or mapped; the message is a sentence for the user."""


class Arena:
    """This process's own shared memory, and which parts of it are taken.

    ``size``: bytes, rounded up to whole pages. ``name`` is shown in /proc/PID/maps and is not unique. Raises ArenaError
    when the memory is not to be had.

    Peers are sent ``fd``, which remains the arena's; it is -1 once closed. ``allocator`` says what is free and used. An
    arena that is collected without ``close`` is closed.
    """

    __slots__ = ("_memory", "allocator", "fd", "size")

    def __init__(self, size: int, name: str) -> None:
        self.fd = -1
        if type(size) is not int or size < 1:
            raise ArenaError(f"an arena has 1 byte or more, not {size!r}")
        self.size: Final = _whole_pages(size)
        try:
            _check_memory(self.size)
            self.fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            self._memory = memoryview(_allocate(self.fd, self.size))
            _seal(self.fd)
        except OSError as error:
            self.close()
            way_out = _WAYS_OUT.get(error.errno or 0, "make it smaller, or free memory")
            raise ArenaError(f"cannot make an arena of {self.size} bytes: {error.strerror}; {way_out}") from None
        except BaseException:
            self.close()
            raise
        self.allocator: Final = Allocator(self.size)

    def take(self, nbytes: int) -> int | None:
        """The offset of a slot of ``nbytes`` or more, a multiple of 64, or None when there is no room for it."""
        return self.allocator.take(nbytes)

    def give(self, offset: int) -> None:
        """Free the slot that begins there. Raises ValueError when none does. Peers that still look at it see what is
        written there next."""
        self.allocator.give(offset)

    def view(self, offset: int, nbytes: int) -> memoryview:
        """Writable bytes. Raises ValueError when they lie outside, or the arena is closed."""
        if offset < 0 or nbytes < 0 or offset + nbytes > self.size or self.fd < 0:
            if self.fd < 0:
                raise ValueError("the arena is closed")
            raise ValueError(f"{nbytes} bytes at offset {offset} lie outside this arena of {self.size} bytes")
        return self._memory[offset : offset + nbytes]

    def close(self) -> None:
        """Let go of the memory, which stays until the last view and the last peer's mapping of it have gone. Does
        nothing the second time. Slots can still be given back."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
            self._memory = memoryview(b"")

    def __del__(self) -> None:
        self.close()


class Mapping:
    """A peer's arena, to read. ``fd`` is closed, whatever comes of it.

    Raises ArenaError unless it is a memfd that can neither change its size nor be written by those who come later.
    While the mapping lives, it holds one descriptor, Python's own copy (mmap takes one).
    """

    __slots__ = ("_map", "_memory", "size")

    def __init__(self, fd: int) -> None:
        try:
            self.size = _check_seals(fd)  # -1 once closed
            self._map: mmap.mmap | None = mmap.mmap(fd, self.size, mmap.MAP_SHARED, mmap.PROT_READ)
            self._memory = memoryview(self._map)
        except OSError as error:
            raise ArenaError(f"cannot map a peer's arena: {error.strerror}") from None
        finally:
            _close_if_open(fd)

    def view(self, offset: object, nbytes: object) -> memoryview:
        """Bytes that cannot be written through it. Offset and length come from a peer: raises BadMessage unless they
        are whole numbers and lie inside. Raises ValueError when the mapping is closed."""
        # type() rather than isinstance(): a bool is no offset.
        if type(offset) is int and type(nbytes) is int and 0 <= offset <= (end := offset + nbytes) <= self.size:
            return self._memory[offset:end]
        if self.size < 0:
            raise ValueError("the mapping is closed")
        raise BadMessage(
            f"a slot of {brief(nbytes)} bytes at offset {brief(offset)} lies outside its arena of {self.size} bytes"
        )

    def views(self, offsets: Sequence[int], nbytes: int) -> list[memoryview]:
        """As ``view``, of pieces of the same size, with one look at their offsets: whole numbers from 0, as messages
        have been found to hold them."""
        if max(offsets) + nbytes > self.size:
            return [self.view(offset, nbytes) for offset in offsets]  # one of which raises
        memory = self._memory
        return [memory[offset : offset + nbytes] for offset in offsets]

    def copies(self, offsets: Sequence[int], nbytes: int) -> list[bytes] | None:
        """Copies of pieces of the same size, at less cost than views where they are small; offsets as for ``views``.
        None where not all of them lie inside: ``view`` tells which."""
        memory = self._map
        if memory is None or max(offsets) + nbytes > self.size:
            return None
        return [memory[offset : offset + nbytes] for offset in offsets]

    def close(self) -> None:
        """Let go of the memory, which stays until the last view of it has gone. Does nothing the second time."""
        self.size = -1
        self._map = None
        self._memory = memoryview(b"")


def make_arena(asked: int, name: str, key: str) -> Arena | None:
    """The arena that a configuration asks for (see planned_bytes), under ``key``. None: it asks for none, or there is
    no memory for it, which is logged. Whoever has none serves all the same, and is only slower."""
    size = planned_bytes(asked, available_bytes())
    if not size:
        return None
    try:
        return Arena(size, name)
    except ArenaError as error:
        log.warning(
            "no shared memory; large tensors travel in messages, which costs more, until there is some",
            extra=fields(reason=f"{error} ({key} in the configuration)"),
        )
        return None


class ArenaSearch:
    """Looks again for the memory that ``make_arena`` has not found: first after a second, then after twice as long each
    time, up to a minute. On a thread, since the kernel takes a tenth of a second for 256 MiB.

    ``due``: when to ``look`` next, in seconds of the monotonic clock; infinite once it was found, and where none is
    ``wanted``.
    """

    def __init__(self, asked: int, name: str, wanted: bool) -> None:
        self._asked = asked
        self._name = name
        self._again_s = _AGAIN_S
        self._thread: threading.Thread | None = None
        self._found: Arena | None = None
        self.due = 0.0 if wanted and asked else _NEVER

    def look(self, now: float) -> Arena | None:
        """The arena, once: then it is the caller's."""
        if now < self.due:
            return None
        if self._thread is None:
            if self.due:
                self._begin()
            else:  # whoever made this has just looked
                self.due = now + self._again_s
        elif self._thread.is_alive():
            self.due = now + _LOOK_S
        else:
            self._thread = None
            if self._found is not None:
                found, self._found, self.due = self._found, None, _NEVER
                log.info("shared memory was found; large tensors lie there from now on", extra=fields(bytes=found.size))
                return found
            self._again_s = min(2 * self._again_s, _AGAIN_MAX_S)
            self.due = now + self._again_s
        return None

    def _begin(self) -> None:
        self._thread = threading.Thread(target=self._try, name="arena", daemon=True)
        with contextlib.suppress(RuntimeError):  # no memory for a thread either: it counts as one that found none
            self._thread.start()

    def _try(self) -> None:
        with contextlib.suppress(ArenaError, OSError, MemoryError):  # there is none yet, which has been said
            self._found = Arena(planned_bytes(self._asked, available_bytes()), self._name)


def planned_bytes(asked: int, available: int) -> int:
    """How large an arena is made, in whole pages; 0: none is. ``asked``: bytes, 0 for none, -1 for an eighth of the
    ``available`` bytes of memory, at most 256 MiB."""
    size = max(1, min(_DEFAULT_MAX_BYTES, available // 8)) if asked < 0 else asked
    return _whole_pages(size)


def _whole_pages(size: int) -> int:
    return size + mmap.PAGESIZE - 1 & -mmap.PAGESIZE


def _allocate(fd: int, size: int) -> mmap.mmap:
    """A writable mapping whose pages exist."""
    os.ftruncate(fd, size)
    os.posix_fallocate(fd, 0, size)
    return mmap.mmap(fd, size, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)


def _seal(fd: int) -> None:
    try:
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        raise ArenaError(
            f"Linux {os.uname().release} cannot seal shared memory against writers (F_SEAL_FUTURE_WRITE); "
            "Penstock needs Linux 5.1 or newer"
        ) from None


def _check_seals(fd: int) -> int:
    """The size of a peer's arena. Raises ArenaError when it is not what an Arena makes."""
    try:
        seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        raise ArenaError("what a peer sent as its arena is no memfd") from None
    if seals & _READERS_SEALS != _READERS_SEALS:
        raise ArenaError(
            f"what a peer sent as its arena has the seals {seals:#x}, and a reader needs {_READERS_SEALS:#x}: without "
            "them it could shrink, or be written by others, while it is read"
        )
    size = os.fstat(fd).st_size
    if not size:
        raise ArenaError("what a peer sent as its arena has no bytes")
    return size


def _close_if_open(fd: int) -> None:
    try:
        os.close(fd)
    except OSError as error:
        if error.errno != errno.EBADF:
            raise


def available_bytes() -> int:
    """Memory that this process may take now: the host's, or what its limits leave."""
    return min([_host_bytes(), *_cgroup_bytes()])


def _check_memory(size: int) -> None:
    """Raises ArenaError when so much memory is not available: the kernel would allocate until it has to kill."""
    available = available_bytes()
    if size > available:
        raise ArenaError(
            f"an arena of {size} bytes does not fit into the {available} bytes of memory that are available; "
            "make it smaller, free memory, or raise the limit of this service (MemoryMax)"
        )


def _host_bytes() -> int:
    """MemAvailable of proc_meminfo(5)."""
    return _statistics(_MEMINFO)["MemAvailable:"] * 1024


def _cgroup_bytes() -> list[int]:
    """What this process's cgroup, and each above it, would still allow, caches of files given up; [] when there are no
    limits. See the kernel's Documentation/admin-guide/cgroup-v2.rst, "Memory Interface Files", and
    cgroup-v1/memory.rst."""
    found = []
    lines = [line.partition(":")[2] for line in _CGROUP.read_text().splitlines()]
    for version in _VERSIONS:
        path = next((line.removeprefix(version.line) for line in lines if line.startswith(version.line)), "")
        top = _CGROUPS / version.folder
        folder = top / path
        for each in (folder, *folder.parents):
            if not each.is_relative_to(top):
                break
            try:
                limit = (each / version.limit).read_text().strip()
                if limit != "max":
                    about = _statistics(each / "memory.stat")
                    used = int((each / version.used).read_text()) - sum(about[cache] for cache in version.caches)
                    found.append(max(0, int(limit) - used))
            except OSError:
                continue  # no memory controller here
    return found


def _statistics(path: Path) -> dict[str, int]:
    """Names and numbers, a pair on each line."""
    lines = (line.split() for line in path.read_text().splitlines())
    return {words[0]: int(words[1]) for words in lines}
