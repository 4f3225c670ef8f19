"""Which version of a model requests mean that name none. Pure, and the only place that decides it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from penstock.wire.models import newest


class Tally(NamedTuple):
    """How a version fares on the workers that are there: whether any of their repositories asks for it, and how many of
    them serve it."""

    asked: bool
    served: int


def choose(current: str, versions: Mapping[str, Tally], workers: int) -> str:
    """The version that is current from now on; "": none, nobody asks for any. ``current``: the one that is now, or "";
    ``workers``: how many have the model, in whatever version.

    A new version takes over once all of them serve it: so it does for all requests at once, and one that some worker
    cannot load leaves the old one current. Where no version is served by all, what is current stays as long as anybody
    serves it; else it is better that something is.
    """
    asked = [version for version, tally in versions.items() if tally.asked]
    if not asked:
        return ""
    everywhere = [version for version in asked if versions[version].served == workers]
    if everywhere:
        return newest(everywhere)
    served = [version for version, tally in versions.items() if tally.served]
    if current in served:
        return current
    return newest([version for version in asked if version in served] or served or asked)
