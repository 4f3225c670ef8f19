"""Alerts and dashboard: what they ask for exists, and a real Prometheus understands it, scraping a real server."""

from __future__ import annotations

import json
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlencode
from urllib.request import urlopen

import pytest

from penstock.wire.metrics import COUNTER, FAMILIES, HISTOGRAM
from tests.system.servers import Server, wait_for

DEPLOY = Path(__file__).parents[2] / "deploy"
RULES = DEPLOY / "prometheus" / "penstock.rules.yml"
DASHBOARD = DEPLOY / "grafana" / "penstock.json"
ROOT = Path(__file__).parents[2]

COUNTED = ("penstock_requests_total", "penstock_http_request_seconds_count", "penstock_batch_rows_count")

needs_prometheus = pytest.mark.skipif(shutil.which("prometheus") is None, reason="needs the Debian package prometheus")


def names() -> set[str]:
    """Of series, as Prometheus has them."""
    found = {"penstock_broker_up"}
    for name, about in FAMILIES.items():
        if about.kind == HISTOGRAM:
            found |= {f"{name}_{part}" for part in ("bucket", "sum", "count")}
        else:
            found.add(f"{name}_total" if about.kind == COUNTER else name)
    return found


def panels() -> list[tuple[str, str]]:
    """Title and expression of each query on the dashboard, for all models."""
    found = []
    for panel in json.loads(DASHBOARD.read_text())["panels"]:
        for target in panel["targets"]:
            expression = target["expr"].replace("$__rate_interval", "1m").replace("$model", ".*")
            found.append((panel["title"], expression.replace("$job", "penstock")))
    return found


def test_what_is_asked_for_exists() -> None:
    text = RULES.read_text() + DASHBOARD.read_text()
    assert set(re.findall(r"(?<![\w:])penstock_\w+", text)) - {"penstock_rules"} <= names()


def test_the_dashboard_shows_every_family() -> None:
    shown = DASHBOARD.read_text()
    left_out = {"penstock_callers", "penstock_held_bytes", "penstock_http_connections", "penstock_http_body_bytes"}
    left_out |= {
        "penstock_arena_waiting",
        "penstock_arena_missing",
        "penstock_model_run_bytes",
        "penstock_http_cut_off",
        "penstock_sequences",
        *("penstock_failed_rows", "penstock_failed_seconds", "penstock_last_batch_seconds", "penstock_model_bytes"),
        *("penstock_input_seconds", "penstock_model_seconds"),
        *(name for name, about in FAMILIES.items() if about.quiet),
    }
    assert {name for name in FAMILIES if name not in shown} == left_out


@needs_prometheus
def test_every_alert_comes_when_it_should_and_not_else(tmp_path: Path) -> None:
    for path in (RULES, Path(__file__).with_name("rules_test.yml")):
        shutil.copy(path, tmp_path)
    for command in (["check", "rules", RULES.name], ["test", "rules", "rules_test.yml"]):
        ended = subprocess.run(["promtool", *command], cwd=tmp_path, capture_output=True, text=True, check=False)
        assert ended.returncode == 0, ended.stdout + ended.stderr
    tested = set(re.findall(r"alertname: (\w+)", (tmp_path / "rules_test.yml").read_text()))
    assert tested == set(re.findall(r"- alert: (\w+)", RULES.read_text()))


class Prometheus:
    """It scrapes one server, four times a second."""

    def __init__(self, directory: Path, target: str) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.url = f"http://127.0.0.1:{free.getsockname()[1]}"
        shutil.copy(RULES, directory)
        (directory / "prometheus.yml").write_text(
            "global: {scrape_interval: 250ms, evaluation_interval: 250ms}\n"
            f"rule_files: [{RULES.name}]\n"
            f"scrape_configs: [{{job_name: penstock, static_configs: [{{targets: ['{target}']}}]}}]\n"
        )
        arguments = ["--config.file=prometheus.yml", "--storage.tsdb.path=data", "--log.level=warn"]
        arguments.append("--enable-feature=exemplar-storage")
        self.process = subprocess.Popen(
            ["prometheus", *arguments, f"--web.listen-address={self.url.removeprefix('http://')}"], cwd=directory
        )

    def get(self, path: str, **query: str) -> Any:
        with urlopen(f"{self.url}/api/v1/{path}?{urlencode(query)}", timeout=10) as answer:
            told = json.load(answer)
        assert told["status"] == "success"
        return told["data"]

    def query(self, expression: str) -> list[Any]:
        found: list[Any] = self.get("query", query=expression)["result"]
        return found


@pytest.fixture(scope="module")
def prometheus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    server = Server(tmp_path_factory.mktemp("server") / "run")
    started = Prometheus(tmp_path_factory.mktemp("prometheus"), f"{server.host}:{server.port}")
    request = json.loads((ROOT / "examples/digits/seven.json").read_text())

    def scraped() -> bool:
        """More than once, with requests between, of which broker, gateway and worker tell: a rate takes two points."""
        status, _ = server.infer("digits", request)
        assert status == 200
        try:
            rates = [started.query(f"sum(rate({name}[1m])) > 0") for name in COUNTED]
        except OSError:  # it has not begun
            return False
        return all(rates)

    try:
        wait_for(scraped, "Prometheus to see requests")
        yield started
    finally:
        started.process.terminate()
        started.process.wait(30)
        server.check_clean_end()


@needs_prometheus
def test_no_alert_comes_for_a_server_that_is_well(prometheus: Prometheus) -> None:
    def evaluated() -> bool:
        [group] = prometheus.get("rules")["groups"]
        assert {rule["health"] for rule in group["rules"]} <= {"ok", "unknown"}, group
        return all(rule["health"] == "ok" for rule in group["rules"])

    wait_for(evaluated, "all rules to be evaluated")
    assert prometheus.get("alerts")["alerts"] == []


@needs_prometheus
@pytest.mark.parametrize(("title", "expression"), panels() if DASHBOARD.exists() else [])
def test_every_panel_has_something_to_show(prometheus: Prometheus, title: str, expression: str) -> None:
    found = prometheus.query(expression)
    # What is well, or without GPUs, or keeps no answers.
    if not re.search("failures|retries|bad_messages|penstock_gpu_|penstock_cache_", expression):
        assert found, f"'{title}' is empty"


@needs_prometheus
def test_slow_requests_can_be_found_by_their_ids(prometheus: Prometheus) -> None:
    now = time.time()
    times = {"start": str(now - 100), "end": str(now + 100)}
    [found, *_] = prometheus.get("query_exemplars", query="penstock_http_request_seconds_bucket", **times)
    assert found["seriesLabels"]["gateway"].startswith("gateway")
    for each in found["exemplars"]:
        assert re.fullmatch(r"[0-9a-f]{16}:\d+", each["labels"]["request_id"])
        assert 0 < float(each["value"]) < 100


@needs_prometheus
def test_tritons_names_are_there(prometheus: Prometheus) -> None:
    [count] = prometheus.query('nv_inference_count{model="digits"}')
    assert float(count["value"][1]) > 0
    [ended] = prometheus.query('nv_inference_request_success{model="digits"}')
    assert ended["metric"] == {
        "__name__": "nv_inference_request_success",
        "instance": ended["metric"]["instance"],
        "job": "penstock",
        "model": "digits",
        "version": "1",
    }
