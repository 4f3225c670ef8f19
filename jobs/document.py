"""What is told of a job, as JSON: to who asks over HTTP, and to who is called back."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any, Final

import orjson

from penstock.jobs.job import SUCCEEDED, Job, StoredResponse

_JSON: Final = b"application/json"
_SHOWN_BYTES_MAX: Final = 64 * 1024  # of a response that is read for its sentence


def document(job: Job, response: StoredResponse | None = None, result_bytes_max: int | None = None) -> dict[str, Any]:
    """For ``orjson.dumps``. ``response``: where it is known; a result of JSON is told as it is. ``result_bytes_max``: a
    larger one is left out, and that is said."""
    about: dict[str, Any] = {
        "id": job.id,
        "status": job.status,
        "model": job.model,
        "submitted_at": _time(job.submitted_at),
        "started_at": _time(job.started_at),
        "ended_at": _time(job.ended_at),
        "expires_at": _time(job.expires_at),
        "attempts": job.attempts,
        "http_status": job.http_status,
    }
    if job.cancel_wanted and not job.ended:
        about["cancel_wanted"] = True
    error = job.error or sentence_of(response)
    if error:
        about["error"] = error
    if job.callback is not None:
        callback = job.callback
        about["callback"] = {"url": callback.url, "state": callback.state or "waiting", "attempts": callback.attempts}
        if callback.last_error:
            about["callback"]["last_error"] = callback.last_error
    if job.status == SUCCEEDED and response is not None:
        if result_bytes_max is not None and len(response.body) > result_bytes_max:
            about["result_omitted"] = True
        elif _is_json(response):
            about["result"] = orjson.Fragment(response.body)
    return about


def sentence_of(response: StoredResponse | None) -> str:
    """What a response that is an error says, in the words of any protocol of ours; "" for one that is none."""
    if response is None or response.status < 400:
        return ""
    if _is_json(response) and len(response.body) <= _SHOWN_BYTES_MAX:
        try:
            said = orjson.loads(response.body)
        except orjson.JSONDecodeError:
            said = None
        if isinstance(said, dict) and isinstance(said.get("error"), str):
            return str(said["error"])
    return f"it was answered with status {response.status}"


def _is_json(response: StoredResponse) -> bool:
    kind = response.headers.get("content-type", b"").partition(b";")[0].strip().lower()
    return kind == _JSON and "content-encoding" not in response.headers


def _time(seconds: float | None) -> str | None:
    """RFC 3339, in milliseconds."""
    if seconds is None:
        return None
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
