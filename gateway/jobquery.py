"""What a URL and its headers ask of jobs. Pure."""

from __future__ import annotations

import re
from typing import Final, NamedTuple
from urllib.parse import unquote_to_bytes

from penstock.jobs.job import STATUSES
from penstock.wire.errors import BAD_INPUT, PenstockError

WAIT_MAX_S: Final = 60.0
IDS_MAX: Final = 256  # of one question
LIMIT_MAX: Final = 1000  # jobs of one list
LIMIT: Final = 100
_SECONDS: Final = re.compile(r"\d{1,3}(?:\.\d{0,9})?|\.\d{1,9}", re.ASCII)
_ID: Final = re.compile(r"[0-9A-Za-z_-]{1,64}")
_QUOTED: Final = re.compile(rb'"(?:[^"\\]|\\.)*(?:"|$)')  # text, whose commas separate nothing
_CALLBACK: Final = b"callback_url"
_SHOWN_MAX: Final = 80  # characters of what is refused


def prefers_async(value: bytes | None) -> bool:
    """Of the header Prefer (RFC 7240): preferences with parameters, separated by commas; of several lines or one."""
    if value is None:
        return False
    if b'"' in value:
        value = _QUOTED.sub(b"", value)
    names = (each.partition(b";")[0].partition(b"=")[0] for each in value.split(b","))
    return any(name.strip().lower() == b"respond-async" for name in names)


def split_callback(url: bytes) -> tuple[bytes, str]:
    """A URL without its callback_url, and that, "" where there is none. Raises PenstockError."""
    path, mark, query = url.partition(b"?")
    found: list[str] = []
    rest: list[bytes] = []
    for part in query.split(b"&"):
        name, _, value = part.partition(b"=")
        if unquote_to_bytes(name) == _CALLBACK:
            found.append(_text(value))
        else:
            rest.append(part)
    if len(found) > 1:
        raise PenstockError(BAD_INPUT, "callback_url is given more than once")
    if not found:
        return url, ""
    if not found[0]:
        raise PenstockError(BAD_INPUT, "callback_url is empty")
    left = b"&".join(rest)
    return path + (mark + left if left else b""), found[0]


def _text(value: bytes) -> str:
    try:
        return unquote_to_bytes(value.replace(b"+", b" ")).decode()
    except UnicodeDecodeError:
        raise PenstockError(BAD_INPUT, "the URL's query is not UTF-8 once its percent signs are decoded") from None


def _values(url: bytes, name: str) -> list[str]:
    """Of one parameter of a URL's query."""
    query = url.partition(b"?")[2].partition(b"#")[0]
    parts = [part.partition(b"=") for part in query.split(b"&") if part]
    return [_text(value) for key, _, value in parts if _text(key) == name]


def _value(url: bytes, name: str) -> str:
    """The last, as most servers take it."""
    return (_values(url, name) or [""])[-1]


def read_wait(url: bytes) -> float:
    """Seconds that an answer may wait for an end. Raises PenstockError."""
    text = _value(url, "wait")
    seconds = float(text) if _SECONDS.fullmatch(text) else -1.0 if text else 0.0
    if not 0 <= seconds <= WAIT_MAX_S:
        raise PenstockError(
            BAD_INPUT, f"'wait' is {_shown(text)}; it takes seconds as a decimal number from 0 to {WAIT_MAX_S:g}"
        )
    return seconds


class Listing(NamedTuple):
    """Which jobs are to be listed. ``after``: the last of those that have been seen."""

    status: str
    limit: int
    after: str


def read_listing(url: bytes) -> Listing:
    """Raises PenstockError."""
    status, limit, after = _value(url, "status"), _value(url, "limit"), _value(url, "after")
    if status and status not in STATUSES:
        raise PenstockError(BAD_INPUT, f"'status' is {_shown(status)}; it is one of {', '.join(STATUSES)}")
    number = int(limit) if limit.isascii() and limit.isdecimal() and len(limit) < 9 else -1 if limit else LIMIT
    if not 1 <= number <= LIMIT_MAX:
        raise PenstockError(BAD_INPUT, f"'limit' is {_shown(limit)}; it is a whole number from 1 to {LIMIT_MAX}")
    return Listing(status, number, check_id(after) if after else "")


def read_ids(url: bytes) -> list[str]:
    """The jobs that are asked for, each once. Raises PenstockError."""
    ids = list(dict.fromkeys(_values(url, "id")))
    if len(ids) > IDS_MAX:
        raise PenstockError(BAD_INPUT, f"there are {len(ids)} ids; ask for at most {IDS_MAX} at a time")
    return [check_id(each) for each in ids]


def check_id(text: str) -> str:
    """Raises PenstockError for what is no job's id: then there was never such a job."""
    if not _ID.fullmatch(text):
        raise PenstockError(BAD_INPUT, f"'id' is {_shown(text)}; a job's id has letters, digits, '-' and '_'")
    return text


def _shown(text: str) -> str:
    return repr(text if len(text) <= _SHOWN_MAX else text[:_SHOWN_MAX] + "...")
