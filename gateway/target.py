"""What the head of a request means to the application: made once for each head that comes again and again."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final, TypeAlias

from penstock.gateway.cache import read_cache_control
from penstock.gateway.compression import choose
from penstock.gateway.connection import Exchange
from penstock.gateway.parse import Parse
from penstock.gateway.terms import read_terms
from penstock.wire.errors import BAD_INPUT, PenstockError

_LENGTH_DIGITS_MAX: Final = 12

Handler: TypeAlias = "Callable[[Exchange, Target], None]"
Defer: TypeAlias = "Callable[[Exchange, Target, Parse], None]"


class Target:
    """What a request's head means here. ``header_length``: bytes of JSON in front of binary tensors, None without any.
    ``defer``: takes it where it is not to be answered with its result, see ``jobs.py``.
    ``encoding``: of the body, "" as it is. ``accepts``: the encoding that the answer should have. The others: see
    ``Terms``, of which a request then costs four look-ups less.

    Raises PenstockError for headers that say nothing that can be.
    """

    __slots__ = (
        *(
            "accepts",
            "cache_control",
            "defer",
            "encoding",
            "handler",
            "header_length",
            "job",
            "model",
            "region",
            "version",
        ),
        *("explain", "priority", "repeats", "sticky", "tenant", "timeout_s"),
    )

    def __init__(self, handler: Handler, arguments: Mapping[str, str], headers: Mapping[str, bytes]) -> None:
        self.handler = handler
        self.defer: Defer | None = None
        self.job = arguments.get("id", "")
        self.model = arguments.get("model", "")
        self.version = arguments.get("version", "")
        self.region = arguments.get("region", "")
        self.header_length = _header_length(headers.get("inference-header-content-length"))
        encoding = headers.get("content-encoding", b"identity").decode("latin-1").strip()
        self.encoding = "" if encoding.lower() == "identity" else encoding
        self.accepts = choose(headers.get("accept-encoding", b"").decode("latin-1"))
        self.timeout_s, self.priority, self.tenant, self.explain, self.sticky = read_terms(headers)
        self.cache_control = read_cache_control(headers)
        self.repeats = False  # answers to such requests are remembered, see repeats.py


def _header_length(value: bytes | None) -> int | None:
    if value is None:
        return None
    value = value.strip()
    if not value.isdigit() or len(value) > _LENGTH_DIGITS_MAX:
        raise PenstockError(BAD_INPUT, "Inference-Header-Content-Length is not a number of bytes")
    return int(value)
