"""Every limit of a worker, with its unit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

EXIT_HUNG: Final = 75  # EX_TEMPFAIL of sysexits.h: a batch did not end
MAX_COMPUTE_S: Final = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerOptions:
    # What decides which models of the repository are served: the repository at all times, orders to load and to unload
    # them, or the repository as it is when the worker begins.
    model_control: Literal["watch", "explicit", "none"] = "watch"
    # Whether links in the repository may lead out of it.
    links_out: bool = False
    # Bytes of models in memory, of each worker: their files', and what their runs take. Beyond it those that were used
    # least recently are unloaded, and loaded again when they are asked for. 0: no limit.
    model_bytes_max: int = 0
    # Shared memory for large outputs, of each worker. -1: an eighth of what is free, at most 256 MiB; 0: none.
    arena_bytes: int = -1
    # Memory that models run in, beside their weights, of each worker. -1: half of what is free, at least 256 MiB;
    # 0: no limit.
    run_bytes_max: int = -1
    # How long a batch may compute, or ten times what it is expected to take if that is longer, unless its model.toml
    # says it. One that takes longer is taken to never end: the worker ends, to be started anew. 0: for ever.
    max_compute_s: float = MAX_COMPUTE_S
    # Before a worker loads a model, a process that is thrown away tries it for so long at most: one that kills the
    # process, or never ends, is not loaded. TensorRT builds its engines then. 0: no model is tried.
    trial_max_s: float = 600.0
    # Whether a worker for a GPU keeps to the cores and the memory next to it, unless it is given cores.
    numa: bool = True
    # A worker that is to end waits so long for what it has been given; then it is given elsewhere, or up.
    drain_max_s: float = 35.0
    # Where models are prepared, once for all workers of this user; "": penstock/models in the user's cache.
    store: str = ""
    # Models with less weights are not prepared: each worker loads its own.
    store_min_bytes: int = 4 << 20
