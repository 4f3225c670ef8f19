"""Every limit of a gateway, with its unit."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewayOptions:
    head_bytes_max: int = 32 * 1024  # request line and headers: 431
    headers_max: int = 100  # 431
    body_bytes_max: int = 64 << 20  # of one request, also after decompression: 413
    bodies_bytes_max: int = 1 << 30  # of all requests under way: 503
    # Shared memory for large tensors, of each gateway. -1: an eighth of what is free, at most 256 MiB; 0: none.
    arena_bytes: int = -1
    arena_wait_s: float = 1.0  # for room in it: 503
    expand_wait_s: float = 10.0  # of a large compressed body, for its turn to be expanded: 503
    # Large JSON is read and written by processes of their own, see clerks.py.
    json_processes_max: int = 2  # 0: none, the loop does it
    json_wait_s: float = 10.0  # for the turn of one: 503
    json_work_max_s: float = 60.0  # then the process is ended, and the request fails: 500
    json_idle_s: float = 60.0  # after which a process that has nothing to do is ended
    connections_max: int = 10_000  # 503
    streams_max: int = 100  # of them those whose answer goes on, such as the dashboard's: 503
    pipelined_max: int = 16  # requests of one connection that wait for an answer; more are not read

    head_timeout_s: float = 10.0  # from a request's first byte to the end of its head: 408
    body_timeout_s: float = 30.0  # for a body, beside what its size takes at the slowest rate: 408
    body_bytes_per_s_min: int = 64 * 1024  # of requests, and of answers
    keep_alive_s: float = 75.0  # a connection without a request is closed
    write_timeout_s: float = 30.0  # a client that does not read its answer is cut off; likewise beside its size
    linger_s: float = 2.0  # after a refusal, what the client still sends is read and thrown away

    request_timeout_s: float = 30.0  # a request that names none: 504
    drain_max_s: float = 35.0  # a gateway that is to end waits so long for its requests; then they are given up
    drain_idle_s: float = 5.0  # and so long for connections without one, each of which may bring one more
    report_timeout_s: float = 1.0  # for the broker's part of /metrics
    compress_bytes_min: int = 512  # smaller answers are sent as they are

    allow_client_shm: bool = False  # clients may name files in /dev/shm for tensors, see regions.py
    model_push: bool = False  # new versions of models may be published over HTTP, see repository.py
    cors_origins: tuple[str, ...] = ()  # whose pages may ask from a browser, see cors.py; "*": anybody's
    tracing: bool = False  # OpenTelemetry spans of every request, see tracing.py

    # Answers of models that have response_cache, see cache.py.
    response_cache_bytes: int = 256 << 20  # of shared memory, for all gateways of a host; 0: none are kept
    response_cache_ttl_s: float = 0.0  # for which an answer is kept; 0: until there is no room (Redis: for an hour)
    response_cache_store: str = ""  # "redis://HOST:PORT/DB": kept there instead, for gateways of several hosts
    response_cache_wait_ms: int = 20  # for Redis: then the answer is computed
    response_cache_request_bytes_max: int = 16 << 20  # inputs; larger requests are not looked for
    response_cache_pending_bytes: int = 32 << 20  # answers that are yet to be written; more are not kept
    response_cache_waiting_max: int = 4096  # requests that wait for the same to be computed; more are computed, too
