"""Processes count into series, and a snapshot of these survives the wire."""

from __future__ import annotations

from typing import Any

import pytest

from penstock.wire import metrics
from penstock.wire.errors import BadMessage
from penstock.wire.metrics import (
    FAMILIES,
    HISTOGRAM,
    MAX_SAMPLES,
    MAX_SERIES,
    ROWS,
    SECONDS,
    WHOLE_EVERY,
    Histogram,
    Meters,
    Sample,
    Series,
    check_samples,
    size_label,
)


def test_a_series_is_found_again_by_its_labels() -> None:
    meters = Meters()
    meters.value("penstock_requests", "m", "1").value += 2
    meters.value("penstock_requests", "m", "2").value += 5
    meters.value("penstock_requests", "m", "1").value += 1
    assert meters.samples() == (
        Sample("penstock_requests", ("m", "1"), 3),
        Sample("penstock_requests", ("m", "2"), 5),
    )


@pytest.mark.parametrize(
    ("value", "bucket"), [(0.0, 0), (1.0, 0), (1.5, 1), (2.0, 1), (512.0, len(ROWS) - 1), (513.0, len(ROWS))]
)
def test_a_histogram_counts_up_to_and_including_its_bounds(value: float, bucket: int) -> None:
    histogram = Histogram(ROWS)
    histogram.observe(value, 3)
    assert histogram.counts == [3 if at == bucket else 0 for at in range(len(ROWS) + 1)]
    assert histogram.total == 3 * value


def test_a_histogram_travels_as_its_counts_and_their_total() -> None:
    meters = Meters()
    meters.histogram("penstock_batch_rows", "m", "1").observe(3)
    [sample] = meters.samples()
    assert sample.value == (0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 3.0)
    assert check_samples((tuple(sample),)) == (sample,)


def test_a_bucket_has_one_exemplar_between_two_samples() -> None:
    histogram = Histogram(SECONDS)
    assert histogram.observe_one(0.002)
    histogram.exemplify(0.002, "first")
    assert not histogram.observe_one(0.0021)
    assert histogram.observe_one(100.0), "another bucket's is still wanted"
    histogram.exemplify(100.0, "slow")
    told = histogram.sample("penstock_http_request_seconds", ())
    assert [each[:3] for each in told.exemplars] == [(4, "first", 0.002), (len(SECONDS), "slow", 100.0)]
    assert sum(histogram.counts) == 3
    assert histogram.total == pytest.approx(100.0041)
    assert check_samples(((*told[:3], tuple(map(tuple, told.exemplars))),)) == (told,)
    assert histogram.observe_one(0.0022)
    histogram.exemplify(0.0022, "second")
    told = histogram.sample("penstock_http_request_seconds", ())
    assert [each.request for each in told.exemplars] == ["second", "slow"], "the last one stays until there is another"


def test_an_exemplar_that_is_too_long_is_left_out() -> None:
    histogram = Histogram(SECONDS)
    histogram.exemplify(0.002, "x" * 101)
    assert (histogram.exemplars, histogram.observe_one(0.002)) == ({}, True)


def test_series_that_are_too_many_count_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("penstock.wire.metrics.MAX_SERIES", 3)
    meters = Meters()
    for number in range(100):
        meters.value("penstock_requests", f"m{number}", "1").value += 1
    meters.value("penstock_workers").value = 1
    told = {(sample.family, sample.labels): sample.value for sample in meters.samples()}
    wanted: dict[tuple[str, tuple[str, ...]], Any] = {
        ("penstock_requests", (f"m{number}", "1")): 1 for number in range(3)
    }
    assert told == wanted | {("penstock_requests", ("", "")): 97, ("penstock_workers", ()): 1}


def test_there_is_room_in_a_snapshot_for_all_series() -> None:
    assert MAX_SERIES + len(FAMILIES) <= MAX_SAMPLES


def test_series_are_used_as_their_family_says() -> None:
    meters = Meters()
    with pytest.raises(AssertionError, match="is a histogram"):
        meters.value("penstock_batch_rows", "m", "1")
    with pytest.raises(AssertionError, match="is not a histogram"):
        meters.histogram("penstock_workers")
    with pytest.raises(AssertionError, match="has the labels"):
        meters.value("penstock_requests", "m")


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_has_what_its_kind_needs(name: str) -> None:
    about = FAMILIES[name]
    assert (about.kind == HISTOGRAM) == bool(about.bounds)
    assert list(about.bounds) == sorted(set(about.bounds))
    assert about.process not in about.labels
    assert about.help


@pytest.mark.parametrize(
    ("sample", "sentence"),
    [
        (("penstock_nonsense", (), 1, ()), "unknown metric penstock_nonsense with 0 labels"),
        (("penstock_workers", ("m",), 1, ()), "unknown metric penstock_workers with 1 labels"),
        (("penstock_workers", (), (1.0,), ()), "a gauge does not have 1 values"),
        (("penstock_batch_rows", ("m", "1"), 1.0, ()), "a histogram does not have 0 values"),
        (("penstock_batch_rows", ("m", "1"), (1.0,) * 11, ()), "a histogram does not have 11 values"),
        (("penstock_workers", (), 1.0, ((0, "r", 1.0, 1.0),)), "a gauge does not have exemplars"),
        (("penstock_batch_rows", ("m", "1"), (1.0,) * 12, ((11, "r", 1.0, 1.0),)), "exemplars of its buckets"),
        (("penstock_batch_rows", ("m", "1"), (1.0,) * 12, ((1, "r", 1.0, 1.0),) * 2), "exemplars of its buckets"),
        (("penstock_batch_rows", ("m", "1"), (1.0,) * 12, ((1, "r" * 101, 1.0, 1.0),)), "text of at most 100"),
        (("penstock_batch_rows", ("m", "1"), (1.0,) * 12, ((1, "r", 1.0),)), "sequence of 4 fields"),
        (("penstock_workers", (), float("nan"), ()), "nan is not a finite number"),
        (("penstock_workers", (), True, ()), "True is not a finite number"),
        (("penstock_workers", (), (), ()), "a gauge is a number"),
        (("penstock_requests", ("m", "1"), (), ()), "a counter is a number"),
        (("penstock_workers", (), 1e300, ()), "1e.300 is more than metrics count"),
        (("penstock_batch_rows", ("m", "1"), (-1e16,) * 12, ()), "-1e.16 is more than metrics count"),
        (("penstock_workers", (), "1", ()), "'1' is not a finite number"),
        (("penstock_workers", ()), "a sample is"),
        (("penstock_requests", ("m", "1" * 257), 1, ()), "is not a text of at most 256"),
        (None, "a sample is"),
    ],
)
def test_a_sample_that_would_spoil_the_report_is_refused(sample: Any, sentence: str) -> None:
    with pytest.raises(BadMessage, match=sentence):
        check_samples((sample,))


def test_bounds_of_seconds_reach_from_microseconds_to_the_longest_wait() -> None:
    assert SECONDS[0] <= 0.0001
    assert SECONDS[-1] >= 30


def test_what_has_changed_is_told_and_everything_now_and_then() -> None:
    meters, told = Meters(), Series()
    one, other = meters.value("penstock_model_ready", "m", "1"), meters.value("penstock_model_ready", "m", "2")
    seconds = meters.histogram("penstock_queue_seconds", "m", "1")

    def tell() -> tuple[int, bool]:
        samples, whole = meters.changes()
        told.take(samples, whole)
        assert sorted(told.samples()) == sorted(meters.samples())
        return len(samples), whole

    assert tell() == (3, True)
    assert tell() == (0, False)
    one.value = 1
    assert tell() == (1, False)
    seconds.observe(0.0)
    other.value = 2
    assert tell() == (2, False)
    meters.tell_all()
    assert tell() == (3, True)
    assert [tell() for _ in range(WHOLE_EVERY + 1)] == [*[(0, False)] * WHOLE_EVERY, (3, True)]


def test_series_go_with_their_model() -> None:
    meters, told = Meters(), Series()
    for version in ("1", "2"):
        meters.value("penstock_model_ready", "m", version).value = 1
        meters.histogram("penstock_queue_seconds", "m", version).observe(1.0)
    meters.value("penstock_bad_messages", "worker").value = 3
    told.take(*meters.changes())
    meters.forget("m", "1")
    told.take(*meters.changes())
    assert {sample.labels for sample in told.samples()} == {("m", "2"), ("worker",)}


def test_a_peer_cannot_tell_of_more_series_than_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "MAX_SAMPLES", 2)
    told = Series()
    for version in "123":
        told.take((Sample("penstock_model_ready", ("m", version), 1),), False)
    told.take((Sample("penstock_model_ready", ("m", "1"), 0),), False)
    assert [(sample.labels[1], sample.value) for sample in told.samples()] == [("1", 0), ("2", 1)]


def test_batches_of_many_sizes_are_few_series() -> None:
    sizes = [size_label(rows) for rows in range(1, 4097)]
    assert sizes[:32] == list(range(1, 33))
    assert [size_label(rows) for rows in (33, 36, 37, 64, 65, 100, 4096)] == [36, 36, 40, 64, 72, 104, 4096]
    assert sizes == sorted(sizes)
    assert all(rows <= size <= rows * 1.13 for rows, size in enumerate(sizes, start=1))
    assert len(set(sizes)) == 32 + 7 * 8
