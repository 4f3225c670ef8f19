"""Why a request took as long as it did, in words: for people who ask."""

from __future__ import annotations

from typing import Final

from penstock.wire.messages import Batch

# Of a batch. Those in _GATHERED were closed by the clock or for want of others; the rest waited for an instance.
_CLOSED: Final = {
    "full": "its batch was closed because it was full",
    "idle": "its batch was closed because an instance was idle",
    "delay": "its batch was closed because its oldest request had waited as long as max_queue_delay allows",
    "deadline": "its batch was closed because waiting on would have left one of its requests too little time",
    "shape": "its batch was closed because all others that had come were of other shapes, which cannot join it",
    "alone": "it ran alone, because the model takes no batches, or a worker was lost while it held the request",
}
_GATHERED: Final = frozenset({"delay", "deadline", "shape"})
_NOTHING_US: Final = 100  # waits that are shorter have no reason but the way itself


def explain(queue_us: int, held_us: int, batch: Batch, worker: str) -> str:
    """One line. ``queue_us``, ``held_us``: of a Complete. ``worker``: its name."""
    waited_us = max(0, queue_us - held_us)
    parts = []
    if held_us >= _NOTHING_US:
        parts.append(f"held {_ms(held_us)} at the broker until a worker had room")
    else:
        parts.append("a worker had room at once")
    if waited_us < _NOTHING_US:
        parts.append(f"ran at once on worker {worker}")
    elif batch.reason in _GATHERED:
        parts.append(f"{_ms(waited_us)} on worker {worker} while its batch waited for more requests")
    else:
        parts.append(f"{_ms(waited_us)} on worker {worker} until an instance was idle")
    parts.append(_CLOSED.get(batch.reason, f"its batch was closed because of '{batch.reason}'"))
    rows = f"{batch.rows} row{'s' if batch.rows != 1 else ''}"
    parts.append(f"batch {batch.serial} of that worker, with {rows}, took {_ms(batch.compute_us)}")
    return "; ".join(parts)


def _ms(us: int) -> str:
    return f"{us / 1000:.1f} ms"
