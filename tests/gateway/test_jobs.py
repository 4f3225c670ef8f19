"""What is kept of a request that becomes a job."""

from __future__ import annotations

from typing import Any

from penstock.gateway.jobs import KEPT
from penstock.gateway.target import Target


class Asked(dict[str, bytes]):
    """No headers; and which were looked for."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def get(self, key: str, default: Any = None) -> Any:
        self.names.add(key)
        return default


def test_every_header_that_a_request_is_answered_by_is_kept() -> None:
    headers = Asked()
    Target(lambda *_: None, {}, headers)
    assert "cache-control" in headers.names
    assert headers.names - set(KEPT) == {"accept-encoding"}, "a stored answer is not compressed"
