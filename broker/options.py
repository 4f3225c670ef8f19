"""Every limit of the broker, with its unit. They travel as one value from the command line to the core."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

RECORD_MAX_BYTES: Final = 1 << 30  # of a trace that is recorded, unless it is said


@dataclass(frozen=True, slots=True, kw_only=True)
class BrokerOptions:
    queue_requests_max: int = 16_384  # that wait for one model
    queue_rows_max: int = 65_536  # of these
    queue_bytes_max: int = 4 << 30  # of their tensors, wherever they lie
    held_requests_max: int = 131_072  # that are not acknowledged yet, over all models
    held_rows_max: int = 524_288  # of these
    held_bytes_max: int = 4 << 30  # of their tensors in messages
    caller_requests_max: int = 65_536  # of one caller, not acknowledged yet
    sequences_max: int = 16_384  # that are open, see sequences.py
    sequence_requests_max: int = 1024  # of one sequence that wait for those before them
    unacknowledged_bytes_max: int = 256 << 20  # results that one worker keeps for one caller
    # Workers that may be lost under one request: then it fails with `lost`, as a retry may help.
    attempts_max: int = 10
    # Of these, workers that may die, or not end, while the request is alone on them: then it fails with `poisoned`.
    deaths_max: int = 3

    drain_max_s: float = 35.0  # a broker that is to end waits so long for what it holds; then requests are given up
    silence_max_s: float = 5.0  # after which a peer is taken for dead, within two seconds
    ping_after_s: float = 0.3  # a worker that has work and says nothing for so long is asked whether it lives
    busy_silence_max_s: float = 0.8  # after which one that does not answer is taken for lost, and its work moves
    rejoin_grace_s: float = 0.25  # a new broker waits so long for the peers of the old one before it assigns
    unserved_grace_s: float = 10.0  # requests wait so long for a worker to come back before they are refused
    load_wait_max_s: float = 60.0  # requests wait so long for a model that is loaded because of them
    free_delay_s: float = 0.01  # acknowledgments wait so long for work to travel with

    # What tenants are given of the workers' time in proportion to each other, where they compete: 1 who is not named.
    tenant_weights: dict[str, float] = field(default_factory=dict)

    callers_max: int = 4096
    workers_max: int = 4096
    models_max: int = 4096  # names and versions together
