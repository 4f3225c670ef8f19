"""Errors that a user meets.

Every request ends with its result or with one of these: a code (whose fault it is), a sentence that says what to do,
and whether sending the same request again may help. The gateway turns codes into HTTP statuses; nothing else does.
"""

from __future__ import annotations

from typing import Final

BAD_INPUT: Final = "bad_input"  # the request does not fit the model, or is malformed
NOT_FOUND: Final = "not_found"  # no such model or version
TOO_LARGE: Final = "too_large"  # over a size limit that waiting does not change
UNSUPPORTED: Final = "unsupported"  # well formed, and not something this server does
OVERLOADED: Final = "overloaded"  # a queue or buffer is full
DRAINING: Final = "draining"  # the process that was asked is about to end
UNAVAILABLE: Final = "unavailable"  # no worker has the model now, or no broker answers
LOST: Final = "lost"  # a process died while it held the request
DEADLINE: Final = "deadline"  # the request's time was up before it was computed
CANCELLED: Final = "cancelled"  # its caller no longer wants it
MODEL_FAILED: Final = "model_failed"  # the model raised an error on this input
POISONED: Final = "poisoned"  # workers died, or did not end, whenever they ran the request
INTERNAL: Final = "internal"  # a defect of Penstock

RETRYABLE: Final = frozenset({OVERLOADED, DRAINING, UNAVAILABLE, LOST})
CODES: Final = RETRYABLE | {
    BAD_INPUT,
    NOT_FOUND,
    TOO_LARGE,
    UNSUPPORTED,
    DEADLINE,
    CANCELLED,
    MODEL_FAILED,
    POISONED,
    INTERNAL,
}


class PenstockError(Exception):
    """A request, or a call of the client library, that failed.

    Attributes: ``code`` (one of this module's constants), ``message`` (a sentence that says what to do), ``retryable``
    (whether the same request may succeed later) and ``retry_after_s`` (seconds, 0 when nothing better is known).
    """

    def __init__(self, code: str, message: str, retry_after_s: float = 0.0) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.retry_after_s = retry_after_s

    @property
    def retryable(self) -> bool:
        return self.code in RETRYABLE

    def __repr__(self) -> str:
        return f"PenstockError({self.code!r}, {self.message!r})"

    def __reduce__(self) -> tuple[type[PenstockError], tuple[str, str, float]]:
        return PenstockError, (self.code, self.message, self.retry_after_s)


class BadMessage(Exception):
    """A message from a peer that is not what docs/protocol.md says; it is counted, logged and dropped."""
