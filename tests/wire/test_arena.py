"""An arena is written by its owner alone, read by whoever has its descriptor, and gone when nobody holds it."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import gc
import json
import mmap
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.wire import arena as module
from penstock.wire.arena import Arena, ArenaError, ArenaSearch, Mapping, make_arena, planned_bytes
from penstock.wire.errors import BadMessage
from tests.system.shared import SharedMemory

PAGE = mmap.PAGESIZE
SIZE = 16 * PAGE
FUTURE_WRITE = 0x10


def descriptors() -> dict[int, str]:
    """This process's open ones, and what they are."""
    found = {}
    for name in os.listdir("/proc/self/fd"):
        try:
            found[int(name)] = os.readlink(f"/proc/self/fd/{name}")
        except FileNotFoundError:
            continue  # the one of the listing
    return found


def mapped(name: str) -> int:
    """How many mappings of memfds of this name this process has."""
    return Path("/proc/self/maps").read_text().count(f"/memfd:{name}")


@pytest.fixture(autouse=True)
def no_descriptor_is_left() -> Iterator[None]:
    gc.collect()  # what other tests have left to it
    before = descriptors()
    yield
    assert descriptors() == before


@pytest.fixture
def arena() -> Iterator[Arena]:
    arena = Arena(SIZE, "penstock-test")
    yield arena
    arena.close()


@pytest.fixture
def mapping(arena: Arena) -> Iterator[Mapping]:
    mapping = Mapping(os.dup(arena.fd))
    yield mapping
    mapping.close()


@contextmanager
def process(script: str) -> Iterator[tuple[subprocess.Popen[bytes], socket.socket]]:
    """A Python process, killed at the end, whose variable ``parent`` is connected to the socket."""
    ours, its = socket.socketpair()
    begin = f"import socket; parent = socket.socket(fileno={its.fileno()}); parent.settimeout(60)\n"
    with ours, its:
        ours.settimeout(60)
        command = [sys.executable, "-c", begin + script]
        with subprocess.Popen(command, pass_fds=[its.fileno()]) as running:
            its.close()
            try:
                yield running, ours
            finally:
                running.kill()


def received(connection: socket.socket) -> int:
    _, fds, _, _ = socket.recv_fds(connection, 16, 1)
    assert len(fds) == 1
    return fds[0]


# --- owner and peer ---


READER = """
import sys
from penstock.wire.arena import Mapping
_, fds, _, _ = socket.recv_fds(parent, 16, 1)
mapping = Mapping(fds[0])
while asked := parent.recv(64):
    offset, nbytes = map(int, asked.split())
    parent.sendall(mapping.view(offset, nbytes))
"""


def test_another_process_reads_what_the_owner_writes(arena: Arena) -> None:
    with process(READER) as (running, peer):
        socket.send_fds(peer, [b"arena"], [arena.fd])
        for text in (b"first", b"second, after it was mapped"):
            offset = arena.take(len(text))
            assert offset is not None
            arena.view(offset, len(text))[:] = text
            peer.sendall(f"{offset} {len(text)}".encode())
            assert peer.recv(64) == text
        peer.shutdown(socket.SHUT_WR)
        assert running.wait(60) == 0


ATTACKER = """
import ctypes, errno, fcntl, json, mmap, os
import numpy as np
from penstock.wire.arena import Mapping
_, fds, _, _ = socket.recv_fds(parent, 16, 1)
fd = fds[0]
mapping = Mapping(os.dup(fd))
libc = ctypes.CDLL(None, use_errno=True)
address = np.frombuffer(mapping.view(0, mapping.size), np.uint8).ctypes.data
BOTH = mmap.PROT_READ | mmap.PROT_WRITE
anew = os.open(f"/proc/self/fd/{fd}", os.O_RDWR)

def called(result):
    if result:
        raise OSError(ctypes.get_errno(), "")

attempts = {
    "map writable": lambda: mmap.mmap(fd, 0, mmap.MAP_SHARED, BOTH),
    "mprotect": lambda: called(libc.mprotect(ctypes.c_void_p(address), 4096, BOTH)),
    "pwrite": lambda: os.pwrite(fd, b"x", 0),
    "write": lambda: os.write(fd, b"x"),
    "shrink": lambda: os.ftruncate(fd, 0),
    "grow": lambda: os.ftruncate(fd, mapping.size * 2),
    "punch a hole": lambda: called(libc.fallocate(fd, 3, ctypes.c_long(0), ctypes.c_long(4096))),
    "seal": lambda: fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE),
    "reopen and map": lambda: mmap.mmap(anew, 0, mmap.MAP_SHARED, BOTH),
    "reopen and pwrite": lambda: os.pwrite(anew, b"x", 0),
    "reopen and truncate": lambda: os.truncate(f"/proc/self/fd/{fd}", 0),
    "write through the view": lambda: mapping.view(0, 1).__setitem__(0, 1),
    "write through an array": lambda: np.frombuffer(mapping.view(0, 1), np.uint8).__setitem__(0, 1),
    "read": lambda: mapping.view(0, 1)[0],
}
outcomes = {}
for name, attempt in attempts.items():
    try:
        attempt()
        outcomes[name] = "done"
    except OSError as error:
        outcomes[name] = errno.errorcode[error.errno]
    except (TypeError, ValueError) as error:
        outcomes[name] = type(error).__name__
parent.sendall(json.dumps(outcomes).encode())
"""


def test_a_peer_cannot_write_or_change_the_size(arena: Arena) -> None:
    arena.view(0, SIZE)[:] = b"o" * SIZE
    with process(ATTACKER) as (running, peer):
        socket.send_fds(peer, [b"arena"], [arena.fd])
        outcomes = json.loads(peer.recv(4096))
        assert running.wait(60) == 0
    assert outcomes == {
        "map writable": "EPERM",
        "mprotect": "EACCES",
        "pwrite": "EPERM",
        "write": "EPERM",
        "shrink": "EPERM",
        "grow": "EPERM",
        "punch a hole": "EPERM",
        "seal": "EPERM",
        "reopen and map": "EPERM",
        "reopen and pwrite": "EPERM",
        "reopen and truncate": "EPERM",
        "write through the view": "TypeError",
        "write through an array": "ValueError",
        "read": "done",
    }
    assert arena.view(0, SIZE) == b"o" * SIZE
    assert os.fstat(arena.fd).st_size == SIZE


OWNER = """
from penstock.wire.arena import Arena
arena = Arena(1 << 20, "penstock-doomed")
arena.view(4096, 4)[:] = b"last"
socket.send_fds(parent, [b"arena"], [arena.fd])
parent.recv(1)
"""


def test_the_owners_death_leaves_readers_their_memory_and_nothing_else() -> None:
    shared = SharedMemory()
    with process(OWNER) as (owner, connection):
        mapping = Mapping(received(connection))
        owner.send_signal(signal.SIGKILL)
        assert owner.wait(60) == -signal.SIGKILL
    assert bytes(mapping.view(4096, 4)) == b"last"
    assert bytes(mapping.view(0, 1 << 20)).count(0) == (1 << 20) - 4
    mapping.close()
    assert mapped("penstock-doomed") == 0
    shared.check("a dead owner left shared memory behind")


def test_onnx_runtime_reads_a_view_without_a_copy(arena: Arena, mapping: Mapping) -> None:
    arena.take(1)
    offset = arena.take(4 * 48)
    assert offset == 64
    values = np.arange(48, dtype=np.float32)
    arena.view(offset, 4 * 48)[:] = values.tobytes()
    array = np.frombuffer(mapping.view(offset, 4 * 48), np.float32).reshape(4, 12)
    assert not array.flags.writeable
    assert array.ctypes.data % 64 == 0
    value = onnxruntime.OrtValue.ortvalue_from_numpy(array)
    assert value.data_ptr() == array.ctypes.data
    assert np.array_equal(value.numpy(), values.reshape(4, 12))


# --- the owner's side ---


def test_an_arena_has_its_pages_and_its_seals(arena: Arena) -> None:
    about = os.fstat(arena.fd)
    assert (about.st_size, about.st_blocks * 512) == (SIZE, SIZE)
    seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | FUTURE_WRITE | fcntl.F_SEAL_SEAL
    assert fcntl.fcntl(arena.fd, fcntl.F_GET_SEALS) == seals
    assert not os.get_inheritable(arena.fd)
    assert mapped("penstock-test") == 1


@pytest.mark.parametrize(("size", "rounded"), [(1, PAGE), (PAGE, PAGE), (PAGE + 1, 2 * PAGE)])
def test_a_size_is_rounded_up_to_pages(size: int, rounded: int) -> None:
    arena = Arena(size, "penstock-test")
    assert arena.size == arena.allocator.size == arena.allocator.largest == rounded
    assert len(arena.view(0, rounded)) == rounded
    arena.close()


def test_slots_are_taken_written_and_given_back(arena: Arena) -> None:
    first, second = arena.take(100), arena.take(SIZE - 128)
    assert (first, second) == (0, 128)
    assert arena.take(1) is None
    view = arena.view(128, SIZE - 128)
    view[:] = b"x" * (SIZE - 128)
    assert arena.view(0, 128) == bytes(128)
    arena.give(128)
    assert arena.allocator.used == 128
    with pytest.raises(ValueError, match="no slot begins at offset 128"):
        arena.give(128)


@pytest.mark.parametrize(("offset", "nbytes"), [(-1, 1), (0, -1), (SIZE, 1), (0, SIZE + 1), (SIZE + 1, 0), (-64, 128)])
def test_the_owner_sees_nothing_outside(arena: Arena, offset: int, nbytes: int) -> None:
    sentence = f"^{nbytes} bytes at offset {offset} lie outside this arena of {SIZE} bytes$"
    with pytest.raises(ValueError, match=sentence):
        arena.view(offset, nbytes)


def test_a_closed_arena_is_gone(arena: Arena) -> None:
    before = descriptors()
    other = Arena(SIZE, "penstock-closed")
    assert len(descriptors()) == len(before) + 2  # its own, and Python's copy for the mapping
    offset = other.take(1)
    assert offset is not None
    other.close()
    assert descriptors() == before
    assert mapped("penstock-closed") == 0
    other.close()
    assert descriptors() == before, "closing twice closed somebody else's descriptor"
    assert other.fd == -1
    with pytest.raises(ValueError, match="the arena is closed"):
        other.view(0, 1)
    other.give(offset)


def test_a_second_close_spares_the_next_descriptor() -> None:
    arena = Arena(SIZE, "penstock-test")
    number = arena.fd
    arena.close()
    next_one = os.open("/dev/null", os.O_RDONLY)
    try:
        assert next_one == number
        arena.close()
        del arena
        gc.collect()
        assert descriptors()[next_one] == "/dev/null"
    finally:
        os.close(next_one)


def test_a_forgotten_arena_is_gone() -> None:
    before = descriptors()
    arena = Arena(SIZE, "penstock-forgotten")
    mapping = Mapping(os.dup(arena.fd))
    assert mapped("penstock-forgotten") == 2
    del arena, mapping
    gc.collect()
    assert descriptors() == before
    assert mapped("penstock-forgotten") == 0


@pytest.mark.parametrize("wrap", [memoryview, lambda view: np.frombuffer(view, np.uint8)[3:]])
def test_views_outlive_what_they_are_of(wrap: Callable[[memoryview], Any]) -> None:
    before = descriptors()
    arena = Arena(SIZE, "penstock-viewed")
    mapping = Mapping(os.dup(arena.fd))
    written, read = wrap(arena.view(64, 8)), wrap(mapping.view(64, 8))
    arena.close()
    mapping.close()
    assert mapped("penstock-viewed") == 2
    written[4] = 7
    assert read[4] == 7
    del arena, mapping, written
    gc.collect()
    assert mapped("penstock-viewed") == 1
    del read
    gc.collect()
    assert mapped("penstock-viewed") == 0
    assert descriptors() == before


# --- memory that is not to be had ---


@contextmanager
def limited(what: int, limit: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(what)
    resource.setrlimit(what, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(what, (soft, hard))


@pytest.mark.parametrize("size", [1 << 50, 1 << 63, 1 << 100])
def test_more_memory_than_there_is_is_refused_at_once(size: int) -> None:
    # The limit is for a version that does not refuse: it would take all memory until a process is killed.
    with limited(resource.RLIMIT_FSIZE, SIZE), pytest.raises(ArenaError) as caught:
        Arena(size, "penstock-test")
    assert str(caught.value).startswith(f"an arena of {size} bytes does not fit into the ")
    assert str(caught.value).endswith("; make it smaller, free memory, or raise the limit of this service (MemoryMax)")


@pytest.mark.parametrize("size", [0, -1, 1.5, None, True])
def test_what_is_no_size_is_refused(size: Any) -> None:
    with pytest.raises(ArenaError, match="an arena has 1 byte or more, not "):
        Arena(size, "penstock-test")


def test_the_limit_of_file_sizes_is_named() -> None:
    sentence = rf"^cannot make an arena of {SIZE} bytes: File too large; make it smaller, or raise .* \(ulimit -f\)$"
    with limited(resource.RLIMIT_FSIZE, SIZE - 1), pytest.raises(ArenaError, match=sentence):
        Arena(SIZE, "penstock-test")


@pytest.mark.parametrize("more", [0, 1])
def test_the_limit_of_open_files_is_named(more: int) -> None:
    """0: nothing can be opened; 1: the memfd can, and no copy for its mapping."""
    first, second = os.dup(0), os.dup(0)  # the lowest numbers that are free
    os.close(first)
    os.close(second)
    sentence = rf"^cannot make an arena of {SIZE} bytes: Too many open files; raise the limit .* \(ulimit -n\)$"
    with limited(resource.RLIMIT_NOFILE, second if more else first), pytest.raises(ArenaError, match=sentence):
        Arena(SIZE, "penstock-test")
    with limited(resource.RLIMIT_NOFILE, second + 1):
        Arena(SIZE, "penstock-test").close()


@pytest.mark.parametrize("step", ["ftruncate", "posix_fallocate", "mmap", "fcntl"])
def test_whatever_fails_leaves_nothing(step: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before = descriptors()

    def fail(*_: object) -> None:
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    monkeypatch.setattr({"mmap": mmap, "fcntl": fcntl}.get(step, os), step, fail)
    with pytest.raises(ArenaError) as caught:
        Arena(SIZE, "penstock-failed")
    assert str(caught.value) == (
        f"cannot make an arena of {SIZE} bytes: Cannot allocate memory; make it smaller, or free memory"
    )
    assert descriptors() == before, "while the error, and so its traceback, is still there"
    assert mapped("penstock-failed") == 0


def test_a_kernel_without_the_seal_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    before = descriptors()
    monkeypatch.setattr(module, "_SEALS", 1 << 30)  # no kernel knows it: EINVAL, as FUTURE_WRITE before 5.1
    with pytest.raises(ArenaError) as caught:
        Arena(SIZE, "penstock-failed")
    assert str(caught.value).startswith(f"Linux {os.uname().release} cannot seal shared memory against writers (F_")
    assert str(caught.value).endswith("; Penstock needs Linux 5.1 or newer")
    assert descriptors() == before, "while the error, and so its traceback, is still there"
    assert mapped("penstock-failed") == 0


def write_group(folder: Path, limit: str, current: int, files: int) -> None:
    (folder / "memory.max").write_text(f"{limit}\n")
    (folder / "memory.current").write_text(f"{current}\n")
    (folder / "memory.stat").write_text(f"anon 1\nactive_file {files}\ninactive_file {files}\nshmem 9\n")


def test_the_limits_of_the_service_and_of_what_is_above_it_count(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    service = tmp_path / "groups" / "system.slice" / "penstock.service"
    service.mkdir(parents=True)
    (tmp_path / "own").write_text("4:memory:/elsewhere\n0::/system.slice/penstock.service\n")
    monkeypatch.setattr(module, "_CGROUP", tmp_path / "own")
    monkeypatch.setattr(module, "_CGROUPS", tmp_path / "groups")
    Arena(SIZE, "penstock-test").close()  # there are no limits
    write_group(service, "max", 10, 0)
    write_group(service.parent, str(SIZE + 1000), 2000, 500)
    Arena(SIZE, "penstock-test").close()  # fits exactly, without the files' caches
    write_group(service.parent, str(SIZE + 999), 2000, 500)
    with pytest.raises(ArenaError, match=rf"an arena of {SIZE} bytes does not fit into the {SIZE - 1} bytes of memory"):
        Arena(SIZE, "penstock-test")
    write_group(service.parent, "max", 2000, 500)
    write_group(service, "100", 2000, 500)
    with pytest.raises(ArenaError, match=rf"an arena of {SIZE} bytes does not fit into the 0 bytes of memory"):
        Arena(SIZE, "penstock-test")
    write_group(service, "max", 2000, 500)
    write_group(tmp_path / "groups", "4096", 96, 0)  # as a container sees its own
    with pytest.raises(ArenaError, match="does not fit into the 4000 bytes of memory"):
        Arena(SIZE, "penstock-test")


def write_old_group(folder: Path, limit: int, current: int, files: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.limit_in_bytes").write_text(f"{limit}\n")
    (folder / "memory.usage_in_bytes").write_text(f"{current}\n")
    stat = f"active_file 0\ninactive_file 0\ntotal_active_file {files}\ntotal_inactive_file {files}\n"
    (folder / "memory.stat").write_text(stat)


@pytest.mark.parametrize("path", ["/docker/1/service", "/"])
def test_limits_of_the_first_version_of_cgroups_count(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, path: str
) -> None:
    """There the kernel kills instead of saying that there is no memory."""
    top = tmp_path / "groups" / "memory"
    (tmp_path / "own").write_text(f"4:memory:{path}\n2:cpuacct:/x\n0::/init.scope\n")
    monkeypatch.setattr(module, "_CGROUP", tmp_path / "own")
    monkeypatch.setattr(module, "_CGROUPS", tmp_path / "groups")
    write_old_group(top, 0x7FFFFFFFFFFFF000, 10, 0)  # as it says where there is no limit
    Arena(SIZE, "penstock-test").close()
    write_old_group(top / path[1:], SIZE + 1000, 2000, 500)
    Arena(SIZE, "penstock-test").close()
    write_old_group(top / path[1:], SIZE + 999, 2000, 500)
    with pytest.raises(ArenaError, match=rf"an arena of {SIZE} bytes does not fit into the {SIZE - 1} bytes of memory"):
        Arena(SIZE, "penstock-test")


# --- what a peer sends instead of an arena ---


def memfd(size: int, seals: int, allow: int = os.MFD_ALLOW_SEALING) -> int:
    fd = os.memfd_create("penstock-foreign", os.MFD_CLOEXEC | allow)
    os.ftruncate(fd, size)
    if allow:
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    return fd


def plain_file() -> int:
    fd = os.open("/tmp", os.O_TMPFILE | os.O_RDWR, 0o600)
    os.ftruncate(fd, SIZE)
    return fd


def pipe() -> int:
    reading, writing = os.pipe()
    os.close(writing)
    return reading


def closed() -> int:
    fd = os.dup(0)
    os.close(fd)
    return fd


NEEDED = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | FUTURE_WRITE
REFUSED: dict[str, tuple[Callable[[], int], str]] = {
    "cannot be sealed": (lambda: memfd(SIZE, 0, 0), "has the seals 0x1, and a reader needs 0x16"),
    "unsealed": (lambda: memfd(SIZE, 0), "has the seals 0x0, and a reader needs 0x16"),
    "may shrink": (lambda: memfd(SIZE, NEEDED & ~fcntl.F_SEAL_SHRINK), "has the seals 0x14, and"),
    "may grow": (lambda: memfd(SIZE, NEEDED & ~fcntl.F_SEAL_GROW), "has the seals 0x12, and"),
    "may be written": (lambda: memfd(SIZE, NEEDED & ~FUTURE_WRITE), "has the seals 0x6, and"),
    "empty": (lambda: memfd(0, NEEDED), "has no bytes"),
    "file": (plain_file, "is no memfd"),
    "pipe": (pipe, "is no memfd"),
    "closed": (closed, "cannot map a peer's arena: Bad file descriptor"),
}


@pytest.mark.parametrize("which", REFUSED)
def test_what_is_no_sealed_memory_is_refused(which: str) -> None:
    make, sentence = REFUSED[which]
    before = descriptors()
    with pytest.raises(ArenaError) as caught:
        Mapping(make())
    assert sentence in str(caught.value)
    assert descriptors() == before
    assert mapped("penstock-foreign") == 0


def test_a_file_in_shared_memory_is_refused(tmp_path: Path) -> None:
    """It is tmpfs, as a memfd is, and answers with seals."""
    before = descriptors()
    fd = os.open("/dev/shm", os.O_TMPFILE | os.O_RDWR, 0o600)
    os.ftruncate(fd, SIZE)
    with pytest.raises(ArenaError, match="has the seals 0x1, and a reader needs 0x16"):
        Mapping(fd)
    assert descriptors() == before


def test_a_mapping_that_fails_closes_its_descriptor(monkeypatch: pytest.MonkeyPatch) -> None:
    before = descriptors()
    fd = memfd(SIZE, NEEDED)

    def fail(*_: object) -> None:
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    monkeypatch.setattr(mmap, "mmap", fail)
    with pytest.raises(ArenaError, match=r"^cannot map a peer's arena: Cannot allocate memory$"):
        Mapping(fd)
    assert descriptors() == before


def test_a_mapping_takes_the_descriptor(arena: Arena) -> None:
    before = descriptors()
    fd = os.dup(arena.fd)
    mapping = Mapping(fd)
    assert mapping.size == SIZE
    assert len(descriptors()) == len(before) + 1  # Python's copy
    mapping.close()
    mapping.close()
    assert descriptors() == before
    with pytest.raises(ValueError, match="the mapping is closed"):
        mapping.view(0, 0)


def test_copies_are_what_lay_there(arena: Arena, mapping: Mapping) -> None:
    arena.view(0, SIZE)[:] = bytes(number % 251 for number in range(SIZE))
    offsets = [0, 4000, SIZE - 100, 4000]
    copies = mapping.copies(offsets, 100)
    assert copies is not None
    assert copies == [bytes(mapping.view(offset, 100)) for offset in offsets]
    arena.view(0, SIZE)[:] = bytes(SIZE)
    assert copies[0] == bytes(range(100))


def test_views_are_those_of_each(arena: Arena, mapping: Mapping) -> None:
    arena.view(0, SIZE)[:] = bytes(number % 251 for number in range(SIZE))
    offsets = [0, 4000, SIZE - 100, 4000]
    views = mapping.views(offsets, 100)
    assert [bytes(view) for view in views] == [bytes(mapping.view(offset, 100)) for offset in offsets]
    assert all(view.readonly for view in views)


@pytest.mark.parametrize(
    ("offsets", "nbytes", "sentence"),
    [([0, SIZE], 1, f"1 bytes at offset {SIZE}"), ([0, 1 << 63], 0, "0 bytes at offset 9223372036854775808")],
)
def test_of_views_one_that_lies_outside_is_an_error(
    mapping: Mapping, offsets: list[int], nbytes: int, sentence: str
) -> None:
    with pytest.raises(BadMessage, match=f"a slot of {sentence} lies outside"):
        mapping.views(offsets, nbytes)


@pytest.mark.parametrize(("offsets", "nbytes"), [([0, SIZE], 1), ([SIZE - 1, 0], 2), ([0], SIZE + 1), ([1 << 63], 0)])
def test_there_are_no_copies_of_what_lies_outside(mapping: Mapping, offsets: list[int], nbytes: int) -> None:
    assert mapping.copies(offsets, nbytes) is None


def test_there_are_no_copies_of_what_is_closed(arena: Arena) -> None:
    mapping = Mapping(os.dup(arena.fd))
    mapping.close()
    assert mapping.copies([0], 1) is None


# --- lying descriptors ---

near = st.sampled_from([0, 1, 63, 64, PAGE, SIZE - 1, SIZE, SIZE + 1, 1 << 31, 1 << 32, 1 << 63, 1 << 64])
whole = near | near.map(lambda value: -value) | st.integers(-(1 << 70), 1 << 70) | st.integers(0, SIZE)
PATTERN = bytes(np.arange(SIZE // 4, dtype=np.uint32).tobytes())


@pytest.fixture(scope="module")
def patterned() -> Iterator[Mapping]:
    """Every aligned word says where it is."""
    arena = Arena(SIZE, "penstock-patterned")
    arena.view(0, SIZE)[:] = PATTERN
    mapping = Mapping(os.dup(arena.fd))
    arena.close()
    yield mapping
    mapping.close()


@settings(max_examples=500, deadline=None)
@given(offset=whole, nbytes=whole)
def test_a_view_is_what_was_named_or_none(patterned: Mapping, offset: int, nbytes: int) -> None:
    if 0 <= offset <= offset + nbytes <= SIZE:
        view = patterned.view(offset, nbytes)
        assert view.readonly
        assert view == PATTERN[offset : offset + nbytes]
        assert len(view) == view.nbytes == nbytes
        return
    with pytest.raises(BadMessage) as caught:
        patterned.view(offset, nbytes)
    assert str(caught.value) == (f"a slot of {nbytes} bytes at offset {offset} lies outside its arena of {SIZE} bytes")


@pytest.mark.parametrize("wrong", [None, True, 1.0, "1", b"1", (1,), np.int64(1)])
def test_what_is_no_number_names_no_view(patterned: Mapping, wrong: object) -> None:
    for offset, nbytes in ((wrong, 1), (1, wrong), (wrong, wrong)):
        with pytest.raises(BadMessage, match=rf"^a slot of .* bytes at offset .* lies outside its arena of {SIZE} b"):
            patterned.view(offset, nbytes)


def test_a_view_is_no_copy(patterned: Mapping) -> None:
    addresses = [np.frombuffer(patterned.view(offset, 64), np.uint8).ctypes.data for offset in (0, 64, PAGE)]
    assert [address - addresses[0] for address in addresses] == [0, 64, PAGE]
    assert addresses[0] % PAGE == 0
    assert ctypes.string_at(addresses[0], SIZE) == PATTERN


# --- how large ---


@pytest.mark.parametrize(
    ("asked", "available", "planned"),
    [
        (0, 1 << 40, 0),
        (1, 0, mmap.PAGESIZE),
        (mmap.PAGESIZE + 1, 0, 2 * mmap.PAGESIZE),
        (1 << 60, 0, 1 << 60),
        (-1, 0, mmap.PAGESIZE),
        (-1, 8 << 20, 1 << 20),
        (-1, (8 << 20) + 8, (1 << 20) + mmap.PAGESIZE),
        (-1, 1 << 40, 256 << 20),
    ],
)
def test_an_arena_is_as_large_as_was_asked_or_as_memory_allows(asked: int, available: int, planned: int) -> None:
    assert planned_bytes(asked, available) == planned


def test_an_arena_that_is_made_is_as_large_as_was_planned(caplog: pytest.LogCaptureFixture) -> None:
    assert make_arena(0, "test", "key") is None
    arena = make_arena(100_000, "test", "key")
    assert arena is not None
    assert arena.size == planned_bytes(100_000, 0)
    arena.close()
    assert caplog.records == []
    assert make_arena(1 << 60, "test", "[x] arena_bytes") is None
    [said] = caplog.records
    assert said.getMessage().startswith("no shared memory; large tensors travel in messages")
    reason = said.__dict__["fields"]["reason"]
    assert re.search(r"does not fit into .* \(\[x\] arena_bytes in the configuration\)$", reason)


def attempt(search: ArenaSearch) -> tuple[Arena | None, float]:
    """What the next attempt finds, and the time at which it ends."""
    now = search.due
    assert search.look(now) is None, "nothing is allocated on the thread that looks"
    assert search._thread is not None
    search._thread.join(20)
    now = max(now, search.due)
    return search.look(now), now


def test_memory_is_looked_for_ever_less_often_until_it_is_there(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    available = 0
    monkeypatch.setattr(module, "available_bytes", lambda: available)
    search = ArenaSearch(100_000, "found", True)
    assert search.look(0.0) is None
    assert search.due == 1.0
    pauses = []
    for _ in range(8):
        found, now = attempt(search)
        assert found is None
        pauses.append(search.due - now)
    assert pauses == [2, 4, 8, 16, 32, 60, 60, 60]
    assert search.look(now) is None, "it is not time yet"
    assert caplog.records == [], "that it is missing has been said"
    available = 1 << 30
    with caplog.at_level("INFO"):
        arena, now = attempt(search)
    assert arena is not None
    assert arena.size == planned_bytes(100_000, 0)
    [said] = caplog.records
    assert said.getMessage().startswith("shared memory was found")
    assert search.due == float("inf")
    assert search.look(now) is None
    arena.close()


@pytest.mark.parametrize(("asked", "wanted"), [(100_000, False), (0, True)])
def test_where_none_is_wanted_nothing_is_looked_for(asked: int, wanted: bool) -> None:
    assert ArenaSearch(asked, "none", wanted).due == float("inf")


def test_no_thread_is_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_thread(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    search = ArenaSearch(100_000, "none", True)
    search.look(5.0)
    with monkeypatch.context() as without:
        without.setattr(threading.Thread, "start", no_thread)
        assert search.look(search.due) is None
    assert search.look(search.due) is None
    assert search.due == 8.0
    arena, _ = attempt(search)
    assert arena is not None
    arena.close()
