"""Which versions a policy asks for."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.worker.versions import VersionPolicy, is_version, wanted


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
