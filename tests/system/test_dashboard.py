"""The dashboard in a real browser: what it shows is what the server does, whatever its models are called."""

from __future__ import annotations

import json
import re
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from onnx import TensorProto

from tests.system.chromium import Browser
from tests.system.models import dense, identity, lookup, two_inputs, write
from tests.system.servers import Process, Server, StartProcess, wait_for

EVIL = "<img src=x onerror=document.title='harmed'>"
X = {"inputs": [{"name": "x", "shape": [1, 4], "datatype": "FP32", "data": [1, 2, 3, 4]}]}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    models = tmp_path_factory.mktemp("models")
    write(models, "dense", dense())
    write(models, "lookup", lookup())
    write(models, "sums", two_inputs())
    write(models, "strings", identity(TensorProto.STRING))
    write(models, "wide", identity(TensorProto.FLOAT, ["N", 50_000]))
    write(models, "half", identity(TensorProto.FLOAT16))
    write(models, "twice", dense(1), "1")
    write(models, EVIL, dense())
    (models / "broken" / "1").mkdir(parents=True)
    (models / "broken" / "1" / "model.onnx").write_bytes(b"not a model <script>document.title = 'harmed'</script>")
    server = Server(tmp_path_factory.mktemp("server") / "run", str(models), "--workers=2", "--gateways=2")
    yield server
    server.check_clean_end()


def rate(model: str) -> str:
    """Requests a second as the table of models has them, in JavaScript."""
    rows = "[...document.querySelectorAll('#models tbody tr')]"
    row = f"{rows}.find((row) => row.cells[0].textContent === {json.dumps(model)})"
    return f"Number({row}.cells[4].textContent.replace(',', ''))"


def choose(browser: Browser, model: str) -> None:
    """Choose a model in the form, and wait for its sample."""
    browser.evaluate(
        f"""(() => {{
          const select = document.getElementById("model");
          document.getElementById("body").value = "";
          select.value = [...select.options].find((each) => each.textContent === {json.dumps(model)}).value;
          select.dispatchEvent(new Event("change"));
        }})()"""
    )
    wait_for(lambda: browser.evaluate("document.getElementById('body').value"), "a sample")


def send(browser: Browser) -> tuple[str, str]:
    """What the form says then: status and answer."""
    browser.evaluate("document.getElementById('outcome').textContent = ''")
    browser.evaluate("document.getElementById('send').click()")
    outcome = browser.until("document.getElementById('outcome').textContent", "an outcome")
    browser.until("!document.getElementById('send').disabled", "the end of it")
    return outcome, browser.evaluate("document.getElementById('answer').textContent")


def test_everything_there_is_is_shown(server: Server, browser: Browser) -> None:
    browser.open(server.url + "/")
    browser.until("document.querySelectorAll('#models tbody tr').length === 9", "all models")
    assert browser.evaluate("document.getElementById('gpus-card').offsetHeight") == 0, "nothing is said of GPUs"
    names = browser.evaluate(
        "[...document.querySelectorAll('#models tbody tr')].map((row) => row.cells[0].textContent)"
    )
    assert names == sorted(["dense", "lookup", "sums", "strings", "wide", "half", "twice", "broken", EVIL])
    states = browser.evaluate(
        "[...document.querySelectorAll('#models tbody tr')].map((row) => row.cells[2].textContent)"
    )
    assert dict(zip(names, states, strict=True)) == dict.fromkeys(names, "READY") | {"broken": "UNAVAILABLE"}
    browser.until("document.querySelectorAll('.box.up').length === 5", "two gateways, a broker and two workers")
    boxes = browser.evaluate("[...document.querySelectorAll('.box')].map((box) => box.dataset.name)")
    assert boxes == ["HTTP clients", "gateway-0", "gateway-1", "broker", "cpu-0", "cpu-1"]
    browser.until("document.querySelectorAll('#processes tbody tr').length === 6", "all processes")
    verdict = browser.evaluate("document.getElementById('verdict').textContent")
    assert verdict.startswith("model broken version 1 is UNAVAILABLE: ")
    assert browser.evaluate("document.getElementById('link').textContent") == "live"


def test_figures_move_when_requests_come(server: Server, browser: Browser) -> None:
    browser.open(server.url + "/")
    browser.until(f"{rate('dense')} === 0", "a rate")

    def busy() -> bool:
        for _ in range(20):
            assert server.infer("dense", X)[0] == 200
        return bool(browser.evaluate(f"{rate('dense')} > 5"))

    wait_for(busy, "the rate of the model to rise")
    browser.until("document.querySelectorAll('.flow.busy').length >= 3", "something to flow")
    browser.until("document.querySelector('#tile-p95').textContent.endsWith('ms')", "a latency")
    browser.until("document.querySelector('#batches').textContent.includes('%')", "batches")
    path = browser.until("document.querySelector('.plot.one').getAttribute('d')", "a plot")
    assert len(re.findall("[ML]", path)) >= 2
    assert browser.evaluate(f"{rate('sums')}") == 0
    browser.until(f"{rate('dense')} === 0", "it to fall again")


def test_failures_are_shown_by_reason(server: Server, browser: Browser) -> None:
    browser.open(server.url + "/")
    browser.until("document.querySelector('#failures td').textContent === 'none'", "no failures at first")
    wrong = {"inputs": [{"name": "i", "shape": [1], "datatype": "INT64", "data": [7]}]}

    def failing() -> bool:
        assert server.infer("lookup", wrong)[0] == 500
        assert server.infer("lookup", X)[0] == 400
        told = browser.evaluate("[...document.querySelectorAll('#failures td.reason')].map((each) => each.textContent)")
        return set(told) == {"model_failed", "bad_input"}

    wait_for(failing, "both reasons")
    assert "requests fail, a second: model_failed" in browser.evaluate("document.getElementById('verdict').textContent")
    assert browser.evaluate("document.querySelector('#tiles .alarm dt').textContent") == "Failures/s"


@pytest.mark.parametrize("model", ["dense", "lookup", "sums", "strings", "wide", EVIL])
def test_the_form_sends_what_a_model_takes(server: Server, browser: Browser, model: str) -> None:
    browser.open(server.url + "/")
    browser.until("document.getElementById('model').options.length === 9", "models to choose from")
    choose(browser, model)
    outcome, answer = send(browser)
    assert re.fullmatch(r"200 OK, [\d.]+ m?s", outcome), (outcome, answer)
    head = (
        json.loads(answer)
        if model != "wide"
        else {"model_name": json.loads(answer[: answer.index(",")] + "}")["model_name"]}
    )
    assert head["model_name"] == model
    assert browser.complaints() == []


def test_the_form_shows_why_a_request_is_refused(server: Server, browser: Browser) -> None:
    browser.open(server.url + "/")
    browser.until("document.getElementById('model').options.length === 9", "models to choose from")
    choose(browser, "dense")
    browser.evaluate("document.getElementById('body').value = '{\"inputs\": []}'")
    outcome, answer = send(browser)
    assert outcome.startswith("400 Bad Request, ")
    assert "expected 1 inputs but got 0" in json.loads(answer)["error"]
    browser.evaluate("document.getElementById('body').value = '{\"zeros\"'")
    outcome, _ = send(browser)
    assert outcome.startswith("this is not JSON: ")


def test_the_form_works_with_the_keyboard_alone(server: Server, browser: Browser) -> None:
    browser.open(server.url + "/")
    browser.until("document.getElementById('body').value", "a sample")
    focused = []
    for _ in range(5):
        browser.press("Tab", 9)
        focused.append(browser.evaluate("document.activeElement.id"))
    assert focused == ["model", "body", "send", "sample", "answer"]
    choose(browser, "dense")
    browser.evaluate("document.getElementById('body').focus()")
    browser.press("Enter", 13, modifiers=2)
    browser.until("document.getElementById('outcome').textContent.startsWith('200 OK')", "the answer")


def test_a_name_that_is_markup_does_no_harm_and_nothing_comes_from_elsewhere(server: Server, browser: Browser) -> None:
    browser.open(server.url + "/")
    browser.until(f"{rate(EVIL)} === 0", "the model and its rate")
    choose(browser, EVIL)
    assert send(browser)[0].startswith("200 OK")
    assert browser.evaluate("document.title") == "Penstock"
    assert browser.evaluate("document.querySelectorAll('img, iframe, object, embed').length") == 0
    assert browser.evaluate("document.querySelectorAll('script').length") == 1
    assert {url for url in browser.requests() if not url.startswith(server.url + "/")} <= {"about:blank", "data:,"}
    paths = {url.removeprefix(server.url) for url in browser.requests()}
    assert {"/", "/events"} < paths
    assert "/favicon.ico" not in paths
    assert browser.complaints() == []


def test_the_browser_would_run_nothing_else(server: Server, browser: Browser) -> None:
    """Were a name put in as markup by mistake, the policy would still hold."""
    browser.open(server.url + "/")
    browser.evaluate(
        """(() => {
          const script = document.createElement("script");
          script.textContent = "document.title = 'harmed'";
          document.body.append(script);
          const holder = document.createElement("div");
          holder.innerHTML = "<img src=x onerror=\\"document.title='harmed'\\">";
          document.body.append(holder);
        })()"""
    )
    browser.until("document.querySelector('#models tbody tr')", "the page to go on")
    assert browser.evaluate("document.title") == "Penstock"
    assert any("Content Security Policy" in complaint for complaint in browser.complaints())


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [320, 390, 768, 900, 1280])
def test_it_fits_every_width_in_light_and_dark(server: Server, browser: Browser, width: int, dark: bool) -> None:
    browser.size(width, 800)
    browser.dark(dark)
    browser.open(server.url + "/")
    browser.until("document.querySelectorAll('.box.up').length === 5", "the picture")
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    outside = browser.evaluate(
        "[...document.querySelectorAll('td, .box, figure, dd')].filter((each) => "
        "each.getBoundingClientRect().right > innerWidth + 1).length"
    )
    assert outside == 0
    red, green, blue = map(
        int, re.findall(r"\d+", browser.evaluate("getComputedStyle(document.body).backgroundColor"))[:3]
    )
    assert (red + green + blue < 150) == dark
    assert browser.picture().startswith(b"\x89PNG")


@pytest.fixture
def apart(start_process: StartProcess, repository: Path, tmp_path: Path) -> Callable[..., Process]:
    """Processes one by one, so that nobody starts again what has died."""
    runtime = f"--runtime-dir={tmp_path / 'run'}"

    def start(role: str) -> Process:
        arguments = {
            "broker": [],
            "worker": [str(repository), "--name=w"],
            "gateway": ["--http=127.0.0.1:0"],
        }
        return start_process(role, *arguments[role], runtime)

    return start


def url_of(gateway: Process) -> str:
    found: re.Match[str] = wait_for(
        lambda: re.search(r"url=(http://\S+)", "\n".join(gateway.errors)), "the gateway to listen"
    )
    return found[1]


def box(name: str, state: str) -> str:
    return f"document.querySelector('.box.{state}[data-name=\"{name}\"]')"


def test_a_killed_worker_turns_red_and_comes_back(apart: Callable[..., Process], browser: Browser) -> None:
    apart("broker")
    worker, gateway = apart("worker"), apart("gateway")
    browser.open(url_of(gateway) + "/")
    browser.until(box("w", "up"), "the worker")
    worker.end(signal.SIGKILL)
    browser.until(box("w", "missing"), "it to be missing")
    browser.until("document.querySelector('#verdict.bad')", "the verdict")
    assert "the worker w has been missing for" in browser.evaluate("document.getElementById('verdict').textContent")
    assert (
        browser.evaluate("getComputedStyle(document.querySelector('.box.missing rect')).stroke") == "rgb(179, 21, 31)"
    )
    apart("worker")
    browser.until(box("w", "up"), "it to be back")
    browser.until("document.querySelector('#verdict.good')", "all to be well")


def test_a_lost_broker_is_red_and_a_lost_gateway_is_said(apart: Callable[..., Process], browser: Browser) -> None:
    broker = apart("broker")
    apart("worker")
    gateway = apart("gateway")
    browser.open(url_of(gateway) + "/")
    browser.until(box("broker", "up"), "the broker")
    browser.until(box("w", "up"), "the worker")
    broker.end(signal.SIGKILL)
    browser.until(box("broker", "missing"), "the broker to be missing")
    browser.until(box("w", "unknown"), "nothing to be known of the worker")
    apart("broker")
    browser.until(box("broker", "up"), "the broker to be back")
    browser.until(box("w", "up"), "the worker to be known again")
    assert gateway.end() == 0, "its stream does not keep it"
    browser.until("document.getElementById('link').textContent.startsWith('connection lost')", "the end to be noticed")
