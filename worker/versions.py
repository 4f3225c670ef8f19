"""Which versions of a model are served. Pure.

A version is a directory whose name is a whole number without leading zeros, as for Triton and TensorFlow Serving.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Annotated, Final, Literal, TypeAlias

from msgspec import Meta

_VERSION: Final = re.compile(r"0|[1-9]\d{0,17}", re.ASCII)
NAMED_MAX: Final = 64

_Count: TypeAlias = Annotated[int, Meta(ge=1, le=NAMED_MAX)]
_Number: TypeAlias = Annotated[int, Meta(ge=0, lt=10**18)]
VersionPolicy: TypeAlias = (
    Literal["latest", "all"]
    | Annotated[dict[Literal["latest"], _Count], Meta(min_length=1)]
    | Annotated[tuple[_Number, ...], Meta(min_length=1, max_length=NAMED_MAX)]
)


def is_version(name: str) -> bool:
    """Whether a directory of this name holds a version."""
    return _VERSION.fullmatch(name) is not None


def wanted(policy: VersionPolicy, there: Iterable[str]) -> list[str]:
    """Of the versions that are ``there``, those that a policy asks for, the newest first; also those that it names and
    are not there."""
    ordered = sorted(there, key=int, reverse=True)
    if policy == "latest":
        return ordered[:1]
    if policy == "all":
        return ordered
    if isinstance(policy, dict):
        return ordered[: policy["latest"]]
    return [str(number) for number in sorted(set(policy), reverse=True)]
