"""What /metrics says, and when it says less."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families

from penstock.gateway.reports import OPENMETRICS, PLAIN, Exposition, Reports, form_for, merge, render
from penstock.wire.messages import Metrics, Snapshot
from penstock.wire.metrics import FAMILIES, ROWS, Meters, Sample
from tests.gateway.serving import Loop

OWN = Snapshot("gateway-0", (Sample("penstock_http_responses", ("200",), 7.0),))


def series(text: bytes) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    """Prometheus text as values by name and labels; no series may be there twice."""
    found: dict[tuple[str, frozenset[tuple[str, str]]], float] = {}
    for family in text_string_to_metric_families(text.decode()):
        for sample in family.samples:
            key = sample.name, frozenset(sample.labels.items())
            assert key not in found
            found[key] = sample.value
    return found


def value(text: bytes, name: str, **labels: str) -> float:
    return series(text)[name, frozenset(labels.items())]


def test_series_of_all_processes_carry_their_labels() -> None:
    snapshots = [
        Snapshot("broker", (Sample("penstock_requests", ("m", "1"), 5.0), Sample("penstock_workers", (), 2.0))),
        Snapshot("worker-0", (Sample("penstock_batches", ("m", "1", "full"), 3.0),)),
        Snapshot("worker-1", (Sample("penstock_batches", ("m", "1", "full"), 4.0),)),
    ]
    text = render(merge(snapshots, OWN), broker=True)
    assert value(text, "penstock_broker_up") == 1
    assert value(text, "penstock_requests_total", model="m", version="1") == 5
    assert value(text, "penstock_workers") == 2
    assert value(text, "penstock_batches_total", model="m", version="1", reason="full", worker="worker-0") == 3
    assert value(text, "penstock_batches_total", model="m", version="1", reason="full", worker="worker-1") == 4
    assert value(text, "penstock_http_responses_total", code="200", gateway="gateway-0") == 7


def test_own_series_are_newer_than_what_the_broker_has_of_them() -> None:
    old = Snapshot("gateway-0", (Sample("penstock_http_responses", ("200",), 1.0),))
    other = Snapshot("gateway-1", (Sample("penstock_http_responses", ("200",), 2.0),))
    text = render(merge([old, other], OWN), broker=True)
    assert value(text, "penstock_http_responses_total", code="200", gateway="gateway-0") == 7
    assert value(text, "penstock_http_responses_total", code="200", gateway="gateway-1") == 2


def test_buckets_are_cumulative() -> None:
    meters = Meters()
    rows = meters.histogram("penstock_batch_rows", "m", "1")
    rows.observe(1, 3)
    rows.observe(3, 2)
    rows.observe(100_000)
    text = render([Snapshot("w", meters.samples())], broker=True)
    labels = {"model": "m", "version": "1", "worker": "w"}
    counts = [value(text, "penstock_batch_rows_bucket", le=str(bound), **labels) for bound in ROWS]
    assert counts == [3, 3, 5, 5, 5, 5, 5, 5, 5, 5]
    assert value(text, "penstock_batch_rows_bucket", le="+Inf", **labels) == 6
    assert value(text, "penstock_batch_rows_count", **labels) == 6
    assert value(text, "penstock_batch_rows_sum", **labels) == 3 + 6 + 100_000


@pytest.mark.parametrize(
    ("accept", "form"),
    [
        (b"", PLAIN),
        (b"*/*", PLAIN),
        (b"text/plain;version=0.0.4;q=0.3,*/*;q=0.1", PLAIN),
        (b"application/openmetrics-text;version=1.0.0;q=0.5,text/plain;version=0.0.4;q=0.3", OPENMETRICS),
        (b"Application/OpenMetrics-Text", OPENMETRICS),
        (b"application/openmetrics-text; version=\xff", OPENMETRICS),
    ],
)
def test_a_scraper_gets_what_it_asks_for(accept: bytes, form: Exposition) -> None:
    assert form_for(accept) is form


def test_openmetrics_has_the_same_series_and_exemplars() -> None:
    meters = Meters()
    seconds = meters.histogram("penstock_http_request_seconds")
    for value, request in ((0.002, 'a "b"\\\nc é'), (0.0001, "0123:7"), (99.0, "slow")):
        assert seconds.observe_one(value)
        seconds.exemplify(value, request)
    seconds.observe(0.3)
    full = [
        *(Snapshot("p", (_made_up(family),)) for family in FAMILIES if family != "penstock_http_request_seconds"),
        Snapshot("gateway-0", meters.samples()),
    ]
    text = render(full, broker=True, form=OPENMETRICS).decode()
    plain = series(render(full, broker=True))
    families = list(parse_openmetrics(text))  # type: ignore[no-untyped-call]
    samples = [sample for family in families for sample in family.samples]
    assert {(each.name, frozenset(each.labels.items())): each.value for each in samples} == plain
    exemplars = {each.labels["le"]: each.exemplar for each in samples if each.exemplar is not None}
    assert {le: (each.labels, each.value) for le, each in exemplars.items()} == {
        "0.0001": ({"request_id": "0123:7"}, 0.0001),
        "0.0025": ({"request_id": 'a "b"\\\nc é'}, 0.002),
        "+Inf": ({"request_id": "slow"}, 99.0),
    }
    assert all(abs(time.time() - float(each.timestamp)) < 100 for each in exemplars.values())


def test_labels_that_are_no_plain_words_are_escaped() -> None:
    model = 'a"b\\c\nd é'
    text = render([Snapshot("b", (Sample("penstock_requests", (model, "1"), 5.0),))], broker=True)
    assert value(text, "penstock_requests_total", model=model, version="1") == 5


def _made_up(family: str) -> Sample:
    about = FAMILIES[family]
    labels = tuple(f"a {label}" for label in about.labels)
    return Sample(family, labels, tuple(map(float, range(len(about.bounds) + 2))) if about.bounds else 1.5)


@pytest.mark.parametrize("family", [family for family, about in FAMILIES.items() if not about.quiet])
def test_every_family_can_be_rendered(family: str) -> None:
    about = FAMILIES[family]
    sample = _made_up(family)
    text = render([Snapshot("p", (sample,))], broker=True)
    [found] = [each for each in text_string_to_metric_families(text.decode()) if each.name == family]
    assert (found.type, found.documentation) == (about.kind, about.help)
    want = dict(zip(about.labels, sample.labels, strict=True)) | ({about.process: "p"} if about.process else {})
    assert all(want.items() <= each.labels.items() for each in found.samples)


class Broker:
    """Counts the questions, and answers none by itself."""

    def __init__(self) -> None:
        self.up = True
        self.asked = 0

    def ask(self) -> int | None:
        if not self.up:
            return None
        self.asked += 1
        return self.asked


@pytest.fixture
def broker() -> Broker:
    return Broker()


@pytest.fixture
def texts() -> list[bytes]:
    return []


@pytest.fixture
def reports(loop: Loop, broker: Broker) -> Iterator[Reports]:
    yield Reports(loop.loop, broker.ask, lambda: OWN, 0.02)
    loop.settle()


def test_scrape_waits_for_the_answer_with_its_serial(reports: Reports, broker: Broker, texts: list[bytes]) -> None:
    reports.ask(texts.append)
    reports.ask(texts.append)
    reports.arrived(Metrics(1, 9, ()))
    assert texts == []
    reports.arrived(Metrics(1, 2, (Snapshot("b", (Sample("penstock_workers", (), 2.0),)),)))
    [text] = texts
    assert (value(text, "penstock_broker_up"), value(text, "penstock_workers")) == (1, 2)
    reports.arrived(Metrics(1, 2, ()))
    assert len(texts) == 1
    reports.arrived(Metrics(1, 1, ()))
    assert len(texts) == 2


def test_without_a_broker_there_are_the_own_series(reports: Reports, broker: Broker, texts: list[bytes]) -> None:
    broker.up = False
    reports.ask(texts.append)
    [text] = texts
    assert value(text, "penstock_broker_up") == 0
    assert value(text, "penstock_http_responses_total", code="200", gateway="gateway-0") == 7


def test_broker_that_does_not_answer_is_not_waited_for_long(
    reports: Reports, broker: Broker, texts: list[bytes], loop: Loop
) -> None:
    answered: list[bytes] = []
    reports.ask(answered.append)
    reports.ask(texts.append)
    reports.arrived(Metrics(1, 1, ()))
    loop.until(lambda: texts)
    assert (value(texts[0], "penstock_broker_up"), broker.asked) == (0, 2)
    reports.arrived(Metrics(1, 2, ()))
    assert (len(texts), len(answered)) == (1, 1)


def test_too_many_scrapes_are_answered_at_once(
    reports: Reports, broker: Broker, texts: list[bytes], loop: Loop
) -> None:
    waiting: list[bytes] = []
    for _ in range(100):
        reports.ask(waiting.append)
    reports.ask(texts.append)
    assert (len(waiting), len(texts), broker.asked) == (0, 1, 100)
    assert value(texts[0], "penstock_http_responses_total", code="200", gateway="gateway-0") == 7
    assert b"penstock_broker_up" not in texts[0], "nobody asked it"
    for serial in range(1, 101):
        reports.arrived(Metrics(1, serial, ()))
    assert len(waiting) == 100
