"""Errors keep what they say, also across a process boundary of the user's own."""

from __future__ import annotations

import copy
import pickle

import pytest

from penstock.wire.errors import CODES, OVERLOADED, RETRYABLE, PenstockError


@pytest.mark.parametrize("code", sorted(CODES))
def test_an_error_says_whether_a_retry_may_help(code: str) -> None:
    assert PenstockError(code, "no").retryable is (code in {"overloaded", "draining", "unavailable", "lost"})


def test_every_code_that_may_be_retried_is_a_code() -> None:
    assert RETRYABLE < CODES


def test_an_error_survives_pickling_and_copying() -> None:
    error = PenstockError(OVERLOADED, "too much", 1.5)
    for other in (pickle.loads(pickle.dumps(error)), copy.copy(error)):
        assert (other.code, other.message, other.retry_after_s, str(other)) == (OVERLOADED, "too much", 1.5, "too much")


def test_an_error_shows_its_code() -> None:
    assert repr(PenstockError("lost", "gone")) == "PenstockError('lost', 'gone')"
