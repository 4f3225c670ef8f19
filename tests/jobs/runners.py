"""Processes that submit and run jobs until they are killed. Run as a program: ``python -m tests.jobs.runners ROLE WHERE
DIRECTORY``; each writes down in a file of its own, before and after, what it did, with one write of a line."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import threading
import time
from pathlib import Path

from penstock.jobs.job import SUCCEEDED, Job, StoredRequest, StoredResponse
from penstock.jobs.options import JobsOptions
from penstock.jobs.owner import new_owner
from penstock.jobs.store import Store, StoreError, StoreFull, open_store

ROOT = Path(__file__).resolve().parents[2]
OPTIONS = JobsOptions(attempts_max=1000, bytes_max=1 << 26)
_RUN_MAX_S = 0.02  # a job takes that long at most: what is killed is likely to be in the middle of one
LEASE_S = 30.0  # longer than a test: what dead runners held is found by their names


def begin(role: str, where: str, directory: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-m", "tests.jobs.runners", role, where, str(directory)], cwd=ROOT)


def submit(store: Store, note: int) -> None:
    number = 0
    while True:
        body = os.urandom(8) + bytes(random.choice((10, 5000, 100_000)))
        try:
            job = store.submit(StoredRequest(b"POST", b"/", {}, body, "m"), time.time())
        except StoreFull:
            store.sweep(time.time())
            continue
        except StoreError as error:
            os.write(note, f"error {error}\n".encode())
            continue
        os.write(note, f"submitted {job.id} {body[:8].hex()}\n".encode())
        number += 1


def run(store: Store, note: int) -> None:
    owner = new_owner()
    while True:
        try:
            for job in store.claim(owner, 3, time.time(), LEASE_S):
                os.write(note, f"claimed {job.id} {job.attempts}\n".encode())
                _run_one(store, note, owner, job)
        except StoreError as error:
            os.write(note, f"error {error}\n".encode())


def _run_one(store: Store, note: int, owner: str, job: Job) -> None:
    request = store.request_of(job.id)
    if request is None:
        os.write(note, f"defect {job.id} has no request\n".encode())
        return
    threading.Event().wait(random.random() * _RUN_MAX_S)
    response = StoredResponse(200, {}, request.body[:8])
    if store.finish(job.id, owner, SUCCEEDED, response, "", time.time()):
        os.write(note, f"finished {job.id}\n".encode())
    else:
        os.write(note, f"defect {job.id} was not its own\n".encode())


def main() -> None:
    role, where, directory = sys.argv[1:]
    note = os.open(Path(directory) / f"{role}-{os.getpid()}", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    {"submit": submit, "run": run}[role](open_store(where, OPTIONS), note)


if __name__ == "__main__":
    main()
