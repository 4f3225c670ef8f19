"""What a request's headers ask of the scheduler, beside what its JSON says (``inference.py``)."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Mapping
from typing import Any, Final, NamedTuple

from penstock.client.terms import TIMEOUT_MAX_S, check_sticky, check_terms
from penstock.wire.errors import BAD_INPUT, PenstockError

# Not what float() takes, which reads "inf", "nan", "1e9" and "1_0", too.
_SECONDS: Final = re.compile(r"\d{1,9}(?:\.\d{0,9})?|\.\d{1,9}")
_PRIORITY_DIGITS_MAX: Final = 3
_SHOWN_MAX: Final = 40  # characters of what is refused


class Terms(NamedTuple):
    """``timeout_s``: 0 where there is none. ``priority``: 0 where the JSON says it, or nobody. ``explain``: the answer
    is to say where its time went. ``sticky``: what a model's traffic is split by, where there is something."""

    timeout_s: float = 0.0
    priority: int = 0
    tenant: str = ""
    explain: bool = False
    sticky: str = ""


def read_terms(headers: Mapping[str, bytes]) -> Terms:
    """Of headers by lower-case name. Raises PenstockError that names the header and what it takes."""
    values: dict[str, Any] = {}
    for field, read in _READERS.items():
        value = headers.get(f"penstock-{field.removesuffix('_s')}")
        if value is not None:
            values[field] = read(value.decode("latin-1").strip(" \t"))
    return Terms(**values)


def _timeout(text: str) -> float:
    seconds = float(text) if _SECONDS.fullmatch(text) else 0.0
    if not 0 < seconds <= TIMEOUT_MAX_S:
        raise PenstockError(
            BAD_INPUT,
            f"the header Penstock-Timeout is {_shown(text)}; it takes seconds as a decimal number such as 0.1, more "
            f"than 0 and at most {TIMEOUT_MAX_S:.0f}",
        )
    return seconds


def _priority(text: str) -> int:
    number = int(text) if text.isdecimal() and len(text) <= _PRIORITY_DIGITS_MAX else text
    _check("Priority", number, "")
    return int(number)


def _tenant(text: str) -> str:
    _check("Tenant", 0, text)
    return text


def _explain(text: str) -> bool:
    if text not in ("0", "1"):
        raise PenstockError(BAD_INPUT, f"the header Penstock-Explain is 1 or 0, not {_shown(text)}")
    return text == "1"


def _sticky(text: str) -> str:
    # The same text as a client in Python has, where it is one: so both go to the same version.
    with contextlib.suppress(UnicodeDecodeError):
        text = text.encode("latin-1").decode()
    try:
        return check_sticky(text)
    except PenstockError as error:
        raise PenstockError(error.code, f"the header Penstock-Sticky: {error.message}") from None


_READERS: Final[dict[str, Callable[[str], Any]]] = {
    "timeout_s": _timeout,
    "priority": _priority,
    "tenant": _tenant,
    "explain": _explain,
    "sticky": _sticky,
}


def _check(header: str, priority: int | str, tenant: str) -> None:
    try:
        check_terms(priority, tenant)
    except PenstockError as error:
        raise PenstockError(error.code, f"the header Penstock-{header}: {error.message}") from None


def _shown(text: str) -> str:
    return repr(text if len(text) <= _SHOWN_MAX else text[:_SHOWN_MAX] + "...")
