"""Whose arenas have come: descriptors come over the control connection, and the message that speaks of them over
another, so either may be the first. Pure.

The broker numbers each time that it introduces a peer to another; both the packet with the descriptor and the message
have the number, and a larger one is always newer.
"""

from __future__ import annotations

from typing import Final, Generic, TypeVar

A = TypeVar("A")


class Arrivals(Generic[A]):
    """Pairs arenas with the messages that announce them. Holds the newest of each owner at most; owners are those that
    a broker introduces, who are at most MAX_PEERS at a time, and whom it says to ``forget``."""

    def __init__(self) -> None:
        self._came: Final[dict[bytes, tuple[int, A]]] = {}
        self._wanted: Final[dict[bytes, int]] = {}

    def came(self, owner: bytes, serial: int, arena: A) -> A | None:
        """An arena has come; returned when it has been announced."""
        wanted = self._wanted.get(owner, -1)  # a broker numbers from 1; whoever passes for one may say 0
        if serial == wanted:
            del self._wanted[owner]
            return arena
        if serial > wanted:
            self._came[owner] = serial, arena
        return None

    def announced(self, owner: bytes, serial: int) -> A | None:
        """A message speaks of an arena; returned when it is there already."""
        came = self._came.get(owner)
        if came is not None:
            number, arena = came
            if number <= serial:
                del self._came[owner]
            if number >= serial:  # of one owner it is the same arena, whenever it comes
                self._wanted.pop(owner, None)
                return arena
        self._wanted[owner] = serial
        return None

    def forget(self, owner: bytes, serial: int) -> None:
        """What has been introduced up to this number is of no interest any more: its owner has gone."""
        if self._came.get(owner, (serial + 1,))[0] <= serial:
            del self._came[owner]
        if self._wanted.get(owner, serial + 1) <= serial:
            del self._wanted[owner]

    def forget_all(self, serial: int) -> None:
        """As ``forget``, for all owners: whoever is there is introduced anew."""
        for owner in self._came.keys() | self._wanted.keys():
            self.forget(owner, serial)

    def clear(self) -> None:
        """The control connection has ended, and with it what was under way."""
        self._came.clear()
        self._wanted.clear()
