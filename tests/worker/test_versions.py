"""Which versions a policy asks for."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.worker.versions import VersionPolicy, asked_for, is_version, shares, wanted


@pytest.mark.parametrize(
    ("policy", "versions"),
    [
        ("latest", ["10"]),
        ("all", ["10", "9", "2", "0"]),
        ({"latest": 2}, ["10", "9"]),
        ({"latest": 64}, ["10", "9", "2", "0"]),
        ((2, 9), ["9", "2"]),
        ((9, 9), ["9"]),
        ((3, 9), ["9", "3"]),
    ],
)
def test_policies(policy: VersionPolicy, versions: list[str]) -> None:
    assert wanted(policy, ["9", "2", "10", "0"]) == versions


@pytest.mark.parametrize("name", ["0", "1", "20261122093000"])
def test_whole_numbers_are_versions(name: str) -> None:
    assert is_version(name)


@pytest.mark.parametrize("name", ["", "latest", "01", "-3", "2.old", "1.5", "٣", "1\n", "9" * 19, ".1"])
def test_nothing_else_is_one(name: str) -> None:
    assert not is_version(name)


@given(st.sets(st.integers(0, 1000), min_size=1), st.integers(1, 64))
def test_the_newest_come_first_and_are_the_highest(numbers: set[int], count: int) -> None:
    found = [int(version) for version in wanted({"latest": count}, map(str, numbers))]
    assert found == sorted(numbers, reverse=True)[:count]
    assert wanted("latest", map(str, numbers)) == [str(max(numbers))]


def test_what_labels_and_traffic_name_is_served_too() -> None:
    there = ["1", "3", "4", "9"]
    assert wanted("latest", there, {"stable": 3, "canary": 4}, ["stable", "1"]) == ["9", "4", "3", "1"]
    assert wanted("latest", there, {"stable": 9}) == ["9"]
    assert wanted((3,), there, {"gone": 7}) == ["7", "3"]
    assert asked_for("latest", there) == ["9"]


def test_traffic_by_version() -> None:
    assert shares({"stable": 90, "3": 5, "canary": 5, "1": 0}, {"stable": 3, "canary": 4}) == {"3": 95, "4": 5}
    assert shares({}, {"stable": 3}) == {}


_numbers = st.integers(0, 20)
_policies = st.one_of(
    st.sampled_from(["latest", "all"]),
    st.builds(lambda count: {"latest": count}, st.integers(1, 64)),
    st.lists(_numbers, min_size=1).map(tuple),
)


@given(
    _policies,
    st.sets(_numbers),
    st.dictionaries(st.sampled_from("abc"), _numbers),
    st.lists(st.sampled_from("abc") | _numbers.map(str), unique=True),
)
def test_versions_are_those_of_the_policy_and_those_that_are_named(
    policy: VersionPolicy, numbers: set[int], labels: dict[str, int], traffic: list[str]
) -> None:
    traffic = [each for each in traffic if each in labels or is_version(each)]
    there = list(map(str, numbers))
    found = wanted(policy, there, labels, traffic)
    named = {str(labels[each]) if each in labels else each for each in (*labels, *traffic)}
    assert set(found) == set(asked_for(policy, there)) | named
    assert [int(each) for each in found] == sorted({int(each) for each in found}, reverse=True)
    whole = dict.fromkeys(traffic, 1)
    assert set(shares(whole, labels)) <= set(found)
    assert sum(shares(whole, labels).values()) == len(traffic)
