"""How jobs, requests and responses lie in Redis: as MessagePack, of which its scripts know nothing."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, Final

import msgpack

from penstock.jobs import job as jobs
from penstock.jobs.job import Callback, Job, StoredRequest, StoredResponse

_STAMP_BYTES: Final = 8


def saved_values(job: Job) -> tuple[Any, ...]:
    """What SAVE asks for beside stamps and response."""
    due = job.callback.due_at if job.callback is not None and job.callback.state == jobs.PENDING else ""
    return (
        packed_job(job),
        job.status,
        job.bytes,
        job.owner,
        job.not_before,
        job.lease_until,
        int(job.cancel_wanted),
        "" if job.expires_at is None else job.expires_at,
        due,
    )


def packed_job(job: Job) -> bytes:
    packed: bytes = msgpack.packb(asdict(job))
    return packed


def unpacked_job(packed: bytes) -> Job:
    values = msgpack.unpackb(packed)
    called = values.pop("callback")
    return Job(**values, callback=None if called is None else Callback(**called))


def packed_grave(number: int, job: Job) -> bytes:
    packed: bytes = msgpack.packb((number, asdict(jobs.tombstone(job))))
    return packed


def unpacked_grave(packed: bytes) -> tuple[int, Job]:
    """The number of its arrival, and the tombstone."""
    number, values = msgpack.unpackb(packed)
    return number, Job(**values)


def packed_request(request: StoredRequest) -> bytes:
    packed: bytes = msgpack.packb(
        (request.method, request.url, dict(request.headers), request.body, request.model, request.callback_url)
    )
    return packed


def unpacked_request(packed: bytes) -> StoredRequest:
    return StoredRequest(*msgpack.unpackb(packed))


def packed_response(response: StoredResponse | None) -> bytes:
    """Nothing for none."""
    if response is None:
        return b""
    packed: bytes = msgpack.packb((response.status, dict(response.headers), response.body))
    return packed


def unpacked_response(packed: bytes) -> StoredResponse:
    return StoredResponse(*msgpack.unpackb(packed))


def new_stamp() -> bytes:
    return secrets.token_bytes(_STAMP_BYTES)


def texts(values: Sequence[bytes]) -> list[str]:
    return [value.decode() for value in values]
