"""Where the requests for a model go that name no version of it: its traffic, split among versions. Pure."""

from __future__ import annotations

import zlib
from bisect import bisect_right
from collections.abc import Mapping
from typing import Final

from penstock.wire.models import SERVED, WHOLE, ModelState, Route

_STEP: Final = 61  # has no divisor in common with WHOLE: so a hundred requests in a row go to each as many as it gets


class Split:
    """The traffic of one model: ``parts`` are pairs of a version and its percent, which add up to WHOLE. Those that are
    not in ``served`` leave theirs to the version that is current."""

    def __init__(self, name: str, parts: tuple[tuple[str, int], ...], served: frozenset[str]) -> None:
        self.name = name
        self.parts = parts
        self.served = served
        self._versions = [version if version in served else "" for version, _ in parts]
        self._ends = [sum([part for _, part in parts[: at + 1]]) for at in range(len(parts))]
        self._at = 0

    def pick(self, sticky: str = "") -> str:
        """The version for the next request; always the same for the same ``sticky``, in whichever process. "": the one
        that is current."""
        if sticky:
            at = zlib.crc32(f"{self.name}\0{sticky}".encode("utf-8", "surrogatepass")) % WHOLE
        else:
            at = self._at = (self._at + _STEP) % WHOLE
        return self._versions[bisect_right(self._ends, at)]


def split_of(route: Route, versions: Mapping[str, ModelState], before: Split | None = None) -> Split | None:
    """The split that a route asks for, None where it asks for none, or one that does not add up. ``before``: goes on
    where nothing has changed."""
    labels = dict(route.labels)
    parts = tuple([(labels.get(target, target), part) for target, part in route.traffic])
    if sum([part for _, part in parts]) != WHOLE:
        return None
    served = frozenset([version for version, state in versions.items() if state.state in SERVED])
    split = Split(route.name, parts, served & {version for version, _ in parts})
    return before if before is not None and (before.parts, before.served) == (split.parts, split.served) else split
