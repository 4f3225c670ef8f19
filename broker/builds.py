"""Under which token callers may keep answers of a version. Pure.

A version's files may be replaced under its number, by one worker after another. While all that serve it tell the same
digest of what they have loaded there is one token, and while they differ, or any tells none, there is none. A token is
never given to other content than it was given to at first, and not again to the same once other content has been seen
in between: what was computed meanwhile may have been kept under it.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

from penstock.broker.queues import ModelKey


class _Build(NamedTuple):
    digest: str
    token: str


class Builds:
    """``withdrawn``: a token is none any more of which callers have been told; for its owner to put back."""

    def __init__(self, epoch: int) -> None:
        self.withdrawn = False
        self._epoch = epoch
        self._serial = 0
        self._known: dict[ModelKey, _Build] = {}
        self._tokens: dict[ModelKey, str] = {}  # of those that have one now

    def saw(self, key: ModelKey, digests: Collection[str]) -> None:
        """What those that serve a version tell of it now, each once."""
        known = self._known.get(key)
        told = {digest for digest in digests if digest}
        if known is not None and told - {known.digest}:
            del self._known[key]
            known = None
        token = ""
        if told and len(digests) == 1:
            if known is None:
                self._serial += 1
                known = self._known[key] = _Build(told.pop(), f"{self._epoch:x}.{self._serial:x}")
            token = known.token
        before = self._tokens.get(key, "")
        if before != token:
            self.withdrawn = self.withdrawn or before != ""
            if token:
                self._tokens[key] = token
            else:
                del self._tokens[key]

    def token(self, key: ModelKey) -> str:
        """ "": its answers are not to be kept."""
        return self._tokens.get(key, "")

    def forget(self, key: ModelKey) -> None:
        """Nobody declares it any more."""
        self._known.pop(key, None)
        self._tokens.pop(key, None)
