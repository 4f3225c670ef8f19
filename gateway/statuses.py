"""What errors are as statuses of HTTP."""

from __future__ import annotations

from typing import Final

from penstock.wire import errors

STATUSES: Final = {
    errors.BAD_INPUT: 400,
    errors.NOT_FOUND: 404,
    errors.TOO_LARGE: 413,
    errors.UNSUPPORTED: 501,
    errors.OVERLOADED: 503,
    errors.DRAINING: 503,
    errors.UNAVAILABLE: 503,
    errors.LOST: 503,
    errors.DEADLINE: 504,
    errors.CANCELLED: 499,
    errors.MODEL_FAILED: 500,
    errors.POISONED: 500,
    errors.INTERNAL: 500,
}
