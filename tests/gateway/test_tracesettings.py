"""Which requests are traced: levels, rates and counts, of all models and of one, over all gateways."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from penstock.gateway.common import Common
from penstock.gateway.tracesettings import TraceSettings
from tests.gateway.serving import Loop
from tests.gateway.test_application import Desk, ready


class Gateway:
    def __init__(self, loop: Loop, runtime: Path | None, enabled: bool = True) -> None:
        self.desk = Desk(loop).join(ready("m"), ready("n"))
        self.traces = TraceSettings(self.desk.application, Common(runtime), runtime, enabled)
        self.desk.application.add(self.traces.routes)

    def set(self, model: str = "", **settings: Any) -> dict[str, Any]:
        url = f"/v2/models/{model}/trace/setting" if model else "/v2/trace/setting"
        answer = self.desk.ask("POST", url, json.dumps(settings).encode())
        assert answer.status == 200, answer.error
        told: dict[str, Any] = json.loads(answer.body)
        assert json.loads(self.desk.ask("GET", url).body) == told
        return told

    def traced(self, count: int, model: str = "m") -> int:
        return sum(self.traces.wants(model) for _ in range(count))


@pytest.fixture(params=["shared", "alone"])
def gateway(loop: Loop, tmp_path: Path, request: pytest.FixtureRequest) -> Gateway:
    return Gateway(loop, tmp_path if request.param == "shared" else None)


def test_all_are_traced_until_it_is_said_otherwise(gateway: Gateway) -> None:
    assert gateway.traced(10) == 10
    assert gateway.set(trace_level=["OFF"])["trace_level"] == ["OFF"]
    assert gateway.traced(10) == 0
    assert gateway.set(trace_level=None)["trace_level"] == ["TIMESTAMPS"]
    assert gateway.traced(10) == 10


def test_one_of_so_many(gateway: Gateway) -> None:
    gateway.set(trace_rate="5")
    assert gateway.traced(100) == 20
    gateway.set("m", trace_rate="50")
    assert (gateway.traced(100), gateway.traced(100, "n")) == (2, 20)


def test_so_many_and_no_more(gateway: Gateway) -> None:
    assert gateway.set(trace_count="7")["trace_count"] == "7"
    assert gateway.traced(5) == 5
    assert gateway.set()["trace_count"] == "2"
    assert gateway.traced(5, "n") == 2
    assert gateway.set()["trace_count"] == "0"
    assert gateway.set(trace_count="3")["trace_count"] == "3"  # from now on
    assert gateway.traced(5) == 3
    assert gateway.set(trace_count="-1")["trace_count"] == "-1"
    assert gateway.traced(5) == 5


def test_a_models_own_go_before_those_of_all(gateway: Gateway) -> None:
    gateway.set(trace_level=["OFF"], trace_count="100")
    gateway.set("m", trace_level="TIMESTAMPS", trace_count=2)
    assert (gateway.traced(10, "m"), gateway.traced(10, "n")) == (2, 0)
    assert gateway.set("m", trace_level=None)["trace_level"] == ["OFF"]
    assert gateway.set()["trace_count"] == "100"


def test_they_hold_for_all_gateways(loop: Loop, tmp_path: Path) -> None:
    one, other = Gateway(loop, tmp_path), Gateway(loop, tmp_path)
    one.set(trace_count="10")
    assert one.traced(6) + other.traced(6) == 10
    assert other.set()["trace_count"] == "0"
    assert len(list(tmp_path.glob("trace-*.count"))) == 1
    other.set(trace_count="1")
    assert len(list(tmp_path.glob("trace-*.count"))) == 0  # the old one, and the new one has counted nothing
    assert (one.traced(5), other.traced(5)) == (1, 0)


def test_what_is_not_there_cannot_be_switched_on(loop: Loop) -> None:
    gateway = Gateway(loop, None, enabled=False)
    answer = gateway.desk.ask("POST", "/v2/trace/setting", b'{"trace_level": ["TIMESTAMPS"]}')
    assert (answer.status, "set tracing = true in [gateway]" in answer.error) == (400, True)
    for body in (b"[]", b"{", b'{"trace_level": ["OFF", "TIMESTAMPS"]}', b'{"trace_level": 1}', b'{"trace_rate": 1.5}'):
        assert gateway.desk.ask("POST", "/v2/trace/setting", body).status == 400
