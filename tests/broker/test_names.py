"""Names of peers: the wished one or the first free number behind it, however many wish for one."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.broker import names as module
from penstock.broker.names import Names
from penstock.wire.messages import MAX_NAME

LONG = "n" * MAX_NAME


def first_free(wished: str, taken: set[str]) -> str:
    name, number = wished, 0
    while name in taken:
        number += 1
        name = wished[: MAX_NAME - len(f"-{number}")] + f"-{number}"
    return name


WISHES = ["w", "w", "w", "w-1", "w-2", "w-02", "w-0", "w-x", "-1", "", "broker", LONG, LONG[:-1], LONG[:-2] + "-1"]


@settings(deadline=None)
@given(st.lists(st.sampled_from(WISHES) | st.integers(0, 30), max_size=60))
def test_each_gets_what_a_search_from_the_start_would_find(steps: list[str | int]) -> None:
    """A wish, or the peer that leaves."""
    names, given_out = Names("broker"), list[str]()
    for step in steps:
        if isinstance(step, str):
            name = names.take(step)
            assert name == first_free(step, {"broker", *given_out})
            assert len(name) <= MAX_NAME
            given_out.append(name)
        elif given_out:
            names.free(given_out.pop(step % len(given_out)))
        names.validate(given_out)


def test_thousands_that_wish_for_one_name_do_not_search_through_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    looked_at = 0
    numbered = module._numbered

    def counted(wished: str, number: int) -> str:
        nonlocal looked_at
        looked_at += 1
        return numbered(wished, number)

    monkeypatch.setattr(module, "_numbered", counted)
    names = Names("broker")
    taken = [names.take("cpu") for _ in range(3000)]
    assert (taken[0], taken[-1]) == ("cpu", "cpu-2999")
    assert looked_at == 2999
    for name in reversed(taken[1000:2000]):  # a host is started anew
        names.free(name)
    assert [names.take("cpu") for _ in range(1000)] == taken[1000:2000]
    assert looked_at == 3999


def test_names_of_those_that_have_gone_are_not_remembered() -> None:
    names = Names("broker")
    for number in range(100):
        taken = [names.take(f"client-{number}") for _ in range(3)]
        for name in taken:
            names.free(name)
    assert names._numbers == {}
    names.validate([])


def test_what_is_not_taken_cannot_be_freed() -> None:
    with pytest.raises(KeyError):
        Names("broker").free("w")
