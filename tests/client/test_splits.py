"""Where requests go that name no version."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.client.splits import Split, split_of
from penstock.wire.models import LOADING, READY, ModelState, Route

LABELS = (("stable", "3"), ("canary", "4"))


def states(*ready: str) -> dict[str, ModelState]:
    return {each: ModelState("m", each, READY if each in ready else LOADING, "", None) for each in "345"}


def split(*parts: tuple[str, int], ready: str = "345", before: Split | None = None) -> Split:
    found = split_of(Route("m", ("5",), LABELS, parts), states(*ready), before)
    assert found is not None
    return found


def test_a_hundred_requests_go_where_they_are_to() -> None:
    some = split(("stable", 95), ("canary", 4), ("5", 1))
    assert Counter(some.pick() for _ in range(100)) == {"3": 95, "4": 4, "5": 1}
    few = Counter(some.pick() for _ in range(20))
    assert 18 <= few["3"] <= 20, "and a few of them nearly so"


@given(st.lists(st.text(st.characters(), min_size=1), min_size=1, max_size=20))
def test_whoever_is_sticky_stays(names: list[str]) -> None:
    some, other = split(("stable", 50), ("canary", 50)), split(("stable", 50), ("canary", 50))
    first = [some.pick(name) for name in names]
    some.pick()
    assert [some.pick(name) for name in names] == [other.pick(name) for name in names] == first


@pytest.mark.parametrize("text", ["\ud800", "\0", "\U0001f6b0", " ", "x" * 256])
def test_any_text_sticks(text: str) -> None:
    some = split(("stable", 50), ("canary", 50))
    assert some.pick(text) == some.pick(text) != ""


def test_the_sticky_are_split_as_the_others_are() -> None:
    some = split(("stable", 80), ("canary", 20))
    found = Counter(some.pick(f"user-{number}") for number in range(2000))
    assert 300 < found["4"] < 500


def test_what_is_not_served_leaves_its_part_to_the_current_version() -> None:
    some = split(("stable", 60), ("canary", 40), ready="3")
    assert Counter(some.pick() for _ in range(100)) == {"3": 60, "": 40}


def test_none_goes_to_who_has_no_part() -> None:
    none, all_of_it = split(("stable", 0), ("canary", 100)), split(("stable", 100), ("canary", 0))
    assert {none.pick() for _ in range(100)} == {"4"}
    assert {all_of_it.pick() for _ in range(100)} == {"3"}


def test_a_model_without_traffic_has_none_to_split_nor_has_one_whose_parts_do_not_add_up() -> None:
    assert split_of(Route("m", ("3",)), states("3")) is None
    assert split_of(Route("m", ("3",), (), (("3", 50), ("4", 40))), states("3")) is None


def test_it_goes_on_where_nothing_has_changed() -> None:
    some = split(("stable", 50), ("canary", 50))
    assert split(("stable", 50), ("canary", 50), before=some) is some
    assert split(("stable", 50), ("canary", 50), before=some, ready="3") is not some
    assert split(("stable", 51), ("canary", 49), before=some) is not some
