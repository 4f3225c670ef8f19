"""The histogram, against numpy over the same values: nothing is kept but counts, and no quantile is off by 1 %."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.load.histogram import LARGEST, Histogram, bounds_of, bucket_of

SHARES = (0.0, 0.01, 0.5, 0.9, 0.99, 0.999, 1.0)
values = st.integers(0, LARGEST)


def filled(numbers: list[int]) -> Histogram:
    histogram = Histogram()
    for number in numbers:
        histogram.record(number)
    return histogram


def expected(numbers: list[int]) -> list[float]:
    return [float(each) for each in np.quantile(numbers, SHARES, method="inverted_cdf")]


@given(st.lists(values, min_size=1, max_size=300))
def test_quantiles_are_within_a_percent_of_numpys(numbers: list[int]) -> None:
    assert list(filled(numbers).quantiles(SHARES)) == pytest.approx(expected(numbers), rel=0.01)


@pytest.mark.parametrize("count", [1000, 9_999, 100_000])
def test_so_they_are_with_many_values_of_all_sizes(count: int) -> None:
    source = random.Random(count)
    numbers = [int(source.lognormvariate(14, 2)) for _ in range(count)]
    histogram = filled(numbers)
    assert list(histogram.quantiles(SHARES)) == pytest.approx(expected(numbers), rel=0.01)
    assert histogram.quantile(0.999) == pytest.approx(expected(numbers)[5], rel=0.01)
    assert len(histogram.counts) < 3000  # whatever their number


@given(values)
def test_a_bucket_holds_its_values_and_is_narrow(value: int) -> None:
    low, high = bounds_of(bucket_of(value))
    assert low <= value < high
    assert high - low <= max(1, low * 0.008)


@given(values, values)
def test_buckets_are_in_the_order_of_values(one: int, other: int) -> None:
    assert (bucket_of(one) <= bucket_of(other)) or one > other


@given(st.lists(values), st.lists(values))
def test_the_sum_of_two_is_that_of_their_values(some: list[int], others: list[int]) -> None:
    both = filled(some)
    both.add(filled(others))
    assert both.export() == filled(some + others).export()


@given(st.lists(values))
def test_json_carries_it(numbers: list[int]) -> None:
    histogram = filled(numbers)
    loaded = Histogram.load(json.loads(json.dumps(histogram.export())))
    assert loaded.export() == histogram.export()
    assert list(loaded.quantiles(SHARES)) == list(histogram.quantiles(SHARES))


def test_what_is_too_large_or_too_small_lies_in_the_outermost_buckets() -> None:
    assert bucket_of(LARGEST + 1) == bucket_of(LARGEST) == max(map(bucket_of, [1 << n for n in range(60)]))
    assert bucket_of(-1) == 0
    assert filled([LARGEST * 4]).quantile(0.5) == LARGEST * 4


def test_of_nothing_all_quantiles_are_0() -> None:
    assert list(Histogram().quantiles(SHARES)) == [0.0] * len(SHARES)
