"""The file of a SQLite store: made whole, for its user alone, and left as it is when it is damaged or another's."""

from __future__ import annotations

import os
import sqlite3
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from penstock.jobs.job import SUCCEEDED, StoredRequest, StoredResponse
from penstock.jobs.options import JobsOptions
from penstock.jobs.sqlfile import APPLICATION, create
from penstock.jobs.sqlite import SqliteStore
from penstock.jobs.store import SCHEMA, StoreError

REQUEST = StoredRequest(b"POST", b"/", {}, b"body", "m")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state" / "jobs.sqlite"


@pytest.fixture
def store(path: Path) -> Iterator[SqliteStore]:
    store = SqliteStore(path, JobsOptions(store_wait_s=0.2, connections_max=2))
    yield store
    store.close()


def test_opening_touches_nothing(store: SqliteStore, path: Path) -> None:
    assert not path.parent.exists()


def test_it_is_for_its_user_alone(store: SqliteStore, path: Path) -> None:
    before = os.umask(0)
    try:
        store.submit(REQUEST, 1.0)
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert {stat.S_IMODE(each.stat().st_mode) for each in path.parent.iterdir()} == {0o600}


def test_what_is_accepted_is_written_through(store: SqliteStore, path: Path) -> None:
    store.submit(REQUEST, 1.0)
    connection = sqlite3.connect(path)
    assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    assert connection.execute("PRAGMA application_id").fetchone() == (APPLICATION,)
    assert connection.execute("PRAGMA user_version").fetchone() == (SCHEMA,)
    connection.close()
    with store._file.writing() as used:
        assert used.execute("PRAGMA synchronous").fetchone() == (2,)  # FULL


def test_nothing_is_left_beside_it_in_the_end(store: SqliteStore, path: Path) -> None:
    store.submit(REQUEST, 1.0)
    store.change()
    store.close()
    assert [each.name for each in path.parent.iterdir()] == ["jobs.sqlite"]


def test_many_may_make_it_at_the_same_time(path: Path) -> None:
    stores = [SqliteStore(path, JobsOptions()) for _ in range(8)]
    start = threading.Barrier(len(stores))

    def submit(store: SqliteStore) -> None:
        start.wait(10)
        store.submit(REQUEST, 1.0)

    with ThreadPoolExecutor(len(stores)) as pool:
        list(pool.map(submit, stores))
    assert stores[0].counts().by_status["queued"] == len(stores)
    for store in stores:
        store.close()
    assert [each.name for each in path.parent.iterdir()] == ["jobs.sqlite"]


def test_many_threads_take_turns(path: Path) -> None:
    store = SqliteStore(path, JobsOptions(store_wait_s=60.0, connections_max=3))

    def live(number: int) -> None:
        owner = f"owner {number}"
        for _ in range(10):
            store.submit(REQUEST, 1.0)
            for job in store.claim(owner, 1, 1.0, 100.0):
                assert store.finish(job.id, owner, SUCCEEDED, StoredResponse(200, {}, b"x"), "", 2.0)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(live, range(8)))
    assert store.counts().by_status["succeeded"] == 80
    store.close()


@pytest.mark.parametrize("mode", [0o777, 0o770])
def test_a_directory_that_is_open_to_others_is_not_used(store: SqliteStore, path: Path, mode: int) -> None:
    path.parent.mkdir()
    path.parent.chmod(mode)
    with pytest.raises(StoreError, match="others may write to it; make it yours with mode 0700"):
        store.submit(REQUEST, 1.0)
    path.parent.chmod(0o700)
    store.submit(REQUEST, 1.0)


def test_where_there_can_be_no_directory(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    store = SqliteStore(tmp_path / "file" / "jobs.sqlite", JobsOptions())
    with pytest.raises(StoreError, match="cannot be used: Not a directory"):
        store.submit(REQUEST, 1.0)
    store.close()


@pytest.mark.parametrize("content", [b"", b"no database at all" * 1000])
def test_what_is_no_store_is_left_as_it_is(store: SqliteStore, path: Path, content: bytes) -> None:
    path.parent.mkdir(mode=0o700)
    path.write_bytes(content)
    for _ in range(2):
        with pytest.raises(StoreError, match="move it aside"):
            store.submit(REQUEST, 1.0)
        with pytest.raises(StoreError, match="move it aside"):
            store.change()
    assert path.read_bytes() == content
    path.rename(path.with_name("aside"))
    store.submit(REQUEST, 1.0)
    assert path.with_name("aside").read_bytes() == content


def test_another_programs_database_is_left_as_it_is(store: SqliteStore, path: Path) -> None:
    path.parent.mkdir(mode=0o700)
    connection = sqlite3.connect(path)
    connection.execute("CREATE TABLE jobs (id)")
    connection.commit()
    connection.close()
    before = path.read_bytes()
    with pytest.raises(StoreError, match=r"is no store of jobs; move it aside, or name another with \[jobs\] store"):
        store.counts()
    assert path.read_bytes() == before


def test_one_of_another_version_is_left_as_it_is(store: SqliteStore, path: Path) -> None:
    create(path)
    connection = sqlite3.connect(path)
    connection.execute(f"PRAGMA user_version = {SCHEMA + 1}")
    connection.close()
    with pytest.raises(StoreError, match=f"of version {SCHEMA + 1}, and this Penstock reads {SCHEMA}; move it aside"):
        store.counts()


def test_a_damaged_one_is_told_and_left_as_it_is(path: Path) -> None:
    first = SqliteStore(path, JobsOptions())
    ids = [first.submit(REQUEST, 1.0).id for _ in range(300)]
    first.close()
    content = bytearray(path.read_bytes())
    content[4096:] = os.urandom(len(content) - 4096)
    path.write_bytes(content)
    store = SqliteStore(path, JobsOptions())
    for _ in range(2):
        with pytest.raises(StoreError, match=r"is damaged \(.*\); it is left as it is: move it aside"):
            store.get(ids, 1.0)
        with pytest.raises(StoreError, match="is damaged"):
            store.submit(REQUEST, 1.0)
    assert path.read_bytes() == content
    path.rename(path.with_name("aside"))
    assert store.get(ids, 1.0) == []
    store.submit(REQUEST, 1.0)
    store.close()


def test_one_that_is_moved_while_it_is_used_is_not_mixed_with_the_next(store: SqliteStore, path: Path) -> None:
    """SQLite keeps what was written last in files beside it, under the old name: these have to go along."""
    id = store.submit(REQUEST, 1.0).id
    change = store.change()
    path.rename(path.with_name("aside"))
    with pytest.raises(StoreError, match="-wal is what a store of jobs has left that was moved or deleted"):
        store.submit(REQUEST, 1.0)
    for end in ("-wal", "-shm"):
        path.with_name(f"jobs.sqlite{end}").rename(path.with_name(f"aside{end}"))
    other = store.submit(REQUEST, 1.0).id
    assert store.change() != change
    assert [job.id for job in store.list(1.0)] == [other]
    store.close()
    moved = SqliteStore(path.with_name("aside"), JobsOptions())
    assert [job.id for job in moved.list(1.0)] == [id]
    moved.close()


def test_who_has_to_wait_too_long_for_others_that_write_is_told(store: SqliteStore, path: Path) -> None:
    store.submit(REQUEST, 1.0)
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(StoreError, match=r"others write to the store .* more than 0\.2 s \(store_wait_s\)"):
        store.submit(REQUEST, 1.0)
    assert store.counts().by_status["queued"] == 1, "who reads does not wait"
    other.execute("COMMIT")
    other.close()
    store.submit(REQUEST, 1.0)


def test_who_has_to_wait_too_long_for_a_connection_is_told(store: SqliteStore) -> None:
    store.submit(REQUEST, 1.0)
    with store._file.reading(), store._file.reading(), pytest.raises(StoreError, match=r"busy for more than 0\.2 s"):
        store.counts()
    assert store.counts().by_status["queued"] == 1


def test_a_defect_in_the_middle_leaves_nothing_written(store: SqliteStore) -> None:
    store.submit(REQUEST, 1.0)

    def fail() -> None:
        with store._file.writing() as connection:
            connection.execute("DELETE FROM jobs")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert store.counts().by_status["queued"] == 1


def test_the_file_becomes_small_again(store: SqliteStore, path: Path) -> None:
    large = StoredRequest(b"POST", b"/", {}, bytes(4 << 20), "m")
    last = store.submit(REQUEST, 1.0).id
    ids = [store.submit(large, 1.0).id for _ in range(10)]
    for id in ids:
        store.cancel(id, 1.0)
    assert path.stat().st_size > 40 << 20
    while store.sweep(10_000.0) or path.stat().st_size > 6 << 20:
        store.cancel(last, 10_000.0)  # what is in the log comes into the file with what is written next
    assert store.request_of(last) is None
    assert [each.name for each in path.parent.iterdir() if each.stat().st_size > 6 << 20] == []


FULL = """
import os, sys
from pathlib import Path
from penstock.jobs.options import JobsOptions
from penstock.jobs.job import StoredRequest
from penstock.jobs.store import StoreError, StoreFull, open_store

path = Path(sys.argv[1])
store = open_store(str(path), JobsOptions(ttl_s=10.0))
request = StoredRequest(b"POST", b"/", {}, bytes(1 << 20), "m")
ids = []
while True:
    try:
        ids.append(store.submit(request, 1.0).id)
    except StoreFull as error:
        print(error)
        break
print(5 < len(ids) < 30)
with open(path.with_name("others"), "wb", buffering=0) as other:
    try:
        while other.write(bytes(1 << 16)):
            pass
    except OSError as error:
        print(error.strerror)
try:
    while True:
        for id in ids:
            store.cancel(id, 2.0) or store.secret()
        store.sweep(20.0)
        ids = [store.submit(request, 20.0).id]
except StoreError as error:
    print(error)
left = store.list(3.0)
print(all(store.request_of(job.id) == request for job in left if job.status == "queued"))
path.with_name("others").unlink()
for id in ids:
    store.cancel(id, 2.0)
while store.sweep(20.0):
    pass
print(store.counts().bytes, store.submit(request, 20.0).status)
store.close()
"""


def test_a_full_disk_is_told_and_what_was_accepted_stays(tmp_path: Path) -> None:
    """In a name space of mounts of its own, where the kernel lets this user have one."""
    unshare = ["unshare", "--user", "--map-root-user", "--mount"]
    mount = ["mount", "-t", "tmpfs", "-o", "size=48m,mode=0700", "none", str(tmp_path)]
    try:
        subprocess.run([*unshare, *mount], check=True, capture_output=True, timeout=60)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"this user may mount nothing: {error}")
    script = f'{" ".join(mount)} && exec "$@"'
    command = [*unshare, "sh", "-c", script, "sh", sys.executable, "-c", FULL, str(tmp_path / "jobs.sqlite")]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)
    assert done.stderr == ""
    full = f"there is no room left on the disk of the store of jobs {tmp_path}/jobs.sqlite; free some"
    assert done.stdout.splitlines() == [full, "True", "No space left on device", full, "True", "0 queued"]


def test_a_disk_that_cannot_be_written_to(tmp_path: Path) -> None:
    unshare = ["unshare", "--user", "--map-root-user", "--mount"]
    path = tmp_path / "jobs.sqlite"
    store = SqliteStore(path, JobsOptions())
    store.submit(REQUEST, 1.0)
    store.close()
    script = f'mount --bind {tmp_path} {tmp_path} && mount -o remount,bind,ro {tmp_path} && exec "$@"'
    code = (
        "import sys; from penstock.jobs.options import JobsOptions; from penstock.jobs.store import *\n"
        "store = open_store(sys.argv[1], JobsOptions())\n"
        "for ask in (store.secret, store.counts):\n"
        "    try:\n        print(ask())\n"
        "    except StoreError as error:\n        print('told', error)\n"
    )
    command = [*unshare, "sh", "-c", script, "sh", sys.executable, "-c", code, str(path)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)
    if "mount:" in done.stderr or "unshare:" in done.stderr:
        pytest.skip(f"this user may mount nothing: {done.stderr}")
    assert done.stdout.startswith("told the store of jobs"), done
    assert "Traceback" not in done.stderr
