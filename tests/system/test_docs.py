"""The page of the API in a real browser: it lists what there is, and sends what is written."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
from onnx import TensorProto

from tests.system.chromium import Browser
from tests.system.models import dense, identity, two_inputs, write
from tests.system.servers import Server

EVIL = "<img src=x onerror=document.title='harmed'>"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    models = tmp_path_factory.mktemp("models")
    write(models, "dense", dense())
    write(models, "sums", two_inputs())
    write(models, "strings", identity(TensorProto.STRING))
    write(models, EVIL, dense())
    server = Server(tmp_path_factory.mktemp("server") / "run", str(models))
    yield server
    server.check_clean_end()


def choose(browser: Browser, route: str) -> None:
    found = f"find((each) => each.textContent === {json.dumps(route)})"
    browser.evaluate(f"[...document.querySelectorAll('#routes button')].{found}.click()")


def send(browser: Browser) -> tuple[str, str]:
    """What the page says then: status and answer."""
    browser.evaluate("document.getElementById('outcome').textContent = ''")
    browser.evaluate("document.getElementById('send').click()")
    outcome = browser.until("document.getElementById('outcome').textContent", "an outcome")
    return outcome, browser.evaluate("document.getElementById('answer').textContent")


def test_what_is_proposed_is_answered(server: Server, browser: Browser) -> None:
    browser.open(server.url + "/docs")
    browser.until("document.querySelectorAll('#routes button').length > 30", "all routes")
    for model in ("dense", "sums", "strings", "%3Cimg%20src%3Dx%20onerror%3Ddocument.title%3D%27harmed%27%3E"):
        for route in (f"/v2/models/{model}/infer", f"/v2/models/{model}/predict", f"/v1/models/{model}:predict"):
            choose(browser, f"POST {route}")
            outcome, answer = send(browser)
            assert outcome.startswith("200 "), (route, answer)
            assert json.loads(answer)
    assert browser.evaluate("document.title") == "Penstock: its API"
    assert browser.complaints() == []


def test_paths_are_filled_in_and_errors_shown(server: Server, browser: Browser) -> None:
    browser.open(server.url + "/docs")
    browser.until("document.querySelectorAll('#routes button').length > 30", "all routes")
    choose(browser, "GET /v2/models/{model}")
    outcome, answer = send(browser)
    assert (outcome[:4], json.loads(answer)["name"]) == ("200 ", EVIL)  # the first there is
    browser.evaluate("document.getElementById('argument-model').value = 'a/b'")
    outcome, answer = send(browser)
    assert (outcome[:4], json.loads(answer)) == ("404 ", {"error": "Request for unknown model: 'a/b' is not found"})
    choose(browser, "POST /v2/models/dense/infer")
    browser.evaluate("document.getElementById('body').value = '{'")
    outcome, answer = send(browser)
    assert (outcome[:4], "not JSON" in answer) == ("400 ", True)


def test_routes_are_found(server: Server, browser: Browser) -> None:
    browser.open(server.url + "/docs")
    browser.until("document.querySelectorAll('#routes button').length > 30", "all routes")
    browser.evaluate(
        "(() => { const find = document.getElementById('find'); find.value = 'metrics';"
        " find.dispatchEvent(new Event('input')); })()"
    )
    shown = browser.evaluate("[...document.querySelectorAll('#routes button')].map((each) => each.textContent)")
    assert shown == ["GET /metrics"]
    choose(browser, "GET /metrics")
    outcome, answer = send(browser)
    assert (outcome[:4], "penstock_http_responses" in answer) == ("200 ", True)
