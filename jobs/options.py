"""Every limit of jobs, with its unit: ``[jobs]`` in penstock.toml."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class JobsOptions:
    # "sqlite", the path of such a file, "redis://HOST:PORT/N" ("rediss://" with TLS, "unix:///PATH"), or "off".
    store: str = "sqlite"
    store_wait_s: float = 5.0  # for the store's answer, or for others that write to it: 503
    connections_max: int = 8  # to the store, of each process; more threads take turns

    count_max: int = 100_000  # jobs that are kept, ended or not: 503
    bytes_max: int = 1 << 30  # of all their requests and responses, the last quarter for responses: 503
    result_bytes_max: int = 64 << 20  # of one response; the job fails when it is larger
    ttl_s: float = 3600.0  # from a job's end until it is forgotten: 410
    tombstones_max: int = 100_000  # forgotten jobs that are told apart from those that never were: 404
    tombstone_s: float = 86_400.0  # and for how long

    running_max: int = 64  # of one runner at a time
    run_max_s: float = 3600.0  # from its submission; a job that finds no worker until then fails
    lease_s: float = 15.0  # a runner that says nothing for so long has lost its jobs
    attempts_max: int = 5  # runners that may end while they run a job; then it fails
    drain_max_s: float = 5.0  # a runner that is to end waits so long for what it runs; then that is put back
    waiting_max: int = 1000  # long polls of one gateway: 503

    callback_attempts_max: int = 6
    callback_timeout_s: float = 10.0  # of one attempt, from the look-up of the name to the end of the answer
    callback_result_bytes_max: int = 1 << 20  # a larger result is left out of what is sent
    callback_answer_bytes_max: int = 64 * 1024  # of what is said to a callback; the rest is not read
    callback_threads_max: int = 8  # callbacks under way at a time, of one runner
    callback_allow: tuple[str, ...] = ()  # networks that may be called though they are not public, "10.0.0.0/8"
    callback_secret: str = ""  # signs callbacks; "" for one that is made once and kept in the store
