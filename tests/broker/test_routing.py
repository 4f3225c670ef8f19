"""Which version of a model requests mean that name none."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.broker.routing import Tally, choose
from penstock.wire.models import newest


def tallies(text: str) -> dict[str, Tally]:
    """ "1:2 2!:0": version 1 is served by two workers, and version 2, which is asked for, by none."""
    found = {}
    for part in text.split():
        version, served = part.split(":")
        found[version.rstrip("!")] = Tally(version.endswith("!"), int(served))
    return found


@pytest.mark.parametrize(
    ("current", "versions", "workers", "chosen"),
    [
        ("", "1!:1", 1, "1"),
        ("", "1!:1 2!:1 10!:1", 1, "10"),
        ("1", "1:2 2!:1", 2, "1"),  # not before all have it
        ("1", "1:2 2!:2", 2, "2"),
        ("1", "1:1 2!:1", 2, "1"),  # one cannot load it, and has given the old one back
        ("1", "1:0 2!:1", 2, "2"),  # better one than none
        ("2", "1!:2 2:2", 2, "1"),  # the way back
        ("2", "1:2 2:2", 2, ""),  # removed
        ("", "1:2 2!:0", 2, "1"),  # a new broker, while the new version does not load
        ("", "1!:0 2!:0", 2, "2"),  # nothing serves yet
        ("3", "1!:0 2!:0", 2, "2"),  # what was current has gone
        ("", "canary!:1 3!:1", 1, "3"),
        ("2", "1!:2 2!:2 3:2", 2, "2"),  # 3 is there for a label
    ],
)
def test_what_is_chosen(current: str, versions: str, workers: int, chosen: str) -> None:
    assert choose(current, tallies(versions), workers) == chosen


@st.composite
def situations(draw: st.DrawFn) -> tuple[str, dict[str, Tally], int]:
    workers = draw(st.integers(1, 4))
    versions = draw(st.dictionaries(st.sampled_from("12345"), st.builds(Tally, st.booleans(), st.integers(0, workers))))
    return draw(st.sampled_from(["", *"12345"])), versions, workers


@given(situations())
def test_something_that_is_served_is_current_where_anything_is(situation: tuple[str, dict[str, Tally], int]) -> None:
    current, versions, workers = situation
    chosen = choose(current, versions, workers)
    asked = [version for version, tally in versions.items() if tally.asked]
    assert bool(chosen) == bool(asked)
    if not chosen:
        return
    if any(tally.served for tally in versions.values()):
        assert versions[chosen].served
    whole = [version for version in asked if versions[version].served == workers]
    if whole:
        assert chosen == newest(whole)
    elif current in versions and versions[current].served:
        assert chosen == current
    assert choose(chosen, versions, workers) == chosen, "it stays"
