"""The names of peers, each of which one has at a time. Pure."""

from __future__ import annotations

from collections.abc import Collection

from penstock.wire.messages import MAX_NAME


class Names:
    """Those that are taken. They label metrics, so there must never be more of them than peers."""

    def __init__(self, own: str) -> None:
        """``own``: a name that no peer gets."""
        self._own = own
        self._taken = {own}
        # By a name that is taken: a number below which all are taken of name-1, name-2, ... So peers that all wish for
        # one name, as workers of one device do, do not search through each other's.
        self._numbers: dict[str, int] = {}

    def take(self, wished: str) -> str:
        """The wished name, or where another has it, the first free one of wished-1, wished-2, ..."""
        name, number = wished, 0
        if wished in self._taken:
            number = self._numbers.get(wished, 1)
            while (name := _numbered(wished, number)) in self._taken:
                number += 1
            self._numbers[wished] = number + 1
        self._taken.add(name)
        return name

    def free(self, name: str) -> None:
        """Its peer has gone."""
        self._taken.remove(name)
        self._numbers.pop(name, None)
        stem, _, number = name.rpartition("-")
        if len(name) == MAX_NAME:  # whose number may follow the beginning of a longer one
            self._numbers.clear()
        elif stem in self._numbers and number.isdecimal():
            self._numbers[stem] = min(self._numbers[stem], max(1, int(number)))

    def validate(self, names: Collection[str]) -> None:
        """For tests. ``names``: those of all peers that have one. Raises AssertionError."""
        assert len(set(names)) == len(names), f"names are not unique: {names}"
        assert self._taken == {self._own, *names}, f"{self._taken} are taken, and {names} are the peers'"
        for wished, number in self._numbers.items():
            assert wished in self._taken, f"{wished} is free, and its numbers are remembered"
            below = {_numbered(wished, each) for each in range(1, number)}
            assert below <= self._taken, f"{below - self._taken} are free, and {wished}-{number} would be next"


def _numbered(wished: str, number: int) -> str:
    suffix = f"-{number}"
    return wished[: MAX_NAME - len(suffix)] + suffix
