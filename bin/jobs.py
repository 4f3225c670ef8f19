"""``penstock jobs``"""

from __future__ import annotations

import functools
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final, TypeVar

import click

from penstock.bin import options
from penstock.bin.asking import fail
from penstock.jobs.job import EXPIRED, STATUSES, Job
from penstock.jobs.store import Store, StoreError, open_store

F = TypeVar("F", bound=Callable[..., Any])

_HEADINGS: Final = ("ID", "STATUS", "MODEL", "AGE", "TOOK", "ATTEMPTS", "")
_PAGE: Final = 1000  # jobs that are asked for at a time
_SHOWN: Final = 100
_UNITS: Final = ((86_400.0, "d"), (3600.0, "h"), (60.0, "m"))


@click.group()
def jobs() -> None:
    """Look at jobs: requests that are answered later ("Prefer: respond-async").

    These commands ask the store itself, so they work while no server does.
    """


def _asks_store(command: F) -> F:
    """Gives a command the store, by its options. What the store says is a sentence and exit code 1."""

    @functools.wraps(command)
    def run(jobs_store: str | None, config: Path | None, runtime_dir: Path | None, **arguments: Any) -> None:
        limits = options.load_options(config).jobs
        place = options.jobs_place(jobs_store, limits, options.broker_address(runtime_dir))
        if place is None:
            raise click.UsageError("this server keeps no jobs: [jobs] store is off")
        try:
            store = open_store(place.where, limits)
            try:
                command(store, **arguments)
            finally:
                store.close()
        except StoreError as error:
            fail(str(error))

    wrapped: Any = run
    found: F = options.jobs_store(options.config_file(options.runtime_dir(wrapped)))
    return found


@jobs.command()
@click.option("--status", type=click.Choice(STATUSES), help="Only those.")
@click.option(
    "--limit", type=click.IntRange(1), default=_SHOWN, show_default=True, help="How many at most, the newest first."
)
@click.option("--json", "as_json", is_flag=True, help="A list of objects, one for each job.")
@_asks_store
def ls(store: Store, status: str | None, limit: int, as_json: bool) -> None:
    """List jobs, the newest first."""
    from penstock.jobs.document import document

    found = _list(store, status or "", limit)
    if as_json:
        click.echo(json.dumps([document(job) for job in found], indent=2))
        return
    now = time.time()
    rows = [_HEADINGS, *[_row(job, now) for job in found]]
    widths = [max(len(row[column]) for row in rows) for column in range(6)]
    for row in rows:
        click.echo("  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[6]]).rstrip())


def _list(store: Store, status: str, limit: int) -> list[Job]:
    found: list[Job] = []
    while len(found) < limit:
        page = store.list(time.time(), status, min(_PAGE, limit - len(found)), found[-1].id if found else "")
        if not page:
            break
        found += page
    return found


def _row(job: Job, now: float) -> tuple[str, ...]:
    took = "" if job.started_at is None else _span((job.ended_at or now) - job.started_at)
    said = job.error or ("" if job.http_status is None or job.http_status < 400 else f"HTTP {job.http_status}")
    return job.id, job.status, job.model, _span(now - job.submitted_at), took, str(job.attempts), said


def _span(seconds: float) -> str:
    """In the largest unit of which there is one."""
    for unit, name in _UNITS:
        if seconds >= unit:
            return f"{seconds / unit:.1f} {name}"
    return f"{max(0.0, seconds):.3g} s"


@jobs.command()
@click.argument("job_id", metavar="ID")
@click.option("--result", is_flag=True, help="Write the body of its response to standard output, and nothing else.")
@_asks_store
def show(store: Store, job_id: str, result: bool) -> None:
    """Say all of the job ID, as GET /v2/jobs/ID does."""
    import orjson

    from penstock.jobs.document import document

    job = _find(store.get([job_id], time.time()), job_id)
    response = store.response_of(job_id) if job.ended else None
    if not result:
        click.echo(orjson.dumps(document(job, response), option=orjson.OPT_INDENT_2).decode())
    elif response is None:
        fail(f"job '{job_id}' is {job.status}, and has no response{f': {job.error}' if job.error else ''}")
    else:
        sys.stdout.buffer.write(response.body)


@jobs.command()
@click.argument("job_ids", metavar="ID...", nargs=-1, required=True)
@_asks_store
def cancel(store: Store, job_ids: tuple[str, ...]) -> None:
    """Cancel jobs. One that runs is told to end; one that has ended stays as it is."""
    for job_id in job_ids:
        job = store.cancel(job_id, time.time())
        job = _find([] if job is None else [job], job_id)
        click.echo(f"{job_id}: {'is told to end' if job.cancel_wanted and not job.ended else job.status}")


@jobs.command()
@_asks_store
def secret(store: Store) -> None:
    """Print the secret by which callbacks are signed, as penstock.client.verify_callback takes it."""
    from penstock.jobs.callbacks import show_secret, signing_key

    try:
        click.echo(show_secret(signing_key(store)))
    except ValueError as error:
        fail(str(error))


@jobs.command()
@click.option("--name", default="jobs", show_default=True, help="What it is called in logs and metrics.")
@options.jobs_store
@options.config_file
@options.process_options
def run(
    name: str,
    jobs_store: str | None,
    config: Path | None,
    runtime_dir: Path | None,
    log_format: str,
    log_level: str,
    parent: int,
) -> None:
    """Run jobs: the process that takes them from the store and has the server answer them."""
    from penstock.bin.run import run as run_process
    from penstock.gateway.runnerprocess import RunnerProcess, RunnerSettings
    from penstock.gateway.tracing import Tracing, TracingError

    address, limits = options.broker_address(runtime_dir), options.load_options(config)
    place = options.jobs_place(jobs_store, limits.jobs, address)
    if place is None:
        raise click.UsageError("there is nothing to run: [jobs] store is off")
    try:
        tracing = Tracing(name) if limits.gateway.tracing else None
    except TracingError as error:
        raise click.UsageError(str(error)) from None
    settings = RunnerSettings(broker=address, place=place, name=name, options=limits.gateway, tracing=tracing)
    run_process(name, log_format, log_level, parent, lambda: RunnerProcess(settings))


def _find(jobs: Sequence[Job], job_id: str) -> Job:
    if not jobs:
        fail(f"there is no job '{job_id}'")
    if jobs[0].status == EXPIRED:
        fail(f"job '{job_id}' has been forgotten: it ended more than [jobs] ttl_s ago")
    return jobs[0]
