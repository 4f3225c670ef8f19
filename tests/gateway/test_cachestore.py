"""Answers in memory that several processes share: real files, processes and signals."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lmdb
import pytest

from penstock.gateway import cachestore
from penstock.gateway.cachestore import MemoryStore, StoreError
from penstock.gateway.cachevalue import Kept

DEADLINE_S = 20.0
SIZE = 4 << 20

# Another gateway: it does what it is told. "write": it holds a transaction open, as one in the middle of writing.
OTHER = """
import sys
from pathlib import Path
from penstock.gateway.cachestore import MemoryStore
store = MemoryStore(Path(sys.argv[1]), int(sys.argv[2]), 1 << 20)
print("there", flush=True)
for line in sys.stdin:
    what, number, text = line.rstrip("\\n").split(" ")
    key = int(number).to_bytes(32, "big")
    if what == "get":
        kept = store.get(key)
        print("nothing" if kept is None else kept.payload.decode(), flush=True)
    elif what == "put":
        store.put(key, b"", text.encode())
        print("put", flush=True)
    elif what == "close":
        store.close()
        print("closed", flush=True)
    else:
        with store._env.begin(write=True, db=store._answers) as writing:
            writing.put(key, b"half of something")
            print("writes", flush=True)
            sys.stdin.readline()
"""


class Other:
    def __init__(self, directory: Path) -> None:
        command = [sys.executable, "-c", OTHER, str(directory), str(SIZE)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "there\n"

    def tell(self, what: str, number: int = 0, text: str = "-") -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{what} {number} {text}\n")
        self.process.stdin.flush()

    def ask(self, what: str, number: int = 0, text: str = "-") -> str:
        assert self.process.stdout is not None
        self.tell(what, number, text)
        return self.process.stdout.readline().rstrip("\n")

    def signal(self, number: int) -> None:
        self.process.send_signal(number)


def wait_for(condition: Callable[[], object]) -> None:
    latest = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < latest, "it did not happen"
        os.sched_yield()


def key(number: int) -> bytes:
    return number.to_bytes(32, "big")


def content(kept: Kept | None) -> tuple[bytes, bytes] | None:
    return None if kept is None else (kept.body, kept.payload)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path


@pytest.fixture
def open_store(directory: Path) -> Iterator[Callable[..., MemoryStore]]:
    stores: list[MemoryStore] = []

    def start(nbytes: int = SIZE, pending: int = 1 << 20, ttl_s: float = 0.0) -> MemoryStore:
        stores.append(MemoryStore(directory, nbytes, pending, ttl_s))
        return stores[-1]

    yield start
    for store in stores:
        store.close()


@pytest.fixture
def start_other(directory: Path) -> Iterator[Callable[[], Other]]:
    others: list[Other] = []

    def start() -> Other:
        others.append(Other(directory))
        return others[-1]

    yield start
    for other in others:
        with other.process:  # closes its pipes
            other.process.kill()


def written(store: MemoryStore) -> None:
    wait_for(lambda: not store._pending)


def test_what_is_put_is_there_at_once_and_for_others_soon(
    open_store: Callable[..., MemoryStore], start_other: Callable[[], Other]
) -> None:
    store, other = open_store(), start_other()
    assert store.get(key(1)) is None
    store.put(key(1), b"body", b"payload")
    assert content(store.get(key(1))) == (b"body", b"payload")
    wait_for(lambda: other.ask("get", 1) == "payload")
    assert other.ask("put", 2, "others") == "put"
    wait_for(lambda: store.get(key(2)))
    assert content(store.get(key(2))) == (b"", b"others")
    assert store.measure()[0] == 2


def test_what_is_put_again_takes_its_place(open_store: Callable[..., MemoryStore]) -> None:
    store = open_store()
    for each in (b"first", b"second", b"third"):
        store.put(key(1), b"", each)
        assert content(store.get(key(1))) == (b"", each)
    written(store)
    store.put(key(1), b"", b"fourth")
    written(store)
    assert content(store.get(key(1))) == (b"", b"fourth")
    assert store.measure()[0] == 1
    with store._env.begin() as reading:
        assert reading.stat(store._order)["entries"] == 1


def test_the_oldest_goes_where_there_is_no_room(open_store: Callable[..., MemoryStore], directory: Path) -> None:
    store = open_store()
    for number in range(400):
        store.put(key(number), b"", bytes(20_000))
        written(store)
    kept = [number for number in range(400) if store.get(key(number))]
    assert kept == list(range(400 - len(kept), 400))
    assert len(kept) >= SIZE * 0.6 / 24_000
    assert store.evicted == 400 - len(kept)
    assert store.measure()[1] <= SIZE
    assert sum(each.stat().st_blocks * 512 for each in directory.rglob("data.mdb")) <= SIZE
    assert store.dropped == 0


def test_sizes_of_all_kinds_find_room(open_store: Callable[..., MemoryStore]) -> None:
    store = open_store(pending=SIZE)
    for number in range(1500):
        store.put(key(number), b"", bytes((number * 7919) % (store.largest + 1)))
        if number % 8 == 0:
            written(store)
    written(store)
    assert store.dropped < 150
    assert store.get(key(1499)) is not None or store.dropped
    assert store.measure()[0] > 5


def test_what_is_too_large_is_not_kept(open_store: Callable[..., MemoryStore]) -> None:
    store = open_store()
    store.put(key(1), b"", bytes(store.largest + 1))
    assert store.get(key(1)) is None
    assert store.dropped == 1


def test_what_is_too_old_is_not_there_and_goes(
    open_store: Callable[..., MemoryStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(ttl_s=60.0)
    store.put(key(1), b"", b"old")
    written(store)
    now = time.monotonic()
    assert store.get(key(1)) is not None
    monkeypatch.setattr(cachestore, "time", Clock(now + 61))
    assert store.get(key(1)) is None
    store.put(key(2), b"", b"new")
    written(store)
    assert store.measure()[0] == 1


class Clock:
    def __init__(self, now: float) -> None:
        self._now = now

    def monotonic(self) -> float:
        return self._now


@pytest.mark.parametrize("value", [b"", b"short", bytes(24), bytes(100)])
def test_what_cannot_be_believed_is_not_there(open_store: Callable[..., MemoryStore], value: bytes) -> None:
    store = open_store()
    with store._env.begin(write=True, db=store._answers) as writing:
        writing.put(key(1), value)
    assert store.get(key(1)) is None
    assert store.corrupt == 1


def test_a_file_that_is_scribbled_on_gives_no_wrong_answer(
    open_store: Callable[..., MemoryStore], directory: Path
) -> None:
    store = open_store()
    for number in range(20):
        store.put(key(number), b"body", b"the payload of number %02d" % number)
    written(store)
    [file] = directory.rglob("data.mdb")
    data = file.read_bytes()
    with file.open("r+b") as scribble:
        for number in range(20):
            at = data.find(b"the payload of number %02d" % number)
            while at >= 0:
                scribble.seek(at + number)
                scribble.write(b"?")
                at = data.find(b"the payload of number %02d" % number, at + 1)
    assert [store.get(key(number)) for number in range(20)] == [None] * 20
    assert store.corrupt == 20


# --- processes that are stopped or killed ---


def test_one_that_is_stopped_in_the_middle_of_writing_stops_nobody_elses_loop(
    open_store: Callable[..., MemoryStore], start_other: Callable[[], Other]
) -> None:
    store, other = open_store(pending=100_000), start_other()
    store.put(key(100), b"", b"before")
    written(store)
    assert other.ask("write") == "writes"
    other.signal(signal.SIGSTOP)
    began = time.monotonic()
    for number in range(1, 50):
        store.put(key(number), b"", bytes(10_000))
        store.get(key(number))
    assert content(store.get(key(100))) == (b"", b"before")
    assert time.monotonic() - began < 1.0
    assert store.dropped >= 35, "what cannot be written soon was kept"
    other.signal(signal.SIGCONT)
    other.tell("go on")
    written(store)
    assert store.get(key(1)) is not None


def test_one_that_is_killed_in_the_middle_of_writing_leaves_no_lock_and_nothing_half(
    open_store: Callable[..., MemoryStore], start_other: Callable[[], Other]
) -> None:
    store, other = open_store(), start_other()
    store.put(key(1), b"", b"before")
    written(store)
    assert other.ask("write", 7) == "writes"
    store.put(key(2), b"", b"after")
    other.signal(signal.SIGKILL)
    other.process.wait(DEADLINE_S)
    written(store)
    assert (content(store.get(key(1))), content(store.get(key(2)))) == ((b"", b"before"), (b"", b"after"))
    assert (store.get(key(7)), store.dropped, store.corrupt) == (None, 0, 0)


def test_who_closes_while_another_is_stopped_does_not_wait_long(
    directory: Path, start_other: Callable[[], Other]
) -> None:
    one, other = start_other(), start_other()
    assert other.ask("write") == "writes"
    other.signal(signal.SIGSTOP)
    assert one.ask("put", 1) == "put"
    assert one.ask("close") == "closed"
    assert one.process.stdin is not None
    one.process.stdin.close()
    assert one.process.wait(DEADLINE_S) == 0


# --- files ---


def test_the_last_to_close_removes_it(directory: Path, start_other: Callable[[], Other]) -> None:
    one, other = MemoryStore(directory, SIZE, 1 << 20), start_other()
    one.put(key(1), b"", b"kept")
    written(one)
    one.close()
    assert other.ask("get", 1) == "kept"
    assert other.ask("close") == "closed"
    assert list(directory.iterdir()) == []


def test_what_a_killed_one_left_is_made_anew(
    directory: Path, start_other: Callable[[], Other], open_store: Callable[..., MemoryStore]
) -> None:
    other = start_other()
    other.process.kill()
    other.process.wait(DEADLINE_S)
    [file] = directory.rglob("data.mdb")
    file.write_bytes(b"no database at all" * 1000)
    store = open_store()
    store.put(key(1), b"", b"new")
    written(store)
    assert content(store.get(key(1))) == (b"", b"new")


def test_one_of_another_size_goes_once_nobody_uses_it(directory: Path, start_other: Callable[[], Other]) -> None:
    def sizes() -> set[int]:
        return {int(each.name.rpartition("-")[2]) for each in directory.iterdir() if each.is_dir()}

    other = start_other()
    store = MemoryStore(directory, 2 * SIZE, 1 << 20)
    assert sizes() == {SIZE, 2 * SIZE}
    other.process.kill()
    other.process.wait(DEADLINE_S)
    third = MemoryStore(directory, 4 * SIZE, 1 << 20)
    assert sizes() == {2 * SIZE, 4 * SIZE}
    store.close()
    third.close()
    assert sizes() == set()


def test_where_it_cannot_be_there_is_none(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match="Not a directory"):
        MemoryStore(tmp_path / "file", SIZE, 1 << 20)


def test_what_cannot_be_written_is_said_once_and_dropped(
    open_store: Callable[..., MemoryStore], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    store = open_store()
    monkeypatch.setattr(cachestore, "_REST_S", 0.01)

    def full(*arguments: Any) -> None:
        raise lmdb.DiskError("No space left on device")

    monkeypatch.setattr(store, "_put", full)
    for number in range(3):
        store.put(key(number), b"", b"")
        written(store)
        assert store.get(key(number)) is None
    assert store.dropped == 3
    assert [record.message for record in caplog.records] == ["answers cannot be kept"]


@pytest.mark.parametrize("left", [0, 100, 4096, 8192, 40_000])
def test_one_that_was_cut_is_made_anew_though_another_uses_it(
    left: int, directory: Path, start_other: Callable[[], Other]
) -> None:
    first = start_other()
    for number in range(20):
        assert first.ask("put", number, "x" * 1000) == "put"
    [file] = directory.rglob("data.mdb")
    wait_for(lambda: file.stat().st_blocks * 512 > 40_000)
    first.signal(signal.SIGSTOP)  # else it might end of it
    os.truncate(file, left)
    second = start_other()
    assert second.ask("get", 1) == "nothing"
    assert second.ask("put", 1, "new") == "put"
    assert start_other().ask("get", 2) == "nothing"
    assert second.ask("get", 1) == "new"
