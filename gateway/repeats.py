"""Answers to requests that come again byte for byte: looked up without being read.

Beside the cache that all gateways share each remembers, of the requests that it has found there, the last and what was
sent for them. So a hit costs no parsing, hashing or writing of JSON. It holds only while all that callers are told of
models is as it was, and a request means just one version.
"""

from __future__ import annotations

import time
from typing import Any, Final, NamedTuple

from penstock.gateway.connection import Exchange
from penstock.gateway.timing import cut_total
from penstock.wire.metrics import Value

_ANSWERS_MAX: Final = 16_384
_BYTES_MAX: Final = 16 << 20  # of requests and answers
_ADMITTED: Final = 8  # where there is no room: each of so many. Else those of many in turn would throw each other out
_EACH_BYTES: Final = 512  # that one takes beside its bytes
_EACH_MAX: Final = 64 * 1024  # of a request, and of an answer


class Repeat(NamedTuple):
    """``before``, ``after``: an answer, but for the milliseconds that it took. ``until``: when it is too old, in
    seconds of the monotonic clock. ``hits``, ``hit_s``: that are counted for it."""

    before: bytes
    after: bytes
    until: float
    hits: Value
    hit_s: Value


class Repeats:
    """By a request's target, which is the same object for the same head, and its body."""

    def __init__(self) -> None:
        self._known: dict[tuple[object, bytes], Repeat] = {}
        self._bytes = 0
        self._refused = 0
        self._told = 0  # of the caller, for which all of them hold

    def find(self, target: object, body: Any, told: int) -> Repeat | None:
        """``told``: how often callers have been told of models."""
        if told != self._told:
            self.clear(told)
            return None
        if len(body) > _EACH_MAX:
            return None
        repeat = self._known.get((target, body if type(body) is bytes else bytes(body)))
        if repeat is not None and repeat.until < time.monotonic():
            return None
        return repeat

    def remember(
        self, target: object, body: Any, told: int, exchange: Exchange, until: float, hits: Value, hit_s: Value
    ) -> bool:
        """What has just been sent, if that can be sent again as it is."""
        response = exchange.response
        if max(len(body), len(response)) > _EACH_MAX or exchange.status != 200:
            return False
        try:
            before, after = cut_total(response)
        except ValueError:
            return False
        if told != self._told:
            self.clear(told)
        self._forget(target, bytes(body))
        while self._known and (len(self._known) >= _ANSWERS_MAX or self._bytes >= _BYTES_MAX):
            self._refused += 1
            if self._refused < _ADMITTED:
                return False
            self._forget(*next(iter(self._known)))
        self._refused = 0
        self._known[target, bytes(body)] = repeat = Repeat(before, after, until, hits, hit_s)
        self._bytes += _size(body, repeat)
        return True

    def _forget(self, target: object, body: bytes) -> None:
        repeat = self._known.pop((target, body), None)
        if repeat is not None:
            self._bytes -= _size(body, repeat)

    def clear(self, told: int) -> None:
        self._known.clear()
        self._bytes, self._told = 0, told


def _size(body: Any, repeat: Repeat) -> int:
    return len(body) + len(repeat.before) + len(repeat.after) + _EACH_BYTES
