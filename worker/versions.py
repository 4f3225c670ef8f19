"""Which versions of a model are served. Pure.

A version is a directory whose name is a whole number without leading zeros, as for Triton and TensorFlow Serving.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Annotated, Final, Literal, TypeAlias

from msgspec import Meta

_VERSION: Final = re.compile(r"0|[1-9]\d{0,17}", re.ASCII)
NAMED_MAX: Final = 64

_Count: TypeAlias = Annotated[int, Meta(ge=1, le=NAMED_MAX)]
VersionNumber: TypeAlias = Annotated[int, Meta(ge=0, lt=10**18)]
VersionPolicy: TypeAlias = (
    Literal["latest", "all"]
    | Annotated[dict[Literal["latest"], _Count], Meta(min_length=1)]
    | Annotated[tuple[VersionNumber, ...], Meta(min_length=1, max_length=NAMED_MAX)]
)


def is_version(name: str) -> bool:
    """Whether a directory of this name holds a version."""
    return _VERSION.fullmatch(name) is not None


def wanted(
    policy: VersionPolicy,
    there: Iterable[str],
    labels: Mapping[str, int] = MappingProxyType({}),
    traffic: Iterable[str] = (),
) -> list[str]:
    """The versions that are to be served, the newest first: what a policy asks for, and what labels and traffic name.
    Also those that are named and not there. ``traffic``: its keys."""
    named = {str(number) for number in labels.values()} | {each for each in traffic if each not in labels}
    return sorted(named.union(asked_for(policy, there)), key=int, reverse=True)


def asked_for(policy: VersionPolicy, there: Iterable[str]) -> list[str]:
    """Of the versions that are ``there``, those that a policy asks for, the newest first; also those that it names and
    are not there. A request that names no version goes to the newest of these that serves, unless traffic says it."""
    ordered = sorted(there, key=int, reverse=True)
    if policy == "latest":
        return ordered[:1]
    if policy == "all":
        return ordered
    if isinstance(policy, dict):
        return ordered[: policy["latest"]]
    return [str(number) for number in sorted(set(policy), reverse=True)]


def shares(traffic: Mapping[str, int], labels: Mapping[str, int]) -> dict[str, int]:
    """What part of the requests that name no version goes to each version, in percent; only those that get some."""
    found: dict[str, int] = {}
    for target, percent in traffic.items():
        version = str(labels[target]) if target in labels else target
        if percent:
            found[version] = found.get(version, 0) + percent
    return found
