"""What a request may ask of whoever schedules it: how much time it has, how urgent it is, for whom it is, and what
decides to which version it goes.

The gateway and the client library refuse the same, in the same words; nothing is cut to what is allowed.
"""

from __future__ import annotations

from typing import Any, Final

from penstock.wire.errors import BAD_INPUT, PenstockError
from penstock.wire.fields import U64_MAX
from penstock.wire.messages import DEFAULT_PRIORITY, MAX_PRIORITY, MAX_SEQUENCE, MAX_TENANT, MAX_TIMEOUT_US

TIMEOUT_MAX_S: Final = MAX_TIMEOUT_US / 1_000_000
STICKY_MAX: Final = 256  # characters
_SHOWN_MAX: Final = 40  # characters of what is refused


def check_timeout(timeout: float) -> float:
    """Seconds that a request may take. Raises PenstockError for what is none."""
    if not 0 < timeout <= TIMEOUT_MAX_S:  # nor is what compares with nothing
        raise PenstockError(
            BAD_INPUT, f"a timeout is more than 0 and at most {TIMEOUT_MAX_S:.0f} seconds, not {timeout!r}"
        )
    return timeout


def check_terms(priority: Any, tenant: Any) -> None:
    """Raises PenstockError for a priority or a tenant that is none."""
    if type(priority) is not int or not 0 <= priority <= MAX_PRIORITY:
        raise PenstockError(
            BAD_INPUT,
            f"a priority is a whole number from 1, the most urgent, to {MAX_PRIORITY}, or 0 for the usual one, which "
            f"is {DEFAULT_PRIORITY}; not {_shown(priority)}",
        )
    if type(tenant) is not str or len(tenant) > MAX_TENANT or not (tenant.isascii() and tenant.isprintable()):
        raise PenstockError(
            BAD_INPUT, f"a tenant is at most {MAX_TENANT} printable ASCII characters, not {_shown(tenant)}"
        )


def check_sticky(sticky: Any) -> str:
    """What splits a model's traffic: for the same text, the same version. Raises PenstockError for what is none."""
    if type(sticky) is not str or len(sticky) > STICKY_MAX:
        raise PenstockError(
            BAD_INPUT,
            f"what a request sticks to a version by is a text of at most {STICKY_MAX} characters, such as a user's id, "
            f"not {_shown(sticky)}",
        )
    return sticky


def check_sequence(sequence: Any, start: Any, end: Any) -> tuple[str, int]:
    """The sequence that a request is a part of, "" for none, and its phase, as a Form has them. Raises PenstockError
    naming the parameter."""
    kind = type(sequence)
    if (kind is not int or not 0 <= sequence <= U64_MAX) and (kind is not str or len(sequence) > MAX_SEQUENCE):
        raise PenstockError(
            BAD_INPUT,
            f"'sequence_id' is a whole number of 64 bits or a text of at most {MAX_SEQUENCE} characters, not "
            f"{_shown(sequence)}",
        )
    for name, flag in (("sequence_start", start), ("sequence_end", end)):
        if type(flag) is not bool:
            raise PenstockError(BAD_INPUT, f"'{name}' is true or false, not {_shown(flag)}")
    if not sequence:
        return "", 0
    return str(sequence), start + 2 * end


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN_MAX else f"{text[:_SHOWN_MAX]}... ({len(text)} characters)"
