"""Lots: requests that came together and have had the same fate since.

Most requests come, run and end side by side with others of the same form, so the broker and the workers keep one
object for all of these, and split it where fates part: only some fit into a batch, one is cancelled, some are
acknowledged. What happens to requests then costs per lot; a request alone is a lot of one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol, TypeVar

from penstock.wire.messages import Payload


class AnyLot(Protocol):
    """``ids``: the requests. ``split``: part with some of them, which become a lot of their own; indexes follow."""

    ids: tuple[int, ...]

    def split(self: L, part: Sequence[int], /) -> L: ...


L = TypeVar("L", bound=AnyLot)


def lots_of(index: Mapping[int, L], ids: Sequence[int]) -> list[L]:
    """Lots that hold exactly those of ``ids`` that are in ``index``; others are split to that end. What stands in
    ``ids`` twice counts once."""
    if not ids:
        return []
    first = index.get(ids[0])
    if first is not None and len(first.ids) == len(ids) and first.ids == tuple(ids):
        return [first]  # as nearly always
    parts: dict[L, list[int]] = {}
    for number in dict.fromkeys(ids):
        lot = index.get(number)
        if lot is not None:
            parts.setdefault(lot, []).append(number)
    return [lot if len(part) == len(lot.ids) else lot.split(part) for lot, part in parts.items()]


def places_of(ids: Sequence[int], part: Sequence[int]) -> tuple[list[int], list[int]]:
    """Where in ``ids`` those of ``part`` are, and where the others."""
    chosen = set(part)
    inside = [at for at, number in enumerate(ids) if number in chosen]
    outside = [at for at, number in enumerate(ids) if number not in chosen]
    return inside, outside


def pick(values: Sequence[int], places: Sequence[int]) -> tuple[int, ...]:
    return tuple([values[at] for at in places])


def pick_payload(payload: Payload, nbytes: int, places: Sequence[int]) -> Payload:
    """Some requests' part of a lot's payload: bytes, one request's ``nbytes`` behind the other's, or a tuple with a
    piece, or a place, for each."""
    if type(payload) is tuple:
        return tuple([payload[at] for at in places])
    return b"".join([payload[at * nbytes : (at + 1) * nbytes] for at in places])
